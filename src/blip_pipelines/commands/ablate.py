"""`kedro ablate`: the runs of `conf/ablations.yml`, each a `kedro run` in a data folder of its own.

A run's environment lies beside its results, `data/ablations/<run>/<seed>/`. Trainings that two runs have in common
are found by their fingerprint and done once; a run that was cut goes on where it was. On a CPU they go side by side, a
core each, so that sums round differently from the default run, which has all cores.
"""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from blip_pipelines.commands.side_by_side import Task, perform, places

if TYPE_CHECKING:
    from blip_pipelines.evaluation.ablation import Ablations, Run

CONFIG = Path("conf/ablations.yml")
RUNS = Path("data/ablations")
RESULT = Path("data/08_reporting/ablations.json")
RUN_BYTES = 4 << 30  # of memory that a run of the default's size may take


@click.command()
@click.argument("names", nargs=-1)
@click.option("--seed", "seeds", type=int, multiple=True, help="Only these of the configured seeds.")
@click.option("--parallel", type=click.IntRange(1), help="Side by side; else one a core and 4 GiB, one with a GPU.")
@click.option("--collect", "only_collect", is_flag=True, help="Run nothing: tables of what is there.")
def ablate(names: tuple[str, ...], seeds: tuple[int, ...], parallel: int | None, only_collect: bool) -> None:
    """Run the ablations of conf/ablations.yml and write data/08_reporting/ablations.json.

    NAMES are of tables, or of single runs by their first row; all if none is given.
    """
    from blip_pipelines.data.storage import write_json
    from blip_pipelines.evaluation.ablation import collect

    configured = read_ablations(CONFIG)
    known: dict[str, tuple[Run, ...]] = {run.name: (run,) for table in configured.tables.values() for run in table.runs}
    known |= {name: table.runs for name, table in configured.tables.items()}
    for name in names:
        if name not in known:
            raise click.UsageError(f"{name} is no table and no run of {CONFIG}; there are {', '.join(known)}")
    wanted = [
        (run, seed)
        for name in names or configured.tables
        for run in known[name]
        for seed in run.seeds
        if not seeds or seed in seeds
    ]
    tasks = {} if only_collect else {(run.name, seed): _task(run, seed, configured.seeded) for run, seed in wanted}
    failed = perform([*tasks.values()], parallel or places(RUN_BYTES)) if tasks else []
    write_json(RESULT, collect(configured.tables, RUNS))
    click.echo(f"{RESULT}: written; `kedro run --pipelines release` puts it into the report")
    if failed:
        folders = ", ".join(task.folder.as_posix() for task in failed)
        raise click.ClickException(f"{folders}: failed, see above; mend it, and `kedro ablate` goes on there")


def read_ablations(path: Path) -> "Ablations":
    """The file, checked.

    Raises:
        ConfigError: a key that nothing reads, or a comparison with a line that is in no run.
    """
    import yaml

    from blip_pipelines.config import ConfigError, read
    from blip_pipelines.evaluation.ablation import Ablations

    found = read(Ablations, yaml.safe_load(path.read_text("utf-8")), "ablations")
    for name, table in found.tables.items():
        known = [row for run in table.runs for row in run.rows]
        for row in [*table.better, *table.better.values()]:
            if row not in known:
                raise ConfigError(f"ablations.tables.{name}.better: {row} is no row; there are {', '.join(known)}")
    return found


def _task(run: "Run", seed: int, seeded: tuple[str, ...]) -> Task:
    folder = RUNS / run.name / str(seed)
    nodes = write_environment(run, seed, seeded, folder)
    environment = Path("..") / folder / "conf"  # seen from conf/
    command = [sys.executable, "-m", "kedro", "run", "--env", environment.as_posix(), "--nodes", ",".join(nodes)]
    return Task(f"ablation {', '.join(run.rows)}, seed {seed}", command, folder)


def write_environment(run: "Run", seed: int, seeded: tuple[str, ...], folder: Path) -> list[str]:
    """Write `<folder>/conf` for a run, and return the names of its nodes, its evaluations among them."""
    import yaml
    from kedro.config import OmegaConfigLoader
    from kedro.framework.project import pipelines

    from blip_pipelines.data.storage import write_atomic
    from blip_pipelines.evaluation.ablation import measures_file
    from blip_pipelines.tracking.dvc import catalog_entries

    chosen = sum((pipelines[stage] for stage in run.stages), start=pipelines["__default__"].only_nodes())
    evaluators = {node.name: node for node in pipelines["evaluation"].nodes}
    measured = {stage: evaluators.get(f"evaluate_{stage}") or evaluators[f"ask_{stage}"] for stage in run.rows.values()}
    chosen += pipelines["evaluation"].only_nodes(*(node.name for node in measured.values()))
    base = OmegaConfigLoader("conf", base_env="base", default_run_env="base")["catalog"]
    entries = catalog_entries(base, chosen.inputs() | set(run.instead.values()))
    entries |= {name: entries[other] for name, other in run.instead.items()}
    # What others made is read where they left it; places are where this run writes, and stay in its own folder.
    catalog = {name: entry for name, entry in entries.items() if "filepath" in entry}
    for stage, node in measured.items():
        _predictions, measures, _record = node.outputs
        path = measures_file(folder, stage).as_posix()
        catalog[measures] = {"type": "blip_pipelines.pipelines.datasets.Json", "filepath": path}
    parameters: dict[str, Any] = {}
    for name, value in {**dict.fromkeys(seeded, seed), **run.parameters}.items():
        *blocks, key = name.split(".")
        place = parameters
        for block in blocks:
            place = place.setdefault(block, {})
        place[key] = value
    files = {"globals": {"data": folder.as_posix()}, "catalog": catalog, "parameters": parameters}
    for name, content in files.items():
        write_atomic(folder / "conf" / f"{name}.yml", yaml.safe_dump(content, sort_keys=False))
    return [node.name for node in chosen.nodes]
