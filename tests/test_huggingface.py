"""A trained model as a folder of Hugging Face: is it the same model, and is the folder whole?"""
import glob
import json
import os
import random
import shlex
import types
import unicodedata

import pytest
import torch

import fp4
import quartet
from data.bpe import BYTES, train_bpe
from data.files import UserError
from data.texts import END
from data.tokenizer import Characters, Gpt2, Own, Vocabulary
from fp4 import ops, reference, stored_weight
from model import Llama, ModelConfig
from tools import checkpoint
from tools.huggingface import __main__ as huggingface
from tools.huggingface import vocabulary, weights

# It writes the files, and most tests read one.
safetensors = pytest.importorskip("safetensors.torch", reason="pip install safetensors")

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
SIZES = ModelConfig(n_layer=2, n_embd=64, n_head=2, vocab_size=320, block_size=48)
TOKENS = torch.randint(0, 300, (2, 48), generator=torch.Generator().manual_seed(1))
OWN = Own({token: rank for rank, token in enumerate([*BYTES, b"ab", b"abc", b"  "])})


def model_of(recipe, **options):
    """A model of two blocks whose weights are large enough that a wrong one changes the logits."""
    torch.manual_seed(0)
    model = Llama(SIZES, recipe, torch.float32, **options)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.normal_(std=.3 if parameter.shape[1] == 64 else .1)
            else:
                parameter.add_(torch.randn_like(parameter), alpha=.2)
    return model


@torch.no_grad()
def plain_model(model):
    """The model with activation quantisation off: a model of ours, of BF16 weights in float32."""
    plain = Llama(SIZES, fp4.RECIPES["bf16"], torch.float32)
    plain.load_state_dict(model.state_dict())
    layers = [module for module in model.modules() if isinstance(module, fp4.Linear)]
    copies = [module for module in plain.modules() if isinstance(module, fp4.Linear)]
    for layer, its_copy in zip(layers, copies):
        its_copy.weight.copy_(weights.plain_weight(layer))
    for parameter in plain.parameters():
        parameter.copy_(parameter.bfloat16())
    return plain


def load(folder, **options):
    transformers = pytest.importorskip("transformers", reason="pip install transformers")
    return transformers.AutoModelForCausalLM.from_pretrained(folder, **options)


def read(folder):
    return safetensors.load_file(os.path.join(folder, "model.safetensors"))


def config_in(folder):
    with open(os.path.join(folder, "config.json")) as file:
        return json.load(file)


# ---- the same model

@pytest.mark.parametrize("precision, axes, kept", [
    ("bf16", {}, 0), ("fp4", {}, 0), ("fp4", {"scale": "nearest"}, 1), ("fp8", {}, 0)])
def test_transformers_computes_our_logits(precision, axes, kept, tmp_path):
    model = model_of(fp4.recipe(precision, **axes), keep_first=kept)
    folder = str(tmp_path / "hf")
    huggingface.write(model, OWN, folder, "bf16")
    theirs = load(folder, dtype=torch.float32)
    with torch.no_grad():
        logits = theirs(TOKENS).logits
        expected = plain_model(model)(TOKENS)
    # Both multiply the same BF16 weights in float32, in another order: sums of up to 256 terms,
    # each rounded to 2^-24, through two blocks. A wrong order of rows changes logits by their size.
    assert (logits - expected).abs().max() <= 1e-4 * expected.abs().max()
    assert expected.std() > .5


@pytest.mark.parametrize("scale", ["floor", "nearest"])
def test_the_plain_weight_is_what_the_forward_product_multiplies_rotated_back(scale):
    torch.manual_seed(0)
    layer = fp4.Linear(128, 96, fp4.recipe("fp4", scale=scale))
    x = torch.randn(1024, 128)
    with torch.no_grad():
        y = layer(x)
        rounding_x = (y - x @ weights.plain_weight(layer).T).square().mean() / y.square().mean()
        rounding_both = (y - x @ layer.weight.T).square().mean() / y.square().mean()
    # With the plain weight only the rounding of x is left; that of the weight is as large. A weight
    # that is not rotated back makes an error as large as the product.
    assert rounding_x < .05 and 1.5 < rounding_both / rounding_x < 2.5


@pytest.mark.parametrize("precision, axes, least, most", [
    ("bf16", {}, 0, 0), ("fp4-bwd", {}, 0, 0), ("fp4", {}, .01, .04),
    ("fp4", {"scale": "mse"}, .005, .02), ("fp4", {"rotation": "64"}, .01, .04),
    ("fp4", {"rotation": "none"}, .01, .04), ("fp4", {"scale": "absmax34"}, .005, .02),
    ("nvfp4", {}, .005, .015), ("four-over-six", {}, .005, .015), ("mxfp8", {}, 1e-4, 2e-3),
    ("fp8", {}, 1e-4, 2e-3), ("fp4", {"format": "mxfp4/mxfp8"}, 1e-4, 2e-3),
    ("fp4", {"format": "mxfp8/mxfp4"}, .01, .04),
    ("fp4", {"rounding": "eden:nearest:nearest"}, .01, .04)])
def test_the_plain_weight_differs_from_the_weight_by_its_rounding(precision, axes, least, most):
    # A Linear would compile its quantiser; without that the definition runs.
    weight = torch.randn(96, 160, generator=torch.Generator().manual_seed(0))
    layer = types.SimpleNamespace(recipe=fp4.recipe(precision, **axes), weight=weight)
    plain = weights.plain_weight(layer)
    error = (plain - weight).square().mean().item()
    assert least <= error <= most and plain.shape == weight.shape


def test_the_plain_weight_of_fp4_is_that_of_the_stored_codes():
    torch.manual_seed(0)
    layer = fp4.Linear(64, 32, fp4.recipe("fp4"))
    packed = stored_weight.quantize(layer.weight, "floor").packed
    rotation = reference.hadamard(torch.eye(32)).double()
    wq = ops.dequantize(packed, torch.float32).double().unflatten(-1, (-1, 32))
    expected = (wq @ rotation).flatten(-2)
    assert (weights.plain_weight(layer) - expected).abs().max() < 1e-7


@pytest.mark.parametrize("precision, why", [
    ("jetfire-fp4", "no plain weight does what the forward product of jetfire-fp4 does"),
    ("luq-int4", "no plain weight")])
def test_a_method_without_a_plain_weight_is_refused(precision, why):
    with pytest.raises(UserError, match=why):
        weights.check_form("bf16", fp4.recipe(precision))


def test_signs_that_are_drawn_anew_are_refused():
    recipe = fp4.recipe("fp4", rounding="eden:eden:eden", signs="before:before:before")
    with pytest.raises(UserError, match="draws new signs or noise each time"):
        weights.check_form("bf16", recipe)
    weights.check_form("bf16", fp4.recipe("fp4", rounding="eden:nearest:nearest"))


def test_a_bf16_model_writes_the_same_text_there(tmp_path):
    model = model_of(fp4.RECIPES["bf16"])
    folder = str(tmp_path / "hf")
    huggingface.write(model, OWN, folder, "bf16")
    ours = TOKENS[:1, :8]
    plain = plain_model(model)
    with torch.no_grad():
        for _ in range(24):
            ours = torch.cat((ours, plain(ours)[:, -1:].argmax(-1)), 1)
    theirs = load(folder, dtype=torch.float32).generate(
        TOKENS[:1, :8], do_sample=False, max_new_tokens=24, eos_token_id=[], pad_token_id=0)
    assert theirs.tolist() == ours.tolist() and len(set(ours[0].tolist())) > 10


def test_it_draws_there_as_our_samples_do(tmp_path):
    folder = str(tmp_path / "hf")
    huggingface.write(model_of(fp4.RECIPES["bf16"]), OWN, folder, "bf16")
    with open(tmp_path / "hf" / "generation_config.json") as file:
        said = json.load(file)
    assert said["do_sample"] and said["eos_token_id"] == OWN.encode(END)[0]
    defaults = quartet.Settings()
    assert (said["temperature"], said["top_k"]) == (defaults.temperature, defaults.top_k)
    assert defaults.top_p == 1          # which is what it is there, where nothing is said


def test_rows_of_the_padded_vocabulary_stay_and_that_is_said(tmp_path):
    model = model_of(fp4.RECIPES["bf16"])
    said = huggingface.write(model, OWN, str(tmp_path / "hf"), "bf16")
    tensors = read(str(tmp_path / "hf"))
    for name in ("lm_head.weight", "model.embed_tokens.weight"):
        assert tensors[name].shape == (320, 64)
    assert config_in(tmp_path / "hf")["vocab_size"] == 320
    assert "vocab_size is 320, a multiple of 64 as in training; no token has the ids from 260 on" \
        in said
    assert huggingface.about_padding(320, 320) == []


# ---- FPQuant

def our_rows(name, i, n_embd=64, n_head=2, hidden=256):
    """Which row of our fused layer is row i of that layer there, in other words than the tool's."""
    size = n_embd // n_head
    head, j = divmod(i, size)
    # There, channel j of a head turns with channel j + size / 2; here 2 j turns with 2 j + 1.
    turned = head * size + (2 * j if j < size // 2 else 2 * (j - size // 2) + 1)
    return {"q_proj": turned, "k_proj": n_embd + turned, "v_proj": 2 * n_embd + i, "o_proj": i,
            "gate_proj": i, "up_proj": hidden + i, "down_proj": i}[name]


def layer_of(block, name):
    if name in ("q_proj", "k_proj", "v_proj"):
        return f"self_attn.{name}", block.attention.qkv
    if name == "o_proj":
        return f"self_attn.{name}", block.attention.proj
    return f"mlp.{name}", block.mlp.proj if name == "down_proj" else block.mlp.gate_up


@pytest.mark.parametrize("name", ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj",
                                  "down_proj"])
def test_codes_and_scales_are_ours_byte_for_byte(name):
    model = model_of(fp4.recipe("fp4"))
    real = weights.convert(model, "fpquant")
    pseudo = weights.convert(model, "fpquant-pseudo")
    for i, block in enumerate(model.blocks):
        place, layer = layer_of(block, name)
        place = f"model.layers.{i}.{place}"
        packed = stored_weight.quantize(layer.weight, "floor").packed
        values = ops.dequantize(packed, torch.float32)
        qweight, scales = real[f"{place}.qweight"], real[f"{place}.scales"]
        for row in range(len(qweight)):
            ours = our_rows(name, row)
            assert torch.equal(qweight[row], packed.codes[ours])
            assert torch.equal(scales[row], packed.scales[ours])
            assert torch.equal(pseudo[f"{place}.dqweight"][row].float(), values[ours])
        # The two forms say the same numbers, exactly.
        unpacked = reference.dequantize(qweight, scales, torch.bfloat16)
        assert torch.equal(unpacked, pseudo[f"{place}.dqweight"])


@pytest.mark.parametrize("form, weight", [("fpquant", "qweight"), ("fpquant-pseudo", "dqweight")])
def test_a_layer_of_fpquant_has_its_parts_and_a_kept_one_its_weight(form, weight, tmp_path):
    model = model_of(fp4.recipe("fp4"), keep_first=1)
    folder = str(tmp_path / "hf")
    huggingface.write(model, OWN, folder, form)
    tensors = read(folder)
    place = "model.layers.1.mlp.down_proj."
    parts = {name.removeprefix(place) for name in tensors if name.startswith(place)}
    constants = {"weight_global_scale", "act_global_scale", "forward_hadamard_matrix",
                 "backward_hadamard_matrix"}
    assert parts == constants | {weight} | ({"scales"} if form == "fpquant" else set())
    assert tensors[place + "act_global_scale"].tolist() == [1]
    rotation = tensors[place + "forward_hadamard_matrix"].float()
    assert torch.equal(rotation, rotation.T) and (rotation @ rotation).diag().mean() > .999
    assert torch.equal(rotation[1].sign(), torch.tensor([1., -1.]).repeat(16))

    # keep_first 1: block 0 is not quantised, and the config says so.
    kept = "model.layers.0.self_attn.q_proj"
    assert tensors[kept + ".weight"].shape == (64, 64) and f"{kept}.{weight}" not in tensors
    said = config_in(folder)["quantization_config"]
    assert said["modules_to_not_convert"][:2] == ["lm_head", kept]
    assert len(said["modules_to_not_convert"]) == 8
    assert said["pseudoquantization"] == (form == "fpquant-pseudo")
    assert (said["forward_dtype"], said["forward_method"]) == ("mxfp4", "quest")


def test_transformers_understands_the_config_of_fpquant(tmp_path):
    transformers = pytest.importorskip("transformers", reason="pip install transformers")
    huggingface.write(model_of(fp4.recipe("fp4")), OWN, str(tmp_path / "hf"), "fpquant")
    said = config_in(tmp_path / "hf")["quantization_config"]
    understood = transformers.FPQuantConfig.from_dict(said).to_dict()
    assert {name: understood[name] for name in said} == said
    understood = transformers.AutoConfig.from_pretrained(tmp_path / "hf")
    assert understood.rope_parameters["rope_theta"] == 10000 and understood.rms_norm_eps == 1e-5


@pytest.mark.parametrize("precision, axes", [
    ("bf16", {}), ("fp4-bwd", {}), ("fp4", {"scale": "nearest"}), ("fp4", {"rotation": "64"}),
    ("nvfp4", {}), ("fp8", {}), ("fp4", {"scale": "mse/floor"}),
    ("fp4", {"down_input": "mxfp8"})])
def test_only_quartets_forward_product_has_the_forms_of_fpquant(precision, axes):
    for form in ("fpquant", "fpquant-pseudo"):
        with pytest.raises(UserError, match="is for the forward product of fp4 .* --form bf16"):
            weights.check_form(form, fp4.recipe(precision, **axes))
        for row in ("fp4", "fp4-sr", "fp4-fwd", "fp4-pma"):
            weights.check_form(form, fp4.recipe(row))


# ---- the vocabulary

def tokenizer_of(own):
    tokenizers = pytest.importorskip("tokenizers", reason="pip install tokenizers")
    return tokenizers.Tokenizer.from_str(vocabulary.files(own, 48)[0]["tokenizer.json"])


@pytest.fixture(scope="module")
def texts():
    paths = sorted(glob.glob(os.path.join(os.path.dirname(os.__file__), "*.py")))
    return [open(path, encoding="utf-8").read() for path in paths[:24]]


def test_the_ids_of_a_text_are_the_same_there(texts):
    own = Own(train_bpe(texts[:8], 1000))
    other = tokenizer_of(own)
    assert sum(map(len, texts)) > 200_000
    for text in [*texts, f"a{END}b", "é 中文 1234567 x\t\n\r\n   y", " " * 3000 + "x"]:
        ids = own.encode(text)
        assert other.encode(text).ids == ids
        assert other.decode(ids, skip_special_tokens=False) == text


def test_characters_are_of_the_same_kind_there():
    """Is it a letter, a digit, a space or a sign? A character beside another shows where it is cut:
    any two bytes at that place are a token."""
    ranks = {token: rank for rank, token in enumerate(BYTES)}
    for left in b"a1 .\n":
        for right in range(256):
            for token in (bytes([left, right]), bytes([right, left])):
                ranks.setdefault(token, len(ranks))
    own = Own(ranks)
    other = tokenizer_of(own)
    # What this Python knows has been a character for years. Both know it, whatever is added later.
    known = [chr(i) for i in range(0x20000)
             if i < 0x500 or chr(i).isspace()
             or i % 53 == 0 and unicodedata.category(chr(i)) not in ("Cn", "Cs", "Co")]
    for form in ("a{}a", "1{}1", " {} ", ".{}.", "\n{}\n"):
        forms = [form.format(letter) for letter in known]
        assert [found.ids for found in other.encode_batch(forms)] == own.encode_batch(forms)


@pytest.mark.parametrize("seed", range(8))
def test_one_pair_for_each_token_is_enough(seed):
    """Tokens at random, many of which can be cut in several ways or cannot come about at all."""
    rng = random.Random(seed)
    ranks = {token: rank for rank, token in enumerate(BYTES)}
    while len(ranks) < 256 + 30:
        ranks.setdefault(bytes(rng.choices(b"ab", k=rng.randrange(2, 7))), len(ranks))
    own = Own(ranks)
    other = tokenizer_of(own)
    words = ["".join(rng.choices("ab", k=rng.randrange(1, 30))) for _ in range(200)]
    assert [found.ids for found in other.encode_batch(words)] == own.encode_batch(words)
    assert len(vocabulary.merges(ranks)) < 30           # some cannot


def test_transformers_finds_the_tokenizer(tmp_path):
    transformers = pytest.importorskip("transformers", reason="pip install transformers")
    huggingface.write(model_of(fp4.RECIPES["bf16"]), OWN, str(tmp_path / "hf"), "bf16")
    found = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert found("xabc  y")["input_ids"] == OWN.encode("xabc  y")
    assert found.eos_token == found.bos_token == END and found.eos_token_id == OWN.size - 1
    assert found.decode(OWN.encode("xabc , y .")) == "xabc , y ."


@pytest.mark.parametrize("other, why", [
    (Gpt2(), "GPT-2's: AutoTokenizer.from_pretrained"),
    (Vocabulary(300), "not of byte pairs .unknown, 300 entries"),
    (Characters(2, {0: "a", 1: "b"}), "not of byte pairs .characters, 2 entries")])
def test_of_another_vocabulary_there_is_a_sentence_and_no_tokenizer(other, why, tmp_path):
    said = huggingface.write(model_of(fp4.RECIPES["bf16"]), other, str(tmp_path / "hf"), "bf16")
    with pytest.raises(AssertionError, match=why):
        raise AssertionError(said[-1])
    assert sorted(os.listdir(tmp_path / "hf")) == [
        "config.json", "generation_config.json", "model.safetensors"]
    has_end = other.kind == "gpt2"
    assert config_in(tmp_path / "hf")["eos_token_id"] == (50256 if has_end else None)


# ---- the command

@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of the tiny model in BF16, as it is after its first step."""
    out = tmp_path_factory.mktemp("out")
    cfg = quartet.resolve(quartet.Settings(
        size="tiny", precision="bf16", device="cpu", out=str(out), name="r", seq=64))
    model = quartet.build_model(cfg, OWN.size)
    corpus = types.SimpleNamespace(
        identity={"vocab_size": OWN.size}, folder="nowhere", vocabulary=OWN)
    optimizer = quartet.build_optimizer(model, cfg)
    state = checkpoint.pack(vars(cfg), corpus, model, optimizer, [(1, 5., 5., 1e-3, 1.)])
    os.makedirs(cfg.folder)
    checkpoint.save(cfg.folder, state, 1)
    return cfg.folder


def test_the_command_writes_the_newest_checkpoint_or_the_one_it_is_given(run, tmp_path, capsys):
    assert huggingface.run_cli(["export", run, str(tmp_path / "a")]) == 0
    assert f"{tmp_path}/a has a plain Llama" in capsys.readouterr().out
    (tmp_path / "b").mkdir()                            # An empty folder is as good as none.
    path = os.path.join(run, "ckpt.pt")
    assert huggingface.run_cli(["export", path, str(tmp_path / "b") + "/"]) == 0
    assert sorted(os.listdir(tmp_path)) == ["a", "b"]
    names = sorted(os.listdir(tmp_path / "a"))
    assert names == sorted(os.listdir(tmp_path / "b")) == [
        "config.json", "generation_config.json", "model.safetensors", "tokenizer.json",
        "tokenizer_config.json"]
    state = checkpoint.read(path)["model"]
    assert torch.equal(read(tmp_path / "b")["lm_head.weight"], state["head.weight"].bfloat16())


def test_the_readme_s_commands_can_be_given_and_its_program_runs(run, tmp_path, capsys):
    pytest.importorskip("transformers", reason="pip install transformers")
    with open(os.path.join(ROOT, "tools", "README.md")) as file:
        section = file.read().partition("\n## Take it away")[2].partition("\n## ")[0]
    code = [line.strip() for line in section.splitlines() if line.startswith("    ")]
    exports = [line for line in code if "tools.huggingface" in line]
    commands = [shlex.split(line, comments=True)[3:] for line in exports]
    assert [huggingface.parse(command).form for command in commands] == [
        "bf16", "bf16", "fpquant-pseudo"]
    command, folder = commands[0], str(tmp_path / "hf")
    assert huggingface.run_cli([{"out/NAME": run, "DIR": folder}.get(word, word)
                                for word in command]) == 0
    program = "\n".join(line for line in code if line not in exports)
    torch.manual_seed(0)
    exec(program.replace("DIR", folder), {})
    assert "def main(" in capsys.readouterr().out


@pytest.mark.parametrize("arguments, words", [
    (["RUN", "FULL"], "FULL is there already: name another folder, or remove it"),
    (["RUN", "FILE"], "FILE is there already"),
    (["RUN", "FILE/x"], "cannot write"),
    (["RUN", "NEW", "--form", "fpquant"], "form fpquant is for the forward product of fp4"),
    (["RUN", "NEW", "--form", "gguf"], "invalid choice: 'gguf'"),
    (["NONE", "NEW"], "there is no checkpoint"),
    (["FILE", "NEW"], "FILE is damaged or not a checkpoint of quartet.py"),
    (["RUN"], "required: DIR")])
def test_what_cannot_be_exported_is_refused_in_a_sentence(arguments, words, run, tmp_path, capsys):
    (tmp_path / "FULL").mkdir()
    (tmp_path / "FULL" / "x").write_text("mine")
    (tmp_path / "FILE").write_text("mine")
    words = words.replace("FILE is damaged", f"{tmp_path}/FILE is damaged")
    paths = [run if word == "RUN" else word if word.startswith("-") or word in huggingface.FORMS
             + ("gguf",) else str(tmp_path / word) for word in arguments]
    assert huggingface.run_cli(["export", *paths]) == 2
    error = capsys.readouterr().err
    assert error.startswith("huggingface: ") and words in error and error.count("\n") == 1
    assert sorted(os.listdir(tmp_path)) == ["FILE", "FULL"]
    assert (tmp_path / "FULL" / "x").read_text() == (tmp_path / "FILE").read_text() == "mine"


def test_without_safetensors_a_sentence_says_what_to_install(run, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(huggingface, "find_spec", lambda name: None)
    assert huggingface.run_cli(["export", run, str(tmp_path / "new")]) == 2
    error = capsys.readouterr().err
    assert error.endswith("pip install safetensors\n") and error.count("\n") == 1
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("error, code", [("No space left on device (os error 28)", 2),
                                         (KeyboardInterrupt(), 130)])
def test_a_folder_that_cannot_be_finished_leaves_nothing(
        error, code, run, tmp_path, capsys, monkeypatch):
    from safetensors import SafetensorError

    def fail(*args):
        assert len(os.listdir(tmp_path)) == 1           # the temporary folder
        raise SafetensorError(error) if code == 2 else error

    monkeypatch.setattr(safetensors, "save_file", fail)
    assert huggingface.run_cli(["export", run, str(tmp_path / "new")]) == code
    assert os.listdir(tmp_path) == []
    if code == 2:
        sentence = "new: No space left on device (os error 28); nothing of it is left\n"
        assert sentence in capsys.readouterr().err


def test_a_folder_that_came_into_being_meanwhile_is_kept(tmp_path):
    with pytest.raises(UserError, match="is there already"):
        with huggingface.new_folder(str(tmp_path / "new")):
            (tmp_path / "new").mkdir()
            (tmp_path / "new" / "x").write_text("another's")
    assert os.listdir(tmp_path) == ["new"] and os.listdir(tmp_path / "new") == ["x"]


def test_the_forms_of_the_command_are_those_that_can_be_written():
    assert list(huggingface.FORMS) == list(weights.FORMS)
