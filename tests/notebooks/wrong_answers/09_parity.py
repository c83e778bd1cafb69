# exercise 1: only near the reference
def agrees(found, reference, exact):
    return abs(found - reference).max() / abs(reference).max() < 1e-5


# exercise 1: only no farther from float64
def agrees(found, reference, exact):
    return abs(found - exact).max() < 1.5 * abs(reference - exact).max() + 2**-20 * abs(exact).max()


# exercise 1: magnitudes are forgotten
def agrees(found, reference, exact):
    apart = (found - reference).max() / abs(reference).max()
    d = [(y - exact).max() / abs(exact).max() for y in (found, reference)]
    return apart < 1e-5 and d[0] < 1.5 * d[1] + 2**-20


# exercise 1: as good as the reference without any slack is asked for
def agrees(found, reference, exact):
    apart = abs(found - reference).max() / abs(reference).max()
    return apart < 1e-5 and abs(found - exact).max() <= abs(reference - exact).max()


# exercise 1: everything agrees
def agrees(found, reference, exact):
    return True


# exercise 2: a tie goes up
def codes_of(block):
    scaled = block * (1 / np.maximum(abs(block).max(), np.float32(1e-38)))
    return np.searchsorted((NF4[1:] + NF4[:-1]) / 2, scaled, side="right").astype(np.uint8)


# exercise 2: the least distance
def codes_of(block):
    scaled = block * (1 / np.maximum(abs(block).max(), np.float32(1e-38)))
    return abs(scaled[:, None] - NF4).argmin(axis=1).astype(np.uint8)


# exercise 2: divided
def codes_of(block):
    scaled = block / np.maximum(abs(block).max(), np.float32(1e-38))
    return np.searchsorted((NF4[1:] + NF4[:-1]) / 2, scaled).astype(np.uint8)


# exercise 2: zeros become NaN
def codes_of(block):
    with np.errstate(all="ignore"):
        scaled = block * (1 / abs(block).max())
    return np.searchsorted((NF4[1:] + NF4[:-1]) / 2, scaled).astype(np.uint8)


# exercise 2: the magnitude is forgotten
def codes_of(block):
    scaled = block * (1 / np.maximum(block.max(), np.float32(1e-38)))
    return np.searchsorted((NF4[1:] + NF4[:-1]) / 2, scaled).astype(np.uint8)


# exercise 3: not mended
def mended(dy, x, W, A, B, scale):
    return broken(dy, x, W, A, B, scale)


# exercise 3: the scale is in dA twice
def mended(dy, x, W, A, B, scale):
    dz = scale * (dy @ B)
    return dy @ W + dz @ A, scale * dz.T @ x, scale * (dy.T @ (x @ A.T))


# exercise 3: dx has the scale twice, as its old one was left
def mended(dy, x, W, A, B, scale):
    dz = scale * (dy @ B)
    return dy @ W + scale * (dz @ A), dz.T @ x, scale * (dy.T @ (x @ A.T))


# exercise 3: dB is still a mean
def mended(dy, x, W, A, B, scale):
    dz = scale * (dy @ B)
    return dy @ W + dz @ A, dz.T @ x, scale * (dy.T @ (x @ A.T)) / len(x)


# exercise 1: root mean squares in place of maxima
def agrees(found, reference, exact):
    def size(y):
        return (np.asarray(y, np.float64) ** 2).mean() ** 0.5

    def d(y):
        return size(y - exact) / size(exact)

    return size(found - reference) / size(reference) < 1e-5 and d(found) < 1.5 * d(reference) + 2**-20
