# exercise 1: inv is taken for a constant
def rmsnorm_dx(dxhat, xhat, inv):
    return dxhat * inv
# exercise 1: the sum over the row, not its mean
def rmsnorm_dx(dxhat, xhat, inv):
    return inv * (dxhat - xhat * (dxhat * xhat).sum(axis=-1, keepdims=True))
# exercise 1: the mean over the rows, not over each
def rmsnorm_dx(dxhat, xhat, inv):
    return inv * (dxhat - xhat * (dxhat * xhat).mean(axis=0, keepdims=True))
# exercise 1: the mean is added
def rmsnorm_dx(dxhat, xhat, inv):
    return inv * (dxhat + xhat * (dxhat * xhat).mean(axis=-1, keepdims=True))
# exercise 2: no row sum
def head_backward(dy, q, k, v, p, scale):
    ds = p * (dy @ v.T)
    return ds @ k * scale, ds.T @ q * scale, p.T @ dy
# exercise 2: a column sum
def head_backward(dy, q, k, v, p, scale):
    dp = dy @ v.T
    ds = p * (dp - (dp * p).sum(axis=0, keepdims=True))
    return ds @ k * scale, ds.T @ q * scale, p.T @ dy
# exercise 2: no scale
def head_backward(dy, q, k, v, p, scale):
    dp = dy @ v.T
    ds = p * (dp - (dp * p).sum(axis=-1, keepdims=True))
    return ds @ k, ds.T @ q, p.T @ dy
# exercise 2: dk is not transposed
def head_backward(dy, q, k, v, p, scale):
    dp = dy @ v.T
    ds = p * (dp - (dp * p).sum(axis=-1, keepdims=True))
    return ds @ k * scale, ds @ q * scale, p.T @ dy
# exercise 3: as it was
def repaired(dy, x, W, a, b, s):
    return dy @ W + dy @ b @ a, s * (dy @ b).T @ x, s * dy.T @ (x @ a.T)
# exercise 3: the scale twice in dA
def repaired(dy, x, W, a, b, s):
    dz = s * dy @ b
    return dy @ W + dz @ a, s * dz.T @ x, s * dy.T @ (x @ a.T)
# exercise 3: only the adapter's path
def repaired(dy, x, W, a, b, s):
    dz = s * dy @ b
    return dz @ a, dz.T @ x, s * dy.T @ (x @ a.T)
