"""Learning: rotations, scales, biases and rounding by gradient descent through the fake-quantized
decoder.

`parameters` says what can move and what it makes of a model, `losses` what is minimised,
`optimizer` how, `train` holds the step and the loop, `checkpoints` keeps them on disk, `stages`
puts a recipe's stages in order.
"""
