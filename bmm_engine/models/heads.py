"""Task heads: which tensors of a model they are, and passes that end where only they are left."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

from torch import nn

from bmm_engine.models.architecture import is_bare, is_head
from bmm_engine.models.calling import BodyEnd, call_model


@contextmanager
def without_heads(model: nn.Module, wanted: Iterable[str] = ()) -> Iterator[None]:
    """Meanwhile a pass ends with `BodyEnd` where only heads are left, unless one of the modules `wanted` is a head's: logits over a vocabulary are
    large, and who measures what the body reads needs none of them (nor labels)."""
    with ExitStack() as stack:
        if not any(is_head(name, model) for name in wanted):
            body, outputs = body_of(model), output_embeddings(model)
            if body is not model:
                stack.callback(body.register_forward_hook(_end).remove)
            if outputs is not None:
                stack.callback(outputs.register_forward_pre_hook(_end).remove)
        yield


def run_body(model: nn.Module, batch: Any) -> None:
    """A pass of a batch that may end before the heads. Raises as `call_model`."""
    with suppress(BodyEnd):
        call_model(model, batch)


def body_of(model: nn.Module) -> nn.Module:
    """What heads stand on: `base_model` of a transformers model, else the model itself."""
    body = None if is_bare(model) else getattr(model, "base_model", None)
    return body if isinstance(body, nn.Module) else model


def output_embeddings(model: nn.Module) -> nn.Module | None:
    get: Any = getattr(model, "get_output_embeddings", None)
    found = get() if get is not None else None
    return found if isinstance(found, nn.Module) else None


def head_parameters(model: nn.Module) -> set[str]:
    """Names of parameters that are heads' alone: not those that are tied to something in the body."""
    names = dict(model.named_parameters(remove_duplicate=False))
    modules = {name: is_head(name, model) for name, _ in model.named_modules() if name}
    own = {name for name in names if modules.get(name.rpartition(".")[0], False)}
    body = {id(parameter) for name, parameter in names.items() if name not in own}
    return {name for name in own if id(names[name]) not in body}


def _end(*_: Any) -> None:
    raise BodyEnd
