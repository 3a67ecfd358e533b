"""How many independent rows are clustered ones worth? The evidence that a rank of rows gives, groups accounted for.

    deff  = max(1 + (sum m_g^2 / k - 1) rho, linearised)       of k rows, m_g of group g; rho: of errors in a group
    n_eff = min(k, k / deff) (t_{k-1} / t_{G-1})^2             t: upper delta quantiles of Student's t, G groups

After Korn and Graubard, "Confidence intervals for proportions with small expected number of positive counts estimated
from survey data", Survey Methodology 1998. It is an approximation; where every row is its own group nothing is to be
approximated, and nobody needs this file.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

LEAST_ERRORS = 4  # from so many on, their own spread over the groups is looked at


@dataclass(frozen=True)
class GroupSums:
    """Sums over the groups of the first k rows, for k = 1 to n; arrays [n]. m: rows of a group, e: its errors."""

    groups: np.ndarray  # how many have a row
    squares: np.ndarray  # sum m^2
    products: np.ndarray  # sum e m
    error_squares: np.ndarray  # sum e^2

    def __getitem__(self, places: np.ndarray) -> GroupSums:
        arrays = self.groups, self.squares, self.products, self.error_squares
        return GroupSums(*(array[places] for array in arrays))


def group_sums(wrong: np.ndarray, groups: np.ndarray) -> GroupSums:
    """Of rows in the order in which they are accepted: wrong (bool [n]), group numbers (int [n]). One sort, no loop."""
    by_group = np.argsort(groups, kind="stable")
    ordered, n = groups[by_group], len(groups)
    is_first = np.append(True, ordered[1:] != ordered[:-1])
    first = np.flatnonzero(is_first)[np.cumsum(is_first) - 1]  # place of the first row of each row's group
    errors_so_far = np.cumsum(wrong[by_group]) - wrong[by_group]
    rows_before, errors_before = np.empty(n, dtype=int), np.empty(n, dtype=int)
    rows_before[by_group] = np.arange(n) - first
    errors_before[by_group] = errors_so_far - errors_so_far[first]
    return GroupSums(
        groups=np.cumsum(rows_before == 0),
        squares=np.cumsum(2 * rows_before + 1),
        products=np.cumsum(errors_before + wrong * (rows_before + 1)),
        error_squares=np.cumsum(wrong * (2 * errors_before + 1)),
    )


def error_correlation(wrong: np.ndarray, groups: np.ndarray) -> float:
    """rho: how alike the errors of a group are, 0 to 1; the intra-class correlation of a one-way analysis of variance.

    Donner, "A review of inference procedures for the intraclass correlation coefficient", 1986.
    """
    sizes = np.bincount(groups)
    n, n_groups = len(groups), len(sizes)
    if n_groups in (1, n):
        return 0.0
    share, shares = wrong.mean(), np.bincount(groups, wrong) / sizes
    typical_size = (n - (sizes**2).sum() / n) / (n_groups - 1)
    between = (sizes * (shares - share) ** 2).sum() / (n_groups - 1)
    within = ((wrong - shares[groups]) ** 2).sum() / (n - n_groups)
    spread = between + (typical_size - 1) * within
    return float(np.clip((between - within) / spread, 0, 1)) if spread > 0 else 0.0


def effective_rows(
    accepted: np.ndarray, sums: GroupSums, rho: float, delta: float, errors: np.ndarray | None = None
) -> np.ndarray:
    """n_eff of ranks that accept so many rows (int [ranks]), with the sums at these ranks.

    `errors` [ranks] adds the spread of the errors themselves (linearised); without them no label but rho is used.
    """
    from scipy.special import stdtrit

    worth = accepted / np.maximum(1, 1 + (sums.squares / accepted - 1) * rho)
    if errors is not None:
        worth = np.minimum(worth, accepted / linearised_design_effect(accepted, sums, errors))
    several = sums.groups > 1
    if delta < 0.5:  # few groups tell their own spread badly
        rows, groups = np.maximum(accepted - 1, 1), np.maximum(sums.groups - 1, 1)
        worth = worth * (stdtrit(rows, 1 - delta) / stdtrit(groups, 1 - delta)) ** 2
    return np.where(several, worth, np.minimum(worth, 1.0))  # one group says no more than one row


def linearised_design_effect(accepted: np.ndarray, sums: GroupSums, errors: np.ndarray) -> np.ndarray:
    """The variance of the share of errors over groups, by that of independent rows; 1 where the errors are too few."""
    rate = errors / accepted
    usable = (errors >= LEAST_ERRORS) & (errors < accepted) & (sums.groups > 1)
    spread = sums.error_squares - 2 * rate * sums.products + rate**2 * sums.squares  # sum (e - rate m)^2
    small_sample = sums.groups / np.maximum(sums.groups - 1, 1)
    independent = np.where(usable, rate * (1 - rate) / accepted, 1.0)
    return np.where(usable, np.maximum(1, spread * small_sample / accepted**2 / independent), 1.0)
