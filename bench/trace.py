# SPDX-License-Identifier: Apache-2.0
"""Where the time of a profiled run went, as text: operations and named scopes of a trace.

python -m bench.trace runs/NAME [--top 20]

A TPU's or GPU's operations are xprof's own (hlo_stats). For a CPU xprof has none: its operations are read off the
host's threads, each named by the program that the trace holds. See docs/recipes/profile-a-run.md.
"""

import argparse
import importlib.util
import json
import os
import re
import sys
import tempfile
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from bench.tpu import hlo

# What `jax.named_scope` calls the parts of our programs; of nested ones the innermost counts.
# These are one phase each,
PHASES = (
    "attention_mask",
    "attention_forward",
    "attention_backward",
    "cross_entropy_forward",
    "cross_entropy_with_gradients",
    "cross_entropy_scale_gradients",
    "cross_entropy_token_losses",
    "cross_entropy_token_losses_gradients",
    "optimizer",
)
# and these run forward and backward, and perhaps forward again for the backward pass.
LAYERS = ("embedding", "norm", "attention_layer", "mlp", "router", "stacked_layers")
UNNAMED = "(no scope)"


@dataclass(frozen=True)
class Operation:
    """One instruction of one program, all its executions. milliseconds: its own, without those of what it runs."""

    program: str
    name: str
    op_name: str  # scopes and primitive that it was compiled from, "" where the compiler kept none
    milliseconds: float
    calls: int

    @property
    def scope(self) -> str:
        return scope_of(self.op_name)

    def __str__(self) -> str:
        *path, primitive = self.op_name.split("/")
        if path and "->" in path[-1]:  # an einsum
            primitive = f"{path[-1]} {primitive}"
        return f"{self.name} ({primitive})" if primitive else self.name


@dataclass(frozen=True)
class Trace:
    """steps: those that were marked. operations: the longest first. is_host: they are a CPU's, and their time is
    summed over its threads."""

    session: Path
    steps: tuple[int, ...]
    operations: tuple[Operation, ...]
    is_host: bool


def scope_of(op_name: str) -> str:
    """Of "jit(train_step)/transpose(jvp(mlp))/dot_general" it is "mlp backward": the innermost scope and its phase."""
    parts = op_name.split("/")
    names = [part.rpartition("(")[2].rstrip(")") for part in parts]
    found = next((name for name in reversed(names) if name in PHASES or name in LAYERS), None)
    if found is None:
        return UNNAMED
    if "rematted_computation" in names:
        return f"{found} recomputed"
    if found in PHASES:
        return found
    return f"{found} {'backward' if any(part.startswith('transpose(') for part in parts) else 'forward'}"


def find_session(path: Path) -> tuple[Path, int]:
    """The newest session in `path`, the folder of a run, of its profiler or of a session; and how many there are.

    Raises:
      FileNotFoundError: there is no such folder, or no trace in it.
    """
    if not path.is_dir():
        raise FileNotFoundError(f"{path} is no folder. Expected the folder of a run, or of a session of its profiler.")
    places = (".", "plugins/profile/*", "profiler/plugins/profile/*")
    files = [file for place in places for file in path.glob(f"{place}/*.xplane.pb")]
    if not files:
        raise FileNotFoundError(
            f"no *.xplane.pb in {path}, nor in its {places[2]}. Make a trace with"
            " `python -m train.run --profile.start N --profile.steps K`."
        )
    return max(files, key=lambda file: file.stat().st_mtime).parent, len({file.parent for file in files})


def read_trace(session: Path) -> Trace:
    """The trace in the folder `session`, of all its hosts.

    Raises:
      ModuleNotFoundError: xprof is not installed.
      ValueError: a file is no trace, or no operation is in any.
    """
    if importlib.util.find_spec("xprof") is None:
        raise ModuleNotFoundError("bench.trace needs xprof, which is not installed: uv sync --extra prof", name="xprof")
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # xprof's library tells of every tool that it looks up
    with tempfile.TemporaryDirectory() as scratch:
        # Links, since xprof writes what it makes of a trace beside it.
        files = [Path(scratch) / file.name for file in sorted(session.glob("*.xplane.pb"))]
        for file in files:
            file.symlink_to((session / file.name).resolve())
        try:
            hosts = [_host_events(file) for file in files]
        except RuntimeError as error:  # a run killed while it wrote
            raise ValueError(f"a trace in {session} cannot be read: {error}. Delete it, and profile again.") from error
        on_device = _device_operations(files)
        operations = on_device or [
            operation
            for file, (_, times) in zip(files, hosts, strict=True)
            for operation in _named_operations(file, times)
        ]
    if not operations:
        raise ValueError(
            f"{session} holds no operation of any program: nothing ran on the devices while the trace was made. Profile"
            " steps of a run that trains; xprof's trace viewer shows what the host did."
        )
    longest_first = tuple(sorted(operations, key=lambda operation: -operation.milliseconds))
    steps = sorted({step for marked, _ in hosts for step in marked})
    return Trace(session, tuple(steps), longest_first, is_host=not on_device)


def _device_operations(files: list[Path]) -> list[Operation]:
    """From xprof's hlo_stats: summed over devices, each one's own time, in microseconds there. None on a CPU."""
    from xprof.convert.raw_to_tool_data import xspace_to_tool_data

    table = json.loads(xspace_to_tool_data([str(file) for file in files], "hlo_stats", {})[0])
    columns = [column["id"] for column in table["cols"]]
    rows = [dict(zip(columns, (cell["v"] for cell in row["c"]), strict=True)) for row in table["rows"]]
    return [
        Operation(
            program=row["program_id"],
            name=row["hlo_op_name"],
            op_name=row["tf_op_name"],
            milliseconds=row["total_self_time"] / 1e3,
            calls=int(row["occurrences"]),
        )
        for row in rows
    ]


class _Key(NamedTuple):
    program_id: int
    program: str
    name: str


def _host_events(file: Path) -> tuple[set[int], dict[_Key, list[float]]]:
    """The steps that `train.profile` marked; and of the operations that ran on the host's threads, each call's
    milliseconds, without those of what it called on the same thread."""
    from jax.profiler import ProfileData

    steps: set[int] = set()
    times: dict[_Key, list[float]] = defaultdict(list)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of jaxlib's own types
        for plane in ProfileData.from_file(str(file)).planes:
            for thread in plane.lines:
                calls: list[tuple[float, float, _Key]] = []
                for event in thread.events:
                    stats: dict[str, Any] = dict(event.stats)
                    if "hlo_op" in stats:
                        key = _Key(stats["program_id"], stats["hlo_module"], stats["hlo_op"])
                        calls.append((event.start_ns, event.end_ns, key))
                    elif event.name == "train" and "step_num" in stats:
                        steps.add(stats["step_num"])
                for key, nanoseconds in _own_times(calls):
                    times[key].append(nanoseconds / 1e6)
    return steps, times


def _own_times(calls: Iterable[tuple[float, float, _Key]]) -> Iterator[tuple[_Key, float]]:
    """(key, length without what lies inside) of the intervals (start, end, key) of one thread."""
    open_calls: list[list[Any]] = []  # [end, key, own time], outermost first
    for start, end, key in sorted(calls, key=lambda call: (call[0], -call[1])):
        while open_calls and open_calls[-1][0] <= start:
            _, ended, own = open_calls.pop()
            yield ended, own
        if open_calls:
            open_calls[-1][2] -= end - start
        open_calls.append([end, key, end - start])
    yield from ((key, own) for _, key, own in open_calls)


def _named_operations(file: Path, times: Mapping[_Key, list[float]]) -> list[Operation]:
    """The host's operations, with what the trace's copy of each program says they were compiled from."""
    from xprof.convert.raw_to_tool_data import xspace_to_tool_data, xspace_to_tool_names

    xspace_to_tool_names([str(file)])  # puts the programs where graph_viewer looks for them
    op_names: dict[int, dict[str, str]] = {}
    for program_id in {key.program_id for key in times}:
        wanted = {"type": "long_txt", "program_id": str(program_id), "show_metadata": 1}
        try:
            text, _ = xspace_to_tool_data([str(file)], "graph_viewer", {"graph_viewer_options": wanted})
        except ValueError as error:
            print(
                f"warning: no scopes for program {program_id}, which the trace does not hold: {error}", file=sys.stderr
            )
            continue
        op_names[program_id] = _op_names(text.decode())
    return [
        Operation(key.program, key.name, op_names.get(key.program_id, {}).get(key.name, ""), sum(each), len(each))
        for key, each in times.items()
    ]


def _op_names(text: str) -> dict[str, str]:
    """Instruction -> op_name. A fusion without one has that which most of its parts have."""
    computations = hlo.parse(text).computations

    def op_name(instruction: hlo.Instruction) -> str:
        found = re.search(r'op_name="([^"]*)"', instruction.rest)
        return found[1] if found else ""

    def of_parts(instruction: hlo.Instruction) -> str:
        called = re.search(r"calls=%?([\w.\-]+)", instruction.rest)
        parts = Counter(filter(None, map(op_name, computations[called[1]]))) if called else Counter()
        return parts.most_common(1)[0][0] if parts else ""

    return {each.name: op_name(each) or of_parts(each) for listed in computations.values() for each in listed}


def text_of(trace: Trace, top: int) -> str:
    """The `top` longest operations as a table, and all of them summed by scope as another."""
    whole = sum(operation.milliseconds for operation in trace.operations)
    several = len({operation.program for operation in trace.operations}) > 1
    lines = [f"{trace.session}: steps {', '.join(map(str, trace.steps)) or 'unmarked'}"]
    if trace.is_host:
        lines.append(
            "A CPU's trace: xprof's tables (hlo_stats, op_profile) are empty, these are the operations on the host's"
            " threads.\nTime is summed over the threads, and that in which one waits within an operation counts."
        )
    else:
        lines.append("From xprof's hlo_stats; time is summed over the devices.")

    def row(operations: list[Operation], scope: str, what: str) -> str:
        milliseconds = sum(operation.milliseconds for operation in operations)
        calls = sum(operation.calls for operation in operations)
        return f"{milliseconds:10.2f} {100 * milliseconds / whole:6.1f} {calls:8d}  {scope:<29} {what}".rstrip()

    header = f"{'ms':>10} {'%':>6} {'calls':>8}  {'scope':<29} "
    lines += ["", f"{header}operation"]
    for operation in trace.operations[:top]:
        lines.append(row([operation], operation.scope, f"{operation.program}: " * several + str(operation)))
    if len(trace.operations) > top:
        rest = list(trace.operations[top:])
        lines.append(row(rest, f"({len(rest)} more)", ""))

    by_scope: dict[str, list[Operation]] = defaultdict(list)
    for operation in trace.operations:
        by_scope[operation.scope].append(operation)
    lines += ["", f"{header}operations"]
    for scope, operations in sorted(by_scope.items(), key=lambda item: -sum(each.milliseconds for each in item[1])):
        lines.append(row(operations, scope, str(len(operations))))
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.trace", description="Where a profiled run's time went.")
    parser.add_argument("folder", type=Path, help="of a run, or of a session of its profiler")
    parser.add_argument("--top", type=int, default=20, help="operations to list (20)")
    options = parser.parse_args(argv)
    try:
        session, sessions = find_session(options.folder)
        if sessions > 1:
            print(f"{sessions} sessions there; the newest:", file=sys.stderr)
        print(text_of(read_trace(session), options.top))
    except (FileNotFoundError, ModuleNotFoundError, ValueError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
