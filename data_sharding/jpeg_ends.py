"""A quick proof that a JPEG decodes, for the plain files that nearly all are.

In sequential files of one scan a decoder can fail in two ways: over its headers, or because the scan has no end. A bad
code inside the scan is only a warning to libjpeg, and so to Pillow: it fills in and goes on. So the headers are
decoded with the first bytes of the scan alone, and the scan is searched for its end, without decoding a coefficient.
"""

import re

_SEQUENTIAL = (0xC0, 0xC1)
_HEADERS = {0xC4, 0xDB, 0xDD, 0xFE, *_SEQUENTIAL, *range(0xE0, 0xF0)}
"""Huffman and quantisation tables, restart interval, comment, frame, application data."""
_SCAN, _START, _END = 0xDA, b"\xff\xd8", b"\xff\xd9"
_NEXT_MARKER = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")
_PREFIX = 64
"""Bytes of the scan that the shortened file keeps."""


def shortened(data: bytes) -> bytes | None:
    """A few bytes that decode if and only if all of `data` does, or None where only decoding `data` can tell."""
    start = _scan_start(data)
    if start is None:
        return None
    end = _NEXT_MARKER.search(data, start)
    if end is None or end.group() != _END:
        return None
    return data[: min(start + _PREFIX, end.start())] + _END


def _scan_start(data: bytes) -> int | None:
    """Where the only scan's data begin; None for whatever is not a plain sequential JPEG of one scan."""
    if not data.startswith(_START):
        return None
    at, components = 2, 0
    while at + 4 <= len(data) and data[at] == 0xFF:
        marker, length = data[at + 1], int.from_bytes(data[at + 2 : at + 4], "big")
        if marker in _SEQUENTIAL and length >= 8:
            components = data[at + 9] if at + 9 < len(data) else 0
        if marker == _SCAN:
            # A scan of fewer components is followed by others.
            whole = components > 0 and at + 4 < len(data) and data[at + 4] == components
            return at + 2 + length if whole else None
        if marker not in _HEADERS or length < 2:
            return None
        at += 2 + length
    return None
