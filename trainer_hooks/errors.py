"""What the trainer's side raises, by what the caller must do; nothing is raised once ``attach()`` has returned.

::

    HooksError
    +-- LaunchError    no worker could be started: training goes on without one, start one by hand
    +-- KernelError    a kernel cannot be compiled or loaded here: other operations do the same, which is said once

Mistakes in configuration are ``ValueError`` (and its subclass ``EndpointError``) at ``attach()``, before step 0.
"""

from __future__ import annotations


class HooksError(Exception):
    """Base of the errors of the trainer's side."""


class LaunchError(HooksError):
    """A worker's process could not be started here."""


class KernelError(HooksError):
    """A kernel cannot be made here, or does not say what it should."""
