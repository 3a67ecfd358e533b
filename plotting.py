"""Every figure, from arrays and records: colours that colour-blind readers can tell apart, a white card, a caption.

    plotting.raw_confidence_histogram("out.png", confidence, correct, model="m", source="test.jsonl")

    with plotting.figure("images/name.png", "what is shown, n = 2,000, split and protocol", columns=2) as axes:
        axes[0, 0].plot(...)

A figure is a function of its path, its data and keyword arguments for the words of its caption; a panel draws one part
of it into axes that it is given. What is shown was computed before: nothing here fits, chooses or reads a file. A
caption stands in every figure, so that a picture copied elsewhere still says what it shows. The same data give the same
bytes on one machine.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
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
PALE_GREY, SOFT_INK = "#d5d9e0", "#555b66"
BAND_COLORS = (GREEN, YELLOW, ORANGE, RED)  # of the confidence bands, the highest first
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
FEW = 10  # rows below which a figure shows no accuracy
OVERLAP = (
    "more than half of the labels are one sample, without a band. Subsamples overlap: other labels would differ more."
)


@dataclass(frozen=True)
class Curve:
    """One line of a figure and the band around it, if it has one; arrays [points]."""

    name: str
    x: np.ndarray
    y: np.ndarray
    low: np.ndarray | None = None
    high: np.ndarray | None = None


@dataclass(frozen=True)
class ReliabilityPanel:
    """One reliability diagram of a figure: its title, and its bins as `reliability_panel` takes them."""

    title: str
    bins: Sequence[Mapping[str, float]]
    color: str


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
        figure.text(side, MARGIN / high, "\n".join(lines), fontsize=8.5, va="bottom", color=SOFT_INK)
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        # No version in its metadata: equal data, equal bytes.
        figure.savefig(path, dpi=DPI, metadata={"Software": None}, pil_kwargs={"optimize": True})


# Panels and their parts


def percent(axis: Axes, which: str = "both") -> None:
    """Show an axis that runs from 0 to 1 in percent."""
    from matplotlib.ticker import FuncFormatter

    for name in ("x", "y") if which == "both" else (which,):
        getattr(axis, f"{name}axis").set_major_formatter(FuncFormatter(_percent))


def _percent(share: float, _: int) -> str:
    """A tick's share with all its digits: 2.5 % is not 2 %, as a formatter for whole percents has it."""
    return f"{round(100 * share, 2):zg}%"


def color_of(name: str) -> str:
    """Raw confidences are red and calibrated ones blue, in every figure that shows both."""
    return RED if name == "raw" else BLUE


def draw_curve(axis: Axes, curve: Curve, color: str, style: str = "-", alpha: float = 0.2) -> None:
    """A line over its band."""
    if curve.low is not None:
        axis.fill_between(curve.x, curve.low, curve.high, color=color, alpha=alpha, linewidth=0)
    axis.plot(curve.x, curve.y, style, color=color, label=curve.name)


def confidence_panel(
    axis: Axes, confidence: np.ndarray, correct: np.ndarray, colors: Sequence[str] = (BLUE, ORANGE), **bars: object
) -> None:
    """How often each confidence occurs, right under wrong, with the mean confidence and the accuracy as lines."""
    parts = [confidence[correct], confidence[~correct]]
    axis.hist(parts, bins=np.arange(21) / 20, stacked=True, color=colors, label=["right", "wrong"], **bars)
    for value, name, style in ((confidence.mean(), "mean confidence", "--"), (correct.mean(), "accuracy", ":")):
        axis.axvline(value, color=INK, linestyle=style, label=f"{name} {value:.1%}")
    percent(axis, "x")


def reliability_panel(axis: Axes, bins: Sequence[Mapping[str, float]], color: str = BLUE) -> None:
    """Accuracy against mean confidence, a dot a bin sized by its rows, with 95 % intervals and the diagonal.

    `bins` are those that hold rows, as `calibration_metrics.reliability_bins` gives them.
    """
    x, y = ([each[key] for each in bins] for key in ("mean_confidence", "accuracy"))
    low, high = ([each[key] for each in bins] for key in ("accuracy_low", "accuracy_high"))
    n = np.array([each["n"] for each in bins])
    axis.plot([0, 1], [0, 1], color=GREY, linestyle="--", linewidth=1, zorder=1)
    axis.vlines(x, low, high, color=color, alpha=0.35, linewidth=1.5, zorder=2)
    axis.scatter(x, y, s=20 + 500 * n / n.sum(), color=color, alpha=0.85, edgecolor="white", zorder=3)
    for each in bins:  # along the bottom, where dots are rare, and upright, so that they do not collide
        place = (each["to"] + each["from"]) / 2, 0
        axis.annotate(f"{each['n']:,}", place, rotation=90, ha="center", va="bottom", fontsize=8, color=SOFT_INK)
    axis.set(xlim=(-0.02, 1.04), ylim=(-0.02, 1.08), xlabel="confidence", ylabel="accuracy")
    percent(axis)


def reliability_diagrams(
    path: str | Path, panels: Sequence[ReliabilityPanel], *, what: str, where: str, height: float = 4.8
) -> None:
    """A figure of reliability diagrams, two in a row, on common axes."""
    caption = (
        f"Reliability of the {what}, {where}. A dot is one of 20 equal bins with the exact 95 % interval of as many "
        "independent rows; its rows stand at the bottom. On the diagonal the confidence is true. In parentheses: the "
        "expected ECE if calibrated (the noise floor)."
    )
    rows = -(-len(panels) // 2)
    with figure(path, caption, rows, 2, height=height, sharex=True, sharey=True) as axes:
        for axis, panel in zip(axes.flat, panels, strict=False):
            if panel.bins:
                reliability_panel(axis, panel.bins, panel.color)
            axis.set_title(panel.title, fontsize=10.5)
            axis.label_outer()


def risk_coverage_panel(axis: Axes, risks: Mapping[str, np.ndarray], colors: Mapping[str, str] | None = None) -> None:
    """Risk against coverage; `risks` is name -> error rate among the k most confident rows, for k = 1 to n [n]."""
    for name, risk in risks.items():
        start = len(risk) // 100  # the first few rows are noise
        coverage = np.arange(1, len(risk) + 1) / len(risk)
        color = colors[name] if colors else color_of(name)
        axis.plot(coverage[start:], risk[start:], color=color, label=f"{name}, area {risk.mean():.3f}")
    axis.set(xlim=(0, 1), ylim=(0, None), title="Risk and coverage")
    axis.set(xlabel="share of rows automated", ylabel="error rate among them")
    percent(axis)
    axis.legend(loc="upper left")


def confidence_bands_panel(axis: Axes, bands: Sequence[tuple[float, str]], lowest: float) -> None:
    """The confidence bands behind a reliability diagram that is drawn from below the `lowest` confidence on.

    `bands` are (from this confidence on, name), the highest first.
    """
    left = min(0.3, np.floor(10 * lowest) / 10)
    axis.set_xticks([left, *(lower for lower, _ in bands[:-1])])
    upper = 1.0
    for (lower, name), color in zip(bands, BAND_COLORS, strict=True):
        axis.axvspan(lower, upper, color=color, alpha=0.14, linewidth=0, zorder=0)
        words = name.replace(" ", "\n").replace("-", "-\n")
        axis.text((max(lower, left) + upper) / 2, 1.015, words, ha="center", va="bottom", fontsize=8)
        upper = lower
    axis.plot([0, 1], [0, 1], color=GREY, linestyle="--", linewidth=1)
    axis.set(xlim=(left, 1), ylim=(0, 1.14), xlabel="confidence", ylabel="accuracy")
    axis.set_yticks(np.arange(6) / 5)
    percent(axis)


# The figures of calibration_demo.py


def raw_confidence_histogram(
    path: str | Path, confidence: np.ndarray, correct: np.ndarray, *, model: str, source: str
) -> None:
    """How often each raw confidence occurs, right and wrong."""
    which = "over" if confidence.mean() > correct.mean() else "under"
    caption = (
        f"Raw confidence of {model} on {source}, n = {len(confidence):,}, nothing fitted. The gap between the two "
        f"lines is {which}confidence."
    )
    with figure(path, caption, height=4.2) as axes:
        axis = axes[0, 0]
        confidence_panel(axis, confidence, correct, edgecolor="white")
        axis.set(xlim=(min(0.48, confidence.min()), 1.005), xlabel="raw confidence", ylabel="rows")
        axis.set_title("What the model says")
        axis.legend(loc="upper left")


def business_reliability(
    path: str | Path,
    curves: Sequence[Curve],
    counts: Sequence[Sequence[int]],
    bands: Sequence[tuple[float, str]],
    *,
    lowest: float,
    where: str,
) -> None:
    """Raw and calibrated reliability over the confidence bands; `counts` are each curve's rows in each band."""
    caption = (
        f"Reliability and the article's four confidence bands, {where}; raw: nothing fitted. A dot is one of ten equal "
        "bins; the numbers are the rows of each band, raw above calibrated. On the dashed line the confidence is true."
    )
    with figure(path, caption, height=4.8) as axes:
        axis = axes[0, 0]
        confidence_bands_panel(axis, bands, lowest)
        left = axis.get_xlim()[0]
        for curve, rows, style, height in zip(curves, counts, ("s-", "o-"), (0.07, 0.02), strict=True):
            color, upper = color_of(curve.name), 1.0
            draw_curve(axis, curve, color, style)
            for (lower, _), n in zip(bands, rows, strict=True):
                middle = (max(lower, left) + upper) / 2
                axis.text(middle, height, f"{n:,}", ha="center", color=color, fontsize=9, fontweight="bold")
                upper = lower
        axis.legend(loc="upper left", bbox_to_anchor=(0.0, 0.9), frameon=False)


def business_progression(
    path: str | Path,
    curves: Mapping[int, Curve],
    bands: Sequence[tuple[float, str]],
    *,
    calibrator: str,
    where: str,
    repeats: int,
    seed: int,
) -> None:
    """Reliability over the confidence bands, by the number of labels that the calibrator was fitted on."""
    caption = (
        f"Reliability of '{calibrator}' fitted on so many calibration labels, {where}. Line: median of each bin's "
        f"accuracy over {repeats} random subsamples of the labels (seed {seed}), band: its 5 to 95 %; {OVERLAP}"
    )
    lowest = min(curve.x.min() for curve in curves.values())
    rows = max(1, (len(curves) + 1) // 2)
    with figure(path, caption, rows, min(2, len(curves)), height=3.6, sharex=True, sharey=True) as axes:
        for axis in axes.flat[len(curves) :]:
            axis.set_visible(False)
        for axis, (size, curve) in zip(axes.flat, curves.items(), strict=False):
            confidence_bands_panel(axis, bands, lowest)
            draw_curve(axis, curve, BLUE, "o-")
            axis.set_title(f"{size:,} labels")
            axis.label_outer()


def accuracy_threshold(path: str | Path, gates: Mapping[str, Sequence[Mapping[str, float]]], *, where: str) -> None:
    """What a threshold automates (bars) and how right that is (line); name -> rows of `decisions.automation`."""
    caption = (
        f"Automation and accuracy by confidence threshold, {where}; raw: nothing fitted. Bars: the rows at or above it "
        f"and their share. Line: accuracy among them where they are {FEW} or more, with the exact 95 % interval of as "
        "many independent rows."
    )
    with figure(path, caption, columns=2, height=4.2, sharey=True) as axes:
        for axis, (name, rows) in zip(axes[0], gates.items(), strict=True):
            automated_share_bars(axis, rows, color_of(name))
            automated_accuracy_line(axis, rows, color_of(name))
            axis.set_xticks(np.arange(len(rows)), [f"{row['threshold']:.0%}" for row in rows])
            axis.set(ylim=(0, 1.12), xlabel="confidence threshold", title=name)
            percent(axis, "y")
        axes[0, 0].set_ylabel("share of rows, accuracy")


def automated_share_bars(axis: Axes, rows: Sequence[Mapping[str, float]], color: str) -> None:
    """The share of the rows that each threshold automates, with numbers."""
    axis.bar(np.arange(len(rows)), [row["share"] for row in rows], color=color, alpha=0.25, width=0.8)
    for place, row in enumerate(rows):
        is_tiny = row["automated"] and row["share"] < 0.005
        share = "<1%" if is_tiny else f"{row['share']:.0%}"
        axis.text(place, 0.015, f"{row['automated']:,}\n{share}", ha="center", fontsize=8, linespacing=1.4)


def automated_accuracy_line(axis: Axes, rows: Sequence[Mapping[str, float]], color: str) -> None:
    """How right the automated rows are, where they are enough to say so."""
    places = [place for place, row in enumerate(rows) if row["automated"] >= FEW]
    if not places:
        return
    accuracy = np.array([rows[place]["accuracy"] for place in places])
    low = np.array([rows[place]["accuracy_low"] for place in places])
    high = np.array([rows[place]["accuracy_high"] for place in places])
    ends = [accuracy - low, high - accuracy]
    axis.errorbar(places, accuracy, yerr=ends, fmt="o-", color=color, capsize=2, linewidth=1.5)
    for place, value, end in zip(places, accuracy, high, strict=True):
        axis.annotate(f"{value:.0%}", (place, end), (0, 3), textcoords="offset points", ha="center", fontsize=8)


def sample_size(
    path: str | Path,
    panels: Mapping[float, tuple[Curve, Curve]],
    *,
    calibrator: str,
    where: str,
    repeats: int,
    seed: int,
) -> None:
    """What four thresholds automate and how right that is, by the number of labels; threshold -> (share, accuracy)."""
    caption = (
        f"Automating from a confidence calibrated by '{calibrator}' on, by number of calibration labels, {where}. "
        f"Line: median of {repeats} random subsamples of the labels (seed {seed}), band: 5 to 95 %; {OVERLAP} A "
        "calibrated confidence keeps the accuracy above the dashed line."
    )
    with figure(path, caption, 2, 2, height=3.3, sharex=True, sharey=True) as axes:
        for axis, (threshold, (share, accuracy)) in zip(axes.flat, panels.items(), strict=True):
            draw_curve(axis, share, ORANGE, "o-")
            draw_curve(axis, accuracy, BLUE, "o-")
            axis.axhline(threshold, color=GREY, linestyle="--")
            axis.set_xscale("log")
            axis.set_xticks(share.x, [f"{size:,}" for size in share.x])
            axis.minorticks_off()
            axis.set(ylim=(0, 1.05), title=f"automated from {threshold:.0%} on", xlabel="calibration labels")
            percent(axis, "y")
            axis.label_outer()
        axes[0, 0].legend(loc="best", fontsize=9)


def cost_curve(
    path: str | Path,
    curves: Sequence[Curve],
    *,
    review_cost: float,
    error_cost: float,
    optimum: float,
    where: str,
    seed: int,
) -> None:
    """What 1,000 rows cost at each threshold."""
    caption = (
        f"Cost of 1,000 rows, ${review_cost:g} a review and ${error_cost:g} an automated error, {where}; raw: nothing "
        f"fitted. Bands: 95 %, 500 bootstrap samples of whole groups, seed {seed}. The dotted line is where true "
        "confidences cost least, from the two prices alone."
    )
    with figure(path, caption, height=4.4) as axes:
        axis = axes[0, 0]
        for curve in curves:
            draw_curve(axis, curve, color_of(curve.name), alpha=0.15)
        axis.axhline(1000 * review_cost, color=GREY, linestyle="--", label="review everything")
        label = f"cost-optimal threshold {optimum:.2f}"
        axis.axvline(optimum, color=INK, linestyle=":", label=label)
        axis.set(xlabel="automate from this confidence on", ylabel="dollars per 1,000 rows", ylim=(0, None))
        axis.set_title("What a threshold costs")
        percent(axis, "x")
        axis.yaxis.set_major_formatter("${x:,.0f}")
        axis.legend()


def risk_coverage(
    path: str | Path,
    risks: Mapping[str, np.ndarray],
    *,
    about: str,
    colors: Mapping[str, str] | None = None,
    height: float = 4.2,
) -> None:
    """Error rate among the most confident rows, by how many are taken; see `risk_coverage_panel`."""
    with figure(path, f"Errors among the most confident share of rows, {about}", height=height) as axes:
        risk_coverage_panel(axes[0, 0], risks, colors)


def calibration_method_comparison(
    path: str | Path, metrics: Mapping[str, Mapping[str, float]], *, chosen: str, where: str, seed: int
) -> None:
    """Log loss and ECE of every calibrator and of the raw confidence, the best on top; name -> report row."""
    found = sorted(metrics.items(), key=lambda item: item[1]["log_loss"])
    caption = (
        f"Each calibrator, {where}; raw: nothing fitted. Lower is better. Bars of the log loss: 95 %, 1,000 bootstrap "
        f"samples of whole groups (seed {seed}). Grey: 95 % of the ECEs (20 equal bins) that true confidences show on "
        f"so many independent rows, with their mean. '{chosen}' was chosen by its log loss on the calibration rows, "
        "out-of-fold."
    )
    with figure(path, caption, columns=2, height=3.4, sharey=True) as axes:
        left, right = axes[0]
        above = {"xytext": (0, 6), "textcoords": "offset points", "ha": "center", "fontsize": 9}
        for place, (name, row) in enumerate(found):
            color, marker = color_of(name), "s" if name == "raw" else "o"
            loss, ece = row["log_loss"], row["ece"]
            ends = [[loss - row["log_loss_low"]], [row["log_loss_high"] - loss]]
            left.errorbar(loss, place, xerr=ends, fmt=marker, color=color, capsize=2)
            left.annotate(f"{loss:.3f}", (loss, place), **above)
            right.barh(place, row["ece_noise_95"], 0.36, color=PALE_GREY)
            right.vlines(row["ece_noise_floor"], place - 0.18, place + 0.18, color=GREY, linewidth=2)
            right.plot(ece, place, marker, color=color)
            right.annotate(f"{ece:.3f}", (ece, place), **above)
        names = [f"{name}\n(chosen)" if name == chosen else name for name, _ in found]
        left.set_yticks(np.arange(len(found)), names)
        left.set(title="Log loss", xlabel="nats", ylim=(len(found) - 0.4, -0.7))
        right.set(title="Expected calibration error", xlabel="ECE; grey: if the confidence were true", xlim=(0, None))


# The figure of consistency_confidence.py --first-token


def agreement_convergence(path: str | Path, pairs: Mapping[int, np.ndarray], *, about: str) -> None:
    """Vote share against probability at each number of draws; draws -> (probability, vote share) [rows, 2]."""
    n, columns = len(next(iter(pairs.values()))), 2
    caption = (
        f"{about}, n = {n:,} rows, nothing fitted. A dot is a text: the probability of its most probable label against "
        "that label's share of so many draws from the same first-token distribution, seeded by its id and text; the "
        "band holds 95 % of binomial draws. Last: the root mean square distance, and what the binomial distribution "
        "predicts."
    )
    with figure(path, caption, rows=-(-(len(pairs) + 1) // columns), columns=columns, height=3.1) as axes:
        panels = axes.ravel()
        for axis, (draws, found) in zip(panels, pairs.items(), strict=False):
            agreement_panel(axis, draws, found[:, 0], found[:, 1])
        agreement_distance_panel(panels[len(pairs)], pairs)
        for axis in panels[len(pairs) + 1 :]:
            axis.set_visible(False)


def agreement_panel(axis: Axes, draws: int, probability: np.ndarray, agreement: np.ndarray) -> None:
    """Each row's share of so many draws against its probability, over the band of binomial draws."""
    from scipy.stats import binom

    grid = np.linspace(max(0, probability.min() - 0.03), 1, 401)
    low, high = (binom.ppf(q, draws, grid) / draws for q in (0.025, 0.975))
    axis.fill_between(grid, low, high, color=SKY, alpha=0.35, linewidth=0)
    axis.plot(grid, grid, color=GREY, linewidth=1, linestyle="--")
    axis.scatter(probability, agreement, s=3, marker="s", color=BLUE, alpha=0.6, linewidth=0, antialiased=False)
    axis.set(title=f"{draws:,} draws", xlabel="probability", ylabel="vote share", xlim=(grid[0], 1.01), ylim=(0, 1.04))
    percent(axis)


def agreement_distance_panel(axis: Axes, pairs: Mapping[int, np.ndarray]) -> None:
    """How far the vote share is from the probability, by the number of draws, and what the binomial predicts."""
    from matplotlib.ticker import FuncFormatter, LogLocator

    sizes, p = np.array(list(pairs)), next(iter(pairs.values()))[:, 0]
    measured = [np.sqrt(np.mean((found[:, 1] - found[:, 0]) ** 2)) for found in pairs.values()]
    many = np.geomspace(sizes.min(), sizes.max(), 50)
    axis.plot(many, np.sqrt(np.mean(p * (1 - p)) / many), color=GREY, label="binomial")
    axis.plot(sizes, measured, "o", color=RED, label="measured")
    axis.set(title="Distance", xlabel="draws", ylabel="root mean square", xscale="log", yscale="log")
    axis.set_xticks(sizes, [f"{size:,}" for size in sizes])
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.minorticks_off()
    axis.legend()


# The figure of fine_tune_model.py


def training_curves(
    path: str | Path,
    log: Sequence[Mapping[str, float]],
    *,
    best_step: int,
    model: str,
    task: str,
    training_rows: int,
    validation_rows: int,
) -> None:
    """Training and validation loss, and confidence against accuracy, over the steps.

    Entries of the log with a `loss` are steps of the training, those with a `log_loss` are validations.
    """
    caption = (
        f"Fine-tuning {model}, task {task}: {training_rows:,} training rows, validation on n = {validation_rows:,} "
        "rows that are not trained on. The dotted line is the adapter that was kept, chosen on these validation rows."
    )
    trained, validated = ([entry for entry in log if key in entry] for key in ("loss", "log_loss"))
    steps, values = ([entry[key] for entry in trained] for key in ("step", "loss"))
    width = max(1, len(trained) // 20)
    smooth = np.convolve(values, np.ones(width) / width, "valid")
    with figure(path, caption, columns=2, height=4.0) as axes:
        losses, confidences = axes[0]
        losses.plot(steps, values, color=SKY, linewidth=0.8, alpha=0.7)
        averaged = f", mean of {width} steps" if width > 1 else ""
        losses.plot(steps[width - 1 :], smooth, color=BLUE, label=f"training{averaged}")
        for axis, key, label, style, color in (
            (losses, "log_loss", "validation, log loss", "o-", RED),
            (confidences, "accuracy", "accuracy", "o-", GREEN),
            (confidences, "mean_confidence", "mean confidence", "o-", ORANGE),
            (confidences, "ece", "ECE, 20 bins", "o-", PURPLE),
            (confidences, "ece_floor", "ECE expected if calibrated", "--", GREY),
        ):
            x, y = ([entry[name] for entry in validated] for name in ("step", key))
            axis.plot(x, y, style, color=color, label=label)
        losses.set(title="Loss", xlabel="step", ylabel="nats", ylim=(0, None))
        confidences.set(title="Confidence on the validation rows", xlabel="step", ylim=(0, 1))
        percent(confidences, "y")
        for axis in (losses, confidences):
            axis.axvline(best_step, color=INK, linestyle=":", linewidth=1)
            axis.legend(fontsize=9)


# The figure of the study on public data

METHOD_COLORS = (GREY, ORANGE, YELLOW, BLUE, GREEN)


@dataclass(frozen=True)
class SetCoverage:
    """What is automated of a data set with so many labels: method -> (share of the unseen rows, is it broken)."""

    labels: int
    methods: Mapping[str, tuple[float, bool]]


def guaranteed_coverage(
    path: str | Path,
    panels: Mapping[str, Mapping[str, SetCoverage]],
    *,
    methods: Sequence[str],
    target: float,
    unseen: int,
) -> None:
    """What each method automates with a guarantee: panel -> data set -> what of it; the first panel has all sets.

    `methods` are all there are, in the order of their bars and colours.
    """
    caption = (
        f"Share of {unseen} unseen rows automated at a guaranteed accuracy of {target:.0%}, 95 % certain; calibrated "
        "and chosen on the labelled rows, whose number stands at the right. 0 %: nothing could be guaranteed; without "
        "a number: not run with so many. Hatched: less than the target was right on these rows."
    )
    names = list(next(iter(panels.values())))
    colors = dict(zip(methods, METHOD_COLORS, strict=False))
    height = 1.0 + 0.145 * len(names) * (len(methods) + 1)
    with figure(path, caption, columns=len(panels), height=height, sharey=True) as axes:
        for axis, (title, sets) in zip(axes[0], panels.items(), strict=True):
            for name, found in sets.items():
                coverage_bars(axis, names.index(name), found, colors)
            axis.set(xlim=(0, 1.3), xticks=[0, 0.5, 1], xlabel="automated", title=title)
            axis.grid(False, axis="y")
            percent(axis, "x")
        axes[0, 0].set_yticks(np.arange(len(names)), names)
        axes[0, 0].set_ylim(len(names) - 0.4, -0.6)
        handles = [axis.barh(0, 0, color=color, label=name) for name, color in colors.items()]
        axis.figure.legend(handles=handles, loc="outside upper center", ncols=3, fontsize=9.5)


def coverage_bars(axis: Axes, place: int, found: SetCoverage, colors: Mapping[str, str]) -> None:
    """A data set's bars, one under the other, each with its number, and how many labels they are of."""
    height = 0.84 / len(colors)
    for number, (name, color) in enumerate(colors.items()):
        if name not in found.methods:
            continue
        share, is_broken = found.methods[name]
        at = place + (number - (len(colors) - 1) / 2) * height
        axis.barh(at, share, height, color=color, hatch="////" if is_broken else None, edgecolor="white", linewidth=0.4)
        axis.text(share + 0.01, at, f"{share:.0%}", va="center", fontsize=7.5)
    axis.text(1.29, place, f"{found.labels:,}", va="center", ha="right", fontsize=8.5, color=SOFT_INK)


# The figures of compare_base_vs_finetuned.py; models are named in the order of MODEL_COLORS

MODEL_COLORS, MODEL_MARKERS = (ORANGE, BLUE), ("s", "o")  # base, fine-tuned
MOST_PARTS = 30  # lines of a figure


def model_spans(
    axis: Axes, spans: Sequence[Mapping[str, Sequence[float]]], spread: float, upright: bool = False
) -> None:
    """A mark with its interval for each model at each place; `spans` are model -> (value, low, high) of each place."""
    for k, (name, color, marker) in enumerate(zip(spans[0], MODEL_COLORS, MODEL_MARKERS, strict=True)):
        value, low, high = np.array([of_model[name] for of_model in spans]).T
        place, ends = np.arange(len(spans)) + (k - 0.5) * spread, np.abs([value - low, high - value])
        style = {"fmt": marker, "color": color, "label": name, "capsize": 2}
        if upright:
            axis.errorbar(place, value, yerr=ends, **style)
        else:
            axis.errorbar(value, place, xerr=ends, **style)


def accuracy_comparison(
    path: str | Path, parts: Mapping[str, Mapping[str, Sequence[float]]], *, where: str, seed: int
) -> None:
    """Accuracy of both models: part of the rows, all of them first -> model -> (accuracy, low, high)."""
    caption = (
        f"Share of right answers, {where}, seed {seed}; nothing fitted. Bars are 95 % intervals: of all rows by 1,000 "
        "bootstrap samples of whole groups, of parts exact, as of independent rows. Behind a name: its n."
    )
    if len(parts) > MOST_PARTS:
        caption += f" The first {MOST_PARTS} of {len(parts)} lines."
        parts = dict([*parts.items()][:MOST_PARTS])
    with figure(path, caption, height=1.5 + 0.33 * len(parts)) as axes:
        axis = axes[0, 0]
        model_spans(axis, list(parts.values()), spread=0.3)
        axis.set_yticks(np.arange(len(parts)), list(parts))
        axis.set(xlim=(0, 1.02), ylim=(len(parts) - 0.5, -0.5), xlabel="accuracy")
        percent(axis, "x")
        axis.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2)


def calibration_error_comparison(
    path: str | Path,
    ece: Mapping[str, Mapping[str, float]],
    expected_ece: Mapping[str, Mapping[str, float]],
    log_loss: Mapping[str, Mapping[str, Sequence[float]]],
    *,
    where: str,
    seed: int,
) -> None:
    """ECE beside the expected ECE if calibrated, and log loss (value, low, high): calibrator -> model -> number."""
    caption = (
        f"Before and after each calibrator of P(label), {where}, seed {seed}; raw: nothing fitted. Expected if "
        "calibrated: the ECE (20 equal bins) that true confidences show on so many independent rows, the noise floor. "
        "Bars of the log loss: 95 %, 1,000 bootstrap samples of whole groups."
    )
    x = np.arange(len(ece))
    with figure(path, caption, columns=2, height=4.4) as axes:
        left, right = axes[0]
        for k, (name, color) in enumerate(zip(next(iter(ece.values())), MODEL_COLORS, strict=True)):
            place = x + (k - 0.5) * 0.38
            left.bar(place, [of_model[name] for of_model in ece.values()], 0.36, color=color, label=name)
            expected = [of_model[name] for of_model in expected_ece.values()]
            label = "expected if calibrated" if k else None
            left.hlines(expected, place - 0.18, place + 0.18, color=INK, linewidth=2, label=label)
        model_spans(right, list(log_loss.values()), spread=0.2, upright=True)
        for axis, title in ((left, "Expected calibration error"), (right, "Log loss")):
            axis.set_xticks(x, list(ece), rotation=35, ha="right")
            axis.set(title=title, ylim=(0, None))
            axis.grid(False, axis="x")
        left.legend()


def confidence_comparison(
    path: str | Path,
    confidence: Mapping[str, Mapping[str, np.ndarray]],
    correct: Mapping[str, np.ndarray],
    *,
    where: str,
    calibrators: Mapping[str, str],
) -> None:
    """How often each confidence occurs, right and wrong: "raw" or "calibrated" -> model -> confidence [n]."""
    used = "; ".join(f"{name} by {calibrator}" for name, calibrator in calibrators.items())
    caption = f"Confidence of right and wrong answers, {where}; raw: nothing fitted. Calibrated: {used}."
    lowest = min(values.min() for of_model in confidence.values() for values in of_model.values())
    with figure(path, caption, 2, 2, height=3.1, sharex=True, sharey="row") as axes:
        for row, (score, of_model) in zip(axes, confidence.items(), strict=True):
            for axis, (name, values), color in zip(row, of_model.items(), MODEL_COLORS, strict=True):
                confidence_panel(axis, values, correct[name], (color, GREY), rwidth=0.92)
                axis.legend(loc="upper left", fontsize=8.5, handlelength=1.3, borderaxespad=0.1)
                axis.set(title=f"{name}, {score}", xlim=(min(0.5, lowest) - 0.02, 1.02))
                axis.label_outer()
            row[0].set_ylabel("rows")
        for axis in axes[1]:
            axis.set_xlabel("confidence")
