"""Batches: the same for any number of threads, ranks and restarts; bad images, changed files, full disks."""

from __future__ import annotations

import io
import logging
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from launcher.errors import DataError, SiteError, UserError
from launcher.s3 import forget_s3_client
from launcher.spec import Augment, Data
from launcher.storage import open_store
from trainers.data.decoded import Decoded
from trainers.data.images import NO_REDUCTION
from trainers.data.index import Index, build_index
from trainers.data.loader import Batch, Loader, Step, scan
from trainers.data.recipes import EvalRecipe, TrainRecipe
from trainers.data.source import Source

SIDE = 12
BUDGET = 1 << 28
RECIPE = Augment(crop_scale=(0.5, 1.0), flip=True, erasing=0.5)


def png(label: int, number: int) -> bytes:
    out = io.BytesIO()
    Image.fromarray(np.full((9, 10, 3), (label * 50, number, 7), np.uint8)).save(out, "PNG")
    return out.getvalue()


def images(place: str, classes: int = 3, each: int = 20) -> Index:
    store = open_store(place)
    for label in range(classes):
        for number in range(each):
            store.write(f"class-{label}/{number:02d}.png", png(label, number))
    return build_index(Data(uri=place))


@pytest.fixture
def index(tmp_path: Path) -> Index:
    return images(str(tmp_path / "data"))


def loader(index: Index, cache: Path | None = None, **changes: int | float | str) -> Loader:
    chosen = {"seed": 5, "batch_size": 10, "accumulate": 1, "rank": 0, "world": 1, "threads": 2, **changes}
    return Loader(
        Decoded(Source(index, cache), NO_REDUCTION, cache, 0 if cache is None else BUDGET),
        training=TrainRecipe(RECIPE, SIDE),
        evaluation=EvalRecipe(SIDE, 1.0),
        augment=RECIPE,
        **chosen,  # type: ignore[arg-type]
    )


def same(one: Batch, other: Batch) -> bool:
    return (
        torch.equal(one.images, other.images)
        and torch.equal(one.targets, other.targets)
        and torch.equal(one.rows, other.rows)
    )


def same_steps(one: list[Step], other: list[Step]) -> bool:
    return [(step.number, step.size, len(step.parts)) for step in one] == [
        (step.number, step.size, len(step.parts)) for step in other
    ] and all(same(a, b) for s, t in zip(one, other, strict=True) for a, b in zip(s.parts, t.parts, strict=True))


def together(parts: list[Batch]) -> Batch:
    images, targets, rows = (
        torch.cat([getattr(part, name) for part in parts]) for name in ("images", "targets", "rows")
    )
    return Batch(images, targets, rows)


def rows_of(steps: list[Step]) -> list[int]:
    return [row for step in steps for part in step.parts for row in part.rows.tolist()]


def damage(index: Index, *rows: int) -> Index:
    """Cuts some images short, and indexes the data anew."""
    for row in rows:
        path = Path(index.uri, index.key(row))
        path.write_bytes(path.read_bytes()[:40])
    return build_index(Data(uri=index.uri))


# -- batches


def test_batches_have_the_promised_shape(index: Index) -> None:
    steps = list(loader(index, accumulate=3).train(0))
    assert [step.number for step in steps] == list(range(5))
    assert [step.size for step in steps] == [10, 10, 10, 9, 9]
    assert [[len(part.rows) for part in step.parts] for step in steps] == [[4, 3, 3]] * 3 + [[3, 3, 3]] * 2
    part = steps[0].parts[0]
    assert (part.images.shape, part.images.dtype) == ((4, 3, SIDE, SIDE), torch.uint8)
    assert part.images.is_contiguous(memory_format=torch.channels_last)
    assert (part.targets.dtype, part.rows.dtype) == (torch.int64, torch.int64)
    assert part.targets.tolist() == index.targets[part.rows.numpy()].tolist()
    # The colour of an image says which class and number it is.
    assert all((batch.images[:, 2] == 7).any() for step in steps for batch in step.parts)


@pytest.mark.parametrize("world", [1, 2, 3, 7])
@pytest.mark.parametrize("accumulate", [1, 4])
def test_each_training_image_is_used_once_an_epoch(index: Index, world: int, accumulate: int) -> None:
    ranks = [list(loader(index, rank=rank, world=world, accumulate=accumulate).train(2)) for rank in range(world)]
    assert sorted(row for steps in ranks for row in rows_of(steps)) == index.rows("train").tolist()
    assert all(len(part.rows) for steps in ranks for step in steps for part in step.parts)


def test_ranks_together_see_the_batches_of_one(index: Index) -> None:
    alone = list(loader(index).train(1))
    ranks = [list(loader(index, rank=rank, world=3, accumulate=2).train(1)) for rank in range(3)]
    for number, step in enumerate(alone):
        parts = [part for steps in ranks for part in steps[number].parts]
        joined = together(parts)
        assert same(joined, step.parts[0])


def test_a_resumed_epoch_yields_the_same_remaining_batches(index: Index) -> None:
    whole = list(loader(index).train(3))
    for first in range(len(whole) + 1):
        assert same_steps(list(loader(index).train(3, first)), whole[first:])


def test_threads_do_not_change_the_batches(index: Index) -> None:
    runs = [list(loader(index, threads=threads, batch_size=7).train(0)) for threads in (1, 2, 16)]
    assert same_steps(runs[0], runs[1])
    assert same_steps(runs[0], runs[2])


def test_a_batch_stays_as_it_is_for_as_long_as_any_part_of_it_is_held(index: Index) -> None:
    reader = loader(index)
    whole = [(step.parts[0].images, step.parts[0].images.clone()) for step in reader.train(0)]
    parts = [(step.parts[0].images[1, :, 2:5], step.parts[0].images[1, :, 2:5].clone()) for step in reader.train(1)]
    for _ in reader.train(2):
        pass
    assert all(torch.equal(held, copy) for held, copy in whole + parts)


def test_epochs_and_seeds_differ(index: Index) -> None:
    orders = [rows_of(list(loader(index, seed=seed).train(epoch))) for seed in (0, 1) for epoch in (0, 1)]
    assert len({tuple(order) for order in orders}) == 4


@pytest.mark.parametrize("world", [1, 2, 5, 13])
def test_evaluation_sees_each_image_once_and_in_order(index: Index, world: int) -> None:
    seen = []
    for rank in range(world):
        batches = list(loader(index, rank=rank, world=world).evaluate("val", 4))
        rows = [row for batch in batches for row in batch.rows.tolist()]
        assert rows == index.rows("val")[rank::world].tolist()
        assert all(0 < len(batch.rows) <= 4 for batch in batches)
        assert all(batch.targets.tolist() == index.targets[batch.rows.numpy()].tolist() for batch in batches)
        assert all((batch.images[:, 0] == batch.targets[:, None, None] * 50).all() for batch in batches)
        seen += rows
    assert sorted(seen) == index.rows("val").tolist()


def test_a_split_without_images_has_no_batches(index: Index) -> None:
    assert list(loader(index).evaluate("test", 4)) == []


def test_closing_early_leaves_no_thread(index: Index) -> None:
    steps = loader(index, threads=4, batch_size=2).train(0)
    next(steps)
    assert any(thread.name.startswith("loader") for thread in threading.enumerate())
    steps.close()  # type: ignore[attr-defined]
    assert not any(thread.name.startswith("loader") for thread in threading.enumerate())


# -- bad images


def test_a_bad_image_is_replaced_by_the_next_good_one(index: Index) -> None:
    train = index.rows("train").tolist()
    broken = damage(index, train[4], train[5], train[-1])
    steps = list(loader(broken, max_bad_fraction=0.1).train(0))
    expected = [{train[4]: train[6], train[5]: train[6], train[-1]: train[0]}.get(row, row)
                for row in rows_of(list(loader(broken, max_bad_fraction=0.1).train(0)))]  # fmt: skip
    assert rows_of(steps) == expected
    assert sorted(rows_of(steps)) == sorted([*train[:4], train[6], train[6], *train[6:-1], train[0]])
    assert all(part.targets.tolist() == index.targets[part.rows.numpy()].tolist() for s in steps for part in s.parts)


def test_a_replacement_is_no_twin(index: Index) -> None:
    train = index.rows("train").tolist()
    broken = damage(index, train[4])
    chances = [
        key
        for step in loader(broken, max_bad_fraction=0.1).train(0)
        for part in step.parts
        if part.changes
        for row, key in zip(part.rows.tolist(), part.changes.keys, strict=True)
        if row == train[5]
    ]
    assert len(set(chances)) == 2


def test_resume_is_exact_with_bad_images_too(index: Index) -> None:
    broken = damage(index, *index.rows("train")[[3, 4, 20, 31]].tolist())
    whole = list(loader(broken, max_bad_fraction=0.5).train(0))
    assert same_steps(list(loader(broken, max_bad_fraction=0.5, threads=7).train(0, 2)), whole[2:])


@settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    sampling=st.sampled_from(["uniform", "balanced"]), seed=st.integers(0, 2**32 - 1), epoch=st.integers(0, 2),
    batch=st.integers(1, 20), accumulate=st.integers(1, 3), before=st.sampled_from([1, 2, 3, 8]),
    after=st.sampled_from([1, 2, 3, 8]), stop=st.floats(0, 1),
)  # fmt: skip
def test_another_number_of_ranks_goes_on_with_the_same_batches(
    index: Index,
    sampling: str,
    seed: int,
    epoch: int,
    batch: int,
    accumulate: int,
    before: int,
    after: int,
    stop: float,
) -> None:
    common: dict[str, Any] = {"seed": seed, "batch_size": batch, "accumulate": accumulate}
    alone = list(loader(index, sampling=sampling, **common).train(epoch))
    first = round(stop * len(alone))

    def seen(world: int, start: int, end: int) -> list[Batch]:
        ranks = [
            list(loader(index, sampling=sampling, rank=rank, world=world, **common).train(epoch, start))[: end - start]
            for rank in range(world)
        ]
        return [together([part for steps in ranks for part in steps[at].parts]) for at in range(end - start)]

    joined = [*seen(before, 0, first), *seen(after, first, len(alone))]
    assert all(same(found, together(step.parts)) for found, step in zip(joined, alone, strict=True))
    if sampling == "uniform":
        assert sorted(row for found in joined for row in found.rows.tolist()) == index.rows("train").tolist()


def test_balanced_sampling_draws_each_class_as_often(tmp_path: Path) -> None:
    data = images(str(tmp_path / "data"), classes=2, each=40)
    for path in sorted((tmp_path / "data" / "class-1").iterdir())[4:]:
        path.unlink()
    data = build_index(Data(uri=data.uri))
    drawn = np.bincount(data.targets[rows_of(list(loader(data, sampling="balanced").train(1)))])
    assert abs(int(drawn[0]) - int(drawn[1])) <= 2


def test_weights_that_are_not_there_are_asked_for(index: Index) -> None:
    with pytest.raises(UserError, match="no weights"):
        loader(index, sampling="weighted")


def test_a_sample_drawn_twice_is_cropped_and_changed_anew(tmp_path: Path) -> None:
    data = images(str(tmp_path / "data"), classes=2, each=40)
    for path in sorted((tmp_path / "data" / "class-1").iterdir())[4:]:
        path.unlink()
    data = build_index(Data(uri=data.uri))
    keys: dict[int, list[int]] = {}
    for step in loader(data, sampling="balanced").train(0):
        for part in step.parts:
            assert part.changes is not None
            for row, key in zip(part.rows.tolist(), part.changes.keys.tolist(), strict=True):
                keys.setdefault(row, []).append(key)
    assert max(len(found) for found in keys.values()) > 3
    assert all(len(found) == len(set(found)) for found in keys.values())


def test_evaluation_leaves_bad_images_out(index: Index) -> None:
    val = index.rows("val").tolist()
    broken = damage(index, val[0], *val[4:8])
    reader = loader(broken, max_bad_fraction=0.5)
    assert [batch.rows.tolist() for batch in reader.evaluate("val", 4)] == [val[1:4], val[8:]]
    assert sorted(reader.bad) == sorted(index.key(row) for row in (val[0], *val[4:8]))
    assert all(reader.bad.values())


def test_too_many_bad_images_end_the_run_and_are_named(index: Index) -> None:
    broken = damage(index, *index.rows("train")[:4].tolist())
    reader = loader(broken, max_bad_fraction=0.05)
    with pytest.raises(DataError, match="too many images cannot be read, 4 so far") as raised:
        list(reader.train(0))
    assert "class-0/" in raised.value.what
    assert len(list(loader(broken, max_bad_fraction=0.07).train(0))) == 5


def test_without_a_readable_training_image_the_run_ends(index: Index) -> None:
    broken = damage(index, *index.rows("train").tolist())
    with pytest.raises(DataError, match="no training image can be read"):
        list(loader(broken, max_bad_fraction=0.99).train(0))


def test_a_scan_names_all_bad_images(index: Index) -> None:
    rows = [*index.rows("train")[[1, 30]].tolist(), int(index.rows("val")[2])]
    broken = damage(index, *rows)
    found = scan(Source(broken))
    assert list(found) == [index.key(row) for row in sorted(rows)]
    assert all(found.values())


def test_a_file_that_changed_or_went_ends_the_run_at_once(index: Index) -> None:
    path = Path(index.uri, index.key(int(index.rows("train")[0])))
    path.write_bytes(png(1, 1) + b" ")
    with pytest.raises(DataError, match="changed"):
        list(loader(index).train(0))
    path.unlink()
    with pytest.raises(DataError, match="gone") as raised:
        list(loader(index).train(0))
    assert raised.value.where == str(path)
    assert not any(thread.name.startswith("loader") for thread in threading.enumerate())


# -- the cache


@pytest.fixture
def gets(bucket: str) -> Iterator[list[str]]:
    """Keys of the objects that are downloaded, as the server sees it."""
    found: list[str] = []

    class Lines(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            line = re.search(rf"GET /{bucket.removeprefix('s3://')}/([^? ]+)", record.getMessage())
            if line:
                found.append(line[1])

    log, handler = logging.getLogger("werkzeug"), Lines()
    level, log.propagate = log.level, False
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    yield found
    log.removeHandler(handler)
    log.setLevel(level)
    log.propagate = True


def test_each_object_is_fetched_once_per_node(bucket: str, gets: list[str], tmp_path: Path) -> None:
    index = images(f"{bucket}/data", each=6)
    ranks = [loader(index, tmp_path, rank=rank, world=2, threads=4) for rank in range(2)]
    for epoch in range(2):
        for rank in ranks:
            list(rank.train(epoch))
            list(rank.evaluate("val", 4))
    assert sorted(gets) == sorted(f"data/{key}" for key in index.table["key"].to_pylist())


@pytest.mark.slow
def test_four_trials_of_two_workers_fetch_each_object_once(bucket: str, gets: list[str], tmp_path: Path) -> None:
    index = images(f"{bucket}/data", each=30)
    trials = [
        subprocess.Popen([sys.executable, "-m", "tests.reading_trial", index.uri, str(tmp_path), str(seed)],
                         stdout=subprocess.PIPE, text=True)
        for seed in (1, 1, 2, 3)
    ]  # fmt: skip
    seen = [trial.communicate(timeout=300)[0].split() for trial in trials]
    assert [trial.returncode for trial in trials] == [0] * 4
    assert seen[0] == seen[1]
    assert len({*map(tuple, seen)}) == 3
    assert sorted(gets) == sorted(f"data/{key}" for key in index.table["key"].to_pylist())


def test_many_readers_of_one_object_fetch_it_once(bucket: str, gets: list[str], tmp_path: Path) -> None:
    index = images(bucket, each=2)
    sources = [Source(index, tmp_path) for _ in range(8)]
    barrier, found = threading.Barrier(8), []

    def read(source: Source) -> None:
        barrier.wait()
        found.append([source.read(row) for row in range(index.table.num_rows)])

    threads = [threading.Thread(target=read, args=[source]) for source in sources]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [[png(label, number) for label in range(3) for number in range(2)]] * 8
    assert len(gets) == 6


def test_s3_and_disk_give_the_same_batches(bucket: str, tmp_path: Path) -> None:
    remote, local = images(bucket, each=6), images(str(tmp_path / "data"), each=6)
    assert same_steps(list(loader(remote, tmp_path / "cache").train(0)), list(loader(local).train(0)))


def test_a_damaged_cache_is_mended(bucket: str, gets: list[str], tmp_path: Path) -> None:
    index = images(bucket, each=2)
    data = bytes(Source(index, tmp_path).read(0))
    (cached,) = tmp_path.rglob("*.dat")
    with open(cached, "r+b") as file:
        file.write(b"junk")
    assert Source(index, tmp_path).read(0) == data
    assert len(gets) == 2
    assert Source(index, tmp_path).read(0) == data
    assert len(gets) == 2


def test_an_object_that_changed_is_not_mixed_in(bucket: str, tmp_path: Path) -> None:
    index = images(bucket, each=3)
    Source(index, tmp_path / "cache").read(0)
    open_store(bucket).write(index.key(0), png(2, 99))
    with pytest.raises(DataError, match="changed"):
        Source(index, tmp_path / "other").read(0)
    open_store(bucket).delete(index.key(1))
    with pytest.raises(DataError, match="gone"):
        Source(index, tmp_path / "other").read(1)
    assert not [path for path in (tmp_path / "other").rglob("*.idx") if path.stat().st_size]
    # A new index reads the new bytes, whatever the cache holds of the old ones.
    assert Source(build_index(Data(uri=bucket)), tmp_path / "cache").read(0) == png(2, 99)


def test_keys_cannot_leave_the_cache(bucket: str, tmp_path: Path) -> None:
    store, cache = open_store(bucket), tmp_path / "cache"
    keys = ["a/x..%2f..%2fx.png", "a/x\\..\\y.png", f"a/{'long' * 60}.png", "b/ü.png", "b/u\u0308.png"]
    for key in keys:
        store.write(key, png(1, 1))
    index = build_index(Data(uri=bucket))
    for row in range(len(keys)):
        assert Source(index, cache).read(row) == png(1, 1)
    assert os.listdir(tmp_path) == ["cache"]


def test_a_full_or_unusable_cache_never_stops_a_run(bucket: str, tmp_path: Path) -> None:
    index = images(bucket, each=2)
    (tmp_path / "file").write_text("")
    assert Source(index, tmp_path / "file").read(0) == png(0, 0)
    small = tmp_path / "small"
    small.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=4k", "tmpfs", str(small)]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("a file system can be mounted by root only")
    try:
        (small / "ballast").write_bytes(bytes(4096))
        source = Source(index, small)
        assert [source.read(row) for row in (0, 1, 0)] == [png(0, 0), png(0, 1), png(0, 0)]
        assert [path.name for path in small.rglob("*") if path.is_file()] == ["ballast"]
    finally:
        subprocess.run(["umount", str(small)], check=True)


def test_trouble_with_credentials_surfaces_from_the_threads(
    bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    index = images(bucket, each=2)
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    forget_s3_client()
    with pytest.raises(SiteError, match="refuses access"):
        list(loader(index, tmp_path).train(0))


def test_the_cache_is_where_the_environment_says(bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    index = images(bucket, each=2)
    monkeypatch.setenv("RAYLAUNCH_CACHE", str(tmp_path))
    Source(index).read(0)
    assert len(list(tmp_path.rglob("*.dat"))) == 1
