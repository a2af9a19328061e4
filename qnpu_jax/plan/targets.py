"""Targets of a plan: the widths that their kernels have, and where their seconds come from.

Which tensors of a plan a target has no kernel for, and what is done then: `feasible`.
Seconds are those of `latency.roofline` (Snapdragons) and `latency.ethos_rates` (Arm's compiler).
For other targets there are none: a plan for them has a budget of size or of KL.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal

from qnpu_jax.errors import UserError
from qnpu_jax.latency import ethos_rates, roofline

Kernel = Literal["embedding", "linear", "product", "norm", "softmax", "elementwise"]
"""Kinds of kernels: GATHER, FULLY_CONNECTED, BATCH_MATMUL of two activations, an RMS norm that is
one op of the NPU, SOFTMAX, and all others that compute."""
A8, A16 = frozenset({8}), frozenset({8, 16})


@dataclass(frozen=True)
class Rates:
    """Rates that `costs.cost` estimates with.

        decode  = start + op ops + bytes / bandwidth
        prefill = start + op ops + max(bytes / bandwidth, sum_w MACs_w mac_w)

    Attributes:
      start: seconds a call, whatever the model.
      bandwidth: bytes per second.
      mac: seconds of a MAC, by bits of the activations.
      op: seconds of an op; None where only `start` is known, which the ops of a call share then.
      overlap: whether bytes move while MACs are done; else the two of a prefill add up.
      errors: largest relative error of decode and of prefill, each point predicted from the others.
    """

    start: float
    bandwidth: float
    mac: Mapping[int, float]
    op: float | None
    overlap: bool
    errors: tuple[float, float]


@dataclass(frozen=True)
class Target:
    """A machine that a plan is for.

    Attributes:
      name: word of the option `--soc`.
      title: the machine.
      weights: bits that weights of linears may have, per output channel.
      widths: bits that kernels have, with `but` for those that have fewer.
      source: where these facts are from.
      rates: of its seconds; None where there are none to go by.
      seconds: where the rates are from, or why there are none.
    """

    name: str
    title: str
    weights: frozenset[int]
    widths: frozenset[int]
    source: str
    rates: Rates | None
    seconds: str
    but: Mapping[Kernel, frozenset[int]] = field(default_factory=dict)

    def of(self, kernel: Kernel) -> frozenset[int]:
        """Bits that a kind of kernel has."""
        return self.but.get(kernel, self.widths)


def _snapdragon(name: str) -> Rates:
    soc = roofline.soc(name)
    mac = {bits: share / soc.rate.mean for bits, share in roofline.WIDTH_TIME.items()}
    errors = (soc.decode_error, soc.prefill_error)
    return Rates(soc.memory.start, soc.memory.bandwidth, mac, None, True, errors)


def _arm(name: str) -> Rates:
    fit = ethos_rates.FITS[name]
    return Rates(0.0, fit.bandwidth, fit.mac, fit.op, False, fit.errors)


_COMPILED = (
    "Qualcomm's compiler (onnxruntime-qnn 2.6.0) puts every op of {} on the NPU in one partition"
)
_GENIE = "fitted to rates of qai-hub-models"
_HEXAGONS = {
    "SM8650": ("Snapdragon 8 Gen 3, Hexagon v75", "fitted to recorded rates and ExecuTorch's"),
    "SM8750": ("Snapdragon 8 Elite, Hexagon v79", f"{_GENIE} and ExecuTorch's"),
    "SM8850": ("Snapdragon 8 Elite Gen 5, Hexagon v81", _GENIE),
    "SA8255": ("automotive, Hexagon v73", f"{_GENIE}, of SA8775P, the same NPU"),
    "QCS9075": ("Dragonwing IQ-9075, Hexagon v73", _GENIE),
}


def _targets() -> Iterator[Target]:
    four = frozenset({4, 8})
    for name, (title, seconds) in _HEXAGONS.items():
        source = _COMPILED.format("w4a8, w8a8, w4a16 and w8a16")
        if name == "QCS9075":
            source = "as SA8255, which has its Hexagon; no compiler for it was at hand"
        yield Target(name, title, four, A16, source, _snapdragon(name), seconds)
    yield Target(
        "SA8295",
        "automotive, Hexagon v68",
        four,
        A16,
        _COMPILED.format("w4a8s8 and w8a8s8")
        + "; it refuses 16-bit products ('Value 68, expected >= 73'; pytorch/executorch, issues"
        " 16427 and 17296)",
        _snapdragon("SA8295"),
        f"{_GENIE} of float16 activations, converted; two rates, which give no start, and so casts"
        " no price",
        {"product": A8},
    )
    for name in ethos_rates.FITS:
        yield Target(
            name,
            f"Arm Ethos-U85, {name.rsplit('-', 1)[1]} MACs a cycle",
            four,
            A16,
            "vela 5.2 puts every op on the NPU; 4-bit weights lie in INT8 tensors, which its coder"
            " compresses, as it crashes on INT4 ones",
            _arm(name),
            "fitted to vela's own estimates; no measurement",
        )
    yield Target(
        "int8",
        "a machine with int8 kernels alone: 8-bit weights and activations, 32-bit sums",
        A8,
        A8,
        "by definition",
        None,
        "no such machine, no rates",
    )
    yield Target(
        "xnnpack",
        "a CPU with XNNPACK under LiteRT",
        four,
        A8,
        "ai-edge-litert 2.3: int4 and int8 weights per channel, no int16 kernels; LiteRT's own"
        " prefill w8a8, whose stream has 16 bits, at a quarter of float32's speed",
        None,
        "CPUs differ in which of 4 and 8 bits is faster: `qnpu bench` measures the one at hand",
    )


TARGETS = {t.name: t for t in _targets()}
"""Targets by the name that `--soc` takes."""


def target(name: str) -> Target:
    """Returns a target by its name.

    Raises:
      UserError: no such target.
    """
    if name not in TARGETS:
        raise UserError(f"--soc {name}: unknown; expected one of {[*TARGETS]}; choose one of them")
    return TARGETS[name]
