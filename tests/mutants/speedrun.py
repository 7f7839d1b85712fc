"""Faults in the speedrun, and the tests that notice them."""
from tools.mutants import Mutant

FILE = "tools/speedrun.py"
T = "tests/test_speedrun.py::test_"
CLOCK = T + "the_clock_stops_at_the_first_evaluation_at_or_below_the_target"
WARM = T + "steps_that_compile_count_as_the_median_of_the_others"
BITS = T + "every_product_has_to_be_in_4_bits"
REFUSED = T + "what_is_not_the_task_is_refused_before_anything_is_trained"
ROW = T + "a_run_is_timed_printed_and_its_row_added_in_order"
NO_ROW = T + "without_a_target_or_without_reaching_it_there_is_no_row"
COMMIT = T + "a_record_needs_a_commit"

MUTANTS = [
    Mutant("the target has to be passed", FILE, "row.bpb <= target", "row.bpb < target", CLOCK),
    Mutant("loss and bits per byte are taken for each other", FILE,
           "row.bpb is not None and row.bpb <= target", "row.val is not None and row.val <= target",
           CLOCK),
    Mutant("the clock stops a step early", FILE, "return run.history[:number]",
           "return run.history[:number - 1]", CLOCK),
    Mutant("compilation counts", FILE, "typical if row.step in warming else row.ms", "row.ms",
           WARM),
    Mutant("compilation is left out", FILE, "typical if row.step in warming", "0 if row.step in "
           "warming", WARM),
    Mutant("only the first step compiles", FILE, "range(1, WARM_UP + 1)", "range(1, WARM_UP)",
           WARM),
    Mutant("compilation after a switch counts", FILE, "{0, *switches, *(", "{0, *(", WARM),
    Mutant("compilation after a resume counts", FILE,
           '{0, *switches, *(entry["step"] for entry in run.resumed)}', "{0, *switches}", WARM),
    Mutant("an unquantised product is let through", FILE,
           "return spec is not None and {", "return spec is None or {", BITS),
    Mutant("8 bits are let through", FILE,
           "{spec.left.format, spec.right.format} <= set(FOUR_BITS)", "True", BITS),
    Mutant("only the left operand is looked at", FILE, "{spec.left.format, spec.right.format}",
           "{spec.left.format}", BITS),
    Mutant("down projections may have another input", FILE, "in (recipe, recipe.down))",
           "in (recipe,))", BITS),
    Mutant("any method is let through", FILE, "recipe.method.endswith(FOUR_BITS_METHODS)", "True",
           BITS),
    Mutant("only the first phase is looked at", FILE, "in schedule.recipes_of(cfg):",
           "in schedule.recipes_of(cfg)[:1]:", REFUSED),
    Mutant("the task may be changed", FILE, "    check(not fixed,", "    check(True,", REFUSED),
    Mutant("several recipes race", FILE, "check(len(configs) == 1,", "check(configs,", REFUSED),
    Mutant("records are in the order in which they were made", FILE, ", key=seconds_in)",
           ", key=lambda line: 0)", ROW),
    Mutant("a record is the only one", FILE, "sorted([*records(read_text(README)), ", "sorted([",
           ROW),
    Mutant("the log is not kept", FILE, "    shutil.copyfile(path, kept)\n", "", ROW),
    Mutant("a run that did not reach the target has a row", FILE, "    check(rows, f",
           "    rows = rows or run.history\n    check(rows, f", NO_ROW),
    Mutant("code that nobody else has makes a record", FILE,
           '"-dirty" not in run.commit and run.commit != "unknown"', "True", COMMIT),
]
