"""Our generation against transformers' `generate`, both with a KV cache.

python -m benchmarks.generation --peers_python=.venv-bench/bin/python \
  [--config=configs/chitchat_gemma3.py] [--rows=16] [--new_tokens=32]

The same float32 weights, threads and held-out prompts, greedy, and exactly so
many new tokens, reading the prompts included; one after the other in turn. Also
compares the tokens, and the base's perplexity of the prompts' own completions.
"""

import math
import os
import pathlib
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from benchmarks import child, machine, work
from hetlora_jax import config, formats, points
from hetlora_jax.data import packing
from hetlora_jax.data.people import Example, Population, evenly_spaced
from hetlora_jax.models import readout
from hetlora_jax.tools import generation

machine.define_config()
_ROWS = flags.DEFINE_integer('rows', 16, 'Prompts at once.', 1)
_NEW_TOKENS = flags.DEFINE_integer('new_tokens', 32, 'Of each.', 1)
_MOST_APART = 0.005  # of the perplexities
_LEAST_EQUAL = 0.95  # of the tokens; one near tie changes all that follow


def texts(people: Population, count: int, most: int) -> list[Example]:
  """Returns a held-out example of each of so many people, the shorter ones."""
  group, out = people.groups['heldout'], []
  for person in evenly_spaced(len(group.ids), len(group.ids)):
    example = people.example('heldout', int(person), 0)
    if len(example.tokens) <= most:
      out.append(example)
  if len(out) < count:
    raise ValueError(f'--rows={count} exceeds the {len(out)} people: lower it.')
  return [out[i] for i in evenly_spaced(len(out), count)]


class Ours:
  """Our model, its programs compiled once."""

  def __init__(self, files: pathlib.Path, chosen: list[Example], new_tokens: int):
    # From the files themselves, as the peer: not rounded to bfloat16.
    model = formats.load(files, dtype=np.float32, cached=False)
    self.config = model.config
    self.params = jax.tree.map(jnp.asarray, model.params)
    self.chosen, self.new_tokens = chosen, new_tokens
    self.never = np.zeros(model.config.vocab_size, bool)
    self.generate = jax.jit(
      generation.make_generate(model.config, jnp.float32, max_tokens=new_tokens)
    )

  def __call__(self) -> dict:
    start = time.perf_counter()
    prompts = [e.tokens[: -e.num_target] for e in self.chosen]
    packed = generation.pack(prompts, max(map(len, prompts)))
    out = self.generate(self.params, {}, jnp.float32(1), packed, self.never)
    tokens = jax.device_get(out.tokens)
    return {
      'seconds': time.perf_counter() - start,
      'tokens': tokens.tolist(),
      'peak_mb': machine.peak_mb(),
    }

  def loss(self) -> float:
    """Sums the losses of the targets."""
    length = max(len(e.tokens) for e in self.chosen)
    targets = sum(e.num_target for e in self.chosen)
    batch = packing.pack(
      self.chosen, packing.BatchShape(len(self.chosen), length, targets)
    )
    loss = jax.jit(readout.make_loss(self.config, jnp.float32, False))
    return float(loss(self.params, {}, jnp.float32(1), batch)[0])


def _share_equal(ours: list, theirs: list) -> float:
  return float((np.array(ours) == np.array(theirs)).mean())


def alternate(ours: Ours, peer: child.Peer | None) -> list[dict]:
  """Times both in turn, after a run of each that compiles or loads."""
  ask, rounds = {'new_tokens': ours.new_tokens}, []
  count = len(ours.chosen) * ours.new_tokens
  for i in range(machine.repeats() + 1):
    answers = {'ours': ours()} | ({'transformers': peer(ask)} if peer else {})
    tokens = [a.pop('tokens') for a in answers.values()]
    equal = _share_equal(tokens[0], tokens[-1])
    if equal < _LEAST_EQUAL:
      raise ValueError(f'not the same work: {equal:.1%} of the tokens agree.')
    for a in answers.values():
      a['tokens_per_s'] = count / a['seconds']
    if i:
      rounds.append(answers | {'equal_tokens': equal})
      rates = [f'{k} {a["tokens_per_s"]:.1f}' for k, a in answers.items()]
      print(', '.join(rates), 'tokens/s', flush=True)
  return rounds


def perplexities(ours: Ours, peer: child.Peer | None) -> dict[str, float]:
  """Returns both of the base; raises ValueError if they are apart."""
  targets = sum(e.num_target for e in ours.chosen)
  losses = {'ours': ours.loss()}
  if peer:
    losses['transformers'] = peer({'new_tokens': 0})['loss']
  found = {who: math.exp(x / targets) for who, x in losses.items()}
  values = list(found.values())
  if abs(values[0] / values[-1] - 1) > _MOST_APART:
    raise ValueError(f'perplexities of the base are apart: {found}.')
  return found


def measure() -> dict:
  """Times both on the same prompts; see the module."""
  if child.PEERS.value:
    child.check()
  x = points.prepare(config.resolve(machine.config()))
  rows, new_tokens = _ROWS.value, _NEW_TOKENS.value
  if machine.smoke():
    rows, new_tokens = 3, 4
  chosen = texts(x.experiment.population, rows, x.config.data.row_tokens)
  with work.model_files(x) as files:
    ours = Ours(files, chosen, new_tokens)
    peer = None
    if child.PEERS.value:
      peer = child.Peer('peer_generate.py', {
        'model': str(files.resolve()), 'threads': os.cpu_count(),
        'texts': [
          {'tokens': e.tokens.tolist(), 'num_target': e.num_target}
          for e in chosen
        ],
      })  # fmt: skip
    perplexity = perplexities(ours, peer)
    print('perplexity of the base:', perplexity, flush=True)
    rounds = alternate(ours, peer)
    if peer:
      peer.close()
  return {
    'ratios': [
      r['ours']['tokens_per_s'] / r['transformers']['tokens_per_s']
      for r in rounds if peer
    ],
    'perplexity': perplexity, 'model': x.config.model.source, 'rows': rows,
    'new_tokens': new_tokens,
    'longest_prompt': max(len(e.tokens) - e.num_target for e in chosen),
    'dtype': 'float32', 'rounds': rounds,
  }  # fmt: skip


def report(result: dict) -> str:
  """Tells rates, memory and perplexities."""
  rows = [
    [
      who,
      f'{statistics.median(r[who]["tokens_per_s"] for r in result["rounds"]):.1f}',
      f'{max(r[who]["peak_mb"] for r in result["rounds"]) / 1e3:.1f}',
      f'{value:.3f}',
    ]
    for who, value in result['perplexity'].items()
  ]
  head = f'{result["model"]} in {result["dtype"]} | tokens/s | GB | perplexity'
  equal = statistics.mean(r['equal_tokens'] for r in result['rounds'])
  each = result['ratios']
  faster = (
    f'Ours is **{statistics.median(each):.2f}x** as fast ({min(each):.2f} to '
    f'{max(each):.2f}); {equal:.1%} of the tokens are the same. '
    if each
    else ''
  )
  return (
    f'{machine.table(head, rows)}\n\n{faster}{result["rows"]} prompts at once '
    f'of up to {result["longest_prompt"]} tokens, {result["new_tokens"]} new '
    f'tokens each. {machine.told(result["machine"])}.'
  )


if __name__ == '__main__':
  machine.run('generation', measure, report)
