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
import re
import sys
from collections import OrderedDict, deque
from collections.abc import Awaitable, Callable, Collection, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, TypeVar
from urllib.parse import urlsplit

import endpoint_costs
import server_connections
import server_replies as replies
from aws import component_name
from command_line import natural
from endpoint_costs import Prices, Usage
from llama import Llama, load_reader
from server_connections import (
    RETRIES_OF_SEVERAL,
    TIMEOUT_S,
    Connection,
    http_connection,
    leave_out,
    post_to_one_of,
    sagemaker_connection,
    sagemaker_names,
)
from server_replies import CONTINUE, NO_LOGPROBS, NoLogprobsError, NoServerError, PassingError, StatusError
from tables import Example, check_text
from task import Task

Item, Result = TypeVar("Item"), TypeVar("Result")
Prompt = str | list[int] | list[dict[str, str]]

TOP_TOKENS = 20  # the most that OpenAI lists
LISTED_BY_ID = 128  # the most that vLLM lists by id
IN_A_ROW = 20  # rows failing one after another that say it is the server and not the rows
ASKED_ONCE = 200_000  # different texts whose answers are kept for others that are equal

# Without these a server truncates or penalises by defaults of its own; each has another subset of the names.
UNTRUNCATED = {"top_p": 1.0, "top_k": 0, "min_p": 0.0, "repeat_penalty": 1.0, "repetition_penalty": 1.0}
OTHER_NEUTRAL = {"top_k": -1}  # the same in the words of servers that refuse ours: SGLang
BY_ID = ("logprob_token_ids", "return_tokens_as_token_ids")  # vLLM's
# Parameters that may be left out when the server rejects them. All others are what was asked.
OPTIONAL = ("temperature", "seed", "stop", "max_tokens", *UNTRUNCATED, *BY_ID)
# Switches that turn a model's thinking off, tried in this order where it thinks: vLLM, SGLang and llama.cpp; OpenAI and
# Ollama; DeepSeek.
WITHOUT_THINKING = (
    {"chat_template_kwargs": {"enable_thinking": False}},
    {"reasoning_effort": "none"},
    {"thinking": {"type": "disabled"}},
)
CHAT_ONLY = (
    '{} gives log-probabilities on chat only; use a task with format = "chat", as --task sentiment-yes-no, or Method '
    "2, consistency_confidence.py"
)
THINKS = "{} thinks before it answers, and no switch of its API turns that off; use Method 2, consistency_confidence.py"
TOKEN_ID = re.compile(r"token_id:(\d{1,18})")  # how vLLM writes a token as its number
# A server reads these in a prompt as control tokens, wherever they come from.
CONTROL = re.compile(
    r"<\|[^<>|\s]{1,64}\|>|</?s>|<(bos|eos|pad|unk|start_of_turn|end_of_turn)>|\[/?(INST|SYSTEM_PROMPT)\]"
)


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
    """A model of one or several servers.

    What a first request finds out of its API: `rejected` are parameters that it does not take, `replaced` values of
    ours that it has others for, `switches` what turns the model's thinking off.
    """

    connections: list[Connection]
    model: str  # its name there
    concurrency: int
    top_tokens: int
    reader: Llama | None  # a tokenizer: prompts go as ids
    served_as: str = ""  # the identity of the model, in place of the address
    component: str = ""  # the inference component, on SageMaker
    is_anthropic: bool = False
    may_list_fewer: bool = False  # whether a smaller limit of the server's is taken in place of `top_tokens`
    rejected: set[str] = field(default_factory=set)
    replaced: dict[str, object] = field(default_factory=dict)
    switches: dict[str, object] = field(default_factory=dict)
    by_id: bool = False  # whether the server lists tokens by id
    gave_logprobs: bool = False
    prices: Prices = field(default_factory=Prices)
    usage: Usage = field(default_factory=Usage)
    _probing: bool = field(default=False, repr=False)
    _failed_in_a_row: int = field(default=0, repr=False)

    def __post_init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._slots = asyncio.Semaphore(self.concurrency * len(self.connections))
        self._asked: OrderedDict[Hashable, asyncio.Task] = OrderedDict()

    def __enter__(self) -> Endpoint:
        return self

    def __exit__(self, *_: object) -> None:
        self._end(asyncio.all_tasks(self._loop))
        for connection in self.connections:
            with contextlib.suppress(Exception):  # a connection that is already broken cannot be closed politely
                if closing := connection.client.close():  # boto3's is closed at once
                    self.wait(closing)
        self._loop.close()

    @property
    def url(self) -> str:
        """The address, or those of all servers."""
        return ", ".join(connection.url for connection in self.connections)

    @property
    def client(self) -> object:
        """The first server's."""
        return self.connections[0].client

    @property
    def name(self) -> str:
        """The model's, as records and messages say it."""
        return self.served_as or self.model

    @property
    def identity(self) -> dict:
        """What a fingerprint must know: a name that the user answers for, else the address and the name there."""
        prompt = f"ids of {self.reader.name}" if self.reader else "text"
        if self.served_as:
            return {"served_as": self.served_as, "prompt": prompt}
        address = self.connections[0].identity
        return {"endpoint": address, "served_model": self.component or self.model, "prompt": prompt}

    def sent(self, **settings: object) -> dict:
        """The sampling parameters that really go to the server, of those given and our own."""
        wanted = settings if self.is_anthropic else settings | UNTRUNCATED | self.switches
        return {name: self.replaced.get(name, value) for name, value in wanted.items() if name not in self.rejected}

    def spent(self) -> str:
        """What the server said that it has done, as a line of a report."""
        return f"  {self.usage.summary(self.prices)}"

    # Many at a time

    def wait(self, one: Awaitable[Result]) -> Result:
        return self._loop.run_until_complete(one)

    def in_order(
        self,
        function: Callable[[Item], Awaitable[Result]],
        items: Iterable[Item],
        advance: Callable[[int], None] = lambda n: None,
    ) -> Iterator[Result]:
        """function(item) for each item, in their order; a few items beyond the one waited for are under way.

        `advance(1)` is called after each.
        """
        items, under_way = iter(items), deque()

        def begin(count: int) -> None:
            under_way.extend(self._loop.create_task(function(item)) for item in islice(items, count))

        try:
            begin(2 * self.concurrency)
            while under_way:
                result = self.wait(under_way[0])
                under_way.popleft()
                advance(1)
                yield result
                begin(1)
        finally:
            if not self._loop.is_closed():  # a caller that failed may leave this to the garbage collector
                self._end(under_way)

    async def once(self, question: Hashable, ask: Callable[[], Awaitable[Result]]) -> Result:
        """ask(), or what it gave for an equal question before; a failure is not kept."""
        task = self._asked.get(question)
        if task is None:
            task = self._asked[question] = self._loop.create_task(ask())
            if len(self._asked) > ASKED_ONCE:
                self._asked.popitem(last=False)
        try:
            return await task
        except BaseException:
            if self._asked.get(question) is task:
                del self._asked[question]
            raise

    def _end(self, tasks: Collection[asyncio.Task]) -> None:
        """Cancel what is under way."""
        for task in tasks:
            task.cancel()
        if tasks:
            self._loop.run_until_complete(asyncio.gather(*tasks, return_exceptions=True))

    def probe(self, request: Callable[[], Awaitable[Result]]) -> Result:
        """The first request of a run: finds out what the API rejects. Its ValueErrors are the server's."""
        self._probing, before, top_tokens = True, set(self.rejected), self.top_tokens
        try:
            result = self.wait(request())
        finally:
            self._probing = False
        if left_out := sorted((self.rejected - before).difference(UNTRUNCATED, BY_ID)):
            print(f"note: {self.name} takes no {', '.join(left_out)}; left out", file=sys.stderr)
        if self.top_tokens < top_tokens:
            print(f"note: {self.name} lists at most {self.top_tokens} tokens", file=sys.stderr)
        if self.switches:
            print(f"note: the thinking of {self.name} is off, by {', '.join(self.switches)}", file=sys.stderr)
        return result

    def one_at_a_time(self) -> Iterator[Connection]:
        """Each server that is there, alone: what is asked meanwhile goes to it."""
        everyone = self.connections
        try:
            for connection in everyone:
                if connection.is_alive:
                    self.connections = [connection]
                    yield connection
        finally:
            self.connections = everyone

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
            host = urlsplit(self.connections[0].url).hostname
            reads_characters = self.is_anthropic or host == "api.openai.com"
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
        reply = await self._ask(prompt, body)
        if self._probing and is_chat(prompt) and replies.begins_with_thought(reply):
            reply = await self._without_thinking(prompt, body)
            if reply is None:
                raise ValueError(THINKS.format(self.name))
        tokens = replies.listed_tokens(reply, self.name, self.gave_logprobs)
        self.gave_logprobs = True
        numbers = {token for token, _ in tokens}
        if not self.reader and (number := next(filter(TOKEN_ID.fullmatch, numbers), None)):
            raise ValueError(f"{self.name} lists tokens by their number, as {number}; --tokenizer MODEL reads them")
        complete = bool(ids) and numbers.issuperset(f"token_id:{i}" for i in ids)
        if self._probing:
            self.by_id = complete
        return Listing(tuple((self._text(token), log_prob) for token, log_prob in tokens), complete)

    async def _without_thinking(self, prompt: Prompt, body: dict) -> dict | None:
        """The reply to the same request where a switch turns the thinking off, which is kept; None where none does."""
        for switch in WITHOUT_THINKING:
            self.switches = switch
            try:
                reply = await self._ask(prompt, body)
            except ValueError:  # a switch of another server's
                continue
            if not replies.begins_with_thought(reply):
                return reply
        self.switches = {}
        return None

    def probe_first_token(self, prompt: Prompt, ids: Sequence[int] = ()) -> Listing:
        """The first request of Method 1; its ValueError also says whether only a chat has what it needs."""
        try:
            return self.probe(lambda: self.first_token(prompt, ids))
        except NoLogprobsError:
            if isinstance(prompt, str) and self._lists_in_chat(prompt):
                raise ValueError(CHAT_ONLY.format(self.name)) from None
            raise

    def _lists_in_chat(self, prompt: str) -> bool:
        try:
            self.wait(self.first_token([{"role": "user", "content": prompt}]))
        except ValueError:
            return False
        return True

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
            reply = await self._ask(prompt, body)
            if self._probing and replies.begins_with_thought(reply):
                reply = await self._without_thinking(prompt, body) or reply
            return replies.chat_answer(reply)
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
            path, body = "/chat/completions", body | {"messages": prompt} | self.switches
        else:
            path, body = "/completions", body | {"prompt": prompt}
        if not self.component:
            body = {"model": self.model} | body
        while True:
            try:
                async with self._slots:
                    content = await post_to_one_of(self.connections, path, self._accepted(body))
                    reply = replies.read_reply(content, self.connections[0].secret)
                self._failed_in_a_row = 0
                self.usage.add(reply)
                return reply
            except StatusError as error:
                if not (self._probing and self._adapt(error, body)):
                    attempts = 1 + server_connections.RETRIES
                    asked_for = self.top_tokens if "logprobs" in body else 0
                    failure = replies.status_failure(error, attempts, self.url, self.name, asked_for)
                    raise self._counted(failure) from None
            except PassingError as error:
                raise self._counted(error) from None

    def _accepted(self, body: dict) -> dict:
        """A body with what the server takes, as far as is known."""
        accepted = {n: self.replaced.get(n, value) for n, value in body.items() if n not in self.rejected}
        if "max_tokens" in self.rejected:  # the reasoning models' name for it
            accepted["max_completion_tokens"] = body["max_tokens"]
        return accepted

    def _adapt(self, error: StatusError, body: dict) -> bool:
        """Whether the next try can do without what an error rejects: a parameter, a value of ours, a longer list."""
        sent = self._accepted(body)
        ours = replies.named_parameter(error, [name for name in UNTRUNCATED if name in sent])
        parameter = None
        if not replies.VALUE_REFUSED.search(error.said):
            parameter = replies.named_parameter(error, [name for name in OPTIONAL if name in sent])
        if ours in OTHER_NEUTRAL and ours not in self.replaced:
            self.replaced[ours] = OTHER_NEUTRAL[ours]
            return True
        if parameter or ours:
            self.rejected.add(parameter or ours)
            self.replaced.pop(parameter or ours, None)
            return True
        listed = "top_logprobs" if "top_logprobs" in body else "logprobs"
        limit = replies.limit_of_list(error, self.top_tokens) if listed in body and self.may_list_fewer else None
        if limit is None:
            return False
        self.top_tokens = body[listed] = limit
        return True

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
    if host == "api.openai.com" or (host and host.endswith(server_connections.AZURE)):
        rejected |= {"top_k", "min_p", "repeat_penalty", "repetition_penalty"}
    if re.search(r"claude-(opus-4-[789]|(opus|sonnet|haiku)-[5-9]|fable)", model):
        rejected |= {"temperature"}
    if re.match(r"o\d|gpt-5", model):
        rejected |= {"temperature", "top_p", "stop", "max_tokens"}
    return rejected


# Connecting


def connect(
    url: str | Sequence[str],
    model: str = "default",
    api_key_env: str | None = None,
    concurrency: int = 8,
    timeout_s: float = TIMEOUT_S,
    top_tokens: int | None = None,
    reader: Llama | None = None,
    served_as: str = "",
    prices: Prices | None = None,
) -> Endpoint:
    """Connect to OpenAI-compatible servers, to Claude where `url` is "anthropic", or to a "sagemaker:NAME[/ADAPTER]".

    `model` "default" is the one model that the server has. `top_tokens` None is TOP_TOKENS, or what the server lists.
    `reader` is a tokenizer of `llama.load_reader`: prompts then go as token ids. Several addresses serve one model,
    which `served_as` names. Raises ValueError or OSError in one line that says what to do.
    """
    urls = [url] if isinstance(url, str) else list(url)
    if len(urls) > 1 and not served_as:
        raise ValueError("several servers of one model need a name for it, which goes into fingerprints: --served-as")
    if len(urls) > 1 and (strange := next((u for u in urls if u == "anthropic" or u.startswith("sagemaker:")), None)):
        raise ValueError(f"{strange} is one endpoint, which spreads its requests itself")
    options = {"concurrency": concurrency, "top_tokens": top_tokens or TOP_TOKENS, "reader": reader}
    options |= {"may_list_fewer": top_tokens is None, "served_as": served_as, "prices": prices or Prices()}
    if urls[0].startswith("sagemaker:"):
        if model != "default" or api_key_env:
            raise ValueError(
                f"{urls[0]} takes no --model, the component is the model, and no --api-key-env: AWS credentials come "
                "from the environment, a profile or a role"
            )
        component, served = component_name(*sagemaker_names(urls[0])), urls[0].removeprefix("sagemaker:")
        return Endpoint([sagemaker_connection(urls[0], timeout_s, concurrency)], served, component=component, **options)
    is_anthropic = urls[0] == "anthropic"
    if is_anthropic and (reader or model == "default"):
        raise ValueError("Claude has no public tokenizer" if reader else "name one of Claude's models with --model")
    retries = server_connections.RETRIES if len(urls) == 1 else RETRIES_OF_SEVERAL
    connections = [http_connection(one, "--endpoint", api_key_env, timeout_s, retries) for one in urls]
    server = Endpoint(connections, model, is_anthropic=is_anthropic, **options)
    if model == "default":
        server.model = the_model_of(server)
    server.rejected |= known_rejections(urlsplit(connections[0].url).hostname, server.model)
    return server


def the_model_of(server: Endpoint) -> str:
    """The name of the one model that all servers have; one that is not there is left out."""
    names = {}
    for connection in server.connections:
        if deployment := re.search(r"/deployments/([^/]+)$", urlsplit(connection.url).path):  # Azure's older addresses
            names[connection.url] = deployment.group(1)
            continue
        try:
            names[connection.url] = server.wait(connection.only_model())
        except NoServerError:
            if len(server.connections) == 1:
                raise
            leave_out(connection)
    if not names:
        raise OSError(f"no server answers at {server.url}")
    if len(set(names.values())) > 1:
        told = ", ".join(f"{name} at {url}" for url, name in names.items())
        raise ValueError(f"the servers call their models differently: {told}; name one with --model")
    return next(iter(names.values()))


# Flags


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags that choose a server; the same in every script."""
    add = parser.add_argument_group("a model behind a server").add_argument
    help_endpoint = "an OpenAI-compatible server (--model: its name there), anthropic, or sagemaker:NAME[/ADAPTER]"
    add("--endpoint", metavar="URL", action="append", help=help_endpoint + "; several serve one model, --served-as")
    help_name = "the model's identity in place of its address: other servers of it continue the same file"
    add("--served-as", metavar="NAME", default="", help=help_name)
    add("--api-key-env", metavar="NAME", help="the environment variable that holds the key")
    add("--tokenizer", metavar="MODEL", help="send and read token ids by this model's tokenizer (vLLM; as --model)")
    help_top = f"tokens to list; what is not listed counts against the prediction (default: {TOP_TOKENS}, or fewer)"
    add("--top-tokens", type=int, metavar="N", help=help_top)
    help_concurrency = "requests under way at a time, of each server (default: 8)"
    add("--concurrency", type=int, default=8, metavar="N", help=help_concurrency)
    help_dry_run = "ask nothing: print requests, tokens and cost of the table; N: by what N rows use, which are asked"
    add("--dry-run", metavar="N", type=natural, nargs="?", const=0, help=help_dry_run)
    add("--price-in", metavar="USD", type=float, help="dollars a million tokens of prompts cost")
    add("--price-out", metavar="USD", type=float, help="the same of answers")
    help_timeout = f"of a whole request, however its reply comes (default: {TIMEOUT_S:g})"
    add("--timeout", type=float, default=TIMEOUT_S, metavar="SECONDS", help=help_timeout)


def check_arguments(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Refuse what does not go together with --endpoint, and local models' flags beside it."""
    for name in ("api_key_env", "tokenizer", "served_as", "dry_run", "price_in", "price_out"):
        if getattr(args, name) not in (None, "") and not args.endpoint:
            parser.error(f"--{name.replace('_', '-')} needs --endpoint")
    for name in ("load_in_4bit", "load_in_8bit", "batch_size", "truncate", "dtype", "device", "device_map"):
        if args.endpoint and getattr(args, name, None) != parser.get_default(name):
            parser.error(f"--{name.replace('_', '-')} is for models loaded here, not behind --endpoint")
    if args.dry_run is not None and not args.input:
        parser.error("--dry-run is of a table (--input FILE)")
    if args.endpoint and args.adapter not in ("auto", "none"):
        parser.error("--adapter is for models loaded here; a server's have names (--model, or sagemaker:NAME/ADAPTER)")
    for name in ("top_tokens", "concurrency", "timeout"):
        if getattr(args, name) is not None and not 0 < getattr(args, name) < 1e6:
            parser.error(f"--{name.replace('_', '-')} {getattr(args, name)}: above 0")


def connection_arguments(args: argparse.Namespace) -> dict[str, object]:
    """What the flags of `add_arguments` say, as keyword arguments of `connect`; loads the tokenizer they name."""
    names = ("model", "api_key_env", "concurrency", "top_tokens", "served_as")
    connection = {name: getattr(args, name) for name in names}
    reader = load_reader(args.tokenizer) if args.tokenizer else None
    prices = Prices(args.price_in, args.price_out)
    return connection | {"url": args.endpoint, "timeout_s": args.timeout, "reader": reader, "prices": prices}


def plan_from_arguments(
    args: argparse.Namespace,
    examples: Iterable[Example],
    wordings: Sequence[Task],
    requests: tuple[int, int],
    answer_tokens: int,
    method_of: Callable[[Endpoint], Any],
) -> str:
    """What --dry-run prints of a table whose texts take so many requests each, at least and at most.

    Nothing is sent, but where --dry-run names a number and there is no --tokenizer: the method asks about so many.
    """
    connection = connection_arguments(args)
    sample, count = None, None
    if reader := connection["reader"]:
        rendered = [reader.task_prompt(wording) for wording in wordings]

        def count(text: str) -> float:
            return sum(len(reader.encode_within(prompt, text)[0]) for prompt in rendered) / len(rendered)

    elif args.dry_run:
        with connect(**connection) as server:
            asked = endpoint_costs.drawn_texts(examples, args.dry_run, args.seed)
            method, server.usage = method_of(server), Usage()
            list(method.score(iter(asked), lambda n: None, None))
            sample = len(asked), server.usage
    how = endpoint_costs.Asking(requests, answer_tokens, count)
    return endpoint_costs.planned(examples, how, connection["prices"], sample)
