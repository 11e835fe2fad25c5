# SPDX-License-Identifier: Apache-2.0
"""Eight virtual CPU devices for every test, asked for before jax is imported anywhere."""

import os

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
