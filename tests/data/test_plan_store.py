import pickle
import tracemalloc
from functools import partial
from pathlib import Path

import pytest

from blip_pipelines.data.ingestion_plan import IngestionConfig, file_jobs, plan_files
from blip_pipelines.data.places import Entry, Folder
from blip_pipelines.data.plan_store import PlanStore
from blip_pipelines.data.records import Caption, Record
from blip_pipelines.data.sources import Quarantined
from blip_pipelines.data.sources.folder import FolderConfig, FolderSource
from blip_pipelines.data.sources.grouped_rows import GroupedRows
from blip_pipelines.data.storage import StorageError


class _Copies:
    """Images 0 to 9 of which 7 to 9 have the contents of 0 to 2, and one row that is refused."""

    name, credits, readers = "copies", (), 1

    def __init__(self, folder):
        self.place = Folder(folder)

    def records(self):
        for number in range(10):
            caption = Caption(f"thing {number}")
            yield Record(f"{number}.png", partial(self.place.read, f"{number}.png"), (caption,), self.name, "train")
        yield Quarantined("lost.png", "missing_image", "there is none")

    def listing(self):
        return [Entry(f"{number}.png", 1, f"content {number % 7}") for number in range(10)]


@pytest.fixture
def plan(tmp_path):
    for number in range(10):
        (tmp_path / f"{number}.png").write_bytes(str(number % 7).encode())
    with PlanStore(tmp_path / "plan", Folder(tmp_path)) as plan:
        plan.place = (source := _Copies(tmp_path)).place
        plan_files(source, IngestionConfig(), plan)
        yield plan


def test_equal_files_are_together_and_in_an_order_of_their_own(plan):
    units = list(plan.units(0, 100))
    assert len(plan) == len(units) == 7
    members = [[record.member for record in unit.records] for unit in units]
    assert sorted(members) == [
        ["0.png", "7.png"],
        ["1.png", "8.png"],
        ["2.png", "9.png"],
        *([f"{n}.png"] for n in range(3, 7)),
    ]
    assert members != sorted(members)
    assert [unit.checksum for unit in plan.units(2, 4)] == [unit.checksum for unit in units[2:4]]
    assert units[0].records[0].read() == units[0].checksum.removeprefix("content ").encode()
    assert [row.member for row in plan.lost] == ["lost.png"]


def test_a_job_reads_its_images_from_the_plan_in_any_process(plan, tmp_path):
    jobs = file_jobs(plan, 1, IngestionConfig(shard_images=3), tmp_path)
    there = [pickle.loads(pickle.dumps(job)) for job in jobs]  # noqa: S301  our own bytes
    checksums = [unit.checksum for unit in plan.units(0, 7)]
    assert [image.checksum for job in there for image in job.wanted] == checksums
    contents = [f"content {image.read().decode()}" for job in there for image in job.wanted]
    assert contents == checksums and [len(job.wanted) for job in there] == [3, 3, 1]
    assert [job.plan for job in jobs] == [job.plan for job in there] and len({job.plan for job in jobs}) == 3


def test_some_may_be_kept_in_their_order(plan):
    checksums = [unit.checksum for unit in plan.units(0, 7)]
    plan.keep([5, 0, 3])
    assert [unit.checksum for unit in plan.units(0, 7)] == [checksums[number] for number in (0, 3, 5)]


def test_the_file_goes_at_the_end_and_a_full_disk_is_said(tmp_path):
    path = tmp_path / "plan"
    path.write_bytes(b"of a run that was killed")
    with PlanStore(path):
        assert path.exists()
    assert not path.exists()
    full = pytest.raises(StorageError, match=r"plan: cannot write \(database or disk is full\); free some space")
    with full, PlanStore(path) as plan:
        plan._run("PRAGMA max_page_count = 8")
        for number in range(1000):
            plan.lose(Quarantined(str(number), "bad_row", "x" * 1000))


def test_rows_are_grouped_where_an_image_first_came():
    grouped = GroupedRows()
    rows = [("b", None), ("a\udc80", "val"), ("b", None), ("b", "train"), ("a\udc80", "val"), ("c", None)]
    for number, (member, split) in enumerate(rows):
        grouped.add(member, split, Caption(str(number)))
    grouped.refuse(Quarantined("d", "bad_row", "why"))
    found = [
        (member, split, "".join(caption.text for caption in captions)) for member, split, captions in grouped.groups()
    ]
    assert found == [("b", None, "02"), ("a\udc80", "val", "14"), ("b", "train", "3"), ("c", None, "5")]
    assert list(grouped.members()) == ["b", "a\udc80", "c"] and list(grouped.refused()) == [("d", "bad_row", "why")]
    assert list(GroupedRows().groups()) == []


def test_memory_does_not_follow_the_number_of_images(tmp_path):
    def peak(images: int) -> int:
        folder = tmp_path / str(images)
        folder.mkdir()
        for number in range(images):
            (folder / f"{number}.png").write_bytes(str(number).encode())
        rows = "".join(f"{number}.png,the picture of number {number}\n" for number in range(images))
        (folder / "captions.csv").write_text(f"image,caption\n{rows}")
        source = FolderSource(Folder(folder), FolderConfig())
        tracemalloc.start()
        try:
            with PlanStore(tmp_path / "plan", source.place) as plan:
                plan_files(source, IngestionConfig(), plan)
                jobs = file_jobs(plan, 1, IngestionConfig(shard_images=100), Path())
                assert sum(1 for job in jobs for _ in job.wanted) == images
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    few, many = peak(500), peak(2500)
    assert (many - few) / 2000 < 150  # bytes an image, of which its name in a listing of its folder takes the most
