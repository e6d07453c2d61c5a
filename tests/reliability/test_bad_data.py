"""Broken files: MInference's head patterns, LongBench, LongBench v2 and RULER."""

import copy
import json
import random
import zipfile

import pytest
import torch

from baselines.minference_config import PATTERNS, load_head_settings
from experiments.benches.opencompass.files import read_rows
from experiments.benches.opencompass.longbench import TASKS
from experiments.benches.opencompass.rows import CLASSIFICATION, COLUMNS, columns_of
from experiments.settings.config import ROOT
from pbs.methods import build_method
from tests.reliability.messages import check_error, check_message, check_raised

LONGBENCH = ROOT / "tests" / "data" / "longbench" / "data"
LONGBENCH_V2 = ROOT / "tests" / "data" / "longbench_v2" / "data.json"
# Values that stand where another is expected.
ANYTHING = (
    None,
    True,
    3,
    -1,
    1.5,
    10**30,
    "",
    " \n",
    "x",
    [],
    [None],
    [[]],
    {},
    {"a": 1},
    "\ud800",
)
NUM_PATTERN_FILES = 400
NUM_ROW_FILES = 400


def tried(name, outcomes, *, least):
    print(f"{name} tried: {sum(outcomes.values())}, {outcomes}")
    assert sum(outcomes.values()) >= least
    assert min(outcomes.values()) > 0, outcomes


def damage(text, rng):
    """Text as it comes from a broken disk, another encoding or another program."""
    content = text.encode()
    cut = rng.randrange(len(content))
    return rng.choice(
        (
            content[:cut],
            content[:cut] + b"\xff" + content[cut:],
            content[:cut] + b"\x00" + content[cut:],
            content[:cut] + content[cut + 7 :],
            text.encode("utf-16"),
            (text + "\u00e9").encode("latin-1", "replace"),
            b"",
            b"null",
            b"[" * 100000,
            b"<html>not found</html>",
            b"version https://git-lfs.github.com/spec/v1\n",
            content + b"\n{}",
            content.replace(b'"', b"'"),
            content.replace(b":", b": NaN,", 1),
        )
    )


def patterns(rng):
    """A file of head patterns as it should be."""
    return [
        {
            str(head): [rng.choice(PATTERNS), rng.randrange(1, 50), rng.randrange(1, 50), 0.5]
            for head in range(4)
        }
        for _ in range(2)
    ]


def mutate(tree, rng):
    """One entry somewhere in the tree taken away, doubled, renamed or replaced."""
    tree = copy.deepcopy(tree)
    node, path = tree, []
    for _ in range(rng.randrange(1, 4)):
        keys = list(node) if isinstance(node, dict) else list(range(len(node)))
        if not keys:
            break
        key = rng.choice(keys)
        path.append((node, key))
        if not isinstance(node[key], dict | list):
            break
        node = node[key]
    parent, key = path[-1]
    action = rng.choice(("replace", "replace", "remove", "rename", "double"))
    if action == "remove":
        del parent[key]
    elif action == "rename" and isinstance(parent, dict):
        parent[rng.choice(("00", "x", "-1", "1.0", "²", "٣", "99", "a/b"))] = parent.pop(key)
    elif action == "double" and isinstance(parent, list):
        parent.append(parent[key])
    else:
        parent[key] = rng.choice(ANYTHING)
    return tree


def test_head_patterns_are_refused_or_mean_what_the_file_says(tmp_path):
    rng, outcomes = random.Random(0), {"refused": 0, "accepted": 0}
    file = tmp_path / "patterns.json"
    q, k = torch.randn(1, 4, 130, 16), torch.randn(1, 2, 130, 16)
    for _ in range(NUM_PATTERN_FILES):
        whole = patterns(rng)
        text = json.dumps(mutate(whole, rng))
        file.write_bytes(damage(text, rng) if rng.random() < 0.4 else text.encode())
        try:
            layers = load_head_settings(str(file))
        except ValueError as error:
            outcomes["refused"] += 1
            check_raised(error, str(file))
            continue
        outcomes["accepted"] += 1
        stored = json.loads(file.read_bytes())
        assert [[[head.pattern, *head.sizes] for head in layer] for layer in layers] == [
            [layer[str(head)][:3] for head in range(len(layer))] for layer in stored
        ]
        method = build_method("minference", preset="official", config_path=str(file), last_q=16)
        try:
            density = method.plan(q, k, layer_idx=0).density()
        except ValueError as error:  # of a number of heads or layers that is not the model's
            check_raised(error, str(file))
        else:
            assert bool(((density > 0) & (density <= 1)).all())
    tried("head patterns", outcomes, least=NUM_PATTERN_FILES)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[{"0": ["stream_llm", 1, 1, 0], "0": ["stream_llm", 9, 9, 0]}]', "key '0' twice"),
        ('[{"00": ["stream_llm", 1, 1, 0]}]', "expected head indices as keys"),
        ('[{"0": ["a_shape", 1, 1, 0]}]', "unknown pattern 'a_shape'"),
        ('[{"0": ["stream_llm", 1, 0, 0]}]', "a local window of at least 1"),
        ('[{"0": ["stream_llm", -1, 5, 0]}]', "two integers of at least 0"),
        ("{}", "expected a list with one object per layer"),
    ],
)
def test_head_patterns_are_explained(tmp_path, text, message):
    (tmp_path / "patterns.json").write_text(text)
    with pytest.raises(ValueError, match=message) as caught:
        load_head_settings(str(tmp_path / "patterns.json"))
    check_raised(caught.value, "patterns.json")


def holds(row, task):
    """Whether a row can be asked and scored, said again without the code under test."""

    def is_text(value):
        return isinstance(value, str) and "\ud800" not in value

    def are_texts(value):
        return isinstance(value, list) and value != [] and all(is_text(entry) for entry in value)

    if not isinstance(row, dict) or not {"input", "context", "answers"} <= set(row):
        return False
    is_asked = is_text(row["input"]) and is_text(row["context"]) and row["context"].strip()
    has_classes = task not in CLASSIFICATION or are_texts(row.get("all_classes"))
    return bool(is_asked) and are_texts(row["answers"]) and has_classes


def test_longbench_files_are_refused_or_read_whole(tmp_path):
    rng, outcomes = random.Random(1), {"refused": 0, "accepted": 0}
    originals = {task: (LONGBENCH / f"{task}.jsonl").read_text("utf-8") for task in TASKS}
    for number in range(NUM_ROW_FILES):
        task = rng.choice(TASKS)
        lines = originals[task].strip().split("\n")
        place = rng.randrange(len(lines))
        lines[place] = json.dumps(mutate([json.loads(lines[place])], rng)[:1] or None)[1:-1]
        text = "\n".join(lines)
        file = tmp_path / f"{number}.jsonl"
        file.write_bytes(damage(text, rng) if rng.random() < 0.3 else text.encode())
        try:
            rows = read_rows(file, columns_of(task))
        except ValueError as error:
            outcomes["refused"] += 1
            check_raised(error, str(file))
            continue
        outcomes["accepted"] += 1
        stored = [json.loads(line) for line in file.read_text("utf-8").split("\n") if line.strip()]
        assert len(rows) == len(stored)
        assert all(holds(row, task) for row in stored), (task, file)
    tried("LongBench files", outcomes, least=NUM_ROW_FILES)


def test_longbench_v2_files_are_refused_or_read_whole(tmp_path):
    rng, outcomes = random.Random(2), {"refused": 0, "accepted": 0}
    original = json.loads(LONGBENCH_V2.read_text("utf-8"))
    for number in range(150):
        text = json.dumps(mutate(original, rng))
        file = tmp_path / f"{number}.json"
        file.write_bytes(damage(text, rng) if rng.random() < 0.3 else text.encode())
        try:
            rows = read_rows(file, COLUMNS)
        except ValueError as error:
            outcomes["refused"] += 1
            check_raised(error, str(file))
            continue
        outcomes["accepted"] += 1
        for row in rows:
            assert row["answer"] in "ABCD"
            assert row["difficulty"] in ("easy", "hard")
            assert row["length"] in ("short", "medium", "long")
            assert row["question"].strip()
            assert row["context"].strip()
    tried("LongBench v2 files", outcomes, least=150)


def test_files_of_other_systems_are_read(tmp_path):
    rows = [{"input": "", "context": "c\u2028d", "answers": ["é"]}] * 2
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    for name, content in {
        "mark": "\n".join(lines).encode("utf-8-sig"),
        "crlf": "\r\n".join(lines).encode(),
        "blank": "\n\n".join(lines).encode() + b"\n\n",
    }.items():
        (tmp_path / name).write_bytes(content)
        assert read_rows(tmp_path / name, columns_of("qasper")) == rows


def test_archives_that_cannot_be_read_are_explained(tmp_path):
    archive = tmp_path / "data.zip"
    archive.write_bytes(b"PK nothing")
    with pytest.raises(ValueError, match="is no zip archive") as caught:
        read_rows(archive, columns_of("qasper"), "data/qasper.jsonl")
    check_raised(caught.value)
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("../../qasper.jsonl", "{}")
    with pytest.raises(ValueError, match=r"has no data/qasper\.jsonl inside"):
        read_rows(archive, columns_of("qasper"), "data/qasper.jsonl")


@pytest.fixture
def run_longbench(compose_bench_cell, tmp_path):
    """Run two LongBench tasks of a sample each; the first task's line goes through ``edit``."""
    from experiments.run.runner import run_cell
    from experiments.store import RunStore

    def run_longbench(edit, *words):
        folder = tmp_path / "longbench"
        (folder / "data").mkdir(parents=True, exist_ok=True)
        for task in ("hotpotqa", "qasper"):
            line = (LONGBENCH / f"{task}.jsonl").read_text("utf-8").split("\n")[0]
            line = edit(line) if task == "hotpotqa" else line
            (folder / "data" / f"{task}.jsonl").write_text(line, "utf-8")
        words = [f"bench.data_dir={folder}", "bench.tasks=[hotpotqa,qasper]", *words]
        return RunStore(run_cell(compose_bench_cell("bench=longbench", *words)))

    return run_longbench


@pytest.fixture
def compose_bench_cell(compose_cell):
    """Compose a cell of OpenCompass on the embedded model, two tokens an answer."""

    def compose_bench_cell(*words):
        quiet = ("check=false", "logger.mode=disabled", "bench.max_out_len=2", "method=pbs")
        return compose_cell(*quiet, *words, fast=False)

    return compose_bench_cell


def test_a_document_of_10_megabytes_loses_its_middle_and_nothing_else(run_longbench):
    # Long words, so that the embedded model's tokenizer takes seconds for them.
    text = "START " + f"{'w' * 499} " * 20_000 + "END"

    def edit(line):
        return json.dumps({**json.loads(line), "context": text})

    store = run_longbench(edit, "bench.max_seq_len=2048")
    assert store.metrics()["status"] == "finished"
    first, second = store.samples()
    assert len(text) > 10_000_000
    assert first["num_prompt_tokens"] > first["num_input_tokens"] == 2048 - 2
    assert first["is_truncated"]
    assert not second["is_truncated"]
    assert 0 < first["density"] <= 1


def test_one_broken_file_fails_its_task_and_no_other(run_longbench):
    store = run_longbench(lambda line: line[:-50])
    metrics = store.metrics()
    assert metrics["status"] == "failed"
    check_message(metrics["error"]["message"], "1 parts failed", "hotpotqa.jsonl, line 1: no JSON")
    check_error(metrics["failures"]["hotpotqa"], "line 1: no JSON")
    assert [record["task"] for record in store.samples()] == ["qasper"]
    cells = {cell["task"]: cell["score"] for cell in metrics["results"]["cells"]}
    assert cells["hotpotqa"] is None
    assert cells["qasper"] is not None


SQUAD = {
    "data": [
        {
            "paragraphs": [
                {
                    "context": f"The otter of house {index} is {index} years old. " * 9,
                    "qas": [
                        {
                            "question": f"How old is the otter of house {index}?",
                            "is_impossible": False,
                            "answers": [{"text": str(index)}],
                        }
                    ],
                }
            ]
        }
        for index in range(20)
    ]
}
# Task, length, samples, file and its content, and what the error says. OpenCompass would wait for
# ever for most of these.
RULER = (
    ("vt", 1, 1, None, None, "bench.lengths has 1, but"),
    ("vt", 200, 1, None, None, "the shortest prompt of this task takes 373 tokens"),
    ("fwe", 16, 1, None, None, "choose a longer length"),
    ("cwe", 130, 1, None, None, "choose a longer length"),
    ("cwe", 512, 1, None, None, "choose a longer length"),
    ("qa_squad", 64, 1, "dev-v2.0.json", SQUAD, "choose a longer length"),
    ("qa_squad", 2048, 21, "dev-v2.0.json", SQUAD, "has 20 questions, bench.num_samples asks"),
    ("qa_squad", 2048, 1, "dev-v2.0.json", {}, "is not squad's development set"),
    ("qa_squad", 2048, 1, "dev-v2.0.json", [], "is not squad's development set"),
    ("qa_squad", 8192, 1, "dev-v2.0.json", {"data": SQUAD["data"][:1]}, "are too small"),
    ("qa_hotpotqa", 2048, 1, "hotpotqa.json", [], "has 0 questions"),
    ("qa_hotpotqa", 2048, 1, "hotpotqa.json", {"a": 1}, "is not hotpotqa's development set"),
    ("niah_single_2", 2048, 1, "PaulGrahamEssays.jsonl", ["text"], "expected a JSON object"),
    ("niah_single_2", 2048, 1, "PaulGrahamEssays.jsonl", {"txt": "a"}, "missing text"),
)


def test_ruler_never_waits_for_a_prompt_that_cannot_be_made(compose_bench_cell, tmp_path):
    from experiments.run.runner import run_cell
    from experiments.store import RunStore

    for task, length, num_samples, file, content, message in RULER:
        words = [f"bench.tasks=[{task}]", f"bench.lengths=[{length}]"]
        if file is not None:
            (tmp_path / file).write_text(json.dumps(content))
            words.append(f"bench.data_dir={tmp_path}")
        words.append(f"bench.num_samples={num_samples}")
        cfg = compose_bench_cell("bench=ruler", *words, "resume=false")
        metrics = RunStore(run_cell(cfg)).metrics()
        assert metrics["status"] == "failed", (task, length)
        check_error(metrics["failures"][f"{task}-{length}"], message)
    print(f"RULER data tried: {len(RULER)}")
    assert len(RULER) >= 14
