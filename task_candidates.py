"""What could be asked instead: first tasks from a table's labels, and a task's variations that a person would try.

    first_task("tickets", examples, "Team", tokenizer)         a task from nothing but labelled rows
    templates(task)                                            its own template, its paraphrases, and common patterns
    chosen_examples(pool, task, 2, "diverse", seed)            few-shot examples, as many of each label
    distinct_words(mass, tokens, truth, n_labels)              words that the model itself says for rows of a label

A `Candidate` is a task with what is different in it, in words. Which one is better is task_search.py's question.
"""

from __future__ import annotations

import json
import random
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import zip_longest

import numpy as np

from tables import Example
from task import Task, is_one_token, one_token_word

MOST_EXAMPLES = 40  # few-shot examples in a prompt
MOST_LISTED = 20  # labels that a question lists
WORDS_A_LABEL = 3  # of the model's own
LEAST_MASS = 0.005  # that a word must have more in its label's rows than in any other's


@dataclass(frozen=True)
class Candidate:
    """A task that could be asked, with what is different in it; `debias`: judged after batch calibration."""

    task: Task
    what: str
    debias: bool = False

    @property
    def key(self) -> str:
        """The same for candidates that show a model the same prompts and count the same answers."""
        return json.dumps(self.task.settings(), sort_keys=True, ensure_ascii=True)

    @property
    def identity(self) -> tuple[str, bool]:
        """The same for candidates that come to the same probabilities."""
        return self.key, self.debias


# A first task


def first_task(name: str, examples: Iterable[Example], noun: str, tokenizer: object) -> Task:
    """A task from labelled rows: their labels, answered by one token each where this tokenizer allows it.

    `noun` is what the labels are, as "Team". Underscores are read as spaces. ValueError for fewer than two labels.
    """
    spelled: dict[str, Counter[str]] = defaultdict(Counter)
    for example in examples:
        if example.label is not None and example.label.strip():
            spelled[example.label.strip().casefold()][example.label.strip()] += 1
    names = sorted((spellings.most_common(1)[0][0] for spellings in spelled.values()), key=_numbers_first)
    if len(names) < 2:
        raise ValueError(f"a task needs two labels or more; the table has {', '.join(names) or 'none'}")
    words = {label: (label.replace("_", " ").strip() or label,) for label in names}
    ends = [":", ":\n"] if any(label.isdigit() for label in names) else [":"]  # a digit is often no token after a space
    for end in ends:
        task = Task(name, words, f"Text: {{text}}\n{noun}{end}")
        singles = _one_token_words(task, tokenizer)
        if all(singles.values()):
            return replace(task, labels=singles)
    return replace(task, scoring="sequence")


def _numbers_first(label: str) -> tuple:
    return (0, int(label), "") if label.isdecimal() else (1, 0, label.casefold())


def _one_token_words(task: Task, tokenizer: object) -> dict[str, tuple[str, ...]]:
    """For each label its first answer word that is one token after this task's prompt; () where there is none."""
    rendered, found = task.prompt("text"), {}
    for label, (word,) in task.labels.items():
        if not is_one_token(tokenizer, rendered, task.answer(rendered, word)):
            word = one_token_word(task, label, tokenizer, rendered)
        found[label] = (word,) if word else ()
    return found


# Templates


def templates(task: Task) -> dict[str, Task]:
    """The task with its own template, with its paraphrases, then with patterns that often work, by name; each once.

    Where an answer is a number there is a newline after the template: a digit is often no token after a space.
    """
    found = [("own template", task.instruction, task.template)]
    found += [(f"paraphrase {n}", task.instruction, template) for n, template in enumerate(task.paraphrases, 1)]
    patterns = list(_chat_patterns(task) if task.format == "chat" else _completion_patterns(task))
    if task.format != "chat" and any(word.isdigit() for words in task.labels.values() for word in words):
        patterns = [("own template and a newline", task.instruction, task.template), *patterns]
        patterns = [(name, instruction, template.rstrip("\n") + "\n") for name, instruction, template in patterns]
    known, asked = set(), {}
    for name, instruction, template in found + patterns:
        if (instruction, template) not in known:
            known.add((instruction, template))
            paraphrases = task.paraphrases if template == task.template else ()
            asked[name] = replace(task, instruction=instruction, template=template, paraphrases=paraphrases)
    return asked


def _completion_patterns(task: Task) -> Iterator[tuple[str, str, str]]:
    """(name, instruction, template) of each."""
    text_noun, noun = nouns(task.template)
    yield "plain", "", f"{text_noun}: {{text}}\n{noun}:"
    yield "category", "", "{text}\n\nCategory:"
    yield "arrow", "", "{text} =>"
    if len(task.labels) <= MOST_LISTED:
        choices = listed(task)
        yield "question", "", f"{{text}}\n\nQuestion: Is this {choices}?\nAnswer:"
        yield "instruction", f"The {noun.lower()} of a text is {choices}.", f"{text_noun}: {{text}}\n{noun}:"


def _chat_patterns(task: Task) -> Iterator[tuple[str, str, str]]:
    _, noun = nouns(task.template)
    if len(task.labels) <= MOST_LISTED:
        choices = listed(task)
        yield "question", "", f"Text: {{text}}\n\nIs this {choices}? Answer with one word."
        yield "question first", "", f"Is the following text {choices}? Answer with one word only.\n\n{{text}}"
    yield "plain", "", f"Text: {{text}}\n{noun}:"


def nouns(template: str) -> tuple[str, str]:
    """What a template calls text and label: "Ticket", "Team" in "Ticket: {text}\\nTeam:"; else Text, Category."""
    before, after = template.split("{text}")
    text = re.search(r"([A-Za-z][\w -]{0,30}): *$", before)
    label = re.search(r"^([A-Za-z][\w -]{0,30}):\s*$", after.splitlines()[-1] if after.strip() else "")
    return text.group(1) if text else "Text", label.group(1) if label else "Category"


def listed(task: Task) -> str:
    """The answers as a question lists them: "ham or spam", "1, 2 or 3"."""
    *first, last = [words[0] for words in task.labels.values()]
    return f"{', '.join(first)} or {last}"


# Few-shot examples


def chosen_examples(
    pool: Sequence[Example],
    task: Task,
    per_label: int,
    kind: str,
    seed: int,
    doubt: Sequence[float] | None = None,
) -> tuple[tuple[str, str], ...]:
    """Examples from a pool, `per_label` of each label (or all it has), the labels taking turns in a random order.

    `kind`: "random"; "diverse", each sharing as few words as possible with those before; "doubtful", those whose
    `doubt` [pool] is greatest. The longest quarter of the texts is left out: every text pays for a prompt's length.
    """
    draw = random.Random(f"{seed} {kind} {per_label}")
    longest = sorted(len(example.text) for example in pool)[max(0, (3 * len(pool)) // 4 - 1)]
    of_label: dict[str, list[int]] = {label: [] for label in task.labels}
    for number, example in enumerate(pool):
        if len(example.text) <= longest:
            of_label[task.canonical_label(example.label)].append(number)
    for numbers in of_label.values():
        draw.shuffle(numbers)
        if kind == "doubtful":
            numbers.sort(key=lambda number: -doubt[number])
    chosen: list[tuple[str, str]] = []
    for _ in range(per_label):
        labels = [label for label in task.labels if of_label[label]]
        draw.shuffle(labels)
        for label in labels:
            numbers = of_label[label]
            place = _least_alike(pool, numbers, [text for text, _ in chosen]) if kind == "diverse" else 0
            chosen.append((pool[numbers.pop(place)].text.strip(), label))
    return tuple(chosen)


def _least_alike(pool: Sequence[Example], numbers: Sequence[int], chosen: Sequence[str]) -> int:
    """The place in `numbers` of the text that shares the smallest part of its words with any text chosen before."""

    def alike(text: str) -> float:
        words = set(text.casefold().split())
        others = (set(other.casefold().split()) for other in chosen)
        return max((len(words & other) / len(words | other) for other in others if words | other), default=0.0)

    return min(range(len(numbers)), key=lambda place: alike(pool[numbers[place]].text))


def reordered(examples: Sequence[tuple[str, str]], seed: int) -> tuple[tuple[str, str], ...]:
    """The same examples in another order."""
    order = list(examples)
    random.Random(f"{seed} order").shuffle(order)
    return tuple(order) if tuple(order) != tuple(examples) else tuple(reversed(order))


# Answer words


def distinct_words(mass: np.ndarray, tokens: Sequence[str], truth: np.ndarray, n_labels: int) -> list[list[str]]:
    """For each label the words that the model says more in its rows than in any other label's, most so first.

    `mass` [rows, tokens] are probabilities of the next token, of tokens spelled `tokens`; `truth` [rows] the labels'
    numbers. Spellings of one word count together; only words of letters that are at least LEAST_MASS ahead are kept.
    """
    words = [token.strip().casefold() for token in tokens]
    kept = [place for place, word in enumerate(words) if word.isalpha() and len(word) > 1]
    names, number = np.unique([words[place] for place in kept], return_inverse=True)
    means = np.zeros((n_labels, len(names)))
    for label in range(n_labels):
        if (truth == label).any():
            np.add.at(means[label], number, mass[truth == label][:, kept].mean(axis=0))
    found = []
    for label in range(n_labels):
        ahead = means[label] - np.delete(means, label, axis=0).max(axis=0)
        best = np.argsort(-ahead, kind="stable")[:WORDS_A_LABEL]
        found.append([str(names[word]) for word in best if ahead[word] >= LEAST_MASS])
    return found


def word_sets(task: Task, model_words: Mapping[str, Sequence[str]]) -> dict[str, Task]:
    """The task with other answer words, by what they are: labels' names, the model's words, both together.

    A word of the model's that is another label's answer or name is left out. Each is scored by its first token.
    """
    names = {label: (label.replace("_", " ").strip(),) for label in task.labels}
    label_named = {name.casefold(): label for label, (name,) in names.items()}
    models = {}
    for label, words in model_words.items():
        models[label] = [
            word for word in words if task.label_of(word) in (None, label) and label_named.get(word, label) == label
        ]
    found = {
        "words: labels' names": names,
        "words: also the model's": {label: (*words, *models[label]) for label, words in task.labels.items()},
        "words: the model's": {label: tuple(models[label]) or words for label, words in task.labels.items()},
    }
    others = {}
    for what, words in found.items():
        words = {label: tuple(dict.fromkeys(own)) for label, own in words.items()}
        if words != task.labels:
            with suppress(ValueError):  # two names that differ by an underscore only
                others[what] = replace(task, labels=words, scoring="first-token")
    return others


# All together


def first_candidates(draft: Task, pool: Sequence[Example], seed: int) -> Iterator[Candidate]:
    """The draft's template with one and two examples a label and with none, then other templates with each of these."""
    sets = {}
    for per_label, what in ((2, "2 examples a label"), (1, "1 example a label")):
        if per_label * len(draft.labels) <= MOST_EXAMPLES:
            sets[what] = chosen_examples(pool, draft, per_label, "diverse", seed)
    if draft.examples:
        sets["own examples"] = draft.examples
    sets["no example"] = ()
    asked = templates(draft)
    own, *others = asked
    for name, what in [(own, what) for what in sets] + [(name, what) for what in sets for name in others]:
        yield Candidate(replace(asked[name], examples=sets[what]), f"{name}, {what}")


def variations(
    best: Sequence[Candidate],
    pool: Sequence[Example],
    doubt: Sequence[float],
    model_words: Callable[[Task], Mapping[str, Sequence[str]]],
    seed: int,
    with_debias: bool = False,
) -> Iterator[Candidate]:
    """Each of the best with other examples, another order and other answer words, a change of each in turn.

    `model_words(task)`, what the model says for the rows of each label, is asked for when it is needed.
    """
    for changes in zip_longest(*(_changes(one, pool, doubt, model_words, seed, with_debias) for one in best)):
        yield from filter(None, changes)


def _changes(
    one: Candidate,
    pool: Sequence[Example],
    doubt: Sequence[float],
    model_words: Callable[[Task], Mapping[str, Sequence[str]]],
    seed: int,
    with_debias: bool,
) -> Iterator[Candidate]:
    task = one.task
    if with_debias:
        yield replace(one, what=f"{one.what}, debiased", debias=True)
    per_label = max(Counter(label for _, label in task.examples).values(), default=0)
    if 0 < per_label * len(task.labels) <= MOST_EXAMPLES:
        for kind, draw in (("diverse", seed + 1), ("random", seed), ("doubtful", seed), ("random", seed + 1)):
            examples = chosen_examples(pool, task, per_label, kind, draw, doubt)
            yield Candidate(replace(task, examples=examples), f"{one.what} ({kind} {draw})")
        yield Candidate(replace(task, examples=reordered(task.examples, seed)), f"{one.what}, another order")
    for what, other in word_sets(task, model_words(task)).items():
        yield Candidate(other, f"{one.what}, {what}")
