"""Kedro settings: the hooks and how parameters merge.

Blocks of an environment are merged key by key into `base` (Kedro's own default replaces whole blocks), so that
`conf/smoke` states only what differs and `--params med_pretraining.training.steps=10` changes one value.
"""

from blip_pipelines.hooks import CheckParameters, HoldStages, RecordOutputs, TrackRuns

# Kedro calls hooks in reverse: parameters are checked first, outputs recorded last.
HOOKS = (RecordOutputs(), TrackRuns(), HoldStages(), CheckParameters())
DISABLE_HOOKS_FOR_PLUGINS = ("kedro-telemetry",)
CONFIG_LOADER_ARGS = {
    "base_env": "base",
    "default_run_env": "local",
    "merge_strategy": {"parameters": "soft"},
    "config_patterns": {"tracking": ["tracking*"]},
}
