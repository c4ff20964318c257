"""A model hub on this machine: the endpoints that huggingface_hub's own client calls to upload and to download."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

# Larger files go the way of LFS, as on the hub; so do these kinds.
LARGE = re.compile(r"\.(onnx|safetensors)$")
ID = r"(?P<id>[\w.-]+/[\w.-]+)"


@dataclass
class Hub:
    """Repositories by "models/owner/name" or "datasets/owner/name".

    Attributes:
        commits: files of each commit, by (repository, commit).
        refs: commit of each branch or tag, by (repository, name).
        token: the only one that may write.
        asked: every request's method and path.
    """

    token: str = "hf_of_this_test"
    commits: dict[tuple[str, str], dict[str, bytes]] = field(default_factory=dict)
    refs: dict[tuple[str, str], str] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)
    large: dict[str, bytes] = field(default_factory=dict)
    address: str = ""

    def commit(self, repo: str, files: dict[str, bytes], *names: str) -> str:
        """Put files there under branches or tags; returns the commit."""
        commit = hashlib.sha1(repr(sorted(files.items())).encode()).hexdigest()
        self.commits[repo, commit] = files
        self.refs |= {(repo, name): commit for name in names}
        return commit

    def files(self, repo: str, revision: str) -> tuple[str, dict[str, bytes]] | None:
        """Commit and files of a branch, tag or commit."""
        commit = self.refs.get((repo, revision), revision)
        return (commit, self.commits[repo, commit]) if (repo, commit) in self.commits else None


@contextmanager
def serving() -> Iterator[Hub]:
    """A hub that answers, at its `address`, while the context lasts."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (_Handler,), {"hub": hub}))
    hub.address = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: object) -> None:
        """Nothing is printed."""

    def do_HEAD(self) -> None:
        self._read()

    def do_GET(self) -> None:
        self._read()

    def do_PUT(self) -> None:
        self._write()

    def do_POST(self) -> None:
        self._write()

    def _send(self, content: object, status: int = 200, **headers: str) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _missing(self, what: str = "EntryNotFound", **headers: str) -> None:
        self._send({"error": what}, 404, X_Error_Code=what, X_Error_Message=what, **headers)

    def _read(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.asked.append(f"{self.command} {path}")
        if found := re.fullmatch(rf"/(?P<kind>datasets/)?{ID}/resolve/(?P<rev>[^/]+)/(?P<file>.+)", path):
            repo = f"{found['kind'] or 'models/'}{found['id']}"
            held = self.hub.files(repo, found["rev"])
            if held is None:
                return self._missing("RevisionNotFound")
            commit, files = held
            if found["file"] not in files:
                return self._missing(X_Repo_Commit=commit)
            body = files[found["file"]]
            etag = f'"{hashlib.sha1(body).hexdigest()}"'
            return self._send(body, X_Repo_Commit=commit, ETag=etag)
        if found := re.fullmatch(
            rf"/api/(?P<kind>models|datasets)/{ID}(/(?P<what>revision|tree)/(?P<rev>[^/]+).*)?", path
        ):
            repo = f"{found['kind']}/{found['id']}"
            held = self.hub.files(repo, found["rev"] or "main")
            if held is None:
                return self._missing("RevisionNotFound" if found["rev"] else "RepoNotFound")
            commit, files = held
            if found["what"] == "tree":
                rows = [
                    {"type": "file", "path": name, "size": len(body), "oid": hashlib.sha1(body).hexdigest()}
                    for name, body in files.items()
                ]
                return self._send(rows)
            siblings = [{"rfilename": name} for name in files]
            return self._send({"id": found["id"], "sha": commit, "siblings": siblings, "tags": [], "private": False})
        return self._missing()

    def _write(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.asked.append(f"{self.command} {path}")
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.command == "PUT":
            self.hub.large[path.rpartition("/")[2]] = body
            return self._send({})
        if path == "/api/validate-yaml":
            return self._send({"errors": [], "warnings": []})
        if path == "/verify":
            return self._send({})
        if self.headers.get("Authorization") != f"Bearer {self.hub.token}":
            return self._send({"error": "Invalid username or password."}, 401)
        if path == "/api/repos/create":
            wanted = json.loads(body)
            name = f"{wanted.get('organization') or 'me'}/{wanted['name']}"
            self.hub.commit(f"models/{name}", {}, "main")
            return self._send({"url": f"{self.hub.address}/{name}"})
        if found := re.fullmatch(rf"/{ID}\.git/info/lfs/objects/batch", path):
            return self._send(self._batch(json.loads(body)["objects"]))
        if found := re.fullmatch(rf"/api/models/{ID}/(?P<what>preupload|commit|branch)/(?P<rev>[^/]+)", path):
            repo = f"models/{found['id']}"
            if found["what"] == "branch":
                self.hub.refs[repo, found["rev"]] = self.hub.refs[repo, "main"]
                return self._send({})
            if found["what"] == "preupload":
                return self._send({"files": [self._way(one["path"]) for one in json.loads(body)["files"]]})
            return self._commit(repo, found["rev"], body)
        return self._missing()

    def _way(self, path: str) -> dict[str, object]:
        return {"path": path, "uploadMode": "lfs" if LARGE.search(path) else "regular", "shouldIgnore": False}

    def _batch(self, objects: list[dict[str, object]]) -> dict[str, object]:
        actions = [
            {**one, "actions": {"upload": {"href": f"{self.hub.address}/lfs/{one['oid']}"},
                                "verify": {"href": f"{self.hub.address}/verify"}}}
            for one in objects
        ]  # fmt: skip
        return {"transfer": "basic", "objects": actions}

    def _commit(self, repo: str, branch: str, body: bytes) -> None:
        held = self.hub.files(repo, branch)
        files = dict(held[1]) if held else {}
        for line in body.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                files[value["path"]] = self.hub.large[value["oid"]]
        commit = self.hub.commit(repo, files, branch)
        name = repo.removeprefix("models/")
        url = f"{self.hub.address}/{name}/commit/{commit}"
        self._send({"success": True, "commitOid": commit, "commitUrl": url, "hookOutput": ""})
