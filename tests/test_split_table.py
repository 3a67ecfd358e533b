"""scripts/split_table.py: parts that share nothing, with the labels' shares, and every row in one of them."""

import random

import pandas
import pytest

import split_table
from near_duplicates import near_duplicates
from tables import open_table


@pytest.fixture
def table(tmp_path):
    """400 rows of three labels, of which a third has near-duplicates."""
    chosen, rows = random.Random(0), []
    words = [f"word{n}" for n in range(300)]
    while len(rows) < 400:
        base = chosen.choices(words, k=12)
        for _ in range(chosen.choice([1, 1, 1, 2, 4])):
            text = " ".join([*base[:-1], chosen.choice(words)])
            rows.append(
                (f"r{len(rows)}", text, chosen.choices(["a", "b", "c"], [0.6, 0.3, 0.1])[0], f"g{len(rows) % 150}")
            )
    frame = pandas.DataFrame(rows, columns=["id", "text", "label", "owner"])
    frame.to_csv(tmp_path / "t.csv", index=False)
    frame.rename(columns={"owner": "group"})[["id", "group"]].to_csv(tmp_path / "g.csv", index=False)
    return tmp_path / "t.csv"


def parts_of(folder):
    return {name: pandas.read_csv(folder / f"t.{name}.csv") for name in ("train", "calibration", "test")}


def test_parts_share_no_near_duplicate_and_keep_the_balance(table, capsys):
    split_table.main([str(table)])
    whole, parts = pandas.read_csv(table), parts_of(table.parent)
    together = pandas.concat(parts.values()).set_index("id").loc[whole["id"]].reset_index()
    pandas.testing.assert_frame_equal(together, whole)
    part_of = {row_id: name for name, part in parts.items() for row_id in part["id"]}
    for i, j, _ in near_duplicates(whole["text"].tolist()):
        assert part_of[whole["id"][i]] == part_of[whole["id"][j]]
    for name, share in (("train", 0.6), ("calibration", 0.2), ("test", 0.2)):
        assert len(parts[name]) == pytest.approx(share * 400, abs=8)
        for label in "abc":
            wanted = share * (whole["label"] == label).sum()
            assert (parts[name]["label"] == label).sum() == pytest.approx(wanted, abs=6)
        assert parts[name]["id"].tolist() == [i for i in whole["id"] if part_of[i] == name]  # the table's order
    printed, noted = capsys.readouterr()
    assert printed.startswith("part") and "calibration" in printed and str(table.parent / "t.test.csv") in printed
    assert noted == ""


def test_a_table_without_labels_is_split_with_a_note(table, capsys):
    split_table.main([str(table), "--label-column", "", "--output-dir", str(table.parent / "new")])
    printed, noted = capsys.readouterr()
    assert "no label  " in printed and noted == (
        "note: no row has a label to balance the parts by; --label-column names its column\n"
    )


def test_a_table_of_groups_keeps_them_whole_and_a_seed_gives_the_same_parts(table):
    command = [str(table), "--groups", str(table.parent / "g.csv"), "--seed", "5"]
    split_table.main([*command, "--output-dir", str(table.parent / "new" / "folder")])
    first = parts_of(table.parent / "new" / "folder")
    owners = [set(part["owner"]) for part in first.values()]
    assert not (owners[0] & owners[1] or owners[0] & owners[2] or owners[1] & owners[2])
    split_table.main(command)
    for name, part in parts_of(table.parent).items():
        pandas.testing.assert_frame_equal(part, first[name])


def test_a_part_in_which_somebody_has_changed_a_label_is_kept(table):
    split_table.main([str(table)])
    split_table.main([str(table)])  # the same again
    part = table.parent / "t.test.csv"
    made = part.read_bytes()
    part.write_bytes(made + b"r999,a new row,a,g1\n")
    with pytest.raises(ValueError, match=r"t.test.csv is there already, with another content; use --overwrite"):
        split_table.main([str(table)])
    assert part.read_bytes() == made + b"r999,a new row,a,g1\n" and not [*table.parent.glob("*.part")]
    split_table.main([str(table), "--overwrite"])
    assert part.read_bytes() == made


@pytest.mark.parametrize(
    "parts", [["train"], ["train=1"], ["a=.5", "a=.5"], ["a=0", "b=1"], ["a=x", "b=1"], ["../a=1", "b=1"]]
)
def test_parts_that_are_none_are_refused(parts, table):
    with pytest.raises(ValueError, match=r"--parts"):
        split_table.main([str(table), "--parts", *parts])
    assert next(example.id for example in open_table(str(table))) == "r0"
