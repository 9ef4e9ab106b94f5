"""The programs of deploy/observability are scripts, which find their neighbours in their own folder; so must tests."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "deploy" / "observability"))
