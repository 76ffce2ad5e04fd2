"""An emulated 64-bit Arm machine with Python, NumPy and ONNX Runtime, set up without root.

Debian's own arm64 packages and the aarch64 wheels are unpacked into a folder, and qemu's user-mode emulation runs the
Python in it. Nothing outside the folder is written, and the host's package manager learns nothing of it.

    python tests/arm64/setup_emulator.py [FOLDER]
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from optimum_comp.files import atomic_folder


REPOSITORY = Path(__file__).resolve().parents[2]

CPU_TYPES = {
    # qemu's name: implementer and part number, as such a core's /proc/cpuinfo has them. `max` is qemu's own core with
    # all it can do; without `sme=off`, qemu 7.2 computes garbage.
    "cortex-a53": ("0x41", "0xd03"),
    "cortex-a76": ("0x41", "0xd0b"),
    "max,sme=off": ("0x00", "0x051"),
}
"""Cores without 8-bit dot product, with it, and with everything that came later (SVE, 8-bit matrix products)."""

WHEELS = ("numpy", "onnxruntime")
_LAYOUT = 1
"""Counted up whenever a finished set-up of an earlier version of this file won't do."""

_SECONDS = 900
"""A download or an unpacking that takes longer is given up."""


class EmulatorUnavailableError(RuntimeError):
    """The emulator can't be had on this machine; the message says why, in one line."""


@dataclass(frozen=True)
class Emulator:
    """A finished set-up.

    Attributes:
        folder: where it is.
        python: the Python in it, as `3.11`.
        versions: versions of the wheels by name.
        qemu: what qemu says about its version.
    """

    folder: Path
    python: str
    versions: dict[str, str]
    qemu: str

    def run(self, cpu: str, script: Path, *arguments: str | Path, seconds: float) -> None:
        """Run a Python script on an emulated core.

        Args:
            cpu: a key of `CPU_TYPES`.
            script: outside the emulator's folder; the emulated program sees the host's files.
            arguments: of the script.
            seconds: it may take.

        Raises:
            RuntimeError: the script or the emulated processor failed; has the end of what was printed.
            subprocess.TimeoutExpired: it took longer.
        """
        prefix = self.folder / "cpu" / _folder_name(cpu)
        python = prefix / "usr" / "bin" / f"python{self.python}"
        command = [self.folder / "qemu-aarch64", "-cpu", cpu, "-L", prefix, python, "-s", "-B", script, *arguments]
        # The emulated program gets qemu's environment, and nothing of the host's may be in it.
        environment = {"PYTHONHOME": str(prefix / "usr"), "PYTHONPATH": str(self.folder / "site")}
        done = subprocess.run(
            [str(word) for word in command], env=environment, capture_output=True, text=True, timeout=seconds
        )
        if done.returncode:
            raise RuntimeError(f"{script.name} ended with {done.returncode} on {cpu}:\n{done.stderr[-4000:]}")


def default_folder() -> Path:
    """Where the emulator is kept: `COMP_ARM64_DIR`, or `.arm64` in the repository."""
    return Path(os.environ.get("COMP_ARM64_DIR") or REPOSITORY / ".arm64").resolve()


def set_up(folder: Path | None = None) -> Emulator:
    """Make the emulator, or take the finished one that is there. Downloads are kept in `cache` beside it.

    Args:
        folder: see `default_folder`.

    Raises:
        EmulatorUnavailableError: this machine can't have it.
    """
    if platform.system() != "Linux":
        raise EmulatorUnavailableError(f"qemu's user-mode emulation needs Linux, and this is {platform.system()}.")
    folder = default_folder() if folder is None else folder.resolve()
    wanted = {"layout": _LAYOUT, "versions": _pinned_versions(), "cores": os.cpu_count()}
    with _locked(folder):
        target = folder / "emulator"
        if (emulator := _finished(target, wanted)) is None:
            for name in ("apt-get", "apt-cache", "dpkg", "dpkg-deb"):
                if shutil.which(name) is None:
                    raise EmulatorUnavailableError(f"the emulator comes from Debian packages: there is no {name}.")
            for leftover in (target, *folder.glob(f".{target.name}.*")):
                shutil.rmtree(leftover, ignore_errors=True)
            with atomic_folder(target) as partial:
                _make(partial, folder / "cache", wanted)
            emulator = _finished(target, wanted)
    assert emulator is not None
    return emulator


def _finished(target: Path, wanted: dict[str, object]) -> Emulator | None:
    manifest = target / "manifest.json"
    if not manifest.is_file():
        return None
    found = json.loads(manifest.read_text(encoding="utf-8"))
    if {key: found.get(key) for key in wanted} != wanted:
        return None
    return Emulator(target, found["python"], found["versions"], found["qemu"])


def _make(folder: Path, cache: Path, wanted: dict[str, object]) -> None:
    qemu = folder / "qemu-aarch64"
    host = _run(["dpkg", "--print-architecture"]).strip()
    _unpack_qemu(_Apt(cache / f"apt-{host}", host).packages("qemu-user-static"), qemu)
    apt = _Apt(cache / "apt-arm64", "arm64")
    python = apt.default_python()
    root = folder / "root"
    root.mkdir()
    for package in apt.packages(f"python{python}-minimal", f"libpython{python}-stdlib", "libstdc++6"):
        _run(["dpkg-deb", "--extract", str(package), str(root)])
    # Newer releases have everything below /usr, and the link isn't in the package of the C library.
    if not (root / "lib").exists():
        (root / "lib").symlink_to("usr/lib")
    for wheel in _wheels(cache, python):
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(folder / "site")
    for cpu, identity in CPU_TYPES.items():
        _add_cpu(folder / "cpu" / _folder_name(cpu), *identity)
    manifest = {**wanted, "python": python, "qemu": _run([str(qemu), "--version"]).splitlines()[0]}
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")


def _folder_name(cpu: str) -> str:
    return cpu.partition(",")[0]


def _add_cpu(folder: Path, implementer: str, part: str) -> None:
    """Make what the emulated program sees as its root: the packages, and a /proc/cpuinfo that fits the core.

    Older versions of qemu show the host's, and ONNX Runtime dies of an x86 one as it looks for the core's type in it.
    """
    (folder / "proc").mkdir(parents=True)
    for name in ("lib", "usr"):
        (folder / name).symlink_to(Path("../../root") / name)
    core = (
        "processor\t: {number}\nBogoMIPS\t: 100.00\nFeatures\t: fp asimd\nCPU implementer\t: " + implementer + "\n"
        "CPU architecture: 8\nCPU variant\t: 0x0\nCPU part\t: " + part + "\nCPU revision\t: 0\n"
    )
    cores = [core.format(number=number) for number in range(os.cpu_count() or 1)]
    (folder / "proc" / "cpuinfo").write_text("\n".join(cores), encoding="ascii")


def _pinned_versions() -> dict[str, str]:
    constraints = (REPOSITORY / "constraints.txt").read_text(encoding="utf-8")
    pins = dict(re.findall(r"^([\w.-]+)==(\S+)$", constraints, re.MULTILINE))
    return {name: pins[name] for name in WHEELS}


def _wheels(cache: Path, python: str) -> list[Path]:
    versions = _pinned_versions()
    folder = cache / "wheels" / "-".join([f"cp{python}", *versions.values()])
    folder.mkdir(parents=True, exist_ok=True)
    # By its arguments alone: pip takes platform tags for exact names, and each wheel has its own.
    platforms = [f"manylinux_2_{minor}_aarch64" for minor in range(17, 37)] + ["manylinux2014_aarch64"]
    _run(
        [
            *(sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"),
            *(f"--platform={name}" for name in platforms),
            *(f"--python-version={python}", "--implementation=cp", f"--dest={folder}"),
            *(f"{name}=={version}" for name, version in versions.items()),
        ]
    )
    return sorted(folder.glob("*.whl"))


def _unpack_qemu(packages: Sequence[Path], target: Path) -> None:
    """Take the one program out of the packages, which emulate thirty machines."""
    for package in packages:
        with (
            subprocess.Popen(["dpkg-deb", "--fsys-tarfile", str(package)], stdout=subprocess.PIPE) as process,
            tarfile.open(fileobj=process.stdout, mode="r|") as archive,
        ):
            for member in archive:
                # The first is a link to the second where both are there.
                if member.isfile() and re.fullmatch(r"\./usr/bin/qemu-aarch64(-static)?", member.name):
                    with target.open("wb") as file:
                        shutil.copyfileobj(archive.extractfile(member), file)
                    target.chmod(0o755)
    if not target.is_file():
        raise EmulatorUnavailableError("this system's package qemu-user-static has no emulator for aarch64.")


class _Apt:
    """Downloads of one architecture: the host's sources, and a state of its own in which no package is installed."""

    def __init__(self, folder: Path, architecture: str):
        """Read the lists of what there is.

        Args:
            folder: for the lists and the packages; kept between set-ups.
            architecture: in Debian's words.
        """
        self._folder, self._architecture, self._refused = folder, architecture, ""
        for name in ("state/lists/partial", "cache/archives/partial"):
            (folder / name).mkdir(parents=True, exist_ok=True)
        (folder / "status").touch()
        settings = {
            "APT::Architecture": architecture,
            "APT::Architectures::": architecture,
            "APT::Update::Error-Mode": "any",
            "Acquire::Languages": "none",
            "Acquire::Retries": "3",
            "Dir::State": folder / "state",
            "Dir::State::status": folder / "status",
            "Dir::Cache": folder / "cache",
            "Dir::Cache::archives": "archives/",
        }
        # What the host does after an update is about the host.
        cleared = ("APT::Architectures", "APT::Update::Post-Invoke", "APT::Update::Post-Invoke-Success")
        lines = [*(f"#clear {name};" for name in cleared), *(f'{name} "{value}";' for name, value in settings.items())]
        (folder / "apt.conf").write_text("\n".join(lines) + "\n", encoding="utf-8")
        try:
            self._run("apt-get", "update")
        except EmulatorUnavailableError as error:
            # One of several sources that can't be reached is no reason to give up.
            self._refused = f" ({error})"

    def default_python(self) -> str:
        """The version of Python that the distribution has, as `3.11`.

        Raises:
            EmulatorUnavailableError: as in `packages`.
        """
        found = re.search(r"python(3\.\d+)-minimal", self._run("apt-cache", "depends", "python3-minimal"))
        if found is None:
            raise EmulatorUnavailableError("this system's package sources don't say which Python is the default one.")
        return found[1]

    def packages(self, *names: str) -> list[Path]:
        """Download packages and all that they depend on.

        Raises:
            EmulatorUnavailableError: the sources don't have them, or can't be reached.
        """
        self._run("apt-get", "install", "--download-only", "--no-install-recommends", "--yes", *names)
        # Of earlier set-ups, older versions may be left.
        self._run("apt-get", "autoclean")
        return sorted((self._folder / "cache" / "archives").glob("*.deb"))

    def _run(self, program: str, *arguments: str) -> str:
        try:
            return _run([program, *arguments, "-c", str(self._folder / "apt.conf")])
        except EmulatorUnavailableError as error:
            raise EmulatorUnavailableError(f"{self._architecture} packages: {error}{self._refused}") from error


def _run(command: list[str]) -> str:
    """Run a command and return what it prints.

    Raises:
        EmulatorUnavailableError: it fails or takes too long; has its own reason.
    """
    name = " ".join(Path(word).name for word in command[:4] if not word.startswith("-"))
    try:
        done = subprocess.run(
            command,
            env={**os.environ, "LC_ALL": "C"},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=_SECONDS,
        )
    except subprocess.TimeoutExpired as error:
        raise EmulatorUnavailableError(f"{name}: no end after {_SECONDS} s.") from error
    if done.returncode:
        lines = [line.strip() for line in done.stderr.splitlines() if line.strip()] or ["no message"]
        reason = next((line for line in lines if re.match(r"E:|ERROR:", line)), lines[-1])
        raise EmulatorUnavailableError(f"{name} ended with {done.returncode}: {reason}")
    return done.stdout


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Let one process at a time set up; the lock goes with the process, however it ends."""
    import fcntl

    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


if __name__ == "__main__":
    try:
        print(set_up(Path(sys.argv[1]) if len(sys.argv) > 1 else None))
    except EmulatorUnavailableError as error:
        sys.exit(f"No emulated Arm machine: {error}")
