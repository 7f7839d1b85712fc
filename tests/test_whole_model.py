"""fp4/ in somebody else's model: its linear layers replaced, its folder copied alone."""
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import fp4

FP4 = Path(fp4.__file__).resolve().parent
fp4.build()


class Plain(nn.Module):
    """Has two layers in two places each, two layers with one weight, and attention."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(64, 64)
        self.same = self.first
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(64, 64), nn.GELU()) for _ in range(2))
        self.again = self.blocks[0]
        self.tied = nn.Linear(64, 64, bias=False)
        self.tied.weight = self.first.weight
        self.attention = nn.MultiheadAttention(64, 2, batch_first=True)
        self.head = nn.Linear(64, 10)

    def forward(self, x):
        x = self.first(x)
        for block in (*self.blocks, self.again):
            x = block(x)
        x = x + self.attention(x, x, x)[0]
        return self.head(self.tied(x))


X = torch.randn(4, 8, 64, generator=torch.Generator().manual_seed(0))
REPLACED = ["first", "same", "blocks.0.0", "blocks.1.0", "again.0", "tied"]


def test_every_linear_is_replaced_and_keeps_its_parameters():
    model = Plain()
    before = dict(model.named_parameters())
    expected = model(X)
    state = torch.get_rng_state()
    assert fp4.replace_linears(model, fp4.RECIPES["bf16"], keep=["head"]) == REPLACED
    assert torch.equal(torch.get_rng_state(), state)
    after = dict(model.named_parameters())
    assert before.keys() == after.keys()
    assert all(before[name] is after[name] for name in before)
    assert {type(model.get_submodule(name)) for name in REPLACED} == {fp4.Linear}
    assert model.again[0] is model.blocks[0][0] and model.same is model.first
    assert type(model.head) is nn.Linear and type(model.attention.out_proj) is not fp4.Linear
    assert torch.equal(model(X), expected)


@pytest.mark.parametrize("precision", ["fp4", "nvfp4"])
def test_a_replaced_model_is_quantised_and_its_biases_are_added_and_trained(precision):
    model = Plain()
    exact = model(X).detach()
    fp4.replace_linears(model, fp4.recipe(precision), keep=["head"])
    layer = model.first
    got = layer(X)
    assert 0 < (got - nn.functional.linear(X, layer.weight, layer.bias)).abs().mean() < .2
    bias = layer.bias
    layer.bias = None
    assert torch.equal(got, layer(X) + bias)
    layer.bias = bias
    got.sum().backward()
    assert torch.allclose(bias.grad, torch.full((64,), 32.))
    assert 0 < (model(X) - exact).norm() < exact.norm()


def is_unchanged(model):
    return not any(isinstance(module, fp4.Linear) for module in model.modules())


def test_what_cannot_be_replaced_is_refused_by_name_and_nothing_is_replaced():
    recipe = fp4.recipe("fp4")
    model = Plain()
    with pytest.raises(ValueError, match=r"^head has 64 in- and 10 out-features, which are not "
                                         r"multiples of 32; keep=\['head'\] leaves it as it is$"):
        fp4.replace_linears(model, recipe)
    with pytest.raises(ValueError, match="the model has no module 'haed'"):
        fp4.replace_linears(model, recipe, keep=["haed"])
    with pytest.raises(ValueError, match="no nn.Linear inside that could be replaced"):
        fp4.replace_linears(model.head, recipe)
    with pytest.raises(ValueError, match="no nn.Linear inside that could be replaced"):
        fp4.replace_linears(model.blocks, recipe, keep=["0", "1"])
    handle = model.first.register_forward_hook(print)
    with pytest.raises(ValueError, match="^first has hooks, which would be lost"):
        fp4.replace_linears(model, recipe, keep=["head"])
    handle.remove()
    with pytest.raises(ValueError, match="^down_input mxfp8 is for layers that a model makes with"):
        fp4.replace_linears(model, fp4.recipe("fp4", down_input="mxfp8"), keep=["head"])
    assert is_unchanged(model)
    kept = fp4.replace_linears(model, recipe, keep=["head", "blocks", "again"])
    assert kept == ["first", "same", "tied"]


# ---- the folder alone

def example():
    """The block of fp4/README.md under its heading."""
    text = (FP4 / "README.md").read_text()
    section = text[text.index("## In a model of yours"):]
    return re.search(r"```python\n(.*?)```", section, re.S)[1]


def run_alone(folder, **environment):
    """Runs the example with fp4/, without what was built, and nothing else of ours."""
    shutil.copytree(FP4, folder / "fp4", ignore=shutil.ignore_patterns("build", "__pycache__"))
    (folder / "example.py").write_text(example())
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run([sys.executable, "example.py"], cwd=folder, text=True,
                          capture_output=True, env={**clean, **environment})
    assert done.returncode == 0, done.stderr
    return [float(line) for line in done.stdout.split()], done.stderr


def test_the_example_of_the_readme_trains_with_fp4_alone_on_the_path(tmp_path):
    losses, messages = run_alone(tmp_path, CXX="/nonexistent/c++")
    assert "reference.py" in messages           # no compiler: the definition
    assert len(losses) == 20 and losses[-1] < .7 * losses[0]
    statements = [line for line in example().splitlines() if line.strip()]
    assert len(statements) <= 13


@pytest.mark.slow
def test_the_example_of_the_readme_compiles_its_kernels_where_it_was_copied(tmp_path):
    losses, messages = run_alone(tmp_path)
    assert "byte-equal" in messages or "quantize.cu" in messages
    assert len(losses) == 20 and losses[-1] < .7 * losses[0]


def test_fp4_works_as_a_part_of_another_package(tmp_path):
    shutil.copytree(FP4, tmp_path / "vendor" / "fp4",
                    ignore=shutil.ignore_patterns("build", "__pycache__"))
    code = ("import sys, torch, vendor.fp4 as fp4\n"
            "layer = fp4.Linear(64, 64, fp4.recipe('nvfp4'))\n"
            "print(layer(torch.randn(2, 64)).shape, fp4.Packed.__module__, 'fp4' in sys.modules)\n"
            "fp4.nothing")
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, text=True,
                          capture_output=True, env=clean)
    assert done.stdout == "torch.Size([2, 64]) vendor.fp4.ops False\n", done.stderr
    assert "module 'vendor.fp4' has no attribute 'nothing'" in done.stderr
