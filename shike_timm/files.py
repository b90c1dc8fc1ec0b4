"""Files. Results files appear only when complete, and any fault of a file of values becomes an InputError."""
import itertools
import json
import os
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, Dict, Iterator, Optional, Union

from .errors import InputError, one_line

_numbers = itertools.count()  # Numbers of temporary files.


def read_json(path: Union[str, Path]) -> Dict[str, Any]:
    """The names and values in a JSON file. Whatever is wrong with the file is an InputError."""
    try:
        if not os.path.isfile(path):  # A pipe would make its reader wait.
            raise FileNotFoundError('there is no such file')
        values = json.loads(Path(path).read_text(encoding='utf-8'))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"'{path}' cannot be read as JSON: {one_line(error)}.") from error
    if not isinstance(values, dict):
        raise InputError(f"'{path}' cannot be used: it holds a {type(values).__name__}, expected names and values.")
    return values


def check_results_file(path: Optional[str], option: str = 'results-file') -> None:
    """Check that a results file can be written, before the work begins."""
    if not path:
        return
    try:
        os.lstat(path)
    except FileNotFoundError:
        pass
    except OSError as error:
        raise InputError(f"{option} '{path}' cannot be written ({error.strerror}): give another name.") from error
    if os.path.isdir(path):
        raise InputError(f"{option} '{path}' is a folder: give the name of a file.")
    if not Path(path).absolute().parent.is_dir():
        raise InputError(f"{option} '{path}' is in a folder that does not exist: make it first.")


@contextmanager
def named_errors(path: Union[str, Path]) -> Iterator[None]:
    """Add the path to system errors that name no file, such as the error of a full disk."""
    try:
        yield
    except OSError as error:
        if error.errno and error.filename is None:
            error.filename = str(path)
        raise


@contextmanager
def write_whole(path: Union[str, Path], mode: str = 'w') -> Iterator[IO[Any]]:
    """Open a temporary file, which takes the name `path` when it is complete.

    The target of a link is replaced, not the link. A device or a pipe is never replaced but written to, and `-` is
    standard output.
    """
    if str(path) == '-':
        if sys.stdout is None:
            raise InputError('Standard output is closed: name a file to write to.')
        yield sys.stdout.buffer if 'b' in mode else sys.stdout
        return
    text: Any = {} if 'b' in mode else dict(encoding='utf-8', errors='surrogateescape', newline='')
    replaced = not os.path.exists(path) or os.path.isfile(path)
    target = os.path.realpath(path)
    # The temporary name is short, because the name of the target may have the greatest length already.
    opened = os.path.join(os.path.dirname(target), f'.{os.getpid()}-{next(_numbers)}.tmp') if replaced else path
    try:
        with named_errors(path), open(opened, mode, **text) as file:
            yield file
        if replaced:
            os.replace(opened, target)
    finally:
        if replaced:
            Path(opened).unlink(missing_ok=True)


def spreadsheet_cell(value: Any) -> Any:
    """A cell of a table: text that a spreadsheet would run as a formula gets an apostrophe in front."""
    return f"'{value}" if isinstance(value, str) and value.startswith(('=', '+', '-', '@', '\t', '\r')) else value


def write_text(path: Union[str, Path], text: str) -> None:
    """Write a text file as `write_whole` does."""
    with write_whole(path) as file:
        file.write(text)
