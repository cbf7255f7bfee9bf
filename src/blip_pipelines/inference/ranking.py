"""Closed answers: of a list of candidates the likeliest, given the picture and the instruction (InstructBLIP 2.6).

A candidate's score is its log-probability, its end included. Picture and instruction are read once, as keys and values
or as an encoder's states, and candidates go on from there in batches.

Shapes: B rows, P pairs of a row and a candidate, T tokens of a candidate, R positions with a target, V vocabulary.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from blip_pipelines.data.instruction_tokens import InstructionTokens
from blip_pipelines.models.attention import at_least_float32
from blip_pipelines.models.language import LanguageModel, Reading

BATCH_ANSWERS = 64


@torch.no_grad()
def rank(
    language: LanguageModel,
    reading: Reading,
    tokens: InstructionTokens,
    candidates: Sequence[Sequence[str]],
    *,
    per_token: bool = False,
    batch_answers: int = BATCH_ANSWERS,
) -> list[np.ndarray]:
    """Scores of the candidates of each row, (C,) float64, the highest the best; C may differ from row to row.

    Args:
        reading: B rows, of `Blip2.read`.
        per_token: the mean over a candidate's tokens, instead of their sum: long ones are then not at a disadvantage.
        batch_answers: read at once; memory, not the result.
    """
    texts = [text for each in candidates for text in each]
    row_of_P = np.repeat(np.arange(len(candidates)), [len(each) for each in candidates])
    scores_P = np.empty(len(texts))
    # Of one length together, so that little is padding; rows in their order.
    answers = tokens.for_answers(texts)
    length_P = answers.mask.sum(1)
    device = reading.states.device
    order_P = np.lexsort((row_of_P, length_P))
    for chunk in (order_P[start : start + batch_answers] for start in range(0, len(order_P), batch_answers)):
        longest = int(length_P[chunk].max())
        ids, mask, rows = (
            torch.from_numpy(part).to(device)
            for part in (answers.ids[chunk, :longest], answers.mask[chunk, :longest], row_of_P[chunk])
        )
        found = log_probabilities(language, reading.select(rows), ids, mask)
        scores_P[chunk] = found.double().cpu().numpy()
    if per_token:
        scores_P /= length_P - 1
    return np.split(scores_P, np.cumsum([len(each) for each in candidates])[:-1])


def log_probabilities(language: LanguageModel, reading: Reading, token_ids_PT: Tensor, token_mask_PT: Tensor) -> Tensor:
    """(P,) at least float32, the sum over an answer's words and its end.

    Args:
        reading: a row for each answer.
        token_ids_PT: `start words end pad...`.
    """
    pair_R, place_R = token_mask_PT[:, 1:].nonzero(as_tuple=True)
    hidden_RW = language.ask(reading, token_ids_PT)[pair_R, place_R]
    logits_RV = at_least_float32(language.lm_head(hidden_RW))
    asked_R1 = token_ids_PT[:, 1:][pair_R, place_R][:, None]
    gained_R = logits_RV.gather(1, asked_R1)[:, 0] - logits_RV.logsumexp(1)
    return gained_R.new_zeros(len(token_ids_PT)).index_add_(0, pair_R, gained_R)
