"""The README: every command parses, every output shown is what the command prints, every table is recomputed."""

import contextlib
import importlib.util
import io
import json
import math
import re
import shlex
import sys

import pytest
from test_architecture import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", README, re.M | re.S)
SHELL = "\n".join(text for language, text in BLOCKS if not language).replace("\\\n", " ")
PYTHON = re.compile(r"^(?:\$ )?(?:python|accelerate launch) (\S+\.py)\b(.*)$", re.M)
COMMANDS = [(script, shlex.split(rest, comments=True)) for script, rest in PYTHON.findall(SHELL)]
COMMANDS += [  # those in the running text and in tables
    (script, shlex.split(rest)) for script, rest in re.findall(r"`python (\S+\.py)\b([^`]*)`", README)
]

BASE_CALIBRATOR = ["--target-accuracy", "0.8"]
TUNED_CALIBRATOR = ["--calibrate-on", "data/predictions/tuned_calibration.jsonl"]
TUNED_CALIBRATOR += ["--test-on", "data/predictions/tuned_test.jsonl", "--groups", "data/sentiment/splits.csv"]
TUNED_CALIBRATOR += ["--target-accuracy", "0.9"]


def module(script):
    """A script as a module; by path, because it may be named like a test file."""
    name = f"readme_{script.replace('/', '_').removesuffix('.py')}"
    if name not in sys.modules:
        specification = importlib.util.spec_from_file_location(name, ROOT / script)
        sys.modules[name] = importlib.util.module_from_spec(specification)
        specification.loader.exec_module(sys.modules[name])
    return sys.modules[name]


def text_of(title):
    """A section, without its heading."""
    return re.search(rf"^## {re.escape(title)}\n(.*?)(?=^##? |\Z)", README, re.M | re.S)[1]


# Commands


def test_there_are_commands_and_every_script_is_one_of_them():
    scripts = {path.relative_to(ROOT).as_posix() for path in (*ROOT.glob("*.py"), *ROOT.glob("scripts/*.py"))}
    named = set(re.findall(r"\b((?:scripts/)?\w+\.py)\b", README))
    assert len(COMMANDS) > 40 and scripts <= named
    assert {name for name in named if not ((ROOT / name).is_file() or (ROOT / "scripts" / name).is_file())} == set()


@pytest.mark.parametrize(
    ("script", "arguments"),
    [pytest.param(script, arguments, id=" ".join([script, *arguments])[:90]) for script, arguments in COMMANDS],
)
def test_every_command_line_parses(script, arguments, capsys):
    arguments = arguments[: arguments.index("|")] if "|" in arguments else arguments
    loaded = module(script)
    parse = getattr(loaded, "parse_arguments", None)
    assert parse, f"{script} has no parse_arguments"
    parse([argument for argument in arguments if argument != "..."])
    assert capsys.readouterr().err == ""


def test_make_targets_and_paths_that_are_named_are_there():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"\bmake ([a-z-]+)\b", " ".join(re.findall(r"`make [a-z-]+`|^make .*$", README, re.M))))
    assert targets >= {"demo", "test"} and all(f"\n{target}:" in makefile for target in targets)
    for path in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (ROOT / path).exists(), path
    anchors = {
        re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in re.findall(r"^#+ (.+)$", README, re.M)
    }
    assert set(re.findall(r"\]\(#([^)]+)\)", README)) <= anchors


@pytest.mark.study
@pytest.mark.parametrize(
    "shown", [text for _, text in BLOCKS if text.startswith("$ python")], ids=lambda text: text.partition("\n")[0][:80]
)
def test_outputs_are_what_the_commands_print(shown, run):
    line, _, expected = shown.partition("\n")
    command, _, lines = line.removeprefix("$ python ").partition(" | head -")
    environment = dict.fromkeys(("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"), "/nonexistent")
    done = run(*shlex.split(command), env=environment | {"AWS_EC2_METADATA_DISABLED": "true"})
    printed = "".join(f"{line}\n" for line in done.stdout.splitlines()[: int(lines)]) if lines else done.stdout
    assert done.returncode == 0 and printed.strip("\n") == expected.strip("\n")


# Outputs and tables


@pytest.fixture(scope="module")
def printed(tmp_path_factory):
    """What the two analyses print from the recordings, and their reports: {script: (lines, report)}."""
    found = {}
    for name, script, arguments in (
        ("base", "calibration_demo.py", BASE_CALIBRATOR),
        ("tuned", "calibration_demo.py", TUNED_CALIBRATOR),
        ("comparison", "compare_base_vs_finetuned.py", ["--verbose"]),
    ):
        folder, text = tmp_path_factory.mktemp(name), io.StringIO()
        with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(text):
            patch.chdir(ROOT)
            patch.setattr(module(script), "draw_figures", lambda *_: None)
            module(script).main([*arguments, "--output-dir", str(folder)])
        report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
        found[name] = text.getvalue().splitlines(), report, folder
    return found


@pytest.mark.study
@pytest.mark.parametrize("name", ["base", "tuned"])
def test_the_shipped_calibrators_are_what_the_card_s_commands_write(printed, name):
    card = (ROOT / "data" / "README.md").read_text(encoding="utf-8")
    arguments = BASE_CALIBRATOR if name == "base" else TUNED_CALIBRATOR
    assert f"python calibration_demo.py {' '.join(arguments)}" in card
    made = (printed[name][2] / "calibrator.json").read_bytes()
    assert made == (ROOT / "data" / "calibrators" / f"{name}.json").read_bytes()


@pytest.mark.study
def test_blocks_of_output_hold_lines_that_are_printed(printed):
    import ablation
    from task import TASKS

    text = io.StringIO()
    with contextlib.redirect_stdout(text):
        ablation.main([])
    lines = {*text.getvalue().splitlines(), *TASKS["sentiment"].prompt("Best worst thing ever").splitlines()}
    lines |= {line for known, *_ in printed.values() for line in known}
    # The README shows the first columns of a wide table of tokens.
    starts = {re.sub(r"\s+$", "", line[:width]) for line in lines for width in (78,)} | lines
    others = re.compile(r"^(\$ |python |pip |make |accelerate |aws |cat |END|\{\"Version)", re.M)
    blocks = [text for language, text in BLOCKS if not language and not others.search(text)]
    blocks = [text for text in blocks if "3 geometric mean" not in text]  # below
    assert len(blocks) >= 4
    for block in blocks:
        assert [line for line in block.splitlines() if line not in starts] == []


def tables():
    """(header cells, rows of cells) of every table."""
    for text in re.findall(r"(?:^\|.*\n)+", README, re.M):
        lines = [[cell.strip() for cell in line.strip("|\n").split(" | ")] for line in text.splitlines()]
        yield lines[0], lines[2:]


def table(*header):
    (rows,) = [rows for found, rows in tables() if found[: len(header)] == list(header)]
    return rows


def short(value, places=3):
    """.705, as the README writes shares."""
    return re.sub(r"^(-?)0\.", r"\1.", f"{value:.{places}f}")


def span(value, sign=""):
    ends = [re.sub(r"^([+-]?)0\.", r"\1.", f"{x:{sign}.3f}") for x in value]
    return f"{ends[0]} [{ends[1]}, {ends[2]}]"


@pytest.mark.study
def test_base_against_fine_tuned_is_what_the_comparison_reports(printed):
    report = printed["comparison"][1]
    raw, calibrated, money = report["scores"]["raw"], report["scores"]["calibrated"], report["money"]
    expected = []
    for name, values in (
        ("accuracy", raw["paired"]["accuracy"]),
        ("log loss", raw["paired"]["log loss"]),
        ("the same with each model's own calibrator", calibrated["paired"]["log loss"]),
    ):
        expected.append([name, span(values["base"]), span(values["fine-tuned"]), span(values["difference"], "+")])
    both = [f"{short(raw[m]['ece'])} ({short(raw[m]['ece_noise_floor'])})" for m in ("base", "fine-tuned")]
    expected.append(["ECE (noise floor)", *both])
    sure = [report["sure"]["raw"][m][0] for m in ("base", "fine-tuned")]
    both = [f"{one['automated']:,}, {100 * one['accuracy']:.1f} %" for one in sure]
    expected.append(["texts of raw confidence .90 or more, and how many are right", *both])
    for guarantee in report["guarantees"][1:]:
        row = [f"automated with {guarantee['target']:.0%} promised, and what is right".replace("%", " %")]
        for m in ("base", "fine-tuned"):
            gate = guarantee[m]["measured"] if guarantee[m]["threshold"]["value"] is not None else None
            right = gate and span([gate["accuracy"], gate["accuracy_low"], gate["accuracy_high"]])
            row.append(f"{100 * gate['share']:.1f} %, {right}" if gate else "nothing")
        expected.append([*row, f"+{100 * guarantee['fine-tuned']['measured']['share']:.1f} points"])
    dollars = money["dollars"]
    low, high = (f"-${-value:,.0f}" for value in dollars["difference"][1:])
    row = [f"${dollars[m][0]:,.0f}" for m in ("base", "fine-tuned")]
    row.append(f"-${-dollars['difference'][0]:,.0f} [{low}, {high}]")
    expected.append(["dollars for 1,000 texts ($5 a review, $25 an error)", *row])
    shown = [[cell for cell in row if cell.strip("| ")] for row in table("", "base", "fine-tuned", "difference")]
    assert shown == expected


@pytest.mark.study
def test_the_methods_are_what_the_recordings_of_both_give(tmp_path):
    shown = [text for _, text in BLOCKS if "3 geometric mean" in text]
    (command,) = [a for s, a in COMMANDS if s == "combined_confidence.py" and "--calibrate-on" in a]
    text = io.StringIO()
    with contextlib.redirect_stdout(text), contextlib.chdir(ROOT):
        module("combined_confidence.py").main([*command[:-1], str(tmp_path / "both.jsonl")])
    assert len(shown) == 2 and all(
        line in text.getvalue().splitlines() for block in shown for line in block.splitlines()
    )
    (gain,) = [
        line.partition(": ")[2]
        for line in text.getvalue().splitlines()
        if line.startswith("Gain in log loss of the stack")
    ]
    assert gain in README


def test_six_texts_are_those_of_the_recorded_tour():
    rows = [
        json.loads(line) for line in (ROOT / "data/predictions/tour.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    expected = []
    for row in (row["logprobs"] for row in rows):
        shares = (f"{100 * row[key]:.1f} %" for key in ("confidence", "label_mass"))
        expected.append([row["text"], row["prediction"], *shares])
    assert table("text", "prediction", "confidence", "label mass") == expected


def first_tokens(pairs):
    return ", ".join(f'`"{token}"` {100 * probability:.2f}' for token, probability in pairs)


def test_first_tokens_are_those_of_the_recorded_tour():
    lines = (ROOT / "data/predictions/tour.jsonl").read_text(encoding="utf-8").splitlines()
    recorded = {row["text"]: row["logprobs"] for row in map(json.loads, lines)}
    shown = table("text", "first tokens of the embedded model, percent", "sums")
    for text, tokens, sums in shown:
        row = recorded[text]
        assert tokens == first_tokens((e["token"], math.exp(e["logprob"])) for e in row["top_tokens"][:4])
        totals = sorted(row["probabilities"].items(), key=lambda pair: -pair[1])
        assert sums == ", ".join(f"{label} {100 * p * row['label_mass']:.2f} %" for label, p in totals)
    assert len(shown) == 3


def test_what_the_article_recorded_is_quoted_as_recorded():
    recorded = json.loads((ROOT / "tests/data/article_token_tables.json").read_text(encoding="utf-8"))[
        "first_token_tables"
    ]
    by_text = {entry["text"]: entry for entry in recorded}
    shown = table("text", "first tokens of Llama 3.1 8B, percent (the article's recording)", "sums")
    for text, tokens, sums in shown:
        entry = by_text[text]
        assert tokens == first_tokens((x["token"], x["probability"]) for x in entry["top_tokens"][:4])
        totals = sorted(entry["printed_totals"].items(), key=lambda pair: -pair[1])
        assert sums == ", ".join(f"{label} {100 * total:.2f} %" for label, total in totals)
    assert len(shown) == 3 and f'{100 * recorded[0]["top_tokens"][0]["probability"]:.2f} % on "Who"' in README


@pytest.mark.study
def test_agreement_and_probability_are_as_far_apart_as_the_table_says():
    import make_figures
    import voting

    printed = voting.convergence_table(make_figures.recorded_convergence())
    for draws, *numbers in table("draws", "distance of agreement from the probability"):
        line = next(line for line in printed.splitlines() if line.split()[:1] == [draws])
        assert re.findall(r"\.\d{4}", line) == re.findall(r"\.\d{4}", " ".join(numbers))


@pytest.mark.parametrize("title", ["Film reviews", "Speed"])
def test_numbers_that_can_not_be_recomputed_here_say_so(title):
    assert re.search(r"not in\s+this\s+repository|measures your machine", text_of(title))


def test_no_table_with_numbers_is_left_unchecked():
    checked = {("", "base"), ("text", "prediction"), ("text", "first tokens of the embedded model, percent")}
    checked |= {("text", "first tokens of Llama 3.1 8B, percent (the article's recording)")}
    checked |= {("draws", "distance of agreement from the probability")}
    elsewhere = {("task", "rows scored"), ("on the same 120 texts, one run, median of 3 rounds", "texts a second")}
    words = {
        ("it says", "what it means"),
        ("file", "what it is"),
        ("file", "what it owns"),
        ("package", "why"),
        ("flag", "model"),
    }
    assert {tuple(header[:2]) for header, _ in tables()} <= checked | elsewhere | words
