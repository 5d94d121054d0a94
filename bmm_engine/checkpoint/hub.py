"""A model id on the Hugging Face hub -> the folder of its files in the local cache."""

from __future__ import annotations

import logging
import re
from pathlib import Path

from bmm_engine.checkpoint.sidecars import may_come, stays_behind
from bmm_engine.errors import CheckpointError

_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_SAFETENSORS = ("*.safetensors", "*.safetensors.index.json")
_BIN = ("pytorch_model*.bin", "pytorch_model.bin.index.json", "adapter_model.bin")
_ADAPTER = "adapter_config.json"  # no sidecar: a merged model has none

logger = logging.getLogger(__name__)


def looks_like_hub_id(text: str) -> bool:
    """True for `name` or `organisation/name`; False for what can only be a path."""
    return _ID.fullmatch(text) is not None and not text.endswith((".safetensors", ".bin"))


def fetch(hub_id: str, *, revision: str | None, cache_dir: str | Path | None, local_files_only: bool) -> Path:
    """Download what is missing of one model (or adapter) and return its snapshot folder.

    Only safetensors weights are fetched where the repository has them, else the bin files. When the hub cannot be
    reached the cached snapshot is used, and the log says so. Raises CheckpointError that tells apart an unknown model,
    a gated one, and no connection with nothing cached.
    """
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    what = f"{hub_id!r} (revision {revision or 'main'})"
    names: list[str] = []
    weights: tuple[str, ...] = _SAFETENSORS
    beside: list[str] = []
    offline = local_files_only
    if not offline:
        try:
            info = HfApi().model_info(hub_id, revision=revision, timeout=10)
            names = [file.rfilename for file in info.siblings or []]
            if not any("/" not in name and name.endswith(".safetensors") for name in names):
                weights = _BIN
            beside = _beside(names)
        except GatedRepoError as error:
            raise CheckpointError(
                f"{what}: access to this model is restricted; accept its terms on its hub page and log in "
                "(`hf auth login`)"
            ) from error
        except RevisionNotFoundError as error:
            raise CheckpointError(
                f"{what}: the model exists on the hub, this revision does not; check `revision`"
            ) from error
        except RepositoryNotFoundError as error:
            raise CheckpointError(
                f"{what}: no such directory, and no such model on the hub; correct the path or the id, or log in "
                "(`hf auth login`) if the model is private"
            ) from error
        except Exception as error:
            # The errors of the transport differ between versions of the client. None is lost: either the cached
            # snapshot serves, and the log says so, or the error below is raised.
            logger.warning("%s: the hub cannot be reached (%s); looking in the local cache", what, error)
            offline = True
    try:
        folder = snapshot_download(
            hub_id,
            revision=revision,
            cache_dir=cache_dir,
            local_files_only=offline,
            allow_patterns=[*weights, *beside, _ADAPTER],
            ignore_patterns=[f"{folder}/*" for folder in _folders(names) - _folders(beside)] + ["consolidated*"],
        )
    except Exception as error:
        reason = "the local cache does not hold it complete" if offline else "the download failed"
        remedy = "connect to the network (or unset local_files_only and HF_HUB_OFFLINE)" if offline else "try again"
        raise CheckpointError(
            f"{what}: no such directory, and as a model on the hub {reason} ({error}); {remedy}, or pass the path of "
            "a local directory"
        ) from error
    return Path(folder)


def _beside(names: list[str]) -> list[str]:
    """Of a repository's files those that may belong beside the weights, as patterns that match just them."""
    found = [name for name in names if not stays_behind(name, code=True)]
    # Weights of modules that stand beside the model; of their two forms, the first there is.
    modules = {folder for folder in _folders(names) if may_come(folder)}
    for folder in modules:
        weights = [name for name in names if name.startswith(f"{folder}/") and name.endswith((".safetensors", ".bin"))]
        found += [name for name in weights if name.endswith(".safetensors")] or weights
    kept = [
        name for name in found if "/" not in name or name.split("/")[0] in modules or name.endswith((".py", ".npy"))
    ]
    return [re.sub(r"([*?\[])", r"[\1]", name) for name in kept]


def _folders(names: list[str]) -> set[str]:
    return {name.split("/")[0] for name in names if "/" in name}
