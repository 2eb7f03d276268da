"""`fastopt bench step` of this checkout, whatever is installed: see its `--help`."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from fastopt.bench.step.command import main

if __name__ == "__main__":
    main()
