"""Lets the tests beside it import the modules of the multi-GPU run by name, as its script does."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
