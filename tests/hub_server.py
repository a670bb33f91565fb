"""A small Hub on loopback: what the Hub's protocol needs for models, over real HTTP, for tests with the real client.

What `huggingface_hub` asks for is answered as the Hub answers it: headers, error codes, redirects of weight files to a
second origin; uploads through git LFS (the client needs `HF_HUB_DISABLE_XET=1`), commits, metadata that is refused.
"""

from __future__ import annotations

import base64
import hashlib
import json
import multiprocessing
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, cast
from unittest.mock import patch
from urllib.parse import parse_qs, unquote, urlencode, urlsplit

from huggingface_hub import close_session, constants, hf_api

from .hub_metadata import errors_in


TREE = "/tree"  # stands for the list of files in the place of a file
# The Hub keeps these in git LFS and redirects to a storage host; all others it serves itself.
LFS_SUFFIXES = (".safetensors", ".bin")
SECONDS = 120  # that a call in another process may take, the start of the process included


@dataclass
class Repository:
    """Files by commit and commits by branch or tag.

    Attributes:
        commits: commit -> path -> content.
        refs: branch or tag -> commit.
        private: readable only with the server's token; to everybody else it does not exist.
        gated: it can be seen, but its files need the server's token.
        tags: by which it is listed.
        downloads: in the last 30 days.
    """

    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    private: bool = False
    gated: bool = False
    tags: list[str] = field(default_factory=list)
    downloads: int = 0


@dataclass(frozen=True)
class Request:
    """One request that the server got, and what it answered.

    Attributes:
        host: "hub" or "storage".
        repo: repository, by id.
        revision: as asked for: a branch, tag or commit.
        file: path in the repository; for an upload to the storage host the sha256 of the content; empty for what is
            about the repository itself.
        range: the Range header, if any.
        authorized: whether a token came along.
    """

    host: str
    method: str
    repo: str
    revision: str
    file: str
    range: str | None
    authorized: bool
    status: int


@dataclass(frozen=True)
class _Answer:
    status: HTTPStatus
    headers: Mapping[str, str]
    body: bytes = b""


class HubServer:
    """A Hub at `url`, with repositories that a test fills; use it as a context manager.

    Attributes:
        token: the one token that opens private and gated repositories, and that may write.
        token_of_another: a valid token of a user who may do none of that.
        latency: seconds that every answer takes.
        objects: what was uploaded to the storage host, by sha256.
        requests: what was asked about repositories, in order; `clear` empties it.
        cut_off: method, repository and file of the uploads that were broken off; `clear` empties it.
        page: how many repositories one answer lists.
        most_at_once: the largest number of requests that were in the works at the same time, since `clear`.
    """

    user = "me"
    token = "hf_test_token"
    token_of_another = "hf_test_token_of_another"

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.requests: list[Request] = []
        self.latency = 0.0
        self.page = 1000
        self.most_at_once = 0
        self._at_once = 0
        self.objects: dict[str, bytes] = {}
        self.cut_off: list[tuple[str, str, str]] = []
        self._cuts: dict[tuple[str, str, str], list[int]] = {}
        self._lock = threading.Lock()
        self._origins: dict[str, _Origin] = {}
        self._ports: dict[str, int] = {"hub": 0, "storage": 0}

    # What a test does with it

    def __enter__(self) -> HubServer:
        self.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.stop()

    def start(self) -> None:
        """Listen; after `stop` on the same ports as before."""
        for host, port in self._ports.items():
            origin = _Origin(self, host, port)
            self._ports[host] = origin.server_port
            self._origins[host] = origin
            threading.Thread(target=origin.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    def stop(self) -> None:
        """Go away: close the listening sockets and every open connection."""
        while self._origins:
            _, origin = self._origins.popitem()
            origin.shutdown()
            origin.server_close()
            origin.close_connections()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._ports['hub']}"

    def push(
        self, repo: str, files: Mapping[str, bytes], branch: str = "main", private: bool = False, gated: bool = False
    ) -> str:
        """Commit files, all there are, to a branch of a repository that is made where it does not exist.

        Returns:
            The commit, 40 hex digits.
        """
        repository = self.repositories.setdefault(repo, Repository(private=private, gated=gated))
        commit = hashlib.sha1(f"{repo} {len(repository.commits)}".encode()).hexdigest()
        repository.commits[commit] = dict(files)
        repository.refs[branch] = commit
        return commit

    def tag(self, repo: str, name: str, commit: str) -> None:
        self.repositories[repo].refs[name] = commit

    def falsify(self, repo: str, commit: str, file: str, content: bytes) -> None:
        """Change a file of a commit that is there already, which no honest Hub does."""
        self.repositories[repo].commits[commit][file] = content

    def cut(self, repo: str, file: str, *after: int, method: str = "GET") -> None:
        """Break the connection after so many bytes of a file (0: before any answer): one entry per request to come.

        An upload (`method="PUT"`) is named by the sha256 of the file.
        """
        self._cuts[method, repo, file] = list(after)

    def clear(self) -> None:
        """Forget the requests so far."""
        self.requests.clear()
        self.cut_off.clear()
        self.most_at_once = 0

    def asked(self, repo: str, method: str | None = None) -> list[str]:
        """The files of a repository that were asked for, in order; redirects of a weight file count once.

        Args:
            repo: the repository.
            method: only these requests; a GET counts where the bytes come from.
        """
        return [
            request.file
            for request in self.requests
            if request.repo == repo and method in (None, request.method) and not 300 <= request.status < 400
        ]

    # How it answers

    def answer(
        self, host: str, method: str, target: str, headers: Mapping[str, str], body: bytes
    ) -> tuple[_Answer, int | None]:
        """The answer to one request, and after how many bytes of it the connection breaks, if it does."""
        if method not in ("GET", "HEAD"):
            return self._answer_to_change(
                host, method, urlsplit(target).path, headers.get("Authorization"), body
            ), None
        if urlsplit(target).path == "/api/models" and host == "hub":
            return self._list(parse_qs(urlsplit(target).query), headers.get("Authorization")), None
        asked = _parse(urlsplit(target).path)
        if asked is None:  # the client also asks, once a day, for things that have nothing to do with repositories
            return _error(HTTPStatus.NOT_FOUND, None, f"no such address: {target}"), None
        with self._lock:
            self._at_once += 1
            self.most_at_once = max(self.most_at_once, self._at_once)
        time.sleep(self.latency)
        repo, revision, file = asked
        authorization = headers.get("Authorization")
        wanted_range = headers.get("Range")
        answer = self._answer(host, repo, revision, file, authorization)
        if wanted_range and answer.status == HTTPStatus.OK:
            answer = _part(answer, wanted_range)
        status = int(answer.status)
        with self._lock:
            self._at_once -= 1
            self.requests.append(
                Request(host, method, repo, revision, file, wanted_range, authorization is not None, status)
            )
            cuts = self._cuts.get((method, repo, file))
            is_redirected = method == "GET" and answer.status == HTTPStatus.FOUND
            return answer, cuts.pop(0) if cuts and not is_redirected else None

    def _list(self, wanted: Mapping[str, list[str]], authorization: str | None) -> _Answer:
        """A page of the repositories with all of some tags, the most downloaded first."""
        found = [
            {
                "id": name,
                "modelId": name,
                "private": repository.private,
                "gated": "manual" if repository.gated else False,
                "tags": repository.tags,
                "downloads": repository.downloads,
                "lastModified": "2026-01-02T03:04:05.000Z",
            }
            for name, repository in sorted(self.repositories.items(), key=lambda own: -own[1].downloads)
            if set(wanted.get("filter", ())) <= set(repository.tags)
            and wanted.get("search", [""])[0].lower() in name.lower()
            and wanted.get("author", [name.partition("/")[0]])[0] == name.partition("/")[0]
            and (not repository.private or authorization == f"Bearer {self.token}")
        ]
        start = int(wanted.get("cursor", ["0"])[0])
        end = start + min(self.page, int(wanted.get("limit", ["1000"])[0]))
        answer = _json(found[start:end])
        if end < len(found):
            following = urlencode({**wanted, "cursor": [end]}, doseq=True)
            return _Answer(
                answer.status,
                {**answer.headers, "Link": f'<{self.url}/api/models?{following}>; rel="next"'},
                answer.body,
            )
        return answer

    def upload_cut(self, method: str, target: str) -> int | None:
        """After how many bytes the connection breaks while the client sends, if it does."""
        repo, _, file = _parse(urlsplit(target).path) or ("", "", "")
        with self._lock:
            cuts = self._cuts.get((method, repo, file)) if method == "PUT" else None
            if not cuts:
                return None
            self.cut_off.append((method, repo, file))
            return cuts.pop(0)

    def _answer_to_change(self, host: str, method: str, path: str, authorization: str | None, body: bytes) -> _Answer:
        parts = [unquote(part) for part in path.strip("/").split("/")]
        repo, revision, file = _parse(path) or ("", "", "")
        with self._lock:
            answer = self._change(host, method, parts, authorization, body)
            self.requests.append(
                Request(host, method, repo, revision, file, None, authorization is not None, int(answer.status))
            )
        return answer

    def _change(self, host: str, method: str, parts: list[str], authorization: str | None, body: bytes) -> _Answer:
        """What a request that may write does, and its answer."""
        if host == "storage":
            return self._store(parts[-1], body)
        if method == "POST" and parts == ["api", "validate-yaml"]:
            errors = [{"message": error} for error in errors_in(json.loads(body)["content"])]
            return _json({"errors": errors, "warnings": []}, HTTPStatus.BAD_REQUEST if errors else HTTPStatus.OK)
        if authorization != f"Bearer {self.token}":
            status = HTTPStatus.FORBIDDEN if authorization else HTTPStatus.UNAUTHORIZED
            return _error(status, None, "You don't have the rights to do that")
        if parts[:2] == ["api", "repos"]:
            return self._create_or_delete(method, json.loads(body))
        repo = "/".join(parts[2:4]) if parts[0] == "api" else f"{parts[0]}/{parts[1].removesuffix('.git')}"
        if repo not in self.repositories:
            return _error(HTTPStatus.NOT_FOUND, "RepoNotFound", "Repository not found")
        if parts[2:] == ["info", "lfs", "objects", "batch"]:
            return self._offer_uploads(repo, json.loads(body))
        if parts[2:] == ["info", "lfs", "verify"]:
            is_there = json.loads(body)["oid"] in self.objects
            return _json({}, HTTPStatus.OK if is_there else HTTPStatus.NOT_FOUND)
        action, branch = parts[4], "/".join(parts[5:])
        if action == "branch":
            return self._branch(repo, branch, json.loads(body or b"{}").get("startingPoint", "main"))
        if branch not in self.repositories[repo].refs:
            return _error(HTTPStatus.NOT_FOUND, "RevisionNotFound", f"Invalid rev id: {branch}")
        if action == "preupload":
            return _json({"files": [self._upload_mode(repo, branch, file) for file in json.loads(body)["files"]]})
        assert action == "commit"
        return self._commit(repo, branch, [json.loads(line) for line in body.splitlines()])

    def _create_or_delete(self, method: str, asked: dict[str, Any]) -> _Answer:
        repo = f"{asked.get('organization') or self.user}/{asked['name']}"
        if method == "DELETE":
            known = self.repositories.pop(repo, None)
            return _json({}) if known else _error(HTTPStatus.NOT_FOUND, "RepoNotFound", "Repository not found")
        url = {"url": f"{self.url}/{repo}"}
        if repo in self.repositories:
            return _json({**url, "error": "You already created this model repo"}, HTTPStatus.CONFLICT)
        is_private = asked.get("visibility") == "private" or bool(asked.get("private"))
        self.push(repo, {".gitattributes": b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"}, private=is_private)
        return _json(url)

    def _branch(self, repo: str, branch: str, start: str) -> _Answer:
        refs = self.repositories[repo].refs
        if branch in refs:
            return _error(HTTPStatus.CONFLICT, None, f"Reference already exists: {branch}")
        refs[branch] = refs.get(start, start)
        return _json({})

    def _upload_mode(self, repo: str, branch: str, file: dict[str, Any]) -> dict[str, Any]:
        path = file["path"]
        repository = self.repositories[repo]
        content = repository.commits[repository.refs[branch]].get(path)
        is_lfs = path.endswith(LFS_SUFFIXES)
        oid = None
        if content is not None:
            oid = hashlib.sha256(content).hexdigest() if is_lfs else _git_blob(content)
        return {"path": path, "uploadMode": "lfs" if is_lfs else "regular", "shouldIgnore": False, "oid": oid}

    def _offer_uploads(self, repo: str, asked: dict[str, Any]) -> _Answer:
        storage = f"http://127.0.0.1:{self._ports['storage']}"
        objects = []
        for wanted in asked["objects"]:
            offer = {
                "upload": {"href": f"{storage}/{repo}/resolve/upload/{wanted['oid']}?signature=1"},
                "verify": {"href": f"{self.url}/{repo}.git/info/lfs/verify"},
            }
            objects.append({**wanted, **({} if wanted["oid"] in self.objects else {"actions": offer})})
        return _json({"transfer": "basic", "objects": objects})

    def _store(self, oid: str, body: bytes) -> _Answer:
        if hashlib.sha256(body).hexdigest() != oid:
            return _error(HTTPStatus.BAD_REQUEST, None, "The content does not match its sha256")
        self.objects[oid] = body
        return _json({})

    def _commit(self, repo: str, branch: str, lines: list[dict[str, Any]]) -> _Answer:
        repository = self.repositories[repo]
        files = dict(repository.commits[repository.refs[branch]])
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                if value["oid"] not in self.objects:
                    return _error(HTTPStatus.BAD_REQUEST, None, f"LFS object {value['oid']} was never uploaded")
                files[value["path"]] = self.objects[value["oid"]]
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        errors = errors_in(files.get("README.md", b"").decode())
        if errors:
            return _error(HTTPStatus.BAD_REQUEST, None, f"Your push was rejected: {errors}")
        commit = self.push(repo, files, branch)
        return _json({"success": True, "commitOid": commit, "commitUrl": f"{self.url}/{repo}/commit/{commit}"})

    def _answer(self, host: str, repo: str, revision: str, file: str, authorization: str | None) -> _Answer:
        repository = self.repositories.get(repo)
        may_read = authorization == f"Bearer {self.token}"
        is_known = may_read or authorization in (None, f"Bearer {self.token_of_another}")
        if host == "storage":
            # Signed addresses need no token, and the real storage host refuses one.
            assert repository is not None
            if authorization is not None:
                return _error(HTTPStatus.BAD_REQUEST, None, "Only one auth mechanism allowed")
            return _content(repository.commits[revision][file], {})
        if not is_known:
            return _error(HTTPStatus.UNAUTHORIZED, None, "Invalid credentials in Authorization header")
        if repository is None or (repository.private and not may_read):
            # So does the Hub: without a token it does not tell "missing" from "private".
            status = HTTPStatus.NOT_FOUND if authorization else HTTPStatus.UNAUTHORIZED
            return _error(status, "RepoNotFound", "Repository not found")
        commit = repository.refs.get(revision, revision)
        if commit not in repository.commits:
            return _error(HTTPStatus.NOT_FOUND, "RevisionNotFound", f"Invalid rev id: {revision}")
        files = repository.commits[commit]
        if file == TREE:
            entries = [{"type": "file", "path": n, "size": len(c), "oid": _git_blob(c)} for n, c in files.items()]
            return _json(entries)
        if not file:
            return _json(
                {
                    "id": repo,
                    "modelId": repo,
                    "sha": commit,
                    "private": repository.private,
                    "gated": "manual" if repository.gated else False,
                    "tags": repository.tags,
                    "siblings": [{"rfilename": name} for name in files],
                }
            )
        if repository.gated and not may_read:
            status = HTTPStatus.FORBIDDEN if authorization else HTTPStatus.UNAUTHORIZED
            return _error(status, "GatedRepo", f"Access to model {repo} is restricted.")
        headers = {"X-Repo-Commit": commit}
        if file not in files:
            return _error(HTTPStatus.NOT_FOUND, "EntryNotFound", "Entry not found", headers)
        if not file.endswith(LFS_SUFFIXES):
            return _content(files[file], headers)
        linked = {
            "X-Linked-Size": str(len(files[file])),
            "X-Linked-Etag": f'"{hashlib.sha256(files[file]).hexdigest()}"',
            "Location": f"http://127.0.0.1:{self._ports['storage']}/{repo}/resolve/{commit}/{file}?signature=1",
        }
        return _Answer(HTTPStatus.FOUND, headers | linked)


def _parse(path: str) -> tuple[str, str, str] | None:
    """(repository, revision, file) of an address; the file is empty for a question about the repository."""
    parts = [unquote(part) for part in path.strip("/").split("/")]
    if parts[:2] == ["api", "models"] and len(parts) >= 4:
        if parts[4:5] == ["tree"]:
            return "/".join(parts[2:4]), "/".join(parts[5:]), TREE
        revision = parts[5] if parts[4:5] == ["revision"] and len(parts) == 6 else "main"
        return "/".join(parts[2:4]), revision, ""
    if len(parts) >= 5 and parts[2] == "resolve":
        return "/".join(parts[:2]), parts[3], "/".join(parts[4:])
    return None


def _git_blob(content: bytes) -> str:
    """The name that git gives a file's content."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def _content(content: bytes, headers: Mapping[str, str]) -> _Answer:
    return _Answer(HTTPStatus.OK, {**headers, "ETag": f'"{_git_blob(content)}"', "Accept-Ranges": "bytes"}, content)


def _part(whole: _Answer, wanted: str) -> _Answer:
    """The rest of a file from the first byte of `Range: bytes=<first>-`."""
    first = int(wanted.removeprefix("bytes=").partition("-")[0])
    size = len(whole.body)
    return _Answer(
        HTTPStatus.PARTIAL_CONTENT,
        {**whole.headers, "Content-Range": f"bytes {first}-{size - 1}/{size}"},
        whole.body[first:],
    )


def _json(value: object, status: HTTPStatus = HTTPStatus.OK) -> _Answer:
    return _Answer(status, {"Content-Type": "application/json"}, json.dumps(value).encode())


def _error(status: HTTPStatus, code: str | None, message: str, headers: Mapping[str, str] | None = None) -> _Answer:
    named = {"X-Error-Code": code} if code else {}
    return _Answer(status, {**(headers or {}), **named, "X-Error-Message": message})


class _Origin(ThreadingHTTPServer):
    """One of the two hosts, on a port of its own."""

    daemon_threads = True
    allow_reuse_address = True

    def __init__(self, hub: HubServer, host: str, port: int) -> None:
        self.hub = hub
        self.host = host
        self._connections: set[socket.socket] = set()
        super().__init__(("127.0.0.1", port), _Handler)

    def process_request(self, request: socket.socket, client_address: tuple[str, int]) -> None:  # type: ignore[override]
        self._connections.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: socket.socket) -> None:  # type: ignore[override]
        self._connections.discard(request)
        super().shutdown_request(request)

    def close_connections(self) -> None:
        for connection in list(self._connections):
            _hang_up(connection)


def _hang_up(connection: socket.socket) -> None:
    with suppress(OSError):  # the client may have been faster
        connection.shutdown(socket.SHUT_RDWR)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    timeout = 30  # of an idle connection

    def do_GET(self) -> None:
        origin = cast(_Origin, self.server)
        upload_cut = origin.hub.upload_cut(self.command, self.path)
        if upload_cut is not None:
            self.rfile.read(upload_cut)
            self._break()
            return
        answer, cut = origin.hub.answer(origin.host, self.command, self.path, self.headers, self._body())
        if cut == 0:
            self._break()
            return
        self.send_response(answer.status)
        for name, value in answer.headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(answer.body)))
        self.end_headers()
        if self.command == "HEAD":
            return
        self.wfile.write(answer.body[:cut])
        if cut is not None:
            self._break()

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_POST(self) -> None:
        self.do_GET()

    def do_PUT(self) -> None:
        self.do_GET()

    def do_DELETE(self) -> None:
        self.do_GET()

    def _body(self) -> bytes:
        """What the client sends, of known length or in chunks."""
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def _break(self) -> None:
        self.wfile.flush()
        self.close_connection = True
        _hang_up(self.connection)

    def log_message(self, *args: object) -> None:
        """Nothing: the log is `HubServer.requests`."""


def environment_of(hub: HubServer, home: Path, **more: str) -> dict[str, str]:
    """The variables of a process for which the server is the Hub.

    Args:
        hub: the server.
        home: folder of its Hub files, the cache among them.
        **more: further variables.
    """
    return {
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(home),
        "HF_HUB_CACHE": str(home / "hub"),
        "HF_HUB_OFFLINE": "0",
        "HF_TOKEN": "",
        "HF_HUB_DISABLE_XET": "1",
        "NO_PROXY": "127.0.0.1",
        "no_proxy": "127.0.0.1",
        "OMP_NUM_THREADS": "1",
        **more,
    }


@contextmanager
def as_the_hub(hub: HubServer, cache: str | Path, token: str = "") -> Iterator[None]:
    """The server is the Hub of this process, which imported its client before."""
    settings = {
        "ENDPOINT": hub.url,
        "HUGGINGFACE_CO_URL_TEMPLATE": hub.url + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HUB_OFFLINE": False,
        "HF_HUB_DISABLE_XET": True,
        "HF_HUB_CACHE": str(cache),
    }
    variables = {"HF_TOKEN": token, "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}
    close_session()
    with (
        patch.dict(os.environ, variables),
        patch.multiple(constants, **settings),
        patch.object(hf_api.api, "endpoint", hub.url),
    ):
        try:
            yield
        finally:
            close_session()


class Client:
    """A process that knows the server as its Hub, in which functions of a test's module run.

    Args:
        hub: the server.
        home: folder of its Hub files, the cache among them.
        **environment: further variables.
    """

    def __init__(self, hub: HubServer, home: Path, **environment: str) -> None:
        self.environment = environment_of(hub, home, HF_HUB_DISABLE_PROGRESS_BARS="0", **environment)
        self._pool = ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"))

    def __call__(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        with patch.dict(os.environ, self.environment):  # the first call starts the process
            return self._pool.submit(function, *args, **kwargs).result(SECONDS)

    def close(self) -> None:
        self._pool.shutdown()
