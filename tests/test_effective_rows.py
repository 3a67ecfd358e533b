"""effective_rows.py: sums over groups and the design effect, against loops over the groups written out."""

import numpy as np
import pytest
from scipy.stats import t as student

from effective_rows import effective_rows, error_correlation, group_sums

RNG = np.random.default_rng(5)
GROUPS = RNG.integers(0, 40, 200)
GROUPS = np.unique(GROUPS, return_inverse=True)[1]
WRONG = RNG.random(200) < 0.1 + 0.4 * (GROUPS % 3 == 0)


def members(k):
    """(rows, errors) of each group that has any of the first k rows."""
    seen = np.unique(GROUPS[:k])
    return [((GROUPS[:k] == g).sum(), WRONG[:k][GROUPS[:k] == g].sum()) for g in seen]


def test_running_sums_are_those_of_a_loop_over_the_groups_at_every_rank():
    sums = group_sums(WRONG, GROUPS)
    for k in range(1, 201):
        rows, errors = map(np.array, zip(*members(k), strict=True))
        found = [array[k - 1] for array in (sums.groups, sums.squares, sums.products, sums.error_squares)]
        assert found == [len(rows), (rows**2).sum(), (rows * errors).sum(), (errors**2).sum()]


def test_the_correlation_is_that_of_the_textbook_s_analysis_of_variance():
    groups, wrong = np.repeat([0, 1, 2], 2), np.array([1, 1, 0, 0, 1, 0])
    # Sums of squares by hand: between 1.0 of 2 degrees of freedom, within 0.5 of 3; groups of 2.
    assert error_correlation(wrong, groups) == pytest.approx((0.5 - 1 / 6) / (0.5 + 1 / 6))
    assert error_correlation(np.array([1, 0, 1]), np.array([0, 1, 2])) == 0.0
    assert error_correlation(np.array([1, 0, 1]), np.array([0, 0, 0])) == 0.0
    assert error_correlation(np.array([1, 0, 1, 0]), np.array([0, 0, 1, 1])) == 0.0  # negative: not below 0
    assert error_correlation(np.array([1, 1, 0, 0]), np.array([0, 0, 1, 1])) == 1.0
    assert error_correlation(np.zeros(4), np.array([0, 0, 1, 1])) == 0.0


@pytest.mark.parametrize("delta", [0.05, 0.2])
def test_effective_rows_are_korn_s_and_graubard_s_formula_written_out(delta):
    ranks, rho = np.array([3, 20, 77, 200]), error_correlation(WRONG, GROUPS)
    assert 0.05 < rho < 0.6
    accepted, errors = ranks, np.cumsum(WRONG)[ranks - 1]
    found = effective_rows(accepted, group_sums(WRONG, GROUPS)[ranks - 1], rho, delta, errors)
    for k, n_errors, value in zip(ranks, errors, found, strict=True):
        rows, wrong = map(np.array, zip(*members(k), strict=True))
        deff = max(1, 1 + ((rows**2).sum() / k - 1) * rho)
        if n_errors >= 4:
            rate, n_groups = n_errors / k, len(rows)
            spread = ((wrong - rate * rows) ** 2).sum() * n_groups / (n_groups - 1) / k**2
            deff = max(deff, spread / (rate * (1 - rate) / k))
        few = (student.ppf(1 - delta, k - 1) / student.ppf(1 - delta, len(rows) - 1)) ** 2
        assert value == pytest.approx(k / deff * few, rel=1e-9)


def test_a_group_alone_is_worth_one_row_and_rows_by_themselves_are_worth_what_they_are():
    sums = group_sums(np.zeros(50, dtype=bool), np.zeros(50, dtype=int))
    assert effective_rows(np.array([50]), sums[np.array([49])], 0.0, 0.05, np.array([0])).tolist() == [1.0]
    sums = group_sums(np.zeros(50, dtype=bool), np.arange(50))
    assert effective_rows(np.array([50]), sums[np.array([49])], 0.3, 0.05, np.array([0])).tolist() == [50.0]
