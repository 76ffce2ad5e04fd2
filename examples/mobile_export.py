"""One folder for a phone (`phone` in the output), its answer in ONNX Runtime GenAI, and the way to one in a browser.

python examples/mobile_export.py --model models/smollm2 out/mobile
"""

from __future__ import annotations

import argparse
import importlib
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from optimum_comp.bundle import verify_bundle
from optimum_comp.compress import run
from optimum_comp.onnx.genai_tokenizer import chat_text
from optimum_comp.stages.recipe import Recipe


def main() -> None:
    """Prune, export, quantize, bundle; ask."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="models/smollm2", help="local folder or hub id [models/smollm2]")
    parser.add_argument("--sparsity", type=float, default=0.2, help="0 leaves the model as it is [0.2]")
    parser.add_argument("--samples", type=int, default=32, help="of 256 tokens, to calibrate with [32]")
    parser.add_argument("--recipe", default="int8", help="of the quantization [int8]")
    parser.add_argument("output", nargs="?", type=Path, default=Path("out/mobile"), help="[out/mobile]")
    args = parser.parse_args()
    pruning = {"sparsity": args.sparsity, "num_samples": args.samples, "calibration": "pydoc"}
    quantization = {"recipe": args.recipe, "target": "arm64"}
    stages = [*([{"prune": pruning}] if args.sparsity else []), "export", {"quantize": quantization}, "bundle"]
    recipe = Recipe.from_dict({"recipe": 1, "model": args.model, "stages": stages, "measure": False})
    run(recipe, args.output / "chain", bundle=args.output / "phone")
    phone = (args.output / "phone").resolve()
    print(verify_bundle(phone).text())
    print(f"GenAI: {answer(phone, 'What is the capital of France?')}")
    print(f"In a browser: cd examples/browser && npm install && node serve.mjs {phone}")


def answer(phone: Path, question: str) -> str:
    """What GenAI answers; or that it isn't there."""
    try:
        genai: Any = importlib.import_module("onnxruntime_genai")
    except ImportError:
        return "not installed here: pip install '.[onnxruntime]' (with transformers 5: '.[genai]')"
    tokenizer, model = AutoTokenizer.from_pretrained(phone), genai.Model(str(phone))
    text = chat_text(tokenizer, question) if tokenizer.chat_template else question
    prompt = tokenizer(text, add_special_tokens=not tokenizer.chat_template)["input_ids"]
    settings = genai.GeneratorParams(model)
    settings.set_search_options(do_sample=False, max_length=len(prompt) + 32)
    generator = genai.Generator(model, settings)
    generator.append_tokens(prompt)
    while not generator.is_done():
        generator.generate_next_token()
    return tokenizer.decode(generator.get_sequence(0)[len(prompt) :], skip_special_tokens=True).strip()


if __name__ == "__main__":
    main()
