"""The page over HTTP, on this machine alone: who may ask, how much may be sent, and what a browser may do with it."""

from __future__ import annotations

import errno
import json
import logging
import socket
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, cast
from urllib.parse import urlsplit

from cosmos_ssl.errors import UserError
from cosmos_ssl.files import storage_error
from cosmos_ssl.search.routes import Refused, Reply, Route, Routes, answer

HOST = "127.0.0.1"
_NAMES = (HOST, "localhost")  # a port is not looked at: it may be one that SSH forwards
_SECONDS = 30  # that a client may take for the next bytes
_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cache-Control": "no-store",
}
_log = logging.getLogger("cosmos_ssl.search")


def listen(port: int) -> socket.socket:
    """A socket on this machine's own address; port 0 is any that is free. Raises UserError for one that is taken."""
    try:
        return socket.create_server((HOST, port))
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            way = "Give another port, or 0 for any that is free"
            raise UserError(f"--serve {port}: another program listens there. {way}") from error
        raise storage_error(error, f"--serve {port}: cannot be listened on") from error
    except OverflowError as error:
        raise UserError(f"--serve {port}: a port is at most 65535") from error


class Server(ThreadingHTTPServer):
    """Answers requests by ``routes``, each in a thread of its own."""

    daemon_threads = True

    def __init__(self, listener: socket.socket, routes: Routes) -> None:
        super().__init__(listener.getsockname(), _Handler, bind_and_activate=False)
        self.socket.close()
        self.socket = listener
        self.routes = routes

    @property
    def address(self) -> str:
        """Where a browser finds the page."""
        return f"http://{HOST}:{self.socket.getsockname()[1]}/"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Whoever asked has gone, which is no fault; all else is logged."""
        _log.debug("a connection broke off", exc_info=True)


class _Handler(BaseHTTPRequestHandler):
    """One connection."""

    protocol_version = "HTTP/1.1"
    timeout = _SECONDS
    server_version, sys_version = "cosmos-ssl", ""

    def do_GET(self) -> None:
        """Answer."""
        try:
            self._check_origin()
            route, groups = cast(Server, self.server).routes.find(self.command, _path(self.path))
            reply, status = answer(route, groups, self._body(route)), 200
        except Refused as error:
            reply, status = _sentence(str(error)), error.status
            self.close_connection = True  # what is still to come of its body is not read
        except OSError:
            raise
        except Exception:
            _log.exception("%s %s failed", self.command, self.path)
            reply, status = _sentence("This failed; the terminal says how."), 500
            self.close_connection = True
        self._send(status, reply)

    do_HEAD = do_POST = do_PUT = do_DELETE = do_PATCH = do_OPTIONS = do_GET  # noqa: N815

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """Answer what is no request at all by a sentence, as everything else."""
        self.close_connection = True
        self._send(code, _sentence(f"This is no request that is answered here ({message or code})."))

    def log_message(self, format: str, *args: Any) -> None:
        """The terminal is not for every request."""
        _log.debug(format, *args)

    def _check_origin(self) -> None:
        """Refuse other sites: those that have our address by a name of their own (DNS rebinding), and those that ask
        from their own pages.
        """
        hosts = self.headers.get_all("Host") or []
        if len(hosts) != 1 or _name(hosts[0]) not in _NAMES:
            raise Refused(403, f"This page is at {cast(Server, self.server).address} alone.")
        origin = self.headers.get("Origin")
        told = self.headers.get("Sec-Fetch-Site", "none"), self.headers.get("Sec-Fetch-Mode", "navigate")
        foreign = told[0] not in ("same-origin", "none") and told[1] != "navigate"  # a link to here may be followed
        if foreign or (origin is not None and origin.lower() != f"http://{hosts[0].lower()}"):
            raise Refused(403, "Pages of other sites may not ask here.")

    def _body(self, route: Route) -> bytes:
        length, *more = self.headers.get_all("Content-Length") or ["0"]
        if "Transfer-Encoding" in self.headers or more or not (length.isascii() and length.isdecimal()):
            raise Refused(400, "Say how many bytes are sent (Content-Length).")
        if len(length) > 12 or int(length) > route.most:
            raise Refused(413, f"This is too much: at most {route.most:,} bytes are taken.")
        try:
            body = self.rfile.read(int(length))
        except TimeoutError as error:
            raise Refused(408, "The rest of the request did not come.") from error
        if len(body) < int(length):
            raise Refused(400, "The request was broken off.")
        return body

    def _send(self, status: int, reply: Reply) -> None:
        self.send_response(status)
        for name, value in {**_HEADERS, "Content-Type": reply.kind, "Content-Length": str(len(reply.body))}.items():
            self.send_header(name, value)
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(reply.body)


def _sentence(text: str) -> Reply:
    return Reply("application/json", json.dumps({"error": text}).encode())


def _path(target: str) -> str:
    """The path that a request names. Raises Refused where its target is no address."""
    try:
        return urlsplit(target).path
    except ValueError as error:
        raise Refused(400, "This is no address.") from error


def _name(host: str) -> str:
    """The name of a host without its port."""
    name, colon, port = host.rpartition(":")
    return (name if colon and port.isdecimal() else host).lower()
