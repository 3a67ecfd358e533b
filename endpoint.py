"""Models behind a server: the most probable next tokens, and sampled answers, over HTTP.

    with connect("http://127.0.0.1:8000/v1") as server:           # or "anthropic", or "sagemaker:NAME/ADAPTER"
        server.wait(server.first_token(prompt))                    # Listing: the server's top list
        server.wait(server.sample(prompt, seed=1))                 # one answer
        server.in_order(function, items)                           # many at a time, results in order

A prompt is a string (completions), token ids (completions of servers that take them) or chat messages. A server shows
the few most probable tokens only, so what it leaves out is kept as a remainder and never taken for zero. Sampling is
asked for without truncation and with another seed each time, because servers differ in their defaults; a parameter
that a model's API rejects is left out, and `sent` says what was really sent.

A ValueError concerns one row; PassingError is one that another try may cure. An OSError concerns the server: the run
stops, nothing is lost, and the same command continues it (server_replies.py reads replies and failures). Keys come
from the environment and are never shown.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import ipaddress
import json
import os
import re
import ssl
import sys
import threading
from collections import deque
from collections.abc import Awaitable, Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from typing import TypeVar
from urllib.parse import SplitResult, urlsplit

import server_replies as replies
from aws import aws_name, component_name, explanation
from command_line import proxy_problem
from llama import Llama, load_reader
from server_replies import CONTINUE, NO_LOGPROBS, PassingError, StatusError
from tables import check_text
from task import Task

Item, Result = TypeVar("Item"), TypeVar("Result")
Prompt = str | list[int] | list[dict[str, str]]

TOP_TOKENS = 20  # the most that OpenAI lists
LISTED_BY_ID = 128  # the most that vLLM lists by id
RETRIES = 5  # the client waits 0.5, 1, 2, 4, 8 s, or what Retry-After says
FIRST_PAUSE_S = 0.5  # the same for SageMaker
TIMEOUT_S = 60.0
IN_A_ROW = 20  # rows failing one after another that say it is the server and not the rows

# Without these a server truncates or penalises by defaults of its own; each has another subset of the names.
UNTRUNCATED = {"top_p": 1.0, "top_k": 0, "min_p": 0.0, "repeat_penalty": 1.0, "repetition_penalty": 1.0}
BY_ID = ("logprob_token_ids", "return_tokens_as_token_ids")  # vLLM's
# Parameters that may be left out when the server rejects them. All others are what was asked.
OPTIONAL = ("temperature", "seed", "stop", "max_tokens", *UNTRUNCATED, *BY_ID)
TOKEN_ID = re.compile(r"token_id:(\d{1,18})")  # how vLLM writes a token as its number
# A server reads these in a prompt as control tokens, wherever they come from.
CONTROL = re.compile(
    r"<\|[^<>|\s]{1,64}\|>|</?s>|<(bos|eos|pad|unk|start_of_turn|end_of_turn)>|\[/?(INST|SYSTEM_PROMPT)\]"
)

AWS_BODY_BYTES = 6_291_456  # the most that InvokeEndpoint takes


@dataclass(frozen=True)
class Listing:
    """The next tokens that a server lists, most probable first: (text, log-probability in nats).

    `complete` is true when every token asked for is listed, whatever its probability.
    """

    tokens: tuple[tuple[str, float], ...]
    complete: bool = False


# What is asked


@dataclass
class Endpoint:
    """A model of a server. `rejected` are the parameters that its API does not take, once a first request has been."""

    client: object = field(repr=False)
    post: Callable[[str, dict], Awaitable[str | bytes]] = field(repr=False)  # (path, body) -> content of the reply
    url: str
    name: str
    concurrency: int
    top_tokens: int
    reader: Llama | None  # a tokenizer: prompts go as ids
    component: str = ""  # the inference component, on SageMaker
    is_anthropic: bool = False
    secret: str = field(default="", repr=False)
    rejected: set[str] = field(default_factory=set)
    by_id: bool = False  # whether the server lists tokens by id
    gave_logprobs: bool = False
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
            if closing := self.client.close():  # boto3's is closed at once
                self.wait(closing)
        self._loop.close()

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
        items, under_way = iter(items), deque()

        def begin(count: int) -> None:
            under_way.extend(self._loop.create_task(function(item)) for item in islice(items, count))

        try:
            begin(2 * self.concurrency)
            while under_way:
                result = self.wait(under_way[0])
                under_way.popleft()
                yield result
                begin(1)
        finally:
            if not self._loop.is_closed():  # a caller that failed may leave this to the garbage collector
                self._end(under_way)

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

    def question(self, task: Task) -> Callable[[str], Prompt]:
        """How a text is put to this server: as ids if we have its tokenizer, else as the task's prompt.

        Raises ValueError for a text that cannot be sent as data.
        """
        if self.is_anthropic and task.format != "chat":
            raise ValueError(
                f'Claude is asked in chat form, task {task.name!r} is a completion; use a task with format = "chat", '
                "as --task sentiment-yes-no"
            )
        if self.reader:
            rendered = self.reader.task_prompt(task)
            return lambda text: self.reader.encode_within(rendered, text)[0]

        def ask(text: str) -> Prompt:
            check_text(text)
            # These two tokenize a user's text as characters; of other servers nobody knows.
            reads_characters = self.is_anthropic or urlsplit(self.url).hostname == "api.openai.com"
            if not reads_characters and (spelled := CONTROL.search(text)):
                raise ValueError(
                    f"the text spells the control token {spelled.group()}, which this server would obey; "
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
        if is_chat(prompt):
            body |= {"logprobs": True, "top_logprobs": self.top_tokens}
        else:
            body["logprobs"] = self.top_tokens
        if self.reader:
            body["return_tokens_as_token_ids"] = True
        if 0 < len(ids) <= LISTED_BY_ID and (self.by_id or self._probing):
            body["logprob_token_ids"] = list(ids)
            if self.component:  # lists so many at most; an endpoint of ours allows as many
                body["logprobs"] = max(self.top_tokens, len(ids))
        tokens = replies.listed_tokens(await self._ask(prompt, body), self.name, self.gave_logprobs)
        self.gave_logprobs = True
        numbers = {token for token, _ in tokens}
        if not self.reader and (number := next(filter(TOKEN_ID.fullmatch, numbers), None)):
            raise ValueError(f"{self.name} lists tokens by their number, as {number}; --tokenizer MODEL reads them")
        complete = bool(ids) and numbers.issuperset(f"token_id:{i}" for i in ids)
        if self._probing:
            self.by_id = complete
        return Listing(tuple((self._text(token), log_prob) for token, log_prob in tokens), complete)

    async def sample(
        self,
        prompt: Prompt,
        seed: int,
        temperature: float = 1.0,
        max_tokens: int = 10,
        choice: Sequence[str] = (),
    ) -> str:
        """One sampled answer; of a completion its first line. `choice`: the server must give one of these (vLLM)."""
        body: dict = {"max_tokens": max_tokens, "temperature": temperature}
        if self.is_anthropic:
            return replies.claude_answer(await self._ask(prompt, body))
        body |= {"seed": seed, **UNTRUNCATED}
        if choice:
            body["structured_outputs"] = {"choice": list(choice)}
        if is_chat(prompt):
            return replies.chat_answer(await self._ask(prompt, body))
        body["stop"] = ["\n"]
        return replies.completion_answer(await self._ask(prompt, body))

    def _text(self, token: str) -> str:
        """A token as text: servers write some as their number, or with the vocabulary's own mark for a space."""
        if self.reader and (number := TOKEN_ID.fullmatch(token)):
            id = int(number.group(1))
            return self.reader.tokenizer.decode([id]) if id < len(self.reader.tokenizer) else token
        return token.replace("\u2581", " ").replace("\u0120", " ")

    # One request

    async def _ask(self, prompt: Prompt, body: dict) -> dict:
        """The reply to one request, after the connection's own retries; in a first request without what it rejects."""
        if self.is_anthropic:
            path, body = "/v1/messages", body | {"messages": prompt}
        elif is_chat(prompt):
            path, body = "/chat/completions", body | {"messages": prompt}
        else:
            path, body = "/completions", body | {"prompt": prompt}
        if not self.component:
            body = {"model": self.name} | body
        while True:
            accepted = {name: value for name, value in body.items() if name not in self.rejected}
            if "max_tokens" in self.rejected:  # the reasoning models' name for it
                accepted["max_completion_tokens"] = body["max_tokens"]
            try:
                async with self._slots:
                    reply = replies.read_reply(await self.post(path, accepted), self.secret)
                self._failed_in_a_row = 0
                return reply
            except StatusError as error:
                parameter = replies.rejected_parameter(error, [name for name in OPTIONAL if name in accepted])
                if not (self._probing and parameter):
                    failure = replies.status_failure(error, 1 + RETRIES, self.url, self.name, "logprobs" in accepted)
                    raise self._counted(failure) from None
                self.rejected.add(parameter)
            except PassingError as error:
                raise self._counted(error) from None

    def _counted(self, failure: Exception) -> Exception:
        """The failure of a request; when so many in a row may all pass, it is the server that failed."""
        if not isinstance(failure, PassingError):
            return failure
        self._failed_in_a_row += 1
        if self._failed_in_a_row < IN_A_ROW:
            return failure
        return OSError(f"{IN_A_ROW} requests in a row failed, the last because {failure}; {CONTINUE}")


async def all_of(calls: Iterable[Awaitable[Result]]) -> list[Result]:
    """The results of calls made at the same time; when one fails the others are not waited for."""
    made = [asyncio.ensure_future(call) for call in calls]
    try:
        return await asyncio.gather(*made)
    finally:
        for task in made:
            task.cancel()
        await asyncio.gather(*made, return_exceptions=True)


def is_chat(prompt: Prompt) -> bool:
    return isinstance(prompt, list) and bool(prompt) and isinstance(prompt[0], dict)


def known_rejections(host: str | None, model: str) -> set[str]:
    """Parameters that are known to be rejected (November 2026); the rest is found out by the first request."""
    rejected = set()
    if host == "api.openai.com":
        rejected |= {"top_k", "min_p", "repeat_penalty", "repetition_penalty"}
    if re.search(r"claude-(opus-4-[789]|(opus|sonnet|haiku)-[5-9]|fable)", model):
        rejected |= {"temperature"}
    if re.match(r"o\d|gpt-5", model):
        rejected |= {"temperature", "top_p", "stop", "max_tokens"}
    return rejected


# How it is sent: to a server over HTTP


async def post_http(client: object, library: object, secret: str, path: str, body: dict) -> str:
    """The content of a reply. Raises StatusError, PassingError, or OSError where there is no server.

    `library` is openai or anthropic, whose clients and errors have the same names; the client itself tries again.
    """
    try:
        return await client.post(path, body=body, cast_to=str)
    except library.APITimeoutError:
        raise PassingError(f"no answer within {client.timeout:g} s, {1 + RETRIES} times") from None
    except library.APIConnectionError as error:
        if type(error.__cause__).__name__ in ("ConnectError", "ProxyError"):  # the HTTP library's: nobody is there
            raise OSError(f"no server answers at {address(client)}; {CONTINUE}") from None
        raise PassingError(f"the server cut the connection, {1 + RETRIES} times") from None
    except library.APIStatusError as error:
        raise http_status(error, secret) from None


async def only_model(client: object, library: object, secret: str) -> str:
    """The name of the one model that a server has."""
    url = address(client)
    try:
        reply = json.loads(await client.get("/models", cast_to=str))
        names = [str(entry["id"]) for entry in reply["data"]]
    except (library.NotFoundError, ValueError, TypeError, LookupError, RecursionError):
        raise OSError(f"{url} lists no models; is it the URL of an API? Most end in /v1") from None
    except library.APIConnectionError:
        raise OSError(f"no server answers at {url}") from None
    except library.APIStatusError as error:
        raise replies.status_failure(http_status(error, secret), 1 + RETRIES, url) from None
    if len(names) != 1:
        raise ValueError(f"{url} has {len(names)} models; name one with --model: {', '.join(names[:9])}")
    return names[0]


def http_status(error: object, secret: str) -> StatusError:
    return StatusError(
        error.status_code, replies.shown(replies.own_words(error.body) or error.response.reason_phrase, secret)
    )


def address(client: object) -> str:
    """The client's, which the environment may have moved."""
    return str(client.base_url).rstrip("/")


# How it is sent: to a component on SageMaker


async def post_sagemaker(
    client: object, name: str, adapter: str | None, timeout_s: float, path: str, body: dict
) -> bytes:
    """The content of a reply, whatever the path: LMI tells a chat by its messages. Raises what post_http raises.

    The attempts are ours, because boto3 would not wait for a model that is not ready.
    """
    from botocore import exceptions

    content = json.dumps(body).encode()
    if len(content) > AWS_BODY_BYTES:
        raise ValueError(f"the request has {len(content):,} bytes, of which SageMaker takes {AWS_BODY_BYTES:,}")
    call = {"EndpointName": name, "InferenceComponentName": component_name(name, adapter)}
    call |= {"ContentType": "application/json", "Body": content}
    for attempt in range(1 + RETRIES):
        if attempt:
            await asyncio.sleep(FIRST_PAUSE_S * 2 ** (attempt - 1))
        try:
            async with asyncio.timeout(timeout_s):  # boto3's own is between two bytes
                return await in_thread(lambda: client.invoke_endpoint(**call)["Body"].read())
        except TimeoutError:
            failure = PassingError(f"no answer within {timeout_s:g} s, {1 + RETRIES} times")
        except exceptions.ClientError as error:
            failure = aws_refusal(error.response, name, adapter)
            if not isinstance(failure, StatusError) or failure.status not in (408, 409, 429, *range(500, 600)):
                break
        except (exceptions.HTTPClientError, exceptions.IncompleteReadError) as error:
            failure = PassingError(f"{replies.shown(str(error))}, {1 + RETRIES} times")
        except exceptions.ConnectionError as error:  # nobody was reached
            failure = OSError(f"{explanation(type(error).__name__, str(error))}; {CONTINUE}")
        except exceptions.BotoCoreError as error:  # nothing was sent, as without credentials
            raise OSError(explanation(type(error).__name__, str(error))) from None
    raise failure


def aws_refusal(reply: Mapping, name: str, adapter: str | None) -> Exception:
    """What an error of AWS, or of the container behind it, means."""
    code, said = reply["Error"].get("Code", ""), reply["Error"].get("Message", "")
    status, component = reply["ResponseMetadata"]["HTTPStatusCode"], component_name(name, adapter)
    if code == "ModelError":  # the container's, which was too slow if it has no status
        status, said = reply.get("OriginalStatusCode") or 504, reply.get("OriginalMessage") or said
        with contextlib.suppress(ValueError, RecursionError):
            said = replies.own_words(json.loads(said)) or said
        if not re.search(r"LoRA adapter \S+ not found in registry", said):
            return StatusError(
                422 if status == 424 else status, replies.shown(said)
            )  # 424: LMI cannot read or answer it
    if code in ("ModelError", "ValidationError"):
        deploy = f"python scripts/deploy_sagemaker.py {name}" + (f" --adapter {adapter}=FOLDER" if adapter else "")
        return OSError(f"there is no component {component} ({replies.shown(said)}); {deploy} makes it")
    said = explanation(code, said)
    if code == "ModelNotReadyException":
        said = f"{component} is not ready, wait some minutes: {said}"
    if status == 403:
        return OSError(f"{said}; {CONTINUE}")
    if status == 429 or status >= 500 or "Throttl" in code:
        return StatusError(429 if "Throttl" in code else status, said)
    return PassingError(f"AWS says {code}: {said}")


def in_thread(function: Callable[[], Result]) -> Awaitable[Result]:
    """function() in a thread of its own, which Ctrl-C need not wait for."""
    outcome = Future()
    outcome.set_running_or_notify_cancel()

    def work() -> None:
        try:
            outcome.set_result(function())
        except Exception as error:
            outcome.set_exception(error)

    threading.Thread(target=work, daemon=True).start()
    return asyncio.wrap_future(outcome)


# Connecting


def connect(
    url: str,
    model: str = "default",
    api_key_env: str | None = None,
    concurrency: int = 8,
    timeout_s: float = TIMEOUT_S,
    top_tokens: int = TOP_TOKENS,
    reader: Llama | None = None,
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
        return connect_sagemaker(url, concurrency, timeout_s, top_tokens, reader)
    if url == "anthropic":
        import anthropic as library
    else:
        import openai as library
    is_anthropic = url == "anthropic"
    where = "ANTHROPIC_BASE_URL" if is_anthropic else "--endpoint"
    base_url = (os.environ.get(where) or "https://api.anthropic.com") if is_anthropic else url
    parts = checked_url(base_url, where)
    usual = {}  # a key goes to its own API, and elsewhere only by name
    if parts.scheme == "https":
        usual = {"api.anthropic.com": "ANTHROPIC_API_KEY", "api.openai.com": "OPENAI_API_KEY"}
    secret = read_key(api_key_env or ("ANTHROPIC_API_KEY" if is_anthropic else usual.get(parts.hostname)))
    if secret and parts.scheme == "http" and not is_this_machine(parts.hostname):
        raise ValueError(f"{where}: plain http to another machine would show the key to all on the way; use https")
    if is_anthropic and (reader or model == "default"):
        raise ValueError("Claude has no public tokenizer" if reader else "name one of Claude's models with --model")
    client = http_client(library, base_url, where, secret or "none", timeout_s)
    post = partial(post_http, client, library, secret)
    server = Endpoint(
        client, post, address(client), model, concurrency, top_tokens, reader, is_anthropic=is_anthropic, secret=secret
    )
    if model == "default":
        server.name = server.wait(only_model(client, library, secret))
    server.rejected |= known_rejections(parts.hostname, server.name)
    return server


def http_client(library: object, url: str, where: str, key: str, timeout_s: float) -> object:
    """A client of openai or anthropic that sends texts and keys where they were meant for, and nowhere else."""
    parts = urlsplit(url)
    options = {"api_key": key, "timeout": timeout_s, "max_retries": RETRIES}
    options["http_client"] = connection(library, parts.hostname, timeout_s)
    is_openai = parts.hostname == "api.openai.com" and parts.scheme == "https"
    if where == "--endpoint" and not is_openai:  # nor what else the client would read in the environment
        omitted = {"OpenAI-Organization": library.Omit(), "OpenAI-Project": library.Omit()}
        options["default_headers"] = omitted | {"Authorization": f"Bearer {key}"}
    client = library.AsyncOpenAI if where == "--endpoint" else library.AsyncAnthropic
    try:
        return client(base_url=url.rstrip("/"), **options)
    except Exception as error:
        if type(error).__name__ != "InvalidURL":  # the HTTP library's, for which the client has no name
            raise
        raise ValueError(f"{where}: {error}") from None


def connection(library: object, host: str, timeout_s: float) -> object:
    """An HTTP client that follows no redirect and gives a whole request `timeout_s`, not every byte of its reply.

    A server on this machine is reached without the proxy that the environment may name.
    """
    from httpx2 import InvalidURL, ReadTimeout

    options = {"follow_redirects": False, "timeout": timeout_s}
    if is_this_machine(host):
        options |= {"trust_env": False, "verify": ssl.create_default_context()}
    try:
        client = library.DefaultAsyncHttpxClient(**options)
    except (ImportError, ValueError, InvalidURL) as error:  # their words may repeat a proxy's password
        raise ValueError(proxy_problem(isinstance(error, ImportError))) from None
    send = client.send

    async def send_whole(request: object, **how: object) -> object:
        try:
            async with asyncio.timeout(timeout_s):
                return await send(request, **how)
        except TimeoutError:
            raise ReadTimeout("", request=request) from None

    client.send = send_whole
    return client


def connect_sagemaker(url: str, concurrency: int, timeout_s: float, top_tokens: int, reader: Llama | None) -> Endpoint:
    """Connect to a component of a SageMaker endpoint: NAME for its base model, NAME/ADAPTER for one of its adapters.

    LMI serves them with vLLM and in OpenAI's layouts; credentials and region are those that boto3 finds.
    """
    import boto3
    from botocore.config import Config
    from botocore.exceptions import BotoCoreError

    served = url.removeprefix("sagemaker:")
    name, slash, adapter = served.partition("/")
    adapter = adapter if slash else None
    try:
        component = component_name(aws_name(name), adapter)
    except ValueError as error:
        raise ValueError(f"--endpoint {url}: sagemaker:NAME or sagemaker:NAME/ADAPTER; {error}") from None
    once = {"mode": "standard", "total_max_attempts": 1}  # the retries are ours
    limits = {"connect_timeout": min(10, timeout_s), "read_timeout": timeout_s, "max_pool_connections": concurrency}
    try:
        session = boto3.Session()
        region = session.region_name or os.environ.get("AWS_REGION")
        client = session.client("sagemaker-runtime", region_name=region, config=Config(retries=once, **limits))
    except BotoCoreError as error:  # no region, no such profile, half a key
        hint = "set AWS_DEFAULT_REGION and AWS_PROFILE, or run aws configure"
        raise ValueError(f"--endpoint {url}: {str(error).rstrip('.')}; {hint}") from None
    url, post = f"sagemaker:{client.meta.region_name}/{name}", partial(post_sagemaker, client, name, adapter, timeout_s)
    return Endpoint(client, post, url, served, concurrency, top_tokens, reader, component=component)


def checked_url(url: str, where: str) -> SplitResult:
    """The parts of the URL that a flag or a variable holds. Its ValueErrors do not repeat it: it may hold a key."""
    example = "https://api.anthropic.com"
    if where == "--endpoint":
        example = "http://127.0.0.1:8000/v1, or anthropic, or sagemaker:NAME[/ADAPTER]"
    try:
        if "@" in url:
            raise ValueError("a URL without a key in it; --api-key-env names the variable that holds the key")
        parts = urlsplit(url)
        if parts.query or parts.fragment:
            raise ValueError("a URL without a key in it; --api-key-env names the variable that holds the key")
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.port == 0:
            raise ValueError(f"a URL such as {example}")
    except ValueError as error:  # also urlsplit's own, of a port
        raise ValueError(f"{where}: {error}") from None
    return parts


def is_this_machine(host: str) -> bool:
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return False
    return address.is_loopback or address.is_unspecified


def read_key(variable: str | None) -> str:
    if variable is None:
        return ""
    secret = os.environ.get(variable, "").strip()
    if not secret:
        raise ValueError(f"no key: set the environment variable {variable}, or name another with --api-key-env")
    if not re.fullmatch("[!-~]+", secret):
        raise ValueError(f"the environment variable {variable} holds no key: a key has only ASCII letters and signs")
    return secret


# Flags


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags that choose a server; the same in every script."""
    add = parser.add_argument_group("a model behind a server").add_argument
    help_endpoint = "an OpenAI-compatible server (--model: its name there), anthropic, or sagemaker:NAME[/ADAPTER]"
    add("--endpoint", metavar="URL", help=help_endpoint)
    add("--api-key-env", metavar="NAME", help="the environment variable that holds the key")
    add("--tokenizer", metavar="MODEL", help="send and read token ids by this model's tokenizer (vLLM; as --model)")
    help_top = f"tokens to list; what is not listed counts against the prediction (default: {TOP_TOKENS})"
    add("--top-tokens", type=int, default=TOP_TOKENS, metavar="N", help=help_top)
    add("--concurrency", type=int, default=8, metavar="N", help="requests under way at a time (default: 8)")
    help_timeout = f"of a whole request, however its reply comes (default: {TIMEOUT_S:g})"
    add("--timeout", type=float, default=TIMEOUT_S, metavar="SECONDS", help=help_timeout)


def check_arguments(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Refuse what does not go together with --endpoint, and local models' flags beside it."""
    for name in ("api_key_env", "tokenizer"):
        if getattr(args, name) and not args.endpoint:
            parser.error(f"--{name.replace('_', '-')} needs --endpoint")
    for name in ("load_in_4bit", "load_in_8bit", "batch_size", "truncate", "dtype", "device"):
        if args.endpoint and getattr(args, name, None) != parser.get_default(name):
            parser.error(f"--{name.replace('_', '-')} is for models loaded here, not behind --endpoint")
    if args.endpoint and args.adapter not in ("auto", "none"):
        parser.error("--adapter is for models loaded here; a server's have names (--model, or sagemaker:NAME/ADAPTER)")
    for name in ("top_tokens", "concurrency", "timeout"):
        if not 0 < getattr(args, name) < 1e6:
            parser.error(f"--{name.replace('_', '-')} {getattr(args, name)}: above 0")


def connection_arguments(args: argparse.Namespace) -> dict[str, object]:
    """What the flags of `add_arguments` say, as keyword arguments of `connect`; loads the tokenizer they name."""
    connection = {name: getattr(args, name) for name in ("model", "api_key_env", "concurrency", "top_tokens")}
    reader = load_reader(args.tokenizer) if args.tokenizer else None
    return connection | {"url": args.endpoint, "timeout_s": args.timeout, "reader": reader}
