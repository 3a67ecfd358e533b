"""README.md and docs/: commands parse, outputs are what commands print, tables are recomputed, links lead somewhere."""

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

CARD = ROOT / "data" / "README.md"
PAGES = {path: path.read_text(encoding="utf-8") for path in (ROOT / "README.md", *sorted(ROOT.glob("docs/*.md")))}
README, ALL = PAGES[ROOT / "README.md"], "\n".join(PAGES.values())
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", ALL, re.M | re.S)
PLAIN = [text for language, text in BLOCKS if not language]
SHELL = "\n".join(PLAIN + re.findall(r"^```sh\n(.*?)^```$", CARD.read_text(encoding="utf-8"), re.M | re.S))
FOUND = re.findall(r"^(?:\$ )?(?:python|accelerate launch) (\S+\.py)\b(.*)$", SHELL.replace("\\\n", " "), re.M)
FOUND += re.findall(r"`python (\S+\.py)\b([^`]*)`", ALL)  # in the running text and in tables
COMMANDS = [(script, shlex.split(rest, comments=True)) for script, rest in FOUND]
FROM_PYTHON = re.findall(r"^```python\n(.*?)^```\n\n```\n(.*?)^```$", README, re.M | re.S)  # code, what it prints

LLAMA = "Llama 3.1 8B, percent (the article's recording)"
BASE_CALIBRATOR = "--target-accuracy 0.8"
TUNED_CALIBRATOR = (
    "--calibrate-on data/predictions/tuned_calibration.jsonl --test-on data/predictions/tuned_test.jsonl "
    "--groups data/sentiment/splits.csv --target-accuracy 0.9"
)


def module(script):
    """A script as a module; by path, because it may be named like a test file."""
    name = f"readme_{script.replace('/', '_').removesuffix('.py')}"
    if name not in sys.modules:
        specification = importlib.util.spec_from_file_location(name, ROOT / script)
        sys.modules[name] = importlib.util.module_from_spec(specification)
        specification.loader.exec_module(sys.modules[name])
    return sys.modules[name]


# Words, links, commands


def test_the_readme_is_an_article_and_all_pages_use_the_words_of_the_field():
    assert len(README.encode()) <= 22_000
    assert README.index("images/public_study.png") < README.index("## Your own table") < README.index("## The idea")
    private = r"\b(can not|at hand|promise[sd]?|mend(s|ed)?|leans?|naive|coins?|hidden rule|zones?)\b"
    assert not re.search(private, ALL, re.I)


def anchors(page):
    titles = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.M)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", [*PAGES, CARD], ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        path, _, anchor = target.partition("#")
        there = page.parent / path if path else page
        assert there.exists() and (not anchor or anchor in anchors(there)), target


def test_every_page_is_linked_and_every_figure_shown():
    assert all(f"(docs/{page.name})" in README for page in PAGES if page.parent.name == "docs")
    figures = {path.relative_to(ROOT).as_posix() for path in (ROOT / "images").rglob("*.png")}
    assert figures <= {path.removeprefix("../") for path in re.findall(r"!\[[^\]]*\]\(([^)]+)\)", ALL)}


def test_there_are_commands_and_every_script_and_make_target_that_is_named_is_there():
    scripts = {path.relative_to(ROOT).as_posix() for path in (*ROOT.glob("*.py"), *ROOT.glob("scripts/*.py"))}
    named = set(re.findall(r"\b((?:scripts/|tests/)?\w+\.py)\b", ALL))
    assert len(COMMANDS) > 60 and scripts <= named
    assert all((ROOT / name).is_file() or (ROOT / "scripts" / name).is_file() for name in named)
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"`make ([a-z-]+)`", ALL))
    assert targets >= {"demo", "test"} and all(f"\n{target}:" in makefile for target in targets)


@pytest.mark.parametrize(
    ("script", "arguments"),
    [pytest.param(script, arguments, id=" ".join([script, *arguments])[:90]) for script, arguments in COMMANDS],
)
def test_every_command_line_parses(script, arguments, capsys):
    ends = [place for place, argument in enumerate(arguments) if argument in ("|", ">")]
    module(script).parse_arguments(arguments[: ends[0]] if ends else arguments)
    assert capsys.readouterr().err == ""


# What stands in blocks


def test_the_task_that_is_shown_is_one(tmp_path):
    from task import read_task

    (text,) = (text for language, text in BLOCKS if language == "toml")
    (tmp_path / "tickets.toml").write_text(text, encoding="utf-8")
    task = read_task(str(tmp_path / "tickets.toml"))
    assert [*task.labels] == ["billing", "technical", "other"] and "{text}" in task.template


def test_the_record_that_is_shown_is_the_first_recorded_one():
    (text,) = (text for language, text in BLOCKS if language == "json")
    with open(ROOT / "data/predictions/base_test.jsonl", encoding="utf-8") as file:
        assert json.loads(text) == json.loads(next(file))


@pytest.mark.parametrize(("code", "expected"), FROM_PYTHON, ids=["classifier", "arrays"])
def test_the_python_that_is_shown_prints_what_is_shown(code, expected, tmp_path, monkeypatch, capsys):
    (tmp_path / "data").symlink_to(ROOT / "data")
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "README.md", "exec"), {})
    assert capsys.readouterr().out == expected
    assert {path.name for path in tmp_path.glob("*.png")} == set(re.findall(r'"(\w+\.png)"', code))


@pytest.mark.study
@pytest.mark.parametrize(
    "shown", [text for text in PLAIN if text.startswith("$ python")], ids=lambda text: text.partition("\n")[0][:80]
)
def test_outputs_are_what_the_commands_print(shown, run, tmp_path):
    line, _, expected = shown.partition("\n")
    command, _, lines = line.removeprefix("$ python ").partition(" | head -")
    elsewhere = ["--output-dir", tmp_path] if command.startswith("calibration_demo.py") else []
    environment = dict.fromkeys(("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"), "/nonexistent")
    done = run(*shlex.split(command), *elsewhere, env=environment | {"AWS_EC2_METADATA_DISABLED": "true"})
    printed = done.stdout.splitlines()[: int(lines) if lines else None]
    assert done.returncode == 0 and "\n".join(printed).strip("\n") == expected.strip("\n")


@pytest.fixture(scope="module")
def printed(tmp_path_factory):
    """What the two analyses print from the recordings, and what they write: {name: (lines, report, folder)}."""
    found, prices = {}, tmp_path_factory.mktemp("prices") / "prices.csv"
    prices.write_text("label,negative,positive\nnegative,0,60\npositive,10,0\n", encoding="utf-8")
    choices = f"{TUNED_CALIBRATOR} --target positive=.95 negative=.9 --cost-matrix {prices}"
    for name, script, arguments in (
        ("choices", "calibration_demo.py", choices),
        ("base", "calibration_demo.py", f"{BASE_CALIBRATOR} --verbose"),
        ("tuned", "calibration_demo.py", TUNED_CALIBRATOR),
        ("comparison", "compare_base_vs_finetuned.py", "--verbose"),
    ):
        folder, text = tmp_path_factory.mktemp(name), io.StringIO()
        with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(text):
            patch.chdir(ROOT)
            patch.setattr(module(script), "draw_figures", lambda *_: None)
            module(script).main([*arguments.split(), "--output-dir", str(folder)])
        report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
        found[name] = text.getvalue().splitlines(), report, folder
    return found


@pytest.mark.study
@pytest.mark.parametrize(("name", "arguments"), [("base", BASE_CALIBRATOR), ("tuned", TUNED_CALIBRATOR)])
def test_the_shipped_calibrators_are_what_the_card_s_commands_write(printed, name, arguments):
    assert f"python calibration_demo.py {arguments}\n" in CARD.read_text(encoding="utf-8")
    made = (printed[name][2] / "calibrator.json").read_bytes()
    assert made == (ROOT / "data" / "calibrators" / f"{name}.json").read_bytes()


@pytest.mark.study
def test_blocks_of_output_hold_lines_that_are_printed(printed):
    from task import TASKS

    lines = {*TASKS["sentiment"].prompt("Best worst thing ever").splitlines()}
    lines |= {line for known, *_ in printed.values() for line in known}
    # Commands; what is tested above, below and in test_ablation.py; the verdict on a table that is not here.
    others = (
        r"^(\$ |python |accelerate |aws |ray )|3 geometric mean|Trained on 256 rows|from calibrated confidence 0.780"
    )
    others = re.compile(others + "|always answering 'ham'", re.M)
    blocks = [text for text in PLAIN if not others.search(text) and text not in dict(FROM_PYTHON).values()]
    assert len(blocks) == 6
    for block in blocks:
        assert [line for line in block.splitlines() if line not in lines] == []


@pytest.mark.study
def test_the_methods_are_what_the_recordings_of_both_give(run, tmp_path):
    shown = [text for text in PLAIN if "3 geometric mean" in text]
    (command,) = [a for s, a in COMMANDS if s == "combined_confidence.py" and "--calibrate-on" in a]
    lines = run("combined_confidence.py", *command[:-1], tmp_path / "both.jsonl").stdout.splitlines()
    assert len(shown) == 2 and all(line in lines for block in shown for line in block.splitlines())
    (gain,) = [line.partition(": ")[2] for line in lines if line.startswith("Gain in log loss of the stack")]
    assert gain in README


@pytest.mark.study
def test_the_five_commands_decide_about_a_table_as_the_readme_says(run, tmp_path):
    commands, printed = README.partition("in five commands\n")[2].split("```\n")[1:4:2]
    outputs = []
    for line in commands.splitlines():
        script, *arguments = shlex.split(line)[1:]
        done = run(ROOT / script, *arguments, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        outputs.append(done.stdout)
    assert len(outputs) == 5 and printed in outputs[3] and "no better than always answering" in outputs[1]
    with open(tmp_path / "mine" / "new.jsonl", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    automated = [row for row in rows if row["decision"] == "automate"]
    right = sum(row["label"] == row["prediction"] for row in automated) / len(automated)
    said = f"about the {len(rows)} new rows: {len(automated)} are automated, and {short(right)} of them are right"
    assert said in " ".join(README.split())


# Tables


def tables():
    """(header cells, rows of cells) of every table."""
    for text in re.findall(r"(?:^\|.*\n)+", ALL, re.M):
        lines = [[cell.strip() for cell in line.strip("|\n").split(" | ")] for line in text.splitlines()]
        yield lines[0], lines[2:]


def table(*header):
    (rows,) = [rows for found, rows in tables() if found[: len(header)] == list(header)]
    return rows


def short(value, sign=""):
    """.705, as the pages write shares."""
    return re.sub(r"^([+-]?)0\.", r"\1.", f"{value:{sign}.3f}")


def span(value, sign=""):
    middle, low, high = (short(x, sign) for x in value)
    return f"{middle} [{low}, {high}]"


@pytest.mark.study
def test_base_against_fine_tuned_is_what_the_comparison_reports(printed):
    report, both = printed["comparison"][1], ("base", "fine-tuned")
    raw, calibrated, dollars = report["scores"]["raw"], report["scores"]["calibrated"], report["money"]["dollars"]
    expected = []
    for name, values in (
        ("accuracy", raw["paired"]["accuracy"]),
        ("log loss", raw["paired"]["log loss"]),
        ("log loss, each with its own calibrator", calibrated["paired"]["log loss"]),
    ):
        expected.append([name, *(span(values[model]) for model in both), span(values["difference"], "+")])
    errors = [f"{short(raw[model]['ece'])} ({short(raw[model]['ece_noise_floor'])})" for model in both]
    expected.append(["ECE (expected if calibrated)", *errors])
    sure = [report["sure"]["raw"][model][0] for model in both]
    sure = [f"{one['automated']:,}, {100 * one['accuracy']:.1f} %" for one in sure]
    expected.append(["raw confidence of .90 or more: texts, and how many are right", *sure])
    for guarantee in report["guarantees"][1:]:
        assert guarantee["base"]["threshold"]["value"] is None
        measured = guarantee["fine-tuned"]["measured"]
        share = f"{100 * measured['share']:.1f}"
        right = span([measured[name] for name in ("accuracy", "accuracy_low", "accuracy_high")])
        target = f"automated with {100 * guarantee['target']:.0f} % guaranteed, and what is right"
        expected.append([target, "nothing", f"{share} %, {right}", f"+{share} points"])
    cost = [f"${dollars[model][0]:,.0f}" for model in both]
    less, low, high = (f"-${-value:,.0f}" for value in dollars["difference"])
    expected.append(["dollars for 1,000 texts ($5 a review, $25 an error)", *cost, f"{less} [{low}, {high}]"])
    shown = [[cell for cell in row if cell.strip("| ")] for row in table("", "base", "fine-tuned", "difference")]
    assert shown == expected


@pytest.fixture
def tour():
    """Method 1's explanations of the recorded tour, by text."""
    lines = (ROOT / "data/predictions/tour.jsonl").read_text(encoding="utf-8").splitlines()
    return {row["text"]: row["logprobs"] for row in map(json.loads, lines)}


def test_six_texts_are_those_of_the_recorded_tour(tour):
    shown = table("text", "prediction", "confidence", "label mass")
    for (text, row), cells in zip(tour.items(), shown, strict=True):
        shares = (f"{100 * row[key]:.1f} %" for key in ("confidence", "label_mass"))
        assert cells == [text, row["prediction"], *shares]


def first_tokens(pairs):
    return ", ".join(f'`"{token}"` {100 * probability:.2f}' for token, probability in pairs)


def sums(totals):
    return ", ".join(f"{label} {100 * p:.2f} %" for label, p in sorted(totals.items(), key=lambda pair: -pair[1]))


def test_first_tokens_are_those_of_the_recorded_tour(tour):
    shown = table("text", "first tokens of the default model, percent", "sums")
    for text, tokens, totals in shown:
        row = tour[text]
        assert tokens == first_tokens((e["token"], math.exp(e["logprob"])) for e in row["top_tokens"][:4])
        assert totals == sums({label: p * row["label_mass"] for label, p in row["probabilities"].items()})
    assert len(shown) == 3


def test_what_the_article_recorded_is_quoted_as_recorded():
    text = (ROOT / "tests/data/article_token_tables.json").read_text(encoding="utf-8")
    recorded = {entry["text"]: entry for entry in json.loads(text)["first_token_tables"]}
    shown = table("text", f"first tokens of {LLAMA}", "sums")
    for text, tokens, totals in shown:
        entry = recorded[text]
        assert tokens == first_tokens((x["token"], x["probability"]) for x in entry["top_tokens"][:4])
        assert totals == sums(entry["printed_totals"])
    who = next(iter(recorded.values()))["top_tokens"][0]
    assert len(shown) == 3 and f'{100 * who["probability"]:.2f} % on "{who["token"].strip()}"' in ALL


def test_vote_share_and_probability_are_as_far_apart_as_the_table_says():
    import make_figures
    import voting

    printed = voting.convergence_table(make_figures.recorded_convergence()).splitlines()
    for draws, *numbers in table("draws", "distance of the vote share from the probability"):
        (line,) = (line for line in printed if line.split()[:1] == [draws])
        assert re.findall(r"\.\d{4}", line) == re.findall(r"\.\d{4}", " ".join(numbers))


def test_no_table_with_numbers_is_left_unchecked():
    checked = {"base", "prediction", "distance of the vote share from the probability"}
    checked |= {f"first tokens of {model}" for model in ("the default model, percent", LLAMA)}
    # Made of what is not in this repository, of simulations or on one machine; each page says so.
    elsewhere = {"rows scored", "texts a second", "seconds", "rows", "worlds", "labels", "always the commonest"}
    assert re.search(r"not in\s+this\s+repository", ALL) and re.search(r"measures\s+your\s+machine", ALL)
    words = {"what it is", "what it is about", "what it does", "what it owns", "what it holds", "what happens now"}
    words |= {"model", "use", "Method 1", ""}
    recomputed = "".join(re.findall(r"<!-- study .*?<!-- end -->", ALL, re.S))  # by test_public_study.py
    others = {header[1] for header, _ in tables() if " | ".join(header) not in recomputed}
    assert others <= checked | elsewhere | words
