"""endpoint.py, and Methods 1 and 2 over it, against the server of fake_server.py, which misbehaves on demand."""

import json
import math
import os
import re
import signal
import subprocess
import sys
import threading
import time
import traceback
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import records, write_csv
from fake_server import SAMPLED_ID, SPELT, TOO_LATE_S, FakeServer, said

import command_line
import consistency_confidence
import endpoint
import logprobs_confidence
import server_connections
from endpoint import PassingError, connect
from llama import load_reader
from task import TASKS

ROOT = Path(__file__).parent.parent
SENTIMENT, YES_NO = TASKS["sentiment"], TASKS["sentiment-yes-no"]
CHAT = ["--task", "sentiment-yes-no"]
CLAUDE = ["--endpoint", "anthropic", "--model", "claude-haiku-4-5", *CHAT]
KEY, ORGANIZATION, PROJECT = "sk-do-not-show-this", "org-do-not-show", "proj-do-not-show"
SENT = {"top_p": 1.0, "top_k": 0, "min_p": 0.0, "repeat_penalty": 1.0, "repetition_penalty": 1.0}
STOPPED = "\nstopped; repeat the same command to continue where it was\n"
SURE = 0.6 / 0.95  # of "positive" where the 0.05 that the fake does not list may all be "negative"
BOTH = pytest.mark.parametrize("task", [SENTIMENT, YES_NO], ids=["completion", "chat"])


cached_reader = lru_cache(load_reader)


@pytest.fixture(autouse=True)
def environment(monkeypatch, tmp_path):
    """An environment with keys in it; quick clients that wait little between their attempts and trust no other host."""
    monkeypatch.setattr(endpoint, "load_reader", cached_reader)
    for name in [name for name in os.environ if re.search("proxy|openai|anthropic|ssl_cert", name, re.I)]:
        monkeypatch.delenv(name)
    for name in ("OPENAI_API_KEY", "OPENAI_ADMIN_KEY", "ANTHROPIC_API_KEY"):
        monkeypatch.setenv(name, KEY)
    monkeypatch.setenv("OPENAI_CUSTOM_HEADERS", f"Authorization: Bearer {KEY}")
    monkeypatch.setenv("OPENAI_ORG_ID", ORGANIZATION)
    monkeypatch.setenv("OPENAI_PROJECT_ID", PROJECT)
    monkeypatch.setenv("SSL_CERT_DIR", str(tmp_path))  # an empty one is read in no time
    monkeypatch.setattr(server_connections, "RETRIES", 1)
    monkeypatch.setattr("openai._base_client.INITIAL_RETRY_DELAY", 0.01)


@pytest.fixture
def fake(environment, monkeypatch):
    """A running fake; when the test is over it must not have seen what it was not to see."""
    fake = FakeServer().start()
    monkeypatch.setenv("ANTHROPIC_BASE_URL", fake.url.removesuffix("/v1"))
    yield fake
    fake.stop()
    for request in fake.requests:
        shown = repr(request)
        assert fake.shown_key or "anthropic-version" in request.headers or KEY not in shown
        assert ORGANIZATION not in shown and PROJECT not in shown


@pytest.fixture
def call(capsys, fake, tmp_path):
    """Run a script in this process on the fake: -> its code, out and err. It never shows a key or a traceback."""

    def run_main(script, *arguments):
        argv = [*map(str, arguments)] + ([] if "--endpoint" in arguments else ["--endpoint", fake.url])
        code = 0
        capsys.readouterr()
        try:
            command_line.run(lambda: script.main(argv), resumes=True)
        except SystemExit as stopped:
            code = stopped.code
        out, err = capsys.readouterr()
        written = out + err + "".join(path.read_text() for path in tmp_path.glob("**/*.jsonl"))
        assert "Traceback" not in err and not any(part in written for part in (KEY, ORGANIZATION, PROJECT))
        return SimpleNamespace(code=code, out=out, err=err)

    return run_main


@pytest.fixture(params=[logprobs_confidence, consistency_confidence], ids=["method-1", "method-2"])
def script(request):
    return request.param


def logprobs(call, *arguments):
    return call(logprobs_confidence, *arguments)


def consistency(call, *arguments):
    return call(consistency_confidence, *arguments)


def row_of(done):
    """The one explanation that a command printed."""
    assert done.code == 0, done
    return json.loads(done.out)


def error_of(done):
    """The one line of a command that failed."""
    assert (done.code, done.out, done.err.count("error: ")) == (2, "", 1), done
    last = done.err.splitlines()[-1]
    assert last.startswith("error: ")
    return last


def table(tmp_path, texts, *flags):
    """The flags for a table of texts, and the file they write."""
    path = write_csv(tmp_path / "t.csv", [(text, "positive") for text in texts], ("text", "label"))
    return ["--input", path, "--output", tmp_path / "p.jsonl", *flags], tmp_path / "p.jsonl"


def unbroken(call, script, tmp_path, flags):
    """The bytes that a run of one piece writes."""
    whole = tmp_path / "whole.jsonl"
    assert call(script, *[whole if part == tmp_path / "p.jsonl" else part for part in flags]).code == 0
    return whole.read_bytes()


# What is asked and what comes of it


@BOTH
def test_method_1_reads_both_layouts_and_asks_for_the_whole_distribution(call, fake, task):
    row, chat = row_of(logprobs(call, "Not bad", "--json", "--task", task.name)), task is YES_NO
    assert (row["prediction"], row["model"], row["prompt"]) == ("positive", "fake-1", task.prompt("Not bad"))
    assert row["probabilities"] == pytest.approx({"negative": 1 - SURE, "positive": SURE})
    assert (row["confidence"], row["total_probability"]) == pytest.approx((SURE, 0.6))
    assert (row["label_mass"], row["label_mass_high"]) == pytest.approx((0.9, 0.95)) and "missing" not in row
    assert [entry["label"] for entry in row["top_tokens"]] == ["positive", "negative", None]
    assert [entry["token"] for entry in row["top_tokens"]] == [*SPELT[chat].values()]
    request = fake.requests[-1]
    asked = {"messages": task.prompt("Not bad"), "logprobs": True, "top_logprobs": 20}
    asked = asked if chat else {"prompt": task.prompt("Not bad"), "logprobs": 20}
    assert request.body == {"model": "fake-1", "max_tokens": 1, "temperature": 1.0} | SENT | asked
    assert request.path == ("/v1/chat/completions" if chat else "/v1/completions")
    assert [request.path for request in fake.requests] == ["/v1/models", request.path, request.path]  # one is the probe


@BOTH
def test_method_2_asks_for_untruncated_samples_with_different_seeds(call, fake, task):
    flags = ["FAKE-7-OF-10", "--json", "--task", task.name, "--seed"]
    row = row_of(consistency(call, *flags, 0))
    assert (row["votes"], row["unparsed"], row["agreement"]) == ({"negative": 3, "positive": 7}, 0, 0.7)
    assert (row["confidence"], row["label_mass"], row["sampling"]) == (0.7, 1.0, {"temperature": 1.0} | SENT)
    bodies = list(fake.asked_for("FAKE-7-OF-10"))
    consistency(call, *flags, 0)
    consistency(call, *flags, 1)
    seeds = [body.pop("seed") for body in fake.asked_for("FAKE-7-OF-10")]
    assert len(set(seeds[:10])) == 10 and all(0 <= seed < 2**31 for seed in seeds)
    assert sorted(seeds[10:20]) == sorted(seeds[:10]) and not set(seeds[20:]) & set(seeds[:20])
    prompt = task.prompt("FAKE-7-OF-10")
    asked = {"messages": prompt} if task is YES_NO else {"prompt": prompt, "stop": ["\n"]}
    assert bodies == [{"model": "fake-1", "max_tokens": 10, "temperature": 1.0} | SENT | asked] * 10


def test_claude_is_asked_over_its_own_protocol(call, fake):
    row = row_of(consistency(call, "FAKE-3-OF-4", *CLAUDE, "--samples", 4, "--json"))
    assert (row["votes"], row["unparsed"], row["model"]) == ({"negative": 0, "positive": 3}, 1, "claude-haiku-4-5")
    assert (row["agreement"], row["confidence"], row["label_mass"]) == (0.75, 1.0, 0.75)
    request = fake.requests[-1]
    asked = {"model": "claude-haiku-4-5", "max_tokens": 10, "temperature": 1.0}
    assert request.path == "/v1/messages" and request.body == asked | {"messages": YES_NO.prompt("FAKE-3-OF-4")}
    assert row["sampling"] == {"temperature": 1.0} and KEY in repr(request.headers)
    # A model that reasons says so in a block of its own, which is no answer.
    row = row_of(consistency(call, "FAKE-THINKING", *CLAUDE, "--samples", 4, "--json"))
    assert row["votes"] == {"negative": 0, "positive": 4}
    for model in ("claude-opus-4-7", "claude-sonnet-5"):  # these reject a temperature
        row = row_of(consistency(call, "Not bad", *CLAUDE, "--model", model, "--samples", 2, "--json"))
        assert row["sampling"] == {} and "temperature" not in fake.requests[-1].body


def test_what_claude_cannot_do_is_said_in_one_line(call, fake):
    text, unnamed = "Not bad", ["--endpoint", "anthropic", *CHAT]
    assert "claude-haiku-4-5 gives no log-probabilities; use Method 2" in error_of(logprobs(call, text, *CLAUDE))
    assert 'a task with format = "chat"' in error_of(consistency(call, text, *CLAUDE, "--task", "sentiment"))
    assert "with --model" in error_of(consistency(call, text, *unnamed))
    assert "no public tokenizer" in error_of(consistency(call, text, *CLAUDE, "--tokenizer", "default"))
    assert fake.requests == []


@BOTH
def test_a_label_that_is_not_listed_is_missing_and_never_zero(call, tmp_path, task):
    flags, output = table(tmp_path, ["FAKE-MISSING", "FAKE-NOT-COMPUTED", "FAKE-UNDECIDED", "FAKE-NEITHER"])
    done = logprobs(call, *flags, "--task", task.name)
    assert done.code == 0 and "2 of 4 rows scored, 2 with an error" in done.out
    *missing, undecided, neither = records(output)
    for row in missing:  # 0.2 of the mass is not listed, all of which negative may have
        assert row["probabilities"] == pytest.approx({"negative": 0.2 / 0.9, "positive": 0.7 / 0.9})
        assert (row["label_mass"], row["label_mass_high"]) == pytest.approx((0.7, 0.9))
        assert row["missing"] == ["negative"]
    assert "negative not among the 2 tokens listed, and the 40.0% that is not listed could be it" in undecided["error"]
    assert "none of the 1 tokens listed names a label; they hold 90.0% of the mass" in neither["error"]
    assert all(row["confidence"] is row["probabilities"] is row["label_mass"] is None for row in (undecided, neither))
    out = logprobs(call, "FAKE-MISSING").out
    assert re.search(r"P\(negative\) +not listed; it counts with all that is not, the most it can have", out)
    assert "70.00 %  of the distribution names a label, up to 90.00 % with what is not listed" in out


# Token ids


# Ids of the embedded model's tokenizer, in four spellings each: positive 0.56, negative 0.24.
IDS = {2731: 0.5, 16185: 0.02, 20085: 0.03, 31176: 0.01, 3524: 0.2, 17728: 0.01, 26990: 0.02, 42529: 0.01}
BY_ID = ["--json", "--tokenizer", "default"]


@pytest.fixture
def vllm(fake, tokenizer):
    """The fake as a vLLM server with the embedded model's tokenizer."""
    words = {i: tokenizer.decode([i]).strip().casefold() for i in IDS}
    assert [*words.values()] == ["positive"] * 4 + ["negative"] * 4
    fake.tokenizer, fake.lists = tokenizer, {i: math.log(p) for i, p in (IDS | {SAMPLED_ID: 0.15}).items()}
    return fake


def test_a_server_that_lists_by_id_gives_exact_masses(call, vllm):
    row = row_of(logprobs(call, "Not bad", *BY_ID))
    assert row["probabilities"] == pytest.approx({"negative": 0.3, "positive": 0.7})
    assert row["label_mass"] == row["label_mass_high"] == pytest.approx(0.8) and "missing" not in row
    body = vllm.requests[-1].body
    assert body["prompt"] == row["prompt_token_ids"] == vllm.tokenizer(SENTIMENT.prompt("Not bad"))["input_ids"]
    assert sorted(body["logprob_token_ids"]) == sorted(IDS) and body["return_tokens_as_token_ids"] is True
    assert row["top_tokens"][0]["token"] == " positive" and row["prompt"] == SENTIMENT.prompt("Not bad")
    # An id without a log-probability, here of " negative", is not taken for zero; with what is sampled 0.75 is listed.
    row = row_of(logprobs(call, "FAKE-NOT-COMPUTED", *BY_ID))
    assert row["probabilities"] == pytest.approx({"negative": 0.29 / 0.85, "positive": 0.56 / 0.85})
    assert (row["label_mass"], row["label_mass_high"]) == pytest.approx((0.6, 0.85))


@pytest.mark.parametrize("rejects", [{}, {"logprob_token_ids": "logprob_token_ids: extra inputs are not permitted"}])
def test_a_server_with_ids_but_only_its_top_list_gives_an_interval(call, vllm, rejects):
    vllm.rejects, vllm.knows_ids = rejects, False
    vllm.lists |= {2731: math.log(0.6)}
    row = row_of(done := logprobs(call, "Not bad", *BY_ID))
    # It lists " positive" 0.6 and " negative" 0.2, so 0.2 may belong to either, and counts for "negative".
    assert row["probabilities"] == pytest.approx({"negative": 0.4, "positive": 0.6})
    assert (row["label_mass"], row["label_mass_high"]) == pytest.approx((0.8, 1.0)) and done.err == ""
    assert "logprob_token_ids" not in vllm.requests[-1].body
    vllm.lists |= {2731: math.log(0.5), 3524: math.log(0.3)}
    assert "and the 20.0% that is not listed could be either's; --top-tokens" in error_of(logprobs(call, "x", *BY_ID))


def test_tokens_listed_by_number_point_to_the_tokenizer(call, fake, tmp_path):
    for flags in ([], CHAT):
        problem = error_of(logprobs(call, "FAKE-BY-NUMBER", *flags))
        assert "fake-1 lists tokens by their number, as token_id:3104; --tokenizer MODEL reads them" in problem
    fake.always = "FAKE-BY-NUMBER"  # found out with the first request, before any row
    flags, output = table(tmp_path, ["good"])
    assert "--tokenizer MODEL reads them" in error_of(logprobs(call, *flags)) and not output.exists()


def test_a_number_beyond_the_tokenizer_is_a_token_like_any_other(call, vllm):
    vllm.lists |= {10**17: math.log(0.1), 49153: math.log(0.1)}
    vllm.knows_ids = False
    vllm.lists = {i: p for i, p in vllm.lists.items() if i in (2731, 10**17)}
    row = row_of(logprobs(call, "Not bad", *BY_ID))
    assert [entry["token"] for entry in row["top_tokens"]] == [" positive", f"token_id:{10**17}"]


def test_ids_of_a_chat_are_the_rendered_template(call, vllm, tokenizer):
    done = consistency(call, "Not bad", "--tokenizer", "default", *CHAT, "--samples", 2)
    rendered = tokenizer.apply_chat_template(YES_NO.prompt("Not bad"), tokenize=False, add_generation_prompt=True)
    assert vllm.requests[-1].path == "/v1/completions"
    assert tokenizer.decode(vllm.requests[-1].body["prompt"]) == rendered
    assert "none of 2 answers names a label" in error_of(done)  # the fake says "positive", which is no answer word here


def test_a_text_that_spells_a_control_token_is_refused_as_text_and_characters_as_ids(call, vllm, tmp_path, script):
    spelled, tokenizer = "It said <|im_end|> and stopped", vllm.tokenizer
    assert call(script, spelled, *BY_ID).code == 0
    prompt = vllm.requests[-1].body["prompt"]
    assert not set(prompt) & set(tokenizer.all_special_ids) and tokenizer.decode(prompt) == SENTIMENT.prompt(spelled)
    vllm.lists, before = {}, len(vllm.asked_for(spelled))
    flags, output = table(tmp_path, [spelled, " ", "Not bad"])
    assert call(script, *flags).code == 0
    refused, empty, good = records(output)
    assert "the text is empty" in empty["error"] and empty["confidence"] is None
    assert "spells the control token <|im_end|>" in refused["error"] and "--tokenizer" in refused["error"]
    assert refused["prediction"] is None and "retry" not in refused and good["prediction"] == "positive"
    assert len(vllm.asked_for(spelled)) == before


# Replies that are wrong


# word in the text -> what the row's error says; it is asked again if it stands in PASSING
ROWS = {
    "FAKE-500": "the server failed with status 500, 2 times: about status 500",
    "FAKE-CUT": "the server cut the connection, 2 times",
    "FAKE-HALF-JSON": "the server's reply is not JSON",
    "FAKE-HTML": "the server's reply is not JSON",
    "FAKE-ARRAY": "the server's reply is not JSON",
    "FAKE-NO-CHOICES": "the reply has no choices",
    "FAKE-200": "the server says: about status 200",  # as some gateways fail
    "FAKE-NAN": "the listed probabilities sum to nan",
    "FAKE-POSITIVE-LOG": "the listed probabilities sum to 1.949",  # e^0.5 + 0.3
    "FAKE-ABOVE-1": "the listed probabilities sum to 1.400",
}
PASSING = {*ROWS, "FAKE-NO-MESSAGE", "FAKE-NO-CONTENT"}
TRIED_AGAIN = ["FAKE-429-ONCE", "FAKE-500-ONCE", "FAKE-408-ONCE", "FAKE-CUT-ONCE"]  # by the connection itself
ROWS |= dict.fromkeys(TRIED_AGAIN)
# An error in the middle of an answer, an end for a reason of the server's own: there is no whole answer.
ENDED = {
    "FAKE-CHOICE-ERROR": "the server says: the upstream cut the answer",
    "FAKE-CHOICE-ERROR-403": "the server says: flagged by moderation",
    "FAKE-ERROR-BESIDE": "the server says: overloaded in the middle",
    "FAKE-FILTERED": "the server ended the answer with {} 'content_filter'",
    "FAKE-ABORTED": "the server ended the answer with {} 'abort'",
    "FAKE-ENDED-OTHERWISE": "the server ended the answer with {} 'insufficient_system_resource'",
}
PASSING |= {"FAKE-CHOICE-ERROR", "FAKE-ERROR-BESIDE", "FAKE-ABORTED", "FAKE-ENDED-OTHERWISE"}
ROWS |= {word: problem.format("finish_reason") for word, problem in ENDED.items()}
ROWS |= dict.fromkeys(["FAKE-CHOICE-ERROR-ONCE", "FAKE-ENDED-WELL"])
NOTHING_LISTED = ["FAKE-NO-LOGPROBS", "FAKE-NULL-LOG", "FAKE-HUGE-LOG", "FAKE-ODD-LIST", "FAKE-EMPTY-LIST"]
# The first request has proved that the server gives them.
ROWS |= dict.fromkeys(NOTHING_LISTED, "the reply has no log-probabilities, which fake-1 gave before")
PASSING |= {*NOTHING_LISTED}
# As of a content policy, of a text too long, of a body that is not understood.
ROWS |= {f"FAKE-{n}": f"the server refuses the request: about status {n}" for n in (400, 413, 422)}


@BOTH
def test_a_wrong_reply_is_a_row_with_an_error_and_never_a_number(call, fake, tmp_path, task):
    texts = [text for word in ROWS for text in (f"{word} here", f"good beside {word.lower()}")]
    flags, output = table(tmp_path, texts, "--task", task.name)
    done = logprobs(call, *flags)
    rows, asked_again = records(output), PASSING & {*ROWS}
    assert done.code == 0 and [row["text"] for row in rows] == texts
    assert (
        f"asking again for {len(asked_again) + 1} rows that failed for a passing reason" in done.err
    )  # one comes right
    for (word, problem), row in zip(ROWS.items(), rows[::2], strict=True):
        if problem is None:
            assert row["confidence"] == pytest.approx(SURE), word
            assert len(fake.asked_for(word)) == 1 + word.endswith("-ONCE"), word
            continue
        assert problem in row["error"] and row.get("retry", False) is (word in PASSING), (word, row)
        assert row["prediction"] is row["confidence"] is row["probabilities"] is row["label_mass"] is None, word
    assert [row["confidence"] for row in rows[1::2]] == pytest.approx([SURE] * len(ROWS))
    # When the server is in order again, the same command scores the rows that may pass and leaves all others.
    fake.repaired, before = True, len(fake.requests)
    assert logprobs(call, *flags).code == 0 and len(fake.requests) == before + 2 + len(asked_again)
    for word, row, now in zip(ROWS, rows[::2], records(output)[::2], strict=True):
        assert now["confidence"] == pytest.approx(SURE) if word in asked_again else now == row, word
    assert logprobs(call, *flags).err == ""


SAMPLED = {word: ROWS[word] for word in ("FAKE-500-ONCE", "FAKE-500", "FAKE-CUT", "FAKE-HTML", "FAKE-200", "FAKE-400")}
SAMPLED |= dict.fromkeys(["FAKE-ENDED-WELL", "FAKE-PARTS", "FAKE-THOUGHT"])
SAMPLED["FAKE-NUMBER"] = "is of type int, neither text nor a list of parts with text"
SAMPLED["FAKE-DENIES"] = "none of 3 answers names a label, as 'Not yes.'"
CUT = (
    "none of 3 answers names a label, as '<think>{}'; 3 of 3 answers end inside a thought; --max-tokens gives them more"
)
SAMPLED["FAKE-CUT-THOUGHT"] = CUT.format("Could the answer be Yes")
SAMPLED["FAKE-REASONING"] = CUT.format("Could it be yes? Yes, I")
OF_OPENAI = {"FAKE-NO-MESSAGE": "the reply has no message", "FAKE-NULL": "none of 3 answers names a label"}
OF_OPENAI |= {"FAKE-NO-CHOICES": "the reply has no choices", "FAKE-REFUSAL": "none of 3 answers names a label"}
OF_OPENAI["FAKE-HIDDEN-REASONING"] = CUT.format("")
OF_CLAUDE = {"FAKE-NO-CONTENT": "the reply has no content"}
OF_CLAUDE["FAKE-REFUSAL"] = "the server ended the answer with stop_reason 'refusal'"
PASSING |= {"FAKE-NUMBER"}


@pytest.mark.parametrize("claude", [False, True], ids=["openai", "anthropic"])
def test_a_wrong_answer_is_a_row_with_an_error_and_never_a_vote(call, tmp_path, claude):
    reason = "stop_reason" if claude else "finish_reason"
    words = SAMPLED | {word: problem.format(reason) for word, problem in ENDED.items()}
    words |= OF_CLAUDE if claude else OF_OPENAI
    flags, output = table(tmp_path, words, *(CLAUDE if claude else CHAT), "--samples", 3)
    done = consistency(call, *flags)
    assert done.code == 0 and f"4 of {len(words)} rows scored" in done.out
    cut = 6 if claude else 9
    assert re.search(
        rf"warning: {cut} of \d+ answers end inside a thought; --max-tokens gives them more room", done.out
    )
    for (word, problem), row in zip(words.items(), records(output), strict=True):
        if problem is None:
            assert (row["votes"], row["confidence"]) == ({"negative": 0, "positive": 3}, 1.0)
        else:
            assert problem in row["error"] and row.get("retry", False) is (word in PASSING), (word, row)
            assert row["prediction"] is row["confidence"] is None and row.get("agreement") is None, word


def test_a_server_that_drips_is_given_the_time_of_a_whole_request(call, fake, tmp_path):
    flags, output = table(tmp_path, ["FAKE-DRIP", "Not bad"], "--timeout", 1)
    began = time.monotonic()
    assert logprobs(call, *flags).code == 0
    slow, good = records(output)
    # Two attempts, and two when it is asked again; its reply would take half a minute.
    assert time.monotonic() - began < 15 and len(fake.asked_for("FAKE-DRIP")) == 4
    assert (slow["error"], slow["retry"], slow["confidence"]) == ("no answer within 1 s, 2 times", True, None)
    assert good["confidence"] == pytest.approx(SURE)
    fake.repaired = True
    assert logprobs(call, *flags).code == 0 and records(output)[0]["confidence"] == pytest.approx(SURE)


# What is listed


@BOTH
def test_a_token_that_is_listed_twice_counts_once_and_two_of_one_text_add(call, task):
    # The sampled token, here "negative" 0.3, stands first and again at its rank.
    row = row_of(logprobs(call, "FAKE-TWICE", "--json", "--task", task.name))
    assert row["probabilities"] == pytest.approx({"negative": 1 - SURE, "positive": SURE})
    assert (row["label_mass"], row["label_mass_high"], len(row["top_tokens"])) == (
        pytest.approx(0.9),
        pytest.approx(0.95),
        3,
    )
    row = row_of(logprobs(call, "FAKE-TWO-SPELLINGS", "--json", "--task", task.name))
    # A chat lists both " positive" 0.3 and 0.25; completions keep 0.3 of it, and say of the sampled one 0.55.
    assert row["total_probability"] == pytest.approx(0.55) and row["label_mass"] == pytest.approx(0.75)
    assert row["confidence"] == pytest.approx(0.55 / 0.95)


@BOTH
def test_where_what_is_not_listed_could_change_the_prediction_the_row_is_an_error(call, tmp_path, task):
    flags, output = table(tmp_path, ["FAKE-NEARLY-EVEN", "Not bad"], "--top-tokens", 2, "--task", task.name)
    assert logprobs(call, *flags).code == 0
    even, good = records(output)
    assert even["error"] == (
        "the 2 tokens listed give positive 36.0% and negative 33.0%, and the 31.0% that is not listed could be "
        "either's; --top-tokens lists more"
    )
    assert even["prediction"] is even["confidence"] is None and good["confidence"] == pytest.approx(SURE)
    out = logprobs(call, "Not bad", "--task", task.name).out
    assert re.search(r"P\(negative\) +35.00 %  = 30.00 \"[ \w]+\" \+ 5.00 not listed\n", out)
    assert re.search(r"P\(positive\) +60.00 %  = 60.00 \"[ \w]+\"\n", out)


def test_of_a_completion_the_answer_follows_the_thought(call):
    row = row_of(consistency(call, "FAKE-THOUGHT", "--samples", 3, "--json"))
    assert [answer["answer"] for answer in row["answers"]] == ["positive"] * 3
    problem = error_of(consistency(call, "FAKE-CUT-THOUGHT", "--samples", 3))
    assert "3 of 3 answers end inside a thought; --max-tokens gives them more room" in problem


# A server that is wrong for every row: one line, and no file


TOO_MANY = {"detail": [{"loc": ["logprobs"], "msg": "at most 5"}]}
# path, status and content of every reply to it, and what the line says
WRONG = [
    ("completions", 401, said("Incorrect API key: none."), "refuses the key (401: Incorrect API key: none.)"),
    ("completions", 404, said("No such model."), "has no fake-1 or no such API (404: No such model.)"),
    ("completions", 429, said("quota"), "takes no more requests (429: quota); nothing is lost, repeat the command to"),
    ("completions", 500, b"oops", "failed with status 500, 2 times: oops"),
    ("completions", 418, b"", "answers with status 418: I'm a Teapot"),
    ("completions", 200, b"<html>Log in</html>", "is not JSON; is this the URL of an API?"),
    ("completions", 200, {"choices": [{"text": "x"}]}, "log-probabilities on chat only; use a task with format = "),
    ("completions", 400, said("logprobs are not supported"), "(logprobs are not supported); use Method 2 or --top-tok"),
    ("completions", 422, TOO_MANY, "at most 5"),
    ("models", 401, said("no key"), "refuses the key (401: no key)"),
    ("models", 404, said("not found"), "lists no models; is it the URL of an API? Most end in /v1"),
    ("models", 200, b"<html>", "lists no models"),
    ("models", 200, {"data": [{"id": "a"}, {"id": "b"}]}, "has 2 models; name one with --model: a, b"),
]


@pytest.mark.parametrize(("path", "status", "payload", "problem"), WRONG)
def test_a_server_that_is_wrong_for_every_row_is_one_line_and_no_file(
    call, fake, tmp_path, path, status, payload, problem
):
    # A server that asks for patience until tomorrow is not waited for.
    fake.pages[f"/v1/{path}"] = status, {"Retry-After": "86400" if status == 429 else "0.01"}, payload
    flags, output = table(tmp_path, ["Not bad"])
    assert problem in error_of(logprobs(call, *flags)) and not output.exists()
    assert len(fake.requests) <= 3


BAD_URLS = {
    f"http://user:{KEY}@127.0.0.1:1/v1": "without a key in it",
    f"http://127.0.0.1:1/v1?key={KEY}": "without a key in it",
    "127.0.0.1:8000": "a URL such as http://127.0.0.1:8000/v1, or anthropic",
    "http:///v1": "a URL such as http://127.0.0.1:8000/v1, or anthropic",
    "http://[::1/v1": "--endpoint: Invalid IPv6 URL",
    "http://127.0.0.1:99999/v1": "--endpoint: Port out of range",
    f"http://user:{KEY}/x@127.0.0.1:1/v1": "without a key in it",
    f"http://127.0.0.1:1/v1#{KEY}": "without a key in it",
}


def test_a_wrong_address_is_one_line(call, fake):
    for url, problem in BAD_URLS.items():
        assert problem in error_of(logprobs(call, "Not bad", "--endpoint", url, "--model", "m")), url
    assert fake.requests == []
    url = fake.url.removesuffix("/v1")
    assert "no such path); most end in /v1" in error_of(logprobs(call, "x", "--endpoint", url, "--model", "fake-1"))
    assert "Most end in /v1" in error_of(logprobs(call, "x", "--endpoint", url))
    fake.stop()
    for named in ([], ["--model", "fake-1"]):
        assert f"no server answers at {fake.url}" in error_of(logprobs(call, "x", *named))


LOCAL_FLAGS = ["--load-in-4bit", "--truncate", "--device cpu", "--batch-size 3", "--adapter somewhere"]


@pytest.mark.parametrize("flags", ["--concurrency 0", "--timeout nan", "--top-tokens -1", *LOCAL_FLAGS])
def test_flags_that_do_not_go_together_are_one_line(call, flags):
    assert flags.partition(" ")[0] in error_of(logprobs(call, "Not bad", *flags.split()))


def test_a_redirect_is_not_followed(call, fake):
    other = FakeServer().start()
    for status in (301, 302, 307, 308):
        for path in ("/v1/models", "/v1/completions"):
            fake.pages = {path: (status, {"Location": other.url + path.removeprefix("/v1")}, b"")}
            assert f"{fake.url} answers with status {status}" in error_of(logprobs(call, "Not bad")), path
    other.stop()
    assert other.requests == []


# Parameters that an API rejects


def test_a_rejected_temperature_is_left_out_and_recorded(call, fake, tmp_path):
    # OpenAI's words for its reasoning models.
    fake.rejects = {"temperature": "Unsupported value: 'temperature' does not support 1.0 with this model."}
    flags, output = table(tmp_path, ["FAKE-7-OF-10"])
    done = consistency(call, *flags)
    (row,) = records(output)
    assert done.code == 0 and "note: fake-1 takes no temperature; left out\n" in done.err
    assert row["sampling"] == SENT and row["votes"] == {"negative": 3, "positive": 7} and row["confidence"] == 0.7
    assert all("temperature" not in body and body["top_p"] == 1.0 for body in fake.asked_for("FAKE-7-OF-10"))
    # A file of answers at another temperature would be another file.
    fake.rejects = {}
    assert "was made with other settings" in error_of(consistency(call, *flags))


def test_a_temperature_out_of_range_is_an_error_and_not_left_out(call, fake):
    fake.rejects = {"temperature": "temperature must be between 0 and 2"}
    problem = error_of(consistency(call, "Not bad", "--temperature", 3))
    assert "the server refuses the request: temperature must be between 0 and 2" in problem
    assert len(fake.requests) == 2


def test_a_strict_server_is_sent_what_it_knows(call, fake):
    unknown = ("top_k", "min_p", "repeat_penalty", "repetition_penalty", "seed", "stop")
    fake.rejects = {name: f"Unrecognized request argument supplied: {name}" for name in unknown}
    row = row_of(done := consistency(call, "FAKE-GOES-ON", "--samples", 2, "--json"))
    assert row["sampling"] == {"temperature": 1.0, "top_p": 1.0} and not set(unknown) & set(fake.requests[-1].body)
    assert done.err == "note: fake-1 takes no seed, stop; left out\n"
    # Without `stop` the model goes on to the next text, whose answer is not ours.
    assert row["votes"] == {"negative": 0, "positive": 2} and row["answers"][0]["answer"] == " positive"


def test_max_completion_tokens_takes_the_place_of_max_tokens(call, fake):
    fake.rejects = {"max_tokens": "Unsupported parameter: 'max_tokens'. Use 'max_completion_tokens' instead."}
    assert consistency(call, "Not bad", "--samples", 2, "--max-tokens", 7).code == 0
    body = fake.requests[-1].body
    assert body["max_completion_tokens"] == 7 and "max_tokens" not in body
    # What is known of a model is not tried first.
    fake.rejects = {}
    row = row_of(consistency(call, "Not bad", "--samples", 2, "--model", "gpt-5-mini", "--json", *CHAT))
    bodies = [request.body for request in fake.requests if request.body.get("model") == "gpt-5-mini"]
    assert len(bodies) == 3 and all(body["max_completion_tokens"] == 10 for body in bodies)
    assert not any({"max_tokens", "temperature", "top_p"} & set(body) for body in bodies)
    assert "temperature" not in row["sampling"]


def test_a_parameter_rejected_in_the_middle_of_a_run_is_the_row_s_error(call, fake, tmp_path):
    # What was sent is part of the fingerprint, so it cannot change under way.
    flags, output = table(tmp_path, ["FAKE-TEMPERATURE-400", "good"], "--concurrency", 1)
    assert logprobs(call, *flags).code == 0
    failed, good = records(output)
    assert failed["error"] == "the server refuses the request: no temperature for this text" and "retry" not in failed
    assert good["confidence"] == pytest.approx(SURE) and fake.requests[-1].body["temperature"] == 1.0


def test_a_choice_that_the_server_ignores_is_an_error(call, fake):
    row = row_of(consistency(call, "Not bad", "--choice", "--samples", 2, "--json"))
    assert fake.requests[-1].body["structured_outputs"] == {"choice": ["negative", "positive"]}
    assert row["votes"] == {"negative": 0, "positive": 2}
    fake.obeys_choice, fake.always = False, "FAKE-NULL"
    assert "fake-1 ignores --choice" in error_of(consistency(call, "Not bad", "--choice"))


# The key


def test_a_key_goes_only_where_it_was_named_for(call, fake, monkeypatch):
    named = ["Not bad", "--api-key-env", "MY_KEY"]
    assert logprobs(call, "Not bad").code == 0
    assert all(request.headers["authorization"] == "Bearer none" for request in fake.requests)
    assert "set the environment variable MY_KEY" in error_of(logprobs(call, *named))
    monkeypatch.setenv("MY_KEY", " sk-mine-do-not-show\n")
    done = logprobs(call, *named)
    assert fake.requests[-1].headers["authorization"] == "Bearer sk-mine-do-not-show"
    assert done.code == 0 and "sk-mine" not in done.out + done.err
    for value, problem in {" ": "set the environment", "sk-d\nnot": "no key", "sk-d\u00f6-not": "no key"}.items():
        monkeypatch.setenv("MY_KEY", value)
        line = error_of(logprobs(call, *named))
        assert problem in line and "MY_KEY" in line and "sk-d" not in line
    monkeypatch.delenv("ANTHROPIC_API_KEY")
    assert "set the environment variable ANTHROPIC_API_KEY" in error_of(consistency(call, "Not bad", *CLAUDE))


def test_a_key_never_goes_over_plain_http_to_another_machine(call, fake, monkeypatch):
    named = ["Not bad", "--model", "m", "--api-key-env", "OPENAI_API_KEY", "--endpoint"]
    for host in ("example.org", "10.0.0.7:8000", "127.0.0.1.example.org", "api.openai.com", "[2001:db8::1]"):
        problem = error_of(logprobs(call, *named, f"http://{host}/v1"))
        assert problem == (
            "error: --endpoint: plain http to another machine would show the key to all on the way; use https"
        )
        monkeypatch.setenv("ANTHROPIC_BASE_URL", f"HTTP://{host}")
        assert error_of(consistency(call, "Not bad", *CLAUDE)) == problem.replace("--endpoint", "ANTHROPIC_BASE_URL")
    for host in ("localhost", "127.0.0.1", "127.1.2.3", "[::1]", "me.localhost"):
        assert connect(f"http://{host}:1/v1", "m", "OPENAI_API_KEY").client.api_key == KEY


def test_a_url_of_the_environment_is_checked_as_the_flag_s_and_never_shown(call, fake, monkeypatch):
    secret = "pass-do-not-show"
    for url, problem in {
        f"http://u:{secret}@127.0.0.1:1": "a URL without a key in it",
        f"https://example.org/?key={secret}": "a URL without a key in it",
        "example.org": "a URL such as https://api.anthropic.com",
        "ftp://example.org": "a URL such as https://api.anthropic.com",
        "http://127.0.0.1:99999": "Port out of range",
    }.items():
        monkeypatch.setenv("ANTHROPIC_BASE_URL", url)
        line = error_of(consistency(call, "Not bad", *CLAUDE))
        assert line.startswith(f"error: ANTHROPIC_BASE_URL: {problem}") and secret not in line
    monkeypatch.setenv("ANTHROPIC_BASE_URL", "")
    with connect("anthropic", "claude-haiku-4-5") as server:
        assert server.url == "https://api.anthropic.com"
    assert fake.requests == []


# Proxies


def test_a_server_on_this_machine_is_asked_without_the_environment_s_proxy(call, fake, monkeypatch, script):
    for proxy in ("socks5://127.0.0.1:9", "http://127.0.0.1:9", "nonsense://x"):
        for name in ("ALL_PROXY", "http_proxy"):
            monkeypatch.setenv(name, proxy)
        assert call(script, "Not bad").code == 0


def test_a_proxy_that_cannot_be_used_is_named_by_its_variable(call, fake, monkeypatch):
    monkeypatch.delenv("ANTHROPIC_BASE_URL")
    monkeypatch.setitem(sys.modules, "socksio", None)  # as where it is not installed
    asked = ["Not bad", "--endpoint", "anthropic", "--model", "m", *CHAT]
    monkeypatch.setenv("ALL_PROXY", "socks5://u:pass-do-not-show@127.0.0.1:9")
    line = error_of(consistency(call, *asked))
    assert (
        "variable ALL_PROXY names a SOCKS proxy, for which the package socksio is missing: pip install socksio" in line
    )
    assert "pass-do" not in line
    monkeypatch.setenv("ALL_PROXY", "nonsense://u:pass-do-not-show@x")
    line = error_of(consistency(call, *asked))
    assert "variable ALL_PROXY names no proxy that can be used" in line and "pass-do" not in line
    with pytest.raises(ValueError, match="variable ALL_PROXY names no proxy"):
        connect("https://example.org/v1", "m")
    assert fake.requests == []


@pytest.mark.parametrize("padding", [0, 280])
def test_a_server_that_repeats_the_key_does_not_show_it(call, fake, tmp_path, padding):
    # The fixture `call` searches all that is written. A long message is cut, which may be in the middle of the key.
    fake.shown_key = True
    named = ["--api-key-env", "OPENAI_API_KEY"]
    for path in ("/v1/models", "/v1/completions"):
        fake.pages = {path: (401, {}, said("x" * padding + f" wrong key: {KEY} is not valid"))}
        problem = error_of(logprobs(call, "Not bad", *named))
        assert "sk-do" not in problem and ("[redacted]" in problem or padding)
    fake.pages = {}
    flags, output = table(tmp_path, ["FAKE-400", "FAKE-500", "good"], *named)
    assert logprobs(call, *flags).code == 0
    assert all("asked with Bearer [redacted]" in row["error"] for row in records(output)[:2])


def test_no_exception_and_no_repr_holds_the_key(fake):
    fake.shown_key = True
    with connect(fake.url, api_key_env="OPENAI_API_KEY") as server:
        assert KEY not in repr(server) + repr(server.identity)
        for word, kind in {"FAKE-400": ValueError, "FAKE-500": PassingError, "FAKE-401": OSError}.items():
            with pytest.raises(kind) as caught:
                server.wait(server.first_token(SENTIMENT.prompt(word)))
            assert KEY not in "".join(traceback.format_exception(caught.value)) + repr(caught.value)
    assert KEY in fake.requests[-1].headers["authorization"]


def test_openai_itself_gets_its_key_and_only_the_parameters_it_knows(monkeypatch):
    # Nothing is sent: a model that is named is not looked up.
    with connect("https://api.openai.com/v1/", model="gpt-4o") as server:
        assert (server.client.api_key, server.url) == (KEY, "https://api.openai.com/v1")
        assert server.sent(temperature=1.0) == {"temperature": 1.0, "top_p": 1.0}
    with connect("https://api.anthropic.com/v1", model="claude-haiku-4-5") as server:  # which speaks both protocols
        assert server.client.api_key == KEY
    for url in ("https://api.openai.com.example.org/v1", "https://example.org/api.openai.com", "HTTP://api.openai.com"):
        with connect(url, model="gpt-4o") as server:
            assert KEY not in repr(server.client.default_headers) + repr(server.client.auth_headers)
    monkeypatch.delenv("OPENAI_API_KEY")
    with pytest.raises(ValueError, match="set the environment variable OPENAI_API_KEY"):
        connect("https://api.openai.com/v1", model="gpt-4o")


# Many at a time


def test_as_many_requests_as_allowed_run_at_a_time_and_never_more(call, fake, tmp_path):
    fake.together = threading.Barrier(3)  # with fewer than three at a time no row gets an answer
    flags, output = table(tmp_path, [f"row {i}" for i in range(12)], "--concurrency", 3)
    assert logprobs(call, *flags).code == 0
    assert [row["confidence"] for row in records(output)] == pytest.approx([SURE] * 12) and fake.most == 3
    row = row_of(consistency(call, "row 0", "--samples", 9, "--concurrency", 3, "--json"))
    assert row["votes"] == {"negative": 0, "positive": 9} and fake.most == 3


def test_rows_keep_their_order_and_content_though_replies_come_in_another(call, fake, tmp_path, script):
    # Of two at a time the first waits for the fourth, which is asked for when the second and the third are done.
    texts = [f"FAKE-SEEDED row {i}" for i in range(6)] + ["FAKE-400"]
    flags, output = table(tmp_path, texts)
    answers = 2 if script is consistency_confidence else 1  # asked for a row, each in a request
    flags += ["--samples", answers] if answers > 1 else []
    one_by_one = unbroken(call, script, tmp_path, [*flags, "--concurrency", 1])
    fourth = threading.Event()
    fake.hold, fake.frees = {"row 0": fourth}, {"row 3": fourth}
    assert call(script, *flags, "--concurrency", 2 * answers).code == 0 and fourth.is_set()
    assert [(row["id"], row["text"]) for row in records(output)] == [(str(i), t) for i, t in enumerate(texts, 1)]
    assert output.read_bytes() == one_by_one


# Runs that end before their time


def test_a_server_that_stops_loses_nothing_and_the_same_command_goes_on(call, fake, tmp_path, script):
    flags, output = table(tmp_path, [f"FAKE-SEEDED {i}" for i in range(20)], "--concurrency", 2)
    flags += ["--samples", 3] if script is consistency_confidence else []
    whole = unbroken(call, script, tmp_path, flags)
    fake.dies_at = sum(bool(request.body) for request in fake.requests) + 16
    problem = error_of(call(script, *flags))
    assert problem == f"error: no server answers at {fake.url}; nothing is lost, repeat the command to continue"
    begun = output.read_bytes()
    assert whole.startswith(begun) and begun.endswith(b"\n") and 0 < len(begun) < len(whole)
    fake.start()
    assert call(script, *flags).code == 0 and output.read_bytes() == whole


def test_twenty_failures_in_a_row_stop_the_run(call, fake, tmp_path, script):
    texts = ["good 0", "good 1"] + [f"FAKE-500 {i}" for i in range(40)]
    flags, output = table(tmp_path, texts, "--concurrency", 2)
    flags += ["--samples", 2] if script is consistency_confidence else []
    problem = error_of(call(script, *flags))
    assert "20 requests in a row failed, the last because the server failed with status 500" in problem
    assert problem.endswith("nothing is lost, repeat the command to continue")
    rows = records(output)
    assert [row["prediction"] for row in rows[:2]] == ["positive"] * 2 and 2 < len(rows) < 22
    assert all(row["retry"] and row["confidence"] is None for row in rows[2:])
    fake.repaired = True
    done = call(script, *flags)
    assert done.code == 0 and f"asking again for {len(rows) - 2} rows" in done.err
    assert output.read_bytes() == unbroken(call, script, tmp_path, flags)


def start(script, flags, fake, when):
    """A script as a process of its own, that has caused `when` to be true."""
    command = [sys.executable, f"{script.__name__}.py", *map(str, flags), "--endpoint", fake.url]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    end = time.monotonic() + TOO_LATE_S
    while not when():
        assert time.monotonic() < end and process.poll() is None
        time.sleep(0.02)
    return process


def interrupt(process):
    """Ctrl-C: (stdout, stderr, exit code) of a process that must end by itself, soon."""
    process.send_signal(signal.SIGINT)
    try:
        return (*process.communicate(timeout=20), process.returncode)
    finally:
        process.kill()
        process.communicate()


def test_ctrl_c_ends_a_run_at_once_and_the_same_command_goes_on(call, fake, tmp_path, script):
    flags, output = table(tmp_path, ["good 0", "good 1", *(f"slow {i}" for i in range(12))])
    fake.hold = {"slow": threading.Event()}
    is_under_way = lambda: output.exists() and output.read_bytes().count(b"\n") == 2 and fake.asked_for("slow")  # noqa: E731
    assert interrupt(start(script, flags, fake, is_under_way)) == ("", STOPPED, 130)
    assert [row["text"] for row in records(output)] == ["good 0", "good 1"]
    fake.hold["slow"].set()
    whole = unbroken(call, script, tmp_path, flags)
    assert call(script, *flags).code == 0 and output.read_bytes() == whole


def test_ctrl_c_before_the_first_reply_leaves_no_file_and_no_noise(fake, tmp_path):
    flags, output = table(tmp_path, ["good 0"])
    fake.hold = {"A text.": threading.Event()}
    process = start(logprobs_confidence, flags, fake, lambda: fake.asked_for("A text."))
    assert interrupt(process) == ("", STOPPED, 130) and not output.exists()


# What a fingerprint must know


def test_the_fingerprint_follows_the_server_the_model_and_how_it_is_asked(call, vllm):
    plain = row_of(logprobs(call, "Not bad", *BY_ID))["fingerprint"]
    there = vllm.url.replace("127.0.0.1", "localhost") + "/"
    flags = [[], ["--model", "other"], ["--top-tokens", 5], ["--endpoint", there], ["--concurrency", 1]]
    vllm.lists = {}
    text = [row_of(logprobs(call, "Not bad", "--json", *more))["fingerprint"] for more in flags]
    assert len({plain, *text}) == 4  # ids, text, another model, another list
    assert text[3] == text[4] == text[0]  # this machine's other name, or fewer at a time, asks for nothing else
    identities = []
    for name in ("one", "another"):  # another tokenizer gives other ids
        with connect(vllm.url, "m", reader=SimpleNamespace(name=name)) as server:
            identities.append(server.identity)
    assert identities[0] != identities[1]


# Servers as they are


def test_a_neutral_value_that_a_server_refuses_is_put_in_its_own_words_or_left_out(call, fake):
    # SGLang's words about top_k; a server that knows a range of min_p in which ours is not.
    fake.refuses = {
        "top_k": (0, "top_k must be -1 (disable) or at least 1, got 0."),
        "min_p": (0.0, "min_p must be between 0.01 and 1"),
    }
    for script in (logprobs_confidence, consistency_confidence):
        done = call(script, "Not bad", "--json")
        body = fake.requests[-1].body
        assert (done.code, body["top_k"]) == (0, -1) and "min_p" not in body and body["top_p"] == 1.0, done
    sampling = row_of(done)["sampling"]
    assert sampling["top_k"] == -1 and "min_p" not in sampling
    # Where no value will do the parameter goes.
    fake.refuses, fake.rejects = {}, {"top_k": "top_k is greater than what this server takes"}
    assert logprobs(call, "Not bad").code == 0 and "top_k" not in fake.requests[-1].body


@BOTH
def test_a_shorter_list_is_taken_unless_a_longer_one_was_asked_for(call, fake, task):
    fake.most_listed = 5
    done = logprobs(call, "Not bad", "--json", "--task", task.name)
    assert row_of(done)["confidence"] == pytest.approx(SURE) and "note: fake-1 lists at most 5 tokens\n" in done.err
    body = fake.requests[-1].body
    assert (body.get("top_logprobs") or body["logprobs"]) == 5
    problem = error_of(logprobs(call, "Not bad", "--top-tokens", 20, "--task", task.name))
    assert "fake-1 lists at most 5 tokens, --top-tokens asks for 20" in problem
    assert "give --top-tokens 5, or use Method 2" in problem
    # As vLLM says it, with both numbers.
    fake.most_listed, fake.too_long = 7, "Requested sample logprobs of 20, which is greater than max allowed: {}"
    assert "lists at most 7 tokens" in logprobs(call, "Not bad", "--task", task.name).err


def test_a_server_that_gives_log_probabilities_on_chat_only_is_asked_in_chat(call, fake):
    fake.chat_only = True
    problem = error_of(logprobs(call, "Not bad"))
    assert "gives log-probabilities on chat only; use a task with format" in problem and "sentiment-yes-no" in problem
    assert logprobs(call, "Not bad", *CHAT).code == 0 and consistency(call, "Not bad").code == 0
    fake.always = "FAKE-NO-LOGPROBS"  # on chat neither
    assert "no log-probabilities; use Method 2, consistency_conf" in error_of(logprobs(call, "Not bad"))


SWITCHES = [
    {"chat_template_kwargs": {"enable_thinking": False}},
    {"reasoning_effort": "none"},
    {"thinking": {"type": "disabled"}},
]


@pytest.mark.parametrize("number", range(3), ids=["vllm", "openai", "deepseek"])
def test_thinking_is_turned_off_by_the_switch_that_the_server_has(call, fake, number, script):
    fake.thinks_unless = SWITCHES[number]
    fake.rejects = {name: f"Unknown parameter: {name}" for switch in SWITCHES[:number] for name in switch}
    done = call(script, "Not bad", *CHAT, "--json")
    (name,) = SWITCHES[number]
    assert row_of(done)["prediction"] == "positive" and f"note: the thinking of fake-1 is off, by {name}\n" in done.err
    assert fake.requests[-1].body[name] == SWITCHES[number][name]
    # What was sent is part of the fingerprint.
    thinking = row_of(done)["fingerprint"]
    fake.thinks_unless, fake.rejects = None, {}
    assert row_of(call(script, "Not bad", *CHAT, "--json"))["fingerprint"] != thinking


def test_a_model_that_cannot_but_think_is_for_method_2(call, fake):
    fake.thinks_unless = {"no such": "switch"}
    assert "no switch of its API turns that off; use Method 2" in error_of(logprobs(call, "Not bad", *CHAT))
    problem = error_of(consistency(call, "Not bad", *CHAT, "--samples", 2))
    assert "2 of 2 answers end inside a thought; --max-tokens gives them more room" in problem


def test_azure_s_addresses_and_keys(call, fake, monkeypatch):
    # Its older addresses name a version in a query; the newer ones end in /openai/v1. The key has a header of its own.
    for url in (fake.url + "?api-version=2024-10-21", fake.url):
        assert logprobs(call, "Not bad", "--endpoint", url, "--model", "fake-1").code == 0
    assert {request.path for request in fake.requests} == {"/v1/completions?api-version=2024-10-21", "/v1/completions"}
    assert "without a key in it" in error_of(logprobs(call, "x", "--endpoint", fake.url + "?api-version=1&key=2"))
    monkeypatch.setenv("AZURE_OPENAI_API_KEY", "azure-key")
    with connect("https://mine.openai.azure.com/openai/deployments/gpt-4o-mini?api-version=2024-10-21") as server:
        assert server.model == "gpt-4o-mini" and "top_k" in server.rejected
        assert server.connections[0].secret == "azure-key"
    monkeypatch.setattr(server_connections, "AZURE", ("127.0.0.1",))
    assert logprobs(call, "Not bad", "--model", "fake-1", "--api-key-env", "AZURE_OPENAI_API_KEY").code == 0
    headers = fake.requests[-1].headers
    assert headers["api-key"] == "azure-key" and "authorization" not in headers


# A model by its name, on whatever servers


@pytest.fixture
def named(monkeypatch, tmp_path):
    """--served-as, remembered in a folder of the test's."""
    monkeypatch.setattr("served_identity.cache_dir", lambda: tmp_path / "cache")
    return ["--served-as", "my-model"]


@pytest.fixture
def other(fake):
    """A second server of the same model."""
    other = FakeServer().start()
    yield other
    other.stop()


def test_another_server_of_the_same_name_continues_the_file(call, fake, other, named, tmp_path, script):
    flags, output = table(tmp_path, ["FAKE-500 one", "two"], *named)
    assert call(script, *flags).code == 0
    before = [row["fingerprint"] for row in records(output)]
    other.repaired = True
    assert call(script, *flags, "--endpoint", other.url).code == 0
    rows = [(row["prediction"], row["model"], row["fingerprint"]) for row in records(output)]
    assert rows == [("positive", "my-model", fingerprint) for fingerprint in before]
    assert call(script, *flags, "--served-as", "another").code == 2  # another identity


def test_another_model_of_the_same_name_is_refused(call, fake, other, named):
    assert logprobs(call, "Not bad", *named).code == 0
    assert logprobs(call, "Not bad", *named, "--endpoint", other.url).code == 0
    other.always = "FAKE-NEGATIVE"  # lists positive 0.2, where it was 0.6
    for method in (logprobs, consistency):
        problem = error_of(method(call, "Not bad", *named, "--endpoint", other.url))
        assert f"{other.url} serves another model than my-model was: a probability differs by 0.40" in problem
    # With another task, or of a server that lists nothing, there is nothing to compare with.
    assert consistency(call, "Not bad", *named, *CHAT, "--endpoint", other.url).code == 0
    done = consistency(call, "Not bad", *named, *CLAUDE)
    assert done.code == 0 and "serves my-model cannot be checked" in done.err


def test_requests_are_spread_over_servers_and_one_that_dies_is_left_out(call, fake, other, named, tmp_path, script):
    texts = [f"text {number}" for number in range(60)]
    flags, output = table(tmp_path, texts, *named, "--endpoint", fake.url, "--endpoint", other.url)
    flags += ["--samples", 3] if script is consistency_confidence else []
    other.dies_at = 15
    done = call(script, *flags, "--concurrency", 4)
    assert done.code == 0 and done.err.count(f"no server answers at {other.url} any more; it is left out") == 1
    assert [row["prediction"] for row in records(output)] == ["positive"] * 60
    assert min(len([r for r in one.requests if r.body]) for one in (fake, other)) >= 15
    # One that is not there at the beginning is left out too; without any the run stops, and the command continues it.
    output.unlink()
    assert call(script, *flags).code == 0 and len(records(output)) == 60
    fake.dies_at = len([r for r in fake.requests if r.body]) + 25
    output.unlink()
    done = call(script, *flags)
    assert (
        done.code == 2 and "no server answers any more, of" in done.err and "repeat the command to continue" in done.err
    )
    finished = len(records(output)) if output.exists() else 0  # Method 2 may not have come to the end of a row
    fake.start()
    assert call(script, *flags).code == 0
    rows = records(output)
    assert finished < 60 and len(rows) == 60 and all(row["prediction"] for row in rows)


def test_several_servers_need_one_name(call, fake, other, named):
    both = ["--endpoint", fake.url, "--endpoint", other.url]
    assert "--served-as" in error_of(logprobs(call, "x", *both))
    other.pages["/v1/models"] = 200, {}, {"data": [{"id": "fake-2"}]}
    assert f"fake-2 at {other.url}; name one with --model" in error_of(logprobs(call, "x", *both, *named))
    assert "spreads its requests itself" in error_of(logprobs(call, "x", *both, "--endpoint", "anthropic", *named))


# What it costs


def test_equal_texts_are_asked_once_and_what_failed_is_asked_again(call, fake, tmp_path, script):
    texts = ["alike", "FAKE-500-ONCE x", "alike", "other", "FAKE-500-ONCE x", "alike"]
    flags, output = table(tmp_path, texts)
    assert call(script, *flags).code == 0
    rows = records(output)
    assert [row["text"] for row in rows] == texts and all(row["prediction"] == "positive" for row in rows)
    times = 10 if script is consistency_confidence else 1
    assert len(fake.asked_for("alike")) == len(fake.asked_for("other")) == times
    if script is consistency_confidence:
        assert rows[0]["answers"] == rows[2]["answers"] == rows[5]["answers"]


def test_a_table_s_cost_is_known_before_anything_is_sent(call, fake, tmp_path, tokenizer):
    flags, output = table(tmp_path, ["one", "two words", "one", " "], "--dry-run")
    prices = ["--price-in", 2, "--price-out", 8]
    done = logprobs(call, *flags)
    assert (done.code, fake.requests) == (0, []) and not output.exists()
    assert "4 rows, 3 different texts: 3 requests" in done.out and "tokens: not known; --tokenizer MODEL" in done.out
    counted = sum(len(tokenizer(SENTIMENT.prompt(text))["input_ids"]) for text in ("one", "two words"))
    done = logprobs(call, *flags, "--tokenizer", "default", *prices)
    assert "2 different texts: 2 requests" in done.out and f"tokens: {counted} in, 2 out" in done.out
    done = consistency(call, *flags, "--tokenizer", "default", "--samples", 5, "--max-tokens", 3, *prices)
    assert "10 requests" in done.out and f"tokens: {5 * counted:,} in, 30 out" in done.out
    assert f"cost: ${(5 * counted * 2 + 30 * 8) / 1e6:.2f}" in done.out
    done = consistency(call, *flags, "--tokenizer", "default", "--adaptive", "--samples", 9)
    assert "8 to 18 requests" in done.out and fake.requests == []


def test_a_table_s_cost_is_estimated_from_rows_that_are_asked_when_told(call, fake, tmp_path):
    flags, output = table(tmp_path, [f"text {number}" for number in range(1000)])
    done = logprobs(call, *flags, "--dry-run", 4, "--price-in", 2, "--price-out", 8)
    assert done.code == 0 and len(fake.asked_for("text ")) == 4 and not output.exists()
    assert "tokens: 10,000 in, 2,000 out (about, by what the server says that 4 texts took)" in done.out
    assert "cost: $0.04\n" in done.out  # 10,000 x 2 / 1e6 + 2,000 x 8 / 1e6
    assert "--dry-run is of a table" in error_of(logprobs(call, "x", "--dry-run"))


def test_what_a_run_took_is_summed_at_its_end(call, fake, tmp_path, script):
    flags, _ = table(tmp_path, ["one", "two"], "--price-in", 1e5, "--price-out", 0)
    done, times = call(script, *flags), 10 if script is consistency_confidence else 1
    requests = 2 * times + 1  # one to learn what it takes
    assert f"  {requests} requests, {10 * requests} tokens in, {2 * requests} out, ${requests:.2f}\n" in done.out
    done = consistency(call, *flags[:2], "--output", tmp_path / "claude.jsonl", *CLAUDE, "--samples", 2)
    assert "  5 requests, 55 tokens in, 15 out\n" in done.out


def test_a_slow_server_is_asked_again_and_then_an_error_of_the_row(call, fake, tmp_path):
    fake.hold = {"FAKE-SLOW": threading.Event()}
    flags, output = table(tmp_path, ["FAKE-SLOW", "Not bad"], "--timeout", 0.5)
    assert logprobs(call, *flags).code == 0
    slow, good = records(output)
    assert (slow["error"], slow["retry"], slow["confidence"]) == ("no answer within 0.5 s, 2 times", True, None)
    assert good["confidence"] == pytest.approx(SURE)


def test_localhost_and_127_0_0_1_are_one_address(call, fake):
    there = fake.url.replace("127.0.0.1", "localhost")
    first, second = (row_of(logprobs(call, "x", "--json", "--endpoint", url)) for url in (fake.url, there))
    assert first["fingerprint"] == second["fingerprint"]
