"""bitsandbytes' 4-bit checkpoints held live against transformers and bitsandbytes, both ways: not one byte may differ.

Where logits are compared, the rows of every weight fill its blocks and models are in train mode: otherwise bitsandbytes
computes something else on a CPU with AVX512.
"""

import json
import logging
import shutil
import warnings
from contextlib import contextmanager
from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
bitsandbytes = pytest.importorskip("bitsandbytes")
from rich.console import Console

import refqlora as rq
from refqlora.codebooks import DYNAMIC
from refqlora.commands.quantize import quantize_files
from refqlora.files.reading import read_tensors
from refqlora.files.writing import write_tensors

pytestmark = pytest.mark.usefixtures("uncompiled")
SIZES = {
    "vocab_size": 37,
    "hidden_size": 192,
    "intermediate_size": 320,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
}
DTYPES = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16, "float16": np.float16}
QUIET = Console(quiet=True)
transformers.utils.logging.disable_progress_bar()


def dense_llama(path, dtype="float32", **changes):
    """Matrices 1/sqrt(in), norms and biases of order one."""
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**SIZES, **changes}))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.ndim > 1:
                p.normal_(0, p.shape[1] ** -0.5)
            else:
                p.normal_(0 if name.endswith("bias") else 1, 0.3)
    model.to(getattr(torch, dtype)).save_pretrained(path)
    return path


def their_4bit(path, dtype="float32", **options):
    options = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True, **options}
    options.setdefault("bnb_4bit_compute_dtype", getattr(torch, dtype))
    config = transformers.BitsAndBytesConfig(load_in_4bit=True, **options)
    return transformers.LlamaForCausalLM.from_pretrained(
        path, quantization_config=config, dtype=getattr(torch, dtype), device_map="cpu"
    )


def reload(path):
    """As a person loads it; whatever either library has to say fails the test."""
    with silence():
        return transformers.AutoModelForCausalLM.from_pretrained(path).train()


def test_what_they_say_is_heard(tmp_path):
    """A negative control: of a tensor too many they do not keep silent."""
    quantize_files(dense_llama(tmp_path / "dense"), tmp_path / "ours", QUIET)
    file = tmp_path / "ours/model.safetensors"
    write_tensors(file, {**dict(read_tensors(file)), "model.layers.0.spare.weight": np.ones(3, np.float32)})
    with pytest.raises(AssertionError, match="UNEXPECTED"):
        reload(tmp_path / "ours")


@contextmanager
def silence():
    said = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: said.append(record.getMessage())
    loggers = [logging.getLogger(name) for name in ("transformers", "bitsandbytes", "accelerate")]
    for logger in loggers:
        logger.addHandler(handler)
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            yield
    finally:
        for logger in loggers:
            logger.removeHandler(handler)
    said += [str(w.message) for w in caught]
    assert not said, said


def stored(path):
    """Every tensor of the checkpoint in `path`: {key: (dtype, shape, bytes)}."""
    tensors = {}
    for file in sorted(path.glob("*.safetensors")):
        tensors |= {key: (x.dtype, x.shape, x.tobytes()) for key, x in read_tensors(file)}
    return tensors


def differing(found, expected):
    """How many bytes differ."""
    assert found.keys() == expected.keys()
    count = 0
    for key, (dtype, shape, data) in expected.items():
        assert found[key][:2] == (dtype, shape), key
        count += int(np.count_nonzero(np.frombuffer(found[key][2], np.uint8) != np.frombuffer(data, np.uint8)))
    return count


def packed_weights(theirs):
    return {name: p for name, p in theirs.named_parameters() if getattr(p, "quant_state", None) is not None}


def bits(t):
    """A tensor's bits as integers, -0.0 as 0.0: FP4's second zero has either sign there."""
    t = t.detach().contiguous() + 0.0
    return t.view({2: torch.int16, 4: torch.int32}[t.element_size()]).numpy()


def assert_same_weights(ours, theirs):
    """Fields, and what they dequantise to in the weight's own dtype."""
    packed = packed_weights(theirs)
    assert packed.keys() == {name for name, p in ours.params.items() if isinstance(p, rq.QuantizedTensor)}
    for name, p in packed.items():
        q, state = ours.params[name], p.quant_state
        assert q.shape == tuple(state.shape)
        assert q.block_size == state.blocksize
        np.testing.assert_array_equal(q.packed, p.data.contiguous().view(torch.uint8).numpy().ravel(), err_msg=name)
        np.testing.assert_array_equal(q.absmax, state.absmax.numpy(), err_msg=name)
        if state.nested:
            np.testing.assert_array_equal(q.nested_absmax, state.state2.absmax.numpy(), err_msg=name)
            assert q.offset == state.offset.item()
        flat = p.data.contiguous().view(torch.uint8).reshape(-1, 1)  # rows that do not fill blocks go wrong there
        state.shape, shape = torch.Size([state.shape.numel()]), state.shape
        expected = bits(bitsandbytes.functional.dequantize_4bit(flat, state))
        state.shape = shape
        found = rq.dequantize(q, q.dtype).reshape(-1) + q.dtype.type(0)
        np.testing.assert_array_equal(found.view(expected.dtype), expected.ravel(), err_msg=name)


def logits(model, seed=0):
    tokens = np.random.default_rng(seed).integers(0, SIZES["vocab_size"], (3, 11))
    if isinstance(model, rq.Model):
        return model.forward(tokens)[0]
    for name, p in packed_weights(model).items():
        assert p.quant_state.shape[-1] % p.quant_state.blocksize == 0, f"{name}: rows that do not fill its blocks"
    with torch.no_grad():
        return model.train()(torch.from_numpy(tokens)).logits.float().numpy()


def agree(what, found, expected, tolerance=1e-5):
    worst = float(np.abs(found - expected).max() / np.abs(expected).max())
    print(f"{what:<40} {worst:.1e}")
    assert worst < tolerance, what


# ---- theirs, ours, theirs ----------------------------------------------------------------------------------

THEIRS = {
    "nf4 nested": {},
    "nf4": {"bnb_4bit_use_double_quant": False},
    "fp4 nested": {"bnb_4bit_quant_type": "fp4"},
    "fp4": {"bnb_4bit_quant_type": "fp4", "bnb_4bit_use_double_quant": False},
    "a skipped layer": {"llm_int8_skip_modules": ["lm_head", "model.layers.1.mlp.down_proj", "q_proj"]},
    "the head too": {"llm_int8_skip_modules": ["k_proj"]},
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", THEIRS.values(), ids=THEIRS)
def test_their_checkpoint_round_trips(options, dtype, tmp_path):
    theirs = their_4bit(dense_llama(tmp_path / "dense", dtype), dtype, **options)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = rq.Model.from_pretrained(tmp_path / "theirs")
    assert_same_weights(ours, theirs)
    if dtype == "float32":
        agree("logits", logits(ours), logits(theirs))
    ours.save_pretrained(tmp_path / "ours", DTYPES[dtype])
    expected = stored(tmp_path / "theirs")
    count = differing(stored(tmp_path / "ours"), expected)
    print(f"{len(expected)} tensors, {count} bytes differ")
    assert count == 0
    again = reload(tmp_path / "ours")
    assert_same_weights(ours, again)
    np.testing.assert_array_equal(logits(again), logits(theirs))
    for key in ("bnb_4bit_quant_type", "bnb_4bit_use_double_quant", "bnb_4bit_compute_dtype"):
        assert getattr(again.config.quantization_config, key) == getattr(theirs.config.quantization_config, key)


@pytest.mark.parametrize("changes", [{"tie_word_embeddings": True}, {"attention_bias": True, "mlp_bias": True}])
def test_tied_and_with_biases(changes, tmp_path):
    theirs = their_4bit(dense_llama(tmp_path / "dense", **changes))
    theirs.save_pretrained(tmp_path / "theirs")
    ours = rq.Model.from_pretrained(tmp_path / "theirs")
    assert_same_weights(ours, theirs)
    agree("logits", logits(ours), logits(theirs))
    ours.save_pretrained(tmp_path / "ours")
    assert differing(stored(tmp_path / "ours"), stored(tmp_path / "theirs")) == 0
    np.testing.assert_array_equal(logits(reload(tmp_path / "ours")), logits(theirs))


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("block_size", [32, 128, 512, 4096])
def test_other_block_sizes(block_size, nested, tmp_path):
    """transformers has no option for it: the weights are quantised again with bitsandbytes."""
    theirs = their_4bit(dense_llama(tmp_path / "dense"))
    dense = dict(transformers.LlamaForCausalLM.from_pretrained(tmp_path / "dense").named_parameters())
    for name in packed_weights(theirs):
        module = theirs.get_submodule(name.removesuffix(".weight"))
        options = {"blocksize": block_size, "compress_statistics": nested, "quant_type": "nf4", "module": module}
        module.weight = bitsandbytes.nn.Params4bit(dense[name].data, **options).to("cpu")
    theirs.save_pretrained(tmp_path / "theirs")
    ours = rq.Model.from_pretrained(tmp_path / "theirs")
    assert {q.block_size for q in ours.params.values() if isinstance(q, rq.QuantizedTensor)} == {block_size}
    assert_same_weights(ours, theirs)
    ours.save_pretrained(tmp_path / "ours")
    assert differing(stored(tmp_path / "ours"), stored(tmp_path / "theirs")) == 0


@pytest.mark.parametrize("storage", ["bfloat16", "float16", "float32"])
def test_packed_bytes_stored_under_another_dtype(storage, tmp_path):
    """As for FSDP: the bytes are the same, their tensor says another dtype."""
    dense_llama(tmp_path / "dense")
    theirs = their_4bit(tmp_path / "dense", bnb_4bit_quant_storage=getattr(torch, storage))
    theirs.save_pretrained(tmp_path / "theirs")
    assert {x[0] for k, x in stored(tmp_path / "theirs").items() if k.endswith("mlp.up_proj.weight")} == {
        np.dtype(DTYPES[storage])
    }
    assert_same_weights(rq.Model.from_pretrained(tmp_path / "theirs"), theirs)


def test_their_shards(tmp_path):
    theirs = their_4bit(dense_llama(tmp_path / "dense"))
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size="30KB")
    index = json.loads((tmp_path / "theirs/model.safetensors.index.json").read_text())["weight_map"]
    split = {k.split(".weight")[0] for k in index if index[k] != index[k.split(".weight")[0] + ".weight"]}
    assert split, "no weight's parts lie in different shards"
    ours = rq.Model.from_pretrained(tmp_path / "theirs")
    assert_same_weights(ours, theirs)
    ours.save_pretrained(tmp_path / "ours")
    assert differing(stored(tmp_path / "ours"), stored(tmp_path / "theirs")) == 0


# ---- which tables count ------------------------------------------------------------------------------------


def with_table(path, part, change):
    """Change every table of that name in the checkpoint in `path`."""
    file = path / "model.safetensors"
    tensors = dict(read_tensors(file))
    for key in tensors:
        if key.endswith(part):
            tensors[key] = change(tensors[key])
    write_tensors(file, tensors)
    return path


def test_bitsandbytes_ignores_the_codebook_of_the_file_and_we_refuse_another(tmp_path):
    theirs = their_4bit(dense_llama(tmp_path / "dense"))
    theirs.save_pretrained(tmp_path / "theirs")
    changed = with_table(tmp_path / "theirs", ".quant_map", lambda table: table * np.float32(0.5))
    np.testing.assert_array_equal(logits(reload(changed)), logits(theirs))
    with pytest.raises(ValueError, match=r"weight\.quant_map is not the codebook of nf4"):
        rq.Model.from_pretrained(changed)


def test_the_nested_codebook_of_the_file_counts(tmp_path):
    """It is computed where the file is written, and its last bits depend on the machine: both take the file's."""
    theirs = their_4bit(dense_llama(tmp_path / "dense"))
    theirs.save_pretrained(tmp_path / "theirs")
    changed = with_table(
        tmp_path / "theirs", ".nested_quant_map", lambda table: np.nextafter(table, np.float32(2), dtype=np.float32)
    )
    ours, again = rq.Model.from_pretrained(changed), reload(changed)
    assert_same_weights(ours, again)
    for name, p in packed_weights(theirs).items():
        q = ours.params[name]
        np.testing.assert_array_equal(q.absmax, p.quant_state.absmax.numpy())
        assert not np.array_equal(q.constants(), replace(q, nested_codebook=DYNAMIC).constants())
    ours.save_pretrained(tmp_path / "ours")
    assert differing(stored(tmp_path / "ours"), stored(changed)) == 0


# ---- ours, theirs, ours ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "options",
    [{}, {"kind": "fp4"}, {"double_quant": False}, {"block_size": 256}, {"shard_bytes": 30_000}],
    ids=["nf4", "fp4", "single", "blocks of 256", "shards"],
)
def test_what_refqlora_quantize_writes(options, dtype, tmp_path):
    whole_blocks = {"hidden_size": 512, "intermediate_size": 768} if "block_size" in options else {}
    dense_llama(tmp_path / "dense", dtype, **whole_blocks)
    quantize_files(tmp_path / "dense", tmp_path / "ours", QUIET, **options)
    assert ("shard_bytes" in options) == (len(list((tmp_path / "ours").glob("*.safetensors"))) > 1)
    theirs, ours = reload(tmp_path / "ours"), rq.Model.from_pretrained(tmp_path / "ours")
    assert theirs.dtype == getattr(torch, dtype)
    assert_same_weights(ours, theirs)
    if dtype == "float32":
        agree("logits", logits(ours), logits(theirs))
    theirs.save_pretrained(tmp_path / "theirs", save_original_format=False)  # with it, it saves none that it loaded
    expected = stored(tmp_path / "ours")
    count = differing(stored(tmp_path / "theirs"), expected)
    print(f"{len(expected)} tensors, {count} bytes differ")
    assert count == 0
    again = rq.Model.from_pretrained(tmp_path / "theirs")
    again.save_pretrained(tmp_path / "again", DTYPES[dtype])
    assert differing(stored(tmp_path / "again"), expected) == 0


def test_the_bundled_base(tmp_path):
    """In float32: a weight that was bfloat16 is dequantised to bfloat16 by bitsandbytes, and to float32 here."""
    rq.Model.from_pretrained(rq.BUNDLED).save_pretrained(tmp_path / "dense")
    shutil.copy(rq.BUNDLED / "tokenizer.json", tmp_path / "dense")
    quantize_files(tmp_path / "dense", tmp_path / "ours", QUIET)
    theirs, ours = reload(tmp_path / "ours"), rq.Model.from_pretrained(tmp_path / "ours")
    assert_same_weights(ours, theirs)
    agree("logits", logits(ours), logits(theirs))
    assert len(transformers.AutoTokenizer.from_pretrained(tmp_path / "ours")) == 2048


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dense", [("mlp.down_proj",), ("layers.0.",)])
def test_a_model_quantised_in_part(dense, tied, tmp_path):
    dense_llama(tmp_path / "dense", tie_word_embeddings=tied)
    ours = rq.Model.from_pretrained(tmp_path / "dense")
    original = dict(ours.params)
    ours.quantize()
    ours.params |= {name: w for name, w in original.items() if any(part in name for part in dense)}
    ours.save_pretrained(tmp_path / "ours")
    theirs = reload(tmp_path / "ours")
    assert_same_weights(ours, theirs)
    agree("logits", logits(ours), logits(theirs))
    shutil.rmtree(tmp_path / "dense")
    assert_same_weights(rq.Model.from_pretrained(tmp_path / "ours"), theirs)
