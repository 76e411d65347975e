"""What is written becomes a spec, or every mistake is told at once with its place."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from launcher.errors import UserError
from launcher.space import Domain, Sweep
from launcher.spec import Spec, fields
from launcher.specfile import Draft, dump

GOLDEN = Path(__file__).parent / "golden"


def read(text: str | bytes, folder: Path) -> Draft:
    path = folder / "spec.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    draft = Draft()
    draft.read(path)
    return draft


def mistakes(draft: Draft) -> list[str]:
    with pytest.raises(UserError) as raised:
        draft.spec()
    return [line.strip() for line in raised.value.what.splitlines()[1:]]


def given_flags(**values: Any) -> Draft:
    draft = Draft()
    draft.put("data.uri", "x", "--data")
    for key, value in values.items():
        draft.put(key.replace("__", "."), value, f"--{key}")
    return draft


@pytest.mark.parametrize("name", ["mistakes", "sweep_mistakes"])
def test_every_mistake_of_a_file_is_told_at_once(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(GOLDEN)
    draft = Draft()
    draft.read(Path(f"{name}.yaml"))
    with pytest.raises(UserError) as raised:
        draft.spec()
    assert raised.value.what + "\n" == (GOLDEN / f"{name}.txt").read_text()
    assert raised.value.hint == "launch schema prints every field"
    with pytest.raises(UserError) as again:
        draft.spec()
    assert again.value.what == raised.value.what


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 0.001), ("1E3", 1000.0), (".5", 0.5), ("1.", 1.0), ("+1.5", 1.5), ("-2", -2), ("007", 7), ("no", "no"),
        ("yes", "yes"), ("on", "on"), ("true", True), ("False", False), ("'true'", "true"), ('"1"', "1"), ("~", None),
        ("null", None), ("", None), ("0x10", "0x10"), ("1_000", "1_000"), ("12:30", "12:30"),
        ("2026-01-01", "2026-01-01"),
        ("[a, 1, 2.5, null]", ["a", 1, 2.5, None]), ("s3://b/x", "s3://b/x"),
        ("Blüten 花", "Blüten 花"),
        ("[[1], []]", [[1], []]), ("=", "="), ("'null'", "null"), ("a-", "a-"),
    ],
)  # fmt: skip
def test_scalars_are_those_of_yaml_1_2(text: str, value: Any) -> None:
    draft = Draft()
    draft.assign(f"data.uri={text}")
    assert draft.problems == []
    assert draft.values == {"data.uri": value}
    assert type(draft.values["data.uri"]) is type(value)


@pytest.mark.parametrize("text", [".nan", ".inf", "-.INF", "1" * 5000, "{a: 1}"])
def test_what_is_no_value_is_a_mistake_and_no_crash(text: str) -> None:
    draft = given_flags()
    draft.assign(f"optim.lr={text}")
    assert len(mistakes(draft)) == 1
    assert mistakes(draft)[0].startswith("--set optim.lr: ")


@pytest.mark.parametrize("text", ["9" * 99, "1e999", "-1e999", "1e-999"])
def test_numbers_beyond_all_bounds_are_refused(text: str) -> None:
    draft = given_flags()
    draft.assign(f"train.seed={text}")
    assert mistakes(draft)[0].startswith("--set train.seed: should be")
    assert len(mistakes(draft)[0]) < 160


@pytest.mark.parametrize(
    ("text", "line", "problem"),
    [
        ("data: &a {uri: x}\nmodel: *a\n", 2, "aliases"),
        ("a: &a [x]\nb: &b [*a, *a]\nc: [*b, *b]\n", 2, "aliases"),
        ("data: !!python/object:os.system {uri: x}\n", 1, "tags"),
        ("data: {uri: !!python/object/apply:os.system ['true']}\n", 1, "tags"),
        ("name: !!str 3\n", 1, "tags"),
        ("name: a\n---\nname: b\n", 2, "document"),
        ("name: a\n\tdata: b\n", 2, "\\t"),
        ("name: 'a\n", 2, "end of stream"),
        ("a: b: c\n", 1, "not allowed here"),
        ("]", 1, "expected the node content"),
    ],
)
def test_what_is_not_plain_yaml_is_refused_with_its_line(text: str, line: int, problem: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not valid YAML") as raised:
        read(text, tmp_path)
    assert raised.value.where == f"{tmp_path}/spec.yaml:{line}"
    assert problem in raised.value.what
    assert "\n" not in raised.value.what


@pytest.mark.parametrize("text", ["[" * 20_000, "{a: " * 20_000, "a: 1\0", b"\xff\xfe", b"\x89PNG\r\n\x1a\n"])
def test_what_is_no_text_at_all_is_refused(text: str | bytes, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nested too deeply|unacceptable character|not a text in UTF-8"):
        read(text, tmp_path)


@pytest.mark.parametrize(
    ("name", "message"), [("none.yaml", "no such file"), (".", "folder"), ("x" * 300, "File name too long")]
)
def test_a_file_that_cannot_be_read_is_named(name: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message) as raised:
        Draft().read(tmp_path / name)
    assert raised.value.where == str(tmp_path / name)
    assert raised.value.hint


@pytest.mark.parametrize(
    "text",
    [
        "data:\n  uri: x\noptim:\n  lr: 1e-2\n",
        b"\xef\xbb\xbfdata:\r\n  uri: x\r\noptim: {lr: 0.01}\r\n",
        '{"data": {"uri": "x"}, "optim": {"lr": 0.01}}',
        "data.uri: x\noptim.lr: 0.01\n",
        "---\n# a comment\ndata: {uri: 'x'}\ntrain:\noptim: {lr: .01}\n",
    ],
)
def test_forms_that_mean_the_same(text: str | bytes, tmp_path: Path) -> None:
    assert read(text, tmp_path).spec() == Spec.model_validate_json('{"data": {"uri": "x"}, "optim": {"lr": 0.01}}')


@pytest.mark.parametrize("text", ["", "# nothing\n", "---\n", "{}", "null"])
def test_an_empty_file_says_nothing(text: str, tmp_path: Path) -> None:
    assert mistakes(read(text, tmp_path)) == ["data.uri: is missing; write --data URI"]


@pytest.mark.parametrize("text", ["- a\n- b\n", "hello", "3"])
def test_a_file_without_keys_is_refused(text: str, tmp_path: Path) -> None:
    assert mistakes(read(text, tmp_path))[0] == f"{tmp_path}/spec.yaml:1: the file: should be `key: value` lines"


def test_a_key_that_is_no_name_is_refused(tmp_path: Path) -> None:
    problems = mistakes(read("? [a, b]\n: 1\n3: x\nnull: y\n<<: {a: b}\n'': z\n", tmp_path))
    assert [problem.removeprefix(f"{tmp_path}/spec.yaml:") for problem in problems[:-1]] == [
        "1: a key should be a name", "3: 3: no such field", "4: null: no such field",
        "5: <<: no such section; the sections are data, model, optim, train, augment, resources, limits, checkpoint, "
        "sweep",
        "6: no such field",
    ]  # fmt: skip


def test_the_same_key_in_both_notations_stands_twice(tmp_path: Path) -> None:
    draft = read("data: {uri: x}\noptim:\n  lr: 1\noptim.lr: 2\n", tmp_path)
    assert mistakes(draft) == [f"{tmp_path}/spec.yaml:4: optim.lr: stands twice"]


def test_flags_win_over_the_file_and_set_over_both(tmp_path: Path) -> None:
    draft = read("data: {uri: file}\ntrain: {epochs: 1, seed: 1, batch_size: 10}\n", tmp_path)
    draft.put("train.epochs", 2, "--epochs")
    draft.put("train.seed", 2, "--seed")
    draft.assign("train.seed=3")
    spec = draft.spec()
    assert (spec.train.batch_size, spec.train.epochs, spec.train.seed) == (10, 2, 3)
    assert draft.origin == {
        "data.uri": f"{tmp_path}/spec.yaml:1", "train.epochs": "--epochs", "train.seed": "--set train.seed",
        "train.batch_size": f"{tmp_path}/spec.yaml:2",
    }  # fmt: skip


@pytest.mark.parametrize("nothing", ["", "null", "~", " "])
@pytest.mark.parametrize("key", ["train.epochs", "optim.momentum", "augment.crop_ratio", "name"])
def test_set_to_nothing_gives_the_choice_back(key: str, nothing: str) -> None:
    draft = given_flags()
    values = {"train.epochs": "3", "optim.momentum": "0.5", "augment.crop_ratio": "[1, 2]", "name": "x"}
    draft.assign(f"{key}={values[key]}")
    assert draft.spec().flat()[key] != given_flags().spec().flat()[key]
    draft.assign(f"{key}={nothing}")
    assert draft.spec() == given_flags().spec()
    assert key not in draft.origin


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("train.epochs", "--set train.epochs: write --set section.field=value"),
        ("", "--set : write --set section.field=value"),
        ("=3", "--set : no such field"),
        ("lr=1", "--set lr: no such field; did you mean optim.lr?"),
        ("train.lr=1", "--set train.lr: no such field; did you mean optim.lr?"),
        ("batch-size=1", "--set batch-size: no such field; did you mean train.batch_size?"),
        ("batchsize=1", "--set batchsize: no such field; did you mean train.batch_size?"),
        ("optim.LR=1", "--set optim.LR: no such field; did you mean optim.lr?"),
        ("xyzzy.plugh=1", "--set xyzzy.plugh: no such field"),
        ("optim={lr: 1}", "--set optim: this is a section; name a field of it, as in optim.lr"),
        ("optim.lr=[", "--set optim.lr: not valid YAML: expected the node content, but found '<stream end>'"),
        ("optim.lr=*x", "--set optim.lr: not valid YAML: aliases (*name) are not allowed"),
        ('name="\\ud800"', "--set name: is not UTF-8 text"),
        (" train.epochs = 0", "--set train.epochs: should be greater than or equal to 1 (is 0)"),
        ("data.classes=[a, [b]]", '--set data.classes: should be a valid string (is ["b"])'),
        ("data.classes=a", '--set data.classes: should be a list, as in [a, b] (is "a")'),
        ("optim.momentum=0", "optim: nesterov needs a momentum above 0; set optim.nesterov=false for plain SGD"),
    ],
)
def test_each_mistake_of_set_has_its_words(text: str, problem: str) -> None:
    draft = given_flags()
    draft.assign(text)
    assert mistakes(draft) == [problem]


SPACE = "{optim.lr: {loguniform: [1e-3, 1]}, augment.policy: [none, randaugment]}"


def test_a_space_is_read_alike_from_a_file_and_from_set(tmp_path: Path) -> None:
    draft = read(f"data: {{uri: x}}\nsweep:\n  trials: 4\n  space: {SPACE}\n  points: [{{optim.lr: 0.1}}]\n", tmp_path)
    line = given_flags()
    for text in ("sweep.trials=4", f"sweep.space={SPACE}", "sweep.points=[{optim.lr: 0.1}]"):
        line.assign(text)
    spec = draft.spec()
    assert line.spec() == spec
    assert spec.sweep is not None
    assert spec.sweep.space == {
        "optim.lr": Domain(loguniform=(0.001, 1.0)),
        "augment.policy": Domain(choice=("none", "randaugment")),
    }
    assert spec.sweep.points == ({"optim.lr": 0.1},)
    assert read(dump(spec), tmp_path).spec() == spec


@pytest.mark.parametrize("text", ["sweep:\n", "sweep: {}\n", "sweep:\n  # trials: 3\n", "sweep.trials: null\n"])
def test_a_sweep_section_without_a_line_is_a_sweep_with_all_defaults(text: str, tmp_path: Path) -> None:
    assert read(f"data: {{uri: x}}\n{text}", tmp_path).spec().sweep == Sweep()
    assert read("data: {uri: x}\n", tmp_path).spec().sweep is None


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("space=3", "--set sweep.space: should be `key: value` lines (is 3)"),
        ("space={}", "--set sweep.space: names no field; leave it out for the default space"),
        ("space={optim.lr: {uniform: [0, 1], uniform: [0, 2]}}",
         "--set sweep.space: sweep.space.optim.lr.uniform: stands twice"),
        ("space={[a]: 3, optim.lr: [1]}", "--set sweep.space: sweep.space.?: a key should be a name"),
        ("space={optim.lr: [.nan, 1]}", "--set sweep.space: sweep.space.optim.lr: .nan is not a number for a spec"),
        ("space={optim.lr: {uniform: [2, 1]}}",
         "--set sweep.space: sweep.space.optim.lr: uniform: 2 is not less than 1"),
        ("objectives=top1", '--set sweep.objectives: should be `key: value` lines (is "top1")'),
        ("points={optim.lr: 1}", '--set sweep.points: should be a list, as in [a, b] (is {"optim.lr": 1})'),
        ("trials={a: 1}", "--set sweep.trials: a single value is wanted here, not `key: value` lines"),
        ("trials=0", "--set sweep.trials: should be greater than or equal to 1 (is 0)"),
    ],
)  # fmt: skip
def test_each_mistake_of_a_sweep_has_its_words(text: str, problem: str) -> None:
    draft = given_flags()
    draft.assign(f"sweep.{text}")
    assert problem in mistakes(draft)


def test_a_list_can_be_set() -> None:
    draft = given_flags()
    draft.assign("data.classes=[cat, dog, 'no']")
    draft.assign("augment.crop_scale=[0.5, 1]")
    assert draft.spec().data.classes == ("cat", "dog", "no")
    assert draft.spec().augment.crop_scale == (0.5, 1.0)


def test_a_rule_between_sections_names_its_field() -> None:
    assert mistakes(given_flags(train__batch_size=4, resources__workers=8)) == [
        "train.batch_size: 4 is less than one image for each of 8 workers x 1 parts"
    ]


def test_a_flag_and_its_field_are_both_named() -> None:
    draft = Draft()
    draft.put("data.uri", "\udcff", "--data")
    draft.put("train.epochs", -1, "--epochs")
    draft.put("optim.lr", float("nan"), "--lr")
    assert mistakes(draft)[0] == "--data: data.uri: is not UTF-8 text"
    assert "--epochs: train.epochs: should be greater than or equal to 1 (is -1)" in mistakes(draft)
    assert "--lr: optim.lr: should be a finite number (is NaN)" in mistakes(draft)


TEXT = st.text(st.characters(codec="utf-8"), min_size=1, max_size=30) | st.sampled_from(
    ["1e-3", "1e3", "no", "null", "~", "0o7", "0123", "1_000", "12:30", "=", "<<", "!x", "*x", "&x", "a: b", "# x", " "]
)


@settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(uri=TEXT, classes=st.lists(TEXT, min_size=2, unique=True, max_size=4), lr=st.floats(1e-300, 1e300))
def test_a_spec_written_as_yaml_is_read_back_alike(uri: str, classes: list[str], lr: float, tmp_path: Path) -> None:
    draft = given_flags(data__classes=classes, optim__lr=lr, model__freeze=[uri])
    draft.put("data.uri", uri, "--data")
    spec = draft.spec()
    copy = read(dump(spec), tmp_path)
    assert copy.spec() == spec
    assert dump(copy.spec()) == dump(spec)


@settings(deadline=None, max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.text(max_size=200) | st.lists(st.sampled_from([*fields(), ": ", *"\n []{}-*&!'1"])).map("".join))
def test_any_text_is_a_spec_or_a_user_error(text: str, tmp_path: Path) -> None:
    for read_it in (lambda: read(text.encode("utf-8", "replace"), tmp_path), lambda: Draft().assign(f"name={text}")):
        with suppress(UserError):
            (read_it() or given_flags()).spec()
