"""Which checkpoint folders are whole. A trainer writes checkpoint-N file by file: killed in between, it leaves a part.

A folder is whole if the note `qblora_complete.json` in it names files that are all there with the sizes it states, as
far as a resumed run reads them (a README may be edited, a merged model moved away). The callback writes that note last,
in one rename. Without a note (a folder written before the callback was used, or a kill just after the last file), the
folder is whole if `trainer_state.json`, which the trainer writes last, is there. In both, that file can be read, and
safetensors and torch files of a trainer have their end: sizes alone, which are all that is known of FSDP's shards, say
nothing after a power failure.
"""

import json
import logging
import os
import re
import zipfile
from pathlib import Path
from typing import Any

from transformers import TrainerState, TrainingArguments

from qbl_trl.errors import CheckpointError
from qbl_trl.folders import new_file
from qbl_trl.leftovers import remove_leftovers
from qbl_trl.quant.checkpoint import read_files, read_headers

logger = logging.getLogger(__name__)

NOTE = "qblora_complete.json"
_STATE = "trainer_state.json"
MERGED = "merged"  # a folder in a checkpoint, which no trainer reads
_WEIGHTS = {".safetensors", ".bin", ".distcp"}
_READ = _WEIGHTS | {".pt", ".pth"}  # by a trainer that resumes
# Beginnings of the names of files that trainers write by torch.save; a callback may add others, of any form.
_TORCH = (
    "optimizer",
    "scheduler",
    "scaler",
    "rng_state",
    "random_states",
    "training_args",
    "pytorch_model",
    "adapter_model",
)
_NAME = re.compile(r"checkpoint-(\d+)$")
_ASIDE = "incomplete-"


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a file that is whole or absent at every moment."""
    with new_file(path) as draft:
        draft.write_text(json.dumps(content, indent=1, default=_plain) + "\n", encoding="utf-8")


def _plain(value: Any) -> Any:
    """A number of NumPy or torch that a callback left in a log; anything else as text."""
    try:
        return value.item()
    except (AttributeError, TypeError, ValueError, RuntimeError):
        return str(value)


def is_due(args: TrainingArguments, state: TrainerState) -> bool:
    """Whether a trainer that counts steps will save or evaluate after this one."""
    step, due = state.global_step, False
    for strategy, every in ((args.save_strategy, state.save_steps), (args.eval_strategy, state.eval_steps)):
        if strategy == "steps":
            due = due or step >= state.max_steps or bool(every and step % every == 0)
    return due


def mark_whole(folder: Path) -> None:
    """Note down every file of a checkpoint that has just been written."""
    files = {str(f.relative_to(folder)): f.stat().st_size for f in sorted(folder.rglob("*")) if f.is_file()}
    files.pop(NOTE, None)
    write_json(folder / NOTE, {"files": files})


def check_checkpoint(folder: str | os.PathLike[str]) -> None:
    """Read what tells a whole checkpoint from a part of one; no tensor is loaded.

    Raises:
        CheckpointError: naming the file that is missing, cut short or damaged.
    """
    path = Path(folder)
    if (path / NOTE).is_file():
        for name, size in _noted(path / NOTE).items():
            _check_file(path, name, size)
        return
    _check_content(path / _STATE)
    read_headers(path)
    for file in [*path.glob("*.pt"), *path.glob("*.pth"), *path.glob("*.bin")]:
        _check_content(file)


def _check_content(file: Path) -> None:
    """As far as a file says by its form that it is whole."""
    if file.name == _STATE:
        try:
            json.loads(file.read_text())
        except (OSError, ValueError) as error:
            raise CheckpointError(
                f"{file.parent} is no whole checkpoint: {_STATE}, which is written last, is missing or cut ({error}); "
                "resume from an earlier one"
            ) from error
    elif file.suffix == ".safetensors":
        read_files([file])
    elif file.suffix in (".pt", ".pth", ".bin") and file.stem.startswith(_TORCH) and not zipfile.is_zipfile(file):
        raise CheckpointError(f"{file} is cut short; the checkpoint is not whole, resume from an earlier one")


def _check_file(folder: Path, name: str, size: int) -> None:
    """One file of a folder that was whole once."""
    file = folder / name
    if Path(name).parts[0] == MERGED or (file.suffix not in _READ and file.name != _STATE):
        return
    if not file.is_file():
        raise CheckpointError(f"{file} is missing although the checkpoint was complete once")
    if file.stat().st_size != size:
        raise CheckpointError(f"{file}: {file.stat().st_size} bytes, {size} were written; it was cut or replaced")
    _check_content(file)


def last_whole_checkpoint(output_dir: str | os.PathLike[str]) -> str | None:
    """The newest checkpoint-N of a run that is whole: what to pass as resume_from_checkpoint. None if there is none."""
    return next((str(folder) for folder in reversed(_checkpoints(Path(output_dir))) if _problem(folder) is None), None)


def set_aside_parts(output_dir: str | os.PathLike[str], base: str | os.PathLike[str] | None = None) -> list[Path]:
    """Rename every checkpoint-N that cannot be resumed from, so that `resume_from_checkpoint=True` finds one that can.

    One that was whole and lacks an optimizer since, deleted to save space, stays where it is. Nothing is deleted here,
    but for what a killed process left of a merged model.

    Args:
        base: folder of the model that is trained, which is no checkpoint of this run whatever it is called.

    Returns:
        The new names.
    """
    moved = []
    for folder in _checkpoints(Path(output_dir)):
        if base is not None and Path(base).resolve() == folder.resolve():
            continue
        remove_leftovers(folder / MERGED, folder)
        problem = _problem(folder)
        if problem is None:
            continue
        if _can_be_resumed_from(folder):
            logger.warning("%s: a run resumed from here starts without it", problem)
            continue
        aside = folder.with_name(_ASIDE + folder.name)
        while aside.exists():
            aside = aside.with_name(aside.name + "-")
        try:
            folder.rename(aside)
        except OSError as error:
            logger.warning("%s, and it cannot be moved aside (%s)", problem, error.strerror or error)
            continue
        logger.warning("half-written checkpoint moved to %s: %s", aside, problem)
        moved.append(aside)
    return moved


def _can_be_resumed_from(folder: Path) -> bool:
    """Whether a folder that was whole once has its weights and trainer state, and nothing else that is damaged."""
    try:
        for name, size in _noted(folder / NOTE).items():
            file = folder / name
            weights = file.suffix in _WEIGHTS and not Path(name).parts[0].startswith("optimizer")  # FSDP's are .distcp
            if file.is_file() or weights or file.name == _STATE:
                _check_file(folder, name, size)
    except CheckpointError:
        return False
    return True


def _checkpoints(output_dir: Path) -> list[Path]:
    """Every checkpoint-N, oldest first."""
    if not output_dir.is_dir():
        return []
    found = [(int(m[1]), f) for f in output_dir.iterdir() if f.is_dir() and (m := _NAME.fullmatch(f.name))]
    return [folder for _, folder in sorted(found)]


def _problem(folder: Path) -> str | None:
    try:
        check_checkpoint(folder)
    except CheckpointError as error:
        return str(error)
    return None


def _noted(note: Path) -> dict[str, int]:
    try:
        files = {str(name): int(size) for name, size in json.loads(note.read_text())["files"].items() if name}
    except (OSError, ValueError, KeyError, AttributeError, TypeError, OverflowError) as error:
        raise CheckpointError(f"{note} cannot be read ({error})") from error
    return files
