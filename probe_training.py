"""Fit a probe to labelled texts and write its folder: features, the probe, its out-of-fold predictions.

    record = train_probe(llama, task, examples, "probe")

The record comes last: a folder with probe.json in it is finished, and any other training is gone on with, from the
features that are there.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import astuple
from pathlib import Path

import numpy as np

import predictions
import scoring
import tables
from command_line import progress
from embedded_model import sha256
from hidden_features import FeatureReader, feature_reader, written_features
from llama import Llama
from probe import FIRST_TOKEN, FittedProbe, fit_probe
from probe_files import PROBE, TENSORS, ProbeRecord, fingerprint_of, load_probe, save_record, save_tensors
from tables import Example, Table, text_key
from task import Task

OUT_OF_FOLD, FEATURES = "out_of_fold.jsonl", "features.f32"
OURS = {PROBE, TENSORS, OUT_OF_FOLD, FEATURES, "features.json"}


def task_of_labels(table: Table) -> Task:
    """The task of a table that brings its own labels: the text alone is what the model reads."""
    labels = sorted({example.label for example in table if example.label is not None})
    if len(labels) < 2:
        raise ValueError(f"{table.source} has {len(labels)} labels; a probe tells at least two apart (--label-column)")
    return Task("table", {label: (label,) for label in labels}, "{text}")


def train_probe(
    llama: Llama,
    task: Task,
    examples: Sequence[Example],
    folder: str | Path,
    groups: Sequence[object] | None = None,
    layers: Sequence[int] | None = None,
    truncate: bool = False,
    batch_size: int | None = None,
    seed: int = 0,
    overwrite: bool = False,
) -> ProbeRecord:
    """Fit a probe to labelled rows and write its folder; the same call again finds it finished.

    `groups` say which rows belong together (default: near-duplicate texts), `seed` draws the folds. ValueError for a
    folder with other files and, unless `overwrite`, for one with another probe.
    """
    folder, reader = Path(folder), feature_reader(llama, task, layers, truncate, batch_size)
    groups = tables.groups_of(examples) if groups is None else groups
    made_of = {**llama.identity, "task": task.settings(), "layers": reader.layers, "truncate": truncate}
    made_of["prompt"] = [reader.prompt.before, reader.prompt.after]
    rows = hash_of([[*astuple(example), str(group)] for example, group in zip(examples, groups, strict=True)])
    made_from = predictions.fingerprint(**made_of, rows=rows, seed=seed)
    if is_finished(folder, made_from, overwrite):
        return load_probe(folder)[0]
    folder.mkdir(parents=True, exist_ok=True)
    with predictions.open_output(folder / OUT_OF_FOLD):  # locked against a second run
        encoded, errors = scoring.encode_all(examples, reader.encode)
        texts = [examples[number].text for number in encoded]
        with progress(len(texts), 0) as advance:
            key = predictions.fingerprint(**made_of, texts=hash_of(texts))
            features = written_features(reader, list(encoded.values()), folder / FEATURES, key, advance)
        first_token = features.pop(FIRST_TOKEN, None)
        fitted = fit_probe(
            features,
            [examples[number].label for number in encoded],
            [groups[number] for number in encoded],
            labels=list(task.labels),
            first_token=first_token,
            texts=texts,
            seed=seed,
        )
        save_tensors(folder / TENSORS, fitted.probe)
        record = record_of(fitted, reader, sha256(folder / TENSORS), made_from, rows, texts)
        write_out_of_fold(folder / OUT_OF_FOLD, record, task, examples, list(encoded), errors, fitted.out_of_fold)
        save_record(folder / PROBE, record)  # last: it says that all is there
    return record


def hash_of(rows: Sequence[object]) -> str:
    """Sixteen hex digits of rows as JSON."""
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()[:16]


def is_finished(folder: Path, made_from: str, overwrite: bool) -> bool:
    """Whether a folder holds this very probe; ValueError where it holds another, or somebody's files."""
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"--output-dir {folder} is a file")
    present = {path.name for path in folder.iterdir()} if folder.exists() else set()
    if present and not present & OURS:
        raise ValueError(f"--output-dir {folder} holds other files; name a new folder")
    if PROBE not in present:
        return False
    if load_probe(folder)[0].made_from == made_from:
        return OUT_OF_FOLD in present
    if not overwrite:
        raise ValueError(f"{folder} holds a probe of other rows or settings; --overwrite replaces it")
    (folder / PROBE).unlink()
    return False


def record_of(
    fitted: FittedProbe, reader: FeatureReader, tensors: str, made_from: str, rows: str, texts: Sequence[str]
) -> ProbeRecord:
    """What probe.json says of a fitted probe whose tensors have that hash."""
    hidden, members = fitted.probe.members[0], zip(fitted.probe.members, fitted.probe.weights.tolist(), strict=True)
    layer, pooling = reader.place_of(hidden.name)
    reader = reader.of(layer, pooling, any(member.name == FIRST_TOKEN for member in fitted.probe.members))
    shares = fitted.label_counts / len(texts)
    shares = shares[shares > 0]
    return ProbeRecord(
        labels=list(fitted.probe.labels),
        task=reader.task.settings(),
        prompt=[reader.prompt.before, reader.prompt.after],
        model=reader.llama.name,
        identity=reader.llama.identity,
        layer=layer,
        pooling=pooling,
        C=hidden.strength / len(hidden.mean),
        members=[{"name": m.name, "strength": m.strength, "weight": weight} for m, weight in members],
        truncate=reader.truncate,
        n=len(texts),
        groups=fitted.groups,
        out_of_fold={
            "log_loss": fitted.chosen.log_loss,
            "accuracy": fitted.chosen.accuracy,
            "commonest_label_log_loss": float(-np.sum(shares * np.log(shares))),
            "commonest_label_accuracy": float(shares.max()),
        },
        candidates=[candidate.record() for candidate in fitted.candidates],
        rare=fitted.rare,
        made_from=made_from,
        rows=rows,
        fitted_on=sorted({text_key(text) for text in texts}),
        tensors=tensors,
        fingerprint=fingerprint_of(reader, tensors),
    )


def write_out_of_fold(
    path: Path,
    record: ProbeRecord,
    task: Task,
    examples: Sequence[Example],
    fitted: Sequence[int],
    errors: Mapping[int, str],
    probabilities: np.ndarray,
) -> None:
    """The training rows in order: those numbered `fitted` with their probabilities, the others with their errors."""
    common = {"method": "probe", "model": record.model, "task": task.name, "fingerprint": record.fingerprint}
    by_number = dict(zip(fitted, probabilities.tolist(), strict=True))
    rows = []
    for number, example in enumerate(examples):
        if number in errors:
            rows.append(predictions.failed(*astuple(example), errors[number], **common))
        else:
            by_label = dict(zip(record.labels, by_number[number], strict=True))
            rows.append(predictions.scored(*astuple(example), by_label, 1.0, **common))
    predictions.replace(path, rows)
