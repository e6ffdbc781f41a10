"""Problem: what is wrong with a document, at a position."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Problem:
    """One finding. `line` and `column` start at 1, 0 where there is none; `field` is a path like `spec.ingress[0]`."""

    file: str
    line: int
    column: int
    field: str
    message: str  # what was seen, what was expected, and the next step
    severity: str = "error"  # or "warning"

    def __str__(self) -> str:
        where = f"{self.file}:{self.line}:{self.column}" if self.line else self.file
        what = f"{self.field}: {self.message}" if self.field else self.message
        return f"{where}: {self.severity}: {what}"
