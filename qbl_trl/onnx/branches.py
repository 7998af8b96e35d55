"""Which form an adapter branch takes in the graph: its two factors, or their product.

Per token the factors cost R (K / p + N / e) multiplications and the product K N / (p e): small pooling factors are
cheaper in two steps, large ones in one. Both are exact.
"""

from dataclasses import replace

from qbl_trl.errors import ExportError
from qbl_trl.onnx.layers import BlockDelta, Branch, LinearSource, LowRank, Product


def choose_branches(sources: dict[str, LinearSource], lowering: str) -> dict[str, LinearSource]:
    """The same layers with each branch in the form that `lowering` asks for.

    Raises:
        ExportError: for lowering="low_rank" over an adapter that has no factors (any more).
    """
    return {
        name: replace(source, branches=tuple(_choose(name, branch, lowering) for branch in source.branches))
        for name, source in sources.items()
    }


def _choose(name: str, branch: Branch, lowering: str) -> Branch:
    if isinstance(branch, BlockDelta):
        if lowering == "low_rank":
            raise ExportError(
                f'{name}: lowering="low_rank" keeps the two factors of an adapter, this layer holds their product '
                '(it was merged, or trained as a block). Export the model before merging it, or use lowering="auto"'
            )
        return branch
    keep = lowering == "low_rank" or (lowering == "auto" and _factor_cost(branch) <= _product_cost(branch))
    return branch if keep else _product(branch)


def _factor_cost(branch: LowRank) -> int:
    return branch.down.numel() + branch.up.numel()


def _product_cost(branch: LowRank) -> int:
    return branch.up.shape[0] * branch.down.shape[1]


def _product(branch: LowRank) -> BlockDelta:
    product = Product((branch.up,), branch.down, branch.gain)
    return BlockDelta(product, branch.in_factor, branch.out_factor)
