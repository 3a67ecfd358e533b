"""The ablation's recording: what the README prints of it, and that its numbers are what third parties compute."""

import csv
import json
from dataclasses import replace

import numpy as np
import pytest
from sklearn.metrics import log_loss, roc_auc_score
from test_architecture import ROOT

import ablation
import tables
from calibration import TemperatureScalingCalibrator


@pytest.fixture(scope="module")
def rows():
    with open(ablation.RECORDING, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def report():
    group = {row["id"]: row["group"] for _, row in tables.read_rows("data:test")}
    found = ablation.variants(ablation.read_recording())
    return ablation.summarize(found, [group[example.id] for example in ablation.examples("test")])


def test_the_documents_show_what_the_script_prints(capsys):
    ablation.main([])
    printed = capsys.readouterr().out.rstrip()
    documents = [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
    assert any(printed in document.read_text(encoding="utf-8") for document in documents)


def test_the_recording_is_of_validation_and_test_rows_with_their_labels(rows):
    for split in ("validation", "test"):
        recorded = [(row["id"], row["label"]) for row in rows if row["split"] == split]
        assert recorded == [(example.id, example.label) for example in ablation.examples(split)]
    runs = {f"{loss}/{seed}" for loss in ablation.LOSSES for seed in ablation.SEEDS}
    runs |= {f"{name}/{seed}" for name in ("head", "dropout") for seed in ablation.SEEDS}
    assert runs == set(rows[0]) - {"id", "split", "label"}


@pytest.mark.parametrize("loss", ablation.LOSSES)
def test_the_numbers_of_a_loss_are_those_of_scikit_learn(rows, report, loss):
    losses, areas = [], []
    for seed in ablation.SEEDS:
        of = [row for row in rows if row["split"] == "test"]
        p = np.array([float(row[f"{loss}/{seed}"]) for row in of])
        positive = np.array([row["label"] == "positive" for row in of])
        losses.append(log_loss(positive, p))
        areas.append(roc_auc_score((p > 0.5) == positive, np.maximum(p, 1 - p)))
    assert report[loss]["log_loss"] == pytest.approx(np.mean(losses))
    assert report[loss]["log_loss_of_seeds"] == pytest.approx(losses)
    assert report[loss]["auroc"] == pytest.approx(np.mean(areas))


def test_a_temperature_is_fitted_on_validation_rows_alone():
    recording = ablation.read_recording()
    test, column = recording.is_test, recording.columns["brier/1"]
    confidence, correct = np.maximum(column, 1 - column), (column > 0.5) == recording.positive
    fitted = TemperatureScalingCalibrator().fit(confidence[~test], correct[~test])
    # Other test answers, the same temperature.
    changed = {name: np.where(test, 0.3, column) for name, column in recording.columns.items()}
    for of, truth in ((recording, confidence[test]), (replace(recording, columns=changed), np.full(test.sum(), 0.7))):
        found = ablation.variants(of)["brier, temperature"][1].confidence
        assert found == pytest.approx(fitted.predict(truth))


def test_a_gain_is_the_difference_of_log_losses_on_the_same_rows(report):
    for name in ("brier", "head", "mmce, temperature"):
        assert report[name]["gain"][0] == pytest.approx(report["cross-entropy"]["log_loss"] - report[name]["log_loss"])
    same, dropout = report["cross-entropy, same rows"], report["dropout"]
    assert (same["n"], dropout["n"]) == (ablation.DROPOUT_ROWS,) * 2
    assert dropout["gain"][0] == pytest.approx(same["log_loss"] - dropout["log_loss"])


def test_a_run_that_is_not_finished_writes_no_recording_and_one_that_is_writes_it_anew(tmp_path, monkeypatch, capsys):
    before = ablation.RECORDING.read_bytes()
    monkeypatch.setattr(ablation, "RECORDING", tmp_path / "ablation.csv")
    recorded = [*csv.DictReader(before.decode().splitlines())]
    files = {f"{loss}/{seed}": tmp_path / f"{loss}-{seed}.json" for loss in ablation.LOSSES for seed in ablation.SEEDS}
    for name, path in files.items():
        assert not ablation.run_all(tmp_path, ())
        assert name in capsys.readouterr().out and not ablation.RECORDING.exists()
        run = {s: [float(row[name]) for row in recorded if row["split"] == s] for s in ("validation", "test")}
        for extra in ("head", "dropout"):
            column = name.replace("cross-entropy", extra)
            if column != name:
                run[extra] = [float(row[column]) for row in recorded if row[column]]
        path.write_text(json.dumps(run), encoding="utf-8")
    assert ablation.run_all(tmp_path, ()) and ablation.RECORDING.read_bytes() == before
