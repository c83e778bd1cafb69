import ast
import sys
import sysconfig
import zlib

import pytest

from refqlora.text import corpus

TRAINING, HELD_OUT = corpus.modules(held_out=False), corpus.modules(held_out=True)


@pytest.fixture(scope="module")
def pairs():
    return corpus.docstring_examples(held_out=False), corpus.docstring_examples(held_out=True)


def tops(documents):
    return {document.name.partition(".")[0] for document in documents}


def passages(document, lines=6, characters=120):
    """Every run of consecutive lines, without indentation, blank lines and brackets alone."""
    text = [line for line in map(str.strip, document.text.split("\n")) if len(line) > 3]
    runs = ("\n".join(text[i : i + lines]) for i in range(len(text) - lines + 1))
    return {run for run in runs if len(run) >= characters}


def library(tmp_path, monkeypatch, **files):
    """Stand these files in for the standard library."""
    for name, text in files.items():
        path = tmp_path / f"{name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})


def examples(tmp_path, monkeypatch, source):
    library(tmp_path, monkeypatch, json=source)  # a name on the training side
    return corpus.docstring_examples(held_out=False)


# ---- modules ---------------------------------------------------------------------------------------------


def test_modules_are_the_library_sorted_and_each_once():
    for documents in (TRAINING, HELD_OUT):
        names = [document.name for document in documents]
        assert names == sorted(set(names))
        assert all(document.text.strip() for document in documents)
    assert {"json", "json.decoder", "asyncio.events", "threading"} <= {d.name for d in TRAINING}
    assert {"functools", "logging.handlers", "http.client"} <= {d.name for d in HELD_OUT}
    assert (tops(TRAINING) | tops(HELD_OUT)) <= sys.stdlib_module_names


def test_a_module_is_the_text_of_its_file():
    import json.decoder

    with open(json.decoder.__file__, encoding="utf-8") as file:
        assert ("json.decoder", file.read()) in TRAINING


def test_the_sides_share_no_package_and_no_passage():
    assert not tops(TRAINING) & tops(HELD_OUT)
    training = set().union(*map(passages, TRAINING))
    assert len(training) > 100_000
    assert {d.name: shared for d in HELD_OUT if (shared := passages(d) & training)} == {}


def test_the_passage_check_finds_shared_passages(monkeypatch):
    # The negative control: without the table, abc is held out while _py_abc, its copy, is for training.
    monkeypatch.setattr(corpus, "GOES_WITH", {})
    training = set().union(*map(passages, corpus.modules(held_out=False)))
    leaks = {d.name for d in corpus.modules(held_out=True) if passages(d) & training}
    assert "abc" in leaks


def test_a_tenth_of_the_bytes_is_held_out():
    training, held_out = (sum(len(d.text.encode()) for d in side) for side in (TRAINING, HELD_OUT))
    assert 0.05 < held_out / (training + held_out) < 0.15
    assert 0.05 < len(HELD_OUT) / (len(TRAINING) + len(HELD_OUT)) < 0.12


def test_the_side_depends_on_the_name_alone(tmp_path, monkeypatch):
    library(
        tmp_path,
        monkeypatch,
        functools="x = 1\n",
        json="x = 1\n",
        abc="x = 1\n",
        **{"http/client": "x = 1\n"},
    )
    assert corpus.modules(held_out=True) == [("functools", "x = 1\n"), ("http.client", "x = 1\n")]
    assert corpus.modules(held_out=False) == [("abc", "x = 1\n"), ("json", "x = 1\n")]
    assert zlib.crc32(b"functools") % 12 == 6


def test_what_is_not_a_module_of_the_library_is_left_out(tmp_path, monkeypatch):
    code = "def f():\n    return 1\n"
    library(
        tmp_path,
        monkeypatch,
        **{
            "json/__init__": code,
            "json/tests/test_json": code,
            "json/my_test/x": code,
            "site-packages/json": code,
            "sitecustomize": code,
            "test/support": code,
            "lib2to3/main": code,
            "csv": code.encode("utf-16"),
            "ast": "",
            "html/entities": "table = {\n" + "    'amp': '&',\n" * 9 + "}\n",
        },
    )
    assert corpus.modules(held_out=False) == [("json", code)]
    assert corpus.modules(held_out=True) == []


def test_line_ends_are_the_same_on_every_system(tmp_path, monkeypatch):
    library(tmp_path, monkeypatch, json=b"x = 1\r\ny = 2\r\n")
    assert corpus.modules(held_out=False) == [("json", "x = 1\ny = 2\n")]


def test_a_library_without_sources_is_an_error(tmp_path, monkeypatch):
    library(tmp_path, monkeypatch)
    for function in (corpus.modules, corpus.docstring_examples):
        with pytest.raises(FileNotFoundError, match=rf"{tmp_path.name}: no source of the standard library"):
            function(held_out=False)


# ---- docstring_examples ----------------------------------------------------------------------------------


def test_examples_of_the_library_are_functions_with_their_docstrings(pairs):
    training, held_out = pairs
    assert len(training) > 3000
    assert len(held_out) > 300
    for prompt, completion in training + held_out:
        assert len(prompt) <= 200
        assert prompt.endswith(":\n")
        (function,) = ast.parse(prompt + completion).body  # the pair by itself is a function
        summary = ast.get_docstring(function, clean=False)
        assert 10 <= len(summary) <= 100
        assert summary.isascii()
        assert summary == summary.strip()
        assert completion == f'    """{summary}"""\n'


def test_no_held_out_prompt_is_a_training_prompt(pairs):
    training, held_out = pairs
    assert len(set(training)) == len(training)
    assert len(set(held_out)) == len(held_out)
    assert not {e.prompt for e in training} & {e.prompt for e in held_out}


def test_signature_is_dedented_without_comments_and_decorators(tmp_path, monkeypatch):
    source = '''
class A:
    @decorated
    async def method(
        self,  # comment
        # another
        sep="#",
        *args: list[int],
        **kwargs,
    ) -> dict[str, int]:  # and one
        # and one
        """Say what it does.

        And more.
        """

    def b(self): "Another docstring."
'''
    assert examples(tmp_path, monkeypatch, source) == [
        (
            'async def method(\n    self,\n    sep="#",\n    *args: list[int],\n    **kwargs,\n) -> dict[str, int]:\n',
            '    """Say what it does."""\n',
        ),
        ("def b(self):\n", '    """Another docstring."""\n'),
    ]


def test_columns_and_lines_are_counted_as_ast_counts(tmp_path, monkeypatch):
    # Columns are bytes, not characters, and a form feed ends no line.
    source = 'x = 1\n\x0c\ndef f(a="äöü€"): """Take a letter."""\n'
    assert examples(tmp_path, monkeypatch, source) == [
        ('def f(a="äöü€"):\n', '    """Take a letter."""\n'),
    ]


@pytest.mark.parametrize(
    ("signature", "docstring"),
    [
        ("def f():", '"""Too short"""'),
        ("def f():", f'"""{"long " * 21}"""'),
        ("def f():", '"""Not ASCII: ä, ö, ü"""'),
        ("def f():", r'"""A backslash: \\ in it"""'),
        ("def f():", "'''Some \"\"\"quotes\"\"\" in it'''"),
        ("def f():", "'''The end is a \"quote\"'''"),
        ("def f():", '"""   """'),
        ("def f():", "return 'No docstring at all'"),
        (f"def f({'a' * 200}):", '"""Too long a signature."""'),
    ],
)
def test_a_pair_that_would_not_do_is_skipped(tmp_path, monkeypatch, signature, docstring):
    source = f'{signature}\n    {docstring}\n\n\ndef kept():\n    """One "quote" is fine."""\n'
    assert examples(tmp_path, monkeypatch, source) == [
        ("def kept():\n", '    """One "quote" is fine."""\n'),
    ]


def test_pairs_are_there_once_and_on_one_side(tmp_path, monkeypatch):
    function = 'def f(x):\n    """Do something useful."""\n'
    other = 'def f(x):\n    """Do something else."""\n'
    library(tmp_path, monkeypatch, json=function * 2, csv=function, functools=other + "\n" + function)
    assert corpus.docstring_examples(held_out=False) == [("def f(x):\n", '    """Do something useful."""\n')]
    assert corpus.docstring_examples(held_out=True) == []


def test_a_quick_look_takes_one_training_module_in_so_many(tmp_path, monkeypatch):
    csv, heapq, json = (f'def {name}(x):\n    """Do something useful."""\n' for name in ("c", "h", "j"))
    library(tmp_path, monkeypatch, csv=csv, heapq=heapq, json=json, functools=heapq)
    assert [e.prompt for e in corpus.docstring_examples(held_out=False, every=2)] == ["def c(x):\n", "def j(x):\n"]
    assert [e.prompt for e in corpus.docstring_examples(held_out=True, every=2)] == ["def h(x):\n"]
    assert corpus.docstring_examples(held_out=True) == []  # as heapq is among the training modules


# ---- language_reference ----------------------------------------------------------------------------------


def paragraphs(document):
    words = (" ".join(paragraph.split()) for paragraph in document.text.split("\n\n"))
    return {paragraph for paragraph in words if len(paragraph) >= 60}


def test_topics_are_the_reference_and_share_no_paragraph():
    topics = pytest.importorskip("pydoc_data.topics").topics
    training = corpus.language_reference(held_out=False)
    held_out = corpus.language_reference(held_out=True)
    for side in (training, held_out):
        assert [t.name for t in side] == sorted({t.name for t in side})
        assert all(topics[t.name] == t.text for t in side)
    total = sum(len(t.text) for t in training + held_out)
    assert 0.04 < sum(len(t.text) for t in held_out) / total < 0.12
    assert not set().union(*map(paragraphs, training)) & set().union(*map(paragraphs, held_out))


def test_a_topic_within_a_longer_one_is_left_out(monkeypatch):
    module = pytest.importorskip("pydoc_data.topics")
    passage = "a paragraph that stands in two topics, and which is some sixty characters long"
    topics = {"part": passage, "whole": f"{passage}\n\nmore of it", "other": "something else altogether"}
    monkeypatch.setattr(module, "topics", topics)
    both = corpus.language_reference(held_out=False) + corpus.language_reference(held_out=True)
    assert {topic.name for topic in both} == {"whole", "other"}


def test_a_python_without_pydoc_data_is_an_error(monkeypatch):
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    with pytest.raises(ModuleNotFoundError, match="lacks pydoc_data"):
        corpus.language_reference(held_out=False)
