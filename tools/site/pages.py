"""What the documentation site adds to the files of docs/ when it is built (a hook of mkdocs).

Pages that lie elsewhere in the repository (README, CONTRIBUTING, the logs of experiments, the notes of benchmarks)
become pages of the site; the command reference is generated from the commands. Links are written as they are in the
repository: here they become links within the site, or links to the repository's file. A link to nothing is a warning,
which `mkdocs build --strict` takes for an error.
"""

from __future__ import annotations

import logging
import os
import posixpath
import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files, InclusionLevel
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[2]
DOCS = "docs/"
log = logging.getLogger("mkdocs.hooks.pages")

NAMED = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "SECURITY.md": "security.md",
}
LOGS = ("benchmarks/results/**/*.md", "experiments/**/*.md")
PICTURES = ("benchmarks/results/**/*.svg", "experiments/**/*.svg")
LINK = re.compile(r"(?P<head>\]\()(?P<target>[^)\s]+)(?P<tail>\))")
SOURCE = re.compile(r'(?P<head>\b(?:src|srcset|href)=")(?P<target>[^"]+)(?P<tail>")')


def outside() -> Iterator[tuple[str, str]]:
    """Files of the repository outside docs/ that the site shows, and where they lie in it."""
    yield from ((name, place) for name, place in NAMED.items() if (ROOT / name).is_file())
    for pattern in (*LOGS, *PICTURES):
        for path in sorted(ROOT.glob(pattern)):
            name = path.relative_to(ROOT).as_posix()
            yield name, f"log/{name}"


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Every page says which version of the package it describes."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    config.copyright = f"{project['name']} {project['version']}"
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    for name, place in outside():
        inclusion = InclusionLevel.INCLUDED if name in NAMED else InclusionLevel.NOT_IN_NAV
        files.append(File.generated(config, place, abs_src_path=str(ROOT / name), inclusion=inclusion))
    sys.path.insert(0, str(ROOT / "src"))
    from fastff.cli.reference_page import command_reference

    files.append(File.generated(config, "cli.md", content=command_reference()))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Links as the repository has them, turned into those of the site."""
    places = {place: name for name, place in outside()}
    here = page.file.src_uri
    home = places.get(here, DOCS + here)

    def turned(match: re.Match[str]) -> str:
        target = link(match["target"], home, here, config)
        return f"{match['head']}{target}{match['tail']}"

    def placed(match: re.Match[str]) -> str:
        """In HTML, which mkdocs leaves as it is: from the page's own address on."""
        path, mark, anchor = link(match["target"], home, here, config).partition("#")
        file = files.get_file_from_path(posixpath.normpath(posixpath.join(posixpath.dirname(here), path)))
        target = file.url_relative_to(page.file) if path and file else path
        return f"{match['head']}{target}{mark}{anchor}{match['tail']}"

    return "".join(part if code else SOURCE.sub(placed, LINK.sub(turned, part)) for code, part in _split_code(markdown))


def _split_code(markdown: str) -> Iterator[tuple[bool, str]]:
    """The page in pieces: whether a piece is a fenced block, and its text."""
    for index, part in enumerate(re.split(r"(^```.*?^```$)", markdown, flags=re.DOTALL | re.MULTILINE)):
        yield index % 2 == 1, part


def link(target: str, home: str, here: str, config: Any) -> str:
    """A link of the file `home` of the repository, as the page `here` of the site must write it."""
    path, mark, anchor = target.partition("#")
    if not path or re.match(r"[a-z]+:", target):
        return target
    named = posixpath.normpath(posixpath.join(posixpath.dirname(home), path))
    place = dict(outside()).get(named)
    if named.startswith(DOCS) and (named in GENERATED or (ROOT / named).is_file()):
        place = named.removeprefix(DOCS)
    if place is not None:
        return os.path.relpath(place, posixpath.dirname(here) or ".").replace(os.sep, "/") + mark + anchor
    if not (ROOT / named).exists():
        log.warning("%s links to %s, which is not there", home, target)
    return f"{config['repo_url']}/blob/main/{named}{mark}{anchor}"


GENERATED = (f"{DOCS}cli.md",)
