"""Tables on stdout, and numbers as they are printed."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table


def table(title: str, columns: Sequence[str], left: Sequence[str] = ()) -> Table:
    """An empty table. Columns are aligned to the right, as numbers, but for those named in
    `left`."""
    made = Table(title=title, title_justify="left")
    for name in columns:
        made.add_column(name, justify="left" if name in left else "right")
    return made


def show(*tables: Table) -> None:
    """Prints tables on stdout."""
    console = Console(soft_wrap=False)
    for one in tables:
        console.print(one)


def megabytes(size: int) -> str:
    """A number of bytes in MB of 10^6 bytes: `169.3 MB`."""
    return f"{size / 1e6:.1f} MB"
