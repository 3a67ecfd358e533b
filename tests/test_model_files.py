"""model_files.py: a model of the Hub is found or fetched, every failure is one line; a server here plays the Hub."""

import json
import os
import re
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from llama import load_llama
from logprobs_confidence import label_scorer
from task import TASKS

ROOT = Path(__file__).parent.parent
COMPLETION = TASKS["sentiment"]


TOKEN = "hf_ThisIsASecretThatNobodyMaySee"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
WHOLE = {"config.json": b"{}", "model.safetensors": b"0" * 1000}

REFUSALS = {
    "gated": (401, {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access to this model is restricted."}),
    "missing": (404, {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"}),
    "expired-token": (401, {"X-Error-Message": "Invalid credentials in Authorization header"}),
}


class Hub(ThreadingHTTPServer):
    """A Hub whose models are named after how it treats those who ask for them; `files` are those of org/tiny."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), HubRequest)
        self.files, self.requests = {}, []
        self.url = f"http://127.0.0.1:{self.server_port}"


class HubRequest(BaseHTTPRequestHandler):
    def log_message(self, *arguments):
        pass

    def answer(self, code: int, body: bytes = b"", headers: dict | None = None) -> None:
        self.send_response(code)
        for name, value in ({"Content-Length": str(len(body))} | (headers or {})).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_GET(self):
        self.server.requests.append(self.path)
        api, _, rest = self.path.partition("/org/")
        model, _, rest = rest.partition("/")
        files = self.server.files if model == "tiny" else WHOLE
        if model in REFUSALS:
            code, headers = REFUSALS[model]
            self.answer(code, headers=headers)
        elif model == "hangs-up":
            self.close_connection = True
        elif api.startswith("/api/models") and rest.startswith("revision/"):
            self.answer(200, json.dumps({"id": f"org/{model}", "sha": COMMIT}).encode())
        elif api.startswith("/api/models") and rest.startswith("tree/"):
            tree = [{"type": "file", "path": name, "size": len(files[name]), "oid": name} for name in files]
            self.answer(200, json.dumps(tree).encode())
        elif rest.startswith("resolve/"):
            body = files[rest.split("/", 2)[2]]
            headers = {"ETag": f'"{rest}"', "X-Repo-Commit": COMMIT}
            if model == "breaks-off" and self.command == "GET":
                self.answer(200, body[: len(body) // 2], headers | {"Content-Length": str(len(body))})
                self.close_connection = True
            else:
                self.answer(200, body, headers)
        else:
            self.answer(404)

    do_HEAD = do_GET  # noqa: N815

    def do_CONNECT(self):
        self.answer(407)  # a company's proxy that wants a password


@pytest.fixture(scope="module")
def hub():
    server = Hub()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


FETCH = "import sys, command_line, model_files; command_line.run(lambda: print(model_files.locate(sys.argv[-1])))"
CLASSIFY = "logprobs_confidence.py", "--json", "A good movie."


def ask(hub: Hub, home: Path, model: str, what: tuple[str, ...] = ("-c", FETCH), **environment: str):
    """Do something with a model of this Hub in a process of its own, as a user with a token and an empty cache."""
    clean = {name: value for name, value in os.environ.items() if "proxy" not in name.lower() and name[:3] != "HF_"}
    clean |= {"HF_ENDPOINT": hub.url, "HF_HOME": str(home), "HF_TOKEN": TOKEN, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *what, "--model", model]
    return subprocess.run(command, cwd=ROOT, env=clean | environment, capture_output=True, text=True, timeout=300)


NOTHING = "http://127.0.0.1:9"  # the discard port, where nothing listens
FAILURES = {  # name -> (model, environment, what the error says)
    "gated": ("org/gated", {}, "is gated: ask for access"),
    "gated, without a token": ("org/gated", {"HF_TOKEN": ""}, "is gated: .*hf auth login.*HF_TOKEN"),
    "missing": ("org/missing", {}, "no such model on the Hub; check the name, or log in"),
    "an expired token": ("org/expired-token", {}, "401"),
    "a connection closed": ("org/hangs-up", {}, "cannot be reached|did not give"),
    "a download broken off": ("org/breaks-off", {}, "cannot be reached|did not give"),
    "no connection": ("org/any", {"HF_ENDPOINT": NOTHING}, "cannot be reached.*or pass a folder"),
    "offline": ("org/any", {"HF_HUB_OFFLINE": "1"}, "cannot be reached.*or pass a folder"),
    "a proxy that refuses": (
        "org/any",
        {"HF_ENDPOINT": "https://127.0.0.1:9", "HTTPS_PROXY": "{hub}"},
        "cannot be reached|did not give",
    ),
    "not an id": ("org/model/part", {}, "neither a folder nor a model id"),
}


@pytest.fixture(scope="module")
def failures(hub, tmp_path_factory):
    """All failures, asked for a few at a time: each is a process of its own, which mostly imports and waits."""

    def fail(case):
        model, environment, _ = case
        home = tmp_path_factory.mktemp("home")
        return ask(hub, home, model, **{name: value.format(hub=hub.url) for name, value in environment.items()})

    with ThreadPoolExecutor(3) as pool:
        return dict(zip(FAILURES, pool.map(fail, FAILURES.values()), strict=True))


@pytest.mark.parametrize("name", FAILURES)
def test_a_failure_of_the_hub_is_one_line_and_exit_code_2(failures, name):
    model, _, problem = FAILURES[name]
    done = failures[name]
    assert done.returncode == 2, done.stderr
    assert done.stdout == ""
    retries = ("Error while downloading", "Trying to resume", "Max retries")  # which the library reports as they are
    lines = [line for line in re.split(r"[\r\n]+", done.stderr) if line.strip() and not line.startswith(retries)]
    assert len(lines) == 1, done.stderr  # no progress bar either: this is no terminal
    assert lines[0].startswith("error: ") and model in lines[0] and re.search(problem, lines[0])
    assert TOKEN not in done.stdout + done.stderr


def test_a_model_of_the_hub_is_fetched_once_and_then_works_offline(hub, tiny_folder, tmp_path):
    hub.files = {path.name: path.read_bytes() for path in tiny_folder.iterdir()}
    hub.files |= {"pytorch_model.bin": b"pickle", "modeling_theirs.py": b"raise SystemExit('ran')"}
    hub.requests.clear()
    online = ask(hub, tmp_path, "org/tiny")
    assert online.returncode == 0, online.stderr
    asked_for = {path.rpartition("/")[2] for path in hub.requests if "/resolve/" in path}
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= asked_for
    assert not {"pytorch_model.bin", "modeling_theirs.py"} & asked_for
    offline = ask(hub, tmp_path, "org/tiny", CLASSIFY, HF_HUB_OFFLINE="1", HF_ENDPOINT=NOTHING)
    assert offline.returncode == 0, offline.stderr
    row = json.loads(offline.stdout)
    assert row["model"] == "org/tiny"
    same = label_scorer(load_llama(str(tiny_folder), device="cpu"), COMPLETION).explain("A good movie.")
    assert row["probabilities"] == pytest.approx(same["probabilities"], abs=1e-5)
    assert TOKEN not in online.stdout + online.stderr
