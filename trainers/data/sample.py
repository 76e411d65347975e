"""Small data sets that need no download, made on the spot: a first run works without a bucket and offline.

A sample is written as class folders below the user's cache and then read like any other data. Its bytes are the
same on every machine. Nothing is fetched.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from launcher.errors import SiteError, UserError, nearest
from launcher.storage import cache_folder

SAMPLES: dict[str, dict[str, Any]] = {
    "digits": {
        "about": "1,797 hand-written digits, 8 x 8 pixels, grey (scikit-learn)",
        "width": 8,
        "height": 8,
        "image_bytes": 140,
        "sizes": dict(zip("0123456789", (178, 182, 177, 183, 181, 182, 181, 179, 174, 180), strict=True)),
    }
}
"""What is known of each sample: its pixels, the bytes of each file, and the number of images of each class."""


def sample_facts(name: str, val_fraction: float = 0.2) -> dict[str, Any]:
    """What `build_index(...).facts()` gives for the sample, without making it. Unknown names: `UserError`."""
    from trainers.data.order import val_count

    sample = _known(name)
    sizes: dict[str, int] = sample["sizes"]
    images, held_out = sum(sizes.values()), sum(val_count(size, val_fraction) for size in sizes.values())
    smallest, largest = min(sizes, key=sizes.__getitem__), max(sizes, key=sizes.__getitem__)
    return {
        "images": images,
        "bytes": images * sample["image_bytes"],
        "classes": len(sizes),
        "train": images - held_out,
        "val": held_out,
        "test": 0,
        "ignored": 0,
        "smallest_class": [smallest, sizes[smallest]],
        "largest_class": [largest, sizes[largest]],
    }


def materialise(name: str) -> Path:
    """The folder of the sample's class folders, made on first use and whole whenever it exists.

    Raises:
        UserError: no sample of that name.
        SiteError: scikit-learn is missing, or the cache folder cannot be written.
    """
    _known(name)
    folder = cache_folder() / "samples" / name
    if folder.is_dir():
        return folder
    temporary = ""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = tempfile.mkdtemp(prefix=f".{name}-", dir=folder.parent)
        os.chmod(temporary, 0o755)
        _write_digits(Path(temporary))
        os.rename(temporary, folder)
    except OSError as error:
        # Another process was faster; what it made is the same.
        if not folder.is_dir():
            raise SiteError(f"the sample cannot be written: {error.strerror or error}", where=str(folder),
                            hint="set XDG_CACHE_HOME to a folder with space") from error  # fmt: skip
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder


def _known(name: str) -> dict[str, Any]:
    if name not in SAMPLES:
        raise UserError(f"there is no sample {name}", where=f"sample://{name}",
                        hint=nearest(name, SAMPLES) or f"the samples are {', '.join(SAMPLES)}")  # fmt: skip
    return SAMPLES[name]


def _write_digits(folder: Path) -> None:
    import numpy as np
    from PIL import Image

    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise SiteError("scikit-learn, which holds the digits, is not installed", where="sample://digits",
                        hint="pip install 'raylaunch[train]'") from error  # fmt: skip

    digits = load_digits()
    pixels = np.round(digits.images * (255 / 16)).astype(np.uint8)
    for number, (image, target) in enumerate(zip(pixels, digits.target, strict=True)):
        path = folder / str(target) / f"{number:04d}.png"
        path.parent.mkdir(exist_ok=True)
        # Uncompressed, so that the bytes do not depend on the zlib that Pillow was built with.
        Image.fromarray(image).save(path, compress_level=0)
