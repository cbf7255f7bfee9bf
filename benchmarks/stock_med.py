"""MED pretraining on stock `transformers` modules, as well made as they allow: the peer of our step.

The image is encoded once, ITM is one pass over all 3B pairs, texts are padded to the longest of the batch, encoder
and decoder share modules, the momentum encoder follows with one foreach call, and ITC, negatives and queue are the
very functions of `objectives`. What remains is what the stock classes cannot do otherwise: eager attention, image keys
and values projected again for each pair and pass, whole last layers, logits at padding.
"""

import copy

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize
from transformers import BlipVisionConfig, BlipVisionModel
from transformers.models.blip.configuration_blip import BlipTextConfig
from transformers.models.blip.modeling_blip_text import BlipTextLMHeadModel, BlipTextModel

from blip_pipelines.data.loader import Batch
from blip_pipelines.models.med import Med
from blip_pipelines.models.text import with_first
from blip_pipelines.objectives import contrastive, draws, matching
from blip_pipelines.objectives.contrastive import Candidates
from blip_pipelines.objectives.med import MedObjectiveConfig
from blip_pipelines.objectives.momentum import Queue


class StockMedPretraining(nn.Module):
    """Drop-in for `objectives.med.MedPretraining` in a benchmark: one rank, no accumulation, pixels as pictures."""

    def __init__(self, med: Med, config: MedObjectiveConfig, seed: int = 0):
        super().__init__()
        self.config, self.seed = config, seed
        self.enc_id, self.dec_id = med.config.text.enc_id, med.config.text.dec_id
        self.vision_model, self.text_encoder, self.text_decoder = stock_modules(med, config.label_smoothing)
        self.vision_proj, self.text_proj = copy.deepcopy(med.vision_proj), copy.deepcopy(med.text_proj)
        self.itm_head = copy.deepcopy(med.itm_head)
        self.temperature = nn.Parameter(torch.tensor(config.temperature))
        followed = [self.vision_model, self.text_encoder, self.vision_proj, self.text_proj]
        self.momentum_encoder = copy.deepcopy(nn.ModuleList(followed)).requires_grad_(False)
        names = [name for name, _ in self.momentum_encoder.named_parameters() if "crossattention" not in name]
        copies, online = (
            dict(self.momentum_encoder.named_parameters()),
            dict(nn.ModuleList(followed).named_parameters()),
        )
        self._copies, self._online = [copies[name] for name in names], [online[name] for name in names]
        self.queue = Queue(config.queue_samples, med.config.projection)

    @torch.no_grad()
    def before_step(self, step: int) -> None:
        self.temperature.clamp_(*self.config.temperature_range)
        torch._foreach_lerp_(self._copies, self._online, 1 - self.config.momentum)

    def after_micro_step(self) -> None:
        self.queue.enqueue(self._seen)

    def forward(self, batch: Batch, step: int) -> dict[str, Tensor]:
        config, mask_BT = self.config, batch.token_mask.long()
        image_BND = self.vision_model(batch.pixels).last_hidden_state

        text_BTD = self.text_encoder(batch.token_ids, mask_BT).last_hidden_state
        own_image_BE = normalize(self.vision_proj(image_BND[:, 0]).float(), dim=-1)
        own_text_BE = normalize(self.text_proj(text_BTD[:, 0]).float(), dim=-1)
        with torch.no_grad():
            vision_model, text_encoder, vision_proj, text_proj = self.momentum_encoder
            image_BE = normalize(vision_proj(vision_model(batch.pixels).last_hidden_state[:, 0]).float(), dim=-1)
            text_BE = text_encoder(batch.token_ids, mask_BT).last_hidden_state[:, 0]
            text_BE = normalize(text_proj(text_BE).float(), dim=-1)
        self._seen = seen = Candidates(image_BE, text_BE, batch.image_ids, batch.text_ids)
        images, texts, image_ids, text_ids = zip(seen, self.queue.candidates, strict=True)
        image_ids_C, text_ids_C = torch.cat(image_ids), torch.cat(text_ids)
        positive_BC = contrastive.positives(batch.image_ids, batch.text_ids, image_ids_C, text_ids_C)
        alpha = contrastive.soft_share(step, config.alpha_max, config.alpha_ramp_steps)
        rest = positive_BC, image_ids_C >= 0, self.temperature, alpha
        i2t_B, i2t_BC = contrastive.contrast(own_image_BE, image_BE, list(texts), *rest)
        t2i_B, t2i_BC = contrastive.contrast(own_text_BE, text_BE, list(images), *rest)
        itc = (i2t_B.mean() + t2i_B.mean()) / 2

        rows, positive_BB = len(batch.rows), positive_BC[:, : len(batch.rows)]
        negatives = []
        for of, similarity_BC in (("image", i2t_BC), ("text", t2i_BC)):
            draw_B = draws.uniform(self.seed, step, f"negative of {of}, micro-step 0", batch.rows)
            similarity_BB = similarity_BC[:, :rows].detach()
            negatives.append(
                matching.hard_negatives(similarity_BB, positive_BB, draw_B, config.negatives_uniform_share)
            )
        own_B = torch.arange(rows)
        texts_P, images_P = torch.cat([own_B, negatives[0], own_B]), torch.cat([own_B, own_B, negatives[1]])
        pairs_PTD = self.text_encoder(
            with_first(batch.token_ids, self.enc_id)[texts_P],
            mask_BT[texts_P],
            encoder_hidden_states=image_BND[images_P],
        ).last_hidden_state
        matches_P = (torch.arange(3 * rows) < rows).long()
        itm = cross_entropy(self.itm_head(pairs_PTD[:, 0]).float(), matches_P)

        lm = self.text_decoder(
            with_first(batch.token_ids, self.dec_id),
            attention_mask=mask_BT,
            encoder_hidden_states=image_BND,
            labels=batch.token_ids.masked_fill(~batch.token_mask, -100),
        ).loss
        return {"itc": itc.detach(), "itm": itm.detach(), "lm": lm.detach(), "loss": itc + itm + lm}


def stock_modules(med: Med, label_smoothing: float) -> tuple[BlipVisionModel, BlipTextModel, BlipTextLMHeadModel]:
    """The stock classes with the weights of `med`, encoder and decoder sharing all modules but self-attention."""
    vision, text = med.config.vision, med.config.text
    vision_model = BlipVisionModel(
        BlipVisionConfig(
            image_size=vision.image_size,
            patch_size=vision.patch_size,
            hidden_size=vision.width,
            intermediate_size=vision.mlp_width,
            num_hidden_layers=vision.layers,
            num_attention_heads=vision.heads,
            layer_norm_eps=vision.layer_norm_eps,
        )
    )
    config = BlipTextConfig(
        vocab_size=text.vocabulary,
        hidden_size=text.width,
        encoder_hidden_size=vision.width,
        intermediate_size=text.ffn_width,
        num_hidden_layers=text.layers,
        num_attention_heads=text.heads,
        max_position_embeddings=text.max_positions,
        layer_norm_eps=text.layer_norm_eps,
        pad_token_id=text.pad_id,
        bos_token_id=text.dec_id,
        sep_token_id=text.sep_id,
        eos_token_id=text.sep_id,
        label_smoothing=label_smoothing,
    )
    encoder, decoder = BlipTextModel(config, add_pooling_layer=False), BlipTextLMHeadModel(config)
    vision_model.load_state_dict(med.vision_model.state_dict(), strict=False)
    encoder.load_state_dict(med.text_encoder.state_dict(), strict=False)
    decoder.load_state_dict(med.text_decoder.state_dict(), strict=False)
    decoder.bert.embeddings = encoder.embeddings
    for mine, shared in zip(decoder.bert.encoder.layer, encoder.encoder.layer, strict=True):
        mine.crossattention, mine.intermediate, mine.output = shared.crossattention, shared.intermediate, shared.output
    decoder.tie_weights()
    return vision_model, encoder, decoder
