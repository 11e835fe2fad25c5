# SPDX-License-Identifier: Apache-2.0
"""Which implementation of an op runs, and a record of why.

A caller who names an implementation gets that one or an error. With none named, `ORDER` is tried from left to right:
an implementation that cannot take the arguments raises `UnsupportedError`, the refusal is warned about once and
recorded, and the next one is tried.
"""

import contextlib
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import jax

# Preferred first. "reference" is never a fallback: it is a definition, and may be slow and large.
ORDER: dict[str, dict[str, tuple[str, ...]]] = {
    "attention": {"cpu": ("xla",), "gpu": ("xla",), "tpu": ("pallas_tpu", "xla")},
    "cross_entropy": {"cpu": ("xla",), "gpu": ("xla",), "tpu": ("pallas_tpu", "xla")},
}


class UnsupportedError(NotImplementedError):
    """This implementation cannot take these arguments; another may."""


@dataclass(frozen=True)
class Choice:
    """One op, traced once: what was asked for, what ran, and who refused with what reason."""

    op: str
    platform: str
    requested: str | None
    used: str
    refusals: tuple[tuple[str, str], ...] = ()

    @property
    def is_fallback(self) -> bool:
        return bool(self.refusals)


_records: ContextVar[list[Choice] | None] = ContextVar("grug_kernels_choices", default=None)
_platform: ContextVar[str | None] = ContextVar("grug_kernels_platform", default=None)


@contextlib.contextmanager
def recording() -> Iterator[list[Choice]]:
    """Collects every `Choice` made while tracing inside the `with` block."""
    choices: list[Choice] = []
    token = _records.set(choices)
    try:
        yield choices
    finally:
        _records.reset(token)


@contextlib.contextmanager
def targeting(platform: str) -> Iterator[None]:
    """Chooses for `platform` ("cpu", "gpu", "tpu") and not for the machine that traces: for compiling ahead of time."""
    token = _platform.set(platform)
    try:
        yield
    finally:
        _platform.reset(token)


def platform() -> str:
    """The platform that implementations are chosen for."""
    return _platform.get() or jax.default_backend()


def call(op: str, requested: str | None, implementations: Mapping[str, Callable[..., Any]], *args: Any, **kwargs: Any):
    """Calls the implementation of `op` that `requested` names, or the first of `ORDER` that accepts the arguments.

    Raises:
      ValueError: `requested` is not an implementation of `op`.
      UnsupportedError: the named implementation, or every one in the order, refused; the message holds each reason.
    """
    target = platform()
    if requested is not None and requested not in implementations:
        there_are = ", ".join(implementations)
        raise ValueError(
            f"{op}: unknown implementation {requested!r}. Those there are: {there_are}; or None to choose."
        )
    refusals: list[tuple[str, str]] = []
    for name in (requested,) if requested else ORDER[op][target]:
        try:
            result = implementations[name](*args, **kwargs)
        except UnsupportedError as error:
            if requested:
                raise
            refusals.append((name, str(error)))
            warnings.warn(f"{op}: {name} refused, trying the next implementation: {error}", stacklevel=3)
            continue
        _note(Choice(op, target, requested, name, tuple(refusals)))
        return result
    reasons = "; ".join(f"{name}: {reason}" for name, reason in refusals)
    raise UnsupportedError(f"{op}: no implementation for {target} takes these arguments. {reasons}")


def record(op: str, used: str) -> None:
    """Adds a `Choice` to what is being recorded: of a way to do it that goes by the shapes, and nobody can ask for."""
    _note(Choice(op, platform(), None, used))


def _note(choice: Choice) -> None:
    if (records := _records.get()) is not None:
        records.append(choice)
