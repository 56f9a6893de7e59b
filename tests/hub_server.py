"""A Hugging Face Hub on 127.0.0.1: what its libraries ask for, and faults on demand."""

import contextlib
import email.utils
import hashlib
import http.server
import json
import threading
import urllib.parse
from collections.abc import Iterator

TOKEN = 'hf_ofTheTests'


class Repository:
  """Files of every commit; the newest is `main`."""

  def __init__(self, gated: bool = False):
    self.gated = gated
    self.commits: dict[str, dict[str, bytes]] = {}
    self.names: dict[str, str] = {}  # branch or tag -> commit

  def commit(self, files: dict[str, bytes], *names: str) -> str:
    """Adds a commit with these files, and returns it."""
    said = repr((len(self.commits), sorted(files.items())))
    sha = hashlib.sha1(said.encode()).hexdigest()
    self.commits[sha] = {'.gitattributes': b'', **files}
    self.names |= dict.fromkeys(('main', *names), sha)
    return sha


class Hub(http.server.ThreadingHTTPServer):
  """Repositories by 'models/ORG/NAME' or 'datasets/ORG/NAME'.

  Attributes:
    repositories: that it has.
    asked: 'METHOD PATH RANGE' of every request.
    cut: file -> bytes after which the connection breaks, the next time.
    stuck: files of which half is sent, and then nothing.
    down: whether it answers that it is out of order.
  """

  daemon_threads = True

  def __init__(self):
    super().__init__(('127.0.0.1', 0), _Handler)
    self.repositories: dict[str, Repository] = {}
    self.asked: list[str] = []
    self.cut: dict[str, int] = {}
    self.stuck: set[str] = set()
    self.ended = threading.Event()
    self.down = False

  @property
  def url(self) -> str:
    return f'http://127.0.0.1:{self.server_port}'

  def downloads(self) -> list[str]:
    """Returns the names of the files that were sent, whole or in part."""
    return [x.split()[1].rpartition('/')[2] for x in self.asked if x.startswith('GET /')
            and '/resolve/' in x]  # fmt: skip


@contextlib.contextmanager
def running() -> Iterator[Hub]:
  """Runs a Hub without repositories."""
  with Hub() as hub:
    thread = threading.Thread(target=hub.serve_forever, args=(0.05,))
    thread.start()
    try:
      yield hub
    finally:
      hub.ended.set()
      hub.shutdown()
      thread.join()


class _Handler(http.server.BaseHTTPRequestHandler):
  protocol_version = 'HTTP/1.1'
  server: Hub

  def log_message(self, format: str, *args) -> None:
    self.server.asked.append(
      f'{self.command} {self.path} {self.headers.get("Range", "")}'.strip()
    )

  def do_GET(self) -> None:
    self._answer()

  do_HEAD = do_POST = do_GET

  def _answer(self) -> None:
    size = int(self.headers.get('Content-Length') or 0)
    asked = urllib.parse.parse_qs(self.rfile.read(size).decode())
    if self.server.down:
      return self._fail(503, '', 'out of order')
    parts = urllib.parse.urlsplit(self.path).path.strip('/').split('/')
    api = parts[0] == 'api'
    parts = parts[1:] if api else parts
    if parts[0] not in ('models', 'datasets'):
      parts = ['models', *parts]
    words = [urllib.parse.unquote(part) for part in parts]
    name, (what, revision, *path) = (
      '/'.join(words[:3]),
      [*words[3:], 'revision', ''][:2] + words[5:],
    )
    token = (self.headers.get('Authorization') or '').removeprefix('Bearer ')
    if token and token != TOKEN:
      return self._fail(401, '', 'Invalid credentials in Authorization header')
    repository = self.server.repositories.get(name)
    if repository is None:
      return self._fail(404 if token else 401, 'RepoNotFound', 'Repository not found')
    revision = revision or 'main'
    sha = repository.names.get(revision, revision)
    if sha not in repository.commits:
      return self._fail(404, 'RevisionNotFound', f'Invalid rev id: {revision}')
    if what == 'resolve' and repository.gated and not token:
      return self._fail(401, 'GatedRepo', 'Access is restricted')
    files = repository.commits[sha]
    if what == 'resolve':
      return self._file('/'.join(path), files, sha)
    if what == 'tree':
      return self._json([_about(path, files[path]) for path in files])
    if what == 'paths-info':
      return self._json([_about(x, files[x]) for x in asked['paths'] if x in files])
    assert what == 'revision', self.path
    siblings = [{'rfilename': path} for path in files]
    self._json({'id': name.partition('/')[2], 'sha': sha, 'siblings': siblings,
                'private': False, 'gated': repository.gated, 'tags': []})  # fmt: skip

  def _json(self, value) -> None:
    self._send(200, json.dumps(value).encode(), {'Content-Type': 'application/json'})

  def _fail(self, status: int, code: str, message: str) -> None:
    headers = {'X-Error-Code': code} if code else {}
    self._send(status, b'', headers | {'X-Error-Message': message})

  def _file(self, path: str, files: dict[str, bytes], sha: str) -> None:
    if path not in files:
      headers = {'X-Error-Code': 'EntryNotFound', 'X-Repo-Commit': sha}
      return self._send(404, b'', headers | {'X-Error-Message': 'Entry not found'})
    content, status = files[path], 200
    headers = {'ETag': f'"{_etag(content)}"', 'X-Repo-Commit': sha}
    if asked := self.headers.get('Range'):
      first = int(asked.removeprefix('bytes=').partition('-')[0])
      last = len(content) - 1
      headers['Content-Range'] = f'bytes {first}-{last}/{len(content)}'
      content, status = content[first:], 206
    self._send(status, content, headers, path)

  def _send(self, status: int, content: bytes, headers: dict, path: str = '') -> None:
    self.send_response(status)
    for name, value in headers.items():
      self.send_header(name, value)
    self.send_header('Content-Length', str(len(content)))
    self.send_header('Date', email.utils.formatdate(usegmt=True))
    self.end_headers()
    if self.command == 'HEAD':
      return
    stuck = path in self.server.stuck
    most = self.server.cut.pop(path, len(content) // 2 if stuck else len(content))
    self.wfile.write(content[:most])
    self.close_connection = most < len(content)
    if stuck:
      self.wfile.flush()
      self.server.asked.append(f'STUCK {path}')
      self.server.ended.wait()


def _etag(content: bytes) -> str:
  return hashlib.sha1(content).hexdigest()


def _about(path: str, content: bytes) -> dict:
  return {'type': 'file', 'path': path, 'size': len(content), 'oid': _etag(content)}
