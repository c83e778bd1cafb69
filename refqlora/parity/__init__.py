"""Parity: this package, or somebody else's kernel, compared with the real libraries. The command is `refqlora parity`.

A check has two halves (checks.py): the first records what the libraries compute from random tensors, the second
compares it with what refqlora computes. The second needs no library: a recording can replace the first.

**The kit, for other kernels.** `refqlora parity --against MODULE` calls the functions of a Python module and reports
what differs, where, and the likely cause. MODULE is a dotted name or the path of a .py file; a kernel in C, CUDA or
Rust needs a few lines of ctypes or of its bindings. The module has any of these functions. Their arguments are NumPy
arrays, ints and floats, passed by position:

quantize(w, block_size) -> (packed, absmax)
    NF4. w is float32, float16 or bfloat16 (ml_dtypes'), of any shape, with n elements in row-major order; it may be a
    view that is not contiguous. packed is uint8 (ceil(n / 2),), element 2i in the high nibble; absmax is float32
    (ceil(n / block_size),). Blocks run over the flat tensor. block_size is a power of two from 32 to 4096. All
    arithmetic is in float32:

        a full block        x * (1 / absmax)
        a last, partial one x / absmax
        the divisor         at least 1e-38, so that zeros have code 7 (absmax itself may then be 0 or 1e-38)
        the code            the number of midpoints (a + b) / 2, in float32, of neighbouring values that are below
                            the scaled x, so that a tie takes the lower code
        an odd n            is padded with 0.0, code 7

dequantize(packed, absmax, block_size, shape) -> weights
    float32 of `shape`, a tuple: value[code] * absmax.

quantize_constants(absmax) -> (codes, nested_absmax, offset)
    Double quantisation of float32 (blocks,). offset, float32, is the mean (its last bits may differ); absmax - offset
    is quantised as above in blocks of 256, to the nearest of the 256 values of the signed dynamic map: codes uint8
    (blocks,), nested_absmax float32 (ceil(blocks / 256),).

dequantize_constants(codes, nested_absmax, offset) -> absmax
    float32 (blocks,): map[code] * nested_absmax + offset, rounded after each operation.

lora_forward(x, W, A, B, scale) -> y
    y = x W^T + scale (x A^T) B^T. x (N, in), W (out, in), A (r, in), B (out, r), float32; scale is alpha / r, a float;
    y (N, out).

lora_backward(dy, x, W, A, B, scale) -> (dx, dA, dB)
    dy (N, out), the gradient of y. dx = dy W + scale dy B A; dA = scale (dy B)^T x; dB = scale dy^T (x A^T).

lora_dropout_forward(x, W, A, B, scale, keep, rate) -> y
lora_dropout_backward(dy, x, W, A, B, scale, keep, rate) -> (dx, dA, dB)
    The same with x * keep / (1 - rate) in place of x in the adapter's part only; keep is bool (N, in), rate a float.

No argument may be changed. In the results of the first four functions no bit may differ (-0.0 counts as 0.0); those of
the LoRA linear may be off by 1e-5 of their largest element. A module that takes only some block sizes or dtypes of w
lists them: BLOCK_SIZES = (64,), DTYPES = ("float32", "bfloat16"). The arguments come from vectors.safetensors, which
README.md beside it describes for tests in other languages, and at random from the seed.
"""
