# SPDX-License-Identifier: Apache-2.0
"""Small functions to be compiled for a TPU: `gather()` and `matmul()` return (function, args); and what compiling would
yield, made by hand."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
from jax import ShapeDtypeStruct as Shape
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from bench.tpu.dump import Lowered
from bench.tpu.hbm import Hbm
from bench.tpu.record import Record
from bench.tpu.topology import Topology
from grug_kernels import chips

LOWERED = Lowered(b"", 0, 0, "v6e:2x2", (0, 1, 2, 3), (), (), False)


def topology(name: str, *extents: int) -> Topology:
    """As libtpu describes it, without libtpu: chips numbered along the first axis first."""
    chip = next(chip for chip in chips.TPUS if chip.name == name)
    coords = [[x, y, z] for z in range(extents[2]) for y in range(extents[1]) for x in range(extents[0])]
    return Topology(name, chip, tuple(SimpleNamespace(id=i, coords=c) for i, c in enumerate(coords)))


def record(name: str) -> Record:
    """Of a program on a square of chips that was compiled."""
    return Record(topology(name, 2, 2, 1), seconds={"compile": 1.5}, hbm=Hbm({"other": 2**20}, {}, 0, 0, 0, 0, 0, 0, 0))


GATHER_BLOCKS, GATHER_BLOCK = 6, (32, 128)


def _double_kernel(table_ref, x_ref, o_ref):
    o_ref[...] = 2 * x_ref[...]


def gather():
    """Blocks of x in the order of a table that is data at run time; a block repeated is not fetched again."""
    rows, columns = GATHER_BLOCK
    spec = pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=1,
        grid=(GATHER_BLOCKS,),
        in_specs=[pl.BlockSpec(GATHER_BLOCK, lambda i, table: (table[i], 0))],
        out_specs=pl.BlockSpec(GATHER_BLOCK, lambda i, table: (i, 0)),
    )
    x = Shape((GATHER_BLOCKS * rows, columns), jnp.float32)
    call = pl.pallas_call(_double_kernel, out_shape=x, grid_spec=spec, name="gather")
    return call, (Shape((GATHER_BLOCKS,), jnp.int32), x)


def _matmul_kernel(x_ref, y_ref, o_ref):
    @pl.when(pl.program_id(2) == 0)
    def start():
        o_ref[...] = jnp.zeros_like(o_ref)

    o_ref[...] += jnp.dot(x_ref[...], y_ref[...], preferred_element_type=jnp.float32)


def matmul(size: int = 512, block: int = 256):
    """[size, size] x [size, size] in bfloat16, blocks along all three axes."""
    steps = size // block
    call = pl.pallas_call(
        _matmul_kernel,
        out_shape=Shape((size, size), jnp.float32),
        grid=(steps, steps, steps),
        in_specs=[
            pl.BlockSpec((block, block), lambda i, j, k: (i, k)),
            pl.BlockSpec((block, block), lambda i, j, k: (k, j)),
        ],
        out_specs=pl.BlockSpec((block, block), lambda i, j, k: (i, j)),
        name="matmul",
    )
    x = Shape((size, size), jnp.bfloat16)
    return call, (x, x)


def too_large():
    """A block of 256 MiB: no chip has that much VMEM."""
    x = Shape((8192, 8192), jnp.float32)

    def copy_kernel(x_ref, o_ref):
        o_ref[...] = x_ref[...]

    return pl.pallas_call(copy_kernel, out_shape=x, name="too_large"), (x,)


def softmax():
    """Plain XLA, no kernel of ours."""
    return jax.nn.softmax, (Shape((256, 1024), jnp.float32),)
