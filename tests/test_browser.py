"""The answer in a browser: bundles of the real model in a headless Chromium, and the page's server."""

from __future__ import annotations

import importlib
import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from conftest import need_onnx, run


need_onnx()

import onnx  # noqa: E402
from transformers import AutoTokenizer  # noqa: E402

from optimum_comp.onnx.runtime import load_onnx  # noqa: E402


pytestmark = pytest.mark.slow

HERE = Path(__file__).parent
PAGE = HERE.parent / "examples" / "browser"
QUESTION, TOKENS = "What is the capital of France?", 8
SECONDS = 400
"""No answer may take longer; with a core to itself, one takes a few seconds."""


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> Path:
    """A folder with the page, what it imports, and a Chromium with a script that asks it."""
    folder = tmp_path_factory.mktemp("page")
    wanted = {}
    for description in (PAGE / "package.json", HERE / "browser" / "package.json"):
        wanted |= json.loads(description.read_text())["dependencies"]
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(HERE.parent / "benchmarks"))
        node_packages = importlib.import_module("node_packages")
    try:
        node_packages.install(wanted, folder)
    except node_packages.NodeUnavailableError as error:
        pytest.skip(f"no browser: {error}")
    for path in (*PAGE.glob("*.mjs"), *PAGE.glob("*.html"), HERE / "browser" / "drive.mjs"):
        shutil.copy(path, folder)
    check = (
        'import chromium from "@sparticuz/chromium"; import { execFileSync } from "node:child_process";'
        'execFileSync(await chromium.executablePath(), ["--version", "--no-sandbox"]);'
    )
    started = node(folder, "--input-type=module", "--eval", check)
    if started.returncode != 0:
        pytest.skip(f"no browser: Chromium doesn't start here: {started.stderr.strip().splitlines()[-1]}")
    return folder


def node(folder: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = ["node", *map(str, arguments)]
    # Chromium unpacks itself into the folder for temporary files.
    environment = {**os.environ, "TMPDIR": str(folder)}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=SECONDS)


@contextmanager
def served(page: Path, bundle: Path) -> Iterator[str]:
    """The page and a bundle at a URL."""
    command = ["node", str(page / "serve.mjs"), str(bundle), "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        try:
            yield server.stdout.readline().strip()
        finally:
            server.terminate()


@pytest.fixture(scope="module")
def bundle(real_model, tmp_path_factory):
    """Bundles of the dense model by recipe, one export for all."""
    root = tmp_path_factory.mktemp("bundles")

    def make(recipe: str) -> Path:
        stages = f"[export: , quantize: {{recipe: {recipe}}}, bundle: ]"
        (root / "recipe.yaml").write_text(f"recipe: 1\nstages: {stages}\nmeasure: false\n")
        chain = ("--recipe", root / "recipe.yaml", "--bundle", root / recipe, root / "out")
        run("compress", "--model", real_model, *chain)
        return root / recipe

    return make


def expected(bundle: Path, graph: str) -> list[int]:
    """Greedy tokens of ONNX Runtime in Python, weights multiplied in float as WebAssembly does.

    On x86 and Arm, activations are rounded to 8 bits first, which decides between tokens that are nearly as likely.
    """
    model = onnx.load(bundle / graph, load_external_data=False)
    levels = [a for node in model.graph.node for a in node.attribute if a.name == "accuracy_level"]
    assert levels and {level.i for level in levels} == {4}
    for level in levels:
        level.i = 0
    exact = bundle / f"exact-{graph}"
    onnx.save(model, exact)
    try:
        tokenizer = AutoTokenizer.from_pretrained(bundle)
        turns = [{"role": "user", "content": QUESTION}]
        prompt = tokenizer.apply_chat_template(
            turns, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        made = load_onnx(bundle, file_name=exact.name).generate(**prompt, max_new_tokens=TOKENS, do_sample=False)
    finally:
        exact.unlink()
    return made[0, prompt["input_ids"].shape[1] :].tolist()


@pytest.mark.parametrize("recipe", ["int8", "int4-rtn"])
def test_a_browser_answers_what_python_answers(recipe, bundle, page):
    folder = bundle(recipe)
    graphs = sorted(path.name for path in folder.glob("*.onnx"))
    assert "model.onnx" in graphs
    tokenizer = AutoTokenizer.from_pretrained(folder)
    with served(page, folder) as url:
        for graph in graphs:
            asked = node(page, "drive.mjs", f"{url}?graph={graph}&tokens={TOKENS}", QUESTION, SECONDS)
            assert asked.returncode == 0, asked.stderr
            found = json.loads(asked.stdout)
            assert "Chrome" in found["agent"] and found["isolated"]
            assert found["tokens"] == expected(folder, graph)
            assert found["text"] == tokenizer.decode(found["tokens"], skip_special_tokens=True)
        lost = node(page, "drive.mjs", f"{url}?graph=other.onnx", QUESTION, SECONDS)
    assert f"Error: the bundle has no other.onnx; it has {', '.join(graphs)}." in lost.stderr


def test_the_server_serves_the_page_and_the_bundle_alone(page, tmp_path):
    refused = node(page, "serve.mjs", tmp_path)
    assert (refused.returncode, refused.stderr) == (
        2,
        f"error: {tmp_path} is no bundle: name a folder that comp compress --bundle made.\n",
    )
    bundle = tmp_path / "bundle"
    bundle.mkdir()
    (bundle / "manifest.json").write_text("{}")
    (tmp_path / "secret.json").write_text("{}")
    fetch = (
        "const [url, ...paths] = process.argv.slice(1); const { get } = await import('node:http');"
        "for (const path of paths) await new Promise((then) => get({ port: new URL(url).port, path }, (got) => {"
        " console.log(got.statusCode); got.resume(); then(); }));"
    )
    inside = {"/": 200, "/generate.mjs": 200, "/bundle/manifest.json": 200, "/bundle/other.json": 404}
    outside = [
        f"{front}{up}secret.json" for front in ("/", "/bundle/") for up in ("../", "%2e%2e/", "..%2f", "..%2f../")
    ]
    paths = {**inside, **dict.fromkeys(outside, 404), "/%": 400}
    with served(page, bundle) as url:
        got = node(page, "--input-type=module", "--eval", fetch, url, *paths)
        taken = node(page, "serve.mjs", bundle, url.rstrip("/").rpartition(":")[2])
    assert dict(zip(paths, map(int, got.stdout.split()), strict=True)) == paths
    assert taken.returncode == 2 and taken.stderr.startswith("error: port ")
