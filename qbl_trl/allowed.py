"""Values that settings may have: plain data, which a command line reads without loading torch."""

ALGORITHMS = ("rtn", "mse", "hqq", "gptq")
ALLOWED_BITS = (2, 4, 8)
ALLOWED_GROUP_SIZES = (16, 32, 64, 128, 256)
SCALE_DTYPE_NAMES = ("float16", "bfloat16", "float32")
