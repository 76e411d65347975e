"""Tar shards: what is found in them, how little of them is read for it, and how it is said what is wrong with them."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from launcher.errors import DataError, LaunchError, UserError
from launcher.s3 import s3_client
from launcher.spec import Data
from launcher.storage import open_store
from trainers.data.index import Index, build_index
from trainers.data.shards import expand
from trainers.data.source import Source


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def reads() -> Iterator[list[int]]:
    """The bytes of each GET that this process sends to S3, in the order of the answers."""
    found: list[int] = []

    def count(parsed: dict[str, int], **_: object) -> None:
        found.append(parsed.get("ContentLength", 0))

    s3_client().meta.events.register("after-call.s3.GetObject", count)
    return iter([found])


def shard(members: dict[str, bytes], form: int = tarfile.USTAR_FORMAT) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=form) as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return out.getvalue()


def samples(first: int, count: int, image: bytes = b"image") -> dict[str, bytes]:
    """Members of a shard, with the labels cat and dog by turns."""
    members = {}
    for number in range(first, first + count):
        members[f"{number:04d}.jpg"] = image + b"%d" % number
        members[f"{number:04d}.cls"] = (b"cat", b"dog\n")[number % 2]
    return members


def fill(place: str, files: dict[str, bytes]) -> str:
    store = open_store(place)
    for key, data in files.items():
        store.write(key, data)
    return place


def contents(index: Index) -> dict[str, bytes]:
    """The image of each row, read by its place."""
    found = {}
    for row in range(len(index.table)):
        place = index.place(row)
        span = (place.offset, place.offset + place.size)
        found[index.key(row)] = open_store(place.uri).read(place.key, place.etag, span)
    return found


def labels(index: Index) -> dict[str, str]:
    return dict(zip(index.table["key"].to_pylist(), index.table["label"].to_pylist(), strict=True))


def refusal(uri: str, kind: type[LaunchError] = DataError, **data: str) -> str:
    with pytest.raises(kind) as raised:
        build_index(Data(uri=uri, **data))  # type: ignore[arg-type]
    assert type(raised.value) is kind
    assert raised.value.hint
    return f"{raised.value.where} | {raised.value.what} | {raised.value.hint}"


def test_images_and_labels_are_found_in_shards(place: str) -> None:
    fill(place, {"a-000.tar": shard(samples(0, 6)), "a-001.tar": shard(samples(6, 4)), "README.md": b""})
    index = build_index(Data(uri=place))
    assert index.classes == ("cat", "dog")
    assert index.facts() | {"bytes": 0} == {
        "images": 10, "bytes": 0, "classes": 2, "train": 8, "val": 2, "test": 0, "ignored": 1,
        "smallest_class": ["cat", 5], "largest_class": ["cat", 5],
    }  # fmt: skip
    assert contents(index) == {
        f"a-00{number // 6}.tar/{number:04d}.jpg": b"image%d" % number for number in range(10)
    }  # fmt: skip
    assert set(index.table["object"].to_pylist()) == {"a-000.tar", "a-001.tar"}
    assert len({bytes(one) for one in index.ids}) == 10


@pytest.mark.parametrize(
    "names",
    [
        {"train": "train/0.tar", "val": "val/0.tar", "test": "test/0.tar"},
        {"train": "train-000000.tar", "val": "validation-000000.tar", "test": "test-000000.tar"},
        {"train": "imagenet-training_00.tar", "val": "imagenet-val-00.tar", "test": "imagenet.testing.tar"},
    ],
)
def test_splits_are_said_by_folders_or_names(place: str, names: dict[str, str]) -> None:
    fill(place, {name: shard(samples(10 * number, 4)) for number, name in enumerate(names.values())})
    index = build_index(Data(uri=place))
    found = {split: {index.place(row).key for row in index.rows(split)} for split in names}
    assert found == {split: {name} for split, name in names.items()}


def test_the_same_name_may_stand_in_two_splits_but_not_twice_in_one(tmp_path: Path) -> None:
    fill(str(tmp_path / "a"), {f"{split}.tar": shard(samples(0, 4)) for split in ("train", "val")})
    assert build_index(Data(uri=str(tmp_path / "a"))).facts()["images"] == 8
    fill(str(tmp_path / "b"), {"train-0.tar": shard(samples(0, 4)), "train-1.tar": shard(samples(3, 4))})
    text = refusal(str(tmp_path / "b"))
    assert "1 samples of train have the name of another: 0003 (train-0.tar and train-1.tar)" in text


@pytest.mark.parametrize("form", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_and_foreign_names_are_read_in_both_formats(place: str, form: int) -> None:
    folder = "./" + "a long folder/" * 12
    members = {f"{folder}ünï{number}{end}": data for number in range(4)
               for end, data in ((".jpg", b"x%d" % number), (".cls", b"%d" % (number % 2)))}  # fmt: skip
    fill(place, {"x.tar": shard(members, form)})
    index = build_index(Data(uri=place))
    assert contents(index) == {f"x.tar/{folder[2:]}ünï{n}.jpg": b"x%d" % n for n in range(4)}


def test_labels_may_be_text_numbers_or_json(tmp_path: Path) -> None:
    members = {
        "a.png": b"1", "a.txt": b" tabby cat\n", "a.json": b'{"caption": 3}',
        "b.webp": b"2", "b.json": b'{"class": "dog", "cls": 7}', "b.txt": b"not this",
        "c.JPEG": b"3", "c.cls": b"12", "c.txt": b"not this",
        "d.jpg": b"4", "d.json": b'{"label": 12}', "d.mask.png": b"no image of a class",
        "e.jpg": b"5", "e.cls": b"dog", "f.jpg": b"6", "f.cls": b"tabby cat", "g.json": b"{}", "._a.jpg": b"",
    }  # fmt: skip
    index = build_index(Data(uri=fill(str(tmp_path), {"x.tar": shard(members)})))
    assert labels(index) == {
        "x.tar/a.png": "tabby cat", "x.tar/b.webp": "dog", "x.tar/c.JPEG": "12", "x.tar/d.jpg": "12",
        "x.tar/e.jpg": "dog", "x.tar/f.jpg": "tabby cat",
    }  # fmt: skip
    assert index.ignored == 2


@pytest.mark.parametrize(
    ("name", "data"),
    [("classes.txt", "\ufeffcat\r\ndog\r\n".encode()), ("classes.json", b'["cat", "dog"]'),
     ("classes.json", b'{"0": "cat", "1": "dog"}'), ("classes.json", b'{"dog": 1, "cat": 0}')],
)  # fmt: skip
def test_numbered_classes_get_the_names_of_a_list(place: str, name: str, data: bytes) -> None:
    members = {f"{n}.{end}": b"%d" % (n % 2) for n in range(4) for end in ("jpg", "cls")}
    fill(place, {"x.tar": shard(members), name: data})
    assert labels(build_index(Data(uri=place))) == {f"x.tar/{n}.jpg": ("cat", "dog")[n % 2] for n in range(4)}
    fill(place, {"x.tar": shard(members | {"4.jpg": b"", "4.cls": b"2"})})
    assert "2 names, and not these labels: 2" in refusal(place)


def test_shards_may_be_named_one_by_one(place: str) -> None:
    fill(place, {f"in/train-{number:03d}.tar": shard(samples(4 * number, 4)) for number in range(8, 12)})
    assert len(build_index(Data(uri=f"{place}/in/train-{{009..011}}.tar")).table) == 12
    assert len(build_index(Data(uri=f"{place}/in/train-{{008,010}}.tar")).table) == 8
    index = build_index(Data(uri=f"{place}/in/train-009.tar"))
    assert index.uri == f"{open_store(place).uri}/in"
    assert index.key(0) == "train-009.tar/0036.jpg"
    text = refusal(f"{place}/in/train-{{008..013}}.tar")
    assert "2 of 6 shards are not there: train-012.tar, train-013.tar" in text
    assert "no such file" in refusal(f"{place}/in/train-7.tar")


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("a.tar", ["a.tar"]),
        ("{08..10}", ["08", "09", "10"]),
        ("{8..10}", ["8", "9", "10"]),
        ("{2..0}", ["2", "1", "0"]),
        ("{a,b}-{1..2}", ["a-1", "a-2", "b-1", "b-2"]),
    ],
)
def test_braces_mean_what_they_mean_in_a_shell(pattern: str, expected: list[str]) -> None:
    assert expand(pattern) == expected


# -- how much is read


def test_large_images_are_not_read(bucket: str, reads: Iterator[list[int]]) -> None:
    (sizes,) = reads
    files = {f"{number}.tar": shard(samples(20 * number, 20, bytes(120_000))) for number in range(2)}
    first = build_index(Data(uri=fill(bucket, files)))
    assert len(first.table) == 40
    assert sum(sizes) < sum(map(len, files.values())) / 6
    assert len(sizes) < 2 * 24
    sizes.clear()
    assert build_index(Data(uri=bucket)) == first
    assert sum(sizes) < 1000  # the lists of classes that are not there; what the shards hold was kept
    fill(bucket, {"1.tar": shard(samples(60, 6))})
    assert len(build_index(Data(uri=bucket)).table) == 26


def test_small_images_are_read_in_few_requests(bucket: str, reads: Iterator[list[int]]) -> None:
    (sizes,) = reads
    data = shard(samples(0, 400, bytes(3000)))
    build_index(Data(uri=fill(bucket, {"x.tar": data})))
    assert len([size for size in sizes if size]) < 8  # and some that find no list of classes, and no pack
    assert sum(sizes) < 1.1 * len(data)


# -- what is refused


def broken(name: str) -> bytes:
    good = samples(0, 6, bytes(2000))
    whole = shard(good)
    return {
        "no label": shard({name: data for name, data in good.items() if name not in ("0003.cls", "0004.cls")}),
        "empty label": shard(good | {"0003.cls": b" \n"}),
        "two images": shard(good | {"0002.png": b""}),
        "cut in an image": whole[: 3 * (512 + 2048 + 1024) + 700],
        "cut between samples": whole[: 3 * (512 + 2048 + 1024)],
        "cut to nothing": b"",
        "noise": bytes(range(256)) * 40,
        "damaged header": whole[:3584] + b"x" * 512 + whole[4096:],
        "not text": shard(good | {"0003.cls": b"\xff\xfe"}),
        "not json": shard(good | {"0006.jpg": b"", "0006.json": b"{"}),
        "a list": shard(good | {"0006.jpg": b"", "0006.json": json.dumps({"label": [1]}).encode()}),
        "no image": shard({name: data for name, data in good.items() if name.endswith("cls")}),
    }[name]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("no label", "x.tar | 2 samples have no label: 0003, 0004"),
        ("empty label", "x.tar | 1 samples have no label: 0003"),
        ("two images", "x.tar | 1 samples have more than one image: 0002"),
        ("cut in an image", "x.tar | the shard is damaged or cut short (unexpected end of data) after 0003.jpg"),
        ("cut between samples", "x.tar | the shard is damaged or cut short (unexpected end of data) after 0002.cls"),
        ("cut to nothing", "x.tar | the shard is damaged or cut short"),
        ("noise", "x.tar | the shard is damaged or cut short"),
        ("damaged header", "x.tar | the shard is damaged or cut short"),
        ("not text", "x.tar/0003.cls | the label cannot be read"),
        ("not json", "x.tar/0006.json | the label cannot be read"),
        ("a list", "x.tar/0006.json | the label is no text or whole number: [1]"),
        ("no image", "the 1 shards hold no image"),
    ],
)
def test_what_is_wrong_with_a_shard_is_named(tmp_path: Path, name: str, expected: str) -> None:
    assert expected in refusal(fill(str(tmp_path), {"x.tar": broken(name)}))


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        (["a.tar.gz", "b.tgz"], "compressed shards cannot be read: a.tar.gz, b.tgz"),
        (["a.tar", "b.tar.gz"], "compressed shards cannot be read: b.tar.gz"),
        (["train-0.tar", "more-0.tar"], "1 files do not say their split: more-0.tar"),
        (["val-0.tar", "test-0.tar"], "there is test, val, but no train"),
        (["train-0.tar", "val-0.tar", "valid-0.tar"], "several validation splits: val, valid"),
        (["a.gz"], "but no images (.gz)"),
    ],
)
def test_shards_that_cannot_be_used_are_named(tmp_path: Path, keys: list[str], expected: str) -> None:
    files = {key: shard(samples(4 * number, 4)) for number, key in enumerate(keys)}
    assert expected in refusal(fill(str(tmp_path), files))


def test_the_validation_shards_can_be_named(tmp_path: Path) -> None:
    place = fill(str(tmp_path), {f"{name}-0.tar": shard(samples(0, 4)) for name in ("train", "val", "dev")})
    assert "do not say their split: dev-0.tar" in refusal(place)
    index = build_index(Data(uri=place, val_split="dev"))
    assert {index.place(row).key for row in index.rows("val")} == {"dev-0.tar"}
    assert len(index.table) == 8
    assert "no split vl" in refusal(place, UserError, val_split="vl")


def test_an_image_in_a_shard_is_read_as_it_was_packed(tmp_path: Path) -> None:
    packed = {f"{number:03}": bytes([number]) * (700 + number) for number in range(6)}
    with tarfile.open(tmp_path / "train-0.tar", "w") as shard:
        for number, (name, data) in enumerate(packed.items()):
            for member, content in ((f"{name}.jpg", data), (f"{name}.cls", str(number % 2).encode())):
                about = tarfile.TarInfo(member)
                about.size = len(content)
                shard.addfile(about, io.BytesIO(content))
    index = build_index(Data(uri=str(tmp_path)))
    source = Source(index)
    assert sorted(bytes(source.read(row)) for row in range(len(index.table))) == sorted(packed.values())
