"""Draws README's two pictures, a round and a result: python -m benchmarks.pictures.

Each is written into docs/assets/ in ink for light and for dark pages. The result is
that of the study (docs/results/raw): how far the loss of people never trained on ends
from HetLoRA's, with 95 % intervals, and what each method sent for it. With --smoke
nothing is written: the pictures must be those that are there.
"""

import pathlib
from collections.abc import Iterator

from benchmarks import machine, study_stats
from benchmarks import study as runner
from benchmarks.study_stats import OURS, Arm
from docs import pictures
from docs.pictures import INK

FOLDER = machine.ROOT / 'docs' / 'assets'
RAW = machine.ROOT / 'docs' / 'results' / 'raw'
INKS = {'light': '#1f2328', 'dark': '#d1d7e0'}
OURS_COLOUR, OTHERS_COLOUR = '#ef6c00', '#5c6bc0'
# An arm of each kind; docs/results.md has all of them.
ARMS = {
  'LoRA r = 5, uniform weights': 'LoRA, rank 5, clients alike',
  OURS: 'HetLoRA, ranks 5 to 50',
  'LoRA r = 5': 'LoRA, rank 5',
  'full fine-tuning': 'full fine-tuning',
  'Recon+SVD': 'FlexLoRA',
  'FLoRA': 'FLoRA',
  'LoRA r = 50': 'LoRA, rank 50',
  'RBLA': 'RBLA',
}
TITLES = {'chat': 'chats', 'mail': "mails' subject lines"}
WIDTH, HEIGHT, TOP, ROW = 860, 330, 62, 28
PANELS = {'chat': 215, 'mail': 545}  # where the panel of a task begins
PANEL, LOW, HIGH = 200, -0.04, 0.16  # its width, and nats at its ends


def _text(x, y, words, anchor='start', weight='normal') -> str:
  return (
    f'<text x="{x}" y="{y}" text-anchor="{anchor}" font-weight="{weight}" '
    f'fill="{INK}">{words}</text>'
  )


def _line(x0, y0, x1, y1, colour, rest) -> str:
  return f'<path d="M{x0} {y0} L{x1} {y1}" stroke="{colour}" {rest}/>'


def _across(start: int, nats: float) -> int:
  """Returns where a number of nats lies in a panel."""
  return round(start + PANEL * (nats - LOW) / (HIGH - LOW))


def _sent(arm: Arm) -> str:
  """Returns what all clients sent and received in all rounds."""
  megabytes = (arm.curve('up_bytes')[-1] + arm.curve('down_bytes')[-1]) / 1e6
  return f'{megabytes / 1e3:.0f} GB' if megabytes > 1e4 else f'{megabytes:,.0f} MB'


def _axis(start: int, title: str) -> Iterator[str]:
  """Yields a panel's title, its ticks and the line of HetLoRA."""
  bottom = TOP + ROW * len(ARMS)
  yield _text(start, 20, title, weight='bold')
  yield _text(start + PANEL + 95, 40, 'sent', 'end')
  for nats in (0, 0.05, 0.1, 0.15):
    x = _across(start, nats)
    width = 'stroke-width="1.2"' if nats == 0 else 'stroke-opacity="0.2"'
    yield _line(x, TOP - 12, x, bottom - 10, INK, width)
    yield _text(x, bottom + 8, f'{nats:+.2f}' if nats else '0', 'middle')


def _rows(start: int, found: dict[str, Arm]) -> Iterator[str]:
  """Yields a dot, its interval and the bytes of every arm."""
  for i, name in enumerate(ARMS):
    gap, y = study_stats.gap(found[name], found[OURS], 'unseen'), TOP + ROW * i
    colour = OURS_COLOUR if name == OURS else OTHERS_COLOUR
    low, middle, high = (_across(start, n) for n in (gap.low, gap.value, gap.high))
    yield _line(low, y, high, y, colour, 'stroke-width="3" stroke-linecap="round"')
    yield f'<circle cx="{middle}" cy="{y}" r="6" fill="{colour}"/>'
    yield _text(start + PANEL + 95, y + 5, _sent(found[name]), 'end')


def result() -> str:
  """Returns the picture of a result as SVG."""
  parts = []
  for task, start in PANELS.items():
    parts += _axis(start, TITLES[task])
    parts += _rows(start, study_stats.arms(runner.load(RAW, task)))
  for i, (name, label) in enumerate(ARMS.items()):
    weight = 'bold' if name == OURS else 'normal'
    parts.append(_text(0, TOP + ROW * i + 5, label, weight=weight))
  below = 'loss above HetLoRA, people never trained on (nats a token, 95 % intervals)'
  parts.append(_text(PANELS['chat'], HEIGHT - 8, below))
  return (
    f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
    f'width="{WIDTH}" role="img" font-family="sans-serif" font-size="14">'
    f'<title>Held-out loss and bytes of each method</title>{"".join(parts)}</svg>'
  )


def drawn() -> dict[pathlib.Path, str]:
  """Returns every picture's file and what it should hold."""
  drawings = {'round': pictures.draw('round'), 'result': result()}
  return {
    FOLDER / f'{name}_{theme}.svg': drawing.replace(INK, ink) + '\n'
    for name, drawing in drawings.items()
    for theme, ink in INKS.items()
  }


def main() -> None:
  FOLDER.mkdir(exist_ok=True)
  for path, text in drawn().items():
    name = path.relative_to(machine.ROOT)
    if not machine.smoke():
      path.write_text(text)
      print(f'{name} is drawn.')
    elif not path.exists() or path.read_text() != text:
      raise ValueError(f'{name} is not what the study gives: benchmarks.pictures.')


if __name__ == '__main__':
  machine.start(main)
