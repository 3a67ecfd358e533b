"""The whole workflow on a predictions file: is the confidence true, how to make it so, what to automate, at what cost.

    python calibration_demo.py                                            # the recorded predictions of this repository
    python calibration_demo.py mine.jsonl --target-accuracy 0.95          # one file: every number out-of-fold
    python calibration_demo.py --calibrate-on cal.jsonl --test-on test.jsonl --error-cost 50 --html

Reads labelled predictions files, no model and no torch. Prints a report and writes into --output-dir: calibrator.json
(for `logprobs_confidence.py --calibrator`), report.json, decisions.csv and eight figures; with --html also report.html,
one page with a threshold to move, which needs no network.

With two files everything is fitted and chosen on the first and measured on the second (held-out). With one, each row is
measured by a calibrator that did not see its group (out-of-fold), and the figures that need separate test rows use a
fixed half of the groups. Nothing here is measured on the rows it was fitted on.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import numpy as np

import command_line
import plotting
import predictions
import tables
import task as tasks
from decisions import (
    BUCKETS,
    add_cost_arguments,
    automation,
    bucket_of,
    buckets,
    check_cost_arguments,
    choose_threshold,
    cost_band,
    cost_optimal_threshold,
    costs,
    dollars_a_day,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from calibration import FittedCalibrator, Recipe, Scores

ROOT = Path(__file__).resolve().parent
RECORDED = ("predictions/base_calibration.jsonl", "predictions/base_test.jsonl", "sentiment/splits.csv")  # in data/
THRESHOLDS = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99)
LABEL_COUNTS = (50, 100, 200, 500, 1000)
METHOD_NAMES = ("platt", "temperature", "beta", "isotonic", "venn-abers")  # calibration.METHODS, which imports slowly
SETTINGS = ("method", "target_accuracy", "delta", "review_cost", "error_cost", "volume", "groups", "seed")
PROMISES = (0.8, 0.85, 0.9, 0.95)  # beside --target-accuracy
FEW = 10  # rows below which a figure shows no accuracy
REPEATS = 40  # subsamples for each label count
SHOWN, LENGTH = 50, 500  # rows in a table of the page, characters of a text in it


@dataclass(frozen=True)
class Study:
    """What is measured: test rows, their raw and calibrated confidences, and what the calibrators were fitted on."""

    fitted: FittedCalibrator
    fit_rows: list[predictions.Prediction]  # labelled rows the calibrators may see
    fit: Scores
    fit_groups: np.ndarray
    rows: list[predictions.Prediction]  # test rows; the same rows when out-of-fold
    test: Scores
    groups: np.ndarray
    protocol: str  # "held-out" or "out-of-fold"
    calibrated: dict[Recipe, np.ndarray]  # test rows' confidence by each calibrator
    choosing: dict[Recipe, np.ndarray]  # out-of-fold confidences [seeds, n] of the candidates on the fit rows
    cross_fitted: np.ndarray  # the chosen calibrator's out-of-fold confidences [n], mean over seeds
    unscored: int
    related: int = 0  # test rows with a near-duplicate among the calibration rows

    @property
    def where(self) -> str:
        """What every table and figure says of its numbers: n, groups if rows belong together, and the protocol."""
        n, groups = len(self.rows), len(np.unique(self.groups))
        related = f" in {groups:,} groups" if groups < n else ""
        return f"n = {n:,}{related}, {self.protocol}"

    @property
    def chosen(self) -> np.ndarray:
        """The chosen calibrator's confidences."""
        return self.calibrated[self.fitted.recipe]


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_arguments(argv)
    study = prepare(args)
    report = measure(study, args)
    print(render(study, report))
    folder = Path(args.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=folder, prefix=".") as part:  # all files or none
        write(study, report, Path(part))
        draw(study, report, args, Path(part))
        if args.html:
            write_page(page_data(study, report, args), Path(part) / "report.html")
        made = sorted(Path(part).iterdir())
        if blocked := [path.name for path in made if (folder / path.name).is_dir()]:
            raise ValueError(f"{folder / blocked[0]} is a folder; nothing was written")
        for path in made:
            path.replace(folder / path.name)
    print(f"\nWritten to {command_line.printable(str(folder))}: {', '.join(path.name for path in made)}")


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = command_line.ArgumentParser(__doc__)
    add = parser.add_argument
    add("predictions", metavar="PREDICTIONS", nargs="?", help="one labelled predictions file, cross-fitted")
    add("--calibrate-on", metavar="FILE", help="predictions to fit and choose on (default: the recorded ones)")
    add("--test-on", metavar="FILE", help="predictions to measure on, of other rows")
    add("--method", default="auto", choices=["auto", *METHOD_NAMES], help="the calibrator (default: auto)")
    add("--target-accuracy", type=float, default=0.9, metavar="A", help="of what is automated (default: 0.9)")
    add("--delta", type=float, default=0.05, metavar="D", help="risk that the promise is broken (default: 0.05)")
    add_cost_arguments(parser)
    tables.add_groups_argument(parser)
    add("--seed", type=command_line.natural, metavar="N", default=0, help="of folds and resampling (default: 0)")
    add("--html", action="store_true", help="also write report.html, a page with a threshold to move")
    add("--output-dir", default="calibration_report", metavar="FOLDER", help="default: calibration_report")
    args = parser.parse_args(argv)
    if args.predictions and (args.calibrate_on or args.test_on):
        parser.error("give either one predictions file or --calibrate-on and --test-on")
    if bool(args.calibrate_on) != bool(args.test_on):
        parser.error("--calibrate-on and --test-on belong together")
    if not args.predictions and not args.calibrate_on:
        args.calibrate_on, args.test_on, groups = (os.path.relpath(ROOT / "data" / path) for path in RECORDED)
        args.groups = args.groups or groups
    for name in ("target_accuracy", "delta"):
        if not 0 < getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} {getattr(args, name)}: between 0 and 1, both excluded")
    check_cost_arguments(parser, args)
    if Path(args.output_dir).exists() and not Path(args.output_dir).is_dir():
        parser.error(f"--output-dir {args.output_dir} is a file")
    return args


# Reading


def prepare(args: argparse.Namespace) -> Study:
    """Read, choose and fit the calibrators, and apply them to rows they did not see."""
    from calibration import choose, scores_of
    from calibration_metrics import group_numbers

    fit_rows, unscored = predictions.read_labelled(args.predictions or args.calibrate_on)
    rows, unscored_test = (fit_rows, 0) if args.predictions else predictions.read_labelled(args.test_on)
    fit, fit_groups = scores_of(fit_rows), group_numbers(tables.groups_of(fit_rows, args.groups))
    try:
        recipe, choosing = choose(fit, fit_groups, args.method, range(args.seed, args.seed + 5))
    except ValueError as error:
        raise ValueError(f"{args.predictions or args.calibrate_on}: {error}") from None
    out_of_fold = beside(recipe, choosing, fit, fit_groups, args.seed)
    fitted = fit_file(recipe, fit_rows, fit, fit_groups, choosing[recipe], args)
    common = {"fitted": fitted, "fit_rows": fit_rows, "fit": fit, "fit_groups": fit_groups, "choosing": choosing}
    common["cross_fitted"] = choosing[recipe].mean(axis=0)
    if args.predictions:
        return Study(
            **common,
            rows=fit_rows,
            test=fit,
            groups=fit_groups,
            protocol="out-of-fold",
            calibrated=out_of_fold,
            unscored=unscored,
        )
    check_apart(fitted, rows, args)
    test = scores_of(rows)
    calibrated = {r: r.estimator().fit(*r.inputs(fit)).predict(r.inputs(test)[0]) for r in out_of_fold}
    return Study(
        **common,
        rows=rows,
        test=test,
        groups=group_numbers(tables.groups_of(rows, args.groups)),
        protocol="held-out",
        calibrated=calibrated,
        unscored=unscored + unscored_test,
        related=related([row.text for row in fit_rows], [row.text for row in rows]),
    )


def beside(
    chosen: Recipe, choosing: dict[Recipe, np.ndarray], fit: Scores, groups: np.ndarray, seed: int
) -> dict[Recipe, np.ndarray]:
    """Out-of-fold confidences of the chosen recipe, and of every other method given the same that can be fitted."""
    from calibration import Recipe, cross_fit

    found = {chosen: choosing[chosen][0]}
    for method in METHOD_NAMES:
        recipe = Recipe(method, chosen.class_aware or method == "temperature")
        try:
            if recipe not in found:
                found[recipe] = cross_fit(recipe.estimator(), *recipe.inputs(fit), groups, seed=seed)
        except ValueError:  # a fold without any error; the others can be shown
            continue
    return found


def fit_file(
    recipe: Recipe,
    rows: list[predictions.Prediction],
    scores: Scores,
    groups: np.ndarray,
    out_of_fold: np.ndarray,
    args: argparse.Namespace,
) -> FittedCalibrator:
    """The calibrator fitted on all rows, with its out-of-fold report card and the threshold of its promise.

    `out_of_fold` is [seeds, n]. The card is the first seed's; the threshold is chosen on the mean, which hangs less on
    one division into folds.
    """
    from calibration import FittedCalibrator, text_key
    from calibration_metrics import calibration_metrics, one_of_each

    alone = one_of_each(groups)
    threshold = choose_threshold(
        out_of_fold.mean(axis=0)[alone], scores.correct[alone], args.target_accuracy, args.delta
    )
    return FittedCalibrator(
        recipe,
        recipe.estimator().fit(*recipe.inputs(scores)),
        scores.labels,
        rows[0].fingerprint,
        rows[0].model,
        rows[0].task,
        len(rows),
        len(np.unique(groups)),
        frozenset(text_key(row.text) for row in rows),
        calibration_metrics(out_of_fold[0], scores.correct, groups=groups, protocol="out-of-fold", seed=args.seed),
        threshold.record() | {"protocol": "cross-fitted"},
    )


def check_apart(fitted: FittedCalibrator, rows: list[predictions.Prediction], args: argparse.Namespace) -> None:
    """ValueError when the test rows are another model's, or when the calibrator has seen one of them."""
    from calibration import text_key

    try:
        fitted.calibrate(rows[:1])
    except ValueError as error:
        raise ValueError(f"{args.test_on} does not fit {args.calibrate_on}: {error}") from None
    seen = [row.id for row in rows if text_key(row.text) in fitted.fitted_on]
    if seen:
        raise ValueError(
            f"{len(seen)} rows of {args.test_on} are in {args.calibrate_on} too, the first is {seen[0]!r}; "
            "a calibrator is not scored on rows it was fitted on"
        )


def related(known: list[str], asked: list[str]) -> int:
    """How many of the asked texts have a near-duplicate among the known ones."""
    pairs = tables.near_duplicates(known + asked)
    return len({j for i, j, _ in pairs if i < len(known) <= j})


# Measuring


def measure(study: Study, args: argparse.Namespace) -> dict:
    """Every number of the report."""
    from calibration_metrics import (
        bootstrap_interval,
        by_predicted_label,
        calibration_metrics,
        log_loss,
        refinement_split,
    )

    test, fitted = study.test, study.fitted
    named = {"raw": (test.confidence, "nothing fitted")}
    named |= {str(recipe): (confidence, study.protocol) for recipe, confidence in study.calibrated.items()}
    metrics = {
        name: calibration_metrics(confidence, test.correct, groups=study.groups, protocol=protocol, seed=args.seed)
        for name, (confidence, protocol) in named.items()
    }

    def gain(rows: np.ndarray) -> list[float]:  # paired: both losses of the same rows
        raw, calibrated = (log_loss(c[rows], test.correct[rows]) for c in (test.confidence, study.chosen))
        return [raw - calibrated]

    losses = {str(r): [log_loss(c, study.fit.correct) for c in oof] for r, oof in study.choosing.items()}
    chow = cost_optimal_threshold(args.review_cost, args.error_cost)
    cost = {
        name: float(costs(confidence, test.correct, [chow], args.review_cost, args.error_cost)[0])
        for name, confidence in (("raw", test.confidence), ("calibrated", study.chosen))
    }
    return {
        "model": fitted.model,
        "task": fitted.task,
        "fingerprint": fitted.fingerprint,
        "calibrated_on": args.predictions or args.calibrate_on,
        "tested_on": args.predictions or args.test_on,
        "protocol": study.protocol,
        "unscored": study.unscored,
        "near_duplicates_of_calibration_rows": study.related,
        "settings": {key: getattr(args, key) for key in SETTINGS},
        "calibration_rows": fitted.n,
        "calibration_groups": fitted.groups,
        "candidates": {name: {"log_loss": np.mean(v), "sd_over_seeds": np.std(v)} for name, v in losses.items()},
        "chosen": str(fitted.recipe),
        "metrics": metrics,
        "log_loss_gain": [
            *gain(np.arange(len(study.rows))),
            *bootstrap_interval(gain, study.groups, seed=args.seed)[0],
        ],
        "refinement": refinement_split(test.confidence, study.chosen, test.correct),
        "by_predicted_label": by_predicted_label(study.rows),
        "threshold": dict(fitted.threshold),
        "threshold_measured_protocol": "held-out" if study.protocol == "held-out" else "in-sample",
        "promises": [promise(study, target, args.delta) for target in sorted({*PROMISES, args.target_accuracy})],
        "gates": {
            "raw": priced(test.confidence, test.correct, THRESHOLDS, args),
            "calibrated": priced(study.chosen, test.correct, THRESHOLDS, args),
        },
        "buckets": {"raw": buckets(test.confidence, test.correct), "calibrated": buckets(study.chosen, test.correct)},
        "cost_optimal_threshold": chow,
        "cost_per_row": cost
        | {
            "review everything": args.review_cost,
            "automate everything": float(args.error_cost * (1 - test.correct.mean())),
        },
    }


def priced(
    confidence: np.ndarray, correct: np.ndarray, thresholds: Sequence[float], args: argparse.Namespace
) -> list[dict]:
    """What each threshold automates, how right that is, and what a day costs."""
    rows = automation(confidence, correct, thresholds)
    for row in rows:
        row |= dollars_a_day(row["share"], row["accuracy"], args.volume, args.review_cost, args.error_cost)
    return rows


def promise(study: Study, target: float, delta: float) -> dict:
    """What can be promised at one target from cross-fitted and from raw scores, and how the first fares on test rows.

    With one file the test rows are those that chose the threshold, so that measurement is in-sample.
    """
    from calibration_metrics import one_of_each

    alone, correct = one_of_each(study.fit_groups), study.fit.correct
    threshold = choose_threshold(study.cross_fitted[alone], correct[alone], target, delta)
    measured = None
    if threshold.value is not None:
        measured = automation(study.chosen, study.test.correct, [threshold.value])[0]
    raw = choose_threshold(study.fit.confidence[alone], correct[alone], target, delta)
    return {"threshold": threshold.record(), "measured": measured, "raw": raw.record()}


def write(study: Study, report: dict, folder: Path) -> None:
    """calibrator.json, report.json and decisions.csv."""
    from calibration import save_calibrator

    save_calibrator(folder / "calibrator.json", study.fitted)
    text = json.dumps(report, indent=1, allow_nan=False, default=float)
    (folder / "report.json").write_text(text + "\n", encoding="utf-8")
    value = study.fitted.threshold["value"]
    with open(folder / "decisions.csv", "w", encoding="utf-8", errors="backslashreplace", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["id", "label", "prediction", "confidence", "calibrated_confidence", "decision", "bucket"])
        for row, confidence in zip(study.rows, study.chosen.tolist(), strict=True):
            decision = "automate" if value is not None and confidence >= value else "review"
            cells = [row.id, row.label, row.prediction, f"{row.confidence:.6f}", f"{confidence:.6f}"]
            writer.writerow([*map(spreadsheet_safe, cells[:3]), *cells[3:], decision, bucket_of(confidence)])


def spreadsheet_safe(cell: str) -> str:
    """A cell that no spreadsheet takes for a formula."""
    return "'" + cell if cell[:1] in ("=", "+", "-", "@", "\t", "\r") else cell


# The page


def page_data(study: Study, report: dict, args: argparse.Namespace) -> dict:
    """What report.html shows: the report itself, and all else computed here, so that the page only looks numbers up."""
    chosen, correct = study.chosen, study.test.correct
    first = int(200 * min(0.5, chosen.min()))
    thresholds = {*(i / 200 for i in range(first, 201)), *THRESHOLDS, report["cost_optimal_threshold"]}
    thresholds |= {found["threshold"][key] for found in report["promises"] for key in ("value", "naive_value")}
    steps = priced(chosen, correct, sorted(thresholds - {None}), args)
    start = report["threshold"]["value"]
    start = report["cost_optimal_threshold"] if start is None else start
    rising = np.argsort(chosen, kind="stable")
    falling = np.argsort(-chosen, kind="stable")
    return {
        "report": report,
        "where": study.where,
        "method": study.rows[0].method,
        "steps": steps,
        "start": next(i for i, step in enumerate(steps) if step["threshold"] == start),
        "review_everything": dollars_a_day(0, None, args.volume, args.review_cost, args.error_cost)["dollars"],
        "reliability": {"raw": reliability(study.test.confidence, correct), "calibrated": reliability(chosen, correct)},
        "errors": page_rows(study, falling[~correct[falling]]),
        "least_certain": page_rows(study, rising),
    }


def reliability(confidence: np.ndarray, correct: np.ndarray) -> list[dict]:
    """The bins of a reliability diagram that hold rows, each with the exact 95 % interval of its accuracy."""
    from calibration_metrics import bins_of, exact_interval

    bins, table = bins_of(confidence, correct), []
    for i in np.flatnonzero(bins.count).tolist():
        n = int(bins.count[i])
        low, high = exact_interval(round(bins.accuracy[i] * n), n)
        ends = {"from": bins.edges[i], "to": bins.edges[i + 1], "accuracy_low": low, "accuracy_high": high}
        table.append({"n": n, "accuracy": bins.accuracy[i], "mean_confidence": bins.confidence[i], **ends})
    return table


def page_rows(study: Study, numbers: np.ndarray) -> list[dict]:
    """The first of these rows, with their texts, for a table."""
    found = []
    for i in numbers[:SHOWN].tolist():
        row = study.rows[i]
        text = row.text if len(row.text) <= LENGTH else row.text[:LENGTH] + " [...]"
        numbers_of = {"confidence": row.confidence, "calibrated_confidence": study.chosen[i]}
        found.append({"id": row.id, "text": text, "label": row.label, "prediction": row.prediction, **numbers_of})
    return found


def write_page(data: dict, path: Path) -> None:
    """report.html: the template with plotly.js and the data in it, one file that asks no network for anything."""
    from plotly.offline import get_plotlyjs

    # Without a "<" no text can end the element it stands in; JSON has its escape for it.
    text = json.dumps(data, allow_nan=False, default=float).replace("<", "\\u003c")
    # The page's policy runs only scripts that carry this word, which nobody can write into a text: it is the data's.
    nonce = hashlib.sha256(text.encode()).hexdigest()
    parts = {"plotly": get_plotlyjs(), "data": text, "nonce": nonce}
    template = (ROOT / "scripts" / "report_template.html").read_text(encoding="utf-8")
    # In one pass, so that nothing is put into what a text or plotly.js happens to hold.
    path.write_text(re.sub(r"\{\{(\w+)\}\}", lambda name: parts[name[1]], template), encoding="utf-8", newline="\n")


# The printed report


def render(study: Study, report: dict) -> str:
    """What a person reads: which calibrator and why, what it does to the numbers, what it allows."""
    shown = command_line.printable
    held_out, n = study.protocol == "held-out", study.where
    where = shown(report["tested_on"]) if held_out else "the same rows, each by a calibrator that did not see its group"
    unscored = f"; {report['unscored']:,} rows had no score" if report["unscored"] else ""
    related = report["near_duplicates_of_calibration_rows"]
    unscored += f"; {related:,} test rows have a near-duplicate among the calibration rows" if related else ""
    settings = report["settings"]
    sections = [
        f"{shown(report['model'])}, task {shown(report['task'])}, fingerprint {shown(report['fingerprint'])}\n"
        f"calibrated on {shown(report['calibrated_on'])}: {report['calibration_rows']:,} rows in "
        f"{report['calibration_groups']:,} groups\nmeasured on {where}: {n}{unscored}",
        "Candidates by log loss on the calibration rows, out-of-fold, mean and sd of 5 seeds:\n" + candidates(report),
        f"{n}, lowest log loss first; brackets are 95 % intervals:\n" + measurements(report),
        findings(report),
        f"Promises, each with {100 * (1 - settings['delta']):g}% certainty, cross-fitted, from one row of each group; "
        "naive is the lowest threshold that met the target there:\n" + promises(report),
        f"Zones, {n}:\n" + zones(report),
        f"A day of {settings['volume']:,} predictions at ${settings['review_cost']:g} a review and "
        f"${settings['error_cost']:g} an error, {n}:\n" + gates(report),
        f"Cost-optimal threshold {report['cost_optimal_threshold']:.2f}. A row costs there: "
        + ", ".join(f"{name} ${cost:.2f}" for name, cost in report["cost_per_row"].items()),
    ]
    return "\n\n".join(sections)


def candidates(report: dict) -> str:
    """The calibrators that were tried, the best first."""
    found = sorted(report["candidates"].items(), key=lambda item: item[1]["log_loss"])
    mark = {report["chosen"]: "chosen"}
    return command_line.columns(
        [[name, f"{f['log_loss']:.4f}", f"{f['sd_over_seeds']:.4f}", mark.get(name, "")] for name, f in found], "  "
    )


def measurements(report: dict) -> str:
    """Raw and calibrated beside each other; ranked by log loss, because ECE rewards predicting the base rate."""
    names = ("brier", "ece", "ece_noise_floor", "ece_p_value", "mce_30", "auroc", "aurc", "mean_confidence")
    rows = [["", "log loss", "", "Brier", "ECE", "floor", "p", "MCE30", "AUROC", "AURC", "mean", ""]]
    for name, m in sorted(report["metrics"].items(), key=lambda item: item[1]["log_loss"]):
        numbers = ["-" if m[key] is None else f"{m[key]:.3f}" for key in names]
        interval = f"[{m['log_loss_low']:.3f}, {m['log_loss_high']:.3f}]"
        rows.append([name, f"{m['log_loss']:.3f}", interval, *numbers, "chosen" if name == report["chosen"] else ""])
    return command_line.columns(rows, "  ")


def findings(report: dict) -> str:
    """What the numbers say, in words, good or bad."""
    shown = command_line.printable
    raw, chosen = report["metrics"]["raw"], report["metrics"][report["chosen"]]
    gain, low, high = report["log_loss_gain"]
    better = "below" if gain > 0 else "NOT below"
    within = "within" if chosen["ece"] <= chosen["ece_noise_95"] else "NOT within"
    lines = [
        f"accuracy {raw['accuracy']:.3f} [{raw['accuracy_low']:.3f}, {raw['accuracy_high']:.3f}]; "
        "calibration does not change it",
        f"the chosen calibrator's log loss is {better} the raw one's: the paired gain is {gain:.3f} "
        f"[{low:.3f}, {high:.3f}]",
        f"its ECE is {within} what a perfectly calibrated model shows on so many rows (95 % point "
        f"{chosen['ece_noise_95']:.3f})",
    ]
    if report["protocol"] == "out-of-fold":
        lines.append("the chosen one was chosen by these very losses, so its own are a little too good")
    if report["metrics"]["raw"]["groups"] < report["metrics"]["raw"]["n"]:
        lines.append(
            "noise floors, p and the exact intervals of counts below take rows for independent; rows of a group are not"
        )
    for label, found in report["by_predicted_label"].items():
        accuracy, confidence = found["right"] / found["n"], found["mean_confidence"]
        lines.append(
            f"predicted {shown(label)}: {found['n']:,} rows, raw mean confidence {confidence:.3f}, "
            f"accuracy {accuracy:.3f}"
        )
    return "\n".join(lines)


def promises(report: dict) -> str:
    """For each target what can be promised, and how it fared on the test rows."""
    protocol = report["threshold_measured_protocol"]
    rows = [
        [
            "target",
            "automate from",
            "labels",
            "at least right",
            f"measured ({protocol})",
            "automated",
            "naive",
            "raw score",
        ]
    ]
    for found in report["promises"]:
        t, measured = found["threshold"], found["measured"]
        naive = "none" if t["naive_value"] is None else f"from {t['naive_value']:.3f}"
        raw = found["raw"]["value"]
        tail = [naive, "nothing" if raw is None else f"from {raw:.3f}"]
        if t["value"] is None:
            more = f"about {t['more_labels']:,} more labels" if t["more_labels"] else "out of reach"
            rows.append([f"{t['target_accuracy']:.1%}", "nothing", more, "-", "-", "-", *tail])
            continue
        cells = [
            f"{t['target_accuracy']:.1%}",
            f"{t['value']:.3f}",
            f"{t['accepted']:,} of {t['n']:,}",
            f"{t['lower_bound']:.1%}",
        ]
        if measured["automated"]:
            interval = f"[{measured['accuracy_low']:.3f}, {measured['accuracy_high']:.3f}]"
            cells += [f"{measured['accuracy']:.3f} {interval}", f"{measured['share']:.1%}"]
        else:
            cells += ["no row", "0.0%"]
        rows.append([*cells, *tail])
    return command_line.columns(rows, "  ")


def zones(report: dict) -> str:
    """The four zones, raw and calibrated."""
    rows, upper = [["", "", "raw", "right", "calibrated", "right"]], ""
    for raw, cal in zip(report["buckets"]["raw"], report["buckets"]["calibrated"], strict=True):
        cells = [raw["bucket"], f"{raw['from']:.0%}{upper or ' or more'}"]
        for zone in (raw, cal):
            cells += [f"{zone['n']:,}", f"{zone['accuracy']:.1%}" if zone["n"] else "-"]
        rows.append(cells)
        upper = f" to {raw['from']:.0%}"
    return command_line.columns(rows, "  ")


def gates(report: dict) -> str:
    """What each confidence threshold automates, raw and calibrated, and what a day costs."""
    heads = ["right", "reviews", "with errors"]
    rows = [["from", "raw: automated", *heads, "calibrated: automated", *heads]]
    for pair in zip(report["gates"]["raw"], report["gates"]["calibrated"], strict=True):
        cells = [f"{pair[0]['threshold']:.0%}"]
        for row in pair:
            right = f"{row['accuracy']:.1%}" if row["automated"] else "-"
            cells += [f"{row['share']:.1%}", right, f"${row['review_dollars']:,.0f}", f"${row['dollars']:,.0f}"]
        rows.append(cells)
    return command_line.columns(rows, "  ")


# Figures


def draw(study: Study, report: dict, args: argparse.Namespace, folder: Path) -> None:
    """The eight figures."""
    tested, fitted = (command_line.printable(Path(report[key]).name) for key in ("tested_on", "calibrated_on"))
    how = f"{tested}, fitted on {len(study.fit_rows):,} rows of {fitted}"
    if study.protocol == "out-of-fold":
        how = f"{tested}, each row by a calibrator that did not see its group"
    where = f"{study.where} ({how})"
    drawn = subsamples(study, args.seed)
    draw_histogram(study, tested, folder / "raw_confidence_histogram.png")
    draw_methods(study, report, where, folder / "reliability_by_method.png")
    draw_business(study, where, folder / "business_reliability.png")
    draw_progression(drawn, args.seed, folder / "business_progression.png")
    draw_gates(report, f"{where}; calibrated: {study.fitted.recipe}", folder / "accuracy_threshold.png")
    draw_sample_sizes(drawn, args.seed, folder / "sample_size.png")
    draw_costs(study, report, args, where, folder / "cost_curve.png")
    draw_risk_coverage(study, where, folder / "risk_coverage.png")


def draw_histogram(study: Study, source: str, path: Path) -> None:
    """How often each raw confidence occurs, right and wrong."""
    test, edges = study.test, np.arange(21) / 20
    confidence, accuracy = test.confidence.mean(), test.correct.mean()
    caption = (
        f"Raw confidence of {command_line.printable(study.fitted.model)} on {source}, n = {len(study.rows):,}, nothing "
        f"fitted. The gap between the two lines is {'over' if confidence > accuracy else 'under'}confidence."
    )
    with plotting.figure(path, caption, height=4.2) as axes:
        axis = axes[0, 0]
        parts = [test.confidence[test.correct], test.confidence[~test.correct]]
        axis.hist(
            parts,
            bins=edges,
            stacked=True,
            color=[plotting.BLUE, plotting.ORANGE],
            label=["right", "wrong"],
            edgecolor="white",
        )
        for value, name, style in (
            (confidence, "mean confidence", "--"),
            (accuracy, "accuracy", ":"),
        ):
            axis.axvline(value, color=plotting.INK, linestyle=style, label=f"{name} {value:.1%}")
        axis.set(
            xlim=(min(0.48, test.confidence.min()), 1.005),
            xlabel="raw confidence",
            ylabel="rows",
            title="What the model says",
        )
        plotting.percent(axis, "x")
        axis.legend(loc="upper left")


def draw_methods(study: Study, report: dict, where: str, path: Path) -> None:
    """Reliability before and after the article's three calibrators."""
    from calibration_metrics import plot_reliability_diagram

    panels = {"raw": study.test.confidence}
    panels |= {
        str(r): c for m in ("platt", "isotonic", "temperature") for r, c in study.calibrated.items() if r.method == m
    }
    caption = (
        f"Reliability, {where}; raw: nothing fitted. A dot is one of 20 equal bins with the exact 95 % interval of as "
        "many independent rows; its rows stand at the bottom. On the diagonal the confidence is true. Floor: the ECE "
        "that true confidences show on so many rows."
    )
    with plotting.figure(path, caption, 2, 2, height=3.8, sharex=True, sharey=True) as axes:
        for axis, (name, confidence) in zip(axes.flat, panels.items(), strict=False):
            plot_reliability_diagram(
                confidence, study.test.correct, ax=axis, color=plotting.RED if name == "raw" else plotting.BLUE
            )
            m = report["metrics"][name]
            axis.set_title(
                f"{name}\nECE {m['ece']:.3f} (floor {m['ece_noise_floor']:.3f}), log loss {m['log_loss']:.3f}",
                fontsize=10.5,
            )
            axis.label_outer()


ZONES = (plotting.GREEN, plotting.YELLOW, plotting.ORANGE, plotting.RED)


def paint_zones(axis: Axes, lowest: float) -> None:
    """The article's four buckets behind a diagram whose x axis is the confidence, from below the `lowest` on."""
    left = min(0.3, np.floor(10 * lowest) / 10)
    axis.set_xticks([left, *(lower for lower, _ in BUCKETS[:-1])])
    upper = 1.0
    for (lower, name), color in zip(BUCKETS, ZONES, strict=True):
        axis.axvspan(lower, upper, color=color, alpha=0.14, linewidth=0, zorder=0)
        words = name.replace(" ", "\n").replace("-", "-\n")
        axis.text((max(lower, left) + upper) / 2, 1.015, words, ha="center", va="bottom", fontsize=8)
        upper = lower
    axis.plot([0, 1], [0, 1], color=plotting.GREY, linestyle="--", linewidth=1)
    axis.set(xlim=(left, 1), ylim=(0, 1.14), xlabel="confidence", ylabel="accuracy")
    axis.set_yticks(np.arange(6) / 5)
    plotting.percent(axis)


def draw_business(study: Study, where: str, path: Path) -> None:
    """Raw and calibrated reliability over the four zones, with the rows of each zone."""
    from calibration_metrics import bins_of

    caption = (
        f"Reliability and the article's four zones, {where}; raw: nothing fitted. A dot is one of ten equal bins; the "
        "numbers are the rows of each zone, raw above calibrated. On the dashed line the confidence is true."
    )
    with plotting.figure(path, caption, height=4.8) as axes:
        axis, lowest = axes[0, 0], min(study.test.confidence.min(), study.chosen.min())
        paint_zones(axis, lowest)
        for name, confidence, color, style, height in (
            ("raw", study.test.confidence, plotting.RED, "s-", 0.07),
            (str(study.fitted.recipe), study.chosen, plotting.BLUE, "o-", 0.02),
        ):
            bins = bins_of(confidence, study.test.correct, 10)
            full = bins.count > 0
            axis.plot(bins.confidence[full], bins.accuracy[full], style, color=color, label=name)
            upper = 1.0
            for zone in buckets(confidence, study.test.correct):
                axis.text(
                    (max(zone["from"], axis.get_xlim()[0]) + upper) / 2,
                    height,
                    f"{zone['n']:,}",
                    ha="center",
                    color=color,
                    fontsize=9,
                    fontweight="bold",
                )
                upper = zone["from"]
        axis.legend(loc="upper left", bbox_to_anchor=(0.0, 0.9), frameon=False)


def draw_gates(report: dict, where: str, path: Path) -> None:
    """What a threshold automates (bars) and how right that is (line), raw and calibrated."""
    caption = (
        f"Automation and accuracy by confidence threshold, {where}; raw: nothing fitted. Bars: the rows at or above it "
        f"and their share. Line: accuracy among them where they are {FEW} or more, with the exact 95 % interval of as "
        "many independent rows."
    )
    with plotting.figure(path, caption, columns=2, height=4.2, sharey=True) as axes:
        for axis, (name, rows), color in zip(
            axes[0], report["gates"].items(), (plotting.RED, plotting.BLUE), strict=True
        ):
            place = np.arange(len(rows))
            axis.bar(place, [row["share"] for row in rows], color=color, alpha=0.25, width=0.8)
            for x, row in zip(place, rows, strict=True):
                share = f"{row['share']:.0%}" if row["share"] >= 0.005 or not row["automated"] else "<1%"
                words = f"{row['automated']:,}\n{share}"
                axis.text(x, 0.015, words, ha="center", fontsize=8, linespacing=1.4)
            some = [(x, row) for x, row in zip(place, rows, strict=True) if row["automated"] >= FEW]
            if some:
                x, y = [x for x, _ in some], np.array([row["accuracy"] for _, row in some])
                ends = np.array([[row["accuracy_low"], row["accuracy_high"]] for _, row in some]).T
                axis.errorbar(x, y, yerr=np.abs(ends - y), fmt="o-", color=color, capsize=2, linewidth=1.5)
                for x_, y_, end in zip(x, y, ends[1], strict=True):
                    axis.annotate(f"{y_:.0%}", (x_, end), (0, 3), textcoords="offset points", ha="center", fontsize=8)
            axis.set_xticks(place, [f"{row['threshold']:.0%}" for row in rows])
            axis.set(ylim=(0, 1.12), xlabel="confidence threshold", title=name)
            plotting.percent(axis, "y")
        axes[0, 0].set_ylabel("share of rows, accuracy")


def draw_costs(study: Study, report: dict, args: argparse.Namespace, where: str, path: Path) -> None:
    """What 1,000 rows cost at each threshold."""
    thresholds, test = np.linspace(0.4, 1, 121), study.test
    caption = (
        f"Cost of 1,000 rows, ${args.review_cost:g} a review and ${args.error_cost:g} an automated error, {where}; "
        f"raw: nothing fitted. Bands: 95 %, 500 bootstrap samples of whole groups, seed {args.seed}. The dotted line "
        "is where true confidences cost least, from the two prices alone."
    )
    with plotting.figure(path, caption, height=4.4) as axes:
        axis = axes[0, 0]
        for name, confidence, color in (
            ("raw", test.confidence, plotting.RED),
            (str(study.fitted.recipe), study.chosen, plotting.BLUE),
        ):
            cost, low, high = (
                1000
                * cost_band(
                    confidence,
                    test.correct,
                    thresholds,
                    args.review_cost,
                    args.error_cost,
                    study.groups,
                    seed=args.seed,
                ).T
            )
            axis.plot(thresholds, cost, color=color, label=name)
            axis.fill_between(thresholds, low, high, color=color, alpha=0.15, linewidth=0)
        axis.axhline(1000 * args.review_cost, color=plotting.GREY, linestyle="--", label="review everything")
        axis.axvline(
            report["cost_optimal_threshold"],
            color=plotting.INK,
            linestyle=":",
            label=f"cost-optimal threshold {report['cost_optimal_threshold']:.2f}",
        )
        axis.set(
            xlabel="automate from this confidence on",
            ylabel="dollars per 1,000 rows",
            ylim=(0, None),
            title="What a threshold costs",
        )
        plotting.percent(axis, "x")
        axis.yaxis.set_major_formatter("${x:,.0f}")
        axis.legend()


def draw_risk_coverage(study: Study, where: str, path: Path) -> None:
    """Error rate among the most confident rows, by how many are taken."""
    from calibration_metrics import plot_risk_coverage

    caption = (
        f"Errors among the most confident share of rows, {where}; raw: nothing fitted. Area: under the curve, lower is "
        "better. A calibrator of the confidence cannot move this curve; knowing which label was predicted can."
    )
    with plotting.figure(path, caption, height=4.2) as axes:
        curves = {"raw": (study.test.confidence, study.test.correct, plotting.RED)}
        curves[str(study.fitted.recipe)] = study.chosen, study.test.correct, plotting.BLUE
        plot_risk_coverage(axes[0, 0], curves)


# How many labels


@dataclass(frozen=True)
class Subsamples:
    """Calibrators fitted on few labels, each applied to the same test rows."""

    recipe: Recipe
    correct: np.ndarray  # [test rows]
    calibrated: dict[int, np.ndarray]  # labels -> [repeats, test rows]
    protocol: str


def subsamples(study: Study, seed: int) -> Subsamples:
    """Fit the chosen calibrator on groups of 50 to 1,000 labels, many times, and apply it to fixed other rows."""
    from sklearn.model_selection import GroupShuffleSplit

    pool, groups, test, protocol = study.fit, study.fit_groups, study.test, "held-out"
    if study.protocol == "out-of-fold":  # one file: half of its groups are test rows
        halves = GroupShuffleSplit(1, test_size=0.5, random_state=seed).split(groups, groups=groups)
        train, rest = next(halves)
        pool, groups, test = pool[train], groups[train], study.test[rest]
        protocol = "held-out but for the choice of the method, which saw all rows"
    protocol = f"test n = {len(test.correct):,}, {protocol}"
    draw, calibrated, recipe = np.random.default_rng(seed), {}, study.fitted.recipe
    for size in [size for size in LABEL_COUNTS if size <= len(pool.correct)] or [len(pool.correct)]:
        answers = []
        for _ in range(REPEATS if size < len(pool.correct) else 1):
            rows = pool[some_groups(groups, size, draw)]
            if 0 < rows.correct.sum() < size and len(np.unique(rows.truth)) > 1:
                fitted = recipe.estimator().fit(*recipe.inputs(rows))
                answers.append(fitted.predict(recipe.inputs(test)[0]))
        if answers:
            calibrated[size] = np.array(answers)
    return Subsamples(recipe, test.correct, calibrated, protocol)


def some_groups(groups: np.ndarray, size: int, draw: np.random.Generator) -> np.ndarray:
    """The numbers of `size` rows, whole groups but for the last."""
    _, index = np.unique(groups, return_inverse=True)
    return np.argsort(draw.permutation(index.max() + 1)[index], kind="stable")[:size]


def draw_progression(drawn: Subsamples, seed: int, path: Path) -> None:
    """Business reliability with 100, 200, 500 and 1,000 labels."""
    from calibration_metrics import bins_of

    sizes = [size for size in drawn.calibrated if size >= 100] or list(drawn.calibrated)
    caption = (
        f"Reliability of '{drawn.recipe}' fitted on so many calibration labels, {drawn.protocol}. Line: median of each "
        f"bin's accuracy over {REPEATS} random subsamples of the labels (seed {seed}), band: its 5 to 95 %. All labels "
        "are one sample, without a band."
    )
    curves = {}
    for size in sizes:
        bins = [bins_of(confidence, drawn.correct, 10) for confidence in drawn.calibrated[size]]
        x, y = (np.array([getattr(b, f) for b in bins]) for f in ("confidence", "accuracy"))
        often = np.isfinite(x).mean(axis=0) >= 0.5
        curves[size] = np.nanmedian(x[:, often], axis=0), *np.nanquantile(y[:, often], [0.05, 0.5, 0.95], axis=0)
    rows = max(1, (len(sizes) + 1) // 2)
    with plotting.figure(path, caption, rows, min(2, len(sizes)), height=3.6, sharex=True, sharey=True) as axes:
        for axis in axes.flat[len(sizes) :]:
            axis.set_visible(False)
        for axis, size in zip(axes.flat, sizes, strict=False):
            paint_zones(axis, min(middle.min() for middle, *_ in curves.values()))
            middle, low, half, high = curves[size]
            axis.fill_between(middle, low, high, color=plotting.BLUE, alpha=0.2, linewidth=0)
            axis.plot(middle, half, "o-", color=plotting.BLUE)
            axis.set_title(f"{size:,} labels")
            axis.label_outer()


def draw_sample_sizes(drawn: Subsamples, seed: int, path: Path) -> None:
    """Accuracy and share of what 70, 80, 90 and 95 % automate, by the number of labels."""
    gates, sizes = (0.7, 0.8, 0.9, 0.95), list(drawn.calibrated)
    caption = (
        f"Automating from a confidence calibrated by '{drawn.recipe}' on, by number of calibration labels, "
        f"{drawn.protocol}. Line: median of {REPEATS} random subsamples of the labels (seed {seed}), band: 5 to 95 %; "
        "all labels are one sample. A calibrated confidence keeps the accuracy above the dashed line."
    )
    with plotting.figure(path, caption, 2, 2, height=3.3, sharex=True, sharey=True) as axes:
        for axis, gate in zip(axes.flat, gates, strict=True):
            taken = {size: drawn.calibrated[size] >= gate for size in sizes}
            shares = [t.mean(axis=1) for t in taken.values()]
            right = [[drawn.correct[row].mean() for row in t if row.any()] or [np.nan] for t in taken.values()]
            for values, color, name in (
                (shares, plotting.ORANGE, "share of rows automated"),
                (right, plotting.BLUE, "right among them"),
            ):
                low, half, high = np.array([np.quantile(v, [0.05, 0.5, 0.95]) for v in values]).T
                axis.fill_between(sizes, low, high, color=color, alpha=0.2, linewidth=0)
                axis.plot(sizes, half, "o-", color=color, label=name)
            axis.axhline(gate, color=plotting.GREY, linestyle="--")
            axis.set_xscale("log")
            axis.set_xticks(sizes, [f"{size:,}" for size in sizes])
            axis.minorticks_off()
            axis.set(ylim=(0, 1.05), title=f"automated from {gate:.0%} on", xlabel="calibration labels")
            plotting.percent(axis, "y")
            axis.label_outer()
        axes[0, 0].legend(loc="best", fontsize=9)


if __name__ == "__main__":
    command_line.run(main)
