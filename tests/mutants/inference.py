"""Faults in packed inference, and the tests that notice them."""
from tools.mutants import Mutant

FILE = "fp4/inference.py"
TESTS = "tests/test_inference.py::test_"
SAME = TESTS + "the_logits_are_those_of_the_model_that_was_trained_to_the_last_byte"
FP4 = SAME + "[fp4-{}-torch.float32]"
MEMORY = TESTS + "the_weights_of_the_blocks_take_at_most_0_30_of_bf16s[fp4]"
KEPT = TESTS + "unquantised_blocks_have_weights_in_the_dtype_of_the_activations"
NAMED = TESTS + "layers_that_are_emulated_stay_and_are_named"
TWICE = TESTS + "a_layer_in_two_places_stays_one_and_its_bias_is_added"
SAVED = TESTS + "what_was_packed_is_saved_and_loaded_as_such"
REFUSED = TESTS + "what_cannot_be_packed_is_refused_and_nothing_is_replaced"

MUTANTS = [
    Mutant("the float32 weight is kept as well", FILE,
           "        self.bias = layer.bias\n",
           "        self.bias = layer.bias\n        self.weight = layer.weight\n", MEMORY),
    Mutant("the bias is left out", FILE,
           "return y if self.bias is None else y + self.bias.to(x.dtype)", "return y", TWICE),
    Mutant("the output has two dimensions", FILE,
           "        y = y.view(*x.shape[:-1], len(self.codes))\n", "", TWICE),
    Mutant("a layer in two places becomes two", FILE,
           "own_name, packed[layer])", "own_name, PackedLinear(layer))", TWICE),
    Mutant("codes are not saved", FILE,
           'self.register_buffer("codes", packed.codes)',
           'self.register_buffer("codes", packed.codes, persistent=False)', SAVED),
    Mutant("unquantised weights stay float32", FILE,
           "weight = layer.weight.detach().to(dtype)", "weight = layer.weight.detach()", KEPT),
    Mutant("weights that are emulated are rounded", FILE,
           "        elif not layer.recipe.is_quantized:\n", "        else:\n", NAMED),
    Mutant("every layer that is left is named", FILE,
           "if layer.recipe.is_quantized and layer not in packed]", "]", NAMED),
    Mutant("sharded weights are packed", FILE,
           'check(not is_sharded,', 'check(True,', REFUSED),
    Mutant("the embedding stays float32", "tools/generate.py",
           "    model.embed.to(model.dtype)\n", "", MEMORY),
    Mutant("the weights are packed to floor in every row", FILE,
           "self.scale = layer.recipe.forward_scale", 'self.scale = "floor"',
           TESTS + "a_row_packs_with_its_own_scale"),
]
