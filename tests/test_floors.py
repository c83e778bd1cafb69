"""The house: a file imports only from lower floors, the engine needs NumPy only, and a file has one job."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "refqlora"
FLOORS = {
    "backend": 0,
    "codebooks": 1,
    "config": 3,
    "lora_config": 1,
    "functional": 1,
    "rope": 1,
    "architectures": 1,
    "config_json": 2,
    "attention": 2,
    "sampling": 1,
    "quantize": 2,
    "kv_cache": 4,
    "quantization_error": 3,
    "lora": 3,
    "head": 4,
    "optim": 3,
    "files": 1,
    "hub": 2,
    "checkpoint": 2,
    "shards": 3,
    "bnb": 3,
    "mapped": 2,
    "chat": 2,
    "adapters": 4,
    "adapter_files": 4,
    "pretrained": 5,
    "layer": 5,
    "model": 6,
    "data": 5,
    "corpus": 6,
    "memory": 7,
    "training": 7,
    "generation": 7,
    "merging": 8,
    "figures": 7,
    "quantize_files": 7,
    "inspection": 8,
    "inspection_tables": 9,
    "pretrain": 8,
    "demo": 8,
    "finetune": 8,
    "compare": 9,
    "parity.settings": 7,
    "parity.cases": 7,
    "parity.differences": 7,
    "parity.definitions": 7,
    "parity.oracles": 8,
    "parity.lora_vectors": 8,
    "parity.quantization": 8,
    "parity.decoders": 9,
    "parity.exchange": 10,
    "parity.checks": 11,
    "parity.diagnosis": 8,
    "parity.trials": 12,
    "parity.record": 12,
    "parity.kit": 13,
    "parity": 14,
    "cli.options": 14,
    "cli.chat": 14,
    "cli.demo": 15,
    "cli.finetune": 15,
    "cli.generate": 15,
    "cli.inspect": 15,
    "cli.merge": 15,
    "cli.parity": 15,
    "cli.pretrain": 15,
    "cli.quantize": 15,
    "cli": 16,
}
EXEMPT = {"__init__", "__main__"}
ENGINE = 7  # the highest floor of the engine
ORACLES = {"torch", "transformers", "peft", "bitsandbytes", "torchao"}
MAX_LINES = 350


def imports(source, package="refqlora"):
    """The dotted names that the source, a file of `package`, imports anywhere in it; refqlora itself as "refqlora"."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            origin = node.module or ""
            if node.level:  # one dot is the package; there is nothing above refqlora
                above = package.split(".")[: 1 - node.level or None] or ["refqlora", "refqlora"]
                origin = ".".join(above + ([origin] if origin else []))
            for alias in node.names:
                name = f"{origin}.{alias.name}"
                yield name if name.removeprefix("refqlora.") in FLOORS else origin
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = getattr(node.func, "attr", None) or getattr(node.func, "id", None)
            if called in ("import_module", "__import__"):
                yield str(node.args[0].value)


def faults(name, source):
    """What breaks the rules in the module `name`, one line each."""
    if name in EXEMPT:
        floor = max(FLOORS.values()) + 1
    elif name in FLOORS:
        floor = FLOORS[name]
    else:
        return [f"{name}: not in the table of floors"]

    found = []
    is_package = any(other.startswith(name + ".") for other in FLOORS)
    package = f"refqlora.{name}" if is_package else f"refqlora.{name}".rpartition(".")[0]
    for imported in imports(source, "refqlora" if name in EXEMPT else package):
        top, _, inner = imported.partition(".")
        # The package's __init__ imports from every floor, so it is above them all.
        if top == "refqlora" and name not in EXEMPT and FLOORS.get(inner, floor) >= floor:
            found.append(f"{name} (floor {floor}) imports {imported}, which is not on a lower floor")
        if floor <= ENGINE and (top in ORACLES or (top == "cupy" and name != "backend")):
            found.append(f"{name} (floor {floor}) imports {imported}: the engine runs without it")
        if top in ("pickle", "cPickle", "_pickle", "dill", "cloudpickle"):
            found.append(f"{name} imports {imported}: reading such a file runs code")
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.keyword) and node.arg == "allow_pickle":
            found.append(f"{name} line {node.value.lineno}: allow_pickle")
    lines = source.count("\n")
    if lines > MAX_LINES:
        found.append(f"{name}: {lines} lines, over {MAX_LINES}: two jobs")
    return found


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: path.stem)
def test_every_file_keeps_the_rules(path):
    name = ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__")
    assert faults(name, path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    ("name", "source", "fault"),
    [
        ("quantize", "from .model import Model", "not on a lower floor"),
        ("quantize", "from .lora import Linear", "not on a lower floor"),
        ("functional", "from .codebooks import NF4", "not on a lower floor"),
        ("functional", "def f():\n    from . import model", "not on a lower floor"),
        ("functional", "import refqlora.model as m", "not on a lower floor"),
        ("functional", "from refqlora import model", "not on a lower floor"),
        ("functional", "from refqlora.model import Model", "not on a lower floor"),
        (
            "functional",
            "import importlib\nm = importlib.import_module('refqlora.model')",
            "not on a lower floor",
        ),
        ("cli", "import refqlora", "not on a lower floor"),
        ("compare", "from . import anything", "not on a lower floor"),
        ("compare", "from ..elsewhere import anything", "not on a lower floor"),
        ("cli.demo", "from . import finetune", "not on a lower floor"),
        ("cli.demo", "from .generate import add", "not on a lower floor"),
        ("cli.options", "from .demo import add", "not on a lower floor"),
        ("cli.demo", "from .. import cli", "not on a lower floor"),
        ("cli.demo", "from ...elsewhere import anything", "not on a lower floor"),
        ("model", "try:\n    import torch.nn\nexcept ImportError:\n    pass", "runs without it"),
        ("memory", "def f():\n    from bitsandbytes.functional import quantize_4bit", "runs without it"),
        ("quantize", "import cupy", "runs without it"),
        ("data", "import pickle", "runs code"),
        ("data", "np.load(file, allow_pickle=True)", "allow_pickle"),
        ("attic", "", "not in the table"),
        ("nested.backend", "", "not in the table"),
        ("cli", "x = 1\n" * (MAX_LINES + 1), "two jobs"),
    ],
)
def test_a_planted_fault_is_found(name, source, fault):
    found = faults(name, source)
    assert len(found) == 1
    assert fault in found[0]


def test_what_is_allowed_is_not_a_fault():
    assert faults("backend", "import cupy") == []
    assert faults("compare", "import torch\nfrom .model import Model") == []
    assert faults("lora", "import numpy as np\nfrom . import codebooks\nfrom .quantize import quantize") == []
    assert faults("__init__", "from .cli import main\nfrom .backend import array_module") == []
    assert faults("cli", "from . import demo, finetune\nfrom .options import Parser\nfrom ..model import Model") == []
    assert faults("cli.demo", "from ..demo import demo\nfrom .options import count\nfrom ..model import Model") == []
    assert faults("cli", "x = 1\n" * MAX_LINES) == []
