"""Numbers as people read them in one glance."""

from __future__ import annotations


def duration(seconds: float) -> str:
    """ "12 s", "3 min 20 s", "5 h 07 min", "12 d 3 h" """
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 100:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    minutes = whole // 60
    if minutes < 24 * 60:
        return f"{minutes // 60} h {minutes % 60:02d} min"
    return f"{minutes // 1440} d {minutes % 1440 // 60} h"


def size(amount: float) -> str:
    """ "512 bytes", "3.4 GB": decimal, as disks are sold."""
    for unit in ("bytes", "kB", "MB", "GB", "TB"):
        if abs(amount) < 999.5 or unit == "TB":
            return f"{amount:.0f} {unit}" if unit == "bytes" or abs(amount) >= 99.95 else f"{amount:.1f} {unit}"
        amount /= 1000
    raise AssertionError


def count(amount: float) -> str:
    """ "941", "12.4 k", "3.28 M", "1.5 T": counts of tokens."""
    for unit in ("", " k", " M", " G", " T"):
        if abs(amount) < 999.5 or unit == " T":
            return f"{amount:.0f}{unit}" if not unit else f"{amount:.3g}{unit}"
        amount /= 1000
    raise AssertionError
