"""Latency, measured on a CPU or a phone, or estimated by a roofline."""

from qnpu_jax.latency.cpu import CpuTiming, time_against_float
from qnpu_jax.latency.phone import PhoneRequest, time_on_phone
from qnpu_jax.latency.phone_log import PhoneTiming

__all__ = ["CpuTiming", "PhoneRequest", "PhoneTiming", "time_against_float", "time_on_phone"]
