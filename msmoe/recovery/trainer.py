"""A training run on `accelerate`: any device, one process or several.

Every random choice of a step follows from the seed and the step's number, so a killed run that goes on from its last
state ends with the same bytes as one that was never killed (on CPU, with the same number of threads).

Shapes: B batch, S target length, V vocabulary.
"""

import contextlib
import json
import math
import zlib
from collections.abc import Callable
from dataclasses import asdict
from hashlib import sha256
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from msmoe.calibration.batches import batch_indices, collate
from msmoe.calibration.profile import check_finite
from msmoe.calibration.records import Source, TokenRecord
from msmoe.calibration.tokenizer import special_tokens
from msmoe.checkpoint import Checkpoint
from msmoe.compression.provenance import read_provenance
from msmoe.errors import UserError
from msmoe.families import find_family
from msmoe.families.loading import load
from msmoe.families.stored_names import stored_tensors
from msmoe.files import explain_os_errors
from msmoe.places import CHECKPOINT, check_place
from msmoe.recovery.data import BatchOrder, load_split, num_targets
from msmoe.recovery.folder import TrainingFolder
from msmoe.recovery.log import MetricsLog
from msmoe.recovery.loss import TeacherOutput, cross_entropy, distillation, hidden_distance
from msmoe.recovery.options import RecoverOptions
from msmoe.recovery.placing import accelerator
from msmoe.recovery.pruning import RowPruner, check_prunable, factorize_student, row_pruners, rows_kept
from msmoe.recovery.save import carried_plan, check_plain, check_stored, write_recovered
from msmoe.recovery.state import load_tensors, optimizer_tensors, restore, save_tensors
from msmoe.recovery.student import (
    adamw,
    aliases,
    check_same_blocks,
    check_same_vocabulary,
    forward,
    schedule,
    tokens_per_block,
    trainable_parameters,
)
from msmoe.recovery.teacher import CachedTeacher, LiveTeacher, fill_cache

SUPPORTED = ("NO", "MULTI_CPU", "MULTI_GPU", "MULTI_XPU", "MULTI_NPU")  # accelerate's names of data parallelism
Progress = Callable[..., None]  # (steps done, steps in all, note)


class Trainer:
    """A run: what it reads, the model and its optimiser, the best step so far."""

    def __init__(
        self,
        student: str | Path,
        out: str | Path,
        data: Source,
        teacher: str | Path | None,
        validation: Source | None,
        options: RecoverOptions,
        *,
        cache_teacher: bool,
        force: bool,
    ):
        self.options, self.out, self.force = options, Path(out), force
        inputs = [source for source in (student, teacher, data, validation) if isinstance(source, str | Path)]
        check_place(self.out, CHECKPOINT, force=force, inputs=inputs)
        self.source = Checkpoint(student)
        self.teacher_source = None if teacher is None else Checkpoint(teacher)
        if self.teacher_source is not None:
            check_same_vocabulary(self.source, self.teacher_source)
            if options.hidden_weight:
                check_same_blocks(self.source, self.teacher_source)
            if cache_teacher and options.hidden_weight:
                raise UserError("--cache-teacher keeps no hidden states: drop it, or --hidden-weight")
        self.family = find_family(self.source)
        check_prunable(self.source, self.family, options)
        check_plain(self.source)
        read_provenance(self.source)  # damage is found before the training, not after it
        carried_plan(self.source)
        self.train_records, self.held_out = load_split(self.source, data, validation, options)
        self.accelerator = accelerator(options.device, options.dtype)
        if self.accelerator.distributed_type not in SUPPORTED:
            kind = self.accelerator.distributed_type.value
            raise UserError(f"recover runs in one process or in data-parallel ones, not on {kind}")
        self.order = BatchOrder(
            self.train_records,
            options.batch_size * options.accumulate * self.accelerator.num_processes,
            seed=options.seed,
        )
        self.steps = options.steps or max(1, round((options.epochs or 0) * self.order.steps_per_epoch))
        self.evaluate_every = options.evaluate_every or max(1, self.steps // 10)
        self.pad_id = special_tokens(self.source.config, self.source.path / "config.json").pad_id
        self.training = TrainingFolder(self.out.with_name(f"{self.out.name}.training"))
        self.folder = self.training.path
        self.cache_teacher = cache_teacher
        self.step, self.best_step, self.best_loss, self.first_loss = 0, 0, float("inf"), float("nan")
        self.save_is_due = False
        self.log: MetricsLog | None = None

    @property
    def is_main(self) -> bool:
        return self.accelerator.is_main_process

    def __enter__(self) -> "Trainer":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if error is not None and self.log is not None:
            with contextlib.suppress(OSError):
                self.log.close()
        self.training.close(error)
        if isinstance(error, OSError):
            with explain_os_errors(self.folder):
                raise error

    # ---- before the first step

    def prepare(self, *, resume: bool, progress: Progress | None) -> None:
        """Load the models, choose what is trained, and go on from a state where there is one."""
        options = self.options
        identity = self.identity()
        self.training.check(identity if resume else None)
        model: Any = load(self.source.path, dtype=torch.float32)
        check_finite(self.source, model)
        self.new_factors = factorize_student(self.source, self.family, model, options)
        self.model = model
        self.parameters = trainable_parameters(model, self.family, options.train)
        check_stored(self.source, model, self.parameters, new=self.new_factors)
        self.optimizer: Any = adamw(self.parameters, options)
        self.pruners = row_pruners(model, options)
        self.wrapped, self.optimizer = self.accelerator.prepare(model, self.optimizer)
        self.teacher = None if self.cache_teacher else self.load_teacher(progress)
        if self.is_main:
            self.training.open(identity, resume=resume)
        self.accelerator.wait_for_everyone()
        if self.cache_teacher:
            self.teacher = self.load_teacher(progress)
        states = sorted(self.folder.glob("state-*.safetensors"))
        resumed = self.load_state(states[-1]) if states else None
        self.log = MetricsLog(self.folder, resume_from=resumed) if self.is_main else None
        if resumed is None:
            self.first_loss = self.validate()
            if not self.pruners:
                self.best_loss = self.first_loss
            if self.is_main and self.log:
                self.log.write(0, validation_loss=self.first_loss)
                self.save_best()
            self.save_state()

    def identity(self) -> str:
        """Everything that decides the result but the learning rate."""
        sides = [[asdict(r) for r in side] for side in (self.train_records, self.held_out)]
        digest = sha256(json.dumps(sides).encode())
        teacher = self.teacher_source.fingerprint if self.teacher_source else None
        content = asdict(self.options) | {
            "student": self.source.fingerprint, "teacher": teacher, "data": digest.hexdigest(),
            "cached": self.cache_teacher, "num_processes": self.accelerator.num_processes, "steps": self.steps,
        }  # fmt: skip
        content.pop("learning_rate")
        content.pop("device")
        return json.dumps(content, sort_keys=True)

    def load_teacher(self, progress: Progress | None) -> "LiveTeacher | CachedTeacher | None":
        options, source = self.options, self.teacher_source
        if source is None or not (options.kd_weight or options.hidden_weight):
            return None

        def live() -> LiveTeacher:
            model: Any = load(source.path, dtype=torch.float32)
            check_finite(source, model)
            model.requires_grad_(False).to(self.accelerator.device)
            return LiveTeacher(model, forward, temperature=options.temperature, hidden=options.hidden_weight > 0)

        if not self.cache_teacher:
            return live()
        folder = self.folder / "teacher"
        identity = {"teacher": source.fingerprint, "temperature": options.temperature, "identity": self.identity()}
        if self.is_main:
            fill_cache(
                folder, identity, live, self.train_records, batch_size=options.batch_size, pad_id=self.pad_id,
                device=self.accelerator.device, progress=progress,
            )  # fmt: skip
        self.accelerator.wait_for_everyone()
        return CachedTeacher(folder, self.train_records)

    # ---- steps

    def run(self, progress: Progress | None) -> None:
        """Every step that is left, with validations and states in between."""
        options = self.options
        while self.step < self.steps:
            loss = self.one_step()
            self.step += 1
            validated = self.step % self.evaluate_every == 0 or self.step == self.steps
            if validated:
                validation_loss = self.validate()
                if not math.isfinite(validation_loss):
                    raise self.diverged(f"validation loss is {validation_loss}", self.step)
                self.choose_best(validation_loss)
                self.save_state()
            elif options.save_every and self.step % options.save_every == 0:
                self.save_is_due = True  # once the next step's loss has shown that these weights are good
            if progress:
                progress(self.step, self.steps, f"loss {loss:.3f}, validation {self.best_loss:.3f}")

    def one_step(self) -> float:
        """One optimiser step; returns its loss per target token.

        Raises:
            UserError: if the loss or the gradient is not finite; the step is not taken.
        """
        options, accelerator = self.options, self.accelerator
        chosen = self.order.batch(self.step)
        records = [self.train_records[i] for i in chosen]
        num_tokens = num_targets(records)
        counts = sum(len(r.input_ids) for r in records), num_tokens
        micro = [chosen[i : i + options.batch_size] for i in range(0, len(chosen), options.batch_size)]
        rounds = -(-len(micro) // accelerator.num_processes)
        rate = options.learning_rate * schedule(self.step, self.steps, options.warmup)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.wrapped.train()
        sums = torch.zeros(3, dtype=torch.float64)  # loss, cross-entropy, distillation
        for i in range(rounds):
            index = i * accelerator.num_processes + accelerator.process_index
            own, weight = (micro[index], 1.0) if index < len(micro) else (micro[0], 0.0)
            torch.manual_seed(zlib.crc32(f"{options.seed}/{self.step}/{index}".encode()))
            last = i == rounds - 1
            with contextlib.nullcontext() if last else accelerator.no_sync(self.wrapped):
                parts = self.losses(own, counts) * weight
                accelerator.backward(parts[0] * (accelerator.num_processes / num_tokens))
            sums += parts.detach().double().cpu()
        sums = self.summed(sums) / num_tokens
        for parameter in self.parameters.values():
            if parameter.grad is None:  # AdamW would skip it, and which experts see no token depends on the batches
                parameter.grad = torch.zeros_like(parameter)
        norm = accelerator.clip_grad_norm_(self.parameters.values(), options.clip)
        norm = float(norm) if norm is not None else 0.0
        scaled = accelerator.scaler is not None  # a float16 gradient that overflows: the scaler skips the step
        if not (sums.isfinite().all() and (norm < float("inf") or scaled)):
            what = f"loss is {float(sums[0])}" if not sums.isfinite().all() else f"gradient's norm is {norm}"
            raise self.diverged(what, self.step + 1)
        if self.save_is_due:
            self.save_state()
        for pruner in self.pruners.values():
            pruner.observe(self.step + 1)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        for pruner in self.pruners.values():
            pruner.prune(self.rows_left(pruner, self.step + 1))
        if self.log:
            ratio = {"rows_kept": self.row_share(self.step + 1)} if self.pruners else {}
            self.log.write(
                self.step + 1, loss=float(sums[0]), cross_entropy=float(sums[1]), distillation=float(sums[2]),
                gradient_norm=norm, learning_rate=rate, **ratio,
            )  # fmt: skip
        return float(sums[0])

    def diverged(self, what: str, step: int) -> UserError:
        """The error of a step whose numbers are not finite."""
        states = sorted(self.folder.glob("state-*.safetensors"))
        last_good = int(states[-1].stem.split("-")[1]) if states else 0
        self.training.keep = True
        return UserError(
            f"the {what} at step {step}; training stopped. The state of step {last_good} is kept in "
            f"{self.folder}: --resume with a lower --learning-rate goes on from there"
        )

    def losses(self, chosen: list[int], counts: tuple[int, int]) -> Tensor:
        """(3,) loss, cross-entropy and distillation of some records, summed over target tokens.

        Args:
            counts: source and target tokens of the whole step, which the hidden-state loss averages over.
        """
        options = self.options
        batch = self.batch([self.train_records[i] for i in chosen])
        labels = batch["labels"]
        with self.accelerator.autocast():
            logits, hidden = forward(self.wrapped, batch, hidden=options.hidden_weight > 0)
        ce = cross_entropy(logits, labels)
        kd = distance = torch.zeros_like(ce)
        if self.teacher is not None:
            with self.accelerator.autocast():
                said: TeacherOutput = self.teacher(chosen, batch)
            if options.kd_weight:
                kd = distillation(logits, labels, said, options.temperature)
            if options.hidden_weight:
                per_block = tokens_per_block(self.model.config, *counts)
                distance = hidden_distance(hidden, said.hidden, per_block) * counts[1]
        total = options.ce_weight * ce + options.kd_weight * kd + options.hidden_weight * distance
        return torch.stack([total, ce, kd])

    def batch(self, records: list[TokenRecord]) -> dict[str, Tensor]:
        return {k: t.to(self.accelerator.device) for k, t in collate(records, pad_id=self.pad_id).items()}

    @torch.no_grad()
    def validate(self) -> float:
        """Cross-entropy per target token on the validation records, in evaluation mode."""
        self.model.eval()
        accelerator, total = self.accelerator, torch.zeros((), dtype=torch.float64)
        batches = list(batch_indices(self.held_out, 2 * self.options.batch_size))
        for chosen in batches[accelerator.process_index :: accelerator.num_processes]:
            batch = self.batch([self.held_out[i] for i in chosen])
            with accelerator.autocast():
                logits, _ = forward(self.model, batch, hidden=False)
            total += cross_entropy(logits, batch["labels"]).double().cpu()
        return float(self.summed(total)) / num_targets(self.held_out)

    def summed(self, values: Tensor) -> Tensor:
        """Sum of a small tensor over all processes, on the CPU."""
        total: Any = self.accelerator.reduce(values.to(self.accelerator.device).float(), "sum")
        return total.cpu()

    def choose_best(self, loss: float) -> None:
        """Keep the weights if they are the best so far; while rows are still being pruned none are."""
        if self.log:
            self.log.write(self.step, validation_loss=loss)
        done = not self.pruners or all(self.rows_left(p, self.step) == p.final for p in self.pruners.values())
        if done and (loss < self.best_loss or self.best_loss == float("inf")):
            self.best_step, self.best_loss = self.step, loss
            if self.is_main:
                self.save_best()

    def rows_left(self, pruner: RowPruner, step: int) -> int:
        return round(self.pruning(step, start=pruner.start, final=pruner.final))

    def row_share(self, step: int) -> float:
        """Share of the rows at the start that are left after a step, over all stacks."""
        left = sum(self.rows_left(pruner, step) for pruner in self.pruners.values())
        return left / sum(pruner.start for pruner in self.pruners.values())

    def pruning(self, step: int, *, start: float, final: float) -> float:
        warmup = int(self.options.prune_warmup * self.steps)
        cooldown = max(1, int(self.options.prune_final * self.steps))
        if self.steps <= warmup + cooldown:  # a run too short to prune gradually
            return final
        return rows_kept(step, steps=self.steps, start=start, final=final, warmup=warmup, cooldown=cooldown)

    # ---- states

    def save_best(self) -> None:
        tensors: dict[str, Tensor] = dict(self.parameters)
        for name, pruner in self.pruners.items():
            tensors[f"kept/{name}"] = pruner.kept.to(torch.uint8)
        save_tensors(self.folder / f"best-{self.best_step:08d}.safetensors", tensors, {"step": self.best_step})

    def save_state(self) -> None:
        """The state after the current step; older ones, and best weights that no state names, are removed."""
        self.save_is_due = False
        if not self.is_main:
            return
        if self.log:
            self.log.flush()
        tensors = optimizer_tensors(self.parameters, self.optimizer.optimizer)
        for name, pruner in self.pruners.items():
            tensors[f"scores/{name}"] = pruner.scores
            tensors[f"kept/{name}"] = pruner.kept.to(torch.uint8)
        about = {"step": self.step, "best_step": self.best_step, "best_loss": self.best_loss, "first": self.first_loss}
        path = self.folder / f"state-{self.step:08d}.safetensors"
        save_tensors(path, tensors, about)
        for old in (*self.folder.glob("state-*.safetensors"), *self.folder.glob("best-*.safetensors")):
            if old.name not in (path.name, f"best-{self.best_step:08d}.safetensors"):
                old.unlink()

    def load_state(self, path: Path) -> int:
        tensors, about = load_tensors(path)
        restore(self.parameters, self.optimizer.optimizer, tensors)
        for name, pruner in self.pruners.items():
            pruner.scores, pruner.kept = tensors[f"scores/{name}"], tensors[f"kept/{name}"].bool()
        self.step, self.best_step = about["step"], about["best_step"]
        self.best_loss, self.first_loss = about["best_loss"], about["first"]
        return self.step

    def finish(self) -> tuple[int, int]:
        """Write the weights of the best step, and clear away the states.

        Returns:
            parameters and bytes written; 0 in a process that is not the main one.
        """
        sizes = (0, 0)
        if self.is_main and self.log:
            self.log.close()
            best, _ = load_tensors(self.folder / f"best-{self.best_step:08d}.safetensors")
            for name, pruner in self.pruners.items():
                pruner.kept = best.pop(f"kept/{name}").bool()
                best[f"{name}.S"], best[f"{name}.rows"] = pruner.compact(best[f"{name}.S"])
            best |= {alias: best[name] for alias, name in aliases(self.model).items() if name in best}
            best = stored_tensors(self.model, self.source, best)
            sizes = write_recovered(
                self.source, self.out, best, self.family, recovery=self.describe(),
                log=self.folder / "metrics.jsonl", force=self.force, factors=self.new_factors,
            )  # fmt: skip
            self.training.finish()
        self.accelerator.wait_for_everyone()
        return sizes

    def describe(self) -> dict:
        """The recovery's entry in `msmoe.json`."""
        return {
            **asdict(self.options),
            "teacher": self.teacher_source.fingerprint if self.teacher_source else None,
            "steps": self.steps,
            "best_step": self.best_step,
            "validation_loss": {"before": self.first_loss, "after": self.best_loss},
            "num_records": {"train": len(self.train_records), "validation": len(self.held_out)},
        }
