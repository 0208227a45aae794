"""The addresses of this machine's network interfaces, with their masks. It asks the C library (getifaddrs)."""

from __future__ import annotations

import ctypes
import ctypes.util
import socket
import sys
from ipaddress import IPv4Address, IPv6Address


class _Interface(ctypes.Structure):
    """The beginning of `struct ifaddrs`, the same on Linux and the BSDs."""


_Interface._fields_ = [
    ("next", ctypes.POINTER(_Interface)),
    ("name", ctypes.c_char_p),
    ("flags", ctypes.c_uint),
    ("address", ctypes.c_void_p),
    ("mask", ctypes.c_void_p),
]
# Where the address is inside of a sockaddr, and of how many bytes.
_PLACES = {socket.AF_INET: (4, 4), socket.AF_INET6: (8, 16)}

Pair = tuple[IPv4Address | IPv6Address, IPv4Address | IPv6Address]


def own_networks() -> list[Pair]:
    """Address and mask of each interface; none where the system does not tell."""
    library = ctypes.CDLL(ctypes.util.find_library("c"), use_errno=True)
    first = ctypes.POINTER(_Interface)()
    if library.getifaddrs(ctypes.byref(first)) != 0:
        return []
    found = []
    try:
        one = first
        while one:
            entry = one.contents
            address = _read(entry.address)
            mask = _read(entry.mask, address)
            if address is not None and mask is not None:
                found.append((address, mask))
            one = entry.next
    finally:
        library.freeifaddrs(first)
    return found


def _read(place: int | None, of: IPv4Address | IPv6Address | None = None) -> IPv4Address | IPv6Address | None:
    """The address in a sockaddr. `of`: read the mask of this one; some systems leave a mask's family out."""
    if not place:
        return None
    family: int = (
        ctypes.c_uint16.from_address(place).value
        if sys.platform == "linux"
        else ctypes.c_uint8.from_address(place + 1).value
    )
    if of is not None:
        family = socket.AF_INET if of.version == 4 else socket.AF_INET6
    if family not in _PLACES:
        return None
    at, size = _PLACES[socket.AddressFamily(family)]
    raw = ctypes.string_at(place + at, size)
    return IPv4Address(raw) if family == socket.AF_INET else IPv6Address(raw)
