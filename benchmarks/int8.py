"""8-bit recipes side by side: Optimum's own presets, and ours.

    python benchmarks/int8.py --model models/smollm2 --text text.txt

Exports the model once, quantizes it with each, and measures each in a process of its own on the same tokens. The
preset `arm64` makes the same file as `avx512_vnni`; on x86 cores without VNNI its products overflow, `avx2` is the
preset for those.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from optimum.onnxruntime import ORTQuantizer
from optimum.onnxruntime.configuration import AutoQuantizationConfig

from optimum_comp.calibration import PYDOC
from optimum_comp.evaluation import Settings, evaluate_apart, is_onnx_folder
from optimum_comp.onnx.export import export_onnx
from optimum_comp.onnx.folders import copy_companions
from optimum_comp.onnx.quantization import quantize_onnx
from optimum_comp.onnx.recipes import RECIPES
from optimum_comp.report.table import evaluation_table


PRESETS = {"arm64": AutoQuantizationConfig.arm64, "avx2": AutoQuantizationConfig.avx2}


def main() -> None:
    """Quantize with everything, measure, print one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, type=Path, help="PyTorch or ONNX folder")
    parser.add_argument("--text", default=PYDOC)
    parser.add_argument("--max-tokens", type=int, default=10240)
    args = parser.parse_args()
    settings = Settings(text=args.text, max_tokens=args.max_tokens)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        source = args.model if is_onnx_folder(args.model) else export_onnx(args.model, folder / "float32").output
        paths = {"float32": source}
        for name, preset in PRESETS.items():
            paths[f"Optimum's {name}"] = target = folder / name
            quantizer = ORTQuantizer.from_pretrained(source)
            quantizer.quantize(preset(is_static=False, per_channel=True), target, file_suffix=None)
            copy_companions(source, target)
        for recipe in RECIPES:
            paths[recipe] = quantize_onnx(source, folder / recipe, recipe=recipe).output
        print(evaluation_table({name: evaluate_apart(path, settings) for name, path in paths.items()}))


if __name__ == "__main__":
    main()
