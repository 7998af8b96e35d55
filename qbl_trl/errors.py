"""The errors this package raises. Each says where, what was given, what is allowed and what to do."""


class QblError(Exception):
    """Base of every error raised by qbl_trl."""


class ConfigError(QblError, ValueError):
    """A setting, or a setting together with the model it meets, cannot work."""


class FoldError(QblError, ValueError):
    """A weight change cannot be moved into the zero points of the base."""


class MergeError(QblError, ValueError):
    """An adapter cannot be merged without loss, or the merged model disagrees with the trained one."""


class CheckpointError(QblError, ValueError):
    """A checkpoint on disk is damaged, foreign, or not what its header says."""


class ExportError(QblError, RuntimeError):
    """A model cannot be written as an ONNX graph that computes the same function."""


_EXPORT_PACKAGES = {"onnx", "onnx_ir", "onnxruntime", "optimum"}


def explain_missing(what: str, error: ModuleNotFoundError) -> None:
    """Raise ImportError with what to install, if the module that is missing comes with the onnx extra."""
    if error.name is not None and error.name.partition(".")[0] in _EXPORT_PACKAGES:
        raise ImportError(f'{what} needs {error.name}: pip install "qbl-trl[onnx]" (or "qbl-trl[onnx-gpu]")') from error
