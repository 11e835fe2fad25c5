# SPDX-License-Identifier: Apache-2.0
"""Attention on NVIDIA GPUs by cuDNN, through `jax.nn.dot_product_attention`.

Never yet run on a GPU, and not chosen by itself: tests lower it for one, and compare what it asks for on a CPU.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from grug_kernels import dispatch
from grug_kernels.attention import xla
from grug_kernels.attention.block_sizes import BlockSizes
from grug_kernels.attention.mask import AttentionMask, Intervals
from grug_kernels.attention.results import Results
from grug_kernels.dispatch import UnsupportedError
from grug_kernels.sharding import vary_alike

_LARGEST_HEAD = 256  # from Hopper on; 128 before, which JAX knows


def native_mask(mask: AttentionMask | Intervals, q_len: int, kv_len: int) -> Mapping[str, Any] | None:
    """How `jax.nn.dot_product_attention` is told of `mask` so that cuDNN skips what nobody sees, or None.

    cuDNN has to know at trace time: a mask of data, even one that turns out to be causal, has no such form.
    """
    if isinstance(mask, Intervals):
        return None
    window = mask.sliding_window
    if mask.segment_ids is not None or mask.prefix_len is not None or not isinstance(window, int | np.integer | None):
        return None
    if window is not None and window >= kv_len:
        window = None
    if not mask.causal:
        return {} if window is None else None
    if q_len != kv_len:  # Its first query stands at the first key, our last at the last.
        return None
    return {"is_causal": True} | ({} if window is None else {"local_window_size": (int(window) - 1, 0)})


def attention(
    q: Float[Array, "batch q_len num_heads head_dim"],
    k: Float[Array, "batch kv_len num_kv_heads head_dim"],
    v: Float[Array, "batch kv_len num_kv_heads v_head_dim"],
    intervals: Intervals,
    sinks: Float[Array, " num_heads"] | None,
    *,
    sm_scale: float,
    logit_soft_cap: float | None,
    block_sizes: BlockSizes | None,
    with_max_logits: bool,
    native: Mapping[str, Any] | None = None,
) -> Results:
    """See `api.attention_with_lse`.

    Masks: causal, causal with a window that is a Python int, and none at all are cuDNN's own (`native`, made by
    `native_mask`), which skips what they hide. Any other comes as a bias [batch, 1, q_len, kv_len] in the type of q:
    2 * batch * q_len * kv_len bytes, kept for the backward pass too unless the layer is rematerialised, and no key is
    skipped. At 8192 tokens that is 128 MiB for each row; "xla" has neither cost.

    lse and max_logits are not cuDNN's: JAX rounds lse to the type of q, and drops its gradient. They are made anew,
    blockwise ("xla"), in float32, for another 2 * head_dim FLOPs a score; under jit only where they are asked for.

    What cuDNN keeps for the backward pass has no name that a remat policy could save: "save_attention" is as "full".

    Raises:
      UnsupportedError: no NVIDIA GPU or no cuDNN to trace for; sinks, a soft cap, block sizes; a type other than
        bfloat16 and float16; v_head_dim other than head_dim, or one that is above 256 (128 before Hopper) or no
        multiple of 8; odd lengths under a mask that is not native.
    """
    _check(q, k, v, sinks, logit_soft_cap, block_sizes, native)
    # Of keys that several shards share JAX would otherwise take one shard's gradient for the sum of all.
    q, k, v, intervals = vary_alike((q, k, v, intervals))
    mask = {"mask": _visible(intervals, k.shape[1])} if native is None else native
    try:
        out = jax.nn.dot_product_attention(q, k, v, scale=sm_scale, implementation="cudnn", **mask)
    except (NotImplementedError, RuntimeError) as error:  # What depends on the GPU, and "cuDNN is not detected."
        raise UnsupportedError(f"attention: 'cudnn' cannot: {error} Use 'xla'.") from error
    sees = intervals.lower < intervals.upper
    out = jnp.where(sees[..., None, None], out, 0)  # To cuDNN all keys of such a query are equally far away.
    options: dict[str, Any] = {"logit_soft_cap": None, "block_sizes": None, "with_max_logits": with_max_logits}
    return xla.attention(q, k, v[..., :1], intervals, None, sm_scale=sm_scale, **options)._replace(out=out)


def _visible(intervals: Intervals, kv_len: int):
    """bool [batch, 1, q_len, kv_len]."""
    key = jnp.arange(kv_len, dtype=jnp.int32)
    return ((intervals.lower[..., None] <= key) & (key < intervals.upper[..., None]))[:, None]


def _check(q, k, v, sinks, logit_soft_cap, block_sizes, native) -> None:
    (_, q_len, _, head_dim), kv_len, v_head_dim = q.shape, k.shape[1], v.shape[3]
    refusals = (
        (dispatch.platform() != "gpu", "is for NVIDIA GPUs, and there is none here to trace for"),
        (sinks is not None, "has no sinks"),
        (logit_soft_cap is not None, "has no soft cap"),
        (block_sizes is not None, f"chooses its blocks itself, got {block_sizes}"),
        (q.dtype not in (jnp.bfloat16, jnp.float16), f"takes bfloat16 and float16, not {q.dtype}"),
        (v_head_dim != head_dim, f"takes values as wide as keys, not v_head_dim={v_head_dim}, head_dim={head_dim}"),
        (head_dim > _LARGEST_HEAD or head_dim % 8, f"takes multiples of 8 up to {_LARGEST_HEAD}, not {head_dim=}"),
        (
            native is None and (q_len % 2 or kv_len % 2),
            f"takes even lengths alone under a mask that is data, not {q_len} queries and {kv_len} keys",
        ),
    )
    for applies, reason in refusals:
        if applies:
            raise UnsupportedError(f"attention: 'cudnn' {reason}; use 'xla'.")
