"""Small data sets laid out as the tools and projects that people have them from lay them out."""

import csv
import hashlib
import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
from data_samples import caption, encode, picture
from PIL import Image

IMAGES = 8


class Format(NamedTuple):
    """How to write one, what to configure, and the (file name or key, caption) rows that must come out."""

    kind: str
    options: dict[str, Any]
    write: Callable[[Path], set[tuple[str, str]]]


def jpeg(number: int) -> bytes:
    return encode(Image.open(io.BytesIO(picture(number))).convert("RGB"), "JPEG", quality=95)


def write_img2dataset(folder: Path) -> set[tuple[str, str]]:
    """Two shards; the third url of each failed, and has a row in the parquet alone."""
    rows_out = set()
    for shard in range(2):
        rows = []
        stem = folder / f"{shard:05d}"
        folder.mkdir(parents=True, exist_ok=True)
        with tarfile.open(stem.with_suffix(".tar"), "w") as tar:
            for place in range(IMAGES // 2):
                number = shard * (IMAGES // 2) + place
                key, failed = f"{shard:05d}{place:04d}", place == 2
                row = {
                    **{"url": f"https://example.com/{number}.jpg", "caption": caption(number), "key": key},
                    **{"status": "failed_to_download" if failed else "success"},
                    **{"error_message": "HTTP Error 404: Not Found" if failed else None},
                    **{"width": None if failed else 24, "height": None if failed else 20},
                    **{"original_width": None if failed else 48, "original_height": None if failed else 40},
                    **{"exif": None if failed else "{}", "sha256": None},
                }
                if not failed:
                    row["sha256"] = hashlib.sha256(jpeg(number)).hexdigest()
                    for extension, content in (
                        ("jpg", jpeg(number)),
                        ("txt", caption(number).encode()),
                        ("json", json.dumps(row).encode()),
                    ):
                        add(tar, f"{key}.{extension}", content)
                    rows_out.add((f"{shard:05d}/{key}.jpg", caption(number)))
                rows.append(row)
        pq.write_table(pa.Table.from_pylist(rows), stem.with_suffix(".parquet"))
        stem.with_name(f"{stem.name}_stats.json").write_text(json.dumps({"count": len(rows), "successes": 3}))
    return rows_out


def write_webdataset(folder: Path) -> set[tuple[str, str]]:
    """Tars alone, with text members and a picture whose mode no model reads."""
    folder.mkdir(parents=True)
    rows = set()
    for shard in range(2):
        with tarfile.open(folder / f"train-{shard:06d}.tar", "w") as tar:
            for place in range(IMAGES // 2):
                number = shard * (IMAGES // 2) + place
                content = jpeg(number)
                if place == 1:
                    content = encode(Image.open(io.BytesIO(picture(number))).convert("CMYK"), "JPEG")
                add(tar, f"sample{place}.jpg", content)
                add(tar, f"sample{place}.txt", caption(number).encode())
                rows.add((f"train-{shard:06d}/sample{place}.jpg", caption(number)))
    return rows


def add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    header = tarfile.TarInfo(name)
    header.size = len(content)
    tar.addfile(header, io.BytesIO(content))


def _write_images(folder: Path, names: list[str]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for number, name in enumerate(names):
        (folder / name).write_bytes(jpeg(number))


def write_coco(folder: Path) -> set[tuple[str, str]]:
    rows = set()
    (folder / "annotations").mkdir(parents=True)
    for split, numbers in (("train", range(6)), ("val", range(6, IMAGES))):
        names = {number: f"{number:012d}.jpg" for number in numbers}
        (folder / f"{split}2017").mkdir()
        images, annotations = [], []
        for number, name in names.items():
            (folder / f"{split}2017" / name).write_bytes(jpeg(number))
            images.append({"license": 3, "file_name": name, "height": 20, "width": 24, "id": number, "coco_url": "x"})
            for text in (caption(number), f"another {caption(number)}"):
                annotations.append({"image_id": number, "id": len(annotations), "caption": text})
                rows.add((f"{split}2017/{name}", text))
        found = {"info": {"year": 2017}, "licenses": [], "images": images, "annotations": annotations}
        (folder / "annotations" / f"captions_{split}2017.json").write_text(json.dumps(found))
    return rows


def write_karpathy(folder: Path) -> set[tuple[str, str]]:
    splits = ["train", "restval", "train", "train", "restval", "train", "val", "test"]
    rows, images = set(), []
    for number, split in enumerate(splits):
        year = "train2014" if split == "train" else "val2014"
        name = f"COCO_{year}_{number:012d}.jpg"
        (folder / year).mkdir(parents=True, exist_ok=True)
        (folder / year / name).write_bytes(jpeg(number))
        sentence = {"tokens": caption(number).split(), "raw": caption(number), "imgid": number, "sentid": number}
        about = {"filepath": year, "filename": name, "imgid": number, "cocoid": number, "sentids": [number]}
        images.append({**about, "split": split, "sentences": [sentence]})
        rows.add((f"{year}/{name}", caption(number)))
    (folder / "dataset_coco.json").write_text(json.dumps({"images": images, "dataset": "coco"}))
    return rows


def _flickr_images(folder: Path) -> list[str]:
    names = [f"10000{number}.jpg" for number in range(IMAGES)]
    _write_images(folder / "flickr30k_images", names)
    return names


def write_flickr_results(folder: Path) -> set[tuple[str, str]]:
    """With the line of the real file that lost its bar."""
    names = _flickr_images(folder)
    lines = ["image_name| comment_number| comment"]
    for number, name in enumerate(names):
        lines += [f"{name}| {place}| {text} ." for place, text in enumerate((caption(number), f"b {caption(number)}"))]
    (folder / "results.csv").write_text("\n".join([*lines, f"{names[0]}| 4   A dog runs across the grass ."]))
    return {
        (f"flickr30k_images/{name}", f"{text} .")
        for number, name in enumerate(names)
        for text in (caption(number), f"b {caption(number)}")
    }


def write_flickr_token(folder: Path) -> set[tuple[str, str]]:
    names = _flickr_images(folder)
    lines = [f"{name}#{place}\t{caption(number)} {place}" for number, name in enumerate(names) for place in range(2)]
    (folder / "results_20130124.token").write_text("\n".join(lines) + "\n")
    return {(f"flickr30k_images/{n}", f"{caption(i)} {place}") for i, n in enumerate(names) for place in range(2)}


def write_flickr8k(folder: Path) -> set[tuple[str, str]]:
    names = _flickr_images(folder)
    lines = ["image,caption", *(f'{name},"a, {caption(number)} ."' for number, name in enumerate(names))]
    (folder / "captions.txt").write_text("\n".join(lines))
    return {(f"flickr30k_images/{name}", f"a, {caption(number)} .") for number, name in enumerate(names)}


def write_flickr_hub(folder: Path) -> set[tuple[str, str]]:
    names = _flickr_images(folder)
    with (folder / "flickr_annotations_30k.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["raw", "sentids", "split", "filename", "img_id"])
        for number, name in enumerate(names):
            split = "val" if number == 6 else "test" if number == 7 else "train"
            writer.writerow([json.dumps([caption(number), "second"]), "[0, 1]", split, name, number])
    return {(f"flickr30k_images/{n}", text) for i, n in enumerate(names) for text in (caption(i), "second")}


def write_vqa(folder: Path) -> set[tuple[str, str]]:
    rows, questions, annotations = set(), [], []
    (folder / "train2014").mkdir(parents=True)
    for number in range(IMAGES):
        name = f"COCO_train2014_{number:012d}.jpg"
        (folder / "train2014" / name).write_bytes(jpeg(number))
        for place, answer in enumerate(("yes", "2")):
            asked = {"image_id": number, "question_id": number * 1000 + place}
            questions.append({**asked, "question": f"Is it {caption(number)} {place}?"})
            answers = [{"answer": answer, "answer_confidence": "yes", "answer_id": n} for n in range(1, 11)]
            kind = {"question_type": "is it", "answer_type": "other", "multiple_choice_answer": answer}
            annotations.append({**asked, **kind, "answers": answers})
            rows.add((f"train2014/{name}", f"Is it {caption(number)} {place}? {answer}"))
    about = {"info": {}, "license": {}, "data_type": "mscoco", "data_subtype": "train2014"}
    files = (("v2_OpenEnded_mscoco_train2014_questions", {**about, "task_type": "Open-Ended", "questions": questions}),)
    for name, found in (*files, ("v2_mscoco_train2014_annotations", {**about, "annotations": annotations})):
        (folder / f"{name}.json").write_text(json.dumps(found))
    return rows


def write_hub_parquet(folder: Path) -> set[tuple[str, str]]:
    """As `datasets` writes a data set with an Image feature and a list of captions."""
    rows = set()
    (folder / "data").mkdir(parents=True)
    image = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    features = {"image": {"_type": "Image"}, "captions": {"_type": "List", "feature": {"dtype": "string"}}}
    schema = pa.schema({"image": image, "captions": pa.list_(pa.string()), "image_id": pa.int64()})
    schema = schema.with_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    for split, numbers in (("train", range(6)), ("validation", [6]), ("test", [7])):
        name = f"data/{split}-00000-of-00001-0123456789abcdef"
        table = []
        for place, number in enumerate(numbers):
            texts = [caption(number), f"another {caption(number)}"]
            table.append({"image": {"bytes": jpeg(number), "path": f"{number}.jpg"}, "captions": texts, "image_id": 1})
            rows |= {(f"{name}/{place:06d}", text) for text in texts}
        pq.write_table(pa.Table.from_pylist(table, schema), folder / f"{name}.parquet", row_group_size=2)
    return rows


def write_folder(folder: Path) -> set[tuple[str, str]]:
    names = [f"{number}.jpg" for number in range(IMAGES)]
    _write_images(folder / "deep", names)
    for number, name in enumerate(names):
        (folder / "deep" / name).with_suffix(".txt").write_text(caption(number))
    return {(f"deep/{name}", caption(number)) for number, name in enumerate(names)}


_QUESTIONS = {"annotations": "v2_mscoco_train2014_annotations.json", "images": "train2014", "split": "train"}
FORMATS = {
    "folder": Format("folder", {"captions": "sidecar"}, write_folder),
    "img2dataset": Format("tars", {}, write_img2dataset),
    "webdataset": Format("tars", {"split": "train"}, write_webdataset),
    "coco": Format(
        "coco",
        {
            "annotations": {
                f"annotations/captions_{split}2017.json": {"images": f"{split}2017", "split": split}
                for split in ("train", "val")
            }
        },
        write_coco,
    ),
    "karpathy": Format("coco", {"annotations": {"dataset_coco.json": {}}}, write_karpathy),
    "flickr results": Format("flickr", {}, write_flickr_results),
    "flickr token": Format("flickr", {"captions": "results_20130124.token"}, write_flickr_token),
    "flickr8k": Format("flickr", {"captions": "captions.txt"}, write_flickr8k),
    "flickr hub": Format("flickr", {"captions": "flickr_annotations_30k.csv"}, write_flickr_hub),
    "vqa": Format("vqa", {"questions": {"v2_OpenEnded_mscoco_train2014_questions.json": _QUESTIONS}}, write_vqa),
    "hub parquet": Format("parquet", {"columns": {"caption": "captions"}, "origin": "human"}, write_hub_parquet),
}
