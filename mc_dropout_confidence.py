"""Monte Carlo dropout, an experiment: is the text open, or did fine-tuning leave open how to read it?

    p_t = Method 1's probabilities over the labels under draw t of the adapter's dropout,    p = mean of p_t
    H(p) = aleatoric + epistemic,    aleatoric = mean of H(p_t),    epistemic = H(p) - mean of H(p_t),    in nats

    python mc_dropout_confidence.py --adapter fine_tuned_model "Not bad" "Best worst thing ever"
    python mc_dropout_confidence.py --adapter fine_tuned_model --input reviews.csv --output dropout.jsonl

A pass leaves out a random part of every LoRA layer's inputs, as training did: one draw from an approximate posterior
of the adapter's weights (Gal and Ghahramani, "Dropout as a Bayesian approximation", ICML 2016). Passes that all find
the text open are aleatoric; passes that are sure of different labels are epistemic, the mutual information of label and
weights (Houlsby et al., arXiv 1112.5745; Depeweg et al., ICML 2018). The base model's weights are never drawn: what it
does not know counts as aleatoric. All rows see the same draws.

It needs an adapter that was trained with dropout (fine_tune_model.py --dropout 0.05). A pass is divided by its label
mass, then probabilities are averaged: the posterior predictive of the label, given that one is named. A table becomes a
predictions file (predictions.py) with `epistemic` and `aleatoric`; repeating the command continues a run that was
killed. With labels in the table it ends with how well confidence and epistemic part tell right from wrong.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING

import numpy as np

import command_line
import predictions
import scoring
import tables
import task as tasks
from calibration_metrics import auroc, bootstrap_interval
from llama import Llama, RenderedPrompt, default_llama, model_arguments
from llama import add_arguments as add_model_arguments
from predictions import Prediction
from task import Answer, Example, Task

if TYPE_CHECKING:
    from calibration import FittedCalibrator

PASSES = 20
DRAWS = 1  # the third number of a pass's seed: training draws its masks by the first two
NO_LABEL = "the model gives no label any probability"
TRAIN_ONE = "train one with fine_tune_model.py --dropout 0.05 and name its folder with --adapter"
# Rows that go through all passes and are written together, by device: what a killed run can lose.
ROWS_PER_WINDOW = {"cpu": 64, "mps": 256, "cuda": 1024}


@dataclass(frozen=True)
class Scorer:
    """A model with an adapter, a task and how to draw, and what follows: prompt, answer tokens, fingerprint."""

    llama: Llama
    task: Task
    frame: RenderedPrompt
    answers: tuple[Answer, ...]
    passes: int
    seed: int
    truncate: bool
    fingerprint: str

    @property
    def common(self) -> dict:
        """What all its records say."""
        names = {"method": "mc-dropout", "model": self.llama.name, "task": self.task.name}
        return names | {"fingerprint": self.fingerprint}

    def encode(self, text: str) -> tuple[list[int], str]:
        """(ids of the prompt, the text that it shows); ValueError for a text that cannot be put to the model."""
        room = max(len(answer.ids) for answer in self.answers) - 1
        return self.llama.encode_within(self.frame, text, room, self.truncate)

    def read(self, rows: Sequence[Sequence[int]], *options: object) -> tuple[np.ndarray, np.ndarray]:
        """(probabilities [rows, labels], label mass [rows]) of prompts (ids), by the model as it is now."""
        log_probs = self.llama.answer_log_probs(rows, [answer.ids for answer in self.answers], *options)
        return tasks.label_probabilities(log_probs, self.answers, list(self.task.labels))


def prepare(llama: Llama, task: Task, passes: int = PASSES, seed: int = 0, truncate: bool = False) -> Scorer:
    """Join a model and a task; ValueError when no dropout can be drawn or the task does not work with the model."""
    if passes < 2:
        raise ValueError(f"passes is {passes}: at least 2, for one alone differs from nothing")
    check_dropout(llama)
    frame = llama.task_prompt(task)
    answers = tasks.find_answers(task, llama.tokenizer, frame.render("text"))
    settings = {"passes": passes, "seed": seed} | ({"truncate": True} if truncate else {})
    identity = {**llama.identity, "task": task.settings(), "method": "mc-dropout", "settings": settings}
    return Scorer(llama, task, frame, tuple(answers), passes, seed, truncate, predictions.fingerprint(**identity))


def check_dropout(llama: Llama) -> None:
    """ValueError unless the model has an adapter with dropout: else all passes would be the same, and look certain."""
    adapters = getattr(llama.model, "peft_config", {}).values()
    if not adapters:
        raise ValueError(f"{llama.name} has no LoRA adapter here, so there is no dropout to draw; {TRAIN_ONE}")
    if not any(adapter.lora_dropout for adapter in adapters):
        raise ValueError(f"the adapter has lora_dropout 0 (adapter_config.json), so nothing is drawn; {TRAIN_ONE}")
    if any(getattr(layer, "lora_variant", None) for layer in llama.model.modules()):
        raise ValueError(f"the adapter is a variant of LoRA, as DoRA, whose dropout cannot be drawn; {TRAIN_ONE}")


def get_mc_dropout_confidence(
    text: str, passes: int = PASSES, llama: Llama | None = None, task: Task | None = None, seed: int = 0
) -> tuple[str, float, float, float]:
    """(predicted label, its mean probability, epistemic and aleatoric part in nats) of one text.

    By default the embedded model with the adapter that fits it and task `sentiment`. Raises ValueError for an empty
    text, fewer than two passes, and a model without an adapter that has dropout.
    """
    task = task or tasks.TASKS["sentiment"]
    row = explain(text, prepare(llama or default_llama(json.dumps(task.settings())), task, passes, seed))
    return row["prediction"], row["confidence"], row["epistemic"], row["aleatoric"]


# Passes


def run_passes(
    rows: Sequence[Sequence[int]],
    scorer: Scorer,
    batch_size: int | None = None,
    advance: Callable[[int], None] = lambda n: None,
) -> tuple[np.ndarray, np.ndarray]:
    """(probabilities [passes, rows, labels], label mass [passes, rows]) of prompts (ids).

    `advance(1)` for every so many results as there are passes, so that what is counted are rows.
    """
    done, found = 0, []

    def count(n: int) -> None:
        nonlocal done
        before, done = done, done + n
        advance(done // scorer.passes - before // scorer.passes)

    for number in range(scorer.passes):
        with scorer.llama.evaluating(), scorer.llama.dropping_out([scorer.seed, number, DRAWS]):
            found.append(scorer.read(rows, batch_size, count))
    probabilities, mass = zip(*found, strict=True)
    return np.stack(probabilities), np.stack(mass)


def decompose(probabilities: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(epistemic [rows], aleatoric [rows]) in nats of the passes' probabilities [passes, rows, labels].

    Entropy is concave, so the epistemic part is not negative but for rounding.
    """
    aleatoric = entropy(probabilities).mean(axis=0)
    return np.maximum(entropy(probabilities.mean(axis=0)) - aleatoric, 0.0), aleatoric


def entropy(probabilities: np.ndarray) -> np.ndarray:
    """-sum p log p over the last axis, in nats; 0 log 0 is 0."""
    return -(probabilities * np.log(np.where(probabilities > 0, probabilities, 1.0))).sum(axis=-1) + 0.0


def score(
    examples: Sequence[Example],
    scorer: Scorer,
    batch_size: int | None = None,
    advance: Callable[[int], None] = lambda n: None,
) -> list[Prediction]:
    """Score examples together, in their order; one that cannot be scored gets its error and no number."""
    rows, errors = {}, {}
    for i, example in enumerate(examples):
        try:
            rows[i] = scorer.encode(example.text)
        except ValueError as error:
            errors[i] = str(error)
    advance(len(errors))
    probabilities, mass = run_passes([ids for ids, _ in rows.values()], scorer, batch_size, advance)
    columns = probabilities.mean(axis=0), mass.mean(axis=0), *decompose(probabilities)
    found = dict(zip(rows, zip(*columns, strict=True), strict=True))
    result = []
    for i, example in enumerate(examples):
        identity = scorer.task.identify(example)
        if i in errors or not np.isfinite(found[i][0]).all():
            result.append(predictions.failed(*identity, errors.get(i, NO_LABEL), **scorer.common))
            continue
        p, label_mass, epistemic, aleatoric = (value.tolist() for value in found[i])
        extras = {"epistemic": epistemic, "aleatoric": aleatoric}
        extras |= {"truncated": True} if rows[i][1] != example.text else {}
        by_label = dict(zip(scorer.task.labels, p, strict=True))
        result.append(predictions.scored(*identity, by_label, label_mass, **scorer.common, extras=extras))
    return result


# One text, explained


def explain(text: str, scorer: Scorer) -> dict:
    """Score a text and show the work, for JSON: every pass, their mean and its parts, the model without dropout."""
    ids, shown = scorer.encode(text)
    probabilities, mass = (found[:, 0] for found in run_passes([ids], scorer))
    with scorer.llama.evaluating():
        plain, plain_mass = (found[0] for found in scorer.read([ids]))
    if not (np.isfinite(probabilities).all() and np.isfinite(plain).all()):
        raise ValueError(NO_LABEL)
    mean = _answer(probabilities.mean(axis=0), mass.mean(), scorer.task)
    epistemic, aleatoric = (part.item() for part in decompose(probabilities))
    return {
        "text": text,
        "prompt": scorer.frame.render(shown),
        "model": scorer.llama.name,
        "model_path": str(scorer.llama.path),
        "passes": [_answer(*of_pass, scorer.task) for of_pass in zip(probabilities, mass, strict=True)],
        "without_dropout": _answer(plain, plain_mass, scorer.task),
        **mean,
        "total_probability": mean["confidence"] * mean["label_mass"],
        "epistemic": epistemic,
        "aleatoric": aleatoric,
        "fingerprint": scorer.fingerprint,
    }


def _answer(probabilities: np.ndarray, mass: np.ndarray, task: Task) -> dict:
    """What one distribution over the labels says."""
    by_label = dict(zip(task.labels, probabilities.tolist(), strict=True))
    prediction = max(by_label, key=by_label.__getitem__)
    numbers = {"probabilities": by_label, "label_mass": float(mass)}
    return numbers | {"prediction": prediction, "confidence": by_label[prediction]}


def print_explanation(row: dict) -> None:
    """The labels without dropout and over the passes, the two parts of their entropy, the verdict."""
    passes, plain, n = row["passes"], row["without_dropout"], len(row["passes"])
    lines = [["", "without dropout", f"mean of {n} passes", "lowest", "highest"]]
    for name in [*row["probabilities"], "label mass"]:
        values = [one["probabilities"].get(name, one["label_mass"]) for one in (plain, row, *passes)]
        shown = (*values[:2], min(values[2:]), max(values[2:]))
        lines.append([name, *(f"{100 * value:.2f} %" for value in shown)])
    print(f"Text: {command_line.printable(row['text'])}\n")
    print(command_line.columns(lines, "  "))
    total = row["aleatoric"] + row["epistemic"]
    parts = [f"{name} {row[name]:.3g} ({share(row[name], total)})" for name in ("aleatoric", "epistemic")]
    print(f"\n  entropy {total:.3g} nats = {' + '.join(parts)}")
    agree = sum(one["prediction"] == row["prediction"] for one in passes)
    print(f"\n  Verdict: {row['prediction']}, confidence {100 * row['confidence']:.2f} %", end=" ")
    print(f"({agree} of {n} passes; without dropout {plain['prediction']}, {100 * plain['confidence']:.2f} %)")
    scoring.print_decision(row)
    print()


def share(part: float, total: float) -> str:
    """A part of an entropy in per cent; of no entropy none."""
    return f"{100 * part / total if total else 0:.3g} %"


# A table of texts


def score_table(args: argparse.Namespace, scorer: Scorer, total: int) -> int:
    """Write or continue the predictions file of a whole table; returns how many rows were scored now."""
    size = ROWS_PER_WINDOW.get(scorer.llama.device, 64)

    def score_windows(examples: Iterator[Example], advance: Callable[[int], None]) -> Iterator[Prediction]:
        while window := list(islice(examples, size)):
            yield from score(window, scorer, args.batch_size, advance)

    examples, identify = partial(tasks.examples_from, args), scorer.task.identify
    return predictions.write_table(
        args.output, examples, identify, score_windows, scorer.fingerprint, total, size, args.overwrite
    )


def report(path: str, groups: str | None = None) -> str:
    """What a predictions file of this method holds: the usual lines, the mean of either part, with labels the ranking.

    `groups` is a table of id and group, by default near-duplicate texts are one.
    """
    rows = [row for row in predictions.iterate(path) if row.error is None]
    lines = [scoring.report(path)]
    if rows:
        aleatoric, epistemic = (np.mean([row.extras[name] for row in rows]) for name in ("aleatoric", "epistemic"))
        of_it = share(epistemic, aleatoric + epistemic)
        lines.append(f"  mean entropy: aleatoric {aleatoric:.3g} nats, epistemic {epistemic:.3g} nats ({of_it} of it)")
    labelled = [row for row in rows if row.label is not None]
    if 0 < sum(row.prediction == row.label for row in labelled) < len(labelled):
        lines.append(ranking(labelled, tables.groups_of(labelled, groups)))
    return "\n".join(lines)


def ranking(rows: Sequence[Prediction], groups: Sequence[object]) -> str:
    """AUROC of confidence and of -epistemic for being right, and their difference, paired."""
    right = np.array([row.prediction == row.label for row in rows])
    scores = np.array([(row.confidence, -row.extras["epistemic"]) for row in rows]).T

    def areas(chosen: np.ndarray) -> list[float]:
        one, two = (auroc(values[chosen], right[chosen]) for values in scores)
        return [one, two, two - one]

    found = zip(areas(np.arange(len(rows))), bootstrap_interval(areas, groups), strict=True)
    shown = [f"{value:.3f} [{low:.3f}, {high:.3f}]" for value, (low, high) in found]
    n, n_groups = len(rows), len(set(groups))
    grouped = f" in {n_groups:,} groups" if n_groups < n else ""
    return (
        f"  AUROC for being right: confidence {shown[0]}, -epistemic {shown[1]}, difference {shown[2]}\n"
        f"    (n = {n:,} labelled rows{grouped}, nothing fitted, brackets are 95 % intervals)"
    )


# Command line


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = command_line.ArgumentParser(__doc__)
    add = parser.add_argument
    add("text", metavar="TEXT", nargs="*", help="texts to classify and explain")
    add("--passes", type=int, default=PASSES, metavar="N", help=f"draws of the dropout (default: {PASSES})")
    add("--seed", type=command_line.natural, default=0, metavar="N", help="of the draws (default: 0)")
    tasks.add_arguments(parser)
    tables.add_groups_argument(parser)
    add("--truncate", action="store_true", help="shorten a text too long for the model, instead of failing its row")
    scoring.add_arguments(parser)
    add_model_arguments(parser)
    add("--batch-size", type=int, metavar="N", help="rows run together (default: by length and device)")
    args = parser.parse_args(argv)
    scoring.check_arguments(parser, args)
    if args.groups is not None and not args.input:
        parser.error("--groups is for the report on a table (--input FILE)")
    for name, least in (("passes", 2), ("batch_size", 1)):
        if (value := getattr(args, name)) is not None and value < least:
            parser.error(f"--{name.replace('_', '-')} {value}: at least {least}")
    if args.adapter == "none":
        parser.error(f"--adapter none leaves no dropout to draw; {TRAIN_ONE}")
    return args


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_arguments(argv)
    task = tasks.read_task(args.task)
    total = check_table(args, task) if args.input else 0
    calibrator = None
    if args.calibrator:
        from calibration import load_calibrator

        calibrator = load_calibrator(args.calibrator)
    scorer = prepare(load_from(args, task.settings()), task, args.passes, args.seed, args.truncate)
    if calibrator:
        calibrator.check(scorer.fingerprint, scorer.llama.name, task.name, list(task.labels))
    if args.text:
        explain_texts(args, scorer, calibrator)
    else:
        run_table(args, scorer, total, calibrator)


def check_table(args: argparse.Namespace, task: Task) -> int:
    """Check everything about a table that can be checked without the model; returns its rows."""
    for other in (args.input, args.calibrator, args.groups):
        predictions.check_output(args.output, other)
    if args.groups is not None:
        tables.groups_of(list(tasks.examples_from(args)), args.groups)
    return tasks.check_examples(tasks.examples_from(args), task, args.input)


def explain_texts(args: argparse.Namespace, scorer: Scorer, calibrator: FittedCalibrator | None) -> None:
    for text in args.text:
        row = explain(text, scorer)
        if calibrator:
            record = predictions.scored("", text, None, row["probabilities"], row["label_mass"], **scorer.common)
            row |= calibrator.apply([record], args.threshold)[0].extras
        if args.json:
            print(json.dumps(row))
        else:
            print_explanation(row)


def run_table(args: argparse.Namespace, scorer: Scorer, total: int, calibrator: FittedCalibrator | None) -> None:
    """Score a table; report what the file now holds."""
    started = time.monotonic()
    if count := score_table(args, scorer, total):
        seconds = time.monotonic() - started
        print(f"scored {count:,} rows in {seconds:.1f} s, {count / seconds:.1f} a second", file=sys.stderr)
    print(report(args.output, args.groups))
    if calibrator:
        from calibration import calibrate_file

        print(calibrate_file(args.output, calibrator, args.threshold))


if __name__ == "__main__":
    command_line.run(main, resumes=True)
