"""
The tensors of a model, and its config.json, as transformers' LlamaForCausalLM has them.

    here                        there
    attention.qkv [3C, C]       q_proj, k_proj and v_proj [C, C], cut by rows
    mlp.gate_up [2H, C]         gate_proj and up_proj [H, C], cut by rows
    channels (0, 1), (2, 3) ... of a head turn together (model.py, rope)
                                channels (0, D/2), (1, D/2 + 1) ... do: the rows of q and of k are
                                put into another order, head by head. Attention multiplies q with k,
                                so that it does not matter which order that is

A quantised weight is cut and ordered in the same way, because its blocks lie along its rows: codes
and scales stay as they are, byte for byte.
"""
import torch

from data.files import check
from fp4 import ops, reference, stored_weight
from fp4.emulate import fp8
from fp4.post_step import on_grid
from fp4.recipes import QUEST
from model import NORM_EPS, ROPE_THETA, swiglu_width

FORMS = {
    "bf16": "a plain Llama, whose activations are not quantised",
    "fpquant-pseudo": "transformers' FPQuant, its 4-bit weights held in BF16 (not loaded yet)",
    "fpquant": "transformers' FPQuant in 4 bits (not loaded: needs Blackwell)",
}


def check_form(form, recipe):
    """Raises UserError if a model of this recipe has no such form."""
    forward = recipe.forward
    if form != "bf16":
        check(forward == QUEST and recipe.down == recipe and not recipe.method,
              f"form {form} is for the forward product of fp4 (rotation 32, scale floor), and this "
              f"model has another one: take --form bf16")
    check(recipe.method in ("", "fp8"),
          f"no plain weight does what the forward product of {recipe.method} does: export a model "
          f"of another precision")
    check(forward is None or forward.right.is_fixed,
          "the forward product of this model draws new signs or noise each time, so that no fixed "
          "weight does what it does: export a model without them")


# ---- config.json

def config(model, form, end_id):
    """Returns the content of config.json; end_id is that of the token between documents or None."""
    sizes = model.config
    entries = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "bfloat16",
        "vocab_size": sizes.vocab_size,
        "hidden_size": sizes.n_embd,
        "intermediate_size": swiglu_width(sizes.n_embd),
        "num_hidden_layers": sizes.n_layer,
        "num_attention_heads": sizes.n_head,
        "num_key_value_heads": sizes.n_head,
        "head_dim": sizes.n_embd // sizes.n_head,
        "hidden_act": "silu",
        "max_position_embeddings": sizes.block_size,
        "rms_norm_eps": NORM_EPS,
        "rope_theta": ROPE_THETA,
        "tie_word_embeddings": False,
        "attention_bias": False,
        "mlp_bias": False,
        "bos_token_id": end_id,
        "eos_token_id": end_id,
    }
    if form != "bf16":
        entries["quantization_config"] = quantization_config(model, form)
    return entries


def quantization_config(model, form):
    """Returns what transformers calls an FPQuantConfig: the forward product of fp4."""
    kept = [name for name, layer, _ in linear_layers(model) if not layer.recipe.is_quantized]
    return {
        "quant_method": "fp_quant",
        "forward_dtype": "mxfp4",
        "forward_method": "quest",
        "backward_dtype": "bf16",
        "hadamard_group_size": 32,
        "pseudoquantization": form == "fpquant-pseudo",
        "store_master_weights": False,
        "transform_init": "hadamard",
        "modules_to_not_convert": ["lm_head", *kept],
    }


# ---- the tensors

@torch.no_grad()
def convert(model, form):
    """Returns {name: tensor} of a Llama of model.py, whose recipe check_form() admits."""
    tensors = {
        "model.embed_tokens.weight": model.embed.weight,
        "model.norm.weight": model.norm.weight,
        "lm_head.weight": model.head.weight,
    }
    for i, block in enumerate(model.blocks):
        tensors[f"model.layers.{i}.input_layernorm.weight"] = block.norm1.weight
        tensors[f"model.layers.{i}.post_attention_layernorm.weight"] = block.norm2.weight
    tensors = {name: weight.to(torch.bfloat16) for name, weight in tensors.items()}

    last = None
    for name, layer, rows in linear_layers(model):
        if layer is not last:           # The parts of a fused layer follow each other.
            last, fused = layer, parts_of(layer, form)
        for part, value in fused.items():
            tensors[f"{name}.{part}"] = value[rows]
        if "weight" not in fused:
            tensors.update({f"{name}.{part}": value for part, value in constants().items()})
    return tensors


def linear_layers(model):
    """Yields the name of each linear layer there, our layer, and which of its rows it has."""
    n_head = model.config.n_head
    for i, block in enumerate(model.blocks):
        attention, mlp = block.attention, block.mlp
        q, k, v = rows_of(attention.qkv).chunk(3)
        gate, up = rows_of(mlp.gate_up).chunk(2)
        yield f"model.layers.{i}.self_attn.q_proj", attention.qkv, by_halves(q, n_head)
        yield f"model.layers.{i}.self_attn.k_proj", attention.qkv, by_halves(k, n_head)
        yield f"model.layers.{i}.self_attn.v_proj", attention.qkv, v
        yield f"model.layers.{i}.self_attn.o_proj", attention.proj, rows_of(attention.proj)
        yield f"model.layers.{i}.mlp.gate_proj", mlp.gate_up, gate
        yield f"model.layers.{i}.mlp.up_proj", mlp.gate_up, up
        yield f"model.layers.{i}.mlp.down_proj", mlp.proj, rows_of(mlp.proj)


def rows_of(layer): return torch.arange(layer.out_features)


def by_halves(rows, n_head):
    """Puts the first channel of each pair of a head before the second one of each pair."""
    return rows.view(n_head, -1, 2).transpose(1, 2).flatten()


def parts_of(layer, form):
    """Returns {name: tensor [out-features, ...]} of what stands for the weight of a layer."""
    if form == "bf16" or not layer.recipe.is_quantized:
        return {"weight": plain_weight(layer).to(torch.bfloat16)}
    packed = quantized(layer)
    if form == "fpquant":
        return {"qweight": packed.codes, "scales": packed.scales}
    return {"dqweight": ops.dequantize(packed, torch.bfloat16)}


def constants():
    """Returns {name: tensor} of what each layer of FPQuant has besides its weight."""
    one = torch.ones(1, dtype=torch.bfloat16)
    rotation = reference.hadamard(torch.eye(32)).to(torch.bfloat16)
    return {
        "weight_global_scale": one,
        "act_global_scale": one.clone(),        # A file of tensors has no two with one memory.
        "forward_hadamard_matrix": rotation,
        "backward_hadamard_matrix": rotation.clone(),
    }


# ---- what a forward product multiplies

def quantized(layer):
    """Returns the Packed weight that the MXFP4 kernels multiply, in the rotated basis."""
    return stored_weight.quantize(layer.weight, layer.recipe.forward_scale).packed


def plain_weight(layer):
    """Returns the weight, float32 [N, K], with which an ordinary layer does what the forward
    product of this one does, but for the quantisation of its input.

    That product is xq wq.T, where wq is the rounded w H. Without rounding, xq is x H, and
    (x H) wq.T = x (wq H).T, because H is symmetric and its own inverse: the weight is wq H.
    """
    recipe = layer.recipe
    weight = layer.weight.detach()
    if recipe.method == "fp8":
        rounded = fp8.quantize(weight, fp8.E4M3)
        return rounded.values.float() * rounded.scale
    if recipe.forward is None:
        return weight
    return on_grid(weight, recipe)
