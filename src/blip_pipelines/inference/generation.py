"""Captions from the image-grounded decoder: beam search, nucleus sampling, greedy (BLIP 3.3 and appendix B).

Beam search gives what stock `generate` gives for the same weights and settings. A finished caption leaves the batch
at once, so its image's keys and values, its cache and its share of every product go with it; the price is a gather of
the survivors in the steps in which somebody finishes. A sampled token is a function of (seed, image, sample, position)
and the model's probabilities alone, so any split of the images over batches and ranks writes the same captions.

Runs under the caller's autocast; probabilities are float32 in any case.

Shapes: B images, A live rows, K beams, C continuations, T text tokens, L longest text, D width, V vocabulary.
"""

from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from blip_pipelines.config import ConfigError
from blip_pipelines.data.tokens import CaptionTokenizer
from blip_pipelines.models.keys_values import Cache, KeysValues
from blip_pipelines.models.text import TextConfig
from blip_pipelines.objectives.draws import uniform


@dataclass(frozen=True)
class GenerationConfig:
    """How captions are decoded; the defaults are BLIP's for captions.

    `min_tokens` and `max_tokens` count as BLIP's min_length and max_length do: [DEC] and the prompt are in; a caption
    has at least `min_tokens` before its [SEP], and at most `max_tokens` with it.
    """

    strategy: Literal["beam", "nucleus", "greedy"] = "beam"
    beams: int = 3
    top_p: float = 0.9
    min_tokens: int = 5
    max_tokens: int = 20
    length_penalty: float = 1.0
    repetition_penalty: float | None = None  # None: BLIP's, 1.1 for nucleus sampling and none else

    def __post_init__(self) -> None:
        if self.beams < 1:
            raise ConfigError(f"beams: {self.beams} is below 1")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p: {self.top_p} is outside (0, 1]")
        if self.max_tokens <= self.min_tokens:
            raise ConfigError(f"max_tokens: {self.max_tokens} leaves no room above min_tokens = {self.min_tokens}")

    @property
    def penalty(self) -> float:
        if self.repetition_penalty is not None:
            return self.repetition_penalty
        return 1.1 if self.strategy == "nucleus" else 1.0


class Sizes(Protocol):
    """The configuration of a decoder."""

    @property
    def text(self) -> TextConfig: ...


class Decoder(Protocol):
    """What writes: a `Med` that reads the image, a `QFormer` whose text reads what its queries left."""

    @property
    def config(self) -> Sizes: ...

    def decode_hidden(
        self, token_ids_BT: Tensor, token_mask_BS: Tensor | None, image: KeysValues, /, cache: Cache | None = None
    ) -> Tensor: ...

    def lm_head(self, hidden_RD: Tensor, /) -> Tensor: ...


@dataclass(frozen=True)
class Captions:
    """What was written for B images, on the CPU; per rank."""

    texts: list[str]  # without prompt and special tokens
    token_ids: Tensor  # (B, L) int64: [DEC], prompt, words, [SEP] unless cut off, then padding
    log_probability: Tensor  # (B,) float32: the model's own, no penalty in it, summed over the words and [SEP]
    tokens: Tensor  # (B,) int64: how many tokens that sum has


@torch.no_grad()
def generate(
    decoder: Decoder,
    image: KeysValues,
    tokenizer: CaptionTokenizer,
    config: GenerationConfig,
    *,
    prompt: str = "",
    seed: int = 0,
    draw_ids: Tensor | None = None,
    sample: int = 0,
) -> Captions:
    """One caption for each of B images.

    Args:
        image: B rows of `Med.project_image`.
        prompt: text that every caption continues; it is no part of what is returned.
        seed, draw_ids, sample: nucleus sampling only. `draw_ids` int64 (B,) name the images independently of the
            batch; `sample` numbers the captions of one image.

    Raises:
        ValueError: the prompt leaves no room, the model's positions do not reach `max_tokens`, or nucleus sampling
            has no `draw_ids`.

    Differs: the released BLIP code also cuts nucleus sampling at the 50 likeliest tokens, a default of the library it
    used; the paper does not, nor does this.
    """
    text = decoder.config.text
    prompt_ids = tokenizer([""], config.max_tokens + 1, prompt)[0][0, 1:-1]  # without [CLS] and [SEP]
    start = [text.dec_id, *prompt_ids.tolist()]
    if len(start) >= config.max_tokens:
        raise ValueError(
            f"prompt {prompt!r} has {len(start)} tokens with [DEC]: max_tokens {config.max_tokens} leaves no room"
        )
    if config.max_tokens - 1 > text.max_positions:
        raise ValueError(f"max_tokens {config.max_tokens} is over the model's {text.max_positions} positions")
    if config.strategy == "nucleus" and (draw_ids is None or len(draw_ids) != len(image)):
        raise ValueError("nucleus sampling needs one draw id per image, so that its draws do not depend on the batch")
    device = image.layers[0][0].device
    start_BT = torch.tensor(start, device=device).expand(len(image), -1)
    if config.strategy == "beam":
        token_ids_BL, log_probability_B = _beam_search(decoder, image, start_BT, config)
    else:
        draws = None if draw_ids is None else _Draws(seed, sample, draw_ids.to(device))
        token_ids_BL, log_probability_B = _one_by_one(decoder, image, start_BT, config, draws)
    token_ids_BL = token_ids_BL.cpu()
    written_BL = token_ids_BL[:, len(start) :]
    # A model may write [PAD] as a word, so padding is counted from the end.
    tokens_B = (written_BL != text.pad_id).long().cumsum(1).argmax(1) + 1
    texts = tokenizer.decode([row[:count] for row, count in zip(written_BL.tolist(), tokens_B.tolist(), strict=True)])
    return Captions(texts, token_ids_BL, log_probability_B.cpu(), tokens_B)


@dataclass(frozen=True)
class _Draws:
    """The random numbers of nucleus sampling for the rows still being written."""

    seed: int
    sample: int
    ids: Tensor  # (A,) int64

    def at(self, position: int) -> Tensor:
        return uniform(self.seed, position, f"caption {self.sample}", self.ids)

    def select(self, index: Tensor) -> "_Draws":
        return _Draws(self.seed, self.sample, self.ids[index])


def _one_by_one(
    decoder: Decoder, image: KeysValues, start_BT: Tensor, config: GenerationConfig, draws: _Draws | None
) -> tuple[Tensor, Tensor]:
    text, batch = decoder.config.text, len(start_BT)
    token_ids_BL = start_BT.new_full((batch, config.max_tokens), text.pad_id)
    token_ids_BL[:, : start_BT.shape[1]] = start_BT
    log_probability_B = torch.zeros(batch, device=start_BT.device)
    alive_A = torch.arange(batch, device=start_BT.device)
    cache, new_AT = Cache(), start_BT
    for length in range(start_BT.shape[1], config.max_tokens):
        logits_AV = decoder.lm_head(decoder.decode_hidden(new_AT, None, image, cache)[:, -1]).float()
        scores_AV = _discourage(logits_AV, token_ids_BL[alive_A, :length], text.sep_id, config)
        if config.strategy == "nucleus" and draws is not None:
            token_A = draw_from_nucleus(scores_AV, config.top_p, draws.at(length))
        else:
            token_A = scores_AV.argmax(-1)
        token_ids_BL[alive_A, length] = token_A
        log_probability_B[alive_A] += logits_AV.log_softmax(-1).gather(1, token_A[:, None])[:, 0]
        going = (token_A != text.sep_id).nonzero()[:, 0]
        if len(going) == 0:
            break
        if len(going) < len(alive_A):
            alive_A, token_A = alive_A[going], token_A[going]
            image, cache = image.select(going), _kept(cache, going)
            draws = draws.select(going) if draws else None
        new_AT = token_A[:, None]
    return token_ids_BL, log_probability_B


def draw_from_nucleus(logits_AV: Tensor, top_p: float, draw_A: Tensor) -> Tensor:
    """Token ids (A,) from the smallest set of likeliest tokens that holds `top_p`, by the draws' inverse CDF.

    The CDF runs in vocabulary order: rounding that swaps two nearly equal probabilities then moves a draw only if it
    falls between them, while in order of probability it would exchange their whole intervals.

    Args:
        draw_A: float64 in [0, 1).
    """
    probability_AV = logits_AV.softmax(-1)
    ordered_AV = _descending(probability_AV)
    above_AV = ordered_AV.cumsum(-1) - ordered_AV
    least_A1 = ordered_AV.gather(1, (above_AV < top_p).sum(-1, keepdim=True) - 1)  # of the set; its equals are in too
    cumulative_AV = probability_AV.masked_fill(probability_AV < least_A1, 0).double().cumsum(-1)
    total_A1 = cumulative_AV[:, -1:]
    target_A1 = torch.minimum(draw_A[:, None] * total_A1, total_A1.nextafter(torch.zeros_like(total_A1)))
    return torch.searchsorted(cumulative_AV, target_A1, right=True)[:, 0]


def _descending(values_AV: Tensor) -> Tensor:
    if values_AV.device.type == "cpu":  # NumPy's sort is vectorised: 20 times as fast
        return torch.from_numpy(np.sort(values_AV.numpy())).flip(-1)
    return values_AV.sort(-1, descending=True).values


def _beam_search(
    decoder: Decoder, image: KeysValues, start_BT: Tensor, config: GenerationConfig
) -> tuple[Tensor, Tensor]:
    """Ids (B, L) and log-probability (B,) of each image's best hypothesis.

    An image keeps K running and K finished hypotheses. It is done when no running one, at its present length, beats
    the worst of K finished ones (the stock rule with early_stopping False), or when none can come to beat the best
    one at any length: scores only fall, so further steps, which the stock rule would take, change nothing.
    """
    text, beams, prompt_tokens = decoder.config.text, config.beams, start_BT.shape[1]
    batch, device = len(start_BT), start_BT.device
    result_BL = start_BT.new_full((batch, config.max_tokens), text.pad_id)
    result_log_probability_B = torch.zeros(batch, device=device)

    alive_A = torch.arange(batch, device=device)
    running = _Hypotheses.empty(batch, beams, config.max_tokens, text.pad_id, device)
    running.token_ids[:, :, :prompt_tokens] = start_BT[:, None]
    running.score[:, 0] = 0  # the beams are equal at first: only one of them may be continued
    finished = _Hypotheses.empty(batch, beams, config.max_tokens, text.pad_id, device)

    cache = Cache()
    hidden_AD = decoder.decode_hidden(start_BT, None, image, cache)[:, -1]
    every_beam = alive_A.repeat_interleave(beams)
    hidden_AD, cache = hidden_AD[every_beam], _kept(cache, every_beam)
    for length in range(prompt_tokens, config.max_tokens):
        log_probability_AV = decoder.lm_head(hidden_AD).float().log_softmax(-1)
        seen_AT = running.token_ids[:, :, :length].flatten(0, 1)
        score_AV = _discourage(log_probability_AV, seen_AT, text.sep_id, config)
        continued, parent_AC = running.extend(score_AV, log_probability_AV, length)
        token_AC = continued.token_ids[:, :, length]
        ends_AC = (token_AC == text.sep_id) | (length + 1 == config.max_tokens)

        lives = continued.score.masked_fill(ends_AC, -torch.inf).topk(beams).indices
        running, parent_AK = continued.select(lives), parent_AC.gather(1, lives)

        # Of the continuations only the best K may finish; the others stand by so that K beams live on.
        is_final_AC = ends_AC & (torch.arange(2 * beams, device=device) < beams)
        final_AC = continued.score / (length + 1 - prompt_tokens) ** config.length_penalty
        finished = finished.merge(continued.with_score(final_AC.masked_fill(~is_final_AC, -torch.inf)))
        finished = finished.select(finished.score.topk(beams).indices)

        written, most = length + 1 - prompt_tokens, config.max_tokens - prompt_tokens
        reachable_A = running.score[:, 0] / written**config.length_penalty
        bound_A = running.score[:, 0] / (most if config.length_penalty > 0 else written) ** config.length_penalty
        is_done_A = (reachable_A <= finished.score[:, -1]) | (bound_A <= finished.score[:, 0]) | (written == most)
        result_BL[alive_A[is_done_A]] = finished.token_ids[is_done_A, 0]
        result_log_probability_B[alive_A[is_done_A]] = finished.log_probability[is_done_A, 0]
        going = (~is_done_A).nonzero()[:, 0]
        if len(going) == 0:
            break
        rows = (torch.arange(len(alive_A), device=device)[:, None] * beams + parent_AK)[going].flatten()
        if len(going) < len(alive_A):
            alive_A, image = alive_A[going], image.select(going)
            running, finished = running.rows(going), finished.rows(going)
        cache = _kept(cache, rows)
        hidden_AD = decoder.decode_hidden(running.token_ids[:, :, length].reshape(-1, 1), None, image, cache)[:, -1]
    return result_BL, result_log_probability_B


@dataclass(frozen=True)
class _Hypotheses:
    """K hypotheses of A images, best first."""

    token_ids: Tensor  # (A, K, L)
    score: Tensor  # (A, K): what they are chosen by; -inf: no hypothesis
    log_probability: Tensor  # (A, K)

    @classmethod
    def empty(cls, images: int, beams: int, length: int, pad_id: int, device: torch.device) -> "_Hypotheses":
        nothing = torch.full((images, beams), -torch.inf, device=device)
        token_ids = torch.full((images, beams, length), pad_id, dtype=torch.int64, device=device)
        return cls(token_ids, nothing, torch.zeros_like(nothing))

    def extend(self, score_RV: Tensor, log_probability_RV: Tensor, length: int) -> tuple["_Hypotheses", Tensor]:
        """The best 2K continuations by one token of each image, and the hypothesis (A, 2K) that each continues."""
        beams, vocabulary = self.score.shape[1], score_RV.shape[1]
        total_AKV = score_RV.view(-1, beams, vocabulary) + self.score[:, :, None]
        score_AC, index_AC = total_AKV.flatten(1).topk(2 * beams)
        parent_AC, token_AC = index_AC // vocabulary, index_AC % vocabulary
        continued = self.select(parent_AC)
        continued.token_ids[:, :, length] = token_AC
        gained_AC = log_probability_RV.view(-1, beams * vocabulary).gather(1, index_AC)
        return _Hypotheses(continued.token_ids, score_AC, continued.log_probability + gained_AC), parent_AC

    def select(self, index_AC: Tensor) -> "_Hypotheses":
        long = index_AC[:, :, None].expand(-1, -1, self.token_ids.shape[2])
        return _Hypotheses(
            self.token_ids.gather(1, long),
            self.score.gather(1, index_AC),
            self.log_probability.gather(1, index_AC),
        )

    def merge(self, other: "_Hypotheses") -> "_Hypotheses":
        return _Hypotheses(
            torch.cat([self.token_ids, other.token_ids], 1),
            torch.cat([self.score, other.score], 1),
            torch.cat([self.log_probability, other.log_probability], 1),
        )

    def with_score(self, score_AK: Tensor) -> "_Hypotheses":
        return _Hypotheses(self.token_ids, score_AK, self.log_probability)

    def rows(self, index: Tensor) -> "_Hypotheses":
        return _Hypotheses(self.token_ids[index], self.score[index], self.log_probability[index])


def _kept(cache: Cache, index: Tensor) -> Cache:
    return Cache(cache.select(index).layers)


def _discourage(scores_AV: Tensor, seen_AT: Tensor, sep_id: int, config: GenerationConfig) -> Tensor:
    """Repetition penalty on what was written so far (prompt included), and no end before `min_tokens`."""
    if config.penalty != 1:
        seen = scores_AV.gather(1, seen_AT)
        scores_AV = scores_AV.scatter(1, seen_AT, torch.where(seen < 0, seen * config.penalty, seen / config.penalty))
    if seen_AT.shape[1] < config.min_tokens:
        scores_AV = scores_AV.clone()
        scores_AV[:, sep_id] = -torch.inf
    return scores_AV
