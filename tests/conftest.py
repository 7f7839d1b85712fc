"""What every test file shares."""
import os
import sys

# Tensors are small here. With a second thread on two busy cores the tests take 5 times longer.
os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), ".."))


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: compiles or simulates CUDA; `make test-all` runs it")
