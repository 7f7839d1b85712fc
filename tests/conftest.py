import os, sys

os.environ.setdefault("OMP_NUM_THREADS", "1")                 # small tensors: on two busy cores a second thread makes it 5 times slower
sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), ".."))
