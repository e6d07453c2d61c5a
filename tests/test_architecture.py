"""Which package may import which, and that importing costs nothing it should not."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# From top to bottom: a package imports only from itself and those below it.
LAYERS = [
    "experiments",
    "baselines",
    "pbs.patch",
    "pbs.methods",
    "pbs.orders",
    "pbs.selectors",
    "pbs.ops",
]


def layer_of(module):
    return next((layer for layer in LAYERS if f"{module}.".startswith(f"{layer}.")), None)


def imports(path):
    """Modules a file imports anywhere in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module


def source_files():
    for package in ("pbs", "baselines", "experiments"):
        yield from sorted((ROOT / package).rglob("*.py"))


@pytest.mark.parametrize("path", source_files(), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_downwards(path):
    own = layer_of(".".join(path.relative_to(ROOT).with_suffix("").parts))
    for module in imports(path):
        other = layer_of(module)
        if own and other:
            assert LAYERS.index(other) >= LAYERS.index(own), f"{path} imports {module}"
        if path.is_relative_to(ROOT / "pbs"):
            top = module.split(".")[0]
            assert top not in {"hydra", "wandb", "experiments", "baselines", "omegaconf"}
            if top == "transformers":
                assert "patch" in path.parts


def loaded_by(statement):
    code = f"import sys; {statement}; print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return set(done.stdout.split())


def test_importing_pbs_loads_no_optional_package():
    modules = loaded_by("import pbs, pbs.methods, baselines")
    assert not modules & {"triton", "transformers", "hydra", "wandb", "pandas", "experiments"}


def test_methods_load_when_asked_for():
    modules = loaded_by("import pbs; pbs.build_method('flash')")
    assert "baselines.flash" in modules
    assert "baselines.meanpool" not in modules


def test_kernels_avoid_what_newer_tritons_removed():
    for path in source_files():
        text = path.read_text()
        assert "make_block_ptr" not in text, path
        assert "tl.advance" not in text, path
