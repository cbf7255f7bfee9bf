"""From a node to a job and back: the receipt, its curves and the record of the run."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from blip_pipelines.jobs.receipt import Receipt
from blip_pipelines.pipelines.parameters import Stage
from blip_pipelines.pipelines.work import run_record


class Launched(NamedTuple):
    """What a stage's node gets back, and the outputs of one that trains.

    Attributes:
        receipt: of the finished job.
        history: rows {"step": n, name: value}, the whole curve also after a resume.
        record: seconds, speeds, run id and date; the report alone reads it.
    """

    receipt: Receipt
    history: list[dict[str, float]]
    record: dict[str, Any]


def launched(job: str, stage: Stage, inputs: Mapping[str, Path], prefix: str = "") -> Launched:
    """Run the job, or find it done; its curves go to the stage's MLflow run as they grow.

    Args:
        prefix: of the curves' names there, in a stage with several trainings.
    """
    from blip_pipelines.jobs.launch import launch
    from blip_pipelines.tracking import runs

    history: list[dict[str, float]] = []

    def on_history(rows: Any) -> None:
        history.extend(rows)
        runs.log_history({name if name == "step" else prefix + name: row[name] for name in row} for row in rows)

    receipt = launch(job, stage.values, inputs, stage.launch, on_history)
    return Launched(receipt, history, run_record(receipt))
