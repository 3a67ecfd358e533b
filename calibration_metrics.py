"""Is a confidence true? Calibration errors beside a calibrated model's, proper scores, ranking, reliability diagrams.

    ECE = sum_b n_b / n |accuracy_b - mean confidence_b|,  MCE = max_b |accuracy_b - mean confidence_b|,  20 equal bins

    python calibration_metrics.py base.jsonl                         # ten rows on one predictions file
    python calibration_metrics.py base.jsonl --verbose               # every number, and each predicted label
    python calibration_metrics.py base.jsonl tuned.jsonl --figure reliability.png

A perfectly calibrated model has an ECE above 0 on any finite sample, so ECE never stands alone: beside it stands the
expected ECE if calibrated (the noise floor), what perfect calibration would show on these confidences. MCE stands with
the count of its bin. Compare models and calibrators by log loss or Brier score, never by ECE: predicting the base rate
for every row has a perfect ECE. Intervals are 95 %: exact binomial for a count of independent rows, else a bootstrap
of whole groups.

It prints a table; with --figure it writes reliability diagrams. Formulas with their sources stand in the functions.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

import command_line
import plotting
import predictions
import tables

if TYPE_CHECKING:
    from matplotlib.axes import Axes

N_BINS = 20
MOST_LABELS = 10  # that --verbose prints
MIN_COUNT = 30  # rows that make the accuracy of a bin worth a maximum
MOST_GROUPS = 10_000  # of a bootstrap sample: a million rows take what these take
MOST_ROWS = 100_000  # to draw outcomes of
EPSILON = float(np.finfo(np.float64).eps)  # log loss clips here, as scikit-learn does


def checked(confidence: Sequence[float], correct: Sequence[bool]) -> tuple[np.ndarray, np.ndarray]:
    """(float64 [n], bool [n]) or a ValueError that says what is wrong with the two."""
    try:
        confidence, correct = np.asarray(confidence, dtype=np.float64), np.asarray(correct)
    except (ValueError, TypeError):
        raise ValueError("confidence must hold a number for each row, and correct a truth value") from None
    if confidence.ndim != 1 or correct.ndim != 1:
        raise ValueError(f"confidence and correct must be 1-D, they are {confidence.ndim}-D and {correct.ndim}-D")
    if len(confidence) != len(correct):
        raise ValueError(f"{len(confidence)} confidences, but {len(correct)} values of correct")
    if not len(confidence):
        raise ValueError("no rows: confidence is empty")
    if np.isnan(confidence).any():
        raise ValueError(f"confidence is NaN in {np.isnan(confidence).sum()} of {len(confidence)} rows")
    low, high = float(confidence.min()), float(confidence.max())
    if low < 0 or high > 1:
        raise ValueError(f"confidence runs from {low!r} to {high!r}, outside [0, 1]")
    if not np.isin(correct, (0, 1)).all():
        raise ValueError("correct must be true or false (1 or 0) in every row")
    return confidence, correct.astype(bool)


# Bins


@dataclass(frozen=True)
class Bins:
    """Rows gathered by confidence; arrays [n_bins], NaN where a bin is empty."""

    edges: np.ndarray  # [n_bins + 1]
    count: np.ndarray
    confidence: np.ndarray  # mean
    accuracy: np.ndarray

    @property
    def gap(self) -> np.ndarray:
        """accuracy - mean confidence: below 0 is overconfident."""
        return self.accuracy - self.confidence

    @property
    def mean_gap(self) -> float:
        """The size of the gaps, weighted by rows."""
        return float(np.nansum(self.count * np.abs(self.gap)) / self.count.sum())

    def largest_gap(self, min_count: int = 1) -> tuple[float, int | None]:
        """(size, rows of its bin) over the bins with at least `min_count` rows; (NaN, None) if there is none."""
        size = np.where(self.count >= min_count, np.abs(self.gap), -1.0)
        worst = int(size.argmax())
        return (float(size[worst]), int(self.count[worst])) if size[worst] >= 0 else (float("nan"), None)


def bins_of(confidence: Sequence[float], correct: Sequence[bool], n_bins: int = N_BINS) -> Bins:
    """Equal-width bins [i/n, (i+1)/n), the last one closed: a confidence of 0.95 is in the bin that begins at 0.95.

    The edges are the doubles nearest to i/n, so that bins agree with thresholds ">= 0.95". numpy.linspace(0, 1, 21)
    differs from them in the last bit at seven edges.
    """
    confidence, correct = checked(confidence, correct)
    return _gather(confidence, correct, _edges(n_bins))


def equal_mass_bins(confidence: Sequence[float], correct: Sequence[bool], n_bins: int | None = None) -> Bins:
    """Bins of about equally many rows, at most 20 bins and about 50 rows each; equal confidences stay together."""
    confidence, correct = checked(confidence, correct)
    n_bins = int(np.clip(len(confidence) // 50, 1, N_BINS)) if n_bins is None else len(_edges(n_bins)) - 1
    first = np.sort(confidence)[np.arange(n_bins) * len(confidence) // n_bins]
    return _gather(confidence, correct, np.append(np.unique(first), np.inf))


def _edges(n_bins: int) -> np.ndarray:
    if n_bins < 1:
        raise ValueError(f"n_bins is {n_bins}, at least 1 is needed")
    return np.arange(n_bins + 1) / n_bins


def _bin_index(confidence: np.ndarray, edges: np.ndarray) -> np.ndarray:
    return np.clip(np.searchsorted(edges, confidence, side="right") - 1, 0, len(edges) - 2)


def _gather(confidence: np.ndarray, correct: np.ndarray, edges: np.ndarray) -> Bins:
    index, n_bins = _bin_index(confidence, edges), len(edges) - 1
    count = np.bincount(index, minlength=n_bins)
    with np.errstate(invalid="ignore"):  # 0 / 0 where a bin is empty
        mean_confidence = np.bincount(index, confidence, minlength=n_bins) / count
        accuracy = np.bincount(index, correct, minlength=n_bins) / count
    return Bins(edges, count, mean_confidence, accuracy)


def expected_calibration_error(confidence: Sequence[float], correct: Sequence[bool], n_bins: int = N_BINS) -> float:
    """ECE: each bin's gap between accuracy and mean confidence, weighted by its rows (Naeini et al., AAAI 2015)."""
    return bins_of(confidence, correct, n_bins).mean_gap


def maximum_calibration_error(
    confidence: Sequence[float], correct: Sequence[bool], n_bins: int = N_BINS, min_count: int = 1
) -> float:
    """MCE: the largest gap of any bin with at least `min_count` rows; NaN when no bin has so many."""
    return bins_of(confidence, correct, n_bins).largest_gap(min_count)[0]


def debiased_calibration_error(confidence: Sequence[float], correct: Sequence[bool], n_bins: int = N_BINS) -> float:
    """The squared calibration error with its sampling noise subtracted; below 0 when noise explains all of it.

    sum_b n_b / n [gap_b^2 - a_b (1 - a_b) / (n_b - 1)], bins of one row left as they are (Broecker, 2012; Kumar,
    Liang and Ma, NeurIPS 2019).
    """
    bins = bins_of(confidence, correct, n_bins)
    noise = bins.accuracy * (1 - bins.accuracy) / np.maximum(bins.count - 1, 1)
    return float(np.nansum(bins.count * (bins.gap**2 - np.where(bins.count > 1, noise, 0))) / bins.count.sum())


def smooth_calibration_error(confidence: Sequence[float], correct: Sequence[bool]) -> float:
    """smECE: kernel-smoothed, so that no bin edge matters (Blasiok and Nakkiran, ICLR 2024), by relplot."""
    import relplot

    confidence, correct = checked(confidence, correct)
    return float(relplot.smECE(confidence, correct.astype(float)))


# Noise


def consistency_resampling(
    confidence: Sequence[float], n_bins: int = N_BINS, n_draws: int = 1000, seed: int = 0
) -> np.ndarray:
    """ECE [n_draws] of a model whose confidences are true: correct_i ~ Bernoulli(c_i). Their mean is the expected one.

    Broecker and Smith, "Increasing the reliability of reliability diagrams", 2007. Rows are drawn independently; where
    the errors of a group come together, true noise is larger than this and the p-value too small. Where there are more
    rows, n, than MOST_ROWS, m, as many are drawn, and their noise, sqrt(n / m) times as large, is scaled.
    """
    confidence, _ = checked(confidence, np.zeros(len(confidence)))
    draw, n = np.random.default_rng(seed), len(confidence)
    if n > MOST_ROWS:
        confidence = draw.choice(confidence, MOST_ROWS, replace=False)
    index = _bin_index(confidence, _edges(n_bins))
    expected = np.bincount(index, confidence, minlength=n_bins)
    errors = np.empty(n_draws)
    for number in range(n_draws):
        right = draw.random(len(confidence)) < confidence
        errors[number] = np.abs(np.bincount(index, right, minlength=n_bins) - expected).sum() / len(confidence)
    return errors * np.sqrt(len(confidence) / n)


def exact_interval(k: int, n: int) -> tuple[float, float]:
    """Clopper and Pearson's 95 % interval of a share, from k of n."""
    from scipy.stats import binomtest

    low, high = binomtest(int(k), int(n)).proportion_ci(0.95, "exact")
    return float(low), float(high)


@dataclass(frozen=True)
class Estimate:
    """A number with its 95 % interval."""

    value: float
    low: float
    high: float

    def shown(self, form: str = ".3f") -> str:
        return f"{self.value:{form}} [{self.low:{form}}, {self.high:{form}}]"


def mean_estimate(values: np.ndarray, groups: Sequence[object], seed: int = 0) -> Estimate:
    """The mean of values [n] with its bootstrap interval, whole groups resampled."""
    ((low, high),) = bootstrap_interval(lambda rows: [values[rows].mean()], groups, seed=seed)
    return Estimate(float(values.mean()), float(low), float(high))


def share_estimate(correct: np.ndarray, groups: Sequence[object], seed: int = 0) -> Estimate:
    """The share of right rows; its interval is exact, and where rows belong together as wide as the bootstrap's too."""
    low, high = exact_interval(correct.sum(), len(correct))
    if group_count(groups) < len(groups):
        resampled = mean_estimate(correct, groups, seed)
        low, high = min(low, resampled.low), max(high, resampled.high)
    return Estimate(float(correct.mean()), low, high)


def exact_share(k: int, n: int) -> Estimate:
    """The share k of n with its exact interval, as of independent rows."""
    return Estimate(k / n, *exact_interval(k, n))


def group_numbers(groups: Sequence[Hashable]) -> np.ndarray:
    """Groups of any kind as whole numbers from 0, in order of appearance; an array that is so comes back as it is."""
    if isinstance(groups, np.ndarray):
        if groups.dtype.kind == "i" and _are_numbered(groups):
            return groups
        groups = groups.tolist()  # whose loop is faster
    numbers: dict[Hashable, int] = {}
    return np.array([numbers.setdefault(group, len(numbers)) for group in groups], dtype=int)


def _are_numbered(groups: np.ndarray) -> bool:
    """Whether whole numbers begin at 0 and each new one is the next."""
    if not len(groups) or groups[0] != 0 or groups.min() < 0:
        return False
    return bool((np.diff(np.maximum.accumulate(groups)) <= 1).all())


def group_count(groups: Sequence[Hashable]) -> int:
    """How many groups there are."""
    return int(group_numbers(groups).max(initial=-1)) + 1


def one_of_each(groups: Sequence[Hashable]) -> np.ndarray:
    """The numbers of the first row of each group: an exact test takes rows that do not depend on each other."""
    return np.unique(group_numbers(groups), return_index=True)[1]


def resamples(
    groups: Sequence[object], n_resamples: int = 1000, seed: int = 0, most: int | None = None
) -> Iterator[np.ndarray]:
    """Row numbers of bootstrap samples, each of whole groups drawn with replacement (cluster bootstrap).

    As many groups are drawn as there are, `most` at the most.
    """
    index = group_numbers(groups)
    by_group, sizes = np.argsort(index, kind="stable"), np.bincount(index)
    first = np.cumsum(sizes) - sizes  # the place in by_group where the rows of a group begin
    draw, n_groups = np.random.default_rng(seed), len(sizes)
    for _ in range(n_resamples):
        drawn = draw.integers(n_groups, size=min(n_groups, most or n_groups))
        rows_of_each = sizes[drawn]
        ends = np.cumsum(rows_of_each)
        places = np.arange(ends[-1]) + np.repeat(first[drawn] - (ends - rows_of_each), rows_of_each)
        yield np.sort(by_group[places])


def bootstrap_interval(
    statistics: Callable[[np.ndarray], Sequence[float]],
    groups: Sequence[object],
    n_resamples: int = 1000,
    seed: int = 0,
    level: float = 0.95,
) -> np.ndarray:
    """Percentile intervals [statistics, 2] of statistics(row numbers) under the cluster bootstrap; NaN if undefined.

    Of more than MOST_GROUPS groups, n, a sample has MOST_GROUPS, m, and its distance from the statistic of all rows
    counts for sqrt(m / n) of itself (m out of n bootstrap: Bickel, Goetze and van Zwet, Statistica Sinica 1997).
    """
    groups = group_numbers(groups)
    drawn = resamples(groups, n_resamples, seed, MOST_GROUPS)
    values = np.array([statistics(rows) for rows in drawn], dtype=np.float64)
    tail, n_groups = (1 - level) / 2, group_count(groups)
    defined = ~np.isnan(values).all(axis=0)
    interval = np.full((values.shape[1], 2), np.nan)
    interval[defined] = np.nanquantile(values[:, defined], [tail, 1 - tail], axis=0).T
    if n_groups > MOST_GROUPS:
        everything = np.array(statistics(np.arange(len(groups))), dtype=np.float64)[:, None]
        interval = everything + np.sqrt(MOST_GROUPS / n_groups) * (interval - everything)
    return interval


# Proper scores and ranking


def brier_score(confidence: np.ndarray, correct: np.ndarray) -> float:
    """Mean squared difference between confidence and correctness."""
    return float(np.mean((confidence - correct) ** 2))


def log_loss(confidence: np.ndarray, correct: np.ndarray, clip: float = EPSILON) -> float:
    """Mean negative log-likelihood in nats; confidences are clipped to [clip, 1 - clip]."""
    clipped = np.clip(confidence, clip, 1 - clip)
    return float(-np.mean(np.where(correct, np.log(clipped), np.log1p(-clipped))))


def label_losses(probabilities: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """-ln P(true label) [n] of P(label) [n, labels] and the numbers of the true labels [n]."""
    return -np.log(np.clip(probabilities[np.arange(len(truth)), truth], EPSILON, 1))


def auroc(confidence: np.ndarray, correct: np.ndarray) -> float:
    """P(a right row has more confidence than a wrong one), ties one half; NaN when all or none are right."""
    confidence, correct = np.asarray(confidence), np.asarray(correct, dtype=bool)
    right, wrong = np.sort(confidence[correct]), np.sort(confidence[~correct])  # both: the search is faster
    if not len(right) or not len(wrong):
        return float("nan")
    below, up_to = (np.searchsorted(wrong, right, end).sum(dtype=float) for end in ("left", "right"))
    return float((below + up_to) / 2 / (len(right) * len(wrong)))


def risk_coverage(confidence: np.ndarray, correct: np.ndarray) -> np.ndarray:
    """The error rate among the k most confident rows, for k = 1 to n [n]; equal confidences count as their mean."""
    confidence, wrong = np.asarray(confidence), ~np.asarray(correct, dtype=bool)
    order = np.argsort(-confidence)
    first = np.flatnonzero(np.diff(confidence[order], prepend=np.inf))  # of each run of equal confidences
    rows = np.diff(first, append=len(order))
    errors = np.add.reduceat(wrong[order], first, dtype=float) / rows
    return np.cumsum(np.repeat(errors, rows)) / np.arange(1, len(order) + 1)


def area_under_risk_coverage(confidence: np.ndarray, correct: np.ndarray) -> float:
    """AURC: `risk_coverage` averaged over k. Geifman and El-Yaniv, NeurIPS 2017."""
    return float(np.mean(risk_coverage(confidence, correct)))


def isotonic_recalibration(confidence: np.ndarray, correct: np.ndarray) -> np.ndarray:
    """The non-decreasing function of these confidences that fits these rows best [n], by any proper score."""
    from scipy.optimize import isotonic_regression

    _, index, count = np.unique(confidence, return_inverse=True, return_counts=True)
    return isotonic_regression(np.bincount(index, correct) / count, weights=count).x[index]


def corp_decomposition(confidence: np.ndarray, correct: np.ndarray) -> dict[str, float]:
    """Brier = miscalibration - discrimination + uncertainty, by recalibrating with isotonic regression on these rows.

    Dimitriadis, Gneiting and Jordan, PNAS 2021. The first two are in-sample and a little too large on few rows;
    `refinement_split` is the held-out twin.
    """
    base = brier_score(np.full(len(correct), correct.mean()), correct)
    after = brier_score(isotonic_recalibration(confidence, correct), correct)
    return {
        "corp_miscalibration": brier_score(confidence, correct) - after,
        "corp_discrimination": base - after,
        "corp_uncertainty": base,
    }


def refinement_split(confidence: np.ndarray, recalibrated: np.ndarray, correct: np.ndarray) -> dict[str, float]:
    """Log loss = refinement (what the best calibration leaves) + calibration error. Berta et al., 2025 (2501.19195).

    Where `recalibrated` comes from calibrators that saw the rows, both are in-sample.
    """
    refinement = log_loss(recalibrated, correct)
    return {"refinement": refinement, "calibration_error": log_loss(confidence, correct) - refinement}


# The report row


def calibration_metrics(
    confidence: Sequence[float],
    correct: Sequence[bool],
    n_bins: int = N_BINS,
    groups: Sequence[object] | None = None,
    protocol: str = "nothing fitted",
    seed: int = 0,
) -> dict[str, float | int | str | None]:
    """Every number of a report row, flat; what is undefined on these rows is None.

    `protocol` says where the confidences come from: "nothing fitted" (the model's own), "out-of-fold", "held-out" or
    "in-sample". `groups` [n] keeps near-duplicates together in the bootstrap; without it each row is its own group.
    NAME_low and NAME_high are a 95 % interval, the bootstrap's percentiles; accuracy's is exact binomial where each row
    is its own group, else the wider of the two at either end.
    """
    confidence, correct = checked(confidence, correct)
    n = len(confidence)
    groups = np.arange(n) if groups is None else group_numbers(groups)
    if len(groups) != n:
        raise ValueError(f"{n} confidences, but {len(groups)} groups")
    n_groups, point = group_count(groups), _scores(confidence, correct)
    resampled = bootstrap_interval(lambda rows: [*_scores(confidence[rows], correct[rows]).values()], groups, seed=seed)
    intervals = dict(zip(point, resampled.tolist(), strict=True))
    low, high = exact_interval(correct.sum(), n)
    if n_groups < n:  # the exact interval takes rows for independent; the bootstrap of all right is a point
        low, high = min(low, intervals["accuracy"][0]), max(high, intervals["accuracy"][1])
    intervals["accuracy"] = low, high
    metrics = {"n": n, "groups": n_groups, "protocol": protocol, **point}
    metrics |= _errors(confidence, correct, n_bins, seed) | corp_decomposition(confidence, correct)
    for name, (low, high) in intervals.items():
        metrics |= {f"{name}_low": low, f"{name}_high": high}
    return {name: None if isinstance(value, float) and np.isnan(value) else value for name, value in metrics.items()}


def _scores(confidence: np.ndarray, correct: np.ndarray) -> dict[str, float]:
    """The numbers that get a bootstrap interval."""
    mean, accuracy = float(confidence.mean()), float(correct.mean())
    return {
        "accuracy": accuracy,
        "mean_confidence": mean,
        "gap": mean - accuracy,
        "brier": brier_score(confidence, correct),
        "log_loss": log_loss(confidence, correct),
        "log_loss_clipped": log_loss(confidence, correct, clip=1e-3),
        "auroc": auroc(confidence, correct),
        "aurc": area_under_risk_coverage(confidence, correct),
    }


def _errors(confidence: np.ndarray, correct: np.ndarray, n_bins: int, seed: int) -> dict[str, float | int | None]:
    """The calibration errors, beside those of a calibrated model: resampling rows would only add to their noise."""
    bins = bins_of(confidence, correct, n_bins)
    ece, if_calibrated = bins.mean_gap, consistency_resampling(confidence, n_bins, seed=seed)
    as_large = np.count_nonzero(if_calibrated >= ece - 1e-12)
    squared = debiased_calibration_error(confidence, correct, n_bins)
    mce, mce_count = bins.largest_gap()
    mce_counted, mce_counted_count = bins.largest_gap(MIN_COUNT)
    return {
        "ece": ece,
        "ece_noise_floor": float(if_calibrated.mean()),
        "ece_noise_95": float(np.quantile(if_calibrated, 0.95)),
        "ece_p_value": float((1 + as_large) / (1 + len(if_calibrated))),
        "ece_equal_mass": equal_mass_bins(confidence, correct).mean_gap,
        "ece_debiased": float(np.sqrt(max(squared, 0))),
        "ece_smooth": smooth_calibration_error(confidence, correct),
        "mce": mce,
        "mce_count": mce_count,
        f"mce_{MIN_COUNT}": mce_counted,
        f"mce_{MIN_COUNT}_count": mce_counted_count,
    }


def by_predicted_label(rows: Sequence[predictions.Prediction], score: str = "confidence") -> dict[str, dict]:
    """Rows, accuracy and mean confidence for each predicted label; a class bias does not show in the overall numbers.

    Gupta and Ramdas, "Top-label calibration and multiclass-to-binary reductions", ICLR 2022.
    """
    table = {}
    for label in sorted({row.prediction for row in rows if row.error is None}):
        confidence, correct = predictions.confidence_and_correct([r for r in rows if r.prediction == label], score)
        table[label] = {"n": len(confidence), "right": int(correct.sum()), "mean_confidence": float(confidence.mean())}
    return table


# Reliability diagrams


def reliability_bins(confidence: Sequence[float], correct: Sequence[bool], n_bins: int = N_BINS) -> list[dict]:
    """The bins of a reliability diagram that hold rows, each with the exact 95 % interval of its accuracy."""
    bins, table = bins_of(confidence, correct, n_bins), []
    for i in np.flatnonzero(bins.count).tolist():
        n, accuracy = int(bins.count[i]), float(bins.accuracy[i])
        low, high = exact_interval(round(accuracy * n), n)
        row = {"from": float(bins.edges[i]), "to": float(bins.edges[i + 1]), "n": n, "accuracy": accuracy}
        table.append(row | {"mean_confidence": float(bins.confidence[i]), "accuracy_low": low, "accuracy_high": high})
    return table


def plot_reliability_diagram(
    confidence: Sequence[float], correct: Sequence[bool], n_bins: int = N_BINS, ax: Axes | None = None
) -> Axes:
    """Accuracy against mean confidence, a dot a bin sized by its rows, with exact 95 % intervals and the diagonal."""
    if ax is None:
        from matplotlib.figure import Figure

        ax = Figure(figsize=(6, 6), layout="constrained").subplots()
    plotting.reliability_panel(ax, reliability_bins(confidence, correct, n_bins))
    return ax


# Command line

PROTOCOLS = {"confidence": "nothing fitted", "calibrated_confidence": "held-out"}  # of what --score measures


@dataclass(frozen=True)
class Line:
    """A line of the table: its title, the number of a report row it shows, and another beside it in parentheses."""

    title: str
    name: str
    decimals: int
    beside: str | None = None


LINES = (  # what a practitioner acts on
    Line("rows (groups)", "n", 0, "groups"),
    Line("accuracy", "accuracy", 3),
    Line("mean confidence", "mean_confidence", 3),
    Line("log loss (nats)", "log_loss", 3),
    Line("  calibration error, in-sample", "calibration_error", 3),
    Line("  refinement, in-sample", "refinement", 3),
    Line("ECE (expected if calibrated)", "ece", 4, "ece_noise_floor"),
    Line("MCE (rows in its bin)", "mce", 3, "mce_count"),
    Line("AUROC of confidence for correctness", "auroc", 3),
    Line("Brier score", "brier", 4),
)
MORE_LINES = (
    Line("  miscalibration, in-sample", "corp_miscalibration", 4),
    Line("  discrimination, in-sample", "corp_discrimination", 4),
    Line("  uncertainty", "corp_uncertainty", 4),
    Line("overconfidence", "gap", 3),
    Line("log loss clipped at 0.001", "log_loss_clipped", 3),
    Line("AURC, area under risk-coverage", "aurc", 4),
    Line("ECE, 95 % point if calibrated", "ece_noise_95", 4),
    Line("  p if calibrated", "ece_p_value", 3),
    Line("  equal-mass bins", "ece_equal_mass", 4),
    Line("  debiased (root of squares)", "ece_debiased", 4),
    Line("  smooth ECE", "ece_smooth", 4),
    Line(f"MCE of bins with {MIN_COUNT} rows or more (rows)", f"mce_{MIN_COUNT}", 3, f"mce_{MIN_COUNT}_count"),
)


def metrics_table(columns: Mapping[str, Mapping], lines: Sequence[Line]) -> str:
    """The numbers of each of `columns` (title -> metrics), a line each, with their intervals in brackets."""
    table = [["", *columns]]
    for line in lines:
        table.append([line.title, *(_cell(metrics, line) for metrics in columns.values())])
    return command_line.columns(table)


def _cell(metrics: Mapping, line: Line) -> str:
    def number(name: str) -> str:
        return f"{metrics[name]:,}" if isinstance(metrics[name], int) else f"{metrics[name]:.{line.decimals}f}"

    if metrics[line.name] is None:
        return "-"
    cell = number(line.name)
    if f"{line.name}_low" in metrics:
        cell += f" [{number(f'{line.name}_low')}, {number(f'{line.name}_high')}]"
    return f"{cell} ({number(line.beside)})" if line.beside else cell


def print_predicted_labels(rows: Sequence[predictions.Prediction], score: str) -> None:
    """Accuracy and mean confidence of each predicted label: where they differ, the model has a class bias.

    Of many labels those whose confidence is the furthest from their accuracy.
    """
    by_label = by_predicted_label(rows, score)
    apart = {label: abs(found["mean_confidence"] - found["right"] / found["n"]) for label, found in by_label.items()}
    shown = list(by_label) if len(by_label) <= MOST_LABELS else sorted(apart, key=apart.get)[: -MOST_LABELS - 1 : -1]
    for label in shown:
        found = by_label[label]
        numbers = f"mean confidence {found['mean_confidence']:.3f}"
        accuracy = exact_share(found["right"], found["n"]).shown()
        print(f"  predicted {command_line.printable(label)}: {found['n']:,} rows, {numbers}, accuracy {accuracy}")
    if len(shown) < len(by_label):
        print(f"  and {len(by_label) - len(shown)} predicted labels whose confidence is closer to their accuracy")


def draw_reliability(
    path: str, files: Mapping[str, Sequence[predictions.Prediction]], score: str, n_bins: int, seed: int
) -> None:
    """Write a picture with the reliability diagrams of several files (path -> scored rows), side by side."""
    sizes = ", ".join(f"{len(rows):,}" for rows in files.values())
    caption = (
        f"Reliability of the {score.replace('_', ' ')}, n = {sizes}, {PROTOCOLS[score]}. A dot is one of {n_bins} equal"
        " bins, with the exact 95 % interval of as many independent rows; its rows stand at the bottom."
    )
    height = max(4.6, 7.6 / len(files))
    with plotting.figure(path, caption, columns=len(files), height=height, sharey=True) as axes:
        for axis, (name, rows) in zip(axes[0], files.items(), strict=True):
            confidence, correct = predictions.confidence_and_correct(rows, score)
            plot_reliability_diagram(confidence, correct, n_bins, axis)
            ece = expected_calibration_error(confidence, correct, n_bins)
            expected = consistency_resampling(confidence, n_bins, seed=seed).mean()
            axis.set_title(f"{Path(name).stem}\nECE {ece:.3f}, {expected:.3f} if calibrated")


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_arguments(argv)
    files, columns = {}, {}
    for path in dict.fromkeys(args.files):
        files[path], failed = predictions.read_labelled(path, args.score)
        confidence, correct = predictions.confidence_and_correct(files[path], args.score)
        groups = tables.groups_of(files[path], args.groups)
        metrics = calibration_metrics(confidence, correct, args.n_bins, groups, PROTOCOLS[args.score], args.seed)
        columns[path] = metrics | refinement_split(confidence, isotonic_recalibration(confidence, correct), correct)
        scored = len(confidence)
        print(f"{command_line.printable(path)}: {scored:,} of {scored + failed:,} rows scored, {metrics['protocol']}")
        if args.verbose:
            print_predicted_labels(files[path], args.score)
    print("\n" + metrics_table(columns, LINES + MORE_LINES if args.verbose else LINES))
    if args.figure:
        draw_reliability(args.figure, files, args.score, args.n_bins, args.seed)
        print(args.figure)


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = command_line.ArgumentParser(__doc__)
    add = parser.add_argument
    add("files", metavar="PREDICTIONS", nargs="+", help="predictions files with labels")
    add("--score", default="confidence", choices=[*PROTOCOLS], help="what is measured")
    add("--n-bins", type=int, default=N_BINS, metavar="N", help=f"equal-width bins (default: {N_BINS})")
    tables.add_groups_argument(parser)
    add("--seed", type=command_line.natural, metavar="N", default=0, help="of the resampling (default: 0)")
    add("--verbose", action="store_true", help="every number, and those of each predicted label")
    add("--figure", metavar="PNG", help="write reliability diagrams there")
    args = parser.parse_args(argv)
    if args.figure and not args.figure.endswith(".png"):
        parser.error(f"--figure {args.figure}: a file name that ends in .png")
    if args.n_bins < 1:
        parser.error(f"--n-bins {args.n_bins}: at least one bin is needed")
    return args


if __name__ == "__main__":
    command_line.run(main)
