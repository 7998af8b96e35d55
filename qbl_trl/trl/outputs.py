"""What a run leaves behind, and the end of a run: merge, verify, write, export, report."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers import TrainerState, TrainingArguments

from qbl_trl.errors import ConfigError, MergeError
from qbl_trl.folders import check_free
from qbl_trl.trl import finish
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

    def check_free(self) -> None:
        """Refuse folders that may not be written, before anything is trained.

        Raises:
            ConfigError: if one is a file, or holds files and may not be overwritten.
        """
        for folder in (self.merged, self.onnx):
            if folder is not None:
                check_free(folder, self.overwrite)

    def finish(
        self,
        record: RunRecord,
        args: TrainingArguments,
        state: TrainerState,
        model: nn.Module,
        input_ids: Tensor,
        tokenizer: Any,
    ) -> None:
        """Merge, verify and write; what happened goes into `record`.

        Raises:
            MergeError: if the merged model disagrees with the trained one. The adapter is saved and the report written.
        """
        try:
            merged, record.merge = finish.merge_and_verify(model, input_ids, self.stored_delta)
        except MergeError as error:
            model.save_pretrained(args.output_dir)  # type: ignore[operator]
            record.merge = {"exact": False, "reason": str(error)}
            record.write(args, state, finished=True)
            raise MergeError(f"{error} (adapter saved in {args.output_dir})") from error
        record.sizes = finish.sizes(model, merged)
        if merged is None or self.merged is None:
            return
        finish.write_merged(merged, tokenizer, self.merged, self.overwrite)
        record.merge["output"] = str(self.merged)
        record.sizes["merged_folder"] = finish.folder_bytes(self.merged)
        if self.onnx is not None:
            record.export = finish.export(self.merged, self.onnx, {"overwrite": self.overwrite, **self.onnx_options})


__all__ = ["Outputs"]
