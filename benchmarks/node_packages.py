"""Packages for Node.js in a folder of their own: what `npm install` puts there, and nothing outside it."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path


_SECONDS = 600
"""An installation that takes longer is given up."""


class NodeUnavailableError(RuntimeError):
    """Node.js, or a package, can't be had on this machine; the message says why, in one line."""


def require_node() -> str:
    """The path of `node`.

    Raises:
        NodeUnavailableError: there is none, or it has no `npm`.
    """
    for name in ("node", "npm"):
        if shutil.which(name) is None:
            raise NodeUnavailableError(f"there is no {name}: install Node.js 20 or later.")
    return str(shutil.which("node"))


def install(packages: Mapping[str, str], folder: Path) -> Path:
    """Install packages, unless they are there; without install scripts, and without what is optional to them.

    Args:
        packages: versions by name.
        folder: where `node_modules` goes; made if need be.

    Returns:
        The `node_modules`.

    Raises:
        NodeUnavailableError: there is no Node.js, or npm fails.
    """
    require_node()
    folder.mkdir(parents=True, exist_ok=True)
    done = folder / "installed.json"
    if not done.is_file() or json.loads(done.read_text(encoding="utf-8")) != dict(packages):
        description = {"private": True, "type": "module", "dependencies": dict(packages)}
        (folder / "package.json").write_text(json.dumps(description, indent=2), encoding="utf-8")
        _npm_install(folder)
        done.write_text(json.dumps(dict(packages)), encoding="utf-8")
    return folder / "node_modules"


def _npm_install(folder: Path) -> None:
    command = ["npm", "install", "--loglevel=error", "--no-audit", "--no-fund", "--ignore-scripts", "--omit=optional"]
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=_SECONDS, check=False)
    except subprocess.TimeoutExpired as error:
        raise NodeUnavailableError(f"npm install took more than {_SECONDS} s in {folder}.") from error
    if done.returncode != 0:
        said = " ".join(line.removeprefix("npm error ").strip() for line in done.stderr.splitlines()[:2])
        raise NodeUnavailableError(f"npm install failed in {folder}: {said or f'status {done.returncode}'}")
