"""Method 2, consistency: ask the model several times, let the answers vote, and see how far they agree.

    agreement = answers that name the winning label / answers asked for;   10 of 10 still means 78 % to 100 %

    python consistency_confidence.py "I absolutely love this amazing movie!" "Not bad"
    python consistency_confidence.py --paraphrase "Best worst thing ever"         # two answers to each of five wordings
    python consistency_confidence.py --input reviews.csv --output consistency.jsonl --adaptive
    python consistency_confidence.py --endpoint anthropic --model claude-haiku-4-5 --task sentiment-yes-no "Not bad"
    python consistency_confidence.py --recount consistency.jsonl --samples 5 --output five.jsonl
    python consistency_confidence.py --first-token --samples 10,100,1000 --input data:test --output draws.jsonl

It works for every model that answers, also for those that hide their probabilities. Answers are sampled at
temperature 1 from the whole distribution. One is read by its answer words, whatever its case and punctuation; "not
positive" is not positive, and what names no label, or several, is `unparsed` and stays in the denominator:

    agreement = confidence x label_mass,   confidence = votes / parsed answers,   label_mass = parsed / all answers

The answers are stored, so --recount can vote again, over fewer of them or with --adaptive, without the model.
For a one-word answer to one question agreement is only an estimate of its probability: --first-token draws answers
from the first-token distribution itself and shows how agreement approaches it. Asking in several wordings
(--paraphrase) or a model that reasons before it answers is what makes agreement say more.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

import command_line
import endpoint
import predictions
import scoring
import task as tasks
from endpoint import Endpoint, PassingError
from llama import Llama, default_llama, load_reader, model_arguments
from llama import add_arguments as add_model_arguments
from predictions import Prediction
from task import Example, Task

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from calibration import FittedCalibrator

SAFE = 0.95  # --adaptive stops when the leader is this sure to be the majority
FIRST = 4  # answers that the first round asks for: the fewest that can be this sure
PARSER = 1  # raised when `parse_answer` changes, so that fingerprints differ
ROWS_PER_WINDOW = {"cpu": 256, "mps": 512, "cuda": 1024}


@dataclass(frozen=True)
class Sampling:
    """How answers are drawn and how many."""

    samples: int = 10
    temperature: float = 1.0
    adaptive: bool = False
    paraphrase: bool = False
    max_tokens: int = 10
    choice: bool = False
    first_token: bool = False
    seed: int = 0


@dataclass(frozen=True)
class Sampler:
    """A model, a task and how to sample: the question in each wording, what is really sent, the fingerprint."""

    model: Llama | Endpoint
    task: Task
    sampling: Sampling
    wordings: tuple[Task, ...]
    questions: tuple  # of a loaded model frames, of a server functions from a text to a prompt
    sent: dict
    fingerprint: str
    truncate: bool = False

    @property
    def common(self) -> dict:
        """What all its records say."""
        names = {"method": "consistency", "model": self.model.name, "task": self.task.name}
        return names | {"fingerprint": self.fingerprint}

    def seed(self, example: Example, number: int) -> int:
        """Of one answer: the same for the same id and text, whatever is around. 31 bits, which all servers take."""
        key = f"{self.sampling.seed}\0{example.id}\0{example.text}\0{number}".encode(errors="surrogatepass")
        return int.from_bytes(hashlib.sha256(key).digest()[:4]) >> 1


def prepare(llama: Llama, task: Task, sampling: Sampling, truncate: bool = False) -> Sampler:
    """Join a loaded model, a task and how to sample; ValueError when the task does not work with this model."""
    wordings = _wordings(task, sampling)
    frames = tuple(llama.task_prompt(wording) for wording in wordings)
    if sampling.max_tokens >= (llama.context_length or sys.maxsize):
        raise ValueError(f"--max-tokens {sampling.max_tokens} leaves no room: the model reads {llama.context_length}")
    sent = {"temperature": sampling.temperature}
    fingerprint = _fingerprint(llama.identity, task, sampling, wordings, sent, truncate=truncate)
    return Sampler(llama, task, sampling, wordings, frames, sent, fingerprint, truncate)


def prepare_remote(server: Endpoint, task: Task, sampling: Sampling) -> Sampler:
    """Join a server, a task and how to sample, with one request to see which parameters its API accepts."""
    wordings = _wordings(task, sampling)
    questions = tuple(server.question(wording) for wording in wordings)
    answer = server.probe(lambda: server.sample(questions[0]("A text."), 0, **_options(task, sampling)))
    if sampling.choice and parse_answer(answer, task) is None:
        raise ValueError(f"{server.name} ignores --choice: asked to choose a label, it answered {answer!r}")
    sent = server.sent(temperature=sampling.temperature) | ({"choice": True} if sampling.choice else {})
    fingerprint = _fingerprint(server.identity, task, sampling, wordings, sent)
    return Sampler(server, task, sampling, wordings, questions, sent, fingerprint)


def _wordings(task: Task, sampling: Sampling) -> tuple[Task, ...]:
    """The task in each wording that is asked."""
    if sampling.paraphrase and not task.paraphrases:
        raise ValueError(f"task {task.name!r} has one wording only; give it paraphrases = [...], other templates")
    return tuple(task.wordings()) if sampling.paraphrase else (task,)


def _fingerprint(
    identity: dict, task: Task, sampling: Sampling, wordings: Sequence[Task], sent: dict, **more: object
) -> str:
    settings = asdict(sampling) | {"wordings": [wording.template for wording in wordings], "sent": sent}
    settings |= {"parser": PARSER} | {name: value for name, value in more.items() if value}
    return predictions.fingerprint(**identity, task=task.settings(), method="consistency", settings=settings)


def get_consistency_confidence(
    text: str,
    num_samples: int = 10,
    temperature: float = 1.0,
    llama: Llama | None = None,
    task: Task | None = None,
    seed: int = 0,
) -> tuple[str, float, dict[str, int]]:
    """(label most answers name, its agreement in [0, 1], votes of each label and "unparsed") for one text.

    By default the embedded model and task `sentiment`. Raises ValueError for an empty text, fewer than two samples,
    a temperature not above 0, and when no answer names a label.
    """
    task = task or tasks.TASKS["sentiment"]
    sampling = checked(Sampling(num_samples, temperature, seed=seed))
    row = explain(text, prepare(llama or default_llama(json.dumps(task.settings())), task, sampling))
    return row["prediction"], row["agreement"], row["votes"] | {"unparsed": row["unparsed"]}


def checked(sampling: Sampling) -> Sampling:
    """The same, or a ValueError that says what is wrong with it."""
    if sampling.samples < 2:
        raise ValueError(f"{sampling.samples} samples: agreement of one is no confidence; ask at least twice")
    if not 0 < sampling.temperature <= 100:
        raise ValueError(
            f"the temperature is {sampling.temperature:g}; at 0 all answers are the same and agree about nothing, "
            "so it must be above 0 (and at most 100)"
        )
    if sampling.max_tokens < 1:
        raise ValueError(f"an answer of {sampling.max_tokens} tokens names no label")
    return sampling


# From an answer to a label

NEGATION = re.compile(
    r"not|no|non|never|neither|nor|none|nothing|nobody|without|hardly|barely|cannot|\w+n['\u2019]t"
    r"|(?:is|are|was|were|do|does|did|has|have|had|could|would|should|ca|wo)nt"
)
WORD = re.compile(r"[^\W_]+(?:['\u2019_][^\W_]+)*[+#]*")  # also "c++"
CLAUSE_END = re.compile(r"[.,;:!()/|\n\u2014\u2026]|\b(?:but|yet)\b")
OUTER = " \t\r\n.,;:!*\"'`()[]"


def parse_answer(answer: str, task: Task) -> str | None:
    """The one label that an answer names by its answer words, or None.

    Case and punctuation do not count. A word after a negation in its clause does not name its label ("not positive",
    "it isn't really positive"), and an answer word that is a negation itself answers only at the end of a clause: "No."
    and not "No idea". An answer that denies something else is None, unless its first clause is an answer word and no
    more ("No, it is not."). An answer that names two labels is None.
    """
    if label := task.label_of(answer) or task.label_of(answer.strip(OUTER)):
        return label
    clauses = [words for clause in CLAUSE_END.split(answer.casefold()) if (words := WORD.findall(clause))]
    named, astray = set(), False
    for words in clauses:
        denied = pending = False
        spelled = list(_spelled(words, task))
        for number, (word, label) in enumerate(spelled, 1):
            denies = NEGATION.fullmatch(word)
            if label is not None and not (denies and number < len(spelled)):
                named |= set() if denied else {label}
                pending = False
            elif denies:
                denied = pending = True
        astray |= pending  # a negation of something that is no answer word
    if len(named) != 1 or (astray and not task.label_of(" ".join(clauses[0]))):
        return None
    return named.pop()


def _spelled(words: Sequence[str], task: Task) -> Iterator[tuple[str, str | None]]:
    """The words of a clause, those that spell an answer word (the longest that fits) as one with its label."""
    longest = max(len(WORD.findall(word)) for words in task.labels.values() for word in words)
    at = 0
    while at < len(words):
        phrases = (words[at : at + size] for size in range(longest, 0, -1))
        found = next(((phrase, label) for phrase in phrases if (label := task.label_of(" ".join(phrase)))), None)
        phrase, label = found or (words[at : at + 1], None)
        yield " ".join(phrase), label
        at += len(phrase)


# Votes


def vote(answers: Sequence[str], task: Task) -> tuple[dict[str, int], int]:
    """(votes of each label, unparsed answers)."""
    counts = Counter(parse_answer(answer, task) for answer in answers)
    return {label: counts[label] for label in task.labels}, counts[None]


def decided(votes: Sequence[int], left: int) -> bool:
    """Whether more answers, `left` at most, are not worth their cost: the leader is safe or cannot be overtaken.

    Safe: 1 - I_1/2(v1 + 1, v2 + 1) > 0.95, of the two most frequent labels' votes, I the regularised incomplete beta
    function (Aggarwal et al., "Let's sample step by step", EMNLP 2023, arXiv 2305.11860).
    """
    from scipy.special import betainc

    second, first = sorted(votes)[-2:]
    return first > second + left or 1 - betainc(first + 1, second + 1, 0.5) > SAFE


def next_numbers(answers: Sequence[str], task: Task, sampling: Sampling) -> range:
    """The numbers of the answers to ask for next; none when there are enough."""
    asked, wanted = len(answers), sampling.samples
    if not sampling.adaptive:
        return range(asked, wanted)
    if not asked:
        return range(min(FIRST, wanted))
    enough = asked >= wanted or decided([*vote(answers, task)[0].values()], wanted - asked)
    return range(asked, asked if enough else asked + 1)


def jeffreys_interval(k: int, n: int, level: float = 0.95) -> tuple[float, float]:
    """The equal-tailed interval of a share, k of n, under Jeffreys' prior: Beta(k + 1/2, n - k + 1/2).

    0 of n begins at 0 and n of n ends at 1 (Brown, Cai and DasGupta, "Interval estimation for a binomial proportion",
    Statistical Science 2001).
    """
    from scipy.stats import beta

    tail = (1 - level) / 2
    low, high = beta.ppf([tail, 1 - tail], k + 0.5, n - k + 0.5).tolist()
    return 0.0 if k == 0 else low, 1.0 if k == n else high


def tally(votes: dict[str, int], unparsed: int, adaptive: bool) -> dict:
    """The fields that votes give a record; the label with most votes leads, of equals the one listed first.

    `agreement` is the winner's, so near a tie it leans upward. It has its interval only where the number of answers was
    fixed: stopping at a lead makes it look larger still.
    `vote_entropy` is in nats, over the labels and "unparsed".
    """
    n, first = sum(votes.values()) + unparsed, max(votes.values())
    shares = np.array([count / n for count in (*votes.values(), unparsed) if count])
    low, high = (None, None) if adaptive else jeffreys_interval(first, n)
    return {
        "votes": votes,
        "unparsed": unparsed,
        "calls": n,
        "agreement": first / n,
        "agreement_low": low,
        "agreement_high": high,
        "vote_entropy": float(-(shares * np.log(shares)).sum()) + 0.0,
    }


def record(
    identity: tuple[str, str, str | None],
    votes: dict[str, int],
    unparsed: int,
    extras: dict,
    adaptive: bool,
    **common: str,
) -> Prediction:
    """The prediction of a row that was asked; an error when no answer names a label."""
    extras = tally(votes, unparsed, adaptive) | extras
    parsed = sum(votes.values())
    if not parsed:
        extras |= dict.fromkeys(("agreement", "agreement_low", "agreement_high"))
        shown = f", as {extras['answers'][0][:40]!r}" if extras.get("answers") else ""
        message = f"none of {unparsed} answers names a label{shown}"
        return predictions.failed(*identity, message, **common, extras=extras)
    shares = {label: count / parsed for label, count in votes.items()}
    return predictions.scored(*identity, shares, parsed / (parsed + unparsed), **common, extras=extras)


# Asking


def sample_window(examples: Sequence[Example], sampler: Sampler, batch_size: int | None = None) -> list[Prediction]:
    """Ask a loaded model about examples together, in rounds until each has answers enough."""
    llama, task, sampling = sampler.model, sampler.task, sampler.sampling
    answers: list[list[str]] = [[] for _ in examples]
    prompts, extras, errors = [], [], {}
    for i, example in enumerate(examples):
        try:
            encoded = _encoded(example, sampler, sampling.max_tokens)
        except ValueError as error:
            encoded, errors[i] = ([], {}), str(error)
        prompts.append(encoded[0])
        extras.append(encoded[1])
    going = [i for i in range(len(examples)) if i not in errors]
    while wanted := {i: numbers for i in going if (numbers := next_numbers(answers[i], task, sampling))}:
        found: dict[int, dict[int, str]] = {i: {} for i in wanted}
        for w in range(len(sampler.questions)):
            asked = {
                i: of_w
                for i, numbers in wanted.items()
                if (of_w := [n for n in numbers if n % len(sampler.questions) == w])
            }
            seeds = [[sampler.seed(examples[i], n) for n in numbers] for i, numbers in asked.items()]
            rows = [prompts[i][w] for i in asked]
            drawn = (
                llama.sample(rows, seeds, sampling.temperature, sampling.max_tokens, _stop(task), batch_size)
                if rows
                else []
            )
            for (i, numbers), texts in zip(asked.items(), drawn, strict=True):
                found[i] |= dict(zip(numbers, texts, strict=True))
        for i, by_number in found.items():
            answers[i] += [by_number[n] for n in sorted(by_number)]
        going = list(wanted)
    return [
        predictions.failed(*task.identify(example), errors[i], **sampler.common)
        if i in errors
        else _answered(example, answers[i], sampler, extras[i])
        for i, example in enumerate(examples)
    ]


def _encoded(example: Example, sampler: Sampler, room: int) -> tuple[list[list[int]], dict]:
    """The prompt's ids in each wording, and a mark if they show less than the text; ValueError if it cannot be put."""
    encoded = [sampler.model.encode_within(frame, example.text, room, sampler.truncate) for frame in sampler.questions]
    cut = any(shown != example.text for _, shown in encoded)
    return [ids for ids, _ in encoded], {"truncated": True} if cut else {}


def _answered(example: Example, answers: list[str], sampler: Sampler, extras: dict | None = None) -> Prediction:
    extras = {"sampling": sampler.sent, "answers": answers} | (extras or {})
    votes, unparsed = vote(answers, sampler.task)
    identity, adaptive = sampler.task.identify(example), sampler.sampling.adaptive
    return record(identity, votes, unparsed, extras, adaptive, **sampler.common)


def _stop(task: Task) -> str:
    """A completion would go on to the next text after its line; a chat ends by itself."""
    return "\n" if task.format == "completion" else ""


def _options(task: Task, sampling: Sampling) -> dict:
    choice = [word for words in task.labels.values() for word in words] if sampling.choice else ()
    return {"temperature": sampling.temperature, "max_tokens": sampling.max_tokens, "choice": choice}


async def sample_remote(example: Example, sampler: Sampler) -> Prediction:
    """Ask a server about one example, its answers at the same time; any answer that fails is the row's error."""
    server, task, sampling = sampler.model, sampler.task, sampler.sampling
    options, answers = _options(task, sampling), []
    try:
        prompts = [ask(example.text) for ask in sampler.questions]
        while numbers := next_numbers(answers, task, sampling):
            calls = [server.sample(prompts[n % len(prompts)], sampler.seed(example, n), **options) for n in numbers]
            answers += await endpoint.all_of(calls)
    except ValueError as error:
        extras = {predictions.RETRY: True} if isinstance(error, PassingError) else {}
        return predictions.failed(*task.identify(example), str(error), **sampler.common, extras=extras)
    return _answered(example, answers, sampler)


def sample_rows(
    examples: Iterator[Example],
    advance: Callable[[int], None],
    sampler: Sampler,
    batch_size: int | None = None,
    size: int = 1,
) -> Iterator[Prediction]:
    """A prediction for each example, in order."""
    if isinstance(sampler.model, Endpoint):
        for row in sampler.model.in_order(partial(sample_remote, sampler=sampler), examples):
            advance(1)
            yield row
        return
    sample = draw_first_tokens if sampler.sampling.first_token else sample_window
    while window := list(islice(examples, size)):
        yield from sample(window, sampler, batch_size)
        advance(len(window))


# Draws from the first-token distribution


def draw_first_tokens(examples: Sequence[Example], sampler: Sampler, batch_size: int | None = None) -> list[Prediction]:
    """Votes drawn from each example's first-token distribution, computed once; no answer is generated."""
    llama, task = sampler.model, sampler.task
    answers_of = [
        tasks.find_answers(wording, llama.tokenizer, frame.render("text"))
        for wording, frame in zip(sampler.wordings, sampler.questions, strict=True)
    ]
    room = max(len(answer.ids) for answers in answers_of for answer in answers) - 1
    rows, errors = {}, {}
    for i, example in enumerate(examples):
        try:
            rows[i] = _encoded(example, sampler, room)
        except ValueError as error:
            errors[i] = str(error)
    total = np.empty((len(rows), len(sampler.questions), len(task.labels)))  # P(label), not divided by the label mass
    for w, answers in enumerate(answers_of):
        ids = [answer.ids for answer in answers]
        log_probs = llama.answer_log_probs([prompts[w] for prompts, _ in rows.values()], ids, batch_size)
        shares, mass = tasks.label_probabilities(log_probs, answers, list(task.labels))
        total[:, w] = np.nan_to_num(shares * mass[:, None])
    predicted, scored = [], iter(total)
    for i, example in enumerate(examples):
        if i in errors:
            predicted.append(predictions.failed(*task.identify(example), errors[i], **sampler.common))
            continue
        masses = next(scored)
        drawn = first_token_draws(masses, sampler.seed(example, 0), sampler.sampling.samples)
        *counts, unparsed = np.bincount(drawn, minlength=len(task.labels) + 1).tolist()
        by_label = dict(zip(task.labels, masses.mean(axis=0).tolist(), strict=True))
        extras = {"calls": len(masses), "sampling": sampler.sent, "first_token": by_label} | rows[i][1]
        votes = dict(zip(task.labels, counts, strict=True))
        predicted.append(record(task.identify(example), votes, unparsed, extras, False, **sampler.common))
    return predicted


def first_token_draws(masses: np.ndarray, seed: int, n: int) -> np.ndarray:
    """Numbers of the labels that n draws name, in turn by each wording's P(label) [wordings, labels]; int [n].

    The number after the last label is every other token. The first of n draws are those of fewer draws.
    """
    points, ends = np.random.default_rng(seed).random(n), np.cumsum(masses, axis=1)
    return (points[:, None] >= ends[np.arange(n) % len(masses)]).sum(axis=1)


def converge(path: Path, sizes: Sequence[int], task: Task, seed: Callable[[Prediction], int]) -> dict[int, np.ndarray]:
    """For each size [rows, 2]: P of each row's most probable label, and that label's share of so many draws.

    Empty when no text could be put to the model.
    """
    found: dict[int, list] = {size: [] for size in sizes}
    for row in predictions.iterate(path):
        if "first_token" in row.extras:
            by_label = [row.extras["first_token"][label] for label in task.labels]
            for size, share in agreement_by_draws(by_label, seed(row), sizes).items():
                found[size].append((max(by_label), share))
    return {size: np.array(pairs) for size, pairs in found.items() if pairs}


def agreement_by_draws(by_label: Sequence[float], seed: int, sizes: Sequence[int]) -> dict[int, float]:
    """For each size the share of so many draws from P(label) [labels] that name the most probable label."""
    drawn = first_token_draws(np.array([by_label]), seed, max(sizes)) == int(np.argmax(by_label))
    return {size: float(drawn[:size].mean()) for size in sizes}


def convergence_table(pairs: dict[int, np.ndarray]) -> str:
    """Root mean square distance of agreement from P at each size, beside sqrt(mean P (1 - P) / n).

    The last column is where 95 % of simulated binomial draws of these very probabilities have that distance.
    """
    lines = [["draws", "measured", "binomial", "95 % of binomial draws"]]
    simulated = np.random.default_rng(0)
    for size, (p, agreement) in ((size, found.T) for size, found in pairs.items()):
        measured, predicted = np.sqrt(np.mean((agreement - p) ** 2)), np.sqrt(np.mean(p * (1 - p)) / size)
        drawn = simulated.binomial(size, p, (1000, len(p))) / size
        low, high = np.quantile(np.sqrt(np.mean((drawn - p) ** 2, axis=1)), [0.025, 0.975])
        lines.append([f"{size:,}", f"{measured:.4f}", f"{predicted:.4f}", f"{low:.4f} to {high:.4f}"])
    rows = len(next(iter(pairs.values())))
    title = f"  distance of agreement from the first token's probability (root mean square, n = {rows:,} rows):\n"
    return title + command_line.columns(lines, "    ")


def draw_convergence(path: str | Path, pairs: dict[int, np.ndarray], what: str) -> None:
    """The figure of `convergence_table`, with each row's agreement against its probability."""
    import plotting

    n, columns = len(next(iter(pairs.values()))), 2
    caption = (
        f"{what}, n = {n:,} rows, nothing fitted. A dot is a text: the probability of its most probable label against "
        "that label's share of so many draws from the same first-token distribution, seeded by its id and text; the "
        "band holds 95 % of binomial draws. Last: the root mean square distance, and what the binomial distribution "
        "predicts."
    )
    with plotting.figure(path, caption, rows=-(-(len(pairs) + 1) // columns), columns=columns, height=3.1) as axes:
        axes = axes.ravel()
        for axis, (size, (p, agreement)) in zip(axes, ((s, found.T) for s, found in pairs.items()), strict=False):
            plot_agreement(axis, size, p, agreement)
        plot_distance(axes[len(pairs)], pairs)
        for axis in axes[len(pairs) + 1 :]:
            axis.set_visible(False)


def plot_agreement(axis: Axes, size: int, p: np.ndarray, agreement: np.ndarray) -> None:
    """Each row's share of so many draws against its probability, over the band of binomial draws."""
    from scipy.stats import binom

    import plotting

    grid = np.linspace(max(0, p.min() - 0.03), 1, 401)
    low, high = (binom.ppf(q, size, grid) / size for q in (0.025, 0.975))
    axis.fill_between(grid, low, high, color=plotting.SKY, alpha=0.35, linewidth=0)
    axis.plot(grid, grid, color=plotting.GREY, linewidth=1, linestyle="--")
    axis.scatter(p, agreement, s=3, marker="s", color=plotting.BLUE, alpha=0.6, linewidth=0, antialiased=False)
    axis.set(title=f"{size:,} draws", xlabel="probability", ylabel="agreement", xlim=(grid[0], 1.01), ylim=(0, 1.04))
    plotting.percent(axis)


def plot_distance(axis: Axes, pairs: dict[int, np.ndarray]) -> None:
    """How far agreement is from the probability, by the number of draws, and what the binomial predicts."""
    from matplotlib.ticker import FuncFormatter, LogLocator

    import plotting

    sizes, p = np.array(list(pairs)), next(iter(pairs.values()))[:, 0]
    measured = [np.sqrt(np.mean((found[:, 1] - found[:, 0]) ** 2)) for found in pairs.values()]
    many = np.geomspace(sizes.min(), sizes.max(), 50)
    axis.plot(many, np.sqrt(np.mean(p * (1 - p)) / many), color=plotting.GREY, label="binomial")
    axis.plot(sizes, measured, "o", color=plotting.RED, label="measured")
    axis.set(title="Distance", xlabel="draws", ylabel="root mean square", xscale="log", yscale="log")
    axis.set_xticks(sizes, [f"{size:,}" for size in sizes])
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.minorticks_off()
    axis.legend()


# One text, explained


def explain(text: str, sampler: Sampler) -> dict:
    """Ask about one text and show the answers, for JSON; ValueError when none of them names a label."""
    example, is_remote = Example("", text, None), isinstance(sampler.model, Endpoint)
    (row,) = sample_rows(iter([example]), lambda n: None, sampler)
    if row.error:
        raise ValueError(row.error)
    extras = dict(row.extras)
    answers = [
        {"answer": answer, "label": parse_answer(answer, sampler.task), "wording": number % len(sampler.questions)}
        for number, answer in enumerate(extras.pop("answers", []))
    ]
    return {
        "text": text,
        "prompts": _rendered(example, sampler),
        "model": row.model,
        "model_path": None if is_remote else str(sampler.model.path),
        "answers": answers,
        **extras,
        "probabilities": row.probabilities,
        "label_mass": row.label_mass,
        "total_probability": row.confidence * row.label_mass,
        "prediction": row.prediction,
        "confidence": row.confidence,
        "fingerprint": row.fingerprint,
    }


def _rendered(example: Example, sampler: Sampler) -> list:
    """The prompt in each wording, as the model reads it."""
    if not isinstance(sampler.model, Endpoint):
        room = 0 if sampler.sampling.first_token else sampler.sampling.max_tokens
        shown = [sampler.model.encode_within(f, example.text, room, sampler.truncate)[1] for f in sampler.questions]
        return [frame.render(text) for frame, text in zip(sampler.questions, shown, strict=True)]
    if reader := sampler.model.reader:
        return [reader.task_prompt(wording).render(example.text) for wording in sampler.wordings]
    return [ask(example.text) for ask in sampler.questions]


def print_votes(row: dict) -> None:
    """The votes with the answers behind them."""
    lines = [["  answers", "label", "as"]]
    for label, count in [*row["votes"].items(), ("unparsed", row["unparsed"])]:
        said = Counter(a["answer"].strip() for a in row["answers"] if (a["label"] or "unparsed") == label)
        shown = ", ".join(f'"{answer}"' + (f" {times}" if times > 1 else "") for answer, times in said.most_common(4))
        lines.append([f"{count:9}", label, shown + (f" and {len(said) - 4} more" if len(said) > 4 else "")])
    width = max(len(label) for _, label, _ in lines)
    for count, label, shown in lines:
        print(f"{count}  {label:{width}}  {command_line.printable(shown)}".rstrip())


def print_explanation(row: dict) -> None:
    """The votes, how far they can be trusted, the verdict."""
    print(f"Text: {command_line.printable(row['text'])}\n")
    if "first_token" in row:
        parts = ", ".join(f"P({label}) {100 * p:.2f} %" for label, p in row["first_token"].items())
        print(f"  drawn from the first token's distribution: {parts}\n")
    print_votes(row)
    if "agreement_by_draws" in row:
        label, p = max(row["first_token"].items(), key=lambda pair: pair[1])
        shares = ", ".join(f"{100 * share:.1f} % of {n:,}" for n, share in row["agreement_by_draws"].items())
        print(f"\n  {label} in {shares} draws; its probability is {100 * p:.2f} %")
    n, interval = sum(row["votes"].values()) + row["unparsed"], ""
    if row["agreement_low"] is not None:
        interval = f"; 95 % Jeffreys interval {100 * row['agreement_low']:.1f} to {100 * row['agreement_high']:.1f} %"
    print(f"\n  Verdict: {row['prediction']}, agreement {100 * row['agreement']:.1f} %", end=" ")
    print(f"({row['votes'][row['prediction']]} of {n}{interval})")
    calls = "1 call" if row["calls"] == 1 else f"{row['calls']} calls"
    print(f"  confidence {100 * row['confidence']:.1f} % among the answers that name a label", end=", ")
    print(f"label mass {100 * row['label_mass']:.1f} %, vote entropy {row['vote_entropy']:.2f} nats, {calls}")
    scoring.print_decision(row)
    print()


# A table of texts


def report(path: Path) -> str:
    """What a predictions file of Method 2 holds: votes and calls beside the usual lines."""
    rows = [row for row in predictions.iterate(path) if "votes" in row.extras]  # also those without a single vote
    lines = [scoring.report(path)]
    if rows:
        agreement = np.array([row.extras["agreement"] or 0.0 for row in rows])
        n = sum(sum(row.extras["votes"].values()) + row.extras["unparsed"] for row in rows)
        unparsed, calls = (sum(row.extras[name] for row in rows) for name in ("unparsed", "calls"))
        lines.append(
            f"  mean agreement {agreement.mean():.3f}, unanimous in {np.mean(agreement == 1):.1%} of the rows; "
            f"{unparsed / n:.1%} of {n:,} answers unparsed; {calls:,} calls, {calls / len(rows):.1f} a row"
        )
        answers = [row.extras.get("answers", []) for row in rows]
        if len(rows) >= 20 and all(answers) and all(len(set(of_row)) == 1 for of_row in answers):
            lines.append("  warning: no row has two different answers; does this model really sample?")
    return "\n".join(lines)


def recount(
    args: argparse.Namespace, task: Task, sampling: Sampling, calibrator: FittedCalibrator | None = None
) -> None:
    """Vote again over the stored answers of a predictions file: without a model, over fewer of them, or adaptively."""
    source = predictions.read(args.recount)
    origin = source[0].fingerprint
    if source[0].task != task.name:
        raise ValueError(f"{args.recount} answers task {source[0].task!r}, not {task.name!r}; name it with --task")
    if not any("answers" in row.extras for row in source):
        raise ValueError(f"{args.recount} stores no answers; only those of consistency_confidence.py can be recounted")
    settings = {"samples": args.samples and sampling.samples, "adaptive": args.adaptive, "parser": PARSER}
    fingerprint = predictions.fingerprint(recounted=origin, task=task.settings(), settings=settings)
    if calibrator:
        calibrator.check(fingerprint, source[0].model, task.name, list(task.labels))
    sampling = replace(sampling, samples=settings["samples"] or 0)
    counted = [_recounted(row, task, sampling, fingerprint, origin) for row in source]  # all, or none is written
    predictions.write_table(
        Path(args.output),
        partial(iter, counted),
        lambda row: (row.id, row.text, row.label),
        lambda rows, advance: rows,
        fingerprint,
        len(counted),
        1,
        args.overwrite,
    )
    changed = sum(a.prediction != b.prediction for a, b in zip(source, counted, strict=True))
    before, after = (sum(len(row.extras.get("answers", ())) for row in rows) for rows in (source, counted))
    print(report(Path(args.output)))
    print(
        f"  recounted from {args.recount}: {after:,} of {before:,} answers used ({1 - after / before:.1%} saved); "
        f"{changed:,} of {len(source):,} predictions changed"
    )


def _recounted(row: Prediction, task: Task, sampling: Sampling, fingerprint: str, origin: str) -> Prediction:
    """A row with its stored answers counted again, up to `samples` of them (0: all), as --adaptive would have asked."""
    common = {"method": "consistency", "model": row.model, "task": task.name, "fingerprint": fingerprint}
    if row.fingerprint != origin:
        raise ValueError(f"row {row.id!r} is of another run than the first; recount one run at a time")
    answers = row.extras.get("answers")
    if answers is None and row.error is not None:
        return predictions.failed(row.id, row.text, row.label, row.error, **common)
    if not isinstance(answers, list) or not answers or not all(isinstance(answer, str) for answer in answers):
        raise ValueError(f"row {row.id!r} stores no answers; only those of consistency_confidence.py can be recounted")
    was_adaptive = row.extras.get("agreement") is not None and row.extras.get("agreement_low") is None
    if len(answers) < sampling.samples and not was_adaptive:
        raise ValueError(f"row {row.id!r} has {len(answers)} answers; more than these only a model can give")
    answers = answers[: sampling.samples or None]
    if sampling.adaptive:
        whole, sampling = answers, replace(sampling, samples=len(answers))
        answers = []
        while numbers := next_numbers(answers, task, sampling):
            answers = whole[: numbers[-1] + 1]
    votes, unparsed = vote(answers, task)
    extras = {"sampling": row.extras.get("sampling"), "answers": answers}
    adaptive = sampling.adaptive or was_adaptive
    return record((row.id, row.text, row.label), votes, unparsed, extras, adaptive, **common)


# Command line


def add_sampling_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags that say how answers are sampled; the same wherever Method 2 runs."""
    add = parser.add_argument_group("sampling").add_argument
    add("--samples", metavar="N", help="answers to each text (default: 10); with --first-token also 10,100,1000")
    add("--temperature", type=float, default=1.0, metavar="T", help="of the sampling, above 0 (default: 1)")
    add("--adaptive", action="store_true", help="stop asking when the leader is 95 %% safe or cannot be overtaken")
    add("--paraphrase", action="store_true", help="ask in the task's several wordings, in turn")
    add("--max-tokens", type=int, default=10, metavar="N", help="of an answer (default: 10)")
    add("--choice", action="store_true", help="have the server force an answer word (vLLM); hides all other answers")
    add("--seed", type=command_line.natural, default=0, metavar="N", help="of the sampling (default: 0)")


def sampling_from(parser: argparse.ArgumentParser, args: argparse.Namespace) -> tuple[Sampling, list[int]]:
    """How the flags say to sample, and the sizes that --samples names."""
    try:
        sizes = sorted({int(part) for part in (args.samples or "10").split(",")})
    except ValueError:
        parser.error(f"--samples {args.samples}: a number, or with --first-token several, as 10,100,1000")
    names = ("temperature", "adaptive", "paraphrase", "max_tokens", "choice", "seed")
    first_token = getattr(args, "first_token", False)
    given = Sampling(max(sizes), first_token=first_token, **{name: getattr(args, name) for name in names})
    try:
        for size in sizes:
            checked(replace(given, samples=size))
    except ValueError as error:
        parser.error(str(error))
    if len(sizes) > 1 and not first_token:
        parser.error("--samples takes several numbers only with --first-token")
    if args.choice and not args.endpoint:
        parser.error("--choice is for servers that force answers (--endpoint)")
    return given, sizes


OF_RECOUNT = {"recount", "output", "overwrite", "samples", "adaptive", "task", "calibrator", "threshold"}


def parse_arguments(argv: Sequence[str] | None) -> tuple[argparse.Namespace, Sampling, list[int]]:
    parser = command_line.ArgumentParser(__doc__)
    add = parser.add_argument
    add("text", metavar="TEXT", nargs="*", help="texts to classify and explain")
    tasks.add_arguments(parser)
    add("--truncate", action="store_true", help="shorten a text too long for the model, instead of failing its row")
    scoring.add_arguments(parser)
    add_sampling_arguments(parser)
    add("--first-token", action="store_true", help="draw from the first token's distribution instead of generating")
    add("--figure", metavar="PNG", help="with --first-token and a table: how agreement approaches the probability")
    add("--recount", metavar="FILE", help="count the stored answers of a predictions file again; needs no model")
    add_model_arguments(parser)
    endpoint.add_arguments(parser)
    add("--batch-size", type=int, metavar="N", help="rows run together (default: by samples and device)")
    args = parser.parse_args(argv)
    if args.recount:
        command_line.allow_only_arguments(parser, args, OF_RECOUNT, "--recount counts stored answers without a model")
    args.input = args.recount or args.input
    scoring.check_arguments(parser, args)
    endpoint.check_arguments(parser, args)
    sampling, sizes = sampling_from(parser, args)
    if args.first_token and (args.endpoint or args.adaptive or args.temperature != 1):
        parser.error("--first-token draws a fixed number at temperature 1 from a model loaded here")
    if args.figure and not (args.first_token and args.output and not args.paraphrase and args.figure.endswith(".png")):
        parser.error("--figure NAME.png shows --first-token on a table, asked in one wording")
    if args.batch_size is not None and args.batch_size < 1:
        parser.error(f"--batch-size {args.batch_size}: at least 1")
    return args, sampling, sizes


def main(argv: Sequence[str] | None = None) -> None:
    args, sampling, sizes = parse_arguments(argv)
    task = tasks.read_task(args.task)
    total = 0
    if args.output:
        predictions.check_output(args.output, args.input)
        predictions.check_output(args.output, args.calibrator)
        if not args.recount:
            total = tasks.check_examples(tasks.examples_from(args), task, args.input)
    calibrator = None
    if args.calibrator:
        from calibration import load_calibrator

        calibrator = load_calibrator(args.calibrator)
    if args.recount:
        recount(args, task, sampling, calibrator)
        finish(args, calibrator)
        return
    with ExitStack() as stack:
        if args.endpoint:
            server = stack.enter_context(endpoint.connect_from(args, args.tokenizer and load_reader(args.tokenizer)))
            sampler = prepare_remote(server, task, sampling)
        else:
            sampler = prepare(load_from(args, task.settings()), task, sampling, args.truncate)
        if calibrator:
            calibrator.check(sampler.fingerprint, sampler.model.name, task.name, list(task.labels))
        if args.text:
            explain_texts(args, sampler, sizes, calibrator)
            return
        run_table(args, sampler, total)
    if args.first_token and not args.paraphrase:
        pairs = converge(Path(args.output), sizes, task, lambda row: sampler.seed(row, 0))
        if pairs:
            print(convergence_table(pairs))
        if pairs and args.figure:
            draw_convergence(args.figure, pairs, f"{sampler.model.name} on {Path(args.input).name}")
            print(args.figure)
    finish(args, calibrator)


def explain_texts(
    args: argparse.Namespace, sampler: Sampler, sizes: Sequence[int], calibrator: FittedCalibrator | None
) -> None:
    for text in args.text:
        row = explain(text, sampler)
        if len(sizes) > 1 and not args.paraphrase:
            seed = sampler.seed(Example("", text, None), 0)
            row["agreement_by_draws"] = agreement_by_draws([*row["first_token"].values()], seed, sizes)
        if calibrator:
            given = predictions.scored(
                "",
                text,
                None,
                row["probabilities"],
                row["label_mass"],
                **sampler.common,
                extras={"votes": row["votes"]},
            )
            row |= {k: v for k, v in calibrator.apply([given], args.threshold)[0].extras.items() if k != "votes"}
        if args.json:
            print(json.dumps(row))
        else:
            print_explanation(row)


def sample_table(args: argparse.Namespace, sampler: Sampler, path: Path, total: int) -> int:
    """Write or continue the predictions file of a whole table; returns how many rows were asked about now."""
    size = 1 if args.endpoint else ROWS_PER_WINDOW.get(sampler.model.device, 256)
    score = partial(sample_rows, sampler=sampler, batch_size=args.batch_size, size=size)
    examples, identify = partial(tasks.examples_from, args), sampler.task.identify
    return predictions.write_table(path, examples, identify, score, sampler.fingerprint, total, size, args.overwrite)


def run_table(args: argparse.Namespace, sampler: Sampler, total: int) -> None:
    """Ask about a whole table; report what the file now holds."""
    started = time.monotonic()
    if count := sample_table(args, sampler, Path(args.output), total):
        seconds = time.monotonic() - started
        print(f"asked about {count:,} rows in {seconds:.1f} s, {count / seconds:.1f} a second", file=sys.stderr)
    print(report(Path(args.output)))


def finish(args: argparse.Namespace, calibrator: FittedCalibrator | None) -> None:
    if calibrator:
        from calibration import calibrate_file

        print(calibrate_file(args.output, calibrator, args.threshold))


if __name__ == "__main__":
    command_line.run(main, resumes=True)
