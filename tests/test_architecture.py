"""Which package may import which, and that importing costs nothing it should not."""

import ast
import graphlib
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# From top to bottom: a package imports only from itself and those below it.
LAYERS = [
    "experiments.tools",
    "experiments.tiny",
    "experiments.run",
    "experiments.report",
    "experiments.benches",
    "experiments.timing",
    "experiments.models",
    "experiments.gate",
    "experiments.settings",
    "experiments",  # the modules beside the rooms
    "baselines",
    "pbs.patch",
    "pbs.methods",
    "pbs.orders",
    "pbs.selectors",
    "pbs.ops",
]
# What a user starts or imports by another name; nothing imports them.
ENTRIES = ("run", "pbs_attn")


def layer_of(module):
    return next((layer for layer in LAYERS if f"{module}.".startswith(f"{layer}.")), None)


def imports(path):
    """Modules a file imports anywhere in it."""
    return imports_of(ast.parse(path.read_text()))


def imports_of(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = (f"{node.module}.{alias.name}" for alias in node.names)
            yield from (name if is_module(name) else node.module for name in names)


def is_module(name):
    path = ROOT.joinpath(*name.split("."))
    return path.with_suffix(".py").is_file() or (path / "__init__.py").is_file()


def name_of(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def run_time_imports(path):
    """Modules a file imports, but for those that only type checkers see."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            node.body = []
    return imports_of(tree)


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


def test_nothing_imports_what_users_start():
    for path in source_files():
        assert not {name.split(".")[0] for name in imports(path)} & set(ENTRIES), path


def test_no_modules_import_each_other_in_a_circle():
    """Not even inside functions."""
    graph = {name_of(path): set(run_time_imports(path)) for path in source_files()}
    order = graphlib.TopologicalSorter(
        {name: (others & graph.keys()) - {name} for name, others in graph.items()}
    )
    order.prepare()  # raises CycleError, which names the circle


def test_every_folder_of_experiments_has_its_place():
    rooms = {path.parent.name for path in (ROOT / "experiments").glob("*/__init__.py")}
    assert rooms == {layer.split(".")[1] for layer in LAYERS if layer.startswith("experiments.")}


def test_no_module_has_the_name_of_a_folder_of_data():
    """`import experiments.results` must not depend on what lies beside it."""
    for folder in (ROOT / "experiments").rglob("*"):
        if folder.is_dir() and not (folder / "__init__.py").exists():
            assert not folder.with_suffix(".py").exists(), folder


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
