"""The export as a subcommand of Optimum's own tool, where Optimum is installed."""

from argparse import ArgumentParser

import pytest

pytest.importorskip("optimum.commands.base", reason="needs the [onnx] extra")


def command(*arguments):
    from qbl_trl.onnx.optimum_command import QBLoRAExportCommand

    parser = ArgumentParser()
    QBLoRAExportCommand.parse_args(parser)
    made = QBLoRAExportCommand.__new__(QBLoRAExportCommand)
    made.args = parser.parse_args([*map(str, arguments)])
    return made


def test_an_error_is_one_line(tmp_path):
    with pytest.raises(SystemExit, match="nowhere: no such folder") as stop:
        command(tmp_path / "nowhere", tmp_path / "out").run()
    assert "\n" not in stop.value.code
    assert not (tmp_path / "out").exists()
