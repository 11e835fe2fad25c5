# SPDX-License-Identifier: Apache-2.0
"""A sweep as a picture, memory against speed, and as a page around it."""

from collections.abc import Sequence
from html import escape

from bench.plan.candidates import Outcome
from bench.plan.frontier import HEADER, best, frontier, rows
from grug_kernels.chips import GIB
from train.page import PAGE_STYLE
from train.plot import PLOT_STYLE, Scale, tick_label

WIDTH, HEIGHT = 1010, 520
LEFT, RIGHT, TOP, BOTTOM = 74, 30, 96, 52
CHARACTER = 7.0  # width of an average character at 12 units
FAR = 1.5  # a limit that is that many times what the largest point needs is told, not drawn
STYLE = ".number { text-align: right; } td { white-space: nowrap; } .best td { font-weight: 600; }"


def picture(title: str, outcomes: Sequence[Outcome], limits: dict[str, float]) -> str:
    """An SVG; hollow points do not fit. limits: bytes of a device by what they are, "v5p" or "budget".

    Raises ValueError where no candidate has a prediction.
    """
    points = [outcome for outcome in outcomes if outcome.tokens_per_second_per_chip is not None]
    if not points:
        raise ValueError("no candidate was compiled: there is nothing to draw.")
    most = max(_gib(outcome) for outcome in points)
    near = {name: size / GIB for name, size in limits.items() if size / GIB <= FAR * most}
    x = Scale.over([0.0, most, *near.values()], LEFT, WIDTH - RIGHT, margin=0.06)
    x = Scale(0.0, x.high, x.start, x.end)
    y = Scale.over([_rate(outcome) for outcome in points], HEIGHT - BOTTOM, TOP, margin=0.12)
    far = ", ".join(f"{name}: {size / GIB:.4g} GiB, to the right" for name, size in limits.items() if name not in near)
    note = "predicted, not measured · beside a point its batch · joined: none has more speed and less memory" + (
        f" · {far}" if far else ""
    )
    policies = list(dict.fromkeys(outcome.candidate.remat for outcome in outcomes))
    models = sorted({outcome.candidate.model for outcome in outcomes})
    return (
        f'<svg class="plot" xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img">'
        f'<title>{escape(title)}</title><text class="title" x="0" y="20">{escape(title)}</text>'
        f'<text x="0" y="42">{escape(note)}</text>{_legend(policies, models)}{_axes(x, y)}'
        f"{_limits(near, x, y)}{_joined(frontier(outcomes), x, y)}"
        f"{_points(points, policies, models, min(limits.values()), x, y)}</svg>"
    )


def page(title: str, outcomes: Sequence[Outcome], limits: dict[str, float], svg: str, words: Sequence[str]) -> str:
    """words: what is said of it, a paragraph each, the command to run last."""
    limit = min(limits.values())
    chosen = best(outcomes, limit)
    head = "".join(f'<th class="{_kind(i)}">{escape(name)}</th>' for i, name in enumerate(HEADER))
    body = "".join(
        f"<tr{' class="best"' if outcome is chosen else ''}>"
        + "".join(f'<td class="{_kind(i)}">{escape(cell)}</td>' for i, cell in enumerate(row))
        + "</tr>"
        for outcome, row in zip(outcomes, rows(outcomes, limit), strict=True)
    )
    *said, command = words
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{escape(title)}</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<style>{PAGE_STYLE}{PLOT_STYLE}{STYLE}</style><main><h1>{escape(title)}</h1>"
        + "".join(f'<p class="status">{escape(line)}</p>' for line in said)
        + f'<div class="card wide">{svg}</div><h2>To run it</h2><div class="card"><pre>{escape(command)}</pre></div>'
        f'<h2>Every candidate</h2><div class="card"><table><tr>{head}</tr>{body}</table></div></main></html>\n'
    )


def _kind(column: int) -> str:
    return "word" if column in (0, len(HEADER) - 1) else "number"


def _gib(outcome: Outcome) -> float:
    return (outcome.total_bytes or 0) / GIB


def _rate(outcome: Outcome) -> float:
    return outcome.tokens_per_second_per_chip or 0.0


def _legend(policies: Sequence[str], models: Sequence[int]) -> str:
    marks, left = [], 0.0
    entries = [(name, i, models[0]) for i, name in enumerate(policies)]
    if len(models) > 1:
        entries += [(f"model axis {model}", -1, model) for model in models]
    for name, color, model in entries:
        marks.append(_mark(left + 7, 64, color, models.index(model), True))
        marks.append(f'<text x="{left + 18:.1f}" y="68">{escape(name)}</text>')
        left += 38 + CHARACTER * len(name)
    return "".join(marks)


def _axes(x: Scale, y: Scale) -> str:
    marks = []
    for tick in y.ticks(5):
        marks.append(f'<line class="grid" x1="{x.start}" x2="{x.end}" y1="{y(tick)}" y2="{y(tick)}"/>')
        marks.append(f'<text class="end" x="{x.start - 8}" y="{y(tick) + 4}">{tick_label(tick)}</text>')
    for tick in x.ticks(8):
        marks.append(f'<text class="middle" x="{x(tick)}" y="{y.start + 18}">{tick_label(tick)}</text>')
    marks.append(f'<line class="axis" x1="{x.start}" x2="{x.end}" y1="{y.start}" y2="{y.start}"/>')
    middle = (x.start + x.end) / 2
    marks.append(f'<text class="middle" x="{middle}" y="{y.start + 38}">HBM set aside on each device, GiB</text>')
    marks.append(f'<text x="0" y="{y.end - 8}">tokens/s per chip</text>')
    return "".join(marks)


def _limits(limits: dict[str, float], x: Scale, y: Scale) -> str:
    return "".join(
        f'<path class="level" d="M{x(size)} {y.end}V{y.start}"/>'
        f'<text class="end halo" x="{x(size) - 6}" y="{y.start - 8 - 16 * i}">{escape(name)} {size:.4g} GiB</text>'
        for i, (name, size) in enumerate(limits.items())
    )


def _joined(outcomes: Sequence[Outcome], x: Scale, y: Scale) -> str:
    path = "L".join(f"{x(_gib(outcome))} {y(_rate(outcome))}" for outcome in outcomes)
    return f'<path d="M{path}" stroke="var(--soft)" opacity=".6"/>'


def _points(
    points: Sequence[Outcome], policies: Sequence[str], models: Sequence[int], limit: float, x: Scale, y: Scale
) -> str:
    """Marks, and beside each its batch where there is room; those of the frontier find theirs first."""
    kept = frontier(points)
    marks, labels = [], []
    taken = [(x(_gib(one)) - 7, y(_rate(one)) - 7, x(_gib(one)) + 7, y(_rate(one)) + 7) for one in points]
    for outcome in sorted(points, key=lambda one: one not in kept):
        remat, model, batch = outcome.candidate
        at = x(_gib(outcome)), y(_rate(outcome))
        what = f"{remat}, model axis {model}, batch {batch}"
        tip = f"{what}: {_gib(outcome):.2f} GiB, {_rate(outcome):,.0f} tokens/s per chip"
        mark = _mark(*at, policies.index(remat), models.index(model), outcome.fits(limit))
        marks.append(f"<g><title>{escape(tip)}</title>{mark}</g>")
        labels.append(_label(str(batch), *at, taken))
    return "".join(marks + labels)


def _label(text: str, x: float, y: float, taken: list[tuple[float, float, float, float]]) -> str:
    """Right of the point, left, above or below, wherever it covers nothing; else nowhere."""
    width = CHARACTER * len(text)
    for left, base in ((x + 10, y + 4), (x - 10 - width, y + 4), (x - width / 2, y - 11), (x - width / 2, y + 20)):
        box = (left, base - 10, left + width, base + 2)
        if box[0] >= LEFT and box[2] <= WIDTH and not any(_overlap(box, other) for other in taken):
            taken.append(box)
            return f'<text class="halo" x="{left:.1f}" y="{base:.1f}">{escape(text)}</text>'
    return ""


def _overlap(a: tuple[float, float, float, float], b: tuple[float, float, float, float]) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def _mark(x: float, y: float, color: int, shape: int, is_filled: bool) -> str:
    """color: of a policy; -1 for none. shape: of a model axis, by its rank."""
    paint = "var(--soft)" if color < 0 else f"var(--c{color % 6})"
    fill = paint if is_filled else "var(--paper)"
    corners = ("", "M-5 -5H5V5H-5Z", "M0 -7L6 5H-6Z", "M0 -7L7 0L0 7L-7 0Z")[min(shape, 3)]
    style = f'style="fill:{fill};stroke:{paint};stroke-width:2"'
    if not corners:
        return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="5" {style}/>'
    return f'<path transform="translate({x:.1f} {y:.1f})" d="{corners}" {style}/>'
