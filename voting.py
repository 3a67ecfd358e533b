"""Answers become votes: how they are asked for, when there are enough, and what a vote share says.

    Sampling(samples=10, adaptive=True)                  # how many, at which temperature, in which wordings
    count_votes(answers, task)                           # ({"negative": 1, "positive": 8}, 1 unparsed)
    next_numbers(answers, task, most, adaptive)          # the answers to ask for next
    record(identity, votes, unparsed, ...)               # the row of a predictions file

A vote share is a mean of draws. `first_token_draws` draws from a known distribution, `converge` and
`convergence_table` show how the share approaches the probability. Nothing here needs a model.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

import numpy as np

import predictions
from answers import is_cut_thought, parse_answer, parser_of
from command_line import columns
from predictions import Prediction
from tables import Example
from task import Task

SAFE = 0.95  # asking adaptively ends when the leader is this sure to be the majority
FIRST = 4  # answers that the first round asks for: the fewest that can be this sure
NO_ANSWERS = "stores no answers; only those of consistency_confidence.py can be recounted"


# How answers are asked for


@dataclass(frozen=True)
class Sampling:
    """How answers are drawn and how many; ValueError for what cannot be."""

    samples: int = 10
    temperature: float = 1.0
    adaptive: bool = False
    paraphrase: bool = False
    max_tokens: int = 10
    choice: bool = False
    first_token: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if self.samples < 2:
            raise ValueError(f"{self.samples} samples: the vote share of one is no confidence; ask at least twice")
        if not 0 < self.temperature <= 100:
            raise ValueError(
                f"the temperature is {self.temperature:g}; at 0 all answers are the same and agree about nothing, "
                "so it must be above 0 (and at most 100)"
            )
        if self.max_tokens < 1:
            raise ValueError(f"an answer of {self.max_tokens} tokens names no label")

    def wordings(self, task: Task) -> tuple[Task, ...]:
        """The task in each wording that is asked."""
        if not self.paraphrase:
            return (task,)
        if not task.paraphrases:
            raise ValueError(f"task {task.name!r} has one wording only; give it paraphrases = [...], other templates")
        return tuple(task.wordings())

    def fingerprint(self, identity: Mapping, task: Task, sent: Mapping, truncate: bool = False) -> str:
        """The fingerprint of the predictions; `sent` is what the model is really given of these settings."""
        templates = [wording.template for wording in self.wordings(task)]
        settings = asdict(self) | {"wordings": templates, "sent": sent, **parser_of(task)}
        if truncate:
            settings["truncate"] = True
        return predictions.fingerprint(**identity, task=task.settings(), method="consistency", settings=settings)

    def next_numbers(self, answers: Sequence[str], task: Task) -> range:
        """The numbers of the answers to ask for next; none when there are enough."""
        return next_numbers(answers, task, self.samples, self.adaptive)

    def seed_of(self, row: Example | Prediction, number: int) -> int:
        """The seed of a row's answer."""
        return answer_seed(self.seed, row.id, row.text, number)

    @property
    def calls(self) -> tuple[int, int]:
        """How many answers a text takes, at least and at most."""
        return min(FIRST, self.samples) if self.adaptive else self.samples, self.samples

    def options(self, task: Task) -> dict:
        """What is asked of a server, as keyword arguments of `Endpoint.sample`."""
        choice = [word for words in task.labels.values() for word in words] if self.choice else ()
        return {"temperature": self.temperature, "max_tokens": self.max_tokens, "choice": choice}


def answer_seed(seed: int, id: str, text: str, number: int) -> int:
    """The same for the same id and text, whatever is around. 31 bits, which all servers take."""
    key = f"{seed}\0{id}\0{text}\0{number}".encode(errors="surrogatepass")
    return int.from_bytes(hashlib.sha256(key).digest()[:4]) >> 1


# Votes


def count_votes(answers: Sequence[str], task: Task) -> tuple[dict[str, int], int]:
    """(votes of each label, unparsed answers)."""
    counts = Counter(parse_answer(answer, task) for answer in answers)
    return {label: counts[label] for label in task.labels}, counts[None]


def thoughts_note(answers: Sequence[str]) -> str:
    """What to say of answers that end inside a thought; empty without any."""
    cut = sum(map(is_cut_thought, answers))
    return f"{cut:,} of {len(answers):,} answers end inside a thought; --max-tokens gives them more room" if cut else ""


def decided(votes: Sequence[int], left: int) -> bool:
    """Whether more answers, `left` at most, are not worth their cost: the leader is safe or cannot be overtaken.

    Safe: 1 - I_1/2(v1 + 1, v2 + 1) > 0.95, of the two most frequent labels' votes, I the regularised incomplete beta
    function (Aggarwal et al., "Let's sample step by step", EMNLP 2023, arXiv 2305.11860).
    """
    from scipy.special import betainc

    second, first = sorted(votes)[-2:]
    return first > second + left or 1 - betainc(first + 1, second + 1, 0.5) > SAFE


def next_numbers(answers: Sequence[str], task: Task, most: int, adaptive: bool) -> range:
    """The numbers of the answers to ask for next, `most` in all; none when there are enough."""
    asked = len(answers)
    if not adaptive:
        return range(asked, most)
    if asked == 0:
        return range(min(FIRST, most))
    votes, _ = count_votes(answers, task)
    if asked >= most or decided([*votes.values()], most - asked):
        return range(0)
    return range(asked, asked + 1)


def jeffreys_interval(k: int, n: int) -> tuple[float, float]:
    """The equal-tailed 95 % interval of a share, k of n, under Jeffreys' prior: Beta(k + 1/2, n - k + 1/2).

    0 of n begins at 0 and n of n ends at 1 (Brown, Cai and DasGupta, "Interval estimation for a binomial proportion",
    Statistical Science 2001).
    """
    from scipy.stats import beta

    tail = (1 - 0.95) / 2  # 0.025 is recorded in this very rounding
    low, high = beta.ppf([tail, 1 - tail], k + 0.5, n - k + 0.5).tolist()
    return 0.0 if k == 0 else low, 1.0 if k == n else high


def record(
    identity: tuple[str, str, str | None],
    votes: dict[str, int],
    unparsed: int,
    extras: Mapping[str, object],
    adaptive: bool,
    **common: str,
) -> Prediction:
    """The prediction of a row that was asked, by most votes, of equals the label listed first; an error without any.

    `agreement`, the vote share of the winner, is near a tie too high on average. It has its interval only where the
    number of answers was fixed: stopping at a lead makes it look larger still. `vote_entropy` is in nats, over the
    labels and "unparsed".
    """
    parsed, first = sum(votes.values()), max(votes.values())
    n = parsed + unparsed
    shares = np.array([count / n for count in (*votes.values(), unparsed) if count])
    low, high = (None, None) if adaptive else jeffreys_interval(first, n)
    counted = {
        "votes": votes,
        "unparsed": unparsed,
        "calls": n,
        "agreement": first / n if parsed else None,
        "agreement_low": low if parsed else None,
        "agreement_high": high if parsed else None,
        "vote_entropy": float(-(shares * np.log(shares)).sum()) + 0.0,
    }
    extras = counted | extras
    if not parsed:
        shown = f", as {extras['answers'][0][:40]!r}" if extras.get("answers") else ""
        note = thoughts_note(extras.get("answers", ()))
        error = f"none of {unparsed} answers names a label{shown}" + (f"; {note}" if note else "")
        return predictions.failed(*identity, error, **common, extras=extras)
    by_label = {label: count / parsed for label, count in votes.items()}
    return predictions.scored(*identity, by_label, parsed / n, **common, extras=extras)


def recounted(row: Prediction, task: Task, samples: int | None, adaptive: bool, fingerprint: str) -> Prediction:
    """A row with its stored answers counted again; one that was never asked keeps its error."""
    identity = row.id, row.text, row.label
    common = {"method": "consistency", "model": row.model, "task": task.name, "fingerprint": fingerprint}
    answers = row.extras.get("answers")
    if answers is None and row.error is not None:
        return predictions.failed(*identity, row.error, **common)
    if not isinstance(answers, list) or not answers or not all(isinstance(answer, str) for answer in answers):
        raise ValueError(f"row {row.id!r} {NO_ANSWERS}")
    was_adaptive = row.extras.get("agreement") is not None and row.extras.get("agreement_low") is None
    if samples and len(answers) < samples and not was_adaptive:
        raise ValueError(f"row {row.id!r} has {len(answers)} answers; more than these only a model can give")
    answers = answers[:samples]
    if adaptive:
        answers = answers[: calls_needed(answers, task)]
    extras = {"sampling": row.extras.get("sampling"), "answers": answers}
    return record(identity, *count_votes(answers, task), extras, adaptive or was_adaptive, **common)


def calls_needed(answers: Sequence[str], task: Task) -> int:
    """How many of these answers --adaptive would have asked for."""
    count = min(FIRST, len(answers))
    while next_numbers(answers[:count], task, len(answers), adaptive=True):
        count += 1
    return count


# Draws from a known distribution


def first_token_draws(masses: np.ndarray, seed: int, n: int) -> np.ndarray:
    """Numbers of the labels that n draws name, in turn by each wording's P(label) [wordings, labels]; int [n].

    The number after the last label is every other token. The first of n draws are those of fewer draws.
    """
    points, ends = np.random.default_rng(seed).random(n), np.cumsum(masses, axis=1)
    return (points[:, None] >= ends[np.arange(n) % len(masses)]).sum(axis=1)


def converge(by_label: np.ndarray, seeds: Sequence[int], sizes: Sequence[int]) -> dict[int, np.ndarray]:
    """For each number of draws [rows, 2]: P of each row's most probable label, and its share of so many draws.

    `by_label` is P(label) [rows, labels], of which every row is drawn from with its own seed.
    """
    winners = by_label.argmax(axis=1)
    drawn = [first_token_draws(row[None], seed, max(sizes)) for row, seed in zip(by_label, seeds, strict=True)]
    is_winner = np.array(drawn) == winners[:, None]
    return {size: np.column_stack([by_label.max(axis=1), is_winner[:, :size].mean(axis=1)]) for size in sizes}


def convergence_table(pairs: Mapping[int, np.ndarray]) -> str:
    """Of what `converge` gives: root mean square distance of share and P, beside sqrt(mean P (1 - P) / draws).

    The last column is where 95 % of simulated binomial draws of these very probabilities have that distance.
    """
    lines = [["draws", "measured", "binomial", "95 % of binomial draws"]]
    simulated = np.random.default_rng(0)
    for draws, found in pairs.items():
        p, share = found.T
        measured, binomial = np.sqrt(np.mean((share - p) ** 2)), np.sqrt(np.mean(p * (1 - p)) / draws)
        shares = simulated.binomial(draws, p, (1000, len(p))) / draws
        low, high = np.quantile(np.sqrt(np.mean((shares - p) ** 2, axis=1)), [0.025, 0.975])
        lines.append([f"{draws:,}", f"{measured:.4f}", f"{binomial:.4f}", f"{low:.4f} to {high:.4f}"])
    title = "  distance of the vote share from the first token's probability (root mean square, n = "
    return f"{title}{len(p):,} rows):\n" + columns(lines, "    ")
