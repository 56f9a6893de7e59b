"""Webis-TLDR-17 in its own form: who trains, what of a post is kept."""

import dataclasses
import json

import pytest
import tensorflow_datasets as tfds

from configs import tiny
from hetlora_jax import config
from hetlora_jax.data import builders, people
from hetlora_jax.data.builders import reddit_tldr


def post(author='ann', content='I bought a car.', summary='a car', **fields):
  """Returns a post with the fields that the corpus has."""
  return {
    'author': author,
    'body': f'{content} TL;DR {summary}',
    'normalizedBody': f'{content} TL;DR {summary}',
    'content': content,
    'content_len': len(content.split()),
    'summary': summary,
    'summary_len': len(summary.split()),
    'id': 'c69al3r',
    'subreddit': 'cars',
    'subreddit_id': 't5_2qh33',
  } | fields


def write(folder, posts):
  path = folder / reddit_tldr.FILE
  path.write_text(''.join(f'{json.dumps(p)}\n' for p in posts))
  return path


def open_posts(folder, posts):
  path = str(write(folder, posts))
  return builders.open_dataset('reddit_tldr', folder / 'd', path)


class Letters:
  bos_id = 2

  def encode(self, text):
    return [ord(letter) for letter in text]


def test_a_post_is_its_authors_in_the_order_of_the_file(tmp_path):
  found = open_posts(tmp_path, [
    post('bob', summary='one'), post('ann', summary='two'),
    post('bob', summary='three', subreddit='dogs'), post('ann', summary='four'),
  ])  # fmt: skip
  rows = [(r['client'], r['target']) for r in found.examples]
  assert rows == [(b'ann', b'two'), (b'ann', b'four'), (b'bob', b'one'), (b'bob', b'three')]  # fmt: skip
  assert found.people[1]['labels'].tolist() == [b'cars', b'dogs']


def test_a_post_does_not_hold_its_summary():
  found = reddit_tldr.example(post(content='A car it is.\nTL;DR: a car'), 0)
  assert found.context == ['A car it is.']
  whole = post(content='I did buy a car, you see. a carpet', summary='buy a car')
  assert reddit_tldr.example(whole, 0).context == ['I did , you see. a carpet']
  word = post(content='My car is red.', summary='car')
  assert reddit_tldr.example(word, 0).context == ['My car is red.']


@pytest.mark.parametrize(
  'fields',
  [
    {'author': '[deleted]'}, {'author': None}, {'content': '[deleted]'},
    {'content': ''}, {'summary': ''}, {'content': 'a red car', 'summary': 'a red car'},
  ],
)  # fmt: skip
def test_posts_of_nobody_and_nothing_are_dropped(fields):
  assert reddit_tldr.example(post(), 0) is not None
  assert reddit_tldr.example(post(**fields), 0) is None


def test_an_author_of_one_post_is_left_out(tmp_path):
  found = open_posts(tmp_path, [post('ann'), post('bob'), post('ann')])
  assert [p['client'] for p in found.people] == [b'ann']


def load(tmp_path, posts, **overrides):
  data = dataclasses.replace(
    config.built(tiny.get_config()).data, name='reddit_tldr',
    path=str(write(tmp_path, posts)), min_examples=2, unseen_fraction=0.5,
    heldout_fraction=0.2, **overrides,
  )  # fmt: skip
  dataset = builders.open_dataset(data.name, tmp_path / 'd', data.path)
  return people.load(data, Letters(), dataset)


def test_who_wrote_much_trains_and_all_others_are_unseen(tmp_path, monkeypatch):
  monkeypatch.setattr(reddit_tldr.RedditTldr, 'train_from', 4)
  posts = [post(f'p{i}') for i in range(8) for _ in range(i + 1)]
  groups = load(tmp_path, posts).groups
  assert groups['train'].ids == ('p3', 'p4', 'p5', 'p6', 'p7')
  assert groups['unseen'].ids == ('p1', 'p2')


def test_the_paper_trains_on_authors_of_a_hundred_posts(tmp_path):
  assert reddit_tldr.RedditTldr.train_from == 100
  with pytest.raises(ValueError, match='of 100 examples or more, and there are'):
    load(tmp_path, [post()] * 5)


def test_a_post_reads_as_a_text_and_its_summary(tmp_path, monkeypatch):
  monkeypatch.setattr(reddit_tldr.RedditTldr, 'train_from', 2)
  population = load(tmp_path, [post(summary='wheels')] * 3, tokens_per_example=25)
  tokens = population.example('train', 0, 0).tokens
  assert ''.join(map(chr, tokens[1:])) == 'I bought a\nTL;DR: wheels\n'


def test_tfdss_own_download_is_found(tmp_path, monkeypatch):
  monkeypatch.setattr(tfds.core.constants, 'DATA_DIR', str(tmp_path))
  with pytest.raises(FileNotFoundError, match=r'has no corpus.*data\.path'):
    builders.open_dataset('reddit_tldr', tmp_path / 'd')
  unpacked = tmp_path / 'downloads' / 'extracted' / 'ZIP.zenodo'
  unpacked.mkdir(parents=True)
  write(unpacked, [post('ann'), post('ann')])
  assert len(builders.open_dataset('reddit_tldr', tmp_path / 'd').examples) == 2


def test_what_tfds_has_prepared_is_read(tmp_path, monkeypatch):
  monkeypatch.setattr(tfds.core.constants, 'DATA_DIR', str(tmp_path))
  builder = tfds.builder('reddit', data_dir=tmp_path, file_format='array_record')
  fields = builder.info.features
  posts = [{k: p[k] for k in fields} for p in [post('ann'), post('ann')]]
  cls = type(builder)
  generators = lambda self, _: {'train': enumerate(posts)}  # noqa: E731
  monkeypatch.setattr(cls, '_split_generators', generators)
  builder.download_and_prepare(file_format='array_record')
  assert len(builders.open_dataset('reddit_tldr', tmp_path / 'd').examples) == 2


@pytest.mark.parametrize('bad', ['{', {'author': 7}, {'summary': ['x']}])
def test_a_damaged_line_is_named(tmp_path, bad):
  path = write(tmp_path, [post(), post()])
  line = bad if isinstance(bad, str) else json.dumps(post() | bad)
  path.write_text(path.read_text() + line + '\n')
  with pytest.raises(ValueError, match=rf'{reddit_tldr.FILE}:3 .*again'):
    builders.open_dataset('reddit_tldr', tmp_path / 'd', str(path))
