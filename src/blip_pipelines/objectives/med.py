"""MED pretraining: ITC + ITM + LM of one batch (BLIP 3.2), all passes inside one `forward`.

The image is encoded once and projected to keys and values once, for ITM's positives and negatives and for LM.

Every value that `forward` returns is a *share*: summed over ranks and over the micro-steps of an optimizer step it is
the value of the whole global batch. So is the gradient, with DDP's average multiplied by the number of ranks.

Shapes: B own rows, G rows of the global micro-batch, C candidates, P pairs, N image tokens, D width, E projection,
T text tokens.
"""

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn

from blip_pipelines.config import ConfigError
from blip_pipelines.data.loader import Batch
from blip_pipelines.models.keys_values import KeysValues
from blip_pipelines.models.med import Med
from blip_pipelines.objectives import contrastive, draws, language_modelling, matching
from blip_pipelines.objectives.contrastive import Candidates, Ranks
from blip_pipelines.objectives.momentum import MomentumEncoder, Queue


@dataclass(frozen=True)
class LossWeights:
    """Factors of the three losses; a loss with factor 0 is not computed, and what only it trains is frozen."""

    itc: float = 1.0
    itm: float = 1.0
    lm: float = 1.0

    def __post_init__(self) -> None:
        for name, weight in vars(self).items():
            if weight < 0:
                raise ConfigError(f"objective.weights.{name}: {weight} is negative")
        if not any(vars(self).values()):
            raise ConfigError("objective.weights: all are 0, so there is nothing to train")


@dataclass(frozen=True)
class MedObjectiveConfig:
    """Constants of the objective; the defaults are BLIP's.

    Differs: `queue_start_step`. While the weights move fast, a feature in the queue differs from a fresh one by its
    age, and as the positive is always fresh, the encoders learn to tell ages in place of contents (docs/objectives.md).
    """

    weights: LossWeights = field(default_factory=LossWeights)
    momentum: float | None = 0.995  # null: no momentum encoder, hence no queue and no soft targets
    queue_samples: int = 57600
    queue_start_step: int = 0  # before it the queue fills but is no candidate
    alpha_max: float = 0.4
    alpha_ramp_steps: int = 10_000  # BLIP: the steps of two epochs
    temperature: float = 0.07
    temperature_range: tuple[float, float] = (0.001, 0.5)
    negatives_uniform_share: float = 0.0  # of the probability of ITM's negatives; small models need some
    label_smoothing: float = 0.1
    prompt: str = ""  # the loader begins every caption with it; read by the decoder, not asked for

    def __post_init__(self) -> None:
        for name in ("momentum", "alpha_max", "negatives_uniform_share", "label_smoothing"):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= 1:
                raise ConfigError(f"objective.{name}: {value} is outside 0 to 1")
        for name in ("queue_samples", "queue_start_step", "alpha_ramp_steps"):
            if getattr(self, name) < 0:
                raise ConfigError(f"objective.{name}: {getattr(self, name)} is negative")
        low, high = self.temperature_range
        if not 0 < low <= self.temperature <= high:
            raise ConfigError(f"objective.temperature: {self.temperature} is outside temperature_range {low} to {high}")


class Similarities(NamedTuple):
    """What ITC found inside the global micro-batch, each (B, G), without gradient."""

    image_to_text: Tensor
    text_to_image: Tensor
    positive: Tensor  # bool


class MedPretraining(nn.Module):
    """The task that the training loop trains.

    A step is `before_step`, then for each micro-step `forward`, backward, `after_micro_step`.

    Args:
        model: its parameters that no loss of `config` reaches lose `requires_grad`.
        ranks: who shares a micro-batch; rank r holds the r-th block of its rows, all blocks of one shape.
        seed: of the draws of negatives.
        accumulation: micro-steps per optimizer step; a divisor of the shares.
    """

    def __init__(self, model: Med, config: MedObjectiveConfig, ranks: Ranks, seed: int = 0, accumulation: int = 1):
        super().__init__()
        self.model, self.config, self.ranks = model, config, ranks
        self.seed, self.accumulation = seed, accumulation
        self.temperature = nn.Parameter(torch.tensor(config.temperature))
        self.momentum_encoder: MomentumEncoder | None = None
        self.queue: Queue | None = None
        if config.momentum is not None and config.weights.itc:
            self.momentum_encoder = MomentumEncoder(model, config.momentum)
            self.queue = Queue(config.queue_samples, model.config.projection)
        # The reduction of gradients over ranks waits for every parameter that asks for a gradient.
        for name, parameter in model.named_parameters():
            if not any(getattr(config.weights, loss) for loss in losses_that_train(name)):
                parameter.requires_grad_(False)
        self.temperature.requires_grad_(config.weights.itc > 0)
        self._micro_step = 0
        self._seen: Candidates | None = None

    def before_step(self, step: int) -> None:
        """Once per optimizer step: the temperature is clamped, the momentum encoder follows."""
        self._micro_step = 0
        with torch.no_grad():
            self.temperature.clamp_(*self.config.temperature_range)
        if self.momentum_encoder is not None:
            self.momentum_encoder.follow(self.model)

    def after_micro_step(self) -> None:
        """After each backward: the momentum features of the global micro-batch enter the queue."""
        self._micro_step += 1
        if self.queue is not None and self._seen is not None:
            self.queue.enqueue(self._seen)
        self._seen = None

    def forward(self, batch: Batch, step: int) -> dict[str, Tensor]:
        """Losses of this rank's part of a micro-batch, scalars, each a share of the global value.

        Returns:
            "loss", the weighted sum, with gradient. Without gradient "itc", "itm", "lm", and to watch: "temperature",
            "itm_accuracy", and the recalls at 1 within the batch, "recall_i2t" and "recall_t2i".
        """
        weights = self.config.weights
        shares: dict[str, Tensor] = {}
        image_BND = self.model.encode_image(batch.pixels)
        if weights.itc or weights.itm:
            found = self._contrast(batch, step, image_BND, shares)
        if weights.itm or weights.lm:
            image = self.model.project_image(image_BND)
        if weights.itm:
            self._match(batch, step, found, image, shares)
        if weights.lm:
            self._decode(batch, image, shares)
        loss = torch.stack([weight * shares[name] for name, weight in vars(weights).items() if weight]).sum()
        return {name: share.detach() for name, share in shares.items()} | {"loss": loss}

    def _contrast(self, batch: Batch, step: int, image_BND: Tensor, shares: dict[str, Tensor]) -> Similarities:
        config = self.config
        with torch.set_grad_enabled(torch.is_grad_enabled() and config.weights.itc > 0):
            own_image_BE = self.model.image_features(image_BND)
            own_text_BE = self.model.text_features(batch.token_ids, batch.token_mask)
            image_BE, text_BE, alpha = own_image_BE, own_text_BE, 0.0
            if self.momentum_encoder is not None:
                image_BE, text_BE = self.momentum_encoder(batch.pixels, batch.token_ids, batch.token_mask)
                alpha = contrastive.soft_share(step, config.alpha_max, config.alpha_ramp_steps)
            seen = Candidates(
                *self.ranks.gather(torch.cat([image_BE, text_BE], 1)).chunk(2, 1),
                *self.ranks.gather(torch.stack([batch.image_ids, batch.text_ids], 1)).unbind(1),
            )
            blocks = [seen]
            if self.queue is not None and step >= config.queue_start_step:
                blocks.append(self.queue.candidates)
            images, texts, image_ids, text_ids = (list(part) for part in zip(*blocks, strict=True))
            image_ids_C, text_ids_C = torch.cat(image_ids), torch.cat(text_ids)
            positive_BC = contrastive.positives(batch.image_ids, batch.text_ids, image_ids_C, text_ids_C)
            rest = positive_BC, image_ids_C >= 0, self.temperature, alpha
            i2t_B, i2t_BC = contrastive.contrast(own_image_BE, image_BE, texts, *rest)
            t2i_B, t2i_BC = contrastive.contrast(own_text_BE, text_BE, images, *rest)
        if self.training and self.queue is not None:
            self._seen = seen

        rows = len(seen.image_ids)
        found = Similarities(i2t_BC[:, :rows].detach(), t2i_BC[:, :rows].detach(), positive_BC[:, :rows])
        divisor = rows * self.accumulation
        if config.weights.itc:
            shares["itc"] = (i2t_B + t2i_B).sum() / (2 * divisor)
            shares["temperature"] = self.temperature / (self.ranks.ranks * self.accumulation)
        for name, similarity_BG in ("recall_i2t", found.image_to_text), ("recall_t2i", found.text_to_image):
            shares[name] = found.positive.gather(1, similarity_BG.argmax(1, keepdim=True)).sum() / divisor
        return found

    def _match(
        self, batch: Batch, step: int, found: Similarities, image: KeysValues, shares: dict[str, Tensor]
    ) -> None:
        def draw(purpose: str) -> Tensor:
            return draws.uniform(self.seed, step, f"{purpose}, micro-step {self._micro_step}", batch.rows)

        pairs = matching.draw_pairs(*found, draw, self.config.negatives_uniform_share, self.ranks)
        loss, accuracy = matching.match(self.model, batch, image, pairs, self.ranks)
        shares["itm"], shares["itm_accuracy"] = loss / self.accumulation, accuracy / self.accumulation

    def _decode(self, batch: Batch, image: KeysValues, shares: dict[str, Tensor]) -> None:
        shares["lm"] = language_modelling.lm_share(
            self.model.decode_hidden(batch.token_ids[:, :-1], batch.token_mask[:, :-1], image),
            batch.token_ids,
            language_modelling.target_positions(batch.token_mask, batch.prompt_tokens),
            self.model.lm_head,
            batch.target_tokens,
            self.config.label_smoothing,
        )


def losses_that_train(parameter: str) -> tuple[str, ...]:
    """Which losses reach a parameter of `Med`, by its name there."""
    parts = parameter.split(".")
    if parts[0] in ("vision_proj", "text_proj"):
        return ("itc",)
    if parts[0] == "itm_head":
        return ("itm",)
    if parts[0] == "text_decoder":  # shared parameters go by their `text_encoder` name
        return ("lm",)
    if "crossattention" in parts:
        return ("itm", "lm")
    if "attention" in parts:
        return ("itc", "itm")
    return ("itc", "itm", "lm")
