"""The reading budget: lines a file, and the path quartet -> model -> linear -> reference. Fails above."""
import glob, os, sys

os.chdir(os.path.join(os.path.dirname(os.path.abspath(__file__)), ".."))
BUDGET = {"quartet.py": 350, "model.py": 200, "fp4/bench.py": 400, "scaling/__main__.py": 180}
KIND = {"py": 150, "cu": 300, "cuh": 300, "cpp": 300, "h": 100}              # of the files in fp4/ and scaling/
over = False
for path in ["quartet.py", "model.py", *sorted(glob.glob("fp4/*.*") + glob.glob("data/*.py") + glob.glob("scaling/*.py"))]:
    limit = BUDGET.get(path, 300 if path.startswith("data") else KIND[path.split(".")[-1]])
    n = sum(1 for _ in open(path))
    over |= n > limit
    print(f"{n:5d} of {limit}  {path}" + "  OVER" * (n > limit))
path = ["quartet.py", "model.py", "fp4/linear.py", "fp4/reference.py"]
n = sum(sum(1 for _ in open(p)) for p in path)
over |= n > 730
print(f"{n:5d} of 730  {' -> '.join(path)}" + "  OVER" * (n > 730))
sys.exit(over)
