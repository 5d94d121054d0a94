"""Stage 1: run an expert over calibration batches and measure the Gram of every linear module's input."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from bmm_engine.errors import CollectionError, ConfigError, EmptyCalibrationError
from bmm_engine.models.architecture import LinearModule, linear_modules, module_checkpoint_names, nothing_to_solve
from bmm_engine.models.calling import Mask, Padding, evaluating, kept_rows, padding_of, placement, to_device
from bmm_engine.models.heads import run_body, without_heads
from bmm_engine.progress import track
from bmm_engine.statistics.grams import GramAccumulator, GramSet, weight_fingerprint

logger = logging.getLogger(__name__)


def collect_grams(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    modules: Iterable[str] | None = None,
    mask: Mask = "attention_mask",
    calibration: str = "",
    backend: str = "auto",
    progress: bool | None = None,
) -> GramSet:
    """Measure `sum_rows x x^T` of every linear module's input while `model` reads `batches`.

    `batches`: mappings (called as `model(**batch)`), tuples (`model(*batch)`) or tensors (`model(batch)`); tensors are moved to the device
    of the model's first parameter. `modules`: shell patterns over module names (default: every `nn.Linear` and Conv1D but the task heads).
    `mask`: the key of a batch's padding mask (batch, length), or a function of the batch that gives it, or None; rows where it is 0 are not
    counted. Modules that read the same tensor share one Gram. Accumulates in float32 (float64 for a float64 model).
    The model is left as it was: hooks removed, training flags restored, also after an error; nothing is differentiated.

    Raises `EmptyCalibrationError` (no batches, or only padding), `CollectionError` (a mask that does not fit; a module named in `modules` that no
    batch reaches, others are left out with a warning; sharing that changes from batch to batch), `NonFiniteGramError` (module, count), `ConfigError`
    (patterns).
    """
    chosen = linear_modules(model, modules)
    if not chosen:
        raise ConfigError(nothing_to_solve(model))
    recorder = Recorder(model, chosen, backend)
    device, _ = placement(model)
    with evaluating(model), without_heads(model, chosen), recorder.hooked(), torch.inference_mode():
        for batch in track(batches, "collecting Grams", show=progress):
            batch = to_device(batch, device)
            with recorder.batch(padding_of(model, batch, mask)):
                run_body(model, batch)
    return recorder.finish(calibration, named=modules is not None)


class Recorder:
    """Accumulates each module's rows; modules that read the same tensor object follow the first that read it, their leader."""

    def __init__(self, model: nn.Module, modules: Mapping[str, LinearModule], backend: str = "auto"):
        self.model = model
        self.modules = modules
        self.backend = backend
        self.grams: dict[str, GramAccumulator] = {}
        self.leader: dict[str, str] = {}
        self._names = {model.get_submodule(name): name for name in modules}
        self._batches = 0
        self._padding: Padding | None = None
        # What each leader read last. Weak, so that no activation lives longer than the forward pass keeps it.
        self._read: dict[str, tuple[weakref.ref[Tensor], Tensor]] = {}

    @contextmanager
    def hooked(self, names: Iterable[str] | None = None) -> Iterator[None]:
        """Listen to the modules called `names`, by default to all."""
        listened = list(self._names) if names is None else [self.model.get_submodule(name) for name in names]
        handles = [module.register_forward_pre_hook(self, with_kwargs=True) for module in listened]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    @contextmanager
    def batch(self, padding: Padding | None) -> Iterator[None]:
        """One forward pass; rows that are `padding` do not count."""
        self._padding = padding
        yield
        self._read.clear()
        self._batches += 1

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = args[0] if args else next(iter(kwargs.values()))
        name = self._names[module]
        leader = self._leader_of(name, x)
        if leader != name:
            self._check_follower(name, leader, x)
            return
        # A checksum tells an input that was changed in place between two readers (inference tensors count no versions).
        self._read[name] = (weakref.ref(x), x.sum(dtype=torch.float64))
        gram = self.grams.get(name)
        if gram is None:
            dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
            gram = self.grams[name] = GramAccumulator(x.shape[-1], name=name, dtype=dtype, device=x.device)
        gram.update(kept_rows(name, x, self._padding), backend=self.backend)

    def _leader_of(self, name: str, x: Tensor) -> str:
        if name not in self.leader:
            readers = [other for other, (ref, _) in self._read.items() if ref() is x]
            self.leader[name] = readers[-1] if readers else name
        return self.leader[name]

    def _check_follower(self, name: str, leader: str, x: Tensor) -> None:
        ref, checksum = self._read.get(leader, (lambda: None, None))
        if ref() is not x:
            problem = "but not now"
        elif checksum is not None and not torch.equal(x.sum(dtype=torch.float64), checksum):
            problem = "but it was changed in place in between"
        else:
            return
        raise CollectionError(
            f"{name} read the same input as {leader} at first, {problem}: their Grams cannot be shared. Measure them in two passes, each with"
            " `modules` naming one of them."
        )

    def finish(self, calibration: str = "", *, named: bool = True) -> GramSet:
        """`named`: the modules were asked for, so all of them must have been called; else the log hears of those that were not. Raises
        `EmptyCalibrationError` and `CollectionError` as `collect_grams` does."""
        if self._batches == 0:
            raise EmptyCalibrationError(
                "The calibration set is empty: no batches. Give at least a few dozen samples of the expert's task."
            )
        missing = [name for name in self.modules if name not in self.leader]
        if missing:
            told = f"{len(missing)} of {len(self.modules)} linear modules were never called by the calibration batches, the first is {missing[0]!r}"
            if named or len(missing) == len(self.modules):
                raise CollectionError(f"{told}. Leave them out with `modules`, or give batches that reach them.")
            logger.warning("%s: no Gram is measured there", told)
        empty = [name for name, gram in self.grams.items() if gram.rows == 0]
        if empty:
            raise EmptyCalibrationError(
                f"{empty[0]}: every calibration row is padding (by the mask). Check the mask and the texts."
            )
        groups = {name: self.leader[name] for name in self.modules if name in self.leader}
        _, dtype = placement(self.model)
        return GramSet(
            grams=self.grams,
            modules=groups,
            fingerprints={n: weight_fingerprint(self.model.get_submodule(n).weight, dtype) for n in groups},  # type: ignore[arg-type]
            weights_dtype=str(dtype).removeprefix("torch."),
            calibration=calibration or f"{self._batches} batches",
            aliases={
                saved: live for live, saved in module_checkpoint_names(self.model, groups).items() if saved != live
            },
            transposed=tuple(name for name in groups if self.modules[name].transposed),
        )
