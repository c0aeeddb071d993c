"""`python -m ht_export.bench.gpu`: `ht-bench gpu` from a clone, with no package of this project installed."""

from __future__ import annotations

import sys

from ht_export.bench.gpu.check import main

if __name__ == "__main__":
    sys.exit(main())
