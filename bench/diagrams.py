# SPDX-License-Identifier: Apache-2.0
"""What the pictures of docs/explanations are drawn with: rectangles, and the frame around a picture."""

from html import escape
from pathlib import Path

FOLDER = Path(__file__).parent.parent / "docs" / "explanations"

Paint = tuple[str, float]  # a colour of `train.plot.PLOT_STYLE`, and how strong


def rect(x: float, y: float, width: float, height: float, paint: Paint) -> str:
    color, strength = paint
    return (
        f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" fill="var(--{color})"'
        f' fill-opacity="{strength:g}"/>'
    )


def heading(text: str, x: float, y: float) -> str:
    """That of a panel."""
    return f'<text class="title" x="{x}" y="{y}" style="font-size:13px">{escape(text)}</text>'


def picture(title: str, width: float, height: float, content: str) -> str:
    return (
        f'<svg class="plot" xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}" role="img">'
        f'<title>{escape(title)}</title><text class="title" x="0" y="20">{escape(title)}</text>{content}</svg>'
    )
