"""Balanced and nearest assignment of features to codes, in Triton kernels that never write the N x K matrix.

```python
from kernels import get_kernel

optvq_sinkhorn = get_kernel("optvq/optvq-sinkhorn", version=1, trust_remote_code=True)
assignment = optvq_sinkhorn.sinkhorn_assign(features, codebook, epsilon=10.0, iterations=5, normalization="zscore")
codes = optvq_sinkhorn.nearest_assign(features, codebook)
```
"""

from .sinkhorn import Assignment, nearest_assign, potentials_assign, sinkhorn_assign
from .sinkhorn_fused import FusedRows, Tiles


__all__ = ["Assignment", "FusedRows", "Tiles", "nearest_assign", "potentials_assign", "sinkhorn_assign"]
