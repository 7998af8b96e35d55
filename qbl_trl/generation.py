"""Which generation of transformers runs: 5 names settings otherwise, and initializes tensors instead of modules."""

import inspect
from typing import Any

import transformers


def before_5(version: str) -> bool:
    """Whether a version of transformers is of the generation before 5.

    Raises:
        ImportError: if it is one whose loading code asks quantizers for something else; see pyproject.toml.
    """
    major, minor = (int(part) for part in version.split(".")[:2])
    if (4, 57) <= (major, minor) < (5, 0) or (major, minor) >= (5, 14):
        return major < 5
    raise ImportError(
        f"qbl_trl works with transformers 4.57, and with 5 from 5.14 on; {version} is installed. "
        'pip install "transformers~=4.57.6" (ORTModelForCausalLM of Optimum needs that one), or --upgrade transformers'
    )


BEFORE_5 = before_5(transformers.__version__)
_CACHES = ("cache", "past_key_values", "cache_params")  # the first from 5.24 on, the last of Mamba


def cache_argument(model: Any) -> str | None:
    """The name by which a decoder's forward takes its cache, None where it takes none."""
    parameters = inspect.signature(model.forward).parameters
    return next((name for name in _CACHES if name in parameters), None)


def cache_of(output: Any) -> Any:
    """The cache that a decoder's output holds, None where it holds none."""
    return next((held for name in _CACHES if (held := getattr(output, name, None)) is not None), None)
