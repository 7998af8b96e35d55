"""Saved models in their own class, and a saved adapter on the base it was trained over.

A float base is quantized again, the way it was for training.
"""

import importlib
import inspect
import logging
import os
import pickle
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any

from qbl_trl.config import QUANT_METHOD, GroupQuantConfig, QBLoRAConfig, holds_merged
from qbl_trl.errors import CheckpointError, ConfigError, QblError, first_line
from qbl_trl.folders import is_adapter, refuse_graph
from qbl_trl.module_names import name_here
from qbl_trl.older_names import restore_settings_
from qbl_trl.random_state import same_random_state

logger = logging.getLogger(__name__)

_LABELS = (".score.weight", ".classifier.weight", ".classifier.out_proj.weight", ".qa_outputs.weight")
_TASKS = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "FEATURE_EXTRACTION": "AutoModel",
}


def open_model(
    source: str | os.PathLike[str],
    made_for: Any = None,
    *,
    revision: str | None = None,
    num_labels: int | None = None,
    **options: Any,
) -> Any:
    """A checkpoint, in the class it was saved from, whichever generation of transformers wrote it.

    Args:
        made_for: the class to open it in, if it is another.
        num_labels: of a classifier whose configuration does not say.
        options: of `from_pretrained`.

    Raises:
        CheckpointError: if packed files are damaged, or not those that the configuration describes.
        OSError, ValueError: as `from_pretrained`.
    """
    import transformers

    config = transformers.AutoConfig.from_pretrained(source, revision=revision)
    if restore_settings_(config):
        options["config"] = config
        if num_labels is not None:
            config.num_labels = num_labels
    elif num_labels is not None:
        options["num_labels"] = num_labels
    if made_for is transformers.AutoModelForCausalLM and type(config) not in made_for._model_mapping:
        made_for = None  # models of images or sound write text too, and are of no such class
    try:
        return (made_for or _class_saved(config)).from_pretrained(source, revision=revision, **options)
    except (ImportError, NameError) as error:  # a name that an import would have brought
        _explain_unreadable(source, getattr(config, "quantization_config", None), error)
        raise


def _explain_unreadable(source: str | os.PathLike[str], stored: Any, error: Exception) -> None:
    """Raise what can be done with a checkpoint of another library's layers, which is not installed."""
    method = stored.get("quant_method", QUANT_METHOD) if isinstance(stored, dict) else QUANT_METHOD
    if method != QUANT_METHOD and Path(source).is_dir():
        raise CheckpointError(
            f"{source} is quantized ({method}), and transformers cannot open it here ({error}); `qbl-trl quantize "
            f"--from {source} OUTPUT` takes its codes over as they are, if it knows the format"
        ) from error


def open_whole(source: str | os.PathLike[str], **options: Any) -> Any:
    """A checkpoint, as `open_model` does it, whose files hold every tensor of the model.

    Of an encoder that was saved without the head or the pooler of its class, as those of sentences are, the model that
    is there.

    Raises:
        CheckpointError: naming one that they lack, which transformers draws at random with a warning.
    """
    import transformers

    model, found = open_model(source, output_loading_info=True, **options)
    missing = sorted(found["missing_keys"])
    if missing and not model.can_generate():
        inner = f"{model.base_model_prefix}."
        pooler = "add_pooling_layer" in inspect.signature(type(model).__init__).parameters
        if pooler and "add_pooling_layer" not in options and all("pooler." in name for name in missing):
            return open_whole(source, **options, add_pooling_layer=False)
        if "made_for" not in options and not any(name.startswith(inner) for name in missing):
            logger.warning(
                "%s holds no head of a %s (%s, ...): opened as the model inside",
                source,
                type(model).__name__,
                missing[0],
            )
            return open_whole(source, **options, made_for=transformers.AutoModel)
    if missing:
        raise CheckpointError(
            f"{source}: the files lack {len(missing)} of the model's tensors ({missing[0]}, ...); the folder is "
            "damaged, or of another model than its config.json says"
        )
    return model


def adapter_weights(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """The tensors of an adapter folder, on the CPU.

    Raises:
        CheckpointError: if it has none (PEFT would ask the hub for them), or their file is damaged.
    """
    from peft.utils import load_peft_weights
    from safetensors import SafetensorError

    names = ("adapter_model.safetensors", "adapter_model.bin")
    file = next((Path(folder, name) for name in names if Path(folder, name).is_file()), None)
    if file is None:
        raise CheckpointError(f"{folder} holds no weights of its adapter ({names[0]})")
    try:
        return dict(load_peft_weights(str(folder), device="cpu"))
    except (SafetensorError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise CheckpointError(f"{file}: cut short or damaged ({error})") from error


def _class_saved(config: Any) -> Any:
    """The class a checkpoint was saved from, as its configuration says; else the one that writes text, if there is one.

    Qwen2-VL's configuration passes what it is asked on to that of its text, in transformers 4.57: there the name is
    saved with the text's settings, where transformers 5 has it beside them.
    """
    import transformers

    parts = [config, *(part for part in vars(config).values() if isinstance(part, transformers.PretrainedConfig))]
    names = [name for part in parts for name in vars(part).get("architectures") or ()]
    classes = [found for name in names if (found := getattr(transformers, name, None)) is not None]
    own = [found for found in classes if type(config) is getattr(found, "config_class", None)]
    if own or (classes and vars(config).get("architectures")):
        return (own or classes)[0]
    kinds = ("AutoModelForCausalLM", "AutoModelForImageTextToText", "AutoModelForSeq2SeqLM")
    known = (kind for kind in (getattr(transformers, name) for name in kinds) if type(config) in kind._model_mapping)
    return next(known, transformers.AutoModelForCausalLM)


def load_adapter(folder: str | os.PathLike[str], base: str | None = None) -> Any:
    """The PeftModel of an adapter folder, in eval mode; what stays in float is float32.

    Args:
        folder: what `save_pretrained` of a PeftModel, or a trainer's `save_model`, wrote.
        base: model id or folder of the base, if not the one the adapter names. If it holds no quantization and the
            adapter was trained over groups, bitsandbytes or HQQ codes, it is quantized as the adapter's
            `base_quantization` says.

    Raises:
        ConfigError: if the folder holds no adapter, names no base, or needs a calibrated base that is not there.
        CheckpointError: if the file does not hold exactly the tensors that the adapter has.
    """
    import torch
    from peft import PeftModel

    from qbl_trl.tokenizers import open_tokenizer

    path, saved = Path(folder), saved_adapter(folder)
    named = base or saved.base_model_name_or_path
    if not named:
        raise ConfigError(
            f"{path} does not name its base model: `qbl-trl merge {path} OUTPUT --base MODEL` makes a model of the two"
        )
    where = {"revision": saved.revision} if base is None and saved.revision else {}
    stored = getattr(_config_of_base(named, path, where), "quantization_config", None)
    settings = _base_settings(saved, path, named, stored)
    held = {name: tuple(tensor.shape) for name, tensor in adapter_weights(path).items()}
    dtype = torch.float32
    if settings is not None and not isinstance(settings, GroupQuantConfig):  # its codes hang on what it was loaded in
        dtype = getattr(torch, saved.base_quantization.get("weights_dtype", "float32"))
    quantize = {} if settings is None else {"quantization_config": settings}  # an explicit None hides a stored one
    model = open_model(named, _class_trained(saved), dtype=dtype, **quantize, num_labels=_labels(held), **where)
    if dtype != torch.float32:
        _widen_(model)
    if (path / "tokenizer_config.json").is_file():  # trained with tokens that the base does not have
        tokens = len(open_tokenizer(path))
        if tokens > model.get_input_embeddings().weight.shape[0]:
            model.resize_token_embeddings(tokens)
    try:
        with same_random_state():  # PEFT draws the factors that it then reads
            model = PeftModel.from_pretrained(model, str(path))
    except RuntimeError as error:  # torch's list of tensors that do not fit
        listed = [line.strip() for line in str(error).splitlines() if "size mismatch" in line]
        if not listed:
            raise
        raise CheckpointError(f"{path} does not fit {named}: {listed[0]}") from error
    _check_whole(model, path, held)
    return model.eval()


def _base_settings(saved: Any, path: Path, named: str, stored: Any) -> Any:
    """How to quantize the base of an adapter while it is read; None where it is as the adapter was trained over it.

    Args:
        path: folder of the adapter.
        named: its base, whose quantization is `stored`.
    """
    if not isinstance(saved, QBLoRAConfig) or not saved.base_quantization:
        return None
    merged = holds_merged(saved.base_quantization)
    if stored is not None:
        if isinstance(stored, dict) and holds_merged(stored) and not merged:
            raise ConfigError(
                f"{named} holds a merged adapter, and {path} was trained over a base without one: it would be added "
                "beside it. Name the base that it was trained over with --base"
            )
        return None
    settings = _settings(saved.base_quantization)
    if isinstance(settings, GroupQuantConfig):
        calibrated = settings.algorithm == "gptq"
        if calibrated or merged:
            raise ConfigError(
                f"{path} was trained over a {'calibrated' if calibrated else 'merged'} base, which {named} is not; "
                "save that base with save_pretrained and name its folder with --base"
            )
        logger.warning(
            "quantizing %s as %s was trained (%s); to do it once, save the base with `qbl-trl quantize` and train over "
            "that",
            *(named, path, settings.algorithm),
        )
    return settings


def _config_of_base(named: str, folder: Path, where: dict[str, str]) -> Any:
    """The configuration of an adapter's base.

    Raises:
        ConfigError: if there is none.
    """
    from huggingface_hub.errors import HFValidationError
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(named, **where)
    except (OSError, ValueError) as error:
        reached = isinstance(error, ValueError) and not isinstance(error, HFValidationError)
        if Path(named, "config.json").is_file() or (reached and not Path(named).exists()):
            raise  # of a model that this transformers does not know
        what = f"is no folder of a model ({first_line(error)})"
        if not Path(named).exists():
            at_the_hub = f", nor could it be fetched from the hub ({first_line(error)})"
            what = "is no folder here" + at_the_hub * (not named.startswith(("/", ".", "~")))
        raise ConfigError(
            f"{folder} needs its base, and {named} {what}. Name another: `qbl-trl merge {folder} OUTPUT --base MODEL`"
        ) from error


def open_folder(folder: str | os.PathLike[str], dtype: Any, error: type[QblError] = ConfigError) -> Any:
    """What a folder holds: a model, whole, or an adapter over its base (in float32).

    Raises:
        ConfigError (or the `error` given): if it holds neither.
        CheckpointError: as `open_whole` and `load_adapter`.
    """
    path = Path(folder)
    if not path.is_dir():
        raise error(f"{folder}: no such folder")
    if is_adapter(path):
        return load_adapter(path)
    refuse_graph(path, error)
    if not (path / "config.json").is_file():
        raise error(f"{folder} holds neither a model (config.json) nor an adapter (adapter_config.json)")
    return open_whole(path, dtype=dtype)


def saved_adapter(folder: str | os.PathLike[str]) -> Any:
    """The PeftConfig of an adapter folder.

    Raises:
        ConfigError: if the folder holds no adapter.
        CheckpointError: if its configuration cannot be read.
    """
    from peft import PeftConfig

    if not is_adapter(folder):
        saved = sorted(Path(folder).glob("*/adapter_config.json"), key=lambda file: file.stat().st_mtime)
        instead = f"a folder in it does: {saved[-1].parent}" if saved else "name a folder that save_model wrote"
        raise ConfigError(f"{folder} holds no adapter (no adapter_config.json); {instead}")
    try:
        return PeftConfig.from_pretrained(str(folder))
    except QblError:
        raise
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise CheckpointError(f"{Path(folder, 'adapter_config.json')} cannot be read ({error})") from error


def _class_trained(saved: Any) -> Any:
    """The class of the model that an adapter was trained on: by its task, or by what PEFT noted."""
    task = getattr(saved.task_type, "value", saved.task_type)
    if task in _TASKS:
        return getattr(importlib.import_module("transformers"), _TASKS[task])
    noted = saved.auto_mapping or {}
    if str(noted.get("parent_library", "")).startswith("transformers."):
        return getattr(importlib.import_module(noted["parent_library"]), noted["base_model_class"])
    return None


def _labels(held: dict[str, tuple[int, ...]]) -> int | None:
    """How many labels a classifier has: its base need not say, the head beside the adapter does."""
    return next((shape[0] for name, shape in held.items() if name.endswith(_LABELS)), None)


def _settings(recorded: dict[str, Any]) -> Any:
    """The quantization configuration that an adapter recorded."""
    if recorded.get("quant_method", QUANT_METHOD) == QUANT_METHOD:
        return GroupQuantConfig(**recorded)
    from transformers.quantizers import AutoQuantizationConfig

    try:
        return AutoQuantizationConfig.from_dict({key: recorded[key] for key in recorded if key != "weights_dtype"})
    except PackageNotFoundError as error:
        raise ConfigError(
            f"the adapter was trained over a base of {recorded['quant_method']}, which is not installed here: pip "
            f"install {error.name}"
        ) from error


def _widen_(model: Any) -> None:
    """Compute in float32 from here on, with the values that were loaded; bitsandbytes' codes are not touched."""
    import torch

    loaded = model.dtype
    for tensor in [*model.parameters(), *model.buffers()]:
        state = getattr(tensor, "quant_state", None)
        if state is not None:
            state.made_from = state.dtype
            state.dtype = torch.float32  # of what its codes become
        elif hasattr(tensor, "SCB"):
            tensor.made_from = loaded
        elif tensor.is_floating_point():
            tensor.data = tensor.data.float()
    model.config.dtype = torch.float32


def _check_whole(model: Any, folder: Path, held: dict[str, tuple[int, ...]]) -> None:
    """PEFT only warns of tensors that the file lacks, and leaves them as they were drawn."""
    from peft.utils import get_peft_model_state_dict

    wanted = set(get_peft_model_state_dict(model, save_embedding_layers=False))
    here = {name_here(name, wanted) for name in held}
    missing = sorted(wanted - here)
    if missing:
        raise CheckpointError(
            f"{folder}: the file holds {len(wanted) - len(missing)} of the adapter's {len(wanted)} tensors "
            f"({missing[0]}, ... are missing). It is damaged, or was saved by a process that did not hold them "
            "(DeepSpeed ZeRO-3 needs zero3_save_16bit_model: true); train and save again"
        )
    surplus = sorted(name for name in here - wanted if ".lora_" in name or name.endswith(_LABELS))
    if surplus:
        raise CheckpointError(
            f"{folder}: the file holds {len(surplus)} tensors for layers that have no adapter ({surplus[0]}, ...): "
            "adapter_config.json and the file, or the adapter and this base, do not belong together"
        )
