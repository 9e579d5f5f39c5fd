"""A Hugging Face Hub for tests: model repositories in memory, served over HTTP by a thread of this process.

The real `huggingface_hub` talks to it if `HF_ENDPOINT` is its `endpoint`, and `HF_HUB_DISABLE_XET` is 1, by the time
that is imported. Only models are served: no datasets, Spaces, pull requests or Xet.
"""

from __future__ import annotations

import base64
import gzip
import hashlib
import json
import os
import re
import secrets
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime, timedelta, timezone
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, quote, unquote

LFS_SIZE = 10_000_000
LFS_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".model", ".msgpack", ".npy", ".npz", ".onnx")
LFS_SUFFIXES += (".gz", ".pickle", ".pkl", ".tar", ".zip", ".zst", ".parquet")
GIT_ATTRIBUTES = "".join(f"*{suffix} filter=lfs diff=lfs merge=lfs -text\n" for suffix in LFS_SUFFIXES).encode()
EPOCH = datetime(2024, 1, 1, tzinfo=timezone.utc)


def git_oid(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def is_lfs(path: str, size: int) -> bool:
    """Whether the Hub keeps a file of that name and size outside of git. Empty files are always in git."""
    return size > LFS_SIZE or (size > 0 and path.endswith(LFS_SUFFIXES))


def lfs_pointer(data: bytes) -> bytes:
    return f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256(data)}\nsize {len(data)}\n".encode()


@dataclass(frozen=True)
class User:
    name: str
    role: str


@dataclass(frozen=True)
class Commit:
    """All the files of the repository as of one commit."""

    oid: str
    parent: str | None
    message: str
    files: dict[str, bytes]
    description: str = ""
    author: str = ""
    date: str = ""


@dataclass
class Repo:
    """One model repository: its branches, oldest commit first, its tags, and the LFS blobs uploaded to it."""

    id: str
    private: bool = False
    branches: dict[str, list[Commit]] = field(default_factory=lambda: {"main": []})
    tags: dict[str, str] = field(default_factory=dict)
    blobs: dict[str, bytes] = field(default_factory=dict)
    count: int = 0

    @property
    def commits(self) -> list[Commit]:
        return self.branches["main"]

    def history(self, revision: str) -> list[Commit] | None:
        """The commits up to a branch, a tag or a full commit hash, newest last, or None if there is no such thing."""
        if revision in self.branches:
            return self.branches[revision]
        oid = self.tags.get(revision, revision)
        for commits in self.branches.values():
            for position, commit in enumerate(commits):
                if commit.oid == oid:
                    return commits[: position + 1]
        return None

    def commit(self, branch: str, files: dict[str, bytes], message: str, author: str, description: str = "") -> Commit:
        commits = self.branches[branch]
        parent = commits[-1].oid if commits else None
        self.count += 1
        names = sorted((path, git_oid(data)) for path, data in files.items())
        oid = hashlib.sha1(repr((self.id, self.count, parent, message, names)).encode()).hexdigest()
        date = (EPOCH + timedelta(seconds=self.count)).strftime("%Y-%m-%dT%H:%M:%S.000Z")
        self.blobs.update((sha256(data), data) for path, data in files.items() if is_lfs(path, len(data)))
        commits.append(Commit(oid, parent, message, dict(files), description, author, date))
        return commits[-1]


@dataclass(frozen=True)
class Request:
    """One answered request. `status` is 0 where the connection was cut before an answer."""

    method: str
    path: str
    status: int
    sent: int
    received: int
    body: bytes
    user: str | None
    query: str
    headers: dict[str, str]


@dataclass
class Fault:
    """What goes wrong with the next `times` requests whose path the pattern is found in."""

    kind: str
    method: str
    pattern: re.Pattern[str]
    times: int
    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    message: str = ""
    after_bytes: int = 0
    reset: bool = False
    action: Callable[[], object] | None = None


@dataclass(frozen=True)
class Call:
    """A request as an endpoint sees it."""

    method: str
    path: str
    query: dict[str, list[str]]
    headers: dict[str, str]
    body: bytes
    user: User | None

    def json(self) -> Any:
        try:
            return json.loads(self.body or b"{}")
        except ValueError as error:
            raise HubError(400, f"invalid JSON: {error}") from error

    def flag(self, name: str) -> bool:
        return self.query.get(name, [""])[-1].lower() in ("1", "true")


@dataclass(frozen=True)
class Reply:
    status: int
    body: bytes
    headers: dict[str, str] = field(default_factory=dict)


class HubError(Exception):
    """An answer that is not a success; `code` is what `huggingface_hub` picks its exception by."""

    def __init__(self, status: int, message: str, code: str = "", headers: dict[str, str] | None = None) -> None:
        super().__init__(message)
        self.status = status
        shown = message.replace("\n", " ").encode("ascii", "replace").decode()
        self.headers = {"X-Error-Message": shown, **(headers or {})}
        if code:
            self.headers["X-Error-Code"] = code

    def reply(self) -> Reply:
        return Reply(self.status, json.dumps({"error": str(self)}).encode(), self.headers)


def success(content: Any, status: int = 200, **headers: str) -> Reply:
    headers = {name.replace("_", "-"): value for name, value in headers.items()}
    return Reply(status, json.dumps(content).encode(), {"Content-Type": "application/json", **headers})


class HubServer:
    """The Hub as a test sees it. Its users and its port outlive `reset()`, and its port outlives `stop()`."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.users: dict[str, User] = {}
        self.secret = secrets.token_hex(8)
        self.reset()
        self._address = ("127.0.0.1", 0)
        self._server: _Server | None = None

    def __enter__(self) -> HubServer:
        return self.start()

    def __exit__(self, *exception: object) -> None:
        self.stop()

    def start(self) -> HubServer:
        self._server = _Server(self._address, self)
        self._address = self._server.server_address
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True, name="hub").start()
        return self

    def stop(self) -> None:
        """Refuses and closes every connection. `start()` opens the same port again, with the repositories as left."""
        if self._server is not None:
            self._server.stop()
            self._server = None

    def reset(self) -> None:
        with self.lock:
            self.repos: dict[str, Repo] = {}
            self.requests: list[Request] = []
            self.faults: list[Fault] = []

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self._address[1]}"

    @property
    def storage(self) -> str:
        """The host of large files: on the real Hub too it is another one, to which no token is sent."""
        return f"http://localhost:{self._address[1]}"

    def signature(self, *names: str) -> str:
        return sha256("\0".join((self.secret, *names)).encode())[:16]

    # Users and repositories

    def add_user(self, name: str, token: str, role: str = "write") -> None:
        """Gives a user one more token, to read or to write with."""
        self.users[token] = User(name, role)

    def create(self, repo_id: str, private: bool = False) -> Repo:
        """A repository as the Hub creates it, with a first commit of a .gitattributes file."""
        repo = self.repos[repo_id] = Repo(repo_id, private)
        repo.commit("main", {".gitattributes": GIT_ATTRIBUTES}, "initial commit", repo_id.split("/")[0])
        return repo

    def put(self, repo_id: str, files: dict[str, bytes], private: bool = False, revision: str = "main") -> Commit:
        """Commits files on top of a branch, creating the repository (private or not) or the branch if need be."""
        with self.lock:
            repo = self.repos.get(repo_id) or self.create(repo_id, private)
            commits = repo.branches.setdefault(revision, list(repo.commits))
            return repo.commit(revision, {**commits[-1].files, **files}, "put", repo_id.split("/")[0])

    def files(self, repo_id: str, revision: str = "main") -> dict[str, bytes]:
        with self.lock:
            commits = self.repos[repo_id].history(revision)
            if commits is None:
                raise KeyError(revision)
            return dict(commits[-1].files)

    # What was sent

    def bytes_uploaded(self) -> int:
        return sum(request.sent for request in self.requests)

    def uploaded_bytes(self) -> bytes:
        """The bodies of all requests. The regular files of a commit, and the samples of a preupload, are in base64."""
        return b"".join(request.body for request in self.requests)

    def uploaded_files(self) -> list[tuple[str, bytes]]:
        """The path and content of each regular file, and the sha256 and content of each LFS blob, as far as it came.

        Requests that failed count too, whatever their status.
        """
        found = []
        for request in list(self.requests):
            if request.method == "PUT" and request.path.startswith("/upload/"):
                found.append((request.path.rsplit("/", 1)[-1], request.body))
            elif "/commit/" in request.path:
                values = [line["value"] for line in parse_lines(request.body) if line.get("key") == "file"]
                found += [(value["path"], base64.b64decode(value["content"])) for value in values]
        return found

    def uploaded_samples(self) -> list[tuple[str, bytes]]:
        """The path and first 512 bytes of each file that the client asked about before it uploaded or skipped it."""
        found = []
        for request in list(self.requests):
            if "/preupload/" in request.path:
                for line in parse_lines(request.body):
                    found += [(file["path"], base64.b64decode(file["sample"])) for file in line["files"]]
        return found

    # Faults

    def fail(
        self,
        method: str,
        pattern: str,
        status: int,
        times: int = 1,
        headers: dict[str, str] | None = None,
        message: str = "",
    ) -> None:
        """Answers requests of that method ("*" for any) with a status, once their body was read."""
        self._add(Fault("fail", method, re.compile(pattern), times, status, headers or {}, message))

    def cut(self, pattern: str, after_bytes: int, times: int = 1) -> None:
        """Resets the connection of requests with a body after that many bytes of it, so that they have no effect."""
        self._add(Fault("cut", "*", re.compile(pattern), times, after_bytes=after_bytes))

    def cut_response(self, pattern: str, after_bytes: int, times: int = 1, reset: bool = False) -> None:
        """Ends the connection after that many bytes of the body of a 2xx answer, of requests that had their effect."""
        self._add(Fault("cut_response", "*", re.compile(pattern), times, after_bytes=after_bytes, reset=reset))

    def before(self, method: str, pattern: str, action: Callable[[], object], times: int = 1) -> None:
        """Runs `action` before a request is answered, for example a `put` that gets in between."""
        self._add(Fault("before", method, re.compile(pattern), times, action=action))

    def _add(self, fault: Fault) -> None:
        with self.lock:
            self.faults.append(fault)

    def take_fault(self, kind: str, method: str, path: str) -> Fault | None:
        with self.lock:
            for fault in self.faults:
                if fault.kind == kind and fault.method in ("*", method) and fault.pattern.search(path):
                    fault.times -= 1
                    if fault.times <= 0:
                        self.faults.remove(fault)
                    return fault
        return None


def parse_lines(body: bytes) -> Iterator[dict[str, Any]]:
    """The JSON objects of the lines of a body, leaving out a line that was cut."""
    for line in body.splitlines():
        with suppress(ValueError):
            yield json.loads(line)


def file_entry(path: str, data: bytes) -> dict[str, Any]:
    """A file as tree listings show it."""
    entry: dict[str, Any] = {"type": "file", "oid": git_oid(data), "size": len(data), "path": path}
    if is_lfs(path, len(data)):
        pointer = lfs_pointer(data)
        entry["oid"] = git_oid(pointer)
        entry["lfs"] = {"oid": sha256(data), "size": len(data), "pointerSize": len(pointer)}
    return entry


def folders(files: dict[str, bytes]) -> set[str]:
    parts = [path.split("/") for path in files]
    return {"/".join(names[:depth]) for names in parts for depth in range(1, len(names))}


def byte_range(header: str | None, size: int) -> tuple[int, int] | None:
    """The first and last byte that a Range header asks for, or None for the whole."""
    match = re.fullmatch(r"bytes=(\d*)-(\d*)", header or "")
    if match is None or match.groups() == ("", ""):
        return None
    first, last = match.groups()
    start = int(first) if first else max(size - int(last), 0)
    end = min(int(last), size - 1) if first and last else size - 1
    if start > end:
        raise HubError(416, "Range Not Satisfiable", headers={"Content-Range": f"bytes */{size}"})
    return start, end


def content(call: Call, data: bytes, headers: dict[str, str]) -> Reply:
    """A file, or the range of it that was asked for."""
    headers = {"Content-Type": "application/octet-stream", "Accept-Ranges": "bytes", **headers}
    span = byte_range(call.headers.get("range"), len(data))
    if span is None:
        return Reply(200, data, headers)
    headers["Content-Range"] = f"bytes {span[0]}-{span[1]}/{len(data)}"
    return Reply(206, data[span[0] : span[1] + 1], headers)


class _Endpoints:
    """What the Hub answers. Each method gets the call and the unquoted named groups of its route."""

    def __init__(self, hub: HubServer) -> None:
        self.hub = hub

    def answer(self, call: Call) -> Reply:
        for method, pattern, name in ROUTES:
            match = pattern.fullmatch(call.path)
            if match is not None and re.fullmatch(method, call.method):
                groups = {key: unquote(value or "") for key, value in match.groupdict().items()}
                return getattr(self, name)(call, **groups)
        raise HubError(501, f"hub_server does not model {call.method} {call.path}")

    # Who may do what

    def _missing(self, call: Call) -> HubError:
        """The Hub does not tell a private repository from none, and asks strangers for a token in both cases."""
        status, message = (404, "Repository not found") if call.user else (401, "Invalid username or password.")
        return HubError(status, message, "RepoNotFound")

    def _may_write(self, call: Call, namespace: str) -> None:
        if call.user is None:
            # Without this code the client would only see its RepositoryNotFoundError over https.
            code = "RepoNotFound" if call.path.startswith("/api/models/") else ""
            raise HubError(401, "Invalid username or password.", code)
        if call.user.role != "write":
            raise HubError(403, "Forbidden: you must use a write token to upload to a repository")
        if call.user.name != namespace:
            raise HubError(403, f"You don't have the rights to write to the namespace {namespace!r}")

    def _repo(self, call: Call, repo_id: str, write: bool = False) -> Repo:
        repo = self.hub.repos.get(repo_id)
        namespace = repo_id.split("/")[0]
        if repo is None or (repo.private and (call.user is None or call.user.name != namespace)):
            raise self._missing(call)
        if write:
            self._may_write(call, namespace)
        return repo

    def _history(self, repo: Repo, revision: str) -> list[Commit]:
        commits = repo.history(revision or "main")
        if commits is None:
            raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return commits

    # Users, and what is not about one repository

    def whoami(self, call: Call) -> Reply:
        if call.user is None:
            raise HubError(401, "Invalid username or password.")
        token = {"displayName": "test", "role": call.user.role, "createdAt": "2024-01-01T00:00:00.000Z"}
        user = {"type": "user", "id": git_oid(call.user.name.encode())[:24], "name": call.user.name, "orgs": []}
        return success({**user, "fullname": user["name"], "auth": {"type": "access_token", "accessToken": token}})

    def validate_yaml(self, call: Call) -> Reply:
        text = call.json().get("content", "")
        warnings = [] if text.startswith("---") else [{"message": "empty or missing yaml metadata in repo card"}]
        return success({"errors": [], "warnings": warnings})

    def harnesses(self, call: Call) -> Reply:
        return success({"standardEnvVars": [], "harnesses": {}})

    def telemetry(self, call: Call, topic: str) -> Reply:
        return success({})

    # Repositories

    def create_repo(self, call: Call) -> Reply:
        asked = call.json()
        namespace = asked.get("organization") or (call.user.name if call.user else "")
        self._may_write(call, namespace)
        if asked.get("type", "model") != "model":
            raise HubError(501, "hub_server only models model repositories")
        repo_id = f"{namespace}/{asked['name']}"
        url = f"{self.hub.endpoint}/{repo_id}"
        if repo_id in self.hub.repos:
            return success({"error": "You already created this model repo", "url": url}, 409)
        self.hub.create(repo_id, asked.get("visibility") == "private" or asked.get("private") is True)
        return success({"url": url, "name": repo_id, "id": repo_id})

    def delete_repo(self, call: Call) -> Reply:
        asked = call.json()
        namespace = asked.get("organization") or (call.user.name if call.user else "")
        repo = self._repo(call, f"{namespace}/{asked['name']}", write=True)
        del self.hub.repos[repo.id]
        return success({})

    def settings(self, call: Call, repo: str) -> Reply:
        target = self._repo(call, repo, write=True)
        asked = call.json()
        if "visibility" in asked or "private" in asked:
            target.private = asked.get("visibility") == "private" or asked.get("private") is True
        return success({"private": target.private, "visibility": "private" if target.private else "public"})

    def auth_check(self, call: Call, repo: str, write: str) -> Reply:
        self._repo(call, repo, write=bool(write))
        return success({})

    def no_repo(self, call: Call, **groups: str) -> Reply:
        raise self._missing(call)

    def info(self, call: Call, repo: str, revision: str = "") -> Reply:
        target = self._repo(call, repo)
        head = self._history(target, revision)[-1]
        siblings: list[dict[str, Any]] = [{"rfilename": path} for path in sorted(head.files)]
        if call.flag("blobs"):
            for sibling in siblings:
                entry = file_entry(sibling["rfilename"], head.files[sibling["rfilename"]])
                sibling.update(size=entry["size"], blobId=entry["oid"])
                if "lfs" in entry:
                    sibling["lfs"] = {**entry["lfs"], "sha256": entry["lfs"]["oid"]}
        name = {"_id": git_oid(repo.encode())[:24], "id": repo}
        more = {"modelId": repo, "author": repo.split("/")[0], "sha": head.oid, "private": target.private}
        more |= {"lastModified": head.date, "createdAt": target.commits[0].date, "gated": False, "disabled": False}
        more |= {"downloads": 0, "likes": 0, "tags": ["region:us"], "siblings": siblings}
        expand = call.query.get("expand", []) + call.query.get("expand[]", [])
        return success({**name, **{key: more[key] for key in more if not expand or key in expand}})

    # Branches, tags and commits

    def refs(self, call: Call, repo: str) -> Reply:
        target = self._repo(call, repo)
        heads = {name: commits[-1].oid for name, commits in target.branches.items()}
        found = {
            kind: [{"name": name, "ref": f"refs/{path}/{name}", "targetCommit": oid} for name, oid in names.items()]
            for kind, path, names in (("branches", "heads", heads), ("tags", "tags", target.tags))
        }
        return success({**found, "converts": [], "pullRequests": []})

    def commits(self, call: Call, repo: str, revision: str) -> Reply:
        found = [
            {
                "id": commit.oid,
                "title": commit.message,
                "message": commit.description,
                "authors": [{"user": commit.author}],
                "date": commit.date,
            }
            for commit in reversed(self._history(self._repo(call, repo), revision))
        ]
        return success(found, X_Total_Count=str(len(found)))

    def branch(self, call: Call, repo: str, branch: str) -> Reply:
        target = self._repo(call, repo, write=True)
        if call.method == "POST":
            if branch in target.branches:
                raise HubError(409, f"Reference already exists: {branch}")
            target.branches[branch] = list(self._history(target, call.json().get("startingPoint", "main")))
        elif branch == "main":
            raise HubError(403, "Cannot delete refs/heads/main")
        elif target.branches.pop(branch, None) is None:
            raise HubError(404, f"Reference does not exist: {branch}", "RevisionNotFound")
        return success({})

    def tag(self, call: Call, repo: str, name: str) -> Reply:
        """The name in the path is the revision to tag, or the tag to delete."""
        target = self._repo(call, repo, write=True)
        if call.method == "POST":
            tag = call.json()["tag"]
            if tag in target.tags:
                raise HubError(409, f"Tag already exists: {tag}")
            target.tags[tag] = self._history(target, name)[-1].oid
        elif target.tags.pop(name, None) is None:
            raise HubError(404, f"Tag does not exist: {name}", "RevisionNotFound")
        return success({})

    def discussions(self, call: Call, repo: str) -> Reply:
        self._repo(call, repo)
        return success({"discussions": [], "count": 0, "start": 0})

    # Listing and reading files

    def tree(self, call: Call, repo: str, revision: str, path: str = "") -> Reply:
        commit = self._history(self._repo(call, repo), revision)[-1]
        prefix = f"{path.strip('/')}/" if path.strip("/") else ""
        inside = {name: data for name, data in commit.files.items() if name.startswith(prefix)}
        if prefix and not inside:
            raise HubError(404, f'{path} does not exist on "{revision}"', "EntryNotFound")
        names = [name for name in sorted(folders(inside) | set(inside)) if name.startswith(prefix)]
        if not call.flag("recursive"):
            names = [name for name in names if "/" not in name[len(prefix) :]]
        return success([self._entry(commit, name, call.flag("expand")) for name in names])

    def paths_info(self, call: Call, repo: str, revision: str) -> Reply:
        commit = self._history(self._repo(call, repo), revision)[-1]
        form = call.json() if call.body.startswith(b"{") else parse_qs(call.body.decode())
        known = folders(commit.files) | set(commit.files)
        names = [name for name in (path.strip("/") for path in form.get("paths", [])) if name in known]
        expand = str(form.get("expand", "")).lower().strip("[']") == "true"
        return success([self._entry(commit, name, expand) for name in names])

    def _entry(self, commit: Commit, name: str, expand: bool) -> dict[str, Any]:
        if name in commit.files:
            entry = file_entry(name, commit.files[name])
        else:
            entry = {"type": "directory", "oid": git_oid(name.encode()), "size": 0, "path": name}
        if expand:
            entry["lastCommit"] = {"id": commit.oid, "title": commit.message, "date": commit.date}
        return entry

    def resolve(self, call: Call, repo: str, revision: str, path: str) -> Reply:
        commit = self._history(self._repo(call, repo), revision)[-1]
        headers = {"X-Repo-Commit": commit.oid}
        data = commit.files.get(path)
        if data is None:
            raise HubError(404, "Entry not found", "EntryNotFound", headers)
        if not is_lfs(path, len(data)):
            return content(call, data, {**headers, "ETag": f'"{git_oid(data)}"'})
        oid = sha256(data)
        signature = self.hub.signature("get", repo, oid)
        headers["Location"] = f"{self.hub.storage}/cdn/{repo}/{oid}/{quote(path)}?signature={signature}"
        headers |= {"X-Linked-Size": str(len(data)), "X-Linked-ETag": f'"{oid}"', "ETag": f'"{oid}"'}
        return Reply(302, b"Found. Redirecting", headers)

    def cdn(self, call: Call, repo: str, oid: str, path: str) -> Reply:
        self._check_signature(call, "get", repo, oid)
        if repo not in self.hub.repos or oid not in self.hub.repos[repo].blobs:
            raise HubError(404, "NoSuchKey")
        return content(call, self.hub.repos[repo].blobs[oid], {"ETag": f'"{oid}"'})

    def _check_signature(self, call: Call, *names: str) -> None:
        if call.query.get("signature") != [self.hub.signature(*names)]:
            raise HubError(403, "SignatureDoesNotMatch")

    # Writing files

    def preupload(self, call: Call, repo: str, revision: str) -> Reply:
        """Says of each file whether it goes to LFS or in the commit, and which content the path has by now."""
        known = self._history(self._repo(call, repo, write=True), revision)[-1].files
        found = []
        for file in call.json()["files"]:
            mode = "lfs" if is_lfs(file["path"], file["size"]) else "regular"
            answer = {"path": file["path"], "uploadMode": mode, "shouldIgnore": False}
            if file["path"] in known:
                data = known[file["path"]]
                answer["oid"] = sha256(data) if is_lfs(file["path"], len(data)) else git_oid(data)
            found.append(answer)
        return success({"files": found})

    def lfs_batch(self, call: Call, repo: str) -> Reply:
        target = self._repo(call, repo, write=True)
        asked = call.json()
        if asked["operation"] != "upload" or "basic" not in asked.get("transfers", ["basic"]):
            raise HubError(501, "hub_server only models basic LFS uploads")
        objects = []
        for item in asked["objects"]:
            oid, entry = item["oid"], {"oid": item["oid"], "size": item["size"]}
            if oid not in target.blobs:
                signature = self.hub.signature("put", repo, oid)
                upload = {"href": f"{self.hub.storage}/upload/{repo}/{oid}?signature={signature}"}
                verify = {"href": f"{self.hub.endpoint}/{repo}.git/info/lfs/verify"}
                entry["actions"] = {"upload": upload, "verify": verify}
            objects.append(entry)
        return success({"transfer": "basic", "objects": objects})

    def lfs_put(self, call: Call, repo: str, oid: str) -> Reply:
        self._check_signature(call, "put", repo, oid)
        if repo not in self.hub.repos:
            raise HubError(404, "NoSuchBucket")
        if sha256(call.body) != oid:
            raise HubError(400, f"The SHA256 of the {len(call.body)} bytes that arrived is not {oid}")
        self.hub.repos[repo].blobs[oid] = call.body
        return Reply(200, b"", {"ETag": f'"{oid}"'})

    def lfs_verify(self, call: Call, repo: str) -> Reply:
        asked = call.json()
        data = self._repo(call, repo, write=True).blobs.get(asked["oid"])
        if data is None or len(data) != asked["size"]:
            raise HubError(404, f"LFS object {asked['oid']} was not uploaded")
        return success({"success": True})

    def commit(self, call: Call, repo: str, revision: str) -> Reply:
        target = self._repo(call, repo, write=True)
        if call.flag("create_pr"):
            raise HubError(501, "hub_server does not model pull requests")
        if revision not in target.branches:
            raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        lines = [json.loads(line) for line in call.body.splitlines() if line.strip()]
        if not lines or lines[0]["key"] != "header" or not lines[0]["value"].get("summary"):
            raise HubError(400, "The first line must be a header with a summary")
        header, head = lines[0]["value"], target.branches[revision][-1]
        if not head.oid.startswith(header.get("parentCommit", "").lower()):
            raise HubError(412, "A commit has happened since. Please refresh and try again.")
        files = dict(head.files)
        for line in lines[1:]:
            self._change(target, files, line["key"], line["value"])
        author = call.user.name if call.user else ""
        made = target.commit(revision, files, header["summary"], author, header.get("description", ""))
        url = f"{self.hub.endpoint}/{repo}/commit/{made.oid}"
        return success({"success": True, "commitOid": made.oid, "commitUrl": url, "hookOutput": ""})

    def _change(self, repo: Repo, files: dict[str, bytes], key: str, value: dict[str, Any]) -> None:
        """Applies one line of a commit to the files."""
        path = value["path"].rstrip("/")
        if not path or path.startswith("/") or ".." in path.split("/"):
            raise HubError(400, f"Invalid path: {value['path']!r}")
        if key == "file":
            files[path] = base64.b64decode(value["content"])
        elif key == "lfsFile":
            data = repo.blobs.get(value["oid"])
            if data is None or len(data) != value.get("size", len(data)):
                message = "Your push was rejected because an LFS pointer pointed to a file that does not exist"
                raise HubError(400, f"{message}: {path} {value['oid']}")
            files[path] = data
        elif key in ("deletedFile", "deletedFolder"):
            gone = [name for name in files if name == path or (key != "deletedFile" and name.startswith(f"{path}/"))]
            if not gone:
                kind = "file" if key == "deletedFile" else "folder"
                raise HubError(404, f"A {kind} with this name doesn't exist: {path}", "EntryNotFound")
            for name in gone:
                del files[name]
        else:
            raise HubError(400, f"Unknown operation: {key}")


_REPO = "(?P<repo>[^/]+/[^/]+)"
_MODEL = f"/api/models/{_REPO}"
_REVISION = "(?P<revision>[^/]+)"
ROUTES = [
    (method, re.compile(pattern), name)
    for method, pattern, name in (
        ("GET", "/api/whoami-v2", "whoami"),
        ("GET", "/api/agent-harnesses", "harnesses"),
        ("HEAD", "/api/telemetry/(?P<topic>.*)", "telemetry"),
        ("POST", "/api/validate-yaml", "validate_yaml"),
        ("POST", "/api/repos/create", "create_repo"),
        ("DELETE", "/api/repos/delete", "delete_repo"),
        ("GET", _MODEL, "info"),
        ("GET", f"{_MODEL}/revision/{_REVISION}", "info"),
        ("GET", f"{_MODEL}/tree/{_REVISION}(/(?P<path>.*))?", "tree"),
        ("POST", f"{_MODEL}/paths-info/{_REVISION}", "paths_info"),
        ("GET", f"{_MODEL}/refs", "refs"),
        ("GET", f"{_MODEL}/commits/{_REVISION}", "commits"),
        ("POST|DELETE", f"{_MODEL}/branch/(?P<branch>[^/]+)", "branch"),
        ("POST|DELETE", f"{_MODEL}/tag/(?P<name>[^/]+)", "tag"),
        ("GET", f"{_MODEL}/discussions", "discussions"),
        ("GET", f"{_MODEL}/auth-check(?P<write>/write)?", "auth_check"),
        ("PUT", f"{_MODEL}/settings", "settings"),
        ("POST", f"{_MODEL}/preupload/{_REVISION}", "preupload"),
        ("POST", f"{_MODEL}/commit/{_REVISION}", "commit"),
        ("POST", f"/{_REPO}[.]git/info/lfs/objects/batch", "lfs_batch"),
        ("POST", f"/{_REPO}[.]git/info/lfs/verify", "lfs_verify"),
        ("PUT", f"/upload/{_REPO}/(?P<oid>[0-9a-f]+)", "lfs_put"),
        ("GET|HEAD", f"/cdn/{_REPO}/(?P<oid>[0-9a-f]+)/(?P<path>.*)", "cdn"),
        ("GET|HEAD", f"/{_REPO}/resolve/{_REVISION}/(?P<path>.+)", "resolve"),
        # Names without a namespace, and what is no model.
        ("GET|HEAD", "/.+/resolve/.*|/api/models/[^/]+(/revision/.*)?|/api/(datasets|spaces)/.*", "no_repo"),
    )
]


class _Cut(Exception):
    """The connection is over."""


class _Handler(BaseHTTPRequestHandler):
    """Reads requests and writes answers, well or, where a fault says so, badly."""

    protocol_version = "HTTP/1.1"
    wbufsize = -1
    disable_nagle_algorithm = True
    server: _Server

    def _serve(self) -> None:
        hub = self.server.hub
        path, _, query = self.path.partition("?")
        headers = {name.lower(): value for name, value in self.headers.items()}
        if "transfer-encoding" in headers:
            raise _Cut("huggingface_hub tells the length of all it sends")
        size = int(headers.get("content-length", 0))
        cut = hub.take_fault("cut", self.command, path) if size else None
        body = self._read(min(size, cut.after_bytes) if cut else size)
        user = hub.users.get(headers.get("authorization", "").removeprefix("Bearer "))
        about = (user.name if user else None, query, headers)
        if cut:
            hub.requests.append(Request(self.command, path, 0, len(body), 0, body, *about))
            self._reset()
            return
        plain = gzip.decompress(body) if headers.get("content-encoding") == "gzip" else body
        reply = self._answer(Call(self.command, path, parse_qs(query), headers, plain, user))
        shown = b"" if self.command == "HEAD" else reply.body
        wrong = hub.take_fault("cut_response", self.command, path) if shown and reply.status < 300 else None
        shown = shown[: wrong.after_bytes] if wrong else shown
        # Before it is sent, so that the client never has an answer to a request that is not listed.
        hub.requests.append(Request(self.command, path, reply.status, len(body), len(shown), plain, *about))
        self._send(reply, shown, wrong)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = _serve

    def _answer(self, call: Call) -> Reply:
        hub = self.server.hub
        fault = hub.take_fault("before", call.method, call.path)
        if fault and fault.action:
            fault.action()
        fault = hub.take_fault("fail", call.method, call.path)
        try:
            if fault:
                raise HubError(fault.status, fault.message or f"made to fail with {fault.status}", "", fault.headers)
            signed = call.path.startswith(("/cdn/", "/upload/"))
            if call.user is None and call.headers.get("authorization") and not signed:
                raise HubError(401, "Invalid credentials in Authorization header")
            with hub.lock:
                return _Endpoints(hub).answer(call)
        except HubError as error:
            return error.reply()
        except Exception as error:  # not a 500, which clients try again
            return HubError(501, f"hub_server got wrong {call.method} {call.path}: {error!r}").reply()

    def _send(self, reply: Reply, shown: bytes, fault: Fault | None) -> None:
        self.send_response_only(reply.status)
        for name, value in {"Content-Type": "application/json", **reply.headers}.items():
            self.send_header(name, value)
        self.send_header("X-Request-Id", f"Root={len(self.server.hub.requests)}")
        self.send_header("Content-Length", str(len(reply.body)))
        self.end_headers()
        self.wfile.write(shown)
        self.wfile.flush()
        if fault and fault.reset:
            self._reset()
        elif fault:
            self.close_connection = True

    def _reset(self) -> None:
        """Drops the connection without the orderly end that the client would otherwise be told of."""
        self.close_connection = True
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        os.close(self.connection.detach())

    def _read(self, size: int) -> bytes:
        data = self.rfile.read(size)
        if len(data) < size:
            raise _Cut(f"the client went away after {len(data)} of {size} bytes")
        return data

    def log_message(self, format: str, *args: object) -> None:
        pass


class _Server(ThreadingHTTPServer):
    """Keeps track of its connections, so that stopping it ends them too."""

    def __init__(self, address: tuple[str, int], hub: HubServer) -> None:
        super().__init__(address, _Handler)
        self.hub = hub
        self.connections: set[socket.socket] = set()

    def get_request(self) -> tuple[socket.socket, Any]:
        request, address = super().get_request()
        self.connections.add(request)
        return request, address

    def shutdown_request(self, request: Any) -> None:
        self.connections.discard(request)
        super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that goes away is nothing to report, and other errors are answered."""

    def stop(self) -> None:
        self.shutdown()
        self.server_close()
        for connection in list(self.connections):
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
