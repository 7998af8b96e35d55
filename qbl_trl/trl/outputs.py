"""What a run leaves behind, and the end of a run: merge, verify, write, export, report."""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers import TrainerState, TrainingArguments

from qbl_trl.errors import ConfigError
from qbl_trl.folders import check_apart, check_free, folder_bytes
from qbl_trl.progress import say
from qbl_trl.trl import finish, refusals
from qbl_trl.trl.layers import active_layers
from qbl_trl.trl.page import size
from qbl_trl.trl.run_record import RunRecord


@dataclass
class Outputs:
    """Where a run writes beside the trainer's own files.

    Attributes:
        merged: folder of the merged 4-bit model, or None.
        onnx: folder of the exported graph, or None; needs `merged`.
        onnx_options: keyword arguments of `export_onnx`.
        overwrite: replace these folders if they hold files.
        stored_delta: type the merged block delta is rounded to, or None for float32.
    """

    merged: Path | None = None
    onnx: Path | None = None
    onnx_options: Mapping[str, Any] = field(default_factory=dict)
    overwrite: bool = False
    stored_delta: str | None = None

    def __post_init__(self) -> None:
        if self.onnx is not None and self.merged is None:
            raise ConfigError("QBLoRACallback: onnx_output_dir exports the merged model; set merged_output_dir as well")
        if self.onnx_options and self.onnx is None:
            raise ConfigError("QBLoRACallback: onnx_options says how to export to onnx_output_dir; set it as well")

    def check(self, run: str | os.PathLike[str]) -> None:
        """Refuse what could not be written when training is over, before it begins.

        Args:
            run: the trainer's output_dir.

        Raises:
            ConfigError: if a folder is a file, holds files and may not be overwritten, would take the place of the
                run's own files or of another output, or cannot be made; if `export_onnx` would refuse its options.
        """
        folders = {
            name: folder.resolve()
            for name, folder in (("merged_output_dir", self.merged), ("onnx_output_dir", self.onnx))
            if folder is not None
        }
        taken = {"output_dir": Path(run).resolve()}
        for name, folder in folders.items():
            for other, path in taken.items():
                if path.is_relative_to(folder):
                    raise ConfigError(
                        f"QBLoRACallback: {name}={folder} would replace what {other}={path} holds; give it a folder of "
                        "its own, such as output_dir/merged"
                    )
            inside = folder.relative_to(taken["output_dir"]).parts if folder.is_relative_to(taken["output_dir"]) else ()
            if any(re.fullmatch(r"checkpoint-\d+", part) for part in inside):
                raise ConfigError(f"QBLoRACallback: {name}={folder} lies in one of the trainer's checkpoints")
            check_free(folder, self.overwrite)
            taken[name] = folder
        if self.onnx is not None:
            refusals.check_export(self.onnx_options)

    def check_apart(self, base: Path | None) -> None:
        """Refuse to put a folder in the place of the base, which every checkpoint of the run needs.

        Raises:
            ConfigError: naming both.
        """
        for folder in (self.merged, self.onnx):
            if folder is not None:
                check_apart(folder, base)

    def finish(
        self,
        record: RunRecord,
        args: TrainingArguments,
        state: TrainerState,
        model: nn.Module,
        input_ids: Tensor | None,
        tokenizer: Any,
    ) -> None:
        """Merge, verify and write; what happened goes into `record`, and is said as it happens.

        Raises:
            MergeError: if the merged model disagrees with the trained one.
            Exception: whatever else fails, a full disk, a model that cannot be exported. Training is not lost with it:
                the adapter is saved and the report written first.
        """
        try:
            layers = active_layers(model).values()
            if all(layer.merges_exactly() for layer in layers) and refusals.why_not_merged(model) is None:
                say(f"Merging {record.adapter['layers']} layers, and comparing the model with the trained one")
            merged, record.merge = finish.merge_and_verify(model, input_ids, self.stored_delta)
            record.sizes = finish.sizes(model, merged)
            say(_merged(record))
            if merged is not None and self.merged is not None:
                self._write(record, merged, self.merged, tokenizer)
        except BaseException as error:  # Ctrl-C too: an export may take minutes
            model.save_pretrained(args.output_dir)  # type: ignore[operator]
            if not record.merge:
                record.merge = {"exact": False, "reason": str(error) or type(error).__name__}
            record.write(args, state, finished=True)
            error.add_note(f"(adapter saved in {args.output_dir})")
            raise

    def _write(self, record: RunRecord, merged: nn.Module, folder: Path, tokenizer: Any) -> None:
        finish.write_merged(merged, tokenizer, folder, self.overwrite)
        record.merge["output"] = str(folder)
        record.sizes["merged_folder"] = folder_bytes(folder)
        say(f"Merged model written to {folder} ({size(record.sizes['merged_folder'])})")
        if self.onnx is not None:
            say(f"Exporting it to {self.onnx}, which may take minutes")
            record.export = finish.export(folder, self.onnx, {"overwrite": self.overwrite, **self.onnx_options})
            say(_exported(record.export))


def _merged(record: RunRecord) -> str:
    """What became of the merge, in one line."""
    merge = record.merge
    if not merge["exact"]:
        return f"Not merged: {merge['reason']}"
    if "parity" not in merge:
        return f"Merged layer by layer in {merge['seconds']:.1f} s; not compared on logits: {merge['not_compared']}"
    found = merge["parity"]
    return (
        f"Merged in {merge['seconds']:.1f} s: largest logit difference {found['max_abs_difference']:.1e} (allowed "
        f"{found['tolerance']:.1e}), on {found['tokens']} tokens"
    )


def _exported(export: Mapping[str, Any]) -> str:
    """What the export wrote, in one line; the run's report has the rest."""
    figures = {
        "": "parity",
        " with embedding and head packed": "parity_embeddings",
        " as written": "parity_as_written",
    }
    found = [(name, export.get(key)) for name, key in figures.items()]
    parity = [f"largest logit difference{name} {one['max_abs_difference']:.1e}" for name, one in found if one]
    return "; ".join([f"Exported in {export['seconds']:.0f} s ({size(export['bytes'])})", *parity])
