"""`pytorch_model.bin`: read only as plain tensors, never as a pickle that may run code."""

from __future__ import annotations

from pathlib import Path

import torch

from bmm_engine.checkpoint.guard import regular_file
from bmm_engine.checkpoint.layout import check_weight_file, file_stamp
from bmm_engine.checkpoint.source import TensorSpec, check_tensors, own_copy, shared_storage
from bmm_engine.errors import CheckpointError


class TorchBinFile:
    """One torch.save file. The format has no index of its tensors, so it is mapped from a read until `release`.

    Raises CheckpointError for a file that torch refuses under `weights_only=True` or that holds more than tensors.
    """

    def __init__(self, path: Path):
        check_weight_file(path)
        self.path = path
        self.stamp = file_stamp(path)
        self._mapped: dict[str, torch.Tensor] | None = None
        tensors = self._tensors()
        self.aliases = shared_storage(tensors)
        self.specs = {
            name: TensorSpec(name, tuple(tensor.shape), tensor.dtype, path.name) for name, tensor in tensors.items()
        }
        self.release()

    def read(self, name: str, rows: slice | None = None) -> torch.Tensor:
        """One tensor, or a range of its rows, in fresh memory. Raises CheckpointError when the file changed."""
        # A mapped file that was cut meanwhile would end the process with SIGBUS.
        if regular_file(self.path).st_size != self.stamp[0]:
            raise CheckpointError(f"{self.path}: changed on disk since it was opened; open the checkpoint again")
        return own_copy(self._tensors()[name], name, rows)

    def release(self) -> None:
        """Unmap the file; the next read maps it again."""
        self._mapped = None

    def _tensors(self) -> dict[str, torch.Tensor]:
        mapped = self._mapped  # another thread may release the file meanwhile
        if mapped is None:
            try:
                changed = file_stamp(self.path) != self.stamp
                state_dict = torch.load(self.path, map_location="cpu", weights_only=True, mmap=True)
            except Exception as error:  # a damaged or hostile pickle may raise anything
                reason = (str(error).strip() or type(error).__name__).splitlines()[0]
                raise CheckpointError(
                    f"{self.path}: cannot be read as plain tensors ({reason}); download it again or, where you "
                    "trust it, load it with transformers and save it as safetensors"
                ) from error
            if changed:
                raise CheckpointError(f"{self.path}: changed on disk since it was opened; open the checkpoint again")
            if not isinstance(state_dict, dict):
                raise CheckpointError(
                    f"{self.path}: holds a {type(state_dict).__name__}, not a state dict; save it as safetensors"
                )
            self._mapped = mapped = check_tensors(state_dict, str(self.path))
        return mapped
