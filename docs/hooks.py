"""Owns what the documentation takes from the code while it is built: the table of environment variables.

It formats nothing: `deep_ep_core.env` renders its own table. The build needs `deep_ep_core` to be importable.
"""

from __future__ import annotations

import re

from deep_ep_core.env import environment_tables

_MARKER = re.compile(r"^<!-- environment-table -->[ \t]*$", flags=re.MULTILINE)


def on_page_markdown(markdown: str, page: object, config: object, files: object) -> str:
    """Put the table of environment variables in the place of its marker line; mkdocs calls this for each page.

    Args:
        markdown: Text of the page.
        page: The page, unused.
        config: The site's settings, unused.
        files: The site's files, unused.

    Returns:
        The text with the table; a page without the marker as it came.
    """
    return _MARKER.sub(lambda _: environment_tables(), markdown)
