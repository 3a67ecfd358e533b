"""training.py: losses, gradients, steps, measures and what a checkpoint must share with the run that it continues.

Truth comes from slow and obvious implementations: whole rows one by one through a plain forward pass, losses as their
papers write them, by torch, scikit-learn and hand. What a whole training does is in test_fine_tune_model.py.
"""

import math
import random
from itertools import product
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import tiny

import task as tasks
import training
from logprobs_confidence import label_scorer
from lora import dropping_out
from tables import Example
from task import TASKS, Answer, Task
from training import LOSSES, LabelledRows, TrainingSettings, begin_training, label_loss, row_losses, take_step

SENTIMENT, CHAT = TASKS["sentiment"], TASKS["sentiment-yes-no"]
LABELS = {"negative": ("rather bad", "poor"), "positive": ("good",)}
WHOLE_ANSWERS = Task("mood", LABELS, "Which mood?\n{text}\nIt is", scoring="sequence")
# One answer begins another, and both ends of the probability must be counted once.
NESTED = Task(
    "opinion", {"negative": ("no",), "positive": ("no doubt",), "x": ("yes",)}, "{text}\nGood?", scoring="sequence"
)
WORDS = ("a", "film", "that", "is", "not", "long", "funny", "dull", "and", "never", "quite", "warm", "told", "slow")
WORDS += ("with", "some", "heart", "but", "too", "many", "turns")


def labelled(n, seed, labels=("negative", "positive")):
    """n examples whose last word tells the label."""
    draw, rows = random.Random(seed), []
    for i in range(n):
        words, end = draw.choices(WORDS, k=draw.randint(3, 12)), ("bad", "good", "so so")[i % len(labels)]
        rows.append(Example(f"{seed}-{i}", " ".join([*words, end]), labels[i % len(labels)]))
    return rows


def begin(llama, task, folder, **settings):
    """A training of 7 rows, its adapter as if it had been trained a little."""
    import torch

    rows = [LabelledRows("a table", labelled(7, seed, tuple(task.labels))) for seed in (3, 4)]
    run = begin_training(llama, task, *rows, folder, TrainingSettings(**{"batch_size": 5} | settings))
    with torch.no_grad():
        for name, weight in llama.model.named_parameters():
            if "lora_B" in name:
                weight.normal_(0, 0.3)
    return run


# Rows


@pytest.mark.parametrize("task", [SENTIMENT, CHAT, WHOLE_ANSWERS], ids=["completion", "chat", "whole answers"])
def test_the_prompts_are_those_of_method_1_and_the_targets_number_the_labels(tiny_llama, tokenizer, task):
    rows = [*labelled(4, 0), Example("odd", "  1999 <|im_end|>\ncaf\u00e9 \U0001f600 ", "positive")]
    scorer = label_scorer(tiny_llama, task)
    encoded = training.encode_rows(scorer, LabelledRows("a table", rows))
    assert encoded.prompts == [scorer.encode(row.text)[0] for row in rows]
    assert [list(task.labels)[target] for target in encoded.targets] == [row.label for row in rows]
    if task is SENTIMENT:
        assert encoded.prompts[:4] == [tokenizer(task.prompt(row.text)).input_ids for row in rows[:4]]


def test_settings_that_cannot_be_are_refused_by_the_name_of_their_flag():
    for settings, message in (
        ({"batch_size": 0}, "--batch-size 0: at least 1"),
        ({"micro_batch_size": -1}, "--micro-batch-size -1: at least 1"),
        ({"dropout": 1.0}, "--dropout 1.0"),
        ({"learning_rate": math.nan}, "--learning-rate nan: above 0"),
        ({"alpha": math.inf}, "--alpha inf: above 0"),
        ({"loss": "mmce", "micro_batch_size": 2}, "run together"),
    ):
        with pytest.raises(ValueError, match=message):
            TrainingSettings(**settings)


# Losses


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


def random_log_probs(rows, columns):
    import torch

    return torch.randn(rows, columns, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("labels", [2, 4])
@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_is_what_its_paper_and_others_say_and_so_is_its_gradient(name, labels):
    import torch
    from sklearn.metrics import brier_score_loss

    logits, target = random_log_probs(9, labels).requires_grad_(), torch.arange(9) % labels
    log_probs = logits.log_softmax(1)
    found = label_loss(name, log_probs, target)
    torch.testing.assert_close(found, torch.stack(slow_label_loss(name, log_probs.exp(), target)), rtol=1e-7, atol=0)
    if name in ("cross-entropy", "label-smoothing"):
        smoothing = 0.1 if name == "label-smoothing" else 0.0
        theirs = torch.nn.functional.cross_entropy(logits, target, reduction="none", label_smoothing=smoothing)
        torch.testing.assert_close(found, theirs, rtol=1e-12, atol=0)
    if name == "brier":
        p = log_probs.detach().exp().numpy()
        theirs = brier_score_loss(target, p, labels=[*range(labels)], scale_by_half=False)
        assert found.mean().item() == pytest.approx(theirs, rel=1e-12)
    assert torch.autograd.gradcheck(lambda x: label_loss(name, x.log_softmax(1), target), logits)
    single = label_loss(name, log_probs.detach().float(), target)
    assert single.dtype == torch.float32 and torch.allclose(single.double(), found, rtol=1e-4)


def test_losses_of_three_rows_worked_out_by_hand():
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
    scorer = SimpleNamespace(task=SENTIMENT, answers=answers)
    log_probs = random_log_probs(6, 20).log_softmax(1)[:, :4]  # of 20 tokens, four are answers
    target = torch.tensor([0, 1, 1, 0, 1, 0])
    p = torch.stack([log_probs[:, [0, 2]].exp().sum(1), log_probs[:, [1, 3]].exp().sum(1)], dim=1)
    mass = p.sum(1)
    truth = torch.stack(slow_label_loss(name, p / mass[:, None], target)) - mass.log()
    torch.testing.assert_close(row_losses(name, log_probs, scorer, target), truth)
    if name == "cross-entropy":
        torch.testing.assert_close(truth, -p[range(6), target].log())


def test_where_an_answer_begins_another_no_probability_is_counted_twice(tiny_llama):
    import torch

    scorer = label_scorer(tiny_llama, NESTED)
    ids = [answer.ids for answer in scorer.answers]
    assert sorted(map(len, ids)) == [1, 1, 1, 1, 2, 2]
    log_probs = random_log_probs(5, 6).log_softmax(1)
    for short, long in product(range(6), range(6)):  # what an answer goes on to is less probable than the answer
        if len(ids[short]) < len(ids[long]) and ids[long][0] == ids[short][0]:
            log_probs[:, long] = log_probs[:, short] - 0.5
    p, mass = tasks.label_probabilities(log_probs.numpy(), scorer.answers, list(NESTED.labels))
    target = np.array([0, 1, 2, 0, 1])
    truth = -np.log(p[range(5), target] * mass)
    found = row_losses("cross-entropy", log_probs.requires_grad_(), scorer, torch.tensor(target))
    assert found.tolist() == pytest.approx(truth.tolist(), rel=1e-9)
    assert torch.autograd.gradcheck(lambda x: row_losses("cross-entropy", x, scorer, torch.tensor(target)), log_probs)


# Steps


def slow_gradient(run, rows, loss):
    """(gradient by weight, loss) of a step from whole rows one by one, each through a plain pass; float64."""
    import torch

    scorer, model = run.scorer, run.scorer.llama.model
    model.zero_grad()
    p = []
    for number in rows:
        prompt, begun, probability = run.training.prompts[number], {}, {}
        for answer in scorer.answers:
            if answer.ids[:-1] not in begun:
                logits = model(input_ids=torch.tensor([[*prompt, *answer.ids[:-1]]])).logits[0, len(prompt) - 1 :]
                begun[answer.ids[:-1]] = logits.double().log_softmax(-1)
            probability[answer.ids] = begun[answer.ids[:-1]][range(len(answer.ids)), list(answer.ids)].sum().exp()
        for ids in sorted(probability, key=len, reverse=True):
            longer = [other for other in probability if other != ids and other[: len(ids)] == ids]
            probability[ids] = probability[ids] - sum(probability[other] for other in longer)
        of_label = dict.fromkeys(scorer.task.labels, 0.0)
        for answer in scorer.answers:
            of_label[answer.label] += probability[answer.ids]
        p.append(torch.stack([*of_label.values()]))
    p = torch.stack(p)
    mass = p.sum(1)
    losses = torch.stack(slow_label_loss(loss, p / mass[:, None], run.training.targets[rows])) - mass.log()
    losses.mean().backward()
    return [weight.grad.double().flatten().clone() for weight in run.weights], losses.mean().item()


CHECKPOINTING = {"gradient_checkpointing": True}
GRADIENTS = [
    *[("llama", SENTIMENT, loss, {}) for loss in LOSSES],
    ("llama", SENTIMENT, "mmce", CHECKPOINTING),
    ("llama", SENTIMENT, "brier", CHECKPOINTING | {"micro_batch_size": 2}),
    ("llama", CHAT, "focal", {}),
    ("llama", WHOLE_ANSWERS, "cross-entropy", {"micro_batch_size": 2}),
    ("llama", NESTED, "label-smoothing", {}),
    ("gpt2", WHOLE_ANSWERS, "brier", {}),
]


@pytest.mark.parametrize(("kind", "task", "loss", "settings"), GRADIENTS)
def test_a_step_s_gradient_is_that_of_whole_rows_one_by_one(
    tokenizer, tmp_path, monkeypatch, kind, task, loss, settings
):
    import torch

    monkeypatch.setattr(training, "MAX_GRADIENT_NORM", math.inf)
    run = begin(tiny(kind, tokenizer), task, tmp_path / "run", loss=loss, dropout=0.3, **settings)
    with dropping_out(run.scorer.llama, [0, 1]):
        truth, truth_loss = slow_gradient(run, training.batch_of(1, 7, 5, 0), loss)
    assert take_step(run) is False
    truth, found = torch.cat(truth), torch.cat([weight.grad.double().flatten() for weight in run.weights])
    assert (found - truth).norm() < 1e-5 * truth.norm() and truth.norm() > 1e-3
    assert run.log[-1]["loss"] == pytest.approx(truth_loss, rel=1e-5)
    assert run.log[-1]["gradient_norm"] == pytest.approx(truth.norm().item(), rel=1e-4)


def test_gradient_checkpointing_runs_the_layers_again_and_nothing_else_is_in_training(tokenizer, tmp_path):
    run = begin(tiny("gpt2", tokenizer), SENTIMENT, tmp_path / "run", **CHECKPOINTING)
    model, calls, passes = run.scorer.llama.model, [], []
    blocks = model.base_model.model.transformer.h
    blocks[0].ln_1.register_forward_pre_hook(lambda *_: calls.append(model.training))
    model.get_output_embeddings().register_forward_hook(lambda *_: passes.append(1))
    take_step(run)
    assert len(calls) == 2 * len(passes) > 0 and not any(calls)
    assert {module for module in model.modules() if module.training} == {*blocks}
    training.answer_rows(run.scorer, run.validation)
    assert not any(module.training for module in model.modules())


def test_a_step_is_adamw_s_with_the_gradient_cut_to_norm_one(tokenizer, tmp_path):
    import torch

    run = begin(tiny("llama", tokenizer), SENTIMENT, tmp_path / "run", epochs=3, learning_rate=0.01)
    theirs = [torch.nn.Parameter(weight.detach().clone()) for weight in run.weights]
    optimizer = torch.optim.AdamW(theirs, lr=1.0, weight_decay=0.0)
    for step in (1, 2, 3):
        with dropping_out(run.scorer.llama, [0, step]):
            gradient, _ = slow_gradient(run, training.batch_of(step, 7, 5, 0), "cross-entropy")
        norm = torch.cat(gradient).norm()
        for weight, part in zip(theirs, gradient, strict=True):
            weight.grad = (part / norm.clamp(min=1)).float().view_as(weight)
        optimizer.param_groups[0]["lr"] = training.learning_rate(step, 6, 0.01)
        optimizer.step()
        take_step(run)
        for weight, their in zip(run.weights, theirs, strict=True):
            torch.testing.assert_close(weight, their, rtol=0, atol=0.01 * 0.05)  # of a step of at most 0.01
            their.data.copy_(weight.data)
    assert [round(entry["learning_rate"], 6) for entry in run.log] == [0.01, 0.00933, 0.0075]


def test_the_rate_rises_in_a_line_and_falls_along_the_cosine_of_transformers():
    import torch
    from transformers import get_cosine_schedule_with_warmup

    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=2.0)
    schedule, theirs = get_cosine_schedule_with_warmup(optimizer, 6, 101), []
    for _ in range(100):
        optimizer.step()
        schedule.step()
        theirs.append(optimizer.param_groups[0]["lr"])
    rates = [training.learning_rate(step, 100, 2.0) for step in range(1, 101)]
    assert rates == pytest.approx(theirs, rel=1e-12) and 0 < rates[-1] < 0.01
    assert training.learning_rate(1, 1, 2.0) == 2.0


def test_an_epoch_shows_every_row_once_in_an_order_of_its_own():
    epochs = [[training.batch_of(step, 23, 5, 7) for step in range(1 + 5 * e, 6 + 5 * e)] for e in range(3)]
    for batches in epochs:
        assert [len(batch) for batch in batches] == [5, 5, 5, 5, 3]
        assert sorted(np.concatenate(batches)) == [*range(23)]
    orders = {tuple(np.concatenate(batches)) for batches in epochs}
    orders.add(tuple(np.concatenate([training.batch_of(step, 23, 5, 8) for step in range(1, 6)])))
    assert len(orders) == 4


# What does not go together


def test_mmce_needs_rows_that_run_together(tiny_llama):
    scorer, settings = label_scorer(tiny_llama, SENTIMENT), TrainingSettings(loss="mmce")
    training.check_rows_run_together(settings, scorer, processes=1)
    for other, processes in ((scorer, 2), (label_scorer(tiny_llama, WHOLE_ANSWERS), 1)):
        with pytest.raises(ValueError, match=r"mmce.*in one process.*first-token"):
            training.check_rows_run_together(settings, other, processes)


def test_a_checkpoint_is_of_one_training_only(tokenizer, tmp_path):
    # Settings, weights, task and rows decide the adapter; how many rows run together does not.
    run = begin(tiny("llama", tokenizer), SENTIMENT, tmp_path / "run", micro_batch_size=2)
    decisive = {"loss", "rank", "alpha", "dropout", "learning_rate", "epochs", "batch_size", "validate_every"}
    decisive |= {"early_stopping", "patience", "seed", "gradient_checkpointing"}
    assert set(run.identity()) == decisive | {"base_weights", "precision", "task", "train", "validation"}
    rows = run.training.rows
    for other in (rows.examples[:-1], [*rows.examples[:-1], Example("6", "another", "negative")]):
        assert LabelledRows(rows.source, other).record()["sha256"] != rows.record()["sha256"]
