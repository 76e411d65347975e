"""SGD, its parameter groups, and the learning rate as a pure function of the step."""

from __future__ import annotations

import math

import torch
from timm.optim import param_groups_weight_decay
from torch import nn

from launcher.spec import Optim


def sgd(model: nn.Module, optim: Optim) -> torch.optim.SGD:
    """SGD over the parameters that learn; norms and biases (all one-dimensional) are not decayed."""
    groups = param_groups_weight_decay(model, optim.weight_decay or 0.0)
    # Fused: one pass over the weights instead of four, which a small batch on a CPU notices.
    return torch.optim.SGD(groups, lr=optim.lr or 0.0, momentum=optim.momentum, nesterov=optim.nesterov, fused=True)


def learning_rate(optim: Optim, step: int, steps_per_epoch: int, epochs: int) -> float:
    """The learning rate of global step `step` (0-based).

    Linear warm-up (Goyal et al. 2017), then a half cosine to 0 (Loshchilov and Hutter 2017), steps, or a constant.
    """
    peak = optim.lr or 0.0
    warmup = (optim.warmup_epochs or 0.0) * steps_per_epoch
    if step < warmup:
        return peak * (step + 1) / (warmup + 1)
    if optim.schedule == "cosine":
        total = epochs * steps_per_epoch
        return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(total - warmup, 1)))
    if optim.schedule == "step":
        return peak * optim.step_gamma ** int(step / steps_per_epoch / optim.step_epochs)
    return peak
