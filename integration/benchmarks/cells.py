"""What is trained and judged under the same conditions: one cell = (task, method, settings, rate, seed).

A cell is one JSON file named by its settings. The seed sets A's start and the order of the questions; the same seed
means the same questions for every method.

| method | base | p | e | trained |
| --- | --- | --- | --- | --- |
| lora_float | float32 | 1 | 1 | A, B |
| qlora_nf4, qblora_nf4 | NF4, blocks of 64, double quantization (bitsandbytes) | 1, 2 | 1, 2 | A, B |
| loftq_nf4, qblora_error_nf4 | NF4, the adapter started at its error (one iteration of LoftQ) | 1, 2 | 1, 2 | A, B |
| pissa_nf4 | NF4 of what the largest singular vectors leave (PEFT's PiSSA) | 1 | 1 | A, B |
| lora_affine, qblora_affine | affine groups of g | 1, 2 | 1, 2 | A, B |
| affine_p2e1, affine_p1e2 | affine groups of g | 2, 1 | 1, 2 | A, B |
| affine_e2_writers, affine_e2_readers | affine groups of g | 1 | 2 on some layers, else 1 | A, B |
| qalora, qablora_e2, qablora_e4 | affine groups of g | g | 1, 2, 4 | A, B |
| qablora | affine groups of g | g | QBLoRAConfig's default: 2 up to half of full rank, else 1 | A, B |
| qahira_e1, qahira_e2 | affine groups of g | g | 1, 2 | D |

Two poolings are none of the package's: "tied" is the sum with A started as a plain LoRA's A would be (bound 1/sqrt(K),
not sqrt(p/K)), "half" lies half way to it from "rms". Both give B inputs of the variance that "rms" gives it; A learns
faster than under "rms", sqrt(p) times under "tied" and p^(1/4) times under "half".
"""

import dataclasses
import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from qbl_trl.adapter.balance import default_out_factor
from qbl_trl.config import POOLINGS as POOLINGS_OF_CONFIG
from qbl_trl.config import GroupQuantConfig, QBLoRAConfig

RESULTS = Path(__file__).parent / "results" / "quality"
POOLED = "g"  # in METHODS: p is the quantization group
BY_RANK = "by rank"  # in METHODS: e is what QBLoRAConfig chooses for a quantization-aware layer


@dataclass(frozen=True)
class Method:
    """What is trained, on what.

    Attributes:
        base: "float", "nf4" or "affine".
        p, e: the factors; p may be POOLED, e may be BY_RANK.
        start: "" (B = 0), "error" (LoftQ's) or "pissa".
        shared: regular expression, the layers whose outputs share; e is 1 elsewhere.
    """

    base: str
    p: int | str
    e: int | str
    adapter: str = "low_rank"
    start: str = ""
    shared: str = ".*"


READERS = r".*\.(q_proj|k_proj|v_proj|gate_proj|up_proj)"  # of the residual stream
WRITERS = r".*\.(o_proj|down_proj)"  # into it
METHODS = {
    "base_float": Method("float", 1, 1, "none"),
    "base_nf4": Method("nf4", 1, 1, "none"),
    "base_affine": Method("affine", 1, 1, "none"),
    "lora_float": Method("float", 1, 1),
    "qlora_nf4": Method("nf4", 1, 1),
    "qblora_nf4": Method("nf4", 2, 2),
    "loftq_nf4": Method("nf4", 1, 1, start="error"),
    "qblora_error_nf4": Method("nf4", 2, 2, start="error"),
    "pissa_nf4": Method("nf4", 1, 1, start="pissa"),
    "lora_affine": Method("affine", 1, 1),
    "affine_p2e1": Method("affine", 2, 1),
    "affine_p1e2": Method("affine", 1, 2),
    "qblora_affine": Method("affine", 2, 2),
    "affine_e2_writers": Method("affine", 1, 2, shared=WRITERS),
    "affine_e2_readers": Method("affine", 1, 2, shared=READERS),
    "qalora": Method("affine", POOLED, 1),
    "qablora_e2": Method("affine", POOLED, 2),
    "qablora": Method("affine", POOLED, BY_RANK),
    "qablora_e4": Method("affine", POOLED, 4),
    "qahira_e1": Method("affine", POOLED, 1, "block"),
    "qahira_e2": Method("affine", POOLED, 2, "block"),
}


@dataclass(frozen=True)
class Cell:
    """Everything that decides a cell's numbers.

    Attributes:
        pooling: "none" where p = 1: there is nothing to pool.
        tokens: bound on the length of a story.
        bits, group_size, algorithm: the affine base's.
        layers: how many of the model's layers, from the top, are adapted.
        pool: training rows; the seed sets their order.
        judged: rows of a split that are judged.
    """

    task: str
    method: str
    pooling: str = "none"
    lr: float = 1e-3
    seed: int = 0
    r: int = 8
    lora_alpha: int = 16
    steps: int = 60
    batch: int = 8
    tokens: int = 24
    bits: int = 4
    group_size: int = 32
    algorithm: str = "rtn"
    layers: int = 6
    pool: int = 480
    judged: int = 200

    @property
    def name(self) -> str:
        special = {
            f.name: getattr(self, f.name) for f in dataclasses.fields(self) if getattr(self, f.name) != f.default
        }
        digest = hashlib.sha256(json.dumps(special, sort_keys=True).encode()).hexdigest()[:8]
        pooling = "" if self.pooling == "none" else f"-{self.pooling}"
        return f"{self.task}-{self.method}{pooling}-lr{self.lr:g}-seed{self.seed}-{digest}"

    @property
    def path(self) -> Path:
        return RESULTS / f"{self.name}.json"

    @property
    def in_factor(self) -> int:
        p = METHODS[self.method].p
        return self.group_size if p == POOLED else int(p)

    @property
    def affine(self) -> GroupQuantConfig:
        return GroupQuantConfig(bits=self.bits, group_size=self.group_size, algorithm=self.algorithm)

    def out_factors(self, model: nn.Module) -> dict[str, int]:
        """e by layer, as `out_factor_pattern` takes it."""
        method = METHODS[self.method]
        if method.e != BY_RANK:
            return {method.shared: int(method.e)}
        sizes = {n: (m.in_features, m.out_features) for n, m in model.named_modules() if hasattr(m, "in_features")}
        return {f"^{re.escape(n)}": default_out_factor(self.r, *size, self.in_factor) for n, size in sizes.items()}

    def adapter(self, model: nn.Module, quantization_aware: bool = False) -> QBLoRAConfig:
        method = METHODS[self.method]
        return QBLoRAConfig(
            r=self.r,
            lora_alpha=self.lora_alpha,
            in_factor=self.in_factor,
            out_factor=1,
            out_factor_pattern=self.out_factors(model),
            pooling=self.pooling if self.pooling in POOLINGS_OF_CONFIG else "sum",
            adapter=method.adapter,
            quantization_aware=quantization_aware,
            task_type="CAUSAL_LM",
        )
