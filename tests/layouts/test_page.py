"""docs/engines.md lists every layout as the code describes it."""

from __future__ import annotations

from loraq.layouts.targets import targets
from loraq.utils.assets import CHECKOUT


def test_the_table_of_layouts_is_that_of_the_code():
    page = (CHECKOUT / "docs" / "engines.md").read_text(encoding="utf-8")
    rows = [
        f"| `{t.name}` | {t.description} | {t.readers} | {t.hardware} |" for t in targets().values()
    ]
    table = page.split("| layout | what | read by | hardware |\n|---|---|---|---|\n")[1]
    assert table.split("\n\n")[0].splitlines() == rows
