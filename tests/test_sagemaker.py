"""The cloud commands from end to end, on a stand-in for AWS whose containers really train and really answer.

fake_sagemaker.py is AWS, container_simulator.py the containers. What only AWS can show
(permissions, images, GPUs, vLLM itself) is not shown here.
"""

import json
import re
from pathlib import Path

import pytest
from container_simulator import LMI, run_training
from fake_sagemaker import Fake

import delete_endpoint
import deploy_sagemaker
import fine_tune_model
import logprobs_confidence
import predictions
import test_endpoint as asking

pytestmark = pytest.mark.sagemaker

ROOT = Path(__file__).parent.parent
SECRET_TOKEN = "hf_" + "InTheSecretAndNowhereElse" + "0123456789"
LOCAL_TOKEN = "hf_" + "OnTheUsersMachineOnly" + "0123456789abcd"
ROWS = ["--limit", "48", "--validation-limit", "30"]
QUICK = ["--epochs", "2", "--batch-size", "8", "--validate-every", "4", "--checkpoint-every", "2"]
FAST = ["--poll-seconds", "0.2"]


@pytest.fixture
def fake(monkeypatch):
    with Fake(run_training=run_training, serving=LMI()) as fake:
        for name, value in {**fake.env, "HF_TOKEN": LOCAL_TOKEN}.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr("boto3.Session", fake.session)
        fake.plan = {"env": {"OMP_NUM_THREADS": "1"}}  # what happens to the next jobs
        yield fake
        assert fake.left_behind() == []


@pytest.fixture
def command(outcome):
    """Run a script against the stand-in; everything it printed is kept."""
    said = []

    def run_command(main, *arguments, code=0):
        ended, out, err = outcome(main, *arguments)
        said.append(out + err)
        assert ended == code, said[-1]
        ours = [line for line in said[-1].splitlines() if not line.startswith("  |")]  # in a job's log: torchrun's
        assert "Traceback" not in "\n".join(ours)
        return out if not code else err

    run_command.said = said
    return run_command


@pytest.fixture
def train(command, tiny_folder):
    def run_training_command(folder, *more, code=0):
        flags = ["--model", tiny_folder, *ROWS, *QUICK, "--output-dir", folder, *FAST]
        return command(fine_tune_model.main, "--sagemaker", "--yes", *flags, *more, code=code)

    return run_training_command


def last_job(fake):
    return list(fake.jobs.values())[-1]


def same_adapter(one, other):
    names = ("adapter_config.json", "adapter_model.safetensors")
    return all((one / name).read_bytes() == (other / name).read_bytes() for name in names)


def where_a_token_stands(fake, command, folder):
    places = {f"output {i}": text.encode() for i, text in enumerate(command.said)}
    places |= {f"request {i}": json.dumps(request).encode() for i, request in enumerate(fake.requests)}
    places |= {f"s3 {key}": content for key, content in fake.objects().items()}
    places |= {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    for job in fake.jobs.values():
        for container in job.plan["seen"]:
            places |= {f"{job.name} output": container["output"].encode(), **container["files"]}
    assert len(places) > 50
    return [place for place, content in places.items() if re.search(rb"hf_[A-Za-z0-9]{20,}", content)]


def test_from_training_to_deletion(fake, command, train, tiny_folder, tmp_path):
    # Two adapters, one over a spot interruption, one with a token in a secret.
    fake.plan["interrupt_at"] = r" 8 of 12 "
    out = train(tmp_path / "one", "--spot")
    assert "Interrupted" in out and re.search(r"6\d% saved by spot", out)
    first, second = last_job(fake).plan["seen"]
    assert "4 of 12" in first["output"] and "0 of 12" not in second["output"]  # it went on, not began anew
    del fake.plan["interrupt_at"]
    arn = fake.client("secretsmanager").create_secret(Name="hf", SecretString=SECRET_TOKEN)["ARN"]
    train(tmp_path / "two", "--seed", "5", "--hf-token-secret", arn)
    assert last_job(fake).request["Environment"]["HF_TOKEN_SECRET_ARN"] == arn

    # They are the ones that training here makes, byte for byte, and say the same of themselves.
    for name, more in (("one", []), ("two", ["--seed", "5"])):
        here = tmp_path / f"{name}-here"
        command(fine_tune_model.main, "--model", tiny_folder, *ROWS, *QUICK, "--output-dir", here, *more)
        assert same_adapter(tmp_path / name, here)
        configs = [json.loads((folder / "training_config.json").read_text()) for folder in (tmp_path / name, here)]
        assert configs[0].pop("sagemaker_job") in fake.jobs and configs[0] == configs[1]

    # Served beside each other, they answer as they do here.
    deploy = [deploy_sagemaker.main, "texts", "--yes", "--poll-seconds", "0.05"]
    adapters = [f"one={tmp_path / 'one'}", f"two={tmp_path / 'two'}"]
    command(*deploy, "--model", tiny_folder, "--adapter", *adapters, "--max-length", "512")
    answers = {}
    for name in ("one", "two"):
        asked = command(asking.main, "texts", "--adapter", name, "--tolerance", "1e-5", "--json")
        answers[name] = json.loads(asked.splitlines()[0])["probabilities"]
        table = ["--input", ROOT / "data" / "sample.csv", "--limit", "12"]
        local = ["--model", tiny_folder, "--adapter", tmp_path / name]
        remote = ["--endpoint", f"sagemaker:texts/{name}", "--tokenizer", tiny_folder]
        for way, flags in (("here", local), ("there", remote)):
            command(logprobs_confidence.main, *flags, *table, "--output", tmp_path / f"{name}-{way}.jsonl")
        tables = [predictions.read(tmp_path / f"{name}-{way}.jsonl") for way in ("here", "there")]
        for here, there in zip(*tables, strict=True):
            assert there.id == here.id and there.probabilities == pytest.approx(here.probabilities, abs=1e-5)
    assert answers["one"] != pytest.approx(answers["two"], abs=1e-3)

    # A swap changes the answer, a removal takes one away, a deletion everything; again is no error.
    command(*deploy, "--adapter", f"one={tmp_path / 'two'}", "--remove", "two")
    asked = command(asking.main, "texts", "--adapter", "one", "--json")
    assert json.loads(asked.splitlines()[0])["probabilities"] == pytest.approx(answers["two"], abs=1e-5)
    command(asking.main, "texts", "--adapter", "two", code=2)
    for _ in range(2):
        command(delete_endpoint.main, "texts", "--poll-seconds", "0.05")
    assert where_a_token_stands(fake, command, tmp_path) == []


def test_a_time_limit_is_gone_on_from_with_a_task_and_groups_of_one_s_own(fake, command, tiny_folder, tmp_path):
    task = 'name = "mood"\ntemplate = "{text}\\nMood:"\n[labels]\nglad = ["happy", "glad"]\nsad = ["sad"]\n'
    (tmp_path / "mood.toml").write_text(task, encoding="utf-8")
    rows = [f"{i},a {'fine' if i % 2 else 'grey'} day number {i},{'G' if i % 2 else 'S'}" for i in range(64)]
    for name, part in (("t.csv", rows[:48]), ("v.csv", rows[48:])):
        (tmp_path / name).write_text("\n".join(["key,body,mood", *part]) + "\n", encoding="utf-8")
    groups = "\n".join(["id,group", *(f"{i},{i % 5}" for i in range(48, 64))]) + "\n"
    (tmp_path / "g.csv").write_text(groups, encoding="utf-8")
    flags = ["--model", tiny_folder, "--task", tmp_path / "mood.toml", *QUICK, "--groups", tmp_path / "g.csv"]
    flags += ["--train", tmp_path / "t.csv", "--validation", tmp_path / "v.csv", "--label-map", "G=glad", "S=sad"]
    flags += ["--text-column", "body", "--label-column", "mood", "--id-column", "key"]
    there = ["--sagemaker", "--yes", "--output-dir", tmp_path / "there", *FAST]

    fake.plan["env"]["SM_NUM_GPUS"] = (
        "2"  # which has the entry start two processes; there is no GPU, so on the processor
    )
    fake.plan["stop_at"] = r" 4 of 12 "
    said = command(fine_tune_model.main, *flags, *there, code=2)
    assert "it reached --max-runtime; the command that started it goes on" in said
    assert not (tmp_path / "there").exists()
    del fake.plan["stop_at"]
    command(fine_tune_model.main, *flags, *there, "--resume")
    assert "0 of 12" not in last_job(fake).plan["seen"][0]["output"]
    command(fine_tune_model.main, *flags, "--output-dir", tmp_path / "here")
    configs = [json.loads((tmp_path / where / "training_config.json").read_text()) for where in ("there", "here")]
    assert [config["processes"] for config in configs] == [2, 1]
    for name in ("train", "validation", "task", "before"):
        assert configs[0][name] == pytest.approx(configs[1][name], abs=1e-5) if name == "before" else configs[0][name]
    assert configs[0]["best"]["log_loss"] == pytest.approx(configs[1]["best"]["log_loss"], abs=1e-4)
