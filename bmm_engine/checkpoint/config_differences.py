"""Where the configs of two checkpoints differ, and which of it changes what the network computes from the same weights."""

from __future__ import annotations

import copy
import inspect
import logging
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from bmm_engine.errors import shown

logger = logging.getLogger(__name__)

# Keys that the weights' function does not depend on: labels and names, training, initialisation, generation, how it is run, what shapes tell
# anyway, and ties: a head that is the embeddings in one model and not in another is merged as one of its own (merging/untied_heads.py).
_HARMLESS = re.compile(
    r"""^(_.*|transformers_version|name_or_path|architectures|auto_map|model_name|(torch_)?dtype|id2label|label2id|num_labels|problem_type
    |finetuning_task|task_specific_params|tie_word_embeddings|tokenizer_class|processor_class|prefix|use_cache|output_\w+|return_\w+|torchscript|use_bfloat16
    |(\w*_)?attn_implementation|\w*gradient_checkpointing|chunk_size_feed_forward|pretraining_tp|max_position_embeddings
    |\w*_token_id|\w*_token_index|\w*drop\w*|init\w*|\w*initializer\w*|\w*_init(_\w+)?|\w*loss\w*|\w*_coef|label_smoothing\w*
    |mask_(time|feature)_\w+|apply_spec_augment|quantization_config|pruned_heads|temperature|top_[kp]|typical_p|do_sample|num_beam\w*
    |(min|max)_(new_)?(length|tokens)|length_penalty|repetition_penalty|no_repeat_ngram_size|bad_words_ids|num_return_sequences|early_stopping
    |diversity_penalty|encoder_no_repeat_ngram_size|remove_invalid_values|suppress_tokens|begin_suppress_tokens|forced_\w+
    |exponential_decay_length_penalty)$""",
    re.VERBOSE,
)
# T5 reads from the first whether its decoder's outputs are scaled, and keeps that as an attribute which no signature declares.
_TIED, _SCALED = "tie_word_embeddings", "scale_decoder_outputs"
# For an architecture that transformers does not know: what the keys of those that it knows are made of.
_TELLING = re.compile(
    r"^model_type$|head|layer|hidden|inter|width|dim|eps|act|rope|rotary|theta|norm|window|position|scal|softcap|bias|tie_|kernel|stride|patch"
    r"|expert|vocab|topk|group|causal|decoder|alibi|parallel"
)


@dataclass(frozen=True)
class Difference:
    """One key (dotted, where it is in a section) whose values differ. `matters`: to what the network computes."""

    key: str
    ours: Any
    theirs: Any
    matters: bool

    def __str__(self) -> str:
        return f"{self.key} = {shown(self.theirs)}, the base has {shown(self.ours)}"


def config_differences(base: Mapping[str, Any] | None, expert: Mapping[str, Any] | None) -> list[Difference]:
    """Of an expert's config from the base's, those that matter first. A key that one file leaves out has the architecture's default, where
    transformers knows it; else it is not compared."""
    if base is None or expert is None or base == expert:
        return []
    raw = list(_unequal(base, expert, (), both=False))
    if all(_HARMLESS.match(path[-1]) and path[-1] != _TIED for path, _, _ in raw):
        return [Difference(".".join(path), ours, theirs, False) for path, ours, theirs in raw]
    whole = _completed(base), _completed(expert)
    # One that its own architecture does not take is compared with the other as it stands.
    odd = (whole[0] is None) != (whole[1] is None) and "model_type" in base and "model_type" in expert
    if whole[0] is not None and whole[1] is not None:
        declared = whole[0][1] | whole[1][1] | {_SCALED}
        found = [
            Difference(".".join(path), ours, theirs, path[0] in declared and _matters(path))
            for path, ours, theirs in _unequal(whole[0][0], whole[1][0], (), both=False)
        ]
    else:
        declared = next((own[1] for own in whole if own is not None), set())
        found = [
            Difference(
                ".".join(path),
                ours,
                theirs,
                _matters(path) and (path[0] in declared or bool(_TELLING.search(path[-1]))),
            )
            for path, ours, theirs in _unequal(base, expert, (), both=not odd)
        ]
    return sorted(found, key=lambda one: not one.matters)


def _matters(path: tuple[str, ...]) -> bool:
    return not any(_HARMLESS.match(part) for part in path)


def _unequal(
    ours: Mapping[str, Any], theirs: Mapping[str, Any], above: tuple[str, ...], *, both: bool
) -> Iterator[tuple[tuple[str, ...], Any, Any]]:
    for key in dict.fromkeys((*ours, *theirs)):
        if key not in ours or key not in theirs:
            if not both:
                yield (*above, str(key)), ours.get(key), theirs.get(key)
            continue
        one, other = ours[key], theirs[key]
        if isinstance(one, Mapping) and isinstance(other, Mapping):
            yield from _unequal(one, other, (*above, str(key)), both=both)
        elif one != other and not (
            isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)) and list(one) == list(other)
        ):
            yield (*above, str(key)), one, other


def completed(config: Mapping[str, Any]) -> dict[str, Any] | None:
    """A config with the defaults of its architecture filled in; None where transformers does not know it."""
    found = _completed(config) if "model_type" in config else None
    return None if found is None else found[0]


def _completed(config: Mapping[str, Any]) -> tuple[dict[str, Any], set[str]] | None:
    """With the defaults of its architecture filled in, and the keys that this declares; None where transformers does not know it."""
    try:
        from transformers import CONFIG_MAPPING

        cls = CONFIG_MAPPING[config["model_type"]]
        made = cls.from_dict(copy.deepcopy(dict(config)))
        declared = {"model_type", *inspect.signature(cls.__init__).parameters}
        return made.to_dict(), declared | set(getattr(cls, "sub_configs", ()) or ())
    except Exception as error:  # whatever a config class makes of odd values: then the files themselves are compared
        logger.info("config: its defaults are not known (%s)", error)
        return None
