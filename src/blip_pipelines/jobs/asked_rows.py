"""The held-out rows of an instruction table: which are asked, each data set by its own metric, whoever answers.

An answer is chosen from the candidates where a row has any, or written. Every rank asks its share of the rows; the
first measures and writes `evaluation.answers.PREDICTIONS`, one row a question.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from blip_pipelines.config import ConfigError, speed_only
from blip_pipelines.data.instructions import Instructions
from blip_pipelines.evaluation.answers import ROLES, measure_answers, write_answers
from blip_pipelines.inference.answering import Answered
from blip_pipelines.jobs.instruction_answers import Asked, Asking, answers_of, drawn_rows
from blip_pipelines.jobs.receipt import OUTPUTS
from blip_pipelines.jobs.training_data import Images
from blip_pipelines.models.precision import Precision, is_half
from blip_pipelines.training.distributed import World

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class AskedRowsConfig:
    """Which rows are asked.

    Args:
        split: of the rows.
        data_sets: to ask; null for all.
        rows: of each data set, drawn by a hash, so that every model is asked the same; null for all.
        rows_by_role: for `held_in` or `held_out`, in place of that.
        frames: of a video.
        bootstrap_draws: for the interval of the gain over one answer for all.
    """

    split: str = "test"
    data_sets: tuple[str, ...] | None = None
    rows: int | None = None
    rows_by_role: dict[str, int | None] = field(default_factory=dict)
    frames: int = 4
    bootstrap_draws: int = 10_000
    seed: int = 0
    precision: Precision = "float32"
    batch_rows: int = speed_only(32)

    def __post_init__(self) -> None:
        if unknown := sorted(set(self.rows_by_role) - set(ROLES)):
            raise ConfigError(f"rows_by_role: no role {unknown[0]!r}; there are {', '.join(ROLES)}")

    def rows_of(self, inputs: Mapping[str, Path], job: str) -> Instructions:
        """The rows, from the inputs `instructions` and `images`.

        Raises:
            ConfigError: there are none; the message names the job.
        """
        view = Instructions.open(inputs["instructions"], inputs["images"])
        view = view.select(split=self.split, data_set=self.data_sets)
        roles = np.array(view.values("role", np.arange(len(view))))
        drawn = [np.empty(0, np.int64)]
        for role in ROLES:
            of_role = np.flatnonzero(roles == role)
            rows = self.rows_by_role.get(role, self.rows)
            drawn.append(of_role[drawn_rows(view.select(rows=of_role), rows, self.seed)])
        view = view.select(rows=np.sort(np.concatenate(drawn)))
        if not len(view):
            raise ConfigError(f"{job}: no row of split {self.split!r} in the chosen data sets")
        return view


def ask(
    view: Instructions,
    answerer_of: Callable[[str], Asked],
    images: Images,
    settings: AskedRowsConfig,
    most_candidates: int | None,
    work: Path,
    world: World,
) -> dict[str, Any]:
    """Ask every row of the view; facts: `metrics`, flat, as `evaluation.answers.AnswerMetrics`, and `rows`.

    Args:
        answerer_of: what answers, by task.
        images: as the models' `see` takes them.
        most_candidates: see `Asking`.
    """
    mine = np.array_split(np.arange(len(view)), world.ranks)[world.rank]
    answerers = {task: answerer_of(task) for task in set(view.values("task", np.arange(len(view))))}
    asking = Asking(settings.frames, most_candidates, settings.batch_rows)
    with torch.autocast(world.device.type, torch.bfloat16, enabled=is_half(settings.precision)):
        answers = answers_of(answerers, view, images, mine, asking)
    answers = [answer for share in world.gather_objects(answers) for answer in share]
    metrics: dict[str, float] = {}
    if world.is_first:
        metrics = _measure(view, answers, settings.bootstrap_draws, settings.seed, work / OUTPUTS)
    return {"metrics": metrics, "rows": len(view)}


def _measure(view: Instructions, answers: Sequence[Answered], draws: int, seed: int, outputs: Path) -> dict[str, float]:
    """Flat metrics, as `evaluation.answers.AnswerMetrics`, of all rows; writes and logs them.

    Args:
        draws, seed: of the bootstrap of the gain over one answer for all.
    """
    texts, scores = [answer.text for answer in answers], [answer.scores for answer in answers]
    metrics, rows = measure_answers(view, texts, scores, draws, seed)
    write_answers(outputs, rows)
    for role in [role for role in ROLES if f"accuracy/{role}" in metrics]:
        log.info(
            "%-8s accuracy %.3f   one answer for all %.3f   difference %+.3f (%+.3f to %+.3f)",
            role.replace("_", " "),
            *(metrics[f"{name}/{role}"] for name in ("accuracy", "majority", "accuracy_gain")),
            *(metrics[f"accuracy_gain_{end}/{role}"] for end in ("low", "high")),
        )
    return metrics
