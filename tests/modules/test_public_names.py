"""`recpress.modules` exports its public names on first use, and its configuration loads no torch."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import recpress.modules


@pytest.mark.parametrize("name", recpress.modules.__all__)
def test_each_name_is_exported(name: str) -> None:
    assert getattr(recpress.modules, name).__name__ == name
    assert name in dir(recpress.modules)


def test_type_checkers_see_the_same_names() -> None:
    tree = ast.parse(Path(recpress.modules.__file__).read_text())
    [block] = [node for node in tree.body if isinstance(node, ast.If)]
    seen = {name.name: node.module for node in block.body for name in node.names}
    found = {name: f"recpress.modules.{module}" for name, module in recpress.modules._MODULE_OF.items()}
    assert seen == found
    assert sorted(seen) == sorted(recpress.modules.__all__)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        recpress.modules.nothing  # noqa: B018


def test_the_configuration_loads_no_torch() -> None:
    code = (
        "import sys; import recpress.modules.config; from recpress.modules import ALSConfig; "
        "assert not {'torch', 'numpy', 'torchrec'} & sys.modules.keys(), sorted(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
