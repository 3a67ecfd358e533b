"""html_report.py: one file that needs no network, and whose numbers are report.json's.

Predictions full of hostile texts are made here. What the page holds is read out of the file, and what it shows is read
in a headless Chromium (`make test-browser`); both are compared with report.json and with counts made here from the
predictions. The browser gives nothing to a page but files, and notes whatever a page asks for or complains of.
"""

import itertools
import json
import os
import re
import shutil
from dataclasses import replace
from html.parser import HTMLParser
from types import SimpleNamespace

import numpy as np
import pytest
from scipy.stats import binomtest

import calibration_demo
import calibration_metrics
import html_report
import predictions
from calibration import load_calibrator

HOSTILE = [
    "<script>window.hacked = 1; alert(1)</script>",
    '</script><script>window.hacked = 1</script> "><img src=x onerror="window.hacked = 1">',
    "<!-- <script> & &lt;b&gt; {{plotly}} {{data}} {{nonce}} ${window.hacked = 1} \\u003c </style>",
    "' onclick='window.hacked = 1' \u202eright to left\u2028next line\0 \ud800",
    '<a href="javascript:window.hacked = 1">a</a><svg onload="window.hacked = 1"><b>bold</b>',
]
LABELS = ("no", "<b>yes</b><img src=x onerror='window.hacked = 1'>")


def made(n, seed, name, **fields):
    """Rows of an overconfident model that is right as often as its confidence, halfway to one half, says."""
    draw, rows = np.random.default_rng(seed), []
    for i in range(n):
        confidence, said = float(draw.uniform(0.5, 1)), int(draw.integers(2))
        right = draw.random() < 0.25 + 0.75 * confidence - 0.02
        words = " ".join(map("".join, draw.choice(list("abcdefghijklmnopqrstuvwxyz"), (30, 5))))  # no near-duplicates
        text = f"{HOSTILE[i % len(HOSTILE)]} {words}"
        probabilities = {label: confidence if k == said else 1 - confidence for k, label in enumerate(LABELS)}
        row = {"id": f"{name}{i}<i>{HOSTILE[0]}", "text": text, "label": LABELS[said if right else 1 - said]}
        row |= {"prediction": LABELS[said], "confidence": confidence, "probabilities": probabilities, "label_mass": 1.0}
        rows.append(row | {"method": "logprobs", "model": HOSTILE[1], "task": "<t>", "fingerprint": "ab&lt;"} | fields)
    return rows


def save(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


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


def opened(folder, test, *argv):
    """Run the script without its figures; the page, the data in it, the report, and (calibrated, correct) by row."""
    with pytest.MonkeyPatch.context() as patch:
        real = calibration_metrics.resamples
        patch.setattr(calibration_demo, "draw_figures", lambda *ignored: None)
        patch.setattr(calibration_demo, "METHOD_NAMES", ("platt",))
        patch.setattr(calibration_metrics, "resamples", lambda groups, n=0, seed=0: real(groups, 20, seed))
        calibration_demo.main([*map(str, argv), "--method", "platt", "--html", "--output-dir", str(folder)])
    path, rows = folder / "report.html", predictions.read(test)
    page = path.read_text("utf-8")
    scripts = Elements(page).named("script")
    return SimpleNamespace(
        path=path,
        page=page,
        scripts=scripts,
        data=json.loads(scripts[1].text),
        report=json.loads((folder / "report.json").read_text("utf-8")),
        rows=rows,
        correct=np.array([row.prediction == row.label for row in rows]),
    )


@pytest.fixture(scope="module")
def held_out(tmp_path_factory):
    """A guarantee at 80 %; a calibration file whose name is hostile, too."""
    folder = tmp_path_factory.mktemp("held_out")
    cal, test = save(folder / "<img src=x onerror='window.hacked=1'>", made(600, 1, "c")), folder / "test.jsonl"
    save(test, made(400, 2, "t"))
    argv = ("--calibrate-on", cal, "--test-on", test, "--target-accuracy", "0.8", "--volume", "777")
    found = opened(folder / "out", test, *argv)
    fitted = load_calibrator(folder / "out/calibrator.json")
    found.calibrated = np.array([row.extras["calibrated_confidence"] for row in fitted.apply(found.rows)])
    assert found.report["threshold"]["value"] is not None
    return found


@pytest.fixture(scope="module")
def one_file(tmp_path_factory):
    """200 rows out-of-fold, each in two copies: a guarantee of 90 % that its own rows chose."""
    folder = tmp_path_factory.mktemp("one_file")
    rows = made(200, 5, "r", model="m")
    path = save(folder / "one.jsonl", rows + [row | {"id": f"copy of {row['id']}"} for row in rows])
    found = opened(folder / "out", path, path, "--target-accuracy", "0.9")
    assert found.report["threshold"]["value"] is not None and found.report["protocol"] == "out-of-fold"
    return found


@pytest.fixture(scope="module")
def nothing_guaranteed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("nothing")
    cal, test = save(folder / "cal.jsonl", made(300, 1, "c")), save(folder / "test.jsonl", made(100, 2, "t"))
    found = opened(folder / "out", test, "--calibrate-on", cal, "--test-on", test, "--target-accuracy", "0.985")
    assert found.report["threshold"]["value"] is None
    return found


PAGES = ("held_out", "one_file", "nothing_guaranteed")


@pytest.fixture(params=PAGES)
def any_page(request):
    return request.getfixturevalue(request.param)


# The file


def test_it_is_one_file_that_loads_nothing(any_page):
    from plotly.offline import get_plotlyjs

    found = Elements(any_page.page)
    plotly, data, own = any_page.scripts
    assert plotly.text == get_plotlyjs()
    rest = any_page.page.replace(plotly.text, "").replace(data.text, "")
    assert not re.search(r"https?:|//\w|url\(|@import|\bfetch\b|XMLHttpRequest|import\(", rest)
    sources = ("src", "href", "srcset", "action", "data")
    links = [value for element in found.found for name, value in element.attributes.items() if name in sources]
    assert links == ["data:,"]  # an empty icon, or browsers would ask a server for one
    assert not {"iframe", "object", "embed", "img", "base"} & {element.tag for element in found.found}
    policy = next(e.attributes["content"] for e in found.named("meta") if "http-equiv" in e.attributes)
    assert policy.startswith("default-src 'none'; script-src 'nonce-") and "connect-src" not in policy
    nonce = re.search(r"script-src 'nonce-([0-9a-f]{64})';", policy)[1]
    assert [script.attributes["nonce"] for script in any_page.scripts] == [nonce] * 3
    assert "eval(" not in own.text and "innerHTML" not in own.text and "insertAdjacent" not in own.text


def test_it_holds_the_report_and_every_threshold_of_it(any_page):
    data, report = any_page.data, any_page.report
    assert data["report"] == report
    steps = {step["threshold"]: step for step in data["steps"]}
    assert [*steps] == sorted(steps) and len(steps) == len(data["steps"])
    for gate in report["gates"]["calibrated"]:
        assert steps[gate["threshold"]] == gate
    for guarantee in report["guarantees"]:
        t, measured = guarantee["threshold"], guarantee["measured"]
        assert {t["value"], t["naive_value"]} - {None} <= steps.keys()
        assert measured is None or measured.items() <= steps[t["value"]].items()
    costs, at = report["cost_per_row"], steps[report["cost_optimal_threshold"]]
    volume = report["settings"]["volume"]
    assert at["dollars"] == pytest.approx(volume * costs["calibrated"])
    assert data["review_everything"] == pytest.approx(volume * costs["review everything"])
    assert data["steps"][0]["dollars"] == pytest.approx(volume * costs["automate everything"])
    start, guaranteed = data["steps"][data["start"]]["threshold"], report["threshold"]["value"]
    assert start == (report["cost_optimal_threshold"] if guaranteed is None else guaranteed)


def test_every_step_is_counted_again_from_the_predictions(held_out):
    n, volume = len(held_out.rows), 777
    assert len(held_out.data["steps"]) > 90 and held_out.data["steps"][-1]["threshold"] == 1
    assert held_out.data["steps"][0]["automated"] == n
    for step in held_out.data["steps"]:
        taken = held_out.calibrated >= step["threshold"]
        k, right = int(taken.sum()), int(held_out.correct[taken].sum())
        assert (step["automated"], step["right"], step["share"]) == (k, right, pytest.approx(k / n))
        assert step["review_dollars"] == pytest.approx(volume * 5 * (n - k) / n)
        assert step["error_dollars"] == pytest.approx(volume * 25 * (k - right) / n)
        assert step["dollars"] == pytest.approx(step["review_dollars"] + step["error_dollars"])
        if k:
            interval = binomtest(right, k).proportion_ci(0.95, "exact")
            ours = step["accuracy"], step["accuracy_low"], step["accuracy_high"]
            assert ours == pytest.approx((right / k, interval.low, interval.high))
        else:
            assert step["accuracy"] is step["accuracy_low"] is step["accuracy_high"] is None


def test_the_reliability_bins_are_counted_again(held_out):
    raw = np.array([row.confidence for row in held_out.rows])
    for name, confidence in (("raw", raw), ("calibrated", held_out.calibrated)):
        found, total = held_out.data["reliability"][name], 0
        for low, high in itertools.pairwise(i / 20 for i in range(21)):
            inside = (confidence >= low) & ((confidence < high) | (high == 1))
            bins = [b for b in found if b["from"] == low]
            assert len(bins) == inside.any()
            for b in bins:
                n, right = int(inside.sum()), int(held_out.correct[inside].sum())
                interval = binomtest(right, n).proportion_ci(0.95, "exact")
                assert (b["to"], b["n"], b["accuracy"]) == (high, n, pytest.approx(right / n))
                assert b["mean_confidence"] == pytest.approx(confidence[inside].mean())
                assert (b["accuracy_low"], b["accuracy_high"]) == pytest.approx((interval.low, interval.high))
                total += n
        assert total == len(confidence)


def test_the_tables_are_the_most_confident_errors_and_the_least_certain_rows(held_out):
    order = sorted(range(400), key=lambda i: held_out.calibrated[i])
    errors = [i for i in reversed(order) if not held_out.correct[i]]
    for name, numbers in (("errors", errors[:50]), ("least_certain", order[:50])):
        shown = held_out.data[name]
        assert len(shown) == 50
        for cells, i in zip(shown, numbers, strict=True):
            row = held_out.rows[i]
            assert (cells["id"], cells["text"], cells["label"]) == (row.id, row.text, row.label)
            assert (cells["prediction"], cells["confidence"]) == (row.prediction, row.confidence)
            assert cells["calibrated_confidence"] == pytest.approx(held_out.calibrated[i])


def test_no_text_becomes_a_tag_and_none_is_changed(any_page):
    assert len(any_page.scripts) == 3 and not Elements(any_page.page).named("img")
    source = any_page.scripts[1].text
    assert "<" not in source and source in any_page.page and source.isascii()
    texts = {row["text"].rsplit(" ", 30)[0] for row in any_page.data["errors"] + any_page.data["least_certain"]}
    assert texts == set(HOSTILE)


def test_of_many_long_texts_fifty_beginnings_are_shown(held_out):
    rows = [replace(row, text=row.text + "x" * 5000) for row in held_out.rows]
    shown = html_report.table_rows(rows, held_out.calibrated, np.arange(400))
    assert [cells["id"] for cells in shown] == [row.id for row in rows[:50]]
    assert all(len(cells["text"]) < 520 and cells["text"].endswith(" [...]") for cells in shown)


def test_equal_data_give_equal_bytes(held_out, tmp_path):
    html_report.write_page(tmp_path / "again.html", held_out.data)
    assert (tmp_path / "again.html").read_bytes() == held_out.path.read_bytes()


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

    def open_page(found, width=1280, **options):
        context = chromium.new_context(viewport={"width": width, "height": 900}, **options)
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


def values(page):
    """The exact numbers that stand behind the four large ones, None where there is none."""
    names = ("share", "accuracy", "wrong", "dollars")
    shown = {name: page.locator(f"#{name}").get_attribute("value") for name in names}
    return {name: float(value) if value else None for name, value in shown.items()}


def move(page, index):
    """Set the slider as a script does."""
    change = "(slider, i) => { slider.value = i; slider.dispatchEvent(new Event('input', { bubbles: true })); }"
    page.locator("#threshold").evaluate(change, index)


def check(page, found, step):
    """What the page shows is this step, which is counted again from the predictions where it can be."""
    wrong = step["automated"] - step["right"]
    expected = {"share": step["share"], "accuracy": step["accuracy"], "wrong": wrong, "dollars": step["dollars"]}
    assert values(page) == expected
    texts = {name: page.locator(f"#{name}").text_content() for name in expected}
    assert float(texts["share"].removesuffix(" %")) == pytest.approx(100 * step["share"], abs=0.0501)
    if step["automated"]:
        assert float(texts["accuracy"].removesuffix(" %")) == pytest.approx(100 * step["accuracy"], abs=0.0501)
        ends = re.findall(r"([\d.]+) %", page.locator("#interval").text_content())[-2:]
        low_high = [100 * step["accuracy_low"], 100 * step["accuracy_high"]]
        assert [*map(float, ends)] == pytest.approx(low_high, abs=0.0501)
    assert float(re.sub("[$,]", "", texts["dollars"])) == pytest.approx(step["dollars"], abs=0.501)
    assert page.locator("#automated").text_content().startswith(f"{step['automated']:,} of {len(found.rows):,} rows, ")
    assert float(page.locator("#chosen").text_content()) == pytest.approx(step["threshold"], abs=0.00101)
    assert page.evaluate("document.getElementById('curve').data[2].x[0]") == step["share"]
    assert page.evaluate("document.getElementById('costs').data[1].y[0]") == step["dollars"]
    for name, rows in (("errors", found.data["errors"]), ("review", found.data["least_certain"])):
        decisions = page.locator(f"#{name} td.decision").all_text_contents()
        automated = [row["calibrated_confidence"] >= step["threshold"] for row in rows]
        assert decisions == ["automate" if yes else "review" for yes in automated]


@browsers
def test_it_opens_without_errors_or_requests_and_fits_the_screen_light_and_dark(any_page, visit):
    page, fonts = visit(any_page), set()
    move(page, 3)
    for scheme, width in (("light", 1280), ("light", 390), ("dark", 390), ("dark", 1280)):
        page.set_viewport_size({"width": width, "height": 900})
        page.emulate_media(color_scheme=scheme)
        page.wait_for_timeout(300)
        for name in ("curve", "costs", "raw", "calibrated"):
            box = page.locator(f"#{name} svg.main-svg").first.bounding_box()
            assert 0 <= box["x"] < box["x"] + box["width"] <= width and box["width"] > 300
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        back, ink = page.evaluate("(s => [s.backgroundColor, s.color])(getComputedStyle(document.body))")
        dark = [max(map(int, re.findall(r"\d+", colour))) < 128 for colour in (back, ink)]
        assert dark == [scheme == "dark", scheme == "light"]
        fonts.add((scheme, page.evaluate("document.getElementById('curve').layout.font.color")))
        check(page, any_page, any_page.data["steps"][3])  # the charts follow the screen, the slider stays
    assert len(fonts) == len({font for _, font in fonts}) == 2


@browsers
def test_the_slider_moves_by_key_and_every_number_with_it(held_out, visit):
    page, steps, at = visit(held_out), held_out.data["steps"], held_out.data["start"]
    slider = page.locator("#threshold")
    check(page, held_out, steps[at])
    page.keyboard.press("Tab")  # it is the first thing on the page to take the focus
    assert slider.evaluate("slider => slider === document.activeElement")
    before = values(page)
    for key, index in (("ArrowRight", at + 1), ("ArrowLeft", at), ("ArrowLeft", at - 1), ("Home", 0), ("End", -1)):
        page.keyboard.press(key)
        check(page, held_out, steps[index])
        assert page.locator("#chosen").text_content() in slider.get_attribute("aria-valuetext")
    assert values(page) != before
    page.keyboard.press("PageDown")
    assert 0 < int(slider.input_value()) < len(steps) - 2


@browsers
def test_at_the_thresholds_of_report_json_its_numbers_are_shown(any_page, visit):
    page, report = visit(any_page), any_page.report
    place = {step["threshold"]: i for i, step in enumerate(any_page.data["steps"])}
    for gate in report["gates"]["calibrated"]:
        move(page, place[gate["threshold"]])
        check(page, any_page, gate)
    for guarantee in report["guarantees"]:
        if (value := guarantee["threshold"]["value"]) is not None:
            move(page, place[value])
            assert values(page)["accuracy"] == guarantee["measured"]["accuracy"]
            assert values(page)["share"] == guarantee["measured"]["share"]
    move(page, place[report["cost_optimal_threshold"]])
    cost = report["settings"]["volume"] * report["cost_per_row"]["calibrated"]
    assert values(page)["dollars"] == pytest.approx(cost)


@browsers
def test_what_is_guaranteed_is_said_at_every_threshold(held_out, one_file, nothing_guaranteed, visit):
    for found, target in ((held_out, "80 %"), (one_file, "90 %")):
        page, value = visit(found), found.report["threshold"]["value"]
        from_ = f"from {int(1000 * value + 1e-9) / 1000:.3f} on"
        place = [step["threshold"] for step in found.data["steps"]].index(value)
        for i in (0, place // 2, place - 1, place, place + 1, -1):
            step = found.data["steps"][i]
            move(page, found.data["steps"].index(step))
            said = page.locator("#guarantee").text_content().strip()
            if step["threshold"] < value:
                assert said.startswith("Nothing is guaranteed here. F" + from_[1:])
            elif step["threshold"] == value:
                assert said == f"Guaranteed: the answers {from_} are at least {target} right with 95 % certainty."
            else:
                assert said.startswith(
                    f"Within the guaranteed region: all answers {from_}, taken together, are at least"
                )
                assert said.endswith("For this stricter part alone nothing more is guaranteed.")
            kept = page.locator("#guarantee").get_attribute("class").split()
            assert ("kept" in kept) == (step["threshold"] >= value)
        start = page.evaluate("parseFloat(document.querySelector('#guaranteed div').style.marginLeft)")
        assert start == pytest.approx(100 * place / (len(found.data["steps"]) - 1))
    page = visit(nothing_guaranteed)
    for i in (0, len(nothing_guaranteed.data["steps"]) // 2, len(nothing_guaranteed.data["steps"]) - 1):
        move(page, i)
        assert (
            page.locator("#guarantee").text_content().strip().startswith("Nothing can be guaranteed: 300 labels prove")
        )
        assert page.locator("#guarantee").get_attribute("class") == "card"
    assert page.evaluate("document.querySelector('#guaranteed div').getBoundingClientRect().width") < 1


@browsers
def test_every_number_says_its_n_and_protocol_and_in_sample_ones_the_word(held_out, one_file, visit):
    page, place = visit(one_file), {step["threshold"]: i for i, step in enumerate(one_file.data["steps"])}
    names = ("automated", "interval", "reviews", "bill")
    for threshold, word in ((one_file.report["threshold"]["value"], "in-sample"), (0.7, "out-of-fold")):
        move(page, place[threshold])
        for name in names:
            assert word in page.locator(f"#{name}").text_content(), name
    assert "Out-of-fold: each of the 400 rows in 200 groups" in page.locator("#protocol").text_content()
    assert "rows of a group are not" in page.locator("#remarks").text_content()
    assert page.locator("#guarantees th").nth(4).text_content() == "Measured (in-sample, n = 400)"
    for name in ("curve", "costs", "raw", "calibrated"):
        words = page.locator(f"#{name} + figcaption").text_content()
        assert "n = 400" in words and ("out-of-fold" in words or "nothing fitted" in words)
    page = visit(held_out)
    move(page, [step["threshold"] for step in held_out.data["steps"]].index(held_out.report["threshold"]["value"]))
    for name in names:
        assert "held-out" in page.locator(f"#{name}").text_content()
    assert (
        "Held-out: calibrator and guaranteed threshold come from 600 rows" in page.locator("#protocol").text_content()
    )
    assert page.locator("#guarantees th").nth(4).text_content() == "Measured (held-out, n = 400)"
    facts = page.locator("#facts").inner_text()
    for fact in ("platt, of", "ab&lt;", "logprobs", "n = 400, held-out", "<img src=x onerror='window.hacked=1'>"):
        assert fact in facts


@browsers
def test_hostile_texts_are_shown_as_they_are_and_run_nothing(held_out, visit):
    page = visit(held_out)
    for name, rows in (("errors", held_out.data["errors"]), ("review", held_out.data["least_certain"])):
        assert page.locator(f"#{name} td.text").all_text_contents() == [row["text"] for row in rows]
        assert page.locator(f"#{name} td:nth-child(2)").all_text_contents() == [row["label"] for row in rows]
        assert page.locator(f"#{name} td:nth-child(7)").all_text_contents() == [row["id"] for row in rows]
    assert page.title() == f"Calibration report: {HOSTILE[1]}, <t>"
    assert page.locator("img, table script, table a, table b, table i, table svg, header script").count() == 0
    assert page.locator("script").count() == 3
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
    page = visit(held_out)
    page.locator("#raw").scroll_into_view_if_needed()
    bins = held_out.data["reliability"]["raw"]
    dots = page.locator("#raw .points path")
    assert dots.count() == len(bins)
    box = dots.nth(3).bounding_box()
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    page.locator("#raw .hoverlayer .hovertext").wait_for()
    said, b = page.locator("#raw .hoverlayer .hovertext").text_content(), bins[3]
    assert f"{b['from']:.2f} to {b['to']:.2f}, n = {b['n']}" in said
    assert f"mean confidence {b['mean_confidence']:.3f}" in said and f"right {b['accuracy']:.1%}" in said
    assert f"{b['accuracy_low']:.1%} to {b['accuracy_high']:.1%}" in said


@browsers
def test_the_buttons_lead_to_their_thresholds(held_out, visit):
    page, steps = visit(held_out), held_out.data["steps"]
    wanted = [p["threshold"]["value"] for p in held_out.report["guarantees"] if p["threshold"]["value"] is not None]
    wanted.append(held_out.report["cost_optimal_threshold"])
    buttons = page.locator("#presets button")
    assert buttons.count() == len(wanted)
    for i, value in enumerate(wanted):
        buttons.nth(i).focus()
        page.keyboard.press("Enter")
        assert steps[int(page.locator("#threshold").input_value())]["threshold"] == value
        check(page, held_out, next(step for step in steps if step["threshold"] == value))


@browsers
def test_without_javascript_the_page_says_so(held_out, visit):
    page = visit(held_out, java_script_enabled=False)
    assert page.locator("noscript").is_visible() and "needs JavaScript" in page.locator("noscript").inner_text()
