"""Does stock `transformers` load an exported folder whole, and say the same? What the gate asks of every export.

Differences are the largest over all outputs, on pictures and texts that are drawn with a fixed seed, as a share of the
largest output where that is above 1: so does rounding grow. Both run in float32, whatever the weights are kept in: half
precision rounds more than what a wrong export would show.
"""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from blip_pipelines.data.instruction_tokens import InstructionTokens, TokenLimits
from blip_pipelines.data.tokens import CaptionTokenizer
from blip_pipelines.models import question_answering
from blip_pipelines.models.blip2_exports import load_blip2
from blip_pipelines.models.exports import BLIP2_NOTE, NOTE, STOCK, load_med, quietly
from blip_pipelines.models.stem import lay_out
from blip_pipelines.models.text import with_first

TEXTS = ("a picture of it", "one", "what this is", "here is a house")
PICTURES = len(TEXTS)
MAX_TOKENS = 16
PROBLEMS = ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs")


def reload_differences(folder: Path) -> dict[str, float | str]:
    """By stock folder the largest difference of its outputs to ours, or what went wrong; {} where there is none."""
    found: dict[str, float | str] = {}
    for note, check in CHECKS.items():
        if (folder / note).exists():
            for kind, differ in check(folder).items():
                try:
                    found[kind] = differ()
                except _Unclean as error:
                    found[kind] = str(error)
                except Exception as error:  # whatever stops a stock class is the answer to the question
                    found[kind] = f"{type(error).__name__}: {error}"
    return found


class _Unclean(ValueError):
    """A stock class that does not find its weights, or finds others."""


def _reload(stock: Any, folder: Path) -> Any:
    with quietly():
        model, report = stock.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    problems = [f"{part}: {', '.join(sorted(map(str, report[part]))[:3])}" for part in PROBLEMS if report[part]]
    if problems:
        raise _Unclean(f"{stock.__name__} has {'; '.join(problems)}")
    return model.eval()


def _med(folder: Path) -> Mapping[str, Callable[[], float]]:
    if (folder / question_answering.KIND).is_dir():
        return {question_answering.KIND: partial(_answering, folder)}
    exported = load_med(folder)
    med, tokenizer = exported.med, exported.tokenizer
    assert tokenizer is not None
    pixels = _pictures(exported.image["size"])
    picture = lay_out(exported.stem(pixels)) if exported.stem else _normalised(pixels, med.config.vision)
    ids, mask = _texts(tokenizer, min(MAX_TOKENS, med.config.text.max_positions))

    def led_by(token: int) -> Tensor:
        led = ids.clone()
        led[:, 0] = token
        return led

    @torch.no_grad()
    def retrieval() -> float:
        stock = _reload(STOCK["retrieval"], folder / "retrieval")
        image_BND = exported.encode_image(pixels)
        similarity = stock(ids, picture, attention_mask=mask.long(), use_itm_head=False).itm_score
        matched = stock(led_by(tokenizer.enc), picture, attention_mask=mask.long()).itm_score
        ours = med.match_logits(ids, mask, med.project_image(image_BND))
        return max(
            _gap(med.image_features(image_BND) @ med.text_features(ids, mask).T, similarity), _gap(ours, matched)
        )

    @torch.no_grad()
    def captioning() -> float:
        stock = _reload(STOCK["captioning"], folder / "captioning")
        logits = stock(picture, led_by(tokenizer.dec), attention_mask=mask.long()).logits
        ours = med.decode_logits(ids, mask, med.project_image(exported.encode_image(pixels)))
        return _gap(ours[mask], logits[mask])

    checks = {"retrieval": retrieval, "captioning": captioning}
    return {kind: check for kind, check in checks.items() if (folder / kind).is_dir()}


@torch.no_grad()
def _answering(folder: Path) -> float:
    """Of questions and answers without padding, as the stock class attends to the padding of questions."""
    exported = question_answering.load_question_answering(folder)
    model, tokenizer = exported.model, exported.tokenizer
    stock = _reload(STOCK[question_answering.KIND], folder / question_answering.KIND)
    pixels, ids = _pictures(exported.image["size"]), _texts(tokenizer, min(MAX_TOKENS, model.config.text.max_positions))
    question_ids = answer_ids = ids[0][1:]
    seen = lay_out(exported.stem(pixels)) if exported.stem else _normalised(pixels, model.config.vision)
    image = model.encode_image(exported.stem(pixels) if exported.stem else pixels)
    question = model.read_question(image[1:], question_ids, ids[1][1:])
    led = stock.text_encoder(
        input_ids=with_first(question_ids, tokenizer.enc),
        encoder_hidden_states=stock.vision_model(seen[1:]).last_hidden_state,
    )[0]
    logits = stock.text_decoder(input_ids=with_first(answer_ids, tokenizer.dec), encoder_hidden_states=led).logits
    return _gap(model.decode_logits(answer_ids, None, question), logits)


def _blip2(folder: Path) -> Mapping[str, Callable[[], float]]:
    from transformers import (
        Blip2ForConditionalGeneration,
        Blip2ForImageTextRetrieval,
        InstructBlipForConditionalGeneration,
    )

    exported = load_blip2(folder)
    former, tower = exported.former, exported.tower.float()
    if exported.model is not None:
        exported.model.language.float()
    pixels = _pictures(exported.image["size"])
    picture = lay_out(tower.stem(pixels)) if tower.stem else _normalised(pixels, tower.vision)
    image = former.project_image(tower.encode(pixels))

    @torch.no_grad()
    def retrieval() -> float:
        stock, tokenizer = _reload(Blip2ForImageTextRetrieval, folder / "retrieval"), exported.tokenizer
        assert tokenizer is not None
        ids, mask = _texts(tokenizer, min(MAX_TOKENS, former.config.text.max_positions))
        similarity = torch.einsum(
            "iqe,te->iqt",
            former.image_features(former.encode_queries(image)[0]),
            former.text_features(ids, mask),
        ).amax(1)
        matched = stock(picture, ids, mask.long(), use_image_text_matching_head=True).logits_per_image
        expected = stock(picture, ids, mask.long()).logits_per_image
        return max(_gap(similarity, expected), _gap(former.match_logits(ids, mask, image), matched))

    def spoken(stock: Any, soft_BQW: Tensor, after_BS: Tensor, asked: Mapping[str, Tensor]) -> float:
        """Difference of the logits, of prompts without padding."""
        model = exported.model
        assert model is not None
        vocabulary = model.language.model.config.vocab_size
        token_ids, mask = map(torch.from_numpy, model.language.tokenizer(list(TEXTS), MAX_TOKENS))
        ours = model.lm_head(model.hidden(soft_BQW, token_ids, after_BS))
        placeholder = [stock.config.image_token_index] * former.config.queries
        before_BS = torch.tensor([[*model.before_ids, *placeholder]]).expand(len(TEXTS), -1)
        prompt = torch.cat([before_BS, after_BS], 1)
        if stock.config.text_config.is_encoder_decoder:
            logits = stock(picture, input_ids=prompt, decoder_input_ids=token_ids[:, :-1], **asked).logits
        else:
            whole = torch.cat([prompt, token_ids[:, 1:-1]], 1)
            logits = stock(picture, input_ids=whole, **asked).logits[:, prompt.shape[1] - 1 :]
        is_word = mask[:, 1:]
        return _gap(ours[is_word], logits[is_word][:, :vocabulary])

    @torch.no_grad()
    def generation() -> float:
        stock, model = _reload(Blip2ForConditionalGeneration, folder / "generation"), exported.model
        assert model is not None
        after_BS = torch.tensor([model.after_ids], dtype=torch.long).expand(len(TEXTS), -1)
        return spoken(stock, model.soft_prompts(image), after_BS, {})

    @torch.no_grad()
    def instruct() -> float:
        stock, model = _reload(InstructBlipForConditionalGeneration, folder / "instruct"), exported.model
        words = exported.tokenizer
        assert model is not None and words is not None
        # Cut to the shortest, as stock positions know no padding before an answer.
        read, question = (min(map(len, each.pieces(TEXTS))) for each in (model.language.tokenizer, words))
        limits = TokenLimits(instruction=read, question=question + 2)
        tokens = InstructionTokens(model.language.tokenizer, model.place, words, limits)
        ids, mask = map(torch.from_numpy, tokens.for_former(TEXTS)[:2])
        asked = {"qformer_input_ids": ids, "qformer_attention_mask": mask.long()}
        after_BS = torch.from_numpy(tokens.for_language(TEXTS).ids)
        return spoken(stock, model.soft_prompts(image, ids, mask), after_BS, asked)

    checks = {"retrieval": retrieval, "generation": generation, "instruct": instruct}
    return {kind: check for kind, check in checks.items() if (folder / kind).is_dir()}


CHECKS: dict[str, Callable[[Path], Mapping[str, Callable[[], float]]]] = {NOTE: _med, BLIP2_NOTE: _blip2}


def _pictures(size: int) -> Tensor:
    return torch.randint(
        0, 256, (PICTURES, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )


def _texts(tokenizer: CaptionTokenizer, length: int) -> tuple[Tensor, Tensor]:
    """(PICTURES, length) ids of drawn words behind [CLS] and before [SEP], one padded."""
    ids = torch.randint(0, len(tokenizer), (PICTURES, length), generator=torch.Generator().manual_seed(1))
    ids[:, 0], ids[:, -1] = tokenizer.cls, tokenizer.sep
    mask = torch.ones_like(ids, dtype=torch.bool)
    ids[0, length // 2], ids[0, length // 2 + 1 :] = tokenizer.sep, tokenizer.pad
    mask[0, length // 2 + 1 :] = False
    return ids, mask


def _normalised(pixels: Tensor, vision: Any) -> Tensor:
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (vision.mean, vision.std))
    return (pixels / 255 - mean) / std


def _gap(ours: Tensor, theirs: Tensor) -> float:
    largest = max(float(theirs.float().abs().max()), 1.0)
    return float((ours.float() - theirs.float()).abs().max()) / largest
