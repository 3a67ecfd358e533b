"""calibration.py: cross-fitting and choosing, the calibrator file; each calibrator has tests of its own.

Planted losses, simulations with a known truth and files that somebody has edited say what is right.
"""

import copy
import json
import math
import re
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import expit
from scipy.stats import binom
from test_calibrators import Share, drawn

import calibration
import predictions
from calibration import (
    LABEL_METHODS,
    METHODS,
    ClasswiseCalibrator,
    FittedCalibrator,
    Recipe,
    Scores,
    choose,
    cross_fit,
    rare_labels,
    recipes,
    scores_of,
)
from calibration import PlattScalingCalibrator as Platt
from calibration import load_calibrator as load
from calibration import save_calibrator as save
from shortlists import Shortlist
from tables import text_key

COMMON = {"method": "logprobs", "model": "tiny", "task": "sentiment", "fingerprint": "3f9c2a71"}


# Cross-fitting


GROUPS = {
    "numbers": np.arange(60) // 3,
    "tuples": [("a", i // 3) for i in range(60)],
    "mixed": [*range(30), *map(str, range(30))],  # 1 and "1" are two groups
    "none": None,
}


@pytest.mark.parametrize("kind", GROUPS)
def test_no_row_is_calibrated_by_its_own_group_and_each_is_once(kind):
    trained = []

    class Spy(Share):
        def fit(self, confidence, correct):
            trained.append(confidence)
            return super().fit(confidence, correct)

    number, correct = np.arange(60) / 60, np.arange(60) % 4 > 0
    groups = list(range(60)) if GROUPS[kind] is None else list(GROUPS[kind])
    answers, tested = cross_fit(Spy(), number, correct, GROUPS[kind], n_splits=4, seed=1), []
    for rows in trained:
        train = {round(x * 60) for x in rows}
        test = {*range(60)} - train
        assert not {groups[i] for i in train} & {groups[i] for i in test}
        assert answers[sorted(test)] == pytest.approx(np.mean(correct[sorted(train)]))
        tested += test
    assert sorted(tested) == list(range(60))
    assert (cross_fit(Platt(), number, correct, seed=2) != cross_fit(Platt(), number, correct, seed=3)).any()


def test_many_groups_are_dealt_out_whole_and_of_many_rows_some_are_trained_on(monkeypatch):
    monkeypatch.setattr(calibration, "MANY_GROUPS", 99)
    monkeypatch.setattr(calibration, "MOST_TO_FIT", 150)
    groups = np.random.default_rng(0).permutation(np.arange(300) // 2 % 149)
    folds = calibration.grouped_folds(np.full(300, 0.7), np.arange(300) % 2, groups)
    assert sorted(np.concatenate([test for _, test in folds]).tolist()) == [*range(300)]
    for train, test in folds:
        assert len(set(train.tolist())) == 150 and 55 <= len(test) <= 65
        assert not {*groups[train].tolist()} & {*groups[test].tolist()}


def test_too_few_rows_or_groups_are_a_value_error():
    few = "^(.+ too few for 5 folds|.+ confidences, .+ groups)$"
    for n, groups in ((4, None), (60, np.arange(60) % 4), (0, None), (60, [1, 2, 3]), (60, [*range(61)])):
        with pytest.raises(ValueError, match=few):
            cross_fit(Platt(), np.full(n, 0.7), np.arange(n) % 2, groups)


# Choosing


def test_few_labels_get_few_parameters():
    def names(n):
        return {(r.method, r.class_aware) for r in recipes(n)}

    few = {("temperature", True), ("platt", True), ("platt", False)}
    some = few | {(m, aware) for m in ("beta", "venn-abers") for aware in (True, False)}
    assert names(20) == names(199) == few and names(200) == names(999) == some
    assert names(1000) == names(10**6) == some | {("isotonic", True), ("isotonic", False)}
    assert recipes(20, "isotonic") == [Recipe("isotonic", True), Recipe("isotonic", False)]
    assert [str(r) for r in recipes(9, "platt")] == ["platt, of P(label)", "platt, of the confidence"]
    many = {("temperature", True), ("platt", False), ("pooled", True), ("vector", True)}
    assert {(r.method, r.class_aware) for r in recipes(20, labels=3)} == many
    assert recipes(20, "beta", labels=77) == [Recipe("beta", False)]


def scores_from(probabilities, truth, labels=("no", "yes")):
    predicted = probabilities.argmax(axis=1)
    return Scores(labels, probabilities, truth, probabilities.max(axis=1), predicted == truth)


def test_rows_of_one_label_are_refused_and_rare_labels_are_named():
    probabilities, truth = drawn(100)
    with pytest.raises(ValueError, match=r"all 100 labelled rows are 'yes'; rows of every label are needed"):
        choose(scores_from(probabilities, np.ones(100, dtype=int)), np.arange(100))
    truth = np.ones(100, dtype=int)
    truth[:3] = 0
    assert rare_labels(scores_from(probabilities, truth)) == {"no": 3}
    assert rare_labels(scores_from(probabilities, np.arange(100) % 2)) == {}


def test_the_lowest_mean_log_loss_wins_not_the_lowest_ece_nor_the_first_seed(monkeypatch):
    scores = scores_from(*drawn(100))
    constant = np.full(100, scores.correct.mean())  # an ECE of 0

    def planted(estimator, inputs, outcome, groups, seed):
        if isinstance(estimator, Platt):
            assert np.array_equal(inputs, scores.confidence) and outcome is scores.correct
            return np.where(scores.correct, 0.8, 0.2)
        assert inputs is scores.probabilities and outcome is scores.truth
        sure = 0.99 if seed == 3 else 0.01
        return np.where(scores.correct, sure, 1 - sure) if isinstance(estimator.calibrator, Platt) else constant

    monkeypatch.setattr(calibration, "cross_fit", planted)
    recipe, found = choose(scores, np.arange(100), seeds=(3, 4))
    assert recipe == Recipe("platt", False) and {v.shape for v in found.values()} == {(2, 100)} and len(found) == 3


def test_many_rows_are_divided_into_folds_once(monkeypatch):
    draw, groups = np.random.default_rng(0), np.arange(300)
    yes = draw.random(300)
    scores = scores_from(np.stack([1 - yes, yes], axis=1), (draw.random(300) < yes).astype(int))
    _, five = choose(scores, groups, "platt")
    monkeypatch.setattr(calibration, "MANY_ROWS", 299)
    _, one = choose(scores, groups, "platt")
    for recipe, out_of_fold in one.items():
        assert out_of_fold.shape == (1, 300) and (out_of_fold[0] == five[recipe][0]).all()
    given = calibration.VectorScalingCalibrator(), scores.probabilities, scores.truth, groups
    assert (calibration.cross_fit_labels(*given) == calibration.cross_fit_labels(*given, [0])).all()


def test_too_few_rows_or_one_outcome_are_one_clear_line():
    probabilities, truth = drawn(19)
    with pytest.raises(ValueError, match=r"^19 labelled rows; a calibrator needs at least 20$"):
        choose(scores_from(probabilities, truth), np.arange(19))
    probabilities, _ = drawn(20)
    for label, word in ((probabilities.argmax(axis=1), "right"), (probabilities.argmin(axis=1), "wrong")):
        with pytest.raises(ValueError, match=rf"^all 20 rows are {word}"):
            choose(scores_from(probabilities, label), np.arange(20))


def test_a_rare_error_leaves_the_calibrators_that_can_bear_it():
    probabilities, _ = drawn(300)
    truth = probabilities.argmax(axis=1)
    scores = scores_from(probabilities, np.where(np.arange(300) == 7, 1 - truth, truth))
    recipe, found = choose(scores, np.arange(300), seeds=(0,))
    assert recipe in found and 0 < len(found) < len(recipes(300))


# The calibrator file


def rows_of(probabilities, truth, labels, **common):
    return [
        predictions.scored(f"r{i}", f"secret zebra {i}", labels[t], dict(zip(labels, p, strict=True)), 0.9, **common)
        for i, (p, t) in enumerate(zip(probabilities.tolist(), truth, strict=True))
    ]


LABELS = {2: ("no", "yes"), 3: ("no", "yes", "maybe")}
ROWS = {k: rows_of(*drawn(220, k), LABELS[k], **COMMON) for k in LABELS}
FRESH = {k: rows_of(*drawn(90, k, seed=1), LABELS[k], **COMMON) for k in LABELS}
ALL = [Recipe(method, aware) for method in METHODS for aware in (True, False)]
ALL += [Recipe(method, True) for method in LABEL_METHODS]


@cache
def fitted(recipe, labels=2):
    estimator = recipe.estimator().fit(*recipe.inputs(scores_of(ROWS[labels])))
    on = frozenset(text_key(row.text) for row in ROWS[labels])
    rest = {"report_card": {"log_loss": 0.1 + 0.2, "n": 220}, "threshold": {"value": 0.75, "delta": 0.05}}
    identity = {name: COMMON[name] for name in ("fingerprint", "model", "task")}
    return FittedCalibrator(recipe, estimator, LABELS[labels], n=220, groups=200, fitted_on=on, **identity, **rest)


def test_a_predictions_file_becomes_arrays_and_bad_ones_are_refused():
    probabilities, truth = drawn(220, 3)
    failed = predictions.failed("x", "text", "yes", "too long", **COMMON)
    scores = scores_of([failed, *ROWS[3]])
    assert scores.labels == LABELS[3] and (scores.probabilities == probabilities).all()
    assert (scores.truth == truth).all() and (scores.confidence == probabilities.max(axis=1)).all()
    assert (scores.correct == (probabilities.argmax(axis=1) == truth)).all()
    assert scores[np.array([5, 2])].truth.tolist() == truth[[5, 2]].tolist()
    a, b = ROWS[2][:2]
    swapped = replace(b, probabilities=dict(reversed(b.probabilities.items())))
    for rows, message in (
        ([a, replace(b, label=None)], "1 of 2 scored rows have no label.*"),
        ([a, swapped], "row 'r1': its labels are not no, yes.*"),
        ([a, ROWS[3][0]], "row 'r0': its labels are not no, yes.*"),
        ([failed], "no row was scored"),
        ([], "no row was scored"),
    ):
        with pytest.raises(ValueError, match=rf"^{message}$"):
            scores_of(rows)


def voted(number, yes, label, n=10):
    """A row of Method 2: so many of its answers say yes."""
    votes = {"no": n - yes, "yes": yes}
    shares, extras = {name: count / n for name, count in votes.items()}, {"votes": votes, "calls": n}
    return predictions.scored(f"v{number}", f"vote {number}", label, shares, 1.0, **COMMON, extras=extras)


# 120 rows whose agreement says how often they are right, 60 of them unanimous of which 6 are wrong.
VOTED = [voted(i, 10, "yes" if i >= 6 else "no") for i in range(60)]
VOTED += [voted(60 + i, 7, "yes" if i % 10 < 7 else "no") for i in range(60)]


@pytest.mark.parametrize("recipe", [Recipe("platt", False), Recipe("platt", True)], ids=str)
def test_a_calibrator_of_votes_is_fitted_on_and_applied_to_smoothed_votes(recipe):
    scores = scores_of(VOTED)
    yes = np.array([(row.extras["votes"]["yes"] + 0.5) / 11 for row in VOTED])
    assert scores.probabilities == pytest.approx(np.stack([1 - yes, yes], axis=1), abs=1e-15)
    assert scores.confidence.tolist() == [row.confidence for row in VOTED]  # what a report of raw numbers shows
    calibrator = replace(fitted(recipe), estimator=recipe.estimator().fit(*recipe.inputs(scores)))
    # Ten of ten is a log odds of 3, not of 14: the six unanimous wrong rows do not flatten the curve of all others.
    said = dict(zip(yes.round(3).tolist(), calibrator.calibrate(VOTED).tolist(), strict=True))
    assert said == pytest.approx({0.955: 0.9, 0.682: 0.7}, abs=0.02)
    wrong = replace(VOTED[0], id="w", extras={"votes": {"yes": 10, "no": 0}})
    for call, rows in ((scores_of, [*VOTED, wrong]), (calibrator.calibrate, [wrong])):
        with pytest.raises(ValueError, match=r"^row 'w': its votes are .+, not a count for each label"):
            call(rows)


@pytest.mark.parametrize("recipe", ALL, ids=str)
def test_applying_adds_the_confidence_the_decision_and_what_was_seen(recipe):
    calibrator = fitted(recipe)
    failed = predictions.failed("x", "text", "yes", "too long", **COMMON)
    rows = [failed, *(replace(row, text=f"new {row.id}", extras={"note": 3}) for row in FRESH[2]), ROWS[2][0], failed]
    applied, scored = calibrator.apply(rows), rows[1:-1]
    assert applied[0] is failed and applied[-1] is failed
    inputs = [row.confidence for row in scored]
    if recipe.class_aware:
        inputs = [[row.probabilities["no"], row.probabilities["yes"]] for row in scored]
    expected = calibrator.estimator.predict(np.array(inputs))
    for before, after, value in zip(scored, applied[1:-1], expected, strict=True):
        added = {"calibrated_confidence": value, "decision": "automate" if value >= 0.75 else "review"}
        added |= {"fitted_on": True} if before is ROWS[2][0] else {}
        assert after == replace(before, extras={**before.extras, **added})
    highest = max(expected)
    for threshold, count in ((highest, (expected == highest).sum()), (0, len(expected)), (np.nextafter(highest, 2), 0)):
        assert [row.extras.get("decision") for row in calibrator.apply(rows, threshold)].count("automate") == count
    for nothing in (None, {"value": None}):
        decisions = [r.extras.get("decision") for r in replace(calibrator, threshold=nothing).apply(rows)]
        assert decisions == [None] + ["review"] * len(scored) + [None]
    assert calibrator.apply([]) == [] and calibrator.apply([failed]) == [failed]
    stale = {"calibrated_confidence": 2.0, "decision": "?", "fitted_on": True}  # another calibrator's
    assert calibrator.apply([replace(rows[1], extras=rows[1].extras | stale)]) == [applied[1]]


def test_another_models_rows_or_labels_are_refused():
    calibrator, row = fitted(Recipe("platt", False)), FRESH[2][0]
    with pytest.raises(ValueError, match=r"^the calibrator is for tiny on task 'sentiment' .+ 3f9c2a71.+ deadbeef.+$"):
        calibrator.apply([row, replace(row, fingerprint="deadbeef")])
    swapped = replace(row, id="s", probabilities=dict(reversed(row.probabilities.items())))
    for other in (swapped, FRESH[3][0]):
        with pytest.raises(ValueError, match=r"^the calibrator's labels are no, yes, not .+$"):
            calibrator.apply([row, other])


@pytest.mark.parametrize(
    ("recipe", "labels"), [*((r, 2) for r in ALL), *((r, 3) for r in recipes(1000, labels=3))], ids=str
)
def test_every_number_survives_the_file_and_no_text_gets_into_it(recipe, labels, tmp_path):
    calibrator, path = fitted(recipe, labels), tmp_path / "calibrator.json"
    save(path, calibrator)
    loaded = load(path)
    assert replace(loaded, estimator=None) == replace(calibrator, estimator=None)
    assert (loaded.calibrate(FRESH[labels]) == calibrator.calibrate(FRESH[labels])).all()
    assert "secret" not in path.read_text() and "zebra" not in path.read_text() and [*tmp_path.iterdir()] == [path]
    save(tmp_path / "again", loaded)
    assert (tmp_path / "again").read_bytes() == path.read_bytes()


RELABEL = Recipe("vector", True, relabel=True)


def relabelling(threshold=0.6):
    """A calibrator of three labels that prefers "maybe", with a list of all that have a probability of .2."""
    estimator = RELABEL.estimator()
    estimator.beta_, estimator.biases_ = 0.5, np.array([0.0, 0.0, 1.0])
    shortlist = Shortlist(0.9, 0.5, (0.0, 0.0, 1.0), (0.2, 0.2, 0.2), (20, 5, 30))
    return replace(
        fitted(Recipe("vector", True), 3),
        recipe=RELABEL,
        estimator=estimator,
        shortlist=shortlist,
        threshold={"value": threshold},
    )


def test_a_calibrator_may_change_predictions_and_what_the_model_said_is_kept(tmp_path):
    calibrator, rows = relabelling(), [replace(row, text=row.id, extras={"note": 3}) for row in FRESH[3]]
    applied = calibrator.apply(rows)
    changed = 0
    for before, after in zip(rows, applied, strict=True):
        by_hand = np.sqrt(list(before.probabilities.values())) * [1, 1, math.e]
        by_hand /= by_hand.sum()
        assert list(after.probabilities.values()) == pytest.approx(by_hand.tolist(), rel=1e-12)
        assert after.prediction == LABELS[3][by_hand.argmax()]
        assert after.confidence == after.extras["calibrated_confidence"] == pytest.approx(by_hand.max(), rel=1e-12)
        assert after.extras["decision"] == ("automate" if after.confidence >= 0.6 else "review")
        assert (after.extras["original_prediction"], after.extras["note"]) == (before.prediction, 3)
        assert predictions.uncalibrated(after) == before
        changed += after.prediction != before.prediction
    assert 5 < changed < 60 and calibrator.apply(applied) == applied
    assert (calibrator.calibrate(applied) == calibrator.calibrate(rows)).all()
    # A file: as reports read it, the model's own predictions; as it stands, the new ones.
    path = tmp_path / "p.jsonl"
    predictions.replace(path, applied)
    read_back, _ = predictions.read_labelled(path)
    assert read_back == rows and predictions.paired_rows(applied, rows, ("a", "b")) == [(row, row) for row in rows]
    assert predictions.read_labelled(path, "calibrated_confidence")[0] == applied
    # Another calibrator, which keeps predictions, brings the model's back.
    assert [row.prediction for row in fitted(PLATT, 3).apply(applied)] == [row.prediction for row in rows]
    damaged = replace(applied[0], extras=applied[0].extras | {"original_probabilities": {"no": 1.0}})
    with pytest.raises(ValueError, match=r"^row 'r0'.*original"):
        calibrator.apply([replace(damaged, extras=damaged.extras | {"original_prediction": "yes"})])


def test_rows_to_review_get_a_shortlist_with_the_prediction_on_it_the_most_probable_first():
    calibrator = relabelling()
    for keeps in (calibrator, replace(calibrator, recipe=Recipe("vector", True))):
        for row in keeps.apply(FRESH[3]):
            q = calibrator.estimator.predict_labels([[*FRESH[3][int(row.id[1:])].probabilities.values()]])[0]
            by_hand = [LABELS[3][k] for k in np.argsort(-q) if q[k] >= 0.2 or LABELS[3][k] == row.prediction]
            assert row.extras.get("shortlist") == (by_hand if row.extras["decision"] == "review" else None)
    assert all("shortlist" not in row.extras for row in calibrator.apply(FRESH[3], threshold=0.0))


def test_a_calibrator_that_changes_predictions_survives_its_file(tmp_path):
    calibrator, path = relabelling(), tmp_path / "c.json"
    save(path, calibrator)
    loaded = load(path)
    assert loaded.apply(FRESH[3]) == calibrator.apply(FRESH[3]) and loaded.shortlist == calibrator.shortlist
    record = json.loads(path.read_text())
    for change, named in (
        ({"relabel": "yes"}, "relabel"),
        ({"method": "pooled", "parameters": {"slope_": 1, "intercept_": 0, "offsets_": [0, 0, 0]}}, "relabel"),
        ({"shortlist": record["shortlist"] | {"least": [0.1, 0.1]}}, "shortlist"),
        ({"shortlist": record["shortlist"] | {"coverage": 1.5}}, "shortlist"),
        ({"labels": ["no", "yes"]}, "biases_"),
    ):
        path.write_text(json.dumps(record | change))
        with pytest.raises(ValueError, match=rf"^[^\n]*{named}[^\n]*$"):
            load(path)


def test_a_number_that_json_does_not_have_leaves_the_old_file(tmp_path):
    path, calibrator = tmp_path / "calibrator.json", fitted(ALL[0])
    save(path, calibrator)
    before = path.read_bytes()
    with pytest.raises(ValueError, match="not JSON compliant"):
        save(path, replace(calibrator, report_card={"log_loss": math.nan}))
    assert path.read_bytes() == before and [*tmp_path.iterdir()] == [path]


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("calibrators")


@cache
def record(folder, recipe, labels=2):
    save(folder / "file.json", fitted(recipe, labels))
    return json.loads((folder / "file.json").read_text(encoding="utf-8"))


GONE = object()
PLATT, TEMPERATURE, BETA, ISOTONIC, VENN_ABERS = (Recipe(method, False) for method in METHODS)
AWARE, VECTOR = Recipe("platt", True), Recipe("vector", True)


def edited(record, path, value):
    record = copy.deepcopy(record)
    *parents, last = path
    holder = record
    for key in parents:
        holder = holder[key]
    if value is GONE:
        del holder[last]
    else:
        holder[last] = value
    return record


BAD = [  # recipe, path of the field, values it cannot have, the field that the message names
    (PLATT, "format", [GONE, "calibrated-confidence calibrator, version 2"], "format"),
    (PLATT, "method", [GONE, "forest", None, "x" * 10**6], "method"),
    (PLATT, "method", ["beta"], "parameters"),
    (PLATT, "class_aware", [GONE, 1], "class_aware"),
    (PLATT, "class_aware", [True], "parameters"),
    (AWARE, "class_aware", [False], "parameters"),
    (PLATT, "labels", [GONE, ["no", "no", "yes"], ["no"], "no", [["no"], "yes"]], "labels"),
    (PLATT, "model", [GONE, ""], "model"),
    (PLATT, "fingerprint", [GONE, 3], "fingerprint"),
    (PLATT, "task", [GONE, ["sentiment"]], "task"),
    (PLATT, "n", [GONE, 219, 220.0, 0, "220"], "n"),
    (PLATT, "groups", [GONE, 0, True], "groups"),
    (PLATT, "groups", [221], "n"),
    (PLATT, "fitted_on", [GONE, [], "0123456789ab", ["0123456789ab\n"], ["0123456789a"]], "fitted_on"),
    (PLATT, "report_card", [GONE, []], "report_card"),
    (PLATT, "threshold", [GONE, {}, 0.9], "threshold"),
    (PLATT, "threshold value", [1.01, -0.01, "0.9", True, 10**400], "threshold"),
    (PLATT, "parameters", [GONE, None, {"slope_": 1, "intercept_": 0, "more_": 0}], "parameters"),
    (PLATT, "parameters slope_", [GONE, "0.5", True, [1.0], 9e307, 10**400], "slope_"),
    (AWARE, "parameters", [{}, [], {"0": {"slope_": 1, "intercept_": 0}}], "parameters"),
    (AWARE, "parameters 0", [{"slope_": 1, "intercept_": 0}], "parameters"),
    (AWARE, "labels", [["no", "yes", "maybe"]], "labels"),
    (VECTOR, "class_aware", [False], "class_aware"),
    (VECTOR, "parameters beta_", [0.04, 21], "beta_"),
    (VECTOR, "parameters biases_", [[0.1], [0.1, 0.2, 0.3], 0.5], "biases_|labels"),
    (TEMPERATURE, "parameters temperature_", [0.04, 20.1], "temperature_"),
    (BETA, "parameters a_", [-1e-9, 9e307], "a_"),
    (ISOTONIC, "parameters scores_", [[], 0.5], "scores_"),
    (ISOTONIC, "parameters scores_ -1", [0.1, 1.1, "1", True], "scores_"),
    (ISOTONIC, "parameters scores_ -1", [GONE], "lists differ"),
    (ISOTONIC, "parameters values_ -1", [0.0, 1.1], "values_"),
    (VENN_ABERS, "parameters count_ 3", [0.5, 0, 9e307], "count_"),
    (VENN_ABERS, "parameters right_ 3", [10**8, -1], "right_|count_"),
]
CASES = [
    pytest.param(recipe, path, value, named, id=f"{recipe.method} {path} {str(value)[:20]}")
    for recipe, path, values, named in BAD
    for value in values
]


@pytest.mark.parametrize(("recipe", "path", "value", "named"), CASES)
def test_an_edited_file_is_refused_in_one_line_that_names_the_field(recipe, path, value, named, folder):
    keys = [int(key) if key in ("-1", "3") else key for key in path.split()]
    (folder / "edited.json").write_text(json.dumps(edited(record(folder, recipe), keys, value)), encoding="utf-8")
    with pytest.raises(ValueError, match=r"^[^\n]{1,400}$") as caught:
        load(folder / "edited.json")
    where, reason = str(caught.value).split("edited.json")
    assert where == f"{folder}/" and re.search(rf"\b({named})\b", reason), reason


@pytest.mark.parametrize("text", ["", "method = platt", "[1]", "null", '{"n": NaN}', "[" * 100_000])
def test_what_is_no_calibrator_file_is_refused_in_one_line(text, tmp_path):
    path = tmp_path / "file.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=rf"^{path} is not [^\n]+$"):
        load(path)


JSON = st.recursive(
    st.none() | st.integers() | st.floats() | st.text(max_size=5) | st.sampled_from([*METHODS, "all", 10**400, True]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3) | st.just("value"), inner),
    max_leaves=5,
)


@settings(deadline=None, max_examples=100, derandomize=True)
@given(recipe=st.sampled_from(ALL), value=JSON, data=st.data())
def test_a_fuzzed_file_is_refused_or_still_gives_probabilities(recipe, value, data, folder):
    path, inner = [], record(folder, recipe)
    while isinstance(inner, dict | list) and inner and (not path or data.draw(st.booleans())):
        path.append(data.draw(st.sampled_from([*(inner if isinstance(inner, dict) else range(len(inner)))])))
        inner = inner[path[-1]]
    (folder / "fuzzed.json").write_text(json.dumps(edited(record(folder, recipe), path, value)), encoding="utf-8")
    try:
        loaded = load(folder / "fuzzed.json")
    except ValueError:
        return
    common = COMMON | {"fingerprint": loaded.fingerprint}
    rows = rows_of(np.vstack([drawn(20)[0], np.eye(2)]), [0] * 22, loaded.labels, **common)
    values = loaded.calibrate(rows)
    assert np.isfinite(values).all() and values.min() >= 0 and values.max() <= 1
    assert {row.extras["decision"] for row in loaded.apply(rows)} <= {"automate", "review"}


def test_a_guarantee_from_cross_fitted_scores_holds_for_the_calibrator_fitted_on_all_rows():
    """The threshold is chosen on scores of other calibrators than the one it is used with: does it still hold?"""
    from decisions import choose_threshold

    def world(draw, n):
        z = draw.normal(0, 1.6, n)  # the model's logit of label 1: too far out, with a bias to label 1
        true = expit(0.5 * z - 0.45)
        return np.column_stack([expit(-z), expit(z)]), true, (draw.random(n) < true).astype(int)

    draw = np.random.default_rng(0)
    everywhere, true, _ = world(draw, 5000)
    right = np.where(everywhere.argmax(axis=1) == 1, true, 1 - true)
    broken, made = 0, 0
    for repeat in range(40):
        probabilities, _, truth = world(draw, 500)
        scores = cross_fit(ClasswiseCalibrator(Platt()), probabilities, truth, seed=repeat)
        threshold = choose_threshold(scores, probabilities.argmax(axis=1) == truth, 0.8).value
        if threshold is not None:
            taken = ClasswiseCalibrator(Platt()).fit(probabilities, truth).predict(everywhere) >= threshold
            made += 1
            broken += right[taken].mean() < 0.8
    assert made > 5 and broken <= binom.ppf(0.999, 40, 0.05)
