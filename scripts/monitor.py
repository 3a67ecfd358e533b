"""Are today's predictions still like those the calibrator was fitted on, and is what is automated still right?

    python scripts/monitor.py reference.jsonl today.jsonl --calibrator calibrator.json
    python scripts/monitor.py reference.jsonl today.jsonl --calibrator calibrator.json --target-accuracy 0.9 --looks 12

Three questions, from the cheapest to the one that counts:

1. Drift: do confidence and predicted labels still come as often? Population stability index over the reference's
   deciles against its own null distribution, and Kolmogorov and Smirnov's test. No labels needed.
2. Accuracy without labels, by three estimates. They hold only while P(right | confidence) stays what it was: they
   cannot see a task that changed, or a model that was exchanged behind its name.
3. Audit: of the automated rows of today that have a label (a small random sample, labelled by hand), are too many
   wrong? An exact test. Divide its risk by the number of looks at one guarantee, with --looks.

Recalibrate when the audit alarms; drift alone is a reason to audit. Exit code: 0, or 1 when the audit alarms.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import command_line  # noqa: E402
import predictions  # noqa: E402
import scoring  # noqa: E402
from predictions import Prediction  # noqa: E402

if TYPE_CHECKING:
    from calibration import FittedCalibrator

FEWEST = 200  # rows of a file that can say anything about drift
BINS = 10
N_RESAMPLES = 500


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_arguments(argv)
    calibrator = None
    if args.calibrator:
        from calibration import load_calibrator

        calibrator = load_calibrator(args.calibrator)
    predictions.read_labelled(args.reference)  # refuses a reference without labels
    reference, current = (read_scored(path, calibrator, args.threshold) for path in (args.reference, args.current))
    if reference[0].fingerprint != current[0].fingerprint:
        raise ValueError(
            f"{args.reference} and {args.current} have the fingerprints {reference[0].fingerprint} and "
            f"{current[0].fingerprint}: another model, task or method is no drift; fit a new calibrator"
        )
    print(f"reference {command_line.printable(args.reference)}: {len(reference):,} rows")
    print(f"current {command_line.printable(args.current)}: {len(current):,} rows")
    if min(len(reference), len(current)) < FEWEST:
        print(f"fewer than {FEWEST} rows in a file: most drift would go unseen")
    print_drift(reference, current)
    print_estimates(reference, current, args.seed)
    alarm = print_audit(current, args.target_accuracy, args.alpha / args.looks)
    sys.exit(1 if alarm else 0)


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = command_line.ArgumentParser(__doc__)
    add = parser.add_argument
    add("reference", metavar="REFERENCE", help="labelled predictions that the calibrator was not fitted on")
    add("current", metavar="CURRENT", help="today's predictions, the audited ones with a label")
    add("--calibrator", metavar="FILE", help="apply it to both first (else calibrated fields already there are used)")
    add(
        "--threshold", type=float, metavar="P", help="automate from this calibrated confidence on (default: the file's)"
    )
    add("--target-accuracy", type=float, default=0.9, metavar="A", help="guaranteed of automated rows (default: 0.9)")
    add("--alpha", type=float, default=0.05, metavar="P", help="risk of a false alarm, over all looks (default: 0.05)")
    add("--looks", type=int, default=1, metavar="N", help="how often this guarantee is audited (default: 1)")
    add("--seed", type=command_line.natural, metavar="N", default=0, help="of the bootstrap (default: 0)")
    args = parser.parse_args(argv)
    for name in ("target_accuracy", "alpha"):
        if not 0 < getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} {getattr(args, name)}: between 0 and 1, both excluded")
    if not 1 <= args.looks <= 10**6:
        parser.error(f"--looks {args.looks}: from 1 to a million")
    scoring.check_calibrator_arguments(parser, args)
    return args


def read_scored(path: str, calibrator: FittedCalibrator | None, threshold: float | None) -> list[Prediction]:
    """The scored rows of a file with the calibrator applied; without one, with the calibrated confidences they have."""
    everything = predictions.read(path)
    try:
        rows = predictions.one_fingerprint(everything)
        for row in rows:
            if not calibrator and "calibrated_confidence" in row.extras:
                predictions.score_of(row, "calibrated_confidence")
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    if failed := len(everything) - len(rows):
        print(f"{command_line.printable(path)}: {failed:,} rows with an error left out")
    return calibrator.apply(rows, threshold) if calibrator else rows


# Drift


def population_stability_index(reference: np.ndarray, current: np.ndarray) -> tuple[float, float]:
    """(PSI, its p-value) of counts [bins]: sum (q - p) ln(q / p), half a row added to each bin.

    Without drift it is about (1/n + 1/m) chi-square with bins - 1 degrees of freedom (Yurdakul, 2018), which grows as
    the files shrink; the customary limits of 0.1 and 0.25 ignore that.
    """
    from scipy.stats import chi2

    if len(reference) < 2:
        return 0.0, 1.0  # all in one bin
    n, m = reference.sum(), current.sum()
    p, q = ((counts + 0.5) / (counts + 0.5).sum() for counts in (reference, current))
    index = float(np.sum((q - p) * np.log(q / p)))
    return index, float(chi2.sf(index / (1 / n + 1 / m), len(reference) - 1))


def decile_counts(reference: np.ndarray, current: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """How many values of each fall between the reference's deciles, [bins] each; equal values stay together."""
    edges = np.unique(np.quantile(reference, np.arange(1, BINS) / BINS, method="inverted_cdf"))
    edges = edges[edges > reference.min()]  # nothing of the reference lies below its least value
    return tuple(
        np.bincount(np.searchsorted(edges, v, side="right"), minlength=len(edges) + 1) for v in (reference, current)
    )


def print_drift(reference: Sequence[Prediction], current: Sequence[Prediction]) -> None:
    from scipy.stats import ks_2samp

    files = (reference, current)
    confidences = [np.array([row.confidence for row in rows]) for rows in files]
    means = [f"{confidence.mean():.3f}" for confidence in confidences]
    index, p = population_stability_index(*decile_counts(*confidences))
    ks = ks_2samp(*confidences)
    table = [["1. Drift", "reference", "current", "statistic", "p if nothing changed"]]
    table.append(["mean confidence, PSI of its deciles", *means, f"{index:.4f}", f"{p:.3g}"])
    table.append(["the same, Kolmogorov-Smirnov", "", "", f"{ks.statistic:.4f}", f"{ks.pvalue:.3g}"])
    labels = sorted({row.prediction for rows in files for row in rows})
    if len(labels) > 1:
        counts = [Counter(row.prediction for row in rows) for rows in files]
        index, p = population_stability_index(*(np.array([float(c[label]) for label in labels]) for c in counts))
        shares = [", ".join(f"{c[label] / c.total():.1%} {label}" for label in labels) for c in counts]
        table.append(["predicted labels, PSI", *shares, f"{index:.4f}", f"{p:.3g}"])
    masses = [f"{np.mean([row.label_mass for row in rows]):.3f}" for rows in files]
    table.append(["mean label mass", *masses, "", ""])
    print("\n" + command_line.columns(table))


# Accuracy without labels


def estimates(reference: np.ndarray, right: np.ndarray, current: np.ndarray) -> tuple[float, float]:
    """(difference of confidences, average thresholded confidence): two estimates of the current accuracy.

    DoC: reference accuracy + change of mean confidence (Guillory et al., ICCV 2021). ATC: the share of current rows
    above the confidence that as large a share of reference rows exceeded as were right (Garg et al., ICLR 2022).
    """
    accuracy = right.mean()
    threshold = np.quantile(reference, 1 - accuracy)
    return float(np.clip(accuracy + current.mean() - reference.mean(), 0, 1)), float(np.mean(current >= threshold))


def print_estimates(reference: Sequence[Prediction], current: Sequence[Prediction], seed: int) -> None:
    """Three label-free estimates with a bootstrap over the rows of both files."""
    before, right = predictions.confidence_and_correct(reference)
    now = np.array([row.confidence for row in current])
    draw, drawn = np.random.default_rng(seed), []
    for _ in range(N_RESAMPLES):
        i, j = draw.integers(len(before), size=len(before)), draw.integers(len(now), size=len(now))
        drawn.append(estimates(before[i], right[i], now[j]))
    by_difference, by_threshold = np.transpose(drawn)
    difference, thresholded = estimates(before, right, now)
    table = [["2. Accuracy today, estimated", "", "95 % band"]]
    table.append(["change of mean confidence", f"{difference:.3f}", band(by_difference)])
    table.append(["thresholded confidence", f"{thresholded:.3f}", band(by_threshold)])
    calibrated = [row.extras.get("calibrated_confidence") for row in current]
    if None in calibrated:
        table.append(["mean calibrated confidence", "-", "needs --calibrator"])
    else:
        means = [np.mean(draw.choice(calibrated, len(calibrated))) for _ in range(N_RESAMPLES)]
        table.append(["mean calibrated confidence", f"{np.mean(calibrated):.3f}", band(means)])
    print(f"\n{command_line.columns(table)}")
    print(
        f"reference accuracy {right.mean():.3f}, n = {len(right):,}; a change of P(right | confidence) is not seen here"
    )


def band(values: Sequence[float]) -> str:
    low, high = np.quantile(values, [0.025, 0.975])
    return f"[{low:.3f}, {high:.3f}]"


# Audit


def print_audit(current: Sequence[Prediction], target_accuracy: float, level: float) -> bool:
    """Test the labelled automated rows against the guarantee, at this risk of a false alarm; True for an alarm."""
    from scipy.stats import binom

    from calibration_metrics import exact_interval

    print(f"\n3. Audit of the guarantee that {target_accuracy:.1%} of automated rows are right")
    if not any("decision" in row.extras for row in current):
        print("no row has a decision; --calibrator gives one")
        return False
    automated = [row for row in current if row.extras.get("decision") == "automate"]
    labelled = [row for row in automated if row.label is not None and not row.extras.get("fitted_on")]
    print(f"{len(automated):,} of {len(current):,} rows automated, {len(labelled):,} of them labelled")
    if seen := sum(bool(row.extras.get("fitted_on")) for row in automated):
        print(f"{seen:,} left out: the calibrator was fitted on their texts")
    needed = rows_for_power(target_accuracy, level)
    if not labelled:
        print("nothing to test; label a random sample of " + (f"{needed:,} automated rows" if needed else "them"))
        return False
    n, right = len(labelled), sum(row.prediction == row.label for row in labelled)
    low, high = exact_interval(right, n)
    p = float(binom.cdf(right, n, target_accuracy))
    print(f"{right:,} of {n:,} right, {right / n:.3f} [{low:.3f}, {high:.3f}]; so few by chance: p = {p:.3g}")
    print("ALARM: the guarantee is broken; recalibrate" if p <= level else f"no alarm at {level:.3g}")
    if needed and n < needed:
        print(f"a fall by ten points would be seen four times in five with {needed:,} labelled rows")
    return p <= level


def rows_for_power(target_accuracy: float, level: float, fall: float = 0.1, power: float = 0.8) -> int | None:
    """The number of labelled rows from which on the test alarms with this power if the accuracy has fallen by `fall`.

    None when 5,000 are too few.
    """
    from scipy.stats import binom

    n = np.arange(5, 5001)
    most = binom.ppf(level, n, target_accuracy)  # smallest k with P(X <= k) >= level
    most -= binom.cdf(most, n, target_accuracy) > level
    enough = binom.cdf(most, n, max(target_accuracy - fall, 0)) >= power
    # The test is discrete and its power saws up and down: from here on it stays above.
    first = 0 if enough.all() else len(n) - int(np.argmin(enough[::-1]))
    return int(n[first]) if first < len(n) else None


if __name__ == "__main__":
    command_line.run(main)
