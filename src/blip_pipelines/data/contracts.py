"""What a data set promises, as Great Expectations suites in code, with Data Docs for people.

Rules over rows run a few shards at a time and rules over the whole set on the small tables of `quality`, so memory
stays flat. Every rule has a severity: `error` stops the pipeline, `warn` is reported, `off` is not looked at. Whether a
text is good is not for a contract: file names and foreign languages only warn, judging them is CapFilt's work.

Great Expectations takes seconds to import and is known to this module alone, inside its functions.
"""

import logging
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from blip_pipelines.config import ConfigError
from blip_pipelines.data import data_docs, storage
from blip_pipelines.data.quality import FILE_NAME, NOT_ENGLISH
from blip_pipelines.data.records import PAIR_SCHEMA
from blip_pipelines.data.storage import MANIFEST

if TYPE_CHECKING:
    import pandas as pd

log = logging.getLogger(__name__)

Severity = Literal["error", "warn", "off"]
RULES: dict[str, Severity] = {
    # Of each row:
    "schema": "error",
    "key": "error",
    "caption_length": "error",
    "caption_characters": "error",
    "caption_file_name": "warn",
    "caption_language": "warn",
    "origin": "error",
    "split": "error",
    "subset": "error",
    "image_size": "error",
    "aspect": "warn",
    "written_by": "error",
    "match_probability": "error",
    # Of the whole set:
    "rows": "error",
    "splits": "error",
    "captions_per_image": "error",
    "images_per_caption": "warn",
    "one_split_per_image": "error",
    "evaluation_absent_from_training": "error",
    "near_duplicates": "warn",
    "near_duplicates_across_splits": "warn",
    "foreign_share": "warn",
    "file_name_share": "warn",
    "one_word_share": "warn",
    "narrow_share": "warn",
    # Of a CapFilt round:
    "keep_rate": "error",
    "length_shift": "warn",
    "vocabulary_shift": "warn",
}
_FIRST_ROWS = 5
_ROWS_AT_ONCE = 100_000
_NAMING = ("key", "caption", "other_caption")  # columns that name a row to a person
_RUN_TIME = datetime(2000, 1, 1, tzinfo=UTC)  # a site is of one run; a moment in its paths would only make them differ


class ContractError(ValueError):
    """A broken contract: names each rule, how many rows break it and the first of them."""


@dataclass(frozen=True)
class ContractsConfig:
    """Bounds of the rules, and severities where they differ from `RULES`."""

    severity: dict[str, Severity] = field(default_factory=dict)
    max_caption_characters: int = 2000
    min_side: int = 16
    max_side: int = 10_000
    max_aspect: float = 5.0
    max_captions_per_image: int = 100
    max_images_per_caption: int = 100
    max_foreign_share: float = 0.25
    max_file_name_share: float = 0.25
    max_one_word_share: float = 0.9
    max_narrow_share: float = 0.1
    min_keep_rate: float = 0.02
    max_length_shift: float = 0.5
    max_vocabulary_shift: float = 0.5

    def __post_init__(self) -> None:
        if unknown := sorted(self.severity.keys() - RULES.keys()):
            raise ConfigError(f"contracts.severity.{unknown[0]}: no such rule; rules are {', '.join(RULES)}")

    def severity_of(self, rule: str) -> Severity:
        return self.severity.get(rule, RULES[rule])


@dataclass(frozen=True)
class RuleResult:
    """One rule over a whole data set."""

    rule: str
    severity: Severity
    passed: bool
    checked: int  # values looked at, over all its expectations; 0 for a rule over a table as a whole
    failed: int  # values that break it
    first_rows: tuple[dict[str, Any], ...]  # key and caption (and, of a pair, other_caption) of the first few
    error: str = ""  # what a rule over a table as a whole observed, or why it could not be checked

    def __str__(self) -> str:
        rows = "; ".join(f"{row.get('key', '')[:12]} {_texts(row):.120}" for row in self.first_rows)
        return f"{self.rule}: {self.failed} of {self.checked} values: {rows or self.error}"


def _texts(row: Mapping[str, Any]) -> str:
    return " ~ ".join(repr(row[name]) for name in _NAMING[1:] if name in row)


def check(pairs: Path, tables: Mapping[str, pa.Table], config: ContractsConfig, docs: Path) -> list[RuleResult]:
    """Judge a data set; returns one result a rule and leaves the Data Docs site in the folder `docs`.

    Args:
        pairs: folder of a caption table, as `write_pairs` leaves it.
        tables: what `quality.summarise` says of it; and of a CapFilt round "round", from `shift.summarise_round`.
            Rules over a table that is not there are not looked at.
        docs: replaced as a whole; open its index.html.

    Raises:
        ContractError: a rule of severity `error` is broken. The docs are written all the same.
    """
    with tempfile.TemporaryDirectory(prefix="contracts") as root:
        results = _merge(_validate(pairs, tables, config, Path(root)), config)
        site = Path(root) / "gx" / "uncommitted" / "data_docs" / "local_site"
        staged = docs.with_name(f".{docs.name}.new")
        shutil.rmtree(staged, ignore_errors=True)
        shutil.copytree(site, staged, ignore=shutil.ignore_patterns("*.gif"))  # megabytes of tutorial
        data_docs.finish(staged, results)
        storage.publish(staged, docs)
    for result in results:
        if not result.passed and result.severity == "warn":
            log.warning("contract %s", result)
    broken = [str(result) for result in results if not result.passed and result.severity == "error"]
    if broken:
        raise ContractError(
            f"{pairs}: the data set breaks {len(broken)} contract(s):\n  " + "\n  ".join(broken) + f"\n"
            f"See {docs / 'index.html'}; repair the source, or set contracts.severity of the rule to 'warn'"
        )
    return results


def _validate(
    pairs: Path, tables: Mapping[str, pa.Table], config: ContractsConfig, root: Path
) -> list[tuple[str, Any]]:
    """(rule, result of one expectation) for every suite and every table it judges."""
    os.environ["GX_ANALYTICS_ENABLED"] = "false"
    import great_expectations as gx
    from great_expectations.core.run_identifier import RunIdentifier

    logging.getLogger("great_expectations").setLevel(logging.WARNING)
    context = gx.get_context(mode="file", project_root_dir=str(root))
    context.variables.progress_bars = {"globally": False}  # type: ignore[assignment]
    source = context.data_sources.add_pandas("data_set")
    found = []
    for name, expectations in {"pairs": _row_rules(config), **_set_rules(config)}.items():
        if name != "pairs" and name not in tables:
            continue
        wanted = [(rule, each) for rule, each in expectations if config.severity_of(rule) != "off"]
        for rule, each in wanted:
            each.meta = {"rule": rule}
            each.severity = "critical" if config.severity_of(rule) == "error" else "warning"
        suite = context.suites.add(gx.ExpectationSuite(name=name, expectations=[each for _, each in wanted]))
        batch = source.add_dataframe_asset(name).add_batch_definition_whole_dataframe(name)
        definition = context.validation_definitions.add(gx.ValidationDefinition(name=name, data=batch, suite=suite))
        for part, frame in _parts(pairs) if name == "pairs" else [(name, tables[name].to_pandas())]:
            validated = definition.run(
                batch_parameters={"dataframe": frame},
                run_id=RunIdentifier(run_name=part, run_time=_RUN_TIME),
                result_format={
                    "result_format": "SUMMARY",
                    "unexpected_index_column_names": [column for column in _NAMING if column in frame],
                    "partial_unexpected_count": _FIRST_ROWS,
                },
            )
            found += [(_rule_of(each), each) for each in validated.results]
    context.build_data_docs()
    return found


def _parts(pairs: Path) -> Iterator[tuple[str, "pd.DataFrame"]]:
    """Neighbouring shards together, as long as they are few rows: each part is a page of the docs and a second."""
    names: list[str] = []
    rows = 0
    shards = storage.read_json(pairs / MANIFEST)["shards"]
    for number, shard in enumerate(shards):
        names, rows = [*names, shard["name"]], rows + shard["rows"]
        if rows >= _ROWS_AT_ONCE or number == len(shards) - 1:
            frame = pa.concat_tables(pq.read_table(pairs / name) for name in names).to_pandas()
            if {"width", "height"} <= set(frame):
                frame["aspect"] = frame[["width", "height"]].max(axis=1) / frame[["width", "height"]].min(axis=1)
            ends = dict.fromkeys(Path(name).stem for name in (names[0], names[-1]))
            yield f"shards {' to '.join(ends)}", frame
            names, rows = [], 0


def _row_rules(config: ContractsConfig) -> list[tuple[str, Any]]:
    import great_expectations.expectations as gxe

    training: dict[str, Any] = {"row_condition": 'split=="train"', "condition_parser": "pandas"}
    evaluation: dict[str, Any] = {"row_condition": 'split!="train"', "condition_parser": "pandas"}
    synthetic: dict[str, Any] = {"row_condition": 'origin=="synthetic"', "condition_parser": "pandas"}
    length = config.max_caption_characters
    side: dict[str, Any] = {"min_value": config.min_side, "max_value": config.max_side}
    odd_characters = r"[\x00-\x1f\x7f\ufffd]|^\s|\s$"
    return [
        ("schema", gxe.ExpectTableColumnsToMatchSet(column_set=PAIR_SCHEMA.names, exact_match=False)),
        ("key", gxe.ExpectColumnValuesToNotBeNull(column="key")),
        ("key", gxe.ExpectColumnValuesToMatchRegex(column="key", regex="^[0-9a-f]{64}$")),
        ("caption_length", gxe.ExpectColumnValuesToNotBeNull(column="caption")),
        ("caption_length", gxe.ExpectColumnValueLengthsToBeBetween(column="caption", min_value=1, max_value=length)),
        ("caption_characters", gxe.ExpectColumnValuesToNotMatchRegex(column="caption", regex=odd_characters)),
        ("caption_file_name", gxe.ExpectColumnValuesToNotMatchRegex(column="caption", regex=FILE_NAME)),
        ("caption_language", gxe.ExpectColumnValuesToNotMatchRegex(column="caption", regex=NOT_ENGLISH)),
        ("origin", gxe.ExpectColumnValuesToBeInSet(column="origin", value_set=["human", "web", "synthetic"])),
        ("split", gxe.ExpectColumnValuesToBeInSet(column="split", value_set=["train", "val", "test"])),
        ("subset", gxe.ExpectColumnValuesToBeNull(column="subset", **training)),
        ("subset", gxe.ExpectColumnValuesToNotBeNull(column="subset", **evaluation)),
        ("image_size", gxe.ExpectColumnValuesToBeBetween(column="width", **side)),
        ("image_size", gxe.ExpectColumnValuesToBeBetween(column="height", **side)),
        ("aspect", gxe.ExpectColumnValuesToBeBetween(column="aspect", max_value=config.max_aspect)),
        ("written_by", gxe.ExpectColumnValuesToNotBeNull(column="written_by", **synthetic)),
        ("match_probability", gxe.ExpectColumnValuesToBeBetween(column="match_probability", min_value=0, max_value=1)),
    ]  # fmt: skip


def _set_rules(config: ContractsConfig) -> dict[str, list[tuple[str, Any]]]:
    """Name of a summary table to the rules over it."""
    import great_expectations.expectations as gxe

    def at_most(column: str, bound: float) -> Any:
        return gxe.ExpectColumnValuesToBeBetween(column=column, max_value=bound)

    def at_least(column: str, bound: float) -> Any:
        return gxe.ExpectColumnValuesToBeBetween(column=column, min_value=bound)

    return {
        "data_set": [
            ("rows", at_most("missing_rows", 0)),
            ("splits", at_least("train_rows", 1)),
            ("splits", at_least("val_rows", 1)),
            ("splits", at_least("test_rows", 1)),
        ],
        "captions_per_image": [("captions_per_image", at_most("captions", config.max_captions_per_image))],
        "images_per_caption": [("images_per_caption", at_most("images", config.max_images_per_caption))],
        "splits_per_image": [("one_split_per_image", at_most("splits", 1))],
        # No row may be here; a null would be no row.
        "evaluation_in_training": [("evaluation_absent_from_training", gxe.ExpectColumnValuesToBeNull(column="key"))],
        "near_duplicates": [
            ("near_duplicates", gxe.ExpectColumnValuesToBeNull(column="other_key")),
            ("near_duplicates_across_splits", at_most("splits", 1)),
        ],
        "shares": [
            ("foreign_share", at_most("foreign", config.max_foreign_share)),
            ("file_name_share", at_most("file_name", config.max_file_name_share)),
            ("one_word_share", at_most("one_word", config.max_one_word_share)),
            ("narrow_share", at_most("narrow", config.max_narrow_share)),
        ],
        "round": [
            ("keep_rate", at_least("web_keep_rate", config.min_keep_rate)),
            ("keep_rate", at_least("synthetic_keep_rate", config.min_keep_rate)),
            ("length_shift", at_most("length_shift", config.max_length_shift)),
            ("vocabulary_shift", at_most("vocabulary_shift", config.max_vocabulary_shift)),
        ],
    }  # fmt: skip


def _merge(found: list[tuple[str, Any]], config: ContractsConfig) -> list[RuleResult]:
    """One result a rule from its expectations over all shards."""
    results = []
    for rule in RULES:
        each = [result for name, result in found if name == rule]
        if not each:
            continue
        listed = (row for result in each for row in result.result.get("partial_unexpected_index_list") or ())
        first_rows = [row for row in listed if isinstance(row, dict)]
        results.append(
            RuleResult(
                rule=rule,
                severity=config.severity_of(rule),
                passed=all(result.success for result in each),
                checked=sum(result.result.get("element_count", 0) for result in each),
                failed=sum(result.result.get("unexpected_count", 0) for result in each),
                first_rows=tuple(
                    {name: row[name] for name in _NAMING if name in row} for row in first_rows[:_FIRST_ROWS]
                ),
                error="; ".join(filter(None, (_explain(result) for result in each if not result.success))),
            )
        )
    return results


def _rule_of(result: Any) -> str:
    return result.expectation_config.meta["rule"]


def _explain(result: Any) -> str:
    """What an expectation observed, or what kept it from looking."""
    if "details" in result.result:
        return str(result.result["details"].get("mismatched", result.result["details"]))
    if bad := result.result.get("partial_unexpected_list"):
        return f"{result.expectation_config.kwargs['column']} is {', '.join(map(str, bad))}"
    infos = [result.exception_info] if "exception_message" in result.exception_info else result.exception_info.values()
    return "; ".join(str(info["exception_message"]) for info in infos if info.get("raised_exception"))
