"""The job of question answering on two dozen pictures: what it leaves, and that cutting it changes no bit of it."""

from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from data_samples import tokenizer_json
from instruction_samples import letters, write, write_labels
from job_samples import outputs

from blip_pipelines.config import ConfigError
from blip_pipelines.data.storage import read_json
from blip_pipelines.data.tokens import prune_vocabulary
from blip_pipelines.evaluation.answers import PREDICTIONS
from blip_pipelines.jobs.launch import LaunchConfig, launch
from blip_pipelines.jobs.receipt import Receipt
from blip_pipelines.models.exports import export_med
from blip_pipelines.models.med import Med, MedConfig
from blip_pipelines.models.question_answering import load_question_answering
from blip_pipelines.models.text import TextConfig
from blip_pipelines.models.vision import VisionConfig

JOB = "blip_pipelines.jobs.question_answering"
ASK = "blip_pipelines.jobs.evaluate_question_answering"


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("data")
    pairs, images, labels = write_labels(folder, [16, 12])
    data_sets = {
        "letters": letters(),
        "words": letters(answer="{letter} house", candidates=None, metric="vqa_accuracy"),
        "choice": letters(role="held_out", answer=None, candidates=None, ask={"kind": "choice", "about": "letter"}),
    }
    table = write(folder, data_sets, labels, pairs, images)
    tokenizer = prune_vocabulary(tokenizer_json(), ["which letter name the house a b c d"])[0]
    text = TextConfig(width=16, layers=1, heads=2, ffn_width=16, max_positions=24, dropout=0.1).fit(tokenizer)
    vision = VisionConfig(image_size=16, patch_size=8, width=16, layers=1, heads=2, mlp_width=16)
    export_med(Med(MedConfig(vision, text, 8)), folder / "start", tokenizer, {"size": 16})
    return {"instructions": table, "images": images, "start": folder / "start"}


def config(**changed: Any) -> dict[str, Any]:
    """Dropout, two micro-steps and a probe are in play."""
    return {
        "limits": {"question": 20, "answer": 6},
        "optimizer": {"learning_rate": 1e-3, "warmup_steps": 2},
        "training": {
            "steps": 6,
            "batch_samples_global": 8,
            "accumulation": 2,
            "validate_every_steps": 3,
            "checkpoint_every_steps": 2,
            "peak_flops": 1e9,
        },
        "probe": {"rows": 2, "answers": {"writing": {"strategy": "greedy", "min_tokens": 1, "max_tokens": 4}}},
        **changed,
    }


def start(root: Path, inputs: dict[str, Path], settings: dict[str, Any], on_history: Any = None) -> Receipt:
    how = LaunchConfig(work=str(root / "work"), mode="inline", threads_per_rank=1)
    return launch(JOB, settings, inputs, how, on_history)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, inputs: dict[str, Path]) -> Receipt:
    return start(tmp_path_factory.mktemp("whole"), inputs, config())


def test_outputs_are_a_model_that_loads_its_checkpoint_and_the_curves(whole: Receipt) -> None:
    exported = load_question_answering(whole.folder)
    assert exported.image["size"] == 16 and exported.stem is None
    assert (whole.folder / "checkpoint" / "tensors.safetensors").exists()
    history = read_json(whole.folder / "history.json")
    assert [row["step"] for row in history if "loss" in row] == [1, 2, 3, 4, 5, 6]
    assert any("val/exact/held_in" in row and "val/exact/held_out" in row for row in history)
    assert whole.facts["rows"] == 42 and sum(whole.facts["shares"].values()) == pytest.approx(1)
    assert whole.facts["probabilities"] == pytest.approx({"letters": 0.5, "words": 0.5})


def test_cut_run_leaves_the_same_bytes(tmp_path: Path, inputs: dict[str, Path], whole: Receipt) -> None:
    class Cut(Exception):
        pass

    def cut(rows: Any) -> None:
        if any(row["step"] >= 4 for row in rows):
            raise Cut

    with pytest.raises(Cut):
        start(tmp_path, inputs, config(), cut)
    assert outputs(start(tmp_path, inputs, config())) == outputs(whole)


def test_a_model_is_asked_and_each_data_set_measured_by_its_metric(
    tmp_path: Path, inputs: dict[str, Path], whole: Receipt
) -> None:
    asked = {"model": whole.folder, "instructions": inputs["instructions"], "images": inputs["images"]}
    how = LaunchConfig(work=str(tmp_path), mode="inline", threads_per_rank=1)
    settings = {"split": "val", "limits": {"question": 20, "answer": 6}, "bootstrap_draws": 100}
    receipt = launch(ASK, settings, asked, how)
    metrics = receipt.facts["metrics"]
    assert {"exact_match/letters", "vqa_accuracy/words", "accuracy/held_in", "majority/held_out"} <= metrics.keys()
    rows = pq.read_table(receipt.folder / PREDICTIONS).to_pylist()
    assert len(rows) == receipt.facts["rows"] == 21
    assert all(row["prediction"] in "abcd" for row in rows if row["data_set"] != "words")
    with pytest.raises(ConfigError, match="no row of split 'test'"):
        launch(ASK, {**settings, "split": "test"}, asked, how)


def test_longer_training_learns_which_answers_there_are(tmp_path: Path, inputs: dict[str, Path]) -> None:
    training = {"steps": 40, "batch_samples_global": 16, "validate_every_steps": 0, "peak_flops": 1e9}
    found = start(tmp_path, inputs, config(training=training, optimizer={"learning_rate": 5e-3, "warmup_steps": 5}))
    history = [row["lm"] for row in read_json(found.folder / "history.json") if "lm" in row]
    assert history[-1] < 0.6 * history[0]


def test_limits_that_the_model_does_not_reach_are_refused(tmp_path: Path, inputs: dict[str, Path]) -> None:
    with pytest.raises(ConfigError, match=r"limits\.question: 64 is outside 3 to 24"):
        start(tmp_path, inputs, config(limits={"question": 64, "answer": 6}))
