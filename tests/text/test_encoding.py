"""Text into sequences: which tokens are read, which labels count, and how long texts are cut."""

import numpy as np
import pytest
import tiny
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from refqlora.functional import IGNORE
from refqlora.text.chat import PLAIN, ChatTemplate, Marked
from refqlora.text.encoding import pack, pack_split, tokenize_examples
from refqlora.text.examples import Conversation, Document, Example

EOS = 0
SOURCE, BPE = tiny.SOURCE, tiny.code_tokenizer()


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


# ---- text in blocks --------------------------------------------------------------------------------------


def test_pack_joins_with_eos_and_cuts_into_blocks():
    documents = [Document("1", "a b c"), Document("2", "d"), Document("3", "e f g h")]
    dataset = pack(documents, LETTERS, 3, EOS)
    stream = [*ids("abc"), EOS, *ids("d"), EOS, *ids("efgh"), EOS]
    assert len(dataset) == 3
    np.testing.assert_array_equal(dataset.tokens, np.reshape(stream[:9], (3, 3)))
    np.testing.assert_array_equal(dataset.labels, np.reshape(stream[1:10], (3, 3)))
    assert {row.dtype for row in (*dataset.tokens, *dataset.labels)} == {np.dtype(np.int32)}
    assert dataset.counted_tokens == 9


def test_pack_needs_one_token_more_than_a_block():
    assert len(pack([Document("1", "a b c")], LETTERS, 3, EOS)) == 1
    with pytest.raises(ValueError, match="expected 5 tokens for a block of 4, got 4"):
        pack([Document("1", "a b c")], LETTERS, 4, EOS)
    with pytest.raises(ValueError, match="the 0 texts: expected 5 tokens"):
        pack([], LETTERS, 4, EOS)


def test_counted_bytes_are_those_of_the_text():
    text = SOURCE + "größer 😀\n"
    n = len(BPE.encode(text).ids)
    dataset = pack([Document("1", text)], BPE, n, EOS)
    first = BPE.decode(BPE.encode(text).ids[:1])
    assert dataset.counted_bytes == len(text.encode()) - len(first)  # what nothing predicts does not count
    assert dataset.counted_tokens == n


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
    with pytest.raises(ValueError, match="1: expected 10 tokens for a block of 9, got 4"):
        pack_split([Document("1", "a b c")], LETTERS, 9, EOS, 0.5, seed=0)
    with pytest.raises(ValueError, match="takes 1 of 1 examples or blocks of text: nothing is left"):
        pack_split([Document("1", "a b c")], LETTERS, 3, EOS, 0.5, seed=0)
    with pytest.raises(ValueError, match="fraction"):
        pack_split([Document("1", "a b c d e f g")], LETTERS, 3, EOS, 1.5, seed=0)


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


def test_no_example_is_an_empty_dataset():
    assert len(tokenize_examples([], LETTERS, 4, EOS)) == 0


def test_a_sequence_of_one_token_is_refused():
    for build in (pack, tokenize_examples):
        with pytest.raises(ValueError, match="length of a sequence: expected 2 or more, got 1"):
            build([], LETTERS, 1, EOS)
