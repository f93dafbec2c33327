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
MASK_STEP = 5
"""The gradient masks of a step."""
MASK_EPOCH = 6
"""The gradient masks of an epoch."""
ONE_SHOT_TRAIN = 7
"""The random selections that ``one_shot`` trains."""
ONE_SHOT_SCORE = 8
"""The random selections that ``one_shot`` scores."""
ONE_SHOT_ROWS = 9
"""The search-valid rows on which ``one_shot`` scores them."""
