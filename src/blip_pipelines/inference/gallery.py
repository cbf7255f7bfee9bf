"""The evaluation pictures behind the page: shown by key, found by a text.

Pictures are ranked by ITC over embeddings that are computed once, when they are first asked for; the best are ranked
again by ITM, as in the evaluation.
"""

import base64
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from blip_pipelines.data.pairs import Pairs

BATCH_IMAGES = 64
RERANKED = 12

Ask = Callable[[pd.DataFrame], pd.DataFrame]


class Gallery:
    """Pictures of a split, each once, with their captions.

    Args:
        ask: the retriever.
        sources: whose pictures are shown; of all where none is named.
        most: pictures; of more, so many drawn with a fixed seed.
    """

    def __init__(
        self,
        pairs: Path,
        images: Path,
        ask: Ask | None,
        split: str = "test",
        most: int = 1500,
        sources: Sequence[str] = (),
    ):
        self.rows, self.ask = Pairs.open(pairs, images).where(split=split, source=sources or None), ask
        chosen = self.rows.unique_images()
        if len(chosen) > most:
            chosen = np.sort(np.random.default_rng(0).choice(chosen, most, replace=False))
        self.row_of = {str(self.rows.keys[row]): int(row) for row in chosen}
        self.captions = dict(zip(self.row_of, self.rows.captions(chosen), strict=True))
        self._lock = threading.Lock()
        self._embeddings: np.ndarray | None = None

    def picture(self, key: str) -> bytes | None:
        """The encoded image; None where the key is not of this gallery."""
        return self.rows.image_bytes(self.row_of[key]) if key in self.row_of else None

    def page(self, start: int, count: int) -> list[dict[str, str]]:
        """Some pictures, shuffled in a fixed way, so that neighbours differ: key and caption."""
        keys = np.array(list(self.row_of))
        order = np.random.default_rng(1).permutation(len(keys))[start : start + count]
        return [{"key": str(key), "caption": self.captions[key]} for key in keys[order]]

    def search(self, text: str, count: int = RERANKED) -> list[dict[str, Any]]:
        """The pictures that match a text best: key, caption, similarity (ITC), probability (ITM)."""
        assert self.ask is not None
        keys, embeddings = list(self.row_of), self._embedded()
        word = np.array(self.ask(pd.DataFrame({"text": [text]}))["text_embedding"][0])
        similarity = embeddings @ word
        best = np.argsort(-similarity, kind="stable")[:count]
        images = [self._encoded(keys[at]) for at in best]
        judged = self.ask(pd.DataFrame({"image": images, "texts": [[text]] * len(images)}))["match_probabilities"]
        found = [
            {
                "key": keys[at],
                "caption": self.captions[keys[at]],
                "similarity": float(similarity[at]),
                "probability": float(probability[0]),
            }
            for at, probability in zip(best, judged, strict=True)
        ]
        return sorted(found, key=lambda each: -each["probability"])

    def _embedded(self) -> np.ndarray:
        """(pictures, E) float32 unit vectors."""
        assert self.ask is not None
        with self._lock:
            if self._embeddings is None:
                parts = [
                    np.stack(list(self.ask(pd.DataFrame({"image": images}))["image_embedding"]))
                    for images in self._batches(list(self.row_of))
                ]
                self._embeddings = np.concatenate(parts).astype(np.float32)
            return self._embeddings

    def _batches(self, keys: Sequence[str]) -> Iterator[list[str]]:
        for start in range(0, len(keys), BATCH_IMAGES):
            yield [self._encoded(key) for key in keys[start : start + BATCH_IMAGES]]

    def _encoded(self, key: str) -> str:
        return base64.b64encode(self.rows.image_bytes(self.row_of[key])).decode()
