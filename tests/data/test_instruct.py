import re
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from data_samples import picture, write_data_set
from instruction_samples import letters, open_letters, write, write_labels
from PIL import Image
from source_samples import write_wheels

from blip_pipelines import config as strict
from blip_pipelines.data.colours import PALETTE, main_colour
from blip_pipelines.data.ingest import DataSet, ingest
from blip_pipelines.data.ingestion_plan import IngestionConfig
from blip_pipelines.data.instruct import InstructError, InstructionsConfig, files_hash, instruct
from blip_pipelines.data.instructions import Instructions
from blip_pipelines.data.pairs import Pairs
from blip_pipelines.data.questions import Asker
from blip_pipelines.data.sources import SourceError
from blip_pipelines.data.sources.emoji import EmojiConfig, EmojiSource, emoji_table
from blip_pipelines.data.sources.emoji_facts import KINDS
from blip_pipelines.pipelines.parameters import laid_over

CONF = Path(__file__).parents[2] / "conf"
PACKAGES = CONF.parent / "data" / "01_raw" / "packages"


def block(environment):
    return yaml.safe_load((CONF / environment / "parameters_instructions.yml").read_text())["instructions"]


def configured(values):
    return strict.read(
        InstructionsConfig, {key: value for key, value in values.items() if key != "launch"}, "instructions"
    )


def own(folder, **changed):
    """A data set with pictures of its own: `questions.jsonl` beside them."""
    files = {
        "folder": str(folder),
        "splits": {"all": {"file": "questions.jsonl"}},
        "fields": {"question": "question", "answer": "answer", "split": "split"},
        "image": "{image}",
    }
    base = {"task": "qa", "role": "held_in", "metric": "vqa_accuracy", "templates": ["{question}"], "files": files}
    return {**base, **changed}


def write_questions(folder, splits, first=100):
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for number, split in enumerate(splits, start=first):
        (folder / f"{number}.png").write_bytes(picture(number))
        lines.append(f'{{"image": "{number}.png", "question": "Number?", "answer": "{number}", "split": "{split}"}}')
    (folder / "questions.jsonl").write_text("\n".join(lines))
    return folder


def test_evaluation_rows_are_about_held_out_pictures_alone(tmp_path):
    table = open_letters(tmp_path, [12, 20], seen=letters(), unseen=letters(role="held_out"))
    keys = {split: set(table.select(split=split).keys) for split in ("train", "val")}
    assert keys["train"] and keys["val"] and not keys["train"] & keys["val"]
    assert set(table.select(data_set="unseen").column("split")) == {"val"}
    # Its answers are known from training pictures, of which no question is asked.
    assert table.data_sets["unseen"].candidates == ["a", "b", "c", "d"]


def test_a_picture_that_any_data_set_evaluates_on_is_trained_on_by_none(tmp_path):
    pairs, images = write_data_set(tmp_path, [4])
    photos = write_questions(tmp_path / "photos", ["train"] * 6 + ["test"] * 2)
    again = write_questions(tmp_path / "again", ["train"] * 4, first=105)  # 106 and 107 are evaluated on by the other
    out = write(tmp_path, {"mine": own(photos), "again": own(again)}, None, pairs, images)
    table = Instructions.open(out, images)
    assert table.manifest["in_evaluation"] == {"again": 2}
    assert sorted(table.select(data_set="again").column("answer")) == ["105", "108"]
    assert not set(table.select(split="train").keys) & set(table.select(split="test").keys)


def test_pictures_that_data_sets_bring_are_stored_with_the_table(tmp_path):
    pairs, images, labels = write_labels(tmp_path, [8])
    photos = write_questions(tmp_path / "photos", ["train"] * 5 + ["val"])
    (photos / "103.png").write_bytes(b"no picture")
    (photos / "104.png").unlink()
    out = write(tmp_path, {"mine": own(photos), "letters": letters()}, labels, pairs, images, shard_images=3)
    table = Instructions.open(out, images)
    assert table.images == tmp_path / "instructions_images"
    mine = table.select(data_set="mine")
    found = {answer: mine.image_bytes(row) for row, answer in enumerate(mine.column("answer"))}
    assert found == {str(number): picture(number) for number in (100, 101, 102, 105)}
    assert table.manifest["refused"] == {"not_an_image": 1, "unreadable": 1}
    known = table.select(data_set="letters")  # the ingested pictures, too: a table speaks of one set of images
    assert known.image_bytes(0) == Pairs.open(pairs, images).image_bytes(0)


def test_rows_do_not_depend_on_other_data_sets(tmp_path):
    alone = open_letters(tmp_path / "alone", [8, 8], letters=letters())
    beside = open_letters(tmp_path / "beside", [8, 8], first=letters(templates=["?"]), letters=letters())
    assert alone.table().equals(beside.select(data_set="letters").table())


def test_captions_of_the_caption_table_can_be_asked_about(tmp_path):
    pairs, images = write_data_set(tmp_path, [8], captions_per_image=2)
    caption = letters(table="captions", answer=None, candidates=None, metric="cider")
    table = Instructions.open(write(tmp_path, {"caption": caption}, None, pairs, images), images)
    assert len(table) == 8
    captions = Pairs.open(pairs).captions(np.arange(2))
    assert table.references(np.array([0])) == [captions]


@pytest.mark.parametrize(
    ("data_sets", "labels", "message"),
    [
        ({"letters": None}, "labels.csv", "none is chosen"),
        ({"letters": letters()}, None, r"instructions\.facts: null"),
        ({"letters": letters()}, "labels.xls", "no csv, jsonl or parquet file"),
        ({"letters": letters(answer="{missing}")}, "gaps.csv", r"data_sets\.letters: gives no question"),
        ({"letters": letters()}, "strangers.csv", "no ingested picture is called 'nobody.png'"),
        ({"letters": letters()}, "nameless.csv", "no column 'image' among letter"),
    ],
)
def test_a_table_that_cannot_be_made_is_an_error_that_says_why(tmp_path, data_sets, labels, message):
    pairs, images, _ = write_labels(tmp_path, [8])
    (tmp_path / "labels.xls").write_text("")
    (tmp_path / "strangers.csv").write_text("image,letter\nnobody.png,a\n")
    (tmp_path / "nameless.csv").write_text("letter\na\n")
    key = Pairs.open(pairs).keys[0]
    gaps = pa.table({"image": pa.array([key], pa.string()), "missing": pa.array([None], pa.string())})
    pq.write_table(gaps, tmp_path / "gaps.parquet")
    path = None if labels is None else tmp_path / labels.replace("gaps.csv", "gaps.parquet")
    with pytest.raises(InstructError, match=message):
        write(tmp_path, data_sets, path, pairs, images)


def test_pictures_of_a_person_are_no_emoji_and_the_error_says_what_to_set(tmp_path, monkeypatch):
    packages = write_wheels(tmp_path / "packages", monkeypatch)
    pairs, images = write_data_set(tmp_path, [4])
    with pytest.raises(SourceError, match=r"instructions\.facts: emoji, but '.*' is no picture .* set it to null"):
        instruct(configured(block("base")), pairs, images, packages, tmp_path / "out", tmp_path / "own")


def test_files_of_data_sets_are_known_by_their_state(tmp_path):
    photos = write_questions(tmp_path / "photos", ["train"] * 3)
    config = configured({"data_sets": {"mine": own(photos)}})
    before = files_hash(config)
    assert files_hash(config) == before
    (photos / "100.png").write_bytes(picture(1) + b"more")
    assert files_hash(config) != before


@pytest.mark.parametrize("name", list(PALETTE))
def test_the_main_colour_is_named_where_one_covers_more_than_half(name):
    for rgb in PALETTE[name]:
        image = Image.new("RGB", (20, 20), "white")
        image.paste(rgb, (0, 0, 12, 20))
        assert main_colour(image) == (None if name == "white" else name)
    half = Image.new("RGB", (20, 20), (255, 0, 0))
    half.paste((0, 0, 160), (0, 0, 10, 20))
    assert main_colour(half) is None


def test_the_embedded_default_asks_of_the_emoji_what_their_metadata_say(tmp_path, monkeypatch):
    packages = write_wheels(tmp_path / "packages", monkeypatch)
    config = strict.read(IngestionConfig, {"workers": 1, "splits": {"image": 0.4, "combo": 0.3}}, "ingestion")
    source = EmojiSource(packages, EmojiConfig(), config.splits, config.noise, 0)
    data = DataSet(*(tmp_path / name for name in ("images", "pairs", "quarantine", "noise")))
    ingest(source, config, data)
    values = block("base")
    small = {name: {**each, "balance": None} for name, each in values["data_sets"].items() if "choice" not in name}
    out = tmp_path / "instructions"
    instruct(configured({**values, "data_sets": small}), data.pairs, data.images, packages, out, tmp_path / "own")
    table = Instructions.open(out, data.images)
    said = {
        (data_set, member): answer
        for data_set, member, answer in zip(*(table.column(n) for n in ("data_set", "member", "answer")), strict=True)
    }
    assert said["emoji_caption", "twemoji/1f980.png"] == "a crab"
    assert said["emoji_kind", "twemoji/1f980.png"] == "food or drink"
    assert said["emoji_country", "twemoji/1f1f3-1f1f1.png"] == "the netherlands"
    assert said["emoji_flag", "twemoji/1f1f3-1f1f1.png"] == "yes"
    tones = {member: answer for (data_set, member), answer in said.items() if data_set == "emoji_tone"}
    assert all(("1f3fd" in member) == (answer == "medium") for member, answer in tones.items()) and len(tones) > 10
    genders = {member: answer for (data_set, member), answer in said.items() if data_set == "emoji_gender"}
    assert genders and all(("1f469" in member) == (answer == "woman") for member, answer in genders.items())
    assert not set(table.select(split="train").keys) & {
        *table.select(split="test").keys,
        *table.select(split="val").keys,
    }


def test_the_default_has_held_out_data_sets_and_a_held_out_task():
    chosen = configured(block("base")).chosen
    held_in = {each.task for each in chosen.values() if each.role == "held_in"}
    held_out = [each for each in chosen.values() if each.role == "held_out"]
    assert len(chosen) >= 8 and len(held_out) >= 4
    assert {each.task for each in held_out} - held_in == {"multiple_choice"}
    assert {each.task for each in held_out} & held_in


def test_the_papers_mix_is_described_whole():
    values = laid_over(block("base"), block("paper"))
    config = configured(values)
    chosen = config.chosen
    assert [sum(each.role == role for each in chosen.values()) for role in ("held_in", "held_out")] == [13, 13]
    held_in = {each.task for each in chosen.values() if each.role == "held_in"}
    whole = {each.task for each in chosen.values()} - held_in
    assert whole == {"visual_reasoning", "video_qa", "visual_dialogue", "classification"}
    assert chosen["okvqa"].multiplier > 1 > chosen["a_okvqa"].multiplier
    for name, each in chosen.items():
        Asker(name, each, config.templates)  # its templates are there and can be read
        assert each.files is not None and each.files.folder.startswith("data/01_raw/")
        assert (each.role == "held_in") == ("train" in each.files.splits) or each.candidates == "answers", name


@pytest.mark.skipif(not any(PACKAGES.glob("emoji-2*.whl")), reason="the packages are not there: make packages")
def test_the_words_of_the_questions_are_in_the_vocabulary_of_the_default():
    pretraining = yaml.safe_load((CONF / "base" / "parameters_med_pretraining.yml").read_text())["med_pretraining"]
    values = block("base")
    templates = [words for each in values["data_sets"].values() for words in each["templates"] if len(words) > 1]
    asked = " ".join([*templates, *(words for each in values["templates"].values() for words in each), *KINDS.values()])
    captions = " ".join(emoji.caption for emoji in emoji_table(PACKAGES).values())
    known = {*words_of(captions), *words_of(pretraining["also_words"])}
    assert set(words_of(re.sub(r"\{\w+\}", " ", asked))) <= known


def words_of(text):
    return re.findall(r"[a-z]+", text.lower())
