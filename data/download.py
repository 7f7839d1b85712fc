"""
Download one file: resume where it broke off, try again, and check the length and the SHA-256.
"""
import http.client
import os
import time
import urllib.error
import urllib.request

from data.files import UserError, sha256_of
from data.progress import progress_bar

TRIES = 4
CHUNK_BYTES = 1 << 20


def download(url, path, sha256=None):
    """
    Downloads a URL to `path`, unless the file is there already, and returns the path.

    The file grows as PATH.part, from which a later try or a later run goes on. UserError is raised
    if it does not arrive complete after some tries, or has another SHA-256 than is published.
    """
    if os.path.exists(path):
        return path
    part = path + ".part"
    for attempt in range(TRIES):
        time.sleep(attempt)
        try:
            return fetch(url, path, sha256)
        except urllib.error.HTTPError as error:
            if error.code == 416:
                # The part is longer than the file, say: start again.
                os.remove(part)
            elif error.code < 500:
                raise UserError(f"{url} answers {error.code} {error.reason}: it may have moved")
            reason = error
        except (urllib.error.URLError, http.client.HTTPException,
                ConnectionError, TimeoutError) as error:
            reason = getattr(error, "reason", error)
    kept = ""
    if os.path.exists(part):
        kept = f"; the part already downloaded is kept in {part}"
    raise UserError(f"cannot download {url} ({reason}): the offline corpora are stdlib, python, "
                    f"or a file of yours{kept}")


def fetch(url, path, sha256):
    """Makes one try, and raises an exception if the file does not arrive complete."""
    part = path + ".part"
    redirect = RedirectHandler()
    n_expected = receive(url, part, redirect)
    size = os.path.getsize(part)
    if n_expected is not None and size != n_expected:
        raise ConnectionError(
            f"the connection broke off after {size:,} of {n_expected:,} bytes")
    sha256 = sha256 or redirect.sha256
    if sha256 and sha256_of(part) != sha256:
        os.remove(part)
        raise UserError(f"{url} came with another SHA-256 than is published and was removed: "
                        f"try again")
    os.replace(part, path)
    return path


def receive(url, part, redirect):
    """
    Appends what the server sends to the file `part`.

    Returns how long the file should be then, or None if the server does not say.
    """
    n_had = os.path.getsize(part) if os.path.exists(part) else 0
    headers = {"User-Agent": "quartet"}
    if n_had:
        headers["Range"] = f"bytes={n_had}-"
    request = urllib.request.Request(url, headers=headers)
    opener = urllib.request.build_opener(redirect)
    try:
        response = opener.open(request, timeout=30)
    except urllib.error.HTTPError as error:
        if error.code == 416 and error.headers["Content-Range"] == f"bytes */{n_had}":
            return n_had                # The part is complete.
        raise
    with response:
        if response.status != 206:
            # The server does not resume: it sends the file from its beginning.
            n_had = 0
        length = response.headers["Content-Length"]
        n_expected = n_had + int(length) if length else None
        os.makedirs(os.path.dirname(part), exist_ok=True)
        with open(part, "ab" if n_had else "wb") as file, \
             progress_bar(part.removesuffix(".part"), n_expected, n_had) as bar:
            while chunk := response.read(CHUNK_BYTES):
                file.write(chunk)
                bar.update(len(chunk))
    return n_expected


class RedirectHandler(urllib.request.HTTPRedirectHandler):
    """
    Keeps the SHA-256 that Hugging Face publishes when it redirects to its storage.

    The header is X-Linked-Etag. A plain ETag will not do: GitHub's has 64 hex digits too, but is
    not a SHA-256.
    """
    sha256 = None

    def redirect_request(self, request, response, code, message, headers, url):
        etag = headers.get("X-Linked-Etag", "").strip('"')
        if len(etag) == 64:
            self.sha256 = etag
        return super().redirect_request(request, response, code, message, headers, url)
