"""Loading: the embedded model, local folders, and errors that say what to do."""

import json

import pytest
import torch

from experiments.models.load import load_model, resolve_path
from experiments.settings.config import ROOT, ConfigError, ModelConfig

TINY = "experiments/tiny"


def test_the_embedded_model_loads_once():
    loaded = load_model(ModelConfig(name="tiny", path=TINY))
    assert loaded.max_length == 32768
    assert not loaded.model.training
    assert load_model(ModelConfig(name="tiny", path=TINY)) is loaded


def test_a_relative_folder_is_found_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert resolve_path(TINY) == str(ROOT / TINY)
    assert resolve_path("Qwen/Qwen3-8B") == "Qwen/Qwen3-8B"


def test_dtype_limit_and_config_are_taken_from_the_settings():
    loaded = load_model(
        ModelConfig(
            path=TINY,
            dtype="bfloat16",
            max_length=2048,
            config={"rope_scaling": {"rope_type": "linear", "factor": 2.0}},
        )
    )
    assert loaded.model.dtype == torch.bfloat16
    assert loaded.max_length == 2048
    assert loaded.model.model.rotary_emb.rope_type == "linear"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"path": "/no/such/folder"}, "no such folder"),
        ({"path": "./nowhere"}, "no such folder"),
        ({"path": "nobody/nothing"}, "Without network"),
        ({"path": TINY, "dtype": "float33"}, "expected auto, float32"),
        ({"path": TINY, "dtype": "int8"}, "no floating-point dtype"),
        ({"path": TINY, "device": "toaster"}, "expected auto, cpu, cuda"),
        ({"path": TINY, "config": {"no_such_entry": 1}}, "no such entry"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_mistakes_are_explained(settings, message):
    with pytest.raises(ConfigError, match=message):
        load_model(ModelConfig(**settings))


def test_a_missing_gpu_is_said(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="no GPU"):
        load_model(ModelConfig(path=TINY, device="cuda"))


def test_a_folder_that_is_no_checkpoint_is_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(ConfigError, match=r"without config\.json"):
        load_model(ModelConfig(path=str(tmp_path)))


def test_weights_that_are_no_safetensors_are_refused(tmp_path):
    config = json.loads((ROOT / TINY / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_text((ROOT / TINY / name).read_text())
    torch.save({}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ConfigError, match="safetensors"):
        load_model(ModelConfig(path=str(tmp_path)))
