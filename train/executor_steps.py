# SPDX-License-Identifier: Apache-2.0
"""What a step is, and which folder is its own: the half of `train/executor.py` that runs nothing. No jax here.

    tokens = ExecutorStep("tokens", tokenize, TokenizeConfig(vocab_size=versioned(4096), out=this_output_path()))
    train = ExecutorStep("train", fit, FitConfig(data=output_path_of(tokens), steps=versioned(200), threads=2))

The folder is `<prefix>/<name>-<hash>`. The hash is of the name, of the versioned values, and of the folders of the
steps that are read: another `vocab_size` gives both steps another folder, another `threads` none.
"""

import copy
import dataclasses
import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from train.rundir import flat


@dataclass(frozen=True)
class Resources:
    """What a step takes of the machine.

    accelerator: it uses the TPU or GPU, or all cores where there is none: one such step runs at a time.
    env: environment variables of its process, such as {"JAX_PLATFORMS": "cpu"} or flags for XLA.
    device: what it is meant for, such as "v5p:2x2x1". It stands in the info file and in what --dry-run prints; the
    launcher (`train/launch.py`) is told by its own flags.
    """

    accelerator: bool = True
    env: Mapping[str, str] = field(default_factory=dict)
    device: str = "any"


@dataclass(frozen=True, eq=False)
class ExecutorStep[C]:
    """`fn(config)`, to be run once in a folder of its own.

    name: letters, digits and . _ - /, which begins a folder. fn: of the top of a module, as it runs in a process of its
    own. config: a dataclass, as a rule, in which other steps, `versioned` and `this_output_path()` may stand anywhere.
    """

    name: str
    fn: Callable[[C], object]
    config: C
    resources: Resources = field(default_factory=Resources)

    def __post_init__(self):
        if not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)*", self.name, re.ASCII):
            raise ValueError(
                f"ExecutorStep: the name {self.name!r} cannot be that of a folder. It has letters, digits and . _ - and"
                " begins with a letter or digit; / begins a folder in a folder."
            )


@dataclass(frozen=True)
class _Versioned:
    value: Any
    but: tuple[str, ...]


@dataclass(frozen=True)
class _OutputPath:
    below: str | None


@dataclass(frozen=True)
class _OutputName:
    pass


@dataclass(frozen=True)
class _PathOf:
    step: ExecutorStep
    below: str | None


def versioned[T](value: T, *, but: Sequence[str] = ()) -> T:
    """Marks a value of a config: with another one the step is another step, with another folder. The function gets
    the plain value. It is made of what JSON knows, of paths and of dataclasses. but: fields of it that do not count.

    A dataclass that checks its fields takes no mark in them: mark all of it, or make it by `marked`.
    """
    return cast(Any, _Versioned(value, tuple(but)))  # what stands in the config until the step runs


def marked[C](config: C, **marks: Any) -> C:
    """A copy of a dataclass with marks in some of its fields, also where it checks their types or values: those that
    the function gets are checked.

    Raises:
      ValueError: it has no such field.
    """
    fields = {one.name for one in dataclasses.fields(cast(Any, config))}
    if unknown := set(marks) - fields:
        raise ValueError(f"marked: {sorted(unknown)} is no field of {type(config).__name__}: {sorted(fields)}.")
    copied = copy.copy(config)
    for name, mark in marks.items():
        object.__setattr__(copied, name, mark)
    return copied


def this_output_path(below: str | None = None) -> str:
    """The step's own folder, or a path `below` it, in the config that its function gets."""
    return cast(Any, _OutputPath(below))


def this_output_name() -> str:
    """The last part of `this_output_path()`: name and hash."""
    return cast(Any, _OutputName())


def output_path_of(step: ExecutorStep, below: str | None = None) -> str:
    """The folder of another step, or a path `below` it. That step runs first. A step by itself means the same."""
    return cast(Any, _PathOf(step, below))


@dataclass(frozen=True)
class Planned:
    """A step with its folder. versions: the versioned values by their places in the config. reads: folders of other
    steps, likewise. config: as the function gets it."""

    step: ExecutorStep
    path: Path
    versions: Mapping[str, Any]
    reads: Mapping[str, Path]
    config: Any

    @property
    def described(self) -> Any:
        """The config in JSON's types; what JSON does not know as it prints itself."""
        return json.loads(json.dumps(self.config, default=_jsonable, skipkeys=True))


def plan(steps: Sequence[ExecutorStep], prefix: Path) -> list[Planned]:
    """`steps` and all they read, each after what it reads. Two steps that are alike are one.

    Raises:
      ValueError: a step reads itself, two have one folder and do not mean the same, or a versioned value is of no kind
        that can be written down.
    """
    done: dict[ExecutorStep, Planned] = {}
    by_path: dict[Path, Planned] = {}
    within: list[ExecutorStep] = []

    def visit(step: ExecutorStep) -> Planned:
        if step in done:
            return done[step]
        if step in within:
            names = " -> ".join(one.name for one in [*within[within.index(step) :], step])
            raise ValueError(f"executor: {names}: a step cannot read what is made of its own output.")
        within.append(step)
        found = _planned(step, prefix, visit)
        within.pop()
        done[step] = by_path.setdefault(found.path, found)
        _check_alike(done[step], found)
        return done[step]

    for step in steps:
        visit(step)
    return list(by_path.values())


def _planned(step: ExecutorStep, prefix: Path, visit: Callable[[ExecutorStep], Planned]) -> Planned:
    versions: dict[str, Any] = {}
    reads: dict[str, Path] = {}
    files: dict[str, str] = {}  # what is read of the folders in `reads`

    def upstream(marker: _PathOf | ExecutorStep, at: str) -> Path:
        marker = _PathOf(marker, None) if isinstance(marker, ExecutorStep) else marker
        reads[at] = visit(marker.step).path
        files[at] = str((reads[at] / (marker.below or "")).relative_to(prefix))
        return prefix / files[at]

    def note(marker: Any, at: str) -> Any:
        if isinstance(marker, _Versioned):
            _rebuilt(marker.value, at, note)
            versions[at] = _plain(marker, at, step.name)
        elif isinstance(marker, _PathOf | ExecutorStep):
            upstream(marker, at)
        return marker

    _rebuilt(step.config, "config", note)
    version = json.dumps([step.name, versions, files], sort_keys=True)
    path = prefix / f"{step.name}-{hashlib.sha256(version.encode()).hexdigest()[:8]}"

    def resolve(marker: Any, at: str) -> Any:
        match marker:
            case _Versioned():
                return _rebuilt(marker.value, at, resolve)
            case _OutputPath():
                return str(path / (marker.below or ""))
            case _OutputName():
                return path.name
            case _:
                return str(upstream(marker, at))

    return Planned(step, path, versions, dict(reads), _rebuilt(step.config, "config", resolve))


def _rebuilt(value: Any, at: str, replaced: Callable[[Any, str], Any]) -> Any:
    """`value` with each mark in it replaced; the same object where nothing was. `at` says where in the config."""
    if isinstance(value, _Versioned | _OutputPath | _OutputName | _PathOf | ExecutorStep):
        return replaced(value, at)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        old = {one.name: getattr(value, one.name) for one in dataclasses.fields(value)}
        new = {name: _rebuilt(part, f"{at}.{name}", replaced) for name, part in old.items()}
        changed = {name: part for name, part in new.items() if part is not old[name]}
        return dataclasses.replace(value, **changed) if changed else value
    if isinstance(value, dict):
        new = {key: _rebuilt(part, f"{at}.{key}", replaced) for key, part in value.items()}
        return new if any(new[key] is not value[key] for key in new) else value
    if isinstance(value, list | tuple):
        parts = [_rebuilt(part, f"{at}.{i}", replaced) for i, part in enumerate(value)]
        if all(new is old for new, old in zip(parts, value, strict=True)):
            return value
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    return value


def _plain(value: Any, at: str, name: str) -> Any:
    """A versioned value as JSON.

    Raises:
      ValueError: it cannot be written, or not so that the next process writes the same.
    """
    if isinstance(value, _Versioned):
        plain = _plain(value.value, at, name)
        unknown = [one for one in value.but if not isinstance(plain, dict) or one not in plain]
        if unknown:
            raise ValueError(f"step {name}: {at} is versioned but for {unknown}, which are none of its fields.")
        return {key: part for key, part in plain.items() if key not in value.but} if value.but else plain
    if isinstance(value, _OutputPath | _OutputName):
        raise ValueError(
            f"step {name}: {at} is versioned, and is the step's own folder, whose name the versions make. Leave"
            " versioned(...) out there."
        )
    if isinstance(value, _PathOf | ExecutorStep):
        return None  # it is among what is read
    if value is None or isinstance(value, bool | int | float | str | Path):
        return str(value) if isinstance(value, Path) else value
    if isinstance(value, list | tuple):
        return [_plain(part, f"{at}.{i}", name) for i, part in enumerate(value)]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = {one.name: getattr(value, one.name) for one in dataclasses.fields(value)}
    if isinstance(value, dict) and all(isinstance(key, str) for key in value):
        return {key: _plain(part, f"{at}.{key}", name) for key, part in value.items()}
    raise ValueError(
        f"step {name}: {at} = {value!r} is versioned, and cannot be written down: it is a {type(value).__name__}. What"
        " can: None, numbers, texts, paths, lists, dicts with texts for keys, and dataclasses of these."
    )


def _check_alike(first: Planned, second: Planned) -> None:
    """Raises ValueError where two steps with one folder would not do the same in it."""
    if first.step.fn is not second.step.fn:
        apart = f"their functions are {first.step.fn} and {second.step.fn}"
    else:
        old, new = (flat({"config": found.described}) for found in (first, second))
        apart = ", ".join(
            f"{at} is {old.get(at)!r} and {new.get(at)!r}"
            for at in sorted(old.keys() | new.keys())
            if old.get(at) != new.get(at)
        )
    if apart:
        raise ValueError(
            f"executor: two steps have the folder {first.path}: {apart}. Mark what tells them apart with"
            " versioned(...), or give one of them another name."
        )


def _jsonable(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {one.name: getattr(value, one.name) for one in dataclasses.fields(value)}
    return str(value)
