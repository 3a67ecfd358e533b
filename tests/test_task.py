"""task.py: which answers count for a label, and how they sum.

The article's recorded token tables, reference vectors of other programs and brute-force enumeration say what is right;
nothing is compared with our own output.
"""

import json
import math
import re
from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from task import (
    TASKS,
    Answer,
    Example,
    Task,
    check_examples,
    debias,
    find_answers,
    label_probabilities,
    listed_probabilities,
    read_task,
    to_toml,
)

DATA = Path(__file__).parent / "data"
TABLES = json.loads((DATA / "article_token_tables.json").read_text(encoding="utf-8"))
YES_NO, SENTIMENT = TASKS["sentiment-yes-no"], TASKS["sentiment"]
TWO = {"labels": {"a": ("yes",), "b": ("no",)}, "template": "{text}\nAnswer:"}


def totals(task, tokens, log_probs):
    """Total probability per label of printed tokens, by our two functions."""
    counted = [(Answer(task.label_of(t), (i,), t), x) for i, (t, x) in enumerate(zip(tokens, log_probs, strict=True))]
    counted = [(answer, x) for answer, x in counted if answer.label]
    answers, log_probs = zip(*counted, strict=True)
    probabilities, mass = label_probabilities(np.array([log_probs]), answers, list(task.labels))
    return dict(zip(task.labels, probabilities[0] * mass[0], strict=True))


# The article's numbers


def test_the_articles_token_tables_sum_to_its_printed_totals():
    knock = Task("knock", {"who": ("Who",), "it": ("It",)}, "{text}")
    headlines = {"Knock knock.": 0.7577, "I love this movie!": 0.9999, "Best worst thing ever": 0.5211}
    headlines |= {"Not bad": 0.7831}
    for table in TABLES["first_token_tables"]:
        task = knock if table["text"] == "Knock knock." else YES_NO
        tokens = [entry["token"] for entry in table["top_tokens"]]
        ours = totals(task, tokens, [entry["logprob"] for entry in table["top_tokens"]])
        named = {"who": ours.get("who"), "yes": ours.get("positive"), "no": ours.get("negative")}
        printed = table["printed_totals"] or {"who": 0.7577}
        assert headlines.pop(table["text"]) == printed.get("yes", printed.get("who"))
        for name, total in printed.items():
            # Three decimals of a log-probability fix a probability to 0.05 %; the total is printed to 0.0001.
            assert abs(named[name] - total) <= 0.0005 * total + 0.0001, (table["text"], name)
    assert not headlines


@pytest.mark.parametrize("pair", TABLES["base_vs_fine_tuned"], ids=lambda pair: pair["label"])
@pytest.mark.parametrize(("side", "task"), [("base", YES_NO), ("fine_tuned", SENTIMENT)])
def test_the_article_s_base_and_fine_tuned_tables_give_its_verdicts(pair, side, task):
    tokens, probabilities = zip(*pair[side], strict=True)
    ours = totals(task, tokens, [math.log(p) if p else -math.inf for p in probabilities])
    percent, label = re.fullmatch(r"([\d.]+)% (\w+)", pair["printed"][side]).groups()
    assert max(ours, key=ours.get) == label
    assert abs(ours[label] - float(percent) / 100) <= 4 * 0.00005 + 1e-12  # three rounded terms and a rounded total


# Answers of the real tokenizer


def test_the_answer_tokens_of_the_default_tokenizer_are_these(tokenizer):
    golden = {
        "sentiment": {
            "negative": {3524: " negative", 17728: "negative", 26990: " Negative", 42529: "Negative"},
            "positive": {2731: " positive", 16185: "positive", 20085: " Positive", 31176: "Positive"},
        },
        "sentiment-yes-no": {
            "negative": {787: " no", 2838: " No", 4607: "no", 5230: "No", 10921: " NO", 13465: "NO"},
            "positive": {9230: " Yes", 9805: " yes", 10407: "yes", 10539: "Yes"},
        },
    }
    for name, expected in golden.items():
        answers = find_answers(TASKS[name], tokenizer, "Text: text\nSentiment:" if name == "sentiment" else "text\n")
        found = {label: {a.ids[0]: a.text for a in answers if a.label == label} for label in TASKS[name].labels}
        assert found == expected
        ids = [answer.ids for answer in answers]
        assert len(set(ids)) == len(ids) and all(len(i) == 1 for i in ids)
        for answer in answers:
            assert answer.ids[0] not in tokenizer.all_special_ids
            assert tokenizer.decode(answer.ids).strip().casefold() in TASKS[name].labels[answer.label]


def test_no_spelling_of_an_answer_word_in_the_vocabulary_is_missed(tokenizer):
    # The slow way round: every casing and spacing that could be one token, looked up one by one.
    vocabulary = tokenizer.get_vocab()
    answers = {a.ids[0] for a in find_answers(YES_NO, tokenizer, "text\n")}
    for word in ("yes", "no"):
        for letters in product(*((c, c.upper()) for c in word)):
            for space in ("", "\u0120", "\u010a", "\u0109"):  # nothing, blank, newline, tab in byte-level spelling
                token = space + "".join(letters)
                assert vocabulary.get(token) in answers | {None}, token


def test_a_label_that_is_not_one_token_is_refused_and_sequence_scoring_is_named(tokenizer):
    task = Task("t", {"good": ("good",), "bad": ("unsatisfactory experience",)}, "{text}\nVerdict:")
    with pytest.raises(ValueError, match=r"'unsatisfactory experience' of label 'bad'.*scoring = \"sequence\""):
        find_answers(task, tokenizer, "x\nVerdict:")
    shouted = Task("t", {"n": ("NEGATIVE",), "p": ("POSITIVE",)}, "{text}\nSentiment:")
    with pytest.raises(ValueError, match='scoring = "sequence"'):  # " POS" alone must not stand for " POSITIVE"
        find_answers(shouted, tokenizer, "x\nSentiment:")


def test_of_many_labels_only_the_first_is_shown_and_whole_answers_are_the_way(tokenizer):
    labels = {f"label {number}": (f"label {number}",) for number in range(51)}
    with pytest.raises(
        ValueError, match=r"^task 'many': 51 of the 51 labels .*'label 0'.*; set scoring = .sequence."
    ) as e:
        find_answers(Task("many", labels, "{text}\nTopic:"), tokenizer, "text\nTopic:")
    assert "'label 1'" not in str(e.value) and "choose words" not in str(e.value)


def test_all_answers_that_are_not_one_token_are_named_at_once_each_with_what_would_help(tokenizer):
    words = {"ABBR": ("ABBR",), "card_payment": ("card_payment",), "fine": ("fine",), "other_card": ("OTHER",)}
    task = Task("t", words | {"7": ("7",), "HUM": ("HUM", "human")}, "{text}\nType:")
    with pytest.raises(ValueError) as caught:
        find_answers(task, tokenizer, "x\nType:")
    message = str(caught.value)
    assert "'ABBR' of label 'ABBR' is ' AB' + 'BR';" in message  # nothing helps here but another word
    assert "'card_payment' of label 'card_payment' is ' card' + '_' + 'payment' ('payment' is one token);" in message
    assert "'OTHER' of label 'other_card' is ' OTHER'" not in message and "'fine' of label" not in message
    assert "'7' of label '7' is ' ' + '7' (one token after a template that ends with a newline);" in message
    assert "'HUM' of label 'HUM' is ' H' + 'UM' ('human' is one token);" in message
    assert 'scoring = "sequence"' in message and "\n" not in message
    cured = {"card": ("payment",), "HUM": ("human",), "7": ("7",)}
    find_answers(Task("t", cured, "{text}\nType:\n"), tokenizer, "x\nType:\n")


def test_sequence_answers_are_the_ids_that_follow_the_prompt_as_written_and_capitalised(tokenizer):
    task = Task("t", {"good": ("good",), "bad": ("very bad", "poor")}, "{text}\nVerdict:", scoring="sequence")
    rendered = "some text\nVerdict:"
    answers = find_answers(task, tokenizer, rendered)
    expected = {
        " good": "good",
        " Good": "good",
        " very bad": "bad",
        " Very bad": "bad",
        " poor": "bad",
        " Poor": "bad",
    }
    assert {a.text: a.label for a in answers} == expected
    for answer in answers:
        assert tokenizer(rendered).input_ids + list(answer.ids) == tokenizer(rendered + answer.text).input_ids
        assert tokenizer.decode(answer.ids) == answer.text


def test_a_prompt_whose_end_merges_with_the_answer_is_refused(tokenizer):
    task = Task("t", {"a": (")",), "b": ("yes",)}, "{text} (")  # "()" is one token
    with pytest.raises(ValueError, match="merges"):
        find_answers(task, tokenizer, "x (")


# Answers of any tokenizer


WORDS = ["yes", "no", "not", "on", "one", "an", "and", "so", "maybe", "y", "n"]


@pytest.fixture(scope="module")
def small_tokenizer():
    """A byte-level tokenizer of a few hundred tokens, for quick scans; one of its special tokens spells an answer."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.BPE())
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    spellings = [form for word in WORDS for form in (word, word.capitalize(), word.upper())]
    corpus = [space + word for word in spellings for space in ("", " ")] * 5
    trainer = trainers.BpeTrainer(
        vocab_size=500, special_tokens=["<s>", "no "], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    made.train_from_iterator(corpus, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="no ")


@st.composite
def tasks_with_answers(draw):
    words = draw(st.lists(st.sampled_from(WORDS), min_size=2, max_size=8, unique=True))
    n_labels = draw(st.integers(2, len(words)))
    labels = {f"label {k}": tuple(words[k::n_labels]) for k in range(n_labels)}
    return Task("t", labels, "{text}\nAnswer:")


def distribution(seed, size):
    logits = np.random.default_rng(seed).normal(0, 4, size)
    return logits - np.log(np.exp(logits).sum())


def label_totals(task, tokenizer, log_probs):
    answers = find_answers(task, tokenizer, "x\nAnswer:")
    p, mass = label_probabilities(log_probs[None, [a.ids[0] for a in answers]], answers, list(task.labels))
    return p[0] * mass[0]


@settings(deadline=None, max_examples=60)
@given(task=tasks_with_answers(), seed=st.integers(0, 2**32))
def test_label_totals_are_the_slow_sum_over_the_vocabulary(small_tokenizer, task, seed):
    log_probs = distribution(seed, len(small_tokenizer))
    expected = dict.fromkeys(task.labels, 0.0)
    for i, log_prob in enumerate(log_probs):
        for label, words in task.labels.items():
            if i not in small_tokenizer.all_special_ids and small_tokenizer.decode([i]).strip().casefold() in words:
                expected[label] += math.exp(log_prob)
    ours = label_totals(task, small_tokenizer, log_probs)
    assert ours == pytest.approx(list(expected.values()), rel=1e-12) and ours.sum() <= 1 + 1e-6


def test_an_answer_that_two_spellings_share_counts_once():
    # A tokenizer that reads everything in lower case gives "no" and "No" the same ids.
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {word: i for i, word in enumerate(["<unk>", "answer:", "not", "good", "fine", "x"])}
    made = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    made.normalizer, made.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.WhitespaceSplit()
    uncased = PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>")
    task = Task("t", {"bad": ("not good",), "good": ("fine",)}, "{text}\nAnswer:", scoring="sequence")
    ids = [answer.ids for answer in find_answers(task, uncased, "x\nAnswer:")]
    assert sorted(ids) == [(2, 3), (4,)]


# Sums of whole answers


SEQUENCES = [s for length in (1, 2, 3) for s in product(range(3), repeat=length)]


@settings(deadline=None, max_examples=150)
@given(
    seed=st.integers(0, 2**32),
    chosen=st.dictionaries(st.sampled_from(SEQUENCES), st.sampled_from(["a", "b", "c"]), min_size=1, max_size=12),
    impossible=st.booleans(),
)
def test_overlapping_sequences_sum_as_enumerating_every_text_does(seed, chosen, impossible):
    # Three tokens, texts of three tokens: each text belongs to the longest answer that it begins with.
    random = np.random.default_rng(seed)
    step = {s: random.dirichlet([0.7] * 3) for s in [(), *SEQUENCES] if len(s) < 3}
    if impossible:
        step = {s: np.array([0.0, p[0] + p[1], p[2]]) for s, p in step.items()}

    def probability(sequence):
        return math.prod(step[sequence[:i]][token] for i, token in enumerate(sequence))

    expected = dict.fromkeys("abc", 0.0)
    for text in product(range(3), repeat=3):
        beginnings = [text[:length] for length in (3, 2, 1) if text[:length] in chosen]
        if beginnings:
            expected[chosen[beginnings[0]]] += probability(text)
    answers = [Answer(label, sequence, "") for sequence, label in chosen.items()]
    with np.errstate(divide="ignore"):
        log_probs = np.log([[probability(answer.ids) for answer in answers]])
    p, mass = label_probabilities(log_probs, answers, list("abc"))
    assert mass[0] == pytest.approx(sum(expected.values()), abs=1e-12)
    if mass[0] > 1e-9:
        assert p[0] * mass[0] == pytest.approx(list(expected.values()), abs=1e-9)
        assert p[0].sum() == pytest.approx(1, abs=1e-12)


def test_rows_without_any_probability_are_nan_with_mass_zero_and_tiny_ones_keep_their_ratio():
    answers = [Answer("a", (1,), ""), Answer("b", (2,), "")]
    rows = [[-math.inf, -math.inf], [-math.inf, -1.0], [-1500.0, -1500.0 - math.log(3)]]
    p, mass = label_probabilities(np.array(rows), answers, ["a", "b"])
    assert np.isnan(p[0]).all() and mass[0] == 0
    assert p[1].tolist() == [0, 1] and mass[1] == pytest.approx(math.exp(-1))
    assert p[2] == pytest.approx([0.75, 0.25])  # both underflow as probabilities; their log ratio does not
    assert p.dtype == mass.dtype == np.float64


# Batch calibration


def test_batch_calibration_gives_the_reference_vectors():
    reference = json.loads((DATA / "reference_vectors.json").read_text(encoding="utf-8"))["label_priors"]
    probabilities, prior = np.array(reference["probs"]), np.array(reference["batch_prior"])
    assert probabilities.mean(axis=0) == pytest.approx(prior)
    assert debias(probabilities, prior) == pytest.approx(np.array(reference["batch_calibration"]), abs=1e-12)
    # By hand: (0.9, 0.1) seen with mean (0.6, 0.4) is 1.5 to 0.25, six to one.
    assert debias(np.array([[0.9, 0.1]]), np.array([0.6, 0.4]))[0] == pytest.approx([6 / 7, 1 / 7])


# What a server lists


ANSWER = Task("t", TWO["labels"], TWO["template"])
OF_THREE = Task("t3", {"a": ("yes", "sure"), "b": ("no",), "c": ("maybe",)}, TWO["template"])


def listing(**probabilities):
    """Tokens as a server lists them, from probabilities; _ in a name is a space."""
    return [(token.replace("_", " "), math.log(p)) for token, p in probabilities.items()]


def test_listed_tokens_of_all_labels_sum_and_what_is_not_listed_widens_the_label_mass():
    tokens = listing(yes=0.4, _Yes=0.15, YES_=0.05, _no=0.2, well=0.1)
    probabilities, mass, extras = listed_probabilities(tokens, ANSWER)
    # 0.6 and 0.2 are listed; the 0.1 that is not may all be other spellings of "no".
    assert probabilities == pytest.approx({"a": 2 / 3, "b": 1 / 3}, abs=1e-12) and list(probabilities) == ["a", "b"]
    assert mass == pytest.approx(0.8, abs=1e-12)
    assert list(extras) == ["label_mass_high"] and extras["label_mass_high"] == pytest.approx(0.9, abs=1e-12)


def test_other_marks_are_other_tokens_and_count_for_no_label():
    tokens = [*listing(yes=0.5, no=0.1), ("yes!", math.log(0.1)), ("'no", math.log(0.1)), ("ye", math.log(0.1))]
    tokens += [("\u0120yes", math.log(0.05))]  # a tokenizer's own mark for a space, which a server should not show
    probabilities, mass, _ = listed_probabilities(tokens, ANSWER)
    # "yes" 0.5 and "no" 0.1 of 0.95 listed, and 0.05 that is not
    assert probabilities["a"] == pytest.approx(0.5 / 0.65, abs=1e-12) and mass == pytest.approx(0.6, abs=1e-12)


def test_a_label_that_is_not_listed_has_the_most_it_can_have_so_the_confidence_is_a_lower_bound():
    probabilities, mass, extras = listed_probabilities(listing(yes=0.6, well=0.3), ANSWER)
    assert probabilities == pytest.approx({"a": 6 / 7, "b": 1 / 7}, abs=1e-12) and mass == pytest.approx(0.6, abs=1e-12)
    assert extras["missing"] == ["b"] and extras["label_mass_high"] == pytest.approx(0.7, abs=1e-12)
    probabilities, _, extras = listed_probabilities(listing(sure=0.3, yes=0.2, well=0.2), OF_THREE)
    assert probabilities == pytest.approx({"a": 0.625, "b": 0.1875, "c": 0.1875}, abs=1e-12)
    assert extras["missing"] == ["b", "c"]
    for of_b in (0, 0.1, 0.3):  # however the unlisted 0.3 are spread, the first label's share is no less
        for of_c in (0, 0.3 - of_b):
            assert 0.5 / (0.5 + of_b + of_c) >= probabilities["a"] - 1e-12
    middle, _, extras = listed_probabilities(listing(no=0.5, yes=0.3, well=0.1), OF_THREE)
    assert middle == pytest.approx({"a": 1 / 3, "b": 5 / 9, "c": 1 / 9}, abs=1e-12) and extras["missing"] == ["c"]


def test_where_what_is_not_listed_could_be_the_winner_there_is_no_answer():
    with pytest.raises(
        ValueError,
        match=r"^b not among the 2 tokens listed, and the 40.0% that is not listed could be it; --top-tokens lists m",
    ):
        listed_probabilities(listing(yes=0.3, well=0.3), ANSWER)
    with pytest.raises(ValueError, match=r"^b not among"):
        listed_probabilities([("yes", math.log(0.5))], ANSWER)  # a tie is no answer
    with pytest.raises(
        ValueError,
        match=r"^the 2 tokens listed give a 36.0% and b 33.0%, and the 31.0% that is not listed could be either's; --",
    ):
        listed_probabilities(listing(yes=0.36, no=0.33), ANSWER)
    assert listed_probabilities(listing(yes=0.36, no=0.33), ANSWER, complete=True)[0]["a"] == pytest.approx(36 / 69)
    tie = listed_probabilities(listing(yes=0.5, no=0.5), ANSWER, complete=True)[0]
    assert tie == {"a": 0.5, "b": 0.5}


@settings(deadline=None, max_examples=200)
@given(seed=st.integers(0, 2**32), n_listed=st.integers(1, 12))
def test_the_prediction_and_the_bound_hold_whatever_a_whole_distribution_hides_behind_its_list(seed, n_listed):
    random = np.random.default_rng(seed)
    spellings = ["yes", " yes", "Yes", "sure", "no", " no", "NO", "maybe", "Maybe ", "well", "hm", "x"]
    whole = dict(zip(spellings, random.dirichlet([0.3] * len(spellings)) + 1e-12, strict=True))
    truth = dict.fromkeys(OF_THREE.labels, 0.0)
    for text, p in whole.items():
        if label := OF_THREE.label_of(text):
            truth[label] += p
    listed = sorted(((text, math.log(p)) for text, p in whole.items()), key=lambda pair: -pair[1])[:n_listed]
    try:
        probabilities, mass, extras = listed_probabilities(listed, OF_THREE)
    except ValueError as error:
        assert "listed" in str(error)
        return
    true_mass = sum(truth.values())
    prediction = max(probabilities, key=probabilities.__getitem__)
    assert prediction == max(truth, key=truth.__getitem__)
    assert probabilities[prediction] <= truth[prediction] / true_mass + 1e-9
    assert mass <= true_mass + 1e-9 and true_mass <= extras["label_mass_high"] + 1e-9
    assert probabilities[prediction] * extras["label_mass_high"] <= truth[prediction] + 1e-9
    assert sum(probabilities.values()) == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("complete", [False, True])
def test_a_list_that_names_no_label_is_no_answer(complete):
    with pytest.raises(ValueError, match=r"^none of the 2 tokens listed names a label; they hold 90.0% of the mass$"):
        listed_probabilities(listing(well=0.6, hm=0.3), ANSWER, complete)
    with pytest.raises(ValueError, match=r"^none of the 0 tokens listed names a label; they hold 0.0% of the mass$"):
        listed_probabilities([], ANSWER, complete)


def test_a_complete_list_leaves_nothing_to_be_missing():
    tokens = listing(yes=0.2, no=0.1, well=0.1)
    probabilities, mass, extras = listed_probabilities(tokens, ANSWER, complete=True)
    assert probabilities == pytest.approx({"a": 2 / 3, "b": 1 / 3}, abs=1e-12)
    assert mass == extras["label_mass_high"] == pytest.approx(0.3, abs=1e-12) and "missing" not in extras
    alone, _, extras = listed_probabilities([("yes", math.log(0.1)), ("no", -9999.0)], ANSWER, complete=True)
    assert alone == {"a": 1.0, "b": 0.0} and "missing" not in extras


def test_a_remainder_that_is_rounding_is_at_most_the_last_token_listed():
    # The list sums to a little more than 1, so nothing seems to be left; the missing label may have what the last has.
    tokens = listing(yes=0.9, well=0.06, hm=0.0400001)
    probabilities, mass, extras = listed_probabilities(tokens, ANSWER)
    assert probabilities["b"] == pytest.approx(0.0400001 / 0.9400001, abs=1e-9) and extras["missing"] == ["b"]
    assert mass == pytest.approx(0.9) and extras["label_mass_high"] == pytest.approx(0.9400001, abs=1e-9)
    certain, mass, extras = listed_probabilities([("yes", 0.0), ("well", -25.0)], ANSWER)
    assert 0 < certain["b"] < 1e-10 and mass == extras["label_mass_high"] == 1.0
    over, mass, extras = listed_probabilities(listing(yes=0.7, no=0.3000002), ANSWER)
    assert mass == extras["label_mass_high"] == 1.0 and sum(over.values()) == pytest.approx(1, abs=1e-12)


# Prompts


def test_a_completion_prompt_is_examples_then_the_question():
    task = Task("t", {"a": ("yes",), "b": ("no",)}, "Q: {text}\nA:", "Answer.", (("one", "a"), (" two\n", "b")))
    assert task.prompt("{text} three ") == "Answer.\n\nQ: one\nA: yes\n\nQ: two\nA: no\n\nQ: {text} three\nA:"
    assert replace(task, template="Q: {text}\nA:\n").prompt("x").startswith("Answer.\n\nQ: one\nA:\nyes\n\n")
    assert replace(task, template='Q: {text}\nA: "').prompt("x").startswith('Answer.\n\nQ: one\nA: "yes\n\n')


def test_a_chat_prompt_is_turns_that_end_with_the_question():
    task = Task("t", {"a": ("yes",), "b": ("no",)}, "Q: {text}", "Answer.", (("one", "a"),), format="chat")
    roles = [(m["role"], m["content"]) for m in task.prompt("two")]
    assert [role for role, _ in roles] == ["user", "assistant", "user"]
    assert "Answer." in roles[0][1] and roles[1][1] == "yes" and roles[2][1].endswith("Q: two")


def test_answers_are_recognised_in_any_case_and_with_any_outer_space():
    task = Task("t", {"a": (" Stra\u00dfe", "yes"), "b": ("no",)}, "{text}:")
    for spelled in ("strasse", "STRASSE ", " stra\u00dfe", "YES", "\nyes"):
        assert task.label_of(spelled) == "a"
    for other in ("ye", "yes!", "yes no", "", "not"):
        assert task.label_of(other) is None


def test_settings_hold_everything_and_survive_json():
    a, b = SENTIMENT.settings(), replace(SENTIMENT, labels=dict(reversed(SENTIMENT.labels.items()))).settings()
    assert json.loads(json.dumps(a)) == a and a != b  # the order of labels breaks ties, so it counts
    assert set(a) == {"name", "labels", "template", "instruction", "examples", "format", "scoring"}


# Task definitions


TICKETS = """
name = "tickets"
template = "Ticket: {text}\\nTeam:"
[labels]
billing = ["billing"]
technical = ["technical", "tech"]
praise = "praise"
[[examples]]
text = "I was charged twice."
label = "billing"
"""


def test_a_task_file_is_read_as_written(tmp_path):
    (tmp_path / "tickets.toml").write_text(TICKETS, encoding="utf-8")
    task = read_task(str(tmp_path / "tickets.toml"))
    labels = {"billing": ("billing",), "technical": ("technical", "tech"), "praise": ("praise",)}
    assert (task.name, task.labels, task.examples) == ("tickets", labels, (("I was charged twice.", "billing"),))
    assert task.prompt("Hi") == "Ticket: I was charged twice.\nTeam: billing\n\nTicket: Hi\nTeam:"
    assert list(task.labels) == ["billing", "technical", "praise"]


def test_a_template_may_name_columns_which_then_make_up_the_text(tmp_path):
    columns = TICKETS.replace("Ticket: {text}", "Title: {title}\\nBody: {body}")
    (tmp_path / "t.toml").write_text("\ufeff" + columns, encoding="utf-8")  # a byte-order mark is no content
    task = read_task(str(tmp_path / "t.toml"))
    assert (task.template, task.text_template) == ("Title: {text}\nTeam:", "{title}\nBody: {body}")
    assert "text_template" not in task.settings()


STRINGS = st.text(st.characters(codec="utf-8", exclude_characters="{}"))


@settings(deadline=None, max_examples=60)
@given(
    st.dictionaries(STRINGS.filter(str.strip), st.lists(STRINGS.filter(str.strip), min_size=1), min_size=2),
    STRINGS,
    st.lists(st.tuples(STRINGS, st.integers(0))),
    st.sampled_from([None, "{title}", "{title}\n\x7f{body}"]),
    st.booleans(),
)
def test_a_task_is_read_back_as_it_was_written(tmp_path_factory, labels, string, examples, columns, is_plain):
    given_examples = tuple((text, [*labels][number % len(labels)]) for text, number in examples)
    words = {label: tuple(words) for label, words in labels.items()}
    more = {} if is_plain else {"format": "chat", "scoring": "sequence", "paraphrases": ("{text} other:",)}
    try:
        task = Task(string, words, f"{string}{{text}}\t:", string, given_examples, text_template=columns, **more)
    except ValueError:
        assume(False)  # labels that share a word, and the like
    path = tmp_path_factory.mktemp("task") / "t.toml"
    path.write_bytes(to_toml(task).encode())
    assert read_task(str(path)) == task and [*read_task(str(path)).labels] == [*labels]


BROKEN_TASKS = {
    "syntax": (TICKETS.replace('name = "', "name = "), "line 2"),
    "unknown key": ('surprise = "x"\n' + TICKETS, "surprise"),
    "no labels": ('name = "x"\ntemplate = "{text}:"', "labels: "),
    "an answer word is a number": (TICKETS.replace('"tech"', "5"), "label"),
    "an answer word is empty": (TICKETS.replace('"tech"', '" "'), "answer word"),
    "one label": ('name = "x"\ntemplate = "{text}:"\n[labels]\na = "a"', "two labels"),
    "template a number": (TICKETS.replace('"Ticket: {text}\\nTeam:"', "5"), "template"),
    "format unknown": ('format = "essay"\n' + TICKETS, "format"),
    "scoring unknown": ('scoring = "guess"\n' + TICKETS, "scoring"),
    "text twice": (TICKETS.replace("{text}", "{text} {text}"), "{text}"),
    "ends in a space": (TICKETS.replace("Team:", "Team: "), "space"),
    "an example of another label": (TICKETS.replace('label = "billing"', 'label = "sales"'), "sales"),
    "an example without text": (TICKETS.replace('text = "I', 'words = "I'), "text"),
    "two labels share a word but for case": (TICKETS.replace('"tech"', '" Billing"'), "share"),
    "two labels differ by case only": (TICKETS.replace("praise =", "Billing ="), "[Bb]illing"),
}


@pytest.mark.parametrize(("content", "named"), BROKEN_TASKS.values(), ids=BROKEN_TASKS.keys())
def test_a_broken_task_file_is_one_line_that_names_the_file(content, named, tmp_path):
    path = tmp_path / "broken.toml"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match=rf"^{path}.*: .*{named.replace('{', '[{]')}"):
        read_task(str(path))


def test_a_task_that_is_nowhere_lists_the_built_in_ones(tmp_path):
    with pytest.raises(ValueError, match=r"no task 'mood'.*sentiment, sentiment-yes-no.*\.toml"):
        read_task("mood")
    with pytest.raises(FileNotFoundError):
        read_task(str(tmp_path / "nowhere.toml"))
    (tmp_path / "latin.toml").write_bytes(b'name = "caf\xe9"\n')
    with pytest.raises(ValueError, match=r"latin\.toml"):
        read_task(str(tmp_path / "latin.toml"))


def test_labels_are_checked_and_spelled_as_the_task_does():
    def table(*labels):
        return [Example(str(i), "x", label) for i, label in enumerate(labels)]

    assert check_examples(table("positive", " Negative", None), SENTIMENT) == 3
    assert SENTIMENT.identify(Example("7", " A text ", "POSITIVE ")) == ("7", " A text ", "positive")
    assert SENTIMENT.identify(Example("8", "", None)) == ("8", "", None) and SENTIMENT.canonical_label("neg") is None
    with pytest.raises(ValueError, match=r"row 2 .*'5'.*negative, positive.*--label-map"):
        check_examples(table("positive", "5"), SENTIMENT)


def test_double_ids_are_counted_and_equal_hashes_are_none():
    def table(*ids):
        return [Example(id, "x", None) for id in ids]

    with pytest.raises(ValueError, match=r"2 rows have the id of an earlier row, the first .0..*--id-column"):
        check_examples(table("0", "1", "0", "2", "0"), SENTIMENT)

    class Colliding(str):
        def __hash__(self):
            return 7

    assert check_examples(table(Colliding("a"), Colliding("b")), SENTIMENT) == 2


def test_the_article_s_no_share_of_the_contradictory_text_is_47_64_percent():
    table = next(t for t in TABLES["first_token_tables"] if t["text"] == "Best worst thing ever")
    # The tokens Y, N, True, Positive of the table count for nothing, so the two totals do not reach 1.
    ours = totals(YES_NO, *zip(*((e["token"], e["logprob"]) for e in table["top_tokens"]), strict=True))
    assert abs(ours["negative"] - 0.4764) < 0.0003 and 0.995 < sum(ours.values()) < 0.99999


@settings(deadline=None, max_examples=40)
@given(task=tasks_with_answers(), seed=st.integers(0, 2**32), data=st.data())
def test_one_more_answer_word_never_lowers_a_label_and_their_order_changes_nothing(small_tokenizer, task, seed, data):
    log_probs = distribution(seed, len(small_tokenizer))
    before = label_totals(task, small_tokenizer, log_probs)
    shuffled = {label: tuple(data.draw(st.permutations(words))) for label, words in task.labels.items()}
    assert label_totals(replace(task, labels=shuffled), small_tokenizer, log_probs) == pytest.approx(before, rel=1e-12)
    if unused := [w for w in WORDS if task.label_of(w) is None]:
        more = {label: (*words, unused[0]) if label == "label 0" else words for label, words in task.labels.items()}
        after = label_totals(replace(task, labels=more), small_tokenizer, log_probs)
        assert after[0] > before[0] and after[1:] == pytest.approx(before[1:], rel=1e-12)


def test_batch_calibration_restores_what_a_leaning_prompt_lost_on_balanced_labels():
    random = np.random.default_rng(0)
    truth = np.arange(4000) % 2
    log_odds = 0.8 * (2 * truth - 1) + random.normal(0, 0.5, 4000)
    leaning = 1 / (1 + np.exp(-(log_odds + 1.5)))
    probabilities = np.stack([1 - leaning, leaning], axis=1)
    corrected = debias(probabilities, probabilities.mean(axis=0))
    best, before, after = (np.mean(guess == truth) for guess in (log_odds > 0, leaning > 0.5, corrected[:, 1] > 0.5))
    assert before < best - 0.2 and after > best - 0.02
    assert corrected.sum(axis=1) == pytest.approx(1)


def test_with_all_labels_listed_the_remainder_counts_for_all_but_the_prediction():
    probabilities, mass, extras = listed_probabilities(listing(no=0.5, yes=0.2, maybe=0.1, well=0.1), OF_THREE)
    assert probabilities == pytest.approx({"a": 0.25 / 0.9, "b": 0.5 / 0.9, "c": 0.15 / 0.9}, abs=1e-12)
    assert mass == pytest.approx(0.8) and extras == {"label_mass_high": pytest.approx(0.9)}
