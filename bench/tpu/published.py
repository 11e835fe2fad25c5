# SPDX-License-Identifier: Apache-2.0
"""Timings that others measured on TPUs and published, each with a function that builds the same case.

Tokamax ships its autotuner's timings in its wheel, tokamax/data/autotuning/<chip>/<op>.json: the median of five, of one
JAX device, the union of the times in which the profiler saw it busy (`tokamax/_src/benchmarking.py`). Others are wall
clocks, and hold what the host takes to start the program too; those that hold little else are left out, such as the
matmul guide's at 1024³: 0.12 ms, whatever the kernel.

Every figure was read at its source on 2026-11-21.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
from jax import ShapeDtypeStruct as Shape
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from bench.peers.attention import HEAD_DIM_MINOR, SEQ_MINOR, Blocks, Case, attention_case
from bench.peers.cross_entropy import loss_case
from bench.shapes import AttentionShape, LossShape

Passes = Literal["forward", "backward", "forward_backward"]

_MATMUL_GUIDE = "jax-ml/jax, docs/pallas/tpu/matmul.ipynb, printed outputs (timeit)"
_LEVANTER = "marin-community/marin, .agents/projects/linear_ce_loss.md, 2026-02-21, v5p-8 (wall clock)"
_MARIN_SPLASH = "marin-community/marin PR #6330, comment of 2026-06-13, 20-layer median per layer (wall clock)"
_TOKAMAX_FOLDERS = {"v5p": "tpu_v5", "v6e": "tpu_v6_lite", "tpu7x": "tpu7x"}


@dataclass(frozen=True)
class Timing:
    """milliseconds: published, of one JAX device. source: file, pull request or document. case: builds the function.

    blocks: as published, "" where there are none to choose.
    """

    chip: str
    what: str
    shape: str
    passes: Passes
    milliseconds: float
    source: str
    case: Callable[[], Case]
    blocks: str = ""

    def __str__(self) -> str:
        return f"{self.chip} {self.what} {self.shape} {self.passes}"


def _tokamax_source(chip: str, op: str, passes: Passes) -> str:
    vjp = "_vjp" if passes == "backward" else ""
    return f"tokamax 0.0.17, tokamax/data/autotuning/{_TOKAMAX_FOLDERS[chip]}/{op}{vjp}.json"


def _attention(chip: str, peer: str, extents: tuple[int, ...], passes: Passes, blocks: Blocks, ms: float) -> Timing:
    """extents: batch, seq_len, num_heads, num_kv_heads, head_dim."""
    assert passes != "forward_backward"
    shape = AttentionShape("×".join(map(str, extents)), *extents)
    op = "pallas_mosaic_tpu_flash_attention" if peer == "tokamax_op" else "pallas_mosaic_tpu_splash_attention"
    return Timing(
        chip=chip,
        what=f"attention, {peer}" + (", with residuals" if blocks.save_residuals else ""),
        shape=shape.name,
        passes=passes,
        milliseconds=ms,
        source=_tokamax_source(chip, op, passes),
        case=partial(attention_case, peer, shape, passes, chip, blocks=blocks),
        blocks=f"{blocks.query}/{blocks.key}/{blocks.compute}",
    )


_LOSS_OPS = {
    "tokamax_xla": "linear_softmax_cross_entropy_loss",
    "tokamax_pallas": "pallas_mosaic_tpu_linear_softmax_cross_entropy_loss",
    "tokamax_chunked": "chunked_xla_linear_softmax_cross_entropy_loss",
}


def _loss(
    chip: str,
    peer: str,
    passes: Passes,
    ms: float,
    blocks: tuple[int, ...] | None = None,
    extents: tuple[int, int, int] = (4096, 4096, 128256),
    source: str | None = None,
) -> Timing:
    """extents: tokens, hidden_dim, vocab_size."""
    shape = LossShape("×".join(map(str, extents)), *extents)
    return Timing(
        chip=chip,
        what=f"loss, {peer}",
        shape=shape.name,
        passes=passes,
        milliseconds=ms,
        source=source or _tokamax_source(chip, _LOSS_OPS[peer], passes),
        case=partial(loss_case, peer, shape, passes, chip, blocks=blocks),
        blocks="/".join(map(str, blocks or ())),
    )


def _matmul_kernel(x_ref, y_ref, z_ref, acc_ref):
    """The guide's: grid (m, n, k), sums in float32 in VMEM, written at the last block of k."""

    @pl.when(pl.program_id(2) == 0)
    def start():
        acc_ref[...] = jnp.zeros_like(acc_ref)

    acc_ref[...] += jnp.dot(x_ref[...], y_ref[...], preferred_element_type=jnp.float32)

    @pl.when(pl.program_id(2) == pl.num_programs(2) - 1)
    def finish():
        z_ref[...] = acc_ref[...].astype(z_ref.dtype)


def matmul_case(size: int, blocks: tuple[int, int, int] | None) -> Case:
    """[size, size] x [size, size] in bfloat16, with blocks of m, k and n, or XLA's own."""
    x = Shape((size, size), jnp.bfloat16)
    if blocks is None:
        return Case(jnp.matmul, (x, x))
    m, k, n = blocks
    call = pl.pallas_call(
        _matmul_kernel,
        out_shape=x,
        grid=(size // m, size // n, size // k),
        in_specs=[pl.BlockSpec((m, k), lambda i, j, s: (i, s)), pl.BlockSpec((k, n), lambda i, j, s: (s, j))],
        out_specs=pl.BlockSpec((m, n), lambda i, j, s: (i, j)),
        scratch_shapes=[pltpu.VMEM((m, n), jnp.float32)],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
    )
    return Case(call, (x, x))


def _matmul(size: int, blocks: tuple[int, int, int] | None, ms: float) -> Timing:
    what = "matmul, Pallas" if blocks else "matmul, XLA"
    sizes = "/".join(map(str, blocks or ()))
    case = partial(matmul_case, size, blocks)
    return Timing("v5e", what, f"{size}×{size}×{size}", "forward", ms, _MATMUL_GUIDE, case, sizes)


def _normalize(x, scale, offset):
    """Layer norm over the first axis, in float32: XLA reads x three times and writes once; bound by HBM alone."""
    wide = x.astype(jnp.float32)
    wide -= jnp.mean(wide, axis=0, keepdims=True)
    wide *= jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=0, keepdims=True) + 1e-6)
    return (wide * scale[:, None, None] + offset[:, None, None]).astype(x.dtype)


def _norm(chip: str, ms: float) -> Timing:
    x, weight = Shape((128, 768, 768), jnp.bfloat16), Shape((128,), jnp.float32)
    case = partial(Case, _normalize, (x, weight, weight))
    source = _tokamax_source(chip, "normalization", "forward")
    return Timing(chip, "layer norm, XLA", "128×768×768", "forward", ms, source, case)


_H, _S = HEAD_DIM_MINOR, SEQ_MINOR

TIMINGS: tuple[Timing, ...] = (
    _matmul(4096, (128, 128, 128), 11.772),
    _matmul(4096, (512, 1024, 1024), 0.889),
    _matmul(4096, None, 0.827),
    _matmul(8192, (512, 1024, 1024), 6.099),
    _matmul(8192, None, 6.047),
    _attention("v5p", "tokamax_op", (16, 1024, 16, 16, 128), "forward", Blocks(1024, 1024, 512), 0.705),
    _attention("v5p", "tokamax_op", (4, 4096, 16, 16, 128), "forward", Blocks(1024, 1024, 256, (_H, _S, _H)), 1.237),
    _attention(
        "v5p",
        "tokamax_op",
        (4, 4096, 16, 16, 128),
        "forward",
        Blocks(1024, 1024, 256, (_H, _S, _H), save_residuals=True),
        1.476,
    ),
    _attention("v5p", "tokamax_op", (4, 4096, 8, 8, 256), "forward", Blocks(1024, 1024, 512), 1.127),
    Timing(
        chip="v5p",
        what="attention, levanter_grug without transposes",
        shape="1×8192×8×8×128",
        passes="forward",
        milliseconds=0.778,
        source=_MARIN_SPLASH,
        case=partial(
            attention_case,
            "jax_splash",
            AttentionShape("1×8192×8×8×128", 1, 8192, 8, 8, 128),
            "forward",
            "v5p",
            blocks=Blocks(512, 512, 512),
        ),
        blocks="512/512/512",
    ),
    _norm("v5p", 0.257),
    _loss("v5p", "tokamax_xla", "forward", 10.562),
    _loss("v5p", "tokamax_xla", "backward", 29.800),
    _loss("v5p", "tokamax_pallas", "forward", 9.983, (1024, 4096, 1024)),
    _loss("v5p", "tokamax_pallas", "backward", 32.866, (4096, 256, 384)),
    _loss("v5p", "tokamax_chunked", "forward", 13.812, (1024, 2048)),
    _loss("v5p", "tokamax_chunked", "backward", 36.657, (1024, 2048)),
    _loss("v5p", "levanter_xla", "forward", 0.688, (32768,), (512, 512, 128256), _LEVANTER),
    _loss("v5p", "levanter_xla", "forward_backward", 2.085, (32768,), (512, 512, 128256), _LEVANTER),
    _loss("v5p", "levanter_xla", "forward_backward", 98.667, (32768,), (8192, 4096, 128256), _LEVANTER),
    _attention("v6e", "tokamax_op", (16, 1024, 16, 16, 128), "forward", Blocks(1024, 1024, 512, scheduler=True), 0.879),
    _attention(
        "v6e",
        "tokamax_op",
        (16, 1024, 16, 16, 128),
        "forward",
        Blocks(1024, 1024, 1024, (_S, _H, _H), save_residuals=True),
        1.279,
    ),
    _attention(
        "v6e", "tokamax_op", (4, 4096, 16, 16, 128), "forward", Blocks(1024, 1024, 512, (_S, _H, _H), True), 1.577
    ),
    _attention(
        "v6e", "tokamax_op", (4, 4096, 8, 8, 256), "forward", Blocks(1024, 1024, 512, (_S, _H, _H), True), 1.040
    ),
    _norm("v6e", 0.434),
    _loss("v6e", "tokamax_xla", "forward", 7.620),
    _loss("v6e", "tokamax_xla", "backward", 20.344),
    _loss("v6e", "tokamax_pallas", "forward", 5.769, (2048, 4096, 1024)),
    _loss("v6e", "tokamax_pallas", "backward", 20.470, (1024, 4096, 256)),
    _loss("v6e", "tokamax_chunked", "forward", 9.197, (1024, 2048)),
    _loss("v6e", "tokamax_chunked", "backward", 37.159, (1024, 2048)),
    _attention(
        "tpu7x", "tokamax_op", (16, 1024, 16, 16, 128), "forward", Blocks(1024, 1024, 512, (_H, _S, _H), True), 0.723
    ),
    _attention("tpu7x", "tokamax_op", (16, 1024, 16, 16, 128), "backward", Blocks(1024, 1024, 512), 1.411),
    _attention(
        "tpu7x", "tokamax_op", (4, 4096, 16, 16, 128), "forward", Blocks(1024, 1024, 512, (_H, _S, _H), True), 1.355
    ),
    _attention("tpu7x", "tokamax_op", (4, 4096, 16, 16, 128), "backward", Blocks(2048, 2048, 512), 3.050),
    _attention(
        "tpu7x", "tokamax_splash", (1, 4096, 32, 8, 128), "forward", Blocks(1024, 1024, 1024, diagonal=4), 0.587
    ),
    _attention(
        "tpu7x",
        "tokamax_splash",
        (1, 4096, 32, 8, 128),
        "forward",
        Blocks(1024, 1024, 1024, diagonal=2, save_residuals=True),
        0.677,
    ),
    _attention(
        "tpu7x", "tokamax_splash", (1, 4096, 32, 8, 128), "backward", Blocks(1024, 1024, 1024, dq_steps=3), 1.254
    ),
    _attention(
        "tpu7x", "tokamax_splash", (1, 8192, 32, 8, 128), "forward", Blocks(2048, 2048, 512, (_H, _S, _H), True), 1.976
    ),
    _attention(
        "tpu7x", "tokamax_splash", (1, 8192, 32, 8, 128), "backward", Blocks(2048, 2048, 512, dq_steps=3), 4.133
    ),
    _norm("tpu7x", 0.192),
    _loss("tpu7x", "tokamax_xla", "forward", 6.463),
    _loss("tpu7x", "tokamax_xla", "backward", 15.084),
    _loss("tpu7x", "tokamax_pallas", "forward", 5.427, (1024, 4096, 1024)),
    _loss("tpu7x", "tokamax_pallas", "backward", 17.232, (2048, 512, 768)),
    _loss("tpu7x", "tokamax_chunked", "forward", 7.062, (1024, 2048)),
    _loss("tpu7x", "tokamax_chunked", "backward", 23.683, (1024, 2048)),
)
