"""A stand-in for S3 that is no bottleneck: nginx sends files as objects of a bucket, and notes each request.

Each answer begins after 25 ms and comes at 90 MB/s, about as S3's do. A few lines of Python answer listings. Reading
only; anybody may read.
"""

from __future__ import annotations

import contextlib
import http.client
import os
import shutil
import socket
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import parse_qs, urlsplit
from xml.sax.saxutils import escape

MODULE = "/usr/lib/nginx/modules/ngx_http_echo_module.so"
CONFIG = """
worker_processes 1; daemon off; pid {work}/nginx.pid; error_log {work}/errors; {user}
load_module {module};
events {{ worker_connections 4096; }}
http {{
  log_format asked '$request_method $uri $status $body_bytes_sent $http_range';
  access_log {work}/requests asked;
  sendfile on; tcp_nopush on; keepalive_requests 1000000; keepalive_timeout 300s; default_type application/octet-stream;
  client_body_temp_path {work}/a; proxy_temp_path {work}/b; fastcgi_temp_path {work}/c; uwsgi_temp_path {work}/d;
  scgi_temp_path {work}/e;
  server {{
    listen 127.0.0.1:{port}; root {root};
    location / {{
      error_page 418 = @list; if ($args ~ "list-type=2|location") {{ return 418; }}
      echo_sleep 0.025; echo_exec @object;
    }}
    location @object {{ try_files $uri =404; limit_rate 90m; }}
    location @list {{ proxy_pass http://127.0.0.1:{lister}; }}
  }}
}}
"""


class Request(NamedTuple):
    """A request as the server saw it. Listings are not among them."""

    method: str
    key: str
    status: int
    length: int
    span: str
    """`-`, or what the header Range asked for."""


class Server:
    """A bucket that is being served.

    Attributes:
        url: the endpoint.
        bucket: its name.
    """

    def __init__(self, folder: Path, work: Path) -> None:
        """Serves the files below `folder`, whose name is the bucket's, until `close`; `work` is for its own files."""
        self.bucket = folder.name
        port, lister = _free_port(), _free_port()
        self.url = f"http://127.0.0.1:{port}"
        self._work = work
        work.mkdir(parents=True, exist_ok=True)
        self._lister = ThreadingHTTPServer(("127.0.0.1", lister), _lister(folder))
        threading.Thread(target=self._lister.serve_forever, daemon=True).start()
        user = "user root;" if os.geteuid() == 0 else ""
        config = CONFIG.format(work=work, module=MODULE, port=port, root=folder.parent, lister=lister, user=user)
        (work / "nginx.conf").write_text(config)
        nginx = shutil.which("nginx", path=f"{os.environ['PATH']}:/usr/sbin")
        if nginx is None or not Path(MODULE).exists():
            raise SystemExit("needs nginx with its echo module: apt-get install nginx-light libnginx-mod-http-echo")
        self._nginx = subprocess.Popen([nginx, "-c", str(work / "nginx.conf")], stderr=subprocess.DEVNULL)
        for _ in range(200):
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
                return
            time.sleep(0.05)
        self.close()
        raise SystemExit(f"nginx did not start: {(work / 'errors').read_text()}")

    @property
    def environment(self) -> dict[str, str]:
        """What clients of S3 need to know, as environment variables."""
        return {
            "AWS_ENDPOINT_URL": self.url, "S3_ENDPOINT_URL": self.url, "AWS_ACCESS_KEY_ID": "any",
            "AWS_SECRET_ACCESS_KEY": "any", "AWS_REGION": "us-east-1", "AWS_DEFAULT_REGION": "us-east-1",
        }  # fmt: skip

    def requests(self) -> list[Request]:
        """The requests for objects that were answered so far, but for those before the last call."""
        path = self._work / "requests"
        lines = path.read_text().splitlines()[self._read :]
        self._read += len(lines)
        found = []
        for line in lines:
            method, uri, status, length, span = line.split(" ", 4)
            key = uri.removeprefix(f"/{self.bucket}").removeprefix("/")
            if key and not key.endswith("/"):
                found.append(Request(method, key, int(status), int(length), span))
        return found

    _read = 0

    def speed(self, keys: list[str], connections: int = 48, seconds: float = 4.0) -> float:
        """Objects a second that a client gets which does nothing else: threads with a connection each."""
        host = urlsplit(self.url).netloc
        until = time.monotonic() + seconds

        def get(first: int) -> int:
            connection = http.client.HTTPConnection(host)
            got = 0
            while time.monotonic() < until:
                connection.request("GET", f"/{self.bucket}/{keys[(first + got * connections) % len(keys)]}")
                answer = connection.getresponse()
                assert answer.status == 200
                answer.read()
                got += 1
            return got

        with ThreadPoolExecutor(connections) as pool:
            return sum(pool.map(get, range(connections))) / seconds

    def close(self) -> None:
        """Ends the server."""
        self._nginx.terminate()
        self._nginx.wait()
        self._lister.shutdown()


def exactly_once(requests: list[Request], sizes: dict[str, int]) -> str:
    """What is wrong where not each byte of each object was sent once; empty if all is well."""
    bodies = Counter[str]()
    for request in requests:
        if request.method == "GET" and request.status in (200, 206):
            bodies[request.key] += request.length
    more = sum(bodies[key] > size for key, size in sizes.items())
    less = sum(bodies[key] < size for key, size in sizes.items())
    failed = sum(request.status >= 400 for request in requests)
    return f"{more} more than once, {less} not whole, {failed} requests failed" if more or less or failed else ""


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def _objects(folder: Path) -> list[tuple[str, str]]:
    """The key of each object, in order, and what a listing says of it."""
    found = []
    for path in folder.rglob("*"):
        if path.is_file():
            about, key = path.stat(), path.relative_to(folder).as_posix()
            tag = f"{int(about.st_mtime):x}-{about.st_size:x}"  # nginx gives it the same
            content = (
                f"<Contents><Key>{escape(key)}</Key><LastModified>2026-01-01T00:00:00.000Z</LastModified>"
                f'<ETag>"{tag}"</ETag><Size>{about.st_size}</Size><StorageClass>STANDARD</StorageClass></Contents>'
            )
            found.append((key, content))
    return sorted(found)


def _page(objects: list[tuple[str, str]], asked: dict[str, str]) -> Iterator[str]:
    """A page of ListObjectsV2."""
    prefix, delimiter = asked.get("prefix", ""), asked.get("delimiter", "")
    after = asked.get("continuation-token") or asked.get("start-after", "")
    count, last, group = 0, "", None
    for key, content in objects:
        if not key.startswith(prefix) or key <= after:
            continue
        folder, inside, _ = key[len(prefix) :].partition(delimiter) if delimiter else (key, "", "")
        if inside and folder == group:
            last = key
            continue
        if count == int(asked.get("max-keys", 1000)):
            yield f"<IsTruncated>true</IsTruncated><NextContinuationToken>{escape(last)}</NextContinuationToken>"
            return
        if inside:
            group = folder
            yield f"<CommonPrefixes><Prefix>{escape(prefix + folder + delimiter)}</Prefix></CommonPrefixes>"
        else:
            yield content
        count, last = count + 1, key
    yield "<IsTruncated>false</IsTruncated>"


def _lister(folder: Path) -> type[BaseHTTPRequestHandler]:
    """Answers ListObjectsV2 and GetBucketLocation."""
    objects = _objects(folder)

    class Lister(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: Any) -> None:
            pass

        def do_GET(self) -> None:
            query = parse_qs(urlsplit(self.path).query, keep_blank_values=True)
            asked = {name: values[0] for name, values in query.items()}
            name = "LocationConstraint" if "location" in asked else "ListBucketResult"
            inside = "" if "location" in asked else "".join(_page(objects, asked))
            space = 'xmlns="http://s3.amazonaws.com/doc/2006-03-01/"'
            body = f'<?xml version="1.0" encoding="UTF-8"?><{name} {space}>{inside}</{name}>'.encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/xml")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

    return Lister
