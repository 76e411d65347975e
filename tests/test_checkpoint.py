"""A checkpoint counts only when it is whole: cut, changed, incomplete or left by a kill, it is passed over."""

from __future__ import annotations

import json
import multiprocessing
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from launcher.errors import InfrastructureError, SiteError
from launcher.runs import checkpoint_steps
from launcher.storage import Entry, LocalStore, Store, open_store
from trainers.checkpoint import MISSES, Saver, Snapshot, folder, load, load_latest, prune, save


def snapshot(step: int) -> Snapshot:
    generator = torch.Generator().manual_seed(step)
    weights = {"a.weight": torch.randn(3, 4, generator=generator), "count": torch.tensor(step)}
    return Snapshot(step, "print", {"weights": weights, "optimizer": {"a.weight": torch.full((3, 4), step / 7)}},
                    {"epochs": [{"epoch": 1}], "number": 0.1})  # fmt: skip


def same(one: Snapshot | None, other: Snapshot) -> bool:
    if one is None or (one.step, one.fingerprint, one.values) != (other.step, other.fingerprint, other.values):
        return False
    return all(
        torch.equal(one.tensors[name][key], tensor) and one.tensors[name][key].dtype == tensor.dtype
        for name, tensors in other.tensors.items()
        for key, tensor in tensors.items()
    )


def test_what_is_loaded_is_what_was_saved(place: str) -> None:
    store = open_store(place)
    save(store, snapshot(7))
    assert same(load(store, 7), snapshot(7))
    assert checkpoint_steps(store) == [7]


FILES = ("manifest.json", "state.json", "weights.safetensors", "optimizer.safetensors")


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", ["absent", "empty", "cut", "changed"])
def test_a_damaged_checkpoint_is_passed_over_and_named(place: str, name: str, damage: str) -> None:
    store = open_store(place)
    save(store, snapshot(1))
    save(store, snapshot(2))
    key = f"{folder(2)}/{name}"
    data = bytearray(store.read(key))
    if damage == "absent":
        store.delete(key)
    else:
        middle = len(data) // 2
        data[middle] ^= 0x10
        store.write(key, {"empty": b"", "cut": bytes(data[:middle]), "changed": bytes(data)}[damage])
    skipped: list[str] = []
    assert same(load_latest(store, skipped.append), snapshot(1))
    if not (name == "manifest.json" and damage == "absent"):
        assert folder(2) in skipped[0]


def test_without_any_whole_checkpoint_there_is_none(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    assert load_latest(store, print) is None
    save(store, snapshot(1))
    store.write(f"{folder(1)}/weights.safetensors", b"")
    assert load_latest(store, print) is None
    with pytest.raises(SiteError, match="damaged"):
        load(store, 1)


def test_pruning_keeps_the_newest_and_the_best_and_what_is_being_written(place: str) -> None:
    store = open_store(place)
    for step in (1, 2, 3, 4, 5):
        save(store, snapshot(step))
    store.write(f"{folder(6)}/weights.safetensors", b"half")
    prune(store, 2, [2])
    assert checkpoint_steps(store) == [2, 4, 5]
    assert {entry.key.split("/")[1] for entry in store.list("checkpoints/")} == {
        folder(step).removeprefix("checkpoints/") for step in (2, 4, 5, 6)
    }


def test_the_remains_of_a_killed_save_are_cleared_later(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    store.write(f"{folder(1)}/weights.safetensors", b"half")
    save(store, snapshot(2))
    prune(store, 2, [])
    assert {entry.key.split("/")[1] for entry in store.list("checkpoints/")} == {"step-00000002"}


class _Dies(LocalStore):
    """A local store whose process is killed at its n-th write."""

    def __init__(self, root: Path, writes: int) -> None:
        super().__init__(root)
        self.left = writes

    def write(self, key: str, data: bytes) -> None:
        if self.left == 0:
            (self.root / key).parent.mkdir(parents=True, exist_ok=True)
            (self.root / key).write_bytes(data[: len(data) // 2])
            os.kill(os.getpid(), 9)
        self.left -= 1
        super().write(key, data)


def _save_and_die(root: Path, writes: int) -> None:
    save(_Dies(root, writes), snapshot(2))


@pytest.mark.parametrize("writes", range(4))
def test_a_kill_at_any_write_leaves_the_checkpoint_before(tmp_path: Path, writes: int) -> None:
    save(open_store(tmp_path), snapshot(1))
    process = multiprocessing.get_context("spawn").Process(target=_save_and_die, args=(tmp_path, writes))
    process.start()
    process.join()
    assert process.exitcode == -9
    assert same(load_latest(open_store(tmp_path), lambda _: None), snapshot(1))
    save(open_store(tmp_path), snapshot(2))
    assert same(load_latest(open_store(tmp_path), lambda _: None), snapshot(2))


class _Away(LocalStore):
    """A local store that is unreachable for a number of writes."""

    away = 0

    def write(self, key: str, data: bytes) -> None:
        if self.away:
            self.away -= 1
            raise InfrastructureError("S3 answered SlowDown")
        super().write(key, data)


def written(saver: Saver, numbers: Iterator[int]) -> None:
    for number in numbers:
        saver.save(snapshot(number), None)


def test_storage_that_is_away_for_a_while_costs_checkpoints_and_no_more(tmp_path: Path) -> None:
    store, done = _Away(tmp_path), list[int]()
    saver = Saver(store, 2, lambda step, _: done.append(step))
    store.away = MISSES - 1
    written(saver, iter(range(1, 5)))
    saver.finish()
    assert done == [3, 4]


def test_storage_that_stays_away_ends_the_training_with_the_reason(tmp_path: Path) -> None:
    store = _Away(tmp_path)
    saver = Saver(store, 2, lambda *_: None)
    store.away = 1000
    with pytest.raises(InfrastructureError, match="SlowDown"):
        written(saver, iter(range(1, MISSES + 2)))


def test_a_last_checkpoint_that_was_missed_is_written_at_the_end(tmp_path: Path) -> None:
    store, done = _Away(tmp_path), list[int]()
    saver = Saver(store, 2, lambda step, _: done.append(step))
    store.away = 1
    saver.save(snapshot(1), None)
    saver.finish()
    assert done == [1]
    assert same(load_latest(store, print), snapshot(1))


def test_no_pickle_is_written(tmp_path: Path) -> None:
    save(open_store(tmp_path), snapshot(1))
    manifest = json.loads((tmp_path / folder(1) / "manifest.json").read_text())
    assert {Path(name).suffix for name in manifest["files"]} == {".safetensors", ".json"}


def test_entries_are_those_of_the_store(place: str) -> None:
    store: Store = open_store(place)
    save(store, snapshot(3))
    assert all(isinstance(entry, Entry) and entry.size > 0 for entry in store.list("checkpoints/"))
