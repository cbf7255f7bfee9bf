"""Measured models → registry, gate, report, summary."""

from kedro.pipeline import Node, Pipeline

from blip_pipelines.pipelines.release.gating import gate
from blip_pipelines.pipelines.release.nodes import register, report
from blip_pipelines.pipelines.release.released import releases
from blip_pipelines.pipelines.rounds import in_round, models_of, with_known


def create_pipeline(rounds: int = 1) -> Pipeline:
    models, filtered = models_of(rounds), [in_round("capfilt", number) for number in range(1, rounds + 1)]
    released, measured = releases(rounds), (*models, "blip2_stage1", "blip2_stage2")
    trained = (*measured, "instruct_tuning", "question_answering")
    of_models = {
        **{name: name for entry in released for name in (*entry.data_sets, "noise")},
        "parameters": "params:release",
        "settings": "parameters",
    }
    of_stages = {
        **{
            f"run_{stage}": f"{stage}_run" for stage in ("ingestion", *trained, *filtered, "instructions", "evaluation")
        },
        **{f"history_{stage}": f"{stage}_history" for stage in trained},
        **{
            f"history_{stage}_{part}": f"{stage}_{part}_history"
            for stage in filtered
            for part in ("captioner", "filter")
        },
        **{f"predictions_{stage}": f"{stage}_predictions" for stage in measured},
        **{
            f"answers_{stage}": f"{stage}_answers"
            for stage in ("blip2_stage2", "instruct_tuning", "question_answering")
        },
        **{f"{kind}_{stage}": f"{stage}_{kind}" for stage in filtered for kind in ("decided", "metrics")},
    }
    return Pipeline(
        [
            Node(
                with_known(register, releases=released),
                of_models,
                "registered",
                name="register",
            ),
            Node(
                with_known(gate, releases=released),
                {"registered": "registered", **of_models, "pairs": "pairs", "images": "images"},
                "gate",
                name="gate",
            ),
            Node(
                report,
                {
                    "pairs": "pairs",
                    "images": "images",
                    "quarantine": "quarantine",
                    "noise": "noise",
                    "contracts": "contracts",
                    "docs": "data_docs",
                    "metrics": "evaluation_metrics",
                    "registered": "registered",
                    "gate": "gate",
                    "ablations": "ablations",
                    **of_stages,
                },
                ["report", "summary"],
                name="report",
            ),
        ],
        tags="release",
    )
