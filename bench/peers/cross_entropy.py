# SPDX-License-Identifier: Apache-2.0
"""Peers' cross-entropy of a linear head on one TPU: `loss_case` returns (function, args); bfloat16, summed over tokens.

| peer | matmuls, forward + backward | what is called |
|---|---|---|
| naive | 1 + 2 | all logits in plain `jax.numpy`, differentiated by jax |
| tokamax_xla | 1 + 3 | its reference: all logits, made again in the backward pass; float32 gradients |
| tokamax_pallas | 1 + 3 | its Mosaic TPU kernels; float32 gradients |
| tokamax_chunked | 1 + 3 | its loops over blocks in XLA |
| levanter_xla | 1 + 3 | Levanter's default on TPU: loops over blocks of the vocabulary in XLA |
| levanter_pallas | 1 + 3 | its Pallas forward pass, with an XLA backward pass |
| levanter_weighted_sum | 1 + 2 | `linear_softmax_cross_entropy_weighted_sum`: gradients are made in the forward pass |

Arguments: hidden [tokens, hidden_dim], lm_head [hidden_dim, vocab_size], labels [tokens] int32.
Passes: "forward" makes the loss; "forward_backward" the loss and its gradients by hidden and lm_head; "backward", of
the peers that have one to call (Tokamax's), takes lse [tokens] float32 as a further argument and makes the gradients.

Sources of the block sizes: `TOKAMAX_BLOCKS`, and Levanter's own table.
"""

import contextlib
from collections.abc import Callable
from functools import partial
from typing import Any, Literal
from unittest import mock

import jax
import jax.numpy as jnp
from jax import ShapeDtypeStruct as Shape

from bench.peers import require
from bench.peers.attention import Case
from bench.shapes import LossShape
from grug_kernels import chips

PEERS = (
    "naive",
    "tokamax_xla",
    "tokamax_pallas",
    "tokamax_chunked",
    "levanter_xla",
    "levanter_pallas",
    "levanter_weighted_sum",
)
Passes = Literal["forward", "backward", "forward_backward"]
Blocks = tuple[int, int, int]  # tokens, hidden_dim, vocabulary

# (passes, chip) -> the fastest blocks at 16384 x 4096 x 128256 in the timings that Tokamax 0.0.17 ships
# (tokamax/data/autotuning, pallas_mosaic_tpu_linear_softmax_cross_entropy_loss{,_vjp}.json), 2026-11-21.
# v5e: none shipped; what fits.
TOKAMAX_BLOCKS: dict[tuple[str, str], Blocks] = {
    ("forward", "v5e"): (1024, 1024, 1024),
    ("forward", "v5p"): (1024, 4096, 1024),
    ("forward", "v6e"): (2048, 4096, 1024),
    ("forward", "tpu7x"): (1024, 4096, 1024),
    ("backward", "v5e"): (1024, 512, 1024),
    ("backward", "v5p"): (2048, 256, 1024),
    ("backward", "v6e"): (2048, 512, 2048),
    ("backward", "tpu7x"): (2048, 512, 1024),
}
TOKAMAX_CHUNKS = (1024, 2048)  # tokens, vocabulary; the fastest on all three chips, same source
WEIGHTED_SUM_TOKENS = 1024  # per block; no default in Levanter: logits of 1024 x 128256 in float32 are 0.5 GB

_TOKAMAX = "tokamax._src.ops.linear_softmax_cross_entropy_loss"


def loss_case(peer: str, shape: LossShape, passes: Passes, chip: str, *, blocks: tuple[int, ...] | None = None) -> Case:
    """The peer's loss, to be traced for `chip`; see the module. blocks: None for the peer's best.

    Raises ValueError for a peer that is not in `PEERS` or a backward pass that it does not have alone,
    ModuleNotFoundError where it is not installed.
    """
    if peer not in PEERS:
        raise ValueError(f"no peer is called {peer!r}; there are {', '.join(PEERS)}.")
    hidden = Shape((shape.tokens, shape.hidden_dim), jnp.bfloat16)
    lm_head = Shape((shape.hidden_dim, shape.vocab_size), jnp.bfloat16)
    labels, lse = Shape((shape.tokens,), jnp.int32), Shape((shape.tokens,), jnp.float32)
    if peer.startswith("tokamax"):
        forward, backward = _tokamax(peer, shape, chip, blocks)
        functions = {"forward": forward, "backward": backward, "forward_backward": _both(forward, backward)}
        return Case(functions[passes], (hidden, lm_head, labels, *([lse] if passes == "backward" else [])))
    if passes == "backward":
        raise ValueError(f"{peer} has no backward pass to call alone: passes={passes!r}; take 'forward_backward'.")
    loss = _naive if peer == "naive" else _levanter(peer, shape, chip, blocks)
    function = loss if passes == "forward" else jax.value_and_grad(loss, argnums=(0, 1))
    return Case(_as_on(chip, function) if peer == "levanter_pallas" else function, (hidden, lm_head, labels))


def block_sizes_of(peer: str, shape: LossShape, passes: Passes, chip: str) -> str:
    """What `loss_case` runs with, for tables: blocks of tokens × hidden_dim × vocabulary."""
    if peer in ("naive", "tokamax_xla"):
        return "all logits"
    if peer == "tokamax_pallas":
        parts = ("forward", "backward") if passes == "forward_backward" else (passes,)
        return ", ".join(f"{part} {'×'.join(map(str, _tokamax_blocks(part, shape, chip)))}" for part in parts)
    if peer == "tokamax_chunked":
        return "×".join(map(str, TOKAMAX_CHUNKS))
    if peer == "levanter_weighted_sum":
        return f"{WEIGHTED_SUM_TOKENS}×all×all"
    if peer == "levanter_xla":
        return f"all×all×{_levanter_vocab_block(shape, chip)}"
    return "×".join(map(str, _levanter_blocks(shape, chip)))


def _naive(hidden, lm_head, labels):
    logits = jnp.dot(hidden, lm_head, preferred_element_type=jnp.float32)
    lse = jax.nn.logsumexp(logits, axis=-1)
    return jnp.sum(lse - jnp.take_along_axis(logits, labels[:, None], axis=1)[:, 0])


def _tokamax_blocks(part: str, shape: LossShape, chip: str) -> Blocks:
    """The table's, none being larger than its axis: those are kept multiples of 128."""
    tokens, hidden_dim, vocab = TOKAMAX_BLOCKS.get((part, chip), (1024, 512, 1024))
    return min(tokens, shape.tokens), min(hidden_dim, shape.hidden_dim), min(vocab, shape.vocab_size)


def _tokamax(peer: str, shape: LossShape, chip: str, blocks: tuple[int, ...] | None):
    """(forward, backward): the functions that the ops call, with explicit blocks; the ops themselves look for timings.

    blocks: of both passes.
    """
    name = {"tokamax_xla": "reference", "tokamax_chunked": "chunked_xla", "tokamax_pallas": "pallas_mosaic_tpu"}[peer]
    module = require(f"{_TOKAMAX}.{name}_kernel" if peer == "tokamax_pallas" else f"{_TOKAMAX}.{name}")
    forward = getattr(module, f"linear_softmax_cross_entropy_loss_fwd_{name}")
    backward = getattr(module, f"linear_softmax_cross_entropy_loss_bwd_{name}")
    if peer == "tokamax_chunked":
        sizes = dict(zip(("b_block_sz", "v_block_sz"), blocks or TOKAMAX_CHUNKS, strict=True))
        forward, backward = partial(forward, **sizes), partial(backward, **sizes)
    if peer == "tokamax_pallas":
        names = ("b_block_size", "h_block_size", "v_block_size")
        forward = partial(forward, **dict(zip(names, blocks or _tokamax_blocks("forward", shape, chip), strict=True)))
        backward = partial(
            backward, **dict(zip(names, blocks or _tokamax_blocks("backward", shape, chip), strict=True))
        )

    def run_forward(hidden, lm_head, labels):
        return forward(hidden, labels, lm_head)  # (loss, lse)

    def run_backward(hidden, lm_head, labels, lse):
        return backward(jnp.ones((), jnp.float32), lse, hidden, labels, lm_head)

    return run_forward, run_backward


def _both(forward: Callable[..., Any], backward: Callable[..., Any]) -> Callable[..., Any]:
    def run(hidden, lm_head, labels):
        loss, lse = forward(hidden, lm_head, labels)
        return loss, backward(hidden, lm_head, labels, lse)

    return run


def _device_kind(chip: str) -> str:
    return next(tpu.device_kinds[0] for tpu in chips.TPUS if tpu.name == chip)


def _levanter_vocab_block(shape: LossShape, chip: str) -> int:
    from levanter.kernels.pallas.fused_cross_entropy_loss import tuned_block_sizes

    return tuned_block_sizes.infer_xla_v_block_size(
        shape.tokens, shape.hidden_dim, shape.vocab_size, dtype=jnp.float32, device_kind=_device_kind(chip)
    )


def _levanter_blocks(shape: LossShape, chip: str) -> Blocks:
    from levanter.kernels.pallas.fused_cross_entropy_loss import tuned_block_sizes

    sizes = tuned_block_sizes.infer_block_sizes(
        shape.tokens,
        shape.hidden_dim,
        shape.vocab_size,
        dtype=jnp.float32,
        x_dtype=jnp.bfloat16,
        w_dtype=jnp.bfloat16,
        device_kind=_device_kind(chip),
    )
    return sizes.b_block_size, sizes.h_block_size, sizes.v_block_size


def _levanter(peer: str, shape: LossShape, chip: str, blocks: tuple[int, ...] | None):
    """The arrays' functions below `levanter.grug.loss`, whose shard_map over one device is left out."""
    from levanter.kernels.pallas import fused_cross_entropy_loss as levanter_loss

    if peer == "levanter_weighted_sum":
        block = blocks[0] if blocks else min(WEIGHTED_SUM_TOKENS, shape.tokens)

        def weighted_sum(hidden, lm_head, labels):
            weight = jnp.ones(labels.shape, jnp.float32)
            return levanter_loss.linear_softmax_cross_entropy_weighted_sum(
                hidden, labels, lm_head, weight, logsumexp_weight=None, token_block_size=block
            )

        return weighted_sum
    if peer == "levanter_xla":
        sizes = levanter_loss.BlockSizes(
            b_block_size=shape.tokens, v_block_size=blocks[0] if blocks else _levanter_vocab_block(shape, chip)
        )
    else:
        sizes = levanter_loss.BlockSizes(*(blocks or _levanter_blocks(shape, chip)))

    def loss(hidden, lm_head, labels):
        return levanter_loss.fused_cross_entropy_loss_and_logsumexp_penalty(
            hidden,
            labels,
            lm_head,
            reduction="sum",
            logsumexp_weight=None,
            implementation="xla" if peer == "levanter_xla" else "pallas_tpu",
            block_sizes=sizes,
        )

    return loss


def _as_on(chip: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """Levanter's Pallas kernel asks the machine, not the trace, which chip it is for; told here while it traces."""
    from levanter.kernels.pallas.fused_cross_entropy_loss import pallas_tpu

    device = mock.Mock(device_kind=_device_kind(chip))

    def run(*args):
        with contextlib.ExitStack() as stack:
            seen = mock.Mock(wraps=jax, default_backend=lambda: "tpu", devices=lambda: [device])
            stack.enter_context(mock.patch.object(pallas_tpu, "jax", seen))
            return function(*args)

    return run
