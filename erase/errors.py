"""The error that a user can cause and mend: its message is one line, shown as is."""


class EraseError(ValueError):
    """Bad input. The message says what is wrong, where, and what would be right; the command exits with code 2."""
