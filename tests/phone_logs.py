"""What benchmark_model and benchmark_litert_model print: logs of real runs, and lines of them."""

OLD = """
STARTING!
Log parameter values verbosely: [0]
Loaded model /data/local/tmp/qnpu/model.tflite
INFO: Created TensorFlow Lite delegate for NNAPI.
Explicitly applied NNAPI delegate, and the model graph will be partially executed by the delegate \
w/ 44 delegate kernels.
Running benchmark for at least 1 iterations and at least 0.5 seconds but terminate if exceeding \
150 seconds.
count=40 first=32942 curr=12594 min=11340 max=32942 avg=12581.9 std=3331

Running benchmark for at least 50 iterations and at least 1 seconds but terminate if exceeding 150 \
seconds.
count=75 first=12840 curr=11853 min=11787 max=13649 avg=12167.6 std=325

Inference timings in us: Init: 126059, First inference: 32942, Warmup (avg): 12581.9, Inference \
(avg): 12167.6
Peak memory footprint (MB): init=6.44141 overall=64.8633
"""
NEW = """
INFO: STARTING!
INFO: Signature to run: [decode]
INFO: Use xnnpack: [1]
INFO: Loaded model /data/local/tmp/qnpu/model.tflite
INFO: Created TensorFlow Lite XNNPACK delegate for CPU.
INFO: XNNPACK delegate created.
VERBOSE: Replacing 70 out of 80 node(s) with delegate (TfLiteXNNPackDelegate) node, yielding 9 \
partitions for subgraph 0.
VERBOSE: Replacing 60 out of 80 node(s) with delegate (TfLiteXNNPackDelegate) node, yielding 7 \
partitions for subgraph 1.
INFO: Explicitly applied XNNPACK delegate, and the model graph will be partially executed by the \
delegate w/ 3 delegate kernels.
INFO: count=1 curr=905463 p5=905463 median=905463 p95=905463

INFO: count=50 first=900416 curr=898333 min=898007 max=906121 avg=899641 std=1549 p5=898333 \
median=899281 p95=904305

INFO: Inference timings in us: Init: 614333, First inference: 905463, Warmup (avg): 905463, \
Inference (avg): 899641
INFO: Memory footprint delta from the start of the tool (MB): init=54.2852 overall=73.4102
"""
LITERT = """
VERBOSE: Replacing 1 out of 1 node(s) with delegate (DispatchDelegate) node, yielding 1 partitions \
for subgraph 0 (main).
VERBOSE: Replacing 2 out of 3 node(s) with delegate (DispatchDelegate) node, yielding 3 partitions \
for subgraph 1 (decode).
========== BENCHMARK RESULTS ==========
INFO: [benchmark_litert_model.h:92] Signature name:       decode
INFO: [benchmark_litert_model.h:94] Model initialization: 23744.73 ms
INFO: [benchmark_litert_model.h:96] Warmup (first):       7441.04 ms
INFO: [benchmark_litert_model.h:98] Warmup (avg):         7441.04 ms (1 runs)
INFO: [benchmark_litert_model.h:100] Inference (avg):      7430.20 ms (10 runs)
INFO: [benchmark_litert_model.h:104] Inference (min):      7416.40 ms
INFO: [benchmark_litert_model.h:128] Overall footprint:    6391.74 MB
"""
TIMES = (
    "Inference timings in us: Init: 5685, First inference: 18535, Warmup (avg): 14462.3,"
    " Inference (avg): 14575.2\n"
)
NNAPI_APPLIED = "INFO: Explicitly applied NNAPI delegate, and the model graph will be "
NNAPI_REFUSED = (
    "INFO: Though NNAPI delegate is explicitly applied, the model graph will not be executed by"
    " the delegate.\n"
)
QNN_NONE = (
    "INFO: EXTERNAL delegate created.\n"
    "INFO: TfLiteQnnDelegate delegate: 0 nodes delegated out of 31 nodes with 0 partitions.\n"
    "INFO: Though EXTERNAL delegate is explicitly applied, the model graph will not be executed by"
    " the delegate.\n"
    "VERBOSE: Replacing 31 out of 31 node(s) with delegate (TfLiteXNNPackDelegate) node, yielding 1"
    " partitions for the whole graph.\n"
)


def replacing(kernel, taken, nodes, rest=", yielding 1 partitions for the whole graph."):
    return (
        f"VERBOSE: Replacing {taken} out of {nodes} node(s) with delegate ({kernel}) node{rest}\n"
    )
