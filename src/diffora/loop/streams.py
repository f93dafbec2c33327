"""Independent random streams of a run's seed: each use has its own number, so that no two are correlated."""

SPLIT = 0
"""Which training rows the search uses, and for what."""
HELD_OUT = 1
"""The halves of the validation split."""
FINE_TUNE = 2
"""Order of the training rows in fine-tuning."""
SEARCH_TRAIN = 3
"""Order of the search-train rows."""
SEARCH_VALID = 4
"""Order of the search-valid rows."""
