"""scripts/doctor.py: a set-up in order passes; whatever can be broken is broken once and named with its remedy.

Most runs are of main() in this process, on a tiny random model's folder or a copy of it with one thing wrong.
"""

import json
import re
import shutil
import sys
import threading
from dataclasses import replace
from importlib import metadata
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import assert_one_error
from fake_server import FakeServer
from test_architecture import ROOT, every_python
from test_model_files import TOKEN, Hub

import aws
import doctor
import llama as models
import server_connections
from llama import Llama
from logprobs_confidence import label_scorer
from task import TASKS

SENTIMENT, YES_NO = TASKS["sentiment"], TASKS["sentiment-yes-no"]
STATUSES = ("ok", "warning", "failed", "skipped")
CHAT = ["--task", "sentiment-yes-no"]
OF_A_MODEL = {"template", "BOS", "token ids", "control tokens", "answers", "label mass", "direction", "batches"}
OF_A_MODEL |= {"sampling", "generation"}
FREE = 10**9


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    """A wide terminal, nobody's credentials, and a server's client that does not wait long."""
    monkeypatch.setenv("COLUMNS", "120")
    for name in ("HF_TOKEN", "HF_HUB_OFFLINE", "AWS_PROFILE", "AWS_REGION", "AWS_DEFAULT_REGION", "AWS_ACCESS_KEY_ID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/nowhere")
    monkeypatch.setenv("AWS_CONFIG_FILE", "/nowhere")
    monkeypatch.setattr(server_connections, "RETRIES", 0)


@pytest.fixture
def examine(outcome):
    """Run main(): -> its exit code, and subject -> (status, detail)."""

    def examine_by(*argv):
        code, out, err = outcome(doctor.main, *argv)
        assert "Traceback" not in out + err and TOKEN not in out + err
        rows = {}
        for line in out.splitlines():
            assert len(line) <= 120 or " " not in line.strip()
            if (status := line[2:10].strip()) in STATUSES:
                subject = line[11:28].strip()
                assert subject not in rows
                rows[subject] = [status, line[29:]]
            elif line.startswith(" " * 20):
                rows[subject][1] = f"{rows[subject][1]} {line.strip()}".strip()
        return code, {subject: tuple(row) for subject, row in rows.items()}

    return examine_by


@pytest.fixture
def broken(tiny_folder, tmp_path):
    """A copy of the tiny model's folder, for a test to break."""
    return shutil.copytree(tiny_folder, tmp_path / "broken")


def failed(rows, subject, *words):
    """That a row failed and says all of these words."""
    status, detail = rows[subject]
    assert status == "failed", rows
    assert all(word in detail for word in words), detail


def statuses(rows, subjects):
    return {rows[subject][0] for subject in subjects}


# A set-up in order


def test_the_default_model_is_in_order(examine, embedded, monkeypatch):
    few = replace(SENTIMENT, examples=SENTIMENT.examples[:2])  # for the time it takes
    monkeypatch.setattr(doctor, "read_task", lambda name: few)
    monkeypatch.setattr(doctor, "DRAWS", 3)
    monkeypatch.setattr(models, "load_llama", lambda *_, **__: embedded)
    code, rows = examine("--adapter", "none")
    assert (code, statuses(rows, OF_A_MODEL)) == (0, {"ok"})
    assert "134.5 million parameters, 0.5 GB in float32" in rows["memory"][1]
    assert rows["direction"][1] == "6 of 6 easy texts get their label"
    gaps = [float(number) for number in re.findall(r"by (\S+?)(?:,|$)", rows["batches"][1])]
    assert len(gaps) == 2 and max(gaps) <= 1e-5


def test_a_folder_s_checks_all_run_and_a_random_model_is_a_warning(examine, tiny_folder):
    code, rows = examine("--model", tiny_folder, *CHAT)
    assert rows["label mass"][0] == "warning" and "[[examples]]" in rows["label mass"][1]
    assert statuses(rows, OF_A_MODEL - {"label mass", "direction"}) == {"ok"}
    assert rows["direction"][0] in ("warning", "failed") and code == (rows["direction"][0] == "failed")
    assert rows["memory"][1].startswith("3.2 million parameters, 12.7 MB in float32")
    assert rows["BOS"][1] == "<|im_start|> begins each of 3 turns, once" and "' No'" in rows["answers"][1]


def test_without_examples_the_label_mass_is_that_of_the_own_rows(examine, tiny_folder, tmp_path):
    lines = [f"this is text {n},{label}" for n in range(6) for label in ("north", "south")]
    (tmp_path / "t.csv").write_text("\n".join(["text,label", *lines]), encoding="utf-8")
    task = 'name = "t"\ntemplate = "{text}\\nAnswer:"\n[labels]\nnorth = ["yes"]\nsouth = ["no"]\n'
    (tmp_path / "t.toml").write_text(task, encoding="utf-8")
    flags = ["--model", tiny_folder, "--task", tmp_path / "t.toml"]
    assert examine(*flags)[1]["label mass"][1].startswith("no texts to try")
    assert "over 6 of your rows" in examine(*flags, "--input", tmp_path / "t.csv")[1]["label mass"][1]


@pytest.mark.parametrize("rows", ["text,label\nfine,\n", "text,label\nfine,mixed\n", "review,label\nfine,positive\n"])
def test_a_table_that_cannot_be_judged_ends_before_a_model_is_loaded(rows, tmp_path, outcome):
    (tmp_path / "t.csv").write_text(rows, encoding="utf-8")
    assert_one_error(outcome(doctor.main, "--input", tmp_path / "t.csv"), str(tmp_path / "t.csv"))


FLAGS = [["--task", "nosuch"], ["--dtype", "int8"], ["--role", "x"], ["--api-key-env", "X"], ["--label-column", "x"]]


@pytest.mark.parametrize("flags", FLAGS)
def test_bad_flags_are_one_line_and_exit_code_2(flags, outcome):
    assert_one_error(outcome(doctor.main, *flags))


# This machine


@pytest.mark.parametrize("spoil", ["sys.version_info = (3, 10, 4)", "sys.modules['numpy'] = None"])
def test_an_old_python_and_a_missing_library_end_in_one_line_that_says_what_to_do(spoil):
    code = f"import runpy, sys; sys.path[0] = ''; {spoil}; runpy.run_path(sys.argv[1], run_name='__main__')"
    done = every_python(code, ROOT / "scripts" / "doctor.py")
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1)
    assert done.stderr.startswith("failed: ")
    assert ("make demo PYTHON=python3.12" if "version" in spoil else "-m pip install -r ") in done.stderr


@pytest.mark.parametrize(("peft", "status"), [("missing", "failed"), (None, "warning")])
def test_the_packages_are_compared_with_the_pins(monkeypatch, peft, status):
    assert doctor.check_packages().status == "ok"
    real = metadata.version

    def version(name):
        if name == "peft" and peft:
            raise metadata.PackageNotFoundError(name)
        return {"scipy": "1.0.0", "torch": real("torch").partition("+")[0] + "+rocm"}.get(name) or real(name)

    monkeypatch.setattr(metadata, "version", version)
    found = doctor.check_packages()
    assert found.status == status and "scipy 1.0.0, not " in found.detail and "torch" not in found.detail
    assert ("peft missing, not " in found.detail) == bool(peft)
    assert f"{sys.executable} -m pip install -r {ROOT / 'requirements.txt'}" in found.detail


def test_a_library_that_cannot_be_imported_is_a_row(examine, tiny_folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    code, rows = examine("--model", tiny_folder)
    assert code == 1 and statuses(rows, ["memory", "loads", *OF_A_MODEL]) == {"skipped"}
    failed(rows, "devices", "torch", "pip install -r")


@pytest.mark.skipif("__import__('torch').cuda.is_available()")
def test_a_device_that_is_not_there_fails(examine, tiny_folder, monkeypatch):
    code, rows = examine("--model", tiny_folder, "--device", "cuda")
    assert code == 1 and rows["loads"][0] == "skipped"
    failed(rows, "devices", "no device 'cuda' here", "--device auto")
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")
    found = doctor.check_devices("auto", "bfloat16", False, False)
    assert (found.status, found.value) == ("warning", ("cpu", "bfloat16")) and "install a torch" in found.detail


def test_too_little_memory_is_seen_before_the_model_is_loaded(examine, tiny_folder, monkeypatch):
    assert 10**8 < doctor.free_memory("cpu") < 10**14
    assert doctor.check_devices("auto", "float32", False, False, "auto").value == (doctor.EVERYWHERE, "float32")
    assert 10**8 < doctor.free_memory(doctor.EVERYWHERE) < 10**14  # here there is no GPU beside the memory
    monkeypatch.setattr(doctor, "free_memory", lambda device: 12 * 10**6)
    code, rows = examine("--model", tiny_folder)
    assert code == 1 and rows["loads"][0] == "skipped"
    failed(rows, "memory", "12.7 MB in float32; 12.0 MB free on cpu", "--dtype bfloat16", "smaller --model")


@pytest.mark.parametrize(
    ("free", "use", "status", "says"),
    [
        (2 * FREE, ("cpu", "float32"), "failed", "--dtype bfloat16"),
        (4.1 * FREE, ("cpu", "float32"), "warning", "little to compute with"),
        (4.1 * FREE, ("cpu", "bfloat16"), "ok", "2.0 GB in bfloat16"),
        (FREE, ("cuda:1", "bfloat16"), "failed", "--load-in-4bit"),
        (FREE, ("cuda", "4bit"), "ok", "0.5 GB in 4bit"),
        (None, ("cpu", "float32"), "warning", "not known"),
    ],
)
def test_memory_is_compared_with_the_precision(monkeypatch, free, use, status, says):
    monkeypatch.setattr(doctor, "free_memory", lambda device: free)
    found = doctor.check_memory(10**9, use, None)
    assert found.status == status and says in found.detail


def test_the_disk_needs_room_and_the_right_to_write(monkeypatch, tmp_path):
    cache = tmp_path / "not" / "yet"
    monkeypatch.setenv("CALIBRATED_CONFIDENCE_CACHE", str(cache))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=FREE))
    assert doctor.check_disk(None, FREE).status == "ok"
    for name, variable in ((None, "CALIBRATED_CONFIDENCE_CACHE"), ("org/big", "HF_HOME")):
        full = doctor.check_disk(name, FREE + 1)
        assert full.status == "failed" and "make room" in full.detail and variable in full.detail
    blobs = cache / "models--org--big" / "blobs"
    blobs.mkdir(parents=True)
    (blobs / "abc").write_bytes(b"12")  # what is there already need not be fetched
    assert doctor.check_disk("org/big", FREE + 1).status == "ok"
    monkeypatch.setattr("os.access", lambda *_: False)
    assert [doctor.check_disk(None, needed).status for needed in (0, 1)] == ["warning", "failed"]


# The model's files and the Hub


def test_missing_weights_fail_and_all_that_needs_them_is_skipped(examine, broken):
    (broken / "model.safetensors").unlink()
    code, rows = examine("--model", broken)
    assert code == 1 and statuses(rows, ["memory", "loads", *OF_A_MODEL]) == {"skipped"}
    failed(rows, "files", "no .safetensors weights", "--model takes")


def test_a_broken_weights_file_and_a_lost_tensor_fail(examine, broken):
    from safetensors.torch import load_file, save_file

    path = broken / "model.safetensors"
    weights = load_file(path)
    del weights["model.norm.weight"]
    save_file(weights, path, metadata={"format": "pt"})
    code, rows = examine("--model", broken)
    assert code == 1 and statuses(rows, OF_A_MODEL) == {"skipped"}
    failed(rows, "loads", "the weights lack model.norm.weight", "fetch or save them again")
    path.write_bytes(path.read_bytes()[:1000])
    code, rows = examine("--model", broken)
    assert code == 1 and rows["loads"][0] == "skipped"
    failed(rows, "memory", "Safetensor", "fetch or save them again")


def test_what_is_no_adapter_fails(examine, tiny_folder, tmp_path):
    code, rows = examine("--model", tiny_folder, "--adapter", tmp_path)
    assert code == 1 and statuses(rows, OF_A_MODEL) == {"skipped"}
    failed(rows, "loads", "no adapter_config.json")


def test_an_error_that_nobody_expects_is_a_row_and_no_traceback(examine, tiny_folder, monkeypatch):
    def load(*_, **__):
        raise KeyError(f"sad \x1b[31m {TOKEN}")

    monkeypatch.setattr(models, "load_llama", load)
    code, rows = examine("--model", tiny_folder)
    assert code == 1
    failed(rows, "loads", "KeyError", r"\x1b[31m", "[redacted]")


@pytest.fixture
def hub(monkeypatch, tmp_path):
    server = Hub()
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", server.url)
    template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    yield server
    server.shutdown()
    server.server_close()


def page(count, n_bytes, gated):
    files = [("model.safetensors", n_bytes), ("consolidated.safetensors", n_bytes), ("original/a.safetensors", 1)]
    siblings = [SimpleNamespace(rfilename=name, size=size) for name, size in [*files, ("config.json", None)]]
    return SimpleNamespace(siblings=siblings, safetensors=SimpleNamespace(total=count), gated=gated)


GATED, MISSING = ["is gated: ask for access", "hf auth login"], ["no such model on the Hub", "check the name"]


@pytest.mark.parametrize(("model", "words"), [("org/gated", GATED), ("org/missing", MISSING)])
def test_a_model_that_the_hub_does_not_give_fails_with_what_to_do(examine, hub, model, words):
    code, rows = examine("--model", model)
    assert code == 1 and rows["loads"][0] == "skipped"
    assert rows["Hub login"] == ("ok", "not logged in; gated and private models need it: `hf auth login`, or HF_TOKEN")
    assert rows["Hub page"][0] == "warning" and model in rows["Hub page"][1]
    failed(rows, "files", *words)


def test_a_model_that_does_not_fit_is_not_fetched(examine, hub, monkeypatch):
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", lambda *_, **__: page(8 * 10**9, 16 * 10**9, "manual"))
    monkeypatch.setattr(doctor, "free_memory", lambda device: 24 * 10**9)
    code, rows = examine("--model", "org/tiny")
    assert code == 1 and statuses(rows, ["files", "loads"]) == {"skipped"} and hub.requests == []
    assert rows["Hub page"][1].startswith("org/tiny: 8,000 million parameters, 16.0 GB, gated: its licence")
    failed(rows, "memory", "32.0 GB in float32; 24.0 GB free", "--dtype bfloat16")


def test_a_model_of_the_hub_is_fetched_and_loaded(examine, hub, monkeypatch, tiny_folder):
    from huggingface_hub import HfApi

    hub.files = {path.name: path.read_bytes() for path in tiny_folder.iterdir()}
    ask, told = HfApi.model_info, page(3_174_560, 12_700_000, False)
    monkeypatch.setattr(HfApi, "model_info", lambda *a, **k: told if k.get("files_metadata") else ask(*a, **k))
    monkeypatch.setattr(doctor, "label_scorer", lambda *_: [][0])  # the rest is seen elsewhere
    _, rows = examine("--model", "org/tiny")
    assert statuses(rows, ["Hub page", "disk", "memory", "files", "loads", "template"]) == {"ok"}
    assert "12.7 MB to fetch" in rows["disk"][1] and rows["loads"][1].startswith("org/tiny, float32 on cpu, no adapter")
    failed(rows, "answers", "IndexError")


def test_the_login_is_tried_and_the_token_never_shown(monkeypatch, hub):
    from huggingface_hub import HfApi

    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr("huggingface_hub.whoami", lambda: {"name": "ada"})
    assert doctor.check_login("org/a") == doctor.Finding("ok", "logged in as ada")
    refuse, lose = HfApi(endpoint=hub.url), HfApi(endpoint="http://127.0.0.1:9")
    for ask in (lambda: refuse.model_info("org/expired-token"), lose.whoami):
        monkeypatch.setattr("huggingface_hub.whoami", ask)
        found = doctor.check_login("org/a")
        assert found.status == "warning" and "hf auth login" in found.detail and TOKEN not in found.detail


# Prompt and answers


def template_of(folder, change):
    path = folder / "chat_template.jinja"
    path.write_text(change(path.read_text()))


def test_a_template_that_does_not_show_the_text_once_fails(examine, broken):
    template_of(broken, lambda template: template + template)
    code, rows = examine("--model", broken, *CHAT)
    assert code == 1 and statuses(rows, OF_A_MODEL - {"template", "generation"}) == {"skipped"}
    failed(rows, "template", "does not show the text exactly once", "correct the chat template in", str(broken))


@pytest.mark.parametrize("start", ["{{ bos_token }}{{ bos_token }}", "{{ bos_token }}hello{{ bos_token }}"])
def test_a_second_bos_fails(broken, start):
    settings = json.loads((broken / "tokenizer_config.json").read_text())
    (broken / "tokenizer_config.json").write_text(json.dumps(settings | {"bos_token": "<|endoftext|>"}))
    template_of(broken, lambda template: start + template)
    reader = models.load_reader(str(broken))
    found = doctor.check_bos(reader, YES_NO, reader.task_prompt(YES_NO))
    assert found.status == "failed" and "<|endoftext|> stands 2 times" in found.detail
    assert f"out of the chat template in {broken}" in found.detail
    assert doctor.check_bos(reader, SENTIMENT, reader.task_prompt(SENTIMENT)).status == "ok"


def test_a_bos_that_begins_every_turn_may_not_be_doubled_either(broken, tiny_llama):
    template_of(broken, lambda template: "<|im_start|>" + template)
    reader = models.load_reader(str(broken))
    assert doctor.check_bos(reader, YES_NO, reader.task_prompt(YES_NO)).status == "failed"
    task = replace(SENTIMENT, template="<|im_start|>Text: {text}\n<|im_start|>Sentiment:", examples=())
    found = doctor.check_bos(tiny_llama, task, tiny_llama.task_prompt(task))
    assert found.status == "failed" and "the task's template" in found.detail


def test_ids_that_are_not_the_whole_prompt_s_fail(tiny_llama, monkeypatch):
    for task in (SENTIMENT, YES_NO):
        assert doctor.check_ids(tiny_llama, task, tiny_llama.task_prompt(task)).status == "ok"
    right = tiny_llama.encode(tiny_llama.task_prompt(YES_NO), doctor.UNDECIDED)
    for wrong, at in ((right[:3] + right[2:], 3), ([*right, 5], len(right)), ([*right[:-1], 5], len(right) - 1)):
        monkeypatch.setattr(Llama, "encode", lambda *_, wrong=wrong: wrong)
        found = doctor.check_ids(tiny_llama, YES_NO, None)
        assert found.status == "failed" and f"differ from number {at} on" in found.detail


def test_control_strings_that_are_obeyed_fail(tiny_llama, monkeypatch):
    prompt = tiny_llama.task_prompt(YES_NO)
    assert doctor.check_control(tiny_llama, prompt).detail.startswith("17 of 17 tried")
    ids = tiny_llama.tokenizer
    monkeypatch.setattr(Llama, "encode", lambda self, prompt, text: ids(prompt.render(text)).input_ids)
    found = doctor.check_control(tiny_llama, prompt)
    assert found.status == "failed" and "a text that spells <" in found.detail


def task_file(tmp_path, *lines):
    path = tmp_path / "own.toml"
    path.write_text("\n".join(['name = "own"', 'template = "Ticket: {text}\\nTeam:"', *lines]))
    return path


def test_labels_that_share_a_token_fail_and_name_the_other_scoring(examine, tiny_folder, tmp_path):
    labels = ["[labels]", 'money = ["refundable"]', 'back = ["refunded"]']
    code, rows = examine("--model", tiny_folder, "--task", task_file(tmp_path, *labels))
    assert code == 1 and statuses(rows, ["label mass", "direction", "batches", "sampling"]) == {"skipped"}
    failed(rows, "answers", "' refund' + 'able'", 'set scoring = "sequence"', "choose words that are one token")
    code, rows = examine("--model", tiny_folder, "--task", task_file(tmp_path, 'scoring = "sequence"', *labels))
    assert statuses(rows, ["answers", "batches"]) == {"ok"}
    failed(rows, "label mass", "the task has no [[examples]]", "add [[examples]]")  # nor are the easy texts of its kind


# What the model says


def explained(text, label, p):
    """An explained text of which P(positive) is p."""
    by_label = {"negative": 1 - p, "positive": p}
    top = [{"token": " The", "logprob": np.log(0.25)}]
    prediction = max(by_label, key=by_label.get)
    row = {"text": text, "label": label, "probabilities": by_label, "prediction": prediction}
    return row | {"label_mass": 0.4, "top_tokens": top}


@pytest.mark.parametrize(
    ("pairs", "status", "says"),
    [
        ([("positive", 0.9), ("negative", 0.2)], "ok", "2 of 2 easy texts get their label"),
        ([("positive", 0.9), ("negative", 0.7)], "warning", "a class bias towards 'positive'"),
        ([("positive", 0.4), ("negative", 0.3)], "warning", "--debias batch"),
        ([("positive", 0.2), ("negative", 0.9)], "failed", "are answer words swapped?"),
        ([("positive", 0.7), ("negative", 0.7)], "failed", "no more probable on its own texts"),
    ],
)
def test_labels_must_be_likelier_on_their_own_texts(pairs, status, says):
    found = doctor.check_direction(([explained("x", *pair) for pair in pairs], "easy texts"))
    assert found.status == status and says in found.detail


def test_little_label_mass_is_a_warning_that_shows_what_comes_instead():
    found = doctor.check_mass(SimpleNamespace(task=SENTIMENT, explain=lambda text: explained(text, None, 0.6)))
    assert found.status == "warning" and found.detail.startswith("mean 0.400 over 6 easy texts; after 'I love it. ")
    assert "the likeliest is ' The' (25%)" in found.detail and "word the template" in found.detail

    def explain(text):
        raise ValueError("too long")

    with pytest.raises(ValueError, match="too long"):
        doctor.check_mass(SimpleNamespace(task=SENTIMENT, explain=explain))


@pytest.mark.parametrize(("precision", "status"), [("float32", "failed"), ("bfloat16", "warning")])
def test_a_result_that_depends_on_the_batch_is_seen(tiny_llama, monkeypatch, precision, status):
    scorer = label_scorer(tiny_llama, SENTIMENT)
    assert doctor.check_batches(tiny_llama, scorer).status == "ok"
    plain = Llama.answer_log_probs

    def wrong(self, rows, answers, *rest):
        noise = np.arange(len(answers)) * 0.2 if len(rows) > 1 and self.shares_prefix is not False else 0
        return plain(self, rows, answers, *rest) + noise

    monkeypatch.setattr(Llama, "answer_log_probs", wrong)
    found = doctor.check_batches(replace(tiny_llama, identity={"precision": precision}), scorer)
    assert found.status == status and ("--batch-size 1" if status == "failed" else "--dtype float32") in found.detail


def test_sampling_must_vary_and_be_repeatable(tiny_llama, monkeypatch):
    scorer, numbers = label_scorer(tiny_llama, SENTIMENT), iter(range(100))
    found = doctor.check_sampling(tiny_llama, scorer)
    assert found.status == "ok" and "8 different answers" in found.detail and "8 of 8" in found.detail
    monkeypatch.setattr(Llama, "sample", lambda *_, **__: [["yes"] * 8])
    found = doctor.check_sampling(tiny_llama, scorer)
    assert found.status == "warning" and "the same answer, 'yes'" in found.detail and "--paraphrase" in found.detail
    monkeypatch.setattr(Llama, "sample", lambda *_, **__: [[str(next(numbers)) for _ in range(8)]])
    found = doctor.check_sampling(tiny_llama, scorer)
    assert found.status == "failed" and "only 0 of them the same again" in found.detail


@pytest.mark.parametrize(("settings", "bent"), [({"temperature": 0.6, "top_p": 0.9}, True), ({}, False)])
def test_the_model_s_own_settings_are_told(settings, bent):
    from transformers import GenerationConfig

    told = doctor.check_generation(
        SimpleNamespace(model=SimpleNamespace(generation_config=GenerationConfig(**settings)))
    )
    assert told.detail.startswith(
        "its own temperature 0.6, top_p 0.9 would bend" if bent else "its own settings would not"
    )


# A server


class EasyServer(FakeServer):
    """The fake, which here is right about the easy texts and samples by seed."""

    def reply(self, request, times):
        if not self.always:
            label = dict(doctor.EASY).get(request.text)
            request.text += {"negative": " FAKE-NEGATIVE", None: " FAKE-SEEDED"}.get(label, "")
        return super().reply(request, times)


@pytest.fixture
def server():
    fake = EasyServer().start()
    yield fake
    fake.stop()


REMOTE = ("log-probabilities", "label mass", "direction", "sampling", "parameters")


def test_a_server_in_order(examine, server):
    server.rejects = {"min_p": "min_p is not known"}
    code, rows = examine("--endpoint", server.url)
    assert (code, statuses(rows, REMOTE)) == (0, {"ok"}), rows
    assert rows["server"][1] == f"fake-1 at {server.url}"
    assert rows["log-probabilities"][1] == "lists 3 of 20 asked for (--top-tokens), not by id (--tokenizer)"
    assert rows["parameters"][1] == "left out, as it rejects them: min_p"
    assert rows["direction"][1].startswith("6 of 6") and "2 different answers" in rows["sampling"][1]
    assert not set(rows) & {"files", "loads", "Hub login"}


def test_labelled_rows_are_judged_through_a_server_too(examine, server, tmp_path):
    lines = [json.dumps({"review": text, "truth": label}) for text, label in doctor.EASY * 4]
    (tmp_path / "t.jsonl").write_text("\n".join(lines), "utf-8")
    flags = ["--input", tmp_path / "t.jsonl", "--text-column", "review", "--label-column", "truth", "--sample", 22]
    code, rows = examine("--endpoint", server.url, *flags)
    assert (code, rows["verdict"][0], rows["mass on rows"][0]) == (0, "ok", "ok"), rows
    assert rows["verdict"][1].startswith("better than always answering") and "accuracy 1.000" in rows["verdict"][1]
    assert "over 22 of your rows" in rows["mass on rows"][1]
    assert "; the 24 rows of the table take about " in rows["speed"][1]


def test_a_server_without_log_probabilities_is_no_failure_but_a_broken_one_is(examine, server):
    server.always = "FAKE-NO-LOGPROBS"
    code, rows = examine("--endpoint", server.url)
    assert code == 0 and statuses(rows, ["label mass", "direction"]) == {"skipped"}
    assert rows["log-probabilities"][0] == "warning" and "consistency_confidence.py" in rows["log-probabilities"][1]
    assert rows["sampling"][0] == "warning" and "the same answer, ' positive'" in rows["sampling"][1]
    server.always = "FAKE-500"
    code, rows = examine("--endpoint", server.url)
    assert code == 1 and rows["parameters"][0] == "skipped"
    for subject in ("log-probabilities", "sampling"):
        failed(rows, subject, "status 500", "log may say more")
    server.always = "FAKE-NEITHER"
    failed(examine("--endpoint", server.url)[1], "label mass", "names a label", "word the template")
    server.stop()
    code, rows = examine("--endpoint", server.url)
    assert code == 1 and statuses(rows, REMOTE) == {"skipped"}
    failed(rows, "server", "no server answers at", "is it running")


# SageMaker


@pytest.mark.parametrize("region", [[], ["--region", "eu-west-1"]])
def test_without_credentials_aws_is_skipped(examine, server, region):
    code, rows = examine("--endpoint", server.url, "--sagemaker", *region)
    assert code == 0 and rows["identity"][0] == "warning"
    assert statuses(rows, ["role", "instance type"]) == {"skipped"}
    assert ("aws configure" if region else "AWS_DEFAULT_REGION") in rows["identity"][1]


def test_aws_is_asked_for_identity_and_role_and_refusals_fail(examine, server, monkeypatch):
    account = aws.Account("us-east-1", "123456789012", None)
    monkeypatch.setattr(aws, "connect", lambda region, dry_run=False: account)
    monkeypatch.setattr(aws, "find_role", lambda account, role: f"arn:aws:iam::1:role/{role}")
    code, rows = examine("--endpoint", server.url, "--sagemaker")
    assert code == 0 and rows["identity"][1] == "account 123456789012, region us-east-1"
    assert rows["role"] == ("ok", "arn:aws:iam::1:role/SageMakerExecutionRole")
    assert rows["instance type"] == ("ok", aws.INSTANCE)
    for code, status in {"InvalidClientTokenId": "failed", "ThrottlingException": "warning"}.items():

        def refuse(*_, code=code, **__):
            raise aws.AwsError("no", code)

        monkeypatch.setattr(aws, "connect", refuse)
        exit_code, rows = examine("--endpoint", server.url, "--sagemaker", "--instance-type", "ml.m5.large")
        assert rows["identity"][0] == status and exit_code == (status == "failed")
        assert rows["role"][0] == "skipped"
