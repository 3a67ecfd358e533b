"""What a server says: its replies in OpenAI's and Anthropic's layouts, and what its failures mean.

    reply = read_reply(content, secret)                # JSON of a whole answer, or an error
    listed_tokens(reply, model, gave_before=False)     # [(token, log-probability)], most probable first
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

from answers import without_thought
from aws import hidden

NO_LOGPROBS = "{} gives no log-probabilities; use Method 2, consistency_confidence.py"
# Why an answer ended, in the words of OpenAI, Anthropic, Google, Mistral, Cohere and Hugging Face: of itself, or where
# --max-tokens or the model's context cut it. With any other reason there is no answer, or half of one.
LIMITS = {"length", "max_tokens", "max_output_tokens", "model_length", "model_context_window_exceeded"}
WHOLE = LIMITS | {"", "stop", "eos", "eos_token", "end", "end_turn", "stop_sequence", "complete"}
# Reasons that lie in the text or in the model, so that they do not pass.
LASTING = re.compile(
    r"filter|refus|safety|policy|recitation|prohibited|block|sensitive|moderat|toxic|tool|function", re.I
)
NOT_COMPUTED = -9999.0  # what vLLM writes where it has no log-probability
CONTINUE = "nothing is lost, repeat the command to continue"
# A refused value is the user's to correct; any other 400 that names an optional parameter is a rejection of it.
VALUE_REFUSED = re.compile(r"range|less than|greater than|between|at most|at least|maximum|minimum", re.I)


class PassingError(ValueError):
    """A row failed for a reason that may pass: a server's error, a lost connection, a broken reply."""


class NoLogprobsError(ValueError):
    """A reply has no log-probabilities, although they were asked for."""


class NoServerError(OSError):
    """Nobody answers at an address."""


@dataclass(eq=False)
class StatusError(Exception):
    """A server answered with a status other than success, and said why."""

    status: int
    said: str


# How a reply is read


def read_reply(content: str | bytes, secret: str) -> dict:
    """A reply as JSON, with a whole answer in it, or all of one that --max-tokens allows.

    Raises PassingError for what is no JSON, as a page of HTML, and what `check_whole` raises.
    """
    try:
        reply = json.loads(content)
        if not isinstance(reply, dict):
            raise ValueError
    except (ValueError, RecursionError):  # what json makes of a page of HTML, or of half a reply
        raise PassingError("the server's reply is not JSON; is this the URL of an API?") from None
    choices = reply.get("choices")
    check_whole(reply, "" if choices else "stop_reason", secret)  # vLLM's choices too have a stop_reason: a stop string
    if isinstance(choices, list) and choices and isinstance(choices[0], Mapping):
        check_whole(choices[0], "finish_reason", secret)
    return reply


def check_whole(part: Mapping, reason_name: str, secret: str) -> None:
    """Refuse a reply, or its choice, that carries an error or ended for another reason than an answer does.

    Gateways fail so with status 200, even in the middle of an answer. What will not pass is a ValueError, as a filter's
    verdict; all else is a PassingError.
    """
    if error := part.get("error"):
        code = error.get("code") if isinstance(error, Mapping) else None
        kind = ValueError if str(code) in ("400", "403", "413", "422") or LASTING.search(str(code)) else PassingError
        raise kind(f"the server says: {shown(own_words(part), secret)}")
    reason = part.get(reason_name) or ""
    if str(reason).casefold() not in WHOLE:
        kind = ValueError if LASTING.search(str(reason)) else PassingError
        raise kind(f"the server ended the answer with {reason_name} {shown(str(reason), secret)!r}")


def begins_with_thought(reply: Mapping) -> bool:
    """Whether a chat's answer begins with a thought, written out or in a field of its own."""
    choices = reply.get("choices")
    message = choices[0].get("message") if isinstance(choices, list) and choices else None
    if not isinstance(message, Mapping):
        return False
    content, thought = message.get("content"), message.get("reasoning_content") or message.get("reasoning")
    begins = isinstance(content, str) and content.lstrip().startswith("<think")
    return begins or (isinstance(thought, str) and bool(thought))


def first_choice(reply: Mapping) -> Mapping:
    choices = reply.get("choices")
    if not isinstance(choices, list) or not choices or not isinstance(choices[0], Mapping):
        raise PassingError("the reply has no choices")
    return choices[0]


def completion_answer(reply: Mapping) -> str:
    """The first line, also where `stop` was rejected; what follows a thought, or all of a thought that has no end."""
    text = text_of(first_choice(reply).get("text"), "text")
    answer = without_thought(text)
    if answer is None:
        return text
    return (answer if answer == text else answer.lstrip()).partition("\n")[0]


def chat_answer(reply: Mapping) -> str:
    choice = first_choice(reply)
    message = choice.get("message")
    if not isinstance(message, Mapping):
        raise PassingError("the reply has no message")
    answer = text_of(message.get("content"), "content")  # a refusal stands elsewhere, and its "No" is no answer
    thought = message.get("reasoning_content") or message.get("reasoning")
    return answer if answer.strip() else unclosed(thought, choice.get("finish_reason"))


def claude_answer(reply: Mapping) -> str:
    content = reply.get("content")
    if content is None:
        raise PassingError("the reply has no content")
    answer = text_of(content, "content")
    blocks = content if isinstance(content, list) else []
    thoughts = [block["thinking"] for block in blocks if isinstance(block, Mapping) and block.get("thinking")]
    return answer if answer.strip() else unclosed(thoughts[0] if thoughts else None, reply.get("stop_reason"))


def unclosed(thought: object, reason: object) -> str:
    """Of a reply without an answer, the thought that --max-tokens cut, as a model writes it; else empty.

    Some servers do not show the thought, only that the limit was reached.
    """
    if isinstance(thought, str) and thought:
        return f"<think>{thought}"
    return "<think>" if str(reason).casefold() in LIMITS else ""


def text_of(content: object, name: str) -> str:
    """A field of a reply as text: of a list of parts those that are text, joined; empty if it is null."""
    if content is None:
        return ""
    if not isinstance(content, list):
        return checked_text(content, name)
    texts = []
    for part in content:
        if not isinstance(part, Mapping):
            texts.append(checked_text(part, name))
        elif part.get("type", "text") in ("text", "output_text"):  # others are thoughts, refusals, images
            texts.append(checked_text(part.get("text"), name))
    return "".join(texts)


def checked_text(value: object, name: str) -> str:
    if not isinstance(value, str):
        kind = type(value).__name__
        raise PassingError(f"the reply's {name} is of type {kind}, neither text nor a list of parts with text")
    return value


def listed_tokens(reply: Mapping, model: str, gave_before: bool = False) -> list[tuple[str, float]]:
    """(token, log-probability) of the first position, most probable first.

    Raises ValueError if there is none, PassingError where the server `gave_before` what is now missing, or where the
    probabilities are none.
    """
    choice = first_choice(reply)
    try:
        tokens = first_position(choice.get("logprobs"))
        if not tokens or not all(isinstance(token, str) for token, _ in tokens):
            raise ValueError
    except (LookupError, TypeError, AttributeError, ValueError, OverflowError):  # null, or another layout
        if gave_before:
            raise PassingError(f"the reply has no log-probabilities, which {model} gave before") from None
        raise NoLogprobsError(NO_LOGPROBS.format(model)) from None
    total = math.fsum(math.exp(min(value, 1.0)) for _, value in tokens)
    if not total <= 1.001:  # also when one of them is NaN
        raise PassingError(f"the listed probabilities sum to {total:.3f}")
    return sorted(tokens, key=lambda pair: -pair[1])


def first_position(logprobs: Mapping) -> list[tuple[str, float]]:
    """The tokens of either layout. Whatever a wrong layout makes Python raise is left to the caller.

    A chat lists the sampled token first and again at its rank: what is the same in all it says counts once, and two
    tokens of the same text with different probabilities are two. Completions keep one of them for each text, the last
    written; what they say of the sampled token itself may be more.
    """
    if logprobs.get("content"):
        different = {}
        for entry in logprobs["content"][0]["top_logprobs"]:
            pair = entry["token"], float(entry["logprob"])
            different[pair, str(entry.get("bytes")), entry.get("id")] = pair
        pairs = list(different.values())
    else:
        listed = dict(logprobs["top_logprobs"][0].items())
        if logprobs.get("tokens") and logprobs.get("token_logprobs"):
            sampled, value = logprobs["tokens"][0], logprobs["token_logprobs"][0]
            if sampled in listed and value is not None:
                listed[sampled] = max(listed[sampled], value)
        pairs = [(token, float(value)) for token, value in listed.items()]
    return [(token, value) for token, value in pairs if not value <= NOT_COMPUTED]


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


def named_parameter(error: StatusError, names: Sequence[str]) -> str | None:
    """Which of some parameters a refusal names, whatever it says of it."""
    if error.status not in (400, 413, 422):
        return None
    return next((name for name in names if re.search(rf"\b{name}\b", error.said)), None)


def limit_of_list(error: StatusError, asked: int) -> int | None:
    """The length of the list of tokens that a refusal allows, where it names one shorter than was asked for."""
    if error.status not in (400, 413, 422) or not re.search(r"log_?prob|top_n_tokens", error.said):
        return None
    numbers = [int(number) for number in re.findall(r"(?<![\w.])\d{1,4}(?![\w.]*\w)", error.said)]
    return max((number for number in numbers if 0 < number < asked), default=None)


def status_failure(error: StatusError, attempts: int, url: str, model: str = "", asked_tokens: int = 0) -> Exception:
    """What a status means: a ValueError for the row, PassingError where a try may yet help, an OSError for the run.

    `asked_tokens`: how many tokens were to be listed, of a request for log-probabilities.
    """
    status, said = error.status, error.said
    if status in (400, 413, 422):
        if asked_tokens and (limit := limit_of_list(error, asked_tokens)):
            return ValueError(
                f"{model} lists at most {limit} tokens, --top-tokens asks for {asked_tokens} ({said}); give "
                f"--top-tokens {limit}, or use Method 2"
            )
        if asked_tokens and "logprob" in said:
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
