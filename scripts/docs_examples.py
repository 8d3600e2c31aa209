"""Extension of griffe for the API pages: `Example:` in a docstring is its section of examples, `Examples:`.

Otherwise griffe renders the session below it as plain Markdown.
"""

from __future__ import annotations

import re
from typing import Any

import griffe


class ExampleSections(griffe.Extension):
    """Rename the section before griffe parses the docstring."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring:
            obj.docstring.value = re.sub(r"^Example:$", "Examples:", obj.docstring.value, flags=re.MULTILINE)
