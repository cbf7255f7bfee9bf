"""The momentum encoder and the queue of its features (BLIP 3.2, ALBEF 3.2; the queue as in MoCo).

Both are state, not parameters: buffers, in the state dict, unseen by the optimizer and by the gradient reduction. They
are equal on every rank by construction, so no wrapper needs to send them around.

Shapes: B own rows, G rows of the global micro-batch, Q queue slots, E projection, T text tokens.
"""

import copy

import torch
from torch import Tensor, nn

from blip_pipelines.models.med import Med
from blip_pipelines.objectives.contrastive import Candidates


class MomentumEncoder(nn.Module):
    """An exponential moving average of what the unimodal features need: ViT, text encoder and the two projections.

    Cross-attention, decoder and ITM head are left out.
    """

    def __init__(self, model: Med, decay: float):
        super().__init__()
        self.decay = decay
        self.model = copy.deepcopy(model)
        del self.model.text_decoder, self.model.itm_head
        for layer in self.model.text_encoder.encoder.layer:
            del layer.crossattention
        for module in self.model.modules():
            for name, parameter in list(module.named_parameters(recurse=False)):
                delattr(module, name)
                module.register_buffer(name, parameter.detach())

    @torch.no_grad()
    def follow(self, model: Med) -> None:
        """Move every weight towards the model's by the share 1 - decay; once per optimizer step."""
        online = dict(model.named_parameters())
        pairs = [(copied, online[name]) for name, copied in self.model.named_buffers() if name in online]
        copies, targets = (list(side) for side in zip(*pairs, strict=True))
        torch._foreach_lerp_(copies, targets, 1 - self.decay)

    @torch.no_grad()
    def forward(self, pixels: Tensor, token_ids_BT: Tensor, token_mask_BT: Tensor) -> tuple[Tensor, Tensor]:
        """Image and text features, each (B, E) of unit length, without gradient."""
        image_B1D = self.model.encode_image(pixels, class_only=True)
        return self.model.image_features(image_B1D), self.model.text_features(token_ids_BT, token_mask_BT)


class Queue(nn.Module):
    """A ring of the last Q momentum features of both sides, with the ids of their image and text.

    A slot that was never written holds the ids -1 and is no candidate. Any number of rows may be added, also more than
    there are slots.

    Differs: BLIP starts from random features that count as negatives, and asks that the batch divide the queue.
    """

    image_features: Tensor
    text_features: Tensor
    image_ids: Tensor
    text_ids: Tensor
    pointer: Tensor

    def __init__(self, slots: int, projection: int):
        super().__init__()
        self.slots = slots
        self.register_buffer("image_features", torch.zeros(slots, projection))
        self.register_buffer("text_features", torch.zeros(slots, projection))
        self.register_buffer("image_ids", torch.full((slots,), -1))
        self.register_buffer("text_ids", torch.full((slots,), -1))
        self.register_buffer("pointer", torch.tensor(0))  # the slot written next; on the device, so no step waits

    @property
    def candidates(self) -> Candidates:
        return Candidates(self.image_features, self.text_features, self.image_ids, self.text_ids)

    @torch.no_grad()
    def enqueue(self, rows: Candidates) -> None:
        """Write the rows over the oldest ones; the newest rows stay if there are more than slots.

        Args:
            rows: of the global micro-batch, equal on every rank. To be called after backward, which still reads the
                old features.
        """
        if self.slots == 0:
            return
        count = len(rows.image_ids)
        last = torch.arange(max(0, count - self.slots), count, device=self.pointer.device)
        slot = (self.pointer + last) % self.slots
        for ring, values in zip(self.candidates, rows, strict=True):
            ring.index_copy_(0, slot, values[-self.slots :].to(ring.dtype))
        self.pointer.copy_((self.pointer + count) % self.slots)
