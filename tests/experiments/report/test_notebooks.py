"""Every notebook runs on small real results and on an empty folder."""

import json
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from experiments.settings.config import ROOT

NOTEBOOKS = {path.stem: path for path in sorted((ROOT / "notebooks").glob("*.ipynb"))}
# Pictures that a notebook draws, on the small results and on an empty folder.
PICTURES = {
    "compare_baselines": (2, 0),
    "coverage_and_permutation": (4, 2),
    "real_model": (2, 2),
    "timing": (13, 8),
    "your_own_method": (1, 1),
}
SENTENCE = "make some with"


def execute(folder: Path, outputs: Path) -> dict[str, dict[str, list[dict]]]:
    """What the cells of each notebook show, run beside real outputs ("some") and an empty folder.

    One after another in one kernel, emptied of names in between: loading torch in a kernel of its
    own for each would take most of the time.
    """
    (folder / "empty").mkdir()
    together = nbformat.v4.new_notebook()
    parts = {}
    for kind, there in (("some", outputs), ("none", folder / "empty")):
        place = folder / kind
        (place / "notebooks").mkdir(parents=True)
        (place / "outputs").symlink_to(there)
        for name, path in NOTEBOOKS.items():
            cells = nbformat.read(path, as_version=4).cells
            parts[kind, name] = slice(len(together.cells) + 1, len(together.cells) + 1 + len(cells))
            begin = f"%reset -f\nimport os\nos.chdir({str(place / 'notebooks')!r})"
            together.cells += [nbformat.v4.new_code_cell(begin), *cells]
    resources = {"metadata": {"path": str(ROOT)}}
    NotebookClient(together, timeout=240, kernel_name="python3", resources=resources).execute()
    found: dict[str, dict[str, list[dict]]] = {"some": {}, "none": {}}
    for (kind, name), part in parts.items():
        found[kind][name] = [
            output for cell in together.cells[part] for output in cell.get("outputs", [])
        ]
    return found


def count_pictures(shown: dict[str, list[dict]]) -> dict[str, int]:
    return {
        name: sum("image/png" in output.get("data", {}) for output in outputs)
        for name, outputs in shown.items()
    }


def test_notebooks_show_the_results_there_are_and_else_say_what_to_run(tmp_path, outputs):
    shown = execute(tmp_path, outputs)
    some, none = shown["some"], shown["none"]
    assert count_pictures(some) == {name: count for name, (count, _) in PICTURES.items()}
    # None of these runs is of bench=likelihood.
    assert [name for name in some if SENTENCE in json.dumps(some[name])] == ["real_model"]
    assert "pbs threshold=0.5" in json.dumps(some["compare_baselines"])
    assert "pbs threshold=0.5" in json.dumps(some["your_own_method"])
    assert count_pictures(none) == {name: count for name, (_, count) in PICTURES.items()}
    assert [name for name in none if SENTENCE not in json.dumps(none[name])] == []


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_notebooks_are_kept_without_outputs(name):
    for cell in json.loads(NOTEBOOKS[name].read_text())["cells"]:
        assert not cell.get("outputs")
        assert cell.get("execution_count") is None


def test_the_index_names_every_notebook():
    index = (ROOT / "notebooks" / "README.md").read_text()
    assert list(NOTEBOOKS) == sorted(PICTURES)
    assert all(f"({path.name})" in index for path in NOTEBOOKS.values())


def test_a_selector_of_ones_own_is_short():
    """What the notebook promises: about thirty lines, without imports and blank lines."""
    notebook = json.loads(NOTEBOOKS["your_own_method"].read_text())
    cell = next(cell for cell in notebook["cells"] if "\nclass " in "".join(cell["source"]))
    lines = [line.strip() for line in cell["source"]]
    code = [line for line in lines if line and not line.startswith(("#", "import", "from"))]
    assert len(code) <= 30
