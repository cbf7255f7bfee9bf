from pathlib import Path

import pytest
from kedro.io import DatasetError

from blip_pipelines.data.storage import content_hash
from blip_pipelines.jobs.receipt import OUTPUTS, Receipt, find, write_receipt
from blip_pipelines.pipelines.datasets import File, Folder, Json, Page, Places, Table


def finished(root: Path, name: str = "f" * 8, content: str = "weights") -> Receipt:
    """A job's outputs as they lie in the work folder when `launch` returns."""
    outputs = root / name / OUTPUTS
    outputs.mkdir(parents=True)
    (outputs / "model.bin").write_text(content)
    write_receipt(outputs, "some.job", name, {}, {"loss": 1.0})
    return Receipt("some.job", name, "code", outputs, {"loss": 1.0}, seconds=3.0)


def test_finished_folder_is_moved_and_found_again(tmp_path):
    receipt, final = finished(tmp_path / "work"), tmp_path / "data" / "model"
    folder = Folder(str(final))
    assert not folder.exists()
    folder.save(receipt)
    assert folder.exists() and folder.load() == final and (final / "model.bin").read_text() == "weights"
    assert not (tmp_path / "work" / receipt.fingerprint).exists()
    found = find(tmp_path / "work", receipt.fingerprint, "code")
    assert found is not None and found.folder == final and found.reused


def test_saving_a_reused_folder_in_its_place_touches_nothing(tmp_path):
    final = tmp_path / "model"
    Folder(str(final)).save(finished(tmp_path / "work"))
    before = (final / "model.bin").stat().st_mtime_ns
    reused = find(tmp_path / "work", "f" * 8, "code")
    Folder(str(final)).save(reused)
    assert (final / "model.bin").stat().st_mtime_ns == before


def test_folder_reused_from_another_place_is_copied_not_taken(tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    Folder(str(first)).save(finished(tmp_path / "work"))
    Folder(str(second)).save(find(tmp_path / "work", "f" * 8, "code"))
    assert content_hash(first) == content_hash(second)


def test_new_folder_replaces_an_old_one_whole(tmp_path):
    final = tmp_path / "model"
    final.mkdir()
    (final / "stale.bin").write_text("old")
    Folder(str(final)).save(finished(tmp_path / "work"))
    assert sorted(path.name for path in final.iterdir()) == ["model.bin", "receipt.json"]
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_file_beside_its_place_is_moved_and_one_in_place_left(tmp_path):
    beside, final = tmp_path / ".table.new", tmp_path / "table"
    beside.write_text("rows")
    File(str(final)).save(beside)
    assert final.read_text() == "rows" and not beside.exists()
    File(str(final)).save(final)
    assert final.read_text() == "rows"


def test_equal_values_are_equal_bytes(tmp_path):
    Json(str(tmp_path / "a.json")).save({"b": 1, "a": [1, 2]})
    Json(str(tmp_path / "b.json")).save({"a": [1, 2], "b": 1})
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()
    assert Json(str(tmp_path / "a.json")).load() == {"a": [1, 2], "b": 1}


def test_curves_survive_csv_exactly(tmp_path):
    rows = [{"step": 1, "loss": 0.1 + 0.2}, {"step": 2, "loss": 1e-9, "itm": 1 / 3}]
    table = Table(str(tmp_path / "history.csv"))
    table.save(rows)
    assert table.load() == rows


def test_page_is_written_where_the_catalog_says(tmp_path):
    Page(str(tmp_path / "page.html")).save(lambda path: path.write_text("<p>"))
    assert (tmp_path / "page.html").read_text() == "<p>"


def test_places_are_only_read(tmp_path):
    places = Places({"pairs": {"path": str(tmp_path / "pairs")}})
    assert places.load() == {"pairs": tmp_path / "pairs"}
    with pytest.raises(DatasetError, match="only read"):
        places.save({})
