"""command_line.py: errors in one line, exit codes, progress, text made safe for a terminal."""

import io
import os
import subprocess
import sys

import pytest
from conftest import ROOT

import command_line


@pytest.mark.parametrize(
    ("raised", "code", "printed"),
    [
        (ValueError("two\nlines"), 2, "error: two lines\n"),
        (FileNotFoundError(2, "No such file or directory", "x.toml"), 2, "error: x.toml: No such file or directory\n"),
        (MemoryError("the GPU is out of memory"), 2, "error: the GPU is out of memory\n"),
        (RecursionError("maximum recursion depth exceeded"), 2, "error: maximum recursion depth exceeded\n"),
        (ValueError("a column \x1b[31mred"), 2, "error: a column \\x1b[31mred\n"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_a_user_can_mend_is_one_line_and_an_exit_code(raised, code, printed, capsys):
    def main():
        raise raised

    with pytest.raises(SystemExit) as caught:
        command_line.run(main)
    assert caught.value.code == code and capsys.readouterr().err == printed


def test_a_stopped_script_says_whether_it_can_be_continued(capsys):
    def main():
        raise KeyboardInterrupt

    for resumes, then in (
        (True, "repeat the same command to continue where it was"),
        (False, "repeat the same command to begin again"),
    ):
        with pytest.raises(SystemExit) as caught:
            command_line.run(main, resumes)
        assert caught.value.code == 130 and capsys.readouterr().err == f"\nstopped; {then}\n"


def test_a_reader_that_leaves_early_causes_no_traceback():
    code = "import command_line; command_line.run(lambda: print('a line'))"
    environment = os.environ | {"PYTHONUNBUFFERED": ""}  # with a buffer, whose flush at exit would complain again
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, env=environment, **pipes) as process:
        process.stdout.close()  # as `| head` does
        assert process.stderr.read() == ""
    assert process.returncode == 1


def test_a_bug_of_ours_keeps_its_traceback():
    with pytest.raises(ZeroDivisionError):
        command_line.run(lambda: 1 / 0)


def test_text_for_a_terminal_cannot_command_it():
    assert command_line.printable("caf\u00e9 \u65e5\u672c \U0001f3ac") == "caf\u00e9 \u65e5\u672c \U0001f3ac"
    assert command_line.printable("\x1b[2J\x07\r\n\x9b\u202e") == "\\x1b[2J\\x07\\r\\n\\x9b\\u202e"


def test_whatever_a_script_prints_is_made_safe_for_the_terminal(capsys):
    def main():
        print("label \x1b]0;owned\x07 caf\u00e9\n\tnext")
        print("a file \x1b[2J\r", file=sys.stderr)

    command_line.run(main)
    said = capsys.readouterr()
    assert (said.out, said.err) == ("label \\x1b]0;owned\\x07 caf\u00e9\n\tnext\n", "a file \\x1b[2J\r\n")


def test_a_backend_inherited_from_a_notebook_ends_no_script(run):
    done = run("-c", "import command_line; command_line.run(lambda: __import__('matplotlib'))", env={"MPLBACKEND": "x"})
    assert (done.returncode, done.stderr) == (0, "")


def test_progress_is_plain_lines_where_there_is_no_terminal(capsys, monkeypatch):
    seconds = iter([0.0, 4.0, 12.0, 13.0, 24.0])
    monkeypatch.setattr(command_line.time, "monotonic", lambda: next(seconds))
    with command_line.progress(total=1000, done=100) as advance:
        for n in (10, 10, 100, 100):
            advance(n)
    lines = capsys.readouterr().err.splitlines()
    # From 4 s on: 10 rows in 8 s with 880 left, and 210 rows in 20 s with 680 left.
    assert lines == [
        "120 of 1,000 rows, 1.2 a second, 12 min left",
        "320 of 1,000 rows, 10.5 a second, 65 s left",
    ]


def told_left(monkeypatch, reports, total=100, done=0):
    """What is said to be left after each (seconds, rows, worth) of a run whose clock starts at 0."""
    clock, said = iter([0.0, *(second for second, *_ in reports)]), []
    monkeypatch.setattr(command_line.time, "monotonic", lambda: next(clock))
    with command_line.progress(total, done) as advance:
        for _, n, worth in reports:
            command_line.advance_by(advance, n, worth)
            said.append(advance.estimate())
    return said


def test_the_rest_is_told_from_the_work_that_is_left_and_not_from_slow_first_rows(monkeypatch):
    # A start of 20 s, then a second for each 1 of worth: rows of four times the average length come first.
    reports = [(30.0, 5, 10), (50.0, 5, 20), (80.0, 20, 30), (110.0, 70, 40)]
    assert told_left(monkeypatch, reports) == [
        "",
        "1.0 a second, 70 s left",
        "1.0 a second, 40 s left",
        "1.1 a second, 0 s left",
    ]
    # What a stopped run had finished is no work of this one.
    assert told_left(monkeypatch, [(1.0, 60, 0), (11.0, 10, 10), (21.0, 10, 10)])[-1] == "1.0 a second, 20 s left"


def test_slow_work_is_told_in_seconds_a_row_and_long_work_in_minutes_and_hours():
    assert [command_line.pace(rate) for rate in (12.34, 0.1, 0.05)] == ["12.3 a second", "0.1 a second", "20 s a row"]
    assert command_line.pace(0.02, "steps") == "50 s a step"
    assert [command_line.duration(s) for s in (599, 601, 7199, 9000)] == ["599 s", "10 min", "120 min", "2.5 h"]


def test_a_socks_proxy_without_its_package_is_one_line_and_another_failed_import_a_bug(capsys, monkeypatch):
    def fail(words):
        raise ImportError(words)

    monkeypatch.setenv("all_proxy", "socks5h://u:do-not-show@proxy")
    monkeypatch.setenv("HTTP_PROXY", "http://proxy")
    with pytest.raises(SystemExit):
        command_line.run(lambda: fail("Using SOCKS proxy, but the 'socksio' package is not installed."))
    line = "error: the environment variable all_proxy names a SOCKS proxy, for which the package socksio is missing"
    assert capsys.readouterr().err.startswith(line)
    with pytest.raises(ImportError):
        command_line.run(lambda: fail("cannot import name 'x'"))


def test_a_package_that_is_missing_is_one_line_with_the_way_out(capsys):
    with pytest.raises(SystemExit, match="2"):
        command_line.run(lambda: __import__("no_such_package.part"))
    problem = capsys.readouterr().err
    assert "lacks the package no_such_package: activate" in problem and problem.count("\n") == 1


def test_progress_survives_a_long_wait_for_the_first_row(capsys, monkeypatch):
    seconds = iter([0.0, 60.0, 70.0])
    monkeypatch.setattr(command_line.time, "monotonic", lambda: next(seconds))
    with command_line.progress(total=10, done=0) as advance:
        advance(0)  # as after a window's tokens were counted, with no row scored yet
        advance(5)
    assert "5 of 10 rows" in capsys.readouterr().err


def test_progress_is_a_bar_on_a_terminal(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setattr(sys, "stderr", Terminal())
    with command_line.progress(total=10, done=4) as advance:
        advance(6)
    assert "10/10" in sys.stderr.getvalue() and "rows" in sys.stderr.getvalue()
    monkeypatch.setattr(sys, "stderr", Terminal())
    with command_line.progress(total=10, done=0, after_s=command_line.SHOW_AFTER_S) as advance:
        advance(10)
    assert sys.stderr.getvalue() == ""  # it took no time


def test_columns_are_as_wide_as_their_cells_and_cannot_command_the_terminal():
    rows = [["", "n", "accuracy"], ["a\x1b", "5", ".8"], ["longer", "10", ""]]
    assert command_line.columns(rows, "  ").splitlines() == [
        "           n  accuracy",
        "  a\\x1b    5        .8",
        "  longer  10",
    ]
