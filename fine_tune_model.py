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
is continued by the same command with --resume, and ends with the adapter of an unbroken one.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import math
import platform
import shutil
import signal
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np

import command_line
import predictions
import sagemaker_job
import tables
import task as tasks
from command_line import natural
from llama import Llama, RenderedPrompt, choose_device, load_llama, model_arguments
from llama import add_arguments as add_model_arguments
from lora import ADAPTER_FOLDER, HEAD
from model_files import folder_hash
from task import Answer, Example, Task

LOSSES = ("cross-entropy", "brier", "focal", "label-smoothing", "mmce")
FOCAL_GAMMA, SMOOTHING, MMCE_WEIGHT, MMCE_WIDTH = 2.0, 0.1, 2.0, 0.4
WARM_UP = 0.06  # of the steps
MAX_GRADIENT_NORM = 1.0
WRITTEN = "Written to {0}; `--adapter {0}` uses it."
LOG, CONFIG = "training_log.jsonl", "training_config.json"
CHECKPOINT = Path("checkpoint") / "state.safetensors"  # in a folder of its own: the adapter's hash must not see it
# What a checkpoint must share with the run that goes on from it.
SETTINGS = ("loss", "rank", "alpha", "dropout", "learning_rate", "epochs", "batch_size", "validate_every")
SETTINGS += ("early_stopping", "patience", "seed", "gradient_checkpointing")
# What else a job in the cloud is told. Rows, model, task and folder go there under other names.
TRAVELLING = (*SETTINGS, "micro_batch_size", "checkpoint_every", "validation_limit", "confidence_head", "dtype")
TRAVELLING += ("load_in_4bit", "load_in_8bit")
# Texts of no user whose answers are recorded with every adapter, to see later that a server answers alike.
PROBES = ("I absolutely love this amazing movie!", "It is not bad.", "The parcel came late, and the box was wet.")
VALIDATION_HEAD = "         step   train loss  log loss  accuracy    ECE (floor)  mean confidence  label mass"
VALIDATION_ROW = "{log_loss:10.4f}{accuracy:10.3f}{ece:7.3f} ({ece_floor:.3f}){mean_confidence:17.3f}{label_mass:12.3f}"


@dataclass(frozen=True)
class Table:
    """Labelled rows as the model reads them: prompt ids, and the number of each row's true label [n]."""

    source: str
    examples: list[Example]
    rows: list[list[int]]
    targets: np.ndarray
    sha256: str

    def record(self) -> dict:
        return {"source": self.source, "rows": len(self.rows), "sha256": self.sha256}


@dataclass(frozen=True)
class Student:
    """A model with a LoRA adapter to train, the task, and what follows from the two."""

    llama: Llama
    task: Task
    frame: RenderedPrompt
    answers: tuple[Answer, ...]

    @cached_property
    def ids(self) -> list[tuple[int, ...]]:
        return [answer.ids for answer in self.answers]

    @cached_property
    def columns(self) -> list[list[int]]:
        """For each label, which answers count for it."""
        return [[i for i, answer in enumerate(self.answers) if answer.label == label] for label in self.task.labels]

    @cached_property
    def begun(self) -> list[tuple[int, int]]:
        """(answer, longer answer that it begins), the longest first, as `tasks.label_probabilities` subtracts them."""
        by_length = sorted(range(len(self.ids)), key=lambda i: -len(self.ids[i]))
        return [
            (short, long)
            for short in by_length
            for long in by_length
            if len(self.ids[long]) > len(self.ids[short]) and self.ids[long][: len(self.ids[short])] == self.ids[short]
        ]


# Losses


def label_loss(name: str, log_probs: object, target: object) -> object:
    """L of each row [n], from log P(label | it is a label) [n, labels] and the true label's number [n], both tensors.

    cross-entropy    -log p_y
    brier            sum_k (p_k - [k = y])^2                       Brier, Monthly Weather Review 1950
    focal            -(1 - p_y)^2 log p_y                          Lin et al., ICCV 2017; Mukhoti et al., NeurIPS 2020
    label-smoothing  cross-entropy against 0.9 [k = y] + 0.1 / K   Szegedy et al., CVPR 2016
    mmce             -log p_y + 2 MMCE over the rows given         Kumar, Sarawagi and Jain, ICML 2018
        MMCE^2 = mean over pairs of (c_i - r_i)(c_j - r_j) exp(-|r_i - r_j| / 0.4); r the confidence, c 1 if right
    """
    import torch

    surprise = -log_probs.gather(1, target[:, None])[:, 0]
    if name == "cross-entropy":
        return surprise
    if name == "brier":
        return (log_probs.exp() - torch.nn.functional.one_hot(target, log_probs.shape[1])).square().sum(dim=1)
    if name == "focal":
        return (1 - (-surprise).exp()) ** FOCAL_GAMMA * surprise
    if name == "label-smoothing":
        return (1 - SMOOTHING) * surprise - SMOOTHING * log_probs.mean(dim=1)
    confidence, predicted = log_probs.exp().max(dim=1)
    gap = (predicted == target).float() - confidence
    kernel = (-(confidence[:, None] - confidence[None, :]).abs() / MMCE_WIDTH).exp()
    mmce = (gap @ kernel @ gap).clamp(min=1e-12).sqrt() / len(gap)
    return surprise + MMCE_WEIGHT * mmce


def row_losses(name: str, answer_log_probs: object, student: Student, target: object) -> object:
    """The loss of each row [n] from the log-probabilities of all answers [n, answers]."""
    import torch

    exclusive = list(answer_log_probs.unbind(dim=1))
    for short, long in student.begun:  # no probability counts twice
        exclusive[short] = exclusive[short] + (-(exclusive[long] - exclusive[short]).exp().clamp(max=1 - 1e-6)).log1p()
    by_label = [torch.stack([exclusive[i] for i in column]).logsumexp(dim=0) for column in student.columns]
    by_label = torch.stack(by_label, dim=1)
    mass = by_label.logsumexp(dim=1)
    return label_loss(name, by_label - mass[:, None], target) - mass


# Data


def read_table(student: Student, examples: list[Example], source: str) -> Table:
    """Examples as prompt ids and label numbers; ValueError names the row that cannot be used."""
    room = max(map(len, student.ids)) - 1
    labels, rows = list(student.task.labels), []
    for example in examples:
        try:
            rows.append(student.llama.encode_within(student.frame, example.text, room)[0])
        except ValueError as error:
            reason = str(error).partition("; --truncate")[0]  # which would train on half a text
            raise ValueError(f"{source}: row {example.id!r}: {reason}") from None
    targets = np.array([labels.index(student.task.canonical_label(example.label)) for example in examples])
    return Table(source, examples, rows, targets, rows_digest(examples, student.task))


def rows_digest(examples: list[Example], task: Task) -> str:
    """SHA-256 of labelled rows: ids, texts and labels."""
    return hashlib.sha256(json.dumps([task.identify(example) for example in examples]).encode()).hexdigest()


def read_labelled(args: argparse.Namespace, task: Task, source: str) -> list[Example]:
    """The examples of a table, each with one of the task's labels, of two labels at least."""
    tasks.check_examples(tasks.examples_from(args, source), task, source)
    examples = list(tasks.examples_from(args, source))
    if bare := next((example.id for example in examples if example.label is None), None):
        raise ValueError(f"{source}: row {bare!r} has no label; fine-tuning learns from labelled rows only")
    if len(seen := {task.canonical_label(example.label) for example in examples}) < 2:
        raise ValueError(f"{source}: all {len(examples):,} rows are {seen.pop()!r}; at least two labels are needed")
    return examples


def read_both(args: argparse.Namespace, task: Task) -> tuple[list[Example], list[Example]]:
    """The training and the validation examples; everything about them that can be wrong is told here."""
    from calibration import LEAST_ROWS

    training = read_labelled(args, task, args.train)
    args.limit = None  # of the training rows
    validation = read_labelled(args, task, args.validation)
    check_apart(training, validation, args.validation)
    tables.groups_of(validation, args.groups)  # a row without a group is told now, not after the training
    if args.confidence_head and len(validation) < LEAST_ROWS:
        raise ValueError(f"{args.validation}: {len(validation)} rows; --confidence-head needs {LEAST_ROWS} at least")
    return training, validation


def check_apart(training: list[Example], validation: list[Example], source: str) -> None:
    """Refuse validation texts that are trained on, whatever their case and spaces, and say how many are much alike."""
    from calibration import text_key

    known = {text_key(example.text): example.id for example in training}
    if shared := [(e.id, known[text_key(e.text)]) for e in validation if text_key(e.text) in known]:
        named = ", ".join(f"{one!r} (training row {other!r})" for one, other in shared[:5])
        more = f" and {len(shared) - 5:,} more" if len(shared) > 5 else ""
        raise ValueError(f"{source} overlaps the training rows, so it would measure memory: {named}{more}; remove them")
    texts = [example.text for example in (*training, *validation)]
    alike = {j for i, j, _ in tables.near_duplicates(texts) if i < len(training) <= j}
    if alike:
        print(f"note: {len(alike):,} rows of {source} have a near-duplicate in training", file=sys.stderr)


def some_of(examples: list[Example], limit: int, seed: int) -> list[Example]:
    """At most `limit` examples, drawn by the seed, in their order; all for 0."""
    if not limit or len(examples) <= limit:
        return examples
    chosen = np.random.default_rng(seed).choice(len(examples), limit, replace=False)
    return [examples[i] for i in sorted(chosen)]


# Measuring


def measure(student: Student, table: Table, world: object, hidden: np.ndarray | None = None) -> tuple:
    """(log P(label | it is a label) [n, labels], label mass [n]) of a table's rows, without dropout; float64.

    The processes share the rows, unless the last hidden states are wanted (`hidden`, see Llama.answer_log_probs).
    """
    mine = slice(None) if hidden is not None else slice(world.process_index, None, world.num_processes)
    with student.llama.evaluating():
        found = student.llama.answer_log_probs(table.rows[mine], student.ids, hidden=hidden)
    log_probs = np.empty((len(table.rows), len(student.answers)))
    log_probs[mine] = found
    if hidden is None and world.num_processes > 1:
        from accelerate.utils import gather_object

        for start, part in enumerate(gather_object([found])):
            log_probs[start :: world.num_processes] = part
    probabilities, mass = tasks.label_probabilities(log_probs, student.answers, list(student.task.labels))
    return np.log(np.maximum(probabilities, np.finfo(np.float64).tiny)), mass


def scores(log_probs: np.ndarray, mass: np.ndarray, targets: np.ndarray) -> dict[str, float]:
    """What a validation reports. `log_loss` is of the true label, in nats; `ece_floor` what a true model would show."""
    from calibration_metrics import consistency_resampling, expected_calibration_error

    confidence, correct = np.exp(log_probs.max(axis=1)), log_probs.argmax(axis=1) == targets
    return {
        "n": len(targets),
        "log_loss": float(-log_probs[np.arange(len(targets)), targets].mean()),
        "accuracy": float(correct.mean()),
        "ece": expected_calibration_error(confidence, correct),
        "ece_floor": float(consistency_resampling(confidence, n_draws=200).mean()),
        "mean_confidence": float(confidence.mean()),
        "label_mass": float(mass.mean()),
    }


# The adapter and its folder


def add_adapter(llama: Llama, args: argparse.Namespace) -> None:
    """Put a fresh LoRA adapter, which changes nothing yet, on every linear layer but the vocabulary head."""
    import torch
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training

    torch.manual_seed(args.seed)
    if args.load_in_4bit or args.load_in_8bit:
        llama.model = prepare_model_for_kbit_training(llama.model, use_gradient_checkpointing=False)
    if args.gradient_checkpointing:
        llama.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    settings = {"r": args.rank, "lora_alpha": args.alpha, "lora_dropout": args.dropout}
    config = LoraConfig(**settings, target_modules="all-linear", task_type="CAUSAL_LM")
    with warnings.catch_warnings():  # of a name that transformers will change, and of GPT-2's transposed layers
        warnings.simplefilter("ignore")
        try:
            llama.model = get_peft_model(llama.model, config).eval()  # in float32, whatever the model's weights are
        except ValueError as error:  # Mamba's layers, or dropout on experts
            raise ValueError(f"peft cannot adapt {llama.name} with --dropout {args.dropout}: {error}") from None
    llama.model.peft_config["default"].base_model_name_or_path = llama.name  # not the folder on this machine


def save_adapter(student: Student, folder: Path) -> None:
    """Write the adapter as peft does, without its model card, so that a reader never sees half a file."""
    from peft import get_peft_model_state_dict
    from safetensors.torch import save_file

    config = student.llama.model.peft_config["default"].to_dict() | {"inference_mode": True}
    config = {key: sorted(value) if isinstance(value, set) else value for key, value in config.items()}
    tensors = get_peft_model_state_dict(student.llama.model, save_embedding_layers=False)
    tensors = {name: value.detach().cpu().contiguous() for name, value in sorted(tensors.items())}
    with whole_file(folder / "adapter_config.json") as part:
        part.write_text(json.dumps(config, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    with whole_file(folder / "adapter_model.safetensors") as part:
        save_file(tensors, part, metadata={"format": "pt"})
        part.chmod(0o644)  # safetensors writes for its owner alone, and a server is often somebody else


def load_adapter(student: Student, folder: Path) -> None:
    """Put the weights of a folder that `save_adapter` wrote into the adapter at hand."""
    from peft import set_peft_model_state_dict
    from safetensors.torch import load_file

    set_peft_model_state_dict(student.llama.model, load_file(folder / "adapter_model.safetensors"))


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A path to write to; the file gets its name only when it is whole."""
    part = path.with_name(f"{path.name}.part")
    try:
        yield part
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


# Training


@dataclass
class Run:
    """A training: what it works on, and where it stands. A checkpoint holds the second half."""

    student: Student
    training: Table
    validation: Table
    args: argparse.Namespace
    world: object  # accelerate's PartialState: which of the processes this one is
    optimizer: object
    step: int = 0
    stale: int = 0  # validations since the best one
    log: list[dict] = field(default_factory=list)
    base: tuple | None = None  # (log_probs [n, labels], label mass [n]) of the validation rows before training
    best: tuple | None = None  # and with the best adapter

    @property
    def folder(self) -> Path:
        return Path(self.args.output_dir)

    @property
    def steps(self) -> int:
        """Steps of the whole training, unless it stops early."""
        return self.args.epochs * math.ceil(len(self.training.rows) / self.args.batch_size)

    @property
    def weights(self) -> list:
        return self.optimizer.param_groups[0]["params"]

    @property
    def validations(self) -> list[dict]:
        return [entry for entry in self.log if "log_loss" in entry]

    @property
    def is_due(self) -> bool:
        """Whether a validation belongs to this step and is not yet done."""
        due = self.step % self.args.validate_every == 0 or self.step == self.steps
        return due and not (self.validations and self.validations[-1]["step"] == self.step)

    @property
    def best_validation(self) -> dict:
        """Of the trained adapters; the untrained one, step 0, is not for sale."""
        return min(self.validations[1:], key=lambda entry: entry[self.args.early_stopping])

    def settings(self) -> dict:
        """What must be equal for a checkpoint to be continued."""
        return {
            **{name: getattr(self.args, name) for name in SETTINGS},
            "base_weights": self.student.llama.identity["weights"],
            "precision": self.student.llama.identity["precision"],
            "task": self.student.task.settings(),
            "train": self.training.sha256,
            "validation": self.validation.sha256,
        }


def prepare(student: Student, training: Table, validation: Table, args: argparse.Namespace, world: object) -> Run:
    """A run at its beginning, or with --resume where its checkpoint stands."""
    import torch

    weights = [value for value in student.llama.model.parameters() if value.requires_grad]
    for value in weights:
        value.grad = torch.zeros_like(value)
    optimizer = torch.optim.AdamW(weights, lr=args.learning_rate, weight_decay=0.0)
    run = Run(student, training, validation, args, world, optimizer)
    if args.resume and (run.folder / CHECKPOINT).exists():
        load_checkpoint(run)
    if world.is_main_process:
        run.folder.mkdir(parents=True, exist_ok=True)
        if not run.log:  # what an earlier training left must not be taken for this one's
            for name in (CONFIG, HEAD, CHECKPOINT):
                (run.folder / name).unlink(missing_ok=True)
        with whole_file(run.folder / LOG) as part:
            part.write_text("".join(json.dumps(entry) + "\n" for entry in run.log), encoding="utf-8")
    return run


def train(run: Run) -> int:
    """Train to the last step, or until the validation has stopped improving; the signal that ended it before, or 0.

    The folder then holds the best adapter so far, and a checkpoint of the last step.
    """
    args, size = run.args, run.args.batch_size
    with stop_signals() as stopping, command_line.progress(run.steps * size, run.step * size) as advance:
        while True:
            if run.is_due:
                validate(run)
            if run.step == run.steps or (args.patience and run.stale >= args.patience):
                save_checkpoint(run)
                return 0
            run.step += 1
            stopped = take_step(run, stopping)
            advance(size)
            if stopped or run.step % args.checkpoint_every == 0:
                save_checkpoint(run)
            if stopped:
                return stopping[0] if stopping else signal.SIGTERM  # another process was told


def take_step(run: Run, stopping: Sequence[int] | bool) -> bool:
    """One step of AdamW on the next rows, shared among the processes; whether any of these was asked to stop."""
    import torch
    from transformers.modeling_layers import GradientCheckpointingLayer

    args, world, llama, started = run.args, run.world, run.student.llama, time.monotonic()
    rows = batch_of(run.step, len(run.training.rows), args.batch_size, args.seed)
    mine = rows[world.process_index :: world.num_processes]
    targets = torch.tensor(run.training.targets[mine], device=llama.model.device)
    losses = []

    def loss(log_probs: object, batch: list[int]) -> object:
        value = row_losses(args.loss, log_probs, run.student, targets[batch]).sum() / len(rows)
        losses.append(value.item())
        return value

    run.optimizer.zero_grad(set_to_none=False)
    llama.model.eval()  # the model's own dropout stays off, the adapter's is ours
    for module in llama.model.modules():
        if isinstance(module, GradientCheckpointingLayer):
            module.training = args.gradient_checkpointing  # transformers checkpoints only what is in training
    if len(mine):
        # MMCE compares rows with each other, so all of them must be in one batch.
        together = len(mine) if args.loss == "mmce" else args.micro_batch_size
        prompts = [run.training.rows[i] for i in mine]
        with llama.dropping_out([args.seed, run.step]):
            llama.add_gradients(prompts, run.student.ids, loss, together, not args.gradient_checkpointing)
    mean_loss, stops = sum_over_processes(run.weights, [sum(losses), float(bool(stopping))], world)
    norm = float(torch.nn.utils.clip_grad_norm_(run.weights, MAX_GRADIENT_NORM))
    if not math.isfinite(norm):
        raise ValueError(
            f"the gradient of step {run.step} is not finite; use a lower --learning-rate or --dtype float32"
        )
    rate = learning_rate(run.step, run.steps, args.learning_rate)
    run.optimizer.param_groups[0]["lr"] = rate
    run.optimizer.step()
    speed = len(rows) / (time.monotonic() - started)
    note(run, {"loss": mean_loss, "learning_rate": rate, "gradient_norm": norm, "rows_per_second": speed})
    return stops > 0


def batch_of(step: int, n: int, size: int, seed: int) -> np.ndarray:
    """The row numbers of a step, which count from 1: every epoch has its own order, decided by seed and epoch alone."""
    epoch, at = divmod(step - 1, math.ceil(n / size))
    return np.random.default_rng([seed, epoch]).permutation(n)[at * size : (at + 1) * size]


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Up in a straight line over the first steps, then down along a half cosine to nearly nothing at the last."""
    warm_up = max(1, round(WARM_UP * steps))
    if step <= warm_up:
        return peak * step / warm_up
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warm_up) / (steps - warm_up + 1)))


def sum_over_processes(weights: list, numbers: list[float], world: object) -> list[float]:
    """Sum the weights' gradients, in place, and the numbers over all processes. The adapter is small: one tensor."""
    if world.num_processes == 1:
        return numbers
    import torch
    from accelerate.utils import reduce

    flat = torch.cat([*(weight.grad.flatten() for weight in weights), torch.tensor(numbers, device=weights[0].device)])
    flat = reduce(flat, "sum")
    for weight, part in zip(weights, flat.split([weight.numel() for weight in weights] + [len(numbers)]), strict=False):
        weight.grad.copy_(part.view_as(weight))
    return flat[-len(numbers) :].tolist()


def validate(run: Run) -> None:
    """Measure on the validation rows, print a line, and keep the adapter if it is the best so far."""
    measured = measure(run.student, run.validation, run.world)
    found, kept = scores(*measured, run.validation.targets), ""
    if run.log:
        earlier = [entry[run.args.early_stopping] for entry in run.validations[1:]]
        run.stale += 1
        if not earlier or found[run.args.early_stopping] < min(earlier):
            run.stale, run.best, kept = 0, measured, "  kept"
            if run.world.is_main_process:
                save_adapter(run.student, run.folder)
    else:
        run.base = measured
    note(run, found)
    if run.world.is_main_process:
        if run.step == 0:
            show(f"validation on {len(run.validation.rows):,} rows that are not trained on\n\n{VALIDATION_HEAD}")
        losses = [entry["loss"] for entry in run.log if "loss" in entry][-run.args.validate_every :]
        shown = f"{np.mean(losses):10.3f}" if losses else " " * 10
        show(f"{run.step:5} of {run.steps:<5}{shown}" + VALIDATION_ROW.format(**found) + kept)


def show(line: str) -> None:
    """Print a line above the progress bar, if there is one."""
    from tqdm import tqdm

    tqdm.write(line)
    sys.stdout.flush()


def note(run: Run, entry: dict) -> None:
    """Add an entry to the log and its file."""
    run.log.append({"step": run.step} | entry)
    if run.world.is_main_process:
        with open(run.folder / LOG, "a", encoding="utf-8") as file:
            file.write(json.dumps(run.log[-1]) + "\n")


@contextlib.contextmanager
def stop_signals() -> Iterator[list[int]]:
    """Collect SIGTERM and SIGINT instead of dying of them; a second SIGINT does kill."""
    seen: list[int] = []

    def see(number: int, frame: object) -> None:
        if seen and number == signal.SIGINT:
            print("\nstopped; --resume goes on from the last checkpoint", file=sys.stderr)
            sys.exit(130)
        seen.append(number)
        print("\nstopping after this step", file=sys.stderr)

    before = {number: signal.signal(number, see) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield seen
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# Checkpoints: one safetensors file, its numbers in the header


def save_checkpoint(run: Run) -> None:
    """Write weights, moments and standing to one file, which is replaced as a whole."""
    import torch
    from safetensors.torch import save_file

    if not run.world.is_main_process:
        return
    tensors = {}
    for number, weight in enumerate(run.weights):
        tensors[f"{number}.weight"] = weight.detach()
        tensors |= {f"{number}.{name}": value for name, value in run.optimizer.state[weight].items()}
    for name in ("base", "best"):
        if (measured := getattr(run, name)) is not None:
            tensors |= {f"{name}.log_probs": torch.tensor(measured[0]), f"{name}.mass": torch.tensor(measured[1])}
    standing = {"step": run.step, "stale": run.stale, "log": run.log, "settings": run.settings()}
    path = run.folder / CHECKPOINT
    path.parent.mkdir(exist_ok=True)
    with whole_file(path) as part:
        save_file({k: v.cpu().contiguous() for k, v in tensors.items()}, part, {"standing": json.dumps(standing)})


def load_checkpoint(run: Run) -> None:
    """Go on from the folder's checkpoint; ValueError if it is broken or another training's."""
    import torch
    from safetensors import SafetensorError, safe_open

    path = run.folder / CHECKPOINT
    try:
        with safe_open(path, "pt") as file:
            standing = json.loads(file.metadata()["standing"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
        now, then = json.loads(json.dumps(run.settings())), standing["settings"]
        if changed := [name for name in now if now[name] != then.get(name)]:
            name = changed[0].replace("_", " ")
            raise ValueError(f"{path} is of another training: {name} is not the same; --overwrite begins anew")
        state = {}
        with torch.no_grad():
            for number, weight in enumerate(run.weights):
                weight.copy_(tensors[f"{number}.weight"])
                state[number] = {name: tensors[f"{number}.{name}"] for name in ("step", "exp_avg", "exp_avg_sq")}
        run.optimizer.load_state_dict(run.optimizer.state_dict() | {"state": state})
        run.step, run.stale, run.log = standing["step"], standing["stale"], standing["log"]
        for name in ("base", "best"):
            if f"{name}.mass" in tensors:
                setattr(run, name, tuple(tensors[f"{name}.{part}"].numpy() for part in ("log_probs", "mass")))
    except (SafetensorError, KeyError, TypeError, AttributeError, RuntimeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is broken ({error}); --overwrite begins anew") from None


# The end: what was learned, written down


def fingerprints_of(run: Run) -> dict[str, str]:
    """The fingerprints that `logprobs_confidence.py` gives to predictions of the base model and of the kept adapter."""
    student = run.student
    common = {"task": student.task.settings(), "method": "logprobs", "settings": {}}
    adapters = {"base": {}, "tuned": {"adapter": folder_hash(run.folder)}}
    return {
        name: predictions.fingerprint(**student.llama.identity, **adapter, **common)
        for name, adapter in adapters.items()
    }


def finish(run: Run, fingerprints: dict[str, str]) -> None:
    """Write the curves and, last, the configuration, which says that all is there; remove the checkpoint."""
    import accelerate
    import peft
    import torch
    import transformers

    student, args = run.student, run.args
    libraries = {library.__name__: library.__version__ for library in (torch, transformers, peft, accelerate)}
    config = {
        "base_model": args.model,
        "base_weights": student.llama.identity["weights"],
        "precision": student.llama.identity["precision"],
        "task": student.task.settings(),
        "fingerprint": fingerprints["tuned"],
        "fingerprints": fingerprints,
        "settings": {name: getattr(args, name) for name in SETTINGS},
        "train": run.training.record(),
        "validation": run.validation.record(),
        "before": run.validations[0],
        "best": run.best_validation,
        "steps": run.step,
        "probes": answers_to(student, PROBES),
        "processes": run.world.num_processes,
        "versions": {"python": platform.python_version(), **libraries},
    }
    draw(run, run.folder / "training_curves.png")
    with whole_file(run.folder / CONFIG) as part:
        part.write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
    shutil.rmtree((run.folder / CHECKPOINT).parent)


def answers_to(student: Student, texts: Sequence[str]) -> list[dict]:
    """Label probabilities and label mass of texts, as Method 1 gives them."""
    rows = [student.llama.encode_within(student.frame, text, max(map(len, student.ids)) - 1)[0] for text in texts]
    with student.llama.evaluating():
        log_probs = student.llama.answer_log_probs(rows, student.ids)
    labels = list(student.task.labels)
    found = zip(texts, *tasks.label_probabilities(log_probs, student.answers, labels), strict=True)
    return [
        {"text": text, "probabilities": dict(zip(labels, p.tolist(), strict=True)), "label_mass": float(mass)}
        for text, p, mass in found
    ]


def add_head(run: Run, validation: Table, fingerprint: str) -> str:
    """Fit the head to the kept adapter's answers on all validation rows, which no gradient saw; a line about it."""
    from calibration import fit_head, save_head

    hidden = np.empty((len(validation.rows), run.student.llama.hidden_size), np.float32)
    log_probs, _ = measure(run.student, validation, run.world, hidden)
    correct = log_probs.argmax(axis=1) == validation.targets
    groups = tables.groups_of(validation.examples, run.args.groups)
    try:
        head = fit_head(hidden, np.exp(log_probs.max(axis=1)), correct, groups, fingerprint)
    except ValueError as error:
        raise ValueError(f"--confidence-head: {error}; --resume without it finishes the adapter") from None
    save_head(run.folder / HEAD, head)
    found = head.record
    return (
        f"confidence head fitted on {found['n']:,} validation rows, {found['right']:.1%} right; out-of-fold log loss "
        f"{found['out_of_fold_log_loss']:.4f}, of Platt scaling alone {found['platt_log_loss']:.4f}"
    )


def render(run: Run) -> str:
    """Base and fine-tuned on the validation rows, with intervals of the differences (cluster bootstrap, paired)."""
    from calibration_metrics import bootstrap_interval

    targets, n = run.validation.targets, len(run.validation.targets)

    def values(rows: np.ndarray) -> list[float]:
        """Accuracy and log loss, tuned minus base."""
        found = []
        for log_probs, _ in (run.base, run.best):
            right = log_probs[rows].argmax(axis=1) == targets[rows]
            found.append((right.mean(), -log_probs[rows, targets[rows]].mean()))
        return [after - before for before, after in zip(*found, strict=True)]

    groups = tables.groups_of(run.validation.examples, run.args.groups)
    gain, interval = values(np.arange(n)), bootstrap_interval(values, groups, seed=run.args.seed)
    before, after = run.validations[0], run.best_validation
    lines = [["", "base", "fine-tuned", "difference, 95 % interval"]]
    for i, (name, key) in enumerate((("accuracy", "accuracy"), ("log loss", "log_loss"))):
        difference = f"{gain[i]:+.3f} [{interval[i][0]:+.3f}, {interval[i][1]:+.3f}]"
        lines.append([name, f"{before[key]:.3f}", f"{after[key]:.3f}", difference])
    lines.append(["ECE (noise floor)", *(f"{x['ece']:.3f} ({x['ece_floor']:.3f})" for x in (before, after)), ""])
    for name, key in (("mean confidence", "mean_confidence"), ("label mass", "label_mass")):
        lines.append([name, f"{before[key]:.3f}", f"{after[key]:.3f}", ""])
    chosen = f"step {after['step']} of {run.step}, the one with the best {run.args.early_stopping.replace('_', ' ')}"
    verdict = f"\n{chosen} on these n = {n:,} validation rows, so its numbers here are a little too good.\n"
    if after["log_loss"] >= before["log_loss"]:
        verdict += "It is no better than the base model on them: take another --learning-rate or more rows.\n"
    return verdict + "\n" + command_line.columns(lines)


def draw(run: Run, path: Path) -> None:
    """Training and validation loss, and confidence against accuracy, over the steps."""
    import plotting

    taken, checked = [entry for entry in run.log if "loss" in entry], run.validations
    name, n, watched = run.student.llama.name, len(run.training.rows), len(run.validation.rows)
    caption = f"Fine-tuning {name}, task {run.student.task.name}: {n:,} training rows, validation on n = {watched:,} "
    caption += (
        "rows that are not trained on. The dotted line is the adapter that was kept, chosen on these validation rows."
    )
    with plotting.figure(path, caption, columns=2, height=4.0) as axes:
        losses, truth = axes[0]
        steps, values = [entry["step"] for entry in taken], [entry["loss"] for entry in taken]
        losses.plot(steps, values, color=plotting.SKY, linewidth=0.8, alpha=0.7)
        width = max(1, len(taken) // 20)
        smooth = np.convolve(values, np.ones(width) / width, "valid")
        losses.plot(steps[width - 1 :], smooth, color=plotting.BLUE, label=f"training, mean of {width} steps")
        for axis, number, label, style, color in (
            (losses, "log_loss", "validation, log loss", "o-", plotting.RED),
            (truth, "accuracy", "accuracy", "o-", plotting.GREEN),
            (truth, "mean_confidence", "mean confidence", "o-", plotting.ORANGE),
            (truth, "ece", "ECE, 20 bins", "o-", plotting.PURPLE),
            (truth, "ece_floor", "its noise floor", "--", plotting.GREY),
        ):
            axis.plot([e["step"] for e in checked], [e[number] for e in checked], style, color=color, label=label)
        losses.set(title="Loss", xlabel="step", ylabel="nats", ylim=(0, None))
        truth.set(title="Confidence on the validation rows", xlabel="step", ylim=(0, 1))
        plotting.percent(truth, "y")
        for axis in (losses, truth):
            axis.axvline(run.best_validation["step"], color=plotting.INK, linestyle=":", linewidth=1)
            axis.legend(fontsize=9)


# The fine-tuned model, one text at a time


class FineTunedSentimentClassifier:
    """A fine-tuned folder, ready to classify, with the base model and the task that its training_config.json names."""

    def __init__(self, path: str | Path = ADAPTER_FOLDER, device: str = "auto") -> None:
        base, self.task = read_config(Path(path))
        self.llama = load_llama(base, str(path), device)
        self.student = study(self.llama, self.task)

    def classify_single(self, text: str) -> dict[str, object]:
        """text, prediction, confidence, probabilities and label_mass by Method 1; ValueError for an empty text."""
        found = answers_to(self.student, [text])[0]
        by_label = found["probabilities"]
        if not np.isfinite(list(by_label.values())).all():
            raise ValueError("the model gives no label any probability")
        prediction = max(by_label, key=by_label.__getitem__)
        return found | {"prediction": prediction, "confidence": by_label[prediction]}


def read_config(folder: Path) -> tuple[str, Task]:
    """The base model and the task that a fine-tuned folder's training_config.json names."""
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        return str(config["base_model"]), Task.from_settings(config["task"])
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{folder / CONFIG} is broken: {error}") from None


def study(llama: Llama, task: Task) -> Student:
    """Join a model and a task; ValueError when the task's answers do not work with this model's tokenizer."""
    frame = llama.task_prompt(task)
    return Student(llama, task, frame, tuple(tasks.find_answers(task, llama.tokenizer, frame.render("text"))))


# On Amazon SageMaker: the same training on another machine


def job_from_arguments(
    args: argparse.Namespace, task: Task, training: list[Example], validation: list[Example]
) -> sagemaker_job.Training:
    """What a training job needs to train as these flags do here."""
    watched = some_of(validation, args.validation_limit, args.seed)
    return sagemaker_job.Training(
        model=args.model,
        task=args.task,
        flags={name: getattr(args, name) for name in TRAVELLING},
        sources={"train": args.train, "validation": args.validation},
        training=training,
        validation=validation,
        groups=tables.groups_of(validation, args.groups) if args.groups else None,
        hashes={"train": rows_digest(training, task), "validation": rows_digest(watched, task)},
    )


# Command line


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = command_line.ArgumentParser(__doc__)
    parser.add_argument("--task", default="sentiment", help="a task's name or a TOML file (default: sentiment)")
    group = parser.add_argument_group("the rows")
    add = group.add_argument
    add("--train", default="data:train", metavar="FILE", help="labelled rows to learn from (default: data:train)")
    add("--validation", metavar="FILE", help="labelled rows to watch (default: data:validation, with data:train)")
    limit = "watch N of them, drawn by the seed (default: 500; 0: all)"
    add("--validation-limit", type=natural, default=500, metavar="N", help=limit)
    tables.add_groups_argument(group)
    tables.add_column_arguments(group)
    add_model_arguments(parser)
    parser.set_defaults(adapter="none")
    add = parser.add_argument_group("the training").add_argument
    add("--output-dir", default="fine_tuned_model", metavar="FOLDER", help="default: fine_tuned_model")
    add("--resume", action="store_true", help="go on from the folder's checkpoint, if there is one")
    add("--overwrite", action="store_true", help="replace what a training left in the folder")
    add("--loss", default="cross-entropy", choices=LOSSES, help="default: cross-entropy; it and brier are proper")
    add("--rank", type=int, default=4, metavar="R", help="of the LoRA matrices (default: 4; 64 for an 8B model)")
    add("--alpha", type=float, metavar="A", help="LoRA's scale is A / R (default: 2 R)")
    add("--dropout", type=float, default=0.05, metavar="P", help="on the LoRA input (default: 0.05)")
    add("--learning-rate", type=float, default=1e-3, metavar="X", help="its peak (default: 1e-3; 2e-4 for an 8B model)")
    add("--epochs", type=int, default=2, metavar="N", help="passes over the rows at most (default: 2)")
    add("--batch-size", type=int, default=32, metavar="N", help="rows a step, of all processes (default: 32)")
    add("--micro-batch-size", type=int, metavar="N", help="rows run together (default: by length and device)")
    add("--confidence-head", action="store_true", help="also fit P(right) from the last hidden state, on --validation")
    add("--gradient-checkpointing", action="store_true", help="less memory, more time; the prefix runs with every row")
    add("--validate-every", type=int, default=25, metavar="N", help="steps between validations (default: 25)")
    add("--checkpoint-every", type=int, default=25, metavar="N", help="steps that a kill can lose (default: 25)")
    add("--early-stopping", default="log_loss", choices=["log_loss", "ece"], help="which the best has least of")
    add("--patience", type=natural, default=5, metavar="N", help="validations without a better (default: 5; 0: any)")
    add("--seed", type=natural, default=0, metavar="N", help="of weights, order and dropout (default: 0)")
    sagemaker_job.add_arguments(parser)
    args = parser.parse_args(argv)
    check_arguments(parser, args)
    return args


def check_arguments(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Refuse what cannot be trained with, and fill in what depends on other flags."""
    if args.adapter != "none":
        parser.error("--adapter: a new adapter is trained on the base model; --resume goes on with an unfinished one")
    if args.validation is None:
        if args.train != "data:train":
            parser.error("--train needs --validation: labelled rows that are not trained on")
        args.validation = "data:validation"
    for name in ("rank", "epochs", "batch_size", "micro_batch_size", "validate_every", "checkpoint_every"):
        if (value := getattr(args, name)) is not None and value < 1:
            parser.error(f"--{name.replace('_', '-')} {value}: at least 1")
    if not 0 <= args.dropout < 1:
        parser.error(f"--dropout {args.dropout}: from 0 to below 1")
    args.alpha = 2.0 * args.rank if args.alpha is None else args.alpha
    for name in ("learning_rate", "alpha"):
        if not 0 < getattr(args, name) < math.inf:
            parser.error(f"--{name.replace('_', '-')} {getattr(args, name)}: above 0")
    if args.loss == "mmce" and args.micro_batch_size:
        parser.error("--micro-batch-size: mmce compares the rows of a step with each other, so they run together")
    sagemaker_job.check_arguments(parser, args)
    if args.sagemaker and args.device != "auto":
        parser.error("--device is for training here; the machine on SageMaker uses all of its GPUs")
    if args.resume and args.overwrite:
        parser.error("--resume goes on with what --overwrite would replace; give one of them")


def check_together(student: Student, args: argparse.Namespace, world: object) -> None:
    """Refuse MMCE, which compares the rows of a step with each other, where these cannot run as one batch."""
    if args.loss == "mmce" and (world.num_processes > 1 or student.llama.needs_one_length(student.ids)):
        raise ValueError(
            "--loss mmce compares the rows of a step with each other, so they must run together: in one process, with "
            'scoring = "first-token", on a model that can pad rows'
        )


def check_folder(args: argparse.Namespace) -> bool:
    """Whether there is anything to train; ValueError for a folder that is somebody's, or would be lost."""
    folder = Path(args.output_dir)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"--output-dir {folder} is a file")
    present = {path.name for path in folder.iterdir()} if folder.exists() else set()
    if present and LOG not in present:  # which a training writes first
        raise ValueError(f"--output-dir {folder} holds other files; name a new folder")
    if args.overwrite or not present:
        return True
    if args.resume:
        return CONFIG not in present
    state = "a finished adapter" if CONFIG in present else "an unfinished training; --resume goes on with it"
    raise ValueError(f"{folder} holds {state}; --overwrite replaces it, --output-dir names another folder")


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_arguments(argv)
    if args.stop:
        sagemaker_job.stop(sagemaker_job.settings_from_arguments(args), args.stop)
        return
    task = tasks.read_task(args.task)
    if not check_folder(args):
        print(f"{args.output_dir} holds a finished adapter; nothing to do")
        return
    if args.attach:
        sagemaker_job.attach(sagemaker_job.settings_from_arguments(args), args.attach)
        return
    training, validation = read_both(args, task)
    if args.sagemaker:
        job = job_from_arguments(args, task, training, validation)
        sagemaker_job.train(sagemaker_job.settings_from_arguments(args), job)
        return

    import accelerate

    world = accelerate.PartialState(cpu=choose_device(args.device) == "cpu")
    if world.num_processes > 1:
        args.device = str(world.device)
    llama = load_from(args)
    add_adapter(llama, args)
    student = study(llama, task)
    check_together(student, args, world)
    watched = read_table(student, some_of(validation, args.validation_limit, args.seed), args.validation)
    run = prepare(student, read_table(student, training, args.train), watched, args, world)
    if world.is_main_process:
        count = sum(weight.numel() for weight in run.weights)
        print(f"training {count:,} weights of {llama.name} on {len(training):,} rows, {run.steps:,} steps at most")
    stopped_by = train(run)
    world.destroy_process_group()  # else a process that is done first may abort, and take the others along
    if stopped_by:
        print(f"stopped at step {run.step}, nothing is lost: --resume goes on from there", file=sys.stderr)
        sys.exit(128 + stopped_by)
    if world.is_main_process:
        print(render(run))
        fingerprints = fingerprints_of(run)
        load_adapter(run.student, run.folder)  # the best one; the weights at hand are the last
        if args.confidence_head:
            print("\n" + add_head(run, read_table(student, validation, args.validation), fingerprints["tuned"]))
        finish(run, fingerprints)
        print(f"\n{WRITTEN.format(args.output_dir)}")


if __name__ == "__main__":
    command_line.run(main)
