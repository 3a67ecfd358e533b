"""task_candidates.py: first tasks that work with the tokenizer, and variations that are what their names say."""

from collections import Counter

import numpy as np
import pytest

import task_candidates
from tables import Example
from task import TASKS, Task, find_answers
from task_candidates import chosen_examples, distinct_words, first_task, templates, variations, word_sets

TICKETS = Task("t", {"billing": ("billing",), "technical": ("technical", "tech")}, "Ticket: {text}\nTeam:")


def labelled(*labels):
    return [Example(str(number), f"text {number}", label) for number, label in enumerate(labels)]


def works(task, tokenizer):
    find_answers(task, tokenizer, task.prompt("text"))
    return True


# A first task


def test_a_first_task_has_the_tables_labels_as_one_token_each_where_it_can(tokenizer):
    task = first_task("mail", labelled("spam", "ham", None, " Spam", "spam"), "Category", tokenizer)
    assert task == Task("mail", {"ham": ("ham",), "spam": ("spam",)}, "Text: {text}\nCategory:")
    task = first_task("t", labelled("card_payment", "CASH", "lost_or_stolen_phone"), "Team", tokenizer)
    assert task.labels["card_payment"] == ("payment",) and task.labels["CASH"] == ("cash",)
    assert task.scoring == "first-token" and task.template == "Text: {text}\nTeam:" and works(task, tokenizer)


def test_underscores_are_answered_as_spaces_and_what_is_no_token_is_scored_whole(tokenizer):
    task = first_task("t", labelled("ABBR", "card_payment"), "Type", tokenizer)
    assert task.scoring == "sequence" and task.labels == {"ABBR": ("ABBR",), "card_payment": ("card payment",)}
    assert works(task, tokenizer)


def test_numbers_stand_in_their_order_after_a_newline(tokenizer):
    task = first_task("t", labelled("10", "9", "1", "bad"), "Stars", tokenizer)
    assert [*task.labels] == ["1", "9", "10", "bad"]
    task = first_task("t", labelled("2", "1", "3"), "Stars", tokenizer)
    assert task.template == "Text: {text}\nStars:\n" and task.scoring == "first-token" and works(task, tokenizer)


def test_one_label_is_no_question(tokenizer):
    with pytest.raises(ValueError, match="two labels or more; the table has spam"):
        first_task("t", labelled("spam", "SPAM ", None), "Category", tokenizer)


# Templates


def test_templates_begin_with_the_tasks_own_and_its_paraphrases_and_none_stands_twice():
    found = [*templates(TASKS["sentiment"]).values()]
    assert [asked.template for asked in found[:5]] == [
        TASKS["sentiment"].template,
        *TASKS["sentiment"].paraphrases,
    ]
    assert len({(asked.instruction, asked.template) for asked in found}) == len(found) > 7
    own = templates(TICKETS).values()
    assert any(asked.template == "{text}\n\nQuestion: Is this billing or technical?\nAnswer:" for asked in own)
    assert any("team of a text is billing or technical" in asked.instruction for asked in own)
    assert len(templates(Task("t", {str(n) * 2: (f"w{n}",) for n in range(30)}, "{text}:"))) == 4  # no list of thirty


def test_where_an_answer_is_a_number_the_patterns_end_with_a_newline(tokenizer):
    stars = Task("t", {"bad": ("1",), "good": ("5",)}, "Review: {text}\nStars:")
    patterns = [*templates(stars).values()][1:]
    assert all(asked.template.endswith("\n") for asked in patterns)
    assert all(works(asked, tokenizer) for asked in patterns)


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("Ticket: {text}\nTeam:", ("Ticket", "Team")),
        ("{text}\n\nCategory:", ("Text", "Category")),
        ('Read this.\n\nShort text: "{text}"\nIts mood is', ("Text", "Category")),
        ("{text}", ("Text", "Category")),
    ],
)
def test_nouns_are_read_off_a_template(template, expected):
    assert task_candidates.nouns(template) == expected


# Examples


def test_examples_are_balanced_alternate_and_come_from_the_pool():
    pool = labelled(*["billing"] * 20, *["Technical"] * 5)
    for kind in ("random", "diverse", "doubtful"):
        chosen = chosen_examples(pool, TICKETS, 2, kind, 0, doubt=np.arange(25).tolist())
        assert Counter(label for _, label in chosen) == {"billing": 2, "technical": 2}
        assert {label for _, label in chosen[:2]} == {"billing", "technical"} and len(set(chosen)) == 4
        assert {(example.text, example.label.lower()) for example in pool} >= set(chosen)
        assert chosen == chosen_examples(pool, TICKETS, 2, kind, 0, doubt=np.arange(25).tolist())
    assert len({chosen_examples(pool, TICKETS, 1, "random", seed) for seed in range(20)}) > 10
    few = chosen_examples(labelled("billing", "billing", "technical", "billing"), TICKETS, 2, "random", 0)
    assert Counter(label for _, label in few) == {"billing": 2, "technical": 1}  # all that there are


def test_doubtful_examples_are_those_of_most_doubt_and_diverse_ones_share_few_words():
    pool = labelled(*["billing", "technical"] * 10)
    doubt = [float(number in (6, 9)) for number in range(20)]
    assert set(chosen_examples(pool, TICKETS, 1, "doubtful", 0, doubt)) == {
        ("text 6", "billing"),
        ("text 9", "technical"),
    }
    texts = ["the bill is wrong"] * 9 + ["refund my money"] + ["the bill is wrong again"] * 9 + ["app closes by itself"]
    pool = [Example(str(n), text, ["billing", "technical"][n // 10]) for n, text in enumerate(texts)]
    for seed in range(10):
        chosen = chosen_examples(pool, TICKETS, 1, "diverse", seed)
        assert not set(chosen[0][0].split()) & set(chosen[1][0].split())


def test_the_longest_texts_are_no_examples():
    pool = [Example(str(n), "long " * (1 + 50 * (n % 4 == 0)), ["billing", "technical"][n % 2]) for n in range(20)]
    chosen = chosen_examples(pool, TICKETS, 5, "random", 0)
    assert all(text == "long" for text, _ in chosen)


# Answer words


def test_the_models_words_are_those_it_says_more_for_one_label_than_for_any_other():
    tokens = [" Yes", "yes", " no", " the", "!", " maybe", " x"]
    mass = np.array([[0.2, 0.1, 0.1, 0.4, 0.1, 0.0, 0.1], [0.1, 0.1, 0.1, 0.4, 0.1, 0.1, 0.1]])
    mass = np.vstack([mass, [[0.0, 0.1, 0.3, 0.4, 0.1, 0.0, 0.1], [0.1, 0.0, 0.3, 0.4, 0.2, 0.0, 0.0]]])
    truth = np.array([0, 0, 1, 1])
    # By hand: yes .25 against .1, no .1 against .3, maybe .05 against 0; the, signs and single letters never count.
    assert distinct_words(mass, tokens, truth, 2) == [["yes", "maybe"], ["no"]]
    assert distinct_words(mass, tokens, truth, 3) == [["yes", "maybe"], ["no"], []]  # a label without rows has none


def test_word_sets_keep_labels_apart_and_score_first_tokens():
    task = Task("t", {"card_fee": ("charge",), "app": ("app",)}, "{text}:", scoring="sequence")
    sets = word_sets(task, {"card_fee": ["fee", "app"], "app": ["software"]})
    assert sets["words: labels' names"].labels == {"card_fee": ("card fee",), "app": ("app",)}
    assert sets["words: also the model's"].labels == {"card_fee": ("charge", "fee"), "app": ("app", "software")}
    assert sets["words: the model's"].labels == {"card_fee": ("fee",), "app": ("software",)}
    assert {other.scoring for other in sets.values()} == {"first-token"}
    plain = Task("t", {"ham": ("ham",), "spam": ("spam",)}, "{text}:")
    assert word_sets(plain, {"ham": [], "spam": []}) == {}


# All together


def test_every_template_meets_every_number_of_examples_the_drafts_own_first():
    pool = labelled(*["billing", "technical"] * 10)
    found = list(task_candidates.first_candidates(TICKETS, pool, 0))
    assert [one.what for one in found[:3]] == [
        "own template, 2 examples a label",
        "own template, 1 example a label",
        "own template, no example",
    ]
    assert len(found) == 3 * len(templates(TICKETS)) == len({one.key for one in found})
    assert Counter(len(one.task.examples) for one in found) == {n: len(templates(TICKETS)) for n in (0, 2, 4)}
    many = Task("t", {f"label {n}": (f"w{n}",) for n in range(41)}, "{text}:")
    assert {len(one.task.examples) for one in task_candidates.first_candidates(many, pool[:0], 0)} == {0}


def test_variations_change_one_thing_of_each_of_the_best_in_turn():
    pool = labelled(*["billing", "technical"] * 10)
    first = list(task_candidates.first_candidates(TICKETS, pool, 0))
    best, words = first[:2], {"billing": ["money"], "technical": ["app"]}
    found = list(variations(best, pool, [0.0] * 20, lambda task: words, 0))
    assert [one.what.startswith(best[0].what) for one in found] == [True, False] * (len(found) // 2)
    for one in found[::2]:
        changed = [
            name
            for name in ("labels", "template", "examples", "instruction")
            if getattr(one.task, name) != getattr(best[0].task, name)
        ]
        assert changed in (["labels"], ["examples"]), one.what
    debiased = list(variations(best, pool, [0.0] * 20, lambda task: words, 0, with_debias=True))
    assert [one.debias for one in debiased[:3]] == [True, True, False] and debiased[0].key == best[0].key
