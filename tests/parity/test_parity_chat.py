"""Chat templates held live against transformers' apply_chat_template: the text byte for byte, tokens and mask."""

import json

import pytest
import tiny
from chat_templates import CONVERSATIONS, TEMPLATES
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors

transformers = pytest.importorskip("transformers")

from refqlora.text.chat import load_chat_template
from refqlora.text.tokenizer import load_tokenizer

SPECIAL = [
    "<s>",
    "</s>",
    "<unk>",
    "<|im_start|>",
    "<|im_end|>",
    "<|eot_id|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
]
SPECIAL += ["<x>", "<start_of_turn>", "<end_of_turn>", "<|user|>", "<|assistant|>", "<|system|>", "<|end|>"]
TOKENS = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "</s>", "extra_token": "<x>"}


def byte_level():
    """The tiny tokenizer with special tokens, which puts <s> before a text that has none yet."""
    tokenizer = Tokenizer.from_str(tiny.tokenizer().to_str())
    tokenizer.add_special_tokens(SPECIAL)
    bos = tokenizer.token_to_id("<s>")
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", bos)])
    return tokenizer


def sentencepiece():
    """Characters and bytes, spaces as "▁", one put before a text: as Llama 2 and Mistral have it."""
    letters = sorted(set("▁abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ.,?!ë"))
    vocabulary = ["<unk>", "<s>", "</s>"] + [f"<0x{i:02X}>" for i in range(256)] + letters + ["▁H", "▁Hi", "▁T"]
    vocabulary = {token: i for i, token in enumerate(vocabulary)}
    merges = [("▁", "H"), ("▁H", "i"), ("▁", "T")]
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in SPECIAL])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return tokenizer


TOKENIZERS = {"byte level": byte_level, "sentencepiece": sentencepiece}


def save(path, tokenizer, template, **changes):
    config = {"tokenizer_class": "PreTrainedTokenizerFast", **TOKENS, "chat_template": template, **changes}
    tokenizer.save(str(path / "tokenizer.json"))
    (path / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")


def both(path):
    """Their tokenizer, and our template with our tokenizer."""
    ours = load_tokenizer(path)
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(path)
    return theirs, load_chat_template(path, ours, ours.token_to_id("</s>")), ours


def outcome(render):
    """What it gives, or that it fails and why."""
    try:
        return render()
    except Exception as error:
        return "refused", " ".join(str(error).split())


@pytest.mark.parametrize("generation_prompt", [False, True])
@pytest.mark.parametrize("name", TEMPLATES)
def test_rendered_byte_for_byte(name, generation_prompt, tmp_path):
    save(tmp_path, byte_level(), TEMPLATES[name])
    theirs, ours, _ = both(tmp_path)
    refused = 0
    for conversation in CONVERSATIONS.values():
        expected = outcome(
            lambda c=conversation: theirs.apply_chat_template(
                c, tokenize=False, add_generation_prompt=generation_prompt
            )
        )
        found = outcome(lambda c=conversation: ours.render(c, generation_prompt))
        if isinstance(expected, tuple):
            refused += 1
            assert found[0] == "refused"
            assert expected[1] in found[1]
            assert "tokenizer_config.json" in found[1]
        else:
            assert found == expected
            assert found
    expected = {"mistral": 2, "gemma": 4}.get(name, 0)
    assert refused == expected


@pytest.mark.parametrize("kind", TOKENIZERS)
@pytest.mark.parametrize("name", TEMPLATES)
def test_the_same_tokens(name, kind, tmp_path):
    """Of prompts: no token is added, though the tokenizer puts one before other texts."""
    save(tmp_path, TOKENIZERS[kind](), TEMPLATES[name])
    theirs, ours, tokenizer = both(tmp_path)
    assert tokenizer.encode("a").tokens[0] == "<s>"
    for conversation in CONVERSATIONS.values():
        text = outcome(lambda c=conversation: ours.render(c, True))
        if isinstance(text, str):
            expected = theirs.apply_chat_template(conversation, add_generation_prompt=True)["input_ids"]
            assert tokenizer.encode(text, add_special_tokens=False).ids == expected


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_the_same_mask_of_marked_answers(kind, tmp_path):
    save(tmp_path, TOKENIZERS[kind](), TEMPLATES["generation"])
    theirs, ours, tokenizer = both(tmp_path)
    counted = 0
    for name, conversation in CONVERSATIONS.items():
        if not any(m["role"] == "assistant" and m["content"] for m in conversation):
            continue
        whole = theirs.apply_chat_template(conversation, return_dict=True, return_assistant_tokens_mask=True)
        (marked,) = ours.examples(conversation)
        assert marked.text == theirs.apply_chat_template(conversation, tokenize=False)
        ids, counts = marked.tokenize(tokenizer)
        n = len(ids)
        assert ids == whole["input_ids"][:n], name
        assert counts == [bool(x) for x in whole["assistant_masks"][:n]], name
        assert not any(whole["assistant_masks"][n:])
        counted += sum(counts)
    assert counted > 100


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_prefixes_find_what_marks_say(kind, tmp_path):
    """Our reading of a template without marks, and their mask of the same one with marks."""
    marked = TEMPLATES["generation"]
    plain = marked.replace("{%- generation %}{{", "{{-").replace("{% endgeneration %}", "")
    for path, template in (("plain", plain), ("marked", marked)):
        (tmp_path / path).mkdir()
        save(tmp_path / path, TOKENIZERS[kind](), template)
    theirs, _, tokenizer = both(tmp_path / "marked")
    _, ours, _ = both(tmp_path / "plain")
    assert not ours.marks
    for name in ("one", "long", "system", "html", "injected", "thoughts", "empty system"):
        conversation = CONVERSATIONS[name]
        whole = theirs.apply_chat_template(conversation, return_dict=True, return_assistant_tokens_mask=True)
        (text,) = ours.examples(conversation)
        ids, counts = text.tokenize(tokenizer)
        assert ids == whole["input_ids"][: len(ids)]
        # "  Two\n" in "long": the space before the words is the assistant's for both
        assert counts == [bool(x) for x in whole["assistant_masks"][: len(ids)]], name
        assert sum(counts) == sum(whole["assistant_masks"]) > 0


def test_a_broken_character_counts_whole_here(tmp_path):
    """Every token of a last character that takes several; before 5.24 transformers marks only the first."""
    template = "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}"
    save(tmp_path, byte_level(), template)
    theirs, ours, tokenizer = both(tmp_path)
    conversation = [{"role": "assistant", "content": "a🐟"}]
    whole = theirs.apply_chat_template(conversation, return_dict=True, return_assistant_tokens_mask=True)
    (marked,) = ours.examples(conversation)
    ids, counts = marked.tokenize(tokenizer)
    assert ids == whole["input_ids"]
    assert counts == [True] * len(ids)
    assert whole["assistant_masks"] in ([1] * len(ids), [1, 1] + [0] * (len(ids) - 2))
    assert len(ids) > 2


# ---- where templates and tokens are found ------------------------------------------------------------------

TAGGED = (
    "{{ bos_token }}|{{ eos_token }}|{{ unk_token }}|{{ extra_token }}|{{ image_token }}|NAME|{{ messages[0].content }}"
)


def agree(path, expected):
    theirs, ours, _ = both(path)
    text = theirs.apply_chat_template(CONVERSATIONS["one"], tokenize=False)
    assert ours.render(CONVERSATIONS["one"]) == text
    assert expected in text


@pytest.mark.parametrize("as_list", [False, True])
@pytest.mark.parametrize("jinja", [None, "chat_template.jinja", "additional_chat_templates/default.jinja"])
def test_the_same_template_is_taken(jinja, as_list, tmp_path):
    named = [{"name": "rag", "template": "no"}, {"name": "default", "template": TAGGED.replace("NAME", "config")}]
    save(tmp_path, byte_level(), named if as_list else named[1]["template"])
    if jinja:
        (tmp_path / "additional_chat_templates").mkdir()
        (tmp_path / "additional_chat_templates" / "tool_use.jinja").write_text("no")
        (tmp_path / jinja).write_bytes(TAGGED.replace("NAME", "é\r\nfile\r\n").encode())
    agree(tmp_path, "é\nfile\n" if jinja else "config")


def test_several_without_a_default(tmp_path):
    save(tmp_path, byte_level(), [{"name": "rag", "template": "no"}, {"name": "tool_use", "template": "no"}])
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="multiple chat templates with no default"):
        theirs.apply_chat_template(CONVERSATIONS["one"], tokenize=False)
    with pytest.raises(ValueError, match="expected a chat template named default, got rag, tool_use"):
        both(tmp_path)


@pytest.mark.parametrize(
    ("changes", "map_file", "expected"),
    [
        ({}, None, "<s>|</s>|<unk>|<x>||"),
        ({"bos_token": None}, None, "|</s>|<unk>|<x>||"),
        ({"bos_token": {"__type": "AddedToken", "content": "<unk>", "special": True}}, None, "<unk>|</s>|"),
        ({"extra_special_tokens": {"image_token": "<|user|>"}}, None, "<x>|<|user|>|"),
        ({"bos_token": None}, {"bos_token": {"content": "<|end|>", "lstrip": False}}, "<|end|>|</s>|"),
        ({}, {"bos_token": "<|end|>"}, "<|end|>|</s>|"),
        ({"added_tokens_decoder": {}}, {"bos_token": "<|end|>"}, "<s>|</s>|"),
    ],
)
def test_the_same_special_tokens(changes, map_file, expected, tmp_path):
    save(tmp_path, byte_level(), TAGGED, **changes)
    if map_file:
        (tmp_path / "special_tokens_map.json").write_text(json.dumps(map_file))
    agree(tmp_path, expected)


def test_what_transformers_saves_is_read(tmp_path):
    save(tmp_path, byte_level(), TEMPLATES["llama3"])
    theirs, _, _ = both(tmp_path)
    theirs.save_pretrained(tmp_path / "saved")
    assert (tmp_path / "saved" / "chat_template.jinja").is_file()
    theirs, ours, _ = both(tmp_path / "saved")
    for conversation in CONVERSATIONS.values():
        assert ours.render(conversation) == theirs.apply_chat_template(conversation, tokenize=False)
