"""plotting.py: figures do not depend on the machine's settings, and show what they are given."""

from contextlib import contextmanager

import matplotlib
import numpy as np
import pytest

import calibration_metrics
import plotting


@pytest.fixture
def watched(monkeypatch):
    """(caption, axes) of every figure drawn, filled as each is finished."""
    real, seen = plotting.figure, []

    @contextmanager
    def watching(path, caption, *arguments, **options):
        with real(path, caption, *arguments, **options) as axes:
            yield axes
            seen.append((caption, axes))

    monkeypatch.setattr(plotting, "figure", watching)
    return seen


def test_a_matplotlibrc_and_a_backend_of_the_machine_change_nothing(tmp_path, monkeypatch):
    risks = {"raw": [0.0, 0.5, 1 / 3], "platt": [0.0, 0.0, 1 / 3]}
    risks = {name: np.array(risk) for name, risk in risks.items()}
    plotting.risk_coverage(tmp_path / "here.png", risks, about="n = 3")
    monkeypatch.setenv("MPLBACKEND", "no such backend")
    with matplotlib.rc_context({"axes.facecolor": "black", "font.size": 20, "lines.linewidth": 9}):
        plotting.risk_coverage(tmp_path / "there.png", risks, about="n = 3")
    assert (tmp_path / "here.png").read_bytes() == (tmp_path / "there.png").read_bytes()


def test_a_panel_without_enough_rows_keeps_its_name(watched, tmp_path):
    row = {"automated": 3, "share": 0.3, "accuracy": 1.0, "accuracy_low": 0.3, "accuracy_high": 1.0}
    rows = [row | {"threshold": threshold} for threshold in (0.5, 0.7, 0.9)]
    plotting.accuracy_threshold(tmp_path / "gates.png", {"raw": rows, "calibrated": rows}, where="n = 10")
    ((_, axes),) = watched
    assert [(axis.get_title("left"), len(axis.get_xticks())) for axis in axes[0]] == [("raw", 3), ("calibrated", 3)]


def test_the_comparison_of_calibrators_has_the_best_on_top_and_its_caption_says_of_what(watched, tmp_path):
    row = {"log_loss_low": 0.1, "log_loss_high": 0.9, "ece": 0.03, "ece_noise_95": 0.04, "ece_noise_floor": 0.02}
    metrics = {name: row | {"log_loss": loss} for name, loss in (("raw", 0.6), ("beta", 0.4), ("platt", 0.5))}
    words = {"chosen": "platt", "where": "n = 90, held-out", "seed": 7}
    plotting.calibration_method_comparison(tmp_path / "x.png", metrics, **words)
    ((caption, axes),) = watched
    names = [label.get_text() for label in axes[0, 0].get_yticklabels()]
    assert names == ["beta", "platt\n(chosen)", "raw"] and axes[0, 0].yaxis_inverted()
    assert all(words in caption for words in ("n = 90, held-out", "raw: nothing fitted", "1,000", "seed 7"))


def test_the_same_data_give_the_same_png_and_a_failed_one_none(tmp_path):
    from matplotlib import image, rcParams

    before = dict(rcParams)
    for name, caption in [("a", "n = 12"), ("b", "n = 12"), ("c", "n = 13")]:
        with plotting.figure(tmp_path / "new" / f"{name}.png", caption, columns=2, rows=3, height=1) as axes:
            assert axes.shape == (3, 2)
            calibration_metrics.plot_reliability_diagram(np.linspace(0.5, 1, 40), np.arange(40) % 3 > 0, ax=axes[0, 1])
    a, b, c = ((tmp_path / "new" / f"{name}.png").read_bytes() for name in "abc")
    assert a == b != c and b"matplotlib" not in a.lower()
    assert image.imread(tmp_path / "new" / "a.png").shape[:2] == (511, 1260)  # three rows, two margins, a line
    with pytest.raises(ZeroDivisionError), plotting.figure(tmp_path / "d.png", "never"):
        1 / 0  # noqa: B018
    assert not (tmp_path / "d.png").exists() and dict(rcParams) == before


def test_risk_is_drawn_against_coverage_from_the_first_percent_on():
    from matplotlib.figure import Figure

    draw, axis = np.random.default_rng(0), Figure().subplots()
    risks = {name: np.cumsum(draw.random(300) < 0.2) / np.arange(1, 301) for name in ("raw", "calibrated")}
    plotting.risk_coverage_panel(axis, risks)
    for line, (name, risk) in zip(axis.lines, risks.items(), strict=True):
        assert line.get_xdata() == pytest.approx([k / 300 for k in range(4, 301)])
        assert line.get_ydata() == pytest.approx(risk[3:])
        assert line.get_label() == f"{name}, area {np.mean(risk):.3f}" and line.get_color() == plotting.color_of(name)
    assert axis.get_xlim() == (0, 1) and axis.get_ylim()[0] == 0


@pytest.mark.parametrize("high", [0.004, 0.03, 0.19, 1.0])
def test_a_tick_says_where_it_stands(high):
    from matplotlib.figure import Figure

    axis = Figure().subplots()
    plotting.percent(axis)
    axis.set(ylim=(0, high))
    ticks = axis.get_yticks()
    labels = axis.yaxis.get_major_formatter().format_ticks(ticks)
    assert [float(label.removesuffix("%")) / 100 for label in labels] == pytest.approx(ticks)


def test_the_training_loss_is_called_a_mean_only_where_it_is_one_of_several_steps(watched, tmp_path):
    checked = {"log_loss": 0.5, "accuracy": 0.8, "mean_confidence": 0.7, "ece": 0.1, "ece_floor": 0.05}
    about = {"model": "m", "task": "t", "training_rows": 9, "validation_rows": 5}
    for steps in (4, 60):
        log = [{"step": step, "loss": 1 / step} for step in range(1, steps + 1)] + [{"step": steps} | checked]
        plotting.training_curves(tmp_path / "curves.png", log, best_step=steps, **about)
    labels = [axes[0][0].get_legend_handles_labels()[1][0] for _, axes in watched]
    assert labels == ["training", "training, mean of 3 steps"]
