"""Makes `stored/`: weights as other libraries store them, and what they read there themselves.

Needs torch and compressed-tensors (neither is needed to run the tests):

    python tests/golden/make_stored.py

`torch.bin` is what `torch.save` makes of a state dict, with views, a tied tensor and all dtypes.
`compressed.safetensors` has for each scheme `<scheme>/<part>`, and `<scheme>/expected` float32.
"""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path

import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from safetensors.torch import save_file

FOLDER = Path(__file__).parent / "stored"
OUT, IN, GROUP = 24, 32, 8


def make_torch_file(generator: torch.Generator) -> None:
    """A state dict whose tensors are not all plain."""
    both = torch.randn(6, 8, generator=generator)
    embedding = torch.randn(5, 4, generator=generator).to(torch.bfloat16)
    tensors = OrderedDict(
        plain=torch.randn(3, 4, generator=generator),
        half=torch.randn(7, generator=generator).half(),
        embedding=embedding,
        tied=embedding,
        transposed=both.T,
        part=both[2:5, 1:],
        whole=torch.arange(4, dtype=torch.int32),
        parameter=torch.nn.Parameter(torch.randn(2, 2, generator=generator)),
        scalar=torch.tensor(2.5),
    )
    torch.save(tensors, FOLDER / "torch.bin")
    plain = {name: tensor.detach().float().contiguous() for name, tensor in tensors.items()}
    save_file(
        {name: tensor.clone() for name, tensor in plain.items()}, FOLDER / "torch.safetensors"
    )


def make_compressed(generator: torch.Generator) -> None:
    """One weight in each of compressed-tensors' formats."""
    weight = torch.randn(OUT, IN, generator=generator)
    schemes = {
        "w4": ("pack-quantized", {"num_bits": 4, "strategy": "group", "group_size": GROUP}),
        "w4-zeros": (
            "pack-quantized",
            {"num_bits": 4, "strategy": "group", "group_size": GROUP, "symmetric": False},
        ),
        "w8-channel": ("pack-quantized", {"num_bits": 8, "strategy": "channel"}),
        "int8": ("int-quantized", {"num_bits": 8, "strategy": "channel"}),
        "fp8": ("float-quantized", {"num_bits": 8, "type": "float", "strategy": "channel"}),
        "fp8-tensor": ("float-quantized", {"num_bits": 8, "type": "float", "strategy": "tensor"}),
    }
    tensors: dict[str, torch.Tensor] = {}
    for name, (form, options) in schemes.items():
        args = QuantizationArgs(**{"symmetric": True, **options})
        if args.strategy == "group":
            low = weight.reshape(OUT, -1, GROUP).amin(-1)
            high = weight.reshape(OUT, -1, GROUP).amax(-1)
        elif args.strategy == "channel":
            low, high = weight.amin(1, keepdim=True), weight.amax(1, keepdim=True)
        else:
            low, high = weight.min().reshape(1), weight.max().reshape(1)
        largest = 448.0 if args.type == "float" else 2 ** (args.num_bits - 1) - 1
        zeros = None
        if args.symmetric:
            scale = torch.maximum(-low, high) / largest
        else:
            scale = (high - low) / (2**args.num_bits - 1)
            zeros = (-(2 ** (args.num_bits - 1)) - low / scale).round().clamp(-8, 7).to(torch.int8)
        state = {"weight": weight.clone(), "weight_scale": scale}
        if zeros is not None:
            state["weight_zero_point"] = zeros
        scheme = QuantizationScheme(targets=["Linear"], weights=args, format=form)
        compressor = BaseCompressor.get_value_from_registry(form)
        stored = compressor.compress(state, scheme)
        expected = compressor.decompress(stored, scheme)["weight"]
        tensors |= {f"{name}/{part}": tensor.contiguous() for part, tensor in stored.items()}
        tensors[f"{name}/expected"] = expected.float().contiguous()
        assert (expected - weight).abs().max() < 0.3
    save_file(tensors, FOLDER / "compressed.safetensors")


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    seeded = torch.Generator().manual_seed(0)
    make_torch_file(seeded)
    make_compressed(seeded)
    for file in FOLDER.iterdir():
        file.chmod(0o644)
