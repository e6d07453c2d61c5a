"""What users write."""

import warnings

import pytest
import torch

from pbs import AttentionPlan
from pbs.patch.huggingface import (
    apply_patch_with_prefill,
    get_patch,
)
from tests.patch.models import (
    WINDOW,
    make_model,
    random_ids,
)
from tests.patch.shared import close, densest


@pytest.fixture(autouse=True)
def _inference():
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def test_a_method_with_a_plan_of_its_own_runs():
    """Subclasses of AttentionMethod need plan() only."""
    from dataclasses import dataclass

    from pbs import AttentionMethod

    @dataclass(kw_only=True)
    class OnlyOwnTile(AttentionMethod):
        def select(self, call):
            grid = call.grid(16)
            none = torch.zeros(*call.q.shape[:2], grid.num_query_tiles, grid.num_key_tiles).bool()
            return AttentionPlan.from_block_mask(none, grid)

    model = make_model("llama")
    with apply_patch_with_prefill(model, OnlyOwnTile()):
        model(random_ids(1, 160))
        assert get_patch(model).report().density == pytest.approx(10 / 55)


def test_example_of_the_original_s_readme(project_root, capsys):
    from pbs_attn.patch.huggingface import (
        apply_patch_with_prefill,
        get_permuted_block_sparse_attn_fwd,
    )
    from transformers import AutoModelForCausalLM, AutoTokenizer

    PATH = str(project_root / "experiments" / "tiny")
    for prompt, is_sparse in (("the river", False), ("the river " * 300, True)):
        model = AutoModelForCausalLM.from_pretrained(
            PATH, torch_dtype=torch.bfloat16, device_map="auto"
        )
        tokenizer = AutoTokenizer.from_pretrained(PATH)
        inputs = tokenizer(prompt, return_tensors="pt").to(model.device)
        model = apply_patch_with_prefill(model, get_permuted_block_sparse_attn_fwd())
        output = model.generate(**inputs, max_new_tokens=30, do_sample=False)
        print(tokenizer.decode(output[0], skip_special_tokens=True))
        assert bool(get_patch(model).report().num_sparse_layers) == is_sparse
        assert capsys.readouterr().out


@pytest.fixture
def project_root():
    from pathlib import Path

    return Path(__file__).resolve().parents[2]


def test_sliding_window_is_computed_at_its_edge():
    """A window of w sees w keys: one less or more would move these logits."""
    model, ids = make_model("mistral_sliding"), random_ids(1, WINDOW + 1)
    expected = model(ids).logits
    with apply_patch_with_prefill(model, densest()):
        close(model(ids).logits, expected)
