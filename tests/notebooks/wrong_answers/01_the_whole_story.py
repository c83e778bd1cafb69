# exercise 1: the weights are not divided by the absmax
answer = [0, 12, 8, 15]
# exercise 1: the codes are counted from 1
answer = [1, 11, 9, 13]
# exercise 1: the next value above, not the nearest
answer = [0, 10, 8, 13]
# exercise 1: three codes
answer = [0, 10, 8]
# exercise 2: without the scale
def forward(x, W, A, B, s):
    return x @ W.T + (x @ A.T) @ B.T
# exercise 2: the scale multiplies both parts
def forward(x, W, A, B, s):
    return s * (x @ W.T + (x @ A.T) @ B.T)
# exercise 2: the parts are multiplied, not added
def forward(x, W, A, B, s):
    return (x @ W.T) * (s * (x @ A.T) @ B.T)
# exercise 2: W is not transposed, which a square matrix lets pass
def forward(x, W, A, B, s):
    return x @ W + s * (x @ A.T) @ B.T
# exercise 2: A and B in each other's place
def forward(x, W, A, B, s):
    return x @ W.T + s * (x @ B) @ A
# exercise 3: the bytes of the values alone
answer = (241_664, 4 * 241_664)
# exercise 3: one running mean is forgotten
answer = (241_664, 3 * 4 * 241_664)
# exercise 3: a square matrix
answer = (2 * 16 * 4096, 16 * 2 * 16 * 4096)
# exercise 3: the product of the sides
answer = (16 * 4096 * 11008, 16 * 16 * 4096 * 11008)
