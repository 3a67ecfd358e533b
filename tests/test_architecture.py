"""The shape of the repository: who may import whom, what stays out of it, and that its scripts start light.

The rows are the table of the design, "nouns are shared, verbs are scripts": a file imports only from rows below its
own. A new file needs a row here first.
"""

import argparse
import ast
import functools
import importlib.util
import json
import re
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MODEL_SIDE = {"llama", "packed", "sampling", "prompts", "lora", "tensors", "model_files", "embedded_model"}
MODEL_SIDE |= {"endpoint", "server_connections", "server_replies", "served_identity"}
CLOUD = {"aws", "sagemaker_job", "sagemaker_endpoint"}
ROWS = [
    {
        "command_line",
        "files",
        "explained_texts",
        "predictions",
        "near_duplicates",
        "tables",
        "table_formats",
        "task",
        "task_candidates",
        "voting",
        "answers",
        "pooling",
        "exports",
        "endpoint_costs",
        "ray_sources",
        "ray_parts",
        "plotting",
        *MODEL_SIDE,
        *CLOUD,
    },
    {"calibration_metrics", "effective_rows", "confusions"},
    {
        "baselines",
        "sample_check",
        "verdict",
        "calibration",
        "calibrators",
        "label_calibration",
        "guarantee_audit",
        "relabelling",
        "shortlists",
        "confidence_head",
        "probe",
        "decisions",
        "scoring",
        "task_search",
        "label_decisions",
        "text_report",
        "comparison_text",
    },
    {"logprobs_confidence", "consistency_confidence", "mc_dropout_confidence", "training", "fine_tune_model"}
    | {"probe_confidence", "probe_training", "probe_files", "hidden_features"},
    {"calibration_demo", "calibration_figures", "compare_base_vs_finetuned", "combined_confidence", "study_tables"}
    | {"comparison_figures", "html_report", "ray_worker"},
    {"main"},
]
ROW = {name: number for number, names in enumerate(ROWS) for name in names}
# Analysis runs without torch, on any laptop; these may not import it even inside a function.
NUMBER_SIDE = set().union(*ROWS[:3], ROWS[4]) - {"combined_confidence", "ray_worker"} - MODEL_SIDE - CLOUD
MODEL_LIBRARIES = {"torch", "transformers", "peft", "accelerate", "bitsandbytes", "safetensors", "tokenizers", "gguf"}
OTHER_NAMES = {"data", "docs", "images", "scripts", "tests", "requirements.txt", "requirements-ray.txt", "README.md"}
OTHER_NAMES |= {"fine_tuned_sentiment_model", "pyproject.toml", "Makefile", "LICENSE", ".gitignore", ".ci"}

MODULES = sorted(ROOT.glob("*.py"))
SCRIPTS = sorted((ROOT / "scripts").glob("*.py"))
SOURCES = [*MODULES, *SCRIPTS]
TREES = {path: ast.parse(path.read_text(encoding="utf-8")) for path in [*SOURCES, *(ROOT / "tests").glob("*.py")]}


@functools.cache
def imported(path):
    """(first name of the module, whether the import stands inside a function) of every import of a file."""
    inner = {n for f in ast.walk(TREES[path]) if isinstance(f, ast.FunctionDef) for n in ast.walk(f)}
    found = []
    for node in ast.walk(TREES[path]):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name} has a relative import"
            found.append((node.module.partition(".")[0], node in inner))
        elif isinstance(node, ast.Import):
            found += [(alias.name.partition(".")[0], node in inner) for alias in node.names]
    return found


def only_for_types(path):
    """The modules that a file imports for a type checker alone."""
    blocks = [n for n in TREES[path].body if isinstance(n, ast.If) and ast.unparse(n.test) == "TYPE_CHECKING"]
    return {node.module for block in blocks for node in block.body if isinstance(node, ast.ImportFrom)}


@functools.cache
def calls(path):
    """(the called expression as text, the call) of every call of a file."""
    return [(ast.unparse(node.func), node) for node in ast.walk(TREES[path]) if isinstance(node, ast.Call)]


def every_python(code, *arguments, **options):
    """Run code in a fresh Python."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, **options)


# Who imports whom


def test_every_module_has_a_row_and_imports_only_from_rows_below_or_its_own_without_a_circle():
    assert {path.stem for path in MODULES} == set(ROW)
    for path in MODULES:
        for name, _ in imported(path):
            assert ROW.get(name, -1) <= ROW[path.stem], f"{path.stem} imports {name}"
    graph = {path.stem: {name for name, _ in imported(path) if name in ROW} - only_for_types(path) for path in MODULES}
    assert len(list(TopologicalSorter(graph).static_order())) == len(MODULES)  # raises where there is a circle
    for path in SCRIPTS:
        for name, _ in imported(path):
            assert ROW.get(name, 0) < ROW["main"] and name not in {p.stem for p in SCRIPTS}, f"{path} imports {name}"


def test_functions_take_data_and_only_functions_about_arguments_take_a_namespace():
    for path in SOURCES:
        for function in ast.walk(TREES[path]):
            if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef):
                for parameter in (*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs):
                    annotation = ast.unparse(parameter.annotation) if parameter.annotation else ""
                    takes = "Namespace" in annotation or parameter.arg in ("args", "arguments_", "namespace")
                    assert not takes or "argument" in function.name, f"{path.name}: {function.name}({parameter.arg})"
        assert "SimpleNamespace" not in path.read_text(encoding="utf-8"), path.name


def test_nobody_reaches_for_an_underscored_name_or_the_parser_of_another_file():
    for path in SOURCES:
        ours = set()  # the names under which other files of ours are known here
        for node in ast.walk(TREES[path]):
            if isinstance(node, ast.Import):
                ours |= {alias.asname or alias.name for alias in node.names if alias.name in ROW}
            elif isinstance(node, ast.ImportFrom) and node.module in ROW:
                for alias in node.names:
                    assert not alias.name.startswith("_") and alias.name != "parse_arguments", (
                        f"{path.name}: {alias.name}"
                    )
        for node in ast.walk(TREES[path]):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in ours:
                assert not node.attr.startswith("_") and node.attr != "parse_arguments", f"{path.name}: {node.attr}"


def test_no_function_and_no_file_outgrows_its_reader():
    for path in SOURCES:
        assert len(path.read_text(encoding="utf-8").splitlines()) <= 720, path.name
        for function in ast.walk(TREES[path]):
            if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef):
                assert function.end_lineno - function.lineno < 60, f"{path.name}: {function.name}"


def test_the_number_side_never_imports_a_model_library_and_the_model_side_only_inside_functions():
    model_side = set(ROW) - NUMBER_SIDE
    for path in SOURCES:
        for name, in_function in imported(path):
            if path.stem in NUMBER_SIDE:
                assert name not in MODEL_LIBRARIES | model_side, f"{path.stem} imports {name}"
            assert in_function or name not in MODEL_LIBRARIES, f"{path.name} imports {name} at its top"


def all_requirements():
    """What is installed for a user, needed or optional."""
    return "".join(path.read_text(encoding="utf-8") for path in ROOT.glob("requirements*.txt"))


def test_nothing_is_imported_that_the_requirements_do_not_pin():
    pinned = {name.replace("-", "_") for name in re.findall(r"([\w-]+)(?:\[[\w,]+\])?==", all_requirements())}
    pinned |= {"sklearn"} if "scikit_learn" in pinned else set()
    known = set(sys.stdlib_module_names) | set(ROW) | pinned
    assert {(path.name, name) for path in SOURCES for name, _ in imported(path) if name not in known} == set()


# Starting light


def test_importing_every_module_has_no_effect_and_reading_tables_and_predictions_needs_no_torch(tmp_path):
    # In an empty home, cache and working folder: nothing is printed, written, started, or set.
    home = tmp_path / "home"
    home.mkdir()
    (tmp_path / "t.csv").write_text("text,label\nx,positive\n", encoding="utf-8")
    names = ", ".join(path.stem for path in MODULES)
    code = f"""if True:
        import os, random, signal, sys, threading
        sys.path.insert(0, sys.argv[1])
        import numpy
        import sklearn.base  # the calibrators are its estimators; it sets a variable of its own
        state = lambda: (dict(os.environ), os.getcwd(), random.getstate(), numpy.random.get_state()[1].tolist(),
                         signal.getsignal(signal.SIGINT), threading.active_count(), list(sys.argv), sys.path[0],
                         sys.getrecursionlimit(), list(os.walk(".")))
        before, loaded = state(), set(sys.modules)
        import {names}
        assert state() == before
        heavy = {MODEL_LIBRARIES | {"datasets", "pyarrow", "pandas", "relplot"}} & (set(sys.modules) - loaded)
        assert not heavy, heavy
        example = next(tables.read_examples(sys.argv[2]))
        common = dict(method="m", model="m", task="t", fingerprint="f")
        probabilities = dict(negative=0.25, positive=0.75)
        row = predictions.scored(example.id, example.text, example.label, probabilities, 1.0, **common)
        assert predictions.confidence_and_correct([row])[0].tolist() == [0.75]
        assert not {MODEL_LIBRARIES} & set(sys.modules)
    """
    environment = {"HOME": str(home), "CALIBRATED_CONFIDENCE_CACHE": str(home / "cache"), "PATH": ""}
    done = every_python(code, ROOT, tmp_path / "t.csv", cwd=home, env=environment | {"PYTHONDONTWRITEBYTECODE": "1"})
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert list(home.iterdir()) == []


def is_script(path):
    return any(isinstance(node, ast.If) and "__main__" in ast.unparse(node.test) for node in TREES[path].body)


def test_help_works_without_the_model_libraries_and_is_the_file_s_own_description(tmp_path):
    # A None in sys.modules makes the import fail, as on a machine without the library. Each script begins anew, but for
    # the libraries that it shares with those before.
    scripts = [path for path in SOURCES if is_script(path)]
    code = f"""if True:
        import contextlib, io, json, runpy, sys
        sys.modules.update(dict.fromkeys({MODEL_LIBRARIES | {"datasets", "scipy", "matplotlib", "plotly", "boto3"}}))
        before, printed = list(sys.path), []
        for script in sys.argv[1:]:
            for name in {set(ROW)} & set(sys.modules):
                del sys.modules[name]
            sys.argv, sys.path = [script, "--help"], [script.rpartition("/")[0], *before[1:]]
            with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.suppress(SystemExit):
                runpy.run_path(script, run_name="__main__")
            printed.append(out.getvalue())
        print(json.dumps(printed))
    """
    done = every_python(code, *scripts, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    for path, printed in zip(scripts, json.loads(done.stdout), strict=True):
        assert ast.get_docstring(TREES[path]) in printed and f"python {path.relative_to(ROOT)}" in printed, path
        assert "usage:" in printed


@pytest.mark.parametrize("path", [path for path in SOURCES if is_script(path)], ids=lambda path: path.name)
def test_every_flag_has_a_help_text_and_is_kebab_case(path, monkeypatch):
    class ParserSeenError(Exception):
        pass

    def stop(parser, *_):
        raise ParserSeenError(parser)

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", stop)
    # By path, because a script may be named like a test file.
    specification = importlib.util.spec_from_file_location(f"script_{path.stem}", path)
    module = importlib.util.module_from_spec(specification)
    monkeypatch.setitem(sys.modules, specification.name, module)
    specification.loader.exec_module(module)
    with pytest.raises(ParserSeenError) as caught:
        module.main([])
    for action in caught.value.args[0]._actions:
        assert action.help, action
        assert all(re.fullmatch(r"-h|--[a-z0-9]+(-[a-z0-9]+)*", flag) for flag in action.option_strings)


# What stays out


def test_no_pickle_no_remote_code_and_no_shell():
    for path in SOURCES:
        unsafe = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
        assert not unsafe & {name for name, _ in imported(path)}, path.name
        for function, call in calls(path):
            keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
            assert function not in ("eval", "exec", "__import__", "os.system", "torch.load", "np.load"), path.name
            assert keywords.get("trust_remote_code", "False") == "False", path.name
            assert keywords.get("shell", "False") == "False", path.name
            if re.fullmatch(r"AutoModel\w*\.from_pretrained", function):
                # A GGUF file holds no code either; everything else must be safetensors.
                assert keywords.get("use_safetensors") == "True" or "gguf_file" in keywords, path.name
        for node in ast.walk(TREES[path]):
            if isinstance(node, ast.Dict):
                pairs = zip(node.keys, node.values, strict=True)
                options = {ast.unparse(key): ast.unparse(value) for key, value in pairs if key is not None}
                assert options.get("'trust_remote_code'", "False") == "False", path.name
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                assert not re.search(r"\.(bin|pt|pth|pkl|pickle)$", node.value), f"{path.name}: {node.value!r}"


def test_randomness_comes_from_an_explicit_seed():
    allowed = {"np.random.default_rng", "np.random.Generator", "np.random.SeedSequence", "random.Random"}
    for path in SOURCES:
        for node in ast.walk(TREES[path]):
            if isinstance(node, ast.Attribute):
                name = ast.unparse(node).replace("numpy.", "np.")
                assert not re.fullmatch(r"(np\.)?random\.\w+", name) or name in allowed, f"{path.name}: {name}"
        for function, call in calls(path):
            if function.endswith(("default_rng", "random.Random")):
                assert call.args or call.keywords, f"{path.name}: {function} without a seed"


def test_requirements_are_pinned_and_each_says_why_it_is_there():
    for path in sorted([*ROOT.glob("requirements*.txt"), *(ROOT / "tests").glob("requirements*.txt")]):
        for line in path.read_text(encoding="utf-8").splitlines():
            if line and not line.startswith(("#", "-r ")):
                assert re.fullmatch(r"[A-Za-z0-9._-]+(\[[\w,]+\])?==\d[\w.]* +# \S.*", line), f"{path.name}: {line}"


def test_the_top_level_holds_only_the_names_of_the_design():
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout, so a user's own files cannot be told from ours")
    names = {line.partition("/")[0] for line in listed.stdout.splitlines()}
    assert names <= OTHER_NAMES | {f"{name}.py" for name in ROW}
    assert not [line for line in listed.stdout.splitlines() if line.endswith("__init__.py")]


def test_every_file_opens_with_what_it_is():
    assert [path.name for path, tree in TREES.items() if not ast.get_docstring(tree)] == []
