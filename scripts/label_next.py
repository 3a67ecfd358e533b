"""Which rows to label next: some at random, some chosen because they are uncertain or near the threshold.

    python scripts/label_next.py predictions.jsonl --n 50 --output to_label.csv
    python scripts/label_next.py new.jsonl --calibrator calibrator.json --table new.csv --n 100 --output to_label.csv
    python scripts/label_next.py --simulate data/predictions/base_calibration.jsonl data/predictions/base_test.jsonl

From a predictions file whose rows have no labels, a table to be filled in: id, text (or with --table all columns of the
table that was scored), an empty label, and `purpose`.

    random   drawn from all unlabelled rows. Only these may be used to calibrate, to measure and for guarantees: what is
             said of all rows is true of a random sample of them, and of no other.
    chosen   the least certain rows, and those nearest the threshold in turn, no near-duplicate among them. They are
             harder than the rest, so an accuracy, a calibrator's report or a threshold from them is of other rows than
             yours (selection breaks exchangeability). They may be shown as examples and trained on.

The model's answers are left out, since a person who sees them tends to agree. The order is random, so one may stop
early. What choosing does to a calibrator and a guarantee can be tried on labelled files with --simulate: on ours it
hardly changes the one, and costs the other.
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import command_line  # noqa: E402
import predictions  # noqa: E402
import tables  # noqa: E402
from command_line import natural, printable  # noqa: E402
from files import whole_file  # noqa: E402
from near_duplicates import duplicate_groups  # noqa: E402
from predictions import Prediction  # noqa: E402

SIZES = (50, 100, 200)  # labels that the simulation buys
REPEATS = 200


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = command_line.ArgumentParser(__doc__)
    add = parser.add_argument
    add("predictions", metavar="PREDICTIONS", nargs="?", help="a predictions file of unlabelled rows (.jsonl)")
    add("--n", type=natural, default=50, metavar="N", help="rows to label (default: %(default)s)")
    add("--output", metavar="FILE", help="the table to write (.csv)")
    add("--random-share", type=float, default=0.5, metavar="P", help="of the rows drawn at random (default: 0.5)")
    add("--calibrator", metavar="FILE", help="near the threshold of this calibrator's file, by calibrated confidence")
    add("--threshold", type=float, metavar="P", help="near this (calibrated) confidence")
    add("--table", metavar="FILE", help="the table that was scored, for its columns")
    add("--simulate", metavar="FILE", nargs=2, help="labelled predictions to choose from, and others to judge by")
    add("--overwrite", action="store_true", help="replace a table in which labels are filled in, or another one")
    add("--target-accuracy", type=float, default=0.8, metavar="P", help="guaranteed in --simulate (default: 0.8)")
    tables.add_column_arguments(parser.add_argument_group("how --table is read, and --seed"))
    args = parser.parse_args(argv)
    if bool(args.simulate) == bool(args.predictions):
        parser.error("give either a predictions file, or --simulate with two labelled ones")
    if args.predictions and not (args.output or "").endswith(".csv"):
        parser.error("--output FILE.csv is needed: the table to be filled in")
    if args.n < 1 or not 0 <= args.random_share <= 1:
        parser.error("--n is at least 1, --random-share between 0 and 1")
    if args.threshold is not None and not 0 <= args.threshold <= 1:
        parser.error("--threshold is a confidence between 0 and 1")
    return args


# Choosing


@dataclass(frozen=True)
class Unlabelled:
    """Rows to choose from, as arrays: a confidence each, calibrated or not, and the group of its near-duplicates."""

    confidence: np.ndarray  # [n]
    groups: np.ndarray  # [n]
    threshold: float | None


def unlabelled_rows(
    rows: Sequence[Prediction], calibrator_path: str | None = None, threshold: float | None = None
) -> Unlabelled:
    """Scored rows with what decides about them: the calibrated confidence and its threshold, or the model's own."""
    confidence = np.array([row.confidence for row in rows])
    if calibrator_path:
        from calibration import load_calibrator

        calibrator = load_calibrator(calibrator_path)
        confidence = calibrator.calibrate(rows)
        if threshold is None and calibrator.threshold:
            threshold = calibrator.threshold["value"]
    groups = np.array(duplicate_groups([row.text for row in rows]))
    return Unlabelled(confidence, groups, threshold)


def choose_rows(found: Unlabelled, n: int, n_random: int, draw: np.random.Generator) -> dict[int, str]:
    """{row number: "random" or "chosen"} of n rows, or of all that there are, in a random order.

    The random ones are drawn first, from all rows: what is drawn from the rest would lack the uncertain ones.
    """
    total = len(found.confidence)
    purpose = dict.fromkeys(draw.permutation(total)[: min(n_random, total)].tolist(), "random")
    taken = set(found.groups[list(purpose)].tolist())
    rankings = [np.argsort(found.confidence, kind="stable").tolist()]
    if found.threshold is not None:
        rankings.append(np.argsort(np.abs(found.confidence - found.threshold), kind="stable").tolist())
    turns = (number for numbers in zip(*rankings, strict=True) for number in numbers)
    for number in turns:
        if len(purpose) >= n:
            break
        if found.groups[number] not in taken:
            purpose[number] = "chosen"
            taken.add(int(found.groups[number]))
    order = draw.permutation(list(purpose)).tolist()
    return {number: purpose[number] for number in order}


# Writing


def check_unfilled(path: Path, label: str) -> None:
    """ValueError where a table is there that this script has not made, or in which somebody has labelled rows."""
    if not path.exists():
        return
    try:
        rows = [row for _, row in tables.read_rows(path)]
    except ValueError:
        rows = [{}]
    if any("purpose" not in row for row in rows):
        raise ValueError(f"{path} is there already, and no table of rows to label; use --overwrite to replace it")
    if filled := sum(bool((row.get(label) or "").strip()) for row in rows):
        raise ValueError(
            f"{path} has {filled:,} rows with a label; name another --output, or use --overwrite to replace it"
        )


def write_chosen(path: Path, rows: Sequence[Mapping[str, object]], purposes: Sequence[str], label: str) -> None:
    """The table to fill in: the rows' own columns, an empty label, and what each row may be used for."""
    names = list(rows[0])
    if "purpose" in names:
        raise ValueError("the table has a column called purpose already; rename it")
    names += [name for name in (label, "purpose") if name not in names]
    with whole_file(path) as scratch, open(scratch, "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        for row, purpose in zip(rows, purposes, strict=True):
            writer.writerow({**row, label: "", "purpose": purpose})


def own_columns(rows: Sequence[Prediction], table: tables.Table | None) -> list[Mapping[str, object]]:
    """What the table to fill in repeats of each row: id and text, or all columns of the table that was scored."""
    if table is None:
        return [{"id": row.id, "text": row.text} for row in rows]
    wanted, found = {row.id: row.text for row in rows}, {}
    for example, columns in table.with_columns():
        if example.id in wanted:
            if example.text != wanted[example.id]:
                raise ValueError(f"row {example.id!r} has another text in {table.source}: is it the table scored?")
            found[example.id] = columns
    if lost := [row.id for row in rows if row.id not in found]:
        raise ValueError(f"{len(lost):,} rows are not in {table.source}, the first is {lost[0]!r}")
    return [found[row.id] for row in rows]


# Does choosing help?


def simulate(
    fit: Sequence[Prediction], test: Sequence[Prediction], threshold: float, target_accuracy: float, seed: int
) -> list[list[str]]:
    """A table: labels bought at random, half of them chosen, or all, and what became of a calibrator and a guarantee.

    Of REPEATS draws each: the mean log loss on the test rows of a Platt calibrator, its difference from random labels
    with the middle 95 % of draws; the draws with a threshold that guarantees the target, and those of them whose test
    accuracy misses it.
    """
    from calibration import PlattScalingCalibrator
    from calibration_metrics import log_loss
    from decisions import choose_threshold

    rows = [["labels", "chosen", "log loss", "minus random's", "95 % of draws", "guarantees", "that miss"]]
    pool = unlabelled_rows(fit, threshold=threshold)
    _, correct = predictions.confidence_and_correct(fit)
    held_out, right = predictions.confidence_and_correct(test)
    for n in SIZES:
        random = None
        for share, name in ((1.0, "none"), (0.5, "half"), (0.0, "all")):
            losses, given, missed = [], 0, 0
            for repeat in range(REPEATS):
                draw = np.random.default_rng([seed, n, repeat])
                labelled = list(choose_rows(pool, n, round(share * n), draw))
                confidence, is_right = pool.confidence[labelled], correct[labelled]
                losses.append(log_loss(PlattScalingCalibrator().fit(confidence, is_right).predict(held_out), right))
                found = choose_threshold(confidence, is_right, target_accuracy).value
                if found is not None and (held_out >= found).any():
                    given += 1
                    missed += right[held_out >= found].mean() < target_accuracy
            losses = np.array(losses)
            random = losses if random is None else random
            low, high = np.quantile(losses - random, [0.025, 0.975])
            cells = [f"{losses.mean():.4f}", f"{(losses - random).mean():+.4f}", f"{low:+.4f} to {high:+.4f}"]
            rows.append([str(n), name, *cells, f"{given / REPEATS:.1%}", f"{missed / REPEATS:.1%}"])
    return rows


# Command line


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_arguments(argv)
    if args.simulate:
        fit, test = (predictions.read_labelled(path)[0] for path in args.simulate)
        tables.check_disjoint(fit, test, *args.simulate)
        threshold = args.threshold if args.threshold is not None else 0.9
        print(f"{REPEATS} draws from {len(fit):,} rows, judged on {len(test):,} others; chosen near {threshold:g}")
        print(f"log loss of a Platt calibrator; guarantees: draws with a threshold for {args.target_accuracy:.0%}\n")
        print(command_line.columns(simulate(fit, test, threshold, args.target_accuracy, args.seed)))
        return
    path = Path(args.output)
    for source in (args.predictions, args.table):
        predictions.check_output(path, source)
    if not args.overwrite:
        check_unfilled(path, args.label_column or "label")
    scored = [row for row in predictions.read(args.predictions) if row.error is None]
    rows = [row for row in scored if row.label is None]
    if not rows:
        raise ValueError(f"{args.predictions}: none of its {len(scored):,} scored rows is without a label")
    table = tables.open_table(args.table, **tables.column_arguments(args)) if args.table else None
    found = unlabelled_rows(rows, args.calibrator, args.threshold)
    n_random = round(args.random_share * args.n)
    purpose = choose_rows(found, args.n, n_random, np.random.default_rng(args.seed))
    columns = own_columns([rows[number] for number in purpose], table)
    write_chosen(path, columns, list(purpose.values()), args.label_column or "label")
    counts = [f"{list(purpose.values()).count(name)} {name}" for name in ("random", "chosen")]
    print(f"{printable(args.output)}: {', '.join(counts)}, of {len(rows):,} rows without a label")
    if "chosen" in purpose.values():
        print("calibrate, measure and guarantee with the random rows alone: the chosen ones are harder than the rest")


if __name__ == "__main__":
    command_line.run(main)
