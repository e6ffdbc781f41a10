"""The dates of a certificate, read from its bytes: TLS libraries tell them only of certificates that they accept."""

import ssl
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

_SEQUENCE, _UTC_TIME, _VERSION = 0x30, 0x17, 0xA0


class Validity(NamedTuple):
    """From when to when a certificate is good."""

    begins: datetime
    ends: datetime


def validity(der: bytes) -> Validity:
    """Of a certificate in DER. Raises ValueError for anything else."""
    try:
        body = _inner(_inner(der, 0), 0)  # Certificate, tbsCertificate
        position = 0
        if body[0] == _VERSION:
            position = _end(body, 0)
        for _ in range(3):  # serial number, algorithm, issuer
            position = _end(body, position)
        times = _inner(body, position)
        return Validity(_time(times, 0), _time(times, _end(times, 0)))
    except IndexError as error:
        raise ValueError("not a certificate") from error


def validity_of_file(path: str) -> Validity:
    """Of the first certificate in a PEM file. Raises OSError or ValueError."""
    text = Path(path).read_text(encoding="ascii")
    begin, end = text.find(ssl.PEM_HEADER), text.find(ssl.PEM_FOOTER)
    if begin < 0 or end < 0:
        raise ValueError("has no PEM certificate")
    return validity(ssl.PEM_cert_to_DER_cert(text[begin : end + len(ssl.PEM_FOOTER)]))


def _length(data: bytes, position: int) -> tuple[int, int]:
    """Where the content of the element begins, and how long it is."""
    first = data[position + 1]
    if first < 0x80:
        return position + 2, first
    count = first & 0x7F
    start = position + 2 + count
    return start, int.from_bytes(data[position + 2 : start])


def _end(data: bytes, position: int) -> int:
    start, length = _length(data, position)
    return start + length


def _inner(data: bytes, position: int) -> bytes:
    if data[position] != _SEQUENCE:
        raise ValueError("not a certificate")
    start, length = _length(data, position)
    return data[start : start + length]


def _time(data: bytes, position: int) -> datetime:
    start, length = _length(data, position)
    text = data[start : start + length].decode("ascii")
    short = data[position] == _UTC_TIME
    if short:  # two digits of the year, of 1950 to 2049
        text = ("20" if text < "50" else "19") + text
    return datetime.strptime(text, "%Y%m%d%H%M%SZ").replace(tzinfo=UTC)
