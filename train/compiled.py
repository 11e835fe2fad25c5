# SPDX-License-Identifier: Apache-2.0
"""The training step, compiled ahead of its first call: how long that took, its memory, the kernels in it."""

from collections.abc import Callable
from pathlib import Path
from time import perf_counter
from typing import Any

import jax

from grug_kernels import dispatch
from grug_kernels.chips import Peak, peak_flops
from train.progress import phase
from train.summary import kernel_metrics
from train.tracker import RunTracker
from train.watch import WatchConfig


def keep_compiled_programs(cache_dir: Path) -> None:
    """Programs compiled from now on are kept in `cache_dir`/xla, and found there by the next run of the same shapes.

    JAX's own cache: keyed by program, versions and machine. JAX_COMPILATION_CACHE_DIR, where set, is used instead.
    """
    if jax.config.jax_compilation_cache_dir is None:
        jax.config.update("jax_compilation_cache_dir", str(cache_dir / "xla"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)


def compile_step(train_step: Any, state: Any, batch: Any, tracker: RunTracker, *, require_kernels: bool) -> Any:
    """`train_step`, a jitted function of state and batch, as one executable for these shapes and shardings.

    Logs compile/seconds, memory/{arguments,temporaries}_bytes of one device, and what `kernel_metrics` names.

    Raises:
      dispatch.UnsupportedError: with `require_kernels`, a kernel refused and a slower one took its place.
    """
    with phase("compiling the training step"), dispatch.recording() as choices:
        start = perf_counter()
        lowered = train_step.lower(state, batch)
        # Now: of a program that does not compile it is what one asks first.
        tracker.log_summary(kernel_metrics(choices))
        fallbacks = [f"{choice.op}: {why}" for choice in choices for _, why in choice.refusals]
        if require_kernels and fallbacks:
            raise dispatch.UnsupportedError(
                f"--trainer.require-kernels: {'; '.join(fallbacks)}. Change the model so that the kernel takes it, or"
                " leave the flag out to train with the slower implementation."
            )
        compiled = lowered.compile()
    memory = compiled.memory_analysis()
    results = memory.output_size_in_bytes - memory.alias_size_in_bytes
    tracker.log_summary(
        {
            "compile/seconds": perf_counter() - start,
            "memory/arguments_bytes": memory.argument_size_in_bytes,
            # Not temp_size_in_bytes: on a TPU it counts gaps twice and what is donated once more.
            "memory/temporaries_bytes": memory.total_allocation_bytes - memory.argument_size_in_bytes - results,
        }
    )
    return compiled


def compile_watched_step(make_step: Callable[[WatchConfig], Any], watch: WatchConfig, state: Any, batch: Any) -> Any:
    """The step that also makes what `watch` asks for, compiled beside the other one; None where it asks for nothing."""
    if not watch.what:
        return None
    with phase("compiling the step that is watched"):
        return make_step(watch).lower(state, batch).compile()


def peak_of_device(peak_tflops: float | None) -> Peak | None:
    """What one device could do, as the user says or as `chips.py` knows."""
    if peak_tflops is not None:
        return Peak(peak_tflops * 1e12, "given by --trainer.peak-tflops", is_measured=False)
    return peak_flops(jax.devices()[0])
