"""How every figure looks: colours that colour-blind readers can tell apart, a white card for light and dark pages.

    with plotting.figure("images/name.png", "what is shown, n = 2,000, split and protocol", columns=2) as axes:
        axes[0, 0].plot(...)

A caption stands in every figure, so that a picture copied elsewhere still says what it shows. The same data give the
same bytes on one machine.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping, Sequence
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


# Training


def training_curves(
    path: str | Path,
    log: Sequence[Mapping[str, float]],
    kept_step: int,
    *,
    model: str,
    task: str,
    training_rows: int,
    validation_rows: int,
) -> None:
    """Training and validation loss, and confidence against accuracy, over the steps; from a training log's entries."""
    caption = (
        f"Fine-tuning {model}, task {task}: {training_rows:,} training rows, validation on n = {validation_rows:,} "
        "rows that are not trained on. The dotted line is the adapter that was kept, chosen on these validation rows."
    )
    steps = [entry for entry in log if "loss" in entry]
    validations = [entry for entry in log if "log_loss" in entry]
    with figure(path, caption, columns=2, height=4.0) as axes:
        losses, measures = axes[0]
        _plot_step_losses(losses, [entry["step"] for entry in steps], [entry["loss"] for entry in steps])

        def plot_validations(axis: Axes, key: str, label: str, color: str, style: str = "o-") -> None:
            numbers = [entry["step"] for entry in validations]
            axis.plot(numbers, [entry[key] for entry in validations], style, color=color, label=label)

        plot_validations(losses, "log_loss", "validation, log loss", RED)
        plot_validations(measures, "accuracy", "accuracy", GREEN)
        plot_validations(measures, "mean_confidence", "mean confidence", ORANGE)
        plot_validations(measures, "ece", "ECE, 20 bins", PURPLE)
        plot_validations(measures, "ece_floor", "expected ECE if calibrated", GREY, "--")
        losses.set(title="Loss", xlabel="step", ylabel="nats", ylim=(0, None))
        measures.set(title="Confidence on the validation rows", xlabel="step", ylim=(0, 1))
        percent(measures, "y")
        for axis in (losses, measures):
            axis.axvline(kept_step, color=INK, linestyle=":", linewidth=1)
            axis.legend(fontsize=9)


def _plot_step_losses(axis: Axes, steps: Sequence[int], losses: Sequence[float]) -> None:
    """The loss of every step, faint, and its moving average over a twentieth of the steps."""
    width = max(1, len(steps) // 20)
    average = np.convolve(losses, np.ones(width) / width, "valid")
    axis.plot(steps, losses, color=SKY, linewidth=0.8, alpha=0.7)
    axis.plot(steps[width - 1 :], average, color=BLUE, label=f"training, mean of {width} steps")
