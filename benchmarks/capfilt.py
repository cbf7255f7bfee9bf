"""CapFilt's two passes from pixels on: the captioner writes, the filter judges; ours against stock `transformers`.

The stock classes are loaded from our export, so the weights are the same. Beam captions and match probabilities must
agree before anything is timed; for nucleus sampling the chances of the next token must. A captioner whose captions all
end at once would hide what finished captions cost, so its decoder is first fitted to captions of the default's lengths.
"""

import copy
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, pad
from transformers import BlipForConditionalGeneration, BlipForImageTextRetrieval
from transformers.generation.logits_process import (
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    TopPLogitsWarper,
)

from benchmarks.measure import DEVICE, circumstances, interleaved, write
from benchmarks.med_step import PRECISIONS, SIZES, Size, make_batches
from blip_pipelines.data.loader import Batch
from blip_pipelines.inference import scoring
from blip_pipelines.inference.generation import GenerationConfig, draw_from_nucleus, generate
from blip_pipelines.models.exports import export_med
from blip_pipelines.models.med import Med, MedConfig
from blip_pipelines.models.text import with_first

BEAM = GenerationConfig("beam", beams=3, min_tokens=5, max_tokens=20)
NUCLEUS = GenerationConfig("nucleus", top_p=0.9, min_tokens=5, max_tokens=20)
LIMIT_SECONDS = 10.0  # of one comparison; at least 3 rounds are run
FIT_STEPS = 60  # to a loss of about 0.05
SCORE_TOLERANCE = 1e-4  # of a match probability in float32
Texts = list[tuple[Tensor, Tensor]]  # for each image one caption: ids and mask


class Numbers:
    """A tokenizer whose words are numbers: the vocabulary of random weights means nothing."""

    def __init__(self, med: Med):
        self.text = med.config.text

    def __call__(self, captions: Sequence[str], max_tokens: int, prompt: str = "") -> tuple[np.ndarray, None]:
        return np.array([[self.text.cls_id, self.text.sep_id]] * len(captions)), None

    def decode(self, token_ids: Sequence[Sequence[int]]) -> list[str]:
        return [" ".join(map(str, row)) for row in token_ids]


def make_med(size: Size, batch: Batch) -> Med:
    """Random weights but for a decoder that says the captions of the batch."""
    med = Med(MedConfig(size.vision, size.text)).to(DEVICE)
    med.vision_model.requires_grad_(False)
    with torch.no_grad():
        image_BND = med.encode_image(batch.pixels.to(DEVICE))
    ids_BT, mask_BT = batch.token_ids.to(DEVICE), batch.token_mask.to(DEVICE)
    optimizer = torch.optim.AdamW([each for each in med.parameters() if each.requires_grad], 5e-4)
    for _ in range(FIT_STEPS):
        hidden_BTD = med.decode_hidden(ids_BT[:, :-1], mask_BT[:, :-1], med.project_image(image_BND))
        cross_entropy(med.lm_head(hidden_BTD[mask_BT[:, 1:]]), ids_BT[:, 1:][mask_BT[:, 1:]]).backward()
        optimizer.step()
        optimizer.zero_grad()
    return med.eval()


@torch.inference_mode()
def write_ours(med: Med, pixels: Tensor, config: GenerationConfig) -> tuple[Tensor, Tensor]:
    """Token ids and how many of them were written."""
    image = med.project_image(med.encode_image(pixels))
    found = generate(med, image, Numbers(med), config, draw_ids=torch.arange(len(pixels)))  # type: ignore[arg-type]
    return found.token_ids, found.tokens


@torch.inference_mode()
def write_stock(captioner: BlipForConditionalGeneration, pixels: Tensor, config: GenerationConfig) -> Tensor:
    sampling = {"do_sample": True, "top_p": config.top_p, "top_k": 0} if config.strategy == "nucleus" else {}
    return captioner.generate(
        pixels,
        max_length=config.max_tokens,
        min_length=config.min_tokens,
        num_beams=config.beams if config.strategy == "beam" else 1,
        repetition_penalty=config.penalty,
        **sampling,
    ).cpu()


@torch.inference_mode()
def judge_ours(med: Med, pixels: Tensor, texts: Texts) -> Tensor:
    """(captions an image, images) match probabilities: each image with its caption of every column of `texts`."""
    count = len(pixels)
    token_ids, token_mask = (torch.cat(parts) for parts in zip(*texts, strict=True))
    images, rows = np.tile(np.arange(count), len(texts)), np.arange(count * len(texts))
    logits = scoring.match_logits(
        med, med.encode_image(pixels), token_ids, token_mask, images, rows, batch_images=count
    )
    return scoring.match_probabilities(logits).view(len(texts), -1)


@torch.inference_mode()
def judge_stock(
    judge: BlipForImageTextRetrieval, pixels: Tensor, texts: list[tuple[Tensor, Tensor]], enc_id: int
) -> Tensor:
    scores = [
        judge(with_first(ids, enc_id).to(DEVICE), pixels, attention_mask=mask.long().to(DEVICE)).itm_score.float()
        for ids, mask in texts
    ]
    return torch.stack([score.softmax(-1)[:, 1].cpu() for score in scores])


def assert_equal_captions(
    med: Med, captioner: BlipForConditionalGeneration, pixels: Tensor, stock_pixels: Tensor
) -> int:
    """How many distinct captions both wrote by beam search.

    Raises:
        AssertionError: a caption differs; on a GPU more than one in twenty, whose beams are level but for rounding.
    """
    text = med.config.text

    def words(token_ids: Tensor) -> list[tuple[int, ...]]:
        rows = [row[1:] for row in token_ids.tolist()]
        ends = (text.sep_id, text.pad_id)
        return [tuple(row[: next((at for at, token in enumerate(row) if token in ends), None)]) for row in rows]

    ours, stock = words(write_ours(med, pixels, BEAM)[0]), words(write_stock(captioner, stock_pixels, BEAM))
    differing = [pair for pair in zip(ours, stock, strict=True) if pair[0] != pair[1]]
    assert len(differing) <= (len(ours) // 20 if DEVICE == "cuda" else 0), differing
    return len({*ours})


@torch.inference_mode()
def assert_equal_chances(
    med: Med, captioner: BlipForConditionalGeneration, pixels: Tensor, stock_pixels: Tensor, draws: int = 20_000
) -> float:
    """The largest difference in the chance of any next token after two words, ours taken by many draws.

    Raises:
        AssertionError: it is more than the two draws that an interval's ends can be off by, and rounding.
    """
    text, device = med.config.text, pixels.device
    prefix_BT = torch.tensor([[text.dec_id, 1001, 1002]], device=device).expand(4, -1)
    image = med.encode_image(pixels[:4])
    logits_BV = captioner.text_decoder(
        prefix_BT, encoder_hidden_states=captioner.vision_model(stock_pixels[:4]).last_hidden_state, is_decoder=True
    ).logits[:, -1]
    steps = LogitsProcessorList([RepetitionPenaltyLogitsProcessor(NUCLEUS.penalty), TopPLogitsWarper(NUCLEUS.top_p)])
    stock_BV = steps(prefix_BT, logits_BV).softmax(-1)
    own_BV = med.decode_logits(prefix_BT, None, med.project_image(image))[:, -1].float()
    own_BV = RepetitionPenaltyLogitsProcessor(NUCLEUS.penalty)(prefix_BT, own_BV)
    grid = (torch.arange(draws, dtype=torch.float64, device=device) + 0.5) / draws
    worst = 0.0
    for own_V, stock_V in zip(own_BV, stock_BV, strict=True):
        token = torch.cat(
            [draw_from_nucleus(own_V.expand(len(part), -1), NUCLEUS.top_p, part) for part in grid.split(500)]
        )
        worst = max(worst, (token.bincount(minlength=len(own_V)) / draws - stock_V).abs().max().item())
    assert worst < 2 / draws + 1e-4, worst
    return worst


def measure(name: str, rounds: int) -> dict[str, Any]:
    size, images = SIZES[name], SIZES[name].batch
    read, other = make_batches(size), make_batches(size, seed=1)["ours"]
    batch, pixels, stock_pixels = read["ours"], read["ours"].pixels.to(DEVICE), read["stock"].pixels.to(DEVICE)
    longest = max(part.token_ids.shape[1] for part in (batch, other))
    texts = [
        tuple(pad(part, (0, longest - part.shape[1])) for part in (each.token_ids, each.token_mask))  # 0: [PAD], False
        for each in (batch, other)
    ]
    med = make_med(size, batch)
    with tempfile.TemporaryDirectory() as folder:
        export_med(copy.deepcopy(med).cpu(), Path(folder), None, {"size": size.vision.image_size})
        captioner = BlipForConditionalGeneration.from_pretrained(Path(folder) / "captioning").eval().to(DEVICE)
        judge = BlipForImageTextRetrieval.from_pretrained(Path(folder) / "retrieval").eval().to(DEVICE)
    enc_id = size.text.enc_id
    difference = (judge_ours(med, pixels, texts) - judge_stock(judge, stock_pixels, texts, enc_id)).abs().max().item()
    assert difference < SCORE_TOLERANCE, difference
    found: dict[str, Any] = {
        "images": images,
        "distinct_beam_captions": assert_equal_captions(med, captioner, pixels, stock_pixels),
        "difference_nucleus_chance": assert_equal_chances(med, captioner, pixels, stock_pixels),
        "difference_match_probability": difference,
        "tokens_mean": {
            config.strategy: write_ours(med, pixels, config)[1].float().mean().item() for config in (BEAM, NUCLEUS)
        },
    }
    work: dict[str, tuple[int, dict[str, Callable[[], Any]]]] = {
        "images encoded, in all below": (
            images,
            {"ours": lambda: med.encode_image(pixels), "stock": lambda: captioner.vision_model(stock_pixels)},
        )
    }
    work |= {
        f"captions, {config.strategy}": (
            images,
            {
                "ours": lambda config=config: write_ours(med, pixels, config),
                "stock": lambda config=config: write_stock(captioner, stock_pixels, config),
            },
        )
        for config in (BEAM, NUCLEUS)
    }
    for count in (1, 2):
        work[f"pairs, {count} an image"] = (
            count * images,
            {
                "ours": lambda count=count: judge_ours(med, pixels, texts[:count]),
                "stock": lambda count=count: judge_stock(judge, stock_pixels, texts[:count], enc_id),
            },
        )
    for precision, dtype in PRECISIONS.items():
        for task, (items, variants) in work.items():
            with torch.autocast(DEVICE, dtype, enabled=precision == "bfloat16"), torch.inference_mode():
                times = interleaved(variants, rounds, warmup=1, limit_seconds=LIMIT_SECONDS)
            found[f"{task}, {precision}"] = {
                **{who: {**took, "per_second": items / took["seconds"]} for who, took in times.items()},
                "speedup": times["stock"]["seconds"] / times["ours"]["seconds"],
                "speedup_cpu_seconds": times["stock"]["cpu_seconds"] / times["ours"]["cpu_seconds"],
            }
    return found


def main(command: str, rounds: int) -> str:
    found: dict[str, Any] = {"circumstances": circumstances(command)}
    found |= {name: measure(name, rounds) for name in SIZES}
    rows: list[list[str]] = []
    for name in SIZES:
        for task, part in found[name].items():
            if isinstance(part, dict) and "speedup" in part:
                ours, stock = part["ours"]["per_second"], part["stock"]["per_second"]
                ratios = [f"**{part['speedup']:.2f}x**", f"{part['speedup_cpu_seconds']:.2f}x"]
                rows.append([f"{name}, {found[name]['images']} images", task, f"{ours:.1f}", f"{stock:.1f}", *ratios])
    reading = (
        "Captions written and pairs judged, from pixels on: ours against stock `generate` and the stock ITM call on "
        "the same weights. Beam captions are the same, match probabilities and the chances of a sampled token agree."
    )
    heads = ["size", "what a second", "ours", "stock", "speed-up", "by CPU seconds"]
    return write("capfilt", found, heads, rows, reading)
