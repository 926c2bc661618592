"""Cached memories on Triton are a composition: there is no kernel of this op's own.

The running memory runs on the Triton kernels of gated linear attention or the delta rule (`Options.base`); the reads
are dense matrix products, one per segment, which the vendor's library does as well as any kernel of ours.
"""

from kernels.memory_cache.chunked import run

__all__ = ["run"]
