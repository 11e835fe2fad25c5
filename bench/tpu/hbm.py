# SPDX-License-Identifier: Apache-2.0
"""One device's memory while a compiled program runs, by what it is for."""

import inspect
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

# The first of these names on the way to an argument's leaf says what it is: train_step(state, batch) has
# state.params..., state.opt_state..., state.ema_params..., batch...
CATEGORIES = {"params": "parameters", "opt_state": "optimizer", "ema_params": "ema", "batch": "batch"}
# Arguments that are none of them, such as a step counter or q, k and v of an attention call.
OTHER = "other"


@dataclass(frozen=True)
class Hbm:
    """Bytes of one device; all but `available_bytes` are the compiler's own figures.

    arguments: by category (see CATEGORIES), in the padded layout that the compiler chose. What it sets aside for all of
    them together beyond that is "padding".
    temporaries_bytes: set aside in HBM for what is neither argument nor result.
    peak_bytes: `peak_memory_in_bytes`, most in use at one time. No bound on HBM: it counts buffers that the compiler
    keeps in VMEM (two 2048 x 2048 float32 of a v6e program without temporaries: 56 MiB for an argument of 16), and
    leaves out the code and what is set aside but not in use.
    available_bytes: what the chip has for it.
    """

    arguments: dict[str, int]
    outputs_bytes: int
    donated_bytes: int
    temporaries_bytes: int
    code_bytes: int
    peak_bytes: int
    available_bytes: int

    @property
    def arguments_bytes(self) -> int:
        return sum(self.arguments.values())

    @property
    def reserved_bytes(self) -> int:
        """What running the program takes: everything that is set aside, in use or not. Donated arguments count once."""
        results = self.outputs_bytes - self.donated_bytes
        return self.arguments_bytes + results + self.temporaries_bytes + self.code_bytes

    @property
    def left_bytes(self) -> int:
        return self.available_bytes - self.reserved_bytes


def read_hbm(compiled: Any, function: Callable[..., Any], args: Sequence[Any], available_bytes: float) -> Hbm:
    """compiled: `function`, compiled for `args`."""
    memory = compiled.memory_analysis()
    arguments = arguments_by_category(compiled, function, args)
    padding = memory.argument_size_in_bytes - sum(arguments.values())
    return Hbm(
        arguments=arguments | {"padding": padding},
        outputs_bytes=memory.output_size_in_bytes,
        donated_bytes=memory.alias_size_in_bytes,
        temporaries_bytes=memory.temp_size_in_bytes,
        code_bytes=memory.generated_code_size_in_bytes,
        peak_bytes=memory.peak_memory_in_bytes,
        available_bytes=int(available_bytes),
    )


def arguments_by_category(compiled: Any, function: Callable[..., Any], args: Sequence[Any]) -> dict[str, int]:
    """Bytes of one device's arguments, tiles padded. Those that the program does not read take none."""
    names = inspect.signature(function).bind(*args).arguments
    infos, formats = compiled.args_info[0], compiled.input_formats[0]
    found: Counter[str] = Counter()
    for name, info, arg_formats in zip(names, infos, formats, strict=True):
        leaves = jax.tree.leaves_with_path(info)
        for (path, leaf), form in zip(leaves, jax.tree.leaves(arg_formats), strict=True):
            found[_category((name, *path))] += _padded_bytes(leaf, form)
    return dict(found)


def _category(path: Sequence[Any]) -> str:
    names = (getattr(key, "name", key) for key in path)
    return next((CATEGORIES[name] for name in names if name in CATEGORIES), OTHER)


def _padded_bytes(leaf: Any, form: Any) -> int:
    """One device's part of an array, its last dimensions filled up to whole tiles."""
    if form.sharding is None:
        return 0  # the program does not read it, and it is left out
    local = jax.ShapeDtypeStruct(form.sharding.shard_shape(leaf.shape), leaf.dtype)
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        local = jax.eval_shape(jax.random.key_data, local)  # what a key is on the device: two uint32
    sizes = [local.shape[axis] for axis in form.layout.major_to_minor]
    tile = form.layout.tiling[0] if form.layout.tiling else ()
    sizes = [1] * (len(tile) - len(sizes)) + sizes
    whole = len(sizes) - len(tile)
    padded = (-(-size // block) * block for size, block in zip(sizes[whole:], tile, strict=True))
    return math.prod(sizes[:whole]) * math.prod(padded) * local.dtype.itemsize
