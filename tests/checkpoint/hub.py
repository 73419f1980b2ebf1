"""A hub on this machine: what the client of the hub asks for, answered from a folder; uploads are kept."""

import base64
import contextlib
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

COMMIT = "c0ffee" * 6 + "c0de"


class Hub:
    """Repositories (`OWNER/NAME` -> folder), what was asked for, and what was uploaded."""

    def __init__(self, repositories: dict[str, Path]):
        self.repositories = repositories
        self.requests: list[str] = []
        self.bytes_sent: dict[str, int] = {}
        self.uploaded: dict[str, dict[str, bytes]] = {}
        self.url = ""


@contextlib.contextmanager
def serve(repositories: dict[str, Path]) -> Iterator[Hub]:
    hub = Hub(repositories)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, format: str, *arguments: object) -> None:
            hub.requests.append(f"{self.command} {self.path.partition('?')[0]}")

        def reply(self, status: int, content: bytes, headers: dict[str, str] | None = None) -> None:
            self.send_response(status)
            for name, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)

        def reply_json(self, content: object, status: int = 200) -> None:
            self.reply(status, json.dumps(content).encode(), {"Content-Type": "application/json"})

        def missing(self, code: str) -> None:
            self.reply(404, b"{}", {"X-Error-Code": code})

        def do_GET(self) -> None:
            path = self.path.partition("?")[0]
            if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(revision|tree)/([^/]+))?", path):
                self.list_files(*found.groups())
            elif found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
                self.send_file(*found.groups())
            else:
                self.missing("EntryNotFound")

        do_HEAD = do_GET  # noqa: N815

        def list_files(self, repository: str, kind: str | None, revision: str | None) -> None:
            folder = hub.repositories.get(repository)
            if folder is None:
                return self.missing("RepoNotFound")
            if revision not in (None, "main", COMMIT):
                return self.missing("RevisionNotFound")
            files = sorted(p for p in folder.iterdir() if p.is_file())
            if kind == "tree":
                oid = lambda p: hashlib.sha1(p.name.encode()).hexdigest()
                entry = lambda p: {"type": "file", "path": p.name, "size": p.stat().st_size, "oid": oid(p)}
                return self.reply_json([entry(p) for p in files])
            return self.reply_json(
                {"id": repository, "sha": COMMIT, "siblings": [{"rfilename": p.name} for p in files]}
            )

        def send_file(self, repository: str, revision: str, name: str) -> None:
            file = hub.repositories.get(repository, Path("/nowhere")) / name
            if not file.is_file():
                return self.missing("EntryNotFound")
            content, status = file.read_bytes(), 200
            headers = {
                "ETag": f'"{hashlib.sha256(content).hexdigest()}"',
                "X-Repo-Commit": COMMIT,
                "Accept-Ranges": "bytes",
            }
            if wanted := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
                start, end = int(wanted[1]), int(wanted[2] or len(content) - 1)
                headers["Content-Range"] = f"bytes {start}-{min(end, len(content) - 1)}/{len(content)}"
                content, status = content[start : end + 1], 206
            if self.command == "GET":
                hub.bytes_sent[name] = hub.bytes_sent.get(name, 0) + len(content)
            return self.reply(status, content, headers)

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            path = self.path.partition("?")[0]
            if path == "/api/repos/create":
                described = json.loads(body)
                name = "/".join(filter(None, [described.get("organization") or "me", described["name"]]))
                hub.uploaded.setdefault(name, {})
                self.reply_json({"url": f"{hub.url}/{name}"})
            elif found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/preupload/main", path):
                files = json.loads(body)["files"]
                answer = [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in files]
                self.reply_json({"files": answer})
            elif found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/commit/main", path):
                for line in body.splitlines():
                    entry = json.loads(line)
                    if entry["key"] == "file":
                        content = base64.b64decode(entry["value"]["content"])
                        hub.uploaded[found[1]][entry["value"]["path"]] = content
                answer = {"commitUrl": f"{hub.url}/{found[1]}/commit/{COMMIT}", "commitOid": COMMIT, "hookOutput": ""}
                self.reply_json(answer)
            elif path == "/api/validate-yaml":
                self.reply_json({"errors": [], "warnings": []})
            else:
                self.missing("EntryNotFound")

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
