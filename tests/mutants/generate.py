"""Faults in sampling, and the tests that notice them."""
from tools.mutants import Mutant

FILE = "tools/generate.py"
TESTS = "tests/test_generate.py::test_"
DRAWN = TESTS + "tokens_are_drawn_from_the_softmax_of_the_logits_over_the_temperature"
LIKELY = TESTS + "only_the_most_likely_tokens_are_drawn_and_each_of_them_is"
FEWEST = TESTS + "only_the_fewest_tokens_that_have_the_probability_are_drawn"
AMONG = TESTS + "the_probability_is_that_among_the_top_k_at_the_temperature"
FINITE = TESTS + "a_number_that_is_not_finite_is_refused"
REPEATS = TESTS + "a_sample_repeats_with_its_generator"
SHOWN = TESTS + "a_step_is_shown_the_new_token_and_beyond_a_block_the_last_block"
GREEDY = TESTS + "the_most_likely_continuation_is_that_of_a_llama_written_out"
CACHED = TESTS + ("cached_logits_are_the_uncached_ones_where_tokens_are_quantised_by_themselves"
                  "[bf16]")
LENGTHS = TESTS + "prompts_of_several_lengths_give_each_the_logits_that_it_has_alone"
ALONE = TESTS + "prompts_of_several_lengths_are_continued_as_each_alone"
ROOM = TESTS + "a_short_text_needs_no_room_for_a_whole_block"
SAMPLE = TESTS + "a_sample_is_the_prompt_and_what_the_seeds_generator_draws"
FLAGS = TESTS + "the_flags_of_sampling_are_its_defaults_and_are_heard"
LINES = TESTS + "each_line_of_the_input_is_continued_as_it_is_alone"
FROM_CHECKPOINT = "tests/test_train.py::test_a_sample_comes_from_the_checkpoint_and_repeats"

MUTANTS = [
    # How a token is drawn
    Mutant("logits are multiplied by the temperature", FILE,
           ".double() / (temperature or 1)", ".double() * (temperature or 1)", DRAWN),
    Mutant("the temperature is 1", FILE,
           ".double() / (temperature or 1)", ".double()", DRAWN),
    Mutant("a tiny temperature becomes 0", FILE,
           "(values - values[:, :1]).double() /", "(values - values[:, :1]) /", LIKELY),
    Mutant("a tiny temperature makes logits infinite", FILE,
           "(values - values[:, :1]).double()", "values.double()", LIKELY),
    Mutant("a temperature of 0 is one of 1", FILE,
           "n_likely = 1 if temperature == 0 else min(", "n_likely = min(", LIKELY),
    Mutant("every token may be drawn", FILE,
           "min(top_k or logits.shape[1], logits.shape[1])", "logits.shape[1]", LIKELY),
    Mutant("one token more may be drawn", FILE,
           "min(top_k or logits.shape[1],", "min(top_k + 1 or logits.shape[1],", LIKELY),
    Mutant("a top_k of 0 allows one token", FILE,
           "min(top_k or logits.shape[1],", "min(top_k or 1,", LIKELY),
    Mutant("the least likely tokens are drawn", FILE,
           "logits.topk(n_likely)", "logits.topk(n_likely, largest=False)", LIKELY),
    Mutant("the rank of a token is taken for the token", FILE,
           "tokens.gather(1, torch.cat(choices))[:, 0]", "torch.cat(choices)[:, 0]", GREEDY),
    Mutant("the token that reaches top_p is left out", FILE,
           "of_likelier = probability.cumsum(-1) - probability",
           "of_likelier = probability.cumsum(-1)", FEWEST),
    Mutant("a top_p of 0 leaves nothing", FILE,
           "        is_left_out[:, 0] = False                       "
           "# The likeliest is always there.\n", "", FEWEST),
    Mutant("top_p is not heard", FILE, "if top_p < 1:", "if top_p < 0:", FEWEST),
    Mutant("top_p is of all tokens", FILE,
           "probability = scaled.softmax(-1)",
           "probability = (values - logits.logsumexp(-1, True)).double().exp()", AMONG),
    Mutant("every text is drawn with the first generator", FILE,
           "1, generator=generator)", "1, generator=generators[0])", ALONE),
    Mutant("the generator is not used", FILE,
           "1, generator=generator)", "1)", REPEATS),
    Mutant("logits that are not finite are not looked at", FILE,
           "if not values.isfinite().all():", "if not tokens.isfinite().all():", FINITE),
    Mutant("only the first text is looked at", FILE,
           "if not values.isfinite().all():", "if not values[0].isfinite().all():", FINITE),

    # The cache
    Mutant("the first block of a long text is shown", FILE,
           "text[-self.model.config.block_size:] for", "text[:self.model.config.block_size] for",
           SHOWN),
    Mutant("a text that is too long is not shown as a whole again", FILE,
           "or longest > len(self.columns):", "or longest > len(self.columns) + 1:", SHOWN),
    Mutant("each step shows everything again", FILE,
           "if self.caches is None or longest > len(self.columns):", "if True:", SHOWN),
    Mutant("a new token stands in the next column", FILE,
           "self.columns[longest - 1:longest]", "self.columns[longest % 24:][:1]", CACHED),
    Mutant("padding is on the right", FILE,
           "[0] * n + window for", "window + [0] * n for", LENGTHS),
    Mutant("the positions of a short text begin behind its padding", FILE,
           "position = (columns - self.padding).clamp_min(0)",
           "position = columns.expand(len(idx), -1)",
           survives="rotary embedding sees distances only, so that the logits are the same"),
    Mutant("padding is seen", FILE,
           "(self.columns <= columns[:, None]) & (self.columns >= self.padding[..., None])",
           "(self.columns <= columns[:, None]) & (self.columns >= 0 * self.padding[..., None])",
           LENGTHS),
    Mutant("a token sees those after it", FILE,
           "(self.columns <= columns[:, None]) &", "(self.columns <= columns[-1]) &", CACHED),
    Mutant("a token does not see itself", FILE,
           "(self.columns <= columns[:, None]) &", "(self.columns < columns[:, None]) &",
           survives="what sees nothing sees itself: the next line lets every token see itself"),
    Mutant("padding sees nothing", FILE,
           "mask = is_visible | (self.columns == columns[:, None])", "mask = is_visible",
           survives="this torch gives zeros, and not NaN, where nothing is seen"),
    Mutant("the cache keeps keys for values", FILE,
           "self.values.index_copy_(2, self.columns, v)",
           "self.values.index_copy_(2, self.columns, k)", CACHED),
    Mutant("the logits are those after the first token", FILE,
           "self.model.predict(x[:, -1:], None)", "self.model.predict(x[:, :1], None)", CACHED),
    Mutant("a cache has room for a block whatever is asked", FILE,
           "[Cache(len(self.columns)) for", "[Cache(self.model.config.block_size) for", ROOM),

    # A text and a checkpoint
    Mutant("a sample does not depend on the seed", FILE,
           "torch.Generator(cfg.device).manual_seed(cfg.seed)",
           "torch.Generator(cfg.device).manual_seed(0)", SAMPLE),
    Mutant("the texts share a generator", FILE,
           "generators = [torch.Generator(cfg.device).manual_seed(cfg.seed) for _ in some]",
           "generators = [torch.Generator(cfg.device).manual_seed(cfg.seed)] * len(some)", LINES),
    Mutant("a sample has the length of its default", FILE,
           "some, cfg.sample_tokens,", "some, 200,", SAMPLE),
    Mutant("temperature and top_p are exchanged", FILE,
           "Sampling(cfg.temperature, cfg.top_k, cfg.top_p)",
           "Sampling(cfg.top_p, cfg.top_k, cfg.temperature)", FLAGS),
    Mutant("only the first texts are continued", FILE,
           "range(0, len(prompts), TEXTS_AT_A_TIME)", "range(0, 1, TEXTS_AT_A_TIME)", LINES),
    Mutant("a hyphen is a text", FILE, 'if cfg.sample == "-" else', 'if False else', LINES),
    Mutant("a sample is of the weights before training", FILE,
           "        checkpoint.restore_model(state, model)\n", "", FROM_CHECKPOINT),
]
