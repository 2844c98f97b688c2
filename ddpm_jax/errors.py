"""The one exception that means: the user can fix this."""


class UserError(Exception):
    """Bad input. The message is one line: the field or file, its value, what to do about it.

    The command line prints it as ``ddpm: error: <message>`` and exits with 2, without a traceback.
    """
