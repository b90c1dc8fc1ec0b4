"""The one exception a user is meant to read, and the words of others in it."""
import difflib
from typing import Iterable, Union

__all__ = ['DamagedError', 'InputError', 'nearest', 'one_line']

LONGEST = 300  # characters of another library's message, which can be a line a parameter


class InputError(ValueError):
    """Bad input: a file, a value or a combination of options that cannot work.

    The message is one sentence that names the value at fault, what was expected and what to do. Scripts print it
    and exit with status 2; nothing has been written when it is raised.
    """


class DamagedError(InputError):
    """A checkpoint that is not whole, in whose place the one before may do."""


def one_line(message: Union[str, BaseException]) -> str:
    """Another library's message on one line, without its last stop, cut where it is long.

    Args:
        message: The message, or an exception; of one without a message, the name of its class is given.
    """
    text = ' '.join(str(message).split()).rstrip('.')
    if isinstance(message, BaseException):
        text = text or type(message).__name__
    return text if len(text) <= LONGEST else f'{text[:LONGEST]} [...]'


def nearest(name: str, valid: Iterable[str]) -> str:
    """Words for a message that name the valid name one may have meant, and none where nothing is near."""
    matches = difflib.get_close_matches(name, list(valid), n=1, cutoff=0.75)
    return f", the nearest valid one is '{matches[0]}'" if matches else ''
