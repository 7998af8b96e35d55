"""What a run has to say for itself: `qblora_report.json` in the trainer's output folder."""

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn
from transformers import TrainerState, TrainingArguments

from qbl_trl.adapter.layer import BalancedLinear
from qbl_trl.trl.checkpoints import write_json
from qbl_trl.trl.layers import active
from qbl_trl.trl.metrics import LayerMetrics
from qbl_trl.wrapped import unwrap

REPORT = "qblora_report.json"
SCHEMA = 1


@dataclass
class RunRecord:
    """One training run.

    Attributes:
        model: name of the base.  adapter: trained parameters and their setting.
        layers: one entry per adapted layer: shape, factors, rank, and the last metrics.
        probe: difference of trained and merged form before training, by layer.
        merge, sizes, export: set when training ends.
        rounding: type the merged delta is stored in, ||Q(D) - D|| / ||D||, and the step from which training rounded it.
        first_step: where this process began, if it resumed a run.
        seconds: wall time of training since; callback_seconds of it were spent on metrics.
    """

    model: str = ""
    adapter: dict[str, Any] = field(default_factory=dict)
    layers: dict[str, dict[str, Any]] = field(default_factory=dict)
    probe: dict[str, float] = field(default_factory=dict)
    merge: dict[str, Any] = field(default_factory=dict)
    sizes: dict[str, int] = field(default_factory=dict)
    export: dict[str, Any] | None = None
    rounding: dict[str, Any] = field(default_factory=dict)
    first_step: int = 0
    seconds: float = 0.0
    callback_seconds: float = 0.0
    _started: float = 0.0

    @classmethod
    def start(cls, model: nn.Module, layers: dict[str, BalancedLinear], probe: dict[str, float]) -> "RunRecord":
        """Describe the adapters that are about to be trained."""
        inner = unwrap(model)
        trained = sum(p.numel() for p in inner.parameters() if p.requires_grad)
        config = getattr(inner, "config", None)
        return cls(
            model=str(getattr(config, "_name_or_path", "") or type(inner).__name__),
            adapter={"trainable_parameters": trained, "layers": len(layers)},
            layers={name: {"name": name, **_describe(layer)} for name, layer in layers.items()},
            probe=probe,
        )

    def begin(self, step: int = 0) -> None:
        """Training starts now, perhaps again, perhaps from a checkpoint of some step."""
        self.first_step = step
        self.merge, self.sizes, self.export, self.rounding = {}, {}, None, {}
        self.seconds = self.callback_seconds = 0.0
        self._started = time.perf_counter()

    def measured(self, layers: list[LayerMetrics], seconds: float = 0.0) -> None:
        """Keep the newest metrics of each layer, and what measuring cost."""
        for row in layers:
            self.layers.setdefault(row.name, {}).update(row.to_dict())
        self.callback_seconds += seconds

    def end(self, layers: list[LayerMetrics]) -> None:
        """Training is over."""
        self.seconds = time.perf_counter() - self._started
        self.measured(layers)

    def describe(self) -> str:
        """One line for a terminal."""
        line = f"{self.adapter['layers']} layers adapted, {self.adapter['trainable_parameters']:,} parameters"
        if "parity" in self.merge:
            line += f"; merged, largest logit difference {self.merge['parity']['max_abs_difference']:.1e}"
        return line

    def write(self, args: TrainingArguments, state: TrainerState, finished: bool) -> None:
        """Write the report in one rename."""
        content = {
            "schema": SCHEMA,
            "finished": finished,
            "model": self.model,
            "step": state.global_step,
            "first_step": self.first_step,
            "max_steps": state.max_steps,
            "world_size": args.world_size,
            "seconds": self.seconds or time.perf_counter() - self._started,
            "callback_seconds": self.callback_seconds,
            "adapter": self.adapter,
            "probe": self.probe,
            "layers": list(self.layers.values()),
            "merge": self.merge,
            "sizes": self.sizes,
            "export": self.export,
            "rounding": self.rounding,
            "log_history": state.log_history,
        }
        folder = Path(args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / REPORT, content)


def _describe(layer: BalancedLinear) -> dict[str, Any]:
    name = active(layer)[0]
    return {
        "out_features": layer.base.out_features,
        "in_features": layer.base.in_features,
        "base": layer.base.kind,
        "group_size": layer.base.group_size,
        "in_factor": layer.in_factor[name],
        "out_factor": layer.out_factor[name],
        "rank": layer.rank[name],
        "nominal_rank": layer.r[name],
    }
