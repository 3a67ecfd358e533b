"""sagemaker_job.py and fine_tune_model.py --sagemaker, without a container; whole jobs run in test_sagemaker.py."""

import argparse
import io
import json
import re
import shutil
import sys
import tarfile
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from fake_sagemaker import golden, problems, stubbed
from safetensors.numpy import load_file, save_file

import aws
import fine_tune_model
import sagemaker_job
import tables
from aws import AwsError, Weights
from sagemaker_job import Training, TrainingJob
from tables import Example

ROOT = Path(__file__).parent.parent
TOKEN = "hf_" + "DoNotShowThisTokenAnywhere" + "12345678"
SECRET = "arn:aws:secretsmanager:us-east-1:123456789012:secret:hf-Ab12"
HOME = "s3://sagemaker-us-east-1-123456789012/calibrated-confidence"
SETTINGS = sagemaker_job.settings_from_arguments(fine_tune_model.parse_arguments(["--sagemaker"]))
JOB = TrainingJob(
    name="calibrated-confidence-20261126-101500-7f3a",
    region="us-east-1",
    role="arn:aws:iam::123456789012:role/SageMakerExecutionRole",
    settings=SETTINGS,
    home=HOME,
    source=f"{HOME}/source/7f3a/sourcedir.tar.gz",
    data=f"{HOME}/data/7f3a/",
    checkpoints=f"{HOME}/checkpoints/7f3a/one",
)
SPOT = replace(JOB, settings=replace(SETTINGS, spot=True, hf_token_secret=SECRET), weights=f"{HOME}/weights/a-1/")


@pytest.fixture(scope="module")
def few(tmp_path_factory):
    """The flags of a job with few rows."""
    folder = tmp_path_factory.mktemp("rows")
    words = ("apple", "river", "stone", "cloud", "night", "paper", "glass", "music", "horse", "field", "lemon", "tower")
    rows = [f"{word} {word[::-1]},{label}" for word, label in zip(words, ("positive", "negative") * 6, strict=True)]
    for name, part in (("t.csv", rows[:8]), ("v.csv", rows[8:])):
        (folder / name).write_text("\n".join(["text,label", *part]) + "\n", encoding="utf-8")
    return ["--sagemaker", "--train", folder / "t.csv", "--validation", folder / "v.csv"]


@pytest.fixture
def main(outcome, tmp_path, monkeypatch):
    """Run the command in this process: its exit code, out and err."""
    monkeypatch.setattr(sagemaker_job, "imported_modules", lambda *_: {})  # has a test of its own

    def run(*arguments, folder="out"):
        code, out, err = outcome(fine_tune_model.main, *arguments, "--output-dir", tmp_path / folder)
        assert TOKEN not in out + err and "Traceback" not in err
        return SimpleNamespace(code=code, out=out, err=err)

    return run


def start_by_hand(fake, job=JOB):
    fake.client("sagemaker").create_training_job(**sagemaker_job.training_request(job))
    return fake.jobs[job.name]


# What is sent


@pytest.mark.parametrize(("name", "job"), [("training job", JOB), ("spot training job with staged weights", SPOT)])
def test_a_start_sends_the_golden_request(name, job, capsys):
    account, stubber = stubbed()
    with stubber:
        arn = "arn:aws:sagemaker:us-east-1:123456789012:training-job/x"
        stubber.add_response("create_training_job", {"TrainingJobArn": arn}, golden(name))
        sagemaker_job.start(account, job)
    assert problems("CreateTrainingJob", golden(name)) == []
    stopping = golden(name)["StoppingCondition"]
    assert stopping["MaxRuntimeInSeconds"] <= stopping.get("MaxWaitTimeInSeconds", 7200)
    assert capsys.readouterr().out == f"starting {job.name}\n"


@pytest.mark.parametrize("error", [AwsError("Try again"), KeyboardInterrupt()])
def test_a_start_that_may_have_happened_names_the_job(capsys, error):
    def create_training_job(**_):
        raise error

    client = SimpleNamespace(create_training_job=create_training_job)
    account = aws.Account("us-east-1", "123456789012", None, {"sagemaker": client})
    with pytest.raises((ValueError, SystemExit)) as end:
        sagemaker_job.start(account, JOB)
    said = f"{end.value} {capsys.readouterr().err}"
    assert f"started all the same, `python fine_tune_model.py --region us-east-1 --stop {JOB.name}` ends it" in said


def training(**more):
    rows = [Example("1", "good", "positive"), Example("2", "bad", "negative")]
    flags = {"epochs": 3, "confidence_head": True, "load_in_4bit": False, "micro_batch_size": None}
    known = {"model": "default", "task": "sentiment", "flags": flags, "sources": {"train": "a.csv"}}
    return Training(**known | {"training": rows, "validation": rows, "groups": None, "hashes": {}} | more)


def test_the_archive_takes_every_module_that_training_needs_and_the_flags():
    files = sagemaker_job.source_files(ROOT, training(), Weights("a/b", "a/b@c0ffee", "", "s3://b/w/"))
    assert {"fine_tune_model.py", "sagemaker_entry.py", "command_line.py", "llama.py", "tensors.py"} <= files.keys()
    assert "compare_base_vs_finetuned.py" not in files and len(aws.archive(files)) < 300_000
    job = json.loads(files["arguments.json"])
    assert job["arguments"] == ["--task", "sentiment", "--epochs", "3", "--confidence-head"]
    assert (job["model"], job["sources"], job["staged"]) == (
        "default",
        {"train": "a.csv"},
        "models--a--b/snapshots/c0ffee",
    )
    assert sagemaker_job.staged_as(Weights("/models/tiny", "0123", "", "s3://b/w/")) == "tiny"


def test_a_job_installs_pins_of_the_requirements_and_never_torch():
    for quantized in (False, True):
        text = sagemaker_job.job_requirements(ROOT / "requirements.txt", {"load_in_4bit": quantized}).decode()
        assert all(re.fullmatch(r"[a-z0-9-]+==[\d.]+", line) for line in text.splitlines())
        names = {line.partition("==")[0] for line in text.splitlines()}
        assert {"transformers", "peft", "safetensors", "scikit-learn", "pydantic"} <= names and "torch" not in names
        assert ("bitsandbytes" in names) == quantized


def test_every_flag_travels_or_is_known_to_stay_at_home():
    known = set(vars(fine_tune_model.parse_arguments([])))
    parser = argparse.ArgumentParser()
    sagemaker_job.add_arguments(parser)
    tables.add_column_arguments(parser)  # the rows go there as they were read here
    own = {"train", "validation", "groups", "task", "model", "adapter", "device", "output_dir", "resume", "overwrite"}
    own |= {"device_map"}  # refused
    assert known == set(vars(parser.parse_args([]))) | own | set(fine_tune_model.TRAVELLING)


def test_rows_and_groups_read_back_as_they_were_whatever_is_in_them(tmp_path):
    texts = ["plain", 'quo"te, comma', "two\nlines", "caf\u00e9 \U0001f600", " spaces ", "=1+1", "\u2028"]
    examples = [Example(f"id {i}", text, "positive") for i, text in enumerate(texts)]
    files = sagemaker_job.row_files(training(training=examples, validation=examples, groups=[str(i) for i in range(7)]))
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    assert list(tables.read_examples(str(tmp_path / "train.jsonl"))) == examples
    assert tables.groups_of(examples, str(tmp_path / "groups.jsonl")) == [str(i) for i in range(7)]


# Before the start


def test_a_dry_run_without_credentials_prints_a_valid_request_and_the_most_it_can_cost(
    few, main, no_credentials, monkeypatch
):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    done = main(*few, "--dry-run", "--hf-token-secret", SECRET)
    assert (done.code, done.err) == (0, "")
    request = json.loads(done.out[done.out.index("\n{") :])
    assert request["Environment"]["HF_TOKEN_SECRET_ARN"] == SECRET
    assert problems("CreateTrainingJob", request) == []
    assert "at most $5.60 = $2.80 an hour x 2 h" in done.out and "nothing on AWS is checked" in done.out
    assert "warning  token" in done.out
    assert "8 to learn from (4 positive, 4 negative), 4 for validation" in done.out


def test_a_failed_check_a_missing_yes_and_a_no_send_nothing(fake, few, main, monkeypatch, tmp_path):
    done = main(*few, "--yes", "--role", "Nobody", "--instance-type", "ml.m5.large", "--hf-token-secret", SECRET)
    assert done.code == 2 and re.search(r"nothing is .*billed: role: .*instance type: .*token: ", done.err)
    done = main(*few)
    assert done.code == 2 and "add --yes" in done.err
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(isatty=lambda: True))
    monkeypatch.setattr("builtins.input", lambda question: "n" if "at most $5.60" in question else "y")
    done = main(*few)
    assert done.code == 2 and "not started, nothing is billed" in done.err
    assert fake.requests == [] and fake.objects() == {} and not (tmp_path / "out").exists()


def test_bad_rows_and_a_folder_in_use_are_told_before_anything_is_asked_of_aws(fake, few, main, tmp_path):
    (tmp_path / "t.csv").write_text("text,label\nx,positive\ny,maybe\n", encoding="utf-8")
    done = main("--sagemaker", "--yes", "--train", tmp_path / "t.csv", "--validation", "data:validation")
    assert done.code == 2 and "maybe" in done.err
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "training_log.jsonl").touch()
    done = main(*few, "--yes", "--resume", folder="used")
    assert done.code == 2 and "used is not empty" in done.err and fake.requests == []


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--spot"], "--spot needs --sagemaker"),
        (["--attach", "a", "--stop", "a"], "give one of them"),
        (["--attach", "a", "--yes"], "--yes needs --sagemaker"),
        (["--region", "us-east-1"], "--region needs --sagemaker"),
        (["--sagemaker", "--hf-token-secret", TOKEN], "the ARN of a secret"),
    ],
)
def test_flags_that_do_not_go_together_are_one_line(main, arguments, words):
    done = main(*arguments, "--limit", "20")
    assert done.code == 2 and words in done.err and done.err.count("\n") == 1


def test_what_is_uploaded_is_what_the_job_names_and_is_not_sent_twice(fake, few, main):
    done = main(*few, "--yes", "--detach", "--seed", "3")
    request = fake.calls("CreateTrainingJob")[-1]
    name = request["TrainingJobName"]
    assert done.code == 0 and f"--attach {name}" in done.out and f"--stop {name}" in done.out
    before = fake.objects()
    packed = before[aws.bucket_and_key(json.loads(request["HyperParameters"]["sagemaker_submit_directory"]))]
    with tarfile.open(fileobj=io.BytesIO(packed)) as tar:
        sent = json.load(tar.extractfile("arguments.json"))
    given = [*map(str, few), "--seed", "3"]
    again, here = (fine_tune_model.parse_arguments(flags) for flags in (sent["arguments"], given))
    for flag in fine_tune_model.TRAVELLING:
        assert getattr(again, flag) == getattr(here, flag)
    bucket, prefix = aws.bucket_and_key(request["InputDataConfig"][0]["DataSource"]["S3DataSource"]["S3Uri"])
    assert len(before[bucket, f"{prefix}train.jsonl"].splitlines()) == 8
    fake.jobs.clear()
    assert main(*few, "--yes", "--detach", "--seed", "3").code == 0 and fake.objects() == before


def test_resume_goes_on_from_the_last_job_of_these_rows_and_flags_once_it_has_ended(fake, few, main):
    flags = [*few, "--seed", "41", "--yes", "--detach"]
    done = main(*flags, "--resume")
    assert done.code == 2 and "there was no job with these rows and flags" in done.err
    assert main(*flags).code == 0
    first = fake.calls("CreateTrainingJob")[-1]
    done = main(*flags, "--resume")
    assert done.code == 2 and f"{first['TrainingJobName']} still runs: --attach it" in done.err
    fake.jobs[first["TrainingJobName"]].end("Stopped", "MaxRuntimeExceeded")
    assert main(*flags, "--resume").code == 0
    again = fake.calls("CreateTrainingJob")[-1]
    assert again["CheckpointConfig"] == first["CheckpointConfig"]
    assert again["TrainingJobName"] != first["TrainingJobName"]


# A job that runs, and its end


def test_stop_ends_a_job_and_says_what_it_cost(fake, main):
    assert "there is no training job no-such-job in us-east-1" in main("--stop", "no-such-job").err
    assert "is no name on AWS" in main("--attach", "a_b").err
    job = start_by_hand(fake)
    job.result["BillableTimeInSeconds"] = 1800
    for _ in range(2):  # again: nothing to do
        done = main("--stop", job.name, "--poll-seconds", "0.01")
        assert done.code == 0 and "billed 1,800 s of ml.g6e.2xlarge: about $1.40 (us-east-1" in done.out


@pytest.mark.parametrize("error", [KeyboardInterrupt, "ExpiredTokenException"])
def test_whoever_leaves_a_job_is_told_that_it_goes_on(fake, main, monkeypatch, error):
    start_by_hand(fake)
    if error is KeyboardInterrupt:
        monkeypatch.setattr(time, "sleep", lambda s: (_ for _ in ()).throw(KeyboardInterrupt))
    else:
        fake.fail("DescribeTrainingJob", error, "The security token included in the request is expired")
    done = main("--attach", JOB.name, folder="o ut")
    assert done.code == (130 if error is KeyboardInterrupt else 2)
    assert f"{JOB.name} goes on and is billed: `python fine_tune_model.py --region us-east-1 --attach" in done.err
    assert "/o ut'` comes back to it" in done.err and f"--stop {JOB.name}` ends it" in done.err


def test_an_adapter_never_lands_on_a_training_that_began_meanwhile(fake, main, monkeypatch, shipped, tmp_path):
    start_by_hand(fake).end("Completed", "Completed")

    def download(account, description, folder):
        folder.mkdir()
        (folder / "training_log.jsonl").write_text("{}\n")  # a local training in the same folder
        return shipped

    monkeypatch.setattr(sagemaker_job, "download_adapter", download)
    done = main("--attach", JOB.name, "--poll-seconds", "0.01")
    assert done.code == 2 and "is not empty" in done.err and str(shipped) in done.err
    assert (tmp_path / "out" / "training_log.jsonl").read_text() == "{}\n"


@pytest.mark.parametrize(
    ("status", "secondary", "reason", "words"),
    [
        ("Failed", "Failed", "CapacityError: Unable to provision", "AWS has none free"),
        ("Failed", "Failed", "AlgorithmError: OutOfMemory: Process killed by SIGKILL", "--micro-batch-size"),
        ("Failed", "Failed", "something new", "failed: something new; log: aws logs tail"),
        ("Stopped", "MaxRuntimeExceeded", "", "it reached --max-runtime; the command that started it goes on"),
        ("Stopped", "MaxWaitTimeExceeded", "", "without --spot"),
    ],
)
def test_a_bad_end_says_why_and_what_next(status, secondary, reason, words):
    account = aws.Account("us-east-1", "123456789012", None)
    description = {"TrainingJobName": "x", "TrainingJobStatus": status, "SecondaryStatus": secondary}
    assert words in sagemaker_job.ended_badly(account, description | ({"FailureReason": reason} if reason else {}))
    assert sagemaker_job.ended_badly(account, description | {"TrainingJobStatus": "Completed"}) is None


def test_the_bill_is_time_by_price_and_names_what_spot_saved():
    account, _ = stubbed()
    description = {"TrainingStartTime": 0, "ResourceConfig": {"InstanceType": "ml.g6e.2xlarge"}}
    spot = {"BillableTimeInSeconds": 900, "TrainingTimeInSeconds": 3600, "EnableManagedSpotTraining": True}
    said = sagemaker_job.billed(account, description | spot)
    assert said == "billed 900 s of ml.g6e.2xlarge: about $0.70 (us-east-1, November 2026), 75% saved by spot"
    assert sagemaker_job.billed(account, {}) == "nothing was billed"
    unknown = {"ResourceConfig": {"InstanceType": "ml.p5.48xlarge"}, "BillableTimeInSeconds": 60}
    assert sagemaker_job.billed(account, unknown) == "billed 60 s of ml.p5.48xlarge"


# The adapter that comes back


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (aws.archive(dict.fromkeys(sagemaker_job.NEEDED[1:], b"1")), "completed without adapter_config.json.*aws logs"),
        (aws.archive({"../evil": b"1"}), "is broken"),
        (b"no archive", "is broken"),
    ],
    ids=["incomplete", "hostile", "broken"],
)
def test_an_incomplete_hostile_or_broken_archive_writes_nothing(tmp_path, content, words):
    s3 = SimpleNamespace(download_file=lambda bucket, key, path: Path(path).write_bytes(content))
    account = aws.Account("us-east-1", "123456789012", None, {"s3": s3})
    description = {"TrainingJobName": "x", "ModelArtifacts": {"S3ModelArtifacts": "s3://bucket/m.tar.gz"}}
    with pytest.raises(ValueError, match=words):
        sagemaker_job.download_adapter(account, description, tmp_path / "in" / "out")
    assert not list(tmp_path.rglob("evil")) and not [p for p in tmp_path.rglob("*") if p.is_file()]


@pytest.fixture
def shipped(tmp_path):
    """A copy of the shipped adapter."""
    return shutil.copytree(ROOT / "fine_tuned_sentiment_model", tmp_path / "shipped")


def test_an_adapter_is_accepted_only_as_it_was_trained_and_on_the_rows_that_were_sent(shipped):
    config = json.loads((shipped / "training_config.json").read_text())
    rows = {name: config[name]["sha256"] for name in ("train", "validation")}
    sagemaker_job.check_trained(shipped, {})
    sagemaker_job.check_trained(shipped, rows)
    with pytest.raises(ValueError, match="trained with other validation rows"):
        sagemaker_job.check_trained(shipped, rows | {"validation": "0"})
    weights = load_file(shipped / "adapter_model.safetensors")
    name = next(iter(weights))
    for spoilt, words in ((weights[name] + 1, "not those that were trained"), (weights[name] * np.nan, "not finite")):
        save_file(weights | {name: spoilt}, shipped / "adapter_model.safetensors", {"format": "pt"})
        with pytest.raises(ValueError, match=words):
            sagemaker_job.check_trained(shipped, rows)
    (shipped / "adapter_model.safetensors").write_bytes(b"torn")
    with pytest.raises(ValueError, match="is broken"):
        sagemaker_job.check_trained(shipped, rows)
