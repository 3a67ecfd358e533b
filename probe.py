"""A probe: logistic regression on hidden states, alone or pooled with the first token's answer and a bag of words.

    P(label) ~ exp(sum over members of weight * log p_member(label)),    log p_member = log softmax(W x + b), ridge on W

    fitted = fit_probe({"layer 20, last token": states}, targets, groups)    # arrays [n, width]; the best of them
    fitted.out_of_fold                                   # P(label) [n, labels]: no row by a probe that saw its group
    fitted.probe.probabilities({"layer 20, last token": others})             # [m, labels], by the probe of all rows

Layer, pooling and strength are chosen by out-of-fold log loss, and another member joins only where that gains. Weights
of members are fitted inside the folds too, to rows whose members had seen neither them nor the fold that is scored.

Exact: no row is scored by coefficients, scales, word frequencies or weights that were fitted to it or to its group.
Approximate: the choice among the candidates has seen all rows (of random labels it makes nothing, the tests show it),
and fold models have 4/5 of the rows, so the probe of all rows is a little better and surer than its own out-of-fold
probabilities. A calibrator fitted on these errs by that little, on the careful side (docs/probe.md).

Nothing here imports torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations

import numpy as np

# Prior variance of what all of a row's standardised features together add to a logit, before anything is fitted.
STRENGTHS = (10.0, 3.0, 30.0, 100.0)  # the first is the one that layers are compared by
CONTENDERS = 2  # hidden candidates that are tried with every strength
WORD_BITS = 15  # words and character n-grams are counted in 2^15 places each
LEAST_OF_A_LABEL = 5
KERNEL_ROWS = 2000  # up to so many rows, features wider than these are turned into the rows' own space
FIRST_TOKEN, WORDS = "first token", "words"


# Members


@dataclass(frozen=True)
class Member:
    """One softmax regression: its features' scaling and its coefficients.

    Of words `columns` are the counted places in use and `scale` their inverse document frequencies; `mean` is empty.
    """

    name: str
    strength: float
    mean: np.ndarray  # [width]
    scale: np.ndarray  # [width]
    columns: np.ndarray  # int [width] of words, else empty
    coefficients: np.ndarray  # [labels, width]; of a label without rows 0
    intercepts: np.ndarray  # [labels]; of a label without rows -inf
    unseen: float  # probability of each label that the rows of the fit had not

    def log_probabilities(self, features: object) -> np.ndarray:
        """log p(label) [n, labels]."""
        from scipy.special import log_softmax

        logits = self.inputs(features) @ self.coefficients.T + self.intercepts
        absent = np.isneginf(self.intercepts)
        if not absent.any():
            return log_softmax(logits, axis=1)
        log_seen = log_softmax(logits[:, ~absent], axis=1) + np.log1p(-self.unseen * absent.sum())
        found = np.full(logits.shape, np.log(self.unseen))
        found[:, ~absent] = log_seen
        return found

    def inputs(self, features: object) -> object:
        """Scaled features [n, width], dense or, of words, sparse."""
        if self.name == WORDS:
            return weighted_counts(features, self.columns, self.scale)
        return (np.asarray(features, dtype=np.float64) - self.mean) / self.scale


def fit_member(name: str, features: object, targets: np.ndarray, n_labels: int, strength: float) -> Member:
    """Fit a member to features [n, width] (of words, to counts) and the numbers of the rows' labels [n]."""
    if name == WORDS:
        columns, scale = word_weights(features)
        mean, inputs = np.empty(0), weighted_counts(features, columns, scale)
    else:
        features = np.asarray(features, dtype=np.float64)
        mean, columns = features.mean(axis=0), np.empty(0, dtype=np.int64)
        scale = np.maximum(features.std(axis=0), 1e-6) * np.sqrt(features.shape[1])
        inputs = (features - mean) / scale
    seen = np.unique(targets)
    coefficients, intercepts = np.zeros((n_labels, inputs.shape[1])), np.full(n_labels, -np.inf)
    coefficients[seen], intercepts[seen] = softmax_regression(inputs, targets, strength)
    return Member(name, strength, mean, scale, columns, coefficients, intercepts, 1 / (len(targets) + n_labels))


def softmax_regression(inputs: object, targets: np.ndarray, strength: float) -> tuple[np.ndarray, np.ndarray]:
    """(coefficients [labels there are, width], intercepts) of greatest posterior, prior variance `strength`."""
    from sklearn.linear_model import LogisticRegression

    back = None
    if inputs.shape[0] < inputs.shape[1] and inputs.shape[0] <= KERNEL_ROWS:
        # With ridge the coefficients are sums of rows: solve for these, fewer than features, with the same result.
        gram = inputs @ inputs.T
        variances, axes = np.linalg.eigh(gram.toarray() if hasattr(gram, "toarray") else gram)
        kept = variances > 1e-10 * variances[-1]
        lengths = np.sqrt(variances[kept])
        back, given = (axes[:, kept] / lengths).T @ inputs, axes[:, kept] * lengths
    model = LogisticRegression(C=strength, tol=1e-5, max_iter=1000)
    model.fit(inputs if back is None else given, targets)
    coefficients, intercepts = model.coef_, model.intercept_
    if len(coefficients) == 1:  # of two labels it gives only the second's, against the first
        coefficients = np.concatenate([-coefficients, coefficients]) / 2
        intercepts = np.concatenate([-intercepts, intercepts]) / 2
    return coefficients if back is None else coefficients @ back, intercepts


# Words


def word_counts(texts: Sequence[str]) -> object:
    """Counts of words and pairs of words, and of 2 to 5 characters inside words; sparse [n, 2^16], hashed.

    Hashed, because a list of the training texts' words would tell what is in them.
    """
    from scipy.sparse import hstack
    from sklearn.feature_extraction.text import HashingVectorizer

    common = {"n_features": 2**WORD_BITS, "alternate_sign": False, "norm": None}
    words = HashingVectorizer(ngram_range=(1, 2), token_pattern=r"\w+", **common)
    characters = HashingVectorizer(analyzer="char_wb", ngram_range=(2, 5), **common)
    return hstack([words.transform(texts), characters.transform(texts)]).tocsr()


def word_weights(counts: object) -> tuple[np.ndarray, np.ndarray]:
    """(places that two rows or more have, their inverse document frequencies) of counts [n, places]."""
    rows_with = counts.getnnz(axis=0)
    columns = np.flatnonzero(rows_with > 1)
    return columns, np.log((1 + counts.shape[0]) / (1 + rows_with[columns])) + 1


def weighted_counts(counts: object, columns: np.ndarray, inverse_frequency: np.ndarray) -> object:
    """(1 + log count) * inverse document frequency, words and characters each of length 1; sparse [n, columns]."""
    from scipy.sparse import hstack
    from sklearn.preprocessing import normalize

    weighted = counts[:, columns].astype(np.float64)
    weighted.data = (1 + np.log(weighted.data)) * inverse_frequency[weighted.indices]
    words = int(np.searchsorted(columns, 2**WORD_BITS))
    parts = [weighted[:, :words], weighted[:, words:]]
    return hstack([normalize(part) if part.shape[1] else part for part in parts]).tocsr()  # of no columns it is refused


# The pool


@dataclass(frozen=True)
class Probe:
    """Members and their weights in the pool; the first is the hidden states'."""

    labels: tuple[str, ...]
    members: tuple[Member, ...]
    weights: np.ndarray  # [members]

    def log_parts(self, features: Mapping[str, object]) -> np.ndarray:
        """What each member adds to the logarithm of each label's share, [members, n, labels]."""
        return np.array(
            [w * m.log_probabilities(features[m.name]) for w, m in zip(self.weights, self.members, strict=True)]
        )

    def probabilities(self, features: Mapping[str, object]) -> np.ndarray:
        """P(label) [n, labels] from each member's features by its name."""
        return np.exp(pooled(self.log_parts(features)))

    def contributions(self, features: Mapping[str, object]) -> tuple[np.ndarray, np.ndarray]:
        """(log odds of the first label over the second, by member [members, n]; both labels' numbers [n, 2])."""
        parts = self.log_parts(features)
        best = np.argsort(-parts.sum(axis=0), axis=1, kind="stable")[:, :2]
        ahead = np.take_along_axis(parts, best[None], axis=2)
        return ahead[:, :, 0] - ahead[:, :, 1], best


def pooled(log_parts: np.ndarray) -> np.ndarray:
    """log p(label) [n, labels] of parts [members, n, labels]."""
    from scipy.special import log_softmax

    return log_softmax(log_parts.sum(axis=0), axis=1)


def pool_weights(log_probabilities: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """The members' weights, not below 0, from [members, n, labels]: of least log loss, under a prior around their mean.

    The prior, normal of standard deviation 1, keeps them finite where the members are right about every row.
    """
    from scipy.optimize import minimize
    from scipy.special import logsumexp

    n, start = len(targets), np.full(len(log_probabilities), 1 / len(log_probabilities))
    true = log_probabilities[:, np.arange(n), targets]

    def loss(weights: np.ndarray) -> tuple[float, np.ndarray]:
        summed = np.tensordot(weights, log_probabilities, axes=1)
        normaliser = logsumexp(summed, axis=1, keepdims=True)
        expected = (log_probabilities * np.exp(summed - normaliser)).sum(axis=2)
        away = weights - start
        value = np.mean(normaliser[:, 0] - weights @ true) + away @ away / (2 * n)
        return float(value), (expected - true).mean(axis=1) + away / n

    return minimize(loss, start, jac=True, method="L-BFGS-B", bounds=[(0, None)] * len(start)).x


# Fitting


@dataclass(frozen=True)
class Source:
    """Features of all rows and the strength that a member is fitted to them with."""

    name: str
    features: object  # [n, width]; of words, counts
    strength: float


@dataclass(frozen=True)
class MemberSet:
    """Members tried together, and log p(label) [n, labels] of every row by such as have not seen its group."""

    sources: tuple[Source, ...]
    log_probabilities: np.ndarray
    log_loss: float
    accuracy: float

    @property
    def name(self) -> str:
        return " + ".join(source.name for source in self.sources)

    def record(self) -> dict[str, object]:
        """What was tried and how it did, for a file."""
        strengths = [source.strength for source in self.sources]
        return {"name": self.name, "strengths": strengths, "log_loss": self.log_loss, "accuracy": self.accuracy}


@dataclass(frozen=True)
class FittedProbe:
    """The probe of all rows, and what was seen of probes like it on rows that they had not seen.

    `rare` are the labels with fewer than five rows, with how many they have.
    """

    probe: Probe
    out_of_fold: np.ndarray  # P(label) [n, labels]
    chosen: MemberSet
    candidates: tuple[MemberSet, ...]  # all that were tried
    label_counts: np.ndarray  # rows of each label [labels]
    rare: Mapping[str, int]
    groups: int


@dataclass(frozen=True)
class Fitting:
    """The rows that members are fitted to, by the numbers of their labels, and the folds: (train, test) row numbers."""

    targets: np.ndarray
    n_labels: int
    folds: Sequence[tuple[np.ndarray, np.ndarray]]

    def member(self, source: Source, rows: np.ndarray) -> Member:
        """The member that is fitted to some of the rows."""
        return fit_member(source.name, source.features[rows], self.targets[rows], self.n_labels, source.strength)

    def candidate(self, sources: Sequence[Source], log_probabilities: np.ndarray) -> MemberSet:
        """A candidate with its log loss, in nats, and its accuracy."""
        loss = -np.mean(log_probabilities[np.arange(len(self.targets)), self.targets])
        accuracy = np.mean(log_probabilities.argmax(axis=1) == self.targets)
        return MemberSet(tuple(sources), log_probabilities, float(loss), float(accuracy))

    def alone(self, source: Source) -> MemberSet:
        """A single member: each row by one that is fitted to the other folds."""
        found = np.empty((len(self.targets), self.n_labels))
        for train, test in self.folds:
            found[test] = self.member(source, train).log_probabilities(source.features[test])
        return self.candidate([source], found)

    def nested(self, source: Source) -> np.ndarray:
        """[folds, n, labels]: log p(label) of each row outside a fold by a member that has seen neither's rows."""
        found = np.full((len(self.folds), len(self.targets), self.n_labels), np.nan)
        for one, other in combinations(range(len(self.folds)), 2):
            member = self.member(source, np.setdiff1d(self.folds[one][0], self.folds[other][1]))
            for scored, unseen in ((one, other), (other, one)):
                rows = self.folds[scored][1]
                found[unseen, rows] = member.log_probabilities(source.features[rows])
        return found

    def together(self, members: Sequence[MemberSet], nested: np.ndarray) -> MemberSet:
        """A pool of single members, of which `nested` is [members, folds, n, labels]: its weights fitted in folds."""
        found = np.empty((len(self.targets), self.n_labels))
        for fold, (train, test) in enumerate(self.folds):
            weights = pool_weights(nested[:, fold, train], self.targets[train])
            parts = [w * member.log_probabilities[test] for w, member in zip(weights, members, strict=True)]
            found[test] = pooled(np.array(parts))
        return self.candidate([member.sources[0] for member in members], found)


def fit_probe(
    hidden: Mapping[str, np.ndarray] | np.ndarray,
    targets: Sequence[object],
    groups: Sequence[object] | None = None,
    labels: Sequence[object] | None = None,
    first_token: np.ndarray | None = None,
    texts: Sequence[str] | None = None,
    seed: int = 0,
) -> FittedProbe:
    """Fit a probe to hidden states, an array [n, width] or several by name, and the rows' labels [n].

    `labels` are all there can be, in order (default: those that occur, sorted). With `first_token`, the labels'
    log-probabilities by the first token [n, labels], or with `texts`, these and their words are tried as further
    members. Rows of a group stay in one fold. ValueError for too few rows, or of one label only.
    """
    from calibration import grouped_folds

    hidden = hidden if isinstance(hidden, Mapping) else {"hidden": hidden}
    labels = sorted(set(targets)) if labels is None else list(labels)
    numbers, counts = numbered(targets, labels)
    for name, states in hidden.items():
        if len(states) != len(numbers):
            raise ValueError(f"{name}: {len(states)} rows of hidden states for {len(numbers)} targets")
    fitting = Fitting(numbers, len(labels), grouped_folds(numbers, numbers, groups, seed=seed))
    tried = hidden_candidates(fitting, hidden)
    singles = [best_of(tried)]
    others = {FIRST_TOKEN: first_token, WORDS: None if texts is None else word_counts(texts)}
    for name, features in others.items():
        if features is not None:
            found = [fitting.alone(Source(name, features, strength)) for strength in STRENGTHS]
            singles.append(best_of(found))
            tried += found
    pools = all_pools(fitting, singles)
    chosen = best_of([singles[0], *pools])
    return FittedProbe(
        probe=fitted_to_all(fitting, chosen, singles, labels),
        out_of_fold=np.exp(chosen.log_probabilities),
        chosen=chosen,
        candidates=(*tried, *pools),
        label_counts=counts,
        rare={str(label): n for label, n in zip(labels, counts.tolist(), strict=True) if n < LEAST_OF_A_LABEL},
        groups=len(numbers) if groups is None else len(set(groups)),
    )


def numbered(targets: Sequence[object], labels: Sequence[object]) -> tuple[np.ndarray, np.ndarray]:
    """(the number of each row's label [n], rows of each label [labels]); ValueError where nothing can be fitted."""
    from calibration import LEAST_ROWS

    number = {label: n for n, label in enumerate(labels)}
    if unknown := next((target for target in targets if target not in number), None):
        raise ValueError(f"the label {unknown!r} is none of {', '.join(map(str, labels))}")
    numbers = np.array([number[target] for target in targets], dtype=np.int64)
    counts = np.bincount(numbers, minlength=len(labels))
    if len(numbers) < LEAST_ROWS or (counts > 0).sum() < 2:
        there = f"{len(numbers)} rows of {(counts > 0).sum()} labels"
        raise ValueError(f"{there}; a probe needs at least {LEAST_ROWS} rows and two labels")
    return numbers, counts


def best_of(candidates: Sequence[MemberSet]) -> MemberSet:
    """The one of least out-of-fold log loss, of equals the first."""
    return min(candidates, key=lambda candidate: candidate.log_loss)


def hidden_candidates(fitting: Fitting, hidden: Mapping[str, np.ndarray]) -> list[MemberSet]:
    """Every array of hidden states with the first strength, and the best of them with all."""
    tried = [fitting.alone(Source(name, states, STRENGTHS[0])) for name, states in hidden.items()]
    for leading in sorted(tried, key=lambda candidate: candidate.log_loss)[:CONTENDERS]:
        source = leading.sources[0]
        tried += [fitting.alone(replace(source, strength=strength)) for strength in STRENGTHS[1:]]
    return tried


def all_pools(fitting: Fitting, singles: Sequence[MemberSet]) -> list[MemberSet]:
    """The hidden states' member with each of the others, and with all of them."""
    if len(singles) == 1:
        return []
    nested = np.array([fitting.nested(single.sources[0]) for single in singles])
    sets = [[0, other] for other in range(1, len(singles))] + ([[*range(len(singles))]] if len(singles) > 2 else [])
    return [fitting.together([singles[m] for m in members], nested[members]) for members in sets]


def fitted_to_all(fitting: Fitting, chosen: MemberSet, singles: Sequence[MemberSet], labels: Sequence[object]) -> Probe:
    """The chosen members fitted to all rows, weighted by what they said of rows that they had not seen."""
    weights = np.ones(1)
    if len(chosen.sources) > 1:
        alone = [single.log_probabilities for single in singles if single.sources[0] in chosen.sources]
        weights = pool_weights(np.array(alone), fitting.targets)
    rows = np.arange(len(fitting.targets))
    members = tuple(fitting.member(source, rows) for source in chosen.sources)
    return Probe(tuple(map(str, labels)), members, weights)
