"""scripts/sagemaker_entry.py, where the one processor of the simulated container does not lead."""

import os
import signal
import sys
from pathlib import Path

import boto3
import pytest
from fake_sagemaker import stubbed

import sagemaker_entry as entry
from fine_tune_model import check_folder

TOKEN = "hf_" + "DoNotShowThisTokenAnywhere" + "12345678"
SECRET = "arn:aws:secretsmanager:us-east-1:123456789012:secret:hf-Ab12"
JOB = {"arguments": ["--task", "sentiment"], "model": "default", "staged": ""}


@pytest.fixture(autouse=True)
def container(monkeypatch, tmp_path):
    for name, folder in (("SM_MODEL_DIR", "model"), ("SM_OUTPUT_DIR", "output"), ("SM_CHANNEL_TRAINING", "rows")):
        monkeypatch.setenv(name, str(tmp_path / folder))
    monkeypatch.setenv("SM_CHANNEL_MODEL", str(tmp_path / "weights"))
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights" / "config.json").write_text("{}")


def test_it_uses_all_gpus_and_the_channels(monkeypatch, tmp_path):
    monkeypatch.setenv("SM_NUM_GPUS", "4")
    made = entry.command(JOB, "../mine", tmp_path / "work")
    assert made[1:5] == ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=4"]
    assert made[made.index("--model") + 1] == "../mine" and made[-1] == "--resume"
    assert made[made.index("--train") + 1] == str(tmp_path / "rows" / "train.jsonl") and "--groups" not in made
    monkeypatch.setenv("SM_NUM_GPUS", "1")
    assert entry.command(JOB, "default", tmp_path)[1] == "fine_tune_model.py"


def test_staged_weights_are_laid_out_as_the_libraries_look_for_them(tmp_path):
    import huggingface_hub

    cache = tmp_path / "staged"
    assert entry.place_weights("default", "", cache) == ("default", {})
    model, variables = entry.place_weights("../tiny", "tiny", cache)
    assert (model, variables) == (str(cache / "tiny"), {}) and (cache / "tiny" / "config.json").read_text() == "{}"
    staged = "models--owner--name/snapshots/c0ffee"
    _, variables = entry.place_weights("owner/name", staged, cache)
    assert variables == {"HF_HUB_CACHE": str(cache), "HF_HUB_OFFLINE": "1"}
    # The Hub's own library finds it there, without a network.
    found = huggingface_hub.snapshot_download("owner/name", cache_dir=cache, local_files_only=True)
    assert Path(found) == cache / staged and (Path(found) / "config.json").is_file()


def test_a_token_is_read_from_a_secret_for_the_training_alone(monkeypatch):
    monkeypatch.delenv("HF_TOKEN", raising=False)
    assert entry.token() == {}
    account, stubber = stubbed("secretsmanager")
    monkeypatch.setattr(boto3, "client", lambda service, region_name: account.client(service))
    monkeypatch.setenv("HF_TOKEN_SECRET_ARN", SECRET)
    with stubber:
        stubber.add_response("get_secret_value", {"SecretString": f"  {TOKEN}\n"}, {"SecretId": SECRET})
        assert entry.token() == {"HF_TOKEN": TOKEN} and "HF_TOKEN" not in os.environ
        stubber.add_client_error("get_secret_value", "AccessDeniedException")
        with pytest.raises(ValueError, match=r"cannot read arn:\S+ \(the role needs secretsmanager:GetSecretValue\)"):
            entry.token()


def test_a_folder_copied_in_any_order_is_one_that_training_goes_on_from(tmp_path):
    work = tmp_path / "work"
    (work / "checkpoint").mkdir(parents=True)
    (work / "checkpoint" / "state.safetensors").write_text("whole")
    (work / "checkpoint" / "state.safetensors.part").write_text("half")
    entry.repair(work)
    assert sorted(path.name for path in work.rglob("*")) == ["checkpoint", "state.safetensors", "training_log.jsonl"]
    assert check_folder(work, resume=True)


@pytest.mark.parametrize(
    ("code", "status", "said"),
    [
        ("print('fine')", 0, ""),
        ("import sys; print('error: so', file=sys.stderr); print('later', file=sys.stderr); exit(2)", 2, "error: so"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", 137, ""),
        (
            "import os, signal as s, time; s.signal(15, lambda *a: exit(1)); os.kill(os.getppid(), 15); time.sleep(9)",
            143,
            "",
        ),
    ],
)
def test_a_stop_is_passed_on_and_the_last_error_kept(code, status, said):
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        assert entry.run_training([sys.executable, "-c", code], dict(os.environ)) == (status, said)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_outside_a_container_it_is_one_line(monkeypatch):
    monkeypatch.delenv("SM_MODEL_DIR")
    with pytest.raises(ValueError, match="--sagemaker starts it"):
        entry.main([])
