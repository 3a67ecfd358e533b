"""scripts/label_next.py: a random part that is random, a chosen part that is hard and diverse, and both marked."""

import csv

import numpy as np
import pytest
from scipy.stats import chisquare

import label_next
import predictions

COMMON = {"method": "logprobs", "model": "m", "task": "t", "fingerprint": "f"}


def row(number, confidence, text=None, label=None):
    by_label = {"a": confidence, "b": 1 - confidence}
    return predictions.scored(f"r{number}", text or f"text number {number}", label, by_label, 1.0, **COMMON)


def choices(confidence, threshold=None, groups=None):
    groups = np.arange(len(confidence)) if groups is None else np.array(groups)
    return label_next.Unlabelled(np.array(confidence), groups, threshold)


def draw(seed=0):
    return np.random.default_rng(seed)


@pytest.fixture
def table(tmp_path):
    """60 unlabelled rows, one labelled and one that failed, and the table that they were scored from."""
    random = draw(1)
    rows = [row(number, 0.5 + random.uniform(0, 0.5)) for number in range(60)]
    rows += [row(60, 0.5, label="a"), predictions.failed("r61", "", None, "the text is empty", **COMMON)]
    path = tmp_path / "p.jsonl"
    predictions.replace(path, rows)
    with open(tmp_path / "t.csv", "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["id", "owner", "text", "label"])
        writer.writerows((one.id, f"owner {n % 7}", one.text, one.label or "") for n, one in enumerate(rows))
    return path


def read_table(path):
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


# Choosing


def test_the_chosen_rows_are_the_least_certain_and_those_nearest_the_threshold_in_turn():
    confidence = [0.99, 0.5, 0.81, 0.6, 0.7, 0.795, 0.55]
    assert set(label_next.choose_rows(choices(confidence), 3, 0, draw())) == {1, 6, 3}
    found = label_next.choose_rows(choices(confidence, threshold=0.8), 4, 0, draw())
    assert set(found) == {1, 5, 6, 2} and set(found.values()) == {"chosen"}


def test_no_chosen_row_is_a_near_duplicate_of_another_that_is_taken():
    confidence = np.linspace(0.5, 1, 200)
    groups = np.arange(200) // 4
    for seed in range(20):
        found = label_next.choose_rows(choices(confidence, 0.8, groups), 40, 20, draw(seed))
        chosen = [groups[number] for number, purpose in found.items() if purpose == "chosen"]
        random = {groups[number] for number, purpose in found.items() if purpose == "random"}
        assert len(found) == 40 and len(set(chosen)) == len(chosen) == 20 and not random & set(chosen)


def test_every_row_is_as_likely_to_be_random_whatever_its_confidence():
    # Drawn from what the chosen rows leave, the least certain rows would hardly ever be among the random ones.
    count, repeats = np.zeros(20), 2000
    for seed in range(repeats):
        found = label_next.choose_rows(choices(np.linspace(0.5, 1, 20), 0.6), 10, 5, draw(seed))
        count[[number for number, purpose in found.items() if purpose == "random"]] += 1
    assert count.sum() == 5 * repeats and chisquare(count).pvalue > 1e-3


def test_who_stops_early_has_labelled_a_random_part_too():
    first = sum(
        next(iter(label_next.choose_rows(choices(np.linspace(0.5, 1, 30)), 10, 5, draw(seed)).values())) == "random"
        for seed in range(400)
    )
    assert 150 < first < 250


def test_with_fewer_rows_than_are_asked_for_all_are_taken():
    assert set(label_next.choose_rows(choices([0.6, 0.7, 0.8]), 50, 25, draw())) == {0, 1, 2}


# The table


def test_the_table_holds_unlabelled_rows_without_the_models_answers(table, tmp_path, capsys):
    output = tmp_path / "to_label.csv"
    label_next.main([str(table), "--n", "20", "--threshold", "0.8", "--output", str(output)])
    rows = read_table(output)
    assert list(rows[0]) == ["id", "text", "label", "purpose"] and {one["label"] for one in rows} == {""}
    assert sorted(one["purpose"] for one in rows) == ["chosen"] * 10 + ["random"] * 10
    by_id = {one.id: one for one in predictions.read(table)}
    assert all(by_id[one["id"]].text == one["text"] for one in rows) and not {"r60", "r61"} & {r["id"] for r in rows}
    assert "10 random, 10 chosen, of 60 rows without a label" in capsys.readouterr().out
    before = output.read_bytes()
    label_next.main([str(table), "--n", "20", "--threshold", "0.8", "--output", str(output)])
    assert output.read_bytes() == before  # the same seed


def test_labels_that_somebody_has_filled_in_are_not_lost(table, tmp_path, capsys):
    output = tmp_path / "to_label.csv"
    command = [str(table), "--n", "20", "--random-share", "1", "--output", str(output)]
    label_next.main(command)
    assert "chosen ones" not in capsys.readouterr().out
    for content, problem in (
        (output.read_text(encoding="utf-8").replace(",,random", ",a,random", 2), "2 rows with a label"),
        ("id,text\n1,mine\n", "no table of rows to label"),
    ):
        output.write_text(content, encoding="utf-8")
        with pytest.raises(ValueError, match=problem):
            label_next.main(command)
        assert output.read_text(encoding="utf-8") == content
    label_next.main([*command, "--overwrite"])
    assert len(read_table(output)) == 20


def test_with_the_table_its_own_columns_come_along(table, tmp_path):
    output = tmp_path / "to_label.csv"
    arguments = ["--table", str(tmp_path / "t.csv"), "--output", str(output), "--n", "8", "--random-share", "1"]
    label_next.main([str(table), *arguments])
    rows = read_table(output)
    assert list(rows[0]) == ["id", "owner", "text", "label", "purpose"] and len(rows) == 8
    whole = {one["id"]: one for one in read_table(tmp_path / "t.csv")}
    assert all(one["owner"] == whole[one["id"]]["owner"] and one["purpose"] == "random" for one in rows)


def test_a_calibrator_says_where_the_threshold_is(table, tmp_path, monkeypatch):
    class Halving:
        def __init__(self):
            self.threshold = {"value": 0.4}

        def calibrate(self, rows):
            return np.array([row.confidence / 2 for row in rows])

    monkeypatch.setattr("calibration.load_calibrator", lambda path: Halving())
    rows = predictions.read(table)[:60]
    found = label_next.unlabelled_rows(rows, "c.json")
    assert found.threshold == 0.4 and found.confidence == pytest.approx([one.confidence / 2 for one in rows])
    assert label_next.unlabelled_rows(rows, "c.json", threshold=0.3).threshold == 0.3


def test_another_table_labelled_rows_alone_and_a_taken_column_are_refused(table, tmp_path):
    other = tmp_path / "other.csv"
    other.write_text((tmp_path / "t.csv").read_text().replace("text number", "words"), encoding="utf-8")
    output = ["--output", str(tmp_path / "o.csv")]
    with pytest.raises(ValueError, match="another text"):
        label_next.main([str(table), "--table", str(other), *output])
    other.write_text("id,text\nr0,text number 0\n", encoding="utf-8")
    with pytest.raises(ValueError, match="rows are not in"):
        label_next.main([str(table), "--table", str(other), *output])
    other.write_text((tmp_path / "t.csv").read_text().replace("owner,", "purpose,"), encoding="utf-8")
    with pytest.raises(ValueError, match="a column called purpose already"):
        label_next.main([str(table), "--table", str(other), *output])
    predictions.replace(tmp_path / "labelled.jsonl", [row(1, 0.7, label="a")])
    with pytest.raises(ValueError, match="none of its 1 scored rows is without a label"):
        label_next.main([str(tmp_path / "labelled.jsonl"), *output])
    assert not (tmp_path / "o.csv").exists()


# Does choosing help?


def test_the_simulation_judges_on_other_rows_and_compares_the_same_draws(tmp_path, monkeypatch, capsys):
    random, paths = draw(3), [tmp_path / "fit.jsonl", tmp_path / "test.jsonl"]
    for path, start in zip(paths, (0, 1000), strict=True):
        confidence = random.uniform(0.5, 1, 400)
        label = np.where(random.uniform(size=400) < confidence, "a", "b")  # calibrated as it is
        words = [" ".join(random.choice(5000, 6).astype(str)) for _ in range(400)]
        predictions.replace(path, [row(start + n, confidence[n], words[n], str(label[n])) for n in range(400)])
    monkeypatch.setattr(label_next, "REPEATS", 20)
    monkeypatch.setattr(label_next, "SIZES", (100,))
    label_next.main(["--simulate", *map(str, paths)])
    printed = capsys.readouterr().out.splitlines()
    lines = [line.split() for line in printed if line.startswith("100 ")]
    assert [line[1] for line in lines] == ["none", "half", "all"] and lines[0][3] == "+0.0000"
    expected = -np.mean([c * np.log(c) + (1 - c) * np.log(1 - c) for c in np.linspace(0.5, 1, 1000)[:-1]])
    assert float(lines[0][2]) == pytest.approx(expected, abs=0.04)  # the entropy is the least that can be
    with pytest.raises(ValueError, match="are in"):
        label_next.main(["--simulate", str(paths[0]), str(paths[0])])


@pytest.mark.parametrize(
    "arguments",
    [[], ["p.jsonl"], ["p.jsonl", "--output", "o.txt"], ["p.jsonl", "--output", "o.csv", "--random-share", "2"]],
)
def test_arguments_that_say_too_little_are_refused(arguments, capsys):
    with pytest.raises(SystemExit) as caught:
        label_next.parse_arguments(arguments)
    assert caught.value.code == 2 and capsys.readouterr().err.startswith("error: ")
