"""Parity: this package, or somebody else's kernel, held against the real libraries. The command is `refqlora parity`.

A check has two halves (checks.py): one asks the libraries what they make of random tensors, the other compares that
with what refqlora makes of them. The second needs no library, so that a recording stands in for the first.

**The kit, for other kernels.** `refqlora parity --against MODULE` calls what a Python module offers and says what
differs, where, and why it probably does. MODULE is a dotted name or the path of a .py file; a kernel in C, CUDA or Rust
gets a few lines of ctypes or of its bindings. It has any of these functions, whose arguments are NumPy arrays, ints and
floats, in this order and by position:

quantize(w, block_size) -> (packed, absmax)
    NF4. w is float32, float16 or bfloat16 (ml_dtypes'), of any shape, of n elements; it may be a view that is not
    contiguous, and counts in row-major order. packed is uint8 (ceil(n / 2),), element 2i in the high nibble; absmax is
    float32 (ceil(n / block_size),). Blocks run over the flat tensor. block_size is 32 to 4096, a power of two. All
    arithmetic is in float32:

        a full block        x * (1 / absmax)
        a last, partial one x / absmax
        the divisor         at least 1e-38, so that zeros have code 7 (absmax itself may then be 0 or 1e-38)
        the code            how many midpoints (a + b) / 2, in float32, of neighbouring values are below: a tie is lower
        an odd n            is filled up with 0.0, code 7

dequantize(packed, absmax, block_size, shape) -> weights
    float32 of `shape`, a tuple: value[code] * absmax.

quantize_constants(absmax) -> (codes, nested_absmax, offset)
    Double quantisation of float32 (blocks,). offset, float32, is the mean (its last bits are free); absmax - offset is
    quantised as above in blocks of 256 with the signed dynamic map of 256 values, to the nearest: codes uint8
    (blocks,), nested_absmax float32 (ceil(blocks / 256),).

dequantize_constants(codes, nested_absmax, offset) -> absmax
    float32 (blocks,): map[code] * nested_absmax + offset, rounded after each.

lora_forward(x, W, A, B, scale) -> y
    y = x W^T + scale (x A^T) B^T. x (N, in), W (out, in), A (r, in), B (out, r), float32; scale is alpha / r, a float;
    y (N, out).

lora_backward(dy, x, W, A, B, scale) -> (dx, dA, dB)
    dy (N, out), the gradient of y. dx = dy W + scale dy B A; dA = scale (dy B)^T x; dB = scale dy^T (x A^T).

lora_dropout_forward(x, W, A, B, scale, keep, rate) -> y
lora_dropout_backward(dy, x, W, A, B, scale, keep, rate) -> (dx, dA, dB)
    The same with x * keep / (1 - rate) for x in the adapter's part alone; keep is bool (N, in), rate a float.

No argument may be changed. Of the first four no bit may differ (-0.0 counts as 0.0); a result of the LoRA linear may be
off by 1e-5 of its largest element. A module that takes only some block sizes or dtypes of w says so: BLOCK_SIZES =
(64,), DTYPES = ("float32", "bfloat16"). What it is called with is in vectors.safetensors, which README.md beside it
describes for a test in any other language, and, at random, what the seed gives.
"""
