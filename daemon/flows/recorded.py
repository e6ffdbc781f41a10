"""`python -m daemon.flows.recorded DIRECTORY`: recorded flows of a time range as JSON lines, oldest first.

A process of its own, started by the daemon for each such question: scanning a day's flows must not hold up the
event loop. The question comes as JSON on stdin, `{since_ns, until_ns, number, whitelist, blacklist}`; lines are
those of daemon/flows/lines.py. Exit status 2 for a question that cannot be meant.
"""

import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from daemon.flows.filters import FilterError, parse_filters
from daemon.flows.lines import line
from daemon.flows.scan import Columns, prefilter
from daemon.flows.segments import EVENTS, KNOWN, Recalled, Stored, files, stored, unpack_known
from daemon.model.flow import Flow

FLUSH_LINES = 64


def matching(directory: Path, question: Mapping[str, Any]) -> Iterator[tuple[Flow, int]]:
    """The recorded flows that answer a question, with the start of the daemon that saw them. Raises FilterError."""
    white, black = question.get("whitelist", []), question.get("blacklist", [])
    filters = parse_filters(white, black)
    candidates = prefilter(white)
    since, until = int(question["since_ns"]), int(question["until_ns"])
    for path in files(directory):
        try:
            frames = list(stored(path))
        except FileNotFoundError:  # it grew too old meanwhile
            continue
        wanted = [one for one in frames if _touches(one, since, until)]
        if not wanted:
            continue
        recalled = _recalled(frames)
        for one in wanted:
            payload = one.payload()
            if payload is None:
                break
            columns = Columns(payload, one.frame.events)
            for index in columns.indexes(candidates(columns)):
                event = columns.event(index)
                if not since <= event.time_ns + one.frame.offset_ns <= until:
                    continue
                number = one.frame.number + index
                flow = filters.select(event, lambda: recalled.flow(number, event, one.frame.offset_ns))  # noqa: B023 - called at once
                if flow:
                    yield flow, one.frame.started_ns


def _touches(one: Stored, since: int, until: int) -> bool:
    frame = one.frame
    return frame.kind == EVENTS and frame.newest_ns >= since and frame.oldest_ns <= until


def _recalled(frames: list[Stored]) -> Recalled:
    recalled = Recalled()
    for one in frames:
        if one.frame.kind == KNOWN and (payload := one.payload()):
            recalled.learn(unpack_known(payload))
    return recalled


def main() -> int:
    """The program."""
    question = json.load(sys.stdin)
    left = question.get("number") or -1
    pending: list[str] = []
    shown = 0
    try:
        for flow, started_ns in matching(Path(sys.argv[1]), question):
            pending.append(line(flow, started_ns))
            shown += 1
            if shown == 1 or len(pending) >= FLUSH_LINES:  # the first at once: somebody is waiting
                sys.stdout.write("".join(pending))
                sys.stdout.flush()
                pending.clear()
            if shown == left:
                break
    except FilterError as error:
        print(error, file=sys.stderr)
        return 2
    except BrokenPipeError:
        return 0
    sys.stdout.write("".join(pending))
    return 0


if __name__ == "__main__":
    sys.exit(main())
