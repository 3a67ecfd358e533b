"""Fine-tune a model for a task with LoRA, watching on held-out rows whether its confidence stays true.

    loss(row) = L(p, label) - log label_mass,    p = P(label) / label_mass over the labels, as Method 1 reads them

With L = -log p(label), the default, that is -log P(label): how surprised the model was that the answer named the label.
The other losses replace L. Nothing is learned from the prompt, whose ids are those of `logprobs_confidence.py`.

    python fine_tune_model.py --limit 600                       # the dataset's train and validation splits; minutes
    python fine_tune_model.py --train mine.csv --validation held_out.csv --task tickets.toml --output-dir tickets_model
    python fine_tune_model.py --model llama --task sentiment-yes-no --rank 64 --gradient-checkpointing --load-in-4bit
    accelerate launch fine_tune_model.py --model llama                                            # several GPUs
    python fine_tune_model.py --sagemaker --instance-type ml.g6e.2xlarge --spot --dry-run         # in the cloud
    python logprobs_confidence.py --adapter fine_tuned_model "Not bad"

Writes into --output-dir: the adapter of the best validation (adapter_config.json, adapter_model.safetensors, as peft,
vLLM and LMI load them), training_config.json, training_log.jsonl and training_curves.png. A run that was stopped
is continued by the same command with --resume, and ends with the adapter of an unbroken one. Validations are printed
with their ECE beside that of a calibrated model (the noise floor). From Python:

    training, validation = read_both(Table("mine.csv"), Table("held_out.csv"), task)
    train_adapter(load_llama(), task, training, validation, Path("my_model"), TrainingSettings(epochs=1))
    FineTunedSentimentClassifier("my_model").classify_single("Not bad")
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np

import command_line
import plotting
import sagemaker_job
import tables
from command_line import natural
from files import read_json, write_text
from llama import Llama, choose_device, load_llama, model_arguments
from llama import add_arguments as add_model_arguments
from logprobs_confidence import Classifier, LabelScorer, label_scorer
from lora import ADAPTER_FOLDER, HEAD, load_weights
from model_files import folder_hash
from tables import Example, Table, column_arguments
from task import Task, add_task_argument, labelled_examples, read_task
from training import (
    CHECKPOINT,
    CONFIG,
    DECISIVE,
    LOG,
    LOSSES,
    LabelledRows,
    TrainingRun,
    TrainingSettings,
    accuracy_and_log_loss,
    answer_rows,
    begin_training,
    encode_rows,
    take_all_steps,
)

# Texts of no user whose answers are recorded with every adapter, to see later that a server answers alike.
PROBES = ("I absolutely love this amazing movie!", "It is not bad.", "The parcel came late, and the box was wet.")
# The flags that a job in the cloud is told. Rows, model, task and folder go there under other names.
TRAVELLING = (*DECISIVE, "micro_batch_size", "checkpoint_every", "validation_limit", "confidence_head", "dtype")
TRAVELLING += ("load_in_4bit", "load_in_8bit")


# Rows


def read_both(training: Table, validation: Table, task: Task) -> tuple[LabelledRows, LabelledRows]:
    """The labelled rows of both tables; ValueError for any that cannot be used, and for a text that is in both."""
    known, held_out = read_labelled(training, task), read_labelled(validation, task)
    alike = tables.check_disjoint(known.examples, held_out.examples, training.source, validation.source)
    if alike:
        print(f"note: {alike:,} rows of {validation.source} have a near-duplicate in training", file=sys.stderr)
    return known, held_out


def read_labelled(table: Table, task: Task) -> LabelledRows:
    """The rows of a table, each with one of the task's labels, of two labels at least."""
    examples = labelled_examples(table, task, "fine-tuning")
    labels = {example.label for example in examples}
    if len(labels) < 2:
        all_rows = f"all {len(examples):,} rows are {labels.pop()!r}"
        raise ValueError(f"{table.source}: {all_rows}; at least two labels are needed")
    return LabelledRows(table.source, examples)


def sample_of(rows: LabelledRows, limit: int, seed: int) -> LabelledRows:
    """At most `limit` of the rows, drawn by the seed, in their order; all for 0."""
    if not limit or len(rows.examples) <= limit:
        return rows
    chosen = np.random.default_rng(seed).choice(len(rows.examples), limit, replace=False)
    return replace(rows, examples=[rows.examples[i] for i in sorted(chosen)])


def check_head_rows(rows: LabelledRows) -> None:
    """ValueError for fewer rows than a confidence head can be fitted to."""
    from calibration import LEAST_ROWS

    if len(rows.examples) < LEAST_ROWS:
        raise ValueError(f"{rows.source}: {len(rows.examples)} rows; --confidence-head needs {LEAST_ROWS} at least")


# Training, and what is written at its end


def train_adapter(
    llama: Llama,
    task: Task,
    training: LabelledRows,
    validation: LabelledRows,
    folder: Path,
    settings: TrainingSettings,
    base_model: str = "default",
    groups: str | None = None,
    head_rows: LabelledRows | None = None,
    resume: bool = False,
) -> int:
    """Train an adapter on the model and leave the best one of the validations in a folder, with all that tells of it.

    `base_model` is the name by which the model was loaded; `groups` a table that says which validation rows belong
    together (None: near-duplicates). A confidence head is fitted to `head_rows`, if there are any. Returns 0, or the
    signal that stopped the training before its end: `resume` goes on with it.
    """
    run = begin_training(llama, task, training, validation, folder, settings, resume)
    if run.world.is_main_process:
        count, rows = sum(weight.numel() for weight in run.weights), len(training.examples)
        print(f"training {count:,} weights of {llama.name} on {rows:,} rows, {run.steps:,} steps at most")
    stopped_by = take_all_steps(run)
    run.world.destroy_process_group()  # else a process that is done first may abort, and take the others along
    if stopped_by:
        print(f"stopped at step {run.step}, nothing is lost: --resume goes on from there", file=sys.stderr)
    elif run.world.is_main_process:
        print(comparison_with_base(run, tables.groups_of(validation.examples, groups)))
        load_weights(llama, folder)  # the best ones; those in the model are the last
        if head_rows:
            print("\n" + fit_confidence_head(run, head_rows, tables.groups_of(head_rows.examples, groups)))
        write_records(run, base_model)
        print(f"\nWritten to {folder}; `--adapter {folder}` uses it.")
    return stopped_by


def comparison_with_base(run: TrainingRun, groups: Sequence[object]) -> str:
    """Base and fine-tuned on the validation rows, with intervals of the differences (cluster bootstrap, paired)."""
    from calibration_metrics import bootstrap_interval

    targets, base, best = run.validation.targets, run.base.log_probs, run.best.log_probs
    n = len(targets)

    def gain(rows: np.ndarray) -> np.ndarray:
        """Accuracy and log loss on some rows, fine-tuned minus base."""
        return accuracy_and_log_loss(best[rows], targets[rows]) - accuracy_and_log_loss(base[rows], targets[rows])

    intervals = bootstrap_interval(gain, groups, seed=run.settings.seed)
    before, after = run.validations[0], run.best_validation
    lines = [["", "base", "fine-tuned", "difference, 95 % interval"]]
    for name, difference, (low, high) in zip(("accuracy", "log_loss"), gain(np.arange(n)), intervals, strict=True):
        interval = f"{difference:+.3f} [{low:+.3f}, {high:+.3f}]"
        lines.append([name.replace("_", " "), f"{before[name]:.3f}", f"{after[name]:.3f}", interval])
    lines.append(["ECE (if calibrated)", *(f"{x['ece']:.3f} ({x['ece_floor']:.3f})" for x in (before, after)), ""])
    for name in ("mean_confidence", "label_mass"):
        lines.append([name.replace("_", " "), f"{before[name]:.3f}", f"{after[name]:.3f}", ""])
    best_measure = run.settings.early_stopping.replace("_", " ")
    verdict = (
        f"\nstep {after['step']} of {run.step}, the one with the best {best_measure} on these n = {n:,} validation "
    )
    verdict += "rows, so its numbers here are a little too good.\n"
    if after["log_loss"] >= before["log_loss"]:
        verdict += "It is no better than the base model on them: take another --learning-rate or more rows.\n"
    return verdict + "\n" + command_line.columns(lines)


def kept_scorer(run: TrainingRun) -> LabelScorer:
    """Model, kept adapter and task, with the fingerprint that `logprobs_confidence.py` gives to their predictions."""
    llama = run.scorer.llama
    return label_scorer(replace(llama, identity=llama.identity | {"adapter": folder_hash(run.folder)}), run.scorer.task)


def fit_confidence_head(run: TrainingRun, rows: LabelledRows, groups: Sequence[object]) -> str:
    """Fit the head to the kept adapter's answers on rows that no gradient saw; a line about it."""
    from confidence_head import fit_head, save_head

    scorer = kept_scorer(run)
    encoded, hidden = encode_rows(scorer, rows), np.empty((len(rows.examples), scorer.llama.hidden_size), np.float32)
    log_probs = answer_rows(scorer, encoded, hidden=hidden).log_probs
    correct = log_probs.argmax(axis=1) == encoded.targets
    try:
        head = fit_head(hidden, np.exp(log_probs.max(axis=1)), correct, groups, scorer.fingerprint)
    except ValueError as error:
        raise ValueError(f"--confidence-head: {error}; --resume without it finishes the adapter") from None
    save_head(run.folder / HEAD, head)
    found = head.record
    return (
        f"confidence head fitted on {found['n']:,} validation rows, {found['right']:.1%} right; out-of-fold log loss "
        f"{found['out_of_fold_log_loss']:.4f}, of Platt scaling alone {found['platt_log_loss']:.4f}"
    )


def write_records(run: TrainingRun, base_model: str) -> None:
    """Write the curves and, last, the configuration, which says that all is there; remove the checkpoint."""
    import accelerate
    import peft
    import torch
    import transformers

    scorer, kept = run.scorer, kept_scorer(run)
    training, validation = run.training.rows, run.validation.rows
    with scorer.llama.evaluating():
        probes = scorer.score_together([Example(text, text, None) for text in PROBES])
    libraries = {library.__name__: library.__version__ for library in (torch, transformers, peft, accelerate)}
    config = {
        "base_model": base_model,
        "base_weights": scorer.llama.identity["weights"],
        "precision": scorer.llama.identity["precision"],
        "task": scorer.task.settings(),
        "fingerprint": kept.fingerprint,
        "fingerprints": {"base": scorer.fingerprint, "tuned": kept.fingerprint},
        "settings": run.settings.decisive(),
        "train": training.record(),
        "validation": validation.record(),
        "before": run.validations[0],
        "best": run.best_validation,
        "steps": run.step,
        "probes": [{name: getattr(row, name) for name in ("text", "probabilities", "label_mass")} for row in probes],
        "processes": run.world.num_processes,
        "versions": {"python": platform.python_version(), **libraries},
    }
    plotting.training_curves(
        run.folder / "training_curves.png",
        run.log,
        best_step=run.best_validation["step"],
        model=scorer.llama.name,
        task=scorer.task.name,
        training_rows=len(training.examples),
        validation_rows=len(validation.examples),
    )
    write_text(run.folder / CONFIG, json.dumps(config, indent=1) + "\n")
    shutil.rmtree((run.folder / CHECKPOINT).parent)


# The fine-tuned model, one text at a time


class FineTunedSentimentClassifier:
    """A fine-tuned folder, ready to classify, with the base model and the task that its training_config.json names."""

    def __init__(self, path: str | Path = ADAPTER_FOLDER, device: str = "auto") -> None:
        base, task = read_config(Path(path))
        self.classifier = Classifier(task, base, str(path), device=device)

    def classify_single(self, text: str) -> dict[str, object]:
        """text, prediction, confidence, probabilities and label_mass by Method 1; ValueError for an empty text."""
        (row,) = self.classifier.predict([text])
        if row.error is not None:
            raise ValueError(row.error)
        names = ("text", "probabilities", "label_mass", "prediction", "confidence")
        return {name: getattr(row, name) for name in names}


def read_config(folder: Path) -> tuple[str, Task]:
    """The base model and the task that a fine-tuned folder's training_config.json names."""
    try:
        config = read_json(folder / CONFIG)
        return str(config["base_model"]), Task.from_settings(config["task"])
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{folder / CONFIG} is broken: {error}") from None


# Command line


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = command_line.ArgumentParser(__doc__)
    add_task_argument(parser)
    group = parser.add_argument_group("the rows")
    add = group.add_argument
    add("--train", default="data:train", metavar="FILE", help="labelled rows to learn from (default: data:train)")
    add("--validation", metavar="FILE", help="labelled rows to watch (default: data:validation, with data:train)")
    limit = "watch N of them, drawn by the seed (default: 500; 0: all)"
    add("--validation-limit", type=natural, default=500, metavar="N", help=limit)
    tables.add_groups_argument(group)
    tables.add_column_arguments(group)
    add_model_arguments(parser)
    add = parser.add_argument_group("the training").add_argument
    add("--output-dir", default="fine_tuned_model", metavar="FOLDER", help="default: fine_tuned_model")
    add("--resume", action="store_true", help="go on from the folder's checkpoint, if there is one")
    add("--overwrite", action="store_true", help="replace what a training left in the folder")
    add("--loss", choices=LOSSES, help="default: cross-entropy; it and brier are proper")
    add("--rank", type=int, metavar="R", help="of the LoRA matrices (default: 4; 64 for an 8B model)")
    add("--alpha", type=float, metavar="A", help="LoRA's scale is A / R (default: 2 R)")
    add("--dropout", type=float, metavar="P", help="on the LoRA input (default: 0.05)")
    add("--learning-rate", type=float, metavar="X", help="its peak (default: 1e-3; 2e-4 for an 8B model)")
    add("--epochs", type=int, metavar="N", help="passes over the rows at most (default: 2)")
    add("--batch-size", type=int, metavar="N", help="rows a step, of all processes (default: 32)")
    add("--micro-batch-size", type=int, metavar="N", help="rows run together (default: by length and device)")
    add("--confidence-head", action="store_true", help="also fit P(right) from the last hidden state, on --validation")
    add("--gradient-checkpointing", action="store_true", help="less memory, more time; the prefix runs with every row")
    add("--validate-every", type=int, metavar="N", help="steps between validations (default: 25)")
    add("--checkpoint-every", type=int, metavar="N", help="steps that a kill can lose (default: 25)")
    add("--early-stopping", choices=["log_loss", "ece"], help="which the best has least of (default: log_loss)")
    add("--patience", type=natural, metavar="N", help="validations without a better (default: 5; 0: any)")
    sagemaker_job.add_arguments(parser)
    parser.set_defaults(adapter="none", **asdict(TrainingSettings()) | {"alpha": None})
    args = parser.parse_args(argv)
    check_arguments(parser, args)
    return args


def check_arguments(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Refuse what cannot be trained with, and fill in what depends on other flags."""
    if args.adapter != "none":
        parser.error("--adapter: a new adapter is trained on the base model; --resume goes on with an unfinished one")
    if args.device_map:
        parser.error("--device-map is for scoring; a training needs the whole model on one GPU, see --load-in-4bit")
    if args.validation is None:
        if args.train != "data:train":
            parser.error("--train needs --validation: labelled rows that are not trained on")
        args.validation = "data:validation"
    args.alpha = 2.0 * args.rank if args.alpha is None else args.alpha
    settings_from_arguments(args)
    sagemaker_job.check_arguments(parser, args)
    if args.sagemaker and args.device != "auto":
        parser.error("--device is for training here; the machine on SageMaker uses all of its GPUs")
    if args.resume and args.overwrite:
        parser.error("--resume goes on with what --overwrite would replace; give one of them")


def settings_from_arguments(args: argparse.Namespace) -> TrainingSettings:
    """How to train, as the flags say; ValueError for what cannot be."""
    return TrainingSettings(**{name: getattr(args, name) for name in asdict(TrainingSettings())})


def job_from_arguments(
    args: argparse.Namespace, training: LabelledRows, validation: LabelledRows
) -> sagemaker_job.Training:
    """What a training job needs to train as these flags do here."""
    watched = sample_of(validation, args.validation_limit, args.seed)
    return sagemaker_job.Training(
        model=args.model,
        task=args.task,
        flags={name: getattr(args, name) for name in TRAVELLING},
        sources={"train": args.train, "validation": args.validation},
        training=training.examples,
        validation=validation.examples,
        groups=tables.groups_of(validation.examples, args.groups) if args.groups else None,
        hashes={"train": training.record()["sha256"], "validation": watched.record()["sha256"]},
    )


def check_folder(folder: Path, resume: bool = False, overwrite: bool = False) -> bool:
    """Whether there is anything to train; ValueError for a folder that is somebody's, or would be lost."""
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"--output-dir {folder} is a file")
    present = {path.name for path in folder.iterdir()} if folder.exists() else set()
    if present and LOG not in present:  # which a training writes first
        raise ValueError(f"--output-dir {folder} holds other files; name a new folder")
    if overwrite or not present:
        return True
    if resume:
        return CONFIG not in present
    state = "a finished adapter" if CONFIG in present else "an unfinished training; --resume goes on with it"
    raise ValueError(f"{folder} holds {state}; --overwrite replaces it, --output-dir names another folder")


def load_for_processes(arguments: dict[str, object]) -> Llama:
    """The model, on the device of this process, where several share a training."""
    import accelerate

    for bits in ("load_in_4bit", "load_in_8bit"):
        if arguments[bits] and not choose_device(arguments["device"]).startswith("cuda"):
            raise ValueError(f"--{bits.replace('_', '-')} needs an NVIDIA GPU (CUDA) for a training")
    world = accelerate.PartialState(cpu=choose_device(arguments["device"]) == "cpu")
    return load_llama(**arguments | ({"device": str(world.device)} if world.num_processes > 1 else {}))


def refuse_sharded_training(environment: Mapping[str, str]) -> None:
    """ValueError where accelerate or torchrun was told to split the model itself, which would be ignored here."""
    for name, what in (("ACCELERATE_USE_FSDP", "FSDP"), ("ACCELERATE_USE_DEEPSPEED", "DeepSpeed")):
        if environment.get(name, "").lower() in ("1", "true", "yes", "on", "y", "t"):
            raise ValueError(
                f"{name} asks for {what}, which splits a model over GPUs; LoRA here needs all of it on each: up to 70B "
                "fits one GPU of 80 GB with --load-in-4bit (QLoRA), and several GPUs share the rows (accelerate launch "
                "--multi_gpu); what is larger does not fit"
            )


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_arguments(argv)
    refuse_sharded_training(os.environ)
    if args.stop:
        sagemaker_job.stop(sagemaker_job.settings_from_arguments(args), args.stop)
        return
    task, folder = read_task(args.task), Path(args.output_dir)
    if not check_folder(folder, args.resume, args.overwrite):
        print(f"{folder} holds a finished adapter; nothing to do")
        return
    if args.attach:
        sagemaker_job.attach(sagemaker_job.settings_from_arguments(args), args.attach)
        return
    columns = column_arguments(args)
    all_rows = columns | {"limit": None, "sample": None}  # these two are of the rows to learn from
    training, validation = read_both(Table(args.train, columns), Table(args.validation, all_rows), task)
    # What could only fail after the training is told now.
    tables.groups_of(validation.examples, args.groups)
    if args.confidence_head:
        check_head_rows(validation)
    if args.sagemaker:
        job = job_from_arguments(args, training, validation)
        sagemaker_job.train(sagemaker_job.settings_from_arguments(args), job)
        return
    stopped_by = train_adapter(
        load_for_processes(model_arguments(args)),
        task,
        training,
        sample_of(validation, args.validation_limit, args.seed),
        folder,
        settings_from_arguments(args),
        base_model=args.model,
        groups=args.groups,
        head_rows=validation if args.confidence_head else None,
        resume=args.resume,
    )
    if stopped_by:
        sys.exit(128 + stopped_by)


if __name__ == "__main__":
    command_line.run(main)
