"""Models behind a server: the most probable next tokens, and sampled answers, over HTTP.

    with connect("http://127.0.0.1:8000/v1") as server:           # or "anthropic", or "sagemaker:NAME/ADAPTER"
        server.wait(server.first_token(prompt))                    # Listing: the server's top list, with what it leaves
        server.wait(server.sample(prompt, seed=1))                 # one answer
        server.in_order(function, items)                           # many at a time, results in order

A prompt is a string (completions), token ids (completions of servers that take them) or chat messages. A server shows
the few most probable tokens only, so what it leaves out is kept as a remainder and never taken for zero. Sampling is
asked for without truncation and with another seed each time, because servers differ in their defaults; a parameter
that a model's API rejects is left out, and `sent` says what was really sent.

A ValueError concerns one row; PassingError is one that another try may cure. An OSError concerns the server: the run
stops, nothing is lost, and the same command continues it. Keys come from the environment and are never shown.

On SageMaker an endpoint NAME has a component for its base model and one for each adapter, all of which LMI serves with
vLLM and in OpenAI's layouts; boto3 carries the requests, with AWS's credentials and region as boto3 finds them.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import math
import os
import re
import sys
import threading
from collections import deque
from collections.abc import Awaitable, Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import TypeVar
from urllib.parse import urlsplit

from llama import load_reader
from tables import check_text

Item, Result = TypeVar("Item"), TypeVar("Result")
Prompt = str | list[int] | list[dict[str, str]]

TOP_TOKENS = 20  # the most that OpenAI lists
LISTED_BY_ID = 128  # the most that vLLM lists by id
RETRIES = 5  # the client waits 0.5, 1, 2, 4, 8 s, or what Retry-After says
FIRST_PAUSE_S = 0.5  # the same for SageMaker
TIMEOUT_S = 60.0
IN_A_ROW = 20  # rows failing one after another that say it is the server and not the rows
NO_LOGPROBS = "{} gives no log-probabilities; use Method 2, consistency_confidence.py"
NOT_COMPUTED = -9999.0  # what vLLM writes where it has no log-probability

# Without these a server truncates or penalises by defaults of its own; each has another subset of the names.
UNTRUNCATED = {"top_p": 1.0, "top_k": 0, "min_p": 0.0, "repeat_penalty": 1.0, "repetition_penalty": 1.0}
BY_ID = ("logprob_token_ids", "return_tokens_as_token_ids")  # vLLM's
# Parameters that may be left out when the server rejects them. All others are what was asked.
OPTIONAL = ("temperature", "seed", "stop", "max_tokens", *UNTRUNCATED, *BY_ID)
# What is known to be rejected, by host and by model (November 2026); the rest is found out by the first request.
REJECTED_BY_HOST = {"api.openai.com": {"top_k", "min_p", "repeat_penalty", "repetition_penalty"}}
REJECTED_BY_MODEL = (
    (r"claude-(opus-4-[789]|(opus|sonnet|haiku)-[5-9]|fable)", {"temperature"}),
    (r"^(o\d|gpt-5)", {"temperature", "top_p", "stop", "max_tokens"}),
)
# A refusal of a value is the user's to mend; any other 400 that names an optional parameter is a rejection of it.
VALUE_REFUSED = re.compile(r"range|less than|greater than|between|at most|at least|maximum|minimum", re.I)
# A server reads these in a prompt as control tokens, wherever they come from.
CONTROL = re.compile(
    r"<\|[^<>|\s]{1,64}\|>|</?s>|<(bos|eos|pad|unk|start_of_turn|end_of_turn)>|\[/?(INST|SYSTEM_PROMPT)\]"
)
END = object()

# SageMaker's
AWS_NAME = re.compile("[a-zA-Z0-9](-*[a-zA-Z0-9])*")  # of at most 63 characters
AWS_SECRETS = ("AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN")
AWS_BODY_BYTES = 6_291_456  # the most that InvokeEndpoint takes
# What stops a run: an error's code, or botocore's name for it, and the beginning of its text; and what to do.
AWS_STOPS = (
    ("AccessDenied", "AWS denies access ({said}); the credentials need sagemaker:InvokeEndpoint on {endpoint}"),
    ("ExpiredToken|RequestExpired", "the AWS credentials have expired ({code}); renew them; {go_on}"),
    # Whose text repeats the signed request, with a session's token in it.
    (
        r"\w*Signature|UnrecognizedClient|InvalidClientToken|MissingAuth|Unauthorized|Forbidden",
        "AWS refuses the credentials ({code}); check the access key or the profile, and the clock",
    ),
    (r"\w*(Credential|Token|SSO|Login)", "no AWS credentials ({said}); run aws configure, or set AWS_PROFILE"),
    ("(EndpointConnection|ConnectTimeout|ProxyConnection|SSL)Error", "{said}; is the region right? {go_on}"),
    ("ModelNotReady", "component {component} of {endpoint} is not ready ({said}); wait some minutes; {go_on}"),
    (r"ValidationError: Endpoint \S+ .*not found", "there is no endpoint {endpoint} ({said}); {deploy} makes it"),
    (
        r"ValidationError: .*[Cc]omponent|ModelError: .{,40}LoRA adapter \S+ not found in registry",
        "endpoint {endpoint} has no component {component} ({said}); {deploy} adds it",
    ),
)


class PassingError(ValueError):
    """A row failed for a reason that may pass: a server's error, a lost connection, a broken reply."""


@dataclass(frozen=True)
class Listing:
    """The next tokens that a server lists, most probable first: (text, log-probability in nats).

    `complete` is true when every token asked for is listed, whatever its probability.
    """

    tokens: tuple[tuple[str, float], ...]
    complete: bool = False


@dataclass
class Endpoint:
    """A model of a server. `sent` are the sampling parameters that its API accepts, once a first request has been."""

    client: object = field(repr=False)
    # openai or anthropic, whose clients and errors have the same names; with a component botocore's exceptions
    library: object = field(repr=False)
    url: str
    name: str
    concurrency: int
    top_tokens: int
    reader: object | None  # a tokenizer of llama.py's: prompts go as ids
    rejected: set[str]
    by_id: bool = False  # whether the server lists tokens by id
    component: str = ""  # the inference component, on SageMaker
    _secret: str = field(default="", repr=False)
    _probing: bool = field(default=False, repr=False)
    _failed_in_a_row: int = field(default=0, repr=False)

    def __post_init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._slots = asyncio.Semaphore(self.concurrency)

    def __enter__(self) -> Endpoint:
        return self

    def __exit__(self, *_: object) -> None:
        self._end(asyncio.all_tasks(self._loop))
        with contextlib.suppress(Exception):  # a connection that is already broken cannot be closed politely
            if closing := self.client.close():
                self._loop.run_until_complete(closing)
        self._loop.close()

    @property
    def is_anthropic(self) -> bool:
        return self.library.__name__ == "anthropic"

    @property
    def identity(self) -> dict:
        """What a fingerprint must know: a server's address and name for the model are all that tells its weights."""
        prompt = f"ids of {self.reader.name}" if self.reader else "text"
        return {"endpoint": self.url, "served_model": self.component or self.name, "prompt": prompt}

    def sent(self, **settings: object) -> dict:
        """The sampling parameters that really go to the server, of those given and our own."""
        wanted = settings if self.is_anthropic else settings | UNTRUNCATED
        return {name: value for name, value in wanted.items() if name not in self.rejected}

    # Many at a time

    def wait(self, one: Awaitable[Result]) -> Result:
        return self._loop.run_until_complete(one)

    def in_order(self, function: Callable[[Item], Awaitable[Result]], items: Iterable[Item]) -> Iterator[Result]:
        """function(item) for each item, in their order; a few items beyond the one waited for are under way."""
        items, waiting = iter(items), deque()
        try:
            while True:
                while len(waiting) < 2 * self.concurrency and (item := next(items, END)) is not END:
                    waiting.append(self._loop.create_task(function(item)))
                if not waiting:
                    return
                result = self.wait(waiting[0])
                waiting.popleft()
                yield result
        finally:
            if not self._loop.is_closed():  # a caller that failed may leave this to the garbage collector
                self._end(waiting)

    def _end(self, tasks: Collection[asyncio.Task]) -> None:
        """Cancel what is under way."""
        for task in tasks:
            task.cancel()
        if tasks:
            self._loop.run_until_complete(asyncio.gather(*tasks, return_exceptions=True))

    def probe(self, request: Callable[[], Awaitable[Result]]) -> Result:
        """The first request of a run: finds out which parameters the API rejects. Its ValueErrors are the server's."""
        self._probing, before = True, set(self.rejected)
        try:
            result = self.wait(request())
        finally:
            self._probing = False
        if left_out := sorted((self.rejected - before).difference(UNTRUNCATED, BY_ID)):
            print(f"note: {self.name} takes no {', '.join(left_out)}; left out", file=sys.stderr)
        return result

    # The two calls

    def question(self, task: object) -> Callable[[str], Prompt]:
        """How a text is put to this server: as ids if we have its tokenizer, else as the task's prompt.

        Raises ValueError for a text that cannot be sent as data.
        """
        if self.is_anthropic and task.format != "chat":
            raise ValueError(
                f'Claude is asked in chat form, task {task.name!r} is a completion; use a task with format = "chat", '
                "as --task sentiment-yes-no"
            )
        if self.reader:
            prompt = self.reader.task_prompt(task)
            return lambda text: self.reader.encode_within(prompt, text)[0]

        def ask(text: str) -> Prompt:
            check_text(text)
            # These two tokenize a user's text as characters; of other servers nobody knows.
            safe = self.is_anthropic or urlsplit(self.url).hostname == "api.openai.com"
            if not safe and (spelt := CONTROL.search(text)):
                raise ValueError(
                    f"the text spells the control token {spelt.group()}, which this server would obey; "
                    "--tokenizer sends ids, in which it is characters"
                )
            return task.prompt(text)

        return ask

    async def first_token(self, prompt: Prompt, ids: Sequence[int] = ()) -> Listing:
        """The most probable next tokens; of a server that lists by id (vLLM), those `ids` whatever their probability.

        Raises ValueError when the server gives no log-probabilities.
        """
        if self.is_anthropic:
            raise ValueError(NO_LOGPROBS.format(self.name))
        body = {"max_tokens": 1, "temperature": 1.0, **UNTRUNCATED}  # some servers list what sampling leaves
        chat = _is_chat(prompt)
        body |= {"logprobs": True, "top_logprobs": self.top_tokens} if chat else {"logprobs": self.top_tokens}
        if self.reader:
            body["return_tokens_as_token_ids"] = True
        if 0 < len(ids) <= LISTED_BY_ID and (self.by_id or self._probing):
            body["logprob_token_ids"] = list(ids)
            if self.component:  # lists so many at most; an endpoint of ours allows as many
                body["logprobs"] = max(self.top_tokens, len(ids))
        reply = await self._ask(prompt, body)
        tokens = self._listed(_choice(reply).get("logprobs"))
        numbers = {token for token, _ in tokens}
        complete = bool(ids) and numbers.issuperset(f"token_id:{i}" for i in ids)
        if self._probing:
            self.by_id = complete
        return Listing(tuple((self._text(token), logprob) for token, logprob in tokens), complete)

    async def sample(
        self,
        prompt: Prompt,
        seed: int,
        temperature: float = 1.0,
        max_tokens: int = 10,
        choice: Sequence[str] = (),
    ) -> str:
        """One sampled answer; of a completion its first line. `choice`: the server must give one of these (vLLM)."""
        body = {"max_tokens": max_tokens, "temperature": temperature}
        if self.is_anthropic:
            reply = await self._ask(prompt, body)
            blocks = reply.get("content")
            if not isinstance(blocks, list):
                raise PassingError("the reply has no content")
            return "".join(_string(block.get("text")) for block in blocks if isinstance(block, Mapping))
        body |= {"seed": seed, **UNTRUNCATED}
        chat = _is_chat(prompt)
        if not chat:
            body["stop"] = ["\n"]
        if choice:
            body["structured_outputs"] = {"choice": list(choice)}
        reply = _choice(await self._ask(prompt, body))
        if not chat:
            return _string(reply.get("text")).partition("\n")[0]  # also where `stop` was rejected
        message = reply.get("message")
        if not isinstance(message, Mapping):
            raise PassingError("the reply has no message")
        return _string(message.get("content"))  # a refusal stands elsewhere, and its "No" is no answer

    def _text(self, token: str) -> str:
        """A token as text: servers write some as their number, or with the vocabulary's own mark for a space."""
        if self.reader and (number := re.fullmatch(r"token_id:(\d+)", token)):
            return self.reader.tokenizer.decode([int(number.group(1))])
        return token.replace("\u2581", " ").replace("\u0120", " ")

    def _listed(self, logprobs: object) -> list[tuple[str, float]]:
        """(token, log-probability) of the first position, in either of the two layouts; ValueError if there is none."""
        without = NO_LOGPROBS.format(self.name)
        if not isinstance(logprobs, Mapping):
            raise ValueError(without)
        try:
            if logprobs.get("content"):
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

    # One request

    async def _ask(self, prompt: Prompt, body: dict) -> dict:
        """The reply to one request as JSON, after the client's own retries; errors sorted into rows' and servers'."""
        path = "/completions"
        if self.is_anthropic:
            path, body = "/v1/messages", body | {"messages": prompt}
        elif _is_chat(prompt):
            path, body = "/chat/completions", body | {"messages": prompt}
        else:
            body = body | {"prompt": prompt}
        model = {} if self.component else {"model": self.name}
        while True:
            try:
                async with self._slots:
                    reply = await self._send(path, model | self._accepted(body))
                self._failed_in_a_row = 0
                return reply
            except _RejectedError as error:
                self.rejected.add(error.parameter)

    def _accepted(self, body: dict) -> dict:
        accepted = {name: value for name, value in body.items() if name not in self.rejected}
        if "max_tokens" in self.rejected:  # the reasoning models' name for it
            accepted["max_completion_tokens"] = body["max_tokens"]
        return accepted

    async def _send(self, path: str, body: dict) -> dict:
        text = await (self._invoke(body) if self.component else self._post(path, body))
        try:
            reply = json.loads(text)
            if not isinstance(reply, dict):
                raise ValueError
        except (ValueError, RecursionError):  # what json makes of a page of HTML, or of half a reply
            raise self._passing("the server's reply is not JSON; is this the URL of an API?") from None
        if reply.get("error") and not (reply.get("choices") or reply.get("content")):  # some gateways' status is 200
            raise self._passing(f"the server says: {self._redacted(_words(reply))[:300]}")
        return reply

    async def _post(self, path: str, body: dict) -> str:
        errors, timeout_s = self.library, self.client.timeout
        try:
            return await self.client.post(path, body=body, cast_to=str)
        except errors.APITimeoutError:
            raise self._passing(f"no answer within {timeout_s:g} s, {1 + RETRIES} times") from None
        except errors.APIConnectionError:
            if not await self._is_there():
                raise OSError(f"no server answers at {self.url}; {_CONTINUE}") from None
            raise self._passing(f"the server cut the connection, {1 + RETRIES} times") from None
        except errors.APIStatusError as error:
            raise self._status_failure(error, body) from None

    async def _invoke(self, body: dict) -> bytes:
        """The reply to one request through SageMaker, in which boto3 would not wait for a model that is not ready."""
        call = {"EndpointName": self.name.partition("/")[0], "InferenceComponentName": self.component}
        call |= {"ContentType": "application/json", "Body": json.dumps(body).encode()}
        if (size := len(call["Body"])) > AWS_BODY_BYTES:
            raise ValueError(f"the request has {size:,} bytes, of which SageMaker takes {AWS_BODY_BYTES:,}")
        for attempt in range(1 + RETRIES):
            try:
                return await self._in_thread(lambda: self.client.invoke_endpoint(**call)["Body"].read())
            except (self.library.ClientError, self.library.BotoCoreError) as error:
                code, status, said = self._aws_words(error)
            if status < 500 and status not in (408, 409, 429):
                break
            if attempt < RETRIES:
                await asyncio.sleep(FIRST_PAUSE_S * 2**attempt)
        raise self._aws_failure(code, status, said, body)

    def _in_thread(self, function: Callable[[], Result]) -> Awaitable[Result]:
        """function() in a thread of its own, which Ctrl-C need not wait for."""
        outcome = Future()
        outcome.set_running_or_notify_cancel()

        def work() -> None:
            try:
                outcome.set_result(function())
            except Exception as error:
                outcome.set_exception(error)

        threading.Thread(target=work, daemon=True).start()
        return asyncio.wrap_future(outcome, loop=self._loop)

    def _aws_words(self, error: Exception) -> tuple[str, int, str]:
        """(code, status, text) of an error; a lost connection has status 599, any other fault on this side 0."""
        if not isinstance(error, self.library.ClientError):
            lost = self.library.ConnectionError, self.library.HTTPClientError, self.library.IncompleteReadError
            return type(error).__name__, 599 if isinstance(error, lost) else 0, str(error)
        reply = error.response
        code, said = (reply["Error"].get(name, "") for name in ("Code", "Message"))
        status = reply["ResponseMetadata"]["HTTPStatusCode"]
        if code == "ModelError":  # the container's, which was too slow if it has no status
            status, said = reply.get("OriginalStatusCode") or 504, reply.get("OriginalMessage") or said
            status = 422 if status == 424 else status  # LMI's for a request that it cannot read or answer
            with contextlib.suppress(ValueError, RecursionError):
                said = _words(json.loads(said)) or said
        return code, 429 if "Throttl" in code else status, said

    def _aws_failure(self, code: str, status: int, said: str, body: dict) -> Exception:
        """What an error means: for this row, for a parameter, or for the whole run."""
        said, (name, _, adapter) = self._redacted(" ".join(said.split()))[:300], self.name.partition("/")
        deploy = f"python scripts/deploy_sagemaker.py {name}" + (f" --adapter {adapter}=FOLDER" if adapter else "")
        words = {"said": said, "endpoint": self.url.partition(":")[2], "component": self.component, "deploy": deploy}
        for pattern, sentence in AWS_STOPS:
            if re.match(pattern, f"{code}: {said}"):
                return OSError(sentence.format(code=code, go_on=_CONTINUE, **words))
        if status == 599:
            return self._passing(f"{said}, {1 + RETRIES} times")
        if code == "ModelError" or status == 429 or status >= 500:
            return self._failure(status, said, body)
        return self._passing(f"AWS says {code}: {said}") if status else OSError(f"AWS cannot be asked: {said}")

    def _status_failure(self, error: object, body: dict) -> Exception:
        said = self._redacted(_words(error.body) or error.response.reason_phrase)[:300]
        return self._failure(error.status_code, said, body)

    def _failure(self, status: int, said: str, body: dict) -> Exception:
        """What a status other than success means: for this row, for a parameter, or for the whole run."""
        if status in (400, 413, 422):
            named = next((p for p in OPTIONAL if p in body and re.search(rf"\b{p}\b", said)), None)
            if named and self._probing and not VALUE_REFUSED.search(said):
                return _RejectedError(named)
            if re.search("logprob", said) and "logprobs" in body:
                return ValueError(f"{self.name} gives no such log-probabilities ({said}); use Method 2 or --top-tokens")
            return ValueError(f"the server refuses the request: {said}")
        if status >= 500 or status in (408, 409):
            return self._passing(f"the server failed with status {status}, {1 + RETRIES} times: {said}")
        if status in (401, 403):
            return OSError(f"{self.url} refuses the key ({status}: {said}); --api-key-env names its variable")
        if status == 404:
            hint = "" if self.is_anthropic or self.component else "; most URLs end in /v1"
            return OSError(f"{self.url} has no {self.name} or no such API (404: {said}){hint}")
        if status == 429:
            return OSError(f"{self.url} takes no more requests (429: {said}); {_CONTINUE}")
        return OSError(f"{self.url} answers with status {status}: {said}")

    def _passing(self, message: str) -> Exception:
        """A row's error; from so many in a row on, the server's."""
        self._failed_in_a_row += 1
        if self._failed_in_a_row >= IN_A_ROW:
            return OSError(f"{IN_A_ROW} requests in a row failed, the last because {message}; {_CONTINUE}")
        return PassingError(message)

    async def _only_model(self) -> str:
        """The name of the one model that the server has."""
        try:
            reply = await self.client.get("/models", cast_to=str)
        except self.library.NotFoundError:
            reply = ""
        except self.library.APIConnectionError:
            raise OSError(f"no server answers at {self.url}") from None
        except self.library.APIStatusError as error:
            raise self._status_failure(error, {}) from None
        try:
            names = [entry["id"] for entry in json.loads(reply)["data"]]
        except (ValueError, TypeError, LookupError, RecursionError):
            raise OSError(f"{self.url} lists no models; is it the URL of an API? Most end in /v1") from None
        if not names:
            raise OSError(f"{self.url} has no model")
        if len(names) != 1 or not isinstance(names[0], str):
            raise ValueError(
                f"{self.url} has {len(names)} models; name one with --model: {', '.join(map(str, names[:9]))}"
            )
        return names[0]

    async def _is_there(self) -> bool:
        try:
            await self.client.with_options(max_retries=0, timeout=5).get("/models", cast_to=str)
        except self.library.APIConnectionError:
            return False
        except self.library.APIStatusError:
            pass
        return True

    def _redacted(self, text: str) -> str:
        for secret in map(os.environ.get, AWS_SECRETS) if self.component else [self._secret]:
            text = text.replace(secret, "[key]") if secret else text
        return text


async def all_of(calls: Iterable[Awaitable[Result]]) -> list[Result]:
    """The results of calls made at the same time; when one fails the others are not waited for."""
    made = [asyncio.ensure_future(call) for call in calls]
    try:
        return await asyncio.gather(*made)
    finally:
        for task in made:
            task.cancel()
        await asyncio.gather(*made, return_exceptions=True)


_CONTINUE = "nothing is lost, repeat the command to continue"


class _RejectedError(Exception):
    """The API rejects a parameter that can be left out."""

    def __init__(self, parameter: str) -> None:
        self.parameter = parameter


def _is_chat(prompt: Prompt) -> bool:
    return isinstance(prompt, list) and bool(prompt) and isinstance(prompt[0], dict)


def _choice(reply: dict) -> Mapping:
    choices = reply.get("choices")
    if not isinstance(choices, list) or not choices or not isinstance(choices[0], Mapping):
        raise PassingError("the reply has no choices")
    return choices[0]


def _string(value: object) -> str:
    return value if isinstance(value, str) else ""


def _words(body: object) -> str:
    """A server's own words about an error, in one line; empty if it has none."""
    for key in ("error", "message", "detail"):
        if isinstance(body, Mapping) and body.get(key):
            body = body[key]
    words = body if isinstance(body, str) else json.dumps(body) if body else ""
    return " ".join(words.split())


# Connecting


def connect(
    url: str,
    model: str = "default",
    api_key_env: str | None = None,
    concurrency: int = 8,
    timeout_s: float = TIMEOUT_S,
    top_tokens: int = TOP_TOKENS,
    reader: object | None = None,
) -> Endpoint:
    """Connect to an OpenAI-compatible server, to Claude where `url` is "anthropic", or to a "sagemaker:NAME[/ADAPTER]".

    `model` "default" is the one model that the server has. `reader` is a tokenizer of `llama.load_reader`: prompts then
    go as token ids. Raises ValueError or OSError in one line that says what to do.
    """
    if url.startswith("sagemaker:"):
        if model != "default" or api_key_env:
            raise ValueError(
                f"{url} takes no --model, the component is the model, and no --api-key-env: AWS credentials come from "
                "the environment, a profile or a role"
            )
        client, library, component = _sagemaker_client(url, concurrency, timeout_s)
        name = url.removeprefix("sagemaker:")
        url = f"sagemaker:{client.meta.region_name}/{name.partition('/')[0]}"
        return Endpoint(client, library, url, name, concurrency, top_tokens, reader, set(), component=component)
    if url == "anthropic":
        import anthropic as library
    else:
        import openai as library
    host = _checked_host(url)
    usual = {"api.anthropic.com": "ANTHROPIC_API_KEY", "api.openai.com": "OPENAI_API_KEY"}
    if url.startswith("http:"):  # in the clear no key is shown unless asked to, nor to any other host
        usual = {}
    secret = _key(api_key_env or usual.get(host))
    options = {"api_key": secret or "none", "timeout": timeout_s, "max_retries": RETRIES}
    # A text goes where it was sent, and nowhere else.
    options["http_client"] = library.DefaultAsyncHttpxClient(follow_redirects=False, timeout=timeout_s)
    if url == "anthropic":
        if reader or model == "default":
            raise ValueError("Claude has no public tokenizer" if reader else "name one of Claude's models with --model")
        make = library.AsyncAnthropic
    else:
        url, make = url.rstrip("/"), library.AsyncOpenAI
        options["base_url"] = url
        if host != "api.openai.com":  # nor what else the client would read in the environment
            options["default_headers"] = {f"OpenAI-{name}": library.Omit() for name in ("Organization", "Project")}
            options["default_headers"]["Authorization"] = f"Bearer {options['api_key']}"
    try:
        client = make(**options)
    except Exception as error:
        if type(error).__name__ != "InvalidURL":  # the HTTP library's, for which neither client has a name
            raise
        raise ValueError(f"--endpoint: {error}") from None
    url = str(client.base_url).rstrip("/")  # Claude's too, which the environment may have moved
    server = Endpoint(client, library, url, model, concurrency, top_tokens, reader, set(), _secret=secret)
    if model == "default":
        server.name = server.wait(server._only_model())
    server.rejected |= REJECTED_BY_HOST.get(host, set())
    for pattern, rejected in REJECTED_BY_MODEL:
        if re.search(pattern, server.name):
            server.rejected |= rejected
    return server


def _sagemaker_client(url: str, concurrency: int, timeout_s: float) -> tuple[object, object, str]:
    """boto3's client, botocore's exceptions and the inference component of sagemaker:NAME or sagemaker:NAME/ADAPTER."""
    import boto3
    from botocore import exceptions
    from botocore.config import Config

    names = url.removeprefix("sagemaker:").split("/", 1)
    component = "-adapter-".join(names) if names[1:] else f"{names[0]}-base"
    if not all(map(AWS_NAME.fullmatch, names)) or len(component) > 63:
        raise ValueError(
            f"--endpoint {url}: sagemaker:NAME or sagemaker:NAME/ADAPTER, in letters, digits and hyphens between them; "
            "NAME-adapter-ADAPTER has at most 63 characters"
        )
    once = {"mode": "standard", "total_max_attempts": 1}  # the retries are ours
    limits = {"connect_timeout": min(10, timeout_s), "read_timeout": timeout_s, "max_pool_connections": concurrency}
    try:
        session = boto3.Session()
        region = session.region_name or os.environ.get("AWS_REGION")
        client = session.client("sagemaker-runtime", region_name=region, config=Config(retries=once, **limits))
    except exceptions.BotoCoreError as error:  # no region, no such profile, half a key
        hint = "set AWS_DEFAULT_REGION and AWS_PROFILE, or run aws configure"
        raise ValueError(f"--endpoint {url}: {str(error).rstrip('.')}; {hint}") from None
    return client, exceptions, component


def _checked_host(url: str) -> str:
    if url == "anthropic":
        return "api.anthropic.com"
    try:
        parts = urlsplit(url)
        if parts.username or parts.password or parts.query:
            raise ValueError("a URL without a key in it; --api-key-env names the variable that holds the key")
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.port == 0:
            raise ValueError("a URL such as http://127.0.0.1:8000/v1, or anthropic, or sagemaker:NAME[/ADAPTER]")
    except ValueError as error:  # also urlsplit's own, of a port
        raise ValueError(f"--endpoint: {error}") from None
    return parts.hostname


def _key(variable: str | None) -> str:
    if variable is None:
        return ""
    secret = os.environ.get(variable, "").strip()
    if not secret:
        raise ValueError(f"no key: set the environment variable {variable}, or name another with --api-key-env")
    if not re.fullmatch("[!-~]+", secret):
        raise ValueError(f"the environment variable {variable} holds no key: a key has only ASCII letters and signs")
    return secret


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags that choose a server; the same in every script."""
    add = parser.add_argument_group("a model behind a server").add_argument
    help_endpoint = "an OpenAI-compatible server (--model: its name there), anthropic, or sagemaker:NAME[/ADAPTER]"
    add("--endpoint", metavar="URL", help=help_endpoint)
    add("--api-key-env", metavar="NAME", help="the environment variable that holds the key")
    add("--tokenizer", metavar="MODEL", help="send token ids of this model's tokenizer (vLLM; as --model)")
    add("--top-tokens", type=int, default=TOP_TOKENS, metavar="N", help=f"tokens to list (default: {TOP_TOKENS})")
    add("--concurrency", type=int, default=8, metavar="N", help="requests under way at a time (default: 8)")
    add("--timeout", type=float, default=TIMEOUT_S, metavar="SECONDS", help=f"of a request (default: {TIMEOUT_S:g})")


def check_arguments(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Refuse what does not go together with --endpoint, and local models' flags beside it."""
    for name in ("api_key_env", "tokenizer"):
        if getattr(args, name) and not args.endpoint:
            parser.error(f"--{name.replace('_', '-')} needs --endpoint")
    local = {"load_in_4bit": False, "load_in_8bit": False, "batch_size": None, "truncate": False, "dtype": "auto"}
    local |= {"device": "auto"}
    for name, default in local.items():
        if args.endpoint and getattr(args, name, default) != default:
            parser.error(f"--{name.replace('_', '-')} is for models loaded here, not behind --endpoint")
    if args.endpoint and args.adapter not in ("auto", "none"):
        parser.error("--adapter is for models loaded here; a server's have names (--model, or sagemaker:NAME/ADAPTER)")
    for name in ("top_tokens", "concurrency", "timeout"):
        if not 0 < getattr(args, name) < 1e6:
            parser.error(f"--{name.replace('_', '-')} {getattr(args, name)}: above 0")


def connection_arguments(args: argparse.Namespace) -> dict[str, object]:
    """What the flags of `add_arguments` say, as keyword arguments of `connect`; loads the tokenizer they name."""
    return {
        "url": args.endpoint,
        "model": args.model,
        "api_key_env": args.api_key_env,
        "concurrency": args.concurrency,
        "timeout_s": args.timeout,
        "top_tokens": args.top_tokens,
        "reader": load_reader(args.tokenizer) if args.tokenizer else None,
    }
