"""transformers' Trainer with our loss, our figures and our checkpoint format.

So accelerate, DDP, bf16, gradient checkpointing, resuming and the usual loggers come with it.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Sampler
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from collm.errors import CollmError
from collm.models.attaching import insert
from collm.models.backbone import rope_switches
from collm.models.checkpoint import save_checkpoint
from collm.models.head import DeferralHead
from collm.models.info import CheckpointInfo
from collm.models.loading import named_fingerprint
from collm.models.network import load_network
from collm.training.batching import EpochSampler, evened
from collm.training.model import BaseWithGate
from collm.training.price import Price, held_out_loss
from collm.training.rates import AtRate, TokenTable, at_rates
from collm.training.resuming import last_checkpoint
from collm.training.sharding import gathered_weights, shard_gate


class _AfterStep(TrainerCallback):
    def __init__(self, act: Callable[[], None]) -> None:
        self.act = act

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.act()


class CollmTrainer(Trainer):
    """Trains a `BaseWithGate`.

    The reported `loss` is the objective per labelled token; beside it the log holds, per labelled token, `nll` (of the
    marginal), `base_nll` (of the base's own law), `gate/NAME` and `posterior/NAME`.
    """

    def __init__(self, *args: Any, info: CheckpointInfo, tokenizer: Any, gate_learning_rate: float, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.info = info
        self.tokenizer = tokenizer
        self.gate_learning_rate = gate_learning_rate
        self._sums: dict[str, Tensor] = {}
        self._tokens: list[Tensor] = []
        self._labelled = 1.0
        """Tokens that the last figures are means over."""
        self.price: Price | None = None
        """Set by `follow`, where a target rate is asked for."""
        self._step_sums: list[Tensor] = []
        self.ended = False
        """Whether the checkpoint that is gone on from is the run's last one (`resuming.has_ended`)."""

    def follow(self, target: float, num_steps: int, state: dict[str, float] | None) -> None:
        """Find the price of a deferred token during training (`collm.training.price`).

        Args:
            state: where an interrupted run has left the price.
        """
        self.price = Price(target, num_steps, self.args.device)
        if state is not None:
            self.price.load(state)
        self._module.price = self.price.value
        self.add_callback(_AfterStep(self._step_price))

    def _step_price(self) -> None:
        assert self.price is not None
        # Without waiting for the device: the sums stay there, and so does the price.
        deferred, count = self.accelerator.reduce(torch.stack(self._step_sums).sum(0), reduction="sum")
        self._step_sums = []
        self.price.step(deferred / count.clamp(min=1))
        self._module.price = self.price.value

    @property
    def _module(self) -> BaseWithGate:
        """Ours, inside what wraps it for several processes."""
        module = self.accelerator.unwrap_model(self.model)
        assert isinstance(module, BaseWithGate)
        return module

    # -- the loss

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        outputs = model(**inputs, num_items_in_batch=num_items_in_batch)
        loss = outputs["loss"]
        if model.training:
            if self.price is not None:
                count = outputs.get("chunks", outputs["count"]).detach().float()
                self._step_sums.append(torch.stack([count - outputs["gate"].detach()[0], count]))
            for name, value in outputs.items():
                if name != "loss":
                    self._sums[name] = self._sums.get(name, torch.zeros_like(value)) + value.detach()
            if num_items_in_batch is not None and self.args.average_tokens_across_devices:
                # The count is of all processes, and their gradients will be averaged.
                loss = loss * self.accelerator.num_processes
        return (loss, outputs) if return_outputs else loss

    def _require_finite(self, sums: dict[str, Tensor]) -> None:
        """A loss that is no number stays so in the sums: looked at where they are read anyway, since looking at each
        would make the host wait for the GPU. On all processes at once."""
        loss = float(self.accelerator.reduce(sums["objective"], reduction="sum"))
        if not math.isfinite(loss):
            raise CollmError(
                f"the loss is {loss} at step {self.state.global_step} or shortly before; training stopped, the last "
                f"good checkpoint is {last_checkpoint(Path(str(self.args.output_dir)))}: lower learning_rate, or check "
                "the data and scores"
            )

    def _save_checkpoint(self, *args: Any) -> None:
        if self._sums:  # since the last line of the log
            self._require_finite(self._sums)
        super()._save_checkpoint(*args)

    def _figures(self, sums: dict[str, Tensor]) -> dict[str, float]:
        """Means per labelled token (of who writes, per chunk) over all processes."""
        sums = {name: self.accelerator.reduce(value, reduction="sum") for name, value in sorted(sums.items())}
        count = self._labelled = max(1.0, float(sums["count"]))
        figures = {name: float(sums[name]) / count for name in ("objective", "nll", "base_nll")}
        # Of writers, where models share chunks: means over those.
        count = max(1.0, float(sums.get("chunks", sums["count"])))
        if not self._module.training:
            figures["base_accuracy"] = float(sums["base_right"]) / count
        for k, assistant in enumerate(self.info.assistants, start=1):
            figures[f"gate/{assistant.name}"] = float(sums["gate"][k]) / count
            figures[f"posterior/{assistant.name}"] = float(sums["posterior"][k]) / count
        return figures

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs and self._sums:
            self._require_finite(self._sums)
            figures = self._figures(self._sums)
            # With several processes the Trainer's own figure is scaled for gradient averaging; this one is exact.
            logs["loss"] = figures.pop("objective")
            logs.update(figures)
            if self.price is not None:
                logs["price"] = float(self.price.value)
            self._sums = {}
        super().log(logs, start_time)

    @torch.no_grad()
    def evaluate(
        self,
        eval_dataset: Any = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """Held-out means per labelled token (the Trainer's own would weigh batches, not tokens)."""
        assert self.model is not None
        model = self._wrap_model(self.model, training=False)
        model.eval()
        sums: dict[str, Tensor] = {}
        given: Any = self.eval_dataset if eval_dataset is None else eval_dataset
        rows: Any = list(given)
        # Where several processes share the batches, accelerate would repeat rows to even them out, and count them
        # twice.
        unit = self.args.eval_batch_size * self.accelerator.num_processes
        rows = evened(rows, unit, rope_switches(self._module.model), always=self.accelerator.num_processes > 1)
        for inputs in self.get_eval_dataloader(rows):
            with self.compute_loss_context_manager():
                outputs = model(**self._prepare_inputs(inputs))
            if "tokens" in outputs:
                self._tokens.append(self._of_all_processes(outputs["tokens"]))
            for name, value in outputs.items():
                if name not in ("loss", "tokens"):
                    sums[name] = sums.get(name, torch.zeros_like(value)) + value
        figures = self._figures(sums)
        loss = figures.pop("objective")
        if self.price is not None:
            deferred = sum(value for name, value in figures.items() if name.startswith("gate/"))
            loss = held_out_loss(figures["nll"], deferred, self.price.target)
        metrics = {f"{metric_key_prefix}_loss": loss}
        metrics |= {f"{metric_key_prefix}_{name}": value for name, value in figures.items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def evaluate_rates(self) -> tuple[dict[str, float], list[AtRate]]:
        """`evaluate`, and what the pair would make of the held-out text at a few rates (none without assistants)."""
        module, self._tokens = self._module, []
        module.detailed = module.head is not None
        figures = self.evaluate()
        module.detailed = False
        if not self._tokens:
            return figures, []
        tokens, k = torch.cat(self._tokens), len(self.info.assistants)
        base, log_gate, log_probs, right = tokens.split([2, 1 + k, k, k], dim=1)
        table = TokenTable(base[:, 0], base[:, 1] > 0, log_gate, log_probs, right > 0)
        return figures, at_rates(table, labelled=self._labelled)

    def _of_all_processes(self, tokens: Tensor) -> Tensor:
        """`[N, C]` on the CPU; no row begins with NaN, so what evens out the processes can be told."""
        if self.accelerator.num_processes > 1:
            padded = self.accelerator.pad_across_processes(tokens, dim=0, pad_index=torch.nan)
            gathered: Tensor = self.accelerator.gather(padded)
            tokens = gathered[~gathered[:, 0].isnan()]
        return tokens.cpu()

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int] | None:
        strategy = self.args.train_sampling_strategy
        rows: Any = self.train_dataset if train_dataset is None else train_dataset
        lengths = [len(row["input_ids"]) for row in rows]
        switches = rope_switches(self._module.model)
        if strategy not in ("group_by_length", "random"):
            if len({bisect_left(switches, length) for length in lengths}) > 1:
                raise CollmError(
                    f"texts are shorter and longer than {switches[0]} tokens, where this model's longrope takes other "
                    f"factors for a whole batch: trainer.train_sampling_strategy {strategy} would mix them; leave "
                    "it out"
                )
            return super()._get_train_sampler(train_dataset)
        step_size = self.args.train_batch_size * self.args.gradient_accumulation_steps * self.accelerator.num_processes
        grouped = strategy == "group_by_length"
        return EpochSampler(lengths, step_size, self.args.seed, grouped=grouped, switches=switches)

    # -- the optimizer: the gate wants its own, larger learning rate

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        shard_gate(self)
        optimizer = super().create_optimizer(model)
        owner = self.model if model is None else model
        assert owner is not None
        gate_ids = {id(p) for name, p in owner.named_parameters() if "head." in name and ".model." not in f".{name}"}
        for group in list(optimizer.param_groups):
            gate = [p for p in group["params"] if id(p) in gate_ids]
            if gate:
                group["params"] = [p for p in group["params"] if id(p) not in gate_ids]
                options = {key: value for key, value in group.items() if key != "params"}
                optimizer.add_param_group({**options, "params": gate, "lr": self.gate_learning_rate, "weight_decay": 0})
        if self.is_fsdp_enabled:  # torch cannot load the state of an optimizer with several empty groups
            optimizer.param_groups[:] = [group for group in optimizer.param_groups if group["params"]]
        return optimizer

    # -- checkpoints

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """No step behind the last one: the Trainer would look at that only after one more."""
        if self.ended:
            self.control.should_training_stop = True
        else:
            super()._run_epoch(*args, **kwargs)  # type: ignore[no-untyped-call]

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Called on all processes: weights that are spread over them are gathered, whatever else the Trainer keeps of
        them to resume from, so that every checkpoint is one of ours."""
        self._save(output_dir, gathered_weights(self))
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        if not self.args.should_save:
            return
        module, info = self._module, self.info
        head = module.head
        if self.price is not None:
            info.training["price"] = self.price.state()
        if state_dict is not None:
            if head is not None:
                gathered = {k.removeprefix("head."): v for k, v in state_dict.items() if k.startswith("head.")}
                head = DeferralHead(gathered["weight"].shape[1], gathered["weight"].shape[0])
                head.load_state_dict(gathered)
            state_dict = {k.removeprefix("model."): v for k, v in state_dict.items() if k.startswith("model.")}
        if info.kind == "full":
            # Names of parameters: a gathered state has buffers, too, and tied weights twice.
            weights = module.model.named_parameters()
            info.base_fingerprint = named_fingerprint(
                weights if state_dict is None else ((name, state_dict[name]) for name, _ in weights)
            )
        folder = Path(output_dir or str(self.args.output_dir))
        save_checkpoint(folder, info, module.model, head, self.tokenizer, state_dict)

    def _load_weights(self, folder: Path) -> None:
        module = self._module
        if self.info.kind == "lora":
            insert(module.model, str(folder), "default", upcast=True, trainable=True)  # type: ignore[arg-type]
        else:
            # Through from_pretrained, since save_pretrained may rename or drop (tied) tensors.
            module.model.load_state_dict(load_network(str(folder), dtype="auto").state_dict())
        if module.head is not None:
            module.head.load_state_dict(DeferralHead.load(folder).state_dict())

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if self.is_fsdp_enabled:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        else:
            self._load_weights(Path(resume_from_checkpoint))

    def _load_best_model(self) -> None:
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            super()._load_best_model()
        elif self.state.best_model_checkpoint is not None:
            self._load_weights(Path(self.state.best_model_checkpoint))
