"""The `README.md` of a bundle: its files, and code that loads it and generates."""

from __future__ import annotations

import json
from pathlib import Path

from optimum_comp.beginning import start_tokens
from optimum_comp.bundle.verification import BundleReport, sizes_of
from optimum_comp.files import STAGE_RECORD
from optimum_comp.onnx.folders import MODEL_NAME
from optimum_comp.onnx.genai import CONFIG_NAME
from optimum_comp.onnx.genai_tokenizer import chat_text
from optimum_comp.utils import format_bytes


def readme(folder: Path, report: BundleReport, name: str) -> str:
    """The text for a folder that is complete but for it and the manifest, and that will be called `name`."""
    files = "\n".join(
        f"| `{path}` | {format_bytes(size)} | {_describe(path)} |" for path, size in sizes_of(folder).items()
    )
    quoted = json.dumps(_prompt(folder), ensure_ascii=False)
    settings = json.loads((folder / CONFIG_NAME).read_text(encoding="utf-8"))
    texts = {
        "NAME": name,
        "TARGET": report.target,
        "RECIPE": report.recipe or "-",
        "LENGTH": str(min(512, settings["search"]["max_length"])),
        "FILES": files,
        "KOTLIN_PROMPT": quoted.replace("$", "\\$"),
        "PROMPT": quoted,
    }
    text = _README
    for key, value in texts.items():
        text = text.replace(f"@{key}@", value)
    return text


def _describe(path: str) -> str:
    known = {
        MODEL_NAME: "graph, for Optimum, plain ONNX Runtime and GenAI",
        f"{MODEL_NAME}.data": "its weights",
        "model.ort": "ORT format, for a minimal build of ONNX Runtime",
        "genai_config.json": "how GenAI runs the model",
        "config.json": "architecture",
        "generation_config.json": "how to choose tokens",
        "ort_config.json": "how it was quantized",
        "chat_template.jinja": "how a chat is written",
    }
    if path == STAGE_RECORD:
        return "what it was made from, and how"
    if path in known:
        return known[path]
    if path.endswith(".config"):
        return "operators and types that a minimal build needs"
    return "tokenizer" if path.startswith(("tokenizer", "special_tokens", "vocab", "merges", "added")) else ""


def _prompt(folder: Path) -> str:
    """A chat with `{question}` in it as text, as the model's template puts it."""
    from transformers import AutoTokenizer

    if not (folder / "tokenizer.json").is_file():
        return "{question}"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if tokenizer.chat_template:
        return chat_text(tokenizer, "{question}")
    # Nothing else puts it there.
    return str(tokenizer.decode(start_tokens(tokenizer))) + "{question}"


_README = """# @NAME@

A quantized language model (recipe `@RECIPE@`, for `@TARGET@`), made by optimum-comp. Copy the whole folder to the
device. `manifest.json` has the size and SHA-256 of every file.

| file | size | |
| --- | ---: | --- |
@FILES@

## Python, Optimum

`pip install 'optimum-onnx[onnxruntime]' 'onnxruntime>=1.23'`

```python
import torch
from optimum.onnxruntime import ORTModelForCausalLM
from transformers import AutoTokenizer

torch.set_num_threads(1)  # its threads get in the way of ONNX Runtime's
folder = "@NAME@"
model = ORTModelForCausalLM.from_pretrained(folder)
tokenizer = AutoTokenizer.from_pretrained(folder)
prompt = @PROMPT@.replace("{question}", "What is gravity?")
inputs = tokenizer(prompt, return_tensors="pt", add_special_tokens=False, return_token_type_ids=False)
answer = model.generate(**inputs, max_new_tokens=100)
print(tokenizer.decode(answer[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
```

## Python, ONNX Runtime GenAI

`pip install 'onnxruntime-genai>=0.15'`

```python
import onnxruntime_genai as genai

model = genai.Model("@NAME@")
tokenizer = genai.Tokenizer(model)
stream = tokenizer.create_stream()
settings = genai.GeneratorParams(model)
settings.set_search_options(max_length=@LENGTH@)
generator = genai.Generator(model, settings)
generator.append_tokens(tokenizer.encode(@PROMPT@.replace("{question}", "What is gravity?")))
while not generator.is_done():
    generator.generate_next_token()
    print(stream.decode(generator.get_next_tokens()[0]), end="", flush=True)
```

## Android, Kotlin

The archive `onnxruntime-genai-android-VERSION.aar` (0.18 or later) is among the files of ONNX Runtime GenAI's
releases; put it into `app/libs`. Copy this folder to the app's own files, such as `filesDir`: it can't be read from
inside the package.

```kotlin
// build.gradle.kts: implementation(fileTree("libs") { include("*.aar") })
import ai.onnxruntime.genai.Generator
import ai.onnxruntime.genai.GeneratorParams
import ai.onnxruntime.genai.Model
import ai.onnxruntime.genai.Tokenizer

fun answer(folder: String, question: String, onText: (String) -> Unit) {
    val prompt = @KOTLIN_PROMPT@.replace("{question}", question)
    Model(folder).use { model ->
        Tokenizer(model).use { tokenizer ->
            GeneratorParams(model).use { settings ->
                settings.setSearchOption("max_length", @LENGTH@.0)
                Generator(model, settings).use { generator ->
                    tokenizer.createStream().use { stream ->
                        tokenizer.encode(prompt).use { generator.appendTokenSequences(it) }
                        while (!generator.isDone) {
                            generator.generateNextToken()
                            onText(stream.decode(generator.getLastTokenInSequence(0)))
                        }
                    }
                }
            }
        }
    }
}
```

## iOS, Swift

ONNX Runtime GenAI's Objective-C library (0.18 or later), with `#import "ort_genai_objc.h"` in the bridging header. Add
this folder to the app as a folder reference.

```swift
func answer(folder: String, question: String, onText: (String) -> Void) throws {
    let prompt = @PROMPT@.replacingOccurrences(of: "{question}", with: question)
    let model = try OGAModel(path: folder)
    let tokenizer = try OGATokenizer(model: model)
    let stream = try OGATokenizerStream(tokenizer: tokenizer)
    let settings = try OGAGeneratorParams(model: model)
    try settings.setSearchOption("max_length", doubleValue: @LENGTH@)
    let generator = try OGAGenerator(model: model, params: settings)
    try generator.appendTokenSequences(tokenizer.encode(prompt))
    while try !generator.isDone() {
        try generator.generateNextToken()
        let count = generator.sequenceCount(at: 0, error: nil)
        let tokens = try generator.sequenceData(at: 0)
        onText(try stream.decode(tokens[count - 1]))
    }
}
```
"""
