"""Stage 1 of BLIP-2 on stock `transformers` modules, as well made as they allow: the peer of our step.

The image is encoded once, ITM is one pass over all 3B pairs, texts are padded to the longest of the batch, attention is
SDPA, and ITC's losses and the negatives are the very functions of `objectives`. Queries that see no text and text that
sees all queries are one pass under the multimodal causal mask, as there is no cache of keys and values, so queries run
once for ITC and ITG. What remains is what the stock classes cannot do otherwise: image keys and values projected again
for each pair and pass, whole last layers, states and logits at padding.
"""

import copy
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize
from transformers import Blip2ForImageTextRetrieval

from blip_pipelines.data.loader import Batch
from blip_pipelines.models.blip2_exports import export_blip2
from blip_pipelines.models.frozen_tower import FrozenTower
from blip_pipelines.models.qformer import QFormer
from blip_pipelines.models.stem import lay_out
from blip_pipelines.models.text import with_first
from blip_pipelines.objectives import contrastive, draws, matching
from blip_pipelines.objectives.qformer import QFormerObjectiveConfig


class StockQFormerPretraining(nn.Module):
    """Drop-in for `objectives.qformer.QFormerPretraining` in a benchmark: one rank, no accumulation.

    Args:
        is_cached: images come as the tower's outputs.
    """

    def __init__(
        self, former: QFormer, tower: FrozenTower, config: QFormerObjectiveConfig, is_cached: bool, seed: int = 0
    ):
        super().__init__()
        self.config, self.seed, self.is_cached = config, seed, is_cached
        self.queries, self.dec_id = former.config.queries, former.config.text.dec_id
        with tempfile.TemporaryDirectory() as folder:
            export_blip2(former, Path(folder), tower, None, {"size": tower.image_size})
            stock: Any = Blip2ForImageTextRetrieval.from_pretrained(Path(folder) / "retrieval")
        self.stock = stock.train()
        stock.vision_model.requires_grad_(False).eval()
        stock.vision_model.post_layernorm.requires_grad_(True)
        self.cls = copy.deepcopy(former.cls)
        self.cls["predictions"].decoder.weight = stock.embeddings.word_embeddings.weight
        self.temperature = nn.Parameter(torch.tensor(config.temperature))
        self.stem, self.mean, self.std = tower.stem, tower.mean, tower.std

    def before_step(self, step: int) -> None:
        """Nothing to do."""

    def forward(self, batch: Batch, step: int) -> dict[str, Tensor]:
        config, stock, rows = self.config, self.stock, len(batch.rows)
        image_BND = self._encode(batch.pixels)
        mask_BT, queries_BQ = batch.token_mask, batch.token_mask.new_ones(rows, self.queries)

        read_BT = torch.cat([queries_BQ, mask_BT[:, :-1]], 1)
        tokens = read_BT.shape[1]
        visible = torch.ones(tokens, tokens, dtype=torch.bool).tril()
        visible[: self.queries] = torch.arange(tokens) < self.queries
        both_BSD = self._run(
            with_first(batch.token_ids, self.dec_id)[:, :-1], visible & read_BT[:, None, None], image_BND
        )
        queries_BQD, decoded_BTD = both_BSD.split([self.queries, tokens - self.queries], 1)

        text_BTD = stock.qformer(stock.embeddings(batch.token_ids), query_length=0, attention_mask=mask_BT.long())
        text_BE = normalize(stock.text_projection(text_BTD.last_hidden_state[:, 0]).float(), dim=-1)
        image_BQE = normalize(stock.vision_projection(queries_BQD).float(), dim=-1)
        similarity_BB = contrastive.query_similarities(image_BQE, text_BE, self.temperature)
        positive_BB = contrastive.positives(batch.image_ids, batch.text_ids, batch.image_ids, batch.text_ids)
        target_BB = contrastive.smooth_targets(positive_BB, config.label_smoothing)
        everyone_B = torch.ones(rows, dtype=torch.bool)
        i2t_B, t2i_B = (
            contrastive.cross_entropy_rows(each, target_BB, everyone_B) for each in (similarity_BB, similarity_BB.T)
        )
        itc = (i2t_B.mean() + t2i_B.mean()) / 2

        negatives = []
        for of, each in (("image", similarity_BB), ("text", similarity_BB.T)):
            draw_B = draws.uniform(self.seed, step, f"negative of {of}, micro-step 0", batch.rows)
            negatives.append(
                matching.hard_negatives(each.detach(), positive_BB, draw_B, config.negatives_uniform_share)
            )
        own_B = torch.arange(rows)
        texts_P, images_P = torch.cat([own_B, negatives[0], own_B]), torch.cat([own_B, own_B, negatives[1]])
        pairs_PS = torch.cat([queries_BQ, mask_BT], 1)[texts_P].long()
        pairs_PSD = self._run(batch.token_ids[texts_P], pairs_PS, image_BND[images_P])
        logits_P2 = stock.itm_head(pairs_PSD[:, : self.queries]).float().mean(1)
        itm = cross_entropy(logits_P2, (torch.arange(3 * rows) < rows).long())

        targets_BT = batch.token_ids.masked_fill(~mask_BT, -100)[:, 1:]
        logits_RV = self.cls["predictions"](decoded_BTD).flatten(0, 1).float()
        itg = cross_entropy(logits_RV, targets_BT.flatten(), label_smoothing=config.label_smoothing)
        return {"itc": itc.detach(), "itm": itm.detach(), "itg": itg.detach(), "loss": itc + itm + itg}

    def _run(self, token_ids_BT: Tensor, mask: Tensor, image_BND: Tensor) -> Tensor:
        """(B, Q + T, D) states of queries and text."""
        queries_BQD = self.stock.query_tokens.expand(len(token_ids_BT), -1, -1)
        embedded_BSD = self.stock.embeddings(token_ids_BT, query_embeds=queries_BQD)
        settings = {"query_length": self.queries, "attention_mask": mask, "encoder_hidden_states": image_BND}
        return self.stock.qformer(embedded_BSD, **settings).last_hidden_state

    def _encode(self, pixels: Tensor) -> Tensor:
        """(B, N, D) tokens after the trainable norm."""
        vision = self.stock.vision_model
        if self.is_cached:
            return vision.post_layernorm(pixels.float())
        if self.stem is not None:
            return vision(lay_out(self.stem(pixels).half().float())).last_hidden_state
        return vision((pixels - self.mean) / self.std).last_hidden_state
