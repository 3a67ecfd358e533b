"""The ablation's recording: what the README prints of it, and that its numbers are what third parties compute."""

import csv

import numpy as np
import pytest
from sklearn.metrics import log_loss, roc_auc_score
from test_architecture import ROOT

import ablation
import tables
import task as tasks
from calibration import TemperatureScalingCalibrator


@pytest.fixture(scope="module")
def rows():
    with open(ablation.RECORDING, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def report():
    group = {row["id"]: row["group"] for _, row in tables.read_rows("data:test")}
    found = ablation.variants(*ablation.read_recording())
    return ablation.compare(found, [group[example.id] for example in ablation.examples("test")])


def test_the_readme_shows_what_the_script_prints(capsys):
    ablation.main([])
    printed = capsys.readouterr().out.rstrip()
    assert printed in (ROOT / "README.md").read_text(encoding="utf-8")


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


def test_a_temperature_is_fitted_on_validation_rows_alone(rows):
    values, positive, test = ablation.read_recording()
    changed = {name: np.where(test, 0.3, column) for name, column in values.items()}
    column = values["brier/1"]
    cooled = TemperatureScalingCalibrator().fit(
        np.maximum(column, 1 - column)[~test], ((column > 0.5) == positive)[~test]
    )
    expected = cooled.predict(np.maximum(column, 1 - column)[test])
    assert ablation.variants(values, positive, test)["brier, temperature"][1][0] == pytest.approx(expected)
    # Other test answers, the same temperature.
    assert ablation.variants(changed, positive, test)["brier, temperature"][1][0] == pytest.approx(
        cooled.predict(np.full(test.sum(), 0.7))
    )


def test_a_gain_is_the_difference_of_log_losses_on_the_same_rows(report):
    for name in ("brier", "head", "mmce, temperature"):
        assert report[name]["gain"][0] == pytest.approx(report["cross-entropy"]["log_loss"] - report[name]["log_loss"])
    same, dropout = report["cross-entropy, same rows"], report["dropout"]
    assert (same["n"], dropout["n"]) == (ablation.DROPOUT_ROWS,) * 2
    assert dropout["gain"][0] == pytest.approx(same["log_loss"] - dropout["log_loss"])


def test_a_run_that_is_not_finished_writes_no_recording(tmp_path, monkeypatch, capsys):
    for name in ("brier-0", "focal-2"):
        (tmp_path / f"{name}.json").write_text("{}", encoding="utf-8")
    monkeypatch.setattr(ablation, "write_recording", lambda runs: pytest.fail("it is incomplete"))
    assert not ablation.run_all(tmp_path, ())
    assert "mmce/2" in (printed := capsys.readouterr().out) and "focal/2" not in printed
