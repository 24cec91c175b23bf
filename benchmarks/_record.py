"""The figures of a long run: kept in a file as they come, so that a run can be taken up again."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

__all__ = ["Record", "Row"]

Row = dict[str, Any]

_KEY = ("task", "criterion", "seed", "sparsity", "repair")


class Record:
    """Rows of figures, told apart by task, criterion, seed, sparsity and repair.

    Args:
        path: The JSON file; read if it is there, and written at every change. None keeps no file.
        tasks: The tasks that figures may be added of.
        settings: What their figures depend on; other tasks in the file may have others.
        environment: Where they were last added to.

    Raises:
        ValueError: The file has figures of one of the tasks with other settings.
    """

    def __init__(
        self, path: Path | None, tasks: Sequence[str], settings: Row, environment: Row
    ) -> None:
        self._path = path
        self.content: dict[str, Any] = {"settings": {}, "dense": {}, "rows": []}
        if path is not None and path.is_file():
            self.content = json.loads(path.read_text())
        for task in tasks:
            known = self.content["settings"].setdefault(task, settings)
            if known != settings:
                raise ValueError(
                    f"{path} has figures of {task} with other settings: {known}, not {settings}; "
                    "give another file"
                )
        self.content["environment"] = environment

    @property
    def rows(self) -> list[Row]:
        """All rows."""
        rows: list[Row] = self.content["rows"]
        return rows

    @property
    def dense(self) -> dict[str, dict[str, Any]]:
        """The figures of every task's dense model."""
        dense: dict[str, dict[str, Any]] = self.content["dense"]
        return dense

    def has(self, **key: Any) -> bool:
        """Is there such a row?"""
        return any(all(row[name] == key[name] for name in _KEY) for row in self.rows)

    def add(self, row: Row) -> None:
        """Keep a row, in the file, too."""
        self.rows.append(row)
        self.write()

    def write(self) -> None:
        """Write the file, if there is one."""
        if self._path is not None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._path.write_text(_json(self.content))


def _json(content: Row) -> str:
    """The file's text: one row a line, for those who compare two versions of it."""
    lines = ",\n".join(json.dumps(row) for row in content["rows"])
    rest = json.dumps({**content, "rows": []}, indent=1)
    return rest.replace('"rows": []', f'"rows": [\n{lines}\n ]') + "\n"
