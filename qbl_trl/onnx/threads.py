"""A trace replaces functions of modeling files and torch while it runs; other threads go on with the originals.

Optimum replaces some too (torch's attention), for all threads: a model that runs beside an export may still fail.
"""

import threading
from collections.abc import Callable
from typing import Any

TRACING = threading.RLock()  # one trace at a time


def here_only(instead: Callable[..., Any], original: Callable[..., Any]) -> Callable[..., Any]:
    """A function that is another one in this thread: a model that runs beside a trace is not traced."""
    owner = threading.get_ident()

    def either(*args: Any, **kwargs: Any) -> Any:
        return (instead if threading.get_ident() == owner else original)(*args, **kwargs)

    return either
