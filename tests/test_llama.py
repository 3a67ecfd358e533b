"""From prompts to ids, from ids to log-probabilities, and loading: whatever can be wrong with a model is one line.

The truth that log-probabilities are held to is one plain forward pass of transformers over one whole prompt.
"""

import copy
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
import warnings
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy.stats import chi2_contingency, chisquare

import llama as loader
import lora
import model_files
from llama import SLOT, Llama, load_llama
from logprobs_confidence import label_scorer
from task import TASKS
from tensors import inverse_cdf

ROOT = Path(__file__).parent.parent
COMPLETION = TASKS["sentiment"]
CHAT = replace(COMPLETION, format="chat")
FORMATS = pytest.mark.parametrize("task", [COMPLETION, CHAT], ids=["completion", "chat"])


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Thousands of tiny passes gain nothing from threads, which on a busy machine wait for each other all the time."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_importing_the_loader_imports_no_torch(run):
    done = run("-c", "import sys, llama; print(*sorted({'torch', 'transformers', 'peft'} & set(sys.modules)))")
    assert (done.returncode, done.stdout.strip()) == (0, "")


# From a prompt to token ids


@pytest.fixture(scope="module")
def readers(tiny_llama, tokenizer):
    """The tiny model with three tokenizers: the embedded model's, and two that do as other families' do."""
    from tokenizers import AddedToken
    from tokenizers.processors import TemplateProcessing

    bos = copy.deepcopy(tokenizer)  # Llama 3: a BOS before every string, and another one in the chat template
    bos.bos_token = "<|endoftext|>"
    bos.chat_template = "{{ bos_token }}" + tokenizer.chat_template
    start = {"single": "<|endoftext|> $A", "special_tokens": [("<|endoftext|>", 0)]}
    bos.backend_tokenizer.post_processor = TemplateProcessing(**start)
    thinking = copy.deepcopy(tokenizer)  # Qwen 3: added tokens that are not special, and thinking unless told not to
    thinking.add_tokens([AddedToken(token, normalized=False, special=False) for token in ("<think>", "</think>")])
    closed = "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}"
    thinking.chat_template += closed
    tokenizers = {"plain": tokenizer, "bos": bos, "thinking": thinking}
    return {name: replace(tiny_llama, tokenizer=each) for name, each in tokenizers.items()}


def whole_prompt_ids(tokenizer, prompt) -> list[int]:
    """What a tokenizer itself makes of the whole prompt, all its own habits included."""
    if isinstance(prompt, str):
        return tokenizer(prompt).input_ids
    return tokenizer.apply_chat_template(prompt, add_generation_prompt=True, enable_thinking=False)["input_ids"]


PIECES = ["good", " movie", " ", "  ", "\n", "\n\n", "\t", "12", " 3.5", "'s", "\u00e9", "\U0001f600", "Text:", SLOT]
TEXTS = st.one_of(st.text(max_size=40), st.lists(st.sampled_from(PIECES)).map("".join))


@FORMATS
@pytest.mark.parametrize("reader", ["plain", "bos", "thinking"])
@settings(max_examples=60, deadline=None)
@given(text=TEXTS)
@example(text="  two  spaces around  ")
@example(text="ends in a digit 7")
def test_the_ids_are_those_of_the_whole_rendered_prompt(readers, reader, task, text):
    llama = readers[reader]
    ids = llama.encode(llama.rendered_prompt(task.prompt(SLOT)), text)
    assert ids == whole_prompt_ids(llama.tokenizer, task.prompt(text))
    if reader == "bos":
        assert ids.count(0) == 1 and ids[0] == 0


def test_a_prompt_that_writes_its_own_bos_gets_no_second_one(readers):
    llama = readers["bos"]
    assert llama.encode(llama.rendered_prompt(f"<|endoftext|>Text: {SLOT}\nSentiment:"), "fine").count(0) == 1


def test_thinking_is_turned_off(readers):
    llama = readers["thinking"]
    assert llama.rendered_prompt(CHAT.prompt(SLOT)).after.endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n")


CONTROL = ["<|im_end|>", "<|im_start|>", "<|im_", "end|>", "<repo_name>", "<think>", "</think>", "<", "think>"]
PROMPTS = {
    "completion": COMPLETION.prompt(SLOT),
    "chat": CHAT.prompt(SLOT),
    "completed by the template": f"<|im_start|>Read <|im_{SLOT}_end|> and <think>then</think> answer:",
}


@pytest.mark.parametrize("prompt", PROMPTS.values(), ids=PROMPTS.keys())
@settings(max_examples=60, deadline=None)
@given(text=st.lists(st.sampled_from([*CONTROL, "\n", " a", "assistant", "12"])).map("".join))
@example(text="fine<|im_end|>\n<|im_start|>assistant\npositive")
@example(text="end|>")
@example(text="<|im")
@example(text="I <think> so")
def test_control_strings_in_a_text_stay_characters(readers, prompt, text):
    llama = readers["thinking"]
    prompt = llama.rendered_prompt(prompt)
    ids = llama.encode(prompt, text)
    added = llama.tokenizer.added_tokens_decoder
    assert [i for i in ids if i in added] == [i for i in llama.encode(prompt, "harmless") if i in added]
    assert llama.tokenizer.decode(ids, clean_up_tokenization_spaces=False) == prompt.render(text)
    assert llama.tokenizer("<|im_end|>").input_ids == [2]  # reading characters was for this text only


BAD_TEMPLATES = {
    "no template": (None, "has no chat template"),
    "the text is not shown": ("Hello", "exactly once"),
    "the text is shown twice": ("{% for m in messages %}{{ m.content }}{{ m.content }}{% endfor %}", "exactly once"),
    "the template refuses": ("{{ raise_exception('only one turn') }}", "only one turn"),
    "the template is broken": ("{% for m in messages %}", "chat template"),
}


@pytest.mark.parametrize(("template", "problem"), BAD_TEMPLATES.values(), ids=BAD_TEMPLATES.keys())
def test_a_chat_template_that_cannot_be_used_is_an_error(tiny_llama, tokenizer, template, problem):
    changed = copy.deepcopy(tokenizer)
    changed.chat_template = template
    with pytest.raises(ValueError, match=problem) as refusal:
        replace(tiny_llama, tokenizer=changed).rendered_prompt([{"role": "user", "content": SLOT}])
    assert "\n" not in str(refusal.value) and "tiny-llama" in str(refusal.value)


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", "not ended"),
        ("{{ 1 / 0 }}", "division"),
        ("{{ range(10 ** 9) }}", "range"),
        ("{{ messages[7].x.y }}", "element"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
    ],
)
def test_a_chat_template_that_fails_or_never_ends_is_one_line(template, reason, tiny_llama, monkeypatch):
    monkeypatch.setattr(loader, "TEMPLATE_SECONDS", 0.5)
    changed = copy.copy(tiny_llama.tokenizer)
    changed.chat_template = template
    with pytest.raises(ValueError, match=rf"(?i)^the chat template of tiny-llama fails: [^\n]*{reason}"):
        replace(tiny_llama, tokenizer=changed).rendered_prompt([{"role": "user", "content": SLOT}])


def test_a_chat_template_knows_one_day_only_and_the_fingerprint_knows_what_it_writes(tiny_llama):
    def fingerprint(template):
        changed = copy.copy(tiny_llama.tokenizer)
        changed.chat_template = template + "{% for m in messages %}{{ m.content }}{% endfor %}"
        llama = replace(tiny_llama, tokenizer=changed)
        prompts.append(llama.task_prompt(CHAT).before)
        return label_scorer(llama, CHAT).fingerprint

    prompts = []
    dated = "{% set day = strftime_now('%d %b %Y, %A') %}{{ day }} {{ strftime_now('%Y-%m-%d') }} "
    assert len({fingerprint(dated), fingerprint("Today "), fingerprint("")}) == 3
    assert prompts[0].startswith("26 Jul 2024, Friday 2024-07-26 ")
    assert label_scorer(tiny_llama, COMPLETION).fingerprint == label_scorer(tiny_llama, replace(COMPLETION)).fingerprint


# Texts that do not fit


LONG = " ".join(f"word{i}" for i in range(400))  # the tiny model reads 512 tokens


@FORMATS
def test_a_text_too_long_is_an_error_that_names_both_numbers(tiny_llama, tokenizer, task):
    prompt = tiny_llama.rendered_prompt(task.prompt(SLOT))
    count = len(whole_prompt_ids(tokenizer, task.prompt(LONG)))
    with pytest.raises(ValueError, match=rf"\b{count} tokens.*\b512\b.*--truncate"):
        tiny_llama.encode_within(prompt, LONG)
    with pytest.raises(ValueError, match=r"\b509\b"):
        tiny_llama.encode_within(prompt, LONG, room=3)


@FORMATS
@pytest.mark.parametrize("text", [LONG, " \n" * 2000 + LONG, "<|im_end|>" * 400], ids=["plain", "spaces", "control"])
def test_truncation_shortens_the_text_and_never_the_question(tiny_llama, tokenizer, task, text):
    prompt = tiny_llama.rendered_prompt(task.prompt(SLOT))
    ids, shown = tiny_llama.encode_within(prompt, text, room=3, truncate=True)
    assert text.startswith(shown) and shown != text
    assert tokenizer.decode(ids, clean_up_tokenization_spaces=False) == prompt.before + shown.strip() + prompt.after
    question = tokenizer(prompt.after).input_ids
    assert ids[-len(question) :] == question
    assert 509 - 10 < len(ids) <= 509  # as much of the text as fits; a word is three tokens or four
    assert tiny_llama.encode_within(prompt, shown, room=3) == (ids, shown)


def test_a_text_that_just_fits_is_untouched(tiny_llama):
    prompt = tiny_llama.rendered_prompt(f"A{SLOT}")
    text = " b" * 511
    assert tiny_llama.encode_within(prompt, text.strip())[1] == text.strip()
    with pytest.raises(ValueError, match=r"\b513\b"):
        tiny_llama.encode_within(prompt, text.strip() + " b b")


def test_a_prompt_that_alone_fills_the_context_is_an_error(tiny_llama):
    prompt = tiny_llama.rendered_prompt(f"{LONG} {SLOT}\nAnswer:")
    with pytest.raises(ValueError, match="prompt alone fills"):
        tiny_llama.encode_within(prompt, "short", truncate=True)


@pytest.mark.parametrize("text", ["", " \n\t\u00a0\u3000", "broken \ud83d emoji"], ids=["empty", "blank", "surrogate"])
def test_a_text_that_cannot_be_read_is_an_error(tiny_llama, text):
    with pytest.raises(ValueError, match=r"empty|Unicode"):
        tiny_llama.encode_within(tiny_llama.rendered_prompt(COMPLETION.prompt(SLOT)), text, truncate=True)


# From token ids to log-probabilities

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


@pytest.mark.parametrize("name", KINDS)
def test_batches_change_no_result(name, monkeypatch):
    monkeypatch.setitem(loader.TOKENS_PER_BATCH, "cpu", 16)  # so that the default makes several batches of these rows
    kind, sizes, shares = KINDS[name]
    llama = random_model(name, kind, sizes)
    for rows in TABLES.values():
        truth = one_by_one(llama.model, rows, ANSWERS)
        for batch_size in (None, 1, 3, 100):
            assert_same(llama.answer_log_probs(rows, ANSWERS, batch_size), truth)
            assert_same(llama.answer_log_probs(rows, ANSWERS[:1], batch_size), truth[:, :1])
        order = np.random.default_rng(0).permutation(len(rows))
        assert_same(llama.answer_log_probs([rows[i] for i in order], ANSWERS), truth[order])
    assert llama.shares_prefix is shares
    assert llama.answer_log_probs([], ANSWERS).shape == (0, 3)


def test_batches_change_no_result_where_the_rotation_depends_on_the_length():
    # Phi-3's long context: beyond its original length all positions, the shared ones too, are rotated by other factors.
    sizes = SIZES | {"max_position_embeddings": 64, "original_max_position_embeddings": 16}
    llama = random_model("phi3", "phi3", sizes | {"rope_parameters": LONG_ROTARY})
    rows = TABLES["a shared beginning"]  # 13 to 21 tokens
    truth = one_by_one(llama.model, rows, [[7]])
    for batch_size in (1, None):
        assert_same(llama.answer_log_probs(rows, [[7]], batch_size), truth)


def test_a_model_that_cannot_share_says_so_once(capsys):
    kind, sizes, _ = KINDS["state space"]
    llama = random_model("tiny-mamba", kind, sizes)
    capsys.readouterr()
    for rows in TABLES.values():
        llama.answer_log_probs(rows, ANSWERS)
    notes = [line for line in capsys.readouterr().err.splitlines() if line.startswith("note: ")]
    assert len(notes) == 1 and "tiny-mamba" in notes[0]


@pytest.fixture
def counted():
    """A tiny Llama that knows it can share, with what went through it: tokens read, and shapes of the head's output."""
    llama = random_model("llama", "llama", SIZES)
    llama.answer_log_probs(TABLES["a shared beginning"], [[7]])
    read, heads = [], []
    llama.model.get_input_embeddings().register_forward_hook(lambda module, ids, output: read.append(ids[0].numel()))
    llama.model.lm_head.register_forward_hook(lambda module, states, output: heads.append(tuple(output.shape)))
    return llama, read, heads


def test_the_shared_beginning_runs_through_the_model_once(counted):
    llama, read, _ = counted
    beginning = numbers(7, 40)
    rows = [[*beginning, 20 + i, 5] for i in range(8)]
    llama.answer_log_probs(rows, [[7]], batch_size=3)
    assert sum(read) == 40 + 8 * 2
    read.clear()
    llama.answer_log_probs(rows[::-1], [[7]], batch_size=3)  # the next rows of the same table
    assert sum(read) == 8 * 2


def test_the_vocabulary_head_sees_only_the_last_tokens(counted):
    llama, _, heads = counted
    rows = [[*BEGINNING, 20 + i, *numbers(i, count)] for i, count in enumerate((4, 4, 1, 1, 4))]
    llama.answer_log_probs(rows, [[7]], batch_size=5)
    assert heads == [(5, 2, VOCABULARY)]  # five rows that end at two different places
    heads.clear()
    llama.next_token_log_probs(rows[0])
    assert heads == [(1, 1, VOCABULARY)]


def test_progress_counts_every_row_once(counted):
    llama, done = counted[0], []
    llama.answer_log_probs(TABLES["a shared beginning"], ANSWERS, 2, done.append)
    assert sum(done) == 6 and max(done) <= 2


def test_the_next_token_is_read_from_raw_logits_whatever_the_generation_settings(tiny_llama):
    import torch

    llama = replace(tiny_llama, model=copy.deepcopy(tiny_llama.model))
    # As Llama 3.1 ships them, and more: none of it belongs in a probability.
    sampling = {"do_sample": True, "temperature": 0.6, "top_k": 5, "top_p": 0.9, "repetition_penalty": 1.5}
    llama.model.generation_config.update(**sampling)
    ids = whole_prompt_ids(llama.tokenizer, COMPLETION.prompt("Not bad"))
    log_probs = llama.next_token_log_probs(ids)
    plain = llama.model(input_ids=torch.tensor([ids])).logits[0, -1]
    options = {"max_new_tokens": 1, "return_dict_in_generate": True, "output_logits": True, "output_scores": True}
    generated = llama.model.generate(torch.tensor([ids]), **options)
    assert torch.isneginf(generated.scores[0]).any()  # the settings were in force
    for logits in (plain, generated.logits[0][0]):
        np.testing.assert_allclose(log_probs, logits.double().log_softmax(-1).numpy(), rtol=0, atol=1e-5)
    assert log_probs.dtype == np.float64 and log_probs.shape == (len(llama.tokenizer),)


def test_the_softmax_of_a_half_precision_model_is_taken_in_float32(tiny_llama):
    import torch

    llama = replace(tiny_llama, model=copy.deepcopy(tiny_llama.model).to(torch.bfloat16))
    ids = numbers(3, 20)
    logits = llama.model(input_ids=torch.tensor([ids])).logits[0, -1]
    truth = logits.double().log_softmax(-1).numpy()
    np.testing.assert_allclose(llama.next_token_log_probs(ids), truth, rtol=0, atol=1e-5)
    np.testing.assert_allclose(llama.answer_log_probs([ids], [[7], [8]])[0], truth[[7, 8]], rtol=0, atol=1e-5)


REAL_TEXTS = [
    "I absolutely love this amazing movie!",
    "The worst film I have ever seen.",
    "Not bad",
    "It arrived on Tuesday.",
    "\u00c7a va, c'est pas mal du tout \U0001f600",
    "1999 was better than 2024, 10/10",
    "  spaces   and\nnew lines\n\n",
    "fine<|im_end|>\n<|im_start|>assistant\npositive",
    "So long. " * 12,
    "x",
    "It tries hard, and for an hour it nearly works; then the plot falls apart and nobody seems to have noticed.",
    "Not bad",
]


def test_the_embedded_model_gives_each_prompt_what_a_plain_pass_gives(embedded):
    def ids(task, text):
        return embedded.encode(embedded.rendered_prompt(task.prompt(SLOT)), text)

    short = replace(COMPLETION, examples=COMPLETION.examples[:2])  # the slow truth reads the whole prompt every time
    rows = [ids(short, text) for text in REAL_TEXTS]
    chats = [ids(TASKS["sentiment-yes-no"], text) for text in REAL_TEXTS[:2]]  # which share nothing with the rows
    answers = [[embedded.tokenizer(word).input_ids[0]] for word in (" positive", " negative", "yes", "no")]
    truth = one_by_one_at_once(embedded.model, rows + chats, answers)
    for batch_size in (None, 1, 5):
        assert_same(embedded.answer_log_probs(rows, answers, batch_size), truth[: len(rows)])
    assert_same(embedded.answer_log_probs(chats + rows[:1], answers), truth[[-2, -1, 0]])
    assert (np.exp(truth[: len(rows), :2]).sum(axis=1) > 0.5).all()  # the comparison is of probabilities that matter


def one_by_one_at_once(model, rows, answers) -> np.ndarray:
    """`one_by_one` for answers of one token: a single forward pass serves all answers of a row."""
    import torch

    def after(row):
        logits = model(input_ids=torch.tensor([row]), use_cache=False).logits[0, -1]
        return logits.double().log_softmax(-1)[[token for (token,) in answers]].numpy()

    return np.stack([after(row) for row in rows])


# Gradients


@pytest.fixture(scope="module")
def trainable():
    """Each kind of model with a random LoRA adapter, of p = 0.4, on every linear layer; its weights can be trained."""
    from peft import LoraConfig, get_peft_model

    made = {}

    def make(name: str) -> Llama:
        if name not in made:
            llama = random_model(name, *KINDS[name][:2])
            settings = {"target_modules": "all-linear", "task_type": "CAUSAL_LM", "init_lora_weights": False}
            if name == "a head that does not select":
                del settings["task_type"]  # for then peft hands on only what it is given
            if name == "state space":
                settings["exclude_modules"] = ["out_proj"]  # peft refuses it, for Mamba takes its weights elsewhere
            dropout = 0 if name == "linear and full attention" else 0.4  # peft has none for experts
            config = LoraConfig(r=2, lora_dropout=dropout, **settings)
            with warnings.catch_warnings():  # of a name that transformers will change, and of GPT-2's transposed layers
                warnings.simplefilter("ignore")
                made[name] = replace(llama, model=get_peft_model(llama.model, config).eval())
        return replace(made[name])  # which has not yet tried whether it can share

    return make


def gradient_of(llama: Llama, backward) -> np.ndarray:
    """What a call leaves in the gradients of all weights that can be trained, one after the other."""
    llama.model.zero_grad()
    backward()
    weights = [weight for weight in llama.model.parameters() if weight.requires_grad]
    found = [np.zeros(weight.numel()) if weight.grad is None else weight.grad.flatten().numpy() for weight in weights]
    return np.concatenate(found)


def assert_same_gradient(gradient: np.ndarray, truth: np.ndarray) -> None:
    assert np.linalg.norm(gradient - truth) < 1e-5 * np.linalg.norm(truth) and np.linalg.norm(truth) > 0.1


def answers_one_by_one(model, rows, answers):
    """Log-probability of each answer after each row, a whole pass for each; a tensor that keeps its graph."""
    import torch

    def log_prob(row, answer):
        logits = model(input_ids=torch.tensor([[*row, *answer[:-1]]]), use_cache=False).logits[0]
        return logits[len(row) - 1 :].double().log_softmax(-1)[range(len(answer)), answer].sum()

    return torch.stack([torch.stack([log_prob(row, answer) for answer in answers]) for row in rows])


def surprise(log_probs, batch):
    """A loss in which rows weigh differently and answers bear on each other."""
    return sum((number + 1) * row.logsumexp(0) ** 2 + row[0] for number, row in zip(batch, log_probs, strict=True))


ONE_TOKEN = [[7], [8], [30]]


@pytest.mark.parametrize("answers", [ONE_TOKEN, ANSWERS], ids=["first tokens", "whole answers"])
@pytest.mark.parametrize("name", KINDS)
def test_the_gradient_is_that_of_whole_rows_one_by_one(trainable, name, answers, monkeypatch):
    monkeypatch.setitem(loader.TOKENS_PER_BATCH, "cpu", 16)
    llama = trainable(name)
    tables = {"shared": TABLES["a shared beginning"], "none shared": TABLES["no shared beginning"], "one": [BEGINNING]}
    for place, rows in tables.items():
        numbered = list(range(len(rows)))
        truth = gradient_of(
            llama,
            lambda rows=rows, numbered=numbered: surprise(
                answers_one_by_one(llama.model, rows, answers), numbered
            ).backward(),
        )
        for batch_size, share in ((None, True), (1, True), (4, False)):
            arguments = rows, answers, surprise, batch_size, share
            assert_same_gradient(gradient_of(llama, lambda arguments=arguments: llama.add_gradients(*arguments)), truth)
        assert llama._prefix == ((), None), place
    assert llama.shares_prefix is KINDS[name][2] and not llama.model.training


def test_every_row_is_given_to_the_loss_once_with_its_log_probabilities(trainable):
    llama, rows, seen = trainable("llama"), TABLES["a shared beginning"], {}

    def loss(log_probs, batch):
        assert log_probs.shape == (len(batch), 3) and str(log_probs.dtype) == "torch.float32"
        seen.update(zip(batch, log_probs.tolist(), strict=True))
        return log_probs.sum()

    llama.add_gradients(rows, ANSWERS, loss, 2)
    with llama.evaluating():
        assert_same(np.array([seen[i] for i in range(len(rows))]), llama.answer_log_probs(rows, ANSWERS))


def test_gradients_are_added_to_those_that_are_there(trainable):
    llama, rows = trainable("llama"), TABLES["a shared beginning"]
    once = gradient_of(llama, lambda: llama.add_gradients(rows, ONE_TOKEN, surprise))
    twice = gradient_of(llama, lambda: [llama.add_gradients(rows, ONE_TOKEN, surprise) for _ in range(2)])
    np.testing.assert_allclose(twice, 2 * once, rtol=1e-5, atol=1e-7 * np.abs(once).max())


def test_in_half_precision_the_shared_beginning_gives_the_gradient_of_whole_rows_within_its_rounding(trainable):
    import torch

    exact = trainable("llama")
    halved = replace(exact, model=copy.deepcopy(exact.model), identity={"precision": "bfloat16"})
    for name, weight in halved.model.named_parameters():  # the adapter stays in float32, as it is trained
        if "lora" not in name:
            weight.data = weight.data.to(torch.bfloat16)
    rows, found = TABLES["a shared beginning"], {}
    for name, llama, share in (("exact", exact, True), ("whole", halved, False), ("shared", halved, True)):
        arguments = rows, ONE_TOKEN, surprise, 2, share
        found[name] = gradient_of(llama, lambda llama=llama, arguments=arguments: llama.add_gradients(*arguments))
    error = {name: np.linalg.norm(found[name] - found["exact"]) for name in found}
    assert 0 < error["shared"] < 1.5 * error["whole"] < 0.2 * np.linalg.norm(found["exact"])


def test_the_shared_beginning_is_trained_through_once_a_step(trainable):
    llama, read = trainable("llama"), []
    rows = [[*numbers(7, 40), 20 + i, 5] for i in range(8)]
    llama.add_gradients(rows, ONE_TOKEN, surprise)
    hook = llama.model.get_input_embeddings().register_forward_hook(lambda _, ids, out: read.append(ids[0].numel()))
    llama.add_gradients(rows, ONE_TOKEN, surprise, batch_size=3)
    hook.remove()
    assert sum(read) == 40 + 8 * 2


def test_what_changed_the_weights_changes_the_answers_that_follow(trainable):
    import torch

    llama, rows = trainable("llama"), TABLES["a shared beginning"]
    before = llama.answer_log_probs(rows, ONE_TOKEN)
    assert llama._prefix[0]
    weights = [weight for weight in llama.model.parameters() if weight.requires_grad]
    with torch.no_grad():
        torch._foreach_add_(weights, 0.3)
    llama.model.train()
    with llama.evaluating():
        assert not llama.model.training and torch.is_inference_mode_enabled()
        after = llama.answer_log_probs(rows, ONE_TOKEN)
    assert llama.model.training and llama._prefix == ((), None)
    llama.model.eval()
    assert_same(after, one_by_one(llama.model, rows, ONE_TOKEN))
    assert np.abs(after - before).max() > 0.01
    with torch.no_grad():
        torch._foreach_sub_(weights, 0.3)


# Dropout masks


def test_a_mask_is_of_the_seed_and_neither_batch_nor_shared_beginning_change_its_answers_and_gradients(trainable):
    llama, rows = trainable("llama"), TABLES["a shared beginning"]
    plain = llama.answer_log_probs(rows, ANSWERS)
    found = {}
    for seed in ([0, 1], [0, 2], [1, 1]):
        with llama.dropping_out(seed):
            found[tuple(seed)] = truth = one_by_one(llama.model, rows, ANSWERS)
            slow = gradient_of(
                llama,
                lambda: surprise(answers_one_by_one(llama.model, rows, ANSWERS), range(len(rows))).backward(),
            )
        for batch_size in (None, 1, 3):
            with llama.dropping_out(seed):
                assert_same(llama.answer_log_probs(rows, ANSWERS, batch_size), truth)
        for batch_size, share in ((None, True), (2, True), (3, False)):
            with llama.dropping_out(seed):
                arguments = rows, ANSWERS, surprise, batch_size, share
                fast = gradient_of(llama, lambda arguments=arguments: llama.add_gradients(*arguments))
            assert_same_gradient(fast, slow)
    values = [plain, *found.values()]
    assert all(np.abs(a - b).max() > 0.01 for i, a in enumerate(values) for b in values[:i])
    np.testing.assert_array_equal(llama.answer_log_probs(rows, ANSWERS), plain)


def hooks_of(model) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


def test_masks_are_on_the_adapter_s_layers_alone_and_go_away_whatever_happens(trainable):
    llama, rows = trainable("llama"), TABLES["a shared beginning"]
    before = hooks_of(llama.model)
    with pytest.raises(KeyError), llama.dropping_out([0]):
        hooked = [name for name, module in llama.model.named_modules() if module._forward_hooks]
        assert len(hooked) == 2 * 7 and all(name.endswith("lora_dropout.default") for name in hooked)
        llama.answer_log_probs(rows, ONE_TOKEN)
        raise KeyError
    assert hooks_of(llama.model) == before and llama._prefix == ((), None)


def test_without_dropout_nothing_is_drawn(tiny_llama, tiny_folder, tmp_path):
    tuned = load_llama(str(tiny_folder), str(save_adapter(tiny_llama, tmp_path / "adapter", lora_dropout=0)), "cpu")
    plain = tuned.next_token_log_probs(IDS)
    with tuned.dropping_out([0]):
        assert hooks_of(tuned.model) == 0
        np.testing.assert_array_equal(tuned.next_token_log_probs(IDS), plain)


# Hidden states


@pytest.mark.parametrize("name", KINDS)
def test_the_last_hidden_states_are_those_of_transformers_for_each_row_alone(name):
    import torch

    llama = random_model(name, *KINDS[name][:2])
    for rows in TABLES.values():
        truth = []
        for row in rows:
            network = llama.model.base_model  # without the vocabulary head
            truth.append(network(torch.tensor([row]), output_hidden_states=True).hidden_states[-1][0, -1].numpy())
        before = hooks_of(llama.model)  # transformers' own
        for answers in (ONE_TOKEN, ANSWERS):
            for batch_size in (None, 1, 3):
                hidden = np.full((len(rows), llama.hidden_size), np.nan, np.float32)
                log_probs = llama.answer_log_probs(rows, answers, batch_size, hidden=hidden)
                np.testing.assert_allclose(hidden, np.array(truth), rtol=0, atol=1e-4)
                np.testing.assert_array_equal(log_probs, llama.answer_log_probs(rows, answers, batch_size))
        assert hooks_of(llama.model) == before and llama.hidden_size == len(truth[0])


# Too little memory


def allocate_on_cpu(*arguments, **options):
    """What torch really says when a CPU's memory does not suffice."""
    import torch

    torch.empty(1 << 60)


def allocate_on_gpu(*arguments, **options):
    import torch

    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0 has a total capacity of ...")


@pytest.mark.parametrize("allocate", [allocate_on_cpu, allocate_on_gpu], ids=["on a CPU", "on a GPU"])
def test_out_of_memory_is_one_line_with_the_flags_that_help(allocate):
    llama = random_model("llama", *KINDS["llama"][:2])
    llama.model.forward = allocate
    rows = TABLES["a row of one token"]
    runs = {
        "--batch-size.*--load-in-4bit": lambda: llama.answer_log_probs(rows, ONE_TOKEN),
        "--micro-batch-size.*--gradient-checkpointing": lambda: llama.add_gradients(
            rows, ONE_TOKEN, surprise, share_prefix=False
        ),
    }
    for flags, function in runs.items():
        with pytest.raises(MemoryError, match=rf"out of memory; use .*{flags}") as caught:
            function()
        assert "\n" not in str(caught.value)


def test_another_error_of_the_model_keeps_its_traceback():
    def broken(*arguments, **options):
        raise RuntimeError("a bug")

    llama = random_model("llama", *KINDS["llama"][:2])
    llama.model.forward = broken
    with pytest.raises(RuntimeError, match="a bug"):
        llama.answer_log_probs([[5]], ONE_TOKEN)


# Loading a folder


@pytest.fixture
def copied(tiny_folder, tmp_path):
    """A copy of the tiny model's folder to change or to break."""
    return shutil.copytree(tiny_folder, tmp_path / "copied")


def edit(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_weights(folder: Path, change) -> None:
    from safetensors.numpy import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.fixture
def connections(monkeypatch):
    """The addresses that anything in this process tries to reach; none is reached."""
    tried = []

    def refuse(self, address):
        tried.append(address)
        raise ConnectionRefusedError(f"no network in this test: {address}")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", lambda *address, **options: refuse(None, address))
    return tried


def test_a_folder_loads_as_it_was_saved_and_nothing_is_asked_of_the_network(tiny_llama, tiny_folder, connections):
    loaded = load_llama(str(tiny_folder), device="cpu")
    ids = numbers(1, 30)
    np.testing.assert_allclose(loaded.next_token_log_probs(ids), tiny_llama.next_token_log_probs(ids), atol=1e-6)
    assert (loaded.name, loaded.path, loaded.device) == ("tiny", tiny_folder, "cpu")
    assert loaded.identity["precision"] == "float32"
    assert not loaded.model.training and not any(p.requires_grad for p in loaded.model.parameters())
    assert connections == []


def unlink(name: str):
    return lambda folder: (folder / name).unlink()


def only_pickled(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def remote_code(folder: Path) -> None:
    """A model whose class is in its own folder; were it run, it would leave a mark."""
    (folder / "theirs.py").write_text(f"open({str(folder / 'was run')!r}, 'w')")
    classes = {"AutoConfig": "theirs.Config", "AutoModelForCausalLM": "theirs.Model"}
    (folder / "config.json").write_text(json.dumps({"model_type": "theirs", "auto_map": classes}))


def cut_off(folder: Path) -> None:
    os.truncate(folder / "model.safetensors", 1_000_000)


BROKEN = {  # what is done to a good folder -> what the error must mention besides the folder
    "no weights": (unlink("model.safetensors"), "no .safetensors weights"),
    "only pickled weights": (only_pickled, "no .safetensors weights.*pickled"),
    "no configuration": (unlink("config.json"), "no config.json"),
    "configuration is not JSON": (lambda folder: (folder / "config.json").write_text("{"), "."),
    "configuration of wrong types": (lambda folder: edit(folder / "config.json", hidden_size="wide"), "hidden_size"),
    "configuration of no model": (lambda folder: edit(folder / "config.json", model_type="nothing"), "nothing"),
    "configuration without heads": (lambda folder: edit(folder / "config.json", num_attention_heads=0), "."),
    "code of its own": (remote_code, "."),
    "no tokenizer": (lambda folder: [path.unlink() for path in folder.glob("tokenizer*")], "."),
    "tokenizer is not JSON": (lambda folder: (folder / "tokenizer.json").write_text("{"), "."),
    "tokenizer of another kind": (lambda folder: (folder / "tokenizer.json").write_text('{"model": {}}'), "."),
    "tokenizer settings are not JSON": (lambda folder: (folder / "tokenizer_config.json").write_text("{"), "."),
    "weights cut off": (cut_off, "."),
    "weights are garbage": (lambda folder: (folder / "model.safetensors").write_bytes(b"\xff" * 1000), "."),
    "weights of another size": (lambda folder: edit(folder / "config.json", intermediate_size=96), "."),
    "weights of one layer less": (lambda folder: edit(folder / "config.json", num_hidden_layers=3), "layers.2"),
    "weights without a head": (lambda f: edit_weights(f, lambda weights: weights.pop("lm_head.weight")), "lm_head"),
    # Without its quantization a checkpoint's numbers mean something else; here the package for it is missing.
    "quantized by another package": (
        lambda folder: edit(folder / "config.json", quantization_config={"quant_method": "gptq", "bits": 4}),
        "(?i)gptq",
    ),
}


@pytest.mark.parametrize(("damage", "problem"), BROKEN.values(), ids=BROKEN.keys())
def test_a_folder_that_is_no_whole_model_is_refused_in_one_line(copied, damage, problem):
    damage(copied)
    with pytest.raises(ValueError, match=problem) as refusal:
        load_llama(str(copied), device="cpu")
    message = str(refusal.value)
    assert str(copied) in message and "\n" not in message
    assert message.partition(": ")[2] or " has no " in message  # a reason, not only the place
    assert not (copied / "was run").exists()


def test_an_encoder_is_refused_for_its_tokens_see_what_follows_them(tokenizer, tmp_path):
    from transformers import BertConfig, BertLMHeadModel

    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64
    )
    model = BertLMHeadModel(config)
    for parameter in model.requires_grad_(False).parameters():
        if parameter.dim() > 1:
            parameter.normal_(0, 0.3)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"causal|decoder"):
        load_llama(str(tmp_path), device="cpu")


MISTAKES = {
    "a file": ({"model": str(ROOT / "llama.py")}, r"is a file; a model is a folder"),
    "an absolute path": ({"model": "/no/such/folder"}, r"no such model folder: /no/such/folder"),
    "a relative path": ({"model": "./no-such-folder"}, r"no such model folder: \./no-such-folder"),
    "a path in the home": ({"model": "~/no-such-folder"}, r"no such model folder: ~/no-such-folder"),
    "a device of no kind": ({"device": "tpu"}, r"no device 'tpu' here; there is cpu"),
    "4 bits on a CPU": ({"device": "cpu", "load_in_4bit": True}, r"--load-in-4bit needs an NVIDIA GPU"),
    "8 bits on a CPU": ({"device": "cpu", "load_in_8bit": True}, r"--load-in-8bit needs an NVIDIA GPU"),
    "no adapter": ({"adapter": "no-such-adapter"}, r"no-such-adapter is not a LoRA adapter"),
}


@pytest.mark.parametrize(("arguments", "problem"), MISTAKES.values(), ids=MISTAKES.keys())
def test_a_mistake_in_the_flags_is_one_line_before_anything_is_fetched(monkeypatch, arguments, problem):
    def fetch(*arguments):
        raise AssertionError("fetched a model for a command that cannot work")

    monkeypatch.setattr(model_files, "download", fetch)
    monkeypatch.setattr(model_files, "embedded_model", fetch)
    with pytest.raises(ValueError, match=problem) as refusal:
        load_llama(**{"model": "org/model"} | arguments)
    assert "\n" not in str(refusal.value)


def weights_of(folder: Path) -> str:
    return load_llama(str(folder), device="cpu").identity["weights"]


def test_the_identity_is_of_the_contents_and_not_of_the_place(tiny_folder, copied, tmp_path):
    identity = weights_of(tiny_folder)
    assert weights_of(copied) == identity
    assert weights_of(copied.rename(tmp_path / "renamed")) == identity


def nudge(weights: dict) -> None:
    weights["model.norm.weight"][0] += 1e-6


CHANGES = {
    "one weight": lambda folder: edit_weights(folder, nudge),
    "the configuration": lambda folder: edit(folder / "config.json", rms_norm_eps=1e-5),
    "the tokenizer": lambda folder: edit(folder / "tokenizer.json", pre_tokenizer={"type": "WhitespaceSplit"}),
    "the chat template": lambda folder: (folder / "chat_template.jinja").write_text("{{ messages[0].content }}"),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_the_identity_changes_with_whatever_changes_the_output(tiny_folder, copied, change):
    change(copied)
    assert weights_of(copied) != weights_of(tiny_folder)


def test_the_identity_tells_precisions_apart(tiny_folder):
    import torch

    for device in ("cpu", "cpu:0"):  # as accelerate calls it; the precision is the CPU's
        assert load_llama(str(tiny_folder), device=device).identity["precision"] == "float32"
    loaded = load_llama(str(tiny_folder), device="cpu", dtype="bfloat16")
    assert loaded.identity["precision"] == "bfloat16"
    assert loaded.model.dtype == torch.bfloat16


# Adapters


def save_adapter(base: Llama, folder: Path, base_name: str | None = None, random: bool = True, **settings) -> Path:
    """Save a LoRA of the base: as peft initialises it (no change) or, `random`, as if it had been trained."""
    import torch
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(**{"r": 4, "target_modules": ["q_proj", "v_proj"]} | settings)
    tuned = get_peft_model(copy.deepcopy(base.model), config)
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if random and "lora_B" in name:
                parameter.normal_(0, 0.3)
    tuned.peft_config["default"].base_model_name_or_path = base_name
    tuned.save_pretrained(folder)
    return folder


def random_tiny(kind: str = "llama", **settings) -> Llama:
    return random_model(kind, kind, (SIZES if kind == "llama" else KINDS["absolute positions"][1]) | settings)


IDS = numbers(2, 25)


def test_an_untrained_adapter_changes_nothing_and_a_trained_one_does(tiny_llama, tiny_folder, tmp_path):
    base = load_llama(str(tiny_folder), device="cpu")
    loaded = {}
    for name, random in (("untrained", False), ("trained", True)):
        folder = save_adapter(tiny_llama, tmp_path / name, random=random)
        loaded[name] = load_llama(str(tiny_folder), str(folder), device="cpu")
        assert not loaded[name].model.training  # dropout is off
    distribution = {name: np.exp(each.next_token_log_probs(IDS)) for name, each in loaded.items()}
    truth = np.exp(base.next_token_log_probs(IDS))
    np.testing.assert_allclose(distribution["untrained"], truth, rtol=0, atol=1e-7)
    assert np.abs(distribution["trained"] - truth).sum() > 0.01
    identities = [each.identity for each in (base, loaded["untrained"], loaded["trained"])]
    assert len({identity["weights"] for identity in identities}) == 1
    assert len({identity.get("adapter") for identity in identities}) == 3


def test_batches_change_no_result_with_an_adapter(tiny_llama, tiny_folder, tmp_path):
    loaded = load_llama(str(tiny_folder), str(save_adapter(tiny_llama, tmp_path / "adapter")), device="cpu")
    rows = TABLES["a shared beginning"][:3]
    assert_same(loaded.answer_log_probs(rows, ANSWERS[:2]), one_by_one(loaded.model, rows, ANSWERS[:2]))
    assert loaded.shares_prefix


def test_loading_an_adapter_asks_nothing_of_the_network(tiny_llama, tiny_folder, tmp_path, connections, recwarn):
    folder = save_adapter(tiny_llama, tmp_path / "adapter", base_name="org/the-base-it-was-trained-on")
    connections.clear(), recwarn.clear()
    load_llama(str(tiny_folder), str(folder), device="cpu")
    assert connections == []
    assert not [str(warning.message) for warning in recwarn if "org/" in str(warning.message)]  # nor tried in vain


def prompt_tuning(folder: Path, tiny_llama: Llama) -> None:
    from peft import PromptTuningConfig, get_peft_model

    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    get_peft_model(copy.deepcopy(tiny_llama.model), config).save_pretrained(folder)


def pickled(folder: Path, tiny_llama: Llama) -> None:
    save_adapter(tiny_llama, folder)
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")


FOREIGN = {
    "another architecture": lambda f, tiny: save_adapter(random_tiny("gpt2"), f, target_modules=["c_attn"]),
    "another width": lambda f, tiny: save_adapter(random_tiny(hidden_size=48), f),
    "more layers": lambda f, tiny: save_adapter(random_tiny(num_hidden_layers=3), f),
    "fewer layers": lambda f, tiny: save_adapter(random_tiny(num_hidden_layers=1), f),
    "only pickled weights": pickled,
    "weights cut off": lambda f, tiny: os.truncate(save_adapter(tiny, f) / "adapter_model.safetensors", 500),
    "no configuration": lambda f, tiny: (save_adapter(tiny, f) / "adapter_config.json").unlink(),
    "configuration is not JSON": lambda f, tiny: (save_adapter(tiny, f) / "adapter_config.json").write_text("{"),
    "configuration of wrong types": lambda f, tiny: edit(save_adapter(tiny, f) / "adapter_config.json", r="four"),
    "not a LoRA": prompt_tuning,
}


@pytest.mark.parametrize("make", FOREIGN.values(), ids=FOREIGN.keys())
def test_an_adapter_that_does_not_fit_is_refused_in_one_line(tiny_llama, tiny_folder, tmp_path, make):
    folder = tmp_path / "adapter"
    make(folder, tiny_llama)
    with pytest.raises(ValueError, match="adapter") as refusal:
        load_llama(str(tiny_folder), str(folder), device="cpu")
    message = str(refusal.value)
    assert str(folder) in message and "\n" not in message
    assert not message.endswith(":")  # the first line of a library's long message is not a reason


TRAINED_FROM = {  # what an adapter says of its base, what this base is -> whether it is refused
    "the same weights": ("ours", "ours", False),
    "other weights of the same shape": ("theirs", "ours", True),
    "another model of the Hub": ("org/a@1", "org/b@1", True),
    "another commit of the same model": ("org/a@1", "org/a@2", False),
    "a model of the Hub that is a folder here": ("org/a@1", "ours", False),
    "nothing": (None, "ours", False),
}


@pytest.mark.parametrize(("trained", "here", "refused"), TRAINED_FROM.values(), ids=TRAINED_FROM.keys())
def test_an_adapter_of_other_weights_is_refused(tiny_llama, tiny_folder, tmp_path, monkeypatch, trained, here, refused):
    folder = save_adapter(tiny_llama, tmp_path / "adapter")
    if trained:
        (folder / "training_config.json").write_text(json.dumps({"base_weights": trained}))
    monkeypatch.setattr(loader, "locate", lambda model: ("tiny", tiny_folder, here))
    if refused:
        with pytest.raises(ValueError, match=rf"^the adapter in .* from other weights \({trained}\).*\({here}\)$"):
            load_llama("tiny", str(folder), "cpu")
    else:
        assert load_llama("tiny", str(folder), "cpu").adapter == folder


@pytest.mark.parametrize("content", ["{", "[]", '{"base_weights": 5}', "{}"])
def test_an_unreadable_record_of_the_base_refuses_no_adapter_by_a_traceback(tiny_llama, tiny_folder, tmp_path, content):
    folder = save_adapter(tiny_llama, tmp_path / "adapter")
    (folder / "training_config.json").write_text(content)
    try:
        load_llama(str(tiny_folder), str(folder), "cpu")
    except ValueError as refusal:
        assert "other weights" in str(refusal)


@pytest.fixture
def shipped(tiny_llama, tiny_folder, tmp_path, monkeypatch):
    """An adapter where ours would stand, trained from the tiny model for the task `sentiment`."""
    folder = save_adapter(tiny_llama, tmp_path / "fine_tuned_sentiment_model")
    trained = {"base_weights": weights_of(tiny_folder), "task": COMPLETION.settings()}
    (folder / "training_config.json").write_text(json.dumps(trained))
    monkeypatch.setattr(lora, "ADAPTER_FOLDER", folder)
    return folder


def test_auto_uses_the_shipped_adapter_for_its_base_and_its_task_and_says_so(shipped, tiny_folder, capsys):
    chosen = load_llama(str(tiny_folder), "auto", device="cpu", task=COMPLETION.settings())
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1 and shipped.name in said[0] and "--adapter none" in said[0]
    named = load_llama(str(tiny_folder), str(shipped), device="cpu")
    assert chosen.identity == named.identity and "adapter" in chosen.identity
    np.testing.assert_array_equal(chosen.next_token_log_probs(IDS), named.next_token_log_probs(IDS))


OTHERS = {
    "another task": {"adapter": "auto", "task": CHAT.settings()},
    "no task": {"adapter": "auto"},
    "none": {"adapter": "none", "task": COMPLETION.settings()},
    "by default in a program": {"task": COMPLETION.settings()},
}


@pytest.mark.parametrize("arguments", OTHERS.values(), ids=OTHERS.keys())
def test_auto_is_silent_where_the_shipped_adapter_does_not_belong(shipped, tiny_folder, capsys, arguments):
    assert "adapter" not in load_llama(str(tiny_folder), device="cpu", **arguments).identity
    assert capsys.readouterr().err == ""


def test_auto_is_silent_for_other_base_weights(shipped, copied, capsys):
    edit_weights(copied, nudge)
    assert "adapter" not in load_llama(str(copied), "auto", device="cpu", task=COMPLETION.settings()).identity
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("content", ["{", "[]"], ids=["not JSON", "not an object"])
def test_a_broken_training_config_is_one_line_that_names_it(shipped, tiny_folder, content):
    (shipped / "training_config.json").write_text(content)
    with pytest.raises(ValueError, match=re.escape(str(shipped / "training_config.json"))):
        load_llama(str(tiny_folder), "auto", device="cpu", task=COMPLETION.settings())


# The Hub: a server on this machine plays it, well and badly

TOKEN = "hf_ThisIsASecretThatNobodyMaySee"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
WHOLE = {"config.json": b"{}", "model.safetensors": b"0" * 1000}

REFUSALS = {
    "gated": (401, {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access to this model is restricted."}),
    "private": (401, {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"}),
    "missing": (404, {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"}),
    "expired-token": (401, {"X-Error-Message": "Invalid credentials in Authorization header"}),
    "broken": (500, {}),
}


class Hub(ThreadingHTTPServer):
    """A Hub whose models are named after how it treats those who ask for them; `files` are those of org/tiny."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), HubRequest)
        self.files, self.requests = {}, []
        self.url = f"http://127.0.0.1:{self.server_port}"


class HubRequest(BaseHTTPRequestHandler):
    def log_message(self, *arguments):
        pass

    def answer(self, code: int, body: bytes = b"", headers: dict | None = None) -> None:
        self.send_response(code)
        for name, value in ({"Content-Length": str(len(body))} | (headers or {})).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_GET(self):
        self.server.requests.append(self.path)
        api, _, rest = self.path.partition("/org/")
        model, _, rest = rest.partition("/")
        files = self.server.files if model == "tiny" else WHOLE
        if model in REFUSALS:
            code, headers = REFUSALS[model]
            self.answer(code, headers=headers)
        elif model == "hangs-up":
            self.close_connection = True
        elif api.startswith("/api/models") and rest.startswith("revision/"):
            self.answer(200, json.dumps({"id": f"org/{model}", "sha": COMMIT}).encode())
        elif api.startswith("/api/models") and rest.startswith("tree/"):
            tree = [{"type": "file", "path": name, "size": len(files[name]), "oid": name} for name in files]
            self.answer(200, json.dumps(tree).encode())
        elif model == "gated-files":  # as gated models are: everybody sees what there is
            self.answer(403, headers=REFUSALS["gated"][1])
        elif rest.startswith("resolve/"):
            body = files[rest.split("/", 2)[2]]
            headers = {"ETag": f'"{rest}"', "X-Repo-Commit": COMMIT}
            if model == "breaks-off" and self.command == "GET":
                self.answer(200, body[: len(body) // 2], headers | {"Content-Length": str(len(body))})
                self.close_connection = True
            else:
                self.answer(200, body, headers)
        else:
            self.answer(404)

    do_HEAD = do_GET  # noqa: N815

    def do_CONNECT(self):
        self.answer(407)  # a company's proxy that wants a password


@pytest.fixture(scope="module")
def hub():
    server = Hub()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def ask(hub: Hub, home: Path, model: str, **environment: str) -> subprocess.CompletedProcess:
    """Classify one text with a model of this Hub, by the command line, as a user with a token and an empty cache."""
    clean = {name: value for name, value in os.environ.items() if "proxy" not in name.lower() and name[:3] != "HF_"}
    clean |= {"HF_ENDPOINT": hub.url, "HF_HOME": str(home), "HF_TOKEN": TOKEN, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "logprobs_confidence.py", "--json", "--model", model, "A good movie."]
    return subprocess.run(command, cwd=ROOT, env=clean | environment, capture_output=True, text=True, timeout=300)


NOTHING = "http://127.0.0.1:9"  # the discard port, where nothing listens
FAILURES = {  # name -> (model, environment, what the error says)
    "gated": ("org/gated", {}, "is gated: ask for access"),
    "gated, without a token": ("org/gated", {"HF_TOKEN": ""}, "is gated: .*hf auth login.*HF_TOKEN"),
    "gated files": ("org/gated-files", {}, "is gated: ask for access"),
    "private": ("org/private", {}, "no such model on the Hub; check the name, or log in"),
    "missing": ("org/missing", {}, "no such model on the Hub; check the name, or log in"),
    "an expired token": ("org/expired-token", {}, "401"),
    "an error of the Hub": ("org/broken", {}, "cannot be reached|did not give"),
    "a connection closed": ("org/hangs-up", {}, "cannot be reached|did not give"),
    "a download broken off": ("org/breaks-off", {}, "cannot be reached|did not give"),
    "no connection": ("org/any", {"HF_ENDPOINT": NOTHING}, "cannot be reached.*or pass a folder"),
    "offline": ("org/any", {"HF_HUB_OFFLINE": "1"}, "cannot be reached.*or pass a folder"),
    "a proxy that refuses": (
        "org/any",
        {"HF_ENDPOINT": "https://127.0.0.1:9", "HTTPS_PROXY": "{hub}"},
        "cannot be reached|did not give",
    ),
    "not an id": ("org/model/part", {}, "neither a folder nor a model id"),
}


@pytest.fixture(scope="module")
def failures(hub, tmp_path_factory):
    """All failures, asked for a few at a time: each is a process of its own, which mostly imports and waits."""

    def fail(case):
        model, environment, _ = case
        home = tmp_path_factory.mktemp("home")
        return ask(hub, home, model, **{name: value.format(hub=hub.url) for name, value in environment.items()})

    with ThreadPoolExecutor(3) as pool:
        return dict(zip(FAILURES, pool.map(fail, FAILURES.values()), strict=True))


@pytest.mark.parametrize("name", FAILURES)
def test_a_failure_of_the_hub_is_one_line_and_exit_code_2(failures, name):
    model, _, problem = FAILURES[name]
    done = failures[name]
    assert done.returncode == 2, done.stderr
    assert done.stdout == ""
    retries = ("Error while downloading", "Trying to resume", "Max retries")  # which the library reports as they are
    lines = [line for line in re.split(r"[\r\n]+", done.stderr) if line.strip() and not line.startswith(retries)]
    assert len(lines) == 1, done.stderr  # no progress bar either: this is no terminal
    assert lines[0].startswith("error: ") and model in lines[0] and re.search(problem, lines[0])
    assert TOKEN not in done.stdout + done.stderr


def test_a_model_of_the_hub_is_fetched_once_and_then_works_offline(hub, tiny_folder, tmp_path):
    hub.files = {path.name: path.read_bytes() for path in tiny_folder.iterdir()}
    hub.files |= {"pytorch_model.bin": b"pickle", "modeling_theirs.py": b"raise SystemExit('ran')"}
    hub.requests.clear()
    online = ask(hub, tmp_path, "org/tiny")
    assert online.returncode == 0, online.stderr
    asked_for = {path.rpartition("/")[2] for path in hub.requests if "/resolve/" in path}
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= asked_for
    assert not {"pytorch_model.bin", "modeling_theirs.py"} & asked_for
    offline = ask(hub, tmp_path, "org/tiny", HF_HUB_OFFLINE="1", HF_ENDPOINT=NOTHING)
    assert offline.returncode == 0, offline.stderr
    row = json.loads(online.stdout)
    assert json.loads(offline.stdout) == row
    assert row["model"] == "org/tiny"
    same = label_scorer(load_llama(str(tiny_folder), device="cpu"), COMPLETION).explain("A good movie.")
    assert row["probabilities"] == pytest.approx(same["probabilities"], abs=1e-5)
    assert TOKEN not in online.stdout + online.stderr


# Sampling: what is held to the truth above is one pass for every token; what is held to theory are frequencies


class Letters:
    """A tokenizer of the random models: every token is one letter, of which three are special."""

    all_special_ids = (0, 1, 2)

    def decode(self, ids):
        return "".join(chr(0x4E00 + i) for i in ids)


SAMPLED = KINDS | {
    "a rotation by length": (
        "phi3",
        SIZES | {"original_max_position_embeddings": 16, "rope_parameters": LONG_ROTARY},
        False,
    )
}


def letters_of(name: str) -> Llama:
    kind, sizes, _ = SAMPLED[name]
    return replace(random_model(name, kind, sizes), tokenizer=Letters())


def drawn_one_by_one(model, row, seed, temperature: float, max_tokens: int) -> str:
    """An answer drawn with a whole forward pass for each of its tokens, each at the seed's next point of the CDF."""
    import torch

    ids, points = list(row), np.random.default_rng(seed)
    for _ in range(max_tokens):
        logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1]
        cumulative = (logits.double() / temperature).softmax(-1).cumsum(-1).numpy()
        ids.append(int(np.searchsorted(cumulative, points.random() * cumulative[-1], side="right")))
        if ids[-1] in Letters.all_special_ids:
            ids.pop()
            break
    return Letters().decode(ids[len(row) :])


@pytest.mark.parametrize("name", SAMPLED)
def test_an_answer_depends_on_its_prompt_and_its_seed_alone(name, monkeypatch):
    monkeypatch.setitem(loader.SAMPLED, "cpu", (2, 1 << 16))  # so that the default makes several batches of these rows
    llama, temperature, longest = letters_of(name), 1.3, 5
    several = TABLES["a shared beginning"] + TABLES["no shared beginning"][:2] + TABLES["a row of one token"]
    seeds = [[100 * i, 100 * i + 1, 7] for i in range(len(several))]
    truth = [
        [drawn_one_by_one(llama.model, row, seed, temperature, longest) for seed in of_row]
        for row, of_row in zip(several, seeds, strict=True)
    ]
    assert len({answer for answers in truth for answer in answers}) > 20  # a comparison of answers that differ
    options = {"temperature": temperature, "max_tokens": longest, "stop": ""}
    for batch_size in (None, 1, 3, 100):
        assert llama.sample(several, seeds, batch_size=batch_size, **options) == truth
    order = np.random.default_rng(0).permutation(len(several)).tolist()
    shuffled = llama.sample([several[i] for i in order], [seeds[i] for i in order], **options)
    assert shuffled == [truth[i] for i in order]
    for i in (0, 3, -1):  # alone, and each answer alone; a row of one token has no beginning to share
        assert llama.sample([several[i]], [seeds[i]], **options) == [truth[i]]
        assert llama.sample([several[i]], [seeds[i][1:2]], **options) == [truth[i][1:2]]
    uneven = [of_row[: 1 + i % 3] for i, of_row in enumerate(seeds)]
    assert llama.sample(several, uneven, **options) == [answers[: 1 + i % 3] for i, answers in enumerate(truth)]
    assert llama.shares_prefix is SAMPLED[name][2]
    assert llama.sample([], [], **options) == []


def agreement_with(p: np.ndarray, counts: np.ndarray) -> float:
    """The p-value of Pearson's chi-square test that the counts are of draws from p; rare cells go together."""
    expected = p / p.sum() * counts.sum()
    rare = expected < 5
    cells = [np.append(x[~rare], x[rare].sum()) for x in (counts, expected)]
    if cells[1][-1] < 5:  # too few even together: they join the smallest of the others
        smallest = cells[1][:-1].argmin()
        cells = [np.append(np.delete(x[:-1], smallest), x[smallest] + x[-1]) for x in cells]
    return chisquare(*cells).pvalue


@pytest.mark.parametrize("name", ["llama", "absolute positions", "state space"])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_first_tokens_are_as_frequent_as_the_softmax_says(name, temperature):
    import torch

    llama, n = letters_of(name), 8000
    logits = llama.model(input_ids=torch.tensor([BEGINNING])).logits[0, -1].double()
    p = (logits / temperature).softmax(-1).numpy()
    # A model that cannot share runs a row as often as it has answers, so these come in several rows.
    rows, seeds = [BEGINNING] * 8, np.arange(n).reshape(8, -1).tolist()
    answers = [answer for of_row in llama.sample(rows, seeds, temperature, 1, "") for answer in of_row]
    counts = Counter(answers)
    letters = np.array([counts[Letters().decode([i])] for i in range(VOCABULARY)])
    assert letters.sum() + counts[""] == n and not letters[[0, 1, 2]].any()
    found = np.append(letters[3:], counts[""])  # an end of the answer is no letter
    truth, other = (np.append(q[3:], q[:3].sum()) for q in (p, logits.softmax(-1).numpy() ** 2))
    assert agreement_with(truth, found) > 1e-3  # fixed seeds: this either holds or it does not
    assert agreement_with(other, found) < 1e-6  # it would notice a temperature of a half


@pytest.mark.parametrize("name", ["llama", "absolute positions"])
def test_whole_answers_are_as_frequent_as_those_that_transformers_generates(name):
    import torch

    llama, n, length = letters_of(name), 4000, 3
    # A sharper head, so that few sequences hold most of the probability and their counts say something.
    llama.model.get_output_embeddings().weight.data *= 2.5
    torch.manual_seed(0)
    generated = llama.model.generate(
        torch.tensor([BEGINNING]),
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        num_return_sequences=n,
        max_new_tokens=length,
        pad_token_id=0,
    )[:, len(BEGINNING) :].tolist()
    theirs = Counter(
        Letters().decode(ids[: next((i for i, token in enumerate(ids) if token in (0, 1, 2)), length)])
        for ids in generated
    )
    ours = Counter(llama.sample([BEGINNING], [range(n)], max_tokens=length, stop="")[0])
    common = [answer for answer, count in (theirs + ours).most_common() if count >= 20]
    table = [[counts[answer] for answer in common] for counts in (theirs, ours)]
    table = [[*row, n - sum(row)] for row in table]
    assert len(common) > 20 and table[0][-1] < 0.75 * n
    assert chi2_contingency(table).pvalue > 1e-3
    biased = Counter(llama.sample([BEGINNING], [range(n)], 0.9, length, "")[0])
    table[1] = [*(row := [biased[answer] for answer in common]), n - sum(row)]
    assert chi2_contingency(table).pvalue < 1e-6  # it would notice a temperature of 0.9


@pytest.mark.parametrize("name", ["llama", "absolute positions", "sliding window", "state space"])
def test_near_temperature_zero_the_answer_is_the_greedy_one(name):
    import torch

    llama, rows = letters_of(name), TABLES["a shared beginning"]
    greedy = []
    for row in rows:
        ids = llama.model.generate(torch.tensor([row]), do_sample=False, max_new_tokens=8, pad_token_id=0)
        ids = ids[0, len(row) :].tolist()
        greedy.append(Letters().decode(ids[: next((i for i, token in enumerate(ids) if token in (0, 1, 2)), 8)]))
    assert len(set(greedy)) == len(rows) and max(map(len, greedy)) == 8
    for temperature in (1e-4, 1e-45, 1e-300):  # the last two are less than a float32 can hold
        answers = llama.sample(rows, [[1, 2]] * len(rows), temperature, 8, "")
        assert answers == [[answer, answer] for answer in greedy]


def test_generation_settings_of_the_model_change_no_answer():
    import torch

    llama = letters_of("llama")
    rows, seeds = TABLES["a shared beginning"], [range(i, 900, 6) for i in range(6)]
    plain = llama.sample(rows, seeds, stop="")
    settings = {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "top_k": 5, "repetition_penalty": 1.3}
    settings |= {"bad_words_ids": [[7]]}
    llama.model.generation_config.update(**settings)
    generated = llama.model.generate(torch.tensor([rows[0]] * 200), max_new_tokens=1, pad_token_id=0)[:, -1]
    assert len(set(generated.tolist())) <= 5 < len({answer[:1] for answer in plain[0]})  # the settings were in force
    fresh = replace(llama, shares_prefix=None)
    assert fresh.sample(rows, seeds, stop="") == plain


def test_other_seeds_give_other_answers_and_the_same_seed_the_same():
    llama = letters_of("llama")
    answers = llama.sample([BEGINNING], [[*range(200), 7, 0]], stop="")[0]
    assert answers[200:] == [answers[7], answers[0]] and len(set(answers)) > 180
    firsts = Counter(answer[:1] for answer in answers[:200])
    assert len(firsts) > 10 and firsts.most_common(1)[0][1] < 100  # neighbouring seeds are not alike


@pytest.mark.parametrize("name", ["llama", "state space"])
def test_an_end_token_or_a_stop_string_ends_an_answer_and_is_not_in_it(name):
    llama, rows = letters_of(name), TABLES["a shared beginning"]
    seeds = [range(i, 240, 6) for i in range(6)]
    whole = llama.sample(rows, seeds, max_tokens=6, stop="")
    letter, _ = Counter("".join(answer[1:] for of_row in whole for answer in of_row)).most_common(1)[0]
    ended = [[answer.partition(letter)[0] for answer in of_row] for of_row in whole]
    # Some answers end with it and the rest goes on in a smaller batch, untouched.
    assert 10 < sum(a != b for x, y in zip(whole, ended, strict=True) for a, b in zip(x, y, strict=True)) < 200
    assert llama.sample(rows, seeds, max_tokens=6, stop=letter) == ended
    for ends in (ord(letter) - 0x4E00, [2, ord(letter) - 0x4E00]):
        llama.model.generation_config.eos_token_id = ends
        assert replace(llama).sample(rows, seeds, max_tokens=6, stop="") == ended
    lengths = {len(answer) for of_row in whole for answer in of_row}
    assert lengths == {0, 1, 2, 3, 4, 5, 6}  # the model's own end ends some of them anywhere


def test_an_answer_has_at_most_max_tokens_and_begins_a_longer_one():
    llama, seeds = letters_of("llama"), [range(40)]
    longest = llama.sample([BEGINNING], seeds, max_tokens=9, stop="")[0]
    assert max(map(len, longest)) == 9
    for most in (1, 2, 5):
        assert llama.sample([BEGINNING], seeds, max_tokens=most, stop="")[0] == [answer[:most] for answer in longest]


def test_a_prompt_runs_once_and_so_do_answers_that_begin_alike_and_what_has_ended_runs_no_further(counted):
    llama, read, heads = counted
    llama = replace(llama, tokenizer=Letters())
    llama.sample(TABLES["a shared beginning"], [[1]] * 6)  # from here on it knows what its cache can do
    read.clear()
    beginning = numbers(8, 40)
    answers = llama.sample([beginning], [range(30)], max_tokens=4, stop="")[0]
    assert [len(answer) for answer in answers].count(4) < 30  # some end before
    live = [len({answer[:length] for answer in answers if len(answer) >= length}) for length in (1, 2, 3)]
    assert live[0] < 20 < live[2]
    assert sum(read) == 40 + sum(live) and read[-3:] == live
    assert heads[-3:] == [(n, 1, VOCABULARY) for n in live]
    read.clear()
    llama.sample([[*beginning, 50 + i, 9] for i in range(8)], [range(30)] * 8, max_tokens=1)
    assert sum(read) == 40 + 8 * 2


def test_rows_of_several_lengths_are_answered_together(counted):
    llama, _, heads = counted
    llama = replace(llama, tokenizer=Letters())
    rows, seeds = TABLES["a shared beginning"], [[1, 2, 3]] * 6
    llama.sample(rows, seeds)  # from here on it knows what its cache can do
    heads.clear()
    llama.sample(rows, seeds, max_tokens=4, stop="", batch_size=6)
    assert len(heads) == 4 and heads[1][0] > 12  # one pass for each token, most answers still under way
    assert letters_of("absolute positions")._continues_padded


def test_a_point_of_the_cdf_names_the_token_it_falls_on_and_never_one_without_probability():
    import torch

    half = torch.tensor([-np.inf, 0.0, -np.inf, 0.0, -np.inf])
    points = torch.tensor([0.0, 0.25, 0.5 - 2**-53, 0.5, 0.75, 1 - 2**-53], dtype=torch.float64)
    assert inverse_cdf(half[None], 1.0, [0] * 6, points.tolist()) == [1, 1, 1, 3, 3, 3]
    many = torch.randn(49152, generator=torch.Generator().manual_seed(0))
    cumulative = many.double().softmax(-1).cumsum(-1)
    points = torch.cat([torch.zeros(1), cumulative[:-1:500] / cumulative[-1]]).double()
    found = inverse_cdf(many[None], 1.0, [0] * len(points), (points + 1e-12).tolist())
    assert found == [0, *range(1, 49152, 500)]
