"""Method 1, total probability: how much of the model's next-token distribution names each label.

    P(label) = sum of softmax probability over every token that spells one of the label's answer words
    label mass = sum of P over the labels;  confidence = P(label) / label mass;  total probability = P(label)

    python logprobs_confidence.py "I absolutely love this amazing movie!" "Not bad"
    python logprobs_confidence.py --raw-prompt "Knock knock."
    python logprobs_confidence.py --input reviews.csv --output predictions.jsonl
    python logprobs_confidence.py --calibrator calibrator.json "Not bad"      # with calibrated confidence and decision

Single texts are explained: the ranked token table with the label each token counts for, the sums, the verdict
(`--json`: one object a line). A table of texts becomes a predictions file (predictions.py), in input order; repeating
the command continues a run that was killed. With labels in the table it ends with a short report.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

import predictions
import task as tasks
from llama import SLOT, Frame, Llama, load_from, load_llama
from llama import add_arguments as add_model_arguments
from predictions import Prediction
from task import Answer, Example, Task

if TYPE_CHECKING:
    from calibration import FittedCalibrator

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

    @property
    def room(self) -> int:
        """Tokens of the context that an answer needs beyond its first."""
        return max(len(answer.ids) for answer in self.answers) - 1


def prepare(llama: Llama, task: Task, truncate: bool = False, **settings: object) -> Scorer:
    """Join a model and a task; ValueError when the task's answers do not work with this model's tokenizer."""
    frame = llama.frame(task.prompt(SLOT))
    answers = tasks.find_answers(task, llama.tokenizer, frame.render("text"))
    settings = {"truncate": True} | settings if truncate else settings
    fingerprint = predictions.fingerprint(**llama.identity, task=task.settings(), method="logprobs", settings=settings)
    return Scorer(llama, task, frame, tuple(answers), truncate, fingerprint)


def get_confidence(text: str, llama: Llama | None = None, task: Task | None = None) -> tuple[str, float]:
    """(predicted label, its confidence in [0, 1]) of one text; by default the embedded model and task `sentiment`.

    Raises ValueError for an empty text and for one too long for the model.
    """
    task = task or tasks.TASKS["sentiment"]
    row = explain(text, prepare(llama or _default_llama(json.dumps(task.settings())), task))
    return row["prediction"], row["confidence"]


@lru_cache(maxsize=1)
def _default_llama(task_settings: str) -> Llama:
    return load_llama(adapter="auto", task=json.loads(task_settings))


# One text, explained


def explain(text: str, scorer: Scorer) -> dict:
    """Score a text and show the work: prompt, token table, answers, sums, verdict. One plain forward pass, for JSON."""
    llama, task, answers = scorer.llama, scorer.task, scorer.answers
    ids, shown = llama.encode_within(scorer.frame, text, scorer.room, scorer.truncate)
    log_probs = llama.next_token_log_probs(ids)
    if scorer.room:
        answer_log_probs = llama.answer_log_probs([ids], [answer.ids for answer in answers])
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
        "confidence": by_label[prediction],
        "fingerprint": scorer.fingerprint,
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
    for label, entries in row["answer_tokens"].items():
        total = 100 * row["probabilities"][label] * row["label_mass"]
        parts = [f'{100 * e["probability"]:.2f} "{predictions.printable(e["token"])}"' for e in entries[:4]]
        rest = f" + {len(entries) - 4} more" if len(entries) > 4 else ""
        print(f"  {f'P({label})':{width}} {total:6.2f} %  = {' + '.join(parts)}{rest}")
    print(f"  {'label mass':{width}} {100 * row['label_mass']:6.2f} %  of the distribution names a label")


def print_explanation(row: dict) -> None:
    """The token table, the sums and the verdict, as the article prints them."""
    print(f"Text: {predictions.printable(row['text'])}\n")
    print_token_table(row["top_tokens"])
    print()
    print_answer_sums(row)
    confidence, total = 100 * row["confidence"], 100 * row["total_probability"]
    print(f"\n  Verdict: {row['prediction']}, confidence {confidence:.2f} % (total probability {total:.2f} %)")
    if "decision" in row:
        seen = "; the calibrator was fitted on this very text" if row.get("fitted_on") else ""
        print(f"  Calibrated confidence {100 * row['calibrated_confidence']:.2f} %: {row['decision']}{seen}")
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
    log_probs = llama.answer_log_probs(
        [ids for ids, _ in rows.values()], [answer.ids for answer in scorer.answers], batch_size, advance
    )
    probabilities, mass = tasks.label_probabilities(log_probs, scorer.answers, list(task.labels))
    result: dict[int, Prediction] = {}
    for at, (i, (_, shown)) in enumerate(rows.items()):
        if not np.isfinite(probabilities[at]).all():
            errors[i] = NO_LABEL
            continue
        by_label = dict(zip(task.labels, probabilities[at].tolist(), strict=True))
        extras = {"truncated": True} if shown != examples[i].text else {}
        record = *_identity(examples[i], task), by_label, float(mass[at])
        result[i] = predictions.scored(*record, **common, extras=extras)
    for i, message in errors.items():
        result[i] = predictions.failed(*_identity(examples[i], task), message, **common)
    return [result[i] for i in range(len(examples))]


def _identity(example: Example, task: Task) -> tuple[str, str, str | None]:
    """What a record repeats of its example: id, text and the label in the task's spelling."""
    label = None if example.label is None else task.canonical_label(example.label)
    if label is None and example.label is not None:
        raise ValueError(f"row {example.id!r}: {example.label!r} is not a label of task {task.name!r}")
    return example.id, example.text, label


def score_table(args: argparse.Namespace, scorer: Scorer, path: Path, total: int) -> int:
    """Write or continue the predictions file of a whole table; returns how many rows were scored now."""
    with predictions.open_output(path) as file:
        expected = (_identity(example, scorer.task) for example in tasks.examples_from(args))
        done = predictions.resume(file, expected, scorer.fingerprint, args.overwrite)
        if done == total:
            return 0
        # Windows start at fixed rows, so a continued run makes the same batches and numbers as an unbroken one.
        size = ROWS_PER_WINDOW.get(scorer.llama.device, 256)
        start = done - done % size
        examples = islice(tasks.examples_from(args), start, None)
        with predictions.progress(total, start) as advance:
            while window := list(islice(examples, size)):
                rows = score(window, scorer, args.batch_size, advance)
                predictions.append(file, rows[max(0, done - start) :])
                start += len(rows)
    return total - done


def write_debiased(args: argparse.Namespace, scorer: Scorer, raw: Path, path: Path) -> None:
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
        expected = (_identity(example, scorer.task) for example in tasks.examples_from(args))
        done = predictions.resume(file, expected, scorer.fingerprint, args.overwrite)
    if done < total:
        predictions.replace(path, corrected())


def write_calibrated(path: Path, calibrator: FittedCalibrator, threshold: float | None) -> str:
    """Add calibrated confidence and decision to every row of a finished predictions file; returns what to say of it."""

    def applied() -> Iterator[Prediction]:
        rows = predictions.iterate(path)
        while chunk := list(islice(rows, 4096)):
            yield from calibrator.apply(chunk, threshold)

    decisions, changed = Counter(), False
    for row, before in zip(applied(), predictions.iterate(path), strict=True):
        decisions[row.extras.get("decision", "not scored")] += 1
        changed = changed or row != before
    if changed:
        predictions.replace(path, applied())
    counts = ", ".join(f"{decision} {count:,}" for decision, count in sorted(decisions.items()))
    value = calibrator.threshold and calibrator.threshold["value"] if threshold is None else threshold
    rule = "the calibrator promises nothing, so nothing is automated; --threshold sets a threshold of yours"
    return f"  calibrated: {counts} ({rule if value is None else f'automated from {value:.4f} on'})"


def report(path: Path) -> str:
    """Counts, label mass and confidence of a predictions file; with labels, accuracy and its exact interval."""
    total, rows = 0, []
    for row in predictions.iterate(path):
        total += 1
        if row.error is None:
            last, probability = list(row.probabilities.items())[-1]
            right, is_last = row.label and row.prediction == row.label, last == row.label
            rows.append((row.confidence, row.label_mass, right, probability, is_last))
            labels = list(row.probabilities)
    lines = [f"{path}: {len(rows):,} of {total:,} rows scored, {total - len(rows):,} with an error"]
    if rows:
        confidence, mass, _, _, _ = zip(*rows, strict=True)
        lines.append(
            f"  mean confidence {np.mean(confidence):.3f}, label mass {np.mean(mass):.3f} (lowest {min(mass):.3f})"
        )
    if labelled := [row[2:] for row in rows if row[2] is not None]:
        from scipy.stats import binomtest, mannwhitneyu

        right, probability, is_last = map(np.array, zip(*labelled, strict=True))
        n, k = len(right), int(right.sum())
        low, high = binomtest(k, n).proportion_ci(0.95, "exact")
        lines.append(f"  accuracy {k / n:.3f}, 95 % exact interval {low:.3f} to {high:.3f}, n = {n:,} labelled rows")
        if len(labels) == 2 and 0 < is_last.sum() < n:
            u = mannwhitneyu(probability[is_last], probability[~is_last]).statistic
            lines.append(f"  AUC of P({last}) {u / (is_last.sum() * (~is_last).sum()):.3f}")
    return "\n".join(lines)


# Command line


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = predictions.ArgumentParser(__doc__)
    add = parser.add_argument
    add("text", metavar="TEXT", nargs="*", help="texts to classify and explain")
    add("--json", action="store_true", help="print each explanation as one JSON object a line")
    add("--raw-prompt", action="store_true", help="no task: show the next token after each TEXT as it stands")
    tasks.add_arguments(parser)
    add("--truncate", action="store_true", help="shorten a text too long for the model, instead of failing its row")
    add("--debias", choices=["batch"], help="divide by the labels' mean over the table; for balanced labels only")
    predictions.add_arguments(parser)
    add_model_arguments(parser)
    add("--batch-size", type=int, metavar="N", help="rows run together (default: by length and device)")
    add("--calibrator", metavar="FILE", help="add calibrated confidence and decision; calibration_demo.py makes one")
    add(
        "--threshold", type=float, metavar="P", help="automate from this calibrated confidence on (default: the file's)"
    )
    args = parser.parse_args(argv)
    if bool(args.text) == bool(args.input):
        parser.error("give either texts or a table (--input FILE)")
    if bool(args.input) != bool(args.output):
        parser.error("--input and --output go together")
    if args.debias and not args.input:
        parser.error("--debias batch needs a table (--input FILE): it is estimated from many texts")
    if (args.raw_prompt or args.json) and args.input:
        parser.error("--raw-prompt and --json are for texts; a table becomes a predictions file, which is JSON Lines")
    if args.calibrator == "":
        parser.error("--calibrator needs a file name")
    if args.threshold is not None and not (args.calibrator and 0 <= args.threshold <= 1):
        parser.error("--threshold is a calibrated confidence between 0 and 1 and needs --calibrator")
    if args.calibrator and args.raw_prompt:
        parser.error("--raw-prompt gives no label, so there is nothing to calibrate")
    if args.batch_size is not None and args.batch_size < 1:
        parser.error(f"--batch-size {args.batch_size}: at least 1")
    return args


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_arguments(argv)
    task = tasks.read_task(args.task)
    if args.text:
        explain_texts(args, task)
    else:
        run_table(args, task)


def explain_texts(args: argparse.Namespace, task: Task) -> None:
    for number, text in enumerate(args.text, 1):
        if not text.strip():
            raise ValueError(f"text {number} is empty")
    calibrator = read_calibrator(args)
    llama = load_from(args, task.settings())
    scorer = None if args.raw_prompt else prepare(llama, task, args.truncate)
    if calibrator:
        calibrator.check(scorer.fingerprint, llama.name, task.name, list(task.labels))
    for text in args.text:
        if args.raw_prompt:
            before, inner, after = text.partition(text.strip())  # as it stands: the outer white space too
            ids, _ = llama.encode_within(Frame(before, after, llama.frame(SLOT).start), inner)
            tokens = top_tokens(llama, llama.next_token_log_probs(ids), {})
            row = {"text": text, "prompt_token_ids": ids, "top_tokens": tokens}
        else:
            row = explain(text, scorer)
        if calibrator:
            common = {"method": "logprobs", "task": task.name} | {key: row[key] for key in ("model", "fingerprint")}
            record = predictions.scored("", text, None, row["probabilities"], row["label_mass"], **common)
            row |= calibrator.apply([record], args.threshold)[0].extras
        if args.json:
            print(json.dumps(row))
        elif args.raw_prompt:
            print(f"After: {predictions.printable(text)}\n")
            print_token_table(row["top_tokens"])
            print()
        else:
            print_explanation(row)


def run_table(args: argparse.Namespace, task: Task) -> None:
    """Check everything that can be checked without the model, then score; report what the file now holds."""
    output = Path(args.output)
    raw = output.with_suffix(".raw.jsonl") if args.debias else output
    for path in {output, raw}:
        predictions.check_output(path, args.input)
        predictions.check_output(path, args.calibrator)
    total = tasks.check_examples(tasks.examples_from(args), task, args.input)
    calibrator = read_calibrator(args)
    llama = load_from(args, task.settings())
    scorer = prepare(llama, task, args.truncate)
    final = prepare(llama, task, args.truncate, debias=args.debias) if args.debias else scorer
    if calibrator:
        calibrator.check(final.fingerprint, llama.name, task.name, list(task.labels))
    started = time.monotonic()
    count = score_table(args, scorer, raw, total)
    if count:
        seconds = time.monotonic() - started
        print(f"scored {count:,} rows in {seconds:.1f} s, {count / seconds:.1f} a second", file=sys.stderr)
    print(report(raw))
    if args.debias:
        write_debiased(args, final, raw, output)
        print(report(output))
    if calibrator:
        print(write_calibrated(output, calibrator, args.threshold))


def read_calibrator(args: argparse.Namespace) -> FittedCalibrator | None:
    """The calibrator file that --calibrator names."""
    if not args.calibrator:
        return None
    from calibration import load_calibrator

    return load_calibrator(args.calibrator)


if __name__ == "__main__":
    predictions.run(main, resumes=True)
