"""A server of one model on 127.0.0.1 that speaks OpenAI's and Anthropic's protocols, and misbehaves on demand.

It keeps all it is sent, and reads in a row's text what to do: "FAKE-500" fails with status 500, "FAKE-500-ONCE" only
the first time. Without such a word it lists positive 0.6, negative 0.3 and something else 0.05, so that P(positive) is
0.6 of a label mass of 0.9, which may be 0.95; and it answers "positive" or "Yes".
"""

import json
import math
import re
import threading
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

TOO_LATE_S = 30  # what it waits for at most, so that a test that is wrong ends
SAMPLED_ID = 1123  # is listed too

# What a word in a text makes it list: log-probabilities of positive, negative and something else.
LISTS = {
    "": {"+": math.log(0.6), "-": math.log(0.3), "?": math.log(0.05)},
    "FAKE-NEGATIVE": {"+": math.log(0.2), "-": math.log(0.7), "?": math.log(0.05)},
    "FAKE-MISSING": {"+": math.log(0.7), "?": math.log(0.1)},
    "FAKE-NOT-COMPUTED": {"+": math.log(0.7), "-": -9999.0, "?": math.log(0.1)},
    "FAKE-UNDECIDED": {"+": math.log(0.3), "?": math.log(0.3)},
    "FAKE-NEITHER": {"?": math.log(0.9)},
    "FAKE-NEARLY-EVEN": {"+": math.log(0.36), "-": math.log(0.33)},
    "FAKE-TWO-SPELLINGS": {"+": math.log(0.3), "-": math.log(0.2), "?": math.log(0.05)},
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
class FakeServer:
    """What a single row is to meet stands in its text, what concerns all requests here."""

    requests: list = field(default_factory=list)
    pages: dict = field(default_factory=dict)  # path -> (status, headers, payload) whatever is asked
    rejects: dict = field(default_factory=dict)  # parameter -> what a 400 says about it
    refuses: dict = field(default_factory=dict)  # parameter -> (a value, what a 400 says about it)
    most_listed: int = 1000  # tokens; what a longer list is answered is `too_long`
    too_long: str = "Invalid value for 'logprobs': must be at most {}."
    chat_only: bool = False  # completions have no log-probabilities
    thinks_unless: dict | None = None  # a chat begins with a thought, but with these in its body
    always: str = ""  # a word that counts as if it stood in every text
    repaired: bool = False  # no word counts
    lists: dict = field(default_factory=dict)  # token id -> log-probability: it lists by id, as vLLM does
    knows_ids: bool = True  # an older vLLM ignores logprob_token_ids
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
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def stop(self):
        for event in self.hold.values():
            event.set()
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
        if request.path.partition("?")[0] in self.pages:
            return self.pages[request.path.partition("?")[0]]
        if request.path == "/v1/models":
            return 200, {}, {"data": [{"id": "fake-1"}]}
        if request.path.partition("?")[0] not in ("/v1/completions", "/v1/chat/completions", "/v1/messages"):
            return 404, {}, said("no such path")
        if rejected := [text for name, text in self.rejects.items() if name in request.body]:
            return 400, {}, said(rejected[0])
        if refused := [text for name, (bad, text) in self.refuses.items() if request.body.get(name) == bad]:
            return 400, {}, said(refused[0])
        wanted = request.body.get("top_logprobs") or request.body.get("logprobs") or 0
        if wanted > self.most_listed:
            return 400, {}, said(self.too_long.format(self.most_listed))
        word = "" if self.repaired else word
        if status := re.fullmatch(r"FAKE-(\d{3})", word):
            words = f"about status {status[1]}, asked with {request.headers.get('authorization')}"
            return int(status[1]), {"Retry-After": "0.01"}, said(words)
        if word == "FAKE-TEMPERATURE-400":
            return 400, {}, said("no temperature for this text")
        return 200, {}, spoil(word, self.good_reply(request, word, times))

    def good_reply(self, request, word, times):
        """A reply as the real servers write it."""
        body, chat = request.body, not request.path.startswith("/v1/completions")
        answer = answered(word, times, body, chat)
        if self.obeys_choice and "structured_outputs" in body:
            answer = body["structured_outputs"]["choice"][-1]
        if request.path == "/v1/messages":
            content = [{"type": "text", "text": answer}]
            usage = {"input_tokens": 11, "output_tokens": 3}
            return {"content": content, "stop_reason": "end_turn", "type": "message", "usage": usage}
        listed = {SPELT[chat][name]: log for name, log in LISTS.get(word, LISTS[""]).items()}
        if self.lists:
            ids = sorted(self.lists, key=self.lists.get)[-2:]  # its top list
            if self.knows_ids and "logprob_token_ids" in body:
                ids = [*body["logprob_token_ids"], SAMPLED_ID]
            listed = {f"token_id:{i}": self.lists[i] for i in ids}
            listed |= {"token_id:3524": -9999.0} if word == "FAKE-NOT-COMPUTED" else {}
        ended = {"index": 0, "finish_reason": "length" if body.get("max_tokens") == 1 else "stop"}
        usage = {"prompt_tokens": 10, "completion_tokens": 2}
        if not chat:
            logprobs = None if self.chat_only else {"top_logprobs": [listed]}
            return {"choices": [ended | {"text": answer, "logprobs": logprobs}], "usage": usage}
        if self.thinks_unless is not None and any(body.get(n) != v for n, v in self.thinks_unless.items()):
            answer, listed = "<think>Well, ", {"<think>": -0.01}
        pairs = [{"token": token, "logprob": log, "bytes": [*token.encode()]} for token, log in listed.items()]
        logprobs = {"content": [{"token": answer, "logprob": -0.1, "top_logprobs": pairs}]}
        message = {"role": "assistant", "content": answer}
        return {"choices": [ended | {"message": message, "logprobs": logprobs}], "usage": usage}


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
        "FAKE-THOUGHT": f"<think>{no}? It could be.\n</think>\n\n{yes}",
        "FAKE-CUT-THOUGHT": f"<think>Could the answer be {yes}",
        "FAKE-DENIES": "Nicht positive." if not chat else "Not yes.",
        "FAKE-GOES-ON": " positive\nText: Awful.\nSentiment: negative",
    }.get(word, yes)


def spoil(word, reply):
    """A good reply as a word in the text wants it: another object, or bytes."""
    choice = reply.get("choices", [{}])[0]
    end = choice if choice else reply
    reason = "finish_reason" if choice else "stop_reason"
    match word:
        # An end that is none, with what was said before it.
        case "FAKE-CHOICE-ERROR":
            end |= {"error": {"code": 502, "message": "the upstream cut the answer"}, reason: "error"}
        case "FAKE-CHOICE-ERROR-403":
            end["error"] = {"code": 403, "message": "flagged by moderation"}
        case "FAKE-ERROR-BESIDE":
            reply["error"] = {"message": "overloaded in the middle"}
        case "FAKE-FILTERED":
            end[reason] = "content_filter"
        case "FAKE-ABORTED":
            end[reason] = "abort"
        case "FAKE-ENDED-OTHERWISE":
            end[reason] = "insufficient_system_resource"
        case "FAKE-ENDED-WELL":
            end[reason] = "eos_token" if choice else "max_tokens"
        # Tokens that are listed otherwise.
        case "FAKE-TWICE" if "message" in choice:  # the sampled one first, then again at its rank
            listed = choice["logprobs"]["content"][0]["top_logprobs"]
            listed.insert(0, dict(listed[1]))
        case "FAKE-TWO-SPELLINGS" if "message" in choice:  # two ids of one text
            listed = choice["logprobs"]["content"][0]["top_logprobs"]
            listed.insert(1, listed[0] | {"logprob": math.log(0.25)})
        case "FAKE-TWO-SPELLINGS":  # of which this layout keeps the one written last
            choice["logprobs"] |= {"tokens": [" positive"], "token_logprobs": [math.log(0.55)]}
        case "FAKE-BY-NUMBER" if "message" in choice:
            choice["logprobs"]["content"][0]["top_logprobs"][0]["token"] = "token_id:3104"
        case "FAKE-BY-NUMBER":
            choice["logprobs"]["top_logprobs"][0]["token_id:3104"] = -3.0
        # Content of other kinds.
        case "FAKE-PARTS" if "message" in choice:
            thought = {"type": "thinking", "thinking": [{"type": "text", "text": "No, or not?"}]}
            choice["message"]["content"] = [thought, {"type": "text", "text": "Y"}, {"type": "text", "text": "es"}]
        case "FAKE-PARTS":
            reply["content"] = [{"type": "text", "text": "Y"}, {"type": "text", "text": "es"}]
        case "FAKE-NUMBER" if "message" in choice:
            choice["message"]["content"] = 1
        case "FAKE-NUMBER":
            (choice or reply["content"][0])["text"] = 1
        case "FAKE-REASONING" if "message" in choice:
            choice["message"] |= {"content": None, "reasoning_content": "Could it be yes? Yes, I"}
            end[reason] = "length"
        case "FAKE-REASONING":
            reply |= {"content": [{"type": "thinking", "thinking": "Could it be yes? Yes, I"}], reason: "max_tokens"}
        case "FAKE-HIDDEN-REASONING" if "message" in choice:
            choice["message"]["content"] = ""
            end[reason] = "length"
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
        case "FAKE-REFUSAL" if "message" in choice:  # read as an answer, this would be a "no"
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
        drips = "FAKE-DRIP" in request.text and not fake.repaired
        with suppress(OSError):  # the client may have left
            self.send(status, headers, None if fake.dead else payload, drips)
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

    def send(self, status, headers, payload, drips=False):
        """Send a reply; None is one whose connection is cut in its middle. One that drips comes byte by byte."""
        data = payload if isinstance(payload, bytes) else json.dumps(payload).encode()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data) + (payload is None)))
        self.end_headers()
        if drips:
            for number in range(len(data)):
                self.wfile.write(data[number : number + 1])
                time.sleep(0.1)
        else:
            self.wfile.write(data)
        self.close_connection = payload is None
