"""Before a language model runs: the soft prompts learn to spell what is to be said. Not in the papers; for short runs.

The soft prompt of query k is drawn to the embedding of word k, and is to be nearer to it than to the other words of
the batch; behind the last word all are the token that ends an answer. Then the language model reads something like the
caption, or the answer, from its first step on, at the cost of steps that do not run it. All that trains afterwards is
trained. Distance alone would end between the words that are likely, where no word is.

Every value that `forward` returns is a *share*, as in MED pretraining: summed over ranks and over the micro-steps of
an optimizer step it is the value of the whole global batch.

Shapes: B own rows, T answer tokens, Q queries, K queries that have a token, R of all rows together, W width of the
embeddings, V words of the global micro-batch.
"""

import copy

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, pad

from blip_pipelines.data.loader import Batch
from blip_pipelines.models.attention import at_least_float32
from blip_pipelines.models.blip2 import Blip2
from blip_pipelines.models.frozen import Frozen
from blip_pipelines.models.qformer import QFormer
from blip_pipelines.objectives.contrastive import Ranks
from blip_pipelines.objectives.generative import divisor_of, frozen_parts, questions_of

SHARPNESS = 8.0  # of the softmax over words; two words of the table are about 2 apart
KEEP = 3.0  # of what is kept, against what is spelled
REST = 0.1  # most queries have no word: with the weight of one they would outweigh those that have


class Told(Frozen):
    """What a model's queries say of a picture without an instruction, kept while the model itself goes on to train.

    Args:
        queries: the first so many.
    """

    def __init__(self, blip2: Blip2, queries: int):
        super().__init__()
        self.queries, self.scale = queries, blip2.scale
        self.former, self.projection = copy.deepcopy(blip2.former), copy.deepcopy(blip2.language_projection)
        self.freeze(queries, blip2.scale)

    @torch.no_grad()
    def forward(self, image_BND: Tensor) -> Tensor:
        """(B, K, W), of the frozen image encoder's outputs."""
        queries_BQD, _ = self.former.encode_queries(self.former.project_image(image_BND))
        return at_least_float32(self.projection(queries_BQD[:, : self.queries]) * self.scale)


@torch.no_grad()
def move_behind(former: QFormer, queries: int) -> None:
    """The first `queries` queries become the last. They go on to say what they said, for queries have no positions."""
    former.query_tokens.copy_(former.query_tokens.roll(-queries, 1))


class ProjectionWarmStart(nn.Module):
    """A task of its own before stage 2 or instruction tuning: the soft prompts spell the caption, or the answer.

    Differs: not in the papers; a run of minutes does not get as far without it.

    Args:
        told: what the last queries go on to say (`move_behind`); the answer is then spelled by those before them, where
            a frozen language model reads it better than behind a description. A model that is asked a question of a
            kind that it was not trained on has the description still.
    """

    def __init__(self, blip2: Blip2, ranks: Ranks, told: Told | None = None):
        super().__init__()
        self.blip2, self.ranks, self.told = blip2, ranks, told
        self.frozen = frozen_parts(blip2) if told is None else (*frozen_parts(blip2), "told")
        self.variance = blip2.language.embedding_std**2

    def forward(self, batch: Batch, step: int) -> dict[str, Tensor]:
        """Shares of the mean over queries that spell, of which those behind the end count `REST` each.

        Returns:
            "loss" with gradient, the sum of "regression", the mean squared distance by the variance of the table,
            "nearest", the cross-entropy of the word among all of the global micro-batch, and, if there is something to
            be kept, `KEEP` times "kept", the mean squared distance to that by the same variance; and "spelled", the
            share of words and ends that are the nearest.
        """
        image_BND = self.blip2.encode_image(batch.pixels)
        image = self.blip2.former.project_image(image_BND)
        soft_BQW = at_least_float32(self.blip2.soft_prompts(image, *questions_of(self.blip2, batch)))
        if self.told is None:
            return self._spell(soft_BQW, batch)
        losses = self._spell(soft_BQW[:, : -self.told.queries], batch)
        off_BK = (soft_BQW[:, -self.told.queries :] - self.told(image_BND)).square().mean(2) / self.variance
        kept = off_BK.sum() / divisor_of(torch.ones_like(off_BK), batch, self.ranks)
        return {**losses, "loss": losses["loss"] + KEEP * kept, "kept": kept.detach()}

    def _spell(self, soft_BKW: Tensor, batch: Batch) -> dict[str, Tensor]:
        word_BK, is_asked_BK = self._words(batch, soft_BKW.shape[1])
        soft_RW, word_R, is_asked_R = soft_BKW.flatten(0, 1), word_BK.flatten(), is_asked_BK.flatten()
        candidates_V = self.ranks.gather(word_BK).unique()
        place_R = torch.searchsorted(candidates_V, word_R)
        with torch.autocast(soft_RW.device.type, enabled=False):  # differences of squares
            table_VW = at_least_float32(self.blip2.language.embed(candidates_V))
            square_RV = soft_RW.square().sum(1, keepdim=True) - 2 * soft_RW @ table_VW.T + table_VW.square().sum(1)
        distance_RV = square_RV / (soft_RW.shape[1] * self.variance)
        own_R = distance_RV.gather(1, place_R[:, None])[:, 0]
        nearest_R = cross_entropy(-SHARPNESS * distance_RV, place_R, reduction="none")

        weight_R = REST + (1 - REST) * is_asked_R.to(distance_RV)
        divisor = divisor_of(weight_R, batch, self.ranks)
        regression, nearest = (own_R * weight_R).sum() / divisor, (nearest_R * weight_R).sum() / divisor
        is_right_R = (distance_RV.detach().argmin(1) == place_R) & is_asked_R
        spelled = is_right_R.sum() / divisor_of(is_asked_R, batch, self.ranks)
        loss = regression + nearest
        return {"loss": loss, "regression": regression.detach(), "nearest": nearest.detach(), "spelled": spelled}

    def _words(self, batch: Batch, queries: int) -> tuple[Tensor, Tensor]:
        """(B, K) int64, what each query is to say: words, then ends; and bool, words and the first end."""
        end = self.blip2.language.tokenizer.end
        word_BT, is_asked_BT = batch.token_ids[:, 1:], batch.token_mask[:, 1:]
        room = max(queries - word_BT.shape[1], 0)
        word_BT = pad(word_BT.where(is_asked_BT, end), (0, room), value=end)
        return word_BT[:, :queries].contiguous(), pad(is_asked_BT, (0, room))[:, :queries]
