"""Did fine-tuning help, or did the base model only need a temperature? Two models on the same rows, in pairs.

    python compare_base_vs_finetuned.py                              # the recorded predictions of this repository
    python compare_base_vs_finetuned.py base.jsonl tuned.jsonl       # yours: the same rows by both, cross-fitted
    python compare_base_vs_finetuned.py base.jsonl tuned.jsonl --calibrate-on base_cal.jsonl tuned_cal.jsonl

    L(tuned) - L(base) =   L(base, T) - L(base)         what a temperature T gives the base model
                         + L(tuned, T) - L(base, T)     what fine-tuning gives beyond that
                         + L(tuned) - L(tuned, T)       less what a temperature gives the tuned one

L is the log loss. Accuracies are compared by McNemar's exact test on the rows that only one model has right, all else
by the difference on the same rows, tuned - base, with a 95 % interval that resamples whole groups for both at once.
Each model has calibrators of its own; neither is measured on rows that its calibrators saw.

It reads labelled predictions files, no model, and refuses two that are not of the same rows, labels and prompt. It
prints a report and writes report.json and six figures into --output-dir.
"""

from __future__ import annotations

import argparse
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import numpy as np

import calibration_metrics as metrics
import command_line
import decisions
import plotting
import predictions
import tables
import task as tasks

if TYPE_CHECKING:
    from calibration import Recipe, Scores

ROOT = Path(__file__).resolve().parent
RECORDED = ("test", "calibration", "first_tokens")  # base_NAME.jsonl and tuned_NAME.jsonl in data/predictions/
ADAPTER = ROOT / "fine_tuned_sentiment_model"
OURS = "data:test"
NAMES, TITLES, COLORS = ("base", "tuned"), ("base", "fine-tuned"), (plotting.ORANGE, plotting.BLUE)
CALIBRATORS = ("temperature", "platt", "beta", "isotonic", "venn-abers")
PROMISES, DELTA = (0.8, 0.9, 0.95), 0.05
SURE = (0.9, 0.95)  # the confidences from which rows count as sure
SHOWN_TOKENS = 12
MOST_PARTS = 30  # lines of a figure
RULE, COIN = "hidden rule of the neutral texts", "by a coin"
Pair = tuple[predictions.Prediction, predictions.Prediction]  # the same row by the base and by the tuned model


@dataclass(frozen=True)
class Side:
    """One model: its test rows, what calibrators make of its confidence, and what its thresholds come from."""

    path: str
    row: predictions.Prediction  # any: model, method, task and fingerprint are those of all
    scores: Scores  # test rows
    recipe: Recipe | None  # of the least out-of-fold log loss; None where every fit row is right
    confidence: dict[str, np.ndarray | None]  # "raw", each calibrator of P(label), "calibrated" (by the recipe), [n]
    choosing: np.ndarray  # out-of-fold by the recipe, of the fit rows
    choosing_correct: np.ndarray
    temperature: float  # fitted on all fit rows

    @property
    def calibrator(self) -> str:
        return str(self.recipe) if self.recipe else "raw, as every row that one could be fitted on is right"


@dataclass(frozen=True)
class Study:
    """Both models on the same rows."""

    sides: tuple[Side, Side]
    groups: np.ndarray
    fit_groups: np.ndarray
    parts: dict[str, dict[str, np.ndarray]]  # column -> value -> which test rows, bool [n]
    protocol: str  # of what is fitted: "held-out" or "out-of-fold"
    left_out: int
    related: int  # test rows with a near-duplicate among the calibration rows
    prompt: str  # how it is known to be the same
    first_tokens: list[dict]  # of each explained text: the text and what both models said

    @property
    def count(self) -> str:
        n, groups = len(self.groups), len(np.unique(self.groups))
        return f"n = {n:,}" + (f" in {groups:,} groups" if groups < n else "")

    @property
    def where(self) -> str:
        """What every table and figure says of its numbers: n, groups if rows belong together, and the protocol."""
        return f"{self.count}, {self.protocol}"


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_arguments(argv)
    study = prepare(args)
    report = measure(study, args)
    print(render(study, report))
    folders = args.output_dir, args.images or args.output_dir
    with new_files(*map(Path, folders)) as (folder, images):
        text = json.dumps(report, indent=1, allow_nan=False, default=float)
        (folder / "report.json").write_text(text + "\n", encoding="utf-8")
        draw(study, report, images)
    print("\nWritten: report.json and six figures, in " + command_line.printable(" and ".join(dict.fromkeys(folders))))


@contextmanager
def new_files(*folders: Path) -> Iterator[list[Path]]:
    """An empty folder for each of `folders`; at the end their files move there, all of them or none."""
    with ExitStack() as stack:
        parts = []
        for folder in folders:
            folder.mkdir(parents=True, exist_ok=True)
            parts.append(Path(stack.enter_context(TemporaryDirectory(dir=folder, prefix="."))))
        yield parts
        moves = [(path, to / path.name) for part, to in zip(parts, folders, strict=True) for path in part.iterdir()]
        if blocked := next((to for _, to in moves if to.is_dir()), None):
            raise ValueError(f"{blocked} is a folder; nothing was written")
        for path, to in moves:
            path.replace(to)


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = command_line.ArgumentParser(__doc__)
    add = parser.add_argument
    add("base", metavar="BASE", nargs="?", help="predictions of the base model (default: the recorded ones)")
    add("tuned", metavar="TUNED", nargs="?", help="predictions of the fine-tuned model, of the same rows")
    add("--calibrate-on", metavar=("BASE", "TUNED"), nargs=2, help="predictions of other rows, to fit and choose on")
    add("--adapter", metavar="FOLDER", help="the LoRA folder, whose training_config.json knows the prompt; or none")
    add("--first-tokens", metavar=("BASE", "TUNED"), nargs=2, help="what logprobs_confidence.py --json said of texts")
    add("--rows", metavar="TABLE", help=f"a table of the rows' ids and columns (default: {OURS} if they are those)")
    add("--by", metavar="COLUMN", nargs="+", help="columns to break down by; a comma joins two, as difficulty,part")
    decisions.add_cost_arguments(parser)
    tables.add_groups_argument(parser)
    add("--seed", type=command_line.natural, metavar="N", default=0, help="of folds and resampling (default: 0)")
    add("--output-dir", default="comparison_report", metavar="FOLDER", help="default: comparison_report")
    add("--images", metavar="FOLDER", help="for the figures (default: the same)")
    args = parser.parse_args(argv)
    if args.base and not args.tuned:
        parser.error("two predictions files are compared: BASE and TUNED")
    if args.calibrate_on and not args.base:
        parser.error("--calibrate-on goes with BASE and TUNED")
    if not args.base:
        use_recorded(args)
    decisions.check_cost_arguments(parser, args)
    for flag, folder in (("--output-dir", args.output_dir), ("--images", args.images)):
        if folder and Path(folder).exists() and not Path(folder).is_dir():
            parser.error(f"{flag} {folder} is a file")
    return args


def use_recorded(args: argparse.Namespace) -> None:
    """The recorded predictions, as if their files had been named."""
    folder = ROOT / "data/predictions"
    files = [[os.path.relpath(folder / f"{model}_{name}.jsonl") for model in NAMES] for name in RECORDED]
    (args.base, args.tuned), args.calibrate_on, first_tokens = files
    args.first_tokens = args.first_tokens or first_tokens
    args.groups = args.groups or os.path.relpath(ROOT / "data/sentiment/splits.csv")
    if args.adapter is None and ADAPTER.is_dir():
        args.adapter = os.path.relpath(ADAPTER)


# Reading


def prepare(args: argparse.Namespace) -> Study:
    """Read both models' rows, refuse what cannot be compared, and calibrate each model by itself."""
    pairs, left_out = read_pairs(args.base, args.tuned)
    prompt = check_prompt(args, *pairs[0])
    first_tokens = read_first_tokens(args, pairs[0]) if args.first_tokens else []
    rows = [base for base, _ in pairs]
    parts = breakdown(args, rows, read_table(args, rows))
    fit_pairs, related = pairs, 0
    if args.calibrate_on:
        fit_pairs, left_out_too = read_pairs(*args.calibrate_on)
        left_out, related = left_out + left_out_too, check_apart(args, pairs, fit_pairs)
    fit_groups = metrics.group_numbers(tables.groups_of([base for base, _ in fit_pairs], args.groups))
    groups = metrics.group_numbers(tables.groups_of(rows, args.groups))
    sides = []
    for k, path in enumerate((args.base, args.tuned)):
        try:
            sides.append(calibrate(path, [p[k] for p in pairs], [p[k] for p in fit_pairs], fit_groups, args))
        except ValueError as error:
            raise ValueError(f"{args.calibrate_on[k] if args.calibrate_on else path}: {error}") from None
    protocol = "held-out" if args.calibrate_on else "out-of-fold"
    return Study(tuple(sides), groups, fit_groups, parts, protocol, left_out, related, prompt, first_tokens)


def read_pairs(base: str, tuned: str) -> tuple[list[Pair], int]:
    """The rows that both models scored, and how many others there are; ValueErrors name the files."""
    files = predictions.read(base), predictions.read(tuned)
    try:
        pairs = predictions.paired_rows(*files, NAMES)
        one, two = pairs[0]
        if one.fingerprint == two.fingerprint:
            raise ValueError(
                f"both have the fingerprint {one.fingerprint}: it is one model, not a base and a tuned one"
            )
        if other := next((row for rows in files for row in rows if row.method != one.method), None):
            raise ValueError(f"row {other.id!r} is by method {other.method!r}, another by {one.method!r}")
        both = [(one, two) for one, two in pairs if one.error is None and two.error is None]
        if not both:
            raise ValueError("no row was scored by both models")
        if unlabelled := sum(one.label is None for one, _ in both):
            raise ValueError(f"{unlabelled:,} of {len(both):,} rows have no label, so nobody knows if they are right")
    except ValueError as error:
        raise ValueError(f"{base} and {tuned}: {error}") from None
    return both, len(pairs) - len(both)


def check_prompt(args: argparse.Namespace, base: predictions.Prediction, tuned: predictions.Prediction) -> str:
    """How the prompt is known to be the same; ValueError when the adapter's record says that it is not.

    The record holds the fingerprints that Method 1 gives to both models with the prompt of the training.
    """
    if args.adapter in (None, "none"):
        return (
            "the prompt was checked by task name and method only; --adapter FOLDER checks it by the training's record"
        )
    path = Path(args.adapter) / "training_config.json"
    if base.method != "logprobs":
        raise ValueError(f"{path} knows the prompt of Method 1, these predictions are by method {base.method!r}")
    try:
        known = json.loads(path.read_text(encoding="utf-8"))["fingerprints"]
        known = [str(known[name]) for name in NAMES]
    except (ValueError, KeyError, TypeError, RecursionError):
        raise ValueError(f"{path} does not hold the fingerprints of base and tuned; train again to have them") from None
    found = [base.fingerprint, tuned.fingerprint]
    if found == known[::-1]:
        raise ValueError(f"{args.base} is the tuned model's and {args.tuned} the base model's; change their places")
    for name, file, theirs, ours in zip(NAMES, (args.base, args.tuned), known, found, strict=True):
        if theirs != ours:
            raise ValueError(
                f"{file} has the fingerprint {ours}, {path} says {theirs} of the {name} model: another model, prompt "
                "or precision. Score the rows as after the training, or compare without this check by --adapter none"
            )
    return f"the prompt is that of the training: both fingerprints stand in {command_line.printable(str(path))}"


def check_apart(args: argparse.Namespace, pairs: Sequence[Pair], fit_pairs: Sequence[Pair]) -> int:
    """How many test rows have a near-duplicate among the calibration rows; ValueError if one is among them itself."""
    from calibration import text_key

    files = (args.base, args.tuned), args.calibrate_on
    for path, fit_path, row, fit_row in zip(*files, pairs[0], fit_pairs[0], strict=True):
        if (row.fingerprint, [*row.probabilities]) != (fit_row.fingerprint, [*fit_row.probabilities]):
            raise ValueError(f"{fit_path} is not by the model, task and settings of {path}: the fingerprints differ")
    known = {text_key(one.text) for one, _ in fit_pairs}
    if seen := [one.id for one, _ in pairs if text_key(one.text) in known]:
        raise ValueError(
            f"{len(seen)} rows of {args.base} are in {args.calibrate_on[0]} too, the first is {seen[0]!r}; "
            "nothing is measured on rows it was fitted on"
        )
    alike = tables.near_duplicates([one.text for one, _ in (*fit_pairs, *pairs)])
    return len({j for i, j, _ in alike if i < len(fit_pairs) <= j})


def calibrate(
    path: str,
    rows: list[predictions.Prediction],
    fit_rows: list[predictions.Prediction],
    fit_groups: np.ndarray,
    args: argparse.Namespace,
) -> Side:
    """One model's confidences before and after each calibrator: fitted on `fit_rows`, or cross-fitted on `rows`."""
    from calibration import LEAST_ROWS, Recipe, choose, cross_fit, scores_of

    test, fit = scores_of(rows), scores_of(fit_rows)

    def by(recipe: Recipe) -> np.ndarray | None:
        try:
            if not args.calibrate_on:
                return cross_fit(recipe.estimator(), *recipe.inputs(fit), fit_groups, seed=args.seed)
            return recipe.estimator().fit(*recipe.inputs(fit)).predict(recipe.inputs(test)[0])
        except ValueError:  # as a fold without one of the labels; the others can be shown
            return None

    recipe, calibrated, choosing = None, test.confidence, fit.confidence
    if not fit.correct.all() or len(fit_rows) < LEAST_ROWS:
        recipe, candidates = choose(fit, fit_groups, "auto", range(args.seed, args.seed + 5))
        calibrated, choosing = by(recipe), candidates[recipe].mean(axis=0)
    confidence = {"raw": test.confidence, **{name: by(Recipe(name, True)) for name in CALIBRATORS}}
    scaled = Recipe("temperature", True).estimator().fit(fit.probabilities, fit.truth).calibrators_["all"]
    confidence["calibrated"] = calibrated
    return Side(path, rows[0], test, recipe, confidence, choosing, fit.correct, scaled.temperature_)


def read_table(args: argparse.Namespace, rows: Sequence[predictions.Prediction]) -> list[Mapping] | None:
    """The columns of each row, from --rows; by default from our dataset where the rows are its own, else None."""
    source, table = args.rows or OURS, {}
    for where, columns in tables.read_rows(source):
        if "id" not in columns:
            raise ValueError(f"{where}: --rows needs the column id; it has {', '.join(map(str, columns))}")
        if (id := str(columns["id"])) in table:
            raise ValueError(f"{where}: the id {id!r} stands twice in {source}")
        table[id] = columns
    other = [row.id for row in rows if row.id not in table or table[row.id].get("text", row.text) != row.text]
    if not other:
        return [table[row.id] for row in rows]
    if args.rows:
        raise ValueError(f"{source} does not hold the row {other[0]!r} with its text")
    if args.by:
        raise ValueError("--by needs --rows TABLE, a table of the rows' ids and these columns")
    return None


def breakdown(
    args: argparse.Namespace, rows: Sequence[predictions.Prediction], table: Sequence[Mapping] | None
) -> dict[str, dict[str, np.ndarray]]:
    """column -> value -> which rows have it, bool [n]; of our own dataset with what its neutral texts hide."""
    source = args.rows or OURS
    if table is None:
        return {}
    values = {}
    for column in args.by or (["category", "difficulty,part"] if source.startswith("data:") else []):
        names = [column] if column in table[0] else column.split(",")
        if lost := [name for name in names if any(name not in columns for columns in table)]:
            raise ValueError(f"--by {column}: not every row of {source} has the column {lost[0]!r}")
        values[column] = [", ".join(str(columns[name]) for name in names) for columns in table]
    if source.startswith("data:"):  # what decides the label of a neutral text: its domain, or a coin
        of_neutral = [columns["domain"] if columns["part"] == "domain" else COIN for columns in table]
        is_neutral = [columns["difficulty"] == "neutral" for columns in table]
        values[RULE] = [value if neutral else None for value, neutral in zip(of_neutral, is_neutral, strict=True)]
    return {
        column: {value: np.array([v == value for v in found]) for value in sorted({*found} - {None})}
        for column, found in values.items()
    }


# Measuring


def measure(study: Study, args: argparse.Namespace) -> dict:
    """Every number of the report."""
    correct = [side.scores.correct for side in study.sides]
    alone = metrics.one_of_each(study.groups)
    models = {
        name: {"file": side.path, "model": side.row.model, "fingerprint": side.row.fingerprint}
        | {"calibrator": side.calibrator, "temperature": side.temperature}
        for name, side in zip(NAMES, study.sides, strict=True)
    }
    keys = [k for k in ("raw", *CALIBRATORS, "calibrated") if all(s.confidence[k] is not None for s in study.sides)]
    return {
        "models": models,
        "calibrated_on": args.calibrate_on,
        "protocol": study.protocol,
        "rows": len(study.groups),
        "groups": len(np.unique(study.groups)),
        "calibration_rows": len(study.fit_groups),
        "calibration_groups": len(np.unique(study.fit_groups)),
        "left_out": study.left_out,
        "near_duplicates_of_calibration_rows": study.related,
        "prompt": study.prompt,
        "settings": {key: getattr(args, key) for key in ("review_cost", "error_cost", "volume", "groups", "seed")},
        "right": {"all rows": mcnemar(*correct), "one row of each group": mcnemar(*(c[alone] for c in correct))},
        "scores": {key: scores(study, key, args.seed) for key in keys},
        "steps": {key: steps(study, key, args.seed) for key in ("temperature", "calibrated") if key in keys},
        "sure": {
            score: {
                name: decisions.automation(side.confidence[score], side.scores.correct, SURE)
                for name, side in zip(NAMES, study.sides, strict=True)
            }
            for score in ("raw", "calibrated")
        },
        "promises": promises(study, args.seed),
        "money": money(study, args),
        "parts": measure_parts(study, args.seed),
        "first_tokens": study.first_tokens,
    }


def mcnemar(base: np.ndarray, tuned: np.ndarray) -> dict:
    """Rows by who is right, and the exact two-sided p that of the rows one model alone has right, each has half.

    McNemar, Psychometrika 1947. The test takes rows that do not depend on each other.
    """
    from scipy.stats import binomtest

    counts = {"both": base & tuned, "only_base": base & ~tuned, "only_tuned": tuned & ~base, "neither": ~base & ~tuned}
    counts = {name: int(rows.sum()) for name, rows in counts.items()}
    apart = counts["only_base"] + counts["only_tuned"]
    p = binomtest(counts["only_tuned"], apart).pvalue if apart else 1.0
    return {"n": len(base), **counts, "p": float(p)}


Numbers = dict[object, tuple[float, float]]  # name -> (the first's, the second's)


def paired(numbers: Callable[[np.ndarray], Numbers], groups: np.ndarray, seed: int) -> dict[object, dict[str, list]]:
    """name -> base, tuned and difference (second - first), each [value, low, high]; None where undefined.

    The 95 % intervals are percentiles of a bootstrap of whole groups that draws the same rows for both.
    """

    def flat(rows: np.ndarray) -> np.ndarray:
        values = np.array([*numbers(rows).values()], dtype=np.float64)
        return np.column_stack([values, values[:, 1] - values[:, 0]]).ravel()

    everything = np.arange(len(groups))
    cells = np.column_stack([flat(everything), metrics.bootstrap_interval(flat, groups, seed=seed)]).tolist()
    cells = iter([None if math.isnan(value) else value for value in cell] for cell in cells)
    return {name: {key: next(cells) for key in (*NAMES, "difference")} for name in numbers(everything)}


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


def scores(study: Study, key: str, seed: int) -> dict[str, dict]:
    """Both models' scores with their differences, raw, by one of the calibrators or "calibrated".

    Beside them each model's own row of `calibration_metrics`, with ECE's noise floor and MCE's count of rows; of a
    calibrator that stands only for comparison just the floor.
    """
    arrays = [(side.confidence[key], side.scores.correct) for side in study.sides]
    names = OF_CALIBRATORS if key in CALIBRATORS else SCORES
    by_label = key == "raw" and len(study.sides[0].scores.labels) > 2  # of two it is the log loss of the confidence

    def numbers(rows: np.ndarray) -> Numbers:
        found = {name: tuple(float(SCORES[name](c[rows], correct[rows])) for c, correct in arrays) for name in names}
        if by_label:
            found["log loss of the true label"] = tuple(label_loss(side.scores, rows) for side in study.sides)
        return found

    table = {"paired": paired(numbers, study.groups, seed)}
    for name, (confidence, correct) in zip(NAMES, arrays, strict=True):
        if key in CALIBRATORS:
            null = metrics.consistency_resampling(confidence, seed=seed)
            table[name] = {"protocol": study.protocol, "ece_noise_floor": float(null.mean())}
            continue
        protocol = "nothing fitted" if key == "raw" else study.protocol
        own = metrics.calibration_metrics(confidence, correct, groups=study.groups, protocol=protocol, seed=seed)
        table["paired"]["accuracy"][name] = [own[f"accuracy{end}"] for end in ("", "_low", "_high")]
        table[name] = own
    return table


def label_loss(scores: Scores, rows: np.ndarray) -> float:
    """Mean -ln P(true label), which ranks models that predict different labels."""
    return float(-np.log(np.clip(scores.probabilities[rows, scores.truth[rows]], metrics.EPSILON, 1)).mean())


def steps(study: Study, key: str, seed: int) -> dict[str, list]:
    """The change in log loss of each step from base to tuned, [value, low, high]; the first three add up to the last.

    `key` says what mends both models: a temperature, or the calibrator that each has chosen.
    """

    def numbers(rows: np.ndarray) -> Numbers:
        base, base_mended, tuned, tuned_mended = (
            metrics.log_loss(side.confidence[score][rows], side.scores.correct[rows])
            for side in study.sides
            for score in ("raw", key)
        )
        return {
            "what it does for the base model": (base, base_mended),
            "what fine-tuning does beyond it": (base_mended, tuned_mended),
            "what the tuned model lacks without it": (tuned_mended, tuned),
            "together: tuned raw - base raw": (base, tuned),
        }

    return {name: found["difference"] for name, found in paired(numbers, study.groups, seed).items()}


def promises(study: Study, seed: int) -> list[dict]:
    """What each model can automate with a promise: the threshold, how it fares on all test rows, the shares.

    Thresholds come from cross-fitted scores of one fit row of each group. They stay as they are in the resamples of the
    difference; what varies there is which rows come.
    """
    alone, found = metrics.one_of_each(study.fit_groups), []
    for target in PROMISES:
        row = {"target": target}
        for name, side in zip(NAMES, study.sides, strict=True):
            chosen = decisions.choose_threshold(side.choosing[alone], side.choosing_correct[alone], target, DELTA)
            row[name] = {"threshold": chosen.record(), "measured": None}
            if chosen.value is not None:
                taken = decisions.automation(side.confidence["calibrated"], side.scores.correct, [chosen.value])
                row[name]["measured"] = taken[0]
        found.append(row)

    def shares(rows: np.ndarray) -> Numbers:
        table = {}
        for row in found:
            values = [row[name]["threshold"]["value"] for name in NAMES]
            table[row["target"]] = tuple(
                0.0 if value is None else float((side.confidence["calibrated"][rows] >= value).mean())
                for side, value in zip(study.sides, values, strict=True)
            )
        return table

    share = paired(shares, study.groups, seed)
    return [row | {"share": share[row["target"]]} for row in found]


def money(study: Study, args: argparse.Namespace) -> dict:
    """A day of --volume predictions, each model automating from the cost-optimal calibrated confidence on."""
    prices = args.review_cost, args.error_cost
    threshold = decisions.cost_optimal_threshold(*prices)
    arrays = [(side.confidence["calibrated"], side.scores.correct) for side in study.sides]

    def dollars(rows: np.ndarray) -> Numbers:
        each = (decisions.costs(c[rows], correct[rows], [threshold], *prices)[0] for c, correct in arrays)
        return {"dollars": tuple(args.volume * float(cost) for cost in each)}

    found = {"threshold": threshold, "review_everything": args.volume * args.review_cost}
    for name, (confidence, correct) in zip(NAMES, arrays, strict=True):
        row = decisions.automation(confidence, correct, [threshold])[0]
        row["automate_everything"] = args.volume * args.error_cost * float(1 - correct.mean())
        found[name] = row | decisions.dollars_a_day(row["share"], row["accuracy"], args.volume, *prices)
    return found | paired(dollars, study.groups, args.seed)


def measure_parts(study: Study, seed: int) -> dict[str, dict[str, dict]]:
    """Both models in each part of the rows: accuracy, its difference with McNemar's test, mean confidence."""
    every = {(column, value): rows for column, values in study.parts.items() for value, rows in values.items()}
    correct = [side.scores.correct for side in study.sides]

    def accuracies(rows: np.ndarray) -> Numbers:
        inside = {key: rows[mine[rows]] for key, mine in every.items()}
        return {key: tuple(c[mine].mean() if len(mine) else np.nan for c in correct) for key, mine in inside.items()}

    found = paired(accuracies, study.groups, seed) if every else {}
    table = {column: {} for column in study.parts}
    for (column, value), mine in every.items():
        row = mcnemar(*(c[mine] for c in correct)) | {"difference": found[column, value]["difference"]}
        for name, side in zip(NAMES, study.sides, strict=True):
            right = int(side.scores.correct[mine].sum())
            row[name] = {"accuracy": [right / row["n"], *metrics.exact_interval(right, row["n"])]}
            row[name] |= {score: float(side.confidence[score][mine].mean()) for score in ("raw", "calibrated")}
        table[column][value] = row
    return table


# The first tokens of some texts


def read_first_tokens(args: argparse.Namespace, pair: Pair) -> list[dict]:
    """What both models, those of `pair`, say of the same texts; ValueErrors name the file.

    The files hold what `logprobs_confidence.py --json` printed.
    """
    files = base, tuned = args.first_tokens
    said = [[explanation(row, where) for where, row in tables.read_rows(path)] for path in files]
    if not len(said[0]) == len(said[1]) > 0:
        raise ValueError(f"{base} has {len(said[0])} texts and {tuned} {len(said[1])}; they must be the same")
    for number, both in enumerate(zip(*said, strict=True), 1):
        for name in ("text", "prompt", "labels"):
            if both[0][name] != both[1][name]:
                raise ValueError(f"{base} and {tuned} differ in the {name} of line {number}")
        if both[0]["labels"] != [*pair[0].probabilities]:
            raise ValueError(f"{base} line {number} has other labels than {args.base}")
        for path, row, predicted, known in zip(files, both, (args.base, args.tuned), pair, strict=True):
            if known.method == "logprobs" and row["fingerprint"] != known.fingerprint:
                raise ValueError(
                    f"{path} line {number} has the fingerprint {row['fingerprint']}, {predicted} has "
                    f"{known.fingerprint}: another model, task or setting"
                )
    return [
        {"text": both[0]["text"]} | {name: row["shown"] for name, row in zip(NAMES, both, strict=True)}
        for both in zip(*said, strict=True)
    ]


def explanation(row: Mapping, where: str) -> dict:
    """What is compared and shown of one explained text; ValueError if the line is no explanation."""
    try:
        tokens = [
            {"token": entry["token"], "probability": math.exp(entry["logprob"]), "label": entry["label"]}
            for entry in row["top_tokens"][:SHOWN_TOKENS]
        ]
        shared = row["label_mass_high" if row.get("missing") else "label_mass"]  # what probabilities are shares of
        totals = {label: p * shared for label, p in row["probabilities"].items()}
        shown = {name: row[name] for name in ("label_mass", "prediction", "confidence")}
        numbers = [*totals.values(), shown["label_mass"], shown["confidence"], *(t["probability"] for t in tokens)]
        named = [shown["prediction"], *(token["label"] for token in tokens if token["label"] is not None)]
        strings = [row["text"], row["fingerprint"], *(token["token"] for token in tokens)]
        if not (
            all(0 <= number <= 1 + 1e-6 for number in numbers)
            and all(label in totals for label in named)
            and all(isinstance(string, str) for string in strings)
        ):
            raise ValueError
        known = {name: row[name] for name in ("text", "prompt", "fingerprint")}
    except (KeyError, TypeError, AttributeError, ValueError, OverflowError):
        raise ValueError(f"{where} is not what logprobs_confidence.py --json prints") from None
    return known | {"labels": [*totals], "shown": {"tokens": tokens, "total_probabilities": totals, **shown}}


# The printed report


def render(study: Study, report: dict) -> str:
    """What a person reads: who is right, what a temperature would have done, what it allows, and where it helps."""
    where, settings = study.where, report["settings"]
    source = "the calibration rows"
    if report["protocol"] == "out-of-fold":
        source = "these very rows, so it is in-sample"
    sections = [
        header(study, report),
        f"Right answers, {study.count}, nothing fitted:\n" + right_answers(report["right"]),
        f"Raw, {study.count}, nothing fitted:\n" + score_table(report["scores"]["raw"]) + FLOORS,
        f"Each by its calibrator, {where}:\n" + score_table(report["scores"]["calibrated"]),
        f"Before and after each calibrator of P(label), {where}; after an ECE its noise floor:\n"
        + calibrators(report["scores"]),
        f"Changes in log loss, {where}; below 0 is better, the first three add up to the last:\n"
        + findings(report["steps"]),
        f"Sure answers, {where}; intervals exact, as of independent rows:\n" + sure_answers(report["sure"]),
        f"Automated with a promise, {1 - DELTA:.0%} certain, {where}; thresholds from one row of each group of "
        f"{source}:\n" + promised(report["promises"]),
        f"A day of {settings['volume']:,} predictions at ${settings['review_cost']:g} a review and "
        f"${settings['error_cost']:g} an error, automated from {report['money']['threshold']:.2f} on by each model's "
        f"calibrator, {where}:\n" + dollars_table(report["money"]),
    ]
    for column, values in report["parts"].items():
        sections.append(
            f"By {command_line.printable(column)}, {where}; accuracies exact, as of independent rows; means are of the "
            "raw and the calibrated confidence:\n" + parts_table(values)
        )
        if COIN in values:
            sections[-1] += "\n" + coin(values[COIN])
    return "\n\n".join([*sections, *map(first_tokens, report["first_tokens"])])


def header(study: Study, report: dict) -> str:
    shown, files = command_line.printable, report["calibrated_on"]
    lines = [
        f"{name:5}  {shown(side.row.model)}, fingerprint {shown(side.row.fingerprint)}, {shown(side.path)}\n"
        f"       calibrator: {side.calibrator}; fitted temperature {side.temperature:.2f}"
        for name, side in zip(NAMES, study.sides, strict=True)
    ]
    fitted = "cross-fitted on the same rows, each measured by calibrators that did not see its group"
    if files:
        fitted = f"fitted on {' and '.join(map(shown, files))}: {report['calibration_rows']:,} rows in "
        fitted += f"{report['calibration_groups']:,} groups"
    left_out = f"; {study.left_out:,} rows left out, as a model could not score them" if study.left_out else ""
    related = f"; {study.related:,} test rows have a near-duplicate among the calibration rows" if study.related else ""
    return "\n".join(
        [
            *lines,
            f"task {shown(study.sides[0].row.task)}, the same ids, texts and labels; {study.prompt}",
            f"calibrators {fitted}",
            f"measured on {study.where}{left_out}{related}",
            "brackets are 95 % intervals; those of differences are of tuned - base on the same rows, by whole groups",
        ]
    )


def span(value: Sequence[float | None], form: str = "z.3f") -> str:
    """A number with its interval, as far as they are defined."""
    point, low, high = value
    if point is None:
        return "-"
    return f"{point:{form}}" if low is None else f"{point:{form}} [{low:{form}}, {high:{form}}]"


def share_right(row: Mapping) -> str:
    """The accuracy of a row of `decisions.automation` with its interval."""
    return span([row["accuracy"], row["accuracy_low"], row["accuracy_high"]])


def right_answers(report: dict) -> str:
    rows = [["", "n", "both", "only base", "only tuned", "neither", "exact McNemar p"]]
    for name, found in report.items():
        counts = (f"{found[key]:,}" for key in ("n", "both", "only_base", "only_tuned", "neither"))
        rows.append([name, *counts, f"{found['p']:.2g}"])
    return command_line.columns(rows, "  ")


FLOORS = (
    "\n  An ECE contains its noise floor, and the interval of its difference those of both models; the debiased error "
    "does not."
)


def score_table(report: dict) -> str:
    rows = [["", *NAMES, "tuned - base"]]
    for name, found in report["paired"].items():
        form = "z.4f" if "squared" in name else "z.3f"
        cells = [span(found[side], form) for side in NAMES]
        if name == "ECE":
            own = [report[side] for side in NAMES]
            cells = [f"{m['ece']:.3f} (floor {m['ece_noise_floor']:.3f}, p {m['ece_p_value']:.3f})" for m in own]
        rows.append([name, *cells, span(found["difference"], f"+{form}")])
    key = f"mce_{metrics.MIN_COUNT}"
    mce = [(report[side][key], report[side][f"{key}_count"]) for side in NAMES]
    cells = ["-" if value is None else f"{value:.3f} of {count:,} rows" for value, count in mce]
    return command_line.columns([*rows, [f"MCE, bins of {metrics.MIN_COUNT} or more", *cells, ""]], "  ")


def calibrators(report: dict) -> str:
    rows = [["", "", *NAMES, "tuned - base"]]
    for name in OF_CALIBRATORS:
        for method, found in report.items():
            if method == "calibrated":
                continue
            pair = found["paired"][name]
            cells = [*(span(pair[side]) for side in NAMES), span(pair["difference"], "+z.3f")]
            if name == "ECE":
                cells = [f"{pair[side][0]:.3f} ({found[side]['ece_noise_floor']:.3f})" for side in NAMES] + [""]
            rows.append([name, f"{method:11}", *cells])
    return command_line.columns(rows, "  ")


def findings(steps: Mapping[str, Mapping[str, Sequence[float]]]) -> str:
    """The steps from base to tuned, and in words whether fine-tuning helped or a temperature was needed."""
    names = {"temperature": "a temperature", "calibrated": "its own calibrator"}
    rows = [["", *(names[key] for key in steps)]]
    rows += [[name, *(span(found[name], "+z.4f") for found in steps.values())] for name in steps["calibrated"]]
    lines = [command_line.columns(rows, "  ")]
    for key, found in steps.items():
        signs = (int(round(low, 4) > 0) - int(round(high, 4) < 0) for _, low, high in found.values())
        base, tuning, tuned, _ = signs
        said = {-1: "helped", 0: "adds nothing that these rows can show", 1: "did harm"}[tuning]
        needs = {-1: ". The base model needed it", 0: "", 1: ". It harms the base model"}[base]
        needs += {-1: ". It harms the tuned model", 0: "", 1: ". The tuned model needs it"}[tuned]
        lines.append(f"  With {names[key]} for each model, fine-tuning {said}{needs}.")
    return "\n".join(lines)


def sure_answers(report: dict) -> str:
    rows = [["", "base", "right", "tuned", "right"]]
    for score, sides in report.items():
        for base, tuned in zip(*(sides[name] for name in NAMES), strict=True):
            cells = [f"{score}, {base['threshold']:.0%} or more"]
            rows.append(cells + [text for row in (base, tuned) for text in (f"{row['automated']:,}", share_right(row))])
    return command_line.columns(rows, "  ")


def promised(report: Sequence[dict]) -> str:
    rows = [["promised", "base", "right", "tuned", "right", "tuned - base, points", ""]]
    for found in report:
        cells, share = [f"{found['target']:.0%} right"], found["share"]
        for name in NAMES:
            chosen, taken = found[name]["threshold"], found[name]["measured"]
            if taken:
                cells += [f"{taken['share']:.1%} from {decisions.floor(chosen['value'], 3)}", share_right(taken)]
            else:
                more = f"about {chosen['more_labels']:,} more labels" if chosen["more_labels"] else "out of reach"
                cells += ["nothing", more]
        base, tuned = (share[name][0] for name in NAMES)
        times = f"{tuned / base:.1f} times" if base else "from nothing" if tuned else ""
        rows.append([*cells, span([100 * value for value in share["difference"]], "+z.1f"), times])
    return command_line.columns(rows, "  ")


def dollars_table(report: dict) -> str:
    def dollars(value: float) -> str:
        return f"{'-' if value < 0 else ''}${abs(value):,.0f}"

    rows = [["", "automated", "right", "reviews", "errors", "together", "", "automate everything"]]
    for name in (*NAMES, "difference"):
        point, low, high = map(dollars, report["dollars"][name])
        cells, everything = ["tuned - base", "", "", "", ""], ""
        if name in NAMES:
            row, everything = report[name], dollars(report[name]["automate_everything"])
            cells = [name, f"{row['share']:.1%}", share_right(row)]
            cells += [dollars(row[key]) for key in ("review_dollars", "error_dollars")]
        rows.append([*cells, point, f"[{low}, {high}]", everything])
    return command_line.columns(rows, "  ") + f"\n  review everything: {dollars(report['review_everything'])}"


def parts_table(values: Mapping[str, dict]) -> str:
    rows = [
        ["", "n", "base right", "tuned right", "tuned - base", "only b.", "only t.", "p", "base mean", "tuned mean"]
    ]
    for value, found in values.items():
        cells = [value, f"{found['n']:,}", *(span(found[name]["accuracy"]) for name in NAMES)]
        cells += [span(found["difference"], "+z.3f"), f"{found['only_base']:,}", f"{found['only_tuned']:,}"]
        means = (f"{found[name]['raw']:.2f}, {found[name]['calibrated']:.2f}" for name in NAMES)
        rows.append([*cells, f"{found['p']:.2g}", *means])
    return command_line.columns(rows, "  ")


def coin(found: Mapping) -> str:
    """Whether the coin's labels are guessed half of the time, as they must be, and whether the confidence says so."""
    lines = [f"  The {found['n']:,} labels of a coin: no honest model can be right more than half the time."]
    for name in NAMES:
        share, low, high = found[name]["accuracy"]
        half = "50 % is inside" if low <= 0.5 <= high else "50 % is NOT inside, by a leak or by chance"
        lines.append(
            f"  {name}: right {share:.1%} [{low:.1%}, {high:.1%}], {half}; its mean confidence is "
            f"{found[name]['raw']:.1%} raw and {found[name]['calibrated']:.1%} calibrated"
        )
    return "\n".join(lines)


def first_tokens(found: Mapping) -> str:
    """One text: the most probable first tokens of both models side by side, then the sums and the verdicts."""
    shown, columns = command_line.printable, []
    for name in NAMES:
        tokens = found[name]["tokens"]
        cells = [(f'"{shown(t["token"])}"', f"{t['probability']:.2%}", shown(t["label"] or "")) for t in tokens]
        cells = [(name, "percent", "counts for"), *cells]
        wide, _, wide_label = (max(map(len, column)) for column in zip(*cells, strict=True))
        columns.append([(token.ljust(wide), share, label.ljust(wide_label)) for token, share, label in cells])
    rows = [["rank", *columns[0][0], *columns[1][0]]]
    for rank, pair in enumerate(zip_longest(*(column[1:] for column in columns), fillvalue=("", "", "")), 1):
        rows.append([str(rank), *pair[0], *pair[1]])
    sides = [found[name] for name in NAMES]
    sums = [["", *NAMES]]
    sums += [
        [f"P({label})", *(f"{side['total_probabilities'][label]:.2%}" for side in sides)]
        for label in sides[0]["total_probabilities"]
    ]
    sums.append(["label mass", *(f"{side['label_mass']:.2%}" for side in sides)])
    sums.append(["verdict", *(f"{side['prediction']} {side['confidence']:.2%}" for side in sides)])
    return f"Text: {shown(found['text'])}\n\n{command_line.columns(rows, '  ')}\n\n{command_line.columns(sums, '  ')}"


# Figures


def draw(study: Study, report: dict, folder: Path) -> None:
    """The six figures."""
    files = " and ".join(command_line.printable(Path(side.path).name) for side in study.sides)
    how = "each row by a calibrator that did not see its group"
    if study.protocol == "held-out":
        how = f"calibrators fitted on {len(study.fit_groups):,} other rows"
    fitted = f"{study.where} ({files}; {how})"
    seed = f"seed {report['settings']['seed']}"
    draw_accuracy(report, f"{study.count} ({files}), {seed}", folder / "accuracy_comparison.png")
    draw_calibration_error(report["scores"], f"{fitted}, {seed}", folder / "calibration_error_comparison.png")
    draw_confidences(study, fitted, folder / "confidence_distributions.png")
    for method in ("raw", "platt", "isotonic"):
        about = f"{study.count}, nothing fitted ({files})" if method == "raw" else fitted
        draw_reliability(study, report["scores"], method, about, folder / f"reliability_{method}.png")


def draw_accuracy(report: dict, about: str, path: Path) -> None:
    """Accuracy of both models on all rows and on each part."""
    whole = report["scores"]["raw"]["paired"]["accuracy"]
    lines = {f"all {report['rows']:,}": [whole[name] for name in NAMES]}
    shown = {column: values for k, (column, values) in enumerate(report["parts"].items()) if k == 0 or column == RULE}
    for column, values in shown.items():
        for value, found in values.items():
            name = f"neutral, {value}" if column == RULE else value.replace("_", " ")
            lines.setdefault(f"{name}  {found['n']:,}", [found[side]["accuracy"] for side in NAMES])
    caption = (
        f"Share of right answers, {about}; nothing fitted. Bars are 95 % intervals: of all rows by 1,000 bootstrap "
        "samples of whole groups, of parts exact, as of independent rows. Behind a name: its n."
    )
    if len(lines) > MOST_PARTS:
        caption += f" The first {MOST_PARTS} of {len(lines)} lines."
        lines = dict([*lines.items()][:MOST_PARTS])
    with plotting.figure(path, command_line.printable(caption), height=1.5 + 0.33 * len(lines)) as axes:
        axis, y = axes[0, 0], np.arange(len(lines))
        for k, (title, color, marker) in enumerate(zip(TITLES, COLORS, "so", strict=True)):
            point, low, high = np.array([both[k] for both in lines.values()]).T
            ends = np.abs([point - low, high - point])
            axis.errorbar(point, y + (k - 0.5) * 0.3, xerr=ends, fmt=marker, color=color, label=title, capsize=2)
        axis.set_yticks(y, [command_line.printable(name) for name in lines])
        axis.invert_yaxis()
        axis.set(xlim=(0, 1.02), xlabel="accuracy")
        plotting.percent(axis, "x")
        axis.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2)


def draw_calibration_error(scores: dict, about: str, path: Path) -> None:
    """ECE with its noise floor, and the log loss, of both models by each calibrator."""
    found = {method: row for method, row in scores.items() if method != "calibrated"}
    caption = (
        f"Before and after each calibrator of P(label), {about}; raw: nothing fitted. Noise floor: the ECE (20 equal "
        "bins) that true confidences show on so many independent rows. Bars of the log loss: 95 %, 1,000 "
        "bootstrap samples of whole groups."
    )
    with plotting.figure(path, caption, columns=2, height=4.4) as axes:
        (left, right), x = axes[0], np.arange(len(found))
        for k, (side, title, color, marker) in enumerate(zip(NAMES, TITLES, COLORS, "so", strict=True)):
            place = x + (k - 0.5) * 0.38
            ece = [row["paired"]["ECE"][side][0] for row in found.values()]
            left.bar(place, ece, 0.36, color=color, label=title)
            floors = [row[side]["ece_noise_floor"] for row in found.values()]
            label = "noise floor" if k else None
            left.hlines(floors, place - 0.18, place + 0.18, color=plotting.INK, linewidth=2, label=label)
            point, low, high = np.array([row["paired"]["log loss"][side] for row in found.values()]).T
            ends = np.abs([point - low, high - point])
            right.errorbar(x + (k - 0.5) * 0.2, point, yerr=ends, fmt=marker, color=color, capsize=2)
        for axis, title in ((left, "Expected calibration error"), (right, "Log loss")):
            axis.set_xticks(x, found, rotation=35, ha="right")
            axis.set(title=title, ylim=(0, None))
            axis.grid(False, axis="x")
        left.legend()


def draw_confidences(study: Study, about: str, path: Path) -> None:
    """How often each confidence occurs, right and wrong, raw and calibrated."""
    caption = (
        f"Confidence of right and wrong answers, {about}; raw: nothing fitted. Calibrated: "
        + "; ".join(f"{title} by {side.calibrator}" for title, side in zip(TITLES, study.sides, strict=True))
        + "."
    )
    lowest = min(side.confidence[score].min() for side in study.sides for score in ("raw", "calibrated"))
    with plotting.figure(path, caption, 2, 2, height=3.1, sharex=True, sharey="row") as axes:
        for row, score in zip(axes, ("raw", "calibrated"), strict=True):
            for axis, side, title, color in zip(row, study.sides, TITLES, COLORS, strict=True):
                confidence, correct = side.confidence[score], side.scores.correct
                parts = [confidence[correct], confidence[~correct]]
                shades, names = [color, plotting.GREY], ["right", "wrong"]
                axis.hist(parts, np.arange(21) / 20, stacked=True, color=shades, rwidth=0.92, label=names)
                for value, name, style in (
                    (confidence.mean(), "mean confidence", "--"),
                    (correct.mean(), "accuracy", ":"),
                ):
                    axis.axvline(value, color=plotting.INK, linestyle=style, label=f"{name} {value:.1%}")
                axis.legend(loc="upper left", fontsize=8.5, handlelength=1.3, borderaxespad=0.1)
                axis.set(title=f"{title}, {score}", xlim=(min(0.5, lowest) - 0.02, 1.02))
                plotting.percent(axis, "x")
                axis.label_outer()
            row[0].set_ylabel("rows")
        for axis in axes[1]:
            axis.set_xlabel("confidence")


def draw_reliability(study: Study, scores: dict, method: str, about: str, path: Path) -> None:
    """Accuracy against confidence of both models, raw or by one calibrator."""
    what = "raw confidence" if method == "raw" else f"confidence after {method} calibration of P(label)"
    caption = (
        f"Reliability of the {what}, {about}. A dot is one of 20 equal bins with the exact 95 % interval of as many "
        "independent rows; its rows stand at the bottom. On the diagonal the confidence is true."
    )
    with plotting.figure(path, caption, columns=2, height=4.8, sharey=True) as axes:
        for axis, side, name, title, color in zip(axes[0], study.sides, NAMES, TITLES, COLORS, strict=True):
            axis.set_title(f"{title}, {method}\ncan not be fitted to both models here", fontsize=10.5)
            if method in scores:
                found = scores[method]
                metrics.plot_reliability_diagram(side.confidence[method], side.scores.correct, ax=axis, color=color)
                ece, loss = (found["paired"][key][name][0] for key in ("ECE", "log loss"))
                numbers = f"ECE {ece:.3f} (floor {found[name]['ece_noise_floor']:.3f}), log loss {loss:.3f}"
                axis.set_title(f"{title}, {method}\n{numbers}", fontsize=10.5)
            axis.label_outer()


if __name__ == "__main__":
    command_line.run(main)
