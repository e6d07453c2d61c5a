"""The wheel: complete, light, and enough for the README's lines with what it declares."""

import importlib.metadata as metadata
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[1]
# Packages of the environment that torch loads if they are there, and does without.
LAB = ("hydra", "omegaconf", "wandb", "matplotlib", "pandas", "scipy", "rich", "transformers")
LIBRARY = """
import sys, time
import torch
began = time.perf_counter()
import pbs
seconds = time.perf_counter() - began
q, k, v = torch.randn(1, 4, 1024, 32), torch.randn(1, 2, 1024, 32), torch.randn(1, 2, 1024, 32)
for name in ("pbs", "pbs_calibrated", "xattention"):
    with torch.inference_mode():
        assert pbs.build_method(name, threshold=0.5)(q, k, v).shape == q.shape
try:
    import pbs.patch.huggingface
except ImportError as error:
    assert "pbs-attn[hf]" in str(error), error
else:
    raise AssertionError("transformers is there")
print(seconds, pbs.__version__)
"""


@pytest.fixture(scope="session")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    names = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.splitlines()
    for name in names:
        if name.startswith(("pbs", "baselines", "experiments/")) or "/" not in name:
            if not (ROOT / name).is_file() or name.startswith("experiments/measured"):
                continue
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*command, "--wheel-dir", str(folder), str(source)], check=True)
    return next(folder.glob("*.whl"))


def names_of(wheel):
    with zipfile.ZipFile(wheel) as archive:
        return archive.namelist()


def test_it_has_types_data_and_the_plug_in(wheel):
    names = names_of(wheel)
    for needed in ("pbs/py.typed", "pbs/methods/crossover.csv", "pbs/patch/vllm/cuda.py"):
        assert needed in names
    for package in ("pbs", "baselines", "experiments"):
        modules = {str(path.relative_to(ROOT)) for path in (ROOT / package).rglob("*.py")}
        assert modules <= set(names)
    templates = (ROOT / "experiments" / "report" / "templates").glob("*.jinja")
    assert {str(path.relative_to(ROOT)) for path in templates} <= set(names)
    with zipfile.ZipFile(wheel) as archive:
        entries = next(name for name in names if name.endswith("entry_points.txt"))
        assert "pbs.patch.vllm:register" in archive.read(entries).decode()


def needed_by(requirements):
    """Distributions that these bring, and what those bring, as far as they are installed."""
    found, waiting = set(), list(requirements)
    while waiting:
        one = Requirement(waiting.pop())
        name = re.sub(r"[-_.]+", "-", one.name).lower()
        wanted = one.marker is None or any(
            one.marker.evaluate({"extra": extra}) for extra in (one.extras or {""})
        )
        if name in found or not wanted:
            continue
        try:
            waiting += metadata.requires(name) or []
        except metadata.PackageNotFoundError:
            continue
        found.add(name)
    return found


def test_the_library_runs_with_what_it_declares_alone(wheel, tmp_path):
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
        text = archive.read(next(n for n in archive.namelist() if n.endswith("METADATA"))).decode()
    declared = re.findall(r"^Requires-Dist: (.*)$", text, re.MULTILINE)
    core = [line for line in declared if "extra ==" not in line]
    assert {Requirement(line).name for line in core} == {
        *("torch", "triton", "numpy", "typing-extensions"),
    }
    brought = needed_by(core)
    for name in brought:  # files of the environment, and no others
        for file in metadata.files(name) or []:
            top = file.parts[0]
            place = Path(str(metadata.distribution(name).locate_file(top)))
            if top not in ("..", "__pycache__") and place.exists():
                link = tmp_path / "site" / top
                if not link.exists():
                    link.symlink_to(place)
    assert not {*LAB} & {path.name for path in (tmp_path / "site").iterdir()}
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "site")}
    environment.pop("PYTHONHOME", None)
    done = subprocess.run(
        [sys.executable, "-S", "-c", LIBRARY],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    seconds, version = done.stdout.split()
    assert float(seconds) < 1.5  # a second on an idle machine
    assert version == re.search(r"^Version: (.*)$", text, re.MULTILINE)[1]
