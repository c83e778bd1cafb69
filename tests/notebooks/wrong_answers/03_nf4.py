# exercise 1: not divided by the largest
def nf3():
    p = outermost_probability(3)
    return np.sort([*-ndtri(np.linspace(p, 0.5, 4)[:-1]), 0, *ndtri(np.linspace(p, 0.5, 5)[:-1])])
# exercise 1: more values below zero than above
def nf3():
    p = outermost_probability(3)
    above = ndtri(np.linspace(p, 0.5, 4)[:-1])
    return np.sort([*-ndtri(np.linspace(p, 0.5, 5)[:-1]), 0, *above]) / above[0]
# exercise 1: symmetric, without a zero
def nf3():
    above = ndtri(np.linspace(outermost_probability(3), 0.5, 5)[:-1])
    return np.sort([*-above, *above]) / above[0]
# exercise 1: evenly spaced values in place of evenly spaced probabilities
def nf3():
    return np.linspace(-1, 1, 8)
# exercise 1: NF4's probability
def nf3():
    p = outermost_probability(4)
    above = ndtri(np.linspace(p, 0.5, 5)[:-1])
    return np.sort([*-ndtri(np.linspace(p, 0.5, 4)[:-1]), 0, *above]) / above[0]
# exercise 2: a tie takes the upper code
def quantize_block(w):
    absmax = abs(w).max()
    return np.searchsorted((NF4[:-1] + NF4[1:]) / 2, w / absmax, side="right"), absmax
# exercise 2: the largest weight, not the largest absolute value
def quantize_block(w):
    return np.searchsorted((NF4[:-1] + NF4[1:]) / 2, w / w.max()), w.max()
# exercise 2: not divided by absmax
def quantize_block(w):
    return np.searchsorted((NF4[:-1] + NF4[1:]) / 2, w), abs(w).max()
# exercise 2: the next value above, not the nearest
def quantize_block(w):
    absmax = abs(w).max()
    return np.searchsorted(NF4, w / absmax), absmax
# exercise 2: values in place of codes
def quantize_block(w):
    absmax = abs(w).max()
    return NF4[np.searchsorted((NF4[:-1] + NF4[1:]) / 2, w / absmax)], absmax
# exercise 3: every block counts the same
def better(w, codebook):
    x, _ = scaled_blocks(w, 64)
    codes = nearest(x, codebook).ravel()
    return np.bincount(codes, x.ravel()) / np.bincount(codes)
# exercise 3: weighted by absmax, not by its square
def better(w, codebook):
    x, absmax = scaled_blocks(w, 64)
    codes, weights = nearest(x, codebook).ravel(), np.broadcast_to(absmax, x.shape).ravel()
    return np.bincount(codes, weights * x.ravel()) / np.bincount(codes, weights)
# exercise 3: sums, not means
def better(w, codebook):
    x, absmax = scaled_blocks(w, 64)
    return np.bincount(nearest(x, codebook).ravel(), (absmax**2 * x).ravel())
