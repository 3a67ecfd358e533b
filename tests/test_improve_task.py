"""scripts/improve_task.py: a draft from a table, a search with a real (tiny) model, resumed, and what is written."""

import csv
import json

import numpy as np
import pytest

import improve_task
import task_search
from task import TASKS, Task, read_task, to_toml

pytestmark = pytest.mark.usefixtures("one_tokenizer")
DRAFT = Task("mail", {"ham": ("ham",), "spam": ("spam",)}, "SMS: {text}\nCategory:")
WORDS = [f"word{n}" for n in range(400)]


@pytest.fixture
def table(tmp_path):
    """120 labelled rows, one without a label and one without a text."""
    random = np.random.default_rng(0)
    with open(tmp_path / "mail.csv", "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "kind"])
        for number in range(120):
            writer.writerow([" ".join(random.choice(WORDS, 6)), ["ham", "spam"][number % 3 == 0]])
        writer.writerows([["no label here", ""], ["", "ham"]])
    return tmp_path / "mail.csv"


@pytest.fixture
def improve(table, tiny_folder, tmp_path, capsys):
    """improve(...) -> what is printed on stdout and stderr by a search on the table with a tiny model."""
    (tmp_path / "draft.toml").write_text("# my own words\n" + to_toml(DRAFT), encoding="utf-8")
    fixed = ["--task", str(tmp_path / "draft.toml"), "--input", str(table), "--label-column", "kind"]
    fixed += ["--model", str(tiny_folder), "--device", "cpu", "--output", str(tmp_path / "better.toml")]

    def run(*more):
        improve_task.main([*fixed, *map(str, more)])
        return capsys.readouterr()

    return run


def trials(folder):
    lines = (folder / "better.trials.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines[1:]]


def test_a_search_writes_a_task_that_is_read_back_and_repeating_it_asks_the_model_nothing(improve, tmp_path):
    first = improve("--trials", 8, "--floor", 0)
    lines = first.out.splitlines()
    kept = read_task(str(tmp_path / "better.toml"))
    assert [*kept.labels] == ["ham", "spam"] and "rows left out, empty or too long" in first.err
    verdict = lines[0].partition(":")[0]
    assert verdict in ("better than the draft", "the draft is as good, so it is kept") or "nothing that was" in verdict
    assert "on 40 rows that chose nothing" in first.out and "on rows that chose (so too good)" in first.out
    if not verdict.startswith("better"):
        assert (tmp_path / "better.toml").read_bytes() == (tmp_path / "draft.toml").read_bytes()
    made = (tmp_path / "better.trials.jsonl").read_bytes(), (tmp_path / "better.toml").read_bytes()
    assert improve("--trials", 8, "--floor", 0).out == first.out
    assert made == ((tmp_path / "better.trials.jsonl").read_bytes(), (tmp_path / "better.toml").read_bytes())
    held_out = [trial for trial in trials(tmp_path) if trial.get("part") == "held out"]
    assert len(held_out) <= 2 and all(len(trial["probabilities"]) == 40 for trial in held_out)


def test_without_a_draft_the_search_begins_with_a_first_task_from_the_table(table, tiny_folder, tmp_path, capsys):
    output = tmp_path / "better.toml"
    arguments = ["--input", str(table), "--label-column", "kind", "--output", str(output), "--trials", "2"]
    improve_task.main([*arguments, "--model", str(tiny_folder), "--device", "cpu"])
    (header, *_) = (tmp_path / "better.trials.jsonl").read_text(encoding="utf-8").splitlines()
    first = Task("mail", DRAFT.labels, "Text: {text}\nKind:")
    assert json.loads(header)["draft"] == first.settings() and [*read_task(str(output)).labels] == ["ham", "spam"]
    assert str(output) in capsys.readouterr().out


def test_scores_are_those_that_method_1_gives(improve, table, tiny_folder, tmp_path):
    from llama import load_llama
    from logprobs_confidence import label_scorer
    from tables import read_examples

    improve("--trials", 4)
    llama = load_llama(str(tiny_folder), device="cpu")
    examples = [e for e in read_examples(str(table), label_column="kind") if e.label and e.text.strip()]
    parts = task_search.split_rows(examples, DRAFT)
    asked = [trial for trial in trials(tmp_path) if trial.get("part") == "search"]
    assert len({trial["key"] for trial in asked}) == 4
    for trial in asked:
        task = Task.from_settings(json.loads(trial["key"]))
        shown = {text for text, _ in task.examples}
        assert shown <= {e.text for e in parts["examples"].examples}  # those of no row that is scored
        end = trial["from"] + len(trial["probabilities"])
        rows = label_scorer(llama, task).score_together(parts["search"].examples[trial["from"] : end])
        expected = [[*row.probabilities.values()] for row in rows]
        assert np.array(trial["probabilities"]) == pytest.approx(np.array(expected), abs=1e-5)


def test_a_search_that_was_killed_goes_on_and_ends_the_same(improve, tmp_path, monkeypatch):
    whole = improve("--trials", 8, "--floor", 0).out
    log = tmp_path / "better.trials.jsonl"
    lines = log.read_bytes().splitlines(keepends=True)
    log.write_bytes(b"".join(lines[:4]) + lines[4][:20])
    asked = []
    evaluate = improve_task.evaluate
    monkeypatch.setattr(improve_task, "evaluate", lambda *given: asked.append(given[1]) or evaluate(*given))
    again = improve("--trials", 8, "--floor", 0).out
    for ours, theirs in zip(again.splitlines()[:-1], whole.splitlines()[:-1], strict=True):
        assert ours.rpartition("  ")[0] == theirs.rpartition("  ")[0]  # but for the milliseconds of what is asked anew
    assert 0 < len(asked) < len(lines)


def test_an_output_that_no_search_has_made_and_a_log_of_another_are_not_touched(improve, tmp_path):
    (tmp_path / "better.toml").write_text("mine", encoding="utf-8")
    with pytest.raises(ValueError, match="--overwrite"):
        improve("--trials", 2)
    improve("--trials", 2, "--overwrite")
    with pytest.raises(ValueError, match=r"another search.*--overwrite"):
        improve("--trials", 2, "--seed", 1)
    improve("--trials", 2, "--seed", 1, "--overwrite")
    with pytest.raises(ValueError, match="both input and output"):
        improve("--output", tmp_path / "draft.toml")


def test_words_that_do_not_work_are_told_before_the_weights_are_read(improve, tmp_path, tiny_folder, monkeypatch):
    bad = Task("mail", {"ham": ("not spam",), "spam": ("UNSOLICITED",)}, "{text}\nCategory:")
    (tmp_path / "draft.toml").write_text(to_toml(bad), encoding="utf-8")
    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", lambda *_, **__: 1 / 0)
    with pytest.raises(ValueError, match=r"'not spam' of label 'ham'.*'UNSOLICITED' of label 'spam'"):
        improve("--trials", 2)


def test_the_winner_is_written_with_what_is_known_of_it(tmp_path):
    scores = [
        task_search.Score(np.full(40, loss), np.ones(40, dtype=bool), mass, 0.01)
        for loss, mass in ((1, 0.1), (0.5, 0.9))
    ]
    found = task_search.Confirmation(40, *scores, (-0.5, -0.6, -0.4), "ham", 0.7, 0.6, True)
    winner = improve_task.Candidate(TASKS["sentiment"], "plain, no example", debias=True)
    content = improve_task.task_file([task_search.Ranked(winner, 80, scores[1])], found, DRAFT, "sentiment", 0.2)
    (tmp_path / "t.toml").write_text(content, encoding="utf-8")
    assert read_task(str(tmp_path / "t.toml")) == TASKS["sentiment"]
    assert content.startswith("# plain, no example\n# better than the draft: log loss -0.500 [-0.600, -0.400]")
    assert "--debias batch" in content.partition("name =")[0]


def test_a_first_task_is_written_from_a_table_alone(table, tmp_path, capsys):
    improve_task.main(["--draft", str(table), "--label-column", "kind"])
    printed = capsys.readouterr().out
    improve_task.main(["--draft", str(table), "--label-column", "kind", "--output", str(tmp_path / "d.toml")])
    assert (tmp_path / "d.toml").read_text(encoding="utf-8") == printed
    assert read_task(str(tmp_path / "d.toml")) == Task("mail", DRAFT.labels, "Text: {text}\nKind:")
    with pytest.raises(ValueError, match="--overwrite"):
        improve_task.main(["--draft", str(table), "--label-column", "kind", "--output", str(tmp_path / "d.toml")])


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["--input", "t.csv"],
        ["--input", "t.csv", "--draft", "t.csv"],
        ["--input", "t.csv", "--output", "t.json"],
        ["--input", "t.csv", "--output", "t.toml", "--minutes", "0"],
        ["--input", "t.csv", "--output", "t.toml", "--trials", "1"],
    ],
)
def test_arguments_that_say_too_little_are_refused(arguments, capsys):
    with pytest.raises(SystemExit) as caught:
        improve_task.parse_arguments(arguments)
    assert caught.value.code == 2 and capsys.readouterr().err.startswith("error: ")
