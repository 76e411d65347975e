"""The page of a sweep in a real browser: nothing runs, nothing is loaded, everything fits and can be read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from selenium import webdriver
from selenium.webdriver.common.by import By

from launcher.runs import Run, Status
from launcher.sweeps import Ledger, leaderboard
from tests.browsing import browser, colour, console, contrast, luminance, needs_browser, open_page
from tests.sweep_run import build
from tests.test_report_in_browser import HOSTILE, LONG

__all__ = ["browser"]
pytestmark = needs_browser
TWO = {"top1": "max", "images_per_second": "max"}


def _with_text(run: Run, text: str) -> Run:
    """The same sweep, with a text of others wherever one can stand."""
    ledger = Ledger.load(run)
    for trial in ledger.trials:
        trial.settings = {**trial.settings, "augment.policy": text, text: text}
        trial.reason, trial.error = text, trial.error and {"what": text, "hint": text}
    ledger.importance = {text: 0.5}
    ledger.save(run)
    error = dict.fromkeys(("kind", "family", "what", "where", "hint"), text)
    run.write_json("state.json", {"status": "FAILED", "reason": text, "error": error})
    return run


def test_the_leaderboard_is_there_to_see_and_leads_to_the_best_trial(browser: webdriver.Chrome, tmp_path: Path) -> None:
    run = build(tmp_path)
    open_page(browser, run)
    rows = browser.find_elements(By.CSS_SELECTOR, "#board tbody tr")
    numbers = [int(row.find_elements(By.TAG_NAME, "td")[1].text) for row in rows]
    assert numbers == [row["trial"] for row in leaderboard(Ledger.load(run))]
    assert rows[0].is_displayed()
    link = browser.find_element(By.CSS_SELECTOR, "#board a")
    assert link.get_attribute("href") == f"file://{run.uri}/trials/{numbers[0]:04d}/report.html"


def test_the_drawings_have_a_size_and_lie_within_their_frames(browser: webdriver.Chrome, tmp_path: Path) -> None:
    open_page(browser, build(tmp_path, trials=40, objectives=TWO))
    drawings = browser.find_elements(By.TAG_NAME, "svg")
    assert len(drawings) == 5 + 1 + 1 + 1
    assert all(drawing.size["width"] > 250 and drawing.size["height"] > 150 for drawing in drawings)
    outside = browser.execute_script("""
        return [...document.querySelectorAll('svg')].flatMap(svg => {
            const frame = svg.getBoundingClientRect();
            return [...svg.querySelectorAll('text, .pt, .ln')].filter(mark => {
                const box = mark.getBoundingClientRect();
                return box.left < frame.left - 3 || box.right > frame.right + 3
                    || box.top < frame.top - 3 || box.bottom > frame.bottom + 3;
            }).map(mark => mark.outerHTML);
        });
    """)
    assert outside == []


def test_nothing_is_loaded_and_the_console_stays_empty(browser: webdriver.Chrome, tmp_path: Path) -> None:
    console(browser)
    open_page(browser, build(tmp_path, objectives=TWO))
    names = browser.execute_script("return performance.getEntriesByType('resource').map(entry => entry.name)")
    assert [name for name in names if not name.startswith("data:")] == []
    assert console(browser) == []


@pytest.mark.parametrize("text", HOSTILE)
def test_no_text_of_others_runs(browser: webdriver.Chrome, tmp_path: Path, text: str) -> None:
    console(browser)
    open_page(browser, _with_text(build(tmp_path, uri=text, objectives=TWO), text))
    assert browser.title == "search-1123 – raylaunch"
    assert browser.find_elements(By.TAG_NAME, "script") == []
    assert console(browser) == []
    assert browser.find_element(By.CSS_SELECTOR, "#importance code").text == text


@pytest.mark.parametrize(
    ("case", "width"),
    [("usual", 390), ("usual", 800), ("usual", 1280), ("long", 390), ("long", 1280), ("pending", 390), ("failed", 390)],
)
def test_nothing_sticks_out_sideways(browser: webdriver.Chrome, tmp_path: Path, width: int, case: str) -> None:
    made: dict[str, Any] = {
        "usual": lambda: build(tmp_path, objectives=TWO),
        "long": lambda: _with_text(build(tmp_path, uri=f"s3://{LONG[0]}"), LONG[0]),
        "pending": lambda: build(tmp_path, Status.PENDING),
        "failed": lambda: build(tmp_path, trials=3, failed=3),
    }
    open_page(browser, made[case](), width)
    needed, there = browser.execute_script("const p = document.documentElement; return [p.scrollWidth, p.clientWidth]")
    assert needed <= there
    assert width - 20 <= there <= width  # all but the scroll bar


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_what_is_drawn_and_written_stands_out(browser: webdriver.Chrome, tmp_path: Path, theme: str) -> None:
    open_page(browser, build(tmp_path, objectives=TWO), theme=theme)
    back = colour(browser, "html", "background-color")
    assert (luminance(back) < 0.05) == (theme == "dark")
    for selector in ("body", ".lead", ".pill", "th", "dt", ".outcome.STOPPED", ".outcome.FAILED", ".keys"):
        assert contrast(colour(browser, selector, "color"), back) >= 4.5, selector
    assert contrast(colour(browser, "svg text", "fill"), back) >= 4.5
    for selector, name in ((".pt.e0", "stroke"), (".pt.best", "fill"), (".pt.default", "fill"), (".ln.best", "stroke")):
        assert contrast(colour(browser, selector, name), back) >= 3, selector
