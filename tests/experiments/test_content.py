"""Digests: of files, whole and remembered; of what a model saw; of the project's source."""

import os

import pytest
import torch

from experiments import content
from experiments.content import digests_of, file_digest, input_digest, source_digest


@pytest.fixture
def large(tmp_path, monkeypatch):
    """A file that counts as large, written some time ago, and a cache folder of its own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(content, "LARGE_BYTES", 100)
    monkeypatch.setattr(content, "SETTLED_SECONDS", -1.0)
    monkeypatch.setattr(content, "_KNOWN", {})
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"a" * 1000)
    return path


def notes(tmp_path):
    return list((tmp_path / "cache" / "pbs" / "digests").glob("*.json"))


def test_a_large_file_is_read_once_and_again_when_it_changes(large, tmp_path, monkeypatch):
    first = file_digest(large)
    assert len(notes(tmp_path)) == 1
    monkeypatch.setattr(content, "_KNOWN", {})  # another process
    with monkeypatch.context() as patch:
        patch.setattr(content, "_read", lambda _: pytest.fail("read again"))
        assert file_digest(large) == first
    stat = large.stat()
    with large.open("r+b") as file:
        file.seek(500)
        file.write(b"b")
    os.utime(large, ns=(stat.st_atime_ns, stat.st_mtime_ns))  # hides nothing
    assert file_digest(large) != first


def test_a_cache_that_is_broken_or_cannot_be_written_costs_time_only(large, tmp_path, monkeypatch):
    first = file_digest(large)
    notes(tmp_path)[0].write_text("{")
    monkeypatch.setattr(content, "_KNOWN", {})
    assert file_digest(large) == first
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    monkeypatch.setattr(content, "_KNOWN", {})
    assert file_digest(large) == first


def test_a_file_that_was_just_written_is_not_remembered(tmp_path, monkeypatch):
    monkeypatch.setattr(content, "_KNOWN", {})
    path = tmp_path / "text.txt"
    path.write_text("a")
    file_digest(path)
    assert content._KNOWN == {}


def test_what_cannot_be_read_is_named_so(tmp_path):
    assert digests_of({"text": tmp_path / "nothing"}) == {"text": "unreadable"}


def test_ids_have_one_digest_however_they_are_held():
    digest = input_digest([1, 2, 3])
    assert digest == input_digest(torch.tensor([[1, 2, 3]], dtype=torch.int32))
    assert len({digest, input_digest([1, 2]), input_digest([1], [2, 3]), input_digest("1")}) == 4
    assert input_digest(torch.ones(2)) != input_digest(torch.ones(3))


def test_an_edited_module_changes_the_source_digest(tmp_path, monkeypatch):
    for package in content.PACKAGES:
        (tmp_path / package).mkdir()
        (tmp_path / package / "module.py").write_text("a = 1\n")
    monkeypatch.setattr(content, "ROOT", tmp_path)
    digests = set()
    for package in (None, *content.PACKAGES):
        if package:
            (tmp_path / package / "module.py").write_text("a = 2\n")
        source_digest.cache_clear()
        digests.add(source_digest())
    source_digest.cache_clear()
    assert len(digests) == 1 + len(content.PACKAGES)
