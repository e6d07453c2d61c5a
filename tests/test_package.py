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


def install(wheel, folder, extra=""):
    """The wheel and what it declares, with links to the environment's files; what is declared."""
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
        text = archive.read(next(n for n in archive.namelist() if n.endswith("METADATA"))).decode()
    declared = [Requirement(line) for line in re.findall(r"^Requires-Dist: (.*)$", text, re.M)]
    wanted = [
        str(one).partition(";")[0]
        for one in declared
        if one.marker is None or one.marker.evaluate({"extra": extra})
    ]
    for name in needed_by(wanted):
        for file in metadata.files(name) or []:
            top = file.parts[0]
            place = Path(str(metadata.distribution(name).locate_file(top)))
            link = folder / top
            if top not in ("..", "__pycache__") and place.exists() and not link.exists():
                link.symlink_to(place)
    return text, wanted


def run_alone(code, folder, where):
    """Python without the environment's packages."""
    environment = {**os.environ, "PYTHONPATH": str(folder)}
    environment.pop("PYTHONHOME", None)
    done = subprocess.run(
        [sys.executable, "-S", "-c", code],
        cwd=where,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_library_runs_with_what_it_declares_alone(wheel, tmp_path):
    site = tmp_path / "site"
    text, wanted = install(wheel, site)
    names = {Requirement(line).name for line in wanted}
    assert names == {"torch", "triton", "numpy", "typing-extensions"}
    assert not {*LAB} & {path.name for path in site.iterdir()}
    seconds, version = run_alone(LIBRARY, site, tmp_path).split()
    assert float(seconds) < 1.5  # a second on an idle machine
    assert version == re.search(r"^Version: (.*)$", text, re.MULTILINE)[1]


def test_the_readmes_lines_run_with_the_extra_hf(wheel, tmp_path):
    site = tmp_path / "site"
    install(wheel, site, extra="hf")
    assert not {"hydra", "wandb", "matplotlib", "pandas"} & {path.name for path in site.iterdir()}
    lines = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)[1]
    prompt = (
        f"PATH, long_prompt = {str(ROOT / 'experiments' / 'tiny')!r}, 'the old bridge ' * 700\n"
    )
    printed = run_alone(prompt + lines, site, tmp_path)
    assert "layer  sparse  dense  density" in printed
    assert printed.strip().splitlines()[-1].startswith("  all       2")
