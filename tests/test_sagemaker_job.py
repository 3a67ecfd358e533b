"""sagemaker_job.py and fine_tune_model.py --sagemaker: bodies, archive, checks, costs and errors, without a container.

Requests go to the strict stand-in of fake_sagemaker.py. Whole jobs run in test_sagemaker.py.
"""

import argparse
import ast
import io
import json
import os
import re
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
from fake_sagemaker import Fake, check_request
from safetensors.numpy import load_file, save_file

import command_line
import fine_tune_model
import sagemaker_job
from sagemaker_job import Aws, AwsError, Check, TrainingJob

ROOT = Path(__file__).parent.parent
TOKEN = "hf_" + "DoNotShowThisTokenAnywhere" + "12345678"
SECRET = "arn:aws:secretsmanager:us-east-1:123456789012:secret:hf-Ab12"
FEW = ["--sagemaker", "--limit", "20", "--validation-limit", "8"]


@pytest.fixture(scope="module")
def stand():
    with Fake() as fake:
        yield fake


@pytest.fixture
def fake(stand, monkeypatch):
    """The stand as it was at first, for commands run in this process."""
    for name, value in stand.env.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    before = dict(stand.quotas), dict(stand.prices)
    yield stand
    stand.quotas, stand.prices = before
    stand.images, stand.plan, stand.page_size = None, {}, 100
    stand._injected.clear()
    stand.jobs.clear()
    for role in stand.client("iam").list_roles()["Roles"]:
        stand.client("iam").delete_role(RoleName=role["RoleName"])


@pytest.fixture
def aws(fake):
    return sagemaker_job.connect()


def job(**more):
    known = {
        "name": "calibrated-confidence-20261126-101500-7f3a",
        "role": "arn:aws:iam::123456789012:role/SageMakerExecutionRole",
        "image": sagemaker_job.image_uri("us-east-1", sagemaker_job.TRAINING_IMAGE),
        "instance_type": "ml.g6e.2xlarge",
        "region": "us-east-1",
        "source": "s3://sagemaker-us-east-1-123456789012/calibrated-confidence/source/7f3a/sourcedir.tar.gz",
        "data": "s3://sagemaker-us-east-1-123456789012/calibrated-confidence/data/7f3a/",
        "output": "s3://sagemaker-us-east-1-123456789012/calibrated-confidence/output",
        "checkpoints": "s3://sagemaker-us-east-1-123456789012/calibrated-confidence/checkpoints/7f3a/one",
        "max_runtime_s": 7200,
    }
    return TrainingJob(**known | more)


def flags(*given):
    return fine_tune_model.parse_arguments(["--sagemaker", *given])


def main(*arguments):
    """The command in this process: (exit code, stdout and stderr are the caller's capsys)."""
    try:
        fine_tune_model.main(list(arguments))
    except SystemExit as end:
        return end.code
    except (ValueError, OSError) as error:  # as command_line.run does
        print("error: " + " ".join(str(error).split()), file=sys.stderr)
        return 2
    return 0


# Request bodies


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"spot": True, "max_runtime_s": 60},
        {"weights": "s3://bucket-sagemaker/weights/a-1/"},
        {"environment": {"HF_TOKEN_SECRET_ARN": SECRET}},
        {"instance_type": "ml.p5.48xlarge", "max_runtime_s": 28 * 86400},
    ],
)
def test_the_request_of_a_job_satisfies_the_service_s_own_model(more):
    request = sagemaker_job.training_request(job(**more))
    check_request("sagemaker", "CreateTrainingJob", request)
    assert ("EnableManagedSpotTraining" in request) == bool(more.get("spot"))
    channels = [channel["ChannelName"] for channel in request["InputDataConfig"]]
    assert channels == ["training"] + ["model"] * ("weights" in more)
    for key, value in request["HyperParameters"].items():  # older toolkits put them into a shell line
        assert key.startswith("sagemaker_") and re.fullmatch(r'"?[A-Za-z0-9._/:,=-]+"?', value) and len(value) <= 256
        json.loads(value)


def test_a_spot_job_may_wait_longer_than_it_may_run():
    stopping = sagemaker_job.training_request(job(spot=True))["StoppingCondition"]
    assert stopping["MaxWaitTimeInSeconds"] > stopping["MaxRuntimeInSeconds"] == 7200


def test_the_strict_check_refuses_what_boto3_alone_would_send():
    for wrong in ({"name": "a_b"}, {"instance_type": "ml.banana"}, {"role": "x" * 30}):
        with pytest.raises(Exception, match="validation error"):
            check_request("sagemaker", "CreateTrainingJob", sagemaker_job.training_request(job(**wrong)))


def test_image_addresses_follow_the_region():
    image = ("djl-inference", "1")
    assert sagemaker_job.image_uri("eu-west-1", image) == "763104351884.dkr.ecr.eu-west-1.amazonaws.com/djl-inference:1"
    china = sagemaker_job.image_uri("cn-north-1", image)
    assert china == "727897471807.dkr.ecr.cn-north-1.amazonaws.com.cn/djl-inference:1"
    assert sagemaker_job.REGISTRY["af-south-1"] == "626614931356"


def test_the_metrics_read_the_lines_that_training_prints():
    shown = {"log_loss": 0.3921, "accuracy": 0.85, "ece": 0.031, "ece_floor": 0.045, "mean_confidence": 0.842}
    line = f"{25:5} of {376:<5}{0.512:10.3f}" + fine_tune_model.VALIDATION_ROW.format(**shown, label_mass=0.99)
    first = f"{0:5} of {376:<5}{' ' * 10}" + fine_tune_model.VALIDATION_ROW.format(**shown, label_mass=0.99)
    found = {m["Name"]: re.search(m["Regex"], line)[1] for m in sagemaker_job.METRICS}
    assert found == {
        "train:loss": "0.512",
        "validation:log_loss": "0.3921",
        "validation:accuracy": "0.850",
        "validation:ece": "0.031",
    }
    assert not re.search(sagemaker_job.METRICS[0]["Regex"], first)  # which has no training loss yet


def test_redaction_hides_tokens_wherever_they_are_and_leaves_arns_and_tags():
    request = sagemaker_job.training_request(
        job(environment={"HF_TOKEN": "plain", "API_KEY": "x", "NOTE": f"see {TOKEN}", "HF_TOKEN_SECRET_ARN": SECRET})
    )
    shown = sagemaker_job.redacted(request)
    environment = shown.pop("Environment")
    assert environment == {
        "TOKENIZERS_PARALLELISM": "false",
        "HF_TOKEN": "[redacted]",
        "API_KEY": "[redacted]",
        "NOTE": "see [redacted]",
        "HF_TOKEN_SECRET_ARN": SECRET,
    }
    assert shown == {key: value for key, value in request.items() if key != "Environment"}


# The source archive


def test_an_archive_is_the_same_bytes_for_the_same_files_and_opens_flat(monkeypatch):
    files = {"b.py": b"2", "a.py": b"1" * 1000}
    packed = sagemaker_job.archive(files)
    monkeypatch.setattr(time, "time", lambda: 1e9)
    assert (
        sagemaker_job.archive(dict(reversed(files.items()))) == packed != sagemaker_job.archive(files | {"b.py": b"3"})
    )
    with tarfile.open(fileobj=io.BytesIO(packed)) as tar:
        assert {m.name: tar.extractfile(m).read() for m in tar} == files
        assert {(m.mode, m.uid, m.mtime, m.uname) for m in tar} == {(0o644, 0, 0, "")}


def test_the_archive_takes_every_module_that_training_imports_and_stays_small():
    names, todo = set(), ["fine_tune_model"]
    while todo:
        path = ROOT / f"{todo.pop()}.py"
        names.add(path.name)
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            imported = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            imported += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            todo += [name for name in imported if (ROOT / f"{name}.py").is_file() and f"{name}.py" not in names]
    assert names | {"scripts/sagemaker_entry.py"} == set(sagemaker_job.SOURCES)
    files = sagemaker_job.source_files(ROOT, {"arguments": []}, False)
    assert set(files) == {*names, "sagemaker_entry.py", "requirements.txt", "arguments.json"}
    assert len(sagemaker_job.archive(files)) < 200_000


@pytest.mark.parametrize("quantized", [False, True])
def test_a_job_installs_pins_of_the_requirements_and_never_torch(quantized):
    text = sagemaker_job.source_files(ROOT, {}, quantized)["requirements.txt"].decode()
    ours = (ROOT / "requirements.txt").read_text(encoding="utf-8")
    assert all(re.fullmatch(r"[a-z0-9-]+==[\d.]+", line) and line in ours for line in text.splitlines())
    names = {line.partition("==")[0] for line in text.splitlines()}
    assert {"transformers", "peft", "safetensors", "scikit-learn"} <= names and "torch" not in names
    assert ("bitsandbytes" in names) == quantized


def test_every_flag_travels_or_is_known_to_stay_at_home(monkeypatch):
    known = vars(fine_tune_model.parse_arguments([]))
    parser = argparse.ArgumentParser()
    sagemaker_job.add_arguments(parser)
    cloud = set(vars(parser.parse_args([])))
    rows = {
        "train",
        "validation",
        "groups",
        "text_column",
        "label_column",
        "id_column",
        "no_header",
        "label_map",
        "limit",
    }
    own = {"limit", "task", "model", "adapter", "device", "output_dir", "resume", "overwrite"}
    assert set(known) == set(fine_tune_model.TRAVELLING) | cloud | rows | own


# Checks before the start


def look(fake, capsys, *arguments):
    """The table of a dry run: {subject: (status, detail)}."""
    assert main(*FEW, "--dry-run", *arguments) == 0
    out = capsys.readouterr().out
    found = re.findall(r"^  (ok|warning|failed) +(\S+(?: \S+)?)  +(.*)$", out, re.M)
    assert len(found) >= 9, out
    return {subject: (status, detail) for status, subject, detail in found}


def test_with_everything_in_order_all_checks_are_ok(fake, capsys):
    fake.role("One")
    fake.bucket("my-sagemaker-bucket")
    seen = look(fake, capsys, "--bucket", "my-sagemaker-bucket")
    assert {status for status, _ in seen.values()} == {"ok"}, seen
    assert "$5.60 = $2.80 an hour x 2 h (the AWS price list, us-east-1)" in seen["cost"][1]
    assert "20 to learn from" in seen["rows"][1]


def test_the_quota_is_found_by_its_name_own_value_first_and_counts_what_runs(fake, capsys):
    fake.role("One")
    fake.page_size = 2  # it stands on a later page
    fake.quotas |= {f"another {i}": 5.0 for i in range(7)}
    assert look(fake, capsys)["quota"] == ("ok", "1 ml.g6e.2xlarge for training job usage, 0 in use")
    del fake.quotas["ml.g6e.2xlarge for spot training job usage"]  # never changed: AWS's default, 0, holds
    status, detail = look(fake, capsys, "--spot")["quota"]
    assert status == "failed" and "request-service-quota-increase" in detail and "--quota-code L-29512C0F" in detail
    assert look(fake, capsys, "--instance-type", "ml.g5.xlarge")["quota"][0] == "warning"  # AWS lists none
    fake.client("sagemaker").create_training_job(**sagemaker_job.training_request(job()))
    status, detail = look(fake, capsys)["quota"]
    assert status == "failed" and "is 1, 1 in use" in detail and "--desired-value 2" in detail


@pytest.mark.parametrize(
    ("roles", "given", "status", "words"),
    [
        ({}, None, "failed", "no role lets SageMaker"),
        ({"A": "sagemaker.amazonaws.com", "B": "lambda.amazonaws.com"}, None, "ok", "role/A, trusts SageMaker"),
        ({"A": "sagemaker.amazonaws.com", "B": "sagemaker.amazonaws.com"}, None, "failed", "(A, B); choose one"),
        ({"B": "lambda.amazonaws.com"}, "B", "failed", "does not let SageMaker use it"),
        ({"A": "sagemaker.amazonaws.com"}, "arn:aws:iam::123456789012:role/A", "ok", "trusts"),
        ({"A": "sagemaker.amazonaws.com"}, "Nobody", "failed", "Nobody"),
    ],
)
def test_the_role_is_the_one_given_or_the_only_one_that_fits(fake, aws, roles, given, status, words):
    for name, service in roles.items():
        fake.role(name, trusts=service)
    arn, found = sagemaker_job.find_role(aws, given)
    assert found.status == status and words in found.detail
    assert status == "failed" or arn == "arn:aws:iam::123456789012:role/A"


def test_a_role_of_aws_s_own_services_is_not_taken(fake, aws):
    policy = {"Effect": "Allow", "Principal": {"Service": "sagemaker.amazonaws.com"}, "Action": "sts:AssumeRole"}
    made = {"AssumeRolePolicyDocument": json.dumps({"Version": "2012-10-17", "Statement": policy})}
    fake.client("iam").create_role(RoleName="Ours", **made)  # a statement that is not in a list, as some tools write it
    fake.client("iam").create_role(RoleName="Notebooks", Path="/aws-service-role/sagemaker.amazonaws.com/", **made)
    assert sagemaker_job.find_role(aws, None)[1].detail.startswith("arn:aws:iam::123456789012:role/Ours, trusts")


def test_a_bucket_must_be_there_here_and_ours(fake, aws):
    fake.bucket("sagemaker-elsewhere", region="eu-west-1")
    fake.bucket("plain-name")
    check = sagemaker_job.check_bucket
    assert check(aws, "sagemaker-elsewhere", False).detail.startswith("sagemaker-elsewhere is in eu-west-1")
    assert check(aws, "plain-name", False)[0] == "warning"
    assert "aws s3 mb s3://no-such-sagemaker" in check(aws, "no-such-sagemaker", False).detail
    assert check(aws, "no-such-sagemaker", False).status == "failed"
    assert check(aws, "sagemaker-us-east-1-123456789012", True).status == "warning"  # it will be made
    fake.fail("HeadBucket", "403", "Forbidden", status=403)
    assert check(aws, "plain-name", False).status == "warning"  # nobody may look; said so


@pytest.mark.parametrize(
    "operation", ["GetRole", "DescribeImages", "ListServiceQuotas", "GetProducts", "DescribeSecret"]
)
def test_what_may_not_be_looked_at_is_a_warning_not_a_failure(fake, capsys, operation):
    fake.role("One")
    fake.client("secretsmanager").create_secret(Name="hf-1", SecretString=TOKEN)
    fake.fail(operation, "AccessDeniedException", "User is not authorized to perform this", times=9)
    arn = fake.client("secretsmanager").list_secrets()["SecretList"][0]["ARN"]
    role = "arn:aws:iam::123456789012:role/One"
    seen = look(fake, capsys, "--role", role, "--hf-token-secret", arn)
    assert "failed" not in {status for status, _ in seen.values()}, seen
    if operation == "GetProducts":
        assert "table of November 2026" in seen["cost"][1]
    else:
        assert any("you may not" in detail for status, detail in seen.values() if status == "warning")
    fake.client("secretsmanager").delete_secret(SecretId=arn, ForceDeleteWithoutRecovery=True)


def test_an_image_a_secret_and_staged_weights_that_are_not_there_fail(fake, aws, capsys):
    fake.role("One")
    fake.images = set()
    fake.bucket("sagemaker-staged")
    arguments = ["--hf-token-secret", SECRET, "--weights", "s3://sagemaker-staged/w"]
    seen = look(fake, capsys, *arguments)
    assert {name for name, (status, _) in seen.items() if status == "failed"} == {"image", "token", "weights"}
    assert "--image names another" in seen["image"][1]
    fake.client("s3").put_object(Bucket="sagemaker-staged", Key="w/x/model.safetensors", Body=b"1")
    assert look(fake, capsys, *arguments)["weights"] == ("ok", "staged in s3://sagemaker-staged/w/")


@pytest.mark.parametrize(
    ("name", "words"), [("ml.g6e.2xlage", "no ml.g6e.2xlage"), ("ml.m5.large", "has no NVIDIA GPU")]
)
def test_an_instance_type_must_exist_and_have_a_gpu(name, words):
    found = sagemaker_job.check_instance(name)
    assert found.status == "failed" and words in found.detail and "ml.g6e" in found.detail


def test_a_gated_model_needs_staged_weights_or_a_secret(monkeypatch):
    import huggingface_hub

    class Info:
        gated, private = "manual", False

    monkeypatch.setattr(huggingface_hub, "model_info", lambda model, timeout: Info)
    without, with_token = (sagemaker_job.check_hub("meta-llama/x", token) for token in (False, True))
    assert without.status == "failed" and "--weights upload" in without.detail and "--hf-token-secret" in without.detail
    assert with_token.status == "ok"
    monkeypatch.setattr(Info, "gated", False)
    assert sagemaker_job.check_hub("me/public", False).status == "ok"
    monkeypatch.setattr(Info, "private", True)  # which your login can see, and the container cannot
    assert sagemaker_job.check_hub("me/private", False).status == "failed"
    monkeypatch.undo()
    assert sagemaker_job.check_hub("meta-llama/x", False).status == "warning"  # no network here


# What a start does, and does not


def test_a_dry_run_without_credentials_prints_a_valid_redacted_request_and_the_most_it_can_cost(run, tmp_path):
    env = {"AWS_EC2_METADATA_DISABLED": "true", "HF_TOKEN": TOKEN, "AWS_CONFIG_FILE": "/nonexistent"}
    env |= {"AWS_SHARED_CREDENTIALS_FILE": "/nonexistent", "HOME": str(tmp_path)}
    done = run("fine_tune_model.py", *FEW, "--dry-run", "--unsafe-pass-hf-token-in-env", env=env)
    assert (done.returncode, done.stderr) == (0, "")
    request = json.loads(done.stdout[done.stdout.index("\n{") :])
    assert request["Environment"]["HF_TOKEN"] == "[redacted]" and TOKEN not in done.stdout
    check_request("sagemaker", "CreateTrainingJob", request)
    assert (
        "at most $5.60" in done.stdout
        and "warning  token" in done.stdout
        and "nothing on AWS is checked" in done.stdout
    )


def test_a_failed_check_a_missing_yes_and_a_refusal_send_nothing_but_questions(fake, capsys, monkeypatch, tmp_path):
    asked, before = ["--output-dir", str(tmp_path / "out")], len(fake.requests)
    assert main(*FEW, "--yes", *asked) == 2  # no role
    assert "not started, nothing is billed: role failed" in capsys.readouterr().err
    fake.role("One")
    assert main(*FEW, *asked) == 2
    assert "add --yes" in capsys.readouterr().err
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    monkeypatch.setattr("builtins.input", lambda question: "n" if "at most $5.60" in question else "y")
    assert main(*FEW, *asked) == 2
    assert "not started, nothing is billed" in capsys.readouterr().err
    sent = {recorded.operation for recorded in fake.requests[before:]}
    assert not sent & {"CreateTrainingJob", "PutObject", "CreateBucket"} and not (tmp_path / "out").exists()


def test_what_is_uploaded_is_what_the_job_names_and_is_not_sent_twice(fake, capsys, tmp_path):
    fake.role("One")
    arguments = [*FEW, "--yes", "--detach", "--output-dir", str(tmp_path / "out")]
    assert main(*arguments) == 0
    out = capsys.readouterr().out
    request = fake.calls("CreateTrainingJob")[-1]
    assert request["TrainingJobName"] in out and "--attach" in out and "--stop" in out
    bucket, key = sagemaker_job.split(json.loads(request["HyperParameters"]["sagemaker_submit_directory"]))
    packed = fake.client("s3").get_object(Bucket=bucket, Key=key)["Body"].read()
    with tarfile.open(fileobj=io.BytesIO(packed)) as tar:
        sent = json.load(tar.extractfile("arguments.json"))
    assert (sent["train"], sent["base_model"], sent["weights"]) == ("data:train", "default", "")
    again = fine_tune_model.parse_arguments(sent["arguments"])
    here = fine_tune_model.parse_arguments(arguments)
    assert {name: getattr(again, name) for name in fine_tune_model.TRAVELLING} == {
        name: getattr(here, name) for name in fine_tune_model.TRAVELLING
    }
    bucket, prefix = sagemaker_job.split(request["InputDataConfig"][0]["DataSource"]["S3DataSource"]["S3Uri"])
    rows = fake.client("s3").get_object(Bucket=bucket, Key=f"{prefix}train.jsonl")["Body"].read().splitlines()
    assert len(rows) == 20 and set(json.loads(rows[0])) == {"id", "text", "label"}
    fake.jobs.clear()
    puts = [r for r in fake.requests if r.operation == "PutObject"]
    assert main(*arguments) == 0
    assert [r for r in fake.requests if r.operation == "PutObject"] == puts


def test_rows_read_back_as_they_were_whatever_is_in_them(tmp_path):
    from task import Example, read_examples

    texts = ["plain", 'quo"te, comma', "two\nlines", "caf\u00e9 \U0001f600", " spaces ", "=1+1", "\u2028"]
    examples = [Example(f"id {i}", text, "positive") for i, text in enumerate(texts)]
    (tmp_path / "rows.jsonl").write_bytes(fine_tune_model.as_lines(examples))
    assert list(read_examples(str(tmp_path / "rows.jsonl"))) == examples


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--spot"], "--spot needs --sagemaker"),
        (["--dry-run"], "--dry-run needs --sagemaker"),
        (["--attach", "a", "--stop", "a"], "give one of them"),
        (["--sagemaker", "--attach", "a"], "give one of them"),
        (["--attach", "a", "--yes"], "--yes needs --sagemaker"),
        (["--sagemaker", "--max-runtime", "5 minutes"], "--max-runtime"),
        (["--sagemaker", "--max-runtime", "1s"], "--max-runtime"),
        (["--sagemaker", "--weights", "here"], "auto, upload, or an s3:// address"),
        (["--sagemaker", "--hf-token-secret", TOKEN], "the ARN of a secret"),
        (["--sagemaker", "--hf-token-secret", SECRET, "--unsafe-pass-hf-token-in-env"], "needless"),
        (["--sagemaker", "--device", "cpu"], "--device is for training here"),
        (["--sagemaker", "--poll-seconds", "0"], "--poll-seconds"),
    ],
)
def test_flags_that_do_not_go_together_are_one_line(capsys, arguments, words):
    assert main(*arguments) == 2
    err = capsys.readouterr().err
    assert words in err and err.count("\n") == 1 and TOKEN not in err


@pytest.mark.parametrize(
    ("region", "words"), [("mars-east-1", "no images are known for region 'mars-east-1'"), (None, "no AWS region")]
)
def test_an_unknown_or_missing_region_is_one_line(fake, capsys, monkeypatch, region, words):
    monkeypatch.delenv("AWS_DEFAULT_REGION")
    assert main(*FEW, *(["--region", region] if region else [])) == 2
    assert words in capsys.readouterr().err


def test_bad_rows_and_a_folder_in_use_are_told_before_anything_is_asked_of_aws(fake, capsys, tmp_path):
    (tmp_path / "t.csv").write_text("text,label\nx,positive\ny,maybe\n", encoding="utf-8")
    before = len(fake.calls("CreateTrainingJob"))
    assert main("--sagemaker", "--yes", "--train", str(tmp_path / "t.csv"), "--validation", "data:validation") == 2
    assert "maybe" in capsys.readouterr().err
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "mine.txt").touch()
    assert main(*FEW, "--yes", "--output-dir", str(tmp_path / "used")) == 2
    assert "holds other files" in capsys.readouterr().err
    assert len(fake.calls("CreateTrainingJob")) == before


@pytest.mark.parametrize(
    ("operation", "code", "words"),
    [
        ("GetCallerIdentity", "ExpiredToken", "sign in again"),
        ("GetCallerIdentity", "InvalidClientTokenId", "does not know these credentials"),
        ("CreateTrainingJob", "ResourceLimitExceeded", "ask for more"),
        ("CreateTrainingJob", "AccessDeniedException", "you may not"),
        ("CreateTrainingJob", "ThrottlingException", "repeat the command in a minute"),
        ("PutObject", "AccessDenied", "cannot upload s3://"),
        ("CreateBucket", "BucketAlreadyExists", "cannot make the bucket"),
    ],
)
def test_a_refusal_of_aws_is_one_line_that_says_what_to_do(fake, capsys, monkeypatch, tmp_path, operation, code, words):
    monkeypatch.setattr(time, "sleep", lambda s: None)  # boto3's own retries
    fake.role("One")
    if operation == "CreateBucket":
        fake.fail("HeadBucket", "404", "Not Found", times=2, status=404)
    fake.fail(operation, code, "The service says why.", times=9)
    flags = [*FEW, "--seed", str(time.monotonic_ns() % 10**6)]  # so that the archive is not there yet
    assert main(*flags, "--yes", "--output-dir", str(tmp_path / "out")) == 2
    err = capsys.readouterr().err
    assert words in err and err.count("\n") == 1 and fake.left_behind() == []


def test_a_start_whose_answer_was_lost_is_no_failure_and_one_that_may_be_is_named(fake, capsys, monkeypatch, tmp_path):
    fake.role("One")
    monkeypatch.setattr(time, "sleep", lambda s: None)
    monkeypatch.setattr(sagemaker_job, "job_name", lambda: job().name)
    fake.client("sagemaker").create_training_job(**sagemaker_job.training_request(job(instance_type="ml.g5.2xlarge")))
    flags = [*FEW, "--yes", "--detach", "--output-dir", str(tmp_path / "out")]
    assert main(*flags) == 0 and f"--attach {job().name}" in capsys.readouterr().out
    fake.fail("CreateTrainingJob", "ServiceUnavailable", "Try again", times=9, status=503)
    assert main(*flags) == 2
    assert f"if it started all the same, --stop {job().name} ends it" in capsys.readouterr().err


def test_ctrl_c_while_a_job_is_being_started_names_it(fake, capsys, monkeypatch, aws):
    class Interrupted:
        def create_training_job(self, **_):
            raise KeyboardInterrupt

    monkeypatch.setattr(Aws, "client", lambda *_: Interrupted())
    with pytest.raises(SystemExit) as end:
        sagemaker_job.start(aws, job())
    assert end.value.code == 130 and f"--stop {job().name} ends it" in capsys.readouterr().err


def test_another_s_default_bucket_is_never_written_to(fake, capsys, tmp_path):
    fake.role("One")
    fake.fail("HeadBucket", "403", "Forbidden", times=9, status=403)
    assert main(*FEW, "--yes", "--output-dir", str(tmp_path / "out")) == 2
    out, err = capsys.readouterr()
    assert "it may be somebody else's" in out and "cannot see the bucket" in err and not fake.jobs


# Following


def test_attach_and_stop_of_a_job_that_is_not_there_say_so(fake, capsys, tmp_path):
    for way in ("--attach", "--stop"):
        assert main(way, "no-such-job", "--output-dir", str(tmp_path / "out")) == 2
        assert "there is no training job no-such-job in us-east-1" in capsys.readouterr().err
        assert main(way, "a_b", "--output-dir", str(tmp_path / "out")) == 2
        assert "is no name of a training job" in capsys.readouterr().err


def test_stop_ends_a_job_and_says_what_it_cost(fake, capsys, tmp_path):
    fake.client("sagemaker").create_training_job(**sagemaker_job.training_request(job()))
    assert main("--stop", job().name, "--poll-seconds", "0.01") == 0
    assert "billed 1 s of ml.g6e.2xlarge" in capsys.readouterr().out and fake.jobs[job().name].status == "Stopped"
    assert main("--stop", job().name, "--poll-seconds", "0.01") == 0  # again: nothing to do


def test_ctrl_c_leaves_the_job_running_and_says_how_to_come_back(fake, tmp_path):
    fake.client("sagemaker").create_training_job(**sagemaker_job.training_request(job()))
    fake.jobs[job().name].left, seen = 10**6, len(fake.calls("DescribeTrainingJob"))
    command = [sys.executable, "fine_tune_model.py", "--attach", job().name, "--output-dir", str(tmp_path / "out")]
    process = subprocess.Popen(
        [*command, "--poll-seconds", "0.05"], cwd=ROOT, env={**fake.env, "PATH": ""}, stderr=subprocess.PIPE, text=True
    )
    while len(fake.calls("DescribeTrainingJob")) < seen + 3:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 130 and "Traceback" not in err
    assert f"{job().name} goes on and is billed" in err and "--attach" in err and "--stop" in err
    assert fake.jobs[job().name].status == "InProgress"


def test_expired_credentials_while_following_name_the_job_that_goes_on(fake, capsys, tmp_path):
    fake.client("sagemaker").create_training_job(**sagemaker_job.training_request(job()))
    fake.fail("DescribeTrainingJob", "ExpiredTokenException", "The security token included in the request is expired")
    assert main("--attach", job().name, "--output-dir", str(tmp_path / "out")) == 2
    err = capsys.readouterr().err
    assert "sign in again" in err and f"{job().name} goes on and is billed" in err and err.count("\n") == 1


def test_throttling_is_waited_out(fake, aws, capsys, monkeypatch):
    monkeypatch.setattr(time, "sleep", lambda s: None)
    fake.client("sagemaker").create_training_job(**sagemaker_job.training_request(job()))
    fake.fail("DescribeTrainingJob", "ThrottlingException", "Rate exceeded", times=7)
    assert sagemaker_job.follow(aws, job().name, 0.01)["TrainingJobStatus"] == "Completed"
    assert "still trying" in capsys.readouterr().err


def test_a_completed_job_without_an_adapter_is_an_error_that_names_the_log(fake, capsys, tmp_path):
    fake.role("One")
    assert main(*FEW, "--yes", "--poll-seconds", "0.01", "--output-dir", str(tmp_path / "out")) == 2  # nothing ran
    err = capsys.readouterr().err
    assert "cannot download s3://" in err and err.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == []


LINE = "the training job x failed: "


@pytest.mark.parametrize(
    ("status", "secondary", "reason", "words"),
    [
        ("Failed", "Failed", "CapacityError: Unable to provision requested ML compute capacity.", "AWS has none free"),
        ("Failed", "Failed", "AlgorithmError: error: meta-llama/x is gated: ask for access", "--weights upload"),
        (
            "Failed",
            "Failed",
            "AlgorithmError: OutOfMemory: Process killed by SIGKILL, exit code: 137",
            "--micro-batch-size",
        ),
        ("Failed", "Failed", "ClientError: OSError: No space left on device", "larger --instance-type"),
        ("Failed", "Failed", "ERROR: Could not find a version that satisfies the requirement x", "PyPI"),
        ("Failed", "Failed", "something new", "something new; log: aws logs tail"),
        ("Stopped", "MaxRuntimeExceeded", "", "it reached --max-runtime; the command that started it goes on"),
        ("Stopped", "MaxWaitTimeExceeded", "", "without --spot"),
        ("Stopped", "Stopped", "", "it was stopped"),
    ],
)
def test_a_bad_end_says_why_and_what_next(aws, status, secondary, reason, words):
    description = {"TrainingJobName": "x", "TrainingJobStatus": status, "SecondaryStatus": secondary}
    said = sagemaker_job.ended_badly(aws, description | ({"FailureReason": reason} if reason else {}))
    assert words in said and "\n" not in said
    assert sagemaker_job.ended_badly(aws, description | {"TrainingJobStatus": "Completed"}) is None


def test_the_bill_is_time_by_price_and_names_what_spot_saved(fake, aws):
    description = {"TrainingStartTime": 0, "ResourceConfig": {"InstanceType": "ml.g6e.2xlarge"}}
    assert sagemaker_job.billed(aws, description | {"BillableTimeInSeconds": 1800}).startswith(
        "billed 1,800 s of ml.g6e.2xlarge: about $1.40 (the AWS price list, us-east-1)"
    )
    spot = {"BillableTimeInSeconds": 900, "TrainingTimeInSeconds": 3600, "EnableManagedSpotTraining": True}
    assert sagemaker_job.billed(aws, description | spot).endswith("75% saved by spot")
    fake.prices.clear()
    unknown = {"ResourceConfig": {"InstanceType": "ml.p5.48xlarge"}, "BillableTimeInSeconds": 60}
    assert "an unknown sum" in sagemaker_job.billed(aws, unknown)
    assert sagemaker_job.price(aws, "ml.g5.2xlarge", "Training") == (1.515, "a table of November 2026 for us-east-1")


@pytest.mark.parametrize(("text", "value"), [("7200", 7200), ("90m", 5400), ("1.5h", 5400), ("2h", 7200), ("60s", 60)])
def test_durations(text, value):
    assert sagemaker_job.seconds(text) == value


# The adapter that comes back


def packed_job(fake, files, name="x"):
    """A description of a completed job whose model.tar.gz holds these (name, bytes)."""
    if "sagemaker-results" not in [b["Name"] for b in fake.client("s3").list_buckets()["Buckets"]]:
        fake.bucket("sagemaker-results")
    body = io.BytesIO()
    with tarfile.open(fileobj=body, mode="w:gz") as tar:
        for one, content in files:
            entry = tarfile.TarInfo(one)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    fake.client("s3").put_object(Bucket="sagemaker-results", Key="m.tar.gz", Body=body.getvalue())
    return {"TrainingJobName": name, "ModelArtifacts": {"S3ModelArtifacts": "s3://sagemaker-results/m.tar.gz"}}


def test_a_download_is_unpacked_beside_the_folder_and_what_is_missing_is_named(fake, aws, tmp_path):
    part = sagemaker_job.download(aws, packed_job(fake, [("a", b"1"), ("b", b"2")]), tmp_path / "out", ["a", "b"])
    assert {path.name: path.read_bytes() for path in part.iterdir()} == {"a": b"1", "b": b"2"}
    with pytest.raises(ValueError, match=r"completed without c, so there is no adapter .*aws logs tail"):
        sagemaker_job.download(aws, packed_job(fake, [("a", b"1")]), tmp_path / "out", ["a", "c"])
    assert list(tmp_path.iterdir()) == []


def test_a_hostile_or_broken_archive_writes_nothing_outside(fake, aws, tmp_path):
    with pytest.raises(ValueError, match="is broken"):
        sagemaker_job.download(aws, packed_job(fake, [("../evil", b"1")]), tmp_path / "in" / "out", [])
    description = packed_job(fake, [])
    fake.client("s3").put_object(Bucket="sagemaker-results", Key="m.tar.gz", Body=b"no archive")
    with pytest.raises(ValueError, match="is broken"):
        sagemaker_job.download(aws, description, tmp_path / "in" / "out", [])
    assert not list(tmp_path.rglob("evil")) and not [p for p in tmp_path.rglob("*") if p.is_file()]


@pytest.fixture
def tuned(tmp_path):
    """A copy of the shipped adapter."""
    folder = tmp_path / "tuned"
    folder.mkdir()
    for path in (ROOT / "fine_tuned_sentiment_model").iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


def test_an_adapter_is_accepted_only_as_it_was_trained_and_on_the_rows_that_were_sent(tuned):
    config = json.loads((tuned / "training_config.json").read_text())
    rows = {name: config[name]["sha256"] for name in ("train", "validation")}
    fine_tune_model.accept(tuned, {})
    fine_tune_model.accept(tuned, rows)
    with pytest.raises(ValueError, match="trained with other validation rows"):
        fine_tune_model.accept(tuned, rows | {"validation": "0"})
    weights = load_file(tuned / "adapter_model.safetensors")
    name = next(iter(weights))
    for spoilt, words in ((weights[name] + 1, "not those that were trained"), (weights[name] * np.nan, "not finite")):
        save_file(weights | {name: spoilt}, tuned / "adapter_model.safetensors", {"format": "pt"})
        with pytest.raises(ValueError, match=words):
            fine_tune_model.accept(tuned, rows)
    (tuned / "adapter_model.safetensors").write_bytes(b"torn")
    with pytest.raises(ValueError, match="is broken"):
        fine_tune_model.accept(tuned, rows)
    (tuned / "training_config.json").write_text("{")
    with pytest.raises(ValueError, match="is broken"):
        fine_tune_model.accept(tuned, rows)


def test_the_probes_of_the_shipped_adapter_are_its_answers(tuned):
    classifier = fine_tune_model.FineTunedSentimentClassifier(tuned, device="cpu")
    probes = json.loads((tuned / "training_config.json").read_text())["probes"]
    assert [probe["text"] for probe in probes] == list(fine_tune_model.PROBES)
    for probe in probes:
        found = classifier.classify_single(probe["text"])
        assert found["probabilities"] == pytest.approx(probe["probabilities"], abs=1e-5)
        assert found["label_mass"] == pytest.approx(probe["label_mass"], abs=1e-5)


def test_resume_is_refused_while_the_earlier_job_still_writes_its_checkpoint(fake, capsys, tmp_path):
    fake.role("One")
    flags = [*FEW, "--seed", "41", "--yes", "--detach", "--output-dir", str(tmp_path / "out")]
    assert main(*flags, "--resume") == 2 and "no checkpoint of a job" in capsys.readouterr().err
    assert main(*flags) == 0
    first = fake.calls("CreateTrainingJob")[-1]
    bucket, key = sagemaker_job.split(first["CheckpointConfig"]["S3Uri"])
    fake.client("s3").put_object(Bucket=bucket, Key=f"{key}/fine_tuned_model/training_log.jsonl", Body=b"")
    fake.jobs[first["TrainingJobName"]].left = 10**6
    assert main(*flags, "--resume", "--instance-type", "ml.g5.2xlarge") == 2
    assert f"{first['TrainingJobName']} still runs: --attach it" in capsys.readouterr().err
    fake.jobs[first["TrainingJobName"]].end("Stopped", "MaxRuntimeExceeded")
    assert main(*flags, "--resume") == 0
    again = fake.calls("CreateTrainingJob")[-1]
    assert again["CheckpointConfig"] == first["CheckpointConfig"]
    assert again["TrainingJobName"] != first["TrainingJobName"]


def test_an_adapter_never_lands_on_a_training_that_began_meanwhile(fake, capsys, monkeypatch, tuned, tmp_path):
    fake.client("sagemaker").create_training_job(**sagemaker_job.training_request(job()))
    folder = tmp_path / "out"

    def download(aws, description, to, needed):
        folder.mkdir()
        (folder / "training_log.jsonl").write_text("{}\n")  # a local training in the same folder
        return tuned

    monkeypatch.setattr(sagemaker_job, "download", download)
    assert main("--attach", job().name, "--output-dir", str(folder), "--poll-seconds", "0.01") == 2
    err = capsys.readouterr().err
    assert "holds an unfinished training" in err and str(tuned) in err
    assert (folder / "training_log.jsonl").read_text() == "{}\n" and (tuned / "adapter_config.json").is_file()


def test_ctrl_c_in_a_download_names_the_job_that_is_paid_for(fake, capsys, monkeypatch, tmp_path):
    fake.client("sagemaker").create_training_job(**sagemaker_job.training_request(job()))

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(sagemaker_job, "download", interrupted)
    assert main("--attach", job().name, "--output-dir", str(tmp_path / "o ut"), "--poll-seconds", "0.01") == 130
    err = capsys.readouterr().err
    assert (
        f"{job().name} is done and paid for" in err and f"--attach {job().name} --output-dir '{tmp_path}/o ut'" in err
    )


def test_a_price_of_another_region_is_not_made_up(fake):
    aws = Aws("sa-east-1", "123456789012", sagemaker_job.connect().session)
    fake.fail("GetProducts", "AccessDeniedException", "no")
    assert sagemaker_job.price(aws, "ml.g6e.2xlarge", "Training")[0] is None
    fake.fail("GetProducts", "AccessDeniedException", "no")
    assert sagemaker_job.check_cost(aws, "ml.g6e.2xlarge", 3600, False).status == "warning"


# The entry of the container, where the stand-in's one processor does not lead


@pytest.fixture
def entry(monkeypatch, tmp_path):
    """sagemaker_entry as it is in a container below tmp_path."""
    import sagemaker_entry

    for name, folder in (("SM_MODEL_DIR", "model"), ("SM_OUTPUT_DIR", "output"), ("SM_CHANNEL_TRAINING", "rows")):
        monkeypatch.setenv(name, str(tmp_path / folder))
    monkeypatch.setenv("SM_CHANNEL_MODEL", str(tmp_path / "weights"))
    return sagemaker_entry


def entry_job(**more):
    return {"arguments": ["--task", "sentiment"], "base_model": "default", "weights": ""} | more


def test_the_entry_uses_all_gpus_and_the_channels(entry, monkeypatch, tmp_path):
    monkeypatch.setenv("SM_NUM_GPUS", "4")
    made = entry.command(entry_job(weights="folder", folder="mine", base_model="../mine"), tmp_path / "work")
    assert made[1:5] == ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=4"]
    assert made[made.index("--model") + 1] == str(tmp_path / "weights" / "mine") and made[-1] == "--resume"
    assert made[made.index("--train") + 1] == str(tmp_path / "rows" / "train.jsonl") and "--groups" not in made
    monkeypatch.setenv("SM_NUM_GPUS", "1")
    assert entry.command(entry_job(), tmp_path)[1] == "fine_tune_model.py"


@pytest.mark.parametrize(
    ("kind", "variable"),
    [("cache", "CALIBRATED_CONFIDENCE_CACHE"), ("hub", "HF_HUB_CACHE"), ("folder", None), ("", None)],
)
def test_the_entry_says_where_staged_weights_are(entry, monkeypatch, tmp_path, kind, variable):
    for name in ("CALIBRATED_CONFIDENCE_CACHE", "HF_HUB_CACHE", "HF_TOKEN_SECRET_ARN"):
        monkeypatch.delenv(name, raising=False)
    found = entry.environment(entry_job(weights=kind))
    told = {name for name in ("CALIBRATED_CONFIDENCE_CACHE", "HF_HUB_CACHE") if name in found}
    assert told == ({variable} if variable else set()) and all(
        found[name] == str(tmp_path / "weights") for name in told
    )


@pytest.mark.parametrize("stored", [TOKEN, json.dumps({"token": TOKEN}), f"  {TOKEN}\n"])
def test_the_entry_reads_a_token_from_a_secret_for_the_training_alone(fake, entry, monkeypatch, stored):
    arn = fake.client("secretsmanager").create_secret(Name=f"hf-{time.monotonic_ns()}", SecretString=stored)["ARN"]
    monkeypatch.setenv("HF_TOKEN_SECRET_ARN", arn)
    assert entry.environment(entry_job())["HF_TOKEN"] == TOKEN and "HF_TOKEN" not in os.environ


def test_a_secret_that_can_not_be_read_or_holds_no_token_is_one_line_without_it(fake, entry):
    with pytest.raises(ValueError, match=r"cannot read arn:\S+ \(the role needs secretsmanager:GetSecretValue\)"):
        entry.secret(SECRET)
    stored = json.dumps({"a": TOKEN, "b": "2"})
    arn = fake.client("secretsmanager").create_secret(Name=f"hf-{time.monotonic_ns()}", SecretString=stored)["ARN"]
    with pytest.raises(ValueError, match="holds no token") as caught:
        entry.secret(arn)
    assert TOKEN not in str(caught.value)


def test_a_folder_copied_in_any_order_is_one_that_training_goes_on_from(entry, tmp_path):
    work = tmp_path / "work"
    (work / "checkpoint").mkdir(parents=True)
    (work / "checkpoint" / "state.safetensors").write_text("whole")
    (work / "checkpoint" / "state.safetensors.part").write_text("half")
    entry.mend(work)
    assert sorted(path.name for path in work.rglob("*")) == ["checkpoint", "state.safetensors", "training_log.jsonl"]
    args = fine_tune_model.parse_arguments(["--output-dir", str(work), "--resume"])
    assert fine_tune_model.check_folder(args)


@pytest.mark.parametrize(
    ("code", "status", "said"),
    [
        ("print('fine')", 0, ""),
        (
            "import sys; print('error: it is so', file=sys.stderr); print('later', file=sys.stderr); exit(2)",
            2,
            "error: it is so",
        ),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", 137, ""),
        ("import os, signal, time; os.kill(os.getppid(), signal.SIGTERM); time.sleep(20)", 143, ""),
        (
            "import os, signal, time\nsignal.signal(15, lambda *a: exit(1))\nos.kill(os.getppid(), 15)\ntime.sleep(20)",
            143,
            "",
        ),
    ],
)
def test_the_entry_passes_a_stop_on_and_keeps_the_last_error(entry, code, status, said):
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        assert entry.run([sys.executable, "-c", code], dict(os.environ)) == (status, said)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_the_entry_outside_a_container_is_one_line(run):
    done = run("scripts/sagemaker_entry.py")
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "--sagemaker starts it" in done.stderr


# Small things


def test_errors_of_the_checks_keep_their_kind():
    def denied():
        raise AwsError("you may not", "AccessDeniedException")

    def absent():
        raise ValueError("no such thing")

    assert sagemaker_job.check("a", lambda: "fine") == Check("ok", "a", "fine")
    assert sagemaker_job.check("a", denied).status == "warning"
    assert sagemaker_job.check("a", absent) == Check("failed", "a", "no such thing")


@pytest.mark.parametrize("uri", ["bucket/key", "s3://", "s3://UPPER/x", "https://x/y"])
def test_addresses_must_be_s3(uri):
    with pytest.raises(ValueError, match="not an S3 address"):
        sagemaker_job.split(uri)


def test_staged_files_have_the_layout_that_the_loader_finds(tmp_path, monkeypatch):
    folder = tmp_path / "plain"
    folder.mkdir()
    for name in ("config.json", "model.safetensors", "README.md", "pytorch_model.bin"):
        (folder / name).write_text("1")
    files, below = sagemaker_job.staged_files("plain", folder, "abc")
    assert below == "plain" and set(files) == {"plain/config.json", "plain/model.safetensors"}
    snapshot = tmp_path / "models--owner--name" / "snapshots" / "c0ffee"
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    (snapshot.parent.parent / "refs").mkdir()
    (snapshot.parent.parent / "refs" / "main").write_text("c0ffee")
    files, below = sagemaker_job.staged_files("owner/name", snapshot, "owner/name@c0ffee")
    assert below == "models--owner--name/snapshots/c0ffee"
    assert set(files) == {"models--owner--name/refs/main", f"{below}/config.json"}
    # The Hub's own library finds it there, without a network.
    import huggingface_hub

    for name, path in files.items():
        target = tmp_path / "channel" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(path.read_bytes())
    found = huggingface_hub.snapshot_download("owner/name", cache_dir=tmp_path / "channel", local_files_only=True)
    assert Path(found) == tmp_path / "channel" / below


def test_a_region_other_than_the_commands_is_used_throughout(fake):
    aws = Aws("eu-west-1", "123456789012", sagemaker_job.connect().session)
    assert aws.client("sagemaker").meta.region_name == "eu-west-1"
    assert sagemaker_job.bucket_name(aws, None) == "sagemaker-eu-west-1-123456789012"
    assert sagemaker_job.bucket_name(aws, "s3://mine/") == "mine"
