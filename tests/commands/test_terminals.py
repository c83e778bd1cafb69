"""The surroundings of a command: pipes that close, closed streams, odd encodings, narrow terminals, Ctrl-C."""

import io
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from refqlora import commands as cli
from refqlora.commands import options

ROOT = Path(__file__).parent.parent.parent
PROGRAM = f"{sys.executable} -c 'import sys; from refqlora.commands import main; sys.exit(main())'"


def shell(line, cwd=None, **environment):
    """Run a line of bash in which `refqlora` is the command; -> the process that was."""
    everything = {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), "HOME": str(cwd or ROOT), **environment}
    script = f'set -o pipefail; refqlora() {{ {PROGRAM} "$@"; }}; {line}'
    return subprocess.run(["bash", "-c", script], capture_output=True, text=True, env=everything, cwd=cwd, timeout=120)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny.save(tmp_path_factory.mktemp("terminals") / "model")


LINES = [
    "refqlora --help",
    "refqlora parity --help",
    "refqlora info",
    "refqlora parity --recorded --only codebooks --only packing",
    "refqlora inspect {model}",
    "refqlora generate --model {model} --no-quantize --prompt sacks --max-new-tokens 50",
]


@pytest.mark.parametrize("line", LINES)
def test_a_reader_that_leaves_is_not_an_error(line, model):
    """As `head` does; and one that leaves before anything is written."""
    for reader in ("head -1", "true"):
        done = shell(f"{line.format(model=model)} | {reader}")
        assert done.stderr == ""
        assert done.returncode in (0, 141)  # what is small may have been written before the reader left


@pytest.mark.parametrize("line", LINES)
def test_closed_streams_are_not_an_error(line, model):
    done = shell(f"{line.format(model=model)} <&- >&- 2>&-")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no full device here")
@pytest.mark.parametrize("line", LINES[2:5])
def test_a_full_disk_is_one_line(line, model):
    done = shell(f"{line.format(model=model)} > /dev/full")
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "No space left on device" in done.stderr


@pytest.mark.parametrize("line", LINES)
def test_an_encoding_that_lacks_characters(line, model):
    done = shell(line.format(model=model).replace("sacks", "'Zoë → 🐟'"), PYTHONIOENCODING="ascii", PYTHONUTF8="0")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.isascii()


def test_without_a_home(model, tmp_path):
    done = shell(f"env -u HOME {PROGRAM} inspect {model}", tmp_path)
    assert (done.returncode, done.stderr) == (0, "")


def test_the_help_loads_nothing_slow():
    loaded = shell(
        f"{sys.executable} -c 'import sys; from refqlora.commands import main; main([]); print(*sys.modules)' | tail -1"
    ).stdout.split()
    assert "argparse" in loaded
    assert set(loaded) & {"numpy", "scipy", "rich", "tokenizers", "jinja2", "matplotlib", "huggingface_hub"} == set()


@pytest.mark.parametrize("message", ["", "step 3 of 5 is saved in out/checkpoint.safetensors"])
def test_ctrl_c_is_one_line(message, capsys, monkeypatch):
    """While a command is imported, too."""

    def interrupted(*_):
        raise KeyboardInterrupt(*filter(None, [message]))

    monkeypatch.setattr(cli, "import_module", interrupted)
    assert cli.main(["demo"]) == 130
    going_on = f": {message}; to continue: refqlora demo --resume" if message else ""
    assert capsys.readouterr().err == f"\nrefqlora demo: interrupted{going_on}\n"


# ---- tables ----


def printed(table, width):
    out = io.StringIO()
    options.show(Console(file=out, width=width, soft_wrap=True), table)
    return out.getvalue()


def table(rows, **how):
    made = Table(title="sizes", title_justify="left", caption="* of all", **how)
    for name in ("name", "bytes", "share"):
        made.add_column(name, justify="right")
    for i in range(rows):
        made.add_row(f"tensor {i}", f"{12_345_678 * (i + 1):,}", f"{i / 100:.4f}")
    return made


@pytest.mark.parametrize("width", [20, 40, 80, 200, 10_000])
@pytest.mark.parametrize("how", [{}, {"show_header": False}])
def test_no_width_cuts_a_number_or_a_row(width, how):
    out = printed(table(42, **how), width)
    for i in range(42):
        assert f"tensor {i}" in out
        assert f"{12_345_678 * (i + 1):,}" in out
        assert f"{i / 100:.4f}" in out
    assert "sizes" in out
    assert "* of all" in out


def test_a_narrow_table_is_paragraphs():
    assert printed(table(1), 40) == printed(table(1), 200)
    assert printed(table(1), 20).split("\n") == [
        "sizes", "  name   tensor 0", "  bytes  12,345,678", "  share  0.0000", "", "* of all", "",
    ]  # fmt: skip


@pytest.mark.parametrize("width", [20, 30, 40, 60, 80])
def test_a_name_may_be_folded(width):
    made = Table(box=SIMPLE, pad_edge=False)
    made.add_column("name", overflow="fold")
    made.add_column("bytes", justify="right", no_wrap=True)
    made.add_row("model.layers.0.self_attn.q_proj.weight", "12,345,678")
    out = printed(made, width)
    assert "12,345,678" in out
    assert "model.layers.0.self_attn.q_proj.weight".startswith(re.search(r"model\S+", out)[0])
    assert ("name   model" in out) == (width < 33)  # 16 of the name, 10 of the number, and what is between


def test_in_a_pipe_no_line_is_broken(monkeypatch):
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    console = options.console(type("Arguments", (), {"json": False}))
    console.print(300 * "word ", end="")
    assert sys.stdout.getvalue() == 300 * "word "
