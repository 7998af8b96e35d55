"""GroupQuantLinear: a frozen linear layer over packed affine codes.

    y = x W^T + b,      W[n, k] = scales[n, j] * (codes[n, k] - zeros[n, j]) + delta[n // e, k // p],    j = k // g

The backward pass reaches x only and recomputes W from its codes, so the layer saves no activation.
"""

from typing import Any

import torch
from torch import Tensor, nn

from qbl_trl.arithmetic import follows_no_function
from qbl_trl.config import LayerFormat
from qbl_trl.errors import ConfigError
from qbl_trl.quant.blocks import add_expanded, pool
from qbl_trl.quant.packed import ALL_ROWS, PackedWeight

# How many weights are float at once: on a CPU 16 MB, which stay in the last cache, and are enough for a full-speed
# product; elsewhere a gigabyte at most with all that plain torch makes on the way, which a large head would exceed.
_BLOCK_WEIGHTS, _BLOCK_ELSEWHERE = 1 << 22, 1 << 27


class GroupQuantLinear(PackedWeight, nn.Linear):  # type: ignore[misc]
    """A linear layer whose frozen weight stays at 2, 4 or 8 bits; storage as on PackedWeight.

    Attributes:
        bias: (out_features,) float frozen parameter, or None.
        embedding: while a tied head is being loaded, the embedding whose tensors it shares; else empty.
    """

    embedding: "tuple[PackedWeight, ...]" = ()

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = False,
        *,
        format: LayerFormat | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = in_features, out_features
        self._allocate(format or LayerFormat(), device)
        if bias:
            self.bias = nn.Parameter(torch.empty(out_features, dtype=dtype, device=device), requires_grad=False)
        else:
            self.register_parameter("bias", None)

    @classmethod
    def _empty(  # type: ignore[override]
        cls, in_features: int, out_features: int, format: LayerFormat, bias: Tensor | None = None
    ) -> "GroupQuantLinear":
        layer = cls(in_features, out_features, format=format, device="meta")
        if bias is not None:
            layer.bias = nn.Parameter(bias.detach(), requires_grad=False)
        return layer

    def _tie_weights(self) -> None:
        """Called by transformers 4.57 between loading and placing a model: a head gets what its embedding has got."""
        for table in self.embedding:
            table.as_head_(self)  # type: ignore[operator]

    def row_blocks(self, device: torch.device) -> list[tuple[int, int]]:
        """Row ranges whose float weight fits a processor's last cache, or is no burden on an accelerator."""
        weights = _BLOCK_WEIGHTS if device.type == "cpu" else _BLOCK_ELSEWHERE
        step = max(weights // self.in_features, 1)
        return [(row, min(row + step, self.out_features)) for row in range(0, self.out_features, step)]

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) -> (..., out_features) in the dtype of x (or of autocast).

        A merged delta is applied as it was trained, y = W x + expand_e(delta sum_p(x)): the large product is then the
        training model's bit for bit, and a ragged or tiny shift is not rounded into it.

        Raises:
            ConfigError: if x has another width, or holds integers: the model has cast its activations to the dtype of
                the packed weight; or while another exporter traces the model.
        """
        if not x.is_floating_point():
            raise ConfigError(
                f"a GroupQuantLinear was handed {x.dtype}: the model casts its activations to the dtype of this "
                "layer's weight, which is packed. Leave the layer out: GroupQuantConfig(modules_to_not_convert=[name])"
            )
        if x.shape[-1] != self.in_features:
            raise ConfigError(f"a GroupQuantLinear of {self.in_features} inputs was handed {tuple(x.shape)}")
        if torch.jit.is_tracing() or torch.compiler.is_exporting():  # type: ignore[attr-defined, no-untyped-call]
            raise ConfigError(
                "a GroupQuantLinear is not traced: no exporter but qbl_trl.export_onnx writes its codes as they are; "
                "`model.dequantize()` makes a float model that any other takes"
            )
        wide = x
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        if follows_no_function():
            y = nn.functional.linear(x, self.dequantize_rows(ALL_ROWS, x.dtype))
        else:
            y = _FrozenLinear.apply(x, self)  # type: ignore[no-untyped-call]
        if self.bias is not None:
            y = y + self.bias.to(y.dtype)
        if self.delta is not None:
            # A delta stored narrow is a rounded delta, not a narrow computation.
            dtype = torch.promote_types(self.delta.dtype, wide.dtype)
            pooled = pool(wide, self.format.in_factor or 1, dtype)
            y = add_expanded(y, nn.functional.linear(pooled, self.delta.to(dtype)), self.format.out_factor or 1)
        return y


class _FrozenLinear(torch.autograd.Function):
    """y = x W^T with W recomputed from its codes in both directions; nothing but these is remembered.

    On a CPU, W is made and used a block of rows at a time, and for a few tokens not even that: it never exists as a
    whole. Codes are those of the forward pass: by the backward pass the layer may have others
    (`torch.func.functional_call`), or none (offloading). They are no activations: they go through no hook for
    saved tensors, and an offloaded layer's stay until the graph is let go.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: GroupQuantLinear) -> Tensor:
        ctx.layer = layer
        ctx.stored = None if torch.compiler.is_compiling() else layer.stored  # a compiler keeps a layer's own
        flat = x.reshape(-1, layer.in_features)
        y = x.new_empty(*x.shape[:-1], layer.out_features)  # returned as it is: a view could not be added to in place
        rows = y.view(-1, layer.out_features)
        if layer.multiply(flat, rows):
            return y
        for start, stop in layer.row_blocks(x.device):
            torch.mm(flat, layer.dequantize_rows(slice(start, stop), x.dtype).T, out=rows[:, start:stop])
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None]:  # type: ignore[override]
        if not ctx.needs_input_grad[0]:
            return None, None
        layer, flat = ctx.layer, grad.reshape(-1, grad.shape[-1])
        dx = flat.new_empty(flat.shape[0], layer.in_features)
        for start, stop in layer.row_blocks(grad.device):
            weight = layer.dequantize_rows(slice(start, stop), grad.dtype, ctx.stored)
            dx.addmm_(flat[:, start:stop], weight, beta=0 if start == 0 else 1)
        return dx.view(*grad.shape[:-1], layer.in_features), None
