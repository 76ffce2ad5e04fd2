"""Distillation of a folder: opens both models, trains, and writes a plain checkpoint."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from optimum_comp.beginning import Beginning, decide, losses_of_model, start_tokens
from optimum_comp.calibration.mix import Part
from optimum_comp.calibration.self_written import write_self
from optimum_comp.calibration.text import SELF, evenly, tokenize
from optimum_comp.chain_memory import DISTIL, require_memory
from optimum_comp.checkpoint.opening import GENERATION_CONFIG, find_device, open_config, trusted
from optimum_comp.checkpoint.reader import resolve_folder
from optimum_comp.checkpoint.source import ResidentModel, empty_model, multiplies_bfloat16
from optimum_comp.checkpoint.tokenizer import TOKENIZER_FILES, open_tokenizer
from optimum_comp.checkpoint.writer import copy_side_cars, write_portable_config
from optimum_comp.distillation.candidates import Candidates
from optimum_comp.distillation.planning import TOGETHER, check_settings, choose_rank, disk_of, micro_batch
from optimum_comp.distillation.rounding import leave_rounded, round_while_training, rounds_head
from optimum_comp.distillation.settings import DistilSettings
from optimum_comp.distillation.texts import (
    Stream,
    TextBlocks,
    blocks_of,
    names_of,
    pieces_of,
    read_tokens,
    require_blocks,
    sources_of,
)
from optimum_comp.distillation.trainer import Clock, Distiller, arguments, name_best, read_state
from optimum_comp.distillation.translation import Translation
from optimum_comp.families import FFN, family_of
from optimum_comp.families.cutting import dead_units, drop_dead_units, fill_up
from optimum_comp.files import (
    DISTILLATION,
    LOCK,
    atomic_folder,
    check_folder,
    check_model,
    clear_debris,
    durably,
    hold,
)
from optimum_comp.onnx.folders import copy_companions
from optimum_comp.report.model_card import CARD, trained_card
from optimum_comp.report.run import recorded_beginning, told_name
from optimum_comp.strict_json import read_object
from optimum_comp.sweep.memory import check_disk
from optimum_comp.utils import (
    explaining,
    format_bytes,
    get_logger,
    lookup_arguments,
    parameter_count,
    peak_memory_bytes,
    release_free_memory,
    shown,
)
from optimum_comp.vocabulary.expected import expected_tokens


logger = get_logger(__name__)

UNFINISHED = ".unfinished"
"""Beside the output, a folder of this suffix holds the checkpoints of a run that isn't finished."""
_RUN, _BEFORE, _WRITTEN = "run.json", "before.json", "written.safetensors"

_MOST_STEPS = 10**7
_OF_THE_RUN = ("time", "steps", "device", "matmul_dtype")
"""Settings that may be others where a run is gone on with."""
_RELATIVE, _RELATIVE_NEAR = 1.6e-3, 5.3e-4
"""Largest learning rate, relative to the root mean square of the middle one of all weight matrices; measured on
SmolLM2-135M."""
_TEMPERATURE = 0.7
"""Of what the teacher writes: as when somebody asks, since a small model that draws what is unlikely soon talks of
nothing."""
_MISSING, _EXPECTED_SAMPLES = 2**14, 16
"""Of a larger vocabulary's tokens that the student lacks, so many are looked at, beside those that the texts have; and
samples by which those are chosen."""
_ROUNDING_SAMPLES = 48
"""Samples that rounding looks at before it is trained."""


@dataclass(frozen=True)
class Distillation:
    """What a distillation made.

    Attributes:
        output: the folder.
        steps: optimizer steps.
        tokens: that were trained on, repeated ones again.
        seconds: it took, those of earlier parts of the run included.
        before: text -> held-out divergence from the teacher in nats, before training.
        after: the same of the checkpoint that was kept.
        parameters: that were trained.
        peak_memory_bytes: largest memory of the process.
        lora_rank: of low-rank additions that were trained; 0 if all weights were.
        settings: what was asked.
    """

    output: Path
    steps: int
    tokens: int
    seconds: float
    before: dict[str, float]
    after: dict[str, float]
    parameters: int
    peak_memory_bytes: int
    lora_rank: int
    settings: dict[str, Any]

    def headline(self) -> str:
        """What was achieved, in one line."""
        texts = ", ".join(f"{name} {self.before[name]:.3f} -> {value:.3f}" for name, value in self.after.items())
        return (
            f"{self.output}: {self.steps:,} steps, {self.tokens:,} tokens, {self.seconds:.0f} s, peak memory "
            f"{format_bytes(self.peak_memory_bytes)}; divergence from the teacher on text held out (nats): {texts}"
        )

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {**dataclasses.asdict(self), "output": str(self.output)}


def distil(
    model: str | Path,
    teacher: str | Path,
    output: str | Path,
    settings: DistilSettings | None = None,
    *,
    teacher_arguments: Mapping[str, Any] | None = None,
    known: Mapping[str, Tensor] | None = None,
    written: Tensor | None = None,
    max_memory: int | None = None,
    overwrite: bool = False,
    resume: bool = False,
    record: Mapping[str, Any] | None = None,
) -> Distillation:
    """Train a small model on the predictions of the model that it was made from, on text without labels.

    While it runs, checkpoints are in a folder beside the output; after an interruption, `resume` goes on from the
    last one. The one with the least divergence on text that wasn't trained on, averaged over the texts, is kept.

    Args:
        model: folder or hub id of the student.
        teacher: folder or hub id of the teacher; the student's vocabulary has to be the same, or a
            part of it that `shrink_vocabulary` left.
        output: folder to make: a plain checkpoint with the student's tokenizer and side-cars.
        settings: how.
        teacher_arguments: passed on to the teacher's `from_pretrained`.
        known: tokens of sources that only memory holds, by the name that `settings.text` gives them.
        written: tokens that the teacher has written already, to be trained on, too, where the text is `self`,
            `[blocks, length]`.
        max_memory: bytes that the process may take in all; what is free, if `None`.
        overwrite: replace a model that is in `output`, and an unfinished run that isn't to be gone on with or was
            begun otherwise.
        resume: go on with an unfinished run, if there is one.
        record: what the output is to be known by.

    Raises:
        FileExistsError: the output, or an unfinished run, is there.
        ValueError: the student knows tokens that the teacher doesn't, too little text or memory, or an unfinished
            run that was made otherwise.
        ImportError: LoRA without `peft`.
        OSError: a model or a text can't be read, or nothing can be written.
    """
    return _Run(
        str(model),
        str(teacher),
        Path(output),
        settings or DistilSettings(),
        dict(teacher_arguments or {}),
        dict(known or {}),
        written,
        max_memory,
        overwrite,
        resume,
        record,
    ).run()


class _Run:
    """One distillation."""

    def __init__(
        self,
        model: str,
        teacher: str,
        output: Path,
        settings: DistilSettings,
        teacher_arguments: dict[str, Any],
        known: dict[str, Tensor],
        written: Tensor | None,
        max_memory: int | None,
        overwrite: bool,
        resume: bool,
        record: Mapping[str, Any] | None,
    ):
        self.model, self.teacher, self.output, self.settings = model, teacher, output, settings
        self.teacher_arguments, self.known, self.written = teacher_arguments, known, written
        self.max_memory = max_memory
        self.overwrite, self.resume, self.record = overwrite, resume, record
        self.work = output.resolve().with_name(output.resolve().name + UNFINISHED)

    def run(self) -> Distillation:
        """Refuse what can be refused, then train."""
        sources = [each for each in (self.model, self.teacher) if Path(each).exists()]
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise ValueError("distillation runs in one process; start it without torchrun or accelerate launch.")
        check_folder(self.output, overwrite=self.overwrite, sources=sources)
        for each in (self.model, self.teacher):
            check_model(each)
        device = find_device(self.settings.device)
        if device.index:
            raise ValueError(
                f"device={self.settings.device!r} is not valid here: training takes the first GPU that it sees; give "
                f"cuda, with CUDA_VISIBLE_DEVICES={device.index}."
            )
        tokenizer = open_tokenizer(self.model)
        parts = sources_of(self.settings.text)
        rank = self._plan(parts)
        tokenizer, translation = self._reading(tokenizer)
        # Of files, now: what is wrong with them is known before a model is loaded.
        known = dict(self.known)
        for part in parts:
            if part.source != SELF and part.source not in known:
                known[part.source] = read_tokens(part.source, self.settings.text_column, tokenizer)
                require_blocks(
                    known[part.source].numel(), part.source, self.settings.sequence_length, start_tokens(tokenizer)
                )
        going_on = self._unfinished()
        with hold(self.work):
            clear_debris(self.output)
            if not going_on:
                self._clear()
            with durably(self.work / _RUN) as partial:
                told = {"identity": self._identity(), "lora_rank": rank}
                partial.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
            try:
                with self._leaving_nothing():
                    found = self._train(parts, known, tokenizer, translation, device, rank, sources)
            except KeyboardInterrupt as error:
                raise KeyboardInterrupt(self.hint()) from error
            except FloatingPointError:
                # No checkpoint is of any use then.
                self._clear()
                raise
            except (OSError, RuntimeError) as error:
                if isinstance(error, torch.OutOfMemoryError):
                    error = RuntimeError(f"{str(error).splitlines()[0]} Take a smaller batch_size.")
                if self._last_checkpoint() is None:
                    raise error
                kind = OSError if isinstance(error, OSError) else RuntimeError
                raise kind(f"{error}\n{self.hint()}") from error
            self._clear()
        return found

    @contextlib.contextmanager
    def _leaving_nothing(self) -> Iterator[None]:
        """Of a failure, nothing is left but what a run that is gone on with can use."""
        try:
            yield
        except BaseException:
            if self._last_checkpoint() is None and not (self.work / _WRITTEN).is_file():
                self._clear()
            raise

    def _last_checkpoint(self) -> Path | None:
        """The last checkpoint that is complete: what the trainer writes last is there, and can be read."""
        steps = {}
        for path in self.work.glob("checkpoint-*"):
            number = path.name.removeprefix("checkpoint-")
            with contextlib.suppress(OSError, ValueError):
                if number.isdecimal() and read_state(path):
                    steps[int(number)] = path
        return steps[max(steps)] if steps else None

    def hint(self) -> str:
        """What is kept, and how to go on."""
        last = self._last_checkpoint()
        if last is None:
            written = (self.work / _WRITTEN).is_file()
            kept = f"what the teacher has written is kept in {self.work}; go on with --resume."
            return kept if written else "no checkpoint was written yet; nothing is left."
        return f"{last.name} is kept in {self.work}; go on with --resume."

    def _identity(self) -> dict[str, Any]:
        """What has to be the same for a run to be gone on with; more time, or steps, may be given."""

        def lasting(settings: Mapping[str, Any]) -> dict[str, Any]:
            return {name: value for name, value in settings.items() if name not in _OF_THE_RUN}

        if self.record is None:
            return {"model": self.model, "teacher": self.teacher, "settings": lasting(self.settings.to_dict())}
        # A chain's record says of what, whatever the folders are called by now.
        return {"parent": self.record.get("parent"), "settings": lasting(self.record.get("settings") or {})}

    def _earlier(self) -> dict[str, Any]:
        """What an unfinished run wrote down; nothing if there is none, or if it can't be read."""
        try:
            return read_object(self.work / _RUN)
        except (OSError, ValueError):
            return {}

    def _unfinished(self) -> bool:
        """Whether there is a run to go on with.

        Raises:
            FileExistsError: there is one, and it isn't asked for.
            ValueError: it was begun otherwise.
        """
        left = {LOCK, f".{_RUN}.partial"}
        if not self.work.exists() or all(path.name in left for path in self.work.iterdir()):
            return False
        there = self._earlier()
        if not isinstance(there.get("identity"), dict):
            raise FileExistsError(
                f"{self.work} is in the way: checkpoints are kept there, and what it holds isn't a distillation. Move "
                "it, or choose another output folder."
            )
        asked = json.loads(json.dumps(self._identity()))
        if self.resume and there["identity"] == asked:
            return True
        if self.overwrite:
            return False
        if not self.resume:
            raise FileExistsError(
                f"{self.work} holds an unfinished distillation. Go on with it: --resume; or start anew: --overwrite."
            )
        then = {**there["identity"], **(there["identity"].get("settings") or {})}
        now = {**asked, **asked["settings"]}
        names = [name for name in {**then, **now} if name != "settings" and then.get(name) != now.get(name)]
        raise ValueError(
            f"the unfinished distillation in {self.work} was begun with other settings ({', '.join(names)}); go on "
            "with those, or start anew: --overwrite."
        )

    def _clear(self) -> None:
        """Remove checkpoints and what the teacher has written."""
        for path in self.work.iterdir() if self.work.is_dir() else ():
            if path.is_dir() and path.name.startswith("checkpoint-"):
                shutil.rmtree(path)
        for name in (_WRITTEN, _BEFORE, _RUN):
            (self.work / name).unlink(missing_ok=True)

    def _plan(self, parts: list[Part]) -> int:
        """Say what it will take, and refuse what can't be done; returns the rank of LoRA, 0 for none."""
        settings, loading = self.settings, self.teacher_arguments
        student_config, teacher_config = (
            open_config(self.model, {}),
            open_config(self.teacher, lookup_arguments(loading)),
        )
        check_settings(student_config, teacher_config, settings)
        trust = {name: value for name, value in loading.items() if name == "trust_remote_code"}
        student = empty_model(student_config, torch.float32)
        teacher = empty_model(teacher_config, torch.float32, **trust)
        writes = any(part.source == SELF for part in parts)
        earlier = self._earlier().get("lora_rank") if self.resume else None
        if earlier is not None and settings.lora_rank is None:
            settings = dataclasses.replace(settings, lora_rank=earlier)
        rank, needed = choose_rank(student, teacher, settings, self.max_memory, written=writes)
        if rank and self.settings.lora_rank is None:
            logger.info("All weights don't fit into memory: low-rank additions (rank %d) are trained instead.", rank)
        if (settings.device or "cpu") == "cpu":
            require_memory({DISTIL: needed}, self.max_memory)
        there = sum(path.stat().st_size for path in self.work.rglob("*") if path.is_file())
        disk = disk_of(parameter_count(student), rank)
        check_disk(self.output, max(0, disk - there))
        logger.info(
            "Distilling %s on the predictions of %s: %s, about %s of memory and, for checkpoints, %s of disk.",
            shown(self.model),
            shown(self.teacher),
            f"{settings.seconds:.0f} s" if settings.seconds is not None else f"{settings.steps:,} steps",
            format_bytes(needed),
            format_bytes(disk),
        )
        return rank

    def _reading(self, own: Any) -> tuple[Any, Translation | None]:
        """The tokenizer that texts are read and written with, and what its tokens are to the student.

        A teacher of more tokens than the student has reads as it is used to, and text that is tokens already is read
        anew; else there is nothing to translate.

        Raises:
            ValueError: the student's vocabulary isn't a part of the teacher's.
        """
        lookup = lookup_arguments(self.teacher_arguments)
        tokens, rows = open_config(self.model, {}).vocab_size, open_config(self.teacher, lookup).vocab_size
        if tokens == rows:
            return own, None
        theirs = open_tokenizer(self.teacher, lookup)
        translation = Translation.between(theirs, own, rows, tokens)
        self.known = {name: _read_again(each, own, theirs) for name, each in self.known.items()}
        self.written = None if self.written is None else _read_again(self.written, own, theirs)
        return theirs, translation

    def _train(
        self,
        parts: list[Part],
        known: Mapping[str, Tensor],
        tokenizer: Any,
        translation: Translation | None,
        device: torch.device,
        rank: int,
        sources: list[str],
    ) -> Distillation:
        from transformers import AutoModelForCausalLM, GenerationConfig, set_seed

        settings = self.settings
        started = time.monotonic()
        with explaining(f"the teacher {shown(self.teacher)} can't be loaded"):
            given = {"dtype": "auto", **self.teacher_arguments}
            teacher = AutoModelForCausalLM.from_pretrained(self.teacher, **trusted(self.teacher, given))
        teacher = teacher.float().to(device).eval().requires_grad_(False)
        texts = self._texts(parts, known, tokenizer, translation, teacher)
        written = time.monotonic() - started
        if settings.seconds is not None and written > settings.seconds / 2:
            logger.warning(
                "Reading and writing text took %.0f of %.0f s; little is left to train in. Give text, more time, or "
                "fewer written_tokens.",
                written,
                settings.seconds,
            )
        with explaining(f"the model {shown(self.model)} can't be loaded"):
            student = AutoModelForCausalLM.from_pretrained(self.model, **trusted(self.model, {"dtype": "auto"}))
        stored = student.dtype
        # Transformers reads some that it refuses to write; the student's own is copied at the end.
        student.generation_config = GenerationConfig()
        student = student.float().to(device)
        family = family_of(student.config)
        # Zeros that fill a layer up would only cost time, and lie in the blocks that are rounded.
        layers = family.get_layers(student)
        widths = [family.counts(student.config, layer)[FFN] for layer in layers]
        drop_dead_units(family, student)
        if not rounds_head(settings.rounding):
            for module in (student.get_input_embeddings(), student.get_output_embeddings()):
                if module is not None:
                    module.weight.requires_grad_(False)
        if settings.rounding is not None:
            looked_at = _spread([text.train for text in texts], _ROUNDING_SAMPLES)
            if translation is not None:
                looked_at = translation.blocks_of(looked_at)
            round_while_training(student.eval(), family, settings.rounding, looked_at)
        set_seed(settings.seed)
        dead = dead_units(family, student)
        # Nothing was pruned, so that the student is the teacher but for its tokens.
        is_whole = translation is not None and _size(layers) == _size(family.get_layers(teacher))
        rate = settings.learning_rate or learning_rate(layers, is_near=is_whole or settings.rounding is not None)
        if rank:
            student = _with_lora(student, rank)
        trained = sum(each.numel() for each in student.parameters() if each.requires_grad)
        checkpoint = self._last_checkpoint()
        clock = Clock(settings.steps, settings.seconds, time.monotonic() - started)
        vocabulary = student.config.vocab_size
        seen, broken = [text.train for text in texts], None
        if translation is not None:
            # The student's family is the teacher's, too.
            expected = expected_tokens(ResidentModel(teacher, family), _spread(seen, _EXPECTED_SAMPLES))
            broken = translation.likeliest(expected, seen, _MISSING)
            logger.info(
                "The student lacks %s of the teacher's tokens, and reads these words in pieces; it is trained "
                "on the %s that are likeliest.",
                f"{len(translation.broken()):,}",
                f"{len(broken):,}",
            )
            # The pieces of words that are put into samples, too.
            seen = [translation.pieces_of(each).tokens for each in (*seen, broken[None])]
        candidates = Candidates(seen, vocabulary, settings.seed)
        # Of the two vocabularies, the teacher's is the larger one.
        whole = teacher.config.vocab_size
        compared = len(candidates) + (0 if broken is None else len(broken))
        heads = (each.get_output_embeddings() for each in (student, teacher))
        is_part = (candidates.pay or compared < whole // 2) and all(isinstance(head, nn.Linear) for head in heads)
        if is_part:
            logger.info("Predictions are compared over %s of %s tokens in a step.", f"{compared:,}", f"{whole:,}")
        micro = micro_batch(settings, compared if is_part else whole)
        steps = settings.steps or _MOST_STEPS
        products = _products(settings, device)
        _narrow_factors(teacher, products)
        trainer = Distiller(
            teacher=teacher,
            clock=clock,
            products=products,
            labels=settings.labels,
            candidates=candidates if is_part else None,
            translation=translation,
            broken=broken,
            model=student,
            args=arguments(
                self.work,
                batch_size=micro,
                accumulation=settings.batch_size // micro,
                evaluated=micro_batch(settings, whole),
                learning_rate=rate,
                steps=steps,
                seed=settings.seed,
                use_cpu=device.type == "cpu",
            ),
            train_dataset=Stream(texts, steps * settings.batch_size, settings.seed),
            eval_dataset={text.name: text.held_out for text in texts},
        )
        before, took = self._before(trainer)
        # The last evaluation, and that of what is kept, are part of the time.
        clock.reserve(2 * took)
        if checkpoint is not None:
            clock.go_on(checkpoint)
            name_best(checkpoint)
            logger.info("Going on after %s.", checkpoint.name)
        else:
            clock.begun = clock.spent
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        student, made = trainer.model, trainer.state.global_step
        after = trainer.held_out_divergences()
        if not all(math.isfinite(value) for value in after.values()):
            raise FloatingPointError("the trained model's predictions aren't finite; take a smaller learning_rate.")
        if sum(after.values()) > sum(before.values()):
            logger.warning(
                "What was trained is farther from the teacher than it was (%.3f nats on average, %.3f before)%s. Give "
                "it more time or text, or a smaller learning_rate than %.2g.",
                sum(after.values()) / len(after),
                sum(before.values()) / len(before),
                ", which the text's own tokens may be worth" if settings.labels else "",
                rate,
            )
        if rank:
            student = student.merge_and_unload()
            # Low-rank additions know nothing of the zeros that fill up a layer.
            with torch.no_grad():
                for layer, mask in zip(family.get_layers(student), dead, strict=True):
                    family.ffn.consumer.matrix(layer)[:, mask] = 0
        leave_rounded(student)
        fill_up(family, student, widths)
        result = Distillation(
            output=self.output,
            steps=made,
            tokens=made * settings.tokens_of_a_step,
            seconds=clock.spent,
            before=before,
            after=after,
            parameters=trained,
            peak_memory_bytes=peak_memory_bytes(),
            lora_rank=rank,
            settings=settings.to_dict(),
        )
        del teacher, trainer
        release_free_memory()
        # A rounded weight of half precision would lie beside its grid.
        self._save(student.to(stored) if settings.rounding is None else student, result, texts, sources)
        return result

    def _before(self, trainer: Distiller) -> tuple[dict[str, float], float]:
        """The divergences before the first step, and the seconds that it took to find them.

        Of a run that is gone on with, those that were written down.
        """
        path = self.work / _BEFORE
        if path.is_file():
            told = read_object(path)
            return dict(told["divergences"]), float(told["seconds"])
        started = time.monotonic()
        found = trainer.held_out_divergences()
        seconds = time.monotonic() - started
        with durably(path) as partial:
            partial.write_text(json.dumps({"divergences": found, "seconds": seconds}), encoding="utf-8")
        return found, seconds

    def _texts(
        self,
        parts: list[Part],
        known: Mapping[str, Tensor],
        tokenizer: Any,
        translation: Translation | None,
        teacher: Any,
    ) -> list[TextBlocks]:
        """All texts in blocks; those that the teacher writes are kept for a run that is gone on with."""
        settings = self.settings
        tokens = {
            part.source: known[part.source] if part.source in known else self._written(tokenizer, teacher)
            for part in parts
        }
        beginning = recorded_beginning(self.model) if Path(self.model).is_dir() else None
        if beginning is not None and translation is not None:
            start = tuple(translation.back[list(beginning.tokens)].tolist())
            beginning = dataclasses.replace(beginning, tokens=start)
        if beginning is None:
            pieces = pieces_of([each.flatten() for each in tokens.values()], settings.sequence_length)
            beginning = decide("auto", tokenizer, pieces, losses_of_model(teacher), "Samples")
        return [
            blocks_of(tokens[part.source], name, part.share, settings, beginning or Beginning(), len(parts))
            for part, name in zip(parts, names_of(parts), strict=True)
        ]

    def _written(self, tokenizer: Any, teacher: Any) -> Tensor:
        """What the teacher writes, `[tokens]`: through its chat template if it has one."""
        path, settings = self.work / _WRITTEN, self.settings
        if path.is_file():
            return load_file(path)["tokens"]
        samples = max(2, -(-settings.written_tokens // settings.sequence_length))
        # Other requests than a seed as it is has given to calibration.
        shape = (samples, settings.sequence_length, settings.seed + 1)
        made = write_self(teacher, tokenizer, *shape, temperature=_TEMPERATURE, together=min(TOGETHER, samples))
        if self.written is not None:
            made = torch.cat([self.written.flatten(), made.flatten()])
        with durably(path) as partial:
            save_file({"tokens": made.contiguous()}, partial)
        return made

    def _save(self, student: Any, result: Distillation, texts: list[TextBlocks], sources: list[str]) -> None:
        with atomic_folder(self.output, overwrite=self.overwrite, sources=sources, record=self.record) as folder:
            student.save_pretrained(folder)
            write_portable_config(folder / "config.json")
            source = resolve_folder(self.model, {}, (*TOKENIZER_FILES, "*.json", CARD))
            (folder / GENERATION_CONFIG).unlink(missing_ok=True)
            copy_companions(source, folder)
            copy_side_cars(source, folder)
            told: dict[str, Any] = {
                "teacher": told_name(self.teacher),
                **{name: value for name, value in result.to_dict().items() if name != "output"},
                "texts": {
                    text.name: {"share": text.share, "samples": len(text.train), "held_out": len(text.held_out)}
                    for text in texts
                },
            }
            card = source / CARD
            if card.is_file():
                text = trained_card(
                    card.read_text(encoding="utf-8"),
                    told["teacher"],
                    result.steps,
                    result.tokens,
                    [text.name for text in texts],
                )
                (folder / CARD).write_text(text, encoding="utf-8")
            (folder / DISTILLATION).write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")


def _read_again(tokens: Tensor, own: Any, other: Any) -> Tensor:
    """Tokens of one tokenizer as another reads their text, `[n]`."""
    rows = tokens if tokens.dim() > 1 else tokens[None]
    texts = (own.decode(row.tolist(), clean_up_tokenization_spaces=False) for row in rows)
    return torch.cat([tokenize(other, text) for text in texts])


def _size(layers: Iterable[nn.Module]) -> int:
    return sum(each.numel() for layer in layers for each in layer.parameters())


def learning_rate(layers: Iterable[nn.Module], *, is_near: bool) -> float:
    """The largest learning rate: a share of the weights' own size, since AdamW's steps are of one size for all.

    A model whose weights are a fifth as large needs steps a fifth as large, most of all where they are rounded to a
    grid that is as much finer; as Adafactor's relative step sizes (arXiv 1804.04235).

    Args:
        layers: decoder layers.
        is_near: weights are near the teacher's already: rounded ones, and those of which nothing was pruned.
    """
    sizes = [
        float(each.detach().square().mean().sqrt())
        for layer in layers
        for each in layer.parameters()
        if each.dim() == 2
    ]
    return (_RELATIVE_NEAR if is_near else _RELATIVE) * sorted(sizes)[len(sizes) // 2]


def _products(settings: DistilSettings, device: torch.device) -> torch.dtype:
    """What factors of matrix products are rounded to."""
    if settings.matmul_dtype != "auto":
        return torch.bfloat16 if settings.matmul_dtype == "bfloat16" else torch.float32
    has = torch.cuda.is_bf16_supported() if device.type == "cuda" else multiplies_bfloat16(device)
    return torch.bfloat16 if has else torch.float32


def _narrow_factors(teacher: nn.Module, dtype: torch.dtype) -> None:
    """Store a frozen model's factors of products as the products round them, once and not for every step."""
    for module in teacher.modules():
        if isinstance(module, nn.Linear) and module.weight.dtype != dtype:
            # A tied embedding keeps its precision: what it gives isn't a factor.
            module.weight = nn.Parameter(module.weight.to(dtype), requires_grad=False)


def _spread(texts: Sequence[Tensor], count: int) -> Tensor:
    """Samples spread over all texts, `[about count, length]`."""
    each = -(-count // len(texts))
    return torch.cat([evenly(text, each) for text in texts])


def _with_lora(student: Any, rank: int) -> Any:
    """The student with low-rank additions to all its dense layers, which alone are trained."""
    from peft import LoraConfig, get_peft_model

    chosen = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")
    return get_peft_model(student, chosen)
