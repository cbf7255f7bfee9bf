"""Measured models → registry, report, summary."""

from kedro.pipeline import Node, Pipeline

from blip_pipelines.pipelines.release.nodes import register, report
from blip_pipelines.pipelines.rounds import in_round, models_of, with_known


def create_pipeline(rounds: int = 1) -> Pipeline:
    models, filtered = models_of(rounds), [in_round("capfilt", number) for number in range(1, rounds + 1)]
    last, judge = models[-1], filtered[-1]
    of_stages = {
        **{f"run_{stage}": f"{stage}_run" for stage in ("ingestion", *models, *filtered, "evaluation")},
        **{f"history_{stage}": f"{stage}_history" for stage in models},
        **{
            f"history_{stage}_{part}": f"{stage}_{part}_history"
            for stage in filtered
            for part in ("captioner", "filter")
        },
        **{f"predictions_{stage}": f"{stage}_predictions" for stage in models},
        **{f"{kind}_{stage}": f"{stage}_{kind}" for stage in filtered for kind in ("decided", "metrics")},
    }
    return Pipeline(
        [
            Node(
                with_known(register, stages=(last, judge)),
                [
                    *(f"{last}_model", f"{judge}_pairs", f"{last}_run"),
                    *(f"{judge}_filter", "pairs", f"{judge}_run"),
                    *("evaluation_metrics", f"{judge}_metrics", "params:release"),
                ],
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
                    "metrics": "evaluation_metrics",
                    "registered": "registered",
                    "ablations": "ablations",
                    **of_stages,
                },
                ["report", "summary"],
                name="report",
            ),
        ],
        tags="release",
    )
