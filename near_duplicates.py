"""Texts that are alike, among a million as among ten: they belong on one side of every split and fold.

    near_duplicates(texts)      (i, j, similarity) of every pair that is alike
    duplicate_groups(texts)     for each text the first one that a chain of such pairs links it to
    partners(texts, sides)      for each text one that is alike on its own side, and one on another side

Two texts are alike when the Jaccard similarity of their shingles is at least a threshold. The search is exact, by
prefix filtering (Bayardo et al., "Scaling up all pairs similarity search", 2007): two sets this alike share one of
their rarest shingles, and few sets share a rare one, so few pairs need be compared. A million texts of ten words take
half a minute and 0.8 GB; MinHash LSH was slower, took ten times the memory, and misses pairs.

Ten thousand texts that are all alike have fifty million pairs. Groups and partners are found
without looking at all of them.
"""

from __future__ import annotations

import re
from array import array
from collections import defaultdict
from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from typing import TYPE_CHECKING, Protocol

import numpy as np

if TYPE_CHECKING:
    from scipy.sparse import csr_array

PAIRS_AT_ONCE = 1 << 18  # that are compared
MEETINGS_AT_ONCE = 5_000_000  # of two sets at a shingle, before they are compared: this bounds the memory
CROWD = 2000  # sets with the same rare shingle, from which on some of them are compared before all are
NEIGHBOURS = 8  # that each of a crowd is compared with first


def shingles(text: str, width: int = 2) -> frozenset[tuple[str, ...]]:
    """The runs of `width` words of a text, in lower case, without punctuation; of a shorter text, the whole.

    Broder, "On the resemblance and containment of documents", 1997. Words are runs of letters and digits, so a
    script without spaces counts as one word a sentence, and only its repeated sentences are found.
    """
    words = words_of(text)
    return frozenset(tuple(words[i : i + width]) for i in range(max(1, len(words) - width + 1)))


def words_of(text: str) -> list[str]:
    """The words of a text in lower case; a text without any is one itself."""
    return re.findall(r"\w+(?:['\u2019]\w+)*", text.casefold()) or [text.strip()]


def near_duplicates(texts: Iterable[str], threshold: float = 0.6, width: int = 2) -> Iterator[tuple[int, int, float]]:
    """Yield (i, j, Jaccard similarity of their shingles), i < j, for the texts at least `threshold` alike.

    A text with the same shingles as an earlier one is paired with the first such text alone, so that a thousand copies
    are a thousand pairs and not half a million.
    """
    sets = shingle_sets(texts, width)
    earlier = sets.first[sets.of]
    copies = np.flatnonzero(earlier != np.arange(len(earlier)))
    yield from ((i, j, 1.0) for i, j in zip(earlier[copies].tolist(), copies.tolist(), strict=True))
    for ones, others, jaccard in _alike(sets.matrix, threshold):
        ends = np.sort([sets.first[ones], sets.first[others]], axis=0)
        yield from zip(*ends.tolist(), jaccard.tolist(), strict=True)


def duplicate_groups(texts: Iterable[str], threshold: float = 0.6, width: int = 2) -> list[int]:
    """For each text the number of the first text it is linked to by a chain of near-duplicates; its own if none."""
    sets = shingle_sets(texts, width)
    groups = _Groups(len(sets.first))
    for ones, others, _ in _alike(sets.matrix, threshold, groups):
        groups.link(ones, others)
    _, first, number = np.unique(groups.of[sets.of], return_index=True, return_inverse=True)
    return first[number].tolist()


def partners(
    texts: Iterable[str], sides: Sequence[Hashable], threshold: float = 0.6, width: int = 2
) -> tuple[np.ndarray, np.ndarray]:
    """For each text the number of a near-duplicate on its own side, and of one on another; -1 where there is none.

    `sides` names the side of each text, a split or a table. Returns two arrays of len(texts) numbers.
    """
    sets = shingle_sets(texts, width)
    names: dict[Hashable, int] = {}
    side = np.array([names.setdefault(name, len(names)) for name in sides], dtype=int)
    if not names:
        return side, side
    found = _Partners(sets.of, side, len(sets.first), len(names))
    for ones, others, _ in _alike(sets.matrix, threshold, found):
        found.link(ones, others)
    partner = found.by_side(sets.of)
    everyone = np.arange(len(side))
    within = partner[everyone, side]
    partner[everyone, side] = -1
    return within, partner[everyone, (partner >= 0).argmax(axis=1)]


# What is still to be found out


class _Goal(Protocol):
    """What a search is for, where not for every pair: pairs that tell nothing new need not be compared."""

    def wanted(self, ones: np.ndarray, others: np.ndarray) -> np.ndarray:
        """Which of these pairs of sets would tell something new."""

    def questions(self, rows: np.ndarray, columns: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Which of the entries (set, shingle) ask and which may answer, as masks; what would tell something new is
        an asking set with an answering one of the same shingle."""


class _Groups:
    """The group of each set, so far."""

    def __init__(self, n: int) -> None:
        self.of = np.arange(n)

    def link(self, ones: np.ndarray, others: np.ndarray) -> None:
        """Join the groups of pairs of sets."""
        from scipy.sparse import coo_array
        from scipy.sparse.csgraph import connected_components

        graph = coo_array((np.ones(len(ones)), (self.of[ones], self.of[others])), shape=(len(self.of), len(self.of)))
        self.of = connected_components(graph, directed=False)[1][self.of]

    def wanted(self, ones: np.ndarray, others: np.ndarray) -> np.ndarray:
        return self.of[ones] != self.of[others]

    def questions(self, rows: np.ndarray, columns: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """All sets answer those that are not of the largest group at their shingle."""
        n = len(self.of)
        kinds, sizes = np.unique(columns.astype(np.int64) * n + self.of[rows], return_counts=True)
        kinds = kinds[sizes.argsort(kind="stable")]
        largest = np.zeros(columns.max(initial=0) + 1, dtype=int)
        largest[kinds // n] = kinds % n  # of equal places the last is written, the largest group
        yield largest[columns] != self.of[rows], np.ones(len(rows), dtype=bool)


class _Partners:
    """For each set and side, [sets, sides], -1 where there is none:

    first, second: the first two texts of the set there
    near: an alike set with a text there; the set itself where it has two
    """

    def __init__(self, set_of: np.ndarray, side: np.ndarray, n_sets: int, n_sides: int) -> None:
        places = np.arange(len(side))
        keys = set_of * n_sides + side
        tables = []
        for _ in range(2):
            found, at = np.unique(keys[places], return_index=True)
            tables.append(np.full(n_sets * n_sides, -1))
            tables[-1][found] = places[at]
            places = np.delete(places, at)
        self.first, self.second = (table.reshape(n_sets, n_sides) for table in tables)
        self.near = np.where(self.second >= 0, np.arange(n_sets)[:, None], -1)

    def link(self, ones: np.ndarray, others: np.ndarray) -> None:
        """Take note that pairs of sets are alike."""
        for here, there in ((ones, others), (others, ones)):
            for side in range(self.near.shape[1]):
                new = (self.first[there, side] >= 0) & (self.near[here, side] < 0)
                self.near[here[new], side] = there[new]

    def wanted(self, ones: np.ndarray, others: np.ndarray) -> np.ndarray:
        new = (self.first[others] >= 0) & (self.near[ones] < 0)
        new |= (self.first[ones] >= 0) & (self.near[others] < 0)
        return new.any(axis=1)

    def questions(self, rows: np.ndarray, columns: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Sets on a side answer those that have no partner there."""
        for side in range(self.near.shape[1]):
            yield self.near[rows, side] < 0, self.first[rows, side] >= 0

    def by_side(self, set_of: np.ndarray) -> np.ndarray:
        """For each text its partner on each side, [texts, sides]; -1 where there is none."""
        own = self.first[set_of]
        own = np.where(own == np.arange(len(set_of))[:, None], self.second[set_of], own)
        near = self.near[set_of]
        of_near = np.where(near >= 0, self.first[near, np.arange(near.shape[1])], -1)
        return np.where(own >= 0, own, of_near)


# Sets of numbers


@dataclass(frozen=True)
class ShingleSets:
    """The sets of shingles that texts have, each of them once, the smallest first.

    `matrix` [sets, shingles] holds a 1 where a set has a shingle, the rarest shingles in its first columns. `of` is
    the set of each text, `first` the first text of each set.
    """

    matrix: csr_array
    of: np.ndarray
    first: np.ndarray


def shingle_sets(texts: Iterable[str], width: int) -> ShingleSets:
    """The sets of `shingles(text, width)`, with a number for each shingle."""
    from scipy.sparse import csr_array

    numbers, counts = _numbered_shingles(texts, width)
    ends = np.concatenate([[0], counts.cumsum()])
    shape = len(counts), int(numbers.max(initial=0)) + 1
    matrix = csr_array((np.ones(len(numbers), dtype=np.int32), numbers, ends), shape=shape)
    matrix.sum_duplicates()
    matrix.data[:] = 1

    first: dict[bytes, int] = {}
    spans = zip(matrix.indptr[:-1].tolist(), matrix.indptr[1:].tolist(), strict=True)
    same_as = [first.setdefault(matrix.indices[a:b].tobytes(), n) for n, (a, b) in enumerate(spans)]
    distinct = np.array(list(first.values()), dtype=int)
    distinct = distinct[np.diff(matrix.indptr)[distinct].argsort(kind="stable")]
    row = np.zeros(len(counts), dtype=int)
    row[distinct] = np.arange(len(distinct))
    return ShingleSets(_rarest_first(matrix[distinct]), row[np.array(same_as, dtype=int)], distinct)


def _numbered_shingles(texts: Iterable[str], width: int) -> tuple[np.ndarray, np.ndarray]:
    """The shingles of all texts one after the other, the same number for the same shingle, and how many each has."""
    number_of: dict[str, int] = defaultdict(count(1).__next__)
    words, lengths = array("I"), array("q")
    for text in texts:
        found = words_of(text)
        words.extend(map(number_of.__getitem__, found))
        words.extend([0] * (width - len(found)))  # a shorter text is one shingle, and like no longer one
        lengths.append(max(len(found), width))
    words = np.array(words, dtype=np.uint64)
    counts = np.array(lengths, dtype=np.int64) - width + 1
    starts = np.arange(counts.sum()) + np.repeat(np.arange(len(counts)) * (width - 1), counts)
    numbers = words[starts]
    for step in range(1, width):  # the number of a shingle's beginning and that of its next word have 32 bits each
        _, numbers = np.unique(numbers << 32 | words[starts + step], return_inverse=True)
        numbers = numbers.astype(np.uint64)
    return numbers.astype(np.int64), counts


def _rarest_first(matrix: csr_array) -> csr_array:
    """The matrix with its columns in order of how many rows have them."""
    order = np.bincount(matrix.indices, minlength=matrix.shape[1]).argsort(kind="stable")
    rank = np.empty(len(order), dtype=matrix.indices.dtype)
    rank[order] = np.arange(len(order))
    ordered = type(matrix)((matrix.data, rank[matrix.indices], matrix.indptr), shape=matrix.shape)
    ordered.sort_indices()
    return ordered


# The search


@dataclass(frozen=True)
class _Prefixes:
    """The rarest shingles of each set, as entries (set, shingle): those at which it meets whatever is alike.

    Two sets have at least `threshold` of the larger one in common, and 2 threshold / (1 + threshold) of the smaller, so
    they meet at one of the first shingles of both: all but this share, and one. `in_smaller` says which entries
    are of those that the smaller of two needs.
    """

    rows: np.ndarray
    columns: np.ndarray
    in_smaller: np.ndarray
    sizes: np.ndarray  # of all sets
    threshold: float


def _prefixes(matrix: csr_array, threshold: float) -> _Prefixes:
    sizes = np.diff(matrix.indptr)
    of_larger = sizes - np.ceil(threshold * sizes - 1e-9).astype(int) + 1
    of_smaller = sizes - np.ceil(2 * threshold / (1 + threshold) * sizes - 1e-9).astype(int) + 1
    rows = np.repeat(np.arange(len(sizes)), of_larger)
    place = np.arange(len(rows)) - np.repeat(of_larger.cumsum() - of_larger, of_larger)
    columns = matrix.indices[matrix.indptr[rows] + place]
    return _Prefixes(rows, columns, place < of_smaller[rows], sizes, threshold)


def _alike(
    matrix: csr_array, threshold: float, goal: _Goal | None = None
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Yield arrays (sets, sets, Jaccard similarity) of the pairs of rows at least `threshold` alike.

    With a goal, of those that tell something new; it is to have heard of each array before the next is asked for.
    """
    prefixes = _prefixes(matrix, threshold)
    for some, partners_of_some in _candidates(prefixes, goal):
        for at in range(0, len(some), PAIRS_AT_ONCE):
            ones, others = some[at : at + PAIRS_AT_ONCE], partners_of_some[at : at + PAIRS_AT_ONCE]
            if goal:
                wanted = goal.wanted(ones, others)
                ones, others = ones[wanted], others[wanted]
            shared = matrix[ones].multiply(matrix[others]).sum(axis=1)
            jaccard = shared / (prefixes.sizes[ones] + prefixes.sizes[others] - shared)
            alike = jaccard >= threshold
            if alike.any():
                yield ones[alike], others[alike], jaccard[alike]


def _candidates(prefixes: _Prefixes, goal: _Goal | None) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The pairs that may be alike: for a goal at least those that tell something new, else each once."""
    if goal is None:
        everything = np.ones(len(prefixes.rows), dtype=bool)
        yield from _meetings(prefixes, everything, everything)
        return
    yield from _neighbours(prefixes)
    for asking, answering in goal.questions(prefixes.rows, prefixes.columns):
        # Every pair of an asking and an answering set once, whichever is the larger.
        yield from _meetings(prefixes, asking, answering)
        yield from _meetings(prefixes, answering & ~asking, asking)
        yield from _meetings(prefixes, asking & answering, asking & ~answering)


def _neighbours(prefixes: _Prefixes) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Pairs of a few sets, drawn at random, of those that meet at a shingle of many."""
    crowded = np.bincount(prefixes.columns)[prefixes.columns] >= CROWD if len(prefixes.columns) else []
    rows, columns = prefixes.rows[crowded], prefixes.columns[crowded]
    order = np.lexsort((np.random.default_rng(0).permutation(len(rows)), columns))
    rows, columns = rows[order], columns[order]
    for step in range(1, NEIGHBOURS + 1):
        same = columns[step:] == columns[:-step]
        yield rows[step:][same], rows[:-step][same]


def _meetings(prefixes: _Prefixes, larger: np.ndarray, smaller: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Pairs (larger set, smaller set) that meet at one of these entries, given as masks, and are not too unequal."""
    from scipy.sparse import csr_array

    sizes = prefixes.sizes
    shape = len(sizes), int(prefixes.columns.max(initial=0)) + 1
    of_larger, of_smaller = (
        csr_array((np.ones(mask.sum(), dtype=np.int32), (prefixes.rows[mask], prefixes.columns[mask])), shape)
        for mask in (larger, smaller & prefixes.in_smaller)
    )
    holders = of_smaller.T.tocsr()
    meetings = np.concatenate([[0], np.diff(holders.indptr)[of_larger.indices].cumsum()])[of_larger.indptr]
    start = 0
    while meetings[start] < meetings[-1]:
        stop = max(start + 1, int(np.searchsorted(meetings, meetings[start] + MEETINGS_AT_ONCE, "right")) - 1)
        met = (of_larger[start:stop] @ holders).tocoo()
        large, small = met.row + start, met.col
        possible = (small < large) & (sizes[small] >= prefixes.threshold * sizes[large] - 1e-9)
        yield large[possible], small[possible]
        start = stop
