"""Which tensor of an expert is which of the base's: by their names, in whatever layout either has them."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from torch import nn

from bmm_engine.checkpoint import TensorSource
from bmm_engine.checkpoint.compose import root_checkpoint
from bmm_engine.checkpoint.converted import ConvertedSource
from bmm_engine.checkpoint.names import change_prefix, prefix_changes, prefix_exchanges
from bmm_engine.models.architecture import naming_of
from bmm_engine.models.bounds import Held
from bmm_engine.models.conversion import to_files, to_live
from bmm_engine.models.names import modern_name
from bmm_engine.models.naming import Naming

logger = logging.getLogger(__name__)


def known_naming(base: TensorSource, experts: Sequence[TensorSource], live: nn.Module | None = None) -> Naming | None:
    """Of the architecture of a live base, of the first model that has a config of one that transformers knows, or None."""
    if live is not None:
        return Naming.of(live)
    return next((found for source in (base, *experts) if (found := source_naming(source)) is not None), None)


def source_naming(source: TensorSource) -> Naming | None:
    """Of the architecture that a source's config names; None where nobody can be asked."""
    root = root_checkpoint(source)
    if root is None or root.config is None or source.config is None or not Path(root.path).is_dir():
        return None
    # What a view (stacked layers, another vocabulary, a head of its own) says otherwise than the file.
    overrides = {key: value for key, value in source.config.items() if value != root.config.get(key)}
    try:
        return naming_of(root.path, Held.of({name: source.spec(name).shape for name in source.names()}), overrides)
    except Exception as error:  # whatever a model class makes of odd values, or no transformers
        logger.info("%s: what its architecture calls its tensors is not known (%s)", source.label, error)
        return None


def in_layout_of(base: TensorSource, source: TensorSource, naming: Naming | None) -> TensorSource:
    """An expert with its tensors fused and split as the base's are, where the two are in layouts of different versions of transformers."""
    if naming is None:
        return source
    names, own = base.names(), source.names()
    if len(Matcher(source, naming).match(names)) == len(names):
        return source
    known = naming.known(own)
    by_live = {live: name for name, live in known.items()}
    by_file = {modern_name(name): name for name in own if name not in known}
    wanted = {modern_name(name) for name in names}
    for convert, given in ((to_files, by_live), (to_live, by_file)):
        stored = {name: (source.spec(held).shape, source.spec(held).dtype) for name, held in given.items()}
        found = [one for one in convert(naming.model, stored) if wanted & {modern_name(name) for name in one.outputs}]
        if found:
            return ConvertedSource(source, found, given)
    return source


class Matcher:
    """Finds the base's names in one expert. `exchanged`: also with one prefix in the place of another, where one model holds the other."""

    def __init__(self, source: TensorSource, naming: Naming | None, *, exchanged: bool = False):
        self.source, self.naming, self.exchanged = source, naming, exchanged
        self.prefix = self._prefix = ""  # "" | "+bert." (the expert has it, the base has not) | "-bert."
        self._own = (*source.names(), *source.aliases)
        self._modern = {modern_name(name): name for name in self._own}

    def match_merged(self, names: Sequence[str], base: TensorSource) -> dict[str, str]:
        """`match` of what is merged, which settles the `prefix`; what the expert lacks may be there under another name that the base ties to it."""
        found = self.match(names)
        self.prefix = self._prefix
        if len(found) == len(names):
            return found
        tied: dict[str, list[str]] = {}
        for alias, holder in base.aliases.items():
            tied.setdefault(holder, []).append(alias)
        wanted = [alias for name in names if name not in found for alias in tied.get(name, ())]
        aliases = self.match([*names, *wanted]) if wanted else {}
        for name in names:
            own = next((aliases[alias] for alias in tied.get(name, ()) if alias in aliases), None)
            if name not in found and own is not None:
                found[name] = own
        return {name: found[name] for name in names if name in found}

    def match(self, names: Sequence[str]) -> dict[str, str]:
        """The base's name -> the expert's: as they are or with another prefix, the one under which most are found; where that does not find all, by
        what the architecture calls them."""
        found: dict[str, str] = {}
        self._prefix = ""
        exchanges = prefix_exchanges(names, self._modern) if self.exchanged else []
        for prefix in (*prefix_changes(names, self._modern), *exchanges):
            mapping = self.under(prefix, names)
            if prefix.count(".") > 1 and 2 * len(mapping) < len(names):  # of one tensor or two it would be chance
                continue
            if len(mapping) > len(found):
                found, self._prefix = mapping, prefix
            if len(found) == len(names):
                return found
        if self.naming is None:
            return found
        theirs = {live: own for own, live in self.naming.known(self._own).items()}
        alike = {name: theirs[live] for name, live in self.naming.known(names).items() if live in theirs}
        taken = set(alike.values())
        return {
            n: own
            for n in names
            if (own := alike.get(n) or (m if (m := found.get(n)) not in taken else None)) is not None
        }

    def under(self, prefix: str, names: Sequence[str]) -> dict[str, str]:
        """Those of `names` that are found under one change of prefix."""
        mapping = {}
        for name in names:
            # What already agrees (a head beside a prefixed body) keeps its name.
            found = self._modern.get(modern_name(change_prefix(prefix, name))) or self._modern.get(modern_name(name))
            if found is not None:
                mapping[name] = found
        return mapping

    def kept(self, names: Sequence[str]) -> dict[str, str]:
        """What is kept from the base, by the prefix under which the rest was found, or by what the architecture calls it."""
        found = self.under(self.prefix, names)
        if self.naming is None or len(found) == len(names):
            return found
        theirs = {live: own for own, live in self.naming.known(self._own).items()}
        return {name: theirs[live] for name, live in self.naming.known(names).items() if live in theirs} | found
