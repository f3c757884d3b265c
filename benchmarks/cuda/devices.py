"""Two data-centre devices as their makers describe them, and flash-attention's figures on them.

A100 SXM 80 GB: "NVIDIA A100 Tensor Core GPU Architecture" (2020). H200 SXM: "NVIDIA H100 Tensor
Core GPU Architecture" (2022), whose chip it has, and 4.8 TB/s by its data sheet (2024). Rates of
instructions a clock and multiprocessor: CUDA C++ Programming Guide, table "Throughput of Native
Arithmetic Instructions". Dense rates throughout.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Device:
    """Peak rates of the whole device, a second."""

    name: str
    capability: int  # 80 for 8.0
    multiprocessors: int
    memory: float  # bytes from and to device memory
    cache: float  # bytes from and to the L2 cache: 5120 a clock
    tensor: float  # float16 and bfloat16 flop on the tensor cores, as far as mma.sync reaches
    full_tensor: float  # by any instruction
    shared: float  # bytes from and to shared memory: 128 a clock and multiprocessor
    issue: float  # instructions of one thread, of any kind: 128 a clock and multiprocessor
    special: float  # exponentials, logarithms, reciprocals: 16 a clock and multiprocessor
    flash_attention: float  # flop of its forward, at the longest sequences and depths

    def rate(self, resource: str) -> float:
        """Of one of a Work's counts."""
        return float(getattr(self, resource))


# flash-attention: "FlashAttention-2" (arXiv:2307.08691), abstract: 50-73% of an A100's 312 Tflop/s;
# "FlashAttention-3" (arXiv:2407.08608), abstract: 75% of an H100's, 740 Tflop/s.
# mma.sync on an H100 reaches 62.9% of what wgmma does: arXiv:2402.13499.
A100 = Device(
    name="A100",
    capability=80,
    multiprocessors=108,
    memory=2.039e12,
    cache=5120 * 1.41e9,
    tensor=312e12,
    full_tensor=312e12,
    shared=128 * 108 * 1.41e9,
    issue=128 * 108 * 1.41e9,
    special=16 * 108 * 1.41e9,
    flash_attention=0.73 * 312e12,
)
H200 = Device(
    name="H200",
    capability=90,
    multiprocessors=132,
    memory=4.8e12,
    cache=5120 * 1.83e9,  # taken to be as wide as an A100's
    tensor=0.629 * 989.4e12,
    full_tensor=989.4e12,
    shared=128 * 132 * 1.83e9,
    issue=128 * 132 * 1.83e9,
    special=16 * 132 * 1.83e9,
    flash_attention=740e12,
)
DEVICES = (A100, H200)
