# SPDX-License-Identifier: Apache-2.0
"""Attention over sequences that are split over devices (context parallelism): each has some of the queries, and needs
the keys and values of all. Either it gathers them, or they travel past it in a ring."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from jax import lax

from grug_kernels import dispatch
from grug_kernels.attention import ring, xla
from grug_kernels.attention.mask import Intervals
from grug_kernels.attention.results import Parts, Results
from grug_kernels.sharding import Axes, shards_of

# Keys and values of one layer that a device gathers. Gathered, they are whole in the forward pass, and in the backward
# pass whole with their gradients and a copy of each in the kernels' layout: 2 GiB at most, an eighth of what the
# smallest chip has. Up to there gathering is better: one kernel, and one rounding of the results. A ring takes the
# place of these 2 GiB by a few blocks.
LARGEST_GATHERED_BYTES = 2**29


def _pallas_tpu_parts(*args: Any, **kwargs: Any) -> Parts:
    from grug_kernels.attention import pallas_tpu  # see `api._pallas_tpu`

    return pallas_tpu.parts(*args, **kwargs)


# "reference" and "cudnn" always gather.
_PARTS: Mapping[str, Callable[..., Parts]] = {"pallas_tpu": _pallas_tpu_parts, "xla": xla.parts}


def over_devices(
    implementations: Mapping[str, Callable[..., Results]], axes: Axes
) -> dict[str, Callable[..., Results]]:
    """Each implementation, for q, k and v that are split over `axes` in their length; to be called in a shard_map.

    Which way it went is recorded as the implementation of "attention_context".
    """
    return {name: partial(_attention, local, _PARTS.get(name), axes) for name, local in implementations.items()}


def gathers(k, v, devices: int) -> bool:
    """Whether each of `devices` gathers the keys and values of all, of which it has k and v; else they go in a ring."""
    return devices * sum(x.size * x.dtype.itemsize for x in (k, v)) <= LARGEST_GATHERED_BYTES


def _attention(local, make_parts, axes: Axes, q, k, v, intervals: Intervals, sinks, **options: Any) -> Results:
    if make_parts is None or gathers(k, v, shards_of(axes)):
        way = "all_gather"
        keys = (lax.all_gather(x, axes, axis=1, tiled=True) for x in (k, v))
        results = local(q, *keys, intervals, sinks, **options)
    else:
        way = "ring"
        parts = make_parts(q, k, v, **options)
        results = ring.attention(parts, axes, q, k, v, intervals, sinks, with_max_logits=options["with_max_logits"])
    dispatch.record("attention_context", way)
    return results
