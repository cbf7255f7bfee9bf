"""The reader on small files that are true to the layouts of published data sets, described as in conf/paper."""

import json
from pathlib import Path

import pytest
import yaml
from data_samples import picture

from blip_pipelines.config import ConfigError, read
from blip_pipelines.data.question_files import FilesConfig, QuestionFileError, read_files, value_at
from blip_pipelines.data.splits import SplitConfig

PAPER = yaml.safe_load((Path(__file__).parents[2] / "conf/paper/parameters_instructions.yml").read_text())
DATA_SETS = PAPER["instructions"]["data_sets"]


def read_paper(name, folder, files, tmp_path):
    """Samples of one of the paper's data sets, of these files below its folder."""
    for path, content in files.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        text = content if isinstance(content, str) else json.dumps(content)
        (tmp_path / path).write_text(text)
    described = {**DATA_SETS[name]["files"], "folder": str(tmp_path)}
    splits = {split: each for split, each in described["splits"].items() if split in folder}
    config = read(FilesConfig, {**described, "splits": splits}, name)
    return list(read_files(config, name, SplitConfig(), 0))


def lines(*records):
    return "\n".join(map(json.dumps, records)) + "\n"


def test_vqa_questions_and_annotations(tmp_path):
    answers = [{"answer": "red", "answer_confidence": "yes", "answer_id": n} for n in range(9)]
    files = {
        "v2_OpenEnded_mscoco_val2014_questions.json": {
            "questions": [{"image_id": 42, "question": "What color is it?", "question_id": 42000}]
        },
        "v2_mscoco_val2014_annotations.json": {
            "annotations": [
                {
                    "question_id": 42000,
                    "image_id": 42,
                    "answer_type": "other",
                    "multiple_choice_answer": "red",
                    "answers": [*answers, {"answer": "dark red", "answer_id": 10}],
                }
            ]
        },
    }
    (sample,) = read_paper("vqav2", ["val"], files, tmp_path)
    assert sample.images == ("val2014/COCO_val2014_000000000042.jpg",)
    assert sample.fields["question"] == "What color is it?" and sample.fields["answer_type"] == "other"
    assert sample.fields["answers"] == ["red"] * 9 + ["dark red"] and sample.name == "42000"


def test_captions_of_karpathys_splits(tmp_path):
    image = {"filepath": "val2014", "filename": "COCO_val2014_1.jpg", "split": "restval", "cocoid": 1}
    sentences = [{"raw": "A dog."}, {"raw": "A big dog."}]
    rest = {**image, "split": "test", "filename": "COCO_val2014_2.jpg", "cocoid": 2}
    files = {"dataset_coco.json": {"images": [{**image, "sentences": sentences}, {**rest, "sentences": sentences[:1]}]}}
    train, test = read_paper("coco_caption", ["train", "test"], files, tmp_path)
    assert (train.split, train.images) == ("train", ("val2014/COCO_val2014_1.jpg",))
    assert train.fields["answers"] == ["A dog.", "A big dog."] and test.split == "test"


def test_nocaps_joins_many_captions_to_an_image(tmp_path):
    files = {
        "nocaps_val_4500_captions.json": {
            "images": [{"id": 7, "file_name": "a.jpg", "domain": "near-domain"}],
            "annotations": [
                {"image_id": 7, "caption": "One."},
                {"image_id": 8, "caption": "Not."},
                {"image_id": 7, "caption": "Two."},
            ],
        }
    }
    (sample,) = read_paper("nocaps", ["val"], files, tmp_path)
    assert sample.fields["answers"] == ["One.", "Two."] and sample.images == ("val/a.jpg",)


def test_scienceqa_counts_answers_in_choices_and_keeps_those_with_a_picture(tmp_path):
    problem = {
        "question": "Which is colder?",
        "choices": ["left", "right"],
        "answer": 1,
        "hint": "Look.",
        "split": "test",
    }
    files = {"problems.json": {"12": {**problem, "image": "image.png"}, "13": {**problem, "image": None}}}
    (sample,) = read_paper("scienceqa", ["test"], files, tmp_path)
    assert sample.images == ("test/12/image.png",)
    assert sample.fields["answer"] == "right" and sample.fields["options"] == ["left", "right"]


def test_ocr_vqa_zips_questions_and_answers(tmp_path):
    book = {
        "imageURL": "http://x/1.jpg",
        "questions": ["Who wrote it?", "Is it a novel?"],
        "answers": ["Ann", "No"],
        "split": 1,
    }
    samples = read_paper("ocr_vqa", ["train"], {"dataset.json": {"1": book, "2": {**book, "split": 3}}}, tmp_path)
    assert [(s.fields["question"], s.fields["answer"]) for s in samples] == [
        ("Who wrote it?", "Ann"),
        ("Is it a novel?", "No"),
    ]
    assert samples[0].images == ("images/1.jpg",)


def test_textcaps_joins_ocr_tokens(tmp_path):
    files = {
        "TextCaps_0.1_val.json": {
            "data": [
                {
                    "image_id": "ab",
                    "reference_strs": ["A sign that says stop.", "Stop."],
                    "caption_str": "A sign that says stop.",
                }
            ]
        },
        "TextVQA_Rosetta_OCR_v0.2_val.json": {"data": [{"image_id": "ab", "ocr_tokens": ["STOP", "now"]}]},
    }
    sample, *_ = read_paper("textcaps", ["val"], files, tmp_path)
    assert sample.fields["ocr"] == ["STOP", "now"] and sample.images == ("train_images/ab.jpg",)
    assert sample.fields["answers"][0] == "A sign that says stop."


def test_llava_takes_turns_with_what_was_said_before(tmp_path):
    talk = [
        {"from": "human", "value": "<image>\nWhat is it?"},
        {"from": "gpt", "value": "A cat."},
        {"from": "human", "value": "Which colour?"},
        {"from": "gpt", "value": "Black."},
    ]
    files = {"conversation_58k.json": [{"id": "000000000009", "image": "000000000009.jpg", "conversations": talk}]}
    first, second = read_paper("llava_conversation", ["train"], files, tmp_path)
    assert (first.fields["question"], first.fields["answer"], first.fields["history"]) == ("What is it?", "A cat.", [])
    assert second.fields["history"] == [("What is it?", "A cat.")] and second.fields["answer"] == "Black."


def test_visdial_looks_questions_answers_and_options_up(tmp_path):
    data = {
        "questions": ["is it sunny?", "any people?"],
        "answers": ["yes", "no", "maybe"],
        "dialogs": [
            {
                "image_id": 5,
                "caption": "a park",
                "dialog": [
                    {"question": 0, "answer": 0, "gt_index": 1, "answer_options": [1, 0, 2]},
                    {"question": 1, "answer": 1, "gt_index": 0, "answer_options": [1, 2, 0]},
                ],
            }
        ],
    }
    first, second = read_paper("visdial", ["val"], {"visdial_1.0_val.json": {"version": "1.0", "data": data}}, tmp_path)
    assert first.fields["question"] == "is it sunny?" and first.fields["options"] == ["no", "yes", "maybe"]
    assert second.fields["history"] == [("is it sunny?", "yes")] and second.fields["answer"] == "no"
    assert second.images == ("VisualDialog_val2018/VisualDialog_val2018_000000000005.jpg",)


def test_hateful_memes_lines(tmp_path):
    record = {"id": 1, "img": "img/00001.png", "label": 1, "text": "words on it"}
    files = {"dev.jsonl": lines(record, {**record, "id": 2, "label": 0})}
    first, second = read_paper("hateful_memes", ["val"], files, tmp_path)
    assert (first.fields["answer"], second.fields["answer"]) == ("yes", "no") and first.fields["text"] == "words on it"


def test_video_questions_take_the_frames_of_a_folder(tmp_path):
    for name in ("0003.jpg", "0001.jpg", "note.txt", "0002.jpg"):
        path = tmp_path / "frames" / "video7010" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(picture(1))
    files = {"test_qa.json": [{"answer": "man", "category_id": 3, "id": 1, "question": "who is it?", "video_id": 7010}]}
    (sample,) = read_paper("msrvtt_qa", ["test"], files, tmp_path)
    assert (
        sample.images == tuple(f"frames/video7010/000{n}.jpg" for n in (1, 2, 3)) and sample.fields["answer"] == "man"
    )
    (tmp_path / "frames" / "video7010").rename(tmp_path / "moved")
    with pytest.raises(QuestionFileError, match=r"no frames in .*video7010; extract"):
        read_paper("msrvtt_qa", ["test"], {}, tmp_path)


def test_ivqa_has_five_columns_of_answers(tmp_path):
    (tmp_path / "frames" / "v1").mkdir(parents=True)
    (tmp_path / "frames" / "v1" / "1.jpg").write_bytes(picture(1))
    table = (
        "video_id,start,end,question,answer1,answer2,answer3,answer4,answer5\nv1,0,5,What is cut?,wood,wood,log,,wood\n"
    )
    (sample,) = read_paper("ivqa", ["test"], {"test.csv": table}, tmp_path)
    assert sample.fields["answers"] == ["wood", "wood", "log", "wood"]


def test_a_okvqa_and_iconqa_pick_from_choices(tmp_path):
    record = {
        "question_id": "q",
        "image_id": 299,
        "question": "Why?",
        "choices": ["a", "b", "c", "d"],
        "correct_choice_idx": 2,
    }
    files = {"aokvqa_v1p0_val.json": [{**record, "direct_answers": ["c"] * 10}]}
    (sample,) = read_paper("a_okvqa", ["val"], files, tmp_path)
    assert sample.fields["answer"] == "c" and sample.images == ("val2017/000000000299.jpg",)
    problem = {"question": "How many?", "choices": ["1", "2"], "answer": 1, "ques_type": "choose_txt", "split": "test"}
    icons = {"problems.json": {"5": problem, "6": {**problem, "ques_type": "fill_in_blank"}}}
    (sample,) = read_paper("iconqa", ["test"], icons, tmp_path / "icon")
    assert sample.fields["answer"] == "2" and sample.images == ("iconqa/test/choose_txt/5/image.png",)


def test_gqa_vsr_vizwiz_textvqa_and_flickr(tmp_path):
    question = {"imageId": "n161313", "question": "Is it?", "answer": "no", "fullAnswer": "No, it is not."}
    (gqa,) = read_paper("gqa", ["test"], {"testdev_balanced_questions.json": {"201": question}}, tmp_path / "gqa")
    assert gqa.fields["answer"] == "no" and gqa.images == ("images/n161313.jpg",) and gqa.name == "201"
    vsr_line = {"image": "000000000001.jpg", "caption": "The cat is under the car.", "label": 1, "relation": "under"}
    (vsr,) = read_paper("vsr", ["test"], {"test.jsonl": lines(vsr_line)}, tmp_path / "vsr")
    assert vsr.fields["answer"] == "yes" and vsr.fields["statement"] == "The cat is under the car."
    asked = {
        "image": "VizWiz_val_0.jpg",
        "question": "What?",
        "answers": [{"answer": "can", "answer_confidence": "yes"}] * 10,
    }
    (vizwiz,) = read_paper("vizwiz", ["val"], {"val.json": [asked]}, tmp_path / "vizwiz")
    assert vizwiz.fields["answers"] == ["can"] * 10 and vizwiz.images == ("val/VizWiz_val_0.jpg",)
    text = {"question": "what brand?", "image_id": "003", "question_id": 34602, "answers": ["nokia"] * 10}
    files = {
        "TextVQA_0.5.1_val.json": {"data": [text]},
        "TextVQA_Rosetta_OCR_v0.2_val.json": {"data": [{"image_id": "003", "ocr_tokens": ["NOKIA"]}]},
    }
    (textvqa,) = read_paper("textvqa", ["val"], files, tmp_path / "textvqa")
    assert textvqa.fields["ocr"] == ["NOKIA"] and textvqa.name == "34602"
    image = {"filename": "1.jpg", "split": "test", "sentences": [{"raw": "A man."}]}
    files = {"dataset_flickr30k.json": {"images": [image, {**image, "split": "train"}]}}
    (flickr,) = read_paper("flickr30k", ["test"], files, tmp_path / "flickr")
    assert flickr.fields["answers"] == ["A man."] and flickr.images == ("flickr30k-images/1.jpg",)


def test_paths_go_into_names_numbers_and_whole_lists():
    record = {"a": {"b": [{"c": 1}, {"c": 2}]}, "d": "text"}
    assert value_at(record, "a.b.1.c") == 2 and value_at(record, "a.b[].c") == [1, 2]
    assert value_at(record, "a.x.c") is None and value_at(record, "a.b.7") is None and value_at(record, "d.0") is None


FILES = {
    "splits": {"all": {"file": "q.jsonl"}},
    "fields": {"question": "question", "answer": "answer"},
    "image": "{image}",
}


def test_records_without_a_split_are_divided_by_their_picture(tmp_path):
    records = [{"image": f"{n // 2}.jpg", "question": "?", "answer": "!"} for n in range(400)]
    (tmp_path / "q.jsonl").write_text(lines(*records))
    config = read(FilesConfig, {**FILES, "folder": str(tmp_path)}, "mine")
    samples = list(read_files(config, "mine", SplitConfig(validation=0.2, test=0.2), 0))
    by_image: dict[tuple[str, ...], set[str]] = {}
    for sample in samples:
        by_image.setdefault(sample.images, set()).add(sample.split)
    assert all(len(splits) == 1 for splits in by_image.values())
    counts = [sum(sample.split == split for sample in samples) for split in ("train", "val", "test")]
    assert counts[0] > 180 and min(counts) > 40


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"image": "a.jpg"', "q.jsonl, line 1: not JSON"),
        ("[1]", "q.jsonl, line 1: .* where a record"),
        ('{"question": "x"}', r"mine: sample all/0: cannot name its picture by '\{image\}': KeyError\('image'\)"),
        ('{"image": "../a.jpg", "question": "x"}', "outside"),
        ('{"image": "/a.jpg", "question": "x"}', "outside"),
    ],
)
def test_a_file_that_is_not_as_described_is_an_error_that_names_the_place(tmp_path, text, message):
    (tmp_path / "q.jsonl").write_text(text + "\n")
    config = read(FilesConfig, {**FILES, "folder": str(tmp_path)}, "mine")
    with pytest.raises(QuestionFileError, match=message):
        list(read_files(config, "mine", SplitConfig(), 0))


def test_a_missing_file_or_list_is_named(tmp_path):
    config = read(FilesConfig, {**FILES, "folder": str(tmp_path)}, "mine")
    with pytest.raises(QuestionFileError, match=r"mine: there is no .*q\.jsonl"):
        list(read_files(config, "mine", SplitConfig(), 0))
    (tmp_path / "q.json").write_text('{"data": 3}')
    config = read(
        FilesConfig, {**FILES, "folder": str(tmp_path), "splits": {"val": {"file": "q.json", "at": "data"}}}, "mine"
    )
    with pytest.raises(QuestionFileError, match="no list of records at 'data'"):
        list(read_files(config, "mine", SplitConfig(), 0))


@pytest.mark.parametrize(
    ("changed", "message"),
    [({"image": None}, "either `image` or `frames`"), ({"splits": {"dev": {"file": "x"}}}, "'dev' is none of")],
)
def test_a_description_that_cannot_be_is_refused(changed, message):
    with pytest.raises(ConfigError, match=message):
        read(FilesConfig, {**FILES, "folder": ".", **changed}, "mine")
