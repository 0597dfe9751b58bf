"""What is in a pickle, read without running anything that it names.

Every class and function that a pickle names is replaced by one that only keeps what it is given: so numbers,
strings and containers come out, tensors do not, and no code of the file's is run.
"""

from __future__ import annotations

import pickle
from collections import OrderedDict
from typing import IO, Any


class Placeholder:
    """Stands for an object, whatever its class; has the attributes that were saved."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Placeholder:
        """A new one, whatever the class would be given."""
        return super().__new__(cls)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.args = args

    def __setitem__(self, key: Any, value: Any) -> None: ...

    def append(self, item: Any) -> None:
        """As of a list; kept nowhere."""

    def extend(self, items: Any) -> None:
        """As of a list; kept nowhere."""

    def __setstate__(self, state: Any) -> None:
        for part in state if isinstance(state, tuple) else (state,):
            if isinstance(part, dict):
                vars(self).update({str(key): value for key, value in part.items()})


class _Reader(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        return type(name, (Placeholder,), {})

    def persistent_load(self, pid: Any) -> Any:
        return None


def read(file: IO[bytes]) -> Any:
    """The object in a pickle, with :class:`Placeholder` for what is no number, string or container.

    Raises:
        ValueError: the file ends too early, or is no pickle.
    """
    try:
        return _Reader(file).load()
    except (pickle.UnpicklingError, EOFError, AttributeError, TypeError, IndexError, KeyError) as error:
        raise ValueError(f"its pickle cannot be read: {error}") from error
