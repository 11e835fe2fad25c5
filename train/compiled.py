# SPDX-License-Identifier: Apache-2.0
"""The training step compiled ahead of its first call: how long it took, what memory it needs, which kernels are in it."""

from time import perf_counter
from typing import Any

from grug_kernels import dispatch
from train.metrics import RunTracker
from train.progress import phase
from train.summary import kernel_metrics, si


def compile_step(train_step: Any, state: Any, batch: Any, tracker: RunTracker, *, require_kernels: bool) -> Any:
    """`train_step` (a jitted function of state and batch) as one executable for exactly these shapes and shardings.

    Logs compile/seconds, memory/{arguments,temporaries}_bytes of one device, and kernel/<op>/{requested,implementation}.

    Raises:
      dispatch.UnsupportedError: with `require_kernels`, a kernel refused and a slower one took its place.
    """
    with phase("compiling the training step"), dispatch.recording() as choices:
        start = perf_counter()
        lowered = train_step.lower(state, batch)
        fallbacks = [f"{choice.op}: {why}" for choice in choices for _, why in choice.refusals]
        if require_kernels and fallbacks:
            raise dispatch.UnsupportedError(
                f"--trainer.require-kernels: {'; '.join(fallbacks)}. Change the model so that the kernel takes it, or leave"
                " the flag out to train with the slower implementation."
            )
        compiled = lowered.compile()
    memory = compiled.memory_analysis()
    tracker.log_summary(
        kernel_metrics(choices)
        | {
            "compile/seconds": perf_counter() - start,
            "memory/arguments_bytes": memory.argument_size_in_bytes,
            "memory/temporaries_bytes": memory.temp_size_in_bytes,
        }
    )
    return compiled


def model_size(params: Any) -> str:
    """"4.3M parameters"."""
    import jax

    return f"{si(sum(leaf.size for leaf in jax.tree.leaves(params)))} parameters"
