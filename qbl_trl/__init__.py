"""Balanced low-rank adapters over 4-bit models, trained in TRL and deployed exactly, still at 4 bits.

Importing the package registers the adapter with PEFT and the quantizer with transformers; everything else is loaded
when it is first named.
"""

import importlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from qbl_trl.adapter import model as _adapter
from qbl_trl.config import GroupQuantConfig, QBLoRAConfig
from qbl_trl.errors import explain_missing
from qbl_trl.quant import hf_quantizer as _quantizer

if TYPE_CHECKING:
    from qbl_trl.adapter.to_lora import to_lora
    from qbl_trl.merging import merge
    from qbl_trl.onnx.export import export_onnx
    from qbl_trl.parity import verify
    from qbl_trl.trl.callback import QBLoRACallback

__version__ = "0.1.0"
__all__ = ["GroupQuantConfig", "QBLoRACallback", "QBLoRAConfig", "export_onnx", "merge", "to_lora", "verify"]

_LAZY = {
    "QBLoRACallback": "qbl_trl.trl.callback",
    "export_onnx": "qbl_trl.onnx.export",
    "merge": "qbl_trl.merging",
    "to_lora": "qbl_trl.adapter.to_lora",
    "verify": "qbl_trl.parity",
}

_adapter.register()
_quantizer.register()


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
