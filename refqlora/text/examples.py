"""What a model learns from: documents, examples of prompt and completion, conversations; and which tokens count."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from .tokenizer import encode

if TYPE_CHECKING:
    from tokenizers import Tokenizer


class Document(NamedTuple):
    """A text and its name: a file's path, a module."""

    name: str
    text: str


class Example(NamedTuple):
    """A prompt and the text that is to follow it; only the completion counts in the loss."""

    prompt: str
    completion: str

    def tokenize(self, tokenizer: Tokenizer, eos_id: int) -> tuple[list[int], list[bool]]:
        """The tokens of prompt, completion and `eos_id`, and which of them count: those of the last two.

        Prompt and completion are tokenized separately, so that the model meets the prompt as it will when it
        generates; special tokens that the tokenizer puts before a text come before the prompt only.
        """
        prompt = encode(tokenizer, self.prompt).ids
        completion = [*encode(tokenizer, self.completion, special_tokens=not prompt).ids, eos_id]
        return prompt + completion, [False] * len(prompt) + [True] * len(completion)


class Marked(NamedTuple):
    """A text, and the parts of it that count in the loss: (start, end) in characters, in their order."""

    text: str
    spans: tuple[tuple[int, int], ...]

    def tokenize(self, tokenizer: Tokenizer) -> tuple[list[int], list[bool]]:
        """The text's tokens up to the last that counts, and which of them do: those with a character that does.

        Special tokens are read where they stand in the text, and none is added. Raises ValueError if none counts.
        """
        encoding = encode(tokenizer, self.text, special_tokens=False)
        begins, ends = np.array(encoding.offsets).reshape(-1, 2).T  # in characters; a part of a character has it all
        counts = np.zeros(len(begins), bool)
        for start, end in self.spans:
            at = np.flatnonzero((begins < end) & (ends > start))
            counts[at.min(initial=len(counts)) : at.max(initial=-1) + 1] = True
        if not counts.any():
            said = " ".join(self.text[start:end] for start, end in self.spans)
            raise ValueError(f"the tokenizer has no token for what the assistant says: {said[:60]!r}")
        length = counts.nonzero()[0][-1] + 1
        return encoding.ids[:length], counts[:length].tolist()


class Conversation(NamedTuple):
    """Messages as a chat template writes them, most often in one text; the marked parts count in the loss."""

    texts: tuple[Marked, ...]
