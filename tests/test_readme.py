"""The documents: the page of the rules is the registry's own, the first page is short, and what they point to is there."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
import yaml

from bmm_engine.anchors import table
from bmm_engine.recipe.recipe import Recipe
from bmm_engine.recipe.references import ExpertRecipe
from bmm_engine.recipe.sections import CalibrationRecipe, EvaluationRecipe, SearchRecipe, SequentialRecipe
from tests.architectures import ARCHITECTURES

ROOT = Path(__file__).parents[1]
LINE = 100
# Of an example that is a part of a recipe.
EXPERTS = [{"model": name, "calibration": f"{name}.txt"} for name in ("a", "b")]
_LINK = re.compile(r"!?\[[^\]]*\]\(([^()\s]+)\)")

pytestmark = pytest.mark.skipif(not (ROOT / "README.md").is_file(), reason="the documents are not beside the tests")


def documents() -> list[Path]:
    """Every .md file of the repository; outside one, those of the folders that hold them."""
    listing = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "*.md"]
    try:
        names = subprocess.run(listing, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    except (OSError, subprocess.CalledProcessError):
        names = []
    found = [ROOT / name for name in names] or [
        *ROOT.glob("*.md"),
        *(path for part in ("bench", "bmm_engine", "csrc") for path in (ROOT / part).rglob("*.md")),
    ]
    return sorted(path for path in found if path.is_file())


def prose(text: str) -> list[str]:
    """The lines outside code blocks and tables."""
    lines, code = [], False
    for line in text.splitlines():
        if line.lstrip().startswith("```"):
            code = not code
        elif not code and not line.startswith(("    ", "|")):
            lines.append(line)
    return lines


def anchors(text: str) -> set[str]:
    """What a link may name after `#`: headings as GitHub spells them."""
    found: set[str] = set()
    for line in prose(text):
        if heading := re.match(r"#+ (.*)", line):
            plain = re.sub(r"[^\w\- ]", "", heading[1].lower().strip())
            found.add(plain.replace(" ", "-"))
    return found


def broken(path: Path, text: str) -> list[str]:
    """Links of a document that lead nowhere; those to other sites are not looked at."""
    targets = _LINK.findall("\n".join(prose(text) + tables(text)))
    return [target for target in targets if not re.match(r"[a-z]+:", target) and not leads(path, text, target)]


def leads(path: Path, text: str, target: str) -> bool:
    name, _, anchor = target.partition("#")
    there = (path.parent / name).resolve() if name else path
    if not there.exists() or not there.is_relative_to(ROOT):
        return False
    return not anchor or anchor in anchors(text if there == path else there.read_text(encoding="utf-8"))


def tables(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith("|")]


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def test_the_page_of_the_rules_is_what_the_registry_prints():
    page = Path(table.__file__).with_name("README.md")
    assert page.read_text(encoding="utf-8") == table.document(), f"write it again: bmm anchors --markdown > {page}"


def test_the_first_page_is_short():
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 200
    assert [line for line in lines if len(line) > LINE] == []  # tables and code too, here


@pytest.mark.parametrize("path", documents(), ids=lambda path: path.relative_to(ROOT).as_posix())
def test_a_document_reads_well_and_its_links_lead_somewhere(path):
    text = path.read_text(encoding="utf-8")
    assert [line for line in prose(text) if len(line) > LINE] == []
    assert broken(path, text) == []


@pytest.mark.parametrize(
    ("room", "section"),
    [
        ("recipe", Recipe),
        ("recipe", ExpertRecipe),
        ("recipe", CalibrationRecipe),
        ("sequential", SequentialRecipe),
        ("evaluators", EvaluationRecipe),
        ("searching", SearchRecipe),
    ],
)
def test_every_key_of_a_recipe_is_told(room, section):
    text = (ROOT / "bmm_engine" / room / "README.md").read_text(encoding="utf-8")
    told = set(re.findall(r"\w+", " ".join(re.findall(r"`[^`\n]+`", text) + blocks(text, "yaml"))))
    assert set(section.model_fields) - told == set()


@pytest.mark.parametrize("path", documents(), ids=lambda path: path.relative_to(ROOT).as_posix())
def test_the_examples_of_a_document_are_recipes_and_python(path):
    text = path.read_text(encoding="utf-8")
    for block in blocks(text, "yaml"):
        given = {"base": "base", "experts": EXPERTS, **yaml.safe_load(block)}
        Recipe.parse(given, f"{path.name}: {block}")
    for block in blocks(text, "python"):
        compile(block, path.name, "exec")


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("See [there](#a-new-rule) and [that](LICENSE).", []),
        ("See [there](#no-such-part).", ["#no-such-part"]),
        ("See [there](no/such.md).", ["no/such.md"]),
        ("See [there](README.md#no-such-part).", ["README.md#no-such-part"]),
        ("![A picture](no-such.png)", ["no-such.png"]),
        ("| a table | [there](no-such.md) |", ["no-such.md"]),
        ("[elsewhere](https://example.org/no#such)", []),
        ("```\n[code](no-such.md)\n```", []),
    ],
)
def test_a_link_that_leads_nowhere_is_found(line, expected):
    assert broken(ROOT / "README.md", f"## A new rule\n\n{line}\n") == expected


def test_the_page_of_models_names_every_architecture_that_is_tested():
    page = (ROOT / "bmm_engine/models/README.md").read_text()
    listed = re.findall(r"^\* \*\*[^*]+\*\*: (.*?)\.$", page, re.M | re.S)
    assert [name for line in listed for name in re.split(r",\s+", line)] == list(ARCHITECTURES)
