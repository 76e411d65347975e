"""`launch sweep --data sample://digits` and nothing else, as a new user types it; its page in a real browser."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from selenium import webdriver
from selenium.webdriver.common.by import By

from launcher.runs import Run
from launcher.sweeps import Ledger, Outcome
from tests.browsing import browser, console, needs_browser, open_page

__all__ = ["browser"]
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]

Launch = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("storage")


@pytest.fixture(scope="module")
def launch(storage: Path) -> Launch:
    def run(*words: str) -> subprocess.CompletedProcess[str]:
        env = os.environ | {"RAYLAUNCH_STORAGE": str(storage), "COLUMNS": "160"}
        return subprocess.run([sys.executable, "-m", "launcher", *words], env=env, capture_output=True, text=True,
                              check=False)  # fmt: skip

    return run


@pytest.fixture(scope="module")
def swept(launch: Launch, storage: Path) -> Run:
    """A sweep with every setting left alone."""
    ended = launch("sweep", "--data", "sample://digits", "--name", "s1")
    assert ended.returncode == 0, ended.stderr
    assert "result    trial " in ended.stderr
    return Run(str(storage), "s1")


def test_sixteen_trials_are_made_and_the_best_is_at_least_what_a_plain_run_comes_to(swept: Run) -> None:
    ledger = Ledger.load(swept)
    assert len(ledger.trials) == 16
    assert {trial.outcome for trial in ledger.trials} == {Outcome.FINISHED, Outcome.STOPPED}
    default = ledger.trials[0]
    assert (default.origin, default.outcome) == ("default", Outcome.FINISHED)
    best = ledger.ranked()[0].values(ledger.objectives)
    plain = default.values(ledger.objectives)
    assert best is not None
    assert plain is not None
    assert best["top1"] >= plain["top1"] > 0.97
    assert ledger.epochs() <= 0.7 * 16 * 12, "bad trials were stopped"


@pytest.mark.usefixtures("swept")
def test_status_trials_logs_and_predict_tell_of_it(launch: Launch) -> None:
    assert "16 of 16 have ended" in launch("status", "s1").stdout
    assert len(launch("trials", "s1", "-o", "csv").stdout.splitlines()) == 17
    assert "epoch 1:" in launch("logs", "s1", "--trial", "7").stdout
    assert "16 trials" in launch("list").stdout
    from trainers.data.sample import materialise

    image = sorted(Path(materialise("digits")).rglob("*.png"))[0]
    said = launch("predict", "s1", str(image)).stdout
    assert image.parent.name in said.split("  ")[1]
    assert launch("resume", "s1").returncode == 2, "nothing is left to do"


@needs_browser
def test_the_page_of_a_real_sweep_shows_the_best_trial_and_nothing_is_amiss(
    swept: Run, browser: webdriver.Chrome
) -> None:
    open_page(browser, swept)
    assert console(browser) == []
    text = browser.find_element(By.TAG_NAME, "body").text
    assert f"trial {Ledger.load(swept).best}" in text
    assert "damaged" not in text
    assert len(browser.find_elements(By.CSS_SELECTOR, "#board tbody tr")) == 16
    link = browser.find_element(By.CSS_SELECTOR, "#board a").get_attribute("href")
    assert link is not None
    browser.get(link)
    assert "Top-1" in browser.find_element(By.TAG_NAME, "body").text
