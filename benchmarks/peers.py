"""Other data loaders, each doing what `turns.py` asks for, as its documentation says and in its fastest form.

    python -m benchmarks.peers NAME FOLDER [ENDPOINT]

It runs where `peers.txt` is installed and knows nothing of this project. With an endpoint, the loader reads the
bucket `FOLDER/bench` from there, without a cache to begin with; else files in that folder, or whatever format it has
made of them. Two processes or threads, random resized crops, half of them mirrored, uint8, unless said otherwise.
"""

from __future__ import annotations

import io
import random
import sys
import tarfile
import tempfile
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from importlib import import_module
from itertools import count
from pathlib import Path
from typing import Any

from benchmarks.turns import BATCH, SIDE, WORKERS, take_turns

Epoch = Callable[[], Iterable[Any]]
Sample = tuple[bytes, int]


def files(folder: Path) -> list[tuple[Path, int]]:
    """The images and their classes."""
    paths = sorted((folder / "bench" / "files").glob("*/*.jpg"))
    return [(path, int(path.parent.name.removeprefix("class_"))) for path in paths]


class Decoding:
    """A JPEG to a crop, by torchvision's second transforms on tensors, its fastest."""

    def __init__(self) -> None:
        v2 = import_module("torchvision.transforms.v2")
        self._change = v2.Compose([v2.RandomResizedCrop(SIDE, antialias=True), v2.RandomHorizontalFlip()])

    def __call__(self, data: bytes) -> Any:
        import torch

        found = import_module("torchvision.io")
        buffer = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        return self._change(found.decode_jpeg(buffer, mode=found.ImageReadMode.RGB))

    def sample(self, sample: Any) -> tuple[Any, int]:
        """The same for a pair of a JPEG and a class."""
        return self(sample[0]), int(sample[1])


def batches(dataset: Any, **settings: Any) -> Any:
    """torch's own loader with two processes that stay."""
    data = import_module("torch.utils.data")
    return data.DataLoader(dataset, **{"batch_size": BATCH, "num_workers": WORKERS, "persistent_workers": True,
                                       **settings})  # fmt: skip


# -- files


def torchvision_v2(folder: Path, _: str) -> Epoch:
    """ImageFolder that decodes to tensors, and transforms on tensors."""
    torchvision = import_module("torchvision")
    io_, decoding = import_module("torchvision.io"), Decoding()
    dataset = torchvision.datasets.ImageFolder(
        folder / "bench" / "files", transform=decoding._change,
        loader=lambda path: io_.decode_jpeg(io_.read_file(path), mode=io_.ImageReadMode.RGB),
    )  # fmt: skip
    loader = batches(dataset, shuffle=True)
    return lambda: loader


def torchvision_v1(folder: Path, _: str) -> Epoch:
    """ImageFolder as in every tutorial: Pillow."""
    torchvision = import_module("torchvision")
    t = torchvision.transforms
    change = t.Compose([t.RandomResizedCrop(SIDE), t.RandomHorizontalFlip(), t.PILToTensor()])
    loader = batches(torchvision.datasets.ImageFolder(folder / "bench" / "files", transform=change), shuffle=True)
    return lambda: loader


def timm(folder: Path, _: str) -> Epoch:
    """create_loader, up to where it would move batches to the GPU and normalise them there."""
    data = import_module("timm.data")
    dataset = data.create_dataset("", root=str(folder / "bench" / "files"))
    loader = data.create_loader(
        dataset, (3, SIDE, SIDE), BATCH, is_training=True, use_prefetcher=True, color_jitter=None,
        interpolation="bilinear", num_workers=WORKERS, persistent_workers=True,
        device=import_module("torch").device("cpu"),
    )  # fmt: skip
    return lambda: loader.loader


def dali(folder: Path, _: str) -> Epoch:
    """DALI on the CPU: decodes only what the crop needs."""
    fn, pipelines = import_module("nvidia.dali.fn"), import_module("nvidia.dali")

    @pipelines.pipeline_def(batch_size=BATCH, num_threads=WORKERS, device_id=None)  # type: ignore[untyped-decorator]
    def pipeline() -> Any:
        data, labels = fn.readers.file(file_root=str(folder / "bench" / "files"), random_shuffle=True, name="files")
        images = fn.decoders.image_random_crop(data, random_area=[0.08, 1.0], random_aspect_ratio=[3 / 4, 4 / 3])
        images = fn.resize(images, size=[SIDE, SIDE], antialias=True)
        return fn.flip(images, horizontal=fn.random.coin_flip(probability=0.5)), labels

    built = pipeline()
    built.build()
    steps = -(-built.epoch_size("files") // BATCH)
    return lambda: (built.run() for _ in range(steps))


def spdl(folder: Path, _: str) -> Epoch:
    """SPDL's pipeline of threads around torchvision's decoder and transforms."""
    torch, pipeline = import_module("torch"), import_module("spdl.pipeline")
    torch.set_num_threads(1)
    decoding, found = Decoding(), files(folder)

    def one(item: tuple[Path, int]) -> tuple[Any, int]:
        return decoding(item[0].read_bytes()), item[1]

    def join(items: list[tuple[Any, int]]) -> tuple[Any, Any]:
        return torch.stack([image for image, _ in items]), torch.tensor([label for _, label in items])

    def epoch() -> Iterator[Any]:
        order = random.sample(found, len(found))
        builder = pipeline.PipelineBuilder().add_source(order).pipe(one, concurrency=WORKERS)
        built = builder.aggregate(BATCH).pipe(join).add_sink(3).build(num_threads=WORKERS)
        with built.auto_stop():
            yield from built.get_iterator()

    return epoch


# -- formats of their own


def made(target: Path, make: Callable[[Path], None]) -> Path:
    """What `make` writes, made once."""
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        half = target.with_name(f"half-{target.name}")
        make(half)
        half.rename(target)
    return target


def webdataset(folder: Path, endpoint: str) -> Epoch:
    """Tar shards; from S3 by its own way, curl, into a cache of shards."""
    wds = import_module("webdataset")
    shards = sorted((folder / "bench" / "tar").glob("*.tar"))
    urls = [f"{endpoint}/bench/tar/{shard.name}" if endpoint else str(shard) for shard in shards]
    cached = {"cache_dir": tempfile.mkdtemp(dir=folder)} if endpoint else {}
    dataset = wds.WebDataset(urls, shardshuffle=len(urls), **cached).shuffle(500).to_tuple("jpg", "cls")
    dataset = dataset.map(Decoding().sample).batched(BATCH)
    loader = wds.WebLoader(dataset, batch_size=None, num_workers=WORKERS, persistent_workers=True)
    return lambda: loader


def mosaicml(folder: Path, endpoint: str) -> Epoch:
    """mosaicml-streaming, in its MDS format."""
    streaming = import_module("streaming")

    def make(target: Path) -> None:
        columns = {"image": "bytes", "label": "int"}
        with streaming.MDSWriter(out=str(target), columns=columns, size_limit=1 << 26) as writer:
            for path, label in random.Random(0).sample(files(folder), len(files(folder))):
                writer.write({"image": path.read_bytes(), "label": label})

    local = made(folder / "bench" / "mds", make)
    decoding = Decoding()

    class Dataset(streaming.StreamingDataset):  # type: ignore[misc, name-defined]
        def __getitem__(self, at: int) -> tuple[Any, int]:
            found = super().__getitem__(at)
            return decoding(found["image"]), found["label"]

    streaming.base.util.clean_stale_shared_memory()
    where = {"local": str(local)}
    if endpoint:
        where = {"remote": "s3://bench/mds", "local": tempfile.mkdtemp(dir=folder)}
    loader = batches(Dataset(**where, shuffle=True, batch_size=BATCH))
    return lambda: loader


def litdata(folder: Path, endpoint: str) -> Epoch:
    """litdata, in its own format."""
    lit = import_module("litdata")

    def make(target: Path) -> None:
        target.mkdir()
        writer = import_module("litdata.streaming.writer").BinaryWriter(str(target), chunk_bytes="64MB")
        order = random.Random(0).sample(files(folder), len(files(folder)))
        for at, (path, label) in enumerate(order):
            writer.add_item(at, {"image": path.read_bytes(), "label": label})
        writer.done()
        writer.merge()

    local = made(folder / "bench" / "litdata", make)
    decoding = Decoding()

    class Dataset(lit.StreamingDataset):  # type: ignore[misc, name-defined]
        def __getitem__(self, at: int) -> tuple[Any, int]:
            found = super().__getitem__(at)
            return decoding(found["image"]), found["label"]

    where: dict[str, Any] = {"input_dir": str(local)}
    if endpoint:
        # Its client refuses http, and has no setting for it.
        import_module("litdata.streaming.downloader")._OBSTORE_CLIENT_OPTIONS["allow_http"] = True
        client = {"endpoint_url": endpoint, "aws_access_key_id": "any", "aws_secret_access_key": "any"}
        where = {"input_dir": "s3://bench/litdata", "storage_options": client,
                 "cache_dir": tempfile.mkdtemp(dir=folder)}  # fmt: skip
    loader = lit.StreamingDataLoader(
        Dataset(**where, shuffle=True), batch_size=BATCH, num_workers=WORKERS, persistent_workers=True
    )
    return lambda: loader


class Raw:
    """The decoded image, as FFCV wants it."""

    def __init__(self, found: list[tuple[Path, int]]) -> None:
        self._found = found

    def __len__(self) -> int:
        return len(self._found)

    def __getitem__(self, at: int) -> tuple[Any, int]:
        pil = import_module("PIL.Image")
        path, label = self._found[at]
        return pil.open(io.BytesIO(path.read_bytes())).convert("RGB"), label


def ffcv(mode: str) -> Callable[[Path, str], Epoch]:
    """FFCV: JPEGs or raw pixels at full size, in its own format, and its own compiled crops."""

    def start(folder: Path, _: str) -> Epoch:
        fields, loaders = import_module("ffcv.fields"), import_module("ffcv.loader")
        decoders, transforms = import_module("ffcv.fields.decoders"), import_module("ffcv.transforms")

        def make(target: Path) -> None:
            image = fields.RGBImageField(write_mode=mode, jpeg_quality=90)
            writer = import_module("ffcv.writer").DatasetWriter(
                str(target), {"image": image, "label": fields.IntField()}, num_workers=WORKERS
            )
            writer.from_indexed_dataset(Raw(files(folder)))

        loader = loaders.Loader(
            str(made(folder / f"{mode}.beton", make)), batch_size=BATCH, num_workers=WORKERS, os_cache=True,
            order=loaders.OrderOption.RANDOM, drop_last=False,
            pipelines={
                "image": [decoders.RandomResizedCropRGBImageDecoder((SIDE, SIDE)), transforms.RandomHorizontalFlip(),
                          transforms.ToTensor(), transforms.ToTorchImage()],
                "label": [decoders.IntDecoder(), transforms.ToTensor()],
            },
        )  # fmt: skip
        return lambda: loader

    return start


def turboloader(form: str) -> Callable[[Path, str], Epoch]:
    """turboloader, whose batches are float32: of a tar of JPEGs, or of its own format, all squeezed to 256 x 256."""

    def start(folder: Path, _: str) -> Epoch:
        turbo = import_module("turboloader")

        def join(target: Path) -> None:
            with tarfile.open(target, "w") as tar:
                for path, _ in files(folder):
                    tar.add(path, path.name)

        source = made(folder / "all.tar", join)
        if form == "tbl":
            convert = partial(turbo.preprocess_to_tbl, str(source), image_size=256, num_workers=WORKERS)
            source = made(folder / "all.tbl", lambda target: convert(str(target)) and None)
        loader = turbo.DataLoader(
            str(source), batch_size=BATCH, image_size=SIDE, num_workers=WORKERS, shuffle=True, train_aug=True,
            output_format="pytorch",
        )  # fmt: skip
        numbers = count()

        def epoch() -> Iterator[Any]:
            loader.set_epoch(next(numbers))
            for images, about in loader:
                yield images, about["indices"]

        return epoch

    return start


# -- objects of S3, one by one


class Objects:
    """Images by a client of S3 that is made where it is used."""

    def __init__(self, folder: Path, open_client: Callable[[], Callable[[str], bytes]]) -> None:
        self._keys = [(path.relative_to(folder / "bench").as_posix(), label) for path, label in files(folder)]
        self._open, self._read, self._decoding = open_client, None, Decoding()

    _read: Callable[[str], bytes] | None

    def __len__(self) -> int:
        return len(self._keys)

    def __getitem__(self, at: int) -> tuple[Any, int]:
        self._read = self._read or self._open()
        key, label = self._keys[at]
        return self._decoding(self._read(key)), label


def boto3(folder: Path, endpoint: str) -> Epoch:
    """A request by boto3 for each image, in the processes of torch's loader."""

    def open_client() -> Callable[[str], bytes]:
        client = import_module("boto3").client("s3", endpoint_url=endpoint)
        return lambda key: client.get_object(Bucket="bench", Key=key)["Body"].read()

    loader = batches(Objects(folder, open_client), shuffle=True)
    return lambda: loader


def s3torchconnector(_: Path, endpoint: str) -> Epoch:
    """Amazon's connector for torch, by key."""
    connector = import_module("s3torchconnector")
    decoding = Decoding()

    def change(found: Any) -> tuple[Any, int]:
        return decoding(found.read()), int(found.key.split("/")[-2].removeprefix("class_"))

    dataset = connector.S3MapDataset.from_prefix(
        "s3://bench/files/", region="us-east-1", endpoint=endpoint, transform=change,
        s3client_config=connector.S3ClientConfig(force_path_style=True),
    )  # fmt: skip
    loader = batches(dataset, shuffle=True)
    return lambda: loader


PEERS: dict[str, Callable[[Path, str], Epoch]] = {
    "torchvision v2": torchvision_v2,
    "torchvision v1": torchvision_v1,
    "timm": timm,
    "webdataset": webdataset,
    "mosaicml-streaming": mosaicml,
    "litdata": litdata,
    "FFCV jpg": ffcv("jpg"),
    "FFCV raw": ffcv("raw"),
    "DALI": dali,
    "SPDL": spdl,
    "turboloader tar": turboloader("tar"),
    "turboloader tbl": turboloader("tbl"),
    "s3torchconnector": s3torchconnector,
    "boto3": boto3,
}


def images(batch: Any) -> int:
    """How many images a batch holds: it ends with their labels."""
    return len(batch[-1])


def main(name: str, folder: Path, endpoint: str) -> None:
    """Takes turns until its input ends."""
    epoch = PEERS[name](folder, endpoint)
    take_turns(lambda: sum(images(batch) for batch in epoch()))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), sys.argv[3] if len(sys.argv) > 3 else "")
