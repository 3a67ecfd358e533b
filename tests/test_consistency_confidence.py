"""consistency_confidence.py: from an answer to a label, from votes to a confidence, and the command that a user types.

Truth comes from counting by hand, from scipy, from exact sums over all courses a vote can take, and from one plain
forward pass. A tiny random model that knows eight tokens answers here: its answers name a label, none, or several.
test_llama.py holds the sampling itself to its distribution.
"""

import csv
import json
import math
import random
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy.stats import beta, binomtest, chisquare

import command_line
import consistency_confidence
import logprobs_confidence
import predictions
from calibration import FittedCalibrator, PlattScalingCalibrator, Recipe, load_calibrator, save_calibrator, text_key
from consistency_confidence import (
    Sampling,
    converge,
    convergence_table,
    decided,
    draw_first_tokens,
    explain,
    first_token_draws,
    get_consistency_confidence,
    jeffreys_interval,
    main,
    next_numbers,
    parse_answer,
    prepare,
    record,
    sample_window,
    tally,
    vote,
)
from llama import Llama
from task import TASKS, Example, Task, read_task

ROOT = Path(__file__).parent.parent
VECTORS = json.loads((ROOT / "tests" / "data" / "reference_vectors.json").read_text(encoding="utf-8"))["consistency"]
SENTIMENT, YES_NO = TASKS["sentiment"], TASKS["sentiment-yes-no"]
GRADES = Task(
    name="grades",
    labels={
        "very positive": ("very positive", "excellent", "good as gold"),
        "positive": ("positive", "good"),
        "negative": ("negative", "not good"),
    },
    template="Text: {text}\nGrade:",
)
ONE_THREAD = {"OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Tiny models run faster on one thread, and in the same way in this process as in those that we start."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


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
def call(capsys, talker, tmp_path, monkeypatch):
    """Run the script in this process, in an empty folder, on the talking model: -> exit code, stdout, stderr."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(consistency_confidence, "load_from", lambda args, task: talker)

    def run_main(command, *more):
        capsys.readouterr()
        code = 0
        try:
            command_line.run(lambda: main([*command.split(), *map(str, more)]))
        except SystemExit as stopped:
            code = stopped.code
        return code, *capsys.readouterr()

    return run_main


@pytest.fixture
def no_model(monkeypatch):
    """From here on it is a fault to load a model or to ask it."""

    def forbid():
        for name in ("load_from", "sample_window", "draw_first_tokens"):
            monkeypatch.setattr(consistency_confidence, name, lambda *_, **__: pytest.fail("the model ran"))

    return forbid


WORDS = ("a", "film", "that", "is", "not", "good", "bad", "long", "funny", "dull", "and", "never", "quite", "warm")


def examples(n, seed=0):
    """n labelled examples of one to twelve words."""
    draw = random.Random(seed)
    return [
        Example(f"r{i}", " ".join(draw.choices(WORDS, k=draw.randint(1, 12))), draw.choice(["negative", "positive"]))
        for i in range(n)
    ]


def write_csv(path, rows):
    with open(path, "w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([("id", "text", "label"), *((e.id, e.text, e.label or "") for e in rows)])
    return path


def records(path):
    return [json.loads(line) for line in Path(path).read_bytes().splitlines()]


def assert_one_line(result, named=""):
    code, out, err = result
    assert (code, out, err.count("\n")) == (2, "", 1), err
    assert err.startswith("error: ") and named in err, err


# From an answer to a label


ANSWERS = {
    "sentiment": {
        "positive": "positive",
        " Positive": "positive",
        "POSITIVE!!": "positive",
        "pOsItIvE...": "positive",
        "**Positive**": "positive",
        "'negative'.": "negative",
        "\u201cPositive\u201d": "positive",
        "`negative`": "negative",
        "[positive]": "positive",
        "(negative)": "negative",
        "- positive": "positive",
        "1. negative": "negative",
        "<b>positive</b>": "positive",
        '{"sentiment": "negative"}': "negative",
        "{'label': 'positive', 'score': 0.9}": "positive",
        "sentiment=positive": "positive",
        "Sentiment: Positive": "positive",
        "The sentiment is positive.": "positive",
        "\nPositive": "positive",
        "\t negative \n": "negative",
        "\u00a0negative": "negative",
        "Positive\nPositive": "positive",
        "positive, because it praises the acting": "positive",
        "POSITIVE (the author liked it)": "positive",
        "negative\u2014the ending spoils it": "negative",
        "positive?": "positive",
        # what a negation touches is not named, in its clause and only there
        "Not positive": None,
        "not negative": None,
        "isn't positive": None,
        "isn\u2019t positive": None,
        "It isn't really positive": None,
        "not really positive": None,
        "not\npositive": None,
        "neither positive nor negative": None,
        "never negative": None,
        "hardly positive": None,
        "cannot be called negative": None,
        "non-positive": None,
        "no positive feeling": None,
        "nothing positive": None,
        "isnt positive": None,
        "_positive_": "positive",
        "positive, not negative": "positive",
        "not negative, positive": "positive",
        "It is positive, not negative.": "positive",
        # what denies something else is no answer, unless it first gives one
        "positive; the ending was not": "positive",
        "positive but not very": "positive",
        "The text is positive, it is not sad": None,
        "not bad": None,
        "positive, not sad, negative": None,
        # both, or none
        "positive or negative?": None,
        "positive/negative": None,
        "Positive and negative": None,
        "Positive. Negative.": None,
        "": None,
        " \n": None,
        "**": None,
        "mixed": None,
        "pos": None,
        "positively": None,
        "unpositive": None,
        "posi tive": None,
        "\u03c0ositive": None,
        "5 stars": None,
    },
    "sentiment-yes-no": {
        "Yes": "positive",
        "yes.": "positive",
        "NO!": "negative",
        "**No**": "negative",
        '"no"': "negative",
        "Yes, it is.": "positive",
        "No, it is not.": "negative",
        "No, the text isn\u2019t positive.": "negative",
        "Yes, it isn't bad.": "positive",
        "Yes\n\nThe text praises": "positive",
        "The answer is no.": "negative",
        "yes or no": None,
        "yes/no": None,
        "Not yes": None,
        "not no": None,
        "I don't know.": None,
        "Nope": None,
        "No idea.": None,  # here it is no answer: it goes on
        "There is no doubt that it is positive": None,
        "There is no doubt: yes": None,
        "yesterday": None,
        "It is positive": None,  # of this task the answers are yes and no; positive is its label
        "": None,
    },
    "grades": {
        "very positive": "very positive",
        "Very positive.": "very positive",
        "**VERY POSITIVE**": "very positive",
        "very  positive": "very positive",
        "very\u00a0positive": "very positive",
        "It is very positive, really": "very positive",
        "excellent": "very positive",
        "It is good as gold.": "very positive",  # and not the "good" that it begins with
        "good as it gets": "positive",
        "positive": "positive",
        "positive, very": "positive",
        "It was good.": "positive",
        "really very good": "positive",
        "very negative": "negative",
        "not good": "negative",  # an answer word of its own, and no negation of the label's
        "It was not good": "negative",
        "good, not very positive": "positive",
        "not very positive": None,
        "isn't good": None,
        "very positive or positive": None,
        "excellent and positive": None,
        "neither very positive nor negative": None,
        "very": None,
        "": None,
    },
}
BY_NAME = {task.name: task for task in (SENTIMENT, YES_NO, GRADES)}


@pytest.mark.parametrize("name", ANSWERS)
def test_an_answer_is_read_by_its_answer_words(name):
    found = {answer: parse_answer(answer, BY_NAME[name]) for answer in ANSWERS[name]}
    assert found == ANSWERS[name]


PIECES = ["positive", "Negative", "yes", "no", "very", "good", "not", "isn't", "nor", "but", " ", ", ", ".", "\n", "-"]
SAID = st.one_of(st.text(max_size=40), st.lists(st.sampled_from([*PIECES, "\u2019t", '"', "\u0130", "\ud800"])))


@pytest.mark.parametrize("task", BY_NAME.values(), ids=BY_NAME)
@settings(max_examples=300, deadline=None)
@given(said=SAID)
@example(said="\u017fentiment: po\u017fitive")  # a letter that folds to s
@example(said="not")
def test_whatever_is_said_the_label_is_one_of_the_task_s_and_an_answer_word_was_said(task, said):
    said = said if isinstance(said, str) else "".join(said)
    label = parse_answer(said, task)
    assert label is None or label in task.labels
    folded = " ".join(re.findall(r"\w+", said.casefold()))
    if not any(word in folded for words in task.labels.values() for word in words):
        assert label is None
    if label is not None:
        assert any(word in folded for word in task.labels[label])
        assert parse_answer(said.upper().lower(), task) == parse_answer(said.lower(), task)


OUTSIDE = st.text(" \t\n.,;:!*\"'`()[]", max_size=6)


@settings(max_examples=100, deadline=None)
@given(
    OUTSIDE,
    OUTSIDE,
    st.sampled_from([str.lower, str.upper, str.title, str.swapcase]),
    st.sampled_from(range(3)),
    st.data(),
)
def test_case_and_outer_punctuation_never_change_an_answer_word(before, after, case, which, data):
    task = list(BY_NAME.values())[which]
    label = data.draw(st.sampled_from([*task.labels]))
    word = data.draw(st.sampled_from(task.labels[label]))
    assert parse_answer(before + case(word) + after, task) == label


NEGATIONS = (
    "not no non never neither nor none nothing nobody without hardly barely cannot doesn't wasn\u2019t ISN'T isnt cant"
)


@pytest.mark.parametrize("negation", NEGATIONS.split())
def test_every_negation_denies_what_follows_it_in_its_clause(negation):
    for said in (f"{negation} positive", f"It is {negation} at all a positive text", f"{negation.upper()} POSITIVE!"):
        assert parse_answer(said, SENTIMENT) is None
    assert parse_answer(f"positive, {negation} negative", SENTIMENT) == "positive"
    assert parse_answer(f"{negation} that, positive", SENTIMENT) is None


# Votes


def test_what_names_no_label_stays_in_the_denominator():
    votes, unparsed = vote(["positive", "Not positive", " Positive.", "mixed", "positive"], SENTIMENT)
    assert (votes, unparsed) == ({"negative": 0, "positive": 3}, 2)
    row = record(("1", "x", "positive"), votes, unparsed, {"answers": []}, False, **COMMON)
    assert (row.extras["agreement"], row.extras["unparsed"], row.extras["calls"]) == (3 / 5, 2, 5)
    assert (row.confidence, row.label_mass, row.prediction) == (1.0, 3 / 5, "positive")
    assert row.confidence * row.label_mass == row.extras["agreement"]
    assert row.extras["vote_entropy"] == pytest.approx(-(0.6 * math.log(0.6) + 0.4 * math.log(0.4)))


COMMON = {"method": "consistency", "model": "m", "task": "t", "fingerprint": "f"}


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 30), min_size=2, max_size=4).filter(any), st.integers(0, 30), st.booleans())
def test_shares_sum_to_one_and_confidence_times_label_mass_is_agreement(counts, unparsed, adaptive):
    votes = dict(zip("abcd", counts, strict=False))
    row = record(("1", "x", None), votes, unparsed, {}, adaptive, **COMMON)
    n = sum(counts) + unparsed
    assert sum(row.probabilities.values()) == pytest.approx(1, abs=1e-12)
    assert row.probabilities == pytest.approx({label: count / sum(counts) for label, count in votes.items()})
    assert row.confidence * row.label_mass == pytest.approx(row.extras["agreement"], abs=1e-12)
    assert row.extras["agreement"] == max(counts) / n and row.extras["calls"] == n
    # The first of the labels with most votes, as with equal probabilities in Method 1.
    assert row.prediction == "abcd"[counts.index(max(counts))]
    shares = [count / n for count in [*counts, unparsed] if count]
    assert row.extras["vote_entropy"] == pytest.approx(-sum(p * math.log(p) for p in shares), abs=1e-12)
    bounds = row.extras["agreement_low"], row.extras["agreement_high"]
    assert bounds == ((None, None) if adaptive else jeffreys_interval(max(counts), n))
    assert predictions.from_line(predictions.to_line(row), "here") == row


def test_of_equal_votes_the_label_listed_first_wins():
    answers = ["positive", "negative", "negative", "positive"]
    assert record(("1", "x", None), *vote(answers, SENTIMENT), {}, False, **COMMON).prediction == "negative"
    turned = replace(SENTIMENT, labels={"positive": ("positive",), "negative": ("negative",)})
    assert record(("1", "x", None), *vote(answers, turned), {}, False, **COMMON).prediction == "positive"


def test_when_no_answer_names_a_label_there_is_an_error_and_no_number():
    answers = ["Perhaps, it depends on what the reader of it would like", "neither", ""]
    row = record(("1", "x", "positive"), *vote(answers, SENTIMENT), {"answers": answers}, False, **COMMON)
    assert row.error == "none of 3 answers names a label, as 'Perhaps, it depends on what the reader o'"
    assert row.prediction is row.confidence is row.probabilities is row.label_mass is None
    assert row.extras["answers"] == answers and row.extras["unparsed"] == 3 and row.extras["calls"] == 3
    assert [row.extras[name] for name in ("agreement", "agreement_low", "agreement_high")] == [None] * 3
    assert row.extras["vote_entropy"] == 0 and math.copysign(1, row.extras["vote_entropy"]) == 1
    assert predictions.from_line(predictions.to_line(row), "here") == row


def test_the_interval_is_jeffreys_and_closed_at_its_ends():
    for vector in VECTORS["k_of_n"]:
        found = jeffreys_interval(vector["k"], vector["n"])
        assert found == pytest.approx(vector["credible95_jeffreys"], abs=1e-12), vector
    for k, n in ((0, 1), (1, 1), (0, 10), (10, 10), (3, 7), (500, 1000)):
        low, high = beta.interval(0.95, k + 0.5, n - k + 0.5)
        assert jeffreys_interval(k, n) == pytest.approx((0.0 if k == 0 else low, 1.0 if k == n else high), abs=1e-12)
    assert jeffreys_interval(0, 5)[0] == 0 and jeffreys_interval(5, 5)[1] == 1
    assert jeffreys_interval(7, 10, 0.5) == pytest.approx(beta.interval(0.5, 7.5, 3.5))
    assert jeffreys_interval(10, 10) == pytest.approx((0.783, 1.0), abs=5e-4)  # the 78 % at the top of the script


def test_entropy_is_over_the_labels_and_the_unparsed():
    def entropy(*counts):
        return tally(dict(zip("abc", counts[:-1], strict=False)), counts[-1], False)["vote_entropy"]

    assert entropy(5, 0, 0) == 0
    assert entropy(1, 1, 0) == pytest.approx(math.log(2))
    assert entropy(1, 1, 1, 1) == pytest.approx(math.log(4))
    assert entropy(2, 0, 2) == pytest.approx(math.log(2))
    assert entropy(8, 2, 0) == pytest.approx(0.500402, abs=1e-6)


# When to stop asking


MANY = 10**6  # answers left, so that no lead is too large to be overtaken


def test_asking_stops_when_the_leader_is_safe():
    for vector in VECTORS["beta_stop"]:
        for votes in ([vector["v1"], vector["v2"]], [vector["v2"], vector["v1"]], [0, vector["v2"], vector["v1"]]):
            assert decided(votes, MANY) == vector["stop_at_0p95"], vector
    for first, second in ((4, 0), (6, 1), (8, 2), (9, 3)):
        assert decided([first, second], MANY) and not decided([first - 1, second], MANY)
    assert decided([2, 9, 3], MANY) and not decided([4, 9, 3], MANY)  # against the second, whoever that is


def test_asking_stops_when_the_leader_can_not_be_overtaken():
    assert decided([3, 1], 1) and not decided([3, 1], 2)  # 3-3 is not overtaken but no longer a lead
    assert decided([5, 4], 0) and not decided([5, 5], 0)
    assert decided([2, 1, 3], 0) and not decided([2, 2, 3], 1)


def answered(positive, negative, unparsed=0):
    return ["positive"] * positive + ["negative"] * negative + ["mixed"] * unparsed


def test_no_more_answers_are_asked_for_than_there_may_be():
    adaptive = Sampling(10, adaptive=True)
    for answers in (answered(5, 5), answered(0, 0, 10), answered(3, 3, 4), answered(10, 0)):
        assert not next_numbers(answers, SENTIMENT, adaptive)
    assert next_numbers(answered(5, 4), SENTIMENT, adaptive) == range(9, 10)
    assert next_numbers([], SENTIMENT, adaptive) == range(4)
    assert next_numbers([], SENTIMENT, replace(adaptive, samples=3)) == range(3)
    assert not next_numbers(answered(2, 1), SENTIMENT, replace(adaptive, samples=3))
    assert next_numbers([], SENTIMENT, Sampling(10)) == range(10)
    assert next_numbers(answered(4, 0), SENTIMENT, Sampling(10)) == range(4, 10)
    assert not next_numbers(answered(10, 0), SENTIMENT, Sampling(10))


def course(p, stops, cap=10):
    """(expected calls, chance of another leader than the likelier label), exactly: a sum over all courses of a vote."""
    going, calls, other = {(0, 0): 1.0}, 0.0, 0.0
    for n in range(cap + 1):
        after = Counter()
        for (a, b), chance in going.items():
            if stops(a, b, cap - n):
                calls += chance * n
                other += chance * (1.0 if b > a else 0.5 if a == b else 0.0)
            else:
                after[a + 1, b] += chance * p
                after[a, b + 1] += chance * (1 - p)
        going = after
    assert not going
    return calls, other


def test_adaptive_asking_costs_and_errs_as_much_as_it_should():
    def safe(a, b, left):  # statistics.md section 5, without the rule about overtaking
        return not left or (a + b >= 4 and decided([a, b], MANY))

    def ours(a, b, left):
        numbers = next_numbers(answered(a, b), SENTIMENT, Sampling(10, adaptive=True))
        return not len(numbers) and (a + b > 0)

    expected = {1: 4.0, 0.99: 4.1, 0.9: 5.4, 0.8: 6.9, 0.7: 8.1, 0.5: 9.1}
    assert {p: round(course(p, safe)[0], 1) for p in expected} == expected
    # The same votes win; to stop when a lead cannot be overtaken saves up to half an answer and changes no winner.
    cheaper = {1: 4.0, 0.99: 4.12, 0.9: 5.21, 0.8: 6.41, 0.7: 7.51, 0.5: 8.58}
    assert {p: round(course(p, ours)[0], 2) for p in cheaper} == cheaper
    for p, other, fixed in ((0.9, 0.0009, 0.0009), (0.8, 0.020, 0.0196), (0.7, 0.0996, 0.0988)):
        assert course(p, ours)[1] == pytest.approx(other, abs=6e-5)
        assert course(p, lambda a, b, left: not left)[1] == pytest.approx(fixed, abs=6e-5)


# Asking a model


def sampled(talker, rows, task=SENTIMENT, batch_size=None, **how):
    return sample_window(rows, prepare(talker, task, Sampling(**how)), batch_size)


def test_the_answers_are_the_model_s_and_the_votes_are_theirs(talker):
    rows = examples(8)
    sampler = prepare(talker, SENTIMENT, Sampling(6, 0.8, max_tokens=4, seed=3))
    found = sample_window(rows, sampler)
    for row, example_ in zip(found, rows, strict=True):
        ids = talker.encode(talker.task_prompt(SENTIMENT), example_.text)
        seeds = [sampler.seed(example_, number) for number in range(6)]
        assert row.extras["answers"] == talker.sample([ids], [seeds], 0.8, 4, "\n")[0]
        votes, unparsed = vote(row.extras["answers"], SENTIMENT)
        assert (row.extras["votes"], row.extras["unparsed"]) == (votes, unparsed)
        assert (row.id, row.text, row.label) == (example_.id, example_.text, example_.label)
        assert (row.method, row.model, row.task) == ("consistency", "talker", "sentiment")
        assert row.extras["sampling"] == {"temperature": 0.8} and row.fingerprint == sampler.fingerprint
    said = [answer for row in found for answer in row.extras["answers"]]
    assert len(set(said)) > 8 and not any("\n" in answer for answer in said)
    assert {parse_answer(answer, SENTIMENT) for answer in said} == {"negative", "positive", None}


def test_no_other_row_no_order_and_no_batch_size_changes_an_answer(talker):
    rows = [*examples(9), Example("empty", " ", None)]
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


def test_seeds_differ_by_run_row_text_and_number_and_every_server_takes_them(talker):
    one, other = (prepare(talker, SENTIMENT, Sampling(seed=seed)) for seed in (0, 1))
    rows = examples(50)
    seeds = [sampler.seed(row, n) for sampler in (one, other) for row in rows for n in range(20)]
    assert len(set(seeds)) == len(seeds) and all(0 <= seed < 2**31 for seed in seeds)
    assert max(seeds) > 2**30
    assert one.seed(rows[0], 3) == prepare(talker, SENTIMENT, Sampling(5, 0.5, adaptive=True)).seed(rows[0], 3)
    assert sampled(talker, rows[:2], seed=0, samples=5) != sampled(talker, rows[:2], seed=1, samples=5)
    assert one.seed(Example("1", "\ud83d", None), 0) > 0  # an unreadable text has a seed as well


def test_adaptive_answers_are_the_first_of_the_fixed_ones(talker):
    rows = examples(24)
    fixed, adaptive = sampled(talker, rows, samples=10), sampled(talker, rows, samples=10, adaptive=True)
    calls = Counter()
    for whole, part in zip(fixed, adaptive, strict=True):
        answers = part.extras["answers"]
        calls[len(answers)] += 1
        assert whole.extras["answers"][: len(answers)] == answers and len(answers) == part.extras["calls"]
        assert not next_numbers(answers, SENTIMENT, Sampling(10, adaptive=True))
        for n in range(4, len(answers)):  # and it could not have stopped before
            assert next_numbers(answers[:n], SENTIMENT, Sampling(10, adaptive=True)) == range(n, n + 1)
        assert part.extras["agreement_low"] is part.extras["agreement_high"] is None
    assert calls[4] > 0 and calls[10] > 0 and max(calls) == 10 and len(calls) > 3


def test_a_chat_is_not_cut_at_a_line_and_a_completion_is(talker):
    rows, chat = examples(10), replace(SENTIMENT, format="chat")
    chats, completions = (
        [answer for row in sampled(talker, rows, task, samples=5) for answer in row.extras["answers"]]
        for task in (chat, SENTIMENT)
    )
    assert any("\n" in answer for answer in chats) and not any("\n" in answer for answer in completions)


def test_a_text_too_long_is_an_error_and_truncate_shortens_it_and_says_so(talker):
    long, short = Example("long", "a very long text indeed " * 200, None), Example("short", "fine", None)
    for first_token in (False, True):
        how = Sampling(3, first_token=first_token)
        draw = draw_first_tokens if first_token else sample_window
        failed, fine = draw([long, short], prepare(talker, SENTIMENT, how))
        room = 0 if first_token else 10
        assert f"the model reads {512 - room}; --truncate shortens" in failed.error
        assert failed.confidence is None and "votes" not in failed.extras and "truncated" not in fine.extras
        sampler = prepare(talker, SENTIMENT, how, truncate=True)
        cut, same = draw([long, short], sampler)
        assert (
            cut.extras["truncated"] is True
            and cut.text == long.text
            and cut.extras["calls"] == (1 if first_token else 3)
        )
        assert same.extras["votes"] == fine.extras["votes"] and sampler.fingerprint != fine.fingerprint


# Several wordings


def test_answer_n_is_to_wording_n_modulo_their_number(talker):
    task = replace(SENTIMENT, paraphrases=("{text}\nOverall, this is", "Someone wrote: {text}\nIt was"))
    sampler = prepare(talker, task, Sampling(8, paraphrase=True))
    assert [wording.template for wording in sampler.wordings] == [task.template, *task.paraphrases]
    rows = examples(3)
    for row, example_ in zip(sample_window(rows, sampler), rows, strict=True):
        for number, answer in enumerate(row.extras["answers"]):
            template = [task.template, *task.paraphrases][number % 3]
            frame = talker.task_prompt(replace(SENTIMENT, template=template, paraphrases=()))
            ids, seed = talker.encode(frame, example_.text), sampler.seed(example_, number)
            assert talker.sample([ids], [[seed]]) == [[answer]]
    adaptive = sample_window(rows, prepare(talker, task, Sampling(8, paraphrase=True, adaptive=True)))
    for row, part in zip(sample_window(rows, sampler), adaptive, strict=True):
        assert row.extras["answers"][: len(part.extras["answers"])] == part.extras["answers"]


def test_both_built_in_tasks_have_five_wordings_that_ask_for_the_same_answers():
    for task in (SENTIMENT, YES_NO):
        wordings = task.wordings()
        assert len({wording.template for wording in wordings}) == 5 and wordings[0].template == task.template
        assert all(replace(wording, template=task.template) == replace(task, paraphrases=()) for wording in wordings)


def test_paraphrases_are_no_part_of_the_task_s_settings_so_old_fingerprints_hold(talker):
    for task in (SENTIMENT, YES_NO):
        bare = replace(task, paraphrases=())
        assert "paraphrases" not in task.settings() and task.settings() == bare.settings()
        assert (
            logprobs_confidence.prepare(talker, task).fingerprint
            == logprobs_confidence.prepare(talker, bare).fingerprint
        )
        assert prepare(talker, task, Sampling()).fingerprint == prepare(talker, bare, Sampling()).fingerprint
        fewer = replace(task, paraphrases=task.paraphrases[:2])
        prints = {prepare(talker, t, Sampling(paraphrase=True)).fingerprint for t in (task, fewer)}
        assert len(prints | {prepare(talker, task, Sampling()).fingerprint}) == 3


def test_the_fingerprint_of_the_stored_predictions_of_method_1_is_still_that_of_the_default_task(embedded):
    stored = predictions.read(ROOT / "data" / "predictions" / "base_test.jsonl")
    assert {row.fingerprint for row in stored} == {logprobs_confidence.prepare(embedded, SENTIMENT).fingerprint}


def test_every_setting_that_changes_answers_changes_the_fingerprint(talker):
    changes = [
        {"samples": 11},
        {"temperature": 0.9},
        {"adaptive": True},
        {"paraphrase": True},
        {"max_tokens": 9},
        {"first_token": True},
        {"seed": 1},
    ]
    prints = [prepare(talker, SENTIMENT, Sampling(**change)).fingerprint for change in [{}, *changes]]
    prints.append(prepare(talker, SENTIMENT, Sampling(), truncate=True).fingerprint)
    prints.append(prepare(talker, replace(SENTIMENT, examples=()), Sampling()).fingerprint)
    prints.append(prepare(replace(talker, identity={"weights": "others"}), SENTIMENT, Sampling()).fingerprint)
    prints.append(logprobs_confidence.prepare(talker, SENTIMENT).fingerprint)
    assert len(set(prints)) == len(prints) == 12
    assert prints[0] == prepare(talker, SENTIMENT, Sampling()).fingerprint


TASK = 'name = "t"\ntemplate = "Text: {text}\\nMood:"\nparaphrases = PARAPHRASES\n'
TASK += '[labels]\nnegative = ["negative"]\npositive = ["positive"]\n'
BAD_PARAPHRASES = {
    '["no slot"]': "a template must hold {text} exactly once",
    '["{text} {text}"]': "a template must hold {text} exactly once",
    '["{text} "]': "a template ends in a space",
    '["Text: {text}\\nMood:"]': "two of its templates are the same",
    '["{text} a", "{text} a"]': "two of its templates are the same",
    "[1]": "paraphrases is not a list of templates",
    '"{text} is"': "paraphrases is not a list of templates",
    "{a = 1}": "paraphrases is not a list of templates",
    "3": "paraphrases is not a list of templates",
}


@pytest.mark.parametrize(("value", "problem"), BAD_PARAPHRASES.items())
def test_bad_paraphrases_in_a_task_file_are_a_clear_error(value, problem, tmp_path):
    path = tmp_path / "t.toml"
    path.write_text(TASK.replace("PARAPHRASES", value), encoding="utf-8")
    with pytest.raises(ValueError, match=re.escape(problem)) as refusal:
        read_task(str(path))
    assert str(refusal.value).startswith(f"{path}: ") and "\n" not in str(refusal.value)


def test_paraphrases_of_a_task_file_are_read_and_a_task_without_any_is_one_clear_line(call):
    Path("t.toml").write_text(TASK.replace("PARAPHRASES", '["{text}\\nIn short:"]'), encoding="utf-8")
    assert read_task("t.toml").paraphrases == ("{text}\nIn short:",)
    code, out, _ = call("--task t.toml --paraphrase --json --samples 4", "good")
    row = json.loads(out)
    assert code == 0 and row["prompts"] == ["Text: good\nMood:", "good\nIn short:"]
    assert [answer["wording"] for answer in row["answers"]] == [0, 1, 0, 1]
    Path("t.toml").write_text(TASK.replace("PARAPHRASES", "[]"), encoding="utf-8")
    assert_one_line(call("--task t.toml --paraphrase", "good"), "task 't' has one wording only")


# Draws from the first token's distribution


def shares_of(talker, task, text):
    """P of each label's answer tokens by one plain pass."""
    log_probs = talker.next_token_log_probs(talker.encode(talker.task_prompt(task), text))
    words = [talker.tokenizer.decode([i]).strip().casefold() for i in range(len(log_probs))]
    named = {label: [i for i, word in enumerate(words) if word in task.labels[label]] for label in task.labels}
    return {label: float(np.exp(log_probs[ids]).sum()) for label, ids in named.items()}


def test_draws_are_as_frequent_as_the_labels_are_probable(talker):
    rows, n = examples(3), 5000
    for row, example_ in zip(
        draw_first_tokens(rows, prepare(talker, SENTIMENT, Sampling(n, first_token=True))), rows, strict=True
    ):
        truth = shares_of(talker, SENTIMENT, example_.text)
        assert row.extras["first_token"] == pytest.approx(truth, abs=1e-6)
        counts = [*row.extras["votes"].values(), row.extras["unparsed"]]
        expected = n * np.array([*truth.values(), 1 - sum(truth.values())])
        assert sum(counts) == n and expected.min() > 20
        assert chisquare(counts, expected).pvalue > 1e-3
        assert chisquare(counts, n * np.roll(expected, 1) / n).pvalue < 1e-6
        assert row.extras["calls"] == 1 and "answers" not in row.extras
        assert row.extras["agreement"] == max(counts[:2]) / n


def test_the_first_token_s_probabilities_are_those_of_method_1(talker):
    rows = examples(12)
    drawn = draw_first_tokens(rows, prepare(talker, SENTIMENT, Sampling(10, first_token=True)))
    scored = logprobs_confidence.score(rows, logprobs_confidence.prepare(talker, SENTIMENT))
    for ours, theirs in zip(drawn, scored, strict=True):
        totals = {label: p * theirs.label_mass for label, p in theirs.probabilities.items()}
        assert ours.extras["first_token"] == pytest.approx(totals, abs=1e-5)


def test_several_wordings_are_drawn_from_in_turn(talker):
    task, n = replace(SENTIMENT, paraphrases=("{text}\nOverall, this is",)), 4000
    (row,) = draw_first_tokens(
        [Example("1", "warm", None)], prepare(talker, task, Sampling(n, first_token=True, paraphrase=True))
    )
    each = [shares_of(talker, wording, "warm") for wording in task.wordings()]
    mean = {label: (each[0][label] + each[1][label]) / 2 for label in SENTIMENT.labels}
    assert row.extras["first_token"] == pytest.approx(mean, abs=1e-6) and row.extras["calls"] == 2
    expected = n * np.array([*mean.values(), 1 - sum(mean.values())])
    assert chisquare([*row.extras["votes"].values(), row.extras["unparsed"]], expected).pvalue > 1e-3
    masses = np.array([[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]])
    assert first_token_draws(masses, 0, 7).tolist() == [0, 1, 2, 0, 1, 2, 0]


def test_fewer_draws_are_the_first_of_more():
    masses = np.array([[0.2, 0.5]])
    whole = first_token_draws(masses, 11, 1000)
    assert set(whole.tolist()) == {0, 1, 2}
    for n in (1, 10, 100):
        assert first_token_draws(masses, 11, n).tolist() == whole[:n].tolist()
    assert first_token_draws(masses, 12, 1000).tolist() != whole.tolist()
    for label in (0, 1, 2):  # what has no probability is never drawn, and what has all of it always
        alone = np.eye(3)[[label], :2]
        assert set(first_token_draws(alone, 5, 1000).tolist()) == {label}


def first_token_file(path, n, seed=0):
    """A file of n rows with P(label) known, whose draws anybody can repeat."""
    draw = np.random.default_rng(seed)
    masses = draw.dirichlet([2, 3, 1], n)[:, :2].tolist()
    rows = [
        record(
            (str(i), f"text {i}", None), {"negative": 1, "positive": 0}, 0, {"first_token": by_label}, False, **COMMON
        )
        for i, by_label in enumerate(dict(zip(SENTIMENT.labels, of_row, strict=True)) for of_row in masses)
    ]
    predictions.replace(path, rows)
    return np.array(masses).max(axis=1)


def test_agreement_approaches_the_probability_as_one_over_the_root_of_the_draws(tmp_path):
    n = 3000
    p = first_token_file(tmp_path / "p.jsonl", n)
    pairs = converge(tmp_path / "p.jsonl", [10, 100, 1000], SENTIMENT, lambda row: 7000 + int(row.id))
    shown = convergence_table(pairs).splitlines()[2:]
    for (size, found), line in zip(pairs.items(), shown, strict=True):
        assert found.shape == (n, 2) and found[:, 0] == pytest.approx(p)
        measured, binomial = np.sqrt(((found[:, 1] - p) ** 2).mean()), np.sqrt((p * (1 - p)).mean() / size)
        # A mean of 3,000 squares of nearly normal distances varies by sqrt(2 / 3000), its root by half of that, 1.3 %.
        assert abs(measured / binomial - 1) < 4 * 0.5 * math.sqrt(2 / n)
        assert abs((found[:, 1] - p).mean()) < 4 * binomial / math.sqrt(n)
        *numbers, low, to, high = line.split()
        assert numbers == [f"{size:,}", f"{measured:.4f}", f"{binomial:.4f}"] and to == "to"
        # 1.96 of those standard deviations to either side, as well as 1,000 simulated tables can tell.
        assert [float(low), float(high)] == pytest.approx(
            [binomial * (1 + z * math.sqrt(0.5 / n)) for z in (-1.96, 1.96)], rel=6e-3
        )
        assert (np.round(found[:, 1] * size, 6) % 1 == 0).all()


def test_a_table_of_first_token_draws_prints_how_they_converge_and_draws_it(call):
    rows = [*examples(15), Example("empty", " ", None)]
    write_csv("t.csv", rows)
    command = "--first-token --samples 100,10,1000 --input t.csv --output draws.jsonl"
    code, out, err = call(f"{command} --figure shown.png")
    assert code == 0 and "asked about 16 rows" in err
    found = records("draws.jsonl")
    assert all(sum(row["votes"].values()) + row["unparsed"] == 1000 for row in found[:-1]) and "error" in found[-1]
    table = [line.split() for line in out.splitlines() if re.match(r"    (10|100|1,000) ", line)]
    assert [cells[0] for cells in table] == ["10", "100", "1,000"] and "n = 15 rows" in out
    p = np.array([max(row["first_token"].values()) for row in found[:-1]])
    last = np.array([row["votes"][max(row["first_token"], key=row["first_token"].get)] for row in found[:-1]]) / 1000
    assert float(table[2][1]) == pytest.approx(np.sqrt(((last - p) ** 2).mean()), abs=5e-5)
    assert float(table[2][2]) == pytest.approx(np.sqrt((p * (1 - p)).mean() / 1000), abs=5e-5)
    picture = Path("shown.png").read_bytes()
    assert picture.startswith(b"\x89PNG") and len(picture) > 20_000 and out.splitlines()[-1] == "shown.png"
    # The ten are the first ten of the thousand, so a run of ten alone votes like the first ten.
    code, _, _ = call("--first-token --samples 10 --input t.csv --output ten.jsonl")
    ten = records("ten.jsonl")
    distance = np.array(
        [row["votes"][max(row["first_token"], key=row["first_token"].get)] / 10 for row in found_only(ten)]
    )
    assert code == 0 and float(table[0][1]) == pytest.approx(np.sqrt(((distance - p) ** 2).mean()), abs=5e-5)
    # Repeating the command draws nothing anew and says the same.
    before = stamp("draws.jsonl")
    assert call(command)[:2] == (0, out.removesuffix("shown.png\n")) and stamp("draws.jsonl") == before


def found_only(rows):
    return [row for row in rows if "first_token" in row]


def test_a_table_without_a_single_text_has_nothing_to_converge(call):
    write_csv("t.csv", [Example("1", " ", None)])
    code, out, _ = call("--first-token --samples 10,100 --input t.csv --output p.jsonl --figure p.png")
    assert code == 0 and "0 of 1 rows scored, 1 with an error" in out and "draws" not in out
    assert not Path("p.png").exists()


def test_first_token_draws_of_whole_answers_leave_room_for_them(talker):
    # Answers of several tokens are scored whole: a prompt that fills the context has no place for the second token.
    task = Task("t", {"good": ("not positive",), "bad": ("negative",)}, "{text}\nMood:", scoring="sequence")
    frame = talker.task_prompt(task)
    text = "a" + " a" * 600
    while len(talker.encode(frame, text)) > 512:
        text = text.removesuffix(" a")
    assert len(talker.encode(frame, text)) == 512
    sampler = prepare(talker, task, Sampling(50, first_token=True))
    full, fits = draw_first_tokens([Example("1", text, None), Example("2", "a", None)], sampler)
    assert "the model reads 511" in full.error
    ids = talker.encode(frame, "a")
    first, second = talker.tokenizer(" not positive").input_ids
    path = talker.next_token_log_probs(ids)[first] + talker.next_token_log_probs([*ids, first])[second]
    capital = talker.tokenizer(" Not positive").input_ids
    other = talker.next_token_log_probs(ids)[capital[0]]
    assert fits.extras["first_token"]["good"] == pytest.approx(np.exp(path), rel=1e-3) and np.exp(other) < 1e-6


# The function, and a text explained


def test_the_function_gives_the_label_its_agreement_and_the_counts(talker):
    label, agreement, counts = get_consistency_confidence("warm and funny", 20, llama=talker, seed=5)
    (row,) = sampled(talker, [Example("", "warm and funny", None)], samples=20, seed=5)
    assert (type(label), type(agreement), type(counts)) == (str, float, dict)
    assert list(counts) == ["negative", "positive", "unparsed"] and sum(counts.values()) == 20
    assert counts == row.extras["votes"] | {"unparsed": row.extras["unparsed"]} and counts["unparsed"] > 0
    assert agreement == counts[label] / 20 == row.extras["agreement"] and label == row.prediction
    assert get_consistency_confidence("warm and funny", 20, llama=talker, seed=5) == (label, agreement, counts)
    others = [get_consistency_confidence("warm and funny", 20, llama=talker, seed=seed)[2] for seed in (6, 7, 8)]
    assert any(other != counts for other in others)
    cold = get_consistency_confidence("warm and funny", 20, 1e-3, talker, SENTIMENT)
    assert sorted(cold[2].values()) == [0, 0, 20] and cold[1] == 1.0
    with pytest.raises(ValueError, match="empty"):
        get_consistency_confidence(" \n", llama=talker)
    for samples, temperature, problem in ((1, 1, "at least twice"), (0, 1, "twice"), (10, 0, "above 0"), (10, -1, "0")):
        with pytest.raises(ValueError, match=problem):
            get_consistency_confidence("warm", samples, temperature, talker)
    with pytest.raises(ValueError, match="none of 2 answers names a label"):
        get_consistency_confidence("warm", 2, llama=talker, task=YES_NO)


def test_without_a_model_the_function_asks_the_default_one(talker, monkeypatch):
    asked = []
    monkeypatch.setattr(consistency_confidence, "default_llama", lambda settings: asked.append(settings) or talker)
    assert get_consistency_confidence("warm and funny", seed=5)[0] in SENTIMENT.labels
    assert [json.loads(settings) for settings in asked] == [SENTIMENT.settings()]


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
        labels = [answer["label"] for answer in row["answers"]]
        assert [list(answer) for answer in row["answers"]] == [["answer", "label", "wording"]] * 12
        assert labels == [parse_answer(answer["answer"], SENTIMENT) for answer in row["answers"]]
        assert row["votes"] == {label: labels.count(label) for label in SENTIMENT.labels}
        assert row["unparsed"] == labels.count(None) and row["calls"] == 12
        first = max(row["votes"].values())
        assert row["agreement"] == first / 12 == pytest.approx(row["total_probability"])
        assert (row["agreement_low"], row["agreement_high"]) == jeffreys_interval(first, 12)
        assert row["confidence"] == row["probabilities"][row["prediction"]] == first / (12 - row["unparsed"])
        assert row["label_mass"] == (12 - row["unparsed"]) / 12
        assert row["fingerprint"] == prepare(talker, SENTIMENT, Sampling(12)).fingerprint


def test_the_printed_explanation_shows_the_answers_the_votes_and_the_verdict(call, talker):
    code, out, _ = call("--samples 12", "warm and funny")
    row = explain("warm and funny", prepare(talker, SENTIMENT, Sampling(12)))
    lines = out.splitlines()
    assert code == 0 and lines[0] == "Text: warm and funny"
    for label, count in [*row["votes"].items(), ("unparsed", row["unparsed"])]:
        (line,) = [line for line in lines if line.split()[1:2] == [label] and line.split()[0].isdigit()]
        said = [a["answer"].strip() for a in row["answers"] if (a["label"] or "unparsed") == label]
        assert int(line.split()[0]) == count == len(said)
        for answer, times in Counter(said).most_common(4):
            assert f'"{answer}"' + (f" {times}" if times > 1 else "") in line
    first, agreement = row["votes"][row["prediction"]], 100 * row["agreement"]
    low, high = (100 * bound for bound in jeffreys_interval(first, 12))
    verdict = f"  Verdict: {row['prediction']}, agreement {agreement:.1f} % ({first} of 12; 95 % Jeffreys interval "
    verdict += f"{low:.1f} to {high:.1f} %)"
    assert verdict in lines
    last = f"  confidence {100 * row['confidence']:.1f} % among the answers that name a label, "
    last += f"label mass {100 * row['label_mass']:.1f} %, vote entropy {row['vote_entropy']:.2f} nats, 12 calls"
    assert last in lines
    code, out, _ = call("--samples 12 --adaptive", "warm and funny")
    assert code == 0 and "Jeffreys" not in out and "Verdict: " in out
    code, out, _ = call("--first-token --samples 1000", "warm and funny")
    p = shares_of(talker, SENTIMENT, "warm and funny")
    shown = ", ".join(f"P({label}) {100 * p[label]:.2f} %" for label in SENTIMENT.labels)
    assert code == 0 and f"  drawn from the first token's distribution: {shown}" in out.splitlines()
    code, out, _ = call("--first-token --samples 10,1000 --json", "warm and funny")
    by_draws, votes = json.loads(out)["agreement_by_draws"], json.loads(out)["votes"]
    most = max(p, key=p.get)
    assert by_draws["1000"] == votes[most] / 1000 and abs(by_draws["1000"] - p[most]) < 4 * 0.5 / math.sqrt(1000)
    code, out, _ = call("--first-token --samples 10,1000", "warm and funny")
    line = f"  {most} in {100 * by_draws['10']:.1f} % of 10, {100 * by_draws['1000']:.1f} % of 1,000 draws; "
    assert code == 0 and f"{line}its probability is {100 * p[most]:.2f} %" in out.splitlines()
    assert ", 1 call" in out and "of 1000; 95 % Jeffreys interval" in out


def test_neither_a_text_nor_an_answer_can_command_the_terminal(call, talker, monkeypatch):
    hostile = ["\x1b[2J positive", "positive\x07 and positive\u202e"]
    monkeypatch.setattr(talker, "sample", lambda rows, seeds, *_: [[*hostile] for _ in rows])
    code, out, _ = call("--samples 2", "\x1b[2J red \x07")
    assert code == 0 and "Text: \\x1b[2J red \\x07" in out and '"\\x1b[2J positive"' in out
    assert "\x1b" not in out and "\x07" not in out and "\u202e" not in out


def test_a_text_whose_answers_name_no_label_is_one_line(call):
    assert_one_line(call("--task sentiment-yes-no --samples 3", "warm"), "none of 3 answers names a label, as '")


# A table of texts


def stamp(*paths):
    return [(Path(p).read_bytes(), Path(p).stat().st_mtime_ns, Path(p).stat().st_ino) for p in paths]


def test_a_killed_run_is_continued_by_another_process_to_the_same_bytes(run, talker, tmp_path, capsys):
    folder = tmp_path / "talker"
    talker.model.save_pretrained(folder)
    talker.tokenizer.save_pretrained(folder)
    rows, output = examples(30), tmp_path / "p.jsonl"
    write_csv(tmp_path / "t.csv", rows)
    command = ["--input", tmp_path / "t.csv", "--output", output, "--model", folder, "--samples", 5, "--device", "cpu"]
    main([*map(str, command)])
    shown = capsys.readouterr()
    assert "asked about 30 rows in " in shown.err
    whole, found = output.read_bytes(), records(output)
    assert [(row["id"], row["text"], row["label"]) for row in found] == [(e.id, e.text, e.label) for e in rows]
    assert [row["answers"] for row in found] == [row.extras["answers"] for row in sampled(talker, rows, samples=5)]
    lines = whole.splitlines(keepends=True)
    output.write_bytes(b"".join(lines[:11]) + lines[11][:200])  # a kill in the middle of a row
    done = run("consistency_confidence.py", *command, env=ONE_THREAD)
    assert done.returncode == 0 and output.read_bytes() == whole
    assert "asked about 19 rows in " in done.stderr and done.stdout == shown.out


def test_a_run_that_stopped_at_any_byte_ends_with_the_bytes_of_an_unbroken_one(call, monkeypatch):
    monkeypatch.setattr(consistency_confidence, "ROWS_PER_WINDOW", {"cpu": 4})
    write_csv("t.csv", [*examples(9), Example("empty", "", None)])
    for flags in ("--samples 4", "--adaptive", "--paraphrase --samples 5", "--first-token --samples 50"):
        command = f"--input t.csv --output p.jsonl --overwrite {flags}"
        assert call(command)[0] == 0
        whole = Path("p.jsonl").read_bytes()
        assert whole.count(b"\n") == 10
        for end in [0, *random.Random(0).sample(range(len(whole)), 2), len(whole) - 1]:
            Path("p.jsonl").write_bytes(whole[:end])
            assert call(command)[0] == 0 and Path("p.jsonl").read_bytes() == whole, (flags, end)
        before = stamp("p.jsonl")
        code, _, err = call(command)
        assert (code, err) == (0, "") and stamp("p.jsonl") == before


def test_other_settings_are_refused_and_the_file_left_alone(call):
    write_csv("t.csv", examples(3))
    command = "--input t.csv --output p.jsonl --samples 4"
    assert call(command)[0] == 0
    before = stamp("p.jsonl")
    others = ["--seed 1", "--temperature 0.5", "--adaptive", "--paraphrase", "--max-tokens 3", "--first-token"]
    others += ["--truncate", "--samples 5", "--task sentiment-yes-no"]
    for other in others:
        assert_one_line(call(f"{command} {other}"), "--overwrite")
        assert stamp("p.jsonl") == before, other
    assert call(f"{command} --seed 1 --overwrite")[0] == 0 and stamp("p.jsonl") != before
    assert call(f"{command} --seed 1 --batch-size 1 --overwrite")[0] == 0  # how rows run together is no setting


def test_the_report_counts_every_answer_that_was_asked_for(call, talker, monkeypatch):
    answers = [["positive"] * 4, ["positive", "negative", "mixed", "positive"], ["mixed"] * 4, ["negative"] * 4]
    monkeypatch.setattr(talker, "sample", lambda rows, seeds, *_: answers)
    labels = ["positive", "negative", "negative", "negative"]
    write_csv("t.csv", [*(Example(str(i), "x", label) for i, label in enumerate(labels)), Example("e", " ", None)])
    code, out, _ = call("--input t.csv --output p.jsonl --samples 4")
    assert code == 0 and "p.jsonl: 3 of 5 rows scored, 2 with an error" in out
    # Those without a single vote cost as much as the others: 16 answers to 4 texts, of which 5 name no label.
    assert "unanimous in 50.0% of the rows; 31.2% of 16 answers unparsed; 16 calls, 4.0 a row" in out
    assert "mean agreement 0.625" in out  # 1, 1/2, 0 and 1
    low, high = binomtest(2, 3).proportion_ci(0.95, "exact")
    assert f"accuracy 0.667, 95 % exact interval {low:.3f} to {high:.3f}, n = 3 labelled rows" in out


def test_a_model_that_does_not_sample_is_noticed(call, talker, monkeypatch):
    write_csv("t.csv", examples(20))
    warned = "warning: no row has two different answers; does this model really sample?"
    assert warned not in call("--input t.csv --output p.jsonl --samples 4")[1]
    monkeypatch.setattr(talker, "sample", lambda rows, seeds, *_: [["positive"] * len(of_row) for of_row in seeds])
    assert warned in call("--input t.csv --output q.jsonl --samples 4")[1]
    assert warned not in call("--input t.csv --output r.jsonl --samples 4 --limit 19")[1]


# Counting again


COUNTED = ("id", "text", "label", "prediction", "confidence", "probabilities", "label_mass", "votes", "unparsed")
COUNTED += ("calls", "answers", "agreement", "agreement_low", "agreement_high", "vote_entropy", "sampling")


@pytest.fixture
def fixed(call):
    """A finished run of ten answers to each of 25 texts, and of one that is empty."""
    write_csv("t.csv", [*examples(25), Example("empty", " ", None)])
    assert call("--input t.csv --output fixed.jsonl")[0] == 0
    return records("fixed.jsonl")


def test_recounting_adaptively_is_what_asking_adaptively_would_have_been(call, fixed, no_model):
    assert call("--input t.csv --output adaptive.jsonl --adaptive")[0] == 0
    no_model()
    code, out, err = call("--recount fixed.jsonl --adaptive --output recounted.jsonl")
    assert (code, err) == (0, "")
    asked, counted = records("adaptive.jsonl"), records("recounted.jsonl")
    for a, b in zip(asked, counted, strict=True):
        assert [a.get(name) for name in COUNTED] == [b.get(name) for name in COUNTED]
        assert a.get("error") == b.get("error")
    used = sum(row.get("calls", 0) for row in counted)
    changed = sum(a["prediction"] != b["prediction"] for a, b in zip(fixed, counted, strict=True))
    assert 100 < used < 250
    assert (
        f"recounted from fixed.jsonl: {used} of 250 answers used ({1 - used / 250:.1%} saved); {changed} of 26" in out
    )
    assert len({row["fingerprint"] for row in [fixed[0], asked[0], counted[0]]}) == 3


def test_answers_that_never_decide_are_all_used_and_no_more(call, fixed, talker, monkeypatch):
    undecided = [["positive", "negative"] * 5, ["mixed"] * 10, ["positive", "negative"] * 4 + ["mixed"] * 2]
    rows = [row | {"answers": answers} for row, answers in zip(fixed, undecided, strict=False)]
    Path("even.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    code, out, _ = call("--recount even.jsonl --adaptive --output counted.jsonl")
    assert code == 0 and "30 of 30 answers used (0.0% saved)" in out
    counted = records("counted.jsonl")
    assert [row["answers"] for row in counted] == undecided and [row["unparsed"] for row in counted] == [0, 10, 2]
    assert [row["prediction"] for row in counted] == ["negative", None, "negative"]
    # So it is when a model is asked, where an answer too many would be paid for.
    asked = []
    monkeypatch.setattr(talker, "sample", lambda rows, seeds, *_: asked.extend(seeds) or [["mixed"] * len(seeds[0])])
    assert "10 calls" in call("--input t.csv --output p.jsonl --adaptive --limit 1")[1] and sum(map(len, asked)) == 10


def test_recounting_fewer_answers_is_what_asking_for_fewer_would_have_been(call, fixed, no_model):
    assert call("--input t.csv --output five.jsonl --samples 5")[0] == 0
    no_model()
    code, out, _ = call("--recount fixed.jsonl --samples 5 --output recounted.jsonl")
    assert code == 0 and "125 of 250 answers used (50.0% saved)" in out
    for a, b in zip(records("five.jsonl"), records("recounted.jsonl"), strict=True):
        assert [a.get(name) for name in COUNTED] == [b.get(name) for name in COUNTED]
    before = stamp("recounted.jsonl")
    code, again, err = call("--recount fixed.jsonl --samples 5 --output recounted.jsonl")
    assert (code, again, err) == (0, out, "") and stamp("recounted.jsonl") == before
    assert_one_line(call("--recount fixed.jsonl --samples 4 --output recounted.jsonl"), "--overwrite")
    # All of them again is the same votes, and a recount can be recounted.
    assert call("--recount fixed.jsonl --output all.jsonl")[0] == 0
    assert [row.get("votes") for row in records("all.jsonl")] == [row.get("votes") for row in fixed]
    assert call("--recount recounted.jsonl --samples 2 --output two.jsonl")[0] == 0
    assert records("two.jsonl")[3]["answers"] == fixed[3]["answers"][:2]


def test_the_answers_of_an_adaptive_run_stay_without_an_interval(call, fixed, no_model):
    assert call("--input t.csv --output adaptive.jsonl --adaptive")[0] == 0
    no_model()
    assert call("--recount adaptive.jsonl --output again.jsonl")[0] == 0
    again = records("again.jsonl")
    assert [row.get("votes") for row in again] == [row.get("votes") for row in records("adaptive.jsonl")]
    assert all(row.get("agreement_low") is None for row in again)


def test_a_recount_that_can_not_be_done_is_one_line_and_writes_nothing(call, fixed, talker, no_model):
    rows = examples(3)
    scored = logprobs_confidence.score(rows, logprobs_confidence.prepare(talker, SENTIMENT))
    failed = predictions.failed(
        "e", " ", None, "the text is empty", **COMMON | {"task": "sentiment", "fingerprint": "f"}
    )
    predictions.replace("one.jsonl", scored)
    predictions.replace("errors.jsonl", [failed])
    assert call("--first-token --input t.csv --output drawn.jsonl --samples 20")[0] == 0
    assert call("--input t.csv --output short.jsonl --samples 3")[0] == 0
    no_model()
    lines = [json.dumps(row) for row in fixed]
    edited = {
        "none.jsonl": fixed[1] | {"answers": []},
        "number.jsonl": fixed[1] | {"answers": [1]},
        "text.jsonl": fixed[1] | {"answers": "positive"},
        "other.jsonl": fixed[1] | {"fingerprint": "ffffffff"},
        "fewer.jsonl": fixed[1] | {"answers": fixed[1]["answers"][:4]},
    }
    for name, row in edited.items():
        Path(name).write_text("\n".join([lines[0], json.dumps(row), *lines[2:]]) + "\n", encoding="utf-8")
    Path("torn.jsonl").write_text("\n".join(lines), encoding="utf-8")
    Path("blank.jsonl").write_text("", encoding="utf-8")
    before = sorted(Path().iterdir())
    refused = {
        "--recount one.jsonl": "one.jsonl stores no answers; only those of consistency_confidence.py can be recounted",
        "--recount drawn.jsonl": "drawn.jsonl stores no answers",
        "--recount errors.jsonl": "errors.jsonl stores no answers",
        "--recount fixed.jsonl --samples 11": "row 'r0' has 10 answers; more than these only a model can give",
        "--recount short.jsonl --samples 5 --adaptive": "row 'r0' has 3 answers",
        "--recount fewer.jsonl --samples 5": "row 'r1' has 4 answers",
        "--recount none.jsonl": "row 'r1' stores no answers",
        "--recount number.jsonl": "row 'r1' stores no answers",
        "--recount text.jsonl": "row 'r1' stores no answers",
        "--recount other.jsonl": "row 'r1' is of another run than the first",
        "--recount torn.jsonl": "torn.jsonl line 26 is cut off",
        "--recount blank.jsonl": "blank.jsonl holds no predictions",
        "--recount t.csv": "t.csv line 1 is not a prediction",
        "--recount missing.jsonl": "missing.jsonl: No such file or directory",
        "--recount fixed.jsonl --task sentiment-yes-no": "fixed.jsonl answers task 'sentiment', not 'sentiment-yes-no'",
        "--recount fixed.jsonl --samples 1": "ask at least twice",
        "--recount fixed.jsonl --samples 2,3": "only with --first-token",
        "--recount fixed.jsonl --input t.csv": "--recount counts stored answers without a model; --input",
        "--recount fixed.jsonl --first-token": "--first-token has no part in it",
        "--recount fixed.jsonl --temperature 0.5": "--temperature has no part in it",
        "--recount fixed.jsonl x": "a text has no part in it",
    }
    for command, named in refused.items():
        assert_one_line(call(f"{command} --output new.jsonl"), named)
        assert sorted(Path().iterdir()) == before, command
    assert_one_line(call("--recount fixed.jsonl"), "--output")
    assert_one_line(call("--recount fixed.jsonl --output fixed.jsonl"), "both input and output")
    assert records("fixed.jsonl") == fixed


# With a calibrator


def save(path, fingerprint, method="consistency", seen=("x",)):
    """A calibrator file with logit P = logit(c) / 2 - 1/2, and 0.6 as its threshold."""
    platt = PlattScalingCalibrator()
    platt.slope_, platt.intercept_ = 0.5, -0.5
    identity = (fingerprint, "talker", "sentiment", 100, 90)
    keys = frozenset(map(text_key, seen))
    fitted = FittedCalibrator(
        Recipe("platt", False), platt, tuple(SENTIMENT.labels), *identity, keys, {}, {"value": 0.6}
    )
    save_calibrator(path, fitted)
    return path


def test_a_calibrator_adds_its_confidence_and_decision_to_a_table_and_to_a_text(call, talker, no_model):
    rows = [*examples(12), Example("empty", " ", None)]
    write_csv("t.csv", rows)
    assert call("--input t.csv --output plain.jsonl --samples 8")[0] == 0
    plain = records("plain.jsonl")
    save("k.json", plain[0]["fingerprint"], seen=[rows[2].text.upper()])
    code, out, _ = call("--input t.csv --output p.jsonl --samples 8 --calibrator k.json")
    assert code == 0
    added = ("calibrated_confidence", "decision", "fitted_on")
    decisions = Counter()
    for before, row in zip(plain, records("p.jsonl"), strict=True):
        assert {name: value for name, value in row.items() if name not in added} == before
        if before["prediction"] is None:
            assert not any(name in row for name in added)
            continue
        # A vote is smoothed before its logit is taken: eight of eight answers are no certainty.
        c = (max(before["votes"].values()) + 0.5) / (sum(before["votes"].values()) + 1)
        expected = 1 / (1 + math.exp(0.5 - 0.5 * math.log(c / (1 - c))))
        assert row["calibrated_confidence"] == pytest.approx(expected, abs=1e-12)
        assert row["decision"] == ("automate" if row["calibrated_confidence"] >= 0.6 else "review")
        decisions[row["decision"]] += 1
    assert [row["id"] for row in records("p.jsonl") if row.get("fitted_on")] == ["r2"]
    assert decisions["automate"] and decisions["review"]
    assert f"calibrated: automate {decisions['automate']}, not scored 1, review {decisions['review']} " in out
    # A text alone has other seeds than in a table, but the same calibrator.
    code, out, _ = call("--json --samples 8 --calibrator k.json", rows[0].text)
    row = json.loads(out)
    fitted = load_calibrator("k.json")
    common = COMMON | {"model": "talker", "task": "sentiment", "fingerprint": fitted.fingerprint}
    same = predictions.scored("", "", None, row["probabilities"], 1.0, **common, extras={"votes": row["votes"]})
    assert code == 0 and row["calibrated_confidence"] == fitted.calibrate([same])[0]
    code, out, _ = call("--samples 8 --calibrator k.json --threshold 1", rows[0].text)
    assert code == 0 and f"  Calibrated confidence {100 * row['calibrated_confidence']:.2f} %: review" in out
    # Recounted answers are other predictions, for which this calibrator is not.
    no_model()
    assert call("--recount plain.jsonl --samples 4 --output four.jsonl")[0] == 0
    save("four.json", records("four.jsonl")[0]["fingerprint"])
    code, out, _ = call("--recount plain.jsonl --samples 4 --output four.jsonl --calibrator four.json")
    assert code == 0 and "calibrated: " in out
    assert all("decision" in row for row in records("four.jsonl") if row["prediction"])


def test_a_calibrator_of_method_1_or_of_other_sampling_is_refused_before_any_answer(call, talker, monkeypatch):
    write_csv("t.csv", examples(3))
    save("one.json", logprobs_confidence.prepare(talker, SENTIMENT).fingerprint)
    save("five.json", prepare(talker, SENTIMENT, Sampling(5)).fingerprint)
    monkeypatch.setattr(consistency_confidence, "sample_window", lambda *_: pytest.fail("the model ran"))
    for name in ("one.json", "five.json"):
        for command in ("--input t.csv --output p.jsonl", "warm"):
            assert_one_line(call(f"{command} --calibrator {name}"), "fit a calibrator on predictions like these")
    assert not Path("p.jsonl").exists()


# Bad input, as a user types it


BAD = {
    "--samples 1 x": "agreement of one is no confidence; ask at least twice",
    "--samples 0 x": "at least twice",
    "--samples -3 x": "at least twice",
    "--samples x x": "--samples x: a number, or with --first-token several",
    "--samples 10, x": "--samples 10,: a number",
    "--samples 2.5 x": "--samples 2.5",
    "--samples 10,100 x": "several numbers only with --first-token",
    "--samples 10,1 --first-token x": "at least twice",
    "--temperature 0 x": "the temperature is 0; at 0 all answers are the same",
    "--temperature -1 x": "the temperature is -1;",
    "--temperature nan x": "the temperature is nan;",
    "--temperature inf x": "at most 100",
    "--temperature warm x": "--temperature",
    "--max-tokens 0 x": "an answer of 0 tokens names no label",
    "--seed -1 x": "--seed",
    "--choice x": "--choice is for servers that force answers (--endpoint)",
    "--first-token --endpoint http://127.0.0.1:9/v1 x": "from a model loaded here",
    "--first-token --adaptive x": "draws a fixed number at temperature 1",
    "--first-token --temperature 0.5 x": "draws a fixed number at temperature 1",
    "--figure p.png x": "--figure NAME.png shows --first-token on a table",
    "--figure p.png --first-token x": "--figure NAME.png shows --first-token on a table",
    "--figure p.pdf --first-token --input t.csv --output p.jsonl": "--figure NAME.png",
    "--figure p.png --first-token --paraphrase --input t.csv --output p.jsonl": "asked in one wording",
    "--batch-size 0 x": "--batch-size 0: at least 1",
    "--api-key-env KEY x": "--api-key-env needs --endpoint",
    "": "give either texts or a table",
    "x --input t.csv --output p.jsonl": "give either texts or a table",
    "--input t.csv": "--input and --output go together",
    "--json --input t.csv --output p.jsonl": "--json is for texts",
    "--input missing.csv --output p.jsonl": "no such file: missing.csv",
    "--input t.csv --output t.csv": "both input and output",
    "--input t.csv --output nowhere/p.jsonl": "does not exist",
    "--task mood x": "no task 'mood'",
    "--threshold 0.5 x": "needs --calibrator",
    "--calibrator missing.json x": "missing.json: No such file or directory",
    "--endpoint anthropic --batch-size 2 x": "--batch-size is for models loaded here",
}


@pytest.mark.parametrize(("command", "named"), BAD.items())
def test_a_bad_command_is_one_line_and_exit_code_2_before_any_model_is_loaded(command, named, call, no_model):
    write_csv("t.csv", examples(2))
    no_model()
    assert_one_line(call(command), named)
    assert [path.name for path in Path().iterdir()] == ["t.csv"]


def test_an_empty_text_is_one_line_and_so_it_is_for_a_process(call, run, no_model):
    no_model()
    assert_one_line(call("fine", " "), "text 2 is empty")
    done = run("consistency_confidence.py", "--samples", "1", "fine")
    assert_one_line((done.returncode, done.stdout, done.stderr), "ask at least twice (--help lists the flags)")


def test_help_names_every_flag_without_loading_torch(run):
    code = "import sys, consistency_confidence as c\ntry: c.main(['--help'])\nexcept SystemExit: pass\n"
    done = run("-c", code + "print(*sorted({'torch', 'transformers', 'openai'} & set(sys.modules)))")
    assert done.returncode == 0 and done.stdout.splitlines()[-1] == ""
    for flag in (
        "--samples",
        "--adaptive",
        "--paraphrase",
        "--first-token",
        "--recount",
        "--figure",
        "--choice",
        "--seed",
    ):
        assert flag in done.stdout


# What only a trained model can show


@pytest.fixture(scope="module")
def real(embedded):
    """Twenty answers each to a text of two minds and to a clear one, with P of each label."""
    rows = [Example("1", "Best worst thing ever", None), Example("2", "I want my money back, this is rubbish.", None)]
    answered_rows = sample_window(rows, prepare(embedded, SENTIMENT, Sampling(20, max_tokens=4)))
    return answered_rows, logprobs_confidence.score(rows, logprobs_confidence.prepare(embedded, SENTIMENT))


def test_the_real_model_gives_different_answers_to_an_ambiguous_text(real):
    row = real[0][0]
    assert len(set(row.extras["answers"])) >= 2 and min(row.extras["votes"].values()) >= 2
    assert row.extras["agreement"] < 0.9 and row.extras["agreement_low"] < 0.7


def test_the_real_model_agrees_with_itself_about_a_clear_text(real):
    row = real[0][1]
    assert row.prediction == "negative" and row.extras["agreement"] >= 0.8 and row.extras["unparsed"] <= 3


def test_the_real_model_s_votes_are_draws_from_its_own_probability(real):
    for sampled_row, scored in zip(*real, strict=True):
        label = scored.prediction
        total = scored.confidence * scored.label_mass
        assert binomtest(sampled_row.extras["votes"][label], 20, total).pvalue > 1e-3
