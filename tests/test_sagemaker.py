"""Training on SageMaker from end to end, on a stand-in for AWS whose container really trains.

fake_sagemaker.py is AWS, container_simulator.py the container. What only AWS can show (permissions, images, GPUs) is
not shown here.
"""

import json
import re

import pytest
from container_simulator import run_training
from fake_sagemaker import Fake

import fine_tune_model

pytestmark = pytest.mark.sagemaker

SECRET_TOKEN = "hf_" + "InTheSecretAndNowhereElse" + "0123456789"
LOCAL_TOKEN = "hf_" + "OnTheUsersMachineOnly" + "0123456789abcd"
FLAGS = ["--limit", "48", "--validation-limit", "30", "--epochs", "2", "--batch-size", "8", "--validate-every", "4"]
FLAGS += ["--checkpoint-every", "2"]
THERE = ["--sagemaker", "--yes", "--poll-seconds", "0.2"]


@pytest.fixture
def fake(monkeypatch):
    with Fake(run_training) as fake:
        for name, value in {**fake.env, "HF_TOKEN": LOCAL_TOKEN}.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr("boto3.Session", fake.session)
        fake.plan = {"env": {"OMP_NUM_THREADS": "1"}}  # what happens to the next jobs
        yield fake


def where_a_token_stands(fake, said, folder):
    places = {f"output {i}": text.encode() for i, text in enumerate(said)}
    places |= {f"request {i}": json.dumps(request).encode() for i, request in enumerate(fake.requests)}
    places |= {f"s3 {key}": content for key, content in fake.objects().items()}
    places |= {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    for job in fake.jobs.values():
        for container in job.plan["seen"]:
            places |= {f"{job.name} output": container["output"].encode(), **container["files"]}
    assert len(places) > 50
    return [place for place, content in places.items() if re.search(rb"hf_[A-Za-z0-9]{20,}", content)]


def test_an_adapter_trained_there_is_the_one_trained_here_whatever_interrupts_it(fake, outcome, tiny_folder, tmp_path):
    said = []

    def train(folder, *more, code=0):
        ended, *printed = outcome(fine_tune_model.main, "--model", tiny_folder, *FLAGS, "--output-dir", folder, *more)
        said.extend(printed)
        assert ended == code and "Traceback" not in "".join(printed), printed
        return "".join(printed)

    def containers():
        return [container["output"] for job in fake.jobs.values() for container in job.plan["seen"]]

    # One over a spot interruption. It goes on, and does not begin anew.
    fake.plan["interrupt_at"] = r" 8 of 12 "
    printed = train(tmp_path / "one", *THERE, "--spot")
    assert "Interrupted" in printed and re.search(r"6\d% saved by spot", printed)
    first, second = containers()
    assert "4 of 12" in first and "0 of 12" not in second
    del fake.plan["interrupt_at"]

    # Another over a time limit, with a token in a secret.
    arn = fake.client("secretsmanager").create_secret(Name="hf", SecretString=SECRET_TOKEN)["ARN"]
    seed = ["--seed", "5"]
    fake.plan |= {"stop_at": r" 4 of 12 "}
    printed = train(tmp_path / "two", *THERE, *seed, "--hf-token-secret", arn, code=2)
    assert "it reached --max-runtime; the command that started it goes on" in printed
    assert not (tmp_path / "two").exists()
    del fake.plan["stop_at"]
    train(tmp_path / "two", *THERE, *seed, "--hf-token-secret", arn, "--resume")
    assert "0 of 12" not in containers()[-1]
    assert fake.calls("CreateTrainingJob")[-1]["Environment"]["HF_TOKEN_SECRET_ARN"] == arn

    # They are the ones that training here makes, byte for byte, and say the same of themselves.
    for name, more in (("one", []), ("two", seed)):
        here, there = tmp_path / f"{name}-here", tmp_path / name
        train(here, *more)
        for file in ("adapter_config.json", "adapter_model.safetensors"):
            assert (here / file).read_bytes() == (there / file).read_bytes()
        configs = [json.loads((folder / "training_config.json").read_text()) for folder in (there, here)]
        assert configs[0].pop("sagemaker_job") in fake.jobs and configs[0] == configs[1]
    assert where_a_token_stands(fake, said, tmp_path) == []
