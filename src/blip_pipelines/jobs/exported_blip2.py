"""An exported BLIP-2 as a job uses it: on this rank's device, with how it reads the images of a data set."""

from pathlib import Path

from blip_pipelines.config import read
from blip_pipelines.data.storage import StorageError
from blip_pipelines.data.transforms import ImageConfig
from blip_pipelines.jobs.exported import RankModel
from blip_pipelines.models.blip2_exports import load_blip2
from blip_pipelines.models.precision import Precision
from blip_pipelines.training.distributed import World


class RankBlip2(RankModel):
    """The model of a folder that `export_blip2` wrote; images come as its frozen tower reads them.

    Attributes:
        former, tower, model: in evaluation mode on the rank's device; `model` None after stage 1.
        tokenizer: the Q-Former's.
        temperature: of its ITC; None where the folder does not say.

    Raises:
        StorageError: the folder is damaged or has no tokenizer.
    """

    def __init__(self, folder: Path, images: Path, precision: Precision, work: Path, world: World):
        exported = load_blip2(folder)
        if exported.tokenizer is None:
            raise StorageError(f"{folder}: no tokenizer in it; export the model with its tokenizer")
        image = read(ImageConfig, exported.image, f"{folder}/blip2.json: image")
        super().__init__(exported.tokenizer, image, exported.tower.stem, images, precision, work, world)
        self.former, self.tower = exported.former.to(world.device), exported.tower.to(world.device)
        self.temperature = exported.temperature
        self.model = exported.model.to(world.device) if exported.model is not None else None
