"""The pictures of docs/concepts.md as SVG: python docs/pictures.py FOLDER.

Ink follows the page that a picture stands in, light or dark; colours of clients are
legible on both.
"""

import pathlib
import sys

SLOTS, STEP, LONG = 8, 9, 58  # rank slots, their pitch, the length of a factor
INK = 'var(--md-typeset-color, #555)'
COLOURS = ('#5c6bc0', '#26a69a', '#ef6c00')  # of clients
SERVER = '#888888'
GONE = '#e53935'


def _text(x, y, words, size=13, anchor='middle', weight='normal', colour=INK):
  return (
    f'<text x="{x}" y="{y}" font-size="{size}" text-anchor="{anchor}" '
    f'font-weight="{weight}" fill="{colour}">{words}</text>'
  )


def _slot(x, y, width, height, colour, share, outline=''):
  return (
    f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="1.5" '
    f'fill="{colour}" fill-opacity="{share}" stroke="{colour}"{outline}/>'
  )


def adapter(x, y, colour, rank, tail=0, gone=0):
  """Draws A, columns, beside B, rows: filled slots, a tail, slots given up."""
  out = []
  for slot in range(SLOTS):
    owned = slot < rank
    in_tail = rank - tail <= slot < rank
    given_up = rank <= slot < rank + gone
    share = 0.3 if in_tail else 0.85 if owned else 0
    outline = '' if owned else ' stroke-dasharray="2 2"'
    outline += '' if owned or given_up else ' stroke-opacity="0.6"'
    tint = GONE if given_up else colour
    across = slot * STEP
    out += [
      _slot(x + across, y, STEP - 2, LONG, tint, share, outline),
      _slot(x + SLOTS * STEP + 8, y + across, LONG, STEP - 2, tint, share, outline),
    ]
  return ''.join(out)


WIDE = SLOTS * STEP + 8 + LONG  # an adapter's width


def _arrow(x0, y0, x1, y1, width=1.5):
  return (
    f'<path d="M{x0} {y0} L{x1} {y1}" stroke="{INK}" stroke-width="{width}" '
    'fill="none" marker-end="url(#head)"/>'
  )


def _picture(width, height, title, *parts):
  return (
    f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
    f'width="{width}" role="img" font-family="sans-serif"><title>{title}</title>'
    '<defs><marker id="head" viewBox="0 0 8 8" refX="7" refY="4" '
    'markerUnits="userSpaceOnUse" markerWidth="10" markerHeight="10" orient="auto">'
    f'<path d="M0 0 L8 4 L0 8 z" fill="{INK}"/></marker></defs>'
    f'{"".join(parts)}</svg>'
  )


def round_():
  """The server, three clients of ranks 2, 5 and 8, and the three steps."""
  parts = [
    _text(75, 128, 'server', weight='bold'),
    adapter(6, 140, SERVER, SLOTS),
    _text(75, 230, 'global adapter A B,', 12),
    _text(75, 246, f'{SLOTS} rank slots', 12),
    _text(258, 20, '1  receive a truncation', weight='bold'),
    _text(478, 20, '2  train, self-prune', weight='bold'),
    _text(700, 20, '3  weigh, aggregate', weight='bold'),
    adapter(700 - WIDE / 2, 140, SERVER, SLOTS),
    _text(700, 128, 'server', weight='bold'),
    _text(700, 230, 'weighted mean, where', 12),
    _text(700, 246, 'weights follow ‖BA‖', 12),
  ]
  for i, (rank, kept, weight) in enumerate(((2, 2, 1), (5, 4, 2.5), (8, 8, 5))):
    y = 40 + 115 * i
    pruned = f'rank {kept}: pruned' if kept < rank else f'rank {kept}'
    parts += [
      _arrow(152, 170, 182, y + 30),
      adapter(190, y, COLOURS[i], rank),
      _text(258, y + 90, f'client of rank {rank}', 12),
      _arrow(338, y + 30, 402, y + 30),
      adapter(410, y, COLOURS[i], kept, gone=rank - kept),
      _text(478, y + 90, pruned, 12),
      _arrow(556, y + 30, 622, 170, weight),
    ]
  return _picture(780, 370, 'One round: distribute, train, aggregate', *parts)


def truncate():
  """A client of rank 3 gets the first three slots of both factors."""
  return _picture(
    520, 130, 'Distribution by truncation',
    adapter(20, 30, SERVER, SLOTS), _text(90, 20, 'A and B of the server'),
    _arrow(180, 60, 300, 60), _text(240, 50, 'r = 3'),
    adapter(320, 30, COLOURS[0], 3), _text(390, 20, 'what the client gets'),
    _text(390, 122, 'the other slots are zero in both factors', 12),
  )  # fmt: skip


def prune():
  """The tail [gamma r, r) is penalised, and given up once it has shrunk."""
  return _picture(
    740, 140, 'Rank self-pruning',
    adapter(20, 30, COLOURS[1], 6, tail=2), _text(90, 20, 'received: r = 6'),
    _text(90, 125, 'pale: the tail, slots from γr to r', 12),
    _arrow(180, 60, 280, 60), _text(230, 50, 'train'),
    adapter(300, 30, COLOURS[1], 6, tail=2),
    _text(370, 20, 'is the tail smaller now?'),
    _arrow(460, 60, 560, 60), _text(510, 50, 'yes'),
    adapter(580, 30, COLOURS[1], 4, gone=2), _text(650, 20, 'rank γr = 4'),
    _text(650, 125, 'red: given up', 12, colour=GONE),
  )  # fmt: skip


def aggregate():
  """Clients weigh by the norm of what they learnt; empty slots count as zero."""
  parts = []
  for i, (rank, share) in enumerate(((2, 0.15), (4, 0.3), (8, 0.55))):
    y = 30 + 85 * i
    parts += [
      adapter(20, y, COLOURS[i], rank),
      _slot(185, y + 20, 160 * share, 16, COLOURS[i], 0.85),
      _text(190 + 160 * share, y + 33, f'{share}', 12, 'start'),
      _arrow(330, y + 29, 420, 145),
    ]
  return _picture(
    620, 290, 'Sparsity-weighted aggregation',
    _text(90, 20, 'zero-padded factors'), _text(250, 20, 'weight ∝ ‖BA‖'),
    *parts, adapter(435, 115, SERVER, SLOTS), _text(505, 105, 'their mean'),
  )  # fmt: skip


PICTURES = {
  'round': round_,
  'truncate': truncate,
  'prune': prune,
  'aggregate': aggregate,
}


def draw(name: str) -> str:
  """Returns a picture as SVG on one line."""
  return PICTURES[name]()


if __name__ == '__main__':
  folder = pathlib.Path(sys.argv[1])
  folder.mkdir(parents=True, exist_ok=True)
  for name in PICTURES:
    (folder / f'{name}.svg').write_text(draw(name) + '\n')
