"""The report in a real browser: nothing runs, nothing is loaded, everything fits and can be read."""

from __future__ import annotations

from pathlib import Path

import pytest
from selenium import webdriver
from selenium.webdriver.common.by import By

from launcher.runs import Status
from tests.browsing import browser, colour, console, contrast, luminance, needs_browser, open_page
from tests.report_run import build

__all__ = ["browser"]
pytestmark = needs_browser
HOSTILE = (
    "<script>document.title='owned'</script>", '"><img src=x onerror="document.title=\'owned\'">', "{{7*7}}",
    "</style><svg onload=document.title='owned'>", "javascript:document.title='owned'",
)  # fmt: skip
LONG = tuple(f"a-class-whose-name-is-far-too-long-for-any-table-{number:03d}-" + "x" * 80 for number in range(30))


def test_the_scores_are_there_to_see(browser: webdriver.Chrome, tmp_path: Path) -> None:
    run = build(tmp_path)
    open_page(browser, run)
    final = run.metrics()["final"]
    number = browser.find_element(By.CSS_SELECTOR, "#headline .number")
    assert number.is_displayed()
    assert number.text == f"{100 * final['top1']:.1f} %"
    rows = browser.find_elements(By.CSS_SELECTOR, "#matrix tbody tr")
    shown = [[cell.get_attribute("textContent") for cell in row.find_elements(By.TAG_NAME, "td")] for row in rows]
    assert shown == [[str(count) for count in row] for row in final["confusion"]]
    assert browser.find_element(By.CSS_SELECTOR, "#matrix td.d").is_displayed()
    assert browser.execute_script("return [...document.images].map(image => image.naturalWidth)") == [96] * 24


def test_the_curves_have_a_size(browser: webdriver.Chrome, tmp_path: Path) -> None:
    open_page(browser, build(tmp_path))
    sizes = [curve.size for curve in browser.find_elements(By.TAG_NAME, "svg")]
    assert len(sizes) == 5
    assert all(size["width"] > 250 and size["height"] > 100 for size in sizes)


def test_the_console_stays_empty(browser: webdriver.Chrome, tmp_path: Path) -> None:
    console(browser)
    open_page(browser, build(tmp_path))
    assert console(browser) == []


def test_nothing_is_loaded_from_anywhere(browser: webdriver.Chrome, tmp_path: Path) -> None:
    open_page(browser, build(tmp_path))
    names = browser.execute_script("return performance.getEntriesByType('resource').map(entry => entry.name)")
    assert [name for name in names if not name.startswith("data:")] == []


def test_no_text_of_others_runs(browser: webdriver.Chrome, tmp_path: Path) -> None:
    run = build(tmp_path, labels=HOSTILE, uri=HOSTILE[1], keys="{label}/{number}")
    error = dict.fromkeys(("kind", "family", "what", "where", "hint"), HOSTILE[0])
    run.write_json("state.json", {"status": "FAILED", "error": error})
    console(browser)
    open_page(browser, run)
    assert browser.title == "flowers-1123 – raylaunch"
    assert browser.find_elements(By.TAG_NAME, "script") == []
    assert console(browser) == []
    headers = [header.get_attribute("title") for header in browser.find_elements(By.CSS_SELECTOR, "#matrix tbody th")]
    assert headers == list(HOSTILE)


@pytest.mark.parametrize("width", [390, 800, 1280])
@pytest.mark.parametrize("case", ["usual", "long", "failed", "pending"])
def test_nothing_sticks_out_sideways(browser: webdriver.Chrome, tmp_path: Path, width: int, case: str) -> None:
    error = {"kind": "BugError", "family": "bug", "what": LONG[0] * 3, "where": LONG[0], "hint": LONG[0]}
    run = {
        "usual": lambda: build(tmp_path),
        "long": lambda: build(tmp_path, labels=LONG, uri=f"s3://{LONG[0]}", keys="{label}/{label}/{number}"),
        "failed": lambda: build(tmp_path, Status.FAILED, done=0, error=error),
        "pending": lambda: build(tmp_path, Status.PENDING),
    }[case]()
    open_page(browser, run, width)
    needed, there = browser.execute_script("const p = document.documentElement; return [p.scrollWidth, p.clientWidth]")
    assert needed <= there
    assert width - 20 <= there <= width  # all but the scroll bar


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_text_stands_out_from_what_is_behind_it(browser: webdriver.Chrome, tmp_path: Path, theme: str) -> None:
    open_page(browser, build(tmp_path), theme=theme)
    back = colour(browser, "html", "background-color")
    assert (luminance(back) < 0.05) == (theme == "dark")
    for selector in ("body", ".lead", ".pill", ".was", "svg text", "th", "dt", ".tag"):
        text = colour(browser, selector, "fill" if selector == "svg text" else "color")
        assert contrast(text, back) >= 4.5, selector
    line = colour(browser, "#curves svg path[style*='--val']", "stroke")
    assert contrast(line, back) >= 3
