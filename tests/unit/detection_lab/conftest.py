"""The lab is no part of the package: it is imported from the top of the tree, from wherever the tests are started."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))
