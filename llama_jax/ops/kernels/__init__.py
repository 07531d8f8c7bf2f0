"""What a platform multiplies and attends with faster than XLA by itself, one file each, and whether it works (probe)."""

from typing import Literal

# Of programs that may use them: whether; "cudnn": prompts are read by cuDNN's attention, too (probe.choose_kernels).
Kernels = bool | Literal["cudnn"]
