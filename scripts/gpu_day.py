"""Everything that needs an NVIDIA GPU, on a machine that is there for a short time and has no network.

python scripts/gpu_day.py pack gpu-kit                               on any machine with the project's environment
python scripts/gpu_day.py run --rehearse                             the same in small, on a CPU
python scripts/gpu_day.py run --kit gpu-kit --results results        on the machine with the GPU
"""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

if __name__ == "__main__":
    # From a clone, where the project is not installed.
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    runpy.run_module("ht_export.gpu_day", run_name="__main__")
