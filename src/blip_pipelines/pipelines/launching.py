"""From a node to a job and back: the receipt, its curves and the record of the run."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from blip_pipelines.data.storage import content_hash, read_json, write_json
from blip_pipelines.jobs.closure import closure, code_hash
from blip_pipelines.jobs.receipt import INDEX, Receipt, fingerprint
from blip_pipelines.pipelines.parameters import Stage

if TYPE_CHECKING:
    from blip_pipelines.jobs.launch import LaunchConfig

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Launched:
    """What a stage's node gets back.

    Args:
        receipt: of the finished job.
        history: rows {"step": n, name: value}, the whole curve also after a resume.
        record: seconds, speeds, run id and date; the report alone reads it.
    """

    receipt: Receipt
    history: list[dict[str, float]]
    record: dict[str, Any]


def launched(job: str, stage: Stage, inputs: Mapping[str, Path]) -> Launched:
    """Run the job, or find it done; its curves go to the stage's MLflow run as they grow."""
    from blip_pipelines.jobs.launch import launch
    from blip_pipelines.tracking import runs

    history: list[dict[str, float]] = []

    def on_history(rows: Any) -> None:
        history.extend(rows)
        runs.log_history(rows)

    receipt = launch(job, stage.values, inputs, stage.launch, on_history)
    return Launched(receipt, history, run_record(receipt))


@dataclass(frozen=True)
class Work:
    """Work that a node does itself, found again by what goes into it, as `launch` finds jobs.

    Args:
        job: its first module.
        fingerprint: of parameters and inputs; `code` of the modules' import closure.
        index: the file that notes what came out.
        force: do it again, whatever is there.
    """

    job: str
    fingerprint: str
    code: str
    index: Path
    force: bool

    @classmethod
    def of(cls, modules: Sequence[str], decides: Any, inputs: Mapping[str, str], launch: "LaunchConfig") -> "Work":
        name = fingerprint(modules[0], decides, inputs)
        index = Path(launch.work) / INDEX / f"{name}.json"
        return cls(modules[0], name, code_hash(closure(modules)), index, launch.force)

    def find(self, outputs: Mapping[str, Path]) -> Receipt | None:
        """The receipt, if this work was done with this code and its outputs lie there unaltered."""
        if self.force or not self.index.exists() or (entry := read_json(self.index))["code"] != self.code:
            return None
        if entry["outputs"] != {name: content_hash(path) for name, path in outputs.items() if path.exists()}:
            return None
        log.info("%s: nothing changed, taking %s", self.job, ", ".join(path.name for path in outputs.values()))
        folder = next(iter(outputs.values()))
        return Receipt(self.job, self.fingerprint, self.code, folder, entry["facts"], entry["seconds"], reused=True)

    def note(self, outputs: Mapping[str, Path], facts: dict[str, Any], seconds: float) -> Receipt:
        """Note outputs that are finished, if not yet in their place: they are known by content."""
        found = {name: content_hash(path) for name, path in outputs.items()}
        write_json(self.index, {"code": self.code, "facts": facts, "seconds": seconds, "outputs": found})
        return Receipt(self.job, self.fingerprint, self.code, next(iter(outputs.values())), facts, seconds)


def run_record(receipt: Receipt) -> dict[str, Any]:
    """What differs between two runs that made the same bytes, kept apart from them."""
    from blip_pipelines.tracking import runs

    run = runs.current()
    return {
        "job": receipt.job,
        "fingerprint": receipt.fingerprint,
        "code": receipt.code,
        "seconds": receipt.seconds,
        "reused": receipt.reused,
        "facts": receipt.facts,
        "mlflow_run": run.id if run else None,
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        **receipt.speed,
    }
