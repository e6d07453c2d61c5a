"""Books: cleaned to running text, checked by digest, and not fetched twice."""

import pytest

from experiments.cached_models import sha256_of
from experiments.settings.config import ConfigError
from experiments.tools import texts

NAME = "debian-handbook"


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("PBS_CACHE", str(tmp_path))
    return tmp_path


def page(text, following=""):
    link = f'<link rel="next" href="{following}" />' if following else ""
    return (
        f"<html><head><title>Head</title>{link}</head><body><div id='banner'>Banner</div>"
        f"<ul class='docnav'><li>Next</li></ul><h1>A title</h1><p><a id='x' />{text}\n &amp; on</p>"
        "<img src='a'><pre>ls</pre><p>End.</p></body></html>"
    )


def test_pages_become_paragraphs():
    assert texts.html_to_text(page("Some\n  words")) == "A title\n\nSome words & on\n\nEnd."


def test_the_handbook_follows_its_links(tmp_path):
    folder = tmp_path / "usr/share/doc/debian-handbook/html/en-US"
    folder.mkdir(parents=True)
    (folder / "preface.html").write_text(page("First", "b.html"))
    (folder / "b.html").write_text(page("Second", "preface.html"))
    text = texts.BOOKS[NAME].read(tmp_path)
    assert text.index("First") < text.index("Second")
    assert text.count("First") == 1


def test_a_text_that_is_there_is_not_fetched_again(monkeypatch, capsys):
    path = texts.text_path(NAME)
    path.parent.mkdir()
    path.write_text("A book.\n")
    path.with_suffix(".sha256").write_text(sha256_of(path) + "\n")
    monkeypatch.setattr(texts, "_call", None)
    assert texts.fetch(NAME) == path
    assert texts.main(["list"]) == 0
    assert "CC-BY-SA-3.0" in capsys.readouterr().out
    path.write_text("Another book.\n")
    with pytest.raises(ConfigError, match="not as it was written"):
        texts.fetch(NAME)


def test_wrong_names_packages_and_machines_are_errors(tmp_path, monkeypatch, capsys):
    assert texts.main(["fetch", "no-book"]) == 1
    assert "expected one of debian-handbook" in capsys.readouterr().err
    other = tmp_path / "other.deb"
    other.write_bytes(b"other")
    with pytest.raises(ConfigError, match="another text than results are of"):
        texts.fetch(NAME, other)
    monkeypatch.setattr(texts.shutil, "which", lambda command: None)
    with pytest.raises(ConfigError, match="needs apt-get"):
        texts.fetch(NAME)
    assert not texts.text_path(NAME).exists()
