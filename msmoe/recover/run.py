"""Fine-tune a checkpoint, as student of another one or by itself, on `accelerate`: any device, one process or several.

Every random choice of a step follows from the seed and the step's number, so a killed run that goes on from its last
state ends with the same bytes as one that was never killed (on CPU, with the same number of threads).

Shapes: B batch, S target length, V vocabulary.
"""

import contextlib
import json
import shutil
import zlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from msmoe.calibration.batches import IGNORE, batch_indices, collate
from msmoe.calibration.profile import check_finite, load_tokenizer
from msmoe.calibration.records import TokenRecord
from msmoe.checkpoint import Checkpoint, to_dtype, write_whole
from msmoe.checkpoint.writer import explain_os_errors
from msmoe.errors import UserError
from msmoe.families import FAMILIES, Family
from msmoe.loading import load
from msmoe.plan import Plan
from msmoe.recover.data import BatchOrder, load_split, num_targets
from msmoe.recover.log import MetricsLog
from msmoe.recover.loss import TeacherOutput, cross_entropy, distillation, hidden_distance
from msmoe.recover.options import RecoverOptions
from msmoe.recover.pruning import RowPruner, factorize_in_place, factorized_weights, rows_kept
from msmoe.recover.save import write_recovered
from msmoe.recover.state import load_tensors, optimizer_tensors, restore, save_tensors
from msmoe.recover.teacher import CachedTeacher, LiveTeacher, fill_cache

SUPPORTED = ("NO", "MULTI_CPU", "MULTI_GPU", "MULTI_XPU", "MULTI_NPU")  # accelerate's names of data parallelism
Progress = Callable[..., None]  # (steps done, steps in all, note)


@dataclass(frozen=True)
class RecoverReport:
    """What `recover` did.

    Attributes:
        out: the new checkpoint.
        steps: of the run; best_step: the one whose weights were written, 0 for the student as it was.
        validation_before, validation_after: cross-entropy per target token on the validation records.
        num_train, num_validation: records.
        log: metrics of every step, JSON Lines.
    """

    out: Path
    steps: int
    best_step: int
    validation_before: float
    validation_after: float
    num_train: int
    num_validation: int
    num_parameters: int
    num_bytes: int
    log: Path


def recover(
    student: str | Path,
    out: str | Path,
    *,
    data: str | Path,
    teacher: str | Path | None,
    validation: str | Path | None = None,
    cache_teacher: bool = False,
    force: bool = False,
    resume: bool = False,
    progress: Progress | None = None,
    **options,
) -> RecoverReport:
    """Train a checkpoint and write the weights of its best step.

    The loss is cross-entropy plus `kd_weight` T^2 KL(teacher || student), per target token. The student trains with
    dropout, the teacher is in evaluation mode. The state of the run, its log and TensorBoard events are kept in
    `<out>.training`.

    Args:
        student: any checkpoint that `msmoe.load` reads; it is never changed.
        out: folder to write; complete or absent at any moment.
        data: JSON Lines file with targets.
        teacher: checkpoint to learn from, or None for plain fine-tuning.
        validation: data that choose the best step; by default a share of `data` that is not trained on.
        cache_teacher: ask the teacher once about every record, keep its likeliest tokens on disk, and free it.
        force: replace an existing `out`.
        resume: go on with a killed run; the learning rate may differ from its own, nothing else.
        progress: called with (steps done, steps in all, note).
        **options: any attribute of `RecoverOptions`.

    Raises:
        UserError: for an input or an option that cannot be used, a loss that is not finite, or an output that cannot
            be written.
    """
    chosen = RecoverOptions(**options)
    chosen.check(has_teacher=teacher is not None)
    trainer = Trainer(student, out, data, teacher, validation, chosen, cache_teacher=cache_teacher, force=force)
    trainer.prepare(resume=resume, progress=progress)
    trainer.run(progress)
    return trainer.finish()


class Trainer:
    """A run: what it reads, the model and its optimiser, the best step so far."""

    def __init__(
        self,
        student: str | Path,
        out: str | Path,
        data: str | Path,
        teacher: str | Path | None,
        validation: str | Path | None,
        options: RecoverOptions,
        *,
        cache_teacher: bool,
        force: bool,
    ):
        from accelerate import Accelerator, DistributedDataParallelKwargs

        self.options, self.out, self.force = options, Path(out), force
        self.source = Checkpoint(student)
        self.teacher_source = None if teacher is None else Checkpoint(teacher)
        if self.out.exists() and not force:
            raise UserError(f"{self.out} exists; use --force to replace it")
        if self.teacher_source is not None:
            check_same_vocabulary(self.source, self.teacher_source)
            if cache_teacher and options.hidden_weight:
                raise UserError("--cache-teacher keeps no hidden states: drop it, or --hidden-weight")
        self.family = family_of_student(self.source)
        self.train_records, self.held_out = load_split(self.source, data, validation, options)
        self.accelerator = Accelerator(kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)])
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
        self.pad_id = self.source.config.get("pad_token_id") or 0
        self.folder = self.out.with_name(f"{self.out.name}.training")
        self.cache_teacher = cache_teacher
        self.step, self.best_step, self.best_loss, self.first_loss = 0, 0, float("inf"), float("nan")

    @property
    def is_main(self) -> bool:
        return self.accelerator.is_main_process

    # ---- before the first step

    def prepare(self, *, resume: bool, progress: Progress | None) -> None:
        """Load the models, choose what is trained, and go on from a state where there is one."""
        options = self.options
        identity = self.identity()
        with explain_os_errors(self.folder):
            if self.is_main:
                self.folder = open_folder(self.folder, identity, resume=resume)
        self.accelerator.wait_for_everyone()
        model: Any = load(self.source.path, dtype=torch.float32)
        check_finite(self.source, model)
        self.new_factors = self.factorize(model)
        self.model = model
        self.parameters = trainable_parameters(model, self.family, options.train)
        self.optimizer: Any = adamw(self.parameters, options)
        self.pruners = self.row_pruners(model)
        self.wrapped, self.optimizer = self.accelerator.prepare(model, self.optimizer)
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
        digest = sha256(json.dumps([asdict(r) for r in (*self.train_records, *self.held_out)]).encode())
        teacher = self.teacher_source.fingerprint if self.teacher_source else None
        content = asdict(self.options) | {
            "student": self.source.fingerprint, "teacher": teacher, "data": digest.hexdigest(),
            "cached": self.cache_teacher, "num_processes": self.accelerator.num_processes, "steps": self.steps,
        }  # fmt: skip
        content.pop("learning_rate")
        return json.dumps(content, sort_keys=True)

    def factorize(self, model: Any) -> dict:
        """Factors of dense experts for gradual pruning, where asked for."""
        if self.options.rank is None:
            return {}
        if self.family is None or self.source.model_type != self.family.compressed_model_type:
            raise UserError(f"--rank needs an exact checkpoint of msmoe as student; {self.source.path} is none")
        layers = self.family.stored_layers(self.source)
        kept: Sequence[str] = self.family.default_kept_layers(tuple(layer for layer, _ in layers))
        if (self.source.path / "plan.json").exists():
            kept = Plan.load(self.source.path / "plan.json").parameters.get("keep_layers", kept)
        smallest = min(min(layer.d_model, layer.d_ff) for layer, _ in layers)
        if self.options.rank > smallest:
            raise UserError(f"--rank must be between 1 and {smallest}, got {self.options.rank}")
        itemsize = to_dtype(layers[0][0].dtype).itemsize
        shapes = factorize_in_place(
            model, self.options.rank, self.options.keep_rows or 1.0, skip=kept, itemsize=itemsize
        )
        if not shapes:
            raise UserError(f"rank {self.options.rank} with these rows would store more than the dense experts")
        return shapes

    def row_pruners(self, model: Any) -> dict[str, RowPruner]:
        if self.options.keep_rows is None:
            return {}
        pruners = {}
        for name, weight in factorized_weights(model):
            final = round(self.options.keep_rows * weight.U.shape[1])
            if final > weight.S.shape[1]:
                raise UserError(f"--keep-rows {self.options.keep_rows:g} asks for {final} rows of {name}, which has "
                                f"{weight.S.shape[1]}")  # fmt: skip
            pruners[name] = RowPruner(weight, final=final, score=self.options.row_score, beta=self.options.beta)
        if not pruners:
            raise UserError("--keep-rows prunes factorised experts, and the student has none: give --rank as well")
        return pruners

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
                self.choose_best(self.validate())
            if self.is_main and (validated or (options.save_every and self.step % options.save_every == 0)):
                self.save_state()
            if progress:
                progress(self.step, self.steps, f"loss {loss:.3f}, validation {self.best_loss:.3f}")

    def one_step(self) -> float:
        """One optimiser step; returns its loss per target token.

        Raises:
            UserError: if the loss or the gradient is not finite; the step is not taken.
        """
        options, accelerator = self.options, self.accelerator
        chosen = self.order.batch(self.step)
        num_tokens = num_targets([self.train_records[i] for i in chosen])
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
                parts = self.losses(own) * weight
                accelerator.backward(parts[0] * (accelerator.num_processes / num_tokens))
            sums += parts.detach().double().cpu()
        sums = self.summed(sums) / num_tokens
        norm = accelerator.clip_grad_norm_(self.parameters.values(), options.clip)
        norm = float(norm) if norm is not None else 0.0
        scaled = accelerator.scaler is not None  # a float16 gradient that overflows: the scaler skips the step
        if not (sums.isfinite().all() and (norm < float("inf") or scaled)):
            what = f"loss is {float(sums[0])}" if not sums.isfinite().all() else f"gradient's norm is {norm}"
            states = sorted(self.folder.glob("state-*.safetensors"))
            last_good = int(states[-1].stem.split("-")[1]) if states else 0
            raise UserError(
                f"the {what} at step {self.step + 1}; training stopped. The state of step {last_good} is kept in "
                f"{self.folder}: --resume with a lower --learning-rate goes on from there"
            )
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

    def losses(self, chosen: list[int]) -> Tensor:
        """(3,) loss, cross-entropy and distillation of some records, summed over target tokens."""
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
                distance = hidden_distance(hidden, said.hidden) * (labels != IGNORE).sum()
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

    def finish(self) -> RecoverReport:
        """Write the weights of the best step, and clear away the states."""
        log = self.folder / "metrics.jsonl"
        sizes = (0, 0)
        if self.is_main and self.log:
            self.log.close()
            best, _ = load_tensors(self.folder / f"best-{self.best_step:08d}.safetensors")
            for name, pruner in self.pruners.items():
                pruner.kept = best.pop(f"kept/{name}").bool()
                best[f"{name}.S"], best[f"{name}.rows"] = pruner.compact(best[f"{name}.S"])
            best |= {alias: best[name] for alias, name in aliases(self.model).items() if name in best}
            sizes = write_recovered(
                self.source, self.out, best, self.family, recovery=self.describe(), log=log, force=self.force,
                factors=self.new_factors,
            )  # fmt: skip
            for file in (*self.folder.glob("state-*"), *self.folder.glob("best-*")):
                file.unlink()
            shutil.rmtree(self.folder / "teacher", ignore_errors=True)
        self.accelerator.wait_for_everyone()
        return RecoverReport(
            self.out, self.steps, self.best_step, self.first_loss, self.best_loss, len(self.train_records),
            len(self.held_out), *sizes, log=log,
        )  # fmt: skip

    def describe(self) -> dict:
        """The recovery's entry in `msmoe.json`."""
        return {
            "teacher": self.teacher_source.fingerprint if self.teacher_source else None,
            "steps": self.steps,
            "best_step": self.best_step,
            "validation_loss": {"before": self.first_loss, "after": self.best_loss},
            "num_records": {"train": len(self.train_records), "validation": len(self.held_out)},
            **asdict(self.options),
        }


def forward(model: Any, batch: dict[str, Tensor], *, hidden: bool) -> tuple[Tensor, list[Tensor]]:
    """Logits (B, S, V), and the hidden states of the valid tokens of every block where asked for."""
    labels = batch["labels"]
    unwrapped = getattr(model, "module", model)
    output = model(
        input_ids=batch["input_ids"],
        attention_mask=batch["attention_mask"],
        decoder_input_ids=unwrapped.prepare_decoder_input_ids_from_labels(labels),
        use_cache=False,
        output_hidden_states=hidden,
    )
    if not hidden:
        return output.logits, []
    sides = ((output.encoder_hidden_states, batch["attention_mask"].bool()),
             (output.decoder_hidden_states, labels != IGNORE))  # fmt: skip
    return output.logits, [states[valid] for blocks, valid in sides for states in blocks[1:]]


def schedule(step: int, steps: int, warmup: float) -> float:
    """Share of the learning rate at a step, counted from 0: linear rise, then linear fall to 0 at the end."""
    rise = int(warmup * steps)
    return (step + 1) / (rise + 1) if step < rise else (steps - step) / (steps - rise)


def family_of_student(source: Checkpoint) -> Family | None:
    """Adapter of a Switch checkpoint, original or compressed; None for a dense one."""
    for family in FAMILIES.values():
        if source.model_type in (family.model_type, family.compressed_model_type):
            return family
    return None


def trainable_parameters(model: Any, family: Family | None, train: str) -> dict[str, nn.Parameter]:
    """The parameters that a choice of `RecoverOptions.train` moves; all others are frozen.

    Raises:
        UserError: if the model has none.
    """
    part = {"experts": "experts", "router": "routers"}.get(train)
    chosen = {
        name: parameter
        for name, parameter in model.named_parameters()
        if part is None or (family is not None and family.part(name) == part)
    }
    if not chosen:
        raise UserError(f"the student has no {part}: use --train all")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in chosen)
    return chosen


def aliases(model: Any) -> dict[str, str]:
    """Other names of tied parameters -> their first name; checkpoints may store either."""
    first = {id(parameter): name for name, parameter in model.named_parameters()}
    every = model.named_parameters(remove_duplicate=False)
    return {name: first[id(parameter)] for name, parameter in every if first[id(parameter)] != name}


def adamw(parameters: dict[str, nn.Parameter], options: RecoverOptions) -> torch.optim.AdamW:
    """AdamW; norms and biases, the parameters with one axis, are not decayed."""
    groups = [
        {"params": [p for p in parameters.values() if p.ndim > 1], "weight_decay": options.weight_decay},
        {"params": [p for p in parameters.values() if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=options.learning_rate)


def check_same_vocabulary(student: Checkpoint, teacher: Checkpoint) -> None:
    """Raise `UserError` if the two checkpoints name tokens differently."""
    sizes = [c.config.get("vocab_size") for c in (student, teacher)]
    if sizes[0] != sizes[1]:
        raise UserError(
            f"student and teacher must share their vocabulary: {student.path} has {sizes[0]} tokens, "
            f"{teacher.path} has {sizes[1]}"
        )
    tokenizers = [load_tokenizer(c.path) for c in (student, teacher)]
    if all(tokenizers) and tokenizers[0].get_vocab() != tokenizers[1].get_vocab():  # type: ignore[union-attr]
        raise UserError(f"student and teacher must share their vocabulary: the tokenizers of {student.path} and "
                        f"{teacher.path} differ")  # fmt: skip


def open_folder(folder: Path, identity: str, *, resume: bool) -> Path:
    """The folder of a run: emptied, or as a run of the same identity left it.

    Raises:
        UserError: if the run to be resumed had other inputs.
    """
    file = folder / "run.json"
    if not resume:
        shutil.rmtree(folder, ignore_errors=True)
    elif file.exists() and file.read_text(encoding="utf-8") != identity:
        raise UserError(f"{folder} was left by a run with other inputs; remove it or run without --resume")
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(file, identity)
    return folder
