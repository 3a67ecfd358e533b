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

A server lists only its most probable tokens, so the label mass is an interval there: `label_mass` is what is listed,
`label_mass_high` adds all that is not. A label that is not listed is `missing` and counts with the most it can have.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

import endpoint
import predictions
import task as tasks
from endpoint import Endpoint, Listing, PassingError, Prompt
from llama import HEAD, SLOT, Frame, Llama, default_llama, load_from, load_reader
from llama import add_arguments as add_model_arguments
from predictions import Prediction
from task import Answer, Example, Task

if TYPE_CHECKING:
    from calibration import ConfidenceHead, FittedCalibrator

TOP_TOKENS = 20
NO_LABEL = "the model gives no label any probability"
# Rows sorted by length and written together, by device: what a killed run can lose, and what memory holds.
ROWS_PER_WINDOW = {"cpu": 256, "mps": 1024, "cuda": 4096}


@dataclass(frozen=True)
class Scorer:
    """A model and a task, and what follows from the two: the rendered prompt, the answer tokens, the fingerprint."""

    llama: Llama
    task: Task
    frame: Frame
    answers: tuple[Answer, ...]
    truncate: bool
    fingerprint: str
    head: ConfidenceHead | None = None

    @property
    def room(self) -> int:
        """Tokens of the context that an answer needs beyond its first."""
        return max(len(answer.ids) for answer in self.answers) - 1


def prepare(llama: Llama, task: Task, truncate: bool = False, use_head: bool = False, **settings: object) -> Scorer:
    """Join a model and a task; ValueError when the task's answers do not work with this model's tokenizer.

    `use_head`: also what the confidence head beside the model's adapter says; ValueError if there is none.
    """
    frame = llama.frame_of(task)
    answers = tasks.find_answers(task, llama.tokenizer, frame.render("text"))
    settings = {"truncate": True} | settings if truncate else settings
    known = {**llama.identity, "task": task.settings(), "method": "logprobs"}
    fingerprint, head = predictions.fingerprint(**known, settings=settings), None
    if use_head:
        head = read_head(llama, predictions.fingerprint(**known, settings={}))
        fingerprint = predictions.fingerprint(**known, settings=settings | {"head": head.digest})
    return Scorer(llama, task, frame, tuple(answers), truncate, fingerprint, head)


def read_head(llama: Llama, fingerprint: str) -> ConfidenceHead:
    """The confidence head beside the model's adapter, which must be of this model, adapter and task."""
    from calibration import load_head

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


@dataclass(frozen=True)
class Remote:
    """A server and a task, and what follows from the two: how a text is sent, the answer ids, the fingerprint."""

    server: Endpoint
    task: Task
    ask: Callable[[str], Prompt]
    ids: tuple[int, ...]  # of the answers, where we have the tokenizer
    fingerprint: str

    async def listing(self, text: str) -> Listing:
        return await self.server.first_token(self.ask(text), self.ids)


def prepare_remote(server: Endpoint, task: Task, **settings: object) -> Remote:
    """Join a server and a task, with one request to see that it gives log-probabilities; ValueError if it does not."""
    if server.is_anthropic:
        raise ValueError(endpoint.NO_LOGPROBS.format(server.name))
    if task.scoring != "first-token":
        raise ValueError('a server lists first tokens; scoring = "sequence" needs a model loaded here')
    ask, ids = server.question(task), ()
    if server.reader:
        rendered = server.reader.frame_of(task).render("text")
        ids = tuple(answer.ids[0] for answer in tasks.find_answers(task, server.reader.tokenizer, rendered))
    server.probe(lambda: server.first_token(ask("A text."), ids))
    settings |= {"sent": server.sent(temperature=1.0), "listed": "ids" if server.by_id else server.top_tokens}
    fingerprint = predictions.fingerprint(**server.identity, task=task.settings(), method="logprobs", settings=settings)
    return Remote(server, task, ask, ids, fingerprint)


def get_confidence(text: str, llama: Llama | None = None, task: Task | None = None) -> tuple[str, float]:
    """(predicted label, its confidence in [0, 1]) of one text; by default the embedded model and task `sentiment`.

    Raises ValueError for an empty text and for one too long for the model.
    """
    task = task or tasks.TASKS["sentiment"]
    row = explain(text, prepare(llama or default_llama(json.dumps(task.settings())), task))
    return row["prediction"], row["confidence"]


# One text, explained


def explain(text: str, scorer: Scorer) -> dict:
    """Score a text and show the work: prompt, token table, answers, sums, verdict. One plain forward pass, for JSON."""
    llama, task, answers = scorer.llama, scorer.task, scorer.answers
    ids, shown = llama.encode_within(scorer.frame, text, scorer.room, scorer.truncate)
    log_probs = llama.next_token_log_probs(ids)
    hidden = np.empty((1, llama.hidden_size), np.float32) if scorer.head else None
    if scorer.room or scorer.head:
        answer_log_probs = llama.answer_log_probs([ids], [answer.ids for answer in answers], hidden=hidden)
    else:
        answer_log_probs = log_probs[None, [answer.ids[0] for answer in answers]]
    probabilities, mass = tasks.label_probabilities(answer_log_probs, answers, list(task.labels))
    if not np.isfinite(probabilities).all():
        raise ValueError(NO_LABEL)
    by_label = dict(zip(task.labels, probabilities[0].tolist(), strict=True))
    prediction = max(by_label, key=by_label.__getitem__)
    counted = [
        {"token": answer.text, "ids": list(answer.ids), "probability": float(p), "label": answer.label}
        for answer, p in zip(answers, np.exp(answer_log_probs[0]), strict=True)
    ]
    counted.sort(key=lambda entry: -entry["probability"])
    confidence = by_label[prediction]
    extras = {"head_confidence": float(scorer.head.predict(hidden, confidence)[0])} if scorer.head else {}
    return {
        "text": text,
        "prompt": scorer.frame.render(shown),
        "prompt_token_ids": ids,
        "model": llama.name,
        "model_path": str(llama.path),
        "top_tokens": top_tokens(llama, log_probs, {answer.ids: answer.label for answer in answers}),
        "answer_tokens": {
            label: [{k: v for k, v in entry.items() if k != "label"} for entry in counted if entry["label"] == label]
            for label in task.labels
        },
        "probabilities": by_label,
        "label_mass": float(mass[0]),
        "total_probability": by_label[prediction] * float(mass[0]),
        "prediction": prediction,
        "confidence": confidence,
        **extras,
        "fingerprint": scorer.fingerprint,
    }


def explain_remote(text: str, remote: Remote) -> dict:
    """As `explain`, from what the server lists; what only a model loaded here knows is None."""
    task, prompt = remote.task, remote.ask(text)
    listing = remote.server.wait(remote.listing(text))
    by_label, mass, extras = tasks.listed_probabilities(listing.tokens, task, listing.complete)
    prediction = max(by_label, key=by_label.__getitem__)
    tokens = [{"token": t, "id": None, "logprob": p, "label": task.label_of(t)} for t, p in listing.tokens]
    is_ids = bool(remote.server.reader)
    return {
        "text": text,
        "prompt": remote.server.reader.frame_of(task).render(text) if is_ids else prompt,
        "prompt_token_ids": prompt if is_ids else None,
        "model": remote.server.name,
        "model_path": None,
        "top_tokens": tokens[:TOP_TOKENS],
        "answer_tokens": {
            label: [
                {"token": entry["token"], "ids": None, "probability": math.exp(entry["logprob"])}
                for entry in tokens
                if entry["label"] == label
            ]
            for label in task.labels
        },
        "probabilities": by_label,
        "label_mass": mass,
        "total_probability": by_label[prediction] * (extras["label_mass_high"] if extras.get("missing") else mass),
        "prediction": prediction,
        "confidence": by_label[prediction],
        **extras,
        "fingerprint": remote.fingerprint,
    }


def top_tokens(llama: Llama, log_probs: np.ndarray, label_of: dict[tuple[int, ...], str]) -> list[dict]:
    """The most probable next tokens, best first, each under its own id, with the label it counts for or None."""
    order = np.argsort(-log_probs, kind="stable")[:TOP_TOKENS].tolist()
    return [
        {"token": llama.tokenizer.decode([i]), "id": i, "logprob": float(log_probs[i]), "label": label_of.get((i,))}
        for i in order
    ]


def print_token_table(tokens: list[dict], rows: int = 12) -> None:
    print("  rank  token            log-prob    percent  counts for")
    for rank, entry in enumerate(tokens[:rows], 1):
        token = f'"{predictions.printable(entry["token"])}"'
        percent = 100 * np.exp(entry["logprob"])
        print(f"  {rank:4}  {token:15} {entry['logprob']:9.3f}  {percent:7.2f} %  {entry['label'] or ''}".rstrip())


def print_answer_sums(row: dict) -> None:
    """Per label: its probability, as the sum it is; then the label mass."""
    width = max(map(len, [*row["probabilities"], "label mass"])) + 3
    shared = row["label_mass_high" if row.get("missing") else "label_mass"]  # what the probabilities are shares of
    for label, entries in row["answer_tokens"].items():
        if label in row.get("missing", ()):
            print(
                f"  {f'P({label})':{width}}          not listed; it counts with all that is not, the most it can have"
            )
            continue
        total = 100 * row["probabilities"][label] * shared
        parts = [f'{100 * e["probability"]:.2f} "{predictions.printable(e["token"])}"' for e in entries[:4]]
        rest = f" + {len(entries) - 4} more" if len(entries) > 4 else ""
        print(f"  {f'P({label})':{width}} {total:6.2f} %  = {' + '.join(parts)}{rest}")
    high = row.get("label_mass_high", row["label_mass"])
    more = f", up to {100 * high:.2f} % with what is not listed" if high > row["label_mass"] else ""
    print(f"  {'label mass':{width}} {100 * row['label_mass']:6.2f} %  of the distribution names a label{more}")


def print_explanation(row: dict) -> None:
    """The token table, the sums and the verdict, as the article prints them."""
    print(f"Text: {predictions.printable(row['text'])}\n")
    print_token_table(row["top_tokens"])
    print()
    print_answer_sums(row)
    confidence, total = 100 * row["confidence"], 100 * row["total_probability"]
    print(f"\n  Verdict: {row['prediction']}, confidence {confidence:.2f} % (total probability {total:.2f} %)")
    if "head_confidence" in row:
        print(f"  Confidence head: {100 * row['head_confidence']:.2f} % that this is right")
    predictions.print_decision(row)
    print()


# A table of texts


def score(
    examples: Sequence[Example],
    scorer: Scorer,
    batch_size: int | None = None,
    advance: Callable[[int], None] = lambda n: None,
) -> list[Prediction]:
    """Score examples together, in their order; one that can not be scored gets its error and no number."""
    llama, task = scorer.llama, scorer.task
    common = {"method": "logprobs", "model": llama.name, "task": task.name, "fingerprint": scorer.fingerprint}
    errors: dict[int, str] = {}
    rows: dict[int, tuple[list[int], str]] = {}
    for i, example in enumerate(examples):
        try:
            rows[i] = llama.encode_within(scorer.frame, example.text, scorer.room, scorer.truncate)
        except ValueError as error:
            errors[i] = str(error)
    advance(len(errors))
    hidden = np.empty((len(rows), llama.hidden_size), np.float32) if scorer.head else None
    log_probs = llama.answer_log_probs(
        [ids for ids, _ in rows.values()], [answer.ids for answer in scorer.answers], batch_size, advance, hidden
    )
    probabilities, mass = tasks.label_probabilities(log_probs, scorer.answers, list(task.labels))
    head_confidence = scorer.head.predict(hidden, probabilities.max(axis=1)) if scorer.head else None
    result: dict[int, Prediction] = {}
    for at, (i, (_, shown)) in enumerate(rows.items()):
        if not np.isfinite(probabilities[at]).all():
            errors[i] = NO_LABEL
            continue
        by_label = dict(zip(task.labels, probabilities[at].tolist(), strict=True))
        extras = {"truncated": True} if shown != examples[i].text else {}
        if scorer.head:
            extras["head_confidence"] = float(head_confidence[at])
        record = *task.identify(examples[i]), by_label, float(mass[at])
        result[i] = predictions.scored(*record, **common, extras=extras)
    for i, message in errors.items():
        result[i] = predictions.failed(*task.identify(examples[i]), message, **common)
    return [result[i] for i in range(len(examples))]


def score_remote(examples: Iterator[Example], advance: Callable[[int], None], remote: Remote) -> Iterator[Prediction]:
    """Score examples by a server, several at a time, in their order; one that fails gets its error and no number."""
    server, task = remote.server, remote.task
    common = {"method": "logprobs", "model": server.name, "task": task.name, "fingerprint": remote.fingerprint}

    async def score_one(example: Example) -> Prediction:
        record = task.identify(example)
        try:
            listing = await remote.listing(example.text)
            by_label, mass, extras = tasks.listed_probabilities(listing.tokens, task, listing.complete)
        except ValueError as error:
            extras = {predictions.RETRY: True} if isinstance(error, PassingError) else {}
            return predictions.failed(*record, str(error), **common, extras=extras)
        return predictions.scored(*record, by_label, mass, **common, extras=extras)

    for row in server.in_order(score_one, examples):
        advance(1)
        yield row


def score_windows(
    examples: Iterator[Example], advance: Callable[[int], None], scorer: Scorer, batch_size: int | None, size: int
) -> Iterator[Prediction]:
    """Score examples by the model loaded here, a window of rows at a time."""
    while window := list(islice(examples, size)):
        yield from score(window, scorer, batch_size, advance)


def score_table(args: argparse.Namespace, scorer: Scorer | Remote, path: Path, total: int) -> int:
    """Write or continue the predictions file of a whole table; returns how many rows were scored now."""
    size = 1 if args.endpoint else ROWS_PER_WINDOW.get(scorer.llama.device, 256)
    score_rows = partial(score_remote, remote=scorer)
    if not args.endpoint:
        score_rows = partial(score_windows, scorer=scorer, batch_size=args.batch_size, size=size)
    examples, identify = partial(tasks.examples_from, args), scorer.task.identify
    return predictions.write_table(
        path, examples, identify, score_rows, scorer.fingerprint, total, size, args.overwrite
    )


def write_debiased(args: argparse.Namespace, scorer: Scorer | Remote, raw: Path, path: Path) -> None:
    """Batch calibration of a finished predictions file by the labels' mean over all its rows; see task.debias."""
    labels = list(scorer.task.labels)
    sums, count, total = np.zeros(len(labels)), 0, 0
    for row in predictions.iterate(raw):
        total += 1
        if row.error is None:
            sums, count = sums + [row.probabilities[label] for label in labels], count + 1

    def corrected() -> Iterator[Prediction]:
        for row in predictions.iterate(raw):
            common = {"method": row.method, "model": row.model, "task": row.task, "fingerprint": scorer.fingerprint}
            if row.error is not None:
                yield predictions.failed(row.id, row.text, row.label, row.error, **common)
                continue
            p = tasks.debias(np.array([[row.probabilities[label] for label in labels]]), sums / count)[0]
            by_label = dict(zip(labels, p.tolist(), strict=True))
            extras = {k: v for k, v in row.extras.items() if k not in predictions.CALIBRATED}
            yield predictions.scored(row.id, row.text, row.label, by_label, row.label_mass, **common, extras=extras)

    with predictions.open_output(path) as file:
        expected = (scorer.task.identify(example) for example in tasks.examples_from(args))
        done = predictions.resume(file, expected, scorer.fingerprint, args.overwrite)
    if done < total:
        predictions.replace(path, corrected())


# Command line


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = predictions.ArgumentParser(__doc__)
    add = parser.add_argument
    add("text", metavar="TEXT", nargs="*", help="texts to classify and explain")
    add("--raw-prompt", action="store_true", help="no task: show the next token after each TEXT as it stands")
    tasks.add_arguments(parser)
    add("--truncate", action="store_true", help="shorten a text too long for the model, instead of failing its row")
    add("--debias", choices=["batch"], help="divide by the labels' mean over the table; for balanced labels only")
    add("--confidence-head", action="store_true", help="add the adapter's own estimate of being right")
    predictions.add_arguments(parser)
    add_model_arguments(parser)
    endpoint.add_arguments(parser)
    add("--batch-size", type=int, metavar="N", help="rows run together (default: by length and device)")
    args = parser.parse_args(argv)
    predictions.check_arguments(parser, args)
    endpoint.check_arguments(parser, args)
    if args.debias and not args.input:
        parser.error("--debias batch needs a table (--input FILE): it is estimated from many texts")
    if args.confidence_head and (args.raw_prompt or args.endpoint or args.debias):
        parser.error("--confidence-head reads the last hidden state of an adapter's own answer; leave the other out")
    if args.raw_prompt and (args.input or args.calibrator or args.endpoint):
        parser.error("--raw-prompt shows the next token after texts, of a model loaded here; it gives no label")
    if args.batch_size is not None and args.batch_size < 1:
        parser.error(f"--batch-size {args.batch_size}: at least 1")
    return args


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_arguments(argv)
    task = tasks.read_task(args.task)
    total = 0 if args.text else check_table(args, task)
    calibrator = None
    if args.calibrator:
        from calibration import load_calibrator

        calibrator = load_calibrator(args.calibrator)
    with ExitStack() as stack:
        if args.endpoint:
            server = stack.enter_context(endpoint.connect_from(args, args.tokenizer and load_reader(args.tokenizer)))
            model, join = server, prepare_remote
        else:
            model = load_from(args, task.settings())
            join = partial(prepare, truncate=args.truncate, use_head=args.confidence_head)
        if args.raw_prompt:
            show_next_tokens(args, model)
            return
        scorer = join(model, task)
        final = join(model, task, debias=args.debias) if args.debias else scorer
        if calibrator:
            calibrator.check(final.fingerprint, model.name, task.name, list(task.labels))
        if args.text:
            explain_texts(args, scorer, calibrator)
        else:
            run_table(args, scorer, final, total, calibrator)


def show_next_tokens(args: argparse.Namespace, llama: Llama) -> None:
    """The next token after each text as it stands, its outer white space too."""
    for text in args.text:
        before, inner, after = text.partition(text.strip())
        ids, _ = llama.encode_within(Frame(before, after, llama.frame(SLOT).start), inner)
        tokens = top_tokens(llama, llama.next_token_log_probs(ids), {})
        if args.json:
            print(json.dumps({"text": text, "prompt_token_ids": ids, "top_tokens": tokens}))
            continue
        print(f"After: {predictions.printable(text)}\n")
        print_token_table(tokens)
        print()


def explain_texts(args: argparse.Namespace, scorer: Scorer | Remote, calibrator: FittedCalibrator | None) -> None:
    for text in args.text:
        row = explain_remote(text, scorer) if args.endpoint else explain(text, scorer)
        if calibrator:
            common = {"method": "logprobs", "task": scorer.task.name, "model": row["model"]}
            common["fingerprint"] = row["fingerprint"]
            record = predictions.scored("", text, None, row["probabilities"], row["label_mass"], **common)
            row |= calibrator.apply([record], args.threshold)[0].extras
        if args.json:
            print(json.dumps(row))
        else:
            print_explanation(row)


def check_table(args: argparse.Namespace, task: Task) -> int:
    """Check everything about a table that can be checked without the model; returns its rows."""
    for path in outputs(args):
        predictions.check_output(path, args.input)
        predictions.check_output(path, args.calibrator)
    return tasks.check_examples(tasks.examples_from(args), task, args.input)


def outputs(args: argparse.Namespace) -> list[Path]:
    """The file of the model's own predictions, and with --debias that of the corrected ones."""
    output = Path(args.output)
    return [output.with_suffix(".raw.jsonl"), output] if args.debias else [output]


def run_table(
    args: argparse.Namespace,
    scorer: Scorer | Remote,
    final: Scorer | Remote,
    total: int,
    calibrator: FittedCalibrator | None,
) -> None:
    """Score a table; report what the file now holds."""
    raw, output = outputs(args)[0], outputs(args)[-1]
    started = time.monotonic()
    count = score_table(args, scorer, raw, total)
    if count:
        seconds = time.monotonic() - started
        print(f"scored {count:,} rows in {seconds:.1f} s, {count / seconds:.1f} a second", file=sys.stderr)
    print(predictions.report(raw))
    if args.debias:
        write_debiased(args, final, raw, output)
        print(predictions.report(output))
    if calibrator:
        from calibration import calibrate_file

        print(calibrate_file(output, calibrator, args.threshold))


if __name__ == "__main__":
    predictions.run(main, resumes=True)
