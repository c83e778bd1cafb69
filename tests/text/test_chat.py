"""Templates are rendered as their authors mean, and exactly the assistant's answers count.

That the text is transformers' to the byte is for test_parity_chat.py to show.
"""

import json

import pytest
import tiny
from chat_templates import (
    CHATML,
    CONVERSATIONS,
    GENERATION,
    LLAMA3,
    MISTRAL,
    PHI3,
    TEMPLATES,
    THINKING,
    ZEPHYR,
    messages,
)
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, processors

from refqlora.text.chat import PLAIN, ChatTemplate, load_chat_template

TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}


def template(source, **options):
    return ChatTemplate(source, TOKENS, **options)


def counted(marked):
    return [marked.text[start:end] for start, end in marked.spans]


# ---- what it renders ----


def test_the_plain_format():
    plain = ChatTemplate(PLAIN, {"beginning": "<s>", "eos_token": "</s>"})
    talk = messages("Hi {{ x }}", "Hello\n", "Bye", system="Be kind.")
    text = "<s>system: Be kind.\nuser: Hi {{ x }}\nassistant: Hello\n</s>\nuser: Bye\n"
    assert plain.render(talk) == text
    assert plain.render(talk, add_generation_prompt=True) == text + "assistant:"


def test_the_messages_are_left_as_they_were():
    source = "{% set _ = messages.append({'role': 'user', 'content': 'x'}) %}"
    with pytest.raises(
        ValueError, match="refuses the messages: access to attribute 'append' of 'list' object is unsafe"
    ):
        template(source).render(messages("Hi"))


# ---- what counts ----

TALK = messages("Hi", "Hello there", "How many\n\nsacks?", " Two.\n", system="Be kind.")


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        (CHATML, ["Hello there<|im_end|>", " Two.\n<|im_end|>"]),
        (TEMPLATES["qwen"], ["Hello there<|im_end|>", " Two.\n<|im_end|>"]),
        (LLAMA3, ["Hello there<|eot_id|>", "Two.<|eot_id|>"]),
        (MISTRAL, [" Hello there</s>", "  Two.\n</s>"]),
        (ZEPHYR, ["Hello there</s>", " Two.\n</s>"]),
        (PHI3, ["Hello there<|end|>", " Two.\n<|end|>"]),
        (GENERATION, ["Hello there<|im_end|>", " Two.\n<|im_end|>"]),
        (GENERATION.replace(" + '<|im_end|>' }}{% endgen", " }}{% endgen"), ["Hello there", " Two.\n"]),
        (PLAIN, [" Hello there</s>", "  Two.\n</s>"]),
    ],
)
def test_what_the_assistant_says_counts(source, expected):
    for last in ([], messages("And then?"), messages("And then?", " \n")):  # what nobody answers, or with nothing
        (text,) = template(source).examples(TALK + last)
        assert counted(text) == expected
    assert text.text[: text.spans[-1][1]] in template(source).render(TALK)


def test_no_user_counts_and_no_system():
    for source in (CHATML, LLAMA3, MISTRAL, ZEPHYR, GENERATION, PLAIN):
        (text,) = template(source).examples(TALK)
        assert not any(word in "".join(counted(text)) for word in ("Hi", "sacks", "kind", "user", "assistant", "INST"))


def test_where_nothing_ends_an_answer_the_last_gets_the_end_of_text():
    source = "{% for m in messages %}### {{ m.role }}:\n{{ m.content }}\n\n{% endfor %}"
    source += "{% if add_generation_prompt %}### assistant:\n{% endif %}"
    (text,) = template(source, eos="<eos>").examples(TALK)
    assert counted(text) == ["Hello there", " Two.<eos>"]
    assert text.text.endswith(" Two.<eos>")
    assert template(source).end(messages("Hi")) == ""


@pytest.mark.parametrize(
    ("source", "end"),
    [(CHATML, "<|im_end|>"), (LLAMA3, "<|eot_id|>"), (MISTRAL, "</s>"), (GENERATION, "<|im_end|>"), (PLAIN, "</s>")],
)
def test_the_end_of_an_answer(source, end):
    assert template(source).end(messages("Hi")) == end


def test_an_answer_that_a_template_rewrites_later_is_a_separate_text():
    talk = messages("a", "<think>1</think>\nb", "c", "d", "e", "<think>2</think>\nf")
    texts = template(THINKING).examples(talk)
    assert [counted(text) for text in texts] == [
        ["<think>1</think>\nb<|im_end|>"],
        ["d<|im_end|>", "<think>2</think>\nf<|im_end|>"],
    ]
    for text, n in zip(texts, (2, 6), strict=True):  # each as it is when it is to be generated
        before = template(THINKING).render(talk[: n - 1], True)
        assert text.text.startswith(before)
        assert text.spans[-1] == (len(before), len(text.text))
    assert len(template(THINKING).examples(messages("a", "b", "c", "d"))) == 1  # no thoughts, nothing to rewrite


@pytest.mark.parametrize("eos", ["</s>", "<|endoftext|>", "<|end|>"])
def test_the_end_of_the_whole_text_is_not_that_of_an_answer(eos):
    """Phi-3's template ends a conversation with the end of text, after the end of the last answer."""
    phi3 = ChatTemplate(PHI3, {"eos_token": eos}, eos)
    assert phi3.render(messages("Hi", "Hello")).endswith("Hello<|end|>\n" + eos)
    assert phi3.end(messages("Hi")) == "<|end|>"
    (text,) = phi3.examples(messages("Hi", "Hello", "Bye", "Ciao"))
    assert counted(text) == ["Hello<|end|>", "Ciao<|end|>"]
    assert text.text.endswith("Ciao<|end|>")


def test_where_only_the_last_answer_has_an_end():
    source = "{% for m in messages %}{{ m.role }}: {{ m.content }}{{ '\n' if not loop.last }}{% endfor %}"
    source += "{{ '\nassistant:' if add_generation_prompt else eos_token }}"
    texts = template(source, eos="</s>").examples(messages("Hi", "Hello", "Bye", "Ciao"))
    assert [counted(text) for text in texts] == [[" Hello</s>"], [" Ciao</s>"]]


def test_an_answer_that_the_generation_prompt_does_not_begin():
    source = CHATML.replace("{{ '<|im_start|>assistant\\n' }}", "{{ '<|im_start|>assistant\\n<think>\\n' }}")
    message = r"messages\[1\]: c\.json: .* begins this answer with 'Hello.*, but its generation prompt has '<think>\\n'"
    with pytest.raises(ValueError, match=message):
        template(source, where="c.json").examples(messages("Hi", "Hello"))
    with pytest.raises(ValueError, match=r"messages\[3\]: c\.json: the chat template leaves this answer out"):
        template("{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}", where="c.json").examples(
            TALK[1:]
        )


def test_marks_that_mark_nothing():
    source = "{% for m in messages if m.role == 'bot' %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}"
    with pytest.raises(ValueError, match=r"c\.json: the chat template's {% generation %} marks nothing"):
        template(source, where="c.json").examples(messages("Hi", "Hello"))


def test_nothing_said():
    for talk in ([], messages("Hi"), messages("Hi", ""), messages("Hi", "\n ")):
        for source in (CHATML, GENERATION):
            with pytest.raises(ValueError, match="expected a message of the assistant that is not empty, got none"):
                template(source).examples(talk)


def test_marks_within_a_macro():
    """Where transformers' own count of characters is off: it does not see what a macro has written before."""
    source = "{% macro say(m) %}<{{ m.role }}>{% generation %}{{ m.content }}{% endgeneration %}{% endmacro %}"
    source += "{% for m in messages %}{{ say(m) if m.role == 'assistant' else m.content }}{% endfor %}"
    (text,) = template(source).examples(messages("Hi", "Hello", "Bye", "Ciao"))
    assert counted(text) == ["Hello", "Ciao"]
    assert text.text == template(source).render(messages("Hi", "Hello", "Bye", "Ciao"))


words = st.text(alphabet="ab \n<>|é🐟", min_size=1).filter(str.strip)


@given(st.lists(words, min_size=2, max_size=6), st.sampled_from([CHATML, GENERATION, MISTRAL, PLAIN]))
def test_every_answer_counts_once_and_whole(contents, source):
    contents = contents[: len(contents) // 2 * 2]
    texts = template(source).examples(messages(*contents))
    found = [part for text in texts for part in counted(text)]
    assert len(found) == len(contents) // 2
    assert all(answer in part for answer, part in zip(contents[1::2], found, strict=True))


# ---- files ----


def special(*tokens):
    tokenizer = Tokenizer.from_str(tiny.tokenizer().to_str())
    tokenizer.add_special_tokens(list(tokens))
    return tokenizer


def directory(path, tokenizer=None, config=None, **files):
    (tokenizer or tiny.tokenizer()).save(str(path / "tokenizer.json"))
    if config is not None:
        (path / "tokenizer_config.json").write_text(json.dumps(config))
    for name, content in files.items():
        (path / name.replace("_jinja", ".jinja")).write_bytes(content)
    return path, tokenizer or tiny.tokenizer()


@pytest.mark.parametrize("config", [None, {}, {"chat_template": None}, {"chat_template": ""}, {"bos_token": "<s>"}])
def test_without_a_template_the_plain_format(config, tmp_path):
    path, tokenizer = directory(tmp_path, config=config)
    plain = load_chat_template(path, tokenizer, 0)
    assert plain.render(messages("Hi", "Hello")) == "user: Hi\nassistant: Hello<|endoftext|>\n"
    assert load_chat_template(path, tokenizer, None).render(messages("Hi", "Hello")) == "user: Hi\nassistant: Hello\n"


def test_the_plain_format_begins_as_the_tokenizer_begins_texts(tmp_path):
    tokenizer = special("<s>", "</s>")
    ids = [(token, tokenizer.token_to_id(token)) for token in ("<s>", "</s>")]
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=ids)
    plain = load_chat_template(*directory(tmp_path, tokenizer), ids[1][1])
    assert plain.render(messages("Hi", "Hello")) == "<s>user: Hi\nassistant: Hello</s>\n"


def test_an_end_of_several_tokens_is_refused(tmp_path):
    tokenizer = tiny.tokenizer()
    letter = tokenizer.token_to_id("Ġ")  # a byte's letter stands for a space: as text it is something else
    with pytest.raises(ValueError, match="the tokenizer reads 'Ġ', which ends a text, as several tokens"):
        load_chat_template(*directory(tmp_path, tokenizer), letter)
    directory(tmp_path, tokenizer, {"chat_template": CHATML})
    assert load_chat_template(tmp_path, tokenizer, letter).eos == ""  # the template ends answers itself


@pytest.mark.parametrize("eos", [-1, 10**6, "the end", 1.5])
def test_an_end_that_is_not_a_token(eos, tmp_path):
    assert load_chat_template(*directory(tmp_path), eos).eos == ""


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            {"chat_template": 7},
            r"tokenizer_config\.json: chat_template: expected text, or a list of objects with .* got 7",
        ),
        ({"chat_template": ["a"]}, r'tokenizer_config\.json: chat_template: expected text, or a list .*, got \["a"\]'),
        (
            {"chat_template": [{"name": ["a"], "template": "b"}]},
            r"tokenizer_config\.json: chat_template: expected text",
        ),
        ({"chat_template": {"a": 1}}, r'tokenizer_config\.json: chat_template: expected text, .* got {"a": 1}'),
        ({"chat_template": [{"name": "default", "template": None}]}, r"chat_template: expected text, or a list"),
        ({"chat_template": [{"name": "rag", "template": "a"}]}, "expected a chat template named default, got rag"),
        ({"chat_template": "{{ messages"}, r"tokenizer_config\.json: line 1 of the chat template: unexpected end"),
        ([], r"tokenizer_config\.json: expected a JSON object, got list"),
    ],
)
def test_a_bad_file_is_named(config, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        load_chat_template(*directory(tmp_path, config=config), 0)


def test_a_bad_jinja_file_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"chat_template\.jinja: line 2 of the chat template"):
        load_chat_template(*directory(tmp_path, chat_template_jinja=b"a\n{{"), 0)
    with pytest.raises(ValueError, match=r"chat_template\.jinja: not UTF-8 text"):
        load_chat_template(*directory(tmp_path, chat_template_jinja=b"\xff"), 0)


def test_all_conversations_of_all_templates_learn_what_is_said():
    """Whatever the template and the talk, what counts is in it, in order, and ends what is kept."""
    learnt = 0
    for source in TEMPLATES.values():
        for talk in CONVERSATIONS.values():
            try:
                texts = ChatTemplate(source, {**TOKENS, "unk_token": "<unk>"}).examples(talk)
            except ValueError:
                continue
            for text in texts:
                learnt += len(text.spans)
                assert text.spans
                assert all(0 <= start < end <= len(text.text) for start, end in text.spans)
                assert list(text.spans) == sorted(text.spans)
    assert learnt > 100
