"""The documentation builds without a network, and its links lead somewhere."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted(
    [
        *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")),
        ROOT / "notebooks" / "README.md",
        *(ROOT / "docs").rglob("*.md"),
    ]
)
LOADED = re.compile(r'<(?:script|link)[^>]*(?:src|href)="(https?://[^"]+)"')
LINK = re.compile(r"\]\(([^)#\s]+)[^)]*\)")
MOST_WORDS = 900


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_to_files_lead_somewhere(page):
    links = [link for link in LINK.findall(page.read_text()) if "://" not in link]
    assert [link for link in links if not (page.parent / link).exists()] == []


def test_the_readme_fits_a_screen():
    assert len((ROOT / "README.md").read_text().split()) <= MOST_WORDS


def test_the_site_builds_and_loads_nothing_from_the_network(tmp_path):
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet"]
    done = subprocess.run(
        [*command, "--site-dir", str(tmp_path)], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    page = (tmp_path / "methods" / "pbs" / "index.html").read_text()
    assert "segment_size" in page  # settings, from the docstring
    for file in tmp_path.rglob("*.html"):
        loaded = re.findall(
            r'<(?:script|link)[^>]*(?:src|href)="(https?://[^"]+)"', file.read_text()
        )
        assert [url for url in loaded if "stylesheet" in url or url.endswith(".js")] == []
