"""html_report.py: pages of one file that need no network, and whose numbers are those of the report.

Predictions full of hostile texts are made here. What the page holds is read out of the file, and what it shows is read
in a headless Chromium (`make test-browser`); both are compared with the report and with counts made here from the
predictions. The browser gives nothing to a page but files, and notes whatever a page asks for or complains of.
"""

import json
import os
import re
import shutil
from dataclasses import replace
from html.parser import HTMLParser
from types import SimpleNamespace

import numpy as np
import pytest
from made_predictions import few_resamples

import calibration
import calibration_demo as demo
import compare_base_vs_finetuned as compare
import html_report

HOSTILE = [
    "<script>window.hacked = 1; alert(1)</script>",
    '</script><script>window.hacked = 1</script> "><img src=x onerror="window.hacked = 1">',
    "<!-- <script> & &lt;b&gt; {{plotly}} {{data}} {{nonce}} ${window.hacked = 1} \\u003c </style>",
    "' onclick='window.hacked = 1' \u202eright to left\u2028next line\0 \ud800",
    '<a href="javascript:window.hacked = 1">a</a><svg onload="window.hacked = 1"><b>bold</b>',
]
LABELS = ("no", "<b>yes</b><img src=x onerror='window.hacked = 1'>")


def save(path, n, seed, copies=1, **fields):
    """A predictions file of an overconfident model that is right as often as its confidence, halfway to 1/2, says."""
    draw, rows = np.random.default_rng(seed), []
    for i in range(n):
        confidence, said = float(draw.uniform(0.5, 1)), int(draw.integers(2))
        right = draw.random() < 0.25 + 0.75 * confidence - 0.02
        words = " ".join(map("".join, draw.choice(list("abcdefghijklmnopqrstuvwxyz"), (30, 5))))  # no near-duplicates
        row = {"text": f"{HOSTILE[i % len(HOSTILE)]} {words}", "label": LABELS[said if right else 1 - said]}
        probabilities = {label: confidence if k == said else 1 - confidence for k, label in enumerate(LABELS)}
        row |= {"prediction": LABELS[said], "confidence": confidence, "probabilities": probabilities, "label_mass": 1.0}
        row |= {"method": "logprobs", "model": HOSTILE[1], "task": "<t>", "fingerprint": "ab&lt;"} | fields
        rows += [{"id": f"{seed}-{i}-{copy}<i>{HOSTILE[0]}"} | row for copy in range(copies)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return demo.labelled_rows(path)


class Elements(HTMLParser):
    """Every element with its attributes and the text that it begins with."""

    def __init__(self, text):
        super().__init__()
        self.found, self.open = [], False
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.found.append(SimpleNamespace(tag=tag, attributes=dict(attributes), text=""))
        self.open = True

    def handle_endtag(self, tag):
        self.open = False

    def handle_data(self, data):
        if self.open:
            self.found[-1].text += data

    def named(self, tag):
        return [element for element in self.found if element.tag == tag]


def page_of(folder, fit, test, target_accuracy, volume=1000):
    """A page of these rows, the data in it, and the report, confidences and outcomes that it is made of."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo, "METHOD_NAMES", ("platt",))
        goal = demo.Goal(target_accuracy, label_targets=(f"{LABELS[0]}=0.75",))
        study = demo.calibration_study(fit, test, goal, method="platt")
        report = demo.study_report(study, volume=volume)
    path, calibrated = folder / "report.html", study.confidences["calibrated"]
    page = html_report.page_data(report, study.test.rows, calibrated, demo.targets_by_label(study))
    html_report.write_page(path, page)
    text = path.read_text("utf-8")
    elements = Elements(text)
    data = json.loads(elements.named("script")[1].text)
    assert data["report"] == json.loads(json.dumps(report, default=float))
    raw, correct = study.confidences["raw"], study.test.scores.correct
    return SimpleNamespace(
        path=path,
        text=text,
        elements=elements,
        rows=study.test.rows,
        raw=raw,
        calibrated=calibrated,
        correct=correct,
        **data,
    )


@pytest.fixture(scope="module")
def held_out(tmp_path_factory):
    """A guarantee of 80 %; a calibration file whose name is hostile, too."""
    folder = tmp_path_factory.mktemp("held_out")
    fit = save(folder / "<img src=x onerror='window.hacked=1'>", 600, 1)
    found = page_of(folder, fit, save(folder / "test.jsonl", 400, 2), 0.8, volume=777)
    assert found.report["threshold"]["value"] is not None
    return found


@pytest.fixture(scope="module")
def one_file(tmp_path_factory):
    """200 rows out-of-fold, each in two copies: a guarantee of 90 % that its own rows chose."""
    folder = tmp_path_factory.mktemp("one_file")
    found = page_of(folder, save(folder / "one.jsonl", 200, 5, copies=2, model="m"), None, 0.9)
    assert found.report["threshold"]["value"] is not None and found.report["protocol"] == "out-of-fold"
    return found


@pytest.fixture(scope="module")
def nothing_guaranteed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("nothing")
    found = page_of(folder, save(folder / "cal.jsonl", 300, 1), save(folder / "test.jsonl", 100, 2), 0.985)
    assert found.report["threshold"]["value"] is None
    return found


@pytest.fixture(scope="module")
def comparison(tmp_path_factory):
    """The page on 400 rows by two models, the second of which has 19 of 20 right; cross-fitted."""
    folder, of_labels = tmp_path_factory.mktemp("comparison"), dict(zip(LABELS, LABELS[::-1], strict=True))
    draw, recipes = np.random.default_rng(6), calibration.recipes
    save(folder / "base.jsonl", 400, 5)
    files = {"base": [json.loads(line) for line in (folder / "base.jsonl").read_text("utf-8").splitlines()]}
    files["fine-tuned"] = []
    for row in files["base"]:
        confidence = float(draw.uniform(0.5, 1))
        said = row["label"] if draw.random() < 0.95 else of_labels[row["label"]]
        probabilities = {label: confidence if label == said else 1 - confidence for label in LABELS}
        changes = {"prediction": said, "confidence": confidence, "probabilities": probabilities, "fingerprint": "cd"}
        files["fine-tuned"].append(row | changes)
    tuned = "".join(json.dumps(row) + "\n" for row in files["fine-tuned"])
    (folder / "<b>tuned.jsonl").write_text(tuned, encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(calibration, "recipes", lambda n, method="auto", n_labels=2: recipes(n, "platt", n_labels))
        few_resamples(patch, 40)
        found = compare.read_comparison([str(folder / "base.jsonl"), str(folder / "<b>tuned.jsonl")])
        html_report.write_page(
            folder / "comparison.html", compare.page_data(found, compare.comparison_report(found)), "comparison"
        )
    text = (folder / "comparison.html").read_text("utf-8")
    elements = Elements(text)
    calibrated = {name: model.confidence["calibrated"] for name, model in found.models.items()}
    page = {"path": folder / "comparison.html", "text": text, "elements": elements, "files": files}
    data = json.loads(elements.named("script")[1].text)
    return SimpleNamespace(**page, calibrated=calibrated, data=data)


@pytest.fixture(params=["held_out", "one_file", "nothing_guaranteed"])
def any_page(request):
    return request.getfixturevalue(request.param)


# The file


@pytest.mark.parametrize("name", ["held_out", "one_file", "nothing_guaranteed", "comparison"])
def test_it_is_one_file_that_loads_nothing_and_no_text_becomes_a_tag(name, request):
    from plotly.offline import get_plotlyjs

    page = request.getfixturevalue(name)
    found = page.elements
    plotly, data, *own = scripts = found.named("script")
    assert plotly.text == get_plotlyjs() and "<" not in data.text and data.text.isascii()
    rest = page.text.replace(plotly.text, "").replace(data.text, "")
    assert not re.search(r"https?:|//\w|url\(|@import|\bfetch\b|XMLHttpRequest|import\(", rest)
    sources = ("src", "href", "srcset", "action", "data")
    links = [value for element in found.found for name, value in element.attributes.items() if name in sources]
    assert links == ["data:,"]  # an empty icon, or browsers would ask a server for one
    assert not {"iframe", "object", "embed", "img", "base"} & {element.tag for element in found.found}
    policy = next(e.attributes["content"] for e in found.named("meta") if "http-equiv" in e.attributes)
    assert policy.startswith("default-src 'none'; script-src 'nonce-") and "connect-src" not in policy
    nonce = re.search(r"script-src 'nonce-([0-9a-f]{64})';", policy)[1]
    assert [script.attributes["nonce"] for script in scripts] == [nonce] * 4
    assert not any(word in script.text for script in own for word in ("eval(", "innerHTML", "insertAdjacent", "{{"))
    cells = page.errors + page.least_certain if name != "comparison" else page.data["rows"]["base"]
    assert {row["text"].rsplit(" ", 30)[0] for row in cells} == set(HOSTILE)


def test_it_holds_every_threshold_of_the_report(any_page):
    report, steps = any_page.report, {step["threshold"]: step for step in any_page.steps}
    assert [*steps] == sorted(steps) and len(steps) == len(any_page.steps) > 90 and any_page.steps[-1]["threshold"] == 1
    for gate in report["gates"]["calibrated"]:
        assert steps[gate["threshold"]] == gate
    for guarantee in report["guarantees"]:
        for rung in guarantee["ladder"]:
            t, measured = rung["threshold"], rung["measured"]
            assert {t["value"], t["naive_value"]} - {None} <= steps.keys()
            assert measured is None or measured.items() <= steps[t["value"]].items()
    costs, volume = report["cost_per_row"], report["settings"]["volume"]
    optimum, guaranteed = report["cost_optimal_threshold"], report["threshold"]["value"]
    assert steps[optimum]["dollars"] == pytest.approx(volume * costs["calibrated"])
    assert any_page.review_everything == pytest.approx(volume * costs["review everything"])
    assert any_page.steps[0]["dollars"] == pytest.approx(volume * costs["automate everything"])
    assert any_page.steps[any_page.start]["threshold"] == (optimum if guaranteed is None else guaranteed)


def test_label_targets_are_counted_again_from_the_predictions(held_out):
    said = np.array([row.prediction for row in held_out.rows])
    for label, steps in held_out.by_label.items():
        mine = said == label
        assert [step["is_own"] for step in steps].count(True) == 1
        for step in steps:
            value, measured = step["threshold"]["value"], step["measured"]
            assert (value is None) == (measured is None)
            if value is not None:
                taken = held_out.calibrated[mine] >= value
                assert (measured["automated"], measured["share"]) == (taken.sum(), pytest.approx(taken.mean()))
                assert measured["right"] == held_out.correct[mine][taken].sum()
    assert {step["threshold"]["value"] for steps in held_out.by_label.values() for step in steps} - {None}


def test_the_tables_are_the_most_confident_errors_and_the_least_certain_rows(held_out):
    order = sorted(range(400), key=lambda i: held_out.calibrated[i])
    errors = [i for i in reversed(order) if not held_out.correct[i]]
    for shown, numbers in ((held_out.errors, errors[:50]), (held_out.least_certain, order[:50])):
        for cells, i in zip(shown, numbers, strict=True):
            row = held_out.rows[i]
            assert (cells["id"], cells["text"], cells["label"]) == (row.id, row.text, row.label)
            assert (cells["prediction"], cells["confidence"]) == (row.prediction, row.confidence)
            assert cells["calibrated_confidence"] == held_out.calibrated[i]


def test_of_many_long_texts_fifty_beginnings_are_shown(held_out):
    rows = [replace(row, text=row.text + "x" * 5000) for row in held_out.rows]
    shown = html_report.table_rows(rows, held_out.calibrated, held_out.calibrated, np.arange(400))
    assert [cells["id"] for cells in shown] == [row.id for row in rows[:50]]
    assert all(len(cells["text"]) < 520 and cells["text"].endswith(" [...]") for cells in shown)


def test_both_models_at_every_threshold_and_the_rows_they_differ_on_are_counted_again(comparison):
    data, correct = comparison.data, {}
    for name, rows in comparison.files.items():
        correct[name] = np.array([row["prediction"] == row["label"] for row in rows])
        thresholds = [step["threshold"] for step in data["steps"][name]]
        assert thresholds == sorted(set(thresholds)) and thresholds[-1] == 1 and thresholds[data["start"]] == 0.8
        assert {threshold["value"] for threshold in data["guaranteed"][name]} <= set(thresholds)
        for step in data["steps"][name]:
            taken = comparison.calibrated[name] >= step["threshold"]
            wrong = int((~correct[name][taken]).sum())
            assert (step["automated"], step["right"]) == (taken.sum(), taken.sum() - wrong)
            assert step["dollars"] == pytest.approx(1000 * (5 * (~taken).sum() + 25 * wrong) / 400)
    base, tuned = comparison.files.values()
    apart = [i for i in range(400) if base[i]["prediction"] != tuned[i]["prediction"]]
    apart.sort(key=lambda i: -sum(scores[i] for scores in comparison.calibrated.values()))
    assert data["differing"] == len(apart) > 50
    for name, rows in comparison.files.items():
        for cells, i in zip(data["rows"][name], apart[:50], strict=True):
            shown = rows[i]["id"], rows[i]["text"], rows[i]["label"], rows[i]["prediction"]
            assert (cells["id"], cells["text"], cells["label"], cells["prediction"]) == shown
            assert cells["calibrated_confidence"] == comparison.calibrated[name][i]
    (by_label,) = [table["cells"] for table in data["tables"] if table["title"].startswith("By true label")]
    for label, *cells in by_label[1:]:
        mine = np.array([row["label"] == label for row in base])
        one, other = (correct[name][mine] for name in comparison.files)
        assert cells[0] == str(mine.sum()) and cells[4:6] == [str((one & ~other).sum()), str((other & ~one).sum())]
        assert [cell[:5] for cell in cells[1:3]] == [f"{one.mean():.3f}", f"{other.mean():.3f}"]
    assert [label for label, *_ in by_label] == ["true label", *LABELS]


# In a browser

browsers = pytest.mark.browser


@pytest.fixture(scope="module")
def chromium():
    from playwright.sync_api import sync_playwright

    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome", "microsoft-edge")
    found = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, names)), None)
    assert found, "no Chromium: apt-get install chromium, or name yours in the environment variable CHROMIUM"
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=found)
        yield browser
        browser.close()


@pytest.fixture
def visit(chromium):
    """Open a page in a browser without a network; at the end nothing may have been asked for, run or complained of."""
    contexts, seen, loaded = [], [], []

    def open_page(found, **options):
        context = chromium.new_context(viewport={"width": 1280, "height": 900}, **options)
        context.route("**/*", lambda route: (loaded.append(route.request.url), route.continue_()))
        contexts.append(context)
        page, uri = context.new_page(), found.path.as_uri()
        page.on("request", lambda request: request.url == uri or seen.append(f"request: {request.url}"))
        page.on("pageerror", lambda error: seen.append(f"error: {error}"))
        page.on("console", lambda message: seen.append(f"console: {message.text}"))
        page.on("dialog", lambda dialog: (seen.append("a dialog"), dialog.dismiss()))
        page.goto(uri)
        assert loaded.pop() == uri
        return page

    open_page.seen, open_page.loaded = seen, loaded
    yield open_page
    for context in contexts:
        for page in context.pages:
            page.wait_for_timeout(50)
        context.close()
    assert (seen, loaded) == ([], [])


def text(page, selector):
    return page.locator(selector).first.text_content().strip().replace("\u00a0", " ")


def move(page, found, threshold):
    """Set the slider as a script does."""
    change = "(slider, i) => { slider.value = i; slider.dispatchEvent(new Event('input', { bubbles: true })); }"
    index = [step["threshold"] for step in found.steps].index(threshold)
    page.locator("#threshold").evaluate(change, index)


def check(page, found, step):
    """What the page shows is this step: exactly what stands behind the four large numbers, and rounded to be read."""
    expected = {name: step[name] for name in ("share", "accuracy", "dollars")}
    expected["wrong"] = step["automated"] - step["right"]
    behind = {name: page.locator(f"#{name}").get_attribute("value") for name in expected}
    assert {name: float(value) if value else None for name, value in behind.items()} == expected
    assert float(text(page, "#share").removesuffix(" %")) == pytest.approx(100 * step["share"], abs=0.0501)
    if step["automated"]:
        low, high = re.findall(r"([\d.]+) %", text(page, "#interval"))[-2:]
        shown = [float(text(page, "#accuracy").removesuffix(" %")), float(low), float(high)]
        exact = [100 * step[key] for key in ("accuracy", "accuracy_low", "accuracy_high")]
        assert shown == pytest.approx(exact, abs=0.0501)
    assert float(re.sub("[$,]", "", text(page, "#dollars"))) == pytest.approx(step["dollars"], abs=0.501)
    assert text(page, "#automated").startswith(f"{step['automated']:,} of {len(found.rows):,} rows, ")
    assert float(text(page, "#chosen")) == pytest.approx(step["threshold"], abs=0.00101)
    assert page.evaluate("document.getElementById('curve').data[2].x[0]") == step["share"]
    assert page.evaluate("document.getElementById('costs').data[1].y[0]") == step["dollars"]
    for name, rows in (("errors", found.errors), ("review", found.least_certain)):
        decisions = page.locator(f"#{name} td.decision").all_text_contents()
        automated = [row["calibrated_confidence"] >= step["threshold"] for row in rows]
        assert decisions == ["automate" if yes else "review" for yes in automated]


@browsers
def test_it_opens_without_errors_or_requests_and_fits_the_screen_light_and_dark(any_page, visit):
    page, fonts = visit(any_page), set()
    for scheme, width in (("light", 1280), ("light", 390), ("dark", 390), ("dark", 1280)):
        page.set_viewport_size({"width": width, "height": 900})
        page.emulate_media(color_scheme=scheme)
        page.wait_for_timeout(300)
        for name in ("curve", "costs", "raw", "calibrated"):
            box = page.locator(f"#{name} svg.main-svg").first.bounding_box()
            assert 0 <= box["x"] < box["x"] + box["width"] <= width and box["width"] > 300
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        colours = page.evaluate("(s => [s.backgroundColor, s.color])(getComputedStyle(document.body))")
        dark = [max(map(int, re.findall(r"\d+", colour))) < 128 for colour in colours]
        assert dark == [scheme == "dark", scheme == "light"]
        fonts.add((scheme, page.evaluate("document.getElementById('curve').layout.font.color")))
        check(page, any_page, any_page.steps[any_page.start])
    assert len(fonts) == len({font for _, font in fonts}) == 2  # the charts follow the screen


@browsers
def test_it_opens_with_the_verdict_and_shows_which_labels_are_missed(any_page, visit):
    page, verdict, errors = visit(any_page), any_page.report["verdict"], any_page.report["label_errors"]
    first, *others = verdict["sentences"]
    assert first.startswith(("better", "worse", "no better"))
    assert text(page, "#verdict p >> nth=0") == f"Verdict: {first}"
    assert page.locator("#verdict li").all_text_contents() == others
    n, right = len(any_page.rows), int(any_page.correct.sum())
    facts = dict(zip(*(page.locator(f"#verdict {tag}").all_text_contents() for tag in ("dt", "dd")), strict=True))
    assert facts["Accuracy"].startswith(f"{right / n:.3f} [") and f"n = {n} labelled rows" in text(page, "#verdict")
    assert facts[f'Always "{verdict["commonest"]}"'] == f"{verdict['commonest_share']:.3f}"
    parts = [float(facts[name]) for name in ("its calibration part", "its refinement")]
    assert sum(parts) == pytest.approx(float(facts["Log loss"]), abs=0.002)
    works = "works" in page.locator("#verdict").get_attribute("class").split()
    assert works == (not verdict["next_steps"])
    cells = page.locator("#recalls tr td:first-child").all_text_contents()
    assert cells == [row["label"] for row in errors["recalls"]] and set(cells) == set(LABELS)
    mistaken = [(row.label, row.prediction) for row in any_page.rows if row.label != row.prediction]
    for number, row in enumerate(errors["confusions"]):
        shown = page.locator("#confusions tr").nth(number + 1).locator("td").all_text_contents()
        assert shown == [row["label"], row["prediction"], str(mistaken.count((row["label"], row["prediction"])))]


@browsers
def test_the_slider_moves_by_key_and_every_number_with_it(held_out, visit):
    page, steps, at = visit(held_out), held_out.steps, held_out.start
    slider = page.locator("#threshold")
    page.keyboard.press("Tab")  # it is the first thing on the page to take the focus
    assert slider.evaluate("slider => slider === document.activeElement")
    for key, index in (("ArrowRight", at + 1), ("ArrowLeft", at), ("ArrowLeft", at - 1), ("Home", 0), ("End", -1)):
        page.keyboard.press(key)
        check(page, held_out, steps[index])
        assert text(page, "#chosen") in slider.get_attribute("aria-valuetext")
    page.keyboard.press("PageDown")
    assert 0 < int(slider.input_value()) < len(steps) - 2


@browsers
def test_the_buttons_lead_to_their_thresholds_and_the_gates_show_their_numbers(held_out, visit):
    page, steps = visit(held_out), {step["threshold"]: step for step in held_out.steps}
    for gate in held_out.report["gates"]["calibrated"]:
        move(page, held_out, gate["threshold"])
        check(page, held_out, gate)
    ladders = [guarantee["ladder"] for guarantee in held_out.report["guarantees"]]
    values = [rung["threshold"]["value"] for ladder in ladders for rung in ladder if rung["certainty"] == 0.95]
    wanted = [*filter(None, values), held_out.report["cost_optimal_threshold"]]
    assert page.locator("#presets button").count() == len(wanted)
    for i, value in enumerate(wanted):
        page.locator("#presets button").nth(i).focus()
        page.keyboard.press("Enter")
        check(page, held_out, steps[value])
    rungs = [rung["threshold"] for ladder in ladders for rung in ladder if rung["threshold"]["value"] is not None]
    assert page.locator("#guarantees button").count() == len(rungs)
    for i, threshold in enumerate(rungs):
        page.locator("#guarantees button").nth(i).press("Enter")
        check(page, held_out, steps[threshold["value"]])
        target = f"at least {100 * threshold['target_accuracy']:.10g} % right "
        sure = (
            "on average"
            if threshold["kind"] == "average"
            else f"with {100 - 100 * threshold['delta']:.10g} % certainty"
        )
        assert target + sure in text(page, "#guarantee")


@browsers
def test_what_is_guaranteed_is_said_at_every_threshold(held_out, one_file, nothing_guaranteed, visit):
    for found, target in ((held_out, "80 %"), (one_file, "90 %")):
        page, value, last = visit(found), found.report["threshold"]["value"], len(found.steps) - 1
        since, place = f"rom {int(1000 * value + 1e-9) / 1000:.3f} on", found.start
        for i in (0, place // 2, place - 1, place, place + 1, last):
            move(page, found, found.steps[i]["threshold"])
            said = text(page, "#guarantee p")
            if i < place:
                assert said.startswith(f"Nothing is guaranteed here. F{since}, at least {target} right")
            elif i == place:
                assert said == f"Guaranteed: the answers f{since} are at least {target} right with 95 % certainty."
            else:
                assert said.startswith(f"Within the guaranteed region: all answers f{since}, taken together, are at")
                assert said.endswith("For this stricter part alone nothing more is guaranteed.")
            assert ("kept" in page.locator("#guarantee").get_attribute("class").split()) == (i >= place)
        start = page.evaluate("parseFloat(document.querySelector('#guaranteed div').style.marginLeft)")
        assert start == pytest.approx(100 * place / last, abs=0.001)  # as the browser rounds it
    page = visit(nothing_guaranteed)
    for step in (nothing_guaranteed.steps[0], nothing_guaranteed.steps[-1]):
        move(page, nothing_guaranteed, step["threshold"])
        assert text(page, "#guarantee").startswith("Nothing can be guaranteed: 300 labels prove")
        assert page.locator("#guarantee").get_attribute("class") == "card"
    assert page.evaluate("document.querySelector('#guaranteed div').getBoundingClientRect().width") < 1


@browsers
def test_each_label_s_target_moves_its_own_line_and_what_all_automate_together(held_out, visit):
    page, lines = visit(held_out), held_out.by_label
    sliders, own = page.locator("#labels input"), []
    assert page.locator("#labels td:first-child").all_text_contents() == [*LABELS]
    for number, (label, steps) in enumerate(lines.items()):
        own.append(next(i for i, step in enumerate(steps) if step["is_own"]))
        assert int(sliders.nth(number).input_value()) == own[-1]
        assert steps[own[-1]]["threshold"]["target_accuracy"] == (0.75 if label == LABELS[0] else 0.8)
    for moved in (own, [0, own[1]], [len(lines[LABELS[0]]) - 1, 0]):
        measured = []
        for number, (steps, place) in enumerate(zip(lines.values(), moved, strict=True)):
            change = "(slider, i) => { slider.value = i; slider.dispatchEvent(new Event('input')); }"
            sliders.nth(number).evaluate(change, place)
            cells = [text(page, f"#labels tr:nth-child({number + 1}) td:nth-child({i})") for i in range(1, 7)]
            threshold, row = steps[place]["threshold"], steps[place]["measured"]
            assert cells[1].startswith(f"{100 * threshold['target_accuracy']:.10g} %")
            assert (cells[2] == "nothing") == (threshold["value"] is None)
            if row:
                assert cells[3] == f"{100 * row['share']:.1f} %, {row['automated']} rows"
                measured.append(row)
        automated, right = (sum(row[key] for row in measured) for key in ("automated", "right"))
        said = f"Together these targets automate {100 * automated / 400:.1f} % of the rows"
        assert text(page, "#together").startswith(said)
        assert not automated or f"{100 * right / automated:.1f} % of them right" in text(page, "#together")


@browsers
def test_of_many_labels_ten_sliders_are_shown_until_all_are_asked_for(one_file, visit, tmp_path):
    steps = one_file.by_label[LABELS[0]]
    by_label = {}
    for n in range(77):  # the last label is predicted most
        by_label[f"label {n}"] = [step | {"threshold": step["threshold"] | {"n": n}} for step in steps]
    data = json.loads(one_file.elements.named("script")[1].text) | {"by_label": by_label}
    html_report.write_page(tmp_path / "many.html", data)
    for width in (1280, 390):
        page = visit(SimpleNamespace(path=tmp_path / "many.html"))
        page.set_viewport_size({"width": width, "height": 900})
        shown = page.locator("#labels input:visible")
        assert shown.evaluate_all("all => all.map((slider) => slider.ariaLabel)") == [
            f"Target of label {n}" for n in range(76, 66, -1)
        ]
        page.get_by_role("button", name="Show all 77 labels").press("Enter")
        assert shown.count() == 77
        assert page.evaluate("document.activeElement.ariaLabel") == "Labels"


@browsers
def test_every_number_says_its_n_and_protocol_and_in_sample_ones_the_word(held_out, one_file, visit):
    pages, guaranteed = {}, one_file.report["threshold"]["value"]
    for found, threshold, word in (
        (one_file, guaranteed, "in-sample"),
        (one_file, 0.7, "out-of-fold"),
        (held_out, 0.7, "held-out"),
    ):
        page = pages[found.report["protocol"]] = visit(found)
        move(page, found, threshold)
        for name in ("automated", "interval", "reviews", "bill"):
            assert word in text(page, f"#{name}"), name
        for name in ("curve", "costs", "raw", "calibrated"):
            words = text(page, f"#{name} + figcaption")
            assert "n = 400" in words and (found.report["protocol"] in words or "nothing fitted" in words)
        measured = page.locator("#guarantees th").nth(4).text_content()  # after target, certainty, from, evidence
        assert measured == f"Measured ({found.report['threshold_measured_protocol']}, n = 400)"
    page = pages["out-of-fold"]
    assert "Out-of-fold: each of the 400 rows in 200 groups" in text(page, "#protocol")
    assert "rows of a group are not" in text(page, "#remarks")
    page = pages["held-out"]
    assert "Held-out: calibrator and guaranteed threshold come from 600 rows" in text(page, "#protocol")
    facts = page.locator("#facts").inner_text()
    for fact in ("platt, of", "ab&lt;", "logprobs", "n = 400, held-out", "<img src=x onerror='window.hacked=1'>"):
        assert fact in facts


@browsers
def test_hostile_texts_are_shown_as_they_are_and_run_nothing(held_out, visit):
    page = visit(held_out)
    for name, rows in (("errors", held_out.errors), ("review", held_out.least_certain)):
        for cell, key in (("text", "text"), ("text + td", "label"), ("decision + td", "id")):
            assert page.locator(f"#{name} td.{cell}").all_text_contents() == [row[key] for row in rows]
    assert page.title() == f"Calibration report: {HOSTILE[1]}, <t>"
    assert page.locator("img, table script, table a, table b, table i, table svg, header script").count() == 0
    assert page.locator("script").count() == 4
    page.wait_for_timeout(200)
    assert page.evaluate("window.hacked") is None


@browsers
def test_even_a_tag_that_got_in_could_not_run_a_script_or_load_an_image(held_out, visit):
    page = visit(held_out)
    tags = "<img src=x onerror='window.hacked = 1'><svg onload='window.hacked = 1'></svg><img src='https://a.invalid/'>"
    page.locator("footer").evaluate("(footer, tags) => { footer.innerHTML = tags; }", tags)
    page.evaluate("document.body.append(Object.assign(document.createElement('script'), {text: 'window.hacked = 1'}))")
    page.wait_for_timeout(200)
    assert page.evaluate("window.hacked") is None
    assert len([line for line in visit.seen if "Content Security Policy" in line]) >= 4 and visit.loaded == []
    visit.seen.clear()


@browsers
def test_a_dot_tells_its_bin(held_out, visit):
    page, bins = visit(held_out), held_out.reliability["raw"]
    page.locator("#raw").scroll_into_view_if_needed()
    dots = page.locator("#raw .points path")
    assert dots.count() == len(bins)
    box = dots.nth(3).bounding_box()
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    page.locator("#raw .hoverlayer .hovertext").wait_for()
    said, found = text(page, "#raw .hoverlayer .hovertext"), bins[3]
    assert f"{found['from']:.2f} to {found['to']:.2f}, n = {found['n']}" in said
    assert f"mean confidence {found['mean_confidence']:.3f}" in said and f"right {found['accuracy']:.1%}" in said
    assert f"{found['accuracy_low']:.1%} to {found['accuracy_high']:.1%}" in said


@browsers
def test_without_javascript_the_page_says_so(held_out, visit):
    page = visit(held_out, java_script_enabled=False)
    assert page.locator("noscript").is_visible() and "needs JavaScript" in page.locator("noscript").inner_text()


@browsers
def test_the_comparison_moves_both_models_and_shows_hostile_texts_as_they_are(comparison, visit):
    page, data = visit(comparison), comparison.data
    slider, names = page.locator("#threshold"), [*comparison.files]
    page.keyboard.press("Tab")
    for key, index in (("ArrowRight", data["start"] + 1), ("Home", 0), ("End", -1)):
        page.keyboard.press(key)
        for k, name in enumerate(names):
            step, rows = data["steps"][name][index], data["rows"][name]
            behind = {
                key: page.locator(f"#{name}-{key}").get_attribute("value") for key in ("share", "dollars", "wrong")
            }
            assert {key: float(value) for key, value in behind.items()} == {
                "share": step["share"],
                "dollars": step["dollars"],
                "wrong": step["automated"] - step["right"],
            }
            assert page.evaluate(f"document.getElementById('curve').data[{4 + k}].x[0]") == step["share"]
            decisions = page.locator("#rows td.decision").all_text_contents()[k::2]
            automated = [row["calibrated_confidence"] >= step["threshold"] for row in rows]
            assert decisions == ["automate" if yes else "review" for yes in automated]
        assert text(page, "#chosen") in slider.get_attribute("aria-valuetext")
    for number, table in enumerate(data["tables"]):
        cells = page.locator(f"#table-{number} td").all_text_contents()
        assert cells == [cell for row in table["cells"][1:] for cell in row]
    assert page.locator("#rows td.text").all_text_contents() == [row["text"] for row in data["rows"]["base"]]
    assert text(page, "#verdict p") == f"Verdict: {data['verdict'][0]}"
    button = page.locator("#presets button", has_text="fine-tuned, 90").first
    button.press("Enter")
    assert text(page, "#chosen") == button.text_content()[-5:]
    assert "at least 90 % right with 95 % certainty" in text(page, "#fine-tuned-guarantee")
    for scheme, width in (("dark", 390), ("light", 320)):
        page.set_viewport_size({"width": width, "height": 900})
        page.emulate_media(color_scheme=scheme)
        for _ in range(30):  # charts follow in their own time
            page.wait_for_timeout(100)
            if (wide := page.evaluate("document.documentElement.scrollWidth")) <= width:
                break
        assert wide <= width
    assert page.locator("img, table script, table a, table b, table i, table svg, header script").count() == 0
    assert page.evaluate("window.hacked") is None
