"""The README and the pages of docs/ name, link and list only what exists.

`scripts/docs` builds the site strictly, and checks the rest.
"""

import functools
import importlib.util
import pkgutil
import re
import urllib.parse
from pathlib import Path

import pytest
import yaml

import distattn

ROOT = Path(__file__).parent.parent
PAGES = ROOT / "docs" / "pages"
README = ROOT / "README.md"
TEXTS = (README, *sorted(PAGES.rglob("*.md")))
# Public modules beside those that `distattn` names; those of integrations need their frameworks.
MODULES = (
    *("algebra.fixed_point", "testing"),
    *(f"planning.{name}" for name in ("chips", "cost", "plan", "pods")),
    *(f"integrations.{name}" for name in ("equinox", "flax", "jax_nn")),
)

ELSEWHERE = {  # sources of other projects, by their paths there
    "README.md": (
        "docs/examples/jax/attention_context_parallel.rst",
        "docs/serving/context_parallel_deployment.md",
    )
}

each_text = pytest.mark.parametrize(
    "path", TEXTS, ids=lambda path: path.relative_to(ROOT).as_posix()
)


@functools.cache
def settings() -> dict:
    return yaml.safe_load((ROOT / "docs" / "mkdocs.yml").read_text(encoding="utf-8"))


def prose(path: Path) -> str:
    """Return the text of a page without its blocks of code."""
    text = path.read_text(encoding="utf-8")
    return re.sub(r"^(`{3,}).*?^\1`*$", "", text, flags=re.DOTALL | re.MULTILINE)


def links(path: Path) -> list[str]:
    return re.findall(r"\]\(([^)\s]+)\)", re.sub(r"`[^`\n]+`", "code", prose(path)))


@functools.cache
def anchors(path: Path) -> set[str]:
    """Return the anchors of the headings of a page, as code hosts and Python-Markdown make them."""
    titles = re.findall(r"^#+ (.+)$", prose(path), re.MULTILINE)
    return {re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", x).strip().lower()) for x in titles}


@each_text
def test_links_lead_somewhere(path):
    broken = []
    for link in links(path):
        target, _, anchor = link.partition("#")
        if urllib.parse.urlsplit(link).scheme:
            assert link.startswith("https://"), link
            continue
        file = path if not target else (path.parent / target).resolve()
        known = file.exists() and file.is_relative_to(ROOT)
        if not known or (anchor and anchor not in anchors(file)):
            broken.append(link)
    assert broken == []


def test_links_are_found():
    found = [link for path in TEXTS for link in links(path)]
    assert "docs/pages/why.md" in found
    assert "../../tests/algebra/test_state.py" in found
    assert "the-network-measured" in anchors(PAGES / "hosts.md")


def pages_of(nav: list) -> list[str]:
    """Return the pages under every heading of the site's navigation, in order."""
    pages = []
    for item in nav:
        (below,) = item.values() if isinstance(item, dict) else (item,)
        pages += pages_of(below) if isinstance(below, list) else [below]
    return pages


def test_the_navigation_is_the_pages():
    listed = pages_of(settings()["nav"])
    assert len(listed) == len(set(listed))
    assert set(listed) == {path.relative_to(PAGES).as_posix() for path in PAGES.rglob("*.md")}


def test_the_site_takes_nothing_from_elsewhere():
    assert settings()["theme"]["font"] is False
    for key in ("extra_css", "extra_javascript"):
        assert all((PAGES / name).is_file() for name in settings().get(key, ()))
    plugins = {name for x in settings()["plugins"] for name in (x if isinstance(x, dict) else [x])}
    assert plugins == {"search", "mkdocstrings"}


def test_a_broken_link_or_anchor_breaks_the_build():
    validation = settings()["validation"]
    assert {value for part in validation.values() for value in part.values()} == {"warn"}
    (build,) = re.findall(
        r"^.* mkdocs build .*$", (ROOT / "scripts" / "docs").read_text(), re.MULTILINE
    )
    assert "--strict" in build
    assert "--quiet" not in build  # with it warnings do not count
    assert "scripts/docs" in (ROOT / ".ci" / "run").read_text(encoding="utf-8")


@functools.cache
def entries() -> frozenset[str]:
    """Return the dotted names of the entries of the reference."""
    text = "\n".join(path.read_text(encoding="utf-8") for path in (PAGES / "api").glob("*.md"))
    return frozenset(re.findall(r"^::: (\S+)$", text, re.MULTILINE))


def test_every_public_name_has_an_entry():
    names = {f"distattn.{name}" for name in distattn.__all__}
    names |= {f"distattn.{name}" for name in MODULES}
    assert names - entries() == set()


@pytest.mark.parametrize("path", sorted((PAGES / "api").glob("*.md")), ids=lambda path: path.name)
def test_where_no_site_is_built_the_reference_says_how_to_read_it(path):
    text = path.read_text(encoding="utf-8")
    before, _, _ = text.partition("\n:::")
    assert "`scripts/docs`" in before
    ((name, _),) = [(x, pkgutil.resolve_name(x)) for x in re.findall(r"`help\((\S+)\)`", before)]
    assert name.startswith("distattn.")


def test_every_entry_is_there():
    for entry in entries():
        if entry.startswith("distattn.integrations."):  # they import their frameworks
            assert importlib.util.find_spec(entry), entry
        else:
            pkgutil.resolve_name(entry)


@each_text
def test_every_file_that_is_named_exists(path):
    text = path.read_text(encoding="utf-8")
    names = set(re.findall(r"\b(?:distattn|docs|examples|scripts|tests)/\w[\w/.]*\w", text))
    elsewhere = set(ELSEWHERE.get(path.relative_to(ROOT).as_posix(), ()))
    assert {name for name in names if not (ROOT / name).exists()} == elsewhere
