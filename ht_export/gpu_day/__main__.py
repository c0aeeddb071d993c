"""`python -m ht_export.gpu_day`, which `scripts/gpu_day.py` runs from a clone."""

from __future__ import annotations

import sys

from ht_export.gpu_day.cli import main

if __name__ == "__main__":
    sys.exit(main())
