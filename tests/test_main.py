"""main.py: the tour of the real model is the recorded one, other texts go through it too, and the replay is light."""

import re

import pytest
from conftest import assert_one_error
from test_architecture import ROOT, every_python

import main


@pytest.mark.study
def test_the_real_tour_is_what_the_replay_shows_in_seven_steps(run):
    real, replayed = run("main.py"), run("main.py", "--replay")
    assert (real.returncode, real.stderr, replayed.returncode, replayed.stderr) == (0, "", 0, "")
    steps = [re.split(r"^(?=\d\. )", done.stdout, flags=re.M)[1:] for done in (real, replayed)]
    # Another processor's rounding may draw another answer in steps 4 and 5; all else is the same to every digit shown.
    assert [step for step in steps[0] if step[0] not in "45"] == [step for step in steps[1] if step[0] not in "45"]
    assert [step[:2] for step in steps[0]] == [f"{i}." for i in range(1, 8)]
    assert "automate" in real.stdout and "review" in real.stdout


def test_the_replay_loads_no_model_library():
    code = """if True:
        import sys
        sys.argv = ["main.py", "--replay"]
        import main
        main.main()
        print({"torch", "transformers"} & set(sys.modules), file=sys.stderr)
    """
    done = every_python(code, cwd=ROOT)
    assert (done.returncode, done.stderr) == (0, "set()\n")


def test_another_model_and_texts_of_one_s_own_stop_where_no_calibrator_fits(outcome):
    from embedded_model import embedded_model

    code, out, _ = outcome(main.main, "--model", embedded_model(), "--text", "One \x1b[31mtext")
    assert code == 0 and "\x1b" not in out and "One \\x1b[31mtext" in out
    assert "No calibrator of this repository is for this model" in out and "7." not in out


@pytest.mark.study
def test_the_fine_tuned_model_has_its_own_calibrator(run):
    done = run("main.py", "--adapter", "auto", "--text", "The canteen is on floor four.")
    assert "on at least 90% are right" in done.stdout and done.returncode == 0


@pytest.mark.parametrize("more", [["--text", "x"], ["--adapter", "auto"]])
def test_the_replay_takes_no_other_flag(outcome, more):
    assert_one_error(outcome(main.main, "--replay", *more), "has no part in it")
