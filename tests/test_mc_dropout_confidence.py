"""mc_dropout_confidence.py, in this process and as the command that a user types.

Truth comes from plain forward passes of models whose weights were merged with the masks by hand, from entropies by
scipy and by double sums, from counting pairs, from Method 1, and from unbroken runs for broken ones. All models are
tiny and random, with random adapters: nothing here depends on what a model says.
"""

import copy
import csv
import json
import math
import os
import random
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import tiny
from scipy.stats import entropy as scipy_entropy

import command_line
import logprobs_confidence
import mc_dropout_confidence
import predictions
from calibration import FittedCalibrator, PlattScalingCalibrator, Recipe, save_calibrator, text_key
from llama import load_llama
from mc_dropout_confidence import (
    DRAWS,
    decompose,
    explain,
    get_mc_dropout_confidence,
    main,
    prepare,
    ranking,
    run_passes,
    score,
)
from task import TASKS, Example, Task

ROOT = Path(__file__).parent.parent
SENTIMENT = TASKS["sentiment"]
WHOLE_ANSWERS = Task(
    "mood", {"bad": ("rather bad", "poor"), "good": ("good",)}, "Which mood?\n{text}\nIt is", scoring="sequence"
)
DROPOUT = 0.3
WORDS = ("a", "film", "that", "is", "not", "good", "bad", "long", "funny", "dull", "and", "never", "quite", "warm")


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Tiny models run faster on one thread, and in the same way in this process as in those that we start."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def with_adapter(llama, dropout=DROPOUT, trained=True, **settings):
    """Put a LoRA adapter on every layer of a tiny model, random as if it had been trained, or as peft begins it."""
    import torch
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(1)
    settings = {"r": 2, "lora_alpha": 3, "target_modules": "all-linear", "task_type": "CAUSAL_LM"} | settings
    config = LoraConfig(lora_dropout=dropout, init_lora_weights=not trained, **settings)
    network = get_peft_model(llama.model, config).eval().requires_grad_(False)
    return replace(llama, model=network, identity=llama.identity | {"adapter": f"{dropout} {trained}"})


@pytest.fixture(scope="module")
def tuned(tokenizer):
    return with_adapter(tiny("llama", tokenizer))


@pytest.fixture(scope="module")
def scorer(tuned):
    return prepare(tuned, SENTIMENT, passes=4)


@pytest.fixture(scope="module")
def folder(tiny_folder, tokenizer, tmp_path_factory):
    """The adapter of `tuned` as a folder, for the command lines."""
    path = tmp_path_factory.mktemp("adapters") / "tuned"
    network = with_adapter(tiny("llama", tokenizer)).model
    network.peft_config["default"].base_model_name_or_path = None
    network.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def loaded(tiny_folder, folder):
    return load_llama(str(tiny_folder), str(folder), device="cpu")


@pytest.fixture
def call(capsys, loaded, monkeypatch):
    """Run the script in this process on the tiny model and its adapter: -> exit code, stdout, stderr."""
    monkeypatch.setattr(mc_dropout_confidence, "load_from", lambda args, task: loaded)

    def run_main(*arguments):
        capsys.readouterr()
        code = 0
        try:
            command_line.run(lambda: main([*map(str, arguments)]), resumes=True)
        except SystemExit as stopped:
            code = stopped.code
        return code, *capsys.readouterr()

    return run_main


def write_csv(path, rows, header=("id", "text", "label")):
    with open(path, "w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([header, *rows])
    return path


def texts(n, seed=0):
    """n labelled rows of one to twenty words."""
    chosen = random.Random(seed)
    return [
        (f"r{i}", " ".join(chosen.choices(WORDS, k=chosen.randint(1, 20))), chosen.choice(["positive", "negative"]))
        for i in range(n)
    ]


def records(path):
    return [json.loads(line) for line in path.read_bytes().splitlines()]


def lora_layers(network):
    return {name: module for name, module in network.named_modules() if hasattr(module, "lora_A")}


def masks_of(llama, seed):
    """What becomes of ones that are shown to each LoRA layer's dropout."""
    import torch

    with llama.dropping_out(seed):
        return {
            name: layer.lora_dropout["default"](torch.ones(layer.in_features))
            for name, layer in lora_layers(llama.model).items()
        }


# A pass is a model


def merged(llama, masks):
    """A plain model with the weights W + scale * B (A * mask)."""
    network = copy.deepcopy(llama.model)
    for name, layer in lora_layers(network).items():
        a, b, weight = layer.lora_A["default"].weight, layer.lora_B["default"].weight, layer.base_layer.weight
        change = 3 / 2 * b @ (a * masks[name])
        weight += change.T if layer.fan_in_fan_out else change  # GPT-2 keeps its weights the other way round
    return network.unload()


def by_hand(network, ids, answers, labels):
    """(probabilities, label mass) by plain forward passes over the prompt and all of an answer but its last token."""
    import torch

    totals, steps = dict.fromkeys(labels, 0.0), {}
    for answer in answers:
        said = answer.ids[:-1]
        if said not in steps:
            with torch.no_grad():
                logits = network(torch.tensor([[*ids, *said]])).logits[0, len(ids) - 1 :]
            steps[said] = logits.double().softmax(-1)
        totals[answer.label] += float(steps[said][range(len(answer.ids)), list(answer.ids)].prod())
    mass = sum(totals.values())
    return [total / mass for total in totals.values()], mass


@pytest.mark.parametrize("task", [SENTIMENT, WHOLE_ANSWERS], ids=["first-token", "sequence"])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_pass_is_a_plain_forward_pass_with_the_masked_adapter_merged_by_hand(kind, task, tokenizer):
    llama = with_adapter(tiny(kind, tokenizer))
    scorer = prepare(llama, task, passes=3, seed=5)
    rows = [scorer.encode(text)[0] for _, text, _ in texts(4)]
    assert max(len(answer.ids) for answer in scorer.answers) == (1 if task is SENTIMENT else 2)
    probabilities, mass = run_passes(rows, scorer, batch_size=3)
    assert llama.shares_prefix and (probabilities.shape, mass.shape) == ((3, 4, 2), (3, 4))
    for number in range(3):
        network = merged(llama, masks_of(llama, [5, number, DRAWS]))
        truth = [by_hand(network, ids, scorer.answers, task.labels) for ids in rows]
        assert probabilities[number] == pytest.approx(np.array([p for p, _ in truth]), abs=1e-5)
        assert mass[number] == pytest.approx([mass for _, mass in truth], rel=1e-4)
    assert probabilities.std(axis=0).min() > 1e-3  # far above what rounding could do


def test_a_mask_drops_a_share_of_the_inputs_of_every_layer_and_scales_the_others(tuned):
    masks = masks_of(tuned, [0, 0])
    assert len(masks) == 2 * 7
    values = np.concatenate([mask.numpy() for mask in masks.values()])
    assert np.unique(values) == pytest.approx([0, 1 / (1 - DROPOUT)], rel=1e-6)
    assert abs((values == 0).mean() - DROPOUT) < 4 * math.sqrt(DROPOUT * (1 - DROPOUT) / len(values))
    again, other = masks_of(tuned, [0, 0]), masks_of(tuned, [0, 1])
    assert all((masks[name] == again[name]).all() for name in masks)
    assert all((masks[name] != other[name]).any() for name in masks)
    assert len({tuple(mask.tolist()) for mask in masks.values()}) == len(masks)  # no layer has another's


def test_only_the_adapter_s_dropout_acts_whatever_state_the_model_is_in(tokenizer):
    own = {"resid_pdrop": 0.5, "embd_pdrop": 0.5, "attn_pdrop": 0.5}
    llama = with_adapter(tiny("gpt2", tokenizer, **own))
    scorer = prepare(llama, SENTIMENT, passes=3)
    expected = explain("not bad", scorer)
    llama.model.train()  # as a training leaves it
    assert explain("not bad", scorer) == expected and llama.model.training
    silent = with_adapter(tiny("gpt2", tokenizer, **own), trained=False)  # B is 0: no mask can change anything
    row = explain("not bad", prepare(silent, SENTIMENT, passes=3))
    assert row["passes"] == [row["without_dropout"]] * 3


def test_batches_order_company_and_a_shared_beginning_change_no_result(scorer):
    examples = [Example(*row) for row in texts(12)]
    alone = {example.id: explain(example.text, scorer) for example in examples}
    shuffled = random.Random(1).sample(examples, 12)
    for rows in (score(examples, scorer), *(score(shuffled, scorer, size) for size in (1, 5))):
        for row in rows:
            truth = alone[row.id]
            assert row.probabilities == pytest.approx(truth["probabilities"], abs=1e-5)
            assert row.label_mass == pytest.approx(truth["label_mass"], abs=1e-5)
            for part in ("epistemic", "aleatoric"):
                assert row.extras[part] == pytest.approx(truth[part], abs=1e-5)
    assert [row.id for row in rows] == [example.id for example in shuffled]


def test_the_seed_decides_the_passes_and_more_passes_begin_with_those_of_fewer(tuned, scorer):
    first, again = explain("not bad", scorer), explain("not bad", scorer)
    assert first == again
    longer = explain("not bad", prepare(tuned, SENTIMENT, passes=6))
    assert longer["passes"][:4] == first["passes"]
    other = explain("not bad", prepare(tuned, SENTIMENT, passes=4, seed=1))
    confidences = [one["confidence"] for row in (longer, other) for one in row["passes"]]
    assert len(set(confidences)) == 10 and first["epistemic"] > 1e-6


def test_method_1_is_left_as_it_was_even_when_a_pass_breaks_off(tuned, scorer, monkeypatch):
    examples = [Example(*row) for row in texts(5)]
    method_1 = logprobs_confidence.prepare(tuned, SENTIMENT)
    before = logprobs_confidence.score(examples, method_1)
    with_dropout = score(examples, scorer)
    assert logprobs_confidence.score(examples, method_1) == before
    assert all(a.probabilities != b.probabilities for a, b in zip(before, with_dropout, strict=True))

    def interrupt(n):
        if n:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        score(examples, scorer, 1, interrupt)
    assert not any(module._forward_hooks for module in tuned.model.modules()) and tuned._prefix == ((), None)
    assert logprobs_confidence.score(examples, method_1) == before and score(examples, scorer) == with_dropout
    plain, row = logprobs_confidence.explain("not bad", method_1), explain("not bad", scorer)["without_dropout"]
    for name in row:
        assert row[name] == (plain[name] if name == "prediction" else pytest.approx(plain[name], abs=1e-6))


# The two parts


def test_two_passes_worked_out_by_hand():
    # H(.9, .1) = .325083, H(.5, .5) = .693147, their mean .509115; H(.7, .3) = .610864
    epistemic, aleatoric = decompose(np.array([[[0.9, 0.1]], [[0.5, 0.5]]]))
    assert (epistemic.shape, aleatoric.shape) == ((1,), (1,))
    assert (epistemic[0], aleatoric[0]) == pytest.approx((0.101749, 0.509115), abs=1e-6)
    # Sure of different labels: all of it epistemic. Both torn: all of it aleatoric. Sure of the same: nothing.
    sure, other, torn = [1.0, 0.0], [0.0, 1.0], [0.5, 0.5]
    for passes, parts in (
        ([sure, other], (math.log(2), 0)),
        ([torn, torn], (0, math.log(2))),
        ([sure, sure], (0, 0)),
    ):
        found = decompose(np.array(passes))
        assert found == pytest.approx(parts, abs=1e-15) and not np.signbit(found).any()


def test_the_parts_sum_to_the_entropy_of_the_mean_and_are_never_negative():
    draw = np.random.default_rng(0)
    for labels, sharpness in ((2, 0.01), (2, 1.0), (5, 0.1), (3, 1000.0)):
        p = draw.dirichlet([sharpness] * labels, size=(7, 200))
        epistemic, aleatoric = decompose(p)
        assert epistemic + aleatoric == pytest.approx(scipy_entropy(p.mean(axis=0), axis=-1), abs=1e-12)
        assert epistemic.min() >= 0 and aleatoric.min() >= 0
        with np.errstate(divide="ignore", invalid="ignore"):  # the definition of mutual information, sum by sum
            terms = np.where(p > 0, p * np.log(p / p.mean(axis=0)), 0)
        assert epistemic == pytest.approx(terms.sum(axis=2).mean(axis=0), abs=1e-12)
        same = np.repeat(p[:1], 20, axis=0)
        assert decompose(same)[0] == pytest.approx(np.zeros(200), abs=1e-14)


def test_without_any_effect_of_the_dropout_nothing_is_epistemic(tokenizer):
    silent = with_adapter(tiny("llama", tokenizer), trained=False)
    for row in score([Example(*row) for row in texts(6)], prepare(silent, SENTIMENT)):
        assert row.extras["epistemic"] == pytest.approx(0, abs=1e-12)
        assert row.extras["aleatoric"] == pytest.approx(scipy_entropy([*row.probabilities.values()]), abs=1e-12)


# One text


def test_the_function_gives_the_label_of_the_mean_its_confidence_and_the_parts(tuned, scorer):
    label, confidence, epistemic, aleatoric = get_mc_dropout_confidence("not bad", 4, tuned, SENTIMENT)
    p, _ = run_passes([scorer.encode("not bad")[0]], scorer)
    mean = p[:, 0].mean(axis=0)
    assert label == ("negative", "positive")[mean.argmax()] and confidence == pytest.approx(mean.max(), abs=1e-15)
    assert epistemic + aleatoric == pytest.approx(scipy_entropy(mean), abs=1e-12)
    assert [type(value) for value in (label, confidence, epistemic, aleatoric)] == [str, float, float, float]
    assert get_mc_dropout_confidence("not bad", 4, tuned, seed=1) != (label, confidence, epistemic, aleatoric)
    for text in ("", " \n"):
        with pytest.raises(ValueError, match="empty"):
            get_mc_dropout_confidence(text, 4, tuned)
    with pytest.raises(ValueError, match="at least 2"):
        get_mc_dropout_confidence("not bad", 1, tuned)


def test_the_json_explanation_keeps_its_contract(call, loaded):
    given = ["not bad", "two\nlines, caf\u00e9 <|im_end|>"]
    code, out, err = call(*given, "--json", "--passes", 3)
    assert (code, err) == (0, "")
    objects = [json.loads(line) for line in out.splitlines()]
    assert [row["text"] for row in objects] == given
    keys = ["text", "prompt", "model", "model_path", "passes", "without_dropout", "probabilities", "label_mass"]
    keys += ["prediction", "confidence", "total_probability", "epistemic", "aleatoric", "fingerprint"]
    for row in objects:
        assert list(row) == keys and len(row["passes"]) == 3 and len(row["fingerprint"]) == 8
        for one in (row, row["without_dropout"], *row["passes"]):
            assert list(one["probabilities"]) == ["negative", "positive"]
            assert abs(sum(one["probabilities"].values()) - 1) < 1e-12
            assert one["prediction"] == max(one["probabilities"], key=one["probabilities"].get)
            assert one["confidence"] == one["probabilities"][one["prediction"]]
        for label, mean in row["probabilities"].items():
            assert mean == pytest.approx(np.mean([one["probabilities"][label] for one in row["passes"]]), abs=1e-12)
        assert row["label_mass"] == pytest.approx(np.mean([one["label_mass"] for one in row["passes"]]), rel=1e-12)
        assert row["total_probability"] == pytest.approx(row["confidence"] * row["label_mass"], rel=1e-12)
        assert row["prompt"].endswith(f"Text: {row['text']}\nSentiment:")
        assert row["epistemic"] + row["aleatoric"] == pytest.approx(scipy_entropy([*row["probabilities"].values()]))


def test_the_printed_explanation_shows_the_spread_the_parts_and_the_verdict(call, loaded):
    row = explain("not bad \x1b[2J", prepare(loaded, SENTIMENT, passes=5))
    code, out, _ = call("not bad \x1b[2J", "--passes", 5)
    assert code == 0 and "Text: not bad \\x1b[2J" in out and "\x1b" not in out and "mean of 5 passes" in out
    lines = {line.split("  ")[1]: line for line in out.splitlines() if line.startswith("  ")}
    for label, mean in row["probabilities"].items():
        spread = [one["probabilities"][label] for one in row["passes"]]
        numbers = row["without_dropout"]["probabilities"][label], mean, min(spread), max(spread)
        assert lines[label].split()[1:] == " ".join(f"{100 * number:.2f} %" for number in numbers).split()
    masses = [one["label_mass"] for one in row["passes"]]
    assert lines["label mass"].endswith(f"{100 * min(masses):.2f} %   {100 * max(masses):.2f} %")
    total = row["aleatoric"] + row["epistemic"]
    parts = [f"{name} {row[name]:.3g} ({100 * row[name] / total:.3g} %)" for name in ("aleatoric", "epistemic")]
    assert f"  entropy {total:.3g} nats = {parts[0]} + {parts[1]}\n" in out
    agree = sum(one["prediction"] == row["prediction"] for one in row["passes"])
    plain = row["without_dropout"]
    verdict = (
        f"  Verdict: {row['prediction']}, confidence {100 * row['confidence']:.2f} % ({agree} of 5 passes; without "
    )
    assert verdict + f"dropout {plain['prediction']}, {100 * plain['confidence']:.2f} %)" in out


# A table


def test_a_table_becomes_a_predictions_file(call, loaded, tmp_path):
    long = "a very long text indeed " * 200
    rows = [*texts(6), ("empty", " ", "negative"), ("long", long, ""), ("last", "good", "Positive")]
    table, output = write_csv(tmp_path / "t.csv", rows), tmp_path / "p.jsonl"
    code, out, err = call("--input", table, "--output", output, "--passes", 3)
    assert code == 0 and "7 of 9 rows scored, 2 with an error" in out and "scored 9 rows" in err
    found, scorer = predictions.read(output), prepare(loaded, SENTIMENT, passes=3)
    assert [(row.id, row.text) for row in found] == [row[:2] for row in rows] and found[-1].label == "positive"
    assert {row.method for row in found} == {"mc-dropout"} and {row.fingerprint for row in found} == {
        scorer.fingerprint
    }
    for row in found:
        if row.id in ("empty", "long"):
            assert ("empty" if row.id == "empty" else "--truncate") in row.error and row.confidence is None
            assert not row.extras
            continue
        truth = explain(row.text, scorer)
        assert row.probabilities == pytest.approx(truth["probabilities"], abs=1e-5)
        assert list(row.extras) == ["epistemic", "aleatoric"]
        assert all(type(value) is float and value >= 0 for value in row.extras.values())
        assert sum(row.extras.values()) == pytest.approx(scipy_entropy([*row.probabilities.values()]), abs=1e-12)
    code, _, _ = call("--input", table, "--output", tmp_path / "cut.jsonl", "--passes", 3, "--truncate")
    cut = predictions.read(tmp_path / "cut.jsonl")
    assert cut[7].error is None and cut[7].extras["truncated"] is True and cut[7].text == long
    assert cut[0].fingerprint != found[0].fingerprint and "truncated" not in cut[0].extras


def test_a_model_that_names_no_label_gives_no_number(scorer, monkeypatch):
    # Half precision can overflow to NaN, in one pass as in all.
    real, calls = scorer.llama.answer_log_probs, []

    def overflow(rows, *options):
        calls.append(1)
        return real(rows, *options) * (np.nan if len(calls) == 2 else 1)

    monkeypatch.setattr(scorer.llama, "answer_log_probs", overflow)
    (row,) = score([Example("1", "x", "positive")], scorer)
    assert row.confidence is row.prediction is None and not row.extras and "no label any probability" in row.error
    calls.clear()
    with pytest.raises(ValueError, match="no label any probability"):
        explain("x", scorer)


def test_progress_counts_every_row_once(scorer):
    examples = [Example(str(i), "" if i == 3 else f"text {i}", None) for i in range(10)]
    counted = []
    score(examples, scorer, 2, counted.append)
    assert sum(counted) == 10 and max(counted) <= 2  # it moves in small steps and not only at the end


def test_a_run_that_stopped_at_any_byte_ends_with_the_bytes_of_an_unbroken_one(call, tmp_path, monkeypatch):
    monkeypatch.setattr(mc_dropout_confidence, "ROWS_PER_WINDOW", {"cpu": 8})
    table, output = write_csv(tmp_path / "t.csv", texts(21)), tmp_path / "p.jsonl"
    command = ["--input", table, "--output", output, "--passes", 2]
    code, first, _ = call(*command)
    whole = output.read_bytes()
    assert code == 0 and whole.count(b"\n") == 21
    for end in (0, *random.Random(0).sample(range(len(whole)), 3), len(whole) - 1):
        output.write_bytes(whole[:end])
        code, out, err = call(*command)
        assert (code, out) == (0, first) and output.read_bytes() == whole, end
        assert f"scored {21 - whole[:end].count(bytes([10]))} rows" in err
    before = output.stat().st_mtime_ns
    assert call(*command) == (0, first, "") and output.stat().st_mtime_ns == before
    for other in (["--passes", 3], ["--seed", 1], ["--truncate"]):
        code, out, err = call(*command, *other)
        assert (code, out) == (2, "") and err.count("\n") == 1 and "--overwrite" in err
    assert output.read_bytes() == whole
    assert call(*command, "--seed", 1, "--overwrite")[0] == 0 and output.read_bytes() != whole


def test_a_killed_and_an_interrupted_run_are_continued_by_the_same_command(call, tiny_folder, folder, tmp_path):
    table, output = write_csv(tmp_path / "t.csv", texts(400)), tmp_path / "p.jsonl"
    arguments = ["--input", table, "--passes", 2, "--model", tiny_folder, "--adapter", folder, "--device", "cpu"]
    assert call(*arguments, "--output", tmp_path / "whole.jsonl")[0] == 0
    whole = (tmp_path / "whole.jsonl").read_bytes()
    command = [sys.executable, "mc_dropout_confidence.py", *map(str, arguments), "--output", str(output)]
    for how, code in ((signal.SIGKILL, -signal.SIGKILL), (signal.SIGINT, 130)):
        size = output.stat().st_size if output.exists() else 0
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        with subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True) as process:
            while process.poll() is None and (output.stat().st_size if output.exists() else 0) <= size:
                time.sleep(0.005)
            with suppress(ProcessLookupError):
                process.send_signal(how)
            _, err = process.communicate(timeout=120)
        assert process.returncode == code, err
        assert whole.startswith(output.read_bytes()) and size < output.stat().st_size < len(whole)
    assert err.splitlines()[-1] == "stopped; repeat the same command to continue where it was"
    assert call(*arguments, "--output", output)[0] == 0 and output.read_bytes() == whole


# The report


def share_of_pairs(values, right):
    """The share of (right, wrong) pairs in which the right row has the higher value; a tie is half a pair."""
    one, two = np.array(values)[right], np.array(values)[~right]
    return ((one[:, None] > two).mean() + (one[:, None] >= two).mean()) / 2


def test_the_report_ranks_labelled_rows_as_counting_pairs_does(call, tmp_path):
    rows = [*texts(40), ("u", "no label", ""), ("e", " ", "positive")]
    table, output = write_csv(tmp_path / "t.csv", rows), tmp_path / "p.jsonl"
    groups = write_csv(tmp_path / "g.csv", [(row[0], f"g{i // 2}") for i, row in enumerate(rows)], ("id", "group"))
    code, out, _ = call("--input", table, "--output", output, "--passes", 3, "--groups", groups)
    found = [row for row in predictions.read(output) if row.error is None]
    aleatoric, epistemic = (np.mean([row.extras[name] for row in found]) for name in ("aleatoric", "epistemic"))
    expected = f"  mean entropy: aleatoric {aleatoric:.3g} nats, epistemic {epistemic:.3g} nats "
    assert code == 0 and expected + f"({100 * epistemic / (aleatoric + epistemic):.3g} % of it)" in out
    labelled = found[:40]
    right = np.array([row.prediction == row.label for row in labelled])
    one = share_of_pairs([row.confidence for row in labelled], right)
    two = share_of_pairs([-row.extras["epistemic"] for row in labelled], right)
    assert (
        f"confidence {one:.3f} [" in out and f"-epistemic {two:.3f} [" in out and f"difference {two - one:.3f} [" in out
    )
    assert "(n = 40 labelled rows in 20 groups, nothing fitted" in out
    # Near-duplicates are one group when no table says otherwise; each interval holds its value.
    alone = ranking(labelled, range(40))
    assert "n = 40 labelled rows, nothing fitted" in alone
    for part in alone.splitlines()[0].split(": ")[1].split("], "):
        value, low, high = (float(number.strip("[],")) for number in part.split()[1:])
        assert low <= value <= high


def test_a_table_without_labels_or_right_in_every_row_is_reported_as_that(call, tmp_path):
    given = [("1", "fine", ""), ("2", "good", "")]
    code, out, _ = call(
        "--input", write_csv(tmp_path / "t.csv", given), "--output", tmp_path / "p.jsonl", "--passes", 2
    )
    assert code == 0 and "2 of 2 rows" in out and "mean entropy" in out and "AUROC" not in out
    truth = [(row.id, row.text, row.prediction) for row in predictions.read(tmp_path / "p.jsonl")]
    code, out, _ = call(
        "--input", write_csv(tmp_path / "r.csv", truth), "--output", tmp_path / "r.jsonl", "--passes", 2
    )
    assert code == 0 and "accuracy 1.000" in out and "AUROC" not in out
    nothing = write_csv(tmp_path / "e.csv", [("1", " ", "positive")])
    code, out, _ = call("--input", nothing, "--output", tmp_path / "e.jsonl", "--passes", 2)
    assert code == 0 and "0 of 1 rows scored, 1 with an error" in out and "entropy" not in out


def test_a_calibrator_adds_its_fields_and_refuses_another_seed(call, loaded, tmp_path):
    fingerprint, platt = prepare(loaded, SENTIMENT, passes=2).fingerprint, PlattScalingCalibrator()
    platt.slope_, platt.intercept_ = 2.0, -0.5
    identity, seen = (fingerprint, loaded.name, "sentiment", 100, 90), frozenset([text_key("another text")])
    fitted = Recipe("platt", False), platt, ("negative", "positive"), *identity, seen, {}, {"value": 0.6}
    save_calibrator(tmp_path / "k.json", FittedCalibrator(*fitted))
    table, output = write_csv(tmp_path / "t.csv", texts(5)), tmp_path / "p.jsonl"
    flags = ["--passes", 2, "--calibrator", tmp_path / "k.json"]
    code, out, err = call("--input", table, "--output", output, *flags)
    assert code == 0 and "calibrated: " in out, err
    for row in records(output):
        truth = 1 / (1 + math.exp(0.5) * ((1 - row["confidence"]) / row["confidence"]) ** 2)
        assert row["calibrated_confidence"] == pytest.approx(truth, abs=1e-9) and row["epistemic"] >= 0
        assert row["decision"] == ("automate" if truth >= 0.6 else "review")
    code, out, _ = call(texts(1)[0][1], "--json", *flags)
    assert json.loads(out)["calibrated_confidence"] == pytest.approx(
        records(output)[0]["calibrated_confidence"], abs=1e-4
    )
    code, out, err = call("x", *flags, "--seed", 1)
    assert (code, out) == (2, "") and "the calibrator is for" in err


# What it refuses


def test_no_adapter_no_dropout_and_no_plain_lora_are_one_line_that_says_what_to_do(tiny_llama, tokenizer, monkeypatch):
    for llama, named in (
        (tiny_llama, "no LoRA adapter"),
        (with_adapter(tiny("llama", tokenizer), dropout=0.0), "lora_dropout 0"),
        (with_adapter(tiny("llama", tokenizer), use_dora=True), "DoRA"),
    ):
        with pytest.raises(ValueError, match=r"fine_tune_model\.py --dropout 0\.05") as caught:
            prepare(llama, SENTIMENT)
        assert named in str(caught.value)


def test_bad_commands_end_with_code_2_and_one_line_and_leave_no_file(run, call, tiny_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    table = write_csv(tmp_path / "t.csv", texts(2))
    groups = write_csv(tmp_path / "g.csv", [("r0", "a")], ("id", "group"))
    to_file = ["--input", table, "--output", "new.jsonl"]
    for command, named in (
        ([], "--input"),
        ([" "], "text 1 is empty"),
        (["x", "--passes", 1], "--passes 1: at least 2"),
        (["x", "--batch-size", 0], "--batch-size 0: at least 1"),
        (["x", "--seed", -1], "--seed"),
        (["x", "--adapter", "none"], "fine_tune_model.py --dropout 0.05"),
        (["x", "--groups", groups], "--groups is for"),
        (["x", "--threshold", 0.9], "--calibrator"),
        (["x", "--task", "mood"], "no task 'mood'"),
        (["--input", table], "--output"),
        ([*to_file, "--json"], "--json"),
        ([*to_file, "--groups", groups], "no group for the row 'r1'"),
        ([*to_file, "--groups", "missing.csv"], "missing.csv"),
        (["--input", table, "--output", table], "both input and output"),
        (["--input", table, "--output", groups, "--groups", groups], "both input and output"),
    ):
        code, out, err = call(*command)
        assert (code, out) == (2, ""), command
        assert err.startswith("error: ") and err.count("\n") == 1 and named in err, (command, err)
    # As a user types it, on a model without an adapter of ours.
    done = run(ROOT / "mc_dropout_confidence.py", *to_file, "--model", tiny_folder, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "") and done.stderr.count("\n") == 1
    assert done.stderr.startswith("error: tiny has no LoRA adapter") and "--dropout 0.05" in done.stderr
    assert not Path("new.jsonl").exists()


def test_the_fingerprint_follows_adapter_passes_seed_and_truncation(tuned):
    plain = prepare(tuned, SENTIMENT).fingerprint
    others = [
        prepare(replace(tuned, identity=tuned.identity | {"adapter": "another"}), SENTIMENT).fingerprint,
        prepare(tuned, TASKS["sentiment-yes-no"]).fingerprint,
        prepare(tuned, SENTIMENT, passes=21).fingerprint,
        prepare(tuned, SENTIMENT, seed=1).fingerprint,
        prepare(tuned, SENTIMENT, truncate=True).fingerprint,
        logprobs_confidence.prepare(tuned, SENTIMENT).fingerprint,
    ]
    assert len({plain, *others}) == 7 and prepare(tuned, SENTIMENT).fingerprint == plain
