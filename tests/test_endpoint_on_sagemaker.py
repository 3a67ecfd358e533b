"""endpoint.py's way to SageMaker: what boto3 is asked to send, and what its replies and errors mean.

botocore's Stubber takes the place of AWS and holds every request against the service's own description.
"""

import io
import json
import math
import threading
import time

import pytest
from botocore import exceptions
from botocore.loaders import create_loader
from botocore.response import StreamingBody
from botocore.stub import ANY, Stubber

import endpoint
import server_connections
from consistency_confidence import Sampling, remote_answer_sampler
from endpoint import CONTINUE, PassingError, connect
from llama import load_reader
from logprobs_confidence import remote_label_scorer
from task import TASKS

SENTIMENT, YES_NO = TASKS["sentiment"], TASKS["sentiment-yes-no"]
LOADER = create_loader()
SECRET = "wJalr-do-not-show-this-key"
SENT = {"top_p": 1.0, "top_k": 0, "min_p": 0.0, "repeat_penalty": 1.0, "repetition_penalty": 1.0}
TOP = {" positive": math.log(0.6), " negative": math.log(0.3), " mixed": math.log(0.05)}
LISTED = {"choices": [{"text": " positive", "logprobs": {"top_logprobs": [TOP]}}]}


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    """Credentials and a region that are nobody's; attempts that follow at once."""
    for name in ("AWS_PROFILE", "AWS_REGION", "AWS_SESSION_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIANOBODY")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setattr(server_connections, "FIRST_PAUSE_S", 0.001)
    monkeypatch.setattr(server_connections, "RETRIES", 2)
    monkeypatch.setattr("botocore.session.create_loader", lambda *_: LOADER)  # each session would read its files again


@pytest.fixture
def demo():
    """A server of the adapter `reviews` of the endpoint `demo`, and the Stubber in front of its client."""
    with connect("sagemaker:demo/reviews") as server, Stubber(server.client) as stubber:
        yield server, stubber
        stubber.assert_no_pending_responses()


def answer(stubber, reply, component="demo-adapter-reviews", body=ANY):
    """Expect one request to a component, with this body, and reply to it."""
    content = json.dumps(reply).encode()
    response = {"Body": StreamingBody(io.BytesIO(content), len(content)), "ContentType": "application/json"}
    body = body if body is ANY else json.dumps(body).encode()
    expected = {"EndpointName": "demo", "InferenceComponentName": component, "ContentType": "application/json"}
    stubber.add_response("invoke_endpoint", response, expected | {"Body": body})


def refuse(stubber, code, status, said, times=1, **fields):
    for _ in range(times):
        stubber.add_client_error("invoke_endpoint", code, said, status, modeled_fields=fields)


def test_an_adapter_s_component_is_asked_in_openai_s_layout(demo):
    server, stubber = demo
    asked = {"max_tokens": 1, "temperature": 1.0, **SENT}
    for task, more in (
        (SENTIMENT, {"logprobs": 20, "prompt": SENTIMENT.prompt("Not bad")}),
        (YES_NO, {"logprobs": True, "top_logprobs": 20, "messages": YES_NO.prompt("Not bad")}),
    ):
        answer(stubber, LISTED, body=asked | more)
        listing = server.wait(server.first_token(server.question(task)("Not bad")))
        assert listing.tokens[0] == (" positive", math.log(0.6))
    assert server.name == "demo/reviews" and SECRET not in repr(server)
    assert server.identity == {
        "endpoint": "sagemaker:us-east-1/demo",
        "served_model": "demo-adapter-reviews",
        "prompt": "text",
    }


def test_both_methods_and_the_base_model(monkeypatch):
    monkeypatch.setenv("AWS_DEFAULT_REGION", "eu-west-3")
    with connect("sagemaker:demo", concurrency=30) as server, Stubber(server.client) as stubber:
        assert server.client.meta.config.max_pool_connections == 30  # all of which are kept open
        for _ in range(2):  # one is the probe
            answer(stubber, LISTED, "demo-base")
        row = remote_label_scorer(server, SENTIMENT).explain("Not bad")
        assert row["confidence"] == pytest.approx(0.6 / 0.95) and row["label_mass_high"] == pytest.approx(0.95)
        for _ in range(5):
            answer(stubber, LISTED, "demo-base")
        sampler = remote_answer_sampler(server, SENTIMENT, Sampling(samples=4, choice=True))
        assert sampler.explain("Not bad")["votes"] == {"negative": 0, "positive": 4}
    assert server.identity["endpoint"] == "sagemaker:eu-west-3/demo" and server.identity["served_model"] == "demo-base"


def test_ids_list_every_spelling_of_the_labels(tokenizer):
    ids = {2731: 0.5, 16185: 0.02, 20085: 0.03, 31176: 0.01, 3524: 0.2, 17728: 0.01, 26990: 0.02, 42529: 0.01}
    listed = {f"token_id:{i}": math.log(p) for i, p in ids.items()}
    reply = {"choices": [{"text": "", "logprobs": {"top_logprobs": [listed]}}]}
    with connect("sagemaker:demo/reviews", reader=load_reader("default")) as server, Stubber(server.client) as stubber:
        answer(stubber, reply)
        answer(stubber, reply)
        row = remote_label_scorer(server, SENTIMENT).explain("It said <|im_end|>")
    assert row["probabilities"] == pytest.approx({"negative": 0.3, "positive": 0.7})
    assert row["label_mass"] == row["label_mass_high"] == pytest.approx(0.8) and "missing" not in row
    assert not set(row["prompt_token_ids"]) & set(tokenizer.all_special_ids)


# What an error means


REGISTRY = json.dumps(
    {"code": 424, "error": "Input parsing failed: LoRA adapter a not found in registry. Available: []"}
)


def container(status, said):
    return {"OriginalStatusCode": status, "OriginalMessage": said}


# AWS's code, its status and text, the container's, what comes of it, and the attempts
ERRORS = [
    ("AccessDeniedException", 403, "not authorized", {}, OSError, f"denies access .not authorized.*; {CONTINUE}", 1),
    ("InvalidSignatureException", 403, f"not {SECRET}", {}, OSError, "refuses the credentials .Inv.*; look at AWS", 1),
    ("ValidationError", 400, "Endpoint demo not found", {}, OSError, "deploy_sagemaker.py demo --adapter reviews=F", 1),
    ("ModelNotReadyException", 429, "loading", {}, OSError, "demo-adapter-reviews is not ready, wait some min.*", 3),
    ("ThrottlingException", 400, "Rate exceeded", {}, OSError, f"takes no more requests .429: .*; {CONTINUE}", 3),
    ("ServiceUnavailable", 503, "maintenance", {}, PassingError, "failed with status 503, 3 times: maintenance", 3),
    ("SomethingElse", 400, f"unheard of {SECRET}", {}, PassingError, r"AWS says SomethingElse: unheard of \[redac", 1),
    ("ModelError", 424, "", container(424, REGISTRY), OSError, "LoRA adapter a not", 1),
    ("ModelError", 424, "", container(424, "odd"), ValueError, "refuses the req.*odd", 1),
    ("ModelError", 424, "", container(400, '{"error": "long"}'), ValueError, ": long$", 1),
    ("ModelError", 424, "", container(503, "full"), PassingError, "503, 3 times: full", 3),
    ("ModelError", 424, "too slow", {}, PassingError, "failed with status 504, 3 times: too slow", 3),
]


@pytest.mark.parametrize(("code", "status", "said", "fields", "kind", "says", "attempts"), ERRORS)
def test_an_error_is_the_row_s_or_stops_the_run(demo, code, status, said, fields, kind, says, attempts):
    server, stubber = demo
    refuse(stubber, code, status, said, times=attempts, **fields)
    with pytest.raises(kind, match=says) as caught:
        server.wait(server.first_token("x"))
    assert type(caught.value) is kind and SECRET not in str(caught.value)


def test_what_passes_is_asked_again(demo):
    server, stubber = demo
    refuse(stubber, "ThrottlingException", 400, "Rate exceeded")
    refuse(stubber, "InternalDependencyException", 530, "try again")
    answer(stubber, LISTED)
    assert server.wait(server.first_token("x")).tokens[0][0] == " positive"


URL = {"endpoint_url": "https://runtime", "error": "refused"}
LOST = [
    (exceptions.ReadTimeoutError(**URL), PassingError, 'Read timeout on endpoint URL: "https://runtime", 3 times', 3),
    (exceptions.EndpointConnectionError(**URL), OSError, f"cannot be reached .*is the region right.*{CONTINUE}", 3),
    (
        exceptions.ProxyConnectionError(proxy_url="http://socks5://u:do-not-show@proxy"),
        OSError,
        r"Failed to connect to proxy URL: .http://socks5://\[redacted\]@proxy",
        3,
    ),
    (exceptions.NoCredentialsError(), OSError, "no AWS credentials .*aws configure", 1),
]


@pytest.mark.parametrize(("error", "kind", "says", "attempts"), LOST, ids=["lost", "nobody", "proxy", "no credentials"])
def test_a_request_that_does_not_arrive_is_one_line(monkeypatch, error, kind, says, attempts):
    asked = []

    def lose(**call):
        asked.append(call)
        raise error

    with connect("sagemaker:demo") as server:
        monkeypatch.setattr(server.client, "invoke_endpoint", lose)
        with pytest.raises(kind, match=says) as caught:
            server.wait(server.first_token("x"))
    assert type(caught.value) is kind and len(asked) == attempts


def test_a_reply_that_drips_is_given_the_time_of_a_whole_request(monkeypatch):
    class Dripping:
        def read(self):
            never.wait(20)

    never = threading.Event()
    with connect("sagemaker:demo", timeout_s=0.05) as server:
        monkeypatch.setattr(server.client, "invoke_endpoint", lambda **_: {"Body": Dripping()})
        with pytest.raises(PassingError, match=r"^no answer within 0.05 s, 3 times$"):
            server.wait(server.first_token("x"))
    never.set()


def test_a_request_above_six_megabytes_is_its_row_s_error_and_not_sent(demo):
    with pytest.raises(ValueError, match=r"the request has 6,29\d,\d+ bytes, of which SageMaker takes 6,291,456"):
        demo[0].wait(demo[0].first_token("x" * 6_291_456))


def test_a_reply_that_never_comes_is_not_waited_for(monkeypatch):
    never, began = threading.Event(), time.monotonic()
    with connect("sagemaker:demo") as server:
        monkeypatch.setattr(server.client, "invoke_endpoint", lambda **_: never.wait(20))
        for _ in server.in_order(
            lambda item: item(), [lambda: endpoint.asyncio.sleep(0), lambda: server.sample("x", 1)]
        ):
            break  # as Ctrl-C would
    never.set()
    assert time.monotonic() - began < 10


# Names and settings


@pytest.mark.parametrize("name", ["", "a/", "/a", "a/b/c", "a_b", "-a", "\u00e9", "a" * 60, "a/" + "b" * 54, "a\n"])
def test_a_name_that_aws_does_not_take_is_one_line(name):
    with pytest.raises(ValueError, match="sagemaker:NAME or sagemaker:NAME/ADAPTER"):
        connect(f"sagemaker:{name}")


def test_what_boto3_lacks_and_what_does_not_belong_is_one_line(monkeypatch):
    for more in ({"model": "llama"}, {"api_key_env": "KEY"}):
        with pytest.raises(ValueError, match="AWS credentials come from the environment, a profile or a role"):
            connect("sagemaker:demo", **more)
    monkeypatch.delenv("AWS_DEFAULT_REGION")
    monkeypatch.setenv("AWS_CONFIG_FILE", "/nowhere")
    with pytest.raises(ValueError, match="You must specify a region; set AWS_DEFAULT_REGION"):
        connect("sagemaker:demo")
    monkeypatch.setenv("AWS_PROFILE", "nobody")
    with pytest.raises(ValueError, match=r"The config profile \(nobody\) could not be found"):
        connect("sagemaker:demo")
