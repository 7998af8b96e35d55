"""Exports are skipped without the [onnx] or [onnx5] extra; tests that only read a folder share one."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedModel

for name in ("onnx_ir", "onnxruntime"):
    pytest.importorskip(name, reason="needs the [onnx] or [onnx5] extra")


@dataclass(frozen=True)
class Exported:
    model: PreTrainedModel
    folder: Path
    report: Any


@pytest.fixture(scope="session")
def exported(tmp_path_factory):
    """A tiny model of the architecture `case` and its folder, written once however many tests ask: only to be read."""
    from qbl_trl import export_onnx
    from tests.onnx.architectures import build_named
    from tests.onnx.models import padded_batch
    from tests.tiny import tokens

    made: dict[tuple[object, ...], Exported] = {}

    def of(case: str, **options: str) -> Exported:
        key = case, *sorted(options.items())
        if key not in made:
            model, folder = build_named(case), tmp_path_factory.mktemp("exported") / "out"
            texts = [tokens(), padded_batch()[0], tokens(8, 16)] if "kv_cache_dtype" in options else None
            made[key] = Exported(model, folder, export_onnx(model, folder, calibration=texts, **options))
        return made[key]

    return of
