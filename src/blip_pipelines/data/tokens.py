"""Captions to token ids and back, with the stock WordPiece tokenizer plus BLIP's [DEC] and [ENC].

A small data set uses a few thousand of BERT's 30 522 pieces. Leaving out the others keeps every covered text exactly as
it was tokenised, and makes the vocabulary, which is most of a small model, fit the data. Cleaning as BLIP's
`pre_caption` (BLIP, data/utils.py).
"""

import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import cast

import numpy as np
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

DECODE, ENCODE = "[DEC]", "[ENC]"
_SPECIALS = {"pad": "[PAD]", "unk": "[UNK]", "cls": "[CLS]", "sep": "[SEP]", "mask": "[MASK]"}
_TO_SPACE = str.maketrans(dict.fromkeys('.!"()*#:;~', " "))
_SPACED_JOINER = re.compile(r"(?<=\w) ([-'’]) (?=\w)")


def clean_caption(caption: str, max_words: int | None = None) -> str:
    """The caption as the models see it: lower case, `. ! " ( ) * # : ; ~` as spaces, single spaces, cut by words."""
    return " ".join(caption.lower().translate(_TO_SPACE).split()[:max_words])


class CaptionTokenizer:
    """Turns captions into ids and back; a thin face of a stock fast tokenizer.

    Attributes:
        stock: the `PreTrainedTokenizerFast` that exports carry.
        cls, sep, pad, dec, enc: ids of the special tokens.
    """

    def __init__(self, stock: PreTrainedTokenizerFast):
        self.stock = stock
        self._fast = stock.backend_tokenizer
        tokens = [*(_SPECIALS[name] for name in ("cls", "sep", "pad")), DECODE, ENCODE]
        ids = [self._fast.token_to_id(token) for token in tokens]
        if None in ids:
            raise ValueError(f"the tokenizer lacks {tokens[ids.index(None)]}; make it with prune_vocabulary")
        self.cls, self.sep, self.pad, self.dec, self.enc = cast(list[int], ids)

    def __len__(self) -> int:
        return len(self.stock)

    def __call__(self, captions: Sequence[str], max_tokens: int, prompt: str = "") -> tuple[np.ndarray, np.ndarray]:
        """Token ids [CLS] prompt words [SEP] of cleaned captions, right padded to the longest of them.

        Args:
            captions: B texts; each is cut to fit.
            max_tokens: bound on T, special tokens included.
            prompt: put before every cleaned caption as it is.

        Returns:
            ids (B, T) int64 and mask (B, T) bool, True where there is a token.
        """
        pieces = self.pieces([prompt + clean_caption(caption, max_tokens) for caption in captions])
        return padded([(self.cls, *ids[: max_tokens - 2], self.sep) for ids in pieces], self.pad, shortest=2)

    def pieces(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of texts as they are, neither cleaned nor cut, without special tokens."""
        return [encoding.ids for encoding in self._fast.encode_batch_fast(list(texts), add_special_tokens=False)]

    def prompt_tokens(self, prompt: str) -> int:
        """How many tokens a prompt takes after position 0."""
        return len(self._fast.encode(prompt, add_special_tokens=False).ids) if prompt else 0

    def decode(self, token_ids: Iterable[Sequence[int]]) -> list[str]:
        """Plain texts of generated ids, up to the first [SEP]; special tokens are left out.

        Hyphens and apostrophes between words, which BERT splits off, are joined again ("medium-light").
        """
        texts = []
        for ids in token_ids:
            words = list(map(int, ids))
            texts.append(words[: words.index(self.sep)] if self.sep in words else words)
        return [_SPACED_JOINER.sub(r"\1", text) for text in self._fast.decode_batch(texts, skip_special_tokens=True)]

    def save(self, folder: Path) -> None:
        """Write the files from which `AutoTokenizer` and `load` read the tokenizer."""
        self.stock.save_pretrained(folder)

    @classmethod
    def load(cls, folder: Path) -> "CaptionTokenizer":
        return cls(PreTrainedTokenizerFast.from_pretrained(folder))


def padded(rows: Sequence[Sequence[int]], pad: int, shortest: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Rows of ids, right padded to the longest: ids (B, T) int64 and mask (B, T) bool, True where there is a token."""
    lengths = np.array([len(row) for row in rows], np.int64)
    ids = np.full((len(rows), lengths.max(initial=shortest)), pad, np.int64)
    mask = np.arange(ids.shape[1]) < lengths[:, None]
    ids[mask] = [token for row in rows for token in row]
    return ids, mask


def prune_vocabulary(
    tokenizer_json: Path | bytes, texts: Iterable[str] | None = None
) -> tuple[CaptionTokenizer, np.ndarray]:
    """A BERT tokenizer cut down to what some texts need, with [DEC] and [ENC] added at the end.

    Kept are the special tokens, the letters of ASCII and of the texts (so that any word of known letters still has
    pieces) and the pieces that occur in the texts. Greedy longest match then splits those texts exactly as the whole
    vocabulary does.

    Args:
        tokenizer_json: file or content of a WordPiece `tokenizer.json`.
        texts: raw captions; None keeps the whole vocabulary.

    Returns:
        the tokenizer (bos [DEC], eos and sep [SEP], pad [PAD]), and (len(tokenizer),) int64: the id of each token in
        the source, -1 for the new ones.
    """
    content = json.loads(tokenizer_json if isinstance(tokenizer_json, bytes) else tokenizer_json.read_bytes())
    content["truncation"] = content["padding"] = None
    source: dict[str, int] = content["model"]["vocab"]
    kept = set(source.values())
    if texts is not None:
        cleaned = [clean_caption(text) for text in set(texts)]
        letters = set(map(chr, range(128))).union(*cleaned)
        kept = {number for piece, number in source.items() if piece.removeprefix("##") in letters}
        kept |= {source[token] for token in _SPECIALS.values()}
        whole = Tokenizer.from_str(json.dumps(content))
        for encoding in whole.encode_batch_fast(cleaned, add_special_tokens=False):
            kept.update(encoding.ids)
    old_ids = sorted(kept)
    new_ids = {old: new for new, old in enumerate(old_ids)}
    content["model"]["vocab"] = {piece: new_ids[old] for piece, old in source.items() if old in new_ids}
    for added in content["added_tokens"]:
        added["id"] = new_ids[added["id"]]
    for special in content["post_processor"]["special_tokens"].values():
        special["ids"] = [new_ids[old] for old in special["ids"]]
    for token in (DECODE, ENCODE):
        number = content["model"]["vocab"][token] = len(content["model"]["vocab"])
        content["added_tokens"].append({**content["added_tokens"][0], "id": number, "content": token})
    stock = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(content)),
        bos_token=DECODE,
        eos_token=_SPECIALS["sep"],
        extra_special_tokens=[ENCODE],
        model_input_names=["input_ids", "attention_mask"],
        model_max_length=512,
        **{f"{name}_token": token for name, token in _SPECIALS.items()},
    )
    return CaptionTokenizer(stock), np.array([*old_ids, -1, -1], np.int64)
