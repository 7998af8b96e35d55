"""Balanced low-rank adapters over 4-bit models, trained in TRL and deployed exactly, still at 4 bits.

Importing the package registers the adapter with PEFT and the quantizer with transformers; everything else is loaded
when it is first named. The command `qbl-trl` registers them once it has read its arguments.
"""

import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qbl_trl.errors import explain_missing

if TYPE_CHECKING:
    from qbl_trl.adapter.to_lora import to_lora
    from qbl_trl.config import GroupQuantConfig, QBLoRAConfig
    from qbl_trl.merging import merge
    from qbl_trl.onnx.export import export_onnx
    from qbl_trl.trl.callback import QBLoRACallback
    from qbl_trl.verifying import verify

__version__ = "0.1.0"
__all__ = ["GroupQuantConfig", "QBLoRACallback", "QBLoRAConfig", "export_onnx", "merge", "to_lora", "verify"]

_LAZY = {
    "GroupQuantConfig": "qbl_trl.config",
    "QBLoRACallback": "qbl_trl.trl.callback",
    "QBLoRAConfig": "qbl_trl.config",
    "export_onnx": "qbl_trl.onnx.export",
    "merge": "qbl_trl.merging",
    "to_lora": "qbl_trl.adapter.to_lora",
    "verify": "qbl_trl.verifying",
}


def register() -> None:
    """Make the adapter known to PEFT, and the quantizer to transformers (once)."""
    for name in ("qbl_trl.adapter.model", "qbl_trl.quant.hf_quantizer"):
        importlib.import_module(name).register()


def _is_command() -> bool:
    """Whether a shell runs `qbl-trl`: its help and what is wrong with its arguments come before torch is loaded."""
    started = (sys.argv or [""])[0]
    return Path(started).stem == "qbl-trl" or (started == "-m" and "qbl_trl.cli" in sys.orig_argv)


if not _is_command():
    register()


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'qbl_trl' has no attribute {name!r}")
    try:
        return getattr(importlib.import_module(_LAZY[name]), name)
    except ModuleNotFoundError as error:
        return _missing(f"qbl_trl.{name}", error)


def _missing(name: str, error: ModuleNotFoundError) -> Callable[..., Any]:
    """What stands for a function whose packages are not installed: importing it is no error, calling it is."""
    try:
        explain_missing(name, error)
    except ImportError as explained:
        reason = explained
    else:
        raise error

    def unavailable(*args: Any, **kwargs: Any) -> Any:
        raise reason

    return unavailable


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
