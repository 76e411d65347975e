"""Pillow's image operations on whole batches, on any device: the same pixels, without a round trip to the host.

Images are uint8 [n, 3, H, W], contiguous; what sets an operation's strength is float64 [n], one number per image.
Each function says what it stands for in Pillow, and gives that result exactly; only in `transform` may a value that is
within 1e-9 of the next whole number come out as that. Nothing here draws, and nothing waits for the device: no shape
depends on pixels.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

Tensor = torch.Tensor

_GOLDEN = 0x9E3779B97F4A7C15 - (1 << 64)
_FIRST = 0xBF58476D1CE4E5B9 - (1 << 64)
_SECOND = 0x94D049BB133111EB - (1 << 64)
"""The constants of splitmix64 as int64, whose products and sums wrap as those of uint64 do."""


def transform(images: Tensor, matrices: Tensor) -> Tensor:
    """`Image.transform(size, AFFINE, matrix, BILINEAR)`; black where there is no image.

    Args:
        matrices: float64 [n, 6]; pixel (x, y) of the result comes from (a x + b y + c, d x + e y + f), where the
            centre of the first pixel is (0.5, 0.5).
    """
    n, _, height, width = images.shape
    a, b, c, d, e, f = (column.view(-1, 1, 1) for column in matrices.unbind(1))
    x = torch.arange(width, device=images.device, dtype=torch.float64).add_(0.5)
    y = torch.arange(height, device=images.device, dtype=torch.float64).add_(0.5)[:, None]
    from_x, from_y = a * x + (b * y + c), d * x + (e * y + f)
    inside = (from_x >= 0).logical_and_(from_x < width).logical_and_(from_y >= 0).logical_and_(from_y < height)
    grid = torch.empty(n, height, width, 2, device=images.device, dtype=torch.float64)
    torch.sub(from_x.mul_(2 / width), 1, out=grid[..., 0])
    torch.sub(from_y.mul_(2 / height), 1, out=grid[..., 1])
    # Pillow truncates what it computes in float64; in float32 flat areas would come out one too dark.
    found = F.grid_sample(images.double(), grid, "bilinear", "border", align_corners=False)
    return found.add_(1e-9).to(torch.uint8).mul_(inside[:, None])


def brightness(images: Tensor, factors: Tensor) -> Tensor:
    """`ImageEnhance.Brightness(image).enhance(factor)`."""
    return _blend(torch.zeros((), device=images.device), images, factors)


def colour(images: Tensor, factors: Tensor) -> Tensor:
    """`ImageEnhance.Color(image).enhance(factor)`."""
    return _blend(_grey(images), images, factors)


def contrast(images: Tensor, factors: Tensor) -> Tensor:
    """`ImageEnhance.Contrast(image).enhance(factor)`."""
    mean = _grey(images).mean((1, 2, 3), keepdim=True, dtype=torch.float64)
    return _blend(mean.add_(0.5).floor_().float(), images, factors)


def sharpness(images: Tensor, factors: Tensor) -> Tensor:
    """`ImageEnhance.Sharpness(image).enhance(factor)`."""
    # The kernel of ImageFilter.SMOOTH: nine pixels, of which the middle one counts five times.
    smooth = images.float()
    rows = (smooth[:, :, :-2] + smooth[:, :, 1:-1]).add_(smooth[:, :, 2:])
    middle = smooth[:, :, 1:-1, 1:-1]
    total = (rows[..., :-2] + rows[..., 1:-1]).add_(rows[..., 2:]).add_(middle, alpha=4)
    middle.copy_(total.div_(13).add_(0.5).floor_())
    return _blend(smooth, images, factors)


def posterize(images: Tensor, masks: Tensor) -> Tensor:
    """`ImageOps.posterize(image, bits)`; masks: the bits that are kept, 0b11110000 for 4."""
    return images & masks.to(torch.uint8).view(-1, 1, 1, 1)


def solarize(images: Tensor, thresholds: Tensor) -> Tensor:
    """`ImageOps.solarize(image, threshold)`; whole thresholds, 0 to 256."""
    turned = images >= thresholds.to(torch.int16).view(-1, 1, 1, 1)
    return images ^ turned.to(torch.uint8).mul_(255)


def autocontrast(images: Tensor) -> Tensor:
    """`ImageOps.autocontrast(image)`."""
    low, high = (found.double()[..., None] for found in (images.amin((2, 3)), images.amax((2, 3))))
    values = torch.arange(256, device=images.device, dtype=torch.float64)
    scale = 255 / (high - low).clamp_(min=1)
    tables = torch.where(high > low, (values * scale - low * scale).clamp_(0, 255), values)
    return _look_up(_places(images), tables.to(torch.uint8)).view_as(images)


def equalize(images: Tensor) -> Tensor:
    """`ImageOps.equalize(image)`."""
    n, channels, height, width = images.shape
    places = _places(images)
    counts = torch.zeros(n * channels * 256, dtype=torch.int64, device=images.device)
    counts = counts.scatter_add_(0, places, torch.ones_like(places)).view(n, channels, 256)
    brightest = counts.gather(2, images.amax((2, 3)).long()[..., None])
    step = (height * width - brightest) // 255
    below = counts.cumsum(2) - counts
    tables = ((step // 2 + below) // step.clamp(min=1)).clamp_(max=255)
    tables = torch.where(step > 0, tables, torch.arange(256, device=images.device))
    return _look_up(places, tables.to(torch.uint8)).view_as(images)


def erase(images: Tensor, which: Tensor, boxes: Tensor, keys: Tensor, area: int) -> None:
    """Fills a box in some of the images with noise, in place.

    The three bytes of a pixel are the lowest of output number y * W + x (from 0) of splitmix64 in the state of the
    image's key: the same on every device and in every batch.

    Args:
        which: int64 [m], the images.
        boxes: int64 [m, 4]: top, left, height and width in pixels.
        keys: int64 [m].
        area: pixels in all boxes together; known to the host, so that it need not ask the device.
    """
    areas = boxes[:, 2] * boxes[:, 3]
    box = torch.arange(len(which), device=images.device).repeat_interleave(areas, output_size=area)
    place = torch.arange(area, device=images.device) - (areas.cumsum(0) - areas)[box]
    top, left, _, width = boxes[box].unbind(1)
    y, x = top + place // width, left + place % width
    word = keys[box] + (y * images.shape[3] + x + 1) * _GOLDEN
    word = (word ^ _shifted(word, 30)) * _FIRST
    word = (word ^ _shifted(word, 27)) * _SECOND
    word = word ^ _shifted(word, 31)
    images[which[box], :, y, x] = (torch.stack((word, word >> 8, word >> 16), 1) & 255).to(images.dtype)


def _shifted(words: Tensor, bits: int) -> Tensor:
    """Logical shift to the right; that of torch's int64 repeats the sign."""
    return (words >> bits) & ((1 << (64 - bits)) - 1)


def _blend(degenerate: Tensor, images: Tensor, factors: Tensor) -> Tensor:
    """`Image.blend(degenerate, image, factor)`, which truncates."""
    mixed = images.float().sub_(degenerate).mul_(factors.float().view(-1, 1, 1, 1)).add_(degenerate)
    return mixed.clamp_(0, 255).to(torch.uint8)


def _grey(images: Tensor) -> Tensor:
    """`image.convert("L")` as float32 [n, 1, H, W]; every sum stays below 2**24 and is exact."""
    red, green, blue = images.float().unbind(1)
    sums = red.mul_(19595).add_(green, alpha=38470).add_(blue, alpha=7471).add_(32768)
    return sums.mul_(2**-16).floor_()[:, None]


def _places(images: Tensor) -> Tensor:
    """For each value the place of its entry in tables [n, 3, 256]: int64 [n * 3 * H * W]."""
    n, channels, _, _ = images.shape
    first = torch.arange(0, n * channels * 256, 256, device=images.device).view(n, channels, 1, 1)
    return (images + first).view(-1)


def _look_up(places: Tensor, tables: Tensor) -> Tensor:
    return tables.reshape(-1).index_select(0, places)
