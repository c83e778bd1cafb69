"""`refqlora generate --chat`: a conversation at the terminal."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import closing, suppress
from typing import Any

from tokenizers import Tokenizer

from ..model import Model
from ..text.chat import ChatTemplate
from ..text.generation import PrefixCache, stream

HELP = """\
Each line is said to the model, which has the whole conversation before it; a space says one that begins with /.
  /adapter NAME   answer with this adapter from now on; /adapter off: with the base alone
  /adapters       list the adapters
  /reset          forget the conversation
  /help           this
  /quit           leave, as Ctrl-D does; Ctrl-C stops an answer"""


class Conversation:
    """What was said so far, and a model to answer.

    `options` are those of `stream`; an answer ends at the model's end tokens, at what the template ends answers with,
    at the stop strings, at max_new_tokens and at the end of the context. `seed` is one more for each turn.
    """

    def __init__(
        self, model: Model, tokenizer: Tokenizer, template: ChatTemplate, system: str | None, options: dict[str, Any]
    ) -> None:
        self.model, self.tokenizer, self.template = model, tokenizer, template
        self.cache = PrefixCache(model)
        self.options = options
        self.first = [{"role": "system", "content": system}] if system is not None else []
        self.messages = list(self.first)
        self.turns = 0

    def reset(self) -> None:
        """Forget all but the system message."""
        self.messages = list(self.first)

    def say(self, text: str) -> Iterator[str]:
        """Yield the answer to `text` in pieces. What was given of it when it ends, or is interrupted or closed, is what
        the assistant has said; if that is nothing, `text` was not said either."""
        asked = [*self.messages, {"role": "user", "content": check_text(text)}]
        prompt = self.tokenizer.encode(self.template.render(asked, True), add_special_tokens=False).ids
        if len(prompt) >= (context := self.model.config.max_positions):
            raise ValueError(f"the conversation's {len(prompt)} tokens fill the model's context of {context}")
        ends, end_strings = self._ends(asked)
        options = {**self.options, "seed": self.options["seed"] + self.turns}
        self.turns += 1
        options["stop"] = (*options["stop"], *ends)
        options["stop_strings"] = (*options["stop_strings"], *end_strings)
        answer = ""
        try:
            for piece in stream(self.model, self.tokenizer, prompt, cache=self.cache, **options):
                piece = piece if answer else piece.lstrip()
                answer += piece
                yield piece
        finally:
            if answer:
                self.messages = [*asked, {"role": "assistant", "content": answer.rstrip()}]

    def _ends(self, asked: list[dict[str, str]]) -> tuple[list[int], list[str]]:
        """What the template ends an answer with, as a token if it begins with a special one, else as text."""
        end = self.template.end(asked)
        if not end:
            return [], []
        first = self.tokenizer.encode(end, add_special_tokens=False).ids[0]
        return ([first], []) if first in self.tokenizer.get_added_tokens_decoder() else ([], [end])


def check_text(text: str) -> str:
    """`text` itself; ValueError if it has Python's stand-ins for bytes that are no text."""
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise ValueError("the text is not UTF-8")
    return text


def converse(conversation: Conversation) -> None:
    """Read lines until they end, and print an answer to each; a line that begins with / is a command.

    At a terminal, an error is told and the conversation goes on, and Ctrl-C stops an answer. Otherwise both end it.
    """
    terminal = sys.stdin.isatty()
    if terminal:
        with suppress(ImportError):  # not on every system: it lets lines be edited and called back
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
                print(command(conversation, *line[1:].split(maxsplit=1)))
            elif line:
                with closing(conversation.say(line.strip())) as pieces:
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


def command(conversation: Conversation, name: str = "", argument: str = "") -> str:
    """Do what the command asks for; -> what to print. Raises ValueError for one that there is not."""
    model = conversation.model
    if name == "help":
        return HELP
    if name == "reset":
        conversation.reset()
        return "The conversation begins anew."
    if name == "adapters":
        names = [*model.adapters, "off"]
        return "\n".join(("* " if known == (model.active or "off") else "  ") + known for known in names)
    if name == "adapter" and argument:
        model.set_adapter(None if argument == "off" else argument)
        return f"Adapter: {argument}"
    raise ValueError(f"no command /{name}: /help lists them" if name != "adapter" else "/adapter NAME or /adapter off")
