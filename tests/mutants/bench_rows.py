"""Faults in the table of all rows, and the tests that notice them."""
from tools.mutants import Mutant

ROWS = "tools/bench_rows.py"
T = "tests/test_bench_rows.py::"
TIMES = T + "test_a_row_has_its_time_beside_bf16_its_memory_and_the_seconds_until_its_first_step"
CACHE = T + "test_the_rows_share_the_cores_and_each_compiles_with_an_empty_cache"
MEMORY = T + "test_a_row_that_waits_leaves_its_activations_memory_to_others"
FAILS = T + "test_a_row_that_fails_is_a_line_and_the_others_have_their_times"
IN_TURN = T + "test_a_row_that_fails_in_its_turn_is_left_out_and_the_others_begin_again"
KILLED = T + "test_a_real_process_says_why_it_fails_and_is_killed_when_it_takes_too_long"
GROUPS = T + "test_every_row_and_variant_is_in_one_group_and_bf16_in_all"
CROWDED = T + ("test_bf16_is_reported_as_in_its_first_group_and_a_row_that_was_crowded_out_is_"
               "tried_again")
LINES = T + "test_a_row_has_a_line_whatever_becomes_of_it"

MUTANTS = [
    Mutant("the compiler finds what an earlier run has left", ROWS,
           '    os.environ["TORCHINDUCTOR_CACHE_DIR"] = folder\n', "", CACHE),
    Mutant("the rows of a group share a cache", ROWS,
           "folder = tempfile.mkdtemp(dir=cache)", "folder = cache", CACHE),
    Mutant("Triton's kernels come from an earlier run", ROWS,
           '    os.environ["TRITON_CACHE_DIR"] = os.path.join(folder, "triton")\n', "", CACHE),
    Mutant("each row compiles with all cores", ROWS,
           "os.cpu_count() // len(rows)", "os.cpu_count()", CACHE),
    Mutant("a row that waits keeps its activations' memory", ROWS,
           "    times = bench.time_step()\n    torch.cuda.empty_cache()\n",
           "    times = bench.time_step()\n", MEMORY),
    Mutant("a timed step takes its memory from the GPU", ROWS,
           "    bench.Held.step()\n    times", "    times", MEMORY),
    Mutant("an error of one row ends the program", ROWS,
           "except Exception as error:", "except KeyError as error:", FAILS),
    Mutant("a row that fails in its turn ends the program", ROWS,
           "        except RowFailed as failure:", "        except KeyError as failure:", IN_TURN),
    Mutant("a row that failed in its turn takes further turns", ROWS,
           'if "first_s" in entry and "failed" not in entry}', 'if "first_s" in entry}', IN_TURN),
    Mutant("a process that takes too long lives on", ROWS,
           "            os.kill(self.id.result(), signal.SIGKILL)\n", "", KILLED),
    Mutant("a process that has died ends the program", ROWS,
           "except BrokenProcessPool:", "except KeyError:", KILLED),
    Mutant("each row may take as long as all others together", ROWS,
           "deadline - time.monotonic())", "PATIENCE)",
           T + "test_rows_wait_together_and_not_one_after_the_other"),
    Mutant("bf16 takes no turns in the second group", ROWS,
           'yield ["bf16", *group]', "yield group", GROUPS),
    Mutant("more rows are together than fit into memory", ROWS,
           "int(memory // GIB_OF_A_ROW)", "int(memory)", GROUPS),
    Mutant("a row that was crowded out is not tried again", ROWS,
           "if found[row] == {}]", "if found[row] is None]", CROWDED),
    Mutant("a row that failed is out of memory", ROWS,
           'time_or_why = "failed" if "failed" in entry else', "time_or_why =", LINES),
    Mutant("the first step is not timed, but the ones after it", "tools/bench.py",
           "    step()\n    torch.cuda.synchronize()\n    seconds", "    seconds", TIMES),
    Mutant("the flags of a row are ignored", "tools/bench.py",
           "fp4.recipe(precision, **axes)", "fp4.recipe(precision)",
           T + "test_the_variants_are_those_of_the_command_line"),
    Mutant("a README without markers is overwritten with nothing said", "tools/markdown.py",
           '        raise UserError(f"{os.path.basename(path)} is as it was, because {error}")',
           "        pass", T + "test_without_a_gpu_or_markers_a_sentence_says_so"),
]
