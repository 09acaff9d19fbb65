"""The error for what a user can mend: its message is the whole explanation, and the tools print it without a traceback."""


class UsageError(ValueError):
    """A config, path or option that cannot work; one sentence says what, what was expected and what to do."""
