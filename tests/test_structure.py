"""The layout of the project, read from its source: who may import whom, and what no file may contain."""

import ast
import fnmatch
import re
import textwrap

import pytest

from tests.conftest import ROOT

# (file, what of this project it may import), first match decides. "module.*" is the module and everything in it,
# any other entry exactly that module or that name of a module.
MAY_IMPORT = [
    ("config.py", []),
    ("loss.py", []),
    ("runtime.py", []),
    ("dataset/__init__.py", []),
    ("dataset/latents.py", []),
    ("dataset/digits.py", []),
    ("dataset/sources.py", ["dataset.digits.*", "models.hub.*"]),
    (
        "dataset/prepare.py",
        [
            "models.autoencoder.*",
            "models.encoders.*",
            "dataset.prepared.*",
            "dataset.sources.*",
            "runtime.Ranks",
            "runtime.replaced",
        ],
    ),
    ("dataset/bench.py", ["dataset.prepared.*"]),
    ("dataset/standin_encoder.py", ["dataset.prepared.*", "models"]),
    ("kernels/bench.py", ["kernels.*", "models.*"]),  # it times whole training steps
    ("kernels/*.py", ["kernels.*"]),
    (
        "models/*.py",
        ["kernels.BACKENDS", "kernels.resolve_backend", "kernels.route", "kernels.route_modulate", "models.*"],
    ),
    ("eval/__init__.py", []),
    ("analysis/diagnose.py", ["models.*", "eval.*", "config.*", "runtime.*", "dataset.*", "loss.*"]),
    ("eval/samplers.py", ["loss.*"]),
    ("eval/*.py", ["models.*", "eval.*", "config.*", "runtime.*", "dataset.*"]),
    ("train_repa_dar.py", ["config.*", "dataset.*", "eval.*", "kernels.*", "loss.*", "models.*", "runtime.*"]),
    ("sweep.py", ["config.*", "dataset.*", "eval.*", "kernels.*", "loss.*", "models.*", "runtime.*"]),
]
MAY_IMPORT_TRITON = ["kernels/*_triton.py", "kernels/bench.py"]

NOT_SOURCE = {"data", "runs", "sweeps", "venv"}  # and anything hidden


def project_files(pattern):
    """Relative paths, as text."""
    paths = [path.relative_to(ROOT) for path in ROOT.rglob(pattern)]
    return sorted(
        str(path)
        for path in paths
        if path.parts[0] not in NOT_SOURCE and not any(part.startswith(".") for part in path.parts)
    )


FILES = [file for file in project_files("*.py") if not file.startswith("tests/")]
PROJECT = {file.partition("/")[0].removesuffix(".py") for file in FILES} | {"tests"}


def tree(file):
    return ast.parse((ROOT / file).read_text(), file)


def rule(file):
    for pattern, allowed in MAY_IMPORT:
        if fnmatch.fnmatchcase(file, pattern):
            return allowed
    return None


def imports(source, file):
    """Dotted names of all imports, wherever they stand: "a.b" of `import a.b`, "a.b.c" of `from a.b import c`."""
    found = set()
    for node in ast.walk(source):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            package = file.split("/")[:-1]
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            found |= {f"{module}.{alias.name}".strip(".") for alias in node.names}
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            if ast.unparse(node.func) in ("__import__", "importlib.import_module", "import_module"):
                found.add(node.args[0].value)
    return found


def forbidden(file, names):
    """Those of the imported names that the table does not let this file have."""
    allowed = rule(file)

    def covered(name):
        return any(name == entry or entry.endswith(".*") and f"{name}.".startswith(entry[:-1]) for entry in allowed)

    wrong = {name for name in names if name.partition(".")[0] in PROJECT and not covered(name)}
    if not any(fnmatch.fnmatchcase(file, pattern) for pattern in MAY_IMPORT_TRITON):
        wrong |= {name for name in names if name.partition(".")[0] == "triton"}
    return wrong


def function(source, dotted):
    """The definition of "function" or "Class.method"."""
    node = source
    for name in dotted.split("."):
        node = next(
            child for child in node.body if isinstance(child, (ast.FunctionDef, ast.ClassDef)) and child.name == name
        )
    return node


# ---- imports ----


def test_the_files_are_found():
    expected = {
        "train_repa_dar.py",
        "sweep.py",
        "config.py",
        "loss.py",
        "runtime.py",
        "models/sit.py",
        "models/dar.py",
        "kernels/__init__.py",
        "kernels/reference.py",
        "dataset/prepare.py",
        "eval/samplers.py",
    }
    assert expected <= set(FILES)


@pytest.mark.parametrize("file", FILES)
def test_imports_keep_to_the_table(file):
    assert rule(file) is not None, f"{file} is not in the import table; say there what it may import"
    wrong = forbidden(file, imports(tree(file), file))
    assert not wrong, f"{file} may not import {', '.join(sorted(wrong))}; it may import {rule(file) or 'nothing'}"


def test_every_rule_of_the_table_says_something():
    # A pattern behind a wider one would never be looked at.
    for i, (pattern, _) in enumerate(MAY_IMPORT):
        assert not any(fnmatch.fnmatchcase(pattern, earlier) for earlier, _ in MAY_IMPORT[:i]), pattern


@pytest.mark.parametrize(
    "file, line, wrong",
    [
        ("config.py", "import runtime", {"runtime"}),
        ("config.py", "import yaml", set()),
        ("loss.py", "def f():\n    from models.sit import SiT", {"models.sit.SiT"}),
        ("models/dar.py", "from kernels import route", set()),
        ("models/dar.py", "from kernels import reference", {"kernels.reference"}),
        ("models/dar.py", "from kernels.reference import route", {"kernels.reference.route"}),
        ("models/dar.py", "from kernels import *", {"kernels.*"}),
        ("models/dar.py", "import kernels", {"kernels"}),
        ("models/sit.py", "from .dar import DepthRouter", set()),
        ("models/sit.py", "from ..loss import interpolant", {"loss.interpolant"}),
        ("models/sit.py", "import importlib\nimportlib.import_module('eval.online')", {"eval.online"}),
        ("kernels/reference.py", "import triton.language as tl", {"triton.language"}),
        ("kernels/route_triton.py", "import triton\nimport triton.language as tl", set()),
        ("kernels/bench.py", "import triton\nfrom models.sit import SiT\nimport loss", {"loss"}),
        ("kernels/reference.py", "from models.sit import SiT", {"models.sit.SiT"}),
        ("eval/samplers.py", "from loss import path_coefficients", set()),
        ("eval/samplers.py", "from models.sit import SiT", {"models.sit.SiT"}),
        ("eval/online.py", "from eval.samplers import sample_ode\nimport config as configuration", set()),
        ("eval/online.py", "from train_repa_dar import Trainer", {"train_repa_dar.Trainer"}),
        ("sweep.py", "import train_repa_dar", {"train_repa_dar"}),
        ("train_repa_dar.py", "import sweep\nimport tests.conftest", {"sweep", "tests.conftest"}),
        ("dataset/prepare.py", "from models.encoders import FrozenEncoder\nimport datasets", set()),
        ("dataset/prepare.py", "from models.sit import SiT", {"models.sit.SiT"}),
        ("dataset/standin_encoder.py", "import models", set()),
        ("dataset/standin_encoder.py", "import models.sit", {"models.sit"}),
    ],
)
def test_the_reading_of_imports(monkeypatch, file, line, wrong):
    monkeypatch.setitem(globals(), "PROJECT", PROJECT | {"sweep"})
    assert forbidden(file, imports(ast.parse(line), file)) == wrong


# ---- every file ----


@pytest.mark.parametrize("file", FILES)
def test_module_has_a_docstring(file):
    source = tree(file)
    assert not source.body or ast.get_docstring(source), f"{file} does not say what it is for"


@pytest.mark.parametrize("file", [file for file in FILES if not fnmatch.fnmatchcase(file, "kernels/*_triton.py")])
def test_no_assert_outside_tests(file):
    # `python -O` removes them, and their message is not for users. (Inside a Triton kernel there is nothing else.)
    lines = [node.lineno for node in ast.walk(tree(file)) if isinstance(node, ast.Assert)]
    assert not lines, f"{file}: assert in line {lines}"


# Folders that exist on one machine only. Spelled in parts, so that this file may be searched as well.
PRIVATE = ["home", "root", "work", "Users", "tmp/w"]
PRIVATE_PATH = re.compile(r"(?<![\w.:/-])/(" + "|".join(PRIVATE) + r")/\w")


def test_no_path_of_one_machine():
    patterns = ("*.py", "*.yaml", "*.md", "*.txt", "*.toml", "Makefile")
    texts = [file for pattern in patterns for file in project_files(pattern)]
    assert set(FILES) < set(texts)
    found = [f"{file}: {match[0]}" for file in texts for match in PRIVATE_PATH.finditer((ROOT / file).read_text())]
    assert not found


@pytest.mark.parametrize(
    "text, private",
    [
        ("data: /work/x", True),
        ("'/home/me/runs'", True),
        ("/tmp/w/venv", True),
        ("/tmp/elsewhere", False),
        ("runs/work/x", False),
        ("https://x.org/home/x", False),
    ],
)
def test_the_search_for_such_paths(text, private):
    assert bool(PRIVATE_PATH.search(text)) == private


# ---- the null class ----


def literal_thousands(source):
    """Lines with the number 1000, but for defaults of parameters called num_classes."""
    allowed = set()
    for node in ast.walk(source):
        if isinstance(node, ast.arguments):
            positional = node.posonlyargs + node.args
            pairs = [
                *zip(positional[len(positional) - len(node.defaults) :], node.defaults),
                *zip(node.kwonlyargs, node.kw_defaults),
            ]
            allowed |= {id(default) for parameter, default in pairs if parameter.arg == "num_classes"}
    return [
        node.lineno
        for node in ast.walk(source)
        if isinstance(node, ast.Constant) and node.value == 1000 and id(node) not in allowed
    ]


@pytest.mark.parametrize("file", [file for file in FILES if file.startswith(("models/", "eval/")) or file == "loss.py"])
def test_no_literal_null_class(file):
    # REPA writes 1000 for "no label", which is a class of its own for any dataset but ImageNet.
    assert not literal_thousands(tree(file)), f"{file}: use num_classes in line {literal_thousands(tree(file))}"


def test_the_search_for_a_literal_null_class():
    source = ast.parse(
        textwrap.dedent("""
        def f(a, num_classes=1000, *, b=1): ...
        def g(*, num_classes=1000): ...
        def h(num_classes, null=1000): ...
        y = torch.full((3,), 1000)
        z = 10_000
    """)
    )
    assert literal_thousands(source) == [4, 5]


# ---- the trainer ----


def test_main_is_a_list_of_named_steps():
    main = function(tree("train_repa_dar.py"), "main")
    assert main.end_lineno - main.lineno + 1 <= 25
    work = (ast.For, ast.While, ast.FunctionDef, ast.Lambda, ast.ListComp, ast.DictComp, ast.SetComp, ast.GeneratorExp)
    assert not [node.lineno for node in ast.walk(main) if isinstance(node, work) and node is not main]
    for node in ast.walk(main):
        if isinstance(node, (ast.Expr, ast.Assign)):
            assert isinstance(node.value, ast.Call), f"line {node.lineno} is no call of a step: {ast.unparse(node)}"
    called = {
        node.func.attr for node in ast.walk(main) if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)
    }
    assert {"parse", "resume", "describe", "train"} <= called


WAITING_METHODS = {"item", "cpu", "tolist", "numpy", "nonzero", "synchronize"}
WAITING_FUNCTIONS = {"float", "int", "bool", "print"}


def host_waits(definition):
    """Calls for which the host waits until the device has computed the value."""
    found = []
    for node in ast.walk(definition):
        if isinstance(node, ast.Call):
            if isinstance(node.func, ast.Attribute):
                waits = (
                    node.func.attr in WAITING_METHODS
                    or node.func.attr == "to"
                    and any(isinstance(argument, ast.Constant) and argument.value == "cpu" for argument in node.args)
                )
            else:
                waits = isinstance(node.func, ast.Name) and node.func.id in WAITING_FUNCTIONS
            if waits:
                found.append(f"line {node.lineno}: {ast.unparse(node)}")
    return found


@pytest.mark.parametrize("name", ["Trainer.train_step", "Trainer.losses", "Trainer.draw", "Tally.add"])
def test_a_step_does_not_wait_for_the_device(name):
    assert not host_waits(function(tree("train_repa_dar.py"), name))


@pytest.mark.parametrize(
    "expression",
    ["loss.item()", "x.cpu()", "float(loss)", "int(x.sum())", "bool(finite)", "f(x.detach().tolist())", "x.to('cpu')"],
)
def test_the_search_for_waits(expression):
    assert host_waits(ast.parse(expression))
    assert not host_waits(ast.parse("a = x.float().to(device) + torch.zeros(3)"))
