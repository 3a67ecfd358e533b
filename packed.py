"""Rows packed into one sequence, without padding, behind the keys and values of the beginning that they share.

    tree = answer_tree([[7], [8, 9], [8, 10]])           # what answers begin with alike is one node
    packed = pack_rows(tails, tree, cache, device)       # tails are what rows have of their own
    with packed_attention(network):                      # transformers' models call `attend` in every layer
        logits = network(**packed.inputs).logits[0]      # [rows * nodes, vocabulary]
    answers_of(logits, tree)                             # [rows, answers]

A token of a row sees the shared beginning and the tokens of its own row up to itself. Behind each row stands a tree of
answers, whose nodes see the beginning, the row and their own ancestors: all answers of a text in one pass. Each token
has the position that it would have in its row alone, so the numbers are those of plain passes, row by row.

Every family takes part whose layers call transformers' attention interface and keep nothing but keys and values.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

ATTENTION = "packed_rows"  # the name of `attend` among transformers' attention functions
NOT_KNOWN = ("softcap", "s_aux", "position_bias")  # what some families' layers ask of attention, and `attend` has not


class CannotPackError(Exception):
    """A model's layers ask for an attention that packed rows do not have."""


# Answers as a tree


@dataclass(frozen=True)
class AnswerTree:
    """The beginnings of answers as nodes; node 0 is the end of a row, where every answer begins.

    A step is a token of an answer and the node after which it comes. An answer's last token needs no node of its own.
    """

    tokens: list[int]  # of the nodes from 1 on
    depths: list[int]  # of the same, counted from 1
    sees: np.ndarray  # bool [nodes - 1, nodes - 1]: itself and its ancestors
    steps: list[tuple[int, int, int]]  # (number of the answer, node, token)
    n_answers: int

    @property
    def nodes(self) -> int:
        return 1 + len(self.tokens)


def answer_tree(answers: Sequence[Sequence[int]]) -> AnswerTree:
    """The tree of answers, token sequences of any length; answers of one token alone have no node but 0."""
    node_of: dict[tuple[int, ...], int] = {(): 0}
    tokens, parents, depths, steps = [], [], [], []
    for number, answer in enumerate(answers):
        for length, token in enumerate(answer):
            beginning = tuple(answer[:length])
            if beginning not in node_of:
                node_of[beginning] = len(node_of)
                tokens.append(beginning[-1])
                parents.append(node_of[beginning[:-1]])
                depths.append(length)
            steps.append((number, node_of[beginning], token))
    sees = np.eye(len(tokens), dtype=bool)
    for node, parent in enumerate(parents, start=1):  # a parent comes before its children
        if parent:
            sees[node - 1] |= sees[parent - 1]
    return AnswerTree(tokens, depths, sees, steps, len(answers))


def answers_of(logits, tree: AnswerTree):
    """Log-probability of each answer, float32 [rows, answers], from raw logits [rows * nodes, vocabulary].

    The normaliser is logsumexp in float32: over 49,152 tokens torch's own log_softmax on a CPU is wrong by 1e-5.
    """
    import torch

    logits = logits.float().view(-1, tree.nodes, logits.shape[-1])
    numbers, nodes, tokens = torch.tensor(tree.steps, device=logits.device).T
    of_steps = logits[:, nodes, tokens] - logits.logsumexp(dim=-1)[:, nodes]
    return logits.new_zeros(len(logits), tree.n_answers).index_add(1, numbers, of_steps)


# Rows in one sequence


@dataclass(frozen=True)
class PackedRows:
    """Rows one after the other, each with its tree of answers behind it, and how attention finds them again.

    A slot [row, place] is where a token stands when rows are laid side by side; `width` is of the longest row and tree.
    """

    ids: object  # [1, tokens]
    positions: object  # [1, tokens], as of a whole row alone
    grid: object  # [rows, width]: the token of each slot, a row's last one also behind its end
    slots: object  # [tokens]: the slot of each token, counted row by row
    nodes: object  # [rows * nodes]: the tokens at which the vocabulary head is computed
    seen: object  # bool [rows or 1, width, width]: which slots of its row a slot sees
    slot_positions: object  # [rows or 1, width]
    shared: int  # tokens of the beginning
    cache: object | None  # its keys and values
    masks: dict = field(default_factory=dict)  # by what they depend on; the same for many layers

    @property
    def inputs(self) -> dict[str, object]:
        """What a model's forward pass is given."""
        return {"input_ids": self.ids, "position_ids": self.positions, "use_cache": False, "packed": self}

    def side_by_side(self, states):
        """States of tokens [1, tokens, ...] as [rows, width, ...]."""
        return states[0][self.grid]

    def beginning(self, layer: int, window: int | None) -> tuple | None:
        """Keys and values of the shared beginning in a layer, [1, heads, tokens, size]; None if nothing is shared."""
        if self.cache is None:
            return None
        kept = self.cache.layers[layer] if layer < len(self.cache.layers) else None
        if kept is None or getattr(kept, "sliding_window", None) != window:
            raise CannotPackError("its layers and its cache do not agree on what a token sees")
        return kept.keys, kept.values

    def mask(self, before: int, window: int | None, groups: int):
        """Which of the last `before` tokens of the beginning, and then slots, each slot sees, once for each group.

        Bool [rows or 1, 1, groups * width, before + width].
        """
        import torch

        key = before, window, groups
        if key not in self.masks:
            rows, width = self.slot_positions.shape
            early = torch.ones(rows, width, before, dtype=torch.bool, device=self.ids.device)
            sees = torch.cat([early, self.seen], dim=2)
            if window is not None:
                early = torch.arange(self.shared - before, self.shared, device=self.ids.device).expand(rows, -1)
                positions = torch.cat([early, self.slot_positions], dim=1)
                sees = sees & (self.slot_positions[:, :, None] - positions[:, None, :] < window)
            self.masks[key] = sees.repeat(1, groups, 1)[:, None]
        return self.masks[key]


def pack_rows(tails: Sequence[Sequence[int]], tree: AnswerTree, cache: object | None, device: object) -> PackedRows:
    """Pack what rows have of their own after the beginning in `cache`; at least one token each."""
    import torch

    shared, extra = cache.get_seq_length() if cache is not None else 0, len(tree.tokens)
    own = np.array([len(tail) for tail in tails])  # tokens of each row, without its tree
    sizes = own + extra
    starts, width = sizes.cumsum() - sizes, int(sizes.max())
    places = np.arange(width)
    positions = np.tile(shared + places, (len(tails) if extra else 1, 1))
    seen = np.tile(np.tri(width, dtype=bool), (len(positions), 1, 1))
    for row, end in enumerate(own if extra else []):
        positions[row, end : end + extra] = shared + end - 1 + np.array(tree.depths)
        seen[row, end : end + extra, end : end + extra] = tree.sees
    slots = np.flatnonzero(places < sizes[:, None])
    arrays = {
        "ids": np.array([token for tail in tails for token in (*tail, *tree.tokens)])[None],
        "positions": np.broadcast_to(positions, (len(tails), width)).reshape(1, -1)[:, slots],
        "grid": starts[:, None] + np.minimum(places, sizes[:, None] - 1),
        "slots": slots,
        "nodes": ((starts + own - 1)[:, None] + np.arange(tree.nodes)).flatten(),
        "seen": seen,
        "slot_positions": positions,
    }
    return PackedRows(
        **{name: torch.from_numpy(a).to(device) for name, a in arrays.items()}, shared=shared, cache=cache
    )


# Attention


def attend(module, query, key, value, attention_mask, scaling=None, sliding_window=None, *, packed, **told) -> tuple:
    """Attention of packed rows [1, heads, tokens, size] to the shared beginning and to their own rows.

    As transformers' attention interface has it. Query heads that share keys stand side by side as more queries, so no
    key is repeated for them.
    """
    import torch

    asked = [name for name in NOT_KNOWN if told.get(name) is not None]
    if asked or attention_mask is not None:
        raise CannotPackError(f"its layers ask for {asked[0] if asked else 'a mask of their own'}")
    queries, keys, values = (
        packed.side_by_side(states.transpose(1, 2)).transpose(1, 2) for states in (query, key, value)
    )
    (rows, heads, width, _), groups = queries.shape, query.shape[1] // key.shape[1]
    before = 0
    if beginning := packed.beginning(module.layer_idx, sliding_window):
        before = beginning[0].shape[2]
        keys, values = _behind(beginning[0], keys), _behind(beginning[1], values)
    found = torch.nn.functional.scaled_dot_product_attention(
        queries.reshape(rows, heads // groups, groups * width, -1),
        keys,
        values,
        attn_mask=packed.mask(before, sliding_window, groups),
        scale=scaling,
    )
    found = found.reshape(rows, heads, width, -1).transpose(1, 2)
    return found.reshape(rows * width, heads, -1)[packed.slots][None], None


def _behind(beginning, own):
    """Keys or values of rows [rows, heads, width, size] behind those that they share [1, heads, tokens, size]."""
    import torch

    if beginning.shape[1::2] != own.shape[1::2]:
        raise CannotPackError("its cache holds something other than keys and values")
    return torch.cat([beginning.to(own.dtype).expand(len(own), -1, -1, -1), own], dim=2)


@contextlib.contextmanager
def packed_attention(network: object) -> Iterator[None]:
    """A transformers model whose layers call `attend`; CannotPackError if they do not go through the interface."""
    from transformers import AttentionInterface

    AttentionInterface.register(ATTENTION, attend)
    before = network.config._attn_implementation
    network.set_attn_implementation(ATTENTION)
    try:
        if network.config._attn_implementation != ATTENTION:
            raise CannotPackError("its layers have an attention of their own")
        yield
    finally:
        network.set_attn_implementation(before)
