"""Scores: gold answers get 100, sample scores average to OpenCompass's, averages by hand."""

import math

import pytest
from opencompass.models.base import BaseModel

from experiments.benches.opencompass.harness import EvaluatedTask, overall, quiet
from experiments.benches.opencompass.longbench import CATEGORIES, TASKS, LongBench
from experiments.benches.opencompass.longbench_v2 import LongBenchV2
from experiments.benches.opencompass.ruler import Ruler
from experiments.settings.config import RunConfig
from tests.experiments.benches.opencompass.conftest import LONGBENCH, LONGBENCH_V2


class ScriptedModel(BaseModel):
    """Says what it is told to, in order."""

    def __init__(self, answers):
        super().__init__(path="")
        self.answers = iter(answers)

    def generate(self, inputs, max_out_len, **_):
        return [next(self.answers) for _ in inputs]


def as_text(gold):
    if isinstance(gold, dict):  # a class among all classes
        return gold["answers"][0]
    return gold if isinstance(gold, str) else gold[0]


def prepare(bench, cfg):
    bench.prepare(cfg)
    return bench


def evaluate(bench, cfg, part, folder, answer):
    """OpenCompass's score of the answers, and that of the single samples."""
    with quiet(folder / "log"):
        task = bench.make_task(part, cfg, folder)
        scorer = task.scorer()
        answers = [answer(scorer, index) for index in range(len(scorer))]
        task.infer(ScriptedModel(answers))
        assert task.predictions() == answers
        scores = [scorer.score(index, text) for index, text in enumerate(answers)]
        return overall(task.evaluate()), scores


@pytest.fixture
def longbench_cfg(compose_bench):
    return RunConfig.from_hydra(compose_bench("bench=longbench", f"bench.data_dir={LONGBENCH}"))


@pytest.mark.parametrize("task", TASKS)
def test_gold_answers_score_100(task, longbench_cfg, tmp_path):
    bench = prepare(LongBench(data_dir=str(LONGBENCH), tasks=[task]), longbench_cfg)
    (part,) = bench.parts()
    total, scores = evaluate(
        bench, longbench_cfg, part, tmp_path, lambda scorer, index: as_text(scorer.gold(index))
    )
    assert math.isclose(total, 100, abs_tol=0.01)  # rouge stops at 99.9999995
    assert len(scores) == 3


@pytest.mark.parametrize("task", ["hotpotqa", "trec", "gov_report", "lcc", "dureader"])
def test_sample_scores_average_to_opencompass_score(task, longbench_cfg, tmp_path):
    bench = prepare(LongBench(data_dir=str(LONGBENCH), tasks=[task]), longbench_cfg)
    (part,) = bench.parts()
    words = [lambda gold: gold, lambda gold: f"{gold} and other words", lambda _: "no"]
    total, scores = evaluate(
        bench,
        longbench_cfg,
        part,
        tmp_path,
        lambda scorer, index: words[index](as_text(scorer.gold(index))),
    )
    assert math.isclose(total, sum(scores) / 3)
    assert scores[0] > scores[2]


def test_gold_answers_of_longbench_v2(compose_bench, tmp_path):
    words = ("bench=longbench_v2", f"bench.data_dir={LONGBENCH_V2}")
    cfg = RunConfig.from_hydra(compose_bench(*words))
    bench = prepare(LongBenchV2(data_dir=str(LONGBENCH_V2)), cfg)
    (part,) = bench.parts()
    total, scores = evaluate(
        bench,
        cfg,
        part,
        tmp_path,
        lambda scorer, index: f"The correct answer is ({scorer.gold(index)})",
    )
    assert (total, scores) == (100, [100] * 6)


def test_gold_answers_of_ruler(compose_bench, tmp_path):
    cfg = RunConfig.from_hydra(compose_bench("bench=ruler"))
    bench = prepare(Ruler(tasks=["vt", "fwe", "cwe"], lengths=[4096], num_samples=2), cfg)
    for part in bench.parts():
        total, scores = evaluate(
            bench,
            cfg,
            part,
            tmp_path / part.key,
            lambda scorer, index: " ".join(scorer.gold(index)),
        )
        assert (total, scores) == (100, [100] * 2)


def test_the_answer_length_is_the_stock_one_unless_told_otherwise(longbench_cfg):
    for settings, expected in (({}, 512), ({"max_out_len": 7}, 7)):
        bench = LongBench(data_dir=str(LONGBENCH), tasks=["gov_report"], **settings)
        dataset = prepare(bench, longbench_cfg).limited_dataset(bench.parts()[0], longbench_cfg)
        assert dataset["infer_cfg"]["inferencer"]["max_out_len"] == expected


def record_of(task, index, score, **changes):
    return {
        "sample_id": f"{task}/{index}",
        "task": task,
        "score": score,
        "prefill_seconds": 1.0,
        "density": 0.5,
        "num_input_tokens": 9,
        "num_output_tokens": 1,
        "is_truncated": False,
        "num_sparse_layers": 2,
        "sparse_calls": 2,
        "dense_calls": {},
    } | changes


RECORDS = [
    record_of("hotpotqa", 0, 10.0),
    record_of("hotpotqa", 1, 30.0),
    record_of("musique", 0, 40.0),
    record_of("lcc", 0, 90.0, is_truncated=True),
]


def test_averages_by_hand():
    bench = LongBench(tasks=["hotpotqa", "musique", "lcc"])
    results = bench.summarise(RECORDS)
    total = results["total"]
    assert total["by_category"]["multi-document QA"] == {
        "score": 30,
        "tasks": ["hotpotqa", "musique"],
        "is_complete": False,
    }
    assert total["score"] == (30 + 90) / 2
    assert math.isclose(total["task_average"], (20 + 40 + 90) / 3)
    assert (total["num_samples"], total["num_truncated"]) == (4, 1)
    assert [cell["score"] for cell in results["cells"]] == [20, 40, 90]
    assert bench.summarise(RECORDS[::-1])["total"] == total


def test_a_failed_task_is_a_hole_and_not_a_zero():
    bench = LongBench(tasks=["hotpotqa", "musique", "lcc"])
    bench.failures["hotpotqa"] = {"type": "OSError"}
    results = bench.summarise(RECORDS)
    assert results["cells"][0] == {
        "task": "hotpotqa",
        "category": "multi-document QA",
        "num_samples": 0,
        "score": None,
    }
    assert results["total"]["score"] == (40 + 90) / 2
    assert results["total"]["num_samples"] == 2


def test_paired_scores_average_to_the_overall_score():
    bench = LongBench(tasks=["hotpotqa", "musique", "lcc"])
    better = [{**record, "score": record["score"] + 6} for record in RECORDS]
    ours, dense, weights = bench.paired_scores(better, RECORDS)
    overall = bench.summarise(RECORDS)["total"]["score"] / 100
    assert math.isclose(sum(weights.values()), 1)
    assert math.isclose(sum(weights[name] * dense[name] for name in dense), overall)
    assert math.isclose(sum(weights[name] * (ours[name] - dense[name]) for name in dense), 0.06)
    ours, dense, weights = bench.paired_scores(better[1:], RECORDS[:3])
    assert set(ours) == set(dense) == set(weights) == {"hotpotqa/1", "musique/0"}
    assert math.isclose(sum(weights[name] * dense[name] for name in dense), 0.35)


@pytest.mark.parametrize("tasks", [TASKS, ["trec"], ["trec", "lcc", "passage_count"]])
def test_weights_add_up_to_one(tasks):
    bench = LongBench(tasks=list(tasks))
    cells = [part.labels for part in bench.parts()]
    assert math.isclose(sum(bench.weight(cell, cells) for cell in cells), 1)


def test_every_task_has_a_category():
    assert sum(len(tasks) for tasks in CATEGORIES.values()) == len(TASKS)


@pytest.mark.parametrize(
    ("bench", "is_partial"),
    [
        (LongBench(), False),
        (LongBench(limit=5), True),
        (LongBench(fraction=0.5), True),
        (LongBench(fraction=1.0), False),
        (LongBench(tasks=["trec"]), True),
        (LongBenchV2(), False),
        (Ruler(), False),
        (Ruler(num_samples=10), True),
        (Ruler(lengths=[4096]), True),
    ],
    ids=str,
)
def test_what_leaves_something_out_is_partial(bench, is_partial):
    assert bench.is_partial is is_partial


@pytest.mark.parametrize(
    ("make", "settings", "message"),
    [
        (LongBench, {"tasks": ["hotpotaq"]}, "Did you mean 'hotpotqa'"),
        (LongBench, {"tasks": []}, "at least one"),
        (LongBench, {"fraction": 0.0}, "fraction"),
        (LongBench, {"max_seq_len": 0}, "max_seq_len"),
        (Ruler, {"lengths": [4096, 4096]}, "each once"),
        (Ruler, {"num_samples": 0}, "num_samples"),
        (Ruler, {"max_out_len": None}, "max_out_len needs a number"),
        (LongBenchV2, {"max_out_len": None}, "max_out_len needs a number"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_wrong_settings_are_explained(make, settings, message):
    with pytest.raises(ValueError, match=message):
        make(**settings)


def test_fraction_and_limit_take_the_first_samples(longbench_cfg):
    for settings, expected in (({"fraction": 0.5}, 2), ({"limit": 1}, 1), ({}, 3)):
        bench = prepare(LongBench(data_dir=str(LONGBENCH), **settings), longbench_cfg)
        assert {bench.num_used(part) for part in bench.parts()} == {expected}


def test_a_task_without_a_known_metric_is_refused():
    with pytest.raises(ValueError, match="expected one of score, accuracy"):
        overall({"bleu": 3.0})


def test_evaluated_task_names_the_run(longbench_cfg, tmp_path):
    bench = prepare(LongBench(data_dir=str(LONGBENCH), tasks=["trec"]), longbench_cfg)
    task = bench.make_task(bench.parts()[0], longbench_cfg, tmp_path)
    assert isinstance(task, EvaluatedTask)
    assert longbench_cfg.hash in task._path("predictions").parts[-2]
