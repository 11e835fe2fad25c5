# SPDX-License-Identifier: Apache-2.0
"""What a layer keeps for its backward pass, by name or by a policy of your own."""

from collections.abc import Callable
from typing import Any, Literal, get_args

import jax
from jax import checkpoint_policies as policies
from jax.ad_checkpoint import checkpoint_name

# From the most memory of the device to the least:
# none            nothing runs again but what XLA fuses into its readers: fastest, and the most memory
# save_matmuls    what matmuls gave, and attention's output and log-sum-exp: only cheap operations run again
# save_attention  the layer's input, and attention's output and log-sum-exp, so that its kernel never runs again
# full            the layer's input; the layer runs again in the backward pass
# nested          as full, for groups of about sqrt(num_layers) layers: a group's inputs are made again too
# offload         as full, but the inputs wait in the host's memory
Remat = Literal["none", "save_matmuls", "save_attention", "full", "nested", "offload"]

# What `jax.checkpoint` takes as its policy: those of `jax.checkpoint_policies`, or a function like them.
Policy = Callable[..., Any]

_ATTENTION = policies.save_only_these_names("attention_out", "attention_lse")


def _matmuls(primitive: Any, *args: Any, **params: Any) -> bool:
    """Those without batch dimensions, and those of rows in groups, which JAX's own policy does not know."""
    is_grouped = primitive.name == "ragged_dot_general"
    return is_grouped or policies.dots_with_no_batch_dims_saveable(primitive, *args, **params)


_POLICIES: dict[str, Policy] = {
    "save_matmuls": policies.save_from_both_policies(_matmuls, _ATTENTION),
    "save_attention": _ATTENTION,
    "full": policies.nothing_saveable,
    "offload": policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[],
        names_which_can_be_offloaded=["layer_input"],
        offload_src="device",
        offload_dst="pinned_host",
    ),
    # Of a layer; `ArrayStacked` makes the groups.
    "nested": policies.nothing_saveable,
}

# Made number by number, which costs nothing where XLA fuses it into what reads it; and, of `scan.py`, a layer's slice
# of the parameters, which are there anyway.
# fmt: off
_CHEAP = {
    "add", "add_any", "bitcast_convert_type", "broadcast_in_dim", "concatenate", "convert_element_type", "copy",
    "cos", "custom_jvp_call", "div", "exp", "integer_pow", "log", "logistic", "max", "min", "mul", "neg",
    "optimization_barrier", "pow", "reshape", "rsqrt", "select_n", "sign", "sin", "slice", "split", "sqrt",
    "square", "squeeze", "sub", "tanh", "transpose",
}
# fmt: on


def _all_but_cheap(primitive: Any, *_: Any, **__: Any) -> bool:
    return primitive.name not in _CHEAP


def rematerialised(layer: Callable[..., Any], remat: str | Policy, *, in_scan: bool) -> Callable[..., Any]:
    """`layer(carry, *inputs)`, keeping for the backward pass what `remat` says: a name of `Remat`, or your own policy.

    in_scan: a scan's body is compiled once and cannot be merged with its recomputation; elsewhere XLA must be kept
    from doing so, or nothing is saved. A policy of your own may save by name: attention's results are "attention_out"
    and "attention_lse", the carry that comes in is "layer_input".

    Raises:
      ValueError: `remat` is no such name, or "nested" outside of a scan, where there are no groups.
    """
    if remat == "none":
        # A scan writes out all that its backward pass reads, a norm's float32 copies too; without one, XLA chooses.
        return jax.checkpoint(layer, policy=_all_but_cheap, prevent_cse=False) if in_scan else layer
    if remat == "nested" and not in_scan:
        raise ValueError("remat='nested' is for ArrayStacked, which can group its layers; choose 'full' here.")
    policy = _POLICIES.get(remat) if isinstance(remat, str) else remat
    if policy is None:
        raise ValueError(f"remat={remat!r} is no policy. Those there are: {', '.join(get_args(Remat))}.")

    def named(carry: Any, *inputs: Any) -> Any:
        return layer(jax.tree.map(lambda leaf: checkpoint_name(leaf, "layer_input"), carry), *inputs)

    return jax.checkpoint(named, policy=policy, prevent_cse=not in_scan)
