"""What stage 2 of BLIP-2 is put together from: the Q-Former, its frozen tower, and the frozen language model."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from blip_pipelines.config import ConfigError, read
from blip_pipelines.data.transforms import ImageConfig
from blip_pipelines.jobs.training_data import Images
from blip_pipelines.models.blip2_exports import ExportedBlip2, load_blip2
from blip_pipelines.models.frozen import weights_hash
from blip_pipelines.models.frozen_tower import FrozenTower, TowerConfig, open_tower
from blip_pipelines.models.language import LanguageConfig, LanguageModel, open_language
from blip_pipelines.models.qformer import QFormer
from blip_pipelines.models.qformer_start import QFormerStartConfig, start_qformer
from blip_pipelines.training.distributed import World

LANGUAGE_MODELS = Path(".cache/language")  # models out of packages, as plain folders

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Blip2Parts:
    """The parts before the first step, the same on every rank.

    Attributes:
        start: the export that they come from.
        images: as pixels, or as the tower's outputs, cached.
        started: what was loaded from where.
    """

    start: ExportedBlip2
    former: QFormer
    language: LanguageModel
    images: Images
    started: list[str]

    @classmethod
    def open(
        cls,
        inputs: Mapping[str, Path],
        language: LanguageConfig,
        anew: Literal["med"] | QFormerStartConfig | None,
        cached: bool,
        seed: int,
        work: Path,
        world: World,
    ) -> "Blip2Parts":
        """From the inputs of a job: `start`, `images`, and where needed `packages` and `med`.

        Args:
            anew: where the Q-Former starts, `med` from that input, if it does not take the weights of `start`.
            cached: the tower's outputs; otherwise it runs in every step.
            work: folder of one piece of work; caches lie beside that of all work.

        Raises:
            ConfigError: the Q-Former is to start from a MED, and none is given.
            StorageError, LanguageError, PackageError: something cannot be read; the message says what.
        """
        start, former, started = load_blip2(inputs["start"]), None, [str(inputs["start"])]
        if anew is not None:
            former, started = _started_anew(start, anew, inputs, seed)
        for line in started:
            logger.info("start: %s", line)
        image = read(ImageConfig, start.image, f"{inputs['start']}/blip2.json: image")
        images = Images(image, start.tower if cached else None, inputs["images"], work, world)
        folder = work.parent.parent / LANGUAGE_MODELS
        for turn in (world.is_first, True):  # the first rank writes the folder that all read
            if turn:
                model = open_language(language, inputs.get("packages"), folder, start.tokenizer)
            world.barrier()
        return cls(start, former or start.former, model, images, started)

    @property
    def tower(self) -> FrozenTower:
        return self.start.tower

    @property
    def live_tower(self) -> FrozenTower | None:
        """What a step runs; None where features are cached."""
        return None if self.images.features else self.tower

    def frozen_hashes(self) -> dict[str, str]:
        """Of the weights as they are now."""
        return {"tower": weights_hash(self.tower), "language model": weights_hash(self.language)}


def _started_anew(
    start: ExportedBlip2, config: Literal["med"] | QFormerStartConfig, inputs: Mapping[str, Path], seed: int
) -> tuple[QFormer, list[str]]:
    """A Q-Former of the same sizes where one is before stage 1, its LayerNorm on images included."""
    if not isinstance(config, QFormerStartConfig):
        if "med" not in inputs:
            raise ConfigError("blip2_stage2.qformer_start: the job was given no MED; name another start")
        config = QFormerStartConfig(med=str(inputs["med"]))
    former = QFormer(start.former.config, seed)
    source = TowerConfig(config.med) if config.med else start.tower.config
    if source is not None:
        open_tower(source).start_norm(former.ln_vision)
    return former, [str(done) for done in start_qformer(former, config, inputs.get("packages"))]
