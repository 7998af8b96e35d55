"""Which generation of transformers runs: 5 names settings otherwise, and initializes tensors instead of modules."""

import transformers

BEFORE_5 = int(transformers.__version__.split(".")[0]) < 5
