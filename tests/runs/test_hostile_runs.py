"""Recipes, weights and run folders made to harm: one sentence says what is wrong, and nothing of theirs is run."""

from __future__ import annotations

import copy
import hashlib
import json
import os
import pickle
import struct
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from helpers.cli import RECIPE, recipe, unmoved
from safetensors.torch import save
from torch import nn

from unmoved import models
from unmoved.analyses.studies.table_cache import TableCache
from unmoved.attacks import PGD
from unmoved.cli.screen import plain
from unmoved.core import untrusted
from unmoved.core.errors import UnmovedError
from unmoved.core.threat import ThreatModel
from unmoved.data import digits
from unmoved.evaluation import judge, outcomes
from unmoved.evaluation.journal import Journal
from unmoved.runs import recipe as config
from unmoved.runs.assembly import Assembly
from unmoved.runs.components import parse_number
from unmoved.runs.evaluated import EvaluatedRun
from unmoved.runs.folder import Run

# --- recipes: text


def read(folder: Path, text: str) -> config.Recipe:
    return config.read(recipe(folder, text))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a = " + "[" * 3000 + "]" * 3000, "not valid TOML: maximum recursion"),
        ("a = " + "{a=" * 3000 + "1" + "}" * 3000, "not valid TOML: maximum recursion"),
        ("a = " + "[" * 100 + "]" * 100, "tables and lists at most 32 deep"),
        ("a" + ".a" * 150 + " = 1", "tables and lists at most 32 deep"),
        ("[" + "a." * 150 + "a]", "tables and lists at most 32 deep"),
        ("a" + ".a" * 20_000 + " = 1", "line 1: expected at most 200 dots"),  # hours otherwise: squares
        ("\n" + "a.b.c = 1\n" * 100_000, "expected at most 262144 characters"),
        ("a = " + "9" * 5000, "Exceeds the limit"),
        ("a = 0x" + "f" * 5000, "at most 64 bits, came one of 20000"),
        ("a = [1, { b = 9223372036854775808 }]", "at most 64 bits, came one of 64"),
        ("a = 1\na = 2", "not valid TOML"),
        ('a = "\\ud800"', "not valid TOML"),
        ("a = 2024-02-30", "not valid TOML"),
        ("\ufeffa = 1", "not valid TOML"),
        ("a = \0", "not valid TOML"),
        ('"\\u001b[2J" = 1', r"keys of printable characters, came '\x1b[2J'"),
        ('[objective."a\\u202eb"]', r"keys of printable characters, came 'a\u202eb'"),
    ],
    ids=range(17),
)
def test_texts_that_would_keep_a_parser_or_its_reader_busy(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(UnmovedError) as caught:
        read(tmp_path, text)
    assert str(tmp_path / "tiny.toml") in str(caught.value)
    assert words in str(caught.value)
    assert len(str(caught.value)) < 1000


def test_a_recipe_without_end_is_not_read_to_its_end() -> None:
    if not Path("/dev/zero").exists():
        pytest.skip("no /dev/zero here")
    with pytest.raises(UnmovedError, match="expected a regular file, came a device"):
        config.read("/dev/zero")


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("a=" + "[" * 3000, "maximum recursion"),
        ("a=" + "9" * 5000, "Exceeds the limit"),
        ("a=0x" + "f" * 5000, "at most 64 bits"),
        (".".join("a" * 100) + "=1", "at most 32 deep"),
        ("phases.\u00b2.attack=1", "expected an index below 1"),
        ("attack.eps=" + "x" * 10**5, "expected a number or a fraction"),
        ("name=" + "x" * 10**6, "expected at most 262144 characters"),
    ],
    ids=["brackets", "digits", "hexadecimals", "dots", "superscript", "long", "longer"],
)
def test_overrides_of_the_same_kind(tmp_path: Path, override: str, words: str) -> None:
    path = recipe(tmp_path, RECIPE + "[[phases]]\nfrom_epoch = 1\nattack = { steps = 7 }\n")
    with pytest.raises(UnmovedError) as caught:
        config.read(path, [override])
    assert words in str(caught.value)
    assert len(str(caught.value)) < 1000


# --- recipes: values


def test_fractions_are_the_floats_that_python_makes_of_them() -> None:
    for top in range(0, 256, 5):
        for bottom in (1, 3, 7, 255, 1000):
            assert parse_number(f"{top}/{bottom}") == parse_number(f" {top} / {bottom} ") == top / bottom
    assert (parse_number("1e-3"), parse_number("-.5"), parse_number("1e300/1e300")) == (1e-3, -0.5, 1.0)


@pytest.mark.parametrize(
    "text", ["1e400", "1e999999999", "1/1e400", "1/1e999999999", "inf", "-inf", "nan", "nan/1", "1/0", "1/2/3", "", "/"]
)
def test_a_number_that_is_none_or_takes_for_ever(text: str) -> None:
    with pytest.raises(ValueError, match="expected a number or a fraction"):
        parse_number(text)


FULL = tomllib.loads(
    RECIPE.replace("[training]", '[schedule]\nuse = "one_cycle"\n[training]\npart = { of = 2, number = 0 }')
    + """
[objective.kl]
weight = { from = 0.0, to = 6.0, over = 0.5 }
[[phases]]
from_epoch = 1
attack = { stop = { use = "friendly", tau = 2 }, loss = { use = "kl" } }
defense = { use = "awp", gamma = 0.01 }
"""
)
FULL["optimizer"] = {"use": "sgd", "lr": 0.1, "nesterov": True}


def leaves(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    if path:
        yield path
    for key, part in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield from leaves(part, (*path, key))


def changed(path: tuple[Any, ...], value: Any) -> dict[str, Any]:
    tables = copy.deepcopy(FULL)
    *parents, last = path
    target: Any = tables
    for key in parents:
        target = target[key]
    target[last] = value
    return tables


STRANGE = [True, "", "x", "\x1b[2J", -1, 2**63 - 1, 1.5, float("nan"), float("inf"), [], {}, [{}], {"use": []}, None]


def test_every_value_of_the_wrong_kind_is_read_or_refused_in_words() -> None:
    config.parse(FULL)
    counts = {True: 0, False: 0}
    for path in leaves(FULL):
        for value in STRANGE:
            try:
                words = "recipe: " + json.dumps(config.parse(changed(path, value)).tables())
                counts[True] += 1
            except UnmovedError as error:
                words = str(error)
                counts[False] += 1
            assert words.startswith("recipe: "), (path, value)
            assert "\x1b" not in words, (path, value)
    assert counts[False] > 500
    assert counts[True] > 20


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        (("training", "epochs"), True, "training.epochs: expected a number, came true"),
        (("threat", "eps"), True, "threat.eps: expected a number, came true"),
        (("evaluation", "n"), True, "evaluation.n: expected a number, came true"),
        (("optimizer", "nesterov"), 1, "optimizer.nesterov: "),
        (("optimizer", "nesterov"), "off", "optimizer.nesterov: "),
        (("training", "validation"), float("inf"), "training.validation: "),
        (("training", "validation"), float("nan"), "training.validation: "),
        (("training", "seed"), 2**63, "at most 64 bits"),
    ],
)
def test_what_python_would_have_let_pass(path: tuple[str, ...], value: Any, words: str) -> None:
    with pytest.raises(UnmovedError, match="recipe: ") as caught:
        config.parse(changed(path, value))
    assert words in str(caught.value)


@pytest.mark.parametrize(
    "name", ["", ".", "..", "../..", " .. ", "a\0b", "\x1b[2Jgone", "\u202egnp", "a\nb", "a\\..\\b", "x" * 600]
)
def test_a_name_becomes_a_folder_and_is_shown(name: str) -> None:
    with pytest.raises(UnmovedError, match="name: expected at most 500 printable characters"):
        config.parse(FULL | {"name": name})


def test_no_name_leads_a_comparison_out_of_its_folder(tmp_path: Path) -> None:
    from unmoved.experiments.jobs import jobs_of

    for name in ("../../x", "/etc", "a/../b", "...x", "digits/at eps=0.1", "na\u00efve"):
        (job,) = jobs_of([config.parse(FULL | {"name": name})], [0], tmp_path / "out", (), threads=1)
        assert Path(os.path.normpath(job.path)).parent.parent == tmp_path / "out", name


@pytest.mark.parametrize(
    "name", ["../../evil", "/evil", "a/b", "a\\b", ".hidden", "", "a\0", "x" * 101, "clean", "worst case"]
)
def test_the_name_of_an_attack_becomes_a_file(name: str) -> None:
    with pytest.raises(UnmovedError, match=r"evaluation.attacks: |printable"):
        config.parse(FULL | {"evaluation": {"attacks": {name: {"use": "pgd"}}}})
    for good in ("pgd", "PGD 20", "apgd-ce_8.255", "\u00e9"):
        config.parse(FULL | {"evaluation": {"attacks": {good: {"use": "pgd"}}}})


# --- recipes: code

SPY = (
    "from pathlib import Path\nPath(__file__).with_suffix('.imported').touch()\ndef thing(*a, **k): raise SystemExit\n"
)
USES = ["spy:thing", "spy.deep:__class__", "os:system", "builtins:eval", "__main__:__dict__", "unmoved.spy:thing"]
WHERE = [("data",), ("model",), ("attack",), ("defense",), ("optimizer",), ("schedule",), ("validation",)]
WHERE += [("objective", "ce"), ("evaluation", "attacks", "pgd"), ("attack", "loss"), ("attack", "stop")]
WHERE += [("phases", 0, "attack"), ("phases", 0, "defense"), ("phases", 0, "objective")]


@pytest.mark.parametrize("where", WHERE, ids=lambda where: ".".join(map(str, where)))
def test_nothing_is_imported_wherever_it_is_named(
    where: tuple[Any, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "spy.py").write_text(SPY)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    base = FULL | {"data": {"use": "digits", "test": 1500}}
    for use in USES:
        table: Any = {"spy": {"use": use}} if where[-1] == "objective" else {"use": use}
        monkeypatch.setitem(globals(), "FULL", base)
        tables = changed(where, table)
        with pytest.raises(UnmovedError) as caught:
            Assembly(config.parse(tables), allow=["unmoved_lab", "sp", "spy2"]).model()
        own = use.startswith("unmoved.")
        assert f"which {'recipes do not reach unasked' if own else 'is not part of unmoved'}" in str(caught.value), use
    assert not list(tmp_path.glob("*.imported"))
    assert "spy" not in sys.modules


NO_MODULES = [".spy:thing", "spy", "spy:", ":thing", "spy:a.b", "spy:thing\n", "spy:thing()", "spy thing:x", "-spy:x"]
NO_MODULES += ["../spy:thing", "spy:thing:x", "\uff53\uff50\uff59:thing", "spy\u200b:thing", "1spy:x", "", "spy:thing#"]


@pytest.mark.parametrize("use", NO_MODULES)
def test_what_is_no_name_of_a_module_is_not_even_parsed(use: str) -> None:
    with pytest.raises(UnmovedError, match=r"attack"):
        config.parse(FULL | {"attack": {"use": use}})


def test_a_model_larger_than_any_memory_is_refused_in_words() -> None:
    for width in (2**62, 10**13):
        assembly = Assembly(config.parse(FULL | {"model": {"use": "mlp", "hidden": [width]}}))
        with pytest.raises(UnmovedError, match=r"model.use = 'mlp' cannot be made with these settings: .*smaller"):
            assembly.model()


def test_timm_unpickles_nothing_whatever_its_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its older versions read a checkpoint that a recipe's options name with ``weights_only=False``."""
    mark = tmp_path / "mark"
    torch.save({"a": Evil(mark)}, tmp_path / "evil.pt")

    def create_model(name: str, **settings: Any) -> nn.Module:
        torch.load(settings["checkpoint_path"], weights_only=False)
        raise AssertionError("it was read")

    library = SimpleNamespace(create_model=create_model, is_model=lambda name: True)
    monkeypatch.setitem(sys.modules, "timm", library)  # type: ignore[arg-type]
    for before in (None, "0"):
        monkeypatch.delenv("TORCH_FORCE_WEIGHTS_ONLY_LOAD", raising=False)
        if before is not None:
            monkeypatch.setenv("TORCH_FORCE_WEIGHTS_ONLY_LOAD", before)
        with pytest.raises(UnmovedError, match="cannot be made"):
            models.timm((3, 8, 8), 3, model="resnet18", options={"checkpoint_path": str(tmp_path / "evil.pt")})
        assert not mark.exists()
        assert os.environ.get("TORCH_FORCE_WEIGHTS_ONLY_LOAD") == before
    torch.load(tmp_path / "evil.pt", weights_only=False)
    assert mark.exists()  # it is a weapon indeed


class Evil:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.mark,)


# --- weights

TENSORS = {"weight": torch.rand(2, 3), "bias": torch.rand(2)}
GOOD: dict[str, Any] = {
    "weight": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
    "bias": {"dtype": "F32", "shape": [2], "data_offsets": [24, 32]},
}


def stored(header: dict[str, Any] | bytes, body: bytes = bytes(32), length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + body


def lying(**change: Any) -> bytes:
    return stored(GOOD | {"weight": GOOD["weight"] | change})


WEIGHTS = {
    "2^64 - 1": stored(GOOD, length=2**64 - 1),
    "2^63": stored(GOOD, length=2**63),
    "longer than the file": stored(GOOD, length=10_000),
    "overlap": lying(data_offsets=[8, 32]),
    "beyond": lying(data_offsets=[0, 2**40]),
    "negative": lying(data_offsets=[-1, 24]),
    "backwards": lying(data_offsets=[24, 0]),
    "huge": lying(shape=[2**62, 2**62]),
    "huge and nothing": stored({"weight": {"dtype": "F32", "shape": [0, 2**64 - 1], "data_offsets": [0, 0]}}, b""),
    "text": lying(shape="x"),
    "unknown type": lying(dtype="OBJECT"),
    "other type": lying(dtype="I32"),
    "twice the bytes": lying(dtype="F64"),
    "many dimensions": lying(shape=[1] * 10_000 + [2, 3]),
    "deep": stored(b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}"),
    "list": stored(b"[]"),
    "no JSON": stored(b"{weight}"),
    "key twice": stored(json.dumps(GOOD).encode().replace(b'"shape": [2]', b'"shape": [2], "shape": [2]')),
    "forged checksum": stored(GOOD | {"__metadata__": {"sha256": "0" * 64}}),
    "checksum of nothing": stored({"__metadata__": {"sha256": "0" * 64}}, b""),
    "four bits, checksum": stored(
        {"__metadata__": {"sha256": "0"}, "weight": {"dtype": "F4", "shape": [2, 4], "data_offsets": [0, 4]}}, bytes(4)
    ),
    "opcodes": b"cos\nsystem\n(S'true'\ntR.",
    "instance": b"(S'true'\nios\nsystem\n.",
    "extension": b"\x82\x01.",
    "persistent": b"Pperson\n.",
    "builds": pickle.dumps(os.system, protocol=0),
    "empty": b"",
}  # fmt: skip


@pytest.mark.parametrize("name", WEIGHTS)
@pytest.mark.parametrize("ending", ["safetensors", "pt"])
def test_weights_that_lie_or_run_are_refused_and_change_nothing(tmp_path: Path, name: str, ending: str) -> None:
    path, net = tmp_path / f"w.{ending}", nn.Linear(3, 2)
    before = {key: value.clone() for key, value in net.state_dict().items()}
    path.write_bytes(WEIGHTS[name])
    with pytest.raises(UnmovedError, match=r"w\.(safetensors|pt): "):
        models.load_weights(net, path)
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())


def test_the_weights_of_this_test_would_be_right(tmp_path: Path) -> None:
    for raw in (save(TENSORS), stored(GOOD)):
        (tmp_path / "w.safetensors").write_bytes(raw)
        models.load_weights(nn.Linear(3, 2), tmp_path / "w.safetensors")


# --- bounds of what is read


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[" * 100_000, "not valid JSON"),
        ('{"a":' * 100_000, "not valid JSON"),
        ('{"a":' * 100 + "1" + "}" * 100, "at most 32 deep"),
        ('{"a": ' + "9" * 5000 + "}", "not valid JSON"),
        ('{"a": 9223372036854775808}', "at most 64 bits"),
        ('{"\\u001b": 1}', "keys of printable characters"),
        ("[]", "expected a JSON object, came a list"),
        ("3", "expected a JSON object, came a int"),
        ("null", "came a NoneType"),
        ("", "not valid JSON"),
    ],
    ids=range(10),
)
def test_json_that_would_end_its_reader(text: str, words: str) -> None:
    for call in (untrusted.json_object, untrusted.json_lines) if text else (untrusted.json_object,):
        with pytest.raises(UnmovedError, match="it") as caught:
            call(text, "it")
        assert words in str(caught.value)
        assert len(str(caught.value)) < 600
    assert untrusted.json_lines("", "it") == []
    assert untrusted.json_lines('{"a": 1}\n{"b": [2.5, "x", null]}\n', "it") == [{"a": 1}, {"b": [2.5, "x", None]}]


def test_a_message_does_not_steer_the_terminal(tmp_path: Path) -> None:
    assert plain("a\x1b[2Jb\u202ec\r\nd\u00e9\ud800") == "a\\x1b[2Jb\\u202ec\\r\nd\u00e9\\ud800"
    assert len(plain("x" * 10**6)) < 6000
    folder = tmp_path / "a\x1b[31m"
    said = unmoved("show", folder / "none.toml").mistake()
    assert "\x1b" not in said
    assert "a\\x1b[31m" in said


def test_a_list_of_recipes_bears_any_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipes" / "mine").mkdir(parents=True)
    (tmp_path / "recipes" / "mine" / "a.toml").write_bytes(b"# \xff\x1b[2J" + b"x" * 10**6)
    said = unmoved("list").fine().out
    assert "\ufffd\\x1b[2Jxxx" in said
    assert len(said) < 20_000


# --- outcomes, journals, shelves

ROWS = ",".join(outcomes.COLUMNS) + "\n100,0,pgd,0.3,linf,0,1,0.15,True,pgd\n101,1,pgd,0.3,linf,1,1,0.15,False,none\n"


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("100", "99999999999999999999", "expected an integer"),
        ("100", "1e300", "expected an integer"),
        ("100", "9223372036854775807", "expected an integer"),  # no float is this number
        ("0.3", "-0.3", "expected a finite number >= 0"),
        ("0.15", "-5", "expected a finite number >= 0"),
        ("index,", "index,index,", "came a column 'index'"),
        ("index,", "", "came none of index"),
        (",by\n", ",by" + ",x" * 10**6 + "\n", "came a column 'x'"),  # pandas takes minutes
        (",by\n", ",by," + "x" * 1000 + "\n", "came a first line of more than 1000 bytes"),
        (",by\n", ",by,a b\n", "came a column 'a b'"),
        (",by\n", ",by,\n", "came a column ''"),
        ("\n10", "\n7,10", "expected 10 values in a row, came more"),
        ("100", "\0", "expected an integer"),
        ("100", '"' * 1001, "expected an outcomes table in CSV"),
        ("\n", "\r", r"came a column 'by\\r100'"),
    ],
)
def test_outcomes_that_are_none(tmp_path: Path, old: str, new: str, words: str) -> None:
    path = tmp_path / "o.csv"
    path.write_text(ROWS)
    assert outcomes.summary(outcomes.read(path))["correct"].tolist() == [2, 1, 1]
    path.write_text(ROWS.replace(old, new) + ("\n" if new == "\r" else ""), newline="")
    with pytest.raises(UnmovedError, match=words):
        outcomes.read(path)


QUESTION = {"weights": "abc"}
ENTRY: dict[str, Any] = {"attack": "a", "part": "a", "position": [0, 1], "prediction": [1, 2], "distance": [0.1, 0.0]}


def journal(path: Path, *lines: str) -> Journal:
    head = json.dumps({"question": QUESTION}, sort_keys=True)
    path.write_text("".join(line + "\n" for line in [head, *lines]))
    return Journal(path, QUESTION)


@pytest.mark.parametrize(
    "line",
    [
        "[" * 100_000,
        "3",
        "[]",
        *(
            json.dumps(ENTRY | change)
            for change in (
                {"position": [2**70, 1]},
                {"position": [-1, 1]},
                {"position": [0, 0]},
                {"position": [0.5, 1]},
                {"position": ["0", "1"]},
                {"position": [[0, 1], [2, 3]], "prediction": [[0, 1], [2, 3]], "distance": [[0.1, 1], [2, 3]]},
                {"position": [True, False]},
                {"position": 0, "prediction": 1, "distance": 0.5},
                {"position": [], "prediction": [], "distance": []},
                {"prediction": [-1, 2]},
                {"prediction": [10**400, 2]},
                {"distance": [float("nan"), 0.1]},
                {"distance": [float("inf"), 0.1]},
                {"distance": [-0.1, 0.1]},
                {"distance": ["x", 0.1]},
            )
        ),
    ],
    ids=range(18),
)
def test_a_line_of_a_journal_that_nobody_wrote_is_asked_again(tmp_path: Path, line: str) -> None:
    opened = journal(tmp_path / "j.jsonl", json.dumps(ENTRY), line, json.dumps(ENTRY | {"position": [5, 6]}))
    position, prediction, distance = opened.read("a", "a")
    assert (position.tolist(), prediction.tolist(), distance.tolist()) == ([0, 1], [1, 2], [0.1, 0.0])
    assert (tmp_path / "j.jsonl").read_text().count("\n") == 2


def test_a_journal_about_samples_that_nobody_asked_for_changes_no_verdict(tmp_path: Path) -> None:
    split, threat = digits(test=1700).test.take(12), ThreatModel("linf", 0.1)
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    attacks = {"a": PGD(threat, steps=1)}
    expected = judge.evaluate(net, split, attacks, threat)
    wrong = np.flatnonzero(expected["clean_prediction"] != expected["label"])
    right = np.flatnonzero(expected["clean_prediction"] == expected["label"])
    assert len(wrong) >= 2
    assert len(right) >= 1
    forged = ENTRY | {
        "position": [10**6, int(wrong[0]), int(right[0])],
        "prediction": [1, 2, 10],
        "distance": [0.0] * 3,
    }
    found = judge.evaluate(net, split, attacks, threat, journal=journal(tmp_path / "j", json.dumps(forged)))
    pd.testing.assert_frame_equal(found, expected)


@pytest.mark.parametrize(
    "body",
    [
        "[]",
        "3",
        "null",
        '{"question": "?"}',
        '{"question": "{\\"n\\": 1}"}',
        '{"question": "{\\"n\\": 1}", "table": 3}',
        '{"question": "{\\"n\\": 1}", "table": {"a": [1], "b": [1, 2]}}',
        "[" * 100_000,
        '{"a": ' + "9" * 5000 + "}",
    ],
    ids=range(9),
)
def test_a_forged_table_is_made_again(tmp_path: Path, body: str) -> None:
    table = pd.DataFrame({"x": [0.5]})
    TableCache(tmp_path).table("t", {"n": 1}, lambda: table)
    (path,) = tmp_path.iterdir()
    whole = path.read_bytes()
    path.write_text(f"{body}\n{hashlib.sha256(body.encode()).hexdigest()}\n")
    pd.testing.assert_frame_equal(TableCache(tmp_path).table("t", {"n": 1}, lambda: table), table)
    assert path.read_bytes() == whole


# --- what a run folder says of itself


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """A judged run of two samples, as files."""
    run = Run.create(tmp_path / "run", {"name": "r", "training": {"seed": 0}})
    run.log.add({"epoch": 1, "seconds": 0.5, "train_accuracy": 0.5, "parts": {"ce": 1.0}})
    (run.path / "evaluation").mkdir()
    (run.path / "evaluation" / "outcomes.csv").write_text(ROWS)
    facts = {
        "n": 2,
        "split": "s",
        "weights": "best",
        "weights_sha256": "0",
        "attacks": {"pgd": "PGD()"},
        "notes": [],
        "classes": ["a", "b"],
    }
    (run.path / "evaluation" / "evaluation.json").write_text(json.dumps(facts))
    images = np.zeros((2, 1, 4, 4), np.float32)
    arrays: dict[str, Any] = {"x": images, "x_adv": images, "attack": np.array(["pgd", "pgd"])}
    whole = np.arange(2)
    np.savez(
        run.path / "evaluation" / "gallery.npz",
        **arrays, label=whole, clean_prediction=whole, adversarial_prediction=whole,
    )  # fmt: skip
    return run


FACTS: list[tuple[str, Any]] = [("n", "x"), ("n", None), ("n", [2]), ("n", True), ("split", 3), ("weights_sha256", 3)]
FACTS += [("weights", []), ("weights", {}), ("weights", 1), ("attacks", 3), ("attacks", None), ("attacks", [1])]
FACTS += [("attacks", "pgd"), ("notes", 3), ("notes", [[]]), ("classes", "ab"), ("classes", [1])]


@pytest.mark.parametrize(("name", "value"), FACTS)
def test_facts_of_other_types_are_named(run: Run, name: str, value: Any) -> None:
    assert EvaluatedRun.of(run).setting.n == 2
    path = run.path / "evaluation" / "evaluation.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {name: value}))
    with pytest.raises(UnmovedError, match=rf"evaluation.json: {name}.*: .*run `unmoved evaluate .*` again") as caught:
        EvaluatedRun.of(run)
    assert str(run.path) in str(caught.value)


@pytest.mark.parametrize(
    "change", [{"epoch": "x"}, {"seconds": None}, {"seconds": [1]}, {"train_accuracy": {"a": 1}}, {"validation_n": "n"}]
)
def test_a_log_without_numbers_is_named(run: Run, change: dict[str, Any]) -> None:
    (run.path / "metrics.jsonl").unlink()
    run.log.add({"epoch": 1, "seconds": 0.5, "train_accuracy": 0.5} | change)
    with pytest.raises(UnmovedError, match=rf"metrics.jsonl: line 1: {next(iter(change))}: .* train again"):
        EvaluatedRun.of(run)


@pytest.mark.parametrize(
    "change",
    [
        {"x": np.zeros((2, 4, 4))},
        {"x": np.zeros((3, 1, 4, 4))},
        {"x": np.zeros((2, 1, 0, 4)), "x_adv": np.zeros((2, 1, 0, 4))},
        {"x_adv": np.full((2, 1, 4, 4), np.nan)},
        {"x": np.full((2, 1, 4, 4), "a"), "x_adv": np.full((2, 1, 4, 4), "a")},
        {"label": np.zeros(3, int)},
        {"label": np.zeros(2)},
        {"clean_prediction": np.zeros((2, 1), int)},
        {"attack": np.zeros(())},
    ],
    ids=range(9),
)
def test_a_gallery_of_something_else_is_named(run: Run, change: dict[str, Any]) -> None:
    path = run.path / "evaluation" / "gallery.npz"
    with np.load(path) as arrays:
        whole = dict(arrays)
    assert EvaluatedRun.of(run).gallery is not None
    np.savez(path, **(whole | change))
    with pytest.raises(UnmovedError, match="its gallery holds no images; run `unmoved evaluate"):
        EvaluatedRun.of(run)
