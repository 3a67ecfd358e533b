"""A probe in a folder: its numbers as safetensors, what they belong to as JSON, nothing that could run.

record, probe = load_probe("probe")          # checked: format, fields, and that the two files belong together
save_tensors(path, probe)                    # exact: a probe that is read again says the same to the last bit
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import predictions
from command_line import one_line
from embedded_model import sha256
from files import read_json, validated, whole_file, write_text
from hidden_features import FeatureReader
from probe import Member, Probe

FORMAT = "calibrated-confidence probe, version 1"
PROBE, TENSORS = "probe.json", "probe.safetensors"


@dataclass(frozen=True)
class ProbeRecord:
    """What probe.json says of a probe: what it belongs to, what it is made of, how it did on rows it had not seen."""

    labels: list[str]
    task: Mapping[str, object]  # its settings, as the model was asked
    prompt: list[str]  # rendered, before and after the text
    model: str
    identity: Mapping[str, str]  # of the weights: their hash, precision, adapter
    layer: int
    pooling: str
    C: float  # scikit-learn's, for the standardised hidden states
    members: list[Mapping[str, object]]  # name, strength and weight of each
    truncate: bool
    n: int
    groups: int
    out_of_fold: Mapping[str, float]  # log loss, accuracy, and those of the commonest label
    candidates: list[Mapping[str, object]]  # what was tried, with its log loss and accuracy out of fold
    rare: Mapping[str, int]  # labels with fewer than five rows
    made_from: str  # model, prompt, rows, labels and groups: what a repeated command knows it by
    rows: str  # hash of the training rows
    fitted_on: list[str]  # tables.text_key of each
    tensors: str  # hash of probe.safetensors
    fingerprint: str  # of its predictions


def save_tensors(path: Path, probe: Probe) -> None:
    """The numbers of a probe, exact."""
    from safetensors.numpy import save_file

    tensors = {"weights": probe.weights}
    for member in probe.members:
        arrays = {name: value for name, value in vars(member).items() if isinstance(value, np.ndarray)}
        tensors |= {f"{member.name}.{name}": np.ascontiguousarray(value) for name, value in arrays.items()}
        tensors[f"{member.name}.unseen"] = np.array([member.unseen])
    with whole_file(path) as scratch:
        save_file(tensors, scratch)
        scratch.chmod(0o644)


def save_record(path: Path, record: ProbeRecord) -> None:
    """What a probe belongs to and how it did, as JSON."""
    write_text(path, json.dumps({"format": FORMAT} | vars(record), indent=1, allow_nan=False) + "\n")


def load_probe(folder: str | Path) -> tuple[ProbeRecord, Probe]:
    """Read and check the probe in a folder; ValueError in one line that says what is wrong with it."""
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    path = Path(folder) / PROBE
    if not path.is_file():
        raise ValueError(f"{folder} holds no probe: it has no {PROBE}; probe_confidence.py --train makes one")
    content, where = read_json(path), f"{path}: damaged or edited by hand"
    if not isinstance(content, dict) or content.pop("format", None) != FORMAT:
        raise ValueError(f"{path} is not a probe: its format is not {FORMAT!r}")
    record = validated(ProbeRecord, content, where)
    tensors = Path(folder) / TENSORS
    if sha256(tensors) != record.tensors:
        raise ValueError(f"{tensors} is not the file that {path} was written with; fit the probe again")
    try:
        arrays = load_file(tensors)
        members = [loaded_member(arrays, str(m["name"]), float(m["strength"])) for m in record.members]
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{where}: {one_line(error)}") from None
    return record, Probe(tuple(record.labels), tuple(members), arrays["weights"])


def loaded_member(arrays: Mapping[str, np.ndarray], name: str, strength: float) -> Member:
    """The member of that name among a probe's tensors."""
    own = {key.removeprefix(f"{name}."): value for key, value in arrays.items() if key.startswith(f"{name}.")}
    return Member(name=name, strength=strength, unseen=float(own.pop("unseen")[0]), **own)


def fingerprint_of(reader: FeatureReader, tensors: str) -> str:
    """Of the predictions of a probe, which its tensors' hash stands for."""
    settings = {"tensors": tensors, "prompt": [reader.prompt.before, reader.prompt.after]}
    settings |= {"truncate": True} if reader.truncate else {}
    known = {**reader.llama.identity, "task": reader.task.settings(), "method": "probe"}
    return predictions.fingerprint(**known, settings=settings)
