"""hidden_features.py and Llama.hidden_states: the truth is one plain forward pass of transformers over each prompt."""

import os

import numpy as np
import pytest
from small_models import KINDS, ONE_TOKEN, SIZES, TABLES, assert_same, one_by_one, random_model

import hidden_features
from hidden_features import LAST, MEAN, feature_reader, written_features
from logprobs_confidence import label_scorer
from lora import add_adapter
from probe import FIRST_TOKEN
from task import TASKS, Task

LAYERS = [0, 1, 2]
BARE = Task("table", {"a": ("a",), "b": ("b",)}, "{text}")
SENTIMENT = TASKS["sentiment"]


def plain_states(model, rows, spans, layers):
    """[rows, layers, 2, hidden] of whole forward passes, one a row."""
    import torch

    found = []
    for row, (start, end) in zip(rows, spans, strict=True):
        output = model(input_ids=torch.tensor([list(row)]), output_hidden_states=True, use_cache=False)
        states = [output.hidden_states[layer][0].double().numpy() for layer in layers]
        found.append([[s[-1], s[start:end].mean(axis=0)] for s in states])
    return np.array(found)


def assert_same_states(found, truth):
    np.testing.assert_allclose(found, truth, rtol=0, atol=1e-5 * np.abs(truth).max())


def middle_of(row):
    """A span inside a row, at least one token wide."""
    start = min(2, len(row) - 1)
    return start, max(len(row) - 1, start + 1)


def collected(llama, rows, spans, answers=(), **options):
    hidden = np.full((len(rows), len(LAYERS), 2, llama.hidden_size), np.nan, np.float32)
    log_probs = np.full((len(rows), len(answers)), np.nan)
    for batch in llama.hidden_states(rows, spans, LAYERS, answers, **options):
        hidden[batch.rows], log_probs[batch.rows] = batch.hidden, batch.log_probs
    return hidden, log_probs


# The model


@pytest.mark.parametrize("name", [name for name in KINDS if name != "a head that does not select"])
def test_states_are_those_of_a_plain_pass_in_every_family_whatever_the_batch(name):
    kind, sizes, _ = KINDS[name]
    llama = random_model(name, kind, sizes)
    answers = [ids for (ids,) in ONE_TOKEN]
    for rows in TABLES.values():
        spans = [middle_of(row) for row in rows]
        truth = plain_states(llama.model, rows, spans, LAYERS)
        for batch_size in (None, 2):
            assert_same_states(collected(llama, rows, spans, batch_size=batch_size)[0], truth)
        hidden, log_probs = collected(llama, rows, spans, answers)
        assert_same_states(hidden, truth)
        assert_same(log_probs, one_by_one(llama.model, rows, ONE_TOKEN))


def test_states_are_those_of_the_adapted_model():
    import torch

    llama = random_model("llama", "llama", SIZES)
    rows = TABLES["a shared beginning"]
    spans = [middle_of(row) for row in rows]
    without = collected(llama, rows, spans)[0]
    add_adapter(llama, rank=2, alpha=4, dropout=0.0)
    llama.forget_prefix()
    for name, parameter in llama.model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, 0, 0.3)
    llama.model.requires_grad_(False)
    adapted = collected(llama, rows, spans)[0]
    assert_same_states(adapted, plain_states(llama.model, rows, spans, LAYERS))
    assert np.abs(adapted - without).max() > 0.1


def test_the_head_is_not_computed_and_a_prefix_before_every_span_runs_once(counted):
    llama, read, heads = counted
    llama.forget_prefix()
    read.clear(), heads.clear()
    rows = TABLES["a shared beginning"]
    list(llama.hidden_states(rows, [(12, len(row)) for row in rows], LAYERS, batch_size=1))
    assert sum(read) == 12 + sum(len(row) - 12 for row in rows) and [shape for shape in heads if shape[1]] == heads[:1]


def test_batches_whose_rows_are_known_are_left_out():
    llama = random_model("llama", "llama", SIZES)
    rows = TABLES["a shared beginning"]
    spans = [middle_of(row) for row in rows]
    whole, _ = collected(llama, rows, spans, batch_size=2)
    some, _ = collected(llama, rows, spans, batch_size=2, skip={0, 1, 3, 5})
    left = ~np.isnan(some).any(axis=(1, 2, 3))
    assert 0 < left.sum() < len(rows)
    np.testing.assert_array_equal(some[left], whole[left])


# The text's own tokens


@pytest.mark.parametrize("task", [SENTIMENT, BARE, TASKS["sentiment-yes-no"]], ids=lambda task: task.name)
@pytest.mark.parametrize("text", ["Not bad at all.", "x", " Sentiment:", "Wow!\n\nGreat...", "naïve 漢字 🙂", "3,000"])
def test_a_span_is_of_the_tokens_that_show_the_text(task, text, tiny_llama):
    reader = feature_reader(tiny_llama, task)
    encoded = reader.encode(text)
    whole = reader.prompt.render(text)
    given = tiny_llama.tokenizer(whole, add_special_tokens=False, return_offsets_mapping=True)
    assert given.input_ids == encoded.ids
    first, end = len(reader.prompt.before), len(whole) - len(reader.prompt.after)
    own = [n for n, (a, b) in enumerate(given.offset_mapping) if b > first and a < end]
    assert encoded.span == (own[0], own[-1] + 1)


def test_a_control_string_in_a_text_is_part_of_its_span(tiny_llama):
    reader = feature_reader(tiny_llama, TASKS["sentiment-yes-no"])
    encoded = reader.encode("a <|im_end|> b")
    start, end = encoded.span
    assert tiny_llama.tokenizer.decode(encoded.ids[start:end]).strip() == "a <|im_end|> b"


# The reader


def test_layers_are_from_the_middle_to_the_last_and_features_have_names(embedded):
    reader = feature_reader(embedded, SENTIMENT)
    assert reader.layers == (15, 20, 25, 30) and len(reader.names) == 8
    assert reader.widths == {**dict.fromkeys(reader.names, 576), FIRST_TOKEN: 2}
    assert reader.place_of("layer 25, mean of the text") == (25, MEAN)
    one = reader.of(20, LAST, with_first_token=False)
    assert list(one.widths) == ["layer 20, last token"]
    encoded = [one.encode("Not bad.")]
    (alone,), (together,) = one.batches(encoded), reader.batches(encoded)
    for name, states in alone.features.items():
        np.testing.assert_allclose(states, together.features[name], atol=1e-3)
    with pytest.raises(ValueError, match="has the layers 0 to 30, not 31"):
        feature_reader(embedded, SENTIMENT, [31])


def test_the_first_token_s_answer_is_that_of_method_1(embedded):
    task = Task("mood", SENTIMENT.labels, SENTIMENT.template)
    texts = ["A lovely day.", "The worst film of the year, by far.", "Fine."]
    reader, scorer = feature_reader(embedded, task), label_scorer(embedded, task)
    truth = np.log([[*scorer.explain(text)["probabilities"].values()] for text in texts])
    encoded = [reader.encode(text) for text in texts]
    for batch in reader.batches(encoded):
        np.testing.assert_allclose(batch.features[FIRST_TOKEN], truth[batch.rows], atol=1e-4)


def test_labels_that_are_no_single_tokens_have_no_first_token(tiny_llama):
    sequence = Task("s", {"a": ("yes",), "b": ("no",)}, "{text}\nAnswer:", scoring="sequence")
    unspeakable = Task("s", {"a": ("late parcel",), "b": ("no",)}, "{text}\nAnswer:")
    for task in (sequence, unspeakable):
        reader = feature_reader(tiny_llama, task)
        assert reader.answers == () and FIRST_TOKEN not in reader.widths


# The file


def test_features_are_written_once_and_a_stopped_run_goes_on_after_the_last_whole_window(
    tiny_llama, tmp_path, monkeypatch
):
    monkeypatch.setitem(hidden_features.ROWS_PER_WINDOW, "cpu", 4)
    reader = feature_reader(tiny_llama, SENTIMENT)
    texts = [" ".join(["good", "bad", "film"][: 1 + n % 3]) + str(n) for n in range(11)]
    encoded = [reader.encode(text) for text in texts]
    path, read = tmp_path / "features.f32", []
    monkeypatch.setattr(type(reader), "batches", counting(type(reader).batches, read))
    whole = {name: np.array(rows) for name, rows in written_features(reader, encoded, path, "key").items()}
    assert read == [4, 4, 3] and [rows.shape for rows in whole.values()] == [(11, 32)] * 4 + [(11, 2)]
    for number, text in enumerate(encoded):
        (batch,) = reader.batches([text])
        for name, states in batch.features.items():
            np.testing.assert_allclose(whole[name][number], states[0], atol=1e-4)
    for size, again in ((path.stat().st_size, []), (4 * 130 * 7 + 50, [4, 3]), (0, [4, 4, 3])):
        read.clear()
        os.truncate(path, size)  # what a kill leaves behind
        found = written_features(reader, encoded, path, "key")
        assert read == again and all(np.array_equal(found[name], whole[name]) for name in whole)
        assert all(isinstance(rows, np.memmap) for rows in found.values())
    read.clear()
    written_features(reader, encoded[:3], path, "other texts")
    assert read == [3] and path.stat().st_size == 4 * 130 * 3


def counting(batches, read):
    """`batches`, which notes how many texts it was given."""

    def noting(reader, encoded, *others):
        read.append(len(encoded))
        return batches(reader, encoded, *others)

    return noting
