"""Method 1, total probability: how much of the model's next-token distribution names each label.

    P(label) = sum of softmax probability over every token that spells one of the label's answer words
    label mass = sum of P over the labels;  confidence = P(label) / label mass;  total probability = P(label)

    python logprobs_confidence.py "I absolutely love this amazing movie!" "Not bad"
    python logprobs_confidence.py --raw-prompt "Knock knock."
    python logprobs_confidence.py --input reviews.csv --output predictions.jsonl
    python logprobs_confidence.py --calibrator calibrator.json "Not bad"      # with calibrated confidence and decision
    python logprobs_confidence.py --confidence-head "Not bad"    # an adapter's own estimate of being right, beside it
    python logprobs_confidence.py --endpoint http://127.0.0.1:8000/v1 "Not bad"          # a model behind a server
    python logprobs_confidence.py --endpoint sagemaker:NAME/ADAPTER --tokenizer MODEL "Not bad"    # and one on AWS

Single texts are explained: the ranked token table with the label each token counts for, the sums, the verdict
(`--json`: one object a line). A table of texts becomes a predictions file (predictions.py), in input order; repeating
the command continues a run that was killed. With labels in the table it ends with a short report.

The way of one text, as code:

    1. task.read_task                     what is asked: labels, answer words, template, examples
    2. llama.load_llama                   the weights, the tokenizer, perhaps an adapter
    3. Llama.task_prompt                  the prompt around the place of the text, rendered once
    4. task.find_answers                  the tokens that spell a label's answer word
    5. Llama.encode_within                the ids of the whole prompt; control strings of the text are characters
    6. Llama.next_token_log_probs         one forward pass: log-probability of every token as the next
    7. task.label_probabilities           the answers summed into labels, and their mass
    8. LabelScorer.explain                prediction and confidence, with the work shown
    9. scoring.calibrated                 with --calibrator: calibrated confidence and decision
    10. print_explanation

A server lists only its most probable tokens, so the label mass is an interval there: `label_mass` is what is listed,
`label_mass_high` adds all that is not, the remainder. It counts against the prediction, whose confidence is the least
that it can be; a row is an error where the remainder could change the prediction. A label that is not listed is
`missing` and counts with the most it can have.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

import command_line
import endpoint
import predictions
import scoring
from command_line import printable
from endpoint import Endpoint, Listing, PassingError, Prompt
from explained_texts import most_probable
from llama import Llama, default_llama, load_llama, model_arguments
from llama import add_arguments as add_model_arguments
from lora import HEAD
from predictions import Prediction
from prompts import SLOT, RenderedPrompt
from scoring import SavedRows
from served_identity import check_identity
from tables import Example
from task import TASKS, Answer, Task, debias, find_answers, label_probabilities, listed_probabilities, read_task
from verdict import LITTLE_MASS

if TYPE_CHECKING:
    from confidence_head import ConfidenceHead

TOP_TOKENS = 20
DEBIASED = {"debias": "batch"}  # what --debias adds to the settings of a fingerprint
NO_LABEL = "the model gives no label any probability"
# Rows sorted by length and written together, by device: what a killed run can lose, and what memory holds.
ROWS_PER_WINDOW = {"cpu": 256, "mps": 1024, "cuda": 4096}


# A model and a task, joined


@dataclass(frozen=True)
class LabelScorer:
    """A loaded model and a task, and what follows from the two: rendered prompt, answer tokens, fingerprint."""

    llama: Llama
    task: Task
    prompt: RenderedPrompt
    answers: tuple[Answer, ...]
    truncate: bool
    batch_size: int | None
    fingerprint: str
    debiased_fingerprint: str  # of its predictions after batch calibration
    head: ConfidenceHead | None = None
    name = "logprobs"

    @property
    def model_name(self) -> str:
        return self.llama.name

    @property
    def window(self) -> int:
        return ROWS_PER_WINDOW.get(self.llama.device, 256)

    def encode(self, text: str) -> tuple[list[int], str]:
        """The ids of the prompt, with room for an answer's later tokens, and the text they show; ValueError if none."""
        room = max(len(answer.ids) for answer in self.answers) - 1
        return self.llama.encode_within(self.prompt, text, room, self.truncate)

    def explain(self, text: str) -> dict:
        """Score a text and show the work: prompt, token table, answers, sums, verdict. One plain forward pass."""
        ids, shown = self.encode(text)
        log_probs = self.llama.next_token_log_probs(ids)
        answer_ids = [answer.ids for answer in self.answers]
        hidden = np.empty((1, self.llama.hidden_size), np.float32) if self.head else None
        if self.head or any(len(ids) > 1 for ids in answer_ids):
            answer_log_probs = self.llama.answer_log_probs([ids], answer_ids, hidden=hidden)
        else:
            answer_log_probs = log_probs[None, [first for (first,) in answer_ids]]
        probabilities, mass = label_probabilities(answer_log_probs, self.answers, list(self.task.labels))
        if not np.isfinite(probabilities).all():
            raise ValueError(NO_LABEL)
        by_label = dict(zip(self.task.labels, probabilities[0].tolist(), strict=True))
        answer_tokens = {label: [] for label in self.task.labels}
        for answer, p in zip(self.answers, np.exp(answer_log_probs[0]).tolist(), strict=True):
            answer_tokens[answer.label].append({"token": answer.text, "ids": list(answer.ids), "probability": p})
        for tokens in answer_tokens.values():
            tokens.sort(key=lambda token: -token["probability"])
        extras = {}
        if self.head:
            extras["head_confidence"] = float(self.head.predict(hidden, probabilities.max(axis=1))[0])
        return {
            "text": text,
            "prompt": self.prompt.render(shown),
            "prompt_token_ids": ids,
            "model": self.llama.name,
            "model_path": str(self.llama.path),
            "top_tokens": top_tokens(self.llama, log_probs, {answer.ids: answer.label for answer in self.answers}),
            "answer_tokens": answer_tokens,
            **scoring.conclusion(by_label, float(mass[0])),
            **extras,
            "fingerprint": self.fingerprint,
        }

    score = scoring.by_windows

    def score_together(
        self,
        examples: Sequence[Example],
        advance: Callable[[int], None] = lambda n: None,
        saved: SavedRows | None = None,
    ) -> list[Prediction]:
        """Score examples in one sorting by length, returned in their order."""
        answer_ids = [answer.ids for answer in self.answers]

        def score_batches(
            encoded: dict[int, tuple[list[int], str]], skip: frozenset[int]
        ) -> Iterator[dict[int, Prediction]]:
            numbers, prompts = list(encoded), [ids for ids, _ in encoded.values()]
            with_hidden = self.head is not None
            for batch in self.llama.answer_batches(prompts, answer_ids, self.batch_size, with_hidden, skip=skip):
                probabilities, mass = label_probabilities(batch.log_probs, self.answers, list(self.task.labels))
                heads = self.head.predict(batch.hidden, probabilities.max(axis=1)) if self.head else [None] * len(mass)
                fresh = {}
                for place, p, m, head in zip(batch.rows, probabilities, mass, heads, strict=True):
                    number = numbers[place]
                    is_shortened = encoded[number][1] != examples[number].text
                    fresh[number] = self.record(examples[number], p, float(m), is_shortened, head)
                yield fresh

        return scoring.in_batches(self, examples, self.encode, score_batches, advance, saved)

    def record(
        self, example: Example, probabilities: np.ndarray, label_mass: float, is_shortened: bool, head: float | None
    ) -> Prediction:
        """The record of a row from its probabilities over the labels [labels]."""
        if not np.isfinite(probabilities).all():
            return scoring.failed(self, example, NO_LABEL)
        extras: dict[str, object] = {"truncated": True} if is_shortened else {}
        if head is not None:
            extras["head_confidence"] = float(head)
        by_label = dict(zip(self.task.labels, probabilities.tolist(), strict=True))
        identity = self.task.identify(example)
        return predictions.scored(*identity, by_label, label_mass, **scoring.record_fields(self), extras=extras)


def label_scorer(
    llama: Llama,
    task: Task,
    truncate: bool = False,
    batch_size: int | None = None,
    use_head: bool = False,
) -> LabelScorer:
    """Join a model and a task; ValueError when the task's answers do not work with this model's tokenizer.

    `use_head`: also what the confidence head beside the model's adapter says; ValueError if there is none.
    """
    prompt = llama.task_prompt(task)
    answers = tuple(find_answers(task, llama.tokenizer, prompt.render("text")))
    settings = llama.prompt_settings(task) | ({"truncate": True} if truncate else {})
    known = {**llama.identity, "task": task.settings(), "method": "logprobs"}
    head = None
    if use_head:
        head = read_head(llama, predictions.fingerprint(**known, settings=llama.prompt_settings(task)))
        settings["head"] = head.digest
    fingerprint = predictions.fingerprint(**known, settings=settings)
    debiased = predictions.fingerprint(**known, settings=settings | DEBIASED)
    return LabelScorer(llama, task, prompt, answers, truncate, batch_size, fingerprint, debiased, head)


def read_head(llama: Llama, fingerprint: str) -> ConfidenceHead:
    """The confidence head beside the model's adapter, which must be of this model, adapter and task."""
    from confidence_head import load_head

    if llama.adapter is None or not (llama.adapter / HEAD).is_file():
        where = f"the adapter in {llama.adapter} has no {HEAD}" if llama.adapter else "no adapter is in use"
        raise ValueError(f"--confidence-head: {where}; fine_tune_model.py --confidence-head makes one")
    head = load_head(llama.adapter / HEAD)
    if head.fingerprint != fingerprint:
        raise ValueError(
            f"{llama.adapter / HEAD} is for predictions {head.fingerprint}, these are {fingerprint}: "
            "another model, adapter, precision or task"
        )
    return head


def check_answers(task: Task, reader: Llama) -> None:
    """ValueError when the task's answers do not work with a tokenizer, told before its model's weights are read."""
    find_answers(task, reader.tokenizer, reader.task_prompt(task).render("text"))


def top_tokens(llama: Llama, log_probs: np.ndarray, label_of: Mapping[tuple[int, ...], str]) -> list[dict]:
    """The most probable next tokens, best first, each under its own id, with the label it counts for or None."""
    order = np.argsort(-log_probs, kind="stable")[:TOP_TOKENS].tolist()
    return [
        {"token": llama.tokenizer.decode([i]), "id": i, "logprob": float(log_probs[i]), "label": label_of.get((i,))}
        for i in order
    ]


# A server and a task, joined


@dataclass(frozen=True)
class RemoteLabelScorer:
    """A server and a task, and what follows from the two: how a text is sent, the answer ids, the fingerprint."""

    server: Endpoint
    task: Task
    ask: Callable[[str], Prompt]
    ids: tuple[int, ...]  # of the answers, where we have the tokenizer
    fingerprint: str
    debiased_fingerprint: str
    name = "logprobs"
    window = 1

    @property
    def model_name(self) -> str:
        return self.server.name

    async def listing(self, text: str) -> Listing:
        return await self.server.first_token(self.ask(text), self.ids)

    def explain(self, text: str) -> dict:
        """As of a model loaded here, from what the server lists; what only a loaded model knows is None."""
        prompt, reader = self.ask(text), self.server.reader
        listing = self.server.wait(self.listing(text))
        by_label, mass, extras = listed_probabilities(listing.tokens, self.task, listing.complete)
        tokens, answer_tokens = [], {label: [] for label in self.task.labels}
        for token, logprob in listing.tokens:
            label = self.task.label_of(token)
            tokens.append({"token": token, "id": None, "logprob": logprob, "label": label})
            if label:
                answer_tokens[label].append({"token": token, "ids": None, "probability": math.exp(logprob)})
        return {
            "text": text,
            "prompt": reader.task_prompt(self.task).render(text) if reader else prompt,
            "prompt_token_ids": prompt if reader else None,
            "model": self.server.name,
            "model_path": None,
            "top_tokens": tokens[:TOP_TOKENS],
            "answer_tokens": answer_tokens,
            **scoring.conclusion(by_label, mass, extras["label_mass_high"]),
            **extras,
            "fingerprint": self.fingerprint,
        }

    def score(
        self, examples: Iterator[Example], advance: Callable[[int], None], saved: SavedRows
    ) -> Iterator[Prediction]:
        """Score several examples at a time, in their order; one that fails gets its error and no number."""
        return self.server.in_order(self.score_one, examples, advance)

    async def listed(self, text: str) -> tuple[dict[str, float], float, dict[str, object]]:
        """(probabilities, label mass, extras) of a text, from what the server lists."""
        listing = await self.listing(text)
        return listed_probabilities(listing.tokens, self.task, listing.complete)

    async def score_one(self, example: Example) -> Prediction:
        question = self.name, example.text
        try:
            by_label, mass, extras = await self.server.once(question, partial(self.listed, example.text))
        except ValueError as error:
            return scoring.failed(self, example, str(error), isinstance(error, PassingError))
        identity = self.task.identify(example)
        return predictions.scored(*identity, by_label, mass, **scoring.record_fields(self), extras=extras)


def remote_label_scorer(server: Endpoint, task: Task) -> RemoteLabelScorer:
    """Join a server and a task, with one request to see that it gives log-probabilities; ValueError if it does not."""
    if server.is_anthropic:
        raise ValueError(endpoint.NO_LOGPROBS.format(server.name))
    if task.scoring != "first-token":
        raise ValueError('a server lists first tokens; scoring = "sequence" needs a model loaded here')
    ask, ids = server.question(task), ()
    if server.reader:
        rendered = server.reader.task_prompt(task).render("text")
        ids = tuple(answer.ids[0] for answer in find_answers(task, server.reader.tokenizer, rendered))
    server.probe_first_token(ask("A text."), ids)
    check_identity(server, task, ask)
    settings = {"sent": server.sent(temperature=1.0), "listed": "ids" if server.by_id else server.top_tokens}
    if not server.by_id:
        settings["not listed"] = "counts against the prediction"
    known = {**server.identity, "task": task.settings(), "method": "logprobs"}
    fingerprint = predictions.fingerprint(**known, settings=settings)
    debiased = predictions.fingerprint(**known, settings=settings | DEBIASED)
    return RemoteLabelScorer(server, task, ask, ids, fingerprint, debiased)


# From Python


def get_confidence(text: str, llama: Llama | None = None, task: Task | None = None) -> tuple[str, float]:
    """(predicted label, its confidence in [0, 1]) of one text; by default the embedded model and task `sentiment`.

    Raises ValueError for an empty text and for one too long for the model.
    """
    task = task or TASKS["sentiment"]
    llama = llama or default_llama(json.dumps(task.settings()))
    explanation = label_scorer(llama, task).explain(text)
    return explanation["prediction"], explanation["confidence"]


class Classifier:
    """Method 1 for programs: the model is loaded once, then lists of texts become lists of predictions.

    `task` is a Task, a built-in task's name or a TOML file; `calibrator` a calibrator file. The other arguments are
    those of `llama.load_llama`.
    """

    def __init__(
        self,
        task: str | Task = "sentiment",
        model: str = "default",
        adapter: str | None = "auto",
        calibrator: str | Path | None = None,
        **loading: object,
    ) -> None:
        task = task if isinstance(task, Task) else read_task(task)
        self.scorer = label_scorer(load_llama(model, adapter, task=task.settings(), **loading), task)
        self.calibrator = scoring.calibrator_of(self.scorer, calibrator)

    def predict(self, texts: Sequence[str]) -> list[Prediction]:
        """A `predictions.Prediction` for each text, in order; one that cannot be scored carries an `error`."""
        return scoring.predict(self.scorer, texts, self.calibrator)


# Printing


def print_token_table(tokens: Sequence[Mapping], rows: int = 12) -> None:
    print("  rank  token            log-prob    percent  counts for")
    for rank, entry in enumerate(tokens[:rows], 1):
        token = f'"{printable(entry["token"])}"'
        percent = 100 * np.exp(entry["logprob"])
        print(f"  {rank:4}  {token:15} {entry['logprob']:9.3f}  {percent:7.2f} %  {entry['label'] or ''}".rstrip())


def print_answer_sums(row: Mapping) -> None:
    """Per label: its probability, as the sum it is; then the label mass. Of many labels the most probable."""
    shown = most_probable(row["probabilities"])
    width = max(map(len, [*shown, "label mass"])) + 3
    shared = row.get("label_mass_high", row["label_mass"])  # what the probabilities are shares of
    for label in shown:
        entries = row["answer_tokens"][label]
        name = f"{f'P({label})':{width}}"
        if label in row.get("missing", ()):
            print(f"  {name}          not listed; it counts with all that is not, the most it can have")
            continue
        total = 100 * row["probabilities"][label] * shared
        parts = [f'{100 * e["probability"]:.2f} "{printable(e["token"])}"' for e in entries[:4]]
        if len(entries) > 4:
            parts.append(f"{len(entries) - 4} more")
        not_listed = total - 100 * sum(entry["probability"] for entry in entries)
        if "label_mass_high" in row and not_listed >= 0.005:
            parts.append(f"{not_listed:.2f} not listed")
        print(f"  {name} {total:6.2f} %  = {' + '.join(parts)}")
    if others := row["probabilities"].keys() - set(shown):
        rest = 100 * shared * sum(row["probabilities"][label] for label in others)
        print(f"  {f'{len(others)} others':{width}} {rest:6.2f} %")
    high = row.get("label_mass_high", row["label_mass"])
    more = f", up to {100 * high:.2f} % with what is not listed" if high > row["label_mass"] else ""
    print(f"  {'label mass':{width}} {100 * row['label_mass']:6.2f} %  of the distribution names a label{more}")


def print_explanation(row: Mapping) -> None:
    """The token table, the sums and the verdict, as the article prints them."""
    print(f"Text: {printable(row['text'])}\n")
    print_token_table(row["top_tokens"])
    print()
    print_answer_sums(row)
    confidence, total = 100 * row["confidence"], 100 * row["total_probability"]
    print(f"\n  Verdict: {row['prediction']}, confidence {confidence:.2f} % (total probability {total:.2f} %)")
    if row.get("label_mass_high", row["label_mass"]) < LITTLE_MASS:
        print("  The model mostly wants to answer something else: this confidence means nothing (docs/improving.md)")
    if "head_confidence" in row:
        print(f"  Confidence head: {100 * row['head_confidence']:.2f} % that this is right")
    scoring.print_decision(row)
    print()


def show_next_tokens(texts: Sequence[str], llama: Llama, as_json: bool) -> None:
    """The next token after each text as it stands, its outer white space too."""
    for text in texts:
        before, inner, after = text.partition(text.strip())
        ids, _ = llama.encode_within(RenderedPrompt(before, after, llama.rendered_prompt(SLOT).start), inner)
        tokens = top_tokens(llama, llama.next_token_log_probs(ids), {})
        if as_json:
            print(json.dumps({"text": text, "prompt_token_ids": ids, "top_tokens": tokens}))
            continue
        print(f"After: {printable(text)}\n")
        print_token_table(tokens)
        print()


# Batch calibration of a finished file


def debiased_rows(raw: Path, labels: Sequence[str], fingerprint: str) -> Iterator[Prediction]:
    """Batch calibration of a finished predictions file by the labels' mean over all its rows; see task.debias."""
    total, count = np.zeros(len(labels)), 0
    for row in predictions.iterate(raw):
        if row.error is None:
            total, count = total + [row.probabilities[label] for label in labels], count + 1
    for row in predictions.iterate(raw):
        if row.error is not None:
            yield replace(row, fingerprint=fingerprint, extras={})
            continue
        p = debias(np.array([[row.probabilities[label] for label in labels]]), total / count)[0]
        common = {"method": row.method, "model": row.model, "task": row.task, "fingerprint": fingerprint}
        extras = {name: value for name, value in row.extras.items() if name not in predictions.CALIBRATED}
        by_label = dict(zip(labels, p.tolist(), strict=True))
        yield predictions.scored(row.id, row.text, row.label, by_label, row.label_mass, **common, extras=extras)


# Command line


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = command_line.ArgumentParser(__doc__)
    add = parser.add_argument
    scoring.add_arguments(parser)
    add("--raw-prompt", action="store_true", help="no task: show the next token after each TEXT as it stands")
    add("--debias", choices=["batch"], help="divide by the labels' mean over the table; for balanced labels only")
    add("--confidence-head", action="store_true", help="add the adapter's own estimate of being right")
    add_model_arguments(parser)
    endpoint.add_arguments(parser)
    args = parser.parse_args(argv)
    scoring.check_arguments(parser, args)
    endpoint.check_arguments(parser, args)
    if args.debias and not args.input:
        parser.error("--debias batch needs a table (--input FILE): it is estimated from many texts")
    if args.debias and args.shard:
        parser.error("--debias batch is estimated from the whole table; --shard has a part of it")
    if args.confidence_head and (args.raw_prompt or args.endpoint or args.debias):
        parser.error("--confidence-head reads the last hidden state of an adapter's own answer; leave the other out")
    if args.raw_prompt and (args.input or args.calibrator or args.endpoint):
        parser.error("--raw-prompt shows the next token after texts, of a model loaded here; it gives no label")
    return args


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_arguments(argv)
    task = read_task(args.task)
    job = scoring.job_from_arguments(args, task, more_outputs=[".raw.jsonl"] if args.debias else [])
    if args.dry_run is not None:
        method_of = partial(remote_label_scorer, task=task)
        print(endpoint.plan_from_arguments(args, job.table, [task], (1, 1), 1, method_of))
        return
    raw = job.output.with_suffix(".raw.jsonl") if args.debias else job.output  # the model's own answers
    spent = ""
    with ExitStack() as stack:
        if args.endpoint:
            server = stack.enter_context(endpoint.connect(**endpoint.connection_arguments(args)))
            scorer = remote_label_scorer(server, task)
        else:
            check = (lambda reader: None) if args.raw_prompt else partial(check_answers, task)
            llama = load_llama(**model_arguments(args), task=task.settings(), check=check)
            if args.raw_prompt:
                show_next_tokens(args.text, llama, args.json)
                return
            scorer = label_scorer(llama, task, args.truncate, args.batch_size, args.confidence_head)
        fingerprint = scorer.debiased_fingerprint if args.debias else scorer.fingerprint
        job.check(replace(scorer, fingerprint=fingerprint))
        if job.texts:
            scoring.explain_texts(job, scorer, print_explanation)
            return
        scoring.score_table(scorer, job.table, job.total, raw, job.overwrite)
        if args.endpoint:
            spent = f"\n{server.spent()}"
    if args.debias:
        print(scoring.report(raw))
        rows = partial(debiased_rows, raw, list(task.labels), fingerprint)
        scoring.write_derived(job.output, rows, fingerprint, job.overwrite)
    scoring.finish_table(job, scoring.report(job.output) + spent)


if __name__ == "__main__":
    command_line.run(main, resumes=True)
