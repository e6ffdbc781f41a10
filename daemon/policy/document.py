"""YAML text -> nodes with positions, within limits: no file can make reading it expensive or ambiguous."""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise

import yaml

from daemon.model.problem import Problem

MAX_BYTES = 1 << 20
MAX_NODES = 100_000
MAX_DEPTH = 32

_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_RESOLVER = yaml.SafeLoader.yaml_implicit_resolvers
_DOCUMENT_START = re.compile(r"^---(?=[ \t\r\n]|$)", re.MULTILINE)
_TAGS = {
    "tag:yaml.org,2002:null": "null",
    "tag:yaml.org,2002:bool": "boolean",
    "tag:yaml.org,2002:int": "number",
    "tag:yaml.org,2002:float": "number",
    "tag:yaml.org,2002:str": "string",
}


@dataclass(slots=True)
class Node:
    """One YAML node. `kind`: mapping, list, string, number, boolean or null; lines and columns start at 1."""

    kind: str
    line: int
    column: int
    text: str = ""  # scalars: as written, without quotes
    fields: dict[str, "Node"] = field(default_factory=dict)  # mappings
    keys: dict[str, "Node"] = field(default_factory=dict)  # mappings: the key's own node
    items: list["Node"] = field(default_factory=list)  # lists

    def shown(self) -> str:
        """The value for a message, short and without control characters."""
        if self.kind in ("mapping", "list"):
            return f"a {self.kind}"
        if self.kind == "null":
            return "null"
        return shown(self.text) if self.kind == "string" else f"the {self.kind} {shown(self.text)[1:-1]}"


def shown(text: str) -> str:
    """Text quoted for a terminal: control characters escaped, long values cut."""
    cut = text if len(text) <= 80 else text[:77] + "..."
    return '"' + "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in cut) + '"'


class _RefusedError(Exception):
    def __init__(self, message: str, mark: object = None, offset: int = 0) -> None:
        super().__init__(message)
        self.line = getattr(mark, "line", -1) + 1 + offset if mark is not None else 0
        self.column = getattr(mark, "column", -1) + 1 if mark is not None else 0


def read_documents(text: str, file: str) -> Iterator[Node | Problem]:
    """The documents of a file in order; a Problem stands in for each one that is not acceptable YAML."""
    text = text.removeprefix("\ufeff")
    if len(text) > MAX_BYTES or len(text.encode("utf-8", "replace")) > MAX_BYTES:
        yield Problem(file, 0, 0, "", f"larger than {MAX_BYTES} bytes, the limit for one file: split it")
        return
    budget = _Budget(MAX_NODES)
    for offset, chunk in _chunks(text):
        try:
            yield from _Builder(offset, budget).documents(chunk)
        except _RefusedError as error:
            yield Problem(file, error.line, error.column, "", str(error))
            if budget.left < 0:
                return


def _chunks(text: str) -> Iterator[tuple[int, str]]:
    """(lines before it, text) of each document.

    `---` in the first column starts one, even inside a scalar.
    """
    starts = [match.start() for match in _DOCUMENT_START.finditer(text)]
    edges = [0, *(at for at in starts if at), len(text)]
    line = 0
    for first, end in pairwise(edges):
        chunk = text[first:end]
        if chunk.strip() not in ("", "---"):
            yield line, chunk
        line += chunk.count("\n")


@dataclass(slots=True)
class _Budget:
    left: int


class _Builder:
    """Builds nodes from parser events, iteratively, so that depth is bounded before it costs anything."""

    def __init__(self, offset: int, budget: _Budget) -> None:
        self._offset = offset
        self._budget = budget

    def documents(self, text: str) -> Iterator[Node]:
        """Every non-empty document in `text`. Raises _RefusedError."""
        stack: list[tuple[Node, Node | None]] = []  # open collections, with the key a mapping waits on
        root: Node | None = None
        try:
            for event in yaml.parse(text, Loader=_LOADER):
                if isinstance(event, yaml.DocumentStartEvent):
                    root = None
                elif isinstance(event, yaml.DocumentEndEvent):
                    if root is not None and not (root.kind == "null" and not root.text):
                        yield root
                elif isinstance(event, yaml.CollectionEndEvent):
                    stack.pop()
                elif isinstance(event, yaml.NodeEvent):
                    node = self._place(event, stack)
                    root = node if root is None else root
        except yaml.MarkedYAMLError as error:
            what = " ".join(part for part in (error.context, error.problem) if part)
            mark = error.problem_mark or error.context_mark
            raise _RefusedError(f"not valid YAML: {what}{_hint(what)}", mark, self._offset) from None
        except yaml.reader.ReaderError as error:
            line = text.count("\n", 0, error.position) if isinstance(error.position, int) else 0
            refused = _RefusedError(f"not valid YAML: unacceptable character ({error.reason})")
            refused.line, refused.column = line + 1 + self._offset, 1
            raise refused from None
        except (yaml.YAMLError, ValueError, RecursionError) as error:
            raise _RefusedError(f"not valid YAML: {error}") from None

    def _place(self, event: "yaml.NodeEvent", stack: list[tuple[Node, Node | None]]) -> Node:
        """The node of an event, attached to the open collection.

        It becomes the open one if it is a collection.
        """
        if isinstance(event, yaml.AliasEvent):
            raise self._refuse("aliases (*name) are not accepted: write the value out", event)
        node = self._node(event)
        if stack:
            self._attach(stack, node, event)
        if node.kind in ("mapping", "list"):
            stack.append((node, None))
            if len(stack) > MAX_DEPTH:
                raise self._refuse(f"nested deeper than {MAX_DEPTH} levels", event)
        return node

    def _refuse(self, message: str, event: object) -> _RefusedError:
        return _RefusedError(message, getattr(event, "start_mark", None), self._offset)

    def _node(self, event: "yaml.NodeEvent") -> Node:
        self._budget.left -= 1
        if self._budget.left < 0:
            raise self._refuse(f"more than {MAX_NODES} nodes in one file: split it", event)
        if event.anchor is not None:
            raise self._refuse("anchors (&name) are not accepted: write the value out", event)
        mark = event.start_mark
        line, column = (mark.line + 1 + self._offset, mark.column + 1) if mark else (0, 0)
        if isinstance(event, yaml.ScalarEvent):
            return Node(self._scalar_kind(event), line, column, event.value)
        tag = getattr(event, "tag", None)
        if tag not in (None, "!", "tag:yaml.org,2002:map", "tag:yaml.org,2002:seq"):
            raise self._refuse(f"the tag {shown(tag)} is not accepted", event)
        return Node("mapping" if isinstance(event, yaml.MappingStartEvent) else "list", line, column)

    def _scalar_kind(self, event: "yaml.ScalarEvent") -> str:
        if event.tag not in (None, "!"):
            if event.tag not in _TAGS:
                raise self._refuse(f"the tag {shown(event.tag)} is not accepted", event)
            return _TAGS[event.tag]
        if not event.implicit[0]:
            return "string"
        text = event.value
        for tag, pattern in [*_RESOLVER.get(text[:1], []), *_RESOLVER.get(None, [])]:
            if pattern.match(text):
                return _TAGS.get(tag, "string")
        return "string"

    def _attach(self, stack: list[tuple[Node, Node | None]], node: Node, event: object) -> None:
        parent, key = stack[-1]
        if parent.kind == "list":
            parent.items.append(node)
        elif key is not None:
            parent.fields[key.text] = node
            parent.keys[key.text] = key
            stack[-1] = (parent, None)
        else:
            if node.kind in ("mapping", "list"):
                raise self._refuse("a mapping key has to be plain text", event)
            if node.text == "<<":
                raise self._refuse("merge keys (<<) are not accepted: write the fields out", event)
            if node.text in parent.fields:
                first = parent.keys[node.text].line
                raise self._refuse(f"the key {shown(node.text)} was already given in line {first}", event)
            stack[-1] = (parent, node)


def _hint(problem: str) -> str:
    if "cannot start any token" in problem:
        return " (indent with spaces, not tabs; quote text that begins with % @ or `)"
    if "mapping values are not allowed" in problem:
        return " (is a quote or a line break missing, or is the indentation off?)"
    return ""
