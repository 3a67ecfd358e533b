"""How requests reach a server: over HTTP in OpenAI's and Anthropic's protocols, or to a component on SageMaker.

    connection = http_connection("http://127.0.0.1:8000/v1", "--endpoint", api_key_env=None, timeout_s=60)
    content = await connection.post("/completions", body)         # of a reply; or StatusError, PassingError, OSError
    content = await post_to_one_of([connection, ...], path, body)  # one that is gone is left out

Keys go where they were named for and nowhere else, and no message repeats one. No redirect is followed.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import json
import os
import re
import ssl
import sys
import threading
from collections.abc import Awaitable, Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from typing import TypeVar
from urllib.parse import SplitResult, parse_qsl, urlsplit

import server_replies as replies
from aws import aws_name, component_name, explanation
from command_line import proxy_problem
from server_replies import CONTINUE, NoServerError, PassingError, StatusError

Result = TypeVar("Result")

RETRIES = 5  # the client waits 0.5, 1, 2, 4, 8 s, or what Retry-After says
RETRIES_OF_SEVERAL = 1  # of several servers another is tried instead
FIRST_PAUSE_S = 0.5  # the same for SageMaker
TIMEOUT_S = 60.0
AWS_BODY_BYTES = 6_291_456  # the most that InvokeEndpoint takes
AZURE = (".openai.azure.com", ".cognitiveservices.azure.com", ".services.ai.azure.com")


@dataclass(eq=False)
class Connection:
    """One server: its address, and how a request is posted there."""

    client: object = field(repr=False)
    post: Callable[[str, dict], Awaitable[str | bytes]] = field(repr=False)  # (path, body) -> content of the reply
    url: str
    secret: str = field(default="", repr=False)
    only_model: Callable[[], Awaitable[str]] | None = field(default=None, repr=False)
    is_alive: bool = True
    under_way: int = 0  # requests

    @property
    def identity(self) -> str:
        """The address, whichever of its names this machine is called by."""
        parts = urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not is_this_machine(parts.hostname or ""):
            return self.url
        port = f":{parts.port}" if parts.port else ""
        return parts._replace(netloc=f"127.0.0.1{port}").geturl()


async def post_to_one_of(connections: Sequence[Connection], path: str, body: dict) -> str | bytes:
    """The content of a reply of the least busy server that is there; another is tried where one fails.

    A server that is gone is left out from then on, with a note. OSError when none is left.
    """
    tried: list[Connection] = []
    while True:
        alive = [one for one in connections if one.is_alive]
        if not alive:
            raise OSError(f"no server answers any more, of {', '.join(one.url for one in connections)}; {CONTINUE}")
        chosen = min([one for one in alive if one not in tried] or alive, key=lambda one: one.under_way)
        chosen.under_way += 1
        try:
            return await chosen.post(path, body)
        except NoServerError:
            if len(connections) == 1:
                raise
            leave_out(chosen)
        except (PassingError, StatusError) as error:
            tried.append(chosen)
            is_final = isinstance(error, StatusError) and error.status < 500
            if is_final or all(one in tried for one in connections if one.is_alive):
                raise
        finally:
            chosen.under_way -= 1


def leave_out(connection: Connection) -> None:
    """Ask a server no more, and say so once."""
    if connection.is_alive:
        connection.is_alive = False
        print(f"note: no server answers at {connection.url} any more; it is left out", file=sys.stderr)


# Over HTTP


async def post_http(client: object, library: object, secret: str, path: str, body: dict) -> str:
    """The content of a reply. Raises StatusError, PassingError, or NoServerError where there is no server.

    `library` is openai or anthropic, whose clients and errors have the same names; the client itself tries again.
    """
    try:
        return await client.post(path, body=body, cast_to=str)
    except library.APITimeoutError:
        raise PassingError(f"no answer within {client.timeout:g} s, {1 + client.max_retries} times") from None
    except library.APIConnectionError as error:
        if type(error.__cause__).__name__ in ("ConnectError", "ProxyError"):  # the HTTP library's: nobody is there
            raise NoServerError(f"no server answers at {address(client)}; {CONTINUE}") from None
        raise PassingError(f"the server cut the connection, {1 + client.max_retries} times") from None
    except library.APIStatusError as error:
        raise http_status(error, secret) from None


async def model_of(client: object, library: object, secret: str) -> str:
    """The name of the one model that a server has."""
    url = address(client)
    try:
        reply = json.loads(await client.get("/models", cast_to=str))
        names = [str(entry["id"]) for entry in reply["data"]]
    except (library.NotFoundError, ValueError, TypeError, LookupError, RecursionError):
        raise OSError(f"{url} lists no models; is it the URL of an API? Most end in /v1") from None
    except library.APIConnectionError:
        raise NoServerError(f"no server answers at {url}") from None
    except library.APIStatusError as error:
        raise replies.status_failure(http_status(error, secret), 1 + client.max_retries, url) from None
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


# To a component on SageMaker


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


def http_connection(
    url: str, where: str, api_key_env: str | None = None, timeout_s: float = TIMEOUT_S, retries: int | None = None
) -> Connection:
    """A connection to an OpenAI-compatible server, or to Claude where `url` is "anthropic".

    `where` is the flag or variable that a message names. Raises ValueError in one line that says what to do.
    """
    is_anthropic = url == "anthropic"
    if is_anthropic:
        import anthropic as library

        where, url = "ANTHROPIC_BASE_URL", os.environ.get("ANTHROPIC_BASE_URL") or "https://api.anthropic.com"
    else:
        import openai as library
    parts = checked_url(url, where)
    secret = read_key(api_key_env or ("ANTHROPIC_API_KEY" if is_anthropic else usual_key(parts)))
    if secret and parts.scheme == "http" and not is_this_machine(parts.hostname):
        raise ValueError(f"{where}: plain http to another machine would show the key to all on the way; use https")
    retries = RETRIES if retries is None else retries
    client = http_client(library, url, where, secret or "none", timeout_s, retries)
    post = partial(post_http, client, library, secret)
    return Connection(client, post, address(client), secret, partial(model_of, client, library, secret))


def usual_key(parts: SplitResult) -> str | None:
    """The variable that holds the key of a known API: a key goes to its own API, and elsewhere only by name."""
    if parts.scheme != "https":
        return None
    if parts.hostname.endswith(AZURE):
        return "AZURE_OPENAI_API_KEY"
    return {"api.anthropic.com": "ANTHROPIC_API_KEY", "api.openai.com": "OPENAI_API_KEY"}.get(parts.hostname)


def http_client(library: object, url: str, where: str, key: str, timeout_s: float, retries: int) -> object:
    """A client of openai or anthropic that sends texts and keys where they were meant for, and nowhere else."""
    parts = urlsplit(url)
    options = {"api_key": key, "timeout": timeout_s, "max_retries": retries}
    options["http_client"] = http_library_client(library, parts.hostname, timeout_s)
    is_openai = parts.hostname == "api.openai.com" and parts.scheme == "https"
    if where == "--endpoint" and not is_openai:  # nor what else the client would read in the environment
        omitted = {"OpenAI-Organization": library.Omit(), "OpenAI-Project": library.Omit()}
        options["default_headers"] = omitted | {"Authorization": f"Bearer {key}"}
        if parts.hostname.endswith(AZURE):
            options["default_headers"]["api-key"] = key
    if parts.query:
        options["default_query"] = dict(parse_qsl(parts.query))
    client = library.AsyncOpenAI if where == "--endpoint" else library.AsyncAnthropic
    try:
        return client(base_url=parts._replace(query="").geturl().rstrip("/"), **options)
    except Exception as error:
        if type(error).__name__ != "InvalidURL":  # the HTTP library's, for which the client has no name
            raise
        raise ValueError(f"{where}: {error}") from None


def http_library_client(library: object, host: str, timeout_s: float) -> object:
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
        if host.endswith(AZURE):  # takes a key in a header of its own, and this one for a token
            del request.headers["authorization"]
        try:
            async with asyncio.timeout(timeout_s):
                return await send(request, **how)
        except TimeoutError:
            raise ReadTimeout("", request=request) from None

    client.send = send_whole
    return client


def sagemaker_connection(url: str, timeout_s: float, concurrency: int) -> Connection:
    """A connection to a component of a SageMaker endpoint: NAME for its base model, NAME/ADAPTER for an adapter of it.

    LMI serves them with vLLM and in OpenAI's layouts; credentials and region are those that boto3 finds.
    """
    import boto3
    from botocore.config import Config
    from botocore.exceptions import BotoCoreError

    name, adapter = sagemaker_names(url)
    once = {"mode": "standard", "total_max_attempts": 1}  # the retries are ours
    limits = {"connect_timeout": min(10, timeout_s), "read_timeout": timeout_s, "max_pool_connections": concurrency}
    try:
        session = boto3.Session()
        region = session.region_name or os.environ.get("AWS_REGION")
        client = session.client("sagemaker-runtime", region_name=region, config=Config(retries=once, **limits))
    except BotoCoreError as error:  # no region, no such profile, half a key
        hint = "set AWS_DEFAULT_REGION and AWS_PROFILE, or run aws configure"
        raise ValueError(f"--endpoint {url}: {str(error).rstrip('.')}; {hint}") from None
    post = partial(post_sagemaker, client, name, adapter, timeout_s)
    return Connection(client, post, f"sagemaker:{client.meta.region_name}/{name}")


def sagemaker_names(url: str) -> tuple[str, str | None]:
    """(endpoint, adapter) of "sagemaker:NAME[/ADAPTER]"; ValueError for what are no names."""
    name, slash, adapter = url.removeprefix("sagemaker:").partition("/")
    try:
        component_name(aws_name(name), adapter if slash else None)
    except ValueError as error:
        raise ValueError(f"--endpoint {url}: sagemaker:NAME or sagemaker:NAME/ADAPTER; {error}") from None
    return name, adapter if slash else None


def checked_url(url: str, where: str) -> SplitResult:
    """The parts of the URL that a flag or a variable holds. Its ValueErrors do not repeat it: it may hold a key."""
    example = "https://api.anthropic.com"
    if where == "--endpoint":
        example = "http://127.0.0.1:8000/v1, or anthropic, or sagemaker:NAME[/ADAPTER]"
    try:
        if "@" in url:
            raise ValueError("a URL without a key in it; --api-key-env names the variable that holds the key")
        parts = urlsplit(url)
        is_version = re.fullmatch(r"(api-version=[\w.-]+)?", parts.query)  # Azure's
        if not is_version or parts.fragment:
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
