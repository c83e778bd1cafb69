"""The walkthroughs run from top to bottom in fresh kernels, their exercises tell right from wrong, and what is
committed is whole."""

import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import nbformat
import pytest
import walkthroughs
from without import run_without

from refqlora.backend import cores

NAMES = [path.stem for path in walkthroughs.paths()]
NOTEBOOKS = {path.stem: walkthroughs.read(path) for path in walkthroughs.paths()}
WITHOUT_TOKENIZERS = [name for name in NAMES if name[:2] in ("02", "03", "04")]  # these run in a browser, too
WRONG = Path(__file__).parent / "wrong_answers"


def wrong_answers(name):
    """[(the exercise's number, what is wrong, code)] that the notebook's checks must refuse."""
    parts = re.split(r"^# exercise (\d+): (.*)\n", (WRONG / f"{name}.py").read_text(encoding="utf-8"), flags=re.M)[1:]
    return [(int(parts[i]), parts[i + 1], parts[i + 2]) for i in range(0, len(parts), 3)]


def examined(name):
    """The notebook at the small size, with the folded answers filled in, and every wrong one tried after its last cell;
    run."""
    notebook = walkthroughs.with_size(walkthroughs.answered(NOTEBOOKS[name]), "small")
    exercises = walkthroughs.tagged(notebook, "exercise")
    for number, _, code in wrong_answers(name):
        notebook.cells.append(nbformat.v4.new_code_cell(code))
        notebook.cells.append(nbformat.v4.new_code_cell(notebook.cells[exercises[number - 1] + 1].source))
    return walkthroughs.execute(notebook, OPENBLAS_NUM_THREADS="1", OMP_NUM_THREADS="1")  # as many kernels as cores run


@pytest.fixture(scope="module")
def runs():
    """{name: the future of its run}: as many at a time as there are cores."""
    with ThreadPoolExecutor(cores()) as pool:
        yield {name: pool.submit(examined, name) for name in NAMES}


@pytest.mark.parametrize("name", NAMES)
def test_it_runs_and_its_exercises_tell_right_from_wrong(name, runs):
    notebook, wrong = runs[name].result(), wrong_answers(name)
    exercises = walkthroughs.tagged(notebook, "exercise")
    for place in exercises:
        assert walkthroughs.text(notebook.cells[place + 1]) == "Right."
    for (number, what, _), cell in zip(wrong, notebook.cells[-2 * len(wrong) + 1 :: 2], strict=True):
        assert walkthroughs.text(cell).startswith("Not yet: "), f"exercise {number}: {what}"
    assert {number for number, _, _ in wrong} == set(range(1, len(exercises) + 1))


@pytest.mark.parametrize("name", NAMES)
def test_what_is_committed_is_whole(name):
    notebook, code = NOTEBOOKS[name], [cell for cell in NOTEBOOKS[name].cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))  # run once, from top to bottom
    assert 'SIZE = "normal"' in notebook.cells[walkthroughs.tagged(notebook, "parameters")[0]].source
    outputs = [output for cell in code for output in cell.outputs]
    assert not [output for output in outputs if output.output_type == "error" or output.get("name") == "stderr"]
    assert not [output for output in outputs if walkthroughs.WIDGET in output.get("data", {})]
    assert "widgets" not in notebook.metadata
    exercises = walkthroughs.tagged(notebook, "exercise")
    assert len(exercises) >= 2
    for place in exercises:
        assert "check" in notebook.cells[place + 1].metadata.tags
        assert walkthroughs.text(notebook.cells[place + 1]).startswith("Not answered yet")
        assert walkthroughs.folded_answer(notebook.cells[place + 2])
    assert walkthroughs.tagged(notebook, "stable")
    assert sum("assert " in cell.source for cell in code) >= 5
    assert sum("**Predict" in cell.source for cell in notebook.cells) >= 2
    assert sum(output.get("data", {}).get("image/png") is not None for output in outputs) >= 1
    said = nbformat.writes(notebook)
    assert len(said) < 400_000
    assert not re.search(r"/(home|root|tmp|work|Users)/", said)


@pytest.mark.parametrize("name", WITHOUT_TOKENIZERS)
def test_it_runs_where_a_browser_s_python_has_no_such_package(name, tmp_path):
    notebook = walkthroughs.with_size(NOTEBOOKS[name], "small")
    program = "\n\n".join(cell.source for cell in notebook.cells if cell.cell_type == "code")
    run_without(("tokenizers", "huggingface_hub", "ipywidgets", "torch"), program, threadless=True)


def test_the_table_of_contents_names_each_once():
    contents = (walkthroughs.NOTEBOOKS / "README.md").read_text(encoding="utf-8")
    assert re.findall(r"^\| \[\d+\. .*\]\((\d\d_\w+)\.ipynb\)", contents, re.M) == NAMES


def anchors(page):
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", ["README.md", "errata.md", "../README.md", "../figures/README.md"])
def test_what_a_page_links_to_exists(page):
    page = walkthroughs.NOTEBOOKS / page
    for file, anchor in re.findall(r"\]\(([^)#:\s]*)(?:#([^)\s]+))?\)", page.read_text(encoding="utf-8")):
        target = page.parent / file if file else page
        assert target.exists(), file
        assert not anchor or anchor in anchors(target), f"{file}#{anchor}"


@pytest.mark.parametrize("name", NAMES)
def test_what_a_notebook_links_to_exists(name):
    said = "\n".join(cell.source for cell in NOTEBOOKS[name].cells if cell.cell_type == "markdown")
    for file in re.findall(r"\]\(([^)#:\s]+)(?:#[^)\s]+)?\)", said):
        assert (walkthroughs.NOTEBOOKS / file).exists(), file


@pytest.mark.parametrize(
    ("committed", "now", "agree"),
    [
        ("NF4 0.0920", "NF4 0.0920", True),
        ("NF4 0.0920", "NF4 0.0921", True),
        ("NF4 0.0920", "NF4 0.0922", False),
        ("NF4 0.0920", "FP4 0.0920", False),
        ("2.3e-06 off", "2.4e-06 off", True),
        ("2.3e-06 off", "2.3e-05 off", False),
        ("8,654,848 bytes", "8,654,849 bytes", False),
        ("1.5 and 2.5", "1.5", False),
        ("a -0.5", "a 0.5", False),
    ],
)
def test_stale_output_is_noticed(committed, now, agree):
    assert walkthroughs.same(committed, now) is agree
