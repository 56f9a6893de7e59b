"""Our generation against transformers' `generate`, both with kept keys.

python -m benchmarks.generation --peers_python=.venv-bench/bin/python \
  [--config=configs/chitchat_gemma3.py] [--rows=16] [--new_tokens=32]

The same float32 weights, threads and held-out prompts, greedy, and exactly so
many new tokens, reading the prompts included; one after the other in turn. Also
compares the tokens, and the base's perplexity of the prompts' own completions.
Prints a table and writes benchmarks/results/generation.json.
"""

import math
import os
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from benchmarks import child, machine
from hetlora_jax import config, experiment
from hetlora_jax.data import packing
from hetlora_jax.data.people import Example, People, evenly_spaced
from hetlora_jax.evaluation import generation
from hetlora_jax.models import pretrained, readout
from hetlora_jax.models.pretrained import sources

_CONFIG = machine.define_config()
_ROWS = flags.DEFINE_integer('rows', 16, 'Prompts at once.', 1)
_NEW_TOKENS = flags.DEFINE_integer('new_tokens', 32, 'Of each.', 1)
_REPEATS = flags.DEFINE_integer('repeats', 5, 'Runs of each, in turn.', 1)
_OUT = flags.DEFINE_string(
  'out', 'benchmarks/results/generation.json', 'Result.'
)
_MOST_APART = 0.005  # of the perplexities
_LEAST_EQUAL = 0.95  # of the tokens; one near tie changes all that follow


def texts(people: People, count: int, most: int) -> list[Example]:
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

  def __init__(self, source: str, chosen: list[Example], new_tokens: int):
    # From the source itself, as the peer: not rounded to bfloat16.
    model = pretrained.load(source, dtype=np.float32, cached=False)
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
    batch = packing.pack(self.chosen, len(self.chosen), length, targets)
    loss = jax.jit(readout.make_loss(self.config, jnp.float32, False))
    return float(loss(self.params, {}, jnp.float32(1), batch)[0])


def _share_equal(ours: list, theirs: list) -> float:
  return float((np.array(ours) == np.array(theirs)).mean())


def alternate(ours: Ours, peer: child.Peer) -> list[dict]:
  """Times both in turn, after a run of each that compiles or loads."""
  ask, rounds = {'new_tokens': ours.new_tokens}, []
  count = len(ours.chosen) * ours.new_tokens
  for i in range(_REPEATS.value + 1):
    answers = {'ours': ours(), 'transformers': peer(ask)}
    equal = _share_equal(*[a.pop('tokens') for a in answers.values()])
    if equal < _LEAST_EQUAL:
      raise ValueError(f'not the same work: {equal:.1%} of the tokens agree.')
    for a in answers.values():
      a['tokens_per_s'] = count / a['seconds']
    if i:
      rounds.append(answers | {'equal_tokens': equal})
      rates = [f'{k} {a["tokens_per_s"]:.1f}' for k, a in answers.items()]
      print(', '.join(rates), 'tokens/s', flush=True)
  return rounds


def perplexities(ours: Ours, peer: child.Peer) -> dict[str, float]:
  """Returns both of the base; raises ValueError if they are apart."""
  targets = sum(e.num_target for e in ours.chosen)
  theirs = peer({'new_tokens': 0})['loss']
  found = {
    'ours': math.exp(ours.loss() / targets),
    'transformers': math.exp(theirs / targets),
  }
  if abs(found['ours'] / found['transformers'] - 1) > _MOST_APART:
    raise ValueError(f'perplexities of the base are apart: {found}.')
  return found


def main() -> None:
  child.check()
  x = experiment.prepare(config.resolve(_CONFIG.value))
  source, people = x.config.model.source, x.people
  most = x.config.data.row_tokens
  del x
  chosen = texts(people, _ROWS.value, most)
  work = {
    'gguf': str(sources.resolve(source).path.resolve()),
    'threads': os.cpu_count(),
    'texts': [
      {'tokens': e.tokens.tolist(), 'num_target': e.num_target} for e in chosen
    ],
  }
  ours = Ours(source, chosen, _NEW_TOKENS.value)
  peer = child.Peer('peer_generate.py', work)
  perplexity = perplexities(ours, peer)
  print('perplexity of the base:', perplexity, flush=True)
  rounds = alternate(ours, peer)
  peer.close()
  ratio = statistics.median(
    r['ours']['tokens_per_s'] / r['transformers']['tokens_per_s']
    for r in rounds
  )
  result = {
    'tokens_ratio_vs_transformers': ratio, 'perplexity': perplexity,
    'model': source, 'rows': _ROWS.value, 'new_tokens': _NEW_TOKENS.value,
    'longest_prompt': max(len(e.tokens) - e.num_target for e in chosen),
    'dtype': 'float32', 'machine': machine.describe(), 'rounds': rounds,
  }  # fmt: skip
  machine.write(_OUT.value, result)
  print(f'\n{"":<14}{"tokens/s":>10}{"peak MB":>9}{"perplexity":>12}')
  for who, value in perplexity.items():
    rate = statistics.median(r[who]['tokens_per_s'] for r in rounds)
    memory = max(r[who]['peak_mb'] for r in rounds)
    print(f'{who:<14}{rate:>10.1f}{memory:>9.0f}{value:>12.3f}')
  equal = statistics.mean(r['equal_tokens'] for r in rounds)
  print(f'ours is {ratio:.2f}x; {equal:.1%} of the tokens are the same')


if __name__ == '__main__':
  machine.run(main)
