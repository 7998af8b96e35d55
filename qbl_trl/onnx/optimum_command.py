"""`optimum-cli export qblora`: the export as a subcommand of Optimum's own tool.

The wheel installs a copy of this file as optimum/commands/register/register_qbl_trl.py, where Optimum looks for more
commands.
"""

from argparse import ArgumentParser

from optimum.commands.base import BaseOptimumCLICommand, CommandInfo
from optimum.commands.export.base import ExportCommand

from qbl_trl.errors import one_line
from qbl_trl.onnx.options import add_arguments, run


class QBLoRAExportCommand(BaseOptimumCLICommand):
    """A merged model or a trained adapter to ONNX, still at 4 bits."""

    COMMAND = CommandInfo(name="qblora", help="Export a model fine-tuned with balanced adapters, at 4 bits.")

    @staticmethod
    def parse_args(parser: ArgumentParser) -> None:
        add_arguments(parser)

    def run(self) -> None:
        with one_line():
            run(self.args)


REGISTER_COMMANDS = [(QBLoRAExportCommand, ExportCommand)]
