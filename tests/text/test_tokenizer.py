"""Tokenizers: read, trained, measured in bytes; their errors are one line."""

import random

import pytest
import tiny
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers

from refqlora.text.examples import Document
from refqlora.text.tokenizer import (
    END_OF_TEXT,
    decode,
    encode,
    encode_batch,
    load_tokenizer,
    token_bytes,
    train_bpe,
)

SOURCE, BPE = tiny.SOURCE, tiny.code_tokenizer()


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
    with pytest.raises(ValueError, match=r"tokenizer\.json: the tokenizers library cannot read it"):
        load_tokenizer(tmp_path)


def test_bpe_starts_with_the_end_of_text_and_all_bytes():
    assert BPE.get_vocab_size() == 340
    assert BPE.token_to_id(END_OF_TEXT) == 0
    alphabet = {BPE.id_to_token(i) for i in range(1, 257)}
    assert alphabet == set(pre_tokenizers.ByteLevel.alphabet())
    with pytest.raises(ValueError, match=r"expected 257 .* or more, got 256"):
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


def test_token_bytes_of_no_token():
    assert token_bytes(Tokenizer(models.BPE())).shape == (0,)


def test_what_the_library_raises_is_one_line_that_names_the_file(tmp_path):
    """Text for which the vocabulary has no token, not even an unknown one: a bare Exception in Rust's words."""
    Tokenizer(models.WordLevel({"a": 0})).save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(tmp_path)
    for fail in (lambda: encode(tokenizer, "b" * 999), lambda: encode_batch(tokenizer, ["a", "b"])):
        with pytest.raises(
            ValueError, match=r"tokenizer\.json: the tokenizer fails on .*Missing \[UNK\] token"
        ) as error:
            fail()
        assert len(str(error.value)) < len(str(tmp_path)) + 200
    assert encode(tokenizer, "a").ids == [0]
    with pytest.raises(ValueError, match=r"tokenizer\.json: the tokenizer fails to decode tokens: "):
        decode(tokenizer, [-1])


class Panic(BaseException):
    """As pyo3_runtime.PanicException is: no Exception."""


@pytest.mark.parametrize(("raised", "expected"), [(Panic, ValueError), (KeyboardInterrupt, KeyboardInterrupt)])
def test_a_panic_is_an_error_and_an_interrupt_is_not(raised, expected):
    class Broken:
        def encode(self, text, add_special_tokens):
            raise raised("in Rust")

    with pytest.raises(expected, match="in Rust"):
        encode(Broken(), "a")


@pytest.mark.parametrize("text", ["\udcff", "a\ud800", "\udc00\ud800"])
def test_half_of_a_surrogate_pair_is_not_text(text):
    for give in (lambda: encode(BPE, text), lambda: encode_batch(BPE, ["a", text])):
        with pytest.raises(ValueError, match="expected UTF-8 text, got half of a surrogate pair"):
            give()
