"""Faults in the comparison with torchao, and the tests that notice them."""
from tools.mutants import Mutant

OTHERS = "tools/bench_others.py"
T = "tests/test_bench_others.py::"
LAYERS = T + "test_every_row_has_the_layer_that_it_names_and_all_weights_but_ours_are_bf16"
SHARES = T + "test_a_shape_has_bf16_s_time_and_each_row_s_share_of_it_in_the_same_rounds"
WITHOUT = T + "test_without_torchao_a_sentence_says_so_and_ours_are_measured"

MUTANTS = [
    Mutant("rowwise is measured in the place of the recipe with dw in BF16", OTHERS,
           '"rowwise_with_gw_hp"', '"rowwise"', LAYERS),
    Mutant("every row of torchao is tensorwise", OTHERS,
           "config=config)[0]", "config=Float8LinearConfig.from_recipe_name('tensorwise'))[0]",
           LAYERS),
    Mutant("the weights of the others are float32", OTHERS,
           'device="cuda", dtype=torch.bfloat16)', 'device="cuda")', LAYERS),
    Mutant("out- and in-features are swapped", OTHERS,
           "torch.nn.Linear(K, N, bias=False", "torch.nn.Linear(N, K, bias=False", LAYERS),
    Mutant("a layer is called and waits for the host", OTHERS,
           "bench.burst(bench.captured(passes_of_all), len(pairs))",
           "bench.burst(passes_of_all, len(pairs))",
           T + "test_both_passes_of_a_layer_are_replayed_and_not_called"),
    Mutant("a recipe that does not run here ends the program", OTHERS,
           "except Exception as error:", "except KeyError as error:",
           T + "test_a_recipe_of_torchao_s_that_does_not_run_here_is_named_and_the_others_are_"
               "measured"),
    Mutant("torchao has to be there", OTHERS,
           "    except ImportError:", "    except KeyError:", WITHOUT),
    Mutant("nothing is said where torchao is not installed", OTHERS,
           'return [], ["torchao is not installed: `pip install torchao`"]', "return [], []",
           WITHOUT),
    Mutant("the sum is of the bench's own shapes", OTHERS,
           "for shape in BLOCK]", "for shape in SHAPES]", SHARES),
    Mutant("a layer that did not fit counts as nothing in the sum", OTHERS,
           "return None if None in times else sum(times)", "return sum(filter(None, times))",
           T + "test_what_does_not_fit_into_memory_has_no_ratio_and_no_sum"),
    Mutant("the ratio is one of medians", OTHERS,
           'ratio_to_bf16(of_row[row], of_row["bf16"])',
           'ratio(of_row[row].get("ms"), of_row["bf16"].get("ms"))', SHARES),
    Mutant("the README is rewritten unasked", OTHERS,
           "    if args.write:\n", "    if True:\n", WITHOUT),
]
