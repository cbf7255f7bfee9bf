"""A measured model → registry, report, summary."""

from kedro.pipeline import Node, Pipeline

from blip_pipelines.pipelines.release.nodes import register, report


def create_pipeline() -> Pipeline:
    return Pipeline(
        [
            Node(
                register,
                ["med_pretraining_model", "pairs", "evaluation_metrics", "med_pretraining_run", "params:release"],
                "registered",
                name="register",
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
                    "history": "med_pretraining_history",
                    "predictions": "med_pretraining_predictions",
                    "metrics": "evaluation_metrics",
                    "registered": "registered",
                    "ingestion": "ingestion_run",
                    "med_pretraining": "med_pretraining_run",
                    "evaluation": "evaluation_run",
                },
                ["report", "summary"],
                name="report",
            ),
        ],
        tags="release",
    )
