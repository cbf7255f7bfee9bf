import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from capfilt_samples import CONFIGS, run_job, run_killed, run_on_ranks, tables
from data_samples import write_data_set
from distributed_samples import on_ranks
from inference_samples import export_tiny_med

from blip_pipelines.config import ConfigError
from blip_pipelines.data.images import decode
from blip_pipelines.data.pairs import Pairs, write_pairs
from blip_pipelines.data.records import PAIR_SCHEMA
from blip_pipelines.data.storage import StorageError, content_hash
from blip_pipelines.data.transforms import to_pixels
from blip_pipelines.inference.generation import GenerationConfig, generate
from blip_pipelines.jobs.capfilt_write import Config
from blip_pipelines.jobs.launch import LaunchConfig, launch
from blip_pipelines.models.exports import load_med
from blip_pipelines.models.med import Med
from blip_pipelines.training.distributed import World

ROUNDING = 1e-5


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """Three shards of 9, 12 and 8 images, a quarter held out; each image has two human and two web captions."""
    folder = tmp_path_factory.mktemp("data")
    pairs, images = write_data_set(folder, [9, 12, 8], captions_per_image=4)
    model = export_tiny_med(folder / "model")
    return {"pairs": pairs, "images": images, "captioner": model, "filter": model}


@pytest.fixture(scope="module")
def written(inputs, tmp_path_factory):
    work = tmp_path_factory.mktemp("write")
    return run_job(World(), "write", inputs, work), work / "out"


@pytest.fixture(scope="module")
def judged(inputs, written, tmp_path_factory):
    work = tmp_path_factory.mktemp("judge")
    return run_job(World(), "judge", {**inputs, "synthetic": written[1]}, work), work / "out"


def web_of(inputs):
    return Pairs.open(inputs["pairs"], inputs["images"]).select(split="train", origins=["web"])


def test_every_web_image_of_the_training_split_gets_a_caption(inputs, written):
    facts, out = written
    web, synthetic = web_of(inputs), Pairs.open(out)
    assert (facts["images"], facts["captions"]) == (len(synthetic), len(synthetic))
    assert synthetic.keys.tolist() == web.keys[web.unique_images()].tolist()
    assert synthetic.shard_rows == (7, 9, 6)
    found = synthetic.table().to_pylist()
    assert {(row["origin"], row["split"], row["round"]) for row in found} == {("synthetic", "train", 1)}
    assert {row["written_by"] for row in found} == {content_hash(inputs["captioner"])} == {facts["written_by"]}
    assert len({row["caption"] for row in found}) > 8, "captions must differ by picture"


def test_a_caption_is_that_of_its_image_alone(inputs, written):
    exported = load_med(inputs["captioner"])
    web = web_of(inputs)
    captions = dict(zip(Pairs.open(written[1]).keys, Pairs.open(written[1]).column("caption"), strict=True))
    config = GenerationConfig(**CONFIGS["write"]["generation"])
    for row in web.unique_images()[::4]:
        pixels = torch.from_numpy(to_pixels(decode(web.image_bytes(row), limits=None), exported.image["size"]))[None]
        with torch.no_grad():
            seen = exported.med.project_image(exported.med.encode_image(pixels))
        draw_ids = torch.tensor([int(web.keys[row][:15], 16)])
        alone = generate(exported.med, seen, exported.tokenizer, config, draw_ids=draw_ids).texts[0]
        assert captions[web.keys[row]] == alone


def test_several_captions_of_an_image_are_drawn_anew_and_the_first_is_the_single_one(inputs, written, tmp_path):
    facts = run_job(World(), "write", inputs, tmp_path, captions_per_image=3)
    three, one = Pairs.open(tmp_path / "out"), Pairs.open(written[1])
    assert (facts["images"], facts["captions"]) == (len(one), 3 * len(one))
    captions = three.column("caption").reshape(-1, 3)
    assert captions[:, 0].tolist() == one.column("caption").tolist()
    assert np.mean([len({*texts}) > 1 for texts in captions]) > 0.5
    assert three.keys.reshape(-1, 3)[:, 2].tolist() == one.keys.tolist()


def test_several_equal_captions_of_an_image_are_refused():
    with pytest.raises(ConfigError, match="would all be the same"):
        Config(GenerationConfig("beam"), captions_per_image=2)


def test_all_web_and_synthetic_captions_are_judged_and_kept(inputs, written, judged):
    facts, out = judged
    found = Pairs.open(out)
    assert facts["captions"] == len(found) == len(web_of(inputs)) + len(Pairs.open(written[1]))
    for shard in range(3):
        origins = found.shard(shard).column("origin").tolist()
        assert origins == sorted(origins, reverse=True), "web first, as the table has them"
        web = web_of(inputs).shard(shard).select(split="train", origins=["web"])
        count = len(web)
        assert found.shard(shard).column("caption")[:count].tolist() == web.column("caption").tolist()
    assert set(found.column("judged_by")) == {content_hash(inputs["filter"])}
    assert set(found.column("kept")) == {None}


def test_probabilities_equal_one_pair_at_a_time(inputs, judged):
    exported = load_med(inputs["filter"])
    pictures = web_of(inputs)
    place = dict(zip(pictures.keys, range(len(pictures)), strict=True))
    found = Pairs.open(judged[1])
    assert np.ptp(found.column("match_probability")) > 100 * ROUNDING, "the case must tell captions apart"
    for row in range(0, len(found), 5):
        key, caption = found.keys[row], found.captions(np.array([row]))
        pixels = to_pixels(decode(pictures.image_bytes(place[key]), limits=None), exported.image["size"])
        token_ids, token_mask = map(torch.from_numpy, exported.tokenizer(caption, 30))
        with torch.no_grad():
            seen = exported.med.project_image(exported.med.encode_image(torch.from_numpy(pixels)[None]))
            alone = exported.med.match_logits(token_ids, token_mask, seen).softmax(-1)[0, 1].item()
        assert found.column("match_probability")[row] == pytest.approx(alone, abs=ROUNDING)


@pytest.mark.parametrize("job", ["write", "judge"])
def test_an_image_is_encoded_and_projected_once(job, inputs, written, tmp_path, monkeypatch):
    seen = {"encode_image": 0, "project_image": 0}

    def counting(name):
        real = getattr(Med, name)

        def counted(self, images, *rest):
            seen[name] += len(images)
            return real(self, images, *rest)

        return counted

    for name in seen:
        monkeypatch.setattr(Med, name, counting(name))
    run_job(World(), job, {**inputs, "synthetic": written[1]}, tmp_path)
    images = len(web_of(inputs).unique_images())
    assert seen == {"encode_image": images, "project_image": images}


@pytest.mark.parametrize("job", ["write", "judge"])
def test_workers_that_read_ahead_change_nothing(job, inputs, written, judged, tmp_path):
    run_job(World(), job, {**inputs, "synthetic": written[1]}, tmp_path, workers=2)
    assert tables(tmp_path / "out") == tables({"write": written, "judge": judged}[job][1])


@pytest.mark.parametrize("job", ["write", "judge"])
def test_a_job_that_was_killed_in_a_shard_goes_on_with_that_shard_and_makes_the_same_rows(
    job, inputs, written, judged, tmp_path
):
    inputs = {**inputs, "synthetic": written[1]}
    assert run_killed(job, inputs, tmp_path, batches=3) == -9  # two batches a shard: in the second shard
    done = tmp_path / "checkpoints"
    assert sorted(path.name for path in done.glob("*.parquet") if not path.name.startswith(".")) == ["00000.parquet"]
    before = (done / "00000.parquet").stat().st_mtime_ns
    facts = run_job(World(), job, inputs, tmp_path)
    assert (done / "00000.parquet").stat().st_mtime_ns == before, "a finished shard is not made again"
    whole = {"write": written, "judge": judged}[job]
    assert (facts, tables(tmp_path / "out")) == (whole[0], tables(whole[1]))


@pytest.mark.slow  # starts two processes
def test_two_ranks_make_the_rows_of_one_also_where_one_was_killed(inputs, written, judged, tmp_path):
    inputs = {**inputs, "synthetic": written[1]}
    runs = [(job, inputs, tmp_path / f"{job} {how}") for job in ("write", "judge") for how in ("whole", "killed")]
    for job, _, work in runs:
        if work.name.endswith("killed"):
            run_killed(job, inputs, work, batches=4)
    facts = on_ranks(2, run_on_ranks, runs)
    assert facts[0] == facts[1]
    for job, _, work in runs:
        whole = {"write": written, "judge": judged}[job]
        assert facts[0][str(work)] == whole[0]
        assert tables(work / "out") == tables(whole[1]), work.name


def test_synthetic_captions_of_other_pairs_are_refused(inputs, written, tmp_path):
    with pytest.raises(StorageError, match="other shards"):
        write_pairs(tmp_path / "short", [pq.read_table(written[1] / "00000.parquet")], "images")
        run_job(World(), "judge", {**inputs, "synthetic": tmp_path / "short"}, tmp_path / "a")
    with pytest.raises(StorageError, match="has no web caption"):
        swapped = [pq.read_table(written[1] / f"0000{shard}.parquet") for shard in (1, 0, 2)]
        write_pairs(tmp_path / "swapped", swapped, "images")
        run_job(World(), "judge", {**inputs, "synthetic": tmp_path / "swapped"}, tmp_path / "b")


def test_a_corpus_without_web_captions_has_nothing_to_write(inputs, tmp_path, caplog):
    human = [table.filter(np.array([o == "human" for o in table["origin"].to_pylist()])) for table in shards_of(inputs)]
    write_pairs(tmp_path / "human", human, Pairs.open(inputs["pairs"]).manifest["images"])
    facts = run_job(World(), "write", {**inputs, "pairs": tmp_path / "human"}, tmp_path / "work")
    assert (facts["captions"], "no training caption is of origin web" in caplog.text) == (0, True)
    assert Pairs.open(tmp_path / "work" / "out").table().schema == PAIR_SCHEMA


def shards_of(inputs):
    return [pq.read_table(inputs["pairs"] / f"0000{shard}.parquet") for shard in range(3)]


def test_the_jobs_run_under_the_launcher(inputs, written, tmp_path):
    names = ("captioner", "pairs", "images")
    settings = LaunchConfig(mode="inline", work=str(tmp_path))
    receipt = launch(
        "blip_pipelines.jobs.capfilt_write", CONFIGS["write"], {name: inputs[name] for name in names}, settings
    )
    assert receipt.facts == written[0]
    assert receipt.speed["samples_per_second"] > 0
    made = tables(receipt.folder)
    made.pop("receipt.json")
    assert made == tables(written[1])
