"""What is asked: the Task, the prompt around a text, and the answers that count for each label.

    Task  ->  prompt(text)  ->  answers: token sequences, each counting for one label  ->  label probabilities

    P(label) = sum of P(answer) over the label's answers;   label mass = sum over all labels;   both from raw softmax
    total probability = P(label) before, confidence = P(label) / label mass after normalising over the labels

Built-in tasks: `sentiment` (few-shot completion, for any model) and `sentiment-yes-no` (the question, for instruction
models of real size). Your own is a TOML file, `--task tickets.toml`:

    name = "tickets"
    template = "Ticket: {text}\nTeam:"       # what the model reads for one text; the answer follows
    [labels]                                 # label = [answer words]; the first is the one shown in examples
    billing = ["billing"]
    technical = ["technical", "tech"]
    [[examples]]
    text = "I was charged twice."
    label = "billing"

A template may name columns of a table instead, "Title: {title}\\nBody: {body}\\nTeam:"; the text is then what stands
from the first to the last of them.

Optional: instruction = "..." (stands first), format = "chat" (the model's chat template; default "completion"),
scoring = "sequence" (whole answers, for labels that are not single tokens; default "first-token"), paraphrases = [...]
(other templates for the same question, for `consistency_confidence.py --paraphrase`).
Of answers in another language than English, Method 2 counts those that are an answer word and no more than harmless
words ("Sentiment: ..."). To count whole sentences, name what denies in that language, denials = ["nicht", "kein"], or
phrases that may stand around an answer word, frames = ["der Text klingt"].
Nothing here imports torch.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import tomllib
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import ClassVar

import numpy as np

from files import validated
from tables import Example, Table, read_examples

__all__ = ["TASKS", "Answer", "Example", "Task", "read_examples", "read_task"]  # `read_examples` lives in tables.py


@dataclass(frozen=True)
class Task:
    """A classification question: how a text is shown to the model, and which answer words mean which label."""

    __pydantic_config__: ClassVar[dict] = {"extra": "forbid"}  # `files.validated` refuses unknown keys

    name: str
    labels: Mapping[str, tuple[str, ...]]  # label -> its answer words, in the order that breaks ties
    template: str  # holds {text} once; the model's answer follows its end
    instruction: str = ""
    examples: tuple[tuple[str, str], ...] = ()  # few-shot (text, label)
    format: str = "completion"
    scoring: str = "first-token"
    paraphrases: tuple[str, ...] = ()  # other templates for the same question; only `wordings` uses them
    denials: tuple[str, ...] = ()  # words that deny in the language of the answers; only Method 2 reads these
    frames: tuple[str, ...] = ()  # phrases that may stand around an answer word; the same
    text_template: str | None = None  # columns in braces that make up a text; a template that names columns sets it

    def __post_init__(self) -> None:
        for problem in self._problems():
            raise ValueError(f"task {self.name!r}: {problem}")

    def _problems(self) -> Iterator[str]:
        words = [word for words in self.labels.values() for word in words]
        templates = (self.template, *self.paraphrases)
        if len(self.labels) < 2:
            yield "it needs at least two labels"
        if len({label.casefold() for label in self.labels}) < len(self.labels):
            yield f"two labels differ by case only: {list(self.labels)}"
        if not all(self.labels.values()) or not all(word.strip() for word in words):
            yield "every label needs an answer word"
        if any(template.count("{text}") != 1 for template in templates):
            yield "a template must hold {text} exactly once"
        if any(template.endswith(" ") for template in templates):
            yield "a template ends in a space, which would split the answer's token; remove it"
        if len(set(templates)) < len(templates):
            yield "two of its templates are the same"
        if self.format not in ("completion", "chat"):
            yield f'format is "completion" or "chat", not {self.format!r}'
        if self.scoring not in ("first-token", "sequence"):
            yield f'scoring is "first-token" or "sequence", not {self.scoring!r}'
        for _, label in self.examples:
            if label not in self.labels:
                yield f"an example has the label {label!r}, the task has {list(self.labels)}"
        for word in self.denials:
            if len(word.split()) != 1 or self.label_of(word):
                yield f"each of denials is one word and no answer word, not {word!r}"
        for label, of_label in self.labels.items():
            for word in of_label:
                if self.label_of(word) != label:
                    yield f"two labels share the answer word {word!r}; give each its own"

    @cached_property
    def _label_of(self) -> dict[str, str]:
        return {word.strip().casefold(): label for label, words in self.labels.items() for word in words}

    def label_of(self, answer: str) -> str | None:
        """The label that an answer spells, in any case and with any outer space, or None."""
        return self._label_of.get(answer.strip().casefold())

    def canonical_label(self, value: str) -> str | None:
        """The task's own spelling of a label read from a table, or None."""
        folded = {label.casefold(): label for label in self.labels}
        return folded.get(value.strip().casefold())

    def identify(self, example: Example) -> tuple[str, str, str | None]:
        """What a record repeats of its example: id, text and the label in the task's spelling."""
        label = None if example.label is None else self.canonical_label(example.label)
        if label is None and example.label is not None:
            raise ValueError(f"row {example.id!r}: {example.label!r} is not a label of task {self.name!r}")
        return example.id, example.text, label

    def show(self, text: str) -> str:
        """The template with the text in it. Outer white space is not part of a text."""
        before, after = self.template.split("{text}")
        return before + text.strip() + after

    def answer(self, shown: str, word: str) -> str:
        """An answer word as it follows `shown`: after white space or an opening quote directly, else with one space."""
        joined = self.format == "chat" or shown[-1].isspace() or shown[-1] in "\"'`([{"
        return word if joined else " " + word

    def prompt(self, text: str) -> str | list[dict[str, str]]:
        """What the model is given: one string for a completion, a list of messages for a chat."""
        shown = [(self.show(t), self.labels[label][0]) for t, label in self.examples]
        question = self.show(text)
        instruction = f"{self.instruction}\n\n" if self.instruction else ""
        if self.format == "completion":
            return instruction + "".join(f"{s}{self.answer(s, word)}\n\n" for s, word in shown) + question
        turns = [turn for s, word in shown for turn in (("user", s), ("assistant", word))] + [("user", question)]
        return [{"role": role, "content": (instruction if role == "user" else "") + content} for role, content in turns]

    def wordings(self) -> list[Task]:
        """The task as it stands, then once with each paraphrase in its template's place."""
        return [replace(self, template=template, paraphrases=()) for template in (self.template, *self.paraphrases)]

    def settings(self) -> dict:
        """What defines the question, as JSON would give it back; labels as pairs, because their order counts.

        The paraphrases are other questions: whoever asks them adds their settings. So does Method 2 with how it reads
        answers, by `denials` and `frames`.
        """
        settings = asdict(self) | {"labels": list(self.labels.items())}
        del settings["paraphrases"], settings["denials"], settings["frames"]
        del settings["text_template"]  # what a text is, is not part of the question
        return json.loads(json.dumps(settings))

    @classmethod
    def from_settings(cls, settings: Mapping) -> Task:
        """The task, without paraphrases, whose `settings` these are."""
        labels = {label: tuple(words) for label, words in settings["labels"]}
        return cls(**settings | {"labels": labels, "examples": tuple(map(tuple, settings["examples"]))})


# The few-shot examples were chosen by measurement on SST-2's development set; README.md has the numbers.
TASKS = {
    task.name: task
    for task in (
        Task(
            name="sentiment",
            labels={"negative": ("negative",), "positive": ("positive",)},
            template="Text: {text}\nSentiment:",
            examples=(
                ("Tedious from start to finish, and far too long.", "negative"),
                ("A clever, moving story with superb acting.", "positive"),
                ("The staff were rude and the room smelled of smoke.", "negative"),
                ("Setup took two minutes and it works perfectly.", "positive"),
                ("I wanted to like it, but there is nothing here to enjoy.", "negative"),
                ("Not perfect, yet I would happily watch it again.", "positive"),
                ("It tries hard to be funny, but it never is.", "negative"),
                ("The food took a while, but it was worth the wait.", "positive"),
            ),
            paraphrases=(
                "{text}\nOverall, this is",
                "{text}\nThis sounds",
                "Sentence: {text}\nThe tone of this sentence is",
                "Someone wrote: {text}\nTheir feeling about it was",
            ),
        ),
        Task(
            name="sentiment-yes-no",
            labels={"negative": ("no",), "positive": ("yes",)},
            template='Is the sentiment of this text positive? Answer only "yes" or "no".\n\nText: {text}',
            format="chat",
            paraphrases=(
                'Text: {text}\n\nDoes this text express a positive opinion? Answer only "yes" or "no".',
                'Would you call the following positive? One word, "yes" or "no".\n\n{text}',
                'Is the author of this text pleased? Answer only "yes" or "no".\n\nText: {text}',
                'Read this: {text}\n\nIs it favourable? Reply with "yes" or "no".',
            ),
        ),
    )
}


def read_task(name: str) -> Task:
    """A built-in task by name, or a TOML file by path."""
    if name in TASKS:
        return TASKS[name]
    if not name.endswith(".toml"):
        raise ValueError(f"no task {name!r}: the built-in ones are {', '.join(TASKS)}; your own is a .toml file")
    try:
        table = tomllib.loads(Path(name).read_text(encoding="utf-8-sig"))
        if isinstance(labels := table.get("labels"), dict):  # a single word may stand without its brackets
            table["labels"] = {label: [words] if isinstance(words, str) else words for label, words in labels.items()}
        if isinstance(template := table.get("template"), str) and "{text}" not in template:
            table["template"], table["text_template"] = _split_template(template)
        if isinstance(examples := table.get("examples"), list):
            table["examples"] = [_text_and_label(example) for example in examples]
    except (ValueError, RecursionError) as error:  # of TOML or of UTF-8 too
        raise ValueError(f"{name}: {error}") from None
    return validated(Task, table, f"{name} (see the top of task.py for an example)")


def _split_template(template: str) -> tuple[str, str | None]:
    """A template with columns in braces as one with {text} in their place, and what makes up the text."""
    named = list(re.finditer(r"\{[^{}]+\}", template))
    if not named:
        return template, None
    start, end = named[0].start(), named[-1].end()
    return template[:start] + "{text}" + template[end:], template[start:end]


def _text_and_label(example: object) -> tuple[str, str]:
    match example:
        case {"text": str(text), "label": str(label), **others} if not others:
            return text, label
    raise ValueError("each of examples needs a text and a label, both strings")


def to_toml(task: Task) -> str:
    """A task file's content, which `read_task` reads back as the same task. JSON's strings are TOML's, but for DEL."""

    def quoted(value: object) -> str:
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")

    template = task.template
    if task.text_template is not None:
        template = template.replace("{text}", task.text_template)
    lines = [f"name = {quoted(task.name)}", f"template = {quoted(template)}"]
    for field in ("instruction", "format", "scoring", "paraphrases"):
        value = getattr(task, field)
        if value != Task.__dataclass_fields__[field].default:
            lines.append(f"{field} = {quoted(value)}")
    lines.append("\n[labels]")
    for label, words in task.labels.items():
        key = label if re.fullmatch(r"[A-Za-z0-9_-]+", label) else quoted(label)
        lines.append(f"{key} = {quoted(words)}")
    for text, label in task.examples:
        lines.append(f"\n[[examples]]\ntext = {quoted(text)}\nlabel = {quoted(label)}")
    return "\n".join(lines) + "\n"


# Answers: the token sequences that count for a label

WHOLE_ANSWERS = 'set scoring = "sequence" in the task, which scores whole answers, their tokens behind each text'
NOT_ONE_TOKEN = f"choose words that are one token, or {WHOLE_ANSWERS}"
MANY_LABELS = 50  # of more nobody looks for a word of one token each


@dataclass(frozen=True)
class Answer:
    """A token sequence that counts for one label: a single id, or with scoring = "sequence" a whole answer's ids."""

    label: str
    ids: tuple[int, ...]
    text: str


def find_answers(task: Task, tokenizer: object, rendered: str) -> list[Answer]:
    """Every answer of the task in this tokenizer, each counting for one label only; `rendered` is a whole prompt.

    first-token: all single tokens of the vocabulary that spell an answer word, in any case, with or without space.
    sequence: the words as written and capitalised, as the tokenizer splits them after the prompt.
    Raises ValueError that names all labels without a usable answer in this place, each with what would help.
    """
    in_context, problems = {}, {}
    for word in _spellings(task):
        try:
            in_context[word] = _ids_after(tokenizer, rendered, task.answer(rendered, word))
        except ValueError as error:
            problems[str(error)] = None
    if task.scoring == "sequence":
        answers = [Answer(task.label_of(word), ids, task.answer(rendered, word)) for word, ids in in_context.items()]
        found = {answer.ids: answer for answer in answers}
        for answer in answers:
            if found[answer.ids].label != answer.label:
                other = found[answer.ids].text
                problems[f"this tokenizer reads {answer.text.strip()!r} and {other!r} as the same"] = None
        answers = list(found.values())
    else:
        special = set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)
        answers = [
            Answer(label, (i,), text)
            for i, text in enumerate(_vocabulary(tokenizer))
            if i not in special and (label := task.label_of(text)) is not None
        ]
        if bad := _not_one_token(task, tokenizer, rendered, in_context, {answer.ids for answer in answers}):
            if len(task.labels) > MANY_LABELS:
                said = (
                    f"{len(bad)} of the {len(task.labels)} labels are not one token here, as {bad[0]}; {WHOLE_ANSWERS}"
                )
            else:
                said = f"answers that are not one token here: {'; '.join([*bad, NOT_ONE_TOKEN])}"
            problems[said] = None
    if problems:
        raise ValueError(f"task {task.name!r}: {'; '.join(problems)}")
    return answers


def _not_one_token(
    task: Task, tokenizer: object, rendered: str, in_context: Mapping[str, tuple[int, ...]], singles: set[tuple]
) -> list[str]:
    """What to say of each label whose first answer word is not one of the single tokens `singles`, with a cure."""
    said = []
    for label, words in task.labels.items():
        ids = in_context.get(words[0])
        if ids is None or ids in singles:
            continue
        pieces = " + ".join(repr(tokenizer.decode([i])) for i in ids)
        cure = ""
        if word := one_token_word(task, label, tokenizer, rendered):
            cure = f" ({word!r} is one token)"
        elif is_one_token(tokenizer, rendered + "\n", words[0]):
            cure = " (one token after a template that ends with a newline)"
        said.append(f"{words[0]!r} of label {label!r} is {pieces}{cure}")
    return said


def one_token_word(task: Task, label: str, tokenizer: object, rendered: str) -> str | None:
    """A word for a label that is one token after this prompt, of those that it suggests itself; None if there is none.

    They are its other answer words, its name with underscores as spaces, the same in lower case or capitalised, and
    the words these are made of, unless another label is called by them too.
    """
    names = [name.replace("_", " ").strip() for name in (*task.labels[label], label)]
    forms = [form for name in names for form in (name.lower(), name.capitalize())]
    parts = {part for name in names for part in re.split(r"[\W_]+", name) if len(part) > 2}
    others = [name.casefold() for other in task.labels if other != label for name in (other, *task.labels[other])]
    taken = {part for name in others for part in (name, *re.split(r"[\W_]+", name))}
    for word in dict.fromkeys([*names, *forms, *sorted(parts, key=lambda part: (-len(part), part))]):
        if word and word.casefold() not in taken and is_one_token(tokenizer, rendered, task.answer(rendered, word)):
            return word
    return None


def is_one_token(tokenizer: object, rendered: str, answer: str) -> bool:
    """Whether an answer is a single ordinary token after this prompt."""
    try:
        ids = _ids_after(tokenizer, rendered, answer)
    except ValueError:
        return False
    return len(ids) == 1 and ids[0] not in tokenizer.all_special_ids and tokenizer.decode(ids).strip() == answer.strip()


@lru_cache(maxsize=2)
def _vocabulary(tokenizer: object) -> list[str]:
    """Every token as the text it decodes to, by id."""
    return [tokenizer.decode([i]) for i in range(len(tokenizer))]


def _spellings(task: Task) -> list[str]:
    """The answer words as written, and with scoring = "sequence" also capitalised, each once."""
    words = [word for words in task.labels.values() for word in words]
    return list(dict.fromkeys(words + [w[:1].upper() + w[1:] for w in words if task.scoring == "sequence"]))


def _ids_after(tokenizer: object, rendered: str, answer: str) -> tuple[int, ...]:
    """The ids that the answer adds to the prompt; the two must not merge into one token."""
    prompt = tokenizer(rendered, add_special_tokens=False).input_ids
    whole = tokenizer(rendered + answer, add_special_tokens=False).input_ids
    if whole[: len(prompt)] != prompt:
        raise ValueError(
            f"the tokenizer merges the end of the prompt with the answer {answer!r}; end the template differently"
        )
    return tuple(whole[len(prompt) :])


def label_probabilities(
    answer_log_probs: np.ndarray, answers: Sequence[Answer], labels: Sequence[str]
) -> tuple[np.ndarray, np.ndarray]:
    """Sum answers into labels: [n, answers] log-probabilities -> (probabilities [n, labels], label mass [n]), float64.

    P(label) is a log-sum-exp over the label's answers. Where one sequence begins another ("no", "no idea"), the
    shorter keeps only what does not go on to be the longer, so that no probability is counted twice. A row in which
    no answer has any probability is NaN with mass 0.
    """
    exclusive = np.array(answer_log_probs, dtype=np.float64)
    groups = [[a for a, answer in enumerate(answers) if answer.label == label] for label in labels]
    with np.errstate(invalid="ignore", divide="ignore"):  # what has no answer is NaN here, an error in its record
        for shorter, longer in nested_answers(answers):
            possible = np.isfinite(exclusive[:, shorter])
            share = np.exp(exclusive[possible, longer] - exclusive[possible, shorter])
            exclusive[possible, shorter] += np.log1p(-np.minimum(share, 1.0))
        log_totals = np.stack([np.logaddexp.reduce(exclusive[:, group], axis=1) for group in groups], axis=1)
        log_mass = np.logaddexp.reduce(log_totals, axis=1)
        return np.exp(log_totals - log_mass[:, None]), np.minimum(np.exp(log_mass), 1.0)


def nested_answers(answers: Sequence[Answer]) -> list[tuple[int, int]]:
    """(number of an answer, number of a longer one that it begins) for all of these pairs, the longest answers first.

    In this order a longer answer already lacks what goes on from it when it is subtracted from a shorter one.
    """
    by_length = sorted(range(len(answers)), key=lambda a: -len(answers[a].ids))
    pairs = []
    for shorter in by_length:
        ids = answers[shorter].ids
        for longer in by_length:
            if len(answers[longer].ids) > len(ids) and answers[longer].ids[: len(ids)] == ids:
                pairs.append((shorter, longer))
    return pairs


def listed_probabilities(
    tokens: Sequence[tuple[str, float]], task: Task, complete: bool = False
) -> tuple[dict[str, float], float, dict]:
    """P over the labels, label mass and extras from the few next tokens that a server lists, [(text, log-probability)].

    What is not listed, the remainder R = 1 - sum P(listed), may be other spellings of any label. So label mass is an
    interval, from the listed mass M (`label_mass`) to M + R (`label_mass_high`), and the prediction, the label with the
    largest listed sum L, is certain only where no other label could have as much: L > L(other) + R. Then

        P(prediction) = L / (M + R), the least that it can be,   P(other) = (L(other) + its part of R) / (M + R)

    with all of R in equal parts for the labels of which no token is listed (`missing`), or else for all but the
    prediction. `complete`: every answer of every label is listed, and R = 0. Raises ValueError when the list does not
    decide.
    """
    known = dict.fromkeys(task.labels, 0.0)
    for text, logprob in tokens:
        if label := task.label_of(text):
            known[label] += math.exp(logprob)
    mass, listed = sum(known.values()), math.fsum(math.exp(logprob) for _, logprob in tokens)
    if mass == 0:
        raise ValueError(f"none of the {len(tokens)} tokens listed names a label; they hold {listed:.1%} of the mass")
    prediction = max(known, key=known.__getitem__)
    missing = [] if complete else [label for label, p in known.items() if p == 0]
    remainder = 0.0 if complete else max(1 - listed, 0.0)
    if missing and remainder == 0:  # rounding: a token that is not listed has at most what the last of the list has
        remainder = math.exp(min(logprob for _, logprob in tokens))
    _check_decided(known, prediction, missing, remainder, len(tokens))
    sharing = missing or [label for label in known if label != prediction]
    values = {label: p + (remainder / len(sharing) if label in sharing else 0.0) for label, p in known.items()}
    total = sum(values.values())
    extras = {"label_mass_high": min(mass + remainder, 1.0)} | ({"missing": missing} if missing else {})
    return {label: value / total for label, value in values.items()}, min(mass, 1.0), extras


def _check_decided(
    known: Mapping[str, float], prediction: str, missing: Sequence[str], remainder: float, n_tokens: int
) -> None:
    """ValueError where another label could have as much as the prediction, if all that is not listed were its own."""
    enough = known[prediction] - remainder - 1e-9  # servers round
    rivals = [label for label, p in known.items() if label != prediction and p >= enough]
    if not remainder or not rivals:  # of a complete list a tie goes to the label listed first
        return
    could_be = [label for label in missing if label in rivals]
    if could_be:
        what = f"{' and '.join(could_be)} not among the {n_tokens} tokens listed, and the {remainder:.1%} that is not "
        what += "listed could be it"
    else:
        sums = " and ".join(f"{label} {known[label]:.1%}" for label in (prediction, *rivals))
        what = f"the {n_tokens} tokens listed give {sums}, and the {remainder:.1%} that is not listed could be either's"
    raise ValueError(f"{what}; --top-tokens lists more")


def debias(probabilities: np.ndarray, mean_probabilities: np.ndarray) -> np.ndarray:
    """Batch calibration: log q_k = log p_k - log mean_j p_k(x_j), renormalised over the labels; [n, labels].

    Zhou et al., "Batch Calibration", ICLR 2024 (arXiv 2309.17249). It removes a prompt's lean to one label without
    any labelled data and assumes that labels are about equally frequent; on skewed data it does harm.
    """
    corrected = probabilities / mean_probabilities
    return corrected / corrected.sum(axis=1, keepdims=True)


def check_examples(examples: Iterable[Example], task: Task, source: str = "the table") -> int:
    """Count a table by reading it once, before any model is loaded; ValueError on a double id or a foreign label.

    Of every row eight bytes are kept, a hash of its id.
    """
    count, seen = 0, array("q")
    for count, example in enumerate(examples, 1):
        if example.label is not None and task.canonical_label(example.label) is None:
            raise ValueError(
                f"{source} row {count} has the label {example.label!r}, which task {task.name!r} does not know; "
                f"it knows {', '.join(task.labels)} (--label-map OLD=NEW renames)"
            )
        seen.append(hash(example.id))
    hashes, counts = np.unique(np.array(seen, dtype=np.int64), return_counts=True)
    if len(hashes) < count:
        _refuse_double_ids(examples, set(hashes[counts > 1].tolist()), source)
    return count


def labelled_examples(table: Table, task: Task, learner: str) -> list[Example]:
    """The rows of a table, each with one of the task's labels as the task spells it, for `learner` to learn from."""
    check_examples(table, task, table.source)
    examples = [Example(*task.identify(example)) for example in table]
    for example in examples:
        if example.label is None:
            why = f"{learner} learns from labelled rows only"
            raise ValueError(f"{table.source}: row {example.id!r} has no label; {why}")
    return examples


def _refuse_double_ids(examples: Iterable[Example], suspects: set[int], source: str) -> None:
    """ValueError that says how many rows have the id of an earlier one; different ids may share a hash."""
    seen: set[str] = set()
    repeated = []
    for example in examples:
        if hash(example.id) in suspects:
            if example.id in seen:
                repeated.append(example.id)
            seen.add(example.id)
    if repeated:
        raise ValueError(
            f"{source}: {len(repeated):,} rows have the id of an earlier row, the first {repeated[0]!r}; ids must be "
            'unique: name another --id-column, or none and rows are numbered (if it is called id: --id-column "")'
        )


# Flags


def add_task_argument(parser: argparse.ArgumentParser, default: str | None = "sentiment", otherwise: str = "") -> None:
    """The flag that says what is asked; the same in every script. `otherwise` says what no default means."""
    named = f"a task's name or a TOML file (default: {default or otherwise})"
    parser.add_argument("--task", default=default, help=named)
