"""Distillation: the loss against torch's own, training on tiny models, going on after an interruption, rounding."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import run, tiny_blocks, tiny_model, tiny_tokenizer
from exports import stored_scales
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from tiny_families import tiny_family
from torch.nn import functional
from transformers import AutoModelForCausalLM

from optimum_comp import CompConfig, CompPruner
from optimum_comp.calibration.self_written import _own_requests, converse
from optimum_comp.core.distillation import divergence
from optimum_comp.core.rounding import compensated, nearest, on_grid, straight_through, within_its_codes
from optimum_comp.distillation import candidates, trainer
from optimum_comp.distillation.candidates import Candidates, predicting
from optimum_comp.distillation.planning import memory_of, micro_batch
from optimum_comp.distillation.run import distil, learning_rate
from optimum_comp.distillation.settings import DistilSettings
from optimum_comp.distillation.texts import Stream, TextBlocks, sources_of
from optimum_comp.families import family_of
from optimum_comp.families.cutting import dead_units, parameter_shapes


TEXT = "The cat sat on the mat and looked at the moon; nobody knew what it thought of the stars.\n" * 40
SMALL = {"sequence_length": 32, "learning_rate": 0.003, "matmul_dtype": "float32", "labels": 0.0}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A teacher that predicts something, a student that was pruned from it, and a text."""
    folder = tmp_path_factory.mktemp("models")
    model = tiny_model("llama")
    for parameter in model.parameters():
        if parameter.dim() == 2:
            parameter.data *= 6
    model.save_pretrained(folder / "dense")
    tiny_tokenizer().save_pretrained(folder / "dense")
    (folder / "text.txt").write_text(TEXT)
    pruner = CompPruner.from_pretrained(str(folder / "dense"))
    config = CompConfig(sparsity=0.4, num_samples=8, sequence_length=32, round_to=8, begin="never")
    pruner.prune(config, str(folder / "text.txt"), output=folder / "pruned")
    own = CompConfig(**{**config.fields(), "axes": ["ffn"], "allocation": "adaptive"})
    pruner = CompPruner.from_pretrained(str(folder / "dense"))
    pruner.prune(own, str(folder / "text.txt"), output=folder / "adaptive")
    return folder


NAME = "pruned-distilled-for-int4"


def distilled(
    models: Path, output: Path, *, student: str = "pruned", overwrite: bool = False, resume: bool = False, **given
):
    given = {"text": [str(models / "text.txt")], **SMALL, **given}
    if "time" not in given:
        given.setdefault("steps", 30)
    chosen = DistilSettings(**given)
    return distil(models / student, models / "dense", output, chosen, overwrite=overwrite, resume=resume)


@settings(deadline=None, max_examples=30)
@given(rows=st.integers(1, 40), vocabulary=st.integers(2, 60), seed=st.integers(0, 99))
def test_the_divergence_and_its_gradient_are_torchs_own(rows, vocabulary, seed):
    generator = torch.Generator().manual_seed(seed)
    student, teacher = (torch.randn(2, rows, vocabulary, generator=generator) * 3 for _ in range(2))
    student.requires_grad_()
    logs = functional.log_softmax(student, -1).flatten(0, 1)
    wanted = functional.log_softmax(teacher, -1).flatten(0, 1)
    expected = functional.kl_div(logs, wanted, reduction="batchmean", log_target=True)
    (gradient,) = torch.autograd.grad(expected, student)
    found = divergence(student, teacher)
    (own,) = torch.autograd.grad(2 * found, student)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(own, 2 * gradient)


def test_the_divergence_is_the_same_in_parts(monkeypatch):
    student, teacher = torch.randn(50, 7), torch.randn(50, 7)
    whole = divergence(student, teacher)
    monkeypatch.setattr("optimum_comp.core.distillation._CHUNK_VALUES", 21)
    torch.testing.assert_close(divergence(student, teacher), whole)


@settings(deadline=None, max_examples=30)
@given(rows=st.integers(1, 20), vocabulary=st.integers(2, 30), share=st.floats(0, 1), seed=st.integers(0, 99))
def test_the_text_counts_for_its_share(rows, vocabulary, share, seed):
    generator = torch.Generator().manual_seed(seed)
    student, teacher = (torch.randn(2, rows, vocabulary, generator=generator) * 3 for _ in range(2))
    labels = torch.randint(-1, vocabulary, (2, rows), generator=generator)
    student.requires_grad_()
    logs, wanted = torch.log_softmax(student, -1), torch.log_softmax(teacher, -1)
    each = (wanted.exp() * (wanted - logs)).sum(-1)
    text = functional.nll_loss(logs.flatten(0, 1), labels.flatten(), ignore_index=-1, reduction="none").view(2, -1)
    expected = torch.where(labels < 0, each, (1 - share) * each + share * text).mean()
    (gradient,) = torch.autograd.grad(expected, student)
    found = divergence(student, teacher, labels, share)
    (own,) = torch.autograd.grad(found, student)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(own, gradient)


def test_tokens_that_are_left_out_are_stood_for():
    student, teacher = torch.randn(2, 5, 6)
    # Every other token stands for itself and one like it.
    whole = [logits.repeat_interleave(2, -1) for logits in (student, teacher)]
    found = divergence(student, teacher, offsets=torch.full((6,), 2.0).log())
    assert torch.allclose(found, divergence(*whole), atol=1e-6)
    uneven = [torch.cat([logits, logits[:, 3:]], -1) for logits in (student, teacher)]
    found = divergence(student, teacher, offsets=torch.tensor([1.0, 1, 1, 2, 2, 2]).log())
    assert torch.allclose(found, divergence(*uneven), atol=1e-6)


def test_two_vocabularies_have_no_divergence():
    with pytest.raises(ValueError, match=r"\[2, 5\] and the teacher's \[2, 6\]; both must have one vocabulary"):
        divergence(torch.zeros(2, 5), torch.zeros(2, 6))


@settings(deadline=None, max_examples=40)
@given(rows=st.integers(1, 9), width=st.integers(1, 100), block=st.sampled_from((16, 32)), seed=st.integers(0, 99))
def test_a_weight_that_was_trained_rounded_is_found_rounded(rows, width, block, seed):
    weight = torch.randn(rows, width, generator=torch.Generator().manual_seed(seed))
    weight[:, : width // 3] *= 0.01
    weight[rows // 2, : block // 2] = 0
    weight.requires_grad_()
    blocks = nearest(weight.detach(), 4, block)
    rounded = straight_through(weight, blocks.scales, 4, block)
    assert torch.equal(rounded, blocks.weight())
    rounded.sum().backward()
    assert torch.equal(weight.grad, torch.ones_like(weight))
    found = on_grid(rounded.detach(), 4, block)
    assert found is not None
    torch.testing.assert_close(found.weight(), rounded.detach(), rtol=1e-6, atol=0)


@settings(deadline=None, max_examples=20)
@given(width=st.integers(1, 70), seed=st.integers(0, 99))
def test_a_weight_may_be_where_its_codes_are_and_as_near_as_can_be(width, seed):
    generator = torch.Generator().manual_seed(seed)
    weight, inputs = torch.randn(6, width, generator=generator), torch.randn(200, width, generator=generator)
    inputs[:, : width // 2] = inputs[:, width // 2 : 2 * (width // 2)]
    blocks = compensated(weight, inputs.T @ inputs, 4, 32)
    found = within_its_codes(weight, blocks)
    assert torch.equal(straight_through(found, blocks.scales, 4, 32), blocks.weight())
    # Nowhere further from what it was than the rounded weight is.
    assert ((found - weight).abs() <= (blocks.weight() - weight).abs() + 1e-6).all()


def test_a_weight_that_was_not_rounded_is_on_no_grid():
    weight = torch.randn(64, 96)
    assert on_grid(weight, 4, 32) is None
    almost = nearest(weight, 4, 32).weight()
    almost[3, 5] += 1e-3
    assert on_grid(almost, 4, 32) is None


def test_the_stream_keeps_to_the_shares_and_repeats_nothing_before_all_were_there():
    texts = [
        TextBlocks("a", 0.75, torch.arange(10)[:, None], torch.zeros(1, 1)),
        TextBlocks("b", 0.25, torch.arange(100, 107)[:, None], torch.zeros(1, 1)),
    ]
    stream = Stream(texts, 400, seed=3)
    seen = [int(stream[place]["input_ids"]) for place in range(len(stream))]
    ours = [each for each in seen if each < 100]
    assert len(ours) == 300
    for epoch in range(30):
        assert sorted(ours[10 * epoch : 10 * epoch + 10]) == list(range(10))
    assert ours[:10] != ours[10:20]
    # Whoever goes on in the middle sees the same.
    again = Stream(texts, 400, seed=3)
    assert [int(again[place]["input_ids"]) for place in range(200, 400)] == seen[200:]


def test_sources_may_be_given_one_by_one_or_as_a_mix():
    def found(*text):
        return {part.source: round(part.share, 6) for part in sources_of(list(text))}

    assert found("self:1,pydoc:2", "x.txt") == {"self": 0.25, "pydoc": 0.5, "x.txt": 0.25}
    assert found("a.txt:0.8", "b.txt:0.2") == {"a.txt": 0.8, "b.txt": 0.2}
    assert found("corpus:2021") == {"corpus:2021": 1}
    assert {part.source for part in sources_of(None)} == {"self", "pydoc"}
    with pytest.raises(ValueError, match="'pydoc' is there twice"):
        found("pydoc", "pydoc:0.5,self:0.5")


def test_files_of_one_name_are_told_apart(models, tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        shutil.copyfile(models / "text.txt", tmp_path / name / "text.txt")
    texts = [str(tmp_path / name / "text.txt") for name in ("a", "b")]
    assert set(distilled(models, tmp_path / "out", text=texts, steps=3).after) == set(texts)


def test_distilling_brings_the_student_nearer(models, tmp_path):
    found = distilled(models, tmp_path / "out")
    assert found.after["text.txt"] < 0.97 * found.before["text.txt"]
    assert found.steps == 30 and found.tokens == 30 * 4 * 32
    # A plain checkpoint of the same shape, with all that says how it was pruned.
    student = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    before = AutoModelForCausalLM.from_pretrained(models / "pruned")
    assert {name: each.shape for name, each in student.state_dict().items()} == {
        name: each.shape for name, each in before.state_dict().items()
    }
    assert torch.equal(student.get_input_embeddings().weight, before.get_input_embeddings().weight)
    for name in ("comp_config.json", "comp_report.json", "tokenizer.json", "generation_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (models / "pruned" / name).read_bytes()
    told = json.loads((tmp_path / "out" / "comp_distil.json").read_text())
    assert told["teacher"] == "dense" and told["after"] == found.after
    # What is held out of the text isn't trained on.
    assert told["texts"]["text.txt"]["held_out"] >= 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


@pytest.mark.parametrize("of_a_large_vocabulary", [False, True], ids=["all", "some"])
def test_a_run_that_is_gone_on_with_ends_where_an_undisturbed_one_does(
    of_a_large_vocabulary, models, tmp_path, monkeypatch
):
    if of_a_large_vocabulary:
        monkeypatch.setattr(candidates, "_DRAWN", 60)
        monkeypatch.setattr(candidates, "_MOST", 1)
    looked_at, of_step = [], Candidates.of_step
    monkeypatch.setattr(Candidates, "of_step", lambda self, step: looked_at.append(step) or of_step(self, step))
    undisturbed = distilled(models, tmp_path / "whole")
    assert undisturbed.after["text.txt"] < 0.97 * undisturbed.before["text.txt"]
    assert looked_at == (list(range(30)) if of_a_large_vocabulary else [])
    on_save = trainer._Timing.on_save

    def interrupted(self, args, state, *rest, **more):
        on_save(self, args, state, *rest, **more)
        if state.global_step >= 15:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(trainer._Timing, "on_save", interrupted)
        with pytest.raises(KeyboardInterrupt, match=r"checkpoint-18 is kept in .*; go on with --resume"):
            distilled(models, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(FileExistsError, match=r"holds an unfinished distillation. Go on with it: --resume; or start"):
        distilled(models, tmp_path / "out")
    with pytest.raises(ValueError, match=r"begun with other settings \(learning_rate\)"):
        distilled(models, tmp_path / "out", resume=True, learning_rate=0.01)
    found = distilled(models, tmp_path / "out", resume=True)
    assert found.steps == 30
    weights = [load_file(tmp_path / name / "model.safetensors") for name in ("whole", "out")]
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "whole"]


def test_an_unfinished_run_can_be_begun_anew(models, tmp_path, monkeypatch):
    def fail(self, *_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(trainer._Timing, "on_evaluate", fail)
        with pytest.raises(KeyboardInterrupt, match="nothing is left"):
            distilled(models, tmp_path / "out")
    assert not list(tmp_path.iterdir())
    (tmp_path / "out.unfinished").mkdir()
    (tmp_path / "out.unfinished" / "thesis.txt").touch()
    with pytest.raises(FileExistsError, match="is in the way"):
        distilled(models, tmp_path / "out")
    assert (tmp_path / "out.unfinished" / "thesis.txt").exists()


def test_time_ends_a_run(models, tmp_path):
    found = distilled(models, tmp_path / "out", time="3s", learning_rate=0.001)
    # No step is begun that would end later.
    assert found.steps >= 1 and 2.5 <= found.seconds < 30


def test_the_best_checkpoint_is_kept(models, tmp_path):
    """With a learning rate that ruins the model after a while, it is not the last one."""
    found = distilled(models, tmp_path / "out", learning_rate=1.0, steps=12)
    student = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    teacher = AutoModelForCausalLM.from_pretrained(models / "dense").eval()
    tokens = torch.tensor(tiny_tokenizer()(TEXT, add_special_tokens=False)["input_ids"])[:320].view(10, 32)
    with torch.no_grad():
        whole = float(divergence(student(tokens).logits, teacher(tokens).logits))
    assert whole == pytest.approx(found.after["text.txt"], rel=0.5)


def test_what_the_teacher_writes_is_a_text(models, tmp_path):
    found = distilled(models, tmp_path / "out", text=["self:0.5", f"{models / 'text.txt'}:0.5"], written_tokens=1024)
    assert set(found.after) == {"self", "text.txt"}


def test_low_rank_additions_are_merged(models, tmp_path):
    pytest.importorskip("peft")
    found = distilled(models, tmp_path / "out", lora_rank=4)
    assert found.after["text.txt"] < found.before["text.txt"]
    whole = sum(each.numel() for each in AutoModelForCausalLM.from_pretrained(tmp_path / "out").parameters())
    assert found.parameters < whole / 2
    assert set(load_file(tmp_path / "out" / "model.safetensors")) == set(
        load_file(models / "pruned" / "model.safetensors")
    )


def test_zeros_that_fill_a_layer_up_are_not_trained(models, tmp_path):
    """Layers are trained at their real widths, and are filled up again afterwards."""
    found = distilled(models, tmp_path / "out", student="adaptive")
    assert found.after["text.txt"] < found.before["text.txt"]
    before, after = (AutoModelForCausalLM.from_pretrained(each) for each in (models / "adaptive", tmp_path / "out"))
    family = family_of(before.config)
    dead = dead_units(family, before)
    assert any(each.any() for each in dead)
    assert [int(each.sum()) for each in dead_units(family, after)] == [int(each.sum()) for each in dead]
    assert before.config.comp_widths == after.config.comp_widths
    whole = sum(each.numel() for each in before.parameters()) - before.get_input_embeddings().weight.numel()
    assert found.parameters < whole
    assert parameter_shapes(after) == parameter_shapes(before)


def test_trained_rounded_weights_lie_on_the_grid(models, tmp_path):
    found = distilled(models, tmp_path / "out", rounding="int4")
    assert found.after["text.txt"] < found.before["text.txt"]
    weights = load_file(tmp_path / "out" / "model.safetensors")
    for name, weight in weights.items():
        path = name.split(".")[-2]
        if path in ("gate_proj", "up_proj", "down_proj", "o_proj"):
            assert on_grid(weight, 4, 32) is not None or on_grid(weight, 4, 16) is not None, name
        elif path in ("q_proj", "k_proj", "v_proj"):
            assert on_grid(weight, 4, 32) is None, name


def test_a_tied_embedding_is_rounded_once_and_trained(models, tmp_path):
    distilled(models, tmp_path / "out", rounding="int4-small", steps=8)
    weights = load_file(tmp_path / "out" / "model.safetensors")
    before = load_file(models / "pruned" / "model.safetensors")
    for name, weight in weights.items():
        if "norm" not in name:
            assert any(on_grid(weight, 4, size) is not None for size in (64, 32, 16)), name
    assert weights.keys() == before.keys()
    assert not torch.equal(weights["model.embed_tokens.weight"], before["model.embed_tokens.weight"])
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.lm_head.weight is model.model.embed_tokens.weight


@pytest.mark.onnx
@pytest.mark.parametrize(
    ("recipe", "student"),
    [
        ("int4", "pruned"),
        ("int4-small", "pruned"),
        ("int4-small", "adaptive"),
        *(pytest.param(name, "pruned", marks=pytest.mark.slow) for name in ("int4-hqq", "int4-rtn")),
    ],
)
def test_the_exported_model_is_the_one_that_was_trained(recipe, student, models, tmp_path):
    """Block by block: what the graph's codes and scales stand for is the checkpoint's weight."""
    import onnx
    from onnx import numpy_helper

    from optimum_comp.onnx.export import export_onnx
    from optimum_comp.onnx.quantization import quantize_onnx

    distilled(models, tmp_path / "out", student=student, rounding=recipe, steps=6)
    export_onnx(tmp_path / "out", tmp_path / "onnx")
    quantize_onnx(tmp_path / "onnx", tmp_path / "few", recipe=recipe, tokens=tiny_blocks(4))
    weights = without_zeros(tmp_path / "out")
    graph = onnx.load(tmp_path / "few" / "model.onnx").graph
    stored = {each.name: numpy_helper.to_array(each) for each in graph.initializer}
    seen: set[str] = set()
    for node in graph.node:
        found = {each.name: onnx.helper.get_attribute_value(each) for each in node.attribute}
        if node.op_type != "MatMulNBits" or found["bits"] != 4:
            continue
        codes, scales = stored[node.input[1]], stored[stored_scales(graph, node)].reshape(found["N"], -1)
        # What was trained is what is stored, in half precision.
        assert scales.dtype == "float16"
        scales = scales.astype("float32")
        pairs = torch.stack([torch.from_numpy(codes & 15), torch.from_numpy(codes >> 4)], -1).flatten(2).float()
        made = ((pairs - 8) * torch.from_numpy(scales.copy())[..., None]).flatten(1)[:, : found["K"]]
        names = _weights_of(node.name)
        torch.testing.assert_close(made, torch.cat([weights[name] for name in names]), rtol=1e-5, atol=1e-7)
        seen.update(names)
    few = [name for name in weights if "norm" not in name and (recipe == "int4-small" or not _is_eight(name))]
    assert seen == set(few)


def without_zeros(folder: Path) -> dict[str, torch.Tensor]:
    """Weights of a checkpoint without the neurons that fill its narrower layers up, but for whole blocks of 32."""
    weights = load_file(folder / "model.safetensors")
    widths = json.loads((folder / "config.json").read_text()).get("comp_widths")
    for layer, width in enumerate(widths or []):
        path, width = f"model.layers.{layer}.mlp", -(-width // 32) * 32
        for name in ("gate_proj", "up_proj"):
            weights[f"{path}.{name}.weight"] = weights[f"{path}.{name}.weight"][:width]
        down = weights[f"{path}.down_proj.weight"]
        assert not down[:, width:].any()
        weights[f"{path}.down_proj.weight"] = down[:, :width]
    assert widths is None or len(set(widths)) > 1
    return weights


def _is_eight(name: str) -> bool:
    return any(each in name for each in ("q_proj", "k_proj", "v_proj", "embed_tokens"))


def _weights_of(node: str) -> list[str]:
    """The weights that a product is by: several are packed into one."""
    if node.startswith("/lm_head/"):
        return ["model.embed_tokens.weight"]
    _, _, *path, _ = node.split("/")
    packed = {"gate_proj": ("gate_proj", "up_proj"), "q_proj": ("q_proj", "k_proj", "v_proj")}
    return [f"model.{'.'.join([*path[:-1], each])}.weight" for each in packed.get(path[-1], path[-1:])]


@pytest.mark.slow
@pytest.mark.onnx
@pytest.mark.usefixtures("measured_here")
def test_a_chain_distils(models, tmp_path):
    from optimum_comp.compress import compress
    from optimum_comp.evaluation import Settings

    def made(**more):
        return compress(
            models / "dense",
            tmp_path / "out",
            config=CompConfig(sparsity=0.4, num_samples=8, sequence_length=32, round_to=8),
            calibration=str(models / "text.txt"),
            distil=DistilSettings(steps=40, rounding="int4", **{**SMALL, "learning_rate": 0.001}),
            settings=Settings(text=str(models / "text.txt"), window=32, max_tokens=256, prompt_tokens=0),
            recipe="int4",
            **more,
        )

    first = made()
    assert list(first.stages) == ["dense", "pruned", NAME, f"{NAME}-onnx", f"{NAME}-int4"]
    # Perplexity doesn't tell: the tiny teacher predicts the text worse than what was pruned from it.
    before, after = first.distillation["before"], first.distillation["after"]
    assert all(after[name] < before[name] for name in before), (before, after)
    # By itself, on the text that calibrated, and on what the teacher answers.
    assert set(first.distillation["after"]) == {"text.txt", "self"}
    again = made()
    assert again.costs["distil"].earlier and again.distillation["after"] == first.distillation["after"]


def test_a_chain_goes_on_with_an_unfinished_distillation(models, tmp_path, monkeypatch):
    from optimum_comp.compress import run as run_recipe
    from optimum_comp.stages.recipe import Recipe

    prune = {"sparsity": 0.4, "num_samples": 8, "sequence_length": 32, "round_to": 8, "calibration": "pydoc"}
    data = {"model": str(models / "dense"), "stages": [{"prune": prune}, {"distil": {"steps": 12, **SMALL}}]}
    chosen = Recipe.from_dict({**data, "measure": False})
    on_save = trainer._Timing.on_save

    def interrupted(self, args, state, *rest, **more):
        on_save(self, args, state, *rest, **more)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(trainer._Timing, "on_save", interrupted)
        with pytest.raises(KeyboardInterrupt, match="pruned is kept"):
            run_recipe(chosen, tmp_path / "out")
    steps = []
    monkeypatch.setattr(
        trainer._Timing,
        "on_save",
        lambda self, args, state, *_, **__: on_save(self, args, state, None) or steps.append(state.global_step),
    )
    found = run_recipe(Recipe.read(tmp_path / "out" / "comp_recipe.yaml"), tmp_path / "out")
    assert found.distillation["steps"] == 12 and min(steps) > 2
    assert not (tmp_path / "out" / "pruned-distilled.unfinished").exists()


def test_a_model_has_nothing_to_learn_from_itself(models, tmp_path):
    from optimum_comp.compress import run as run_recipe
    from optimum_comp.stages.recipe import Recipe

    data = {"model": str(models / "dense"), "stages": [{"distil": {"steps": 3}}], "measure": False}
    with pytest.raises(ValueError, match="would teach the model its own predictions; prune too, name a teacher"):
        run_recipe(Recipe.from_dict(data), tmp_path / "out")


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"time": "soon"}, "time='soon' is not valid: give a time like 30min, 90s or 1.5h"),
        ({"time": "3s", "steps": 3}, "time=3 and steps=3 exclude each other"),
        ({"text": []}, "name at least one source"),
        ({"device": "cuda:7"}, "cuda"),
        ({"text": ["nowhere.txt"]}, "calibration file 'nowhere.txt' does not exist"),
        ({"sequence_length": 4096}, "sequence_length=4096 is more than the"),
        ({"rounding": "int8"}, "rounding='int8' is not valid: rounding must be one of int4"),
        ({"rounding": "int4", "lora_rank": 4}, "it excludes lora_rank"),
    ],
)
def test_what_is_wrong_is_said_first(given, said, models, tmp_path):
    with pytest.raises(ValueError, match=said):
        distilled(models, tmp_path / "out", **given)
    assert not list(tmp_path.iterdir())


def test_too_little_text_or_memory_is_refused(models, tmp_path):
    (tmp_path / "short.txt").write_text("Too short.")
    with pytest.raises(ValueError, match=r"short\.txt is too short to train on: its 12 tokens make 0 samples of 32"):
        distilled(models, tmp_path / "out", text=[str(tmp_path / "short.txt")])
    with pytest.raises(ValueError, match=r"distil needs about .* of memory, and 1.0 MB are allowed"):
        distil(models / "pruned", models / "dense", tmp_path / "out", DistilSettings(), max_memory=10**6)
    assert [path.name for path in tmp_path.iterdir()] == ["short.txt"]


def test_another_vocabulary_is_refused(models, tmp_path):
    shutil.copytree(models / "dense", tmp_path / "other")
    config = json.loads((tmp_path / "other" / "config.json").read_text())
    (tmp_path / "other" / "config.json").write_text(json.dumps({**config, "vocab_size": 50}))
    with pytest.raises(ValueError, match="tokens and the teacher 50; distillation compares predictions"):
        distil(models / "pruned", tmp_path / "other", tmp_path / "out")


def test_samples_are_looked_at_some_at_a_time_where_the_vocabulary_is_large():
    chosen = DistilSettings(batch_size=6, sequence_length=256)
    assert micro_batch(chosen, 100) == 6
    assert micro_batch(chosen, 262_144) == 2
    assert micro_batch(chosen, 10**8) == 1


@settings(deadline=None, max_examples=30)
@given(vocabulary=st.integers(3, 200), drawn=st.integers(0, 50), seed=st.integers(0, 99))
def test_a_step_looks_at_all_tokens_of_the_texts_and_at_others_by_turns(vocabulary, drawn, seed):
    generator = torch.Generator().manual_seed(seed)
    texts = [torch.randint(vocabulary, (2, 7), generator=generator) for _ in range(2)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(candidates, "_DRAWN", drawn)
        chosen = Candidates(texts, vocabulary, seed)
        first, again, second = chosen.of_step(0), chosen.of_step(0), chosen.of_step(1)
        assert torch.equal(first, again) and len(first) == len(second) == len(chosen)
        assert first.unique().numel() == len(first) <= vocabulary
        there = torch.cat(texts).unique()
        assert len(first) == min(vocabulary, len(there) + drawn)
        for text in texts:
            for step in (first, second):
                assert torch.equal(step[chosen.places(text)], text)
        seen = torch.cat([chosen.of_step(step) for step in range(500)]).unique().numel()
        assert drawn == 0 or vocabulary > 50 or seen == vocabulary
        # All that there are, each of those that are drawn for as many as it stands for.
        assert drawn == 0 or round(float(chosen.offsets.exp().sum()), 2) == vocabulary
        assert chosen.pay == (len(first) <= vocabulary / 2)


@pytest.mark.parametrize("family", ["llama", "gemma2", "phi", "cohere", "gpt_neox"])
def test_heads_say_of_some_tokens_what_they_say_of_them_among_all(family):
    model = tiny_family(family)
    ids, head = torch.arange(8)[None] + 4, model.get_output_embeddings()
    whole = model(input_ids=ids).logits
    tokens = torch.tensor([3, 17, 5])
    with pytest.raises(KeyError), predicting((model, tokens)):
        some = model(input_ids=ids).logits
        raise KeyError
    assert model.get_output_embeddings() is head
    assert torch.allclose(some, whole[..., tokens], atol=1e-6)
    wanted, found = (
        torch.autograd.grad(logits.square().sum(), head.weight)[0] for logits in (whole[..., tokens], some)
    )
    assert torch.allclose(found, wanted, atol=1e-5 * float(wanted.abs().max()))


def test_low_rank_additions_take_less_memory(models):
    model = AutoModelForCausalLM.from_pretrained(models / "dense")
    chosen = DistilSettings(sequence_length=32)
    assert memory_of(model, model, chosen, 16, written=False) < memory_of(model, model, chosen, 0, written=False)


def test_a_chat_model_answers_many_requests(models):
    model = AutoModelForCausalLM.from_pretrained(models / "dense").eval()
    model.generation_config.eos_token_id = 2
    state = torch.get_rng_state()
    first, again = (converse(model, tiny_tokenizer(), 3, 40, seed, together=2) for seed in (0, 0))
    assert first.shape == (3, 40) and torch.equal(first, again)
    assert not torch.equal(first, converse(model, tiny_tokenizer(), 3, 40, 1, together=2))
    assert torch.equal(state, torch.get_rng_state())
    # The request stands in front of the answer, in the template's words.
    assert any(word in tiny_tokenizer().decode(first[0]) for word in ("Write", "Explain", "Give", "Answer", "Tell"))


def test_a_chat_model_thinks_of_requests_itself(models):
    model = AutoModelForCausalLM.from_pretrained(models / "dense").eval()
    tokenizer = tiny_tokenizer()
    # So many tokens are ends that most of what it writes comes to one.
    model.generation_config.eos_token_id = list(range(64, 128))
    tokenizer.chat_template = "<s>{% for m in messages %}{{ m['content'] }}\n{% endfor %}"
    torch.manual_seed(0)
    requests = _own_requests(model, tokenizer, 8, 16)
    assert 0 < len(requests) <= 8
    assert all(0 < len(each) < 16 and not set(tokenizer(each).input_ids) & set(range(64, 128)) for each in requests)
    torch.manual_seed(0)
    said = tokenizer.decode(converse(model, tokenizer, 3, 40, 0, together=16).flatten())
    # Half are its own.
    assert sum(each in said for each in ("Write", "Explain", "Give", "Answer", "Tell")) > 0
    assert any(part and not part.startswith("W") for part in said.split("<s>"))
    # Without anything that says where a user speaks, there is nothing to go on from, and without an end no request.
    assert _own_requests(model, tiny_tokenizer(), 8, 16) == []
    model.generation_config.eos_token_id = None
    assert _own_requests(model, tokenizer, 8, 16) == []


def test_what_was_written_to_calibrate_is_trained_on(models, tmp_path):
    from optimum_comp.compress import run as run_recipe
    from optimum_comp.stages.recipe import Recipe

    mix = f"{models / 'text.txt'}:0.5,self:0.5"
    prune = {"sparsity": 0.4, "num_samples": 8, "sequence_length": 32, "round_to": 8, "calibration": mix}
    stages = [{"prune": prune}, {"distil": {**SMALL, "steps": 2, "written_tokens": 96}}]
    recipe = {"model": str(models / "dense"), "stages": stages, "measure": False}
    run_recipe(Recipe.from_dict(recipe), tmp_path / "out")
    told = json.loads((tmp_path / "out" / "pruned-distilled" / "comp_distil.json").read_text())
    # Four of the samples that calibrate, and three blocks more, of which one is held out.
    assert told["texts"]["self"] == {"share": 0.5, "samples": 6, "held_out": 1}


def test_the_command_says_what_was_achieved(models, tmp_path):
    done = run(
        *("distil", "--model", models / "pruned", "--teacher", models / "dense", "--text", models / "text.txt"),
        *("--steps", 4, "--sequence-length", 32, "--json", tmp_path / "found.json", tmp_path / "out"),
    )
    assert "4 steps, 512 tokens" in done.stdout and "divergence from the teacher" in done.stdout
    assert json.loads((tmp_path / "found.json").read_text())["steps"] == 4


def test_what_was_trained_is_explained(models, tmp_path):
    found = distilled(models, tmp_path / "out", steps=4, learning_rate=1e-4, rounding="int4")
    said = run("explain", tmp_path / "out").stdout
    assert "trained on the predictions of dense: 4 steps, 512 tokens" in said and "as recipe int4 does" in said
    assert f"{found.before['text.txt']:.4f}" in said and f"{found.after['text.txt']:.4f}" in said
    # How it was pruned is there still.
    assert "Layer 1" in run("explain", "--layer", 1, tmp_path / "out").stdout
    (tmp_path / "out" / "comp_distil.json").write_text("{}")
    damaged = run("explain", tmp_path / "out", check=False)
    assert damaged.returncode == 1 and "comp_distil.json is damaged" in damaged.stderr


def test_the_learning_rate_is_a_share_of_the_weights_size(models):
    model = AutoModelForCausalLM.from_pretrained(models / "pruned")
    rates = [learning_rate(model.model.layers, is_near=each) for each in (False, True)]
    assert 0 < rates[1] < rates[0] < 0.1
    with torch.no_grad():
        for parameter in model.parameters():
            parameter *= 0.2
    again = [learning_rate(model.model.layers, is_near=each) for each in (False, True)]
    assert again == pytest.approx([0.2 * each for each in rates], rel=1e-3)


def test_training_that_leads_away_is_said(models, tmp_path, caplog):
    with caplog.at_level("WARNING"):
        found = distilled(models, tmp_path / "out", learning_rate=0.5, steps=4)
    assert sum(found.after.values()) > sum(found.before.values())
    assert "farther from the teacher" in caplog.text and "learning_rate than 0.5" in caplog.text


def test_the_learning_rate_rises_and_falls_with_time(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(trainer.time, "monotonic", lambda: now[0])
    clock = trainer.Clock(None, 1000.0, spent=0.0)
    clock.reserve(100)
    rates = []
    for seconds in (0, 27, 450, 900, 2000):
        now[0] = 100.0 + seconds
        rates.append(clock.rate(0))
    assert rates[1] == pytest.approx(1) and rates[0] < 0.2 and 0.4 < rates[2] < 0.6
    assert rates[3] == rates[4] == pytest.approx(0.02)
    # However long the evaluation takes, half of the time is for training.
    clock.reserve(10_000)
    now[0] = 100.0 + 250
    assert clock.share(0) == 0.5


def test_the_learning_rate_rises_when_training_begins(monkeypatch):
    """Texts that took a tenth of the time, or nearly all of it, are no part of the schedule."""
    now = [0.0]
    monkeypatch.setattr(trainer.time, "monotonic", lambda: now[0])
    for prepared in (100.0, 990.0):
        now[0] = 0.0
        clock = trainer.Clock(None, 1000.0)
        now[0] = prepared
        clock.begun = clock.spent
        rates = []
        for share in (0.0, 0.03, 0.5, 1.0):
            now[0] = prepared + share * (1000 - prepared)
            rates.append(clock.rate(0))
        assert rates[0] < 0.2 and rates[1] == pytest.approx(1) and rates[3] == pytest.approx(0.02)
        assert 0.4 < rates[2] < 0.6


def test_nothing_is_left_out_at_random(tmp_path):
    """The teacher predicts without dropout, and so does the student: of two equal models, none learns anything."""
    model = tiny_family("gpt2")
    model.config.resid_pdrop = model.config.embd_pdrop = model.config.attn_pdrop = 0.5
    model.save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "text.txt").write_text(TEXT)
    chosen = DistilSettings(text=[str(tmp_path / "text.txt")], steps=3, **SMALL)
    distil(tmp_path / "model", tmp_path / "model", tmp_path / "out", chosen)
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("model", "out"))
    # Adam makes whole steps of any gradient, however small.
    assert all(torch.allclose(before[name], after[name], atol=1e-6) for name in before)


def test_training_that_breaks_ends_and_leaves_nothing(models, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(trainer.Distiller, "held_out_divergences", lambda _: {"text.txt": float("nan")})
    with caplog.at_level("WARNING"), pytest.raises(FloatingPointError, match=r"take a smaller learning_rate\.$"):
        distilled(models, tmp_path / "out", steps=1000)
    assert "The predictions aren't finite: training ends." in caplog.text
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("shares", [[1 / 100] * 100, [0.004, 0.996], [0.3, 0.7]])
def test_every_text_is_trained_on(shares):
    blocks = torch.zeros(1, 4, dtype=torch.int64)
    texts = [TextBlocks(str(number), share, blocks + number, blocks) for number, share in enumerate(shares)]
    stream = Stream(texts, 1000, seed=0)
    seen = [int(stream[place]["input_ids"][0]) for place in range(1000)]
    for number, share in enumerate(shares):
        assert seen.count(number) == pytest.approx(1000 * share, rel=0.25)


def test_a_checkpoint_that_was_not_finished_is_passed_over(models, tmp_path, monkeypatch):
    """The process dies while one is written: the one before it is gone on with."""
    save = trainer.Distiller._save_checkpoint

    def dying(self, *arguments, **more):
        before = Path(self.args.output_dir) / "checkpoint-12"
        if self.state.global_step < 18:
            return save(self, *arguments, **more)
        # The one before goes when the new one is complete, which it isn't to be.
        shutil.copytree(before, tmp_path / "before")
        save(self, *arguments, **more)
        (before.with_name(f"checkpoint-{self.state.global_step}") / "trainer_state.json").unlink()
        shutil.rmtree(before, ignore_errors=True)
        (tmp_path / "before").rename(before)
        raise KeyboardInterrupt

    distilled(models, tmp_path / "whole")
    with monkeypatch.context() as patch:
        patch.setattr(trainer.Distiller, "_save_checkpoint", dying)
        with pytest.raises(KeyboardInterrupt, match="checkpoint-12 is kept"):
            distilled(models, tmp_path / "out")
    distilled(models, tmp_path / "out", resume=True)
    weights = [load_file(tmp_path / name / "model.safetensors") for name in ("whole", "out")]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_a_full_disk_says_what_is_kept(models, tmp_path, monkeypatch):
    save = trainer.Distiller._save_checkpoint

    def full(self, *arguments, **more):
        if self.state.global_step >= 18:
            raise OSError(28, "No space left on device")
        return save(self, *arguments, **more)

    with monkeypatch.context() as patch:
        patch.setattr(trainer.Distiller, "_save_checkpoint", full)
        with pytest.raises(
            OSError, match=r"No space left on device(.|\n)*checkpoint-12 is kept in .*; go on with --resume"
        ):
            distilled(models, tmp_path / "out")
    assert distilled(models, tmp_path / "out", resume=True).steps == 30


def test_more_time_can_be_given_to_a_chain_that_was_interrupted(models, tmp_path, monkeypatch):
    from optimum_comp.compress import run as run_recipe
    from optimum_comp.stages.recipe import Recipe

    prune = {"sparsity": 0.4, "num_samples": 8, "sequence_length": 32, "round_to": 8, "calibration": "pydoc"}

    def recipe(**given):
        stages = [{"prune": prune}, {"distil": {**SMALL, **given}}]
        return Recipe.from_dict({"model": str(models / "dense"), "stages": stages, "measure": False})

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(trainer._Timing, "on_save", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run_recipe(recipe(steps=12), tmp_path / "out")
    with pytest.raises(ValueError, match=r"begun with other settings \(learning_rate\)"):
        run_recipe(recipe(steps=12, learning_rate=0.001), tmp_path / "out")
    assert run_recipe(recipe(steps=20), tmp_path / "out").distillation["steps"] == 20
    # What the chain decided isn't frozen in the recipe.
    written = (tmp_path / "out" / "comp_recipe.yaml").read_text()
    assert "text" not in Recipe.from_text(written).to_dict()["stages"][1]["distil"]


@pytest.mark.parametrize(
    ("calibration", "text"),
    [
        ("pydoc", ["pydoc", "self:0.25"]),
        ("pydoc:3,novel:1", ["pydoc:0.6", "novel:0.2", "self:0.2"]),
        ("pydoc:0.9,self:0.1", ["pydoc:0.9,self:0.1"]),
        ("self", None),
        (None, None),
    ],
)
def test_a_chain_trains_on_what_calibrates_and_on_answers(calibration, text):
    from optimum_comp.stages.distil import Distil

    assert Distil().decided(calibration, None).settings.text == text


def test_what_a_kill_leaves_is_in_nobodys_way(models, tmp_path):
    work = tmp_path / "out.unfinished"
    work.mkdir()
    (work / ".comp_lock").touch()
    (work / ".run.json.partial").write_text("{")
    assert distilled(models, tmp_path / "out", steps=2).steps == 2
    work.mkdir()
    (work / "run.json").write_text("{")
    with pytest.raises(FileExistsError, match=r"isn't a distillation. Move it"):
        distilled(models, tmp_path / "out", steps=2, overwrite=True)


def test_dense_layers_of_another_kind_are_not_rounded(models, tmp_path):
    from transformers import AutoConfig

    from optimum_comp.distillation.run import check_settings

    config = AutoConfig.for_model("gpt2", n_layer=1, n_embd=16, n_head=2)
    check_settings(config, config, DistilSettings())
    with pytest.raises(ValueError, match=r"gpt2 has dense layers of its own kind. Leave it away"):
        check_settings(config, config, DistilSettings(rounding="int4"))


def test_the_output_may_stand_behind_the_texts(models, tmp_path):
    done = run(
        *("distil", "--model", models / "pruned", "--teacher", models / "dense", "--steps", 2),
        *("--sequence-length", 32, "--text", models / "text.txt", tmp_path / "out"),
    )
    assert "2 steps" in done.stdout and (tmp_path / "out" / "config.json").is_file()
    missing = run("distil", "--model", models / "pruned", "--teacher", models / "dense", check=False)
    assert missing.returncode == 1 and "OUTPUT is missing" in missing.stderr


@pytest.mark.parametrize(
    ("given", "seconds"), [("90s", 90), ("1.5h", 5400), (30.5, 30.5), ("1.1h", 3960.0000000000005)]
)
def test_times(given, seconds):
    chosen = DistilSettings(time=given)
    assert chosen.time == seconds and DistilSettings(**chosen.to_dict()) == chosen
