"""The page of a sweep holds what its record holds, in every state, and no text of others does harm in it."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import pytest

from launcher.runs import Run, State, Status
from launcher.space import Domain
from launcher.sweeps import Ledger, Outcome, leaderboard
from tests.sweep_run import NAN, build
from tests.test_report import HOSTILE, WRONG, Page, _places, _storable, _with
from trainers import plots
from trainers.report import render, write

BYTES_FOR_500_TRIALS = 3_000_000
TWO = {"top1": "max", "images_per_second": "max"}


@pytest.fixture
def done(tmp_path: Path) -> Run:
    return build(tmp_path)


@pytest.mark.parametrize("status", Status)
@pytest.mark.parametrize("trials", [0, 1, 7])
def test_a_sweep_in_every_state_has_a_page(tmp_path: Path, status: Status, trials: int) -> None:
    run = build(tmp_path, status, done=trials, failed=0)
    page = Page(render(run))
    assert status.value in page.texts
    assert "Report of a sweep" in page.texts
    assert ("svg" in page.tags) == bool(Ledger.load(run).trials)


def test_one_trial_shows_nothing_that_mattered(tmp_path: Path) -> None:
    text = render(build(tmp_path, trials=1, failed=0))
    assert 'id="matters"' not in text
    assert 'id="curves"' in text


def test_the_page_is_stored_in_the_run_directory_of_the_sweep(done: Run) -> None:
    assert write(done) == f"{done.uri}/report.html"
    assert done.store.read("report.html").decode() == render(done)


def test_a_sweep_whose_trials_all_failed_says_why(tmp_path: Path) -> None:
    texts = Page(render(build(tmp_path, trials=3, failed=3))).texts
    assert texts.count(NAN["what"]) == 3
    assert "No trial has ended an epoch, so there is no best one yet." in texts
    assert "launch logs search-1123 --trial 3" in texts


def test_the_leaderboard_is_that_of_the_record(done: Run) -> None:
    ledger, text = Ledger.load(done), render(done)
    table = text[text.index('id="board"') : text.index('id="cost"')]
    rows = re.findall(r"<tr.*?</tr>", table, re.S)[1:]
    assert [int(Page(row).texts[1]) for row in rows] == [row["trial"] for row in leaderboard(ledger)]
    for row, trial in zip(rows, leaderboard(ledger), strict=True):
        texts = Page(row).texts
        assert f"{100 * trial['top1']:.1f} %" in texts
        assert f"{trial['epochs']}/12" in texts
        assert f"{trial['settings']['optim.lr']:.3g}" in texts


def test_the_best_is_told_beside_the_default_settings(done: Run) -> None:
    ledger, texts = Ledger.load(done), Page(render(done)).texts
    best = ledger.ranked()[0]
    value, default = best.best("top1", "max"), ledger.trials[0].best("top1", "max")
    assert value is not None
    assert default is not None
    assert texts[texts.index("search-1123", 5) :].count(f"{100 * value['top1']:.1f} %") >= 1
    points = round(100 * value["top1"], 1) - round(100 * default["top1"], 1)
    assert f"{points:.1f} points better" in texts
    assert any(text.startswith("launch --data s3://bucket/flowers --set") for text in texts)


def test_when_nothing_beats_the_default_settings_the_page_says_so(tmp_path: Path) -> None:
    run = build(tmp_path, trials=1, failed=0)
    assert "No trial beats the default settings." in Page(render(run)).texts


def test_settings_that_changed_on_the_way_are_told(done: Run) -> None:
    ledger = Ledger.load(done)
    best = ledger.ranked()[0]
    best.epochs[3]["settings"] = {"optim.lr": 0.5}
    ledger.save(done)
    texts = Page(render(done)).texts
    assert "from epoch 4 on: optim.lr 0.5" in texts
    assert "Its last settings, as a run by itself" in texts


def test_only_trials_that_have_a_page_are_linked(done: Run) -> None:
    best = Ledger.load(done).best
    links = [value for name, value in Page(render(done)).attributes if name == "href" and "trials" in value]
    assert links == [f"trials/{best:04d}/report.html"]
    assert done.store.read(links[0])


def test_importance_is_left_out_until_it_is_known(done: Run) -> None:
    assert 'id="importance"' in render(done)
    ledger = Ledger.load(done)
    ledger.importance = {}
    ledger.save(done)
    assert 'id="importance"' not in render(done)


def test_several_objectives_show_their_front(tmp_path: Path, done: Run) -> None:
    run = build(tmp_path, name="two", objectives=TWO)
    text = render(run)
    assert text.count("★") == len(Ledger.load(run).front()) + 1
    assert 'class="ln front"' in text
    assert 'id="front"' not in render(done)


def test_a_setting_that_some_trials_lack_is_drawn_for_the_others(done: Run) -> None:
    having = [trial for trial in Ledger.load(done).ranked() if "augment.magnitude" in trial.settings]
    text = render(done)
    assert f"top-1 of {len(having)} trials by augment.magnitude" in text
    figure = text[text.index("trials by augment.magnitude") :]
    assert len(re.findall(r'class="pt', figure[: figure.index("</svg>")])) == len(having)


def test_the_schedule_says_what_stopping_has_saved(done: Run) -> None:
    texts = Page(render(done)).texts
    assert texts[texts.index("Rungs") + 1 :][:3].count("epoch 1, 3, 9") == 1
    assert f"{Ledger.load(done).epochs()}" in texts
    assert "192 epochs" in texts
    plain = Page(render(build(Path(done.storage), name="plain", scheduler="none"))).texts
    assert "nothing: each trial trains to the end" in plain
    assert "Rungs" not in plain


@pytest.mark.parametrize("damage", [b"", b"{", b"[1]", b'"text"', b"\xff\xfe", b"12", b"{}", b"null"])
@pytest.mark.parametrize("key", ["sweep.json", "metrics.json", "plan.json", "state.json", "attempts/0001.json"])
def test_a_damaged_file_costs_its_section_only(done: Run, key: str, damage: bytes) -> None:
    done.store.write(key, damage)
    text = render(done)
    assert "Report of a sweep" in text
    if damage == b"{":
        assert f"{key} is damaged" in text


def test_a_damaged_spec_costs_what_only_it_knows(done: Run) -> None:
    done.store.write("spec.json", b"{")
    text = render(done)
    assert "spec.json is damaged" in text
    assert 'id="board"' in text


@pytest.mark.parametrize("wrong", WRONG, ids=lambda value: repr(value)[:9])
def test_a_wrong_value_anywhere_never_costs_the_page(tmp_path: Path, wrong: Any) -> None:
    run = build(tmp_path, trials=4, epochs=3, objectives=TWO)
    document = run.read_json("sweep.json")
    for place in _places(document, 6):
        run.write_json("sweep.json", _with(document, place, wrong))
        assert "Report of a sweep" in render(run), place


@pytest.mark.parametrize("wrong", WRONG, ids=lambda value: repr(value)[:9])
def test_a_wrong_value_in_every_epoch_never_costs_the_page(done: Run, wrong: Any) -> None:
    document = done.read_json("sweep.json")
    for trial in document["trials"][::2]:
        trial["epochs"] = [dict.fromkeys(epoch, wrong) for epoch in trial["epochs"]]
    done.write_json("sweep.json", document)
    assert "<svg" in render(done)


@pytest.mark.parametrize("text", HOSTILE)
def test_text_of_others_stays_text(tmp_path: Path, text: str) -> None:
    text = _storable(text)
    run = build(tmp_path, uri=text, objectives=TWO)
    spec = run.read_json("spec.json")
    spec["sweep"]["space"] = {"augment.policy": {"choice": [text, "none"], "when": {text: text}}}
    run.write_json("spec.json", spec)
    ledger = Ledger.load(run)
    for trial in ledger.trials:
        trial.settings = {"augment.policy": text, "model.name": text, text: text}
        trial.reason, trial.error = text, trial.error and {"what": text, "hint": text}
    ledger.trials[2].epochs[0]["settings"] = {text: text}
    ledger.importance = {text: 0.5}
    ledger.save(run)
    plan = run.plan()
    plan["pool"], plan["layout"]["currency"] = text, text
    run.write_json("plan.json", plan)
    error = dict.fromkeys(("kind", "family", "what", "where", "hint"), text)
    run.set_state(State(Status.FAILED, reason=text, error=error))
    page, clean = Page(render(run)), Page(render(build(tmp_path, name="clean", objectives=TWO)))
    assert set(page.tags) <= set(clean.tags) | {"dl", "p", "li", "ul"}
    assert not {"script", "iframe", "object", "embed", "form", "img"} & set(page.tags)
    assert not [name for name, _ in page.attributes if name.startswith("on")]
    assert {name for name, _ in page.attributes} <= {name for name, _ in clean.attributes}
    for name, value in page.attributes:
        if name in ("href", "src", "xlink:href"):
            assert re.match(r"#|data:,$|trials/\d+/report\.html$", value), value
    shown = re.sub("[\u202e\x00\ud800]", "\ufffd", text)
    assert " ".join(shown.split()) in page.texts
    assert not re.search("[\u202e\x00\ud800]", render(run))


def test_nothing_is_loaded_and_no_script_may_run(done: Run) -> None:
    text = render(done)
    assert not re.search(r"https?://|//[a-z]+\.|@import|url\((?!#)", text)
    assert "default-src &#39;none&#39;" in text or "default-src 'none'" in text
    assert "script" not in Page(text).tags


def test_the_same_sweep_gives_the_same_bytes(done: Run) -> None:
    assert render(done) == render(done)


def test_five_hundred_trials_give_a_page_that_opens_quickly(tmp_path: Path) -> None:
    run = build(tmp_path, trials=500, epochs=100, objectives=TWO)
    text = render(run)
    assert len(text.encode()) < BYTES_FOR_500_TRIALS
    assert "nan" not in re.sub(r"<title>.*?</title>", "", text[text.index("<svg") : text.rindex("</svg>")])


def test_beyond_what_can_be_told_apart_some_are_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plots, "DRAWN", 10)
    text = render(build(tmp_path, trials=32))
    assert "One in 4 trials is drawn." in Page(text).texts
    figure = text[text.index("trials by optim.lr") :]
    assert 5 < len(re.findall(r'class="pt', figure[: figure.index("</svg>")])) <= 10
    assert 'class="pt e4 best"' in figure


# -- the page of one trial


@pytest.mark.parametrize("outcome", Outcome)
def test_a_trial_has_the_ordinary_page_which_says_whose_trial_it_is(done: Run, outcome: Outcome) -> None:
    ledger = Ledger.load(done)
    ledger.trials[1].outcome = outcome
    ledger.trials[1].error = dict(NAN) if outcome is Outcome.FAILED else None
    ledger.save(done)
    trial = done.trial(2)
    trial.store.delete("metrics.json")  # its curves take longer than all the rest
    assert write(trial) == f"{done.uri}/trials/0002/report.html"
    page = Page(render(trial))
    assert outcome.value in page.texts
    assert "search-1123, trial 2" in page.texts
    assert ("href", "../../report.html") in page.attributes
    assert "launch logs search-1123 --trial 2" in page.texts
    assert (NAN["what"] in page.texts) == (outcome is Outcome.FAILED)
    assert "4,012" in page.texts  # the data is that of the sweep


def test_a_trial_that_was_stopped_says_why(done: Run) -> None:
    stopped = Ledger.load(done).having(Outcome.STOPPED)[0]
    page = Page(render(done.trial(stopped.number)))
    assert stopped.reason in page.texts
    assert "svg" in page.tags


@pytest.mark.parametrize("key", ["../../sweep.json", "spec.json", "metrics.json", "../../plan.json"])
def test_a_trial_has_a_page_also_where_files_are_damaged(done: Run, key: str) -> None:
    path = Path(done.uri, "trials", "0002", key)
    path.write_bytes(b"{")
    assert "optim.lr" in render(done.trial(2)) or key == "../../sweep.json"


def test_a_trial_that_has_left_no_file_has_a_page(done: Run) -> None:
    trial = done.trial(2)
    trial.delete()
    page = Page(render(trial))
    assert "optim.lr" in page.texts
    assert any(text.startswith("launch --data s3://bucket/flowers") for text in page.texts)


# -- scales


@pytest.mark.parametrize(
    ("metric", "values", "ticks"),
    [
        ("top1", [0.1, 0.995], ["0 %", "50 %", "80 %", "90 %", "95 %", "98 %", "99 %", "99.5 %"]),
        ("top1", [0.2, 0.6], ["20 %", "30 %", "40 %", "50 %", "60 %"]),
        ("loss", [0.01, 2.0], ["0.01", "0.1", "1"]),
        ("parameters", [5e6, 5e6], ["4,800,000", "4,900,000", "5,000,000", "5,100,000", "5,200,000"]),
        ("images_per_second", [150.0, 590.0], ["200", "300", "400", "500", "600"]),
    ],
)  # fmt: skip
def test_an_axis_has_round_numbers(metric: str, values: list[float], ticks: list[str]) -> None:
    assert [plots.tick_text(metric, value) for value, _ in plots.metric_scale(metric, values).ticks(7)] == ticks


def test_better_values_lie_higher_and_all_lie_within() -> None:
    values = [0.0, 0.1, 0.5, 0.9, 0.99, 0.999, 1.0]
    places = [plots.metric_scale("top1", values).at(value) for value in values]
    assert places == sorted(places, key=lambda place: place or 0.0)
    assert all(place is not None and 0 <= place <= 1 for place in places)
    assert [plots.metric_scale("loss", [0.1, 2.0]).at(odd) for odd in (math.nan, None, "x", -1.0)] == [None] * 4


def test_a_field_without_a_domain_is_drawn_by_what_was_tried() -> None:
    assert plots.field_scale(None, [1e-5, 1e-2, 1e-1]).kind == "log"
    assert plots.field_scale(None, [1, 2, 3]).kind == "linear"
    assert plots.field_scale(None, [1, "a", None]).names == ("-", "1", "a")
    assert plots.field_scale(None, [3, 3]).kind == "places"
    assert plots.field_scale(Domain.model_validate({"choice": ("a", "b")}), ["c"]).names == ("a", "b", "c")
