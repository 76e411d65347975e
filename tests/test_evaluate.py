"""Figures of an evaluation against scikit-learn's, and their independence of how samples are shared out."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import accuracy_score, log_loss, precision_recall_fscore_support, top_k_accuracy_score

from trainers.evaluate import Tally


def sample(seed: int, count: int, classes: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    targets = torch.randint(0, classes, (count,), generator=generator)
    logits = torch.randn(count, classes, generator=generator) + 2 * torch.nn.functional.one_hot(targets, classes)
    return logits, targets


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 1000), count=st.integers(1, 200), classes=st.integers(2, 12))
def test_every_figure_equals_scikit_learns(seed: int, count: int, classes: int) -> None:
    logits, targets = sample(seed, count, classes)
    tally = Tally(classes)
    tally.update(logits, targets)
    details = tally.details([str(number) for number in range(classes)])
    guesses, truth, present = logits.argmax(1).numpy(), targets.numpy(), np.unique(targets.numpy())
    assert details["top1"] == pytest.approx(accuracy_score(truth, guesses))
    if classes > 5:
        assert details["top5"] == pytest.approx(
            top_k_accuracy_score(truth, logits.numpy(), k=5, labels=np.arange(classes))
        )
    assert details["loss"] == pytest.approx(
        log_loss(truth, logits.double().softmax(1).numpy(), labels=np.arange(classes)), rel=1e-5
    )
    expected = precision_recall_fscore_support(truth, guesses, labels=np.arange(classes), zero_division=0)
    for key, column in zip(("precision", "recall", "f1", "support"), expected, strict=True):
        assert [row[key] for row in details["per_class"]] == pytest.approx(list(column))
    macro = precision_recall_fscore_support(truth, guesses, labels=present, average="macro", zero_division=0)
    assert [details[f"macro_{key}"] for key in ("precision", "recall", "f1")] == pytest.approx(list(macro[:3]))
    assert np.array(details["confusion"]).sum() == details["count"] == count


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 1000), count=st.integers(1, 100), cuts=st.lists(st.integers(0, 100), max_size=5))
def test_the_figures_do_not_depend_on_how_the_samples_are_cut_into_batches(
    seed: int, count: int, cuts: list[int]
) -> None:
    logits, targets = sample(seed, count, 7)
    whole, parts = Tally(7), Tally(7)
    whole.update(logits, targets)
    places = sorted({0, count, *(cut for cut in cuts if cut < count)})
    for start, end in itertools.pairwise(places):
        parts.update(logits[start:end], targets[start:end])
    assert torch.equal(whole.confusion, parts.confusion)
    assert whole.summary() == pytest.approx(parts.summary(), rel=1e-9)


def test_nothing_evaluated_gives_zeros_and_no_error() -> None:
    assert set(Tally(3).summary().values()) == {0.0}
