"""BalancedLinear: the adapter layer, one class over every base.

    y = base(x) + gain * expand_e(B (A (sum_p(x))))         adapter="low_rank"
    y = base(x) + gain * expand_e(D (sum_p(x)))             adapter="block" (QA-HiRA)

Saved for backward per token: the pooled input (K / p) and A's output (R); x itself is not kept. A, B and D are
`nn.Linear` modules and are called, never read, in the forward pass, so that FSDP can wrap them.
"""

import math
from typing import Any

import torch
from peft.tuners.lora.layer import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.nn.modules import module as module_hooks
from transformers.pytorch_utils import Conv1D

from qbl_trl.adapter.balance import matched_rank, pool_scale
from qbl_trl.adapter.bases import Base, describe
from qbl_trl.adapter.factors import choose_factors, record_factors_, warn_of_unmatched
from qbl_trl.adapter.mergeable import MergesIntoBase
from qbl_trl.adapter.products import add_expanded, pool
from qbl_trl.adapter.projections import ExpandedLinear, PooledLinear, compute_dtype
from qbl_trl.arithmetic import in_float64
from qbl_trl.config import QBLoRAConfig
from qbl_trl.errors import OTHERS_DEPLOYED, ConfigError
from qbl_trl.quant.blocks import expand_delta
from qbl_trl.quant.intact import is_offloaded
from qbl_trl.quant.linear import GroupQuantLinear


def two_kinds(name: str) -> ConfigError:
    """What is said where a LoRA and a balanced adapter would share a layer."""
    return ConfigError(
        f"{name or 'a layer'}: one layer cannot hold a LoRA and a balanced adapter; use "
        "QBLoRAConfig(in_factor=1, out_factor=1) for the LoRA, which computes the same"
    )


class BalancedLinear(nn.Module, MergesIntoBase):
    """A frozen base layer and its balanced adapters, by name.

    Attributes (each a dict by adapter name):
        lora_A: nn.Linear, weight (R, K / p).  lora_B: nn.Linear, weight (N / e, R).
        lora_block: nn.Linear, weight (N / e, K / p), instead of A and B where adapter="block".
        in_factor, out_factor, rank: p, e and R really used; `r` is the nominal rank.
        pooling_scale: factor on the sum of p neighbours.
    """

    adapter_layer_names = ("lora_A", "lora_B", "lora_block")
    other_param_names = (
        *("r", "lora_alpha", "scaling", "lora_dropout", "use_dora", "use_rslora", "lora_bias"),
        *("in_factor", "out_factor", "rank", "pooling_scale"),
    )

    # PEFT's base class is untyped; nn.Module alone would call these Tensor or Module.
    base_layer: Any
    lora_A: Any
    lora_B: Any
    lora_block: Any
    lora_dropout: Any
    r: dict[str, int]
    lora_alpha: dict[str, int]
    scaling: dict[str, float]
    use_rslora: dict[str, bool]
    use_dora: dict[str, bool]
    lora_bias: dict[str, bool]
    active_adapters: list[str]
    merged_adapters: list[str]
    set_adapter: Any
    get_base_layer: Any
    _check_forward_args: Any
    _move_adapter_to_device_of_base_layer: Any

    def __init__(
        self,
        base_layer: nn.Module,
        adapter_name: str,
        config: QBLoRAConfig,
        r: int = 0,
        lora_alpha: int = 1,
        target_name: str = "",
        **kwargs: Any,
    ) -> None:
        nn.Module.__init__(self)
        inner: Any = base_layer.get_base_layer() if isinstance(base_layer, BaseTunerLayer) else base_layer
        self.base = describe(inner, target_name)
        LoraLayer.__init__(self, base_layer)
        del self.lora_embedding_A  # a property below
        self.fan_in_fan_out = self.base.transposed
        self.lora_block = nn.ModuleDict({})
        self.in_factor: dict[str, int] = {}
        self.out_factor: dict[str, int] = {}
        self.rank: dict[str, int] = {}
        self.pooling_scale: dict[str, float] = {}
        self.apart_from = ()
        self._before_merge: list[tuple[Tensor | None, int | None, int | None]] = []
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, r, lora_alpha=lora_alpha, config=config, target_name=target_name)

    @property
    def lora_embedding_A(self) -> Any:
        """The second place, beside lora_A, where PEFT looks which adapters a layer holds: here those of D."""
        return self.lora_block

    def _get_in_out_features(self, module: nn.Module) -> tuple[int, int]:
        base: Base = self.base
        return base.in_features, base.out_features

    def update_layer(  # type: ignore[override]
        self, adapter_name: str, r: int, lora_alpha: int, config: QBLoRAConfig, target_name: str = "", **kwargs: Any
    ) -> None:
        """Add an adapter.

        Raises:
            ConfigError: if the factors do not fit this layer (the message names the layer and what would fit), or
                accelerate has offloaded it.
        """
        if not isinstance(config, QBLoRAConfig):  # PEFT's LoRA takes this for a layer of its own
            raise two_kinds(target_name)
        if r <= 0:
            raise ConfigError(f"{target_name}: r={r} must be at least 1")
        frozen = self.get_base_layer()
        if "_hf_hook" in vars(frozen) and is_offloaded(frozen):
            raise ConfigError(
                f"{target_name} is offloaded: it is on no device (meta) but for its forward pass, nor would an adapter "
                "be; load the model whole, or leave the layer out (exclude_modules, layers_to_transform)"
            )
        p, e = choose_factors(self.base, config, target_name)
        rows, columns = self.base.out_features // e, self.base.in_features // p
        self.r[adapter_name], self.lora_alpha[adapter_name] = r, lora_alpha
        self.in_factor[adapter_name], self.out_factor[adapter_name] = p, e
        self.pooling_scale[adapter_name] = pool_scale(config.pooling, p)
        self.use_rslora[adapter_name], self.use_dora[adapter_name] = config.use_rslora, False
        self.set_scale(adapter_name, 1.0)
        self.lora_bias[adapter_name] = False
        dropout = nn.Dropout(config.lora_dropout) if config.lora_dropout > 0 else nn.Identity()
        self.lora_dropout.update({adapter_name: dropout.train(self.training)})
        if config.adapter == "block":
            self.rank[adapter_name] = min(rows, columns)
            self.lora_block[adapter_name] = ExpandedLinear(columns, rows, bias=False)
        else:
            self.rank[adapter_name] = matched_rank(r, self.base.in_features, self.base.out_features, p, e)
            self.lora_A[adapter_name] = PooledLinear(columns, self.rank[adapter_name], bias=False)
            self.lora_B[adapter_name] = ExpandedLinear(self.rank[adapter_name], rows, bias=False)
        self.reset_lora_parameters(adapter_name, config.init_lora_weights)
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def reset_lora_parameters(self, adapter_name: str, init_lora_weights: bool | str) -> None:
        """B (or the block) zero and A Kaiming-uniform: the adapted layer starts equal to its base.

        False leaves B and the block at random instead, for tests that need an adapter with an effect.
        """
        if adapter_name in self.lora_block:
            if init_lora_weights is False:
                nn.init.normal_(self.lora_block[adapter_name].weight, std=0.02)
            else:
                nn.init.zeros_(self.lora_block[adapter_name].weight)
        elif adapter_name in self.lora_A and init_lora_weights is not False:
            if init_lora_weights == "gaussian":
                nn.init.normal_(self.lora_A[adapter_name].weight, std=1 / self.rank[adapter_name])
            else:
                nn.init.kaiming_uniform_(self.lora_A[adapter_name].weight, a=math.sqrt(5))
            nn.init.zeros_(self.lora_B[adapter_name].weight)

    def gain(self, adapter_name: str) -> float:
        """(alpha / r) * pool_scale(p): what B A is multiplied by in the block delta."""
        return float(self.scaling[adapter_name]) * self.pooling_scale[adapter_name]

    def set_scale(self, adapter: str, scale: float) -> None:
        """Set the scale of one adapter to `scale` times its configured one; a layer without it is left alone."""
        if adapter in self.r:
            r = self.r[adapter]
            self.scaling[adapter] = scale * self.lora_alpha[adapter] / (math.sqrt(r) if self.use_rslora[adapter] else r)

    def scale_layer(self, scale: float) -> None:
        """Multiply the scale of every active adapter."""
        for name in self.active_adapters:
            if name in self.rank:
                self.scaling[name] *= scale

    def unscale_layer(self, scale: float | None = None) -> None:
        """Divide the scale of every active adapter; without a number set it to the configured one."""
        for name in self.active_adapters:
            if name not in self.rank:
                continue
            if scale is None:
                self.set_scale(name, 1.0)
            else:
                self.scaling[name] /= scale

    def block_delta(self, adapter_name: str) -> Tensor:
        """D = gain * B A, (N / e, K / p) float32, rounded once: the product is formed in float64."""
        factors = [
            layers[adapter_name].weight
            for layers in (self.lora_block, self.lora_B, self.lora_A)
            if adapter_name in layers
        ]
        product, *others = in_float64(*factors)
        for factor in others:
            product = product @ factor
        return (product * self.gain(adapter_name)).float().to(factors[0].device)

    def get_delta_weight(self, adapter: str) -> Tensor:
        """dW as the base stores its weight: (N, K) float32, or (K, N) for Conv1D."""
        delta = expand_delta(self.block_delta(adapter), self.in_factor[adapter], self.out_factor[adapter])
        return delta.T if self.base.transposed else delta

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """(..., K) -> (..., N), in the dtype of the base layer's output."""
        self._check_forward_args(x, *args, **kwargs)
        adapter_names = kwargs.pop("adapter_names", None)
        kwargs.pop("alora_offsets", None)
        if self.disable_adapters:
            if self.merged:
                self.unmerge()
            return self.base_layer(x, *args, **kwargs)  # type: ignore[no-any-return]
        if adapter_names is not None:
            return self._mixed_batch(x, self.base_layer(x, *args, **kwargs), adapter_names)
        inner: list[tuple[str, Tensor, Tensor | None]] = []
        if not self.merged:
            for name in self.active_adapters:
                if name in self.rank:
                    x, hidden, dense = self._down(name, x)
                    inner.append((name, hidden, dense))
        result: Tensor = self.base_layer(x, *args, **kwargs)
        own = self._owns_base_output()
        for name, hidden, dense in inner:
            result = self._up(name, hidden, dense, result, own)
        return result

    def _down(self, name: str, x: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """x for the base layer, the input of the second product (gain included), and D where it is made whole."""
        p, gain = self.in_factor[name], self.scaling[name] * self.pooling_scale[name]
        low_rank, dropout = name in self.lora_A, self.lora_dropout[name]
        first = self.lora_A[name] if low_rank else self.lora_block[name]
        whole = self._is_cheaper_whole(name, x)
        if low_rank and not whole and (isinstance(dropout, nn.Identity) or not self.training):
            x, hidden = first(x, p)
            return x, hidden * gain, None
        dtype = compute_dtype(first.weight, x.device.type)
        x, pooled = pool(x, p, dtype)
        pooled = dropout(pooled)
        if not low_rank:
            return x, pooled * gain, None
        if not whole:
            return x, first(pooled) * gain, None
        eye = torch.eye(pooled.shape[-1], dtype=dtype, device=x.device)
        return x, pooled * gain, self.lora_B[name](first(eye)).T

    def _up(self, name: str, hidden: Tensor, dense: Tensor | None, result: Tensor, own: bool = False) -> Tensor:
        e = self.out_factor[name]
        if dense is not None:
            return add_expanded(result, hidden, dense, e, own)
        last = self.lora_B[name] if name in self.lora_B else self.lora_block[name]
        return last(hidden, result, e, own)  # type: ignore[no-any-return]

    def _owns_base_output(self) -> bool:
        """Whether nobody else can hold what the base layer returns: neither a hook, nor the backward of its class."""
        base = self.base_layer
        known = type(base) in (nn.Linear, Conv1D, GroupQuantLinear) or type(base).__module__.startswith("bitsandbytes")
        return known and not base._forward_hooks and not module_hooks._global_forward_hooks

    def _is_cheaper_whole(self, name: str, x: Tensor) -> bool:
        """Whether D = B A, made once, costs fewer operations and less memory than B (A h) for every token."""
        if name in self.lora_block:
            return False
        columns = self.base.in_features // self.in_factor[name]
        rows = self.base.out_features // self.out_factor[name]
        rank, tokens = self.rank[name], x.numel() // x.shape[-1]
        made = columns * (columns + rank + rows)
        return 2 * columns * rows < rank * (columns + rows) and made < tokens * rank

    def _mixed_batch(self, x: Tensor, result: Tensor, adapter_names: list[str]) -> Tensor:
        """Each sample of the batch with the adapter it names; "__base__" is none."""
        result = result.clone()
        for name in dict.fromkeys(adapter_names):
            if name not in self.rank:
                continue
            rows = [row for row, wanted in enumerate(adapter_names) if wanted == name]
            _, hidden, dense = self._down(name, x[rows])
            result[rows] = self._up(name, hidden, dense, result[rows])
        return result

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """PEFT's conversion takes singular values of dW, to any rank; `qbl_trl.to_lora` repeats A and B, exactly."""
        return True

    def __repr__(self) -> str:
        return "qblora." + super().__repr__()


def record_placed_(model: nn.Module, adapter_name: str, config: QBLoRAConfig) -> dict[str, BalancedLinear]:
    """Write the factors that an adapter's layers got into its configuration, in place; returns those layers."""
    layers = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, BalancedLinear) and adapter_name in module.rank
    }
    if layers:
        warn_of_unmatched(config, layers)
        record_factors_(config, {n: (m.in_factor[adapter_name], m.out_factor[adapter_name]) for n, m in layers.items()})
    return layers


def adapter_layers(model: nn.Module) -> dict[str, BalancedLinear]:
    """Every BalancedLinear of a model, by full name.

    Raises:
        ConfigError: if the model has none.
    """
    found = {name: module for name, module in model.named_modules() if isinstance(module, BalancedLinear)}
    if not found:
        other = any(isinstance(module, BaseTunerLayer) for module in model.modules())
        raise ConfigError(
            f"{type(model).__name__} has no balanced adapters"
            + (
                f"; its adapters are of another PEFT method: {OTHERS_DEPLOYED}"
                if other
                else "; place them with get_peft_model(model, QBLoRAConfig(...)) or QBLoRACallback(QBLoRAConfig(...))"
            )
        )
    return found
