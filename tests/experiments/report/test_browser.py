"""The report in a real browser: it renders, complains about nothing and loads nothing."""

import re

import numpy as np
import pytest
from PIL import Image

from experiments.report.__main__ import main

pytestmark = pytest.mark.browser


def test_the_page_renders_without_errors_and_without_a_network(outputs, tmp_path, browse):
    assert main(["--outputs", str(outputs), "--out", str(tmp_path / "report")]) == 0
    page = browse(tmp_path / "report" / "report.html")
    assert page.console == []
    for heading in ("Overview", "needle on tiny", "ttft on tiny", "What is missing"):
        assert f"<h2>{heading}</h2>" in page.dom
    assert page.dom.count("<table>") >= 8
    assert page.dom.count("<img") >= 8
    # Every link and every source is inside the page.
    targets = re.findall(r'(?:src|href)="([^"]{0,40})', page.dom)
    assert targets
    assert all(target.startswith(("data:", "#")) for target in targets)
    with Image.open(page.screenshot) as image:
        pixels = np.asarray(image.convert("L"))
    # Text and pictures down to the end of the first screen, not a blank or broken page.
    rows = (pixels < 128).any(axis=1)
    assert rows[:800].mean() > 0.2
    assert rows[800:].mean() > 0.2


def test_the_browser_would_have_told(tmp_path, browse):
    """The check above sees what it looks for: a blocked picture and a script that fails."""
    policy = "default-src 'none'; img-src data:; script-src 'unsafe-inline'"
    page = tmp_path / "bad.html"
    page.write_text(
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<img src="https://example.org/a.png"><script>undefined_name()</script>'
    )
    console = "\n".join(browse(page).console)
    assert "example.org" in console
    assert "undefined_name" in console
