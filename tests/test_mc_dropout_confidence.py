"""mc_dropout_confidence.py, in this process and as the command that a user types.

Truth comes from plain forward passes of models whose weights were merged with the masks by hand, from entropies by
scipy and by double sums, from counting pairs, from Method 1, and from unbroken runs for broken ones. All models are
tiny and random, with random adapters: nothing here depends on what a model says.
"""

import copy
import json
import math
import random
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import assert_one_error, texts, tiny, write_csv
from scipy.stats import entropy

import mc_dropout_confidence
import predictions
from llama import load_llama
from logprobs_confidence import label_scorer
from lora import dropping_out
from mc_dropout_confidence import DRAWS, decompose, dropout_scorer, main, ranking
from tables import Example
from task import TASKS, Task

ROOT = Path(__file__).parent.parent
SENTIMENT = TASKS["sentiment"]
WHOLE_ANSWERS = Task(
    "mood", {"bad": ("rather bad", "poor"), "good": ("good",)}, "Which mood?\n{text}\nIt is", scoring="sequence"
)
DROPOUT = 0.3


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
    return dropout_scorer(tuned, SENTIMENT, passes=4)


@pytest.fixture(scope="module")
def loaded(tiny_folder, tokenizer, tmp_path_factory):
    """The same model and adapter, read from folders as the command line does."""
    folder = tmp_path_factory.mktemp("adapters") / "tuned"
    network = with_adapter(tiny("llama", tokenizer)).model
    network.peft_config["default"].base_model_name_or_path = None
    network.save_pretrained(folder)
    return load_llama(str(tiny_folder), str(folder), device="cpu")


@pytest.fixture
def call(outcome, loaded, monkeypatch):
    """Run the script in this process on the tiny model and its adapter: -> exit code, stdout, stderr."""
    monkeypatch.setattr(mc_dropout_confidence, "load_llama", lambda **_: loaded)

    return lambda *arguments: outcome(main, *arguments)


def lora_layers(network):
    return {name: module for name, module in network.named_modules() if hasattr(module, "lora_A")}


def masks_of(llama, seed):
    """What becomes of ones that are shown to each LoRA layer's dropout."""
    import torch

    with dropping_out(llama, seed):
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
    scorer = dropout_scorer(llama, task, passes=3, seed=5, batch_size=3)
    answers = scorer.method_1.answers
    rows = [scorer.method_1.encode(text)[0] for _, text, _ in texts(4)]
    assert max(len(answer.ids) for answer in answers) == (1 if task is SENTIMENT else 2)
    probabilities, mass = scorer.run_passes(rows)
    assert llama.shares_prefix and (probabilities.shape, mass.shape) == ((3, 4, 2), (3, 4))
    for number in range(3):
        network = merged(llama, masks_of(llama, [5, number, DRAWS]))
        truth = [by_hand(network, ids, answers, task.labels) for ids in rows]
        assert probabilities[number] == pytest.approx(np.array([p for p, _ in truth]), abs=1e-5)
        assert mass[number] == pytest.approx([mass for _, mass in truth], rel=1e-4)
    assert probabilities.std(axis=0).min() > 1e-3  # far above what rounding could do


def test_a_mask_drops_a_share_of_the_inputs_of_every_layer_and_scales_the_others(tuned):
    masks = list(masks_of(tuned, [0, 0]).values())
    values = np.concatenate(masks)
    assert len(masks) == 2 * 7 and np.unique(values) == pytest.approx([0, 1 / (1 - DROPOUT)], rel=1e-6)
    assert abs((values == 0).mean() - DROPOUT) < 4 * math.sqrt(DROPOUT * (1 - DROPOUT) / len(values))
    assert len({tuple(mask.tolist()) for mask in masks}) == len(masks)  # no layer has another's


def test_only_the_adapter_s_dropout_acts_whatever_state_the_model_is_in(tokenizer):
    own = {"resid_pdrop": 0.5, "embd_pdrop": 0.5, "attn_pdrop": 0.5}
    scorer = dropout_scorer(with_adapter(tiny("gpt2", tokenizer, **own)), SENTIMENT, passes=3)
    expected = scorer.explain("not bad")
    scorer.method_1.llama.model.train()  # as a training leaves it
    assert scorer.explain("not bad") == expected and scorer.method_1.llama.model.training
    silent = with_adapter(tiny("gpt2", tokenizer, **own), trained=False)  # B is 0: no mask can change anything
    row = dropout_scorer(silent, SENTIMENT, passes=3).explain("not bad")
    assert row["passes"] == [row["without_dropout"]] * 3
    assert row["epistemic"] == pytest.approx(0, abs=1e-12)
    assert row["aleatoric"] == pytest.approx(entropy([*row["probabilities"].values()]), abs=1e-12)


def test_batches_order_company_and_a_shared_beginning_change_no_result(scorer):
    examples = [Example(*row) for row in texts(12)]
    alone = {example.id: scorer.explain(example.text) for example in examples}
    for size in (None, 1, 5):
        method_1 = replace(scorer.method_1, batch_size=size)
        shuffled = random.Random(size).sample(examples, 12)
        rows = replace(scorer, method_1=method_1).score_together(shuffled)
        assert [row.id for row in rows] == [example.id for example in shuffled]
        for row in rows:
            truth = alone[row.id]
            assert row.probabilities == pytest.approx(truth["probabilities"], abs=1e-5)
            assert row.label_mass == pytest.approx(truth["label_mass"], abs=1e-5)
            for part in ("epistemic", "aleatoric"):
                assert row.extras[part] == pytest.approx(truth[part], abs=1e-5)


def test_the_seed_decides_the_passes_and_more_passes_begin_with_those_of_fewer(tuned, scorer):
    first, again = scorer.explain("not bad"), scorer.explain("not bad")
    assert first == again
    longer = dropout_scorer(tuned, SENTIMENT, passes=6).explain("not bad")
    assert longer["passes"][:4] == first["passes"]
    other = dropout_scorer(tuned, SENTIMENT, passes=4, seed=1).explain("not bad")
    confidences = [one["confidence"] for row in (longer, other) for one in row["passes"]]
    assert len(set(confidences)) == 10 and first["epistemic"] > 1e-6


def test_method_1_is_left_as_it_was_even_when_a_pass_breaks_off(tuned, scorer):
    examples, method_1 = [Example(*row) for row in texts(5)], label_scorer(tuned, SENTIMENT)
    before, with_dropout = method_1.score_together(examples), scorer.score_together(examples)
    assert all(a.probabilities != b.probabilities for a, b in zip(before, with_dropout, strict=True))

    def interrupt(n):
        if n:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        scorer.score_together(examples, interrupt)
    assert method_1.score_together(examples) == before and scorer.score_together(examples) == with_dropout
    plain, row = method_1.explain("not bad"), scorer.explain("not bad")["without_dropout"]
    assert row["prediction"] == plain["prediction"]
    assert (row["confidence"], row["label_mass"]) == pytest.approx((plain["confidence"], plain["label_mass"]), abs=1e-6)


# The two parts


def test_two_passes_worked_out_by_hand():
    # H(.9, .1) = .325083, H(.5, .5) = .693147, their mean .509115; H(.7, .3) = .610864
    epistemic, aleatoric = decompose(np.array([[[0.9, 0.1]], [[0.5, 0.5]]]))
    assert (epistemic.shape, aleatoric.shape) == ((1,), (1,))
    assert (epistemic[0], aleatoric[0]) == pytest.approx((0.101749, 0.509115), abs=1e-6)
    # Sure of different labels: all of it epistemic. Both torn: all of it aleatoric. Sure of the same: nothing.
    sure, other, torn = [1.0, 0.0], [0.0, 1.0], [0.5, 0.5]
    for passes, parts in (([sure, other], (math.log(2), 0)), ([torn, torn], (0, math.log(2))), ([sure, sure], (0, 0))):
        found = decompose(np.array(passes))
        assert found == pytest.approx(parts, abs=1e-15) and not np.signbit(found).any()


def test_the_parts_sum_to_the_entropy_of_the_mean_and_are_never_negative():
    draw = np.random.default_rng(0)
    for labels, sharpness in ((2, 0.01), (2, 1.0), (5, 0.1), (3, 1000.0)):
        p = draw.dirichlet([sharpness] * labels, size=(7, 200))
        epistemic, aleatoric = decompose(p)
        assert epistemic + aleatoric == pytest.approx(entropy(p.mean(axis=0), axis=-1), abs=1e-12)
        assert epistemic.min() >= 0 and aleatoric.min() >= 0
        with np.errstate(divide="ignore", invalid="ignore"):  # the definition of mutual information, sum by sum
            terms = np.where(p > 0, p * np.log(p / p.mean(axis=0)), 0)
        assert epistemic == pytest.approx(terms.sum(axis=2).mean(axis=0), abs=1e-12)
        assert decompose(np.repeat(p[:1], 20, axis=0))[0] == pytest.approx(np.zeros(200), abs=1e-14)


# One text


def test_an_explanation_is_the_mean_of_its_passes_as_json_and_in_print(call):
    text = "two\nlines, caf\u00e9 <|im_end|> \x1b[2J"
    code, out, err = call(text, "--json", "--passes", 5)
    row, printed = json.loads(out), call(text, "--passes", 5)[1]
    assert (code, err) == (0, "") and "Text: two\\nlines, caf\u00e9 <|im_end|> \\x1b[2J" in printed
    keys = {"text", "prompt", "model", "model_path", "passes", "without_dropout", "probabilities", "label_mass"}
    keys |= {"prediction", "confidence", "total_probability", "epistemic", "aleatoric", "fingerprint"}
    assert set(row) == keys and row["prompt"].endswith(f"Text: {text}\nSentiment:")
    plain, passes = row["without_dropout"], row["passes"]
    for one in (row, plain, *passes):
        assert sum(one["probabilities"].values()) == pytest.approx(1, abs=1e-12)
        assert one["confidence"] == max(one["probabilities"].values()) == one["probabilities"][one["prediction"]]
    for name in ("negative", "positive", "label mass"):
        values = [one["probabilities"].get(name, one["label_mass"]) for one in (plain, row, *passes)]
        assert len(passes) == 5 and values[1] == pytest.approx(np.mean(values[2:]), rel=1e-12)
        shown = (*values[:2], min(values[2:]), max(values[2:]))
        (line,) = [line for line in printed.splitlines() if line.startswith(f"  {name} ")]
        assert line.split("  ")[1] == name and re.findall(r"[\d.]+ %", line) == [f"{100 * x:.2f} %" for x in shown]
    total = row["aleatoric"] + row["epistemic"]
    assert total == pytest.approx(entropy([*row["probabilities"].values()]))
    assert row["total_probability"] == pytest.approx(row["confidence"] * row["label_mass"], rel=1e-12)
    parts = [f"{name} {row[name]:.3g} ({100 * row[name] / total:.3g} %)" for name in ("aleatoric", "epistemic")]
    assert f"  entropy {total:.3g} nats = {parts[0]} + {parts[1]}\n" in printed
    agree = sum(one["prediction"] == row["prediction"] for one in passes)
    assert f"  Verdict: {row['prediction']}, confidence {100 * row['confidence']:.2f} % ({agree} of 5 passes" in printed


# A table


def test_a_table_becomes_a_predictions_file(call, loaded, tmp_path):
    long = "a very long text indeed " * 200
    rows = [*texts(6), ("empty", " ", "negative"), ("long", long, ""), ("last", "good", "Positive")]
    table, output = write_csv(tmp_path / "t.csv", rows), tmp_path / "p.jsonl"
    code, out, err = call("--input", table, "--output", output, "--passes", 3)
    assert code == 0 and "7 of 9 rows scored, 2 with an error" in out and "scored 9 rows" in err
    found, scorer = predictions.read(output), dropout_scorer(loaded, SENTIMENT, passes=3)
    assert [(row.id, row.text) for row in found] == [row[:2] for row in rows] and found[-1].label == "positive"
    assert {(row.method, row.fingerprint) for row in found} == {("mc-dropout", scorer.fingerprint)}
    for row in found:
        if row.id in ("empty", "long"):
            assert ("empty" if row.id == "empty" else "--truncate") in row.error and not row.extras
            continue
        assert row.probabilities == pytest.approx(scorer.explain(row.text)["probabilities"], abs=1e-5)
        assert list(row.extras) == ["epistemic", "aleatoric"] and min(row.extras.values()) >= 0
        assert sum(row.extras.values()) == pytest.approx(entropy([*row.probabilities.values()]), abs=1e-12)
    assert call("--input", table, "--output", tmp_path / "cut.jsonl", "--passes", 3, "--truncate")[0] == 0
    cut = predictions.read(tmp_path / "cut.jsonl")
    assert cut[7].error is None and cut[7].extras["truncated"] is True and cut[7].text == long
    assert cut[0].fingerprint != found[0].fingerprint and "truncated" not in cut[0].extras


def test_a_model_that_names_no_label_gives_no_number(scorer, monkeypatch):
    # Half precision can overflow to NaN, in one pass as in all.
    real, calls = scorer.method_1.llama.answer_log_probs, []

    def overflow(rows, *options):
        calls.append(1)
        return real(rows, *options) * (np.nan if len(calls) == 2 else 1)

    monkeypatch.setattr(scorer.method_1.llama, "answer_log_probs", overflow)
    (row,) = scorer.score_together([Example("1", "x", "positive")])
    assert row.confidence is row.prediction is None and not row.extras and "no label any probability" in row.error
    calls.clear()
    with pytest.raises(ValueError, match="no label any probability"):
        scorer.explain("x")


def test_progress_counts_every_row_once(scorer):
    examples, counted = [Example(str(i), "" if i == 3 else f"text {i}", None) for i in range(10)], []
    replace(scorer, method_1=replace(scorer.method_1, batch_size=2)).score_together(examples, counted.append)
    assert sum(counted) == 10 and max(counted) <= 2  # it moves in small steps and not only at the end


def test_a_run_that_stopped_ends_with_the_bytes_of_an_unbroken_one(call, tmp_path, monkeypatch):
    monkeypatch.setattr(mc_dropout_confidence, "ROWS_PER_WINDOW", {"cpu": 8})
    table, output = write_csv(tmp_path / "t.csv", texts(21)), tmp_path / "p.jsonl"
    command = ["--input", table, "--output", output, "--passes", 2]
    first, whole = call(*command)[1], output.read_bytes()
    for end in (*random.Random(0).sample(range(len(whole)), 2), len(whole) - 1):
        output.write_bytes(whole[:end])
        code, out, err = call(*command)
        assert (code, out) == (0, first) and output.read_bytes() == whole, end
        assert f"scored {21 - whole[:end].count(bytes([10]))} rows" in err
    code, out, err = call(*command, "--seed", 1)
    assert (code, out) == (2, "") and "--overwrite" in err and output.read_bytes() == whole


# The report


def share_of_pairs(values, right):
    """The share of (right, wrong) pairs in which the right row has the higher value; a tie is half a pair."""
    one, two = np.array(values)[right], np.array(values)[~right]
    return ((one[:, None] > two).mean() + (one[:, None] >= two).mean()) / 2


def test_the_report_ranks_labelled_rows_as_counting_pairs_does(call, tmp_path):
    rows = [*texts(40), ("u", "no label", ""), ("e", " ", "positive")]
    table, output = write_csv(tmp_path / "t.csv", rows), tmp_path / "p.jsonl"
    groups = write_csv(tmp_path / "g.csv", [(row[0], f"g{i // 2}") for i, row in enumerate(rows)], ("id", "group"))
    out = call("--input", table, "--output", output, "--passes", 3, "--groups", groups)[1]
    found = [row for row in predictions.read(output) if row.error is None]
    aleatoric, epistemic = (np.mean([row.extras[name] for row in found]) for name in ("aleatoric", "epistemic"))
    expected = f"  mean entropy: aleatoric {aleatoric:.3g} nats, epistemic {epistemic:.3g} nats "
    assert expected + f"({100 * epistemic / (aleatoric + epistemic):.3g} % of it)" in out
    labelled = found[:40]
    right = np.array([row.prediction == row.label for row in labelled])
    one = share_of_pairs([row.confidence for row in labelled], right)
    two = share_of_pairs([-row.extras["epistemic"] for row in labelled], right)
    assert f"confidence {one:.3f} [" in out and f"-epistemic {two:.3f} [" in out
    assert f"difference {two - one:.3f} [" in out and "(n = 40 labelled rows in 20 groups, nothing fitted" in out
    alone = ranking(labelled, range(40))
    assert "n = 40 labelled rows, nothing fitted" in alone
    for part in alone.splitlines()[0].split(": ")[1].split("], "):
        value, low, high = (float(number.strip("[],")) for number in part.split()[1:])
        assert low <= value <= high


# What it refuses


def test_no_adapter_no_dropout_and_no_plain_lora_are_one_line_that_says_what_to_do(tiny_llama, tuned, tokenizer):
    for llama, named in (
        (tiny_llama, "no LoRA adapter"),
        (with_adapter(tiny("llama", tokenizer), dropout=0.0), "lora_dropout 0"),
        (with_adapter(tiny("llama", tokenizer), use_dora=True), "DoRA"),
    ):
        with pytest.raises(ValueError, match=r"fine_tune_model\.py --dropout 0\.05") as caught:
            dropout_scorer(llama, SENTIMENT)
        assert named in str(caught.value)
    with pytest.raises(ValueError, match="at least 2"):
        dropout_scorer(tuned, SENTIMENT, passes=1)


def test_bad_commands_end_with_code_2_and_one_line_and_leave_no_file(call, loaded, tiny_llama, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    table = write_csv(tmp_path / "t.csv", texts(2))
    groups = write_csv(tmp_path / "g.csv", [("r0", "a")], ("id", "group"))
    to_file = ["--input", table, "--output", "new.jsonl"]
    for command, named in (
        (["x", "--passes", 1], "--passes 1: at least 2"),
        (["x", "--adapter", "none"], "fine_tune_model.py --dropout 0.05"),
        (["x", "--groups", groups], "--groups is for"),
        ([*to_file, "--groups", groups], "no group for the row 'r1'"),
        (["--input", table, "--output", groups, "--groups", groups, "--overwrite"], "both input and output"),
    ):
        assert_one_error(call(*command), named)
    monkeypatch.setattr(mc_dropout_confidence, "load_llama", lambda **_: tiny_llama)
    assert_one_error(call(*to_file), "tiny-llama has no LoRA adapter")
    assert not Path("new.jsonl").exists()


def test_the_fingerprint_follows_adapter_task_passes_seed_and_truncation(tuned):
    plain = dropout_scorer(tuned, SENTIMENT).fingerprint
    others = [
        dropout_scorer(replace(tuned, identity=tuned.identity | {"adapter": "another"}), SENTIMENT).fingerprint,
        dropout_scorer(tuned, TASKS["sentiment-yes-no"]).fingerprint,
        dropout_scorer(tuned, SENTIMENT, passes=21).fingerprint,
        dropout_scorer(tuned, SENTIMENT, seed=1).fingerprint,
        dropout_scorer(tuned, SENTIMENT, truncate=True).fingerprint,
        label_scorer(tuned, SENTIMENT).fingerprint,
    ]
    assert len({plain, *others}) == 7 and dropout_scorer(tuned, SENTIMENT).fingerprint == plain
