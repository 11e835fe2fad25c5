# SPDX-License-Identifier: Apache-2.0
"""`python -m bench.tpu.worker DIRECTORY`: compiles DIRECTORY/module.mlir for a TPU that is not there.

A process of its own: libtpu reads the flags that make it dump schedules once, when it is loaded, and a crash of the
compiler should not take the caller with it. `dump.py` starts it with `request.json` and reads what it leaves in
DIRECTORY: the dump, `hlo.txt`, `facts.json`; `refusal.txt` where the compiler refused.
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

MEMORY = {
    "argument": "argument_size_in_bytes",
    "output": "output_size_in_bytes",
    "alias": "alias_size_in_bytes",
    "code": "generated_code_size_in_bytes",
    "peak": "peak_memory_in_bytes",
    "total": "total_allocation_bytes",
    "host_argument": "host_argument_size_in_bytes",
    "host_output": "host_output_size_in_bytes",
    "host_alias": "host_alias_size_in_bytes",
    "host_temp": "host_temp_size_in_bytes",
}


def main(directory: Path) -> None:
    request = json.loads((directory / "request.json").read_text())
    topology = topologies.get_topology_desc(topology_name=request["topology"], platform="tpu")
    by_id = {device.id: device for device in topology.devices}
    devices = tuple(by_id[number] for number in request["devices"])
    client = devices[0].client
    options = compiler.get_compile_options(
        num_replicas=1,
        num_partitions=len(devices),
        device_assignment=np.array([request["devices"]]),
        backend=client,
    )
    options.parameter_is_tupled_arguments = request["tuple_arguments"]
    options.executable_build_options.allow_spmd_sharding_propagation_to_parameters = request["to_parameters"]
    options.executable_build_options.allow_spmd_sharding_propagation_to_output = request["to_results"]
    start, cpu_start = time.perf_counter(), time.process_time()
    try:
        with mlir.make_ir_context():
            executable = client.compile(
                ir.Module.parse((directory / "module.mlir").read_bytes()),
                executable_devices=xla_client.DeviceList(devices),
                compile_options=options,
            )
    except jax.errors.JaxRuntimeError as refusal:
        (directory / "refusal.txt").write_text(str(refusal))
        return
    facts = {"seconds": time.perf_counter() - start, "cpu_seconds": time.process_time() - cpu_start}
    printing = _hlo.HloPrintOptions()
    printing.print_large_constants = True
    (directory / "hlo.txt").write_text(executable.hlo_modules()[0].to_string(printing))
    stats = executable.get_compiled_memory_stats()
    memory = {ours: getattr(stats, theirs) for ours, theirs in MEMORY.items()}
    (directory / "facts.json").write_text(json.dumps(facts | {"memory": memory}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
