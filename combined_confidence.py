"""Method 3, both: one confidence from the first token's probability (Method 1) and from agreement (Method 2).

    P(label) ~ exp(b_label + w1 log p(label) + w2 log q(label) + w3 [both name it]),    q = (votes + 1/L) / (n + 1)

    python combined_confidence.py "Best worst thing ever"                        # runs both, shows all three
    python combined_confidence.py --input reviews.csv --output both.jsonl        # a table; keeps all three files
    python combined_confidence.py --logprobs one.jsonl --consistency two.jsonl --output both.jsonl   # no model runs
    python combined_confidence.py --logprobs test1.jsonl --consistency test2.jsonl --calibrate-on cal1.jsonl cal2.jsonl

Without labels the weights are those of the geometric mean: w1 = w2 = 1/2 and all else 0. With --calibrate-on, two files
of labelled rows, they are fitted there by maximum likelihood; of two labels this is logistic regression on the logits
of both scores and on whether they name the same label. The label returned is always the one that the combined evidence
makes most probable, with the probability of that very label; when the methods disagree, `reason` says so.

Where the rows have labels, it ends with all methods on the same rows: what they know, what they can promise, what they
cost. Fitted ones are measured on rows they were not fitted on: held-out with --calibrate-on, else cross-fitted.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

import command_line
import consistency_confidence as consistency
import endpoint
import logprobs_confidence as logprobs
import predictions
import scoring
import tables
import task as tasks
from llama import add_arguments as add_model_arguments
from llama import load_reader, model_arguments
from predictions import Prediction

if TYPE_CHECKING:
    from calibration import FittedCalibrator
    from task import Task

SMALLEST = 1e-6  # probabilities are clipped here before their logarithm is taken
PROMISES = (0.8, 0.9, 0.95)
DELTA = 0.05
Pair = tuple[Prediction, Prediction]  # the same row by Method 1 and by Method 2


@dataclass(frozen=True)
class Pool:
    """A logarithmic opinion pool: the weights of log p, log q and of "both name it", and a bias for each label.

    Genest and Zidek, "Combining probability distributions", Statistical Science 1986. `rule` names it, `fingerprint`
    is that of the predictions it makes.
    """

    weights: np.ndarray  # [3]
    biases: np.ndarray  # [labels]
    rule: str
    fingerprint: str


def pooled(features: np.ndarray, weights: np.ndarray, biases: np.ndarray) -> np.ndarray:
    """The probabilities [n, labels] of features [n, labels, 3]."""
    from scipy.special import softmax

    return softmax(features @ weights + biases, axis=1)


def label_free(members: Sequence[int]) -> np.ndarray:
    """The weights [3] without labels: 1 for a method alone, 1/2 for each of two, none for "both name it"."""
    methods = [member for member in members if member < 2]
    return np.array([1 / len(methods) if k in methods else 0.0 for k in range(3)])


def fit(
    features: np.ndarray, truth: np.ndarray, members: Sequence[int] = (0, 1, 2), prior_sd: float = 1.0
) -> tuple[np.ndarray, np.ndarray]:
    """(weights [3], biases [labels]) of greatest posterior density; of the features only `members` count.

    The prior is normal around the label-free rule, so that few labels change little and separable ones stay finite; a
    thousand labels outweigh it. The problem is convex.
    """
    from scipy.optimize import minimize

    start = np.append(label_free(members)[list(members)], np.zeros(features.shape[1]))
    loss = partial(negative_log_posterior, features[:, :, list(members)], truth, start, prior_sd)
    best = minimize(loss, start, jac=True, method="L-BFGS-B", options={"ftol": 1e-14, "gtol": 1e-8, "maxiter": 1000})
    weights = np.zeros(3)
    weights[list(members)] = best.x[: len(members)]
    return weights, best.x[len(members) :]


def negative_log_posterior(
    used: np.ndarray, truth: np.ndarray, center: np.ndarray, prior_sd: float, parameters: np.ndarray
) -> tuple[float, np.ndarray]:
    """(value, gradient) at `parameters`: the weights of the features `used` [n, labels, members], then the biases."""
    weights, rows = parameters[: used.shape[2]], np.arange(len(truth))
    scores = used @ weights + parameters[len(weights) :]
    log_p = scores - np.logaddexp.reduce(scores, axis=1, keepdims=True)
    residual = np.exp(log_p)
    residual[rows, truth] -= 1
    gradient = np.append(np.einsum("nl,nlf->f", residual, used), residual.sum(axis=0))
    off = (parameters - center) / prior_sd
    return (off**2).sum() / 2 - log_p[rows, truth].sum(), gradient + off / prior_sd


def pool_for(fingerprints: tuple[str, str], n_labels: int, fit_pairs: Sequence[Pair] | None = None) -> Pool:
    """The weights for rows of these fingerprints: the geometric mean's, or fitted on labelled rows.

    Raises ValueError when those are another model's, task's or method's.
    """
    weights, biases, settings = label_free((0, 1)), np.zeros(n_labels), {"rule": "geometric mean"}
    if fit_pairs:
        theirs = tuple(row.fingerprint for row in fit_pairs[0])
        if theirs != fingerprints:
            raise ValueError(
                f"--calibrate-on has the fingerprints {' and '.join(theirs)}, these rows {' and '.join(fingerprints)}: "
                "another model, task, method or sampling"
            )
        features = features_of(fit_pairs)
        weights, biases = fit(features, truth_of(fit_pairs))
        told = [
            [one.id, one.text, one.label, [*map(repr, of_row.ravel())]]
            for (one, _), of_row in zip(fit_pairs, features, strict=True)
        ]
        settings = {"rule": "stacked", "fitted_on": predictions.fingerprint(rows=told)}
    names = dict(zip(("logprobs", "consistency"), fingerprints, strict=True))
    return Pool(weights, biases, settings["rule"], predictions.fingerprint(method="combined", **names, **settings))


# Two predictions files, row by row


def join(first: Sequence[Prediction], second: Sequence[Prediction]) -> list[Pair]:
    """The rows of both by id, in the first's order; ValueError when they are not of the same texts, labels and task."""
    for method, rows in (("logprobs", first), ("consistency", second)):
        if other := next((row for row in rows if row.method != method), None):
            raise ValueError(f"row {other.id!r} of the {method} file is by method {other.method!r}")
    pairs = predictions.paired_rows(first, second, ("logprobs", "consistency"))
    for _, two in pairs:
        if two.error is None and not ("votes" in two.extras and type(two.extras.get("calls")) is int):
            raise ValueError(f"row {two.id!r} of the consistency file does not say its votes and calls")
    return pairs


def read_pairs(one: str, two: str) -> list[Pair]:
    """Two files joined; ValueErrors name them."""
    rows = predictions.read(one), predictions.read(two)
    try:
        return join(*rows)
    except ValueError as error:
        raise ValueError(f"{one} and {two}: {error}") from None


def scored(pairs: Sequence[Pair]) -> list[Pair]:
    """The pairs that both methods could score."""
    return [(one, two) for one, two in pairs if one.error is None and two.error is None]


def features_of(pairs: Sequence[Pair]) -> np.ndarray:
    """log p, log q and whether both methods name the label; [n, labels, 3]."""
    p, q = (
        np.array([[*predictions.smoothed(pair[method]).values()] for pair in pairs], dtype=np.float64)
        for method in (0, 1)
    )
    both = np.zeros_like(p)
    for i, (one, two) in enumerate(pairs):
        if one.prediction == two.prediction:
            both[i, [*one.probabilities].index(one.prediction)] = 1
    return np.stack([np.log(np.clip(p, SMALLEST, 1)), np.log(np.clip(q, SMALLEST, 1)), both], axis=2)


def truth_of(pairs: Sequence[Pair]) -> np.ndarray:
    """The number of each row's true label [n]; ValueError for a row without one."""
    truth = []
    for one, _ in pairs:
        if one.label not in one.probabilities:
            raise ValueError(f"row {one.id!r} has the label {one.label!r}; the task has {', '.join(one.probabilities)}")
        truth.append([*one.probabilities].index(one.label))
    return np.array(truth, dtype=int)


def combine(pairs: Sequence[Pair], pool: Pool) -> Iterator[Prediction]:
    """The prediction of each pair; one that a method could not score has that method's error.

    `label_mass` is the smaller of the two: what both are sure to have put on a label.
    """
    both = scored(pairs)
    combined = iter(pooled(features_of(both), pool.weights, pool.biases).tolist() if both else [])
    for one, two in pairs:
        common = {"method": "combined", "task": one.task, "fingerprint": pool.fingerprint}
        common["model"] = joint_name(one.model, two.model)
        if failed := next((row for row in (one, two) if row.error is not None), None):
            yield predictions.failed(one.id, one.text, one.label, f"{failed.method}: {failed.error}", **common)
            continue
        by_label = dict(zip(one.probabilities, next(combined), strict=True))
        extras = {
            "logprobs_prediction": one.prediction,
            "consistency_prediction": two.prediction,
            "rule": pool.rule,
            "reason": reason(one, two, by_label, pool.rule),
            "calls": 1 + two.extras["calls"],
        }
        mass = min(one.label_mass, two.label_mass)
        yield predictions.scored(one.id, one.text, one.label, by_label, mass, **common, extras=extras)


def joint_name(one: str, two: str) -> str:
    return one if one == two else f"{one} + {two}"


def reason(one: Prediction, two: Prediction, by_label: Mapping[str, float], rule: str) -> str:
    """Why this label is returned, in words."""
    label = max(by_label, key=by_label.__getitem__)
    if one.prediction == two.prediction == label:
        return f"both methods say {label}"
    if one.prediction == two.prediction:
        return f"both methods say {one.prediction}, but among the labelled rows such texts are rather {label}"
    said = f"the probability says {one.prediction} ({one.confidence:.1%}), "
    said += f"the answers {two.prediction} ({two.confidence * two.label_mass:.1%} agree)"
    return f"{said}; {label} by the {rule if rule == 'geometric mean' else 'weights fitted on labelled rows'}"


# All methods on the same rows


@dataclass(frozen=True)
class Study:
    """Each method's probabilities [n, labels] on the rows that are measured and on those that thresholds come from."""

    measured: dict[str, np.ndarray]
    choosing: dict[str, np.ndarray]
    truth: np.ndarray  # of the measured rows
    choosing_truth: np.ndarray
    groups: Sequence[object]
    choosing_groups: Sequence[object]
    protocol: str  # of the fitted ones: held-out or out-of-fold
    related: int = 0  # measured rows with a near-duplicate among the calibration rows


METHODS = {  # what the report calls each: (fitted?, the features it sees)
    "1 logprobs": (False, (0,)),
    "2 consistency": (False, (1,)),
    "3 geometric mean": (False, (0, 1)),
    "1 logprobs, fitted": (True, (0,)),
    "2 consistency, fitted": (True, (1,)),
    "3 stacked": (True, (0, 1, 2)),
}


def study(pairs: Sequence[Pair], fit_pairs: Sequence[Pair] | None, groups: str | None, seed: int) -> Study:
    """Fit on `fit_pairs` and measure on `pairs`, or without them cross-fit; ValueErrors say what is wrong."""
    measured, truth = features_of(pairs), truth_of(pairs)
    by_group = tables.groups_of([one for one, _ in pairs], groups)
    if fit_pairs is None:
        found = cross_fitted(measured, truth, by_group, seed)
        return Study(found, found, truth, truth, by_group, by_group, "out-of-fold")
    check_apart(pairs, fit_pairs)
    features, fit_truth = features_of(fit_pairs), truth_of(fit_pairs)
    fit_groups = tables.groups_of([one for one, _ in fit_pairs], groups)
    held_out = unfitted(measured)
    for name, (fitted, members) in METHODS.items():
        if fitted:
            held_out[name] = pooled(measured, *fit(features, fit_truth, members))
    choosing = cross_fitted(features, fit_truth, fit_groups, seed)
    alike = tables.near_duplicates([one.text for one, _ in (*fit_pairs, *pairs)])
    related = len({j for i, j, _ in alike if i < len(fit_pairs) <= j})
    return Study(held_out, choosing, truth, fit_truth, by_group, fit_groups, "held-out", related)


def check_apart(pairs: Sequence[Pair], fit_pairs: Sequence[Pair]) -> None:
    """ValueError when a text is among those that the weights were fitted on."""
    from calibration import text_key

    known = {text_key(one.text) for one, _ in fit_pairs}
    if seen := [one.id for one, _ in pairs if text_key(one.text) in known]:
        raise ValueError(
            f"{len(seen)} of the rows are among those of --calibrate-on, the first is {seen[0]!r}; "
            "nothing is measured on rows it was fitted on"
        )


def unfitted(features: np.ndarray) -> dict[str, np.ndarray]:
    """Each method's probabilities [n, labels] by its label-free weights."""
    no_bias = np.zeros(features.shape[1])
    return {name: pooled(features, label_free(members), no_bias) for name, (_, members) in METHODS.items()}


def cross_fitted(features: np.ndarray, truth: np.ndarray, groups: Sequence[object], seed: int) -> dict[str, np.ndarray]:
    """Each method's probabilities [n, labels]; of the fitted ones each fold's by weights fitted on the others."""
    from calibration import grouped_folds

    found = unfitted(features)
    for train, test in grouped_folds(features, truth, groups, seed=seed):
        for name, (fitted, members) in METHODS.items():
            if fitted:
                found[name][test] = pooled(features[test], *fit(features[train], truth[train], members))
    return found


def measure(found: Study, calls: Mapping[str, float], seconds: Mapping[str, float], seed: int) -> dict:
    """Every number of the report, by method.

    The log loss is that of the true label's probability, which ranks methods also where they predict different labels;
    of two labels it is the log loss of the confidence.
    """
    from calibration_metrics import EPSILON, bootstrap_interval, calibration_metrics, one_of_each
    from decisions import automation, choose_threshold

    alone, rows, report, losses = one_of_each(found.choosing_groups), np.arange(len(found.truth)), {}, {}
    for name, p in found.measured.items():
        confidence, correct = p.max(axis=1), p.argmax(axis=1) == found.truth
        protocol = found.protocol if METHODS[name][0] else "nothing fitted"
        row = calibration_metrics(confidence, correct, groups=found.groups, protocol=protocol, seed=seed)
        q = found.choosing[name][alone]
        row["promises"] = []
        for target in PROMISES:
            right = q.argmax(axis=1) == found.choosing_truth[alone]
            threshold = choose_threshold(q.max(axis=1), right, target, DELTA)
            taken = None if threshold.value is None else automation(confidence, correct, [threshold.value])[0]
            row["promises"].append({"target": target, "threshold": threshold.record(), "measured": taken})
        row["calls"], row["seconds"] = (_cost(name, costs) for costs in (calls, seconds))
        report[name], losses[name] = row, -np.log(np.clip(p[rows, found.truth], EPSILON, 1))

    def means(rows: np.ndarray) -> list[float]:  # the gains are paired: the same rows by both
        loss = {name: of_row[rows].mean() for name, of_row in losses.items()}
        gains = loss["1 logprobs, fitted"] - loss["3 stacked"], loss["1 logprobs"] - loss["3 geometric mean"]
        return [*loss.values(), *gains]

    points, intervals = means(rows), bootstrap_interval(means, found.groups, seed=seed)
    values = [[float(point), *map(float, ends)] for point, ends in zip(points, intervals, strict=True)]
    for name, value in zip(report, values, strict=False):
        report[name] |= dict(zip(("log_loss", "log_loss_low", "log_loss_high"), value, strict=True))
    return report | {"gain": {"fitted": values[-2], "unfitted": values[-1]}}


def _cost(name: str, costs: Mapping[str, float]) -> float | None:
    """Of one row, from the cost of each method that it uses; None where that is unknown."""
    members = METHODS[name][1]
    each = [costs.get(method) for k, method in enumerate(("logprobs", "consistency")) if k in members]
    return None if None in each else sum(each)


def render(report: dict, found: Study) -> str:
    """The report as text."""
    n, groups = (report["1 logprobs"][name] for name in ("n", "groups"))
    rows = [["", "accuracy", "log loss", "AUROC", "AURC"]]
    rows += [
        [name, *(_with_ends(report[name], m) for m in ("accuracy", "log_loss", "auroc", "aurc"))] for name in METHODS
    ]
    promised = [["", *(f"{p:.0%} right" for p in PROMISES), "ECE", "floor", "calls", "seconds"]]
    promised += [_promised(name, report[name]) for name in METHODS]
    grouped = f" in {groups:,} groups" if groups < n else ""
    related = f"{found.related:,} of them have a near-duplicate among the calibration rows; " if found.related else ""
    lines = [
        f"n = {n:,}{grouped}; {related}fitted ones {found.protocol}, the others as they are; "
        "brackets are 95 % intervals;",
        "votes count as (v + 1/L) / (n + 1):",
        command_line.columns(rows, "  "),
        "",
        f"Automated with a promise, {1 - DELTA:.0%} certain: the share of these rows and how many of them are right; "
        "thresholds come from",
        "one row of each group of "
        + (
            "the calibration rows."
            if found.protocol == "held-out"
            else "these very rows, so these shares are in-sample."
        )
        + "\nThen ECE (20 equal bins) with its noise floor, and a row's calls and seconds:",
        command_line.columns(promised, "  "),
        "",
    ]
    for what, names in (
        ("fitted", "the stack over the fitted logprobs"),
        ("unfitted", "the geometric mean over logprobs"),
    ):
        gain, low, high = report["gain"][what]
        lines.append(f"Gain in log loss of {names}, on the same rows: {gain:+.4f} [{low:+.4f}, {high:+.4f}]")
    return "\n".join(lines)


def _with_ends(row: dict, name: str) -> str:
    """A number with its interval, as far as they are defined."""
    if row[name] is None:
        return "-"
    return f"{row[name]:.3f} [{row[f'{name}_low']:.3f}, {row[f'{name}_high']:.3f}]"


def _promised(name: str, row: dict) -> list[str]:
    """What a method can promise, its calibration error and its cost, as cells."""
    cells = [name]
    for promise in row["promises"]:
        taken = promise["measured"]
        cells.append(f"{taken['share']:.1%} at {taken['accuracy']:.1%}" if taken and taken["automated"] else "nothing")
    cells += [f"{row['ece']:.3f}", f"{row['ece_noise_floor']:.3f}"]
    return [*cells, *("-" if row[cost] is None else f"{row[cost]:.{d}f}" for cost, d in (("calls", 1), ("seconds", 3)))]


def draw(found: Study, path: str) -> None:
    """Risk against coverage, all methods."""
    import plotting
    from calibration_metrics import plot_risk_coverage

    caption = (
        f"Errors among the most confident share of rows, n = {len(found.truth):,}, fitted ones {found.protocol}, the "
        "others as they are; rows of equal confidence count as their mean."
    )
    colors = [getattr(plotting, name) for name in ("SKY", "YELLOW", "GREY", "BLUE", "ORANGE", "RED")]
    with plotting.figure(path, caption, height=4.8) as axes:
        curves = {
            name: (p.max(axis=1), p.argmax(axis=1) == found.truth, color)
            for (name, p), color in zip(found.measured.items(), colors, strict=True)
        }
        plot_risk_coverage(axes[0, 0], curves)
    print(path)


# Command line

OF_FILES = {"logprobs", "consistency", "calibrate_on", "groups", "figure", "output", "overwrite", "seed"}
OF_FILES |= {"calibrator", "threshold"}


def parse_arguments(argv: Sequence[str] | None) -> tuple[argparse.Namespace, consistency.Sampling]:
    parser = command_line.ArgumentParser(__doc__)
    add = parser.add_argument
    add("text", metavar="TEXT", nargs="*", help="texts to classify and explain")
    add("--logprobs", metavar="FILE", help="predictions of Method 1, instead of running it")
    add("--consistency", metavar="FILE", help="predictions of Method 2 on the same rows")
    add("--calibrate-on", metavar="FILE", nargs=2, help="labelled predictions of Method 1 and 2 to fit the weights on")
    tables.add_groups_argument(parser)
    add("--figure", metavar="PNG", help="risk against coverage of all methods, on labelled rows")
    tasks.add_arguments(parser)
    add("--truncate", action="store_true", help="shorten a text too long for the model, instead of failing its row")
    scoring.add_arguments(parser)
    consistency.add_sampling_arguments(parser)
    add_model_arguments(parser)
    endpoint.add_arguments(parser)
    add("--batch-size", type=int, metavar="N", help="rows run together (default: by length and device)")
    args = parser.parse_args(argv)
    if bool(args.logprobs) != bool(args.consistency):
        parser.error("--logprobs and --consistency go together: two files of the same rows")
    if args.logprobs and (args.text or args.input):
        parser.error("give texts, a table, or two predictions files")
    if args.figure and not (args.figure.endswith(".png") and not args.text):
        parser.error(f"--figure {args.figure}: a file name that ends in .png, with a table or two predictions files")
    if args.logprobs:
        check_join_arguments(parser, args)
    else:
        scoring.check_arguments(parser, args)
    endpoint.check_arguments(parser, args)
    if args.batch_size is not None and args.batch_size < 1:
        parser.error(f"--batch-size {args.batch_size}: at least 1")
    return args, consistency.sampling_from(parser, args)[0]


def check_join_arguments(parser: command_line.ArgumentParser, args: argparse.Namespace) -> None:
    command_line.allow_only_arguments(parser, args, OF_FILES, "two predictions files are joined without a model")
    scoring.check_calibrator_arguments(parser, args)
    if args.calibrator and not args.output:
        parser.error("--calibrator adds to the rows of --output")


def main(argv: Sequence[str] | None = None) -> None:
    args, sampling = parse_arguments(argv)
    fit_pairs = read_fit_pairs(*args.calibrate_on) if args.calibrate_on else None
    calibrator = None
    if args.calibrator:
        from calibration import load_calibrator

        calibrator = load_calibrator(args.calibrator)
    if args.output:
        for path in (args.output, *(member_files(args.output) if args.input else ())):
            for source in (args.input, args.logprobs, args.consistency, args.calibrator, *(args.calibrate_on or ())):
                predictions.check_output(path, source)
    if args.logprobs:
        pairs = read_pairs(args.logprobs, args.consistency)
        if not (both := scored(pairs)):
            raise ValueError("no row was scored by both methods")
        one, two = both[0]
        pool = pool_for((one.fingerprint, two.fingerprint), len(one.probabilities), fit_pairs)
        if calibrator:
            calibrator.check(pool.fingerprint, joint_name(one.model, two.model), one.task, [*one.probabilities])
        conclude(args, pairs, pool, fit_pairs, calibrator, {})
        return
    task = tasks.read_task(args.task)
    total = tasks.check_examples(tasks.examples_from(args), task, args.input) if args.input else 0
    with ExitStack() as stack:
        first, second = prepare(args, task, sampling, stack)
        pool = pool_for((first.fingerprint, second.fingerprint), len(task.labels), fit_pairs)
        if calibrator:
            calibrator.check(pool.fingerprint, second.model.name, task.name, [*task.labels])
        if args.text:
            explain_texts(args, first, second, pool, calibrator)
            return
        pairs, seconds = run_both(args, first, second, total)
    conclude(args, pairs, pool, fit_pairs, calibrator, seconds)


def read_fit_pairs(one: str, two: str) -> list[Pair]:
    """The rows of two labelled files that both methods could score; ValueError when they are few."""
    from calibration import LEAST_ROWS

    pairs = scored(read_pairs(one, two))
    if len(pairs) < LEAST_ROWS:
        raise ValueError(
            f"{len(pairs)} rows scored by both methods in --calibrate-on; at least {LEAST_ROWS} are needed"
        )
    return pairs


def member_files(output: str) -> tuple[Path, Path]:
    """Where the predictions of each method are kept, beside the combined ones."""
    return tuple(Path(output).with_suffix(f".{method}.jsonl") for method in ("logprobs", "consistency"))


def prepare(
    args: argparse.Namespace, task: Task, sampling: consistency.Sampling, stack: ExitStack
) -> tuple[logprobs.Scorer | logprobs.Remote, consistency.Sampler]:
    """Both methods joined to the model that the flags name."""
    if args.endpoint:
        server = stack.enter_context(endpoint.connect_from(args, args.tokenizer and load_reader(args.tokenizer)))
        return logprobs.prepare_remote(server, task), consistency.prepare_remote(server, task, sampling)
    llama = load_from(args, task.settings())
    return logprobs.prepare(llama, task, args.truncate), consistency.prepare(llama, task, sampling, args.truncate)


def run_both(
    args: argparse.Namespace, first: logprobs.Scorer | logprobs.Remote, second: consistency.Sampler, total: int
) -> tuple[list[Pair], dict[str, float]]:
    """Both methods' predictions of a table, and the seconds a row took where any was scored now."""
    seconds, files = {}, member_files(args.output)
    runs = partial(logprobs.score_table, args, first), partial(consistency.sample_table, args, second)
    for method, run, path in zip(("logprobs", "consistency"), runs, files, strict=True):
        started = time.monotonic()
        if count := run(path, total):
            seconds[method] = (time.monotonic() - started) / count
            print(f"{method}: {count:,} rows, {1 / seconds[method]:.1f} a second, into {path}", file=sys.stderr)
    return read_pairs(*files), seconds


def conclude(
    args: argparse.Namespace,
    pairs: list[Pair],
    pool: Pool,
    fit_pairs: list[Pair] | None,
    calibrator: FittedCalibrator | None,
    seconds: dict[str, float],
) -> None:
    """Write the combined file; with labels, compare the methods. What is wrong is said before anything is written."""
    both = scored(pairs)
    found, why_not = compared(args, both, fit_pairs)
    if args.output:
        write(args.output, list(combine(pairs, pool)), pool.fingerprint, args.overwrite)
        print(scoring.report(args.output))
        apart = sum(one.prediction != two.prediction for one, two in both)
        print(f"  {pool.rule}; the methods name different labels in {apart:,} of {len(both):,} rows")
    if calibrator:
        from calibration import calibrate_file

        print(calibrate_file(args.output, calibrator, args.threshold))
    if why_not:
        print(f"  the methods are not compared: {why_not}")
    if found:
        print()
        if len(pairs) > len(both):
            print(f"{len(pairs) - len(both):,} rows left out: a method could not score them")
        calls = {"logprobs": 1.0, "consistency": float(np.mean([two.extras["calls"] for _, two in both]))}
        print(render(measure(found, calls, seconds, args.seed), found))
        if args.figure:
            draw(found, args.figure)


def write(path: str, rows: list[Prediction], fingerprint: str, overwrite: bool) -> None:
    """Write or continue the combined file; a row that failed is combined anew once its method has answered."""
    with predictions.open_output(path) as file:
        done = predictions.resume(file, ((row.id, row.text, row.label) for row in rows), fingerprint, overwrite)
        predictions.append(file, rows[done:])
        before = predictions.read(path)
        after = [new if new.error != old.error else old for new, old in zip(rows, before, strict=True)]
        if after != before:
            predictions.replace(path, after)


def compared(
    args: argparse.Namespace, both: list[Pair], fit_pairs: list[Pair] | None
) -> tuple[Study | None, str | None]:
    """The study of labelled rows, or why there is none, which is an error where it was asked for."""
    asked = args.figure or not args.output
    why_not = None if both else "no row was scored by both"
    if unlabelled := sum(one.label is None for one, _ in both):
        why_not = f"{unlabelled:,} of {len(both):,} rows have no label"
    if why_not and asked:
        raise ValueError(f"the methods cannot be compared: {why_not}; --output FILE alone writes the combined rows")
    if why_not:
        return None, why_not
    try:
        return study(both, fit_pairs, args.groups, args.seed), None
    except ValueError as error:  # as a table of a few rows, of which no weights can be fitted
        if asked or fit_pairs or args.groups:
            raise
        return None, str(error)


# One text, explained


def explain_texts(
    args: argparse.Namespace,
    first: logprobs.Scorer | logprobs.Remote,
    second: consistency.Sampler,
    pool: Pool,
    calibrator: FittedCalibrator | None,
) -> None:
    for text in args.text:
        row = explain(text, first, second, pool)
        record = row.pop("record")
        if calibrator:
            row |= calibrator.apply([record], args.threshold)[0].extras
        if args.json:
            print(json.dumps(row))
        else:
            print_explanation(row)


def explain(
    text: str, first: logprobs.Scorer | logprobs.Remote, second: consistency.Sampler, pool: Pool | None = None
) -> dict:
    """Run both methods on one text and combine them; `record` is the prediction, the rest is for JSON.

    Without a pool by the geometric mean.
    """
    pool = pool or pool_for((first.fingerprint, second.fingerprint), len(second.task.labels))
    is_remote = isinstance(first, logprobs.Remote)
    by_method = {
        "logprobs": logprobs.explain_remote(text, first) if is_remote else logprobs.explain(text, first),
        "consistency": consistency.explain(text, second),
    }
    pair = tuple(
        predictions.scored(
            "",
            text,
            None,
            row["probabilities"],
            row["label_mass"],
            method=method,
            model=row["model"],
            task=second.task.name,
            fingerprint=row["fingerprint"],
            extras={key: row[key] for key in ("votes", "calls") if key in row},
        )
        for method, row in by_method.items()
    )
    (record,) = combine([pair], pool)
    return {
        "text": text,
        **by_method,
        **record.extras,
        "probabilities": record.probabilities,
        "label_mass": record.label_mass,
        "total_probability": record.confidence * record.label_mass,
        "prediction": record.prediction,
        "confidence": record.confidence,
        "fingerprint": record.fingerprint,
        "record": record,
    }


def print_explanation(row: dict) -> None:
    """The three methods side by side."""
    one, two = row["logprobs"], row["consistency"]
    n = sum(two["votes"].values()) + two["unparsed"]
    lines = [["method", "label", "confidence", "label mass", "from"]]
    for name, found, source in (
        ("1 logprobs", one, "the first token's probability"),
        ("2 consistency", two, f"{two['votes'][two['prediction']]} of {n} answers"),
        (f"3 {row['rule']}", row, "both"),
    ):
        numbers = [f"{100 * found[key]:.2f} %" for key in ("confidence", "label_mass")]
        lines.append([name, found["prediction"], *numbers, source])
    print(f"Text: {command_line.printable(row['text'])}\n")
    print(command_line.columns(lines, "  "))
    print(f"\n  Verdict: {row['prediction']}, confidence {100 * row['confidence']:.2f} %: {row['reason']}")
    scoring.print_decision(row)
    print()


if __name__ == "__main__":
    command_line.run(main, resumes=True)
