import errno
import gzip
import hashlib
import json
import os
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from language_model.data import text_files
from language_model.data.text_files import TextFiles, download, files_at


def documents(files: TextFiles) -> list[str]:
    found, begun = [], ""
    for text, ends in files.pieces():
        begun += text
        if ends:
            found.append(begun)
            begun = ""
    assert begun == ""
    return found


def write(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    content = content.encode() if isinstance(content, str) else content
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


@pytest.fixture
def library(tmp_path: Path) -> Path:
    write(tmp_path / "b.txt", "second")
    write(tmp_path / "a.txt.gz", "first")
    write(tmp_path / "deep" / "c.jsonl", '{"text": "third"}\n\n{"text": "fourth", "id": 4}\n')
    write(tmp_path / "deep" / "d.jsonl.gz", '{"id": 5, "text": "fifth"}')
    write(tmp_path / "deep" / "picture.png", b"\x89PNG")
    return tmp_path


def test_a_folder_a_glob_a_list_and_a_file(library: Path) -> None:
    assert documents(TextFiles(str(library))) == ["first", "second", "third", "fourth", "fifth"]
    assert documents(TextFiles(str(library / "*.txt*"))) == ["first", "second"]
    assert documents(TextFiles(str(library / "**" / "*.jsonl"))) == ["third", "fourth"]
    assert documents(TextFiles([str(library / "b.txt"), str(library / "a.txt.gz")])) == ["second", "first"]
    assert documents(TextFiles(str(library / "deep"))) == ["third", "fourth", "fifth"]
    assert TextFiles(str(library / "b.txt")).name == "b.txt"


def test_paths_relative_to_here_and_names_that_look_like_globs(library: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(library / "what[1].txt", "brackets")
    monkeypatch.chdir(library)
    assert documents(TextFiles("b.txt")) == ["second"]
    assert documents(TextFiles("*.gz")) == ["first"]
    assert documents(TextFiles("what[1].txt")) == ["brackets"]
    assert TextFiles(".").name == library.name


@given(
    text=st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=60),
    chunk=st.integers(1, 9),
)
@settings(deadline=None)
def test_text_comes_back_whatever_the_chunks(tmp_path_factory: pytest.TempPathFactory, text: str, chunk: int) -> None:
    folder = tmp_path_factory.mktemp("text")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text_files, "CHUNK", chunk)
        for encoding in ("utf-8", "utf-16", "utf-32-le", "gb18030"):
            write(folder / "text.txt", text.encode(encoding))
            assert documents(TextFiles(str(folder / "text.txt"), encoding=encoding)) == [text]
        normal = text.replace("\r\n", "\n").replace("\r", "\n")
        write(folder / "text.txt", text)
        assert documents(TextFiles(str(folder / "text.txt"), newlines="normalise")) == [normal]
        write(
            folder / "text.jsonl", json.dumps({"text": text}) + "\r\n" + json.dumps({"text": text}, ensure_ascii=False)
        )
        assert documents(TextFiles(str(folder / "text.jsonl"))) == [text, text]
        assert documents(TextFiles(str(folder / "text.jsonl"), newlines="normalise")) == [normal, normal]


def test_progress_adds_up_to_the_files_sizes(library: Path) -> None:
    files = TextFiles(str(library))
    told: list[int] = []
    list(files.pieces(told.append))
    assert sum(told) == files.num_bytes == sum(file.stat().st_size for file in files.files)


def test_another_field(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", '{"story": "once"}\n')
    assert documents(TextFiles(str(tmp_path / "a.jsonl"), field="story")) == ["once"]


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.txt", b"ab\xff", "a.txt is not UTF-8 text: byte 2 is 0xff; set data.encoding"),
        ("a.txt", b"a" * 5 + "é".encode()[:1], "byte 5 is 0xc3"),
        ("a.txt", b"ab\0", "a.txt is binary, not text"),
        ("a.txt.gz", b"ab\xff", "a.txt.gz is not UTF-8 text: byte 2 is 0xff"),
        ("a.jsonl", '{"text": "a"}\n\n{"text": ', "a.jsonl, line 3: not JSON"),
        ("a.jsonl", '{"text": "a"}\n["text"]', "a.jsonl, line 2: not a JSON object but list"),
        ("a.jsonl", '{"title": "a", "body": 1}', "a.jsonl, line 1: there is no field 'text', only 'title', 'body'"),
        ("a.jsonl", '{"text": 3}', "a.jsonl, line 1: the field 'text' is not text but int"),
        ("a.jsonl", '{"text": "\\ud800"}', "a.jsonl, line 1: half of a surrogate pair"),
    ],
)
def test_what_is_no_text_is_named_with_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, content: str | bytes, says: str
) -> None:
    files = TextFiles(str(write(tmp_path / name, content)))
    for chunk in (1, 3, 1 << 20):
        monkeypatch.setattr(text_files, "CHUNK", chunk)
        with pytest.raises(ValueError, match=says) as raised:
            documents(files)
        assert str(raised.value).startswith(f"path={tmp_path / name}: ")


def test_a_gzip_file_that_is_not_whole(tmp_path: Path) -> None:
    path = tmp_path / "a.txt.gz"
    path.write_bytes(gzip.compress(os.urandom(1_000).hex().encode())[:-100])
    with pytest.raises(ValueError, match=r"a.txt.gz is not a complete gzip file"):
        documents(TextFiles(str(path)))
    path.write_bytes(b"plain")
    with pytest.raises(ValueError, match=r"a.txt.gz is not a complete gzip file: Not a gzipped file"):
        documents(TextFiles(str(path)))


def test_nothing_where_text_should_be(tmp_path: Path) -> None:
    (tmp_path / "picture.png").touch()
    with pytest.raises(ValueError, match=r"it has no file that ends in \.txt, \.text, \.md, \.jsonl, \.ndjson"):
        files_at(str(tmp_path))
    with pytest.raises(ValueError, match=r"\*\.txt: no file matches"):
        files_at(str(tmp_path / "*.txt"))
    with pytest.raises(FileNotFoundError):
        files_at(str(tmp_path / "missing.txt"))
    (tmp_path / "link.txt").symlink_to("missing.txt")
    for place in (tmp_path, tmp_path / "link.txt", tmp_path / "l*.txt"):  # a file of the text is missing
        with pytest.raises(ValueError, match=r"^val_path=.*link\.txt: no such file or directory$"):
            TextFiles(str(place), parameter="val_path")


def test_one_missing_file_of_a_list_is_named(library: Path) -> None:
    paths = [str(library / "b.txt"), str(library / "missing.txt")]
    with pytest.raises(ValueError, match=r"^path=\[.*b\.txt,.*\]: .*missing\.txt: no such file or directory$"):
        TextFiles(paths)


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has neither")
def test_a_pipe_and_a_device_are_refused_before_they_are_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.txt")
    for place in ("/dev/zero", str(tmp_path / "pipe.txt"), str(tmp_path / "*.txt"), str(tmp_path)):
        with pytest.raises(ValueError, match=r"^path=.*: it is not a regular file"):
            TextFiles(place)


def test_what_cannot_be_opened_is_named(library: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By made-up errors, as an administrator's tests may open everything."""

    def refuse(self: Path, *_: str) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(self))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", refuse)
        with pytest.raises(ValueError, match=rf"^path={library}/b.txt: permission denied$"):
            TextFiles(str(library / "b.txt"))
    real = os.scandir
    monkeypatch.setattr(os, "scandir", lambda folder: refuse(Path(folder)) if "deep" in str(folder) else real(folder))
    for place in (library / "deep", library):  # a folder in a folder is not left out
        with pytest.raises(ValueError, match=rf"^path={place}: .*permission denied$"):
            TextFiles(str(place))


@pytest.mark.parametrize("url", ["https://www.gutenberg.org/a.txt", "s3://bucket/b.txt?x=*", "file:///c.txt"])
def test_an_address_is_no_path(url: str) -> None:
    with pytest.raises(ValueError, match=r": it is an address, not a file: download it, .* data\.url and data\.sha256"):
        TextFiles(url)


CONTENT = b"First Citizen:\nBefore we proceed any further, hear me speak.\n" * 4_000
SHA256 = hashlib.sha256(CONTENT).hexdigest()


class Server(BaseHTTPRequestHandler):
    """Serves CONTENT, and what can go wrong with it."""

    requests = 0

    def do_GET(self) -> None:
        type(self).requests += 1
        if self.path.startswith("/missing"):
            self.send_error(404)
            return
        self.send_response(200)
        if not self.path.startswith("/unsized"):
            self.send_header("Content-Length", str(len(CONTENT)))
        self.end_headers()
        self.wfile.write(CONTENT[:100_000] if self.path.startswith("/broken") else CONTENT)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[str]:
    Server.requests = 0
    with ThreadingHTTPServer(("127.0.0.1", 0), Server) as running:
        thread = threading.Thread(target=running.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{running.server_port}"
        running.shutdown()
        thread.join()


@pytest.mark.parametrize("size", ["whole", "unsized"])
def test_a_corpus_is_fetched_once(server: str, tmp_path: Path, size: str) -> None:
    url = f"{server}/{size}/input.txt"
    for _ in range(2):
        path = download(url, SHA256, tmp_path / "cache")
        assert path.name == f"{size}-input.txt"
        assert path.read_bytes() == CONTENT
    assert Server.requests == 1
    path.write_bytes(b"changed since")
    assert download(url, SHA256, tmp_path / "cache").read_bytes() == CONTENT
    assert list((tmp_path / "cache").iterdir()) == [path]


@pytest.mark.parametrize(
    ("path", "sha256", "says"),
    [
        ("missing/a.txt", SHA256, "HTTP Error 404"),
        ("broken/a.txt", SHA256, "it ended after 100,000 of 244,000 bytes"),
        ("whole/a.txt", "0" * 64, f"its sha256 is {SHA256} and should be 000"),
    ],
)
def test_a_failed_download_leaves_nothing_and_says_what_to_do(
    server: str, tmp_path: Path, path: str, sha256: str, says: str
) -> None:
    url = f"{server}/{path}"
    with pytest.raises(ValueError, match=f"^url={url}: it could not be downloaded: .*{says}") as failed:
        download(url, sha256, tmp_path)
    name = path.replace("/", "-")
    assert f"download it by hand, curl -L -o {name} {url}, and set data.path={name}" in str(failed.value)
    assert list(tmp_path.iterdir()) == []


def test_no_network(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"could not be downloaded: .*[Rr]efused.*; download it by hand"):
        download("http://127.0.0.1:9/a/b.txt", SHA256, tmp_path)
    assert list(tmp_path.iterdir()) == []
