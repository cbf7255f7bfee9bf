"""Recall at k from scores, both ways, and the re-ranking of the best ITC candidates by ITM (BLIP, section 5.1).

Differs: BLIP adds the match logit to the cosine itself, so that ITC hardly counts among the candidates. Here the
log-odds of ITM and of ITC, the similarity over the temperature, are added as equals: of a small model ITC is often the
better judge.

A gallery holds each distinct image once and every caption row. A hit is any pair whose caption stands, somewhere in
the gallery, with that image: the image's own captions and every equal text. Ties are read against the model: a
wrong candidate with the same score ranks before the hit, so a model that gives one score to all has recall 0.

Shapes: I distinct images, R caption rows, U distinct texts, Q queries, C candidates, K re-ranked candidates, P pairs.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

CUTOFFS = (1, 5, 10)
CHUNK_ELEMENTS = 32_000_000  # scores handled at once: bounds memory, not the result

Match = Callable[[np.ndarray, np.ndarray], Tensor]


@dataclass(frozen=True)
class Gallery:
    """Which of I images and R caption rows belong together."""

    images: np.ndarray  # (I,) row where each distinct image occurs first
    image_of_row: np.ndarray  # (R,) index of the row's image among the I
    text_of_row: np.ndarray  # (R,) index of the row's text among the U
    owned: Tensor  # (I, U) bool: this text stands with this image

    @classmethod
    def of(cls, image_ids: np.ndarray, text_ids: np.ndarray) -> "Gallery":
        """The gallery of R rows, each an image id and a text id; images in the order of their first row."""
        if image_ids.shape != text_ids.shape or not image_ids.size:
            raise ValueError(f"a gallery needs rows: found {image_ids.size} image ids and {text_ids.size} text ids")
        _, first, image_of_row = np.unique(image_ids, return_index=True, return_inverse=True)
        order = np.argsort(first)
        image_of_row = np.argsort(order)[image_of_row]
        texts, text_of_row = np.unique(text_ids, return_inverse=True)
        owned_IU = torch.zeros(len(first), len(texts), dtype=torch.bool)
        owned_IU[torch.from_numpy(image_of_row), torch.from_numpy(text_of_row)] = True
        return cls(first[order], image_of_row, text_of_row, owned_IU)

    def text_hits(self, queries: slice) -> Tensor:
        """Bool (images of the slice, R): image to text."""
        return self.owned[queries][:, torch.from_numpy(self.text_of_row)]

    def image_hits(self, queries: slice) -> Tensor:
        """Bool (rows of the slice, I): text to image."""
        return self.owned[:, torch.from_numpy(self.text_of_row[queries])].T

    def are_hits(self, image_rows: np.ndarray, text_rows: np.ndarray) -> np.ndarray:
        """Bool: whether the text of a row belongs to the image of another, element by element; broadcasts."""
        return self.owned.numpy()[self.image_of_row[image_rows], self.text_of_row[text_rows]]

    def chance(self) -> dict[str, float]:
        """The expected recalls of a random order: i2t_r1 … t2i_r10."""
        rows_of_text_U = torch.from_numpy(np.bincount(self.text_of_row))
        hits_I = (self.owned * rows_of_text_U).sum(1).numpy()
        hits_R = self.owned.sum(0).numpy()[self.text_of_row]
        return {
            f"{way}_r{cutoff}": float(1 - _share_of_misses(hits, candidates, cutoff).mean())
            for way, hits, candidates in (("i2t", hits_I, len(self.text_of_row)), ("t2i", hits_R, len(self.images)))
            for cutoff in CUTOFFS
        }


@dataclass(frozen=True)
class Answers:
    """What each of Q queries got back, on the CPU."""

    candidates: Tensor  # (Q, K) int64, best first
    scores: Tensor  # (Q, K) float64
    ranks: Tensor  # (Q,) int64: wrong candidates of all C that score at least as high as the best hit


@dataclass(frozen=True)
class Retrieval:
    """Both ways: images ask for caption rows, rows ask for images."""

    i2t: Answers
    t2i: Answers

    def recalls(self) -> dict[str, float]:
        """i2t_r1 … t2i_r10 as fractions of the queries."""
        return {
            f"{way}_r{cutoff}": float((answers.ranks < cutoff).float().mean())
            for way, answers in (("i2t", self.i2t), ("t2i", self.t2i))
            for cutoff in CUTOFFS
        }


def retrieve(similarity_IR: Tensor, gallery: Gallery, candidates: int) -> Retrieval:
    """The `candidates` most similar of each query, both ways, and the ranks, by ITC similarity alone.

    Raises:
        ValueError: a similarity is NaN (it would compare as lower than everything).
    """
    if similarity_IR.isnan().any():
        raise ValueError("a similarity is NaN: look at the model's losses before its recall")
    return Retrieval(
        _answer(similarity_IR, gallery.text_hits, candidates), _answer(similarity_IR.T, gallery.image_hits, candidates)
    )


def rerank(found: Retrieval, gallery: Gallery, match: Match, similarity_scale: float) -> Retrieval:
    """The candidates of `found` in the order of ITM log-odds + `similarity_scale` x similarity; all others stay below.

    A pair that occurs twice (both ways, or one text in several rows) is scored once.

    Args:
        match: (image indices (P,), rows (P,)) → log-odds of matching (P,); called once with the distinct pairs.
        similarity_scale: 1 / temperature of ITC, or another weight.
    """
    texts = gallery.owned.shape[1]
    text_of_row = torch.from_numpy(gallery.text_of_row)
    by_image_IK = torch.arange(len(found.i2t.candidates))[:, None] * texts + text_of_row[found.i2t.candidates]
    by_row_RK = found.t2i.candidates * texts + text_of_row[:, None]
    asked = torch.cat([by_image_IK.flatten(), by_row_RK.flatten()])
    pairs_P, index = asked.unique(return_inverse=True)
    images_P, texts_P = (pairs_P // texts).numpy(), (pairs_P % texts).numpy()
    _, row_of_text = np.unique(gallery.text_of_row, return_index=True)
    match_IK, match_RK = (
        match(images_P, row_of_text[texts_P]).double().cpu()[index].split([by_image_IK.numel(), by_row_RK.numel()])
    )
    is_hit = gallery.owned.flatten()
    return Retrieval(
        _reorder(found.i2t, match_IK.view_as(by_image_IK), similarity_scale, is_hit[by_image_IK]),
        _reorder(found.t2i, match_RK.view_as(by_row_RK), similarity_scale, is_hit[by_row_RK]),
    )


def _answer(scores_QC: Tensor, hits: Callable[[slice], Tensor], candidates: int) -> Answers:
    size = max(1, CHUNK_ELEMENTS // scores_QC.shape[1])
    chunks = []
    for start in range(0, len(scores_QC), size):
        scores = scores_QC[start : start + size]
        is_hit = hits(slice(start, start + size)).to(scores.device)
        best_hit = scores.masked_fill(~is_hit, -torch.inf).amax(1, keepdim=True)
        ranks = ((scores >= best_hit) & ~is_hit).sum(1)
        ordered = scores.sort(dim=1, descending=True, stable=True)  # equal scores in the order of columns
        chunks.append(
            (ordered.indices[:, :candidates].cpu(), ordered.values[:, :candidates].double().cpu(), ranks.cpu())
        )
    return Answers(*(torch.cat(parts) for parts in zip(*chunks, strict=True)))


def _reorder(found: Answers, match_QK: Tensor, similarity_scale: float, is_hit_QK: Tensor) -> Answers:
    scores_QK = found.scores * similarity_scale + match_QK
    best_hit_Q1 = scores_QK.masked_fill(~is_hit_QK, -torch.inf).amax(1, keepdim=True)
    among_candidates_Q = ((scores_QK >= best_hit_Q1) & ~is_hit_QK).sum(1)
    # Without a hit among the candidates the best one stands where it stood: all candidates were and are before it.
    ranks_Q = torch.where(is_hit_QK.any(1), among_candidates_Q, found.ranks)
    ordered = scores_QK.sort(dim=1, descending=True, stable=True)
    return Answers(found.candidates.gather(1, ordered.indices), ordered.values, ranks_Q)


def _share_of_misses(hits_Q: np.ndarray, candidates: int, cutoff: int) -> np.ndarray:
    """Probability that none of `cutoff` candidates, drawn without replacement, is one of the hits."""
    places = np.arange(min(cutoff, candidates))
    return (np.maximum(candidates - hits_Q[:, None] - places, 0) / (candidates - places)).prod(1)
