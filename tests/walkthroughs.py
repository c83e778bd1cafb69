"""The walkthroughs in notebooks/: run in fresh kernels, compared with what is committed, or recorded anew.

    python tests/walkthroughs.py            run all at the normal size; stable outputs must be those that are committed
    python tests/walkthroughs.py --write    run them and write them with their new outputs
    python tests/walkthroughs.py 03         only those whose names begin so

Tags of cells: `parameters` sets SIZE; `stable` has an output that every machine shows; `exercise` is to be filled in,
the next cell, `check`, says whether the answer is right, and the one after that has it, folded.
"""

import copy
import os
import re
import sys
import tempfile
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient

NOTEBOOKS = Path(__file__).parents[1] / "notebooks"
WIDGET = "application/vnd.jupyter.widget-view+json"
NUMBER = re.compile(r"(?<![\w.])[-+−]?\d[\d,]*(?:\.\d+)?(?:e[-+]?\d+)?")


def paths(*names):
    """The notebooks' files, in order; only those whose names begin with one of `names`, if there are any."""
    found = sorted(NOTEBOOKS.glob("[0-9]*.ipynb"))
    return [path for path in found if not names or path.name.startswith(names)]


def read(path):
    return nbformat.read(path, as_version=4)


def tagged(notebook, tag):
    """The places of the cells that have the tag."""
    return [i for i, cell in enumerate(notebook.cells) if tag in cell.metadata.get("tags", [])]


def with_size(notebook, size):
    """A copy that runs at the size "small" or "normal"."""
    notebook = copy.deepcopy(notebook)
    (place,) = tagged(notebook, "parameters")
    cell = notebook.cells[place]
    cell.source, replaced = re.subn(r'^SIZE = "\w+"', f'SIZE = "{size}"', cell.source, flags=re.M)
    assert replaced == 1
    return notebook


def folded_answer(cell):
    """The code in a Markdown cell's <details>."""
    (code,) = re.findall(r"<details>.*?```python\n(.*?)```.*?</details>", cell.source, re.S)
    return code


def answered(notebook):
    """A copy whose exercises are filled in with the folded answers."""
    notebook = copy.deepcopy(notebook)
    for place in tagged(notebook, "exercise"):
        notebook.cells[place].source = folded_answer(notebook.cells[place + 2])
    return notebook


def execute(notebook, **settings):
    """Run every cell in a fresh kernel, in an empty directory and without the network; -> the notebook with outputs,
    without what widgets leave behind. settings: of the kernel's environment. Raises nbclient's CellExecutionError for a
    cell that fails."""
    notebook = copy.deepcopy(notebook)
    with tempfile.TemporaryDirectory() as directory:
        NotebookClient(
            notebook,
            timeout=600,
            kernel_name="python3",
            store_widget_state=False,
            record_timing=False,
            resources={"metadata": {"path": directory}},
        ).execute(env={**os.environ, "HF_HUB_OFFLINE": "1", **settings})
    notebook.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    for cell in notebook.cells:
        cell.metadata = {key: value for key, value in cell.metadata.items() if key == "tags"}
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if WIDGET not in output.get("data", {})]
    return notebook


def text(cell):
    """What a code cell shows, as text."""
    shown = []
    for output in cell.outputs:
        data = output.get("data", {})
        shown.append(output.get("text") or data.get("text/markdown") or data.get("text/plain") or "")
    return "\n".join(shown).strip()


def same(a, b):
    """Whether two texts agree: their words to the letter, their numbers to within one in the last place shown (the last
    of seven digits depends on the machine's order of summation), whole numbers exactly."""
    words_a, words_b = ([" ".join(part.split()) for part in NUMBER.split(one)] for one in (a, b))
    numbers = list(zip(NUMBER.findall(a), NUMBER.findall(b), strict=False))
    return words_a == words_b and all(_near(x, y) for x, y in numbers)


def _near(x, y):
    if x == y:
        return True
    x, y = (one.replace(",", "").replace("−", "-") for one in (x, y))
    if not ("." in x and "." in y):
        return False
    mantissa, _, exponent = x.partition("e")
    unit = 10.0 ** (int(exponent or 0) - len(mantissa.partition(".")[2]))
    return abs(float(x) - float(y)) <= 1.001 * unit


def differences(committed, executed):
    """What the stable cells show now and did not when they were committed, one text a cell."""
    return [
        f"cell {place}, committed:\n{text(committed.cells[place])}\nnow:\n{text(executed.cells[place])}"
        for place in tagged(committed, "stable")
        if not same(text(committed.cells[place]), text(executed.cells[place]))
    ]


def main(arguments):
    write, names = "--write" in arguments, tuple(a for a in arguments if not a.startswith("-"))
    stale = 0
    for path in paths(*names):
        started = time.perf_counter()
        committed = read(path)
        executed = execute(with_size(committed, "normal"))
        asserts = sum(len(re.findall(r"^\s*assert ", cell.source, re.M)) for cell in committed.cells)
        exercises = len(tagged(committed, "exercise"))
        found = [] if write else differences(committed, executed)
        if write:
            nbformat.write(executed, path)
        stale += len(found)
        seconds, size = time.perf_counter() - started, path.stat().st_size / 1000
        said = f"{path.name}: {seconds:.0f} s, {asserts} asserts, {exercises} exercises, {size:.0f} KB"
        print("\n".join([f"{said}{', STALE' if found else ''}", *found]), flush=True)
    return 1 if stale else 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
