"""Are today's predictions still like those the calibrator was fitted on, and is what is automated still right?

    python scripts/monitor.py reference.jsonl today.jsonl --calibrator calibrator.json
    python scripts/monitor.py reference.jsonl today.jsonl --calibrator calibrator.json --target-accuracy 0.9 --looks 12

Three questions, from the cheapest to the one that counts:

1. Drift: do confidence and predicted labels still come as often? Population stability index over the reference's
   deciles against its own null distribution, and Kolmogorov and Smirnov's test. No labels needed.
2. Accuracy without labels, by three estimates. They hold only while P(right | confidence) stays what it was: they
   cannot see a task that changed, or a model that was exchanged behind its name.
3. Audit: of the automated rows of today that have a label (a small random sample, labelled by hand), are too many
   wrong? An exact test. Divide its risk by the number of looks at one promise, with --looks.

Recalibrate when the audit alarms; drift alone is a reason to audit. Exit code: 0, or 1 when the audit alarms.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import command_line  # noqa: E402
import predictions  # noqa: E402
from predictions import Prediction  # noqa: E402

FEWEST = 200  # rows of a window that can say anything about drift
BINS = 10


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_arguments(argv)
    reference, failed_before = read(args.reference, args)
    current, failed_now = read(args.current, args)
    if reference[0].fingerprint != current[0].fingerprint:
        raise ValueError(
            f"{args.reference} and {args.current} have the fingerprints {reference[0].fingerprint} and "
            f"{current[0].fingerprint}: another model, task or method is no drift; fit a new calibrator"
        )
    for name, rows, failed in (("reference", reference, failed_before), ("current", current, failed_now)):
        path = command_line.printable(getattr(args, name))
        print(f"{name} {path}: {len(rows):,} rows" + (f", {failed:,} more with an error" if failed else ""))
    if min(len(reference), len(current)) < FEWEST:
        print(f"fewer than {FEWEST} rows in a file: most drift would go unseen")
    print_drift(reference, current)
    print_estimates(reference, current, args)
    alarm = print_audit(current, args)
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
    add("--target-accuracy", type=float, default=0.9, metavar="A", help="promised of automated rows (default: 0.9)")
    add("--alpha", type=float, default=0.05, metavar="P", help="risk of a false alarm, over all looks (default: 0.05)")
    add("--looks", type=int, default=1, metavar="N", help="how often this promise is audited (default: 1)")
    add("--seed", type=command_line.natural, metavar="N", default=0, help="of the bootstrap (default: 0)")
    args = parser.parse_args(argv)
    for name in ("target_accuracy", "alpha"):
        if not 0 < getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} {getattr(args, name)}: between 0 and 1, both excluded")
    if not 1 <= args.looks <= 10**6:
        parser.error(f"--looks {args.looks}: from 1 to a million")
    if args.calibrator == "":
        parser.error("--calibrator needs a file name")
    if args.threshold is not None and not (args.calibrator and 0 <= args.threshold <= 1):
        parser.error("--threshold is a calibrated confidence between 0 and 1 and needs --calibrator")
    return args


def read(path: str, args: argparse.Namespace) -> tuple[list[Prediction], int]:
    """The scored rows of a file with the calibrator applied if one is given, and how many rows have an error."""
    if path == args.reference:
        rows, failed = predictions.read_labelled(path)
    else:
        everything = predictions.read(path)
        try:
            rows = predictions.one_fingerprint(everything)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
        failed = len(everything) - len(rows)
    if args.calibrator:
        from calibration import load_calibrator

        return load_calibrator(args.calibrator).apply(rows, args.threshold), failed
    for row in rows:
        if "calibrated_confidence" in row.extras:
            try:
                predictions.score_of(row, "calibrated_confidence")
            except ValueError as error:
                raise ValueError(f"{path}: {error}") from None
    return rows, failed


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


def print_drift(reference: list[Prediction], current: list[Prediction]) -> None:
    from scipy.stats import ks_2samp

    sides = [np.array([row.confidence for row in rows]) for rows in (reference, current)]
    labels = sorted({row.prediction for row in (*reference, *current)})
    counted = [Counter(row.prediction for row in rows) for rows in (reference, current)]
    named = [np.array([count[label] for label in labels], dtype=float) for count in counted]
    ks = ks_2samp(*sides)
    table = [["1. Drift", "reference", "current", "statistic", "p if nothing changed"]]
    index, p = population_stability_index(*decile_counts(*sides))
    means = [f"{side.mean():.3f}" for side in sides]
    table.append(["mean confidence, PSI of its deciles", *means, f"{index:.4f}", f"{p:.3g}"])
    table.append(["the same, Kolmogorov-Smirnov", "", "", f"{ks.statistic:.4f}", f"{ks.pvalue:.3g}"])
    if len(labels) > 1:
        index, p = population_stability_index(*named)
        shares = [", ".join(f"{c[label] / c.total():.1%} {label}" for label in labels) for c in counted]
        table.append(["predicted labels, PSI", *shares, f"{index:.4f}", f"{p:.3g}"])
    masses = [f"{np.mean([row.label_mass for row in rows]):.3f}" for rows in (reference, current)]
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


def print_estimates(reference: list[Prediction], current: list[Prediction], args: argparse.Namespace) -> None:
    """Three label-free estimates with a bootstrap over the rows of both files."""
    before, right = predictions.confidence_and_correct(reference)
    now = np.array([row.confidence for row in current])
    draw = np.random.default_rng(args.seed)
    drawn = []
    for _ in range(500):
        i, j = draw.integers(len(before), size=len(before)), draw.integers(len(now), size=len(now))
        drawn.append(estimates(before[i], right[i], now[j]))
    bands = np.quantile(drawn, [0.025, 0.975], axis=0).T
    names = ("change of mean confidence", "thresholded confidence")
    table = [["2. Accuracy today, estimated", "", "95 % band"]]
    for name, value, (low, high) in zip(names, estimates(before, right, now), bands, strict=True):
        table.append([name, f"{value:.3f}", f"[{low:.3f}, {high:.3f}]"])
    calibrated = [row.extras.get("calibrated_confidence") for row in current]
    if None in calibrated:
        table.append(["mean calibrated confidence", "-", "needs --calibrator"])
    else:
        means = [np.mean(draw.choice(calibrated, len(calibrated))) for _ in range(500)]
        low, high = np.quantile(means, [0.025, 0.975])
        table.append(["mean calibrated confidence", f"{np.mean(calibrated):.3f}", f"[{low:.3f}, {high:.3f}]"])
    print(f"\n{command_line.columns(table)}")
    print(
        f"reference accuracy {right.mean():.3f}, n = {len(right):,}; a change of P(right | confidence) is not seen here"
    )


# Audit


def print_audit(current: list[Prediction], args: argparse.Namespace) -> bool:
    """Test the labelled automated rows against the promise; True for an alarm."""
    from scipy.stats import binom

    from calibration_metrics import exact_interval

    print(f"\n3. Audit of the promise that {args.target_accuracy:.1%} of automated rows are right")
    if not any("decision" in row.extras for row in current):
        print("no row has a decision; --calibrator gives one")
        return False
    automated = [row for row in current if row.extras.get("decision") == "automate"]
    labelled = [row for row in automated if row.label is not None and not row.extras.get("fitted_on")]
    print(f"{len(automated):,} of {len(current):,} rows automated, {len(labelled):,} of them labelled")
    if seen := sum(bool(row.extras.get("fitted_on")) for row in automated):
        print(f"{seen:,} left out: the calibrator was fitted on their texts")
    needed = rows_for_power(args)
    if not labelled:
        print("nothing to test; label a random sample of " + (f"{needed:,} automated rows" if needed else "them"))
        return False
    n, right = len(labelled), sum(row.prediction == row.label for row in labelled)
    low, high = exact_interval(right, n)
    p = float(binom.cdf(right, n, args.target_accuracy))
    alarm = p <= args.alpha / args.looks
    print(f"{right:,} of {n:,} right, {right / n:.3f} [{low:.3f}, {high:.3f}]; so few by chance: p = {p:.3g}")
    print("ALARM: the promise is broken; recalibrate" if alarm else f"no alarm at {args.alpha / args.looks:.3g}")
    if needed and n < needed:
        print(f"a fall by ten points would be seen four times in five with {needed:,} labelled rows")
    return alarm


def rows_for_power(args: argparse.Namespace, fall: float = 0.1, power: float = 0.8) -> int | None:
    """The number of labelled rows from which on the test alarms with this power if the accuracy has fallen by `fall`.

    None when 5,000 are too few.
    """
    from scipy.stats import binom

    n, level = np.arange(5, 5001), args.alpha / args.looks
    most = binom.ppf(level, n, args.target_accuracy)  # smallest k with P(X <= k) >= level
    most -= binom.cdf(most, n, args.target_accuracy) > level
    enough = binom.cdf(most, n, max(args.target_accuracy - fall, 0)) >= power
    # The test is discrete and its power saws up and down: from here on it stays above.
    first = 0 if enough.all() else len(n) - int(np.argmin(enough[::-1]))
    return int(n[first]) if first < len(n) else None


if __name__ == "__main__":
    command_line.run(main)
