"""What goes into the registry: a table, one entry a stage that makes models for people. A new model is a new entry."""

from dataclasses import dataclass
from typing import Literal

from blip_pipelines.pipelines.rounds import in_round, models_of


@dataclass(frozen=True)
class Released:
    """The models of one stage, by the data sets of the catalog that say everything about them.

    Args:
        stage: that made it; its measures begin with this name.
        names: under which its one folder is registered, each served in another way.
        model: the exported folder.
        record: the run record; `part` of it, where the stage runs several jobs.
        trained_on: tables, its own corpus of captions first, then the others, also those of the models that it
            started from.
        contracts, checked: results of the contracts on its own corpus, and the hash of what they were checked on.
        predictions: what it was measured by, sample by sample; for the filter its `decided` captions.
        metrics: flat measures `<stage>/<metric>/<subset>`.
        measured_by: the job that makes such predictions from `model`, `pairs` and `images` with the parameters of
            `evaluation`, by which a champion is measured anew when the rows or these parameters have changed; of the
            filter the one that judges captions, with the parameters of `capfilt.judge`.
        asks: that job asks questions of the table `instructions` in place of captions, as this block of `evaluation`
            says.
        is_filter: its predictions are held against the known noise.
    """

    stage: str
    names: tuple[str, ...]
    model: str
    record: str
    trained_on: tuple[str, ...]
    contracts: str
    checked: str
    predictions: str
    metrics: str
    measured_by: str
    part: str | None = None
    asks: Literal["questions", "med_questions"] | None = None
    is_filter: bool = False

    @property
    def data_sets(self) -> tuple[str, ...]:
        named = (self.model, self.record, self.contracts, self.checked, self.predictions, self.metrics)
        return (*named, *self.trained_on)


def releases(rounds: int = 1) -> tuple[Released, ...]:
    """The table, for so many rounds of CapFilt: the last model and the last filter are released."""
    last, judge = models_of(rounds)[-1], in_round("capfilt", rounds)
    corpora = tuple(f"{in_round('capfilt', number)}_pairs" for number in range(rounds, 0, -1))
    learnt = corpora[1] if rounds > 1 else "pairs"  # from which captioner and filter learn
    return (
        Released(
            stage=last,
            names=("blip-captioner", "blip-retriever"),
            model=f"{last}_model",
            record=f"{last}_run",
            trained_on=(*corpora, "pairs"),
            contracts=f"{judge}_contracts",
            checked=f"{judge}_pairs_checked",
            predictions=f"{last}_predictions",
            metrics="evaluation_metrics",
            measured_by="blip_pipelines.jobs.evaluate_med",
        ),
        Released(
            stage="blip2_stage2",
            names=("blip2",),
            model="blip2_stage2_model",
            record="blip2_stage2_run",
            trained_on=(*corpora, "pairs"),
            contracts=f"{judge}_contracts",
            checked=f"{judge}_pairs_checked",
            predictions="blip2_stage2_predictions",
            metrics="evaluation_metrics",
            measured_by="blip_pipelines.jobs.evaluate_blip2_stage2",
        ),
        Released(
            stage="instruct_tuning",
            names=("instructblip",),
            model="instruct_tuning_model",
            record="instruct_tuning_run",
            trained_on=(*corpora, "pairs", "instructions"),
            contracts=f"{judge}_contracts",
            checked=f"{judge}_pairs_checked",
            predictions="instruct_tuning_answers",
            metrics="evaluation_metrics",
            measured_by="blip_pipelines.jobs.evaluate_instructions",
            asks="questions",
        ),
        Released(
            stage="question_answering",
            names=("blip-vqa",),
            model="question_answering_model",
            record="question_answering_run",
            trained_on=(*corpora, "pairs", "instructions"),
            contracts=f"{judge}_contracts",
            checked=f"{judge}_pairs_checked",
            predictions="question_answering_answers",
            metrics="evaluation_metrics",
            measured_by="blip_pipelines.jobs.evaluate_question_answering",
            asks="med_questions",
        ),
        Released(
            stage=judge,
            names=("blip-filter",),
            model=f"{judge}_filter",
            record=f"{judge}_run",
            part="filter",
            trained_on=tuple(dict.fromkeys((learnt, *corpora[1:], "pairs"))),
            contracts=f"{in_round('capfilt', rounds - 1)}_contracts" if rounds > 1 else "contracts",
            checked=f"{in_round('capfilt', rounds - 1)}_pairs_checked" if rounds > 1 else "pairs_checked",
            predictions=f"{judge}_decided",
            metrics=f"{judge}_metrics",
            measured_by="blip_pipelines.jobs.capfilt_judge",
            is_filter=True,
        ),
    )
