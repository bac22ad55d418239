"""Reading a GGUF file once, where Transformers reads it again and again.

Transformers 5.23 parses the whole file for the config and again for the weights, and makes the table of tensor names
anew for every submodule of the model: 397 times for SmolLM2, which is a third of the time that opening it takes.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache

import gguf


@contextmanager
def parsed_once() -> Iterator[None]:
    """While this is open, a file is parsed once and its table of names made once, however often they are asked for.

    Both depend on nothing but their arguments and are only read from. On exit the gguf package is as it was.
    """
    reader, table = gguf.GGUFReader, gguf.get_tensor_name_map
    gguf.GGUFReader = lru_cache(maxsize=1)(reader)
    gguf.get_tensor_name_map = lru_cache(maxsize=1)(table)
    try:
        yield
    finally:
        gguf.GGUFReader, gguf.get_tensor_name_map = reader, table
