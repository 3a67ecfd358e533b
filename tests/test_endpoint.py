"""endpoint.py, and Methods 1 and 2 over it, against a fake server that speaks both protocols and misbehaves on demand.

The fake listens on 127.0.0.1, keeps all it is sent, and reads in a row's text what to do: "FAKE-500" fails with status
500, "FAKE-500-ONCE" only the first time. Without such a word it lists positive 0.6, negative 0.3 and something else
0.05, so that P(positive) is 2/3 of a label mass of 0.9, which may be 0.95; and it answers "positive" or "Yes".
"""

import csv
import json
import math
import os
import re
import resource
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from functools import lru_cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest

import command_line
import consistency_confidence
import endpoint
import logprobs_confidence
import predictions
from endpoint import PassingError, connect
from llama import load_reader
from task import TASKS

ROOT = Path(__file__).parent.parent
SENTIMENT, YES_NO = TASKS["sentiment"], TASKS["sentiment-yes-no"]
KEY, ORGANIZATION, PROJECT = "sk-do-not-show-this", "org-do-not-show", "proj-do-not-show"
TOO_LATE_S = 30  # what the fake waits for at most, so that a test that is wrong ends

# What a word in a text makes the fake list: log-probabilities of positive, negative and something else.
LISTS = {
    "": {"+": math.log(0.6), "-": math.log(0.3), "?": math.log(0.05)},
    "FAKE-MISSING": {"+": math.log(0.7), "?": math.log(0.1)},
    "FAKE-NOT-COMPUTED": {"+": math.log(0.7), "-": -9999.0, "?": math.log(0.1)},
    "FAKE-UNDECIDED": {"+": math.log(0.3), "?": math.log(0.3)},
    "FAKE-NEITHER": {"?": math.log(0.9)},
    "FAKE-NAN": {"+": math.nan, "-": math.log(0.3), "?": math.log(0.05)},
    "FAKE-POSITIVE-LOG": {"+": 0.5, "-": math.log(0.3)},
    "FAKE-ABOVE-1": {"+": math.log(0.9), "-": math.log(0.5)},
    "FAKE-NULL-LOG": {"+": None, "-": math.log(0.3)},
    "FAKE-HUGE-LOG": {"+": 10**400},
    "FAKE-EMPTY-LIST": {},
}
SPELT = {False: {"+": " positive", "-": " negative", "?": " mixed"}, True: {"+": "Yes", "-": "No", "?": "Maybe"}}


@dataclass
class Request:
    path: str
    headers: dict
    body: dict
    text: str


@dataclass
class Fake:
    """A server of one model. What a single row is to meet stands in its text, what concerns all requests here."""

    requests: list = field(default_factory=list)
    pages: dict = field(default_factory=dict)  # path -> (status, headers, payload) whatever is asked
    rejects: dict = field(default_factory=dict)  # parameter -> what a 400 says about it
    always: str = ""  # a word that counts as if it stood in every text
    mended: bool = False  # no word counts
    lists: dict = field(default_factory=dict)  # token id -> log-probability: it lists by id, as vLLM does
    tokenizer: object = None
    obeys_choice: bool = True
    hold: dict = field(default_factory=dict)  # word in a text -> the event that its reply waits for
    frees: dict = field(default_factory=dict)  # word in a text -> the event that its reply sets
    together: threading.Barrier | None = None  # so many requests are answered together or not at all
    dies_at: float = math.inf  # the number of the request at which the server stops
    shown_key: bool = False  # whether the test lets it have the key
    port: int = 0

    def __post_init__(self):
        self.lock, self.asked, self.busy, self.most, self.dead = threading.Lock(), Counter(), 0, 0, True

    def start(self):
        self.dead, self.dies_at = False, math.inf
        self.server = Server(("127.0.0.1", self.port), Handler)
        self.server.fake, self.port = self, self.server.server_port
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True)
        self.thread.start()
        return self

    def stop(self):
        if not self.dead:
            self.dead = True
            self.server.shutdown()
            self.server.server_close()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.port}/v1"

    def asked_for(self, word):
        """The bodies of the requests with this word in their text."""
        return [request.body for request in self.requests if word in request.text]

    def text_of(self, body):
        """The text of the row in a prompt: what stands after the last "Text: "."""
        prompt = body["messages"][-1]["content"] if "messages" in body else body.get("prompt", "")
        if isinstance(prompt, list):
            prompt = self.tokenizer.decode(prompt)
        return prompt.rpartition("Text: ")[2].partition("\nSentiment:")[0]

    def reply(self, request, times):
        """(status, headers, payload) for a request whose text came `times` times before."""
        word = (re.findall(r"FAKE-[A-Z0-9-]+", request.text + self.always) or [""])[0]
        if word.endswith("-ONCE"):
            word = "" if times else word.removesuffix("-ONCE")
        if request.path in self.pages:
            return self.pages[request.path]
        if request.path == "/v1/models":
            return 200, {}, {"data": [{"id": "fake-1"}]}
        if request.path not in ("/v1/completions", "/v1/chat/completions", "/v1/messages"):
            return 404, {}, said("no such path")
        if rejected := [text for name, text in self.rejects.items() if name in request.body]:
            return 400, {}, said(rejected[0])
        word = "" if self.mended else word
        if status := re.fullmatch(r"FAKE-(\d{3})", word):
            words = f"about status {status[1]}, asked with {request.headers.get('authorization')}"
            return int(status[1]), {"Retry-After": "0.01"}, said(words)
        if word == "FAKE-TEMPERATURE-400":
            return 400, {}, said("no temperature for this text")
        return 200, {}, spoil(word, self.good_reply(request, word, times))

    def good_reply(self, request, word, times):
        """A reply as the real servers write it."""
        body, chat = request.body, request.path != "/v1/completions"
        answer = answered(word, times, body, chat)
        if self.obeys_choice and "structured_outputs" in body:
            answer = body["structured_outputs"]["choice"][-1]
        if request.path == "/v1/messages":
            return {"content": [{"type": "text", "text": answer}], "stop_reason": "end_turn"}
        listed = {SPELT[chat][name]: log for name, log in LISTS.get(word, LISTS[""]).items()}
        if self.lists:
            top_two = sorted(self.lists, key=self.lists.get)[-2:]
            ids = [*body["logprob_token_ids"], SAMPLED_ID] if "logprob_token_ids" in body else top_two
            listed = {f"token_id:{i}": self.lists[i] for i in ids}
            listed |= {"token_id:3524": -9999.0} if word == "FAKE-NOT-COMPUTED" else {}
        pairs = [{"token": token, "logprob": log} for token, log in listed.items()]
        if not chat:
            return {"choices": [{"text": answer, "logprobs": {"top_logprobs": [listed]}}]}
        logprobs = {"content": [{"token": answer, "logprob": -0.1, "top_logprobs": pairs}]}
        return {"choices": [{"message": {"role": "assistant", "content": answer}, "logprobs": logprobs}]}


def said(message):
    return {"error": {"message": message, "type": "invalid_request_error"}}


def answered(word, times, body, chat):
    """What the model samples: by default always the same; what a word asks for depends on the answer's number."""
    yes, no = ("Yes", "No") if chat else (" positive", " negative")
    if word == "FAKE-SEEDED":
        return yes if body.get("seed", 0) % 3 else no
    return {
        "FAKE-7-OF-10": yes if times < 7 else no,
        "FAKE-3-OF-4": "I could not say" if times == 1 else yes,
        "FAKE-GOES-ON": " positive\nText: Awful.\nSentiment: negative",
    }.get(word, yes)


def spoil(word, reply):
    """A good reply as a word in the text wants it: another object, or bytes."""
    choice = reply.get("choices", [{}])[0]
    match word:
        case "FAKE-HTML":
            return b"<!doctype html><title>Log in</title>"
        case "FAKE-HALF-JSON":
            return json.dumps(reply).encode()[:40]
        case "FAKE-ARRAY":
            return [reply]
        case "FAKE-CUT":
            return None
        case "FAKE-NO-CHOICES":
            return {"choices": []}
        case "FAKE-NO-LOGPROBS":
            choice["logprobs"] = None
        case "FAKE-ODD-LIST" if "message" in choice:
            choice["logprobs"]["content"][0]["top_logprobs"][0]["token"] = 5
        case "FAKE-ODD-LIST":
            choice["logprobs"]["top_logprobs"] = [[" positive", -0.5]]
        case "FAKE-NO-MESSAGE":
            del choice["message"]
        case "FAKE-NO-CONTENT":
            del reply["content"]
        case "FAKE-NULL" if "message" in choice:
            choice["message"]["content"] = None
        case "FAKE-NULL":
            choice["text"] = None
        case "FAKE-REFUSAL" if "message" in choice:
            # Read as an answer, this would be a "no".
            choice["message"] = {"role": "assistant", "content": None, "refusal": "No, I can't help with that."}
        case "FAKE-REFUSAL":
            return {"content": [], "stop_reason": "refusal"}
        case "FAKE-THINKING":
            reply["content"].insert(0, {"type": "thinking", "thinking": "No? The text is kind.", "signature": "x"})
    return reply


class Server(ThreadingHTTPServer):
    request_queue_size = 100

    def handle_error(self, *_):
        pass  # a client that left


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, *_):
        pass

    def do_GET(self):
        self.handle_request({})

    def do_POST(self):
        self.handle_request(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

    def handle_request(self, body):
        fake = self.server.fake
        headers = {name.lower(): value for name, value in self.headers.items()}
        request = Request(self.path, headers, body, fake.text_of(body))
        with fake.lock:
            times = fake.asked[request.text]
            fake.asked[request.text] += 1
            fake.requests.append(request)
            fake.busy += 1
            fake.most = max(fake.most, fake.busy)
            last = sum(bool(request.body) for request in fake.requests) >= fake.dies_at
        if last:
            fake.stop()
        for word, event in fake.hold.items():
            if word in request.text:
                event.wait(TOO_LATE_S)
        status, headers, payload = self.fake_reply(fake, request, times)
        with fake.lock:  # before the client has the reply and can send its next request
            fake.busy -= 1
        with suppress(OSError):  # the client may have left
            self.send(status, headers, None if fake.dead else payload)
        for word, event in fake.frees.items():
            if word in request.text:
                event.set()

    def fake_reply(self, fake, request, times):
        if fake.together and "row" in request.text:
            try:
                fake.together.wait(TOO_LATE_S)
            except threading.BrokenBarrierError:
                return 400, {}, said("too few requests at a time")
            time.sleep(0.05)  # in which one more than allowed would come
        return fake.reply(request, times)

    def send(self, status, headers, payload):
        """Send a reply; None is one whose connection is cut in its middle."""
        data = payload if isinstance(payload, bytes) else json.dumps(payload).encode()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data) + (payload is None)))
        self.end_headers()
        self.wfile.write(data)
        self.close_connection = payload is None


cached_reader = lru_cache(load_reader)


@pytest.fixture(autouse=True)
def environment(monkeypatch, tmp_path):
    """An environment with keys in it; quick clients that wait little between their attempts and trust no other host."""
    for script in (logprobs_confidence, consistency_confidence):
        monkeypatch.setattr(script, "load_reader", cached_reader)
    for name in [name for name in os.environ if re.search("proxy|openai|anthropic|ssl_cert", name, re.I)]:
        monkeypatch.delenv(name)
    for name in ("OPENAI_API_KEY", "OPENAI_ADMIN_KEY", "ANTHROPIC_API_KEY"):
        monkeypatch.setenv(name, KEY)
    monkeypatch.setenv("OPENAI_CUSTOM_HEADERS", f"Authorization: Bearer {KEY}")
    monkeypatch.setenv("OPENAI_ORG_ID", ORGANIZATION)
    monkeypatch.setenv("OPENAI_PROJECT_ID", PROJECT)
    monkeypatch.setenv("SSL_CERT_DIR", str(tmp_path))  # an empty one is read in no time
    monkeypatch.setattr(endpoint, "RETRIES", 1)
    monkeypatch.setattr("openai._base_client.INITIAL_RETRY_DELAY", 0.01)


@pytest.fixture
def fake(environment, monkeypatch):
    """A running fake; when the test is over it must not have seen what it was not to see."""
    fake = Fake().start()
    monkeypatch.setenv("ANTHROPIC_BASE_URL", fake.url.removesuffix("/v1"))
    yield fake
    for event in fake.hold.values():
        event.set()
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


def logprobs(call, *arguments):
    return call(logprobs_confidence, *arguments)


def consistency(call, *arguments):
    return call(consistency_confidence, *arguments)


def error_of(done):
    """The one line of a command that failed."""
    assert (done.code, done.out, done.err.count("error: ")) == (2, "", 1), done
    last = done.err.splitlines()[-1]
    assert last.startswith("error: ")
    return last


def write_csv(path, texts):
    with open(path, "w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([("text", "label"), *((text, "positive") for text in texts)])
    return path


def records(path):
    return [json.loads(line) for line in Path(path).read_bytes().splitlines()]


def table(tmp_path, texts, *flags):
    """The flags for a table of texts, and the file they write."""
    output = tmp_path / "p.jsonl"
    return ["--input", write_csv(tmp_path / "t.csv", texts), "--output", output, *flags], output


# What is asked and what comes of it


BOTH = pytest.mark.parametrize("task", [SENTIMENT, YES_NO], ids=["completion", "chat"])
SENT = {"top_p": 1.0, "top_k": 0, "min_p": 0.0, "repeat_penalty": 1.0, "repetition_penalty": 1.0}


@BOTH
def test_method_1_reads_both_layouts_and_asks_for_the_whole_distribution(call, fake, task):
    done = logprobs(call, "Not bad", "--json", "--task", task.name)
    row, chat = json.loads(done.out), task is YES_NO
    assert (done.code, row["prediction"], row["model"]) == (0, "positive", "fake-1")
    assert row["prompt"] == task.prompt("Not bad")
    assert row["probabilities"] == pytest.approx({"negative": 1 / 3, "positive": 2 / 3})
    assert (row["confidence"], row["total_probability"]) == pytest.approx((2 / 3, 0.6))
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
    done = consistency(call, "FAKE-7-OF-10", "--json", "--task", task.name)
    row, chat = json.loads(done.out), task is YES_NO
    assert (done.code, row["prediction"]) == (0, "positive")
    assert (row["votes"], row["unparsed"]) == ({"negative": 3, "positive": 7}, 0)
    assert (row["agreement"], row["confidence"], row["label_mass"]) == (0.7, 0.7, 1.0)
    assert row["sampling"] == {"temperature": 1.0} | SENT
    bodies = fake.asked_for("FAKE-7-OF-10")
    seeds = [body.pop("seed") for body in bodies]
    assert len(bodies) == 10 and len(set(seeds)) == 10 and all(0 <= seed < 2**31 for seed in seeds)
    prompt = task.prompt("FAKE-7-OF-10")
    asked = {"messages": prompt} if chat else {"prompt": prompt, "stop": ["\n"]}
    assert all(body == {"model": "fake-1", "max_tokens": 10, "temperature": 1.0} | SENT | asked for body in bodies)
    consistency(call, "FAKE-7-OF-10", "--json", "--task", task.name, "--seed", 0)
    consistency(call, "FAKE-7-OF-10", "--json", "--task", task.name, "--seed", 1)
    again = [body["seed"] for body in fake.asked_for("FAKE-7-OF-10")[10:]]
    assert sorted(again[:10]) == sorted(seeds) and not set(again[10:]) & set(seeds)


def test_claude_is_asked_over_its_own_protocol(call, fake):
    flags = ["--endpoint", "anthropic", "--task", "sentiment-yes-no", "--samples", 4, "--json"]
    done = consistency(call, "FAKE-3-OF-4", "--model", "claude-haiku-4-5", *flags)
    row = json.loads(done.out)
    assert (done.code, row["votes"], row["unparsed"]) == (0, {"negative": 0, "positive": 3}, 1)
    assert (row["agreement"], row["confidence"], row["label_mass"]) == (0.75, 1.0, 0.75)
    assert row["sampling"] == {"temperature": 1.0} and row["model"] == "claude-haiku-4-5"
    request = fake.requests[-1]
    asked = {"model": "claude-haiku-4-5", "max_tokens": 10, "temperature": 1.0}
    assert request.path == "/v1/messages" and request.body == asked | {"messages": YES_NO.prompt("FAKE-3-OF-4")}
    assert KEY in repr(request.headers)
    # A model that reasons says so in a block of its own, which is no answer.
    row = json.loads(consistency(call, "FAKE-THINKING", "--model", "claude-haiku-4-5", *flags).out)
    assert row["votes"] == {"negative": 0, "positive": 4}


def test_claude_models_that_reject_a_temperature_are_not_sent_one(call, fake):
    flags = ["--endpoint", "anthropic", "--task", "sentiment-yes-no", "--samples", 2, "--json"]
    for model in ("claude-opus-4-7", "claude-opus-4-8", "claude-sonnet-5"):
        done = consistency(call, "Not bad", "--model", model, *flags)
        assert (done.code, done.err, json.loads(done.out)["sampling"]) == (0, "", {}), model
    assert all("temperature" not in request.body for request in fake.requests) and len(fake.requests) == 9


def test_what_claude_can_not_do_is_said_in_one_line(call, fake):
    claude = ["Not bad", "--endpoint", "anthropic"]
    named, chat = ["--model", "claude-haiku-4-5"], ["--task", "sentiment-yes-no"]
    for flags in (chat, ()):  # whatever the task: another one would not help
        said = error_of(logprobs(call, *claude, *named, *flags))
        assert "claude-haiku-4-5 gives no log-probabilities; use Method 2" in said
    assert 'a task with format = "chat"' in error_of(consistency(call, *claude, *named))
    assert "with --model" in error_of(consistency(call, *claude, *chat))
    assert "no public tokenizer" in error_of(consistency(call, *claude, *named, *chat, "--tokenizer", "default"))
    assert fake.requests == []


def test_an_explanation_says_what_is_not_listed(call):
    out = logprobs(call, "FAKE-MISSING").out
    assert re.search(r"P\(negative\) +not listed; it counts with all that is not, the most it can have", out)
    assert "70.00 %  of the distribution names a label, up to 90.00 % with what is not listed" in out
    assert "P(positive)    70.00 %  = 70.00" in out
    assert "Verdict: positive, confidence 77.78 % (total probability 70.00 %)" in out


# A list that leaves something out


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


# Ids of the embedded model's tokenizer, in four spellings each: positive 0.56, negative 0.24.
IDS = {2731: 0.5, 16185: 0.02, 20085: 0.03, 31176: 0.01, 3524: 0.2, 17728: 0.01, 26990: 0.02, 42529: 0.01}
SAMPLED_ID = 1123  # is listed too


@pytest.fixture
def vllm(fake, tokenizer):
    """The fake as a vLLM server with the embedded model's tokenizer."""
    words = {i: tokenizer.decode([i]).strip().casefold() for i in IDS}
    assert [*words.values()] == ["positive"] * 4 + ["negative"] * 4
    fake.tokenizer, fake.lists = tokenizer, {i: math.log(p) for i, p in (IDS | {SAMPLED_ID: 0.15}).items()}
    return fake


def test_a_server_that_lists_by_id_gives_exact_masses(call, vllm):
    row = json.loads(logprobs(call, "Not bad", "--json", "--tokenizer", "default").out)
    assert row["probabilities"] == pytest.approx({"negative": 0.3, "positive": 0.7})
    assert row["label_mass"] == row["label_mass_high"] == pytest.approx(0.8) and "missing" not in row
    body = vllm.requests[-1].body
    assert body["prompt"] == row["prompt_token_ids"] == vllm.tokenizer(SENTIMENT.prompt("Not bad"))["input_ids"]
    assert sorted(body["logprob_token_ids"]) == sorted(IDS) and body["return_tokens_as_token_ids"] is True
    assert row["top_tokens"][0]["token"] == " positive" and row["prompt"] == SENTIMENT.prompt("Not bad")


def test_an_id_without_a_log_probability_is_not_taken_for_zero(call, vllm):
    # Of " negative", which had 0.2; with the token that is sampled 0.75 is listed.
    row = json.loads(logprobs(call, "FAKE-NOT-COMPUTED", "--json", "--tokenizer", "default").out)
    assert row["probabilities"] == pytest.approx({"negative": 0.04 / 0.6, "positive": 0.56 / 0.6})
    assert (row["label_mass"], row["label_mass_high"]) == pytest.approx((0.6, 0.85))


def test_ids_of_a_chat_are_the_rendered_template(call, vllm, tokenizer):
    flags = ["--tokenizer", "default", "--task", "sentiment-yes-no", "--samples", 2]
    done = consistency(call, "Not bad", *flags)
    rendered = tokenizer.apply_chat_template(YES_NO.prompt("Not bad"), tokenize=False, add_generation_prompt=True)
    assert vllm.requests[-1].path == "/v1/completions"
    assert tokenizer.decode(vllm.requests[-1].body["prompt"]) == rendered
    # The fake answers "positive", which is no answer word here.
    assert "none of 2 answers names a label" in error_of(done)


@pytest.mark.parametrize("rejects", [{}, {"logprob_token_ids": "logprob_token_ids: extra inputs are not permitted"}])
def test_a_server_with_ids_but_only_its_top_list_gives_an_interval(call, vllm, rejects, monkeypatch):
    vllm.rejects = rejects
    if not rejects:  # an older one does not know the parameter and ignores it
        good_reply = Fake.good_reply

        def ignorant(fake, request, *rest):
            request.body = {name: value for name, value in request.body.items() if name != "logprob_token_ids"}
            return good_reply(fake, request, *rest)

        monkeypatch.setattr(Fake, "good_reply", ignorant)
    done = logprobs(call, "Not bad", "--json", "--tokenizer", "default")
    row = json.loads(done.out)
    # It lists " positive" 0.5 and " negative" 0.2, so 0.3 may belong to either.
    assert row["probabilities"] == pytest.approx({"negative": 2 / 7, "positive": 5 / 7})
    assert (row["label_mass"], row["label_mass_high"]) == pytest.approx((0.7, 1.0)) and done.err == ""
    assert "logprob_token_ids" not in vllm.requests[-1].body


SPELLED = "It said <|im_end|> and stopped"


def test_a_text_that_spells_a_control_token_is_refused_as_text(call, fake, tmp_path):
    flags, output = table(tmp_path, [SPELLED, "Not bad"])
    for script in (logprobs_confidence, consistency_confidence):
        assert call(script, *flags, "--overwrite").code == 0
        refused, good = records(output)
        assert "spells the control token <|im_end|>" in refused["error"] and "--tokenizer" in refused["error"]
        assert refused["prediction"] is None and "retry" not in refused and good["prediction"] == "positive"
    assert fake.asked_for(SPELLED) == []


def test_a_text_that_spells_a_control_token_is_characters_as_ids(call, vllm, tokenizer):
    done = logprobs(call, SPELLED, "--json", "--tokenizer", "default")
    prompt = vllm.requests[-1].body["prompt"]
    assert done.code == 0 and not set(prompt) & set(tokenizer.all_special_ids)
    assert tokenizer.decode(prompt) == SENTIMENT.prompt(SPELLED)


def test_texts_that_can_not_be_sent_are_errors_of_their_rows(call, fake, tmp_path):
    flags, output = table(tmp_path, [" ", "Not bad"])
    (tmp_path / "t.jsonl").write_text('{"text": "half \\ud83d a smile"}\n{"text": "Not bad"}\n')
    for source, problem in ((tmp_path / "t.csv", "the text is empty"), (tmp_path / "t.jsonl", "not valid Unicode")):
        assert logprobs(call, *flags, "--input", source, "--overwrite").code == 0
        failed, good = records(output)
        assert problem in failed["error"] and failed["confidence"] is None and good["prediction"] == "positive"


# Replies that are wrong


# word in the text -> what the row's error says, and whether it is asked again; None where the row comes out right
ROWS = {
    "FAKE-429-ONCE": None,
    "FAKE-500-ONCE": None,
    "FAKE-503-ONCE": None,
    "FAKE-408-ONCE": None,
    "FAKE-CUT-ONCE": None,
    "FAKE-500": ("the server failed with status 500, 2 times: about status 500", True),
    "FAKE-CUT": ("the server cut the connection, 2 times", True),
    "FAKE-HALF-JSON": ("the server's reply is not JSON", True),
    "FAKE-HTML": ("the server's reply is not JSON", True),
    "FAKE-ARRAY": ("the server's reply is not JSON", True),
    "FAKE-NO-CHOICES": ("the reply has no choices", True),
    "FAKE-200": ("the server says: about status 200", True),  # as some gateways fail
    "FAKE-NAN": ("the listed probabilities sum to nan", True),
    "FAKE-POSITIVE-LOG": ("the listed probabilities sum to 1.949", True),  # e^0.5 + 0.3
    "FAKE-ABOVE-1": ("the listed probabilities sum to 1.400", True),
    "FAKE-NO-LOGPROBS": ("fake-1 gives no log-probabilities; use Method 2", False),
    "FAKE-NULL-LOG": ("fake-1 gives no log-probabilities; use Method 2", False),
    "FAKE-HUGE-LOG": ("fake-1 gives no log-probabilities; use Method 2", False),
    "FAKE-ODD-LIST": ("fake-1 gives no log-probabilities; use Method 2", False),
    "FAKE-EMPTY-LIST": ("fake-1 gives no log-probabilities; use Method 2", False),
    "FAKE-400": ("the server refuses the request: about status 400", False),  # as of a content policy
    "FAKE-413": ("the server refuses the request: about status 413", False),  # as of a text too long
    "FAKE-422": ("the server refuses the request: about status 422", False),
}


@BOTH
def test_a_wrong_reply_is_a_row_with_an_error_and_never_a_number(call, fake, tmp_path, task):
    texts = [text for word in ROWS for text in (f"{word} here", f"good beside {word.lower()}")]
    flags, output = table(tmp_path, texts, "--task", task.name)
    done = logprobs(call, *flags)
    rows = records(output)
    assert done.code == 0 and [row["text"] for row in rows] == texts
    retried = [word for word, problem in ROWS.items() if problem and problem[1]]
    assert f"asking again for {len(retried)} rows that failed for a passing reason" in done.err
    for word, row in zip(ROWS, rows[::2], strict=True):
        if ROWS[word] is None:
            assert row["confidence"] == pytest.approx(2 / 3) and len(fake.asked_for(word)) == 2, word
            continue
        problem, again = ROWS[word]
        assert problem in row["error"] and row.get("retry", False) is again, (word, row)
        assert row["prediction"] is row["confidence"] is row["probabilities"] is row["label_mass"] is None, word
    assert [row["confidence"] for row in rows[1::2]] == pytest.approx([2 / 3] * len(ROWS))
    # When the server is mended the same command mends the rows that may pass, and leaves all others as they are.
    fake.mended, before = True, len(fake.requests)
    assert logprobs(call, *flags).code == 0 and len(fake.requests) == before + 2 + len(retried)
    for word, row, mended in zip(ROWS, rows[::2], records(output)[::2], strict=True):
        assert (mended == row) is (word not in retried), word
        assert word not in retried or mended["confidence"] == pytest.approx(2 / 3), word
    assert logprobs(call, *flags).err == ""


SAMPLED = {
    "FAKE-500-ONCE": None,
    "FAKE-500": ("the server failed with status 500, 2 times", True),
    "FAKE-CUT": ("the server cut the connection, 2 times", True),
    "FAKE-HTML": ("the server's reply is not JSON", True),
    "FAKE-NO-MESSAGE": ("the reply has no message", True),
    "FAKE-NO-CHOICES": ("the reply has no choices", True),
    "FAKE-200": ("the server says: about status 200", True),
    "FAKE-400": ("the server refuses the request: about status 400", False),
    "FAKE-NULL": ("none of 3 answers names a label", False),
    "FAKE-REFUSAL": ("none of 3 answers names a label", False),
}


@pytest.mark.parametrize("claude", [False, True], ids=["openai", "anthropic"])
def test_a_wrong_answer_is_a_row_with_an_error_and_never_a_vote(call, tmp_path, claude):
    words = {word: problem for word, problem in SAMPLED.items() if not claude or word not in NOT_CLAUDE}
    words |= {"FAKE-NO-CONTENT": ("the reply has no content", True)} if claude else {}
    flags, output = table(tmp_path, words, "--task", "sentiment-yes-no", "--samples", 3)
    flags += ["--endpoint", "anthropic", "--model", "claude-haiku-4-5"] if claude else []
    done = consistency(call, *flags)
    assert done.code == 0 and f"1 of {len(words)} rows scored" in done.out
    for (word, problem), row in zip(words.items(), records(output), strict=True):
        if problem is None:
            assert (row["votes"], row["confidence"]) == ({"negative": 0, "positive": 3}, 1.0)
        else:
            assert problem[0] in row["error"] and row.get("retry", False) is problem[1], (word, row)
            assert row["prediction"] is row["confidence"] is None and row.get("agreement") is None, word


NOT_CLAUDE = ("FAKE-NO-MESSAGE", "FAKE-NO-CHOICES", "FAKE-NULL")


def test_a_slow_server_is_asked_again_and_then_an_error_of_the_row(call, fake, tmp_path):
    fake.hold = {"FAKE-SLOW": threading.Event()}
    flags, output = table(tmp_path, ["FAKE-SLOW", "Not bad"], "--timeout", 1)
    done = logprobs(call, *flags)
    slow, good = records(output)
    assert done.code == 0 and slow["error"] == "no answer within 1 s, 2 times" and slow["retry"] is True
    assert slow["confidence"] is None and good["confidence"] == pytest.approx(2 / 3)


# A server that is wrong for every row: one line, and no file


# name -> the status and content of every reply, and what the line says
WRONG_REPLIES = {
    "401": (401, said("Incorrect API key: none."), "refuses the key (401: Incorrect API key: none.)"),
    "403": (403, said("not for you"), "refuses the key (403: not for you); --api-key-env names its variable"),
    "404": (404, said("The model does not exist."), "has no fake-1 or no such API (404: The model does not exist.)"),
    "429": (429, said("quota"), "takes no more requests (429: quota); nothing is lost, repeat the command to continue"),
    "tomorrow": (429, said("tomorrow"), "takes no more requests (429: tomorrow)"),
    "500": (500, b"oops", "failed with status 500, 2 times: oops"),
    "418": (418, b"", "answers with status 418: I'm a Teapot"),
    "HTML": (200, b"<html>Log in</html>", "is not JSON; is this the URL of an API?"),
    "no log-probabilities": (200, {"choices": [{"text": "x"}]}, "no log-probabilities; use Method 2, consistency_conf"),
    "refused": (400, said("logprobs are not supported"), "(logprobs are not supported); use Method 2 or --top-tokens"),
    "too many": (422, {"detail": [{"loc": ["logprobs"], "msg": "at most 5"}]}, "gives no such log-probabilities"),
}
WRONG_MODELS = {
    "401": (401, said("no key"), "refuses the key (401: no key)"),
    "404": (404, said("not found"), "lists no models; is it the URL of an API? Most end in /v1"),
    "500": (500, b"", "failed with status 500, 2 times: Internal Server Error"),
    "HTML": (200, b"<html>", "lists no models"),
    "array": (200, ["fake-1"], "lists no models"),
    "names": (200, {"data": ["fake-1"]}, "lists no models"),
    "two": (200, {"data": [{"id": "a"}, {"id": "b"}]}, "has 2 models; name one with --model: a, b"),
    "none": (200, {"data": []}, "has no model"),
    "a number": (200, {"data": [{"id": 1}]}, "has 1 models"),
}
WRONG = [("/v1/completions", *case) for case in WRONG_REPLIES.items()]
WRONG += [("/v1/models", *case) for case in WRONG_MODELS.items()]


@pytest.mark.parametrize(("path", "name", "case"), WRONG, ids=[f"{path[4:]} {name}" for path, name, _ in WRONG])
def test_a_server_that_is_wrong_for_every_row_is_one_line_and_no_file(call, fake, tmp_path, path, name, case):
    status, payload, problem = case
    fake.pages[path] = status, {"Retry-After": "86400" if name == "tomorrow" else "0.01"}, payload
    flags, output = table(tmp_path, ["Not bad"])
    assert problem in error_of(logprobs(call, *flags)) and not output.exists()
    assert len(fake.requests) <= 3


def test_a_wrong_address_is_one_line(call, fake):
    url = fake.url.removesuffix("/v1")
    assert "most URLs end in /v1" in error_of(logprobs(call, "x", "--endpoint", url, "--model", "fake-1"))
    assert "Most end in /v1" in error_of(logprobs(call, "x", "--endpoint", url))
    fake.stop()
    for named in ([], ["--model", "fake-1"]):
        assert f"no server answers at {fake.url}" in error_of(logprobs(call, "x", *named))


BAD_URLS = {
    f"http://user:{KEY}@127.0.0.1:1/v1": "without a key in it",
    f"http://127.0.0.1:1/v1?key={KEY}": "without a key in it",
    "127.0.0.1:8000": "a URL such as http://127.0.0.1:8000/v1, or anthropic",
    "ftp://127.0.0.1/v1": "a URL such as http://127.0.0.1:8000/v1, or anthropic",
    "http:///v1": "a URL such as http://127.0.0.1:8000/v1, or anthropic",
    "openai": "a URL such as http://127.0.0.1:8000/v1, or anthropic",
    "http://[::1/v1": "--endpoint: Invalid IPv6 URL",
    "http://127.0.0.1:99999/v1": "--endpoint: Port out of range",
    "http://127.0.0.1:one/v1": "--endpoint: Port could not be cast",
    "http://127.0.0.256/v1": "--endpoint: Invalid IPv4 address",
    "http://127.0.0.1\x07/v1": "--endpoint: Invalid non-printable",
}


def test_an_address_that_is_none_is_one_line(call, fake):
    for url, problem in BAD_URLS.items():
        assert problem in error_of(logprobs(call, "Not bad", "--endpoint", url, "--model", "m")), url
    assert fake.requests == []


def test_flags_that_do_not_go_together_are_one_line(call):
    for flags, problem in {
        "--concurrency 0": "--concurrency 0: above 0",
        "--timeout nan": "--timeout nan: above 0",
        "--top-tokens -1": "--top-tokens -1: above 0",
        "--load-in-4bit": "--load-in-4bit is for models loaded here",
        "--truncate": "--truncate is for models loaded here",
        "--device cpu": "--device is for models loaded here",
        "--adapter somewhere": "--adapter is for models loaded here",
    }.items():
        assert problem in error_of(logprobs(call, "Not bad", *flags.split())), flags
    for flag in ("--api-key-env", "--tokenizer"):
        with pytest.raises(SystemExit):
            logprobs_confidence.parse_arguments(["Not bad", flag, "X"])


def test_a_redirect_is_not_followed(call, fake):
    other = Fake().start()
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


def test_a_rejected_temperature_leaves_method_1_as_it_is(call, fake):
    fake.rejects = {"temperature": "`temperature` is deprecated for this model."}
    done = logprobs(call, "Not bad", "--json")
    assert done.code == 0 and json.loads(done.out)["confidence"] == pytest.approx(2 / 3)
    assert "temperature" not in fake.requests[-1].body


def test_a_temperature_out_of_range_is_an_error_and_not_left_out(call, fake):
    for words in ("temperature must be between 0 and 2", "temperature: Input should be less than or equal to 2"):
        fake.rejects = {"temperature": words}
        problem = error_of(consistency(call, "Not bad", "--temperature", 3))
        assert f"the server refuses the request: {words}" in problem
    assert len(fake.asked_for("")) == 4  # of each run the model's name and the first request


def test_a_strict_server_is_sent_what_it_knows(call, fake):
    unknown = ("top_k", "min_p", "repeat_penalty", "repetition_penalty", "seed", "stop")
    fake.rejects = {name: f"Unrecognized request argument supplied: {name}" for name in unknown}
    done = consistency(call, "FAKE-GOES-ON", "--samples", 2, "--json")
    row = json.loads(done.out)
    assert row["sampling"] == {"temperature": 1.0, "top_p": 1.0} and not set(unknown) & set(fake.requests[-1].body)
    assert done.err == "note: fake-1 takes no seed, stop; left out\n"
    # Without `stop` the model goes on to the next text, whose answer is not ours.
    assert row["votes"] == {"negative": 0, "positive": 2} and row["answers"][0]["answer"] == " positive"


def test_max_completion_tokens_takes_the_place_of_max_tokens(call, fake):
    fake.rejects = {"max_tokens": "Unsupported parameter: 'max_tokens'. Use 'max_completion_tokens' instead."}
    done = consistency(call, "Not bad", "--samples", 2, "--max-tokens", 7, "--json")
    body = fake.requests[-1].body
    assert done.code == 0 and body["max_completion_tokens"] == 7 and "max_tokens" not in body
    # What is known of a model is not tried first.
    fake.rejects = {}
    done = consistency(call, "Not bad", "--samples", 2, "--model", "gpt-5-mini", "--json", "--task", "sentiment-yes-no")
    bodies = [request.body for request in fake.requests if request.body.get("model") == "gpt-5-mini"]
    assert len(bodies) == 3 and all(body["max_completion_tokens"] == 10 for body in bodies)
    assert not any({"max_tokens", "temperature", "top_p"} & set(body) for body in bodies)
    assert "temperature" not in json.loads(done.out)["sampling"]


def test_a_parameter_rejected_in_the_middle_of_a_run_is_the_row_s_error(call, fake, tmp_path):
    # What was sent is part of the fingerprint, so it cannot change under way.
    flags, output = table(tmp_path, ["FAKE-TEMPERATURE-400", "good"], "--concurrency", 1)
    assert logprobs(call, *flags).code == 0
    failed, good = records(output)
    assert failed["error"] == "the server refuses the request: no temperature for this text" and "retry" not in failed
    assert good["confidence"] == pytest.approx(2 / 3) and fake.requests[-1].body["temperature"] == 1.0


def test_a_choice_that_the_server_ignores_is_an_error(call, fake):
    done = consistency(call, "Not bad", "--choice", "--samples", 2, "--json")
    assert fake.requests[-1].body["structured_outputs"] == {"choice": ["negative", "positive"]}
    assert json.loads(done.out)["votes"] == {"negative": 0, "positive": 2}
    fake.obeys_choice, fake.always = False, "FAKE-NULL"
    assert "fake-1 ignores --choice" in error_of(consistency(call, "Not bad", "--choice"))


# The key


def test_a_key_goes_only_where_it_was_named_for(call, fake, monkeypatch):
    assert logprobs(call, "Not bad").code == 0
    assert all(request.headers["authorization"] == "Bearer none" for request in fake.requests)
    monkeypatch.setenv("MY_KEY", " sk-mine-do-not-show\n")
    done = logprobs(call, "Not bad", "--api-key-env", "MY_KEY")
    assert fake.requests[-1].headers["authorization"] == "Bearer sk-mine-do-not-show"
    assert done.code == 0 and "sk-mine" not in done.out + done.err
    for value in (None, "", " "):
        monkeypatch.setenv("MY_KEY", value or "")
        if value is None:
            monkeypatch.delenv("MY_KEY")
        assert "set the environment variable MY_KEY" in error_of(logprobs(call, "x", "--api-key-env", "MY_KEY"))
    for value in ("sk-do\nnot", "sk-d\u00f6-not"):
        monkeypatch.setenv("MY_KEY", value)
        problem = error_of(logprobs(call, "x", "--api-key-env", "MY_KEY"))
        assert "MY_KEY" in problem and "sk-d" not in problem
    monkeypatch.delenv("ANTHROPIC_API_KEY")
    claude = ["x", "--endpoint", "anthropic", "--model", "claude-haiku-4-5", "--task", "sentiment-yes-no"]
    assert "set the environment variable ANTHROPIC_API_KEY" in error_of(consistency(call, *claude))


@pytest.mark.parametrize("padding", [0, 280])
def test_a_server_that_repeats_the_key_does_not_show_it(call, fake, tmp_path, padding):
    # The fixture `call` searches all that is written. A long message is cut, which may be in the middle of the key.
    fake.shown_key = True
    named = ["--api-key-env", "OPENAI_API_KEY"]
    for path in ("/v1/models", "/v1/completions"):
        fake.pages = {path: (401, {}, said("x" * padding + f" wrong key: {KEY} is not valid"))}
        problem = error_of(logprobs(call, "Not bad", *named))
        assert "sk-do" not in problem and ("[key]" in problem or padding)
    fake.pages = {}
    flags, output = table(tmp_path, ["FAKE-400", "FAKE-500", "good"], *named)
    assert logprobs(call, *flags).code == 0
    assert "asked with Bearer [key]" in records(output)[0]["error"]
    assert "asked with Bearer [key]" in records(output)[1]["error"]


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
        assert (server.client.api_key, server.url) == (KEY, "https://api.openai.com/v1") and KEY not in repr(server)
        assert server.sent(temperature=1.0) == {"temperature": 1.0, "top_p": 1.0}
    with connect("https://api.anthropic.com/v1", model="claude-haiku-4-5") as server:  # which speaks both protocols
        assert server.client.api_key == KEY
    for host in ("api.openai.com.example.org", "example.org/api.openai.com", "openai", "anthropic", "localhost:1"):
        with connect(f"https://{host}/v1", model="gpt-4o") as server:
            assert KEY not in repr(server.client.default_headers) + repr(server.client.auth_headers)
    monkeypatch.delenv("OPENAI_API_KEY")
    with pytest.raises(ValueError, match="set the environment variable OPENAI_API_KEY"):
        connect("https://api.openai.com/v1", model="gpt-4o")


# Many at a time


def test_as_many_requests_as_allowed_run_at_a_time_and_never_more(call, fake, tmp_path):
    fake.together = threading.Barrier(3)  # with fewer than three at a time no row gets an answer
    flags, output = table(tmp_path, [f"row {i}" for i in range(12)], "--concurrency", 3)
    assert logprobs(call, *flags).code == 0
    assert [row["confidence"] for row in records(output)] == pytest.approx([2 / 3] * 12) and fake.most == 3
    done = consistency(call, "row 0", "--samples", 9, "--concurrency", 3, "--json")
    assert json.loads(done.out)["votes"] == {"negative": 0, "positive": 9} and fake.most == 3


def test_rows_keep_their_order_though_replies_do_not(call, fake, tmp_path):
    # Of two at a time the first waits for the fourth, which is asked for when the second and the third are done.
    fourth = threading.Event()
    fake.hold, fake.frees = {"row 0": fourth}, {"row 3": fourth}
    flags, output = table(tmp_path, [f"row {i}" for i in range(6)], "--concurrency", 2)
    assert logprobs(call, *flags).code == 0 and fourth.is_set()
    rows = records(output)
    assert [(row["id"], row["text"]) for row in rows] == [(str(i + 1), f"row {i}") for i in range(6)]
    assert [row["confidence"] for row in rows] == pytest.approx([2 / 3] * 6)


def test_the_number_of_requests_at_a_time_changes_nothing(call, tmp_path):
    texts = [f"FAKE-SEEDED {i}" for i in range(5)] + ["FAKE-400"]
    flags, output = table(tmp_path, texts, "--samples", 5)
    written = []
    for concurrency in (1, 8):
        output.unlink(missing_ok=True)
        assert consistency(call, *flags, "--concurrency", concurrency).code == 0
        written.append(output.read_bytes())
    assert written[0] == written[1]
    assert len({json.dumps(row["votes"]) for row in records(output)[:5]}) > 1


# Runs that end before their time


@pytest.fixture(params=[logprobs_confidence, consistency_confidence], ids=["method-1", "method-2"])
def script(request):
    return request.param


def unbroken(call, script, tmp_path, flags):
    """The bytes that a run of one piece writes."""
    whole = tmp_path / "whole.jsonl"
    arguments = [whole if part == tmp_path / "p.jsonl" else part for part in flags]
    assert call(script, *arguments).code == 0
    return whole.read_bytes()


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
    fake.mended = True
    done = call(script, *flags)
    assert done.code == 0 and f"asking again for {len(rows) - 2} rows" in done.err
    assert output.read_bytes() == unbroken(call, script, tmp_path, flags)
    assert [row["prediction"] for row in records(output)] == ["positive"] * 42


def test_asking_again_that_is_stopped_leaves_the_rows_as_they_were(call, fake, tmp_path):
    # One at a time and in turn with good ones, no 20 fail in a row until they are asked again.
    texts = [text for i in range(21) for text in (f"FAKE-500 {i}", f"good {i}")]
    flags, output = table(tmp_path, texts, "--concurrency", 1)
    assert "20 requests in a row failed" in error_of(logprobs(call, *flags))
    rows = records(output)
    assert [row["text"] for row in rows] == texts and [row.get("retry") for row in rows] == [True, None] * 21
    fake.mended = True
    assert logprobs(call, *flags).code == 0
    assert output.read_bytes() == unbroken(call, logprobs_confidence, tmp_path, flags)


def test_a_key_that_is_refused_in_the_middle_stops_the_run(call, fake, tmp_path):
    flags, output = table(tmp_path, ["good", "FAKE-401", "good too"], "--concurrency", 1)
    assert "refuses the key (401" in error_of(logprobs(call, *flags))
    assert [row["text"] for row in records(output)] == ["good"]
    fake.mended = True
    assert logprobs(call, *flags).code == 0 and len(records(output)) == 3


def start(script, arguments, **options):
    """A script as a process of its own."""
    command = [sys.executable, f"{script.__name__}.py", *map(str, arguments)]
    pipes = {"stderr": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, cwd=ROOT, **pipes, **options)


def finish(process):
    """(exit code, stdout, stderr) of a process that must end by itself, soon."""
    try:
        return (*process.communicate(timeout=20), process.returncode)
    finally:
        process.kill()
        process.communicate()


def wait_until(process, true):
    """Wait for something that a process is to cause."""
    end = time.monotonic() + TOO_LATE_S
    while not true():
        assert time.monotonic() < end and process.poll() is None
        time.sleep(0.02)


def test_ctrl_c_ends_a_run_at_once_and_the_same_command_goes_on(call, fake, tmp_path, script):
    flags, output = table(tmp_path, ["good 0", "good 1", *(f"slow {i}" for i in range(12))])
    fake.hold = {"slow": threading.Event()}
    process = start(script, [*flags, "--endpoint", fake.url])
    wait_until(process, lambda: output.exists() and output.read_bytes().count(b"\n") == 2)
    wait_until(process, lambda: fake.asked_for("slow"))
    process.send_signal(signal.SIGINT)
    out, err, code = finish(process)
    assert (code, out) == (130, "") and err == "\nstopped; repeat the same command to continue where it was\n"
    assert [row["text"] for row in records(output)] == ["good 0", "good 1"]
    fake.hold["slow"].set()
    whole = unbroken(call, script, tmp_path, flags)
    assert whole.startswith(output.read_bytes())
    assert call(script, *flags).code == 0 and output.read_bytes() == whole


@pytest.mark.parametrize("word", ["", "A text."], ids=["the model's name", "the first request"])
def test_ctrl_c_before_the_first_reply_leaves_no_file_and_no_noise(fake, tmp_path, word):
    flags, output = table(tmp_path, ["good 0"])
    fake.hold = {word: threading.Event()}
    process = start(logprobs_confidence, [*flags, "--endpoint", fake.url])
    wait_until(process, lambda: fake.asked_for(word))
    process.send_signal(signal.SIGINT)
    out, err, code = finish(process)
    assert (code, out) == (130, "") and err == "\nstopped; repeat the same command to continue where it was\n"
    assert not output.exists()


def test_a_full_disk_is_one_line_though_requests_are_under_way(call, fake, tmp_path):
    flags, output = table(tmp_path, [f"good {i} {'x' * 400}" for i in range(30)])
    whole = unbroken(call, logprobs_confidence, tmp_path, flags)
    limit = len(whole) // 2  # a file-size limit makes a write fail in its middle, as a full disk does
    limited = {"preexec_fn": lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))}
    out, err, code = finish(start(logprobs_confidence, [*flags, "--endpoint", fake.url], **limited))
    assert (code, out) == (2, "") and err.startswith("error: cannot write") and err.count("\n") == 1
    begun = output.read_bytes()
    assert whole.startswith(begun) and begun.endswith(b"\n") and begun
    assert logprobs(call, *flags).code == 0 and output.read_bytes() == whole


# What a fingerprint must know


def test_the_fingerprint_follows_the_server_the_model_and_how_it_is_asked(call, vllm):
    plain = json.loads(logprobs(call, "Not bad", "--json", "--tokenizer", "default").out)["fingerprint"]
    flags = [["--model", "other"], ["--top-tokens", 5], ["--endpoint", vllm.url + "/"], ["--concurrency", 1]]
    vllm.lists = {}
    text = [json.loads(logprobs(call, "Not bad", "--json", *more).out)["fingerprint"] for more in ([], *flags)]
    assert len({plain, *text}) == 4  # ids, text, another model, another list
    assert text[3] == text[4] == text[0]  # a slash, or fewer at a time, asks for nothing else
    identities = []
    for name in ("one", "another"):  # another tokenizer gives other ids
        with connect(vllm.url, "m", reader=SimpleNamespace(name=name)) as server:
            identities.append(server.identity)
    assert identities[0] != identities[1]
