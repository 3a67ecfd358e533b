"""Small pieces of torch that the model side shares: the device, softmax, means, drawing a token, caches, memory."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Sequence

import numpy as np


def choose_device(device: str) -> str:
    import torch

    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    available = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if not available.get(device.partition(":")[0], False):
        there = ", ".join(name for name, is_there in available.items() if is_there)
        raise ValueError(f"no device {device!r} here; there is {there}")
    return "cpu" if device.startswith("cpu:") else device  # accelerate numbers CPUs, of which torch has one


def choose_dtype(dtype: str, device: str) -> str:
    import torch

    if dtype != "auto":
        return dtype
    if device == "cpu":
        return "float32"
    if device == "mps":
        return "bfloat16" if torch.backends.mps.is_macos_or_newer(14, 0) else "float16"
    return "bfloat16" if torch.cuda.is_bf16_supported() else "float16"


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


def last_and_mean(states, ends, spans: Sequence[tuple[int, int]]):
    """Of states [rows, width, hidden] those at `ends` and the mean of each row's span; float32 [rows, 2, hidden]."""
    import torch

    states, place = states.float(), torch.arange(states.shape[1], device=states.device)
    first, end = torch.tensor(spans, device=states.device).T[:, :, None]
    inside = ((place >= first) & (place < end)).float()
    share = inside / inside.sum(dim=1, keepdim=True)  # of each token in its row's mean
    last = states[torch.arange(len(states), device=states.device), ends]
    return torch.stack([last, (share[:, None] @ states)[:, 0]], dim=1)


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
