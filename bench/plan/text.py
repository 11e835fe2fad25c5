# SPDX-License-Identifier: Apache-2.0
"""A plan in words, for a terminal."""

import re
from collections import Counter
from collections.abc import Iterator, Sequence

from bench.plan.memory import Memory
from bench.plan.plan import Plan
from grug_kernels.chips import GIB, MIB
from train.summary import clock

_LABEL = 36
_NOTES = 10


def text(plan: Plan) -> str:
    return "\n".join([*_head(plan), *_memory(plan), *_times(plan), *_program(plan), "", *verdict(plan)])


def verdict(plan: Plan) -> list[str]:
    """Whether it fits; where it does not, what to change, the first thing first."""
    if plan.memory is None or (plan.record.refusal and not plan.over_bytes):
        return [f"verdict: refused. {plan.record.refusal}"]
    total, limit = plan.memory.total_bytes / GIB, plan.limit_bytes / GIB
    if plan.fits:
        return [f"verdict: fits. {total:.2f} GiB of {limit:.2f} GiB on each device, {limit - total:.2f} GiB left"]
    over = plan.over_bytes / GIB
    lines = [
        f"verdict: does not fit. {total:.2f} GiB needed, {limit:.2f} GiB there on each device, {over:.2f} GiB too much"
    ]
    first, *others = plan.advice or [None]
    if first:
        enough = "" if first.saves_bytes >= plan.over_bytes else "; nothing alone is enough"
        lines.append(f"first: {first} (reckoned){enough}")
    return lines + [f"or:    {way}" for way in others]


def _head(plan: Plan) -> Iterator[str]:
    topology, model, trainer = plan.topology, plan.config.model, plan.config.trainer
    shown = {name: size for name, size in plan.axes.items() if name in ("data", "model") or size > 1}
    axes = " × ".join(f"{name} {size}" for name, size in shown.items())
    yield f"{plan.variant} on {topology.name}: {topology.num_chips} chips, {len(topology.devices)} devices, {axes}"
    yield (
        f"batch {trainer.batch_size} × {trainer.seq_len} tokens, rows on each device: {plan.rows};"
        f" {model.num_layers} layers, hidden_dim {model.hidden_dim}, remat {model.remat}"
    )


def _memory(plan: Plan) -> Iterator[str]:
    if plan.memory is None:
        return
    memory = plan.memory
    yield f"\n{'HBM of one device':<{_LABEL + 11}}MiB  as the compiler lays it out"
    for label, size in _parts(memory):
        yield f"  {label:<{_LABEL}}{size / MIB:>12,.1f}"
    share = f"{100 * memory.total_bytes / plan.limit_bytes:.1f} % of {plan.limit_bytes / GIB:.2f} GiB"
    yield f"  {'set aside: decides whether it fits':<{_LABEL}}{memory.total_bytes / MIB:>12,.1f}  {share}"
    yield f"  {'in use at most':<{_LABEL}}{memory.in_use_bytes / MIB:>12,.1f}"
    on_host = memory.on_host | ({"temporaries": memory.host_bytes} if memory.host_bytes else {})
    if on_host:
        yield f"{"in the host's memory":<{_LABEL + 11}}MiB"
    for label, size in on_host.items():
        yield f"  {label:<{_LABEL}}{size / MIB:>12,.1f}"
    if memory.largest:
        yield f"{'largest temporaries':<{_LABEL + 11}}MiB"
    for one in memory.largest:
        yield f"  {one.shape:<{_LABEL}}{one.size / MIB:>12,.1f}  {one.kind}: {one.where}"


def _parts(memory: Memory) -> Iterator[tuple[str, int]]:
    yield from memory.arguments.items()
    if memory.results_bytes:
        yield "results", memory.results_bytes
    yield "temporaries", sum(memory.temporaries.values())
    for kind, size in memory.temporaries.items():
        yield f"  {kind}", size
    if memory.code_bytes:
        yield "code", memory.code_bytes
        yield "small temporaries, not laid out", memory.rest_bytes
    else:
        yield "code and what is not laid out", memory.rest_bytes


def _times(plan: Plan) -> Iterator[str]:
    yield ""
    stages = ", ".join(f"{stage} {clock(seconds)}" for stage, seconds in plan.record.seconds.items())
    cpu = plan.record.compile_cpu_seconds
    yield stages + (f" ({clock(cpu)} of CPU)" if cpu else "")
    if plan.prediction is None:
        return
    parts = ", ".join(f"{name} {ms:.1f} ms" for name, ms in plan.milliseconds.items())
    yield f"predicted step {plan.prediction.seconds * 1e3:.1f} ms: {parts}"
    mfu = plan.mfu
    yield (
        f"predicted {plan.prediction.tokens_per_second_per_chip:,.0f} tokens/s per chip; MFU {mfu['mfu']:.1f} %"
        f" (causal {mfu['mfu_causal']:.1f} %, recomputed work counted {mfu['hfu']:.1f} %)"
    )
    yield from (f"doubtful: {doubt}" for doubt in plan.prediction.schedule.doubts)


def _program(plan: Plan) -> Iterator[str]:
    for op in dict.fromkeys(choice.op for choice in plan.record.choices):
        choices = [choice for choice in plan.record.choices if choice.op == op]
        used = ", ".join(dict.fromkeys(choice.used for choice in choices))
        refusals = dict.fromkeys(refusal for choice in choices for refusal in choice.refusals)
        yield f"kernel {op}: {used}" + "".join(f"; {name} refused: {reason}" for name, reason in refusals)
    if plan.record.collectives:
        for name, kind in plan.record.collectives.kinds.items():
            yield f"{name}: {kind.count:g} times, {kind.payload_bytes / MIB:,.1f} MiB"
    if plan.prediction:
        yield from _notes(plan.prediction.schedule.notes)


def _notes(notes: Sequence[str]) -> Iterator[str]:
    """Those that differ in the numbers of kernels and values only are said once."""
    plain = (re.sub(r"^([\w-]+)\.[\w.]+:", r"\1:", note) for note in notes)
    told = Counter(re.sub(r" \(%[\w.-]+\)| Pass smem=.*", "", note) for note in plain)
    for note, times in list(told.items())[:_NOTES]:
        yield f"note: {note}" + (f" ({times} times)" if times > 1 else "")
    if len(told) > _NOTES:
        yield f"note: {len(told) - _NOTES} more of the prediction's notes are in --json"
