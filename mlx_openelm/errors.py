"""The two errors a person can meet: a request that cannot be right, and work that failed."""


class OpenELMError(Exception):
    """Something failed while working; one line that says what is wrong and what to do. Exit code 1."""

    exit_code = 1


class RequestError(OpenELMError, ValueError):
    """A bad flag, name, file or value; nothing was started. Exit code 2."""

    exit_code = 2
