"""Packs: a training from one is that from its source, and no kill and no mistake makes a wrong one."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import random
import signal
import subprocess
import sys
import tarfile
import threading
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner, Result
from PIL import Image

from launcher.cli import main
from launcher.errors import DataError, LaunchError, NotFinishedError, SiteError, UserError
from launcher.s3 import s3_client
from launcher.spec import Data
from launcher.storage import LocalStore, open_store
from tests.test_shards import fill, samples, shard
from trainers.data.bulk import AHEAD, THREADS, in_order
from trainers.data.index import SPLITS, Index, build_index
from trainers.data.pack import Options, Pack
from trainers.data.source import Source

ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("RAYLAUNCH_CACHE", raising=False)


def noise(number: int, size: int) -> bytes:
    return random.Random(number).randbytes(size)


def class_folders(place: str, count: int = 30, size: int = 60_000) -> str:
    """Class folders of files with names that shards cannot keep; about `size` bytes each."""
    names = ("a.b c-{}.jpg", "ünder/{}.x.png", "{}.jpg", "deep/er/.{}.jpg".replace("/.", "/d"))
    return fill(place, {
        f"{('cat', 'dog 1', 'Ölm')[number % 3]}/{names[number % 4].format(number)}": noise(number, size + number)
        for number in range(count)
    })  # fmt: skip


def quiet(*_: object) -> None:
    return None


def packed(index: Index, uri: str, **options: Any) -> Pack:
    made = Pack(index, uri, Options(**{"shard_mb": 1, **options}))
    made.make(quiet)
    return made


def trained(index: Index) -> dict[str, dict[str, tuple[str, float | None, str]]]:
    """What a training sees of an index: in each split the label, weight and content of each image, by its content."""
    source = Source(index)
    found: dict[str, dict[str, tuple[str, float | None, str]]] = {split: {} for split in SPLITS}
    for split in SPLITS:
        for row in index.rows(split).tolist():
            digest = hashlib.sha256(source.read(row)).hexdigest()
            column = {name: index.table[name][row].as_py() for name in ("label", "weight")}
            found[split][digest] = column["label"], column["weight"], split
    source.close()
    return found


def files(uri: str) -> dict[str, bytes]:
    """All that lies at a place, without the tags of a local disk, which hold times."""
    store = open_store(uri)
    found = {entry.key: store.read(entry.key) for entry in store.list()}
    if isinstance(store, LocalStore) and "pack.json" in found:
        document = json.loads(found["pack.json"])
        for one in document["shards"]:
            assert one.pop("etag")
        found["pack.json"] = json.dumps(document).encode()
    return found


def refusal(index: Index, uri: str, kind: type[LaunchError] = UserError, **options: Any) -> str:
    before = files(uri)
    with pytest.raises(kind) as raised:
        packed(index, uri, **options)
    assert type(raised.value) is kind
    assert raised.value.hint
    assert files(uri) == before
    return f"{raised.value.where} | {raised.value.what} | {raised.value.hint}"


# -- what is in a pack


def test_a_pack_is_trained_as_its_source_is(place: str) -> None:
    source = build_index(Data(uri=class_folders(f"{place}/source"), val_fraction=0.3))
    made = packed(source, f"{place}/pack")
    again = build_index(Data(uri=made.uri))
    assert again.classes == source.classes
    assert again.ignored == 0
    assert trained(again) == trained(source)
    assert len(again.table) == 30
    assert len(made.plan) >= 3


def test_test_images_and_weights_come_along(tmp_path: Path) -> None:
    class_folders(str(tmp_path / "source"), 24)
    lines = ["path,label,split,weight"]
    for number, path in enumerate(sorted(path for path in (tmp_path / "source").rglob("*") if path.is_file())):
        lines.append(f"{path},{'xy'[number % 2]},{SPLITS[number // 2 % 3]},{'' if number % 5 else number / 4 + 1}")
    (tmp_path / "all.csv").write_text("\n".join(lines))
    source = build_index(Data(uri=str(tmp_path / "all.csv")))
    again = build_index(Data(uri=packed(source, str(tmp_path / "pack")).uri))
    assert trained(again) == trained(source)
    assert {len(found) for found in trained(again).values()} == {8}
    assert sum(weight is not None for found in trained(again).values() for _, weight, _ in found.values()) == 5


def test_shards_can_be_packed_anew(place: str) -> None:
    members = samples(0, 80, image=noise(0, 10_000))
    source = build_index(Data(uri=fill(f"{place}/source", {"0.tar": shard(members)})))
    again = build_index(Data(uri=packed(source, f"{place}/pack").uri))
    assert trained(again) == trained(source)


def test_parquet_files_can_be_packed(place: str) -> None:
    images = [{"bytes": noise(number, 10_000), "path": None} for number in range(80)]
    table = pa.table({"image": images, "label": ["ab"[number % 2] for number in range(80)]})
    out = io.BytesIO()
    pq.write_table(table, out, row_group_size=20)
    source = build_index(Data(uri=fill(f"{place}/source", {"train-00000.parquet": out.getvalue()})))
    again = build_index(Data(uri=packed(source, f"{place}/pack").uri))
    assert trained(again) == trained(source)


def test_other_readers_of_the_layout_find_whole_samples_with_their_origin(tmp_path: Path) -> None:
    source = build_index(Data(uri=class_folders(str(tmp_path / "source"))))
    made = packed(source, str(tmp_path / "pack"))
    keys = set()
    for name in made.plan:
        with tarfile.open(tmp_path / "pack" / name) as tar:
            *members, last = tar.getmembers()
            assert last.name.startswith("__")
            assert last.name.endswith("__")  # which WebDataset passes over
            assert len(members) == 2 * len(made.plan[name])
            for image, about in zip(members[::2], members[1::2], strict=True):
                assert image.name.isascii()
                stem, end = image.name.split(".")
                assert about.name == f"{stem}.json"
                fields = json.load(tar.extractfile(about) or io.BytesIO())
                key = fields["key"]
                assert fields["label"] == key.partition("/")[0]
                assert end == key[-3:]
                assert (tar.extractfile(image) or io.BytesIO()).read() == (tmp_path / "source" / key).read_bytes()
                keys.add(key)
    assert keys == set(source.table["key"].to_pylist())


def test_an_image_without_an_ending_gets_that_of_its_content(tmp_path: Path) -> None:
    for number, kind in enumerate(("jpeg", "png", "webp", "bmp", "tiff", "gif")):
        Image.new("RGB", (8, 8), (number, 0, 0)).save(tmp_path / f"{number}.{kind}")
        (tmp_path / f"{number}.{kind}").rename(tmp_path / f"{number}")
    (tmp_path / "all.csv").write_text("path,label\n" + "".join(f"{number},{'ab'[number % 2]}\n" for number in range(6)))
    made = packed(build_index(Data(uri=str(tmp_path / "all.csv"))), str(tmp_path / "pack"))
    ends = {key.rpartition(".")[2] for key in build_index(Data(uri=made.uri)).table["key"].to_pylist()}
    assert ends == {"jpg", "png", "webp", "bmp", "tif", "gif"}


def test_shards_are_alike_in_size_and_mix_the_classes(tmp_path: Path) -> None:
    source = build_index(Data(uri=class_folders(str(tmp_path / "source"), 150, 29_000)))
    made = packed(source, str(tmp_path / "pack"))
    train = [one for name, one in made.done.items() if name.startswith("train")]
    assert len(train) == 4
    assert max(one.size for one in train) <= (1 << 20) + 64_000
    assert min(one.size for one in train) > 0.8 * max(one.size for one in train)
    for one in train:
        labels = {source.table["label"][int(row)].as_py() for row in made.plan[one.name]}
        assert labels == set(source.classes)


def test_the_seed_changes_the_order_and_nothing_else(tmp_path: Path) -> None:
    source = build_index(Data(uri=class_folders(str(tmp_path / "source"))))
    one, other = (packed(source, str(tmp_path / f"pack-{seed}"), seed=seed) for seed in (0, 1))
    assert [one.plan[name].tolist() for name in one.plan] != [other.plan[name].tolist() for name in other.plan]
    assert trained(build_index(Data(uri=one.uri))) == trained(build_index(Data(uri=other.uri)))


def test_its_own_list_of_contents_says_what_its_headers_say(place: str) -> None:
    source = build_index(Data(uri=class_folders(f"{place}/source")))
    made = packed(source, f"{place}/pack")
    listed = build_index(Data(uri=made.uri))
    fill(f"{place}/copy", {name: data for name, data in files(made.uri).items() if name != "pack.json"})
    scanned = build_index(Data(uri=f"{place}/copy"))
    ours = ["key", "object", "offset", "size", "label", "split", "weight"]
    assert listed.table.select(ours) == scanned.table.select(ours)


@pytest.mark.parametrize("count", [30, 1500])
def test_a_pack_is_listed_by_its_ends_alone(bucket: str, tmp_path: Path, count: int) -> None:
    members = samples(0, count, image=noise(0, 2_000_000 // count))
    source = build_index(Data(uri=fill(str(tmp_path / "source"), {"0.tar": shard(members)})))
    made = packed(source, f"{bucket}/pack")
    sizes: list[int] = []
    s3_client().meta.events.register(
        "after-call.s3.GetObject", lambda parsed, **_: sizes.append(parsed.get("ContentLength", 0))
    )
    assert len(build_index(Data(uri=made.uri)).table) == count
    assert len([size for size in sizes if size > 1]) <= 2 * len(made.plan)


def test_damage_to_its_list_of_contents_costs_only_time(tmp_path: Path) -> None:
    source = build_index(Data(uri=class_folders(str(tmp_path / "source"))))
    made = packed(source, str(tmp_path / "pack"))
    for name in made.plan:
        data = made.store.read(name)
        at = data.rindex(b'{"sample"')
        made.store.write(name, data[:at] + b"[" + data[at + 1 :])
    assert trained(build_index(Data(uri=made.uri))) == trained(source)


def test_its_record_is_true(place: str) -> None:
    made = packed(build_index(Data(uri=class_folders(f"{place}/source"))), f"{place}/pack")
    document = json.loads(made.store.read("pack.json"))
    entries = {entry.key: entry for entry in made.store.list()}
    assert set(entries) == {"pack.json", *(one["name"] for one in document["shards"])}
    for one in document["shards"]:
        content = made.store.read(one["name"])
        assert one["sha256"] == hashlib.sha256(content).hexdigest()
        assert (one["size"], one["etag"]) == (len(content), entries[one["name"]].etag)
    assert document["images"] == sum(one["images"] for one in document["shards"]) == 30
    assert document["bytes"] == sum(60_000 + number for number in range(30))


# -- bad images


def test_bad_images_are_copied_unless_they_are_looked_for(tmp_path: Path) -> None:
    for number in range(20):
        path = tmp_path / "source" / "ab"[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (number, 0, 0)).save(path)
    (tmp_path / "source" / "a" / "4.png").write_bytes(b"no image")
    (tmp_path / "source" / "b" / "7.png").write_bytes(b"")
    source = build_index(Data(uri=str(tmp_path / "source")))
    everything = packed(source, str(tmp_path / "pack"))
    assert trained(build_index(Data(uri=everything.uri))) == trained(source)
    checked = packed(source, str(tmp_path / "checked"), check=True)
    left_out = [image for one in json.loads(checked.store.read("pack.json"))["shards"] for image in one["left_out"]]
    assert sorted((image["key"], image["why"]) for image in left_out) == [
        ("a/4.png", "not a JPEG, PNG, WebP, BMP, TIFF or GIF image"), ("b/7.png", "the file is empty"),
    ]  # fmt: skip
    found, all_of = trained(build_index(Data(uri=checked.uri))), trained(source)
    bad = {hashlib.sha256(data).hexdigest() for data in (b"no image", b"")}
    assert found == {split: {key: one for key, one in all_of[split].items() if key not in bad} for split in SPLITS}


# -- broken off


@pytest.mark.parametrize("kills", [2, pytest.param(12, marks=pytest.mark.slow)])
def test_a_pack_that_is_killed_again_and_again_comes_out_the_same(place: str, kills: int) -> None:
    source = class_folders(f"{place}/source", 40, 270_000)
    whole = files(packed(build_index(Data(uri=source)), f"{place}/whole").uri)
    assert len(whole) > 10
    begun, left = f"{place}/pack-0", kills
    while left:
        done = len(Pack(build_index(Data(uri=source)), begun, Options(shard_mb=1)).done)
        killed(source, begun, random.Random(left).random() ** 3)
        left -= 1
        for name, content in files(begun).items():
            assert name in ("pack.json", ".packing.json") or content == whole[name]
        found = Pack(build_index(Data(uri=source)), begun, Options(shard_mb=1))
        assert len(found.done) >= done
        if found.finished:
            begun = f"{place}/pack-{left}"
    packed(build_index(Data(uri=source)), begun)
    assert files(begun) == whole
    if "://" not in place:
        assert sorted(os.listdir(begun)) == sorted(whole)


def killed(source: str, destination: str, seconds: float) -> None:
    """Packs in a process that is killed so long after it began."""
    command = [sys.executable, "-m", "tests.pack_writer", source, destination]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "begin\n"
        time.sleep(seconds)
        process.kill()


@pytest.fixture
def puts(s3: str) -> list[str]:
    """The keys of what this process writes to S3."""
    assert s3
    found: list[str] = []

    def note(params: dict[str, Any], **_: object) -> None:
        found.append(params["url_path"] if "url_path" in params else str(params))

    s3_client().meta.events.register("before-call.s3.PutObject", note)
    return found


def test_a_shard_that_is_there_is_not_written_again(bucket: str, puts: list[str]) -> None:
    source = build_index(Data(uri=class_folders(f"{bucket}/source")))
    first = Pack(source, f"{bucket}/pack", Options(shard_mb=1))

    def stop(_what: str, _more: int, name: str) -> None:
        if name:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        first.make(stop)
    there = set(files(first.uri)) - {".packing.json"}
    assert 0 < len(there) < len(first.plan)
    puts.clear()
    packed(source, first.uri)
    written = [key.rpartition("/")[2] for key in puts if key.endswith(".tar")]
    assert sorted(written) == sorted(set(first.plan) - there)


def test_an_unfinished_pack_is_not_trained_on(place: str) -> None:
    source = build_index(Data(uri=class_folders(f"{place}/source")))

    def stop(_what: str, _more: int, name: str) -> None:
        if name:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Pack(source, f"{place}/pack", Options(shard_mb=1)).make(stop)
    with pytest.raises(DataError, match="not finished") as raised:
        build_index(Data(uri=f"{place}/pack"))
    assert "launch data pack" in raised.value.hint
    packed(source, f"{place}/pack")
    assert trained(build_index(Data(uri=f"{place}/pack"))) == trained(source)


# -- verified


@pytest.mark.parametrize("verify", [True, False])
def test_what_reads_back_otherwise_is_found_and_mended(place: str, verify: bool) -> None:
    source = build_index(Data(uri=class_folders(f"{place}/source")))
    made = packed(
        source,
        f"{place}/pack",
    )
    whole = files(made.uri)
    name = next(iter(made.plan))
    damaged = bytearray(whole[name])
    damaged[len(damaged) // 2] ^= 1
    made.store.write(name, bytes(damaged))
    # It is unlike its record at the next look, or read back so at the end of the one that wrote it.
    if verify:
        with pytest.raises(SiteError, match=name) as raised:
            made.make(quiet)
        assert raised.value.hint
    again = Pack(source, made.uri, Options(shard_mb=1))
    assert again.missing == [name]
    assert not again.finished
    again.make(quiet)
    assert files(made.uri) == whole


def test_a_shard_that_is_gone_is_written_anew(place: str) -> None:
    source = build_index(Data(uri=class_folders(f"{place}/source")))
    made = packed(source, f"{place}/pack")
    whole = files(made.uri)
    made.store.delete(next(iter(made.plan)))
    packed(source, made.uri)
    assert files(made.uri) == whole


def test_a_copied_pack_is_the_same_pack(tmp_path: Path) -> None:
    source = build_index(Data(uri=class_folders(str(tmp_path / "source"))))
    made = packed(source, str(tmp_path / "pack"))
    fill(str(tmp_path / "copy"), files(made.uri) | {"pack.json": made.store.read("pack.json")})
    assert Pack(source, str(tmp_path / "copy"), Options(shard_mb=1)).finished


# -- refused


def test_a_place_with_anything_else_is_refused(place: str) -> None:
    source = build_index(Data(uri=class_folders(f"{place}/source")))
    fill(f"{place}/pack", {"notes.txt": b"mine"})
    assert "something else is there already: notes.txt" in refusal(source, f"{place}/pack")
    made = packed(source, f"{place}/other")
    fill(made.uri, {"train-000099.tar": b""})
    assert "train-000099.tar" in refusal(source, made.uri)


def test_other_options_or_another_state_of_the_source_are_refused(tmp_path: Path) -> None:
    uri = class_folders(str(tmp_path / "source"))
    made = packed(build_index(Data(uri=uri)), str(tmp_path / "pack"))
    assert "with other options already: shard_mb 1" in refusal(made.index, made.uri, shard_mb=2)
    assert "seed 0, check False" in refusal(made.index, made.uri, seed=1, check=True)
    split = build_index(Data(uri=uri, val_fraction=0.4))
    assert "splits have changed since" in refusal(split, made.uri)
    (tmp_path / "source" / "cat" / "one more.jpg").write_bytes(b"image")
    assert "its images, labels or splits have changed" in refusal(build_index(Data(uri=uri)), made.uri)
    other = build_index(Data(uri=class_folders(str(tmp_path / "else"))))
    assert f"there is a pack of {uri} already" in refusal(other, made.uri)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"version": 2}', '{"version": 1, "source": 1}'])
def test_a_record_that_is_none_is_refused(tmp_path: Path, text: str) -> None:
    source = build_index(Data(uri=class_folders(str(tmp_path / "source"))))
    fill(str(tmp_path / "pack"), {".packing.json": text.encode()})
    with pytest.raises(UserError, match="not the record of a pack"):
        Pack(source, str(tmp_path / "pack"), Options())


def test_a_class_that_shards_cannot_name_is_refused(tmp_path: Path) -> None:
    source = build_index(Data(uri=fill(str(tmp_path / "source"), {
        f"{label}/{number}.jpg": b"" for label in ("cat", "cat ") for number in range(2)
    })))  # fmt: skip
    assert "'cat '" in refusal(source, str(tmp_path / "pack"), DataError)


def test_two_at_once_do_not_write_to_the_same_place(tmp_path: Path) -> None:
    source = build_index(Data(uri=class_folders(str(tmp_path / "source"))))
    first, second = (Pack(source, str(tmp_path / "pack"), Options(shard_mb=1)) for _ in range(2))
    problems: list[LaunchError] = []

    def meanwhile(*_: object) -> None:
        if not problems:
            try:
                second.make(quiet)
            except LaunchError as error:
                problems.append(error)

    first.make(meanwhile)
    assert [type(error) for error in problems] == [NotFinishedError]
    assert trained(build_index(Data(uri=first.uri))) == trained(source)


def test_too_little_space_is_told_before_anything_is_read(tmp_path: Path) -> None:
    uri = class_folders(str(tmp_path / "source"))
    with open(tmp_path / "source" / "cat" / "vast.jpg", "wb") as file:
        file.truncate(1 << 43)  # it takes no room itself
    assert "GB are free" in refusal(build_index(Data(uri=uri)), str(tmp_path / "pack"), SiteError)


def test_a_full_disk_is_told_and_gone_on_from(tmp_path: Path, full_disk: Path) -> None:
    source = build_index(Data(uri=class_folders(str(tmp_path / "source"))))
    (full_disk / "ballast").write_bytes(bytes(1_000_000))
    made = Pack(source, str(full_disk / "pack"), Options(shard_mb=1))

    def fill_up(*_: object) -> None:
        with contextlib.suppress(OSError):  # what the pack has left free, however much that is by now
            (full_disk / "ballast").write_bytes(bytes(4_000_000))

    with pytest.raises(SiteError, match="no space left"):
        made.make(fill_up)
    assert not list((full_disk / "pack").glob("*.tmp*"))
    (full_disk / "ballast").unlink()
    packed(source, made.uri)
    assert trained(build_index(Data(uri=made.uri))) == trained(source)


@pytest.fixture
def full_disk(tmp_path: Path) -> Any:
    """A folder on a file system of 4 MB."""
    folder = tmp_path / "small"
    folder.mkdir()
    try:
        command = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(folder)]
        mounted = subprocess.run(command, capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        mounted = False
    if not mounted:
        pytest.skip("a file system can be mounted by root only")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_an_image_that_changes_meanwhile_ends_it(tmp_path: Path) -> None:
    source = build_index(Data(uri=class_folders(str(tmp_path / "source"))))
    key = source.key(0)
    (tmp_path / "source" / key).write_bytes(b"other")
    with pytest.raises(DataError, match="changed") as raised:
        packed(source, str(tmp_path / "pack"))
    assert raised.value.where.endswith(key)
    assert set(files(str(tmp_path / "pack"))) <= {".packing.json", *Pack(source, f"{tmp_path}/new", Options(1)).plan}


@pytest.mark.slow
def test_large_images_do_not_fill_the_memory(tmp_path: Path) -> None:
    for number in range(32):
        path = tmp_path / "source" / "ab"[number % 2] / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "wb") as file:
            file.truncate(16 << 20)
    code = (
        "import resource, sys; from tests.pack_writer import main\n"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10\n"
        "before = peak(); main(*sys.argv[1:]); print(peak() - before)"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "source"), str(tmp_path / "pack")]
    done = subprocess.run(command, check=True, cwd=ROOT, capture_output=True, text=True)
    assert int(done.stdout.split()[-1]) < 256  # MiB, of which imports are a part


@pytest.mark.parametrize("size", [1000, AHEAD // 100, AHEAD // 3, 2 * AHEAD])
def test_reads_come_in_order_many_at_once_and_within_a_bound(size: int) -> None:
    lock, inside, most = threading.Lock(), 0, 0
    together = threading.Barrier(min(max(AHEAD // size, 1), THREADS), timeout=60)

    def work(number: int) -> int:
        nonlocal inside, most
        with lock:
            inside += 1
            most = max(most, inside)
        if number < together.parties:
            together.wait()
        return -number

    for number, (item, result) in enumerate(in_order(range(300), lambda _: size, work)):
        assert (item, result) == (number, -number)
        with lock:
            inside -= 1
    assert most * size <= max(AHEAD, size) + size  # the one that is handed out counts too


def test_what_fails_ends_the_reading(tmp_path: Path) -> None:
    begun = []

    def work(number: int) -> int:
        begun.append(number)
        if number == 3:
            raise DataError("bad", where=str(tmp_path), hint="good")
        return number

    with pytest.raises(DataError, match="bad"):
        list(in_order(range(100_000), lambda _: 1, work))
    assert len(begun) < 1000


# -- the command


def launch(*words: str, code: int = 0) -> Result:
    result = CliRunner().invoke(main, ["data", "pack", *words])
    assert result.exit_code == code, f"{result.stdout}\n{result.stderr}\n{result.exception}"
    assert "Traceback" not in result.stderr
    return result


def test_a_dry_run_says_what_would_be_written_and_writes_nothing(place: str) -> None:
    source = class_folders(f"{place}/source")
    before = files(place)
    words = (source, f"{place}/pack", "--shard-mb", "1", "--dry-run")
    assert "30 in 3 classes: 24 train, 6 val" in launch(*words).stderr
    document = json.loads(launch(*words, "-o", "json").stdout)
    assert sum(one["images"] for one in document["planned"]) == 30
    assert files(place) == before
    launch(*words[:-1])
    made = json.loads(launch(*words[:-1], "-o", "json").stdout)
    assert made["finished"]
    assert [one["name"] for one in made["shards"]] == [one["name"] for one in document["planned"]]
    for one, planned in zip(made["shards"], document["planned"], strict=True):
        assert abs(one["size"] - planned["size"]) <= tarfile.RECORDSIZE + 1024
    assert json.loads(launch(*words, "-o", "json").stdout)["finished"]


def test_shards_do_not_go_into_their_source(place: str, tmp_path: Path) -> None:
    source = class_folders(f"{place}/source")
    for inner in (source, f"{source}/", f"{source}/cat", f"{source}/new/pack"):
        assert "DST lies in SRC" in launch(source, inner, code=2).stderr
    if "://" not in place:
        (tmp_path / "link").symlink_to(source)
        assert "DST lies in SRC" in launch(source, str(tmp_path / "link" / "new"), code=2).stderr
    launch(source, f"{place}/source-packed")


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        ("nowhere pack", 100, "there is no such folder"),
        ("source http://host/pack", 2, "storage of kind http:// is not supported"),
        ("source s3:// ", 2, "no bucket in the address"),
        ("source s3://no-such-bucket/pack", 100, "there is no bucket no-such-bucket"),
        ("source source/../source/cat", 2, "DST lies in SRC"),
        ("source pack --shard-mb 0", 2, "--shard-mb"),
        ("source pack --val-fraction 1", 2, "--val-fraction"),
        ("source pack --val-split no", 2, "no split no"),
    ],
)
def test_a_mistake_is_told_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, s3: str, words: str, code: int, says: str
) -> None:
    assert s3
    monkeypatch.chdir(tmp_path)
    class_folders("source", 12)
    result = launch(*words.split(), code=code)
    assert says in result.stderr
    assert not (tmp_path / "pack").exists()


def test_missing_credentials_are_told(bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    uri = class_folders(str(tmp_path / "source"))
    monkeypatch.setenv("AWS_PROFILE", "nobody")
    from launcher.s3 import forget_s3_client

    forget_s3_client()
    assert "nobody" in launch(uri, f"{bucket}/pack", code=100).stderr


def test_ctrl_c_says_how_to_go_on(tmp_path: Path) -> None:
    uri = class_folders(str(tmp_path / "source"), 40, 270_000)
    pack = ["data", "pack", uri, str(tmp_path / "pack"), "--shard-mb", "1"]
    command = [sys.executable, "-u", "-m", "launcher", *pack]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=ROOT) as process:
        assert process.stderr is not None
        first = process.stderr.readline()
        process.send_signal(signal.SIGINT)
        rest = process.stderr.read()
    assert first.startswith("packing  ")
    assert process.returncode == 130
    assert "Traceback" not in rest
    assert "next:  the same command goes on" in rest
    assert "goes on: " in launch(*pack[2:]).stderr
    assert trained(build_index(Data(uri=f"{tmp_path}/pack"))) == trained(build_index(Data(uri=uri)))
