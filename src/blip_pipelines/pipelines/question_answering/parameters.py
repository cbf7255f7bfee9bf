"""The block `question_answering`. It imports what it configures, torch included."""

from dataclasses import dataclass
from typing import Literal

from blip_pipelines.jobs.question_answering import QuestionAnsweringConfig


@dataclass(frozen=True)
class QuestionAnsweringStage(QuestionAnsweringConfig):
    """`QuestionAnsweringConfig`, and which MED learns: that of the noisy corpus, or the last one."""

    start: Literal["before_capfilt", "after_capfilt"] = "after_capfilt"
