"""answers.py: which label an answer names, of every kind of answer that people have seen models give.

The truth is what a reader of the answer would say; answers.json holds it, and where a reader would not be sure, that
there is no vote.
"""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from answers import is_cut_thought, parse_answer, parser_of
from task import TASKS, Task, read_task
from voting import Sampling

DATA = Path(__file__).parent / "data"
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


def in_language(name, positive, negative, field):
    """A task whose answer words are of another language, and whose template ends with its word for "sentiment"."""
    return Task(name, {"positive": (positive,), "negative": (negative,)}, f"Text: {{text}}\n{field}:")


GERMAN = in_language("german", "positiv", "negativ", "Stimmung")
FRENCH = in_language("french", "positif", "négatif", "Avis")
SPANISH = in_language("spanish", "positivo", "negativo", "Sentimiento")
TURKISH = in_language("turkish", "olumlu", "olumsuz", "Duygu")
HINDI = in_language(
    "hindi",
    "सकारात्मक",
    "नकारात्मक",
    "x",
)
CHINESE = in_language("chinese", "积极", "消极", "情感")
TICKETS = Task("tickets", {"billing": ("billing",), "technical": ("technical", "tech")}, "Ticket: {text}\nTeam:")
THUMBS = Task("thumbs", {"up": ("👍",), "down": ("👎",)}, "{text}\nThumb:")
TASKS_READ = (SENTIMENT, YES_NO, GRADES, GERMAN, FRENCH, SPANISH, TURKISH, HINDI, CHINESE, TICKETS, THUMBS)


# tests/data/answers.json: task -> label or "unparsed" -> answers that must be read so
ANSWERS = json.loads((DATA / "answers.json").read_text(encoding="utf-8"))
BY_NAME = {task.name: task for task in TASKS_READ}


@pytest.mark.parametrize("name", ANSWERS)
def test_an_answer_is_read_by_its_answer_words(name):
    for label, answers in ANSWERS[name].items():
        found = {answer: parse_answer(answer, BY_NAME[name]) or "unparsed" for answer in answers}
        assert found == dict.fromkeys(answers, label)


PIECES = ["positive", "Negative", "yes", "no", "very", "good", "not", "isn't", "nor", "but", " ", ", ", ".", "\n", "-"]
SAID = st.one_of(st.text(max_size=40), st.lists(st.sampled_from([*PIECES, "\u2019t", '"', "\u0130", "\ud800"])))


@pytest.mark.parametrize("task", BY_NAME.values(), ids=BY_NAME)
@settings(max_examples=60, deadline=None)
@given(said=SAID)
@example(said="\u017fentiment: po\u017fitive")  # a letter that folds to s
@example(said="not")
def test_whatever_is_said_the_label_is_one_of_the_task_s_and_an_answer_word_was_said(task, said):
    said = said if isinstance(said, str) else "".join(said)
    label = parse_answer(said, task)
    folded = " ".join(re.findall(r"\w+", said.casefold()))
    if label is not None:
        assert any(word in folded for word in task.labels[label])
        assert parse_answer(said.upper().lower(), task) == parse_answer(said.lower(), task)


OUTSIDE = st.text(" \t\n.,;:!*\"'`()[]", max_size=6)
CASES = st.sampled_from([str.lower, str.upper, str.title, str.swapcase])


@settings(max_examples=100, deadline=None)
@given(OUTSIDE, OUTSIDE, CASES, st.sampled_from([*BY_NAME]), st.data())
def test_case_and_outer_punctuation_never_change_an_answer_word(before, after, case, name, data):
    labels = BY_NAME[name].labels
    label = data.draw(st.sampled_from([*labels]))
    word = data.draw(st.sampled_from(labels[label]))
    assert parse_answer(before + case(word) + after, BY_NAME[name]) == label


NEGATIONS = (
    "not no non never neither nor none nothing nobody without hardly barely cannot doesn't wasn\u2019t ISN'T isnt cant"
)


@pytest.mark.parametrize("negation", NEGATIONS.split())
def test_every_negation_denies_what_follows_it_in_its_clause(negation):
    for said in (f"{negation} positive", f"It is {negation} at all a positive text", f"{negation.upper()} POSITIVE!"):
        assert parse_answer(said, SENTIMENT) is None
    assert parse_answer(f"positive, {negation} negative", SENTIMENT) == "positive"
    assert parse_answer(f"{negation} that, positive", SENTIMENT) is None


# Thoughts


THOUGHTS = [
    ("<think>", "</think>"),
    ("<THINKING>\n", "\n</thinking>\n\n"),
    ("<thought>", "</thought>"),
    ('<reasoning effort="low">', "</reasoning>"),
    ("[THINK]", "[/THINK]"),
    ("\u25c1think\u25b7", "\u25c1/think\u25b7"),
    ("<|channel|>analysis<|message|>", "<|end|><|start|>assistant<|channel|>final<|message|>"),
    ("analysisThe user wants one word. ", "assistantfinal"),
    ("<|channel>thought\n", "<channel|>"),
    ("<|START_THINKING|>", "<|END_THINKING|>"),
]


@pytest.mark.parametrize(("begin", "end"), THOUGHTS)
def test_a_thought_is_no_answer_and_what_follows_it_is(begin, end):
    for thought in ("Could the answer be yes", "Yes", "", "No. No?\n\nYes, I think"):
        assert parse_answer(begin + thought, YES_NO) is None and is_cut_thought(begin + thought)
        assert parse_answer(f"Yes {begin}{thought}", SENTIMENT) is None
        assert parse_answer(f"{begin}{thought}{end}No.", YES_NO) == "negative"
        assert parse_answer(f"{begin}{thought}{end}", YES_NO) is None and not is_cut_thought(f"{begin}{thought}{end}")
        assert parse_answer(f"{thought}{end}No", YES_NO) == "negative"  # the prompt began the thought
        twice = f"{begin}{thought}{end}Yes\n{begin}No"
        assert parse_answer(twice, YES_NO) is None


def test_a_thought_in_a_thought_ends_with_the_outer_one():
    assert parse_answer("<think>yes <think>yes</think> or no</think> No", YES_NO) == "negative"
    for said in ("I think yes", "Analysis: yes", "<yes>", "Thinking about it, yes"):  # only speaks of it
        assert parse_answer(said, YES_NO) == "positive"


# A task's own words


def test_a_task_that_names_its_denials_has_whole_sentences_read():
    german = replace(GERMAN, denials=("nicht", "Kein", "mitnichten"))
    for said in ("Der Text klingt positiv", "Ich finde, das klingt recht positiv.", "Positiv gestimmt"):
        assert (parse_answer(said, GERMAN), parse_answer(said, german)) == (None, "positive")
    for said in ("mitnichten positiv", "kein positiver Text, also positiv", "Das ist nicht positiv"):
        assert parse_answer(said, german) is None
    assert parse_answer("Das riecht positiv", replace(GERMAN, frames=("Das riecht {}",))) == "positive"
    assert parse_answer("Das riecht kaum positiv", replace(GERMAN, frames=("Das riecht {}",))) is None


def test_how_a_task_s_answers_are_read_is_known_to_method_2_s_fingerprint_alone(tmp_path):
    path = tmp_path / "t.toml"
    bare = 'name = "german"\ntemplate = "Text: {text}\\nStimmung:"\n'
    labels = '[labels]\npositive = ["positiv"]\nnegative = ["negativ"]\n'
    tasks = []
    for more in ("", 'denials = ["nicht"]\n', 'frames = ["es klingt"]\n'):
        path.write_text(bare + more + labels, encoding="utf-8")
        tasks.append(read_task(str(path)))
    plain, denying, framed = tasks
    assert plain == GERMAN and denying.denials == ("nicht",) and framed.frames == ("es klingt",)
    assert plain.settings() == denying.settings() == framed.settings()
    assert "denials" not in plain.settings() and "frames" not in plain.settings()
    assert len({Sampling().fingerprint({}, task, {}) for task in tasks}) == 3
    for task in (SENTIMENT, YES_NO):  # whose recordings keep their fingerprints
        assert parser_of(task) == {"parser": 1}
    for wrong in ('denials = ["gar nicht"]\n', 'denials = ["Positiv"]\n', 'denials = [""]\n'):
        path.write_text(bare + wrong + labels, encoding="utf-8")
        with pytest.raises(ValueError, match="each of denials is one word and no answer word"):
            read_task(str(path))


# The recordings


def test_the_votes_of_the_recordings_are_what_their_answers_say():
    for path in sorted((DATA.parent.parent / "data" / "predictions").glob("*_consistency_*.jsonl")):
        for line in path.read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            said = [parse_answer(answer, SENTIMENT) for answer in row["answers"]]
            assert {label: said.count(label) for label in row["votes"]} == row["votes"], row["id"]
            assert said.count(None) == row["unparsed"]
