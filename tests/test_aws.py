"""aws.py: errors, secrets, checks, costs, S3 and weights, with botocore's own Stubber in place of AWS."""

import io
import json
import sys
import tarfile
import time
import traceback
from dataclasses import replace
from types import SimpleNamespace

import botocore.exceptions
import pytest
from fake_sagemaker import stubbed

import aws
from aws import AwsError, Check, checked, explained, explanation

TOKEN = "hf_" + "DoNotShowThisTokenAnywhere" + "12345678"
KEY, SESSION = "wJalr-do-not-show-this-key", "FwoG-do-not-show-this-session"
HOME = "s3://sagemaker-us-east-1-123456789012/calibrated-confidence"


# Errors and secrets


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("ExpiredTokenException", "have expired (ExpiredTokenException); sign in again"),
        ("SignatureDoesNotMatch", "AWS refuses the credentials (SignatureDoesNotMatch); look at AWS_PROFILE"),
        ("NoCredentialsError", "no AWS credentials (said): run `aws configure`"),
        ("EndpointConnectionError", "AWS cannot be reached (said); is the region right?"),
        ("AccessDeniedException", "AWS denies access (said)"),
        ("ResourceLimitExceeded", "ask for more under Service Quotas"),
        ("ThrottlingException", "repeat the command in a minute"),
        ("SomethingElse", "said"),
    ],
)
def test_an_error_says_what_to_do(code, words):
    assert words in explanation(code, "said.")


def test_what_boto3_raises_becomes_one_line_with_aws_s_code(monkeypatch):
    monkeypatch.setenv("AWS_SESSION_TOKEN", SESSION)
    refusal = {"Error": {"Code": "ValidationException", "Message": f"Could not find\nx, asked with {SESSION} {TOKEN}."}}
    with pytest.raises(AwsError) as caught, explained("look at x"):
        raise botocore.exceptions.ClientError(refusal, "DescribeX")
    assert str(caught.value) == "cannot look at x: Could not find x, asked with [redacted] [redacted]"
    assert caught.value.is_gone and TOKEN not in "".join(traceback.format_exception(caught.value))
    with pytest.raises(AwsError, match="cannot be reached") as caught, explained("look at x"):
        raise botocore.exceptions.EndpointConnectionError(endpoint_url="https://x")
    assert caught.value.is_not_an_answer and not caught.value.is_gone
    assert aws.unless_gone("x", lambda: 1) == 1


def test_no_key_and_no_token_is_shown_wherever_it_stands(monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", KEY)
    arn = "arn:aws:secretsmanager:us-east-1:123456789012:secret:hf-Ab12"
    request = {"Environment": {"NOTE": f"see {TOKEN} and {KEY}", "HF_TOKEN_SECRET_ARN": arn}}
    hidden = {"Environment": {"NOTE": "see [redacted] and [redacted]", "HF_TOKEN_SECRET_ARN": arn}}
    assert json.loads(aws.request_text(request)) == hidden
    assert aws.printed(f"a\x1b[31m\n{TOKEN}") == "a\\x1b[31m [redacted]"


# Account and names


def test_a_dry_run_lacks_region_and_account_and_nothing_else_does(no_credentials):
    with pytest.raises(ValueError, match="no AWS region: give --region"):
        aws.connect()
    with pytest.raises(ValueError, match="no images are known for region 'mars-1'; those with some: af-south-1"):
        aws.connect("mars-1", dry_run=True)
    with pytest.raises(AwsError, match="no AWS credentials"):
        aws.connect("eu-west-1")
    account = aws.connect(dry_run=True)
    assert (account.region, account.number, account.owner) == ("us-east-1", None, "000000000000")
    with pytest.raises(AwsError, match="no AWS credentials"):
        account.client("s3")


def test_addresses_and_names_follow_region_and_endpoint():
    assert aws.image_uri("eu-west-1", "a", "1") == "763104351884.dkr.ecr.eu-west-1.amazonaws.com/a:1"
    assert aws.image_uri("cn-north-1", "a", "1") == "727897471807.dkr.ecr.cn-north-1.amazonaws.com.cn/a:1"
    assert aws.component_name("demo") == "demo-base" and aws.component_name("demo", "a-1") == "demo-adapter-a-1"
    for endpoint, name in (("demo", "a_b"), ("demo", "-a"), ("demo", ""), ("demo", "a" * 60), ("a b", None)):
        with pytest.raises(ValueError, match="is no name on AWS"):
            aws.component_name(endpoint, name)
    assert aws.bucket_and_key("s3://bucket/a/b") == ("bucket", "a/b")
    for uri in ("bucket/key", "s3://", "s3://UPPER/x", "https://x/y"):
        with pytest.raises(ValueError, match="not an S3 address"):
            aws.bucket_and_key(uri)


# Checks


def test_what_may_not_be_looked_at_is_a_warning_and_what_is_wrong_a_failure(capsys):
    def raising(error):
        def look():
            raise error

        return look

    checks = []
    assert checked(checks, "a", lambda: "fine", "other") == "fine"
    denied, absent = AwsError("not authorized", "AccessDeniedException"), AwsError("no such thing", "NoSuchEntity")
    offline = AwsError("no AWS credentials", "NoCredentialsError")
    for error in (denied, absent, offline, ValueError(f"wrong {TOKEN}")):
        assert checked(checks, "b", raising(error), "other") == "other"
    assert checks == [
        Check("ok", "a", "fine"),
        Check("warning", "b", "not checked: not authorized"),
        Check("failed", "b", "no such thing"),
        Check("warning", "b", "not checked: other"),
        Check("failed", "b", f"wrong {TOKEN}"),
    ]
    aws.refuse_failed(checks[:2])
    with pytest.raises(ValueError, match="nothing is started, changed or billed: b: no such thing; b: wrong"):
        aws.refuse_failed(checks)
    aws.print_checks([checks[0], checks[-1]])
    assert capsys.readouterr().out == "  ok       a  fine\n  failed   b  wrong [redacted]\n"


def test_the_role_is_found_by_name_or_taken_as_an_arn():
    account, stubber = stubbed("iam")
    arn = "arn:aws:iam::123456789012:role/service-role/mine"
    assert aws.find_role(account, arn) == arn
    offline = replace(account, region="cn-north-1", number=None)
    assert aws.check_account(offline, "x", None, "ml.g5.xlarge")[1] == "arn:aws-cn:iam::000000000000:role/x"
    checks, role = aws.check_account(offline, arn, "mine", "ml.m5.large")
    assert [check.status for check in checks] == ["warning", "ok", "warning", "failed"] and role == arn
    role = {"Path": "/service-role/", "RoleName": "mine", "RoleId": "A" * 16, "Arn": arn, "CreateDate": 0}
    with stubber:
        stubber.add_response("get_role", {"Role": role}, {"RoleName": "mine"})
        assert aws.find_role(account, "mine") == arn
        stubber.add_client_error("get_role", "NoSuchEntity", "The role with name x cannot be found.")
        with pytest.raises(AwsError, match=r"cannot look at the role x \(--role names another\)") as caught:
            aws.find_role(account, "x")
    assert not caught.value.is_not_an_answer


def test_a_bucket_must_be_there_here_and_ours():
    account, stubber = stubbed("s3")
    asked = {"Bucket": "mine", "ExpectedBucketOwner": "123456789012"}
    with stubber:
        stubber.add_response("head_bucket", {"BucketRegion": "eu-west-1"}, asked)
        with pytest.raises(ValueError, match="mine is in eu-west-1, not in us-east-1"):
            aws.check_bucket(account, "mine", False)
        stubber.add_response("head_bucket", {"BucketRegion": "us-east-1"}, asked)
        assert "the role needs a policy for it" in aws.check_bucket(account, "mine", False)
        stubber.add_client_error("head_bucket", "404", "Not Found")
        with pytest.raises(ValueError, match="aws s3 mb s3://mine --region us-east-1"):
            aws.check_bucket(account, "mine", False)
        stubber.add_client_error("head_bucket", "403", "Forbidden")
        with pytest.raises(AwsError, match="it may be somebody else's"):
            aws.make_bucket(account, "mine")
        stubber.add_client_error("head_bucket", "404", "Not Found")
        stubber.add_response("create_bucket", {}, {"Bucket": "mine"})
        aws.make_bucket(account, "mine")
        stubber.assert_no_pending_responses()
    assert aws.bucket_name(account, None) == "sagemaker-us-east-1-123456789012"
    assert aws.bucket_name(account, "s3://mine/") == "mine"


# Costs


def test_prices_and_durations():
    assert aws.price("us-east-1", "ml.g6e.2xlarge") == 2.80
    assert aws.price("sa-east-1", "ml.g6e.2xlarge") is aws.price("us-east-1", "ml.p5.48xlarge") is None
    assert [aws.seconds_of(text) for text in ("7200", "90m", "1.5h", "60s")] == [7200, 5400, 5400, 60]
    for wrong in ("soon", "1s", "30d", "-5m"):
        with pytest.raises(ValueError):
            aws.seconds_of(wrong)


def test_only_a_yes_at_a_terminal_spends_money(monkeypatch):
    monkeypatch.setattr(sys, "stdin", None)
    with pytest.raises(ValueError, match="add --yes"):
        aws.ask_to_spend("start?")
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(isatty=lambda: True))
    for answer in ("n", "", "yess"):
        monkeypatch.setattr("builtins.input", lambda question, answer=answer: answer)
        with pytest.raises(ValueError, match="not started, nothing is billed"):
            aws.ask_to_spend("start?")
    monkeypatch.setattr("builtins.input", lambda question: " Yes ")
    aws.ask_to_spend("start?")


# S3 and weights


def test_an_upload_that_is_there_is_not_sent_twice():
    account, stubber = stubbed("s3")
    place = {"Bucket": "bucket", "Key": "a/b", "ExpectedBucketOwner": "123456789012"}
    with stubber:
        for code in ("404", "403"):  # who may not list a bucket is denied what is not there
            stubber.add_client_error("head_object", code)
            stubber.add_response("put_object", {}, place | {"Body": b"123"})
            aws.upload(account, "s3://bucket/a/b", b"123")
        stubber.add_response("head_object", {"ContentLength": 3}, place)
        aws.upload(account, "s3://bucket/a/b", b"123")
        stubber.assert_no_pending_responses()


def test_an_archive_is_the_same_bytes_for_the_same_files_and_opens_flat(monkeypatch):
    files = {"b.py": b"2", "a.py": b"1" * 1000}
    packed = aws.archive(files)
    monkeypatch.setattr(time, "time", lambda: 1e9)
    assert aws.archive(dict(reversed(files.items()))) == packed != aws.archive(files | {"b.py": b"3"})
    with tarfile.open(fileobj=io.BytesIO(packed)) as tar:
        assert {m.name: tar.extractfile(m).read() for m in tar} == files
        assert {(m.mode, m.uid, m.mtime, m.uname) for m in tar} == {(0o644, 0, 0, "")}


@pytest.fixture
def folder(tmp_path):
    """A folder that looks like a model's; nobody computes with it."""
    folder = tmp_path / "tiny"
    folder.mkdir()
    for name in ("config.json", "model.safetensors", "README.md", "pytorch_model.bin"):
        (folder / name).write_text("{}")
    return folder


def test_the_weights_of_a_folder_are_uploaded_once(folder):
    account, stubber = stubbed("s3")
    weights = aws.find_weights(str(folder), "auto", HOME, dry_run=False)
    assert sorted(weights.files) == ["config.json", "model.safetensors"] and weights.model == str(folder)
    assert weights.prefix.startswith(f"{HOME}/weights/") and weights.identity in weights.prefix
    with stubber:
        stubber.add_response("head_object", {"ContentLength": 2})
        stubber.add_client_error("head_object", "404")
        stubber.add_response("put_object", {})
        aws.upload_weights(account, weights)
        stubber.assert_no_pending_responses()


def test_a_model_of_the_hub_is_fetched_by_the_container_unless_it_is_closed(monkeypatch):
    import huggingface_hub

    info = SimpleNamespace(gated=False, private=False, sha="c0ffee")
    monkeypatch.setattr(huggingface_hub, "model_info", lambda model, timeout: info)
    found = aws.find_weights("me/open", "auto", HOME, dry_run=False)
    assert (found.model, found.identity, found.prefix) == ("me/open", "me/open@c0ffee", "")
    for closed in ({"gated": "manual"}, {"private": True}):  # which your login can see, and the container cannot
        info.__dict__.update({"gated": False, "private": False} | closed)
        with pytest.raises(ValueError, match="me/closed is gated or private: --weights upload"):
            aws.find_weights("me/closed", "auto", HOME, dry_run=False)
        assert aws.find_weights("me/closed", "auto", HOME, dry_run=False, has_token=True).prefix == ""
        planned = aws.find_weights("me/closed", "upload", HOME, dry_run=True)
        assert planned.prefix.startswith(f"{HOME}/weights/me-closed-") and not planned.files


def test_without_the_hub_the_weights_are_not_checked(monkeypatch):
    import huggingface_hub

    def offline(*_, **__):
        raise huggingface_hub.errors.OfflineModeIsEnabled("offline mode is enabled")

    monkeypatch.setattr(huggingface_hub, "model_info", offline)
    with pytest.raises(AwsError, match="the Hub cannot be asked for me/open") as caught:
        aws.find_weights("me/open", "auto", HOME, dry_run=True)
    assert caught.value.is_not_an_answer
