"""Small random models of many families, tables of rows for them, and the truth: one plain forward pass a row."""

from pathlib import Path

import numpy as np

from llama import Llama

VOCABULARY = 100
SIZES = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
}
LAYERS = SIZES | {"num_local_experts": 2, "block_size": 8, "layer_types": ["linear_attention", "full_attention"]}
LONG_ROTARY = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [4.0] * 4}
KINDS = {  # name -> (transformers' model type, its sizes, whether its cache is only keys and values)
    "llama": ("llama", SIZES, True),
    "absolute positions": ("gpt2", {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 512}, True),
    "position biases": ("bloom", {"hidden_size": 32, "n_layer": 2, "n_head": 4}, True),
    "sliding window": ("mistral", SIZES | {"sliding_window": 6}, True),
    "sliding and full windows": ("gemma3_text", SIZES | {"sliding_window": 6}, True),
    "state space": ("mamba", {"hidden_size": 32, "state_size": 8, "num_hidden_layers": 2}, False),
    "convolution and attention": ("lfm2", SIZES | {"layer_types": ["conv", "full_attention"]}, False),
    "linear and full attention": ("minimax", LAYERS, False),
    "a head that does not select": ("llama", SIZES, True),
}
PACKED = {"llama", "absolute positions", "sliding window", "sliding and full windows"}  # that can run packed


def random_model(name: str, kind: str, sizes: dict) -> Llama:
    """A small model with weights large enough that a wrong position or a wrong neighbour changes every probability."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM

    class WithoutSelection(LlamaForCausalLM):
        def forward(self, input_ids, past_key_values=None, use_cache=None):
            return super().forward(input_ids, past_key_values=past_key_values, use_cache=use_cache)

    config = AutoConfig.for_model(kind, vocab_size=VOCABULARY, bos_token_id=1, eos_token_id=2, pad_token_id=2, **sizes)
    torch.manual_seed(0)
    selects = name != "a head that does not select"
    model = (AutoModelForCausalLM.from_config(config) if selects else WithoutSelection(config)).eval()
    for parameter in model.requires_grad_(False).parameters():
        if parameter.dim() > 1:
            parameter.normal_(0, 0.3)
    return Llama(model, None, name, Path("nowhere"), {"weights": name, "precision": "float32"})


def numbers(seed: int, count: int) -> list[int]:
    return np.random.default_rng(seed).integers(5, VOCABULARY, count).tolist()


BEGINNING = numbers(0, 12)  # longer than the sliding windows
TABLES = {
    "a shared beginning": [BEGINNING + numbers(seed, count) for seed, count in enumerate((1, 3, 9, 4, 4, 2))],
    "no shared beginning": [[20 + seed, *numbers(seed, count)] for seed, count in enumerate((5, 2, 9, 1))],
    "rows that are equal": [BEGINNING] * 3,
    "one row": [BEGINNING],
    "rows that begin another": [BEGINNING[:9], BEGINNING, BEGINNING[:9], BEGINNING + numbers(1, 5), BEGINNING[:8]],
    "a row of one token": [BEGINNING, BEGINNING[:1]],
}
ONE_TOKEN = [[7], [8], [30]]
ANSWERS = [[7], [8, 9], [7, 10, 11]]


def one_by_one(model, rows, answers) -> np.ndarray:
    """Log-probability of each answer after each row: a whole forward pass for each of its tokens; [rows, answers]."""
    import torch

    result = np.zeros((len(rows), len(answers)))
    for (r, a), _ in np.ndenumerate(result):
        ids = list(rows[r])
        for token in answers[a]:
            logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1]
            result[r, a] += logits.double().log_softmax(-1)[token].item()
            ids.append(token)
    return result


def assert_same(log_probs: np.ndarray, truth: np.ndarray) -> None:
    """Probabilities within 1e-5; their logarithms too (within float32), which small probabilities would hide."""
    np.testing.assert_allclose(np.exp(log_probs), np.exp(truth), rtol=0, atol=1e-5)
    np.testing.assert_allclose(log_probs, truth, rtol=0, atol=1e-4)
