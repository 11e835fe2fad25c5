# SPDX-License-Identifier: Apache-2.0
"""The same model with Levanter's grug pieces in place of ours: attention, loss and, of stacked layers, the stack.

Levanter picks what it runs, and in what blocks, by the machine's devices: to compile for a TPU on a CPU, it is shown
those of the TPU.
"""

import contextlib
import dataclasses
import importlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple
from unittest import mock

import jax
from jax.sharding import PartitionSpec as P
from jax.sharding import reshard

from grug_kernels.attention import AttentionMask


class Parts(NamedTuple):
    cross_entropy: jax.Array
    z_loss: jax.Array


def attention(q, k, v, mask, *, implementation: Any):
    from levanter.grug.attention import AttentionMask
    from levanter.grug.attention import attention as levanter_attention

    levanter_mask = AttentionMask.causal().with_segment_ids(mask.segment_ids)
    if jax.sharding.get_abstract_mesh().empty:
        return levanter_attention(q, k, v, levanter_mask, implementation=implementation)
    # Levanter's splash attention refuses an axis of positions, even one of a single device, which it is here.
    spec = jax.typeof(q).sharding.spec
    q, k, v = (reshard(x, P(spec[0], None, *spec[2:])) for x in (q, k, v))
    return reshard(levanter_attention(q, k, v, levanter_mask, implementation=implementation), spec)


def linear_cross_entropy(hidden, lm_head, labels, *, weight, z_loss_weight, implementation: Any):
    from levanter.grug.loss import fused_linear_softmax_cross_entropy_loss

    loss = fused_linear_softmax_cross_entropy_loss(
        hidden, lm_head, labels, weight=weight, logsumexp_weight=z_loss_weight, implementation=implementation
    )
    return loss, Parts(loss, loss * 0)


class ArrayStacked:
    """Levanter's stack behind the two calls that the model makes of ours.

    It vmaps over what has a leading axis of layers, so the key is split here; and it is told at init, not in `fold`,
    what to keep for the backward pass.
    """

    @staticmethod
    def init(num_layers: int, block_type: Any) -> Callable[..., Any]:
        from levanter.layers.stacked import ArrayStacked as LevanterStacked

        class Stacked(LevanterStacked):
            def fold(self, carry: Any, *shared: Any, remat: str, prefetch: None = None) -> Any:
                if prefetch is not None:
                    raise ValueError("levanter_grug.ArrayStacked: Levanter's stack has no prefetch; leave it out.")
                policies = {"none": False, "full": True}
                if remat not in policies:
                    raise ValueError(
                        f"levanter_grug.ArrayStacked: remat={remat!r}; Levanter's stack has none and full."
                    )
                policy = type(self.gradient_checkpointing)._mk(policies[remat])
                stack = dataclasses.replace(self, gradient_checkpointing=policy)
                return LevanterStacked.fold(stack, carry, *shared)

        def init_layers(*args: Any, key: jax.Array) -> Any:
            return Stacked.init(num_layers, block_type)(*args, key=jax.random.split(key, num_layers))

        return init_layers


@contextmanager
def in_place_of_ours(variant: str, *, tpu: Sequence[Any] | None = None) -> Iterator[None]:
    """While it lasts, the variant's model traces with Levanter's attention and loss.

    tpu: devices that it is traced for; Levanter then chooses as it does there (2026-11: splash attention, and its loss
    in XLA, for Pallas has to be asked for), and stacked layers are in its own stack, which is no `ArrayStacked` of ours
    and fails the model's annotations where they are checked. None: its implementations for a CPU, and our stack.
    """
    model = importlib.import_module(f"grug_model.{variant}.model")
    of_attention, of_loss = ("reference", "xla") if tpu is None else (None, None)
    pieces: dict[str, Any] = {
        "attention": partial(attention, implementation=of_attention),
        "linear_cross_entropy": partial(linear_cross_entropy, implementation=of_loss),
    }
    if tpu is not None and hasattr(model, "ArrayStacked"):
        pieces["ArrayStacked"] = ArrayStacked
    # Levanter's attention takes the mask, not what ours makes of it once for all layers.
    masks_as_they_are = mock.patch.object(AttentionMask, "intervals", lambda mask, *_: mask)
    machine = contextlib.nullcontext() if tpu is None else _machine_with(tpu)
    with mock.patch.multiple(model, **pieces), masks_as_they_are, machine:
        yield


def _machine_with(devices: Sequence[Any]) -> Any:
    return mock.patch.multiple(jax, default_backend=lambda: "tpu", devices=lambda: list(devices))
