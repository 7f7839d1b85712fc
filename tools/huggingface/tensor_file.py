"""
Write a file of tensors in the format safetensors, without its package.

The file begins with 8 bytes that say how long the header is, the lowest byte first. The header is
JSON: {name: {"dtype", "shape", "data_offsets": [first byte, last byte + 1]}}, where bytes are
counted from its end. After it come the values of the tensors, one tensor after the other.
"""
import json
import os

import torch

DTYPES = {torch.bfloat16: "BF16", torch.uint8: "U8"}


def write(path, tensors):
    """Writes {name: tensor}, of the dtypes above, and forces it to the disk."""
    header = {"__metadata__": {"format": "pt"}}     # which package to make tensors with: PyTorch
    end = 0
    for name, tensor in tensors.items():
        start = end
        end = start + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape),
                        "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)                 # The values begin where 8 divides their place.
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        for tensor in tensors.values():
            # numpy has no bfloat16, but bytes.
            file.write(tensor.contiguous().view(torch.uint8).numpy())
        file.flush()
        os.fsync(file.fileno())
