"""Does this classifier work at all? The first lines of every report on labelled rows, and what to do next.

    found = judge(rows).record()     # of labelled predictions: numbers, and the sentences that follow from them
    print(text(found))               # the verdict, the numbers, the next steps

"Worse", "better" and "as well" are said of paired tests on the same rows: the 95 % interval of the mean difference of
being right, by resampling whole groups, must leave 0 out, and so must McNemar's exact test, which knows about few rows.
Whatever is fitted here (a bag of words, a Platt calibrator, the removal of a class bias) is out-of-fold by group. Tests
and fits take ROWS rows at most, drawn at random; accuracy and shares are of all.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

import calibration_metrics as metrics
import tables
from baselines import LENGTH, bag_of_words, commonest_label
from command_line import filled, printable
from predictions import Prediction

if TYPE_CHECKING:
    from calibration import Scores

ROWS = 2000  # some seconds at most, and differences of three points show
LITTLE_MASS = 0.5
GOOD_AUC = 0.8
ENOUGH_FOR_A_PROBE = 100  # labelled rows
WIDTH = 110  # characters of a line


@dataclass(frozen=True)
class Gain:
    """A mean difference of being right on the same rows, with its 95 % interval, and what the tests say of it."""

    difference: float
    low: float
    high: float
    sign: int  # 1 or -1 where it is above or below 0 by both tests, else 0


@dataclass(frozen=True)
class Verdict:
    """What labelled rows say of a classifier. `problem` is why they say nothing; then everything else is empty."""

    problem: str | None = None
    method: str = ""
    n: int = 0  # labelled rows
    tested: int = 0  # of them drawn for tests and fits
    groups: int = 0  # of these
    labels: int = 0
    accuracy: metrics.Estimate | None = None
    commonest: str = ""
    commonest_share: float = 0.0
    over_commonest: Gain | None = None
    only_predicted: str | None = None  # where no other label is
    bag_of_words: float | None = None
    over_bag_of_words: Gain | None = None
    cut_texts: int = 0  # of which a bag of words has only the beginning
    relabelled: float | None = None  # accuracy of the most probable label once the class bias is taken out
    over_raw: Gain | None = None  # of these labels over the predictions
    relabelled_over_commonest: Gain | None = None
    auroc: metrics.Estimate | None = None  # of the confidence, for being right
    last_label: str = ""
    auc: metrics.Estimate | None = None  # of two labels: of P(last label), for the label being that one
    label_mass: float = 0.0  # mean
    log_loss: float = 0.0  # of the confidence, nats: refinement and calibration part together
    refinement: float | None = None
    calibration_part: float | None = None

    def record(self) -> dict:
        """As it stands in a report.json, with the sentences that follow from the numbers."""
        return asdict(self) | {"sentences": sentences(self), "next_steps": next_steps(self)}


@dataclass(frozen=True)
class Totals:
    """What is counted of all labelled rows, however many."""

    labels: tuple[str, ...]
    true_rows: np.ndarray  # rows of each label [labels]
    predicted_rows: np.ndarray  # rows with each prediction [labels]
    right: int
    label_mass: float  # mean
    log_loss: float  # of the confidence, nats

    @property
    def n(self) -> int:
        return int(self.true_rows.sum())


# From rows to numbers


def judge(
    rows: Sequence[Prediction],
    groups: Sequence[object] | None = None,
    recalibrated: np.ndarray | None = None,
    words: np.ndarray | None = None,
    seed: int = 0,
    scores: Scores | None = None,
) -> Verdict:
    """The verdict on labelled, scored rows of one task.

    groups: which rows belong together [n] (default: near-duplicates are found)
    recalibrated: confidences [n] by calibrators that have not seen their row (default: Platt scaling, out-of-fold)
    words: what `bag_of_words_for` said of these very rows, where they are judged more than once
    scores: the rows' `scores_of`, where they are there already
    """
    from calibration import scores_of

    if chosen := sum(row.extras.get("purpose") == "chosen" for row in rows):
        return no_sample(chosen, len(rows))
    if problem := why_none(rows):
        return Verdict(problem=problem)
    scores = scores or scores_of(rows)
    numbers = metrics.group_numbers(tables.groups_of(rows) if groups is None else groups)
    drawn = drawn_rows(len(rows), seed)
    found = judge_sample([rows[n] for n in drawn], totals_of(rows, scores), numbers[drawn], words, seed)
    found = replace(found, accuracy=metrics.share_estimate(scores.correct, numbers, seed))
    if recalibrated is None:
        return found
    split = metrics.refinement_split(scores.confidence, recalibrated, scores.correct)
    return replace(found, refinement=split["refinement"], calibration_part=split["calibration_error"])


def no_sample(chosen: int, n: int) -> Verdict:
    """There is no verdict on rows of which some were chosen to be labelled because they are hard."""
    were = f"{chosen:,} of {n:,} labelled rows were chosen to be labelled, so they are no sample of all rows"
    return Verdict(problem=f"{were}; --where purpose=random takes the others")


def why_none(rows: Sequence[Prediction]) -> str | None:
    """Why nothing can be said of these labelled rows, if nothing can."""
    from calibration import LEAST_ROWS

    if len(rows) < LEAST_ROWS:
        return f"{len(rows)} labelled rows are too few, at least {LEAST_ROWS} are needed and some hundred say more"
    if len({row.label for row in rows}) == 1:
        return f"all {len(rows):,} labelled rows are {rows[0].label!r}; rows of the other labels are needed"
    return None


def drawn_rows(n: int, seed: int = 0) -> np.ndarray:
    """The numbers of the rows that tests and fits take, in order."""
    return np.arange(n) if n <= ROWS else np.sort(np.random.default_rng(seed).choice(n, ROWS, replace=False))


def bag_of_words_for(rows: Sequence[Prediction], groups: Sequence[object], seed: int = 0) -> np.ndarray | None:
    """P(label) by a bag of words of those labelled rows that `judge` draws; None where none can be fitted."""
    from calibration import scores_of

    drawn = drawn_rows(len(rows), seed)
    scores = scores_of([rows[n] for n in drawn])
    try:
        texts = [rows[n].text for n in drawn]
        return bag_of_words(texts, scores.truth, len(scores.labels), np.asarray(groups)[drawn], seed)
    except ValueError:  # too few groups, or no word twice
        return None


def totals_of(rows: Sequence[Prediction], scores: Scores) -> Totals:
    """The counts of labelled rows that are all here."""
    predicted = [scores.labels.index(row.prediction) for row in rows]
    return Totals(
        labels=scores.labels,
        true_rows=np.bincount(scores.truth, minlength=len(scores.labels)),
        predicted_rows=np.bincount(predicted, minlength=len(scores.labels)),
        right=int(scores.correct.sum()),
        label_mass=float(np.mean([row.label_mass for row in rows])),
        log_loss=metrics.log_loss(scores.confidence, scores.correct),
    )


def judge_sample(
    rows: Sequence[Prediction],
    totals: Totals,
    groups: Sequence[object] | None = None,
    words: np.ndarray | None = None,
    seed: int = 0,
) -> Verdict:
    """The verdict from the counts of all labelled rows and a random sample of at most ROWS of them."""
    from calibration import scores_of

    if problem := why_none(rows):
        return Verdict(problem=problem)
    groups = metrics.group_numbers(tables.groups_of(rows) if groups is None else groups)
    scores = scores_of(rows)
    words = bag_of_words_for(rows, groups, seed) if words is None else words
    commonest, share = commonest_label(totals.true_rows)
    if totals.n == len(rows):
        accuracy = metrics.share_estimate(scores.correct, groups, seed)
    else:
        accuracy = metrics.exact_share(totals.right, totals.n)
    only = np.flatnonzero(totals.predicted_rows)
    return Verdict(
        method=rows[0].method,
        n=totals.n,
        tested=len(rows),
        groups=metrics.group_count(groups),
        labels=len(totals.labels),
        accuracy=accuracy,
        commonest=totals.labels[commonest],
        commonest_share=share,
        only_predicted=totals.labels[only[0]] if len(only) == 1 else None,
        cut_texts=sum(len(row.text) > LENGTH for row in rows),
        label_mass=totals.label_mass,
        log_loss=totals.log_loss,
        **comparisons(scores, groups, commonest, words, seed),
        **rankings(scores, groups, seed),
        **loss_parts(scores, groups, totals.log_loss, seed),
    )


def comparisons(
    scores: Scores, groups: np.ndarray, commonest: int, words: np.ndarray | None, seed: int = 0
) -> dict[str, object]:
    """The fields of a Verdict that compare what is right on the same rows."""
    always = scores.truth == commonest
    found = {"over_commonest": gain(scores.correct, always, groups, seed)}
    if words is not None:
        by_words = words.argmax(axis=1) == scores.truth
        found["bag_of_words"] = float(by_words.mean())
        found["over_bag_of_words"] = gain(scores.correct, by_words, groups, seed)
    relabelled = without_class_bias(scores, groups, seed)
    if relabelled is not None:
        right = relabelled == scores.truth
        found["relabelled"] = float(right.mean())
        found["over_raw"] = gain(right, scores.correct, groups, seed)
        found["relabelled_over_commonest"] = gain(right, always, groups, seed)
    return found


def gain(ours: np.ndarray, theirs: np.ndarray, groups: np.ndarray, seed: int = 0) -> Gain:
    """How much more often `ours` is right than `theirs`, bool [n] of the same rows.

    McNemar, Psychometrika 1947: of the rows that one alone has right each has half, by an exact binomial test.
    """
    from scipy.special import bdtr

    apart = ours.astype(float) - theirs
    mean = metrics.mean_estimate(apart, groups, seed)
    only_ours, only_theirs = int((apart > 0).sum()), int((apart < 0).sum())
    p = min(1.0, 2 * bdtr(min(only_ours, only_theirs), only_ours + only_theirs, 0.5))
    sign = int(mean.low > 0) - int(mean.high < 0) if p < 0.05 else 0
    return Gain(mean.value, mean.low, mean.high, sign)


def without_class_bias(scores: Scores, groups: np.ndarray, seed: int = 0) -> np.ndarray | None:
    """The most probable label [n] once a factor for each label, fitted out-of-fold, is taken out of P(label)."""
    from calibration import VectorScalingCalibrator, cross_fit_labels

    given = scores.probabilities, scores.truth
    try:
        return cross_fit_labels(VectorScalingCalibrator(), *given, groups, [seed]).argmax(axis=1)
    except ValueError:  # fewer groups than folds
        return None


def rankings(scores: Scores, groups: np.ndarray, seed: int = 0) -> dict[str, object]:
    """The fields of a Verdict that say how well rows are put in order."""
    orders = {"auroc": (scores.confidence, scores.correct)}
    if len(scores.labels) == 2:
        orders["auc"] = (scores.probabilities[:, 1], scores.truth == 1)
    orders = {name: order for name, order in orders.items() if 0 < order[1].sum() < len(order[1])}
    found: dict[str, object] = {"last_label": scores.labels[-1]}
    for name, (score, target) in orders.items():

        def statistic(rows: np.ndarray, score: np.ndarray = score, target: np.ndarray = target) -> list[float]:
            return [metrics.auroc(score[rows], target[rows])]

        ((low, high),) = metrics.bootstrap_interval(statistic, groups, seed=seed)
        found[name] = metrics.Estimate(metrics.auroc(score, target), float(low), float(high))
    return found


def loss_parts(scores: Scores, groups: np.ndarray, log_loss: float, seed: int = 0) -> dict[str, float]:
    """The log loss of the confidence told apart, by Platt scaling of other groups; empty where it cannot be fitted.

    `log_loss` is of all rows; of those that were drawn it is what the calibration gains.
    """
    from calibration import PlattScalingCalibrator, cross_fit

    try:
        recalibrated = cross_fit(PlattScalingCalibrator(), scores.confidence, scores.correct, groups, seed=seed)
    except ValueError:  # all rows of a fold are right
        return {}
    part = metrics.refinement_split(scores.confidence, recalibrated, scores.correct)["calibration_error"]
    return {"refinement": log_loss - part, "calibration_part": part}


# From numbers to sentences


def sentences(found: Verdict) -> list[str]:
    """What follows from the numbers; the first sentence says whether the classifier works."""
    if found.problem:
        return [f"none: {found.problem}"]
    said = [beside_baselines(found)]
    if not works(found) or (found.over_raw and found.over_raw.sign > 0):
        said += filter(None, [about_the_ranking(found), about_the_bias(found)])
    if found.label_mass < LITTLE_MASS:
        said.append(f"a label mass of {found.label_mass:.3f} says that the model mostly wants to answer something else")
    return said


def works(found: Verdict) -> bool:
    """Whether it is better than always answering the commonest label."""
    return found.over_commonest.sign > 0 and found.only_predicted is None


def fails(found: Verdict) -> bool:
    """Whether the question does not work: worse than the commonest label, or one label is all that is ever said."""
    return found.over_commonest.sign < 0 or found.only_predicted is not None


def beside_baselines(found: Verdict) -> str:
    """The verdict itself."""
    always = f"always answering {found.commonest!r} ({found.commonest_share:.3f})"
    if found.over_commonest.sign < 0:
        return f"worse than {always}: the question does not work"
    if found.only_predicted is not None:
        return f"only {found.only_predicted!r} is ever predicted: the question does not work"
    if found.over_commonest.sign == 0:
        return f"no better than {always}, as far as {found.tested:,} rows can show"
    if found.bag_of_words is None:
        return f"better than {always}"
    words = f"a bag of words learned from the same labels ({found.bag_of_words:.3f})"
    if found.over_bag_of_words.sign < 0:
        return f"better than {always}, but worse than {words}"
    if found.over_bag_of_words.sign == 0:
        does = f"{words} does as well, as far as {found.tested:,} rows can show"
        return f"better than {always}, but {does}: consider whether you need a language model"
    return f"better than {always} and than {words}"


def about_the_ranking(found: Verdict) -> str | None:
    """Of two labels, whether the probabilities put the rows in order."""
    if found.auc is None:
        return None
    score = f"P({found.last_label}) (AUC {found.auc.value:.3f})"
    if found.auc.high < 0.5:
        return f"{score} is higher for the other label: are the answer words swapped?"
    if found.auc.low <= 0.5:
        return f"{score} does not tell the labels apart"
    return f"the ranking by {score} is {'good' if found.auc.value >= GOOD_AUC else 'better than chance'}"


def about_the_bias(found: Verdict) -> str | None:
    """What taking the class bias out of the probabilities would do to the accuracy."""
    if found.over_raw is None or found.over_raw.sign <= 0:
        return None
    would = f"the answers have a class bias, and without it {found.relabelled:.3f} are right, out-of-fold"
    if found.relabelled_over_commonest.sign <= 0:
        return f"{would}, which is no better than always answering {found.commonest!r}"
    return f"{would}: calibration_demo.py --relabel may change predictions"


def next_steps(found: Verdict, labelled: int | None = None) -> list[str]:
    """What to try, in the order of what it gained on public data (docs/study.md).

    Nothing where the classifier beats both baselines.

    `labelled` rows are there to learn from (default: those that were judged).
    """
    if found.problem:
        return []
    beats_words = found.over_bag_of_words is None or found.over_bag_of_words.sign > 0
    if works(found) and beats_words:
        return []
    more = "more labels (label_next.py)"
    if found.method == "probe":
        return [more, "a larger --model", "fine_tune_model.py"]
    steps = ["fine_tune_model.py", "improve_task.py", more]
    if found.over_raw and found.over_raw.sign > 0 and found.relabelled_over_commonest.sign > 0:
        steps.insert(0, "calibration_demo.py --relabel")
    if (labelled or found.n) >= ENOUGH_FOR_A_PROBE:
        return ["probe_confidence.py", *steps]
    return [steps.pop(), *steps, "probe_confidence.py"]


# On a terminal


def text(record: Mapping, name: str = "Verdict") -> str:
    """The record of a verdict in some lines, the verdict itself in the first."""
    first, *others = record["sentences"]
    lines = [f"{name}: {first}", *(f"  {sentence}" for sentence in others)]
    if not record["problem"]:
        lines += [f"  {line}" for line in number_lines(record)]
    if record["next_steps"]:
        steps = ", ".join(record["next_steps"])
        lines.append(f"  next, by what gained most on public data (docs/improving.md): {steps}")
    return "\n".join(filled(printable(line), WIDTH, "    ") for line in lines)


def text_of_several(records: Mapping[str, Mapping]) -> str:
    """The verdicts on several models of the same rows, by their names, and the baselines that they share."""
    lines = []
    for name, record in records.items():
        first, *others = record["sentences"]
        lines += [f"{name}: {first}", *(f"  {sentence}" for sentence in others)]
    if not record["problem"]:
        lines.append(f"On the same {rows_words(record)}: {baseline_words(record)}")
    return "\n".join(filled(printable(line), WIDTH, "    ") for line in lines)


def number_lines(record: Mapping) -> list[str]:
    """The numbers that the sentences follow from; brackets are 95 % intervals."""
    lines = [f"n = {rows_words(record)}"]
    lines.append(f"accuracy {interval(record['accuracy'])}; {baseline_words(record)}")
    ranking = []
    if record["auroc"]:
        ranking.append(f"AUROC of confidence for correctness {interval(record['auroc'])}")
    if record["auc"]:
        ranking.append(f"AUC of P({record['last_label']}) {interval(record['auc'])}")
    lines += ["; ".join(ranking)] if ranking else []
    loss = f"log loss {record['log_loss']:.3f}"
    if record["refinement"] is not None:
        loss += f" = {record['calibration_part']:z.3f} calibration + {record['refinement']:.3f} refinement"
    return [*lines, f"label mass {record['label_mass']:.3f}; {loss}"]


def rows_words(record: Mapping) -> str:
    """How many rows, and groups if rows belong together."""
    rows = f"{record['n']:,} labelled rows"
    if record["tested"] < record["n"]:
        rows += f", {record['tested']:,} of them drawn for what is learned and tested"
    return f"{rows} in {record['groups']:,} groups" if record["groups"] < record["tested"] else rows


def baseline_words(record: Mapping) -> str:
    """What both baselines get right."""
    said = f"always {record['commonest']!r} {record['commonest_share']:.3f}"
    if record["bag_of_words"] is None:
        return said
    cut = f", of the first {LENGTH:,} characters" if record["cut_texts"] else ""
    return f"{said}, a bag of words {record['bag_of_words']:.3f} (out-of-fold{cut})"


def interval(measured: Mapping) -> str:
    return f"{measured['value']:.3f} [{measured['low']:.3f}, {measured['high']:.3f}]"
