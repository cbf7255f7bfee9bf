"""What a model answers to the rows of an instruction table."""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from blip_pipelines.data.instructions import Instructions
from blip_pipelines.inference.answering import Answered
from blip_pipelines.jobs.training_data import Images


def drawn_rows(view: Instructions, rows: int | None, seed: int = 0) -> np.ndarray:
    """Ascending rows of the view: of each data set so many, those whose hash comes first; all, if there are fewer or
    `rows` is None.

    So what is drawn does not change with the other data sets, nor with the order of the table.
    """
    every, by_data_set = np.arange(len(view)), dict[str, list[tuple[str, int]]]()
    if rows is None:
        return every
    names = (view.values(name, every) for name in ("data_set", "sample", "instruction"))
    for row, (data_set, sample, instruction) in enumerate(zip(*names, strict=True)):
        digest = hashlib.sha256(f"{seed}/{data_set}/{sample}/{instruction}".encode()).hexdigest()
        by_data_set.setdefault(data_set, []).append((digest, row))
    return np.sort([row for found in by_data_set.values() for _, row in sorted(found)[:rows]]).astype(np.int64)


@dataclass(frozen=True)
class Asking:
    """How rows are asked.

    Args:
        frames: of a video.
        most_candidates: an answer is chosen where there are at most so many, and else written; None: always chosen.
        batch_rows: at once; memory, not the result.
    """

    frames: int = 4
    most_candidates: int | None = None
    batch_rows: int = 32


class Asked(Protocol):
    """A model that answers: `answering.Answerer`, or `question_answering.MedAnswerer`."""

    @property
    def device(self) -> torch.device: ...

    def answer(
        self, pixels: torch.Tensor, instructions: Sequence[str], candidates: Sequence[Sequence[str] | None]
    ) -> list[Answered]: ...


def answers_of(
    answerers: Mapping[str, Asked], view: Instructions, images: Images, rows: np.ndarray, asking: Asking
) -> list[Answered]:
    """An answer to each of `rows`, in their order.

    Args:
        answerers: by task.
        images: as the models' `see` takes them.
    """
    found: dict[int, Answered] = {}
    tasks = view.values("task", rows)
    is_video = np.array([frames is not None for frames in view.values("frames", rows)], bool)
    for task in sorted(set(tasks)):
        for moves in (False, True):
            mine = rows[(np.array(tasks) == task) & (is_video == moves)]
            # Those with as many candidates together: a batch is then written or chosen, not a few rows of each. Among
            # them those of like length, so that little is padding.
            length = [len(text) for text in view.instructions(mine)]
            mine = mine[np.lexsort((length, [len(each or ()) for each in _candidates(view, mine, asking)]))]
            for batch, pixels in _pixels(view, images, mine, asking, moves):
                device, candidates = answerers[task].device, _candidates(view, batch, asking)
                answers = answerers[task].answer(pixels.to(device), view.instructions(batch), candidates)
                found |= zip(batch.tolist(), answers, strict=True)
    return [found[row] for row in rows.tolist()]


def _candidates(view: Instructions, rows: np.ndarray, asking: Asking) -> list[Sequence[str] | None]:
    """What an answer is chosen from; None where it is written."""
    most = asking.most_candidates
    return [None if each is None or len(each) > (most or len(each)) else each for each in view.candidates(rows)]


def _pixels(
    view: Instructions, images: Images, rows: np.ndarray, asking: Asking, moves: bool
) -> Iterator[tuple[np.ndarray, torch.Tensor]]:
    """Batches of rows with their frames (B, F, ...); a picture is one frame."""
    if not len(rows):
        return
    if moves:
        part = view.select(rows=rows)
        table, places = part.frames(asking.frames)
        read_images = images.reader(table)
    else:
        read_images, places = images.reader(view), rows[:, None]
    for start in range(0, len(rows), asking.batch_rows):
        batch = slice(start, start + asking.batch_rows)
        pixels = torch.from_numpy(read_images(places[batch].reshape(-1)))
        yield rows[batch], pixels.unflatten(0, places[batch].shape)
