"""A stand-in for the hub: its paths for listing and fetching files, over a folder on this machine.

``python tests/data/hub_server.py FOLDER`` prints its address and serves
``FOLDER/<owner>/<name>/...`` as the Parquet branches of
data sets. A short name is answered as its long one, as the hub does. Files
named ``*.cut`` beside a file make its answers stop in the middle, ``*.slow`` make them late.
"""

from __future__ import annotations

import hashlib
import json
import sys
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlparse

COMMIT = "a" * 40
BRANCH = "refs/convert/parquet"


class Hub(BaseHTTPRequestHandler):
    """Answers what `huggingface_hub` asks when it lists and fetches files of data sets."""

    root: Path
    protocol_version = "HTTP/1.1"

    def log_message(self, *words: object) -> None:
        """Stay quiet."""

    def do_HEAD(self) -> None:
        """As GET, without the content."""
        self.do_GET()

    def do_GET(self) -> None:
        """Facts of a data set, a list of files, or a file."""
        parts = unquote(urlparse(self.path).path).strip("/").split("/")
        if parts[:2] == ["api", "datasets"]:
            self.describe(parts[2:])
        elif parts[0] == "datasets" and parts[3:4] == ["resolve"]:
            rest = "/".join(parts[4:]).removeprefix(BRANCH).removeprefix(COMMIT).strip("/")
            self.fetch(self.root / parts[1] / parts[2] / rest)
        else:
            self.answer(b"{}", status=404)

    def describe(self, parts: list[str]) -> None:
        """Answer about a data set: who it is, or what a folder of it holds."""
        owners = [path for path in self.root.glob(f"*/{parts[0]}") if path.is_dir()]
        is_short = len(parts) == 1 and owners
        home = owners[0] if is_short else self.root.joinpath(*parts[:2])
        if not home.is_dir():
            self.answer(b'{"error": "none"}', {"X-Error-Code": "RepoNotFound"}, 404)
        elif parts[2:3] == ["tree"]:
            folder = home / "/".join(parts[3:]).removeprefix(BRANCH).strip("/")
            self.list(home, folder)
        else:
            name = home.relative_to(self.root).as_posix()
            facts = {"id": name, "sha": COMMIT, "private": False, "tags": [], "siblings": []}
            self.answer(json.dumps({**facts, "downloads": 0}).encode())

    def list(self, home: Path, folder: Path) -> None:
        """Answer with the entries of a folder."""
        if not folder.is_dir():
            self.answer(b'{"error": "none"}', {"X-Error-Code": "EntryNotFound"}, 404)
            return
        entries = [
            {
                "type": "directory" if path.is_dir() else "file",
                "path": path.relative_to(home).as_posix(),
                "oid": "0" * 40,
                "size": path.stat().st_size,
            }
            for path in sorted(folder.iterdir())
            if path.suffix not in (".cut", ".slow")
        ]
        self.answer(json.dumps(entries).encode())

    def fetch(self, path: Path) -> None:
        """Answer with a file."""
        if not path.is_file():
            self.answer(b"", {"X-Error-Code": "EntryNotFound"}, 404)
            return
        content = path.read_bytes()
        etag = hashlib.sha256(content).hexdigest()
        headers = {"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT}
        if path.with_suffix(".slow").exists():
            time.sleep(60)
        cut = path.with_suffix(".cut")
        self.answer(content, headers, is_cut=cut.exists())

    def answer(
        self,
        content: bytes,
        headers: dict[str, str] | None = None,
        status: int = 200,
        is_cut: bool = False,
    ) -> None:
        """Send an answer; a cut one ends in the middle and closes the connection."""
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        self.wfile.write(content[: len(content) // 2] if is_cut else content)
        if is_cut:
            self.wfile.flush()
            self.close_connection = True


if __name__ == "__main__":
    Hub.root = Path(sys.argv[1])
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    print(f"http://127.0.0.1:{server.server_address[1]}", flush=True)
    server.serve_forever()
