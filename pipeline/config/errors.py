"""Errors that a user can mend."""


class UserError(ValueError):
    """Something a user can mend; its message is all they need to read, so stages print it without a traceback."""


class ConfigError(UserError):
    """A dial, file or combination of dials that cannot be used; the message says which, and what was expected."""
