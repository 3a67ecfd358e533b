"""`--endpoint sagemaker:NAME[/ADAPTER]`: Methods 1 to 3 through invoke_endpoint, against the fake AWS.

The endpoint `demo` has a base component and the adapters `reviews` and `jokes`. What serves them lists positive 0.6,
negative 0.3 and something else 0.05, so that P(positive) is 2/3 of a label mass of 0.9, which may be 0.95; by id it
lists all spellings of the two labels. Words in a row's text order everything else.
"""

import csv
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
from collections import Counter
from dataclasses import dataclass, field
from functools import lru_cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest
from botocore.loaders import create_loader
from fake_lmi import LMI, Loaded
from fake_sagemaker import Fake

import combined_confidence
import command_line
import consistency_confidence
import endpoint
import logprobs_confidence
import predictions
from endpoint import PassingError, connect
from llama import load_llama, load_reader
from task import TASKS

ROOT = Path(__file__).parent.parent
SENTIMENT, YES_NO = TASKS["sentiment"], TASKS["sentiment-yes-no"]
SECRET, SESSION = "wJalr-do-not-show-this-key", "FwoG-do-not-show-this-session"
TOO_LATE_S = 20

# Ids of the embedded model's tokenizer, in four spellings each: positive 0.56, negative 0.24.
IDS = {2731: 0.5, 16185: 0.02, 20085: 0.03, 31176: 0.01, 3524: 0.2, 17728: 0.01, 26990: 0.02, 42529: 0.01}
SENT = {"top_p": 1.0, "top_k": 0, "min_p": 0.0, "repeat_penalty": 1.0, "repetition_penalty": 1.0}
LISTED = {" positive": math.log(0.6), " negative": math.log(0.3), " mixed": math.log(0.05)}
# word in a text -> what the container answers; with -ONCE only the first time
ANSWERS = {
    "SAYS-400": (400, {"error": "This model's maximum context length is 8192 tokens", "code": 400}),
    "SAYS-424": (424, {"code": 424, "message": "prediction failure", "error": "Input parsing failed: odd"}),
    "SAYS-500": (500, {"error": "out of luck", "code": 500}),
    "SAYS-503": (503, {"code": 503, "type": "ServiceUnavailableException", "message": "queue is full"}),
    "SAYS-SECRET": (400, {"error": f"asked with {SECRET} and {SESSION}", "code": 400}),
    "SAYS-NO-LIST": (200, {"choices": [{"text": " positive", "logprobs": None}]}),
    "SAYS-ERROR": (200, {"error": "prediction failure", "code": 424}),
}


@dataclass
class Serving:
    """LMI's part. `bodies` is all it was asked; `hold` what the reply to a text with a word waits for."""

    tokenizer: object = None
    bodies: list = field(default_factory=list)
    hold: dict = field(default_factory=dict)
    frees: dict = field(default_factory=dict)
    together: threading.Barrier | None = None
    at: dict = field(default_factory=dict)  # number of a request -> what is done before it is answered

    def __post_init__(self):
        self.lock, self.asked, self.busy, self.most = threading.Lock(), Counter(), 0, 0

    def load(self, fake, component):
        pass

    def unload(self, name):
        pass

    def text_of(self, body):
        prompt = body["messages"][-1]["content"] if "messages" in body else body["prompt"]
        prompt = self.tokenizer.decode(prompt) if isinstance(prompt, list) else prompt
        return prompt.rpartition("Text: ")[2].partition("\nSentiment:")[0]

    def invoke(self, fake, name, body):
        text = self.text_of(body)
        with self.lock:
            times = self.asked[text]
            self.asked[text] += 1
            self.bodies.append(body)
            self.busy += 1
            self.most = max(self.most, self.busy)
            self.at.get(len(self.bodies), lambda: None)()
        for word, event in self.hold.items():
            if word in text:
                event.wait(TOO_LATE_S)
        if self.together and "row" in text:
            self.together.wait(TOO_LATE_S)
            time.sleep(0.05)  # in which one more than allowed would come
        word = (re.findall(r"SAYS-[A-Z0-9-]+", text) or [""])[0]
        if word.endswith("-ONCE"):
            word = "" if times else word.removesuffix("-ONCE")
        with self.lock:
            self.busy -= 1
        for word_here, event in self.frees.items():
            if word_here in text:
                event.set()
        return ANSWERS.get(word) or (200, self.good(body))

    def good(self, body):
        answer = body.get("structured_outputs", {}).get("choice", [" positive"])[-1]
        if "messages" in body:
            pairs = [{"token": t, "logprob": p} for t, p in zip(("Yes", "No", "Maybe"), LISTED.values(), strict=True)]
            logprobs = {"content": [{"token": "Yes", "logprob": -0.5, "top_logprobs": pairs}]}
            return {"choices": [{"message": {"role": "assistant", "content": "Yes"}, "logprobs": logprobs}]}
        listed = LISTED
        if body.get("return_tokens_as_token_ids"):
            listed = {f"token_id:{i}": math.log(IDS[i]) for i in body["logprob_token_ids"]}
        return {"choices": [{"text": answer, "logprobs": {"top_logprobs": [listed]}}]}


@pytest.fixture(scope="module")
def aws():
    with Fake() as fake:
        fake._server.handle_error = lambda *_: None  # clients that left
        yield fake


def deploy(fake):
    """The endpoint `demo` as deploy_sagemaker.py leaves it."""
    fake.endpoints.clear()
    fake.components.clear()
    fake.add("endpoint", "demo", {"EndpointName": "demo"}, "InService")
    base = {"InferenceComponentName": "demo-base", "EndpointName": "demo", "VariantName": "AllTraffic"}
    fake.add("inference-component", "demo-base", base | {"Specification": {"ModelName": "demo-model"}}, "InService")
    for adapter in ("reviews", "jokes"):
        name, specification = f"demo-adapter-{adapter}", {"BaseInferenceComponentName": "demo-base"}
        request = {"InferenceComponentName": name, "EndpointName": "demo", "Specification": specification}
        fake.add("inference-component", name, request, "InService")


cached_reader, cached_loader = lru_cache(load_reader), lru_cache(create_loader)


@pytest.fixture
def fake(aws, monkeypatch, tokenizer):
    """The fake with `demo` in service and nothing asked yet; it must not have seen what it was not to see."""
    for name in [name for name in os.environ if name.startswith("AWS_") or "proxy" in name.lower()]:
        monkeypatch.delenv(name)
    for name, value in (aws.env | {"AWS_SECRET_ACCESS_KEY": SECRET, "AWS_SESSION_TOKEN": SESSION}).items():
        monkeypatch.setenv(name, value)
    for script in (logprobs_confidence, consistency_confidence, combined_confidence):
        monkeypatch.setattr(script, "load_reader", cached_reader)
    monkeypatch.setattr("botocore.session.create_loader", cached_loader)  # each session would read boto3's files again
    monkeypatch.setattr(endpoint, "FIRST_PAUSE_S", 0.001)
    monkeypatch.setattr(endpoint, "RETRIES", 2)
    deploy(aws)
    aws.serving = serving = Serving(tokenizer)
    aws.requests.clear()
    aws._injected.clear()
    yield aws
    for event in serving.hold.values():
        event.set()
    for request in aws.requests:
        shown = repr([request.path, request.body, {k: v for k, v in request.headers.items() if "Token" not in k}])
        assert SECRET not in repr(request) and SESSION not in shown
    assert all("model" not in body for body in serving.bodies)


@pytest.fixture
def call(capsys, fake, tmp_path):
    """Run a script in this process: -> its code, out and err. It never shows a key or a traceback."""

    def run_main(script, *arguments):
        argv, code = [*map(str, arguments)], 0
        argv += [] if "--endpoint" in argv else ["--endpoint", "sagemaker:demo/reviews"]
        capsys.readouterr()
        try:
            command_line.run(lambda: script.main(argv), resumes=True)
        except SystemExit as stopped:
            code = stopped.code
        out, err = capsys.readouterr()
        written = out + err + "".join(path.read_text() for path in tmp_path.glob("**/*.jsonl"))
        assert "Traceback" not in err and SECRET not in written and SESSION not in written
        return SimpleNamespace(code=code, out=out, err=err)

    return run_main


def logprobs(call, *arguments):
    return call(logprobs_confidence, *arguments)


def error_of(done):
    """The one line of a command that failed."""
    assert (done.code, done.out, done.err.count("error: ")) == (2, "", 1), done
    last = done.err.splitlines()[-1]
    assert last.startswith("error: ")
    return last


def table(tmp_path, texts, *flags):
    """The flags for a table of texts, and the file they write."""
    with open(tmp_path / "t.csv", "w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([("text", "label"), *((text, "positive") for text in texts)])
    output = tmp_path / "p.jsonl"
    return ["--input", tmp_path / "t.csv", "--output", output, *flags], output


def records(path):
    return [json.loads(line) for line in path.read_bytes().splitlines()]


# What is asked and what comes of it


def test_the_command_asks_an_adapter_s_component_in_text(fake, run):
    done = run("logprobs_confidence.py", "Not bad", "--json", "--endpoint", "sagemaker:demo/reviews")
    assert (done.returncode, done.stderr) == (0, "")
    row = json.loads(done.stdout)
    assert (row["prediction"], row["model"]) == ("positive", "demo/reviews")
    assert row["confidence"] == pytest.approx(2 / 3) and row["prompt"] == SENTIMENT.prompt("Not bad")
    assert (row["label_mass"], row["label_mass_high"]) == pytest.approx((0.9, 0.95))
    asked = {"prompt": SENTIMENT.prompt("Not bad"), "max_tokens": 1, "temperature": 1.0, "logprobs": 20}
    assert fake.serving.bodies[-1] == asked | SENT
    probe, request = fake.requests
    assert (request.service, request.operation) == ("sagemaker-runtime", "InvokeEndpoint")
    assert request.params["InferenceComponentName"] == probe.params["InferenceComponentName"] == "demo-adapter-reviews"
    assert (request.params["EndpointName"], request.params["ContentType"]) == ("demo", "application/json")


def test_without_an_adapter_it_is_the_base_component(call, fake):
    row = json.loads(logprobs(call, "Not bad", "--json", "--endpoint", "sagemaker:demo").out)
    assert row["model"] == "demo" and fake.requests[-1].params["InferenceComponentName"] == "demo-base"


def test_ids_list_every_spelling_of_the_labels(call, fake, tokenizer):
    row = json.loads(logprobs(call, "It said <|im_end|>", "--json", "--tokenizer", "default").out)
    assert row["probabilities"] == pytest.approx({"negative": 0.3, "positive": 0.7})
    assert row["label_mass"] == row["label_mass_high"] == pytest.approx(0.8) and "missing" not in row
    body = fake.serving.bodies[-1]
    assert body["prompt"] == row["prompt_token_ids"] and not set(body["prompt"]) & set(tokenizer.all_special_ids)
    assert sorted(body["logprob_token_ids"]) == sorted(IDS) and body["return_tokens_as_token_ids"] is True


@pytest.mark.parametrize("task", ["sentiment", "sentiment-yes-no"])
def test_an_endpoint_gives_the_probabilities_that_the_model_gives_here(call, fake, tmp_path, tiny_folder, task):
    fake.serving, model = LMI(), load_llama(str(tiny_folder), device="cpu")
    fake.serving.loaded["demo-base"] = Loaded(model, {"MAX_MODEL_LEN": 400, "MAX_LOGPROBS": 128, "release": 28}, None)
    texts = ["Not bad", "I love it", "It said <|im_end|> and stopped", "caf\u00e9 \U0001f600", "long " * 450]
    flags, output = table(tmp_path, texts, "--task", task)
    assert logprobs(call, *flags, "--endpoint", "sagemaker:demo", "--tokenizer", tiny_folder).code == 0
    *rows, long = records(output)
    assert "the server refuses the request: This model's maximum context length is 400 tokens" in long["error"]
    scorer = logprobs_confidence.prepare(model, TASKS[task])
    for row in rows:
        here = logprobs_confidence.explain(row["text"], scorer)
        assert row["probabilities"] == pytest.approx(here["probabilities"], abs=1e-5) and "missing" not in row
        assert row["label_mass"] == row["label_mass_high"] == pytest.approx(here["label_mass"], abs=1e-5)
    assert len({row["confidence"] for row in rows}) == len(rows)


def test_a_chat_task_asks_in_messages(call, fake):
    row = json.loads(logprobs(call, "Not bad", "--json", "--task", "sentiment-yes-no").out)
    assert row["confidence"] == pytest.approx(2 / 3)
    asked = {"messages": YES_NO.prompt("Not bad"), "logprobs": True, "top_logprobs": 20}
    assert fake.serving.bodies[-1] == {"max_tokens": 1, "temperature": 1.0} | SENT | asked


def test_method_2_samples_with_seeds_and_a_choice(call, fake):
    row = json.loads(call(consistency_confidence, "Not bad", "--samples", 4, "--choice", "--json").out)
    assert (row["votes"], row["model"]) == ({"negative": 0, "positive": 4}, "demo/reviews")
    bodies = fake.serving.bodies[-4:]
    assert len({body["seed"] for body in bodies}) == 4 and all(body["stop"] == ["\n"] for body in bodies)
    assert all(body["structured_outputs"] == {"choice": ["negative", "positive"]} for body in bodies)


def test_method_3_joins_both(call, fake, tmp_path):
    flags, output = table(tmp_path, ["Not bad", "Fine"], "--samples", 3)
    assert call(combined_confidence, *flags).code == 0
    rows = records(output)
    assert [(row["prediction"], row["model"]) for row in rows] == [("positive", "demo/reviews")] * 2
    assert {request.params["InferenceComponentName"] for request in fake.requests} == {"demo-adapter-reviews"}


def test_a_text_that_spells_a_control_token_is_refused_as_text(call, fake, tmp_path):
    flags, output = table(tmp_path, ["It said <|eot_id|>", "Not bad"])
    assert logprobs(call, *flags).code == 0
    refused, good = records(output)
    assert "spells the control token <|eot_id|>" in refused["error"] and good["prediction"] == "positive"
    assert len(fake.requests) == 2  # the first request of the run, and the good row's


def test_the_fingerprint_follows_component_and_region(call, fake, monkeypatch):
    flags = [[], ["--endpoint", "sagemaker:demo/jokes"], ["--endpoint", "sagemaker:demo"], ["--tokenizer", "default"]]
    prints = [json.loads(logprobs(call, "Not bad", "--json", *more).out)["fingerprint"] for more in flags]
    assert len(set(prints)) == 4
    assert json.loads(logprobs(call, "Not bad", "--json", "--concurrency", 1).out)["fingerprint"] == prints[0]
    identities = []
    for region in ("us-east-1", "eu-west-3"):
        monkeypatch.setenv("AWS_DEFAULT_REGION", region)
        with connect("sagemaker:demo/reviews", concurrency=30) as server:
            identities.append(server.identity)
            assert server.client.meta.config.max_pool_connections == 30  # all of which are kept open
    assert identities[0] == {
        "endpoint": "sagemaker:us-east-1/demo",
        "served_model": "demo-adapter-reviews",
        "prompt": "text",
    }
    assert identities[1] == identities[0] | {"endpoint": "sagemaker:eu-west-3/demo"}


# Rows that fail


# word in the text -> what the row's error says, and whether it is asked again; None where the row comes out right
ROWS = {
    "SAYS-500-ONCE": None,
    "SAYS-503-ONCE": None,
    "SAYS-400": ("the server refuses the request: This model's maximum context length is 8192 tokens", False),
    "SAYS-424": ("the server refuses the request: Input parsing failed: odd", False),
    "SAYS-500": ("the server failed with status 500, 3 times: out of luck", True),
    "SAYS-503": ("the server failed with status 503, 3 times: queue is full", True),
    "SAYS-SECRET": ("asked with [key] and [key]", False),
    "SAYS-NO-LIST": ("demo/reviews gives no log-probabilities", False),
    "SAYS-ERROR": ("the server says: prediction failure", True),
}


def test_the_container_s_errors_are_those_of_their_rows(call, fake, tmp_path):
    flags, output = table(tmp_path, [text for word in ROWS for text in (word, f"beside {word.lower()}")])
    assert logprobs(call, *flags).code == 0
    rows = records(output)
    assert [row["confidence"] for row in rows[1::2]] == pytest.approx([2 / 3] * len(ROWS))
    for (word, problem), row in zip(ROWS.items(), rows[::2], strict=True):
        if problem is None:
            assert row["confidence"] == pytest.approx(2 / 3) and fake.serving.asked[word] == 2, word
        else:
            assert problem[0] in row["error"] and row.get("retry", False) is problem[1], (word, row)
            assert row["prediction"] is row["confidence"] is row["probabilities"] is row["label_mass"] is None, word


def test_what_nobody_has_heard_of_may_pass(call, fake, tmp_path):
    flags, output = table(tmp_path, ["one", "two", "three"], "--concurrency", 1)
    fake.serving.at = {2: lambda: fake.fail("InvokeEndpoint", "SomethingElse", "unheard of")}  # 1 is the run's first
    done = logprobs(call, *flags)
    assert done.code == 0 and "asking again for 1 rows that failed for a passing reason" in done.err
    assert [row["prediction"] for row in records(output)] == ["positive"] * 3 and len(fake.requests) == 5


def test_a_request_above_six_megabytes_is_its_row_s_error_and_not_sent(call, fake, tmp_path):
    (tmp_path / "t.jsonl").write_text(json.dumps({"text": "x" * 6_291_456}) + '\n{"text": "Not bad"}\n')
    output = tmp_path / "p.jsonl"
    assert logprobs(call, "--input", tmp_path / "t.jsonl", "--output", output).code == 0
    large, good = records(output)
    assert re.search(r"the request has 6,29\d,\d+ bytes, of which SageMaker takes 6,291,456", large["error"])
    assert "retry" not in large and good["prediction"] == "positive" and len(fake.requests) == 2


def test_a_slow_answer_is_asked_for_again_and_then_an_error_of_the_row(call, fake, tmp_path):
    fake.serving.hold = {"slow": threading.Event()}
    flags, output = table(tmp_path, ["slow", "Not bad"], "--timeout", 0.3)
    assert logprobs(call, *flags).code == 0
    slow, good = records(output)
    assert re.fullmatch('Read timeout on endpoint URL: ".*/endpoints/demo/invocations", 3 times', slow["error"])
    assert slow["retry"] is True and good["confidence"] == pytest.approx(2 / 3)


RETRIED = {
    "ThrottlingException": 400,
    "ModelNotReadyException": 429,
    "ServiceUnavailable": 503,
    "InternalFailure": 500,
    "InternalDependencyException": 530,
}


@pytest.mark.parametrize("code", RETRIED)
def test_what_passes_is_asked_again(call, fake, code):
    fake.fail("InvokeEndpoint", code, "try again", times=2, status=RETRIED[code])
    assert json.loads(logprobs(call, "Not bad", "--json").out)["confidence"] == pytest.approx(2 / 3)
    assert [request.status for request in fake.requests] == [RETRIED[code]] * 2 + [200, 200]


def test_the_command_waits_between_its_attempts(fake, run):
    fake.fail("InvokeEndpoint", "ThrottlingException", "Rate exceeded", times=2)
    started = time.monotonic()
    done = run("logprobs_confidence.py", "Not bad", "--json", "--endpoint", "sagemaker:demo/reviews")
    assert (done.returncode, done.stderr, len(fake.requests)) == (0, "", 4)
    assert time.monotonic() - started > 0.5 + 1


# A run that is stopped: one line, and what to do


AGAIN = "nothing is lost, repeat the command to continue"
NOT_MINE = "User: arn:aws:iam::1:user/x is not authorized to perform: sagemaker:InvokeEndpoint on resource: y"
SIGNATURE = f"The signature does not match. The Canonical String should have been 'x-amz-security-token:{SESSION}"
UNKNOWN = json.dumps(
    {"code": 424, "error": "Input parsing failed: LoRA adapter a not found in registry. Available: []"}
)
# code, status and text of AWS's error -> what the line says
STOPS = [
    (
        "AccessDeniedException",
        403,
        NOT_MINE,
        f"({NOT_MINE}); the credentials need sagemaker:InvokeEndpoint on us-east-1",
    ),
    ("ExpiredTokenException", 403, "The security token is expired", "credentials have expired (ExpiredTokenException)"),
    ("UnrecognizedClientException", 403, "invalid token", "AWS refuses the credentials (UnrecognizedClientException)"),
    ("InvalidSignatureException", 403, SIGNATURE, "credentials (InvalidSignatureException); check the access key"),
    ("ModelNotReadyException", 429, "still loading", "is not ready (still loading); wait some minutes"),
    (
        "ThrottlingException",
        400,
        "Rate exceeded",
        f"us-east-1/demo takes no more requests (429: Rate exceeded); {AGAIN}",
    ),
    ("ServiceUnavailable", 503, "maintenance", "the server failed with status 503, 3 times: maintenance"),
    ("SomethingElse", 400, f"unheard of {SECRET}", "AWS says SomethingElse: unheard of [key]"),
    ("ModelError", 424, UNKNOWN, "no component demo-adapter-reviews (Input parsing failed: LoRA adapter a not found"),
    ("ModelError", 400, '{"error": "too long"}', "the server refuses the request: too long"),
    ("ModelError", 500, "oops", "the server failed with status 500, 3 times: oops"),
]


@pytest.mark.parametrize(("code", "status", "text", "says"), STOPS, ids=[f"{c}-{s}" for c, s, *_ in STOPS])
def test_an_error_of_aws_is_one_line_and_no_file(call, fake, tmp_path, code, status, text, says):
    fake.fail("InvokeEndpoint", code, text, times=9, status=status)
    flags, output = table(tmp_path, ["Not bad"])
    assert says in error_of(logprobs(call, *flags)) and not output.exists()
    assert len(fake.requests) == (3 if code in RETRIED or status == 500 else 1)


def test_the_command_says_how_to_add_what_is_missing(fake, run):
    def said(name):
        done = run("logprobs_confidence.py", "Not bad", "--endpoint", f"sagemaker:{name}")
        assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
        return done.stderr

    line = said("demo/poems")
    assert "endpoint us-east-1/demo has no component demo-adapter-poems (Inference Component demo-adapter-poems" in line
    assert line.endswith("; python scripts/deploy_sagemaker.py demo --adapter poems=FOLDER adds it\n")
    line = said("component-store")  # whose name is no reason to take it for a component
    assert "there is no endpoint us-east-1/component-store (Endpoint component-store of account" in line
    assert line.endswith("; python scripts/deploy_sagemaker.py component-store makes it\n")


def test_without_credentials_region_or_network_it_is_one_line(call, fake, monkeypatch):
    with monkeypatch.context() as patch:
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"):
            patch.delenv(name)
        problem = error_of(logprobs(call, "Not bad"))
        assert "no AWS credentials (Unable to locate credentials); run aws configure, or set AWS_PROFILE" in problem
        patch.setenv("AWS_ACCESS_KEY_ID", "half")
        assert "Partial credentials found in env, missing: AWS_SECRET_ACCESS_KEY; set AWS_" in error_of(
            logprobs(call, "Not bad")
        )
    with monkeypatch.context() as patch:
        patch.delenv("AWS_DEFAULT_REGION")
        assert "You must specify a region; set AWS_DEFAULT_REGION" in error_of(logprobs(call, "Not bad"))
        patch.setenv("AWS_DEFAULT_REGION", "no region")
        assert "'no region' doesn't match a supported format" in error_of(logprobs(call, "Not bad"))
    with monkeypatch.context() as patch:
        patch.setenv("AWS_PROFILE", "nobody")
        assert "The config profile (nobody) could not be found" in error_of(logprobs(call, "Not bad"))
    assert fake.requests == []
    with monkeypatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
        problem = error_of(logprobs(call, "Not bad"))
        assert "Could not connect to the endpoint URL" in problem and f"is the region right? {AGAIN}" in problem


def test_names_and_flags_that_do_not_fit_are_one_line(call, fake):
    for name in ("", "/", "a/", "/a", "a/b/c", "a_b", "-a", "a-", "a b", "a:b", "é", "a" * 60, "a/" + "b" * 54, "a\n"):
        problem = error_of(logprobs(call, "Not bad", "--endpoint", f"sagemaker:{name}"))
        assert "sagemaker:NAME or sagemaker:NAME/ADAPTER" in problem, name
    for flags in (["--model", "llama"], ["--api-key-env", "KEY"]):
        problem = error_of(logprobs(call, "Not bad", *flags))
        assert flags[0] in problem and "AWS credentials come from the environment, a profile or a role" in problem
    assert "--adapter is for models loaded here" in error_of(logprobs(call, "Not bad", "--adapter", "reviews"))
    assert fake.requests == []


# word in the address -> status and content of a reply that is not AWS's, and what the line says
PAGES = {
    "/200": (200, b"<html>Log in</html>", "the server's reply is not JSON"),
    "/403": (403, b"<html>Forbidden</html>", "AWS says 403"),
    "/502": (502, b"<html>Bad gateway</html>", "the server failed with status 502, 3 times"),
    "/cut": (200, None, "3 times"),
}


class Page(BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        status, content, _ = PAGES[self.path[:4]]
        self.send_response(status)
        self.send_header("Content-Length", str(len(content or b"12345")))
        self.end_headers()
        self.wfile.write(content or b"1")


def test_a_page_that_is_not_aws_s_is_one_line(call, fake, monkeypatch):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Page)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    for path, (_, _, says) in PAGES.items():
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.server_port}{path}")
        assert says in error_of(logprobs(call, "Not bad")), path
    server.shutdown()
    server.server_close()


def test_no_exception_and_no_repr_holds_a_key(fake):
    with connect("sagemaker:demo/reviews") as server:
        assert SECRET not in repr(server) + repr(server.identity)
        for word, kind in {"SAYS-SECRET": ValueError, "SAYS-500": PassingError}.items():
            with pytest.raises(kind) as caught:
                server.wait(server.first_token(SENTIMENT.prompt(word)))
            assert SECRET not in "".join(traceback.format_exception(caught.value)) + repr(caught.value)


# Many at a time, and runs that end before their time


def test_as_many_requests_as_allowed_run_at_a_time_in_the_rows_order(call, fake, tmp_path):
    # More than asyncio's own threads on a small machine; with fewer at a time no row gets an answer.
    fake.serving.together = threading.Barrier(40)
    flags, output = table(tmp_path, [f"row {i}" for i in range(80)], "--concurrency", 40)
    assert logprobs(call, *flags).code == 0 and fake.serving.most == 40
    assert [(row["id"], row["text"]) for row in records(output)] == [(str(i + 1), f"row {i}") for i in range(80)]


def test_rows_keep_their_order_though_replies_do_not(call, fake, tmp_path):
    # Of two at a time the first waits for the fourth, which is asked for when the second and the third are done.
    fourth = threading.Event()
    fake.serving.hold, fake.serving.frees = {"row 0": fourth}, {"row 3": fourth}
    flags, output = table(tmp_path, [f"row {i}" for i in range(6)], "--concurrency", 2)
    assert logprobs(call, *flags).code == 0 and fourth.is_set()
    assert [row["text"] for row in records(output)] == [f"row {i}" for i in range(6)]


def test_an_endpoint_that_is_deleted_loses_nothing_and_the_same_command_goes_on(call, fake, tmp_path):
    flags, output = table(tmp_path, [f"row {i}" for i in range(20)], "--concurrency", 2)
    assert logprobs(call, *flags).code == 0
    whole = output.read_bytes()
    output.unlink()
    fake.serving.at = {len(fake.serving.bodies) + 12: fake.endpoints.clear}
    problem = error_of(logprobs(call, *flags))
    assert "there is no endpoint us-east-1/demo" in problem and "--adapter reviews=FOLDER makes it" in problem
    begun = output.read_bytes()
    assert whole.startswith(begun) and begun.endswith(b"\n") and 0 < len(begun) < len(whole)
    deploy(fake)
    asked = len(fake.serving.bodies)
    assert logprobs(call, *flags).code == 0 and output.read_bytes() == whole
    again = {fake.serving.text_of(body) for body in fake.serving.bodies[asked:]}
    assert again and not again & {json.loads(line)["text"] for line in begun.splitlines()}
    problem = error_of(logprobs(call, *flags, "--endpoint", "sagemaker:demo/jokes"))
    assert "was made with other settings" in problem and output.read_bytes() == whole


def test_twenty_failures_in_a_row_stop_the_run(call, fake, tmp_path):
    flags, output = table(tmp_path, ["good", *(f"SAYS-500 {i}" for i in range(30))], "--concurrency", 2)
    problem = error_of(logprobs(call, *flags))
    assert "20 requests in a row failed, the last because the server failed with status 500" in problem
    assert records(output)[0]["prediction"] == "positive" and all(row["retry"] for row in records(output)[1:])


def test_ctrl_c_does_not_wait_for_the_replies_under_way(fake, tmp_path):
    fake.serving.hold = {"slow": threading.Event()}
    flags, output = table(tmp_path, ["good 0", "good 1", *(f"slow {i}" for i in range(12))])
    command = [sys.executable, "logprobs_confidence.py", *map(str, flags), "--endpoint", "sagemaker:demo/reviews"]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    end = time.monotonic() + TOO_LATE_S
    while not (output.exists() and output.read_bytes().count(b"\n") == 2 and fake.serving.busy):
        assert time.monotonic() < end and process.poll() is None
        time.sleep(0.02)
    stopped = time.monotonic()
    process.send_signal(signal.SIGINT)
    try:
        out, err = process.communicate(timeout=10)
    finally:
        process.kill()
        process.communicate()
    assert time.monotonic() - stopped < 5
    assert (process.returncode, out) == (130, "")
    assert err == "\nstopped; repeat the same command to continue where it was\n"
    assert [row["text"] for row in records(output)] == ["good 0", "good 1"]
