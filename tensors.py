"""Small pieces of torch that the model side shares: softmax, drawing a token, caches changed, memory that ran out."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Sequence

import numpy as np


def map_cache(cache: object, change: Callable) -> object:
    """A cache like this one, with every layer's keys and values changed; the cache itself stays as it is."""
    changed = copy.copy(cache)
    changed.layers = [copy.copy(layer) for layer in cache.layers]
    for layer in changed.layers:
        layer.keys, layer.values = change(layer.keys), change(layer.values)
    return changed


def log_softmax(logits):
    """In float32, from raw logits. Over 49,152 tokens torch's own log_softmax on a CPU is wrong by 1e-5."""
    logits = logits.float()
    return logits - logits.logsumexp(dim=-1, keepdim=True)


def inverse_cdf(log_probs, temperature: float, rows: Sequence[int], points: Sequence[float]) -> list[int]:
    """A token for each point in [0, 1): of softmax(log_probs [some rows, vocabulary] / temperature) in its row.

    In float64, which Apple's devices do not have and in which no temperature is too near to 0.
    """
    import torch

    log_probs = (log_probs.cpu() if log_probs.device.type == "mps" else log_probs).double()
    cumulative = torch.softmax(log_probs / temperature, dim=-1).cumsum(dim=-1)
    rows, points = (torch.tensor(x, device=cumulative.device) for x in (rows, np.array(points, dtype=np.float64)))
    tokens = torch.empty_like(rows)
    for row in rows.unique():
        here = rows == row
        tokens[here] = torch.searchsorted(cumulative[row], points[here] * cumulative[row, -1], right=True)
    return tokens.clamp(max=log_probs.shape[-1] - 1).tolist()  # a point that rounds up to the end


@contextlib.contextmanager
def inference() -> Iterator[None]:
    import torch

    with torch.inference_mode(), out_of_memory_advice("a smaller --batch-size, --load-in-8bit or --load-in-4bit"):
        yield


@contextlib.contextmanager
def out_of_memory_advice(use: str) -> Iterator[None]:
    import torch

    try:
        yield
    except torch.OutOfMemoryError:
        raise MemoryError(f"the GPU is out of memory; use {use}") from None
    except RuntimeError as error:  # what torch raises on a CPU
        if "can't allocate memory" not in str(error):
            raise
        raise MemoryError(f"out of memory; use {use}") from None
