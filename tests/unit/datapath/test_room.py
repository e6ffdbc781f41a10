"""Full address tables: old entries stay, the most trusted come in, the rest is told and counts as the world."""

from bpf.layout import sized
from daemon.datapath.image import Image
from daemon.datapath.room import squeeze
from daemon.model.identity import Identity
from daemon.model.net import compact, parse_prefix

LOCAL, CLUSTER, REMOTE = 0, 2, 3


def apply(_: object) -> None:
    """The image is what is looked at."""


def hosts(network: str, count: int) -> list[int]:
    """Scattered IPv4 addresses: no two in one /24."""
    return [compact(parse_prefix(f"{network}.{at}.7")) for at in range(count)]


class Room:
    """An image with place for some addresses, whose trust is by their first two octets."""

    def __init__(self, places: int) -> None:
        self.image = Image(sized(slots=64, cells=1024, rules=64, ip4_blocks=512, hosts=places, prefixes6=64))

    def enter(self, keys: list[int]) -> list[int]:
        return squeeze(self.image, dict.fromkeys(keys, Identity(70_001)), self.trust, apply)

    @staticmethod
    def trust(key: int) -> int:
        return {10: LOCAL, 20: CLUSTER, 30: REMOTE}[key >> 24]

    def held(self) -> set[int]:
        return set(self.image.owned())


def test_what_fits_is_entered_whole():
    room = Room(64)
    assert room.enter(hosts("30.1", 64)) == []
    assert len(room.held()) == 64


def test_the_most_trusted_come_first_and_the_rest_is_left_out():
    room = Room(64)
    left = room.enter(hosts("30.1", 50) + hosts("20.1", 30) + hosts("10.1", 20))
    assert len(left) == 36
    assert {room.trust(key) for key in left} == {REMOTE}
    assert room.held() >= {*hosts("10.1", 20), *hosts("20.1", 30)}


def test_old_entries_stay_unless_more_trusted_ones_need_their_place():
    room = Room(64)
    old = hosts("30.1", 64)
    room.enter(old)
    assert room.enter(hosts("30.2", 5)) == hosts("30.2", 5)
    assert room.held() == set(old)
    gone = room.enter(hosts("10.1", 5) + hosts("30.3", 2))
    assert room.held() >= set(hosts("10.1", 5))
    assert len(room.held()) == 64
    assert len(gone) == 7
    assert len(set(gone) & set(old)) == 5


def test_one_full_table_leaves_the_others_alone():
    room = Room(64)
    six = [compact(parse_prefix(f"2001:db8::{at + 1}")) for at in range(10)]
    left = squeeze(
        room.image,
        dict.fromkeys([*hosts("30.1", 70), *six], Identity(70_001)),
        lambda _: REMOTE,
        apply,
    )
    assert len(left) == 6
    assert room.held() >= set(six)
