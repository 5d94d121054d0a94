"""`python -m bmm_engine`: versions, devices, and each backend with the reason why it is not available."""

from __future__ import annotations

import importlib.metadata
import platform

import torch

import bmm_engine
from bmm_engine.ops import _dispatch, _native, _triton
from bmm_engine.ops.gram import cpu as gram_cpu

_PACKAGES = ("torch", "triton", "cupy-cuda13x", "transformers", "safetensors")


def report() -> list[tuple[str, str]]:
    """(name, value) lines. Nothing here raises for what is absent."""
    lines = [("bmm_engine", bmm_engine.__version__), ("python", platform.python_version())]
    lines += [(package, _version(package)) for package in _PACKAGES]
    lines.append(("machine", f"{platform.system()} {platform.machine()}"))
    lines.append(("cpu threads", str(torch.get_num_threads())))
    lines += [(f"cuda:{i}", torch.cuda.get_device_name(i)) for i in range(torch.cuda.device_count())]
    if not torch.cuda.is_available():
        lines.append(("cuda", "torch sees no CUDA device"))
    lines.append(("backend torch", "available"))
    lines.append(("backend cpu", _native.cpu_missing() or f"available, instruction set {gram_cpu.isas()[0]}"))
    lines.append(("backend cuda", _native.cuda_missing() or "available"))
    lines.append(("backend triton", _triton.missing() or _triton.describe()))
    order = "; ".join(f"{device}: {', '.join(names)}" for device, names in _dispatch.PREFERENCE.items())
    lines.append(("auto tries", order))
    return lines


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def main() -> None:
    for name, value in report():
        print(f"{name:<14} {value}")


if __name__ == "__main__":
    main()
