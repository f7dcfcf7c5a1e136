"""The package's own errors: one sentence that says what is wrong and what to do."""


class CnnJaxError(Exception):
    """Something failed while running; the commands print it as one line and exit with status 1."""

    exit_status = 1


class UsageError(CnnJaxError):
    """What the user gave cannot be used; the commands print it as one line and exit with status 2."""

    exit_status = 2
