"""Exports are skipped where the [onnx] extra is not installed."""

import pytest

for name in ("onnx_ir", "onnxruntime", "optimum.exporters.onnx"):
    pytest.importorskip(name, reason="needs the [onnx] extra")
