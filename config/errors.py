"""The one exception that means "the user can mend this"."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager


class UserError(ValueError):
    """A mistake of the user's: unknown key, missing file, bad row, mismatched archive.

    The message is complete by itself: the rule, the value that broke it, what to type instead, and the
    file, row or column where there is one. Entrypoints print it without a traceback and exit with status 2.
    """


# What the machine's owner can mend: room, permissions, quotas, limits, a path that is no folder, a disk that fails.
MACHINE = {
    errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EPERM, errno.EROFS, errno.EIO, errno.ESTALE,
    errno.ENAMETOOLONG, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ELOOP, errno.EMFILE, errno.ENFILE,
}  # fmt: skip


@contextmanager
def machine_faults() -> Iterator[None]:
    """Turn an error of the machine into a UserError: a disk that is full, a file that may not be read or written."""
    try:
        yield
    except OSError as error:
        if error.errno not in MACHINE:
            raise  # a defect of ours
        where = f"{error.filename}: " if error.filename is not None else ""
        raise UserError(
            f"{where}{error.strerror}; make room there, mend its permissions, or name another place, and type the "
            "command again: it goes on from what was saved"
        ) from error


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, and the next where it ends in a colon; its class without one."""
    first, *others = (str(error).strip() or type(error).__name__).splitlines()
    return f"{first} {others[0].strip()}" if others and first.endswith(":") else first


class SaidElsewhere(UserError):
    """A `UserError` of another process of the same run, which says it: this one only has to end, with status 2."""
