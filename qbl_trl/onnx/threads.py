"""A trace replaces functions of modeling files and torch while it runs; other threads go on with the originals.

Optimum replaces some too (torch's attention), for all threads: a model that runs beside an export may still fail.
"""

import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

TRACING = threading.RLock()  # one trace at a time


def _here_only(instead: Callable[..., Any], original: Callable[..., Any]) -> Callable[..., Any]:
    """A function that is another one in this thread: a model that runs beside a trace is not traced."""
    owner = threading.get_ident()

    def either(*args: Any, **kwargs: Any) -> Any:
        return (instead if threading.get_ident() == owner else original)(*args, **kwargs)

    return either


@contextmanager
def replaced_here(functions: Iterable[tuple[Any, str, Callable[..., Any]]]) -> Iterator[None]:
    """While open, functions of modules, (module, name, instead), are others in this thread."""
    originals: list[tuple[Any, str, Callable[..., Any]]] = []
    try:
        for module, name, instead in functions:
            original = getattr(module, name)
            originals.append((module, name, original))
            setattr(module, name, _here_only(instead, original))
        yield
    finally:
        for module, name, original in originals:
            setattr(module, name, original)
