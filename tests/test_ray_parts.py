"""scripts/score_on_ray.py and its files, without Ray: what is read, what is written, what is refused."""

import gzip
import json
import random
import re
import socket
from dataclasses import replace

import pyarrow
import pytest
from pyarrow import parquet

import predictions
import score_on_ray
from files import whole_file
from ray_parts import (
    FLAGS,
    OutputSchema,
    RunRecord,
    begin_run,
    collect,
    finished_parts,
    numbered_sources,
    own_names,
    read_parts,
    read_run,
    to_table,
    write_bytes,
    write_part,
)
from ray_sources import check_sources, examine, list_sources
from ray_worker import PartReader, PartScorer, pack, unpack
from task import TASKS

TASK = TASKS["sentiment"]
COMMON = {"method": "logprobs", "model": "m", "task": "sentiment", "fingerprint": "abc"}
READ_AS = {"text": "text", "label": "label", "id": "id"}


def write_csv(path, rows, header="text,label"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join([header, *rows]) + "\n", encoding="utf-8")
    return path


def scored(examples, flags=()):
    """A made-up prediction for each example; every third row could not be scored."""
    rows = []
    for number, example in enumerate(examples):
        identity = TASK.identify(example)
        if number % 3 == 2:
            rows.append(predictions.failed(*identity, "the text is empty", **COMMON))
            continue
        p = random.Random(example.text).random()
        by_label = {"negative": 1 - p, "positive": p}
        rows.append(predictions.scored(*identity, by_label, 0.875, **COMMON, extras=dict.fromkeys(flags, True)))
    return rows


def run_on(files, part_rows=4, columns=None):
    """A run on these files, as the driver records it."""
    columns = columns or {}
    facts = [examine(str(file), TASK, columns)[0] for file in files]
    own = own_names(facts[0].columns, READ_AS, list(TASK.labels), False)
    sources = numbered_sources(facts)
    fields = {"labels": list(TASK.labels), "part_rows": part_rows, "sources": sources, "columns": columns, "own": own}
    return RunRecord(**COMMON, **fields, calibrator=None)


def score_all(run, output, names=None):
    """Write the parts of a run, or some of them; returns all its predictions in order."""
    rows = []
    for source in run.sources:
        for part in read_parts(source, run.columns, run.schema, run.part_rows):
            rows += scored(part.examples)
            if names is None or part.name in names:
                write_part(str(output), part.name, to_table(scored(part.examples), part.own, run.schema))
    return rows


# What is read


def test_folders_patterns_and_files_name_their_tables_in_order(tmp_path):
    for name in ("b.csv", "a.jsonl", "sub/c.parquet", "sub/d.csv.gz", ".hidden/e.csv", "_tmp.csv", "notes.md"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text("x")
    listed = lambda *names: [s.removeprefix(f"{tmp_path}/") for s in list_sources([f"{tmp_path}/{n}" for n in names])]  # noqa: E731
    assert list_sources([str(tmp_path)]) == list_sources([f"{tmp_path}/"])
    assert listed("") == ["a.jsonl", "b.csv", "sub/c.parquet", "sub/d.csv.gz"]
    assert listed("*.csv") == ["b.csv"] and listed("*/*.csv*") == ["sub/d.csv.gz"]
    assert listed("sub/d.csv.gz", "b.csv") == ["sub/d.csv.gz", "b.csv"]
    assert list_sources(["data:test", "hf:some/name"]) == ["data:test", "hf:some/name"]
    for names, problem in ([["absent"], "no such file or folder"], [["*.tsv"], "holds no table"]):
        with pytest.raises(ValueError, match=problem):
            listed(*names)
    with pytest.raises(ValueError, match=r"b\.csv twice"):
        listed("b.csv", "*.csv")


def test_what_is_wrong_in_a_file_or_between_files_is_told_before_any_model(tmp_path):
    first = write_csv(tmp_path / "1.csv", ["a,x", "b,y"], "id,text")
    examined = lambda path, **columns: examine(str(path), TASK, columns)  # noqa: E731
    facts, hashes = examined(first)
    assert (facts.rows, facts.is_numbered, facts.columns) == (2, False, {"id": "string", "text": "string"})
    other, same = examined(write_csv(tmp_path / "2.csv", ["b,z"], "id,text"))
    with pytest.raises(ValueError, match="1 ids stand in more than one file"):
        check_sources([facts, other], [hashes, same])
    numbered = [examined(path, id_column="") for path in (first, tmp_path / "2.csv")]
    check_sources([facts for facts, _ in numbered], [hashes for _, hashes in numbered])
    wider, more = examined(write_csv(tmp_path / "3.csv", ["c,z,1"], "id,text,stars"))
    with pytest.raises(ValueError, match="have different columns, as 'stars'"):
        check_sources([facts, wider], [hashes, more])
    with pytest.raises(ValueError, match="label 'so-so'"):
        examined(write_csv(tmp_path / "4.csv", ["x,so-so"]))
    with pytest.raises(ValueError, match="id of an earlier row"):
        examined(write_csv(tmp_path / "5.csv", ["a,x", "a,y"], "id,text"))


def test_row_numbers_of_several_files_name_one_row_and_of_one_file_are_the_scripts(tmp_path):
    files = [write_csv(tmp_path / name, ["x,", "y,"]) for name in ("2025/a.csv", "2025/b.csv", "2026/a.csv")]
    run = run_on(files)
    ids = [e.id for s in run.sources for part in read_parts(s, {}, run.schema, 4) for e in part.examples]
    assert ids == ["2025/a.csv:1", "2025/a.csv:2", "2025/b.csv:1", "2025/b.csv:2", "2026/a.csv:1", "2026/a.csv:2"]
    assert [source.id_prefix for source in run_on(files[:1]).sources] == [""]


# What is written


def test_parquet_columns_keep_their_types_and_names_that_are_taken_get_another(tmp_path):
    columns = {"id": ["a", "b"], "text": ["x", "y"], "stars": [5, None], "error": ["own", None], "tags": [["p"], []]}
    parquet.write_table(pyarrow.table(columns), tmp_path / "t.parquet")
    run = run_on([tmp_path / "t.parquet"])
    assert run.own == {"stars": ("stars", "int64"), "own_error": ("error", "string"), "tags": ("tags", "string")}
    (part,) = read_parts(run.sources[0], {}, run.schema, 10)
    table = to_table(scored(part.examples), part.own, run.schema)
    assert table["stars"].to_pylist() == [5, None] and table["stars"].type == pyarrow.int64()
    assert table["own_error"].to_pylist() == ["own", None] and table["error"].to_pylist() == [None, None]
    assert table["tags"].to_pylist() == ['["p"]', "[]"] and table["id"].to_pylist() == ["a", "b"]
    # All parts have one schema, whatever they hold.
    assert to_table([], part.own.slice(0, 0), run.schema).schema == table.schema


def test_a_part_crosses_to_a_worker_as_it_is(tmp_path):
    run = run_on([write_csv(tmp_path / "t.csv", ["x,positive,1", "y,,2"], "text,label,stars")])
    (part,) = read_parts(run.sources[0], {}, run.schema, 10)
    there = unpack(pack(part))
    assert (there.name, there.examples) == (part.name, part.examples) and there.own.equals(part.own)


def test_collected_rows_are_the_scored_ones_in_the_input_s_order(tmp_path):
    files = [write_csv(tmp_path / f"{n}.csv", [f"text {n} {i},positive" for i in range(9)]) for n in range(2)]
    run, output = run_on(files), tmp_path / "out"
    assert [*run.part_names().values()] == [4, 4, 1] * 2 and run.total == 18
    begin_run(str(output), run, None, False)
    last = [*run.part_names()][-1]
    score_all(run, output, set(run.part_names()) - {last})
    with pytest.raises(ValueError, match=r"1 of 18 rows of .* are not scored yet; repeat its command"):
        collect(str(output), tmp_path / "p.jsonl")
    expected = score_all(run, output, {last})
    assert finished_parts(str(output)) == set(run.part_names())
    assert collect(str(output), tmp_path / "p.jsonl") == 18
    assert list(predictions.iterate(tmp_path / "p.jsonl")) == expected
    assert collect(str(output), tmp_path / "some.jsonl", sample=5, seed=3) == 5
    drawn = sorted(random.Random(3).sample(range(18), 5))
    assert list(predictions.iterate(tmp_path / "some.jsonl")) == [expected[number] for number in drawn]


def test_a_part_whose_writer_was_killed_is_not_read_with_the_folder(tmp_path):
    run, rows = run_on([write_csv(tmp_path / "a.csv", [f"text {i},positive" for i in range(9)])]), tmp_path / "out/rows"
    score_all(run, tmp_path / "out")
    name = run.sources[0].part_name(0)
    with whole_file(rows / name) as scratch, whole_file(rows / name) as another:  # as the same part's second worker
        for half in (scratch, another):
            half.write_bytes((rows / name).read_bytes())
        assert len([*rows.iterdir()]) == 3 + 2
        assert parquet.read_table(rows).num_rows == 9 and len(finished_parts(str(tmp_path / "out"))) == 3


def test_flags_calibrated_columns_and_whatever_else_a_row_says_come_back(tmp_path):
    run = run_on([write_csv(tmp_path / "t.csv", ["x,positive", "y,negative"])])
    (part,) = read_parts(run.sources[0], {}, run.schema, 10)
    rows = scored(part.examples, FLAGS)
    added = {"calibrated_confidence": 0.5, "decision": "review", "shortlist": ["positive", "negative"], "odd": [1, {}]}
    rows = [replace(row, extras=row.extras | added) for row in rows]
    schema = OutputSchema(run.own, run.labels, True)
    calibrated = replace(run, calibrator="0123, threshold None")
    begin_run(str(tmp_path / "out"), calibrated, None, False)
    write_part(str(tmp_path / "out"), part.name, to_table(rows, part.own, schema))
    collect(str(tmp_path / "out"), tmp_path / "p.jsonl")
    assert list(predictions.iterate(tmp_path / "p.jsonl")) == rows


def test_input_and_output_may_be_on_s3(fake, tmp_path):
    fake.client("s3").create_bucket(Bucket="bucket-1")
    address, host = "s3://bucket-1", fake.env["AWS_ENDPOINT_URL"].removeprefix("http://")
    query = f"?endpoint_override={host}&scheme=http&region=us-east-1"
    for name in ("a.csv", "sub/b.csv.gz", "_left_out.csv"):
        data = b"text,label\nx,positive\ny,negative\nz,\n"
        write_bytes(f"{address}/in/{name}{query}", gzip.compress(data) if name.endswith("gz") else data)
    sources = list_sources([f"{address}/in{query}"])
    assert sources == [f"{address}/in/{name}{query}" for name in ("a.csv", "sub/b.csv.gz")]
    assert list_sources([f"{address}/in/*/*.gz{query}"]) == sources[1:]
    run, output = run_on(sources, part_rows=2), f"{address}/out{query}"
    begin_run(output, run, read_run(output), False)
    rows = score_all(run, output)
    assert read_run(output) == run and finished_parts(output) == set(run.part_names())
    assert [row.id for row in rows][-1] == "sub/b.csv.gz:3"
    assert collect(output, tmp_path / "p.jsonl") == 6 and predictions.read(tmp_path / "p.jsonl") == rows
    begin_run(output, replace(run, fingerprint="def"), run, True)
    assert not finished_parts(output)


# Whose output it is


def test_an_output_of_another_run_is_refused_and_replaced_only_when_told(tmp_path):
    file, output = write_csv(tmp_path / "t.csv", ["x,positive"]), str(tmp_path / "out")
    run = run_on([file])
    assert read_run(output) is None
    begin_run(output, run, None, False)
    score_all(run, output)
    assert read_run(output) == run
    begin_run(output, run, read_run(output), False)  # the same again
    assert len(finished_parts(output)) == 1
    for other, problem in (
        (replace(run, fingerprint="def"), r"other fingerprint \(abc, now def\)"),
        (replace(run, columns={"limit": 3}), "other columns"),
        (run_on([write_csv(tmp_path / "u.csv", ["y,positive"])]), "other sources"),
    ):
        with pytest.raises(ValueError, match=problem):
            begin_run(output, other, read_run(output), False)
    begin_run(output, replace(run, fingerprint="def"), read_run(output), True)
    assert finished_parts(output) == frozenset() and read_run(output).fingerprint == "def"


def test_a_worker_tells_what_is_wrong_instead_of_dying_of_it(tmp_path):
    file, output = write_csv(tmp_path / "t.csv", ["x,positive"]), str(tmp_path / "out")
    run = run_on([file])
    read, unseen = PartReader(run, output), r"a worker's machine does not see this run in .*out; give an address that"
    (batch,) = read({"number": [0]})
    told = PartScorer(None, run, output)(batch)  # without loading a model
    assert told["rows"] == [0] and re.match(unseen, told["problem"][0])
    begin_run(output, replace(run, fingerprint="def"), None, False)  # another's
    assert re.match(unseen, PartScorer(None, run, output)(batch)["problem"][0])
    file.unlink()
    (batch,) = read({"number": [0]})
    assert "t.csv" in batch["problem"][0] and PartScorer(None, run, output)(batch)["problem"] == batch["problem"]


@pytest.mark.parametrize("form", ["127.0.0.1:{}", "ray://[127.0.0.1]:{}"])  # brackets as of an IPv6 address
def test_a_cluster_that_is_not_there_is_told_at_once(form):
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = form.format(server.getsockname()[1])
        score_on_ray.check_address(address)
    with pytest.raises(OSError, match=f"no Ray answers at RAY_ADDRESS={re.escape(address)}"):
        score_on_ray.check_address(address)
    score_on_ray.check_address("auto")


@pytest.mark.parametrize(
    ("flags", "refused"),
    [
        ("--input t.csv --output scored", "--output scored"),
        ("--output /shared/scored --collect p.jsonl", "--collect p.jsonl"),
        ("--input t.csv --output s3://bucket/scored", None),
        ("--output /shared/scored --collect /shared/p.jsonl", None),
    ],
)
def test_a_job_does_not_write_into_its_own_copy_of_the_folder(flags, refused, monkeypatch, capsys):
    score_on_ray.parse_arguments(flags.split())  # no job
    monkeypatch.setenv(score_on_ray.IN_A_JOB, "{}")
    if refused is None:
        score_on_ray.parse_arguments(flags.split())
        return
    with pytest.raises(SystemExit) as stop:
        score_on_ray.parse_arguments(flags.split())
    assert stop.value.code == 2
    assert f"error: {refused} would be in the job's own folder" in capsys.readouterr().err


def test_a_folder_of_something_else_is_left_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("x")
    with pytest.raises(ValueError, match="holds something else"):
        read_run(str(tmp_path))
    (tmp_path / "run.json").write_text(json.dumps({"fingerprint": 1}))
    with pytest.raises(ValueError, match=r"run\.json: fingerprint"):
        read_run(str(tmp_path))
