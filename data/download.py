"""
One file from the network: resumed where it broke off, tried again, checked by length and by SHA-256.
"""
import hashlib, http.client, os, time, urllib.error, urllib.request
from tqdm import tqdm
from data.tokens import DataError

TRIES = 4


def download(url, path, sha256=None):
    """the path, once the file is there. It grows as PATH.part, with which a later try or run goes on"""
    if os.path.exists(path): return path
    for attempt in range(TRIES):
        time.sleep(attempt)
        try:
            return fetch(url, path, sha256)
        except urllib.error.HTTPError as error:
            if error.code == 416: os.remove(path + ".part")     # longer than the file: start again
            elif error.code < 500:
                raise DataError(f"{url} answers {error.code} {error.reason}: it may have moved")
            reason = error
        except (urllib.error.URLError, http.client.HTTPException, ConnectionError, TimeoutError) as error:
            reason = getattr(error, "reason", error)
    kept = f"; the part already downloaded is kept in {path}.part" if os.path.exists(path + ".part") else ""
    raise DataError(f"cannot download {url} ({reason}): the offline corpora are stdlib, python, or a file of "
                    f"yours{kept}")


def fetch(url, path, sha256):
    """one try; an exception if the file does not come whole"""
    part, redirect = path + ".part", Redirect()
    have = os.path.getsize(part) if os.path.exists(part) else 0
    headers = {"User-Agent": "quartet"} | ({"Range": f"bytes={have}-"} if have else {})
    request = urllib.request.Request(url, headers=headers)
    with urllib.request.build_opener(redirect).open(request, timeout=30) as answer:
        if answer.status != 206: have = 0                       # the server sends all of it again
        length = answer.headers["Content-Length"]
        total = have + int(length) if length else None
        os.makedirs(os.path.dirname(path), exist_ok=True)
        name = os.path.basename(path)
        with open(part, "ab" if have else "wb") as file, \
             tqdm(desc=name, initial=have, total=total, unit="B", unit_scale=True, disable=None) as bar:
            while chunk := answer.read(1 << 20):
                file.write(chunk)
                bar.update(len(chunk))
    size = os.path.getsize(part)
    if total not in (None, size):
        raise ConnectionError(f"the connection broke off after {size:,} of {total:,} bytes")
    sha256 = sha256 or redirect.sha256
    if sha256 and sha256_of(part) != sha256:
        os.remove(part)
        raise DataError(f"{url} came with another SHA-256 than is published and was removed: try again")
    os.replace(part, path)
    return path


def sha256_of(path):
    sha = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20): sha.update(chunk)
    return sha.hexdigest()


class Redirect(urllib.request.HTTPRedirectHandler):
    """Hugging Face names a file's SHA-256 in the answer that redirects to its storage: X-Linked-Etag. A plain
    ETag will not do: GitHub's has 64 hex digits too and is something else"""
    sha256 = None

    def redirect_request(self, request, answer, code, message, headers, url):
        etag = headers.get("X-Linked-Etag", "").strip('"')
        if len(etag) == 64: self.sha256 = etag
        return super().redirect_request(request, answer, code, message, headers, url)
