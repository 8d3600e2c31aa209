"""The stages that write logs: `synth`, `synth-criteo`, `ingest`, `split` and `sample`.

One process each; no torch is needed.
"""

from __future__ import annotations

import logging
import math
from dataclasses import replace
from pathlib import Path

import numpy as np

from recpress.data.config import SampleConfig
from recpress.data.dataset.log import Log, open_log
from recpress.data.errors import InputError
from recpress.data.ingest import convert
from recpress.data.ingest import split as data_holdout
from recpress.data.sampling.corrupt_groups import TolerantSplit, in_words
from recpress.data.sampling.design_effect import design_effects
from recpress.data.sampling.sample import write_sample
from recpress.data.sampling.selection import Selection
from recpress.data.synthetic import criteo as data_synth_criteo
from recpress.data.synthetic import interactions as data_synth
from recpress.trainer.config import chosen_schema
from recpress.trainer.prepare.config import IngestCommand, SampleCommand, SplitConfig, SynthCommand, SynthCriteoCommand

logger = logging.getLogger(__name__)


def synth(config: SynthCommand) -> str | Path:
    """Write a synthetic log and say what it holds."""
    return _describe(data_synth.synth(config, config.out, overwrite=config.overwrite))


def synth_criteo(config: SynthCriteoCommand) -> str | Path:
    """Write a synthetic log with Criteo's columns and say what it holds."""
    out = data_synth_criteo.synth_criteo(config, config.out, overwrite=config.overwrite)
    ids = sum(data_synth_criteo.feature_sizes(config.ids))
    print(f"{out}: {config.rows:,} rows, {config.held_out:,} held out; 26 features of {ids:,} ids in all")
    return out


def ingest(config: IngestCommand) -> str | Path:
    """Convert a public format or a table to a log and say what it holds."""
    return _describe(convert.ingest(config, config.out, overwrite=config.overwrite))


def split(config: SplitConfig) -> str | Path:
    """Write a log that holds one row of each user out and say what it holds."""
    log = open_log(config.data, chosen_schema(config.schema))
    if config.by == "last" and log.schema.time is None:
        raise InputError(f"{log.path}: --by last needs a time column; name it with --schema.time")
    out = data_holdout.leave_one_out(
        log, config.out, by=config.by, seed=config.seed, negatives=config.negatives, overwrite=config.overwrite
    )
    return _describe(out)


def sample(config: SampleCommand) -> str | Path:
    """Write a sample of a log and say what it holds."""
    skip = config.on_bad_file == "skip"
    log = open_log(config.data, chosen_schema(config.schema), pairs=False, skip_bad=skip)
    if skip:
        log = replace(log, train=TolerantSplit.of(log.train))
    out = write_sample(
        log,
        config.out,
        config.sample,
        shuffle=config.shuffle,
        shuffle_rows=config.shuffle_rows,
        layout=config.layout,
        overwrite=config.overwrite,
    )
    made, drawn = open_log(out, pairs=False), config.sample
    rows, whole = made.train.num_rows, log.train.num_rows
    if drawn.kind == "block" and drawn.rate < 1:
        _describe_blocks(log, drawn)
    print(
        f"{out}: {rows:,} of the {whole:,} rows of {config.data} ({rows / whole:.2%}, kind {drawn.kind}, seed "
        f"{drawn.seed}{', shuffled' if config.shuffle else ''}); to train on all of it: --data {out} --sample.rate 1"
    )
    if line := in_words(log):
        logger.warning("%s", line)
    return out


def _describe_blocks(log: Log, drawn: SampleConfig) -> None:
    """Say, from the row groups that were drawn, whether drawing row groups was a good idea."""
    schema = log.schema
    names = [name for name in (schema.user, schema.item, schema.label, schema.time) if name]
    counts = Selection(log.train, drawn).counts
    sizes = np.array([group.num_rows for group in log.train.groups])
    lost = log.train.lost if isinstance(log.train, TolerantSplit) else {}
    whole = [(place, log.train.groups[place]) for place in np.flatnonzero(counts == sizes).tolist()]
    groups = [place for place, group in whole if (group.file, group.group) not in lost][:64]
    if len(groups) < 2 or not names:
        return
    effects = design_effects(log.train, names, groups)
    each = ", ".join(f"{name} {effect.effect:,.1f}" for name, effect in effects.items())
    print(f"design effect of a mean, from {len(groups)} row groups: {each}")
    high = 1 + 5 * math.sqrt(2 / (len(groups) - 1))
    if odd := [name for name, effect in effects.items() if effect.effect > high]:
        logger.warning(
            "%s is not shuffled: its row groups differ in %s by more than chance, so the sample may differ from the "
            "log; docs/train/sampling.md explains it",
            log.path,
            ", ".join(odd),
        )


def _describe(path: str | Path) -> str | Path:
    log = open_log(path, pairs=False)
    held_out = log.test_negatives or log.test
    without = (log.manifest or {}).get("held_out", {}).get("left_out", 0)
    more = f"; none of {without:,} users, who have one item or met too many" if without else ""
    print(
        f"{path}: {log.train.num_rows:,} rows of {log.num_users:,} users and {log.num_items:,} items, "
        f"{held_out.num_rows if held_out else 0:,} held out{more}"
    )
    return path
