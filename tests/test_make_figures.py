"""Every image has a name in scripts/make_figures.py, equal recordings give equal bytes, and --check sees a change."""

import json
import re
import zlib
from shutil import copyfile

import numpy as np
import pytest
from matplotlib.image import imread, imsave
from test_architecture import ROOT

import command_line
import make_figures
import plotting
from make_figures import FIGURES, build, check, difference, main

SCRIPT = ROOT / "scripts" / "make_figures.py"
CHEAP = ["agreement_converges", "training_curves"]  # the others need a study, many seconds
VOTES, CURVES = (FIGURES[name].file for name in CHEAP)


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A folder with the cheap figures, drawn once."""
    folder = tmp_path_factory.mktemp("figures")
    build(CHEAP, folder)
    return folder


@pytest.fixture
def copy(built, tmp_path, monkeypatch):
    """The cheap figures in a folder of one's own, which --check takes for the repository; drawing copies them."""

    def copied(names, folder):
        for name in names:
            (folder / FIGURES[name].file).parent.mkdir(parents=True, exist_ok=True)
            copyfile(built / FIGURES[name].file, folder / FIGURES[name].file)

    copied(CHEAP, tmp_path)
    monkeypatch.setattr(make_figures, "ROOT", tmp_path)
    monkeypatch.setattr(make_figures, "build", copied)
    return tmp_path


# The registry


def test_the_registry_is_the_files_under_images_and_the_training_curves():
    found = {path.relative_to(ROOT).as_posix() for path in (ROOT / "images").rglob("*") if path.is_file()}
    assert {figure.file for figure in FIGURES.values()} == found | {"fine_tuned_sentiment_model/training_curves.png"}
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    named = set(re.findall(r"!\[[^\]]*\]\(([^)\s]+)", readme)) | set(re.findall(r'<img[^>]*src="([^"]+)"', readme))
    assert named and named <= {figure.file for figure in FIGURES.values()}


def test_every_image_is_a_light_card_of_readme_width_without_a_date_or_a_version_in_it():
    for figure in FIGURES.values():
        raw, picture = (ROOT / figure.file).read_bytes(), imread(ROOT / figure.file)
        assert picture.shape[1] == 1260 and (picture[..., 3] == 1).all(), figure.file
        for edge in (picture[:9], picture[-9:], picture[:, :9], picture[:, -9:]):  # a white margin
            assert (edge == 1).all(), figure.file
        assert set(chunks(raw)) <= {b"IHDR", b"IDAT", b"IEND", b"pHYs", b"sRGB"}, figure.file
        assert len(raw) < 240_000, figure.file


def chunks(raw):
    """The kinds of the chunks of a PNG."""
    at = 8
    while at < len(raw):
        length, kind = int.from_bytes(raw[at : at + 4]), raw[at + 4 : at + 8]
        assert zlib.crc32(raw[at + 4 : at + 8 + length]) == int.from_bytes(raw[at + 8 + length : at + 12 + length])
        yield kind
        at += 12 + length


# Drawing


def test_the_images_of_the_repository_are_what_the_recordings_give(built):
    for name in CHEAP:
        assert not difference(ROOT / FIGURES[name].file, built / FIGURES[name].file)[1]
    assert sorted(path.name for path in built.rglob("*.png")) == ["agreement_converges.png", "training_curves.png"]


def test_the_training_curves_are_of_the_log_and_the_kept_step_is_the_best(monkeypatch, tmp_path):
    seen = []
    monkeypatch.setattr(plotting, "training_curves", lambda path, log, **words: seen.append((log, words)))
    make_figures.draw_training(tmp_path)
    ((log, words),) = seen
    config = json.loads((ROOT / "fine_tuned_sentiment_model" / "training_config.json").read_text(encoding="utf-8"))
    best = min((entry for entry in log if entry.get("step") and "log_loss" in entry), key=lambda e: e["log_loss"])
    assert words["best_step"] == best["step"] and log[-1]["step"] == config["steps"]
    assert words["model"] == "smollm2-135m-instruct" and words["task"] == "sentiment"


def test_each_source_is_read_once_whatever_is_asked(monkeypatch, tmp_path):
    calls = []

    def draw(folder):
        calls.append(folder)
        for name in ("one", "two", "unasked"):
            (folder / f"{name}.png").write_bytes(name.encode())

    some = {name: make_figures.Figure(f"images/new/{name}.png", draw, f"{name}.png", "") for name in ("one", "two")}
    monkeypatch.setattr(make_figures, "FIGURES", some)
    build(["one", "two"], tmp_path)
    assert len(calls) == 1 and not calls[0].exists()
    files = {path.name: path.read_bytes() for path in (tmp_path / "images/new").iterdir()}
    assert files == {"one.png": b"one", "two.png": b"two"}


# Comparing


def test_check_passes_and_writes_nothing(copy, capsys):
    before = [((copy / file).read_bytes(), (copy / file).stat().st_mtime_ns) for file in (VOTES, CURVES)]
    main(["--check", *CHEAP])
    out, err = capsys.readouterr()
    assert "2 figures are what the recordings give" in out and err == ""
    assert before == [((copy / file).read_bytes(), (copy / file).stat().st_mtime_ns) for file in (VOTES, CURVES)]


def test_check_names_a_tampered_file_and_ends_with_1(copy, capsys):
    picture = imread(copy / VOTES).copy()
    picture[300:312, 300:308] = [0, 0, 0, 1]  # the size of a digit
    imsave(copy / VOTES, picture)
    with pytest.raises(SystemExit) as ended:
        main(["--check", *CHEAP])
    out, err = capsys.readouterr()
    assert ended.value.code == 1 and err == "error: not what the recordings give: agreement_converges\n"
    assert re.search(r"agreement_converges\.png +other bytes; squares of 4 pixels differ by up to \d+ of 255", out)
    assert re.search(r"training_curves\.png +same bytes", out)


def test_check_tells_a_missing_a_broken_and_a_picture_of_another_size(copy, capsys):
    path = copy / VOTES
    whole = path.read_bytes()
    imsave(path, imread(path)[10:])
    assert check(CHEAP) == ["agreement_converges"] and re.search(r"is 1260 x \d+ pixels, not", capsys.readouterr().out)
    for broken in (b"", b"not a picture", whole[:5000]):
        path.write_bytes(broken)
        assert check(CHEAP) == ["agreement_converges"] and "is no picture" in capsys.readouterr().out
    path.unlink()
    assert check(CHEAP) == ["agreement_converges"] and "is missing" in capsys.readouterr().out


def test_a_lone_pixel_may_differ_and_with_other_versions_all_letters(copy, monkeypatch, capsys):
    path, picture = copy / CURVES, imread(copy / CURVES).copy()
    picture[5, 5] = [0, 0, 0, 1]
    imsave(path, picture)
    assert check(CHEAP) == [] and "other bytes" in capsys.readouterr().out
    imsave(path, np.roll(picture, 1, axis=1))  # all letters elsewhere
    assert check(["training_curves"]) == ["training_curves"]
    monkeypatch.setattr(make_figures, "tools", lambda: ("9.9", "0.1"))
    capsys.readouterr()
    assert check(["training_curves"]) == []
    out = capsys.readouterr().out
    assert "squares of 32 pixels" in out and "matplotlib 9.9 and freetype 0.1: a rough comparison" in out
    picture[100:400, 100:400] = [1, 0, 0, 1]
    imsave(path, picture)
    assert check(["training_curves"]) == ["training_curves"]


# The command line


def test_an_unknown_name_and_a_missing_recording_are_one_line_and_2(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(make_figures, "ROOT", tmp_path)
    for name, said in (
        ("nothing like it", "no figure is called 'nothing like it'; --list"),
        (CHEAP[1], "training_log"),
    ):
        with pytest.raises(SystemExit) as ended:
            command_line.run(lambda name=name: main([name]))
        out, err = capsys.readouterr()
        assert (ended.value.code, out, err.count("\n")) == (2, "", 1)
        assert err.startswith("error: ") and said in err
