# SPDX-License-Identifier: Apache-2.0
"""Eight virtual CPU devices for every test, asked for before jax is imported anywhere.

Programs are compiled without LLVM's optimizations: tests compile for much longer than they run.
"""

import os

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = " ".join(
    [
        os.environ.get("XLA_FLAGS", ""),
        "--xla_force_host_platform_device_count=8",
        "--xla_backend_optimization_level=0",
    ]
)
# XLA runs a sharded program's collectives on a pool of as many threads as there are devices: two collectives that wait
# at once leave some device without a thread, and the program stands still until it is aborted. More threads, no hang.
os.environ.setdefault("PJRT_NPROC", "32")
