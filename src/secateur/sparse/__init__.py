"""Zeros that pay: packed formats, the kernels that skip zeros, modules that run them. Tensors only, no models."""

from secateur.sparse.formats import VERSION, Packed, fused, pack, unpack
from secateur.sparse.verify import from_tensors, header, to_tensors, verify

__all__ = ["VERSION", "Packed", "from_tensors", "fused", "header", "pack", "to_tensors", "unpack", "verify"]
