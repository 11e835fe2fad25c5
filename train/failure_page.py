# SPDX-License-Identifier: Apache-2.0
"""A failure's bundle as a page: light and dark, no script, no font, no network."""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from html import escape
from typing import Any

from train.history import History
from train.page import folded, page, tiles
from train.report import loss_plot

Facts = Mapping[str, Any]

STYLE = """
.bad { color: var(--bad); font-weight: 600; } .lead { font-size: 17px; margin: 0; } .lead + .lead { margin-top: 8px; }
.note { color: var(--soft); margin: 0 0 10px; } .number { text-align: right; } td.number { white-space: nowrap; }
th, td { padding-right: 13px; } th:last-child, td:last-child { padding-right: 0; }
main > .card + .card { margin-top: 14px; } .name { white-space: nowrap; }
.tile b { font-size: 20px; overflow-wrap: anywhere; }
details table { margin-top: 10px; } h3 { font-size: 13px; font-weight: 500; color: var(--soft); margin: 14px 0 6px; }
h3:first-child { margin-top: 0; }
"""
# Tables with more rows than this are folded.
FOLDED = 40
# Of the metrics of a step, what is looked at first.
FIRST = ("step", "train/loss", "train/grad_norm", "train/update_norm", "optim/learning_rate", "throughput/duration")
COMMANDS = {
    "reproduce": "Reproduce it: from the last good checkpoint, in a folder of its own, every step looked at",
    "resume": "Go on from the newest checkpoint",
    "skip": "Go on without this batch",
    "plan": "What a device's memory would hold, before it is launched again",
}


def failure_page(facts: Facts, history: History) -> str:
    """facts: what failure.json holds."""
    return page(f"{facts['run']['run_id']}: {facts['kind']}", _sections(facts, history), STYLE)


def _sections(facts: Facts, history: History) -> Iterator[str]:
    yield f"<h1>{escape(facts['run']['run_id'])}</h1>"
    yield f'<p class="status failed">{escape(facts["title"])}, {escape(facts["time"])}</p>'
    yield _tiles(facts)
    yield "<h2>What happened</h2>" + _card(_lead(facts))
    for name, reason in facts.get("not_known", {}).items():
        yield _card(f'<p class="note">{escape(name)} could not be found out: {escape(reason)}</p>')
    commands = (
        f"<h3>{COMMANDS[name]}</h3><pre>{escape(facts['commands'][name])}</pre>"
        for name in COMMANDS
        if name in facts["commands"]
    )
    yield "<h2>Commands</h2>" + _card("".join(commands))
    if facts.get("held"):
        yield from _memory(facts)
    if facts.get("norms"):
        yield from _norms(facts["norms"])
    if facts.get("batch"):
        yield from _batch(facts["batch"])
    yield from _metrics(facts, history)
    yield from _machine(facts)
    if facts["traceback"]:
        yield "<h2>Traceback</h2>" + folded(f"<pre>{escape(facts['traceback'])}</pre>")
    config = escape(json.dumps(facts["config"], indent=2))
    yield "<h2>Configuration</h2>" + folded(f"<pre>{config}</pre>")


def _tiles(facts: Facts) -> str:
    steps = f"{facts['step']:,}" if facts["step"] else "before the first"
    if facts["step"] and facts["last_suspect"] != facts["step"]:
        steps += f" to {facts['last_suspect']:,}"
    good = f"step {facts['checkpoint_step']:,}" if facts["checkpoint"] else "none"
    rows = [
        ("kind", facts["kind"], f"exit code {facts['exit_code']}"),
        ("step", steps, f"of {facts['total_steps']:,}, {facts['while']}"),
        ("last good checkpoint", good, facts["checkpoint"] or "none was saved before it"),
    ]
    return tiles(rows)


def _lead(facts: Facts) -> str:
    text = f"<pre>{escape(facts['message'])}</pre>"
    norms = facts.get("norms") or {}
    if first := norms.get("first_not_finite"):
        text = (
            f'<p class="lead">First array that is not finite: <code class="bad">{escape(first["array"])}</code></p>'
            f'<p class="note">{escape(first["meaning"])}</p>' + text
        )
    elif "fails_again" in norms:
        again = "fails again, and every array is finite: a norm overflowed" if norms["fails_again"] else (
            "is good: the failure did not come from its data or its state"
        )  # fmt: skip
        text = f'<p class="lead">Made again, the step {again}.</p>' + text
    if stall := facts.get("stall"):
        text += f'<p class="note">{escape(stall["in_flight"])}. stacks.txt has every thread; the one that trains:</p>'
        text += f"<pre>{escape(''.join(stall['main_thread']))}</pre>"
    return text


def _memory(facts: Facts) -> Iterator[str]:
    held = facts["held"]
    rows = [(name, _mib(size)) for name, size in held["bytes"].items()]
    yield f"<h2>What holds a device's memory</h2>{_table(rows, ('', 'MiB'))}"
    steps = "".join(f"<li>{escape(way)}</li>" for way in facts["change_first"])
    yield "<h2>What to change first</h2>" + _card(f'<p class="note">{escape(held["when"])}</p><ol>{steps}</ol>')
    if held["arrays"]:
        rows = [(row["array"], str(row["how_many"]), _mib(row["bytes"])) for row in held["arrays"]]
        yield "<h2>Largest arrays, on all devices</h2>" + _table(rows, ("array", "how many", "MiB"))


def _norms(norms: Facts) -> Iterator[str]:
    """A row for each parameter: its norm, its gradient's, and those of what the optimizer keeps for it."""
    columns: dict[str, Mapping[str, Any]] = {}
    for when, trees in _in_time(norms):
        for tree, found in trees.items():
            for part, rows in _by_part(tree, found).items():
                columns[f"{part} {when}".strip() if norms.get("before") else part] = rows
    names = dict.fromkeys(name for rows in columns.values() for name in rows)
    body = [[name, *(_norm(rows.get(name)) for rows in columns.values())] for name in names]
    table = _table(body, ("", *columns), bad=lambda cell: cell.endswith(")"))
    brackets = "In brackets: how many elements are not finite."
    yield f'<h2>Norms, layer by layer</h2><p class="note">Of {escape(norms["of"])}. {brackets}</p>'
    yield table if len(body) <= FOLDED else folded(table, f"{len(body)} arrays")


def _in_time(norms: Facts) -> Iterator[tuple[str, Facts]]:
    yield "before", norms.get("before", {})
    yield "", {"gradients": norms["gradients"]} if norms.get("gradients") else {}
    yield "after", norms.get("after", {})


def _by_part(tree: str, norms: Facts) -> dict[str, dict[str, Any]]:
    """opt_state/inner_state/1/0/mu/blocks/0/w is the array blocks/0/w of the part mu; what it keeps for no parameter is
    left to failure.json. Other trees have one part."""
    if tree != "opt_state":
        return {tree: dict(norms)}
    parts: dict[str, dict[str, Any]] = {}
    for name, facts in norms.items():
        for part in ("mu", "nu"):
            if f"/{part}/" in name:
                parts.setdefault(part, {})[name.split(f"/{part}/", 1)[1]] = facts
    return parts


def _norm(facts: Facts | None) -> str:
    if facts is None:
        return ""
    text = facts["norm"] if isinstance(facts["norm"], str) else f"{facts['norm']:.3g}"
    return f"{text} ({facts['not_finite']:,})" if facts["not_finite"] else text


def _batch(batch: Facts) -> Iterator[str]:
    span = f"examples {batch['first_example']:,} to {batch['last_example']:,} of the training data, counted from 0"
    here = "" if batch["rows_here"] == batch["last_example"] - batch["first_example"] + 1 else (
        f"; this process has {batch['rows_here']} of them"
    )  # fmt: skip
    yield f'<h2>Batch {batch["number"]:,}</h2><p class="note">{span}{here}; all of it is in batch.npz.</p>'
    yield _table((name, str(value)) for name, value in batch["statistics"].items())
    for example in batch["examples"]:
        texts = "".join(f"<pre>{escape(text)}</pre>" for text in example["documents"])
        yield folded(texts, f"example {example['index']:,}: {len(example['documents'])} documents, or parts of them")


def _metrics(facts: Facts, history: History) -> Iterator[str]:
    if not facts["rows"]:
        return
    yield f'<h2>Metrics</h2><div class="card wide">{loss_plot(history, height=260)}</div>'
    names = [name for name in FIRST if any(name in row for row in facts["rows"])]
    rows = [[f"{row[name]:.6g}" if name in row else "" for name in names] for row in facts["rows"]]
    yield '<div style="height: 14px"></div>' + _table(rows, names)


def _machine(facts: Facts) -> Iterator[str]:
    if facts["kernels"]:
        header = ("op", "requested", "used", "refused, and why")
        yield "<h2>Kernels</h2>" + _table([[*kernel.values()] for kernel in facts["kernels"]], header)
    memory = facts.get("memory") or {"host": {}, "devices": {}}
    rows = [(f"host, {name}", _mib(size)) for name, size in memory["host"].items()]
    for device, stats in memory["devices"].items():
        rows += [(f"{device}, {name}", _mib(stats[name])) for name in stats if name.startswith(("bytes", "peak_bytes"))]
    rows += [
        (f"compiled step, {name[len('memory/') : -len('_bytes')]}", _mib(size))
        for name, size in facts["compiled"].items()
        if name.startswith("memory/")
    ]
    if not memory["devices"]:
        rows.append(("devices", "say nothing of their memory"))
    yield "<h2>Memory</h2>" + _table(rows, ("", "MiB"))
    devices = facts.get("devices") or {}
    known = [("devices", f"{devices.get('count')} × {devices.get('kind')}")] if devices else []
    yield "<h2>Versions</h2>" + _table([*known, *(facts.get("versions") or {}).items()])


def _table(rows: Iterable[Sequence[str]], header: Sequence[str] = (), *, bad: Any = lambda cell: False) -> str:
    """A card with a table. Numbers stand at the right; cells for which `bad` is true in the colour of errors."""

    def cell(text: str, is_first: bool) -> str:
        tag = "th" if is_first and text and not header else "td"
        classes = ["number"] * (not is_first and bool(header) and (text[:1].isdigit() or bad(text)))
        classes += ["name"] * (is_first and bool(header)) + ["bad"] * bad(text)
        return (
            f'<{tag} class="{" ".join(classes)}">{escape(text)}</{tag}>'
            if classes
            else f"<{tag}>{escape(text)}</{tag}>"
        )

    head = "".join(f"<th{' class=number' * (i > 0)}>{escape(name)}</th>" for i, name in enumerate(header))
    body = "".join(f"<tr>{''.join(cell(text, i == 0) for i, text in enumerate(row))}</tr>" for row in rows)
    return _card(f"<table>{f'<tr>{head}</tr>' if head else ''}{body}</table>")


def _card(html: str) -> str:
    return f'<div class="card">{html}</div>'


def _mib(size: float) -> str:
    return f"{size / 2**20:,.1f}"
