import json
import shutil

import numpy as np
import pytest
from data_samples import picture, write_data_set
from object_store_samples import BUCKET, Fault

from blip_pipelines.data.ingest import DataSet, ingest
from blip_pipelines.data.ingestion_plan import IngestionConfig
from blip_pipelines.data.object_requests import ObjectStoreError
from blip_pipelines.data.object_store import ObjectStore
from blip_pipelines.data.offload import offload, send
from blip_pipelines.data.pairs import Pairs
from blip_pipelines.data.sources import SourceConfig, open_source


def test_a_data_set_moves_to_s3_and_stays_itself_also_when_the_move_was_interrupted(proxy, tmp_path):
    pairs, images = write_data_set(tmp_path, [3, 3, 3])
    before = Pairs.open(pairs, images)
    contents, name = [before.image_bytes(row) for row in range(len(before))], before.hash
    config = proxy.server.config(tmp_path / "cache", endpoint=proxy.endpoint, attempts=2)
    proxy.faults = [Fault("status", None, "PUT", "00001.tar", 403, "AccessDenied")]
    with pytest.raises(ObjectStoreError, match=r"moved/00001.tar: access is refused"):
        list(offload(images, f"s3://{BUCKET}/moved", config))
    assert [path.name for path in sorted(images.glob("*.tar"))] == ["00001.tar", "00002.tar"]
    proxy.faults = []
    moved = list(offload(images, f"s3://{BUCKET}/moved/", config))
    assert [url for url, _ in moved] == [f"s3://{BUCKET}/moved/{number:05d}.tar" for number in (1, 2)]
    assert not list(images.glob("*.tar"))
    after = Pairs.open(pairs, images)
    assert after.hash == name and [after.image_bytes(row) for row in range(len(after))] == contents


def test_ingestion_goes_on_from_shards_that_were_moved(server, tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    lines = ["image,caption,split"]
    for number in range(6):
        (source / f"{number}.png").write_bytes(picture(number))
        lines.append(f"{number}.png,thing {number},train")
    (source / "captions.csv").write_text("\n".join(lines))
    s3 = server.config(tmp_path / "cache")
    config = IngestionConfig(source=SourceConfig("folder", {}, s3), workers=1, shard_images=2)
    out = DataSet(*(tmp_path / "out" / name for name in ("images", "pairs", "quarantine.parquet", "noise.parquet")))
    ingest(open_source(config, source), config, out)
    moved = len(list(offload(out.images, f"s3://{BUCKET}/goes-on", s3)))
    index = {path: path.stat().st_mtime_ns for path in sorted(out.images.glob("*.parquet"))}
    (source / "captions.csv").write_text("\n".join([*lines, "0.png,another text,train"]))
    assert ingest(open_source(config, source), config, out)["rows"] == 7
    assert index == {path: path.stat().st_mtime_ns for path in sorted(out.images.glob("*.parquet"))}
    assert moved == 3 and not list(out.images.glob("*.tar"))
    pairs = Pairs.open(out.pairs, out.images)
    assert {pairs.image_bytes(row) for row in range(7)} == {picture(number) for number in range(6)}


def test_a_model_folder_or_a_report_is_stored_as_it_is(server, tmp_path):
    (tmp_path / "model" / "deep").mkdir(parents=True)
    (tmp_path / "model" / "weights").write_bytes(np.arange(10).tobytes())
    (tmp_path / "model" / "deep" / "config.json").write_text(json.dumps({"a": 1}))
    config = server.config(tmp_path / "cache")
    stored = dict(send(tmp_path / "model", f"s3://{BUCKET}/models/one", config))
    store = ObjectStore(config)
    for url in stored:
        store.download(url, tmp_path / "back" / url.removeprefix(f"s3://{BUCKET}/models/one/"))
    assert (tmp_path / "back" / "weights").read_bytes() == np.arange(10).tobytes()
    assert (tmp_path / "back" / "deep" / "config.json").read_text() == '{"a": 1}'
    shutil.copy(tmp_path / "model" / "weights", tmp_path / "report.html")
    assert dict(send(tmp_path / "report.html", f"s3://{BUCKET}/report.html", config)) == {
        f"s3://{BUCKET}/report.html": 80
    }
