import numpy as np
import pytest
import torch

from blip_pipelines.evaluation import retrieval
from blip_pipelines.evaluation.retrieval import Gallery, rerank, retrieve


def plain_rank(scores, hits):
    """Wrong candidates at least as high as the best hit, one by one."""
    best = max(score for score, hit in zip(scores, hits, strict=True) if hit)
    return sum(score >= best and not hit for score, hit in zip(scores, hits, strict=True))


def random_gallery(seed=0, rows=40):
    """Images with several captions, captions on several images."""
    draw = np.random.default_rng(seed)
    image_ids, text_ids = draw.integers(100, 125, rows), draw.integers(900, 930, rows)
    gallery = Gallery.of(image_ids, text_ids)
    similarity_IR = torch.from_numpy(draw.normal(size=(len(gallery.images), rows)).round(1))  # rounded: ties
    pairs = set(zip(image_ids, text_ids, strict=True))
    hits_IR = np.array([[(image_ids[first], text) in pairs for text in text_ids] for first in gallery.images])
    return gallery, similarity_IR, hits_IR


def test_ranks_and_recalls_equal_counting_one_by_one():
    gallery, similarity_IR, hits_IR = random_gallery()
    found = retrieve(similarity_IR, gallery, 5)
    scores = similarity_IR.numpy()
    expected_i2t = [plain_rank(scores[i], hits_IR[i]) for i in range(len(scores))]
    expected_t2i = [plain_rank(scores[:, r], hits_IR[:, r]) for r in range(scores.shape[1])]
    assert found.i2t.ranks.tolist() == expected_i2t
    assert found.t2i.ranks.tolist() == expected_t2i
    recalls = found.recalls()
    assert recalls["i2t_r5"] == pytest.approx(np.mean(np.array(expected_i2t) < 5))
    assert recalls["t2i_r1"] == pytest.approx(np.mean(np.array(expected_t2i) < 1))
    assert set(recalls) == {f"{way}_r{k}" for way in ("i2t", "t2i") for k in (1, 5, 10)}


def test_an_equal_caption_of_another_image_is_a_hit_both_ways():
    gallery = Gallery.of(np.array([0, 1, 2]), np.array([5, 5, 6]))
    found = retrieve(torch.tensor([[0.1, 0.9, 0.5], [0.9, 0.1, 0.5], [0.0, 0.0, 1.0]]), gallery, 2)
    assert found.i2t.ranks.tolist() == [0, 0, 0]
    assert found.t2i.ranks.tolist() == [0, 0, 0]


def test_any_caption_of_an_image_is_a_hit():
    gallery = Gallery.of(np.array([7, 7, 3]), np.array([0, 1, 2]))
    assert gallery.images.tolist() == [0, 2]
    assert retrieve(torch.tensor([[0.0, 0.9, 0.5], [0.6, 0.6, 0.5]]), gallery, 1).i2t.ranks.tolist() == [0, 2]


def test_a_constant_score_recalls_nothing():
    gallery = Gallery.of(np.arange(20), np.arange(20))
    recalls = retrieve(torch.zeros(20, 20), gallery, 3).recalls()
    assert set(recalls.values()) == {0.0}


def test_chance_is_that_of_a_random_order():
    gallery, _, hits_IR = random_gallery(rows=12)
    draw = torch.Generator().manual_seed(0)
    trials = 4000
    found = [retrieve(torch.rand(hits_IR.shape, generator=draw), gallery, 1).recalls() for _ in range(trials)]
    for name, value in gallery.chance().items():
        observed = np.mean([recalls[name] for recalls in found])
        assert value == pytest.approx(observed, abs=4 * 0.5 / np.sqrt(trials)), "four standard errors at most"
    assert 0 < gallery.chance()["i2t_r1"] < gallery.chance()["i2t_r5"]


def test_chunks_change_nothing(monkeypatch):
    gallery, similarity_IR, _ = random_gallery()
    whole = retrieve(similarity_IR, gallery, 6)
    monkeypatch.setattr(retrieval, "CHUNK_ELEMENTS", 100)
    parts = retrieve(similarity_IR, gallery, 6)
    for way in ("i2t", "t2i"):
        for name in ("candidates", "scores", "ranks"):
            assert torch.equal(getattr(getattr(parts, way), name), getattr(getattr(whole, way), name))


def test_reranking_adds_both_log_odds_among_the_most_similar_only():
    gallery, similarity_IR, hits_IR = random_gallery(1, rows=30)
    match_IR = 0.5 * torch.randn(similarity_IR.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for first, row in enumerate(gallery.text_of_row):  # a text has one score, whichever row it stands in
        match_IR[:, first] = match_IR[:, np.flatnonzero(gallery.text_of_row == row)[0]]
    kept = 4
    found = retrieve(similarity_IR, gallery, kept)
    reranked = rerank(found, gallery, lambda images, rows: match_IR[images, rows], 3.0)

    moved = 0
    for before, after, match_QC, similarity_QC, hits_QC in (
        (found.i2t, reranked.i2t, match_IR, similarity_IR, hits_IR),
        (found.t2i, reranked.t2i, match_IR.T, similarity_IR.T, hits_IR.T),
    ):
        for query, top in enumerate(before.candidates.tolist()):
            final = np.full(len(hits_QC[query]), -1000.0) + 3 * similarity_QC[query].numpy()
            final[top] = (3 * similarity_QC[query] + match_QC[query])[top]
            assert after.ranks[query] == plain_rank(final, hits_QC[query])
            np.testing.assert_allclose(after.scores[query], np.sort(final)[::-1][:kept])
            np.testing.assert_allclose(final[after.candidates[query]], after.scores[query])
            moved += after.candidates[query].tolist() != top
    assert moved > 10, "the case must have answers that change places"


def test_a_pair_is_matched_once_however_often_it_occurs():
    gallery = Gallery.of(np.array([0, 1, 2, 3]), np.array([8, 8, 9, 9]))  # two texts, each in two rows
    asked = []

    def match(images, rows):
        asked.extend(zip(images.tolist(), gallery.text_of_row[rows].tolist(), strict=True))
        return torch.zeros(len(images))

    rerank(retrieve(torch.rand(4, 4), gallery, 4), gallery, match, 1.0)
    assert sorted(asked) == [(image, text) for image in range(4) for text in range(2)]


def test_a_nan_score_is_an_error_not_a_good_rank():
    gallery = Gallery.of(np.arange(2), np.arange(2))
    with pytest.raises(ValueError, match="NaN"):
        retrieve(torch.tensor([[1.0, float("nan")], [0.0, 1.0]]), gallery, 1)
