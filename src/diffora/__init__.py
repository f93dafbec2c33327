"""diffora: learn which modules of a pretrained model to fine-tune."""

import time

START = time.time()
"""When the package was first imported, which `train.py` does before all else: the zero of a run's ``startup_s``."""

__version__ = "0.1.0"
