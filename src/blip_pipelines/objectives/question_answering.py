"""Question answering: the LM loss on the answers, each weighted by its share of the annotators (BLIP 5.3).

Picture and question are read once, whatever the number of answers. The value of the whole global batch is

    sum over answers of weight * negative log-likelihood of the answer's tokens / number of questions,

or, with `per_token`, the same of its mean token.

Every value that `forward` returns is a *share* of it: they add up over ranks and micro-steps.

Shapes: B own questions, A their answers, T answer tokens, D width, R positions with a target, V vocabulary.
"""

from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from blip_pipelines.config import ConfigError
from blip_pipelines.data.question_loader import QuestionBatch
from blip_pipelines.models.attention import at_least_float32
from blip_pipelines.models.question_answering import QuestionAnswering


@dataclass(frozen=True)
class AnswerLossConfig:
    """Constants of the objective; the defaults are BLIP's.

    Args:
        per_token: an answer counts by the mean over its tokens in place of their sum, so that long ones, such as
            captions, do not outweigh a yes.
    """

    label_smoothing: float = 0.1
    per_token: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.label_smoothing <= 1:
            raise ConfigError(f"objective.label_smoothing: {self.label_smoothing} is outside 0 to 1")


class AnswerTraining(nn.Module):
    """The task that the training loop trains."""

    def __init__(self, model: QuestionAnswering, config: AnswerLossConfig):
        super().__init__()
        self.model, self.config = model, config

    def forward(self, batch: QuestionBatch, step: int) -> dict[str, Tensor]:
        """Losses of this rank's part of a micro-batch, scalars, each a share of the global value.

        Returns:
            "loss", with gradient, and "lm", the same without.
        """
        question = self.model.read_question(
            self.model.encode_image(batch.pixels), batch.question_ids, batch.question_mask
        )
        hidden_ATD = self.model.decode_hidden(
            batch.token_ids[:, :-1], batch.token_mask[:, :-1], question.select(batch.question_of)
        )
        answer_R, place_R = batch.token_mask[:, 1:].nonzero(as_tuple=True)
        logits_RV = at_least_float32(self.model.lm_head(hidden_ATD[answer_R, place_R]))
        asked_R = batch.token_ids[:, 1:][answer_R, place_R]
        loss_R = cross_entropy(logits_RV, asked_R, reduction="none", label_smoothing=self.config.label_smoothing)
        weights_A = batch.weights
        if self.config.per_token:
            weights_A = weights_A / batch.token_mask[:, 1:].sum(1)
        loss = (loss_R * weights_A[answer_R]).sum() / batch.samples
        return {"loss": loss, "lm": loss.detach()}
