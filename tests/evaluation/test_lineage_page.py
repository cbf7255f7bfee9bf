"""What is told of a model with a round of CapFilt behind it."""

import re

from blip_pipelines.evaluation.lineage import Caption, Story, as_page, as_text


def data(name, digest):
    return {name: {"path": f"data/{name}", "sha256": digest * 64}}


def stage(inputs, outputs, **parameters):
    job = {"job": "x", "fingerprint": "f" * 64, "code": "c" * 64, "mlflow_run": "run", "finished": ""}
    return {"inputs": inputs, "outputs": outputs, "parameters": parameters, "jobs": [job]}


STAGES = {
    "ingestion": stage(data("source", "0"), data("pairs", "1"), seed=0),
    "med_pretraining": stage(data("pairs", "1"), data("med_pretraining_model", "2"), training={"steps": 400}),
    "capfilt": stage(
        {**data("pairs", "1"), **data("med_pretraining_model", "2")},
        {**data("capfilt_pairs", "3"), **data("capfilt_filter", "4")},
    ),
    "med_bootstrapped": stage(
        {**data("capfilt_pairs", "3"), **data("med_pretraining_model", "2")}, data("med_bootstrapped_model", "5")
    ),
}
ROW = {
    "caption": "a <red> heart",
    "key": "a" * 64,
    "member": "1.png",
    "source": "emoji",
    "origin": "synthetic",
    "split": "train",
    "round": 1,
    "match_probability": 0.25,
    "kept": False,
    "reason": "under the threshold",
}
STORY = Story(
    model={
        "name": "blip-captioner",
        "version": "3",
        "aliases": ("champion",),
        "tags": {"stage": "med_bootstrapped", "gate": "promoted over 2", "run": "r" * 32},
    },
    stages=list(STAGES),
    record={
        "stages": STAGES,
        "env": "base",
        "code": {"commit": "abc", "changed": ["conf/base/parameters_capfilt.yml"], "sha256": "9" * 64},
        "environment": {"python": "3.11", "packages": {"torch": "2.13"}},
        "not_in_dvc": None,
    },
    md5={"data/pairs": "m" * 32},
    patch="+  rounds: 1",
    models={"5" * 64: "models:/blip-captioner/3", "4" * 64: "models:/blip-filter/1"},
    captions=[Caption("capfilt_decided", ROW, "6666 (the captioner)", "4444 (models:/blip-filter/1)")],
)


def test_text_goes_from_the_model_to_the_sources_and_names_everything():
    said = as_text(STORY)
    assert said.startswith("models:/blip-captioner/3 @champion\n")
    stages = [line for line in said.splitlines() if line in STAGES]
    assert stages == list(reversed(STAGES))
    assert "code         abc and 1 uncommitted: conf/base/parameters_capfilt.yml" in said
    assert "CapFilt      1 round(s)" in said and "training.steps=400" in said
    assert re.search(r"reads   pairs +sha256 1{12}  md5 m{12}  from ingestion", said)
    assert re.search(r"reads   source +sha256 0{12}  from outside", said)
    assert re.search(r"writes  capfilt_filter +sha256 4{12}  is models:/blip-filter/1", said)
    assert "written by   6666 (the captioner)" in said and "dropped: under the threshold" in said
    assert "0.2500 by 4444 (models:/blip-filter/1)" in said


def test_page_draws_an_arrow_for_all_that_a_stage_reads_of_another_and_escapes_captions():
    page = as_page(STORY)
    drawn = page.split("<svg", 1)[1].split("</svg>")[0]
    assert drawn.count("<rect") == len(STAGES) + 2, "the stages, the sources, the model"
    assert drawn.count("<path") == 7
    assert all(f">{name}</text>" in drawn for name in (*STAGES, "sources", "blip-captioner 3"))
    assert "a &lt;red&gt; heart" in page and "<red>" not in page
    assert "+  rounds: 1" in page and "http" not in re.sub(r"http://www.w3.org\S*", "", page)
