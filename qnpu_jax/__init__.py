"""A decoder LLM made fully static and integer-only, for NPUs.

Read in this order: `ops` (the closed set of operations), `graph` and `decoder` (the model as data),
`quant` and `resolve` (scales and their ties), `evaluate` (float and fake-quantized), `rotate`,
`prefix` and `calibrate` (what makes static scales possible), `recipes` and `learn` (what is learned
of them), `weights` (rounding with the data in view), `freeze` (rounding, once), `tflite` (the
file). `pipeline` puts them in order, `job` adds proof and measurement, `diagnose`
and `attribution` tell where precision is lost, `cli` is the command.
The integer simulator is the package `sim`.
"""
