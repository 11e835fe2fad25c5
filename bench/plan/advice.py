# SPDX-License-Identifier: Apache-2.0
"""What to change first where a training step does not fit, with what it saves where that can be reckoned."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_args

from bench.plan.holders import GRADIENTS, KEPT, LOSS, WEIGHTS, WORK
from grug_kernels.chips import GIB
from grug_kernels.stacked import Remat

# What a device keeps for the backward pass under each remat policy, the least first.
LEAST_KEPT_FIRST = tuple(reversed(get_args(Remat)))


@dataclass(frozen=True)
class Situation:
    """over_bytes: what is too much. held: bytes by argument category and by kind of temporary (`holders.KINDS`).
    policies: those that the variant's `remat` may be. kept_bytes: what is kept under a policy, where that can be
    reckoned. rows: of the batch, on one device. replicas: copies of the weights, "replica_dcn"."""

    over_bytes: float
    held: Mapping[str, int]
    remat: str
    policies: Sequence[str]
    kept_bytes: Mapping[str, float]
    rows: int
    batch_size: int
    model_axis: int
    data_axis: int
    replicas: int
    devices: int


@dataclass(frozen=True)
class Advice:
    """saves_bytes: of one device, reckoned, not compiled."""

    text: str
    saves_bytes: float

    def __str__(self) -> str:
        return f"{self.text}: saves about {self.saves_bytes / GIB:.2f} GiB"


def advice(situation: Situation) -> list[Advice]:
    """What is worth trying, the first first: of what suffices what costs least, then what saves most."""
    # In the order of what they cost. A new way to save memory is a new line here.
    ways = [
        *_without_average(situation),
        *_remat(situation),
        *_smaller_batch(situation),
        *_model_axis(situation),
        *_one_copy(situation),
        *_offload(situation),
        *_more_chips(situation),
    ]
    enough = [way for way in ways if way.saves_bytes >= situation.over_bytes]
    others = sorted((way for way in ways if way not in enough), key=lambda way: -way.saves_bytes)
    return enough + others


def _without_average(s: Situation) -> Iterator[Advice]:
    if size := s.held.get("ema", 0):
        yield Advice("no average of the weights (--trainer.ema-beta None)", size)


def _remat(s: Situation) -> Iterator[Advice]:
    """Policies that keep less, the one that keeps most of these first: it computes the least twice."""
    order = [policy for policy in LEAST_KEPT_FIRST if policy in s.policies]
    less = order[: order.index(s.remat)] if s.remat in order else []
    for policy in reversed(less):
        saves = s.held.get(KEPT, 0) - s.kept_bytes.get(policy, math.inf)
        if saves > 0:
            yield Advice(f"--remat {policy} in place of {s.remat}", saves)


def _smaller_batch(s: Situation) -> Iterator[Advice]:
    """The largest batch that is reckoned to fit, or else the smallest there is."""
    per_row = sum(s.held.get(kind, 0) for kind in (KEPT, WORK)) / s.rows
    fewer = [rows for rows in range(s.rows - 1, 0, -1) if s.rows % rows == 0]
    if not fewer or not per_row:
        return
    rows = next((rows for rows in fewer if per_row * (s.rows - rows) >= s.over_bytes), fewer[-1])
    smaller = s.batch_size * rows // s.rows
    yield Advice(f"--batch {smaller} in place of {s.batch_size}, {rows} rows on a device", per_row * (s.rows - rows))


def _model_axis(s: Situation) -> Iterator[Advice]:
    """Twice as many devices for a layer, and half as many for the batch: whole weights, the loss's gradients and what a
    layer works on are split; parameters and optimizer already are, over all devices."""
    if s.data_axis % 2 == 0:
        saves = sum(s.held.get(kind, 0) for kind in (WEIGHTS, GRADIENTS, LOSS)) / 2
        if saves > 0:
            yield Advice(
                f"--trainer.model-axis {2 * s.model_axis}, which splits whole weights and their gradients", saves
            )


def _one_copy(s: Situation) -> Iterator[Advice]:
    """Then weights, too, go from slice to slice, for every layer."""
    if s.replicas > 1 and (state := _state_bytes(s)):
        saves = state * (s.replicas - 1) / s.replicas
        yield Advice(f"--trainer.replica-dcn 1 in place of {s.replicas}, one copy of the weights", saves)


def _offload(s: Situation) -> Iterator[Advice]:
    """Copied to the device and back at each step: docs/references/host-offload.md."""
    if optimizer := s.held.get("optimizer", 0):
        yield Advice("--trainer.offload optimizer, into the host's memory", optimizer)


def _more_chips(s: Situation) -> Iterator[Advice]:
    state = _state_bytes(s)
    rows = sum(s.held.get(kind, 0) for kind in (KEPT, WORK)) if s.rows > 1 else 0
    if state + rows:
        yield Advice(f"twice as many chips (--tpu; {s.devices} devices now) for the same batch", (state + rows) / 2)


def _state_bytes(s: Situation) -> int:
    return sum(s.held.get(name, 0) for name in ("parameters", "optimizer", "ema"))


def reckoned_kept(model: Any, rows: int, seq_len: int) -> dict[str, float]:
    """Bytes that all layers keep under each policy but "none": inputs, attention's output and log-sum-exp, and what
    matmuls gave; not those of experts, who knows for how many tokens. Without the padding of tiles.

    model: a configuration with the sizes of `grug_model.base`.
    """
    wide = 2 if model.compute_dtype == "bfloat16" else 4
    positions = rows * seq_len * model.num_layers
    inputs = positions * model.hidden_dim * wide
    attention = positions * model.num_heads * (model.head_dim * wide + 4)
    heads = (model.num_heads + 2 * model.num_kv_heads) * model.head_dim
    matmuls = positions * wide * (heads + 2 * model.intermediate_dim + 2 * model.hidden_dim)
    kept = {
        "offload": 0.0,
        "nested": inputs * 2 / math.sqrt(model.num_layers),
        "full": inputs,
        "save_attention": inputs + attention,
    }
    return kept if hasattr(model, "num_experts") else kept | {"save_matmuls": inputs + attention + matmuls}
