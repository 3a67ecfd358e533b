"""Monte Carlo dropout, an experiment: is the text open, or did fine-tuning leave open how to read it?

    p_t = Method 1's probabilities over the labels under draw t of the adapter's dropout,    p = mean of p_t
    H(p) = aleatoric + epistemic,    aleatoric = mean of H(p_t),    epistemic = H(p) - mean of H(p_t),    in nats

    python mc_dropout_confidence.py --adapter fine_tuned_model "Not bad" "Best worst thing ever"
    python mc_dropout_confidence.py --adapter fine_tuned_model --input reviews.csv --output dropout.jsonl

    dropout_scorer(llama, task, passes=20).explain("Not bad")       # from Python; the keys are those of --json

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
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import command_line
import predictions
import scoring
import tables
from calibration_metrics import auroc, bootstrap_interval
from llama import Llama, load_llama, model_arguments
from llama import add_arguments as add_model_arguments
from logprobs_confidence import NO_LABEL, LabelScorer, label_scorer
from lora import dropping_out
from predictions import Prediction
from scoring import SavedRows
from tables import Example
from task import Task, label_probabilities, read_task

PASSES = 20
DRAWS = 1  # the third number of a pass's seed: training draws its masks by the first two
TRAIN_ONE = "train one with fine_tune_model.py --dropout 0.05 and name its folder with --adapter"
# Rows that go through all passes and are written together, by device: what a killed run can lose.
ROWS_PER_WINDOW = {"cpu": 32, "mps": 256, "cuda": 1024}
Rows = Sequence[Sequence[int]]  # the ids of some prompts


@dataclass(frozen=True)
class DropoutScorer:
    """Method 1 under draws of the adapter's dropout: how many, from which seed, and the fingerprint that follows."""

    method_1: LabelScorer
    passes: int
    seed: int
    fingerprint: str
    name = "mc-dropout"

    @property
    def task(self) -> Task:
        return self.method_1.task

    @property
    def model_name(self) -> str:
        return self.method_1.llama.name

    @property
    def window(self) -> int:
        return ROWS_PER_WINDOW.get(self.method_1.llama.device, 64)

    def run_once(self, rows: Rows, advance: Callable[[int], None] = lambda n: None) -> tuple[np.ndarray, np.ndarray]:
        """(probabilities [rows, labels], label mass [rows]) of prompts (ids), by the model as it is now."""
        one, answer_ids = self.method_1, [answer.ids for answer in self.method_1.answers]
        log_probs = one.llama.answer_log_probs(rows, answer_ids, one.batch_size, advance)
        return label_probabilities(log_probs, one.answers, list(self.task.labels))

    def run_passes(self, rows: Rows, advance: Callable[[int], None] = lambda n: None) -> tuple[np.ndarray, np.ndarray]:
        """(probabilities [passes, rows, labels], label mass [passes, rows]) of prompts (ids), each under its draw."""
        llama, probabilities, mass, results = self.method_1.llama, [], [], 0

        def count(n: int) -> None:  # a row is done for every `passes` results, so that progress counts rows
            nonlocal results
            rows_before, results = results // self.passes, results + n
            advance(results // self.passes - rows_before)

        for number in range(self.passes):
            with llama.evaluating(), dropping_out(llama, [self.seed, number, DRAWS]):
                p, label_mass = self.run_once(rows, count)
            probabilities.append(p)
            mass.append(label_mass)
        return np.stack(probabilities), np.stack(mass)

    def explain(self, text: str) -> dict:
        """Score a text and show the work: every pass, their mean and its parts, the model without dropout."""
        llama, labels = self.method_1.llama, self.task.labels
        ids, shown = self.method_1.encode(text)
        probabilities, mass = self.run_passes([ids])
        with llama.evaluating():
            plain, plain_mass = self.run_once([ids])
        if not (np.isfinite(probabilities).all() and np.isfinite(plain).all()):
            raise ValueError(NO_LABEL)
        mean = summary(labels, probabilities[:, 0].mean(axis=0), mass[:, 0].mean())
        epistemic, aleatoric = decompose(probabilities)
        return {
            "text": text,
            "prompt": self.method_1.prompt.render(shown),
            "model": llama.name,
            "model_path": str(llama.path),
            "passes": [summary(labels, *of_pass) for of_pass in zip(probabilities[:, 0], mass[:, 0], strict=True)],
            "without_dropout": summary(labels, plain[0], plain_mass[0]),
            **mean,
            "total_probability": mean["confidence"] * mean["label_mass"],
            "epistemic": float(epistemic[0]),
            "aleatoric": float(aleatoric[0]),
            "fingerprint": self.fingerprint,
        }

    score = scoring.by_windows

    def score_together(
        self,
        examples: Sequence[Example],
        advance: Callable[[int], None] = lambda n: None,
        saved: SavedRows | None = None,
    ) -> list[Prediction]:
        """Score examples in one sorting by length, returned in their order; no row is finished before all are."""
        common, records = scoring.record_fields(self), {}
        encoded, errors = scoring.encode_all(examples, self.method_1.encode)
        advance(len(errors))
        probabilities, mass = self.run_passes([ids for ids, _ in encoded.values()], advance)
        mean, mean_mass = probabilities.mean(axis=0), mass.mean(axis=0)
        epistemic, aleatoric = decompose(probabilities)
        for at, (number, (_, shown)) in enumerate(encoded.items()):
            if not np.isfinite(mean[at]).all():
                errors[number] = NO_LABEL
                continue
            by_label = dict(zip(self.task.labels, mean[at].tolist(), strict=True))
            extras = {"epistemic": float(epistemic[at]), "aleatoric": float(aleatoric[at])}
            extras |= {"truncated": True} if shown != examples[number].text else {}
            identity = self.task.identify(examples[number])
            records[number] = predictions.scored(*identity, by_label, float(mean_mass[at]), **common, extras=extras)
        for number, error in errors.items():
            records[number] = scoring.failed(self, examples[number], error)
        return [records[number] for number in range(len(examples))]


def dropout_scorer(
    llama: Llama, task: Task, passes: int = PASSES, seed: int = 0, truncate: bool = False, batch_size: int | None = None
) -> DropoutScorer:
    """Join a model and a task; ValueError when no dropout can be drawn or the task does not work with the model."""
    if passes < 2:
        raise ValueError(f"passes is {passes}: at least 2, for one alone differs from nothing")
    check_dropout(llama)
    method_1 = label_scorer(llama, task, truncate, batch_size)
    settings = {"passes": passes, "seed": seed} | ({"truncate": True} if truncate else {})
    known = {**llama.identity, "task": task.settings(), "method": DropoutScorer.name}
    return DropoutScorer(method_1, passes, seed, predictions.fingerprint(**known, settings=settings))


def check_dropout(llama: Llama) -> None:
    """ValueError unless the model has an adapter with dropout: else all passes would be the same, and look certain."""
    adapters = getattr(llama.model, "peft_config", {}).values()
    if not adapters:
        raise ValueError(f"{llama.name} has no LoRA adapter here, so there is no dropout to draw; {TRAIN_ONE}")
    if not any(adapter.lora_dropout for adapter in adapters):
        raise ValueError(f"the adapter has lora_dropout 0 (adapter_config.json), so nothing is drawn; {TRAIN_ONE}")
    if any(getattr(layer, "lora_variant", None) for layer in llama.model.modules()):
        raise ValueError(f"the adapter is a variant of LoRA, as DoRA, whose dropout cannot be drawn; {TRAIN_ONE}")


def summary(labels: Sequence[str], probabilities: np.ndarray, label_mass: float) -> dict:
    """What one distribution [labels] says."""
    by_label = dict(zip(labels, probabilities.tolist(), strict=True))
    prediction = max(by_label, key=by_label.__getitem__)
    found = {"probabilities": by_label, "label_mass": float(label_mass)}
    return found | {"prediction": prediction, "confidence": by_label[prediction]}


def decompose(probabilities: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(epistemic [rows], aleatoric [rows]) in nats of the passes' probabilities [passes, rows, labels].

    Entropy is concave, so the epistemic part is not negative but for rounding.
    """
    from scipy.special import entr  # -p log p, of 0 it is 0

    aleatoric = entr(probabilities).sum(axis=-1).mean(axis=0)
    total = entr(probabilities.mean(axis=0)).sum(axis=-1)
    return np.maximum(total - aleatoric, 0.0), aleatoric


# Printing


def print_explanation(row: Mapping) -> None:
    """The labels without dropout and over the passes, the two parts of their entropy, the verdict."""
    passes, plain, n = row["passes"], row["without_dropout"], len(row["passes"])
    lines = [["", "without dropout", f"mean of {n} passes", "lowest", "highest"]]
    for label in row["probabilities"]:
        lines.append(spread(label, [answer["probabilities"][label] for answer in (plain, row, *passes)]))
    lines.append(spread("label mass", [answer["label_mass"] for answer in (plain, row, *passes)]))
    print(f"Text: {command_line.printable(row['text'])}\n")
    print(command_line.columns(lines, "  "))
    total = row["aleatoric"] + row["epistemic"]
    parts = [f"{name} {row[name]:.3g} ({share(row[name], total)})" for name in ("aleatoric", "epistemic")]
    print(f"\n  entropy {total:.3g} nats = {' + '.join(parts)}")
    agree = sum(answer["prediction"] == row["prediction"] for answer in passes)
    print(f"\n  Verdict: {row['prediction']}, confidence {100 * row['confidence']:.2f} %", end=" ")
    print(f"({agree} of {n} passes; without dropout {plain['prediction']}, {100 * plain['confidence']:.2f} %)")
    scoring.print_decision(row)
    print()


def spread(name: str, values: Sequence[float]) -> list[str]:
    """A line of the table: the value without dropout, the mean, and the ends of the passes' values that follow."""
    plain, mean, *of_passes = values
    return [name, *(f"{100 * value:.2f} %" for value in (plain, mean, min(of_passes), max(of_passes)))]


def share(part: float, total: float) -> str:
    """A part of an entropy in per cent; of no entropy none."""
    return f"{100 * part / total if total else 0:.3g} %"


# The report on a table


def report(path: str | Path, groups: str | None = None) -> str:
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
    confidence = np.array([row.confidence for row in rows])
    certainty = -np.array([row.extras["epistemic"] for row in rows])

    def areas(chosen: np.ndarray) -> list[float]:
        one, two = auroc(confidence[chosen], right[chosen]), auroc(certainty[chosen], right[chosen])
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
    scoring.add_arguments(parser)
    add("--passes", type=int, default=PASSES, metavar="N", help=f"draws of the dropout (default: {PASSES})")
    tables.add_groups_argument(parser)
    add_model_arguments(parser)
    args = parser.parse_args(argv)
    scoring.check_arguments(parser, args)
    if args.groups is not None and not args.input:
        parser.error("--groups is for the report on a table (--input FILE)")
    if args.passes < 2:
        parser.error(f"--passes {args.passes}: at least 2")
    if args.adapter == "none":
        parser.error(f"--adapter none leaves no dropout to draw; {TRAIN_ONE}")
    return args


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_arguments(argv)
    task = read_task(args.task)
    job = scoring.job_from_arguments(args, task)
    if args.groups is not None:
        predictions.check_output(args.output, args.groups)
        tables.groups_of(list(job.table), args.groups)
    llama = load_llama(**model_arguments(args), task=task.settings())
    scorer = dropout_scorer(llama, task, args.passes, args.seed, args.truncate, args.batch_size)
    job.check(scorer)
    if job.texts:
        scoring.explain_texts(job, scorer, print_explanation)
        return
    scoring.score_table(scorer, job.table, job.total, job.output, job.overwrite)
    scoring.finish_table(job, report(job.output, args.groups))


if __name__ == "__main__":
    command_line.run(main, resumes=True)
