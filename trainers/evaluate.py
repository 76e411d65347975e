"""Exact evaluation: counts over all ranks, each sample once, and the figures that follow from them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from numpy.typing import NDArray


class Tally:
    """Sums over evaluated samples; ranks add theirs up with `reduce`, so the result does not depend on their number.

    The confusion matrix is int64 [classes, classes], rows true, columns predicted.
    """

    def __init__(self, classes: int) -> None:
        self.confusion = torch.zeros(classes, classes, dtype=torch.int64)
        self.top5 = torch.zeros((), dtype=torch.int64)
        self.loss = torch.zeros((), dtype=torch.float64)

    def update(self, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Adds a batch of logits [b, classes] with targets [b]; returns the cross-entropy of each sample [b]."""
        logits = logits.float()
        losses = F.cross_entropy(logits, targets, reduction="none")
        ranked = logits.topk(min(5, logits.shape[1]), dim=1).indices
        classes = self.confusion.shape[0]
        cells = torch.bincount(targets * classes + ranked[:, 0], minlength=classes * classes)
        self.confusion += cells.view(classes, classes).cpu()
        self.top5 += (ranked == targets[:, None]).any(1).sum().cpu()
        self.loss += losses.double().sum().cpu()
        return losses

    def reduce(self, group: dist.ProcessGroup | None) -> None:
        """Makes every rank's sums those of all; without a group there is one rank."""
        if group is not None:
            for sums in (self.confusion, self.top5, self.loss):
                dist.all_reduce(sums, group=group)

    def summary(self) -> dict[str, float]:
        """Loss, top-1, top-5 (shares), and macro precision, recall and F1 over classes that have samples."""
        count = max(int(self.confusion.sum()), 1)
        precision, recall, f1, support = per_class(self.confusion.numpy())
        present = support > 0
        return {
            "loss": float(self.loss) / count,
            "top1": int(self.confusion.diagonal().sum()) / count,
            "top5": int(self.top5) / count,
            "macro_precision": float(precision[present].mean()) if present.any() else 0.0,
            "macro_recall": float(recall[present].mean()) if present.any() else 0.0,
            "macro_f1": float(f1[present].mean()) if present.any() else 0.0,
        }

    def details(self, classes: Sequence[str]) -> dict[str, Any]:
        """`summary`, the sample count, the confusion matrix and one row of figures for each class."""
        columns = zip(classes, *(column.tolist() for column in per_class(self.confusion.numpy())), strict=True)
        return {
            "count": int(self.confusion.sum()),
            **self.summary(),
            "classes": list(classes),
            "per_class": [
                {"label": label, "support": int(support), "precision": precision, "recall": recall, "f1": f1}
                for label, precision, recall, f1, support in columns
            ],
            "confusion": self.confusion.tolist(),
        }


def per_class(confusion: NDArray[np.int64]) -> tuple[NDArray[np.float64], ...]:
    """Precision, recall, F1 and support of each class, float64 [classes]; 0 where a ratio has no denominator."""
    right = np.diag(confusion).astype(np.float64)
    predicted, support = confusion.sum(0).astype(np.float64), confusion.sum(1).astype(np.float64)

    def ratio(part: NDArray[np.float64], whole: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.divide(part, whole, out=np.zeros_like(part), where=whole > 0)

    return ratio(right, predicted), ratio(right, support), ratio(2 * right, predicted + support), support
