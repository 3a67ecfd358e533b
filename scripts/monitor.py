"""Are today's predictions still like those the calibrator was fitted on, and is what is automated still right?

    python scripts/monitor.py reference.jsonl today.jsonl --calibrator calibrator.json
    python scripts/monitor.py reference.jsonl today.jsonl --calibrator calibrator.json --state audit.json

Three questions, from the cheapest to the one that counts:

1. Drift: do confidence and predicted labels still come as often? Population stability index over the reference's
   deciles, and Kolmogorov and Smirnov's test, against what they show when whole groups are shuffled between the files:
   rows that belong together (--groups, else near-duplicate texts) would otherwise pass for drift. No labels needed.
2. Accuracy without labels, by three estimates. They hold only while P(right | confidence) stays what it was: they
   cannot see a task that changed, or a model that was exchanged behind its name.
3. Audit: of the automated rows of today that have a label (a small random sample, labelled by hand), are too many
   wrong? --state keeps the evidence between looks, of which there may be any number: the risk of ever raising a false
   alarm is that of the guarantee. Target, certainty and threshold are the calibrator file's. A row counts once, so a
   command may be repeated.

The reference must not be what the calibrator was fitted on: split a labelled table in two first. Recalibrate when the
audit alarms; drift alone is a reason to audit. Exit code: 0, 1 when the audit has alarmed, 2 for bad input.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import command_line  # noqa: E402
import predictions  # noqa: E402
import scoring  # noqa: E402
import tables  # noqa: E402
from calibration_metrics import exact_share, group_numbers, resamples  # noqa: E402
from predictions import Prediction  # noqa: E402

if TYPE_CHECKING:
    from calibration import FittedCalibrator
    from guarantee_audit import AuditedRow, AuditState

FEWEST = 200  # rows of a file that can say anything about drift
BINS = 10
N_RESAMPLES = 500
N_SHUFFLES = 999
SHOWN_LABELS = 8  # of many those whose share has moved the most
MANY_ROWS, N_SHUFFLES_OF_MANY = 50_000, 199
ALPHA = 0.05  # of a guarantee that has no risk of its own


@dataclass(frozen=True)
class Watched:
    """The scored rows of a file, and the number of each one's group [n]; no number is in both files."""

    rows: list[Prediction]
    groups: np.ndarray


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_arguments(argv)
    calibrator = None
    if args.calibrator:
        from calibration import load_calibrator

        calibrator = load_calibrator(args.calibrator)
    predictions.read_labelled(args.reference)  # refuses a reference without labels
    rows = [read_scored(path, calibrator, args.threshold) for path in (args.reference, args.current)]
    check_pair(*rows, args.reference, args.current)
    targets, alpha = audited_targets(calibrator, args.threshold, args.target_accuracy, args.alpha)
    state = audit_state(rows[1], calibrator, args.threshold, targets, alpha, args.state)
    reference, current = in_groups(*rows, args.groups)
    for name, path, watched in (("reference", args.reference, reference), ("current", args.current, current)):
        groups = len(np.unique(watched.groups))
        print(f"{name} {command_line.printable(path)}: {len(watched.rows):,} rows in {groups:,} groups")
    if min(len(reference.rows), len(current.rows)) < FEWEST:
        print(f"fewer than {FEWEST} rows in a file: most drift would go unseen")
    print_drift(reference, current, args.seed)
    print_estimates(reference, current, args.seed)
    after = print_audit(current, state, calibrator)
    if args.state and after != state:
        from guarantee_audit import save_state

        save_state(args.state, after)
    sys.exit(0 if after is None or after.alarm_at is None else 1)


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = command_line.ArgumentParser(__doc__)
    add = parser.add_argument
    add("reference", metavar="REFERENCE", help="labelled predictions that the calibrator was not fitted on")
    add("current", metavar="CURRENT", help="today's predictions, the audited ones with a label")
    add("--calibrator", metavar="FILE", help="apply it to both first (else calibrated fields already there are used)")
    add("--threshold", type=float, metavar="P", help="automate from this confidence on (default: the calibrator's)")
    tables.add_groups_argument(parser)
    add("--state", metavar="FILE", help="keep the evidence of the audit in this file, for the next look")
    add("--target-accuracy", type=float, metavar="A", help="guaranteed of automated rows (default: the calibrator's)")
    add("--alpha", type=float, metavar="P", help="risk of a false alarm, ever (default: 1 - the certainty, or 0.05)")
    add("--seed", type=command_line.natural, metavar="N", default=0, help="of shuffles and bootstrap (default: 0)")
    args = parser.parse_args(argv)
    for name in ("target_accuracy", "alpha"):
        if (value := getattr(args, name)) is not None and not 0 < value < 1:
            parser.error(f"--{name.replace('_', '-')} {value}: between 0 and 1, both excluded")
    if args.state is not None:
        predictions.check_output(args.state)
    scoring.check_calibrator_arguments(parser, args)
    return args


# The two files


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


def check_pair(
    reference: Sequence[Prediction], current: Sequence[Prediction], reference_name: str, current_name: str
) -> None:
    """ValueError for files that cannot be compared, and for a reference that the calibrator was fitted on."""
    if reference[0].fingerprint != current[0].fingerprint:
        raise ValueError(
            f"{reference_name} and {current_name} have the fingerprints {reference[0].fingerprint} and "
            f"{current[0].fingerprint}: another model, task or method is no drift; fit a new calibrator"
        )
    if seen := sum(bool(row.extras.get("fitted_on")) for row in reference):
        raise ValueError(
            f"{reference_name}: the calibrator was fitted on {seen:,} of its {len(reference):,} texts, on which it "
            "looks better than it is; take a part of the labelled rows that it has not seen (scripts/split_table.py)"
        )


def in_groups(reference: list[Prediction], current: list[Prediction], table: str | None) -> tuple[Watched, Watched]:
    """Both files with their groups. What a group has in each file stays together there."""
    numbers = group_numbers(tables.groups_of([*reference, *current], table))
    files = np.repeat([0, 1], [len(reference), len(current)])
    units = group_numbers(2 * numbers + files)
    return Watched(reference, units[: len(reference)]), Watched(current, units[len(reference) :])


# Drift


def population_stability_index(reference: np.ndarray, current: np.ndarray) -> float:
    """PSI of counts [bins]: sum (q - p) ln(q / p), half a row added to each bin.

    Without drift it is about (1/n + 1/m) chi-square with bins - 1 degrees of freedom for independent rows (Yurdakul,
    2018), which grows as the files shrink, and more so where rows are alike; the customary limits of 0.1 and 0.25
    ignore that.
    """
    p, q = ((counts + 0.5) / (counts + 0.5).sum() for counts in (reference, current))
    return float(np.sum((q - p) * np.log(q / p)))


def decile_counts(reference: np.ndarray, current: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """How many values of each fall between the reference's deciles, [bins] each; equal values stay together."""
    edges = np.unique(np.quantile(reference, np.arange(1, BINS) / BINS, method="inverted_cdf"))
    edges = edges[edges > reference.min()]  # nothing of the reference lies below its least value
    return tuple(
        np.bincount(np.searchsorted(edges, v, side="right"), minlength=len(edges) + 1) for v in (reference, current)
    )


def kolmogorov_smirnov(reference: np.ndarray, current: np.ndarray) -> float:
    """The largest distance between the two shares of values up to a value."""
    values = np.sort(np.concatenate([reference, current]), kind="stable")
    sides = (np.sort(side, kind="stable") for side in (reference, current))
    one, two = (np.searchsorted(side, values, side="right") / len(side) for side in sides)
    return float(np.abs(one - two).max())


def shuffled_p_values(
    statistics: Callable[[np.ndarray], Sequence[float]], reference: Watched, current: Watched, seed: int
) -> list[float]:
    """P(a statistic as large | nothing changed), of each: whole groups are shuffled between the files.

    `statistics` takes which rows of both files together are the reference's, bool [n + m]. If groups come from one
    stream, every way to divide them is as likely as the one that was found, so no p-value is too small, whatever rows
    of a group have in common: (1 + how many are as large) / (1 + shuffles).
    """
    units = np.concatenate([reference.groups, current.groups])
    is_reference = np.zeros(units.max() + 1, dtype=bool)
    is_reference[reference.groups] = True
    found, draw = np.array(statistics(is_reference[units])), np.random.default_rng(seed)
    shuffles = N_SHUFFLES if len(units) <= MANY_ROWS else N_SHUFFLES_OF_MANY
    as_large = sum(
        np.array(statistics(draw.permutation(is_reference)[units])) >= found - 1e-12 for _ in range(shuffles)
    )
    return ((1 + as_large) / (1 + shuffles)).tolist()


def drift_statistics(confidence: np.ndarray, predicted: np.ndarray, is_reference: np.ndarray) -> list[float]:
    """PSI of the confidences' deciles, Kolmogorov-Smirnov of them, and PSI of the predicted labels' numbers."""
    sides = confidence[is_reference], confidence[~is_reference]
    counts = [
        np.bincount(side, minlength=predicted.max() + 1) for side in (predicted[is_reference], predicted[~is_reference])
    ]
    return [
        population_stability_index(*decile_counts(*sides)),
        kolmogorov_smirnov(*sides),
        population_stability_index(*counts),
    ]


def print_drift(reference: Watched, current: Watched, seed: int) -> None:
    files = reference.rows, current.rows
    confidence = np.array([row.confidence for rows in files for row in rows])
    labels = sorted({row.prediction for rows in files for row in rows})
    number = {label: number for number, label in enumerate(labels)}
    predicted = np.array([number[row.prediction] for rows in files for row in rows])

    order = np.argsort(confidence, kind="stable")  # what is sorted already is soon sorted again

    def statistics(is_reference: np.ndarray) -> list[float]:
        return drift_statistics(confidence[order], predicted[order], is_reference[order])

    found = statistics(np.arange(len(confidence)) < len(reference.rows))
    p_values = shuffled_p_values(statistics, reference, current, seed)
    cells = [[f"{statistic:.4f}", f"{p:.3g}"] for statistic, p in zip(found, p_values, strict=True)]
    means = [f"{np.mean([row.confidence for row in rows]):.3f}" for rows in files]
    table = [["1. Drift", "reference", "current", "statistic", "p if nothing changed"]]
    table.append(["mean confidence, PSI of its deciles", *means, *cells[0]])
    table.append(["the same, Kolmogorov-Smirnov", "", "", *cells[1]])
    if len(labels) > 1:
        counts = [Counter(row.prediction for row in rows) for rows in files]
        moved = {label: abs(np.subtract(*(c[label] / c.total() for c in counts))) for label in labels}
        shown = (
            labels if len(labels) <= SHOWN_LABELS else sorted(labels, key=lambda label: -moved[label])[:SHOWN_LABELS]
        )
        shares = [", ".join(f"{c[label] / c.total():.1%} {label}" for label in shown) for c in counts]
        table.append(["predicted labels, PSI", *shares, *cells[2]])
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


def print_estimates(reference: Watched, current: Watched, seed: int) -> None:
    """Three label-free estimates with a bootstrap over the groups of both files."""
    before, right = predictions.confidence_and_correct(reference.rows)
    now = np.array([row.confidence for row in current.rows])

    def redrawn() -> Iterator[np.ndarray]:  # row numbers; all samples at once would fill the memory
        return resamples(current.groups, N_RESAMPLES, seed + 1)

    pairs = zip(resamples(reference.groups, N_RESAMPLES, seed), redrawn(), strict=True)
    by_difference, by_threshold = np.transpose([estimates(before[i], right[i], now[j]) for i, j in pairs])
    difference, thresholded = estimates(before, right, now)
    table = [["2. Accuracy today, estimated", "", "95 % band"]]
    table.append(["change of mean confidence", f"{difference:.3f}", band(by_difference)])
    table.append(["thresholded confidence", f"{thresholded:.3f}", band(by_threshold)])
    calibrated = [row.extras.get("calibrated_confidence") for row in current.rows]
    if None in calibrated:
        table.append(["mean calibrated confidence", "-", "needs --calibrator"])
    else:
        calibrated = np.array(calibrated)
        means = [calibrated[rows].mean() for rows in redrawn()]
        table.append(["mean calibrated confidence", f"{calibrated.mean():.3f}", band(means)])
    print(f"\n{command_line.columns(table)}")
    print(
        f"reference accuracy {right.mean():.3f}, n = {len(right):,}; a change of P(right | confidence) is not seen here"
    )


def band(values: Sequence[float]) -> str:
    low, high = np.quantile(values, [0.025, 0.975])
    return f"[{low:.3f}, {high:.3f}]"


# Audit


def audited_targets(
    calibrator: FittedCalibrator | None, threshold: float | None, target_accuracy: float | None, alpha: float | None
) -> tuple[dict[str, float], float]:
    """The guaranteed accuracy of all automated rows, or of those of each predicted label; and the risk of an alarm.

    Those of the calibrator file, unless they are given. ValueError without both.
    """
    from guarantee_audit import EVERYTHING

    records = {}
    if calibrator and calibrator.label_thresholds:
        records = {
            label: record for label, record in calibrator.label_thresholds.items() if record["value"] is not None
        }
    elif calibrator and calibrator.threshold and (calibrator.threshold["value"] is not None or threshold is not None):
        records = {EVERYTHING: calibrator.threshold}
    targets = {name: record["target_accuracy"] for name, record in records.items()}
    if target_accuracy is not None:
        targets = {EVERYTHING: target_accuracy}
    if alpha is None:
        deltas = [record["delta"] for record in records.values() if record.get("delta") is not None]
        alpha = max(deltas, default=ALPHA)
    return targets, alpha


def audit_state(
    current: Sequence[Prediction],
    calibrator: FittedCalibrator | None,
    threshold: float | None,
    targets: dict[str, float],
    alpha: float,
    path: str | None,
) -> AuditState | None:
    """The evidence so far: that of the state file if there is one. None where no target is known."""
    from guarantee_audit import load_state, new_state

    if not targets:
        return None
    thresholds = calibrator.thresholds(threshold) if calibrator else None
    guarantee = predictions.fingerprint(of=current[0].fingerprint, thresholds=thresholds, targets=targets)
    state = new_state(guarantee, targets, alpha)
    return load_state(path, state) if path and Path(path).exists() else state


def rows_to_audit(current: Watched) -> list[AuditedRow]:
    """The labelled automated rows that may count, and a line on those that may not."""
    from guarantee_audit import AuditedRow

    pairs = [*zip(current.rows, current.groups.tolist(), strict=True)]
    automated = [AuditedRow(row, group) for row, group in pairs if row.extras.get("decision") == "automate"]
    labelled = [each for each in automated if each.row.label is not None]
    print(f"{len(automated):,} of {len(current.rows):,} rows automated, {len(labelled):,} of them labelled")
    fair = []
    fitted = chosen = 0
    for each in labelled:
        if each.row.extras.get("fitted_on"):
            fitted += 1
        elif each.row.extras.get("purpose") == "chosen":
            chosen += 1
        else:
            fair.append(each)
    if fitted:
        print(f"{fitted:,} left out: the calibrator was fitted on their texts")
    if chosen:
        print(f"{chosen:,} left out: they were chosen to be labelled, so they are no random sample")
    return fair


def print_audit(current: Watched, state: AuditState | None, calibrator: FittedCalibrator | None) -> AuditState | None:
    """Add today's labelled automated rows to the evidence against each guarantee, and say what there is now."""
    from guarantee_audit import after_look, unseen

    print("\n3. Audit of what is guaranteed")
    if not any("decision" in row.extras for row in current.rows):
        print("no row has a decision; --calibrator gives one")
        return state
    if state is None:
        print("nothing is guaranteed, so there is nothing to audit; --target-accuracy audits a target of yours")
        return None
    rows = rows_to_audit(current)
    after, new = after_look(state, rows), unseen(state, rows)
    if known := len(rows) - len(new):
        print(f"{known:,} of them have counted before")
    print_evidence(after)
    if calibrator and calibrator.threshold and calibrator.threshold.get("kind") == "average":
        print("a threshold that is right on average over labelled sets is below its target about every second time")
    if after.alarm_at is not None:
        print(f"ALARM at look {after.alarm_at}: the guarantee is broken; recalibrate, and begin a new --state file")
    elif not new:
        print("nothing new to count; label a random sample of the automated rows")
    else:
        print(f"no alarm at look {after.looks}; it takes evidence of {after.alarm_level:.4g}")
    return after


def print_evidence(state: AuditState) -> None:
    """Of each guarantee: rows so far, how many are right, the evidence, and how many rows an alarm would take."""
    from guarantee_audit import rows_until_alarm

    table = [["", "guaranteed", "labelled", "right so far", "evidence", "alarm if ten points fewer are right"]]
    for name, audited in state.audited.items():
        cells = [name, f"{audited.target:.1%}", f"{audited.rows:,}", "-", f"{audited.e_value:.3g}"]
        if audited.rows:
            cells[3] = exact_share(audited.right, audited.rows).shown()
        half, most = rows_until_alarm(audited.target, 1 / state.alarm_level, max(audited.target - 0.1, 0.0))
        delay = f"by {half:.0f} labelled rows in half of all cases" if half < np.inf else "rather late"
        table.append([*cells, delay + (f", by {most:.0f} in four of five" if most < np.inf else "")])
    print(command_line.columns(table))


if __name__ == "__main__":
    command_line.run(main)
