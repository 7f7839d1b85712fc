"""Faults in the lessons and in what times them, and the tests that notice."""
from tools.mutants import Mutant

TESTS = "tests/test_lessons.py::"
FOLDER = "fp4/kernels/lessons/"
FORWARD = TESTS + "test_a_forward_quantiser_gives_the_definitions_bytes"
SHAPES = {
    "quantize_1": f"{FORWARD}[quantize_1-shape2-cpu]",
    "quantize_2": f"{FORWARD}[quantize_2-shape2-cpu]",
    "quantize_3": f"{FORWARD}[quantize_3-shape2-cpu]",
    "quantize_4": (TESTS + "test_the_backward_quantiser_quantize_4_gives_the_definitions_bytes"
                   "[shape2-cpu]"),
}
PRODUCT = TESTS + "test_a_product_is_the_definitions_but_for_the_rounding_of_its_sums"


def fault(what, name, old, new):
    test = SHAPES.get(name) or f"{PRODUCT}[{name}-shape2-cpu]"
    return Mutant(what, f"{FOLDER}{name}.cu", old, new, test)


MUTANTS = [
    fault("a midpoint is elsewhere", "quantize_1", "(a > .25f)", "(a > .3f)"),
    fault("the mask has what reaches 6", "quantize_1", "< 6 * ldexpf", "<= 7 * ldexpf"),
    fault("the variance is the mean square", "quantize_1", "/ 32 - mean * mean", "/ 32"),
    fault("the mask's bits change places", "quantize_2", "uint32_t(fabsf(even) < 6) << i |",
          "uint32_t(fabsf(even) < 6) << (i ^ 2) |"),
    fault("the even code is in the high half", "quantize_2", "low | high << 4", "high | low << 4"),
    fault("a block with a NaN has a scale", "quantize_2", "finite ? e + 127 : 255", "e + 127"),
    fault("the third of four is loaded twice", "quantize_3", "= four.w;", "= four.z;"),
    fault("eight codes make a word in the other order", "quantize_3", "(4 * (i % 8))",
          "(28 - 4 * (i % 8))"),
    fault("the scale is the nearest power of two", "quantize_3",
          "quest_exponent(best[0], false)", "quest_exponent(best[0], true)"),
    fault("a column is a row", "quantize_4", "tile[i][t];", "tile[t % ROWS][i];"),
    fault("nobody waits for the tile", "quantize_4", "  __syncthreads(); ", "  "),
    fault("the factor 3/4 is missing", "quantize_4", ".75f * pow2(-e)", "pow2(-e)"),
    fault("the scale of b is a's", "product_1", "e8m0_value(b_scales[n", "e8m0_value(b_scales[m"),
    fault("the odd codes are left out", "product_1",
          "      of_block += e2m1_value(a_codes[i] >> 4) * e2m1_value(b_codes[i] >> 4);\n", ""),
    fault("the last block is left out", "product_1", "block < K / 32;", "block + 1 < K / 32;"),
    fault("a tile is filled while it is read", "product_2",
          "    __syncthreads();                        // Nobody reads it any more.\n", ""),
    fault("outputs lie 8 apart", "product_2", "first_m + row + 16 * i;", "first_m + row + 8 * i;"),
    fault("values lack their scale", "product_2", "& 15) * scale;", "& 15);"),
    fault("the two rows of a thread change places", "product_3",
          "a_tile.scales[m + row + j / 2 * 8]", "a_tile.scales[m + row + 8 - j / 2 * 8]"),
    fault("a quarter of K is multiplied", "product_3", "j < STEP; j += 32", "j < 32; j += 32"),
    fault("blocks of zeros count for the scale", "product_3",
          "byte == 255 || all_zero(codes) ?", "byte == 255 ?"),
    fault("the second half has the rows of the first", "product_4",
          "wgmma::descriptor(shared.a) + half * (64 * SIDE / 16);",
          "wgmma::descriptor(shared.a);"),
    fault("all columns have the scale of the first 32", "product_4", "b_tile * 4 + i / 16",
          "b_tile * 4"),
    Mutant("the share of what ships is upside down", "tools/lessons.py",
           'share(shipped_ms / ms)', 'share(ms / shipped_ms)',
           TESTS + "test_the_table_has_a_rate_and_its_shares_of_what_ships_and_of_the_limit"),
    Mutant("the limit of a product is a copy's", "tools/lessons.py",
           "limit = fp8 if is_product(lesson) else copy", "limit = copy",
           TESTS + "test_the_table_has_a_rate_and_its_shares_of_what_ships_and_of_the_limit"),
    Mutant("Hopper's instructions are for every later GPU", "tools/lessons.py",
           "capability == lesson.gpu if lesson.only else", "",
           TESTS + "test_a_gpu_has_the_lessons_whose_instructions_it_knows"),
]
