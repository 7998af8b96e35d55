"""qbl-trl: quantize | inspect | merge | to-lora | export | convert | verify | report.

Each command is a module of `qbl_trl.commands`, and does what one public function of the package does; `qbl-trl COMMAND
--help` lists its options. An error of the package is one line on standard error and exit status 1; nothing half-written
is left. What a command needs is loaded after its arguments were read.
"""

import argparse
import importlib
import logging
import os
import re
import sys
from collections.abc import Sequence
from typing import Any

import qbl_trl
from qbl_trl.arguments import in_flags
from qbl_trl.errors import SHOWN, QblError, first_line, said

COMMANDS = ("quantize", "inspect", "merge", "to-lora", "export", "convert", "verify", "report")


def make_parser() -> argparse.ArgumentParser:
    """The command line, without running anything."""
    parser = argparse.ArgumentParser(prog="qbl-trl", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--version", action="version", version=f"qbl-trl {qbl_trl.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    raw = argparse.RawDescriptionHelpFormatter
    for name in COMMANDS:
        module = _module(name)
        examples = "\n".join(["examples:", *(f"  qbl-trl {name} {example}" for example in module.EXAMPLES)])
        told = {"help": module.SUMMARY, "description": module.SUMMARY, "epilog": examples, "formatter_class": raw}
        module.add_arguments(commands.add_parser(name, **told))
    return parser


def _parser(command: str) -> argparse.ArgumentParser:
    """One command's alone."""
    parser = argparse.ArgumentParser()
    _module(command).add_arguments(parser)
    return parser


def _module(command: str) -> Any:
    return importlib.import_module(f"qbl_trl.commands.{command.replace('-', '_')}")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the exit status is 0, 1 after an error that was explained, or 130 after Ctrl-C."""
    args = make_parser().parse_args([_dashed(argument) for argument in (sys.argv[1:] if argv is None else argv)])
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # as it is imported it warns of a kernel not installed
    try:
        command = _module(args.command)
        if hasattr(command, "check"):
            command.check(args)
        qbl_trl.register()
        return int(command.run(args) or 0)
    except KeyboardInterrupt:
        print(f"qbl-trl {args.command}: interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        if os.environ.get(SHOWN):
            raise
        print(f"qbl-trl {args.command}: {_explained(error, args)}", file=sys.stderr)
        return 1


def _dashed(argument: str) -> str:
    """--kv_cache_dtype, as recipes and trainers spell their flags, is --kv-cache-dtype here."""
    name, *value = argument.split("=", 1)
    return "=".join([name.replace("_", "-"), *value]) if name.startswith("--") else argument


_LONGEST = 300  # characters of another library's message
_FUNCTIONS = ("GroupQuantConfig", "QBLoRAConfig", "convert_checkpoint", "export_onnx", "verify", "write_checkpoint")


def _explained(error: Exception, args: argparse.Namespace) -> str:
    """One of our messages in the words of a command line; another library's with its type, and how to see where it came
    from."""
    if not isinstance(error, QblError | OSError):
        return f"{type(error).__name__}: {first_line(error)[:_LONGEST]} ({SHOWN}=1 shows where)"
    text = said(error).removeprefix(f"{args.command}: ")
    if isinstance(error, OSError):
        return text
    text = re.sub(rf"^({'|'.join(_FUNCTIONS)}): ", "", text)
    if args.command == "merge":
        text = text.replace('merge(model, lossy="requantize")', "--lossy requantize")
    return in_flags(text, _parser(args.command), args, {"format": "to"} if args.command == "convert" else {})


if __name__ == "__main__":
    sys.exit(main())
