"""Method 3, both: one confidence from the first token's probability (Method 1) and from the vote share (Method 2).

    python combined_confidence.py "Best worst thing ever"                        # runs both, shows all three
    python combined_confidence.py --input reviews.csv --output both.jsonl        # a table; keeps all three files
    python combined_confidence.py --logprobs one.jsonl --consistency two.jsonl --output both.jsonl   # no model runs
    python combined_confidence.py --logprobs test1.jsonl --consistency test2.jsonl --calibrate-on cal1.jsonl cal2.jsonl

    print_report(compare_methods(read_pairs("test1.jsonl", "test2.jsonl")))      # the comparison, from Python

Without labels the two are combined by their geometric mean; with --calibrate-on, two files of labelled rows, by weights
that are fitted there (pooling.py): of two labels this is logistic regression on the logits of both scores and on
whether they name the same label. The label returned is always the one that the combined evidence makes most probable,
with the probability of that very label; when the methods disagree, `reason` says so.

Where the rows have labels, it ends with all methods on the same rows: what they know, what can be automated with a
guarantee, what they cost. Fitted ones are measured on rows they were not fitted on: held-out with --calibrate-on, else
cross-fitted.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

import command_line
import consistency_confidence as consistency
import endpoint
import plotting
import pooling
import predictions
import scoring
import tables
from endpoint import Endpoint
from llama import add_arguments as add_model_arguments
from llama import load_llama, model_arguments
from logprobs_confidence import label_scorer, remote_label_scorer
from pooling import Combination, Pair, combine, read_pairs, scored_by_both
from scoring import SavedRows
from tables import Example
from task import Task, read_task

if TYPE_CHECKING:
    from calibration_metrics import Estimate

TARGETS = (0.8, 0.9, 0.95)  # accuracies that the comparison asks a guarantee for
DELTA = 0.05
MEMBER_SUFFIXES = (".logprobs.jsonl", ".consistency.jsonl")
OF_FILES = {"logprobs", "consistency", "calibrate_on", "groups", "figure", "output", "overwrite", "seed"}
OF_FILES |= {"calibrator", "threshold", "select_fdr"}  # the flags that have a part in joining two files


# Both methods, run


@dataclass(frozen=True)
class CombinedScorer:
    """Method 1 and Method 2 on one model and task, and how their answers are combined."""

    logprobs: scoring.Method
    consistency: scoring.Method
    combination: Combination
    task: Task
    model_name: str
    fingerprint: str
    name = "combined"

    def explain(self, text: str) -> dict:
        """Run both methods on one text and combine them, with the explanations of both."""
        one, two = self.logprobs.explain(text), self.consistency.explain(text)
        rows = []
        for method, found in ((self.logprobs, one), (self.consistency, two)):
            extras = {name: found[name] for name in ("votes", "calls") if name in found}
            common = scoring.record_fields(method) | {"extras": extras}
            rows.append(predictions.scored("", text, None, found["probabilities"], found["label_mass"], **common))
        (row,) = combine([Pair(*rows)], self.combination)
        return {
            "text": text,
            "logprobs": one,
            "consistency": two,
            **row.extras,
            **scoring.conclusion(row.probabilities, row.label_mass),
            "fingerprint": row.fingerprint,
        }

    def score(self, examples: Iterator[Example], advance: Callable[[int], None], saved: SavedRows) -> Iterator:
        """The rows of Method 1, then those of Method 2; for a plan of what they cost."""
        together = list(examples)
        for method in (self.logprobs, self.consistency):
            yield from method.score(iter(together), advance, saved)

    def score_members(self, job: scoring.Job) -> dict[str, float]:
        """Write or continue each method's file of a table; the seconds a row took, where any was scored now."""
        seconds = {}
        for method, path in zip((self.logprobs, self.consistency), member_files(job.output), strict=True):
            verb = f"{method.name}: scored"
            taken = scoring.score_table(method, job.table, job.total, path, job.overwrite, verb)
            if taken is not None:
                seconds[method.name] = taken
        return seconds


def combined_scorer(
    first: scoring.Method, second: scoring.Method, fit_pairs: Sequence[Pair] | None = None
) -> CombinedScorer:
    """Join Method 1 and Method 2 of one model and task; ValueError when the labelled rows are not theirs."""
    fingerprints, task = (first.fingerprint, second.fingerprint), second.task
    combination = pooling.combination_for(fingerprints, len(task.labels), fit_pairs)
    return CombinedScorer(first, second, combination, task, second.model_name, combination.fingerprint)


def member_files(output: str | Path) -> tuple[Path, Path]:
    """Where the predictions of each method are kept, beside the combined ones."""
    logprobs, consistency = (Path(output).with_suffix(suffix) for suffix in MEMBER_SUFFIXES)
    return logprobs, consistency


# All methods on the same rows


class Contender(NamedTuple):
    """A way from the features to a probability, fitted or not, and the colour of its curve."""

    features: tuple[str, ...]
    is_fitted: bool
    color: str


CONTENDERS = {  # by what the report calls each
    "1 logprobs": Contender(("logprobs",), False, plotting.SKY),
    "2 consistency": Contender(("consistency",), False, plotting.YELLOW),
    "3 geometric mean": Contender(pooling.METHODS, False, plotting.GREY),
    "1 logprobs, fitted": Contender(("logprobs",), True, plotting.BLUE),
    "2 consistency, fitted": Contender(("consistency",), True, plotting.ORANGE),
    "3 stacked": Contender(pooling.FEATURES, True, plotting.RED),
}


@dataclass(frozen=True)
class JudgedRows:
    """Labelled rows with each contender's probabilities [n, labels]."""

    probabilities: Mapping[str, np.ndarray]
    truth: np.ndarray  # number of the true label [n]
    groups: Sequence[object]

    def judged(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """(confidence [n], correct [n]) of a contender."""
        p = self.probabilities[name]
        return p.max(axis=1), p.argmax(axis=1) == self.truth

    def losses(self, name: str) -> np.ndarray:
        """Log loss of the true label's probability [n], which ranks also where different labels are predicted."""
        from calibration_metrics import label_losses

        return label_losses(self.probabilities[name], self.truth)


@dataclass(frozen=True)
class MethodComparison:
    """The rows that are measured, and those that thresholds come from."""

    measured: JudgedRows
    choosing: JudgedRows
    calls: Mapping[str, float]  # of a row by each method
    protocol: str  # of the fitted contenders: held-out or out-of-fold
    related: int = 0  # measured rows with a near-duplicate among those fitted on


def compare_methods(
    pairs: Sequence[Pair], fit_pairs: Sequence[Pair] | None = None, groups: str | None = None, seed: int = 0
) -> MethodComparison:
    """Every contender on the rows that both methods scored: fitted on `fit_pairs`, or without them cross-fitted.

    `groups` is a table of id and group, by default near-duplicate texts are one. Raises ValueError for a row without a
    label, for too few rows, and for rows that are among `fit_pairs`.
    """
    pairs = scored_by_both(pairs)
    calls = {"logprobs": 1.0, "consistency": float(np.mean([pair.consistency.extras["calls"] for pair in pairs]))}
    rows = [pair.logprobs for pair in pairs]
    features, truth, by_group = pooling.features_of(pairs), pooling.true_labels(pairs), tables.groups_of(rows, groups)
    if fit_pairs is None:
        judged = JudgedRows(cross_fitted(features, truth, by_group, seed), truth, by_group)
        return MethodComparison(judged, judged, calls, "out-of-fold")
    fit_pairs = scored_by_both(fit_pairs)
    fit_rows = [pair.logprobs for pair in fit_pairs]
    related = tables.check_disjoint(fit_rows, rows, "--calibrate-on", "the measured file", groups)
    fit_features, fit_truth = pooling.features_of(fit_pairs), pooling.true_labels(fit_pairs)
    fit_groups = tables.groups_of(fit_rows, groups)
    measured = JudgedRows(contender_probabilities(features, fit_features, fit_truth), truth, by_group)
    choosing = JudgedRows(cross_fitted(fit_features, fit_truth, fit_groups, seed), fit_truth, fit_groups)
    return MethodComparison(measured, choosing, calls, "held-out", related)


def contender_probabilities(
    features: np.ndarray, fit_features: np.ndarray, fit_truth: np.ndarray
) -> dict[str, np.ndarray]:
    """Each contender's probabilities [n, labels] of rows, the fitted ones' by weights fitted on other rows."""
    found = {}
    for name, contender in CONTENDERS.items():
        pool = pooling.unfitted_pool(features.shape[1], contender.features)
        if contender.is_fitted:
            pool = pooling.fitted_pool(fit_features, fit_truth, contender.features)
        found[name] = pool.probabilities(features)
    return found


def cross_fitted(features: np.ndarray, truth: np.ndarray, groups: Sequence[object], seed: int) -> dict[str, np.ndarray]:
    """Each contender's probabilities [n, labels] of labelled rows, each fold's by weights fitted on the others."""
    from calibration import grouped_folds

    found = {name: np.empty(features.shape[:2]) for name in CONTENDERS}
    for train, test in grouped_folds(features, truth, groups, seed=seed):
        for name, probabilities in contender_probabilities(features[test], features[train], truth[train]).items():
            found[name][test] = probabilities
    return found


def log_loss_gain(comparison: MethodComparison, name: str, over: str, seed: int = 0) -> Estimate:
    """How much less one contender's log loss is than another's, on the same rows."""
    measured = comparison.measured
    from calibration_metrics import mean_estimate

    return mean_estimate(measured.losses(over) - measured.losses(name), measured.groups, seed)


def contender_numbers(comparison: MethodComparison, name: str, seed: int = 0) -> dict[str, object]:
    """The numbers of `calibration_metrics` for a contender; its log loss is that of the true label's probability."""
    from calibration_metrics import calibration_metrics, mean_estimate

    measured = comparison.measured
    protocol = comparison.protocol if CONTENDERS[name].is_fitted else "nothing fitted"
    numbers = calibration_metrics(*measured.judged(name), groups=measured.groups, protocol=protocol, seed=seed)
    loss = mean_estimate(measured.losses(name), measured.groups, seed)
    return numbers | {"log_loss": loss.value, "log_loss_low": loss.low, "log_loss_high": loss.high}


def automated_rows(comparison: MethodComparison, name: str, target: float) -> dict | None:
    """What a contender automates from a threshold with a guarantee on; None where nothing can be guaranteed.

    A fitted contender's confidences are calibrated and say where the search begins; those of the others are not.
    """
    from decisions import automation, choose_threshold

    confidence, correct = comparison.choosing.judged(name)
    start = "predicted" if CONTENDERS[name].is_fitted else "strictest"
    threshold = choose_threshold(confidence, correct, target, DELTA, comparison.choosing.groups, start)
    if threshold.value is None:
        return None
    (found,) = automation(*comparison.measured.judged(name), [threshold.value])
    return found if found["automated"] else None


# Printing


def print_report(comparison: MethodComparison, seconds: Mapping[str, float] | None = None, seed: int = 0) -> None:
    """What the methods know, what can be automated with a guarantee, and what a row costs; `seconds` where known."""
    scores = [["", "accuracy", "log loss", "AUROC", "AURC"]]
    guaranteed = [["", *(f"{target:.0%} right" for target in TARGETS), "ECE", "floor", "calls", "seconds"]]
    for name in CONTENDERS:
        row = contender_numbers(comparison, name, seed)
        scores.append([name, *(with_interval(row, key) for key in ("accuracy", "log_loss", "auroc", "aurc"))])
        found = [automated_rows(comparison, name, target) for target in TARGETS]
        shares = [f"{a['share']:.1%} at {a['accuracy']:.1%}" if a else "nothing" for a in found]
        costs = [cost(name, comparison.calls, 1), cost(name, seconds or {}, 3)]
        guaranteed.append([name, *shares, f"{row['ece']:.3f}", f"{row['ece_noise_floor']:.3f}", *costs])
    grouped = f" in {row['groups']:,} groups" if row["groups"] < row["n"] else ""
    related, where = "", "the calibration rows"
    if comparison.related:
        related = f" {comparison.related:,} of them have a near-duplicate among the calibration rows;"
    if comparison.measured is comparison.choosing:
        where = "these very rows, so these shares are in-sample"
    print(f"n = {row['n']:,}{grouped};{related} fitted ones {comparison.protocol}, the others as they are;", end=" ")
    print("brackets are 95 % intervals;\nvotes count as (v + 1/L) / (n + 1):")
    print(command_line.columns(scores, "  "))
    print(f"\nAutomated with a guarantee, confidence level {1 - DELTA:.0%}: the share of these rows", end=" ")
    print(f"and how many of them are right;\nthresholds come from {where}.")
    print("Then ECE (20 equal bins), the expected ECE if calibrated (the noise floor), and a row's calls and seconds:")
    print(command_line.columns(guaranteed, "  ") + "\n")
    for what, name, over in (
        ("the stack over the fitted logprobs", "3 stacked", "1 logprobs, fitted"),
        ("the geometric mean over logprobs", "3 geometric mean", "1 logprobs"),
    ):
        gain = log_loss_gain(comparison, name, over, seed).shown("+.4f")
        print(f"Gain in log loss of {what}, on the same rows: {gain}")


def with_interval(row: Mapping, name: str) -> str:
    """A number of `contender_numbers` with its interval, as far as they are defined."""
    from calibration_metrics import Estimate  # late, as everything of the number side that --help does without

    return "-" if row[name] is None else Estimate(row[name], row[f"{name}_low"], row[f"{name}_high"]).shown()


def cost(name: str, of_method: Mapping[str, float], decimals: int) -> str:
    """The sum over the methods that a contender uses; a dash where one is unknown."""
    each = [of_method.get(feature) for feature in CONTENDERS[name].features if feature in pooling.METHODS]
    return "-" if None in each else f"{sum(each):.{decimals}f}"


def draw_risk_coverage(path: str, comparison: MethodComparison) -> None:
    """Risk against coverage, all methods."""
    from calibration_metrics import risk_coverage

    about = f"n = {len(comparison.measured.truth):,}, fitted ones {comparison.protocol}, the others as they are; rows "
    about += "of equal confidence count as their mean."
    risks = {name: risk_coverage(*comparison.measured.judged(name)) for name in CONTENDERS}
    colors = {name: contender.color for name, contender in CONTENDERS.items()}
    plotting.risk_coverage(path, risks, about=about, colors=colors, height=4.8)


def print_explanation(row: Mapping) -> None:
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


# Command line


def parse_arguments(argv: Sequence[str] | None) -> tuple[argparse.Namespace, consistency.Sampling]:
    parser = command_line.ArgumentParser(__doc__)
    add = parser.add_argument
    scoring.add_arguments(parser)
    add("--logprobs", metavar="FILE", help="predictions of Method 1, instead of running it")
    add("--consistency", metavar="FILE", help="predictions of Method 2 on the same rows")
    add("--calibrate-on", metavar="FILE", nargs=2, help="labelled predictions of Method 1 and 2 to fit the weights on")
    tables.add_groups_argument(parser)
    add("--figure", metavar="PNG", help="risk against coverage of all methods, on labelled rows")
    consistency.add_sampling_arguments(parser)
    add_model_arguments(parser)
    endpoint.add_arguments(parser)
    args = parser.parse_args(argv)
    if bool(args.logprobs) != bool(args.consistency):
        parser.error("--logprobs and --consistency go together: two files of the same rows")
    if args.figure and not (args.figure.endswith(".png") and not args.text):
        parser.error(f"--figure {args.figure}: a file name that ends in .png, with a table or two predictions files")
    if args.logprobs:
        command_line.allow_only_arguments(parser, args, OF_FILES, "two predictions files are joined without a model")
        scoring.check_calibrator_arguments(parser, args)
        scoring.check_selection_arguments(parser, args)
        if args.calibrator and not args.output:
            parser.error("--calibrator adds to the rows of --output")
    else:
        scoring.check_arguments(parser, args)
    endpoint.check_arguments(parser, args)
    return args, consistency.sampling_from_arguments(parser, args)[0]


def combined_job_from_arguments(args: argparse.Namespace, task: Task) -> scoring.Job:
    """What the flags ask for; no file that is read may be written."""
    outputs = [args.output] if args.output else []
    outputs += member_files(args.output) if args.input else []
    for path in outputs:
        for source in (args.logprobs, args.consistency, args.calibrator, *(args.calibrate_on or ())):
            predictions.check_output(path, source)
    return scoring.job_from_arguments(args, task, MEMBER_SUFFIXES)


def methods_from_arguments(
    args: argparse.Namespace, task: Task, sampling: consistency.Sampling, stack: ExitStack
) -> tuple[scoring.Method, scoring.Method]:
    """Method 1 and Method 2 by the model or server that the flags name; a connection is closed with `stack`."""
    if args.endpoint:
        server = stack.enter_context(endpoint.connect(**endpoint.connection_arguments(args)))
        return remote_methods(server, task, sampling)
    llama = load_llama(**model_arguments(args), task=task.settings())
    second = consistency.answer_sampler(llama, task, sampling, args.truncate, args.batch_size)
    return label_scorer(llama, task, args.truncate, args.batch_size), second


def remote_methods(server: Endpoint, task: Task, sampling: consistency.Sampling) -> tuple[scoring.Method, ...]:
    """Method 1 and Method 2 by a server."""
    return remote_label_scorer(server, task), consistency.remote_answer_sampler(server, task, sampling)


def plan_from_arguments(
    args: argparse.Namespace, examples: Iterable[Example], task: Task, sampling: consistency.Sampling
) -> str:
    """What --dry-run prints: one request of Method 1 and those of Method 2."""
    least, most = sampling.calls
    method_of = lambda server: combined_scorer(*remote_methods(server, task, sampling))  # noqa: E731
    options = sampling.wordings(task), (1 + least, 1 + most), sampling.max_tokens, method_of
    return endpoint.plan_from_arguments(args, examples, *options)


def read_fit_pairs(one: str, two: str) -> list[Pair]:
    """The rows of two labelled files that both methods could score; ValueError when they are few."""
    from calibration import LEAST_ROWS

    pairs = scored_by_both(read_pairs(one, two))
    if len(pairs) < LEAST_ROWS:
        raise ValueError(f"{len(pairs)} rows scored by both in --calibrate-on; at least {LEAST_ROWS} are needed")
    return pairs


def comparison_or_reason(
    pairs: Sequence[Pair], fit_pairs: Sequence[Pair] | None, groups: str | None, seed: int, is_needed: bool
) -> MethodComparison | str:
    """The comparison on rows that both methods scored, or why there is none, which is an error where it is needed."""
    unlabelled = sum(one.label is None for one, _ in pairs)
    if not pairs or unlabelled:
        why = f"{unlabelled:,} of {len(pairs):,} rows have no label" if pairs else "no row was scored by both"
        if is_needed:
            raise ValueError(f"the methods cannot be compared: {why}; --output FILE alone writes the combined rows")
        return why
    try:
        return compare_methods(pairs, fit_pairs, groups, seed)
    except ValueError as error:  # as a table of a few rows, of which no weights can be fitted
        if is_needed or fit_pairs or groups:
            raise
        return str(error)


def main(argv: Sequence[str] | None = None) -> None:
    args, sampling = parse_arguments(argv)
    task, seconds, spent = read_task(args.task), {}, ""
    fit_pairs = read_fit_pairs(*args.calibrate_on) if args.calibrate_on else None
    job = combined_job_from_arguments(args, task)
    if args.logprobs:
        pairs = read_pairs(args.logprobs, args.consistency)
        combination, one = pooling.combination_of(pairs, fit_pairs), scored_by_both(pairs)[0]
        if job.calibrator:
            job.calibrator.check(combination.fingerprint, one.model, one.logprobs.task, [*one.logprobs.probabilities])
    elif args.dry_run is not None:
        print(plan_from_arguments(args, job.table, task, sampling))
        return
    else:
        with ExitStack() as stack:
            scorer = combined_scorer(*methods_from_arguments(args, task, sampling, stack), fit_pairs)
            job.check(scorer)
            if job.texts:
                scoring.explain_texts(job, scorer, print_explanation)
                return
            seconds = scorer.score_members(job)
            if args.endpoint:
                spent = f"\n{scorer.logprobs.server.spent()}"
        pairs, combination = read_pairs(*member_files(args.output)), scorer.combination
    both = scored_by_both(pairs)
    is_needed = bool(args.figure or not args.output)
    comparison = comparison_or_reason(both, fit_pairs, args.groups, args.seed, is_needed)
    if job.output:
        rows = partial(combine, pairs, combination)  # of a row that failed anew once its method has answered
        scoring.write_derived(job.output, rows, combination.fingerprint, job.overwrite)
        apart = sum(one.prediction != two.prediction for one, two in both)
        more = f"  {combination.rule}; the methods name different labels in {apart:,} of {len(both):,} rows"
        scoring.finish_table(job, f"{scoring.report(job.output, args.groups)}\n{more}{spent}")
    if isinstance(comparison, str):
        print(f"  the methods are not compared: {comparison}")
        return
    print()
    if len(pairs) > len(both):
        print(f"{len(pairs) - len(both):,} rows left out: a method could not score them")
    print_report(comparison, seconds, args.seed)
    if args.figure:
        draw_risk_coverage(args.figure, comparison)
        print(args.figure)


if __name__ == "__main__":
    command_line.run(main, resumes=True)
