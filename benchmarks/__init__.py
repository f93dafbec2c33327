"""Comparisons with other libraries: `python -m benchmarks.step`, `.run`, `.scale`; see docs/results/performance.md."""

import os
import warnings

os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # hide the messages of the profiler, which only counts memory here
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
warnings.filterwarnings("ignore", category=FutureWarning)
