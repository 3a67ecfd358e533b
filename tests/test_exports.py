"""exports.py and scripts/export.py: a scored table opens again in pandas and openpyxl as what was predicted."""

import math

import openpyxl
import pandas
import pytest

import export
import exports
import predictions
import tables
from predictions import failed, scored, to_line
from tables import open_table

COMMON = {"method": "logprobs", "model": "tiny", "task": "sentiment", "fingerprint": "3f9c2a71"}
TEXTS = [
    "=1+1",
    "+cmd|' /C calc'!A0",
    "-5",
    '@x "quoted"',
    "two\nlines, \u0645\u0631\u062d\u0628\u0627 \U0001f3ac",
    "plain",
]


@pytest.fixture
def table(tmp_path):
    """The user's table: with a column that has one of our names, and one of numbers."""
    frame = pandas.DataFrame({"nr": range(10, 16), "text": TEXTS, "label": "positive", "confidence": "high"})
    frame.to_csv(tmp_path / "mine.csv", index=False)
    return tmp_path / "mine.csv"


@pytest.fixture
def predicted(tmp_path):
    """Its predictions: one failed, all others calibrated."""
    rows = []
    for number, text in enumerate(TEXTS):
        p = {"negative": 0.1 + number / 20, "positive": 0.9 - number / 20}
        extras = {"calibrated_confidence": 0.5 + number / 100, "decision": "review"}
        rows.append(scored(str(10 + number), text, "positive", p, 0.75, **COMMON, extras=extras))
    rows[2] = failed("12", TEXTS[2], "positive", "the text is empty", **COMMON)
    path = tmp_path / "p.jsonl"
    path.write_bytes(b"".join(map(to_line, rows)))
    return path


OURS = ["prediction", "model_confidence", "label_mass", "p_negative", "p_positive", "calibrated_confidence", "decision"]


def read_again(path):
    if path.suffix == ".csv":
        return pandas.read_csv(path)
    return pandas.read_parquet(path) if path.suffix == ".parquet" else pandas.read_excel(path)


@pytest.mark.parametrize("suffix", predictions.EXPORTS)
def test_an_export_opened_again_is_the_predictions_file_beside_the_user_s_columns(suffix, table, predicted, tmp_path):
    output = tmp_path / f"result{suffix}"
    assert exports.write_export(predicted, output, open_table(str(table), id_column="nr")) == 6
    frame = read_again(output)
    assert list(frame) == ["nr", "text", "label", "confidence", *OURS, "error"]
    for number, row in frame.iterrows():
        text = row["text"]
        if suffix == ".csv" and TEXTS[number][0] in "=+@":  # -5 is a number
            assert text == "'" + TEXTS[number]
        else:
            assert str(text) == TEXTS[number]
        if number == 2:
            assert row["error"] == "the text is empty" and math.isnan(row["model_confidence"])
            continue
        assert row["prediction"] == "positive" and str(row["nr"]) == str(10 + number)
        assert row["p_negative"] == pytest.approx(0.1 + number / 20, abs=1e-15)
        assert row["model_confidence"] == row["p_positive"] and row["label_mass"] == 0.75
        assert (row["calibrated_confidence"], row["decision"]) == (0.5 + number / 100, "review")
    assert sorted(tmp_path.iterdir()) == sorted([table, predicted, output])


def test_no_cell_of_a_sheet_is_a_formula(table, predicted, tmp_path):
    exports.write_export(predicted, tmp_path / "r.xlsx", open_table(str(table), id_column="nr"))
    cells = [cell for row in openpyxl.load_workbook(tmp_path / "r.xlsx").active.iter_rows() for cell in row]
    assert "=1+1" in [cell.value for cell in cells] and not [cell for cell in cells if cell.data_type == "f"]


def test_rows_are_joined_by_id_in_the_table_s_order_and_foreign_tables_are_refused(table, predicted, tmp_path):
    frame = pandas.read_csv(table)
    shuffled = pandas.concat([frame.iloc[::-1], pandas.DataFrame({"nr": [99], "text": ["new"], "label": [None]})])
    shuffled.to_csv(tmp_path / "shuffled.csv", index=False)
    exports.write_export(predicted, tmp_path / "r.csv", open_table(str(tmp_path / "shuffled.csv"), id_column="nr"))
    again = pandas.read_csv(tmp_path / "r.csv")
    assert again["nr"].tolist() == [15, 14, 13, 12, 11, 10, 99] and again["p_negative"].isna().tolist()[-1]
    assert again["p_negative"].iloc[0] == pytest.approx(0.35)
    with pytest.raises(ValueError, match="another text"):
        frame.assign(text=frame["text"] + "!").to_csv(tmp_path / "other.csv", index=False)
        exports.write_export(predicted, tmp_path / "x.csv", open_table(str(tmp_path / "other.csv"), id_column="nr"))
    with pytest.raises(ValueError, match=r"5 rows of .* are not in"):
        frame.head(1).to_csv(tmp_path / "short.csv", index=False)
        exports.write_export(predicted, tmp_path / "x.csv", open_table(str(tmp_path / "short.csv"), id_column="nr"))
    assert not (tmp_path / "x.csv").exists()


def test_the_script_exports_with_and_without_a_table(table, predicted, tmp_path, capsys):
    export.main([str(predicted), "--output", str(tmp_path / "a.csv")])
    assert list(pandas.read_csv(tmp_path / "a.csv"))[:4] == ["id", "text", "label", "prediction"]
    export.main([str(predicted), "--output", str(tmp_path / "b.xlsx"), "--table", str(table), "--id-column", "nr"])
    assert capsys.readouterr().out.splitlines() == [f"{tmp_path / 'a.csv'}: 6 rows", f"{tmp_path / 'b.xlsx'}: 6 rows"]
    with pytest.raises(SystemExit):
        export.main([str(predicted), "--output", str(tmp_path / "c.json")])


def test_a_table_that_no_export_has_made_is_replaced_only_when_told_to(table, predicted, tmp_path, capsys):
    output, mine = tmp_path / "mine_too.csv", table.read_bytes()
    output.write_bytes(mine)
    with pytest.raises(ValueError, match="is there already, and is no table with predictions"):
        export.main([str(predicted), "--output", str(output)])
    assert output.read_bytes() == mine
    for more in (["--overwrite"], []):  # an earlier export is simply made again
        export.main([str(predicted), "--output", str(output), *more])
        assert "label_mass" in pandas.read_csv(output)
    (tmp_path / "empty.xlsx").write_bytes(b"")
    with pytest.raises(ValueError, match="is there already"):
        export.main([str(predicted), "--output", str(tmp_path / "empty.xlsx")])


def test_the_file_behind_an_output_is_told_by_its_suffix():
    assert [exports.resumable_path(f"a/b{s}").name for s in (".jsonl", ".csv", ".parquet", ".xlsx")] == ["b.jsonl"] * 4
    for wrong in ("a.json", "a", "a.tsv"):
        with pytest.raises(ValueError, match=r"must end in \.jsonl"):
            exports.resumable_path(wrong)


def test_what_a_calibrator_changed_and_its_shortlists_have_columns_of_their_own(tmp_path):
    extras = {"calibrated_confidence": 0.6, "decision": "review", "shortlist": ["yes", "no"]}
    extras |= {"original_prediction": "no", "original_probabilities": {"no": 0.7, "yes": 0.3}}
    row = scored("1", "plain", None, {"no": 0.4, "yes": 0.6}, 0.75, **COMMON, extras=extras)
    automated = scored("2", "more", None, {"no": 0.9, "yes": 0.1}, 0.75, **COMMON, extras={"decision": "automate"})
    (tmp_path / "p.jsonl").write_bytes(to_line(row) + to_line(automated))
    exports.write_export(tmp_path / "p.jsonl", tmp_path / "p.csv")
    frame = pandas.read_csv(tmp_path / "p.csv", keep_default_na=False)
    assert frame["prediction"].tolist() == ["yes", "no"] and frame["original_prediction"].tolist() == ["no", ""]
    assert frame["shortlist"].tolist() == ["yes; no", ""] and "original_probabilities" not in frame


SHARDED = ["--text-column", "review", "--id-column", "key"]


@pytest.fixture
def shards(tmp_path):
    """A table of 10 rows and the outputs of --shard 1/3 to 3/3, as records of their own texts."""
    lines = [f"k{number},text {number}" for number in range(10)]
    (tmp_path / "t.csv").write_text("\n".join(["key,review", *lines]) + "\n")
    common = {"method": "m", "model": "m", "task": "t", "fingerprint": "f"}
    table = {"text_column": "review", "id_column": "key"}
    for number in (1, 2, 3):
        examples = tables.read_examples(str(tmp_path / "t.csv"), **table, shard=(number, 3))
        rows = [predictions.scored(e.id, e.text, None, {"a": 0.25, "b": 0.75}, 1.0, **common) for e in examples]
        predictions.replace(tmp_path / f"{number}.jsonl", rows)
    return [tmp_path / f"{number}.jsonl" for number in (2, 3, 1)]  # in no order


def merge(shards, output, *flags):
    files = map(str, shards)
    export.main(["--merge", *files, "--table", str(shards[0].parent / "t.csv"), "--output", str(output), *flags])
    return [row.id for row in predictions.iterate(output)]


def test_shards_are_every_nth_row_and_merge_into_the_table_s_order(shards, tmp_path):
    ids = [[row.id for row in predictions.iterate(path)] for path in shards]
    assert ids == [["k1", "k4", "k7"], ["k2", "k5", "k8"], ["k0", "k3", "k6", "k9"]]
    assert merge(shards, tmp_path / "all.jsonl", *SHARDED) == [f"k{number}" for number in range(10)]
    with pytest.raises(ValueError, match="has no rows for shard 11/11"):
        list(tables.read_examples(str(tmp_path / "t.csv"), text_column="review", shard=(11, 11)))


def test_shards_that_are_not_all_of_the_table_are_refused(shards, tmp_path):
    output = tmp_path / "all.jsonl"
    with pytest.raises(ValueError, match=r"row 2 of .*t\.csv \(id 'k1'\) is not the next of any of the 2 files"):
        merge(shards[1:], output, *SHARDED)
    whole = shards[0].read_bytes()
    shards[0].write_bytes(b"".join(whole.splitlines(keepends=True)[:-1]))
    with pytest.raises(ValueError, match=r"row 8 of .* are all shards finished"):
        merge(shards, output, *SHARDED)
    shards[0].write_bytes(whole)
    with pytest.raises(ValueError, match=r"row '.*' of a shard is not in"):
        merge(shards, output, *SHARDED, "--limit", "8")
    shards[0].write_bytes(whole.replace(b'"f"', b'"g"'))
    with pytest.raises(ValueError, match="different fingerprints: g and f"):
        merge(shards, output, *SHARDED)
    assert not output.exists()
