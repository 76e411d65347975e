"""The same run on one rank and on several: the same gradient, the same figures, one decision. Real gloo processes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from launcher.errors import NonFiniteLossError
from launcher.runs import Run
from tests.ranks import results_of
from tests.tiny import new_run
from trainers.driver import Driver
from trainers.evaluate import Tally
from trainers.guards import Control, Team, classify
from trainers.worker import Trainer


def prepared(storage: Path, name: str, **settings: Any) -> Run:
    """A run with its index and first checkpoint, as the driver leaves it to the workers."""
    run = new_run(storage, name, **settings)
    Driver(run).prepare(run.spec())
    return run


def _first_step(team: Team, uri: str) -> dict[str, Any]:
    trainer = Trainer(Run.at(uri), team, 0.0)
    trainer.model.eval()  # with its running statistics fixed, batch norm does not see how the batch is shared
    step = next(trainer.loader.train(0))
    trainer.train_step(step)
    trainer.close()
    return {"weights": {key: value.clone() for key, value in trainer.model.state_dict().items()},
            "rows": torch.cat([batch.rows for batch in step.parts])}  # fmt: skip


def test_a_step_is_the_same_for_any_number_of_ranks_and_parts(tmp_path: Path) -> None:
    alone = results_of(_first_step, 1, prepared(tmp_path, "alone").uri)[0]
    for world, parts in ((1, 4), (2, 3), (3, 1)):
        run = prepared(tmp_path, f"ranks-{world}-{parts}", train__accumulate=parts, resources__workers=world)
        shared = results_of(_first_step, world, run.uri)
        assert torch.equal(torch.cat([result["rows"] for result in shared]), alone["rows"])
        for result in shared:
            for key, tensor in alone["weights"].items():
                assert torch.allclose(result["weights"][key], tensor, rtol=1e-4, atol=1e-6), key


def _evaluated(team: Team, uri: str) -> dict[str, Any]:
    trainer = Trainer(Run.at(uri), team, 0.0)
    # Different statistics on each rank, as training leaves them.
    for buffer in trainer.norm_buffers().values():
        buffer += team.rank
    trainer.average_norms()
    buffers = {key: value.clone() for key, value in trainer.norm_buffers().items()}
    for buffer in trainer.norm_buffers().values():
        buffer -= (team.world - 1) / 2
    details = trainer.evaluate("val").details(trainer.index.classes)
    trainer.close()
    return {"details": details, "buffers": buffers}


def test_evaluation_counts_every_sample_once_for_any_number_of_ranks(tmp_path: Path) -> None:
    alone = results_of(_evaluated, 1, prepared(tmp_path, "alone").uri)[0]["details"]
    assert alone["count"] == 359
    for world in (3,):
        results = results_of(_evaluated, world, prepared(tmp_path, f"ranks-{world}", resources__workers=world).uri)
        for result in results:
            assert result["details"]["confusion"] == alone["confusion"]
            assert result["details"]["loss"] == pytest.approx(alone["loss"], rel=1e-4)
            for key, buffer in result["buffers"].items():
                torch.testing.assert_close(buffer, results[0]["buffers"][key], rtol=0, atol=0)


def _non_finite(team: Team, uri: str) -> list[Any]:
    trainer = Trainer(Run.at(uri), team, 0.0)
    before = {key: value.clone() for key, value in trainer.model.named_parameters()}
    step = next(trainer.loader.train(0))
    poisoned = trainer.to_device
    if team.rank == team.world - 1:

        def to_device(batch: Any) -> tuple[torch.Tensor, torch.Tensor]:
            images, targets = poisoned(batch)
            images[0] = torch.nan
            return images, targets

        trainer.to_device = to_device  # type: ignore[method-assign]
    try:
        trainer.train_step(step)
    except NonFiniteLossError as error:
        same = all(torch.equal(before[key], value) for key, value in trainer.model.named_parameters())
        return [error.what, same, trainer.step]
    finally:
        trainer.close()
    return []


@pytest.mark.parametrize("world", [1, 2])
def test_one_ranks_non_finite_loss_stops_all_before_the_step_and_names_the_sample(tmp_path: Path, world: int) -> None:
    run = prepared(tmp_path, "run", resources__workers=world)
    results = results_of(_non_finite, world, run.uri)
    for what, same, step in results:
        assert same
        assert step == 0
        assert ".png (loss nan)" in what
    assert len({what for what, *_ in results}) == 1


def _agreements(team: Team) -> dict[str, Any]:
    decisions: list[tuple[bool, bool]] = []
    control = Control(team, lambda: team.rank == 0 and len(decisions) >= 1, save_seconds=0.001)
    while not decisions or not decisions[-1][1]:
        decision = control.after_step()
        decisions.append((decision.save, decision.stop))
    mean = torch.tensor([float(team.rank), 1.0])
    team.mean_([mean])
    tally = Tally(3)
    for _ in range(team.rank):  # rank 0 has no sample at all
        tally.update(torch.eye(3), torch.arange(3))
    tally.reduce(team.group)
    return {"decisions": decisions, "ranks": team.gather(team.rank), "mean": mean.tolist(),
            "counted": tally.confusion.diagonal().tolist()}  # fmt: skip


def test_three_ranks_decide_gather_average_and_count_alike() -> None:
    results = results_of(_agreements, 3)
    assert all(result == results[0] for result in results)
    assert results[0]["decisions"][-1][1], "all stopped at the step at which rank 0 wanted to"
    assert results[0]["ranks"] == [0, 1, 2]
    assert results[0]["mean"] == [1.0, 1.0]
    assert results[0]["counted"] == [3, 3, 3]


@pytest.mark.parametrize(
    ("error", "family"),
    [
        (RuntimeError("[gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:1234"), "infrastructure"),
        (torch.OutOfMemoryError("CUDA out of memory"), "site"),
        (MemoryError(), "site"),
        (OSError(28, "No space left on device", "/x"), "site"),
        (ValueError("Expected more than 1 value per channel when training, got input size [1, 8]"), "user"),
        (KeyError("oops"), "bug"),
        (NonFiniteLossError("x"), "data"),
    ],
)
def test_an_error_is_laid_at_the_door_of_who_has_to_act(error: Exception, family: str) -> None:
    assert classify(error).family == family
