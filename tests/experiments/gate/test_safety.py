"""The safety gate passes right methods and stops every kind of wrong one."""

import copy
from dataclasses import dataclass, fields, replace

import pytest
import torch

import experiments.gate.safety as gate_module
from baselines.flash import FlashAttention
from experiments.gate import plans as gate_plans
from experiments.gate.safety import GateError, run_gate
from pbs import AttentionMethod, AttentionPlan, build_method
from pbs.methods.pbs import PBS
from pbs.patch.huggingface import apply_patch_with_prefill
from tests.patch.models import make_model

SMALL = {"block_size": 16, "segment_size": 32}


@pytest.fixture(scope="module")
def llama():
    return make_model("llama", attention="sdpa")


def gate(model, method):
    return run_gate(model, None, method, device="cpu", seed=0)


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt_oss", "mistral_sliding"])
def test_passes_a_right_method(name):
    model = make_model(name)
    report = gate(model, build_method("pbs", **SMALL))
    assert report.passed
    assert report.num_tokens == 301
    assert report.ran_sparse == (name in ("llama", "gemma3"))
    assert model.config._attn_implementation == "eager"
    assert [check.name for check in report.checks] == [
        "dense",
        "kernel",
        "future",
        "future tokens",
        "padding left",
        "padding right",
        "prefix",
    ]
    assert all(check.seconds > 0 for check in report.checks)
    plain = report.to_dict()
    assert plain["passed"] is True
    assert plain["checks"][0]["name"] == "dense"
    assert plain["seconds"] > 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_passes_in_low_precision(dtype):
    assert gate(make_model("llama").to(dtype), build_method("pbs", **SMALL)).ran_sparse


def test_passes_a_model_whose_batches_round_differently():
    model = make_model("llama")  # as matrix products on a GPU do, whose kernels go by the shape

    def round_differently(module, inputs, output):
        return output * (1 + 4e-5) if output.shape[0] > 1 else output

    model.lm_head.register_forward_hook(round_differently)
    assert gate(model, build_method("pbs", **SMALL)).passed
    assert caught(model, IgnoresPadding(**SMALL)) == "padding left"


@pytest.mark.parametrize("name", ["flash", "meanpool"])
def test_passes_other_methods(llama, name):
    assert gate(llama, build_method(name)).ran_sparse == (name == "meanpool")


def test_lengthens_the_prompt_until_the_method_runs_sparse(llama):
    report = gate(llama, build_method("pbs", block_size=128, segment_size=512))
    assert report.num_tokens == 601
    assert report.ran_sparse


def test_a_method_without_a_dense_setting_says_so(llama):
    @dataclass(kw_only=True)
    class Fixed(AttentionMethod):
        def select(self, call):
            grid = call.grid(16)
            none = torch.zeros(*call.q.shape[:2], grid.num_query_tiles, grid.num_key_tiles).bool()
            return AttentionPlan.from_block_mask(none, grid)

    assert "has no setting" in gate(llama, Fixed()).densest


def test_leaves_model_method_and_mode_as_they_were(llama):
    method, heard = build_method("pbs", **SMALL), []
    method.recorder = recorder = lambda record: heard.append(record.layer_idx)
    llama.train()
    gate(llama, method)
    assert llama.training
    llama.eval()
    assert method.recorder is recorder
    assert heard
    assert llama.config._attn_implementation == "sdpa"


def test_a_patched_model_is_refused(llama):
    with (
        apply_patch_with_prefill(llama, build_method("flash")) as model,
        pytest.raises(ValueError, match="already patched"),
    ):
        gate(model, build_method("pbs"))


def test_a_model_with_broken_weights_is_refused(llama):
    broken = copy.deepcopy(llama)
    with torch.no_grad():
        next(broken.parameters())[5] = float("nan")
    with pytest.raises(GateError, match="logits are not finite"):
        gate(broken, build_method("pbs"))


def caught(model, method):
    with pytest.raises(GateError) as caught:
        gate(model, method)
    error = caught.value
    assert error.measured > error.allowed
    assert error.check in str(error)
    assert "measured" in str(error)
    assert "try backend='reference'" in str(error)
    return error.check


# Wrong methods, each by the check made for it


class SelectsTooLittle(PBS):
    """Drops blocks even at threshold 1."""

    def plan(self, q, k, **kwargs):
        plan = super().plan(q, k, **kwargs)
        return plan if plan.is_dense else replace(plan, num_blocks=plan.num_blocks // 2)


class SelectsTooLittleOfACache(SelectsTooLittle):
    """Right for a whole prompt only."""

    def plan(self, q, k, **kwargs):
        made_by = PBS if q.shape[2] == k.shape[2] else SelectsTooLittle
        return made_by.plan(self, q, k, **kwargs)


class LeakyKernel(PBS):
    """Attends to everything, the future too."""

    def _attend(self, q, k, v, scale, *_):
        groups = q.shape[1] // k.shape[1]
        k, v = (x.repeat_interleave(groups, dim=1) for x in (k, v))
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, scale=scale)


class DropsTheCache(PBS):
    """Attends only to the new tokens, as the original does."""

    def __call__(self, q, k, v, **kwargs):
        count = q.shape[2]
        kwargs["geometry"] = None
        return super().__call__(q, k[:, :, -count:], v[:, :, -count:], **kwargs)


class IgnoresPadding(PBS):
    """Attends to padding, as the original does."""

    def __call__(self, q, k, v, **kwargs):
        return super().__call__(q, k, v, **{**kwargs, "geometry": None})


class GivesNaN(PBS):
    def _attend(self, *args):
        return super()._attend(*args) * float("nan")


@pytest.mark.parametrize(
    ("method_class", "check"),
    [
        (SelectsTooLittle, "dense"),
        (LeakyKernel, "dense"),
        (GivesNaN, "dense"),
        (IgnoresPadding, "padding left"),
        (DropsTheCache, "prefix"),
        (SelectsTooLittleOfACache, "prefix"),
    ],
)
def test_stops_a_wrong_method(llama, method_class, check, monkeypatch):
    if method_class is DropsTheCache:
        # It ignores padding as well; look past that.
        monkeypatch.setattr(gate_module._Gate, "_check_padding", lambda self: iter(()))
    assert caught(llama, method_class(**SMALL)) == check


class LeakyPlan(PBS):
    """Names keys after their query below threshold 1, in plans built without validation."""

    def plan(self, q, k, **kwargs):
        plan = super().plan(q, k, **kwargs)
        if plan.is_dense or self.threshold == 1:
            return plan
        return UncheckedPlan(**{field.name: getattr(plan, field.name) for field in fields(plan)})


class UncheckedPlan(AttentionPlan):
    def validate(self):
        pass

    def token_mask(self):
        mask = super().token_mask()
        mask[..., 5, 6] = True
        return mask


class BlindPlan(LeakyPlan):
    """A query that does not see itself."""

    def plan(self, q, k, **kwargs):
        plan = PBS.plan(self, q, k, **kwargs)
        if plan.is_dense or self.threshold == 1:
            return plan
        return replace(plan, num_windows=plan.num_windows * 0)


def test_stops_a_plan_that_sees_the_future(llama, monkeypatch):
    # The kernel does not follow such a plan, which its own check would notice first.
    monkeypatch.setattr(gate_plans, "_kernel_error", lambda *_: 0.0)
    assert caught(llama, LeakyPlan(**SMALL)) == "future"


def test_stops_an_inconsistent_plan(llama):
    """On a GPU plans are not validated as they are made."""

    class Inconsistent(PBS):
        def plan(self, q, k, **kwargs):
            plan = super().plan(q, k, **kwargs)
            if not plan.is_dense and self.threshold < 1:
                # Overlaps the next window: its keys count twice.
                windows = plan.windows.clone()
                windows[..., 0] += 1
                object.__setattr__(plan, "windows", windows)
            return plan

    with pytest.raises(GateError, match="inconsistent plan"):
        gate(llama, Inconsistent(**SMALL))


def test_stops_a_plan_that_hides_a_query_from_itself(llama, monkeypatch):
    monkeypatch.setattr(gate_plans, "_kernel_error", lambda *_: 0.0)
    assert caught(llama, BlindPlan(**SMALL)) == "future"


def test_stops_a_wrong_kernel(llama, monkeypatch):
    right = gate_plans.block_sparse_attention
    monkeypatch.setattr(
        gate_plans, "block_sparse_attention", lambda *a, **k: right(*a, **k) * 1.001
    )
    assert caught(llama, build_method("pbs", **SMALL)) == "kernel"


def test_stops_what_lets_later_tokens_through(llama, monkeypatch):
    """Past the dense check, a leak shows in the logits of earlier tokens."""
    monkeypatch.setattr(gate_module._Gate, "_check_dense", lambda self: iter(()))
    assert caught(llama, LeakyKernel(**SMALL)) == "future tokens"


def test_dense_stands_in_where_a_method_has_no_dense_setting():
    assert build_method("flash").densest() is None
    assert isinstance(build_method("flash"), FlashAttention)
    assert build_method("pbs", threshold=0.5).densest() == build_method("pbs", threshold=1.0)
