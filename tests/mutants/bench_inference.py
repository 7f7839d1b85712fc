"""Faults in the table of inference, and the tests that notice them."""
from tools.mutants import Mutant

FILE = "tools/bench_inference.py"
TESTS = "tests/test_bench_inference.py::test_"
STEPS = TESTS + "prefill_and_decode_are_the_steps_of_a_text"
ROW = TESTS + "each_row_has_its_tokens_a_second_its_ratios_and_its_memory"
RATE = TESTS + "a_product_s_rate_counts_the_bytes_of_the_packed_weight"

MUTANTS = [
    Mutant("decode writes over the last token of the prompt", FILE,
           "columns[PROMPT:PROMPT + 1]", "columns[PROMPT - 1:PROMPT]", STEPS),
    Mutant("prefill leaves the last token out", FILE,
           "decoder.step, prompt, columns[:PROMPT])",
           "decoder.step, prompt[:, :-1], columns[:PROMPT - 1])", STEPS),
    Mutant("prefill counts one token", FILE,
           "1000 * PROMPT / entry['prefill_ms']", "1000 / entry['prefill_ms']", ROW),
    Mutant("the peak has what other rows hold", FILE,
           "torch.cuda.max_memory_allocated() - before", "torch.cuda.max_memory_allocated()", ROW),
    Mutant("prefill's ratio is decode's", FILE,
           'ratio_to_bf16(entry, base, "prefill_")', "ratio_to_bf16(entry, base)", ROW),
    Mutant("a weight takes half a byte", FILE, "BYTES_PER_WEIGHT = 17 / 32",
           "BYTES_PER_WEIGHT = 1 / 2", RATE),
    Mutant("a copy reads only", FILE, '"copy": 2 * source.numel()', '"copy": source.numel()', RATE),
]
