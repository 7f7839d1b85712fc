"""Faults in the output head with its loss, and the tests that notice them."""
from tools.mutants import Mutant

LOSS = "tests/test_cross_entropy.py::test_"
WHOLE = LOSS + "loss_and_gradients_are_those_of_the_whole_logits"
SKIPPED = LOSS + "a_token_that_does_not_count_gets_no_gradient"
FILE = "fp4/cross_entropy.py"

MUTANTS = [
    Mutant("targets that do not count are in the denominator", FILE,
           "n_counted = is_counted.sum()", "n_counted = len(x)", WHOLE),
    Mutant("targets that do not count have a gradient", FILE,
           "(dlogits @ w) * is_counted[part]", "dlogits @ w", SKIPPED),
    Mutant("tokens that do not count change the weight", FILE,
           "dlogits.T @ (x[part] * is_counted[part])", "dlogits.T @ x[part]", WHOLE),
    Mutant("the gradient of the weight is that of the last chunk", FILE,
           "dw += dlogits.T", "dw = dlogits.T", WHOLE),
    Mutant("the loss is that of the last chunk", FILE,
           "loss = loss + F.nll_loss", "loss = F.nll_loss", WHOLE),
    Mutant("the last chunk is left out", FILE,
           "range(0, n, size)", "range(0, n - size + 1, size)", WHOLE),
    Mutant("all tokens are one chunk", FILE,
           "size = max(1, size)", "size = n",
           LOSS + "no_piece_of_logits_is_larger_than_a_chunk"),
    Mutant("a chunk may be of no token", FILE,
           "size = max(1, size)", "size = max(0, size)", WHOLE),
    Mutant("the gradient does not depend on what follows the loss", FILE,
           "scale = dloss / n_counted", "scale = 1 / n_counted", WHOLE),
    Mutant("the target's own logit is not pulled up", FILE,
           ".sub_(one_hot(targets[part], len(w)))", "", WHOLE),
    Mutant("logits are in float32 whatever the activations are", FILE,
           "w = weight.to(x.dtype)", "w = weight",
           LOSS + "in_bfloat16_it_is_as_near_to_the_truth_as_torch"),
]
