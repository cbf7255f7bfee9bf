import pyarrow as pa
import pyarrow.parquet as pq
from evaluation_samples import write_scene

from blip_pipelines.data.pairs import write_pairs
from blip_pipelines.data.records import PAIR_SCHEMA
from blip_pipelines.data.storage import content_hash
from blip_pipelines.inference.gallery import Gallery


def test_a_gallery_shows_pictures_of_the_sources_that_are_named_and_of_all_where_none_is(tmp_path):
    data = write_scene(tmp_path)
    rows = pq.read_table(data["pairs"] / "00000.parquet").to_pylist()
    for row in rows:
        row["source"] = "photos" if row["key"] < "8" else "drawings"
    write_pairs(tmp_path / "two", [pa.Table.from_pylist(rows, PAIR_SCHEMA)], content_hash(data["images"]))
    of_source = {
        source: {row["key"] for row in rows if row["split"] == "test" and row["source"] == source}
        for source in ("photos", "drawings")
    }
    assert all(of_source.values())
    for sources in ((), ("photos",), ("photos", "drawings")):
        gallery = Gallery(tmp_path / "two", data["images"], None, sources=sources)
        wanted = set().union(*(of_source[source] for source in sources or of_source))
        assert {each["key"] for each in gallery.page(0, 1000)} == wanted
        assert all((gallery.picture(key) is not None) == (key in wanted) for key in set().union(*of_source.values()))
