# SPDX-License-Identifier: Apache-2.0
"""`python -m bench.tpu.worker DIRECTORY`: compiles DIRECTORY/module.mlir for a TPU that is not there.

A process of its own: libtpu reads the flags that make it dump schedules once, when it is loaded, and a crash of the
compiler should not take the caller with it. `dump.py` starts it and reads what it leaves in DIRECTORY: the dump,
`hlo.txt`, `facts.json`; `refusal.txt` where the compiler refused.
"""

import json
import sys
import time
from pathlib import Path

import jax
import numpy as np
from jax._src import compiler  # these two: what jax.jit itself compiles with; the jax version is pinned
from jax._src.interpreters import mlir
from jax._src.lib import xla_client  # pyright: ignore[reportPrivateImportUsage]
from jax.experimental import topologies
from jaxlib import _hlo  # pyright: ignore[reportAttributeAccessIssue]
from jaxlib.mlir import ir


def main(directory: Path, topology: str) -> None:
    device = topologies.get_topology_desc(topology_name=topology, platform="tpu").devices[0]
    options = compiler.get_compile_options(
        num_replicas=1, num_partitions=1, device_assignment=np.array([[device.id]]), backend=device.client
    )
    start = time.monotonic()
    try:
        with mlir.make_ir_context():
            executable = device.client.compile(
                ir.Module.parse((directory / "module.mlir").read_bytes()),
                executable_devices=xla_client.DeviceList((device,)),
                compile_options=options,
            )
    except jax.errors.JaxRuntimeError as refusal:
        (directory / "refusal.txt").write_text(str(refusal))
        return
    seconds = time.monotonic() - start
    printing = _hlo.HloPrintOptions()
    printing.print_large_constants = True
    (directory / "hlo.txt").write_text(executable.hlo_modules()[0].to_string(printing))
    stats = executable.get_compiled_memory_stats()
    names = {"argument": "argument", "output": "output", "alias": "alias", "temp": "temp", "code": "generated_code"}
    memory = {f"{ours}_bytes": getattr(stats, f"{theirs}_size_in_bytes") for ours, theirs in names.items()}
    (directory / "facts.json").write_text(json.dumps({"memory": memory, "compile_seconds": seconds}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
