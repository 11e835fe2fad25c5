# SPDX-License-Identifier: Apache-2.0
"""The same model with Levanter's grug pieces in place of ours: its attention and its loss, as it runs them on a CPU."""

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple
from unittest import mock

import jax


class Parts(NamedTuple):
    cross_entropy: jax.Array
    z_loss: jax.Array


def attention(q, k, v, mask):
    from levanter.grug.attention import AttentionMask
    from levanter.grug.attention import attention as levanter_attention

    levanter_mask = AttentionMask.causal().with_segment_ids(mask.segment_ids)
    return levanter_attention(q, k, v, levanter_mask, implementation="reference")


def linear_cross_entropy(hidden, lm_head, labels, *, weight, z_loss_weight):
    from levanter.grug.loss import fused_linear_softmax_cross_entropy_loss

    loss = fused_linear_softmax_cross_entropy_loss(
        hidden, lm_head, labels, weight=weight, logsumexp_weight=z_loss_weight, implementation="xla"
    )
    return loss, Parts(loss, loss * 0)


@contextmanager
def in_place_of_ours(variant: str) -> Iterator[None]:
    """While it lasts, the variant's model traces with Levanter's attention and loss."""
    model = importlib.import_module(f"grug_model.{variant}.model")
    with mock.patch.multiple(model, attention=attention, linear_cross_entropy=linear_cross_entropy):
        yield
