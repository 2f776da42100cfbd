"""The one kind of error that is the user's to mend, and what a command does with it."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator

USER_MISTAKE = 2  # exit status


class UserError(ValueError):
    """A mistake in what was given: a file, a setting, an address.

    The message says what was found, what was expected, where, and what to do. Commands turn it
    into exit status 2 without a traceback; every other exception is a defect and keeps its own.
    """


@contextlib.contextmanager
def exit_on_user_error() -> Iterator[None]:
    """Turn a `UserError` into its message on standard error and exit status 2.

    Ranks of one node meet the same mistake together, so only its first rank speaks, unless the
    processes were already at work and one of them alone may have failed.
    """
    try:
        yield
    except UserError as error:
        rank = os.environ.get("RANK", "0")
        if os.environ.get("LOCAL_RANK", "0") == "0" or getattr(error, "one_rank", False):
            prefix = "error" if rank == "0" else f"error (rank {rank})"
            sys.stderr.write(f"{prefix}: {error}\n")
        raise SystemExit(USER_MISTAKE) from None
