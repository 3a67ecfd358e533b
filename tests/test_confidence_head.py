"""confidence_head.py: P(right) from the last hidden state, fitted by fine_tune_model.py, read by Method 1.

Truth comes from simulations whose weights are known, from an optimiser of its own, from rows that no fit has seen, from
plain transformers with `output_hidden_states`, and from unbroken runs for broken ones. The models are tiny and random.
"""

import itertools
import json
import math
import random
import shutil
from dataclasses import replace

import numpy as np
import pytest
from conftest import assert_one_error, exit_code_of, tiny, write_csv
from scipy.optimize import minimize
from scipy.special import expit

import confidence_head
import fine_tune_model
import logprobs_confidence
import predictions
import training
from calibration import PlattScalingCalibrator, cross_fit
from calibration_metrics import log_loss
from confidence_head import STRENGTHS, ConfidenceHead, fit_head, load_head, save_head
from llama import load_llama
from logprobs_confidence import label_scorer
from lora import HEAD
from tables import Example
from task import TASKS

SENTIMENT = TASKS["sentiment"]
WORDS = ("a", "film", "that", "is", "not", "long", "funny", "dull", "and", "never", "quite", "warm", "told", "slow")
WORDS += ("with", "some", "heart", "but", "too", "many", "turns")


pytestmark = pytest.mark.usefixtures("one_tokenizer")


# Fitting


def logit(p):
    return np.log(p) - np.log1p(-p)


def simulated(n, weights, seed, slope=0.8, intercept=-0.2):
    """(hidden states [n, d], confidence [n], correct [n], P(right) [n]) where a head with these weights is true."""
    draw = np.random.default_rng(seed)
    hidden = draw.normal(3, 2, (n, len(weights)))
    confidence = draw.uniform(0.5, 0.99, n)
    truth = expit(slope * logit(confidence) + intercept + (hidden - 3) / 2 @ weights)
    return hidden, confidence, draw.random(n) < truth, truth


def ridge(hidden, confidence, correct, strength):
    """(slope, intercept, weights) with the greatest likelihood times normal prior of variance strength / width."""
    z, x = (hidden - hidden.mean(axis=0)) / hidden.std(axis=0), logit(confidence)
    sign, variance = np.where(correct, 1.0, -1.0), strength / hidden.shape[1]

    def loss(t):
        margin = sign * (t[0] * x + t[1] + z @ t[2:])
        slope = -sign * expit(-margin)
        gradient = np.concatenate([[slope @ x, slope.sum()], z.T @ slope + t[2:] / variance])
        return np.logaddexp(0, -margin).sum() + (t[2:] ** 2).sum() / (2 * variance), gradient

    return minimize(loss, np.zeros(2 + hidden.shape[1]), jac=True, method="BFGS", options={"gtol": 1e-7}).x


@pytest.mark.parametrize("strength", STRENGTHS[1:])
def test_a_head_is_the_ridge_regression_that_it_says(strength):
    hidden, confidence, correct, _ = simulated(300, np.random.default_rng(5).normal(0, 0.3, 40), 2)
    head = confidence_head._head(hidden, confidence, correct, strength)
    slope, intercept, *weights = ridge(hidden, confidence, correct, strength)
    assert (head.slope, head.intercept) == pytest.approx((slope, intercept), abs=1e-5)
    assert head.weights == pytest.approx(np.array(weights), abs=1e-5)


def test_a_head_beats_platt_scaling_where_the_hidden_states_know_more():
    weights = np.array([1.0, -0.7, 0.4, 0.0, 0.0])
    seen, (hidden, confidence, correct, truth) = simulated(3000, weights, 0)[:3], simulated(6000, weights, 1)
    head = fit_head(*seen, range(3000), "f")
    platt = PlattScalingCalibrator().fit(*seen[1:]).predict(confidence)
    found = log_loss(head.predict(hidden, confidence), correct)
    assert found < log_loss(platt, correct) - 0.1 and found - log_loss(truth, correct) < 0.004
    assert head.record["strength"] >= 1
    assert head.record["out_of_fold_log_loss"] == pytest.approx(found, abs=0.03)


def test_without_weights_a_head_is_platt_scaling():
    hidden, confidence, correct, _ = simulated(300, np.zeros(4), 3)
    head = confidence_head._head(hidden, confidence, correct, 0.0)
    platt = PlattScalingCalibrator().fit(confidence, correct)
    assert not head.weights.any()  # Platt's own targets, which keep off 0 and 1, are all that sets the two apart
    assert head.predict(hidden, confidence) == pytest.approx(platt.predict(confidence), abs=0.01)
    record = fit_head(hidden, confidence, correct, range(300), "f").record
    out_of_fold = log_loss(cross_fit(PlattScalingCalibrator(), confidence, correct, range(300)), correct)
    assert record["platt_log_loss"] == pytest.approx(out_of_fold, abs=0.002)


def test_where_hidden_states_know_nothing_a_head_adds_next_to_nothing():
    losses, strengths = [], []
    for seed in range(4):
        hidden, confidence, correct, _ = simulated(300, np.zeros(30), seed)
        head = fit_head(hidden, confidence, correct, range(300), "f")
        strengths.append(head.record["strength"])
        fresh = simulated(4000, np.zeros(30), 100 + seed)
        platt = PlattScalingCalibrator().fit(confidence, correct).predict(fresh[1])
        losses.append(log_loss(head.predict(*fresh[:2]), fresh[2]) - log_loss(platt, fresh[2]))
        assert head.record["out_of_fold_log_loss"] <= head.record["platt_log_loss"]
    assert np.median(strengths) <= 0.03 and np.mean(losses) < 0.003


def test_rows_of_a_group_are_in_one_fold():
    # Every row five times: folds that tore the copies apart would reward learning them by heart.
    hidden, confidence, correct, _ = simulated(60, np.zeros(40), 4)
    copies = [np.repeat(value, 5, axis=0) for value in (hidden, confidence, correct)]
    together = fit_head(*copies, np.repeat(range(60), 5), "f").record
    torn = fit_head(*copies, range(300), "f").record
    assert torn["out_of_fold_log_loss"] < together["out_of_fold_log_loss"] - 0.1
    assert together["strength"] <= 0.1 < torn["strength"]


@pytest.mark.parametrize(
    ("n", "correct", "words"),
    [
        (19, np.arange(19) > 8, "19 rows are too few.*20"),
        (40, np.ones(40), "right"),
        (40, np.zeros(40), "wrong"),
        (40, np.arange(40) > 0, "right"),  # in the fold that holds the one wrong row
    ],
)
def test_rows_that_cannot_teach_a_head_are_an_error(n, correct, words):
    hidden, confidence, _, _ = simulated(n, np.zeros(3), 7)
    with pytest.raises(ValueError, match=f"^.*{words}.*$"):
        fit_head(hidden, confidence, correct, range(n), "f")


# The file


@pytest.fixture(scope="module")
def fitted():
    hidden, confidence, correct, _ = simulated(200, np.array([1.0, -0.5, 1 / 3]), 8)
    return fit_head(hidden, confidence, correct, range(200), "0123abcd"), hidden, confidence


def test_a_head_comes_back_from_its_file_bit_for_bit(fitted, tmp_path):
    head, hidden, confidence = fitted
    save_head(tmp_path / "head.json", head)
    again = load_head(tmp_path / "head.json")
    assert again.predict(hidden, confidence).tobytes() == head.predict(hidden, confidence).tobytes()
    assert again.digest == head.digest and len(head.digest) == 8
    assert (again.fingerprint, again.record) == (head.fingerprint, head.record)
    save_head(tmp_path / "again.json", again)
    assert (tmp_path / "again.json").read_bytes() == (tmp_path / "head.json").read_bytes()
    assert {path.name for path in tmp_path.iterdir()} == {"head.json", "again.json"}


@pytest.mark.parametrize("name", ["slope", "intercept", "weights", "mean", "scale"])
def test_the_digest_follows_every_number(fitted, name):
    assert replace(fitted[0], **{name: getattr(fitted[0], name) + 1e-9}).digest != fitted[0].digest


BROKEN = {  # field -> values that cannot be
    "format": ["another"],
    "slope": ["1", True, 10**400],
    "intercept": [None],
    "weights": [3, [], ["a", "b", "c"], [1, 2], [[1, 2, 3]], [1, 2, None]],
    "mean": [[1, 2], {}],
    "scale": [[1, 2, 0], [1, 2, -1]],
    "fingerprint": [None],
    "record": [[]],
}


@pytest.mark.parametrize("field", BROKEN)
def test_a_head_edited_by_hand_is_one_line_that_names_the_field(fitted, tmp_path, field):
    path = tmp_path / "head.json"
    save_head(path, fitted[0])
    whole = json.loads(path.read_text())
    without = {name: value for name, value in whole.items() if name != field}
    for record in [without, *({**whole, field: value} for value in BROKEN[field])]:
        path.write_text(json.dumps(record))
        with pytest.raises(ValueError, match=rf"^{path} is not a confidence head: .*\b{field}\b.*$"):
            load_head(path)
    for text in (json.dumps(whole | {"more": 1}), "{", "[]", json.dumps(whole).replace(str(whole["slope"]), "NaN")):
        path.write_text(text)
        with pytest.raises(ValueError, match=f"^{path} is not .*$"):
            load_head(path)


# Trained beside an adapter


def labelled(n, seed):
    """n rows (id, text, label) whose last word mostly tells the label."""
    draw = random.Random(seed)
    rows = []
    for i in range(n):
        end, label = [("bad", "negative"), ("good", "positive")][i % 2]
        label = {"negative": "positive", "positive": "negative"}[label] if draw.random() < 0.2 else label
        rows.append((f"{seed}-{i}", f"{' '.join(draw.choices(WORDS, k=draw.randint(3, 12)))} {end}", label))
    return rows


TRAINING, VALIDATION, TABLE = labelled(20, 0), labelled(60, 1), labelled(17, 2)


@pytest.fixture(scope="module")
def train(tiny_folder, tmp_path_factory):
    """Run fine_tune_model.py with a head in this process; -> its exit code. It keeps the first adapter of two."""
    folder = tmp_path_factory.mktemp("tables")
    tables = {"train": write_csv(folder / "t.csv", TRAINING), "validation": write_csv(folder / "v.csv", VALIDATION)}

    def run_main(output, *flags, head=True):
        rows = [part for name, path in tables.items() for part in (f"--{name}", path)]
        arguments = ["--model", tiny_folder, *rows, "--output-dir", output, "--device", "cpu", "--batch-size", 10]
        arguments += ["--epochs", 1, "--validate-every", 1, "--learning-rate", 0.02, *flags]
        arguments += ["--confidence-head"] * head
        worse, real = itertools.count(), training.validation_measures
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(training, "validation_measures", lambda *given: real(*given) | {"log_loss": next(worse)})
            return exit_code_of(fine_tune_model.main, *arguments)

    return run_main


@pytest.fixture(scope="module")
def tuned(train, tmp_path_factory):
    """(folder of an adapter with a head, what fit_head was given)."""
    folder, given = tmp_path_factory.mktemp("runs") / "tuned", []

    def spy(*arguments):
        given.append(arguments)
        return fit_head(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(confidence_head, "fit_head", spy)
        assert train(folder, "--validation-limit", 15) == 0
    assert len(given) == 1
    return folder, given[0]


@pytest.fixture(scope="module")
def hidden_states(tiny_folder, tuned, tokenizer):
    """(last hidden state, confidence) of a text by transformers and peft alone."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    network = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_folder), tuned[0])
    ids = [tokenizer(word).input_ids[0] for word in (" negative", " positive")]
    answers = [[], []]
    for i, word in enumerate(tokenizer.batch_decode([[i] for i in range(len(tokenizer))])):
        for label, answer in enumerate(("negative", "positive")):
            if word.strip().lower() == answer:
                answers[label].append(i)
    assert all(i in answer for i, answer in zip(ids, answers, strict=True))

    def compute(text):
        prompt = tokenizer(SENTIMENT.prompt(text)).input_ids
        with torch.no_grad():
            output = network(torch.tensor([prompt]), output_hidden_states=True)
        p = output.logits[0, -1].double().softmax(-1)
        sums = [float(p[answer].sum()) for answer in answers]
        return output.hidden_states[-1][0, -1].tolist(), max(sums) / sum(sums)

    return compute


def slow_head(file, hidden, confidence):
    """The head's formula as it is written, from the file's own numbers."""
    head = json.loads(file.read_text())
    extra = sum(
        w * (h - m) / s for w, h, m, s in zip(head["weights"], hidden, head["mean"], head["scale"], strict=True)
    )
    z = head["slope"] * math.log(confidence / (1 - confidence)) + head["intercept"] + extra
    return 1 / (1 + math.exp(-z))


@pytest.fixture(scope="module")
def scorer(tiny_folder, tuned):
    return label_scorer(load_llama(str(tiny_folder), str(tuned[0]), "cpu"), SENTIMENT, use_head=True)


@pytest.fixture
def call(tiny_folder, tuned, outcome):
    """Run Method 1 with the adapter and its head in this process: -> exit code, stdout, stderr."""
    model = ["--model", tiny_folder, "--adapter", tuned[0], "--device", "cpu"]
    return lambda *flags, head=True: outcome(logprobs_confidence.main, *model, *["--confidence-head"] * head, *flags)


def test_a_head_is_fitted_to_the_kept_adapter_s_answers_on_all_validation_rows_and_no_other(
    tuned, tiny_folder, hidden_states
):
    folder, (hidden, confidence, correct, groups, fingerprint) = tuned
    assert len(hidden) == len(confidence) == len(correct) == len(groups) == len(VALIDATION)
    config = json.loads((folder / "training_config.json").read_text())
    assert config["validation"]["rows"] == 15 and fingerprint == config["fingerprint"]
    assert (config["best"]["step"], config["steps"]) == (1, 2)
    for row in (0, 1, 7, 31, 59):
        states, truth = hidden_states(VALIDATION[row][1])
        assert hidden[row] == pytest.approx(states, abs=1e-4) and confidence[row] == pytest.approx(truth, abs=1e-5)
    llama = load_llama(str(tiny_folder), str(folder), "cpu")
    examples = [Example(*row) for row in VALIDATION]
    rows = label_scorer(llama, SENTIMENT).score_together(examples)
    assert [row.prediction == row.label for row in rows] == correct.tolist() and 0 < correct.mean() < 1
    head = load_head(folder / HEAD)
    assert head.record["n"] == 60 and head.fingerprint == fingerprint
    assert head.digest == fit_head(hidden, confidence, correct, groups, fingerprint).digest


def test_rows_that_cannot_teach_a_head_leave_a_training_that_is_finished_without(train, tmp_path, capsys):
    def no_head(*arguments):
        raise ValueError("all rows are right")

    folder = tmp_path / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(confidence_head, "fit_head", no_head)
        assert train(folder) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: --confidence-head: all ") and "--resume without it" in err
    assert not (folder / "training_config.json").exists()
    assert train(folder, "--resume", head=False) == 0
    assert (folder / "training_config.json").exists() and not (folder / HEAD).exists()


# Used by Method 1


TEXTS = ["never quite warm good", "  a dull film bad\n", "1999 caf\u00e9 \U0001f600"]


def test_a_text_and_its_json_get_the_head_s_own_word_and_without_the_flag_nothing(call, tuned, scorer, hidden_states):
    rows = [json.loads(line) for line in call("--json", *TEXTS)[1].splitlines()]
    for text, row in zip(TEXTS, rows, strict=True):
        hidden, confidence = hidden_states(text)
        assert row["confidence"] == pytest.approx(confidence, abs=1e-5)
        assert row["head_confidence"] == pytest.approx(slow_head(tuned[0] / HEAD, hidden, confidence), abs=1e-5)
        assert row["fingerprint"] == scorer.fingerprint
    assert len({row["head_confidence"] for row in rows}) == 3
    assert f"Confidence head: {100 * rows[0]['head_confidence']:.2f} %" in call(TEXTS[0])[1]
    plain = json.loads(call("--json", TEXTS[0], head=False)[1])
    assert "head_confidence" not in plain and plain["fingerprint"] != scorer.fingerprint
    assert "Confidence head" not in call(TEXTS[0], head=False)[1]


def test_a_table_gets_a_column_whatever_the_batches(call, tuned, scorer, hidden_states, tmp_path):
    table = write_csv(tmp_path / "t.csv", [*TABLE, ("empty", " ", "positive")])
    truth = [slow_head(tuned[0] / HEAD, *hidden_states(text)) for _, text, _ in TABLE]
    for size in (1, 5, 100):
        output = tmp_path / f"{size}.jsonl"
        assert call("--input", table, "--output", output, "--batch-size", size)[0] == 0
        *rows, broken = predictions.read(output)
        assert [row.extras["head_confidence"] for row in rows] == pytest.approx(truth, abs=1e-5)
        assert {row.fingerprint for row in (*rows, broken)} == {scorer.fingerprint}
        assert broken.error and "head_confidence" not in broken.extras
    code, _, err = call("--input", table, "--output", output, head=False)
    assert code == 2 and "--overwrite" in err


def test_whole_answers_have_a_head_too(tokenizer, tmp_path):
    task = replace(SENTIMENT, scoring="sequence")
    llama = replace(tiny("llama", tokenizer), adapter=tmp_path)
    fingerprint = label_scorer(llama, task).fingerprint
    head = ConfidenceHead(0.5, 0.1, np.linspace(-1, 1, 32), np.zeros(32), np.ones(32), fingerprint, {})
    save_head(tmp_path / HEAD, head)
    scorer = label_scorer(llama, task, batch_size=3, use_head=True)
    for row in scorer.score_together([Example(*row) for row in TABLE[:4]]):
        assert row.extras["head_confidence"] == pytest.approx(scorer.explain(row.text)["head_confidence"], abs=1e-5)


def test_the_fingerprint_follows_the_head(tiny_folder, tuned, scorer, tmp_path):
    folder = shutil.copytree(tuned[0], tmp_path / "copy")
    save_head(folder / HEAD, replace(load_head(folder / HEAD), slope=3.0))
    llama = load_llama(str(tiny_folder), str(folder), "cpu")
    changed = label_scorer(llama, SENTIMENT, use_head=True)
    assert changed.llama.identity == scorer.llama.identity and changed.fingerprint != scorer.fingerprint
    cut = label_scorer(scorer.llama, SENTIMENT, truncate=True, use_head=True)
    assert cut.fingerprint not in (scorer.fingerprint, changed.fingerprint)


@pytest.mark.parametrize("flags", ["--raw-prompt x", "x --endpoint URL", "--input t.csv --output p --debias batch"])
def test_a_head_does_not_go_with_what_shows_no_hidden_state_or_changes_the_answer(outcome, flags):
    assert_one_error(outcome(logprobs_confidence.main, *flags.split(), "--confidence-head"), "--confidence-head")


def test_no_head_another_s_head_and_a_broken_one_are_one_line(call, tuned, train, tmp_path, capsys):
    assert_one_error(call("x", "--adapter", "none"), "no adapter is in use", "fine_tune_model.py --confidence-head")
    folder = shutil.copytree(tuned[0], tmp_path / "adapter")
    (folder / HEAD).unlink()
    assert_one_error(call("x", "--adapter", folder), f"the adapter in {folder} has no {HEAD}", "fine_tune_model.py")
    assert train(tmp_path / "other", "--seed", 1) == 0
    printed, record = capsys.readouterr().out, load_head(tmp_path / "other" / HEAD).record
    assert f"confidence head fitted on 60 validation rows, {record['right']:.1%} right" in printed
    assert f"{record['out_of_fold_log_loss']:.4f}" in printed and f"{record['platt_log_loss']:.4f}" in printed
    shutil.copy(tmp_path / "other" / HEAD, folder)
    another = "another model, adapter, precision or task"
    assert_one_error(call("x", "--adapter", folder), str(folder / HEAD), another)
    shutil.copy(tuned[0] / HEAD, folder)
    assert_one_error(call("x", "--adapter", folder, "--task", "sentiment-yes-no"), another)
    (folder / HEAD).write_text("{")
    assert_one_error(call("x", "--adapter", folder), f"{folder / HEAD} is not JSON")
    head = load_head(tuned[0] / HEAD)
    narrow = {name: getattr(head, name)[:5] for name in ("weights", "mean", "scale")}
    save_head(folder / HEAD, replace(head, **narrow))
    code, out, err = call("x", "--adapter", folder)
    assert (code, out) == (2, "") and len(err.splitlines()) == 1
