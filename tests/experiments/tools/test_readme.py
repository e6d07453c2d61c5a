import json

import pytest

from experiments.report.likelihoods import newest_likelihood
from experiments.timing.result_folders import newest_folders, read_folder
from experiments.tools import readme
from experiments.tools.readme import (
    PAGE,
    RESULTS,
    gpu_section,
    main,
    replace_section,
    table7,
    ttft,
)


def test_sections_are_replaced_between_their_marks():
    text = "a\n<!-- begin x -->\nold\n<!-- end x -->\nb\n"
    assert replace_section(text, "x", "new\n") == text.replace("old", "new")
    with pytest.raises(ValueError, match="no section 'y'"):
        replace_section(text, "y", "")


def test_the_gpu_tables_are_what_the_results_say():
    for part, make in (("table7", table7), ("ttft", ttft)):
        assert gpu_section(newest_folders(RESULTS, part=part), make) in PAGE.read_text()


def test_the_tables_of_the_real_model_are_what_its_results_say(monkeypatch):
    monkeypatch.setattr(readme, "draw_likelihood", lambda *_: [])
    text = readme.real_tables(newest_likelihood(RESULTS))
    assert text in PAGE.read_text()
    assert "| 8192 | PBS | 19.4 |" in text
    assert text.count("| dense (flash) |") == 2


def test_without_likelihood_runs_the_command_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="experiment=real_curves"):
        newest_likelihood(tmp_path)


def entry(milliseconds, *, waits=None, count=5):
    timing = {"median_ms": milliseconds, "samples_ms": [milliseconds] * count, "dropped_ms": []}
    ends = {"p20_ms": milliseconds, "p80_ms": 1.1 * milliseconds, "num_samples": count}
    return {**timing, **ends, "wall_ms": waits, "density": 0.2, "dense_reason": ""}


def cell(length, *, shape=True, count=5, waits=None):
    heads = {"q_heads": 32, "kv_heads": 8, "head_dim": 128} if shape else {}
    return {
        "length": length,
        **heads,
        "target_density": 0.219,
        "dense": {"flash": entry(8.0, waits=waits and 8.0, count=count)},
        "methods": {name: entry(2.0, waits=waits, count=count) for name in ("pbs", "pbs shared")},
    }


def folder(path, device, **parts):
    path.mkdir()
    packages = {"torch": "3.0", "triton": "4.0"}
    environment = {"device": device, "time": "2027", "commit": "abc", "packages": packages}
    text = json.dumps({"environment": environment, "parts": parts})
    (path / "results.json").write_text(text)
    return path


def test_a_gpu_table_says_counts_waits_and_what_the_paper_does_not_state(tmp_path):
    cells = [cell(131072, waits=4.0), cell(524288, count=1)]
    found = read_folder(
        folder(tmp_path / "new", "B200", table7=cells, ttft=[cell(8192, shape=False)])
    )
    text = table7(found)
    assert "| 131072 | 0.219 | 5 | 10.0 | 8.00 (8.00) | 2.00 (4.00) | 2.00 (4.00) |" in text
    assert "| 4.00x (2.00x) |" in text
    assert "| 524288 | 0.219* | 1 (few) | unknown | 8.00 | 2.00 | 2.00 | 4.00x |" in text
    assert "* The paper states no density here" in text
    assert "in brackets what a caller waits" in text
    assert text.rstrip().endswith("samples in [%s](%s)." % (2 * (found.path,)))
    assert "B200" in text
    assert "Times end when the first token is read." in ttft(found)


def test_folders_may_be_stated(tmp_path, monkeypatch):
    page = tmp_path / "results.md"
    page.write_text("<!-- begin table7 -->\nold\n<!-- end table7 -->\n")
    monkeypatch.setattr(readme, "PAGE", page)
    paths = [folder(tmp_path / name, name, table7=[cell(8192)]) for name in ("B200", "A100")]
    assert main(["--sections", "table7", "--results", *map(str, paths)]) == 0
    text = page.read_text()
    assert text.index("B200, torch") < text.index("A100, torch")
    with pytest.raises(SystemExit):
        main(["--sections", "table8"])


def test_the_newest_results_of_each_device_are_shown_whatever_their_folder_is_called(
    tmp_path, monkeypatch
):
    page = tmp_path / "results.md"
    page.write_text("<!-- begin table7 -->\nold\n<!-- end table7 -->\n")
    monkeypatch.setattr(readme, "PAGE", page)
    results = tmp_path / "results"
    results.mkdir()
    monkeypatch.setattr(readme, "RESULTS", results)
    folder(results / "b200_first_light", "B200", table7=[cell(8192)])
    assert main(["--sections", "table7"]) == 0
    assert "B200, torch 3.0" in page.read_text()
