"""Parquet files with images: what is found in them, how little is read for it, and what is said of bad ones."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from launcher.errors import DataError, LaunchError, UserError
from launcher.s3 import s3_client
from launcher.spec import Data
from launcher.storage import Store, open_store
from trainers.data.index import Index, build_index
from trainers.data.parquet import Groups, group_of

IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
NAMES = ("cat", "dog")


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture
def reads() -> Iterator[list[int]]:
    """The bytes of each GET that this process sends to S3, in the order of the answers."""
    found: list[int] = []

    def count(parsed: dict[str, int], **_: object) -> None:
        found.append(parsed.get("ContentLength", 0))

    s3_client().meta.events.register("after-call.s3.GetObject", count)
    return iter([found])


def images(first: int, count: int, size: int = 0) -> list[bytes | None]:
    return [b"image %d" % number + bytes(size) for number in range(first, first + count)]


def said(**columns: dict[str, Any]) -> dict[str, str]:
    """The metadata that `datasets` writes for these features."""
    return {"huggingface": json.dumps({"info": {"features": columns}})}


CLASSES = {"_type": "ClassLabel", "names": list(NAMES)}


def table(pictures: Sequence[bytes | None], labels: Sequence[object], names: Sequence[str] | None = NAMES) -> pa.Table:
    """A table as `datasets` writes it, with numbered classes; without its metadata if there are no names."""
    column = pa.array([{"bytes": picture, "path": f"{n}.jpg"} for n, picture in enumerate(pictures)], IMAGE)
    about = said(image={"_type": "Image"}, label={"_type": "ClassLabel", "names": names}) if names else None
    return pa.table({"image": column, "label": pa.array(labels)}).replace_schema_metadata(about)


def alternating(first: int, count: int, size: int = 0) -> pa.Table:
    return table(images(first, count, size), [number % 2 for number in range(count)])


def packed(content: pa.Table, rows: int = 4, **options: Any) -> bytes:
    """A Parquet file with so many rows in each row group."""
    out = io.BytesIO()
    pq.write_table(content, out, row_group_size=rows, **options)
    return out.getvalue()


def fill(place: str, files: dict[str, bytes]) -> str:
    store = open_store(place)
    for key, data in files.items():
        store.write(key, data)
    return place


def read(store: Store, groups: Groups, key: str, etag: str, group: int) -> list[bytes]:
    return groups.images(group, store.read(key, etag or None, groups.span(group)))


def contents(index: Index) -> dict[str, bytes]:
    """The image of each row, read by its place."""
    found = {}
    for row in range(len(index.table)):
        place = index.place(row)
        store = open_store(place.uri)
        group, inner = group_of(place.offset)
        groups = Groups(store, place.key, place.etag)
        found[index.key(row)] = read(store, groups, place.key, place.etag, group)[inner]
    return found


def labels(index: Index) -> list[str]:
    found: list[str] = index.table["label"].to_pylist()
    return found


def refusal(uri: str, kind: type[LaunchError] = DataError, **data: str) -> str:
    with pytest.raises(kind) as raised:
        build_index(Data(uri=uri, **data))  # type: ignore[arg-type]
    assert type(raised.value) is kind
    assert raised.value.hint
    return f"{raised.value.where} | {raised.value.what} | {raised.value.hint}"


def test_images_classes_and_splits_are_found_as_datasets_writes_them(place: str) -> None:
    files = {
        "data/train-00000-of-00002.parquet": packed(alternating(0, 10)),
        "data/train-00001-of-00002.parquet": packed(alternating(10, 6), rows=100),
        "data/validation-00000-of-00001.parquet": packed(alternating(16, 4)),
        "data/test-00000-of-00001.parquet": packed(alternating(20, 4)),
        "README.md": b"",
    }
    index = build_index(Data(uri=fill(place, files)))
    assert index.classes == ("cat", "dog")
    facts = index.facts()
    assert [facts[name] for name in ("images", "train", "val", "test", "ignored")] == [24, 16, 4, 4, 1]
    assert {index.place(row).key for row in index.rows("val")} == {"data/validation-00000-of-00001.parquet"}
    found = contents(index)
    assert found["data/train-00000-of-00002.parquet/000000009"] == b"image 9"
    assert sorted(found.values()) == sorted(images(0, 24))  # type: ignore[type-var]
    of_key = dict(zip(index.table["key"].to_pylist(), labels(index), strict=True))
    assert all(of_key[key] == NAMES[int(image.split()[1]) % 2] for key, image in found.items())
    assert all(index.place(row).shared for row in range(24))
    assert len({bytes(one) for one in index.ids}) == 24
    assert index.table["key"].to_pylist() == sorted(index.table["key"].to_pylist())


@pytest.mark.parametrize(
    "options",
    [{}, {"compression": "zstd"}, {"compression": "none", "use_dictionary": False}, {"version": "1.0"},
     {"data_page_version": "2.0", "data_page_size": 300}, {"write_page_index": True, "write_statistics": False}],
)  # fmt: skip
def test_a_row_group_is_read_however_it_was_written(tmp_path: Path, options: dict[str, Any]) -> None:
    pictures = [bytes([number]) * (number % 7 * 100) for number in range(50)]
    store = open_store(tmp_path)
    store.write("x.parquet", packed(table(pictures, [0, 1] * 25), 12, **options))
    (entry,) = store.list()
    groups = Groups(store, entry.key, entry.etag)
    found = [image for group in range(5) for image in read(store, groups, entry.key, entry.etag, group)]
    assert found == pictures
    spans = [groups.span(group) for group in range(5)]
    assert all(first[1] <= second[0] for first, second in pairwise(spans))


@pytest.mark.parametrize(
    ("column", "kind"),
    [("image", IMAGE), ("img", IMAGE), ("image", pa.binary()), ("image", pa.large_binary()),
     ("picture", pa.struct([("path", pa.string()), ("bytes", pa.large_binary()), ("more", pa.int32())])),
     ("image", pa.binary_view())],
)  # fmt: skip
def test_a_column_of_images_may_be_structs_or_bytes(place: str, column: str, kind: pa.DataType) -> None:
    pictures = [{"bytes": one} if pa.types.is_struct(kind) else one for one in images(0, 8)]
    content = pa.table({"label": ["cat", "dog"] * 4, column: pa.array(pictures, kind), "bytes": ["other"] * 8})
    index = build_index(Data(uri=fill(place, {"x.parquet": packed(content)})))
    assert [*contents(index).values()] == images(0, 8)
    assert set(labels(index)) == {"cat", "dog"}


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (pa.array([3, 10] * 3, pa.uint8()), ["3", "10"] * 3),
        (pa.array([" tabby cat", "dog"] * 3), ["tabby cat", "dog"] * 3),
        (pa.array(["cat", "dog"] * 3).dictionary_encode(), ["cat", "dog"] * 3),
        (pa.array(["cat", "dog"] * 3, pa.large_string()), ["cat", "dog"] * 3),
        (pa.array(["cat", "dog"] * 3, pa.string_view()), ["cat", "dog"] * 3),
    ],
)
def test_classes_without_names_are_called_by_their_number_or_text(
    tmp_path: Path, values: pa.Array, expected: list[str]
) -> None:
    content = pa.table({"image": pa.array(images(0, 6)), "class": values})
    assert labels(build_index(Data(uri=fill(str(tmp_path), {"x.parquet": packed(content)})))) == expected


def test_files_may_be_named_one_by_one(place: str) -> None:
    fill(place, {f"in/train-{number:05d}.parquet": packed(alternating(8 * number, 8)) for number in range(3)})
    assert len(build_index(Data(uri=f"{place}/in/train-00001.parquet")).table) == 8
    index = build_index(Data(uri=f"{place}/in/train-{{00001..00002}}.parquet"))
    assert sorted(contents(index).values()) == sorted(images(8, 16))  # type: ignore[type-var]
    assert "1 of 2 shards are not there" in refusal(f"{place}/in/train-{{00002..00003}}.parquet")
    assert "there is no such manifest" in refusal(f"{place}/in/train-7.parquet")


def test_a_parquet_file_of_paths_is_still_a_manifest(place: str) -> None:
    paths = pa.table({"path": [f"{n}.jpg" for n in range(4)], "label": ["cat", "dog"] * 2})
    files = {f"{number}.jpg": b"" for number in range(4)}
    index = build_index(Data(uri=fill(place, files | {"list.parquet": packed(paths)}) + "/list.parquet"))
    assert index.table["object"].null_count == 4


def test_test_images_without_a_label_are_left_out(tmp_path: Path) -> None:
    files = {"train-0.parquet": packed(alternating(0, 8)), "test-0.parquet": packed(table(images(8, 4), [-1] * 4))}
    index = build_index(Data(uri=fill(str(tmp_path), files)))
    assert (index.facts()["test"], index.facts()["images"], index.ignored) == (0, 8, 4)
    files["test-0.parquet"] = packed(table(images(8, 4), [-1, 0, 1, None]))
    index = build_index(Data(uri=fill(str(tmp_path), files)))
    assert [contents(index)[index.key(row)] for row in index.rows("test")] == images(9, 2)


# -- how much is read


def test_images_are_not_read_for_the_index_and_nothing_twice(bucket: str, reads: Iterator[list[int]]) -> None:
    (sizes,) = reads
    noise = [bytes([number]) + bytes(99_999) for number in range(40)]
    content = table(noise, [0, 1] * 20)
    files = {f"train-{n}.parquet": packed(content, 10, compression="none", use_dictionary=False) for n in range(2)}
    index = build_index(Data(uri=fill(bucket, files)))
    assert index.facts()["bytes"] == pytest.approx(80 * 100_000, rel=0.01)
    assert sum(sizes) < sum(map(len, files.values())) / 20
    assert len(sizes) <= 2 * (2 + 4)
    sizes.clear()
    assert build_index(Data(uri=bucket)) == index
    assert sizes == []
    fill(bucket, {"train-1.parquet": packed(alternating(0, 4))})
    assert len(build_index(Data(uri=bucket)).table) == 44


def test_a_row_group_is_read_by_one_request_of_its_size(bucket: str, reads: Iterator[list[int]]) -> None:
    (sizes,) = reads
    store = open_store(fill(bucket, {"x.parquet": packed(alternating(0, 40, 50_000), 10, compression="none")}))
    (entry,) = store.list()
    groups = Groups(store, entry.key, entry.etag)
    assert sum(sizes) <= 65_536 + 16_384
    sizes.clear()
    assert read(store, groups, entry.key, entry.etag, 2) == images(20, 10, 50_000)
    assert len(sizes) == 1
    assert sizes[0] == pytest.approx(500_000, rel=0.01)


# -- what is refused


def odd(name: str) -> bytes:
    """A file that cannot be used."""
    good = alternating(0, 6)
    plain = good.replace_schema_metadata()
    whole = packed(good)
    broken = {
        "cut": whole[: len(whole) // 2],
        "cut to nothing": b"",
        "noise": bytes(range(256)) * 40,
        "damaged footer": whole[:-200] + b"x" * 190 + whole[-10:],
        "footer of no size": whole[:-8] + b"\xff\xff\xff\x7fPAR1",
    }
    if name in broken:
        return broken[name]
    labels: dict[str, list[Any]] = {
        "too large": [0, 1, 2, 0, 1, 7], "negative": [0, 1, -2, 0, 1, 0], "no label": [0, None, -1, 0, 1, 0],
    }  # fmt: skip
    if name in labels:
        return packed(table(images(0, 6), labels[name]))
    several = {"image": good["image"], "fine": good["label"], "coarse": good["label"]}
    tables = {
        "no images": good.select(["label"]),
        "no labels": good.select(["image"]),
        "texts for images": good.set_column(0, "image", [["a.jpg"] * 6]),
        "two images": plain.append_column("depth", good["image"]).rename_columns(["left", "label", "right"]),
        "two labels": pa.table(several, metadata=said(image={"_type": "Image"}, fine=CLASSES, coarse=CLASSES)),
        "empty label": plain.set_column(1, "label", [["cat", "", " ", "dog", "cat", "dog"]]),
        "fractions": plain.set_column(1, "label", [[0.5] * 6]),
        "no image": table([*images(0, 4), None, None], [0, 1] * 3),
        "no names": good.replace_schema_metadata(said(label={"_type": "ClassLabel", "names": 3})),
        "empty": good.slice(0, 0),
    }
    return packed(tables[name])


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("no images", "x.parquet | there is no column of images: the columns are label | name it image"),
        ("texts for images", "x.parquet | there is no column of images: the columns are image, label"),
        ("no labels", "x.parquet | there is no column of labels: the columns are image | name it label"),
        ("two images", "x.parquet | there are several columns of images: left, right | name the one to use image"),
        ("two labels", "x.parquet | there are several columns of labels: fine, coarse"),
        ("too large", "the schema names 2 classes, and not these labels: 2 (row 2), 7 (row 5)"),
        ("negative", "the schema names 2 classes, and not these labels: -2 (row 2)"),
        ("no label", "x.parquet | 2 rows have no label: 1, 2"),
        ("empty label", "x.parquet | 2 rows have no label: 1, 2"),
        ("fractions", "the labels in the column label are no text or whole numbers, but double"),
        ("no image", "x.parquet | 2 rows have no image in the column image.bytes"),
        ("no names", "the names of the classes in the column label are no list"),
        ("empty", "the 1 Parquet files hold no labelled image"),
        ("cut", "x.parquet | the Parquet file cannot be read, it is damaged or none"),
        ("cut to nothing", "x.parquet | the Parquet file cannot be read, it is damaged or none"),
        ("noise", "x.parquet | the Parquet file cannot be read, it is damaged or none"),
        ("damaged footer", "x.parquet | the Parquet file cannot be read, it is damaged or none"),
        ("footer of no size", "x.parquet | the Parquet file cannot be read, it is damaged or none"),
    ],
)
def test_what_is_wrong_with_a_file_is_named(tmp_path: Path, name: str, expected: str) -> None:
    text = refusal(fill(str(tmp_path), {"x.parquet": odd(name)}))
    assert expected in text
    assert len(text) < 500


def test_named_and_numbered_classes_are_not_mixed(tmp_path: Path) -> None:
    files = {"a.parquet": packed(alternating(0, 6)), "b.parquet": packed(alternating(6, 6).replace_schema_metadata())}
    assert "some of the files name their classes, and others number them" in refusal(fill(str(tmp_path), files))


def test_files_that_do_not_say_their_split_are_named(tmp_path: Path) -> None:
    files = {key: packed(alternating(0, 4)) for key in ("train-0.parquet", "more-0.parquet")}
    assert "1 files do not say their split: more-0.parquet" in refusal(fill(str(tmp_path), files))
    assert "no split vl" in refusal(str(tmp_path), UserError, val_split="vl")


def test_a_changed_a_missing_and_a_damaged_file_are_told_when_they_are_read(place: str) -> None:
    store = open_store(fill(place, {"x.parquet": packed(alternating(0, 8, 5000), compression="none")}))
    (entry,) = store.list()
    groups = Groups(store, "x.parquet", entry.etag)
    data = bytearray(store.read("x.parquet", span=groups.span(1)))
    data[: len(data) // 2] = bytes(len(data) // 2)
    for part in (bytes(data), bytes(data[:100])):
        with pytest.raises(DataError, match="damaged"):
            groups.images(1, part)
    store.write("x.parquet", packed(alternating(0, 12)))
    with pytest.raises(DataError, match="changed after the run was planned"):
        Groups(store, "x.parquet", entry.etag)
    assert len(read(store, Groups(store, "x.parquet", ""), "x.parquet", "", 2)) == 4
    store.delete("x.parquet")
    with pytest.raises(DataError, match="gone"):
        Groups(store, "x.parquet", entry.etag)


def test_a_row_without_an_image_is_empty_where_the_footer_does_not_tell(tmp_path: Path) -> None:
    data = packed(table([b"one", None, b"three", b"four"], [0, 1] * 2), write_statistics=False)
    index = build_index(Data(uri=fill(str(tmp_path), {"x.parquet": data})))
    assert [*contents(index).values()] == [b"one", b"", b"three", b"four"]


def test_the_module_loads_without_pyarrow() -> None:
    code = "import sys, trainers.data.parquet; assert 'pyarrow' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
