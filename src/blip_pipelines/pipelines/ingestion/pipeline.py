"""A source → images, pairs, quarantine, contracts."""

from kedro.pipeline import Node, Pipeline

from blip_pipelines.pipelines.ingestion.nodes import check_contracts, ingest, show_samples


def create_pipeline() -> Pipeline:
    return Pipeline(
        [
            Node(
                ingest,
                ["source", "ingestion_places", "params:ingestion"],
                ["images", "pairs", "quarantine", "noise", "ingest_record"],
                name="ingest",
            ),
            Node(
                check_contracts,
                ["pairs", "images", "ingestion_places", "ingest_record", "params:ingestion"],
                ["pairs_checked", "contracts", "data_docs", "ingestion_run"],
                name="check_contracts",
            ),
            Node(show_samples, ["pairs", "images"], "samples", name="show_samples"),
        ],
        tags="ingestion",
    )
