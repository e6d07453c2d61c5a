"""No foreign code, no pickles, no paths out of the output folder, no keys on disk."""

import ast
import json
import random
import re
import shutil
import zipfile
from importlib.metadata import distributions

import pytest
import torch
import yaml

from experiments.benches.opencompass.files import read_rows
from experiments.models.load import load_model
from experiments.report.compare import config_of
from experiments.run import runner
from experiments.settings import credentials
from experiments.settings.config import ROOT, ConfigError, ModelConfig, RunConfig
from experiments.settings.explain import explain

TINY = ROOT / "experiments" / "tiny"
KEY = "0123456789abcdef" * 2 + "deadbeef"  # as long as one of W&B, and nobody's
OWN_TOKENIZER = {"auto_map": {"AutoTokenizer": [None, "own.Tokenizer"]}}
OWN_SOURCE = "from transformers import PreTrainedTokenizerFast as Tokenizer\n"
SOURCES = [ROOT / "run.py", *(
    path
    for package in ("pbs", "baselines", "experiments", "pbs_attn")
    for path in sorted((ROOT / package).rglob("*.py"))
)]  # fmt: skip


def checkpoint(folder, **files):
    """A copy of the embedded model with entries of its JSON files changed."""
    shutil.copytree(TINY, folder)
    for name, entries in files.items():
        path = folder / f"{name}.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **entries}))
    return folder


def calls(path):
    """Every call in a file: its dotted name and its keywords."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call):
            yield (
                ast.unparse(node.func),
                {word.arg: ast.unparse(word.value) for word in node.keywords},
            )


def test_no_source_runs_what_it_reads():
    forbidden = {
        *("eval", "exec", "compile", "os.system", "os.popen", "pickle.load", "pickle.loads"),
        *("marshal.loads", "dill.load", "joblib.load", "torch.load", "yaml.load", "shelve.open"),
        *("yaml.unsafe_load", "yaml.full_load", "load_dataset", "datasets.load_dataset"),
        *("numpy.load", "np.load", "pandas.read_pickle", "pd.read_pickle", "instantiate"),
    }
    for path in SOURCES:
        for name, words in calls(path):
            assert name not in forbidden, (path, name)
            assert words.get("shell") in (None, "False"), (path, name)
            assert words.get("trust_remote_code") not in ("True", "1"), (path, name)
            assert words.get("use_safetensors") in (None, "True"), (path, name)
            assert "extractall" not in name, (path, name)


@pytest.fixture
def sentinel(tmp_path):
    """A file that foreign code would make, and the code."""
    path = tmp_path / "foreign_code_ran"
    return path, f"open({str(path)!r}, 'w').close()\n"


def test_code_of_a_checkpoint_is_not_run_unless_asked_for(tmp_path, sentinel):
    path, code = sentinel
    folder = checkpoint(
        tmp_path / "checkpoint",
        tokenizer_config={"auto_map": {"AutoTokenizer": [None, "own.Tokenizer"]}},
    )
    (folder / "own.py").write_text(OWN_SOURCE + code)
    assert load_model(ModelConfig(path=str(folder))).tokenizer is not None
    assert not path.exists()
    folder = checkpoint(
        tmp_path / "other",
        config={"model_type": "own", "auto_map": {"AutoConfig": "own.Config"}},
    )
    (folder / "own.py").write_text(code)
    with pytest.raises(ConfigError, match=r"then add model\.trust_remote_code=true"):
        load_model(ModelConfig(path=str(folder)))
    assert not path.exists()
    with pytest.raises(ConfigError):  # asked for: it runs, and has no such class
        load_model(ModelConfig(path=str(folder), trust_remote_code=True))
    assert path.exists()


def test_rulers_data_run_no_code_of_the_tokenizer(run, tmp_path, sentinel):
    path, code = sentinel
    folder = checkpoint(
        tmp_path / "checkpoint",
        tokenizer_config={"auto_map": {"AutoTokenizer": [None, "own.Tokenizer"]}},
    )
    (folder / "own.py").write_text(OWN_SOURCE + code)
    from experiments.benches.opencompass.ruler_data import CheckedRuler

    settings = {"tokenizer_model": str(folder), "max_seq_length": 512, "num_samples": 1}
    template = "{context} {query} {num_v}"
    rows = CheckedRuler.load(
        "opencompass.datasets.ruler.ruler_vt.RulerVtDataset",
        trust_remote_code=False,
        max_out_len=128,
        chat_options={},
        template=template,
        **settings,
    )
    assert len(rows) == 1
    assert not path.exists()


def test_pickled_weights_are_refused_before_they_are_opened(tmp_path, sentinel):
    path, _ = sentinel

    class Foreign:
        def __reduce__(self):
            return open, (str(path), "w")

    folder = checkpoint(tmp_path / "checkpoint")
    (folder / "model.safetensors").unlink()
    for name in ("pytorch_model.bin", "model.pt", "weights.pkl"):
        torch.save(Foreign(), folder / name)
    with pytest.raises(ConfigError, match="reading a pickle can run any code"):
        load_model(ModelConfig(path=str(folder)))
    shutil.copy(folder / "pytorch_model.bin", folder / "model.safetensors")
    with pytest.raises(ConfigError, match="could not load the weights"):
        load_model(ModelConfig(path=str(folder)))
    assert not path.exists()


def test_scripts_beside_data_are_not_run_and_archives_write_nothing(tmp_path, sentinel):
    path, code = sentinel
    data = tmp_path / "data"
    data.mkdir()
    for name in ("longbench.py", "data.py", "__init__.py"):
        (data / name).write_text(code)
    archive = data / "data.zip"
    row = {"input": "", "context": "text", "answers": ["a"]}
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("data/qasper.jsonl", json.dumps(row))
        file.writestr("../../escaped.jsonl", "x")
    before = sorted(tmp_path.rglob("*"))
    assert read_rows(archive, ["input", "context", "answers"], "data/qasper.jsonl") == [row]
    assert sorted(tmp_path.rglob("*")) == before
    assert not path.exists()


NAMES = (("model", "name"), ("method", "name"), ("bench", "name"), ("model", "path"))


def test_no_name_leads_out_of_the_output_folder(compose_cell, tmp_path):
    rng = random.Random(0)
    pieces = ("..", ".", "/", "\\", "~", "a", "%2e", "\x00", "\n", " ", "é", ":", "*", "$HOME", "-")
    outputs = tmp_path.resolve()
    tried = 0
    base = compose_cell("method=flash")
    for _ in range(100):
        name = "".join(rng.choices(pieces, k=rng.randrange(1, 6)))
        for group, key in (
            ("model", "name"),
            ("method", "name"),
            ("bench", "name"),
            ("model", "path"),
        ):
            cfg = base.copy()
            cfg[group][key] = name
            if key == "path":
                cfg.model.name = None
            tried += 1
            try:
                folder = RunConfig.from_hydra(cfg).folder
            except (ConfigError, OSError, ValueError):
                continue
            assert folder.resolve().is_relative_to(outputs), name
            assert len(folder.relative_to(tmp_path).parts) == 4, name
            assert ".." not in folder.relative_to(tmp_path).parts, name
    print(f"names tried: {tried}")
    assert tried == 400


def test_a_run_writes_into_its_outputs_and_nowhere_else(command, tmp_path):
    words = ("debug=fast", "check=false", "paths.outputs=out", "method=flash")
    status, _ = command(*words, "model.name='../../a b/..'", "-m", "seed=1,2")
    assert status == 0
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert len(list(tmp_path.glob("out/needle/*/flash/*/metrics.json"))) == 2


def test_the_config_of_a_foreign_results_folder_directs_nothing(command, tmp_path):
    words = ("debug=fast", "check=false", "paths.outputs=out", "method=flash")
    command(*words, "logger.mode=disabled")
    (path,) = tmp_path.rglob("config.yaml")
    content = yaml.safe_load(path.read_text())
    elsewhere = tmp_path / "elsewhere"
    content["paths"] = {"outputs": str(elsewhere), "wandb": str(elsewhere)}
    content["logger"]["mode"] = "online"
    path.write_text(yaml.safe_dump(content))
    (path.parent.parent.parent / "accuracy_density.png").unlink()
    status, _ = command(*words, "logger.mode=disabled")
    assert status == 0
    assert not elsewhere.exists()
    assert config_of(path.parent).folder == path.parent


def test_configs_are_data(tmp_path):
    path = tmp_path / "needle" / "tiny" / "flash" / "hash" / "config.yaml"
    path.parent.mkdir(parents=True)
    path.write_text("!!python/object/apply:os.system ['true']")
    with pytest.raises(yaml.YAMLError):
        config_of(path.parent)


def bytes_of(folder):
    return b"".join(path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file())


def test_keys_are_written_nowhere(command, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setenv("HF_TOKEN", f"hf_{KEY}")
    status, printed = command(
        *("debug=fast", "check=false", "paths.outputs=out", "method=flash"),
        *("logger.mode=offline", "-m", "seed=1"),
    )
    assert status == 0
    written = bytes_of(tmp_path)
    assert b"wandb" in written
    assert len(list(tmp_path.rglob("*.wandb"))) >= 1
    assert KEY.encode() not in written
    assert KEY not in printed


def test_keys_in_errors_are_hidden(run, monkeypatch, capsys):
    monkeypatch.setenv("WANDB_API_KEY", KEY)

    def refuse(*_, **__):
        raise ValueError(f"401 for https://api:{KEY}@api.wandb.ai")

    monkeypatch.setattr(runner, "load_model", refuse)
    store = run("method=flash")
    assert "https://api:<WANDB_API_KEY>@api" in store.metrics()["error"]["message"]
    assert KEY.encode() not in bytes_of(store.folder)
    printed = capsys.readouterr()
    assert KEY not in printed.out + printed.err


@pytest.mark.parametrize(
    "words",
    [
        ["logger.api_key=KEY"],
        ["+logger.api_key=KEY"],
        ["hydra.job.env_set.WANDB_API_KEY=KEY"],
        ["hydra.job.env_set={HF_TOKEN:KEY}", "-m"],
        ["logger.entity=KEY"],
        ["model.path=KEY", "-m"],
    ],
    ids=lambda words: words[0],
)
def test_keys_on_the_command_line_are_refused_and_not_repeated(
    command, tmp_path, monkeypatch, words
):
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    words = [word.replace("KEY", KEY) if "API_KEY" not in word else word.replace("=KEY", f"={KEY}")
             for word in words]  # fmt: skip
    status, printed = command("debug=fast", "paths.outputs=out", *words)
    assert status == 1
    assert "looks like a secret" in printed
    assert "set the environment variable WANDB_API_KEY" in printed
    assert KEY not in printed
    assert not list(tmp_path.iterdir())


def test_a_key_that_an_interpolation_brings_is_refused(compose_cell, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    cfg = compose_cell("method=flash", "logger.entity=${oc.env:WANDB_API_KEY}")
    with pytest.raises(ConfigError, match=r"logger\.entity contains a secret") as caught:
        RunConfig.from_hydra(cfg)
    assert KEY not in explain(caught.value)


def test_short_placeholders_are_no_keys(monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "x")
    assert credentials.hide("x marks the spot") == "x marks the spot"
    credentials.refuse_in_words(["method=xattention", "bench.tasks=[single]"])


def test_every_package_under_the_gpl_is_named():
    """Of those installed here; fuzzywuzzy is under version 2 of it, and OpenCompass needs it."""
    text = (ROOT / "docs" / "dependencies.md").read_text()
    named = text.partition("- GPL: ")[2].partition("\n")[0].split(", ")
    found = set()
    for package in distributions():
        facts = package.metadata
        licence = " ".join([facts.get("License", "")[:60], facts.get("License-Expression", ""),
                            *(facts.get_all("Classifier") or ())])  # fmt: skip
        is_strong = re.search(r"(?<!L)(?<!Lesser )\b(A?GPL|(GNU )?General Public)", licence)
        if is_strong and "Lesser" not in licence:
            found.add(facts["Name"])
    assert "fuzzywuzzy" in found
    assert found <= set(named)
