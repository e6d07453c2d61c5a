"""Checkpoints and tokenizers that are broken, unusual or not supported, through whole cells."""

import json
import shutil
import struct

import pytest
import torch
from safetensors.torch import load_file, save_file

from experiments.benches.needle import NOT_FINITE
from experiments.models.load import load_model
from experiments.settings.config import ROOT, ConfigError, ModelConfig
from tests.reliability.messages import check_error, check_raised

TINY = ROOT / "experiments" / "tiny"
WEIGHTS = "model.safetensors"


def change(file, **entries):
    """Overwrite entries of a JSON file; ... takes one away."""

    def edit(folder):
        content = json.loads((folder / file).read_text())
        content.update(entries)
        content = {key: value for key, value in content.items() if value is not ...}
        (folder / file).write_text(json.dumps(content))

    return edit


def write(file, content):
    return lambda folder: (folder / file).write_bytes(content)


def remove(*files):
    return lambda folder: [(folder / file).unlink() for file in files]


def retensor(edit):
    """Change the tensors of the checkpoint."""

    def edit_file(folder):
        tensors = load_file(folder / WEIGHTS)
        edit(tensors)
        save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})

    return edit_file


def first(tensors, part):
    return next(name for name in tensors if part in name)


def pickled(folder):
    (folder / WEIGHTS).unlink()
    torch.save({"weight": torch.ones(2)}, folder / "pytorch_model.bin")


def index(content):
    def edit(folder):
        (folder / WEIGHTS).unlink()
        (folder / f"{WEIGHTS}.index.json").write_text(content)

    return edit


# What is done to the embedded model, and what the error says.
REFUSED = {
    "no tokenizer": (remove("tokenizer.json", "tokenizer_config.json"), "has no tokenizer"),
    "tokenizer broken": (write("tokenizer.json", b'{"a":'), "tokenizer.json of model.path="),
    "tokenizer empty": (write("tokenizer.json", b"{}"), "could not load the tokenizer"),
    "tokenizer settings": (write("tokenizer_config.json", b"no"), "tokenizer_config.json of"),
    "tokenizer list": (write("tokenizer_config.json", b"[]"), "must be a JSON object, got a list"),
    "template syntax": (write("chat_template.jinja", b"{% for x in %}"), "the chat template"),
    "template name": (write("chat_template.jinja", b"{{ messages[0].a.b }}"), "the chat template"),
    "template raises": (
        write("chat_template.jinja", b"{{ raise_exception('no user') }}"),
        "no user",
    ),
    "template escapes": (write("chat_template.jinja", b"{{ ''.__class__.a() }}"), "unsafe"),
    "template loses": (write("chat_template.jinja", b"hello"), "loses the user's text"),
    "template encoding": (
        write("chat_template.jinja", b"\xff\xfe"),
        "could not load the tokenizer",
    ),
    "config broken": (write("config.json", b"{"), "config.json of model.path="),
    "config list": (write("config.json", b"[]"), "must be a JSON object, got a list"),
    "config encoding": (write("config.json", "{}".encode("utf-16")), "is no JSON in UTF-8"),
    "config empty": (write("config.json", b""), "config.json of model.path="),
    "config deep": (write("config.json", b"[" * 100000), "config.json of model.path="),
    "no type": (change("config.json", model_type=...), "`model_type` key"),
    "unknown type": (change("config.json", model_type="nope"), "model type `nope`"),
    "no heads": (change("config.json", num_attention_heads=0), "could not load the config.json"),
    "odd heads": (change("config.json", num_attention_heads=3), "not a multiple of the number"),
    "other key heads": (change("config.json", num_key_value_heads=1), "other shapes"),
    "no layers": (change("config.json", num_hidden_layers=0), "layers that config.json leaves out"),
    "more layers": (change("config.json", num_hidden_layers=3), "they would be random"),
    "fewer layers": (change("config.json", num_hidden_layers=1), "layers that config.json leaves"),
    "vocabulary": (change("config.json", vocab_size=10), "other shapes than config.json says"),
    "vocabulary type": (change("config.json", vocab_size="x"), "expected int, got str"),
    "activation": (change("config.json", hidden_act="nope"), "knows nothing called 'nope'"),
    "rope": (change("config.json", rope_parameters={"rope_type": "nope"}), "'nope'"),
    "stored dtype": (change("config.json", dtype="float99"), "float99"),
    "encoder": (change("config.json", model_type="bert"), "they would be random"),
    "own code": (
        change("config.json", model_type="mine", auto_map={"AutoConfig": "mine.Config"}),
        "model.trust_remote_code=true",
    ),
    "quantised": (
        change("config.json", quantization_config={"quant_method": "gptq", "bits": 4}),
        "could not load the weights",
    ),
    "no weights": (remove(WEIGHTS), "has no weights: expected *.safetensors"),
    "pickle": (pickled, "reading a pickle can run any code"),
    "pickle renamed": (
        lambda folder: torch.save({"a": torch.ones(2)}, folder / WEIGHTS),
        "could not load the weights",
    ),
    "weights empty": (write(WEIGHTS, b""), "header too small"),
    "weights cut": (
        lambda folder: (folder / WEIGHTS).write_bytes((TINY / WEIGHTS).read_bytes()[:100000]),
        "file not fully covered",
    ),
    "weights junk": (write(WEIGHTS, b"x" * 1000), "could not load the weights"),
    "weights header": (write(WEIGHTS, struct.pack("<Q", 2**62) + b"x"), "header too large"),
    "tensor missing": (retensor(lambda t: t.pop(first(t, "q_proj"))), "lack 1 tensors"),
    "tensor shape": (
        retensor(lambda t: t.update({first(t, "q_proj"): torch.ones(3, 3)})),
        "shapes",
    ),
    "tensors renamed": (
        retensor(lambda t: [t.update({f"x.{name}": t.pop(name)}) for name in list(t)]),
        "they would be random",
    ),
    "shard missing": (
        index(json.dumps({"metadata": {}, "weight_map": {"a": "model-1.safetensors"}})),
        "model-1.safetensors",
    ),
    "index broken": (index("{"), ".index.json of model.path="),
    "end token": (change("generation_config.json", eos_token_id="x"), "eos_token_id must be"),
}
NOT_NUMBERS = {
    "nan": retensor(lambda tensors: tensors[first(tensors, "q_proj")].fill_(float("nan"))),
    "inf": retensor(lambda tensors: tensors[first(tensors, "norm")].fill_(float("inf"))),
}
# Unusual, and no reason to refuse: the answers must be those of the embedded model.
TAKEN = {
    "no template": remove("chat_template.jinja"),
    "no pad token": change("tokenizer_config.json", pad_token=...),
    "no pad and end token": change("tokenizer_config.json", pad_token=..., eos_token=...),
    "no special tokens": change(
        "tokenizer_config.json", pad_token=..., eos_token=..., bos_token=..., unk_token=...
    ),
    "unknown tokenizer class": change("tokenizer_config.json", tokenizer_class="Nope"),
    "a tensor too many": retensor(lambda t: t.update(extra=torch.ones(3))),
    "sampling by default": change("generation_config.json", do_sample=True, temperature=2.0),
    "no end token": change("generation_config.json", eos_token_id=None),
}


def changed(folder, edit):
    """A changed copy of the embedded model."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(TINY, folder)
    edit(folder)
    return folder


@pytest.fixture
def run_checkpoint(run, tmp_path):
    """Run a cell on a changed copy of the embedded model; returns its metrics."""

    def run_checkpoint(edit, *words):
        folder = changed(tmp_path / "checkpoint", edit)
        words = ["model=hf", f"model.path='{folder}'", "model.name=changed", *words]
        return run("method=pbs", "bench.tasks=[single]", *words).metrics()

    return run_checkpoint


def test_broken_checkpoints_are_refused(tmp_path):
    for name, (edit, message) in REFUSED.items():
        folder = changed(tmp_path / "checkpoint", edit)
        with pytest.raises(ConfigError) as caught:
            load_model(ModelConfig(path=str(folder)))
        assert message in str(caught.value), (name, str(caught.value))
        # transformers' own words for the type of an entry
        if "expected int" not in message:
            check_raised(caught.value)
    print(f"checkpoints refused: {len(REFUSED)}")
    assert len(REFUSED) >= 45


def test_a_refused_checkpoint_is_a_failed_cell(run_checkpoint):
    metrics = run_checkpoint(pickled)
    assert metrics["status"] == "failed"
    check_error(metrics["error"], "pytorch_model.bin", "reading a pickle can run any code")
    for name, edit in NOT_NUMBERS.items():
        metrics = run_checkpoint(edit)
        assert metrics["status"] == "failed", name
        check_error(metrics["error"], NOT_FINITE[:40])
        checked = run_checkpoint(edit, "check=true", "seed=1")
        assert checked["status"] == "failed", name


def test_unusual_checkpoints_answer_as_they_should(run_checkpoint, run):
    accuracy = run("method=pbs", "bench.tasks=[single]").metrics()["results"]["total"]["accuracy"]
    assert accuracy == 1
    for name, edit in TAKEN.items():
        metrics = run_checkpoint(edit)
        assert metrics["status"] == "finished", (name, metrics.get("error"))
        assert metrics["results"]["total"]["accuracy"] == accuracy, name
    print(f"unusual checkpoints: {len(TAKEN)}")
    assert len(TAKEN) >= 8


def test_the_gate_needs_no_pad_token_and_no_template(run_checkpoint):
    def edit(folder):
        TAKEN["no special tokens"](folder)
        TAKEN["no template"](folder)

    metrics = run_checkpoint(edit, "check=true")
    assert metrics["status"] == "finished"
    assert metrics["gate"]["passed"]


# Families that the plug-in cannot serve, at their smallest.
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 343}
FAMILIES = {
    "bert": ({}, "is not causal self-attention"),
    "bloom": ({"n_layer": 2, "n_head": 4}, "does not go through transformers' attention registry"),
    "falcon": ({"alibi": True}, "does not go through transformers' attention registry"),
    "mpt": ({"d_model": 32, "n_layers": 2, "n_heads": 4}, "does not go through transformers'"),
    "mamba": ({"state_size": 4}, "has no attention layer"),
    "bart": ({"d_model": 32, "encoder_layers": 1, "decoder_layers": 1}, "is not causal"),
    "t5": ({"d_model": 32, "num_layers": 2, "num_heads": 4}, "is no causal language model"),
    "llama4_text": ({"num_local_experts": 2, "attention_chunk_size": 16}, "chunked attention"),
}


def test_models_with_unsupported_attention_are_refused(run, tmp_path):
    for family, (settings, message) in FAMILIES.items():
        folder = tmp_path / family
        folder.mkdir()
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(TINY / name, folder)
        content = {"model_type": family, **SIZES, **settings}
        (folder / "config.json").write_text(json.dumps(content))
        words = ["model=hf", f"model.path='{folder}'", "model.weights=random"]
        metrics = run("method=pbs", "bench.tasks=[single]", *words).metrics()
        assert metrics["status"] == "failed", family
        check_error(metrics["error"], message)
    print(f"unsupported families: {len(FAMILIES)}")
    assert len(FAMILIES) >= 8


def test_tensors_that_are_not_used_are_said(tmp_path, caplog):
    folder = tmp_path / "checkpoint"
    shutil.copytree(TINY, folder)
    TAKEN["a tensor too many"](folder)
    load_model(ModelConfig(path=str(folder)))
    assert "1 tensors of model.path=" in caplog.text
    assert "are not used (extra)" in caplog.text
