"""What the documentation adds to mkdocs: figures, links out of docs/, comments, Sphinx's roles."""

import os
import re
import sys
from pathlib import Path, PurePosixPath
from typing import Any

import griffe
from mkdocs.structure.files import File, InclusionLevel

sys.path.insert(0, str(Path(__file__).parent))
from figures import with_figures  # beside this file

ROOT = Path(__file__).parent.parent
LINK = re.compile(r"(?<=\]\()([^)#\s:]+)(?=[)#])")
#: where files of the repository that pages link to lie in the site
FILES = "files/"


def _target(uri: str, link: str) -> str:
    """Return what a page's link means, as a path in the site.

    Files outside of docs/ lie under :data:`FILES`.
    """
    page = uri.removeprefix(FILES) if uri.startswith(FILES) else f"docs/{uri}"
    path = os.path.normpath(PurePosixPath(page).parent / link)
    return path.removeprefix("docs/") if path.startswith("docs/") else FILES + path


def on_files(files: Any, config: Any) -> Any:
    """Add the files that pages link to, and those that these link to."""
    todo = [file for file in files if file.is_documentation_page()]
    for page in todo:
        for link in LINK.findall(with_figures(page.content_string)):
            uri = _target(page.src_uri, link)
            path = ROOT / uri.removeprefix(FILES)
            if uri.startswith(FILES) and path.is_file() and files.get_file_from_path(uri) is None:
                added = File.generated(
                    config, uri, abs_src_path=str(path), inclusion=InclusionLevel.NOT_IN_NAV
                )
                files.append(added)
                if added.is_documentation_page():
                    todo.append(added)
    return files


def on_page_markdown(markdown: str, page: Any, **kwargs: Any) -> str:
    """Put the figures in, and point links out of docs/ to the copies."""
    uri = page.file.src_uri

    def relative(found: re.Match[str]) -> str:
        return os.path.relpath(_target(uri, found[1]), PurePosixPath(uri).parent)

    return LINK.sub(relative, with_figures(markdown))


def _without_roles(text: str) -> str:
    """Turn ``:class:`~a.B``` into ```B```."""
    return re.sub(r":\w+:`([^`]+)`", r"`\1`", re.sub(r":\w+:`~(?:\w+\.)*(\w+)`", r"`\1`", text))


class Comments(griffe.Extension):
    """Takes ``#:`` comments above attributes for their docstrings.

    And reads Sphinx's roles as code.
    """

    def on_attribute_instance(self, *, node: Any, attr: griffe.Attribute, **kwargs: Any) -> None:
        """Give an attribute its comment."""
        if attr.docstring is None and isinstance(attr.filepath, Path) and attr.lineno is not None:
            lines, found = attr.filepath.read_text().splitlines()[: attr.lineno - 1], []
            while lines and lines[-1].strip().startswith("#:"):
                found.insert(0, lines.pop().strip().removeprefix("#:").strip())
            if found:
                attr.docstring = griffe.Docstring(
                    _without_roles("\n".join(found)), lineno=len(lines) + 1, parent=attr
                )

    def on_instance(self, *, node: Any, obj: griffe.Object, **kwargs: Any) -> None:
        """Turn roles into code."""
        if obj.docstring is not None:
            obj.docstring.value = _without_roles(obj.docstring.value)
