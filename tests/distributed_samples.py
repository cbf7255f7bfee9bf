"""Several ranks on one machine, for tests that hold them against one rank."""

import os
import socket
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import multiprocessing


def on_ranks(ranks: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """What `function(world, *arguments)` returns on each rank: plain values and tensors.

    Starting the processes takes seconds, so do much in one call. The function must live in a module that a new
    process can import, one directly in tests/.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        multiprocessing.spawn(_on_rank, (ranks, port, folder, function, arguments), nprocs=ranks)
        return [torch.load(Path(folder) / f"{rank}.pt", weights_only=True) for rank in range(ranks)]


def _on_rank(rank: int, ranks: int, port: int, folder: str, function: Callable[..., Any], arguments: Any) -> None:
    from blip_pipelines.training import distributed

    torch.set_num_threads(1)
    names = {"RANK": rank, "WORLD_SIZE": ranks, "LOCAL_RANK": rank, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in names.items()})
    with distributed.start("cpu") as world:
        torch.save(function(world, *arguments), Path(folder) / f"{rank}.pt")


def say_everything(world) -> dict[str, Any]:
    """One use of each thing ranks can say; for tests of `World`."""
    rank, rows = world.rank, torch.arange(4.0).reshape(2, 2) + 10 * world.rank
    said: dict[str, Any] = {"rank": rank, "is_first": world.is_first}
    said["gather"] = world.gather(rows)
    said["gather_transposed"] = world.gather(rows.T)
    said["gather_bool"] = world.gather(torch.tensor([rank == 0, rank == 1]))
    said["gather_int"] = world.gather(torch.tensor([2**40 + rank]))

    leaf = rows.clone().requires_grad_()
    factor = (
        torch.arange(4.0 * world.ranks).reshape(-1, 2) + 100 * rank
    )  # each rank weighs the gathered rows its own way
    (world.gather(leaf) * factor).sum().backward()
    said["gradient"] = leaf.grad

    leaf = (torch.arange(3.0 * rank) + 1).requires_grad_()  # rank 0 has no rows
    ragged = world.gather_ragged(leaf)
    (ragged * (rank + 1)).sum().backward()
    said["ragged"], said["ragged_gradient"] = ragged.detach(), leaf.grad

    share = torch.tensor(rank + 1.0)
    said["sum"], said["share_after_sum"] = world.sum(share), share
    said["broadcast"] = world.broadcast({"from": rank, "list": [1, "a"]} if world.is_first else None)
    said["objects"] = world.gather_objects({"rank": rank})
    world.barrier()
    return said
