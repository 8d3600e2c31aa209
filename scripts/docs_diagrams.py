"""Draw the diagrams of the documentation: `python scripts/docs_diagrams.py` writes docs/img/*.svg.

The files are committed, as text, so that the README shows them without a build. The plot takes its numbers from the
tables of benchmarks/README.md.
"""

from __future__ import annotations

import math
import re
from html import escape
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "docs" / "img"
INK, GRAY, BLUE, GREEN, ORANGE, RED = "#222222", "#888888", "#dbe7fb", "#dcf2e0", "#fdebd0", "#c0392b"
LINES = ("#2b5fb4", "#2e8b57", "#c0392b")


class Drawing:
    """An SVG of `width` x `height` pixels, written from top to bottom."""

    def __init__(self, title: str, width: int, height: int) -> None:
        self.parts = [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
            f'font-family="Helvetica, Arial, sans-serif" font-size="14" role="img" aria-label="{escape(title)}">',
            f"<title>{escape(title)}</title>",
            '<defs><marker id="head" viewBox="0 0 10 10" refX="9" refY="5" markerWidth="7" markerHeight="7" '
            f'orient="auto-start-reverse"><path d="M0 0 L10 5 L0 10 z" fill="{INK}"/></marker></defs>',
            f'<rect width="{width}" height="{height}" fill="white"/>',
        ]

    def rect(self, x: float, y: float, width: float, height: float, fill: str, line: str = INK) -> None:
        self.parts.append(
            f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="4" fill="{fill}" stroke="{line}"/>'
        )

    def text(
        self,
        x: float,
        y: float,
        text: str,
        size: int = 14,
        color: str = INK,
        anchor: str = "middle",
        halo: bool = False,
    ) -> None:
        around = ' stroke="white" stroke-width="6" paint-order="stroke"' if halo else ""
        weight = ' font-weight="bold"' if text.startswith("*") else ""
        self.parts.append(
            f'<text x="{x:g}" y="{y:g}" font-size="{size}" fill="{color}" text-anchor="{anchor}"{weight}{around}>'
            f"{escape(text.removeprefix('*'))}</text>"
        )

    def box(self, x: float, y: float, width: float, height: float, lines: list[str], fill: str = BLUE) -> None:
        """A rectangle with centered lines of text; `*` makes a line bold."""
        self.rect(x, y, width, height, fill)
        top = y + height / 2 - 9 * (len(lines) - 1) + 5
        for i, line in enumerate(lines):
            self.text(x + width / 2, top + 18 * i, line, 14 if i == 0 else 12, INK if i == 0 else "#444444")

    def arrow(self, *points: tuple[float, float], dashed: bool = False, color: str = INK) -> None:
        path = " ".join(f"{x:g},{y:g}" for x, y in points)
        dash = ' stroke-dasharray="5 4"' if dashed else ""
        self.parts.append(
            f'<polyline points="{path}" fill="none" stroke="{color}" stroke-width="1.6"{dash} marker-end="url(#head)"/>'
        )

    def line(self, points: list[tuple[float, float]], color: str, width: float = 1) -> None:
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        self.parts.append(f'<polyline points="{path}" fill="none" stroke="{color}" stroke-width="{width:g}"/>')

    def dot(self, x: float, y: float, color: str) -> None:
        self.parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="{color}"/>')

    def done(self) -> str:
        return "\n".join([*self.parts, "</svg>", ""])


def flow() -> str:
    d = Drawing("From a Parquet log to a trained model", 920, 250)
    d.box(10, 85, 120, 70, ["*Parquet log", "user, item"], ORANGE)
    d.box(180, 85, 130, 70, ["*factorize", "sharded ALS"])
    d.box(370, 20, 160, 70, ["*frozen tables", "factors, 4 to 32 bits"], GREEN)
    d.box(370, 150, 160, 70, ["*learned hash", "id map: id → row"], GREEN)
    d.box(590, 85, 150, 70, ["*train", "TorchRec, sharded"])
    d.box(790, 85, 120, 70, ["*evaluate", "HR@K, NDCG@K"])
    d.arrow((130, 120), (178, 120))
    d.arrow((310, 110), (340, 110), (340, 55), (368, 55))
    d.arrow((310, 130), (340, 130), (340, 185), (368, 185))
    d.arrow((530, 55), (560, 55), (560, 110), (588, 110))
    d.arrow((530, 185), (560, 185), (560, 130), (588, 130))
    d.arrow((740, 120), (788, 120))
    d.arrow((70, 155), (70, 237), (665, 237), (665, 157), dashed=True)
    d.text(225, 228, "10 % sample of the examples", 12, "#444444")
    return d.done()


def step() -> str:
    d = Drawing("One training step on two ranks", 920, 400)
    for x, label in (
        (80, "*batch"),
        (225, "*id map"),
        (405, "*table shard"),
        (610, "*towers + loss"),
        (800, "*gradients"),
    ):
        d.text(x, 24, label)
    for rank, y in ((0, 50), (1, 220)):
        d.rect(5, y - 12, 910, 130, "#fafafa", "#bbbbbb")
        d.text(16, y + 8, f"rank {rank}", 12, GRAY, "start")
        d.box(20, y + 20, 120, 66, ["B examples", "ids, labels"], ORANGE)
        d.box(175, y + 20, 100, 66, ["id → row", "replicated"], GREEN)
        d.box(340, y + 20, 130, 66, [f"shard {rank}", "frozen or trained"], GREEN)
        d.box(550, y + 20, 120, 66, ["dense part", "replicated"])
        d.box(740, y + 20, 120, 66, ["dense part", "all-reduce"])
        d.arrow((140, y + 53), (173, y + 53))
        d.arrow((275, y + 53), (338, y + 53))
        d.arrow((470, y + 53), (548, y + 53))
        d.arrow((670, y + 53), (738, y + 53))
    d.arrow((275, 115), (338, 265), color=GRAY)
    d.arrow((275, 260), (338, 110), color=GRAY)
    d.arrow((470, 115), (548, 265), color=GRAY)
    d.arrow((470, 260), (548, 110), color=GRAY)
    d.arrow((800, 136), (800, 238))
    d.arrow((800, 238), (800, 138))
    d.text(307, 191, "all-to-all: row ids", 12, halo=True)
    d.text(510, 191, "all-to-all: vectors", 12, halo=True)
    d.text(806, 191, "all-reduce", 12, anchor="start")
    d.text(
        460,
        360,
        "Trained tables also send vector gradients back. Frozen tables do not: no gradient, no optimizer state.",
        13,
    )
    d.text(460, 383, "The stream and the negative sampler prepare the next batches on each rank meanwhile.", 13)
    return d.done()


def window() -> str:
    d = Drawing("From row groups to batches: sample, segments, shuffle window", 920, 400)
    d.text(10, 24, "*1  Log: row groups in Parquet files", anchor="start")
    for i in range(24):
        d.rect(10 + 37.5 * i, 36, 34, 34, ORANGE)
        for k in range(3):  # sampled examples
            d.rect(13 + 37.5 * i + 10 * ((i * 7 + k * 3) % 3), 40 + 10 * k, 8, 6, RED, RED)
    d.text(10, 92, "The sample (red) is a pure function of seed and position in the log.", 12, "#444444", "start")
    d.text(10, 130, "*2  Shuffled row groups, cut into 4 segments of equal length", anchor="start")
    order = [17, 4, 11, 22, 8, 0, 13, 19, 2, 9, 20, 6, 15, 23, 1, 12, 5, 18, 10, 3, 21, 14, 7, 16]
    for lane in range(4):
        for j in range(6):
            x = 10 + 227 * lane + 36 * j
            inside = j < 2
            d.rect(x, 142, 33, 30, ORANGE if inside else "#f4f4f4", INK if inside else "#bbbbbb")
            d.text(x + 16.5, 162, str(order[6 * lane + j]), 11, INK if inside else GRAY)
    for lane in range(4):
        d.arrow((45 + 227 * lane, 174), (45 + 227 * lane, 232), color=GRAY)
    d.text(10, 212, "*3  Shuffle window: the next examples of every segment, in memory", anchor="start", halo=True)
    for k in range(48):
        d.rect(10 + 18.9 * k, 236, 16, 22, (BLUE, GREEN, ORANGE, "#f3dff5")[k // 12])
    d.arrow((460, 260), (460, 298))
    d.text(470, 284, "random permutation", 12, "#444444", "start")
    d.text(10, 318, "*4  Global batches; each rank takes its share of each", anchor="start")
    for batch in range(4):
        for k in range(12):
            color = (BLUE, GREEN, ORANGE, "#f3dff5")[(k * 7 + batch * 5 + k // 4) % 4]
            d.rect(10 + 227 * batch + 18 * k, 330, 15, 22, color)
        d.text(10 + 227 * batch + 106, 372, f"step {batch}", 12, "#444444")
    d.text(460, 394, "A position is two integers, epoch and step. To resume, nothing is replayed.", 13)
    return d.done()


def quality() -> str:
    """Lines of quality (percent of the full table's NDCG@10) over bytes (percent of the full table's)."""
    d = Drawing("Quality against bytes", 760, 420)
    left, right, top, bottom, low = 70, 560, 30, 350, 88.0

    def at(size: float, share: float) -> tuple[float, float]:
        across = (math.log(size) - math.log(4)) / (math.log(100) - math.log(4))
        return left + across * (right - left), bottom - (share - low) / (102 - low) * (bottom - top)

    for share in range(88, 103, 2):
        y = at(100, share)[1]
        d.line([(left, y), (right, y)], "#e3e3e3")
        d.text(left - 8, y + 5, f"{share} %", 12, anchor="end")
    for size in (5, 10, 25, 50, 100):
        x = at(size, low)[0]
        d.line([(x, top), (x, bottom)], "#e3e3e3")
        d.text(x, bottom + 20, f"{size} %", 12)
    d.line([(left, top), (left, bottom), (right, bottom)], INK)
    d.text((left + right) / 2, bottom + 45, "bytes of the tables, id map included (fp32 table: 100 %)", 13)
    d.text(left, top - 10, "NDCG@10 (fp32 table: 100 %)", 13, anchor="start")
    for points, color in zip(measured().values(), LINES, strict=True):
        places = [at(*point) for point in points]
        d.line(places, color, 2)
        for place in places:
            d.dot(*place, color)
    for i, (name, color) in enumerate(zip(measured(), LINES, strict=True)):
        d.line([(580, 60 + 26 * i), (606, 60 + 26 * i)], color, 2)
        d.text(614, 65 + 26 * i, name, 13, anchor="start")
    d.text(left, bottom + 66, "Factors alone, learned hash. Numbers: benchmarks/README.md, “Bytes”.", 12, GRAY, "start")
    return d.done()


def measured() -> dict[str, list[tuple[float, float]]]:
    """Log -> (percent of the bytes, percent of the NDCG@10), from the rows `factors alone` of the benchmarks."""
    text = (ROOT / "benchmarks" / "README.md").read_text()
    found: dict[str, list[tuple[float, float]]] = {"MovieLens-1M": [], "Beauty": [], "Gowalla": []}
    log = ""
    for line in text[text.index("### Bytes") :].splitlines():
        log = next((name for name in found if line.startswith(name) or f"on {name}" in line), log)
        if line.startswith("| factors alone"):
            shares, size = re.findall(r"[\d.]+ / ([\d.]+) \|.*\(([\d.]+) %\)", line)[0]
            found[log].append((float(size), float(shares)))
    if not all(found.values()):
        raise ValueError(
            f"benchmarks/README.md, 'Bytes': no rows 'factors alone' of {[k for k in found if not found[k]]}"
        )
    return found


DIAGRAMS = {"flow.svg": flow, "step.svg": step, "window.svg": window, "quality.svg": quality}


def main() -> None:
    FOLDER.mkdir(parents=True, exist_ok=True)
    for name, draw in DIAGRAMS.items():
        (FOLDER / name).write_text(draw())


if __name__ == "__main__":
    main()
