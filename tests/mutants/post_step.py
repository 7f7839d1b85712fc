"""Faults in what acts on the weights between optimizer steps, and the tests that notice them."""
from tools.mutants import Mutant

FILE = "fp4/post_step.py"
TABLE = "fp4/recipes.py"
AXES = "fp4/axes.py"
T = "tests/test_post_step.py::test_"
FORMULA = T + "cage_is_its_formula_in_float64"
RAMP = T + "cage_does_nothing_before_its_start_and_grows_from_there_to_the_end"
GRID = T + "the_grid_is_what_the_forward_product_reads"
SNAPPED = T + "what_flips_between_two_points_is_snapped_and_what_drifts_is_not"
RATIO = T + "the_ratio_decides"
WINDOWS = T + "the_next_window_begins_where_the_last_one_ends"
REFUSED = T + "a_word_that_means_nothing_is_refused"
RESUMED = T + "a_resumed_run_ends_as_if_it_had_not_been_stopped"
NONE = T + "a_run_without_one_is_as_it_was_and_one_with_one_is_another"

MUTANTS = [
    # ---- CAGE
    Mutant("cage pushes away from the grid", FILE, "w.sub_(w - on_grid", "w.add_(w - on_grid",
           FORMULA),
    Mutant("cage forgets the learning rate", FILE, "alpha=lr * force", "alpha=force", FORMULA),
    Mutant("cage pulls from the first step on", FILE,
           "(done / steps - start) / (1 - start)", "done / steps", RAMP),
    Mutant("cage's force does not reach its strength", FILE,
           "(done / steps - start) / (1 - start)", "(done / steps - start)", FORMULA),
    Mutant("what cage does is not counted", FILE,
           "w.sub_(w - on_grid", "w.data.sub_(w - on_grid",
           T + "a_layer_notices_that_its_stored_weight_is_stale"),
    Mutant("of a sharded model, cage has no rows", FILE,
           "stored_weight.local(layer.weight)", "layer.weight",
           "tests/test_sharded.py::test_cage_pulls_the_rows_of_each_process_as_those_of_the_whole_"
           "weight[2-pull:fp4:float32]"),

    # ---- the grid
    Mutant("the grid stays in its rotated basis", FILE,
           "return ops.unrotate(v, ops.nothing_clipped(*v.shape, v.device), torch.float32)",
           "return v",
           FORMULA + "[cage-5.0-fp4]"),
    Mutant("half of the values are masked", "fp4/ops.py", "columns // 32), -1,",
           "columns // 32), 0xffff,",
           FORMULA + "[cage-5.0-fp4]"),
    Mutant("blocks of nvfp4's weight are not square", FILE,
           'square=recipe.forward.rhs == "square_blocks"', "square=False",
           FORMULA + "[cage-5.0-nvfp4]"),
    Mutant("the grid of a weight is that of the activations", FILE,
           "w, recipe.forward.right, transposed", "w, recipe.forward.left, transposed", GRID),
    Mutant("the factor of a format is left out", FILE, "return values * factor", "return values",
           GRID),
    Mutant("the emulated grid stays in its rotated basis", FILE,
           "columns.rotate_for(v, recipe.forward.right, None, undo=True)[:, :w.shape[1]]",
           "v[:, :w.shape[1]]", GRID),

    # ---- de-oscillation
    Mutant("the weight's own way counts, not the grid's", FILE,
           "(q - quantize(last, recipe)).abs()", "(v - rotate(last, recipe)).abs()",
           SNAPPED),
    Mutant("ways that cancel do not count", FILE,
           "layer.deosc_distance += (v - rotate(last, recipe)).abs()",
           "layer.deosc_distance += (v - rotate(last, recipe))", SNAPPED),
    Mutant("all that has moved is snapped", FILE,
           "(distance > 0) & (quantized_distance >= ratio * distance)", "distance > 0", SNAPPED),
    Mutant("the ratio is turned over", FILE,
           "quantized_distance >= ratio * distance", "distance >= ratio * quantized_distance",
           RATIO),
    Mutant("what rests is snapped", FILE, "(distance > 0) & (", "(distance >= 0) & (", RATIO),
    Mutant("every value of a layer is snapped", FILE,
           "torch.where(snap, q - v, 0)", "(q - v)", SNAPPED),
    Mutant("sums go on in the next window", FILE,
           "            layer.deosc_distance.zero_()\n", "", SNAPPED),
    Mutant("the step before is the window's first one", FILE,
           "    last.copy_(w)\n", "    if done == start:\n        last.copy_(w)\n", SNAPPED),
    Mutant("windows are counted from the run's first step", FILE,
           "(done - start) % period", "done % period", WINDOWS),
    Mutant("a window is open before the start", FILE, "    if done < start:", "    if done < 1:",
           SNAPPED),
    Mutant("a checkpoint does not have the window", FILE,
           "torch.zeros_like(like, dtype=torch.float32))",
           "torch.zeros_like(like, dtype=torch.float32), persistent=False)", RESUMED),
    Mutant("a replaced layer has no memory for its window", "fp4/whole_model.py",
           "    add_state(new)                      # on the device of the weight\n", "",
           T + "layers_that_are_replaced_have_their_state_where_their_weights_are"),

    # ---- the column, and the run
    Mutant("the column changes nothing", AXES,
           "row.method, post_step, down_input)", "row.method)", NONE),
    Mutant("a row without a grid is let through", AXES,
           "    check(forward is not None,\n", "    check(True,\n", REFUSED),
    Mutant("a grid that is drawn anew is let through", TABLE,
           'self.signs == "none" and not self.is_random', "not self.is_random", REFUSED),
    Mutant("a grid whose scales are drawn anew is let through", TABLE,
           'or is_eden and self.format == "nvfp4"', "", REFUSED),
    Mutant("a run may end before its first window", TABLE,
           "begin < start and start + period <= end", "begin < start <= end", REFUSED),
    Mutant("a number may be its upper bound", TABLE,
           "number.least <= value < number.most", "number.least <= value <= number.most", REFUSED),
    Mutant("a sharded model may have any", TABLE,
           'name == "none" or name == "cage" and self.has_kernels', "True",
           T + "a_sharded_model_has_only_what_is_local_to_a_row"),
    Mutant("nothing acts after a step", "quartet.py",
           "            post_step(lr, done, steps)\n", "", NONE),
    Mutant("the number of steps done is one behind", "quartet.py",
           "post_step(lr, done, steps)", "post_step(lr, step, steps)", NONE),
    Mutant("a run is not checked before it begins", "tools/schedule.py",
           "        checked(phase.recipe.check_run, steps, cfg.shard, phase.begin, phase.end)\n",
           "",
           REFUSED),
]
