"""The one exception that means: the user can fix this."""

import difflib


class UserError(Exception):
    """Bad input. The message is one line: the field or file, its value, what to do about it.

    The command line prints it as ``ddpm: error: <message>`` and exits with 2, without a traceback.
    """


def did_you_mean(name: str, known, prefix="") -> str:
    """' (did you mean ...?)' with the names of `known` that resemble `name`, or ''.

    A dotted name resembles those that end alike: stepz and trian.steps are near train.steps.
    """
    known = list(known)
    near = [k for k in known if k.endswith(f".{name}")] or difflib.get_close_matches(name, known)
    if not near:
        last = difflib.get_close_matches(name.rpartition(".")[2], [k.rpartition(".")[2]
                                                                   for k in known])
        near = [k for k in known if k.rpartition(".")[2] in last]
    return f" (did you mean {' or '.join(prefix + k for k in near[:3])}?)" if near else ""
