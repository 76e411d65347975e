"""Runs a function as the ranks of a real gloo process group, each in a process of its own."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import spawn

from trainers.guards import Team


def _rank(rank: int, world: int, folder: str, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world)
    torch.save(function(Team.join(), *arguments), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def results_of(function: Callable[..., Any], world: int, *arguments: Any) -> list[Any]:
    """What `function(team, *arguments)` returned on each rank, in rank order."""
    if world == 1:
        return [function(Team(), *arguments)]
    with tempfile.TemporaryDirectory() as folder:
        spawn(_rank, args=(world, folder, function, arguments), nprocs=world)  # type: ignore[no-untyped-call]
        return [torch.load(Path(folder) / f"{rank}.pt", weights_only=False) for rank in range(world)]
