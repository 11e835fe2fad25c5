# SPDX-License-Identifier: Apache-2.0
"""Peers' attention on one TPU, forward and backward alone: `attention_case` returns (function, args), all bfloat16.

| peer | arrays | what is called |
|---|---|---|
| jax_splash | [batch, heads, seq, head_dim] | `jax.experimental.pallas.ops.tpu.splash_attention`, fused backward |
| tokamax_splash | [batch, heads, seq, head_dim] | Tokamax's own splash kernel, under `vmap` |
| tokamax_op | [batch, seq, heads, head_dim] | the implementation behind `tokamax.dot_product_attention` |
| levanter_grug | [batch, seq, heads, head_dim] | JAX's splash as `levanter.grug` has it: blocks ≤ 512, split |

Each peer is called in the layout of its own API, and the transposes that it does are counted. `levanter_grug` is built
from Levanter's own helpers (masks, block sizes); only its `shard_map` over one device is left out.

The splash kernels take no scale; multiplying q by it is the caller's, and left out here, except where the peer does it.
The backward pass takes (q, k, v, out, lse, dout), in the peer's layout, lse [batch, heads, seq] in float32, and makes
(dq, dk, dv); delta = sum(out * dout) is part of it.

Sources of the block sizes: `BLOCKS`.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import ShapeDtypeStruct as Shape
from jax.experimental.pallas.ops.tpu import splash_attention as jax_splash

from bench.peers import require
from bench.shapes import AttentionShape

PEERS = ("jax_splash", "tokamax_splash", "tokamax_op", "levanter_grug")
Passes = Literal["forward", "backward"]

HEAD_DIM_MINOR, SEQ_MINOR = 1, 2  # both libraries' QKVLayout


class Case(NamedTuple):
    function: Callable[..., Any]
    args: tuple[Shape, ...]


@dataclass(frozen=True)
class Blocks:
    """query, key: blocks in memory; compute: of keys at a time. layouts: of q, k, v as the kernel reads them.

    scheduler: the compiler's experimental scheduler. save_residuals: the forward pass also writes lse and the maximum.
    dq_steps: Tokamax's backward, how many partial dq are kept: 3, or None for one per key block.
    diagonal: Tokamax's forward splits blocks on the diagonal in diagonal × diagonal and leaves out the upper ones.
    """

    query: int
    key: int
    compute: int
    layouts: tuple[int, int, int] = (HEAD_DIM_MINOR, HEAD_DIM_MINOR, HEAD_DIM_MINOR)
    scheduler: bool = False
    save_residuals: bool = False
    dq_steps: int | None = None
    diagonal: int | None = None

    def fitting(self, seq_len: int) -> "Blocks":
        """The same, no block being longer than the sequence."""
        query, key = min(self.query, seq_len), min(self.key, seq_len)
        return replace(self, query=query, key=key, compute=min(self.compute, key))


# (passes, chip) -> what was fastest; causal, head_dim 128, long sequences. 2026-11-21, from the timings that Tokamax
# 0.0.17 ships (tokamax/data/autotuning/{tpu_v5,tpu_v6_lite,tpu7x}), which have no backward pass on v5p and v6e: there
# v6e's are the fastest predicted of a handful, v5p's such as compile. JAX's kernel has no table, and gets the same.
BLOCKS: dict[tuple[Passes, str], Blocks] = {
    ("forward", "v5p"): Blocks(1024, 1024, 256, (1, 2, 1)),
    ("forward", "v6e"): Blocks(2048, 2048, 512, (2, 1, 1), scheduler=True),
    ("forward", "tpu7x"): Blocks(2048, 2048, 512, (1, 2, 1), scheduler=True),
    ("backward", "tpu7x"): Blocks(2048, 2048, 512, dq_steps=3),
    ("backward", "v5p"): Blocks(1024, 1024, 512, dq_steps=3),
    ("backward", "v6e"): Blocks(2048, 2048, 512, dq_steps=3),
}
_BLOCKS_ELSEWHERE = Blocks(1024, 1024, 512)


def attention_case(
    peer: str,
    shape: AttentionShape,
    passes: Passes,
    chip: str,
    *,
    sliding_window: int | None = None,
    blocks: Blocks | None = None,
) -> Case:
    """The peer's causal attention, to be traced for `chip`; see the module for its layout and arguments.

    sliding_window: keys that a query sees, itself included; None for all before it. blocks: None for the peer's best.

    Raises ValueError for a peer that is not in `PEERS`, ModuleNotFoundError where it is not installed.
    """
    if peer not in PEERS:
        raise ValueError(f"no peer is called {peer!r}; there are {', '.join(PEERS)}.")
    if peer == "levanter_grug" and blocks is not None:
        raise ValueError(f"levanter_grug: blocks={blocks}, but Levanter chooses its own; take jax_splash to give some.")
    blocks = blocks or _best(passes, shape, chip)
    make = {
        "jax_splash": _jax_splash,
        "tokamax_splash": _tokamax_splash,
        "tokamax_op": _tokamax_op,
        "levanter_grug": _levanter_grug,
    }[peer]
    is_transposed = peer in ("tokamax_op", "levanter_grug")
    function = make(shape, passes, sliding_window, blocks)
    return Case(function, _args(shape, passes, is_transposed))


def block_sizes_of(peer: str, shape: AttentionShape, passes: Passes, chip: str) -> dict[str, Any]:
    """What `attention_case` runs with, for tables."""
    if peer == "levanter_grug":
        sizes = _levanter_block_sizes(shape)
        return {"query": sizes.block_q, "key": sizes.block_kv, "compute": sizes.block_kv_compute, "split": True}
    return asdict(_best(passes, shape, chip))


def _best(passes: Passes, shape: AttentionShape, chip: str) -> Blocks:
    blocks = BLOCKS.get((passes, chip), _BLOCKS_ELSEWHERE).fitting(shape.seq_len)
    if shape.seq_len // blocks.key <= 3:
        return replace(blocks, dq_steps=None)  # Tokamax's own rule: with few blocks, keep all of them
    return blocks


def _args(shape: AttentionShape, passes: Passes, is_transposed: bool) -> tuple[Shape, ...]:
    def array(heads: int) -> Shape:
        seq_and_heads = (shape.seq_len, heads) if is_transposed else (heads, shape.seq_len)
        return Shape((shape.batch, *seq_and_heads, shape.head_dim), jnp.bfloat16)

    q, kv = array(shape.num_heads), array(shape.num_kv_heads)
    lse = Shape((shape.batch, shape.num_heads, shape.seq_len), jnp.float32)
    return (q, kv, kv) if passes == "forward" else (q, kv, kv, q, lse, q)


def _jax_kernel(shape: AttentionShape, mask: Any, sizes: jax_splash.BlockSizes, **options: Any):
    heads = jax_splash.MultiHeadMask([mask] * shape.num_heads)
    return jax_splash.make_splash_mha(mask=heads, block_sizes=sizes, head_shards=1, q_seq_shards=1, **options)


def _jax_splash(shape: AttentionShape, passes: Passes, sliding_window: int | None, blocks: Blocks):
    square = (shape.seq_len, shape.seq_len)
    mask = jax_splash.CausalMask(square)
    if sliding_window is not None:  # as one mask that the kernel can compute: an `and` of two is read from memory
        mask = jax_splash.LocalMask(square, (sliding_window - 1, 0), 0)
    layouts = [jax_splash.QKVLayout(layout) for layout in blocks.layouts]
    sizes = jax_splash.BlockSizes(
        block_q=blocks.query,
        block_kv=blocks.key,
        block_kv_compute=blocks.compute,
        block_q_dkv=blocks.query,
        block_kv_dkv=blocks.key,
        block_kv_dkv_compute=blocks.compute,
        use_fused_bwd_kernel=True,
        **dict(zip(("q_layout", "k_layout", "v_layout"), layouts, strict=True)),
    )
    if passes == "forward":
        return lambda q, k, v: jax.vmap(_jax_kernel(shape, mask, sizes, save_residuals=blocks.save_residuals))(q, k, v)
    return jax.vmap(partial(_jax_backward, shape, mask, sizes))


def _jax_backward(shape, mask, sizes, q, k, v, out, lse, dout):
    """The backward pass of `jax.experimental`'s splash alone, as its custom_vjp calls it; jax is pinned."""
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as internals

    kernel = _jax_kernel(shape, mask, sizes)
    residuals = (q, k, v, None, None, out, lse, kernel.dq_mask_info, kernel.dkv_mask_info)
    gradients = internals._splash_attention_bwd(res=residuals, do=dout, **kernel.kwargs)
    return gradients[3:6]


def _levanter_block_sizes(shape: AttentionShape) -> jax_splash.BlockSizes:
    from levanter.kernels.pallas import splash_attention as levanter_splash

    return levanter_splash.splash_attention_block_sizes(
        q_seq_len=shape.seq_len, kv_seq_len=shape.seq_len, q_seq_shards=1, kv_seq_shards=1
    )


def _levanter_grug(shape: AttentionShape, passes: Passes, sliding_window: int | None, blocks: Blocks):
    """Takes its own block sizes; `blocks` is what the others would."""
    from levanter.kernels.pallas import splash_attention as levanter_splash

    spec = levanter_splash.SplashAttentionMaskSpec(is_causal=True, sliding_window=sliding_window)
    mask = levanter_splash.lower_splash_attention_mask(
        mask=spec, q_seq_len=shape.seq_len, kv_seq_len=shape.seq_len, num_heads=shape.num_heads, q_seq_shards=1
    ).base_mask
    sizes, scale = _levanter_block_sizes(shape), shape.head_dim**-0.5

    def forward(q, k, v):
        q, k, v = (x.swapaxes(1, 2) for x in (q, k, v))
        out: Any = jax.vmap(_jax_kernel(shape, mask, sizes))(q * scale, k, v)
        return out.swapaxes(1, 2)

    def backward(q, k, v, out, lse, dout):
        q, k, v, out, dout = (x.swapaxes(1, 2) for x in (q, k, v, out, dout))
        dq, dk, dv = jax.vmap(partial(_jax_backward, shape, mask, sizes))(q * scale, k, v, out, lse, dout)
        return tuple(x.swapaxes(1, 2) for x in (dq * scale, dk, dv))

    return forward if passes == "forward" else backward


_TOKAMAX_SPLASH = "tokamax._src.ops.experimental.tpu.splash_attention"


def _tokamax_splash(shape: AttentionShape, passes: Passes, sliding_window: int | None, blocks: Blocks):
    """From the kernel's factory, with explicit blocks: the public op looks into a cache of timings while tracing."""
    kernels, masks = (
        require(f"{_TOKAMAX_SPLASH}.splash_attention_kernel"),
        require(f"{_TOKAMAX_SPLASH}.splash_attention_mask"),
    )
    square = (shape.seq_len, shape.seq_len)
    mask = masks.CausalMask(square)
    if sliding_window is not None:
        mask = masks.LocalMask(square, (sliding_window - 1, 0), 0)
    config = replace(
        kernels.SplashConfig.get_default(),
        block_q=blocks.query,
        block_kv=blocks.key,
        block_kv_compute=blocks.compute,
        block_q_dkv=blocks.query,
        block_kv_dkv=blocks.key,
        block_kv_dkv_compute=blocks.compute,
        q_layout=kernels.QKVLayout(blocks.layouts[0]),
        k_layout=kernels.QKVLayout(blocks.layouts[1]),
        v_layout=kernels.QKVLayout(blocks.layouts[2]),
        use_experimental_scheduler=blocks.scheduler,
        dq_reduction_steps=blocks.dq_steps,
        qk_diag_skip=blocks.diagonal is not None,
        sv_diag_skip=blocks.diagonal is not None,
        qk_diag_grid=blocks.diagonal or 2,
    )

    def kernel():
        return kernels.make_splash_mha_single_device(mask, config=config, save_residuals=blocks.save_residuals)

    def backward(q, k, v, out, lse, dout):
        made = kernel()
        # Base-2 statistics are the default, as is natural lse outside.
        residuals = (q, k, v, None, None, out, lse * kernels.LOG2E, made.dkv_mask_info, None)
        gradients = kernels._splash_attention_bwd(res=residuals, grads=dout, **made.kwargs)
        return gradients[2:5]

    return (lambda q, k, v: jax.vmap(kernel())(q, k, v)) if passes == "forward" else jax.vmap(backward)


def _tokamax_op(shape: AttentionShape, passes: Passes, sliding_window: int | None, blocks: Blocks):
    """As the op does around its kernel: scale q, transpose, splash, transpose back. It has no sliding window."""
    if sliding_window is not None:
        raise ValueError(f"tokamax_op: sliding_window={sliding_window}, but the op has none; take tokamax_splash.")
    splash: Callable[..., Any] = _tokamax_splash(shape, passes, None, blocks)
    scale = shape.head_dim**-0.5

    def transposed(*arrays):
        return tuple(x.swapaxes(1, 2) for x in arrays)

    def forward(q, k, v):
        result = splash(*transposed(q * scale, k, v))
        if not blocks.save_residuals:
            return result.swapaxes(1, 2)
        out, stats = result
        return out.swapaxes(1, 2), stats["max_logits"], stats["logsumexp"]

    def backward(q, k, v, out, lse, dout):
        q, k, v, out, dout = transposed(q * scale, k, v, out, dout)
        dq, dk, dv = transposed(*splash(q, k, v, out, lse, dout))
        return dq * scale, dk, dv

    return forward if passes == "forward" else backward
