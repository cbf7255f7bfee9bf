"""The training loop on several ranks: no other result than on one, and cut anywhere no other bits."""

from pathlib import Path

import pytest
import torch
from distributed_samples import on_ranks
from engine_samples import train_whole_and_cut

from blip_pipelines.training.distributed import World


@pytest.mark.slow
def test_two_ranks_learn_what_one_rank_learns(tmp_path: Path) -> None:
    """Float32 and no dropout, whose masks belong to a rank: what differs is the order of sums of 12 rows."""
    alone = train_whole_and_cut(World(), str(tmp_path / "alone"), "float32")["whole"]
    (tmp_path / "shared").mkdir()
    first, second = (left["whole"] for left in on_ranks(2, train_whole_and_cut, str(tmp_path / "shared"), "float32"))
    for name, weight in alone["weights"].items():
        # Six Adam steps of 0.01, each of which may turn a relative error of a gradient into that share of the step.
        torch.testing.assert_close(first["weights"][name], weight, rtol=0, atol=6 * 0.01 * 1e-3, msg=name)
        assert torch.equal(first["weights"][name], second["weights"][name]), name
    for ours, theirs in zip(first["history"], alone["history"], strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)


@pytest.mark.slow
def test_cut_run_on_three_ranks_ends_with_the_same_bits(tmp_path: Path) -> None:
    """Three, because two numbers sum to the same bits in any order: DDP's layout of buckets shows only here."""
    for left in on_ranks(3, train_whole_and_cut, str(tmp_path), "bfloat16"):
        assert left["cut"]["files"] == left["whole"]["files"]
        for name, weight in left["whole"]["weights"].items():
            assert torch.equal(left["cut"]["weights"][name], weight), name
