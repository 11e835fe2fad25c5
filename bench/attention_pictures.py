# SPDX-License-Identifier: Apache-2.0
"""The pictures of docs/explanations/attention.md, from the kernels' own plan:  python -m bench.attention_pictures"""

from collections.abc import Mapping, Sequence
from html import escape

import jax.numpy as jnp
import numpy as np

from bench.diagrams import FOLDER, heading, picture, rect
from grug_kernels.attention import AttentionMask
from grug_kernels.attention.tpu_plan import forward_plan, tiles_of
from train.plot import standalone

LENGTH, BLOCK, CELL, GAP = 64, 8, 4, 56  # positions; positions of a tile; units of a position; between panels
DOCUMENTS = np.repeat([0, 1, 2, -1], [20, 13, 23, 8])
MASKS = {
    "causal": AttentionMask(),
    "causal, sliding_window=20": AttentionMask(sliding_window=20),
    "causal, 3 documents and padding": AttentionMask(segment_ids=jnp.asarray(DOCUMENTS[None], jnp.int32)),
}
WHOLE, MASKED, SEEN = ("c0", 0.22), ("c1", 0.22), ("ink", 0.75)

SLOT, LANE = 168, 26  # units of a step of a pipeline, of one unit's row
LANES = ("MXU", "VPU")
# Row chunks by step, as `_tile` issues them: one tile of the forward kernel, two of the backward kernel.
FORWARD: Mapping[str, Sequence[Sequence[str]]] = {
    "MXU": [["z0"], ["z1"], ["z2", "o0"], ["z3", "o1"], ["o2"], ["o3"]],
    "VPU": [[], ["p0"], ["p1"], ["p2"], ["p3"], []],
}
BACKWARD: Mapping[str, Sequence[Sequence[str]]] = {
    "MXU": [["s0"], ["s1", "g0"], ["s0′", "g1"], ["s1′", "g0′"], ["g1′"]],
    "VPU": [["d0"], ["d1"], ["d0′"], ["d1′"], []],
}
WORDS = {
    "z": ("k qᵀ", "c0"),
    "p": ("softmax", "c1"),
    "o": ("vᵀ p", "c2"),
    "s": ("z, dp", "c0"),
    "d": ("p, ds", "c1"),
    "g": ("dv, dk, dq", "c2"),
}


def tiles() -> str:
    """Queries down, keys across: the intervals, and the tiles that the forward kernel's plan makes of them."""
    size, top = LENGTH * CELL, 92
    parts = [_legend(56, {"whole: no mask arithmetic": WHOLE, "masked": MASKED, "keys that a query sees": SEEN})]
    for i, (name, mask) in enumerate(MASKS.items()):
        left = i * (size + GAP)
        parts.append(_panel(name, mask, left, top))
    title = f"A mask is an interval per query: {LENGTH} queries down, {LENGTH} keys across, tiles of {BLOCK} × {BLOCK}"
    return picture(title, 3 * size + 2 * GAP, top + size + 34, "".join(parts))


def _panel(name: str, mask: AttentionMask, left: float, top: float) -> str:
    size, tile = LENGTH * CELL, BLOCK * CELL
    intervals = mask.intervals(1, LENGTH, LENGTH)
    stripes = forward_plan(intervals, LENGTH, BLOCK)
    plan = np.stack(tiles_of(stripes, np.arange(LENGTH // BLOCK), 2, BLOCK)[:4], axis=-1)
    parts = [heading(name, left, top - 8)]
    for block, (first, whole_first, whole_end, last) in enumerate(plan):
        for n in range(first, last):
            paint = WHOLE if whole_first <= n < whole_end else MASKED
            parts.append(rect(left + n * tile, top + block * tile, tile, tile, paint))
    path = "".join(f"M{left + x} {top}v{size}M{left} {top + x}h{size}" for x in range(0, size + 1, tile))
    parts.append(f'<path class="grid" d="{path}" style="stroke-width:1"/>')
    for query, (lower, upper) in enumerate(zip(*(np.asarray(bound[0]) for bound in intervals[:2]), strict=True)):
        if lower < upper:
            y = top + query * CELL + CELL / 2 - 0.5
            parts.append(rect(left + lower * CELL, y, (upper - lower) * CELL, 1, SEEN))
    visited, whole = (plan[:, 3] - plan[:, 0]).sum(), (plan[:, 2] - plan[:, 1]).sum()
    text = f"{visited} of {len(plan) ** 2} tiles visited, {whole} of them whole"
    return "".join(parts) + f'<text x="{left}" y="{top + size + 20}">{text}</text>'


def pipeline() -> str:
    """What the units do at a time, row chunk by row chunk."""
    top, parts = 64, []
    for name, steps in {
        "Forward, a tile of four row chunks: three stages, handed on through VMEM": FORWARD,
        "Backward, two tiles of two row chunks: two stages, and no gap between the tiles": BACKWARD,
    }.items():
        parts.append(heading(name, 0, top))
        parts.append(_steps(steps, top + 12))
        top += 12 + len(LANES) * (LANE + 4) + 34
    title = "Row chunks are a pipeline: matrix unit (MXU) and vector unit (VPU) work on different ones"
    return picture(title, 56 + 6 * SLOT, top - 16, "".join(parts))


def _steps(steps: Mapping[str, Sequence[Sequence[str]]], top: float) -> str:
    parts = []
    for lane, name in enumerate(LANES):
        y = top + lane * (LANE + 4)
        parts.append(f'<text x="0" y="{y + 17}">{name}</text>')
        for step, jobs in enumerate(steps[name]):
            width = (SLOT - 4) / max(1, len(jobs))
            for i, job in enumerate(jobs):
                word, color = WORDS[job[0]]
                x = 56 + step * SLOT + i * width
                parts.append(rect(x, y, width - 2, LANE, (color, 0.25)))
                middle = f'x="{x + width / 2 - 1:g}" y="{y + 17}" style="font-size:10px"'
                parts.append(f'<text class="middle" {middle}>{word} · {job[1:]}</text>')
    return "".join(parts)


def _legend(y: float, names: Mapping[str, tuple[str, float]]) -> str:
    parts, x = [], 0.0
    for name, paint in names.items():
        height = 1.5 if paint is SEEN else 12
        parts.append(rect(x, y + (12 - height) / 2 - 10, 12, height, paint))
        parts.append(f'<text x="{x + 18}" y="{y}">{escape(name)}</text>')
        x += 40 + 6.6 * len(name)
    return "".join(parts)


PICTURES = {"attention_tiles.svg": tiles, "attention_pipeline.svg": pipeline}

if __name__ == "__main__":
    for file, draw in PICTURES.items():
        (FOLDER / file).write_text(standalone(draw()))
