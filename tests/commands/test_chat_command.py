"""`refqlora generate`: its options, several adapters, and a conversation, piped or with a person at a terminal."""

import io
import json
import os
import re
import select
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny
from chat_templates import CHATML, GENERATION, MISTRAL, PHI3
from tokenizers import processors

import refqlora as rq
from refqlora import commands as cli
from refqlora.commands import generate
from refqlora.commands.chat import Chat, converse
from refqlora.text.chat import load_chat_template
from refqlora.text.generation import complete
from refqlora.text.sampling import Sampling
from refqlora.text.tokenizer import load_tokenizer

ROOT = Path(__file__).parent.parent.parent
QUANTISED = "refqlora generate: note: the model is quantised to NF4; --no-quantize leaves it as it is\n"
SPECIAL = ["<|im_start|>", "<|im_end|>", "<|user|>", "<|assistant|>", "<|end|>"]


def speaking(path, chat_template=None, seed=0, max_positions=256, **files):
    """A model directory whose model says all sorts of things, with certainty, and a template."""
    tokenizer = tiny.tokenizer()
    tokenizer = type(tokenizer).from_str(tokenizer.to_str())
    tokenizer.add_special_tokens(SPECIAL)
    begin = [("<|endoftext|>", 0)]  # put before a text, but not before a template's
    tokenizer.post_processor = processors.TemplateProcessing(single="<|endoftext|> $A", special_tokens=begin)
    model = rq.Model.from_config(tiny.config(vocab_size=305, max_positions=max_positions), seed)
    for p in model.params.values():
        if p.ndim == 2:
            p *= 12
    model.save_pretrained(path)
    tokenizer.save(str(path / "tokenizer.json"))
    if chat_template is not None:
        config = {"chat_template": chat_template, "eos_token": "<|endoftext|>"}
        (path / "tokenizer_config.json").write_text(json.dumps(config))
    for name, content in files.items():
        (path / f"{name}.json").write_text(json.dumps(content))
    return path


def adapter(model, path, seed):
    model = rq.Model.from_pretrained(model)
    model.add_adapter(rank=2, seed=seed)
    for i, p in enumerate(model.trainable().values()):
        p += 0.1 * ((i + seed) % 3 - 0.5)  # of no two adapters alike, and never zero
    model.save_adapter(path)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    place = tmp_path_factory.mktemp("place")
    speaking(place / "model")
    speaking(place / "chatml", CHATML)
    for seed, name in enumerate(["a", "b", "other/a", "x=y"], start=1):
        (place / name).parent.mkdir(exist_ok=True)
        adapter(place / "model", place / name, seed)
    return place


@pytest.fixture
def place(prepared, tmp_path, monkeypatch):
    for path in prepared.iterdir():
        (tmp_path / path.name).symlink_to(path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def call(*argv):
    try:
        return cli.main([str(word) for word in argv])
    except SystemExit as end:
        return end.code or 0


def said(capsys, *argv):
    assert call("generate", *argv) == 0
    out, err = capsys.readouterr()
    assert err == QUANTISED
    return out


def model_of(directory="model", adapters=()):
    model = rq.Model.from_pretrained(directory, quantize="nf4")
    for name, path in adapters:
        model.load_adapter(path, name)
    return model, load_tokenizer(directory)


# ---- options ----


def test_every_sampling_option_arrives(place, monkeypatch, capsys):
    seen = {}
    monkeypatch.setattr(generate, "stream", lambda m, prompt, **options: seen.update(options) or iter(["said"]))
    argv = "--model model --prompt sacks --max-new-tokens 9 --temperature 0.5 --top-k 3 --top-p 0.25 --min-p 0.125"
    argv += " --repetition-penalty 1.5 --seed 7 --stop a --stop b\\n"
    assert said(capsys, *argv.split()) == "sackssaid\n"
    sampling = {"temperature": 0.5, "top_k": 3, "top_p": 0.25, "min_p": 0.125, "repetition_penalty": 1.5}
    assert seen == {"max_new_tokens": 9, "seed": 7, "stop": (0,), "stop_strings": ["a", "b\n"], **sampling}
    seen.clear()
    said(capsys, "--model", "model", "--prompt", "sacks")
    assert seen == {"max_new_tokens": 100, "seed": 0, "stop": (0,), "stop_strings": [], "temperature": 0.0}


def test_the_model_s_own_options_and_those_given(tmp_path, monkeypatch, capsys):
    seen = {}
    monkeypatch.setattr(generate, "stream", lambda m, prompt, **options: seen.update(options) or iter(["said"]))
    config = {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "eos_token_id": [5, 0]}
    speaking(tmp_path / "model", generation_config=config)
    said(capsys, "--model", tmp_path / "model", "--prompt", "sacks", "--top-p", "0.5")
    assert seen["stop"] == (5, 0)
    assert (seen["temperature"], seen["top_k"], seen["top_p"]) == (0.6, 50, 0.5)
    (tmp_path / "model" / "generation_config.json").write_text('{"top_k": -1}')
    assert call("generate", "--model", tmp_path / "model", "--prompt", "sacks") == 2
    assert "generation_config.json: top_k: expected a whole number from 0 to " in capsys.readouterr().err


def test_it_ends_before_a_stop_string(place, capsys):
    model, _ = model_of()
    whole = complete(model, "The mill", max_new_tokens=40)
    stop = whole[12:15]
    argv = ["--model", "model", "--prompt", "The mill", "--max-new-tokens", 40]
    assert said(capsys, *argv, "--stop", stop) == "The mill" + whole[: whole.index(stop)] + "\n"
    assert said(capsys, *argv, "--stop", "never said") == "The mill" + whole + "\n"


def test_a_special_token_stops_it_too(place, monkeypatch, capsys):
    """No text shows it, so that a stop string would never be found."""
    seen = {}
    monkeypatch.setattr(generate, "stream", lambda m, prompt, **options: seen.update(options) or iter(["said"]))
    said(capsys, "--model", "model", "--prompt", "sacks", "--stop", "<|im_end|>", "--stop", "end")
    assert seen["stop"] == (0, load_tokenizer("model").token_to_id("<|im_end|>"))


# ---- adapters ----


def test_what_each_adapter_writes(place, capsys):
    model, _ = model_of(adapters=[("a", "a"), ("mine", "b")])
    texts = {}
    for name in (None, "a", "mine"):
        model.set_adapter(name)
        texts[name] = "sacks" + complete(model, "sacks", max_new_tokens=9) + "\n"
    assert len(set(texts.values())) == 3
    argv = "--model model --prompt sacks --max-new-tokens 9"
    assert said(capsys, *argv.split()) == texts[None]
    assert said(capsys, *argv.split(), "--adapter", "a") == texts["a"]
    both = f"== a ==\n{texts['a']}== mine ==\n{texts['mine']}"
    assert said(capsys, *argv.split(), "--adapter", "a", "--adapter", "mine=b") == both


@pytest.mark.parametrize(
    ("given", "names"),
    [
        (["a", "b"], {"a": "a", "b": "b"}),
        (["a/", "other/a", "./a"], {"a": "a", "a-2": "other/a", "a-3": "a"}),
        (["b=a", "b"], {"b": "a", "b-2": "b"}),
        (["x=y"], {"x=y": "x=y"}),
        (["n=x=y", "other=other/a"], {"n": "x=y", "other": "other/a"}),
        (["off"], {"off-2": "off"}),
        (["no/x=y"], {"x=y": "no/x=y"}),
    ],
)
def test_the_names_of_adapters(given, names, place):
    assert generate.adapter_names(given) == {name: Path(path) for name, path in names.items()}


@pytest.mark.parametrize("given", [["off=a"], ["=a"], ["n=a", "n=b"], [" n=a"]])
def test_names_that_cannot_be(given, place, capsys):
    argv = [word for text in given for word in ("--adapter", text)]
    assert call("generate", "--model", "model", "--prompt", "sacks", *argv) == 2
    assert "is not a valid name, or appears twice" in capsys.readouterr().err


# ---- a conversation, piped ----


def talk(monkeypatch, capsys, lines, *argv):
    """What a conversation prints when these lines are piped in."""
    monkeypatch.setattr(sys, "stdin", io.StringIO("".join(line + "\n" for line in lines)))
    return said(capsys, "--chat", *argv)


def answers(directory, turns, system=None, adapters=(), switch=None, **options):
    """By definition: for each turn the whole conversation is written anew and read from its beginning."""
    model, tokenizer = model_of(directory, adapters)
    template = load_chat_template(directory, tokenizer, 0)
    messages = [] if system is None else [{"role": "system", "content": system}]
    for i, turn in enumerate(turns):
        if switch:
            model.set_adapter(switch[i])
        messages.append({"role": "user", "content": turn})
        ids = tokenizer.encode(template.render(messages, True), add_special_tokens=False).ids
        stop = (0, tokenizer.token_to_id("<|im_end|>"))
        said = complete(model, ids, max_new_tokens=20, stop=stop, **options).strip()
        messages.append({"role": "assistant", "content": said})
    return [message["content"] for message in messages if message["role"] == "assistant"]


TURNS = ["How many sacks?", "Zoë: «œufs» 🐟?", "And then?"]


@pytest.mark.parametrize("directory", ["model", "chatml"])
def test_each_line_is_a_turn_and_has_all_before_it(directory, place, monkeypatch, capsys):
    expected = answers(directory, TURNS)
    assert len(set(expected)) == 3
    out = talk(monkeypatch, capsys, TURNS, "--model", directory, "--max-new-tokens", 20)
    assert out == "".join(answer + "\n" for answer in expected)
    lines = ["", f"  {TURNS[0]} ", "   ", *TURNS[1:], "/quit", "never said"]
    assert talk(monkeypatch, capsys, lines, "--model", directory, "--max-new-tokens", 20) == out


def test_a_system_message(place, monkeypatch, capsys):
    expected = answers("chatml", TURNS, system="Be kind.")
    assert expected != answers("chatml", TURNS)
    argv = ["--model", "chatml", "--max-new-tokens", 20, "--system", "Be kind."]
    assert talk(monkeypatch, capsys, TURNS, *argv) == "".join(answer + "\n" for answer in expected)
    out = talk(monkeypatch, capsys, [*TURNS, "/reset", *TURNS], *argv).splitlines()
    assert "The conversation is forgotten." in out
    assert out[: out.index("The conversation is forgotten.")] == out[out.index("The conversation is forgotten.") + 1 :]


def test_adapters_are_switched_and_the_cache_with_them(place, monkeypatch, capsys):
    """The last is active at first. Each answer is what that adapter says, the conversation read from its beginning."""
    switch = ["b", "a", None]
    expected = answers("model", TURNS, adapters=[("a", "a"), ("b", "b")], switch=switch)
    assert expected[1:] != answers("model", TURNS, adapters=[("b", "b")], switch=["b"] * 3)[1:]
    lines = [TURNS[0], "/adapters", "/adapter a", TURNS[1], "/adapter off", TURNS[2], "/adapters"]
    argv = ["--model", "model", "--max-new-tokens", 20, "--adapter", "a", "--adapter", "b"]
    out = talk(monkeypatch, capsys, lines, *argv)
    listed = "  a\n* b\n  off\n", "  a\n  b\n* off\n"
    answer = [text + "\n" for text in expected]
    assert out == "".join([answer[0], listed[0], "Adapter: a\n", answer[1], "Adapter: off\n", answer[2], listed[1]])


def test_help_and_what_begins_with_a_slash(place, monkeypatch, capsys):
    out = talk(monkeypatch, capsys, ["/help", " /tmp is full"], "--model", "model", "--max-new-tokens", 20)
    for command in ("/adapter NAME", "/adapters", "/reset", "/help", "/quit"):
        assert command in out
    assert out.endswith(answers("model", ["/tmp is full"])[0] + "\n")


def test_sampling_differs_from_turn_to_turn_and_not_from_run_to_run(place, monkeypatch, capsys):
    argv = ["--model", "chatml", "--max-new-tokens", 20, "--temperature", 1.5]
    runs = [talk(monkeypatch, capsys, ["Hi", "/reset", "Hi"], *argv, "--seed", seed) for seed in (3, 3, 4)]
    assert runs[0] == runs[1] != runs[2]
    first, second = (answer.strip() for answer in runs[0].split("The conversation is forgotten.\n"))
    assert first != second


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["/nonsense"], "unknown command /nonsense: /help lists them"),
        (["/"], "unknown command /: /help lists them"),
        (["/adapter"], "expected /adapter NAME or /adapter off"),
        (["/adapter c"], "no adapter 'c'; there are: none"),
        (["Hi \udcff"], r"expected UTF-8 text, got half of a surrogate pair at character \d+"),
        (["word " * 300], r"the message's \d+ tokens fill the model's context of 256"),
    ],
)
def test_an_error_ends_a_piped_conversation(lines, message, place, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(lines)))
    assert call("generate", "--chat", "--model", "model") == 2
    assert re.fullmatch(f"{QUANTISED}refqlora generate: {message}.*\n", capsys.readouterr().err)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("--prompt sacks --chat", "argument --chat: not allowed with argument --prompt"),
        ("--prompt sacks --system kind", "--system needs --chat"),
        ("--prompt sacks --stop=", "stop_strings: expected a list of texts that are not empty"),
        ("--chat --stop=", "stop_strings: expected a list of texts that are not empty"),
        ("--chat --system \udcff", "expected UTF-8 text, got half of a surrogate pair"),
        ("--prompt sacks --min-p 2", "min_p: expected a number from 0 to 1, got 2.0"),
        ("--prompt sacks --repetition-penalty 0", "repetition_penalty: expected a number above 0, got 0.0"),
        ("--prompt sacks --adapter a --adapter missing", "missing/adapter_config.json: no such file"),
    ],
)
def test_options_that_cannot_be(argv, message, place, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", io.StringIO("Hi\n"))
    assert call("generate", "--model", "model", *argv.split()) == 2
    out, err = capsys.readouterr()
    assert re.fullmatch(rf"({QUANTISED})?refqlora generate: .*\n", err)
    assert message in err
    assert out == ""


# ---- what an answer ends with ----


@pytest.mark.parametrize(
    ("source", "end", "as_text"),
    [(CHATML, "<|im_end|>", False), (GENERATION, "<|im_end|>", False), (PHI3, "<|end|>", False)]
    + [(CHATML.replace("<|", "[").replace("|>", "]"), "[im_end]", True), (MISTRAL, "<|endoftext|>", False)],
)
def test_an_answer_ends_where_the_template_ends_it(source, end, as_text, tmp_path, monkeypatch):
    """By a special token, or by plain text of which nothing is shown, though config.json knows another end."""
    model, tokenizer = model_of(speaking(tmp_path, source))
    conversation = Chat(
        model,
        None,
        {"stop": (0,), "stop_strings": [], "seed": 0},
    )
    words = tokenizer.encode(" Two sacks.", add_special_tokens=False).ids
    ids = [*words, *tokenizer.encode(end, add_special_tokens=False).ids, *tokenizer.encode("\nNo more.").ids]
    assert (len(tokenizer.encode(end).ids) > 2) == as_text

    def speak(model, prompt, stop, **options):
        for token in ids:
            if token in stop:
                return
            yield token

    monkeypatch.setattr("refqlora.text.generation.generate", speak)
    assert "".join(conversation.say("How many?")) == "Two sacks."
    assert [m["content"] for m in conversation.messages] == ["How many?", "Two sacks."]


def test_the_cache_serves_from_turn_to_turn(place, monkeypatch):
    model, tokenizer = model_of("chatml")
    conversation = Chat(
        model,
        None,
        {"stop": (0,), "stop_strings": [], "seed": 0, "max_new_tokens": 60},
    )
    words = [
        *tokenizer.encode("Two sacks,\nand Zoë's 🐟.", add_special_tokens=False).ids,
        tokenizer.token_to_id("<|im_end|>"),
    ]
    left = []
    monkeypatch.setattr(Sampling, "draw", lambda *a: left.pop(0))
    read, forward = [], model.forward
    monkeypatch.setattr(model, "forward", lambda t, **kw: read.append(t.shape[1]) or forward(t, **kw), raising=False)
    for i, turn in enumerate(TURNS):
        read.clear()
        left[:] = words
        assert "".join(conversation.say(turn)) == "Two sacks,\nand Zoë's 🐟."
        new = f"<|im_end|>\n<|im_start|>user\n{turn}<|im_end|>\n<|im_start|>assistant\n"
        new = new if i else new.removeprefix("<|im_end|>\n")
        assert read == [len(tokenizer.encode(new, add_special_tokens=False).ids)] + [1] * (len(words) - 1)


def test_an_answer_that_is_broken_off_was_said_so_far(place):
    model, _ = model_of("chatml")
    options = {"stop": (0,), "stop_strings": [], "seed": 0, "max_new_tokens": 20}
    conversation = Chat(model, None, options)
    answer = conversation.say("Hi")
    pieces = next(answer) + next(answer) + next(answer)
    answer.close()
    assert [m["content"] for m in conversation.messages] == ["Hi", pieces.rstrip()]
    before = list(conversation.messages)
    nothing = Chat(model, None, {**options, "max_new_tokens": 0})
    nothing.messages = before
    assert "".join(nothing.say("Well?")) == ""
    assert nothing.messages == before  # roles must alternate: a question without an answer was not asked


def test_the_oldest_turns_are_forgotten_where_the_context_ends(place, monkeypatch, capsys):
    """The prompt always leaves room for an answer; the system message and the new question stay."""
    model, tokenizer = model_of("chatml")
    chat = Chat(model, "Be kind.", {"stop": (0,), "stop_strings": [], "seed": 0, "max_new_tokens": 20})
    context, turns = model.config.max_positions, 0
    for i in range(12):
        text = "".join(chat.say(f"{i}: how many sacks?"))
        assert text
        assert chat.messages[0]["content"] == "Be kind."
        assert [m["content"] for m in chat.messages[-2:]] == [f"{i}: how many sacks?", text.rstrip()]
        asked = tokenizer.encode(chat.template.render(chat.messages[:-1], True), add_special_tokens=False).ids
        assert len(asked) <= context - 20
        turns = max(turns, len(chat.messages))
    assert len(chat.messages) <= turns < 25
    assert [m["role"] for m in chat.messages] == ["system", *["user", "assistant"] * (len(chat.messages) // 2)]
    err = capsys.readouterr().err
    assert re.fullmatch(r"(\(the context is full: the oldest (turn is|\d+ turns are) forgotten\)\n)+", err)
    with pytest.raises(ValueError, match=r"the message's \d+ tokens fill the model's context of 256"):
        "".join(chat.say("word " * 300))
    assert "".join(chat.say("Well?"))  # it goes on


def test_what_is_quantised_already_is_not_said_to_be(place, capsys):
    for argv in (["--model", "model", "--no-quantize"], ["--model", "model"]):
        assert call("generate", "--prompt", "sacks", "--max-new-tokens", 1, *argv) == 0
        assert capsys.readouterr().err == ("" if "--no-quantize" in argv else QUANTISED)
    assert call("quantize", "--model", "model", "--out", "four") == 0
    shutil.copy(place / "model" / "tokenizer.json", place / "four")
    capsys.readouterr()
    assert call("generate", "--prompt", "sacks", "--max-new-tokens", 1, "--model", "four") == 0
    assert capsys.readouterr().err == ""


# ---- a conversation at a terminal ----


def test_ctrl_c_at_the_prompt_begins_a_new_line(place, monkeypatch, capsys):
    """Given here as Python gives it: readline may miss a signal in the moment before it waits for a key."""
    model, _ = model_of("chatml")
    conversation = Chat(model, None, {})
    typed = iter([KeyboardInterrupt, "/nonsense", KeyboardInterrupt, "/adapters", EOFError, "never read"])

    def read(prompt):
        print(prompt, end="")
        if isinstance(line := next(typed), str):
            return line
        raise line

    monkeypatch.setattr("builtins.input", read)
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    converse(conversation)
    out = (
        "/help lists the commands, Ctrl-D leaves.\n> \n> unknown command /nonsense: /help lists them\n> \n> * off\n> \n"
    )
    assert capsys.readouterr().out == out


class Terminal:
    """A process on a terminal of its own."""

    def __init__(self, *argv, cwd):
        self.master, slave = os.openpty()
        code = "import sys; from refqlora.commands import main; sys.exit(main())"
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "utf-8", "TERM": "dumb"}
        self.process = subprocess.Popen(
            [sys.executable, "-c", code, *argv],
            env=environment,
            cwd=cwd,
            preexec_fn=lambda: os.login_tty(slave),
        )
        os.close(slave)
        self.text = ""

    def until(self, pattern, seconds=60):
        """Wait for the pattern in what has come since the last was found; -> that text."""
        end = time.monotonic() + seconds
        while not (found := re.search(pattern, self.text)):
            ready = select.select([self.master], [], [], max(0, end - time.monotonic()))[0]
            try:
                data = os.read(self.master, 4096) if ready else b""
            except OSError:  # the other side is closed
                data = b""
            assert data, f"{pattern!r} did not come: {self.text!r}"
            self.text += data.decode(errors="replace").replace("\r\n", "\n")
        seen, self.text = self.text[: found.end()], self.text[found.end() :]
        return seen

    def type(self, text):
        os.write(self.master, text.encode())


@pytest.mark.skipif(not hasattr(os, "login_tty"), reason="this system has no terminals of that kind")
def test_a_person_at_a_terminal(place):
    """Errors are printed and the conversation continues; Ctrl-C stops the answer, Ctrl-D leaves."""
    shutil.copytree(place / "chatml", place / "endless", symlinks=False)
    config = json.loads((place / "endless" / "config.json").read_text())
    config |= {"eos_token_id": None, "max_position_embeddings": 100_000}
    (place / "endless" / "config.json").write_text(json.dumps(config))
    terminal = Terminal("generate", "--chat", "--model", "endless", "--adapter", "a", cwd=place)
    try:
        terminal.until(r"/help lists the commands, Ctrl-D leaves\.\n> ")
        terminal.type("/nonsense\n")
        terminal.until(r"unknown command /nonsense: /help lists them\n> ")
        terminal.type("/adapter off\n")
        terminal.until(r"Adapter: off\n> ")
        terminal.type("Tell me all\n")
        terminal.until(r"Tell me all\n[\s\S]{20}")  # it speaks without an end
        terminal.type("\x03")
        terminal.type("/adapters\n")  # waits for the answer to end
        terminal.until(r"  a\n\* off\n> ")
        terminal.type("/reset\n")
        terminal.until(r"forgotten\.\n> ")
        terminal.type("\x04")
        assert terminal.process.wait(30) == 0
    finally:
        if terminal.process.poll() is None:
            terminal.process.send_signal(signal.SIGKILL)
        os.close(terminal.master)
