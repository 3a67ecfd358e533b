"""From a confidence to a decision: which answers to automate, with a guarantee, and what that costs.

    choose_threshold(confidence, correct, 0.95)   the lowest threshold with a guarantee, or none
    cost_optimal_threshold(5, 50)                 where a review and the risk of an error cost the same: 0.9

The guarantee: with probability 1 - delta over the labelled rows, answers at or above the threshold are right at least
as often as the target. It holds for future rows like the labelled ones, when these are independent of each other and
the score was made without them. Taking the lowest threshold that met the target on the labelled rows (the empirical
threshold) misses the target about half the time.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np

from calibration_metrics import checked, exact_interval, resamples

STEP = 0.02  # thresholds are tried at every 2 % of the rows, in order of confidence
ENDLESS = 2**40  # rows
BUCKETS = (  # the article's confidence bands: from this confidence on
    (0.9, "auto-approve"),
    (0.7, "human review"),
    (0.5, "manual check"),
    (0.0, "manual processing"),
)


@dataclass(frozen=True)
class Threshold:
    """A threshold with its evidence. `value` is None when these labels guarantee nothing."""

    value: float | None
    target_accuracy: float
    delta: float
    n: int  # labelled rows
    accepted: int  # of them at or above the value
    errors: int  # of those accepted
    lower_bound: float | None  # of the accepted rows' accuracy, exact, one-sided, at 1 - delta
    naive_value: float | None  # the empirical threshold: the lowest that met the target on these rows, no guarantee
    naive_accepted: int
    more_labels: int | None  # when nothing can be guaranteed: about how many more would do, None if none would

    def record(self) -> dict:
        """As it stands in a calibrator file."""
        return asdict(self)

    def __str__(self) -> str:
        guarantee = f"accuracy {self.target_accuracy:.1%} with {100 * (1 - self.delta):g}% certainty"
        if self.value is None:
            more = "they do not hint at a threshold that would, so more labels like these alone will not help"
            if self.more_labels:
                more = f"about {self.more_labels:,} more labels are needed"
            return f"{guarantee}: nothing can be guaranteed with these {self.n:,} labels; {more}"
        return (
            f"{guarantee}: automate from {floor(self.value)} on, {self.accepted:,} of {self.n:,} rows "
            f"({self.accepted / self.n:.1%}), {self.errors:,} of them wrong, at least "
            f"{floor(100 * self.lower_bound, 1)}% right"
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
    """P(so few errors among n) if the true accuracy were only the target: P(Bin(n, 1 - target) <= errors)."""
    from scipy.stats import binom

    return binom.cdf(errors, n, 1 - target_accuracy)


def choose_threshold(
    confidence: Sequence[float], correct: Sequence[bool], target_accuracy: float, delta: float = 0.05
) -> Threshold:
    """The lowest threshold that guarantees the target accuracy with probability 1 - delta, by fixed-sequence testing.

    Thresholds at every 2 % of rank are tested from the strictest down, each exactly and at the full delta, until one
    fails: Angelopoulos et al., "Learn then Test", 2021 (arXiv 2110.01052). The first has at least a tenth of the rows,
    and enough of them to prove the target without an error. The order is set before the labels are looked at, so no
    correction for the many tests is needed. Rows must be independent: keep one of each group of near-duplicates.
    """
    from scipy.stats import beta

    confidence, correct = checked(confidence, correct)
    target_accuracy, delta = float(target_accuracy), float(delta)  # of any float type, but JSON knows one
    _check(target_accuracy, delta)
    accepted, errors, values = _by_rank(confidence, correct)
    n = len(confidence)
    start = max(rows_needed(target_accuracy, delta), n / 10)
    tried = [k for k in _ranks(n) if accepted[k] >= start]
    proved = guarantee_p_value(accepted[tried], errors[tried], target_accuracy) <= delta
    passed = len(tried) if proved.all() else int(proved.argmin())  # before the first that fails
    met = np.flatnonzero(errors <= (1 - target_accuracy) * accepted + 1e-9)
    common = {
        "target_accuracy": target_accuracy,
        "delta": delta,
        "n": n,
        "naive_value": float(values[met[-1]]) if len(met) else None,
        "naive_accepted": int(accepted[met[-1]]) if len(met) else 0,
    }
    if not passed:
        more = _more_labels(accepted, errors, n, target_accuracy, delta)
        return Threshold(None, accepted=0, errors=0, lower_bound=None, more_labels=more, **common)
    best = tried[passed - 1]
    taken, wrong = int(accepted[best]), int(errors[best])
    lower = float(beta.ppf(delta, taken - wrong, wrong + 1))
    return Threshold(float(values[best]), accepted=taken, errors=wrong, lower_bound=lower, more_labels=None, **common)


def _check(target_accuracy: float, delta: float) -> None:
    if not 0 < target_accuracy < 1:
        raise ValueError(f"the target accuracy is {target_accuracy:g}; it must be between 0 and 1, both excluded")
    if not 0 < delta < 1:
        raise ValueError(f"delta is {delta:g}; it must be between 0 and 1, both excluded")


def _by_rank(confidence: np.ndarray, correct: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(rows at or above, errors among them, threshold) for the confidence of each rank, highest first, [n] each."""
    order = np.argsort(-confidence, kind="stable")
    values, wrong = confidence[order], np.cumsum(~correct[order])
    last = np.searchsorted(-values, -values, side="right") - 1  # of the rows with the same confidence
    return last + 1, wrong[last], values


def _ranks(n: int) -> list[int]:
    """Every 2 % of n rows, as indices from the top."""
    return sorted({min(n, math.ceil(n * STEP * i - 1e-9)) - 1 for i in range(1, round(1 / STEP) + 1)})


def _more_labels(accepted: np.ndarray, errors: np.ndarray, n: int, target: float, delta: float) -> int | None:
    """How many more labels would prove the target if errors stay as frequent as at the rank that needs the fewest.

    Only ranks that the test can come to count: from a tenth of the rows on, up to the first that is clearly worse than
    the target. Rates of few rows flatter, so a rank counts with one error more than it had.
    """
    from scipy.stats import binom

    ranks = np.array([k for k in _ranks(n) if accepted[k] >= n / 10])
    refuted = binom.sf(errors[ranks] - 1, accepted[ranks], 1 - target) <= delta
    if refuted.any():
        ranks = ranks[: int(refuted.argmax())]
    rates = (errors[ranks] + 1) / (accepted[ranks] + 1)
    ranks, rates = ranks[rates < 1 - target - 1e-9], rates[rates < 1 - target - 1e-9]
    if not len(ranks):
        return None
    rows = np.maximum(_rows_needed(rates, target, delta), rows_needed(target, delta))
    more = int(np.min(np.ceil(rows / accepted[ranks] * n))) - n
    return max(more, 1) if more < ENDLESS / 2 else None


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
    return _cost_of_rows(confidence, correct, thresholds, review_cost, error_cost).mean(axis=0)


def _cost_of_rows(
    confidence: np.ndarray, correct: np.ndarray, thresholds: np.ndarray, review_cost: float, error_cost: float
) -> np.ndarray:
    """[n, thresholds]"""
    confidence, correct = checked(confidence, correct)
    _check_costs(review=review_cost, error=error_cost)
    automated = confidence[:, None] >= _checked_thresholds(thresholds)
    return np.where(automated, error_cost * ~correct[:, None], review_cost)


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
    each = _cost_of_rows(confidence, correct, thresholds, review_cost, error_cost)
    groups = np.arange(len(each)) if groups is None else groups
    if len(groups) != len(each):
        raise ValueError(f"{len(each)} confidences, but {len(groups)} groups")
    drawn = np.array([each[rows].mean(axis=0) for rows in resamples(groups, n_resamples, seed)])
    return np.column_stack([each.mean(axis=0), *np.quantile(drawn, [0.025, 0.975], axis=0)])


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
