"""The label of tokens that do not count. `diffora.scoring.criteria` needs it without the imports of a task."""

IGNORED = -100
"""torch's label of a token that does not count in the loss."""
