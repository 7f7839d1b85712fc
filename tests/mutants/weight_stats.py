"""Faults in what is measured of quantised weights, and the tests that notice them."""
from tools.mutants import Mutant

FILE = "fp4/weight_stats.py"
T = "tests/test_weight_stats.py::test_"
BRUTE = T + "the_shares_are_those_of_brute_force_without_the_blocks_that_are_kept"
PADDING = T + "padding_does_not_count_unless_a_rotation_makes_values_of_it"
FIXED = T + "only_layers_whose_grid_stays_are_measured"
DRIFT = T + "a_scale_that_follows_the_largest_weight_flips_nothing"
ANNOUNCED = T + "a_step_that_was_not_announced_is_not_measured"
KINDS = T + "layers_that_differ_in_their_numbers_are_of_one_kind"

MEASURED = [
    Mutant("what stays flips", FILE, "(~stays).sum()", "stays.sum()", BRUTE + "[fp4]"),
    Mutant("any change is a flip", FILE, "JUMP = 1 / 32", "JUMP = 0", DRIFT),
    Mutant("a step to the next point is no flip", FILE, "JUMP = 1 / 32", "JUMP = 1 / 2",
           BRUTE + "[fp4]"),
    Mutant("what was zero before counts", FILE, "(q == 0).sum()", "(q_before == 0).sum()",
           BRUTE + "[fp4]"),
    Mutant("what is kept is clipped", FILE, "(~is_kept).sum()", "is_kept.sum()", BRUTE + "[fp4]"),
    Mutant("without a mask everything is clipped", FILE, "torch.ones_like(q,",
           "torch.zeros_like(q,", BRUTE + "[nvfp4]"),
    Mutant("padding counts", FILE, "return q[:, :n_columns], is_kept[:, :n_columns]",
           "return q, is_kept", PADDING + "[nvfp4-axes3-nvidia]"),
    Mutant("what a rotation makes of padding does not count", FILE,
           "n_columns = w.shape[1] + -w.shape[1] % rotation", "n_columns = w.shape[1]", PADDING),
    Mutant("only the last layer of a kind is measured", FILE,
           "self.kinds.setdefault(kind_of(name), []).append(layer)",
           "self.kinds[kind_of(name)] = [layer]", BRUTE + "[fp4]"),
    Mutant("zeros and clipped change places", FILE, '("flips", "zeros", "clipped")',
           '("flips", "clipped", "zeros")', BRUTE + "[fp4]"),
    Mutant("layers that draw signs are measured", "fp4/recipes.py",
           'return self.rounding == "nearest" and self.signs == "none"',
           'return self.rounding == "nearest"', FIXED),
    Mutant("layers that round at random are measured", "fp4/recipes.py",
           'return self.rounding == "nearest" and self.signs == "none"',
           'return self.signs == "none"', FIXED),
    Mutant("a step is measured against one long ago", FILE,
           "        self.before = None\n        return", "        return", ANNOUNCED),
    Mutant("the number of a block is a part of the kind", FILE,
           "first = numbers[-1] + 1 if numbers else 0", "first = 0", KINDS),
    Mutant("a flag that was not given measures", "fp4/whole_model.py",
           "WeightStats(dict(linears(model)) if is_on else {})",
           "WeightStats(dict(linears(model)))", ANNOUNCED),
]

MUTANTS = MEASURED
