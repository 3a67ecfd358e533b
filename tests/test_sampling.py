"""Sampling from a model: held to one plain pass for every token, and frequencies to theory."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from scipy.stats import chi2_contingency, chisquare
from small_models import BEGINNING, KINDS, LONG_ROTARY, SIZES, TABLES, VOCABULARY, numbers, random_model

import sampling
from llama import Llama
from tensors import inverse_cdf


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
    monkeypatch.setitem(sampling.SAMPLED, "cpu", (2, 1 << 16))  # so the default makes several batches
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
    assert letters_of("absolute positions").continues_padded


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


def agreement_with(p: np.ndarray, counts: np.ndarray) -> float:
    """The p-value of Pearson's chi-square test that the counts are of draws from p; rare cells go together."""
    expected = p / p.sum() * counts.sum()
    rare = expected < 5
    cells = [np.append(x[~rare], x[rare].sum()) for x in (counts, expected)]
    if cells[1][-1] < 5:  # too few even together: they join the smallest of the others
        smallest = cells[1][:-1].argmin()
        cells = [np.append(np.delete(x[:-1], smallest), x[smallest] + x[-1]) for x in cells]
    return chisquare(*cells).pvalue
