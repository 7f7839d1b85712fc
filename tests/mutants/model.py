"""Faults in the model, and the tests that notice them."""
from tools.mutants import Mutant

TESTS = "tests/test_model.py::test_"
LOGITS = TESTS + "the_logits_are_those_of_a_llama_written_out"
LOSS = TESTS + "loss_and_gradients_are_those_of_a_llama_written_out"
ATTENTION = TESTS + "attention_turns_queries_and_keys_and_sees_distances_only"
ROPE = TESTS + "pairs_of_neighbours_turn_as_complex_numbers_do_at_theta_10000"
NORM = TESTS + ("a_norm_of_tiny_and_of_huge_values_is_divided_by_the_root_of_mean_square"
                "_plus_1e_5")
ROUNDED_ONCE = TESTS + "bfloat16_is_normed_and_turned_in_float32_and_rounded_once"
MLP = TESTS + "the_feed_forward_layer_gates_with_its_first_half"
KEPT = TESTS + ("four_layers_of_each_block_are_quantised_but_for_the_blocks_that_are_kept")
DTYPES = TESTS + "activations_have_the_dtype_that_is_given_and_weights_and_logits_are_float32"
FIRST_WEIGHTS = TESTS + "each_parameter_has_its_standard_deviation_and_is_drawn_for_itself"
SIZES = TESTS + "each_size_of_the_paper_has_its_layers_learning_rate_and_batch"
OPERATIONS = TESTS + ("the_operations_of_a_step_are_those_that_torch_counts_in_a_llama"
                      "_written_out")
N_PARAMS = "tests/test_train.py::test_each_size_has_the_papers_number_of_parameters"

MUTANTS = [
    # Sizes
    Mutant("the width of the feed-forward layer is rounded down", "model.py",
           "256 * -(-int(8 * n_embd / 3) // 256)", "256 * (int(8 * n_embd / 3) // 256)", SIZES),
    Mutant("the feed-forward layer is 4 times as wide as the model", "model.py",
           "-(-int(8 * n_embd / 3) // 256)", "-(-int(4 * n_embd) // 256)", SIZES),
    Mutant("the number of parameters leaves the norms out", "model.py",
           "n_layer * (attention + feed_forward + norms) + n_embd",
           "n_layer * (attention + feed_forward)", N_PARAMS + "[30M]"),
    Mutant("the operations of attention are those of the forward pass and half the backward one",
           "model.py", "12 * self.n_layer", "6 * self.n_layer", OPERATIONS),
    Mutant("the operations leave the output head out", "model.py",
           "weights = self.n_params + self.vocab_size * self.n_embd", "weights = self.n_params",
           OPERATIONS),
    Mutant("the operations count the embedding as a product", "model.py",
           "self.n_params + self.vocab_size", "self.n_params + 2 * self.vocab_size", OPERATIONS),
    Mutant("the learning rate of 30M is ten times the paper's", "model.py",
           "Preset(6, 640, 5, lr=1.2e-3)", "Preset(6, 640, 5, lr=1.2e-2)", SIZES),
    Mutant("the learning rate of 100M is that of the second paper", "model.py",
           "Preset(8, 1024, 8, lr=6e-4)", "Preset(8, 1024, 8, lr=9e-4)", SIZES),
    Mutant("a head of 50M has 64 channels", "model.py",
           "Preset(7, 768, 6", "Preset(7, 768, 12", SIZES),
    Mutant("a step has 256 sequences by default", "model.py",
           "batch: int = 512 ", "batch: int = 256 ", SIZES),
    Mutant("a run has 20 tokens per parameter by default", "model.py",
           "tokens_per_param: float | None = 25", "tokens_per_param: float | None = 20", SIZES),
    Mutant("the model is made for the preset's own length of sequences", "model.py",
           "vocab_size, block_size)\n\n\n# tiny", "vocab_size, self.seq)\n\n\n# tiny", SIZES),

    # Norms
    Mutant("the epsilon of the norms is 1e-2", "model.py", "EPS = 1e-5", "EPS = 1e-2", NORM),
    Mutant("the epsilon of the norms is 1e-6", "model.py", "EPS = 1e-5", "EPS = 1e-6", NORM),
    Mutant("the norm divides by the root of the sum", "model.py",
           "y.square().mean(-1, keepdim=True)", "y.square().sum(-1, keepdim=True)", NORM),
    Mutant("the norm divides by the standard deviation", "model.py",
           "y.square().mean(-1, keepdim=True)", "y.var(-1, keepdim=True, correction=0)", NORM),
    Mutant("the norm has no scales", "model.py",
           "return (y * self.weight).to(x.dtype)", "return y.to(x.dtype)", NORM),
    Mutant("the norm is computed in the activations' dtype", "model.py",
           "y = x.float()\n", "y = x\n", ROUNDED_ONCE),
    Mutant("the normed values are rounded before they are scaled", "model.py",
           "(y * self.weight).to(x.dtype)", "y.to(x.dtype) * self.weight.to(x.dtype)",
           ROUNDED_ONCE),

    # Rotary embedding
    Mutant("the keys are not rotated", "model.py", "k = rope(k, cos, sin)", "k = k", ATTENTION),
    Mutant("the queries are not rotated", "model.py", "q = rope(q, cos, sin)", "q = q", ATTENTION),
    Mutant("the values are rotated, and not the queries", "model.py",
           "q = rope(q, cos, sin)", "v = rope(v, cos, sin)", LOGITS),
    Mutant("the pairs are the channels i and i + D/2", "model.py",
           "x.float().unflatten(-1, (-1, 2)).unbind(-1)", "x.float().chunk(2, -1)", ROPE),
    Mutant("the pairs are turned the other way", "model.py",
           "a * cos - b * sin, a * sin + b * cos", "a * cos + b * sin, b * cos - a * sin", ROPE),
    Mutant("theta is 100", "model.py", "THETA = 10000.0", "THETA = 100.0", ROPE),
    Mutant("theta is Llama 3's", "model.py", "THETA = 10000.0", "THETA = 500000.0", LOGITS),
    Mutant("the exponent of a frequency is half as large", "model.py",
           "(-torch.arange(0, D, 2) / D)", "(-torch.arange(0, D // 2) / D)", ROPE),
    Mutant("the pairs are turned in the activations' dtype", "model.py",
           "a, b = x.float().unflatten(-1, (-1, 2)).unbind(-1)",
           "a, b = x.unflatten(-1, (-1, 2)).unbind(-1)\n"
           "    cos, sin = cos.to(x.dtype), sin.to(x.dtype)", ROUNDED_ONCE),

    # Attention, feed-forward layer, block
    Mutant("attention is not causal", "model.py", "is_causal=True", "is_causal=False", LOGITS),
    Mutant("keys and values are taken for each other", "model.py",
           "q, k, v = qkv.permute", "q, v, k = qkv.permute", LOGITS),
    Mutant("the three parts of qkv lie within each head", "model.py",
           "view(B, T, 3, self.n_head, -1)\n        q, k, v = qkv.permute(2, 0, 3, 1, 4)",
           "view(B, T, self.n_head, 3, -1)\n        q, k, v = qkv.permute(3, 0, 2, 1, 4)",
           ATTENTION),
    Mutant("the heads' channels are mixed before the projection", "model.py",
           "y.transpose(1, 2).reshape(B, T, C)", "y.transpose(1, 3).reshape(B, T, C)", ATTENTION),
    Mutant("attention is not scaled by the size of a head but of the model", "model.py",
           "is_causal=True)", "is_causal=True, scale=C ** -0.5)", ATTENTION),
    Mutant("silu is applied to up", "model.py",
           "F.silu(gate) * up", "gate * F.silu(up)", MLP),
    Mutant("the gate goes through gelu", "model.py", "F.silu(gate)", "F.gelu(gate)", MLP),
    Mutant("gate and up alternate", "model.py",
           "self.gate_up(x).chunk(2, dim=-1)", "self.gate_up(x).unflatten(-1, (-1, 2)).unbind(-1)",
           MLP),
    Mutant("the feed-forward layer reads what attention read", "model.py",
           "x = x + self.attention(self.norm1(x), cos, sin, cache)\n"
           "        return x + self.mlp(self.norm2(x))",
           "return x + self.attention(self.norm1(x), cos, sin, cache) + "
           "self.mlp(self.norm2(x))", LOGITS),
    Mutant("a block uses its first norm twice", "model.py",
           "self.mlp(self.norm2(x))", "self.mlp(self.norm1(x))", LOGITS),
    Mutant("the feed-forward layer's input is not normed", "model.py",
           "self.mlp(self.norm2(x))", "self.mlp(x)", LOGITS),
    Mutant("the residual stream is normed", "model.py",
           "return x + self.mlp(self.norm2(x))", "return self.norm2(x) + self.mlp(self.norm2(x))",
           LOGITS),

    # The model
    Mutant("one block more is kept at the beginning", "model.py",
           "i < keep_first or", "i <= keep_first or", KEPT),
    Mutant("one block fewer is kept at the end", "model.py",
           "i >= config.n_layer - keep_last", "i > config.n_layer - keep_last", KEPT),
    Mutant("what is kept is quantised, and the rest is not", "model.py",
           "unquantized if is_kept else quantized", "quantized if is_kept else unquantized", KEPT),
    Mutant("the last norm is left out", "model.py",
           "x = self.norm(x)\n", "x = x * 1\n", LOGITS),
    Mutant("the head shares the embedding's weights", "model.py",
           "weight = self.head.weight", "weight = self.embed.weight", LOGITS),
    Mutant("the projections that end a sum begin as large as the others", "model.py",
           "std /= (2 * self.config.n_layer) ** 0.5", "std /= 1", FIRST_WEIGHTS),
    Mutant("the first projections are for one sum a block", "model.py",
           "std /= (2 * self.config.n_layer) ** 0.5", "std /= self.config.n_layer ** 0.5",
           FIRST_WEIGHTS),
    Mutant("only attention's projection begins smaller", "model.py",
           'name.endswith("proj.weight")', 'name.endswith("attention.proj.weight")',
           FIRST_WEIGHTS),
    Mutant("the first weights have the standard deviation of torch's embedding", "model.py",
           "std = 0.02\n", "std = 1.0\n", FIRST_WEIGHTS),
    Mutant("the first weights are uniform", "model.py",
           "nn.init.normal_(parameter, std=std)",
           "nn.init.uniform_(parameter, -std * 3 ** 0.5, std * 3 ** 0.5)", FIRST_WEIGHTS),
    Mutant("activations are float32 whatever was asked for", "model.py",
           "x = self.embed(idx).to(self.dtype)", "x = self.embed(idx)", DTYPES),
    Mutant("logits have the activations' dtype", "model.py",
           "weight.to(x.dtype)).float()", "weight.to(x.dtype))", DTYPES),
]
