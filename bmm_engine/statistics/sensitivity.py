"""How much a model's predictions depend on what each of its linear modules gives: measured on calibration data, saved and loaded.

For the outputs y of a linear module (a row for each token) and the logits z of the whole model, the sensitivity is the mean over rows of J^T J,
J = dz/dy (out, out): the output-side factor of the Gauss-Newton matrix, as in K-FAC (Martens and Grosse 2015, arXiv 1503.05671; for merging, Tam et
al. 2023, arXiv 2312.04339, use it with Fisher information). An error e (out,) of y changes the logits by about e^T (J^T J) e.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn

from bmm_engine.errors import CheckpointError, CollectionError, EmptyCalibrationError
from bmm_engine.models.architecture import LinearModule, linear_modules, module_checkpoint_names, nothing_to_solve
from bmm_engine.models.calling import Mask, Padding, call_model, evaluating, kept_rows, padding_of, placement, to_device
from bmm_engine.models.fitted_inputs import knowing_padding
from bmm_engine.ops.gram import accumulate_gram
from bmm_engine.progress import track
from bmm_engine.statistics.fisher import differentiable, draw_labels, sample_seed
from bmm_engine.statistics.grams import weight_fingerprint
from bmm_engine.statistics.measured import MeasuredSet
from bmm_engine.statistics.records import Record, check_names
from bmm_engine.statistics.values import check_second_moment

Logits = Callable[[Any, Any], Tensor]
MAKER = "`bmm collect --sensitivity`"


def collect_sensitivity(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    logits: Logits | None = None,
    modules: Iterable[str] | None = None,
    seed: int = 0,
    mask: Mask = "attention_mask",
    calibration: str = "",
    progress: bool | None = None,
) -> SensitivitySet:
    """`S = mean_rows J^T J` (out, out), J = d logits / d output, of every linear module while `model` reads `batches`; labels are not needed.

    `batches`, `modules`, `mask`: as for `collect_grams`. The model's logits are `output.logits`, or its output, or what `logits(output, batch)`
    makes of it (for a bare encoder with a head of its own):
    * (batch, classes), or (batch,): J^T J is estimated without bias by the gradient of `v^T z`, v standard normal, one draw for each sample.
    * (batch, length, vocabulary): of the likelihood of tokens drawn from the model, one for each position that `mask` keeps: the sampled Fisher
      information, in which the most probable tokens count.

    Draws depend on `seed` and the number of the sample alone. Accumulates in float32 (float64 for a float64 model). One backward pass for each
    batch, through activations only. The model is left as it was, its `.grad` included.

    Of a module that the logits do not depend on (a pooler that the head does not read) it is zero; of one at least it is not.
    Raises `EmptyCalibrationError`, `CollectionError` (no logits; NaN or infinity), `ConfigError`.
    """
    chosen = linear_modules(model, modules)
    if not chosen:
        raise CollectionError(nothing_to_solve(model))
    device, dtype = placement(model)
    recorder = _Recorder(model, chosen)
    seen = 0
    with ExitStack() as stack:
        stack.enter_context(evaluating(model))
        stack.enter_context(differentiable([p for p in model.parameters() if p.is_floating_point()]))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(recorder.hooked())
        for batch in track(batches, "collecting sensitivities", show=progress):
            batch = to_device(batch, device)
            padding = padding_of(model, batch, mask)
            with knowing_padding(model, batch):
                output = call_model(model, batch)
            found = logits(output, batch) if logits is not None else getattr(output, "logits", output)
            recorder.add(_probe(found, padding, seed, seen, type(model).__name__), padding)
            seen += len(found)
    return recorder.finish(dtype, calibration or f"{seen} samples", seen)


class SensitivityRecord(Record):
    unread: list[str] = []  # noqa: RUF012  (pydantic copies it)
    samples: int = Field(0, ge=0)


@dataclass
class SensitivitySet(MeasuredSet):
    """The sensitivities of one expert: for each linear module the mean of J^T J (out, out). `unread`: the modules on which the logits do not depend:
    where a file holds zeros for another, it is damaged. `samples`: of the calibration; 0 where an older file does not say."""

    unread: list[str] = field(default_factory=list)
    samples: int = 0

    KEY = "sensitivity"
    TITLE = "sensitivity"
    RECORD = SensitivityRecord

    def __post_init__(self) -> None:
        if not self.on_disk:
            self.unread = [name for name, values in self.tensors.items() if not bool(values.any())]

    def check_values(self, name: str, values: Tensor) -> None:
        """It is a mean of J^T J. Raises `CheckpointError`, `NonFiniteGramError`."""
        if values.shape != self.shape(name):  # some of its rows
            return
        check_second_moment(values, self.where, f"the sensitivity of {name!r}", name)
        if bool(values.any()) == (name in self.unread):
            told, found = ("not 0", "all zero") if name not in self.unread else ("all zero", "not 0")
            raise CheckpointError(
                f"{self.where}: the sensitivity of {name!r} is {found}, by the file's record it was {told} when it was measured. The file is damaged"
                " or was edited: collect it again with `bmm collect --sensitivity`."
            )

    @classmethod
    def check_record(cls, path: Path, record: SensitivityRecord, names: list[str]) -> None:
        """The modules that are not read are some of those that were measured, not all. Raises `CheckpointError`."""
        check_names(path, "unread", record.unread, names, MAKER)
        if names and set(names) <= set(record.unread):
            raise CheckpointError(
                f"{path}: by its record the model's logits depend on none of its {len(names)} modules, so nothing can be weighed by it. Collect it"
                f" again with {MAKER}, on a model with its head."
            )

    @classmethod
    def check_shape(cls, path: Path, name: str, shape: tuple[int, ...]) -> None:
        """It is a square. Raises `CheckpointError`."""
        if len(shape) != 2 or not shape[0] == shape[1] > 0:
            raise CheckpointError(
                f"{path}: the sensitivity of {name!r} has shape {shape}, a square (out, out) was expected. Collect it again."
            )


class _Recorder:
    """Accumulates what is differentiated at each module's output."""

    def __init__(self, model: nn.Module, modules: Mapping[str, LinearModule]):
        self.model, self.modules = model, modules
        self._outputs: list[tuple[str, Tensor]] = []  # of this batch; a module may be called more than once
        self._totals: dict[str, Tensor] = {}
        self._rows = dict.fromkeys(modules, 0)

    def hooked(self) -> ExitStack:
        stack = ExitStack()
        for name in self.modules:
            stack.callback(self.model.get_submodule(name).register_forward_hook(partial(self._keep, name)).remove)
        return stack

    def _keep(self, name: str, module: nn.Module, args: Any, output: Tensor) -> None:
        self._outputs.append((name, output))

    def add(self, probe: Tensor, padding: Padding | None) -> None:
        """`probe`: the number whose gradients are measured."""
        names, outputs = zip(*self._outputs, strict=True) if self._outputs else ((), ())
        self._outputs = []
        gradients = torch.autograd.grad(probe, outputs, allow_unused=True) if outputs else ()
        for name, gradient in zip(names, gradients, strict=True):
            if gradient is None:
                continue  # this call does not matter to the logits; another may
            rows = kept_rows(name, gradient, padding).reshape(-1, gradient.shape[-1])
            if not bool(torch.isfinite(rows.sum(dtype=torch.float64))):
                raise CollectionError(
                    f"{name}: the logits' derivative by its output is NaN or infinite. Check the calibration data, or run the model in float32."
                )
            if name not in self._totals:
                wide = torch.float64 if rows.dtype == torch.float64 else torch.float32
                self._totals[name] = torch.zeros(rows.shape[1], rows.shape[1], dtype=wide, device=rows.device)
            accumulate_gram(self._totals[name], rows.detach())
            self._rows[name] += len(rows)

    def finish(self, dtype: torch.dtype, calibration: str, samples: int) -> SensitivitySet:
        """Raises `EmptyCalibrationError`, `CollectionError`."""
        if not any(self._rows.values()):
            raise EmptyCalibrationError(
                "The calibration set is empty, all padding, or reaches none of the modules. Give at least a few dozen samples of the expert's task."
            )
        live = {name: self.model.get_submodule(name).weight for name in self.modules}
        found = SensitivitySet(
            tensors={name: self._mean(name) for name in self.modules},
            fingerprints={name: weight_fingerprint(weight.detach(), dtype) for name, weight in live.items()},  # type: ignore[operator]
            weights_dtype=str(dtype).removeprefix("torch."),
            calibration=calibration,
            samples=samples,
            aliases={saved: own for own, saved in module_checkpoint_names(self.model, live).items() if saved != own},
        )
        if len(found.unread) == len(found.tensors):
            raise CollectionError(
                f"{type(self.model).__name__}: its logits depend on none of the {len(found.tensors)} modules that were measured (the first is"
                f" {found.unread[0]!r}): their derivatives are all zero. Give the model with its trained head."
            )
        return found

    def _mean(self, name: str) -> Tensor:
        """Zeros where the logits do not depend on the module (a pooler that the head does not read)."""
        if self._rows[name]:
            return self._totals[name].div_(self._rows[name])
        outputs, like = self.modules[name].out_features, next(iter(self._totals.values()))
        return torch.zeros(outputs, outputs, dtype=like.dtype, device=like.device)


def _probe(logits: Any, padding: Padding | None, seed: int, first: int, model: str) -> Tensor:
    """A number whose gradient g has the expectation of `g^T g` that is wanted, over samples numbered from `first`."""
    if not isinstance(logits, Tensor) or logits.dim() not in (1, 2, 3):
        found = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise CollectionError(
            f"{model}: sensitivities need logits (batch, classes) or (batch, length, vocabulary), and it gave {found}. Give the model with its"
            " head, or `logits`, a function of its output and the batch."
        )
    if not logits.requires_grad:
        raise CollectionError(
            f"{model}: its logits cannot be differentiated; is a part of it run without gradients, or quantised?"
        )
    generators = [torch.Generator().manual_seed(sample_seed(seed, first + i)) for i in range(len(logits))]
    if logits.dim() < 3:
        shape = logits.shape[1:]
        drawn = torch.stack([torch.randn(shape, generator=own, dtype=torch.float64) for own in generators])
        return (logits * drawn.to(logits)).sum()
    log_p = (logits if logits.dtype == torch.float64 else logits.float()).log_softmax(-1)
    keep = None if padding is None else padding.rows(f"the logits of {model}", log_p)
    total = log_p.new_zeros(())
    for i, own in enumerate(generators):
        kept = log_p[i] if keep is None else log_p[i][keep.reshape(log_p.shape[:2])[i]]
        if len(kept):
            tokens = torch.tensor(draw_labels(kept, own), device=kept.device)
            total = total + kept.gather(1, tokens[:, None]).sum()
    return total
