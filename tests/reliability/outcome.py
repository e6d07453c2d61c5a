"""What a command left in its outputs, less what the clock decides, and whether it is whole."""

import fcntl
import json
import re
from pathlib import Path

import yaml
from PIL import Image

from experiments.run.runner import build_bench
from experiments.settings.config import RunConfig
from experiments.store import RunStore

# Keys of times, of what is computed from them, of the machine's state, and of what was typed.
MEASURED = re.compile(
    r"seconds|_ms$|prefill_p\d|speed_up|tflops|share|fastest|break_even|overhead|peak|total_bytes"
    r"|overrides|samples_digest|num_dropped|is_warm|load"
)


def timeless(value):
    """The same without everything that the clock decides."""
    if isinstance(value, dict):
        return {key: timeless(v) for key, v in value.items() if not MEASURED.search(key)}
    return [timeless(entry) for entry in value] if isinstance(value, list) else value


def cells(folder):
    """The run folders of a command's outputs, by bench, model, method and hash."""
    found = sorted(Path(folder, "outputs").glob("*/*/*/*/config.yaml"))
    return {"/".join(path.parts[-5:-1]): path.parent for path in found}


def outcome(folder):
    """Records, metrics and files of every cell."""
    return {name: _cell(path) for name, path in cells(folder).items()}


def check_whole(folder):
    """Every sample is there once and no half line, metrics follow from the samples, no lock."""
    for path in cells(folder).values():
        store = RunStore(path)
        lines = store.samples_path.read_bytes().split(b"\n")
        assert lines.pop() == b"", "the last line has no end"
        records = [json.loads(line) for line in lines]
        assert len({record["sample_id"] for record in records}) == len(records)
        metrics = store.metrics()
        assert metrics["status"] == "finished"
        assert metrics["results"] == _recomputed(path, records)
        for picture in path.glob("*.png"):
            Image.open(picture).verify()
        with Path(path, ".lock").open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        assert not [entry for entry in path.glob(".*.*") if entry.suffix[1:].isdigit()]


def check_half_done(folder, expected):
    """After a kill: what is there is a beginning of what will be there."""
    for name, path in cells(folder).items():
        found = [timeless(record) for record in RunStore(path).samples()]
        assert found == expected[name]["records"][: len(found)]


def _cell(path):
    store = RunStore(path)
    return {
        "records": [timeless(record) for record in store.samples()],
        "metrics": timeless(store.metrics()),
        "config": {**yaml.safe_load(store.config_path.read_text()), "paths": None},
        "files": sorted(entry.name for entry in path.iterdir()),
    }


def _recomputed(path, records):
    cfg = RunConfig.from_dict(yaml.safe_load(Path(path, "config.yaml").read_text()))
    return json.loads(json.dumps(build_bench(cfg.bench).summarise(records)))
