"""A million rows: read, reported on and searched in bounded memory and in minutes, each in a process of its own."""

import csv
import json
import random
import subprocess
import sys
from pathlib import Path

import pyarrow.csv
import pytest
from pyarrow import parquet

ROOT = Path(__file__).parent.parent
ROWS = 1_000_000
pytestmark = pytest.mark.study

MEASURED = """if True:
    import json, resource, sys
    import numpy

    def peak():  # in MiB; Linux counts in KiB
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

    before = peak()
    {code}
    print(json.dumps([result, peak() - before]))
"""


def measured(code, *arguments):
    """(`result` of the code, MiB above an interpreter with numpy)."""
    command = [sys.executable, "-c", MEASURED.format(code=code), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=600)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    """A million texts of 5 to 15 words, as frequent as Zipf has it; every tenth is the one before with a word more."""
    path = tmp_path_factory.mktemp("scale") / "t.csv"
    draw = random.Random(0)
    words = [f"word{int(50_000 ** draw.random())}" for _ in range(100_000)]
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("id", "text", "label"))
        text = ""
        for number in range(ROWS):
            text = f"{text} more" if number % 10 == 9 else " ".join(draw.choices(words, k=draw.randint(5, 15)))
            writer.writerow((f"row-{number:07}", text, ("negative", "positive")[number % 2]))
    return path


@pytest.mark.parametrize(("suffix", "limit"), [(".csv", 100), (".parquet", 200)])  # of which pyarrow takes 40
def test_reading_and_checking_keeps_eight_bytes_a_row(table, suffix, limit):
    if suffix == ".parquet":
        parquet.write_table(pyarrow.csv.read_csv(table), table.with_suffix(suffix))
    code = """
    from tables import open_table
    from task import check_examples, read_task
    result = check_examples(open_table(sys.argv[1]), read_task("sentiment"))
    """
    rows, memory = measured(code, table.with_suffix(suffix))
    assert rows == ROWS and memory < limit


def test_a_report_keeps_numbers_and_a_sample_of_the_texts(tmp_path):
    line = {"label": "positive", "prediction": "positive", "confidence": 0.75}
    line |= {"probabilities": {"negative": 0.25, "positive": 0.75}, "label_mass": 0.9, "method": "m", "model": "m"}
    line |= {"task": "t", "fingerprint": "00000000"}
    other = line | {"label": "negative"}
    with open(tmp_path / "p.jsonl", "w", encoding="utf-8") as file:
        for number in range(ROWS):
            text = " ".join(f"word{number // step % 89}" for step in (1, 7, 89, 503, 1009, 7919, 89, 3)) * 2
            file.write(json.dumps({"id": str(number), "text": text} | (line if number % 4 else other)) + "\n")
    report, memory = measured("import scoring; result = scoring.report(sys.argv[1])", tmp_path / "p.jsonl")
    for named in ("accuracy 0.750", "n = 1,000,000 labelled rows, 2,000 of them drawn", "AUC of P(positive) 0.500"):
        assert named in report
    assert memory < 250  # scikit-learn takes 80 of it


def test_near_duplicates_are_grouped_in_less_than_a_gigabyte_and_a_half(table):
    code = """
    from near_duplicates import duplicate_groups
    from tables import open_table
    groups = duplicate_groups(example.text for example in open_table(sys.argv[1]))
    result = sum(groups[n] == groups[n - 1] for n in range(9, len(groups), 10))
    """
    linked, memory = measured(code, table)
    assert linked == ROWS // 10 and memory < 1500
