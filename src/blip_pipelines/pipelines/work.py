"""Work that a node does in its own process, found again by what goes into it; and the record of a run.

Nothing of training is imported here, so that a stage that does not train does not depend on its code.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from blip_pipelines.config import speed_only
from blip_pipelines.data.storage import content_hash, read_json, write_json
from blip_pipelines.jobs.closure import closure, code_hash
from blip_pipelines.jobs.receipt import INDEX, Receipt, fingerprint

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class WorkConfig:
    """The part of a `launch` block that concerns work in the Kedro process.

    Args:
        force: do it again, whatever is there.
        work: the folder that notes what was done.
    """

    force: bool = speed_only(False)
    work: str = speed_only("data/.work")


@dataclass(frozen=True)
class Work:
    """A piece of work by the hashes of its parameters, inputs and code, as `launch` knows jobs.

    Args:
        job: the first of its modules.
        code: hash of the import closure of all of them.
        index: the file that notes what came out.
    """

    job: str
    fingerprint: str
    code: str
    index: Path
    force: bool

    @classmethod
    def of(cls, modules: Sequence[str], decides: Any, inputs: Mapping[str, str], config: WorkConfig) -> "Work":
        name = fingerprint(modules[0], decides, inputs)
        index = Path(config.work) / INDEX / f"{name}.json"
        return cls(modules[0], name, code_hash(closure(modules)), index, config.force)

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
