"""Method 2, consistency: ask the model several times, let the answers vote, and see how far they agree.

    vote share = answers that name the winning label / answers asked for;   10 of 10 still means 78 % to 100 %

    python consistency_confidence.py "I absolutely love this amazing movie!" "Not bad"
    python consistency_confidence.py --paraphrase "Best worst thing ever"         # two answers to each of five wordings
    python consistency_confidence.py --input reviews.csv --output consistency.jsonl --adaptive
    python consistency_confidence.py --endpoint anthropic --model claude-haiku-4-5 --task sentiment-yes-no "Not bad"
    python consistency_confidence.py --recount consistency.jsonl --samples 5 --output five.jsonl
    python consistency_confidence.py --first-token --samples 10,100,1000 --input data:test --output draws.jsonl

It works for every model that answers, also for those that hide their probabilities. Answers are sampled at
temperature 1 from the whole distribution. One is read by its answer words, whatever its case and punctuation; "not
positive" is not positive, a thought is no answer, and what names no label, or several, is `unparsed` and stays in the
denominator of the vote share, which records call `agreement`:

    agreement = confidence x label_mass,   confidence = votes / parsed answers,   label_mass = parsed / all answers

The answers are stored, so --recount can vote again, over fewer of them or with --adaptive, without the model.
For a one-word answer to one question the vote share is only an estimate of its probability: --first-token draws
answers from the first-token distribution itself and shows how the share approaches it. Asking in several wordings
(--paraphrase) or a model that reasons before it answers is what makes the vote share say more.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import numpy as np

import command_line
import endpoint
import predictions
import scoring
import voting
from answers import parser_of
from command_line import printable
from endpoint import Endpoint, PassingError, Prompt
from explained_texts import most_probable
from llama import Llama, default_llama, load_llama, model_arguments
from llama import add_arguments as add_model_arguments
from logprobs_confidence import label_scorer
from predictions import Prediction
from prompts import RenderedPrompt
from scoring import SavedRows
from served_identity import check_identity
from tables import Example
from task import TASKS, Task, read_task
from voting import Sampling

ROWS_PER_WINDOW = {"cpu": 256, "mps": 512, "cuda": 1024}
ROWS_TOGETHER = 32  # of a window, asked together in rounds until all have answers enough


# A model and a task, joined


@dataclass
class AskedRow:
    """An example that is being asked about, in rounds: its prompt's ids in each wording, its answers by number."""

    example: Example
    prompts: list[list[int]]
    truncated: bool
    answers: dict[int, str] = field(default_factory=dict)
    wanted: range = range(0)  # the numbers of the answers that this round asks for

    def in_order(self) -> list[str]:
        return [self.answers[number] for number in sorted(self.answers)]

    def wanted_in(self, wording: int) -> list[int]:
        """Answer n is to wording n, modulo their number."""
        return [number for number in self.wanted if number % len(self.prompts) == wording]


@dataclass(frozen=True)
class AnswerSampler:
    """A loaded model, a task and how to sample, and what follows from them: rendered prompts, fingerprint."""

    llama: Llama
    task: Task
    sampling: Sampling
    prompts: tuple[RenderedPrompt, ...]  # one for each wording
    sent: dict
    truncate: bool
    batch_size: int | None
    sizes: Sequence[int]  # numbers of draws from the first token's distribution that are compared
    fingerprint: str
    name = "consistency"

    @property
    def model_name(self) -> str:
        return self.llama.name

    @property
    def window(self) -> int:
        return ROWS_PER_WINDOW.get(self.llama.device, 256)

    def encode(self, text: str) -> list[tuple[list[int], str]]:
        """The prompt's ids in each wording, and the text that they show; ValueError if it cannot be put."""
        room = 0 if self.sampling.first_token else self.sampling.max_tokens
        return [self.llama.encode_within(prompt, text, room, self.truncate) for prompt in self.prompts]

    def explain(self, text: str) -> dict:
        """Ask about one text and show the answers; ValueError when none of them names a label."""
        (row,) = self.ask_together([Example("", text, None)])
        if row.error:
            raise ValueError(row.error)
        prompts = [prompt.render(shown) for prompt, (_, shown) in zip(self.prompts, self.encode(text), strict=True)]
        shown = explanation(self, row, prompts, str(self.llama.path))
        if len(self.sizes) > 1 and len(prompts) == 1:
            by_label = np.array([[*row.extras["first_token"].values()]])
            pairs = voting.converge(by_label, [self.sampling.seed_of(row, 0)], self.sizes)
            shown["agreement_by_draws"] = {size: float(found[0, 1]) for size, found in pairs.items()}
        return shown

    score = scoring.by_windows

    def score_together(
        self,
        examples: Sequence[Example],
        advance: Callable[[int], None] = lambda n: None,
        saved: SavedRows | None = None,
    ) -> list[Prediction]:
        """Ask about examples, a group of about the same length at a time; returned in their order."""
        saved = saved or SavedRows()
        texts = [example.text for example in examples]
        longest_first = sorted(range(len(examples)), key=lambda number: -len(texts[number]))
        records = {}
        for begin in range(0, len(examples), ROWS_TOGETHER):
            numbers = longest_first[begin : begin + ROWS_TOGETHER]
            rows = [saved.get(examples[number]) for number in numbers]
            if not all(rows):  # whole groups only, so that a continued run makes the same batches
                rows = self.ask_together([examples[number] for number in numbers])
                saved.keep(rows)
            records.update(zip(numbers, rows, strict=True))
            command_line.advance_by(advance, len(rows), command_line.worth([texts[n] for n in numbers], texts))
        return [records[number] for number in range(len(examples))]

    def ask_together(self, examples: Sequence[Example]) -> list[Prediction]:
        """Ask about examples together, in rounds until each has answers enough."""
        if self.sampling.first_token:
            return draw_first_tokens(self, examples)
        encoded, errors = scoring.encode_all(examples, self.encode)
        rows = {}
        for number, prompts in encoded.items():
            truncated = any(shown != examples[number].text for _, shown in prompts)
            rows[number] = AskedRow(examples[number], [ids for ids, _ in prompts], truncated)
        going = list(rows.values())
        while going:
            for row in going:
                row.wanted = self.sampling.next_numbers(row.in_order(), self.task)
            going = [row for row in going if row.wanted]
            self._ask(going)
        records = {number: scoring.failed(self, examples[number], error) for number, error in errors.items()}
        for number, row in rows.items():
            records[number] = answered(self, row.example, row.in_order(), row.truncated)
        return [records[number] for number in range(len(examples))]

    def _ask(self, rows: Sequence[AskedRow]) -> None:
        """Sample the answers that rows want: all rows of a wording together."""
        stop = "\n" if self.task.format == "completion" else ""  # it would go on to the next text; a chat ends itself
        how = self.sampling
        for wording in range(len(self.prompts)):
            asked = [row for row in rows if row.wanted_in(wording)]
            if not asked:
                continue
            prompts = [row.prompts[wording] for row in asked]
            seeds = [[how.seed_of(row.example, number) for number in row.wanted_in(wording)] for row in asked]
            drawn = self.llama.sample(prompts, seeds, how.temperature, how.max_tokens, stop, self.batch_size)
            for row, answers in zip(asked, drawn, strict=True):
                row.answers.update(zip(row.wanted_in(wording), answers, strict=True))


def answer_sampler(
    llama: Llama,
    task: Task,
    sampling: Sampling,
    truncate: bool = False,
    batch_size: int | None = None,
    sizes: Sequence[int] = (),
) -> AnswerSampler:
    """Join a loaded model, a task and how to sample; ValueError when the task does not work with this model."""
    prompts = tuple(llama.task_prompt(wording) for wording in sampling.wordings(task))
    if sampling.max_tokens >= (llama.context_length or sys.maxsize):
        raise ValueError(f"--max-tokens {sampling.max_tokens} leaves no room: the model reads {llama.context_length}")
    sent = {"temperature": sampling.temperature}
    fingerprint = sampling.fingerprint(llama.identity, task, sent, truncate)
    return AnswerSampler(llama, task, sampling, prompts, sent, truncate, batch_size, sizes, fingerprint)


def answered(
    sampler: AnswerSampler | RemoteAnswerSampler, example: Example, answers: list[str], truncated: bool = False
) -> Prediction:
    """The record of an example with its answers."""
    votes, unparsed = voting.count_votes(answers, sampler.task)
    extras = {"sampling": sampler.sent, "answers": answers} | ({"truncated": True} if truncated else {})
    identity, common = sampler.task.identify(example), scoring.record_fields(sampler)
    return voting.record(identity, votes, unparsed, extras, sampler.sampling.adaptive, **common)


def explanation(
    sampler: AnswerSampler | RemoteAnswerSampler, row: Prediction, prompts: Sequence, model_path: str | None
) -> dict:
    """A record with its answers read and the prompts they answer."""
    extras = dict(row.extras)
    answers = [
        {"answer": answer, "label": voting.parse_answer(answer, sampler.task), "wording": number % len(prompts)}
        for number, answer in enumerate(extras.pop("answers", []))
    ]
    return {
        "text": row.text,
        "prompts": prompts,
        "model": row.model,
        "model_path": model_path,
        "answers": answers,
        **extras,
        **scoring.conclusion(row.probabilities, row.label_mass),
        "fingerprint": row.fingerprint,
    }


# A server and a task, joined


@dataclass(frozen=True)
class RemoteAnswerSampler:
    """A server, a task and how to sample, and what follows from them: how a text is sent, the fingerprint."""

    server: Endpoint
    task: Task
    sampling: Sampling
    questions: tuple[Callable[[str], Prompt], ...]  # one for each wording
    sent: dict
    fingerprint: str
    name = "consistency"
    window = 1

    @property
    def model_name(self) -> str:
        return self.server.name

    def explain(self, text: str) -> dict:
        """Ask about one text and show the answers; ValueError when none of them names a label."""
        row = self.server.wait(self.score_one(Example("", text, None)))
        if row.error:
            raise ValueError(row.error)
        shown = [ask(text) for ask in self.questions]
        if reader := self.server.reader:  # these are ids
            shown = [reader.task_prompt(wording).render(text) for wording in self.sampling.wordings(self.task)]
        return explanation(self, row, shown, None)

    def score(
        self, examples: Iterator[Example], advance: Callable[[int], None], saved: SavedRows
    ) -> Iterator[Prediction]:
        """Ask about several examples at a time, in their order; one that fails gets its error and no number."""
        return self.server.in_order(self.score_one, examples, advance)

    async def score_one(self, example: Example) -> Prediction:
        question = self.name, example.text
        try:
            return answered(self, example, await self.server.once(question, partial(self._ask, example)))
        except ValueError as error:
            return scoring.failed(self, example, str(error), isinstance(error, PassingError))

    async def _ask(self, example: Example) -> list[str]:
        """The answers to one example, those of a round at the same time; the first that fails ends it.

        The seeds are the text's, whatever its id, because equal texts are asked once.
        """
        prompts = [ask(example.text) for ask in self.questions]
        options, alike = self.sampling.options(self.task), replace(example, id="")
        answers: list[str] = []
        numbers = self.sampling.next_numbers(answers, self.task)
        while numbers:
            calls = []
            for number in numbers:
                prompt, seed = prompts[number % len(prompts)], self.sampling.seed_of(alike, number)
                calls.append(self.server.sample(prompt, seed, **options))
            answers += await endpoint.all_of(calls)
            numbers = self.sampling.next_numbers(answers, self.task)
        return answers


def remote_answer_sampler(server: Endpoint, task: Task, sampling: Sampling) -> RemoteAnswerSampler:
    """Join a server, a task and how to sample, with one request to see which parameters its API accepts."""
    questions = tuple(server.question(wording) for wording in sampling.wordings(task))
    answer = server.probe(lambda: server.sample(questions[0]("A text."), 0, **sampling.options(task)))
    if sampling.choice and voting.parse_answer(answer, task) is None:
        raise ValueError(f"{server.name} ignores --choice: asked to choose a label, it answered {answer!r}")
    check_identity(server, task, questions[0])
    sent = server.sent(temperature=sampling.temperature) | ({"choice": True} if sampling.choice else {})
    fingerprint = sampling.fingerprint(server.identity, task, sent)
    return RemoteAnswerSampler(server, task, sampling, questions, sent, fingerprint)


# Draws from the first-token distribution


def draw_first_tokens(sampler: AnswerSampler, examples: Sequence[Example]) -> list[Prediction]:
    """Votes drawn from each text's first-token distribution, which Method 1 computes; no answer is generated."""
    by_wording = []
    for wording in sampler.sampling.wordings(sampler.task):
        scorer = label_scorer(sampler.llama, wording, sampler.truncate, sampler.batch_size)
        by_wording.append(scorer.score_together(examples))
    return [drawn(sampler, example, rows) for example, *rows in zip(examples, *by_wording, strict=True)]


def drawn(sampler: AnswerSampler, example: Example, rows: Sequence[Prediction]) -> Prediction:
    """The record of draws from an example's distribution, given Method 1's record of it in each wording."""
    for row in rows:
        if row.error:
            return scoring.failed(sampler, example, row.error)
    labels, how = list(sampler.task.labels), sampler.sampling
    masses = np.array([[row.probabilities[label] * row.label_mass for label in labels] for row in rows])
    numbers = voting.first_token_draws(masses, how.seed_of(example, 0), how.samples)
    *counts, unparsed = np.bincount(numbers, minlength=len(labels) + 1).tolist()
    votes = dict(zip(labels, counts, strict=True))
    by_label = dict(zip(labels, masses.mean(axis=0).tolist(), strict=True))
    extras = {"calls": len(rows), "sampling": sampler.sent, "first_token": by_label}
    if any(row.extras.get("truncated") for row in rows):
        extras["truncated"] = True
    identity, common = sampler.task.identify(example), scoring.record_fields(sampler)
    return voting.record(identity, votes, unparsed, extras, False, **common)


def convergence(job: scoring.Job, sampler: AnswerSampler, figure: str | None) -> list[str]:
    """Lines on how the draws of a finished table approach the probabilities, which `figure` shows as well."""
    rows = [row for row in predictions.iterate(job.output) if "first_token" in row.extras]
    if not rows:  # no text could be put to the model
        return []
    by_label = np.array([[row.extras["first_token"][label] for label in sampler.task.labels] for row in rows])
    seeds = [sampler.sampling.seed_of(row, 0) for row in rows]
    pairs = voting.converge(by_label, seeds, sampler.sizes)
    lines = [voting.convergence_table(pairs)]
    if figure:
        import plotting

        about = f"{sampler.model_name} on {Path(job.table.source).name}"
        plotting.agreement_convergence(figure, pairs, about=about)
        lines.append(figure)
    return lines


# From Python


def get_consistency_confidence(
    text: str,
    num_samples: int = 10,
    temperature: float = 1.0,
    llama: Llama | None = None,
    task: Task | None = None,
    seed: int = 0,
) -> tuple[str, float, dict[str, int]]:
    """(label most answers name, its vote share in [0, 1], votes of each label and "unparsed") for one text.

    By default the embedded model and task `sentiment`. Raises ValueError for an empty text, fewer than two samples,
    a temperature not above 0, and when no answer names a label.
    """
    task, sampling = task or TASKS["sentiment"], Sampling(num_samples, temperature, seed=seed)
    row = answer_sampler(llama or default_llama(json.dumps(task.settings())), task, sampling).explain(text)
    return row["prediction"], row["agreement"], row["votes"] | {"unparsed": row["unparsed"]}


# Printing


def print_votes(row: Mapping) -> None:
    """The votes with the answers behind them."""
    counts = {label: row["votes"][label] for label in most_probable(row["votes"])} | {"unparsed": row["unparsed"]}
    width = max(map(len, counts))
    print(f"  answers  {'label':{width}}  as")
    for label, count in counts.items():
        said = Counter(a["answer"].strip() for a in row["answers"] if (a["label"] or "unparsed") == label)
        shown = ", ".join(f'"{answer}"' + (f" {times}" if times > 1 else "") for answer, times in said.most_common(4))
        rest = f" and {len(said) - 4} more" if len(said) > 4 else ""
        print(f"{count:9}  {label:{width}}  {printable(shown)}{rest}".rstrip())


def print_explanation(row: Mapping) -> None:
    """The votes, how far they can be trusted, the verdict."""
    print(f"Text: {printable(row['text'])}\n")
    if "first_token" in row:
        shown = most_probable(row["first_token"])
        parts = ", ".join(f"P({label}) {100 * row['first_token'][label]:.2f} %" for label in shown)
        print(f"  drawn from the first token's distribution: {parts}\n")
    print_votes(row)
    if "agreement_by_draws" in row:
        label, p = max(row["first_token"].items(), key=lambda pair: pair[1])
        shares = ", ".join(f"{100 * share:.1f} % of {n:,}" for n, share in row["agreement_by_draws"].items())
        print(f"\n  {label} in {shares} draws; its probability is {100 * p:.2f} %")
    if note := voting.thoughts_note([answer["answer"] for answer in row["answers"]]):
        print(f"\n  {note}")
    n, interval = sum(row["votes"].values()) + row["unparsed"], ""
    if row["agreement_low"] is not None:
        interval = f"; 95 % Jeffreys interval {100 * row['agreement_low']:.1f} to {100 * row['agreement_high']:.1f} %"
    print(f"\n  Verdict: {row['prediction']}, vote share {100 * row['agreement']:.1f} %", end=" ")
    print(f"({row['votes'][row['prediction']]} of {n}{interval})")
    calls = "1 call" if row["calls"] == 1 else f"{row['calls']} calls"
    print(f"  confidence {100 * row['confidence']:.1f} % among the answers that name a label", end=", ")
    print(f"label mass {100 * row['label_mass']:.1f} %, vote entropy {row['vote_entropy']:.2f} nats, {calls}")
    scoring.print_decision(row)
    print()


def report(path: str | Path) -> str:
    """What a predictions file of Method 2 holds: votes and calls beside the usual lines."""
    rows = [row for row in predictions.iterate(path) if "votes" in row.extras]  # also those without a single vote
    lines = [scoring.report(path)]
    if rows:
        shares = np.array([row.extras["agreement"] or 0.0 for row in rows])
        unparsed, calls = (sum(row.extras[name] for row in rows) for name in ("unparsed", "calls"))
        n = unparsed + sum(sum(row.extras["votes"].values()) for row in rows)
        lines.append(
            f"  mean vote share {shares.mean():.3f}, unanimous in {np.mean(shares == 1):.1%} of the rows; "
            f"{unparsed / n:.1%} of {n:,} answers unparsed; {calls:,} calls, {calls / len(rows):.1f} a row"
        )
        if note := voting.thoughts_note([answer for row in rows for answer in row.extras.get("answers", ())]):
            lines.append(f"  warning: {note}")
        if len(rows) >= 20 and all(len(set(row.extras.get("answers", ()))) == 1 for row in rows):
            lines.append("  warning: no row has two different answers; does this model really sample?")
    return "\n".join(lines)


# Counting stored answers again


def recount(job: scoring.Job, task: Task, samples: int | None, adaptive: bool) -> str:
    """Vote again over the first `samples` (None: all) stored answers of a file, or as --adaptive would have asked.

    Writes the job's output, all of it or nothing; returns the report on it.
    """
    source = job.table.source
    rows = [predictions.as_scored(row) for row in predictions.read(source)]
    origin = rows[0].fingerprint
    if rows[0].task != task.name:
        raise ValueError(f"{source} answers task {rows[0].task!r}, not {task.name!r}; name it with --task")
    if not any("answers" in row.extras for row in rows):
        raise ValueError(f"{source} {voting.NO_ANSWERS}")
    settings = {"samples": samples, "adaptive": adaptive, **parser_of(task)}
    fingerprint = predictions.fingerprint(recounted=origin, task=task.settings(), settings=settings)
    if job.calibrator:
        job.calibrator.check(fingerprint, rows[0].model, task.name, list(task.labels))
    counted = []
    for row in rows:
        if row.fingerprint != origin:
            raise ValueError(f"row {row.id!r} is of another run than the first; recount one run at a time")
        counted.append(voting.recounted(row, task, samples, adaptive, fingerprint))
    scoring.write_derived(job.output, partial(iter, counted), fingerprint, job.overwrite)
    changed = sum(a.prediction != b.prediction for a, b in zip(rows, counted, strict=True))
    before, after = (sum(len(row.extras.get("answers", ())) for row in of) for of in (rows, counted))
    return (
        f"{report(job.output)}\n"
        f"  recounted from {source}: {after:,} of {before:,} answers used ({1 - after / before:.1%} saved); "
        f"{changed:,} of {len(rows):,} predictions changed"
    )


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


def sampling_from_arguments(parser: argparse.ArgumentParser, args: argparse.Namespace) -> tuple[Sampling, list[int]]:
    """How the flags say to sample, and the sizes that --samples names, of which the largest counts."""
    try:
        sizes = sorted({int(part) for part in (args.samples or "10").split(",")})
    except ValueError:
        parser.error(f"--samples {args.samples}: a number, or with --first-token several, as 10,100,1000")
    names = ("temperature", "adaptive", "paraphrase", "max_tokens", "choice", "seed")
    first_token = getattr(args, "first_token", False)  # which only this script has
    try:
        smallest = Sampling(sizes[0], first_token=first_token, **{name: getattr(args, name) for name in names})
    except ValueError as error:
        parser.error(str(error))
    if len(sizes) > 1 and not first_token:
        parser.error("--samples takes several numbers only with --first-token")
    if args.choice and not args.endpoint:
        parser.error("--choice is for servers that force answers (--endpoint)")
    return replace(smallest, samples=sizes[-1]), sizes


OF_RECOUNT = {"recount", "output", "overwrite", "samples", "adaptive", "task", "calibrator", "threshold"}
OF_RECOUNT |= {"select_fdr"}


def parse_arguments(argv: Sequence[str] | None) -> tuple[argparse.Namespace, Sampling, list[int]]:
    parser = command_line.ArgumentParser(__doc__)
    add = parser.add_argument
    scoring.add_arguments(parser)
    add_sampling_arguments(parser)
    add("--first-token", action="store_true", help="draw from the first token's distribution instead of generating")
    add("--figure", metavar="PNG", help="with --first-token and a table: how the vote share approaches the probability")
    add("--recount", metavar="FILE", help="count the stored answers of a predictions file again; needs no model")
    add_model_arguments(parser)
    endpoint.add_arguments(parser)
    args = parser.parse_args(argv)
    if args.recount:
        command_line.allow_only_arguments(parser, args, OF_RECOUNT, "--recount counts stored answers without a model")
        args.input = args.recount
    scoring.check_arguments(parser, args)
    endpoint.check_arguments(parser, args)
    sampling, sizes = sampling_from_arguments(parser, args)
    if args.first_token and (args.endpoint or args.adaptive or args.temperature != 1):
        parser.error("--first-token draws a fixed number at temperature 1 from a model loaded here")
    if args.figure and not (args.first_token and args.output and not args.paraphrase and args.figure.endswith(".png")):
        parser.error("--figure NAME.png shows --first-token on a table, asked in one wording")
    return args, sampling, sizes


def plan_from_arguments(args: argparse.Namespace, examples: Iterable[Example], task: Task, sampling: Sampling) -> str:
    """What --dry-run prints."""
    method_of = partial(remote_answer_sampler, task=task, sampling=sampling)
    wordings = sampling.wordings(task)
    return endpoint.plan_from_arguments(args, examples, wordings, sampling.calls, sampling.max_tokens, method_of)


def main(argv: Sequence[str] | None = None) -> None:
    args, sampling, sizes = parse_arguments(argv)
    task = read_task(args.task)
    job = scoring.job_from_arguments(args, task)
    if args.recount:
        scoring.finish_table(job, recount(job, task, sampling.samples if args.samples else None, args.adaptive))
        return
    if args.dry_run is not None:
        print(plan_from_arguments(args, job.table, task, sampling))
        return
    spent = []
    with ExitStack() as stack:
        if args.endpoint:
            server = stack.enter_context(endpoint.connect(**endpoint.connection_arguments(args)))
            sampler = remote_answer_sampler(server, task, sampling)
        else:
            llama = load_llama(**model_arguments(args), task=task.settings())
            sampler = answer_sampler(llama, task, sampling, args.truncate, args.batch_size, sizes)
        job.check(sampler)
        if job.texts:
            scoring.explain_texts(job, sampler, print_explanation)
            return
        scoring.score_table(sampler, job.table, job.total, job.output, job.overwrite, "asked about")
        if args.endpoint:
            spent = [server.spent()]
    lines = [report(job.output), *spent]
    if args.first_token and not args.paraphrase:
        lines += convergence(job, sampler, args.figure)
    scoring.finish_table(job, "\n".join(lines))


if __name__ == "__main__":
    command_line.run(main, resumes=True)
