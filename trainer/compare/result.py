"""What the results of all comparisons share: facts of the run, the JSON file, the frame of the report page."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from recpress.data.dataset import object_store
from recpress.data.dataset.log import Log
from recpress.trainer.report.numbers import finite
from recpress.trainer.report.page import Report, Section
from recpress.trainer.versions import versions


@dataclass(frozen=True, kw_only=True)
class Result:
    """Fields that every comparison has besides its figures."""

    title: str
    metrics: tuple[str, ...] = ("HR@10", "NDCG@10")
    """Columns of the table."""
    warnings: tuple[str, ...] = ()
    """What fell short, one sentence each; shown first."""
    data: dict[str, str | int | float] = field(default_factory=dict)
    """Facts of the log, by the words that the report shows."""
    notes: tuple[str, ...] = ()
    """How it was measured, a paragraph each."""
    config: dict[str, Any] = field(default_factory=dict)
    """The whole configuration, as JSON values."""
    versions: dict[str, str] = field(default_factory=dict)
    command: str = ""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def save(self, path: str | Path) -> None:
        """Write JSON atomically; NaN and infinities become null. Raises InputError if it cannot be written."""
        text = json.dumps(finite(self.to_json()), indent=1, allow_nan=False) + "\n"
        object_store.write_bytes(path, text.encode())

    def to_report(
        self, tiles: Sequence[tuple[str, str]], sections: Sequence[Section], summary: Sequence[str] = ()
    ) -> Report:
        return Report(
            title=self.title,
            warnings=self.warnings,
            summary=summary,
            tiles=tiles,
            sections=sections,
            notes=self.notes,
            data=self.data,
            command=self.command,
            versions=self.versions,
            config=self.config,
        )


def run_facts(title: str, config: Any, log: Log, **data: str | int) -> dict[str, Any]:
    """Title, data, config, versions and command of a `Result`.

    Args:
        config: of the comparison; has `data` (None: a synthetic log) and `seeds`.
        data: further facts of the log; underscores of their names become blanks.
    """
    name = Path(config.data).name if config.data else "synthetic, by recpress synth"
    facts: dict[str, str | int] = {"log": name}
    if log.schema.user and log.schema.item:
        facts |= {"users": log.num_users, "items": log.num_items}
    facts |= {"train examples": log.train.num_rows, "seeds": ", ".join(map(str, config.seeds))}
    return {
        "title": f"{title} on {name if config.data else 'a synthetic log'}",
        "data": facts | {key.replace("_", " "): value for key, value in data.items()},
        "config": asdict(config),
        "versions": versions(),
        "command": "recpress " + " ".join(sys.argv[1:]),
    }


def seeds_caption(seeds: int) -> str:
    """What the figures of a table are."""
    return "One seed. " if seeds == 1 else f"Mean ± standard deviation over {seeds} seeds. "
