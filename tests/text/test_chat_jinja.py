"""A chat template is a stranger's program: it can read only its messages, and it always ends."""

import time

import pytest
from chat_templates import CONVERSATIONS, TEMPLATES, messages

from refqlora.text import chat_jinja
from refqlora.text.chat import ChatTemplate

TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages.__class__.__mro__ }}",
        "{{ ''.__class__.__base__.__subclasses__() }}",
        "{{ raise_exception.__globals__ }}",
        "{{ strftime_now.__globals__ }}",
        "{{ namespace.__init__.__globals__ }}",
        "{{ dict.mro() }}",
        "{{ '{0.__class__}'.format(messages) }}",
        "{% include '/etc/passwd' %}",
        "{% import 'os' as os %}{{ os }}",
    ],
)
def test_a_template_is_kept_from_the_interpreter(source):
    try:
        text = ChatTemplate(source, TOKENS).render(messages("Hi"))
    except ValueError as error:
        assert "refuses the messages" in str(error)  # noqa: PT017  (it may also render to nothing)
    else:
        assert text == ""


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{{ raise_exception('Two\n lines') }}", "the chat template refuses the messages: Two lines"),
        ("{{ messages[7].content.x }}", "refuses the messages: .*no element 7"),
        ("{{ 1 / 0 }}", "refuses the messages: division by zero"),
        ("{{ 'a' + 1 }}", "refuses the messages: can only concatenate str"),
        ("{% for i in range(10 ** 9) %}{% endfor %}", "refuses the messages: Range too big"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "refuses the messages: maximum recursion depth"),
    ],
)
def test_what_goes_wrong_in_a_template_is_one_line_that_names_the_file(source, message):
    with pytest.raises(ValueError, match=f"^a/b.json: .*{message}") as error:
        ChatTemplate(source, TOKENS, where="a/b.json").render(messages("Hi"))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{{ messages", "line 1 of the chat template: unexpected end of template"),
        ("a\nb\n{% for %}", "line 3 of the chat template: "),
        ("{% generation %}a", "line 1 of the chat template: "),
        ("{{ messages | nothing }}", "line 1 of the chat template: No filter named 'nothing'"),
    ],
)
def test_a_bad_template_is_refused(source, message):
    with pytest.raises(ValueError, match=f"^a/b.json: {message}"):
        ChatTemplate(source, TOKENS, where="a/b.json")


@pytest.mark.parametrize(
    "source",
    [
        "{% break %}",
        "{% for a in [1] %}" * 25 + "{% endfor %}" * 25,
        "{{ " + "(" * 500 + "1" + ")" * 500 + " }}",
        "{{ " + "not " * 5000 + "1 }}",
        "{% if a %}" * 200 + "{% endif %}" * 200,
        "{{ " + "[" * 3000 + "]" * 3000 + " }}",
        "a" * 100_001,
    ],
    ids=lambda source: source[:12],
)
def test_what_cannot_be_compiled_is_one_line(source):
    try:
        ChatTemplate(source, TOKENS, where="a/b.json").render(messages("Hi"))
    except ValueError as error:
        assert str(error).startswith("a/b.json: ")  # noqa: PT017  (some Pythons compile some of them)
        assert "\n" not in str(error)  # noqa: PT017
        assert len(str(error)) < 300  # noqa: PT017


LARGE = "more than 10,000,000 characters"
NUMBER = "a number of more than 10,000 bits"


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{{ 2 ** (9 ** 9) }}", NUMBER),
        ("{% set n = namespace(x=3) %}{% for i in range(90000) %}{% set n.x = n.x * n.x %}{% endfor %}", NUMBER),
        ("{{ 'a' * 999999999 }}", LARGE),
        ("{{ 999999999 * 'a' }}", LARGE),
        ("{{ [messages] * 99999999 }}", LARGE),
        ("{% set n = namespace(x='ab') %}{% for i in range(99) %}{% set n.x = n.x + n.x %}{% endfor %}", LARGE),
        ("{% set n = namespace(x='ab') %}{% for i in range(99) %}{% set n.x = n.x ~ n.x %}{% endfor %}", LARGE),
        (
            "{% set n = namespace(x='ab') %}{% for i in range(99) %}{% set n.x = [n.x, n.x] %}{% endfor %}{{ n.x }}",
            LARGE,
        ),
        ("{{ messages | tojson(indent=999999999) }}", LARGE),
        ("{{ 'a' | center(999999999) }}", LARGE),
        ("{{ 'a'.ljust(999999999) }}", LARGE),
        ("{{ 'a\nb' | indent(999999999) }}", LARGE),
        ("{{ ('a' * 100000) | replace('a', 'b' * 100000) }}", LARGE),
        ("{{ ('b' * 100000).join('a' * 100000) }}", LARGE),
        ("{{ '%999999999d' % 1 }}", LARGE),
        ("{{ '%*d' | format(999999999, 1) }}", LARGE),
        ("{{ '{:999999999}'.format(1) }}", LARGE),
        ("{{ '{:{}}'.format(1, 999999999) }}", LARGE),
        ("{{ 1.5 | round(999999999, 'floor') }}", LARGE),
        ("{% for i in range(90000) %}{{ 'a' * 90000 }}{% endfor %}", LARGE),
        ("{% macro f() %}{% for i in range(90000) %}" + "a" * 9000 + "{% endfor %}{% endmacro %}{{ f() }}", LARGE),
    ],
)
def test_memory_is_bounded(source, message):
    with pytest.raises(ValueError, match=f"^a/b.json: the chat template refuses the messages: .*{message}"):
        ChatTemplate(source, TOKENS, where="a/b.json").render(messages("Hi"))


LOOP = "{% for a in range(90000) %}"


@pytest.mark.parametrize(
    "source",
    [
        LOOP * 3 + "{% endfor %}" * 3,
        LOOP * 3 + "{{ loop.index }}" * 0 + "{% if loop.last %}{% endif %}" + "{% endfor %}" * 3,
        "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
        "{% for x in [[]] recursive %}{% if loop.depth < 60 %}{{ loop([[], []]) }}{% endif %}{% endfor %}",
        "{{ range(90000) | map('replace', '', 'a' * 90000) | list }}",
        LOOP + "{% set a = range(90000) | list | sort | reverse | list %}{% endfor %}",
    ],
)
def test_time_is_bounded(source, monkeypatch):
    monkeypatch.setattr(chat_jinja, "SECONDS", 0.2)
    began = time.monotonic()
    with pytest.raises(ValueError, match=r"refuses the messages: it (takes more than \d seconds|makes a text or list)"):
        ChatTemplate(source, TOKENS).render(messages("Hi"))
    assert time.monotonic() - began < 30  # it would take years


def test_each_rendering_has_the_full_time(monkeypatch):
    template = ChatTemplate(TEMPLATES["chatml"], TOKENS)
    template.render(messages("Hi"))
    later = time.monotonic() + 100
    monkeypatch.setattr(time, "monotonic", lambda: later)
    assert template.render(messages("Hi"))


def test_loops_that_ask_for_their_length():
    source = "{{ loop.index }}/{{ loop.length }}{{ '!' if loop.last }}{{ loop.revindex0 }} "
    source = "{% for m in messages %}" + source + "{% endfor %}"
    assert ChatTemplate(source, TOKENS).render(messages("a", "b", "c")) == "1/32 2/31 3/3!0 "


def test_the_long_conversation_is_not_too_much():
    """A thousand messages of a thousand characters, in all templates but those that count them."""
    talk = messages(*["word " * 200] * 1000)
    for name, source in TEMPLATES.items():
        text = ChatTemplate(source, TOKENS).render(talk)
        assert len(text) > 1_000_000 or name == "everything"
    assert len(CONVERSATIONS) > 5
