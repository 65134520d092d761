# For test_exchange.cpp: safetensors files as Python's own library reads and writes them.
#   exchange.py dump FILE OUT     every tensor: a line "name dtype shape bytes" and then the bytes
#   exchange.py write FROM OUT DTYPE [EXTRA...]   FROM again, in F32, F16 or BF16, and with tensors that EXTRA names:
#       head (the embedding again), rotary (a table), wrong_head, surplus, nan, pad (64 more rows of the embedding), -NAME (left out)
import sys

import numpy
import safetensors
from safetensors.numpy import load_file


def dump(source, out):
    with open(out, "wb") as file:
        for name, tensor in sorted(safetensors.deserialize(open(source, "rb").read())):
            file.write(f"{name} {tensor['dtype']} {list(tensor['shape'])} {len(tensor['data'])}\n".replace(", ", ",").encode() + bytes(tensor["data"]))


def half(tensor, dtype):
    if dtype == "BF16":  # to nearest, ties to even
        bits = numpy.ascontiguousarray(tensor, numpy.float32).view(numpy.uint32).astype(numpy.uint64)
        return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(numpy.uint16)
    return tensor.astype(numpy.float16 if dtype == "F16" else numpy.float32)


def write(source, out, dtype, extra):
    tensors = load_file(source)
    embedding = tensors["model.embed_tokens.weight"]
    for name in extra:
        if name == "head":
            tensors["lm_head.weight"] = embedding.copy()
        elif name == "wrong_head":
            tensors["lm_head.weight"] = embedding + 1
        elif name == "rotary":
            tensors["model.encoder.layers.0.self_attn.rotary_emb.inv_freq"] = numpy.ones(2, numpy.float32)
        elif name == "surplus":
            tensors["model.upper_layers.7.0.mlp.up_proj.weight"] = numpy.ones((2, 2), numpy.float32)
        elif name == "pad":
            tensors["model.embed_tokens.weight"] = numpy.concatenate([embedding, numpy.ones((64, embedding.shape[1]), numpy.float32)])
        elif name == "nan":
            tensors["model.norm.weight"][0] = numpy.nan
        else:
            del tensors[name[1:]]
    kind = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}[dtype]
    values, kept = {}, []
    for name, tensor in tensors.items():
        kept.append(half(tensor, dtype))
        if hasattr(safetensors, "TensorSpec"):  # 0.8
            values[name] = safetensors.TensorSpec(dtype=kind, shape=tensor.shape, data_ptr=kept[-1].ctypes.data, data_len=kept[-1].nbytes)
        else:
            values[name] = {"dtype": kind, "shape": list(tensor.shape), "data": kept[-1].tobytes()}
    with open(out, "wb") as file:
        file.write(safetensors.serialize(values, {"format": "pt"}))


if sys.argv[1] == "dump":
    dump(*sys.argv[2:])
else:
    write(sys.argv[2], sys.argv[3], sys.argv[4], sys.argv[5:])
