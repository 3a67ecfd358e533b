"""logprobs_confidence.py, in this process and as the command that a user types.

Truth comes from the raw logits of transformers, from scipy, from counting pairs, and from unbroken runs for broken
ones. Tiny random models serve where the numbers do not matter; what only a trained model can show uses the real one.
"""

import csv
import json
import random
import shlex
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from string import ascii_letters

import numpy as np
import pandas
import pytest
from conftest import assert_one_error, records, texts, write_csv
from scipy.stats import binomtest

import llama
import logprobs_confidence
import predictions
from llama import AnsweredBatch
from logprobs_confidence import Classifier, get_confidence, label_scorer, main
from prompts import SLOT
from task import TASKS, Example, Task, read_task

ROOT = Path(__file__).parent.parent
SST2 = ROOT.parent / "shared" / "data" / "sst2_dev.tsv"
SENTIMENT = TASKS["sentiment"]


@pytest.fixture
def call(outcome, tiny_folder, one_tokenizer):
    """Run the script in this process on the tiny model: -> exit code, stdout, stderr."""
    return lambda *arguments: outcome(main, *arguments, "--model", tiny_folder)


# What the real model says


@pytest.fixture(scope="module")
def scorer(embedded):
    return label_scorer(embedded, SENTIMENT)


def test_get_confidence_gives_a_label_and_a_number_for_the_article_s_kind_of_texts(scorer):
    love, terrible, contradiction, mild = (
        "I absolutely love this amazing movie!",
        "This film is terrible and boring",
        "Best worst thing ever",
        "Not bad",
    )
    label, confidence = get_confidence(love)  # the default task, model and adapter
    default = label_scorer(llama.default_llama(json.dumps(scorer.task.settings())), scorer.task)
    llama.default_llama.cache_clear()  # half a gigabyte
    assert "adapter" in default.llama.identity and confidence == default.explain(love)["confidence"]
    assert type(label) is str and type(confidence) is float
    assert (label, get_confidence(terrible, scorer.llama)[0]) == ("positive", "negative")
    rows = [scorer.explain(text) for text in (love, terrible, contradiction, mild)]
    assert len({row["confidence"] for row in rows}) == 4
    assert all(0.5 <= row["confidence"] <= 1 and row["label_mass"] >= 0.8 for row in rows)
    assert min(row["confidence"] for row in rows[:2]) > max(row["confidence"] for row in rows[2:])
    for text in ("", " \n"):
        with pytest.raises(ValueError, match="empty"):
            get_confidence(text, scorer.llama)


def test_a_classifier_loads_once_and_answers_lists_as_the_scorer_does(tiny_folder, tmp_path):
    classifier = Classifier(task="sentiment", model=str(tiny_folder), adapter="none")
    rows = classifier.predict(["A film", "", "Not bad at all"])
    assert [row.id for row in rows] == ["1", "2", "3"] and rows[1].error == "the text is empty"
    alone = classifier.scorer.explain("Not bad at all")
    assert rows[2].confidence == pytest.approx(alone["confidence"], abs=1e-6)
    assert rows[2].fingerprint == alone["fingerprint"] and rows[2].label is None
    table = pandas.DataFrame(rows)
    assert [*table.confidence.dropna()] == [rows[0].confidence, rows[2].confidence] and [*table.id] == ["1", "2", "3"]
    assert classifier.predict([]) == []
    with pytest.raises(ValueError, match="a list of texts"):
        classifier.predict("A film")
    with pytest.raises(ValueError, match="is not JSON"):
        write_csv(tmp_path / "c.json", [])
        Classifier(model=str(tiny_folder), adapter="none", calibrator=tmp_path / "c.json")


def test_an_answer_token_is_the_whole_answer_and_not_the_beginning_of_a_longer_word(scorer):
    # After " positive" a piece such as "ly" would mean that the mass belongs to " positively".
    llama = scorer.llama
    pieces = [token[0] in ascii_letters for token in llama.tokenizer.convert_ids_to_tokens(range(len(llama.tokenizer)))]
    assert pieces[llama.tokenizer.convert_tokens_to_ids("ly")] and not pieces[llama.tokenizer("\n").input_ids[0]]
    for text, word in (
        ("What a wonderful meal, we will be back next week.", " positive"),
        ("The soup was cold and the waiter ignored us.", " negative"),
        ("Not bad", " positive"),
    ):
        answer = next(answer for answer in scorer.answers if answer.text == word)
        after = llama.next_token_log_probs(llama.encode(scorer.prompt, text) + list(answer.ids))
        assert np.exp(after[pieces]).sum() < 0.01, (text, word)


@pytest.mark.study
@pytest.mark.skipif(not SST2.exists(), reason="SST-2 is not part of the repository")
def test_accuracy_and_ranking_on_real_reviews_have_not_collapsed(scorer):
    # A smoke bound, not a result: a wrong token, prompt or position costs far more than the sampling error of 125 rows.
    with open(SST2, encoding="utf-8") as file:
        pairs = [line.rstrip("\n").split("\t") for line in file][::7]
    rows = scorer.score_together(
        [Example(str(i), t, ("negative", "positive")[int(y)]) for i, (t, y) in enumerate(pairs)]
    )
    assert np.mean([row.prediction == row.label for row in rows]) >= 0.72
    assert area_under_curve([(row.probabilities["positive"], row.label) for row in rows]) >= 0.88


def area_under_curve(scores):
    """The share of (positive, negative) pairs that the score puts in the right order; a tie is half a pair."""
    positive = np.array([p for p, label in scores if label == "positive"])
    negative = np.array([p for p, label in scores if label == "negative"])
    return ((positive[:, None] > negative).mean() + (positive[:, None] >= negative).mean()) / 2


# One text, explained


def test_the_json_explanation_keeps_its_contract(call, tiny_folder):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    given = ["I love it", "two\nlines, caf\u00e9 <|im_end|>"]
    code, out, err = call(*given, "--json")
    assert (code, err) == (0, "")
    objects = [json.loads(line) for line in out.splitlines()]
    assert [row["text"] for row in objects] == given
    keys = ["text", "prompt", "prompt_token_ids", "model", "model_path", "top_tokens", "answer_tokens"]
    keys += ["probabilities", "label_mass", "total_probability", "prediction", "confidence", "fingerprint"]
    model = AutoModelForCausalLM.from_pretrained(tiny_folder).eval()
    for row in objects:
        assert list(row) == keys and len(row["top_tokens"]) == 20 and len(row["fingerprint"]) == 8
        tokenizer = AutoTokenizer.from_pretrained(row["model_path"])
        if "<|" not in row["text"]:  # a control string in a text is read as characters instead, which test_llama checks
            assert row["prompt_token_ids"] == tokenizer(row["prompt"]).input_ids
        with torch.no_grad():
            truth = model(torch.tensor([row["prompt_token_ids"]])).logits[0, -1].double().softmax(-1).numpy()
        top = row["top_tokens"]
        assert [set(entry) for entry in top] == [{"token", "id", "logprob", "label"}] * 20
        assert [e["id"] for e in top] == np.argsort(-truth)[:20].tolist()
        assert np.exp([e["logprob"] for e in top]) == pytest.approx(truth[[e["id"] for e in top]], rel=1e-4)
        assert [e["token"] for e in top] == [tokenizer.decode([e["id"]]) for e in top]
        totals = {}
        for label, entries in row["answer_tokens"].items():
            ids = [entry["ids"][0] for entry in entries]
            assert {tokenizer.decode([i]).strip().casefold() for i in ids} == {label} and len(ids) == 4
            assert [entry["probability"] for entry in entries] == pytest.approx(truth[ids], rel=1e-4)
            totals[label] = truth[ids].sum()
        mass = sum(totals.values())
        assert (
            list(row["probabilities"]) == ["negative", "positive"]
            and abs(sum(row["probabilities"].values()) - 1) < 1e-12
        )
        assert row["probabilities"] == pytest.approx({k: v / mass for k, v in totals.items()}, abs=1e-5)
        assert row["label_mass"] == pytest.approx(mass, rel=1e-4)
        assert row["prediction"] == max(totals, key=totals.get)
        assert row["confidence"] == row["probabilities"][row["prediction"]]
        assert row["total_probability"] == pytest.approx(row["confidence"] * row["label_mass"], rel=1e-12)


def test_a_top_token_counts_for_the_label_that_it_spells(scorer):
    row = scorer.explain("I love it")
    assert {e["token"]: e["label"] for e in row["top_tokens"]}[" positive"] == "positive"
    assert all(e["label"] == SENTIMENT.label_of(e["token"]) for e in row["top_tokens"])
    chat = label_scorer(scorer.llama, TASKS["sentiment-yes-no"]).explain("I love it")
    assert chat["prompt_token_ids"] == scorer.llama.tokenizer(chat["prompt"]).input_ids
    assert chat["prompt"].endswith("Text: I love it<|im_end|>\n<|im_start|>assistant\n")


def test_the_printed_explanation_shows_the_table_the_sums_and_the_verdict(scorer, capsys):
    row = scorer.explain("I love it")
    logprobs_confidence.print_explanation(row)
    lines = capsys.readouterr().out.splitlines()
    table = [line.split() for line in lines if line[:6].strip().isdigit()]
    assert [int(cells[0]) for cells in table] == list(range(1, 13))
    assert table[0][1:] == ['"', 'positive"', f"{row['top_tokens'][0]['logprob']:.3f}", *table[0][4:]]
    assert table[0][-1] == "positive" and float(table[0][4]) == pytest.approx(
        100 * np.exp(row["top_tokens"][0]["logprob"]), abs=0.005
    )
    total = f"{100 * row['probabilities']['positive'] * row['label_mass']:.2f} %"
    assert any("P(positive)" in line and total in line for line in lines)
    assert any("label mass" in line and f"{100 * row['label_mass']:.2f} %" in line for line in lines)
    verdict = next(line for line in lines if "Verdict: positive" in line)
    assert f"confidence {100 * row['confidence']:.2f} %" in verdict and f"total probability {total}" in verdict
    for mass, is_warned in ((0.51, False), (0.49, True)):
        logprobs_confidence.print_explanation(row | {"label_mass": mass})
        assert ("wants to answer something else" in capsys.readouterr().out) == is_warned


def test_what_a_text_holds_cannot_command_the_terminal(call):
    code, out, _ = call("\x1b[2J red \x07 two\nlines \u202e", "--raw-prompt")
    assert code == 0 and "\\x1b[2J red \\x07 two\\nlines \\u202e" in out and "\x1b" not in out
    code, out, _ = call("\x1b[2J red \x07")
    assert code == 0 and "Text: \\x1b[2J red \\x07" in out and "\x1b" not in out


def test_a_raw_prompt_is_read_as_it_stands(call, tokenizer):
    given = ["Knock knock.", "A line\n", " two  blanks "]
    code, out, err = call("--raw-prompt", "--json", *given)
    assert (code, err) == (0, "")
    for text, line in zip(given, out.splitlines(), strict=True):
        row = json.loads(line)
        assert row["text"] == text and len(row["top_tokens"]) == 20
        assert row["prompt_token_ids"] == tokenizer(text).input_ids
    assert_one_error(call("--raw-prompt", "\udcff"), "Unicode")  # of an argument that is not UTF-8


def one_row_of(log_probs):
    """In the place of `Llama.answer_batches`: the first of these log-probabilities for the answers of one row."""
    return lambda rows, answers, *_, **__: [AnsweredBatch([0], log_probs[:, : len(answers)], None)]


def test_of_two_equal_labels_the_one_listed_first_is_predicted(tiny_llama, monkeypatch):
    # A model that finds all 49,152 tokens equally probable; four of them spell each label.
    uniform = np.full((1, 49152), -np.log(49152))
    monkeypatch.setattr(tiny_llama, "next_token_log_probs", lambda ids: uniform[0])
    monkeypatch.setattr(tiny_llama, "answer_batches", one_row_of(uniform))
    for first, second in (("negative", "positive"), ("positive", "negative")):
        scorer = label_scorer(tiny_llama, replace(SENTIMENT, labels={first: (first,), second: (second,)}))
        row, record = scorer.explain("x"), scorer.score_together([Example("1", "x", None)])[0]
        assert (row["prediction"], record.prediction) == (first, first)
        for number in (row["confidence"], record.confidence):
            assert number == pytest.approx(0.5)
        for number in (row["label_mass"], record.label_mass):
            assert number == pytest.approx(8 / 49152)


@pytest.mark.parametrize("value", [np.nan, -np.inf])
def test_a_model_that_names_no_label_gives_no_number(value, tiny_llama, monkeypatch):
    # Half precision can overflow to NaN; an answer made of it would look like any other.
    scorer = label_scorer(tiny_llama, SENTIMENT)
    nothing = np.full((1, len(tiny_llama.tokenizer)), value)
    monkeypatch.setattr(tiny_llama, "answer_batches", one_row_of(nothing))
    row = scorer.score_together([Example("1", "x", "positive")])[0]
    assert row.prediction is row.confidence is row.label_mass is None and "no label any probability" in row.error
    monkeypatch.setattr(tiny_llama, "next_token_log_probs", lambda ids: nothing[0])
    with pytest.raises(ValueError, match="no label any probability"):
        scorer.explain("x")


# A table of texts


THREE_LABELS = """
name = "tickets"
instruction = "Sort these tickets."
template = "Ticket: {text}\\nTeam:"
[labels]
billing = ["billing"]
technical = ["technical", "tech"]
praise = ["praise"]
[[examples]]
text = "I was charged twice."
label = "billing"
"""
WHOLE_ANSWERS = 'scoring = "sequence"' + THREE_LABELS.replace('["billing"]', '["accounts and billing"]')


@pytest.mark.parametrize("toml", [THREE_LABELS, WHOLE_ANSWERS], ids=["first-token", "sequence"])
def test_a_task_of_our_own_scores_a_table_as_the_raw_logits_say(toml, call, tiny_folder, tmp_path):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    (tmp_path / "tickets.toml").write_text(toml, encoding="utf-8")
    labels = ["Billing", "praise", "technical", "", "billing"]
    rows = [(f"t{i}", text, labels[i]) for i, (_, text, _) in enumerate(texts(5))]
    table, output = write_csv(tmp_path / "t.csv", rows), tmp_path / "p.jsonl"
    code, out, _ = call("--input", table, "--output", output, "--task", tmp_path / "tickets.toml")
    assert code == 0 and "n = 4 labelled rows" in out
    model, tokenizer = (kind.from_pretrained(tiny_folder) for kind in (AutoModelForCausalLM, AutoTokenizer))
    task = read_task(str(tmp_path / "tickets.toml"))
    vocabulary = [(i, tokenizer.decode([i]).strip().casefold()) for i in range(len(tokenizer))]

    def probabilities(prompt, whole):
        """[step, vocabulary] after the prompt and after each further token of the whole."""
        ids, steps = tokenizer(whole).input_ids, len(tokenizer(prompt).input_ids)
        with torch.no_grad():
            return ids[steps:], model(torch.tensor([ids])).logits[0, steps - 1 :].double().softmax(-1).numpy()

    def total(prompt, words):
        if task.scoring == "first-token":
            return sum(probabilities(prompt, prompt)[1][0, [i for i, token in vocabulary if token in words]])
        spelled = [form for word in words for form in (" " + word, " " + word[0].upper() + word[1:])]
        paths = [probabilities(prompt, prompt + form) for form in spelled]
        return sum(np.prod([p[i] for i, p in zip(ids, steps, strict=False)]) for ids, steps in paths)

    found = records(output)
    assert [(row["id"], row["text"]) for row in found] == [row[:2] for row in rows]
    assert [row["label"] for row in found] == ["billing", "praise", "technical", None, "billing"]
    for row in found:
        prompt = "Sort these tickets.\n\nTicket: I was charged twice.\nTeam: " + task.labels["billing"][0]
        prompt += f"\n\nTicket: {row['text']}\nTeam:"
        totals = {label: total(prompt, words) for label, words in task.labels.items()}
        mass = sum(totals.values())
        assert row["probabilities"] == pytest.approx({k: v / mass for k, v in totals.items()}, abs=1e-5)
        assert row["label_mass"] == pytest.approx(mass, rel=1e-3)
        assert list(row["probabilities"]) == ["billing", "technical", "praise"] and row["task"] == "tickets"
        assert row["prediction"] == max(totals, key=totals.get)


def test_answers_that_do_not_work_are_told_before_the_weights_are_read(call, tiny_folder, tmp_path):
    broken = shutil.copytree(tiny_folder, tmp_path / "broken")
    (broken / "model.safetensors").write_bytes(b"no weights")
    toml = THREE_LABELS.replace('["billing"]', '["billing matters"]').replace('["praise"]', '["praise_us"]')
    (tmp_path / "tickets.toml").write_text(toml, encoding="utf-8")
    code, _, err = call("--model", broken, "--task", tmp_path / "tickets.toml", "I was charged twice.")
    assert code == 2 and "'billing matters' of label 'billing'" in err and "'praise_us' of label 'praise'" in err


def test_batch_size_order_and_company_change_no_result(tiny_llama):
    scorer = label_scorer(tiny_llama, SENTIMENT)
    examples = [Example(*row) for row in texts(30)]
    alone = [scorer.explain(example.text) for example in examples]
    shuffled = random.Random(1).sample(examples, 30)
    for rows in (
        scorer.score_together(examples),
        *(replace(scorer, batch_size=size).score_together(shuffled) for size in (1, 7, 64)),
    ):
        by_id = {row.id: row for row in rows}
        for example, row in zip(examples, alone, strict=True):
            assert by_id[example.id].probabilities == pytest.approx(row["probabilities"], abs=1e-5)
            assert by_id[example.id].label_mass == pytest.approx(row["label_mass"], abs=1e-5)
    assert [row.id for row in rows] == [example.id for example in shuffled]


def test_a_row_that_cannot_be_scored_has_an_error_and_truncate_shortens_the_text_only(call, tmp_path, tiny_llama):
    long = "a very long text indeed " * 200
    given = ["fine", "", " \t\n", long, "lone \ud83c", "fine too"]
    table = tmp_path / "t.jsonl"
    table.write_text("".join(json.dumps({"text": t, "label": "positive"}) + "\n" for t in given), encoding="utf-8")
    code, out, _ = call("--input", table, "--output", tmp_path / "p.jsonl")
    assert code == 0 and "2 of 6 rows scored, 4 with an error" in out and "n = 2 labelled rows" in out
    rows = records(tmp_path / "p.jsonl")
    assert [row["text"] for row in rows] == given and {row["label"] for row in rows} == {"positive"}
    for row, reason in zip(rows, (None, "empty", "empty", "--truncate", "surrogate", None), strict=True):
        numbers = [row[name] for name in ("prediction", "confidence", "probabilities", "label_mass")]
        assert ("error" in row) == (reason is not None) == (numbers == [None] * 4)
        assert reason is None or reason in row["error"]

    code, out, _ = call("--input", table, "--output", tmp_path / "cut.jsonl", "--truncate")
    assert code == 0 and "3 of 6 rows scored, 3 with an error" in out
    cut = records(tmp_path / "cut.jsonl")
    assert cut[3]["truncated"] is True and cut[3]["text"] == long and "truncated" not in cut[0]
    assert cut[0]["probabilities"] == pytest.approx(rows[0]["probabilities"], abs=1e-6)
    assert cut[0]["fingerprint"] != rows[0]["fingerprint"]
    row = label_scorer(tiny_llama, SENTIMENT, truncate=True).explain(long)
    before, after = SENTIMENT.prompt(SLOT).split(SLOT)
    shown = row["prompt"].removeprefix(before).removesuffix(after)
    assert row["prompt"] == before + shown + after and long.startswith(shown)
    assert cut[3]["probabilities"] == pytest.approx(row["probabilities"], abs=1e-5)
    # As long as the model reads, and one more word would be too long.
    assert (
        len(row["prompt_token_ids"]) <= 512 < len(tiny_llama.tokenizer(before + shown + " indeed a" + after).input_ids)
    )


def test_an_output_of_another_suffix_is_an_export_of_the_predictions_file_beside_it(call, tmp_path):
    table = write_csv(tmp_path / "t.csv", [(*row, "mine") for row in texts(6)], ("id", "text", "label", "owner"))
    code, out, err = call("--input", table, "--output", tmp_path / "result.csv")
    assert code == 0 and f"{tmp_path / 'result.csv'}: 6 rows" in out
    rows = records(tmp_path / "result.jsonl")
    with open(tmp_path / "result.csv", encoding="utf-8", newline="") as file:
        exported = list(csv.DictReader(file))
    assert [(row["id"], row["owner"], float(row["p_positive"])) for row in exported] == [
        (row["id"], "mine", row["probabilities"]["positive"]) for row in rows
    ]
    # The same command makes the export again and scores nothing; another suffix than the four is refused at once.
    (tmp_path / "result.csv").unlink()
    assert call("--input", table, "--output", tmp_path / "result.csv")[2] == ""
    assert (tmp_path / "result.csv").exists()
    code, _, err = call("--input", table, "--output", tmp_path / "result.json")
    assert code == 2 and ".jsonl" in err and ".xlsx" in err
    # A table that is not an export is somebody's own.
    own = Path(write_csv(tmp_path / "own.csv", texts(3)))
    before = own.read_bytes()
    code, _, err = call("--input", table, "--output", own)
    assert code == 2 and "--overwrite" in err and own.read_bytes() == before and not own.with_suffix(".jsonl").exists()


def test_rows_of_one_label_at_the_top_of_a_table_are_noted(call, tmp_path):
    table = write_csv(
        tmp_path / "t.csv", [(str(n), f"text {n}", "positive" if n < 25 else "negative") for n in range(50)]
    )
    _, _, err = call("--input", table, "--output", tmp_path / "p.jsonl", "--limit", 20)
    assert "the first 20 rows are all 'positive'" in err and "--sample 20" in err
    code, out, err = call("--input", table, "--output", tmp_path / "s.jsonl", "--sample", 20, "--seed", 1)
    assert code == 0 and "n = 20 labelled" in out and "note:" not in err
    assert {row["label"] for row in records(tmp_path / "s.jsonl")} == {"positive", "negative"}


def test_repeating_a_finished_command_changes_nothing_and_other_settings_are_refused(call, tmp_path):
    table, output = write_csv(tmp_path / "t.csv", texts(6)), tmp_path / "p.jsonl"
    code, first, _ = call("--input", table, "--output", output)
    before = output.read_bytes(), output.stat().st_mtime_ns, output.stat().st_ino
    code, again, err = call("--input", table, "--output", output)
    assert (code, again, err) == (0, first, "")
    for other in (
        ["--truncate"],
        ["--task", "sentiment-yes-no"],
        ["--dtype", "bfloat16"],
    ):
        code, out, err = call("--input", table, "--output", output, *other)
        assert (code, out) == (2, "") and err.count("\n") == 1 and "--overwrite" in err, other
    assert (output.read_bytes(), output.stat().st_mtime_ns, output.stat().st_ino) == before
    code, _, _ = call("--input", table, "--output", output, "--task", "sentiment-yes-no", "--overwrite")
    assert code == 0 and {row["task"] for row in records(output)} == {"sentiment-yes-no"}


def test_a_run_that_stopped_at_any_byte_ends_with_the_bytes_of_an_unbroken_one(call, tmp_path, monkeypatch):
    # What a kill leaves behind is a beginning of the file; small windows make many of them end inside one.
    monkeypatch.setattr(logprobs_confidence, "ROWS_PER_WINDOW", {"cpu": 8})
    table, output = write_csv(tmp_path / "t.csv", texts(29)), tmp_path / "p.jsonl"
    assert call("--input", table, "--output", output)[0] == 0
    whole = output.read_bytes()
    assert whole.count(b"\n") == 29
    for end in [*random.Random(0).sample(range(len(whole)), 2), len(whole) - 1]:
        output.write_bytes(whole[:end])
        code, out, err = call("--input", table, "--output", output)
        assert code == 0 and output.read_bytes() == whole, end
        assert f"scored {29 - whole[:end].count(bytes([10]))} rows" in err and "29 of 29 rows" in out


# The report and the label-free correction


def test_the_report_is_what_scipy_and_counting_pairs_say(call, tmp_path):
    rows = texts(40)
    rows[3], rows[4], rows[-1] = ("u1", "no label", ""), ("u2", "none either", ""), ("last", " ", "positive")
    table, output = write_csv(tmp_path / "t.csv", rows), tmp_path / "p.jsonl"
    code, out, _ = call("--input", table, "--output", output)
    scored = [row for row in records(output) if "error" not in row]
    labelled = [row for row in scored if row["label"] is not None]
    right = sum(row["prediction"] == row["label"] for row in labelled)
    interval = binomtest(right, len(labelled)).proportion_ci(0.95, "exact")
    area = area_under_curve([(row["probabilities"]["positive"], row["label"]) for row in labelled])
    masses = [row["label_mass"] for row in scored]
    assert (code, len(scored), len(labelled)) == (0, 39, 37)
    assert f"{output}: 39 of 40 rows scored, 1 with an error" in out
    assert f"mean confidence {np.mean([row['confidence'] for row in scored]):.3f}" in out
    assert f"label mass {np.mean(masses):.3f} (lowest {min(masses):.3f})" in out
    assert f"accuracy {right / 37:.3f} [{interval.low:.3f}, {interval.high:.3f}]" in out and "n = 37 labelled" in out
    # The last row has an error, which must not decide whether the area is shown.
    assert f"AUC of P(positive) {area:.3f}" in out


def test_a_table_without_labels_or_without_a_single_score_is_reported_as_that(call, tmp_path):
    table = write_csv(tmp_path / "t.csv", [("1", "fine", ""), ("2", "good", "")])
    code, out, _ = call("--input", table, "--output", tmp_path / "p.jsonl")
    assert code == 0 and "2 of 2 rows" in out and "accuracy" not in out and "AUC" not in out
    table = write_csv(tmp_path / "e.csv", [("1", " ", "positive"), ("2", "  ", "")])
    for flags in ([], ["--debias", "batch"]):
        code, out, _ = call("--input", table, "--output", tmp_path / f"e{len(flags)}.jsonl", *flags)
        assert code == 0 and "0 of 2 rows scored, 2 with an error" in out and "confidence" not in out


def test_debias_writes_the_raw_file_and_the_corrected_one(call, tmp_path):
    rows = [*texts(20), ("empty", "", "negative")]
    table, output, raw = write_csv(tmp_path / "t.csv", rows), tmp_path / "p.jsonl", tmp_path / "p.raw.jsonl"
    command = ["--input", table, "--output", output, "--debias", "batch"]
    code, out, _ = call(*command)
    assert code == 0 and str(raw) in out and str(output) in out
    before, after = records(raw), records(output)
    p = np.array([[row["probabilities"][k] for k in ("negative", "positive")] for row in before[:-1]])
    expected = np.exp(np.log(p) - np.log(p.mean(axis=0)))
    expected /= expected.sum(axis=1, keepdims=True)
    corrected = np.array([list(row["probabilities"].values()) for row in after[:-1]])
    assert corrected == pytest.approx(expected, abs=1e-12)
    assert [row["prediction"] for row in after[:-1]] == [("negative", "positive")[k] for k in expected.argmax(axis=1)]
    assert "error" in before[-1] and "error" in after[-1] and after[-1]["confidence"] is None
    for name in ("id", "text", "label", "label_mass", "model", "task", "method"):
        assert [row[name] for row in before] == [row[name] for row in after]
    assert len({row["fingerprint"] for row in before + after}) == 2
    # The raw file is what a run without the flag writes, and repeating the command changes neither.
    assert call("--input", table, "--output", tmp_path / "plain.jsonl")[0] == 0
    assert (tmp_path / "plain.jsonl").read_bytes() == raw.read_bytes()
    stamps = [(path.read_bytes(), path.stat().st_mtime_ns) for path in (raw, output)]
    assert call(*command)[:2] == (0, out)
    assert [(path.read_bytes(), path.stat().st_mtime_ns) for path in (raw, output)] == stamps


# Bad input, as a user types it


BAD_COMMANDS = {
    "": "--input",
    "''": "text 1 is empty",
    "good ' '": "text 2 is empty",
    "text --input good.csv --output new.jsonl": "either texts or a table",
    "--input good.csv": "--output",
    "--output new.jsonl": "--input",
    "text --surprise": "--surprise",
    "text '--sur\nprise'": "--sur prise",
    "text --task mood": "no task 'mood'",
    "text --task missing.toml": "missing.toml",
    "text --debias batch": "--debias",
    "text --batch-size 0": "--batch-size 0",
    "--raw-prompt --input good.csv --output new.jsonl": "--raw-prompt",
    "--limit 0 --input good.csv --output new.jsonl": "--limit 0",
    "--label-map positive --input good.csv --output new.jsonl": "OLD=NEW",
    "--text-column words --input good.csv --output new.jsonl": "no column 'words'",
    "--input missing.csv --output new.jsonl": "no such file: missing.csv",
    "--input twice.csv --output new.jsonl": "1 rows have the id of an earlier row, the first '1'",
    "--input good.csv --output folder.csv": "is a folder",
    "--input good.csv --output nowhere/new.jsonl": "does not exist",
    "--input good.csv --output /dev/full": "must end in .jsonl",
    "--input good.csv --output good.csv": "both input and output",
    "text --model ./nowhere": "no such model folder: ./nowhere",
}


def test_every_bad_command_ends_with_code_2_and_one_line_and_leaves_no_file(outcome, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "good.csv").write_text("text\nx\n")
    (tmp_path / "twice.csv").write_text("id,text\n1,x\n1,y\n")
    (tmp_path / "folder.csv").mkdir()
    for command, named in BAD_COMMANDS.items():
        assert_one_error(outcome(main, *shlex.split(command)), named)
    assert {path.name for path in tmp_path.iterdir()} == {"good.csv", "twice.csv", "folder.csv"}


def test_the_fingerprint_follows_weights_task_and_settings(tiny_llama, monkeypatch):
    plain = label_scorer(tiny_llama, SENTIMENT).fingerprint
    other_task = Task("sentiment", dict(SENTIMENT.labels), "{text}\nSentiment:")
    other_weights = replace(tiny_llama, identity={"weights": "others", "precision": "float32"})
    other_precision = replace(tiny_llama, identity=tiny_llama.identity | {"precision": "bfloat16"})
    others = [
        label_scorer(tiny_llama, other_task).fingerprint,
        label_scorer(other_weights, SENTIMENT).fingerprint,
        label_scorer(other_precision, SENTIMENT).fingerprint,
        label_scorer(tiny_llama, SENTIMENT, truncate=True).fingerprint,
        label_scorer(tiny_llama, SENTIMENT).debiased_fingerprint,
    ]
    assert len({plain, *others}) == 6 and label_scorer(tiny_llama, SENTIMENT).fingerprint == plain


def test_a_larger_limit_continues_the_run_and_a_smaller_one_is_another_input(call, tmp_path):
    table, output = write_csv(tmp_path / "t.csv", texts(12)), tmp_path / "p.jsonl"
    old = b""
    for limit in (3, 5, 12):
        code, out, err = call("--input", table, "--output", output, "--limit", limit)
        assert code == 0 and f"{limit} of {limit} rows" in out and "scored" in err
        assert [row["id"] for row in records(output)] == [f"r{i}" for i in range(limit)]
        assert output.read_bytes().startswith(old)
        old = output.read_bytes()
    code, _, err = call("--input", table, "--output", output, "--limit", 5)
    assert code == 2 and err.startswith("error: ") and "another input" in err and len(records(output)) == 12


def test_a_file_that_is_not_ours_is_never_written_to(call, tmp_path):
    table = write_csv(tmp_path / "t.csv", texts(2))
    for content in (b"id,text\n1,mine\n", b"one line and no end", b'{"id": 1, "mine": true}'):
        (tmp_path / "mine.jsonl").write_bytes(content)
        code, _, err = call("--input", table, "--output", tmp_path / "mine.jsonl")
        assert code == 2 and err.count("\n") == 1 and "not a prediction" in err
        assert (tmp_path / "mine.jsonl").read_bytes() == content


def test_a_second_run_on_the_same_output_is_refused(call, tmp_path):
    table, output = write_csv(tmp_path / "t.csv", texts(2)), tmp_path / "p.jsonl"
    with predictions.open_output(output):
        code, _, err = call("--input", table, "--output", output)
        assert code == 2 and err.startswith("error: another run is writing")
    assert call("--input", table, "--output", output)[0] == 0


@pytest.fixture(scope="module")
def unbroken(tiny_folder, tmp_path_factory):
    """A table of four windows of rows, its arguments, and the bytes that a run of one piece writes."""
    folder = tmp_path_factory.mktemp("unbroken")
    table = write_csv(folder / "t.csv", texts(900))
    arguments = ["--input", str(table), "--model", str(tiny_folder)]
    main([*arguments, "--output", str(folder / "p.jsonl")])
    return arguments, (folder / "p.jsonl").read_bytes()


@pytest.mark.study
def test_a_killed_and_an_interrupted_run_are_continued_by_the_same_command(unbroken, tmp_path):
    arguments, whole = unbroken
    output = tmp_path / "p.jsonl"
    code, _ = stop_after_growth(arguments, output, signal.SIGKILL, 0)
    assert code == -signal.SIGKILL and whole.startswith(output.read_bytes()) and output.stat().st_size < len(whole)
    killed = output.stat().st_size
    code, err = stop_after_growth(arguments, output, signal.SIGINT, 1)
    assert code == 130 and err.splitlines()[-1] == "stopped; repeat the same command to continue where it was"
    assert "Traceback" not in err and killed < output.stat().st_size and whole.startswith(output.read_bytes())
    with start(arguments, output) as process:
        out, err = process.communicate(timeout=300)
    assert process.returncode == 0 and output.read_bytes() == whole and "900 of 900 rows scored" in out


def start(arguments, output, **options):
    """Start the script as a process of its own."""
    command = [sys.executable, "logprobs_confidence.py", *arguments, "--output", str(output)]
    pipes = {"stderr": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, cwd=ROOT, **pipes, **options)


def stop_after_growth(arguments, output, how, seed):
    """Send a signal at some moment after the file has grown; -> exit code and stderr."""
    before = output.stat().st_size if output.exists() else 0
    with start(arguments, output) as process:
        try:
            while process.poll() is None and (output.stat().st_size if output.exists() else 0) <= before:
                time.sleep(0.01)
            time.sleep(random.Random(seed).uniform(0, 0.1))
            process.send_signal(how)
            _, err = process.communicate(timeout=120)
        finally:
            process.kill()
    return process.returncode, err
