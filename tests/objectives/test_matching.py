import math

import pytest
import torch

from blip_pipelines.objectives import matching
from blip_pipelines.objectives.matching import NO_NEGATIVE


def plain_probabilities(similarity, forbidden, uniform_share):
    """BLIP's weights of one row, then the even part, one number at a time."""
    normaliser = sum(math.exp(value) for value in similarity)
    weights = [
        0.0 if no else math.exp(value) / normaliser + 1e-4 for value, no in zip(similarity, forbidden, strict=True)
    ]
    allowed = len(forbidden) - sum(forbidden)
    return [
        0.0 if no else (1 - uniform_share) * weight / sum(weights) + uniform_share / allowed
        for weight, no in zip(weights, forbidden, strict=True)
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("uniform_share", [0.0, 0.5, 1.0])
def test_negatives_are_the_inverse_cdf_of_plain_probabilities(uniform_share, dtype):
    generator = torch.Generator().manual_seed(0)
    similarity = torch.randn(6, 6, generator=generator, dtype=dtype) * 3
    forbidden = torch.eye(6, dtype=torch.bool)
    forbidden[0, 3] = forbidden[3, 0] = forbidden[5, 4] = forbidden[4, 5] = True
    for number in range(40):
        draw = torch.full((6,), (number + 0.5) / 40, dtype=torch.float64)
        found = matching.hard_negatives(similarity, forbidden, draw, uniform_share).tolist()
        for row in range(6):
            expected, below = None, 0.0
            for index, p in enumerate(
                plain_probabilities(similarity[row].tolist(), forbidden[row].tolist(), uniform_share)
            ):
                below += p
                if expected is None and draw[row].item() < below:
                    expected = index
            assert found[row] == expected


@pytest.mark.parametrize("edge", [0.0, 1 - 2.0**-53])
def test_extreme_draws_and_similarities_never_give_a_forbidden_candidate(edge):
    similarity = torch.tensor([[1000.0, -1000, 0, 1000], [-1000, 1000, -1000, 0], [0, 0, 0, 0], [1000, 0, 0, -1000]])
    forbidden = torch.tensor([[1, 0, 0, 1], [0, 1, 1, 0], [1, 1, 1, 0], [1, 0, 0, 1]], dtype=torch.bool)
    found = matching.hard_negatives(similarity, forbidden, torch.full((4,), edge, dtype=torch.float64), 0.0)
    assert not forbidden.gather(1, found[:, None]).any()


def test_a_row_without_an_allowed_candidate_has_no_negative():
    forbidden = torch.tensor([[True, True], [False, True]])
    draw = torch.tensor([0.3, 0.3], dtype=torch.float64)
    assert matching.hard_negatives(torch.zeros(2, 2), forbidden, draw, 0.5).tolist() == [NO_NEGATIVE, 0]


def test_ranks_score_together_what_one_rank_scores_and_each_its_own_images():
    text_of_image = torch.tensor([3, 0, 5, NO_NEGATIVE, 1, 2])
    image_of_text = torch.tensor([1, 5, 5, NO_NEGATIVE, 0, 3])

    def scored(rank, ranks):
        rows = 6 // ranks
        own = slice(rank * rows, (rank + 1) * rows)
        pairs = matching.matching_pairs(text_of_image[own], image_of_text, rank, ranks)
        assert pairs.total == 3 * 6 - 2
        assert ((pairs.image >= 0) & (pairs.image < rows)).all()
        columns = (pairs.image + rank * rows, pairs.text, pairs.matches)
        return sorted(zip(*(column[pairs.counts].tolist() for column in columns), strict=True))

    expected = [(i, i, 1) for i in range(6)]
    expected += [(i, t, 0) for i, t in enumerate(text_of_image.tolist()) if t >= 0]
    expected += [(i, t, 0) for t, i in enumerate(image_of_text.tolist()) if i >= 0]
    for ranks in (1, 2, 3, 6):
        assert sorted(pair for rank in range(ranks) for pair in scored(rank, ranks)) == sorted(expected)


def test_itm_equals_a_plain_float64_version_with_missing_negatives():
    pairs = matching.matching_pairs(torch.tensor([1, 0, NO_NEGATIVE]), torch.tensor([1, 0, NO_NEGATIVE]), 0, 1)
    logits = torch.randn(9, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    labels, counted = [1, 0, 1, 0, 1, 0, 0, 0, 0], [0, 1, 2, 3, 4, 6, 7]
    total = right = 0.0
    for p in counted:
        a, b = logits[p].tolist()
        total -= (b if labels[p] else a) - math.log(math.exp(a) + math.exp(b))
        right += (b > a) == bool(labels[p])
    loss, accuracy = matching.itm_share(logits, pairs)
    assert loss.item() == pytest.approx(total / 7, rel=1e-12)
    assert accuracy.item() == pytest.approx(right / 7)
