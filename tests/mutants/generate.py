"""Faults in sampling, and the tests that notice them."""
from tools.mutants import Mutant

FILE = "tools/generate.py"
TESTS = "tests/test_generate.py::test_"
DRAWN = TESTS + "tokens_are_drawn_from_the_softmax_of_the_logits_over_the_temperature"
LIKELY = TESTS + "only_the_most_likely_tokens_are_drawn_and_each_of_them_is"
REPEATS = TESTS + "a_sample_is_shown_the_last_block_and_repeats_with_its_generator"
GREEDY = TESTS + "the_most_likely_continuation_is_that_of_a_llama_written_out"
SAMPLE = TESTS + "a_sample_is_the_prompt_and_what_the_seeds_generator_draws"
NOT_FINITE = "tests/test_survival.py::test_a_model_whose_logits_are_not_finite_ends_no_run"
FROM_CHECKPOINT = "tests/test_train.py::test_a_sample_comes_from_the_checkpoint_and_repeats"

MUTANTS = [
    # One token after the other
    Mutant("logits are multiplied by the temperature", FILE,
           "[:, -1] / temperature", "[:, -1] * temperature", DRAWN),
    Mutant("the temperature is 1 by default", FILE,
           "temperature=0.8", "temperature=1.0", DRAWN),
    Mutant("the temperature divides probabilities", FILE,
           "[:, -1] / temperature", "[:, -1]", DRAWN),
    Mutant("every token may be drawn", FILE,
           "logits.topk(min(top_k, logits.shape[-1]))", "logits.topk(logits.shape[-1])", LIKELY),
    Mutant("one token more may be drawn", FILE,
           "min(top_k, logits.shape[-1])", "min(top_k + 1, logits.shape[-1])", LIKELY),
    Mutant("the least likely tokens are drawn", FILE,
           "logits.topk(min(top_k, logits.shape[-1]))",
           "logits.topk(min(top_k, logits.shape[-1]), largest=False)", LIKELY),
    Mutant("the rank of a token is taken for the token", FILE,
           "tokens.gather(-1, choice)", "choice", GREEDY),
    Mutant("the first block of a long text is shown", FILE,
           "idx[:, -model.config.block_size:]", "idx[:, :model.config.block_size]", REPEATS),
    Mutant("the text is shown without its last token", FILE,
           "idx[:, -model.config.block_size:]", "idx[:, -model.config.block_size:-1]",
           REPEATS),
    Mutant("the next token is that of the text's beginning", FILE,
           "logits = model(context)[:, -1]", "logits = model(context)[:, 0]", GREEDY),
    Mutant("the generator is not used", FILE,
           "1, generator=generator)", "1)", REPEATS),
    Mutant("logits that are not finite are not looked at", FILE,
           "if not values.isfinite().all():", "if not tokens.isfinite().all():", NOT_FINITE),

    # A text and a checkpoint
    Mutant("a sample does not depend on the seed", FILE,
           "torch.Generator(cfg.device).manual_seed(cfg.seed)",
           "torch.Generator(cfg.device).manual_seed(0)", SAMPLE),
    Mutant("a sample is drawn by the generator of everything", FILE,
           "cfg.sample_tokens, generator=generator)", "cfg.sample_tokens)", SAMPLE),
    Mutant("a sample has the length of its default", FILE,
           "generate, model, ids, cfg.sample_tokens,", "generate, model, ids, 200,", SAMPLE),
    Mutant("a sample leaves its beginning out", FILE,
           "vocabulary.decode(ids[0].tolist())",
           "vocabulary.decode(ids[0, len(vocabulary.encode(text)):].tolist())",
           SAMPLE),
    Mutant("a sample is of the weights before training", FILE,
           "        checkpoint.restore_model(state, model)\n", "",
           FROM_CHECKPOINT),
]
