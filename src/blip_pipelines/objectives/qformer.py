"""BLIP-2 stage 1: ITC + ITM + ITG of one batch (BLIP-2 3.2), all passes inside one `forward`.

The frozen image is projected to keys and values once for all three losses; the queries run once for ITC and leave the
keys and values that ITG's text reads.

Every value that `forward` returns is a *share*, as in MED pretraining: summed over ranks and over the micro-steps of
an optimizer step it is the value of the whole global batch.

Differs: features are gathered with gradient, so that loss and gradient are those of one rank on any number of ranks;
LAVIS detaches them. Equal images and equal captions are positives of one another, never negatives, as LAVIS has it in
fine-tuning for retrieval only.

Shapes: B own rows, G rows of the global micro-batch, Q queries, P pairs, N image tokens, D width, E projection,
T text tokens.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from blip_pipelines.config import ConfigError
from blip_pipelines.data.loader import Batch
from blip_pipelines.models.frozen_tower import FrozenTower
from blip_pipelines.models.keys_values import KeysValues
from blip_pipelines.models.qformer import QFormer
from blip_pipelines.objectives import contrastive, draws, language_modelling, matching
from blip_pipelines.objectives.contrastive import Ranks


@dataclass(frozen=True)
class QFormerLossWeights:
    """Factors of the three losses; a loss with factor 0 is not computed, and what only it trains is frozen."""

    itc: float = 1.0
    itm: float = 1.0
    itg: float = 1.0

    def __post_init__(self) -> None:
        for name, weight in vars(self).items():
            if weight < 0:
                raise ConfigError(f"objective.weights.{name}: {weight} is negative")
        if not any(vars(self).values()):
            raise ConfigError("objective.weights: all are 0, so there is nothing to train")


@dataclass(frozen=True)
class QFormerObjectiveConfig:
    """Constants of the objective; the defaults are BLIP-2's.

    Attributes:
        temperature: where it starts; it is learnt and, unlike BLIP's, not bounded.
        negatives_uniform_share: of the probability of ITM's negatives; small models need some.
        label_smoothing: of ITC and of ITG.
        prompt: the loader begins every caption with it; read by ITG, not asked for.
    """

    weights: QFormerLossWeights = field(default_factory=QFormerLossWeights)
    temperature: float = 0.07
    negatives_uniform_share: float = 0.0
    label_smoothing: float = 0.1
    prompt: str = ""

    def __post_init__(self) -> None:
        for name in ("negatives_uniform_share", "label_smoothing"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"objective.{name}: {getattr(self, name)} is outside 0 to 1")
        if self.temperature <= 0:
            raise ConfigError(f"objective.temperature: {self.temperature} is not above 0")


class QFormerPretraining(nn.Module):
    """The task that the training loop trains.

    A step is `before_step`, then for each micro-step `forward`, backward, `after_micro_step`.

    Args:
        former: its parameters that no loss of `config` reaches lose `requires_grad`.
        ranks: who shares a micro-batch; rank r holds the r-th block of its rows, all blocks of one shape.
        seed: of the draws of negatives.
        accumulation: micro-steps per optimizer step; a divisor of the shares.
        tower: None where images come as its outputs, cached.

    Attributes:
        frozen: submodules that checkpoints only name.
    """

    def __init__(
        self,
        former: QFormer,
        config: QFormerObjectiveConfig,
        ranks: Ranks,
        seed: int = 0,
        accumulation: int = 1,
        tower: FrozenTower | None = None,
    ):
        super().__init__()
        self.former, self.config, self.ranks, self.tower = former, config, ranks, tower
        self.seed, self.accumulation = seed, accumulation
        self.frozen = ("tower",) if tower is not None else ()
        self.temperature = nn.Parameter(torch.tensor(config.temperature))
        # The reduction of gradients over ranks waits for every parameter that asks for a gradient.
        for name, parameter in former.named_parameters():
            if not any(getattr(config.weights, loss) for loss in losses_that_train(name, len(former.layers))):
                parameter.requires_grad_(False)
        self.temperature.requires_grad_(config.weights.itc > 0)
        self._micro_step = 0

    def before_step(self, step: int) -> None:
        self._micro_step = 0

    def after_micro_step(self) -> None:
        self._micro_step += 1

    def forward(self, batch: Batch, step: int) -> dict[str, Tensor]:
        """Losses of this rank's part of a micro-batch, scalars, each a share of the global value.

        Returns:
            "loss", the weighted sum, with gradient. Without gradient "itc", "itm", "itg", and to watch: "temperature",
            "itm_accuracy", and the recalls at 1 within the batch, "recall_i2t" and "recall_t2i".
        """
        weights = self.config.weights
        shares: dict[str, Tensor] = {}
        image = self.former.project_image(self.tower(batch.pixels) if self.tower is not None else batch.pixels)
        with torch.set_grad_enabled(torch.is_grad_enabled() and bool(weights.itc or weights.itg)):
            queries_BQD, left = self.former.encode_queries(image, cache=weights.itg > 0)
        if weights.itc or weights.itm:
            found = self._contrast(batch, queries_BQD, shares)
        if weights.itm:
            self._match(batch, step, found, image, shares)
        if weights.itg:
            self._generate(batch, left, shares)
        loss = torch.stack([weight * shares[name] for name, weight in vars(weights).items() if weight]).sum()
        return {name: share.detach() for name, share in shares.items()} | {"loss": loss}

    def _contrast(self, batch: Batch, queries_BQD: Tensor, shares: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Similarities of the own images and of the own texts, and which are positive; each (B, G)."""
        config = self.config
        with torch.set_grad_enabled(torch.is_grad_enabled() and config.weights.itc > 0):
            image_BQE = self.former.image_features(queries_BQD)
            text_BE = self.former.text_features(batch.token_ids, batch.token_mask)
            images_GQE, texts_GE = self.ranks.gather(image_BQE), self.ranks.gather(text_BE)
            i2t_BG = contrastive.query_similarities(image_BQE, texts_GE, self.temperature)
            t2i_BG = contrastive.query_similarities(images_GQE, text_BE, self.temperature).T
            image_ids_G, text_ids_G = self.ranks.gather(torch.stack([batch.image_ids, batch.text_ids], 1)).unbind(1)
            positive_BG = contrastive.positives(batch.image_ids, batch.text_ids, image_ids_G, text_ids_G)
            target_BG = contrastive.smooth_targets(positive_BG, config.label_smoothing)
            everyone_G = torch.ones_like(image_ids_G, dtype=torch.bool)
            i2t_B, t2i_B = (
                contrastive.cross_entropy_rows(similarity_BG, target_BG, everyone_G)
                for similarity_BG in (i2t_BG, t2i_BG)
            )
        divisor = len(image_ids_G) * self.accumulation
        if config.weights.itc:
            shares["itc"] = (i2t_B + t2i_B).sum() / (2 * divisor)
            shares["temperature"] = self.temperature / (self.ranks.ranks * self.accumulation)
        for name, similarity_BG in ("recall_i2t", i2t_BG), ("recall_t2i", t2i_BG):
            shares[name] = positive_BG.gather(1, similarity_BG.argmax(1, keepdim=True)).sum() / divisor
        return i2t_BG, t2i_BG, positive_BG

    def _match(
        self,
        batch: Batch,
        step: int,
        found: tuple[Tensor, Tensor, Tensor],
        image: KeysValues,
        shares: dict[str, Tensor],
    ) -> None:
        def draw(purpose: str) -> Tensor:
            return draws.uniform(self.seed, step, f"{purpose}, micro-step {self._micro_step}", batch.rows)

        pairs = matching.draw_pairs(*found, draw, self.config.negatives_uniform_share, self.ranks)
        loss, accuracy = matching.match(self.former, batch, image, pairs, self.ranks)
        shares["itm"], shares["itm_accuracy"] = loss / self.accumulation, accuracy / self.accumulation

    def _generate(self, batch: Batch, queries: KeysValues, shares: dict[str, Tensor]) -> None:
        shares["itg"] = language_modelling.lm_share(
            self.former.decode_hidden(batch.token_ids[:, :-1], batch.token_mask[:, :-1], queries),
            batch.token_ids,
            language_modelling.target_positions(batch.token_mask, batch.prompt_tokens),
            self.former.lm_head,
            batch.target_tokens,
            self.config.label_smoothing,
        )


def losses_that_train(parameter: str, layers: int) -> tuple[str, ...]:
    """Which losses reach a parameter of a `QFormer` of so many layers, by its name there."""
    parts = parameter.split(".")
    if parts[0] in ("vision_projection", "text_projection"):
        return ("itc",)
    if parts[0] == "itm_head":
        return ("itm",)
    if parts[0] == "cls":
        return ("itg",)
    if parameter.startswith(f"qformer.encoder.layer.{layers - 1}."):
        # ITG reads the keys and values that queries bring to the last layer, ITM the queries that come out of it.
        if parts[4] in ("crossattention", "intermediate_query", "output_query"):
            return ("itc", "itm")
        if parts[4] in ("intermediate", "output"):
            return ("itc", "itg")
    return ("itc", "itm", "itg")
