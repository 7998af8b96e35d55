"""Nothing stays behind on the CPU when a model lies elsewhere: the path of a GPU, without one."""

import subprocess
import sys

import pytest
from torch.utils import backend_registration


@pytest.mark.skipif(
    not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"),
    reason="this torch takes no device that is written in Python",
)
@pytest.mark.parametrize("part", ["core", "trainer"])
def test_the_path_runs_on_another_device_than_the_cpu(part, tmp_path):
    command = [sys.executable, "-W", "ignore", "-m", "tests.other_device.walk", part, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
