"""The node's cache: what it serves is right whatever happened to it, and what it cannot do is never an error."""

from __future__ import annotations

import ctypes
import logging
import os
import random
import shutil
import subprocess
import sys
import threading
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.cache_writer import SMALL, ids_of, put, truth
from trainers.data import segments
from trainers.data.cache import WRITERS, Cache
from trainers.data.views import View

BUDGET = 1 << 30


def files(folder: Path, suffix: str) -> list[Path]:
    return sorted(folder.rglob(f"*.{suffix}"))


def got(view: View, row: int) -> bytes | None:
    found = view.get(row)
    return None if found is None else bytes(found)


def fill(view: View, rows: range, size: int = 100_000) -> int:
    """How many of the rows are kept."""
    return sum(put(view, row, bytes([row % 256]) * size) for row in rows)


# -- what is put is what is got


OPERATIONS = st.lists(st.tuples(st.sampled_from(["put", "refresh", "reopen"]), st.integers(0, 2), st.integers(0, 7)))


@settings(deadline=None, max_examples=40)
@given(
    names=st.lists(st.binary(min_size=16, max_size=16), min_size=1, max_size=6),
    data=st.lists(st.binary(max_size=300), min_size=8, max_size=8),
    operations=OPERATIONS,
)
def test_a_record_is_absent_or_right_for_any_order_of_work(
    names: list[bytes], data: list[bytes], operations: list[tuple[str, int, int]]
) -> None:
    names.append(names[0])
    ids = np.frombuffer(b"".join(names), np.uint8).reshape(-1, 16)
    content = {name: data[number] for number, name in enumerate(names)}
    known: set[bytes] = set()
    with TemporaryDirectory() as folder:
        caches = [Cache(Path(folder), SMALL) for _ in range(2)]
        views = [View(cache, ids) for cache in (*caches, caches[0])]
        for what, who, row in operations:
            row %= len(names)
            if what == "put":
                assert put(views[who], row, content[names[row]], (row, 1))
                known.add(names[row])
                assert got(views[who], row) == content[names[row]]
            elif what == "refresh":
                views[who].refresh()
                assert views[who].held(np.arange(len(names))).tolist() == [name in known for name in names]
            else:
                views[who] = View(Cache(Path(folder), SMALL), ids[::-1].copy()[::-1])
        for view in views:
            view.refresh()
            for row, name in enumerate(names):
                assert got(view, row) == (content[name] if name in known else None)


def test_an_address_leads_to_the_record(tmp_path: Path) -> None:
    view = View(Cache(tmp_path, BUDGET), ids_of(*range(6)))
    pixels = [np.full((row + 1, 3, 3), row, np.uint8) for row in range(4)]
    assert all(put(view, row, image, image.shape[:2]) for row, image in enumerate(pixels))
    rows = np.array([3, 5, 0, 3])
    for other in (view, View(Cache(tmp_path, BUDGET), ids_of(*range(6)))):
        addresses, shapes = other.locate(rows)
        assert (addresses.dtype.str, shapes.dtype.str) == ("<u8", "<i4")
        assert addresses[1] == 0
        assert shapes[[0, 2, 3]].tolist() == [[4, 3], [1, 3], [4, 3]]
        for place in (0, 2, 3):
            image = pixels[rows[place]]
            assert ctypes.string_at(int(addresses[place]), image.nbytes) == image.tobytes()
    assert view.locate(np.empty(0, np.int64))[0].shape == (0,)


def test_a_view_costs_less_than_fifty_bytes_a_row(tmp_path: Path) -> None:
    ids = np.random.default_rng(0).integers(0, 256, (200_000, 16), np.uint8)
    cache = Cache(tmp_path, BUDGET)
    first = View(cache, ids)
    assert all(put(first, row, b"something") for row in range(100))
    tracemalloc.start()
    view = View(cache, ids)
    used, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert view.held(np.arange(len(ids))).sum() == 100
    assert used < 50 * len(ids)


def test_without_a_budget_nothing_is_kept(tmp_path: Path) -> None:
    view = View(Cache(tmp_path / "cache", 0), ids_of(1))
    assert not put(view, 0, b"data")
    assert got(view, 0) is None
    with view.claim(0):
        view.refresh()
    assert os.listdir(tmp_path) == []


def test_threads_write_and_read_together(tmp_path: Path) -> None:
    view = View(Cache(tmp_path, SMALL), ids_of(*range(200)))

    def work(seed: int) -> None:
        for row in random.Random(seed).sample(range(200), 200):
            put(view, row, truth(row))
            assert got(view, row) == truth(row)

    threads = [threading.Thread(target=work, args=[seed]) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [got(View(Cache(tmp_path, SMALL), ids_of(*range(200))), row) for row in range(200)] == [
        truth(row) for row in range(200)
    ]
    begun = segments.names(tmp_path / segments.FORMAT)
    assert sum(not segments.sealed(tmp_path / segments.FORMAT, name) for name in begun) <= WRITERS


# -- damage


DAMAGE = st.tuples(st.sampled_from(["cut", "flip", "append"]), st.sampled_from(["dat", "idx"]), st.floats(0, 1))


@settings(deadline=None, max_examples=60)
@given(damages=st.lists(DAMAGE, min_size=1, max_size=4), junk=st.binary(min_size=1, max_size=200))
def test_damage_costs_records_but_never_serves_a_wrong_byte(damages: list[tuple[str, str, float]], junk: bytes) -> None:
    ids = ids_of(*range(20))
    with TemporaryDirectory() as folder:
        view = View(Cache(Path(folder), SMALL), ids)
        assert all(put(view, row, truth(row, 9_000)) for row in range(20))
        size = sum(len(truth(row, 9_000)) for row in range(20))
        for what, suffix, place in damages:
            (path,) = files(Path(folder), suffix)
            with open(path, "r+b") as file:
                offset = int(place * (size if suffix == "dat" else os.path.getsize(path)))
                if what == "cut":
                    file.truncate(offset)
                elif what == "append":
                    file.seek(0, os.SEEK_END)
                    file.write(junk)
                else:
                    file.seek(offset)
                    old = file.read(1) or b"\0"
                    file.seek(offset)
                    file.write(bytes([old[0] ^ 0x10]))
        del view
        for _ in range(2):
            view = View(Cache(Path(folder), SMALL), ids)
            for row in range(20):
                assert got(view, row) in (None, truth(row, 9_000))
                assert put(view, row, truth(row, 9_000))
                assert got(view, row) == truth(row, 9_000)
        # What was mended stays so for the next process.
        assert all(View(Cache(Path(folder), SMALL), ids).held(np.arange(20)))


def test_a_record_found_damaged_is_not_tried_by_the_next_process(tmp_path: Path) -> None:
    assert put(View(Cache(tmp_path, BUDGET), ids_of(1)), 0, b"x" * 5000)
    (path,) = files(tmp_path, "dat")
    with open(path, "r+b") as file:
        file.write(b"y")
    view = View(Cache(tmp_path, BUDGET), ids_of(1))
    assert view.held(np.arange(1)).all()
    assert got(view, 0) is None
    assert not View(Cache(tmp_path, BUDGET), ids_of(1)).held(np.arange(1)).any()
    assert put(view, 0, b"x" * 5000)
    assert got(View(Cache(tmp_path, BUDGET), ids_of(1)), 0) == b"x" * 5000


def test_another_format_is_not_read(tmp_path: Path) -> None:
    assert put(View(Cache(tmp_path, BUDGET), ids_of(1)), 0, b"data")
    (folder,) = tmp_path.iterdir()
    folder.rename(tmp_path / "v0")
    assert got(View(Cache(tmp_path, BUDGET), ids_of(1)), 0) is None


def writer(folder: Path, seed: int, count: int) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "tests.cache_writer", str(folder), str(seed), str(count)]
    return subprocess.Popen(command, stdout=subprocess.PIPE)


def survives(folder: Path, kills: int, count: int) -> None:
    """Kills two writers at random moments, again and again, and looks at what they left."""
    chance, known, sizes = random.Random(4), set[int](), []
    for round_ in range(0, kills, 2):
        pair = [writer(folder, round_ + who, count) for who in range(2)]
        for process in pair:
            assert process.stdout is not None
            for _ in range(chance.randrange(count // 8)):
                known.add(int(process.stdout.readline()))
            process.kill()
            known |= {int(line) for line in process.stdout.read().split(b"\n") if line}
            process.stdout.close()
            process.wait()
        view = View(Cache(folder, SMALL), ids_of(*range(count)))
        found = {row for row in range(count) if (data := got(view, row)) is not None and data == truth(row)}
        assert view.held(np.arange(count)).sum() == len(found)
        assert known <= found
        sizes.append(len(found))
    assert sizes == sorted(sizes)
    assert sizes[0] < sizes[-1]
    with writer(folder, 99, count) as last:
        assert last.stdout is not None
        assert len(last.stdout.read().split()) == count
    assert all(got(View(Cache(folder, SMALL), ids_of(*range(count))), row) == truth(row) for row in range(count))
    # A segment that a dead process left is taken over: they are no more than the records need, and one a writer.
    assert len(files(folder, "dat")) <= sum(len(truth(row)) for row in range(count)) / (1 << 20) * 1.2 + 3


def test_writers_killed_at_any_moment_leave_a_cache_that_serves_and_grows(tmp_path: Path) -> None:
    survives(tmp_path, 6, 300)


@pytest.mark.slow
def test_fifty_kills_leave_a_cache_that_serves_and_grows(tmp_path: Path) -> None:
    survives(tmp_path, 50, 1000)


# -- room


def test_what_does_not_fit_is_not_kept_and_chases_nothing_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    view = View(Cache(tmp_path, SMALL), ids_of(*range(500)))
    with caplog.at_level(logging.WARNING):
        kept = fill(view, range(500))
    assert 0.9 * SMALL < kept * 100_000 <= SMALL
    assert view.held(np.arange(500)).tolist() == [row < kept for row in range(500)]
    assert Cache(tmp_path, SMALL).held() <= 1.05 * SMALL
    assert [record.getMessage() for record in caplog.records] == [
        f"{tmp_path / 'v1'} holds 0.0 GB, all in use: more is not kept there"
    ]
    # The next epoch, in this process or another, finds the same ones.
    again = View(Cache(tmp_path, SMALL), ids_of(*range(500)))
    assert not put(again, kept, b"x" * 100_000)
    assert all(got(again, row) == bytes([row % 256]) * 100_000 for row in range(kept))


def test_the_longest_unused_goes_first_and_what_is_in_use_stays(tmp_path: Path) -> None:
    for run in range(3):
        assert fill(View(Cache(tmp_path, SMALL), ids_of(*range(run * 80, run * 80 + 80))), range(80)) == 80
        for path in files(tmp_path, "dat"):
            if os.stat(path).st_mtime > 1e6:
                os.utime(path, (run, run))
    in_use = View(Cache(tmp_path, SMALL), ids_of(*range(80)))
    assert in_use.held(np.arange(80)).all()
    assert fill(View(Cache(tmp_path, SMALL), ids_of(*range(240, 400))), range(160)) == 160
    assert all(got(in_use, row) is not None for row in range(80))
    left = View(Cache(tmp_path, SMALL), ids_of(*range(400))).held(np.arange(400))
    assert left[:80].all()
    assert left[240:].all()
    assert left[80:160].sum() < left[160:240].sum()
    assert Cache(tmp_path, SMALL).held() <= 1.05 * SMALL


def test_a_record_larger_than_a_segment_is_not_kept(tmp_path: Path) -> None:
    view = View(Cache(tmp_path, SMALL), ids_of(1, 2))
    assert not put(view, 0, bytes((1 << 20) + 1))
    assert put(view, 1, bytes(1 << 20))
    assert got(view, 1) == bytes(1 << 20)


@pytest.fixture
def full_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "small"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=512k", "tmpfs", str(folder)]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("a file system can be mounted by root only")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_a_full_disk_is_told_once_and_what_is_there_is_served(
    full_disk: Path, caplog: pytest.LogCaptureFixture
) -> None:
    view = View(Cache(full_disk, SMALL), ids_of(*range(50)))
    kept = [row for row in range(50) if put(view, row, bytes([row]) * 50_000)]
    assert 5 < len(kept) < 11
    for other in (view, View(Cache(full_disk, SMALL), ids_of(*range(50)))):
        assert [row for row in range(50) if got(other, row) == bytes([row]) * 50_000] == kept
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "No space left on device" in caplog.text
    assert str(full_disk) in caplog.text


def test_an_unusable_folder_keeps_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("")
    view = View(Cache(tmp_path / "file", SMALL), ids_of(1))
    with view.claim(0):
        assert not put(view, 0, b"data")
    view.refresh()
    assert got(view, 0) is None
    assert len(caplog.records) == 1


def test_a_folder_removed_under_a_running_process_is_no_trouble(tmp_path: Path) -> None:
    view = View(Cache(tmp_path / "cache", SMALL), ids_of(*range(60)))
    assert fill(view, range(5)) == 5
    assert got(view, 0) is not None
    shutil.rmtree(tmp_path / "cache")
    view.refresh()
    with view.claim(3):
        assert got(view, 3) == bytes([3]) * 100_000
    assert fill(view, range(60)) == 60
    assert all(got(view, row) == bytes([row]) * 100_000 for row in range(60))
    # Segments that are begun after the loss are there for others again.
    assert View(Cache(tmp_path / "cache", SMALL), ids_of(*range(60))).held(np.arange(60)).any()


def test_a_forked_child_does_not_write_where_its_parent_does(tmp_path: Path) -> None:
    code = """
import os, sys
from pathlib import Path
from tests.cache_writer import SMALL, ids_of, put
from trainers.data.cache import Cache
from trainers.data.views import View
view = View(Cache(Path(sys.argv[1]), SMALL), ids_of(*range(40)))
put(view, 0, b"parent" * 1000)
child = os.fork()
for row in range(1, 20):
    assert put(view, row + (0 if child else 20), (b"parent" if child else b"child ") * 1000)
if child:
    assert os.waitpid(child, 0)[1] == 0
"""
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True, timeout=60)
    view = View(Cache(tmp_path, SMALL), ids_of(*range(40)))
    assert all(got(view, row) == b"parent" * 1000 for row in range(20))
    assert all(got(view, row) == b"child " * 1000 for row in range(21, 40))


# -- claims


def test_one_thread_at_a_time_holds_a_claim_and_others_pass(tmp_path: Path) -> None:
    views = [View(Cache(tmp_path, SMALL), ids_of(1, 2)) for _ in range(2)]
    inside, most, count = 0, 0, 0

    def work(view: View) -> None:
        nonlocal inside, most, count
        for _ in range(50):
            with view.claim(0):
                inside += 1
                most = max(most, inside)
                count += 1
                with view.claim(1):
                    pass
                inside -= 1

    threads = [threading.Thread(target=work, args=[views[number % 2]]) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (most, count) == (1, 300)


HOLDER = """
import sys
from pathlib import Path
from tests.cache_writer import SMALL, ids_of
from trainers.data.cache import Cache
from trainers.data.views import View
with View(Cache(Path(sys.argv[1]), SMALL), ids_of(1)).claim(0):
    print("held", flush=True)
    sys.stdin.read()
print("freed", flush=True)
"""


def test_a_claim_is_freed_by_the_death_of_its_holder(tmp_path: Path) -> None:
    view = View(Cache(tmp_path, SMALL), ids_of(1))
    command = [sys.executable, "-c", HOLDER, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        taken = threading.Event()

        def take() -> None:
            with view.claim(0):
                taken.set()

        thread = threading.Thread(target=take)
        thread.start()
        assert not taken.wait(0.1)
        holder.kill()
        thread.join()
        assert taken.is_set()
