"""Values of arguments, checked and brought to one form."""
from numbers import Integral
from typing import Any


def whole_number(name: str, value: Any, least: int = 0) -> int:
    """A number of at least `least`. NumPy's numbers become Python's."""
    if isinstance(value, bool) or not isinstance(value, Integral) or value < least:
        raise ValueError(f'{name} must be a whole number of at least {least}, got {value!r}.')
    return int(value)


def without_numpy(value: Any) -> Any:
    """NumPy's numbers and arrays as Python's numbers and lists, for JSON."""
    value = value.tolist() if hasattr(value, 'tolist') else value
    return [without_numpy(item) for item in value] if isinstance(value, (list, tuple)) else value
