# SPDX-License-Identifier: Apache-2.0
"""The public functions: checks, the choice of an implementation, and the shard_map around it."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from grug_kernels import dispatch
from grug_kernels.cross_entropy import reference, xla
from grug_kernels.cross_entropy.block_sizes import BlockSizes
from grug_kernels.cross_entropy.settings import LossSettings, Shards, flattened, unflattened

Implementation = Literal["pallas_tpu", "xla", "reference"]
Reduction = Literal["mean", "sum"]

# float16 would lose the gradient of a mean over many tokens: below 6e-8 it is zero.
_DTYPES = (jnp.bfloat16, jnp.float32)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LossParts:
    """float32 scalars to look at, without gradients. Weighted means over tokens, whatever the reduction."""

    cross_entropy: Float[Array, ""]  # without the z-loss, nats per token
    z_loss: Float[Array, ""]  # z_loss_weight included
    weight_sum: Float[Array, ""]  # of the tokens that count


def linear_cross_entropy(
    hidden: Float[Array, "*tokens hidden_dim"],
    lm_head: Float[Array, "hidden_dim vocab_size"],
    labels: Int[Array, "*tokens"],
    *,
    weight: Float[Array, "*tokens"],
    z_loss_weight: float = 0.0,
    logit_soft_cap: float | None = None,
    reduction: Reduction = "mean",
    implementation: Implementation | None = None,
    block_sizes: BlockSizes | None = None,
) -> tuple[Float[Array, ""], LossParts]:
    """Training loss of a linear head, its gradients made in the forward pass, without ever holding all the logits.

    With u[t, v] = sum_d hidden[t, d] * lm_head[d, v], or c * tanh(that / c) where logit_soft_cap = c is given:

        lse[t] = log sum_v exp(u[t, v])
        ce[t]  = lse[t] - u[t, labels[t]]
        loss   = sum_t weight[t] * (ce[t] + z_loss_weight * lse[t]**2) / sum_t weight[t]

    reduction="sum" leaves out the division. Weights are fractions or counts, not negative. A token of weight 0 or of
    a negative label is ignored: it adds nothing, and its gradients are zero, that of its weight too. With no token
    left the loss is 0. A label >= vocab_size that counts makes the loss and its gradients NaN: an error cannot be
    raised from a compiled program, and a wrong label must not pass for a right one.

    hidden and lm_head share a dtype, bfloat16 or float32. Logits, sums and lse are float32; the gradient in the logits
    is rounded to that dtype for its matmuls, which add up in float32. Gradients: hidden, lm_head, weight.

    Tokens are one dimension or two, batch and seq_len, which may both be split: each device takes what it has of them.
    Under an explicit mesh the tokens may be split over any axes, the vocabulary over others, and lm_head's hidden_dim
    over any (it is gathered, the vocabulary is not). labels and weight are moved to the tokens' layout if they differ.

    Cost for T tokens, D hidden_dim, V vocab_size, in units of 2TDV FLOPs: 1, and with gradients 3, where computing
    the logits again would make it 4. Temporary: a few arrays of 4V bytes per token of a block (`block_sizes.py`), not
    of all tokens, and dlm_head in float32. Held until the backward pass, which only scales them: the gradients
    themselves, in the dtypes of their arguments.

    Raises:
      ValueError: shapes, dtypes, shardings or constants that no implementation could take.
      UnsupportedError: the implementation named cannot take these arguments.

    Sources: arXiv:2410.10989 (gradients in the forward pass, by blocks of tokens), arXiv:2204.02311 (z-loss),
    arXiv:2408.00118 (soft cap), arXiv:1909.08053 (vocabulary-parallel loss).
    """
    _check_arrays(hidden, lm_head, {"labels": labels, "weight": weight})
    _check_constants(z_loss_weight, logit_soft_cap, reduction)
    hidden, labels, weight = flattened(hidden, labels, weight)
    settings = LossSettings(z_loss_weight, logit_soft_cap, block_sizes, Shards.of(hidden, lm_head))
    hidden, lm_head, labels, weight = settings.shards.place(hidden, lm_head, labels, weight)

    weight = _counted(weight.astype(jnp.float32), labels, lm_head.shape[1])
    weight_sum = weight.sum()
    mean_weight = _divided(weight, weight_sum)
    used_weight = mean_weight if reduction == "mean" else weight
    loss, cross_entropy, z_loss = dispatch.call(
        "cross_entropy", implementation, WEIGHTED_LOSSES, hidden, lm_head, labels, used_weight, settings
    )
    if reduction == "sum":
        cross_entropy, z_loss = _divided(cross_entropy, weight_sum), _divided(z_loss, weight_sum)
    return loss, jax.lax.stop_gradient(LossParts(cross_entropy, z_loss, weight_sum))


def token_losses(
    hidden: Float[Array, "*tokens hidden_dim"],
    lm_head: Float[Array, "hidden_dim vocab_size"],
    labels: Int[Array, "*tokens"],
    *,
    logit_soft_cap: float | None = None,
    return_argmax: bool = False,
    implementation: Implementation | None = None,
    block_sizes: BlockSizes | None = None,
) -> tuple[Float[Array, "*tokens"], Float[Array, "*tokens"]] | tuple[Array, Array, Int[Array, "*tokens"]]:
    """Each token's loss and log-sum-exp, for evaluation: ce and lse of `linear_cross_entropy`, blockwise like it.

    The loss is 0 for a negative label and NaN for one >= vocab_size; lse is that of the row in any case.
    return_argmax: also the most likely token (int32, the first of equals).
    Cost: 1 unit. Differentiable in loss and lse, by computing the logits again: 4 units in all. For a loss to train on,
    `linear_cross_entropy` takes 3. Raises as it does; shards as it does.
    """
    _check_arrays(hidden, lm_head, {"labels": labels})
    _check_constants(0.0, logit_soft_cap, "sum")
    rows = hidden
    hidden, labels = flattened(rows, labels)
    settings = LossSettings(0.0, logit_soft_cap, block_sizes, Shards.of(hidden, lm_head))
    hidden, lm_head, labels = settings.shards.place(hidden, lm_head, labels)
    loss, lse, argmax = dispatch.call("cross_entropy", implementation, TOKEN_LOSSES, hidden, lm_head, labels, settings)
    loss = jnp.where(labels < 0, 0.0, jnp.where(labels < lm_head.shape[1], loss, jnp.nan))
    loss, lse, argmax = (unflattened(x, rows) for x in (loss, lse, argmax))
    return (loss, lse, argmax) if return_argmax else (loss, lse)


def _weighted_losses_per_shard(implementation, hidden, lm_head, labels, weight, settings: LossSettings):
    def local(hidden, lm_head, labels, weight):
        return implementation(hidden, lm_head, labels, weight, settings)

    return settings.shards.map(local, P(), hidden, lm_head, labels, weight)


def _token_losses_per_shard(implementation, hidden, lm_head, labels, settings: LossSettings):
    def local(hidden, lm_head, labels):
        return implementation(hidden, lm_head, labels, settings)

    return settings.shards.map(local, P(settings.shards.token_axes or None), hidden, lm_head, labels)


def _pallas_tpu(name: str) -> Callable:
    def run(*args):
        from grug_kernels.cross_entropy import pallas_tpu  # imports Pallas, which only a TPU needs, for half a second

        return getattr(pallas_tpu, name)(*args)

    return run


# The reference needs no shard_map: plain jnp follows the arrays' shardings.
WEIGHTED_LOSSES: dict[str, Callable] = {
    "pallas_tpu": partial(_weighted_losses_per_shard, _pallas_tpu("weighted_losses")),
    "xla": partial(_weighted_losses_per_shard, xla.weighted_losses),
    "reference": reference.weighted_losses,
}
TOKEN_LOSSES: dict[str, Callable] = {
    "pallas_tpu": partial(_token_losses_per_shard, _pallas_tpu("token_losses")),
    "xla": partial(_token_losses_per_shard, xla.token_losses),
    "reference": reference.token_losses,
}


def _counted(weight: jax.Array, labels: jax.Array, vocab_size: int) -> jax.Array:
    """The weights, 0 where the token is ignored and NaN where its label is outside the vocabulary."""
    is_ignored = (labels < 0) | (weight == 0)
    return jnp.where(is_ignored, 0.0, jnp.where(labels < vocab_size, weight, jnp.nan))


def _divided(x: jax.Array, weight_sum: jax.Array) -> jax.Array:
    """x / weight_sum, and 0 where no token counts; `_counted` lets no gradient through then."""
    return jnp.where(weight_sum == 0, 0.0, x / weight_sum)


def _check_arrays(hidden, lm_head, per_token: dict[str, jax.Array]) -> None:
    if hidden.ndim not in (2, 3) or lm_head.ndim != 2:
        raise ValueError(
            f"cross_entropy: hidden {hidden.shape} and lm_head {lm_head.shape} must be [tokens, hidden_dim], or [batch,"
            " seq_len, hidden_dim], and [hidden_dim, vocab_size]. Flatten what else there is to tokens first."
        )
    if hidden.shape[-1] != lm_head.shape[0]:
        raise ValueError(
            f"cross_entropy: hidden {hidden.shape} has hidden_dim={hidden.shape[-1]}, but lm_head {lm_head.shape} has"
            f" {lm_head.shape[0]} rows; they must be equal. An embedding [vocab_size, hidden_dim] is passed as its .T."
        )
    if 0 in (*hidden.shape, *lm_head.shape):
        raise ValueError(
            f"cross_entropy: hidden {hidden.shape} and lm_head {lm_head.shape} must have at least one token, one"
            " hidden_dim and one vocabulary entry."
        )
    if hidden.dtype != lm_head.dtype or hidden.dtype not in _DTYPES:
        raise ValueError(
            f"cross_entropy: hidden is {hidden.dtype} and lm_head {lm_head.dtype}; both must be bfloat16 or both"
            " float32. Cast the weight to the dtype you compute in: lm_head.astype(hidden.dtype)."
        )
    kinds = {"labels": jnp.integer, "weight": jnp.floating}
    for name, x in per_token.items():
        if x.shape != hidden.shape[:-1]:
            raise ValueError(
                f"cross_entropy: {name} {x.shape} must be [tokens] = {hidden.shape[:-1]}, one for each row of"
                f" hidden {hidden.shape}."
            )
        if not jnp.issubdtype(x.dtype, kinds[name]):
            raise ValueError(f"cross_entropy: {name} is {x.dtype}; its dtype must be {kinds[name].__name__}.")


def _check_constants(z_loss_weight, logit_soft_cap, reduction) -> None:
    if isinstance(z_loss_weight, jax.Array) or isinstance(logit_soft_cap, jax.Array):
        raise ValueError(
            "cross_entropy: z_loss_weight and logit_soft_cap are constants of the compiled program; pass Python"
            " numbers, not arrays (a schedule of the z-loss can be had by compiling once per value)."
        )
    if logit_soft_cap is not None and not logit_soft_cap > 0:
        raise ValueError(f"cross_entropy: logit_soft_cap={logit_soft_cap} must be positive, or None for no cap.")
    if reduction not in ("mean", "sum"):
        raise ValueError(f'cross_entropy: unknown reduction {reduction!r}; it is "mean" or "sum".')
