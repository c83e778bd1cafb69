"""The house: a file at the top of refqlora/ is the engine, a folder is what surrounds it; nothing imports in a circle.

The rules are read off the layout and off the reading order in the package's docstring; there is no table to keep.
"""

import ast
import re
import sys
from pathlib import Path

import pytest
from without import attempt, run, run_without

import refqlora

PACKAGE = Path(refqlora.__file__).parent
FRONT_DOORS = {"model", "training", "resume"}  # the engine's files that may import from a folder
ORACLES = {"torch", "transformers", "peft", "bitsandbytes", "torchao"}
ENGINE_NEEDS = {"numpy", "scipy", "ml_dtypes"}  # besides the standard library
PICKLES = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle"}
MAX_LINES = 350


def reading_order(docstring):
    """The engine's files as the package's docstring lists them: indented lines of names, then at least two spaces."""
    lines = re.findall(r"^    (\w+(?:, \w+)*)  ", docstring, re.M)
    return [name for line in lines for name in line.split(", ")]


ORDER = ["minimal", *reading_order(refqlora.__doc__)]
MODULES = {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(PACKAGE.rglob("*.py"))
}
ENGINE = {name for name in MODULES if "." not in name and MODULES[name].name != "__init__.py"}
ROOMS = {name for name in MODULES if "." not in name and name not in ENGINE}


def room(name):
    """The folder that a module is in; None for the engine."""
    top = name.partition(".")[0]
    return top if top in ROOMS else None


def imports(name, source, typing=False):
    """The dotted names that the module imports, anywhere in it; ours without "refqlora.". What stands under
    `if TYPE_CHECKING` is never loaded, and counts only with `typing`."""
    package = name if name in MODULES and MODULES[name].name == "__init__.py" else name.rpartition(".")[0]
    tree = ast.parse(source)
    if not typing:
        for node in ast.walk(tree):
            if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
                node.body = [ast.Pass()]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.removeprefix("refqlora.") for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            origin = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) + 1 - node.level] if package else []
                origin = ".".join([*above, *([origin] if origin else [])])
            origin = origin.removeprefix("refqlora").removeprefix(".") if not node.level else origin
            for alias in node.names:
                inner = f"{origin}.{alias.name}".removeprefix(".")
                yield inner if inner in MODULES else origin or "refqlora"
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = getattr(node.func, "attr", None) or getattr(node.func, "id", None)
            if called in ("import_module", "__import__"):
                yield str(node.args[0].value).removeprefix("refqlora.")


def faults(name, source):
    """What breaks the rules in the module `name`, one line each."""
    found = []
    engine = room(name) is None
    if engine and name not in ORDER:
        found.append(f"{name} is not in the reading order of the package's docstring")
    for imported in imports(name, source):
        top = imported.partition(".")[0]
        if engine and top in ORDER and name in ORDER and ORDER.index(top) >= ORDER.index(name):
            found.append(f"{name} imports {imported}, which comes after it in the reading order")
        if engine and top in ROOMS and name not in FRONT_DOORS:
            found.append(f"{name} imports {imported}: the engine imports from no folder")
        known = {
            *MODULES,
            *sys.stdlib_module_names,
            *ENGINE_NEEDS,
            "refqlora",
            *(["cupy"] if name == "backend" else []),
        }
        if engine and top not in known:
            found.append(f"{name} imports {imported}: the engine runs without it")
        if top in ORACLES and not name.startswith("parity"):
            found.append(f"{name} imports {imported}: an oracle is for tests and parity")
        if top in PICKLES:
            found.append(f"{name} imports {imported}: reading such a file runs code")
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.keyword) and node.arg == "allow_pickle":
            found.append(f"{name} line {node.value.lineno}: allow_pickle")
    lines = source.count("\n")
    if lines > MAX_LINES:
        found.append(f"{name}: {lines} lines, over {MAX_LINES}: two jobs")
    return found


def circle(edges):
    """The nodes of one circle in a graph {node: set of nodes}; [] if there is none."""
    done, path = set(), []

    def visit(node):
        if node in path:
            return path[path.index(node) :]
        if node in done:
            return []
        path.append(node)
        for other in sorted(edges.get(node, ())):
            if found := visit(other):
                return found
        done.add(path.pop())
        return []

    return next((found for node in sorted(edges) if (found := visit(node))), [])


def graph(key):
    """Who imports whom among the package's modules, each by `key`."""
    edges = {}
    for name, path in MODULES.items():
        for imported in imports(name, path.read_text(encoding="utf-8")):
            if imported in MODULES and name and key(name) != key(imported):
                edges.setdefault(key(name), set()).add(key(imported))
    return edges


@pytest.mark.parametrize("name", sorted(set(MODULES) - {"__init__"}))
def test_every_file_keeps_the_rules(name):
    assert faults(name, MODULES[name].read_text(encoding="utf-8")) == []


def test_the_reading_order_names_each_file_of_the_engine_once():
    assert sorted(ORDER) == sorted(ENGINE - {"__init__"})


def test_no_test_file_imports_another():
    files = {path.stem: path for path in Path(__file__).parent.rglob("test_*.py")}
    for path in files.values():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) else []
            assert [name for name in names if name in files] == [], path


def test_no_circle_of_modules():
    assert circle(graph(lambda name: name)) == []


def test_no_circle_of_rooms():
    """The engine aside: its front doors open onto the folders."""
    edges = graph(lambda name: room(name) or "the engine")
    edges.pop("the engine")
    assert circle({a: b - {"the engine"} for a, b in edges.items()}) == []


@pytest.mark.parametrize(
    ("name", "source", "fault"),
    [
        ("quantization", "from .model import Model", "after it in the reading order"),
        ("quantization", "from .lora import linear_forward", "after it in the reading order"),
        ("quantization", "def f():\n    from . import model", "after it in the reading order"),
        ("quantization", "import refqlora.model as m", "after it in the reading order"),
        ("quantization", "from refqlora import model", "after it in the reading order"),
        ("quantization", "from refqlora.model import Model", "after it in the reading order"),
        (
            "quantization",
            "import importlib\nimportlib.import_module('refqlora.model')",
            "after it in the reading order",
        ),
        ("minimal", "from .codebooks import NF4", "after it in the reading order"),
        ("lora", "from .files.reading import read_json", "imports from no folder"),
        ("adapters", "from .text import chat", "imports from no folder"),
        ("quantization", "import cupy", "runs without it"),
        ("training", "from rich.console import Console", "runs without it"),
        ("model", "from safetensors.numpy import save_file", "runs without it"),
        ("memory.held", "def f():\n    from bitsandbytes.functional import quantize_4bit", "oracle"),
        ("text.dataset", "import pickle", "runs code"),
        ("text.dataset", "np.load(file, allow_pickle=True)", "allow_pickle"),
        ("attic", "", "not in the reading order"),
        ("commands", "x = 1\n" * (MAX_LINES + 1), "two jobs"),
    ],
)
def test_a_planted_fault_is_found(name, source, fault):
    found = faults(name, source)
    assert len(found) == 1
    assert fault in found[0]


def test_what_is_allowed_is_not_a_fault():
    assert faults("backend", "import cupy") == []
    assert faults("model", "from .files import pretrained\nfrom .decoder import decoder_forward") == []
    assert faults("lora", "import numpy as np\nfrom . import codebooks\nfrom .quantization import quantize") == []
    assert faults("lora", "if TYPE_CHECKING:\n    from .model import Model") == []
    assert faults("parity.oracles", "import torch") == []
    assert faults("commands.demo", "from rich.console import Console\nfrom ..model import Model") == []
    assert faults("commands", "x = 1\n" * MAX_LINES) == []


def test_a_planted_circle_is_found():
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c"]
    assert circle({"a": {"b", "c"}, "b": {"c"}}) == []


def test_importing_the_package_loads_nothing_slow():
    done = run("import sys, refqlora; print(*sorted({name.partition('.')[0] for name in sys.modules}))")
    loaded = set(done.stdout.split())
    assert (
        loaded & {"numpy", "scipy", "tokenizers", "jinja2", "rich", "matplotlib", "huggingface_hub", "torch"} == set()
    )
    done = run("import refqlora as rq, sys; rq.quantize; print(*sys.modules)")
    assert set(done.stdout.split()) & {"tokenizers", "jinja2", "rich", "matplotlib", "huggingface_hub"} == set()


# ---- what there may not be ----


def test_what_is_blocked_is_blocked():
    done = attempt({"rich"}, "import rich.console")
    assert "No module named 'rich" in done.stderr
    done = attempt({"rich"}, "threading.Thread(target=print).start()", threadless=True)
    assert "can't start new thread" in done.stderr


SLOW = ("tokenizers", "jinja2", "rich", "huggingface_hub", "safetensors")

A_TINY_MODEL = """
from importlib import import_module
for name in {names}:
    import_module("refqlora." + name)
import numpy as np
import refqlora as rq
from refqlora.text.dataset import Dataset
sizes = dict(vocab_size=50, hidden_size=16, intermediate_size=24, layers=2, heads=2, kv_heads=1, head_dim=8)
model = rq.Model.from_config(rq.Config(**sizes, max_positions=32, eos_token_id=0), 0)
tokens = np.arange(96).reshape(8, 12) % 50
data = Dataset(tokens, (tokens + 1) % 50, np.ones(50, int))
rows = rq.train(model, data, rq.TrainingConfig(steps=60, lr=1e-2))
model.quantize()
model.add_adapter(rank=2)
rows += rq.train(model, data, rq.TrainingConfig(steps=3, lr=1e-3))
print(rows[0]["loss"], rows[-1]["loss"])
print(*rq.generate(model, [7], max_new_tokens=9))
"""


def test_the_engine_works_without_the_slow_packages_and_without_threads():
    """In a browser (Pyodide), say: a model is trained, quantised, trained on, and writes what it has learnt."""
    names = [name for name in MODULES if room(name) in (None, "memory", "figures", "notebooks")]
    out = run_without((*SLOW, *ORACLES), A_TINY_MODEL.format(names=names), threadless=True)
    (before, after), text = (line.split() for line in out.splitlines())
    assert float(before) > 3 > 1 > float(after)
    assert text == [str(token) for token in range(8, 17)]


def test_parity_with_the_recordings_needs_no_library():
    blocked = (*SLOW[:-1], *ORACLES)
    program = "from refqlora.commands import main; raise SystemExit(main(['parity', '--recorded']))"
    assert run_without(blocked, program).splitlines()[-1].startswith("OK; ")
