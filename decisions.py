"""From a confidence to a decision: which answers to automate, with a guarantee, and what that costs.

    choose_threshold(confidence, correct, 0.95)   the lowest threshold with a guarantee, or none
    average_threshold(confidence, correct, 0.95)  the lowest that is right on average over labelled sets: weaker
    cost_optimal_threshold(5, 50)                 where a review and the risk of an error cost the same: 0.9

The guarantee: with probability 1 - delta over the labelled rows, answers at or above the threshold are right at least
as often as the target: of 100 labelled sets at most 5 lead to a broken guarantee at delta 0.05. It holds for future
rows like the labelled ones, when the score was made without them. It is exact where rows are independent of each other,
and approximate where they come in groups (effective_rows.py). Taking the lowest threshold that met the target on the
labelled rows (the empirical threshold) misses the target about half the time.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Hashable, Sequence
from dataclasses import asdict, dataclass

import numpy as np

from calibration_metrics import bootstrap_interval, checked, exact_interval, group_numbers
from effective_rows import GroupSums, effective_rows, error_correlation, group_sums

STEP = 0.02  # thresholds are tried at every 2 % of the rows, in order of confidence
ENDLESS = 2**40  # rows
MOST_LABELS = 100_000  # more than anybody would add: the model has to become better instead
FEW_ROWS = 100  # a guarantee that rests on fewer effective rows gets a warning
AVERAGE = "average"
CERTAINTIES = (0.95, 0.8, AVERAGE)  # the ladder of every report
STARTS = ("predicted", "strictest")
BUCKETS = (  # the article's confidence bands: from this confidence on
    (0.9, "auto-approve"),
    (0.7, "human review"),
    (0.5, "manual check"),
    (0.0, "manual processing"),
)


@dataclass(frozen=True)
class Threshold:
    """A threshold with its evidence. `value` is None when these labels guarantee nothing.

    kind: "exact" where every row is its own group, "approximate" where rows come in groups, "average" for a threshold
    that is right on average over labelled sets, which is no guarantee for this one.
    """

    value: float | None
    target_accuracy: float
    kind: str
    delta: float | None  # risk that the guarantee is broken; None of the average kind
    n: int  # labelled rows
    groups: int  # of rows that belong together
    rho: float  # how alike the errors of a group are
    start: int | None = None  # rows accepted at the first rank that was tested; None where no rank was
    accepted: int = 0  # labelled rows at or above the value
    effective: float = 0.0  # independent rows that these are worth
    errors: int = 0  # of those accepted
    naive_value: float | None = None  # empirical: the lowest that met the target on these rows, no guarantee
    naive_accepted: int = 0
    more_labels: int | None = None  # when nothing can be guaranteed: about how many more would do, None if none would

    def record(self) -> dict:
        """As it stands in a calibrator file."""
        return asdict(self)

    def __str__(self) -> str:
        aim = f"accuracy {self.target_accuracy:.1%} {certainty_words(self.record())}"
        if self.value is None:
            return f"{aim}: nothing can be guaranteed with these {self.n:,} labels; {lacking_words(self.record())}"
        found = (
            f"{aim}: automate from {floor(self.value)} on, {self.accepted:,} of {self.n:,} rows "
            f"({self.accepted / self.n:.1%}), {self.errors:,} of them wrong"
        )
        if self.kind == "approximate":
            found += f" (approximate: worth {self.effective:,.0f} independent rows)"
        return found


def certainty_words(threshold: dict) -> str:
    """How sure a threshold record is, as in "with 95% certainty"."""
    if threshold["kind"] == AVERAGE:
        return "on average over labelled sets"
    return f"with {100 * (1 - threshold['delta']):.10g}% certainty"


def lacking_words(threshold: dict) -> str:
    """What a threshold record without a value says is missing."""
    if not threshold["n"]:
        return "no labelled row has this prediction"
    more = threshold["more_labels"]
    return f"about {more:,} more labels are needed" if more else "not reachable with this model: raise its accuracy"


def rests_on_few(threshold: dict) -> bool:
    """Whether a threshold record is a guarantee that rests on few effective rows."""
    return threshold["value"] is not None and threshold["kind"] != AVERAGE and threshold["effective"] < FEW_ROWS


def average_words(target: float) -> str:
    """What a threshold of the average kind says, and what it does not."""
    percent = f"{100 * target:.10g} %"
    return (
        f"On average over labelled sets like yours at least {percent} of what is automated is right; with one set it "
        f"is below {percent} about every second time, by more than 2 points about one time in ten (1,000 labels) or "
        "five (200). That is no guarantee for this threshold."
    )


def floor(value: float, decimals: int = 4) -> str:
    """A share as text, rounded down: no rounding makes a threshold or a bound say more than it does."""
    return f"{math.floor(value * 10**decimals + 1e-9) / 10**decimals:.{decimals}f}"


def rows_needed(target_accuracy: float, delta: float, errors: int = 0) -> int:
    """The fewest accepted rows that prove the target with so many errors among them."""
    _check(target_accuracy, delta)
    if errors < 0 or errors != int(errors):
        raise ValueError(f"the number of errors is {errors}; it must be a whole number, 0 or more")
    return int(_rows_needed(np.array([0.0]), target_accuracy, delta, errors)[0])


def _rows_needed(rates: np.ndarray, target: float, delta: float, errors: int = 0) -> np.ndarray:
    """The fewest accepted rows that prove the target with `errors` and that share of the rows wrong, [rates].

    ENDLESS where no number of rows does.
    """
    low, high = np.full(len(rates), 1), np.full(len(rates), ENDLESS)
    while (low < high).any():
        middle = (low + high) // 2
        passes = guarantee_p_value(middle, errors + np.ceil(rates * middle), target) <= delta
        low, high = np.where(passes, low, middle + 1), np.where(passes, middle, high)
    return high


def guarantee_p_value(n: np.ndarray, errors: np.ndarray, target_accuracy: float) -> np.ndarray:
    """P(so few errors among n rows) if the true accuracy were only the target: P(Bin(n, 1 - target) <= errors).

    Written as P(Beta(errors + 1, n - errors) > 1 - target), which also takes the n and errors of effective rows, that
    are no whole numbers.
    """
    from scipy.special import betainc

    right = np.asarray(n) - errors
    with_any_right = right > 0
    return np.where(with_any_right, betainc(np.where(with_any_right, right, 1), errors + 1.0, target_accuracy), 1.0)


# The search


@dataclass(frozen=True)
class Ranks:
    """What stands at or above the confidence of each rank, highest confidence first; arrays [ranks]."""

    value: np.ndarray  # the confidence itself
    accepted: np.ndarray  # rows, those of the same confidence too
    errors: np.ndarray
    predicted: np.ndarray  # errors, if the confidences were true
    sums: GroupSums | None  # over groups; None where every row is its own
    n: int  # labelled rows
    groups: int
    rho: float

    def __getitem__(self, places: np.ndarray) -> Ranks:
        arrays = self.value[places], self.accepted[places], self.errors[places], self.predicted[places]
        return Ranks(*arrays, self.sums and self.sums[places], self.n, self.groups, self.rho)

    @property
    def kind(self) -> str:
        return "exact" if self.sums is None else "approximate"

    def effective(self, delta: float, at_start: bool = False) -> np.ndarray:
        """Independent rows that the accepted ones are worth as evidence.

        At the start of a sequence without a look at the errors of the ranks: of all labels only rho is used.
        """
        if self.sums is None:
            return self.accepted.astype(float)
        return effective_rows(self.accepted, self.sums, self.rho, delta, None if at_start else self.errors)


def choose_threshold(
    confidence: Sequence[float],
    correct: Sequence[bool],
    target_accuracy: float,
    delta: float = 0.05,
    groups: Sequence[Hashable] | None = None,
    start: str = "predicted",
) -> Threshold:
    """The lowest threshold that guarantees the target accuracy with probability 1 - delta, by fixed-sequence testing.

    Thresholds at every 2 % of rank are tested one after the other down from a start, each at the full delta, until one
    fails: Angelopoulos et al., "Learn then Test", 2021 (arXiv 2110.01052). The order is set before the labels are
    looked at, so no correction for the many tests is needed. All rows count; where they come in `groups`, the test is
    approximate, with the number of independent rows that they are worth (effective_rows.py).

    start: "predicted" begins where the confidences alone predict the most significance, which is for calibrated ones;
    when these were cross-fitted on the same labels, that is nearly exact. "strictest", for raw scores, begins with the
    first rank that has a tenth of the rows, and enough of them to prove the target without an error.
    """
    target_accuracy, delta = float(target_accuracy), float(delta)  # of any float type, but JSON knows one
    everything = _by_rank(*checked(confidence, correct), groups)
    _check(target_accuracy, delta)
    if start not in STARTS:
        raise ValueError(f"start is {start!r}; it must be one of {', '.join(STARTS)}")
    tried = everything[_ranks(everything.n)]
    effective = tried.effective(delta)
    proved = guarantee_p_value(effective, tried.errors / tried.accepted * effective, target_accuracy) <= delta
    first = _first_rank(tried, target_accuracy, delta, start)
    failed = np.flatnonzero(~proved[first:])
    last = first + int(failed[0]) - 1 if len(failed) else len(proved) - 1  # of those proved one after the other
    common = _common(everything, target_accuracy, None if first == len(proved) else int(tried.accepted[first]))
    if last < first:
        more = _more_labels(tried, target_accuracy, delta, start)
        return Threshold(None, delta=delta, kind=tried.kind, more_labels=more, **common)
    found = {"accepted": int(tried.accepted[last]), "errors": int(tried.errors[last])}
    found["effective"] = float(effective[last])
    return Threshold(float(tried.value[last]), delta=delta, kind=tried.kind, **found, **common)


def average_threshold(
    confidence: Sequence[float],
    correct: Sequence[bool],
    target_accuracy: float,
    groups: Sequence[Hashable] | None = None,
) -> Threshold:
    """The lowest threshold with errors + 1 <= (1 - target) x accepted: right on average over labelled sets.

    No guarantee for this threshold: with one labelled set the accuracy is below the target about every second time.
    For independent rows; on groups it is a little too low. The one error more is that of conformal risk control
    (Angelopoulos et al., ICLR 2024, arXiv 2208.02814).
    """
    target_accuracy = float(target_accuracy)
    everything = _by_rank(*checked(confidence, correct), groups)
    _check(target_accuracy, 0.5)
    met = np.flatnonzero(everything.errors + 1 <= (1 - target_accuracy) * everything.accepted + 1e-9)
    common = {"kind": AVERAGE, "delta": None, **_common(everything, target_accuracy, None)}
    if not len(met):
        more = _more_labels(everything[_ranks(everything.n)], target_accuracy, 0.5, "strictest")
        return Threshold(None, more_labels=more, **common)
    best = everything[met[-1:]]
    effective = float(best.effective(0.5)[0])
    found = {"accepted": int(best.accepted[0]), "errors": int(best.errors[0]), "effective": effective}
    return Threshold(float(best.value[0]), **found, **common)


def threshold_for(
    confidence: Sequence[float],
    correct: Sequence[bool],
    target_accuracy: float,
    certainty: float | str = 0.95,
    groups: Sequence[Hashable] | None = None,
) -> Threshold:
    """`choose_threshold` at a certainty of 1 - delta, or `average_threshold` when the certainty is "average"."""
    if certainty == AVERAGE:
        return average_threshold(confidence, correct, target_accuracy, groups)
    return choose_threshold(confidence, correct, target_accuracy, round(1 - float(certainty), 12), groups)


def threshold_without_rows(target_accuracy: float, certainty: float | str = 0.95) -> Threshold:
    """What no labelled rows at all can guarantee: nothing, and how many would do cannot be told."""
    kind, delta = (AVERAGE, None) if certainty == AVERAGE else ("exact", round(1 - float(certainty), 12))
    return Threshold(None, target_accuracy, kind, delta, n=0, groups=0, rho=0.0)


def measured_ladder(
    known: tuple[np.ndarray, np.ndarray],
    test: tuple[np.ndarray, np.ndarray],
    target_accuracy: float,
    groups: Sequence[Hashable] | None = None,
    certainties: Sequence[float | str] = CERTAINTIES,
) -> list[dict]:
    """A rung for each certainty: the threshold that `known` rows choose, and what it automates of the `test` rows.

    Both are (confidence [n], correct [n]); `groups` are those of the known rows. The most certain rung comes first.
    """
    rungs = []
    for certainty in sorted(set(certainties), key=lambda c: 0 if c == AVERAGE else c, reverse=True):
        threshold = threshold_for(*known, target_accuracy, certainty, groups)
        measured = None
        if threshold.value is not None:
            (measured,) = automation(*test, [threshold.value])
        rungs.append({"certainty": certainty, "threshold": threshold.record(), "measured": measured})
    return rungs


def rung_words(rung: dict) -> str:
    """Coverage, threshold and accuracy of a measured rung, or what is missing, in a few words."""
    threshold, measured = rung["threshold"], rung["measured"]
    if threshold["value"] is None:
        more = threshold["more_labels"]
        return f"nothing, {more:,} labels more" if more else "not reachable"
    right = f"{measured['accuracy']:.3f}" if measured["automated"] else "no row"
    return f"{measured['share']:.1%} from {floor(threshold['value'], 3)} ({right})"


def rung_name(certainty: float | str) -> str:
    """The head of a rung's column."""
    return "on average" if certainty == AVERAGE else f"{100 * certainty:.10g} % certain"


def conformal_selection(
    confidence: np.ndarray, wrong_confidence: np.ndarray, n: int, false_discovery_rate: float
) -> np.ndarray:
    """Which rows of a batch to automate, bool [batch], so that on average at most that share of them is wrong.

    Conformal selection: Jin and Candes, "Selection by prediction with conformal p-values", JMLR 2023 (arXiv
    2210.01408). p = (1 + labelled wrong rows with at least this confidence) / (n + 1), then Benjamini and Hochberg's
    step-up. `wrong_confidence` are those of the wrong rows among n labelled ones. It holds on average over labelled
    sets and batches, for one batch as a whole, where its rows and the labelled ones are exchangeable.
    """
    if not 0 < false_discovery_rate < 1:
        raise ValueError(f"the false discovery rate is {false_discovery_rate:g}; it must be between 0 and 1")
    confidence, wrong = np.asarray(confidence, dtype=np.float64), np.sort(wrong_confidence)
    if n < len(wrong) or not n:
        raise ValueError(f"{len(wrong)} wrong rows among {n} labelled ones")
    p = (1 + len(wrong) - np.searchsorted(wrong, confidence, side="left")) / (n + 1)
    allowed = false_discovery_rate * np.arange(1, len(p) + 1) / max(len(p), 1)
    passed = np.flatnonzero(np.sort(p) <= allowed + 1e-12)
    return p <= np.sort(p)[passed[-1]] if len(passed) else np.zeros(len(p), dtype=bool)


def _check(target_accuracy: float, delta: float) -> None:
    if not 0 < target_accuracy < 1:
        raise ValueError(f"the target accuracy is {target_accuracy:g}; it must be between 0 and 1, both excluded")
    if not 0 < delta < 1:
        raise ValueError(f"delta is {delta:g}; it must be between 0 and 1, both excluded")


def _by_rank(confidence: np.ndarray, correct: np.ndarray, groups: Sequence[Hashable] | None) -> Ranks:
    """Every rank from the highest confidence down; rows of the same confidence are accepted together."""
    n = len(confidence)
    numbers = np.arange(n) if groups is None else group_numbers(groups)
    if len(numbers) != n:
        raise ValueError(f"{n} confidences, but {len(numbers)} groups")
    order = np.argsort(-confidence, kind="stable")
    value, wrong, numbers = confidence[order], ~correct[order], numbers[order]
    last = np.searchsorted(-value, -value, side="right") - 1  # of the rows with the same confidence
    n_groups = int(numbers.max()) + 1
    sums, rho = None, 0.0
    if n_groups < n:
        sums, rho = group_sums(wrong, numbers)[last], error_correlation(wrong, numbers)
    predicted = np.cumsum(1 - value)[last]
    return Ranks(value, last + 1, np.cumsum(wrong)[last], predicted, sums, n, n_groups, rho)


def _ranks(n: int) -> np.ndarray:
    """Every 2 % of n rows, as indices from the top."""
    return np.unique([min(n, math.ceil(n * STEP * i - 1e-9)) - 1 for i in range(1, round(1 / STEP) + 1)])


def _first_rank(tried: Ranks, target: float, delta: float, start: str) -> int:
    """Where the sequence begins, chosen without the labels of its ranks; the number of ranks where none can do."""
    effective = tried.effective(delta, at_start=True)
    possible = effective >= rows_needed(target, delta)
    if start == "strictest":
        possible &= tried.accepted >= tried.n / 10
        return int(possible.argmax()) if possible.any() else len(possible)
    significance = _predicted_significance(tried, target, effective)
    return int(np.where(possible, significance, -np.inf).argmax()) if possible.any() else len(possible)


def _predicted_significance(tried: Ranks, target: float, effective: np.ndarray) -> np.ndarray:
    """By how many standard errors, up to a factor, true confidences would put each rank above the target."""
    return (1 - target - tried.predicted / tried.accepted) * np.sqrt(effective)


def _common(everything: Ranks, target_accuracy: float, start: int | None) -> dict:
    """The fields that every threshold has."""
    met = np.flatnonzero(everything.errors <= (1 - target_accuracy) * everything.accepted + 1e-9)
    return {
        "target_accuracy": target_accuracy,
        "n": everything.n,
        "groups": everything.groups,
        "rho": everything.rho,
        "start": start,
        "naive_value": float(everything.value[met[-1]]) if len(met) else None,
        "naive_accepted": int(everything.accepted[met[-1]]) if len(met) else 0,
    }


def _more_labels(tried: Ranks, target: float, delta: float, start: str) -> int | None:
    """How many more labels would prove the target if errors stay as frequent as at the rank that needs the fewest.

    Only ranks that the test can come to count: from its start on, wherever that is with more labels, up to the first
    that is clearly worse than the target. Rates of few rows flatter, so a rank counts with one error more than it had.
    None where no number does, or more than MOST_LABELS.
    """
    if start == "strictest":
        tried = tried[tried.accepted >= tried.n / 10]
    else:
        tried = tried[_predicted_significance(tried, target, tried.effective(delta, at_start=True)).argmax() :]
    effective = tried.effective(delta)
    errors = tried.errors / tried.accepted * effective
    refuted = guarantee_p_value(effective, effective - errors, 1 - target) <= delta  # as many right if that were so
    counted = slice(int(refuted.argmax()) if refuted.any() else None)
    effective, rates = effective[counted], ((errors + 1) / (effective + 1))[counted]
    effective, rates = effective[rates < 1 - target - 1e-9], rates[rates < 1 - target - 1e-9]
    if not len(rates):
        return None
    needed = np.maximum(_rows_needed(rates, target, delta), rows_needed(target, delta))
    more = int(np.min(np.ceil(needed / effective * tried.n))) - tried.n
    return max(more, 1) if more <= MOST_LABELS else None


# Money


def add_cost_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of what a decision costs; the same in every script."""
    add = parser.add_argument
    add("--review-cost", type=float, default=5.0, metavar="DOLLARS", help="of a person's look (default: 5)")
    add("--error-cost", type=float, default=25.0, metavar="DOLLARS", help="of an automated mistake (default: 25)")
    add("--volume", type=int, default=1000, metavar="N", help="predictions a day (default: 1,000)")


def check_cost_arguments(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    for name in ("review_cost", "error_cost"):
        if not 0 <= getattr(args, name) <= 1e9:
            parser.error(f"--{name.replace('_', '-')} {getattr(args, name)}: from 0 to a billion")
    if args.volume < 1:
        parser.error(f"--volume {args.volume}: at least one prediction a day")


def cost_optimal_threshold(review_cost: float, error_cost: float, automation_cost: float = 0.0) -> float:
    """Automate from this calibrated confidence on: 1 - (review - automation) / error, between 0 and 1.

    Chow, "On optimum recognition error and reject tradeoff", 1970. An error that costs no more than a review is never
    worth one: 0. It needs confidences that are true; on raw ones it loses money.
    """
    _check_costs(review=review_cost, error=error_cost, automation=automation_cost)
    if error_cost == 0:
        return float(automation_cost > review_cost)
    return float(np.clip(1 - (review_cost - automation_cost) / error_cost, 0, 1))


def _check_costs(**costs: float) -> None:
    for name, cost in costs.items():
        if not (math.isfinite(cost) and cost >= 0):
            raise ValueError(f"the {name} cost is {cost:g}; it must be finite and 0 or more")


def costs(
    confidence: np.ndarray, correct: np.ndarray, thresholds: np.ndarray, review_cost: float, error_cost: float
) -> np.ndarray:
    """Mean cost of a row [thresholds]: a review below the threshold, the price of its errors at or above it."""
    confidence, correct = checked(confidence, correct)
    _check_costs(review=review_cost, error=error_cost)
    dollars = np.where(correct, 0.0, error_cost)
    thresholds = _checked_thresholds(thresholds)
    return np.array([np.where(confidence >= threshold, dollars, review_cost).mean() for threshold in thresholds])


def _checked_thresholds(thresholds: Sequence[float]) -> np.ndarray:
    thresholds = np.asarray(thresholds, dtype=np.float64)
    if np.isnan(thresholds).any():
        raise ValueError("a threshold is NaN")
    return thresholds


def cost_band(
    confidence: Sequence[float],
    correct: Sequence[bool],
    thresholds: Sequence[float],
    review_cost: float,
    error_cost: float,
    groups: Sequence[object] | None = None,
    n_resamples: int = 500,
    seed: int = 0,
) -> np.ndarray:
    """(cost, low, high) of a row at each threshold, [thresholds, 3]; the band is a 95 % cluster bootstrap."""
    confidence, correct = checked(confidence, correct)
    groups = np.arange(len(confidence)) if groups is None else groups
    if len(groups) != len(confidence):
        raise ValueError(f"{len(confidence)} confidences, but {len(groups)} groups")

    def of_rows(rows: np.ndarray) -> np.ndarray:
        return costs(confidence[rows], correct[rows], thresholds, review_cost, error_cost)

    band = bootstrap_interval(of_rows, groups, n_resamples, seed)
    return np.column_stack([costs(confidence, correct, thresholds, review_cost, error_cost), band])


def automation(confidence: Sequence[float], correct: Sequence[bool], thresholds: Sequence[float]) -> list[dict]:
    """For each threshold the rows automated, how many of them are right, and the exact 95 % interval of that share."""
    confidence, correct = checked(confidence, correct)
    table = []
    for threshold in _checked_thresholds(thresholds).tolist():
        taken = confidence >= threshold
        share = {"threshold": threshold, "automated": int(taken.sum()), "share": float(taken.mean())}
        table.append(share | _accuracy(correct[taken]))
    return table


def dollars_a_day(automated: float, accuracy: float | None, volume: int, review_cost: float, error_cost: float) -> dict:
    """What a share automated at some accuracy costs at `volume` predictions a day: reviews, errors and both.

    `accuracy` is that of the automated rows, None where there are none.
    """
    _check_costs(review=review_cost, error=error_cost)
    for name, share in (("automated share", automated), ("accuracy", accuracy if automated else 1)):
        if share is None or not 0 <= share <= 1:
            raise ValueError(f"the {name} is {share}; it must be between 0 and 1")
    if volume < 0:
        raise ValueError(f"the volume is {volume} predictions a day; it must be 0 or more")
    reviews = (1 - automated) * volume * review_cost
    errors = automated * (1 - accuracy) * volume * error_cost if automated else 0.0
    return {"review_dollars": reviews, "error_dollars": errors, "dollars": reviews + errors}


def priced_automation(
    confidence: Sequence[float],
    correct: Sequence[bool],
    thresholds: Sequence[float],
    volume: int,
    review_cost: float,
    error_cost: float,
) -> list[dict]:
    """The rows of `automation`, each with what a day costs at its threshold."""
    rows = automation(confidence, correct, thresholds)
    for row in rows:
        row |= dollars_a_day(row["share"], row["accuracy"], volume, review_cost, error_cost)
    return rows


def bucket_of(confidence: float) -> str:
    """The article's confidence band of one confidence."""
    if not 0 <= confidence <= 1:
        raise ValueError(f"the confidence is {confidence}, outside [0, 1]")
    return next(name for lower, name in BUCKETS if confidence >= lower)


def buckets(confidence: Sequence[float], correct: Sequence[bool]) -> list[dict]:
    """The article's four confidence bands: rows, how many are right, accuracy and its exact 95 % interval."""
    confidence, correct = checked(confidence, correct)
    upper, table = np.inf, []
    for lower, name in BUCKETS:
        inside = (confidence >= lower) & (confidence < upper)
        table.append({"bucket": name, "from": lower, "n": int(inside.sum()), **_accuracy(correct[inside])})
        upper = lower
    return table


def _accuracy(correct: np.ndarray) -> dict:
    """How many are right, the accuracy and its exact 95 % interval; None where there are no rows."""
    n, right = len(correct), int(correct.sum())
    low, high = exact_interval(right, n) if n else (None, None)
    return {"right": right, "accuracy": right / n if n else None, "accuracy_low": low, "accuracy_high": high}
