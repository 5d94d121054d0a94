"""What is no model and no adapter that can be read here, but is often given as one: said what it is, and what to do with it."""

from __future__ import annotations

import logging
import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

from bmm_engine.checkpoint.adapter_config import CONFIG_FILENAME, MERGE_REMEDY
from bmm_engine.checkpoint.config_differences import config_differences
from bmm_engine.checkpoint.guard import read_json_object
from bmm_engine.checkpoint.safetensors_io import SafetensorsFile
from bmm_engine.errors import CheckpointError, listed

logger = logging.getLogger(__name__)

_PEFT = re.compile(r"(^|\.)lora_(A|B|embedding_[AB]|magnitude_vector)(\.|$)")
_KOHYA = re.compile(r"\.(lora_(down|up|mid)\.weight|alpha|dora_scale|diff(_b)?)$")
_LYCORIS = re.compile(
    r"\.(hada_w[12](_[ab])?|hada_t[12]|lokr_w[12](_[ab])?|lokr_t2|oft_blocks|oft_diag|on_input|w_norm|b_norm|a1|a2|b1|b2)(\.weight)?$"
)
_DIFFUSERS = re.compile(r"(\.lora\.(up|down)\.weight|_lora\.(up|down)\.weight|\.lora_linear_layer\.(up|down)\.weight)$")
# Trained tensors that go with an adapter and are in no file that PEFT reads.
_BESIDE = re.compile(r"(new_|added_|token_?)?embed\w*|non_lora_trainables|learned_embeds|lm_head|embed_tokens")
_TRAINING = re.compile(r"optimizer|scheduler|rng_state|training_args|scaler|trainer_state|random_states|global_step")


def check_no_adapter(path: Path, names: Collection[str]) -> None:
    """Raise CheckpointError for a file that is nothing but an adapter, in PEFT's form or another; `names`: of its tensors."""
    for kind, pattern in (("kohya", _KOHYA), ("LyCORIS", _LYCORIS), ("diffusers", _DIFFUSERS)):
        own = [name for name in names if pattern.search(name)]
        if own and all(_KOHYA.search(name) or pattern.search(name) for name in names):
            raise CheckpointError(
                f"{path}: is an adapter in the form of {kind} ({own[0]!r} and {len(names) - 1} more), not a model. Such files are for image"
                " generators, and their names do not tell the modules: merge it into its base with the tool that it is for, and pass the result."
            )
    own = [name for name in names if _PEFT.search(name)]
    if not own or not all(_PEFT.search(name) or name.startswith("base_model.model.") for name in names):
        return
    beside = path.parent / CONFIG_FILENAME
    if beside.exists():
        raise CheckpointError(
            f"{path}: is the weight file of a PEFT adapter ({own[0]!r}); pass its folder, {path.parent}, which has {CONFIG_FILENAME}"
        )
    raise CheckpointError(
        f"{path}: is the weight file of a PEFT adapter ({own[0]!r}), without the {CONFIG_FILENAME} that says its rank and scaling. Put that file"
        f" beside it, under the name adapter_model{path.suffix}, and pass the folder; or {MERGE_REMEDY}"
    )


def check_neighbours(directory: Path, own: str) -> None:
    """Raise CheckpointError where an adapter's folder has another file of trained embeddings, which would be lost; the log hears of other weights.
    `own`: the adapter's file."""
    for file in sorted(directory.iterdir()):
        if file.suffix not in (".safetensors", ".bin", ".pt") or file.name == own or _TRAINING.match(file.name):
            continue
        if file.name.startswith("adapter_model"):
            continue  # the same in the other form
        names = list(SafetensorsFile.open(file).specs) if file.suffix == ".safetensors" else []
        what = f" (tensors {listed(names, 100)})" if names else ""
        if _BESIDE.match(file.name.lower()) or any(
            re.search(r"embed_tokens|lm_head|word_embeddings|new_emb", n) for n in names
        ):
            raise CheckpointError(
                f"{file}: holds trained embeddings or other tensors{what} that belong to the adapter and that PEFT's format does not know; the merge"
                f" would lose them. Save them with the adapter (modules_to_save: embed_tokens, lm_head), or {MERGE_REMEDY}; or move the file away"
                " if it is of no use."
            )
        logger.warning("%s: is not part of the adapter%s, and left out", file, what)


def tell_base(label: str, trained_on: str | None, revision: str | None, base: Any) -> None:
    """Warn where an adapter says that it was trained on another model than `base`: by name and revision and, where that model is a folder that is
    there, by its config. A wrong base of the same shapes gives a wrong model, and nothing else shows it."""
    if not trained_on:
        return
    path = getattr(base, "path", None)
    elsewhere = Path(trained_on).expanduser()
    if path is not None and elsewhere.is_dir() and path.is_dir():
        if elsewhere.resolve() == path.resolve():
            return
        config = read_json_object(elsewhere / "config.json") if (elsewhere / "config.json").is_file() else None
        differing = [str(one) for one in config_differences(base.config, config) if one.matters]
        told = f" Their configs differ: {listed(differing)}." if differing else ""
        _warn(label, trained_on, base.label, told)
        return
    named = [base.label, getattr(base, "hub_id", None), (base.config or {}).get("_name_or_path"), str(path or "")]
    if not any(_alike(trained_on, str(name)) for name in named if name):
        _warn(label, trained_on, base.label, "")
    commit = getattr(base, "revision", None)
    if revision and commit and re.fullmatch(r"[0-9a-f]{40}", revision) and revision != commit:
        _warn(label, f"{trained_on} at revision {revision}", f"{base.label} at {commit}", "")


def _warn(label: str, trained_on: str, base: str, told: str) -> None:
    logger.warning(
        "%s: was trained on %r, and is applied to %s. If that is another model, not a copy of the same, the result is wrong.%s",
        label,
        trained_on,
        base,
        told,
    )


def _alike(one: str, other: str) -> bool:
    """Whether two names, ids or paths end in the same, or the one's in the other's; the cache of the hub has ids in its paths."""
    hub = re.search(r"models--([^/]+)/snapshots", other)
    ends = [
        re.sub(r"[^a-z0-9]", "", text.lower().rstrip("/").split("/")[-1])
        for text in (one, hub[1].replace("--", "/") if hub else other)
    ]
    return bool(ends[0] and ends[1]) and (ends[0] in ends[1] or (len(ends[1]) > 3 and ends[1] in ends[0]))
