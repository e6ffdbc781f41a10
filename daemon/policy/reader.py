"""Reading nodes strictly: every wrong shape becomes a Problem with its position, and reading goes on."""

import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from daemon.model.problem import Problem
from daemon.policy.document import Node, shown

MAX_PROBLEMS = 100


@dataclass(slots=True)
class Reader:
    """The shapes of one document. A wrong field reads as absent."""

    file: str
    problems: list[Problem] = field(default_factory=list)

    @property
    def failed(self) -> bool:
        """Whether anything so far makes the document unfit for use."""
        return any(one.severity == "error" for one in self.problems)

    def fail(self, node: Node, path: str, message: str) -> None:
        """Record an error at a node; one document does not get more than MAX_PROBLEMS."""
        if len(self.problems) >= MAX_PROBLEMS:
            return
        self.problems.append(Problem(self.file, node.line, node.column, path, message))

    def mapping(
        self, node: Node, path: str, known: Iterable[str], required: Iterable[str] = ()
    ) -> Mapping[str, Node]:
        """The fields of a mapping; unknown, missing and null ones are errors and left out."""
        if not self.expect(node, path, "mapping"):
            return {}
        names = tuple(known)
        for name, key in node.keys.items():
            if name not in names and len(self.problems) < MAX_PROBLEMS:
                self.fail(key, join(path, name), f"unknown field {shown(name)}{suggest(name, names)}")
        for name in required:
            if name not in node.fields:
                self.fail(node, join(path, name), "required, but missing")
        return {name: value for name, value in node.fields.items() if name in names}

    def expect(self, node: Node, path: str, kind: str) -> bool:
        """Whether the node has this kind; says so if not."""
        if node.kind == kind:
            return True
        hint = ""
        if kind == "string" and node.kind in ("number", "boolean"):
            hint = f' (put it in quotes: "{node.text}")'
        elif kind == "list":
            hint = " (did you forget the dash?)" if node.kind in ("mapping", "string") else ""
        if node.kind == "null":
            hint = " (leave the field out, or fill it in)"
        self.fail(node, path, f"expected a {kind}, found {node.shown()}{hint}")
        return False

    def items(self, node: Node | None, path: str) -> list[tuple[Node, str]]:
        """(element, path) of a list; nothing if the field is absent or wrong."""
        if node is None or not self.expect(node, path, "list"):
            return []
        return [(item, f"{path}[{index}]") for index, item in enumerate(node.items)]

    def text(self, node: Node | None, path: str) -> str:
        """The string, empty if absent or wrong."""
        if node is None or not self.expect(node, path, "string"):
            return ""
        return node.text

    def flag(self, node: Node | None, path: str, default: bool) -> bool:
        """A boolean field."""
        if node is None or not self.expect(node, path, "boolean"):
            return default
        return node.text.lower() in ("true", "yes", "on", "y")

    def choice(self, node: Node, path: str, allowed: Sequence[str]) -> str:
        """One of `allowed`, exactly as spelled."""
        if not self.expect(node, path, "string"):
            return ""
        if node.text not in allowed:
            near = suggest(node.text, allowed)
            self.fail(node, path, f"{shown(node.text)} is not one of {', '.join(allowed)}{near}")
            return ""
        return node.text


def join(path: str, name: str) -> str:
    """A field's path below another one."""
    return f"{path}.{name}" if path else name


def filled(node: Node | None) -> bool:
    """Whether a list field is there with at least one element (a wrong type counts, it has its own error)."""
    return node is not None and (node.kind != "list" or bool(node.items))


def suggest(name: str, known: Sequence[str]) -> str:
    """` (did you mean ...?)` when something close exists."""
    by_fold = {one.lower(): one for one in known}
    near = difflib.get_close_matches(name.lower()[:64], by_fold, n=1, cutoff=0.7)
    return f" (did you mean {by_fold[near[0]]}?)" if near else ""
