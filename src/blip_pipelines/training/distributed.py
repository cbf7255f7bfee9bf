"""The processes that train together: who this one is, and the few things they say to one another.

With one rank there is no process group and every function is the identity, so nothing else in the project asks
whether training is distributed. Gathers carry gradient. `share` in the docstrings: a rank's part of a global sum.

Differs: BLIP takes the candidates of the contrastive loss from the local batch and LAVIS gathers detached features, so
there loss and gradient depend on the number of ranks. Here backward sums the gradients of all ranks for a gathered
row, and the same global batch gives the same gradient on any number of ranks.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

COLLECTIVE_TIMEOUT = timedelta(minutes=30)  # the slowest rank may be writing a checkpoint to a slow disk

CPU = torch.device("cpu")


class WorldError(RuntimeError):
    """The environment of a distributed launch is incomplete; the message says what is missing."""


@dataclass(frozen=True)
class World:
    """This process among `ranks` processes; the default is a single one on the CPU."""

    rank: int = 0
    ranks: int = 1
    device: torch.device = CPU

    @property
    def is_first(self) -> bool:
        """Whether this rank writes files and talks."""
        return self.rank == 0

    def gather(self, rows: Tensor) -> Tensor:
        """The rows of all ranks in rank order, with gradient.

        Args:
            rows: (B, ...), per rank; the same shape and dtype on every rank.

        Returns:
            (ranks x B, ...), global.
        """
        if self.ranks == 1:
            return rows
        return _Gather.apply(rows, self)

    def gather_ragged(self, rows: Tensor) -> Tensor:
        """The rows of all ranks in rank order, with gradient; ranks may hold different numbers of rows, even 0."""
        if self.ranks == 1:
            return rows
        counts = self.gather(torch.tensor([len(rows)], device=rows.device)).tolist()
        longest = max(counts)
        padding = rows.new_zeros(longest - len(rows), *rows.shape[1:])
        blocks = self.gather(torch.cat([rows, padding])).split(longest)
        return torch.cat([block[:count] for block, count in zip(blocks, counts, strict=True)])

    def sum(self, share: Tensor) -> Tensor:
        """The sum over ranks, a new tensor without gradient."""
        total = share.detach().clone()
        if self.ranks > 1:
            dist.all_reduce(total)
        return total

    def broadcast(self, thing: Any) -> Any:
        """What rank 0 passes, on every rank; any picklable object. The other ranks' argument is not looked at."""
        if self.ranks == 1:
            return thing
        box = [thing]
        dist.broadcast_object_list(box, src=0, device=self.device)
        return box[0]

    def gather_objects(self, thing: Any) -> list[Any]:
        """What each rank passes, in rank order, on every rank; any picklable object."""
        if self.ranks == 1:
            return [thing]
        things = [None] * self.ranks
        dist.all_gather_object(things, thing)
        return things

    def barrier(self) -> None:
        """Wait until every rank is here."""
        if self.ranks > 1:
            dist.barrier()


class _Gather(torch.autograd.Function):
    """Concatenate over ranks; backward hands each rank the sum of all ranks' gradients for its own rows."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, world: World) -> Tensor:
        ctx.world, ctx.count = world, len(rows)
        # Neither backend promises bool.
        sent = (rows.to(torch.uint8) if rows.dtype == torch.bool else rows).contiguous()
        blocks = [torch.empty_like(sent) for _ in range(world.ranks)]
        dist.all_gather(blocks, sent)
        return torch.cat(blocks).to(rows.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        total = grads[0].clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total[ctx.world.rank * ctx.count : (ctx.world.rank + 1) * ctx.count], None


@contextmanager
def start(device: str = "auto") -> Iterator[World]:
    """The world this process was launched into, by torchrun's variables RANK, WORLD_SIZE and LOCAL_RANK.

    Without them, or with WORLD_SIZE 1, the world is this process alone and no process group is made.

    Args:
        device: "auto" takes the accelerator of the local rank where there is one, else the CPU; "cpu" or "cuda" insist.

    Raises:
        WorldError: variables are missing, or "cuda" is asked for and there is none.
    """
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    chosen = _device(device, int(os.environ.get("LOCAL_RANK", "0")))
    if ranks == 1:
        yield World(device=chosen)
        return
    missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        raise WorldError(f"WORLD_SIZE is {ranks} but {', '.join(missing)} missing: start the job with torchrun")
    if chosen.type == "cuda":
        dist.init_process_group("nccl", timeout=COLLECTIVE_TIMEOUT, device_id=chosen)
    else:
        dist.init_process_group("gloo", timeout=COLLECTIVE_TIMEOUT)
    yield World(int(os.environ["RANK"]), ranks, chosen)
    dist.destroy_process_group()  # not after an error: it would wait for collectives the other ranks never join


def _device(device: str, local_rank: int) -> torch.device:
    if device not in ("auto", "cpu", "cuda"):
        raise WorldError(f"device {device!r}: expected auto, cpu or cuda")
    if device == "cpu" or (device == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    count = torch.cuda.device_count()
    if local_rank >= count:
        raise WorldError(f"local rank {local_rank} wants its own GPU and there are {count}: lower launch.processes")
    chosen = torch.device("cuda", local_rank)
    torch.cuda.set_device(chosen)
    return chosen
