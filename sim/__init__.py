"""A bit-exact, jitted simulator of integer decoder models.

    from sim.run import compile_model, run
    program = compile_model(model, model.decoder(tokens=128), "litert_ref")
    codes = run(program, ids, keep=lambda name: name.startswith("layers.0."))

It sees op types, graphs and frozen integers, never the float definitions: shared rounding code
would hide shared mistakes.
"""
