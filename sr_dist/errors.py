"""The one kind of error that is the user's to mend, and what a command does with it."""

from __future__ import annotations

import contextlib
import errno
import os
import sys
from collections.abc import Iterator

USER_MISTAKE = 2  # exit status
GO_ON = 75  # exit status of a stopped command that goes on when it is run again
INTERRUPTED = 130  # exit status of another that was stopped by Ctrl-C, as shells have it

# What the system says of a path or a disk that is the user's to mend.
_OF_THE_PLACE = {
    errno.EACCES,
    errno.EDQUOT,
    errno.EEXIST,
    errno.EFBIG,
    errno.EISDIR,
    errno.ENAMETOOLONG,
    errno.ENOENT,
    errno.ENOSPC,
    errno.ENOTDIR,
    errno.EPERM,
    errno.EROFS,
}


class UserError(ValueError):
    """A mistake in what was given: a file, a setting, an address.

    The message says what was found, what was expected, where, and what to do. Commands turn it
    into exit status 2 without a traceback; every other exception is a defect and keeps its own.
    `silent`: another rank has said the same already.
    """

    silent = False


class LostRank(RuntimeError):
    """Another process of the run has gone, which is no mistake and no defect of this one."""


class Stopped(Exception):
    """A signal stopped the run after a checkpoint; the same command goes on from there."""


@contextlib.contextmanager
def exit_on_user_error(again: str = "") -> Iterator[None]:
    """Turn a `UserError` into its message on standard error and exit status 2.

    The same for a file or folder that cannot be used, and for a full disk. `again`: what running
    the command again does, said after Ctrl-C; the exit status is then 75.
    """
    try:
        yield
    except KeyboardInterrupt:
        say_stopped(again)
        raise SystemExit(GO_ON if again else INTERRUPTED) from None
    except Stopped as error:
        if os.environ.get("RANK", "0") == "0":
            _say(str(error), kind="")
        raise SystemExit(GO_ON) from None
    except LostRank as error:
        _say(str(error))
        raise SystemExit(1) from None
    except UserError as error:
        if not error.silent:
            _say(str(error))
        raise SystemExit(USER_MISTAKE) from None
    except OSError as error:
        if (
            error.errno not in _OF_THE_PLACE
            or error.filename is None
            and error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        ):
            raise
        reason = error.strerror
        if error.errno in (errno.EEXIST, errno.ENOTDIR):
            reason = "a file lies where a folder is needed"
        _say(f"cannot use {error.filename or 'the disk'}: {reason}")
        raise SystemExit(USER_MISTAKE) from None


def say_stopped(again: str) -> None:
    """Once on each machine; `again` as of `exit_on_user_error`."""
    if os.environ.get("LOCAL_RANK", "0") == "0":
        _say(f"stopped. {again}".rstrip(), kind="")


def _say(message: str, kind: str = "error") -> None:
    rank = os.environ.get("RANK", "0")
    head = " ".join([kind] * bool(kind) + [f"(rank {rank})"] * (rank != "0"))
    sys.stderr.write(f"{head}: {message}\n" if head else f"\n{message}\n")
