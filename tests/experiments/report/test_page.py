"""The report's HTML and Markdown, without a browser."""

import json
import re
import shutil
from html.parser import HTMLParser

import pandas as pd
import pytest
import yaml

from experiments.report.__main__ import main
from experiments.report.page import mark_code, write_html, write_markdown
from experiments.report.runs import read_results
from experiments.report.sections import Section, Table, Text


def write(outputs, out):
    status = main(["--outputs", str(outputs), "--out", str(out)])
    return status, (out / "report.html").read_text(), (out / "report.md").read_text()


@pytest.fixture(scope="module")
def report(outputs, tmp_path_factory):
    """Folder, HTML and Markdown of the report over the small outputs folder."""
    folder = tmp_path_factory.mktemp("report")
    status, page, text = write(outputs, folder)
    assert status == 0
    return folder, page, text


def test_the_report_has_every_part(outputs, report):
    folder, page, text = report
    for heading in (
        *("Overview", "needle on tiny", "coverage on tiny", "ttft on tiny"),
        *("attention on", "Ours and published", "What is missing"),
    ):
        assert f"<h2>{heading}" in page
        assert f"## {heading}" in text
    for heading in ("Pictures of the runs", "Environments", "Settings"):
        assert f"<h2>{heading}</h2>" in page
        assert heading not in text
    for run in read_results(outputs).runs:
        assert run.digest in page
    assert "method=flash" in page  # of a command under "What is missing"
    pictures = re.findall(r"\]\((.*?)\)", text)
    assert len(pictures) >= 7
    assert all((folder / name).stat().st_size > 1000 for name in pictures)


def test_the_page_needs_nothing_else(report):
    _, page, _ = report
    assert "<script" not in page
    assert not re.search(r"https?:", page)
    assert "default-src 'none'" in page
    assert len(page) < 4_000_000


def test_tags_are_balanced(report):
    _, page, _ = report
    open_tags: list[str] = []

    class Parser(HTMLParser):
        def handle_starttag(self, tag, attrs):
            if tag not in ("meta", "link", "img"):
                open_tags.append(tag)

        def handle_endtag(self, tag):
            assert open_tags.pop() == tag

    Parser().feed(page)
    assert open_tags == []


def test_an_empty_folder_says_what_to_run(tmp_path, capsys):
    (tmp_path / "outputs").mkdir()
    status, page, text = write(tmp_path / "outputs", tmp_path / "report")
    assert status == 0
    assert "No finished run" in capsys.readouterr().out
    for content in (page, text):
        assert "make demo" in content
        assert "bench needle" in content
        assert "Table 7" in content


def test_a_folder_that_is_not_there_is_an_error(tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["--outputs", str(tmp_path / "nothing")])
    assert stopped.value.code == 2
    assert "is no folder" in capsys.readouterr().err


def test_a_strangers_results_are_text_and_never_markup(own_outputs, tmp_path):
    """A label or a message with markup in it is shown as it is."""
    folder = next((own_outputs / "needle" / "tiny" / "meanpool").iterdir())
    metrics = json.loads((folder / "metrics.json").read_text())
    metrics["label"] = "<script>alert(1)</script>"
    (folder / "metrics.json").write_text(json.dumps(metrics))
    failed = next((own_outputs / "ttft" / "tiny" / "pbs").iterdir()) / "metrics.json"
    failed.write_text(
        json.dumps({"status": "failed", "error": {"type": "E", "message": "<img src=x> | `a`"}})
    )
    _, page, _ = write(own_outputs, tmp_path)
    assert "<script" not in page
    assert "&lt;script&gt;alert(1)" in page
    assert "<img src=x>" not in page


def test_runs_that_cannot_be_read_are_named_and_the_rest_stands(own_outputs, tmp_path, capsys):
    needle = own_outputs / "needle" / "tiny"
    meanpool = next((needle / "meanpool").iterdir())
    config = yaml.safe_load((meanpool / "config.yaml").read_text())
    (meanpool / "config.yaml").write_text(yaml.safe_dump({**config, "bench": {"name": "riddles"}}))
    flash = next(path for path in (needle / "flash").iterdir() if (path / "metrics.json").exists())
    shutil.copytree(flash, needle / "flash" / "broken")
    (needle / "flash" / "broken" / "samples.jsonl").write_text("{\n{\n")
    metrics = json.loads((flash / "metrics.json").read_text())
    del metrics["samples_digest"]  # as of an older run, whose samples nothing vouches for
    (needle / "flash" / "broken" / "metrics.json").write_text(json.dumps(metrics))
    pbs = sorted((needle / "pbs").iterdir())
    shutil.copytree(pbs[0], needle / "pbs" / "edited")
    with (needle / "pbs" / "edited" / "samples.jsonl").open("a") as file:
        file.write('{"sample_id": "one more", "correct": true}\n')
    _, page, _ = write(own_outputs, tmp_path)
    assert "interrupted: " in capsys.readouterr().out
    assert "unknown bench &#39;riddles&#39;" in page
    assert "line 1 is broken" in page
    assert "was written for other samples than those in samples.jsonl" in page
    results = read_results(own_outputs)
    assert sorted(problem.status for problem in results.problems) == [
        *("broken", "broken", "broken", "interrupted"),
    ]
    assert [run.method for run in results.of("needle")[0].runs] == ["flash", "pbs", "pbs"]


def test_words_between_backticks_are_code_and_the_rest_is_escaped():
    assert mark_code("use `a <b>` & go") == "use <code>a &lt;b&gt;</code> &amp; go"


def test_tables_become_html_and_markdown_alike(tmp_path):
    frame = pd.DataFrame({"method": ["pbs", None], "x": [0.5, float("nan")]})
    frame.index.name = "#"
    section = Section("One", (Table(frame, caption="Some `code`."), Text("Words.")))
    results = read_results(tmp_path)
    page = write_html(results, [section], tmp_path / "a.html").read_text()
    text = write_markdown([section], tmp_path / "a.md").read_text()
    assert '<i class="mark" style="background:#D55E00"></i>pbs</span></td><td>0.5</td>' in page
    assert "Some `code`.\n\n| # | method | x |\n| --- | --- | --- |\n| 0 | pbs | 0.5 |" in text
    assert text.endswith("| 1 |  |  |\n\nWords.\n")
