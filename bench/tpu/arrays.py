# SPDX-License-Identifier: Apache-2.0
"""Arrays as HLO prints them: how many bytes they are, and how constants lie in memory."""

import math
import re

import numpy as np

# Printed types -> NumPy's. Floats are left out: nothing that decides control flow is one.
_DTYPES = {
    "pred": np.bool_,
    "s8": np.int8,
    "u8": np.uint8,
    "s16": np.int16,
    "u16": np.uint16,
    "s32": np.int32,
    "u32": np.uint32,
}
_ARRAY = re.compile(r"(\w+)\[([\d,]*)\](\{[^}]*\})?")


def layout_of(shape: str) -> str:
    """The layout of the first array in a printed shape, "{}" where none is printed."""
    match = _ARRAY.search(shape)
    return (match[3] if match else None) or "{}"


def printed_arrays(shape: str) -> list[str]:
    """Each array in a printed type, with its layout."""
    return [match[0] for match in _ARRAY.finditer(shape)]


def extents_of(array: str) -> tuple[int, ...]:
    """Of the first array in a printed shape: bf16[8,64]{1,0} is (8, 64)."""
    match = _ARRAY.search(array)
    assert match is not None, array
    return _extents(match)


def all_bytes_of(shape: str) -> int:
    """Of all arrays in a printed type such as (bf16[8,64]{1,0:T(8,128)(2,1)}, f32[]), semaphores left out."""
    return sum(_bytes(match) for match in _ARRAY.finditer(shape) if "S(2)" not in (match[3] or ""))


def moved_bytes(opcode: str, shape: str) -> int:
    """What a copy, or the start of an asynchronous one, reads from HBM and writes to it, without the padding of tiles.

    shape: printed as the destination, or as (destination, source, …) of a copy-start, or as ((operands), result, …) of
    all others; a slice moves no more than its result. VMEM is memory space 1.
    """
    found = [array for array in _ARRAY.finditer(shape) if array[2]]
    if not found:
        return 0
    destination = found[0] if opcode in ("copy", "copy-start") else found[-1]
    ends = found[:2] if len(found) > 1 else found * 2
    return _bytes(destination) * sum("S(1)" not in (end[3] or "") for end in ends)


def padded_bytes_of(shape: str) -> int:
    """Of the first array in a printed shape, its last dimensions filled up to whole tiles."""
    match = _ARRAY.search(shape)
    assert match is not None, shape
    extents = _extents(match)
    order, tiles = _parse_layout(layout_of(shape), len(extents))
    sizes = [extents[dimension] for dimension in reversed(order)]
    tile = tiles[0] if tiles else ()
    sizes = [1] * (len(tile) - len(sizes)) + sizes
    whole = len(sizes) - len(tile)
    padded = (-(-size // block) * block for size, block in zip(sizes[whole:], tile, strict=True))
    return math.prod(sizes[:whole]) * math.prod(padded) * _bits(match) // 8


def _bytes(array: re.Match[str]) -> int:
    return math.prod(_extents(array)) * _bits(array) // 8


def _bits(array: re.Match[str]) -> int:
    """f8e4m3fn is 8 and bf16 16 bits wide; pred, which has no number, takes a byte."""
    width = re.search(r"\d+", array[1])
    return int(width[0]) if width else 8


def _extents(array: re.Match[str]) -> tuple[int, ...]:
    return tuple(int(extent) for extent in array[2].split(",") if extent)


def constant(shape: str, printed: str) -> np.ndarray | None:
    """The integer array of a printed shape whose values are `printed`, None where they are floats or left out."""
    match = _ARRAY.match(shape)
    if not match or match[1] not in _DTYPES or "..." in printed:
        return None
    numbers = re.findall(r"-?\d+|true|false", printed)
    values = np.array([{"true": 1, "false": 0}.get(n) if n.isalpha() else int(n) for n in numbers])
    return reshaped(values.astype(_DTYPES[match[1]]), shape)


def reshaped(values: np.ndarray, shape: str) -> np.ndarray | None:
    """`values` in a printed shape; a single number fills it. None where the sizes disagree."""
    match = _ARRAY.search(shape)
    extents = _extents(match) if match else ()
    if values.size == math.prod(extents):
        return values.reshape(extents)
    return np.broadcast_to(values.reshape(()), extents) if values.size == 1 else None


def pack_words(values: np.ndarray, layout: str) -> np.ndarray:
    """`values` as the int32 words that lie in memory under a printed layout such as "{2,1,0:T(8,128)(2,1)}".

    The layout says: dimensions from the fastest to the slowest; tiles, padded with zeros; within a tile, how many rows
    of a narrow type share one word, "(2,1)".
    """
    values = np.asarray(values)
    order, tiles = _parse_layout(layout, values.ndim)
    values = values.transpose(order[::-1]) if values.ndim else values.reshape(1)
    if tiles and len(tiles[0]) == 2:
        values = _tiled(np.atleast_2d(values), tiles[0], tiles[1][0] if len(tiles) > 1 else 1)
    elif tiles:
        values = _pad(values, (tiles[0][0],))
        if len(tiles) > 2:  # T(512)(128)(4,1): 512 numbers are 4 rows of 128, and the rows share words
            values = values.reshape(-1, tiles[2][0], tiles[1][0]).swapaxes(-2, -1)
    raw = np.ascontiguousarray(values).tobytes()
    return np.frombuffer(raw + bytes(-len(raw) % 4), np.int32)


def _tiled(values: np.ndarray, tile: tuple[int, ...], rows_per_word: int) -> np.ndarray:
    rows, columns = tile
    values = _pad(values, tile)
    *lead, height, width = values.shape
    values = values.reshape(*lead, height // rows, rows, width // columns, columns).swapaxes(-3, -2)
    values = values.reshape(*values.shape[:-2], rows // rows_per_word, rows_per_word, columns)
    return values.swapaxes(-2, -1)


def _pad(values: np.ndarray, multiples: tuple[int, ...]) -> np.ndarray:
    """The last dimensions filled with zeros to `multiples`."""
    untouched = [(0, 0)] * (values.ndim - len(multiples))
    last = [(0, -n % m) for n, m in zip(values.shape[values.ndim - len(multiples) :], multiples, strict=True)]
    return np.pad(values, untouched + last)


def _parse_layout(layout: str, ndim: int) -> tuple[list[int], list[tuple[int, ...]]]:
    order, _, details = layout.strip("{}").partition(":")
    tiles = re.search(r"T((?:\([\d,]+\))+)", details)
    return (
        [int(dimension) for dimension in order.split(",") if dimension] or list(range(ndim))[::-1],
        [tuple(map(int, tile.split(","))) for tile in re.findall(r"\(([\d,]+)\)", tiles[1])] if tiles else [],
    )
