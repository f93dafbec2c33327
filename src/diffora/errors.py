"""The one exception a person is meant to read."""

from collections.abc import Sequence


class UserError(Exception):
    """Something the user can mend: shown as its message alone, without a traceback.

    Args:
        problems: one message, or several that were found together. Each names the
            offending value and says what would be right.
    """

    def __init__(self, problems: str | Sequence[str]) -> None:
        self.problems = [problems] if isinstance(problems, str) else list(problems)
        super().__init__("\n".join(self.problems))
