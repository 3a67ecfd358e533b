"""fine_tune_model.py, in this process and as the command that a user types.

Truth comes from slow and obvious implementations: whole rows one by one through a plain forward pass, losses by torch,
scikit-learn, hand and double loops, Method 1's own predictions of the adapter that was written, plain transformers and
peft, and unbroken runs for broken ones. All models but one are tiny and random; the tables are made up here.
"""

import csv
import functools
import json
import math
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import accelerate
import numpy as np
import pytest
from conftest import tiny

import calibration_metrics
import command_line
import fine_tune_model
import llama as loader
import logprobs_confidence
import predictions
import task as tasks
from fine_tune_model import (
    CHECKPOINT,
    CONFIG,
    HEAD,
    LOG,
    LOSSES,
    FineTunedSentimentClassifier,
    Student,
    add_adapter,
    label_loss,
    main,
    measure,
    parse_arguments,
    prepare,
    read_table,
    row_losses,
    study,
    take_step,
)
from llama import load_llama
from model_files import folder_hash
from task import TASKS, Answer, Example, Task

ROOT = Path(__file__).parent.parent
SENTIMENT, CHAT = TASKS["sentiment"], TASKS["sentiment-yes-no"]
LABELS = {"negative": ("rather bad", "poor"), "positive": ("good",)}
WHOLE_ANSWERS = Task("mood", LABELS, "Which mood?\n{text}\nIt is", scoring="sequence")
# One answer begins another, and both ends of the probability must be counted once.
NESTED = Task(
    "opinion", {"negative": ("no",), "positive": ("no doubt",), "x": ("yes",)}, "{text}\nGood?", scoring="sequence"
)
WORDS = ("a", "film", "that", "is", "not", "long", "funny", "dull", "and", "never", "quite", "warm", "told", "slow")
WORDS += ("with", "some", "heart", "but", "too", "many", "turns")
ADAPTER = "adapter_model.safetensors"
RUN = ["--batch-size", 5, "--epochs", 2, "--validate-every", 3, "--checkpoint-every", 3, "--learning-rate", 0.02]
STEPS = 10  # of that run on the 23 rows of training.csv; the last step of an epoch has three


@pytest.fixture(scope="module", autouse=True)
def quick():
    """Tiny models run faster on one thread; the tokenizer, and its vocabulary with it, is read once."""
    import torch
    from transformers import AutoTokenizer

    before, patch = torch.get_num_threads(), pytest.MonkeyPatch()
    torch.set_num_threads(1)
    patch.setattr(AutoTokenizer, "from_pretrained", functools.cache(AutoTokenizer.from_pretrained))
    yield before
    patch.undo()
    torch.set_num_threads(before)


def labelled(n, seed, labels=("negative", "positive")):
    """n rows (id, text, label) whose last word tells the label."""
    draw = random.Random(seed)
    ends = ("bad", "good", "so so")
    return [
        (
            f"{seed}-{i}",
            f"{' '.join(draw.choices(WORDS, k=draw.randint(3, 12)))} {ends[i % len(labels)]}",
            labels[i % len(labels)],
        )
        for i in range(n)
    ]


def write_csv(path, rows, header=("id", "text", "label")):
    with open(path, "w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([header, *rows])
    return path


def examples(n, seed=0, **options):
    return [Example(*row) for row in labelled(n, seed, **options)]


@pytest.fixture(scope="module")
def tables(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tables")
    write_csv(folder / "training.csv", labelled(23, 0))
    write_csv(folder / "validation.csv", labelled(25, 1))
    return folder


@pytest.fixture(scope="module")
def base(tokenizer, tmp_path_factory):
    """A tiny Llama of three layers, so that peft names the projections and not the layers, as a model folder."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    tiny("llama", tokenizer, num_hidden_layers=3).model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def command(base, tables):
    """The arguments of a training that writes into a folder; later flags replace earlier ones."""

    def arguments(folder, *flags):
        names = ["--model", base, "--train", tables / "training.csv", "--validation", tables / "validation.csv"]
        return [*map(str, [*names, "--device", "cpu", "--output-dir", folder, *RUN, *flags])]

    return arguments


def exit_code_of(function):
    try:
        command_line.run(function)
    except SystemExit as stopped:
        return stopped.code or 0
    return 0


REAL_DRAW = fine_tune_model.draw


@pytest.fixture
def call(command, capsys):
    """Train in this process, without a real picture, which takes longest: -> exit code, stdout, stderr."""

    def run_main(folder, *flags):
        capsys.readouterr()
        with pytest.MonkeyPatch.context() as patch:
            if fine_tune_model.draw is REAL_DRAW:
                patch.setattr(fine_tune_model, "draw", lambda run, path: path.write_bytes(b""))
            code = exit_code_of(lambda: main(command(folder, *flags)))
        return code, *capsys.readouterr()

    return run_main


@pytest.fixture(scope="module")
def unbroken(command, tmp_path_factory):
    """The folder of a run that nothing disturbed."""
    folder = tmp_path_factory.mktemp("runs") / "unbroken"
    assert exit_code_of(lambda: main(command(folder))) == 0
    return folder


def log_of(folder):
    """The log without its timings."""
    entries = [json.loads(line) for line in (folder / LOG).read_text().splitlines()]
    return [{name: value for name, value in entry.items() if name != "rows_per_second"} for entry in entries]


def validations_of(folder):
    return [entry for entry in log_of(folder) if "log_loss" in entry]


def config_of(folder):
    return json.loads((folder / CONFIG).read_text())


def assert_same_run(folder, truth):
    assert (folder / ADAPTER).read_bytes() == (truth / ADAPTER).read_bytes()
    assert (folder / "adapter_config.json").read_bytes() == (truth / "adapter_config.json").read_bytes()
    assert log_of(folder) == log_of(truth) and config_of(folder) == config_of(truth)
    assert {path.name for path in folder.iterdir()} == {path.name for path in truth.iterdir()}


def one_error(result, *words):
    code, out, err = result
    errors = [line for line in err.splitlines() if not line.startswith("note: ")]
    assert (code, len(errors)) == (2, 1) and errors[0].startswith("error: "), (code, out, err)
    assert all(word in errors[0] for word in words), errors[0]


# What is learned from what


def begin(llama, task, folder, *flags, n=7, seed=3):
    """A run at its beginning, its adapter as if it had been trained a little."""
    import torch

    args = parse_arguments([*map(str, ["--output-dir", folder, "--device", "cpu", "--batch-size", 5, *flags])])
    add_adapter(llama, args)
    with torch.no_grad():
        for name, weight in llama.model.named_parameters():
            if "lora_B" in name:
                weight.normal_(0, 0.3)
    student = study(llama, task)
    labels = tuple(task.labels)
    table = [read_table(student, examples(n, number, labels=labels), "a table") for number in (seed, seed + 1)]
    return prepare(student, *table, args, accelerate.PartialState(cpu=True))


@pytest.mark.parametrize("task", [SENTIMENT, CHAT, WHOLE_ANSWERS], ids=["completion", "chat", "whole answers"])
def test_training_reads_the_prompts_and_answers_of_method_1(tiny_llama, tokenizer, task, monkeypatch):
    rows = [*examples(4), Example("odd", "  1999 <|im_end|>\ncaf\u00e9 \U0001f600 ", "positive")]
    seen = []

    def see(llama, prompts, answers, *rest, **options):
        seen.append((list(prompts), list(answers)))
        return np.log(np.full((len(prompts), len(answers)), 0.01))

    monkeypatch.setattr(loader.Llama, "answer_log_probs", see)
    logprobs_confidence.score(rows, logprobs_confidence.prepare(tiny_llama, task))
    student = study(tiny_llama, task)
    table = read_table(student, rows, "a table")
    assert [(table.rows, student.ids)] == seen
    assert [list(task.labels)[target] for target in table.targets] == [row.label for row in rows]
    if task is SENTIMENT:
        assert table.rows[:4] == [tokenizer(task.prompt(row.text)).input_ids for row in rows[:4]]


def slow_label_loss(name, p, target):
    """The losses as they are written in the papers, row by row and pair by pair, from probabilities [n, labels]."""
    k, rows = p.shape[1], range(len(p))
    if name == "cross-entropy":
        return [-p[i, target[i]].log() for i in rows]
    if name == "brier":
        return [sum((p[i, label] - (1 if label == target[i] else 0)) ** 2 for label in range(k)) for i in rows]
    if name == "focal":
        return [-((1 - p[i, target[i]]) ** 2) * p[i, target[i]].log() for i in rows]
    if name == "label-smoothing":
        weight = [[0.9 * (label == target[i]) + 0.1 / k for label in range(k)] for i in rows]
        return [-sum(weight[i][label] * p[i, label].log() for label in range(k)) for i in rows]
    confidence, right = [p[i].max() for i in rows], [float(p[i].argmax() == target[i]) for i in rows]
    pairs = [
        (right[i] - confidence[i]) * (right[j] - confidence[j]) * (-(confidence[i] - confidence[j]).abs() / 0.4).exp()
        for i, j in product(rows, rows)
    ]
    mmce = (sum(pairs) / len(pairs)).sqrt()
    return [-p[i, target[i]].log() + 2 * mmce for i in rows]


def random_log_probs(rows, columns, seed=0):
    import torch

    return torch.randn(rows, columns, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("labels", [2, 4])
@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_is_what_its_paper_and_others_say_and_so_is_its_gradient(name, labels):
    import torch
    from sklearn.metrics import brier_score_loss

    logits = random_log_probs(9, labels).requires_grad_()
    target = torch.arange(9) % labels
    log_probs = logits.log_softmax(1)
    found = label_loss(name, log_probs, target)
    torch.testing.assert_close(found, torch.stack(slow_label_loss(name, log_probs.exp(), target)), rtol=1e-7, atol=0)
    library = {"cross-entropy": {}, "label-smoothing": {"label_smoothing": 0.1}}
    if name in library:
        theirs = torch.nn.functional.cross_entropy(logits, target, reduction="none", **library[name])
        torch.testing.assert_close(found, theirs, rtol=1e-12, atol=0)
    p = log_probs.detach().exp().numpy()
    if name == "brier":
        theirs = brier_score_loss(target, p, labels=[*range(labels)], scale_by_half=False)
        assert found.mean().item() == pytest.approx(theirs, rel=1e-12)
        if labels == 2:
            assert theirs == pytest.approx(2 * np.mean((p[:, 1] - target.numpy()) ** 2), rel=1e-12)
    assert torch.autograd.gradcheck(lambda x: label_loss(name, x.log_softmax(1), target), logits)
    single = label_loss(name, log_probs.detach().float(), target)
    assert single.dtype == torch.float32 and torch.allclose(single.double(), found, rtol=1e-4)


def test_a_loss_of_three_rows_worked_out_by_hand():
    import torch

    p, target = torch.tensor([[0.8, 0.2], [0.6, 0.4], [0.1, 0.9]], dtype=torch.float64), torch.tensor([0, 1, 1])
    hand = {
        "cross-entropy": [0.223144, 0.916291, 0.105361],
        "brier": [2 * 0.2**2, 2 * 0.6**2, 2 * 0.1**2],
        "focal": [0.04 * 0.223144, 0.36 * 0.916291, 0.01 * 0.105361],
        "label-smoothing": [0.95 * 0.223144 + 0.05 * 1.609438, 0.95 * 0.916291 + 0.05 * 0.510826, 0.215222],
    }
    for name, values in hand.items():
        assert label_loss(name, p.log(), target).tolist() == pytest.approx(values, abs=2e-6), name


def test_mmce_is_zero_where_confidence_is_right_and_finite_in_its_gradient():
    import torch

    log_probs = torch.tensor([[0.0, -1e3], [-1e3, 0.0]], dtype=torch.float64, requires_grad=True)
    value = label_loss("mmce", log_probs, torch.tensor([0, 1])).sum()
    value.backward()
    assert value.item() == pytest.approx(0, abs=1e-5) and torch.isfinite(log_probs.grad).all()


@pytest.mark.parametrize("name", LOSSES)
def test_a_row_s_loss_is_that_of_the_labels_less_the_logarithm_of_their_mass(name):
    import torch

    answers = [Answer(label, (i,), "") for i, label in enumerate(["negative", "positive", "negative", "positive"])]
    student = Student(None, SENTIMENT, None, tuple(answers))
    log_probs = random_log_probs(6, 20).log_softmax(1)[:, :4]  # of 20 tokens, four are answers
    target = torch.tensor([0, 1, 1, 0, 1, 0])
    p = torch.stack([log_probs[:, [0, 2]].exp().sum(1), log_probs[:, [1, 3]].exp().sum(1)], dim=1)
    mass = p.sum(1)
    truth = torch.stack(slow_label_loss(name, p / mass[:, None], target)) - mass.log()
    torch.testing.assert_close(row_losses(name, log_probs, student, target), truth)
    if name == "cross-entropy":
        torch.testing.assert_close(truth, -p[range(6), target].log())


def test_where_an_answer_begins_another_no_probability_is_counted_twice(tiny_llama):
    import torch

    student = study(tiny_llama, NESTED)
    assert sorted(len(answer.ids) for answer in student.answers) == [1, 1, 1, 1, 2, 2]
    log_probs = random_log_probs(5, 6).log_softmax(1)
    for short, long in product(range(6), range(6)):  # what an answer goes on to is less probable than the answer
        if len(student.ids[short]) < len(student.ids[long]) and student.ids[long][0] == student.ids[short][0]:
            log_probs[:, long] = log_probs[:, short] - 0.5
    p, mass = tasks.label_probabilities(log_probs.numpy(), student.answers, list(NESTED.labels))
    target = np.array([0, 1, 2, 0, 1])
    truth = -np.log(p[range(5), target] * mass)
    found = row_losses("cross-entropy", log_probs.requires_grad_(), student, torch.tensor(target))
    assert found.tolist() == pytest.approx(truth.tolist(), rel=1e-9)
    assert torch.autograd.gradcheck(lambda x: row_losses("cross-entropy", x, student, torch.tensor(target)), log_probs)


def slow_gradient(run, rows, loss):
    """(gradient by weight, loss) of a step from whole rows one by one, each through a plain pass; float64."""
    import torch

    student, model = run.student, run.student.llama.model
    model.zero_grad()
    p = []
    for number in rows:
        prompt, begun, probability = run.training.rows[number], {}, {}
        for answer in student.answers:
            if answer.ids[:-1] not in begun:
                logits = model(input_ids=torch.tensor([[*prompt, *answer.ids[:-1]]])).logits[0, len(prompt) - 1 :]
                begun[answer.ids[:-1]] = logits.double().log_softmax(-1)
            probability[answer.ids] = begun[answer.ids[:-1]][range(len(answer.ids)), list(answer.ids)].sum().exp()
        for ids in sorted(probability, key=len, reverse=True):
            longer = [other for other in probability if other != ids and other[: len(ids)] == ids]
            probability[ids] = probability[ids] - sum(probability[other] for other in longer)
        of_label = dict.fromkeys(student.task.labels, 0.0)
        for answer in student.answers:
            of_label[answer.label] += probability[answer.ids]
        p.append(torch.stack([*of_label.values()]))
    p = torch.stack(p)
    mass = p.sum(1)
    losses = torch.stack(slow_label_loss(loss, p / mass[:, None], run.training.targets[rows])) - mass.log()
    losses.mean().backward()
    return [weight.grad.double().flatten().clone() for weight in run.weights], losses.mean().item()


CHECKPOINTING = ["--gradient-checkpointing"]
GRADIENTS = [
    *[("llama", SENTIMENT, loss, []) for loss in LOSSES],
    *[("llama", SENTIMENT, "cross-entropy", ["--micro-batch-size", size]) for size in (1, 2, 100)],
    *[("llama", SENTIMENT, loss, CHECKPOINTING) for loss in ("cross-entropy", "mmce")],
    ("llama", SENTIMENT, "brier", [*CHECKPOINTING, "--micro-batch-size", 2]),
    ("llama", CHAT, "focal", []),
    *[("llama", WHOLE_ANSWERS, "cross-entropy", flags) for flags in ([], ["--micro-batch-size", 2], CHECKPOINTING)],
    ("llama", NESTED, "label-smoothing", []),
    *[("gpt2", SENTIMENT, "cross-entropy", flags) for flags in ([], CHECKPOINTING)],
    ("gpt2", WHOLE_ANSWERS, "brier", []),
]


@pytest.mark.parametrize(
    ("kind", "task", "loss", "flags"),
    GRADIENTS,
    ids=lambda value: getattr(value, "name", None) or (" ".join(map(str, value)) if type(value) is list else value),
)
def test_a_step_s_gradient_is_that_of_whole_rows_one_by_one(tokenizer, tmp_path, monkeypatch, kind, task, loss, flags):
    import torch

    monkeypatch.setattr(fine_tune_model, "MAX_GRADIENT_NORM", math.inf)
    run = begin(tiny(kind, tokenizer), task, tmp_path / "run", "--loss", loss, "--dropout", 0.3, *flags)
    rows = fine_tune_model.batch_of(1, 7, 5, 0)
    with run.student.llama.dropping_out([0, 1]):
        truth, truth_loss = slow_gradient(run, rows, loss)
    run.step = 1
    assert take_step(run, False) is False
    truth, found = torch.cat(truth), torch.cat([weight.grad.double().flatten() for weight in run.weights])
    assert (found - truth).norm() < 1e-5 * truth.norm() and truth.norm() > 1e-3
    assert run.log[-1]["loss"] == pytest.approx(truth_loss, rel=1e-5)
    assert run.log[-1]["gradient_norm"] == pytest.approx(truth.norm().item(), rel=1e-4)


def test_gradient_checkpointing_runs_the_layers_again_and_nothing_else_is_in_training(tokenizer, tmp_path):
    run = begin(tiny("gpt2", tokenizer), SENTIMENT, tmp_path / "run", *CHECKPOINTING)
    model, calls, passes = run.student.llama.model, [], []
    blocks = model.base_model.model.transformer.h
    blocks[0].ln_1.register_forward_pre_hook(lambda *_: calls.append(model.training))
    model.get_output_embeddings().register_forward_hook(lambda *_: passes.append(1))
    run.step = 1
    take_step(run, False)
    assert len(calls) == 2 * len(passes) > 0 and not any(calls)
    assert {name for name, module in model.named_modules() if module.training} == {
        name for name, module in model.named_modules() if module in [*blocks]
    }
    run.args.gradient_checkpointing = False
    measure(run.student, run.validation, run.world)
    assert not any(module.training for module in model.modules())


def test_a_step_is_adamw_s_with_the_gradient_cut_to_norm_one(tokenizer, tmp_path):
    import torch

    run = begin(tiny("llama", tokenizer), SENTIMENT, tmp_path / "run", "--epochs", 3, "--learning-rate", 0.01)
    theirs = [torch.nn.Parameter(weight.detach().clone()) for weight in run.weights]
    optimizer = torch.optim.AdamW(theirs, lr=1.0, weight_decay=0.0)
    for step in (1, 2, 3):
        rows = fine_tune_model.batch_of(step, 7, 5, 0)
        with run.student.llama.dropping_out([0, step]):
            gradient, _ = slow_gradient(run, rows, "cross-entropy")
        norm = torch.cat(gradient).norm()
        for weight, part in zip(theirs, gradient, strict=True):
            weight.grad = (part / norm.clamp(min=1)).float().view_as(weight)
        optimizer.param_groups[0]["lr"] = fine_tune_model.learning_rate(step, 6, 0.01)
        optimizer.step()
        run.step = step
        take_step(run, False)
        for weight, their in zip(run.weights, theirs, strict=True):
            torch.testing.assert_close(weight, their, rtol=0, atol=0.01 * 0.05)  # of a step of at most 0.01
            their.data.copy_(weight.data)
    assert [round(entry["learning_rate"], 6) for entry in run.log] == [0.01, 0.00933, 0.0075]


def test_the_rate_rises_in_a_line_and_falls_along_a_cosine():
    rates = [fine_tune_model.learning_rate(step, 100, 2.0) for step in range(1, 101)]
    assert rates[:6] == pytest.approx([2 * step / 6 for step in range(1, 7)])
    assert rates[6:] == pytest.approx([1 + math.cos(math.pi * k / 95) for k in range(1, 95)])
    assert 0 < rates[-1] < 0.01 and fine_tune_model.learning_rate(1, 1, 2.0) == 2.0


def test_an_epoch_shows_every_row_once_in_an_order_of_its_own():
    epochs = [[fine_tune_model.batch_of(step, 23, 5, 7) for step in range(1 + 5 * e, 6 + 5 * e)] for e in range(3)]
    for batches in epochs:
        assert [len(batch) for batch in batches] == [5, 5, 5, 5, 3]
        assert sorted(np.concatenate(batches)) == [*range(23)]
    orders = {tuple(np.concatenate(batches)) for batches in epochs}
    orders.add(tuple(np.concatenate([fine_tune_model.batch_of(step, 23, 5, 8) for step in range(1, 6)])))
    assert len(orders) == 4


# The adapter that is written


def same_rows(tables, name="validation.csv"):
    return [Example(*row) for row in csv.reader((tables / name).open(encoding="utf-8"))][1:]


def plain_log_probs(network, tokenizer, rows):
    """log P(" negative"), log P(" positive") after each prompt, by transformers alone; [n, 2]."""
    import torch

    ids = [tokenizer(word).input_ids[0] for word in (" negative", " positive")]
    prompts = [tokenizer(SENTIMENT.prompt(row.text)).input_ids for row in rows]
    with torch.no_grad():
        logits = [network(torch.tensor([prompt])).logits[0, -1] for prompt in prompts]
    return torch.stack(logits).double().log_softmax(-1)[:, ids].numpy()


def test_plain_peft_loads_the_adapter_and_gives_the_same_answers_off_on_and_merged(unbroken, base, tables, tokenizer):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    rows = same_rows(tables)[:8]
    alone = plain_log_probs(AutoModelForCausalLM.from_pretrained(base), tokenizer, rows)
    network = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), unbroken)
    theirs = plain_log_probs(network, tokenizer, rows)
    with network.disable_adapter():
        np.testing.assert_array_equal(plain_log_probs(network, tokenizer, rows), alone)
    assert np.abs(theirs - alone).max() > 0.1
    llama = load_llama(str(base), str(unbroken), device="cpu")
    student = study(llama, SENTIMENT)
    ids = [list(tokenizer(word).input_ids) for word in (" negative", " positive")]
    ours = llama.answer_log_probs(read_table(student, rows, "").rows, ids)
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-4)
    merged = plain_log_probs(network.merge_and_unload(), tokenizer, rows)

    def p(log_probs):
        return 1 / (1 + np.exp(log_probs[:, 0] - log_probs[:, 1]))

    np.testing.assert_allclose(p(merged), p(theirs), rtol=0, atol=1e-4)


def test_an_adapter_that_has_learned_nothing_is_the_base_model(tokenizer, tmp_path):
    llama = tiny("llama", tokenizer)
    rows = examples(5)
    before = logprobs_confidence.score(rows, logprobs_confidence.prepare(llama, SENTIMENT))
    add_adapter(llama, parse_arguments(["--dropout", "0.5"]))
    student = study(llama, SENTIMENT)
    log_probs, mass = measure(student, read_table(student, rows, ""), accelerate.PartialState(cpu=True))
    assert np.exp(log_probs) == pytest.approx(np.array([[*row.probabilities.values()] for row in before]), abs=1e-9)
    assert mass == pytest.approx([row.label_mass for row in before], rel=1e-6)


def test_the_configuration_holds_what_servers_take_and_no_path(unbroken, base):
    text = (unbroken / "adapter_config.json").read_text()
    config = json.loads(text)
    projections = ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]
    assert config["target_modules"] == projections
    assert (config["peft_type"], config["task_type"], config["bias"]) == ("LORA", "CAUSAL_LM", "none")
    assert not any(config[name] for name in ("modules_to_save", "use_dora", "lora_bias", "use_rslora", "rank_pattern"))
    assert (config["r"], config["lora_alpha"], config["lora_dropout"]) == (4, 8.0, 0.05)
    assert config["base_model_name_or_path"] == "tiny" and config["inference_mode"] is True
    assert str(base.parent) not in text and "/" not in text and text.endswith("}\n")


def test_the_tensors_are_the_trained_ones_alone_in_float32(unbroken):
    from safetensors.numpy import load_file

    tensors = load_file(unbroken / ADAPTER)
    assert len(tensors) == 3 * 7 * 2 and {value.dtype for value in tensors.values()} == {np.dtype("float32")}
    assert {name.rpartition(".lora_")[2] for name in tensors} == {"A.weight", "B.weight"}
    assert all(np.abs(value).max() > 0 for value in tensors.values())
    expected = {CONFIG, LOG, ADAPTER, "adapter_config.json", "training_curves.png"}
    assert {path.name for path in unbroken.iterdir()} == expected
    assert (unbroken / "training_curves.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_a_seed_gives_the_same_bytes_again_and_another_seed_others(unbroken, call, tmp_path):
    assert call(tmp_path / "again")[0] == call(tmp_path / "other", "--seed", 1, "--epochs", 1)[0] == 0
    assert_same_run(tmp_path / "again", unbroken)
    assert (tmp_path / "other" / ADAPTER).read_bytes() != (unbroken / ADAPTER).read_bytes()
    assert log_of(tmp_path / "other")[0] == log_of(unbroken)[0]  # before training no seed has any part
    assert log_of(tmp_path / "other")[1]["loss"] != log_of(unbroken)[1]["loss"]


def test_how_rows_run_together_changes_the_adapter_by_rounding_only(unbroken, call, tmp_path):
    from safetensors.numpy import load_file

    assert call(tmp_path / "run", "--micro-batch-size", 2)[0] == 0
    truth = load_file(unbroken / ADAPTER)
    for name, value in load_file(tmp_path / "run" / ADAPTER).items():
        np.testing.assert_allclose(value, truth[name], rtol=0, atol=1e-4)


# What is measured


def predictions_of(base, folder, rows, task=SENTIMENT):
    scorer = logprobs_confidence.prepare(load_llama(str(base), folder and str(folder), device="cpu"), task)
    return logprobs_confidence.score(rows, scorer)


def assert_describes(entry, rows):
    """Whether a validation's numbers are those of these predictions, by the metrics' own functions."""
    confidence, correct = predictions.confidence_and_correct(rows)
    assert entry["n"] == len(rows)
    truth = [row.probabilities[row.label] for row in rows]
    assert entry["log_loss"] == pytest.approx(-np.log(truth).mean(), abs=1e-5)
    assert entry["accuracy"] == correct.mean()
    assert entry["ece"] == pytest.approx(calibration_metrics.expected_calibration_error(confidence, correct), abs=1e-5)
    floor = calibration_metrics.consistency_resampling(confidence).mean()
    assert entry["ece_floor"] == pytest.approx(floor, abs=0.03)  # both are of random draws
    assert entry["mean_confidence"] == pytest.approx(confidence.mean(), abs=1e-5)
    assert entry["label_mass"] == pytest.approx(np.mean([row.label_mass for row in rows]), rel=1e-4)


def test_the_log_tells_of_base_and_kept_adapter_what_method_1_says(unbroken, base, tables):
    config, found = config_of(unbroken), validations_of(unbroken)
    assert [entry["step"] for entry in found] == [0, 3, 6, 9, 10]
    assert config["before"] == found[0] and config["best"] == min(found[1:], key=lambda entry: entry["log_loss"])
    losses = [entry["loss"] for entry in log_of(unbroken) if "loss" in entry]
    assert losses[-1] < losses[0] - 1
    assert_describes(config["before"], predictions_of(base, None, same_rows(tables)))
    assert_describes(config["best"], predictions_of(base, unbroken, same_rows(tables)))
    steps = [entry["step"] for entry in log_of(unbroken) if "loss" in entry]
    assert steps == [*range(1, STEPS + 1)] and config["steps"] == STEPS


def test_the_first_loss_is_that_of_the_base_model_where_no_dropout_acts(unbroken, base, tables):
    # B is zero at the first step, so the loss is that of the base model on the first five rows.
    rows = same_rows(tables, "training.csv")
    chosen = [rows[i] for i in fine_tune_model.batch_of(1, 23, 5, 0)]
    p = [row.probabilities[row.label] * row.label_mass for row in predictions_of(base, None, chosen)]
    assert log_of(unbroken)[1]["loss"] == pytest.approx(-np.log(p).mean(), rel=1e-5)


def test_a_limit_watches_some_rows_drawn_by_the_seed(call, base, tables, tmp_path):
    assert call(tmp_path / "a", "--validation-limit", 11, "--epochs", 1)[0] == 0
    watched = fine_tune_model.some_of(same_rows(tables), 11, 0)
    assert len({row.id for row in watched}) == 11 and [*watched] == sorted(watched, key=same_rows(tables).index)
    assert fine_tune_model.some_of(same_rows(tables), 11, 1) != watched
    assert fine_tune_model.some_of(same_rows(tables), 0, 1) == same_rows(tables)
    assert_describes(config_of(tmp_path / "a")["best"], predictions_of(base, tmp_path / "a", watched))
    assert config_of(tmp_path / "a")["validation"]["rows"] == 11


def scripted(monkeypatch, name, values):
    """Let the validations say these values of a number; -> the true scores, and the weights at each."""
    told, real = [], fine_tune_model.scores

    def tell(log_probs, mass, targets):
        told.append(real(log_probs, mass, targets))
        return told[-1] | {name: values[len(told) - 1]}

    monkeypatch.setattr(fine_tune_model, "scores", tell)
    return told


@pytest.mark.parametrize("name", ["log_loss", "ece"])
def test_the_adapter_of_the_best_validation_is_kept_and_patience_ends_the_training(
    call, base, tables, tmp_path, monkeypatch, name
):
    told = scripted(monkeypatch, name, [0.1, 0.9, 0.5, 0.7, 0.5, 0.4])  # the base, 0.1, is no candidate
    flags = "--validate-every", 1, "--early-stopping", name, "--patience", 2
    code, out, _ = call(tmp_path / "run", *flags)
    assert code == 0
    assert [line.split()[0] for line in out.splitlines() if line.endswith("  kept")] == ["1", "2"]
    config = config_of(tmp_path / "run")
    assert (config["steps"], config["best"]["step"], config["best"][name]) == (4, 2, 0.5)
    assert "step 2 of 4" in out
    assert_describes(told[2] | {"n": 25}, predictions_of(base, tmp_path / "run", same_rows(tables)))
    monkeypatch.undo()
    told = scripted(monkeypatch, name, [0.1, 0.9, 0.5, 0.7, 0.5, 0.4])
    disturb(monkeypatch, 4, lambda: os.kill(os.getpid(), signal.SIGTERM))  # after one that was no better
    assert call(tmp_path / "stopped", *flags)[0] == 143 and call(tmp_path / "stopped", *flags, "--resume")[0] == 0
    assert len(told) == 5 and config_of(tmp_path / "stopped") == config
    monkeypatch.undo()
    assert call(tmp_path / "longer", *flags[:2], "--patience", 0, "--epochs", 1)[0] == 0
    assert config_of(tmp_path / "longer")["steps"] == 5


# training_config.json and its readers


def test_the_configuration_names_base_task_rows_settings_and_fingerprints(unbroken, base, tables):
    config = config_of(unbroken)
    alone = logprobs_confidence.prepare(load_llama(str(base), device="cpu"), SENTIMENT)
    tuned = logprobs_confidence.prepare(load_llama(str(base), str(unbroken), device="cpu"), SENTIMENT)
    assert config["fingerprints"] == {"base": alone.fingerprint, "tuned": tuned.fingerprint}
    assert config["fingerprint"] == tuned.fingerprint != alone.fingerprint
    assert config["base_weights"] == alone.llama.identity["weights"] and config["precision"] == "float32"
    assert Task.from_settings(config["task"]) == replace(SENTIMENT, paraphrases=())
    assert {name: config["train"][name] for name in ("source", "rows")} == {
        "source": str(tables / "training.csv"),
        "rows": 23,
    }
    assert config["settings"]["learning_rate"] == 0.02 and config["settings"]["alpha"] == 8
    assert config["versions"]["torch"] and config["processes"] == 1


def test_auto_takes_the_folder_where_base_and_task_fit(unbroken, base, monkeypatch, capsys):
    monkeypatch.setattr(loader, "ADAPTER_FOLDER", unbroken)
    fitting = load_llama(str(base), "auto", "cpu", task=SENTIMENT.settings())
    assert fitting.adapter == unbroken and fitting.identity["adapter"] == folder_hash(unbroken)
    assert "unbroken/" in capsys.readouterr().err
    assert load_llama(str(base), "auto", "cpu", task=CHAT.settings()).adapter is None


def test_the_classifier_says_what_method_1_says(unbroken, base):
    classifier = FineTunedSentimentClassifier(unbroken, device="cpu")
    llama = load_llama(str(base), str(unbroken), device="cpu")
    for text in ("never quite warm good", "  a dull film bad\n"):
        found = classifier.classify_single(text)
        truth = logprobs_confidence.explain(text, logprobs_confidence.prepare(llama, SENTIMENT))
        assert (found["prediction"], found["text"]) == (truth["prediction"], text)
        assert found["confidence"] == pytest.approx(
            logprobs_confidence.get_confidence(text, llama, SENTIMENT)[1], abs=1e-6
        )
        assert found["probabilities"] == pytest.approx(truth["probabilities"], abs=1e-6)
        assert found["label_mass"] == pytest.approx(truth["label_mass"], abs=1e-6)
    with pytest.raises(ValueError, match="empty"):
        classifier.classify_single(" \n")


@pytest.mark.parametrize(
    "content", ["{", "[]", "{}", '{"task": 3, "base_model": "x"}', '{"task": {}, "base_model": 1}']
)
def test_the_classifier_names_a_configuration_that_it_can_not_read(tmp_path, content):
    (tmp_path / CONFIG).write_text(content)
    with pytest.raises(ValueError, match=rf"^{tmp_path / CONFIG} is broken: "):
        FineTunedSentimentClassifier(tmp_path)


def test_the_classifier_s_folder_must_be_there(tmp_path):
    with pytest.raises(OSError, match=CONFIG):
        FineTunedSentimentClassifier(tmp_path / "nowhere")


# Stopping, being killed, going on


def disturb(monkeypatch, step, deed):
    """Do something in the middle of a step, once."""
    real = fine_tune_model.batch_of

    def batch_of(number, *rest):
        if number == step:
            monkeypatch.setattr(fine_tune_model, "batch_of", real)
            deed()
        return real(number, *rest)

    monkeypatch.setattr(fine_tune_model, "batch_of", batch_of)


def checkpointed(folder):
    from safetensors import safe_open

    with safe_open(folder / CHECKPOINT, "np") as file:
        return json.loads(file.metadata()["standing"])


STOPS = {  # number of the signal, step in which it arrives, exit code
    "at the first step": (signal.SIGTERM, 1, 143),
    "at a step with a validation and a checkpoint": (signal.SIGTERM, 3, 143),
    "between": (signal.SIGTERM, 5, 143),
    "by Ctrl-C": (signal.SIGINT, 7, 130),
    "at the last step": (signal.SIGTERM, STEPS, 143),
}


@pytest.mark.parametrize(("number", "step", "code"), STOPS.values(), ids=STOPS.keys())
def test_a_run_that_was_told_to_stop_goes_on_to_the_bytes_of_an_unbroken_one(
    call, unbroken, tmp_path, monkeypatch, number, step, code
):
    folder = tmp_path / "run"
    handlers = [signal.getsignal(one) for one in (signal.SIGTERM, signal.SIGINT)]
    disturb(monkeypatch, step, lambda: os.kill(os.getpid(), number))
    found, _, err = call(folder)
    assert found == code and f"stopped at step {step}" in err and "--resume" in err
    assert [signal.getsignal(one) for one in (signal.SIGTERM, signal.SIGINT)] == handlers
    assert checkpointed(folder)["step"] == step and not (folder / CONFIG).exists()
    one_error(call(folder), "unfinished", "--resume", "--overwrite")
    assert call(folder, "--resume")[0] == 0
    assert_same_run(folder, unbroken)


def test_a_second_ctrl_c_ends_it_at_once(call, tmp_path, monkeypatch):
    def twice():
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    disturb(monkeypatch, 2, twice)
    code, _, err = call(tmp_path / "run")
    assert code == 130 and "Traceback" not in err
    assert err.splitlines()[-1] == "stopped; --resume goes on from the last checkpoint"


# Runs the script, but in one step does something first: is killed, or says where it is and waits for a signal.
DISTURBED = """if True:
    import os, signal, sys
    from pathlib import Path
    import fine_tune_model, predictions
    step, marker = int(sys.argv[1]), Path(sys.argv[2])
    real = fine_tune_model.batch_of
    def batch_of(number, *rest):
        if number == step and sys.argv[3] == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if number == step and sys.argv[3] == "wait":
            read, write = os.pipe()
            os.set_blocking(write, False)
            signal.set_wakeup_fd(write)
            marker.with_name(marker.name + os.environ.get("RANK", "0")).touch()
            os.read(read, 1)
        return real(number, *rest)
    fine_tune_model.batch_of = batch_of
    command_line.run(lambda: fine_tune_model.main(sys.argv[4:]))
"""


def start(arguments, **environment):
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "cwd": ROOT}
    environment = {"OMP_NUM_THREADS": "1"} | environment
    return subprocess.Popen([sys.executable, *map(str, arguments)], env=os.environ | environment, **options)


def wait_for(path, process):
    while not path.exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)


def ends_of(processes):
    """[(exit code, stdout, stderr)] of processes that end; none is left behind if one does not."""
    try:
        said = [process.communicate(timeout=500) for process in processes]
        return [(process.returncode, *texts) for process, texts in zip(processes, said, strict=True)]
    finally:
        for process in processes:
            process.kill()


def test_a_killed_run_loses_the_steps_since_its_checkpoint_and_ends_with_the_same_bytes(
    command, call, unbroken, tmp_path
):
    folder = tmp_path / "run"
    killed = start(["-c", DISTURBED, 8, "", "kill", *command(folder)], PYTHONHASHSEED="1")
    assert ends_of([killed])[0][0] == -signal.SIGKILL
    assert checkpointed(folder)["step"] == 6 and log_of(folder)[-1]["step"] == 7
    name = "adapter_config.json"  # written by another Python, with other hashes
    assert (folder / name).read_bytes() == (unbroken / name).read_bytes()
    assert call(folder, "--resume")[0] == 0
    assert_same_run(folder, unbroken)


@pytest.mark.parametrize("name", ["validate", "render", "draw", CONFIG])
def test_a_run_that_breaks_off_elsewhere_is_unfinished_until_all_is_written(
    call, unbroken, tmp_path, monkeypatch, name
):
    folder, real = tmp_path / "run", fine_tune_model.whole_file

    def break_off(path, *rest):
        if name == CONFIG and path.name != CONFIG:
            return real(path)
        raise KeyboardInterrupt

    monkeypatch.setattr(fine_tune_model, "whole_file" if name == CONFIG else name, break_off)
    assert call(folder)[0] == 130
    assert not (folder / CONFIG).exists()
    monkeypatch.undo()
    assert call(folder, "--resume")[0] == 0
    assert_same_run(folder, unbroken)


def test_a_file_is_whole_or_as_it_was(tmp_path):
    path = tmp_path / "file"
    path.write_text("before")
    with pytest.raises(KeyError), fine_tune_model.whole_file(path) as part:
        part.write_text("half")
        raise KeyError
    assert path.read_text() == "before" and [*tmp_path.iterdir()] == [path]


def test_a_finished_folder_is_left_alone_unless_it_shall_be_replaced(call, unbroken, tmp_path):
    folder = shutil.copytree(unbroken, tmp_path / "run")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    code, out, err = call(folder, "--resume")
    assert (code, err) == (0, "") and "nothing to do" in out
    one_error(call(folder), "finished adapter", "--overwrite", "--output-dir")
    one_error(call(folder, "--overwrite", "--train", "no-such-file.csv"), "no-such-file.csv")
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert call(folder, "--overwrite", "--epochs", 1)[0] == 0
    assert config_of(folder)["steps"] == 5 and (folder / ADAPTER).read_bytes() != before[ADAPTER]


def test_overwriting_leaves_nothing_of_the_earlier_training_to_be_taken_for_the_new_one(
    call, unbroken, tmp_path, monkeypatch
):
    folder = shutil.copytree(unbroken, tmp_path / "run")
    (folder / HEAD).write_text("of the earlier adapter")
    (folder / CHECKPOINT).parent.mkdir()
    (folder / CHECKPOINT).write_text("of another training")
    disturb(monkeypatch, 2, lambda: (_ for _ in ()).throw(KeyboardInterrupt))
    assert call(folder, "--overwrite", "--seed", 5)[0] == 130
    assert not any((folder / name).exists() for name in (CONFIG, HEAD, CHECKPOINT))
    assert call(folder, "--resume")[0] == 0  # with the first seed
    assert_same_run(folder, unbroken)


@pytest.mark.parametrize("there", [["notes.txt"], ["adapter_config.json", ADAPTER], ["sub/training_log.jsonl"]])
def test_a_folder_with_somebody_s_files_is_refused(call, tmp_path, there):
    folder = tmp_path / "theirs"
    for name in there:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("theirs")
    for flags in ([], ["--overwrite"], ["--resume"]):
        one_error(call(folder, *flags), "holds other files", str(folder))
    assert {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()} == {*there}
    one_error(call(folder / there[0]), "is a file")


@pytest.fixture(scope="module")
def stopped(command, tmp_path_factory):
    """A run that stopped after step 4."""
    folder = tmp_path_factory.mktemp("runs") / "stopped"
    with pytest.MonkeyPatch.context() as patch:
        disturb(patch, 4, lambda: os.kill(os.getpid(), signal.SIGTERM))
        assert exit_code_of(lambda: main(command(folder))) == 143
    return folder


def cut(path):
    os.truncate(path, path.stat().st_size // 2)


def rewrite(change):
    """Another checkpoint file, whole, that differs in its numbers."""

    def damage(path):
        from safetensors import safe_open
        from safetensors.numpy import save_file

        with safe_open(path, "np") as file:
            metadata, tensors = dict(file.metadata()), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        change(metadata, tensors)
        save_file(tensors, path, metadata)

    return damage


DAMAGES = {
    "empty": lambda path: path.write_bytes(b""),
    "cut off": cut,
    "garbage": lambda path: path.write_bytes(b"\xff" * 1000),
    "without its numbers": rewrite(lambda metadata, tensors: metadata.clear()),
    "numbers that are no JSON": rewrite(lambda metadata, tensors: metadata.update(standing="{")),
    "numbers of another kind": rewrite(lambda metadata, tensors: metadata.update(standing="[]")),
    "settings of another kind": rewrite(lambda metadata, tensors: metadata.update(standing='{"settings": []}')),
    "a tensor less": rewrite(lambda metadata, tensors: tensors.pop("0.exp_avg")),
    "a tensor of another shape": rewrite(lambda metadata, tensors: tensors.update({"0.weight": np.zeros(3, "f4")})),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES.keys())
def test_a_broken_checkpoint_is_one_line_and_stays_as_it_is(call, stopped, tmp_path, damage):
    folder = shutil.copytree(stopped, tmp_path / "run")
    damage(folder / CHECKPOINT)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    one_error(call(folder, "--resume"), str(folder / CHECKPOINT), "broken", "--overwrite")
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


OTHERS = {
    "learning rate": ["--learning-rate", 0.01],
    "rank": ["--rank", 2],
    "alpha": ["--alpha", 3],
    "dropout": ["--dropout", 0.2],
    "loss": ["--loss", "brier"],
    "epochs": ["--epochs", 3],
    "batch size": ["--batch-size", 6],
    "validate every": ["--validate-every", 4],
    "early stopping": ["--early-stopping", "ece"],
    "patience": ["--patience", 1],
    "seed": ["--seed", 1],
    "gradient checkpointing": ["--gradient-checkpointing"],
    "precision": ["--dtype", "bfloat16"],
    "train": ["--limit", 20],
    "validation": ["--validation-limit", 20],
    "task": ["--task", "sentiment-yes-no"],
}


@pytest.mark.parametrize(("name", "flags"), OTHERS.items(), ids=OTHERS.keys())
def test_a_checkpoint_of_other_settings_or_rows_is_not_continued(call, stopped, tmp_path, name, flags):
    folder = shutil.copytree(stopped, tmp_path / "run")
    one_error(call(folder, "--resume", *flags), f"{name} is not the same", "--overwrite")
    assert checkpointed(folder) == checkpointed(stopped)


def test_what_does_not_bear_on_the_adapter_may_change_from_one_sitting_to_the_next(call, stopped, unbroken, tmp_path):
    folder = shutil.copytree(stopped, tmp_path / "run")
    assert call(folder, "--resume", "--checkpoint-every", 1)[0] == 0
    assert_same_run(folder, unbroken)


# Several processes


def start_two(arguments):
    """The same command in two processes that share a training, as torchrun or accelerate start them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    common |= {"ACCELERATE_USE_CPU": "true"}
    return [start(arguments, RANK=str(rank), LOCAL_RANK=str(rank), **common) for rank in range(2)]


def test_two_processes_make_the_adapter_of_one_also_when_they_are_stopped(call, command, tmp_path):
    from safetensors.numpy import load_file

    # Steps of 11, 11 and 1 rows: in the last a process has none. The 25 validation rows do not divide either.
    flags = "--batch-size", 11, "--validate-every", 2, "--checkpoint-every", 100, "--learning-rate", 1e-3
    assert call(tmp_path / "one", *flags)[0] == 0
    folder = tmp_path / "two"
    both = start_two(["-c", DISTURBED, 4, tmp_path / "marker", "wait", *command(folder, *flags)])
    for rank, process in enumerate(both):
        wait_for(tmp_path / f"marker{rank}", process)
    for process in both:
        process.terminate()
    ends = ends_of(both)
    assert [code for code, _, _ in ends] == [143, 143], ends
    assert checkpointed(folder)["step"] == 4
    both = start_two(["fine_tune_model.py", *command(folder, *flags, "--resume")])
    ends = ends_of(both)
    assert [code for code, _, _ in ends] == [0, 0] and "Written to" in ends[0][1] and ends[1][1] == "", ends
    truth = load_file(tmp_path / "one" / ADAPTER)
    for name, value in load_file(folder / ADAPTER).items():
        np.testing.assert_allclose(value, truth[name], rtol=0, atol=1e-5)
    for ours, theirs in zip(log_of(folder), log_of(tmp_path / "one"), strict=True):
        assert ours == pytest.approx(theirs, abs=1e-4)
    assert config_of(folder)["processes"] == 2


# What cannot be trained


def with_rows(name, rows, **options):
    """A change of the tables: another file in the place of one."""
    return lambda folder: [f"--{name}", write_csv(folder / f"other_{name}.csv", rows, **options)]


TRAINING, VALIDATION = labelled(23, 0), labelled(25, 1)
LONG = " ".join(WORDS * 30)
PROBLEMS = {  # flags, or what makes them from a folder -> words of the one line
    "training of one class": (with_rows("train", TRAINING[::2]), ["other_train.csv", "12 rows", "'negative'"]),
    "validation of one class": (with_rows("validation", VALIDATION[1::2]), ["other_validation.csv", "'positive'"]),
    "one class within the limit": (["--limit", 1], ["training.csv", "at least two labels"]),
    "a label of no task": (with_rows("train", [*TRAINING, ("n", "x y", "meh")]), ["row 24", "'meh'", "--label-map"]),
    "a row without a label": (with_rows("train", [*TRAINING, ("n", "x y", "")]), ["row 'n' has no label"]),
    "an unlabelled validation row": (with_rows("validation", [("n", "x", ""), *VALIDATION]), ["row 'n'"]),
    "no rows": (with_rows("train", []), ["other_train.csv", "no rows"]),
    "no labels": (with_rows("train", [("1", "x")], header=("id", "text")), ["has no label"]),
    "an id twice": (with_rows("train", [*TRAINING, TRAINING[0]]), ["'0-0' stands twice"]),
    "an empty text": (with_rows("train", [*TRAINING, ("n", " \n", "positive")]), ["row 'n'", "empty"]),
    "a text too long": (with_rows("train", [*TRAINING, ("n", LONG, "positive")]), ["row 'n'", "tokens", "512"]),
    "a validation text too long": (with_rows("validation", [("n", LONG, "positive"), *VALIDATION]), ["row 'n'"]),
    "validation of training rows": (
        with_rows("validation", [*VALIDATION, ("v", TRAINING[3][1].upper() + "  ", "positive")]),
        ["'v' (training row '0-3')", "overlaps"],
    ),
    "many of them": (with_rows("validation", TRAINING), ["'0-0' (training row '0-0')", "and 18 more"]),
    "no such file": (["--train", "nowhere.csv"], ["nowhere.csv"]),
    "no such model": (["--model", "/nowhere"], ["/nowhere"]),
    "no such task": (["--task", "nothing"], ["nothing"]),
    "an adapter to train on": (["--adapter", "auto"], ["--adapter", "--resume"]),
    "4 bits on a CPU": (["--load-in-4bit"], ["--load-in-4bit needs an NVIDIA GPU"]),
    "no rank": (["--rank", 0], ["--rank 0: at least 1"]),
    "no rows a step": (["--batch-size", 0], ["--batch-size 0: at least 1"]),
    "no micro batch": (["--micro-batch-size", -1], ["--micro-batch-size -1"]),
    "dropout of all": (["--dropout", 1], ["--dropout 1.0"]),
    "a rate of zero": (["--learning-rate", 0], ["--learning-rate 0.0"]),
    "a rate of no number": (["--learning-rate", "nan"], ["--learning-rate nan"]),
    "an infinite alpha": (["--alpha", "inf"], ["--alpha inf"]),
    "a loss of no name": (["--loss", "hinge"], ["hinge", "mmce"]),
    "resume and overwrite": (["--resume", "--overwrite"], ["--resume", "--overwrite"]),
    "a limit of zero": (["--limit", 0], ["--limit 0"]),
    "mmce by parts": (["--loss", "mmce", "--micro-batch-size", 2], ["mmce", "together"]),
    "a row of no group": (
        lambda folder: ["--groups", write_csv(folder / "g.csv", [("1-0", "a")], header=("id", "group"))],
        ["g.csv names no group for the row '1-1'"],
    ),
    "too few rows for a head": (
        lambda folder: ["--confidence-head", *with_rows("validation", VALIDATION[:19])(folder)],
        ["19 rows", "--confidence-head needs 20"],
    ),
}


@pytest.mark.parametrize(("flags", "words"), PROBLEMS.values(), ids=PROBLEMS.keys())
def test_bad_input_is_one_line_and_exit_code_2_and_writes_nothing(call, tmp_path, flags, words):
    flags = flags(tmp_path) if callable(flags) else flags
    result = call(tmp_path / "run", *flags)
    one_error(result, *words)
    assert not (tmp_path / "run").exists() and "--truncate" not in result[2]


def test_training_rows_need_validation_rows(capsys):
    code = exit_code_of(lambda: main(["--train", "mine.csv"]))
    one_error((code, *capsys.readouterr()), "--train needs --validation")
    assert parse_arguments([]).validation == "data:validation"


def test_near_duplicates_of_training_rows_are_counted_in_a_note(call, tables, tmp_path):
    longest = max(TRAINING, key=lambda row: len(row[1]))
    rows = [*VALIDATION, ("v", f"{longest[1]}!", longest[2])]
    _, _, err = call(tmp_path / "run", *with_rows("validation", rows)(tmp_path), "--load-in-4bit")
    assert any(line.startswith("note: 1 rows of") and "near-duplicate" in line for line in err.splitlines())


def test_whole_answers_and_mmce_do_not_go_together(call, tmp_path):
    task = tmp_path / "mood.toml"
    task.write_text(
        'name = "mood"\ntemplate = "Which mood?\\n{text}\\nIt is"\nscoring = "sequence"\n'
        '[labels]\nnegative = ["rather bad"]\npositive = ["good"]\n'
    )
    one_error(call(tmp_path / "run", "--loss", "mmce", "--task", task), "mmce", "together", "first-token")
    assert not (tmp_path / "run").exists()


def test_several_processes_and_mmce_do_not_go_together(tiny_llama):
    args = parse_arguments(["--loss", "mmce"])
    student = study(tiny_llama, SENTIMENT)
    fine_tune_model.check_together(student, args, SimpleNamespace(num_processes=1))
    with pytest.raises(ValueError, match=r"mmce.*in one process"):
        fine_tune_model.check_together(student, args, SimpleNamespace(num_processes=2))


def test_what_peft_can_not_adapt_is_one_line_that_names_the_model(tokenizer, tmp_path):
    with pytest.raises(ValueError, match=r"^peft cannot adapt tiny-mamba with --dropout 0\.05: "):
        begin(tiny("mamba", tokenizer), SENTIMENT, tmp_path / "run")


def test_a_gradient_that_is_not_finite_ends_the_training_and_says_what_helps(call, tmp_path):
    flags = "--learning-rate", 1e30, "--validate-every", 100, "--checkpoint-every", 1
    one_error(call(tmp_path / "run", *flags), "gradient of step 2 is not finite", "--learning-rate", "--dtype float32")
    assert not (tmp_path / "run" / CONFIG).exists() and checkpointed(tmp_path / "run")["step"] == 1


@pytest.mark.parametrize("place", ["GPU", "CPU"])
def test_too_little_memory_is_one_line_with_the_flags_that_help(call, tmp_path, monkeypatch, place):
    import torch
    from transformers import LlamaForCausalLM

    real = LlamaForCausalLM.forward

    @functools.wraps(real)
    def forward(*arguments, **options):
        if torch.is_grad_enabled() and place == "GPU":
            raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 2.00 GiB.")
        if torch.is_grad_enabled():
            torch.empty(1 << 60)
        return real(*arguments, **options)

    monkeypatch.setattr(LlamaForCausalLM, "forward", forward)
    one_error(call(tmp_path / "run"), "out of memory", "--micro-batch-size", "--gradient-checkpointing")
    assert not (tmp_path / "run" / CONFIG).exists()


def test_an_adapter_for_another_base_and_a_broken_one_are_one_line_in_method_1(
    unbroken, base, tokenizer, tmp_path, capsys
):
    import torch

    other = tiny("llama", tokenizer, num_hidden_layers=3, hidden_size=64)
    same = tiny("llama", tokenizer, num_hidden_layers=3)
    with torch.no_grad():
        same.model.lm_head.weight += 1
    broken = shutil.copytree(unbroken, tmp_path / "broken")
    cut(broken / ADAPTER)
    cases = [(other, unbroken, "other weights"), (same, unbroken, "other weights"), (None, broken, str(broken))]
    foreign = shutil.copytree(unbroken, tmp_path / "foreign")
    (foreign / CONFIG).unlink()  # as peft's own folders, which do not name their base
    cases.append((other, foreign, "another base model"))
    for number, (llama, adapter, words) in enumerate(cases):
        folder = base
        if llama:
            folder = tmp_path / f"base{number}"
            llama.model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
        capsys.readouterr()
        arguments = ["x", "--model", str(folder), "--adapter", str(adapter), "--device", "cpu"]
        code = exit_code_of(lambda arguments=arguments: logprobs_confidence.main(arguments))
        one_error((code, *capsys.readouterr()), words)


# Other tasks, other losses, the real model


THREE = """
name = "tone"
template = "{text}\\nTone:"
[labels]
negative = ["negative"]
neutral = ["neutral"]
positive = ["positive"]
"""


@pytest.mark.parametrize(
    ("task", "flags"),
    [
        (THREE, ["--loss", "mmce"]),
        ("sentiment-yes-no", ["--loss", "focal", "--gradient-checkpointing"]),
        (THREE.replace("[labels]", 'scoring = "sequence"\n[labels]'), ["--loss", "label-smoothing"]),
        ("sentiment", ["--loss", "brier", "--dtype", "bfloat16"]),
    ],
    ids=["three labels", "chat", "sequence", "bfloat16"],
)
def test_other_tasks_losses_and_types_train_and_are_measured_as_method_1_does(call, base, tmp_path, task, flags):
    labels = ["negative", "positive"]
    if task.startswith("\n"):
        (tmp_path / "tone.toml").write_text(task)
        task, labels = str(tmp_path / "tone.toml"), ["negative", "neutral", "positive"]
    rows = labelled(24, 1, labels)
    given = [*with_rows("train", labelled(24, 0, labels))(tmp_path), *with_rows("validation", rows)(tmp_path)]
    code, out, err = call(tmp_path / "run", *given, "--task", task, *flags)
    assert code == 0, err
    config = config_of(tmp_path / "run")
    losses = [entry["loss"] for entry in log_of(tmp_path / "run") if "loss" in entry]
    assert np.mean(losses[5:]) < np.mean(losses[:5])  # the second epoch, the first
    llama = load_llama(str(base), str(tmp_path / "run"), "cpu", config["precision"])
    scorer = logprobs_confidence.prepare(llama, tasks.read_task(task))
    assert config["fingerprint"] == scorer.fingerprint
    if "bfloat16" not in flags:
        assert_describes(config["best"], logprobs_confidence.score([Example(*row) for row in rows], scorer))
    assert "accuracy" in out and "n = 24 validation rows" in out


def test_what_is_printed_says_what_was_measured_on_what(call, tmp_path):
    _, out, err = call(tmp_path / "run", "--epochs", 1)
    best = config_of(tmp_path / "run")["best"]
    assert err == "" and "training 5,6" not in out
    assert f"training {3 * 4 * (2 * (32 + 32) + 2 * (32 + 16) + 3 * (32 + 64)):,} weights of tiny on 23 rows" in out
    assert "5 steps at most" in out and "validation on 25 rows that are not trained on" in out
    assert "a little too good" in out and f"{best['log_loss']:.3f}" in out and "95 % interval" in out
    assert "--adapter" in out.splitlines()[-1]
    told = [line for line in out.splitlines() if " of 5 " in line[:12]]
    assert [line.split()[0] for line in told] == ["0", "3", "5"]


def test_the_intervals_are_of_whole_groups(call, tmp_path):
    # Where all rows are one group there is one resample, and the interval is the difference itself.
    groups = write_csv(tmp_path / "g.csv", [(id, "all") for id, _, _ in VALIDATION], header=("id", "group"))
    spans = []
    for name, flags in (("alone", []), ("one group", ["--groups", groups])):
        out = call(tmp_path / name, "--epochs", 1, *flags)[1]
        line = next(line for line in out.splitlines() if line.startswith("log loss"))
        spans.append(re.search(r"(\S+) \[(\S+), (\S+)\]", line).groups())
    assert len({*spans[1]}) == 1 < len({*spans[0]}) and spans[0][0] == spans[1][0]


def test_a_training_that_did_not_help_says_so(call, tmp_path, monkeypatch):
    scripted(monkeypatch, "log_loss", [0.1, 0.9, 0.8, 0.7, 0.6])
    assert "no better than the base model" in call(tmp_path / "run", "--epochs", 1)[1]


def test_the_embedded_model_is_fine_tuned(quick, tmp_path):
    import torch

    torch.set_num_threads(quick)  # it is no tiny model
    flags = ["--limit", 48, "--epochs", 1, "--validation-limit", 40, "--output-dir", tmp_path / "run"]
    assert exit_code_of(lambda: main([*map(str, flags), "--device", "cpu"])) == 0
    config = config_of(tmp_path / "run")
    expected = {CONFIG, LOG, ADAPTER, "adapter_config.json", "training_curves.png"}
    assert {path.name for path in (tmp_path / "run").iterdir()} == expected
    assert (config["base_model"], config["steps"], config["train"]["rows"]) == ("default", 2, 48)
    assert [entry["step"] for entry in validations_of(tmp_path / "run")] == [0, 2]
    assert config["before"]["accuracy"] > 0.6 and config["before"]["label_mass"] > 0.9
    modules = json.loads((tmp_path / "run" / "adapter_config.json").read_text())["target_modules"]
    assert modules == ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]
    classifier = FineTunedSentimentClassifier(tmp_path / "run", device="cpu")
    found = classifier.classify_single("I absolutely love this movie")  # after two steps it need not be right
    torch.set_num_threads(1)
    assert found["confidence"] == max(found["probabilities"].values()) > 0.5 and found["label_mass"] > 0.9
