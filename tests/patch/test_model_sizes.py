"""Settings per layer or head must be for the patched model."""

import json

import pytest
import torch

from pbs import build_method
from pbs.patch.huggingface import apply_patch_with_prefill
from tests.patch.models import make_hybrid, make_model, random_ids


def head_file(folder, num_layers, num_heads):
    layer = {str(head): ["vertical_and_slash", 20, 12, 1.0] for head in range(num_heads)}
    path = folder / "heads.json"
    path.write_text(json.dumps([layer] * num_layers))
    return build_method("minference", preset="official", config_path=str(path))


def check_refused(method, message, **sizes):
    model = make_model("llama", **sizes)
    with pytest.raises(ValueError, match=message):
        apply_patch_with_prefill(model, method)
    assert model.config._attn_implementation == "eager"
    assert not any("_pbs_layer" in vars(module) for module in model.modules())


@pytest.mark.parametrize(("num_layers", "model_layers"), [(64, 48), (28, 3), (2, 3)])
def test_a_head_file_of_a_model_with_other_layers_is_refused(tmp_path, num_layers, model_layers):
    message = f"for {num_layers} layers of 4 heads, the model has {model_layers} layers of 4 heads"
    method = head_file(tmp_path, num_layers, 4)
    check_refused(method, message, num_hidden_layers=model_layers)


def test_a_head_file_of_a_model_with_other_heads_is_refused(tmp_path):
    method = head_file(tmp_path, 2, 8)
    check_refused(method, "for 2 layers of 8 heads, the model has 2 layers of 4 heads")


def test_the_models_own_head_file_runs(tmp_path):
    model = apply_patch_with_prefill(make_model("llama"), head_file(tmp_path, 2, 4))
    with torch.inference_mode():
        model(random_ids(1, 150))


@pytest.mark.parametrize(
    ("threshold", "message"),
    [
        ([[0.9] * 4] * 3, r"for 3 layers of 4 heads, the model has 2 layers of 4 heads"),
        ([[0.9] * 4], r"for 1 layers? of 4 heads, the model has 2 layers of 4 heads"),
        ([[0.9] * 8] * 2, r"for 2 layers of 8 heads, the model has 2 layers of 4 heads"),
        ([0.9] * 8, r"for 8 heads, the model has 4"),
    ],
    ids=["layers", "few", "heads", "flat"],
)
def test_thresholds_of_another_model_are_refused(threshold, message):
    check_refused(build_method("xattention", threshold=threshold), message)


@pytest.mark.parametrize("threshold", [0.9, [0.9] * 4, [[0.9] * 4] * 2], ids=str)
def test_thresholds_of_the_model_run(threshold):
    method = build_method("xattention", threshold=threshold)
    model = apply_patch_with_prefill(make_model("llama"), method)
    with torch.inference_mode():
        model(random_ids(1, 150))


@pytest.mark.parametrize("layer", [2, 5])
def test_a_starting_layer_past_the_model_is_refused(layer):
    method = build_method("minference", vertical_size=20, slash_size=12, starting_layer=layer)
    check_refused(method, f"starting_layer={layer}, but the model has 2 layers")


def test_a_model_cut_to_its_first_layers_is_the_model_its_config_says(tmp_path):
    model = make_model("llama", num_hidden_layers=3)
    model.model.layers = model.model.layers[:2]
    apply_patch_with_prefill(model, head_file(tmp_path, 3, 4))


def test_layers_without_attention_count(tmp_path):
    apply_patch_with_prefill(make_hybrid(), head_file(tmp_path, 3, 4))
    with pytest.raises(ValueError, match="the model has 3 layers"):
        apply_patch_with_prefill(make_hybrid(), head_file(tmp_path, 1, 4))
