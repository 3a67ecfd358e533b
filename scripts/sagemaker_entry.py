"""What a SageMaker training job runs: fine_tune_model.py on the job's channels, with checkpoints that outlast it.

    python scripts/sagemaker_entry.py      # inside a training container only; fine_tune_model.py --sagemaker starts it

It lies at the root of the source archive, beside fine_tune_model.py and arguments.json, which holds the flags. The
training works in the checkpoint folder, which SageMaker copies to S3 as it changes and brings back after a spot
interruption, always with --resume. The finished adapter is copied to SM_MODEL_DIR, which becomes model.tar.gz. What
went wrong is written, in one line, where SageMaker reads its FailureReason. A Hugging Face token, if there is one,
comes from Secrets Manager and is seen by the training process alone.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

HERE = Path(__file__).resolve().parent
if not (HERE / "command_line.py").is_file():  # in the repository it is one folder up, in the archive beside us
    HERE = HERE.parent
sys.path.insert(0, str(HERE))

import command_line  # noqa: E402

LOG, CONFIG = "training_log.jsonl", "training_config.json"
STOPPED = 128 + signal.SIGTERM  # no failure


def main(argv: Sequence[str] | None = None) -> None:
    command_line.ArgumentParser(__doc__).parse_args(argv)
    if "SM_MODEL_DIR" not in os.environ:
        raise ValueError("this runs inside a SageMaker training container; fine_tune_model.py --sagemaker starts it")
    model_dir, output_dir = Path(os.environ["SM_MODEL_DIR"]), Path(os.environ["SM_OUTPUT_DIR"])
    work = model_dir.parent / "checkpoints" / "fine_tuned_model"
    try:
        job = json.loads((HERE / "arguments.json").read_text(encoding="utf-8"))
        repair(work)
        model, variables = place_weights(job["model"], job["staged"], model_dir.parent / "staged")
        status, said = run_training(command(job, model, work), os.environ | variables | token())
        if status == 0:
            deliver(job, work, model_dir)
    except (OSError, ValueError) as error:
        status, said = 2, f"error: {error}"
        print(said, file=sys.stderr)
    if status not in (0, STOPPED):
        output_dir.mkdir(parents=True, exist_ok=True)
        (output_dir / "failure").write_text(said or f"fine_tune_model.py ended with status {status}", encoding="utf-8")
    sys.exit(status)


def repair(work: Path) -> None:
    """Make a folder that was copied file by file, in any order, one that a training goes on from."""
    work.mkdir(parents=True, exist_ok=True)
    for half in work.rglob("*.part"):
        half.unlink()
    (work / LOG).touch()  # by it a training knows its folder; --resume writes it again from the checkpoint


def place_weights(model: str, staged: str, cache: Path) -> tuple[str, dict[str, str]]:
    """Lay staged weights out so that the libraries find them: (--model, variables that say where)."""
    if not staged:
        return model, {}
    folder = cache / staged
    folder.mkdir(parents=True, exist_ok=True)
    for file in Path(os.environ["SM_CHANNEL_MODEL"]).iterdir():
        (folder / file.name).symlink_to(file)
    if "/snapshots/" not in staged:
        return str(folder), {}
    main = folder.parent.parent / "refs" / "main"  # where the Hub's library reads which snapshot is the newest
    main.parent.mkdir(exist_ok=True)
    main.write_text(folder.name, encoding="utf-8")
    return model, {"HF_HUB_CACHE": str(cache), "HF_HUB_OFFLINE": "1"}


def token() -> dict[str, str]:
    """The Hugging Face token in the secret that the job names, which holds nothing else."""
    if not (arn := os.environ.get("HF_TOKEN_SECRET_ARN")):
        return {}
    import boto3
    from botocore.exceptions import BotoCoreError, ClientError

    try:
        client = boto3.client("secretsmanager", region_name=arn.split(":")[3])
        return {"HF_TOKEN": client.get_secret_value(SecretId=arn)["SecretString"].strip()}
    except (BotoCoreError, ClientError) as error:
        raise ValueError(f"cannot read {arn} (the role needs secretsmanager:GetSecretValue): {error}") from None


def command(job: dict, model: str, work: Path) -> list[str]:
    """fine_tune_model.py with the flags that travelled, on all GPUs of the machine."""
    channel = Path(os.environ["SM_CHANNEL_TRAINING"])
    data = ["--train", f"{channel}/train.jsonl", "--validation", f"{channel}/validation.jsonl", "--model", model]
    if (channel / "groups.jsonl").is_file():
        data += ["--groups", f"{channel}/groups.jsonl"]
    python = [sys.executable]
    if (gpus := int(os.environ.get("SM_NUM_GPUS") or 0)) > 1:
        python += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={gpus}"]
    return [*python, "fine_tune_model.py", *job["arguments"], *data, "--output-dir", str(work), "--resume"]


def run_training(arguments: list[str], variables: dict[str, str]) -> tuple[int, str]:
    """Run the training; its exit status, as a shell counts it, and the last error line it wrote."""
    process = subprocess.Popen(arguments, cwd=HERE, env=variables, stderr=subprocess.PIPE, text=True, errors="replace")
    stops = []

    def stop(number: int, frame: object) -> None:
        stops.append(number)
        process.send_signal(signal.SIGTERM)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)
    said = ""
    for line in process.stderr:
        print(line, end="", file=sys.stderr, flush=True)
        if line.strip() and (line.startswith("error: ") or not said.startswith("error: ")):
            said = line.strip()
    status = process.wait()
    if stops and status:  # what starts several processes has a status of its own for it
        status = STOPPED
    return (128 - status if status < 0 else status), said


def deliver(job: dict, work: Path, model_dir: Path) -> None:
    """Copy the finished folder to where SageMaker packs it, with the names that the rows and the model had at home."""
    shutil.copytree(work, model_dir, dirs_exist_ok=True, ignore=shutil.ignore_patterns("checkpoint"))
    config = json.loads((model_dir / CONFIG).read_text(encoding="utf-8"))
    config["base_model"] = job["model"]
    for name, source in job["sources"].items():
        config[name]["source"] = source
    config["sagemaker_job"] = os.environ.get("TRAINING_JOB_NAME")
    (model_dir / CONFIG).write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    command_line.run(main)
