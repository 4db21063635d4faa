"""UserError, the one exception that means "the user can fix this", and the errors that become one."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager


class UserError(ValueError):
    """A mistake of the user: unknown key, missing file, bad row, mismatched archive.

    The message is complete: the rule, the value that broke it, what to write instead, and the file, row or
    column if there is one. Entrypoints print it without a traceback and exit with status 2.
    """


# Errors the user can fix: disk space, permissions, quotas, limits, a path that is not a folder, a failing disk.
MACHINE = {
    errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EPERM, errno.EROFS, errno.EIO, errno.ESTALE,
    errno.ENAMETOOLONG, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ELOOP, errno.EMFILE, errno.ENFILE,
}  # fmt: skip


@contextmanager
def machine_faults() -> Iterator[None]:
    """Turn an error of the machine into a UserError: a full disk, a file without read or write permission."""
    try:
        yield
    except OSError as error:
        if error.errno not in MACHINE:
            raise  # a bug in this program
        where = f"{error.filename}: " if error.filename is not None else ""
        raise UserError(
            f"{where}{error.strerror}; free some space there, fix its permissions, or name another place, and rerun "
            "the command to resume from what was saved"
        ) from error


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, with the next if it ends in a colon; its class if it is empty."""
    first, *others = (str(error).strip() or type(error).__name__).splitlines()
    return f"{first} {others[0].strip()}" if others and first.endswith(":") else first


class SaidElsewhere(UserError):
    """A `UserError` that another process of the same run prints; this process only exits with status 2."""
