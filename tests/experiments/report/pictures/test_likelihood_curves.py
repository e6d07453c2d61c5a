"""The picture of KL against density and time, on committed runs."""

from PIL import Image

from experiments.report.likelihood_table import difference
from experiments.report.pictures.likelihood_curves import draw_likelihood, likelihood_frame
from experiments.tools.readme import RESULTS, newest_likelihood


def runs(model):
    return sorted(
        path.parent for path in newest_likelihood(RESULTS).glob(f"{model}/*/*/metrics.json")
    )


def test_every_run_has_a_row_for_each_band():
    frame = likelihood_frame(runs("smollm2"))
    assert set(frame["band"]) == {"all", "1 of 4", "2 of 4", "3 of 4", "4 of 4"}
    assert {"flash", "pbs", "random_blocks", "xattention"} <= set(frame["method"])
    assert (frame.loc[frame["method"] == "flash", "kl"] < 1e-5).all()


def test_a_picture_a_length_and_none_of_dense_runs_alone(tmp_path):
    (path,) = draw_likelihood(runs("smollm2"), tmp_path)
    assert path.name == "kl_8192.png"
    assert path.with_suffix(".pdf").is_file()
    assert min(Image.open(path).size) > 600
    dense = [folder for folder in runs("smollm2") if folder.parent.name == "flash"]
    assert draw_likelihood(dense, tmp_path / "none") == []


def test_differences_are_of_the_windows_that_both_have():
    ours = [{"sample_id": name, "kl": kl} for name, kl in (("a", 0.1), ("b", 0.2), ("c", 9.0))]
    theirs = [{"sample_id": name, "kl": kl} for name, kl in (("a", 0.3), ("b", 0.4))]
    assert difference(theirs, ours) == "+0.2000 [+0.2000, +0.2000]"
    assert difference(theirs[:1], ours) == ""
