"""From pixels in memory to squares of one size: random crops, antialiased resizing and mirroring, a batch in one call.

Compiled for the processor at hand by numba, at import, and kept on disk: beside this file, or in the user's cache
folder where this one cannot be written, or in NUMBA_CACHE_DIR. No call holds the GIL or shares state with another, so
threads work side by side on parts of one batch. Images are read by their address, and never a byte outside them.

The results are those of Pillow's `resize`, within one level: both round to bytes, Pillow once more than this.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
from llvmlite import ir
from numba import carray, njit, types
from numba.core import cgutils
from numba.extending import intrinsic

Bytes = npt.NDArray[np.uint8]
Flags = npt.NDArray[np.bool_]
Floats = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int32]
Longs = npt.NDArray[np.int64]
Words = npt.NDArray[np.uint64]
Axis = tuple[Longs, Longs, Floats, int]
Function = TypeVar("Function", bound=Callable[..., Any])

FILTERS = {"nearest": 0, "box": 1, "bilinear": 2, "hamming": 3, "bicubic": 4, "lanczos": 5}
"""Pillow's name of each filter -> its number in this module."""
_NEAREST, _BOX, _BILINEAR, _HAMMING, _BICUBIC, _LANCZOS = range(6)
_SUPPORT = (0.0, 0.5, 1.0, 1.0, 2.0, 3.0)


def inner(**options: Any) -> Callable[[Function], Function]:
    """Compiled into the functions that call it."""
    return njit(nogil=True, **options)  # type: ignore[no-any-return]


def compiled(signature: Any) -> Callable[[Function], Function]:
    """Compiled at once, or read from disk."""

    def decorate(function: Function) -> Function:
        try:
            return njit(signature, nogil=True, cache=True)(function)  # type: ignore[no-any-return]
        except RuntimeError:  # there is no folder that can be written
            return njit(signature, nogil=True)(function)  # type: ignore[no-any-return]

    return decorate


# -- LLVM instructions by hand: numba's own loops do not take the channels of a pixel at once


_I8, _I32, _I64, _F32 = ir.IntType(8), ir.IntType(32), ir.IntType(64), ir.FloatType()
_ADDRESS = ir.PointerType()


def _lanes(kind: Any) -> Any:
    return ir.VectorType(kind, 4)


def _same(kind: Any, value: float) -> Any:
    return ir.Constant(_lanes(kind), [value] * 4)


def _call(build: Any, name: str, kind: Any, *arguments: Any) -> Any:
    declared = ir.FunctionType(_lanes(kind), [_lanes(kind)] * len(arguments))
    return build.call(cgutils.get_or_insert_function(build.module, declared, name), arguments)


def _at(build: Any, start: Any, number: Any, kind: Any) -> Any:
    return build.gep(start, [number], source_etype=kind)


def _tap(build: Any, pixels: Any, weights: Any, number: Any, total: Any) -> Any:
    """Adds to four lanes one pixel, with the float after it in the last lane, times its weight."""
    lanes = build.load(_at(build, pixels, build.mul(number, ir.Constant(_I64, 3)), _F32), align=4, typ=_lanes(_F32))
    weight = build.load(_at(build, weights, number, _F32), typ=_F32)
    nothing = ir.Constant(_lanes(_F32), ir.Undefined)
    first = build.insert_element(nothing, weight, ir.Constant(_I32, 0))
    return _call(build, "llvm.fmuladd.v4f32", _F32, lanes, build.shuffle_vector(first, nothing, _same(_I32, 0)), total)


def _taps(build: Any, pixels: Any, weights: Any, count: Any) -> Any:
    """The weighted sum of `count` pixels: unrolled where that is a number of Python, else a loop."""
    total = _same(_F32, 0.0)
    if isinstance(count, int):
        for number in range(count):
            total = _tap(build, pixels, weights, ir.Constant(_I64, number), total)
        return total
    place = cgutils.alloca_once_value(build, total)
    with cgutils.for_range(build, count) as loop:
        build.store(_tap(build, pixels, weights, loop.index, build.load(place)), place)
    return build.load(place)


def _bytes(build: Any, floats: Any) -> Any:
    """Rounded and clipped."""
    whole = build.fptosi(build.fadd(floats, _same(_F32, 0.5)), _lanes(_I32))
    whole = _call(build, "llvm.smax.v4i32", _I32, whole, _same(_I32, 0))
    return build.trunc(_call(build, "llvm.smin.v4i32", _I32, whole, _same(_I32, 255)), _lanes(_I8))


def _build_columns(context: Any, build: Any, _signature: Any, arguments: Any) -> Any:
    line, first, weights, step, taps, count, flip, out = arguments
    line, first, weights, out = (build.inttoptr(address, _ADDRESS) for address in (line, first, weights, out))
    three, last = ir.Constant(_I64, 3), build.sub(count, ir.Constant(_I64, 1))
    done, other = build.append_basic_block("done"), build.append_basic_block("taps")
    switch = build.switch(taps, other)
    for number in (2, 3, 4, 5, None):
        block = other if number is None else build.append_basic_block(f"taps{number}")
        if number is not None:
            switch.add_case(ir.Constant(_I64, number), block)
        build.position_at_end(block)
        with cgutils.for_range(build, count) as loop:
            source = build.select(flip, build.sub(last, loop.index), loop.index)
            start = build.mul(build.load(_at(build, first, source, _I64), typ=_I64), three)
            own = _at(build, weights, build.mul(source, step), _F32)
            total = _taps(build, _at(build, line, start, _F32), own, taps if number is None else number)
            build.store(_bytes(build, total), _at(build, out, build.mul(loop.index, three), _I8), align=1)
        build.branch(done)
    build.position_at_end(done)
    return context.get_dummy_value()


def _columns_intrinsic(
    _context: Any, _line: Any, _first: Any, _weights: Any, _step: Any, _taps: Any, _count: Any, _flip: Any, _out: Any
) -> Any:
    """Resizes a row: `count` pixels of bytes at `out`, and one byte more; each the weighted sum of `taps` of `line`.

    Addresses: of the row, float32, with a float more; the first pixel of each sum, int64; its weights, float32, a
    `step` apart; the result. With `flip` the result is mirrored.
    """
    address, number = types.uint64, types.int64
    kinds = (address, address, address, number, number, number, types.boolean, address)
    return types.void(*kinds), _build_columns


def _pointer_intrinsic(_context: Any, _address: Any) -> Any:
    def build(_context: Any, build: Any, _signature: Any, arguments: Any) -> Any:
        return build.inttoptr(arguments[0], cgutils.voidptr_t)

    return types.voidptr(types.uint64), build


_columns, _pointer = intrinsic(_columns_intrinsic), intrinsic(_pointer_intrinsic)


# -- resizing


@inner()
def _response(kind: int, x: float) -> float:
    """A filter's weight at x: the formulas of Pillow's Resample.c."""
    if kind == _NEAREST:
        return 1.0
    if kind == _BOX:
        return 1.0 if -0.5 < x <= 0.5 else 0.0
    x = abs(x)
    if x >= _SUPPORT[kind]:
        return 0.0
    if kind == _BILINEAR:
        return 1 - x
    if kind == _BICUBIC:  # Keys 1981, a = -0.5
        return (1.5 * x - 2.5) * x * x + 1 if x < 1 else (((x - 5) * x + 8) * x - 4) * -0.5
    if x == 0:
        return 1.0
    x *= math.pi
    if kind == _HAMMING:
        return math.sin(x) / x * (0.54 + 0.46 * math.cos(x))
    return math.sin(x) / x * math.sin(x / 3) / (x / 3)


@inner()
def _axis(kind: int, low: float, high: float, size: int, count: int) -> Axis:
    """Of each of `count` results in low..high: its first source pixel, how many, their weights; and the most of all.

    No result has a pixel outside 0..size - 1, wherever low and high are.
    """
    scale = (high - low) / count
    wide = max(scale, 1.0)
    support = wide * _SUPPORT[kind]
    step = math.ceil(support) * 2 + 1
    first, taps, weights = np.empty(count, np.int64), np.empty(count, np.int64), np.zeros(count * step, np.float32)
    most = 1
    for place in range(count):
        centre = low + (place + 0.5) * scale
        around = 0.0 if kind == _NEAREST else 0.5
        start = min(max(int(centre - support + around), 0), size - 1)
        end = min(max(int(centre + support + around), start + 1), size, start + step)
        total = 0.0
        for source in range(start, end):
            total += _response(kind, (source - centre + 0.5) / wide)
        weights[place * step] = 1.0  # stays where a box is so narrow that no pixel counts
        for source in range(start, end):
            if total != 0:
                weights[place * step + source - start] = _response(kind, (source - centre + 0.5) / wide) / total
        first[place], taps[place] = start, end - start
        most = max(most, end - start)
    return first, taps, weights, most


@inner(fastmath=True)
def _blend(source: Bytes, start: int, stride: int, weights: Floats, taps: int, line: Floats, length: int) -> None:
    """Into `line`: the weighted sum of `taps` rows of bytes, `stride` apart, the first at `start`."""
    a = source[start : start + length]
    u = weights[0]
    if taps == 1:
        for i in range(length):
            line[i] = u * np.float32(a[i])
        return
    b = source[start + stride : start + stride + length]
    v = weights[1]
    if taps == 2:
        for i in range(length):
            line[i] = u * np.float32(a[i]) + v * np.float32(b[i])
        return
    c = source[start + 2 * stride : start + 2 * stride + length]
    w = weights[2]
    for i in range(length):
        line[i] = u * np.float32(a[i]) + v * np.float32(b[i]) + w * np.float32(c[i])
    for tap in range(3, taps):
        a = source[start + tap * stride : start + tap * stride + length]
        u = weights[tap]
        for i in range(length):
            line[i] += u * np.float32(a[i])


@inner(fastmath=True)
def _round(line: Floats, out: Bytes, start: int, length: int) -> None:
    row = out[start : start + length]
    for i in range(length):
        row[i] = np.uint8(np.int32(min(max(line[i] + np.float32(0.5), np.float32(0)), np.float32(255))))


@inner()
def _address(array: Any) -> np.uint64:
    return np.uint64(array.ctypes.data)


@inner()
def _rows_first(
    source: Bytes, start: int, stride: int, across: Axis, down: Axis, flip: bool, sharp: bool, side: int, out: Bytes
) -> None:
    """Fewest bytes are touched where the height shrinks. Sharp filters overshoot: they are clipped between passes."""
    left, columns, weights, most = across
    top, rows, heights, _ = down
    step, high, pitch = len(weights) // side, len(heights) // side, 3 * side
    length = 3 * (left[side - 1] + columns[side - 1])
    line = np.zeros(length + 3 * step + 1, np.float32)
    spare = np.empty(max(length, pitch + 1), np.uint8)
    for row in range(side):
        _blend(source, start + top[row] * stride, stride, heights[row * high :], rows[row], line, length)
        if sharp:
            _round(line, spare, 0, length)
            _blend(spare, 0, 0, np.ones(1, np.float32), 1, line, length)
        # The last row is made apart: its last pixel takes a byte more than there is.
        target = _address(spare) if row == side - 1 else _address(out) + np.uint64(row * pitch)
        _columns(_address(line), _address(left), _address(weights), step, most, side, flip, target)
    for i in range(pitch):
        out[(side - 1) * pitch + i] = spare[i]


@inner()
def _columns_first(
    source: Bytes, start: int, stride: int, across: Axis, down: Axis, flip: bool, side: int, out: Bytes
) -> None:
    """The order of Pillow."""
    left, columns, weights, most = across
    top, rows, heights, _ = down
    step, high, pitch = len(weights) // side, len(heights) // side, 3 * side
    length = 3 * (left[side - 1] + columns[side - 1])
    line = np.zeros(max(length + 3 * step + 1, pitch), np.float32)
    begin, end = top[0], top[side - 1] + rows[side - 1]
    narrow = np.empty((end - begin) * pitch + 1, np.uint8)
    for row in range(begin, end):
        _blend(source, start + row * stride, 0, np.ones(1, np.float32), 1, line, length)
        target = _address(narrow) + np.uint64((row - begin) * pitch)
        _columns(_address(line), _address(left), _address(weights), step, most, side, flip, target)
    for row in range(side):
        _blend(narrow, (top[row] - begin) * pitch, pitch, heights[row * high :], rows[row], line, pitch)
        _round(line, out, row * pitch, pitch)


@compiled(
    types.void(
        types.uint64[::1], types.int32[:, ::1], types.float64[:, ::1], types.boolean[::1], types.boolean, types.int64,
        types.uint8[:, :, :, ::1],
    )
)  # fmt: skip
def crop_resize(
    addresses: Words, shapes: Ints, boxes: Doubles, flips: Flags, inside: bool, kind: int, out: Bytes
) -> None:
    """Resizes a box of each image to a square, as Pillow's `resize(..., box=...)`, and mirrors it where asked.

    Args:
        addresses: where in this process's memory each image begins, uint64 [b]; where it is 0, `out` is left as it is.
        shapes: height and width of each image, int32 [b, 2]; its pixels are uint8 [height, width, 3], contiguous.
        boxes: left, top, right and bottom in pixels of the image, float64 [b, 4]; cut where they reach outside.
        flips: bool [b].
        inside: whether the filter sees the box alone, as if the image were cropped first; else what is around it too.
        kind: a number of `FILTERS`; when shrinking each is antialiased but `nearest`.
        out: uint8 [b, side, side, 3], contiguous.
    """
    side = out.shape[1]
    pitch = 3 * side * side
    for place in range(len(addresses)):
        if addresses[place] == 0 or min(shapes[place, 0], shapes[place, 1]) < 1:
            continue
        height, width = int(shapes[place, 0]), int(shapes[place, 1])
        source = carray(_pointer(addresses[place]), height * width * 3, np.uint8)
        square = carray(_pointer(_address(out) + np.uint64(place * pitch)), pitch, np.uint8)
        stride = 3 * width
        x0, y0 = min(max(boxes[place, 0], 0.0), width), min(max(boxes[place, 1], 0.0), height)
        x1, y1 = min(max(boxes[place, 2], x0), width), min(max(boxes[place, 3], y0), height)
        x = y = 0
        if inside:
            x, y = min(max(int(x0), 0), width - 1), min(max(int(y0), 0), height - 1)
            width = min(max(math.ceil(x1), x + 1), width) - x
            height = min(max(math.ceil(y1), y + 1), height) - y
        across = _axis(kind, x0 - x, x1 - x, width, side)
        down = _axis(kind, y0 - y, y1 - y, height, side)
        first = across[0][0]
        for i in range(side):  # only the columns between the first and the last that count are read
            across[0][i] -= first
        start = y * stride + 3 * (x + first)
        # Where a pass may clip, the order shows: it is that of Pillow 13.
        sharp = kind >= _BICUBIC
        rows_first = height - side > 2 * max(width - side, 0) if sharp else height >= side
        if rows_first:
            _rows_first(source, start, stride, across, down, flips[place], sharp, side, square)
        else:
            _columns_first(source, start, stride, across, down, flips[place], side, square)
