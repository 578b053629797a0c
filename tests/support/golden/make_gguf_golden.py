"""Makes gguf_blocks.npz: random blocks of every GGUF type and what they stand for.

    pip install gguf==0.19.0 numpy && python tests/support/golden/make_gguf_golden.py

The values are those of the `gguf` package of llama.cpp, which the tests themselves do not need.
"""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
from gguf.quants import dequantize

# Type -> where its float16 scales are; the other bytes of a block may be anything.
TYPES: dict[str, tuple[int, ...]] = {
    "F32": (),
    "F16": (),
    "BF16": (),
    "Q4_0": (0,),
    "Q4_1": (0, 2),
    "Q5_0": (0,),
    "Q5_1": (0, 2),
    "Q8_0": (0,),
    "Q2_K": (80, 82),
    "Q3_K": (108,),
    "Q4_K": (0, 2),
    "Q5_K": (0, 2),
    "Q6_K": (208,),
    "IQ4_NL": (0,),
    "IQ4_XS": (0,),
    "MXFP4": (),
}


def main() -> None:
    random = np.random.default_rng(7)
    out = {}
    for name, scales in TYPES.items():
        kind = gguf.GGMLQuantizationType[name]
        elements, size = gguf.GGML_QUANT_SIZES[kind]
        if elements == 1:
            data = random.normal(0, 1, (2, 32)).astype(np.float32)
            if name == "BF16":
                data = gguf.quants.quantize(data, kind)
            elif name == "F16":
                data = data.astype(np.float16)
        else:
            data = random.integers(0, 256, (2 * (1 if elements == 256 else 2), size), np.uint8)
            for at in scales:
                scale = random.normal(0, 0.1, (len(data), 1)).astype(np.float16)
                data[:, at : at + 2] = scale.view(np.uint8)
            if name == "MXFP4":
                data[:, 0] = (0, 121, 124, 127)
            data = data.reshape(2, -1)
        out[f"{name}.values"] = dequantize(data, kind).astype(np.float32)
        out[f"{name}.data"] = data.view(np.uint8).reshape(2, -1)
    np.savez_compressed(Path(__file__).with_name("gguf_blocks.npz"), **out)


if __name__ == "__main__":
    main()
