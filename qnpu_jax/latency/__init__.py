"""Latency, measured on a CPU or a phone, or estimated by a roofline."""

from qnpu_jax.latency.phone_log import Timing

__all__ = ["Timing"]
