"""Generation held live against transformers: the distribution drawn from, greedy tokens, the model's own options."""

import json
from itertools import product

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import refqlora as rq
from refqlora.text.generation import generation_options
from refqlora.text.sampling import Sampling

V = 500
SIZES = {"hidden_size": 30, "intermediate_size": 44, "num_hidden_layers": 2, "num_attention_heads": 6}
SIZES |= {"vocab_size": 37, "num_key_value_heads": 3, "head_dim": 8, "max_position_embeddings": 64}


def their_llama(seed=0, **changes):
    """Weights of order one, so that tokens vary and are nearly certain."""
    torch.manual_seed(seed)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**SIZES, **changes}))
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(0 if p.ndim > 1 else 1, 2 * p.shape[-1] ** -0.5 if p.ndim > 1 else 0.3)
    return model.eval()


def their_probabilities(model, logits, seen, options):
    """The softmax of what `generate` would sample from with these options: its own list of processors, in its order."""
    config = transformers.GenerationConfig(do_sample=options["temperature"] > 0, **options)
    processors = model._get_logits_processor(config, input_ids_seq_length=len(seen))
    with torch.no_grad():
        return processors(torch.tensor([seen]), torch.from_numpy(logits)[None]).softmax(-1)[0].numpy(), len(processors)


def drawn(seed, dtype, ties):
    logits = np.random.default_rng(seed).normal(0, 3, V)
    return (np.round(logits * 2) / 2 if ties else logits).astype(dtype)


def compared(dtype, ties):
    """(options, our distribution, theirs) for every combination of options, alone and together."""
    model, most = their_llama(), 0
    grid = product([0.3, 1.0, 1.7], [0, 1, 7, 1000], [1.0, 0.95, 0.4], [None, 0.05, 0.5], [1.0, 1.2, 0.8])
    for seed, (temperature, top_k, top_p, min_p, penalty) in enumerate(grid):
        logits = drawn(seed, dtype, ties)
        seen = np.random.default_rng(seed).integers(0, V, 40).tolist()
        options = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "repetition_penalty": penalty}
        options |= {} if min_p is None else {"min_p": min_p}
        theirs, n = their_probabilities(model, logits, seen, options)
        yield options, Sampling(**options).probabilities(logits, seen), theirs
        most = max(most, n)
    assert most == 5  # all of them at once, among others


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize(("dtype", "tolerance"), [(np.float32, 1e-6), (np.float64, 1e-14)])
def test_the_distribution(dtype, tolerance, ties, monkeypatch):
    """Token for token. Their sort is made stable, as its order of equal elements is otherwise undefined."""
    sort = torch.sort
    monkeypatch.setattr(torch, "sort", lambda x, descending: sort(x, descending=descending, stable=True))
    worst = 0.0
    for options, found, expected in compared(dtype, ties):
        np.testing.assert_array_equal(found > 0, expected > 0, err_msg=str(options))
        worst = max(worst, abs(found - expected).max())
    print(f"{dtype.__name__}, {'' if ties else 'no '}ties: 324 combinations, largest difference {worst:.1e}")
    assert worst < tolerance


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_their_own_sort_differs_in_which_of_tied_tokens_stay(dtype):
    differ = 0
    for options, found, expected in compared(dtype, ties=True):
        np.testing.assert_allclose(np.sort(found), np.sort(expected), atol=1e-6, err_msg=str(options))
        differ += ((found > 0) != (expected > 0)).any()
        assert options["top_p"] < 1 or not ((found > 0) != (expected > 0)).any()
    print(f"{dtype.__name__}: top_p cut another of several tied tokens in {differ} of 324 cases")


@pytest.mark.parametrize("penalty", [1.0, 1.3, 0.8])
@pytest.mark.parametrize("quantize", [None, "nf4"])
def test_greedy_token_for_token(penalty, quantize, tmp_path):
    theirs = their_llama()
    theirs.save_pretrained(tmp_path)
    ours = rq.Model.from_pretrained(tmp_path, quantize=quantize)
    if quantize:  # they compute with the same weights
        with torch.no_grad():
            for name, p in theirs.named_parameters():
                if isinstance(ours.params.get(name), rq.QuantizedTensor):
                    p.copy_(torch.from_numpy(rq.dequantize(ours.params[name])))
    said = set()
    for prompt in ([5, 9, 2, 31], [1], list(range(30))):
        ids = torch.tensor([prompt])
        options = {"do_sample": False, "max_new_tokens": 30, "eos_token_id": None, "pad_token_id": 0}
        expected = theirs.generate(ids, attention_mask=ids >= 0, repetition_penalty=penalty, **options)
        found = list(rq.generate(ours, prompt, max_new_tokens=30, repetition_penalty=penalty))
        assert found == expected[0, len(prompt) :].tolist()
        said |= set(found)
    assert len(said) > 12  # a model that says one thing over and over would hide much


@pytest.mark.parametrize(
    "content",
    [
        {"eos_token_id": 7},
        {"eos_token_id": [3, 7], "do_sample": True, "temperature": 0.6, "top_p": 0.9},
        {"do_sample": True, "top_k": 0, "repetition_penalty": 1.2},
        {"do_sample": True, "temperature": 0.5, "min_p": 0.1, "top_k": 5},
        {"do_sample": False, "repetition_penalty": 1.2},
        {},
    ],
    ids=str,
)
def test_the_model_s_own_options(content, tmp_path):
    """What its generation_config.json means to `generate`: which distribution, and where it ends."""
    their_llama().save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").write_text(json.dumps(content))
    theirs = transformers.LlamaForCausalLM.from_pretrained(tmp_path)
    config, _ = theirs._prepare_generation_config(None)
    processors = theirs._get_logits_processor(config, input_ids_seq_length=5)
    logits, seen = drawn(0, np.float32, ties=False), [1, 2, 3, 400]
    with torch.no_grad():
        expected = processors(torch.tensor([seen]), torch.from_numpy(logits)[None]).softmax(-1)[0].numpy()
    if not config.do_sample:
        expected = np.eye(V)[expected.argmax()]
    options = generation_options(tmp_path)
    if "eos_token_id" in content:
        ends = rq.Model.from_pretrained(tmp_path).config.ends
        assert ends == tuple(np.atleast_1d(content["eos_token_id"]))
    np.testing.assert_allclose(Sampling(**options).probabilities(logits, seen), expected, atol=1e-6)
