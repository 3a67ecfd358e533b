"""fine_tune_model.py, in this process and as the command that a user types.

Truth comes from Method 1's own predictions with the adapter that was written, from plain transformers and peft, and
from unbroken runs for broken ones. All models but one are tiny and random; the tables are made up here. Losses and
steps are in test_training.py.
"""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import exit_code_of, tiny, write_csv
from test_training import SENTIMENT, WORDS, labelled

import calibration_metrics
import fine_tune_model
import lora
import plotting
import predictions
import training
from fine_tune_model import FineTunedSentimentClassifier, main, parse_arguments, refuse_sharded_training, sample_of
from llama import load_llama
from logprobs_confidence import label_scorer
from lora import HEAD
from model_files import folder_hash
from task import Task, read_task
from training import CHECKPOINT, CONFIG, LOG, LabelledRows, TrainingSettings

ROOT = Path(__file__).parent.parent
ADAPTER = "adapter_model.safetensors"
WRITTEN = {CONFIG, LOG, ADAPTER, "adapter_config.json", "training_curves.png"}
PROJECTIONS = ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]
RUN = ["--batch-size", 5, "--epochs", 2, "--validate-every", 3, "--checkpoint-every", 3, "--learning-rate", 0.02]
STEPS = 10  # of that run on the 23 rows of training.csv; the last step of an epoch has three
TRAINING, VALIDATION = labelled(23, 0), labelled(25, 1)


pytestmark = pytest.mark.usefixtures("one_tokenizer")


@pytest.fixture(scope="module")
def base(tokenizer, tmp_path_factory):
    """A tiny Llama of three layers, so that peft names the projections and not the layers, as a model folder."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    tiny("llama", tokenizer, num_hidden_layers=3).model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def command(base, tmp_path_factory):
    """The arguments of a training that writes into a folder; later flags replace earlier ones."""
    tables = tmp_path_factory.mktemp("tables")
    names = ["--model", base, "--train", write_csv(tables / "training.csv", TRAINING)]
    names += ["--validation", write_csv(tables / "validation.csv", VALIDATION), "--device", "cpu"]
    return lambda folder, *flags: [*map(str, [*names, "--output-dir", folder, *RUN, *flags])]


@pytest.fixture
def call(command, outcome, monkeypatch):
    """Train in this process, without the picture, which takes longest: -> exit code, stdout, stderr."""
    monkeypatch.setattr(plotting, "training_curves", lambda path, *_, **__: path.write_bytes(b""))

    return lambda folder, *flags: outcome(main, *command(folder, *flags))


@pytest.fixture(scope="module")
def unbroken(command, tmp_path_factory):
    """The folder of a run that nothing disturbed."""
    folder = tmp_path_factory.mktemp("runs") / "unbroken"
    assert exit_code_of(main, *command(folder)) == 0
    return folder


def log_of(folder):
    """The log without its timings."""
    entries = [json.loads(line) for line in (folder / LOG).read_text().splitlines()]
    return [{name: value for name, value in entry.items() if name != "rows_per_second"} for entry in entries]


def losses_of(folder):
    return [entry["loss"] for entry in log_of(folder) if "loss" in entry]


def config_of(folder):
    return json.loads((folder / CONFIG).read_text())


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def assert_same_run(folder, truth):
    assert (folder / ADAPTER).read_bytes() == (truth / ADAPTER).read_bytes()
    assert (folder / "adapter_config.json").read_bytes() == (truth / "adapter_config.json").read_bytes()
    assert log_of(folder) == log_of(truth) and config_of(folder) == config_of(truth)
    assert {path.name for path in folder.iterdir()} == {path.name for path in truth.iterdir()}


def one_error(result, *words):
    code, out, err = result
    errors = [line for line in err.splitlines() if not line.startswith("note: ")]
    assert (code, len(errors)) == (2, 1) and errors[0].startswith("error: "), (code, out, err)
    assert all(word in errors[0] for word in words), errors[0]


# The adapter that is written


def test_plain_peft_loads_the_adapter_and_gives_the_same_answers_off_on_and_merged(unbroken, base, tokenizer):
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    ids = [tokenizer(word).input_ids for word in (" negative", " positive")]
    prompts = [tokenizer(SENTIMENT.prompt(row.text)).input_ids for row in VALIDATION[:8]]

    def plain(network):
        """log P(" negative"), log P(" positive") after each prompt, by transformers alone; [n, 2]."""
        with torch.no_grad():
            logits = torch.stack([network(torch.tensor([prompt])).logits[0, -1] for prompt in prompts])
        return logits.double().log_softmax(-1)[:, [i for (i,) in ids]].numpy()

    alone = plain(AutoModelForCausalLM.from_pretrained(base))
    network = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), unbroken)
    theirs = plain(network)
    with network.disable_adapter():
        np.testing.assert_array_equal(plain(network), alone)
    assert np.abs(theirs - alone).max() > 0.1
    ours = load_llama(str(base), str(unbroken), device="cpu").answer_log_probs(prompts, ids)
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-4)
    np.testing.assert_allclose(plain(network.merge_and_unload()), theirs, rtol=0, atol=1e-3)


def test_the_files_hold_what_servers_take_the_trained_tensors_alone_and_no_path(unbroken, base):
    from safetensors.numpy import load_file

    text = (unbroken / "adapter_config.json").read_text()
    config = json.loads(text)
    assert config["target_modules"] == PROJECTIONS
    assert (config["peft_type"], config["task_type"], config["bias"]) == ("LORA", "CAUSAL_LM", "none")
    assert not any(config[name] for name in ("modules_to_save", "use_dora", "lora_bias", "use_rslora", "rank_pattern"))
    assert (config["r"], config["lora_alpha"], config["lora_dropout"]) == (4, 8.0, 0.05)
    assert config["base_model_name_or_path"] == "tiny" and config["inference_mode"] is True
    assert str(base.parent) not in text and "/" not in text and text.endswith("}\n")
    tensors = load_file(unbroken / ADAPTER)
    assert len(tensors) == 3 * 7 * 2 and {value.dtype for value in tensors.values()} == {np.dtype("float32")}
    assert {name.rpartition(".lora_")[2] for name in tensors} == {"A.weight", "B.weight"}
    assert all(np.abs(value).max() > 0 for value in tensors.values())
    assert {path.name for path in unbroken.iterdir()} == WRITTEN
    assert (unbroken / "training_curves.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_a_seed_gives_the_same_bytes_again_and_another_seed_others(unbroken, call, tmp_path):
    assert call(tmp_path / "again")[0] == call(tmp_path / "other", "--seed", 1, "--epochs", 1)[0] == 0
    assert_same_run(tmp_path / "again", unbroken)
    assert (tmp_path / "other" / ADAPTER).read_bytes() != (unbroken / ADAPTER).read_bytes()
    assert log_of(tmp_path / "other")[0] == log_of(unbroken)[0]  # before training no seed has any part
    assert losses_of(tmp_path / "other")[0] != losses_of(unbroken)[0]


def test_a_training_from_records_is_that_of_the_command(unbroken, base, call, tmp_path):
    llama, folder = load_llama(str(base), device="cpu"), tmp_path / "run"
    sources = [config_of(unbroken)[name]["source"] for name in ("train", "validation")]
    rows = [LabelledRows(*pair) for pair in zip(sources, (TRAINING, VALIDATION), strict=True)]
    settings = TrainingSettings(batch_size=5, epochs=2, validate_every=3, learning_rate=0.02)
    assert fine_tune_model.train_adapter(llama, SENTIMENT, *rows, folder, settings, base_model=str(base)) == 0
    assert_same_run(folder, unbroken)


# What is measured


def predictions_of(base, folder, rows, task=SENTIMENT, dtype="auto"):
    return label_scorer(load_llama(str(base), folder and str(folder), "cpu", dtype), task).score_together(rows)


def assert_describes(entry, rows):
    """Whether a validation's numbers are those of these predictions, by the metrics' own functions."""
    confidence, correct = predictions.confidence_and_correct(rows)
    truth = [row.probabilities[row.label] for row in rows]
    assert (entry["n"], entry["accuracy"]) == (len(rows), correct.mean())
    assert entry["log_loss"] == pytest.approx(-np.log(truth).mean(), abs=1e-5)
    assert entry["ece"] == pytest.approx(calibration_metrics.expected_calibration_error(confidence, correct), abs=1e-5)
    floor = calibration_metrics.consistency_resampling(confidence).mean()
    assert entry["ece_floor"] == pytest.approx(floor, abs=0.03)  # both are of random draws
    assert entry["mean_confidence"] == pytest.approx(confidence.mean(), abs=1e-5)
    assert entry["label_mass"] == pytest.approx(np.mean([row.label_mass for row in rows]), rel=1e-4)


def test_the_log_tells_of_base_and_kept_adapter_what_method_1_says(unbroken, base):
    config, log = config_of(unbroken), log_of(unbroken)
    validations = [entry for entry in log if "log_loss" in entry]
    assert [entry["step"] for entry in validations] == [0, 3, 6, 9, 10]
    assert [entry["step"] for entry in log if "loss" in entry] == [*range(1, STEPS + 1)]
    assert config["before"] == validations[0] and config["steps"] == STEPS
    assert config["best"] == min(validations[1:], key=lambda entry: entry["log_loss"])
    assert_describes(config["before"], predictions_of(base, None, VALIDATION))
    assert_describes(config["best"], predictions_of(base, unbroken, VALIDATION))
    losses = losses_of(unbroken)
    assert losses[-1] < losses[0] - 1
    # The adapter changes nothing at first, so the first loss is that of the base model on the first five rows.
    rows = predictions_of(base, None, [TRAINING[i] for i in training.batch_of(1, 23, 5, 0)])
    truth = [-np.log(row.probabilities[row.label] * row.label_mass) for row in rows]
    assert losses[0] == pytest.approx(np.mean(truth), rel=1e-5)


def test_a_limit_watches_some_rows_drawn_by_the_seed(call, base, tmp_path):
    rows = LabelledRows("a table", VALIDATION)
    assert call(tmp_path / "a", "--validation-limit", 11, "--epochs", 1, "--sample", 20)[0] == 0
    watched = sample_of(rows, 11, 0).examples
    assert len({row.id for row in watched}) == 11 and watched == sorted(watched, key=VALIDATION.index)
    assert sample_of(rows, 11, 1).examples != watched and sample_of(rows, 0, 1) == rows
    assert_describes(config_of(tmp_path / "a")["best"], predictions_of(base, tmp_path / "a", watched))
    assert [config_of(tmp_path / "a")[name]["rows"] for name in ("train", "validation")] == [20, 11]


def scripted(monkeypatch, name, values):
    """Let the validations say these values of a measure; -> the true measures of each."""
    told, real = [], training.validation_measures

    def tell(answers, targets):
        told.append(real(answers, targets))
        return told[-1] | {name: values[len(told) - 1]}

    monkeypatch.setattr(training, "validation_measures", tell)
    return told


@pytest.mark.parametrize("name", ["log_loss", "ece"])
def test_the_adapter_of_the_best_validation_is_kept_and_patience_ends_the_training(
    call, base, tmp_path, monkeypatch, name
):
    flags = "--validate-every", 1, "--early-stopping", name, "--patience", 2
    told = scripted(monkeypatch, name, [0.1, 0.9, 0.5, 0.7, 0.5, 0.4])  # the base, 0.1, is no candidate
    code, out, _ = call(tmp_path / "run", *flags)
    assert code == 0 and "step 2 of 4" in out
    assert [line.split()[0] for line in out.splitlines() if line.endswith("  kept")] == ["1", "2"]
    config = config_of(tmp_path / "run")
    assert (config["steps"], config["best"]["step"], config["best"][name]) == (4, 2, 0.5)
    assert_describes(told[2] | {"n": 25}, predictions_of(base, tmp_path / "run", VALIDATION))
    told.clear()
    disturb(monkeypatch, 4, lambda: os.kill(os.getpid(), signal.SIGTERM))  # after one that was no better
    assert call(tmp_path / "stopped", *flags)[0] == 143 and call(tmp_path / "stopped", *flags, "--resume")[0] == 0
    assert len(told) == 5 and config_of(tmp_path / "stopped") == config


def test_without_patience_no_validation_ends_the_training(call, tmp_path, monkeypatch):
    scripted(monkeypatch, "log_loss", [0.1, 0.2, 0.3, 0.4, 0.5, 0.6])
    _, out, _ = call(tmp_path / "run", "--validate-every", 1, "--patience", 0, "--epochs", 1)
    assert config_of(tmp_path / "run")["steps"] == 5 and "no better than the base model" in out


# training_config.json and its readers


def test_the_configuration_names_base_task_rows_settings_and_fingerprints(unbroken, base, monkeypatch):
    config = config_of(unbroken)
    alone = label_scorer(load_llama(str(base), device="cpu"), SENTIMENT)
    fine_tuned = label_scorer(load_llama(str(base), str(unbroken), device="cpu"), SENTIMENT)
    assert config["fingerprints"] == {"base": alone.fingerprint, "tuned": fine_tuned.fingerprint}
    assert config["fingerprint"] == fine_tuned.fingerprint != alone.fingerprint
    assert config["base_weights"] == alone.llama.identity["weights"] and config["precision"] == "float32"
    assert Task.from_settings(config["task"]) == replace(SENTIMENT, paraphrases=())
    assert Path(config["train"]["source"]).name == "training.csv" and config["train"]["rows"] == 23
    assert (config["settings"]["learning_rate"], config["settings"]["alpha"]) == (0.02, 8)
    assert config["versions"]["torch"] and config["processes"] == 1
    monkeypatch.setattr(lora, "ADAPTER_FOLDER", unbroken)
    fitting = load_llama(str(base), "auto", "cpu", task=SENTIMENT.settings())
    assert fitting.adapter == unbroken and fitting.identity["adapter"] == folder_hash(unbroken)


def test_the_classifier_and_the_probes_say_what_method_1_says(unbroken, base):
    scorer = label_scorer(load_llama(str(base), str(unbroken), device="cpu"), SENTIMENT)
    classifier = FineTunedSentimentClassifier(unbroken, device="cpu")
    for text in ("never quite warm good", "  a dull film bad\n"):
        found, truth = classifier.classify_single(text), scorer.explain(text)
        assert (found["prediction"], found["text"]) == (truth["prediction"], text)
        for name in ("confidence", "probabilities", "label_mass"):
            assert found[name] == pytest.approx(truth[name], abs=1e-6)
    with pytest.raises(ValueError, match="empty"):
        classifier.classify_single(" \n")
    for probe in config_of(unbroken)["probes"]:
        assert probe["probabilities"] == pytest.approx(scorer.explain(probe["text"])["probabilities"], abs=1e-6)


@pytest.mark.parametrize("content", ["{", '{"task": {}, "base_model": 1}'])
def test_the_classifier_names_a_configuration_that_it_cannot_read(tmp_path, content):
    with pytest.raises(OSError, match=CONFIG):
        FineTunedSentimentClassifier(tmp_path)
    (tmp_path / CONFIG).write_text(content)
    with pytest.raises(ValueError, match=rf"^{tmp_path / CONFIG} is broken: "):
        FineTunedSentimentClassifier(tmp_path)


# Stopping, being killed, going on


def disturb(monkeypatch, step, deed):
    """Do something in the middle of a step, once."""
    real = training.batch_of

    def batch_of(number, *rest):
        if number == step:
            monkeypatch.setattr(training, "batch_of", real)
            deed()
        return real(number, *rest)

    monkeypatch.setattr(training, "batch_of", batch_of)


def send(*numbers):
    return lambda: [os.kill(os.getpid(), number) for number in numbers]


def interrupt():
    raise KeyboardInterrupt


def checkpointed(folder):
    from safetensors import safe_open

    with safe_open(folder / CHECKPOINT, "np") as file:
        return json.loads(file.metadata()["standing"])


STOPS = {  # number of the signal, step in which it arrives, exit code
    "at a step with a validation and a checkpoint": (signal.SIGTERM, 3, 143),
    "between, by Ctrl-C": (signal.SIGINT, 7, 130),
}


@pytest.mark.parametrize(("number", "step", "code"), STOPS.values(), ids=STOPS.keys())
def test_a_run_that_was_told_to_stop_goes_on_to_the_bytes_of_an_unbroken_one(
    call, unbroken, tmp_path, monkeypatch, number, step, code
):
    folder = tmp_path / "run"
    handlers = [signal.getsignal(one) for one in (signal.SIGTERM, signal.SIGINT)]
    disturb(monkeypatch, step, send(number))
    found, _, err = call(folder)
    assert found == code and f"stopped at step {step}" in err and "--resume" in err
    assert [signal.getsignal(one) for one in (signal.SIGTERM, signal.SIGINT)] == handlers
    assert checkpointed(folder)["step"] == step and not (folder / CONFIG).exists()
    one_error(call(folder), "unfinished", "--resume", "--overwrite")
    assert call(folder, "--resume", "--checkpoint-every", 1)[0] == 0  # which has no bearing on the adapter
    assert_same_run(folder, unbroken)


def test_a_second_ctrl_c_ends_it_at_once(call, tmp_path, monkeypatch):
    disturb(monkeypatch, 2, send(signal.SIGINT, signal.SIGINT))
    code, _, err = call(tmp_path / "run")
    assert code == 130 and "Traceback" not in err
    assert err.splitlines()[-1] == "stopped; --resume goes on from the last checkpoint"


# Runs the script, but in one step does something first: is killed, or says where it is and waits for a signal.
DISTURBED = """if True:
    import os, signal, sys
    from pathlib import Path
    import command_line, fine_tune_model, training
    step, marker = int(sys.argv[1]), Path(sys.argv[2])
    real = training.batch_of
    def batch_of(number, *rest):
        if number == step and sys.argv[3] == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if number == step and sys.argv[3] == "wait":
            read, write = os.pipe()
            os.set_blocking(write, False)
            signal.set_wakeup_fd(write)
            marker.with_name(marker.name + os.environ.get("RANK", "0")).touch()
            os.read(read, 1)
        return real(number, *rest)
    training.batch_of = batch_of
    command_line.run(lambda: fine_tune_model.main(sys.argv[4:]))
"""


def start(arguments, **environment):
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "cwd": ROOT}
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | environment
    return subprocess.Popen([sys.executable, *map(str, arguments)], env=environment, **options)


def ends_of(processes):
    """[(exit code, stdout, stderr)] of processes that end; none is left behind if one does not."""
    try:
        said = [process.communicate(timeout=500) for process in processes]
        return [(process.returncode, *texts) for process, texts in zip(processes, said, strict=True)]
    finally:
        for process in processes:
            process.kill()


def test_a_killed_run_loses_the_steps_since_its_checkpoint_and_ends_with_the_same_bytes(
    command, call, unbroken, tmp_path
):
    folder = tmp_path / "run"
    killed = start(["-c", DISTURBED, 8, "", "kill", *command(folder)], PYTHONHASHSEED="1")
    assert ends_of([killed])[0][0] == -signal.SIGKILL
    assert checkpointed(folder)["step"] == 6 and log_of(folder)[-1]["step"] == 7
    name = "adapter_config.json"  # written by another Python, with other hashes
    assert (folder / name).read_bytes() == (unbroken / name).read_bytes()
    assert call(folder, "--resume")[0] == 0
    assert_same_run(folder, unbroken)


def test_a_run_that_breaks_off_elsewhere_is_unfinished_until_all_is_written(call, unbroken, tmp_path, monkeypatch):
    for module, name in ((training, "validate"), (plotting, "training_curves")):
        with monkeypatch.context() as patch:
            patch.setattr(module, name, lambda *_, **__: interrupt())
            assert call(tmp_path / "run", "--resume")[0] == 130
        assert not (tmp_path / "run" / CONFIG).exists()
    assert call(tmp_path / "run", "--resume")[0] == 0
    assert_same_run(tmp_path / "run", unbroken)


def test_a_finished_folder_is_left_alone_unless_it_shall_be_replaced(call, unbroken, tmp_path):
    folder = shutil.copytree(unbroken, tmp_path / "run")
    before = contents(folder)
    code, out, err = call(folder, "--resume")
    assert (code, err) == (0, "") and "nothing to do" in out
    one_error(call(folder), "finished adapter", "--overwrite", "--output-dir")
    one_error(call(folder, "--overwrite", "--train", "no-such-file.csv"), "no-such-file.csv")
    assert contents(folder) == before
    assert call(folder, "--overwrite", "--epochs", 1)[0] == 0
    assert config_of(folder)["steps"] == 5 and contents(folder)[folder / ADAPTER] != before[folder / ADAPTER]


def test_overwriting_leaves_nothing_of_the_earlier_training_to_be_taken_for_the_new_one(
    call, unbroken, tmp_path, monkeypatch
):
    folder = shutil.copytree(unbroken, tmp_path / "run")
    (folder / HEAD).write_text("of the earlier adapter")
    (folder / CHECKPOINT).parent.mkdir()
    (folder / CHECKPOINT).write_text("of another training")
    disturb(monkeypatch, 2, interrupt)
    assert call(folder, "--overwrite", "--seed", 5)[0] == 130
    assert not any((folder / name).exists() for name in (CONFIG, HEAD, CHECKPOINT))
    assert call(folder, "--resume")[0] == 0  # with the first seed
    assert_same_run(folder, unbroken)


def test_a_folder_with_somebody_s_files_is_refused(call, tmp_path):
    folder = tmp_path / "theirs"
    folder.mkdir()
    (folder / ADAPTER).write_text("theirs")
    for flags in ([], ["--overwrite"], ["--resume"]):
        one_error(call(folder, *flags), "holds other files", str(folder))
    assert contents(folder) == {folder / ADAPTER: b"theirs"}
    one_error(call(folder / ADAPTER), "is a file")


@pytest.fixture(scope="module")
def stopped(command, tmp_path_factory):
    """A run that stopped after step 4."""
    folder = tmp_path_factory.mktemp("runs") / "stopped"
    with pytest.MonkeyPatch.context() as patch:
        disturb(patch, 4, send(signal.SIGTERM))
        assert exit_code_of(main, *command(folder)) == 143
    return folder


def rewrite(change):
    """Another checkpoint file, whole, that differs in its numbers."""

    def damage(path):
        from safetensors import safe_open
        from safetensors.numpy import save_file

        with safe_open(path, "np") as file:
            metadata, tensors = dict(file.metadata()), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        change(metadata, tensors)
        save_file(tensors, path, metadata)

    return damage


DAMAGES = {
    "cut off": lambda path: os.truncate(path, path.stat().st_size // 2),
    "numbers that are no JSON": rewrite(lambda metadata, tensors: metadata.update(standing="{")),
    "a tensor less": rewrite(lambda metadata, tensors: tensors.pop("0.exp_avg")),
    "a tensor of another shape": rewrite(lambda metadata, tensors: tensors.update({"0.weight": np.zeros(3, "f4")})),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES.keys())
def test_a_broken_checkpoint_is_one_line_and_stays_as_it_is(call, stopped, tmp_path, damage):
    folder = shutil.copytree(stopped, tmp_path / "run")
    damage(folder / CHECKPOINT)
    before = contents(folder)
    one_error(call(folder, "--resume"), str(folder / CHECKPOINT), "broken", "--overwrite")
    assert contents(folder) == before


@pytest.mark.parametrize(("name", "flags"), [("learning rate", ["--learning-rate", 0.01]), ("train", ["--limit", 20])])
def test_a_checkpoint_of_other_settings_or_rows_is_not_continued(call, stopped, tmp_path, name, flags):
    folder = shutil.copytree(stopped, tmp_path / "run")
    one_error(call(folder, "--resume", *flags), f"{name} is not the same", "--overwrite")
    assert checkpointed(folder) == checkpointed(stopped)


# Several processes


def start_two(arguments):
    """The same command in two processes that share a training, as torchrun or accelerate start them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    common |= {"ACCELERATE_USE_CPU": "true"}
    return [start(arguments, RANK=str(rank), LOCAL_RANK=str(rank), **common) for rank in range(2)]


@pytest.mark.study
def test_two_processes_make_the_adapter_of_one_also_when_they_are_stopped(call, command, tmp_path):
    from safetensors.numpy import load_file

    # Steps of 11, 11 and 1 rows: in the last a process has none. The 25 validation rows do not divide either.
    flags = "--batch-size", 11, "--validate-every", 2, "--checkpoint-every", 100, "--learning-rate", 1e-3
    assert call(tmp_path / "one", *flags)[0] == 0
    folder = tmp_path / "two"
    both = start_two(["-c", DISTURBED, 4, tmp_path / "marker", "wait", *command(folder, *flags)])
    for rank, process in enumerate(both):
        while not (tmp_path / f"marker{rank}").exists():
            assert process.poll() is None, process.communicate()
            time.sleep(0.05)
    for process in both:
        process.terminate()
    ends = ends_of(both)
    assert [code for code, _, _ in ends] == [143, 143], ends
    assert checkpointed(folder)["step"] == 4
    ends = ends_of(start_two(["fine_tune_model.py", *command(folder, *flags, "--resume")]))
    assert [code for code, _, _ in ends] == [0, 0] and "Written to" in ends[0][1] and ends[1][1] == "", ends
    truth = load_file(tmp_path / "one" / ADAPTER)
    for name, value in load_file(folder / ADAPTER).items():
        np.testing.assert_allclose(value, truth[name], rtol=0, atol=1e-5)
    for ours, theirs in zip(log_of(folder), log_of(tmp_path / "one"), strict=True):
        assert ours == pytest.approx(theirs, abs=1e-4)
    assert config_of(folder)["processes"] == 2


# What cannot be trained


def with_rows(name, rows, **options):
    """A change of the tables: another file in the place of one."""
    return lambda folder: [f"--{name}", write_csv(folder / f"other_{name}.csv", rows, **options)]


LONG = " ".join(WORDS * 30)
SHOUTED = ("v", TRAINING[3].text.upper() + "  ", "positive")
PROBLEMS = {  # flags, or what makes them from a folder -> words of the one line
    "training of one class": (with_rows("train", TRAINING[::2]), ["other_train.csv", "12 rows", "'negative'"]),
    "a label of no task": (with_rows("train", [*TRAINING, ("n", "x y", "meh")]), ["row 24", "'meh'", "--label-map"]),
    "a row without a label": (with_rows("train", [*TRAINING, ("n", "x y", "")]), ["row 'n' has no label"]),
    "an empty text": (with_rows("train", [*TRAINING, ("n", " \n", "positive")]), ["row 'n'", "empty"]),
    "a text too long": (with_rows("train", [*TRAINING, ("n", LONG, "positive")]), ["row 'n'", "tokens", "512"]),
    "validation of training rows": (with_rows("validation", [*VALIDATION, SHOUTED]), ["'v'", "'0-3'", "training.csv"]),
    "an adapter to train on": (["--adapter", "auto"], ["--adapter", "--resume"]),
    "4 bits on a CPU": (["--load-in-4bit"], ["--load-in-4bit needs an NVIDIA GPU"]),
    "resume and overwrite": (["--resume", "--overwrite"], ["--resume", "--overwrite"]),
    "too few rows for a head": (
        lambda folder: ["--confidence-head", *with_rows("validation", VALIDATION[:19])(folder)],
        ["19 rows", "--confidence-head needs 20"],
    ),
}


@pytest.mark.parametrize(("flags", "words"), PROBLEMS.values(), ids=PROBLEMS.keys())
def test_bad_input_is_one_line_and_exit_code_2_and_writes_nothing(call, tmp_path, flags, words):
    flags = flags(tmp_path) if callable(flags) else flags
    result = call(tmp_path / "run", *flags)
    one_error(result, *words)
    assert not (tmp_path / "run").exists() and "--truncate" not in result[2]


@pytest.mark.parametrize(("name", "what"), [("ACCELERATE_USE_FSDP", "FSDP"), ("ACCELERATE_USE_DEEPSPEED", "DeepSpeed")])
def test_a_training_that_would_split_the_model_is_refused_in_one_line(call, tmp_path, monkeypatch, name, what):
    monkeypatch.setenv(name, "false")
    refuse_sharded_training(os.environ)
    monkeypatch.setenv(name, "true")
    with pytest.raises(ValueError, match=f"{name} asks for {what}.*70B.*QLoRA.*what is larger does not fit"):
        fine_tune_model.main(["--output-dir", str(tmp_path / "new")])
    assert not (tmp_path / "new").exists()


def test_training_rows_need_validation_rows(capsys):
    code = exit_code_of(main, "--train", "mine.csv")
    one_error((code, *capsys.readouterr()), "--train needs --validation")
    assert parse_arguments([]).validation == "data:validation"


def test_a_gradient_that_is_not_finite_ends_the_training_and_says_what_helps(call, tmp_path):
    flags = "--learning-rate", 1e30, "--validate-every", 100, "--checkpoint-every", 1
    one_error(call(tmp_path / "run", *flags), "gradient of step 2 is not finite", "--learning-rate", "--dtype float32")
    assert not (tmp_path / "run" / CONFIG).exists() and checkpointed(tmp_path / "run")["step"] == 1


# Other tasks, other losses, the real model


THREE = 'name = "tone"\ntemplate = "{text}\\nTone:"\n[labels]\nnegative = ["negative"]\nneutral = ["neutral"]\n'
THREE += 'positive = ["positive"]\n'


@pytest.mark.parametrize(
    ("task", "flags"),
    [
        (THREE, ["--loss", "mmce"]),
        ("sentiment-yes-no", ["--loss", "focal", "--gradient-checkpointing"]),
        (THREE.replace("[labels]", 'scoring = "sequence"\n[labels]'), ["--loss", "label-smoothing"]),
        ("sentiment", ["--loss", "brier", "--dtype", "bfloat16"]),
    ],
    ids=["three labels", "chat", "sequence", "bfloat16"],
)
def test_other_tasks_losses_and_types_train_and_are_measured_as_method_1_does(call, base, tmp_path, task, flags):
    labels = ["negative", "positive"]
    if task.startswith("name"):
        (tmp_path / "tone.toml").write_text(task)
        task, labels = str(tmp_path / "tone.toml"), ["negative", "neutral", "positive"]
    rows = labelled(24, 1, labels)
    given = [*with_rows("train", labelled(24, 0, labels))(tmp_path), *with_rows("validation", rows)(tmp_path)]
    code, out, err = call(tmp_path / "run", *given, "--task", task, *flags)
    assert code == 0, err
    config, losses = config_of(tmp_path / "run"), losses_of(tmp_path / "run")
    assert np.mean(losses[5:]) < np.mean(losses[:5])  # the second epoch, the first
    found = predictions_of(base, tmp_path / "run", rows, read_task(task), config["precision"])
    assert {row.fingerprint for row in found} == {config["fingerprint"]}
    if "bfloat16" not in flags:
        assert_describes(config["best"], found)
    assert "accuracy" in out and "n = 24 validation rows" in out


def test_the_intervals_are_of_whole_groups(call, tmp_path):
    # Where all rows are one group there is one resample, and the interval is the difference itself.
    groups = write_csv(tmp_path / "g.csv", [(row.id, "all") for row in VALIDATION], header=("id", "group"))
    spans = []
    for name, flags in (("alone", []), ("one group", ["--groups", groups])):
        out = call(tmp_path / name, "--epochs", 1, *flags)[1]
        line = next(line for line in out.splitlines() if line.startswith("log loss"))
        spans.append(re.search(r"(\S+) \[(\S+), (\S+)\]", line).groups())
    assert len({*spans[1]}) == 1 < len({*spans[0]}) and spans[0][0] == spans[1][0]


@pytest.mark.study
def test_the_embedded_model_is_fine_tuned(tmp_path):
    flags = ["--limit", 48, "--epochs", 1, "--validation-limit", 40, "--output-dir", tmp_path / "run"]
    assert exit_code_of(main, *flags, "--device", "cpu") == 0
    config = config_of(tmp_path / "run")
    assert {path.name for path in (tmp_path / "run").iterdir()} == WRITTEN
    assert (config["base_model"], config["steps"], config["train"]["rows"]) == ("default", 2, 48)
    assert config["before"]["accuracy"] > 0.6 and config["before"]["label_mass"] > 0.9
    assert json.loads((tmp_path / "run" / "adapter_config.json").read_text())["target_modules"] == PROJECTIONS
    classifier = FineTunedSentimentClassifier(tmp_path / "run", device="cpu")
    found = classifier.classify_single("I absolutely love this movie")  # after two steps it need not be right
    assert found["confidence"] == max(found["probabilities"].values()) > 0.5 and found["label_mass"] > 0.9
