"""Measurements beside peers: `python -m benchmarks.step`, `.run`, `.scale`: docs/results/performance.md."""

import os
import warnings

os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # the profiler counts memory here and has nothing else to say
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
warnings.filterwarnings("ignore", category=FutureWarning)
