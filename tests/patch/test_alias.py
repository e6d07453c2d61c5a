"""``pbs_attn`` is another name of ``pbs``, not another copy."""

import importlib
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
NEEDS_VLLM = [ROOT / "pbs" / "patch" / "vllm" / name for name in ("cpu.py", "cuda.py")]


def run(code):
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_package_is_the_same_object():
    import pbs
    import pbs_attn

    assert pbs_attn is pbs


@pytest.mark.parametrize(
    "name", ["patch.huggingface", "patch.huggingface.masks", "ops.plan", "methods.pbs", "registry"]
)
def test_submodules_are_the_same_objects(name):
    alias = importlib.import_module(f"pbs_attn.{name}")
    assert alias is importlib.import_module(f"pbs.{name}")
    assert alias.__spec__.name == f"pbs.{name}"


@pytest.mark.parametrize("first", ["pbs", "pbs_attn"])
def test_one_copy_whichever_name_comes_first(first):
    """In a fresh process; the core alone loads no transformers under either name."""
    run(
        f"""
import sys
import {first}.ops.plan
import pbs, pbs_attn
assert pbs_attn is pbs
assert sys.modules["pbs_attn.ops"] is pbs.ops if {first!r} == "pbs_attn" else True
from pbs_attn.ops.plan import AttentionPlan as A
from pbs.ops.plan import AttentionPlan as B
assert A is B
names = [m.__name__ for m in sys.modules.values() if m.__name__.startswith("pbs_attn")]
assert not names, names
assert "transformers" not in sys.modules
"""
    )


def test_unknown_submodule_raises_as_usual():
    with pytest.raises(ModuleNotFoundError, match=r"pbs_attn\.nothing"):
        importlib.import_module("pbs_attn.nothing")


def test_every_submodule_has_its_alias():
    for path in sorted((ROOT / "pbs").rglob("*.py")):
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        if path.name == "triton.py" or path in NEEDS_VLLM:
            continue
        alias = name.replace("pbs", "pbs_attn", 1)
        assert importlib.import_module(alias) is importlib.import_module(name)
