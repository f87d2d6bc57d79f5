"""A word-level tokenizer for the toy world, with spare tokens that a subject can be bound to."""

from __future__ import annotations

import re

import torch
from torch import Tensor

PAD, UNK, BOS, EOS = 0, 1, 2, 3  # the end token is not 2: that id has a historical meaning in CLIP configurations
SUBJECT = "[V]"  # the name that RPO gives to a subject
_TOKEN = re.compile(r"\[\w+\]|\w+")


class WordTokenizer:
    """Text -> token ids (L,). Ids 0–3 are padding, unknown, begin and end; then `[V]`, `[V2]` …; then the words."""

    def __init__(self, words: tuple[str, ...] | list[str], max_length: int = 24, spare: int = 4):
        names = [SUBJECT] + [f"[V{i}]" for i in range(2, spare + 1)]
        self.words, self.max_length, self.spare = tuple(words), max_length, spare
        self.index = {w: i for i, w in enumerate(["<pad>", "<unk>", "<bos>", "<eos>", *names, *words])}
        if len(self.index) != 4 + spare + len(words):
            raise ValueError("WordTokenizer: a word is listed twice")

    def __len__(self) -> int:
        return len(self.index)

    def encode(self, text: str) -> list[int]:
        """-> `max_length` ids; what does not fit is left out."""
        tokens = [t if t.startswith("[") else t.lower() for t in _TOKEN.findall(text)]
        ids = [self.index.get(t, UNK) for t in tokens][: self.max_length - 2]
        return [BOS, *ids, EOS] + [PAD] * (self.max_length - 2 - len(ids))

    def left_out(self, text: str) -> list[str]:
        """The words at the end of `text` for which there is no room."""
        return _TOKEN.findall(text)[self.max_length - 2 :]

    def unknown(self, text: str) -> list[str]:
        """The words of `text` that this tokenizer has never seen."""
        return [t for t in _TOKEN.findall(text) if (t if t.startswith("[") else t.lower()) not in self.index]

    def __call__(self, texts: list[str]) -> Tensor:
        """-> (B, max_length) int64."""
        return torch.tensor([self.encode(t) for t in texts])
