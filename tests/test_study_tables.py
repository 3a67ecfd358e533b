"""Recordings of the study, and the numbers that follow from them."""

import gzip
import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import plotting
import study_tables
from study_tables import BAG_OF_WORDS, COMMONEST, DRAFT, PROBE, Study, StudyRows, StudyRun

ROOT = Path(__file__).parent.parent
RECORDINGS = sorted((ROOT / "data" / "predictions" / "public").glob("*.jsonl.gz"))


def made_study(labelled=120, unseen=100, n_labels=3, seed=0):
    """A set with a draft that knows nothing and a probe that is right in nine of ten rows."""
    draw, n = np.random.default_rng(seed), labelled + unseen
    truth = draw.integers(n_labels, size=n)
    keys = tuple(f"{number:012x}" for number in range(n))
    labels = tuple("abcdefghijklmnopqrstuvwxyz"[:n_labels])
    rows = StudyRows(labels, tuple(map(str, range(n))), keys, truth, np.arange(n), labelled)
    said = np.where(draw.random(n) < 0.9, truth, (truth + 1) % n_labels)
    knows = np.full((n, n_labels), 0.2 / (n_labels - 1))
    knows[np.arange(n), said] = 0.8
    guesses = draw.dirichlet(np.ones(n_labels), size=n)
    whole = np.arange(labelled)
    runs = (
        StudyRun(DRAFT, labelled, whole, guesses, draw.random(n), 60.0),
        StudyRun(PROBE, labelled, whole, knows, None, 30.0, {"chosen": "layer 3"}),
    )
    return Study("toy", "toy rows", "toy.csv", (60, labelled), rows, runs)


@pytest.fixture(scope="module")
def measured():
    study = made_study()
    return study, study_tables.measure_study(study)


@pytest.mark.parametrize("n_labels", [3, 20])
def test_a_recording_gives_back_the_rows_and_probabilities_to_one_part_in_500(tmp_path, n_labels):
    study = made_study(n_labels=n_labels)
    path = tmp_path / "toy.jsonl.gz"
    study_tables.write_study(path, study)
    first = path.read_bytes()
    study_tables.write_study(path, study)
    assert path.read_bytes() == first
    back = study_tables.read_study(path)
    for name in ("ids", "text_keys", "labels", "labelled"):
        assert getattr(back.rows, name) == getattr(study.rows, name)
    np.testing.assert_array_equal(back.rows.truth, study.rows.truth)
    for run, old in zip(back.runs, study.runs, strict=True):
        assert (run.method, run.n, run.seconds, run.about) == (old.method, old.n, old.seconds, old.about)
        np.testing.assert_allclose(run.probabilities.sum(axis=1), 1)
        of_truth = np.arange(len(study.rows.truth)), study.rows.truth
        np.testing.assert_allclose(run.probabilities[of_truth], old.probabilities[of_truth], rtol=0.004)
        assert (run.probabilities.argmax(axis=1) == old.probabilities.argmax(axis=1)).mean() > 0.98


def test_of_many_labels_the_likeliest_and_the_true_one_are_kept_and_the_rest_is_spread_evenly():
    probabilities = np.array([0.3, 0.2, 0.1, 0.1, 0.08, 0.07, 0.05, 0.04, 0.03, 0.02, 0.01])
    numbers = study_tables.packed(probabilities, truth=10)
    assert sorted(numbers[::2]) == [0, 1, 2, 3, 4, 5, 10]
    back = study_tables.unpacked(numbers, 11)
    np.testing.assert_allclose(back[[0, 10]], [0.3, 0.01], rtol=0.004)
    np.testing.assert_allclose(back[6:10], 0.035, rtol=0.03)


def test_other_files_are_refused_in_one_line(tmp_path):
    for content in (b"no gzip", gzip.compress(b"{}\n"), gzip.compress(b'{"format": "x"}\n{}\n'), gzip.compress(b"[]")):
        (tmp_path / "x.gz").write_bytes(content)
        with pytest.raises(ValueError, match=r"x\.gz is not a recording of the study"):
            study_tables.read_study(tmp_path / "x.gz")


def test_numbers_are_those_of_the_unseen_rows_alone(measured):
    study, everything = measured
    found = {(one.method, one.labels): one for one in everything}
    assert set(found) == {("commonest label", 60), ("commonest label", 120), (DRAFT, 60), (DRAFT, 120), (PROBE, 120)}
    rows, (draft, probe) = study.rows, study.runs
    unseen, one = rows.unseen, found[PROBE, 120]
    right = (probe.probabilities[unseen].argmax(axis=1) == rows.truth[unseen]).mean()
    loss = -np.log(probe.probabilities[unseen, rows.truth[unseen]])
    assert one.accuracy.value == right and one.accuracy.low < right < one.accuracy.high
    assert one.log_loss == pytest.approx(loss.mean())
    drafted = -np.log(draft.probabilities[unseen, rows.truth[unseen]])
    assert one.minus_draft.value == pytest.approx((loss - drafted).mean()) and one.minus_draft.high < 0
    assert found[DRAFT, 60].label_mass == pytest.approx(draft.label_mass[unseen].mean())
    commonest = np.bincount(rows.truth[:60]).argmax()
    assert found["commonest label", 60].accuracy.value == (rows.truth[unseen] == commonest).mean()
    # Nine of ten rows are right whatever the confidence: 80 % can be guaranteed, 95 % cannot.
    assert one.at(0.8).is_made and one.at(0.8).share > 0.5 and not one.at(0.8).is_broken
    assert not one.at(0.95).is_made and not found[DRAFT, 120].at(0.8).is_made


def test_a_guarantee_that_unseen_rows_break_is_counted_as_broken():
    kept, broken = (study_tables.tested(0.9, 0.5, np.full(100, 0.7), np.arange(100) < right) for right in (93, 80))
    assert (kept.right, kept.is_broken, kept.is_refuted) == (0.93, False, False)
    assert (broken.right, broken.is_broken, broken.is_refuted) == (0.8, True, True)
    assert study_tables.tested(0.9, 0.5, np.full(100, 0.7), np.arange(100) < 88).is_refuted is False
    assert not study_tables.tested(0.9, None, np.full(3, 0.7), np.ones(3, bool)).is_made
    assert study_tables.automated(broken) == "100 %, right .800, broken"


def test_what_was_run_is_in_the_tables_and_what_was_not_is_not(measured):
    study, found = measured
    table = study_tables.study_table(study, found)
    assert table.count("\n") == 1 + len(found) and BAG_OF_WORDS not in table
    assert "toy rows" in study_tables.probe_table([(study, found)])
    assert len(study_tables.improving_table([(study, found)]).splitlines()) == 2  # nothing was improved
    assert study_tables.guarantees_table([(study, found)]).count("| probe |") == len(study_tables.TARGETS)


def test_a_draft_that_was_asked_about_fewer_labels_than_the_others_stands_with_its_own_number():
    study = made_study()
    draft, probe = study.runs
    asked = np.r_[:60, 120:220]
    few = replace(
        draft,
        n=60,
        calibrate_on=asked[:60],
        probabilities=draft.probabilities[asked],
        label_mass=draft.label_mass[asked],
    )
    study = replace(study, sizes=(120,), runs=(few, probe))
    found = study_tables.measure_study(study)
    assert [(one.method, one.labels) for one in found if one.method != COMMONEST] == [(DRAFT, 60), (PROBE, 120)]
    (line,) = study_tables.first_page_table([(study, found)]).splitlines()[2:]
    assert f"{study_tables.short(found[2].accuracy.value)}; - | not run" in line  # and no bag of words


def test_the_figure_shows_the_share_of_each_method_with_few_and_with_more_labels(measured, tmp_path, monkeypatch):
    study, found = measured
    study = replace(study, sizes=(300, 1000))
    found = [replace(one, labels={60: 300, 120: 1000}[one.labels]) for one in found]
    few, more = (study_tables.coverage([(study, found)], 0.8, most) for most in (False, True))
    assert few == {"toy rows": plotting.SetCoverage(300, {DRAFT: (0.0, False)})}
    share = next(one.at(0.8).share for one in found if one.method == PROBE)
    assert more == {"toy rows": plotting.SetCoverage(1000, {DRAFT: (0.0, False), PROBE: (share, False)})}
    drawn = []
    monkeypatch.setattr(plotting, "coverage_bars", lambda axis, place, of_set, colors: drawn.append((place, of_set)))
    path = tmp_path / "figure.png"
    plotting.guaranteed_coverage(path, {"few": few, "more": more}, methods=[DRAFT, PROBE], target=0.8, unseen=100)
    assert drawn == [(0, few["toy rows"]), (0, more["toy rows"])] and path.stat().st_size > 5000


@pytest.mark.parametrize("path", RECORDINGS, ids=lambda path: path.name)
def test_recordings_hold_no_text_and_unseen_rows_share_no_group_with_labelled_ones(path):
    lines = [json.loads(line) for line in gzip.decompress(path.read_bytes()).splitlines()]
    assert set(lines[1]) == {"id", "text", "label", "group"}
    assert all(re.fullmatch("[0-9a-f]{12}", key) for key in lines[1]["text"])
    assert all(re.fullmatch("(train-|test-)?[0-9]+", id) for id in lines[1]["id"])
    rows = study_tables.read_study(path).rows
    assert not set(rows.groups[rows.unseen]) & set(rows.groups[: rows.labelled])
    assert not set(rows.text_keys[rows.labelled :]) & set(rows.text_keys[: rows.labelled])
    assert len(rows.unseen) == (2000 if path.name == "ours.jsonl.gz" else 500)
