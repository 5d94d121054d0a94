"""The devices of this machine, by the names that recipes and commands give them."""

from __future__ import annotations

import re

from bmm_engine.errors import ConfigError, shown

_CUDA = re.compile(r"cuda(:[0-9]{1,4})?")
_CPU = re.compile(r"cpu(:0)?")


def device_fault(device: str) -> str:
    """What is wrong with a device's name, wherever it is; empty where nothing is."""
    if _CPU.fullmatch(device) or _CUDA.fullmatch(device):
        return ""
    return "it must be cpu, cuda or cuda:N"


def check_device(device: str) -> None:
    """Raise `ConfigError` for a device that this machine does not have, naming those that it has. To be called where work starts."""
    if fault := device_fault(device):
        raise ConfigError(f"device = {shown(device)}: {fault}.")
    if device.startswith("cpu"):
        return
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device != "cuda" and int(device.partition(":")[2]) < count:
        return
    if device == "cuda" and count:
        return
    has = f"cuda:0 to cuda:{count - 1}" if count > 1 else "cuda:0" if count else "no CUDA device that torch can use"
    raise ConfigError(
        f"device = {shown(device)}: this machine has {has}; set `device` in the recipe, or --device, to cpu{' or one of these' if count else ''}."
    )
