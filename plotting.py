"""How every figure looks: colours that colour-blind readers can tell apart, a white card for light and dark pages.

    with plotting.figure("images/name.png", "what is shown, n = 2,000, split and protocol", columns=2) as axes:
        axes[0, 0].plot(...)

A caption stands in every figure, so that a picture copied elsewhere still says what it shows. The same data give the
same bytes on one machine.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Okabe and Ito, "Color Universal Design", 2008
BLUE, ORANGE, GREEN, RED, PURPLE, SKY, YELLOW = (
    "#0072B2",
    "#E69F00",
    "#009E73",
    "#D55E00",
    "#CC79A7",
    "#56B4E9",
    "#F0E442",
)
GREY, INK = "#8a8f98", "#1f2430"
STYLE = {
    "font.size": 11,
    "axes.titlesize": 12,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": GREY,
    "axes.labelcolor": INK,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e4e7ec",
    "grid.linewidth": 0.8,
    "text.color": INK,
    "text.parse_math": False,  # a dollar is a dollar
    "xtick.color": INK,
    "ytick.color": INK,
    "figure.facecolor": "white",
    "savefig.facecolor": "white",  # never transparent: the page behind may be dark
    "legend.facecolor": "white",  # what lies behind a legend must not run through its words
    "legend.edgecolor": "none",
}
WIDTH, DPI = 8.4, 150  # inches, dots an inch: crisp at the 830 or so pixels of a README
MARGIN, CAPTION_LINE = 0.12, 0.17  # inches: around everything, of one line of the caption


@contextmanager
def figure(
    path: str | Path, caption: str, rows: int = 1, columns: int = 1, height: float = 4.6, **options: object
) -> Iterator[np.ndarray]:
    """Give axes [rows, columns] of a figure as wide as a README, `height` inches a row; write the PNG at the end."""
    from matplotlib import rc_context, rcdefaults, rcParams
    from matplotlib.figure import Figure

    lines = textwrap.wrap(caption, 128)
    below = MARGIN + CAPTION_LINE * len(lines)
    high = height * rows + below + MARGIN
    with rc_context():
        rcdefaults()  # not what a matplotlibrc of this machine says
        rcParams.update(STYLE)
        figure = Figure(figsize=(WIDTH, high), layout="constrained")
        side, bottom = MARGIN / WIDTH, below / high
        figure.get_layout_engine().set(rect=(side, bottom, 1 - 2 * side, 1 - bottom - MARGIN / high))
        yield figure.subplots(rows, columns, squeeze=False, **options)
        figure.text(side, MARGIN / high, "\n".join(lines), fontsize=8.5, va="bottom", color="#555b66")
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        # No version in its metadata: equal data, equal bytes.
        figure.savefig(path, dpi=DPI, metadata={"Software": None}, pil_kwargs={"optimize": True})


def percent(axis: Axes, which: str = "both") -> None:
    """Show an axis that runs from 0 to 1 in percent."""
    from matplotlib.ticker import PercentFormatter

    for name in ("x", "y") if which == "both" else (which,):
        getattr(axis, f"{name}axis").set_major_formatter(PercentFormatter(1, decimals=0))
