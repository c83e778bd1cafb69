"""Chat templates: messages into the text that a model was trained to see, and what of it the assistant says.

A template is a Jinja program that comes with the tokenizer, and is rendered as transformers' apply_chat_template
renders it. A tokenizer without one gets the plain format, `PLAIN`, a template like any other.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..files.reading import read_json
from .examples import Marked
from .prefix_cache import shared_prefix
from .tokenizer import check_text, encode

if TYPE_CHECKING:
    from tokenizers import Tokenizer

# "user: Hi" on a line, then "assistant: Hello" and the token that ends a text.
PLAIN = (
    "{{ beginning }}"
    "{% for message in messages %}"
    "{{ message.role }}: {{ message.content }}{% if message.role == 'assistant' %}{{ eos_token }}{% endif %}{{ '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)

PROBE = "4f1c9d"  # a text that nobody says
USUAL = ("system", "user", "assistant")  # the roles that every template knows

Message = Mapping[str, Any]  # {"role": text, "content": text}, and what else the template reads


class ChatTemplate:
    """A chat template, ready to be rendered.

    source: the Jinja text. tokens: the special tokens' texts under the names that templates use, such as bos_token.
    eos: the text of the token that ends a text, for answers that the template ends with nothing. where: the file that
    it is from, for errors. Raises ValueError for a template that cannot be compiled, and one that takes more time or
    memory than chat_jinja.py allows.
    """

    def __init__(self, source: str, tokens: Mapping[str, str], eos: str = "", where: str = "messages") -> None:
        from jinja2 import TemplateSyntaxError

        from .chat_jinja import Sandbox

        self.source, self.tokens, self.eos, self.where = source, dict(tokens), eos, where
        self.marks = re.search(r"{%[-+]?\s*generation\s*[-+]?%}", source) is not None
        self._sandbox = Sandbox()
        try:
            check_text("".join((source, *self.tokens.values())))
            self._template = self._sandbox.compiled(source)
        except TemplateSyntaxError as error:
            raise ValueError(f"{where}: line {error.lineno} of the chat template: {error.message}"[:300]) from None
        except Exception as error:  # of Python's compiler, to which Jinja hands the template
            raise ValueError(f"{where}: the chat template cannot be compiled: {_in_one_line(error)}") from None

    def reads(self, key: str) -> bool:
        """Whether the template names this key of messages, or seems to."""
        return re.search(rf"\b{re.escape(key)}\b", self.source) is not None

    def render(self, messages: Sequence[Message], add_generation_prompt: bool = False) -> str:
        """The text of `messages`, and with add_generation_prompt the beginning of an answer.

        Equal to transformers' apply_chat_template(tokenize=False). Special tokens are part of the text, a first one
        too, so it is tokenized without adding any. Raises ValueError with what the template objects to.
        """
        return self._render(messages, add_generation_prompt, marking=False)

    def examples(self, messages: Sequence[Message]) -> tuple[Marked, ...]:
        """`messages` as texts to learn from, in which each answer, what the assistant says, counts once.

        One text, if the template has {% generation %} marks, which then say what counts, or writes an answer the same
        whatever follows. Otherwise an answer is what the messages up to it have more than those before it with the
        generation prompt: its words, and what the template ends them with, white space aside. If that is nothing, the
        last answer ends with `eos`. Some templates write an answer otherwise once more has been said, leaving out its
        thoughts: such an answer gets a text of its own, which ends with it, so that every answer is learnt as it
        will be when it is generated. What follows the last answer is left out, and an empty answer does not count.

        Raises ValueError if the assistant says nothing, if the template refuses the messages or leaves out a role that
        it does not know, and if it writes an answer otherwise than its generation prompt begins one.
        """
        said = (m["role"] == "assistant" and (m["content"].strip() or m.get("tool_calls")) for m in messages)
        answers = [i for i, answer in enumerate(said) if answer]
        if not answers:
            roles = ", ".join(dict.fromkeys(m["role"] for m in messages))[:80] or "none"
            raise ValueError(f"expected something said by the assistant, got nothing (roles: {roles})")
        self._check_roles(messages[: answers[-1] + 1])
        if self.marks:
            marked = _unmarked(self._render(messages[: answers[-1] + 1], marking=True))
            if not marked.spans:
                raise ValueError(f"{self.where}: the template's {{% generation %}} marks nothing in these messages")
            return (marked,)
        texts: list[Marked] = []
        for i in reversed(answers):
            before, text = self.render(messages[:i], True), self.render(messages[: i + 1])
            end, rest = self._ending(messages[:i])
            text = text.removesuffix(rest).rstrip()
            if not text.startswith(before) or text == before:
                raise ValueError(f"messages[{i}]: {self.where}: {_difference(before, text)}")
            if texts and texts[-1].text.startswith(text):
                texts[-1] = Marked(texts[-1].text, ((len(before), len(text)), *texts[-1].spans))
            else:
                text += "" if end or text.endswith(self.eos) else self.eos
                texts.append(Marked(text, ((len(before), len(text)),)))
        return tuple(reversed(texts))

    def _check_roles(self, messages: Sequence[Message]) -> None:
        """Raise ValueError for a role such as "tool" whose messages the template leaves out."""
        for i, message in enumerate(messages):
            if message["role"] not in USUAL:
                probed = [*messages[:i], {**message, "content": PROBE}, *messages[i + 1 :]]
                if PROBE not in self.render(probed):
                    raise ValueError(
                        f"messages[{i}]: {self.where}: the chat template leaves out the role {message['role'][:40]!r}"
                    )

    def end(self, messages: Sequence[Message]) -> str:
        """What the template writes after an answer to `messages`, white space aside: "<|im_end|>", or nothing."""
        return self._ending(messages)[0]

    def _ending(self, messages: Sequence[Message]) -> tuple[str, str]:
        """What ends an answer to `messages`, and what the template writes after that if nothing follows.

        The end is what there is after the last answer and after one before a question: some templates end the last
        with the end of the whole text too.
        """
        talk = [*messages, {"role": "assistant", "content": PROBE}]
        last = self.render(talk).rpartition(PROBE)[2]
        other = self.render([*talk, {"role": "user", "content": "?"}]).rpartition(PROBE)[2]
        n = shared_prefix(last, other)
        for token in filter(None, self.tokens.values()):  # of which no part is shared: "<" of "</s>" and "<|user|>"
            n = min([k for k in range(max(0, n - len(token) + 1), n) if last.startswith(token, k)], default=n)
        return (last[:n].strip(), last[n:]) if last[:n].strip() else ("", "")

    def _render(self, messages: Sequence[Message], add_generation_prompt: bool = False, marking: bool = False) -> str:
        variables = {
            **self.tokens, "tools": None, "documents": None, "add_generation_prompt": add_generation_prompt,
            "messages": [dict(message) for message in messages],
        }  # fmt: skip
        self._sandbox.marking = marking
        self._sandbox.begin()
        try:
            return self._template.render(variables)
        except Exception as error:  # a template is a program, and can fail in any way
            raise ValueError(f"{self.where}: the chat template refuses the messages: {_in_one_line(error)}") from None


def _difference(before: str, after: str) -> str:
    """How an answer's text fails to go on from the text with the generation prompt."""
    if after == before:
        return "the chat template leaves this answer out"
    n = shared_prefix(before, after)
    return (
        f"the chat template begins this answer with {after[n : n + 20]!r} where its generation prompt has "
        f"{before[n : n + 20]!r}: what the assistant says cannot be told from the rest, unless the template marks it "
        "with {% generation %}"
    )


def _in_one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


def load_chat_template(directory: str | Path, tokenizer: Tokenizer, eos_id: int | None) -> ChatTemplate:
    """The chat template that comes with the tokenizer in `directory`, or else the plain format.

    It is looked for where transformers looks: chat_template.jinja and additional_chat_templates/NAME.jinja, or else
    "chat_template" in tokenizer_config.json, a template or a list of named ones; of several, default is meant.
    Raises ValueError if there is none of that name, or a file cannot be read.
    """
    directory = Path(directory)
    path = directory / "tokenizer_config.json"
    config = read_json(path) if path.is_file() else {}
    eos = (tokenizer.id_to_token(eos_id) or "") if isinstance(eos_id, int) and 0 <= eos_id < 2**32 else ""
    readable = eos and encode(tokenizer, eos, special_tokens=False).ids == [eos_id]
    templates = _template_files(directory) or {name: (text, path) for name, text in _named(config, path).items()}
    if templates:
        if "default" not in templates:
            raise ValueError(
                f"{directory}: no chat template is named default; there are: {', '.join(sorted(templates))[:200]}"
            )
        text, path = templates["default"]
        return ChatTemplate(text, _special_tokens(directory, config), eos if readable else "", str(path))
    if eos and not readable:
        raise ValueError(f"{directory}: the tokenizer does not read {eos[:40]!r}, the end of a text, as one token")
    sample = encode(tokenizer, "a")
    first = next(i for i, special in enumerate([*sample.special_tokens_mask, 0]) if not special)
    return ChatTemplate(PLAIN, {"beginning": "".join(sample.tokens[:first]), "eos_token": eos}, eos)


def _template_files(directory: Path) -> dict[str, tuple[str, Path]]:
    paths = {path.stem: path for path in sorted(directory.glob("additional_chat_templates/*.jinja"))}
    if (directory / "chat_template.jinja").is_file():
        paths["default"] = directory / "chat_template.jinja"
    templates = {}
    for name, path in paths.items():
        try:
            templates[name] = path.read_text(encoding="utf-8"), path
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}: not UTF-8 text: {error}") from None
    return templates


def _named(config: Mapping[str, Any], path: Path) -> dict[str, str]:
    """tokenizer_config.json's chat templates by their names."""
    given = config.get("chat_template") or []
    named = {"default": given} if isinstance(given, str) else given
    listed = [{"name": n, "template": t} for n, t in named.items()] if isinstance(named, dict) else named
    if not isinstance(listed, list) or not all(
        isinstance(t, dict) and isinstance(t.get("name"), str) and isinstance(t.get("template"), str) for t in listed
    ):
        raise ValueError(
            f'{path}: chat_template: expected text, or a list of objects with the texts "name" and "template", '
            f"got {json.dumps(given)[:80]}"
        )
    return {t["name"]: t["template"] for t in listed}


def _special_tokens(directory: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """The special tokens that a template may name: bos_token, eos_token and the like."""
    given = dict(config)
    if "added_tokens_decoder" not in config and (directory / "special_tokens_map.json").is_file():
        given |= read_json(directory / "special_tokens_map.json")  # as older writers left it
    extra = given.get("extra_special_tokens")
    extra = extra if isinstance(extra, dict) else {}
    tokens = {}
    for name, token in {**extra, **given}.items():
        text = token.get("content") if isinstance(token, dict) else token
        if (name.endswith("_token") or name in extra) and isinstance(text, str):
            tokens[name] = text
    return tokens


def _unmarked(rendered: str) -> Marked:
    """The text without the marks, and the spans that were between them."""
    from .chat_jinja import END, START

    text, spans, starts = "", [], []
    for part in re.split(f"({START}|{END})", rendered):
        if part == START:
            starts.append(len(text))
        elif part == END and starts:
            spans.append((starts.pop(), len(text)))
        else:
            text += part
    return Marked(text, tuple(sorted((start, end) for start, end in spans if start < end)))
