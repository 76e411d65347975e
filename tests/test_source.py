"""Image files from every layout through the node's cache: the right bytes, few requests, one fetcher."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from launcher.spec import Data
from launcher.storage import open_store
from trainers.data import source as module
from trainers.data.index import Index, build_index
from trainers.data.source import Source

COUNT = 40


def picture(number: int) -> bytes:
    """Not an image: a source does not look."""
    return np.random.default_rng(number).bytes(200 + 37 * number)


def objects(place: str) -> None:
    store = open_store(place)
    for number in range(COUNT):
        store.write(f"class-{number % 2}/{number:02d}.png", picture(number))


def shards(place: str) -> None:
    store = open_store(place)
    for shard in range(2):
        out = io.BytesIO()
        with tarfile.open(fileobj=out, mode="w") as tar:
            for number in range(shard, COUNT, 2):
                for name, data in ((f"{number:02d}.png", picture(number)), (f"{number:02d}.cls", b"%d" % (number % 3))):
                    about = tarfile.TarInfo(name)
                    about.size = len(data)
                    tar.addfile(about, io.BytesIO(data))
        store.write(f"part-{shard}.tar", out.getvalue())


def parquet(place: str) -> None:
    out = io.BytesIO()
    rows = [{"bytes": picture(number), "path": None} for number in range(COUNT)]
    table = pa.table({"image": rows, "label": [number % 3 for number in range(COUNT)]})
    pq.write_table(table, out, row_group_size=7)
    open_store(place).write("train-00000-of-00001.parquet", out.getvalue())


LAYOUTS = {"objects": objects, "shards": shards, "parquet": parquet}


@pytest.fixture(params=list(LAYOUTS))
def layout(request: pytest.FixtureRequest) -> Callable[[str], None]:
    return LAYOUTS[request.param]


def number_of(index: Index, row: int) -> int:
    digits = index.key(row).rpartition("/")[2].partition(".")[0]
    return int(digits)


def files(source: Source, rows: list[int]) -> list[bytes]:
    return [bytes(source.read(row)) for row in rows]


def test_every_layout_yields_its_files_wherever_it_is(
    layout: Callable[[str], None], place: str, tmp_path: Path
) -> None:
    layout(place)
    index = build_index(Data(uri=place))
    rows = list(range(COUNT))
    expected = [picture(number_of(index, row)) for row in rows]
    for budget in (None, 0):
        source = Source(index, tmp_path / "cache", budget)
        groups = np.array_split(np.array(rows), 6)
        found = [data for group in source.ahead(groups, lambda group: group) for data in files(source, group.tolist())]
        assert found == expected
        assert files(source, rows[::-1]) == expected[::-1]
        source.close()


def test_a_shared_object_comes_in_few_requests_and_only_once(
    bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "CHUNK", 8000)
    shards(bucket)
    index = build_index(Data(uri=bucket))
    assert index.table.num_rows == COUNT
    first, second = Source(index, tmp_path), Source(index, tmp_path)
    # One row of each part is asked for.
    asked = np.unique(first.chunks, return_index=True)[1] if first.chunks is not None else np.empty(0, np.int64)
    for source in (first, second):
        groups = np.array_split(asked, 3)
        for group in source.ahead(groups, lambda group: group):
            files(source, group.tolist())
    seen = first.counts.so_far()
    assert seen["requests"] == len(asked) < COUNT / 2
    assert seen["bytes"] < sum(entry.size for entry in open_store(bucket).list())
    # What was fetched with them is there as well, for this source and for others.
    files(second, list(range(COUNT)))
    assert second.counts.so_far()["requests"] == 0


def test_without_room_only_what_is_needed_is_fetched(bucket: str, tmp_path: Path) -> None:
    shards(bucket)
    index = build_index(Data(uri=bucket))
    source = Source(index, tmp_path, budget=0)
    wanted = np.array([3, 11, 29])
    for group in source.ahead([wanted], lambda group: group):
        assert files(source, group.tolist()) == [picture(number_of(index, row)) for row in group.tolist()]
    assert source.counts.so_far()["bytes"] == index.table["size"].to_numpy()[wanted].sum()


def test_what_is_on_its_way_when_the_last_group_is_drawn_is_not_asked_for_again(bucket: str, tmp_path: Path) -> None:
    objects(bucket)
    source = Source(build_index(Data(uri=bucket)), tmp_path, budget=0)
    rows = np.arange(COUNT)
    for _ in range(2):
        drawn = list(source.ahead(np.array_split(rows, 5), lambda group: group))
        assert len(files(source, np.concatenate(drawn).tolist())) == COUNT
    seen = source.counts.so_far()
    assert (seen["requests"], seen["files_held"]) == (2 * COUNT, 0)


def test_closing_what_is_ahead_leaves_a_source_that_reads(bucket: str, tmp_path: Path) -> None:
    objects(bucket)
    index = build_index(Data(uri=bucket))
    source = Source(index, tmp_path)
    ahead = source.ahead([np.arange(COUNT)] * 3, lambda group: group)
    next(ahead)
    ahead.close()
    assert files(source, [5]) == [picture(number_of(index, 5))]
    assert not source._flights


@settings(max_examples=30, deadline=None)
@given(
    sizes=st.lists(st.integers(0, 40_000_000), min_size=1, max_size=60),
    holders=st.lists(st.sampled_from([None, "a.tar", "b.tar", "c.parquet"]), min_size=60, max_size=60),
)
def test_a_chunk_is_a_piece_of_one_object(sizes: list[int], holders: list[str | None]) -> None:
    holders = holders[: len(sizes)]
    offsets = np.cumsum([0, *sizes[:-1]])
    table = pa.table({
        "id": pa.array([b"%016d" % number for number in range(len(sizes))], pa.binary(16)),
        "key": [f"{number:03d}.png" for number in range(len(sizes))], "object": pa.array(holders, pa.string()),
        "offset": offsets, "size": sizes, "etag": [""] * len(sizes),
    })  # fmt: skip
    source = Source(Index("/data", ("a", "b"), table), budget=0)
    chunks = source.chunks
    if all(holder is None for holder in holders):
        assert chunks is None
        return
    assert chunks is not None
    assert sorted(set(chunks.tolist())) == list(range(int(chunks.max()) + 1))
    for number in range(int(chunks.max()) + 1):
        rows = np.flatnonzero(chunks == number)
        assert len({holders[row] for row in rows}) == 1
        if holders[rows[0]] is None:
            assert len(rows) == 1
        elif holders[rows[0]] != "c.parquet":
            assert len({offsets[row] // module.CHUNK for row in rows}) == 1
