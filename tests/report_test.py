"""The page that compares runs: its numbers, what it quotes, what it needs."""

import html.parser
import json
import math
import pathlib
import re
import shutil
import statistics

import pytest
from experiment_test import small_config

from hetlora_jax import config, files
from hetlora_jax.tools import report, sweep, tables
from hetlora_jax.tools.report import charts, runs
from tests import programs

ROOT = pathlib.Path(__file__).parent.parent
HOSTILE = '</blockquote><script>alert(1)</script><img src="http://x/y">&amp;'
_VOID = ('meta', 'link')


class Element:
  """A node of a parsed page."""

  def __init__(self, name, attributes):
    self.name, self.attributes = name, dict(attributes)
    self.children, self.text = [], ''

  def all(self, *names):
    """Returns the elements of some names within this one, in order."""
    found = []
    for child in self.children:
      found += [child] if not names or child.name in names else []
      found += child.all(*names)
    return found


class _Parser(html.parser.HTMLParser):
  def __init__(self):
    super().__init__()
    self.root = Element('', ())
    self.open = [self.root]

  def handle_starttag(self, tag, attrs):
    element = Element(tag, attrs)
    self.open[-1].children.append(element)
    if tag not in _VOID:
      self.open.append(element)

  def handle_endtag(self, tag):
    assert self.open.pop().name == tag, f'{tag} closes another element'

  def handle_data(self, data):
    for element in self.open:
      element.text += data


def _parse(path):
  parser = _Parser()
  parser.feed(path.read_text())
  assert parser.open == [parser.root]
  return parser.root


def _page(folders, folder):
  report.write(folders, folder / 'page.html')
  return _parse(folder / 'page.html')


def _section(page, key):
  return next(x for x in page.all('section') if x.attributes.get('id') == key)


def _cells(table):
  return [
    [cell.text for cell in row.children] for row in table.all('tbody')[0].all('tr')
  ]


def _edit(path, **fields):
  content = json.loads(path.read_text())
  path.write_text(json.dumps(content | fields))


def _person(i):
  return {'client': f'p{i}', 'rank': 2 + i, 'loss_sum': i + 1.0, 'tokens': 2}


def _add_people(workdir):
  people = {'seen': [_person(i) for i in range(4)], 'unseen': [_person(9)]}
  (workdir / 'people.json').write_text(json.dumps(people))


def _add_samples(workdir, generated):
  sample = {'client': 3, 'kind': 'seen', 'prompt': HOSTILE,
            'reference': 'half \ud800 a \u202epair', 'generated': generated}  # fmt: skip
  (workdir / 'generations.jsonl').write_text(json.dumps(sample) + '\n')


@pytest.fixture(scope='module')
def swept(tmp_path_factory):
  """A sweep of two seeds, and a third run that says it was FedIT."""
  folder = tmp_path_factory.mktemp('runs')
  points = [{'seed': 0}, {'seed': 1}]
  c = small_config(federated__num_rounds=3)
  (program,) = sweep.programs(sweep.plan(c, points, folder, 'train'))
  sweep.run_program(program)
  shutil.copytree(folder / 'seed=0', folder / 'fedit')
  _edit(folder / 'fedit' / 'config.json', method='fedit')
  for name in ('seed=0', 'seed=1'):
    _add_people(folder / name)
    _add_samples(folder / name, f'{name} {HOSTILE}')
  return folder


@pytest.fixture(scope='module')
def page(swept, tmp_path_factory):
  return _page([swept], tmp_path_factory.mktemp('page'))


@pytest.fixture
def copied(swept, tmp_path):
  return pathlib.Path(shutil.copytree(swept, tmp_path / 'runs'))


def _summaries(swept, *names):
  return [json.loads((swept / n / 'summary.json').read_text()) for n in names]


def test_the_summary_has_the_numbers_of_summary_json(swept, page):
  rows = _cells(_section(page, 'summary').all('table')[0])
  assert len(rows) == 2
  fedit, hetlora = rows  # in the order of their folders
  for name, row, folders in (
    ('fedit', fedit, ['fedit']),
    ('hetlora', hetlora, ['seed=0', 'seed=1']),
  ):
    assert f'method={name}' in row[0]
    for folder in folders:
      assert folder in row[0]
    got = _summaries(swept, *folders)
    mean = lambda field: statistics.mean(s[field] for s in got)  # noqa
    for who, cell in zip(('seen', 'unseen'), row[1:3], strict=True):
      for what, digits in (('loss', 3), ('perplexity', 2)):
        ends = [
          tables.spread([s[end][f'eval/{who}/{what}'] for s in got], digits)
          for end in ('first', 'last')
        ]
        assert ' → '.join(ends) in cell
    assert row[3:] == [
      tables.size(mean('comm/up_bytes')), tables.size(mean('comm/down_bytes')),
      tables.size(mean('train/parameters')),
      f'{mean("aggregation/error"):.3f}',
      f'{tables.seconds(mean("time/rounds_s"))}'
      f'{tables.seconds(mean("time/compile_s"))} compiling',
    ]  # fmt: skip
  assert '±' in hetlora[1] and '±' not in fedit[1]


def test_differences_are_paired_or_a_reason_is_given(page, copied, tmp_path):
  table = _section(page, 'summary').all('table')[1]
  assert 'Loss less that of method=fedit' in table.all('caption')[0].text
  ((name, *cells),) = _cells(table)
  assert 'method=hetlora' in name
  assert cells[::2] == [*['not paired: other people or turns are evaluated'] * 2, '']
  for i, folder in enumerate(('fedit', 'seed=0', 'seed=1')):
    _add_people(copied / folder)
    people = json.loads((copied / folder / 'people.json').read_text())
    for p in people['seen'] + people['unseen']:
      p['loss_sum'] += i * p['tokens']
    _edit(copied / folder / 'people.json', **people)
  report.write([copied], tmp_path / 'a.html', 'method=hetlora')
  table = _section(_parse(tmp_path / 'a.html'), 'summary').all('table')[1]
  assert 'Loss less that of method=hetlora' in table.all('caption')[0].text
  ((name, *cells),) = _cells(table)
  # fedit has seed 0 alone, of which hetlora's people lose one nat more a token.
  assert 'method=fedit' in name and cells[0] == '-1.000 [-1.000, -1.000]'
  assert cells[1] == '-63.2 %' and cells[-1] == '4 and 1 people, 1 seed'
  with pytest.raises(config.ConfigError, match='--baseline=x is no arm'):
    report.write([copied], tmp_path / 'b.html', 'x')
  assert not (tmp_path / 'b.html').exists()
  for suffix, start in (('png', b'\x89PNG'), ('pdf', b'%PDF'), ('svg', b'<?xml')):
    assert (tmp_path / f'a_curves.{suffix}').read_bytes().startswith(start)
    assert not (tmp_path / f'b_curves.{suffix}').exists()


def test_what_is_left_out_of_the_data_is_told(swept, page, copied):
  rows = _cells(_section(page, 'summary').all('table')[2])
  (one,) = _summaries(swept, 'seed=0')
  assert one['data/clients'] == one['training_people'] + one['unseen_people'] == 64
  for row in rows:
    assert row[1:] == ['64', '47', '17', '0', '0', *(
      f'{one[f"data/{name}_cut"]:.2%}' for name in ('contexts', 'targets')
    )]  # fmt: skip
  # Runs of earlier releases do not say.
  for path in copied.rglob('summary.json'):
    old = {k: v for k, v in json.loads(path.read_text()).items() if k[:5] != 'data/'}
    path.write_text(json.dumps(old))
  page = _page([copied], copied)
  assert len(_section(page, 'summary').all('table')) == 2


def test_the_curves_have_the_numbers_of_metrics_jsonl(swept, page):
  curves = _section(page, 'curves')
  rows = files.read_rows(swept / 'fedit' / 'metrics.jsonl')
  want = [
    ['method=fedit', str(r['round']),
     *[f'{r[f"eval/{who}/loss"]:.4f}' for who in ('seen', 'unseen')]]
    for r in rows if 'eval/seen/loss' in r
  ]  # fmt: skip
  got = _cells(curves.all('table')[0])
  assert [row for row in got if row[0] == 'method=fedit'] == want
  assert len(want) == 3
  against_bytes = curves.all('svg')[3:]  # after the swatches of the legend
  tips = [t.text for t in against_bytes[0].all('title')]
  sent = sum(rows[-1][f'comm/total_{way}_bytes'] for way in ('up', 'down')) / 1e6
  assert rows[-1]['round'] == 3
  assert f'method=fedit: {rows[-1]["eval/seen/loss"]:.4g} at {sent:.4g}' in tips


def test_ranks_and_energy_are_told_in_words(swept, page):
  row = files.read_rows(swept / 'fedit' / 'metrics.jsonl')[-1]
  text = _section(page, 'ranks').text
  assert f'→ {row["rank/mean"]:.3g};' in text
  assert f'largest {row["rank/max"]} → {row["rank/max"]}' in text
  held, count = 0.0, 0
  while held < 0.9:
    held, count = held + row['energy/slots'][count], count + 1
  assert f'the first {count} of 6 slots' in _section(page, 'energy').text


def test_people_fields_environment_and_commands(swept, page):
  rows = _cells(_section(page, 'people').all('table')[0])
  people = json.loads((swept / 'fedit' / 'people.json').read_text())
  for row, kind in zip(rows, ('seen', 'unseen'), strict=False):
    loss = [p['loss_sum'] / p['tokens'] for p in people[kind]]
    assert row[1:3] == [kind, str(len(loss))] and row[0].endswith('fedit')
    assert row[4] == f'{statistics.median(loss):.3f}'
    assert row[6] == f'{statistics.mean(loss):.3f}'
  # Losses of 0.5, 1, 1.5 and 2, once a seed.
  assert rows[2][1:] == ['seen', '8', '0.500', '1.250', '2.000', '1.250']
  fields = _section(page, 'fields').all('table')[0]
  assert [x.text for x in fields.all('th')][:3] == ['run', 'seed', 'method']
  assert ['fedit', '0', 'fedit'] in _cells(fields)
  environment = _section(page, 'environment')
  (summary,) = _summaries(swept, 'seed=1')
  assert summary['command'] in [x.text for x in environment.all('code')]
  assert f'jax {summary["versions"]["jax"]}' in environment.text


def test_what_people_wrote_is_text(page):
  quotes = [x.text for x in _section(page, 'samples').all('blockquote')]
  assert quotes == [
    HOSTILE, 'half \ufffd a \ufffdpair',
    f'seed=0 {HOSTILE}', f'seed=1 {HOSTILE}',
  ]  # fmt: skip
  assert not page.all('script', 'img', 'iframe', 'object', 'form')


def test_the_page_needs_nothing_else(page):
  for element in page.all():
    for name, value in element.attributes.items():
      assert not name.startswith('on')
      if name in ('src', 'href', 'xlink:href', 'srcset', 'data', 'action'):
        assert value.startswith('#') or value == 'data:,'
  css = page.all('style')[0].text
  assert 'url(' not in css and '@import' not in css
  policy = [m.attributes.get('content') for m in page.all('meta')]
  assert any("default-src 'none'" in (p or '') for p in policy)
  assert 'prefers-color-scheme: dark' in css and '@media print' in css


def test_the_page_can_be_read_by_all(page):
  assert len(page.all('h1')) == 1
  ids = [x.attributes['id'] for x in page.all() if 'id' in x.attributes]
  assert len(set(ids)) == len(ids)
  for link in page.all('a'):
    assert link.attributes['href'][1:] in ids
  for table in page.all('table'):
    assert table.all('caption')[0].text
    assert all(x.attributes['scope'] in ('col', 'row') for x in table.all('th'))
  drawn = [x for x in page.all('svg') if x.attributes.get('role') == 'img']
  assert len(drawn) == 9 + 2 + 2 + 3
  for chart in drawn:
    title, about = chart.children[:2]
    assert (title.name, about.name) == ('title', 'desc')
    assert chart.attributes['aria-label'] == f'{title.text}. {about.text}'
  for other in page.all('svg'):
    assert other in drawn or other.attributes['aria-hidden'] == 'true'


def test_an_unfinished_run_is_shown_and_marked(copied, tmp_path):
  workdir = copied / 'seed=1'
  (workdir / 'summary.json').unlink()
  lines = (workdir / 'metrics.jsonl').read_text().splitlines()
  (workdir / 'metrics.jsonl').write_text('\n'.join([*lines[:3], lines[3][:40]]))
  text = _section(_page([workdir], tmp_path), 'summary').text
  loss = json.loads(lines[2])['eval/seen/loss']
  assert 'unfinished: 2 of 3 rounds' in text and f'→ {loss:.3f}' in text
  # Beside a finished seed it does not count.
  page = _page([workdir, copied / 'seed=0'], tmp_path)
  assert 'hetlora, 1 of 2 seeds' in _section(page, 'summary').text
  assert '1 run unfinished' in page.text


def test_a_run_that_has_just_begun_is_shown(copied, tmp_path):
  workdir = copied / 'seed=1'
  (workdir / 'summary.json').unlink()
  (workdir / 'people.json').unlink()
  (workdir / 'generations.jsonl').unlink()
  (workdir / 'metrics.jsonl').write_text('')
  text = _page([workdir], tmp_path).text
  assert 'unfinished: 0 of 3 rounds' in text and 'nothing measured' in text


def test_a_field_that_a_run_did_not_have_yet_counts_as_its_default(copied):
  path = copied / 'seed=1' / 'config.json'
  fields = json.loads(path.read_text())
  del fields['faults']
  path.write_text(json.dumps(fields))
  found = runs.read([copied / 'seed=0', copied / 'seed=1'])
  assert runs.differing(found) == ['seed']
  assert [group.name for group in runs.grouped(found)] == ['hetlora']


def _rows_with(name, value):
  row = {'round': 1, name: value}
  return json.dumps(row) + '\n'


@pytest.mark.parametrize(
  'name, content',
  [
    ('config.json', '{"seed"'),
    ('config.json', '[]'),
    ('summary.json', '{"last": {}}'),
    ('metrics.jsonl', '{"round": 0\n{"round": 1}\n'),
    ('metrics.jsonl', '{"round": 0}\n3\n'),
    ('metrics.jsonl', '{"loss": 1}\n'),
    ('metrics.jsonl', _rows_with('train/loss', 'low')),
    ('metrics.jsonl', _rows_with('comm/up_bytes', 'many')),
    ('metrics.jsonl', _rows_with('train/tokens', None)),
    ('metrics.jsonl', _rows_with('rank/histogram', 'wide')),
    ('metrics.jsonl', '{"round": 1, "rank/histogram": [1]}\n'
                      '{"round": 2, "rank/histogram": [1, 2]}\n'),
    ('people.json', '{"seen": []}'),
    ('people.json', '{"seen": [3], "unseen": []}'),
    ('generations.jsonl', '{"client": 1}\n'),
    ('generations.jsonl', '\udcff\n'),
  ],
)  # fmt: skip
def test_a_damaged_file_is_named_and_nothing_written(copied, tmp_path, name, content):
  path = copied / 'seed=0' / name
  path.write_bytes(content.encode(errors='surrogateescape'))
  (tmp_path / 'page.html').write_text('of before')
  with pytest.raises(files.Damaged) as error:
    report.write([copied], tmp_path / 'page.html')
  assert str(path) in str(error.value) and '\n' not in str(error.value)
  assert (tmp_path / 'page.html').read_text() == 'of before'
  assert not list(tmp_path.glob('*.tmp'))


def test_folders_and_pages_that_cannot_be(copied, tmp_path):
  out = tmp_path / 'page.html'
  (copied / 'seed=0' / 'metrics.jsonl').unlink()
  with pytest.raises(FileNotFoundError, match='metrics.jsonl is missing'):
    report.write([copied], out)
  for folders, page, message in (
    ([tmp_path / 'nowhere'], out, 'nowhere is no folder'),
    ([copied / 'seed=1' / 'tensorboard'], out, 'holds no runs'),
    ([copied], tmp_path, 'must be a file'),
    ([copied], tmp_path / 'no' / 'page.html', 'no is no folder'),
  ):
    with pytest.raises(config.ConfigError, match=message):
      report.write(folders, page)
  assert not out.exists()


def test_the_program_writes_a_page_or_one_line(swept, tmp_path):
  out = tmp_path / 'page.html'
  done = programs.run(
    'launch.report', swept / 'seed=0', swept / 'seed=1', f'--out={out}'
  )
  assert done.returncode == 0 and 'compares 2 runs' in done.stdout
  assert '<h1>Comparison of 2 runs</h1>' in out.read_text()
  nowhere = tmp_path / 'nowhere'
  for words, why in (
    ((f'--out={out}',), 'no folder is given: name the --workdir'),
    ((swept, '--oot=x'), "flag 'oot'.*--help shows all"),
    ((nowhere, f'--out={out}'), 'nowhere is no folder'),
  ):
    refused = programs.run('launch.report', *words)
    assert refused.returncode == 2
    assert re.fullmatch(f'Error: .*{why}.*\n', refused.stderr)


@pytest.mark.parametrize(
  'low, high, whole, want',
  [
    (0, 30, True, [0, 5, 10, 15, 20, 25, 30]),
    (0, 2, True, [0, 1, 2]),
    (2.31, 6.5, False, [3, 4, 5, 6]),
    (0.0011, 0.0019, False, [0.0012, 0.0014, 0.0016, 0.0018]),
  ],
)
def test_ticks_are_round_numbers(low, high, whole, want):
  axis = charts.Axis(low, high, 0, 1)
  assert [value for _, value in axis.ticks(whole)] == pytest.approx(want)


@pytest.mark.parametrize(
  'low, high, want',
  [
    (0.5, 20_000, [1, 10, 100, 1000, 10_000]),
    (0.9, 30, [1, 2, 5, 10, 20]),
    (0.45, 0.55, [0.46, 0.48, 0.5, 0.52, 0.54]),
  ],
)
def test_log_ticks_are_powers_of_ten_or_closer(low, high, want):
  axis = charts.Axis(low, high, 0, 1, log=True)
  assert [value for _, value in axis.ticks()] == pytest.approx(want)


def _drawn(chart):
  macros = report.TEMPLATES.get_template('charts.html.j2').module
  return str(macros.draw(chart))


def test_lines_leave_out_what_is_not_finite():
  line = charts.Line('x', 0, [0, 1, 2, 3], [4.0, math.nan, math.inf, 1.0])
  drawn = _drawn(charts.lines('t', [line], 'round', 'nats', tip='{x:g} {y:g}'))
  assert 'nan' not in drawn and 'inf' not in drawn
  assert 'x: 4 at first, 1 at last.' in drawn
  log = charts.lines('t', [line], 'B', 'nats', tip='{x:g} {y:g}', log=True)
  assert _drawn(log).count('class="mark"') == 1  # 0 has no place on a log axis


def test_text_is_escaped_and_markup_is_not():
  template = report.TEMPLATES.from_string(
    '{% macro bold(x) %}<b>{{ x }}</b>{% endmacro %}'
    '<p title="{{ a }}">{{ bold(b) }}{{ b ~ bold(a) }}</p>'
  )
  assert template.render(a='"', b='<&') == (
    '<p title="&#34;"><b>&lt;&amp;</b>&lt;&amp;<b>&#34;</b></p>'
  )
  assert report.clean('a\u202eb\0c\ud800d\n\u200d') == 'a\ufffdb\ufffdc\ufffdd\n\u200d'


def test_no_template_lets_text_through_as_markup():
  for path in sorted((ROOT / 'hetlora_jax/tools/report/templates').glob('*.j2')):
    assert not re.search(r'\|\s*safe|autoescape', path.read_text()), path


def test_hostile_text_anywhere_is_text(copied, tmp_path):
  run = copied / 'seed=0'
  hostile = run.rename(copied / '<b>&"\u202e')
  _edit(hostile / 'config.json', method=HOSTILE)
  _edit(hostile / 'summary.json', command=HOSTILE, machine=HOSTILE, model=HOSTILE,
        dtype=HOSTILE, finished=HOSTILE, versions={HOSTILE: HOSTILE})  # fmt: skip
  page = _page([copied], tmp_path)
  assert not page.all('script', 'img', 'b')
  assert HOSTILE in [x.text for x in page.all('code')]
  assert '<b>&"\ufffd' in page.text and '\u202e' not in page.text
