"""The one exception that means "the user can mend this"."""


class UserError(ValueError):
    """A mistake of the user's: unknown key, missing file, bad row, mismatched archive.

    The message is complete by itself: the rule, the value that broke it, what to type instead, and the
    file, row or column where there is one. Entrypoints print it without a traceback and exit with status 2.
    """


class SaidElsewhere(UserError):
    """A `UserError` of another process of the same run, which says it: this one only has to end, with status 2."""
