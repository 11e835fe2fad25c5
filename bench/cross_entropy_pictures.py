# SPDX-License-Identifier: Apache-2.0
"""Pictures of docs/explanations/cross_entropy.md, from the kernels' blocks:  python -m bench.cross_entropy_pictures"""

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from bench.diagrams import FOLDER, Paint, heading, picture, rect
from grug_kernels.chips import GB, MIB, TPUS
from grug_kernels.cross_entropy.tpu_blocks import gradients_vmem_terms, logits_vmem_terms, tpu_blocks
from grug_kernels.tpu import LANES
from train.plot import standalone

CHIP = next(chip for chip in TPUS if chip.name == "v6e")
HIDDEN_DIM, VOCAB_SIZE, ITEMSIZE = 4096, 128256, 2
BLOCKS = tpu_blocks(16384, HIDDEN_DIM, VOCAB_SIZE, ITEMSIZE, CHIP.name)
TOKENS, TILE = BLOCKS.block_tokens, BLOCKS.block_vocab

HBM_RIGHT, VMEM_LEFT, WIDTH = 262, 442, 850  # where the bars of either memory begin, and the picture ends
HBM_BAR, VMEM_BAR = 240, 200  # units of the longest bar
ROW, BAR = 36, 9
STAYS, STREAMS, INSIDE = ("c2", 0.75), ("c0", 0.75), ("c1", 0.75)
MEANINGS = {STAYS: "stays for all tiles", STREAMS: "one tile at a time", INSIDE: "never leaves VMEM"}

UNIT_WIDTH, STEP, LANE = 150, 146, 24  # of the names of units; of a grid step; of a unit's row
STEPS = 4
COLORS = ("c0", "c1", "c2", "c3", "c4")  # of tiles


@dataclass(frozen=True)
class Job:
    """Done to the tiles in turn, from tile 0 in `first_step` on; before the second it waits so many steps."""

    word: str
    first_step: int
    waits: int = 0


# A window is fetched a step ahead, before the first step too, and written back when the next step does not use it.
LANES_OF_STEPS = {
    "in: exponentials": [Job("", -1)],
    "in: lm_head, sums": [Job("", -1, waits=1)],
    "vector unit": [Job("dlogits ", 0)],
    "matrix unit": [Job("dhidden ", 1), Job("dlm_head ", 1)],
    "out: sums": [Job("", 2)],
}


@dataclass(frozen=True)
class Line:
    """One array: its name and bytes in HBM (0: it is not there), which way it moves, what of it is in VMEM."""

    name: str
    hbm: int
    way: str
    what: str
    vmem: int
    paint: Paint


def memory() -> str:
    """What one block of tokens has in HBM and in VMEM, kernel by kernel."""
    weights, kept = HIDDEN_DIM * VOCAB_SIZE, TOKENS * VOCAB_SIZE
    tiles = BLOCKS.tiles(VOCAB_SIZE)
    vmem = logits_vmem_terms(BLOCKS, HIDDEN_DIM, ITEMSIZE)
    hidden = Line("hiddenᵀ", HIDDEN_DIM * TOKENS * 2, "in", "one window", vmem["hidden"], STAYS)
    first = [
        hidden,
        Line("lm_head", weights * 2, "in", "two windows, one transposed", vmem["lm_head"], STREAMS),
        Line("", 0, "", f"logits, {BLOCKS.piece_tokens} tokens at a time", vmem["logits"], INSIDE),
        Line("exponentials", kept * 2, "out", "two windows", vmem["exponentials"], STREAMS),
        Line("their references", tiles * TOKENS * 4, "out", "a row of each tile", 2 * TOKENS * 4, STREAMS),
        Line("lse, label_logit", 2 * TOKENS * 4, "out", "a row of each", 2 * TOKENS * 4, STAYS),
    ]
    vmem = gradients_vmem_terms(BLOCKS, HIDDEN_DIM, ITEMSIZE)
    second = [
        hidden,
        Line("exponentials", kept * 2, "in", "two windows", vmem["exponentials"], STREAMS),
        Line("their references", tiles * TOKENS * 4, "in", "a row of each tile", 2 * TOKENS * 4, STREAMS),
        Line("labels, lse, push, at_label", 4 * TOKENS * 4, "in", "a row of each", 4 * TOKENS * 4, STAYS),
        Line("", 0, "", "dlogits of two tiles", vmem["dlogits"], INSIDE),
        Line("lm_head", weights * 2, "in", "two windows", vmem["lm_head"], STREAMS),
        Line(
            "sums of dlm_head", weights * 4, "in and out", "a pair, two windows in and out", vmem["dlm_head"], STREAMS
        ),
        Line("dhiddenᵀ", HIDDEN_DIM * TOKENS * 4, "out", "its sum, float32", vmem["sum of dhidden"], STAYS),
    ]
    largest = max(line.hbm for line in first + second), max(line.vmem for line in first + second)
    top, parts = 78.0, [_key(46)]
    for name, units, lines in (("cross_entropy_logits", 1, first), ("cross_entropy_gradients", 2, second)):
        parts.append(heading(f"{name}: {_work(units, lines)}", 0, top + 18))
        top += 34
        parts += [_memory_line(line, top + i * ROW, largest) for i, line in enumerate(lines)]
        top += len(lines) * ROW + 10
    title = f"A block of {TOKENS} tokens, hidden_dim {HIDDEN_DIM}, vocabulary {VOCAB_SIZE} in {tiles} tiles of {TILE}"
    return picture(title, WIDTH, top, "".join(parts))


def _work(units: int, lines: Sequence[Line]) -> str:
    """At a v6e's peaks: what either resource needs at the least."""
    flops = units * 2 * TOKENS * HIDDEN_DIM * VOCAB_SIZE
    moved = sum(line.hbm * (("in" in line.way) + ("out" in line.way)) for line in lines)
    matmuls = "a matmul" if units == 1 else f"{units} matmuls"
    return (
        f"{moved / GB:.1f} GB moved, {1e3 * moved / CHIP.hbm_bytes_per_second:.1f} ms at a {CHIP.name}'s bandwidth;"
        f" {matmuls}, {1e3 * flops / CHIP.peak_bf16_flops:.1f} ms at its peak"
    )


def _memory_line(line: Line, top: float, largest: tuple[int, int]) -> str:
    """HBM to the left, VMEM to the right, bars from the middle outwards, and arrows for what moves between them."""
    width = max(1.0, VMEM_BAR * line.vmem / largest[1])
    parts = [
        rect(VMEM_LEFT, top + 16, width, BAR, line.paint),
        f'<text x="{VMEM_LEFT}" y="{top + 11}">{escape(line.what)}, {_size(line.vmem)}</text>',
    ]
    if line.hbm:
        width = max(1.0, HBM_BAR * line.hbm / largest[0])
        parts += [
            rect(HBM_RIGHT - width, top + 16, width, BAR, ("c5", 0.5)),
            f'<text class="value" x="{HBM_RIGHT}" y="{top + 11}">{escape(line.name)}, {_size(line.hbm)}</text>',
            _arrows(line, top + 16 + BAR / 2),
        ]
    return "".join(parts)


def _arrows(line: Line, y: float) -> str:
    left, right = HBM_RIGHT + 14, VMEM_LEFT - 14
    path = f"M{left} {y}H{right}"
    if "in" in line.way:
        path += f"M{right - 6} {y - 4}L{right} {y}L{right - 6} {y + 4}"
    if "out" in line.way:
        path += f"M{left + 6} {y - 4}L{left} {y}L{left + 6} {y + 4}"
    words = "once" if line.paint is STAYS else "tile by tile" if line.way != "in and out" else "tile by tile, and back"
    middle = f'class="middle" x="{(left + right) / 2}" y="{y - 8}"'
    return f'<path d="{path}" style="stroke:var(--soft);stroke-width:1.2"/><text {middle}>{words}</text>'


def _key(y: float) -> str:
    """Colours, and in the line below which side is which memory."""
    parts = [
        f'<text class="value" x="{HBM_RIGHT}" y="{y + 22}">in HBM</text>',
        f'<text x="{VMEM_LEFT}" y="{y + 22}" style="fill:var(--ink)">in VMEM</text>',
    ]
    x = float(VMEM_LEFT)
    for paint, name in MEANINGS.items():
        parts += [rect(x, y - 9, 10, 10, paint), f'<text x="{x + 14}" y="{y}" style="font-size:11px">{name}</text>']
        x += 28 + 6.2 * len(name)
    return "".join(parts)


def _size(size: int) -> str:
    return f"{size / MIB:.0f} MiB" if size >= MIB else f"{size / 1024:.0f} KiB"


def pipeline() -> str:
    """The gradients' kernel: what happens to which tile in one step of its grid, and the order within a step."""
    top, parts = 76.0, [heading("Steps of the grid. Same number, same colour: same tile of the vocabulary", 0, 50)]
    for step in range(-1, STEPS):
        middle = f'class="middle" x="{_left(step) + STEP / 2 - 2:g}" y="{top}"'
        parts.append(f"<text {middle}>{'before' if step < 0 else f'step {step}'}</text>")
    top += 8
    for name, jobs in LANES_OF_STEPS.items():
        parts.append(f'<text x="0" y="{top + 16:g}">{name}</text>')
        for step in range(-1, STEPS):
            parts += [_job(job, step, i / len(jobs), 1 / len(jobs), top) for i, job in enumerate(jobs)]
        top += LANE + 4
    parts.append(_order(top + 36))
    title = "While the dlogits of one tile are made, those of the tile before are multiplied"
    return picture(title, _left(STEPS), top + 132, "".join(parts))


def _left(step: float) -> float:
    return UNIT_WIDTH + (step + 1) * STEP


def _job(job: Job, step: int, start: float, share: float, top: float) -> str:
    """start, share: of the step's width."""
    since = step - job.first_step
    if since < 0 or 0 < since <= job.waits:
        return ""
    tile = max(0, since - job.waits)
    width = (STEP - 4) * share
    x = _left(step) + (STEP - 4) * start
    box = rect(x, top, width - 2, LANE, (COLORS[tile % len(COLORS)], 0.25))
    middle = f'class="middle" x="{x + width / 2 - 1:g}" y="{top + 16:g}" style="font-size:10px"'
    return f"{box}<text {middle}>{job.word}{tile}</text>"


def _order(top: float) -> str:
    """Which pieces stand beside which in the kernel's code, within a step."""
    rows, pieces = HIDDEN_DIM // BLOCKS.product_rows, TOKENS // LANES
    left, width = _left(-1), (STEPS + 1) * STEP - 4
    parts = [heading("Within step 2, as its code is written: a product, then the dlogits below it", 0, top)]
    for i, name in enumerate(("dhidden", "dlm_head")):
        text = f"{name} 1: {rows} products of {BLOCKS.product_rows} rows of hidden_dim"
        parts.append(f'<text class="middle" x="{left + (i + 0.5) * width / 2:g}" y="{top + 24:g}">{text}</text>')
    top += 32
    for name, count, color in (("matrix unit", 2 * rows, COLORS[1]), ("vector unit", pieces, COLORS[2])):
        parts.append(f'<text x="0" y="{top + 16:g}">{name}</text>')
        size = width / count
        parts += [rect(left + i * size, top, size - 2, LANE, (color, 0.35)) for i in range(count)]
        top += LANE + 4
    text = f"dlogits 2: {pieces} pieces of {LANES} tokens"
    return "".join(parts) + f'<text class="middle" x="{left + width / 2:g}" y="{top + 12:g}">{text}</text>'


PICTURES = {"cross_entropy_memory.svg": memory, "cross_entropy_pipeline.svg": pipeline}

if __name__ == "__main__":
    for file, draw in PICTURES.items():
        (FOLDER / file).write_text(standalone(draw()))
