"""lora.py: gradients, dropout masks, and which adapters are taken, made and refused.

The truth of gradients and of masked answers are whole rows, one by one, each through a plain forward pass.
"""

import copy
import json
import re
import socket
import warnings
from dataclasses import replace

import numpy as np
import pytest
from small_models import (
    ANSWERS,
    BEGINNING,
    KINDS,
    ONE_TOKEN,
    SIZES,
    TABLES,
    assert_same,
    numbers,
    one_by_one,
    random_model,
)

import llama as loader
import lora
from llama import Llama, load_llama
from lora import add_gradients, dropping_out
from model_files import DEFAULT_WEIGHTS
from task import TASKS

COMPLETION = TASKS["sentiment"]
CHAT = replace(COMPLETION, format="chat")
IDS = numbers(2, 25)
SHARED = TABLES["a shared beginning"]
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


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


def surprise(log_probs, batch):
    """A loss in which rows weigh differently and answers bear on each other."""
    return sum((number + 1) * row.logsumexp(0) ** 2 + row[0] for number, row in zip(batch, log_probs, strict=True))


def slow_gradient(llama, rows, answers) -> np.ndarray:
    """The gradient of `surprise` from a whole pass for each row and answer."""
    import torch

    def log_prob(row, answer):
        logits = llama.model(input_ids=torch.tensor([[*row, *answer[:-1]]]), use_cache=False).logits[0]
        return logits[len(row) - 1 :].double().log_softmax(-1)[range(len(answer)), answer].sum()

    def backward():
        log_probs = torch.stack([torch.stack([log_prob(row, answer) for answer in answers]) for row in rows])
        surprise(log_probs, range(len(rows))).backward()

    return gradient_of(llama, backward)


def fast_gradient(llama, rows, answers, *options) -> np.ndarray:
    return gradient_of(llama, lambda: add_gradients(llama, rows, answers, surprise, *options))


def assert_same_gradient(gradient: np.ndarray, truth: np.ndarray) -> None:
    assert np.linalg.norm(gradient - truth) < 1e-5 * np.linalg.norm(truth) and np.linalg.norm(truth) > 0.1


def is_forgotten(llama) -> bool:
    """Whether no cache of a prompt's beginning is kept, which would be of other weights."""
    return llama._prefix == ((), None)


@pytest.mark.parametrize("answers", [ONE_TOKEN, ANSWERS], ids=["first tokens", "whole answers"])
@pytest.mark.parametrize("name", KINDS)
def test_the_gradient_is_that_of_whole_rows_one_by_one(trainable, name, answers, monkeypatch):
    monkeypatch.setitem(loader.TOKENS_PER_BATCH, "cpu", 16)
    llama = trainable(name)
    for rows in (SHARED, TABLES["no shared beginning"], [BEGINNING]):
        truth = slow_gradient(llama, rows, answers)
        for batch_size, share_prefix in ((None, True), (1, True), (4, False)):
            assert_same_gradient(fast_gradient(llama, rows, answers, batch_size, share_prefix), truth)
        assert is_forgotten(llama)
    assert llama.shares_prefix is KINDS[name][2] and not llama.model.training


def test_gradients_are_added_to_those_that_are_there(trainable):
    llama = trainable("llama")
    once = fast_gradient(llama, SHARED, ONE_TOKEN)
    twice = gradient_of(llama, lambda: [add_gradients(llama, SHARED, ONE_TOKEN, surprise) for _ in range(2)])
    np.testing.assert_allclose(twice, 2 * once, rtol=1e-5, atol=1e-7 * np.abs(once).max())


def test_in_half_precision_the_shared_beginning_gives_the_gradient_of_whole_rows_within_its_rounding(trainable):
    import torch

    exact = trainable("llama")
    halved = replace(exact, model=copy.deepcopy(exact.model), identity={"precision": "bfloat16"})
    for name, weight in halved.model.named_parameters():  # the adapter stays in float32, as it is trained
        if "lora" not in name:
            weight.data = weight.data.to(torch.bfloat16)
    truth = fast_gradient(exact, SHARED, ONE_TOKEN, 2, True)
    error_of_whole = np.linalg.norm(fast_gradient(halved, SHARED, ONE_TOKEN, 2, False) - truth)
    error_of_shared = np.linalg.norm(fast_gradient(halved, SHARED, ONE_TOKEN, 2, True) - truth)
    assert 0 < error_of_shared < 1.5 * error_of_whole < 0.2 * np.linalg.norm(truth)


def test_the_shared_beginning_is_trained_through_once_a_step(trainable):
    llama, read = trainable("llama"), []
    rows = [[*numbers(7, 40), 20 + i, 5] for i in range(8)]
    add_gradients(llama, rows, ONE_TOKEN, surprise)
    hook = llama.model.get_input_embeddings().register_forward_hook(lambda _, ids, out: read.append(ids[0].numel()))
    add_gradients(llama, rows, ONE_TOKEN, surprise, batch_size=3)
    hook.remove()
    assert sum(read) == 40 + 8 * 2


def test_what_changed_the_weights_changes_the_answers_that_follow(trainable):
    import torch

    llama = trainable("llama")
    before = llama.answer_log_probs(SHARED, ONE_TOKEN)
    assert not is_forgotten(llama)
    weights = [weight for weight in llama.model.parameters() if weight.requires_grad]
    with torch.no_grad():
        torch._foreach_add_(weights, 0.3)
    llama.model.train()
    with llama.evaluating():
        assert not llama.model.training and torch.is_inference_mode_enabled()
        after = llama.answer_log_probs(SHARED, ONE_TOKEN)
    assert llama.model.training and is_forgotten(llama)
    llama.model.eval()
    assert_same(after, one_by_one(llama.model, SHARED, ONE_TOKEN))
    assert np.abs(after - before).max() > 0.01
    with torch.no_grad():
        torch._foreach_sub_(weights, 0.3)


def test_too_little_memory_is_one_line_with_the_flags_that_help(trainable, monkeypatch):
    import torch

    def allocate(*arguments):
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 2.00 GiB.")

    monkeypatch.setattr(Llama, "answers_after", allocate)
    with pytest.raises(MemoryError, match=r"^the GPU is out of memory; use .*--micro-batch-size, --gradient-checkp.*$"):
        fast_gradient(trainable("llama"), SHARED, ONE_TOKEN)


# Dropout masks


def test_a_mask_is_of_the_seed_and_neither_batch_nor_shared_beginning_change_its_answers_and_gradients(trainable):
    llama = trainable("llama")
    plain = llama.answer_log_probs(SHARED, ANSWERS)
    answers_of = {"no mask": plain}
    for seed in ([0, 1], [0, 2], [1, 1]):
        with dropping_out(llama, seed):
            answers_of[str(seed)] = truth = one_by_one(llama.model, SHARED, ANSWERS)
            gradient = slow_gradient(llama, SHARED, ANSWERS)
        for batch_size, share_prefix in ((None, True), (2, True), (3, False)):
            with dropping_out(llama, seed):
                assert_same(llama.answer_log_probs(SHARED, ANSWERS, batch_size), truth)
            with dropping_out(llama, seed):
                assert_same_gradient(fast_gradient(llama, SHARED, ANSWERS, batch_size, share_prefix), gradient)
    values = [*answers_of.values()]
    assert all(np.abs(a - b).max() > 0.01 for i, a in enumerate(values) for b in values[:i])
    np.testing.assert_array_equal(llama.answer_log_probs(SHARED, ANSWERS), plain)


def hooks_of(model) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


def test_masks_are_on_the_adapter_s_layers_alone_and_go_away_whatever_happens(trainable):
    llama = trainable("llama")
    before = hooks_of(llama.model)
    with pytest.raises(KeyError), dropping_out(llama, [0]):
        hooked = [name for name, module in llama.model.named_modules() if module._forward_hooks]
        assert len(hooked) == 2 * 7 and all(name.endswith("lora_dropout.default") for name in hooked)
        llama.answer_log_probs(SHARED, ONE_TOKEN)
        raise KeyError
    assert hooks_of(llama.model) == before and is_forgotten(llama)


def test_without_dropout_nothing_is_drawn(tiny_llama, tiny_folder, tmp_path):
    adapted = load_llama(str(tiny_folder), str(saved(tiny_llama, tmp_path / "adapter", lora_dropout=0)), "cpu")
    plain = adapted.next_token_log_probs(IDS)
    with dropping_out(adapted, [0]):
        assert hooks_of(adapted.model) == 0
        np.testing.assert_array_equal(adapted.next_token_log_probs(IDS), plain)


# Loading adapters


def saved(base: Llama, folder, base_name: str | None = None, random: bool = True, **settings):
    """Save, by peft alone, a LoRA of the base: as initialised (no change) or, `random`, as if it had been trained."""
    import torch
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(**{"r": 4, "target_modules": ["q_proj", "v_proj"]} | settings)
    adapted = get_peft_model(copy.deepcopy(base.model), config)
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if random and "lora_B" in name:
                parameter.normal_(0, 0.3)
    adapted.peft_config["default"].base_model_name_or_path = base_name
    adapted.save_pretrained(folder)
    return folder


def random_tiny(kind: str = "llama", **settings) -> Llama:
    return random_model(kind, kind, (SIZES if kind == "llama" else KINDS["absolute positions"][1]) | settings)


def test_an_untrained_adapter_changes_nothing_and_a_trained_one_does(tiny_llama, tiny_folder, tmp_path):
    base = load_llama(str(tiny_folder), device="cpu")
    loaded = {}
    for name, random in (("untrained", False), ("trained", True)):
        folder = saved(tiny_llama, tmp_path / name, random=random)
        loaded[name] = load_llama(str(tiny_folder), str(folder), device="cpu")
        assert not loaded[name].model.training  # dropout is off
    distribution = {name: np.exp(each.next_token_log_probs(IDS)) for name, each in loaded.items()}
    truth = np.exp(base.next_token_log_probs(IDS))
    np.testing.assert_allclose(distribution["untrained"], truth, rtol=0, atol=1e-7)
    assert np.abs(distribution["trained"] - truth).sum() > 0.01
    identities = [each.identity for each in (base, *loaded.values())]
    assert len({identity["weights"] for identity in identities}) == 1
    assert len({identity.get("adapter") for identity in identities}) == 3


def test_loading_an_adapter_asks_nothing_of_the_network(tiny_llama, tiny_folder, tmp_path, monkeypatch, recwarn):
    folder, tried = saved(tiny_llama, tmp_path / "adapter", base_name="org/the-base-it-was-trained-on"), []

    def refuse(*address, **options):
        tried.append(address)
        raise ConnectionRefusedError("no network in this test")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    recwarn.clear()
    load_llama(str(tiny_folder), str(folder), device="cpu")
    assert tried == []
    assert not [str(warning.message) for warning in recwarn if "org/" in str(warning.message)]  # nor tried in vain


def prompt_tuning(folder, tiny_llama: Llama) -> None:
    from peft import PromptTuningConfig, get_peft_model

    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    get_peft_model(copy.deepcopy(tiny_llama.model), config).save_pretrained(folder)


FOREIGN = {
    "another architecture": lambda f, tiny: saved(random_tiny("gpt2"), f, target_modules=["c_attn"]),
    "another width": lambda f, tiny: saved(random_tiny(hidden_size=48), f),
    "only pickled weights": lambda f, tiny: (saved(tiny, f) / WEIGHTS).rename(f / "adapter_model.bin"),
    "no configuration": lambda f, tiny: (saved(tiny, f) / CONFIG).unlink(),
    "configuration of wrong types": lambda f, tiny: (saved(tiny, f, r=1) / CONFIG).write_text(
        (f / CONFIG).read_text().replace('"r": 1,', '"r": "four",')
    ),
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
    "other weights of the same shape": ("theirs", "ours", True),
    "another model of the Hub": ("org/a@1", "org/b@1", True),
    "another commit of the same model": ("org/a@1", "org/a@2", False),
    "a model of the Hub that is a folder here": ("org/a@1", "ours", False),
}


@pytest.mark.parametrize(("trained", "here", "refused"), TRAINED_FROM.values(), ids=TRAINED_FROM.keys())
def test_an_adapter_of_other_weights_is_refused(tmp_path, trained, here, refused):
    (tmp_path / "training_config.json").write_text(json.dumps({"base_weights": trained}))
    if refused:
        with pytest.raises(ValueError, match=rf"^the adapter in .* from other weights \({trained}\).*\({here}\)$"):
            lora.check_base(tmp_path, here)
    else:
        lora.check_base(tmp_path, here)


NAMED = {  # what peft's own file says of the base, what this base is -> refused, or a note, or neither
    "another model of the Hub": ("meta-llama/Llama-3.2-1B", "org/b@1", "refused"),
    "the default model by its name on the Hub": ("HuggingFaceTB/SmolLM2-135M-Instruct", DEFAULT_WEIGHTS, ""),
    "the default model's own base": ("HuggingFaceTB/SmolLM2-135M", DEFAULT_WEIGHTS, "refused"),
    "a folder": ("/data/models/mine", "org/b@1", "note"),
}


@pytest.mark.parametrize(("trained", "here", "outcome"), NAMED.values(), ids=NAMED.keys())
@pytest.mark.parametrize("record", [None, "{"], ids=["no record of ours", "a broken one"])
def test_an_adapter_of_other_makers_is_held_to_the_name_of_its_base(tmp_path, capsys, record, trained, here, outcome):
    (tmp_path / CONFIG).write_text(json.dumps({"base_model_name_or_path": trained}))
    if record is not None:
        (tmp_path / "training_config.json").write_text(record)
    if outcome == "refused":
        with pytest.raises(ValueError, match=f"was trained from {trained}, not from"):
            lora.check_base(tmp_path, here)
    else:
        lora.check_base(tmp_path, here)
    assert ("says it was trained from" in capsys.readouterr().err) == (outcome == "note")


@pytest.fixture
def shipped(tiny_llama, tiny_folder, tmp_path, monkeypatch):
    """An adapter where ours would stand, trained from the tiny model for the task `sentiment`."""
    folder = saved(tiny_llama, tmp_path / "fine_tuned_sentiment_model")
    weights = load_llama(str(tiny_folder), device="cpu").identity["weights"]
    config = {"base_weights": weights, "task": COMPLETION.settings()}
    (folder / "training_config.json").write_text(json.dumps(config))
    monkeypatch.setattr(lora, "ADAPTER_FOLDER", folder)
    return folder


def test_auto_uses_the_shipped_adapter_for_its_base_and_its_task_and_says_so(shipped, tiny_folder, capsys):
    chosen = load_llama(str(tiny_folder), "auto", device="cpu", task=COMPLETION.settings())
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1 and shipped.name in said[0] and "--adapter none" in said[0]
    named = load_llama(str(tiny_folder), str(shipped), device="cpu")
    assert chosen.identity == named.identity and "adapter" in chosen.identity
    np.testing.assert_array_equal(chosen.next_token_log_probs(IDS), named.next_token_log_probs(IDS))


ELSEWHERE = {
    "another task": ("auto", CHAT, False),
    "none": ("none", COMPLETION, False),
    "by default in a program": (None, COMPLETION, False),
    "other base weights": ("auto", COMPLETION, True),
}


@pytest.mark.parametrize(("adapter", "task", "other_base"), ELSEWHERE.values(), ids=ELSEWHERE.keys())
def test_auto_is_silent_where_the_shipped_adapter_does_not_belong(shipped, capsys, adapter, task, other_base):
    trained_from = json.loads((shipped / "training_config.json").read_text())["base_weights"]
    weights = "others" if other_base else trained_from
    assert lora.choose_adapter(adapter, weights, task and task.settings()) is None
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("content", ["{", "[]"], ids=["not JSON", "not an object"])
def test_a_broken_training_config_is_one_line_that_names_it(shipped, content):
    (shipped / "training_config.json").write_text(content)
    with pytest.raises(ValueError, match=re.escape(str(shipped / "training_config.json"))):
        lora.choose_adapter("auto", "ours", COMPLETION.settings())


# Making adapters: what plain peft makes of one that was saved is in test_fine_tune_model.py


def test_a_fresh_adapter_is_on_every_linear_layer_and_changes_nothing():
    llama = random_tiny()
    before = llama.next_token_log_probs(IDS)
    lora.add_adapter(llama, rank=2, alpha=4, dropout=0.5)
    trained = {name for name, weight in llama.model.named_parameters() if weight.requires_grad}
    assert len(trained) == 2 * 7 * 2 and all("lora_" in name for name in trained)
    np.testing.assert_array_equal(llama.next_token_log_probs(IDS), before)


def test_what_peft_cannot_adapt_is_one_line_that_names_the_model():
    llama = random_model("state space", *KINDS["state space"][:2])
    with pytest.raises(ValueError, match=r"^peft cannot adapt state space with --dropout 0\.05: "):
        lora.add_adapter(llama, rank=4, alpha=8, dropout=0.05)


def test_saved_weights_come_back(tmp_path):
    llama, other = random_tiny(), random_tiny()
    for number, each in enumerate((llama, other)):
        lora.add_adapter(each, rank=2, alpha=4, dropout=0.0, seed=number)
    tensors = dict(llama.model.named_parameters())
    for name in tensors:
        if "lora_B" in name:
            tensors[name].data.fill_(0.1)
    lora.save_adapter(llama, tmp_path)
    lora.load_weights(other, tmp_path)
    np.testing.assert_array_equal(other.next_token_log_probs(IDS), llama.next_token_log_probs(IDS))
    assert {path.name for path in tmp_path.iterdir()} == {CONFIG, WEIGHTS}
    assert (tmp_path / WEIGHTS).stat().st_mode & 0o777 == 0o644


def test_every_row_is_given_to_the_loss_once_with_its_log_probabilities(trainable):
    llama, seen = trainable("llama"), {}

    def loss(log_probs, batch):
        assert log_probs.shape == (len(batch), 3) and str(log_probs.dtype) == "torch.float32"
        assert not seen.keys() & set(batch)
        seen.update(zip(batch, log_probs.tolist(), strict=True))
        return log_probs.sum()

    add_gradients(llama, SHARED, ANSWERS, loss, 2)
    with llama.evaluating():
        assert_same(np.array([seen[i] for i in range(len(SHARED))]), llama.answer_log_probs(SHARED, ANSWERS))


def test_batches_change_no_result_with_an_adapter(tiny_llama, tiny_folder, tmp_path):
    loaded = load_llama(str(tiny_folder), str(saved(tiny_llama, tmp_path / "adapter")), device="cpu")
    assert_same(loaded.answer_log_probs(SHARED[:3], ANSWERS[:2]), one_by_one(loaded.model, SHARED[:3], ANSWERS[:2]))
    assert loaded.shares_prefix
