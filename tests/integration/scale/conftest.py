"""The benchmarks are no part of the package: they are imported from the top of the tree, wherever tests are started."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))
