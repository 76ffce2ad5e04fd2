"""Of several ways to split a budget, each is tried: pruned with a part of the samples, and measured on others."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from optimum_comp.configuration import CompConfig
from optimum_comp.families.cutting import cut_meanwhile
from optimum_comp.report.run import LayerReport
from optimum_comp.sweep.folding import Factors
from optimum_comp.sweep.loop import Through, sweep
from optimum_comp.sweep.pruning import LayerState, PruningRun
from optimum_comp.sweep.settling import TRIAL_SAMPLES, TRIAL_TOKENS_PER_CHANNEL, Settled
from optimum_comp.sweep.states import ActivationStore, rows_of
from optimum_comp.sweep.stopwatch import Stopwatch


class Trials:
    """Tries of one run.

    Args:
        run: that has to choose.
        tokens: all calibration samples, `[samples, length]`.
        neurons: that a layer has.
    """

    def __init__(self, run: PruningRun, tokens: Tensor, neurons: int):
        stride = max(2, tokens.numel() // (TRIAL_TOKENS_PER_CHANNEL * neurons))
        # Never fewer to prune with than to measure on.
        self._run, self._fitted = run, tokens[::stride]
        others = tokens[1::stride][:TRIAL_SAMPLES]
        self.can_be_made = len(others) >= run.ranks.size
        self._held_out = _HeldOut(run, others if self.can_be_made else others[:0])

    def measure(self, settled: Settled) -> float:
        """How far what is left is from the dense model, in nats a token, pruned and measured on different samples."""
        with self._run.clock("trying"):
            return _Trial(self._run, settled, self._fitted, self._held_out).divergence()

    def close(self) -> None:
        """Let go of what the dense model makes of the samples that are held out."""
        self._held_out.close()


class _HeldOut:
    """Samples that trials measure on, and what the dense model makes of them, which is worked out once.

    Args:
        run: that has the trials.
        samples: `[samples, length]`.
    """

    def __init__(self, run: PruningRun, samples: Tensor):
        self._run = run
        self.batches = run.ranks.batches(samples, run._plan.batch_size) if len(samples) else []
        self.rows = rows_of(self.batches)
        self.shape = sum(map(len, self.batches)), samples.shape[1], run._hidden
        self._dense: ActivationStore | None = None

    def store(self, run: PruningRun, name: str) -> ActivationStore:
        """A place for their hidden states."""
        return run._made(name, self.shape, run.source.state_dtype, None)

    @property
    def dense(self) -> ActivationStore:
        """Hidden states behind the dense model's last layer."""
        if self._dense is None:
            run, self._dense = self._run, self.store(self._run, "held-out")
            run._runner.embed_all(self.batches, self._dense)
            through = Through(run._runner, self.rows, self._dense, Stopwatch())
            sweep(run.source, range(len(run.source.layers)), through)
        return self._dense

    def close(self) -> None:
        """Let go of them."""
        if self._dense is not None:
            self._dense.close()


class _Trial(PruningRun):
    """A run over fewer samples that keeps nothing; what would be left is measured on others.

    Args:
        run: of which this is a trial; its Fisher information serves here, too.
        settled: what goes from where.
        fitted: samples to prune with, `[samples, length]`.
        held_out: samples to measure on.
    """

    def __init__(self, run: PruningRun, settled: Settled, fitted: Tensor, held_out: _HeldOut):
        config = CompConfig(**{**run.config.fields(), "equalize": False})
        plans = [run._plans[settled.chosen]]
        super().__init__(
            run._runner, config, plans, run._protected, fitted, run._plan, run.ranks, run._folder, None, run._start
        )
        self._doing = "Trying what goes"
        self._fisher = run._fisher
        self._given = dataclasses.replace(settled, chosen=0, weighed=[], tried=[])
        self._held_out = held_out
        self._others = held_out.store(self, "others")

    def divergence(self) -> float:
        """Mean over the tokens held out of the divergence of what is left from the dense model, in nats.

        It tells splits apart by far fewer tokens than the loss of the text's own next tokens would.
        """
        held_out, sums = self._held_out, torch.zeros(2, dtype=torch.float64)
        try:
            dense = held_out.dense
            self._runner.embed_all(held_out.batches, self._others)
            self._run()
            with self.source.outside(head=True):
                for rows, batch in zip(held_out.rows, held_out.batches, strict=True):
                    for number, sample in enumerate(batch.to(self.source.device)):
                        at = slice(rows.start + number, rows.start + number + 1)
                        sums[0] += self._divergence(sample[None], self._read(dense, at), self._read(self._others, at))
                        sums[1] += sample.numel()
        finally:
            self._recorder.close()
            for store in self._stores:
                store.close()
        self.ranks.sum_(sums)
        return float(sums[0] / sums[1])

    def _divergence(self, sample: Tensor, dense: Tensor, left: Tensor) -> float:
        """Summed over a sample's tokens, from hidden states `[1, length, hidden]` that leave the last layer."""
        total, step = 0.0, self._runner.positions_of_gradients
        for first in range(0, sample.shape[1], step):
            part = slice(first, first + step)
            wanted, found = (
                self._runner.logits(sample[:, part], states[:, part]).float().log_softmax(-1)
                for states in (dense, left)
            )
            total += float(functional.kl_div(found, wanted, log_target=True, reduction="sum"))
        return total

    def _settled(self) -> Settled | None:
        return self._given

    def _find_fisher(self) -> None:
        """It is there."""

    def _made(
        self, name: str, shape: tuple[int, int, int], dtype: torch.dtype, folder: Path | None
    ) -> ActivationStore:
        return super()._made(f"trial-{name}", shape, dtype, folder)

    def _record(self, place: int, report: LayerReport) -> None:
        """Nothing is kept."""

    def _commit(self, index: int, at: LayerState, factors: Factors) -> None:
        """Instead, take the samples that are held out through what would be kept."""
        with (
            self.source.layer(index) as layer,
            cut_meanwhile(self.family, self._model_config, layer, at.cuts),
            self.clock("forward"),
        ):
            for rows in self._held_out.rows:
                self._others.write(rows, self._runner.run(index, self._read(self._others, rows)))
