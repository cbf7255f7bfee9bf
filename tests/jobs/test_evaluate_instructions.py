"""Models asked a table of a dozen pictures: what is drawn, what is written down, and that it does not depend on how."""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from blip2_job_samples import export_stage1, export_stage2
from instruct_samples import export_tuned
from instruction_samples import letters, write, write_labels

from blip_pipelines.config import ConfigError
from blip_pipelines.data.instruction_tokens import InstructionTokens, TokenLimits
from blip_pipelines.data.instructions import Instructions
from blip_pipelines.data.loader import DecodedPixels
from blip_pipelines.data.storage import StorageError
from blip_pipelines.data.transforms import ImageConfig
from blip_pipelines.evaluation.answers import PREDICTIONS
from blip_pipelines.inference.answering import AnswerConfig, Answerer
from blip_pipelines.jobs import evaluate_instructions
from blip_pipelines.jobs.instruction_answers import drawn_rows
from blip_pipelines.models.blip2_exports import load_blip2
from blip_pipelines.training.distributed import World

ASK: dict[str, Any] = {
    "split": "val",
    "prompting": {"prompt": "picture : {image} {instruction} it is"},
    "limits": {"instruction": 6, "question": 12, "answer": 6},
    "answers": {"beams": 1, "max_tokens": 3, "repetition_penalty": 1.0},
    "by_task": {"captioning": {"beams": 2, "max_tokens": 4, "repetition_penalty": 1.0}},
    "bootstrap_draws": 50,
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("data")
    pairs, images, labels = write_labels(folder, [24, 20])
    words = {"a": "red crab", "b": "dog", "c": "house", "d": "it"}
    written = labels.read_text()
    for letter, word in words.items():
        written = written.replace(f",{letter},", f",{word},")
    labels.write_text(written)
    said = letters(
        task="captioning", metric="cider", answer="a {letter}", templates=["what is this ?"], candidates=None
    )
    kept_out = letters(role="held_out", task="verification", templates=["is it a picture ?"])
    data_sets = {"letters": letters(), "said": said, "kept_out": kept_out}
    stage1 = export_stage1(folder)
    stage2 = export_stage2(stage1, folder / "stage2")
    tuned = export_tuned(stage2, folder / "tuned", ASK["prompting"]["prompt"])
    table = write(folder, data_sets, labels, pairs, images)
    return {"instructions": table, "images": images, "stage1": stage1, "stage2": stage2, "tuned": tuned}


def ask(root: Path, data: dict[str, Path], model: str = "tuned", **changed: Any) -> tuple[dict[str, Any], Path]:
    work = root / "work" / model
    (work / "out").mkdir(parents=True, exist_ok=True)
    inputs = {name: data[name] for name in ("instructions", "images")} | {"model": data[model]}
    return evaluate_instructions.run({**ASK, **changed}, inputs, work, World()), work / "out" / PREDICTIONS


@pytest.mark.parametrize("model", ["stage2", "tuned"])
def test_answers_are_those_of_the_model_row_by_row(tmp_path: Path, data: dict[str, Path], model: str) -> None:
    facts, path = ask(tmp_path, data, model, batch_rows=3)
    rows = pq.read_table(path).to_pylist()
    assert len(rows) == facts["rows"] > 6
    exported = load_blip2(data[model])
    blip2 = exported.model
    assert blip2 is not None and exported.tokenizer is not None
    blip2.speak(ASK["prompting"]["prompt"])
    tokens = InstructionTokens(blip2.language.tokenizer, blip2.place, exported.tokenizer, TokenLimits(**ASK["limits"]))
    table = Instructions.open(data["instructions"], data["images"]).select(split="val")
    pixels = torch.from_numpy(DecodedPixels(table, ImageConfig(size=8))(np.arange(len(table))))
    for row, found in enumerate(rows):
        config = ASK["by_task"]["captioning"] if found["task"] == "captioning" else ASK["answers"]
        candidates = table.candidates(np.array([row]))
        (answer,) = Answerer(blip2, tokens, AnswerConfig(**config)).answer(
            pixels[row : row + 1, None], [found["instruction"]], candidates
        )
        assert answer.text == found["prediction"], row
        assert (candidates[0] is None) == (found["task"] == "captioning")


def test_measures_are_by_data_set_and_pooled_by_role(tmp_path: Path, data: dict[str, Path]) -> None:
    facts, path = ask(tmp_path, data)
    metrics, rows = facts["metrics"], pq.read_table(path).to_pylist()
    for role, data_set in ("held_in", "letters"), ("held_out", "kept_out"):
        scores = [row["score"] for row in rows if row["data_set"] == data_set]
        assert metrics[f"accuracy/{role}"] == metrics[f"exact_match/{data_set}"] == pytest.approx(np.mean(scores))
        assert metrics[f"accuracy_gain_low/{role}"] <= metrics[f"accuracy_gain/{role}"]
    assert "cider/said" in metrics


def test_every_model_is_asked_the_same_drawn_rows(tmp_path: Path, data: dict[str, Path]) -> None:
    asked = []
    for model in ("stage2", "tuned"):
        facts, path = ask(tmp_path, data, model, rows=2)
        assert facts["rows"] == 6
        asked.append([(row["data_set"], row["sample"]) for row in pq.read_table(path).to_pylist()])
    assert asked[0] == asked[1]
    view = Instructions.open(data["instructions"]).select(split="val")
    one, other = (drawn_rows(view, 2, seed).tolist() for seed in (0, 1))
    assert one != other
    part = view.select(data_set="letters")
    names = part.values("sample", drawn_rows(part, 2))
    assert names == [
        name
        for name, data_set in zip(*(view.values(c, drawn_rows(view, 2)) for c in ("sample", "data_set")), strict=True)
        if data_set == "letters"
    ]


def test_a_role_can_be_asked_more_rows_than_the_others(tmp_path: Path, data: dict[str, Path]) -> None:
    asked = {}
    for name, how in {"few": {}, "more": {"rows_by_role": {"held_out": None}}}.items():
        _, path = ask(tmp_path / name, data, rows=1, **how)
        asked[name] = Counter(row["data_set"] for row in pq.read_table(path).to_pylist())
    every = len(Instructions.open(data["instructions"]).select(split="val", data_set="kept_out"))
    assert every > 1
    assert asked["few"] == {"letters": 1, "said": 1, "kept_out": 1}
    assert asked["more"] == {"letters": 1, "said": 1, "kept_out": every}
    with pytest.raises(ConfigError, match="rows_by_role: no role 'held_up'"):
        ask(tmp_path, data, rows_by_role={"held_up": 1})


def test_where_there_are_too_many_candidates_the_answer_is_written(tmp_path: Path, data: dict[str, Path]) -> None:
    _, path = ask(tmp_path, data, most_candidates=1)
    candidates = Instructions.open(data["instructions"]).data_sets["letters"].candidates
    answers = [row["prediction"] for row in pq.read_table(path).to_pylist() if row["data_set"] == "letters"]
    assert candidates is not None and not set(answers) <= set(candidates)


def test_what_cannot_be_asked_is_an_error_that_says_why(tmp_path: Path, data: dict[str, Path]) -> None:
    with pytest.raises(StorageError, match="no language model in it"):
        ask(tmp_path, data, "stage1")
    with pytest.raises(ConfigError, match="no row of split 'tset'"):
        ask(tmp_path, data, split="tset")
