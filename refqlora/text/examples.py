"""What a model learns from (documents, prompts with completions, conversations), and which tokens count."""

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
    """A prompt and its completion; only the completion counts in the loss."""

    prompt: str
    completion: str

    def tokenize(self, tokenizer: Tokenizer, eos_id: int) -> tuple[list[int], list[bool]]:
        """The tokens of prompt, completion and `eos_id`, and which of them count: all but the prompt's.

        Prompt and completion are tokenized separately, so that the prompt's tokens are the same as in generation;
        special tokens that the tokenizer puts before a text come before the prompt only.
        """
        prompt = encode(tokenizer, self.prompt).ids
        completion = [*encode(tokenizer, self.completion, special_tokens=not prompt).ids, eos_id]
        return prompt + completion, [False] * len(prompt) + [True] * len(completion)


class Marked(NamedTuple):
    """A text, and the spans of it that count in the loss: (start, end) in characters, in order."""

    text: str
    spans: tuple[tuple[int, int], ...]

    def tokenize(self, tokenizer: Tokenizer) -> tuple[list[int], list[bool]]:
        """The text's tokens up to the last one that counts, and which of them count: those that overlap a span.

        Special tokens in the text are read as such, and none are added. Raises ValueError if no token counts.
        """
        encoding = encode(tokenizer, self.text, special_tokens=False)
        begins, ends = np.array(encoding.offsets).reshape(-1, 2).T  # in characters, even for a part of one
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
    """Messages as a chat template writes them: mostly one text. The marked parts count in the loss."""

    texts: tuple[Marked, ...]
