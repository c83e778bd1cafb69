"""Chat templates: messages into the text that a model was trained to see, and the parts that the assistant says.

A template is a Jinja program that comes with the tokenizer; it is rendered as transformers' apply_chat_template renders
it. A tokenizer without one gets the plain format, `PLAIN`, which is a template too.
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

Message = Mapping[str, Any]  # {"role": text, "content": text}, and other keys that the template reads


class ChatTemplate:
    """A chat template, ready to be rendered.

    source: the Jinja text. tokens: the special tokens' texts under the names that templates use, such as bos_token.
    eos: the text of the token that ends a text, put after answers if the template puts nothing. where: the template's
    file, for errors. Raises ValueError for a template that cannot be compiled, or that takes more time or memory than
    chat_jinja.py allows.
    """

    def __init__(self, source: str, tokens: Mapping[str, str], eos: str = "", where: str = "messages") -> None:
        from jinja2 import TemplateSyntaxError

        from .chat_jinja import Sandbox

        self.source, self.tokens, self.eos, self.where = source, dict(tokens), eos, where
        self.marks = re.search(r"{%[-+]?\s*generation\s*[-+]?%}", source) is not None
        self._sandbox = Sandbox()
        try:
            self._template = self._sandbox.compiled(source)
        except TemplateSyntaxError as error:
            raise ValueError(f"{where}: line {error.lineno} of the chat template: {error.message}"[:300]) from None
        except Exception as error:  # Jinja passes the template to Python's compiler, which may raise anything
            raise ValueError(f"{where}: the chat template cannot be compiled: {_in_one_line(error)}") from None

    def reads(self, key: str) -> bool:
        """Whether the template seems to read this key of messages: its name is in the source."""
        return re.search(rf"\b{re.escape(key)}\b", self.source) is not None

    def render(self, messages: Sequence[Message], add_generation_prompt: bool = False) -> str:
        """The text of `messages`, followed by the beginning of an answer if add_generation_prompt is true.

        Equal to transformers' apply_chat_template(tokenize=False). The text contains all its special tokens, so it is
        tokenized without adding any. Raises ValueError if the template refuses the messages.
        """
        return self._render(messages, add_generation_prompt, marking=False)

    def examples(self, messages: Sequence[Message]) -> tuple[Marked, ...]:
        """`messages` as texts to learn from, in which each answer of the assistant counts once.

        If the template has {% generation %} marks, there is one text, and the marked parts count. Otherwise an answer
        is found by rendering the messages before it, with the generation prompt, and the messages up to it: what the
        second text adds to the first is the answer, with the template's end of a message but without white space. If
        the template has no such end, `eos` ends the last answer. Some templates drop an answer's thoughts as soon as
        another message follows: then the answer gets a text of its own that ends with it, so that every answer is
        learnt as it is generated. Messages after the last answer are left out, and empty answers do not count.

        Raises ValueError if the assistant says nothing, if the template refuses the messages or leaves out a role that
        it does not know, and if it begins an answer differently from its generation prompt.
        """
        said = (m["role"] == "assistant" and (m["content"].strip() or m.get("tool_calls")) for m in messages)
        answers = [i for i, answer in enumerate(said) if answer]
        if not answers:
            roles = ", ".join(dict.fromkeys(m["role"] for m in messages))[:80] or "none"
            raise ValueError(f"expected a message of the assistant that is not empty, got none (roles: {roles})")
        self._check_roles(messages[: answers[-1] + 1])
        if self.marks:
            marked = _unmarked(self._render(messages[: answers[-1] + 1], marking=True))
            if not marked.spans:
                raise ValueError(f"{self.where}: the chat template's {{% generation %}} marks nothing in the messages")
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
        """Raise ValueError for a role, such as "tool", whose messages the template leaves out."""
        for i, message in enumerate(messages):
            if message["role"] not in USUAL:
                probed = [*messages[:i], {**message, "content": PROBE}, *messages[i + 1 :]]
                if PROBE not in self.render(probed):
                    raise ValueError(
                        f"messages[{i}]: {self.where}: the chat template leaves out the role {message['role'][:40]!r}"
                    )

    def end(self, messages: Sequence[Message]) -> str:
        """What the template writes after an answer to `messages`, such as "<|im_end|>"; "" if only white space."""
        return self._ending(messages)[0]

    def _ending(self, messages: Sequence[Message]) -> tuple[str, str]:
        """What ends every answer to `messages`, and all that the template writes after the last one.

        The first is what follows both a last answer and one before a question: some templates put the end of the whole
        text after the last answer.
        """
        talk = [*messages, {"role": "assistant", "content": PROBE}]
        last = self.render(talk).rpartition(PROBE)[2]
        other = self.render([*talk, {"role": "user", "content": "?"}]).rpartition(PROBE)[2]
        n = shared_prefix(last, other)
        for token in filter(None, self.tokens.values()):  # cut no token in two: "</s>" and "<|user|>" share a "<"
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
            text = self._template.render(variables)
        except Exception as error:  # a template is a program and may raise anything
            raise ValueError(f"{self.where}: the chat template refuses the messages: {_in_one_line(error)}") from None
        check_text(text)
        return text


def _difference(before: str, after: str) -> str:
    """Why the text with the answer, `after`, does not continue the text with the generation prompt, `before`."""
    if after == before:
        return "the chat template leaves this answer out"
    n = shared_prefix(before, after)
    return (
        f"the chat template begins this answer with {after[n : n + 20]!r}, but its generation prompt has "
        f"{before[n : n + 20]!r}: the answer cannot be told from the rest, unless the template marks it with "
        "{% generation %}"
    )


def _in_one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


def load_chat_template(directory: str | Path, tokenizer: Tokenizer, eos_id: int | None) -> ChatTemplate:
    """The chat template of the tokenizer in `directory`; the plain format if it has none.

    As in transformers, the template is in chat_template.jinja or additional_chat_templates/NAME.jinja, or else under
    "chat_template" in tokenizer_config.json: one template, or a list of named ones, of which "default" is used.
    Raises ValueError if several are named but none is "default", and for a file that cannot be read.
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
                f"{directory}: expected a chat template named default, got {', '.join(sorted(templates))[:200]}"
            )
        text, path = templates["default"]
        return ChatTemplate(text, _special_tokens(directory, config), eos if readable else "", str(path))
    if eos and not readable:
        raise ValueError(f"{directory}: the tokenizer reads {eos[:40]!r}, which ends a text, as several tokens")
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
    """The chat templates in tokenizer_config.json, by name."""
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
    """The special tokens that a template may use: bos_token, eos_token and so on."""
    given = dict(config)
    if "added_tokens_decoder" not in config and (directory / "special_tokens_map.json").is_file():
        given |= read_json(directory / "special_tokens_map.json")  # older versions stored them there
    extra = given.get("extra_special_tokens")
    extra = extra if isinstance(extra, dict) else {}
    tokens = {}
    for name, token in {**extra, **given}.items():
        text = token.get("content") if isinstance(token, dict) else token
        if (name.endswith("_token") or name in extra) and isinstance(text, str):
            tokens[name] = text
    return tokens


def _unmarked(rendered: str) -> Marked:
    """The text without the marks, and the spans that the marks enclosed."""
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
