"""
Quartet's method: linear layers that train in MXFP4, a 4-bit number format. README.md is the guide.

The table of recipes is at hand at once. The names that need torch are imported at their first use
(PEP 562), so that a program which only reads the table, for its --help say, need not wait for it.
"""
import importlib

from .axes import AXES, recipe
from .build import build
from .recipes import RECIPES, GemmSpec, Recipe

MODULE_OF = {
    "Linear": "linear",
    "quantize_weights": "whole_model",
    "check_weights": "whole_model",
    "replace_linears": "whole_model",
    "set_recipe": "whole_model",
    "load_kernels": "emulate",
    "shard": "sharded",
    "pack_weights": "inference",
    "linear_cross_entropy": "cross_entropy",
    "mark_last": "whole_model",
    "post_step_of": "whole_model",
    "weight_stats_of": "whole_model",
    "blocks_beyond_window": "window",
    "Packed": "ops",
    "Backend": "backend",
}
__all__ = ["AXES", "RECIPES", "GemmSpec", "Recipe", "build", "recipe", *MODULE_OF]


def __getattr__(name):
    """Imports the module of a name that is not there yet; Python calls this when it misses one."""
    if name not in MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    # Relative to this package, which may be a part of another one: vendor.fp4, say.
    module = importlib.import_module(f".{MODULE_OF[name]}", __name__)
    return getattr(module, name)
