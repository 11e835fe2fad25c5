# SPDX-License-Identifier: Apache-2.0
"""The step that failed, once more: from the last good checkpoint, one step after the other, up to it and through it.

The state before a step is donated to it, and that a loss is not finite the loop learns up to `log_every` steps later.
Steps are deterministic, so what is gone can be made again, where that is cheap.
"""

import math
from typing import TYPE_CHECKING, Any

import jax

from train import together
from train.checkpoint import restore_latest_or_initialize
from train.data import iter_from_step
from train.failure_norms import first_not_finite, norms_by_layer
from train.metrics import MUST_BE_FINITE
from train.offload import shapes_of
from train.rundir import say

if TYPE_CHECKING:
    from train.failure_bundle import Evidence

# What a replay may take: a fraction of what it costs a person to find the array by hand.
LIMIT_SECONDS = 300.0


def state_around(evidence: "Evidence", step: int, checkpoint: str | None, first: int, seconds: float) -> dict[str, Any]:
    """Norms of the state before `step`, of its gradients and of the state after it, and where they first go wrong.

    Where a replay from `checkpoint`, which holds `first` completed steps, is not cheap (`seconds`), those of the
    present state. Says which they are under "of".
    """
    if together.processes() > 1:  # the processes would have to agree on what is cheap, and on what was found
        return _present(evidence, "a run of several processes is not replayed")
    if seconds > LIMIT_SECONDS:
        return _present(evidence, f"a replay would take about {seconds:.0f} s, more than {LIMIT_SECONDS:.0f}")
    return _replayed(evidence, step, checkpoint, first)


def _present(evidence: "Evidence", why_no_replay: str) -> dict[str, Any]:
    assert evidence.loop is not None
    norms = _norms_of_state(evidence.state)
    return {
        "of": f"the state after step {evidence.loop.meter.newest_step}: {why_no_replay}, and the state before the step"
        " that failed was donated to it",
        "before": {},
        "after": norms,
        "gradients": {},
        "first_not_finite": _first({}, {}, norms),
    }


def _replayed(evidence: "Evidence", step: int, checkpoint: str | None, first: int) -> dict[str, Any]:
    loop = evidence.loop
    assert loop is not None
    whence = checkpoint or "the initial state"
    say(f"replaying steps {first + 1} to {step} from {whence}, to find where it began ...")
    jax.tree.map(lambda leaf: leaf.delete(), evidence.state)  # two states may be more than the devices hold
    if checkpoint:
        state, _ = restore_latest_or_initialize(
            [checkpoint], shapes_of(evidence.init), mesh=jax.sharding.get_mesh(), init=evidence.init
        )
    else:
        state = evidence.init()
    with iter_from_step(loop.loader, first) as batches:
        for _ in range(first + 1, step):
            state, _ = loop.train_step(state, next(batches))
        batch = next(batches)
    before = _norms_of_state(state)
    gradients = norms_by_layer(jax.jit(jax.grad(loop.loss, has_aux=True))(state.params, batch)[0])
    state, metrics = loop.train_step(state, batch)
    after = _norms_of_state(state)
    values = {name: float(value) for name, value in jax.device_get(metrics).items() if name in MUST_BE_FINITE}
    return {
        "of": f"the state before and after step {step}, made again from {whence}",
        "before": before,
        "gradients": gradients,
        "after": after,
        "metrics": {name: value if math.isfinite(value) else str(value) for name, value in values.items()},
        "fails_again": not all(map(math.isfinite, values.values())),
        "first_not_finite": _first(before, gradients, after),
    }


def _norms_of_state(state: Any) -> dict[str, Any]:
    return {name: norms_by_layer(getattr(state, name)) for name in ("params", "opt_state")}


def _first(before: dict[str, Any], gradients: dict[str, Any], after: dict[str, Any]) -> dict[str, str] | None:
    """The first array that is not finite, and what that says; None where all are finite."""
    for which, state, meaning in (
        ("before", before, "it was so before the step: its batch is not to blame"),
        (
            "gradients",
            {"gradients": gradients},
            "the first that the backward pass reaches; before the step the state was finite",
        ),
        ("after", after, "after the step, in the order of the forward pass"),
    ):
        for tree, norms in state.items():
            if name := first_not_finite(norms, backwards=which == "gradients"):
                return {"array": f"{tree}/{name}", "when": which, "meaning": meaning}
    return None
