"""Predictions that tests make as plain JSON records: changed, written, read back as arrays, given to a script."""

import json
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from types import SimpleNamespace

import numpy as np
from conftest import exit_code_of

import calibration_metrics

RESAMPLES = calibration_metrics.resamples


def few_resamples(patch, times):
    """Bootstrap intervals from so few samples, for tests of something else."""
    patch.setattr(
        calibration_metrics,
        "resamples",
        lambda groups, n_resamples=0, seed=0, most=None: RESAMPLES(groups, times, seed, most),
    )


def changed(rows, **fields):
    """The rows with fields replaced; a function is given the row and its number."""
    return [row | {k: f(row, i) if callable(f) else f for k, f in fields.items()} for i, row in enumerate(rows)]


def unscored(row):
    """The row as one that could not be scored."""
    nulls = dict.fromkeys(("prediction", "confidence", "probabilities", "label_mass"))
    return row | nulls | {"error": "too long"}


def save(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def arrays(rows):
    """(probabilities, number of the true label, confidence, correct) of the scored rows, or of a file of them."""
    if not isinstance(rows, list):
        rows = [row for row in map(json.loads, rows.read_text("utf-8").splitlines()) if "error" not in row]
    truth = np.array([list(row["probabilities"]).index(row["label"]) for row in rows])
    p = np.array([[*row["probabilities"].values()] for row in rows])
    return p, truth, p.max(axis=1), p.argmax(axis=1) == truth


def random_texts(n, seed):
    """Texts of random letters, no two alike."""
    words = np.random.default_rng(seed).choice(list("abcdefghijklmnopqrstuvwxyz"), (n, 6, 7))
    return [" ".join(map("".join, letters)) for letters in words]


def captured(main, *argv):
    """Run a script's main as the command line does, where there is no `capsys`."""
    out, err = StringIO(), StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        code = exit_code_of(main, *argv)
    return SimpleNamespace(code=code, out=out.getvalue(), err=err.getvalue())
