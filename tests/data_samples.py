"""Small data sets for tests: pictures of one colour with a caption each, in real shards and tables."""

import io
from pathlib import Path

import numpy as np
import pyarrow as pa
from PIL import Image
from tokenizers import Tokenizer
from tokenizers.decoders import WordPiece as WordPieceDecoder
from tokenizers.models import WordPiece
from tokenizers.normalizers import BertNormalizer
from tokenizers.pre_tokenizers import BertPreTokenizer
from tokenizers.processors import TemplateProcessing

from blip_pipelines.data.pairs import Pairs, write_pairs
from blip_pipelines.data.records import PAIR_SCHEMA
from blip_pipelines.data.shards import ShardWriter, write_manifest

WORDS = ["red", "green", "blue", "small", "large", "crab", "house", "flag", "of", "the", "with", "a", "dog"]


def encode(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def picture(number: int, size: tuple[int, int] = (24, 20)) -> bytes:
    """A PNG of smooth noise that differs for every number."""
    pixels = np.random.Generator(np.random.Philox(number)).integers(0, 256, (5, 6, 3), dtype=np.uint8)
    return encode(Image.fromarray(pixels).resize(size))


def caption(number: int) -> str:
    words = np.random.Generator(np.random.Philox(1_000 + number)).choice(WORDS, 2 + number % 5)
    return " ".join(words)


def write_data_set(folder: Path, images_per_shard: list[int], captions_per_image: int = 1) -> tuple[Path, Path]:
    """Write (pairs, images) folders; the last quarter of each shard's images is of split val."""
    tables, number = [], 0
    with ShardWriter(folder / "images", shard_images=10_000) as writer:
        for count in images_per_shard:
            rows = []
            for place in range(count):
                stored = writer.add(picture(number))
                for text in range(captions_per_image):
                    rows.append(
                        {
                            **vars(stored),
                            "width": 24,
                            "height": 20,
                            "caption": caption(captions_per_image * number + text),
                            "origin": "human" if text % 2 == 0 else "web",
                            "source": "sample",
                            "split": "val" if place >= 0.75 * count else "train",
                            "subset": "combo" if place >= 0.75 * count else None,
                        }
                    )
                number += 1
            writer.next_shard()
            tables.append(pa.Table.from_pylist(rows, PAIR_SCHEMA))
    images_hash = write_manifest(folder / "images", writer.shards)
    write_pairs(folder / "pairs", tables, images_hash)
    return folder / "pairs", folder / "images"


def open_data_set(folder: Path, images_per_shard: list[int], captions_per_image: int = 1) -> Pairs:
    return Pairs.open(*write_data_set(folder, images_per_shard, captions_per_image))


def tokenizer_json(words: list[str] = WORDS) -> bytes:
    """A whole WordPiece tokenizer as BERT's: specials away from 0, unused tokens, letters, words and endings."""
    letters = list("abcdefghijklmnopqrstuvwxyz0123456789-',.!?/蟹")
    endings = ["ing", "ish", "er"]
    pieces = ["[PAD]", "[unused0]", "[unused1]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    pieces += [*letters, *(f"##{piece}" for piece in letters + endings), *words, "horse", "walk", "##horse"]
    vocabulary = {piece: number for number, piece in enumerate(dict.fromkeys(pieces))}
    tokenizer = Tokenizer(WordPiece(vocabulary, unk_token="[UNK]", max_input_chars_per_word=100))
    tokenizer.normalizer, tokenizer.pre_tokenizer = BertNormalizer(lowercase=True), BertPreTokenizer()
    tokenizer.decoder = WordPieceDecoder(prefix="##", cleanup=True)
    ends = [(token, vocabulary[token]) for token in ("[CLS]", "[SEP]")]
    tokenizer.post_processor = TemplateProcessing("[CLS] $A [SEP]", "[CLS] $A [SEP] $B:1 [SEP]:1", ends)
    tokenizer.add_special_tokens(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"])
    tokenizer.enable_truncation(8)
    return tokenizer.to_str().encode()
