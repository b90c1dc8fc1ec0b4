"""Files of results: they appear whole or not at all."""
import os
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, Iterator, Optional, Union

from .errors import InputError


def check_results_file(path: Optional[str], option: str = 'results-file') -> None:
    """Check that a results file can be written, before the work begins."""
    if path and Path(path).is_dir():
        raise InputError(f"{option} '{path}' is a folder: give the name of a file.")
    if path and not Path(path).absolute().parent.is_dir():
        raise InputError(f"{option} '{path}' is in a folder that does not exist: make it first.")


@contextmanager
def write_whole(path: Union[str, Path], mode: str = 'w') -> Iterator[IO[Any]]:
    """Open a file that replaces the one of its name when it is whole.

    The target of a link is replaced, not the link. A device or a pipe is never replaced but written to, and `-` is
    standard output.
    """
    if str(path) == '-':
        yield sys.stdout.buffer if 'b' in mode else sys.stdout
        return
    text: Any = {} if 'b' in mode else dict(encoding='utf-8', errors='surrogateescape', newline='')
    replaced = not os.path.exists(path) or os.path.isfile(path)
    target = os.path.realpath(path)
    opened = f'{target}.{os.getpid()}.tmp' if replaced else path
    try:
        with open(opened, mode, **text) as file:
            yield file
        if replaced:
            os.replace(opened, target)
    except OSError as error:
        if error.filename is None:  # The error of a full disk does not name the file.
            error.filename = str(path)
        raise
    finally:
        if replaced:
            Path(opened).unlink(missing_ok=True)


def write_text(path: Union[str, Path], text: str) -> None:
    """Write a text file as `write_whole` does."""
    with write_whole(path) as file:
        file.write(text)
