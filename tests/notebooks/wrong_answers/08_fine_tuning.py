# exercise 1: the labels are not shifted against the tokens
def sequence(prompt, completion, eos):
    text = [*prompt, *completion, eos]
    labels = [-100] * len(prompt) + [*completion, eos]
    return text[:-1], labels[:-1]


# exercise 1: the prompt counts too
def sequence(prompt, completion, eos):
    text = [*prompt, *completion, eos]
    return text[:-1], text[1:]


# exercise 1: the completion's first token does not count
def sequence(prompt, completion, eos):
    text = [*prompt, *completion, eos]
    return text[:-1], [-100] * len(prompt) + text[len(prompt) + 1 :]


# exercise 1: the end of the text does not count
def sequence(prompt, completion, eos):
    text = [*prompt, *completion]
    return text, [-100] * (len(prompt) - 1) + completion + [-100]


# exercise 2: A's and B's are added, which has cross terms
def added(A1, B1, s1, f1, A2, B2, s2, f2):
    return f1 * s1 * A1 + f2 * s2 * A2, B1 + B2


# exercise 2: the scales are left out
def added(A1, B1, s1, f1, A2, B2, s2, f2):
    return np.concatenate([f1 * A1, f2 * A2]), np.concatenate([B1, B2], axis=1)


# exercise 2: the factors count twice, in A and in B
def added(A1, B1, s1, f1, A2, B2, s2, f2):
    A = np.concatenate([f1 * s1 * A1, f2 * s2 * A2])
    return A, np.concatenate([f1 * s1 * B1, f2 * s2 * B2], axis=1)


# exercise 2: B is stacked the wrong way
def added(A1, B1, s1, f1, A2, B2, s2, f2):
    return np.concatenate([f1 * s1 * A1, f2 * s2 * A2]), np.concatenate([B1, B2])


# exercise 3: the scale is left out
def merged(model):
    adapter, params = model.adapters[model.active], dict(model.params)
    for linear in adapter.linears:
        lora = adapter.lora(linear)
        params[linear + ".weight"] = rq.dequantize(params[linear + ".weight"]) + lora.B @ lora.A
    return rq.Model(model.config, params)


# exercise 3: only the attention's linears
def merged(model):
    adapter, params = model.adapters[model.active], dict(model.params)
    for linear in adapter.linears:
        if "self_attn" in linear:
            params[linear + ".weight"] = rq.merge(params[linear + ".weight"], adapter.lora(linear))
    return rq.Model(model.config, params)


# exercise 3: quantised again
def merged(model):
    adapter, params = model.adapters[model.active], dict(model.params)
    for linear in adapter.linears:
        params[linear + ".weight"] = rq.quantize(rq.merge(params[linear + ".weight"], adapter.lora(linear)))
    return rq.Model(model.config, params)


# exercise 3: the base without its adapter
def merged(model):
    return rq.Model(model.config, dict(model.params))


# exercise 2: the change itself beside a unit matrix, of full rank
def added(A1, B1, s1, f1, A2, B2, s2, f2):
    change = f1 * s1 * B1 @ A1 + f2 * s2 * B2 @ A2
    return np.eye(A1.shape[1], dtype=A1.dtype), change


# exercise 3: merged into the model that was given
def merged(model):
    adapter = model.adapters[model.active]
    for linear in adapter.linears:
        name = linear + ".weight"
        model.params[name] = rq.merge(model.params[name], adapter.lora(linear))
    model.set_adapter(None)
    return model
