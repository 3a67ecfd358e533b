"""Is what was guaranteed still so? Labelled samples of the automated rows, looked at as often as one likes.

    state = new_state(guarantee, {EVERYTHING: 0.9}, alpha=0.05)
    state = after_look(state, audited_rows)           # today's sample; save_state and load_state between looks
    state.alarm_at                                    # the look that raised the alarm, or None

For each of several accuracies q below the target a, evidence that the accuracy is q and not a:

    E_q = product over rows of  q / a  where right,  (1 - q) / (1 - a)  where wrong          E = mean of E_q

While at least a of the rows are right, E is no more than 1 on average whatever came before (a test martingale), so it
ever reaches 1 / alpha with probability alpha at most, however many looks there are: Ville, 1939; Waudby-Smith and
Ramdas, "Estimating means of bounded random variables by betting", JRSS B 2024. Rows of one group count together as
their mean factor: a mean of such evidence is evidence too, however alike the rows are.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from pydantic import Field, Strict, StrictStr
from scipy.special import logsumexp

from calibration_metrics import group_numbers
from files import read_json, validated, write_text
from predictions import Prediction
from tables import text_key

EVERYTHING = "all automated rows"
TIMES_AS_OFTEN = (1.2, 1.4, 1.7, 2.0, 2.5, 3.0, 4.0)  # errors than the target allows, under each q
FORMAT = "calibrated-confidence audit, version 1"

Count = Annotated[int, Strict(), Field(ge=0)]
Number = Annotated[float, Field(gt=-1e9, lt=1e9)]
Between = Annotated[float, Field(gt=0, lt=1)]


@dataclass(frozen=True)
class Audited:
    """The evidence against one guarantee."""

    target: Between
    log_evidence: tuple[Number, ...]  # log E_q of each q
    rows: Count = 0
    right: Count = 0

    def __post_init__(self) -> None:
        if len(self.log_evidence) != len(lower_accuracies(self.target)):
            raise ValueError("log_evidence: not one for each accuracy below the target")
        if self.right > self.rows:
            raise ValueError("right: more than rows")

    @property
    def e_value(self) -> float:
        return float(np.exp(logsumexp(self.log_evidence)) / len(self.log_evidence))


@dataclass(frozen=True)
class AuditState:
    """What a state file holds: the evidence so far, and which rows it comes from."""

    format: Literal[FORMAT]
    guarantee: StrictStr  # what is audited, as a hash: fingerprint, thresholds and targets
    alpha: Between  # risk of a false alarm, over all looks
    audited: Annotated[dict[str, Audited], Field(min_length=1)]  # by predicted label, or of EVERYTHING
    looks: Count = 0
    alarm_at: Count | None = None  # the look that raised the alarm
    seen: tuple[Annotated[str, Field(pattern="^[0-9a-f]{12}$")], ...] = ()  # row_key of every row that has counted

    @property
    def alarm_level(self) -> float:
        """The E that is an alarm: 1 / alpha, times the number of guarantees that are audited."""
        return len(self.audited) / self.alpha


@dataclass(frozen=True)
class AuditedRow:
    """A labelled automated row, and with which others it belongs together."""

    row: Prediction
    group: object

    @property
    def is_right(self) -> bool:
        return self.row.prediction == self.row.label


def lower_accuracies(target: float) -> np.ndarray:
    """The accuracies q that evidence is gathered for."""
    accuracies = 1 - (1 - target) * np.array(TIMES_AS_OFTEN)
    return accuracies[accuracies > 0] if (accuracies > 0).any() else np.array([target / 2])


def log_factors(right: Sequence[bool], groups: Sequence[object], target: float) -> np.ndarray:
    """The evidence of new rows, log of its product over groups, for each lower accuracy [accuracies]."""
    q = lower_accuracies(target)
    if not len(right):
        return np.zeros(len(q))
    factors = np.where(np.asarray(right, dtype=bool)[:, None], q / target, (1 - q) / (1 - target))
    number, size = group_numbers(groups), np.bincount(group_numbers(groups))
    by_group = [np.bincount(number, factor) / size for factor in factors.T]  # the mean factor, [accuracies][groups]
    return np.log(by_group).sum(axis=1)


def new_state(guarantee: str, targets: Mapping[str, float], alpha: float) -> AuditState:
    """Nothing audited yet: every E is 1."""
    audited = {name: Audited(target, tuple(0.0 for _ in lower_accuracies(target))) for name, target in targets.items()}
    return AuditState(FORMAT, guarantee, alpha, audited)


def row_key(row: Prediction) -> str:
    return text_key(f"{row.id} {row.text}")


def unseen(state: AuditState, rows: Sequence[AuditedRow]) -> list[AuditedRow]:
    """The rows that have not counted yet, each once."""
    seen, found = set(state.seen), []
    for each in rows:
        if (key := row_key(each.row)) not in seen:
            seen.add(key)
            found.append(each)
    return found


def after_look(state: AuditState, rows: Sequence[AuditedRow]) -> AuditState:
    """The state with the evidence of the rows that have not counted yet; an alarm stays. Without new rows, as it is."""
    rows = unseen(state, rows)
    if not rows:
        return state
    audited = {}
    for name, so_far in state.audited.items():
        mine = [each for each in rows if name in (EVERYTHING, each.row.prediction)]
        right = [each.is_right for each in mine]
        added = log_factors(right, [each.group for each in mine], so_far.target)
        audited[name] = replace(
            so_far,
            log_evidence=tuple((np.array(so_far.log_evidence) + added).tolist()),
            rows=so_far.rows + len(mine),
            right=so_far.right + sum(right),
        )
    looks, alarm_at = state.looks + 1, state.alarm_at
    if alarm_at is None and any(each.e_value >= state.alarm_level for each in audited.values()):
        alarm_at = looks
    seen = tuple(sorted({*state.seen, *(row_key(each.row) for each in rows)}))
    return replace(state, audited=audited, looks=looks, alarm_at=alarm_at, seen=seen)


def rows_until_alarm(target: float, alpha: float, accuracy: float, most: int = 1000, runs: int = 200) -> list[float]:
    """How many independent labelled rows an alarm takes at this accuracy: half of the time, and four times in five.

    By simulation, always the same; infinite where `most` rows are too few.
    """
    q = lower_accuracies(target)
    right = np.cumsum(np.random.default_rng(0).random((runs, most)) < accuracy, axis=1)[:, :, None]
    wrong = np.arange(1, most + 1)[:, None] - right
    log_e = logsumexp(right * np.log(q / target) + wrong * np.log((1 - q) / (1 - target)), axis=2) - np.log(len(q))
    alarmed = log_e >= np.log(1 / alpha)
    first = np.where(alarmed.any(axis=1), alarmed.argmax(axis=1) + 1.0, np.inf)
    return [float(np.quantile(first, share, method="higher")) for share in (0.5, 0.8)]


# The state file


def save_state(path: str | Path, state: AuditState) -> None:
    """Write the state file, whole or not at all."""
    write_text(path, json.dumps(asdict(state), indent=1, allow_nan=False) + "\n")


def load_state(path: str | Path, expected: AuditState) -> AuditState:
    """Read a state file; ValueError in one line when it is damaged or of another guarantee than the `expected`."""
    state = validated(AuditState, read_json(path), f"{path}: damaged, or no state file of an audit")
    targets = [{name: each.target for name, each in one.audited.items()} for one in (state, expected)]
    if (state.guarantee, state.alpha, targets[0]) != (expected.guarantee, expected.alpha, targets[1]):
        raise ValueError(
            f"{path} holds the audit of another guarantee (calibrator, threshold, target or --alpha); name a new "
            "--state file"
        )
    return state
