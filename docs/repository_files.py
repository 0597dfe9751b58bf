"""A hook of mkdocs: the files of the repository that pages link to are part of the site.

So a link to code or to data holds in the repository and in the site, which needs no other host.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files, InclusionLevel

LINK = re.compile(r"(?<=\]\()\.\./(?=[^)\s]+\))")
FOLDER = "repository/"


def on_files(files: Files, config: Any) -> None:
    """Add what pages link to outside of docs/."""
    root = Path(config["config_file_path"]).parent
    for page in list(files.documentation_pages()):
        for link in re.findall(r"\]\(\.\./([^)#\s]+)", page.content_string):
            if files.get_file_from_path(FOLDER + link) is None and (root / link).is_file():
                source = str(root / link)
                included = InclusionLevel.INCLUDED
                files.append(File.generated(config, FOLDER + link, abs_src_path=source, inclusion=included))


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Have these links lead into the site."""
    return LINK.sub(FOLDER, markdown)
