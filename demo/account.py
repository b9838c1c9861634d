"""What the person in front of the terminal reads.

Owns the words' way to the screen: headings, sentences, tables, progress bars. Must
never write an escape code where the output is no terminal, nor a line for each record.
"""

import textwrap
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Final

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

_WIDTH_MAX: Final = 88
_POLL_S: Final = 0.1


class Account:
    """Tells the story; where there is no terminal, as plain text."""

    def __init__(self) -> None:
        self._console = Console(highlight=False, emoji=False, markup=False)
        self._console.width = min(self._console.width, _WIDTH_MAX)

    def heading(self, text: str) -> None:
        """Begin a scene."""
        self._console.print()
        self._console.print(Rule(Text(text, style="bold"), align="left", style="dim"))

    def say(self, text: str, style: str = "") -> None:
        """A paragraph."""
        words = textwrap.dedent(text).replace("\n", " ").strip()
        self._console.print(Text(words, style=style))

    def result(self, text: str, *, is_good: bool) -> None:
        """The last word: green or red, and said in words as well."""
        self._console.print(Text(text, style="bold green" if is_good else "bold red"))

    def table(
        self,
        columns: Sequence[str],
        rows: Iterable[Sequence[str]],
        *,
        is_red: Callable[[Sequence[str]], bool] = lambda _: False,
    ) -> None:
        """A small table; what starts with a digit is set to the right."""
        listed = [tuple(row) for row in rows]
        table = Table(
            box=None,
            padding=(0, 2, 0, 0),
            pad_edge=False,
            header_style="dim",
            show_header=any(columns),
        )
        for index, name in enumerate(columns):
            is_number = all(row[index][:1].isdigit() for row in listed)
            table.add_column(name, justify="right" if is_number else "left")
        for row in listed:
            cells = [Text(cell) for cell in row]
            table.add_row(*cells, style="red" if is_red(row) else "")
        self._console.print(table)

    def progress(
        self, what: str, total: int, done: Callable[[], int], timeout_s: float
    ) -> bool:
        """Show a bar until all is done; False if it isn't after so many seconds."""
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
        end_s = time.monotonic() + timeout_s
        is_terminal = self._console.is_terminal
        with Progress(
            *columns, console=self._console, transient=True, disable=not is_terminal
        ) as bar:
            task = bar.add_task(what, total=total)
            while (now := done()) < total:
                if time.monotonic() > end_s:
                    return False
                bar.update(task, completed=now)
                time.sleep(_POLL_S)
        return True
