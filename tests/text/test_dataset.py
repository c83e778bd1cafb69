import json
import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from refqlora.functional import IGNORE
from refqlora.text import dataset as data
from refqlora.text.chat import PLAIN, ChatTemplate, Marked
from refqlora.text.dataset import Dataset
from refqlora.text.encoding import pack, pack_split, tokenize_examples
from refqlora.text.examples import Conversation, Document, Example, read_jsonl, read_texts
from refqlora.text.tokenizer import END_OF_TEXT, load_tokenizer, token_bytes, train_bpe

EOS = 0
SOURCE = '''class Circle:
    """A circle, given by its radius."""

    def area(self, pi=3.14159):
        if self.radius_of < 0:
            raise ValueError("negative radius")
        return pi * self.radius_of ** 2


def main():
    return Circle(100).area()
'''
BPE = train_bpe([Document("source", SOURCE * 3)], 340)


def words(*vocabulary):
    """A tokenizer whose tokens are words, so that a test can read its ids; 0 is the end of text."""
    vocabulary = {"<eos>": 0, "<unk>": 1} | {word: i for i, word in enumerate(vocabulary, start=2)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(["<eos>"])
    return tokenizer


LETTERS = words(*"abcdefghij", "user:", "assistant:", "system:")
LETTER = {letter: i for i, letter in enumerate("abcdefghij", start=2)}


def ids(text):
    return [LETTER[letter] for letter in text]


PLAINLY = ChatTemplate(PLAIN, {"eos_token": "<eos>"})


# ---- files -----------------------------------------------------------------------------------------------


def test_read_texts_takes_a_file_exactly(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes("näive\r\n\ttext ".encode())
    assert read_texts(path) == [("a.txt", "näive\r\n\ttext ")]
    assert read_texts(str(path)) == read_texts(path)


def test_read_texts_takes_a_directory_sorted_without_hidden_files(tmp_path):
    for name in ("b.txt", "sub/a.md", "a.txt", ".hidden", ".git/config", "sub/.x/y.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    texts = read_texts(tmp_path)
    assert texts == [("a.txt", "a.txt"), ("b.txt", "b.txt"), ("sub/a.md", "sub/a.md")]
    assert read_texts(tmp_path / ".hidden") == [(".hidden", ".hidden")]  # it was asked for


def test_read_texts_names_the_file_at_fault(tmp_path):
    (tmp_path / "good.txt").write_text("good")
    (tmp_path / "latin.txt").write_bytes(b"na\xefve")
    with pytest.raises(ValueError, match=r"latin\.txt: not UTF-8 text: byte offset 2"):
        read_texts(tmp_path)
    (tmp_path / "latin.txt").write_bytes(b" \n")
    with pytest.raises(ValueError, match=r"latin\.txt: the file is empty"):
        read_texts(tmp_path)
    (tmp_path / "nothing").mkdir()
    for path in (tmp_path / "nothing", tmp_path / "missing"):
        with pytest.raises(FileNotFoundError, match=f"{path.name}: neither a file nor a directory with files"):
            read_texts(path)


def jsonl(tmp_path, *lines):
    path = tmp_path / "data.jsonl"
    encoded = (line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines)
    path.write_bytes(b"\n".join(encoded))
    return path


def test_read_jsonl_takes_both_kinds(tmp_path):
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
    assert read_jsonl(path, PLAINLY) == [
        Example("2 + 2 =", " 4"),
        Conversation((Marked(before + " Hello<eos>", ((len(before), len(before) + 11),)),)),
        Example("", "a\u2028b 😀"),
    ]


USER = {"role": "user", "content": "Hi"}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"prompt": "a", ', "expected a JSON object, found broken JSON"),
        (b"[" * 100_000, "expected a JSON object, found broken JSON"),
        (b'{"prompt": "a\xff"}', "'utf-8' codec can't decode byte 0xff in position 13"),
        (b'{"prompt": "a", "completion": "\\ud800"}', "expected text, found half of a surrogate pair"),
        (["a", "b"], r"expected {'prompt': str, 'completion': str}, found list"),
        (None, r"expected {'prompt': str, 'completion': str}, found NoneType"),
        ({"prompt": "a"}, r"expected {'prompt': str, 'completion': str}, found {'prompt': str}"),
        ({"prompt": "a", "completion": 4}, r"found {'prompt': str, 'completion': int}"),
        ({"prompt": "a", "completion": "b", "id": 1}, r"found {'prompt': str, 'completion': str, 'id': int}"),
        ({"prompt": "a", "completion": ""}, "expected a completion, found an empty one"),
        ({"messages": "Hi"}, r"expected {'messages': list}, found {'messages': str}"),
        ({"messages": [USER], "prompt": "a"}, r"expected {'messages': list}, found {'messages': list, 'pr"),
        ({"messages": ["Hi"]}, r"messages\[0\]: expected {'role': str, 'content': str}, found str"),
        ({"messages": [USER, {"role": "user"}]}, r"messages\[1\]: expected .*, found {'role': str}"),
        ({"messages": [USER | {"content": None}]}, r"messages\[0\]: .* found {.*'content': NoneType}"),
        ({"messages": [USER | {"role": "bot"}]}, r"messages\[0\]: expected a role of .*, found 'bot'"),
        ({"messages": [USER]}, "expected something said by the assistant, found nothing"),
        ({"messages": [{"role": "assistant", "content": ""}]}, "expected something said by the assistant"),
        ({"messages": [{"role": "assistant", "content": " \n"}]}, "expected something said by the assistant"),
        ({"messages": []}, "expected something said by the assistant, found nothing"),
    ],
)
def test_read_jsonl_names_the_line_at_fault(tmp_path, line, message):
    path = jsonl(tmp_path, {"prompt": "a", "completion": "b"}, b"", line)
    with pytest.raises(ValueError, match=rf"data\.jsonl:3: .*{message}"):
        read_jsonl(path, PLAINLY)


def test_read_jsonl_names_the_line_that_the_template_refuses(tmp_path):
    source = "{{ raise_exception('No\n systems!') if messages[0].role == 'system' }}{{ messages[1].content }}"
    template = ChatTemplate(source, {}, where="model/tokenizer_config.json")
    turns = [{"role": "system", "content": "a"}, USER, {"role": "assistant", "content": "b"}]
    path = jsonl(tmp_path, {"prompt": "a", "completion": "b"}, {"messages": turns})
    message = r"data\.jsonl:2: model/tokenizer_config\.json: the chat template refuses the messages: No systems!$"
    with pytest.raises(ValueError, match=message):
        read_jsonl(path, template)


def test_read_jsonl_of_nothing_is_an_error(tmp_path):
    with pytest.raises(ValueError, match=r"data\.jsonl: expected an example on each line, found none"):
        read_jsonl(jsonl(tmp_path, b"", b" "), PLAINLY)


# ---- tokenizers ------------------------------------------------------------------------------------------


def test_load_tokenizer_from_a_file_and_from_a_directory(tmp_path):
    BPE.save(str(tmp_path / "tokenizer.json"))
    for path in (tmp_path, tmp_path / "tokenizer.json", str(tmp_path)):
        assert load_tokenizer(path).to_str() == BPE.to_str()


def test_load_tokenizer_drops_truncation_and_padding(tmp_path):
    tokenizer = Tokenizer.from_str(BPE.to_str())
    tokenizer.enable_truncation(3)
    tokenizer.enable_padding(length=100)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert load_tokenizer(tmp_path).encode(SOURCE).ids == BPE.encode(SOURCE).ids


def test_load_tokenizer_names_the_file_at_fault(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"tokenizer\.json"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=r"tokenizer\.json: not a file of the tokenizers library"):
        load_tokenizer(tmp_path)


def test_bpe_starts_with_the_end_of_text_and_all_bytes():
    assert BPE.get_vocab_size() == 340
    assert BPE.token_to_id(END_OF_TEXT) == 0
    alphabet = {BPE.id_to_token(i) for i in range(1, 257)}
    assert alphabet == set(pre_tokenizers.ByteLevel.alphabet())
    with pytest.raises(ValueError, match=r"expected 257 .* or more, found 256"):
        train_bpe([Document("source", SOURCE)], 256)


def test_bpe_is_the_same_from_the_same_documents():
    shuffled = [f"{word} " * n for n, word in enumerate(SOURCE.split(), start=1)]
    documents = [Document("source", text) for text in shuffled]
    once = train_bpe(documents, 350).to_str()
    assert train_bpe(documents, 350).to_str() == once
    random.Random(0).shuffle(documents)  # only how often a piece occurs matters, not where
    assert train_bpe(documents, 350).to_str() == once


@given(st.text() | st.text("ab_1 \t\n\r.()\u00e9\u4e16😀"))
def test_bpe_writes_any_text_and_back(text):
    assert BPE.decode(BPE.encode(text).ids, skip_special_tokens=False) == text


def test_bpe_cuts_source_code_as_the_table_says():
    def pieces(text):
        return [piece for piece, _ in BPE.pre_tokenizer.pre_tokenize_str(text)]

    code = "def f(self, _x=12345):\n        return self.x\n\n\n\tif  a == 1:\n"
    expected = "def| f|(self|,| _|x|=|123|45|):\n|        |return| self|.x|\n\n\n|\t|if| | a| ==| |1|:\n"
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    assert pieces(code) == [byte_level.pre_tokenize_str(piece)[0][0] for piece in expected.split("|")]


def test_bpe_makes_one_token_of_an_indentation():
    for indentation in ("    ", "        "):
        first, *rest = BPE.encode(f"{indentation}return").ids
        assert BPE.decode([first]) == indentation
        assert rest == BPE.encode("return").ids


def test_bpe_tokenizes_a_line_alone_as_after_others():
    # So that a prompt which ends with a line is tokenized as in the text that a model was trained on.
    lines = [line for line in SOURCE.splitlines(keepends=True) if line.strip()]
    alone = [i for line in lines for i in BPE.encode(line).ids]
    assert BPE.encode("".join(lines)).ids == alone


@given(st.text())
def test_token_bytes_add_up_to_the_text(text):
    assert token_bytes(BPE)[BPE.encode(text).ids].sum() == len(text.encode())


def test_token_bytes_of_special_and_added_tokens():
    tokenizer = Tokenizer.from_str(BPE.to_str())
    tokenizer.add_tokens([AddedToken("größer")])
    lengths = token_bytes(tokenizer)
    assert lengths.shape == (341,)
    assert lengths[0] == 0
    assert lengths[340] == len("größer".encode())


def test_token_bytes_read_the_spelling_of_sentencepiece():
    vocabulary = {"<unk>": 0, "▁a": 1, "b": 2, "é": 3} | {f"<0x{i:02X}>": 4 + i for i in range(256)}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens(["<unk>"])
    lengths = token_bytes(tokenizer)
    assert list(lengths[:4]) == [0, 2, 1, 2]
    text = "bébb€\n😀"
    assert lengths[tokenizer.encode(text).ids].sum() == len(text.encode())


# ---- text in blocks --------------------------------------------------------------------------------------


def test_pack_joins_with_eos_and_cuts_into_blocks():
    documents = [Document("1", "a b c"), Document("2", "d"), Document("3", "e f g h")]
    dataset = pack(documents, LETTERS, 3, EOS)
    stream = [*ids("abc"), EOS, *ids("d"), EOS, *ids("efgh"), EOS]
    assert len(dataset) == 3
    np.testing.assert_array_equal(dataset.tokens, np.reshape(stream[:9], (3, 3)))
    np.testing.assert_array_equal(dataset.labels, np.reshape(stream[1:10], (3, 3)))
    assert dataset.tokens.dtype == dataset.labels.dtype == np.int32
    assert dataset.counted_tokens == 9


def test_pack_needs_one_token_more_than_a_block():
    assert len(pack([Document("1", "a b c")], LETTERS, 3, EOS)) == 1
    with pytest.raises(ValueError, match="the text has 4 tokens; a block of 4 needs 5"):
        pack([Document("1", "a b c")], LETTERS, 4, EOS)
    with pytest.raises(ValueError, match="the text has 0 tokens"):
        pack([], LETTERS, 4, EOS)


def test_counted_bytes_are_those_of_the_text():
    text = SOURCE + "größer 😀\n"
    n = len(BPE.encode(text).ids)
    dataset = pack([Document("1", text)], BPE, n, EOS)
    first = BPE.decode(BPE.encode(text).ids[:1])
    assert dataset.counted_bytes == len(text.encode()) - len(first)  # what nothing predicts does not count
    assert dataset.counted_tokens == n


# ---- examples --------------------------------------------------------------------------------------------


def sequence(dataset, i=0):
    return list(dataset.tokens[i]), list(dataset.labels[i])


def test_only_completion_and_eos_count():
    dataset = tokenize_examples([Example("a b c", "d e"), Example("f", "g")], LETTERS, 10, EOS)
    assert sequence(dataset, 0) == (ids("abcde"), [IGNORE, IGNORE, *ids("de"), EOS])
    assert sequence(dataset, 1) == (ids("fg"), [*ids("g"), EOS])
    assert dataset.tokens[0].dtype == dataset.labels[0].dtype == np.int32
    assert dataset.counted_tokens == 5
    assert dataset.truncated == 0


def test_without_a_prompt_nothing_predicts_the_first_token():
    dataset = tokenize_examples([Example("", "a b")], LETTERS, 10, EOS)
    assert sequence(dataset) == (ids("ab"), [*ids("b"), EOS])


def test_prompt_and_completion_are_tokenized_each_alone():
    prompt, completion = "return self.rad", "ius_of"
    (together,) = (BPE.encode(prompt + completion).ids,)
    alone = BPE.encode(prompt).ids + BPE.encode(completion).ids
    assert together != alone  # a border within a word
    dataset = tokenize_examples([Example(prompt, completion)], BPE, 100, EOS)
    assert list(dataset.tokens[0]) == alone
    assert dataset.counted_bytes == len(completion)


def test_special_tokens_come_before_the_prompt_only():
    tokenizer = Tokenizer.from_str(LETTERS.to_str())
    tokenizer.add_special_tokens(["<bos>"])
    bos = tokenizer.token_to_id("<bos>")
    tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", bos)])
    dataset = tokenize_examples([Example("a", "b"), Example("", "b")], tokenizer, 10, EOS)
    assert sequence(dataset, 0) == ([bos, *ids("ab")], [IGNORE, *ids("b"), EOS])
    assert sequence(dataset, 1) == ([bos, *ids("b")], [*ids("b"), EOS])


@pytest.mark.parametrize(
    ("max_length", "tokens", "labels"),
    [
        (6, "abcdef", [IGNORE, IGNORE, *ids("def"), EOS]),  # fits
        (5, "bcdef", [IGNORE, *ids("def"), EOS]),  # the prompt loses its beginning
        (4, "cdef", [*ids("def"), EOS]),
        (3, "def", [*ids("ef"), EOS]),
        (2, "de", ids("ef")),  # the completion loses its end
        (1, "d", ids("e")),
    ],
)
def test_what_is_too_long_is_cut(max_length, tokens, labels):
    examples = [Example("a b c", "d e f"), Example("a", "b")][: 2 if max_length > 1 else 1]
    dataset = tokenize_examples(examples, LETTERS, max_length, EOS)
    assert sequence(dataset) == (ids(tokens), labels)
    assert dataset.truncated == (max_length < 6)


def conversation(*turns, template=PLAINLY):
    return Conversation(template.examples([{"role": role, "content": content} for role, content in turns]))


def test_conversations_count_what_the_assistant_says():
    user, assistant, system = (LETTERS.token_to_id(f"{role}:") for role in ("user", "assistant", "system"))
    turns = (
        ("system", "a"),
        ("user", "b"),
        ("assistant", "c d"),
        ("user", "e"),
        ("assistant", "f"),
        ("user", "g"),  # what nobody answers
    )
    stream = [system, *ids("a"), user, *ids("b"), assistant, *ids("cd"), EOS, user, *ids("e"), assistant]
    stream += [*ids("f"), EOS]
    counts = [*ids("cd"), EOS, *ids("f")]
    dataset = tokenize_examples([conversation(*turns)], LETTERS, 100, EOS)
    tokens, labels = sequence(dataset)
    assert tokens == stream[:-1]
    assert [label for label in labels if label != IGNORE] == [*counts, EOS]
    assert all(label in (IGNORE, following) for label, following in zip(labels, stream[1:], strict=True))
    assert labels[stream.index(assistant)] == LETTER["c"]

    short = tokenize_examples([conversation(*turns)], LETTERS, 4, EOS)
    assert sequence(short) == (stream[-5:-1], [IGNORE, IGNORE, *ids("f"), EOS])
    assert short.truncated == 1
    shorter = tokenize_examples([conversation(*turns[:3])], LETTERS, 2, EOS)  # the answer loses its end
    assert sequence(shorter) == (ids("cd"), [*ids("d"), EOS])
    assert sequence(tokenize_examples([conversation(*turns[:3])], LETTERS, 1, EOS)) == (ids("c"), ids("d"))


def test_conversations_are_written_role_content_and_newline():
    turns = (("user", "Hi"), ("assistant", "Hello"), ("user", "Bye"), ("assistant", "Ciao"))
    template = ChatTemplate(PLAIN, {"eos_token": "<|endoftext|>"})
    dataset = tokenize_examples([conversation(*turns, template=template)], BPE, 1000, EOS)
    tokens = [*dataset.tokens[0], dataset.labels[0][-1]]
    text = "user: Hi\nassistant: Hello<|endoftext|>\nuser: Bye\nassistant: Ciao<|endoftext|>"
    assert BPE.decode(tokens, skip_special_tokens=False) == text
    counted = [label for label in dataset.labels[0] if label != IGNORE]
    assert BPE.decode(counted, skip_special_tokens=False) == " Hello<|endoftext|> Ciao<|endoftext|>"


def test_a_conversation_of_several_texts_is_as_many_sequences():
    texts = (Marked("a b c", ((4, 5),)), Marked("d e f g", ((2, 3), (6, 7))))
    dataset = tokenize_examples([Example("h", "i"), Conversation(texts)], LETTERS, 10, EOS)
    assert len(dataset) == 3
    assert sequence(dataset, 1) == (ids("ab"), [IGNORE, *ids("c")])
    assert sequence(dataset, 2) == (ids("def"), [*ids("e"), IGNORE, *ids("g")])


def test_no_example_is_an_error():
    with pytest.raises(ValueError, match="no example"):
        tokenize_examples([], LETTERS, 4, EOS)


# ---- batches ---------------------------------------------------------------------------------------------


def dataset_of(*lengths):
    tokens = [np.arange(1, n + 1, dtype=np.int32) for n in lengths]
    return Dataset(tokens, [t + 1 for t in tokens], np.arange(100))


def test_batch_pads_on_the_right_to_the_longest():
    tokens, labels = dataset_of(2, 3, 9).batch(np.array([1, 0]))
    np.testing.assert_array_equal(tokens, [[1, 2, 3], [1, 2, 0]])
    np.testing.assert_array_equal(labels, [[2, 3, 4], [2, 3, IGNORE]])
    assert tokens.dtype == labels.dtype == np.int64


def test_checksum_tells_datasets_apart():
    dataset = dataset_of(2, 3)
    assert dataset_of(2, 3).checksum == dataset.checksum == dataset.subset([0, 1]).checksum
    assert dataset.subset([1, 0]).checksum != dataset.checksum
    assert Dataset(dataset.tokens, dataset.tokens, dataset.token_bytes).checksum != dataset.checksum
    assert dataset_of(5).checksum != dataset.checksum


@given(n=st.integers(1, 20), batch_size=st.integers(1, 30), epochs=st.integers(1, 4), seed=st.integers(0, 2**32))
def test_every_epoch_has_each_sequence_once(n, batch_size, epochs, seed):
    steps = -(-n * epochs // batch_size)
    order = np.concatenate([data.batch_indices(n, batch_size, step, seed) for step in range(steps)])
    assert len(order) == steps * batch_size
    for epoch in range(epochs):
        assert sorted(order[epoch * n : (epoch + 1) * n]) == list(range(n))


def test_batch_indices_are_a_function_of_seed_and_step():
    batches = [list(data.batch_indices(50, 8, step, seed=3)) for step in range(20)]
    assert [list(data.batch_indices(50, 8, step, seed=3)) for step in reversed(range(20))] == batches[::-1]
    assert list(data.batch_indices(50, 8, 0, seed=4)) != batches[0]
    order = [i for batch in batches for i in batch]
    assert order[:50] != order[50:100]  # another epoch, another order
    # The order does not depend on how it is cut into batches.
    assert [i for step in range(32) for i in data.batch_indices(50, 5, step, seed=3)] == order


# ---- splits ----------------------------------------------------------------------------------------------


@given(n=st.integers(2, 200), fraction=st.floats(0.01, 0.5), seed=st.integers(0, 2**32))
def test_split_divides_and_keeps_the_order(n, fraction, seed):
    training, held_out = data.split(list(range(n)), fraction, seed)
    assert sorted(training + held_out) == list(range(n))
    assert training == sorted(training)
    assert held_out == sorted(held_out)
    assert len(held_out) == max(1, round(n * fraction))
    assert data.split(list(range(n)), fraction, seed) == (training, held_out)


def test_split_of_a_dataset_is_by_sequence():
    dataset = dataset_of(*range(1, 21))
    training, held_out = data.split(dataset, 0.1, seed=0)
    assert sorted(len(t) for t in [*training.tokens, *held_out.tokens]) == list(range(1, 21))
    assert len(held_out) == 2
    assert training.counted_bytes + held_out.counted_bytes == dataset.counted_bytes
    assert data.split(dataset, 0.1, seed=1)[1].checksum != held_out.checksum


def test_split_with_nothing_left_is_an_error():
    for items, fraction in (([1], 0.1), ([1, 2], 0.8), ([], 0.5)):
        with pytest.raises(ValueError, match="nothing left to train on"):
            data.split(items, fraction, seed=0)
    for fraction in (0, 1, -1, 2, float("nan")):
        with pytest.raises(ValueError, match="the held-out fraction must be between 0 and 1"):
            data.split([1, 2, 3], fraction, seed=0)


def test_pack_split_holds_out_whole_documents():
    documents = [Document(letter, f"{letter} " * 30) for letter in "abcdefghij"]
    training, held_out = pack_split(documents, LETTERS, 8, EOS, 0.2, seed=0)
    seen = [set(np.unique(side.tokens)) - {EOS} for side in (training, held_out)]
    assert (len(seen[0]), len(seen[1])) == (8, 2)
    assert not seen[0] & seen[1]


@pytest.mark.parametrize(
    "documents",
    [
        [Document("one", "a b c d e f g h i j " * 10)],  # too few documents
        [Document("long", "a b c d e f g h i j " * 10)] + [Document("short", "a b c")] * 9,  # too short ones
    ],
)
def test_pack_split_holds_out_blocks_otherwise(documents):
    whole = pack(documents, LETTERS, 9, EOS)
    training, held_out = pack_split(documents, LETTERS, 9, EOS, 0.2, seed=1)
    assert len(held_out) == round(0.2 * len(whole))
    blocks = sorted(map(tuple, [*training.tokens, *held_out.tokens]))
    assert blocks == sorted(map(tuple, whole.tokens))


def test_pack_split_of_too_little_is_an_error():
    with pytest.raises(ValueError, match="the text has 4 tokens"):
        pack_split([Document("1", "a b c")], LETTERS, 9, EOS, 0.5, seed=0)
    with pytest.raises(ValueError, match="nothing left to train on: 1 of 1"):
        pack_split([Document("1", "a b c")], LETTERS, 3, EOS, 0.5, seed=0)
    with pytest.raises(ValueError, match="fraction"):
        pack_split([Document("1", "a b c d e f g")], LETTERS, 3, EOS, 1.5, seed=0)
