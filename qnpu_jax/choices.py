"""Words that a caller chooses from, as types.

They stand in a file that imports nothing of ours, so that the command line can list them without
loading JAX.
"""

from __future__ import annotations

from typing import Literal

Positions = Literal["all", "last"]
"""Positions of a sequence that logits are given of."""

KernelSet = Literal["ref", "opt", "xnn", "tf"]
"""Kernels that run a file: LiteRT's reference ones; its optimized ones; XNNPACK's, where it takes
an op, which is what an application gets; the reference kernels of TensorFlow's own interpreter."""

FormName = Literal["plain", "unpacked", "hexagon"]
"""How a file holds a model: 4-bit weights two to a byte; one to a byte for prefill, which is faster
on CPUs with AMX; norms as Hexagon's own op."""

EffortName = Literal["none", "fast", "full", "best"]
"""How much is learned: nothing; what two CPU cores learn in minutes; all of the recipe, in
minutes of a GPU; the same on far more text."""

Snapdragon = Literal[
    "SM8350", "SM8450", "SM8475", "SM8550", "SM8650", "SM8750", "SM8845", "SM8850", "SA8255",
    "SA8295",
]  # fmt: skip
"""SoCs that the compiler plugin of ai-edge-litert 2.3 compiles for; SA: of cars."""

EthosU = Literal[
    "ethos-u65-256",
    "ethos-u65-512",
    "ethos-u85-128",
    "ethos-u85-256",
    "ethos-u85-512",
    "ethos-u85-1024",
    "ethos-u85-2048",
]
"""Arm's NPUs by their MACs a cycle."""

PlanTarget = Literal[
    "SM8650", "SM8750", "SM8850", "SA8255", "QCS9075", "SA8295", "ethos-u85-256", "ethos-u85-2048",
    "int8", "xnnpack",
]  # fmt: skip
"""Machines that a plan can be for: Snapdragons, Arm's NPUs, a machine of int8 kernels alone, a CPU
with XNNPACK."""

Delegate = Literal["cpu", "nnapi", "qnn", "dispatch"]
"""Who runs a model on a phone: XNNPACK; Android's NNAPI; Qualcomm's TFLite delegate; LiteRT's
dispatch, for a file that `qnpu compile` wrote."""
