"""QBLoRACallback: one line in a script that people already have.

    init         adapters placed (config given) or found (peft_config=), factors checked, one layer of each kind probed
    logging      zero-point shift, stable rank, norm: in the logs of every reporter
    evaluation   the merged model's loss beside the adapter's (eval_merged_loss)
    save         the checkpoint marked whole; the merged 4-bit model beside the adapter (save_merged)
    end          merged, verified on real tokens, written (merged_output_dir), exported (onnx_output_dir), reported

Whatever is written appears whole or not at all, from the main process only.
"""

import logging
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from qbl_trl.adapter.layer import BalancedLinear
from qbl_trl.config import QBLoRAConfig
from qbl_trl.errors import ConfigError
from qbl_trl.quant.head import input_table
from qbl_trl.quant.modules import is_sharded
from qbl_trl.trl import checkpoints, finish, gather, refusals, replicas, run_record
from qbl_trl.trl.inject import Unadapted, find_trainer, is_adapted, place_
from qbl_trl.trl.layers import active, active_layers
from qbl_trl.trl.merged_loss import check_merged_loss, merged_loss
from qbl_trl.trl.metrics import check_finite, measure, summarize, warn_of_untrained
from qbl_trl.trl.outputs import Outputs
from qbl_trl.trl.probe import probe
from qbl_trl.trl.resume import check_before_loading_, check_resumed
from qbl_trl.trl.rounding import DeltaRounding, check_rounding, forget_rounding
from qbl_trl.trl.tokens import FirstTokens, random_tokens
from qbl_trl.wrapped import base_folder, unwrap

logger = logging.getLogger(__name__)

REPORT = run_record.REPORT


class QBLoRACallback(TrainerCallback):
    """Balanced adapters in any transformers or TRL trainer: placed, checked, watched, merged, verified.

        SFTTrainer(model, args, train_dataset=ds, callbacks=[QBLoRACallback(QBLoRAConfig(quantization_aware=True))])
        SFTTrainer(model, args, train_dataset=ds, peft_config=QBLoRAConfig(...), callbacks=[QBLoRACallback()])

    Both forms train, save, resume and load the best checkpoint alike. Only the second works over a bitsandbytes base,
    and with GRPO and RLOO at beta != 0: those trainers want the adapters before any callback runs.

    Args:
        config: the adapter to place; None to watch the balanced adapters that are there.
        merged_output_dir: where to write the merged 4-bit model when training ends; None to verify only.
        onnx_output_dir: where to export the merged model to when training ends (needs the [onnx] or [onnx5] extra).
        onnx_options: keyword arguments of `export_onnx`.
        save_merged: also write the merged model into every checkpoint, as checkpoint-N/merged.
        eval_merged_loss: at every evaluation, also the loss of the merged model, as `eval_merged_loss`.
        overwrite: replace merged_output_dir and onnx_output_dir if they hold files.
        stored_delta: "float16", "bfloat16" or "int8", where deployment stores the merged change so: the merged model
            holds the rounded values, and training rounds alike, with a straight-through gradient. None: no rounding.
        round_from_step: first optimizer step that sees the rounding.

    Writes `qblora_report.json` into the trainer's output_dir at every save and at the end.

    Raises (from the trainer's constructor, nothing written):
        ConfigError: adapters twice, or none, or of another method; factors that do not fit a layer; an output folder
            that is not empty; a merged output from adapters that have no exact merge.
        MergeError: if a merged layer does not compute what the trained layer computes.
    """

    def __init__(
        self,
        config: QBLoRAConfig | None = None,
        *,
        merged_output_dir: str | os.PathLike[str] | None = None,
        onnx_output_dir: str | os.PathLike[str] | None = None,
        onnx_options: Mapping[str, Any] | None = None,
        save_merged: bool = False,
        eval_merged_loss: bool = False,
        overwrite: bool = False,
        stored_delta: str | None = None,
        round_from_step: int = 0,
    ) -> None:
        if config is not None and not isinstance(config, QBLoRAConfig):
            raise ConfigError(f"QBLoRACallback: config is a {type(config).__name__}, it must be a QBLoRAConfig or None")
        for name, given in (("merged_output_dir", merged_output_dir), ("onnx_output_dir", onnx_output_dir)):
            if not isinstance(given, str | os.PathLike | None):
                raise ConfigError(f"QBLoRACallback: {name}={given!r} must be a path, or None")
        for name, chosen in (
            ("save_merged", save_merged),
            ("eval_merged_loss", eval_merged_loss),
            ("overwrite", overwrite),
        ):
            if not isinstance(chosen, bool):
                raise ConfigError(f"QBLoRACallback: {name}={chosen!r} must be True or False")
        if not isinstance(onnx_options, Mapping | None):
            raise ConfigError(
                f"QBLoRACallback: onnx_options={onnx_options!r} must be arguments of export_onnx, by name"
            )
        self.config = config
        self.outputs = Outputs(
            merged=None if merged_output_dir is None else Path(merged_output_dir).expanduser(),
            onnx=None if onnx_output_dir is None else Path(onnx_output_dir).expanduser(),
            onnx_options=dict(onnx_options or {}),
            overwrite=overwrite,
            stored_delta=stored_delta,
        )
        if not isinstance(round_from_step, int) or round_from_step < 0:
            raise ConfigError(f"QBLoRACallback: round_from_step={round_from_step!r} must be a whole number from 0")
        if round_from_step and stored_delta is None:
            raise ConfigError(
                "QBLoRACallback: round_from_step says when to round as stored_delta does; set stored_delta"
            )
        self.save_merged, self.eval_merged_loss, self.round_from_step = save_merged, eval_merged_loss, round_from_step
        self._trainer: Trainer | None = None
        self._layers: dict[str, BalancedLinear] = {}
        self._adapters = set[str]()
        self._moved = False  # whether any adapter has left zero
        self._gatherer = gather.Gatherer()
        self._tokens: FirstTokens | None = None
        self._rounding: DeltaRounding | None = None
        self.record = run_record.RunRecord()

    # -- before training ------------------------------------------------------------------------------------------

    def check_outputs(self, args: TrainingArguments) -> None:
        """Refuse what could not be written in the end, as the trainer's constructor does: before a model is loaded.

        Raises:
            ConfigError: if an output folder is not empty, or cannot be written.
        """
        if args.should_save:
            self.outputs.check(args.output_dir)

    def on_init_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        trainer = find_trainer(model)
        self.check_outputs(args)
        refusals.check_teacher(args)
        chosen = {f"stored_delta={self.outputs.stored_delta!r}": self.outputs.stored_delta is not None}
        chosen["eval_merged_loss=True"] = self.eval_merged_loss
        replicas.check_one_device(args, [option for option, is_set in chosen.items() if is_set])
        if self.outputs.onnx is not None:
            refusals.check_decoder(model)
        base = base_folder(model)
        self.outputs.check_apart(base)
        before = None if self.config is None or is_adapted(model) else Unadapted(model)
        try:
            if self.config is not None:
                model = place_(trainer, model, self.config)
            self._meet(trainer, model)
            if trainer is not None:
                refusals.check_optimizer(trainer, model)
        except Exception:
            if before is not None:
                before.restore_()
            raise
        if trainer is not None:
            if trainer.is_fsdp_enabled:
                self._gatherer = gather.Gatherer(model)
            if state.is_world_process_zero:
                checkpoints.set_aside_parts(args.output_dir, base)
            trainer.accelerator.wait_for_everyone()
        logger.info("%s", self.record.describe())

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        self.check_outputs(args)  # training again would find the first run's outputs
        refusals.check_search(state, self.outputs.merged)
        self._meet_late(model, anew=getattr(self._trainer, "model_init", None) is not None)
        if state.global_step:
            check_resumed(find_trainer(model) or self._trainer, model)
        replicas.keep_scales_apart_(getattr(self._trainer, "model_wrapped", None))
        self._layers = active_layers(model)  # sharding may have replaced modules
        refusals.check_trains(model)
        self._moved = False
        self._let_go()
        self._tokens = FirstTokens(unwrap(model))
        if self.outputs.stored_delta is not None:
            check_rounding(self._layers, self.outputs.stored_delta)
            self._rounding = DeltaRounding(self._layers, self.outputs.stored_delta, self.round_from_step == 0)
            self._rounding.install()
        self.record.begin(state.global_step)
        if state.is_world_process_zero and (Path(args.output_dir) / REPORT).is_file():  # of an earlier run
            self.record.write(args, state, finished=False)

    # -- during training ------------------------------------------------------------------------------------------

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._rounding is not None and not self._rounding.rounding and state.global_step >= self.round_from_step:
            self._rounding.rounding = True
            self._rounding.refresh()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self._rounding is not None and self._rounding.rounding:
            self._rounding.refresh()
        if checkpoints.is_due(args, state):
            self._check_finite(args, state)

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if "epoch" in (args.save_strategy, args.eval_strategy):
            self._check_finite(args, state)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if logs is None or "loss" not in logs or not self._layers or gather.is_partitioned(self._layers):
            return
        start = time.perf_counter()
        measured = measure(self._layers)
        check_finite(measured, state.global_step, args.output_dir)
        if not self._moved and state.is_world_process_zero:
            self._moved = warn_of_untrained(self._layers, measured, state.global_step)
        line = summarize(measured)
        if self._rounding is not None and self._rounding.rounding:
            line["qbl/rounding_cost"] = self._rounding.cost
        logs.update(line)
        if state.log_history and state.log_history[-1].get("step") == state.global_step:
            state.log_history[-1].update(line)
        self.record.measured(measured, time.perf_counter() - start)

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: Any = None,
        metrics: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        if not self.eval_merged_loss or metrics is None:
            return
        self._meet_late(model)
        if self._trainer is not None:
            data = kwargs.get("eval_dataloader")
            metrics.update(merged_loss(self._trainer, metrics, data, self.outputs.stored_delta))

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        self._wait()  # every process has written its part
        folder = self._run_folder(args) / f"checkpoint-{state.global_step}"
        whole = self._gatherer.whole(model, state.is_world_process_zero) if self.save_merged else None
        if state.is_world_process_zero:
            if whole is not None:
                with self._unrounded():
                    merged, _ = finish.merge_and_verify(whole, self._input_ids(whole), self.outputs.stored_delta)
                if merged is not None:
                    finish.write_merged(merged, self._tokenizer(kwargs), folder / checkpoints.MERGED, overwrite=True)
            if folder.is_dir():
                checkpoints.mark_whole(folder)
            self.record.write(args, state, finished=False)
        self._wait()

    # -- after training -------------------------------------------------------------------------------------------

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        partitioned = gather.is_partitioned(self._layers)
        measured = [] if partitioned else measure(self._layers)
        self.record.end(measured)
        if self._rounding is not None:
            self.record.rounding = {
                "stored": self._rounding.stored,
                "cost": self._rounding.cost,
                "from_step": self.round_from_step,
            }
        self._let_go()
        # Without an exact merge nothing is computed from the weights, and a sharded model stays as it is.
        exact = all(layer.merges_exactly() for layer in self._layers.values())
        if exact:
            check_finite(measured, state.global_step, args.output_dir)
        whole = self._gatherer.whole(model, state.is_world_process_zero) if exact and not partitioned else model
        if whole is not None and state.is_world_process_zero:
            if partitioned:
                self.record.merge = {"exact": False, "reason": gather.PARTITIONED}
            else:
                ids, tokenizer = self._input_ids(whole), self._tokenizer(kwargs)
                self.outputs.finish(self.record, args, state, whole, ids, tokenizer)
            if "parity" in self.record.merge and self._trainer is not None:
                difference = self.record.merge["parity"]["max_abs_difference"]
                Trainer.log(self._trainer, {"qbl/merged_max_logit_difference": difference})
                if any("train_loss" in entry for entry in state.log_history[-2:-1]):
                    line = state.log_history.pop()  # scripts count from the end of the list, where that summary stands
                    state.log_history[-1].update(line)
            self.record.write(args, state, finished=True)
            logger.info("%s", self.record.describe())
        self._wait()

    # -- small parts ----------------------------------------------------------------------------------------------

    def _meet(self, trainer: Trainer | None, model: Any) -> None:
        """Check the adapters of a model, and come first among the trainer's callbacks: what is added to a log reaches
        every reporter."""
        layers = active_layers(model)
        self._check(trainer, model, layers)
        forget_rounding(layers)
        self.record = run_record.RunRecord.start(model, layers, probe(layers))
        self._trainer, self._layers, self._adapters = trainer, layers, _names(layers)
        if trainer is not None:
            check_before_loading_(trainer)
            callbacks = trainer.callback_handler.callbacks
            if sum(isinstance(callback, QBLoRACallback) for callback in callbacks) > 1:
                raise ConfigError("the trainer has two QBLoRACallbacks: both would write its report and its outputs")
            callbacks.insert(0, callbacks.pop(callbacks.index(self)))

    def _meet_late(self, model: Any, anew: bool = False) -> None:
        """Meet a trainer that was built before this callback was added to it, at its first training or evaluation.

        Args:
            anew: the trainer made another model (`model_init`).
        """
        if self.config is not None and not self._layers:
            raise ConfigError(
                "QBLoRACallback(config) was added after the trainer was built; pass it in callbacks=[...] of the "
                "trainer, or give the trainer peft_config=QBLoRAConfig(...) and add QBLoRACallback()"
            )
        if not self.record.layers and is_sharded(model):
            raise ConfigError(
                "QBLoRACallback was added after the trainer was built, and did not see the model before it was "
                "sharded; pass it in callbacks=[...] of the trainer"
            )
        trainer = find_trainer(model)
        if (
            anew
            or not self.record.layers
            or trainer not in (None, self._trainer)
            or self._adapters != _names(active_layers(model))
        ):
            self._meet(trainer, model)

    def _check(self, trainer: Trainer | None, model: nn.Module, layers: dict[str, BalancedLinear]) -> None:
        options = {"merged_output_dir": self.outputs.merged, "save_merged": self.save_merged}
        wanted = [name for name, value in options.items() if value]
        refusals.check_merges(layers, wanted + ["eval_merged_loss"] * self.eval_merged_loss)
        refusals.check_saves(model, wanted)
        check_rounding(layers, self.outputs.stored_delta)
        if trainer is not None:
            refusals.check_launch(trainer, layers, wanted)
            refusals.check_head(trainer, trainer.model)
        check_merged_loss(trainer, self.eval_merged_loss)

    def _check_finite(self, args: TrainingArguments, state: TrainerState) -> None:
        """Before weights that are lost take the place of a checkpoint, or are evaluated."""
        if self._layers and not gather.is_partitioned(self._layers):
            check_finite(measure(self._layers), state.global_step, args.output_dir)

    def _input_ids(self, model: nn.Module) -> torch.Tensor | None:
        if self._tokens is not None and self._tokens.ids is not None:
            return self._tokens.ids
        vocabulary = getattr(input_table(unwrap(model)), "num_embeddings", None)
        return None if vocabulary is None else random_tokens(vocabulary)

    def _tokenizer(self, event: Mapping[str, Any]) -> Any:
        """The trainer's, or that of its collator, as the trainer saves it into checkpoints."""
        return event.get("processing_class") or getattr(
            getattr(self._trainer, "data_collator", None), "tokenizer", None
        )

    def _run_folder(self, args: TrainingArguments) -> Path:
        """Where the trainer's checkpoints are: a hyperparameter search has a folder for each trial."""
        if self._trainer is None:
            return Path(args.output_dir)
        return Path(self._trainer._get_output_dir(trial=getattr(self._trainer, "_trial", None)))

    def _let_go(self) -> None:
        """Take off what hangs on the model; a run that was interrupted leaves it there for the next one."""
        if self._rounding is not None:
            self._rounding.remove()
        if self._tokens is not None:
            self._tokens.remove()

    @contextmanager
    def _unrounded(self) -> Iterator[None]:
        """Merging reads the plain factors; the hooks come back afterwards."""
        installed = self._rounding is not None and self._rounding.installed
        if self._rounding is not None:
            self._rounding.remove()
        try:
            yield
        finally:
            if self._rounding is not None and installed:
                self._rounding.install(anew=False)  # the main process alone comes here

    def _wait(self) -> None:
        if self._trainer is not None:
            self._trainer.accelerator.wait_for_everyone()


def _names(layers: dict[str, BalancedLinear]) -> set[str]:
    """Of the adapters that take part in any of these layers."""
    return {name for layer in layers.values() for name in active(layer)}
