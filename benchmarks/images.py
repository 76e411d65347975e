"""The images that the data engine and its peers are measured on: 3,000 JPEGs of about 100 KB that look like photos.

    python benchmarks/images.py FOLDER [COUNT]

Crops, turned and mirrored, of the photos that scikit-image and scikit-learn bring along, with noise of a natural
spectrum so that they weigh what photos of a camera do. The same bytes each time with the same Pillow. They are
written as class folders and as tar shards. It measures nothing.
"""

from __future__ import annotations

import importlib
import io
import sys
import tarfile
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageEnhance

CLASSES = 10
SHARD = 500
"""Images of a tar shard, about 50 MB."""
FIELDS = 6
"""Of noise, for each size."""
PHOTOS = (
    "astronaut.png", "chelsea.png", "coffee.png", "rocket.jpg", "motorcycle_left.png", "motorcycle_right.png",
    "ihc.png", "retina.jpg", "hubble_deep_field.jpg", "china.jpg", "flower.jpg",
)  # fmt: skip
SIZES = ((500, 375), (500, 375), (500, 333), (375, 500), (500, 500), (640, 480), (400, 300))
"""Width and height, about as often as ImageNet has them."""


@cache
def photos() -> list[Image.Image]:
    """Those of `PHOTOS` that the installed packages have."""
    parts = (("skimage", "data"), ("sklearn", "datasets/images"))
    folders = [Path(str(importlib.import_module(name).__file__)).parent / part for name, part in parts]
    paths = [folder / name for name in PHOTOS for folder in folders]
    return [Image.open(path).convert("RGB") for path in paths if path.exists()]


@cache
def field(width: int, height: int, power: float, number: int) -> npt.NDArray[np.float32]:
    """Noise whose spectrum falls as 1 / f ** power, float32 [height, width]: mean 0, deviation 1, no edges."""
    chance = np.random.default_rng(number)
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None])
    frequency[0, 0] = 1
    spectrum = np.fft.rfft2(chance.standard_normal((height, width))) / frequency**power
    spectrum[0, 0] = 0
    found = np.fft.irfft2(spectrum, s=(height, width))
    scaled: npt.NDArray[np.float32] = (found / found.std()).astype(np.float32)
    return scaled


def noise(chance: np.random.Generator, width: int, height: int, power: float) -> npt.NDArray[np.float32]:
    """One of some fields, moved."""
    found = field(width, height, power, int(chance.integers(FIELDS)))
    return np.roll(found, (int(chance.integers(height)), int(chance.integers(width))), (0, 1))


def jpeg(number: int) -> bytes:
    """One image, of class `number % CLASSES`: quality 90, 4:2:0, baseline."""
    chance = np.random.default_rng(1000 + number)
    known = photos()
    image = known[(number % CLASSES + int(chance.integers(0, 2))) % len(known)]
    width, height = SIZES[int(chance.integers(0, len(SIZES)))]
    w = min(image.width, image.height * width / height) * chance.uniform(0.55, 1.0)
    h = w * height / width
    x, y = chance.uniform(0, image.width - w), chance.uniform(0, image.height - h)
    image = image.resize((width, height), Image.Resampling.LANCZOS, box=(x, y, x + w, y + h))
    if chance.random() < 0.5:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    image = image.rotate(float(chance.uniform(-4, 4)), Image.Resampling.BICUBIC)
    inside = (width * 0.04, height * 0.04, width * 0.96, height * 0.96)
    image = image.resize((width, height), Image.Resampling.LANCZOS, box=inside)
    image = ImageEnhance.Brightness(image).enhance(float(chance.uniform(0.8, 1.2)))
    image = ImageEnhance.Contrast(image).enhance(float(chance.uniform(0.9, 1.3)))
    pixels = np.asarray(image, np.float32)
    pixels = pixels + (chance.uniform(8, 16) * noise(chance, width, height, 1.0))[..., None]
    pixels = pixels + (chance.uniform(8, 18) * noise(chance, width, height, 0.4))[..., None]
    pixels = pixels + 2 * np.stack([noise(chance, width, height, 0.5) for _ in range(3)], -1)
    out = io.BytesIO()
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(out, "JPEG", quality=90)
    return out.getvalue()


def make(folder: Path, count: int) -> None:
    """Writes `files/CLASS/*.jpg`, and `tar/*.tar` with the same images shuffled."""
    total = 0
    with ProcessPoolExecutor(2) as pool:
        for number, data in enumerate(pool.map(jpeg, range(count), chunksize=16)):
            path = folder / "files" / f"class_{number % CLASSES:03d}" / f"{number:06d}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
            total += len(data)
    print(f"{count} images of {total / count / 1e3:.1f} kB")
    paths = sorted((folder / "files").glob("*/*.jpg"))
    order = np.random.default_rng(0).permutation(len(paths))
    (folder / "tar").mkdir(exist_ok=True)
    for start in range(0, len(order), SHARD):
        with tarfile.open(folder / "tar" / f"shard-{start // SHARD:05d}.tar", "w") as shard:
            for path in (paths[number] for number in order[start : start + SHARD]):
                label = str(int(path.parent.name.removeprefix("class_"))).encode()
                for suffix, data in (("jpg", path.read_bytes()), ("cls", label)):
                    member = tarfile.TarInfo(f"{path.stem}.{suffix}")
                    member.size = len(data)
                    shard.addfile(member, io.BytesIO(data))


if __name__ == "__main__":
    make(Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 3000)
