"""Sources to shards: images per second and core against Pillow's decode limit, memory by size, kill and resume.

The limit is what Pillow needs to decode the same files, once whole and once at the reduced scale that a fingerprint
takes, hashing nothing and writing nothing. Ingestion reads, checks, decodes, hashes, fingerprints and writes.
"""

import csv
import io
import multiprocessing
import os
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa

from benchmarks.loader import caption, picture
from benchmarks.measure import circumstances, interleaved, write
from blip_pipelines.data import quality
from blip_pipelines.data.images import decode
from blip_pipelines.data.ingest import DataSet, ingest
from blip_pipelines.data.ingestion_plan import IngestionConfig
from blip_pipelines.data.records import PAIR_SCHEMA
from blip_pipelines.data.sources import SourceConfig, open_source

IMAGES, SIZE = 256, (640, 480)
SIZES = (1_000, 20_000)  # for memory: small pictures, so that what grows is what is known of them
START_ROWS = 10_000_000
_ROWS_A_SHARD = 100_000


def write_source(folder: Path, images: int, distinct: int, size: tuple[int, int], kind: str = "JPEG") -> Path:
    """A folder of pictures and captions; beyond `distinct`, copies of pictures, told apart by bytes after their end."""
    folder.mkdir(parents=True)
    encoded = [picture(number, *size, kind) for number in range(distinct)]
    with (folder / "captions.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["image", "caption", "split"])
        for number in range(images):
            (folder / f"{number:06d}.jpg").write_bytes(encoded[number % distinct] + str(number).encode())
            rows.writerow([f"{number:06d}.jpg", f"{caption(number)} {number}", "train"])
    return folder


def write_tars(folder: Path, images: int, distinct: int, size: tuple[int, int]) -> Path:
    """The same in tars of 1000, as img2dataset leaves them."""
    folder.mkdir(parents=True)
    encoded = [picture(number, *size, "JPEG") for number in range(distinct)]
    for first in range(0, images, 1000):
        with tarfile.open(folder / f"{first // 1000:05d}.tar", "w") as tar:
            for number in range(first, min(first + 1000, images)):
                for extension, content in (
                    ("jpg", encoded[number % distinct] + str(number).encode()),
                    ("txt", f"{caption(number)} {number}".encode()),
                ):
                    header = tarfile.TarInfo(f"{number:09d}.{extension}")
                    header.size = len(content)
                    tar.addfile(header, io.BytesIO(content))
    return folder


def take_in(source: Path, out: Path, kind: str = "folder", **values: Any) -> dict[str, Any]:
    config = IngestionConfig(source=SourceConfig(kind), workers=1, **values)  # type: ignore[arg-type]
    parts = (out / name for name in ("images", "pairs", "quarantine.parquet", "noise.parquet"))
    return ingest(open_source(config, source), config, DataSet(*parts))


def speed(rounds: int) -> dict[str, Any]:
    """Images per CPU second of one process."""
    with tempfile.TemporaryDirectory() as temporary:
        source = write_source(Path(temporary) / "source", IMAGES, IMAGES, SIZE)
        files, count = sorted(source.glob("*.jpg")), iter(range(10**9))

        def decode_all(at_least: tuple[int, int] | None) -> Callable[[], None]:
            def run() -> None:
                for file in files:
                    decode(file.read_bytes(), limits=None, at_least=at_least)

            return run

        def ours() -> None:
            assert take_in(source, Path(temporary) / str(next(count)))["rows"] == IMAGES

        variants = {
            "decoded whole": decode_all(None),
            "decoded small": decode_all(quality.ENOUGH_PIXELS),
            "ingestion": ours,
        }
        times = interleaved(variants, rounds, warmup=1)
    return {name: {**t, "images_per_second_and_core": IMAGES / t["cpu_seconds"]} for name, t in times.items()}


def _in_process(call: Callable[..., None], *arguments: Any) -> dict[str, float]:
    """Seconds and peak memory of a call in a process of its own, beyond what the process took before."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_report, args=(theirs, call, *arguments))
    process.start()
    found = ours.recv()
    process.join()
    return found


def _report(pipe: Any, call: Callable[..., None], *arguments: Any) -> None:
    import torch  # noqa: F401  what every process of ours has in memory

    before, started, cpu = _memory("VmRSS"), time.perf_counter(), time.process_time()
    call(*arguments)
    seconds = {"seconds": time.perf_counter() - started, "cpu_seconds": time.process_time() - cpu}
    pipe.send({**seconds, "peak_mb": _memory("VmHWM"), "before_mb": before})


def _memory(field: str) -> float:
    """MB of this process: VmRSS now, VmHWM at its highest."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith(field))) / 1024


def _ingest_sized(source: Path, out: Path, kind: str) -> None:
    take_in(source, out, kind, shard_images=1000)


def memory(sizes: tuple[int, ...] = SIZES) -> dict[str, Any]:
    """Peak memory of ingestion by kind of source and number of images."""
    found: dict[str, Any] = {}
    for kind, write_kind in (("tars", write_tars), ("folder", write_source)):
        for size in sizes:
            with tempfile.TemporaryDirectory() as temporary:
                source = write_kind(Path(temporary) / "source", size, 64, (96, 72))
                measured = _in_process(_ingest_sized, source, Path(temporary) / "out", kind)
                found.setdefault(kind, {})[str(size)] = measured
    return found


def resume() -> dict[str, Any]:
    """Ingestion killed when it has finished some of its shards, and run again: how many of them were written anew."""
    with tempfile.TemporaryDirectory() as temporary:
        source, out = write_source(Path(temporary) / "source", 2_000, 64, (192, 144)), Path(temporary) / "out"
        code = (
            "import sys; from pathlib import Path; from benchmarks.ingest import take_in; "
            "take_in(Path(sys.argv[1]), Path(sys.argv[2]), shard_images=100)"
        )
        killed = subprocess.Popen([sys.executable, "-c", code, str(source), str(out)])
        while len(list((out / "images").glob("*.parquet")) if (out / "images").exists() else []) < 5:
            assert killed.poll() is None, "ended before it could be killed"
            time.sleep(0.01)
        os.kill(killed.pid, signal.SIGKILL)
        killed.wait()
        finished = {path: path.stat().st_mtime_ns for path in sorted((out / "images").glob("*.parquet"))}
        started = time.perf_counter()
        rows = take_in(source, out, shard_images=100)["rows"]
        again = [path for path, written in finished.items() if path.stat().st_mtime_ns != written]
        return {
            "rows": rows,
            "shards": 20,
            "finished_before_the_kill": len(finished),
            "written_again": len(again),
            "seconds": time.perf_counter() - started,
        }


def write_table_of(folder: Path, rows: int) -> Path:
    """A caption table of so many rows over images that are not there: what start-up reads."""
    from blip_pipelines.data.pairs import write_pairs

    def tables() -> Any:
        empty = {field.name: pa.nulls(_ROWS_A_SHARD, field.type) for field in PAIR_SCHEMA}
        texts = pa.array([caption(number) for number in range(_ROWS_A_SHARD)])
        for shard in range(rows // _ROWS_A_SHARD):
            first = shard * _ROWS_A_SHARD
            keys = [f"{number:016x}" * 4 for number in range(first, first + _ROWS_A_SHARD)]
            columns = {
                **{"key": keys, "member": keys, "caption": texts, "source": ["made"] * _ROWS_A_SHARD},
                **{"shard": [shard] * _ROWS_A_SHARD, "offset": range(_ROWS_A_SHARD), "size": [1] * _ROWS_A_SHARD},
                **{"width": [640] * _ROWS_A_SHARD, "height": [480] * _ROWS_A_SHARD},
                **{"origin": ["web"] * _ROWS_A_SHARD, "split": ["train"] * _ROWS_A_SHARD},
            }
            made = {name: pa.array(values, PAIR_SCHEMA.field(name).type) for name, values in columns.items()}
            yield pa.table({**empty, **made}, schema=PAIR_SCHEMA)

    write_pairs(folder, tables(), "no images")
    return folder


def _start(folder: Path) -> None:
    from blip_pipelines.data.order import Order
    from blip_pipelines.data.pairs import Pairs

    pairs = Pairs.open(folder).select(split="train")
    pairs.preload()
    rows = Order(pairs.shard_rows, seed=0, window_shards=8).rows(0, 1024)
    assert len(pairs.captions(rows)) == 1024


def start_up(rows: int = START_ROWS) -> dict[str, float]:
    """From nothing to the captions of the first batch, in a process of its own."""
    with tempfile.TemporaryDirectory() as temporary:
        return _in_process(_start, write_table_of(Path(temporary) / "pairs", rows))


def main(command: str, rounds: int) -> str:
    found: dict[str, Any] = {"circumstances": circumstances(command)}
    found |= {"speed": speed(rounds), "memory": memory(), "resume": resume(), "start_up": start_up()}
    rates = {name: each["images_per_second_and_core"] for name, each in found["speed"].items()}
    rows = [[name, f"{rate:,.0f}", f"{rates['ingestion'] / rate:.2f}x"] for name, rate in rates.items()]
    sizes = "; ".join(
        f"{kind}: " + ", ".join(f"{int(n):,} images {each['peak_mb']:,.0f} MB" for n, each in of_kind.items())
        for kind, of_kind in found["memory"].items()
    )
    kill, start = found["resume"], found["start_up"]
    reading = (
        f"Images per second and core, {SIZE[0]} x {SIZE[1]} JPEG, from files in memory: Pillow decoding them (whole, "
        "and at the reduced scale that a fingerprint takes) and our ingestion, which reads, checks, decodes, hashes "
        "and writes them to shards and tables; medians of interleaved rounds.\n\n"
        f"Peak memory of the process that ingests: {sizes}. Killed with {kill['finished_before_the_kill']} of "
        f"{kill['shards']} shards finished and run again, it wrote {kill['written_again']} of those anew.\n\n"
        f"Start-up on {START_ROWS:,} caption rows, to the captions of the first batch: {start['seconds']:.1f} s "
        f"({start['cpu_seconds']:.1f} CPU seconds), "
        f"{start['peak_mb'] - start['before_mb']:,.0f} MB beyond the {start['before_mb']:,.0f} MB of the process."
    )
    return write("ingest", found, ["", "images/s/core", "ingestion to it"], rows, reading)
