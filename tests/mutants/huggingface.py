"""Faults in what writes a model for Hugging Face, and the tests that notice them."""
from tools.mutants import Mutant

MAIN = "tools/huggingface/__main__.py"
WEIGHTS = "tools/huggingface/weights.py"
GRID = "fp4/post_step.py"
VOCABULARY = "tools/huggingface/vocabulary.py"
T = "tests/test_huggingface.py::"
LOGITS = T + "test_transformers_computes_our_logits"
BYTES = T + "test_codes_and_scales_are_ours_byte_for_byte"
ROTATED = T + "test_the_plain_weight_is_what_the_forward_product_multiplies_rotated_back"
ROUNDING = T + "test_the_plain_weight_differs_from_the_weight_by_its_rounding"
PARTS = T + "test_a_layer_of_fpquant_has_its_parts_and_a_kept_one_its_weight"
ONLY = T + "test_only_quartets_forward_product_has_the_forms_of_fpquant"
IDS = T + "test_the_ids_of_a_text_are_the_same_there"
PAIR = T + "test_one_pair_for_each_token_is_enough"
FOUND = T + "test_transformers_finds_the_tokenizer"
COMMAND = T + "test_the_command_writes_the_newest_checkpoint_or_the_one_it_is_given"
REFUSED = T + "test_what_cannot_be_exported_is_refused_in_a_sentence"
UNFINISHED = T + "test_a_folder_that_cannot_be_finished_leaves_nothing"

MUTANTS = [
    Mutant("rotary pairs stay side by side", WEIGHTS,
           "rows.view(n_head, -1, 2).transpose(1, 2).flatten()", "rows", f"{LOGITS} {BYTES}"),
    Mutant("the pairs of all heads are taken apart together", WEIGHTS,
           "rows.view(n_head, -1, 2)", "rows.view(1, -1, 2)", f"{LOGITS} {BYTES}"),
    Mutant("gate and up change places", WEIGHTS,
           "gate, up = rows_of", "up, gate = rows_of", f"{LOGITS} {BYTES}"),
    Mutant("q and k change places with v", WEIGHTS, "q, k, v = rows_of", "v, q, k = rows_of",
           f"{LOGITS} {BYTES}"),
    Mutant("the rows of k stay", WEIGHTS, "by_halves(k, n_head)", "k", f"{LOGITS} {BYTES}"),
    Mutant("both norms of a block change places", WEIGHTS,
           "input_layernorm.weight\"] = block.norm1", "input_layernorm.weight\"] = block.norm2",
           LOGITS),
    Mutant("the head is the embedding", WEIGHTS, '"lm_head.weight": model.head.weight',
           '"lm_head.weight": model.embed.weight', LOGITS),
    Mutant("the weight is not rotated back", WEIGHTS,
           "return on_grid(weight, recipe)",
           "from fp4 import post_step\n    return post_step.quantize(weight, recipe)",
           f"{ROTATED} {ROUNDING}"),
    Mutant("the weight is not quantised", WEIGHTS, "    if recipe.forward is None:",
           "    if True:", f"{ROTATED} {ROUNDING}"),
    Mutant("the weight of fp8 is not quantised", WEIGHTS,
           'if recipe.method == "fp8":\n        rounded', 'if False:\n        rounded', ROUNDING),
    Mutant("the factor of a quantiser is left out", GRID, "return values * factor",
           "return values", ROUNDING),
    Mutant("what blocks padded stays", GRID, "undo=True)[:, :w.shape[1]]", "undo=True)", ROUNDING),
    Mutant("the weight in BF16 is that in the basis of the model", WEIGHTS,
           'return {"dqweight": ops.dequantize(packed, torch.bfloat16)}',
           'return {"dqweight": plain_weight(layer).to(torch.bfloat16)}', BYTES),
    Mutant("the epsilon of the norms is transformers' own", WEIGHTS,
           "NORM_EPS = 1e-5", "NORM_EPS = 1e-6",
           T + "test_transformers_understands_the_config_of_fpquant"),
    Mutant("rotary angles are Llama 3's", WEIGHTS, "ROPE_THETA = 10000.0", "ROPE_THETA = 500000.0",
           LOGITS),
    Mutant("kept blocks are quantised", WEIGHTS,
           'form == "bf16" or not layer.recipe.is_quantized', 'form == "bf16"', PARTS),
    Mutant("the config does not name the kept layers", WEIGHTS, '["lm_head", *kept]',
           '["lm_head"]', PARTS),
    Mutant("the constants of a layer are left out", WEIGHTS, 'if "weight" not in fused:',
           "if False:", PARTS),
    Mutant("scales of another rule are FPQuant's", WEIGHTS, "check(forward == QUEST and",
           "check(forward and", ONLY),
    Mutant("every method has a plain weight", WEIGHTS, 'check(recipe.method in ("", "fp8"),',
           "check(True,", T + "test_a_method_without_a_plain_weight_is_refused"),
    Mutant("a form says nothing of the input of the down projections", WEIGHTS,
           "recipe.down == recipe and ", "",
           T + "test_only_quartets_forward_product_has_the_forms_of_fpquant[fp4-axes7]"),
    Mutant("signs that are drawn anew are taken for none", WEIGHTS,
           "forward is None or forward.right.is_fixed", "True or forward.right.is_fixed",
           T + "test_signs_that_are_drawn_anew_are_refused"),
    Mutant("a missing package is a traceback", MAIN, 'check(find_spec("safetensors"),',
           "check(True,", T + "test_without_safetensors_a_sentence_says_what_to_install"),
    Mutant("a full disk is the package's own exception", MAIN, "except SafetensorError as error:",
           "except KeyError as error:", UNFINISHED),
    Mutant("two constants of a layer share their memory", WEIGHTS, "rotation.clone()", "rotation",
           PARTS),
    Mutant("Oniguruma gets tiktoken's pattern", VOCABULARY,
           'PATTERN.replace("{1,3}+", "{1,3}")', "PATTERN", IDS),
    Mutant("a word that is a token is merged all the same", VOCABULARY, '"ignore_merges": True',
           '"ignore_merges": False', PAIR),
    Mutant("the first cut is taken for the last merge", VOCABULARY,
           "i = rank_of_pair.index(lowest)", "i = 0", f"{IDS} {PAIR}"),
    Mutant("of equal numbers the rightmost is merged", VOCABULARY,
           "i = rank_of_pair.index(lowest)",
           "i = len(rank_of_pair) - 1 - rank_of_pair[::-1].index(lowest)", PAIR),
    Mutant("merges are in no order", VOCABULARY, "sorted(ranks, key=ranks.get)",
           "sorted(ranks)", f"{IDS} {PAIR}"),
    Mutant("a space is put before each text", VOCABULARY, '"add_prefix_space": False',
           '"add_prefix_space": True', f"{IDS} {FOUND}"),
    Mutant("END is a text like any other", VOCABULARY, '"content": END', '"content": "<end>"',
           f"{IDS} {FOUND}"),
    Mutant("the soft hyphen is taken for visible", VOCABULARY,
           "range(0xA1, 0xAD), *range(0xAE, 0x100)", "range(0xA1, 0x100)", IDS),
    Mutant("a vocabulary of characters has an end", VOCABULARY,
           "isinstance(vocabulary, (Own, Gpt2)) else None", "True else None",
           T + "test_of_another_vocabulary_there_is_a_sentence_and_no_tokenizer"),
    Mutant("padding is not said", MAIN, "    if rows == size:\n", "    if True:\n",
           T + "test_rows_of_the_padded_vocabulary_stay_and_that_is_said"),
    Mutant("a folder with files is written into", MAIN, "    check(is_empty or not os.path",
           "    check(True or not os.path", REFUSED),
    Mutant("an empty folder is refused", MAIN, "check(is_empty or not", "check(not",
           COMMAND),
    Mutant("what is unfinished stays", MAIN,
           "        shutil.rmtree(temporary, ignore_errors=True)", "        pass", UNFINISHED),
    Mutant("a folder has its name before it is whole", MAIN,
           'temporary = f"{path}.{os.getpid()}.tmp"', "temporary = path",
           T + "test_a_folder_that_came_into_being_meanwhile_is_kept"),
    Mutant("a full disk is a fault of ours", MAIN, "except OSError as error:",
           "except KeyError as error:", UNFINISHED),
    Mutant("one checkpoint is taken for a folder", MAIN,
           "checkpoint.read(run) if os.path.isfile(run) else checkpoint", "checkpoint", COMMAND),
    Mutant("only a space is a space", VOCABULARY,
           'PATTERN.replace("{1,3}+", "{1,3}")',
           'PATTERN.replace("{1,3}+", "{1,3}").replace(r"\\s", " ")',
           T + "test_characters_are_of_the_same_kind_there"),
    Mutant("samples are drawn at another temperature", MAIN, '"temperature": 0.8',
           '"temperature": 1.0', T + "test_it_draws_there_as_our_samples_do"),
]
