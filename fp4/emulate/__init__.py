"""
Every recipe that is not exactly Quartet's. An ordinary matmul multiplies its operands, unless both
are MXFP4.

    matmul.py        the three products of a linear layer, as the columns of a recipe describe them
    columns.py       the quantiser of their operands: its definition, and its kernel, which is
                     compiled for the columns alone
    quantizers.py    the number formats, and how a block of numbers finds its scale
    fp8.py           the method "fp8"
    baselines.py     the methods that Quartet was compared with

Matmul is the one autograd Function for all of them: it looks the method of a recipe up in
matmul.METHODS. Importing this package is what registers "fp8" and the baselines there.
"""
from ..build import build
from . import baselines
from .columns import prepare
from .matmul import Matmul


def load_kernels(recipes, gemm="auto", backend=None):
    """Loads what layers of these recipes run on, compiled if it is not yet.

    Returns the Backend that multiplies their MXFP4: the one that is given, or that build(gemm)
    chooses. It returns None for recipes without such a product.
    """
    rows = [row for recipe in recipes for row in (recipe, recipe.down)]
    for row in rows:
        if not row.has_kernels:
            prepare(row)
    if backend is None and any(row.has_packed_products for row in rows):
        backend = build(gemm)
    return backend
