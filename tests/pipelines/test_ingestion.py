from pathlib import Path

import pytest
from data_samples import caption, picture

from blip_pipelines.data.storage import content_hash, write_json
from blip_pipelines.pipelines.datasets import File, Folder
from blip_pipelines.pipelines.ingestion.nodes import check_contracts, ingest
from blip_pipelines.pipelines.med_pretraining.nodes import UncheckedPairsError, pretrain


def photos(folder: Path, count: int = 12) -> Path:
    folder.mkdir()
    lines = ["image,caption"]
    for number in range(count):
        (folder / f"{number}.png").write_bytes(picture(number))
        lines.append(f"{number}.png,{caption(number)} number {number}")
    (folder / "captions.csv").write_text("\n".join(lines))
    return folder


@pytest.fixture
def run_ingest(tmp_path):
    """Ingests the folder as the pipeline does: the catalog's datasets put the outputs into place."""
    places = {name: tmp_path / "data" / name for name in ("images", "pairs", "quarantine", "noise", "data_docs")}
    splits = {"validation": 0.25, "test": 0.25}
    block = {"source": {"kind": "folder"}, "splits": splits, "workers": 1, "launch": {"work": str(tmp_path / "work")}}

    def run(source: Path, **changed) -> dict:
        images, pairs, quarantine, noise, record = ingest(source, places, {**block, **changed})
        Folder(str(places["images"])).save(images)
        Folder(str(places["pairs"])).save(pairs)
        File(str(places["quarantine"])).save(quarantine)
        File(str(places["noise"])).save(noise)
        return record

    run.places, run.block = places, block
    return run


def test_unchanged_source_is_not_ingested_again(tmp_path, run_ingest):
    source = photos(tmp_path / "photos")
    first = run_ingest(source)
    written = {path: path.stat().st_mtime_ns for path in (tmp_path / "data").rglob("*") if path.is_file()}
    second = run_ingest(source)
    assert (first["reused"], second["reused"]) == (False, True) and second["seconds"] == first["seconds"]
    assert written == {path: path.stat().st_mtime_ns for path in (tmp_path / "data").rglob("*") if path.is_file()}


@pytest.mark.parametrize("change", ["source", "parameter", "output", "force"])
def test_whatever_changes_is_ingested_again(tmp_path, run_ingest, change):
    source = photos(tmp_path / "photos")
    run_ingest(source)
    block = {}
    if change == "source":
        (source / "captions.csv").write_text((source / "captions.csv").read_text() + "\n0.png,a second caption")
    elif change == "parameter":
        block = {"seed": 1}
    elif change == "output":
        run_ingest.places["noise"].write_bytes(b"")
    else:
        block = {"launch": {"force": True, **run_ingest.block["launch"]}}
    assert not run_ingest(source, **block)["reused"]


def test_bounds_of_contracts_are_judged_without_ingesting_again(tmp_path, run_ingest):
    source = photos(tmp_path / "photos")
    run_ingest(source)
    assert run_ingest(source, contracts={"max_aspect": 2.0})["reused"]


def test_nothing_is_trained_on_pairs_whose_contracts_were_not_checked(tmp_path):
    pairs = tmp_path / "pairs"
    pairs.mkdir()
    write_json(pairs / "manifest.json", {"rows": 1})
    with pytest.raises(UncheckedPairsError, match="run the stage that makes it"):
        pretrain(pairs, tmp_path, tmp_path, {"pairs": "0" * 64}, {})


@pytest.mark.slow  # Great Expectations takes ten seconds to import
def test_checked_pairs_are_sealed_and_broken_ones_stop_the_pipeline_with_their_docs(tmp_path, run_ingest):
    from blip_pipelines.data.contracts import ContractError

    record = run_ingest(photos(tmp_path / "photos"))
    data_set = run_ingest.places["pairs"], run_ingest.places["images"], run_ingest.places, record
    pairs = run_ingest.places["pairs"]
    seal, rules, docs, whole = check_contracts(*data_set, run_ingest.block)
    assert whole["seconds"] > record["seconds"]
    assert seal == {"pairs": content_hash(pairs)} and all(rule["passed"] for rule in rules)
    assert (docs / "index.html").exists()
    assert check_contracts(*data_set, run_ingest.block) == (seal, rules, docs, whole)
    strict = {**run_ingest.block, "contracts": {"min_side": 100}}
    with pytest.raises(ContractError, match="image_size"):
        check_contracts(*data_set, strict)
