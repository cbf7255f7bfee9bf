from dataclasses import fields

import numpy as np
import pytest
import torch
from instruct_samples import tiny_instructblip, tokens_of
from instruction_samples import letters, open_letters

from blip_pipelines.config import ConfigError
from blip_pipelines.data.instruction_loader import InstructionBatch, InstructionLoader
from blip_pipelines.data.instruction_tokens import TokenLimits
from blip_pipelines.data.instructions import Instructions
from blip_pipelines.data.loader import DecodedPixels
from blip_pipelines.data.mixture import InstructionOrder
from blip_pipelines.data.order import draw
from blip_pipelines.data.transforms import ImageConfig


@pytest.fixture(scope="module")
def table(tmp_path_factory) -> Instructions:
    numbers = letters(answer="{number}", templates=["What is the number on it ?"])
    folder = tmp_path_factory.mktemp("data")
    return open_letters(folder, [12, 9], letters=letters(), numbers=numbers).select(split="train")


def load(table, limits=TokenLimits(instruction=3, question=9, answer=9), **options) -> list[list[InstructionBatch]]:  # noqa: B008
    order = InstructionOrder.of(table, seed=3)
    images = DecodedPixels(table, ImageConfig(size=8), seed=5, train=True)
    tokens = tokens_of(tiny_instructblip("llama", "chat"), limits)
    return list(
        InstructionLoader(table, order, images, tokens, 7, **{"batch_samples_global": 8, "steps": 4, **options})
    )


def tensors(batch) -> dict[str, torch.Tensor]:
    values = {field.name: getattr(batch, field.name) for field in fields(batch)}
    return {name: value for name, value in values.items() if isinstance(value, torch.Tensor)}


def test_a_step_is_what_the_mixture_the_table_and_the_tokenizers_say(table):
    batch = load(table)[2][0]
    rows = InstructionOrder.of(table, seed=3).rows(2 * 8, 8)
    tokens = tokens_of(tiny_instructblip("llama", "chat"), TokenLimits(instruction=3, question=9, answer=9))
    answers = tokens.for_answers(table.targets(rows, draw(7, 2, "answer", 0, 8)[:, 0]))
    read, question = tokens.for_language(table.instructions(rows)), tokens.for_former(table.instructions(rows))
    for name, expected in (
        ("token_ids", answers.ids),
        ("token_mask", answers.mask),
        ("read_ids", read.ids),
        ("read_mask", read.mask),
        ("question_ids", question.ids),
        ("question_mask", question.mask),
        ("image_ids", table.image_ids[rows]),
        ("cut", np.stack([read.cut, question.cut, answers.cut], 1)),
        ("pixels", DecodedPixels(table, ImageConfig(size=8), 5, True)(rows, step=2)),
    ):
        assert np.array_equal(getattr(batch, name), expected), name
    assert batch.target_tokens == answers.mask[:, 1:].sum() and batch.prompt_tokens == 0
    assert batch.cut[:, 0].max() > 0


@pytest.mark.parametrize(("ranks", "accumulation"), [(2, 1), (2, 2)])
def test_parts_of_the_ranks_make_up_the_global_batch(table, ranks, accumulation):
    whole = load(table, accumulation=accumulation)
    parts = [load(table, accumulation=accumulation, rank=rank, ranks=ranks, workers=rank) for rank in range(ranks)]
    for step in range(4):
        for micro in range(accumulation):
            mine = [part[step][micro] for part in parts]
            for name, expected in tensors(whole[step][micro]).items():
                assert torch.equal(torch.cat([getattr(batch, name) for batch in mine]), expected), name
            assert {batch.target_tokens for batch in mine} == {whole[step][micro].target_tokens}


def test_starting_at_a_step_equals_skipping_to_it(table):
    whole = load(table, steps=5)
    rest = load(table, steps=5, start_step=3)
    for found, expected in zip(rest, whole[3:], strict=True):
        assert all(torch.equal(value, tensors(expected[0])[name]) for name, value in tensors(found[0]).items())


def test_a_batch_moves_whole(table):
    batch = load(table)[0][0].to("cpu")
    assert isinstance(batch, InstructionBatch) and batch.read_ids.shape[0] == 8


def test_a_batch_that_ranks_cannot_share_is_refused(table):
    with pytest.raises(ConfigError, match="batch_samples_global is 8"):
        load(table, ranks=3)
