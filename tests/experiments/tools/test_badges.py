"""Badges are added once, move with the address, and leave the notebooks as they are."""

import json
import shutil

import pytest

from experiments.tools.badges import CELL, NOTEBOOKS, add_badges, main


def read(folder):
    return {
        path.name: json.loads(path.read_text(encoding="utf-8")) for path in folder.glob("*.ipynb")
    }


@pytest.fixture
def copies(tmp_path):
    for path in NOTEBOOKS.glob("*.ipynb"):
        shutil.copy(path, tmp_path)
    return tmp_path


def test_each_notebook_gets_one_badge_with_the_latest_address(copies):
    before = read(NOTEBOOKS)
    assert sorted(add_badges(copies, "someone/pbs", "main")) == sorted(before)
    main(["other/pbs-attn", "--branch", "dev", "--folder", str(copies)])
    for name, notebook in read(copies).items():
        first, *rest = notebook["cells"]
        assert first["id"] == CELL
        address = f"colab.research.google.com/github/other/pbs-attn/blob/dev/notebooks/{name})"
        assert address in first["source"][0]
        assert rest == before[name]["cells"]


def test_removing_the_badge_restores_the_file_byte_for_byte(copies):
    add_badges(copies, "someone/pbs", "main")
    for name, notebook in read(copies).items():
        del notebook["cells"][0]
        restored = json.dumps(notebook, indent=1, ensure_ascii=False) + "\n"
        assert restored == (NOTEBOOKS / name).read_text(encoding="utf-8")


@pytest.mark.parametrize("repository", ["pbs", "https://github.com/a/b", "a b/c", ""])
def test_what_is_no_repository_is_refused(repository, copies):
    with pytest.raises(ValueError, match="OWNER/NAME"):
        add_badges(copies, repository, "main")
