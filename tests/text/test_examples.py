"""Which tokens of a text count: those that overlap a part to be learnt, and no others."""

import pytest
import tiny
from chat_templates import GENERATION, messages
from tokenizers import Tokenizer, decoders, models, normalizers, processors

from refqlora.text.chat import ChatTemplate
from refqlora.text.examples import Marked

TALK = messages("Hi", "Hello there", "How many\n\nsacks?", " Two.\n", system="Be kind.")


def special(*tokens):
    tokenizer = Tokenizer.from_str(tiny.tokenizer().to_str())
    tokenizer.add_special_tokens(list(tokens))
    return tokenizer


def test_special_tokens_in_the_text_are_read_and_none_is_added():
    tokenizer = special("<s>", "<|im_start|>", "<|im_end|>")
    bos = tokenizer.token_to_id("<s>")
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", bos)])
    (text,) = ChatTemplate(GENERATION, {"bos_token": "<s>"}).examples(TALK[1:])
    ids, counts = text.tokenize(tokenizer)
    assert ids.count(bos) == 1
    assert ids[0] == bos
    assert [tokenizer.id_to_token(i) for i in ids].count("<|im_end|>") == 4
    assert ids[-1] == tokenizer.token_to_id("<|im_end|>")
    assert counts[-1]
    said = [i for i, count in zip(ids, counts, strict=True) if count]
    assert tokenizer.decode(said, skip_special_tokens=False) == "Hello there<|im_end|> Two.\n<|im_end|>"


@pytest.mark.parametrize("said", ["🐟", "Zoë", " 日本", "a🐟b", "\n"])
def test_all_bytes_of_a_character_count(said):
    tokenizer = tiny.tokenizer()
    text = f"The 🐟 {said}→ mill"
    start = text.index(said, 6)
    ids, counts = Marked(text, ((start, start + len(said)),)).tokenize(tokenizer)
    counted = [i for i, count in zip(ids, counts, strict=True) if count]
    assert said in tokenizer.decode(counted)
    assert len(tokenizer.decode(counted)) <= len(said) + 1  # a token may have a space of the neighbour's
    assert counts[-1]
    assert not counts[0]


def test_what_the_tokenizer_drops():
    tokenizer = Tokenizer(models.WordLevel({"a": 0, "b": 1}))
    tokenizer.normalizer = normalizers.Replace("x", "")
    assert Marked("a", ((0, 1),)).tokenize(tokenizer) == ([0], [True])
    with pytest.raises(ValueError, match="the tokenizer has no token for what the assistant says: 'x'"):
        Marked("x", ((0, 1),)).tokenize(tokenizer)


def test_sentencepiece_spaces_are_counted_with_their_word():
    vocabulary = {token: i for i, token in enumerate(["<unk>", "</s>", "▁Hi", "▁Hello", ":", "▁"])}
    tokenizer = Tokenizer(
        models.BPE({**vocabulary, **{c: 6 + i for i, c in enumerate("▁Hielo")}}, [], unk_token="<unk>")
    )
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Replace("▁", " ")
    tokenizer.add_special_tokens(["</s>"])
    (text,) = ChatTemplate(
        "{% for m in messages %}{{ m.content }}:{% if m.role == 'assistant' %}</s>{% endif %}{% endfor %}", {}
    ).examples(messages("Hi", "Hello"))
    ids, counts = text.tokenize(tokenizer)
    assert [tokenizer.id_to_token(i) for i, count in zip(ids, counts, strict=True) if count] == [*"Hello", ":", "</s>"]
