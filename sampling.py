"""Answers drawn from a model: every token from the whole softmax, each answer from a seed of its own.

    texts = sample(llama, rows_of_ids, seeds)            # a list of texts for each row, one for each of its seeds

A prompt runs once for all its answers; answers that begin alike run as one until they part; rows of several lengths go
on together, each in its own cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from tensors import inference, inverse_cdf, log_softmax

if TYPE_CHECKING:
    from llama import Llama

# By device: prompts in a batch, and positions in its caches if no two of its answers began alike.
SAMPLED = {"cpu": (32, 1 << 16), "mps": (64, 1 << 16), "cuda": (256, 1 << 17)}


@dataclass
class Draw:
    """A continuation that is being drawn: which row of the batch it continues, its random numbers, its ids so far."""

    row: int
    random: np.random.Generator
    ids: list[int] = field(default_factory=list)
    at: int = 0  # the row of the last pass that gives its next token

    @property
    def beginning(self) -> tuple[int, ...]:
        """The same for all draws that go on alike."""
        return self.row, *self.ids


@dataclass(frozen=True)
class HowToDraw:
    """What is the same for all draws: the temperature, and where an answer ends."""

    temperature: float
    max_tokens: int
    stop: str


def sample(
    llama: Llama,
    rows: Sequence[Sequence[int]],
    seeds: Sequence[Sequence[int]],
    temperature: float,
    max_tokens: int,
    stop: str,
    batch_size: int | None,
) -> list[list[str]]:
    """As `Llama.sample` says."""
    if not rows:
        return []
    how = HowToDraw(temperature, max_tokens, stop)
    texts: list[list[str]] = [[] for _ in rows]
    with inference():
        # Two copies of a single row share all of it but the last token.
        prefix, cache = llama.shared_prefix(rows if len(rows) > 1 else [*rows, *rows])
        prompts, positions = SAMPLED.get(llama.device, SAMPLED["cpu"])
        longest = max(1, *map(len, seeds)) * max(map(len, rows))
        size = batch_size or max(1, min(prompts, positions // longest))
        one_length = not (llama.shares_prefix and llama.continues_padded)
        for batch in llama.batches([len(row) - len(prefix) for row in rows], size, one_length):
            tails = [list(rows[i][len(prefix) :]) for i in batch]
            draws = [Draw(row, np.random.default_rng(seed)) for row, i in enumerate(batch) for seed in seeds[i]]
            _run(llama, draws, tails, cache, how)
            for draw in draws:
                texts[batch[draw.row]].append(_text(llama, draw.ids, stop))
    return texts


def _run(llama: Llama, draws: list[Draw], tails: list[list[int]], cache: object, how: HowToDraw) -> None:
    """Draw the ids of continuations of tails after a shared cache. Those that begin alike run as one."""
    import torch

    log_probs, grown = llama.forward(tails, cache, keep_cache=llama.shares_prefix is True)
    real = _real_positions(llama, tails, grown) if llama.shares_prefix else None
    for draw in draws:
        draw.at = draw.row
    live = draws
    for length in range(1, how.max_tokens + 1):
        points = [draw.random.random() for draw in live]
        tokens = inverse_cdf(log_probs, how.temperature, [draw.at for draw in live], points)
        for draw, token in zip(live, tokens, strict=True):
            draw.ids.append(token)
        live = [draw for draw in live if not _ends(llama, draw.ids, how.stop)]
        if not live or length == how.max_tokens:
            return
        # Each distinct beginning runs once, and all draws that begin so go on from its row.
        distinct: dict[tuple, Draw] = {}
        for draw in live:
            distinct.setdefault(draw.beginning, draw)
        running = list(distinct.values())
        if llama.shares_prefix:
            chosen = torch.tensor([draw.at for draw in running], device=log_probs.device)
            grown.batch_select_indices(chosen)
            log_probs, real = _step(llama, [draw.ids[-1] for draw in running], grown, real[chosen])
        else:  # a cache that cannot be cut to rows: the rows run again
            log_probs, _ = llama.forward([tails[draw.row] + draw.ids for draw in running], cache)
        row_of = {beginning: row for row, beginning in enumerate(distinct)}
        for draw in live:
            draw.at = row_of[draw.beginning]


def _ends(llama: Llama, ids: list[int], stop: str) -> bool:
    return ids[-1] in llama.end_ids or bool(stop and stop in llama.tokenizer.decode(ids[-1:]))


def _text(llama: Llama, ids: list[int], stop: str) -> str:
    """What a continuation says, up to `stop` and without the tokens that only end it."""
    text = llama.tokenizer.decode([token for token in ids if token not in llama.end_ids])
    return text.partition(stop)[0] if stop else text


def _real_positions(llama: Llama, tails: list[list[int]], cache: object):
    """Which positions of a cache, grown by tails padded on the right, are a row's own; bool [rows, width]."""
    import torch

    width = max(map(len, tails))
    padding = torch.tensor([width - len(tail) for tail in tails], device=llama.model.device)
    places = torch.arange(cache.get_seq_length(), device=llama.model.device)
    return places < cache.get_seq_length() - padding[:, None]


def _step(llama: Llama, tokens: list[int], cache: object, real) -> tuple:
    """Log-softmax after one more token of each row, whose own cache grows in place, and `real` grown by it."""
    import torch

    options = {"past_key_values": cache, "use_cache": True}
    grown = torch.cat([real, torch.ones_like(real[:, :1])], dim=1)
    if not real.all():  # padding lies before the new token, which must not see it
        options |= {"attention_mask": grown.long(), "position_ids": real.sum(dim=1)[:, None]}
    ids = torch.tensor(tokens, device=llama.model.device)[:, None]
    return log_softmax(llama.model(input_ids=ids, **options).logits[:, -1]), grown


def can_continue_padded(llama: Llama) -> bool:
    """Whether rows of several lengths can go on together, padding masked and positions told; it is tried."""
    import torch
    from transformers.cache_utils import DynamicLayer

    if not {"attention_mask", "position_ids"} <= llama.parameters:
        return False
    with inference():
        rows = [[5, 6, 7], [8]]
        _, cache = llama.forward(rows, keep_cache=True)
        if any(type(layer) is not DynamicLayer for layer in cache.layers):  # a window would count the padding
            return False
        padded, _ = _step(llama, [9, 9], cache, _real_positions(llama, rows, cache))
        plain, _ = llama.forward([[8, 9]])
        return bool(torch.allclose(padded[1].exp(), plain[0].exp(), atol=llama.tolerance))
