"""Pictures for a page that may be light or dark, wide or narrow: matplotlib without its global state, a look for each."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from html import escape
from typing import TYPE_CHECKING, Any, Literal

from bmm_engine.errors import ConfigError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

NARROW_PX = 600
# Okabe and Ito's palette, told apart by people with any kind of colour vision.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#999999")


@dataclass(frozen=True)
class Look:
    """Colours of a scheme, and whether there is little room."""

    dark: bool
    narrow: bool

    @property
    def ink(self) -> str:
        return "#e8eaed" if self.dark else "#1f2328"

    @property
    def muted(self) -> str:
        return "#9aa4af" if self.dark else "#59636e"

    @property
    def grid(self) -> str:
        return "#30363d" if self.dark else "#e4e7eb"

    @property
    def paper(self) -> str:
        return "#161b22" if self.dark else "#ffffff"

    def colour(self, index: int) -> str:
        lighter = ("#4ea8de", "#f28c4f", "#3ccf9e", "#e3a1c5", "#f0b840", "#8fd0f5", "#bbbbbb")
        return (lighter if self.dark else COLOURS)[index % len(COLOURS)]


LOOKS = tuple(Look(dark, narrow) for dark in (False, True) for narrow in (False, True))
Draw = Callable[["Figure", Look], None]


@dataclass(frozen=True)
class Chart:
    """One picture: how it is drawn, what it shows in words, and its height in inches, wide (9 in) and narrow (4.2 in)."""

    name: str
    title: str
    alt: str
    draw: Draw
    height: float = 3.6
    narrow_height: float = 3.2


def render(chart: Chart, look: Look, kind: str) -> bytes:
    """The picture as "svg" or "png" (160 dpi), the same bytes for the same content. Raises `ConfigError` without matplotlib."""
    try:
        import matplotlib
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ConfigError("a report needs matplotlib: pip install 'bmm-engine[search]'") from error
    settings: Any = {
        "svg.hashsalt": "bmm_engine",
        "svg.fonttype": "path",
        "font.size": 9.5 if look.narrow else 10,
        "text.color": look.ink,
        "axes.labelcolor": look.muted,
        "axes.edgecolor": look.grid,
        "xtick.color": look.muted,
        "ytick.color": look.muted,
        "axes.facecolor": look.paper,
        "figure.facecolor": look.paper,
        "savefig.facecolor": look.paper,
        "legend.frameon": False,
    }
    with matplotlib.rc_context(settings):
        size = (4.2, chart.narrow_height) if look.narrow else (9.0, chart.height)
        figure = Figure(figsize=size, layout="constrained")
        FigureCanvasAgg(figure)
        chart.draw(figure, look)
        target = io.BytesIO()
        metadata: dict[str, Any] = {"Date": None} if kind == "svg" else {"Software": None}
        figure.savefig(target, format=kind, dpi=160, metadata=metadata)
    return target.getvalue()


def picture(chart: Chart) -> str:
    """The HTML of a picture that suits scheme and width."""

    def uri(look: Look) -> str:
        return "data:image/svg+xml;base64," + base64.b64encode(render(chart, look, "svg")).decode()

    dark, narrow = "(prefers-color-scheme: dark)", f"(max-width: {NARROW_PX}px)"
    return (
        "<picture>"
        f'<source media="{dark} and {narrow}" srcset="{uri(Look(True, True))}">'
        f'<source media="{dark}" srcset="{uri(Look(True, False))}">'
        f'<source media="{narrow}" srcset="{uri(Look(False, True))}">'
        f'<img src="{uri(Look(False, False))}" alt="{escape(chart.alt, quote=True)}">'
        "</picture>"
    )


def label(text: str, limit: int = 18) -> str:
    """A name as pictures show it: shortened in its middle, never read as a formula, with a box for letters that the font lacks."""
    known = _letters()
    clean = "".join(c if ord(c) in known and c.isprintable() else "\N{WHITE SQUARE}" for c in text)
    if len(clean) > limit:
        half = (limit - 1) // 2
        clean = f"{clean[: limit - 1 - half]}…{clean[-half:]}"
    return clean.replace("$", r"\$")


@lru_cache
def _letters() -> frozenset[int]:
    from matplotlib.font_manager import FontProperties, findfont
    from matplotlib.ft2font import FT2Font

    return frozenset(FT2Font(findfont(FontProperties(family="DejaVu Sans"))).get_charmap())


def tidy(axes: Axes, look: Look, *, grid: Literal["x", "y", "both", ""] = "y") -> None:
    """No box, a quiet grid behind."""
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.set_axisbelow(True)
    if grid:
        axes.grid(axis=grid, color=look.grid, linewidth=0.8)
    axes.tick_params(length=0)
