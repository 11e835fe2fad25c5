# SPDX-License-Identifier: Apache-2.0
"""What libtpu is told, that a run and the executor's steps are told the same, and that it does what it is for."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from bench.tpu.record import compile_record
from bench.tpu.topology import tpu_topology
from tests.bench.test_tpu_schedule import needs_libtpu
from train import tpu_flags

ROOT = Path(__file__).parents[2]
(FLAG,) = tpu_flags.FLAGS


@pytest.mark.parametrize(
    ("own", "all_of_them"),
    [
        ("", FLAG),
        ("--xla_tpu_other=1", f"{FLAG} --xla_tpu_other=1"),
        (FLAG.replace("1000000", "7"), FLAG.replace("1000000", "7")),
        (f"{FLAG} --a=b", f"{FLAG} --a=b"),
    ],
)
def test_the_users_own_flags_stay(own, all_of_them):
    assert tpu_flags.libtpu_init_args(own) == all_of_them


@pytest.mark.parametrize(
    ("module", "argv"), [("train.run", ["--preset", "none"]), ("grug_model.score", ["none", "base"])]
)
def test_commands_that_train_set_them_before_jax_is_used(module, argv):
    """Each ends at once, for a preset or a variant that there is not."""
    program = (
        "import atexit, os, runpy, sys\n"
        "atexit.register(lambda: print('FLAGS', os.environ['LIBTPU_INIT_ARGS']))\n"
        f"sys.argv = {['x', *argv]!r}\nrunpy.run_module({module!r}, run_name='__main__')"
    )
    environment = os.environ | {"LIBTPU_INIT_ARGS": "--own=1"}
    command = [sys.executable, "-c", program]
    ended = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert f"FLAGS {FLAG} --own=1" in ended.stdout, ended.stderr


def kinds(monkeypatch, own: str) -> set[str]:
    """Of collectives that a matmul sends, 32 x 4096 tokens on each of four devices, its weight split over them."""
    monkeypatch.setenv("LIBTPU_INIT_ARGS", own)
    topology = tpu_topology("v6e:2x2")
    mesh = topology.mesh()
    with topology.targeted(mesh):
        x = jax.ShapeDtypeStruct((512, 4096, 512), jnp.bfloat16, sharding=NamedSharding(mesh, P("data")))
        w = jax.ShapeDtypeStruct((512, 1792), jnp.bfloat16, sharding=NamedSharding(mesh, P("data")))
        matmul = jax.jit(lambda x, w: jnp.einsum("btd,df->btf", x, w, out_sharding=P("data")))
        found = compile_record(matmul, x, w, topology=topology).collectives
    assert found is not None
    return set(found.kinds)


@needs_libtpu
def test_weights_are_gathered_once_and_not_passed_round(monkeypatch):
    assert kinds(monkeypatch, "") == {"all-gather"}
    assert kinds(monkeypatch, f"{FLAG.split('=')[0]}=0") == {"collective-permute"}
