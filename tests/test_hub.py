"""Models by name, with a stand-in for huggingface_hub: nothing here reaches for the network."""

import sys
import types
from collections.abc import Callable
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import pytest
from refusals import refused

from specjax.models import hub

NAME = "some-owner/Some_Model-1.5"
BY_HAND = (
    "download config.json, generation_config.json, tokenizer.json, tokenizer_config.json, "
    f"model*.safetensors and their index, if any, from https://huggingface.co/{NAME} "
    "into a directory and give that directory."
)
WHOLE = ("config.json", "tokenizer.json", "model.safetensors")


class RepositoryNotFoundError(Exception):
    pass


class GatedRepoError(RepositoryNotFoundError):
    pass


class RevisionNotFoundError(Exception):
    pass


class LocalEntryNotFoundError(FileNotFoundError):
    pass


class Hub:
    """What huggingface_hub does: `cached` is its cache, `online` what a call may fetch or raise."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.cached: tuple[str, ...] = ()
        self.online: tuple[str, ...] | Exception = WHOLE
        self.calls: list[dict[str, Any]] = []

    def snapshot_download(self, repo_id: str, **options: Any) -> str:
        self.calls.append({"repo_id": repo_id, **options})
        if options["local_files_only"] and not self.cached:
            raise LocalEntryNotFoundError("Cannot find it.\nPass local_files_only=False.")
        if not options["local_files_only"]:
            if isinstance(self.online, Exception):
                raise self.online
            self.cached += self.online
        self.directory.mkdir(exist_ok=True)
        for file in self.cached:
            (self.directory / file).touch()
        return str(self.directory)


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    fake = Hub(tmp_path / "snapshot")
    module: Any = types.ModuleType("huggingface_hub")
    module.snapshot_download = fake.snapshot_download
    module.errors = types.ModuleType("huggingface_hub.errors")
    for error in (
        RepositoryNotFoundError,
        GatedRepoError,
        RevisionNotFoundError,
        LocalEntryNotFoundError,
    ):
        setattr(module.errors, error.__name__, error)
    monkeypatch.setitem(sys.modules, "huggingface_hub", module)
    monkeypatch.setitem(sys.modules, "huggingface_hub.errors", module.errors)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return fake


def online(fake: Hub) -> list[bool]:
    """Of each call, whether it might use the network."""
    return [not call["local_files_only"] for call in fake.calls]


# ----------------------------------------------------------------------------- directories


def test_directories_are_returned_as_they_are(
    fake: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Path(NAME).mkdir(parents=True)
    assert hub.resolve(NAME) == Path(NAME)
    assert hub.resolve(tmp_path) == tmp_path
    assert hub.resolve(".") == Path(".")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert hub.resolve("~/here") == tmp_path / "here"
    Path(NAME).rename(Path(NAME).with_name(f".{Path(NAME).name}.previous"))
    assert hub.resolve(NAME).name == f".{Path(NAME).name}.previous"
    assert fake.calls == []


@pytest.mark.parametrize(
    "name",
    [
        "./model",
        "../model",
        "/no/such",
        "~/no/such",
        "~nobody-of-that/a",
        "a/b/c",
        "a/b/",
        "a//b",
        "a/.b",
        ".model",
        "@main",
        "a@",
        "a/b@",
        "a/b@r:v",
        "é/b",
        "a--b",
        "a..b@main",
        "a/b.git",
        "a/b.git@main",
        "https://huggingface.co/a/b",
    ],
)
def test_paths_are_never_looked_up(fake: Hub, name: str) -> None:
    refused(lambda: hub.resolve(name), "is not a directory; need one|has no home directory")
    refused(lambda: hub.resolve("a b"), "a b is not a directory; need one")
    assert fake.calls == []


def test_a_file_is_never_looked_up(fake: Hub) -> None:
    Path("model").touch()
    refused(lambda: hub.resolve("model"), "model is not a directory; need one with config.json")
    assert fake.calls == []


# ----------------------------------------------------------------------------- names


@pytest.mark.parametrize(
    ("name", "model", "revision"),
    [
        (NAME, NAME, None),
        ("gpt", "gpt", None),
        (f"{NAME}@v1.0", NAME, "v1.0"),
        ("gpt@refs/pr/1", "gpt", "refs/pr/1"),
        ("a/b.gitter@a..b--c.git", "a/b.gitter", "a..b--c.git"),
        (Path(NAME), NAME, None),
    ],
)
def test_fetches_what_is_not_here(
    fake: Hub, name: str | Path, model: str, revision: str | None
) -> None:
    assert hub.resolve(name) == fake.directory
    assert online(fake) == [False, True]
    assert {(call["repo_id"], call["revision"]) for call in fake.calls} == {(model, revision)}
    assert hub.resolve(name) == fake.directory
    assert online(fake) == [False, True, False]


def test_fetches_only_what_is_read(fake: Hub) -> None:
    hub.resolve(NAME)

    def taken(file: str) -> bool:
        allowed, ignored = (fake.calls[-1][f"{kind}_patterns"] for kind in ("allow", "ignore"))
        return any(fnmatchcase(file, p) for p in allowed) and not any(
            fnmatchcase(file, p) for p in ignored
        )

    for file in (*WHOLE, "chat_template.jinja", "model-00001-of-00002.safetensors"):
        assert taken(file)
    assert taken("model.safetensors.index.json")
    for file in ("onnx/config.json", "original/model.safetensors", "pytorch_model.bin"):
        assert not taken(file)
    assert not taken("consolidated.safetensors")
    assert not taken("consolidated-00001-of-00002.safetensors")


@pytest.mark.parametrize(
    "cached",
    [
        ("tokenizer.json",),
        ("config.json", "tokenizer.json"),
        ("tokenizer.json", "model.safetensors"),
        ("config.json", "model.safetensors"),
    ],
)
def test_completes_what_another_program_cached(fake: Hub, cached: tuple[str, ...]) -> None:
    fake.cached = cached
    assert hub.resolve(NAME) == fake.directory
    assert online(fake) == [False, True]


def test_heads_are_a_model(fake: Hub) -> None:
    fake.cached = ("config.json", "tokenizer.json", "medusa_lm_head.safetensors")
    assert hub.resolve(NAME) == fake.directory
    assert online(fake) == [False]


def test_a_model_without_tokenizer_needs_no_network(fake: Hub) -> None:
    fake.cached = ("config.json", "model.safetensors")
    fake.online = ConnectionError("no route")
    assert hub.resolve(NAME) == fake.directory


# ----------------------------------------------------------------------------- refusals


def no_network() -> Exception:
    error = LocalEntryNotFoundError("Got: ConnectError\nPlease check your internet connection.")
    error.__cause__ = OSError("[Errno -2] Name or service not known\nmore")
    return error


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (no_network, r"failed \(OSError: \[Errno -2\] Name or service not known\); need a con"),
        (lambda: ConnectionError("\n"), r"is not a directory, .* failed \(ConnectionError\); need"),
        (lambda: PermissionError(13, "denied"), r"\(PermissionError: \[Errno 13\] denied\); need"),
        (lambda: RepositoryNotFoundError("404\n"), "neither a directory nor a public model of"),
        (lambda: GatedRepoError("403\n"), "is gated on huggingface.co; accept .* set HF_TOKEN"),
        (lambda: RevisionNotFoundError("404\n"), "has no revision v2 on huggingface.co; need a"),
    ],
)
@pytest.mark.parametrize("cached", [(), ("config.json",)])
def test_refuses(
    fake: Hub, error: Callable[[], Exception], words: str, cached: tuple[str, ...]
) -> None:
    fake.cached, fake.online = cached, error()
    for expected in (f"^{NAME} .*{words}", f"or {BY_HAND}$".replace("*", r"\*")):
        refused(lambda: hub.resolve(f"{NAME}@v2"), expected)


@pytest.mark.parametrize("found", [("config.json",), ("model.safetensors",)])
def test_refuses_half_a_model(fake: Hub, found: tuple[str, ...]) -> None:
    fake.online = found
    refused(lambda: hub.resolve(NAME), f"{NAME} came .* without config.json or safetensors, see ")
    refused(lambda: hub.resolve(NAME), str(fake.directory))


def test_says_what_to_install(fake: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    refused(lambda: hub.resolve(NAME), r"^.* is not a directory, .* pip install 'specjax\[hub\]'")
    refused(lambda: hub.resolve(NAME), f"or {BY_HAND}$".replace("*", r"\*"))
