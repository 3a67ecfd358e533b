"""An adapter's own estimate of being right, from the model's last hidden state.

    P(right) = sigma(slope * logit(confidence) + intercept + weights . standardised hidden state)

What Platt scaling is to the confidence, with all that the model knew besides: Kadavath et al., "Language models
(mostly) know what they know", 2022. `fine_tune_model.py --confidence-head` fits one and writes it beside the adapter,
as JSON; `logprobs_confidence.py --confidence-head` reads it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from pydantic import StrictStr
from scipy.special import expit

from calibration import LEAST_ROWS, grouped_folds
from calibration_metrics import log_loss
from calibrators import SMALLEST, Number, Numbers, check_both_outcomes, logistic_regression, logit
from files import read_json, validated, write_text

FORMAT = "calibrated-confidence head, version 1"
STRENGTHS = (0.0, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0)  # variance of what a head adds to a logit, before fitting


@dataclass(frozen=True)
class ConfidenceHead:
    """The numbers of the formula above, and where they are from.

    `fingerprint` is that of the predictions it belongs to; `record` holds n, the share of right answers, and the
    out-of-fold log loss of the head and of Platt scaling alone on the same folds.
    """

    __pydantic_config__: ClassVar[dict] = {"extra": "forbid"}  # of its file

    slope: Number
    intercept: Number
    weights: Numbers  # [hidden]
    mean: Numbers  # [hidden]
    scale: Numbers  # [hidden], above 0
    fingerprint: StrictStr
    record: Mapping[str, Any]

    def __post_init__(self) -> None:
        if not len(self.weights) == len(self.mean) == len(self.scale):
            raise ValueError("weights, mean and scale differ in length")
        if not (self.scale > 0).all():
            raise ValueError("scale: not above 0")

    @property
    def digest(self) -> str:
        """Eight hex digits of all its numbers."""
        return hashlib.sha256(_head_text(self).encode()).hexdigest()[:8]

    def predict(self, hidden: np.ndarray, confidence: np.ndarray) -> np.ndarray:
        """P(right) [n] from hidden states [n, hidden] and confidences [n]."""
        extra = ((hidden - self.mean) / self.scale) @ self.weights
        return expit(self.slope * logit(confidence) + self.intercept + extra)


def fit_head(
    hidden: np.ndarray, confidence: np.ndarray, correct: np.ndarray, groups: Sequence[object], fingerprint: str
) -> ConfidenceHead:
    """Fit a head to rows [n] that the model was not trained on; what it adds to Platt scaling is shrunk by ridge.

    Grouped cross-validation chooses the penalty, and may choose no weights at all.
    """
    hidden, correct = np.asarray(hidden, dtype=np.float64), np.asarray(correct, dtype=bool)
    if len(correct) < LEAST_ROWS:
        raise ValueError(f"{len(correct)} rows are too few for a confidence head; {LEAST_ROWS} are the least")
    folds = grouped_folds(confidence, correct, groups)
    losses = {}
    for strength in STRENGTHS:
        answers = np.empty(len(correct))
        for train, test in folds:
            head = _head(hidden[train], confidence[train], correct[train], strength)
            answers[test] = head.predict(hidden[test], confidence[test])
        losses[strength] = log_loss(answers, correct)
    best = min(losses, key=losses.__getitem__)
    record = {"n": len(correct), "right": float(correct.mean()), "strength": best}
    record |= {"out_of_fold_log_loss": losses[best], "platt_log_loss": losses[0.0]}
    return replace(_head(hidden, confidence, correct, best), fingerprint=fingerprint, record=record)


def _head(hidden: np.ndarray, confidence: np.ndarray, correct: np.ndarray, strength: float) -> ConfidenceHead:
    """The head whose weights have the prior variance strength / hidden; 0 is Platt scaling."""
    check_both_outcomes(correct)
    mean, scale = hidden.mean(axis=0), np.maximum(hidden.std(axis=0), SMALLEST)
    width = hidden.shape[1]
    # One logistic regression with one penalty: columns so large that their coefficients cost nothing are free.
    columns = [logit(confidence)[:, None] * 1e3, (hidden - mean) / scale * np.sqrt(strength / width / 1e6)]
    fitted = logistic_regression(np.hstack(columns if strength else columns[:1]), correct)
    weights = fitted[1:-1] * np.sqrt(strength / width / 1e6) if strength else np.zeros(width)
    return ConfidenceHead(float(fitted[0] * 1e3), float(fitted[-1]), weights, mean, scale, "", {})


def _head_text(head: ConfidenceHead) -> str:
    record = {name: value.tolist() if isinstance(value, np.ndarray) else value for name, value in vars(head).items()}
    return json.dumps({"format": FORMAT} | record, allow_nan=False) + "\n"


def save_head(path: str | Path, head: ConfidenceHead) -> None:
    """Write a head as JSON, numbers exact, whole or not at all."""
    write_text(path, _head_text(head))


def load_head(path: str | Path) -> ConfidenceHead:
    """Read and check a head; ValueError in one line that names the field."""
    content = read_json(path)
    if not isinstance(content, dict) or content.pop("format", None) != FORMAT:
        raise ValueError(f"{path} is not a confidence head: its format is not {FORMAT!r}")
    return validated(ConfidenceHead, content, f"{path} is not a confidence head")
