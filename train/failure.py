# SPDX-License-Identifier: Apache-2.0
"""The ways in which a run fails, and the exit code of each: docs/recipes/when-a-run-fails.md has the table."""

import traceback
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
OURS = ("train", "grug_model", "grug_kernels", "bench")


@dataclass(frozen=True)
class Kind:
    """name: of the bundle's folder. exit_code: of the program."""

    name: str
    exit_code: int
    title: str


ERROR = Kind("error", 1, "an error that nobody expected")  # 1 is what Python ends with after a traceback
NON_FINITE = Kind("non-finite", 3, "a number that is not finite")
OUT_OF_MEMORY = Kind("out-of-memory", 5, "out of memory")
KERNEL_ERROR = Kind("kernel-error", 6, "a kernel or the compiler failed")
STALL = Kind("stall", 7, "no step completed for too long")


def kind_of(error: Exception) -> Kind | None:
    """What failed; None where the error `explains_itself` and says what to change: that is no case for a bundle."""
    from jax.errors import JaxRuntimeError

    from grug_kernels.dispatch import UnsupportedError
    from train.metrics import NonFiniteLossError

    if isinstance(error, NonFiniteLossError):
        return NON_FINITE
    if isinstance(error, MemoryError) or (isinstance(error, JaxRuntimeError) and _is_memory(str(error))):
        return OUT_OF_MEMORY
    if isinstance(error, UnsupportedError | JaxRuntimeError):
        return KERNEL_ERROR
    if explains_itself(error):
        return None
    return KERNEL_ERROR if _comes_from_pallas(error) else ERROR


def explains_itself(error: Exception) -> bool:
    """Whether this project raised it, with a message that says what to do. Anything else needs its traceback."""
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    file = Path(frame.f_code.co_filename)
    ours = any(file.is_relative_to(ROOT / folder) for folder in OURS)
    return ours and isinstance(error, ValueError | OSError | RuntimeError)


def first_line(error: BaseException) -> str:
    """XLA's and TensorStore's messages go on for pages; the first line says what and where."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:800]}"


def _is_memory(message: str) -> bool:
    """Of the device or the host. What a kernel takes too much of, VMEM and SMEM, is the kernel's affair."""
    exhausted = "RESOURCE_EXHAUSTED" in message or "Out of memory" in message
    return exhausted and not any(f"memory space {space}" in message for space in ("vmem", "smem"))


def _comes_from_pallas(error: Exception) -> bool:
    frames = traceback.walk_tb(error.__traceback__)
    return any({"pallas", "mosaic"} & {*Path(frame.f_code.co_filename).parts} for frame, _ in frames)
