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
CHECKPOINTS = T + "a_run_logs_what_its_step_did_to_the_weights_of_its_checkpoints"
FULL = T + "the_columns_are_there_if_they_are_asked_for_and_full_where_a_step_was_evaluated"
BEGIN_END = T + "measuring_can_begin_and_end_where_a_run_is_resumed_and_the_table_stays_one"
RESUMED = T + "a_run_that_is_resumed_goes_on_measuring"
SHARDED = T + "a_sharded_model_is_refused_before_anything_is_written"

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
           'return self.signs == "none" and not self.is_random',
           'return not self.is_random', FIXED),
    Mutant("layers that round at random are measured", "fp4/recipes.py",
           'return self.signs == "none" and not self.is_random',
           'return self.signs == "none"', FIXED),
    Mutant("a step is measured against one long ago", FILE,
           "        self.before = None\n        return", "        return", ANNOUNCED),
    Mutant("the number of a block is a part of the kind", FILE,
           "first = numbers[-1] + 1 if numbers else 0", "first = 0", KINDS),
    Mutant("a flag that was not given measures", "fp4/whole_model.py",
           "WeightStats(dict(linears(model)) if is_on else {})",
           "WeightStats(dict(linears(model)))", ANNOUNCED),
]

IN_A_RUN = [
    Mutant("measuring begins behind the optimizer", "quartet.py",
           "            optimizer.step()\n",
           "            optimizer.step()\n            weight_stats.before_step()\n", CHECKPOINTS),
    Mutant("what post_step does is not in it", "quartet.py",
           "            post_step(lr, done, steps)\n",
           "            seen = weight_stats.after_step()\n            post_step(lr, done, steps)\n"
           "            weight_stats.after_step = lambda: seen\n", CHECKPOINTS),
    Mutant("a sharded model is measured", "quartet.py",
           "check(not (cfg.shard and cfg.weight_stats),", "check(True,",
           SHARDED),
    Mutant("every step is measured", "quartet.py",
           "            if is_evaluated:\n                weight_stats.before_step()\n",
           "            weight_stats.before_step()\n", FULL),
    Mutant("the rows of a table are not as wide as its head", "tools/run.py",
           'line += "," * len(new)', "pass", BEGIN_END),
    Mutant("the head of a table gets no new columns", "tools/run.py",
           'line = ",".join([*columns, *new])', "pass", FULL),
    Mutant("where a run ends to measure, its rows are short", "tools/run.py",
           "self.write(log_row(row, self.columns))", "self.write(log_row(row))", BEGIN_END),
    Mutant("a lost log comes back without what was measured", "tools/run.py",
           "[*COLUMNS, *measured])", "COLUMNS)", BEGIN_END),
    Mutant("shares of a log are not read", "tools/run.py",
           "beyond, bpb, weights or None)", "beyond, bpb)", RESUMED + " " + CHECKPOINTS),
    Mutant("a step that was not measured has an empty dictionary", "tools/run.py",
           "beyond, bpb, weights or None)", "beyond, bpb, weights)", FULL),
]

MUTANTS = [*MEASURED, *IN_A_RUN]
