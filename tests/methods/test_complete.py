"""A method is a file, a config, a README row and a page; what else is missing is named here."""

import json
from dataclasses import dataclass
from pathlib import Path

import pytest

from experiments.timing.cost_model import Shape, method_cost
from pbs import AttentionMethod
from pbs.methods import METHODS
from pbs.methods.facts import Facts
from pbs.orders import ORDERS
from pbs.selectors import SELECTORS
from tests.methods.cases import CASES
from tests.properties.draws import PARAMETERS

ROOT = Path(__file__).resolve().parents[2]
PARTS = ROOT / "docs" / "methods" / "index.md"
GOLDEN = ROOT / "tests" / "golden" / "needle.json"
SHAPE = Shape(4, 2, 32)


def missing(name):
    """What the method of this name still needs, a sentence each that says where it goes."""
    method = METHODS.load(name)
    found = []
    config = ROOT / "conf" / "method" / f"{name}.yaml"
    if not config.is_file():
        found.append(f"conf/method/{name}.yaml: 'defaults: [/schema/method@_here_: {name}]'")
    if f"| `{name}` |" not in (ROOT / "README.md").read_text():
        found.append(f"README.md: a row '| `{name}` | ... |' in the table of methods")
    page = f"methods/{name}.md"
    if not (ROOT / "docs" / page).is_file():
        found.append(f"docs/{page}: what it computes, its cost, where it fails")
    if f"- {page}" not in (ROOT / "mkdocs.yml").read_text():
        found.append(f"mkdocs.yml: {page} in nav")
    if method.facts is None:
        found.append(f"{method.__module__}: facts = Facts(...), see pbs.methods.facts")
    else:
        try:
            method_cost(name, SHAPE, 1024, density=0.5)
        except ValueError as error:
            found.append(f"experiments/timing/cost_model.py: {error}")
        others = [METHODS.load(other).facts for other in METHODS if other != name]
        for fact in ("label", "colour", "marker"):
            if getattr(method.facts, fact) in [getattr(one, fact) for one in others if one]:
                found.append(f"{method.__module__}: another {fact} in facts, this one is taken")
    if not any(case[0] == name for case in CASES.values()):
        found.append(f"tests/methods/cases.py: a line for {name!r} in CASES")
    if name not in PARAMETERS:
        found.append(f"tests/properties/draws.py: a line for {name!r} in PARAMETERS")
    if f"conf/method/{name}.yaml" not in json.loads(GOLDEN.read_text()):
        found.append("tests/golden/needle.json: its numbers; `make golden` writes them")
    return found


@pytest.mark.parametrize("name", METHODS)
def test_nothing_is_missing(name):
    assert missing(name) == []


def missing_part(registry, name):
    """What the order or selector of this name still needs."""
    found = []
    if not (ROOT / "conf" / registry.kind / f"{name}.yaml").is_file():
        found.append(f"conf/{registry.kind}/{name}.yaml: '{registry.kind}: {name}' for method")
    if f"`{name}`" not in PARTS.read_text():
        found.append(
            f"docs/methods/index.md: `{name}` among the choices of method.{registry.kind}="
        )
    if not any(params.get(registry.kind) == name for _, params, _ in CASES.values()):
        is_default = getattr(METHODS.load("pbs")(), registry.kind) == name
        if not is_default:
            found.append(f"tests/methods/cases.py: a line with {registry.kind} {name!r}")
    return found


@pytest.mark.parametrize(
    ("registry", "name"), [(one, name) for one in (ORDERS, SELECTORS) for name in one]
)
def test_no_part_of_pbs_lacks_anything(registry, name):
    assert missing_part(registry, name) == []


def test_what_a_new_selector_lacks_is_named_with_its_place(monkeypatch):
    monkeypatch.setitem(SELECTORS._entries, "newcomer", f"{__name__}:Newcomer")
    places = [sentence.partition(":")[0] for sentence in missing_part(SELECTORS, "newcomer")]
    assert places == [
        "conf/selector/newcomer.yaml",
        "docs/methods/index.md",
        "tests/methods/cases.py",
    ]


@dataclass(kw_only=True)
class Newcomer(AttentionMethod):
    """A method of which only the file is there."""

    def select(self, call):
        """Everything."""
        return call.dense("a test")


def test_what_a_new_method_lacks_is_named_with_its_place(monkeypatch):
    monkeypatch.setitem(METHODS._entries, "newcomer", f"{__name__}:Newcomer")
    places = [sentence.partition(":")[0] for sentence in missing("newcomer")]
    assert places == [
        "conf/method/newcomer.yaml",
        "README.md",
        "docs/methods/newcomer.md",
        "mkdocs.yml",
        __name__,
        "tests/methods/cases.py",
        "tests/properties/draws.py",
        "tests/golden/needle.json",
    ]
    looks_like_pbs = Facts("PBS", "#D55E00", "p", selection="pooled")
    monkeypatch.setattr(Newcomer, "facts", looks_like_pbs)
    assert [f"another {fact} in facts" in " ".join(missing("newcomer"))
            for fact in ("label", "colour", "marker")] == [True, True, False]  # fmt: skip
    monkeypatch.setattr(Newcomer, "facts", Facts("N", "#123456", "p", selection="magic"))
    assert "expected facts on its class with a selection of none, pooled" in missing("newcomer")[4]


def test_every_method_has_settings_for_a_curve_but_dense_attention():
    from experiments.tools.curves import curve_lines

    lines = list(curve_lines())
    assert {line.split()[0].removeprefix("method=") for line in lines} == {*METHODS} - {"flash"}
    for line in lines:
        name, *words = line.split()
        settings = dict(word.removeprefix("method.").split("=") for word in words)
        METHODS.build(
            name.removeprefix("method="), {key: json.loads(text) for key, text in settings.items()}
        )
