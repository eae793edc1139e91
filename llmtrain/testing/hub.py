"""A hub of model repositories on this machine's loopback: as much of the protocol as an upload needs."""

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit

TOKEN = "hf_thetokenofatest"


@dataclass
class FakeHub:
    """What the server knows, and how it misbehaves."""

    url: str = ""
    repositories: dict[str, dict[str, bytes]] = field(default_factory=dict)
    """Name -> path -> content."""
    private: dict[str, bool] = field(default_factory=dict)
    commits: list[list[str]] = field(default_factory=list)
    """Paths of each commit; of a deleted one with a minus before it."""
    requests: list[str] = field(default_factory=list)
    """`METHOD PATH` of each, in their order."""
    failures: dict[str, list[int]] = field(default_factory=dict)
    """Part of a path -> status codes that the next requests to it are answered with."""
    spoil: bool = False
    """Store something else than what was sent."""
    role: str = "write"
    objects: dict[str, bytes] = field(default_factory=dict)
    """Large files by their SHA-256."""

    @property
    def environment(self) -> dict[str, str]:
        """What points huggingface_hub here."""
        return {"HF_ENDPOINT": self.url, "HF_TOKEN": TOKEN, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_TELEMETRY": "1"}


@contextmanager
def fake_hub() -> Iterator[FakeHub]:
    """Starts one; it forgets everything at the end."""
    hub = FakeHub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(hub))
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()


def _handler(hub: FakeHub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *arguments: Any) -> None:
            pass

        def answer(self, content: Any, status: int = 200) -> None:
            body = json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def _serve(self) -> None:
            path = urlsplit(self.path).path
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            hub.requests.append(f"{self.command} {path}")
            for part, codes in hub.failures.items():
                if part in path and codes:
                    return self.answer({"error": "as the test wants it"}, codes.pop(0))
            if not path.startswith("/objects/") and self.headers.get("Authorization") != f"Bearer {TOKEN}":
                return self.answer({"error": "Invalid username or password."}, 401)
            status, content = _respond(hub, self.command, path, body)
            return self.answer(content, status)

        do_GET = do_POST = do_PUT = _serve

    return Handler


def _respond(hub: FakeHub, method: str, path: str, body: bytes) -> tuple[int, Any]:
    """Status and content of the answer to a request of somebody who may do anything."""
    parts = path.strip("/").split("/")
    if path == "/api/whoami-v2":
        token = {"accessToken": {"role": hub.role}}
        return 200, {"type": "user", "name": "me", "orgs": [], "auth": {"type": "access_token", **token}}
    if path == "/api/validate-yaml":
        return 200, {"errors": [], "warnings": []}
    if path == "/api/repos/create":
        asked = json.loads(body)
        name = f"{asked.get('organization') or 'me'}/{asked['name']}"
        if name in hub.repositories:
            return 409, {"error": "You already created this model repo", "url": f"{hub.url}/{name}"}
        hub.repositories[name] = {".gitattributes": b"*.safetensors filter=lfs\n"}
        hub.private[name] = bool(asked.get("private") or asked.get("visibility") == "private")
        return 200, {"url": f"{hub.url}/{name}", "name": name}
    if parts[0] == "objects":
        hub.objects[parts[1]] = body
        return 200, {}
    if path.endswith(".git/info/lfs/objects/batch"):
        wanted = json.loads(body)["objects"]
        objects = [
            {**one, "authenticated": True, "actions": {"upload": {"href": f"{hub.url}/objects/{one['oid']}"}}}
            for one in wanted
            if one["oid"] not in hub.objects
        ]
        return 200, {"transfer": "basic", "objects": objects or wanted}
    if parts[:2] != ["api", "models"] or "/".join(parts[2:4]) not in hub.repositories:
        return 404, {"error": "Repository not found"}
    return _of_repository(hub, "/".join(parts[2:4]), parts[4:], body)


def _of_repository(hub: FakeHub, name: str, parts: list[str], body: bytes) -> tuple[int, Any]:
    files = hub.repositories[name]
    kind = parts[0] if parts else ""
    if kind == "preupload":
        asked = json.loads(body)["files"]
        return 200, {
            "files": [
                {
                    "path": one["path"],
                    "uploadMode": "lfs" if one["path"].endswith(".safetensors") else "regular",
                    "shouldIgnore": False,
                    "oid": None,
                }
                for one in asked
            ]
        }
    if kind == "commit":
        _commit(hub, files, [json.loads(line) for line in body.decode().splitlines()])
        oid = hashlib.sha1(str(len(hub.commits)).encode()).hexdigest()
        return 200, {"success": True, "commitUrl": f"{hub.url}/{name}/commit/{oid}", "commitOid": oid}
    if kind == "tree":
        return 200, [_entry(path, content) for path, content in sorted(files.items())]
    info = {"siblings": [{"rfilename": path} for path in sorted(files)]}
    return 200, {"id": name, "modelId": name, "sha": "0" * 40, "private": hub.private[name], "tags": [], **info}


def _commit(hub: FakeHub, files: dict[str, bytes], lines: list[dict[str, Any]]) -> None:
    changed = []
    for line in lines:
        value = line["value"]
        if line["key"] == "file":
            files[value["path"]] = base64.b64decode(value["content"]) + (b"x" if hub.spoil else b"")
            changed.append(value["path"])
        elif line["key"] == "lfsFile":
            files[value["path"]] = hub.objects[value["oid"]]
            changed.append(value["path"])
        elif line["key"] == "deletedFile":
            files.pop(value["path"])
            changed.append("-" + value["path"])
    hub.commits.append(changed)


def _entry(path: str, content: bytes) -> dict[str, Any]:
    oid = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
    entry: dict[str, Any] = {"type": "file", "path": path, "size": len(content), "oid": oid}
    if path.endswith(".safetensors"):
        entry["lfs"] = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 134}
    return entry
