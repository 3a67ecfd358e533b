"""Did fine-tuning help, or did the base model only need a temperature? Two models on the same rows, in pairs.

    python compare_base_vs_finetuned.py                              # the recorded predictions of this repository
    python compare_base_vs_finetuned.py base.jsonl tuned.jsonl       # yours: the same rows by both, cross-fitted
    python compare_base_vs_finetuned.py base.jsonl tuned.jsonl --calibrate-on base_cal.jsonl tuned_cal.jsonl
    python compare_base_vs_finetuned.py base.jsonl tuned.jsonl --also probe.jsonl --also words.jsonl      # in one table

    L(fine-tuned) - L(base) =   L(base, T) - L(base)                what a temperature T gives the base model
                              + L(fine-tuned, T) - L(base, T)       what fine-tuning gives beyond that
                              + L(fine-tuned) - L(fine-tuned, T)    less what a temperature gives the fine-tuned one

L is the log loss. Accuracies are compared by McNemar's exact test on the rows that only one model has right, all else
by the difference on the same rows, fine-tuned - base, with a 95 % interval that resamples whole groups for both at
once. Each model has calibrators of its own; neither is measured on rows that its calibrators saw.

It reads labelled predictions files, no model, refuses two that are not of the same rows, labels and prompt, prints what
to act on, with --verbose every table, and writes report.json, six figures and with --html comparison.html, a page with
a threshold to move. In a notebook: read_comparison(paths), comparison_report(comparison), draw_figures(...).
"""

from __future__ import annotations

import argparse
import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

import calibration_metrics as metrics
import command_line
import comparison_text
import decisions
import explained_texts
import files
import html_report
import predictions
import tables
import verdict
from command_line import printable
from comparison_figures import draw_figures
from comparison_text import NAMES, PLANTED_RULE, RANDOMLY_LABELLED
from predictions import Prediction

if TYPE_CHECKING:
    from calibration import Recipe, Scores

ROOT = Path(__file__).resolve().parent
OUR_ROWS = "data:test"
CALIBRATORS = ("temperature", "platt", "beta", "isotonic", "venn-abers")
TARGETS = (0.8, 0.9, 0.95)
SURE = (0.9, 0.95)  # the confidences from which rows count as sure


@dataclass(frozen=True)
class ComparedModel:
    """One model on its test rows, and what its thresholds are chosen on."""

    about: dict[str, object]  # file, model, fingerprint, calibrator, fitted temperature
    scores: Scores  # test rows
    confidence: dict[str, np.ndarray | None]  # "raw", each calibrator of P(label), "calibrated" (by the chosen), [n]
    out_of_fold: np.ndarray  # calibrated confidence of the fit rows
    fit_correct: np.ndarray
    rows: Sequence[Prediction]  # test rows


@dataclass(frozen=True)
class FurtherModel:
    """What else was asked about the test rows, by any method; `fit_groups` are None where nothing calibrates it."""

    model: ComparedModel
    fit_groups: np.ndarray | None


@dataclass(frozen=True)
class ModelComparison:
    """Both models on the same rows."""

    models: dict[str, ComparedModel]  # by NAMES
    groups: np.ndarray  # of the test rows, numbers [n]
    fit_groups: np.ndarray
    about: dict[str, object]  # task, prompt, protocol ("held-out" or "out-of-fold"), files and what is left out
    parts: dict[str, dict[str, np.ndarray]]  # column -> value -> which test rows, bool [n]
    first_tokens: list[dict]  # of each explained text: the text and what both models said
    seed: int
    also: dict[str, FurtherModel] = field(default_factory=dict)  # by the names of their files


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_arguments(argv)
    comparison = read_comparison(
        (args.base, args.fine_tuned),
        args.calibrate_on,
        groups=args.groups,
        adapter=args.adapter,
        table=args.rows,
        by=args.by,
        first_tokens=args.first_tokens,
        also=args.also,
        seed=args.seed,
    )
    report = comparison_report(comparison, args.review_cost, args.error_cost, args.volume)
    print(comparison_text.summary(report))
    if args.verbose:
        print("\n" + comparison_text.details(report))
    folders = [args.output_dir, args.images or args.output_dir]
    for folder in folders:
        Path(folder).mkdir(parents=True, exist_ok=True)
    files.write_text(f"{folders[0]}/report.json", json.dumps(report, indent=1, allow_nan=False, default=float) + "\n")
    draw_figures(comparison, report, Path(folders[1]))
    if args.html:
        html_report.write_page(Path(folders[0]) / "comparison.html", page_data(comparison, report), "comparison")
    if not args.verbose:
        print("\n--verbose adds every score, calibrator, part of the rows and explained text.")
    page = ", comparison.html" if args.html else ""
    print(f"\nWritten: report.json{page} and six figures, in " + printable(" and ".join(dict.fromkeys(folders))))


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = command_line.ArgumentParser(__doc__)
    add, both = parser.add_argument, ("BASE", "FINE_TUNED")
    add("base", metavar="BASE", nargs="?", help="predictions of the base model (default: the recorded ones)")
    add("fine_tuned", metavar="FINE_TUNED", nargs="?", help="predictions of the fine-tuned model, of the same rows")
    add("--calibrate-on", metavar=both, nargs=2, help="predictions of other rows, to fit and choose on")
    add(
        "--also",
        metavar="FILE",
        nargs="+",
        action="append",
        default=[],
        help="a column more: predictions of the same rows by any method, and of other rows to calibrate them on "
        "(repeatable; without these a file is cross-fitted if the two are)",
    )
    add("--adapter", metavar="FOLDER", help="the LoRA folder, whose training_config.json knows the prompt; or none")
    add("--first-tokens", metavar=both, nargs=2, help="what logprobs_confidence.py --json said of texts")
    add("--rows", metavar="TABLE", help=f"a table of the rows' ids and columns (default: {OUR_ROWS} if they are those)")
    add("--by", metavar="COLUMN", nargs="+", help="columns to break down by; a comma joins two, as difficulty,part")
    decisions.add_cost_arguments(parser)
    tables.add_groups_argument(parser)
    add("--seed", type=command_line.natural, metavar="N", default=0, help="of folds and resampling (default: 0)")
    add("--verbose", action="store_true", help="print every table, not only what to act on")
    add("--html", action="store_true", help="also write comparison.html, a page with a threshold to move")
    add("--output-dir", default="comparison_report", metavar="FOLDER", help="default: comparison_report")
    add("--images", metavar="FOLDER", help="for the figures (default: the same)")
    args = parser.parse_args(argv)
    if args.base and not args.fine_tuned:
        parser.error("two predictions files are compared: BASE and FINE_TUNED")
    if any(len(paths) > 2 for paths in args.also):
        parser.error("--also FILE [CALIBRATION_FILE]: once for each file")
    if args.calibrate_on and not args.base:
        parser.error("--calibrate-on goes with BASE and FINE_TUNED")
    if not args.base:
        recorded = recorded_files()
        args.base, args.fine_tuned = recorded.pop("paths")
        for name, value in recorded.items():
            setattr(args, name, getattr(args, name) or value)
    decisions.check_cost_arguments(parser, args)
    for flag, folder in (("--output-dir", args.output_dir), ("--images", args.images)):
        if folder and Path(folder).exists() and not Path(folder).is_dir():
            parser.error(f"{flag} {folder} is a file")
    return args


def recorded_files() -> dict[str, object]:
    """The recorded predictions of this repository, as arguments of `read_comparison`."""
    paths, calibration, first_tokens = (
        [os.path.relpath(ROOT / f"data/predictions/{model}_{name}.jsonl") for model in ("base", "tuned")]
        for name in ("test", "calibration", "first_tokens")
    )
    adapter, groups = ROOT / "fine_tuned_sentiment_model", os.path.relpath(ROOT / "data/sentiment/splits.csv")
    found = {"paths": paths, "calibrate_on": calibration, "first_tokens": first_tokens, "groups": groups}
    return found | {"adapter": os.path.relpath(adapter) if adapter.is_dir() else None}


# Reading


def read_comparison(
    paths: Sequence[str],
    calibrate_on: Sequence[str] | None = None,
    *,
    groups: str | None = None,
    adapter: str | None = None,
    table: str | None = None,
    by: Sequence[str] | None = None,
    first_tokens: Sequence[str] | None = None,
    also: Sequence[Sequence[str]] = (),
    seed: int = 0,
) -> ModelComparison:
    """Read the predictions of both models, refuse what cannot be compared, and calibrate each model by itself."""
    tested, left_out = read_pairs(paths)
    about = {"task": tested[0][0].task, "prompt": check_prompt(adapter, paths, tested)}
    parts = breakdown(tested[0], table, by)
    fitted, related = tested, 0
    if calibrate_on:
        fitted, left_out_too = read_pairs(calibrate_on)
        left_out += left_out_too
        related = tables.check_disjoint(fitted[0], tested[0], calibrate_on[0], paths[0], groups)
    about |= {"calibrated_on": calibrate_on, "protocol": "held-out" if calibrate_on else "out-of-fold"}
    about |= {"left_out": left_out, "near_duplicates_of_calibration_rows": related, "group_file": groups}
    test_groups = metrics.group_numbers(tables.groups_of(tested[0], groups))
    fit_groups = metrics.group_numbers(tables.groups_of(fitted[0], groups)) if calibrate_on else test_groups
    models = {}
    for name, path, rows, fit_path, fit_rows in zip(NAMES, paths, tested, calibrate_on or paths, fitted, strict=True):
        if rows[0].fingerprint != fit_rows[0].fingerprint:
            raise ValueError(f"{fit_path} is not by the model, task and settings of {path}: other fingerprints")
        try:
            models[name] = compared_model(rows, fit_rows if calibrate_on else None, fit_groups, seed, path)
        except ValueError as error:
            raise ValueError(f"{fit_path}: {error}") from None
    about["verdicts"] = verdicts_of(models, tested, test_groups, seed)
    explained = explained_texts.read_pairs(first_tokens, NAMES, [rows[0] for rows in tested]) if first_tokens else []
    others = {}
    for path, *fit_path in also:
        name = unused_name(Path(path).stem, (*NAMES, *others))
        how = {"protocol": about["protocol"], "groups": groups, "seed": seed}
        others[name] = further_model(path, *fit_path, tested=tested[0], **how)
    return ModelComparison(models, test_groups, fit_groups, about, parts, explained, seed, others)


def verdicts_of(
    models: Mapping[str, ComparedModel], tested: Sequence[Sequence[Prediction]], groups: np.ndarray, seed: int = 0
) -> dict[str, dict]:
    """Whether each model works at all, beside baselines that are learned once."""
    words = verdict.bag_of_words_for(tested[0], groups, seed)
    found = {}
    for (name, model), rows in zip(models.items(), tested, strict=True):
        found[name] = verdict.judge(rows, groups, model.confidence["calibrated"], words, seed, model.scores).record()
    return found


def unused_name(name: str, used: Sequence[str]) -> str:
    """The name, or the first of it with a number that is not in use."""
    numbered = (f"{name} {number}" for number in range(2, len(used) + 3))
    return next(found for found in (name, *numbered) if found not in used)


def further_model(
    path: str,
    fit_path: str | None = None,
    *,
    tested: Sequence[Prediction],
    protocol: str,
    groups: str | None = None,
    seed: int = 0,
) -> FurtherModel:
    """A further file's predictions of the tested rows; ValueError where it lacks one of them or says another label.

    It is calibrated on the rows of `fit_path`; without them cross-fitted, where that is the protocol of the two.
    """
    wanted = {row.id for row in tested}
    own = [row for row in predictions.read(path) if row.id in wanted]
    try:
        rows = [row for _, row in predictions.paired_rows(tested, own, ("base", "further"))]
        predictions.confidence_and_correct(rows)
        if failed := next((row for row in rows if row.error is not None), None):
            raise ValueError(f"row {failed.id!r} was not scored: {failed.error}")
    except ValueError as error:
        raise ValueError(f"--also {path}: {error}") from None
    if fit_path is None:
        fit_groups = metrics.group_numbers(tables.groups_of(rows, groups))
        if protocol == "out-of-fold":
            return FurtherModel(compared_model(rows, None, fit_groups, seed, path), fit_groups)
        return FurtherModel(uncalibrated_model(rows, path), None)
    fitted, _ = predictions.read_labelled(fit_path)
    if fitted[0].fingerprint != rows[0].fingerprint:
        raise ValueError(f"{fit_path} is not by the model, task and settings of {path}: other fingerprints")
    tables.check_disjoint(fitted, rows, fit_path, path)
    fit_groups = metrics.group_numbers(tables.groups_of(fitted))
    return FurtherModel(compared_model(rows, fitted, fit_groups, seed, path), fit_groups)


def uncalibrated_model(rows: Sequence[Prediction], path: str) -> ComparedModel:
    """One model's raw confidences alone."""
    from calibration import scores_of

    scores = scores_of(rows)
    about = {"file": path, "model": rows[0].model, "fingerprint": rows[0].fingerprint, "calibrator": "none"}
    nothing = np.empty(0)
    return ComparedModel(about, scores, {"raw": scores.confidence}, nothing, nothing.astype(bool), rows)


def read_pairs(paths: Sequence[str]) -> tuple[list[list[Prediction]], int]:
    """Each model's records of the rows that both scored, and how many rows are left out; ValueErrors name the files."""
    base, fine_tuned = map(predictions.read, paths)
    try:
        pairs = predictions.paired_rows(base, fine_tuned, NAMES)
        if base[0].fingerprint == fine_tuned[0].fingerprint:
            raise ValueError(f"both have the fingerprint {base[0].fingerprint}: it is one model, not two")
        for row in (*base, *fine_tuned):
            if row.method != base[0].method:
                raise ValueError(f"row {row.id!r} is by method {row.method!r}, another by {base[0].method!r}")
        scored = [pair for pair in pairs if pair[0].error is None and pair[1].error is None]
        if not scored:
            raise ValueError("no row was scored by both models")
        if unlabelled := sum(row.label is None for row, _ in scored):
            raise ValueError(f"{unlabelled:,} of {len(scored):,} rows have no label, so nobody knows if they are right")
    except ValueError as error:
        raise ValueError(f"{paths[0]} and {paths[1]}: {error}") from None
    return [list(rows) for rows in zip(*scored, strict=True)], len(pairs) - len(scored)


def check_prompt(adapter: str | None, paths: Sequence[str], tested: Sequence[Sequence[Prediction]]) -> str:
    """How the prompt is known to be the same; ValueError when the adapter's record says that it is not.

    The record holds the fingerprints that Method 1 gives to both models with the prompt of the training.
    """
    if adapter in (None, "none"):
        return "checked by task name and method only; --adapter FOLDER checks it by the training's record"
    path, method = f"{adapter}/training_config.json", tested[0][0].method
    if method != "logprobs":
        raise ValueError(f"{path} knows the prompt of Method 1, these predictions are by method {method!r}")
    record = files.validated(dict, files.read_json(path), path)
    known = files.validated(dict[str, str], record.get("fingerprints"), f"{path}: fingerprints of base and tuned")
    known, found = [known.get("base"), known.get("tuned")], [rows[0].fingerprint for rows in tested]
    if found == known[::-1]:
        raise ValueError(f"{paths[0]} is the fine-tuned model's and {paths[1]} the base model's; change their places")
    for name, file, theirs, ours in zip(NAMES, paths, known, found, strict=True):
        if theirs != ours:
            raise ValueError(
                f"{file} has the fingerprint {ours}, {path} says {theirs} of the {name} model: another model, prompt "
                "or precision. Score the rows as after the training, or compare without this check by --adapter none"
            )
    return f"that of the training: both fingerprints stand in {path}"


def compared_model(
    rows: Sequence[Prediction],
    fit_rows: Sequence[Prediction] | None,
    fit_groups: np.ndarray,
    seed: int = 0,
    path: str = "",
) -> ComparedModel:
    """One model's confidences before and after each calibrator, fitted on `fit_rows`; None: cross-fitted on `rows`."""
    from calibration import LEAST_ROWS, Recipe, choose, cross_fit, recipe_of, scores_of

    test = scores_of(rows)
    fit = test if fit_rows is None else scores_of(fit_rows)

    def calibrated(recipe: Recipe) -> np.ndarray | None:
        try:
            if fit_rows is None:
                return cross_fit(recipe.estimator(), *recipe.inputs(fit), fit_groups, seed=seed)
            return recipe.estimator().fit(*recipe.inputs(fit)).predict(recipe.inputs(test)[0])
        except ValueError:  # as a fold without one of the labels; the others can be shown
            return None

    confidence = {"raw": test.confidence} | {n: calibrated(recipe_of(n, len(test.labels))) for n in CALIBRATORS}
    chosen, confidence["calibrated"], out_of_fold = "raw, as every row is right", test.confidence, fit.confidence
    if not fit.correct.all() or len(fit.correct) < LEAST_ROWS:
        chosen, candidates = choose(fit, fit_groups, "auto", range(seed, seed + 5))
        confidence["calibrated"], out_of_fold = calibrated(chosen), candidates[chosen].mean(axis=0)
    scaled = Recipe("temperature", True).estimator().fit(fit.probabilities, fit.truth).calibrator_
    about = {"file": path, "model": rows[0].model, "fingerprint": rows[0].fingerprint}
    about |= {"calibrator": str(chosen), "temperature": scaled.temperature_}
    return ComparedModel(about, test, confidence, out_of_fold, fit.correct, rows)


# The parts of the rows


def breakdown(
    rows: Sequence[Prediction], table: str | None = None, by: Sequence[str] | None = None
) -> dict[str, dict[str, np.ndarray]]:
    """column -> value -> which rows have it, bool [n]; of our own dataset with what its neutral texts hide."""
    source = table or OUR_ROWS
    is_ours, by_id = source.startswith("data:"), rows_by_id(source)
    lost = [row.id for row in rows if row.id not in by_id or by_id[row.id].get("text", row.text) != row.text]
    if lost and table:
        raise ValueError(f"{source} does not hold the row {lost[0]!r} with its text")
    if lost and by:
        raise ValueError("--by needs --rows TABLE, a table of the rows' ids and these columns")
    if lost:  # nothing is known of these rows
        return {}
    cells = [by_id[row.id] for row in rows]
    values = {}
    for column in by or (["category", "difficulty,part"] if is_ours else []):
        names = [column] if column in cells[0] else column.split(",")
        for name in names:
            if any(name not in row for row in cells):
                raise ValueError(f"--by {column}: not every row of {source} has the column {name!r}")
        values[column] = [", ".join(str(row[name]) for name in names) for row in cells]
    if is_ours:
        values[PLANTED_RULE] = [what_decides(row) for row in cells]
    parts = {}
    for column, found in values.items():
        parts[column] = {value: np.array([v == value for v in found]) for value in sorted({*found} - {None})}
    return parts


def rows_by_id(source: str) -> dict[str, Mapping]:
    """id -> columns of a table."""
    by_id = {}
    for where, row in tables.read_rows(source):
        if "id" not in row:
            raise ValueError(f"{where}: --rows needs the column id; it has {', '.join(map(str, row))}")
        if (id := str(row["id"])) in by_id:
            raise ValueError(f"{where}: the id {id!r} stands twice in {source}")
        by_id[id] = row
    return by_id


def what_decides(row: Mapping) -> str | None:
    """What decides the label of a neutral text of our dataset, its domain or chance; None of other texts."""
    if row["difficulty"] != "neutral":
        return None
    return row["domain"] if row["part"] == "domain" else RANDOMLY_LABELLED


# Measuring


def comparison_report(
    comparison: ModelComparison, review_cost: float = 5.0, error_cost: float = 25.0, volume: int = 1000
) -> dict:
    """Every number, as it stands in report.json."""
    groups, fit_groups = comparison.groups, comparison.fit_groups
    report = {"models": {name: model.about for name, model in comparison.models.items()}} | comparison.about
    report |= {"rows": len(groups), "groups": metrics.group_count(groups)}
    report |= {"calibration_rows": len(fit_groups), "calibration_groups": metrics.group_count(fit_groups)}
    prices = {"review_cost": review_cost, "error_cost": error_cost, "volume": volume}
    report["settings"] = prices | {"groups": report.pop("group_file"), "seed": comparison.seed}
    base, fine_tuned = comparison.models.values()
    correct, alone = (base.scores.correct, fine_tuned.scores.correct), metrics.one_of_each(groups)
    report["right"] = {"all rows": mcnemar(*correct), "one row of each group": mcnemar(*(c[alone] for c in correct))}
    keys = [key for key in base.confidence if all(m.confidence[key] is not None for m in (base, fine_tuned))]
    report["scores"] = scores_by(comparison, keys)
    report["steps"] = {
        key: log_loss_steps(report["scores"], key) for key in ("temperature", "calibrated") if key in keys
    }
    report["sure"] = {score: sure_answers(comparison, score) for score in ("raw", "calibrated")}
    report["guarantees"] = guaranteed_automation(comparison)
    report["money"] = daily_dollars(comparison, **prices)
    report["parts"] = {column: accuracy_by_part(comparison, parts) for column, parts in comparison.parts.items()}
    report["first_tokens"] = comparison.first_tokens
    report["all_models"] = all_models(comparison) if comparison.also else {}
    return report


def mcnemar(base: np.ndarray, fine_tuned: np.ndarray) -> dict:
    """Rows by who is right, and the exact two-sided p that of the rows one model alone has right, each has half.

    McNemar, Psychometrika 1947. The test takes rows that do not depend on each other.
    """
    from scipy.stats import binomtest

    who = {"both": base & fine_tuned, "only base": base & ~fine_tuned, "only fine-tuned": fine_tuned & ~base}
    counts = {"n": len(base)} | {name: int(rows.sum()) for name, rows in who.items()}
    counts["neither"] = len(base) - int((base | fine_tuned).sum())
    apart = counts["only base"] + counts["only fine-tuned"]
    return counts | {"p": float(binomtest(counts["only base"], apart).pvalue) if apart else 1.0}


def paired(
    comparison: ModelComparison, numbers: Callable[[str, np.ndarray], Mapping[object, float]]
) -> dict[object, dict[str, list]]:
    """name -> base, fine-tuned and difference (fine-tuned - base), each [value, low, high]; None where undefined.

    `numbers` are a function of a model's name and of row numbers. The 95 % intervals are percentiles of a bootstrap of
    whole groups that draws the same rows for both models.
    """

    def flat(rows: np.ndarray) -> np.ndarray:  # [3 * numbers]
        base, fine_tuned = (np.array([*numbers(name, rows).values()], dtype=np.float64) for name in NAMES)
        return np.column_stack([base, fine_tuned, fine_tuned - base]).ravel()

    everything, seed = np.arange(len(comparison.groups)), comparison.seed
    found = np.column_stack([flat(everything), metrics.bootstrap_interval(flat, comparison.groups, seed=seed)])
    spans = iter([None if math.isnan(value) else value for value in span] for span in found.tolist())
    return {name: {key: next(spans) for key in (*NAMES, "difference")} for name in numbers("base", everything)}


SCORES = {
    "accuracy": lambda confidence, correct: correct.mean(),
    "mean confidence": lambda confidence, correct: confidence.mean(),
    "log loss": metrics.log_loss,
    "Brier": metrics.brier_score,
    "AUROC": metrics.auroc,
    "AURC": metrics.area_under_risk_coverage,
    "ECE": metrics.expected_calibration_error,
    "ECE, squared, debiased": metrics.debiased_calibration_error,
}
OF_CALIBRATORS = ("log loss", "Brier", "ECE")


def scores_by(comparison: ModelComparison, keys: Sequence[str]) -> dict[str, dict[str, dict]]:
    """Both models' scores with their differences for each key: "raw", first, calibrators, or "calibrated".

    Beside them each model's own row of `calibration_metrics`, with the ECE expected if calibrated and MCE's count of
    rows; of a calibrator that stands only for comparison just the expected ECE. The samples are the same for all keys.
    """

    def numbers(name: str, rows: np.ndarray) -> dict[tuple[str, str], float]:
        model, found = comparison.models[name], {}
        correct = model.scores.correct[rows]
        for key in keys:
            confidence = model.confidence[key][rows]
            for score in OF_CALIBRATORS if key in CALIBRATORS else SCORES:
                found[key, score] = SCORES[score](confidence, correct)
            if key != "raw":
                found[key, "calibration part"] = found["raw", "log loss"] - found[key, "log loss"]
            elif len(model.scores.labels) > 2:  # of two it is the log loss of the confidence
                losses = metrics.label_losses(model.scores.probabilities[rows], model.scores.truth[rows])
                found[key, "log loss of the true label"] = float(losses.mean())
        return found

    table = {key: {"paired": {}} for key in keys}
    for (key, score), spans in paired(comparison, numbers).items():
        table[key]["paired"][score] = spans
    for key in keys:
        for name in NAMES:
            table[key][name] = own_scores(comparison, key, name)
            if key not in CALIBRATORS:
                exact = [table[key][name][f"accuracy{end}"] for end in ("", "_low", "_high")]
                table[key]["paired"]["accuracy"][name] = exact
    return table


def own_scores(comparison: ModelComparison, key: str, name: str) -> dict:
    """One model's row of `calibration_metrics`; of a calibrator that stands only for comparison the expected ECE."""
    confidence, correct = comparison.models[name].confidence[key], comparison.models[name].scores.correct
    protocol = "nothing fitted" if key == "raw" else comparison.about["protocol"]
    if key in CALIBRATORS:
        expected = metrics.consistency_resampling(confidence, seed=comparison.seed).mean()
        return {"protocol": protocol, "ece_noise_floor": float(expected)}
    return metrics.calibration_metrics(
        confidence, correct, groups=comparison.groups, protocol=protocol, seed=comparison.seed
    )


def log_loss_steps(scores: Mapping[str, dict], key: str) -> dict[str, list]:
    """The change in log loss of each step from base to fine-tuned, [value, low, high]; three add up to the last.

    `key` says what calibrates both models: a temperature, or the calibrator that each has chosen.
    """
    calibrated = scores[key]["paired"]
    value, low, high = calibrated["calibration part"]["base"]
    return {
        "what it does for the base model": [-value, -high, -low],
        "what fine-tuning does beyond it": calibrated["log loss"]["difference"],
        "what the fine-tuned model lacks without it": calibrated["calibration part"]["fine-tuned"],
        "together: fine-tuned raw - base raw": scores["raw"]["paired"]["log loss"]["difference"],
    }


def sure_answers(comparison: ModelComparison, score: str) -> dict[str, list[dict]]:
    """How many rows each model is sure of, and how many of them it has right."""
    models = comparison.models.items()
    return {name: decisions.automation(m.confidence[score], m.scores.correct, SURE) for name, m in models}


def guaranteed_automation(comparison: ModelComparison) -> list[dict]:
    """What each model can automate at a guaranteed accuracy: the threshold, how it fares on all test rows, the shares.

    Thresholds come from out-of-fold scores of the fit rows. They stay as they are in the resamples of the difference;
    what varies there is which rows come.
    """
    found = []
    for target in TARGETS:
        row = {"target": target}
        for name, model in comparison.models.items():
            row[name] = guarantee_of(model, comparison.fit_groups, target)
        found.append(row)

    def shares(name: str, rows: np.ndarray) -> dict[float, float]:
        confidence = comparison.models[name].confidence["calibrated"][rows]
        values = {row["target"]: row[name]["threshold"]["value"] for row in found}
        return {t: 0.0 if value is None else (confidence >= value).mean() for t, value in values.items()}

    share = paired(comparison, shares)
    return [row | {"share": share[row["target"]]} for row in found]


OF_ALL_MODELS = ("accuracy", "log loss of the true label", "AUROC of the confidence")


def all_models(comparison: ModelComparison) -> dict[str, dict]:
    """The two models and the further ones: their scores, each minus the base model's, and what they can automate.

    Differences are of the same rows, [value, low, high] with 95 % intervals from a bootstrap of whole groups.
    """
    both = {name: FurtherModel(model, comparison.fit_groups) for name, model in comparison.models.items()}
    models = both | comparison.also

    def of_rows(rows: np.ndarray) -> np.ndarray:  # [2, models, scores]: as they are, and minus the first model's
        scores = []
        for one in models.values():
            own = one.model.scores[rows]
            losses = metrics.label_losses(own.probabilities, own.truth)
            scores.append([own.correct.mean(), losses.mean(), metrics.auroc(own.confidence, own.correct)])
        return np.array([scores, np.subtract(scores, scores[0])])

    def flat(rows: np.ndarray) -> np.ndarray:
        return of_rows(rows).ravel()

    value = of_rows(np.arange(len(comparison.groups)))
    spans = metrics.bootstrap_interval(flat, comparison.groups, seed=comparison.seed).reshape(*value.shape, 2)
    table = np.where(np.isnan(spans), None, spans)
    found = {}
    for number, (name, one) in enumerate(models.items()):
        found[name] = {"about": one.model.about, "scores": {}, "minus base": {}, "guarantees": []}
        for kind, key in enumerate(("scores", "minus base")):
            for place, score in enumerate(OF_ALL_MODELS):
                point = value[kind, number, place]
                found[name][key][score] = [None if math.isnan(point) else point, *table[kind, number, place]]
        if one.fit_groups is not None:
            found[name]["guarantees"] = [
                {"target": target} | guarantee_of(one.model, one.fit_groups, target) for target in TARGETS
            ]
    return found


def guarantee_of(model: ComparedModel, fit_groups: np.ndarray, target: float) -> dict:
    """A ladder of certainty, from out-of-fold scores of the fit rows and measured on the test rows; its first rung."""
    known, test = (model.out_of_fold, model.fit_correct), (model.confidence["calibrated"], model.scores.correct)
    ladder = decisions.measured_ladder(known, test, target, fit_groups)
    return ladder[0] | {"ladder": ladder}


def daily_dollars(comparison: ModelComparison, review_cost: float, error_cost: float, volume: int) -> dict:
    """A day of `volume` predictions, each model automating from the cost-optimal calibrated confidence on."""
    prices = review_cost, error_cost
    threshold = decisions.cost_optimal_threshold(*prices)

    def dollars(name: str, rows: np.ndarray) -> dict[str, float]:
        model = comparison.models[name]
        confidence, correct = model.confidence["calibrated"][rows], model.scores.correct[rows]
        return {"dollars": volume * decisions.costs(confidence, correct, [threshold], *prices)[0]}

    found = {"threshold": threshold, "review_everything": volume * review_cost}
    for name, model in comparison.models.items():
        (row,) = decisions.automation(model.confidence["calibrated"], model.scores.correct, [threshold])
        row["automate_everything"] = volume * error_cost * float(1 - model.scores.correct.mean())
        found[name] = row | decisions.dollars_a_day(row["share"], row["accuracy"], volume, *prices)
    return found | paired(comparison, dollars)


def accuracy_by_part(comparison: ModelComparison, parts: Mapping[str, np.ndarray]) -> dict[str, dict]:
    """Both models in each part of the rows: accuracy, its difference with McNemar's test, mean confidence."""

    def accuracies(name: str, rows: np.ndarray) -> dict[str, float]:
        correct = comparison.models[name].scores.correct
        inside = {value: rows[mine[rows]] for value, mine in parts.items()}
        return {value: correct[mine].mean() if len(mine) else math.nan for value, mine in inside.items()}

    table, found = {}, paired(comparison, accuracies)
    for value, mine in parts.items():
        row = mcnemar(*(model.scores.correct[mine] for model in comparison.models.values()))
        row["difference"] = found[value]["difference"]
        for name, model in comparison.models.items():
            right = int(model.scores.correct[mine].sum())
            row[name] = {"accuracy": [right / row["n"], *metrics.exact_interval(right, row["n"])]}
            row[name] |= {score: float(model.confidence[score][mine].mean()) for score in ("raw", "calibrated")}
        table[value] = row
    return table


# The page


def page_data(comparison: ModelComparison, report: dict) -> dict:
    """What comparison.html shows."""
    scores = comparison.models["base"].scores
    of_labels = {scores.labels[number]: scores.truth == number for number in np.unique(scores.truth)}
    return html_report.comparison_data(report, comparison.models, accuracy_by_part(comparison, of_labels))


if __name__ == "__main__":
    command_line.run(main)
