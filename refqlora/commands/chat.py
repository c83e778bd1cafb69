"""`refqlora generate --chat`: a conversation at the terminal."""

from __future__ import annotations

import sys
from collections.abc import Generator
from contextlib import closing, suppress
from typing import Any

from ..model import Model
from ..text.chat import Message, load_chat_template
from ..text.generation import stream
from ..text.prefix_cache import PrefixCache
from ..text.tokenizer import encode

HELP = """\
Each line is a message to the model, which sees the whole conversation. Put a space before a message that begins with /.
  /adapter NAME   answer with this adapter from now on; /adapter off: with the base alone
  /adapters       list the adapters
  /reset          forget the conversation
  /help           show this list
  /quit           leave, like Ctrl-D; Ctrl-C stops an answer"""


class Chat:
    """A model, and the conversation so far.

    options: those of `stream`. An answer ends at the model's end tokens, the template's end of an answer, the stop
    strings, max_new_tokens or the end of the context. Each turn adds one to `seed`.
    """

    def __init__(self, model: Model, system: str | None, options: dict[str, Any]) -> None:
        """Raises ValueError for a model without a tokenizer and for a chat template that cannot be read."""
        assert model.directory is not None
        self.model, self.tokenizer, self.cache = model, model.tokenizer, PrefixCache(model)
        ends = model.config.ends
        self.template = load_chat_template(model.directory, self.tokenizer, ends[0] if ends else None)
        self.options = options
        self.first: list[Message] = [{"role": "system", "content": system}] if system is not None else []
        self.messages = list(self.first)
        self.turns = 0

    def reset(self) -> None:
        """Forget all but the system message."""
        self.messages = list(self.first)

    def say(self, text: str) -> Generator[str]:
        """Yield the answer to `text` in pieces. When it ends, is interrupted or closed, the pieces so far become the
        assistant's message; if there are none, `text` is dropped too."""
        asked, prompt = self._fitting([*self.messages, {"role": "user", "content": text}])
        ends, end_strings = self._ends(asked)
        options = {**self.options, "seed": self.options["seed"] + self.turns, "cache": self.cache}
        self.turns += 1
        options["stop"] = (*options["stop"], *ends)
        options["stop_strings"] = (*options["stop_strings"], *end_strings)
        answer = ""
        try:
            for piece in stream(self.model, prompt, tokenizer=self.tokenizer, **options):
                piece = piece if answer else piece.lstrip()
                answer += piece
                yield piece
        finally:
            if answer:
                self.messages = [*asked, {"role": "assistant", "content": answer.rstrip()}]

    def _fitting(self, asked: list[Message]) -> tuple[list[Message], list[int]]:
        """The messages and their tokens, without the oldest turns if they leave less than a quarter of the context (or
        less than max_new_tokens) for the answer. Raises ValueError if the last message alone is too long."""
        context, first, forgotten = self.model.config.max_positions, len(self.first), 0
        room = min(self.options.get("max_new_tokens", context), context // 4)
        while True:
            prompt = encode(self.tokenizer, self.template.render(asked, True), special_tokens=False).ids
            if len(prompt) + room <= context or len(asked) == first + 1:
                break
            asked = asked[:first] + asked[first + 2 :]  # a question and its answer
            forgotten += 1
        if len(prompt) >= context:
            raise ValueError(f"the message's {len(prompt)} tokens fill the model's context of {context}")
        if forgotten:
            turns = "turn is" if forgotten == 1 else f"{forgotten} turns are"
            print(f"(the context is full: the oldest {turns} forgotten)", file=sys.stderr)
        return asked, prompt

    def _ends(self, asked: list[Message]) -> tuple[list[int], list[str]]:
        """The template's end of an answer, as a token if it begins with a special one, else as text."""
        end = self.template.end(asked)
        ids = encode(self.tokenizer, end, special_tokens=False).ids if end else []
        if not ids:
            return [], []
        return ([ids[0]], []) if ids[0] in self.tokenizer.get_added_tokens_decoder() else ([], [end])


def converse(chat: Chat) -> None:
    """Read lines until the input ends, and print an answer to each; a line that begins with / is a command.

    At a terminal, the conversation continues after an error, which is printed, and after Ctrl-C, which stops an answer.
    In a pipe, both end it.
    """
    terminal = sys.stdin.isatty()
    if terminal:
        with suppress(ImportError):  # not on every system; with it, lines can be edited and recalled
            import readline  # noqa: F401
        print("/help lists the commands, Ctrl-D leaves.")
    while True:
        try:
            line = input("> " if terminal else "").rstrip()
        except EOFError:
            if terminal:
                print()
            return
        except KeyboardInterrupt:
            if not terminal:
                raise
            print()
            continue
        if line == "/quit":
            return
        try:
            if line.startswith("/"):
                print(command(chat, *line[1:].split(maxsplit=1)))
            elif line:
                with closing(chat.say(line.strip())) as pieces:
                    for piece in pieces:
                        print(piece, end="", flush=True)
                print()
        except KeyboardInterrupt:
            if not terminal:
                raise
            print()
        except ValueError as error:
            if not terminal:
                raise
            print(error)


def command(chat: Chat, name: str = "", argument: str = "") -> str:
    """Run a command of the conversation; -> what to print. Raises ValueError for an unknown one."""
    model = chat.model
    if name == "help":
        return HELP
    if name == "reset":
        chat.reset()
        return "The conversation is forgotten."
    if name == "adapters":
        names = [*model.adapters, "off"]
        return "\n".join(("* " if known == (model.active or "off") else "  ") + known for known in names)
    if name == "adapter" and argument:
        model.set_adapter(None if argument == "off" else argument)
        return f"Adapter: {argument}"
    if name == "adapter":
        raise ValueError("expected /adapter NAME or /adapter off")
    raise ValueError(f"unknown command /{name}: /help lists them")
