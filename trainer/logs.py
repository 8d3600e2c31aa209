"""The stages that write logs: `synth`, `synth-criteo`, `ingest` and `split`. One process each; no torch is needed."""

from __future__ import annotations

from pathlib import Path

from recpress.data import holdout as data_holdout
from recpress.data import ingest as data_ingest
from recpress.data import synth as data_synth
from recpress.data import synth_criteo as data_synth_criteo
from recpress.data.log import open_log
from recpress.trainer.config import IngestCommand, SplitConfig, SynthCommand, SynthCriteoCommand, chosen_schema


def synth(config: SynthCommand) -> str | Path:
    """Write a made log and say what it holds."""
    return _describe(data_synth.synth(config, config.out, overwrite=config.overwrite))


def synth_criteo(config: SynthCriteoCommand) -> str | Path:
    """Write a made log with Criteo's columns and say what it holds."""
    out = data_synth_criteo.synth_criteo(config, config.out, overwrite=config.overwrite)
    ids = sum(data_synth_criteo.feature_sizes(config.ids))
    print(f"{out}: {config.rows:,} rows, {config.test_rows:,} held out; 26 features of {ids:,} ids in all")
    return out


def ingest(config: IngestCommand) -> str | Path:
    """Convert a public format or a table to a log and say what it holds."""
    return _describe(data_ingest.ingest(config, config.out, overwrite=config.overwrite))


def split(config: SplitConfig) -> str | Path:
    """Write a log that holds one row of each user out and say what it holds."""
    log = open_log(config.data, chosen_schema(config.schema))
    return _describe(
        data_holdout.leave_one_out(log, config.out, by=config.by, seed=config.seed, negatives=config.negatives)
    )


def _describe(path: str | Path) -> str | Path:
    log = open_log(path, pairs=False)
    held_out = log.test_negatives or log.test
    print(
        f"{path}: {log.train.num_rows:,} rows of {log.num_users:,} users and {log.num_items:,} items, "
        f"{held_out.num_rows if held_out else 0:,} held out"
    )
    return path
