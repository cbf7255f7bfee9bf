"""A pretrained MED and its corpus → captioner, filter, the next corpus."""

from kedro.pipeline import Node, Pipeline

from blip_pipelines.pipelines.capfilt import nodes
from blip_pipelines.pipelines.rounds import in_round, with_known


def create_pipeline(number: int = 1) -> Pipeline:
    """One round: its models go on from the last pretraining and its corpus, and judge the captions of ingestion."""
    stage, parameters = in_round("capfilt", number), "params:capfilt"
    if number == 1:
        model, before = "med_pretraining_model", "pairs"
    else:
        model = f"{in_round('med_bootstrapped', number - 1)}_model"
        before = f"{in_round('capfilt', number - 1)}_pairs"

    def made(name: str) -> str:
        return f"{stage}_{name}"

    return Pipeline(
        [
            Node(
                nodes.finetune_captioner,
                [model, before, "images", parameters],
                [made("captioner"), made("captioner_history"), made("captioner_record")],
                name=in_round("finetune_captioner", number),
            ),
            Node(
                nodes.finetune_filter,
                [model, before, "images", parameters],
                [made("filter"), made("filter_history"), made("filter_record")],
                name=in_round("finetune_filter", number),
            ),
            Node(
                with_known(nodes.write_captions, number=number),
                [made("captioner"), "pairs", "images", parameters],
                [made("synthetic"), made("write_record")],
                name=in_round("write_captions", number),
            ),
            Node(
                nodes.judge_captions,
                [made("filter"), "pairs", "images", made("synthetic"), parameters],
                [made("judged"), made("judge_record")],
                name=in_round("judge_captions", number),
            ),
            Node(
                with_known(nodes.compose, number=number),
                ["pairs", made("judged"), made("places"), parameters],
                [made("pairs"), made("decided"), made("compose_record")],
                name=in_round("compose", number),
            ),
            Node(
                nodes.check_contracts,
                [before, made("pairs"), made("decided"), "images", made("places"), parameters],
                [made("pairs_checked"), made("contracts"), made("data_docs"), made("shift")],
                name=in_round("check_composed", number),
            ),
            Node(
                with_known(nodes.measure, stage=stage),
                [
                    *(made("decided"), "noise", made("shift")),
                    *(made(f"{part}_record") for part in ("captioner", "filter", "write", "judge", "compose")),
                ],
                [made("metrics"), made("run")],
                name=in_round("measure_capfilt", number),
            ),
        ],
        tags=stage,
    )
