import numpy as np
import pyarrow as pa
import pytest
from data_samples import picture
from instruction_samples import letters, open_letters, write, write_labels

from blip_pipelines.data.instructions import INSTRUCTION_SCHEMA, Instructions, write_instructions
from blip_pipelines.data.loader import DecodedPixels
from blip_pipelines.data.storage import StorageError
from blip_pipelines.data.transforms import ImageConfig


@pytest.fixture
def table(tmp_path):
    choice = letters(
        role="held_out", task="choice", answer=None, candidates=None, ask={"kind": "choice", "about": "letter"}
    )
    return open_letters(tmp_path, [8, 12], letters=letters(), choice=choice)


def test_rows_are_read_with_their_images_in_the_order_of_the_shards(table):
    assert table.shard_rows == (8 + 2, 12 + 3)
    asked = table.select(data_set="letters")
    assert [asked.image_bytes(row) for row in range(20)] == [picture(number) for number in range(20)]
    pixels = DecodedPixels(table, ImageConfig(size=16))(np.array([0, 20]))
    assert pixels.shape == (2, 3, 16, 16)


def test_views_are_chosen_by_split_role_data_set_and_task(table):
    assert len(table.select(split="train")) == 15 and len(table.select(split="val")) == 10
    assert set(table.select(role="held_out").column("data_set")) == {"choice"}
    assert set(table.select(role="held_out").column("split")) == {"val"}  # never trained on
    assert len(table.select(task=["choice", "recognition"])) == len(table) == 25
    assert set(table.select(split="val").column("subset")) == {"combo"}


def test_answers_and_candidates_of_rows(table):
    asked = table.select(data_set="letters", split="train")
    rows = np.array([0, 3])
    assert asked.targets(rows) == asked.values("answer", rows) == ["a", "d"]
    assert asked.candidates(rows) == [["a", "b", "c", "d"]] * 2
    choice = table.select(data_set="choice")
    assert all(
        len(own) == 3 and answer in own
        for own, answer in zip(choice.candidates(np.arange(5)), choice.targets(np.arange(5)), strict=True)
    )


def test_what_the_manifest_says_of_a_data_set(table):
    found = table.data_sets["letters"]
    assert (found.task, found.role, found.metric, found.multiplier) == ("recognition", "held_in", "exact_match", 1.0)
    assert found.rows == {"train": 15, "val": 5}
    training = list(table.select(data_set="letters", split="train").column("answer"))
    assert found.majority == max(sorted(set(training)), key=training.count)
    assert found.majority_rates["train"] == training.count(found.majority) / 15
    assert table.data_sets["choice"].majority is None and 0.2 <= table.data_sets["choice"].majority_rates["val"] <= 1


def several(tmp_path, **changed):
    pairs, images, _ = write_labels(tmp_path, [4])
    rows = Instructions.open(write(tmp_path, {"x": letters()}, tmp_path / "labels.csv", pairs, images), images)
    values = rows.table().to_pylist()
    for row in values:
        row.update(changed)
    folder = tmp_path / "several"
    write_instructions(
        folder, [pa.Table.from_pylist(values, INSTRUCTION_SCHEMA)], rows.manifest["images"], rows.manifest
    )
    return Instructions.open(folder, images)


def test_several_annotators_weigh_answers_and_a_draw_chooses_by_weight(tmp_path):
    table = several(tmp_path, answers=["red", "blue", "red", "red"])
    row = np.array([1])
    assert table.weighted_answers(row) == [[("red", 0.75), ("blue", 0.25)]]
    assert table.references(row) == [["red", "blue", "red", "red"]]
    drawn = [table.targets(row, np.array([at]))[0] for at in (0.0, 0.3, 0.6, 0.99)]
    assert drawn == ["red", "blue", "red", "red"]


def test_frames_of_a_video_are_taken_in_equal_distances(tmp_path):
    single = several(tmp_path)
    places = [
        {
            name: single.values(name, np.array([row]))[0]
            for name in ("key", "member", "shard", "offset", "size", "width", "height")
        }
        for row in (2, 0, 1)
    ]
    video = several(tmp_path / "video", frames=places)
    frames, rows = video.frames(2)
    assert rows.shape == (4, 2)
    contents = [[frames.image_bytes(frame) for frame in of_row] for of_row in rows]
    assert contents[3] == [single.image_bytes(2), single.image_bytes(1)]
    assert DecodedPixels(frames, ImageConfig(size=16))(rows[3]).shape == (2, 3, 16, 16)
    images, rows = single.frames(4)  # of an image all frames are itself
    assert [images.image_bytes(frame) for frame in rows[1]] == [single.image_bytes(1)] * 4


def test_a_damaged_table_is_an_error_that_names_the_shard(table, tmp_path):
    path = tmp_path / "instructions" / "00001.parquet"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(StorageError, match=r"00001\.parquet: content is"):
        Instructions.open(tmp_path / "instructions")


def test_images_are_asked_for_in_vain_where_none_were_opened(table, tmp_path):
    closed = Instructions.open(tmp_path / "instructions")
    with pytest.raises(StorageError, match=r"Instructions\.open"):
        closed.image_bytes(0)
    with pytest.raises(StorageError, match=r"Instructions\.open"):
        closed.frames(2)
