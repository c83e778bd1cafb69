"""Models by their id on the hub: the requests and the errors, with a mock library, with a real cache without a network,
and with the real client on a small hub of our own on this machine."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import unquote, urlsplit

import huggingface_hub
import pytest
import tiny
from huggingface_hub import errors

import refqlora as rq
from refqlora.files import hub
from refqlora.text.tokenizer import load_tokenizer

ROOT = Path(__file__).parent.parent.parent
REVISION = "0123456789abcdef0123456789abcdef01234567"
GENERATE = ("generate", "--prompt", "sacks", "--max-new-tokens", "3")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny.save(tmp_path_factory.mktemp("hub") / "model")


@pytest.fixture
def asked(monkeypatch, model):
    """What snapshot_download is asked for; it gives `model`."""
    calls = []

    def download(repo_id, **options):
        calls.append((repo_id, options))
        return str(model)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    return calls


# ---- a library that only pretends ----


def test_a_directory_is_itself_and_nothing_is_asked(asked, model, monkeypatch):
    assert hub.model_directory(model) == hub.model_directory(str(model)) == model
    monkeypatch.chdir(model.parent.parent)
    relative = f"{model.parent.name}/model"  # which might be an id
    assert hub.model_directory(relative) == Path(relative)
    assert hub.model_directory(rq.BUNDLED) == rq.BUNDLED
    assert asked == []


@pytest.mark.parametrize(
    ("name", "repo", "revision"),
    [
        ("org/name", "org/name", None),
        ("meta-llama/Llama-3.2-1B", "meta-llama/Llama-3.2-1B", None),
        ("a_b/c.d-e_f", "a_b/c.d-e_f", None),
        ("org/name@main", "org/name", "main"),
        ("org/name@refs/pr/1", "org/name", "refs/pr/1"),
        (f"org/name@{REVISION}", "org/name", REVISION),
        (Path("org/name"), "org/name", None),
    ],
)
def test_an_id_is_downloaded(asked, model, name, repo, revision):
    assert hub.model_directory(name) == model
    ((found, options),) = asked
    assert (found, options["revision"]) == (repo, revision)


NO_IDS = ["gpt2", "no/such/directory", "/org/name", "./org/name", "../name", "~/name", "org/", "/name", "org/na me"]
NO_IDS += ["org/name@", "org/name@a b", "-org/name", "org/.name", "org//name", "https://huggingface.co/org/name"]


@pytest.mark.parametrize("name", NO_IDS)
def test_the_hub_is_not_asked_for_impossible_ids(asked, name):
    with pytest.raises(FileNotFoundError, match="no such directory") as error:
        hub.model_directory(name)
    assert "org/name" in str(error.value)  # how an id is written
    assert asked == []


def test_what_takes_the_id(asked, model):
    """The model, the tokenizer, and each command once."""
    rq.Model.from_pretrained("org/name")
    assert load_tokenizer("org/name").to_str() == tiny.tokenizer().to_str()
    assert len(asked) == 2


def test_a_command_asks_once(asked, model, tmp_path, capsys, monkeypatch):
    from refqlora.commands import main

    assert main([*GENERATE, "--model", "org/name@v2"]) == 0
    assert len(asked) == 1
    (tmp_path / "text.txt").write_text(tiny.TEXT)
    monkeypatch.chdir(tmp_path)
    options = "finetune --data text.txt --model org/name@v2 --out out --steps 1 --max-length 16"
    assert main(options.split()) == 0
    assert len(asked) == 2
    assert asked[0] == asked[1]
    config = json.loads((tmp_path / "out/adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "org/name@v2"  # not a directory of the cache


def response(code=404):
    """What the errors of huggingface_hub want to be made from."""
    return SimpleNamespace(headers={}, request=None, status_code=code)


FAILURES = {
    "offline": (errors.LocalEntryNotFoundError("Cannot find\nit"), FileNotFoundError, "cannot be reached: download it"),
    "gated": (
        errors.GatedRepoError("401\nx", response=response()),
        ValueError,
        "the model is gated: ask for access at https",
    ),
    "not there": (
        errors.RepositoryNotFoundError("404\nx", response=response()),
        FileNotFoundError,
        "no such directory, and no such model on the Hugging Face hub; if it is private, log in with `hf auth login`",
    ),
    "no revision": (
        errors.RevisionNotFoundError("404\nx", response=response()),
        FileNotFoundError,
        "the model has no revision v2",
    ),
    "bad id": (
        errors.HFValidationError("Cannot have -- or ..\nx"),
        ValueError,
        "neither a directory nor the id of a model: Cannot have -- or ..",
    ),
    "the hub is down": (
        errors.HfHubHTTPError("503 Server Error\nfor url", response=response(503)),
        OSError,
        "the download failed (503 Server Error): download it where you can with `hf download org/name --local-dir DIR`",
    ),
    "disk full": (OSError(28, "No space left on device", "blob"), OSError, "No space left on device: 'blob'"),
    "proxy": (RuntimeError("proxy\nrefuses"), OSError, "the download failed (proxy): download it where you can"),
    "silent": (RuntimeError(), OSError, "the download failed (RuntimeError)"),
}


@pytest.mark.parametrize(("raised", "kind", "said"), FAILURES.values(), ids=FAILURES)
def test_a_failure_says_what_to_do_in_one_line(monkeypatch, capsys, raised, kind, said):
    from refqlora.commands import main

    def download(*args, **options):
        raise raised

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    with pytest.raises(kind) as error:
        rq.Model.from_pretrained("org/name@v2")
    assert str(error.value).startswith("org/name@v2: ")
    assert said in str(error.value)
    assert "\n" not in str(error.value)
    assert main([*GENERATE, "--model", "org/name@v2"]) == 2
    assert capsys.readouterr().err == f"refqlora generate: {error.value}\n"


def test_a_model_without_safetensors_is_refused(monkeypatch, tmp_path):
    (tmp_path / "config.json").write_text("{}")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *args, **options: str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"^org/name: contains no \*\.safetensors") as error:
        rq.Model.from_pretrained("org/name")
    assert 'AutoModelForCausalLM.from_pretrained("org/name").save_pretrained(OUT)' in str(error.value)


def test_without_the_library_an_id_is_refused_in_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ModuleNotFoundError) as error:
        hub.model_directory("org/name@v2")
    assert str(error.value) == (
        "org/name@v2: no such directory, and huggingface_hub, which downloads models, is not installed"
    )
    assert hub.model_directory(rq.BUNDLED) == rq.BUNDLED


@pytest.mark.parametrize("name", ["model.bin", "model.pt", "model.pth"])
def test_a_pickled_file_is_refused(tmp_path, name):
    (tmp_path / name).touch()
    with pytest.raises(ValueError, match=rf"{name}: pickled files are never opened.*save_pretrained\(OUT\)"):
        rq.Model.from_pretrained(tmp_path / name)


# ---- the real library ----


def refqlora(*argv, **environment):
    """The command in a process of its own, where the library reads its environment anew."""
    command = [sys.executable, "-c", "import sys; from refqlora.commands import main; sys.exit(main())", *argv]
    unset = {"HF_HUB_OFFLINE", "HF_TOKEN", "HF_HUB_CACHE", "HF_ENDPOINT", "HTTP_PROXY", "http_proxy"}
    kept = {name: value for name, value in os.environ.items() if name not in unset}
    environment = {**kept, "PYTHONPATH": str(ROOT), "NO_PROXY": "127.0.0.1", **environment}
    run = subprocess.run(command, env=environment, capture_output=True, encoding="utf-8", timeout=120)
    return run.returncode, run.stdout, run.stderr


@pytest.fixture(scope="module")
def expected(model):
    """What comes of the model's own directory."""
    result = refqlora(*GENERATE, "--model", str(model))
    assert result[0] == 0
    return result


@pytest.fixture
def cache(model, tmp_path):
    """A cache as the library lays it out, with org/name in it."""
    repo = tmp_path / "hub" / "models--org--name"
    shutil.copytree(model, repo / "snapshots" / REVISION)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(REVISION)
    return {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}


def test_the_cache_serves_without_a_network(cache, expected):
    assert refqlora(*GENERATE, "--model", "org/name", **cache) == expected
    assert refqlora(*GENERATE, "--model", f"org/name@{REVISION}", **cache) == expected


@pytest.mark.parametrize("name", ["org/other", "org/name@v2"])
def test_without_a_network_a_missing_model_is_named(cache, name):
    code, out, err = refqlora(*GENERATE, "--model", name, **cache)
    repo = name.split("@")[0]
    assert (code, out) == (2, "")
    assert err == (
        f"refqlora generate: {name}: not a directory, not in the cache, and the Hugging Face hub cannot be reached: "
        f"download it where you can with `hf download {repo} --local-dir DIR` and give DIR\n"
    )


def test_no_network_at_all(tmp_path):
    """A real connection, refused."""
    code, out, err = refqlora(*GENERATE, "--model", "org/name", HF_HOME=str(tmp_path), HF_ENDPOINT="http://127.0.0.1:9")
    assert (code, out) == (2, "")
    assert err.endswith("and give DIR\n")
    assert "org/name: not a directory, not in the cache, and the Hugging Face hub cannot be reached" in err


class Hub(BaseHTTPRequestHandler):
    """As much of the hub as a download takes: a model's facts, its tree, and its files."""

    files: dict[str, bytes]
    asked: list[str]

    def do_GET(self):
        path = unquote(urlsplit(self.path).path)
        self.asked.append(path)
        if path.startswith(("/api/models/org/gated", "/org/gated")):
            self.reply(403, b"{}", {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access to it is restricted."})
        elif path == "/api/models/org/name/revision/main":
            siblings = [{"rfilename": name} for name in self.files]
            self.reply(200, json.dumps({"_id": "1", "id": "org/name", "sha": REVISION, "siblings": siblings}).encode())
        elif path == f"/api/models/org/name/tree/{REVISION}":
            tree = [
                {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                for name, data in self.files.items()
            ]
            self.reply(200, json.dumps(tree).encode())
        elif path.removeprefix(f"/org/name/resolve/{REVISION}/") in self.files:
            data = self.files[path.removeprefix(f"/org/name/resolve/{REVISION}/")]
            self.reply(200, data, {"X-Repo-Commit": REVISION, "ETag": f'"{hashlib.sha1(data).hexdigest()}"'})
        elif path.startswith("/api/models/org/name/"):
            self.reply(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
        else:
            self.reply(404, b"{}", {"X-Error-Code": "RepoNotFound"})

    do_HEAD = do_GET

    def reply(self, code, data, headers=None):
        self.send_response(code)
        for name, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data)

    def log_message(self, *args):
        pass


@pytest.fixture
def served(model, tmp_path):
    """A hub with org/name, beside whose model lies what must not be fetched; -> the environment, what was asked."""
    files = {file.name: file.read_bytes() for file in model.iterdir()}
    files |= dict.fromkeys(("generation_config.json", "tokenizer_config.json", "special_tokens_map.json"), b"{}")
    files |= {"chat_template.jinja": b"x"}
    files |= dict.fromkeys(("pytorch_model.bin", "model.pth", "original/model.safetensors", "onnx/model.onnx"), b"\x80")
    files |= dict.fromkeys(("consolidated.safetensors", "README.md", "training_args.bin", "original/params.json"), b"x")
    handler = type("Handler", (Hub,), {"files": files, "asked": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    endpoint = f"http://127.0.0.1:{server.server_port}"
    yield {"HF_HOME": str(tmp_path / "home"), "HF_ENDPOINT": endpoint, "HF_HUB_DISABLE_XET": "1"}, handler.asked
    server.shutdown()
    server.server_close()


def test_a_download_from_a_hub(served, expected, tmp_path):
    """All of it real: the model comes, nothing else does, and the next time nothing does."""
    environment, asked = served
    assert refqlora(*GENERATE, "--model", "org/name", **environment) == expected
    prefix = f"/org/name/resolve/{REVISION}/"
    wanted = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    wanted |= {"special_tokens_map.json", "chat_template.jinja"}
    assert {path.removeprefix(prefix) for path in asked if path.startswith(prefix)} == wanted
    snapshot = tmp_path / "home" / "hub" / "models--org--name" / "snapshots" / REVISION
    assert {file.name for file in snapshot.iterdir()} == wanted
    asked.clear()
    assert refqlora(*GENERATE, "--model", "org/name", **environment) == expected
    assert not any(path.startswith(prefix) for path in asked)
    assert refqlora(*GENERATE, "--model", "org/name", **environment, HF_HUB_OFFLINE="1") == expected


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("org/other", "no such directory, and no such model on the Hugging Face hub; if it is private, log in with "),
        ("org/name@v2", "the model has no revision v2"),
        (
            "org/gated",
            "the model is gated: ask for access at https://huggingface.co/org/gated, then log in with `hf auth login`",
        ),
    ],
)
def test_what_a_hub_refuses(served, name, said):
    environment, _ = served
    code, out, err = refqlora(*GENERATE, "--model", name, **environment)
    assert (code, out) == (2, "")
    assert err.startswith(f"refqlora generate: {name}: {said}")
    assert err.count("\n") == 1


def test_merge_and_quantize_take_the_id_too(asked, model, tmp_path, capsys):
    from refqlora.commands import main

    adapted = rq.Model.from_pretrained(model)
    adapted.add_adapter(rank=2)
    for p in adapted.trainable().values():
        p += 0.1
    adapted.save_adapter(tmp_path / "adapter")
    assert main(["quantize", "--model", "org/name", "--out", str(tmp_path / "quantised")]) == 0
    argv = ["merge", "--model", "org/name", "--adapter", str(tmp_path / "adapter"), "--out", str(tmp_path / "merged")]
    assert main(argv) == 0
    assert [repo for repo, _ in asked] == ["org/name"] * 2
    for out in ("quantised", "merged"):
        assert load_tokenizer(tmp_path / out).to_str() == load_tokenizer(model).to_str()
        rq.Model.from_pretrained(tmp_path / out)
