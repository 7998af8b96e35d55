"""Every test starts without the process-wide state that Accelerate and TrainingArguments leave behind."""

import os
from collections.abc import Iterator

import pytest
from accelerate.state import AcceleratorState, GradientState


@pytest.fixture(autouse=True)
def _no_leftover_precision() -> Iterator[None]:
    """bf16=True of one test would otherwise be the mixed precision of all that follow."""
    before = dict(os.environ)
    yield
    for name in set(os.environ) - set(before):
        del os.environ[name]
    os.environ.update(before)
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
