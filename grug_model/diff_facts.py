# SPDX-License-Identifier: Apache-2.0
"""What two variants compute, held against each other: sizes, FLOPs, arrays, kernels. From shapes: no array is made.

A variant is read from its directory, wherever that is; one that does not import is no error here but a problem of its
`Facts`, which say what could not be computed and why.
"""

import importlib
import re
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache, partial
from itertools import count
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

from train.mesh import AXES
from train.rundir import as_dict, flat

# Whose sizes the arrays and kernels are told at.
PRESET = "130m"
PLATFORMS = ("cpu", "tpu")
DEFAULTS = "defaults"

# By preset.
Counts = Mapping[str, int | float]

_number = count()


@dataclass(frozen=True)
class Facts:
    """Of one variant; what could not be computed is empty here, and named in `problems` with the reason.

    knobs: per preset, and for DEFAULTS, every field of the configuration. parameters, flops: per preset, the latter per
    token of a training step, attention over all keys. arrays: names, with layers as *, to how many there are of each
    dtype, shape and sharding. kernels: (op, platform) to implementations, with who refused.
    """

    knobs: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    parameters: Counts = field(default_factory=dict)
    flops: Counts = field(default_factory=dict)
    arrays: Mapping[str, Counter[str]] = field(default_factory=dict)
    kernels: Mapping[tuple[str, str], str] = field(default_factory=dict)
    problems: Mapping[str, str] = field(default_factory=dict)


def facts_of(variant: Path, *, kernels: bool = True) -> Facts:
    """Of the variant in that directory. kernels: they are found by lowering the training step, which takes seconds."""
    found: dict[str, Any] = {}
    problems: dict[str, str] = {}

    def attempt(name: str, what: str, compute: Callable[[], Any]) -> None:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of refusals, which are recorded
                found[name] = compute()
        except Exception as error:  # what somebody is in the middle of writing may fail in any way
            problems[what] = f"{type(error).__name__}: {error}"

    attempt("code", "anything but its text", lambda: imported(variant))
    code = found.pop("code", None)
    if code is not None:
        attempt("knobs", "its configuration", lambda: _knobs(code))
        attempt("parameters", "its parameters", lambda: _parameters(code))
        attempt("flops", "its FLOPs", lambda: _flops(code))
        attempt("arrays", "its arrays", lambda: _arrays(code))
        for platform in PLATFORMS if kernels else ():
            attempt(platform, f"its kernels on {platform}", partial(_kernels, code, platform))
        found["kernels"] = {key: value for name in PLATFORMS for key, value in found.pop(name, {}).items()}
    return Facts(**found, problems=problems)


def imported(variant: Path) -> SimpleNamespace:
    """The modules model, train and launch of that directory: another copy each time, under a name of their own."""
    package = ModuleType(f"{__package__}._compared_{next(_number)}")
    package.__path__ = [str(variant.resolve())]
    sys.modules[package.__name__] = package
    importlib.invalidate_caches()
    parts = ("model", "train", "launch")
    return SimpleNamespace(**{part: importlib.import_module(f"{package.__name__}.{part}") for part in parts})


def _knobs(code: SimpleNamespace) -> dict[str, dict[str, Any]]:
    presets = {name: flat(as_dict(preset)) for name, preset in code.launch.PRESETS.items()}
    return {DEFAULTS: flat({"model": as_dict(code.model.GrugModelConfig())})} | presets


def _parameters(code: SimpleNamespace) -> Counts:
    import jax

    @cache  # presets may share their model
    def size(cfg: Any) -> int:
        return sum(leaf.size for leaf in jax.tree.leaves(_params(code, cfg)))

    return {name: size(preset.model) for name, preset in code.launch.PRESETS.items()}


def _flops(code: SimpleNamespace) -> Counts:
    presets = code.launch.PRESETS.items()
    return {name: preset.model.flops_per_token(preset.trainer.seq_len).training for name, preset in presets}


def _params(code: SimpleNamespace, cfg: Any) -> Any:
    from train.shapes import abstract_parameters

    return abstract_parameters(code.model.Transformer, cfg, _mesh("cpu"))


def _arrays(code: SimpleNamespace) -> dict[str, Counter[str]]:
    import jax

    rows: dict[str, Counter[str]] = {}
    params = _params(code, code.launch.PRESETS[PRESET].model)
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        name = re.sub(r"\b\d+\b", "*", jax.tree_util.keystr(path, simple=True, separator="/"))
        spec = ", ".join("–" if axis is None else str(axis) for axis in leaf.sharding.spec)
        described = f"{leaf.dtype}[{', '.join(map(str, leaf.shape))}]" + (
            f" over ({spec})" if spec.strip("–, ") else ""
        )
        rows.setdefault(name, Counter())[described] += 1
    return rows


def _kernels(code: SimpleNamespace, platform: str) -> dict[tuple[str, str], str]:
    """Which implementations the training step takes, found by tracing and lowering it; nothing is compiled."""
    import jax

    from grug_kernels import dispatch
    from train.shapes import abstract_batch

    config = code.launch.PRESETS[PRESET]
    optimizer = config.optimizer.build(config.trainer.steps, matrix_axes=code.train.matrix_axes)
    init = partial(code.train.init_train_state, config.model, optimizer, config.trainer)
    mesh = _mesh(platform)
    with jax.sharding.use_abstract_mesh(mesh), dispatch.targeting(platform), dispatch.recording() as choices:
        key = jax.eval_shape(lambda: jax.random.key(0))
        state = jax.eval_shape(lambda key: init(key=key), key)
        batch = abstract_batch(mesh, config.trainer.batch_size, config.trainer.seq_len)
        step = code.train.make_train_step(optimizer, config.trainer)
        step.trace(state, batch).lower(lowering_platforms=(platform,))
    used: dict[tuple[str, str], dict[str, None]] = {}
    for choice in choices:
        refused = "".join(f"; {name} refused: {reason}" for name, reason in choice.refusals)
        used.setdefault((choice.op, platform), {})[choice.used + refused] = None
    return {key: ", ".join(names) for key, names in used.items()}


def _mesh(platform: str) -> Any:
    """data=2, model=2, of devices that are not there."""
    from jax.sharding import AbstractDevice, AbstractMesh, AxisType

    tpu = AbstractDevice(device_kind="TPU v6 lite", num_cores=1, platform="tpu") if platform == "tpu" else None
    return AbstractMesh((1, 2, 1, 1, 2), AXES, axis_types=(AxisType.Explicit,) * 5, abstract_device=tpu)


# Held against each other.


def changed_knobs(left: Facts, right: Facts) -> list[tuple[str, str, str, str]]:
    """(field, the presets where it differs, left, right). A preset that one of them has not differs by its name.

    Nothing where the knobs of one are not known."""
    if not (left.knobs and right.knobs):
        return []
    rows: dict[tuple[str, str, str], list[str]] = {}
    for preset in dict.fromkeys([*left.knobs, *right.knobs]):
        ours, theirs = left.knobs.get(preset), right.knobs.get(preset)
        if ours is None or theirs is None:
            rows[(f"preset {preset}", _there(ours), _there(theirs))] = [preset]
            continue
        for name in dict.fromkeys([*ours, *theirs]):
            a, b = (str(side[name]) if name in side else "–" for side in (ours, theirs))
            if a != b:
                rows.setdefault((name, a, b), []).append(preset)
    return [(name, ", ".join(presets), a, b) for (name, a, b), presets in rows.items()]


def _there(preset: Any) -> str:
    return "–" if preset is None else "there"


def changed_arrays(left: Facts, right: Facts) -> list[tuple[str, str, str]]:
    """(name, left, right) of the parameters whose number, shape, dtype or sharding differs. Nothing where those of one
    are not known."""
    if not (left.arrays and right.arrays):
        return []
    names = dict.fromkeys([*left.arrays, *right.arrays])
    rows = ((name, _described(left.arrays.get(name)), _described(right.arrays.get(name))) for name in names)
    return [row for row in rows if row[1] != row[2]]


def _described(arrays: Counter[str] | None) -> str:
    if not arrays:
        return "–"
    return "\n".join(array if times == 1 else f"{times} × {array}" for array, times in arrays.items())


def kernels_beside(left: Facts, right: Facts) -> list[tuple[str, str, str]]:
    """(op on platform, left, right) of every op that one of them uses."""
    keys = dict.fromkeys([*left.kernels, *right.kernels])
    return [(f"{op} on {on}", left.kernels.get((op, on), "–"), right.kernels.get((op, on), "–")) for op, on in keys]


def counts_beside(left: Counts, right: Counts) -> list[tuple[str, str, str, str]]:
    """(preset, left, right, change) of parameters or FLOPs."""
    presets = dict.fromkeys([*left, *right])
    return [(name, _counted(left, name), _counted(right, name), change(left, right, name)) for name in presets]


def _counted(counts: Counts, preset: str) -> str:
    return f"{counts[preset]:,.0f}" if preset in counts else "–"


def change(left: Counts, right: Counts, preset: str) -> str:
    """In percent; "–" where one of them is not known."""
    if preset not in left or preset not in right:
        return "–"
    return "the same" if left[preset] == right[preset] else f"{100 * (right[preset] / left[preset] - 1):+.2f} %"
