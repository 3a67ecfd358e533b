"""plotting.py: a figure is written whole or not at all, the same from the same data; panels draw what they are given."""

import numpy as np
import pytest

import calibration_metrics
import plotting


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
