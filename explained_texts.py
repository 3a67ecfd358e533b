"""What two models say of the same texts: the explanations of Method 1, read again and put side by side.

logprobs_confidence.py --json TEXT ... > base.jsonl        # an object a line, a line a text
side_by_side(read_pairs(["base.jsonl", "tuned.jsonl"], ("base", "fine-tuned"))[0])
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest

import files
import tables
from command_line import columns, printable
from predictions import Prediction

TOUR = (  # the texts that main.py explains by default, which are recorded
    "I absolutely love this amazing movie!",
    "This film is terrible and boring",
    "The acting is superb, the story is dull",
    "Not bad",
    "Best worst thing ever",
    "The train leaves at noon",
)
SHOWN_TOKENS = 12
MOST_LABELS = 8  # that are shown of a text


@dataclass(frozen=True)
class ExplainedToken:
    """One of the most probable first tokens."""

    token: str
    logprob: float
    label: str | None


@dataclass(frozen=True)
class ExplainedText:
    """The fields of an explanation that are compared and shown."""

    text: str
    prompt: str
    fingerprint: str
    top_tokens: list[ExplainedToken]
    probabilities: dict[str, float]
    label_mass: float
    prediction: str
    confidence: float
    label_mass_high: float = 0.0
    missing: Sequence[str] = ()  # labels that a server did not list: they count with the most they can have

    def __post_init__(self) -> None:
        shares = [*self.probabilities.values(), self.label_mass, self.label_mass_high, self.confidence]
        if not all(0 <= share <= 1 + 1e-6 for share in shares):
            raise ValueError("a probability is outside [0, 1]")
        if not all(entry.logprob <= 1e-6 for entry in self.top_tokens):
            raise ValueError("a logprob is above 0")

    def record(self) -> dict:
        """What is shown, as it stands in a report."""
        shared = self.label_mass_high or self.label_mass  # what a server does not list counts too
        tokens = self.top_tokens[:SHOWN_TOKENS]
        return {
            "tokens": [{"token": t.token, "probability": math.exp(t.logprob), "label": t.label} for t in tokens],
            "total_probabilities": {label: p * shared for label, p in self.probabilities.items()},
            "label_mass": self.label_mass,
            "prediction": self.prediction,
            "confidence": self.confidence,
        }


def read(path: str) -> Iterator[ExplainedText]:
    """Yield the explanations of a file; ValueErrors name file and line."""
    for where, row in tables.read_rows(path):
        yield files.validated(ExplainedText, row, f"{where} is not what logprobs_confidence.py --json prints")


def read_pairs(paths: Sequence[str], names: Sequence[str], models: Sequence[Prediction]) -> list[dict]:
    """Of each text what both models say, by their names; ValueErrors name file and line.

    `models`: a prediction by either model; its explanations must be by the same model, task and settings.
    """
    found = []
    for line, both in enumerate(zip_longest(*map(read, paths)), 1):
        if None in both or (both[0].text, both[0].prompt) != (both[1].text, both[1].prompt):
            raise ValueError(f"{paths[0]} and {paths[1]} are not of the same texts and prompt: line {line} differs")
        for path, said, model in zip(paths, both, models, strict=True):
            is_other = model.method == "logprobs" and said.fingerprint != model.fingerprint
            if is_other or [*said.probabilities] != [*model.probabilities]:
                raise ValueError(
                    f"{path} line {line} has the fingerprint {said.fingerprint} and the labels "
                    f"{', '.join(said.probabilities)}; the predictions have {model.fingerprint} and "
                    f"{', '.join(model.probabilities)}: another model, task or setting"
                )
        found.append({"text": both[0].text} | {name: said.record() for name, said in zip(names, both, strict=True)})
    if not found:
        raise ValueError(f"{paths[0]} and {paths[1]} hold no texts")
    return found


def most_probable(probabilities: Mapping[str, float]) -> list[str]:
    """The labels to show: of few all, in their order, of many the most probable first."""
    ranked = sorted(probabilities, key=lambda label: -probabilities[label])
    return list(probabilities) if len(ranked) <= MOST_LABELS else ranked[:MOST_LABELS]


def side_by_side(found: Mapping, names: Sequence[str]) -> str:
    """The most probable first tokens of both models, then the sums and the verdicts."""
    said = [found[name] for name in names]
    rows = [["rank"]]
    for name in names:
        rows[0] += [name, "percent", "counts for"]
    for rank, both in enumerate(zip_longest(*(each["tokens"] for each in said)), 1):
        rows.append([str(rank)])
        for token in both:
            cells = [f'"{token["token"]}"', f"{token['probability']:.2%}", token["label"] or ""] if token else [""] * 3
            rows[-1] += cells
    sums = [["", *names]]
    most = {label: max(each["total_probabilities"][label] for each in said) for label in said[0]["total_probabilities"]}
    for label in most_probable(most):
        sums.append([f"P({label})", *(f"{each['total_probabilities'][label]:.2%}" for each in said)])
    sums.append(["label mass", *(f"{each['label_mass']:.2%}" for each in said)])
    sums.append(["verdict", *(f"{each['prediction']} {each['confidence']:.2%}" for each in said)])
    return f"Text: {printable(found['text'])}\n\n{columns(rows, '  ')}\n\n{columns(sums, '  ')}"
