"""What a log of benchmark_model says: times, and what a delegate took."""

import pytest
from phone_logs import LITERT, NEW, NNAPI_APPLIED, NNAPI_REFUSED, OLD, QNN_NONE, TIMES, replacing

from qnpu_jax.errors import UserError
from qnpu_jax.latency import phone_log
from qnpu_jax.latency.phone_log import Delegation, PhoneTiming


def test_the_log_of_an_old_program():
    got = phone_log.timing(OLD, "nnapi", "decode", 1, 1)
    assert got == PhoneTiming(
        "nnapi", "decode", 1, 12167.6e-6, Delegation(False), runs=75, init=0.126059,
        first=0.032942, memory_mb=64.8633,
    )  # fmt: skip
    assert got.tokens_per_second == pytest.approx(1 / 0.0121676)
    assert str(got.delegation) == "a part"


def test_the_log_of_a_new_program():
    got = phone_log.timing(NEW, "cpu", "prefill_128", 128, 1)
    assert got == PhoneTiming(
        "cpu", "prefill_128", 128, 0.899641, Delegation(False, 60, 80, 7), runs=50, init=0.614333,
        first=0.905463, p5=0.898333, median=0.899281, p95=0.904305, memory_mb=73.4102,
    )  # fmt: skip
    assert got.tokens_per_second == pytest.approx(128 / 0.899281)
    assert str(got.delegation) == "60 of 80 nodes"
    assert phone_log.timing(NEW, "cpu", "decode", 1, 0).delegation.replaced == 70


def test_the_log_of_litert_s_program():
    assert phone_log.timing(LITERT, "dispatch", "decode", 1, 1) == PhoneTiming(
        "dispatch", "decode", 1, 7.4302, Delegation(False, 2, 3, 3), runs=10, init=23.74473,
        first=7.44104, memory_mb=6391.74,
    )  # fmt: skip
    assert phone_log.taken(LITERT, "dispatch", 0) == Delegation(True, 1, 1, 1)


def test_the_summary_alone():
    got = phone_log.timing(TIMES, "cpu", "decode", 1, 1)
    assert (got.init, got.first, got.average) == (5685e-6, 18535e-6, 14575.2e-6)
    assert got.runs is got.median is got.memory_mb is None
    assert got.delegation == Delegation(None) and str(got.delegation) == "not said"


def test_large_times_are_in_scientific_notation():
    log = TIMES.replace("14575.2", "1.04552e+06").replace("14462.3", "1.1e+06")
    assert phone_log.timing(log, "cpu", "decode", 1, 1).average == pytest.approx(1.04552)


@pytest.mark.parametrize(
    ("log", "delegate", "expected"),
    [
        (replacing("TfLiteNnapiDelegate", 31, 31), "nnapi", Delegation(True, 31, 31, 1)),
        (replacing("TfLiteNnapiDelegate", 5, 64), "nnapi", Delegation(False, 5, 64, 1)),
        (replacing("TfLiteQnnDelegate", 329, 329, ""), "qnn", Delegation(True, 329, 329)),
        (NNAPI_APPLIED + "completely executed by the delegate.\n", "nnapi", Delegation(True)),
        (
            replacing("TfLiteNnapiDelegate", 9, 9) + replacing("TfLiteNnapiDelegate", 3, 9),
            "nnapi",
            Delegation(False, 3, 9, 1),
        ),
        (
            "INFO: Explicitly applied EXTERNAL delegate, and the model graph will be completely"
            " executed by the delegate.\n",
            "qnn",
            Delegation(True),
        ),
        (NNAPI_REFUSED.replace("NNAPI", "XNNPACK"), "cpu", Delegation(False)),
    ],
)
def test_what_a_delegate_took(log, delegate, expected):
    assert phone_log.taken(log, delegate, 1) == expected


@pytest.mark.parametrize(
    ("log", "delegate", "kernel"),
    [
        (NNAPI_REFUSED, "nnapi", "TfLiteNnapiDelegate"),
        # Seen on a Tensor G3: all nodes are said to be replaced, and then none is.
        (
            replacing("TfLiteNnapiDelegate", 31, 31) + NNAPI_REFUSED,
            "nnapi",
            "TfLiteNnapiDelegate",
        ),
        (replacing("TfLiteXNNPackDelegate", 31, 31), "nnapi", "TfLiteNnapiDelegate"),
        ("", "nnapi", "TfLiteNnapiDelegate"),
        (QNN_NONE, "qnn", "TfLiteQnnDelegate"),
        (
            "INFO: Replacing 5 node(s) with delegate (TfLiteNnapiDelegate) node, yielding 1"
            " partitions.\nERROR: Restored original execution plan after delegate application"
            " failure.\n",
            "nnapi",
            "TfLiteNnapiDelegate",
        ),
        (
            replacing("DispatchDelegate", 1, 1)
            + "ERROR: Failed to create a dispatch delegate kernel\n",
            "dispatch",
            "DispatchDelegate",
        ),
        (LITERT.split("VERBOSE", 2)[2].replace("Dispatch", "X"), "dispatch", "DispatchDelegate"),
        (replacing("DispatchDelegate", 0, 9), "dispatch", "DispatchDelegate"),
        (
            replacing("DispatchDelegate", 9, 9, ", yielding 1 partitions for subgraph 0."),
            "dispatch",
            "DispatchDelegate",
        ),
    ],
)
def test_a_delegate_that_left_the_graph_to_the_cpu_is_refused(log, delegate, kernel):
    message = f"{delegate}: {kernel} took no node, so what was timed is the CPU; expected"
    with pytest.raises(UserError, match=message):
        phone_log.timing(log + TIMES, delegate, "decode", 1, 1)


def test_a_program_that_ignores_the_signature_is_refused():
    log = "WARN: Unconsumed cmdline flags: --foo=1 --signature_to_run_for=decode\n" + NEW
    with pytest.raises(UserError, match="does not know --signature_to_run_for; expected a current"):
        phone_log.timing(log, "cpu", "decode", 1, 1)
    harmless = "WARN: Unconsumed cmdline flags: --use_xnnpack=true\n" + NEW
    assert phone_log.timing(harmless, "cpu", "decode", 1, 1).runs == 50


def test_the_wrong_program_is_refused():
    log = "WARN: Unconsumed cmdline flags: --use_npu=true\n" + NEW
    with pytest.raises(UserError, match=r"does not know --use_npu; .*LiteRT's for dispatch"):
        phone_log.timing(log, "dispatch", "decode", 1, 1)


def test_a_log_without_times_is_refused():
    log = "INFO: STARTING!\nERROR: Failed to allocate tensors!\nERROR: Benchmarking failed.\n"
    message = r"benchmark_model, cpu decode: no times, it said 'ERROR: Failed to allocate tensors!'"
    with pytest.raises(UserError, match=message):
        phone_log.timing(log, "cpu", "decode", 1, 1)
    with pytest.raises(UserError, match="it said 'nothing'"):
        phone_log.timing(" \n", "cpu", "decode", 1, 1)
