"""The one exception that means: the user can mend this."""


class UserError(Exception):
    """Something that the user can mend: a recipe, a path, a missing package.

    The message names the file, the key or the row, the value, and what to do. Entry points print it without a
    traceback and exit with code 2.
    """

    rank: int | None = None
    """The rank it happened on, once training runs: other ranks may know nothing of it. None: the same everywhere."""
    agreed: bool = False
    """All ranks raise it at the same point, so one of them tells the user."""
