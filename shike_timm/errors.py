"""The one exception a user is meant to read, and the words of others in it."""
from typing import Union

__all__ = ['InputError', 'one_line']

LONGEST = 300  # characters of another library's message, which can be a line a parameter


class InputError(ValueError):
    """Bad input: a file, a value or a combination of options that cannot work.

    The message is one sentence that names the value at fault, what was expected and what to do. Scripts print it
    and exit with status 2; nothing has been written when it is raised.
    """


def one_line(message: Union[str, BaseException]) -> str:
    """Another library's message on one line, without its last stop, cut where it is long.

    Args:
        message: The message, or an exception; of one without a message, the name of its class is given.
    """
    text = ' '.join(str(message).split()).rstrip('.')
    if isinstance(message, BaseException):
        text = text or type(message).__name__
    return text if len(text) <= LONGEST else f'{text[:LONGEST]} [...]'
