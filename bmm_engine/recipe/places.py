"""Where a recipe may write: whoever runs one that he was sent does not let it choose among all his folders."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from bmm_engine.errors import ConfigError


@dataclass(frozen=True)
class Places:
    """Folders that measured files may be written into. They are no part of what a recipe says: two recipes are equal whatever theirs are."""

    folders: tuple[Path, ...] = field(compare=False)

    @classmethod
    def here(cls) -> Places:
        """The working folder, unless it was removed."""
        try:
            return cls((Path.cwd(),))
        except FileNotFoundError:
            return cls(())

    def and_in(self, folders: Iterable[str | Path]) -> Places:
        return Places((*(Path(os.path.abspath(folder)) for folder in folders), *self.folders))

    def check(self, file: Path, what: str) -> None:
        """Refuse to write a file that lies, all links followed, in none of the folders. Raises `ConfigError`."""
        try:
            place = file.resolve()
            allowed = list(dict.fromkeys(folder.resolve() for folder in self.folders))
        except (OSError, RuntimeError, ValueError) as error:
            raise ConfigError(
                f"{what} cannot be written at {str(file)[:300]!r} ({str(error)[:300]}); choose another path."
            ) from error
        if any(place.is_relative_to(folder) for folder in allowed):
            return
        raise ConfigError(
            f"{what} would be written to {_short(place)}, which lies neither in the recipe's folder nor in the working folder"
            f" ({', '.join(map(_short, allowed[:3]))}). Name the folder on the command line (--write-to {_short(place.parent)}; in Python:"
            " write_to=[...] of Recipe.load or Recipe.parse), or choose a path inside."
        )


def _short(path: Path) -> str:
    text = str(path)
    return text if len(text) <= 200 else f"...{text[-200:]}"
