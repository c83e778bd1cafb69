# exercise 1: the constant of constants is shared by B2 weights, not by B2 blocks
def bits_a_parameter(B, B2):
    return 4 + 8 / B + 32 / B2

# exercise 1: the first constants are still float32
def bits_a_parameter(B, B2):
    return 4 + 32 / B + 32 / (B * B2)

# exercise 1: the codes are left out
def bits_a_parameter(B, B2):
    return 8 / B + 32 / (B * B2)

# exercise 2: the mean is left out
def double_dequant(packed, constant_code, c1, mean):
    codes = np.stack([packed >> 4, packed & 15], axis=1).reshape(-1)
    return NF4[codes] * (DYNAMIC[constant_code] * c1)

# exercise 2: the low half comes first
def double_dequant(packed, constant_code, c1, mean):
    codes = np.stack([packed & 15, packed >> 4], axis=1).reshape(-1)
    return NF4[codes] * (DYNAMIC[constant_code] * c1 + mean)

# exercise 2: all high halves come before all low ones
def double_dequant(packed, constant_code, c1, mean):
    codes = np.concatenate([packed >> 4, packed & 15])
    return NF4[codes] * (DYNAMIC[constant_code] * c1 + mean)

# exercise 2: the code is taken for the value that it stands for
def double_dequant(packed, constant_code, c1, mean):
    codes = np.stack([packed >> 4, packed & 15], axis=1).reshape(-1)
    return NF4[codes] * (int(constant_code) * c1 + mean)

# exercise 3: bits, not bytes
answer = (32 * 704512, 8 * 704512 + 32 * 2752)

# exercise 3: the second level has one constant for 256 weights
answer = (4 * 704512, 704512 + 4 * 4096 * 11008 // 256)

# exercise 3: the codes are counted as well
answer = (4096 * 11008 // 2 + 2818048, 4096 * 11008 // 2 + 715520)
