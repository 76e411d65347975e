"""What the index finds, how it splits, and how it says what is wrong with the data. The same on disk and on S3."""

from __future__ import annotations

import hashlib
import io
import json
import random
import subprocess
import sys
import tracemalloc
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import trainers.data.index
from launcher.errors import DataError, LaunchError, UserError
from launcher.s3 import s3_client
from launcher.spec import Data
from launcher.storage import Entry, LocalStore, open_store
from trainers.data import layouts
from trainers.data.index import Index, Place, build_index
from trainers.data.listing import Rows
from trainers.data.order import val_count
from trainers.data.sample import materialise, sample_facts

FLOWERS = [f"{label}/{number:02d}.jpg" for label in ("rose", "tulip") for number in range(10)]


def fill(place: str, keys: Iterable[str]) -> str:
    """Files whose content does not matter: the index reads none. Returns `place`."""
    store = open_store(place)
    for key in keys:
        store.write(key, key.encode())
    return place


def by_split(index: Index) -> dict[str, list[str]]:
    return {split: [index.key(row) for row in index.rows(split)] for split in ("train", "val", "test")}


def refusal(data: Data, kind: type[LaunchError] = DataError) -> str:
    """The whole text of the error that `build_index` raises; it always says where and what next."""
    with pytest.raises(kind) as raised:
        build_index(data)
    assert type(raised.value) is kind
    assert raised.value.where
    assert raised.value.hint
    return f"{raised.value.what} | {raised.value.hint}"


# -- layouts


def test_class_folders_are_classes_and_part_of_each_is_held_out(place: str) -> None:
    index = build_index(Data(uri=fill(place, [*FLOWERS, "rose/deeper/10.PNG", "README.md", "tulip/.hidden.jpg"])))
    assert index.classes == ("rose", "tulip")
    assert index.counts() == {
        "rose": {"train": 9, "val": 2, "test": 0},
        "tulip": {"train": 8, "val": 2, "test": 0},
    }
    assert index.facts() == {
        "images": 21, "bytes": 10 * 11 + 10 * 12 + 18, "classes": 2, "train": 17, "val": 4, "test": 0, "ignored": 1,
        "smallest_class": ["tulip", 10], "largest_class": ["rose", 11],
    }  # fmt: skip
    assert json.loads(json.dumps(index.facts())) == index.facts()
    assert index.targets.dtype == np.int64
    assert [index.classes[target] for target in index.targets] == index.table["label"].to_pylist()


def test_sizes_and_tags_are_those_of_the_listing(place: str) -> None:
    index = build_index(Data(uri=fill(place, FLOWERS)))
    entries = [Entry(row["key"], row["size"], row["etag"]) for row in index.table.to_pylist()]
    assert entries == list(open_store(place).list())
    assert index.uri == open_store(place).uri


@pytest.mark.parametrize("val", ["val", "valid", "validation"])
def test_split_folders_are_splits(place: str, val: str) -> None:
    keys = [f"{split}/{key}" for split in ("train", val, "test") for key in FLOWERS[::5]]
    found = by_split(build_index(Data(uri=fill(place, keys))))
    assert found["train"] == [f"train/{key}" for key in FLOWERS[::5]]
    assert found["val"] == [f"{val}/{key}" for key in FLOWERS[::5]]
    assert found["test"] == [f"test/{key}" for key in FLOWERS[::5]]


def test_without_a_validation_folder_it_is_carved_out_of_train(place: str) -> None:
    keys = [f"{split}/{key}" for split in ("train", "test") for key in FLOWERS]
    index = build_index(Data(uri=fill(place, keys)))
    assert index.counts()["rose"] == {"train": 8, "val": 2, "test": 10}
    assert all(key.startswith("test/") for key in by_split(index)["test"])


def test_the_validation_folder_can_be_named(tmp_path: Path) -> None:
    place = fill(str(tmp_path), [f"{split}/{key}" for split in ("train", "val", "test", "dev") for key in FLOWERS])
    for name in ("dev", "test", "val"):
        found = by_split(build_index(Data(uri=place, val_split=name)))
        assert {key.split("/")[0] for key in found["val"]} == {name}
        assert {key.split("/")[0] for key in found["test"]} == (set() if name == "test" else {"test"})
    assert "did you mean dev?" in refusal(Data(uri=place, val_split="def"), UserError)


def test_classes_may_be_named_like_splits(tmp_path: Path) -> None:
    keys = [f"{label}/{number}.jpg" for label in ("train", "bus", "test") for number in range(5)]
    assert build_index(Data(uri=fill(str(tmp_path), keys))).classes == ("bus", "test", "train")


def test_classes_can_be_chosen(place: str) -> None:
    fill(place, [*FLOWERS, *(f"daisy/{number}.jpg" for number in range(5)), "stray/notes.txt"])
    assert build_index(Data(uri=place, classes=("tulip", "daisy"))).classes == ("daisy", "tulip")
    text = refusal(Data(uri=place, classes=("tulip", "rosé")), UserError)
    assert "no class rosé" in text
    assert "did you mean rose?" in text


def test_links_that_lead_back_do_not_go_on_for_ever(tmp_path: Path) -> None:
    fill(str(tmp_path), FLOWERS)
    (tmp_path / "rose" / "up").symlink_to(tmp_path)
    assert build_index(Data(uri=str(tmp_path))).facts()["images"] == 20


# -- splitting


def test_the_split_does_not_depend_on_the_order_of_the_listing(tmp_path: Path) -> None:
    shuffled = FLOWERS.copy()
    random.Random(1).shuffle(shuffled)
    first = by_split(build_index(Data(uri=fill(str(tmp_path / "one"), FLOWERS))))
    second = by_split(build_index(Data(uri=fill(str(tmp_path / "two"), shuffled))))
    assert first == second


def test_a_manifest_splits_as_the_folder_does(tmp_path: Path) -> None:
    place = fill(str(tmp_path), FLOWERS)
    rows = "".join(f"{key},{key.split('/')[0]}\n" for key in reversed(FLOWERS))
    (tmp_path / "all.csv").write_text("path,label\n" + rows)
    assert by_split(build_index(Data(uri=f"{place}/all.csv"))) == by_split(build_index(Data(uri=place)))


@pytest.mark.parametrize("fraction", [0.05, 0.2, 0.5, 0.9])
def test_a_new_image_moves_at_most_one_other(tmp_path: Path, fraction: float) -> None:
    data = Data(uri=fill(str(tmp_path), [*FLOWERS[:2], *FLOWERS[10:]]), val_fraction=fraction)
    before = set(by_split(build_index(data))["val"])
    for number in range(40):
        added = f"rose/new-{number}.jpg"
        fill(str(tmp_path), [added])
        now = set(by_split(build_index(data))["val"])
        assert len((before ^ now) - {added}) <= 1
        before = now


@pytest.mark.parametrize(
    ("images", "fraction", "expected"), [(2, 0.01, 1), (2, 0.99, 1), (10, 0.2, 2), (1000, 0.2, 200)]
)
def test_each_class_keeps_an_image_on_both_sides(images: int, fraction: float, expected: int) -> None:
    assert val_count(images, fraction) == expected


# -- manifests


def as_csv(rows: list[dict[str, object]]) -> bytes:
    columns = list(rows[0])
    lines = [",".join(columns), *(",".join(str(row.get(name, "")) for name in columns) for row in rows)]
    return ("\ufeff" + "\r\n".join(lines) + "\r\n").encode()


def as_jsonl(rows: list[dict[str, object]]) -> bytes:
    return "\n\n".join(json.dumps(row) for row in rows).encode()


def as_parquet(rows: list[dict[str, object]]) -> bytes:
    out = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), out)
    return out.getvalue()


KINDS: dict[str, Callable[[list[dict[str, object]]], bytes]] = {"csv": as_csv, "jsonl": as_jsonl, "parquet": as_parquet}


@pytest.mark.parametrize("kind", KINDS)
def test_a_manifest_names_images_labels_and_splits(place: str, kind: str) -> None:
    keys = [f"images/{number}.jpg" for number in range(6)]
    fill(place, [*keys, "images/unnamed.jpg"])
    splits = ["train", "train", "valid", "Train", "train", "test"]
    rows: list[dict[str, object]] = [
        {"path": key, "label": number % 2, "split": split}
        for number, (key, split) in enumerate(zip(keys, splits, strict=True))
    ]
    open_store(place).write(f"lists/all.{kind}", KINDS[kind]([{**row, "path": f"../{row['path']}"} for row in rows]))
    open_store(place).write(f"all.{kind}", KINDS[kind](rows))
    index = build_index(Data(uri=f"{place}/all.{kind}"))
    assert index.classes == ("0", "1")
    assert by_split(index) == {
        "train": [keys[0], keys[1], keys[3], keys[4]], "val": [keys[2]], "test": [keys[5]]
    }  # fmt: skip
    assert index.table["size"].to_pylist() == [12] * 6
    elsewhere = build_index(Data(uri=f"{place}/lists/all.{kind}"))
    assert [elsewhere.key(row) for row in elsewhere.rows("val")] == [f"{open_store(place).uri}/{keys[2]}"]
    assert elsewhere.table["etag"].to_pylist() == index.table["etag"].to_pylist()


def test_a_manifest_may_name_images_anywhere(bucket: str, tmp_path: Path) -> None:
    fill(str(tmp_path / "here"), FLOWERS[:5])
    fill(str(tmp_path / "there"), FLOWERS[5:10])
    fill(bucket, FLOWERS[10:])
    paths = [
        *FLOWERS[:5],
        *(f"{tmp_path}/there/{key}" for key in FLOWERS[5:10]),
        *(f"{bucket}/{key}" for key in FLOWERS[10:]),
    ]
    (tmp_path / "here" / "all.csv").write_bytes(as_csv([{"path": path, "label": "rose" in path} for path in paths]))
    index = build_index(Data(uri=str(tmp_path / "here" / "all.csv")))
    assert sorted(index.table["key"].to_pylist()) == sorted(paths)
    assert index.classes == ("False", "True")


@pytest.mark.parametrize("kind", KINDS)
def test_a_manifest_may_weigh_its_images(tmp_path: Path, kind: str) -> None:
    fill(str(tmp_path), FLOWERS)
    weights = ["2", 0.5, " 1e3 ", "", *[1] * 16] if kind != "parquet" else [2.0, 0.5, 1000.0, None, *[1.0] * 16]
    rows: list[dict[str, object]] = [
        {"path": key, "label": key[0], "weight": weight} for key, weight in zip(FLOWERS, weights, strict=True)
    ]
    (tmp_path / f"all.{kind}").write_bytes(KINDS[kind](rows))
    index = build_index(Data(uri=str(tmp_path / f"all.{kind}")))
    assert index.table["weight"].to_pylist() == [2.0, 0.5, 1000.0, None, *[1.0] * 16]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("path,label,weight\na,a,0\nb,b,-1\nc,c,x\nd,d,1\ne,e,nan\nf,f,inf\n",
         "weight of rows 2 (0), 3 (-1), 4 (x), 6 (nan), 7 (inf) is no positive number"),
        ("path,label\n", "no rows"),
        ("", "no rows"),
        ("file,label\na,b\n", "no column path"),
        ("path,labels\na,b\n", "did you mean labels?"),
        ("path,label\nrose/00.jpg,\n,rose\nrose/01.jpg,rose\n", "rows 2, 3 lack a path or a label"),
        ("path,label,split\nrose/00.jpg,a,train\nrose/01.jpg,a,trian\n", "split of rows 3 is none of"),
        (
            "path,label\nrose/00.jpg,a\nrose/77.jpg,b\n./x.jpg,b\n",
            "2 files of the manifest do not exist: rose/77.jpg (row 3)",
        ),
        ("path,label\nrose/00.jpg,a\n./rose/00.jpg,b\n", "named more than once: rose/00.jpg (row 3)"),
        ("path,label\nrose/00.jpg,a\nrose/01.jpg,a\n", "only one class: a"),
        ("path,label\nrose/00.jpg,\xff\n", "cannot be read"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_manifest_is_named_by_row(place: str, text: str, expected: str) -> None:
    fill(place, FLOWERS)
    open_store(place).write("all.csv", text.encode("latin-1"))
    assert expected in refusal(Data(uri=f"{place}/all.csv"))


@pytest.mark.parametrize(
    ("name", "data"), [("a.jsonl", b'{"path": '), ("a.jsonl", b"[1]"), ("a.parquet", b"no parquet")]
)
def test_a_damaged_manifest_is_a_data_error(tmp_path: Path, name: str, data: bytes) -> None:
    (tmp_path / name).write_bytes(data)
    assert "cannot be read" in refusal(Data(uri=str(tmp_path / name)))


def test_a_missing_manifest_names_the_nearest_file(tmp_path: Path) -> None:
    (tmp_path / "flowers.csv").write_text("")
    assert "did you mean flowers.csv?" in refusal(Data(uri=str(tmp_path / "flower.csv")))


# -- what is refused


def test_nothing_there_names_what_is_beside(place: str) -> None:
    fill(place, [f"flowers/{key}" for key in FLOWERS])
    assert "did you mean flowers?" in refusal(Data(uri=f"{place}/flower"))
    assert "flowers" in refusal(Data(uri=f"{place}/xyz"))


def test_an_empty_bucket_and_a_missing_bucket_are_told_apart(bucket: str) -> None:
    assert "nothing here" in refusal(Data(uri=bucket))
    assert "no bucket" in refusal(Data(uri="s3://bucket-that-is-not-there/x"))


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        (["a/1.npy", "a/2.txt"], "2 files, but no images (.npy, .txt)"),
        (["images.zip"], "unpack"),
        (["1.jpg", "2.jpg", *FLOWERS], "2 images lie in no class folder: 1.jpg, 2.jpg"),
        (["train/1.jpg", *(f"train/{key}" for key in FLOWERS)], "1 images lie in no class folder: train/1.jpg"),
        (FLOWERS[:10], "only one class: rose"),
        ([*FLOWERS, "notes/a.txt", "more/b.txt"], "2 class folders hold no image: more, notes"),
        ([*(f"train/{key}" for key in FLOWERS), "val/rose/1.jpg", "val/tulip/a.txt"], "hold no image: val/tulip"),
        ([*(f"train/{key}" for key in FLOWERS), "val/oak/1.jpg", "val/elm/1.jpg"],
         "2 classes have no training image: val/elm, val/oak"),
        ([*FLOWERS, "oak/1.jpg", "elm/1.jpg"], "2 classes have a single image"),
        ([f"{split}/{key}" for split in ("training", "val") for key in FLOWERS], "val, but no train"),
        ([f"{split}/{key}" for split in ("Train", "Val") for key in FLOWERS], "Train, Val, but no train"),
        ([f"{split}/{key}" for split in ("train", "dev") for key in FLOWERS], "--set data.val_split=dev"),
        ([f"{split}/{key}" for split in ("train", "val", "valid") for key in FLOWERS],
         "several validation splits: val, valid"),
        ([f"{split}/{key}" for split in ("train", "val", "more") for key in FLOWERS], "beside train there is more"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_folders_is_named(place: str, keys: list[str], expected: str) -> None:
    assert expected in refusal(Data(uri=fill(place, keys)))


def test_an_empty_class_folder_is_named(tmp_path: Path) -> None:
    fill(str(tmp_path), FLOWERS)
    (tmp_path / "daisy").mkdir()
    assert "hold no image: daisy" in refusal(Data(uri=str(tmp_path)))
    assert build_index(Data(uri=str(tmp_path), classes=("rose", "tulip"))).classes == ("rose", "tulip")


def test_many_problems_of_a_kind_are_counted(tmp_path: Path) -> None:
    text = refusal(Data(uri=fill(str(tmp_path), [*FLOWERS, *(f"single-{n:02d}/1.jpg" for n in range(30))])))
    assert "30 classes have a single image" in text
    assert "single-00, single-01, single-02, single-03, single-04 and 25 more" in text


def test_objects_cannot_lead_to_other_places(bucket: str) -> None:
    fill(bucket, FLOWERS)
    for key in ("data//etc/cat/1.png", "data/s3://other/1.png", *(f"data/{key}" for key in FLOWERS)):
        s3_client().put_object(Bucket=bucket.removeprefix("s3://"), Key=key, Body=b"")
    text = refusal(Data(uri=f"{bucket}/data"))
    assert "2 images lie in no class folder: /etc/cat/1.png, s3://other/1.png" in text


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "image.jpg").write_text("")
    assert "not a folder or a manifest" in refusal(Data(uri=str(tmp_path / "image.jpg")))


def test_a_val_split_needs_splits(tmp_path: Path) -> None:
    assert "no split dev" in refusal(Data(uri=fill(str(tmp_path), FLOWERS), val_split="dev"), UserError)
    (tmp_path / "all.csv").write_bytes(as_csv([{"path": key, "label": key[0]} for key in FLOWERS]))
    assert "no split dev" in refusal(Data(uri=str(tmp_path / "all.csv"), val_split="dev"), UserError)


# -- storing it, and the sample


def test_what_is_saved_is_loaded(place: str, tmp_path: Path) -> None:
    index = build_index(Data(uri=fill(str(tmp_path / "data"), [*FLOWERS, "x/ünïcode,\n1.jpg", "x/2.jpg"])))
    index.save(open_store(place))
    loaded = Index.load(open_store(place))
    assert loaded == index
    assert loaded.facts() == index.facts()
    assert (loaded.targets == index.targets).all()
    with pytest.raises(FileNotFoundError):
        Index.load(open_store(place), "other.parquet")


def test_an_index_saved_before_images_had_ids_is_loaded(tmp_path: Path) -> None:
    index = build_index(Data(uri=fill(str(tmp_path / "data"), FLOWERS)))
    old = Index(index.uri, index.classes, index.table.select(["key", "size", "etag", "label", "split"]), index.ignored)
    old.save(open_store(tmp_path))
    assert Index.load(open_store(tmp_path)) == index


def test_an_id_names_the_content_by_address_tag_and_offset(place: str) -> None:
    index = build_index(Data(uri=fill(place, FLOWERS)))
    row = index.table.to_pylist()[7]
    assert (row["object"], row["offset"], row["weight"]) == (None, 0, None)
    address = f"{open_store(place).uri}/{row['key']}"
    expected = hashlib.blake2b(f"{address}\0{row['etag']}\0{0}".encode(), digest_size=16).digest()
    assert index.ids[7].tobytes() == row["id"] == expected
    assert index.ids.shape == (20, 16)
    assert index.place(7) == Place(open_store(place).uri, row["key"], row["etag"], 0, row["size"])
    part = Index(index.uri, index.classes, index.table.slice(5))
    assert (part.ids == index.ids[5:]).all()


def test_an_absolute_path_has_the_id_of_its_own_place(tmp_path: Path) -> None:
    place = fill(str(tmp_path / "data"), FLOWERS)
    (tmp_path / "lists").mkdir()
    rows = "".join(f"{place}/{key},{key.split('/')[0]}\n" for key in FLOWERS)
    (tmp_path / "lists" / "all.csv").write_text("path,label\n" + rows)
    named, plain = (build_index(Data(uri=uri)) for uri in (str(tmp_path / "lists" / "all.csv"), place))
    assert (named.ids == plain.ids).all()
    assert named.place(3) == Place("/", f"{place}/{FLOWERS[3]}"[1:], plain.place(3).etag, 0, plain.place(3).size)


def test_the_sample_is_the_same_everywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for name in ("one", "two"):
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / name))
        found.append(build_index(Data(uri="sample://digits")))
        assert materialise("digits") == tmp_path / name / "raylaunch" / "samples" / "digits"
    assert found[0] == found[1]
    assert found[0].facts() == sample_facts("digits")
    assert build_index(Data(uri="sample://digits", val_fraction=0.37)).facts() == sample_facts("digits", 0.37)
    contents = [[path.read_bytes() for path in sorted((tmp_path / name).rglob("*.png"))] for name in ("one", "two")]
    assert contents[0] == contents[1]
    assert [path.name for path in (tmp_path / "one" / "raylaunch" / "samples").iterdir()] == ["digits"]


def test_an_unknown_sample_names_the_nearest() -> None:
    assert "did you mean digits?" in refusal(Data(uri="sample://digit"), UserError)


def test_a_dry_run_imports_nothing_heavy(tmp_path: Path) -> None:
    fill(str(tmp_path), FLOWERS)
    code = (
        "import sys; from launcher.spec import Data; from trainers.data import images, order, sample, source, index;"
        f"index.build_index(Data(uri={str(tmp_path)!r})).facts(); sample.sample_facts('digits');"
        "print([m for m in ('torch', 'torchvision', 'timm', 'ray', 'sklearn', 'boto3') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False)
    assert (done.stdout.strip(), done.stderr) == ("[]", "")


# -- at the size of ImageNet

LARGE = """
import sys, time
from pathlib import Path
from launcher.spec import Data
from launcher.storage import Entry, LocalStore
from trainers.data import layouts
from trainers.data.index import Index, build_index

class Bucket(LocalStore):
    def list(self, prefix=""):
        for label in range(1000):
            for number in range(1300):
                key = f"train/n{label:08d}/n{label:08d}_{number:05d}.JPEG"
                yield Entry(key, 110_000 + number, f"{hash((label, number)) & (1 << 64) - 1:032x}")

layouts.open_store = lambda uri: Bucket(Path(uri))
index = build_index(Data(uri=sys.argv[1]))
index.save(LocalStore(Path(sys.argv[1])))
began = time.process_time()
loaded = Index.load(LocalStore(Path(sys.argv[1])))
seconds = time.process_time() - began
assert loaded.facts()["images"] == len(loaded.ids) == 1_300_000
# The peak that getrusage gives is that of the process which started this one, should that have been larger.
peak = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
print(seconds, int(peak.split()[1]) / 1024)
"""


@pytest.mark.slow
def test_an_index_of_a_million_images_fits_in_a_gigabyte(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", LARGE, str(tmp_path)], capture_output=True, text=True, check=True)
    seconds, megabytes = map(float, done.stdout.split())
    assert megabytes < 1000
    assert seconds < 2


def test_an_index_holds_no_python_object_for_each_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Bucket(LocalStore):
        def list(self, prefix: str = "") -> Iterator[Entry]:
            assert not prefix
            for number in range(20_000):
                yield Entry(f"{number // 1000:04d}/{number:032d}.jpg", number, f"{number:032x}")

    monkeypatch.setattr(layouts, "open_store", lambda uri: Bucket(Path(uri)))
    monkeypatch.setattr(Rows, "CHUNK", 256)
    monkeypatch.setattr(trainers.data.index, "PIECE", 256)
    build_index(Data(uri=fill(str(tmp_path), ["0000/1.jpg"])))
    tracemalloc.start()
    index = build_index(Data(uri=str(tmp_path)))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert index.facts()["images"] == 20_000
    assert index.table.nbytes / 20_000 < 180
    assert peak / 20_000 < 200
