"""guarantee_audit.py: does the audit raise no false alarm however often one looks, and see a fall soon?

Sums in exact fractions over every outcome, simulations whose truth is known, and files that somebody has edited.
"""

import itertools
import json
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
from scipy.stats import binom

import predictions
from guarantee_audit import (
    EVERYTHING,
    TIMES_AS_OFTEN,
    AuditedRow,
    after_look,
    load_state,
    log_factors,
    lower_accuracies,
    new_state,
    rows_until_alarm,
    save_state,
    unseen,
)

COMMON = {"method": "logprobs", "model": "m", "task": "t", "fingerprint": "0123abcd"}


def audited(number, right, group=None, predicted="b"):
    """A labelled automated row with an id and a text of its own."""
    label = predicted if right else "a" if predicted == "b" else "b"
    probabilities = {"a": 0.1, "b": 0.9} if predicted == "b" else {"a": 0.9, "b": 0.1}
    row = predictions.scored(f"r{number}", f"text {number}", label, probabilities, 1.0, **COMMON)
    return AuditedRow(row, number if group is None else group)


def state_of(target=0.9, alpha=0.05):
    return new_state("guarantee", {EVERYTHING: target}, alpha)


def evidence(right, groups, target):
    """E by its definition, in exact fractions."""
    target, found = Fraction(str(target)), []
    accuracies = [1 - (1 - target) * Fraction(str(times)) for times in TIMES_AS_OFTEN]
    for q in (q for q in accuracies if q > 0):
        product = Fraction(1)
        for group in set(groups):
            mine = [r for r, g in zip(right, groups, strict=True) if g == group]
            product *= sum(q / target if r else (1 - q) / (1 - target) for r in mine) / len(mine)
        found.append(product)
    return sum(found) / len(found)


@pytest.mark.parametrize("target", [0.5, 0.8, 0.9, 0.99])
def test_the_evidence_is_its_definition_and_one_on_average_while_the_guarantee_is_just_kept(target):
    groups, mean = [0, 1, 1, 2, 3], Fraction(0)
    for right in itertools.product([False, True], repeat=5):
        exact = evidence(right, groups, target)
        ours = after_look(
            state_of(target), [audited(i, r, g) for i, (r, g) in enumerate(zip(right, groups, strict=True))]
        )
        assert ours.audited[EVERYTHING].e_value == pytest.approx(float(exact), rel=1e-9)
        share = Fraction(str(target))
        mean += exact * share ** sum(right) * (1 - share) ** (5 - sum(right))
    assert mean == 1
    # Rows that share their fate are one row: still 1 on average, where multiplying their factors is not.
    both = {right: evidence([right] * 2, [0, 0], target) for right in (True, False)}
    apart = {right: evidence([right] * 2, [0, 1], target) for right in (True, False)}
    share = Fraction(str(target))
    assert share * both[True] + (1 - share) * both[False] == 1 < share * apart[True] + (1 - share) * apart[False]


def test_several_looks_are_one_look_at_all_rows_and_a_row_counts_once():
    draw = np.random.default_rng(0)
    rows = [audited(i, right) for i, right in enumerate(draw.random(60) < 0.85)]
    together, one_by_one = after_look(state_of(), rows), state_of()
    for first in range(0, 60, 7):
        one_by_one = after_look(one_by_one, rows[max(first - 5, 0) : first + 7])  # five of them again
    assert one_by_one.looks == 9 and together.looks == 1
    for state in (together, one_by_one):
        assert state.audited[EVERYTHING].rows == 60 and len(state.seen) == 60
    e_values = [state.audited[EVERYTHING].e_value for state in (together, one_by_one)]
    assert e_values[0] == pytest.approx(e_values[1], rel=1e-9)
    assert (
        after_look(together, rows) is together and unseen(together, rows) == [] and after_look(together, []) is together
    )
    assert len(unseen(state_of(), [rows[0], rows[0]])) == 1


def test_an_alarm_stays_whatever_comes_after():
    state = after_look(state_of(), [audited(i, i % 2 == 0) for i in range(40)])
    assert state.alarm_at == 1 and state.audited[EVERYTHING].e_value > 20
    state = after_look(state, [audited(100 + i, True) for i in range(500)])
    assert state.alarm_at == 1 and state.audited[EVERYTHING].e_value < 1


def test_each_label_has_its_own_guarantee_and_they_share_the_risk():
    state = new_state("guarantee", {"a": 0.8, "b": 0.95}, 0.05)
    rows = [audited(i, i % 5 > 0, predicted="a") for i in range(30)] + [audited(100 + i, True) for i in range(20)]
    state = after_look(state, rows)
    assert [(each.rows, each.right) for each in state.audited.values()] == [(30, 24), (20, 20)]
    assert state.alarm_level == 40
    alone = after_look(new_state("guarantee", {EVERYTHING: 0.8}, 0.05), rows[:30])
    assert state.audited["a"] == alone.audited[EVERYTHING] and state.alarm_at is None


def first_alarms(accuracy, target, looks, a_look, runs, seed=0):
    """The look of each run's alarm, looks + 1 without one."""
    draw, found = np.random.default_rng(seed), []
    for _ in range(runs):
        log_e, alarm = np.zeros(len(lower_accuracies(target))), looks + 1
        for look in range(1, looks + 1):
            log_e = log_e + log_factors(draw.random(a_look) < accuracy, np.arange(a_look), target)
            if np.exp(log_e).mean() >= 20:
                alarm = look
                break
        found.append(alarm)
    return np.array(found)


def test_thirty_looks_raise_few_false_alarms_and_a_fall_of_ten_points_is_found_in_a_week():
    false = first_alarms(0.9, 0.9, looks=30, a_look=20, runs=120) <= 30
    assert false.sum() <= binom.ppf(0.999, 120, 0.05)
    assert np.median(first_alarms(0.8, 0.9, looks=30, a_look=20, runs=60)) <= 6


@pytest.mark.study
def test_thirty_looks_raise_a_false_alarm_in_at_most_one_month_of_twenty():
    for target in (0.8, 0.9, 0.98):
        false = first_alarms(target, target, looks=30, a_look=20, runs=2000) <= 30
        assert false.mean() <= 0.05, false.mean()
    found = first_alarms(0.8, 0.9, looks=30, a_look=20, runs=1000)
    assert np.median(found) <= 5 and np.quantile(found, 0.8) <= 9


@pytest.mark.study
def test_rows_that_share_their_fate_raise_no_more_false_alarms():
    draw, alarmed = np.random.default_rng(1), {"by group": 0, "as if independent": 0}
    groups = np.repeat(np.arange(10), [1, 1, 1, 1, 2, 2, 3, 3, 3, 3])  # 20 rows of which most share their group's fate
    for _ in range(1000):
        log_e = dict.fromkeys(alarmed, 0.0)
        hit = set()
        for _ in range(30):
            right = (draw.random(10) < 0.9)[groups]
            for name, given in (("by group", groups), ("as if independent", np.arange(20))):
                log_e[name] = log_e[name] + log_factors(right, given, 0.9)
                if np.exp(log_e[name]).mean() >= 20:
                    hit.add(name)
        for name in hit:
            alarmed[name] += 1
    assert alarmed["by group"] <= 50 < alarmed["as if independent"], alarmed


def test_the_delay_that_is_told_is_that_of_other_draws():
    half, most = rows_until_alarm(0.9, 0.05, 0.8)
    found = 5 * first_alarms(0.8, 0.9, looks=80, a_look=5, runs=60, seed=7)
    assert np.mean(found <= half) == pytest.approx(0.5, abs=0.2) and np.mean(found <= most) == pytest.approx(
        0.8, abs=0.2
    )
    assert rows_until_alarm(0.9, 0.05, 0.95) == [np.inf, np.inf]


# The state file


def test_the_file_keeps_every_number_and_no_text(tmp_path):
    state = after_look(state_of(), [audited(i, i % 3 > 0) for i in range(25)])
    save_state(tmp_path / "s.json", state)
    assert load_state(tmp_path / "s.json", state_of()) == state
    assert "text" not in (tmp_path / "s.json").read_text().replace("[text", "") and [*tmp_path.iterdir()] == [
        tmp_path / "s.json"
    ]


@pytest.mark.parametrize(
    "other",
    [
        new_state("another", {EVERYTHING: 0.9}, 0.05),
        state_of(0.8),
        state_of(alpha=0.1),
        new_state("g", {"a": 0.9}, 0.05),
    ],
)
def test_the_audit_of_another_guarantee_is_refused(other, tmp_path):
    save_state(tmp_path / "s.json", state_of())
    with pytest.raises(ValueError, match=r"s\.json holds the audit of another guarantee"):
        load_state(tmp_path / "s.json", other)


BAD = {
    "format": "calibrated-confidence audit, version 2",
    "alpha": 0,
    "looks": -1,
    "alarm_at": "yes",
    "seen": ["no key"],
    "audited": {},
    "guarantee": None,
}


@pytest.mark.parametrize(("field", "value"), BAD.items())
def test_an_edited_file_is_refused_in_one_line(field, value, tmp_path):
    path = tmp_path / "s.json"
    save_state(path, state_of())
    record = json.loads(path.read_text())
    path.write_text(json.dumps(record | {field: value}))
    with pytest.raises(ValueError, match=rf"^[^\n]*damaged[^\n]*{field}[^\n]*$"):
        load_state(path, state_of())
    path.write_text("{")
    with pytest.raises(ValueError, match=r"is not JSON"):
        load_state(path, state_of())


@pytest.mark.parametrize("change", [{"log_evidence": [0.0]}, {"rows": 1, "right": 2}, {"target": 1.0}])
def test_numbers_that_no_audit_gives_are_refused(change, tmp_path):
    path = tmp_path / "s.json"
    save_state(path, state_of())
    record = json.loads(path.read_text())
    record["audited"][EVERYTHING] |= change
    path.write_text(json.dumps(record))
    with pytest.raises(ValueError, match="damaged"):
        load_state(path, replace(state_of(), looks=3))
