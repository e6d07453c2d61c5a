"""Every file in conf composes, settings are typed, and equal settings have equal hashes."""

import shutil
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from hydra.errors import ConfigCompositionException
from omegaconf import OmegaConf

from experiments.settings.bench_names import BENCHES
from experiments.settings.config import CONF, ConfigError, ModelConfig, RunConfig, make_schema
from pbs.methods import METHODS, build_method
from pbs.orders import ORDERS
from pbs.selectors import SELECTORS

REGISTRIES = {"method": METHODS, "bench": BENCHES, "order": ORDERS, "selector": SELECTORS}
OPTIONS = [
    pytest.param(path.parent.name, path.stem, id=f"{path.parent.name}={path.stem}")
    for path in sorted(CONF.glob("*/*.yaml"))
    if path.parent.name != "hydra"
]


def cell(compose_cell, *overrides):
    return RunConfig.from_hydra(compose_cell(*overrides, fast=False))


@pytest.mark.parametrize(("group", "option"), OPTIONS)
def test_every_option_composes_and_resolves(compose_cell, group, option):
    extra = ["model.path=some/model"] if (group, option) == ("model", "hf") else []
    cfg = cell(compose_cell, f"{group}={option}", *extra)
    assert cfg.folder.name == cfg.hash
    if group in ("method", "bench"):
        # A file may be another setting of a method: minference_authors.
        assert option.startswith(getattr(cfg, group)["name"])
    if group in ("order", "selector"):
        assert cfg.method[group] == option


@pytest.mark.parametrize(("group", "option"), OPTIONS)
def test_every_option_says_what_it_is_and_how_to_run_it(group, option):
    lines = (CONF / group / f"{option}.yaml").read_text().splitlines()
    comments = [line for line in lines if line.startswith("# ") and "@package" not in line]
    assert comments
    assert group == "paths" or any("python run.py" in line for line in comments)


@pytest.mark.parametrize("kind", REGISTRIES)
def test_every_registered_name_has_an_option(kind):
    options = {path.stem for path in (CONF / kind).glob("*.yaml")}
    assert set(REGISTRIES[kind].names) <= options


@pytest.mark.parametrize("name", METHODS.names)
def test_an_option_states_no_default_of_its_own(compose_cell, name):
    cfg = cell(compose_cell, f"method={name}")
    params = {key: value for key, value in cfg.method.items() if key != "name"}
    assert build_method(name, **params) == build_method(name)


def method_settings(compose_cell, option):
    return {
        key: value
        for key, value in cell(compose_cell, f"method={option}").method.items()
        if key != "backend"
    }


@pytest.mark.parametrize(
    ("name", "pbs_paper", "authors"),
    [
        (
            "flexprefill",
            {"gamma": 0.95, "tau": 0.1, "block_size": 128, "min_budget": None},
            {"min_budget": 1024},
        ),
        ("xattention", {"stride": 8, "threshold": 0.9, "block_size": 128}, {"stride": 16}),
        ("minference", {"preset": "paper", "config_path": None}, {"preset": "llama31-v2"}),
    ],
)
def test_the_authors_setting_differs_from_the_pbs_papers_as_stated(
    compose_cell, name, pbs_paper, authors
):
    default = method_settings(compose_cell, name)
    assert {key: default[key] for key in pbs_paper} == pbs_paper
    assert method_settings(compose_cell, f"{name}_authors") == {**default, **authors}


@pytest.mark.parametrize(
    ("name", "only"),
    [
        ("meanpool", {"block_size": 128, "threshold": 0.9, "force_select_first_block": True}),
        ("prism", {"block_size": 128, "threshold": 0.95, "high_dims": None, "low_dims": None}),
        ("streaming", {"n_init": 1024, "n_local": 4096, "num_last_full": 0}),
        ("pbs", {"block_size": 128, "segment_size": 256, "threshold": 0.9, "order": "last_block"}),
    ],
)
def test_methods_with_one_setting(compose_cell, name, only):
    default = method_settings(compose_cell, name)
    assert {key: default[key] for key in only} == only
    assert not (CONF / "method" / f"{name}_authors.yaml").exists()


@pytest.mark.parametrize(
    "override",
    [
        "method.thresold=0.5",
        "bench.task=[single]",
        "model.pth=x",
        "sed=1",
        "method.threshold=high",
        "method.block_size=12.5",
        "bench.lengths=[long]",
        "seed=x",
    ],
)
def test_unknown_keys_and_wrong_types_are_refused(compose_cell, override):
    with pytest.raises(ConfigCompositionException):
        cell(compose_cell, "method=pbs", override)


def test_an_order_for_a_method_without_orders_is_refused(compose_cell):
    with pytest.raises(ConfigCompositionException, match="'order' not in 'FlashAttention'"):
        cell(compose_cell, "method=flash", "order=none")


def test_a_missing_value_names_the_key(compose_cell):
    with pytest.raises(ConfigError, match=r"add model\.path="):
        cell(compose_cell, "model=hf")


def test_a_wrong_tracking_mode_is_refused(compose_cell):
    with pytest.raises(ConfigError, match="offline, online, disabled"):
        cell(compose_cell, "logger.mode=of")


def test_group_and_key_give_the_same_hash(compose_cell):
    by_group = cell(compose_cell, "method=pbs", "order=none", "selector=meanpool")
    by_key = cell(compose_cell, "method=pbs", "method.order=none", "method.selector=meanpool")
    assert by_group.hash == by_key.hash
    assert by_group.hash != cell(compose_cell, "method=pbs").hash


def test_a_stated_default_and_another_spelling_give_the_same_hash(compose_cell):
    plain = cell(compose_cell, "method=pbs").hash
    assert cell(compose_cell, "method=pbs", "method.threshold=0.90").hash == plain
    whole = cell(compose_cell, "method=pbs", "method.threshold=1").hash
    assert whole == cell(compose_cell, "method=pbs", "method.threshold=1.0").hash


@pytest.mark.parametrize(
    "override", ["paths.outputs=elsewhere", "logger.mode=disabled", "check=false", "resume=false"]
)
def test_what_changes_no_result_changes_no_hash(compose_cell, override):
    assert cell(compose_cell, override).hash == cell(compose_cell).hash


@pytest.mark.parametrize(
    "override",
    [
        "method.threshold=0.8",
        "seed=1",
        "bench.lengths=[1024]",
        "bench.limit=3",
        "model.dtype=float16",
    ],
)
def test_what_changes_a_result_changes_the_hash(compose_cell, override):
    changed, plain = cell(compose_cell, override), cell(compose_cell)
    assert changed.hash != plain.hash
    assert (changed.sample_set == plain.sample_set) == override.startswith("method.")


def test_the_hash_is_the_same_in_every_version():
    cfg = RunConfig(
        model=ModelConfig(name="tiny", path="experiments/tiny"),
        method={"name": "pbs", "threshold": 0.9},
        bench={"name": "needle"},
    )
    assert cfg.hash == RunConfig.from_dict(cfg.to_dict()).hash == "c27358703c3f"


def test_dict_parameters_take_new_keys_from_the_command_line(compose_cell):
    cfg = cell(compose_cell, "method=pbs", "method.order_params.num_queries=4")
    assert cfg.method["order_params"] == {"num_queries": 4}


def test_a_schema_has_the_fields_of_its_class():
    @dataclass(kw_only=True)
    class Thing:
        size: int = 3
        names: list[str] = field(default_factory=lambda: ["a"])
        either: int | list[int] = 1
        hidden: object = field(default=None, init=False)

    node = OmegaConf.structured(make_schema(Thing, "thing"))
    assert OmegaConf.to_container(node) == {
        "name": "thing",
        "size": 3,
        "names": ["a"],
        "either": 1,
    }
    node.either = [1, 2]  # a type OmegaConf cannot express takes anything


def test_another_checkpoint_under_the_same_path_is_another_run(tmp_path):
    from experiments.content import checkpoint_files

    assert checkpoint_files("some/hub-name") is None
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "own" / "__pycache__").mkdir(parents=True)
    code = tmp_path / "own" / "modeling.py"
    code.write_text("a = 1")
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(b"a" * (3 << 20))
    first = checkpoint_files(str(tmp_path))
    assert set(first) == {"config.json", "model.safetensors", "own/modeling.py"}
    (tmp_path / "README.md").write_text("text for people")
    (tmp_path / "own" / "__pycache__" / "modeling.py").touch()
    assert first == checkpoint_files(str(tmp_path))
    with weights.open("r+b") as file:  # in the middle
        file.seek((3 << 19) + 5)
        file.write(b"b")
    second = checkpoint_files(str(tmp_path))
    assert [name for name in first if first[name] != second[name]] == ["model.safetensors"]
    code.write_text("a = 2")
    third = checkpoint_files(str(tmp_path))
    assert [name for name in first if second[name] != third[name]] == ["own/modeling.py"]
    assert "model.safetensors" not in checkpoint_files(str(tmp_path), has_weights=False)


@pytest.fixture
def checkpoint(tmp_path, project):
    return Path(shutil.copytree(project / "experiments" / "tiny", tmp_path / "ck"))


def test_one_checkpoint_is_one_run_however_its_path_is_spelled(
    compose_cell, checkpoint, monkeypatch
):
    monkeypatch.chdir(checkpoint.parent)
    plain = cell(compose_cell, "model=hf", "model.path=ck", "bench=needle")
    for spelling in ("ck/", "./ck", str(checkpoint), "ck/../ck"):
        other = cell(compose_cell, "model=hf", f"model.path={spelling}", "bench=needle")
        assert (other.hash, other.folder) == (plain.hash, plain.folder), spelling
    assert plain.model_name == "ck"
    monkeypatch.chdir(checkpoint)
    assert cell(compose_cell, "model=hf", "model.path=.", "bench=needle").folder == plain.folder
    (checkpoint / "chat_template.jinja").write_text("other")
    assert cell(compose_cell, "model=hf", "model.path=.", "bench=needle").hash != plain.hash


def test_the_identity_of_older_runs_with_a_local_checkpoint_stays():
    tiny = {"path": "experiments/tiny", "name": "tiny", "checkpoint": "0123456789ab"}
    cfg = RunConfig(ModelConfig(**tiny), {"name": "pbs", "threshold": 0.9}, {"name": "needle"})
    assert cfg.hash == "d9599162cc23"


def test_an_edited_text_is_another_run_and_its_place_is_not(compose_cell, tmp_path):
    text = tmp_path / "a" / "text.txt"
    text.parent.mkdir()
    text.write_text("one")
    words = ("method=pbs", "bench=coverage", "model=tiny")
    first = cell(compose_cell, *words, f"bench.text={text}")
    assert set(first.inputs) == {"bench.text"}
    assert RunConfig.from_dict(first.to_dict()).hash == first.hash
    moved = shutil.copytree(text.parent, tmp_path / "b") / "text.txt"
    assert cell(compose_cell, *words, f"bench.text={moved}").hash == first.hash
    text.write_text("two")
    second = cell(compose_cell, *words, f"bench.text={text}")
    assert second.hash != first.hash
    assert second.sample_set != first.sample_set
    assert second.identity_without_content == first.identity_without_content
    assert cell(compose_cell, *words).inputs is None


def test_a_methods_own_file_is_part_of_the_run_and_not_of_the_samples(compose_cell, tmp_path):
    heads = tmp_path / "heads.json"
    heads.write_text("[]")
    words = ("method=minference", f"method.config_path={heads}")
    first = cell(compose_cell, *words)
    heads.write_text("[{}]")
    second = cell(compose_cell, *words)
    assert first.hash != second.hash
    assert first.sample_set == second.sample_set
