"""Transformers' `Trainer` with a teacher, a clock, and several texts that are held out."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils.data import SequentialSampler
from tqdm.auto import tqdm
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME

from optimum_comp.core.distillation import divergence, grouped
from optimum_comp.distillation.candidates import Candidates, predicting
from optimum_comp.distillation.translation import Translation, put_into
from optimum_comp.files import durably
from optimum_comp.utils import get_logger, progress_disabled


logger = get_logger(__name__)

DIVERGENCE = "eval_divergence"
"""Mean over the texts of the held-out divergence, in nats: what decides which checkpoint is kept."""

_WARM_UP = 0.03
_LOWEST = 0.02
"""Share of the run in which the learning rate rises, and share of it that is left at the end."""
_EVALUATIONS = 5
_PATIENCE, _WORSE = 2, 1.5
"""Evaluations in one run, and how many that are so much worse than the best one end it. A little worse they may well
be while the learning rate is high."""
_MISSING, _LEAST = 1 / 16, 1 / 500
"""Share of the tokens, at most, in whose places words are put that the student lacks, and how likely one has to be
there: a vocabulary that lacks other scripts alone lacks next to nothing of a text, and no such word fits anywhere."""
_SPENT, _BEGUN = "spent_seconds", "begun_seconds"


def read_state(checkpoint: Path) -> dict[str, Any]:
    """What the trainer writes last of a checkpoint.

    Raises:
        OSError: it isn't there: the checkpoint isn't complete.
        ValueError: it is damaged.
    """
    # Not strict JSON: the norm of a gradient may be infinite.
    found: dict[str, Any] = json.loads((checkpoint / TRAINER_STATE_NAME).read_text(encoding="utf-8"))
    return found


def name_best(checkpoint: Path) -> None:
    """Have a checkpoint's state name the best one where it lies now, wherever it was when that was written."""
    state = read_state(checkpoint)
    best = state.get("best_model_checkpoint")
    if best is not None:
        state["best_model_checkpoint"] = str(checkpoint.with_name(Path(best).name))
        with durably(checkpoint / TRAINER_STATE_NAME) as partial:
            partial.write_text(json.dumps(state, indent=2, sort_keys=True) + "\n", encoding="utf-8")


class Clock:
    """How far a run is: by steps, or by the time that it may take.

    Args:
        steps: that are to be made; `None` if time decides.
        seconds: that it may take; `None` if steps decide.
        spent: seconds that it has taken already.

    Attributes:
        begun: seconds that were spent when training began, which the learning rate doesn't count.
    """

    def __init__(self, steps: int | None, seconds: float | None, spent: float = 0.0):
        self.steps, self.seconds = steps, seconds
        self._earlier, self._started, self._reserved = spent, time.monotonic(), 0.0
        self.begun = 0.0

    @property
    def spent(self) -> float:
        """Seconds so far, those of earlier parts of the run included."""
        return self._earlier + time.monotonic() - self._started

    def share(self, step: int) -> float:
        """How much of the run is over, in [0, 1]."""
        if self.steps is not None:
            return min(1.0, step / self.steps)
        return min(1.0, self.spent / self._end)

    @property
    def _end(self) -> float:
        """Seconds after which training ends; of a very short time, something is left to train in."""
        seconds = self.seconds or 1.0
        return max(seconds - self._reserved, 0.5 * seconds)

    def reserve(self, seconds: float) -> None:
        """Set some of the time aside for what comes after training."""
        self._reserved = seconds

    def rate(self, step: int) -> float:
        """Learning rate relative to the largest one: a short rise, then half a cosine."""
        share = self.share(step)
        if self.steps is None:
            # Texts may have taken half of the time, or all of it.
            begun = min(self.begun / self._end, 0.999)
            share = max(0.0, share - begun) / (1 - begun)
        if share < _WARM_UP:
            # The first step has to do something.
            return max(share, 0.1 * _WARM_UP) / _WARM_UP
        progress = (share - _WARM_UP) / (1 - _WARM_UP)
        return _LOWEST + (1 - _LOWEST) * 0.5 * (1 + math.cos(math.pi * progress))

    def go_on(self, checkpoint: Path) -> None:
        """Count what a checkpoint's log says was spent before it."""
        log = read_state(checkpoint)["log_history"]
        last = next(entry for entry in reversed(log) if _SPENT in entry)
        self._earlier, self.begun = last[_SPENT], last.get(_BEGUN, 0.0)


class Distiller(Trainer):
    """Trains a student on a teacher's predictions.

    Args:
        teacher: the model that predicts; nothing in it changes.
        clock: how far the run is.
        products: what factors of matrix products are rounded to.
        labels: how much the text's own next tokens count beside the teacher's predictions, in [0, 1].
        candidates: tokens over which predictions are compared in training; `None` for the whole vocabulary, over
            which they are on what is held out in any case.
        translation: what the teacher's tokens, in which all samples are, are to the student; `None` if they are its
            own.
        broken: tokens of what is trained on that the student lacks, `[m]`; beside the candidates, the teacher's
            predictions of these count.
        given: as for `Trainer`; `eval_dataset` is text -> samples `[n, length]` that aren't trained on.
    """

    def __init__(
        self,
        *,
        teacher: Any,
        clock: Clock,
        products: torch.dtype,
        labels: float,
        candidates: Candidates | None,
        translation: Translation | None = None,
        broken: Tensor | None = None,
        **given: Any,
    ):
        self.clock, self.teacher, self._products, self._labels = clock, teacher, products, labels
        self._candidates, self._translation, self._broken = candidates, translation, broken
        self.lr_scheduler: Any = None
        self.control: Any = None
        super().__init__(**given)
        self.model_accepts_loss_kwargs = False
        # The first and most frequent things that a user wants to see are the time and the loss, in one line.
        for callback in list(self.callback_handler.callbacks):
            if type(callback).__name__ in ("PrinterCallback", "ProgressCallback"):
                self.remove_callback(callback)
        self.add_callback(_Timing(clock))

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Tensor], return_outputs: bool = False, **_: Any
    ) -> Tensor:
        """How far the student's predictions are from the teacher's and from the text, in nats."""
        # Without dropout, as the teacher predicts: what it leaves out at random is no property of the student.
        model.eval()
        ids, candidates = inputs["input_ids"], self._candidates
        if self._translation is not None:
            step = self.state.global_step
            tokens = None if candidates is None else candidates.of_step(step)
            with_missing = self._with_missing(ids, self._translation, tokens, step)
            return self._divergence_in_pieces(model, with_missing, self._translation, tokens, self._labels)
        following, offsets = ids[:, 1:], None
        if candidates is None:
            found, wanted = self._predictions(model, ids)
        else:
            following, offsets = candidates.places(following), candidates.offsets.to(ids.device)
            tokens = candidates.of_step(self.state.global_step)
            with predicting((model, tokens), (self.teacher, tokens)):
                found, wanted = self._predictions(model, ids)
        nothing = ids.new_full((len(ids), 1), -1)
        return divergence(found, wanted, torch.cat([following, nothing], 1), self._labels, offsets)

    @torch.no_grad()
    def _with_missing(self, ids: Tensor, translation: Translation, tokens: Tensor | None, step: int) -> Tensor:
        """Samples in which the teacher has put some of the words that the student lacks, where they fit best.

        Texts may have few of them, most of all those that the vocabulary was chosen by. The teacher reads what it has
        put there, so that its predictions are of this very text.
        """
        broken = translation.broken() if self._broken is None else self._broken
        if not len(broken):
            return ids
        if tokens is None or self._candidates is None:
            columns, offsets = broken, torch.zeros((), device=ids.device)
            logits = self._of_teacher(ids)
        else:
            columns = len(tokens) + torch.arange(len(broken))
            offsets = torch.cat([self._candidates.offsets, torch.zeros(len(broken))]).to(ids.device)
            with predicting((self.teacher, torch.cat([translation.back[tokens], broken]))):
                logits = self._of_teacher(ids)
        logits = logits[:, :-1].float() + offsets
        of_broken = logits[..., columns.to(ids.device)] - logits.logsumexp(-1, keepdim=True)
        # The same in a run that is gone on with; other samples of a step have other tokens.
        generator = torch.Generator().manual_seed(1_000_003 * step + int(ids.sum()) % 1_000_003)
        return put_into(ids, broken, of_broken.cpu(), max(1, round(_MISSING * ids.shape[1])), generator, _LEAST)

    def _divergence_in_pieces(
        self, model: Any, ids: Tensor, translation: Translation, tokens: Tensor | None, labels: float
    ) -> Tensor:
        """The loss of a student that reads some of the teacher's tokens in pieces.

        Args:
            model: the student.
            ids: samples in the teacher's tokens, `[samples, length]`.
            translation: what they are to the student.
            tokens: the student's tokens that are compared; all, if `None`.
            labels: how much the text counts at the end of a token; within one it says all.
        """
        device = ids.device
        pieces = translation.pieces_of(ids, getattr(model.config, "max_position_embeddings", None))
        following, offsets, theirs = pieces.following, None, None
        if tokens is None or self._candidates is None:
            broken, own = translation.broken(), translation.back
            members, groups = broken, translation.first(broken)
            found, wanted = self._predictions(model, pieces.tokens, ids)
        else:
            broken = translation.broken() if self._broken is None else self._broken
            own, members = torch.arange(len(tokens)), len(tokens) + torch.arange(len(broken))
            groups = self._candidates.places(translation.first(broken))
            following, offsets = self._candidates.places(following), self._candidates.offsets.to(device)
            theirs = torch.cat([offsets, offsets.new_zeros(len(broken))])
            with predicting((model, tokens), (self.teacher, torch.cat([translation.back[tokens], broken]))):
                found, wanted = self._predictions(model, pieces.tokens, ids)
        own, members, groups = (each.to(device) for each in (own, members, groups))
        wanted = grouped(wanted.flatten(0, 1), own, members, groups, theirs, offsets)
        share = torch.where(pieces.inside, 1.0, labels)
        found = found[pieces.row, pieces.column]
        return divergence(found, wanted[pieces.owner], following, share, offsets)

    def _of_teacher(self, ids: Tensor) -> Tensor:
        with torch.autocast(ids.device.type, self._products, enabled=self._products != torch.float32):
            logits: Tensor = self.teacher(input_ids=ids, use_cache=False).logits
        return logits

    def _predictions(self, model: nn.Module, ids: Tensor, theirs: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Logits of the student and of the teacher, `[samples, length, vocabulary]`.

        Args:
            model: the student.
            ids: samples as it reads them.
            theirs: as the teacher does; the same if `None`.
        """
        # Not the trainer's own mixed precision: it would widen all logits, which are most of what is in memory. A
        # tied embedding that is rounded is so once, for the look-up and for the head.
        with (
            torch.autocast(ids.device.type, self._products, enabled=self._products != torch.float32),
            parametrize.cached(),
        ):
            with torch.no_grad():
                wanted = self._of_teacher(ids if theirs is None else theirs)
            return model(input_ids=ids, use_cache=False).logits, wanted

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """The clock's: it knows how far the run is, where only time limits it."""
        if self.lr_scheduler is None:
            chosen = self.optimizer if optimizer is None else optimizer
            self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(chosen, self.clock.rate)
        return self.lr_scheduler

    def _get_train_sampler(self, *_: Any) -> SequentialSampler:
        """The stream is in the order that it is to be in."""
        return SequentialSampler(self.train_dataset)

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        """Nothing is wrong with a checkpoint that lacks a tied head; other parts can't be missing from our own."""

    @torch.no_grad()
    def held_out_divergences(self) -> dict[str, float]:
        """Divergence on what is held out of each text, in nats."""
        self.model.eval()
        found: dict[str, float] = {}
        for name, samples in self.eval_dataset.items():
            total = 0.0
            for part in samples.split(self.args.per_device_eval_batch_size):
                ids = part.to(self.args.device)
                if self._translation is None:
                    loss = divergence(*self._predictions(self.model, ids))
                else:
                    loss = self._divergence_in_pieces(self.model, ids, self._translation, None, 0.0)
                total += float(loss) * len(part)
            found[name] = total / len(samples)
        return found

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """Divergence on what is held out of each text, and their mean."""
        each = self.held_out_divergences()
        metrics = {f"eval_{name}": value for name, value in each.items()}
        metrics[DIVERGENCE] = sum(each.values()) / len(each)
        self.log({**metrics, _SPENT: self.clock.spent, _BEGUN: self.clock.begun})
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics


class _Timing(TrainerCallback):
    """Evaluates, saves and ends by the clock, and shows how far it is."""

    def __init__(self, clock: Clock):
        self._clock = clock
        self._next = 0.0
        self._progress: tqdm | None = None
        self._worse = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        done = self._clock.share(state.global_step)
        self._next = (math.floor(done * _EVALUATIONS) + 1) / _EVALUATIONS
        by_steps = self._clock.steps is not None
        self._progress = tqdm(
            total=self._clock.steps if by_steps else round(self._clock.seconds or 0),
            initial=state.global_step if by_steps else round(self._clock.spent),
            desc="Distilling",
            unit="step" if by_steps else "s",
            disable=progress_disabled(),
        )

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        share = self._clock.share(state.global_step)
        if self._progress is not None:
            now = state.global_step if self._clock.steps is not None else round(self._clock.spent)
            self._progress.update(max(0, min(now, self._progress.total) - self._progress.n))
        if share >= self._next:
            self._next = (math.floor(share * _EVALUATIONS) + 1) / _EVALUATIONS
            control.should_evaluate = control.should_save = True
        if share >= 1:
            control.should_evaluate = control.should_save = control.should_training_stop = True

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
        if self._progress is not None and logs and "loss" in logs:
            self._progress.set_postfix(loss=f"{logs['loss']:.3f}")

    def on_evaluate(
        self, args: Any, state: Any, control: Any, metrics: dict[str, float] | None = None, **_: Any
    ) -> None:
        found = metrics or {}
        told = ", ".join(
            f"{key.removeprefix('eval_')} {value:.4f}" for key, value in found.items() if key != DIVERGENCE
        )
        logger.info("Step %d, held out (nats): %s.", state.global_step, told)
        # The trainer looks at the metric after this, so what is best so far is that of before.
        best = state.best_metric
        is_finite = math.isfinite(found[DIVERGENCE])
        if not is_finite and best is None:
            logger.warning("The predictions aren't finite: training ends.")
            control.should_training_stop = True
        is_worse = not is_finite or (best is not None and found[DIVERGENCE] > _WORSE * best)
        self._worse = self._worse + 1 if is_worse else 0
        if self._worse >= _PATIENCE:
            logger.warning("It only gets worse: training ends, and the best checkpoint is kept.")
            control.should_training_stop = True

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self._progress is not None:
            self._progress.close()


def arguments(
    folder: Path,
    *,
    batch_size: int,
    accumulation: int,
    evaluated: int,
    learning_rate: float,
    steps: int,
    seed: int,
    use_cpu: bool,
) -> TrainingArguments:
    """Settings of the `Trainer`.

    Args:
        folder: for checkpoints.
        batch_size: samples that are looked at together.
        accumulation: times that many make a step.
        evaluated: samples that are looked at together where nothing is trained.
        learning_rate: the largest.
        steps: at most.
        seed: of what is random beside the samples' order.
        use_cpu: even if there is a GPU.
    """
    never = 2**31
    found = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=batch_size,
        per_device_eval_batch_size=evaluated,
        gradient_accumulation_steps=accumulation,
        learning_rate=learning_rate,
        max_steps=steps,
        seed=seed,
        weight_decay=0.0,
        adam_beta2=0.98,
        max_grad_norm=1.0,
        optim="adamw_torch_fused",
        # The clock decides when; what is best is taken at the end.
        eval_strategy="steps",
        eval_steps=never,
        save_strategy="steps",
        save_steps=never,
        save_total_limit=1,
        load_best_model_at_end=True,
        metric_for_best_model=DIVERGENCE,
        greater_is_better=False,
        logging_strategy="steps",
        logging_steps=10,
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=False,
        use_cpu=use_cpu,
    )
    # One GPU, however many there are: the trainer would share a step's samples among all of them, and wait more than
    # it gains.
    found._n_gpu = min(found.n_gpu, 1)
    return found
