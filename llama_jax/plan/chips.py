"""The accelerators: memory, peak rates and wires of one JAX device.

A TPU v4 or v5p chip has two TensorCores that are one device; a v7x chip has two devices, each with half of everything.

Sources:
    [g] docs.cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e,tpu7x}: peaks, HBM bandwidth, ICI and DCN per chip.
    [b] jax-ml/scaling-book, tpus.md (one-way bandwidth of an ICI link; DCN per host) and gpus.md (NVLink, InfiniBand; memory
        bandwidth and dense bfloat16 and int8 peaks of A100, H100, H200 and B200, to two digits; further digits are as quoted).
    [c] what libtpu 0.0.42.1 prints as "available HBM" when a program compiled ahead of time is too large.
    [q] as commonly quoted: NVIDIA's own documents were not read. Every such number is named in `assumed`.
    [x] device_memory_size in openxla/xla, xla/backends/gpu/target_config/specs/{a100_sxm_40,a100_sxm_80,h100_sxm,b200}.txtpb.
    [s] memory that nvidia-smi prints for the card, as quoted, less what the driver keeps.
"""

import dataclasses

GIB = 2**30
GPU_MEMORY_SHARE = 0.9  # XLA_PYTHON_CLIENT_MEM_FRACTION=0.9; JAX takes 0.75 of a GPU unless told (docs.jax.dev, GPU memory)
TPU_FLOAT32_PASSES = 6  # jax.lax.Precision.HIGHEST multiplies float32 in six bfloat16 passes
DRIVER_BYTES = 0.55 * GIB  # nvidia-smi prints 79.65 GiB for an H100, of which CUDA and XLA see 79.11 [x]


@dataclasses.dataclass(frozen=True)
class Chip:
    """One JAX device.

    Attributes:
        name: family, as in names of topologies.
        hbm_bytes: what programs may use, as the compiler counts it.
        hbm_bandwidth: bytes/s.
        peak_bfloat16, peak_int8, peak_float32: dense matrix products, FLOP/s (int8: operations/s).
        link_bandwidth: bytes/s one way; of an ICI link to a neighbour, or of a GPU into its node.
        network_bandwidth: bytes/s one way out of the slice or node, this device's share.
        assumed: names of fields above for which no primary source was read; the comments beside them say what they rest on.
        devices_per_chip: 2 where a chip is two devices.
        is_tpu: on a torus of ICI links and compiled for by libtpu; otherwise a GPU in a node.
    """

    name: str
    hbm_bytes: float
    hbm_bandwidth: float
    peak_bfloat16: float
    peak_int8: float
    peak_float32: float
    link_bandwidth: float
    network_bandwidth: float
    assumed: tuple[str, ...] = ()
    devices_per_chip: int = 1
    is_tpu: bool = False

    def peak(self, dtype: str) -> float:
        """FLOP/s of matrix products in a compute dtype. int8 weights are multiplied in bfloat16."""
        return self.peak_float32 if dtype == "float32" else self.peak_bfloat16


def _tpu(
    name: str, hbm_gib: float, hbm_gb_s: float, bf16: float, int8: float, link_gb_s: float, dcn_gbit_s: float, **more
) -> Chip:
    """Rates per device in the units of the tables: GB/s, TFLOP/s, Gbit/s."""
    return Chip(
        name, hbm_gib * GIB, hbm_gb_s * 1e9, bf16 * 1e12, int8 * 1e12, bf16 * 1e12 / TPU_FLOAT32_PASSES,
        link_gb_s * 1e9, dcn_gbit_s * 1e9 / 8, is_tpu=True, **more,
    )  # fmt: skip


def _gpu(
    name: str, memory: float, hbm_gb_s: float, bf16: float, int8: float, f32: float, link_gb_s: float, nic_gbit_s: float, **more
) -> Chip:
    """Memory in bytes; rates in GB/s, TFLOP/s, Gbit/s."""
    return Chip(
        name, memory * GPU_MEMORY_SHARE, hbm_gb_s * 1e9, bf16 * 1e12, int8 * 1e12, f32 * 1e12,
        link_gb_s * 1e9, nic_gbit_s * 1e9 / 8, **more,
    )  # fmt: skip


A100_QUOTED = ("peak_float32", "network_bandwidth")
ALL_QUOTED = (
    "hbm_bytes", "hbm_bandwidth", "peak_bfloat16", "peak_int8", "peak_float32", "link_bandwidth", "network_bandwidth",
)  # fmt: skip

CHIPS: dict[str, Chip] = {
    chip.name: chip
    for chip in (
        # HBM [c]; bandwidth and peaks [g]; links [b]. DCN: v4 by [b] (25 GB/s a host of 4 chips), v5e 6.4 Tbit/s a pod of 256.
        _tpu("v4", 30.75, 1200, 275, 275, 45, 50),
        _tpu("v5e", 15.75, 819, 197, 393, 45, 25),
        _tpu("v5p", 95.74, 2765, 459, 918, 90, 50),  # int8 [b]
        _tpu("v6e", 31.25, 1638, 918, 1836, 90, 100),
        # Per chip 2307 TFLOP/s, 7380 GB/s, DCN 100 Gbit/s, ICI 1200 GB/s as v5p [g], so a link as v5p's, shared by two devices.
        # int8 is not published: taken as bfloat16's.
        _tpu("v7x", 94.75, 3690, 1153.5, 1153.5, 45, 50, devices_per_chip=2, assumed=("peak_int8", "link_bandwidth")),
        # Memory [x]; NVLink one way, and a 400 Gbit/s InfiniBand port a GPU (A100: 200) [b; A100's q]; float32 [q].
        _gpu("a100-40", 42_331_013_120, 1555, 312, 624, 19.5, 300, 200, assumed=("hbm_bandwidth", *A100_QUOTED)),
        _gpu("a100-80", 85_100_068_864, 2039, 312, 624, 19.5, 300, 200, assumed=A100_QUOTED),
        _gpu("h100", 84_942_979_072, 3350, 989, 1979, 67, 450, 400, assumed=("peak_float32",)),
        # Memory [s]
        _gpu("h200", 143_771 * 2**20 - DRIVER_BYTES, 4800, 989, 1979, 67, 450, 400, assumed=("hbm_bytes", "peak_float32")),
        _gpu("b200", 191_514_411_008, 8000, 2250, 4500, 80, 900, 400, assumed=("peak_float32",)),
        # All [q] and [s]. PCIe 4 and 3 x16 one way; a node's 100 Gbit/s port shared by 8 (L4) and 4 (T4) GPUs.
        _gpu("l4", 23_034 * 2**20 - DRIVER_BYTES, 300, 121, 242, 30.3, 32, 12.5, assumed=ALL_QUOTED),
        # No bfloat16 in its tensor cores (Turing): XLA computes it in float32.
        _gpu("t4", 15_360 * 2**20 - DRIVER_BYTES, 320, 8.1, 130, 8.1, 16, 25, assumed=ALL_QUOTED),
    )
}  # fmt: skip
