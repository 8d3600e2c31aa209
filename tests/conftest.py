"""Puts the repository root on the path: tests and the ranks that they spawn import `tests.ranks`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
