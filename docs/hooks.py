"""Hooks of the site: links into the repository, and a check that pages load nothing from elsewhere.

Pages link to files of the repository by relative paths, as `../../tests/algebra/test_state.py`, for readers
on a code host. On the site a figure is copied, and any other file becomes a page that shows it.
"""

import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import Abort
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from mkdocs.utils import get_relative_url

PAGES = Path(__file__).parent / "pages"
ROOT = PAGES.parent.parent
FIGURES = {".svg", ".png"}
LANGUAGES = {".py": "python", ".yaml": "yaml", ".md": "markdown", ".json": "json", ".toml": "toml"}

LINK = re.compile(r"(?<=\]\()(\.\./[^)\s#]+)(?=[)#])")
# Elements that make a browser load something from outside the site.
LOADED = re.compile(
    r"<(?:script|img|iframe|source|video|audio|embed)\b[^>]*\bsrc=[\"']?(?:https?:)?//[^>]*>"
    r"|<link\b(?![^>]*\brel=[\"']?canonical)[^>]*\bhref=[\"']?(?:https?:)?//[^>]*>"
    r"|url\([\"']?(?:https?:)?//[^)]*\)|@import\s[^;]*//[^;]*;",
    re.IGNORECASE,
)
# Entries of each kind, which would be missing silently if extensions.py were broken.
READ = {
    "api/cache.html": ("distattn.KVCache.append", "distattn.KVCache.restore"),
    "api/layouts.html": ("distattn.layouts.align",),
    "api/states.html": ("distattn.SoftmaxState.weighted_sum", "distattn.merge"),
}


def linked(page: str, target: str) -> Path | None:
    """Return the file of the repository that a link of a page leads to, if it is outside the pages."""
    path = (PAGES / page).parent.joinpath(target).resolve()
    return None if path.is_relative_to(PAGES) or not path.is_relative_to(ROOT) else path


def place(path: Path) -> str:
    """Return the path on the site of a file of the repository."""
    name = path.relative_to(ROOT).as_posix()
    return f"figures/{path.name}" if path.suffix in FIGURES else f"source/{name}.md"


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add every file of the repository that some page links to."""
    for page in sorted(PAGES.rglob("*.md")):
        name = page.relative_to(PAGES).as_posix()
        for target in LINK.findall(page.read_text(encoding="utf-8")):
            path = linked(name, target)
            if path is None or not path.is_file() or files.get_file_from_path(place(path)):
                continue
            if path.suffix in FIGURES:
                added = File.generated(config, place(path), abs_src_path=str(path))
            else:
                added = File.generated(config, place(path), content=shown(path))
            files.append(added)
    return files


def shown(path: Path) -> str:
    """Return a page with the text of a file."""
    name = path.relative_to(ROOT).as_posix()
    text = path.read_text(encoding="utf-8").rstrip("\n")
    language = LANGUAGES.get(path.suffix, "bash")
    return f"---\nsearch: {{exclude: true}}\n---\n# {name}\n\n``````{language}\n{text}\n``````\n"


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turn links into the repository into links to the pages of `on_files`."""
    del config, files
    here = page.file.src_uri

    def rewritten(match: re.Match) -> str:
        path = linked(here, match[0])
        return match[0] if path is None else get_relative_url(place(path), here)

    return markdown if here.startswith("source/") else LINK.sub(rewritten, markdown)


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Unfold the sources in the text."""
    del page, config, files
    return html.replace(
        '<details class="mkdocstrings-source"', '<details open class="mkdocstrings-source"'
    )


def on_post_build(config: MkDocsConfig) -> None:
    """Fail if a page would load something from elsewhere, or the reference lacks an entry."""
    site = Path(config.site_dir)
    for page, names in READ.items():
        text = (site / page).read_text(encoding="utf-8")
        missing = [name for name in names if f'id="{name}"' not in text]
        if missing:
            raise Abort(f"{page} has no entry for {', '.join(missing)}")
    found = [
        f"{path.relative_to(site)}: {match[0][:120]}"
        for suffix in ("html", "css")
        for path in sorted(site.rglob(f"*.{suffix}"))
        for match in LOADED.finditer(path.read_text(encoding="utf-8"))
    ]
    if found:
        raise Abort("\n".join(("the site loads what is not on it:", *found)))
