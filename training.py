"""How an adapter is trained: settings, losses, steps, validations, and checkpoints from which a training goes on.

    run = begin_training(llama, task, training, validation, folder, TrainingSettings(epochs=1))
    take_all_steps(run)                    # or take_step(run), as often as `run.steps` says

A step draws its rows and its dropout masks by seed and number, so a training that goes on from a checkpoint ends with
the same bytes as an unbroken one. Several processes share the rows of a step and of a validation.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import numpy as np

from command_line import progress
from files import whole_file, write_text
from llama import Llama
from logprobs_confidence import LabelScorer, label_scorer
from lora import HEAD, add_adapter, add_gradients, dropping_out, save_adapter
from tables import Example
from task import Task, label_probabilities, nested_answers

LOSSES = ("cross-entropy", "brier", "focal", "label-smoothing", "mmce")
FOCAL_GAMMA, SMOOTHING, MMCE_WEIGHT, MMCE_WIDTH = 2.0, 0.1, 2.0, 0.4
WARM_UP = 0.06  # of the steps
MAX_GRADIENT_NORM = 1.0
LOG, CONFIG = "training_log.jsonl", "training_config.json"
CHECKPOINT = Path("checkpoint") / "state.safetensors"  # in a folder of its own: the adapter's hash must not see it
VALIDATION_HEAD = "         step   train loss  log loss  accuracy  ECE (if calibrated)  mean confidence  label mass"
VALIDATION_ROW = (
    "{log_loss:10.4f}{accuracy:10.3f}{ece:13.3f} ({ece_floor:.3f}){mean_confidence:17.3f}{label_mass:12.3f}"
)


@dataclass(frozen=True)
class TrainingSettings:
    """How an adapter is trained; ValueError names the flag of a value that cannot be."""

    loss: str = "cross-entropy"
    rank: int = 4
    alpha: float = 8.0  # LoRA's scale is alpha / rank
    dropout: float = 0.05  # on the LoRA input
    learning_rate: float = 1e-3  # its peak
    epochs: int = 2  # at most
    batch_size: int = 32  # rows a step, of all processes
    validate_every: int = 25  # steps
    early_stopping: str = "log_loss"  # or "ece": the measure of which the best validation has least
    patience: int = 5  # validations without a better one; 0: any number
    seed: int = 0  # of weights, order and dropout
    gradient_checkpointing: bool = False
    # Whatever these two are, the same adapter comes out, but for rounding.
    micro_batch_size: int | None = None  # rows run together; None: by length and device
    checkpoint_every: int = 25  # steps that a kill can lose

    def __post_init__(self) -> None:
        for name in ("rank", "epochs", "batch_size", "validate_every", "micro_batch_size", "checkpoint_every"):
            number = getattr(self, name)
            if number is not None and number < 1:
                raise ValueError(f"--{name.replace('_', '-')} {number}: at least 1")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"--dropout {self.dropout}: from 0 to below 1")
        for name in ("learning_rate", "alpha"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"--{name.replace('_', '-')} {getattr(self, name)}: above 0")
        if self.loss == "mmce" and self.micro_batch_size:
            raise ValueError("--micro-batch-size: mmce compares the rows of a step, so they run together")

    def decisive(self) -> dict[str, object]:
        """What decides which adapter comes out."""
        return {name: value for name, value in asdict(self).items() if name in DECISIVE}


DECISIVE = tuple(f.name for f in fields(TrainingSettings) if f.name not in ("micro_batch_size", "checkpoint_every"))


# Rows


@dataclass(frozen=True)
class LabelledRows:
    """Where rows come from, and the rows: each has one of the task's labels, as the task spells it."""

    source: str
    examples: Sequence[Example]

    def record(self) -> dict[str, object]:
        """Source, number and a hash of ids, texts and labels."""
        rows = [(example.id, example.text, example.label) for example in self.examples]
        sha256 = hashlib.sha256(json.dumps(rows).encode()).hexdigest()
        return {"source": self.source, "rows": len(rows), "sha256": sha256}


@dataclass(frozen=True)
class EncodedRows:
    """Labelled rows as the model reads them: prompt ids, and the number of each row's true label [n]."""

    rows: LabelledRows
    prompts: list[list[int]]
    targets: np.ndarray


def encode_rows(scorer: LabelScorer, rows: LabelledRows) -> EncodedRows:
    """Rows as prompt ids and label numbers; ValueError names the row that cannot be used."""
    labels, prompts = list(scorer.task.labels), []
    for example in rows.examples:
        try:
            prompts.append(scorer.encode(example.text)[0])
        except ValueError as error:
            reason = str(error).partition("; --truncate")[0]  # which would train on half a text
            raise ValueError(f"{rows.source}: row {example.id!r}: {reason}") from None
    return EncodedRows(rows, prompts, np.array([labels.index(example.label) for example in rows.examples]))


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


def row_losses(name: str, answer_log_probs: object, scorer: LabelScorer, target: object) -> object:
    """The loss of each row [n] from the log-probabilities of all answers [n, answers].

    What `task.label_probabilities` does, in torch: gradients flow, and no probability of nested answers counts twice.
    """
    import torch

    exclusive = list(answer_log_probs.unbind(dim=1))
    for shorter, longer in nested_answers(scorer.answers):
        share = (exclusive[longer] - exclusive[shorter]).exp().clamp(max=1 - 1e-6)
        exclusive[shorter] = exclusive[shorter] + (-share).log1p()
    totals = []
    for label in scorer.task.labels:
        of_label = [exclusive[i] for i, answer in enumerate(scorer.answers) if answer.label == label]
        totals.append(torch.stack(of_label).logsumexp(dim=0))
    by_label = torch.stack(totals, dim=1)
    mass = by_label.logsumexp(dim=1)
    return label_loss(name, by_label - mass[:, None], target) - mass


# Measuring


@dataclass(frozen=True)
class RowAnswers:
    """What a model says of n rows: log P(label | it is a label) [n, labels], and label mass [n]."""

    log_probs: np.ndarray
    mass: np.ndarray


def answer_rows(
    scorer: LabelScorer, encoded: EncodedRows, world: object | None = None, hidden: np.ndarray | None = None
) -> RowAnswers:
    """The model's answers without dropout, float64; several processes of a `world` share the rows.

    `hidden`, see Llama.answer_log_probs, is filled where one process has all rows.
    """
    shares = world is not None and world.num_processes > 1
    mine = slice(world.process_index, None, world.num_processes) if shares else slice(None)
    with scorer.llama.evaluating():
        answer_ids = [answer.ids for answer in scorer.answers]
        log_probs = scorer.llama.answer_log_probs(encoded.prompts[mine], answer_ids, hidden=hidden)
    if shares:
        from accelerate.utils import gather_object

        parts = gather_object([log_probs])
        log_probs = np.empty((len(encoded.prompts), len(answer_ids)))
        for process, part in enumerate(parts):
            log_probs[process :: world.num_processes] = part
    probabilities, mass = label_probabilities(log_probs, scorer.answers, list(scorer.task.labels))
    return RowAnswers(np.log(np.maximum(probabilities, np.finfo(np.float64).tiny)), mass)


def accuracy_and_log_loss(log_probs: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """[2]: the share of rows whose most probable label is the true one, and the mean of -log P(true label) in nats."""
    is_right = log_probs.argmax(axis=1) == targets
    return np.array([is_right.mean(), -log_probs[np.arange(len(targets)), targets].mean()])


def validation_measures(answers: RowAnswers, targets: np.ndarray) -> dict[str, float]:
    """What a validation reports; `ece_floor` is the expected ECE of a calibrated model, the noise floor."""
    from calibration_metrics import consistency_resampling, expected_calibration_error

    confidence = np.exp(answers.log_probs.max(axis=1))
    correct = answers.log_probs.argmax(axis=1) == targets
    accuracy, log_loss = accuracy_and_log_loss(answers.log_probs, targets).tolist()
    return {
        "n": len(targets),
        "log_loss": log_loss,
        "accuracy": accuracy,
        "ece": expected_calibration_error(confidence, correct),
        "ece_floor": float(consistency_resampling(confidence, n_draws=200).mean()),
        "mean_confidence": float(confidence.mean()),
        "label_mass": float(answers.mass.mean()),
    }


# Training


@dataclass
class TrainingRun:
    """A training: what it works on, and where it stands. A checkpoint holds the second half."""

    scorer: LabelScorer
    training: EncodedRows
    validation: EncodedRows
    folder: Path
    settings: TrainingSettings
    world: object  # accelerate's PartialState: which of the processes this one is
    optimizer: object
    step: int = 0
    stale: int = 0  # validations since the best one
    log: list[dict] = field(default_factory=list)
    base: RowAnswers | None = None  # to the validation rows, before training
    best: RowAnswers | None = None  # and with the best adapter

    @property
    def steps(self) -> int:
        """Steps of the whole training, unless it stops early."""
        return self.settings.epochs * math.ceil(len(self.training.prompts) / self.settings.batch_size)

    @property
    def weights(self) -> list:
        return self.optimizer.param_groups[0]["params"]

    @property
    def validations(self) -> list[dict]:
        return [entry for entry in self.log if "log_loss" in entry]

    @property
    def best_validation(self) -> dict:
        """Of the trained adapters: the untrained one, step 0, is no candidate."""
        return min(self.validations[1:], key=lambda entry: entry[self.settings.early_stopping])

    def identity(self) -> dict[str, object]:
        """What must be equal for a checkpoint to be continued."""
        return {
            **self.settings.decisive(),
            "base_weights": self.scorer.llama.identity["weights"],
            "precision": self.scorer.llama.identity["precision"],
            "task": self.scorer.task.settings(),
            "train": self.training.rows.record()["sha256"],
            "validation": self.validation.rows.record()["sha256"],
        }


def begin_training(
    llama: Llama,
    task: Task,
    training: LabelledRows,
    validation: LabelledRows,
    folder: Path,
    settings: TrainingSettings,
    resume: bool = False,
) -> TrainingRun:
    """Give the model a fresh adapter to train, or with `resume` that of the folder's checkpoint, if there is one.

    Without it what an earlier training left in the folder is replaced.
    """
    import accelerate
    import torch

    world = accelerate.PartialState(cpu=llama.device == "cpu")
    lora = settings.rank, settings.alpha, settings.dropout
    add_adapter(llama, *lora, settings.seed, settings.gradient_checkpointing)
    scorer = label_scorer(llama, task)
    check_rows_run_together(settings, scorer, world.num_processes)
    weights = [value for value in llama.model.parameters() if value.requires_grad]
    for value in weights:
        value.grad = torch.zeros_like(value)
    optimizer = torch.optim.AdamW(weights, lr=settings.learning_rate, weight_decay=0.0)
    encoded = encode_rows(scorer, training), encode_rows(scorer, validation)
    with llama.evaluating():  # before the first step, whether it begins a training or goes on with one
        llama.try_packing(encoded[0].prompts)
    run = TrainingRun(scorer, *encoded, folder, settings, world, optimizer)
    if resume and (folder / CHECKPOINT).exists():
        load_checkpoint(run)
    if world.is_main_process:
        folder.mkdir(parents=True, exist_ok=True)
        if not run.log:  # what an earlier training left must not be taken for this one's
            for name in (CONFIG, HEAD, CHECKPOINT):
                (folder / name).unlink(missing_ok=True)
        write_text(folder / LOG, "".join(json.dumps(entry) + "\n" for entry in run.log))
    return run


def check_rows_run_together(settings: TrainingSettings, scorer: LabelScorer, processes: int) -> None:
    """Refuse MMCE, which compares the rows of a step with each other, where these cannot run as one batch."""
    one_length = scorer.llama.needs_one_length([answer.ids for answer in scorer.answers])
    if settings.loss == "mmce" and (processes > 1 or one_length):
        raise ValueError(
            "--loss mmce compares the rows of a step with each other, so they must run together: in one process, with "
            'scoring = "first-token", on a model that can pad rows'
        )


def take_all_steps(run: TrainingRun) -> int:
    """Train to the last step, or until the validation has stopped improving; the signal that ended it before, or 0.

    The folder then holds the best adapter so far, and a checkpoint of the last step.
    """
    settings, size = run.settings, run.settings.batch_size
    with stop_signals() as stopping, progress(run.steps * size, run.step * size) as advance:
        while True:
            is_validated = bool(run.validations) and run.validations[-1]["step"] == run.step
            if not is_validated and (run.step % settings.validate_every == 0 or run.step == run.steps):
                validate(run)
            if run.step == run.steps or (settings.patience and run.stale >= settings.patience):
                save_checkpoint(run)
                return 0
            stopped = take_step(run, stopping)
            advance(size)
            if stopped or run.step % settings.checkpoint_every == 0:
                save_checkpoint(run)
            if stopped:
                return stopping[0] if stopping else signal.SIGTERM  # another process was told


def take_step(run: TrainingRun, stopping: Sequence[int] = ()) -> bool:
    """One step of AdamW on the next rows, shared among the processes; whether any of these was asked to stop."""
    import torch

    started = time.monotonic()
    run.step += 1
    rows = batch_of(run.step, len(run.training.prompts), run.settings.batch_size, run.settings.seed)
    own_loss = compute_gradients(run, rows)
    loss, stops = sum_over_processes(run.weights, [own_loss, float(bool(stopping))], run.world)
    norm = float(torch.nn.utils.clip_grad_norm_(run.weights, MAX_GRADIENT_NORM))
    if not math.isfinite(norm):
        advice = "use a lower --learning-rate or --dtype float32"
        raise ValueError(f"the gradient of step {run.step} is not finite; {advice}")
    rate = learning_rate(run.step, run.steps, run.settings.learning_rate)
    run.optimizer.param_groups[0]["lr"] = rate
    run.optimizer.step()
    speed = len(rows) / (time.monotonic() - started)
    add_to_log(run, {"loss": loss, "learning_rate": rate, "gradient_norm": norm, "rows_per_second": speed})
    return stops > 0


def compute_gradients(run: TrainingRun, rows: np.ndarray) -> float:
    """Leave in the weights the gradient of this process's part of the rows' mean loss; returns that part."""
    import torch
    from transformers.modeling_layers import GradientCheckpointingLayer

    settings, scorer, llama = run.settings, run.scorer, run.scorer.llama
    mine = rows[run.world.process_index :: run.world.num_processes]
    targets = torch.tensor(run.training.targets[mine], device=llama.model.device)
    losses = []

    def loss(log_probs: object, batch: list[int]) -> object:
        value = row_losses(settings.loss, log_probs, scorer, targets[batch]).sum() / len(rows)
        losses.append(value.item())
        return value

    run.optimizer.zero_grad(set_to_none=False)
    llama.model.eval()  # the model's own dropout stays off, the adapter's is ours
    for module in llama.model.modules():
        if isinstance(module, GradientCheckpointingLayer):
            module.training = settings.gradient_checkpointing  # transformers checkpoints only what is in training
    if len(mine):
        # MMCE compares rows with each other, so all of them must be in one batch.
        together = len(mine) if settings.loss == "mmce" else settings.micro_batch_size
        prompts = [run.training.prompts[i] for i in mine]
        answer_ids = [answer.ids for answer in scorer.answers]
        with dropping_out(llama, [settings.seed, run.step]):
            add_gradients(llama, prompts, answer_ids, loss, together, not settings.gradient_checkpointing)
    return float(sum(losses))


def batch_of(step: int, n: int, size: int, seed: int) -> np.ndarray:
    """The row numbers of a step, which count from 1: every epoch has its own order, decided by seed and epoch alone."""
    epoch, at = divmod(step - 1, math.ceil(n / size))
    return np.random.default_rng([seed, epoch]).permutation(n)[at * size : (at + 1) * size]


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Up in a straight line over the first steps, then down along a half cosine to nearly nothing at the last.

    transformers.get_cosine_schedule_with_warmup rounds differently: a quarter of the recorded rates would change.
    """
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

    parts = [*(weight.grad.flatten() for weight in weights), torch.tensor(numbers, device=weights[0].device)]
    *gradients, numbers = reduce(torch.cat(parts), "sum").split([len(part) for part in parts])
    for weight, gradient in zip(weights, gradients, strict=True):
        weight.grad.copy_(gradient.view_as(weight))
    return numbers.tolist()


def validate(run: TrainingRun) -> None:
    """Measure on the validation rows, print a line, and keep the adapter if it is the best so far."""
    answers = answer_rows(run.scorer, run.validation, run.world)
    measures, kept = validation_measures(answers, run.validation.targets), False
    if run.step == 0:
        run.base = answers
    else:
        name = run.settings.early_stopping
        kept = all(measures[name] < earlier[name] for earlier in run.validations[1:])
        run.stale += 1
    if kept:
        run.stale, run.best = 0, answers
        if run.world.is_main_process:
            save_adapter(run.scorer.llama, run.folder)
    add_to_log(run, measures)
    if run.world.is_main_process:
        print_validation(run, measures, kept)


def print_validation(run: TrainingRun, measures: dict[str, float], kept: bool) -> None:
    """A line of the validation table, its head before the first; above the progress bar, if there is one."""
    from tqdm import tqdm

    if run.step == 0:
        n = len(run.validation.prompts)
        tqdm.write(f"validation on {n:,} rows that are not trained on\n\n{VALIDATION_HEAD}")
    losses = [entry["loss"] for entry in run.log if "loss" in entry][-run.settings.validate_every :]
    loss = f"{np.mean(losses):12.3f}" if losses else " " * 12
    line = f"{run.step:5} of {run.steps:<5}{loss}" + VALIDATION_ROW.format(**measures)
    tqdm.write(line + ("  kept" if kept else ""))
    sys.stdout.flush()


def add_to_log(run: TrainingRun, entry: dict) -> None:
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


def save_checkpoint(run: TrainingRun) -> None:
    """Write weights, moments and standing to one file, which is replaced as a whole."""
    import torch
    from safetensors.torch import save_file

    if not run.world.is_main_process:
        return
    tensors = {}
    for number, weight in enumerate(run.weights):
        of_weight = {"weight": weight.detach(), **run.optimizer.state[weight]}
        tensors |= {f"{number}.{name}": value.cpu().contiguous() for name, value in of_weight.items()}
    for name, answers in (("base", run.base), ("best", run.best)):
        if answers is not None:
            tensors |= {f"{name}.{part}": torch.tensor(value) for part, value in vars(answers).items()}
    standing = {"step": run.step, "stale": run.stale, "log": run.log, "settings": run.identity()}
    path = run.folder / CHECKPOINT
    path.parent.mkdir(exist_ok=True)
    with whole_file(path) as scratch:
        save_file(tensors, scratch, {"standing": json.dumps(standing)})


def load_checkpoint(run: TrainingRun) -> None:
    """Go on from the folder's checkpoint; ValueError if it is broken or another training's."""
    from safetensors import SafetensorError, safe_open

    path = run.folder / CHECKPOINT
    try:
        with safe_open(path, "pt") as file:
            standing = json.loads(file.metadata()["standing"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
        then = standing["settings"]
        for name, now in json.loads(json.dumps(run.identity())).items():
            if now != then.get(name):
                what = name.replace("_", " ")
                raise ValueError(f"{path} is of another training: {what} is not the same; --overwrite begins anew")
        restore(run, standing, tensors)
    except (SafetensorError, KeyError, TypeError, AttributeError, RuntimeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is broken ({error}); --overwrite begins anew") from None


def restore(run: TrainingRun, standing: dict, tensors: dict) -> None:
    """Let a run stand where the checkpoint stands that holds these numbers and tensors."""
    import torch

    moments = {}
    with torch.no_grad():
        for number, weight in enumerate(run.weights):
            weight.copy_(tensors[f"{number}.weight"])
            moments[number] = {name: tensors[f"{number}.{name}"] for name in ("step", "exp_avg", "exp_avg_sq")}
    run.optimizer.load_state_dict(run.optimizer.state_dict() | {"state": moments})
    run.step, run.stale, run.log = standing["step"], standing["stale"], standing["log"]
    for name in ("base", "best"):
        if f"{name}.mass" in tensors:
            setattr(run, name, RowAnswers(tensors[f"{name}.log_probs"].numpy(), tensors[f"{name}.mass"].numpy()))
