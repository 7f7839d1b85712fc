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


def load_kernels(recipe, backend=None):
    """Loads what a layer of this recipe runs on, compiled if it is not yet.

    Returns the Backend that multiplies its MXFP4: the one that is given, or that build() chooses.
    It returns None for a recipe without such a product.
    """
    if not recipe.has_kernels:
        prepare(recipe)
    if recipe.has_packed_products and backend is None:
        backend = build()
    return backend
