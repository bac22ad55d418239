"""The C library of csrc/: whether it is there, what it can do on this CPU, and why it is missing where it is.

It is loaded with ctypes at its first use, so that importing does nothing. ``SECATEUR_NO_KERNELS=1`` hides it.
"""

from __future__ import annotations

import ctypes
import importlib.machinery
import os
from dataclasses import dataclass
from functools import cache
from pathlib import Path

LEVELS = ("portable", "avx2", "avx512")
ABI = 2


@dataclass(frozen=True)
class _Found:
    """The library, or why there is none."""

    handle: ctypes.CDLL | None
    reason: str = ""


@cache
def _found() -> _Found:
    if os.environ.get("SECATEUR_NO_KERNELS") == "1":
        return _Found(None, "SECATEUR_NO_KERNELS=1 hides them")
    here = Path(__file__).parent
    paths = [here / f"_kernels{suffix}" for suffix in importlib.machinery.EXTENSION_SUFFIXES]
    path = next((p for p in paths if p.is_file()), None)
    if path is None:
        return _Found(None, "they are not built; install a C++ compiler and install secateur again")
    try:
        library = ctypes.CDLL(str(path))
        if library.secateur_abi() != ABI:
            return _Found(None, "they were built for another version; install secateur again")
    except (OSError, AttributeError) as error:
        return _Found(None, f"{path.name} does not load: {error}")
    pointer, i32, i64 = ctypes.c_void_p, ctypes.c_int32, ctypes.c_int64
    library.secateur_product.argtypes = (pointer, pointer, i32, i64, pointer, pointer, i32, i32)
    library.secateur_product.restype = i64
    library.secateur_unpack.argtypes = (pointer, pointer, i32, i64, i64, i32, i32)
    library.secateur_pack.argtypes = (pointer, i64, i64, i64, pointer, pointer, pointer, i32)
    library.secateur_decode.argtypes = (pointer, pointer, pointer, i64, i64, i64, pointer, i32)
    for function in (library.secateur_unpack, library.secateur_pack, library.secateur_decode):
        function.restype = None
    return _Found(library)


def library() -> ctypes.CDLL | None:
    """The C library, or None where it is not built or hidden."""
    return _found().handle


@cache
def levels() -> tuple[str, ...]:
    """The instruction levels that this CPU and this build have, slowest first; none without the library."""
    found = library()
    return tuple(word for i, word in enumerate(LEVELS) if found and found.secateur_has(i))


def available() -> str | None:
    """The level that products run at: ``avx512``, ``avx2``, ``portable``, or None without the library."""
    return levels()[-1] if levels() else None


def why_missing() -> str:
    """Why there are no kernels; empty where there are."""
    return _found().reason


def status() -> str:
    """One line for people: which kernels run, or why none do and what runs instead."""
    if available():
        return f"kernels that skip zeros: {available()}"
    return f"kernels that skip zeros: missing ({why_missing()}); packed weights run through torch"
