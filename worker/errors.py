"""What can go wrong in the worker, by what the caller must do.

::

    WorkerError
    +-- ConfigError          an option is wrong: named with its source, exit code 2, nothing was started
    +-- JournalError         the journal cannot be used as it is: nothing was lost, read the text
    |   +-- JournalLockedError   another worker has it: use that one, or another folder
    |   +-- JournalWriteError    it cannot be written now (a full disk): kept in memory and tried again
    |   +-- JournalDamageError   one of its files is broken: the text says which, and what to do
    +-- ListenError          the endpoint cannot or must not be listened on
        +-- EndpointBusyError    another worker serves it already: use that one
"""

from __future__ import annotations


class WorkerError(Exception):
    """Base of all errors that the worker raises on purpose."""


class ConfigError(WorkerError, ValueError):
    """An option has a wrong value; the text names the option and where the value came from."""


class JournalError(WorkerError):
    """A journal is missing, damaged, or of another schema."""


class JournalLockedError(JournalError):
    """Another process has the journal open for writing."""


class JournalWriteError(JournalError):
    """A transaction failed and nothing of it was kept; the same one may be tried again."""


class JournalDamageError(JournalError):
    """A file of the journal is no database any more, or not all of one."""


class ListenError(WorkerError):
    """The endpoint cannot be listened on, or must not be."""


class EndpointBusyError(ListenError):
    """Another worker listens there."""
