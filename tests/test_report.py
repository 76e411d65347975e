"""The report holds what the run directory holds, in every state, and no text of others does harm in it."""

from __future__ import annotations

import html
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from launcher.runs import Run, State, Status
from launcher.spec import Data, Spec
from tests.report_run import build
from trainers.card import model_card
from trainers.page import wilson
from trainers.report import render, write

HOSTILE = (
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "{{7*7}}{% raw %}",
    "javascript:alert(1)",
    "' onmouseover=alert(1) x='",
    "</style></title></svg><svg onload=alert(1)>",
    "\u202egnp.tac\x00\ud800",
    "x" * 400,
)
BYTES_FOR_1000_CLASSES = 700_000


class Page(HTMLParser):
    """The elements, attributes and texts of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.texts: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_data(self, data: str) -> None:
        self.texts.append(" ".join(data.split()))


@pytest.fixture
def done(tmp_path: Path) -> Run:
    return build(tmp_path)


@pytest.fixture
def undrawn(done: Run) -> Run:
    """Without epochs there are no curves, which take longer than all the rest."""
    done.write_json("metrics.json", {**done.metrics(), "epochs": []})
    return done


@pytest.mark.parametrize("status", Status)
@pytest.mark.parametrize("epochs", [0, 1, 7])
def test_a_run_in_every_state_has_a_report(tmp_path: Path, status: Status, epochs: int) -> None:
    run = build(tmp_path, status, done=epochs)
    page = Page(render(run))
    assert status.value in page.texts
    assert run.name in page.texts
    assert ("svg" in page.tags) == (epochs > 0 and status is not Status.PENDING)


def test_a_run_without_anything_but_its_spec_has_a_report(tmp_path: Path) -> None:
    run = Run(str(tmp_path), "bare")
    run.create(Spec(data=Data(uri="sample://digits")), {})
    assert "sample://digits" in Page(render(run)).texts


def test_the_report_is_stored_in_the_run_directory(done: Run) -> None:
    assert write(done) == f"{done.uri}/report.html"
    assert done.store.read("report.html").decode() == render(done)


def test_a_failed_run_says_what_and_where_and_what_to_do_before_all_else(tmp_path: Path) -> None:
    error = {"family": "data", "what": "no images", "where": "s3://b/x", "hint": "check the prefix"}
    text = render(build(tmp_path, Status.FAILED, done=0, error=error))
    places = [text.index(part) for part in ("no images", "s3://b/x", "check the prefix", 'id="headline"')]
    assert places == sorted(places)


def test_a_failed_run_without_an_error_says_where_to_look(tmp_path: Path) -> None:
    assert "launch logs flowers-1123" in Page(render(build(tmp_path, Status.FAILED, done=0))).texts


@pytest.mark.parametrize("damage", [b"", b"{", b"[1]", b'"text"', b"\xff\xfe", b"12", b"{}", b"null"])
@pytest.mark.parametrize(
    "key", ["metrics.json", "plan.json", "mistakes.json", "data_report.json", "state.json", "attempts/0001.json"]
)
def test_a_damaged_file_costs_its_section_only(undrawn: Run, key: str, damage: bytes) -> None:
    undrawn.store.write(key, damage)
    text = render(undrawn)
    assert undrawn.name in text
    if damage == b"{":
        assert f"{key} is damaged" in text


def test_a_damaged_spec_costs_nothing_when_there_is_a_plan(undrawn: Run) -> None:
    undrawn.store.write("spec.json", b"{")
    assert "resnet50" in Page(render(undrawn)).texts


WRONG = [None, "text", -1, 1e308, 10**400, float("nan"), float("inf"), [], [None], {}, {"x": 1}, True]


@pytest.mark.parametrize("wrong", WRONG, ids=lambda value: repr(value)[:9])
@pytest.mark.parametrize("key", ["metrics.json", "plan.json", "mistakes.json", "data_report.json"])
def test_a_wrong_value_anywhere_never_costs_the_page(undrawn: Run, key: str, wrong: Any) -> None:
    document = undrawn.read_json(key)
    for place in _places(document):
        undrawn.write_json(key, _with(document, place, wrong))
        assert undrawn.name in render(undrawn), place


@pytest.mark.parametrize("wrong", WRONG, ids=lambda value: repr(value)[:9])
def test_a_wrong_value_in_an_epoch_never_costs_the_page(done: Run, wrong: Any) -> None:
    metrics = done.metrics()
    first, *others = metrics["epochs"]
    scores = dict.fromkeys(first["val"], wrong)
    spoilt = [dict.fromkeys(first, wrong), {**first, "val": scores}, wrong]
    done.write_json("metrics.json", {**metrics, "epochs": [*spoilt, *others]})
    assert "<svg" in render(done)


def _places(document: Any, depth: int = 4) -> list[tuple[Any, ...]]:
    """A path to each value, of lists only to the first."""
    if depth == 0 or not isinstance(document, (dict, list)):
        return [()]
    items = document.items() if isinstance(document, dict) else list(enumerate(document))[:1]
    return [(), *((key, *rest) for key, value in items for rest in _places(value, depth - 1))]


def _with(document: Any, place: tuple[Any, ...], value: Any) -> Any:
    if not place:
        return value
    copy = document.copy()
    copy[place[0]] = _with(document[place[0]], place[1:], value)
    return copy


def test_numbers_that_are_not_finite_are_shown_in_words(tmp_path: Path) -> None:
    run = build(tmp_path, Status.FAILED, done=4)
    metrics = run.metrics()
    metrics["epochs"][3]["train_loss"] = float("nan")
    metrics["epochs"][3]["val"]["loss"] = float("inf")
    run.write_json("metrics.json", metrics)
    texts = Page(render(run)).texts
    assert "not a number" in texts
    assert "infinite" in texts


@pytest.mark.parametrize("text", HOSTILE)
def test_text_of_others_stays_text(tmp_path: Path, text: str) -> None:
    run = build(tmp_path, labels=(text, text + "2", "tulip"), uri=_storable(text), keys="{label}/{number}")
    plan, mistakes = run.plan(), run.read_json("mistakes.json")
    plan["warnings"], plan["pool"], plan["choices"][0]["why"] = [text], text, text
    mistakes[0]["thumbnail"], mistakes[1]["thumbnail"] = text, f"data:image/jpeg;base64,AA{text}"
    run.write_json("plan.json", plan)
    run.write_json("mistakes.json", mistakes)
    run.write_json("data_report.json", {"bad": [{"key": text, "reason": text}]})
    error = dict.fromkeys(("kind", "family", "what", "where", "hint"), text)
    run.set_state(State(Status.FAILED, reason=text, error=error))
    page, clean = Page(render(run)), Page(render(build(tmp_path, name="clean", labels=("a", "a2", "tulip"))))
    assert set(page.tags) <= set(clean.tags) | {"dl", "p"}
    assert not {"script", "iframe", "object", "embed", "form"} & set(page.tags)
    assert not [name for name, _ in page.attributes if name.startswith("on")]
    assert {name for name, _ in page.attributes} <= {name for name, _ in clean.attributes}
    for name, value in page.attributes:
        if name in ("href", "src", "xlink:href"):
            assert re.match(r"#|data:,$|data:image/jpeg;base64,[A-Za-z0-9+/=]+$", value), value
    shown = re.sub("[\u202e\x00\ud800]", "\ufffd", text)
    assert " ".join(shown.split()) in page.texts
    assert not re.search("[\u202e\x00\ud800]", render(run))


def _storable(text: str) -> str:
    return re.sub("[\x00\ud800]", "", text)


@pytest.mark.parametrize("thumbnail", [
    "data:image/svg+xml;base64,PHN2Zz4=", "data:text/html;base64,PHA+", "https://example.com/x.jpg",
    "data:image/jpeg;base64,AA==\n", "data:image/jpeg;base64,AA\" onerror=alert(1)", "", None, 7,
])  # fmt: skip
def test_only_inline_photos_become_images(undrawn: Run, thumbnail: Any) -> None:
    undrawn.write_json("mistakes.json", [{"key": "k", "label": "a", "predicted": "b", "thumbnail": thumbnail}])
    page = Page(render(undrawn))
    assert "img" not in page.tags
    assert "no preview" in page.texts


def test_nothing_is_loaded_and_no_script_may_run(done: Run) -> None:
    text = render(done)
    assert not re.search(r"https?://|//[a-z]+\.|@import|url\((?!#)", text)
    assert "default-src 'none'; style-src 'unsafe-inline'; img-src data:" in html.unescape(text)
    assert "script" not in Page(text).tags


def test_the_page_says_how_the_data_was_read_at_first_and_later(done: Run) -> None:
    texts = " ".join(Page(render(done)).texts)
    assert "images, evaluations included 62,000 62,000" in " ".join(texts.split())
    assert "6.1 GB in 62,000 requests, 31 of them repeated 0 B in 0 requests" in " ".join(texts.split())
    assert "decoding, images per CPU second 626 none" in " ".join(texts.split())


def test_the_page_shows_the_numbers_of_metrics_json(done: Run) -> None:
    metrics, texts = done.metrics(), Page(render(done)).texts
    final = metrics["final"]
    cells = [str(count) for row in final["confusion"] for count in row]
    start = texts.index("tulip", texts.index("What is taken for what"))
    matrix = [text for text in texts[start : texts.index("Most confused")] if text.isdigit()]
    assert matrix == cells
    assert _percent(final["top1"]) in texts
    for row in final["per_class"]:
        place = texts.index(row["label"], texts.index("Classes, worst first"))
        after = [text for text in texts[place : place + 12] if text]
        low, high = wilson(round(row["recall"] * row["support"]), row["support"])
        assert after[1:6] == [
            str(row["support"]), _percent(row["precision"]), _percent(row["f1"]), _percent(row["recall"]),
            f"{_percent(low)} to {_percent(high)}",
        ]  # fmt: skip
    for epoch in metrics["epochs"]:
        assert f"{epoch['train_loss']:.4f}" in texts
        assert f"{epoch['val']['loss']:.4f}" in texts
        assert _percent(epoch["val"]["top1"]) in texts


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def test_classes_come_worst_first(undrawn: Run) -> None:
    text = render(undrawn)
    rows = sorted(undrawn.metrics()["final"]["per_class"], key=lambda row: row["f1"])
    table = text[text.index('id="per-class"') :]
    places = [table.index(f">{row['label']}<") for row in rows]
    assert places == sorted(places)


def test_the_same_run_gives_the_same_bytes(done: Run) -> None:
    assert render(done) == render(done)


def test_a_thousand_classes_give_a_page_that_opens_quickly(tmp_path: Path) -> None:
    run = build(tmp_path, labels=tuple(f"class number {number}" for number in range(1000)), support=20)
    text = render(run)
    assert len(text.encode()) < BYTES_FOR_1000_CLASSES
    assert 'id="matrix"' not in text
    assert 'id="pairs"' in text


@pytest.mark.parametrize(("right", "total", "low", "high"), [
    (81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0000, 0.1611), (1, 29, 0.0061, 0.1718),
    (5, 10, 0.2366, 0.7634), (10, 10, 0.7225, 1.0), (0, 0, 0.0, 1.0),
])  # fmt: skip
def test_the_interval_is_wilsons(right: int, total: int, low: float, high: float) -> None:
    """The first four are those of Newcombe, Statistics in Medicine 17 (1998), table I."""
    assert wilson(right, total) == pytest.approx((low, high), abs=5e-5)


def test_the_report_needs_neither_torch_nor_ray() -> None:
    code = "import trainers.report, trainers.card, sys; print({'torch', 'ray', 'timm'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"


@pytest.mark.parametrize("text", [*HOSTILE[:6], "a\n---\n# b", "[x](javascript:y)", "`a|b`"])
def test_the_model_card_shows_text_of_others_as_it_is(text: str) -> None:
    import yaml

    spec = Spec(data=Data(uri=text))
    card = model_card("run-1", spec, [text, "tulip"], {"split": "val", "count": 9, "top1": 0.5}, {"timm": text})
    _, front, body = card.split("---\n", 2)
    assert yaml.safe_load(front)["library_name"] == "timm"
    assert not re.search(r"(?<!\\)[<`\[]", body)
    assert body.count("\n# ") == 1
    assert "| top-1 | 50.0 % |" in body
