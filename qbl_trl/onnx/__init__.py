"""Export to ONNX Runtime: exact, at 4 bits, fused. The only part of the package that imports optimum and onnx."""
