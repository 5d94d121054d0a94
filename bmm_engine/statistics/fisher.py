"""The diagonal Fisher information of a model's parameters: measured on calibration data, saved and loaded."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated, Any, Literal, get_args

import torch
from pydantic import Field
from torch import Tensor, nn

from bmm_engine.errors import CollectionError, ConfigError, EmptyCalibrationError
from bmm_engine.models.calling import Mask, call_model, evaluating, mask_of, placement, samples_of, to_device
from bmm_engine.models.naming import checkpoint_names
from bmm_engine.progress import track
from bmm_engine.statistics.grams import weight_fingerprint
from bmm_engine.statistics.measured import MeasuredSet
from bmm_engine.statistics.records import Record
from bmm_engine.statistics.values import check_not_negative

Labels = Literal["expected", "sampled", "data"]
_IGNORED = -100  # the label of positions that do not count, as everywhere in transformers


def collect_fisher(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    labels: Labels = "expected",
    examples: int = 256,
    seed: int = 0,
    mask: Mask = "attention_mask",
    next_token: bool | None = None,
    calibration: str = "",
    progress: bool | None = None,
) -> FisherSet:
    """`F = E_x E_y (d log p(y | x) / d theta)^2`, entry by entry, for every floating-point parameter (arXiv 2111.09832).

    `batches`: as for `collect_grams`; the first `examples` samples count, each differentiated by itself. The model gives `logits`, or is them:
    * (batch, classes): classification. `labels`: "expected" takes the exact expectation over y, one backward pass for each class; "sampled"
      draws y from the model; "data" takes `labels` of the batch (the empirical Fisher). One column is regression: y is normal around it.
    * (batch, length, vocabulary): `log p` is the sum over a sequence's positions, labels "sampled" or "data". `next_token`: whether a position
      speaks of the token after it; by default of classes named ...ForCausalLM or ...LMHeadModel, whose own input is then the data. Positions
      where `mask` is 0 (or, where the batch has labels, those labelled -100) do not count.

    Draws depend on `seed` and the number of the sample alone. Computed in the model's dtype, squared and summed in float32 (float64 for a
    float64 model). The model is left as it was, its `.grad` included.

    Raises `EmptyCalibrationError`, `CollectionError` (no logits, a gradient that is not finite), `ConfigError`.
    """
    if labels not in get_args(Labels):
        raise ConfigError(f"labels must be one of {', '.join(map(repr, get_args(Labels)))}, not {labels!r}.")
    if examples < 1:
        raise ConfigError(f"examples must be at least 1, not {examples}.")
    parameters = {name: p for name, p in model.named_parameters() if p.is_floating_point()}
    device, dtype = placement(model)
    totals = {
        name: torch.zeros_like(
            p, dtype=torch.float64 if p.dtype == torch.float64 else torch.float32, requires_grad=False
        )
        for name, p in parameters.items()
    }
    likelihood = _Likelihood(model, labels, seed, mask, next_token)
    seen = 0
    with evaluating(model), differentiable(parameters.values()), torch.enable_grad():
        samples = _samples(batches, examples, device)
        for number, sample in enumerate(track(samples, "collecting Fisher information", total=examples, show=progress)):
            terms = likelihood.terms(sample, number)
            seen += bool(terms)
            for i, (share, log_p) in enumerate(terms):
                gradients = torch.autograd.grad(
                    log_p, list(parameters.values()), retain_graph=i < len(terms) - 1, allow_unused=True
                )
                for total, gradient in zip(totals.values(), gradients, strict=True):
                    if gradient is not None:
                        gradient = gradient.to(total.dtype)
                        total.addcmul_(gradient, gradient, value=share)
    if not seen:
        raise EmptyCalibrationError(
            "No sample of the calibration set has anything to predict: it is empty, or all padding. Give a few hundred of the expert's task."
        )
    for name, total in totals.items():
        if not torch.isfinite(total.div_(seen).sum()):
            raise CollectionError(
                f"{name}: its Fisher information is NaN or infinite. Check the calibration data, or run the model in float32."
            )
    aliases, buffers = _other_names(model, parameters)
    return FisherSet(
        tensors=totals,
        examples=seen,
        labels=labels,
        fingerprints={name: weight_fingerprint(p, dtype) for name, p in parameters.items()},
        weights_dtype=str(dtype).removeprefix("torch."),
        calibration=calibration or f"{seen} samples",
        aliases=aliases,
        buffers=buffers,
    )


class FisherRecord(Record):
    """What a file of Fisher information says beside its tensors."""

    examples: Annotated[int, Field(ge=0, le=10**12)]
    labels: str
    buffers: list[str]


@dataclass
class FisherSet(MeasuredSet):
    """The diagonal Fisher information of one expert: for each parameter a tensor of its shape, as the model stores it.

    `buffers`: floating-point tensors of the model that are no parameters and so have none.
    """

    examples: int = 0
    labels: str = ""
    buffers: tuple[str, ...] = ()

    KEY = "fisher"
    TITLE = "Fisher information"
    RECORD = FisherRecord

    def __post_init__(self) -> None:
        self.buffers = tuple(self.buffers)

    def check_values(self, name: str, values: Tensor) -> None:
        """A mean of squares is finite and not negative. Raises `CheckpointError`."""
        check_not_negative(values, self.where, f"the Fisher information of {name!r}")


class _Likelihood:
    """What a model says of one sample: terms `(share, log p)` with `F = sum_i share_i (d log p_i)^2`."""

    def __init__(self, model: nn.Module, labels: Labels, seed: int, mask: Mask, next_token: bool | None):
        self.model, self.labels, self.seed, self.mask = model, labels, seed, mask
        causal = type(model).__name__.endswith(("ForCausalLM", "LMHeadModel"))
        self.next_token = causal if next_token is None else next_token

    def terms(self, sample: Any, number: int) -> list[tuple[float, Tensor]]:
        """Of a batch of one sample; none where it has nothing to predict."""
        given = sample.get("labels") if isinstance(sample, Mapping) else None
        inputs = {key: v for key, v in sample.items() if key != "labels"} if given is not None else sample
        output = call_model(self.model, inputs)
        logits = getattr(output, "logits", output)
        if not isinstance(logits, Tensor) or logits.dim() not in (2, 3) or logits.shape[0] != 1:
            found = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
            raise CollectionError(
                f"{type(self.model).__name__}: Fisher information needs logits (batch, classes) or (batch, length, vocabulary) from the model,"
                f" which gave {found} for one sample. Wrap it in a module that returns logits."
            )
        if not torch.isfinite(logits.detach().sum()):
            raise CollectionError(
                f"{type(self.model).__name__}: its logits for sample {number} are NaN or infinite. Check the calibration data, or run the model in"
                " float32."
            )
        logits = logits[0] if logits.dtype == torch.float64 else logits[0].float()
        generator = torch.Generator().manual_seed(sample_seed(self.seed, number))
        if logits.dim() == 1:
            return self._of_a_class(logits, given, generator)
        return self._of_a_sequence(logits, sample, given, generator)

    def _of_a_class(
        self, logits: Tensor, given: Tensor | None, generator: torch.Generator
    ) -> list[tuple[float, Tensor]]:
        if len(logits) == 1:
            return self._of_a_number(logits[0], given, generator)
        log_p = logits.log_softmax(-1)
        if self.labels == "expected":
            return [(share, log_p[y]) for y, share in enumerate(log_p.exp().tolist()) if share > 0]
        if self.labels == "sampled":
            return [(1.0, log_p[draw_labels(log_p[None], generator)[0]])]
        label = int(self._given(given).reshape(-1)[0])
        if not 0 <= label < len(logits):
            raise ConfigError(f"labels: {label} is none of the model's {len(logits)} classes.")
        return [(1.0, log_p[label])]

    def _of_a_number(
        self, mean: Tensor, given: Tensor | None, generator: torch.Generator
    ) -> list[tuple[float, Tensor]]:
        """A normal of variance 1: its score is `(y - mean) d mean`, whose square has the expectation `(d mean)^2`."""
        if self.labels == "expected":
            return [(1.0, mean)]
        if self.labels == "sampled":
            return [(float(torch.randn((), generator=generator, dtype=torch.float64)) ** 2, mean)]
        return [(1.0, -0.5 * (self._given(given).reshape(-1)[0].to(mean.dtype) - mean).square())]

    def _of_a_sequence(
        self, logits: Tensor, sample: Any, given: Tensor | None, generator: torch.Generator
    ) -> list[tuple[float, Tensor]]:
        if self.labels == "expected":
            raise ConfigError(
                f"{type(self.model).__name__}: labels='expected' would need a backward pass for each of {logits.shape[1]} classes at each"
                " position of a sequence; use labels='sampled' or 'data'."
            )
        targets = given[0] if given is not None else None
        if targets is None and self.next_token and isinstance(sample, Mapping) and "input_ids" in sample:
            targets = sample["input_ids"][0]
        padding = mask_of(sample, self.mask)
        for what, own in (("the padding mask", None if padding is None else padding[0]), ("labels", targets)):
            if own is not None and own.shape != logits.shape[:1]:
                raise CollectionError(
                    f"{type(self.model).__name__}: logits for {len(logits)} positions, but {what} of shape {tuple(own.shape)}, for a sample."
                )
        real = torch.ones(len(logits), dtype=torch.bool, device=logits.device) if padding is None else padding[0] != 0
        kept = real if given is None else real & (given[0] != _IGNORED)
        if self.next_token:
            kept, logits = real[:-1] & kept[1:], logits[:-1]
            targets = None if targets is None else targets[1:]
        logits = logits[kept]
        if not len(logits):
            return []
        log_p = logits.log_softmax(-1)
        drawn = draw_labels(log_p, generator) if self.labels == "sampled" else None
        chosen = self._given(targets)[kept] if drawn is None else torch.tensor(drawn, device=log_p.device)
        return [(1.0, log_p.gather(1, chosen[:, None]).sum())]

    def _given(self, labels: Tensor | None) -> Tensor:
        if labels is None:
            raise ConfigError("labels='data' needs `labels` in each batch (a mapping); or use 'expected' or 'sampled'.")
        return labels


def _samples(batches: Iterable[Any], limit: int, device: torch.device) -> Iterator[Any]:
    """Batches of one sample each, `limit` of them at most."""
    left = limit
    for batch in batches:
        batch = to_device(batch, device)
        size = samples_of(batch)
        for i in range(min(size, left)):
            yield _pick(batch, i, size)
        left -= min(size, left)
        if not left:
            return


def _pick(batch: Any, index: int, size: int) -> Any:
    if isinstance(batch, Tensor):
        return batch[index : index + 1] if batch.dim() and len(batch) == size else batch
    if isinstance(batch, Mapping):
        return {key: _pick(value, index, size) for key, value in batch.items()}
    if isinstance(batch, (tuple, list)):
        return tuple(_pick(value, index, size) for value in batch)
    return batch


def draw_labels(log_p: Tensor, generator: torch.Generator) -> list[int]:
    """One label for each row of log-probabilities (n, labels), by inversion on the CPU: the same on every device."""
    cumulative = log_p.detach().double().cpu().exp().cumsum(-1)
    heights = torch.rand(len(cumulative), 1, generator=generator, dtype=torch.float64) * cumulative[:, -1:]
    found = torch.searchsorted(cumulative, heights, right=True).clamp_(max=cumulative.shape[1] - 1)
    return [int(y) for y in found[:, 0]]


def sample_seed(seed: int, number: int) -> int:
    """64 bits of its own for each sample."""
    digest = hashlib.blake2b(f"{seed}\0{number}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")


@contextmanager
def differentiable(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Frozen ones too, while the context lasts."""
    frozen = [p for p in parameters if not p.requires_grad]
    try:
        for parameter in frozen:
            parameter.requires_grad_(True)
        yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)


def _other_names(model: nn.Module, parameters: Mapping[str, nn.Parameter]) -> tuple[dict[str, str], tuple[str, ...]]:
    """Names of tied weights and names in the checkpoint -> parameter; and the floating-point buffers, by all their names."""
    own = {id(parameter): name for name, parameter in parameters.items()}
    saved = checkpoint_names(model)
    aliases: dict[str, str] = {}
    buffers: list[str] = []
    for live, tensor in model.state_dict(keep_vars=True).items():
        names = dict.fromkeys((live, saved.get(live, live)))
        if id(tensor) in own:
            aliases |= {name: own[id(tensor)] for name in names if name != own[id(tensor)]}
        elif tensor.is_floating_point():
            buffers.extend(names)
    return aliases, tuple(buffers)
