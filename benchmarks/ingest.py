"""Sources to shards: images per second and core against Pillow's decode limit, memory by size, kill and resume.

The limit is what Pillow needs to decode the same files, once whole and once at the reduced scale that a fingerprint
takes, hashing nothing and writing nothing. Ingestion reads, checks, decodes, hashes, fingerprints and writes.
"""

import csv
import io
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

from benchmarks.loader import caption, picture
from benchmarks.measure import circumstances, in_process, interleaved, write
from blip_pipelines.data import quality
from blip_pipelines.data.images import decode
from blip_pipelines.data.ingest import DataSet, ingest
from blip_pipelines.data.ingestion_plan import IngestionConfig
from blip_pipelines.data.sources import SourceConfig, open_source

IMAGES, SIZE = 256, (640, 480)
SIZES = (1_000, 10_000, 100_000)  # for memory: small pictures, so that what grows is what is known of them


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


def _ingest_sized(source: Path, out: Path, kind: str) -> None:
    take_in(source, out, kind, shard_images=1000)


def memory(sizes: tuple[int, ...] = SIZES) -> dict[str, Any]:
    """Peak memory of ingestion by kind of source and number of images."""
    found: dict[str, Any] = {}
    for kind, write_kind in (("tars", write_tars), ("folder", write_source)):
        for size in sizes:
            with tempfile.TemporaryDirectory() as temporary:
                source = write_kind(Path(temporary) / "source", size, 64, (32, 24))
                measured = in_process(_ingest_sized, source, Path(temporary) / "out", kind)
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


def main(command: str, rounds: int) -> str:
    found: dict[str, Any] = {"circumstances": circumstances(command)}
    found |= {"speed": speed(rounds), "memory": memory(), "resume": resume()}
    rates = {name: each["images_per_second_and_core"] for name, each in found["speed"].items()}
    rows = [[name, f"{rate:,.0f}", f"{rates['ingestion'] / rate:.2f}x"] for name, rate in rates.items()]
    sizes = "; ".join(
        f"{kind}: " + ", ".join(f"{int(n):,} images {each['peak_mb']:,.0f} MB" for n, each in of_kind.items())
        for kind, of_kind in found["memory"].items()
    )
    kill = found["resume"]
    reading = (
        f"Images per second and core, {SIZE[0]} x {SIZE[1]} JPEG, from files in memory: Pillow decoding them (whole, "
        "and at the reduced scale that a fingerprint takes) and our ingestion, which reads, checks, decodes, hashes "
        "and writes them to shards and tables; medians of interleaved rounds.\n\n"
        f"Peak memory of the process that ingests: {sizes}. Killed with {kill['finished_before_the_kill']} of "
        f"{kill['shards']} shards finished and run again, it wrote {kill['written_again']} of those anew."
    )
    return write("ingest", found, ["", "images/s/core", "ingestion to it"], rows, reading)
