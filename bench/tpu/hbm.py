# SPDX-License-Identifier: Apache-2.0
"""One device's memory while a compiled program runs, by what it is for."""

import re
from collections import Counter
from dataclasses import dataclass

from bench.tpu import arrays, hlo

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
    on_host: the same of arguments that live in the host's memory; they are in none of the other figures.
    on_host_bytes: what this device's program takes of the host's memory, results that replace arguments counted once.
    temporaries_bytes: set aside in HBM for what is neither argument nor result. Not `temp_size_in_bytes`, which counts
    the gaps between them twice and what is donated once more: 16.0 GB beside arguments of 2.9 for a program that has
    16.0 in all, and compiles for a chip with 16.1.
    peak_bytes: `peak_memory_in_bytes`, most in use at one time. No bound on HBM: it counts buffers that the compiler
    keeps in VMEM (two 2048 x 2048 float32 of a v6e program without temporaries: 56 MiB for an argument of 16), and
    leaves out the code and what is set aside but not in use. Without `on_host_bytes`, which the compiler counts in it.
    available_bytes: what the chip has for it.
    """

    arguments: dict[str, int]
    on_host: dict[str, int]
    on_host_bytes: int
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
        """What running the program takes: everything that is set aside, in use or not. Donated arguments count once.

        This is what the compiler holds against `available_bytes`: "Used 801.47M of 801.00M hbm".
        """
        results = self.outputs_bytes - self.donated_bytes
        return self.arguments_bytes + results + self.temporaries_bytes + self.code_bytes

    @property
    def left_bytes(self) -> int:
        return self.available_bytes - self.reserved_bytes


def read_hbm(module: hlo.Module, memory: dict[str, int], available_bytes: float) -> Hbm:
    """module: as compiled. memory: `dump.Compiled.memory`."""
    arguments, on_host = arguments_by_category(module)
    on_host_bytes = memory["host_argument"] + memory["host_output"] - memory["host_alias"] + memory["host_temp"]
    return Hbm(
        arguments=arguments | {"padding": memory["argument"] - sum(arguments.values())},
        on_host=on_host,
        on_host_bytes=on_host_bytes,
        outputs_bytes=memory["output"],
        donated_bytes=memory["alias"],
        temporaries_bytes=memory["total"] - memory["argument"] - (memory["output"] - memory["alias"]),
        code_bytes=memory["code"],
        peak_bytes=memory["peak"] - on_host_bytes,
        available_bytes=int(available_bytes),
    )


def arguments_by_category(module: hlo.Module) -> tuple[dict[str, int], dict[str, int]]:
    """Bytes of one device's arguments, tiles padded: those in its own memory, and those in the host's. Those that the
    program does not read are in neither."""
    here: Counter[str] = Counter()
    on_host: Counter[str] = Counter()
    parameters = [i for i in module.computations[module.entry] if i.opcode == "parameter"]
    for parameter in sorted(parameters, key=lambda parameter: parameter.parameter_number):
        names = re.findall(r"\w+", parameter.op_name)  # the argument's path: state.params.blocks['w']
        category = next((CATEGORIES[name] for name in names if name in CATEGORIES), OTHER)
        found = on_host if "S(5)" in arrays.layout_of(parameter.shape) else here  # memory space 5 is the host's
        found[category] += arrays.padded_bytes_of(parameter.shape)
    return dict(here), dict(on_host)
