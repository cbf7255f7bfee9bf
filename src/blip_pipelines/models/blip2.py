"""BLIP-2 whole: what a Q-Former sees becomes soft prompts for a frozen language model (3.3).

A linear layer turns each query's state into one embedding of the language model, which reads them between the two
parts of a prompt. Trained are Q-Former, queries, `ln_vision` and that layer.

Differs: the projection can be scaled (`projection: scaled`), so that at the start its outputs have the spread of the
embedding table; the paper's starts small. The factor is folded into the weights at export.

Shapes: B batch, Q queries, T text tokens, S prefix tokens, N image tokens, D width, W width of the embeddings,
V vocabulary.
"""

from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from blip_pipelines.data.instruction_tokens import INSTRUCTION, InstructionPlace
from blip_pipelines.models.frozen_tower import FrozenTower
from blip_pipelines.models.initialisation import initialise
from blip_pipelines.models.keys_values import KeysValues
from blip_pipelines.models.language import LanguageModel, Reading
from blip_pipelines.models.qformer import QFormer


@dataclass(frozen=True)
class Blip2Config:
    """How the language model is spoken to.

    Attributes:
        prompt: what it reads, with `{image}` where the soft prompts go and, behind it, `{instruction}` where a row's
            own instruction goes, if there are any.
        chat: the prompt is a user's turn in the words of the chat template.
        projection: start of the linear layer, as the paper or scaled to the embedding table.
        reads_instructions: text goes to the Q-Former too (InstructBLIP); otherwise its text side does not train.
    """

    prompt: str = "{image}"
    chat: bool = False
    projection: Literal["plain", "scaled"] = "plain"
    reads_instructions: bool = False


class Blip2(nn.Module):
    """Q-Former and language model; what it returns is this rank's rows.

    Args:
        former: started already, as the scale of its outputs sets that of the projection.
        tower: None where images come as its outputs, cached.
    """

    def __init__(
        self,
        former: QFormer,
        language: LanguageModel,
        config: Blip2Config,
        tower: FrozenTower | None = None,
        seed: int = 0,
    ):
        super().__init__()
        self.config = config
        self.former, self.language, self.tower = former, language, tower
        self.language_projection = nn.Linear(former.config.text.width, language.width)
        # Not the former's seed: its queries would be the projection's own rows, and come out of it twice as large.
        initialise(self.language_projection, former.config.initializer, seed + 1)
        self.scale = 1.0
        if config.projection == "scaled":
            self.scale = language.embedding_std
            with torch.no_grad():
                weight = self.language_projection.weight
                weight.mul_(former.config.text.width**-0.5 / (weight.std() * former.query_rms))
        former.train_queries(config.reads_instructions)
        self.speak(config.prompt, config.chat)

    def speak(self, prompt: str, chat: bool = False) -> None:
        """Put another prompt around picture and instruction.

        Raises:
            ValueError: the picture's place is not marked once, or there is no chat template.
        """
        self.config = replace(self.config, prompt=prompt, chat=chat)
        before, after = self.language.tokenizer.around_image(prompt, chat)
        opening, _, closing = after.partition(INSTRUCTION)
        lead = opening[len(opening.rstrip(" ")) :] if INSTRUCTION in after else ""
        self.before_ids, opening_ids, closing_ids = self._special(before, opening.removesuffix(lead), closing)
        self.place = InstructionPlace(tuple(opening_ids), tuple(closing_ids), lead)
        self.after_ids = opening_ids + closing_ids
        self._remembered: KeysValues | None = None

    def instruct(self, prompt: str, chat: bool, aware: bool) -> None:
        """Make it ready to be tuned on instructions.

        Args:
            aware: the Q-Former reads them too, and its text side trains.
        """
        self.config = replace(self.config, reads_instructions=aware)
        self.former.train_queries(aware)
        self.speak(prompt, chat)

    def prompt_ids(self, prompt: str) -> tuple[list[int], list[int]]:
        """Ids before and after the picture of a prompt that is put once, in the same kind of turn; see `speak`."""
        before_ids, opening_ids, closing_ids = self._special(
            *self.language.tokenizer.around_image(prompt, self.config.chat), ""
        )
        return before_ids, opening_ids + closing_ids

    def encode_image(self, pixels: Tensor) -> Tensor:
        """(B, N, D) outputs of the tower; without one `pixels` are that already."""
        return self.tower(pixels) if self.tower is not None else pixels

    def see(self, pixels: Tensor) -> KeysValues:
        """An image as the Q-Former's cross-attention sees it; of what the tower reads or, without one, gives."""
        return self.former.project_image(self.encode_image(pixels))

    def soft_prompts(
        self, image: KeysValues, text_ids_BT: Tensor | None = None, text_mask_BT: Tensor | None = None
    ) -> Tensor:
        """(B, Q, W) embeddings; with `text` (in the Q-Former's vocabulary) they know the instruction."""
        if text_ids_BT is not None and text_mask_BT is not None:
            return self.project(self.former.encode_with_text(text_ids_BT, text_mask_BT, image))
        return self.project(self.former.encode_queries(image)[0])

    def project(self, queries_BQD: Tensor) -> Tensor:
        """(B, Q, W)."""
        return self.language_projection(queries_BQD) * self.scale

    def hidden(
        self,
        soft_BQW: Tensor,
        token_ids_BT: Tensor,
        text_ids_BS: Tensor | None = None,
        text_mask_BS: Tensor | None = None,
    ) -> Tensor:
        """(B, T - 1, W') states of the language model: the one at t is asked for token t + 1 of the answer.

        Args:
            token_ids_BT: the answer, `start words end pad...` in the language model's vocabulary.
            text_ids_BS: what it reads after the soft prompts, in place of the prompt's own second part.
            text_mask_BS: bool, False where that has padding.
        """
        prefix_BSW, mask_BS = self._after_before(soft_BQW, text_ids_BS, text_mask_BS)
        past = None
        if self.before_ids and self.language.decoder_only:
            past = self._remember(soft_BQW.device)
        elif self.before_ids:
            prefix_BSW, mask_BS = self._with_before(prefix_BSW, mask_BS)
        return self.language.hidden(prefix_BSW, token_ids_BT, mask_BS, past)

    def lm_head(self, hidden_RW: Tensor) -> Tensor:
        """(R, V) logits of any chosen states; give it only the positions that have a target."""
        return self.language.lm_head(hidden_RW)

    def read(self, soft_BQW: Tensor, text_ids_BS: Tensor | None = None, text_mask_BS: Tensor | None = None) -> Reading:
        """What the language model keeps of picture and instruction, to be asked for many answers to them."""
        prefix_BSW, mask_BS = self._after_before(soft_BQW, text_ids_BS, text_mask_BS)
        if self.before_ids and self.language.decoder_only:
            return self.language.read(prefix_BSW, mask_BS, self._remember(soft_BQW.device))
        return self.language.read(*self._with_before(prefix_BSW, mask_BS))

    def generate(
        self,
        soft_BQW: Tensor,
        text_ids_BS: Tensor | None = None,
        text_mask_BS: Tensor | None = None,
        **settings: Any,
    ) -> list[str]:
        """Answers; settings are those of `LanguageModel.generate`."""
        prefix_BSW, mask_BS = self._after_before(soft_BQW, text_ids_BS, text_mask_BS)
        return self.language.generate(*self._with_before(prefix_BSW, mask_BS), **settings)

    def _special(self, *parts: str) -> tuple[list[int], list[int], list[int]]:
        """Ids of the prompt's parts: before the picture, then before and after the instruction. The special tokens that
        a tokenizer puts around a text go to the front for a model that goes on, behind an empty first part, as the
        published OPT models have it, and to the end for an encoder.
        """
        tokenizer = self.language.tokenizer
        around = tokenizer.prompt_ids("", special=True) if not self.config.chat else []
        before_ids, opening_ids, closing_ids = map(tokenizer.prompt_ids, parts)
        if not self.language.decoder_only:
            return before_ids, opening_ids, closing_ids + around
        if before_ids:
            return around + before_ids, opening_ids, closing_ids
        return before_ids, around + opening_ids, closing_ids

    def _remember(self, device: torch.device) -> KeysValues:
        if self._remembered is None or self._remembered.layers[0][0].device != device:
            ids = torch.tensor([self.before_ids], device=device)
            self._remembered = self.language.remember(self.language.embed(ids))
        return self._remembered

    def _after_before(
        self, soft_BQW: Tensor, text_ids_BS: Tensor | None, text_mask_BS: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        if text_ids_BS is None:
            text_ids_BS = torch.tensor([self.after_ids], dtype=torch.long, device=soft_BQW.device)
            text_ids_BS = text_ids_BS.expand(len(soft_BQW), -1)
        prefix_BSW = torch.cat([soft_BQW.to(self.language.dtype), self.language.embed(text_ids_BS)], 1)
        if text_mask_BS is None:
            return prefix_BSW, None
        return prefix_BSW, torch.cat([text_mask_BS.new_ones(soft_BQW.shape[:2]), text_mask_BS], 1)

    def _with_before(self, prefix_BSW: Tensor, mask_BS: Tensor | None) -> tuple[Tensor, Tensor | None]:
        batch, count = len(prefix_BSW), len(self.before_ids)
        ids = torch.tensor([self.before_ids], dtype=torch.long, device=prefix_BSW.device).expand(batch, -1)
        if mask_BS is not None:
            mask_BS = torch.cat([mask_BS.new_ones(batch, count), mask_BS], 1)
        return torch.cat([self.language.embed(ids), prefix_BSW], 1), mask_BS
