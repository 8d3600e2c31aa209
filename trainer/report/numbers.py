"""Numbers as text, for terminal tables and report pages."""

from __future__ import annotations

import math
from typing import Any


def format_metric(mean: float, spread: float) -> str:
    """`0.7201 ± 0.0012`; without the spread if there is one seed."""
    if math.isnan(mean):
        return "-"
    return f"{mean:.4f}" if math.isnan(spread) else f"{mean:.4f} ± {spread:.4f}"


def format_metrics(metrics: dict[str, float], names: tuple[str, ...]) -> str:
    """`HR@10 0.7201, NDCG@10 0.4412`."""
    return ", ".join(f"{name} {metrics[name]:.4f}" for name in names)


def format_seconds(seconds: float) -> str:
    """`0.42 s`, `8.1 s`, `93 s`, `12.4 min`, `3.2 h`."""
    if not seconds > 0:
        return "-"
    if seconds < 1:
        return f"{seconds:.2f} s"
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    if seconds < 600:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def format_bytes(size: int | None) -> str:
    """`3.5 MB`; `-` for None."""
    if size is None:
        return "-"
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= factor:
            return f"{size / factor:.3g} {unit}"
    return f"{size} B"


def share(part: float, whole: float) -> str:
    """`12.3 %`."""
    return f"{100 * part / whole:.3g} %" if whole else "-"


def finite(value: Any) -> Any:
    """`value` as JSON takes it: NaN and infinities become None, tuples lists, other objects text."""
    if isinstance(value, dict):
        return {str(key): finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [finite(inner) for inner in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if isinstance(value, str | int | float | bool | None) else str(value)
