from pathlib import Path

import pyarrow as pa
import pytest

from blip_pipelines.evaluation.answers import ANSWER_SCHEMA, write_answers
from blip_pipelines.evaluation.evidence import Evidence
from blip_pipelines.evaluation.questions import questions

STAGES = {"instruct_tuning": 0.9, "blip2_stage2": 0.4}


def evidence(answers: dict[str, Path], metrics: dict[str, float]) -> Evidence:
    nowhere = Path("nowhere")
    return Evidence({}, metrics, nowhere, nowhere, nowhere, {}, {}, (), (), answers=answers)


@pytest.fixture
def asked(tmp_path: Path) -> Evidence:
    """Two models asked the same two data sets; the newer is right more often."""
    folders, metrics = {}, {}
    for stage, share in STAGES.items():
        rows = []
        for role, data_set in ("held_in", "kind"), ("held_out", "choice"):
            for number in range(10):
                right = number < 10 * share
                rows.append(
                    {
                        **{"key": f"k{number}", "sample": str(number), "data_set": data_set, "task": "recognition"},
                        **{"subset": role, "instruction": f"<b>{data_set} {number}?", "answer": "a dog"},
                        **{"references": ["a dog"], "candidates": None, "metric": "exact_match"},
                        "prediction": "a dog" if right else f"{stage} errs",
                        "score": float(right),
                        "majority_score": 0.0,
                    }
                )
            metrics |= {
                f"{stage}/exact_match/{data_set}": share,
                f"{stage}/majority/{data_set}": 0.25,
                f"{stage}/rows/{data_set}": 10.0,
                f"{stage}/accuracy/{role}": share,
                f"{stage}/majority/{role}": 0.25,
                f"{stage}/accuracy_gain_low/{role}": share - 0.35,
                f"{stage}/accuracy_gain_high/{role}": share - 0.15,
            }
        folders[stage] = tmp_path / stage
        write_answers(folders[stage], pa.Table.from_pylist(rows, ANSWER_SCHEMA))
    metrics |= {
        "instruct_tuning/accuracy_over_blip2_stage2_low/held_in": 0.31,
        "instruct_tuning/accuracy_over_blip2_stage2_high/held_in": 0.69,
    }
    return evidence(folders, metrics)


def test_the_table_has_each_data_set_and_the_roles_pooled_with_what_the_newest_gains(asked: Evidence) -> None:
    page = str(questions(asked))
    lines = [line for line in page.replace("<tr", "\n<tr").splitlines() if line.startswith("<tr")]
    head, kind, pooled = lines[:3]
    assert head.index("blip2_stage2") < head.index("instruct_tuning") < head.index("over one answer")
    for cell in ("held in", "kind", "25", "40", "90"):
        assert cell in kind
    assert "+0.55 to +0.75" in pooled and "+0.31 to +0.69" in pooled


def test_questions_are_shown_right_and_wrong_beside_the_other_models_answer(asked: Evidence) -> None:
    page = str(questions(asked))
    assert page.count("\u2713") == 6 and page.count("\u2717") == 2  # three right and the one wrong of each data set
    assert "instruct_tuning errs" in page and "blip2_stage2 errs" in page
    assert "&lt;b&gt;kind" in page and "<b>kind" not in page


def test_without_answers_it_says_so(tmp_path: Path) -> None:
    for answers in ({}, {"instruct_tuning": tmp_path}):
        assert "No answers yet" in str(questions(evidence(answers, {})))
