"""A seeded fuzz of settings and command lines: refused in one line, or run with sane numbers."""

import math
import os
import random
import re
import subprocess
import sys

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from experiments.run.runner import build_bench
from experiments.settings.bench_names import BENCHES
from experiments.settings.config import CONF, RunConfig, make_schema, parameters
from experiments.settings.explain import explain
from experiments.settings.words import check_words
from pbs.methods import METHODS, build_method
from tests.reliability.messages import check_error, check_message, check_raised

HUGE = str(10**30)
# Words of the command line for one value each: wrong types, NaN, negative and huge, empty.
VALUES = (
    *("nan", "inf", "-inf", "-1", "-1e30", "0", "1.5", HUGE, "1e400", "true", "null"),
    *("abc", "''", "'nan'", "[]", "[null]", "[[]]", "[nan]", "[-1]", "[0]", "[abc]", f"[{HUGE}]"),
    *("[1,1]", "{}", "{a:1}", "{a:{b:[]}}", "'../../x'", "'a b'", "???", "${nope}", "5"),
)
NEVER_A_NUMBER = ("nan", "inf", "-inf", HUGE, "1e400")
PER_FIELD = 4
GROUPS = {
    "model": ("path", "name", "dtype", "device", "device_map", "max_length", "config", "weights"),
    "runner": ("name", "workers", "gpus", "options"),
    "match": ("target", "tolerance", "lengths", "num_prompts", "max_steps", "quantity"),
    "logger": ("name", "mode"),
    "paths": ("outputs", "wandb"),
}
PARSER = OverridesParser.create()


def composed(*words):
    with initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
        return compose("config", overrides=list(words))


def changed(cfg, *words):
    """What Hydra makes of further words, without the time that it takes to compose."""
    cfg = cfg.copy()
    for word in words:
        override = PARSER.parse_override(word)
        OmegaConf.update(cfg, override.key_or_group, override.value(), merge=True)
    return cfg


def settings_of(rng):
    """Every field of every method, bench and group, with a few of the values each."""
    for registry in (METHODS, BENCHES):
        for name in registry.names:
            words = (f"{registry.kind}={name}",)
            for field in make_schema(registry.load(name), name).__dataclass_fields__:
                for value in rng.sample(VALUES, PER_FIELD):
                    yield words, f"{registry.kind}.{field}={value}"
    for group, fields in GROUPS.items():
        words = ("match=density", "match.target=0.5") if group == "match" else ()
        for field in fields:
            for value in rng.sample(VALUES, 3 * PER_FIELD):
                yield words, f"{group}.{field}={value}"
    for key in ("seed", "check", "resume"):
        for value in VALUES:
            yield (), f"{key}={value}"


def named(text):
    """The words of a text without a plural s, those of a name such as order_params on their own."""
    return {word.rstrip("s") for word in re.findall(r"[a-z]+", text)}


def refusal(cfg):
    """Why a cell cannot be made of these settings, as it is recorded; "" if it can."""
    try:
        build_bench(cfg.bench)
        build_method(cfg.method["name"], **parameters(cfg.method))
    except (ValueError, TypeError) as error:
        check_raised(error)
        return str(error)
    return ""


def test_every_setting_is_refused_in_one_line_or_can_be_used():
    bases, outcomes = {}, {"refused": 0, "accepted": 0}
    for words, word in settings_of(random.Random(0)):
        if words not in bases:
            bases[words] = composed(*words)
        base = bases[words]
        key, _, value = word.partition("=")
        try:
            cfg = RunConfig.from_hydra(changed(base, word))
        except Exception as error:  # noqa: BLE001 - whatever it is, it must explain itself
            said = explain(error)
        else:
            said = refusal(cfg)
        if said:
            outcomes["refused"] += 1
            check_message(said)
            assert named(key) & named(said), (word, said)
        else:
            outcomes["accepted"] += 1
            used = OmegaConf.select(changed(base, word), key)
            assert not isinstance(used, float) or math.isfinite(used), word
            assert isinstance(used, bool | str) or value not in NEVER_A_NUMBER, word
    print(f"settings tried: {sum(outcomes.values())}, {outcomes}")
    assert sum(outcomes.values()) >= 900, outcomes
    assert min(outcomes.values()) >= 60, outcomes


# Accepted, and strange: the cell must run, or say why not, and never give nonsense.
STRANGE = (
    *("method=pbs method.segment_size=128000000000", "method=pbs method.dense_below=999999999"),
    *("method=minference method.num_sinks=0", "method=minference method.last_q=1000000000000"),
    *("method=streaming method.n_local=1 method.n_init=0", "method=xattention method.threshold=0"),
    *("method=xattention method.threshold=[0.5,0.5,0.5,0.5]", "method=flexprefill method.tau=0"),
    *("method=flexprefill method.max_budget=1", "method=prism method.high_dims=2"),
    *("method=pbs bench.coverage_every=0", "method=pbs bench.coverage_rows=999999999"),
    *("method=pbs model.dtype=float64", "method=pbs model.name='a/../b' bench.limit=999999999"),
)
REFUSED = {
    "method=prism method.high_dims=3": "high_dims must be even",
    "method=prism method.low_dims=1000": "even number of dims",
    "method=xattention method.threshold=[0.5]": "is for 1 head, the model has 4 heads",
    "method=xattention method.threshold=true": "threshold must be a number",
    "method=pbs bench.coverage_layers=[9]": "bench.coverage_layers must lie in [0, 1]",
    "method=pbs bench.coverage_heads=[99]": "bench.coverage_heads must lie in [0, 3]",
    "method=pbs bench.lengths=[5]": "length 5 is too small",
    "method=pbs bench.lengths=[1000000000000]": "the model takes 32768 tokens at most",
    "method=pbs model.device=cuda:7": "torch sees no GPU",
    "method=pbs model.path=.": "without config.json",
    "method=pbs model.path='~nobody_at_all/x'": "no such folder",
    "method=pbs model.config={num_hidden_layers:3}": "they would be random",
    "method=pbs model.config={hidden_size:64}": "other shapes than config.json says",
    "method=pbs model.config={hidden_size:abc}": "expected int",
    "method=pbs model.config={rope_scaling:3}": "rope_scaling must be a mapping",
    "method=pbs model.config={no_such:3}": "no such entry",
    "method=pbs model.device_map=nowhere": "nowhere",
    "method=pbs +bench.needs_model=false": "unknown parameter of bench",
}


def test_strange_settings_run_with_sane_numbers(run):
    for words in STRANGE:
        metrics = run(*words.split()).metrics()
        assert metrics["status"] == "finished", (words, metrics.get("error"))
        total = metrics["results"]["total"]
        assert 0 < total["density"] <= 1 + 1e-6, words
        assert 0 <= total["accuracy"] <= 1, words
        has_coverage = "coverage_every=0" not in words
        assert not has_coverage or 0 < total["coverage"] <= 1 + 1e-6, words
    print(f"strange settings run: {len(STRANGE)}")
    assert len(STRANGE) >= 13


def test_what_a_cell_cannot_be_run_with_is_recorded(run):
    for words, message in REFUSED.items():
        metrics = run(*words.split()).metrics()
        assert metrics["status"] == "failed", words
        assert "results" not in metrics, words
        check_error(metrics["error"], message)
    print(f"refused cells: {len(REFUSED)}")
    assert len(REFUSED) >= 18


# Words of a command line that is wrong, and what the one line about it says.
COMMANDS = {
    "method=": "unknown option of group 'method': ''",
    "=pbs": "unknown key or group: ''",
    "method": "cannot read 'method'",
    "method==pbs": "cannot read 'method==pbs'",
    "bench.lengths=[1,2": "cannot read 'bench.lengths=[1,2'",
    "bench.lengths=1,2]": "cannot read",
    "bench.lengths=[512,]": "cannot read",
    "bench.lengths=range(1,3)": "add -m",
    "bench.tasks=single": "bench.tasks must be a list of texts",
    "bench.tasks=null": "bench.tasks must be a list of texts such as [a,b], got None",
    "bench.tasks.x=1": "give the whole list",
    "bench.limit.x=1": "bench.limit must be an integer or null",
    "bench=[needle,ruler]": "bench is given more than once",
    "bench=null": "bench must name one of its options, got null",
    "bench=3": "bench must name one of its options, got 3",
    "bench=../needle": "unknown option of group",
    "+bench=ruler": "bench is given more than once",
    "~method.threshold": "method.threshold cannot be taken away",
    "~nothing": "nothing",
    "foo.bar=1": "unknown key or group: 'foo'",
    "metod=pbs": "Did you mean 'method'",
    "@method=pbs": "unknown key or group",
    "method@x=pbs": "unknown key or group: 'method@x'",
    "/method=pbs": "cannot read",
    "method={a:1}": "unknown key of 'method' (pbs): 'a'",
    "method.order=[a]": "method.order must be a text, got ['a']",
    "method.order_params=[1]": "method.order_params must be a mapping",
    "method.threshold=0,5": "add -m (--multirun)",
    'method.threshold="0.5': "cannot read",
    "order.x=1": "order has no settings of its own",
    "order=nope": "Did you mean 'none'",
    "experiment=nope": "unknown option of group 'experiment'",
    "hydra/launcher=nope": "unknown option of group 'hydra/launcher'",
    "hydra.nope=1": "unknown key of 'hydra'",
    "hydra.mode=FOO": "hydra.mode must be one of RUN, MULTIRUN",
    "match.target=0.5": "choose match=density or match=coverage",
    "model.path=~/x": "cannot read 'model.path=~/x'",
    "méthode=pbs": "cannot read",
    "\x00=1": "cannot read",
    "a" * 5000 + "=1": "File name too long",
    "method=" + "a" * 5000: "File name too long",
    "seed=0x10": "seed must be an integer, got '0x10'",
    "seed=1e3": "seed must be an integer",
    "check=": "check must be true or false, got ''",
    "resume=maybe": "resume must be true or false",
}
# Read when the cell starts.
LATER = {
    "~bench": "bench needs a value: add bench=",
    "~method": "method needs a value: add method=",
    "method=[]": "method needs a value",
    "+foo=1": "unknown key or group: 'foo'",
    "+model.foo=1": "unknown key of 'model': 'foo'",
    "seed=???": "seed needs a value: add seed=",
    "seed=${nope}": "Interpolation key 'nope' not found",
    "seed=${oc.env:NOPE}": "Environment variable 'NOPE' not found",
    "seed=-1": "seed must lie in [0,",
    f"seed={HUGE}": "seed must fit into 64 bits",
    "method.threshold=${method.threshold}": "Recursive interpolation",
    "method.threshold=nan": "method.threshold must be a finite number",
    "bench.depths=[0,nan]": "bench.depths[1] must be a finite number",
    "method.name=../../x": "unknown method '../../x'",
    "bench.name=../../x": "unknown bench '../../x'",
    "model.name=..": "model.name='..' becomes a folder's name",
    "model.name=" + "a" * 300: "expected 1 to 100 characters",
    "model.path=''": "model.path must be a folder or a name",
    "model.device=toaster": "model.device=toaster: expected auto, cpu, cuda",
    "model.device=meta": "expected auto, cpu, cuda",
    "model.max_length=0": "model.max_length must be at least 2",
    "model.config=[1]": "model.config must be entries",
    "model.device_map=[1]": "model.device_map must be a name",
    "model.weights=foo": "expected pretrained or random",
    "logger.name=mlflow": "expected wandb",
    "paths.outputs=''": "paths.outputs must name a folder",
    "runner.gpus=-1": "runner.gpus must be at least 0",
    "runner.workers=0": "runner.workers must be at least 1",
    "runner.options=[[]]": "runner.options must be a list of texts",
}


def explanation(use, word):
    """What the command line says to a word that nothing can be done with."""
    try:
        check_words([word])
        use(word)
    except Exception as error:  # noqa: BLE001 - Hydra's are of many types
        return explain(error)
    raise AssertionError(f"{word} was taken")


def test_wrong_command_lines_are_explained_in_one_line():
    base = composed()
    said = {word: explanation(composed, word) for word in COMMANDS}
    for word in LATER:
        said[word] = explanation(
            lambda word: RunConfig.from_hydra(
                changed(base, word) if re.match(r"\w+\.", word) else composed(word)
            ),
            word,
        )
    for word, message in {**COMMANDS, **LATER}.items():
        check_message(said[word], message)
    print(f"command lines tried: {len(COMMANDS) + len(LATER)}")
    assert len(COMMANDS) + len(LATER) >= 74


WHOLE = (
    (["-m", "method=pbs,nope"], "unknown option of group 'method': 'nope'"),
    (["-m", "seed=range(0,0)"], "the sweep has no cells"),
    (["hydra.job.chdir=true"], "hydra.job.chdir is not supported"),
    (["logger.api_key=abcdef"], "looks like a secret"),
    (["--foo"], "unrecognized arguments: --foo"),
)


@pytest.mark.parametrize(("words", "message"), WHOLE, ids=lambda value: str(value)[:30])
def test_a_wrong_command_ends_with_a_status_and_no_traceback(command, tmp_path, words, message):
    status, printed = command("debug=fast", "check=false", "paths.outputs=out", *words)
    assert status != 0
    assert message in printed
    assert "Traceback" not in printed
    assert not list(tmp_path.glob("out/needle/*/*/*/metrics.json"))


def test_a_flag_may_stand_among_the_settings(command):
    status, printed = command("debug=fast", "check=false", "paths.outputs=out", "-m", "seed=1,2")
    assert status == 0
    assert printed.count("finished in") == 2


def test_one_wrong_cell_of_a_sweep_is_named_and_the_others_run(command):
    status, printed = command(
        *("debug=fast", "check=false", "paths.outputs=out", "method=flash"),
        *("-m", "model.weights=pretrained,foo", "seed=1,-1"),
    )
    assert status == 1
    assert printed.count("finished in") == 1
    assert printed.count("\nfailed: ") == 3
    assert "model.weights=foo: expected pretrained or random" in printed
    assert "seed must lie in [0," in printed
    assert "Traceback" not in printed


@pytest.mark.parametrize(
    ("words", "message"),
    [(["method=pbss"], "Did you mean 'pbs'"), (["-m", "seed=nan,1"], "seed must be an integer")],
    ids=["option", "sweep"],
)
def test_the_real_command_says_the_same(project, tmp_path, words, message):
    done = subprocess.run(
        [sys.executable, str(project / "run.py"), *words],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={key: value for key, value in os.environ.items() if key != "HYDRA_FULL_ERROR"},
    )
    assert done.returncode == 1
    check_message(done.stderr.strip().split("\n")[-1], message)
    assert "Traceback" not in done.stderr
