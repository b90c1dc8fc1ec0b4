"""The exception for bad input, and helpers for its message."""
import difflib
from typing import Iterable, Union

LONGEST = 300  # Longest text taken from another library's message, in characters. Some messages list every parameter.


class InputError(ValueError):
    """Bad input: a file, a value or a combination of options that cannot work.

    The message is one sentence: what was wrong, what was expected and what to do. Scripts print it and exit with
    status 2. A function raises it before it writes anything.
    """


class DamagedError(InputError):
    """A damaged checkpoint. An earlier checkpoint of the run may be used instead."""


def one_line(message: Union[str, BaseException]) -> str:
    """Another library's message, or that of its exception, on one line without its full stop. A long one is cut."""
    text = ' '.join(str(message).split()).rstrip('.')
    if isinstance(message, BaseException):
        text = text or type(message).__name__
    return text if len(text) <= LONGEST else f'{text[:LONGEST]} [...]'


def nearest(name: str, valid: Iterable[str]) -> str:
    """The end of a message, which suggests the nearest valid name. Empty if no valid name is near."""
    matches = difflib.get_close_matches(name, list(valid), n=1, cutoff=0.75)
    return f", the nearest valid one is '{matches[0]}'" if matches else ''
