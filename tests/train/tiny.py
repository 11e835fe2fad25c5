# SPDX-License-Identifier: Apache-2.0
"""The main job at a size that tests can afford, and what it leaves behind; `conftest.py` has its fixtures."""

import contextlib
import io
import json
import logging
from pathlib import Path
from typing import Any, NamedTuple

from train.run import main

STEPS = 6
FLAGS = {
    "--data.vocab-size": 1024,
    "--model.vocab-size": 1024,
    "--model.hidden-dim": 16,
    "--model.intermediate-dim": 32,
    "--model.num-layers": 2,
    "--model.num-heads": 2,
    "--model.num-kv-heads": 1,
    "--model.head-dim": 8,
    "--model.max-seq-len": 32,
    "--trainer.seq-len": 32,
    "--trainer.batch-size": 8,
    "--trainer.log-every": 2,
    "--trainer.peak-tflops": 0.1,  # saves measuring it
    "--optimizer.warmup-steps": 2,
    "--steps": STEPS,
    "--checkpoint.every": 3,
    "--checkpoint.temporary-minutes": 0,
    "--eval.every": 3,
    "--eval.max-examples-per-dataset": 8,
}


class Ended(NamedTuple):
    """How a run ended: its exit code, and what it said on stderr."""

    code: Any
    text: str


def flags(changed: dict[str, Any] | None = None) -> list[str]:
    """The tiny run of the stacked variant as a command line."""
    return ["--stacked", *(str(part) for pair in (FLAGS | (changed or {})).items() for part in pair)]


def run(*argv: str) -> Ended:
    """`python -m train.run argv...` in this process."""
    said = io.StringIO()
    handler = logging.StreamHandler(said)
    logging.getLogger("train").addHandler(handler)
    code = 0
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
            main(list(argv))
    except SystemExit as end:
        code = end.code
    finally:
        logging.getLogger("train").removeHandler(handler)
    return Ended(code, said.getvalue())


def run_tiny(run_id: str, *switches: str, **changed: Any) -> Ended:
    """The tiny run under the name `run_id`, with other flags: run_tiny("a", "--require-kernels", **{"--steps": 4})."""
    return run(*flags(changed), *switches, "--run-id", run_id)


def saved_steps(run_dir: Path) -> list[int]:
    """Steps of the complete checkpoints of a run."""
    return sorted(int(file.parent.name[5:]) for file in run_dir.glob("checkpoints/step-*/metadata.json"))


def arrays_of(checkpoint: Path) -> dict[str, bytes]:
    """The bytes of every array of a checkpoint, keys as their words."""
    import jax
    import numpy as np

    from train.checkpoint_arrays import load
    from train.mesh import create_mesh

    metadata = json.loads((checkpoint / "metadata.json").read_text())
    key = jax.eval_shape(lambda: jax.random.key(0))
    wanted = {
        name: key if dtype.startswith("key") else jax.ShapeDtypeStruct(tuple(shape), dtype)
        for name, (shape, dtype) in metadata["specs"].items()
    }
    arrays = load(str(checkpoint), wanted, create_mesh(jax.device_count()), metadata["checksums"])
    words = {name: jax.random.key_data(a) if a.dtype == key.dtype else a for name, a in arrays.items()}
    return {name: np.asarray(array).tobytes() for name, array in words.items()}


def spoil(checkpoint: Path, how: str) -> None:
    """Damages the largest file of arrays: `how` is "truncated" (half of it is lost) or "flipped" (one bit)."""
    file = max((path for path in checkpoint.glob("d/*") if path.is_file()), key=lambda path: path.stat().st_size)
    content = bytearray(file.read_bytes())
    if how == "truncated":
        del content[len(content) // 2 :]
    else:
        content[len(content) // 2] ^= 1
    file.write_bytes(content)
