"""Texts as a language model reads and writes them, with the model's own stock tokenizer.

The same face as `CaptionTokenizer`, so that one loader serves both: position 0 is a start token that is never asked
for, then the words, then the token that ends an answer. Captions are cleaned as in `tokens`; answers are left alone.
"""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from blip_pipelines.data.tokens import clean_caption, padded

IMAGE = "{image}"


class LanguageTokenizer:
    """Turns answers into ids and back, and prompts into what stands before and after the picture.

    Args:
        stock: the language model's tokenizer.
        end: text whose last token ends an answer (BLIP-2 ends OPT's with a line break); None: the model's own end.
        start: id at position 0, what a decoder starts from; None: the tokenizer's own start.
        clean: of every text before it is tokenised; None leaves it alone.

    Attributes:
        start, end, pad: ids.
    """

    def __init__(
        self,
        stock: PreTrainedTokenizerBase,
        end: str | None = None,
        start: int | None = None,
        clean: Callable[[str], str] | None = clean_caption,
    ):
        self.stock, self.clean = stock, clean
        last = self._ids(end)[-1] if end else stock.eos_token_id
        if last is None:
            raise ValueError("the tokenizer has no eos token; name the text that ends an answer")
        self.end: int = last
        self.pad: int = self.end if stock.pad_token_id is None else stock.pad_token_id
        starts = (start, stock.bos_token_id, self.end)
        self.start: int = next(number for number in starts if number is not None)

    def __len__(self) -> int:
        return len(self.stock)

    def __call__(self, texts: Sequence[str], max_tokens: int, prompt: str = "") -> tuple[np.ndarray, np.ndarray]:
        """Ids `start prompt words end`, right padded to the longest, as `CaptionTokenizer` gives them.

        Args:
            texts: B texts; each is cut to fit.
            max_tokens: bound on T, start and end included.
            prompt: put before every text as it is.

        Returns:
            ids (B, T) int64 and mask (B, T) bool, True where there is a token.
        """
        pieces = self.pieces([prompt + (self.clean(text) if self.clean else text) for text in texts])
        return padded([(self.start, *ids[: max_tokens - 2], self.end) for ids in pieces], self.pad, shortest=2)

    def pieces(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of texts as they are, neither cleaned nor cut, without special tokens."""
        return self.stock(list(texts), add_special_tokens=False)["input_ids"] if len(texts) else []

    def prompt_tokens(self, prompt: str) -> int:
        """How many tokens a prompt takes after position 0."""
        return len(self._ids(prompt)) if prompt else 0

    def around_image(self, prompt: str, chat: bool = False) -> tuple[str, str]:
        """What stands before and after the picture in a prompt that marks its place by `{image}`.

        Args:
            chat: the prompt is a user's turn, in the words of the tokenizer's chat template.

        Raises:
            ValueError: the place is not marked once, or there is no chat template.
        """
        if prompt.count(IMAGE) != 1:
            raise ValueError(f"prompt {prompt!r}: mark the picture's place by {IMAGE}, once")
        if chat:
            if not self.stock.chat_template:
                raise ValueError("the tokenizer has no chat template; set chat to false")
            turn: Any = [{"role": "user", "content": prompt}]
            prompt = str(self.stock.apply_chat_template(turn, tokenize=False, add_generation_prompt=True))
        before, after = prompt.split(IMAGE)
        return before, after

    def prompt_ids(self, text: str, special: bool = False) -> list[int]:
        """Ids of a part of a prompt; `special` lets the tokenizer add what it adds to a text (start, end)."""
        return self._ids(text, special)

    def decode(self, token_ids: Iterable[Sequence[int]]) -> list[str]:
        """Plain texts of generated ids, up to the first end; special tokens are left out."""
        texts = []
        for ids in token_ids:
            words = list(map(int, ids))
            texts.append(words[: words.index(self.end)] if self.end in words else words)
        return [text.strip() for text in self.stock.batch_decode(texts, skip_special_tokens=True)]

    def save(self, folder: Path) -> None:
        self.stock.save_pretrained(folder)

    @classmethod
    def load(cls, folder: Path, **settings: Any) -> "LanguageTokenizer":
        return cls(AutoTokenizer.from_pretrained(folder), **settings)

    def _ids(self, text: str, special: bool = False) -> list[int]:
        return self.stock(text, add_special_tokens=special)["input_ids"] if text or special else []
