"""What a server says: its replies in OpenAI's and Anthropic's layouts, and what its failures mean.

    reply = read_reply(content, secret)                # JSON, or PassingError
    listed_tokens(reply, model)                        # [(token, log-probability)], most probable first
    completion_answer(reply), chat_answer(reply), claude_answer(reply)
    status_failure(StatusError(503, "busy"), ...)      # whose failure it is: an exception to raise

A ValueError concerns one row; PassingError is one that another try may cure; an OSError concerns the whole run.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from aws import hidden

NO_LOGPROBS = "{} gives no log-probabilities; use Method 2, consistency_confidence.py"
NOT_COMPUTED = -9999.0  # what vLLM writes where it has no log-probability
CONTINUE = "nothing is lost, repeat the command to continue"
# A refused value is the user's to correct; any other 400 that names an optional parameter is a rejection of it.
VALUE_REFUSED = re.compile(r"range|less than|greater than|between|at most|at least|maximum|minimum", re.I)


class PassingError(ValueError):
    """A row failed for a reason that may pass: a server's error, a lost connection, a broken reply."""


@dataclass(eq=False)
class StatusError(Exception):
    """A server answered with a status other than success, and said why."""

    status: int
    said: str


# How a reply is read


def read_reply(content: str | bytes, secret: str) -> dict:
    """A reply as JSON; PassingError for one that is none, as a page of HTML, and for one that says only an error."""
    try:
        reply = json.loads(content)
        if not isinstance(reply, dict):
            raise ValueError
    except (ValueError, RecursionError):  # what json makes of a page of HTML, or of half a reply
        raise PassingError("the server's reply is not JSON; is this the URL of an API?") from None
    if reply.get("error") and not (reply.get("choices") or reply.get("content")):  # some gateways' status is 200
        raise PassingError(f"the server says: {shown(own_words(reply), secret)}")
    return reply


def first_choice(reply: Mapping) -> Mapping:
    choices = reply.get("choices")
    if not isinstance(choices, list) or not choices or not isinstance(choices[0], Mapping):
        raise PassingError("the reply has no choices")
    return choices[0]


def completion_answer(reply: Mapping) -> str:
    return text_of(first_choice(reply), "text").partition("\n")[0]  # also where `stop` was rejected


def chat_answer(reply: Mapping) -> str:
    message = first_choice(reply).get("message")
    if not isinstance(message, Mapping):
        raise PassingError("the reply has no message")
    return text_of(message, "content")  # a refusal stands elsewhere, and its "No" is no answer


def claude_answer(reply: Mapping) -> str:
    blocks = reply.get("content")
    if not isinstance(blocks, list):
        raise PassingError("the reply has no content")
    return "".join(text_of(block, "text") for block in blocks if isinstance(block, Mapping))


def text_of(part: Mapping, name: str) -> str:
    """A field of a reply; empty if it is null or no text."""
    value = part.get(name)
    return value if isinstance(value, str) else ""


def listed_tokens(reply: Mapping, model: str) -> list[tuple[str, float]]:
    """(token, log-probability) of the first position, most probable first; ValueError if there is none."""
    logprobs, without = first_choice(reply).get("logprobs"), NO_LOGPROBS.format(model)
    try:
        if logprobs.get("content"):  # a chat's layout
            pairs = [(entry["token"], entry["logprob"]) for entry in logprobs["content"][0]["top_logprobs"]]
        else:
            pairs = list(logprobs["top_logprobs"][0].items())
        tokens = [(token, float(value)) for token, value in pairs if not value <= NOT_COMPUTED]
    except (LookupError, TypeError, AttributeError, ValueError, OverflowError):
        raise ValueError(without) from None
    if not tokens or not all(isinstance(token, str) for token, _ in tokens):
        raise ValueError(without)
    total = math.fsum(math.exp(min(value, 1.0)) for _, value in tokens)
    if not total <= 1.001:  # also when one of them is NaN
        raise PassingError(f"the listed probabilities sum to {total:.3f}")
    return sorted(tokens, key=lambda pair: -pair[1])


def own_words(body: object) -> str:
    """A server's own words about an error; empty if it has none."""
    for key in ("error", "message", "detail"):
        if isinstance(body, Mapping) and body.get(key):
            body = body[key]
    if isinstance(body, str):
        return body
    return json.dumps(body) if body else ""


def shown(words: str, secret: str = "") -> str:
    """A server's words as one line of at most 300 characters that repeats no secret."""
    line = hidden(" ".join(words.split()))
    return (line.replace(secret, "[redacted]") if secret else line)[:300]


# What a failure means


def rejected_parameter(error: StatusError, optional: Sequence[str]) -> str | None:
    """Which of the parameters that may be left out an error rejects."""
    if error.status not in (400, 413, 422) or VALUE_REFUSED.search(error.said):
        return None
    return next((name for name in optional if re.search(rf"\b{name}\b", error.said)), None)


def status_failure(
    error: StatusError, attempts: int, url: str, model: str = "", asked_logprobs: bool = False
) -> Exception:
    """What a status means: a ValueError for the row, PassingError where a try may yet help, an OSError for the run."""
    status, said = error.status, error.said
    if status in (400, 413, 422):
        if asked_logprobs and "logprob" in said:
            return ValueError(f"{model} gives no such log-probabilities ({said}); use Method 2 or --top-tokens")
        return ValueError(f"the server refuses the request: {said}")
    if status >= 500 or status in (408, 409):
        return PassingError(f"the server failed with status {status}, {attempts} times: {said}")
    if status in (401, 403):
        return OSError(f"{url} refuses the key ({status}: {said}); --api-key-env names its variable")
    if status == 404:
        hint = "" if url.startswith("sagemaker:") or url.endswith(("/v1", "anthropic.com")) else "; most end in /v1"
        return OSError(f"{url} has no {model} or no such API (404: {said}){hint}")
    if status == 429:
        return OSError(f"{url} takes no more requests (429: {said}); {CONTINUE}")
    return OSError(f"{url} answers with status {status}: {said}")
