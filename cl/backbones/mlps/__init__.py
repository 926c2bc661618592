"""What a block does to each token by itself: one file, one kind, found by listing the folder.

    y, auxiliary = mlp(x)        x, y: (B, T, D); auxiliary: terms for the loss by name, empty for most

Constructors take `(width, *, hidden, ...)`; None as `hidden` takes 8/3 of the width, rounded up to a multiple of 8.
"""
