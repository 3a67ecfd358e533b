"""tables.py: how tables of texts are read, and which texts belong together; pandas and pyarrow say what is right."""

import gzip
import os
import re

import pandas
import pyarrow
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet
from scipy.stats import chisquare

from tables import (
    Example,
    check_disjoint,
    check_text,
    groups_of,
    open_table,
    read_examples,
)


def rows(path, **options):
    return [(e.id, e.text, e.label) for e in read_examples(str(path), **options)]


HARD_TEXTS = [
    'He said "no", then left.',
    "two\nlines\r\nand a third",
    "caf\u00e9 \u65e5\u672c\u8a9e \U0001f3ac",
    " outer space ",
    "line\u2028separator\x0band\x0cpage\x85break",
    "=1+1,'quoted'",
    "plain",
]


def test_tables_of_pandas_are_read_cell_for_cell(tmp_path):
    table = pandas.DataFrame({"id": range(7), "text": HARD_TEXTS, "label": ["a", "b"] * 3 + [None]})
    table.to_csv(tmp_path / "dos.csv", index=False, lineterminator="\r\n")
    table.to_csv(tmp_path / "excel.CSV", index=False, encoding="utf-8-sig", quoting=1)
    for ascii_only in (True, False):
        table.to_json(tmp_path / f"{ascii_only}.jsonl", orient="records", lines=True, force_ascii=ascii_only)
    parquet.write_table(pyarrow.Table.from_pandas(table), tmp_path / "t.parquet", row_group_size=2)
    expected = [(str(n), text, None if n == 6 else "ab"[n % 2]) for n, text in enumerate(HARD_TEXTS)]
    for path in tmp_path.iterdir():
        assert rows(path) == expected, path.name


def test_a_csv_table_takes_its_columns_by_name_or_by_number(tmp_path):
    (tmp_path / "named.csv").write_text("uid,stars,review\nu1,5,Great\n\nu2,1,Awful\n", encoding="utf-8")
    options = {"text_column": "review", "label_column": "stars", "id_column": "uid"}
    mapped = rows(tmp_path / "named.csv", **options, label_map={"5": "positive", "1": "negative"})
    assert mapped == [("u1", "Great", "positive"), ("u2", "Awful", "negative")]
    (tmp_path / "bare.csv").write_text("Great,5\nAwful,1\n", encoding="utf-8")
    assert rows(tmp_path / "bare.csv", header=False) == [("1", "Great", None), ("2", "Awful", None)]
    assert rows(tmp_path / "bare.csv", header=False, label_column="2")[1] == ("2", "Awful", "1")


@pytest.mark.parametrize("header", ["1,2,3", "1,2,purpose"])
def test_the_header_of_a_table_made_of_one_without_is_not_taken_for_a_row(header, tmp_path):
    (tmp_path / "part.csv").write_text(f"{header}\n4,Title,Body\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"line 1: this line names the columns 1, 2.*leave --no-header out"):
        rows(tmp_path / "part.csv", header=False, text_column="2")
    assert rows(tmp_path / "part.csv", text_column="2", label_column="1") == [("1", "Title", "4")]


def test_a_tsv_file_has_no_quoting(tmp_path):
    (tmp_path / "t.tsv").write_bytes(b'text\tlabel\r\n"Good" he said\tpositive\r\n"never closed\tnegative\r\n')
    assert rows(tmp_path / "t.tsv") == [
        ("1", '"Good" he said', "positive"),
        ("2", '"never closed', "negative"),
    ]


def test_nulls_are_no_label_an_empty_text_and_the_row_number(tmp_path):
    lines = ['{"text": null, "label": null, "id": null}', '{"text": "x", "label": "", "id": 7}', '{"text": "y"}']
    (tmp_path / "n.jsonl").write_text("\ufeff" + "\n".join(lines), encoding="utf-8")
    assert rows(tmp_path / "n.jsonl") == [("1", "", None), ("7", "x", None), ("3", "y", None)]
    parquet.write_table(pyarrow.table({"text": ["x", None], "label": [None, 1]}), tmp_path / "n.parquet")
    assert rows(tmp_path / "n.parquet") == [("1", "x", None), ("2", "", "1")]


def test_spaces_around_a_label_do_not_make_it_another_and_spaces_alone_are_none(tmp_path):
    (tmp_path / "s.csv").write_text('text,label\nx, a\ny,"a "\nz, \n', encoding="utf-8")
    assert rows(tmp_path / "s.csv") == [("1", "x", "a"), ("2", "y", "a"), ("3", "z", None)]


def test_a_text_file_is_one_text_a_line(tmp_path):
    (tmp_path / "t.txt").write_bytes('one, "two"\r\n\nthree\u2028four \nlast'.encode())
    expected = [("1", 'one, "two"', None), ("2", "", None), ("3", "three\u2028four ", None), ("4", "last", None)]
    assert rows(tmp_path / "t.txt") == rows(tmp_path / "t.txt", header=False) == expected


def test_a_cell_may_be_larger_than_the_csv_module_s_own_limit(tmp_path):
    long = "word " * 100_000
    (tmp_path / "huge.csv").write_text(f"text\n{long}\n", encoding="utf-8")
    assert rows(tmp_path / "huge.csv") == [("1", long, None)]


def test_a_hugging_face_dataset_is_read_by_split_and_class_name(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["neg", "pos"])})
    for split, texts, labels in (("train", ["a"], [0]), ("test", ["b", "c", "d"], [1, 0, -1])):
        made = datasets.Dataset.from_dict({"text": texts, "label": labels}, features=features)
        made.to_parquet(tmp_path / f"set/{split}.parquet")
    source = f"hf:{tmp_path / 'set'}"
    assert rows(source + ":test", label_map={"pos": "positive"}) == [
        ("1", "b", "positive"),
        ("2", "c", "neg"),
        ("3", "d", None),  # -1 is how such sets say "unlabelled"
    ]
    assert rows(source + ":test", limit=1) == [("1", "b", "pos")]
    for wrong in (source, source + ":dev"):
        with pytest.raises(ValueError, match=r"choose a split.*train"):
            rows(wrong)
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "train.jsonl").write_text('{"text": "x", "label": "pos"}\n', encoding="utf-8")
    assert rows(f"hf:{tmp_path / 'one'}") == [("1", "x", "pos")]

    def unreachable(name):
        raise ConnectionError(f"Couldn't reach '{name}' on the Hub (LocalEntryNotFoundError)")

    monkeypatch.setattr(datasets, "get_dataset_split_names", unreachable)
    with pytest.raises(ValueError, match=r"hf:owner/set:test: the Hub cannot be reached; go online, or name a file"):
        rows("hf:owner/set:test")


BROKEN_TABLES = {
    "empty.csv": (b"", "no rows"),
    "header-only.csv": (b"text,label\n", "no rows"),
    "columns.csv": (b"review,stars\nGood,5\n", "line 2.*'text'.*review, stars"),
    "columns.jsonl": (b'{"text": "x"}\n{"review": "x"}\n', "line 2.*'text'.*review"),
    "cyrillic.csv": ("text\n\u041f\u0440\u0438\u0432\u0435\u0442\n".encode("cp1251"), "UTF-8.*--encoding.*--delimiter"),
    "binary.csv": (b"text\n\x00\x01" * 9, "bytes of value 0"),
    "either.csv": (b"a;b,text;c\n1;2,x;3\n", "comma or semicolon.*--delimiter"),
    "tabs.txt": (b"good\t1\nbad\t0\n", "1 tabs.*--delimiter tab"),
    "cut.csv.gz": (gzip.compress(b"text\n" + b"x\n" * 99)[:-9], "gzip"),
    "plain.csv.gz": (b"text\nx\n", "gzip"),
    "ragged.csv": (b"text,label\nGood,5\nGood, really,5\n", "line 3: 3 cells where 2.*--skip-bad-rows"),
    "unclosed.csv": (b'text\n"never closed\nx\n', "line 2: "),
    "stray.csv": (b'text,label\n"Good" film,5\n', "line 2: "),
    "twice.csv": (b"text,text\na,b\n", "line 1: two columns"),
    "torn.jsonl": (b'{"text": "x"}\n{"text": "y\n', "line 2 is not JSON"),
    "deep.jsonl": (b'{"text": ' + b"[" * 100_000 + b"\n", "line 1 is not JSON"),
    "array.jsonl": (b'["x"]\n', "line 1 is not a JSON object"),
    "nested.jsonl": (b'{"text": "x"}\n{"text": ["x"]}\n', "line 2: the text is .*not a string"),
    "lines.json": (b'{"text": "x"}\n{"text": "y"}\n', r"\.jsonl"),
    "object.json": (b'{"text": "x"}', "not a list"),
    "noid.csv": (b"id,text\n,x\n", "line 2: the id is empty"),
    "not.parquet": (b"PAR1 but not really", "Parquet"),
    "table.xlsx": (b"PK", r"not a readable \.xlsx file"),
    "table": (b"text\nx\n", r"\.csv \.tsv \.jsonl \.json \.parquet \.xlsx \.txt"),
}


@pytest.mark.parametrize("name", BROKEN_TABLES)
def test_a_broken_table_is_one_line_that_names_file_and_line(name, tmp_path):
    content, named = BROKEN_TABLES[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError) as caught:
        rows(tmp_path / name)
    message = str(caught.value)
    assert str(tmp_path / name) in message and re.search(named, message), message
    assert "\n" not in message


def test_a_missing_file_a_folder_and_a_missing_column_are_said_so(tmp_path):
    (tmp_path / "t.csv").write_text("text\nx\n", encoding="utf-8")
    (tmp_path / "folder.csv").mkdir()
    for path, options, named in (
        (tmp_path / "nowhere.csv", {}, "no such file: .*nowhere.csv"),
        (tmp_path / "folder.csv", {}, "folder.csv is not a table"),
        (tmp_path / "t.csv", {"label_column": "stars"}, "line 2: no column 'stars' for the label; it has text"),
        (tmp_path / "t.csv", {"id_column": "uid"}, "line 2: no column 'uid' for the id"),
    ):
        with pytest.raises(ValueError, match=named):
            rows(path, **options)


@pytest.mark.parametrize("name", ["broken.csv", "broken.tsv", "broken.jsonl"])
def test_a_table_is_read_only_as_far_as_it_is_needed(name, tmp_path):
    good = {"csv": b"text,n\nx,1\ny,2\n", "tsv": b"text\tn\nx\t1\ny\t2\n", "jsonl": b'{"text": "x"}\n{"text": "y"}\n'}
    (tmp_path / name).write_bytes(good[name.partition(".")[2]] + b"{ this is neither")
    assert rows(tmp_path / name, limit=2) == [("1", "x", None), ("2", "y", None)]
    iterator = read_examples(str(tmp_path / name))
    assert [next(iterator).text, next(iterator).text] == ["x", "y"]
    with pytest.raises(ValueError, match=r"line (3|4)"):
        next(iterator)


# The same texts in every format


WESTERN = st.text(st.characters(codec="windows-1252", exclude_categories=["Cc"]), min_size=1, max_size=20)
ANY_TEXT = st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1, max_size=20) | st.sampled_from(
    [
        'He said "no"',
        "two\nlines\tand a tab",
        "caf\u00e9 \U0001f3ac",
        "\u0645\u0631\u062d\u0628\u0627 \u05e9\u05dc\u05d5\u05dd",
        "=1+1",
        ";,|",
    ]
)


@settings(max_examples=25, deadline=None)
@given(st.lists(ANY_TEXT, min_size=1, max_size=6))
def test_the_same_texts_in_every_format_give_the_same_examples(tmp_path_factory, texts):
    folder = tmp_path_factory.mktemp("formats")
    table = pandas.DataFrame({"id": [f"r{n}" for n in range(len(texts))], "text": texts, "label": "a"})
    expected = list(table.itertuples(index=False, name=None))
    table.to_csv(folder / "t.csv", index=False)
    table.to_csv(folder / "t.csv.gz", index=False)
    table.to_csv(folder / "marked.csv", index=False, encoding="utf-8-sig")
    table.to_csv(folder / "wide.csv", index=False, encoding="utf-16")
    table.to_csv(folder / "t.tsv", index=False, sep="\t")
    table.to_csv(folder / "semicolon.csv", index=False, sep=";")
    table.to_json(folder / "t.jsonl", orient="records", lines=True)
    table.to_json(folder / "t.json", orient="records")
    table.to_parquet(folder / "t.parquet")
    table.to_excel(folder / "t.xlsx", index=False)
    for path in sorted(folder.iterdir()):
        said = {"delimiter": ";" if path.stem == "semicolon" else ","} if path.suffix == ".csv" else {}
        assert rows(path, **said) == expected, path.name
    if all(set(text) <= set(bytes(range(32, 256)).decode("windows-1252", "ignore")) for text in texts):
        table.to_csv(folder / "western.csv", index=False, encoding="windows-1252")
        assert rows(folder / "western.csv", encoding="windows-1252", delimiter=",") == expected


GERMAN = "text;label\nDer K\u00e4se \u201eschmeckt\u201c gut \u2013 5 \u20ac;a\nM\u00fcde, aber froh\u2026;b\n"


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "windows-1252"])
def test_encoding_and_delimiter_are_found_out_and_told_once(encoding, tmp_path, capsys):
    (tmp_path / "t.csv").write_bytes(GERMAN.encode(encoding))
    table = open_table(str(tmp_path / "t.csv"))
    found = [(e.text, e.label) for e in table]
    assert found == [
        ("Der K\u00e4se \u201eschmeckt\u201c gut \u2013 5 \u20ac", "a"),
        ("M\u00fcde, aber froh\u2026", "b"),
    ]
    assert list(table) == list(table)
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "semicolon" in said and encoding.removesuffix("-sig") in said
    open_table(str(tmp_path / "t.csv"), encoding=encoding, delimiter=";")
    (tmp_path / "plain.csv").write_text("text,label\nx,a\n", encoding="utf-8")
    open_table(str(tmp_path / "plain.csv"))
    assert capsys.readouterr().err == ""  # nothing to tell of what was said, or is as usual


def test_columns_are_joined_named_in_any_case_or_put_together_by_a_template(tmp_path, capsys):
    (tmp_path / "t.csv").write_text("Title,Body,LABEL,ID\nA,b,x,7\nB,,y,8\n", encoding="utf-8")
    assert rows(tmp_path / "t.csv", text_column=["Title", "Body"]) == [("7", "A\n\nb", "x"), ("8", "B", "y")]
    said = sorted(capsys.readouterr().err.splitlines())
    assert said == ["note: taking column 'ID' for the id", "note: taking column 'LABEL' for the label"]
    joined = rows(tmp_path / "t.csv", text_template="{title} // {body}", id_column="")
    assert joined == [("1", "A // b", "x"), ("2", "B // ", "y")]


def test_a_quoted_tab_separated_file_is_unquoted_and_a_blank_line_of_one_column_is_a_text(tmp_path):
    (tmp_path / "q.tsv").write_text('text\tlabel\n"a ""b""\tc"\tx\n"two\nlines"\ty\n', encoding="utf-8")
    assert rows(tmp_path / "q.tsv") == [("1", 'a "b"\tc', "x"), ("2", "two\nlines", "y")]
    (tmp_path / "one.csv").write_text("text\na\n\nb\n", encoding="utf-8")
    assert rows(tmp_path / "one.csv") == [("1", "a", None), ("2", "", None), ("3", "b", None)]
    (tmp_path / "t.txt").write_text("a\tx\nb\ty\n", encoding="utf-8")
    assert rows(tmp_path / "t.txt", delimiter="\t", header=False, label_column="2")[1] == ("2", "b", "y")


def test_numbers_and_booleans_are_read_as_they_are_written(tmp_path):
    (tmp_path / "t.jsonl").write_text('{"text": 5, "label": 1.0}\n{"text": true, "label": 1}\n', encoding="utf-8")
    assert rows(tmp_path / "t.jsonl") == [("1", "5", "1.0"), ("2", "true", "1")]
    parquet.write_table(pyarrow.table({"text": [5], "label": [True]}), tmp_path / "t.parquet")
    assert rows(tmp_path / "t.parquet") == [("1", "5", "True")]


def test_broken_rows_are_left_out_when_told_and_named(tmp_path, capsys):
    content = 'text,label\na,x\n"b,x\nc,y\nd\n"e ""f""",z\n'
    (tmp_path / "t.csv").write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match=r"line 3: .*--skip-bad-rows"):
        rows(tmp_path / "t.csv")
    assert rows(tmp_path / "t.csv", skip_bad_rows=True) == [("1", "a", "x"), ("2", "c", "y"), ("3", 'e "f"', "z")]
    assert capsys.readouterr().err == f"note: 2 bad rows of {tmp_path / 't.csv'} left out, at line 3, 5\n"


def test_rows_can_be_taken_by_the_value_of_a_column_before_they_are_counted_or_drawn(tmp_path):
    lines = [f"text {n},{'random' if n % 3 else 'chosen'},{n % 2}" for n in range(1, 31)]
    (tmp_path / "t.csv").write_text("\n".join(["text,purpose,side", *lines]) + "\n", encoding="utf-8")
    path, where = tmp_path / "t.csv", {"purpose": "random", "side": "1"}
    wanted = [n for n in range(1, 31) if n % 3 and n % 2]
    assert [id for id, _, _ in rows(path, where=where)] == [str(n) for n in wanted]  # numbered as they are in the table
    assert [id for id, _, _ in rows(path, where=where, limit=2)] == ["1", "5"]
    assert {int(id) for seed in range(50) for id, _, _ in rows(path, where=where, sample=3, seed=seed)} == set(wanted)
    with pytest.raises(ValueError, match=r"no column 'part' for --where; it has text, purpose, side"):
        rows(path, where={"part": "x"})
    with pytest.raises(ValueError, match=r"no rows where purpose=rare"):
        rows(path, where={"purpose": "rare"})


def test_a_sample_is_fair_reproducible_and_in_order(tmp_path):
    (tmp_path / "t.txt").write_text("".join(f"{n}\n" for n in range(12)), encoding="utf-8")
    draws = [[int(text) for _, text, _ in rows(tmp_path / "t.txt", sample=4, seed=seed)] for seed in range(600)]
    assert draws[:3] == [[int(text) for _, text, _ in rows(tmp_path / "t.txt", sample=4, seed=s)] for s in range(3)]
    assert all(drawn == sorted(set(drawn)) and len(drawn) == 4 for drawn in draws)
    counts = [sum(n in drawn for drawn in draws) for n in range(12)]
    assert chisquare(counts).pvalue > 1e-3
    assert [id for id, _, _ in rows(tmp_path / "t.txt", sample=4)] == [
        str(n + 1) for n in draws[0]
    ]  # numbers of the table
    assert len(rows(tmp_path / "t.txt", sample=99)) == 12


def test_a_pipe_is_refused_rather_than_waited_for(tmp_path):
    os.mkfifo(tmp_path / "t.csv")
    with pytest.raises(ValueError, match="not a regular file"):
        open_table(str(tmp_path / "t.csv"))


# Texts that belong together


def test_two_tables_that_share_a_text_are_refused_and_near_duplicates_are_counted():
    known = [Example("k1", "the same words here and there", None), Example("k2", "something else", None)]
    fresh = [Example("a", "words of its own", None), Example("b", "the same words here and now", None)]
    assert check_disjoint(known, fresh, "fit.csv", "test.csv") == 1
    assert check_disjoint(known, fresh[:1], "fit.csv", "test.csv") == 0
    twice = [*fresh, Example("c", "the same words here, and now!", None)]  # both rows count, though alike each other
    assert check_disjoint(known, twice, "fit.csv", "test.csv") == 2
    copies = [*fresh, Example("c", " The SAME words\there and there", None)]
    with pytest.raises(ValueError, match=r"^1 rows of test\.csv are in fit\.csv too: 'c' \(there 'k1'\);"):
        check_disjoint(known, copies, "fit.csv", "test.csv")


def test_a_group_on_both_sides_is_refused_and_a_table_of_groups_must_be_clear(tmp_path):
    known, fresh = (
        [Example("a", "one text", None)],
        [Example("b", "quite another", None), Example("c", "a third", None)],
    )
    groups = tmp_path / "groups.csv"
    groups.write_text("id,group\na,1\nb,2\nc,2\n", encoding="utf-8")
    assert groups_of(fresh, str(groups)) == ["2", "2"]
    assert check_disjoint(known, fresh, "fit.csv", "test.csv", str(groups)) == 0
    for content, message in (
        ("a,1\nb,2\nc,1\n", r"^1 rows of test\.csv are of groups that fit\.csv has rows of, the first is 'c'"),
        ("a,1\nb,2\nc,2\nb,3\n", "line 5: the id 'b' stands twice, with different groups"),
        ("a,1\nb,2\nc, \n", "line 4: the group is empty"),
        ("a,1\nb,2\n", "names no group for the row 'c'"),
    ):
        groups.write_text("id,group\n" + content, encoding="utf-8")
        with pytest.raises(ValueError, match=message):
            check_disjoint(known, fresh, "fit.csv", "test.csv", str(groups))


def test_a_text_that_no_model_can_read_is_refused():
    check_text(" x ")
    for text, message in ((" \n", "the text is empty"), ("a \ud83c lone", "not valid Unicode")):
        with pytest.raises(ValueError, match=message):
            check_text(text)


def test_a_csv_file_of_pandas_is_read_cell_for_cell(tmp_path):
    table = pandas.DataFrame({"id": range(7), "text": HARD_TEXTS, "label": ["positive", "negative"] * 3 + [None]})
    for name, options in {
        "plain.csv": {},
        "dos.csv": {"lineterminator": "\r\n"},
        "excel.CSV": {"encoding": "utf-8-sig", "quoting": 1},
    }.items():
        table.to_csv(tmp_path / name, index=False, **options)
        assert rows(tmp_path / name) == [
            (str(i), text, label if isinstance(label, str) else None)
            for i, text, label in table.itertuples(index=False)
        ]


def test_json_lines_of_pandas_are_read_value_for_value(tmp_path):
    table = pandas.DataFrame({"id": range(10, 17), "text": HARD_TEXTS, "label": [1, 0, 1, 0, 1, 0, 1], "extra": 0.5})
    for name, ascii_only in (("a.jsonl", True), ("b.jsonl", False)):
        table.to_json(tmp_path / name, orient="records", lines=True, force_ascii=ascii_only)
        assert rows(tmp_path / name) == [(str(10 + i), HARD_TEXTS[i], "10"[i % 2]) for i in range(7)]


def test_a_parquet_file_is_read_row_for_row(tmp_path):
    table = pyarrow.table({"id": range(7), "text": HARD_TEXTS, "label": pyarrow.array(["a", "b"] * 3 + [None])})
    parquet.write_table(table, tmp_path / "t.parquet", row_group_size=2)
    assert rows(tmp_path / "t.parquet") == [(str(r["id"]), r["text"], r["label"]) for r in table.to_pylist()]
