"""A GGUF file as ``model.path``: converted once, known by its content, errors in words."""

import shutil

import pytest

from experiments.content import checkpoint_files
from experiments.models import gguf
from experiments.models.load import load_model, resolve_path
from experiments.settings.config import ROOT, ConfigError, ModelConfig, RunConfig


@pytest.fixture
def file(tmp_path, monkeypatch):
    """Not a real one: what reads it is replaced."""
    monkeypatch.setenv("PBS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(gguf, "find_spec", lambda name: name)
    path = tmp_path / "small.Q4.gguf"
    path.write_bytes(b"GGUF of a small model")
    return path


def test_it_is_converted_once_and_then_loaded_like_all_others(file, monkeypatch):
    calls = []

    def convert(path, folder):
        calls.append(path)
        shutil.copytree(ROOT / "experiments" / "tiny", folder)

    monkeypatch.setattr(gguf, "convert", convert)
    loaded = load_model(ModelConfig(path=str(file)))
    assert loaded.tokenizer is not None
    assert resolve_path(str(file)) == resolve_path(str(file))
    assert calls == [file]


def test_another_file_is_another_model(file, compose_cell):
    word = f"model.path={file}"
    first = RunConfig.from_hydra(compose_cell("method=flash", "model=hf", word))
    assert first.model_name == "small.Q4.gguf"
    assert set(checkpoint_files(str(file))) == {"weights.gguf"}
    file.write_bytes(b"GGUF of another model")
    assert RunConfig.from_hydra(compose_cell("method=flash", "model=hf", word)).hash != first.hash


def test_what_cannot_be_read_is_said(file, monkeypatch):
    def convert(path, folder):
        raise KeyError("mamba")

    monkeypatch.setattr(gguf, "convert", convert)
    with pytest.raises(ConfigError, match="expected a Llama, Qwen2 or Qwen3 checkpoint"):
        resolve_path(str(file))
    monkeypatch.setattr(gguf, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install -e '\.\[real\]'"):
        resolve_path(str(file))
