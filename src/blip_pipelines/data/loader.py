"""From the order of rows to the batches of a rank, decoded and tokenised in worker processes.

The unit of work is an optimizer step, named by its number: a step's batches depend on (seed, step) alone, so that any
number of workers gives the same stream, a resume is a start step, and there is no pause between epochs. Every rank
tokenises the captions of the whole global batch, which costs it a little time and makes the padded length and the
count of target tokens equal on all ranks without a word between them.
"""

import math
import multiprocessing
import os
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, fields, replace
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from blip_pipelines.config import ConfigError
from blip_pipelines.data.features import FeatureCache
from blip_pipelines.data.image_rows import ImageRows
from blip_pipelines.data.images import decode
from blip_pipelines.data.order import Order, draw
from blip_pipelines.data.pairs import Pairs
from blip_pipelines.data.prefetch import Prefetch
from blip_pipelines.data.records import Refused
from blip_pipelines.data.storage import StorageError
from blip_pipelines.data.transforms import ImageConfig, augment_crop, crop_box, to_pixels

# A reduced JPEG decode keeps at least this many pixels per pixel of the view, so that the bicubic filter decides.
_REDUCING_GAP = 2.0


class DataError(RuntimeError):
    """A row that cannot be loaded; the message names its shard, member and key and what to do."""


@dataclass(frozen=True)
class Batch:
    """One micro-step, this rank's contiguous part of the global micro-batch.

    Attributes:
        pixels: (B, 3, S, S) uint8, or frozen features (B, N, P) float16.
        token_ids: (B, T) int64; T is the longest caption of the global micro-batch, the same on every rank.
        token_mask: (B, T) bool, True where there is a token.
        image_ids, text_ids: (B,) int64; equal ids mean the same image, the same caption.
        rows: (B,) int64 place in the global micro-batch; names the row in random draws.
        target_tokens: language modelling targets of the whole accumulated global batch: neither padding nor prompt
            nor position 0.
        prompt_tokens: tokens after position 0 that belong to the prompt.
    """

    pixels: Tensor
    token_ids: Tensor
    token_mask: Tensor
    image_ids: Tensor
    text_ids: Tensor
    rows: Tensor
    target_tokens: int
    prompt_tokens: int = 0

    def to(self, device: torch.device | str) -> "Batch":
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> "Batch":
        return self._map(Tensor.pin_memory)

    def _map(self, change: Any) -> "Batch":
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return replace(self, **{name: change(value) for name, value in values.items() if isinstance(value, Tensor)})


class ReadImages(Protocol):
    """What fills `Batch.pixels`: called in a worker with rows of the view the reader was made for."""

    def __call__(self, rows: np.ndarray, step: int = 0, first_row: int = 0) -> np.ndarray:
        """Images of `rows`; rows[i] is row first_row + i of the global batch of `step`."""
        ...


class Tokenize(Protocol):
    """What fills `Batch.token_ids`: `CaptionTokenizer`, or `LanguageTokenizer` for a language model."""

    def __call__(self, captions: Sequence[str], max_tokens: int, prompt: str = "", /) -> tuple[np.ndarray, np.ndarray]:
        """Ids (B, T) int64, `start prompt words end`, right padded, and their mask (B, T) bool."""
        ...

    def prompt_tokens(self, prompt: str, /) -> int:
        """How many tokens a prompt takes after position 0."""
        ...


class DecodedPixels:
    """Reads stored images as (B, 3, S, S) uint8: augmented by (seed, step, global row), or the evaluation view."""

    def __init__(self, pairs: ImageRows, config: ImageConfig, seed: int = 0, train: bool = False):
        self.pairs, self.config, self.seed = pairs, config, seed
        self.augments = train and config.augment

    def __call__(self, rows: np.ndarray, step: int = 0, first_row: int = 0) -> np.ndarray:
        """Raises DataError: an image cannot be read or decoded."""
        config = self.config
        pixels = np.empty((len(rows), 3, config.size, config.size), np.uint8)
        draws = None
        if self.augments:
            draws = draw(self.seed, step, "augmentation", first_row, len(rows), config.draws)
        for at, (row, place) in enumerate(zip(rows, self.pairs.places(rows), strict=True)):
            try:
                content = self.pairs.image_at(place)
                if draws is None:
                    pixels[at] = to_pixels(decode(content, limits=None), config.size)
                else:
                    pixels[at] = self._augmented(content, place[3:], draws[at])
            except (Refused, StorageError) as error:
                raise DataError(
                    f"{self.pairs.describe(row)}: {error}. The stored image changed after ingestion: check the disk, "
                    "restore the shard (`dvc checkout`, `dvc pull`) or run ingestion again"
                ) from error
        return pixels

    def _augmented(self, content: bytes, size: np.ndarray, draws: np.ndarray) -> np.ndarray:
        width, height = int(size[0]), int(size[1])
        left, upper, right, lower = crop_box((width, height), self.config, draws)
        scale = _REDUCING_GAP * self.config.size / min(right - left, lower - upper)
        enough = (math.ceil(width * scale), math.ceil(height * scale)) if scale < 1 else None
        image = decode(content, limits=None, at_least=enough)
        x, y = image.width / width, image.height / height
        return augment_crop(image, (left * x, upper * y, right * x, lower * y), self.config, draws)


class FrozenFeatures:
    """Reads cached features as (B, N, P) float16; in training the view is drawn by (seed, step, global row)."""

    def __init__(self, pairs: ImageRows, cache: FeatureCache, seed: int = 0, train: bool = False):
        self.cache, self.seed, self.train = cache, seed, train
        first_rows, image_of_row = np.unique(pairs.image_ids, return_index=True, return_inverse=True)[1:]
        self._places = cache.places(pairs.keys[first_rows])[image_of_row]

    def __call__(self, rows: np.ndarray, step: int = 0, first_row: int = 0) -> np.ndarray:
        views = np.zeros(len(rows), np.int64)
        if self.train and self.cache.views > 1:
            views = (draw(self.seed, step, "view", first_row, len(rows))[:, 0] * self.cache.views).astype(np.int64)
        return self.cache.gather(self._places[rows], views)


@dataclass(frozen=True)
class Steps(Dataset, ABC):
    """The micro-batches of optimizer steps by number, or the DataError that they gave.

    Attributes:
        batch_samples_global, micro_samples_global: of a step and of a micro-step, over all ranks.
        part: this rank's rows of a global micro-batch.
    """

    read_images: ReadImages
    batch_samples_global: int
    micro_samples_global: int
    part: slice

    def __getitem__(self, step: int) -> list[Any] | DataError:
        try:
            return self.batches(step)
        except DataError as error:  # returned, for a raised one would arrive wrapped in a worker's traceback
            return error

    @abstractmethod
    def batches(self, step: int) -> list[Any]:
        """A `Batch` for each micro-step. Raises DataError."""

    @property
    def micros(self) -> list[slice]:
        """The rows of each global micro-batch among those of a step."""
        starts = range(0, self.batch_samples_global, self.micro_samples_global)
        return [slice(start, start + self.micro_samples_global) for start in starts]


class StepLoader:
    """The batches of one rank; iterating gives, for each optimizer step, a list of micro-batches.

    Args:
        by_step: what makes them.
        steps: where the stream ends.
        start_step: where it begins; equals skipping that many steps.
        workers: processes that prepare steps ahead; 0 prepares them here, when asked.
        prefetch: of the shards on S3 that the steps read.
    """

    def __init__(
        self,
        by_step: Steps,
        steps: int,
        start_step: int,
        workers: int,
        prefetch: Prefetch | None = None,
    ):
        self.by_step, self.steps, self.start_step, self.workers = by_step, steps, start_step, workers
        self.prefetch = prefetch

    def __len__(self) -> int:
        return max(self.steps - self.start_step, 0)

    def __iter__(self) -> Iterator[list[Batch]]:
        """Raises DataError: an image cannot be loaded."""
        # The tokenizer's threads do not survive a fork, and without workers they would fight those of training.
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        ahead: dict[str, Any] = {}
        if self.workers:
            ahead = {"num_workers": min(self.workers, max(len(self), 1)), "prefetch_factor": 2}
            ahead["worker_init_fn"] = _leave_group
            if "fork" in multiprocessing.get_all_start_methods():
                ahead["multiprocessing_context"] = "fork"  # workers share the table instead of copying it
        loader = DataLoader(
            self.by_step,
            batch_size=None,
            sampler=range(self.start_step, self.steps),
            collate_fn=_as_it_is,
            pin_memory=torch.cuda.is_available(),
            generator=torch.Generator(),  # drawing from the global one would change what follows a resume
            **ahead,
        )
        steps = iter(loader)  # forks, which is done before there are further threads
        try:
            with self.prefetch or nullcontext():
                for step, batches in enumerate(steps, start=self.start_step):
                    if isinstance(batches, DataError):
                        raise batches
                    if self.prefetch is not None:
                        self.prefetch.advance(step + 1)
                    yield batches
        finally:
            del steps  # ends the workers now, and not when nobody looks at the error any more


class Loader(StepLoader):
    """Images and captions of the rows of an order.

    Args:
        pairs: the view to train on.
        order: of that view (`Order(pairs.shard_rows, ...)`).
        read_images: `DecodedPixels` or `FrozenFeatures` of that view.
        tokenizer, max_tokens, prompt: of the captions.
        batch_samples_global: per optimizer step, over all ranks and micro-steps.
        accumulation: micro-steps per optimizer step; divides the batch evenly, as do the ranks.
        steps, start_step, workers: see `StepLoader`.
    """

    def __init__(
        self,
        pairs: Pairs,
        order: Order,
        read_images: ReadImages,
        tokenizer: Tokenize,
        max_tokens: int,
        batch_samples_global: int,
        accumulation: int = 1,
        rank: int = 0,
        ranks: int = 1,
        steps: int = 1,
        start_step: int = 0,
        workers: int = 0,
        prompt: str = "",
    ):
        micro, part = share_of(batch_samples_global, accumulation, rank, ranks)
        if order.shard_rows != pairs.shard_rows:
            raise ConfigError("the order is of another view than the pairs; make it with Order(pairs.shard_rows, ...)")
        pairs.keep_window(order.window_shards)
        by_step = _Steps(read_images, batch_samples_global, micro, part, pairs, order, tokenizer, max_tokens, prompt)
        prefetch = None
        if isinstance(read_images, DecodedPixels) and pairs.remote_shards:
            prefetch = Prefetch(pairs, order, batch_samples_global, start_step, steps)
        super().__init__(by_step, steps, start_step, workers, prefetch)


def share_of(batch_samples_global: int, accumulation: int, rank: int, ranks: int) -> tuple[int, slice]:
    """Samples of a global micro-batch, and this rank's part of it.

    Raises:
        ConfigError: the batch does not divide evenly.
    """
    if batch_samples_global < 1 or batch_samples_global % (accumulation * ranks):
        raise ConfigError(
            f"batch_samples_global is {batch_samples_global}: not a multiple of {accumulation} micro-steps times "
            f"{ranks} ranks; every rank needs the same share"
        )
    micro = batch_samples_global // accumulation
    return micro, slice(rank * micro // ranks, (rank + 1) * micro // ranks)


@dataclass(frozen=True)
class _Steps(Steps):
    pairs: Pairs
    order: Order
    tokenizer: Tokenize
    max_tokens: int
    prompt: str

    def batches(self, step: int) -> list[Batch]:
        rows = self.order.rows(step * self.batch_samples_global, self.batch_samples_global)
        prompt_tokens = self.tokenizer.prompt_tokens(self.prompt)
        captions = self.pairs.captions(rows)
        texts = [self.tokenizer(captions[micro], self.max_tokens, self.prompt) for micro in self.micros]
        target_tokens = sum(int((mask.sum(1) - 1 - prompt_tokens).clip(min=0).sum()) for _, mask in texts)
        batches = []
        for micro, (ids, mask) in zip(self.micros, texts, strict=True):
            mine = rows[micro][self.part]
            image_ids, text_ids = self.pairs.ids(mine)
            batch = Batch(
                pixels=torch.from_numpy(self.read_images(mine, step, micro.start + self.part.start)),
                token_ids=torch.from_numpy(ids[self.part]),
                token_mask=torch.from_numpy(mask[self.part]),
                image_ids=torch.from_numpy(image_ids),
                text_ids=torch.from_numpy(text_ids),
                rows=torch.arange(self.part.start, self.part.stop),
                target_tokens=target_tokens,
                prompt_tokens=prompt_tokens,
            )
            batches.append(batch)
        return batches


def _leave_group(_worker: int) -> None:
    """A signal to the group of the training process is for it: to end its step and save it still needs its workers."""
    os.setpgid(0, 0)


def _as_it_is(item: Any) -> Any:
    return item
