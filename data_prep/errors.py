"""Every error of data preparation, for all of its rooms.

SettingsError and what follows from it: the command line is at fault (exit status 2). All others
are of the data, the disk or a worker (exit status 1).
"""


class SettingsError(ValueError):
    """What was asked for cannot be: the command line is at fault, not the data."""


class InputNotFoundError(SettingsError, FileNotFoundError):
    """There is no such input."""


class OutputTakenError(SettingsError, FileExistsError):
    """The output folder holds something else, or is in use."""


class SourceError(OSError):
    """A file that cannot be read; the message names it and the place in it."""


class UnfitError(ValueError):
    """A file that is whole and holds something else than what is read."""


class DiskFullError(OSError):
    """The disk that is written to has no room left."""


class WorkerDiedError(RuntimeError):
    """A worker process ended without an answer."""


class Rejected(ValueError):
    """A record that is no document.

    Args:
        reason: one of those in read/records.py.
        domain: of the record where it shows one. Default: None.
    """

    def __init__(self, reason: str, domain: str | None = None) -> None:
        super().__init__(reason)
        self.domain = domain


class ShortfallError(ValueError):
    """Domains have too few tokens for their budgets.

    Args:
        message: what each needs and has.
        domains: their names.
    """

    def __init__(self, message: str, domains: list[str]) -> None:
        super().__init__(message, domains)  # both: it may come from another process
        self.domains = domains

    def __str__(self) -> str:
        return self.args[0]
