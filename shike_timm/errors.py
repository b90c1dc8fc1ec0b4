"""The one exception a user is meant to read."""


class InputError(ValueError):
    """Bad input: a file, a value or a combination of options that cannot work.

    The message is one sentence that names the value at fault, what was expected and what to do. Scripts print it
    and exit with status 2; nothing has been written when it is raised.
    """
