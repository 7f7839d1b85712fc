"""Facts about the source tree: which module may import which, and the reading budget."""
import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("data", "fp4", "tools")
# What quartet.py may import from tools/: at its top what knows no trainer; the others only inside
# the function that needs them.
TOOLS_AT_THE_TOP = {"tools.run", "tools.cli", "tools.checkpoint", "tools.cuda_graph",
                    "tools.energy", "tools.machine", "tools.processes", "tools.schedule"}
TOOLS_INSIDE = {"tools.ablation", "tools.generate", "tools.report"}
# From the bottom up: a module of the method imports only modules that stand before it.
METHOD = [
    "fp4.check", "fp4.recipes", "fp4.axes", "fp4.cross_entropy", "fp4.reference", "fp4.ops",
    "fp4.backend", "fp4.toolchain", "fp4.build", "fp4.emulate.quantizers", "fp4.emulate.columns",
    "fp4.emulate.matmul", "fp4.emulate.fp8", "fp4.emulate.baselines", "fp4.emulate",
    "fp4.stored_weight", "fp4.post_step", "fp4.weight_stats", "fp4.linear",
    "fp4.sharded", "fp4.whole_model", "fp4.inference", "fp4.window", "fp4",
]


def source(module):
    path = ROOT.joinpath(*module.split("."))
    file = path.with_suffix(".py")
    return file if file.exists() else path / "__init__.py"


def modules():
    names = ["quartet", "model"]
    for path in sorted(file for folder in FOLDERS for file in (ROOT / folder).rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        if "build" not in parts[:-1]:
            names.append(".".join(part for part in parts if part != "__init__"))
    return names


def is_ours(name):
    return name.split(".")[0] in ("quartet", "model", *FOLDERS)


def imports(module, only_at_the_top=False):
    "the modules of ours that a module imports, by their full names"
    known = set(modules())
    tree = ast.parse(source(module).read_text())
    package = module if source(module).name == "__init__.py" else module.rpartition(".")[0]
    for node in tree.body if only_at_the_top else ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if is_ours(alias.name))
        if isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package.split(".")[:len(package.split(".")) - node.level + 1]
                base = ".".join([*above, *([base] if base else [])])
            if not is_ours(base):
                continue
            names = {f"{base}.{alias.name}" for alias in node.names}
            yield from names & known or {base}
            if names - known and names & known:
                yield base


def test_every_module_is_seen():
    known = {"fp4.emulate.matmul", "tools.scaling.law", "data.tokens", "tools.bench"}
    assert known <= set(modules())
    assert set(METHOD) == {name for name in modules() if name.split(".")[0] == "fp4"}


@pytest.mark.parametrize("module", modules())
def test_imports_go_one_way(module):
    package = module.split(".")[0]
    found = set(imports(module)) - {module}
    packages = {name.split(".")[0] for name in found}
    if package == "fp4":
        lower = METHOD[:METHOD.index(module)]
        allowed = set(lower) | ({"fp4"} if module != "fp4" else set())
        assert packages <= {"fp4"} and found <= allowed, found
    elif package == "data":
        assert packages <= {"data"}, found
    elif package == "model":
        assert packages <= {"fp4"}, found
    elif module in TOOLS_AT_THE_TOP:
        assert packages <= {"data", "fp4", "tools"}, found
        below = {"data.files", "data.locks", "data.signals", "fp4.axes", "fp4.recipes"}
        assert found <= below | TOOLS_AT_THE_TOP, found
    elif package == "quartet":
        tools = {name for name in found if name.startswith("tools")}
        assert tools <= TOOLS_AT_THE_TOP | TOOLS_INSIDE, found
        at_the_top = {name for name in imports(module, True) if name.startswith("tools")}
        assert at_the_top == TOOLS_AT_THE_TOP
    elif module in TOOLS_INSIDE:
        assert "quartet" not in packages, found


def test_the_table_of_recipes_needs_no_torch():
    code = "import sys, fp4; fp4.recipe('fp4', scale='nearest'); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_the_reading_budget_holds():
    command = [sys.executable, "tools/style.py"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_the_reading_order_of_the_readme_tells_the_length_of_the_files():
    rows = re.findall(r"^\| (\[.*?) \| (\d+) \| \d+ \|", (ROOT / "README.md").read_text(), re.M)
    assert len(rows) == 8
    for links, lines in rows:
        paths = re.findall(r"\]\((.*?)\)", links)
        actual = sum((ROOT / path).read_text().count("\n") for path in paths)
        assert abs(int(lines) - actual) <= actual / 10, links
