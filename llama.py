"""The shared loader: any causal language model of transformers, and the probability it puts on its next token.

    llama = load_llama("default")                        # SmolLM2-135M-Instruct, fetched and converted once
    prompt = llama.rendered_prompt(task.prompt(SLOT))    # the prompt around a text, rendered once
    ids = llama.encode(prompt, text)                     # the ids of the whole prompt
    llama.next_token_log_probs(ids)                      # [vocabulary], one plain forward pass
    llama.answer_log_probs(rows_of_ids, answers)         # [n, answers], in batches
    llama.sample(rows_of_ids, seeds)                     # answers drawn from the model, one for each seed of a row

In batches, the rows' common beginning runs through the model once and its keys and values are reused; what the rows
have of their own runs packed into one sequence (packed.py), all answers of a row behind it; the vocabulary head is
computed where an answer goes on. A family whose attention cannot be told to runs batches that are sorted by length and
padded on the right, where a causal model never looks. None of it changes a result: the tests compare every row with one
plain forward pass.

Importing this file imports no torch. Weights come from safetensors only; no pickle, no remote code.
"""

from __future__ import annotations

import argparse
import contextlib
import inspect
import json
import logging
import re
import sys
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from pathlib import Path

import numpy as np

from lora import check_adapter, check_base, choose_adapter, with_adapter
from model_files import folder_hash, loading, locate
from packed import CannotPackError, PackedRows, answer_tree, answers_of, pack_rows, packed_attention
from prompts import SLOT, RenderedPrompt, rendered_chat
from sampling import can_continue_padded, sample
from tables import check_text
from tensors import choose_device, choose_dtype, inference, last_and_mean, log_softmax, map_cache

# Tokens in a batch, padding included, by device: they bound its memory. On 2 CPU cores more gains nothing.
TOKENS_PER_BATCH = {"cpu": 512, "mps": 4096, "cuda": 8192}
LOGITS_PER_BATCH = 1 << 28  # numbers of the vocabulary head


@dataclass(frozen=True)
class AnsweredBatch:
    """Rows that ran together: their numbers, log-probabilities [batch, answers], hidden states [batch, ..., hidden]."""

    rows: list[int]
    log_probs: np.ndarray
    hidden: np.ndarray | None


@dataclass
class Llama:
    """A loaded model with its tokenizer; `identity` is what a fingerprint must know of the weights in use."""

    model: object
    tokenizer: object
    name: str
    path: Path
    identity: dict[str, str]
    adapter: Path | None = None  # its folder
    packs: bool | None = None  # whether rows can run packed; None until tried
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

    def rendered_prompt(self, prompt: str | list[dict[str, str]]) -> RenderedPrompt:
        """Render a prompt that holds SLOT: a string as it is, a list of chat messages by the model's template, once."""
        if isinstance(prompt, str):
            start = self._ids_before_a_string()
        else:
            prompt, start = rendered_chat(self.tokenizer, prompt, self.name), ()  # the template writes its own BOS
        if prompt.count(SLOT) != 1:
            raise ValueError(f"the chat template of {self.name} does not show the text exactly once")
        before, after = prompt.split(SLOT)
        if tuple(self._ids(before)[: len(start)]) == start:  # the prompt spells its BOS: one is enough
            start = ()
        return RenderedPrompt(before, after, start)

    def _ids_before_a_string(self) -> tuple[int, ...]:
        """What the tokenizer puts before a string (a BOS or nothing), read off it rather than from its settings."""
        plain, with_special = self._ids("a"), self.tokenizer("a").input_ids
        for start in range(len(with_special)):
            if with_special[start : start + len(plain)] == plain:
                return tuple(with_special[:start])
        raise ValueError(f"the tokenizer of {self.name} reads a text in two ways")

    def task_prompt(self, task: object) -> RenderedPrompt:
        """The rendered prompt of a task.Task around the place of its text."""
        return self.rendered_prompt(task.prompt(SLOT))

    def prompt_settings(self, task: object) -> dict[str, object]:
        """What a fingerprint must know of a task's prompt besides the task: what a chat template makes of it."""
        if task.format != "chat":
            return {}
        prompt = self.task_prompt(task)
        return {"rendered": [prompt.before, prompt.after]}

    def encode(self, prompt: RenderedPrompt, text: str) -> list[int]:
        """The ids of the whole rendered prompt; control strings in the text become plain characters.

        Equal to tokenizing the whole string, which is what happens unless the text spells a control token.
        """
        whole, ids = prompt.render(text), list(prompt.start)
        start, end = len(prompt.before), len(whole) - len(prompt.after)  # of the text
        touches_text = [m for m in self._control.finditer(whole) if m.start() < end and m.end() > start]
        if not touches_text:
            return ids + self._ids(whole)
        # The template's own control tokens stay; the stretch between the two nearest ones is read as characters.
        start = max((m.end() for m in self._control.finditer(prompt.before)), default=0)
        end += next((m.start() for m in self._control.finditer(prompt.after)), len(prompt.after))
        return ids + self._ids(whole[:start]) + self._plain_ids(whole[start:end]) + self._ids(whole[end:])

    def encode_within(
        self, prompt: RenderedPrompt, text: str, room: int = 0, truncate: bool = False
    ) -> tuple[list[int], str]:
        """Ids that leave `room` tokens of the context for the answer, and the text that they show.

        Raises ValueError for an empty, unreadable or too long text; `truncate` shortens a long one, never the question.
        """
        check_text(text)
        ids, limit = self.encode(prompt, text), (self.context_length or sys.maxsize) - room
        if len(ids) <= limit:
            return ids, text
        if not truncate:
            raise ValueError(f"the prompt has {len(ids)} tokens, the model reads {limit}; --truncate shortens the text")
        low, high = 0, len(text)  # the longest beginning of the text that fits, by bisection over characters
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if len(self.encode(prompt, text[:middle])) <= limit else (low, middle - 1)
        if not text[:low].strip():
            raise ValueError(f"the prompt alone fills the model's {limit} tokens")
        return self.encode(prompt, text[:low]), text[:low]

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
        with inference():
            log_probs, _ = self.forward([list(ids)])
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
        for batch in self.answer_batches(rows, answers, batch_size, hidden is not None):
            result[batch.rows] = batch.log_probs
            if hidden is not None:
                hidden[batch.rows] = batch.hidden
            advance(len(batch.rows))
        return result

    def answer_batches(
        self,
        rows: Sequence[Sequence[int]],
        answers: Sequence[Sequence[int]],
        batch_size: int | None = None,
        with_hidden: bool = False,
        skip: Collection[int] = (),
    ) -> Iterator[AnsweredBatch]:
        """As `answer_log_probs`, a batch at a time; one whose rows are all among `skip` is left out.

        What is left out changes no batch and no number, so a run that was stopped can go on with the rest.
        """
        with inference():
            prefix, cache = self.shared_prefix(rows)
            if len(rows) > 1 or self._go_on(answers):
                self.try_packing(rows)
        tails = [list(row[len(prefix) :]) for row in rows]
        for batch in self.run_together(tails, answers, batch_size):
            if all(i in skip for i in batch):
                continue
            with inference(), self._head_inputs() if with_hidden else contextlib.nullcontext() as seen:
                together = [tails[i] for i in batch]
                log_probs = self.answers_after(together, cache, answers).cpu().double().numpy()
                hidden = self._last_of(together, seen[0]).float().cpu().numpy() if with_hidden else None
            yield AnsweredBatch(batch, log_probs, hidden)

    def hidden_states(
        self,
        rows: Sequence[Sequence[int]],
        spans: Sequence[tuple[int, int]],
        layers: Sequence[int],
        answers: Sequence[int] = (),
        batch_size: int | None = None,
        skip: Collection[int] = (),
    ) -> Iterator[AnsweredBatch]:
        """States of layers (0: the embeddings) for each prompt, batch by batch: `hidden` [batch, layers, 2, hidden].

        Of each layer the state at the last token, and the mean over the tokens start to end - 1 of the row's span.
        `answers` are single tokens; without any, no vocabulary head is computed. `skip` as in `answer_batches`.
        """
        with inference():  # no more is shared than what comes before every span: its tokens must run to be seen
            prefix, cache = self.shared_prefix([row[: start + 1] for row, (start, _) in zip(rows, spans, strict=True)])
            self.try_packing(rows)
        shared = len(prefix)
        tails = [list(row[shared:]) for row in rows]
        for batch in self.run_together(tails, [[answer] for answer in answers], batch_size):
            if all(i in skip for i in batch):
                continue
            inner = [(spans[i][0] - shared, spans[i][1] - shared) for i in batch]
            with inference():
                log_probs, hidden = self._states([tails[i] for i in batch], inner, cache, layers, answers)
                found = AnsweredBatch(batch, log_probs.cpu().double().numpy(), hidden.cpu().numpy())
            yield found

    def _states(self, tails: list[list[int]], spans: list[tuple[int, int]], cache, layers, answers) -> tuple:
        """(log-probabilities [tails, answers], states [tails, layers, 2, hidden]) of tails after a shared cache."""
        import torch

        ends = torch.tensor([len(tail) - 1 for tail in tails], device=self.model.device)
        log_probs = torch.empty(len(tails), 0)
        if self.packs:
            tree = answer_tree([[answer] for answer in answers])
            packed = pack_rows(tails, tree, cache, self.model.device)
            output = self._packed_output(packed, bool(answers), output_hidden_states=True)
            states = [packed.side_by_side(output.hidden_states[layer]) for layer in layers]
            if answers:
                log_probs = answers_of(output.logits[0], tree)
        else:
            kept, inverse = torch.unique(ends, return_inverse=True)
            output = self._output(self._padded(tails), cache, kept if answers else None, output_hidden_states=True)
            states = [output.hidden_states[layer] for layer in layers]
            if answers:
                each = torch.arange(len(tails), device=ends.device)
                log_probs = log_softmax(output.logits[each, inverse])[:, list(answers)]
        return log_probs, torch.stack([last_and_mean(of_layer, ends, spans) for of_layer in states], dim=1)

    @contextlib.contextmanager
    def evaluating(self) -> Iterator[None]:
        """The model as it answers: no dropout, no gradients, no cache of weights that have changed since."""
        training = self.model.training
        self.forget_prefix()
        self.model.eval()
        try:
            with inference():
                yield
        finally:
            self.model.train(training)
            self.forget_prefix()

    def forget_prefix(self) -> None:
        """Drop the kept cache of a prompt's beginning; needed whenever the model's weights have changed."""
        self._prefix = ((), None)

    @property
    def hidden_size(self) -> int:
        """The width of the last hidden state."""
        return self.model.get_output_embeddings().weight.shape[1]

    @staticmethod
    def _go_on(answers: Sequence[Sequence[int]]) -> bool:
        """Whether an answer has more than one token."""
        return any(len(answer) > 1 for answer in answers)

    def needs_one_length(self, answers: Sequence[Sequence[int]]) -> bool:
        """Whether the rows of a batch that is padded must be of one length."""
        return self._length_matters or self._go_on(answers)

    def run_together(
        self, tails: Sequence[Sequence[int]], answers: Sequence[Sequence[int]], batch_size: int | None
    ) -> Iterator[list[int]]:
        """The numbers of the tails of each batch, for `answers_after`."""
        lengths = [len(tail) for tail in tails]
        if not self.packs:
            return self.batches(lengths, batch_size, self.needs_one_length(answers))
        tree = answer_tree(answers)
        vocabulary = self.model.get_output_embeddings().weight.shape[0]
        rows = batch_size or max(1, LOGITS_PER_BATCH // (vocabulary * tree.nodes))
        return self._packed_batches([length + tree.nodes - 1 for length in lengths], rows, batch_size is None)

    def answers_after(self, tails: list[list[int]], cache: object, answers: Sequence[Sequence[int]]):
        """Log-probability of each answer after each tail, float32 tensor [tails, answers]."""
        import torch

        if self.packs:
            tree = answer_tree(answers)
            packed = pack_rows(tails, tree, cache, self.model.device)
            return answers_of(self._packed_output(packed).logits[0], tree)
        continues = self.shares_prefix is True and self._go_on(answers)  # a row's own cache, grown by its tail
        log_probs, grown = self.forward(tails, cache, keep_cache=continues)
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
        """Of the states that the head was given those at the last token of each tail, [tails, hidden]."""
        import torch

        if self.packs:
            return states[0].view(len(tails), -1, states.shape[-1])[:, 0]
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
        model's generation settings say. A prompt runs once, however many its seeds, unless its cache cannot be shared:
        then it runs again for every token. A continuation depends on its prompt and its seed alone, not on other rows
        or on `batch_size`, but for rounding, which in about one of 700 moves a draw to a neighbouring rare token.
        """
        return sample(self, rows, seeds, temperature, max_tokens, stop, batch_size)

    @cached_property
    def continues_padded(self) -> bool:
        """Whether sampled answers to rows of several lengths can go on together."""
        return can_continue_padded(self)

    @cached_property
    def end_ids(self) -> set[int]:
        """The tokens that end an answer."""
        ends = getattr(getattr(self.model, "generation_config", None), "eos_token_id", None)
        ends = [] if ends is None else ends
        return {*self.tokenizer.all_special_ids, *(ends if isinstance(ends, list) else [ends])}

    def batches(self, lengths: Sequence[int], batch_size: int | None, exact: bool) -> Iterator[list[int]]:
        """Row numbers, longest first, in batches of bounded padded size; `exact`: of one length, so without padding."""
        order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
        while order:
            longest = lengths[order[0]]
            size = batch_size or max(1, TOKENS_PER_BATCH.get(self.device, 4096) // longest)
            batch = [i for i in order[:size] if not exact or lengths[i] == longest]
            yield batch
            del order[: len(batch)]

    def _packed_batches(self, lengths: Sequence[int], rows: int, bounded: bool) -> Iterator[list[int]]:
        """Row numbers, longest first, at most `rows` a batch; `bounded`: of no more tokens than a batch may have."""
        order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
        while order:
            tokens = np.cumsum([lengths[i] for i in order[:rows]])
            fit = np.count_nonzero(tokens <= TOKENS_PER_BATCH.get(self.device, 4096)) if bounded else rows
            batch = order[: max(1, fit)]
            yield batch
            del order[: len(batch)]

    def shared_prefix(self, rows: Sequence[Sequence[int]]) -> tuple[tuple[int, ...], object]:
        """The ids with which all rows begin (at least one token of each is left over) and their key-value cache."""
        if len(rows) < 2 or self.shares_prefix is False:
            return (), None
        first, last = min(rows), max(rows)  # what the extremes of the dictionary order share, all share
        shortest = min(map(len, rows)) - 1
        length = next((i for i in range(shortest) if first[i] != last[i]), shortest)
        prefix = tuple(first[:length])
        if prefix and prefix != self._prefix[0]:
            _, cache = self.forward([list(prefix)], keep_cache=True)
            if self.shares_prefix is None:
                self._try_sharing(cache, list(last), length)
                if not self.shares_prefix:
                    print(f"note: {self.name} cannot share a prompt's cache; running plain batches", file=sys.stderr)
                    return (), None
            self._prefix = (prefix, cache)
        return (prefix, self._prefix[1]) if prefix else ((), None)

    def try_packing(self, rows: Sequence[Sequence[int]]) -> None:
        """Find out, once, whether rows can run packed: the longest of them, behind a beginning of its own."""
        longest = max(rows, key=len, default=())
        if self.packs is None and len(longest) > 1:
            self.shared_prefix([longest, longest[: len(longest) // 2 + 1]])

    @cached_property
    def _length_matters(self) -> bool:
        """Whether all positions are rotated by the length of the longest row: then no padding, and no shared cache."""
        rotary = getattr(self.model.config.get_text_config(), "rope_parameters", None) or {}
        settings = [rotary, *(value for value in rotary.values() if isinstance(value, dict))]
        return any(s.get("rope_type") in ("dynamic", "longrope") for s in settings)

    def _try_sharing(self, cache: object, row: list[int], length: int) -> None:
        """Find out whether a row with `length` tokens in the cache comes out the same packed, or else in a batch."""
        plain, _ = self.forward([row])
        is_plain = self._holds_keys_and_values_only(cache)

        def comes_out(log_probs) -> bool:
            return bool((log_probs.exp() - plain[0].exp()).abs().max() < self.tolerance)

        if self.packs is None:
            takes_packed = {"position_ids", "logits_to_keep"} <= self.parameters
            self.packs = is_plain and takes_packed and self._packs_as(comes_out, row[length:], cache)
        if self.packs:
            self.shares_prefix = True
        else:
            self.shares_prefix = is_plain and comes_out(self.forward([row[length:]] * 2, cache)[0][0])

    def _packs_as(self, comes_out: Callable, tail: list[int], cache: object) -> bool:
        """Whether a tail comes out right behind another in one sequence."""
        packed = pack_rows([tail[:1], tail], answer_tree([tail[:1]]), cache, self.model.device)
        try:
            logits = self._packed_output(packed).logits[0]
        except (CannotPackError, TypeError):  # of a layer that does not know what it is given
            return False
        return comes_out(log_softmax(logits)[1])

    def _holds_keys_and_values_only(self, cache: object) -> bool:
        from transformers.cache_utils import DynamicCache, DynamicLayer, LinearAttentionCacheLayerMixin

        if self._length_matters or type(cache) is not DynamicCache:  # some families subclass it and keep states besides
            return False
        layers = cache.layers
        return all(isinstance(x, DynamicLayer) and not isinstance(x, LinearAttentionCacheLayerMixin) for x in layers)

    def _packed_output(self, packed: PackedRows, with_head: bool = True, **wanted: bool):
        """What one pass over packed rows gives, with logits [1, rows * nodes, vocabulary] if the head runs."""
        with self.packing():
            if not with_head:
                return self._causal.base_model(**packed.inputs, **wanted)
            return self.model(**packed.inputs, logits_to_keep=packed.nodes, **wanted)

    def packing(self) -> contextlib.AbstractContextManager:
        """The model with the attention of packed rows; CannotPackError if its layers have one of their own."""
        return packed_attention(self._causal)

    @property
    def tolerance(self) -> float:
        """How far two ways to the same probability may differ by rounding."""
        return 1e-4 if self.identity.get("precision") == "float32" else 0.05

    def forward(self, rows: list[list[int]], cache=None, keep_cache: bool = False) -> tuple:
        """Log-softmax at the last token of each row (float32 [rows, vocabulary]), and the grown cache if asked for.

        Rows are padded on the right and no mask is needed: a causal model's real tokens never see what follows them.
        """
        import torch

        ids = self._padded(rows)
        kept, inverse = torch.unique(torch.tensor([len(r) - 1 for r in rows], device=ids.device), return_inverse=True)
        output = self._output(ids, cache, kept, keep_cache)
        log_probs = log_softmax(output.logits[torch.arange(len(rows), device=ids.device), inverse])
        return log_probs, getattr(output, "past_key_values", None)

    def _padded(self, rows: list[list[int]]):
        """Ids [rows, width] of rows padded on the right by their own last token."""
        import torch

        width = max(map(len, rows))
        return torch.tensor([row + [row[-1]] * (width - len(row)) for row in rows], device=self.model.device)

    def _output(self, ids, cache, positions=None, keep_cache: bool = False, **wanted: bool):
        """What one pass over ids [rows, width] gives, logits at `positions` only, without positions none at all."""
        options = {"use_cache": keep_cache or cache is not None} | wanted
        if cache is not None:
            # A forward pass grows the cache that it is given: a view of one row for all, which only growing copies.
            options["past_key_values"] = map_cache(cache, lambda x: x.expand(len(ids), -1, -1, -1))
        if positions is None:
            return self._causal.base_model(input_ids=ids, **options)
        if self._head_selects:
            return self.model(input_ids=ids, logits_to_keep=positions, **options)
        output = self.model(input_ids=ids, **options)
        output.logits = output.logits[:, positions]
        return output

    @property
    def _causal(self):
        """The network of transformers itself, which an adapter wraps."""
        return self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model

    @cached_property
    def _head_selects(self) -> bool:
        """Whether the model can compute its vocabulary head for chosen positions only."""
        return "logits_to_keep" in self.parameters

    @cached_property
    def parameters(self) -> set[str]:
        """What the model's forward pass takes."""
        return set(inspect.signature(self._causal.forward).parameters)

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
        logits = self._output(ids.to(device), past, positions.to(device)).logits
        chosen = torch.tensor(answer[1:], device=device).expand(len(tails), -1)[..., None]
        return log_softmax(logits).gather(-1, chosen).sum(dim=(1, 2))


# Loading


def load_llama(
    model: str = "default",
    adapter: str | None = None,
    device: str = "auto",
    dtype: str = "auto",
    load_in_4bit: bool = False,
    load_in_8bit: bool = False,
    task: dict | None = None,
    check: Callable[[Llama], None] = lambda reader: None,
    device_map: str | None = None,
) -> Llama:
    """Load `default`, `llama`, a Hub id or a folder, with its tokenizer and optionally a LoRA adapter.

    `adapter` is a folder, None, or "auto": the shipped fine-tuned folder, if it was trained from these weights for the
    task with these settings (`Task.settings()`). `check` sees the tokenizer, as `load_reader` gives it, before the
    weights are read. `device_map` "auto" spreads the layers over all GPUs, then the memory. Raises ValueError or
    OSError in one line that says what to do.
    """
    device, device_map = _placement(device, device_map)
    precision = "4bit" if load_in_4bit else "8bit" if load_in_8bit else choose_dtype(dtype, device)
    quantization = {"quantization_config": _quantization(precision, device)} if load_in_4bit or load_in_8bit else {}
    if adapter not in (None, "none", "auto"):
        check_adapter(Path(adapter))
    name, path, weights = locate(model)
    adapter_path = choose_adapter(adapter, weights, task)

    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    reader = _reader(name, path)
    check(reader)
    with loading(f"the model in {path}"):
        network, info = AutoModelForCausalLM.from_pretrained(
            path,
            dtype=torch.bfloat16 if quantization else getattr(torch, precision),
            use_safetensors=True,
            device_map=device_map,
            output_loading_info=True,
            local_files_only=True,
            trust_remote_code=False,
            **quantization,
        )
        if absent := sorted(map(str, info["missing_keys"])):  # transformers would make them up at random
            raise ValueError(f"the weights lack {absent[0]}" + (f" and {len(absent) - 1} more" if absent[1:] else ""))
        _check_causal(network)
        known, read = network.get_input_embeddings().weight.shape[0], len(reader.tokenizer)
        if read > known:
            raise ValueError(
                f"its tokenizer has {read:,} tokens, its weights know {known:,}: they do not belong together"
            )
    identity = {"weights": weights, "precision": precision}
    if adapter_path:
        check_base(adapter_path, weights)
        network = with_adapter(network, adapter_path)
        identity["adapter"] = folder_hash(adapter_path)
    return replace(reader, model=network.eval().requires_grad_(False), identity=identity, adapter=adapter_path)


def _placement(device: str, device_map: str | None) -> tuple[str, object]:
    """(device, what transformers calls a device map): the layers all on one device, or spread over all."""
    if device_map and device != "auto":
        raise ValueError(f"--device-map {device_map} spreads a model over all devices, --device {device} names one")
    device = choose_device(device)
    return device, device_map or (None if device == "cpu" else {"": device})


def load_reader(model: str) -> Llama:
    """The tokenizer alone of what `--model` names, as a Llama without weights: it turns prompts into ids."""
    name, path, _ = locate(model)
    return _reader(name, path)


def _reader(name: str, path: Path) -> Llama:
    from transformers import AutoTokenizer

    with loading(f"the tokenizer in {path}"):
        tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    return Llama(None, tokenizer, name, path, {})


@lru_cache(maxsize=1)
def default_llama(task_settings: str) -> Llama:
    """The embedded model with the adapter that fits a task's settings (as JSON), loaded once."""
    return load_llama(adapter="auto", task=json.loads(task_settings))


def _check_causal(network: object) -> None:
    """Refuse a model whose tokens see what follows them: an encoder's last token predicts nothing."""
    import torch

    with torch.inference_mode():
        logits = network.eval()(input_ids=torch.tensor([[0, 1], [0, 2]], device=network.device)).logits[:, 0].float()
    if not torch.allclose(logits[0], logits[1], rtol=0.05, atol=0.05):
        raise ValueError("it is not a causal language model (a decoder): its tokens see what follows them")


def _quantization(precision: str, device: str) -> object:
    import torch
    from transformers import BitsAndBytesConfig

    if not device.startswith(("cuda", "cpu")):
        raise ValueError(f"--load-in-{precision} needs an NVIDIA GPU (CUDA) or a processor; this run is on {device}")
    try:
        import bitsandbytes  # noqa: F401
    except ImportError:
        raise ValueError(f"--load-in-{precision} needs bitsandbytes: pip install bitsandbytes==0.50.2") from None
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)  # it warns of every input it casts
    if precision == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags that choose a model; the same in every script."""
    group = parser.add_argument_group("the model")
    add = group.add_argument
    add("--model", default="default", help="default (embedded), llama (Llama 3.1 8B Instruct), a Hub id or a folder")
    add("--adapter", default="auto", help="a LoRA folder, none, or auto: ours if it fits model and task (default)")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1 or mps (default: auto)")
    dtypes = ["auto", "float32", "bfloat16", "float16"]
    add("--dtype", default="auto", choices=dtypes, help="auto: bfloat16 on GPUs that have it, float32 on CPU (default)")
    add("--device-map", choices=["auto"], help="auto: spread a model that one GPU cannot hold over all, and the memory")
    bits = group.add_mutually_exclusive_group()
    bits.add_argument("--load-in-4bit", action="store_true", help="4-bit weights (bitsandbytes)")
    bits.add_argument("--load-in-8bit", action="store_true", help="8-bit weights (bitsandbytes)")


def model_arguments(args: argparse.Namespace) -> dict[str, object]:
    """What the flags of `add_arguments` say, as keyword arguments of `load_llama`."""
    names = ("model", "adapter", "device", "dtype", "load_in_4bit", "load_in_8bit", "device_map")
    return {name: getattr(args, name) for name in names}
