"""A hub on this machine, which speaks as much of the protocol as its client needs."""

from __future__ import annotations

import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

Files = dict[str, bytes]


def commit(files: Files) -> str:
    """The commit that holds these files."""
    listed = [(name, hashlib.sha1(data).hexdigest()) for name, data in files.items()]
    return hashlib.sha1(repr(listed).encode()).hexdigest()


class HubServer:
    """Repositories by name, each with its revisions by name.

    Attributes:
      repositories: what there is.
      gated: names of those whose files nobody may read.
      downloads: names of the files that were read.
      url: where it listens.
    """

    def __init__(self):
        self.repositories: dict[str, dict[str, Files]] = {}
        self.gated: set[str] = set()
        self.downloads: list[str] = []
        handler = type("Handler", (_Handler,), {"hub": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,))
        self._thread.start()

    def stop(self) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def find(self, name: str, revision: str) -> Files | None:
        """The files of a revision, given by name or commit."""
        revisions = self.repositories[name]
        by_commit = {commit(files): files for files in revisions.values()}
        return revisions.get(revision, by_commit.get(revision))


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: HubServer

    def do_HEAD(self):
        self._answer()

    def do_GET(self):
        self._answer()

    def log_message(self, *_):
        pass

    def _answer(self):
        parts = unquote(urlsplit(self.path).path).strip("/").split("/")
        listing = parts[:2] == ["api", "models"]
        parts = parts[2:] if listing else parts
        owner, name, kind, revision, *rest = [*parts, "revision", "main"][
            : max(4, len(parts))
        ]
        repository = f"{owner}/{name}"
        if repository not in self.hub.repositories:
            return self._refuse(401, "RepoNotFound")
        files = self.hub.find(repository, revision)
        if files is None:
            return self._refuse(404, "RevisionNotFound")
        if listing:
            return self._send(json.dumps(self._listed(repository, kind, files)))
        file = "/".join(rest)
        if repository in self.hub.gated:
            return self._refuse(403, "GatedRepo")
        if file not in files:
            return self._refuse(404, "EntryNotFound")
        if self.command == "GET":
            self.hub.downloads.append(file)
        data = files[file]
        etag = f'"{hashlib.sha1(data).hexdigest()}"'
        return self._send(data, {"ETag": etag, "X-Repo-Commit": commit(files)})

    def _listed(self, repository: str, kind: str, files: Files):
        entries = [
            {
                "type": "file",
                "path": name,
                "size": len(data),
                "oid": hashlib.sha1(data).hexdigest(),
            }
            for name, data in files.items()
        ]
        if kind == "tree":
            return entries
        siblings = [{"rfilename": name} for name in files]
        return {"id": repository, "sha": commit(files), "siblings": siblings}

    def _refuse(self, status: int, code: str):
        self._send("{}", {"X-Error-Code": code}, status)

    def _send(self, body: str | bytes, headers=(), status: int = 200):
        data = body.encode() if isinstance(body, str) else body
        self.send_response(status)
        for name, value in dict(headers).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data)
