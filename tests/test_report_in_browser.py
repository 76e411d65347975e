"""The report in a real browser: nothing runs, nothing is loaded, everything fits and can be read."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By

from launcher.runs import Run, Status
from tests.report_run import build
from trainers.report import write

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(
    not (CHROMIUM and DRIVER), reason="no chromium and chromedriver on PATH: apt-get install chromium chromium-driver"
)
HOSTILE = (
    "<script>document.title='owned'</script>", '"><img src=x onerror="document.title=\'owned\'">', "{{7*7}}",
    "</style><svg onload=document.title='owned'>", "javascript:document.title='owned'",
)  # fmt: skip
LONG = tuple(f"a-class-whose-name-is-far-too-long-for-any-table-{number:03d}-" + "x" * 80 for number in range(30))


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[webdriver.Chrome]:
    options = webdriver.ChromeOptions()
    options.binary_location = str(CHROMIUM)
    for argument in (
        "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
        "--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage",
        f"--user-data-dir={tmp_path_factory.mktemp('profile')}",
    ):  # fmt: skip
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(str(DRIVER)))
    yield driver
    driver.quit()


def _open(browser: webdriver.Chrome, run: Run, width: int = 1280, theme: str = "light") -> None:
    features = [{"name": "prefers-color-scheme", "value": theme}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    browser.get(f"file://{write(run)}")


def _console(browser: webdriver.Chrome) -> list[dict[str, str]]:
    """What was written to the console since the last call."""
    return list(browser.get_log("browser"))  # type: ignore[no-untyped-call]


def test_the_scores_are_there_to_see(browser: webdriver.Chrome, tmp_path: Path) -> None:
    run = build(tmp_path)
    _open(browser, run)
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
    _open(browser, build(tmp_path))
    sizes = [curve.size for curve in browser.find_elements(By.TAG_NAME, "svg")]
    assert len(sizes) == 5
    assert all(size["width"] > 250 and size["height"] > 100 for size in sizes)


def test_the_console_stays_empty(browser: webdriver.Chrome, tmp_path: Path) -> None:
    _console(browser)
    _open(browser, build(tmp_path))
    assert _console(browser) == []


def test_nothing_is_loaded_from_anywhere(browser: webdriver.Chrome, tmp_path: Path) -> None:
    _open(browser, build(tmp_path))
    names = browser.execute_script("return performance.getEntriesByType('resource').map(entry => entry.name)")
    assert [name for name in names if not name.startswith("data:")] == []


def test_no_text_of_others_runs(browser: webdriver.Chrome, tmp_path: Path) -> None:
    run = build(tmp_path, labels=HOSTILE, uri=HOSTILE[1], keys="{label}/{number}")
    error = dict.fromkeys(("kind", "family", "what", "where", "hint"), HOSTILE[0])
    run.write_json("state.json", {"status": "FAILED", "error": error})
    _console(browser)
    _open(browser, run)
    assert browser.title == "flowers-1123 – raylaunch"
    assert browser.find_elements(By.TAG_NAME, "script") == []
    assert _console(browser) == []
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
    _open(browser, run, width)
    needed, there = browser.execute_script("const p = document.documentElement; return [p.scrollWidth, p.clientWidth]")
    assert needed <= there
    assert width - 20 <= there <= width  # all but the scroll bar


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_text_stands_out_from_what_is_behind_it(browser: webdriver.Chrome, tmp_path: Path, theme: str) -> None:
    _open(browser, build(tmp_path), theme=theme)
    back = _colour(browser, "html", "background-color")
    assert (_luminance(back) < 0.05) == (theme == "dark")
    for selector in ("body", ".lead", ".pill", ".was", "svg text", "th", "dt", ".tag"):
        colour = _colour(browser, selector, "fill" if selector == "svg text" else "color")
        assert _contrast(colour, back) >= 4.5, selector
    line = _colour(browser, "#curves svg path[style*='--val']", "stroke")
    assert _contrast(line, back) >= 3


def _colour(browser: webdriver.Chrome, selector: str, name: str) -> tuple[float, ...]:
    text = browser.find_element(By.CSS_SELECTOR, selector).value_of_css_property(name)
    return tuple(float(part) for part in text[text.index("(") + 1 : -1].split(",")[:3])


def _luminance(colour: tuple[float, ...]) -> float:
    """Of WCAG 2, as is the contrast."""
    parts = [part / 255 / 12.92 if part <= 10 else ((part / 255 + 0.055) / 1.055) ** 2.4 for part in colour]
    return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2]


def _contrast(one: tuple[float, ...], other: tuple[float, ...]) -> float:
    dark, light = sorted((_luminance(one), _luminance(other)))
    return (light + 0.05) / (dark + 0.05)
