"""The page: sections of tables and charts, whole without a script."""

from __future__ import annotations

import pathlib
import statistics
from collections.abc import Iterator, Sequence

from hetlora_jax.tools import sweep
from hetlora_jax.tools.report import charts, inside, parts, runs
from hetlora_jax.tools.report.charts import Line
from hetlora_jax.tools.report.markup import Markup, escape, join, tag
from hetlora_jax.tools.report.runs import Group, Run

MOST_SAMPLES = 24
_NONE = '–'
# Nothing but what is in the page may be loaded or run, whatever it quotes.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"


def render(found: Sequence[Run]) -> str:
  """Returns the page that compares runs."""
  groups = runs.grouped(found)
  sections = [
    ('summary', 'Summary', _summary(groups)),
    ('curves', 'Learning curves', _curves(groups)),
    ('ranks', 'Ranks', inside.ranks(groups)),
    ('energy', 'Energy per rank slot', inside.energy(groups)),
    ('people', 'Loss per person', inside.people(groups)),
    ('fields', 'What differs', _fields(found)),
    ('samples', 'Samples', _samples(found)),
    ('environment', 'Environment and commands', _environment(found)),
  ]
  links = [tag('li', tag('a', name, href=f'#{key}')) for key, name, _ in sections]
  title = f'Comparison of {parts.count(len(found), "run")}'
  body = [
    tag('header', tag('h1', title), _introduction(found)),
    tag('nav', tag('ul', *links), aria_label='Sections'),
    tag(
      'main',
      *[
        tag('section', tag('h2', name, id=f'{key}-title'), content, id=key,
            aria_labelledby=f'{key}-title')
        for key, name, content in sections
      ],
    ),
  ]  # fmt: skip
  css = (pathlib.Path(__file__).parent / 'report.css').read_text()
  return (
    '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
    f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
    '<meta name="viewport" content="width=device-width, initial-scale=1">'
    '<meta name="color-scheme" content="light dark">'
    f'<link rel="icon" href="data:,">{tag("title", title)}'
    f'<style>\n{css}</style></head>\n{tag("body", *body)}</html>\n'
  )


def _introduction(found: Sequence[Run]) -> Markup:
  model = parts.said(run.fields.get('model.source') for run in found)
  data = parts.said(run.fields.get('data.name') for run in found)
  left = sum(not run.finished for run in found)
  text = f'{parts.said(r.fields.get("method") for r in found)}: {model} on {data}.'
  if left:
    text += f' {parts.count(left, "run")} unfinished: shown as far as they got.'
  return tag('p', text)


def _unfinished(run: Run) -> str:
  done = run.rows[-1]['round'] if run.rows else 0
  return f'unfinished: {done} of {run.fields.get("federated.num_rounds")} rounds'


def _counted(group: Group) -> list[Run]:
  """Returns the runs that a mean is of: the finished ones, if there are any."""
  started = [run for run in group.runs if 'last' in run.summary]
  return [run for run in started if run.finished] or started


def _progress(counted: Sequence[Run], name: str, digits: int) -> str:
  first, last = (
    sweep.spread([run.summary[when][name] for run in counted], digits)
    for when in ('first', 'last')
  )
  return f'{first} → {last}'


def _summary_row(number: int, group: Group) -> Iterator[object]:
  counted = _counted(group)
  marks = [
    tag('li', run.name, *(
      [] if run.finished else [' ', tag('em', _unfinished(run))]
    ))
    for run in group.runs
  ]  # fmt: skip
  method = parts.said(run.fields.get('method') for run in group.runs)
  seeds = f'{method}, {len(counted)} of {parts.count(len(group.runs), "seed")}'
  yield join([
    parts.named(number, group), tag('small', seeds),
    tag('ul', *marks, class_='folders'),
  ])  # fmt: skip
  if not counted:
    yield from [_NONE] * 7
    return
  for who in runs.KINDS:
    yield join([
      _progress(counted, f'eval/{who}/loss', 3),
      tag('small', 'perplexity ',
          _progress(counted, f'eval/{who}/perplexity', 2)),
    ])  # fmt: skip

  def mean(name):
    return statistics.mean(run.summary[name] for run in counted)

  yield sweep.size(mean('comm/up_bytes'))
  yield sweep.size(mean('comm/down_bytes'))
  yield sweep.size(mean('train/parameters'))
  yield f'{mean("aggregation/error"):.3f}'
  yield f'{mean("time/rounds_s"):.0f}'


def _summary(groups: Sequence[Group]) -> Markup:
  heads = (
    'runs', 'loss, seen people', 'loss, unseen people', 'bytes up',
    'bytes down', 'trained parameters',
    'aggregation error', 'seconds in rounds',
  )  # fmt: skip
  note = (
    'Held-out loss is in nats a target token, before the first round → after '
    'the last. Runs that differ in the seed alone are one row, mean ± standard '
    'deviation; where some are finished, only those are counted. Bytes '
    'are of all rounds; trained parameters are a client’s mean.'
  )
  rows = [list(_summary_row(i, group)) for i, group in enumerate(groups)]
  return join([tag('p', note), parts.table('Results of the runs', heads, rows)])


# What a learning curve is drawn against: columns that are summed, unit, title.
_AGAINST = {
  'rounds': ((), 1, 'round'),
  'bytes': (('comm/up_bytes', 'comm/down_bytes'), 1e6, 'megabytes up and down'),
  'tokens': (('train/tokens',), 1e3, 'thousand target tokens trained on'),
}


def _curve(number: int, group: Group, name: str, against: str) -> Line:
  """Returns the mean of a group's runs and one standard deviation around it."""
  rounds, mean, deviation, count = runs.mean(group, name)
  columns, unit, _ = _AGAINST[against]
  sums = [runs.until(run.rows, columns) for run in group.runs]
  x = [
    statistics.mean(s[r] for s in sums if r in s) / unit if columns else r
    for r in rounds
  ]
  if max(count, default=0) < 2:
    return Line(group.name, number, x, mean)
  return Line(group.name, number, x, mean, mean - deviation, mean + deviation)


def _is_wide(drawn: Sequence[Line]) -> bool:
  """Tells whether the ends of lines are too far apart for a linear axis."""
  ends = [line.x[-1] for line in drawn if len(line.x) and line.x[-1] > 0]
  return bool(ends) and max(ends) > 4 * min(ends)


def _learning(groups: Sequence[Group], name: str, what: str, against: str):
  drawn = [_curve(i, group, name, against) for i, group in enumerate(groups)]
  log = against != 'rounds' and _is_wide(drawn)
  title = f'{what} against {against}'
  x_title = _AGAINST[against][2] + ' (log scale)' * log
  chart = charts.lines(
    title, drawn, x_title, 'nats a target token',
    tip='{y:.4g} at {x:.4g}', log=log, whole=against == 'rounds',
  )  # fmt: skip
  return parts.figure(f'Against {against}' + ', what is at 0 left out' * log, chart)


def _curves(groups: Sequence[Group]) -> Markup:
  pieces = [parts.legend(groups)]
  for who in runs.KINDS:
    what = f'Held-out loss, {who} people'
    name = f'eval/{who}/loss'
    pieces += [
      tag('h3', what),
      tag('div', *[_learning(groups, name, what, x) for x in _AGAINST],
          class_='charts'),
    ]  # fmt: skip
  what = 'Training loss of the cohorts'
  figures = [_learning(groups, 'train/loss', what, x) for x in _AGAINST]
  pieces += [tag('h3', what), tag('div', *figures, class_='charts')]
  if any(len(group.runs) > 1 for group in groups):
    pieces.append(tag('p', 'Lines are means of the seeds that got so far, bands '
                     'one standard deviation to either side.'))  # fmt: skip
  return join([*pieces, _numbers(groups)])


def _numbers(groups: Sequence[Group]) -> Markup:
  """Returns the curves of held-out loss as a table, to be unfolded."""
  heads = ['runs', 'round', *[f'{who} people' for who in runs.KINDS]]
  rows = []
  for group in groups:
    seen, unseen = (runs.mean(group, f'eval/{w}/loss') for w in runs.KINDS)
    for r, a, b in zip(seen[0], seen[1], unseen[1], strict=True):
      rows.append([group.name, r, f'{a:.4f}', f'{b:.4f}'])
  caption = 'Held-out loss at every evaluation, in nats a target token'
  return tag(
    'details', tag('summary', 'The numbers'), parts.table(caption, heads, rows)
  )


def _fields(found: Sequence[Run]) -> Markup:
  names = runs.differing(found)
  if not names:
    return tag('p', 'All fields of the configurations are the same.')
  cells = [[str(run.fields.get(name, _NONE)) for name in names] for run in found]
  folders = [run.name for run in found]
  heads, rows = ['run', *names], [
    [folder, *row] for folder, row in zip(folders, cells, strict=True)
  ]  # fmt: skip
  if len(names) > len(found):  # the fewer are the columns
    heads, rows = ['field', *folders], [
      [name, *column] for name, *column in zip(names, *cells, strict=True)
    ]  # fmt: skip
  return parts.table('Fields of the configurations that differ', heads, rows)


def _quote(text: object) -> Markup:
  return tag('blockquote', text, dir='auto')


def _sample(number: int, of_runs: Sequence[tuple[Run, dict]]) -> Markup:
  first = of_runs[0][1]
  said = [
    tag('div', tag('h4', run.name), _quote(line['generated'])) for run, line in of_runs
  ]
  return tag(
    'article',
    tag('h3', f'{number}. Person {first["client"]} ({first["kind"]})'),
    tag('h4', 'Prompt'), _quote(first['prompt']),
    tag('h4', 'What the person said'), _quote(first['reference']),
    tag('div', *said, class_='beside'),
  )  # fmt: skip


def _samples(found: Sequence[Run]) -> Markup:
  by_prompt: dict[tuple, list] = {}
  for run in found:
    for line in run.samples or ():
      key = tuple(line[n] for n in ('client', 'kind', 'prompt', 'reference'))
      by_prompt.setdefault(key, []).append((run, line))
  if not by_prompt:
    return tag('p', 'No run has a generations.jsonl: python -m launch.evaluate '
               '--generate writes one.')  # fmt: skip
  # Those that most runs have come first.
  shown = sorted(by_prompt.values(), key=len, reverse=True)[:MOST_SAMPLES]
  pieces = [_sample(i, x) for i, x in enumerate(shown, 1)]
  if len(by_prompt) > len(shown):
    pieces.append(tag('p', f'{len(by_prompt) - len(shown)} more are left out.'))
  return join(pieces)


def _environment(found: Sequence[Run]) -> Markup:
  rows = []
  for run in found:
    s = run.summary
    versions = s.get('versions')
    versions = versions if isinstance(versions, dict) else {}
    peak = s.get('memory/host_peak_mb')
    rows.append([
      run.name,
      s.get('finished', _NONE) if run.finished else _unfinished(run),
      s.get('machine', _NONE),
      ', '.join(f'{k} {v}' for k, v in versions.items()) or _NONE,
      f'{s.get("model", run.fields["model.source"])} in {s.get("dtype", _NONE)}',
      f'{peak:.0f}' if isinstance(peak, float) else _NONE,
    ])  # fmt: skip
  heads = ('run', 'ended', 'machine', 'versions', 'model', 'host memory, MB')
  commands = []
  for run in found:
    command = run.summary.get('command') or 'not known until the run has ended'
    commands += [
      tag('h3', run.name, class_='folder'),
      tag('pre', tag('code', command), tabindex=0, role='group',
          aria_label=f'Command of {escape(run.name)}'),
    ]  # fmt: skip
  return join([parts.table('Where the runs were made', heads, rows), *commands])
