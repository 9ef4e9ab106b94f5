"""Inference requests of the open inference protocol, piece by piece."""

from __future__ import annotations

H = 256
DATA = bytes(range(256)) * 2


def hidden(nbytes=2 * H, shape=(1, H), datatype="BF16", **more):
    parameters = {"binary_data_size": nbytes, **more}
    return {"name": "hidden_states", "shape": list(shape), "datatype": datatype, "parameters": parameters}


def as_json(name, shape, datatype, data, **parameters):
    tensor = {"name": name, "shape": shape, "datatype": datatype, "data": data}
    return tensor | ({"parameters": parameters} if parameters else {})


ONES = as_json("hidden_states", [1, H], "FP32", [1.0] * H)
