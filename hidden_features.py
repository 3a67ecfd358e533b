"""What a model's hidden states say of a text: a few layers, at the last token and on average over the text's tokens.

    reader = feature_reader(llama, task)                 # a middle, two later layers and the last; the prompt rendered
    encoded = reader.encode("Not bad")                   # the ids, and which of them are the text's own
    for batch in reader.batches([encoded]): ...          # the features of rows that ran together, by name
    features = written_features(reader, texts, path, key)    # of many texts, on the disk, read where they are needed

Where the task's answers are single tokens, the log-probabilities of its labels come from the same pass. The file holds
a row of float32 for each text, in order: a stopped run goes on after the last whole one.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice, product
from pathlib import Path

import numpy as np

from command_line import advance_by, worth
from files import read_json, write_text
from llama import Llama
from probe import FIRST_TOKEN
from prompts import RenderedPrompt
from task import Answer, Task, find_answers, label_probabilities

DEPTHS = (1 / 2, 2 / 3, 5 / 6, 1)  # of the layers whose states are read, as shares of all
LAST, MEAN = POOLINGS = ("last token", "mean of the text")
LEAST_PROBABILITY = 1e-9  # of a label, before its logarithm is taken
ROWS_PER_WINDOW = {"cpu": 256, "mps": 1024, "cuda": 4096}  # sorted by length and written together


@dataclass(frozen=True)
class EncodedText:
    """The ids of a whole prompt, the first of the text's own and the one after its last, and the text they show."""

    ids: list[int]
    span: tuple[int, int]
    shown: str


@dataclass(frozen=True)
class FeatureBatch:
    """Rows that ran together: their numbers, and their features [batch, width] by name."""

    rows: list[int]
    features: Mapping[str, np.ndarray]


@dataclass(frozen=True)
class FeatureReader:
    """A model and a task's prompt, which of the states around a text are read, and perhaps the first token's answer."""

    llama: Llama
    task: Task
    prompt: RenderedPrompt
    before: tuple[int, ...]  # the ids of the prompt's two sides alone
    after: tuple[int, ...]
    layers: tuple[int, ...]
    poolings: tuple[str, ...]
    answers: tuple[Answer, ...]  # single tokens; none where the first token's answer is not wanted
    truncate: bool
    batch_size: int | None

    @property
    def names(self) -> dict[str, tuple[int, int]]:
        """Each array of hidden states by name: its layer's place among `layers`, and its pooling's number."""
        places = product(enumerate(self.layers), self.poolings)
        return {f"layer {layer}, {pooling}": (place, POOLINGS.index(pooling)) for (place, layer), pooling in places}

    @property
    def widths(self) -> dict[str, int]:
        """How many numbers each feature has, by name, in order."""
        widths = dict.fromkeys(self.names, self.llama.hidden_size)
        return widths | ({FIRST_TOKEN: len(self.task.labels)} if self.answers else {})

    @property
    def window(self) -> int:
        return ROWS_PER_WINDOW.get(self.llama.device, 256)

    def encode(self, text: str) -> EncodedText:
        """The prompt's ids; the text's own are those that the prompt's two sides alone have not. ValueError if none."""
        ids, shown = self.llama.encode_within(self.prompt, text, truncate=self.truncate)
        start = min(common_length(ids, self.before), len(ids) - 1)
        end = len(ids) - common_length(ids[:start:-1], self.after[::-1])
        return EncodedText(ids, (start, end), shown)

    def batches(self, encoded: Sequence[EncodedText], skip: Collection[int] = ()) -> Iterator[FeatureBatch]:
        """The features of encoded texts, a batch at a time; one whose rows are all among `skip` is left out."""
        ids, spans = [text.ids for text in encoded], [text.span for text in encoded]
        answers = [answer.ids[0] for answer in self.answers]
        for batch in self.llama.hidden_states(ids, spans, self.layers, answers, self.batch_size, skip):
            features = {name: batch.hidden[:, layer, pooling] for name, (layer, pooling) in self.names.items()}
            if answers:
                features[FIRST_TOKEN] = log_label_shares(batch.log_probs, self.answers, list(self.task.labels))
            yield FeatureBatch(batch.rows, features)

    def place_of(self, name: str) -> tuple[int, str]:
        """The layer and the pooling of an array of hidden states, by its name."""
        place, pooling = self.names[name]
        return self.layers[place], POOLINGS[pooling]

    def of(self, layer: int, pooling: str, with_first_token: bool) -> FeatureReader:
        """The reader of one layer's states alone, perhaps with the first token's answer."""
        answers = self.answers if with_first_token else ()
        return replace(self, layers=(layer,), poolings=(pooling,), answers=answers)


def feature_reader(
    llama: Llama,
    task: Task,
    layers: Sequence[int] | None = None,
    truncate: bool = False,
    batch_size: int | None = None,
) -> FeatureReader:
    """Join a model and a task, whose prompt is taken as it stands; by default layers at DEPTHS of the model's.

    Layer 0 is the embeddings, the last one comes after the last norm.
    """
    depth = llama.model.config.get_text_config().num_hidden_layers
    layers = sorted({max(1, round(depth * share)) for share in DEPTHS}) if layers is None else sorted(set(layers))
    if not layers or layers[0] < 0 or layers[-1] > depth:
        raise ValueError(f"{llama.name} has the layers 0 to {depth}, not {', '.join(map(str, layers)) or 'none'}")
    prompt = llama.task_prompt(task)
    before = tuple(llama.encode(replace(prompt, after=""), ""))
    after = tuple(llama.encode(RenderedPrompt("", prompt.after, ()), ""))
    answers = single_token_answers(task, llama, prompt)
    return FeatureReader(llama, task, prompt, before, after, tuple(layers), POOLINGS, answers, truncate, batch_size)


def common_length(first: Sequence[int], second: Sequence[int]) -> int:
    """How many of the first ids two sequences have in common."""
    return next(
        (n for n, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), min(len(first), len(second))
    )


def single_token_answers(task: Task, llama: Llama, prompt: RenderedPrompt) -> tuple[Answer, ...]:
    """The single tokens that answer the task, none where its labels cannot be told by one."""
    if task.scoring != "first-token":
        return ()
    try:
        return tuple(find_answers(task, llama.tokenizer, prompt.render("text")))
    except ValueError:
        return ()


def log_label_shares(log_probs: np.ndarray, answers: Sequence[Answer], labels: Sequence[str]) -> np.ndarray:
    """log P(label) [n, labels] from the log-probabilities of answers [n, answers]."""
    shares, _ = label_probabilities(log_probs, answers, labels)
    return np.log(np.maximum(np.nan_to_num(shares), LEAST_PROBABILITY))


def written_features(
    reader: FeatureReader,
    encoded: Sequence[EncodedText],
    path: Path,
    key: str,
    advance: Callable[[int], None] = lambda n: None,
) -> dict[str, np.ndarray]:
    """The features of encoded texts by name, [n, width] each, from the file at `path`, which is written or continued.

    A file beside it keeps `key`, which stands for model, prompt, layers and texts: another one's is begun anew.
    """
    widths, total = reader.widths, sum(reader.widths.values())
    record = path.with_suffix(".json")
    if not (path.exists() and record.exists() and read_json(record) == {"key": key, "width": total}):
        path.unlink(missing_ok=True)
        write_text(record, json.dumps({"key": key, "width": total}) + "\n")
    with open(path, "ab") as file:
        whole = file.tell() // (4 * total)
        done = len(encoded) if whole >= len(encoded) else whole - whole % reader.window
        file.truncate(done * 4 * total)
        advance_by(advance, done, 0)
        rest = iter(encoded[done:])
        while window := list(islice(rest, reader.window)):
            rows, texts = np.empty((len(window), total), dtype=np.float32), [row.shown for row in window]
            for batch in reader.batches(window):
                rows[batch.rows] = np.hstack([batch.features[name] for name in widths])
                advance_by(advance, len(batch.rows), worth([texts[n] for n in batch.rows], texts))
            file.write(rows.tobytes())
            file.flush()
            os.fsync(file.fileno())
    stored = np.memmap(path, dtype=np.float32, mode="r", shape=(len(encoded), total))
    ends = np.cumsum(list(widths.values()))
    return {name: stored[:, end - width : end] for (name, width), end in zip(widths.items(), ends, strict=True)}
