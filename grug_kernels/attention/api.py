# SPDX-License-Identifier: Apache-2.0
"""The public functions: they check the arguments, choose an implementation, and shard_map it."""

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

from grug_kernels import dispatch
from grug_kernels.attention import context, cudnn, reference, xla
from grug_kernels.attention.block_sizes import BlockSizes
from grug_kernels.attention.mask import STRIPE, AttentionMask, Intervals
from grug_kernels.attention.results import Results
from grug_kernels.sharding import Axes, mesh_of, sharded_axes, shards_of

Implementation = Literal["pallas_tpu", "cudnn", "xla", "reference"]


def _pallas_tpu(*args: Any, **kwargs: Any):
    from grug_kernels.attention import pallas_tpu  # Pallas takes half a second to import, and only a TPU needs it

    return pallas_tpu.attention(*args, **kwargs)


IMPLEMENTATIONS: Mapping[str, Callable[..., Any]] = {
    "pallas_tpu": _pallas_tpu,
    "cudnn": cudnn.attention,
    "xla": xla.attention,
    "reference": reference.attention,
}

_NUMBER = int | float | np.number


def attention(
    q: Float[Array, "batch seq_len num_heads head_dim"],
    k: Float[Array, "batch kv_len num_kv_heads head_dim"],
    v: Float[Array, "batch kv_len num_kv_heads v_head_dim"],
    mask: AttentionMask | Intervals,
    *,
    sinks: Float[Array, " num_heads"] | None = None,
    logit_soft_cap: float | None = None,
    sm_scale: float | None = None,
    implementation: Implementation | None = None,
    block_sizes: BlockSizes | None = None,
) -> Float[Array, "batch seq_len num_heads v_head_dim"]:
    """The first result of `attention_with_lse`, which see."""
    return attention_with_lse(
        q,
        k,
        v,
        mask,
        sinks=sinks,
        logit_soft_cap=logit_soft_cap,
        sm_scale=sm_scale,
        implementation=implementation,
        block_sizes=block_sizes,
    )[0]


def attention_with_lse(
    q: Float[Array, "batch seq_len num_heads head_dim"],
    k: Float[Array, "batch kv_len num_kv_heads head_dim"],
    v: Float[Array, "batch kv_len num_kv_heads v_head_dim"],
    mask: AttentionMask | Intervals,
    *,
    sinks: Float[Array, " num_heads"] | None = None,
    logit_soft_cap: float | None = None,
    sm_scale: float | None = None,
    implementation: Implementation | None = None,
    block_sizes: BlockSizes | None = None,
) -> tuple[Float[Array, "batch seq_len num_heads v_head_dim"], Float[Array, "batch num_heads seq_len"]]:
    """Each query's average of the values it sees, weighted by softmax, and the log-sum-exp of its scores.

    For query i of head n, with key head n // (num_heads // num_kv_heads), over the keys j that `mask` lets it see:

        z[j]  = sm_scale * sum_h q[i, h] * k[j, h]          with logit_soft_cap c:  c * tanh(z[j] / c)
        lse   = log(sum_j exp(z[j]))                        with sinks:  log(exp(sinks[n]) + sum_j exp(z[j]))
        out   = sum_j exp(z[j] - lse) * v[j]

    Scores, softmax and sums are float32 whatever the inputs; `out` has their type, `lse` is float32. A query that sees
    no key gives zeros and lse = -inf (with sinks: lse = sinks[n]), and its q gets no gradient. Differentiable in q, k,
    v and sinks, through both results.

    Under an explicit mesh q, k and v may be sharded over batch, heads and length (context parallelism), alike; the
    results are sharded the same way. Keys and values are whole in their length, or split as the queries are: then each
    device gathers those of its rows, or, where that would be too much, they travel past it in a ring (`context.py`).

    Args:
      mask: which keys each query sees. The queries are the last seq_len of the kv_len positions. Layers that share a
        mask can share its `AttentionMask.intervals`, and the plan of what is skipped that comes with them.
      sinks: for each head, the score of a key that every query sees and that has no value.
      sm_scale: 1 / sqrt(head_dim) unless given.
      implementation: "pallas_tpu" (fused kernels), "cudnn" (NVIDIA's library; see `cudnn.attention`), "xla" (blockwise,
        memory linear in length), "reference" (the definition, all scores at once), or None to choose for the platform.
      block_sizes: of a blockwise implementation, in place of its own choice.

    Raises:
      ValueError: arguments that no implementation could take.
      dispatch.UnsupportedError: ones that the named implementation does not take.

    Sources: arXiv:1706.03762 (attention), arXiv:2305.13245 (grouped heads), arXiv:2408.00118 (soft cap),
    arXiv:2309.17453 (sinks).
    """
    results = _attention(
        q,
        k,
        v,
        mask,
        sinks=sinks,
        logit_soft_cap=logit_soft_cap,
        sm_scale=sm_scale,
        implementation=implementation,
        block_sizes=block_sizes,
    )
    return results.out, results.lse


def attention_with_max_logits(
    q: Float[Array, "batch seq_len num_heads head_dim"],
    k: Float[Array, "batch kv_len num_kv_heads head_dim"],
    v: Float[Array, "batch kv_len num_kv_heads v_head_dim"],
    mask: AttentionMask | Intervals,
    **options: Any,
) -> Results:
    """As `attention_with_lse`, which takes the same options, and max_logits [batch, num_heads] float32: the largest z
    of each head, -inf where no query of the row sees a key. Sinks do not count, and it has no gradient.

    For clipping the weights of heads whose scores grow. Source: arXiv:2507.20534, §2.1 (QK-Clip).
    """
    results = _attention(q, k, v, mask, **options, with_max_logits=True)
    assert results.max_logits is not None
    return results._replace(max_logits=jax.lax.stop_gradient(results.max_logits))


def _attention(
    q,
    k,
    v,
    mask: AttentionMask | Intervals,
    *,
    sinks=None,
    logit_soft_cap: float | None = None,
    sm_scale: float | None = None,
    implementation: Implementation | None = None,
    block_sizes: BlockSizes | None = None,
    with_max_logits: bool = False,
) -> Results:
    _check(q, k, v, sinks)
    _check_numbers(sm_scale, logit_soft_cap)
    (batch, seq_len, _, head_dim), kv_len = q.shape, k.shape[1]
    split = _split(q, k, v) if AxisType.Explicit in mesh_of(q).axis_types else None
    # Of all only cuDNN needs to know the form of the mask at trace time; that of a part of the queries is data.
    in_parts = split is not None and shards_of(split.queries) > 1
    native = None if in_parts else cudnn.native_mask(mask, seq_len, kv_len)
    implementations = {**IMPLEMENTATIONS, "cudnn": partial(cudnn.attention, native=native)}
    if split and shards_of(split.keys) > 1:
        implementations = context.over_devices(implementations, split.keys)
    run = partial(
        dispatch.call,
        "attention",
        implementation,
        implementations,
        sm_scale=1 / math.sqrt(head_dim) if sm_scale is None else float(sm_scale),
        logit_soft_cap=None if logit_soft_cap is None else float(logit_soft_cap),
        block_sizes=block_sizes,
        with_max_logits=with_max_logits,
    )
    intervals = _intervals(mask, batch, seq_len, kv_len)
    return run(q, k, v, intervals, sinks) if split is None else _run_sharded(run, split, q, k, v, intervals, sinks)


def _intervals(mask: AttentionMask | Intervals, batch: int, seq_len: int, kv_len: int) -> Intervals:
    if isinstance(mask, AttentionMask):
        if mask.segment_ids is not None:
            _require_whole("segment_ids", jnp.asarray(mask.segment_ids), {1: "kv_len"})
        return mask.intervals(batch, seq_len, kv_len)
    if mask.lower.shape != (batch, seq_len):
        raise ValueError(
            f"attention: the intervals of the mask are {mask.lower.shape}, expected {(batch, seq_len)}, a pair for each"
            f" query: make them by mask.intervals({batch}, {seq_len}, {kv_len})."
        )
    return mask


class _Split(NamedTuple):
    """Mesh axes over which q, k and v are split: batch and heads alike, queries in their length, keys in theirs."""

    batch: Axes
    queries: Axes
    keys: Axes
    heads: Axes


def _run_sharded(run: Callable[..., Any], split: _Split, q, k, v, intervals: Intervals, sinks) -> Results:
    """`run` on each shard of the batch, the heads and the queries: but for keys no shard needs anything of another."""
    by_query, by_head = P(split.batch, split.queries), P(split.heads)
    if (shards := shards_of(split.queries)) > 1 and q.shape[1] % (STRIPE * shards):
        intervals = intervals._replace(stripes=None)  # no whole number of them for each shard
    # Intervals and sinks are small, and may come whole.
    intervals = jax.tree.map(lambda bound: jax.reshard(bound, by_query), intervals)
    sinks = None if sinks is None else jax.reshard(sinks, by_head)
    by_key = P(split.batch, split.keys, split.heads, None)
    out_specs: list[Any] = [
        P(split.batch, split.queries, split.heads, None),
        P(split.batch, split.heads, split.queries),
        P(split.batch, split.heads),
    ]

    def local(*args: Any) -> Results:
        results = run(*args)
        if results.max_logits is None or not split.queries:
            return results
        return results._replace(max_logits=lax.pmax(lax.stop_gradient(results.max_logits), split.queries))

    sharded = jax.shard_map(
        local, in_specs=(out_specs[0], by_key, by_key, by_query, by_head), out_specs=Results(*out_specs)
    )
    return sharded(q, k, v, intervals, sinks)


def _split(q, k, v) -> _Split:
    for name, x in {"q": q, "k": k, "v": v}.items():
        _require_whole(name, x, {3: "v_head_dim" if name == "v" else "head_dim"})
    batch, queries, heads, _ = sharded_axes(q)
    _, keys, _, _ = sharded_axes(k)
    num_kv_heads, head_shards = k.shape[2], shards_of(heads)
    if num_kv_heads % head_shards:
        raise ValueError(
            f"attention: num_kv_heads={num_kv_heads} cannot be split into {head_shards} shards, as the heads of q"
            f" {q.shape} are over mesh axes {heads}. Use a model axis that divides num_kv_heads, or more key heads."
        )
    for name, x in {"k": k, "v": v}.items():
        axes = sharded_axes(x)[:3]
        if axes not in ((batch, queries, heads), (batch, (), heads)) or axes[1] != keys:
            raise ValueError(
                f"attention: {name} is split over mesh axes {axes[0]} by batch, {axes[1]} by kv_len and {axes[2]} by"
                f" head, but q over {batch}, {queries} and {heads}. Each shard of q needs its own keys:"
                f" jax.reshard({name}, P({batch}, {queries}, {heads})), as q is, or whole in kv_len, k and v alike."
            )
    return _Split(batch, queries, keys, heads)


def _require_whole(name: str, x, dimensions: Mapping[int, str]) -> None:
    axes = sharded_axes(x)
    for dimension, extent in dimensions.items():
        if axes[dimension]:
            raise ValueError(
                f"attention: {extent} of {name} {x.shape} is split over mesh axes {axes[dimension]}, and has to be"
                f" whole. Split the batch or the heads instead, or jax.reshard {name} first."
            )


def _check(q, k, v, sinks) -> None:
    for name, x in {"q": q, "k": k, "v": v}.items():
        if x.ndim != 4:
            raise ValueError(f"attention: {name} has shape {x.shape}, expected [batch, length, heads, head_dim].")
        if x.dtype != q.dtype or not jnp.issubdtype(x.dtype, jnp.floating):
            raise ValueError(
                f"attention: {name} is {x.dtype}, and q {q.dtype}. Cast q, k and v to one floating-point type."
            )
    shapes = f"(q {q.shape}, k {k.shape}, v {v.shape})"
    (batch, _, num_heads, head_dim), num_kv_heads = q.shape, k.shape[2]
    if k.shape[3] != head_dim:
        raise ValueError(
            f"attention: q has head_dim={head_dim} and k {k.shape[3]} {shapes}. They are multiplied, and have to agree;"
            " only v may differ."
        )
    if k.shape[0] != batch or k.shape[:3] != v.shape[:3]:
        raise ValueError(
            f"attention: batch, kv_len and num_kv_heads do not agree {shapes}. Expected q [batch, seq_len, num_heads,"
            " head_dim], k [batch, kv_len, num_kv_heads, head_dim], v [batch, kv_len, num_kv_heads, v_head_dim]."
        )
    if num_heads % num_kv_heads:
        raise ValueError(
            f"attention: num_heads={num_heads} is not a multiple of num_kv_heads={num_kv_heads} {shapes}. Each key head"
            " serves num_heads // num_kv_heads query heads; choose a num_kv_heads that divides num_heads."
        )
    if sinks is not None and (sinks.shape != (num_heads,) or not jnp.issubdtype(sinks.dtype, jnp.floating)):
        raise ValueError(
            f"attention: sinks are {sinks.dtype} {sinks.shape}, expected a floating-point number for each head, shape"
            f" ({num_heads},)."
        )


def _check_numbers(sm_scale, logit_soft_cap) -> None:
    if sm_scale is not None and not isinstance(sm_scale, _NUMBER):
        raise ValueError(
            f"attention: sm_scale is a {type(sm_scale).__name__}, expected a number known at trace time."
            " Multiply q by a learned scale instead."
        )
    if logit_soft_cap is not None and not (isinstance(logit_soft_cap, _NUMBER) and logit_soft_cap > 0):
        raise ValueError(
            f"attention: logit_soft_cap={logit_soft_cap!r}, expected a number above 0, or None for no cap."
        )
