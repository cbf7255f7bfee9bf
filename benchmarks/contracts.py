"""What it takes to judge ten million caption rows by the contracts: summary tables, near-duplicates, all rules."""

import tempfile
from pathlib import Path
from typing import Any

from benchmarks.measure import circumstances, in_process, write
from benchmarks.scale import ROWS, SHARD, write_data_set
from blip_pipelines.data.contracts import ContractsConfig, check
from blip_pipelines.data.quality import summarise


def summaries(folder: Path) -> None:
    summarise(folder / "pairs", folder / "images")


def judge(folder: Path) -> None:
    """As the stage does after ingestion."""
    tables = summarise(folder / "pairs", folder / "images")
    results = check(folder / "pairs", tables, ContractsConfig(), folder / "docs")
    assert {result.rule for result in results} >= {"caption_characters", "near_duplicates"}


def main(command: str, rounds: int) -> str:
    found: dict[str, Any] = {"circumstances": circumstances(command)}
    parts = {"summary tables": summaries, "these and all rules": judge}
    for rows in (ROWS // 100, ROWS // 10, ROWS):
        with tempfile.TemporaryDirectory() as temporary:
            write_data_set(Path(temporary), rows, fingerprints=True)
            found[str(rows)] = {name: in_process(call, Path(temporary)) for name, call in parts.items()}
    lines = [
        [
            f"{int(rows):,}",
            name,
            *(f"{each[of]:,.1f}" for of in ("seconds", "cpu_seconds")),
            *(f"{value:,.0f}" for value in (each["peak_mb"], each["peak_mb"] - each["before_mb"])),
        ]
        for rows, of_rows in found.items()
        if rows != "circumstances"
        for name, each in of_rows.items()
    ]
    reading = (
        f"Caption tables as ingestion leaves them, {SHARD:,} rows a shard, judged in a process of its own: what holds "
        "of the whole set on summary tables, near-duplicates included, and rules over rows some hundred thousand at a "
        "time, to the Data Docs. Memory is the peak of the process, and what of that came after its imports."
    )
    heads = ["rows", "what", "seconds", "CPU seconds", "peak MB", "of that, new"]
    return write("contracts", found, heads, lines, reading)
