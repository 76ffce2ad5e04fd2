"""The README of a pruned checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData

from optimum_comp.configuration import CompConfig
from optimum_comp.report.run import CompReport, told_name


_TEXT = """# {title}

{base} made smaller with [COMP](https://arxiv.org/abs/2501.15255) structured pruning by
optimum-comp. It is a plain `transformers` checkpoint:

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{name}")
tokenizer = AutoTokenizer.from_pretrained("{name}")
```

| | before | after |
| --- | --- | --- |
| parameters | {parameters_before:,} | {parameters_after:,} |
| decoder layers | {layers_before} | {layers_after} |
{units}

| | |
| --- | --- |
| sparsity of the decoder layers, asked | {requested:.4f} |
| sparsity of the decoder layers, achieved | {achieved:.4f} |
| neuron metric | {metric} |
| recovery | {recovery} |
| layers removed | {removed} |
| calibration | {calibration} |
| largest relative output error of a layer | {worst:.2%} |

`comp_config.json` holds all settings, `comp_report.json` what was kept, scores and versions. Nothing was trained;
measure the result on your own text with `optimum-cli comp eval` before you rely on it.
"""

CARD = "README.md"
_UNTRAINED = "Nothing was trained;"


_UNITS = {"ffn": "feed-forward width", "heads": "query heads", "kv": "key-value heads"}


def trained_card(card: str, teacher: str, steps: int, tokens: int, texts: Sequence[str]) -> str:
    """A pruned model's card after distillation.

    Args:
        card: as pruning wrote it; as it is, if it says nothing of training.
        teacher: the model whose predictions were learnt.
        steps: of the optimizer.
        tokens: that were trained on.
        texts: names of the sources.
    """
    trained = (
        f"Then {steps:,} steps on {tokens:,} tokens of text ({', '.join(texts)}) taught it the predictions of "
        f"`{teacher}` (`comp_distil.json`);"
    )
    return card.replace(_UNTRAINED, trained)


_CUT = """# {title}

{base} with fewer tokens, made by optimum-comp. It is a plain `transformers` checkpoint, with its tokenizer:

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("this-folder")
tokenizer = AutoTokenizer.from_pretrained("this-folder")
```
"""
_CUT_NOTE = """
Of {before:,} tokens {after:,} stayed (by {chosen}), which takes {less:.1%} of the parameters. A text whose tokens all
stayed is read as before, any other one in smaller pieces. Perplexity isn't comparable with that of the model before;
bits per byte are (`optimum-cli comp eval`). `comp_vocabulary.json` holds the tokens' ids before.
"""


def cut_card(card: str | None, model: str, before: int, after: int, chosen: str, less: float) -> str:
    """The card of a model with fewer tokens.

    Args:
        card: as pruning wrote it; `None` where the model wasn't pruned.
        model: name of the model before.
        before: tokens that it had.
        after: tokens that it has.
        chosen: what chose them.
        less: share of the parameters that went.
    """
    if card is None:
        card = _CUT.format(title=f"{model}, {after:,} tokens", base=f"`{model}`")
    return card + _CUT_NOTE.format(before=before, after=after, chosen=chosen, less=less)


def model_card(report: CompReport, config: CompConfig, base_model: str | None) -> ModelCard:
    """A model card with the run's numbers.

    Args:
        report: what was done.
        config: what was asked.
        base_model: hub id or folder of the dense model; only a hub id goes into the card's metadata.
    """
    is_local = base_model is None or Path(base_model).exists()
    name = told_name(base_model) if base_model else report.model_type
    title = f"{name.rpartition('/')[2]}, {report.achieved_sparsity:.0%} pruned"
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["comp", "structured-pruning", "optimum-comp"],
        base_model=None if is_local else base_model,
    )
    source = report.calibration
    text = _TEXT.format(
        title=title,
        name="this-folder",
        base=f"`{name}`" if base_model else f"A {name} model",
        parameters_before=report.parameters_before,
        parameters_after=report.parameters_after,
        layers_before=len(report.layers) + len(report.removed_layers),
        layers_after=len(report.layers),
        units="\n".join(f"| {_UNITS[kind]} | {before} | {after} |" for kind, (before, after) in report.units.items()),
        requested=report.requested_sparsity,
        achieved=report.achieved_sparsity,
        metric=config.resolved_neuron_metric,
        recovery=config.recovery,
        removed=", ".join(map(str, report.removed_layers)) or "none",
        calibration=f"{source['source']}: {source['num_samples']} × {source['sequence_length']} tokens"
        + (f", each sample beginning with `{source['start']}`" if source.get("begins_with") else ""),
        worst=max(each.relative_error for layer in report.layers for each in layer.decisions),
    )
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text}")
