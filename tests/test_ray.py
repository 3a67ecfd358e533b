"""scripts/score_on_ray.py on real Ray: two workers here, two simulated machines; workers and drivers are killed.

`make test-ray` installs Ray and runs this file.
"""

import csv
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from pyarrow import parquet

import predictions
import probe_confidence
from calibration import load_calibrator
from llama import load_llama
from logprobs_confidence import label_scorer
from tables import read_examples
from task import TASKS

pytestmark = pytest.mark.ray
ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "scripts" / "score_on_ray.py"
RECORDED, CALIBRATOR = ROOT / "data/predictions/base_test.jsonl", ROOT / "data/calibrators/base.json"
PATIENCE_S = 400  # on two busy processors


@pytest.fixture
def start():
    """start(arguments, environment): the script in a process of its own, which ends with the test."""
    started = []

    def run_script(*arguments, **environment):
        command = [sys.executable, str(SCRIPT), *map(str, arguments)]
        options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "cwd": ROOT}
        started.append(subprocess.Popen(command, env=os.environ | environment, **options))
        return started[-1]

    yield run_script
    for process in started:
        process.kill()


def ended(process):
    """(its code, all it said)."""
    out, err = process.communicate(timeout=PATIENCE_S)
    assert "Traceback" not in err, err
    return process.returncode, out, err


def wait_for(condition, process):
    """Until the condition holds or the process has ended."""
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline and process.poll() is None:
        if condition():
            return
        time.sleep(0.1)
    pytest.fail(f"waited in vain: {process.communicate()[1] if process.poll() is not None else 'it goes on'}")


def parts(output):
    return sorted(path.name for path in output.glob("rows/*.parquet"))


def workers_of(process):
    """The processes of the driver's Ray that hold a model."""
    children = psutil.Process(process.pid).children(recursive=True)
    return [child for child in children if child.is_running() and "PartScorer" in " ".join(child.cmdline())]


def kill(process):
    process.send_signal(signal.SIGKILL)
    process.communicate()


# On this machine, the real model


def test_two_workers_give_the_script_s_rows_though_a_worker_and_the_driver_are_killed(start, tmp_path):
    output = tmp_path / "out"
    flags = ["--input", "data:test", "--adapter", "none", "--calibrator", CALIBRATOR, "--workers", 2]
    command = [*flags, "--output", output, "--part-rows", 256]
    process = start(*command)
    wait_for(lambda: parts(output) and len(workers_of(process)) == 2, process)
    killed = workers_of(process)[0]
    killed.kill()
    before = len(parts(output))
    wait_for(lambda: len(parts(output)) >= before + 2 and killed.pid not in psutil.pids(), process)
    kill(process)
    finished = {name: (output / "rows" / name).stat().st_mtime_ns for name in parts(output)}
    assert 3 <= len(finished) < 8
    code, _, err = ended(start(*command))
    assert code == 0 and len(parts(output)) == 8, err
    assert all((output / "rows" / name).stat().st_mtime_ns == when for name, when in finished.items())

    collected = tmp_path / "p.jsonl"
    code, out, _ = ended(start("--output", output, "--collect", collected))
    assert code == 0 and "p.jsonl: 2,000 rows" in out
    recorded = predictions.read(RECORDED)
    expected = load_calibrator(CALIBRATOR).apply(recorded)
    for ours, theirs in zip(predictions.read(collected), expected, strict=True):
        assert (ours.id, ours.text, ours.label, ours.fingerprint) == (
            theirs.id,
            theirs.text,
            theirs.label,
            theirs.fingerprint,
        )
        assert ours.probabilities == pytest.approx(theirs.probabilities, abs=1e-5)
        assert ours.extras["calibrated_confidence"] == pytest.approx(theirs.extras["calibrated_confidence"], abs=1e-4)
    # Our own columns, of data:test its domains, are beside them.
    table = parquet.read_table(output / "rows")
    assert {"domain", "split", "calibrated_confidence", "decision", "p_positive"} <= {*table.column_names}

    # A repeated command has nothing to do; another run is refused and nothing of this one is lost.
    code, _, err = ended(start(*command))
    assert code == 0 and "all 2,000 rows of" in err
    code, _, err = ended(start(*command, "--threshold", 0.9))
    assert code == 2 and "was made with other calibrator" in err and "use --overwrite" in err
    assert len(parts(output)) == 8


# On two simulated machines, a tiny model


@pytest.fixture(scope="module")
def cluster():
    """Two machines of one processor each, so that of two workers each has one."""
    from ray.cluster_utils import Cluster

    memory = {"object_store_memory": 100 << 20}
    with socket.create_server(("127.0.0.1", 0)) as free, socket.create_server(("127.0.0.1", 0)) as other:
        ports = {"dashboard_port": free.getsockname()[1], "dashboard_agent_listen_port": other.getsockname()[1]}
        dashboard = {"include_dashboard": True, **ports}
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, **dashboard, **memory})
    cluster.add_node(num_cpus=1, **memory)
    yield cluster
    cluster.shutdown()


@pytest.fixture
def there(cluster):
    """The environment of a driver on that cluster."""
    return {"RAY_ADDRESS": cluster.address}


@pytest.fixture
def tables(tmp_path):
    return write_tables(tmp_path / "tables", 800)


def write_tables(folder, count):
    """A folder of three tables of the user's: an empty text and one too long for the model among them."""
    texts = [f"{('Good', 'Bad')[n % 2]} number {n // 2}" for n in range(count)]
    texts[5], texts[700] = " ", "far too long " * 600
    folder.mkdir()
    for number in range(3):
        rows = [(f"r{n}", texts[n], ("positive", "negative")[n % 2], n * n) for n in range(number, count, 3)]
        with open(folder / f"{number}.csv", "w", newline="") as file:
            csv.writer(file).writerows([("key", "review", "label", "square"), *rows])
    return folder


READ = ["--text-column", "review", "--id-column", "key"]


def expected_rows(scorer, folder):
    rows = []
    for path in sorted(folder.glob("*.csv")):
        rows += scorer.score_together(list(read_examples(str(path), text_column="review", id_column="key")))
    return rows


def collected(start, output, tmp_path):
    """The rows of an output, and each with its own columns."""
    code, _, err = ended(start("--output", output, "--collect", tmp_path / "p.jsonl"))
    assert code == 0, err
    own = parquet.read_table(output / "rows", columns=["id", "square", "review"]).to_pylist()
    return predictions.read(tmp_path / "p.jsonl"), own


def check_alike(ours, theirs):
    assert len(ours) == len(theirs)
    for row, expected in zip(ours, theirs, strict=True):
        assert (row.id, row.text, row.label, row.error) == (expected.id, expected.text, expected.label, expected.error)
        assert row.fingerprint == expected.fingerprint and row.extras == expected.extras
        if not row.error:
            assert row.probabilities == pytest.approx(expected.probabilities, abs=1e-5)


def test_a_folder_on_two_machines_goes_on_after_ctrl_c(start, there, tiny_folder, tmp_path):
    tables = write_tables(tmp_path / "many", 3200)  # so many that a slow Ctrl-C finds some left
    output = tmp_path / "out"
    model = ["--model", tiny_folder, "--adapter", "none"]
    command = ["--input", tables, "--output", output, *READ, *model, "--workers", 2, "--part-rows", 1]
    process = start(*command, **there)
    wait_for(lambda: parts(output), process)
    process.send_signal(signal.SIGINT)
    code, _, err = ended(process)
    assert code == 130 and "repeat the same command to continue where it was" in err and len(parts(output)) < 15
    code, out, err = ended(start(*command, **there))
    assert code == 0 and len(parts(output)) == 15 and "rows in" in out, err  # 1,067 rows of each file, 256 in a part
    rows, own = collected(start, output, tmp_path)
    scorer = label_scorer(load_llama(str(tiny_folder), None, device="cpu"), TASKS["sentiment"])
    check_alike(rows, expected_rows(scorer, tables))
    errors = [row for row in rows if row.error]
    assert [row.id for row in errors] == ["r700", "r5"]
    assert "tokens" in errors[0].error and errors[1].error == "the text is empty"
    assert [int(mine["square"]) for mine in own] == [int(row.id[1:]) ** 2 for row in rows]


def test_a_lost_machine_s_parts_are_scored_by_the_others(start, cluster, there, tables, tiny_folder, tmp_path):
    output = tmp_path / "out"
    third = cluster.add_node(num_cpus=1, object_store_memory=100 << 20)
    model = ["--model", tiny_folder, "--adapter", "none"]
    process = start("--input", tables, "--output", output, *READ, *model, "--workers", 3, "--part-rows", 1, **there)
    wait_for(lambda: parts(output), process)
    cluster.remove_node(third, allow_graceful=False)
    code, out, err = ended(process)
    assert code == 0 and len(parts(output)) == 6 and "scored 800 rows" in out, err
    scorer = label_scorer(load_llama(str(tiny_folder), None, device="cpu"), TASKS["sentiment"])
    check_alike(collected(start, output, tmp_path)[0], expected_rows(scorer, tables))


def test_a_submitted_job_takes_this_folder_along(cluster, tables, tiny_folder, tmp_path):
    def submit(output):
        flags = ["--input", tables, "--output", output, *READ, "--model", tiny_folder, "--adapter", "none"]
        job = [Path(sys.executable).with_name("ray"), "job", "submit", "--working-dir", "."]
        command = [
            *job,
            "--address",
            f"http://{cluster.webui_url}",
            "--",
            sys.executable,
            "scripts/score_on_ray.py",
            *flags,
        ]
        done = subprocess.run([*map(str, command)], cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE_S)
        return done.returncode, done.stdout + done.stderr

    code, said = submit(tmp_path / "out")
    assert code == 0 and "scored 800 rows" in said and len(parts(tmp_path / "out")) == 3, said
    code, said = submit("scored")
    assert code == 1 and "error: --output scored would be in the job's own folder" in said, said


def test_a_probe_scores_as_it_does_alone(start, there, tables, tiny_folder, tmp_path):
    probe, output = tmp_path / "probe", tmp_path / "out"
    model = ["--model", str(tiny_folder), "--adapter", "none"]
    train = ["--train", str(tables / "0.csv"), *READ, "--output-dir", str(probe), *model, "--limit", "60", "--truncate"]
    probe_confidence.main(train)
    flags = ["--input", tables, "--output", output, *READ, *model, "--probe", probe, "--workers", 5]  # for 3 parts
    code, _, err = ended(start(*flags, **there))
    assert code == 0 and "Warning" not in err, err
    rows, _ = collected(start, output, tmp_path)
    scorer = probe_confidence.Classifier(probe, str(tiny_folder), None, device="cpu").scorer
    check_alike(rows, expected_rows(scorer, tables))
    assert any(row.extras.get("trained_on") for row in rows)


def test_what_a_worker_finds_wrong_is_one_line_here(start, there, tables, tiny_folder, tmp_path):
    flags = ["--input", tables, "--output", tmp_path / "out", *READ, "--adapter", "none", "--workers", 2]
    for wrong, problem in (
        (["--model", tiny_folder, "--calibrator", CALIBRATOR], "error: the calibrator is for smollm2-135m-instruct"),
        (["--model", tmp_path / "nowhere"], "error: "),
        (["--model", tiny_folder, "--label-map", "positive=odd"], "has the label 'odd', which task 'sentiment' does"),
    ):
        code, _, err = ended(start(*flags, *wrong, **there))
        assert code == 2 and problem in err and not parts(tmp_path / "out"), err
