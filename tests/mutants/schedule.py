"""Faults in the switch from one recipe to another, and the tests that notice them."""
from tools.mutants import Mutant

FILE = "tools/schedule.py"
T = "tests/test_schedule.py::test_"
ROUNDED = T + "the_first_phase_has_its_share_of_the_steps_rounded"
OWN_ROW = T + "each_phase_has_its_own_row_and_axes"
REFUSED = T + "a_switch_that_cannot_be_is_refused_before_anything_is_written"
FORMS = T + "the_forms_in_which_sharded_weights_travel_have_to_be_the_same"
LISTED = T + "a_list_of_switches_is_an_ablation_and_none_is_a_run_without_one"
EACH_STEP = T + "each_step_has_the_recipe_of_its_phase_and_kept_blocks_have_none"
TWO_RUNS = T + "a_switched_run_is_two_runs_of_one_recipe_each"
STOPPED = T + "a_run_that_is_stopped_anywhere_ends_as_one_that_was_not"
SAMPLED = T + "a_sample_has_the_recipe_of_the_phase_in_which_the_checkpoint_was_written"
MOVED = T + "a_length_that_moves_the_switch_across_trained_steps_is_refused"
COMPUTES = T + "after_a_switch_a_model_computes_what_one_of_the_second_recipe_does"
SAME = T + "the_weights_stay_the_same_tensors_and_what_a_post_step_remembers_is_new"
LEFT = T + "a_layer_that_does_not_fit_leaves_all_as_they_were"

MUTANTS = [
    # ---- which step has which recipe
    Mutant("a part of a step is dropped, not rounded", FILE, "[round(share * steps), steps]",
           "[int(share * steps), steps]", ROUNDED),
    Mutant("the share is that of the second phase", FILE, "round(share * steps)",
           "round((1 - share) * steps)", ROUNDED),
    Mutant("a model at the switch is of the second phase", FILE, "if done <= phase.end",
           "if done < phase.end", ROUNDED),
    Mutant("the second row has the axes of the first", FILE,
           '{"precision": precision, **dict.fromkeys(AXES)}', '{"precision": precision}', OWN_ROW),
    Mutant("the second row has no axes of its own", FILE, "        settings[axis] = value\n", "",
           OWN_ROW),
    Mutant("a share may be 1", FILE, "check(0 < share < 1,", "check(0 < share <= 1,", REFUSED),
    Mutant("a phase may have no step", FILE, "check(phase.begin < phase.end,",
           "check(phase.begin <= phase.end,", REFUSED),
    Mutant("only the first phase is checked", FILE, "    for phase in phases:\n        check(",
           "    for phase in phases[:1]:\n        check(", REFUSED),
    Mutant("a recipe is checked as if it trained all steps", FILE,
           "cfg.shard, phase.begin, phase.end)", "cfg.shard)", REFUSED),
    Mutant("sharded weights may change their form", FILE, "not cfg.shard or len(forms) == 1",
           "True", FORMS),
    Mutant("none is a switch", FILE, 'axis == "switch" and value == "none"', "False", LISTED),
    Mutant("none is no value of any axis", FILE, 'axis == "switch" and value == "none"',
           'value == "none"', LISTED),
    Mutant("a length may move the switch", FILE, "check(min(done, before) == min(done, after),",
           "check(True,", MOVED),
    Mutant("a length may not move the switch at all", FILE,
           "check(min(done, before) == min(done, after),", "check(before == after,",
           T + "a_run_may_become_longer_as_long_as_no_trained_step_would_have_had_another_recipe"),
    Mutant("a sample is always of the first phase", FILE, "return phase_at(phases, done).cfg",
           "return phases[0].cfg", SAMPLED),
    Mutant("the label of a run leaves its switch out", "tools/run.py",
           "parts.append(f\"switch-{config['switch']}\")", "pass",
           T + "the_label_of_a_run_says_its_switch"),
    Mutant("rows with a switch are pooled with fp4's", "tools/report.py",
           '    if run.config.get("switch"):\n', "    if False:\n",
           T + "an_ablation_of_switches_is_a_table_whose_rows_are_not_pooled_with_fp4s"),

    # ---- the trainer
    Mutant("the kernels of the second phase are not loaded", "quartet.py",
           "checked(fp4.load_kernels, recipes, ", "checked(fp4.load_kernels, recipes[:1], ",
           T + "the_kernels_of_both_phases_are_loaded_at_first"),
    Mutant("kept blocks are quantised after a switch", "quartet.py",
           "model.blocks[cfg.keep_first:len(model.blocks) - cfg.keep_last]", "model.blocks",
           EACH_STEP),
    Mutant("the model keeps its first recipe", "quartet.py",
           "                        set_recipe(cfg, model, phase)\n", "", EACH_STEP),
    Mutant("a checkpoint is put into a model of the first phase", "quartet.py",
           '    set_recipe(cfg, model, schedule.phase_at(phases, len(state["history"])))\n', "",
           STOPPED + "[deosc-after-6]"),
    Mutant("a checkpoint is put into a model of the second phase", "quartet.py",
           'set_recipe(cfg, model, schedule.phase_at(phases, len(state["history"])))',
           "set_recipe(cfg, model, phases[-1])", STOPPED + "[deosc-before-4]"),
    Mutant("a phase that is over is begun once more", "quartet.py",
           "                    if len(history) < phase.end:\n", "                    if True:\n",
           STOPPED + "[deosc-after-6]"),
    Mutant("the learning rate falls in each phase", "quartet.py",
           "    steps = phase.steps\n", "    steps = phase.end\n", TWO_RUNS),

    # ---- the model
    Mutant("a layer that does not fit is found when others have changed",
           "fp4/whole_model.py",
           "        row.check_features(layer.in_features, layer.out_features)\n"
           "        check(not stored", "        check(not stored", LEFT),
    Mutant("a layer that has the recipe forgets its state", "fp4/whole_model.py",
           "for layer, row in rows.items() if layer.recipe != row}",
           "for layer, row in rows.items()}", SAME),
    Mutant("a down projection has the row of the others after a switch", "fp4/whole_model.py",
           "{layer: recipe.down if layer.is_down else recipe for", "{layer: recipe for", COMPUTES),
    Mutant("what an earlier post_step remembers stays", "fp4/post_step.py",
           "        layer._buffers.pop(buffer, None)\n", "        pass\n", SAME),
    Mutant("a layer keeps its backend", "fp4/linear.py",
           "        self.backend = emulate.load_kernels([recipe], backend=backend)\n",
           '        if not hasattr(self, "backend"):\n'
           "            self.backend = emulate.load_kernels([recipe], backend=backend)\n",
           SAME),
    Mutant("a layer does not know that the kernels compute it", "fp4/linear.py",
           "        self.has_kernels = recipe.has_kernels ",
           '        self.has_kernels = getattr(self, "has_kernels", recipe.has_kernels) ',
           COMPUTES),
    Mutant("what changes nothing has a name of its own", "tools/schedule.py",
           "        cfg = without_needless_axes(cfg)\n", "",
           "tests/test_schedule.py::test_an_axis_that_leaves_the_row_as_it_is_makes_no_other_run"),
]
