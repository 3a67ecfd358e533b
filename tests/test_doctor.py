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
from fake_sagemaker import Fake as FakeAws
from test_architecture import ROOT, every_python
from test_llama import TOKEN, Hub

import command_line
import doctor
import embedded_model
import endpoint
import llama as models
import logprobs_confidence
import predictions
import sagemaker_job
import task as tasks
import test_endpoint
from llama import Llama
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
    monkeypatch.setattr(endpoint, "RETRIES", 0)


@pytest.fixture
def examine(capsys):
    """Run main(): -> its exit code, and subject -> (status, detail)."""

    def examine_by(*argv):
        capsys.readouterr()
        with pytest.raises(SystemExit) as stopped:
            command_line.run(lambda: doctor.main([*map(str, argv)]))
        out, err = capsys.readouterr()
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
        return stopped.value.code, {subject: tuple(row) for subject, row in rows.items()}

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
    monkeypatch.setattr(tasks, "read_task", lambda name: few)
    monkeypatch.setattr(doctor, "DRAWS", 3)
    monkeypatch.setattr(models, "load_from", lambda *_: embedded)
    code, rows = examine("--adapter", "none")
    assert (code, statuses(rows, OF_A_MODEL)) == (0, {"ok"})
    assert "intact" in rows["files"][1] and "134.5 million parameters, 0.5 GB in float32" in rows["memory"][1]
    assert rows["direction"][1] == "6 of 6 easy texts get their label"
    gaps = [float(number) for number in re.findall(r"by (\S+?)(?:,|$)", rows["batches"][1])]
    assert len(gaps) == 2 and max(gaps) <= 1e-5


def test_a_folder_s_checks_all_run_and_a_random_model_is_a_warning(examine, tiny_folder):
    code, rows = examine("--model", tiny_folder, *CHAT)
    assert rows["label mass"][0] == "warning" and "[[examples]]" in rows["label mass"][1]
    assert "the likeliest is" in rows["label mass"][1]
    assert statuses(rows, OF_A_MODEL - {"label mass", "direction"}) == {"ok"}
    assert rows["direction"][0] in ("warning", "failed") and code == (rows["direction"][0] == "failed")
    assert rows["memory"][1].startswith("3.2 million parameters, 12.7 MB in float32")
    assert rows["BOS"][1] == "<|im_start|> begins each of 3 turns, once"
    assert "' No'" in rows["answers"][1]


@pytest.mark.parametrize("flags", [["--task", "nosuch"], ["--dtype", "int8"], ["--role", "x"], ["--api-key-env", "X"]])
def test_bad_flags_are_one_line_and_exit_code_2(flags, capsys):
    with pytest.raises(SystemExit) as stopped:
        command_line.run(lambda: doctor.main(flags))
    out, err = capsys.readouterr()
    assert (stopped.value.code, out, err.count("\n")) == (2, "", 1) and err.startswith("error: ")


# Python and packages


@pytest.mark.parametrize("spoil", ["sys.version_info = (3, 10, 4)", "sys.modules['numpy'] = None"])
def test_an_old_python_and_a_missing_library_end_in_one_line_that_says_what_to_do(spoil):
    code = f"import runpy, sys; sys.path[0] = ''; {spoil}; runpy.run_path(sys.argv[1], run_name='__main__')"
    done = every_python(code, ROOT / "scripts" / "doctor.py")
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1)
    assert done.stderr.startswith("failed: ")
    assert ("make demo PYTHON=python3.12" if "version" in spoil else "-m pip install -r ") in done.stderr


def test_the_packages_are_held_to_the_pins(monkeypatch):
    assert doctor.check_packages().status == "ok"
    real = metadata.version

    def version(name):
        if name == "peft":
            raise metadata.PackageNotFoundError(name)
        return {"scipy": "1.0.0", "torch": real("torch").partition("+")[0] + "+rocm"}.get(name) or real(name)

    monkeypatch.setattr(metadata, "version", version)
    status, detail, _ = doctor.check_packages()
    assert status == "failed" and "missing: peft;" in detail and "scipy 1.0.0, not " in detail and "torch" not in detail
    assert f"{sys.executable} -m pip install -r {ROOT / 'requirements.txt'}" in detail
    monkeypatch.setattr(metadata, "version", lambda name: "1.0.0" if name == "scipy" else real(name))
    status, detail, _ = doctor.check_packages()
    assert status == "warning" and "missing" not in detail and "pip install" in detail


def test_a_library_that_can_not_be_imported_is_a_row(examine, tiny_folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    code, rows = examine("--model", tiny_folder)
    assert code == 1
    failed(rows, "devices", "torch", "pip install -r")
    assert statuses(rows, ["memory", "loads", *OF_A_MODEL]) == {"skipped"}


# Devices, memory, disk


@pytest.mark.skipif("__import__('torch').cuda.is_available()")
def test_a_device_that_is_not_there_fails(examine, tiny_folder, monkeypatch):
    code, rows = examine("--model", tiny_folder, "--device", "cuda")
    assert code == 1
    failed(rows, "devices", "no device 'cuda' here", "--device auto")
    assert rows["loads"][0] == "skipped"
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")
    arguments = SimpleNamespace(device="auto", dtype="bfloat16", load_in_4bit=False, load_in_8bit=False)
    status, detail, use = doctor.check_devices(arguments)
    assert (status, use) == ("warning", ("cpu", "bfloat16")) and "install a torch" in detail


def test_too_little_memory_is_seen_before_the_model_is_loaded(examine, tiny_folder, monkeypatch):
    monkeypatch.setattr(models, "load_from", lambda *_: pytest.fail("it was loaded"))
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
def test_memory_is_held_to_the_precision(monkeypatch, free, use, status, says):
    monkeypatch.setattr(doctor, "free_memory", lambda device: free)
    found = doctor.check_memory(10**9, use, None)
    assert found.status == status and says in found.detail


def test_free_memory_is_that_of_this_machine():
    assert 10**8 < doctor.free_memory("cpu") < 10**14


def test_the_disk_needs_room_and_the_right_to_write(monkeypatch, tmp_path):
    cache = tmp_path / "not" / "yet"
    monkeypatch.setenv("CALIBRATED_CONFIDENCE_CACHE", str(cache))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=FREE) if path == tmp_path else None)
    assert doctor.check_disk(None, FREE).status == "ok"
    full = doctor.check_disk(None, FREE + 1)
    assert full.status == "failed" and "CALIBRATED_CONFIDENCE_CACHE" in full.detail and "make room" in full.detail
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    assert "HF_HOME" in doctor.check_disk("org/big", FREE + 1).detail
    blobs = cache / "models--org--big" / "blobs"
    blobs.mkdir(parents=True)
    (blobs / "abc").write_bytes(b"12")  # what is there already need not be fetched
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=FREE))
    assert doctor.check_disk("org/big", FREE + 1).status == "ok"
    monkeypatch.setattr("os.access", lambda *_: False)
    found = {needed: doctor.check_disk(None, needed) for needed in (0, 1)}
    assert [found[needed].status for needed in (0, 1)] == ["warning", "failed"]
    assert "CALIBRATED_CONFIDENCE_CACHE" in found[1].detail


# The model's files and the Hub


def test_the_embedded_model_is_called_made_or_mended_when_it_was(monkeypatch, tmp_path):
    monkeypatch.setenv("CALIBRATED_CONFIDENCE_CACHE", str(tmp_path))
    manifest = tmp_path / embedded_model.DEFAULT_NAME / "manifest.json"

    def locate(model):
        manifest.parent.mkdir(exist_ok=True)
        manifest.write_text("{}")
        return embedded_model.DEFAULT_NAME, manifest.parent, "identity"

    monkeypatch.setattr(models, "locate", locate)
    assert "made now" in doctor.check_files("default").detail
    times = iter([1, 2, 3, 3])
    monkeypatch.setattr(doctor, "made_at", lambda: next(times))
    assert "broken and is made anew" in doctor.check_files("default").detail
    assert "intact" in doctor.check_files("default").detail


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


def test_what_is_no_adapter_fails_before_the_model_is_loaded(examine, tiny_folder, tmp_path):
    code, rows = examine("--model", tiny_folder, "--adapter", tmp_path)
    assert code == 1 and rows["loads"][0] == "skipped"
    failed(rows, "adapter", "no adapter_config.json", "fine_tune_model.py makes one", "--adapter none")


def test_an_error_that_nobody_expects_is_a_row_and_no_traceback(examine, tiny_folder, monkeypatch):
    def load(*_):
        raise KeyError(f"sad \x1b[31m {TOKEN}")

    monkeypatch.setattr(models, "load_from", load)
    code, rows = examine("--model", tiny_folder)
    assert code == 1
    failed(rows, "loads", "KeyError", r"\x1b[31m", "[redacted]")


@pytest.fixture
def hub(monkeypatch, tmp_path):
    server = Hub()
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
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


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ("org/gated-files", ["is gated: ask for access", "hf auth login"]),
        ("org/missing", ["no such model on the Hub", "check the name"]),
    ],
)
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
    ask = HfApi.model_info
    told = page(3_174_560, 12_700_000, False)
    monkeypatch.setattr(HfApi, "model_info", lambda *a, **k: told if k.get("files_metadata") else ask(*a, **k))
    monkeypatch.setattr(logprobs_confidence, "prepare", lambda *_: [][0])  # the rest is seen elsewhere
    _, rows = examine("--model", "org/tiny")
    assert statuses(rows, ["Hub page", "disk", "memory", "files", "loads", "template"]) == {"ok"}
    assert "12.7 MB to fetch" in rows["disk"][1] and rows["loads"][1].startswith("org/tiny, float32 on cpu, no adapter")
    failed(rows, "answers", "IndexError")


def test_the_login_is_tried_and_the_token_never_shown(monkeypatch, hub):
    from huggingface_hub import HfApi

    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr("huggingface_hub.whoami", lambda: {"name": "ada"})
    assert doctor.check_login("org/a") == doctor.Finding("ok", "logged in as ada")
    monkeypatch.setattr("huggingface_hub.whoami", lambda: HfApi(endpoint=hub.url).model_info("org/expired-token"))
    status, detail, _ = doctor.check_login("org/a")
    assert status == "warning" and "refuses the token" in detail and TOKEN not in detail
    monkeypatch.setattr("huggingface_hub.whoami", lambda: HfApi(endpoint="http://127.0.0.1:9").whoami())
    status, detail, _ = doctor.check_login("org/a")
    assert status == "warning" and "cannot be reached" in detail and TOKEN not in detail


def test_what_is_a_name_of_the_hub(tiny_folder):
    names = ["default", str(tiny_folder), "/nowhere", "./x", "~/x", "llama", "org/model"]
    hub_ids = [None, None, None, None, None, "meta-llama/Llama-3.1-8B-Instruct", "org/model"]
    assert [doctor.hub_id(name) for name in names] == hub_ids


# Prompt and answers


def template_of(folder, change):
    path = folder / "chat_template.jinja"
    path.write_text(change(path.read_text()))


def test_a_template_that_does_not_show_the_text_once_fails_a_chat_alone(examine, broken):
    template_of(broken, lambda template: template + template)
    code, rows = examine("--model", broken, *CHAT)
    assert code == 1 and statuses(rows, OF_A_MODEL - {"template", "generation"}) == {"skipped"}
    failed(rows, "template", "does not show the text exactly once", "mend the chat template in", str(broken))
    template_of(broken, lambda template: "{{ raise_exception('no') }}")
    reader = models.load_reader(str(broken))
    with pytest.raises(ValueError, match="the chat template of broken fails: no"):
        doctor.check_template(reader, YES_NO)
    status, detail, frame = doctor.check_template(reader, SENTIMENT)
    assert status == "warning" and "does not use it" in detail and frame.before


def test_a_chat_without_a_template_fails(broken):
    (broken / "chat_template.jinja").unlink()
    reader = models.load_reader(str(broken))
    with pytest.raises(ValueError, match='no chat template; use a task with format = "completion"'):
        doctor.check_template(reader, YES_NO)
    assert doctor.check_template(reader, SENTIMENT).status == "ok"


@pytest.mark.parametrize("start", ["{{ bos_token }}{{ bos_token }}", "{{ bos_token }}hello{{ bos_token }}"])
def test_a_second_bos_fails(broken, start):
    settings = json.loads((broken / "tokenizer_config.json").read_text())
    (broken / "tokenizer_config.json").write_text(json.dumps(settings | {"bos_token": "<|endoftext|>"}))
    template_of(broken, lambda template: start + template)
    reader = models.load_reader(str(broken))
    status, detail, _ = doctor.check_bos(reader, YES_NO, reader.task_prompt(YES_NO))
    assert status == "failed" and "<|endoftext|> stands 2 times" in detail
    assert f"out of the chat template in {broken}" in detail
    assert doctor.check_bos(reader, SENTIMENT, reader.task_prompt(SENTIMENT)).status == "ok"


def test_a_bos_that_begins_every_turn_may_not_be_doubled_either(broken):
    template_of(broken, lambda template: "<|im_start|>" + template)
    reader = models.load_reader(str(broken))
    assert doctor.check_bos(reader, YES_NO, reader.task_prompt(YES_NO)).status == "failed"


def test_a_bos_in_a_completion_s_template_fails(tiny_llama):
    task = replace(SENTIMENT, template="<|im_start|>Text: {text}\n<|im_start|>Sentiment:", examples=())
    status, detail, _ = doctor.check_bos(tiny_llama, task, tiny_llama.task_prompt(task))
    assert status == "failed" and "the task's template" in detail


def test_ids_that_are_not_the_whole_prompt_s_fail(tiny_llama, monkeypatch):
    for task in (SENTIMENT, YES_NO):
        assert doctor.check_ids(tiny_llama, task, tiny_llama.task_prompt(task)).status == "ok"
    right = tiny_llama.encode(tiny_llama.task_prompt(YES_NO), doctor.UNDECIDED)
    for wrong, at in ((right[:3] + right[2:], 3), ([*right, 5], len(right)), ([*right[:-1], 5], len(right) - 1)):
        monkeypatch.setattr(Llama, "encode", lambda *_, wrong=wrong: wrong)
        status, detail, _ = doctor.check_ids(tiny_llama, YES_NO, None)
        assert status == "failed" and f"differ from number {at} on" in detail and "fetch them again" in detail


def test_control_strings_that_are_obeyed_fail(tiny_llama, monkeypatch):
    frame = tiny_llama.task_prompt(YES_NO)
    assert doctor.check_control(tiny_llama, frame).detail.startswith("17 of 17 tried")
    monkeypatch.setattr(Llama, "encode", lambda self, frame, text: self._ids(frame.render(text)))
    status, detail, _ = doctor.check_control(tiny_llama, frame)
    assert status == "failed" and "a text that spells <" in detail and "out of the texts" in detail


def task_file(tmp_path, *lines):
    path = tmp_path / "own.toml"
    path.write_text("\n".join(['name = "own"', 'template = "Ticket: {text}\\nTeam:"', *lines]))
    return path


def test_labels_that_share_a_token_fail_and_name_the_other_scoring(examine, tiny_folder, tmp_path):
    labels = ["[labels]", 'money = ["refundable"]', 'back = ["refunded"]']
    code, rows = examine("--model", tiny_folder, "--task", task_file(tmp_path, *labels))
    assert code == 1 and statuses(rows, ["label mass", "direction", "batches", "sampling"]) == {"skipped"}
    failed(rows, "answers", "' refund' + 'able'", 'set scoring = "sequence"', "choose another word")
    code, rows = examine("--model", tiny_folder, "--task", task_file(tmp_path, 'scoring = "sequence"', *labels))
    assert statuses(rows, ["answers", "batches"]) == {"ok"}
    failed(rows, "label mass", "the task has no [[examples]]", "add [[examples]]")  # nor are the easy texts of its kind


# What the model says


def rows_of(*pairs):
    """Scored rows of (label, P(positive))."""
    common = {"method": "logprobs", "model": "m", "task": "t", "fingerprint": "f"}
    return [
        predictions.scored(str(i), f"text {i}", label, {"negative": 1 - p, "positive": p}, 0.4, **common)
        for i, (label, p) in enumerate(pairs)
    ]


@pytest.mark.parametrize(
    ("pairs", "status", "says"),
    [
        ([("positive", 0.9), ("negative", 0.2)], "ok", "2 of 2 easy texts get their label"),
        ([("positive", 0.9), ("negative", 0.7)], "warning", "it leans to 'positive'"),
        ([("positive", 0.4), ("negative", 0.3)], "warning", "--debias batch"),
        ([("positive", 0.2), ("negative", 0.9)], "failed", "are answer words swapped?"),
        ([("positive", 0.7), ("negative", 0.7)], "failed", "no more probable on its own texts"),
    ],
)
def test_labels_must_be_likelier_on_their_own_texts(pairs, status, says):
    found = doctor.check_direction((rows_of(*pairs), "easy texts"))
    assert found.status == status and says in found.detail


def test_little_label_mass_is_a_warning_that_shows_what_comes_instead():
    top = {"top_tokens": [{"token": " The", "logprob": np.log(0.25)}]}
    status, detail, (rows, kind) = doctor.check_mass(
        lambda examples: rows_of(*((e.label, 0.6) for e in examples)), lambda text: top, SENTIMENT
    )
    assert status == "warning" and detail.startswith("mean 0.400 over 6 easy texts; after 'text 0'")
    assert "the likeliest is ' The' (25%)" in detail and "word the template" in detail
    assert (len(rows), kind) == (6, "easy texts")
    lost = predictions.failed("1", "x", None, "too long", method="m", model="m", task="t", fingerprint="f")
    with pytest.raises(ValueError, match="too long"):
        doctor.check_mass(lambda examples: [lost], lambda text: top, SENTIMENT)


def test_a_task_of_its_own_is_tried_on_its_own_examples():
    task = replace(SENTIMENT, labels={"a": ("up",), "b": ("down",)}, examples=(("One.", "a"), ("Two.", "b")))
    examples, kind = doctor.easy_examples(task)
    assert [(e.text, e.label) for e in examples] == [("One.", "a"), ("Two.", "b")]
    assert kind == "of the task's own examples"


@pytest.mark.parametrize(("precision", "status"), [("float32", "failed"), ("bfloat16", "warning")])
def test_a_result_that_depends_on_the_batch_is_seen(tiny_llama, monkeypatch, precision, status):
    scorer = logprobs_confidence.prepare(tiny_llama, SENTIMENT)
    assert doctor.check_batches(tiny_llama, scorer).status == "ok"
    plain = Llama.answer_log_probs

    def wrong(self, rows, answers, *rest):
        noise = np.arange(len(answers)) * 0.2 if len(rows) > 1 and self.shares_prefix is not False else 0
        return plain(self, rows, answers, *rest) + noise

    monkeypatch.setattr(Llama, "answer_log_probs", wrong)
    model = replace(tiny_llama, identity={"precision": precision})
    found = doctor.check_batches(model, scorer)
    assert found.status == status and ("--batch-size 1" if status == "failed" else "--dtype float32") in found.detail


def test_sampling_must_vary_and_be_repeatable(tiny_llama, monkeypatch):
    scorer = logprobs_confidence.prepare(tiny_llama, SENTIMENT)
    found = doctor.check_sampling(tiny_llama, scorer)
    assert found.status == "ok" and "8 different answers" in found.detail and "8 of 8" in found.detail
    monkeypatch.setattr(Llama, "sample", lambda *_, **__: [["yes"] * 8])
    found = doctor.check_sampling(tiny_llama, scorer)
    assert found.status == "warning" and "the same answer, 'yes'" in found.detail and "--paraphrase" in found.detail
    numbers = iter(range(100))
    monkeypatch.setattr(Llama, "sample", lambda *_, **__: [[str(next(numbers)) for _ in range(8)]])
    found = doctor.check_sampling(tiny_llama, scorer)
    assert found.status == "failed" and "only 0 of them the same again" in found.detail and "--dtype" in found.detail


def test_the_model_s_own_settings_are_told():
    settings = SimpleNamespace(temperature=0.6, top_p=0.9, top_k=0, repetition_penalty=1.0, min_p=None)
    told = doctor.check_generation(SimpleNamespace(model=SimpleNamespace(generation_config=settings)))
    assert told.startswith("its own temperature 0.6, top_p 0.9 would bend")
    for none in (SimpleNamespace(), SimpleNamespace(generation_config=SimpleNamespace(temperature=1.0))):
        assert "would not bend" in doctor.check_generation(SimpleNamespace(model=none))


# A server


class Server(test_endpoint.Fake):
    """The fake of test_endpoint.py, which here is right about the easy texts, samples by seed, and lists 20 at most."""

    limit = 20

    def reply(self, request, times):
        wanted = max(request.body.get("logprobs") or 0, request.body.get("top_logprobs") or 0)
        if wanted > self.limit:
            return 400, {}, test_endpoint.said(f"logprobs: {wanted} is more than {self.limit}")
        if not self.always:
            label = dict(doctor.EASY).get(request.text)
            request.text += {"negative": " FAKE-NEGATIVE", None: " FAKE-SEEDED"}.get(label, "")
        return super().reply(request, times)


@pytest.fixture
def server(monkeypatch):
    lists = {"FAKE-NEGATIVE": {"+": np.log(0.2), "-": np.log(0.7), "?": np.log(0.05)}}
    monkeypatch.setattr(test_endpoint, "LISTS", test_endpoint.LISTS | lists)
    fake = Server().start()
    yield fake
    fake.stop()


REMOTE = ("log-probabilities", "label mass", "direction", "sampling", "parameters")


def test_a_server_in_order(examine, server):
    server.rejects = {"min_p": "min_p is not known"}
    code, rows = examine("--endpoint", server.url)
    assert (code, statuses(rows, REMOTE)) == (0, {"ok"}), rows
    assert rows["server"][1] == f"fake-1 at {server.url}"
    assert "lists 3 of 20 asked for, not by id (--tokenizer); 200 are too many: " in rows["log-probabilities"][1]
    assert "200 is more than 20" in rows["log-probabilities"][1]
    assert rows["parameters"][1] == "left out, as it rejects them: min_p"
    assert rows["direction"][1].startswith("6 of 6") and "2 different answers" in rows["sampling"][1]
    assert not set(rows) & {"files", "loads", "Hub login"}


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


def test_without_credentials_aws_is_skipped(examine, server):
    for region in ([], ["--region", "eu-west-1"]):
        code, rows = examine("--endpoint", server.url, "--sagemaker", *region)
        assert code == 0 and rows["identity"][0] == "warning"
        assert statuses(rows, ["role", "training quota", "serving quota"]) == {"skipped"}
        assert ("AWS_DEFAULT_REGION" if not region else "aws configure") in rows["identity"][1]


def test_aws_is_asked_for_identity_role_and_quota(examine, server, monkeypatch):
    with FakeAws() as aws:
        for name, value in aws.env.items():
            monkeypatch.setenv(name, value)
        aws.role("SageMakerExecutionRole")
        code, rows = examine("--endpoint", server.url, "--sagemaker")
        assert code == 0 and statuses(rows, ["identity", "role", "training quota", "serving quota"]) == {"ok"}
        assert rows["identity"][1] == "account 123456789012, region us-east-1"
        aws.quotas = dict.fromkeys(aws.quotas, 0.0)
        code, rows = examine("--endpoint", server.url, "--sagemaker", "--role", "Nobody")
        assert code == 1 and rows["role"][0] == "failed"
        for subject in ("training quota", "serving quota"):
            failed(rows, subject, "request-service-quota-increase")


def test_wrong_credentials_fail(monkeypatch):
    def refuse(region=None, dry_run=False):
        raise sagemaker_job.AwsError("AWS does not know these credentials", "InvalidClientTokenId")

    monkeypatch.setattr(sagemaker_job, "connect", refuse)
    found = doctor.find_aws(SimpleNamespace(region=None))
    assert (found.status, found.value) == ("failed", None)
