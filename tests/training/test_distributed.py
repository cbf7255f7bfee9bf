import pytest
import torch
from distributed_samples import on_ranks, say_everything

from blip_pipelines.training import distributed
from blip_pipelines.training.distributed import World, WorldError


def test_two_ranks_say_everything_to_one_another():
    first, second = on_ranks(2, say_everything)
    assert (first["rank"], first["is_first"], second["rank"], second["is_first"]) == (0, True, 1, False)
    rows = [torch.arange(4.0).reshape(2, 2) + 10 * rank for rank in range(2)]
    # Backward: both ranks' factors for the same global row.
    factor = 2 * torch.arange(8.0).reshape(4, 2) + 100
    for rank, said in enumerate((first, second)):
        assert torch.equal(said["gather"], torch.cat(rows))
        assert torch.equal(said["gather_transposed"], torch.cat([block.T for block in rows]))
        assert said["gather_bool"].tolist() == [True, False, False, True]
        assert said["gather_int"].tolist() == [2**40, 2**40 + 1]
        assert torch.equal(said["gradient"], factor[2 * rank : 2 * rank + 2])
        assert said["ragged"].tolist() == [1, 2, 3]
        assert said["ragged_gradient"].tolist() == [3.0] * (3 * rank)
        assert said["sum"] == 3 and said["share_after_sum"] == rank + 1
        assert said["broadcast"] == {"from": 0, "list": [1, "a"]}
        assert said["objects"] == [{"rank": 0}, {"rank": 1}]


def test_one_rank_needs_no_process_group(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with distributed.start("cpu") as world:
        assert world == World() and not torch.distributed.is_initialized()
        said = say_everything(world)
    rows = torch.arange(4.0).reshape(2, 2)
    assert torch.equal(said["gather"], rows) and torch.equal(said["gradient"], torch.arange(4.0).reshape(2, 2))
    assert said["sum"] == 1 and said["objects"] == [{"rank": 0}] and said["ragged"].tolist() == []


def test_a_sum_is_a_new_tensor_without_gradient_on_one_rank_too():
    share = torch.tensor(2.0, requires_grad=True)
    total = World().sum(share)
    total.add_(1)
    assert share == 2 and not total.requires_grad


def test_a_launch_without_an_address_names_what_is_missing(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(WorldError, match=r"MASTER_ADDR, MASTER_PORT missing.*torchrun"), distributed.start("cpu"):
        pass


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_asking_for_a_gpu_that_is_not_there_is_an_error():
    with pytest.raises(WorldError, match="there are 0"), distributed.start("cuda"):
        pass
