"""Running calibration batches through a model piece by piece, in the order in which it computes.

A decoder is a chain: block i + 1 reads exactly what block i returned. The hidden states between two blocks are kept,
so that a block can be replayed on its own; a model without such a chain is replayed as a whole, which costs more and
gives the same numbers. Layers outside the chain (an output head, projections before it) come before or after it.
"""

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PretrainedConfig

from qbl_trl.errors import ConfigError
from qbl_trl.quant.head import input_table

Batch = Tensor | Mapping[str, Any]
Call = Callable[[], Any]  # runs one calibration batch


class Stop(Exception):
    """Raised by a hook to end a forward pass early: what was wanted has been seen."""


@dataclass(frozen=True)
class Piece:
    """A part of the model and how to run the calibration batches through it.

    Attributes:
        scope: the model or one block.
        prefix: full name of the scope with a dot, or "".
        names: layers of interest, relative to the scope.
        calls: one per batch; valid while the piece is the current one.
    """

    scope: nn.Module
    prefix: str
    names: list[str]
    calls: Sequence[Call]


def walk(model: nn.Module, names: Sequence[str], calibration: Iterable[Batch]) -> Iterator[Piece]:
    """Yield the pieces that hold the named layers; layers changed in one piece are seen by those that follow.

    Args:
        calibration: see `calibration_batches`.

    Raises:
        ConfigError: as `calibration_batches`.
    """
    calls = calibration_calls(model, calibration)
    blocks = find_chain(model, names, calls[0])
    inside = {name for name in names if any(name.startswith(f"{block}.") for block in blocks)}
    outside = [name for name in names if name not in inside]
    ahead = _called_before(model, outside, blocks[0], calls[0]) if blocks else outside
    yield Piece(model, "", ahead, calls)
    if blocks:
        hidden, rest = _block_inputs(model, blocks, calls)
        for block in blocks:
            scope, prefix = model.get_submodule(block), f"{block}."
            mine = [name.removeprefix(prefix) for name in names if name.startswith(prefix)]
            replay = [_bound(scope, (x, *args), kwargs) for x, (args, kwargs) in zip(hidden, rest[block], strict=True)]
            yield Piece(scope, prefix, mine, replay)
            hidden = [_hidden(call()) for call in replay]
    yield Piece(model, "", [name for name in outside if name not in ahead], calls)


def calibration_calls(model: nn.Module, calibration: Iterable[Batch]) -> list[Call]:
    """The whole model on each batch.

    Raises:
        ConfigError: as `calibration_batches`.
    """
    device = next(model.parameters()).device
    batches = [_arguments(batch, device) for batch in calibration_batches(model, calibration)]
    return [_bound(model, (), batch) for batch in batches]


def run(calls: Sequence[Call], hooks: Iterable[RemovableHandle], enough: Callable[[], bool] = lambda: False) -> None:
    """Run the calls with hooks in place, until `enough`; the hooks are gone afterwards."""
    handles = list(hooks)
    try:
        for call in calls:
            if enough():
                break
            try:
                call()
            except Stop:
                continue
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def calibrating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients and without a key-value cache; everything is put back afterwards.

    A cache would keep what a block was given, and grow each time that the block is replayed.
    """
    held = (part for module in model.modules() for part in _configs(getattr(module, "config", None)))
    configs = list({id(part): part for part in held if hasattr(part, "use_cache")}.values())
    kept = [part.use_cache for part in configs]
    training = {name for name, module in model.named_modules() if module.training}  # by name: layers are replaced
    model.eval()
    for part in configs:
        part.use_cache = False
    try:
        with torch.no_grad():
            yield
    finally:
        for name, module in model.named_modules():
            module.training = name in training
        for part, use_cache in zip(configs, kept, strict=True):
            part.use_cache = use_cache


def _configs(config: Any) -> Iterator[Any]:
    """A configuration and those in it: of towers, and of the text that a model of images writes.

    Parts of a model may hold copies of their own (the decoder of T5).
    """
    if isinstance(config, PretrainedConfig):
        yield config
        for part in vars(config).values():
            yield from _configs(part)


def find_chain(model: nn.Module, names: Sequence[str], call: Call) -> list[str]:
    """Names of the blocks of the model's main chain, in order; empty where there is none.

    The candidate is the ModuleList that holds most of the named layers. It is a chain if in one real forward pass
    each block is called once, in order, on the very tensor that the block before it returned.
    """
    lists = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    held = {name: sum(target.startswith(f"{name}.") for target in names) for name, _ in lists}
    if not any(held.values()):
        return []
    name, found = max(lists, key=lambda item: held[item[0]])
    blocks = [f"{name}.{i}" for i in range(len(found))]
    if set(names) & set(blocks):
        return []  # a list of plain layers
    order: list[str] = []
    links: list[bool] = []
    last: Tensor | None = None

    def enter(block: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            order.append(block)
            links.append(bool(args) and (last is None or args[0] is last))

        return hook

    def leave(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        nonlocal last
        last = _hidden(output)

    hooks = [m.register_forward_pre_hook(enter(b), with_kwargs=True) for b, m in zip(blocks, found, strict=True)]
    run([call], [*hooks, *(module.register_forward_hook(leave) for module in found)])
    return blocks if order == blocks and all(links) else []


def _block_inputs(
    model: nn.Module, blocks: Sequence[str], calls: Sequence[Call]
) -> tuple[list[Tensor], dict[str, list[tuple[tuple[Any, ...], dict[str, Any]]]]]:
    """The first block's hidden states, one per batch, and each block's other arguments per batch (masks, rotary)."""
    hidden: list[Tensor] = []
    rest: dict[str, list[tuple[tuple[Any, ...], dict[str, Any]]]] = {block: [] for block in blocks}

    def keep(block: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if block == blocks[0]:
                hidden.append(args[0])
            rest[block].append((args[1:], kwargs))
            if block == blocks[-1]:
                raise Stop

        return hook

    run(calls, [model.get_submodule(b).register_forward_pre_hook(keep(b), with_kwargs=True) for b in blocks])
    return hidden, rest


def _called_before(model: nn.Module, names: Sequence[str], block: str, call: Call) -> list[str]:
    """Those of the named layers that run before the given block does."""
    seen: list[str] = []

    def note(name: str) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            if name == block:
                raise Stop
            seen.append(name)

        return hook

    run([call], [model.get_submodule(name).register_forward_pre_hook(note(name)) for name in (*names, block)])
    return [name for name in names if name in seen]


def _arguments(batch: Batch, device: torch.device) -> dict[str, Any]:
    arguments = {"input_ids": batch} if isinstance(batch, Tensor) else dict(batch)
    mask = arguments.pop("attention_mask", None)
    if mask is not None and not bool(torch.as_tensor(mask, device="cpu").all()):
        raise ConfigError(
            "calibration: a batch is padded (zeros in attention_mask), and padding would count as data; "
            "cut or pack the texts to full rows"
        )
    return {name: value.to(device) if isinstance(value, Tensor) else value for name, value in arguments.items()}


def calibration_batches(model: nn.Module, calibration: Any) -> list[dict[str, Any]]:
    """Calibration data as the model's arguments, a list of batches: checked, before anything is computed.

    Args:
        calibration: batches, each token ids of (batch, tokens) or (tokens,), a tensor, an array or lists, or a mapping
            of the model's arguments; or a single tensor or mapping.

    Raises:
        ConfigError: if there is no batch, or one holds no ids of this model's vocabulary, padding, or what the model
            does not take.
    """
    calibration = batches_of(calibration)
    alone = isinstance(calibration, str) or (isinstance(calibration, Tensor) and calibration.dim() == 0)
    if calibration is not None and (alone or not isinstance(calibration, Iterable)):
        raise ConfigError(
            f"calibration={calibration!r} is no list of batches; give a few (batch, tokens) integer tensors"
        )
    vocabulary = getattr(input_table(model), "num_embeddings", None)
    batches = [_checked(batch, vocabulary) for batch in (() if calibration is None else calibration)]
    if not batches:
        raise ConfigError("calibration: no batch was given; give a few (batch, tokens) integer tensors")
    parameters = inspect.signature(model.forward).parameters
    unknown = sorted({name for batch in batches for name in batch if name not in parameters})
    if unknown and not any(one.kind is one.VAR_KEYWORD for one in parameters.values()):
        raise ConfigError(
            f"calibration: a batch holds {', '.join(unknown)}, which a {type(model).__name__} does not take; leave "
            "it out"
        )
    return batches


def batches_of(calibration: Any) -> Any:
    """Batches as they are; a mapping, or a tensor or array of one batch, is a list of itself."""
    table = isinstance(calibration, Tensor | np.ndarray) and calibration.ndim in (1, 2) and calibration.dtype != object
    return [calibration] if table or isinstance(calibration, Mapping) else calibration


def _checked(batch: Any, vocabulary: int | None) -> dict[str, Any]:
    """One batch as the model's arguments, its token ids (batch, tokens)."""
    arguments = dict(batch) if isinstance(batch, Mapping) else {"input_ids": batch}
    if "input_ids" not in arguments:  # pixels, sound, embeddings
        return _arguments(arguments, torch.device("cpu"))
    wide = {
        name: _tensor(name, value)
        for name, value in arguments.items()
        if isinstance(value, list | tuple | np.ndarray | Tensor) or name == "input_ids"
    }
    ids = wide.pop("input_ids")
    if ids.dim() == 1:  # one text
        ids, wide = ids[None], {name: value[None] for name, value in wide.items()}
    arguments |= wide
    ids = tokens_of({**arguments, "input_ids": ids})
    if vocabulary is not None and not 0 <= int(ids.min()) <= int(ids.max()) < vocabulary:
        raise ConfigError(
            f"calibration: token ids from {int(ids.min())} to {int(ids.max())}, and the model has {vocabulary} tokens; "
            "tokenize with the model's own tokenizer"
        )
    others = {name: value for name, value in arguments.items() if name not in ("input_ids", "attention_mask")}
    return {"input_ids": ids, **others}


def _tensor(name: str, value: Any) -> Tensor:
    """On the CPU, whatever the default device: a model that is being loaded is on none."""
    try:
        return torch.as_tensor(value, device="cpu")
    except (TypeError, ValueError, RuntimeError):
        if name == "input_ids":
            return torch.empty(())  # what is no token ids is refused in words of its own
        raise ConfigError(
            f"calibration: {name} of a batch is no tensor, and no lists of numbers of one length"
        ) from None


def tokens_of(batch: Any) -> Tensor:
    """The token ids of a batch or of one text, (batch, tokens): a tensor, an array, lists, or a mapping that holds one.

    Raises:
        ConfigError: if there are none, or some are padding.
    """
    try:
        whole = batch if isinstance(batch, Mapping) else torch.as_tensor(batch, device="cpu")
        ids = torch.as_tensor(_arguments(whole, torch.device("cpu")).get("input_ids"), device="cpu")
    except ConfigError:
        raise
    except (TypeError, ValueError, RuntimeError):
        ids = torch.empty(0)
    if ids.dim() == 1:
        ids = ids[None]
    if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool or ids.dim() != 2 or not ids.numel():
        raise ConfigError("calibration: each batch must be integer token ids, (batch, tokens), not texts")
    return ids.long()


def _bound(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Call:
    return lambda: module(*args, **kwargs)


def _hidden(output: Any) -> Any:
    return output[0] if isinstance(output, tuple) else output
