"""A probe on the hidden states: any labels, from few labelled rows, at the speed of one token.

    P(label) by logistic regression on the states of one layer, and where that gains on the first token and the words

    python probe_confidence.py --train labelled.csv --output-dir probe                 # the labels are the table's own
    python probe_confidence.py --train labelled.csv --output-dir probe --task tickets.toml      # in a task's prompt
    python calibration_demo.py probe/out_of_fold.jsonl                                 # calibrate, guarantee, decide
    python probe_confidence.py --probe probe --calibrator calibration_report/calibrator.json "Where is my card?"
    python probe_confidence.py --probe probe --input new.csv --output predictions.jsonl

    Classifier("probe").predict(["Where is my card?"])                                 # from Python

The model reads each text once; nothing of it is trained. --train writes into --output-dir: probe.safetensors and
probe.json (the probe), out_of_fold.jsonl (a predictions file of the training rows, each scored by a probe that has not
seen its group; probe.py says what is exact about that and what approximate), and features.f32 with features.json, the
hidden states, which a repeated run takes from there and which may be deleted. The same labels so serve to fit, to
calibrate and to guarantee: a calibrator fitted on out_of_fold.jsonl is one for what --probe says.

The prompt is the task's without its examples (--with-examples keeps them), without a task the text alone. The labels
need not be answer words. A server shows no hidden states, so the model must run here.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

import command_line
import predictions
import scoring
import tables
import verdict
from command_line import printable
from hidden_features import EncodedText, FeatureReader, feature_reader
from llama import Llama, load_llama, model_arguments
from llama import add_arguments as add_model_arguments
from predictions import Prediction
from probe import FIRST_TOKEN, WORDS, Probe, fit_probe, word_counts
from probe_files import ProbeRecord, fingerprint_of, load_probe
from probe_training import OUT_OF_FOLD, task_of_labels, train_probe
from scoring import SavedRows
from tables import Example, column_arguments, text_key
from task import Task, labelled_examples, read_task

__all__ = ["Classifier", "fit_probe", "train_probe"]

TRAINED_ON = "trained_on"  # the extra of a row whose text the probe was fitted to
SHOWN = 5  # labels of an explained text
OF_TRAINING = {"train", "output_dir", "groups", "with_examples", "task", "overwrite", "truncate", "batch_size"}
OF_TRAINING |= {"text_column", "label_column", "id_column", "no_header", "label_map", "delimiter", "encoding"}
OF_TRAINING |= {"skip_bad_rows", "where", "limit", "sample", "seed"}
OF_TRAINING |= {"model", "adapter", "device", "device_map", "dtype", "load_in_4bit", "load_in_8bit"}
NO_SERVER = "a server shows no hidden states; a probe needs the model here (--model)"


# A model and a probe, joined


@dataclass(frozen=True)
class ProbeScorer:
    """A loaded model and a probe fitted on its states: what scores texts and tables."""

    reader: FeatureReader
    probe: Probe
    fitted_on: frozenset[str]
    fingerprint: str
    name = "probe"

    @property
    def task(self) -> Task:
        return self.reader.task

    @property
    def model_name(self) -> str:
        return self.reader.llama.name

    @property
    def window(self) -> int:
        return self.reader.window

    def with_words(self, features: Mapping[str, np.ndarray], texts: Sequence[str]) -> dict[str, object]:
        """All that the probe's members read of some texts."""
        counts = {WORDS: word_counts(texts)} if any(m.name == WORDS for m in self.probe.members) else {}
        return {**features, **counts}

    def explain(self, text: str) -> dict:
        """Score a text and show what each member contributed to the log odds of its label over the second."""
        encoded = self.reader.encode(text)
        (batch,) = self.reader.batches([encoded])
        features = self.with_words(batch.features, [text])
        by_label = dict(zip(self.probe.labels, self.probe.probabilities(features)[0].tolist(), strict=True))
        contributions, labels = self.probe.contributions(features)
        names = [member.name for member in self.probe.members]
        return {
            "text": text,
            "prompt": self.reader.prompt.render(encoded.shown),
            "prompt_token_ids": encoded.ids,
            "model": self.model_name,
            "model_path": str(self.reader.llama.path),
            **scoring.conclusion(by_label, 1.0),
            "runner_up": self.probe.labels[labels[0, 1]],
            "contributions": dict(zip(names, contributions[:, 0].tolist(), strict=True)),
            **self.extras(Example("", text, None), encoded),
            "fingerprint": self.fingerprint,
        }

    def extras(self, example: Example, encoded: EncodedText) -> dict[str, object]:
        """What the record of a row says besides: that its text was shortened, or is one the probe was fitted to."""
        shortened = {"truncated": True} if encoded.shown != example.text else {}
        return shortened | ({TRAINED_ON: True} if text_key(example.text) in self.fitted_on else {})

    score = scoring.by_windows

    def score_together(
        self,
        examples: Sequence[Example],
        advance: Callable[[int], None] = lambda n: None,
        saved: SavedRows | None = None,
    ) -> list[Prediction]:
        """Score examples in one sorting by length, returned in their order."""

        def score_batches(encoded: dict[int, EncodedText], skip: frozenset[int]) -> Iterator[dict[int, Prediction]]:
            numbers = list(encoded)
            for batch in self.reader.batches(list(encoded.values()), skip=skip):
                together = [numbers[place] for place in batch.rows]
                features = self.with_words(batch.features, [examples[n].text for n in together])
                probabilities = self.probe.probabilities(features)
                yield {n: self.record(examples[n], encoded[n], p) for n, p in zip(together, probabilities, strict=True)}

        return scoring.in_batches(self, examples, self.reader.encode, score_batches, advance, saved)

    def record(self, example: Example, encoded: EncodedText, probabilities: np.ndarray) -> Prediction:
        """The record of a row from its probabilities over the labels [labels]."""
        by_label = dict(zip(self.probe.labels, probabilities.tolist(), strict=True))
        common = scoring.record_fields(self) | {"extras": self.extras(example, encoded)}
        return predictions.scored(*self.task.identify(example), by_label, 1.0, **common)


def probe_scorer(
    llama: Llama, record: ProbeRecord, probe: Probe, truncate: bool = False, batch_size: int | None = None
) -> ProbeScorer:
    """Join a model and a probe; ValueError when it was fitted on states of other weights, or in another prompt."""
    for what in sorted({*record.identity, *llama.identity}):
        fitted, here = record.identity.get(what, "none"), llama.identity.get(what, "none")
        if fitted != here:
            raise ValueError(
                f"the probe was fitted on {record.model} with {what} {fitted}, this is {llama.name} with {here}; "
                "choose that model with --model, --adapter and --dtype"
            )
    task = Task.from_settings(record.task)
    reader = feature_reader(llama, task, [record.layer], truncate or record.truncate, batch_size)
    if [reader.prompt.before, reader.prompt.after] != record.prompt:
        raise ValueError(f"the chat template of {llama.name} has changed: the probe was fitted in another prompt")
    needs_answers = any(member.name == FIRST_TOKEN for member in probe.members)
    reader = reader.of(record.layer, record.pooling, needs_answers)
    return ProbeScorer(reader, probe, frozenset(record.fitted_on), fingerprint_of(reader, record.tensors))


# From Python


class Classifier:
    """A probe for programs: the model is loaded once, then lists of texts become lists of predictions.

    `folder` is what --train wrote, `calibrator` a calibrator file. The others are those of `llama.load_llama`, and
    must name the model that the probe was fitted on.
    """

    def __init__(
        self,
        folder: str | Path,
        model: str = "default",
        adapter: str | None = "auto",
        calibrator: str | Path | None = None,
        **loading: object,
    ) -> None:
        record, probe = load_probe(folder)
        self.scorer = probe_scorer(load_llama(model, adapter, task=record.task, **loading), record, probe)
        self.calibrator = scoring.calibrator_of(self.scorer, calibrator)

    def predict(self, texts: Sequence[str]) -> list[Prediction]:
        """A `predictions.Prediction` for each text, in order; one that cannot be scored carries an `error`."""
        return scoring.predict(self.scorer, texts, self.calibrator)


# Printing


def print_explanation(row: Mapping) -> None:
    """The most probable labels, what each member said for the first against the second, the verdict."""
    print(f"Text: {printable(row['text'])}\n")
    ranked = sorted(row["probabilities"].items(), key=lambda item: -item[1])
    width = max(len("others"), *(len(printable(label)) for label, _ in ranked[:SHOWN]))
    for label, probability in ranked[:SHOWN]:
        print(f"  {printable(label):{width}}  {100 * probability:6.2f} %")
    if len(ranked) > SHOWN:
        rest = sum(probability for _, probability in ranked[SHOWN:])
        print(f"  {'others':{width}}  {100 * rest:6.2f} %  of {len(ranked)} labels in all")
    parts = row["contributions"]
    print(
        f"\n  Log odds of {printable(row['prediction'])} over {printable(row['runner_up'])}: {sum(parts.values()):+.2f}"
    )
    for name, value in parts.items():
        print(f"    {value:+6.2f}  {name}")
    seen = "; the probe was fitted to this very text" if row.get(TRAINED_ON) else ""
    print(f"\n  Verdict: {printable(row['prediction'])}, confidence {100 * row['confidence']:.2f} %{seen}")
    scoring.print_decision(row)
    print()


def training_report(record: ProbeRecord, folder: str | Path) -> str:
    """What was fitted, how it does out of fold beside the commonest label and a bag of words, and what comes next."""
    found, by_name = record.out_of_fold, {}
    for candidate in record.candidates:  # of the strengths of a member the best
        best = by_name.setdefault(candidate["name"], candidate)
        if candidate["log_loss"] < best["log_loss"]:
            by_name[candidate["name"]] = candidate
    names = [member["name"] for member in record.members]
    shown = [("chosen: " + " + ".join(names), found["log_loss"], found["accuracy"])]
    shown += [
        (n, by_name[n]["log_loss"], by_name[n]["accuracy"]) for n in (names[0], FIRST_TOKEN, WORDS) if n in by_name
    ]
    shown += [("the commonest label", found["commonest_label_log_loss"], found["commonest_label_accuracy"])]
    lines = [f"{record.n:,} rows in {record.groups:,} groups, {len(record.labels)} labels; all numbers out-of-fold"]
    cells = [(name, f"{loss:.4f}", f"{right:.3f}") for name, loss, right in shown]
    lines.append(command_line.columns([("", "log loss of labels", "accuracy"), *cells], indent="  "))
    if WORDS in by_name and by_name[WORDS]["log_loss"] < by_name[names[0]]["log_loss"]:
        lines.append("  The bag of words alone knows more than the hidden states alone.")
    if record.rare:
        few = ", ".join(f"{printable(label)} {count}" for label, count in record.rare.items())
        lines.append(f"  note: labels with fewer than five rows, of which little can be known: {few}")
    lines.append(f"Written to {folder}; next: python calibration_demo.py {Path(folder) / OUT_OF_FOLD}")
    return "\n".join(lines)


def print_trained_on(path: Path) -> None:
    """Say so when a predictions file holds rows that the probe was fitted to."""
    count = sum(bool(row.extras.get(TRAINED_ON)) for row in predictions.iterate(path))
    if count:
        where = f"{OUT_OF_FOLD} has them by probes that have not"
        print(f"note: the probe was fitted to {count:,} of these texts, so is too sure; {where}", file=sys.stderr)


# Command line


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = command_line.ArgumentParser(__doc__)
    add = parser.add_argument
    add("--train", metavar="FILE", help="fit a probe to this table of labelled texts")
    add("--output-dir", metavar="DIR", help="where --train writes the probe")
    add("--probe", metavar="DIR", help="score with the probe in this folder")
    add("--with-examples", action="store_true", help="with --train: keep the few-shot examples of --task in the prompt")
    tables.add_groups_argument(parser)
    scoring.add_arguments(parser, default=None, otherwise="the table's own labels, the text alone as the prompt")
    add("--endpoint", metavar="URL", help=f"not possible: {NO_SERVER}")
    add_model_arguments(parser)
    args = parser.parse_args(argv)
    if args.endpoint:
        parser.error(NO_SERVER)
    if bool(args.train) == bool(args.probe):
        parser.error("give either --train FILE --output-dir DIR, or --probe DIR with texts or a table")
    if args.train:
        command_line.allow_only_arguments(parser, args, OF_TRAINING, "--train fits a probe")
        if not args.output_dir:
            parser.error("--train needs --output-dir DIR, where the probe is written")
        if args.with_examples and not args.task:
            parser.error("--with-examples keeps those of a --task")
        return args
    for name in ("output_dir", "groups", "with_examples", "task"):
        if getattr(args, name):
            parser.error(f"--{name.replace('_', '-')} belongs to --train; the probe knows its own")
    scoring.check_arguments(parser, args)
    return args


def train_from_arguments(args: argparse.Namespace) -> None:
    """Fit what --train asks for, and say how it does."""
    task = read_task(args.task) if args.task else None
    template = task.text_template if task else None
    table = tables.open_table(args.train, **column_arguments(args), text_template=template)
    task = task or task_of_labels(table)
    if not args.with_examples:
        task = replace(task, examples=())
    examples = labelled_examples(table, task, "a probe")
    groups = tables.groups_of(examples, args.groups)
    llama = load_llama(**model_arguments(args), task=task.settings())
    if llama.adapter:
        print("note: out-of-fold numbers hold only on rows that the adapter was not trained on", file=sys.stderr)
    options = {"truncate": args.truncate, "batch_size": args.batch_size, "seed": args.seed, "overwrite": args.overwrite}
    record = train_probe(llama, task, examples, args.output_dir, groups, **options)
    rows = [row for row in predictions.read(Path(args.output_dir) / OUT_OF_FOLD) if row.error is None]
    found = verdict.judge(rows, tables.groups_of(rows, args.groups), seed=args.seed)
    print(f"{verdict.text(found.record())}\n\n{training_report(record, args.output_dir)}")


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_arguments(argv)
    if args.train:
        train_from_arguments(args)
        return
    record, probe = load_probe(args.probe)
    job = scoring.job_from_arguments(args, Task.from_settings(record.task))
    llama = load_llama(**model_arguments(args), task=record.task)
    scorer = probe_scorer(llama, record, probe, args.truncate, args.batch_size)
    job.check(scorer)
    if job.texts:
        scoring.explain_texts(job, scorer, print_explanation)
        return
    scoring.score_table(scorer, job.table, job.total, job.output, job.overwrite)
    print_trained_on(job.output)
    scoring.finish_table(job, scoring.report(job.output))


if __name__ == "__main__":
    command_line.run(main, resumes=True)
