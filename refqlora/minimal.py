"""QLoRA on one page: a network, frozen in 4 bits a weight, learns something new from a few numbers trained beside it.

Nearly all of a network is matrices W (out, in), in linear layers y = x W^T. Full training changes every weight, which
takes a gradient and two running means for each. QLoRA (Dettmers et al. 2023, arXiv 2305.14314) needs none of that:
    Q     W is rounded to 4 bits a weight, once, and never changes again.
    LoRA  Two thin matrices are trained in its place, A (r, in) and B (out, r), r small: y = x W^T + s (x A^T) B^T.

Read from top to bottom, then watch it learn: python -m refqlora.minimal. This page leaves out biases, dropout and
matrices of an odd size. The rest of refqlora has them, is faster, and is tested against this page.
"""

import inspect
from pydoc_data.topics import topics

import numpy as np
from numpy import float32, ndarray
from scipy.special import ndtri


# 1. The values that codes stand for, bit for bit those of bitsandbytes; to that end linspace32 rounds as torch does.
def linspace32(start: float, stop: float, n: int) -> ndarray:
    a, b, i = float32(start), float32(stop), np.arange(n)
    step = (b - a) / float32(n - 1)  # rounded to float32; its products with i are float64, and exact
    return np.where(i < n // 2, a + step * i, b - step * (n - 1 - i)).astype(float32)  # (n,), each half from its end


# NF4, for weights: they are about normally distributed, so the 16 values are quantiles of N(0, 1), 8 above 0, 7 below.
p = round(1 - (1 / 32 + 1 / 30) / 2, 7)  # the outermost probability: half a step short of 1, whose quantile is infinite
above, below = ndtri(linspace32(p, 0.5, 9)[:-1]), -ndtri(linspace32(p, 0.5, 8)[:-1])  # (8,), (7,)
NF4 = np.sort(np.concatenate([below, np.zeros(1, float32), above])) / above[0]  # (16,), from -1 to 1
# The dynamic map, for the constants: seven decades, each with twice the values of the one below it; and the negatives.
values = [np.array([0, 1], float32)]
for i in range(7):
    edges = linspace32(0.1, 1, 2**i + 1)  # (2^i + 1,)
    middles = 10.0 ** (i - 6) * (edges[:-1] + edges[1:]) / 2  # (2^i,)
    values += [middles, -middles]
DYNAMIC = np.sort(np.concatenate(values))  # (256,)


# 2. Quantisation. absmax is the largest |x| of a block, and a code is the index of the value nearest to x / absmax.
def to_codes(x: ndarray, values: ndarray, block: int) -> tuple[ndarray, ndarray]:
    n, full, tiny = len(x), len(x) // block, float32(1e-38)  # tiny: to never divide by 0
    rows = np.pad(x, (0, -n % block)).reshape(-1, block)  # (n,) -> (blocks, block)
    absmax = abs(rows).max(axis=1)  # (blocks,)
    absmax[full:] = np.maximum(absmax[full:], tiny)
    rows[:full] *= (1 / np.maximum(absmax[:full], tiny))[:, None]  # full blocks are multiplied by 1 / absmax,
    rows[full:] /= absmax[full:, None]  # a partial last one is divided by it, as in bitsandbytes
    codes = np.searchsorted((values[:-1] + values[1:]) / 2, rows.reshape(-1)[:n])  # (n,): how many midpoints are below
    return codes.astype(np.uint8), absmax


def quantize(w: ndarray) -> tuple:
    codes, absmax = to_codes(w.reshape(-1), NF4, 64)  # (n,), (n / 64,)
    packed = codes[0::2] << 4 | codes[1::2]  # (n / 2,): two codes a byte, the first in the high half
    mean = float32(absmax.mean(dtype=float))  # double quantisation: absmax minus its mean becomes codes, too
    absmax8, nested = to_codes(absmax - mean, DYNAMIC, 256)  # (n / 64,), (n / 64 / 256,)
    return packed, absmax8, nested, mean, w.shape


def dequantize(packed: ndarray, absmax8: ndarray, nested: ndarray, mean: float32, shape: tuple[int, ...]) -> ndarray:
    absmax = DYNAMIC[absmax8] * nested.repeat(256)[: len(absmax8)] + mean  # (n / 64,)
    codes = np.stack([packed >> 4, packed & 15], axis=1).reshape(-1)  # (n / 2, 2) -> (n,)
    return (NF4[codes] * absmax.repeat(64)[: len(codes)]).reshape(shape)


# 3. The linear layer. W is what quantize returns, dequantised for each product and then dropped; s is alpha / r.
def linear_forward(x: ndarray, W: tuple, A: ndarray, B: ndarray, s: float) -> ndarray:
    z = x @ A.T  # (N, in) -> (N, r)
    return x @ dequantize(*W).T + s * z @ B.T  # (N, out)


def linear_backward(dy: ndarray, x: ndarray, W: tuple, A: ndarray, B: ndarray, s: float) -> tuple:
    dB = s * dy.T @ (x @ A.T)  # (out, r), the gradient of B      y = x W^T + s z B^T
    dz = s * dy @ B  # (N, r)                                     y = x W^T + s z B^T
    dA = dz.T @ x  # (r, in)                                      z = x A^T
    return dy @ dequantize(*W) + dz @ A, dA, dB  # dx (N, in)     y = x W^T + s z B^T, z = x A^T


# 4. AdamW (Loshchilov and Hutter 2019, algorithm 2), in place, for step t = 1, 2, ...
def adamw(params: list, grads: list, state: list, t: int, lr: float, decay: float = 0.01) -> None:
    for p, g, (m, v) in zip(params, grads, state, strict=True):
        p *= 1 - lr * decay
        m += (1 - 0.9) * (g - m)  # the running mean of the gradient,
        v += (1 - 0.999) * (g * g - v)  # and of its square. Both start at 0, thus too small: two divisions mend that.
        p -= lr * (m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.999**t)) + 1e-8)


# 5. A network of two layers guesses the last of 9 characters from the first 8. The mean loss, and the gradients:
def network(windows: ndarray, W1: tuple, W2: tuple, A1: ndarray, B1: ndarray, A2: ndarray, B2: ndarray) -> tuple:
    one_hot = np.eye(128, dtype=float32)[windows]  # (N, 9) -> (N, 9, 128)
    x, target = one_hot[:, :8].reshape(-1, 1024), one_hot[:, 8]  # (N, 1024), (N, 128)
    u = linear_forward(x, W1, A1, B1, 2.0)  # (N, 128)
    h = np.maximum(u, 0)
    logits = linear_forward(h, W2, A2, B2, 2.0)  # (N, 128)
    probs = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    dh, dA2, dB2 = linear_backward((probs - target) / len(x), h, W2, A2, B2, 2.0)
    _, dA1, dB1 = linear_backward(dh * (u > 0), x, W1, A1, B1, 2.0)
    return -np.log((probs * target).sum(axis=1)).mean(), [dA1, dB1, dA2, dB2]


if __name__ == "__main__":
    print("Guess the next character from the last 8. Loss: mean of -ln(probability of the right one), on unseen text.")
    rng = np.random.default_rng(0)
    texts = [text.encode("ascii", "ignore") for text in (inspect.getsource(inspect), "\n".join(topics.values()))]
    code, english = (np.lib.stride_tricks.sliding_window_view(np.frombuffer(t, np.uint8), 9) for t in texts)  # (n, 9)
    dense = [rng.standard_normal(shape, float32) / 10 for shape in ((128, 1024), (128, 128))]
    for text, name, r in (code, "Python code", 128), (english, "English", 8):
        W1, W2 = (quantize(w) for w in dense)  # random at first, but with r = 128, full rank, B A can be any matrix
        params: list[ndarray] = [rng.standard_normal((r, 1024), float32) / 50, np.zeros((128, r), float32)]
        params += [rng.standard_normal((r, 128), float32) / 50, np.zeros((128, r), float32)]
        state = [np.zeros((2, *p.shape), float32) for p in params]
        size, n = sum(a.nbytes for a in W1[:3] + W2[:3]), sum(p.size for p in params)
        print(f"147,456 frozen weights take {size:,} bytes, not {4 * 147456:,}; {n:,} numbers (r = {r}) learn {name}:")
        for t in range(301):
            if t % 100 == 0:
                a, b = (network(unseen[-20000::10], W1, W2, *params)[0] for unseen in (code, english))
                print(f"  step {t:3}: loss {a:.2f} on Python code, {b:.2f} on English")
            batch = text[rng.integers(len(text) - 20000, size=128)]
            adamw(params, network(batch, W1, W2, *params)[1], state, t + 1, lr=5e-3)
        dense = [dequantize(*W1) + 2 * params[1] @ params[0], dequantize(*W2) + 2 * params[3] @ params[2]]  # merged
