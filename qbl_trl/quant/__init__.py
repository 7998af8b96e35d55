"""The 4-bit base: affine group quantization, its packing, and the frozen linear layer over it."""
