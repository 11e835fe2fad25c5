# SPDX-License-Identifier: Apache-2.0
"""What a layer keeps for its backward pass, by name."""

from collections.abc import Callable
from typing import Literal, get_args

import jax
from jax import checkpoint_policies

# none            everything is kept: fastest, and the most memory
# full            only the layer's input is kept, the layer runs again in the backward pass: the least memory
# save_attention  as full, but attention's output and log-sum-exp are kept too, so that its kernel never runs again
Remat = Literal["none", "full", "save_attention"]


def rematerialised(layer: Callable, remat: str, *, in_scan: bool) -> Callable:
    """`layer`, keeping for the backward pass what the policy `remat` says.

    in_scan: a scan's body is compiled once and cannot be merged with its recomputation; elsewhere XLA must be kept
    from doing so, or nothing is saved.
    """
    if remat == "none":
        return layer
    if remat == "full":
        return jax.checkpoint(layer, prevent_cse=not in_scan)
    if remat == "save_attention":
        policy = checkpoint_policies.save_only_these_names("attention_out", "attention_lse")
        return jax.checkpoint(layer, policy=policy, prevent_cse=not in_scan)
    raise ValueError(f"remat={remat!r} is no policy. Those there are: {', '.join(get_args(Remat))}.")
