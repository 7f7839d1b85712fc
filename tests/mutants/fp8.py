"""Faults in the row fp8, and the tests that notice them."""
from tools.mutants import Mutant

FILE = "fp4/emulate/fp8.py"
FP8 = "tests/test_fp8.py::test_"
THREE_PRODUCTS = FP8 + "the_layer_is_three_products_of_values_rounded_to_fp8"
BASELINES = "tests/test_baselines.py::test_"
STATED = BASELINES + "a_row_is_the_method_written_out[fp8]"

MUTANTS = [
    Mutant("gradients are E4M3", FILE,
           "dy_fp8 = quantize(padded, E5M2)", "dy_fp8 = quantize(padded, E4M3)", STATED),
    Mutant("x is E5M2", FILE,
           "x_fp8 = quantize(padded, E4M3)", "x_fp8 = quantize(padded, E5M2)", STATED),
    Mutant("the weight is E5M2", FILE,
           "else quantize(w, E4M3)", "else quantize(w, E5M2)", THREE_PRODUCTS + "[64]"),
    Mutant("half of the range is not used", FILE,
           "max_value = torch.finfo(dtype).max\n", "max_value = torch.finfo(dtype).max / 3\n",
           STATED),
    Mutant("each row has its scale", FILE,
           "        largest = x.abs().amax()\n",
           "        largest = x.abs().amax(1, True).clamp_min(1e-30)\n"
           "        x = x * (largest.amax() / largest)\n        largest = largest.amax()\n",
           STATED),
    Mutant("small tensors share a scale", FILE, "clamp_min(1e-30)", "clamp_min(1e-3)",
           FP8 + "zeros_stay_zeros_and_tiny_gradients_are_kept"),
    Mutant("a tensor of zeros is NaN", FILE, ".float().clamp_min(1e-30)", ".float()",
           FP8 + "zeros_stay_zeros_and_tiny_gradients_are_kept"),
    Mutant("the scale is that of the inverse", FILE,
           "return Scaled(values, largest / max_value)",
           "return Scaled(values, max_value / largest)", THREE_PRODUCTS + "[40]"),
    Mutant("the scale of the left operand is left out", FILE,
           "(a_scale * b_scale)).to(dtype)", "b_scale).to(dtype)", THREE_PRODUCTS + "[40]"),
    Mutant("dw has the scale of the weight", FILE,
           "x_fp8 = Scaled(x_values, x_scale)", "x_fp8 = Scaled(x_values, w_scale)", STATED),
    Mutant("the gradient of dx alone is E4M3", FILE,
           "dx = matmul(dy_fp8, transpose(w_fp8), dy.dtype, fast_accum=False)",
           "dx = matmul(quantize(padded, E4M3), transpose(w_fp8), dy.dtype, fast_accum=False)",
           THREE_PRODUCTS + "[64]"),
    Mutant("x is saved in its own dtype", FILE,
           "return y[:len(x)], (*x_fp8, *w_fp8)",
           "return y[:len(x)], (x_fp8.values.to(x.dtype), x_fp8.scale, *w_fp8)",
           FP8 + "activations_and_weight_are_saved_in_eight_bits"),
    Mutant("dw is in the dtype of the gradient", FILE,
           "transpose(x_fp8), torch.float32, fast_accum=False)",
           "transpose(x_fp8), dy.dtype, fast_accum=False)",
           BASELINES + "a_row_in_bfloat16_is_the_method_written_out_up_to_the_rounding_of_results"
           "[fp8]"),
    Mutant("the largest value leaves out what is NaN", FILE,
           "largest = x.abs().amax()\n", "largest = x.abs().nan_to_num().amax()\n",
           FP8 + "what_is_not_finite_reaches_output_and_gradients[nan]"),
    Mutant("FP8 features need no multiple of 16", "fp4/recipes.py",
           "return 16 if self.is_quantized", "return 16 if self.forward",
           FP8 + "features_that_are_no_multiple_of_16_are_refused_by_name"),
    Mutant("the sum runs in bfloat16 on the CPU", FILE,
           "wide = torch.float32 if on_cpu else dtype", "wide = torch.bfloat16", STATED),
]
