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
