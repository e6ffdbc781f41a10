"""What is pinned, held open: whoever removes a pin by hand frees nothing, and the pin is put back."""

import os
from pathlib import Path

from bpf.syscall import obj_get, obj_pin


class Pins:
    """A descriptor of every object below a directory of bpffs. Blocking system calls: use it off the event loop."""

    def __init__(self, home: Path) -> None:
        self._home = home
        self._held: dict[Path, tuple[int, int]] = {}  # inode of the pin, descriptor

    def restore(self) -> list[Path]:
        """Pin again what is held and has lost its name; which ones. OSError when the file system itself is gone."""
        lost = [path for path in self._held if not path.exists()]
        for path in lost:
            _, handle = self._held[path]
            path.parent.mkdir(parents=True, exist_ok=True)
            obj_pin(handle, path)
            self._held[path] = (path.stat().st_ino, handle)
        return lost

    def hold(self) -> None:
        """Take over what is pinned now: after changes of our own, and nothing else in between."""
        present = {path: path.stat().st_ino for path in self._home.glob("*/*") if not path.is_dir()}
        for path in [one for one, (inode, _) in self._held.items() if present.get(one) != inode]:
            os.close(self._held.pop(path)[1])
        for path, inode in present.items():
            if path not in self._held:
                self._held[path] = (inode, obj_get(path))

    def close(self) -> None:
        """Hold nothing any more; the pins stay."""
        while self._held:
            os.close(self._held.popitem()[1][1])
