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
Each line is a message to the model, which sees the conversation so far. A space before a / says it to the model.
  /adapter NAME   answer with this adapter from now on; /adapter off: with the base alone
  /adapters       list the adapters
  /reset          forget the conversation
  /help           this
  /quit           leave, as Ctrl-D does; Ctrl-C stops an answer"""


class Chat:
    """What was said so far, and a model to answer.

    `options` are those of `stream`; an answer ends at the model's end tokens, at what the template ends answers with,
    at the stop strings, at max_new_tokens and at the end of the context. `seed` is one more for each turn.
    """

    def __init__(self, model: Model, system: str | None, options: dict[str, Any]) -> None:
        """Raises ValueError for a model without a tokenizer, and for a chat template that cannot be read."""
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
        """Yield the answer to `text` in pieces. What was given of it when it ends, or is interrupted or closed, is what
        the assistant has said; if that is nothing, `text` was not said either."""
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
        """The messages and their tokens, without the oldest turns where they leave less than a quarter of the context
        for the answer (or less than max_new_tokens, if that is less). Raises ValueError if the last alone is too long.
        """
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
        """What the template ends an answer with, as a token if it begins with a special one, else as text."""
        end = self.template.end(asked)
        ids = encode(self.tokenizer, end, special_tokens=False).ids if end else []
        if not ids:
            return [], []
        return ([ids[0]], []) if ids[0] in self.tokenizer.get_added_tokens_decoder() else ([], [end])


def converse(chat: Chat) -> None:
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
    """Do what the command asks for; -> what to print. Raises ValueError for one that there is not."""
    model = chat.model
    if name == "help":
        return HELP
    if name == "reset":
        chat.reset()
        return "The conversation begins anew."
    if name == "adapters":
        names = [*model.adapters, "off"]
        return "\n".join(("* " if known == (model.active or "off") else "  ") + known for known in names)
    if name == "adapter" and argument:
        model.set_adapter(None if argument == "off" else argument)
        return f"Adapter: {argument}"
    raise ValueError(f"no command /{name}: /help lists them" if name != "adapter" else "/adapter NAME or /adapter off")
