"""The errors this package raises. Each says where, what was given, what is allowed and what to do."""

import errno
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager


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


class PackageError(QblError, ImportError):
    """A package is not installed that comes with one of the extras."""


# What can be done with a trained LoRA.
OTHERS_DEPLOYED = (
    "PEFT's merge_and_unload() merges a LoRA into a float base, to be saved and given to `qbl-trl quantize`; over a "
    "base of GroupQuantConfig, export_onnx takes a plain LoRA as it is, exactly"
)

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # of a disk
EXPORT_PACKAGES = {"ml_dtypes", "onnx", "onnx_ir", "onnxruntime", "optimum"}


def explain_missing(what: str, error: ModuleNotFoundError) -> None:
    """Raise PackageError with what to install, if the module that is missing comes with an extra for exports."""
    if error.name is not None and error.name.partition(".")[0] in EXPORT_PACKAGES:
        from qbl_trl.generation import BEFORE_5  # here: a command line's help is there before transformers is

        extra = "onnx" if BEFORE_5 else "onnx5"
        raise PackageError(
            f'{what} needs {error.name}: pip install "qbl-trl[{extra}]" (or "qbl-trl[{extra}-gpu]")'
        ) from error


SHOWN = "QBL_TRL_TRACEBACK"  # set in the environment: errors end in a traceback, for whoever looks for their cause
FLAGS = {"set overwrite": "pass --overwrite"}  # what an error asks of a caller, as a command line says it


def said(error: BaseException, flags: Mapping[str, str] = FLAGS) -> str:
    """The message of an error, with its notes, in the words of a command line."""
    text = " ".join([str(error), *getattr(error, "__notes__", ())])
    for called, flag in flags.items():
        text = text.replace(called, flag)
    return text


def first_line(error: BaseException) -> str:
    """The first line of another library's message; "" if it has none."""
    return next(iter(str(error).strip().splitlines()), "")


_READERS = (
    "datasets",
    "trl.scripts",
    "transformers.hf_argparser",
    "transformers.training_args",
)  # modules that read what a user asked for


def _raised_in(error: BaseException) -> str:
    """The module that an error comes from."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return "" if trace is None else str(trace.tb_frame.f_globals.get("__name__", ""))


@contextmanager
def one_line() -> Iterator[None]:
    """For scripts: an error of this package is its message on standard error and exit status 1, not a traceback.

    The same for a file, a model, a dataset or a split that is not there, and for an unknown flag.
    """
    try:
        yield
    except QblError as error:
        if os.environ.get(SHOWN):
            raise
        raise SystemExit(said(error)) from None
    except (OSError, ValueError) as error:
        of_the_hub = type(error).__module__.startswith("huggingface_hub") or getattr(error, "errno", 0) is None
        asked = of_the_hub or isinstance(error, FileNotFoundError) or _raised_in(error).startswith(_READERS)
        if os.environ.get(SHOWN) or not asked:
            raise
        first = first_line(error) or type(error).__name__
        if "bf16/gpu" in first:
            first += " On a CPU pass --use_cpu true --bf16 false --dtype float32."
        raise SystemExit(" ".join([first, *getattr(error, "__notes__", ()), f"({SHOWN}=1 shows where)"])) from None
