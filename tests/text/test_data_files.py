"""People's files are read as they are meant: texts, and examples in the usual spellings."""

import codecs
import json

import pytest
import tiny
from chat_templates import CHATML, LLAMA3, PHI3

from refqlora.text.chat import PLAIN, ChatTemplate, Marked
from refqlora.text.data_files import read_data, read_dataset
from refqlora.text.examples import Conversation, Example

PLAINLY = ChatTemplate(PLAIN, {"eos_token": "<eos>"})


def test_read_texts_takes_a_file_exactly(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes("näive\r\n\ttext ".encode())
    assert read_data(path, PLAINLY) == [("a.txt", "näive\r\n\ttext ")]
    assert read_data(str(path), PLAINLY) == read_data(path, PLAINLY)


def test_read_texts_takes_a_directory_sorted_without_hidden_files(tmp_path):
    for name in ("b.txt", "sub/a.md", "a.txt", ".hidden", ".git/config", "sub/.x/y.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    texts = read_data(tmp_path, PLAINLY)
    assert texts == [("a.txt", "a.txt"), ("b.txt", "b.txt"), ("sub/a.md", "sub/a.md")]
    assert read_data(tmp_path / ".hidden", PLAINLY) == [(".hidden", ".hidden")]  # it was asked for


def test_read_texts_names_the_file_at_fault(tmp_path):
    latin = tmp_path / "latin.txt"
    for content, message in (
        (b"na\xefve", r"not UTF-8 text: byte offset 2"),
        (b" \n", "the file is empty"),
        (b"a\0b", "not text: it contains zero bytes"),
        (codecs.BOM_UTF8, "the file is empty"),
    ):
        latin.write_bytes(content)
        for path in (latin, tmp_path):  # alone in a directory, too
            with pytest.raises(ValueError, match=rf"latin\.txt: {message}"):
                read_data(path, PLAINLY)
    (tmp_path / "nothing").mkdir()
    with pytest.raises(FileNotFoundError, match="nothing: expected a file, or a directory with files"):
        read_data(tmp_path / "nothing", PLAINLY)
    for name in ("missing", "missing.jsonl"):
        with pytest.raises(FileNotFoundError, match=f"{name}: no such file or directory"):
            read_data(tmp_path / name, PLAINLY)


def test_a_picture_among_notes_is_skipped_and_counted(tmp_path):
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "cat.png").write_bytes(b"\x89PNG\r\n")
    said = []
    assert read_data(tmp_path, PLAINLY, said.append) == [("a.txt", "text")]
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "pairs.jsonl").write_text("{}")
    assert read_data(tmp_path, PLAINLY, said.append) == [("a.txt", "text")]
    skipped = f"skipped {tmp_path}/cat.png: not UTF-8 text: byte offset 0: invalid start byte"
    assert said == [f"read 1 of 2 files; {skipped}", f"read 1 of 4 files; {skipped}, and 2 more"]
    for path in tmp_path.glob("[ace]*"):
        path.unlink()
    with pytest.raises(ValueError, match=r"pairs\.jsonl: expected text, got examples: give the file itself"):
        read_data(tmp_path, PLAINLY)


def test_a_byte_order_mark_is_not_text(tmp_path):
    (tmp_path / "a.txt").write_bytes(codecs.BOM_UTF8 + b"text")
    assert read_data(tmp_path / "a.txt", PLAINLY) == [("a.txt", "text")]
    pair = b'{"prompt": "a", "completion": "b"}'
    for name, content in (("a.jsonl", pair), ("a.json", b"[" + pair + b"]")):
        (tmp_path / name).write_bytes(codecs.BOM_UTF8 + content)
        assert read_data(tmp_path / name, PLAINLY) == [Example("a", "b")]


def jsonl(tmp_path, *lines):
    path = tmp_path / "data.jsonl"
    encoded = (line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines)
    path.write_bytes(b"\n".join(encoded))
    return path


def test_read_examples_takes_both_kinds(tmp_path):
    turns = [
        {"role": "system", "content": ""},
        {"content": "Hi\u2028", "role": "user"},
        {"role": "assistant", "content": "Hello"},
    ]
    path = jsonl(
        tmp_path,
        {"prompt": "2 + 2 =", "completion": " 4"},
        b"",
        {"messages": turns},
        '{"prompt": "", "completion": "a\u2028b \\ud83d\\ude00"}'.encode(),  # a line separator ends no line
        b"  \r",
    )
    before = "system: \nuser: Hi\u2028\nassistant:"
    assert read_data(path, PLAINLY) == [
        Example("2 + 2 =", " 4"),
        Conversation((Marked(before + " Hello<eos>", ((len(before), len(before) + 11),)),)),
        Example("", "a\u2028b 😀"),
    ]


USER = {"role": "user", "content": "Hi"}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"prompt": "a", ', "expected a JSON object on each line, or an array of them, got broken JSON"),
        (b"[" * 100_000, "expected a JSON object on each line, or an array of them, got broken JSON"),
        (b'{"prompt": ' + b"9" * 5000 + b"}", "got broken JSON: Exceeds the limit"),
        (b'{"prompt": "a\xff"}', "'utf-8' codec can't decode byte 0xff in position 13"),
        (b'{"prompt": "a", "completion": "\\ud800"}', "completion: expected UTF-8 text, got half of a surrogate pair"),
        (["a", "b"], "expected a JSON object, got list"),
        (None, "expected a JSON object, got NoneType"),
        ({}, "expected the keys messages or conversations or prompt, completion or .*, got none"),
        ({"prompt": "a"}, "expected the keys messages or .*, got prompt"),
        ({"prompt": "a", "completion": None}, "expected the keys messages or .*, got prompt"),
        ({"x" * 9999: 1}, "expected the keys messages or .*, got x{100}$"),
        ({"prompt": "a", "completion": 4}, "completion: expected text, got int"),
        ({"prompt": "a", "completion": ""}, "expected a completion, got an empty one"),
        ({"instruction": "a", "output": ["b"]}, r"output\[0\]: expected a part of type text, got str"),
        ({"instruction": "a", "output": ""}, "expected a message of the assistant that is not empty, got none"),
        ({"messages": "Hi"}, "messages: expected a list, got str"),
        ({"messages": ["Hi"]}, r"messages\[0\]: expected an object with role and content, got str"),
        ({"messages": [USER, {"role": "user"}]}, r"messages\[1\].content: expected text, got NoneType"),
        ({"messages": [USER | {"content": None}]}, r"messages\[0\].content: expected text, got NoneType"),
        ({"messages": [USER | {"content": None, "tool_calls": [1]}]}, r"messages\[0\].content: expected text"),
        ({"messages": [{"content": "a"}]}, r"messages\[0\]: expected a role, got content"),
        (
            {"messages": [USER | {"content": [{"type": "image"}]}]},
            r"content\[0\]: expected a part of type text, got image",
        ),
        (
            {"messages": [USER | {"role": "bot"}]},
            r"expected a message of the assistant that is not empty, got none \(roles: bot\)",
        ),
        ({"messages": [USER]}, "expected a message of the assistant that is not empty, got none"),
        ({"messages": [{"role": "assistant", "content": ""}]}, "expected a message of the assistant"),
        ({"messages": [{"role": "assistant", "content": " \n"}]}, "expected a message of the assistant"),
        ({"messages": []}, "expected a message of the assistant that is not empty, got none"),
        ({"conversations": [{"from": "human"}]}, r"conversations\[0\].content: expected text, got NoneType"),
    ],
)
def test_read_examples_names_the_line_at_fault(tmp_path, line, message):
    path = jsonl(tmp_path, {"prompt": "a", "completion": "b"}, b"", line)
    with pytest.raises(ValueError, match=rf"data\.jsonl:3: .*{message}"):
        read_data(path, PLAINLY)


def test_read_examples_names_the_line_that_the_template_refuses(tmp_path):
    source = "{{ raise_exception('No\n systems!') if messages[0].role == 'system' }}{{ messages[1].content }}"
    template = ChatTemplate(source, {}, where="model/tokenizer_config.json")
    turns = [{"role": "system", "content": "a"}, USER, {"role": "assistant", "content": "b"}]
    path = jsonl(tmp_path, {"prompt": "a", "completion": "b"}, {"messages": turns})
    message = r"data\.jsonl:2: model/tokenizer_config\.json: the chat template refuses the messages: No systems!$"
    with pytest.raises(ValueError, match=message):
        read_data(path, template)


def test_read_examples_of_nothing_is_an_error(tmp_path):
    with pytest.raises(
        ValueError, match=r"data\.jsonl: expected an example on each line, or an array of them, got none"
    ):
        read_data(jsonl(tmp_path, b"", b" "), PLAINLY)


# ---- the spellings that people have ----


def talk(*contents):
    """What PLAINLY makes of user and assistant in turn, as `Conversation`s are compared."""
    roles = ("user", "assistant")
    return Conversation(PLAINLY.examples([{"role": roles[i % 2], "content": text} for i, text in enumerate(contents)]))


PARTS = [{"type": "text", "text": "H"}, {"type": "text", "text": "i"}]
SPELLINGS = {
    "messages": ({"messages": [USER, {"role": "assistant", "content": "Hello"}]}, talk("Hi", "Hello")),
    "parts": (
        {"messages": [USER | {"content": PARTS}, {"role": "assistant", "content": "Hello"}]},
        talk("Hi", "Hello"),
    ),
    "ShareGPT": (
        {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]},
        talk("Hi", "Hello"),
    ),
    "Alpaca": ({"instruction": "Add.", "input": "1 + 1", "output": "2"}, talk("Add.\n\n1 + 1", "2")),
    "Alpaca without input": ({"instruction": "Add.", "input": "", "output": "2"}, talk("Add.", "2")),
    "pair": ({"prompt": "Hi", "completion": "Hello"}, Example("Hi", "Hello")),
}


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("as_array", [False, True])
def test_each_spelling(spelling, as_array, tmp_path):
    value, expected = SPELLINGS[spelling]
    path = tmp_path / ("data.json" if as_array else "data.jsonl")
    path.write_text(json.dumps([value, value], indent=2) if as_array else f"{json.dumps(value)}\n{json.dumps(value)}")
    said = []
    assert read_data(path, PLAINLY, said.append) == [expected, expected]
    (line,) = said
    assert line.startswith(f"{path.name}: 2 with ")
    assert sorted(line.partition(" with ")[2].split(", ")) == sorted(value)


def test_ignored_keys_are_reported_once(tmp_path):
    said = []
    value = {
        "id": 7,
        "prompt": None,
        "source": "x",
        "messages": [USER | {"weight": 0}, {"role": "assistant", "content": "b"}],
    }
    pair = {"prompt": "a", "completion": "b", "id": 8}
    assert len(read_data(jsonl(tmp_path, value, pair, value), PLAINLY, said.append)) == 3
    assert said == [
        "data.jsonl: 2 with messages and 1 with prompt, completion; ignored: id, source, weight of messages"
    ]


def test_a_system_message_beside_the_conversation(tmp_path):
    turns = {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]}
    for value in (turns | {"system": "Be kind."}, {"instruction": "Hi", "output": "Hello", "system": "Be kind."}):
        ((text,),) = read_data(jsonl(tmp_path, value), PLAINLY)[0]
        assert text.text == "system: Be kind.\nuser: Hi\nassistant: Hello<eos>"


def test_rows_of_text_are_documents(tmp_path):
    path = jsonl(tmp_path, {"text": "a b c", "id": 1}, {"text": ""}, {"text": "d\n"})
    assert read_data(path, PLAINLY) == [(f"{path}:1", "a b c"), (f"{path}:3", "d\n")]
    with pytest.raises(ValueError, match=r"data\.jsonl: expected either examples or documents \(text\), got both"):
        read_data(jsonl(tmp_path, {"text": "a"}, {"prompt": "a", "completion": "b"}), PLAINLY)


def test_tools_are_for_the_template_to_know(tmp_path):
    tool = {"role": "tool", "content": "12°", "tool_call_id": "1"}
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "weather"}}]}
    talk = [USER, {"role": "assistant", "content": "wait"}, tool, {"role": "assistant", "content": "Cold."}]
    ((text,),) = read_data(jsonl(tmp_path, {"messages": talk}), ChatTemplate(CHATML, {}))[0]
    assert "<|im_start|>tool\n12°<|im_end|>" in text.text
    assert [text.text[a:b] for a, b in text.spans] == ["wait<|im_end|>", "Cold.<|im_end|>"]
    with pytest.raises(
        ValueError, match=r"data\.jsonl:1: messages\[2\]: m\.json: the chat template leaves out the role 'tool'"
    ):
        read_data(jsonl(tmp_path, {"messages": talk}), ChatTemplate(PHI3, {}, where="m.json"))
    calling = CHATML.replace(
        "message['content']", "(message.tool_calls | tojson if message.tool_calls else message.content)"
    )
    ((text,),) = read_data(jsonl(tmp_path, {"messages": [USER, call, *talk[2:]]}), ChatTemplate(calling, {}))[0]
    assert [text.text[a:b] for a, b in text.spans] == [
        '[{"function": {"name": "weather"}}]<|im_end|>',
        "Cold.<|im_end|>",
    ]


def test_an_array_names_the_example_at_fault(tmp_path):
    path = tmp_path / "data.json"
    for content, message in (
        ('[{"prompt": "a", "completion": "b"}, 7]', r"data\.json\[1\]: expected a JSON object, got int"),
        ('[{"prompt": "a", ', r"data\.json: expected a JSON object on each line, or an array of them, got broken JSON"),
        ("[]", r"data\.json: expected an example on each line, or an array of them, got none"),
        ('{\n"data": []}', r"data\.json:1: expected a JSON object on each line"),
        ("prose", r"data\.json:1: expected a JSON object on each line"),
        ("[" * 99_999, r"data\.json: expected .* got broken JSON"),
    ):
        path.write_text(content)
        with pytest.raises(ValueError, match=message):
            read_data(path, PLAINLY)


# ---- into sequences ----


@pytest.mark.parametrize("held_out", [0, 0.25])
def test_files_into_sequences(held_out, tmp_path):
    pairs = jsonl(tmp_path, *(example._asdict() for example in tiny.EXAMPLES))
    (tmp_path / "a.txt").write_text(tiny.TEXT)
    for path, n in ((pairs, 12), (tmp_path / "a.txt", 9)):
        training, rest = read_dataset(path, tiny.tokenizer(), PLAINLY, 0, 32, held_out, 0)
        assert len(training) + len(rest) >= n
        assert len(rest) == round(held_out * (len(training) + len(rest)))
        assert training.counted_tokens > 0


def test_a_single_example_can_be_learnt(tmp_path):
    path = jsonl(tmp_path, {"prompt": "a", "completion": "b"})
    training, rest = read_dataset(path, tiny.tokenizer(), PLAINLY, 0, 32, 0.0, 0)
    assert (len(training), len(rest)) == (1, 0)
    with pytest.raises(ValueError, match=r"takes 1 of 1 examples .* nothing is left to train on \(a fraction of 0"):
        read_dataset(path, tiny.tokenizer(), PLAINLY, 0, 32, 0.05, 0)
    long = jsonl(tmp_path, {"prompt": "sacks " * 500, "completion": "b"})
    training, _ = read_dataset(long, tiny.tokenizer(), PLAINLY, 0, 32, 0.0, 0)
    assert (training.truncated, len(training.tokens[0]), training.counted_tokens) == (1, 32, 2)


def test_an_example_in_the_words_of_a_real_template(tmp_path):
    template = ChatTemplate(LLAMA3, {"bos_token": "<s>"})
    value = {"instruction": "Add.", "input": "1 + 1", "output": "2"}
    ((text,),) = read_data(jsonl(tmp_path, value), template)[0]
    assert "user<|end_header_id|>\n\nAdd.\n\n1 + 1<|eot_id|>" in text.text
    assert [text.text[a:b] for a, b in text.spans] == ["2<|eot_id|>"]
