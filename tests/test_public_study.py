"""Which rows the study on public data draws, how its tables reach the pages, and what it refuses."""

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import public_study
import study_tables
from near_duplicates import duplicate_groups
from tables import Example, read_examples
from task import read_task


def made_examples(n=900, seed=0):
    """Rows of which every third has a near-duplicate."""
    draw = np.random.default_rng(seed)
    words = [f"word{number}" for number in range(3000)]
    texts = [" ".join(draw.choice(words, 12)) for _ in range(n)]
    texts += [f"{text} again" for text in texts[::3]]
    return [Example(str(number), text, "ham" if draw.random() < 0.7 else "spam") for number, text in enumerate(texts)]


def test_whole_groups_are_drawn_and_no_unseen_row_has_a_near_duplicate_among_the_labelled():
    drawn, groups = public_study.draw_rows(made_examples(), labelled=300)
    assert len(drawn) == len(groups) == 300 + public_study.UNSEEN
    assert len({example.id for example in drawn}) == len(drawn)
    truth = np.array(duplicate_groups([example.text for example in drawn]))
    assert not set(truth[:300]) & set(truth[300:])
    assert not set(groups[:300]) & set(groups[300:])
    assert public_study.draw_rows(made_examples(), labelled=300)[0] == drawn
    # The unseen rows do not hang on how many labelled ones are taken.
    assert public_study.draw_rows(made_examples(), labelled=100)[0][100:] == drawn[300:]
    with pytest.raises(ValueError, match="too few for 5,000 labelled"):
        public_study.draw_rows(made_examples(), labelled=5000)


def test_sets_are_read_as_they_are_downloaded_and_their_drafts_know_the_labels(tmp_path):
    files = {
        "sst2_dev.tsv": "fine\t1\ndull\t0\n",
        "spam.csv": 'ham,"hello, you",,,\nspam,win,,,\n',
        "airline.csv": "tweet_id,airline_sentiment,text\n1,neutral,where\n1,negative,late\n",
        "trec_train.txt": "DESC:manner Why ?\nNUM:count How many ?\n",
        "agnews_test.csv": '"3","Shares","They fell."\n"4","Moon","A probe."\n',
        "tickets_pt.csv": f"categoria;descricao_reclamacao\nOutros;{'a' * 500}\n",
        "banking77_train.csv": "text,category\nWhere is it?,card_arrival\n",
        "banking77_test.csv": "text,category\nWhich PIN?,change_pin\n",
    }
    for name, content in files.items():
        (tmp_path / name).write_text(content, encoding="latin-1")
    read = {name: public_study.read_set(chosen, tmp_path, None)[1] for name, chosen in public_study.SETS.items()}
    assert [(e.text, e.label) for e in read["trec"]] == [("Why ?", "DESC"), ("How many ?", "NUM")]
    assert [(e.text, e.label) for e in read["sst2"]] == [("fine", "positive"), ("dull", "negative")]
    assert [e.label for e in read["agnews"]] == ["Business", "Sci/Tech"] and "fell" in read["agnews"][0].text
    assert [e.id for e in read["banking77"]] == ["1", "2"] and len(read["tickets"][0].text) == 400
    for name, examples in read.items():
        task = read_task(public_study.task_of(name))
        assert {example.label for example in examples} <= set(task.labels), name


def test_our_own_rows_stay_in_their_split(tmp_path):
    work, source = public_study.prepare(public_study.OURS, tmp_path, None, None)
    ids = [example.id for example in work.examples]
    assert source == "data:train + data:test" and len(ids) == 8000 == len(set(ids))
    assert {id.partition("-")[0] for id in ids[:6000]} == {"train"}
    assert ids[6000:] == [example.id for example in read_examples("data:test")]
    assert ids[:200] != sorted(ids[:200]) and not set(work.rows.groups[:6000]) & set(work.rows.groups[6000:])


def test_another_table_takes_the_place_of_a_set(tmp_path):
    (tmp_path / "mine.csv").write_text("message,kind\nhello,ham\nwin,spam\n")
    chosen = public_study.SETS["sms"]
    source, examples = public_study.read_set(chosen, None, f"{tmp_path / 'mine.csv'},message,kind")
    assert source == "mine.csv" and [(e.text, e.label) for e in examples] == [("hello", "ham"), ("win", "spam")]
    with pytest.raises(ValueError, match=r"SMS spam: --data FOLDER with spam\.csv"):
        public_study.read_set(chosen, None, None)
    with pytest.raises(ValueError, match=r"no such file: .*spam\.csv, of SMS spam; --source takes a set from another"):
        public_study.read_set(chosen, tmp_path, None)


def test_a_set_is_run_recorded_skipped_and_refused_on_other_rows(tmp_path, monkeypatch, capsys):
    lines = [f"{example.label},{example.text}" for example in made_examples(200)]
    (tmp_path / "spam.csv").write_text("\n".join(lines))
    monkeypatch.setattr(public_study, "RECORDINGS", tmp_path / "recorded")
    monkeypatch.setattr(public_study, "UNSEEN", 60)
    monkeypatch.setitem(public_study.SETS, "sms", replace(public_study.SETS["sms"], sizes=(60, 120)))
    command = ["sms", "--data", str(tmp_path), "--work", str(tmp_path / "work"), "--method", "bag-of-words"]
    public_study.main(command)
    path = tmp_path / "recorded" / "sms.jsonl.gz"
    study = study_tables.read_study(path)
    assert [(run.method, run.n) for run in study.runs] == [("bag of words", n) for n in (60, 120)]
    assert all(len(run.probabilities) == run.n + 60 for run in study.runs)
    made = path.stat().st_mtime_ns
    public_study.main(command)
    assert path.stat().st_mtime_ns == made and "all recorded" in capsys.readouterr().err
    public_study.main([*command[:1], "--recorded"])
    assert "| bag of words | 120 |" in capsys.readouterr().out
    (tmp_path / "spam.csv").write_text("\n".join(line + " more" for line in lines))
    study_tables.write_study(path, replace(study, runs=study.runs[:1]))
    with pytest.raises(ValueError, match="recorded on other rows"):
        public_study.main(command)


def test_a_command_that_fails_is_named_and_its_seconds_are_kept(tmp_path, monkeypatch):
    rows = public_study.rows_of(made_examples(20), range(len(made_examples(20))), ["ham", "spam"], 10)
    work = public_study.Work("sms", None, made_examples(20), rows, tmp_path)
    with pytest.raises(ValueError, match="exit code 3"):
        work.run("draft", "-c", "import sys; sum(range(10**6)); sys.exit(3)")
    with pytest.raises(KeyboardInterrupt):
        work.run("draft", "-c", "import sys; sys.exit(130)")
    assert work.seconds("draft") > 0 and work.seconds("search") == 0


def test_blocks_of_a_page_are_replaced_and_others_stay():
    page = "# A\n<!-- study trec -->\n\nold\n\n<!-- end -->\ntail\n<!-- study sms -->\n<!-- end -->\n"
    after = public_study.with_blocks(page, {"study trec": "| new |", "study other": "x"})
    assert after == page.replace("old", "| new |")
    assert public_study.with_blocks(after, {"study trec": "| new |"}) == after


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["nothing"], "no set 'nothing'"),
        ([], "either --recorded"),
        (["--recorded", "--work", "x"], "either --recorded"),
        (["--work", str(Path(public_study.ROOT) / "x"), "--data", "y"], "outside the project"),
    ],
)
def test_bad_arguments_are_refused(arguments, message, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["public_study.py"])
    with pytest.raises(SystemExit) as stopped:
        public_study.main(arguments)
    assert stopped.value.code == 2 and message in capsys.readouterr().err


def test_a_line_of_a_page_is_what_its_recording_gives():
    study = study_tables.read_study(public_study.RECORDINGS / "sms.jsonl.gz")
    run = next(run for run in study.runs if run.method == study_tables.PROBE and run.n == 100)
    draft = next((run for run in study.runs if run.method == study_tables.DRAFT), None)
    found = study_tables.measure_run(study.rows, run, 100, draft)
    line = study_tables.study_table(study, [found]).splitlines()[-1]
    assert line in (public_study.ROOT / "docs" / "study.md").read_text(encoding="utf-8")


@pytest.mark.study
def test_all_tables_of_the_pages_are_what_the_recordings_give():
    blocks = public_study.all_tables(study_tables.measured_studies(public_study.RECORDINGS, public_study.SETS))
    paths = [public_study.ROOT / "README.md", *(public_study.ROOT / "docs").glob("*.md")]
    pages = {path: path.read_text(encoding="utf-8") for path in paths}
    for path, page in pages.items():
        assert public_study.with_blocks(page, blocks) == page, path.name
    for name in blocks:
        assert any(f"<!-- {name} -->" in page for page in pages.values()), name
