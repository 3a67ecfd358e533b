"""consistency_confidence.py: answers sampled from a model, and the command that a user types; test_voting.py has votes.

Truth comes from counting by hand, from scipy, and from one plain forward pass. A tiny random model that knows eight
tokens answers here: its answers name a label, none, or several. test_llama.py compares the sampling itself with its
distribution.
"""

import json
import math
import random
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import assert_one_error, records, stamp, texts, write_csv
from scipy.stats import binomtest, chisquare

import consistency_confidence
from calibration import FittedCalibrator, PlattScalingCalibrator, Recipe, save_calibrator
from consistency_confidence import answer_sampler, get_consistency_confidence, main
from llama import Llama
from logprobs_confidence import label_scorer
from tables import Example, text_key
from task import TASKS
from voting import Sampling, answer_seed, count_votes, jeffreys_interval, next_numbers, parse_answer

SENTIMENT, YES_NO = TASKS["sentiment"], TASKS["sentiment-yes-no"]
SPOKEN = {" positive": 2.9, " negative": 2.0, " Positive": 0.5, " not": 0.0, " very": -0.5, ".": 0.0, "\n": 3.5}


@pytest.fixture(scope="module")
def talker(tokenizer):
    """A tiny random model whose head is biased to the tokens of SPOKEN and to the end of the text, 2."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    special = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2, "max_position_embeddings": 512}
    config = AutoConfig.for_model("phi", vocab_size=len(tokenizer), **sizes, **special)
    torch.manual_seed(2)
    model = AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.normal_(0, 0.3)
    model.lm_head.weight *= 1.5
    model.lm_head.bias.fill_(-20.0)
    model.lm_head.bias[2] = 2.5
    for word, bias in SPOKEN.items():
        (token,) = tokenizer(word).input_ids
        model.lm_head.bias[token] = bias
    return Llama(model, tokenizer, "talker", Path("nowhere"), {"weights": "talker", "precision": "float32"})


@pytest.fixture
def call(outcome, talker, tmp_path, monkeypatch):
    """Run the script in this process, in an empty folder, on the talking model: -> exit code, stdout, stderr."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(consistency_confidence, "load_llama", lambda **_: talker)

    return lambda command, *more: outcome(main, *command.split(), *more)


@pytest.fixture
def no_model(monkeypatch):
    """From here on it is a fault to load a model."""
    return lambda: monkeypatch.setattr(consistency_confidence, "load_llama", lambda **_: pytest.fail("a model"))


def says(monkeypatch, talker, answers):
    """Have the model say these in turn, to whatever it is asked."""
    monkeypatch.setattr(talker, "sample", lambda rows, seeds, *_: [answers[: len(of_row)] for of_row in seeds])


def examples(n, seed=0):
    return [Example(*row) for row in texts(n, seed)]


EMPTY = Example("empty", " ", None)


def sampled(talker, rows, task=SENTIMENT, batch_size=None, truncate=False, **how):
    return answer_sampler(talker, task, Sampling(**how), truncate, batch_size).score_together(rows)


def fingerprint(llama, task=SENTIMENT, truncate=False, **how):
    return answer_sampler(llama, task, Sampling(**how), truncate).fingerprint


# Asking a model


@pytest.mark.parametrize("paraphrases", [(), ("{text}\nOverall, this is", "Someone wrote: {text}\nIt was")])
def test_answer_n_is_the_model_s_to_wording_n_modulo_their_number(paraphrases, talker):
    task, rows = replace(SENTIMENT, paraphrases=paraphrases), examples(6)
    templates = [task.template, *paraphrases]
    how = {"samples": 6, "temperature": 0.8, "max_tokens": 4, "seed": 3, "paraphrase": bool(paraphrases)}
    for row, asked in zip(sampled(talker, rows, task, **how), rows, strict=True):
        for number, answer in enumerate(row.extras["answers"]):
            wording = replace(SENTIMENT, template=templates[number % len(templates)], paraphrases=())
            ids = talker.encode(talker.task_prompt(wording), asked.text)
            assert talker.sample([ids], [[answer_seed(3, asked.id, asked.text, number)]], 0.8, 4, "\n") == [[answer]]
        assert (row.extras["votes"], row.extras["unparsed"]) == count_votes(row.extras["answers"], SENTIMENT)
        assert (row.id, row.text, row.label) == (asked.id, asked.text, asked.label)
        assert (row.method, row.model, row.task) == ("consistency", "talker", "sentiment")
        assert row.extras["calls"] == 6 and row.extras["sampling"] == {"temperature": 0.8}
    said = [answer for row in sampled(talker, rows) for answer in row.extras["answers"]]
    assert {parse_answer(answer, SENTIMENT) for answer in said} == {"negative", "positive", None}
    assert len(set(said)) > 8 and not any("\n" in answer for answer in said)
    chats = sampled(talker, rows, replace(SENTIMENT, format="chat"))  # which are not cut at a line
    assert any("\n" in answer for row in chats for answer in row.extras["answers"])


def test_no_other_row_no_order_and_no_batch_size_changes_an_answer(talker):
    rows = [*examples(9), EMPTY]
    whole = {row.id: row for row in sampled(talker, rows, samples=5)}
    shuffled = random.Random(1).sample(rows, len(rows))
    for batch_size in (None, 1, 4):
        assert sampled(talker, shuffled, batch_size=batch_size, samples=5) == [whole[row.id] for row in shuffled]
    for row in (rows[0], rows[4]):
        assert sampled(talker, [row], samples=5) == [whole[row.id]]
    assert [row.id for row in whole.values() if row.error == "the text is empty"] == ["empty"]
    # Another id is another row, or copies of a text would all be given the same answers.
    copies = sampled(talker, [replace(rows[0], id=str(i)) for i in range(5)], samples=5)
    assert len({tuple(row.extras["answers"]) for row in copies}) == 5


@pytest.mark.parametrize("paraphrase", [False, True])
def test_adaptive_answers_are_the_first_of_the_fixed_ones_and_no_more_than_needed(paraphrase, talker):
    rows, calls = examples(24), Counter()
    fixed = sampled(talker, rows, paraphrase=paraphrase)
    adaptive = sampled(talker, rows, paraphrase=paraphrase, adaptive=True)
    for whole, part in zip(fixed, adaptive, strict=True):
        answers = part.extras["answers"]
        calls[len(answers)] += 1
        assert whole.extras["answers"][: len(answers)] == answers and len(answers) == part.extras["calls"]
        assert not next_numbers(answers, SENTIMENT, 10, adaptive=True)
        for n in range(4, len(answers)):  # and it could not have stopped before
            assert next_numbers(answers[:n], SENTIMENT, 10, adaptive=True) == range(n, n + 1)
        assert part.extras["agreement_low"] is part.extras["agreement_high"] is None
    assert max(calls) == 10 and min(calls) <= 6 and len(calls) > 3


@pytest.mark.parametrize(("first_token", "room", "calls"), [(False, 10, 3), (True, 0, 1)])
def test_a_text_too_long_is_an_error_and_truncate_shortens_it_and_says_so(first_token, room, calls, talker):
    long, short = Example("long", "a very long text indeed " * 200, None), Example("short", "fine", None)
    how = {"samples": 3, "first_token": first_token}
    failed, fine = sampled(talker, [long, short], **how)
    assert f"the model reads {512 - room}; --truncate shortens" in failed.error
    assert failed.confidence is None and "votes" not in failed.extras and "truncated" not in fine.extras
    cut, same = sampled(talker, [long, short], truncate=True, **how)
    assert cut.extras["truncated"] is True and cut.text == long.text and cut.extras["calls"] == calls
    assert same.extras["votes"] == fine.extras["votes"] and same.fingerprint != fine.fingerprint


# Several wordings


@pytest.mark.parametrize("task", [SENTIMENT, YES_NO])
def test_a_built_in_task_has_five_wordings_that_change_no_fingerprint_unless_they_are_asked(task, talker):
    wordings = task.wordings()
    assert len({wording.template for wording in wordings}) == 5 and wordings[0].template == task.template
    bare, fewer = replace(task, paraphrases=()), replace(task, paraphrases=task.paraphrases[:2])
    assert all(replace(wording, template=task.template) == bare for wording in wordings)
    assert "paraphrases" not in task.settings() and task.settings() == bare.settings()
    assert fingerprint(talker, task) == fingerprint(talker, bare)
    asked = {fingerprint(talker, of_task, paraphrase=True) for of_task in (task, fewer)}
    assert len(asked | {fingerprint(talker, task)}) == 3


def test_every_setting_that_changes_answers_changes_the_fingerprint(talker):
    changes = [{}, {"samples": 11}, {"temperature": 0.9}, {"adaptive": True}, {"paraphrase": True}, {"max_tokens": 9}]
    changes += [{"first_token": True}, {"seed": 1}, {"truncate": True}, {"task": replace(SENTIMENT, examples=())}]
    prints = [fingerprint(talker, **change) for change in changes]
    prints.append(fingerprint(replace(talker, identity={"weights": "others"})))
    prints.append(label_scorer(talker, SENTIMENT).fingerprint)
    assert len(set(prints)) == len(prints) == 12
    assert prints[0] == fingerprint(talker)


TASK = 'name = "t"\ntemplate = "Text: {text}\\nMood:"\nparaphrases = PARAPHRASES\n'
TASK += '[labels]\nnegative = ["negative"]\npositive = ["positive"]\n'
BAD_PARAPHRASES = {
    "[]": "task 't' has one wording only",
    '["no slot"]': "a template must hold {text} exactly once",
    '["Text: {text}\\nMood:"]': "two of its templates are the same",
    '"{text} is"': "paraphrases",
}


def test_paraphrases_of_a_task_file_are_asked_in_turn_and_bad_ones_one_clear_line(call):
    Path("t.toml").write_text(TASK.replace("PARAPHRASES", '["{text}\\nIn short:"]'), encoding="utf-8")
    row = json.loads(call("--task t.toml --paraphrase --json --samples 4", "good")[1])
    assert row["prompts"] == ["Text: good\nMood:", "good\nIn short:"]
    assert [answer["wording"] for answer in row["answers"]] == [0, 1, 0, 1]
    for value, problem in BAD_PARAPHRASES.items():
        Path("t.toml").write_text(TASK.replace("PARAPHRASES", value), encoding="utf-8")
        assert_one_error(call("--task t.toml --paraphrase", "good"), problem)


# Draws from the first token's distribution


def shares_of(talker, task, text):
    """P of each label's answer tokens by one plain pass."""
    log_probs = talker.next_token_log_probs(talker.encode(talker.task_prompt(task), text))
    words = [talker.tokenizer.decode([i]).strip().casefold() for i in range(len(log_probs))]
    named = {label: [i for i, word in enumerate(words) if word in task.labels[label]] for label in task.labels}
    return {label: float(np.exp(log_probs[ids]).sum()) for label, ids in named.items()}


@pytest.mark.parametrize("paraphrases", [(), ("{text}\nOverall, this is",)])
def test_draws_are_as_frequent_as_the_labels_are_probable_in_the_wordings(paraphrases, talker):
    task, rows, n = replace(SENTIMENT, paraphrases=paraphrases), examples(3), 4000
    found = sampled(talker, rows, task, samples=n, first_token=True, paraphrase=bool(paraphrases))
    for row, asked in zip(found, rows, strict=True):
        each = [shares_of(talker, wording, asked.text) for wording in task.wordings()]
        truth = {label: sum(shares[label] for shares in each) / len(each) for label in task.labels}
        assert row.extras["first_token"] == pytest.approx(truth, abs=1e-6)
        counts = [*row.extras["votes"].values(), row.extras["unparsed"]]
        expected = n * np.array([*truth.values(), 1 - sum(truth.values())])
        assert sum(counts) == n and expected.min() > 20
        assert chisquare(counts, expected).pvalue > 1e-3
        assert chisquare(counts, np.roll(expected, 1)).pvalue < 1e-6
        assert row.extras["calls"] == len(each) and "answers" not in row.extras


def test_a_table_of_first_token_draws_prints_how_they_converge_and_draws_it(call):
    write_csv("t.csv", [*examples(15), EMPTY])
    command = "--first-token --samples 100,10,1000 --input t.csv --output draws.jsonl"
    code, out, err = call(f"{command} --figure shown.png")
    assert code == 0 and "asked about 16 rows" in err and "n = 15 rows" in out
    assert Path("shown.png").read_bytes().startswith(b"\x89PNG") and out.splitlines()[-1] == "shown.png"
    table = [line.split() for line in out.splitlines() if re.match(r"    (10|100|1,000) ", line)]
    assert [cells[0] for cells in table] == ["10", "100", "1,000"]
    # The ten are the first ten of the thousand, so a run of ten alone votes like the first ten.
    assert call("--first-token --samples 10 --input t.csv --output ten.jsonl")[0] == 0
    for path, n, cells in (("ten.jsonl", 10, table[0]), ("draws.jsonl", 1000, table[2])):
        *rows, empty = records(path)
        assert "error" in empty and all(sum(row["votes"].values()) + row["unparsed"] == n for row in rows)
        most = [max(row["first_token"], key=row["first_token"].get) for row in rows]
        p = np.array([row["first_token"][label] for row, label in zip(rows, most, strict=True)])
        share = np.array([row["votes"][label] / n for row, label in zip(rows, most, strict=True)])
        assert float(cells[1]) == pytest.approx(np.sqrt(((share - p) ** 2).mean()), abs=5e-5)
        assert float(cells[2]) == pytest.approx(np.sqrt((p * (1 - p)).mean() / n), abs=5e-5)
    # Repeating the command draws nothing anew and says the same.
    before = stamp("draws.jsonl")
    assert call(command)[:2] == (0, out.removesuffix("shown.png\n")) and stamp("draws.jsonl") == before


# The function, and a text explained


def test_the_function_gives_the_label_its_vote_share_and_the_counts(talker, monkeypatch):
    label, share, counts = get_consistency_confidence("warm and funny", 20, llama=talker, seed=5)
    (row,) = sampled(talker, [Example("", "warm and funny", None)], samples=20, seed=5)
    assert list(counts) == ["negative", "positive", "unparsed"] and sum(counts.values()) == 20
    assert counts == row.extras["votes"] | {"unparsed": row.extras["unparsed"]} and counts["unparsed"] > 0
    assert share == counts[label] / 20 == row.extras["agreement"] and label == row.prediction
    monkeypatch.setattr(consistency_confidence, "default_llama", {json.dumps(SENTIMENT.settings()): talker}.get)
    assert get_consistency_confidence("warm and funny", 20, seed=5) == (label, share, counts)
    cold = get_consistency_confidence("warm and funny", 20, 1e-3, talker, SENTIMENT)
    assert sorted(cold[2].values()) == [0, 0, 20] and cold[1] == 1.0
    with pytest.raises(ValueError, match="empty"):
        get_consistency_confidence(" \n", llama=talker)
    with pytest.raises(ValueError, match="none of 2 answers names a label"):
        get_consistency_confidence("warm", 2, llama=talker, task=YES_NO)


KEYS = ["text", "prompts", "model", "model_path", "answers", "votes", "unparsed", "calls", "agreement", "agreement_low"]
KEYS += ["agreement_high", "vote_entropy", "sampling", "probabilities", "label_mass", "total_probability", "prediction"]
KEYS += ["confidence", "fingerprint"]


def test_the_json_explanation_holds_every_answer_and_what_they_make(call, talker):
    given_texts = ["warm and funny", "two\nlines, caf\u00e9 \x1b"]
    code, out, err = call("--json --samples 12", *given_texts)
    assert (code, err) == (0, "")
    objects = [json.loads(line) for line in out.splitlines()]
    assert [row["text"] for row in objects] == given_texts
    for row in objects:
        assert list(row) == KEYS and row["model"] == "talker" and row["model_path"] == "nowhere"
        assert row["prompts"] == [SENTIMENT.prompt(row["text"])] and row["sampling"] == {"temperature": 1.0}
        assert [list(answer) for answer in row["answers"]] == [["answer", "label", "wording"]] * 12
        labels = [answer["label"] for answer in row["answers"]]
        assert labels == [parse_answer(answer["answer"], SENTIMENT) for answer in row["answers"]]
        assert row["votes"] == {label: labels.count(label) for label in SENTIMENT.labels}
        assert row["unparsed"] == labels.count(None) and row["calls"] == 12
        assert row["agreement"] == max(row["votes"].values()) / 12 == pytest.approx(row["total_probability"])
        assert row["confidence"] == row["probabilities"][row["prediction"]]
        assert row["fingerprint"] == fingerprint(talker, samples=12)


def test_the_printed_explanation_shows_the_answers_the_votes_and_the_verdict(call, talker):
    code, out, _ = call("--samples 12", "warm and funny")
    row = answer_sampler(talker, SENTIMENT, Sampling(12)).explain("warm and funny")
    lines = out.splitlines()
    assert code == 0 and lines[0] == "Text: warm and funny"
    for label, count in [*row["votes"].items(), ("unparsed", row["unparsed"])]:
        (line,) = [line for line in lines if line.split()[1:2] == [label] and line.split()[0].isdigit()]
        said = [a["answer"].strip() for a in row["answers"] if (a["label"] or "unparsed") == label]
        assert int(line.split()[0]) == count == len(said)
        for answer, times in Counter(said).most_common(4):
            assert f'"{answer}"' + (f" {times}" if times > 1 else "") in line
    first, share = row["votes"][row["prediction"]], 100 * row["agreement"]
    low, high = (100 * bound for bound in jeffreys_interval(first, 12))
    verdict = f"  Verdict: {row['prediction']}, vote share {share:.1f} % ({first} of 12; 95 % Jeffreys interval "
    assert f"{verdict}{low:.1f} to {high:.1f} %)" in lines
    last = f"  confidence {100 * row['confidence']:.1f} % among the answers that name a label, "
    last += f"label mass {100 * row['label_mass']:.1f} %, vote entropy {row['vote_entropy']:.2f} nats, 12 calls"
    assert last in lines
    code, out, _ = call("--samples 12 --adaptive", "warm and funny")
    assert code == 0 and "Jeffreys" not in out and "Verdict: " in out


def test_the_explanation_of_draws_shows_the_probability_beside_them(call, talker):
    p = shares_of(talker, SENTIMENT, "warm and funny")
    row = json.loads(call("--first-token --samples 10,1000 --json", "warm and funny")[1])
    most, by_draws = max(p, key=p.get), row["agreement_by_draws"]
    assert by_draws["1000"] == row["votes"][most] / 1000 and abs(by_draws["1000"] - p[most]) < 4 * 0.5 / 1000**0.5
    out = call("--first-token --samples 10,1000", "warm and funny")[1]
    line = f"  {most} in {100 * by_draws['10']:.1f} % of 10, {100 * by_draws['1000']:.1f} % of 1,000 draws; "
    assert f"{line}its probability is {100 * p[most]:.2f} %" in out.splitlines()


# A table of texts


@pytest.mark.parametrize("flags", ["--adaptive --paraphrase", "--first-token --samples 50"])
def test_a_run_that_stopped_at_any_byte_ends_with_the_bytes_of_an_unbroken_one(flags, call, monkeypatch):
    monkeypatch.setattr(consistency_confidence, "ROWS_PER_WINDOW", {"cpu": 4})
    write_csv("t.csv", [*examples(9), EMPTY])
    command = f"--input t.csv --output p.jsonl {flags}"
    assert call(command)[0] == 0
    whole = Path("p.jsonl").read_bytes()
    assert whole.count(b"\n") == 10
    for end in [0, *random.Random(0).sample(range(len(whole)), 2), len(whole) - 1]:
        Path("p.jsonl").write_bytes(whole[:end])
        assert call(command)[0] == 0 and Path("p.jsonl").read_bytes() == whole, end
    before = stamp("p.jsonl")
    code, _, err = call(command)
    assert (code, err) == (0, "") and stamp("p.jsonl") == before


def test_the_report_counts_every_answer_that_was_asked_for(call, talker, monkeypatch):
    answers = [["positive"] * 4, ["positive", "negative", "mixed", "positive"], ["mixed"] * 4, ["negative"] * 4]
    monkeypatch.setattr(talker, "sample", lambda rows, seeds, *_: answers)
    labels = ["positive", "negative", "negative", "negative"]
    write_csv("t.csv", [*(Example(str(i), "x", label) for i, label in enumerate(labels)), EMPTY])
    code, out, _ = call("--input t.csv --output p.jsonl --samples 4")
    assert code == 0 and "p.jsonl: 3 of 5 rows scored, 2 with an error" in out
    # Those without a single vote cost as much as the others: 16 answers to 4 texts, of which 5 name no label.
    assert "unanimous in 50.0% of the rows; 31.2% of 16 answers unparsed; 16 calls, 4.0 a row" in out
    assert "mean vote share 0.625" in out  # 1, 1/2, 0 and 1
    low, high = binomtest(2, 3).proportion_ci(0.95, "exact")
    assert f"accuracy 0.667, 95 % exact interval {low:.3f} to {high:.3f}, n = 3 labelled rows" in out


def test_a_model_that_does_not_sample_is_noticed(call, talker, monkeypatch):
    write_csv("t.csv", examples(20))
    warned = "warning: no row has two different answers; does this model really sample?"
    assert warned not in call("--input t.csv --output p.jsonl --samples 4")[1]
    says(monkeypatch, talker, ["positive"] * 4)
    assert warned in call("--input t.csv --output q.jsonl --samples 4")[1]
    assert warned not in call("--input t.csv --output r.jsonl --samples 4 --limit 19")[1]


# Counting again


@pytest.fixture
def fixed(call):
    """A finished run of ten answers to each of 25 texts, and of one that is empty."""
    write_csv("t.csv", [*examples(25), EMPTY])
    assert call("--input t.csv --output fixed.jsonl")[0] == 0
    return records("fixed.jsonl")


@pytest.mark.parametrize("flags", ["--samples 5", "--samples 5 --adaptive"])
def test_a_recount_is_what_asking_so_would_have_been(flags, call, fixed, no_model):
    assert call(f"--input t.csv --output asked.jsonl {flags}")[0] == 0
    no_model()
    command = f"--recount fixed.jsonl --output recounted.jsonl {flags}"
    code, out, err = call(command)
    assert (code, err) == (0, "")
    asked, counted = records("asked.jsonl"), records("recounted.jsonl")
    print_of = counted[0]["fingerprint"]
    assert [row | {"fingerprint": print_of} for row in asked] == counted
    used = sum(row.get("calls", 0) for row in counted)
    changed = sum(a["prediction"] != b["prediction"] for a, b in zip(fixed, counted, strict=True))
    said = f"{used} of 250 answers used ({1 - used / 250:.1%} saved); {changed} of 26 predictions changed"
    assert f"recounted from fixed.jsonl: {said}" in out and used < 250
    assert len({rows[0]["fingerprint"] for rows in (fixed, asked, counted)}) == 3
    before = stamp("recounted.jsonl")
    assert call(command) == (0, out, "") and stamp("recounted.jsonl") == before
    assert_one_error(call("--recount fixed.jsonl --samples 4 --output recounted.jsonl"), "--overwrite")
    # A recount can be recounted, and answers of an adaptive run stay without an interval.
    assert call("--recount recounted.jsonl --output again.jsonl")[0] == 0
    again = records("again.jsonl")
    assert [row.get("votes") for row in again] == [row.get("votes") for row in counted]
    assert all((row.get("agreement_low") is None) == ("--adaptive" in flags) for row in again[:-1])


EDITED = {
    "none.jsonl": {"answers": []},
    "other.jsonl": {"fingerprint": "ffffffff"},
    "fewer.jsonl": {"answers": ["positive"] * 4},
}
NOT_RECOUNTED = {
    "drawn.jsonl": "drawn.jsonl stores no answers; only those of consistency_confidence.py can be recounted",
    "fixed.jsonl --samples 11": "row 'r0' has 10 answers; more than these only a model can give",
    "fewer.jsonl --samples 5": "row 'r1' has 4 answers",
    "none.jsonl": "row 'r1' stores no answers",
    "other.jsonl": "row 'r1' is of another run than the first",
    "t.csv": "t.csv line 1 is not a prediction",
    "fixed.jsonl --task sentiment-yes-no": "fixed.jsonl answers task 'sentiment', not 'sentiment-yes-no'",
    "fixed.jsonl --input t.csv": "--recount counts stored answers without a model; --input",
    "fixed.jsonl --temperature 0.5": "--temperature has no part in it",
    "fixed.jsonl x": "a text has no part in it",
    "fixed.jsonl --output fixed.jsonl": "both input and output",
}


def test_a_recount_that_cannot_be_done_is_one_line_and_writes_nothing(call, fixed, no_model):
    assert call("--first-token --input t.csv --output drawn.jsonl --samples 20")[0] == 0
    no_model()
    lines = [json.dumps(row) for row in fixed]
    for name, change in EDITED.items():
        edited = [lines[0], json.dumps(fixed[1] | change), *lines[2:]]
        Path(name).write_text("\n".join(edited) + "\n", encoding="utf-8")
    before = sorted(Path().iterdir())
    for command, named in NOT_RECOUNTED.items():
        assert_one_error(call(f"--output new.jsonl --recount {command}"), named)
        assert sorted(Path().iterdir()) == before, command
    assert_one_error(call("--recount fixed.jsonl"), "--output")
    assert records("fixed.jsonl") == fixed


# With a calibrator


def save(path, fingerprint):
    """A calibrator file with logit P = logit(c) / 2 - 1/2, and 0.6 as its threshold."""
    platt = PlattScalingCalibrator()
    platt.slope_, platt.intercept_ = 0.5, -0.5
    known = (Recipe("platt", False), platt, tuple(SENTIMENT.labels), fingerprint, "talker", "sentiment", 100, 90)
    save_calibrator(path, FittedCalibrator(*known, frozenset({text_key("x")}), {}, {"value": 0.6}))


def test_a_calibrator_adds_its_confidence_and_decision_to_a_table_a_text_and_a_recount(call, talker):
    write_csv("t.csv", [*examples(12), EMPTY])
    save("k.json", fingerprint(talker, samples=8))
    code, out, _ = call("--input t.csv --output p.jsonl --samples 8 --calibrator k.json")
    *rows, empty = records("p.jsonl")
    shown = json.loads(call("--json --samples 8 --calibrator k.json", "warm")[1])
    for row in (*rows, shown):
        # A vote is smoothed before its logit is taken: eight of eight answers are no certainty.
        c = (max(row["votes"].values()) + 0.5) / (sum(row["votes"].values()) + 1)
        expected = 1 / (1 + math.exp(0.5 - 0.5 * math.log(c / (1 - c))))
        assert row["calibrated_confidence"] == pytest.approx(expected, abs=1e-12)
        assert row["decision"] == ("automate" if row["calibrated_confidence"] >= 0.6 else "review")
    assert code == 0 and "decision" not in empty and "calibrated: " in out and ", not scored 1, " in out
    # It is not for Method 1, for other sampling, and for recounted answers.
    save("one.json", label_scorer(talker, SENTIMENT).fingerprint)
    for command in ("--samples 8 --calibrator one.json", "--samples 9 --calibrator k.json"):
        assert_one_error(call(command, "warm"), "fit a calibrator on predictions like these")
    command = "--recount p.jsonl --samples 4 --output four.jsonl"
    assert_one_error(call(f"{command} --calibrator k.json"), "fit a calibrator on predictions like these")
    assert call(command)[0] == 0
    save("four.json", records("four.jsonl")[0]["fingerprint"])
    assert call(f"{command} --calibrator four.json")[0] == 0
    assert all("decision" in row for row in records("four.jsonl") if row["prediction"])


# Bad input, as a user types it

BAD = {
    "--samples 1 x": "the vote share of one is no confidence; ask at least twice",
    "--samples x x": "--samples x: a number, or with --first-token several",
    "--samples 10,100 x": "several numbers only with --first-token",
    "--temperature 0 x": "the temperature is 0; at 0 all answers are the same",
    "--temperature nan x": "the temperature is nan;",
    "--max-tokens 0 x": "an answer of 0 tokens names no label",
    "--seed -1 x": "--seed",
    "--choice x": "--choice is for servers that force answers (--endpoint)",
    "--first-token --endpoint http://127.0.0.1:9/v1 x": "from a model loaded here",
    "--first-token --adaptive x": "draws a fixed number at temperature 1",
    "--figure p.png --first-token x": "--figure NAME.png shows --first-token on a table",
    "--figure p.png --first-token --paraphrase --input t.csv --output p.jsonl": "asked in one wording",
    "--endpoint anthropic --batch-size 2 x": "--batch-size is for models loaded here",
}


def test_a_bad_command_is_one_line_and_exit_code_2_before_any_model_is_loaded(call, no_model):
    write_csv("t.csv", examples(2))
    no_model()
    for command, named in BAD.items():
        assert_one_error(call(command), named)
    assert [path.name for path in Path().iterdir()] == ["t.csv"]


# What only a trained model can show


def test_the_real_model_s_votes_are_draws_from_its_own_probability(embedded):
    rows = [Example("1", "Best worst thing ever", None), Example("2", "I want my money back, this is rubbish.", None)]
    ambiguous, clear = sampled(embedded, rows, samples=20, max_tokens=4)
    assert len(set(ambiguous.extras["answers"])) >= 2 and ambiguous.extras["agreement"] < 0.9
    assert clear.prediction == "negative" and clear.extras["agreement"] >= 0.8 and clear.extras["unparsed"] <= 3
    scored = label_scorer(embedded, SENTIMENT).score_together(rows)
    for sampled_row, row in zip((ambiguous, clear), scored, strict=True):
        votes = sampled_row.extras["votes"][row.prediction]
        assert binomtest(votes, 20, row.confidence * row.label_mass).pvalue > 1e-3


def test_neither_a_text_nor_an_answer_can_command_the_terminal(call, talker, monkeypatch):
    says(monkeypatch, talker, ["\x1b[2J positive", "positive\x07 and positive\u202e"])
    code, out, _ = call("--samples 2", "\x1b[2J red \x07")
    assert code == 0 and "Text: \\x1b[2J red \\x07" in out and '"\\x1b[2J positive"' in out
    assert "\x1b" not in out and "\x07" not in out and "\u202e" not in out
