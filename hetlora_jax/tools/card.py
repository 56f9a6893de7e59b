"""The model card of an exported adapter: README.md, as the Hugging Face Hub reads it."""

import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from hetlora_jax import base_model
from hetlora_jax.config import Config
from hetlora_jax.methods.registry import METHODS
from hetlora_jax.types import Row

NAME = 'README.md'
CARD = """---
{front}
---

# {title}

A LoRA adapter of `{source}`: {of_whom}.
It was trained by federated learning, which hetlora_jax simulated.

| what | value |
|---|---|
{table}

## What it gains

{evaluation}

## Use

```python
{code}
```

## Limits

- It adds to this base model alone{fingerprint}.
- No licence is stated here: the terms of the base model and of the data apply.
- Nothing was done to hide the texts that it was trained on: expect that parts of them can
  be had from it.
- Only the figures above were measured. Whether what it writes is true, useful or harmless
  was not.
"""

LOADS = """import transformers
from peft import PeftModel

base = transformers.AutoModelForCausalLM.from_pretrained({base})
model = PeftModel.from_pretrained(base, '.')  # this folder
tokenizer = transformers.AutoTokenizer.from_pretrained({base})
inputs = tokenizer('Hello', return_tensors='pt')
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=16)[0]))"""


class Base(NamedTuple):
  """What transformers loads as the base model."""

  name: str  # of the Hub, of a file or folder, or random weights
  revision: str | None = None  # of the Hub


def write(
  path: pathlib.Path,
  config: Config,
  base: Base,
  fingerprint: str,
  about: Mapping[str, Any],
  rows: Sequence[Row],
  of_whom: str,
) -> None:
  """Writes the card of a run's adapter.

  Args:
    path: of the file.
    config: the run's.
    base: what transformers loads the base model from.
    fingerprint: of the base model, its SHA-256 where it was read.
    about: what the export tells of itself.
    rows: of metrics.jsonl, up to the round of the checkpoint.
    of_whom: which adapter it is, '' for the whole global one.
  """
  drawn = base_model.is_random(base.name)
  on_hub = not drawn and not pathlib.Path(base.name).is_absolute()
  front = {'base_model': base.name, 'base_model_relation': 'adapter'} if on_hub else {}
  front |= {
    'library_name': 'peft', 'pipeline_tag': 'text-generation',
    'tags': ['lora', 'federated-learning', 'hetlora_jax'],
  }  # fmt: skip
  text = CARD.format(
    # JSON is YAML, whatever a path is made of.
    front='\n'.join(f'{key}: {json.dumps(value)}' for key, value in front.items()),
    title=f'{config.method} on {config.data.name}',
    source=base.name,
    of_whom=of_whom or 'the global one of all clients',
    table='\n'.join(f'| {k} | {v} |' for k, v in _facts(config, about).items()),
    evaluation=_evaluation(rows, of_whom),
    code=LOADS.format(base=_loaded_from(base)),
    fingerprint='' if drawn else f', whose SHA-256 here is `{fingerprint[:16]}...`',
  )
  path.write_text(text)


def _loaded_from(base: Base) -> str:
  """Returns the arguments of `from_pretrained` for a base model."""
  path = pathlib.Path(base.name)
  if base_model.is_random(base.name):
    return repr('what --format=base wrote')
  if path.suffix == '.gguf':
    return f'{str(path.parent)!r}, gguf_file={path.name!r}'
  if base.revision:
    return f'{base.name!r}, revision={base.revision!r}'
  return repr(base.name)


def _facts(c: Config, about: Mapping[str, Any]) -> dict[str, str]:
  """Returns what was trained, how, and what of it is here."""
  f, o, sent = c.federated, c.client_optimizer, c.communication
  low, high = about['rank_min'], about['rank_max']
  whole = 'all slots' in c.traits
  lost = about.get('truncation_error')
  folded = {} if lost is None else {
    'what was folded into the base': f'is part of it; {lost:.1g} of a norm is lost at most'
  }  # fmt: skip
  return {
    'method': f'`{c.method}` ({METHODS[c.method].citation})',
    'rounds': f'{about["round"]}, of {f.clients_per_round} clients each',
    "clients' ranks": f'{f.r_max}'
    if whole
    else f'{f.r_min} to {f.r_max} (`{c.ranks.distribution}`)',
    "this adapter's ranks": f'{low}' if low == high else f'{low} to {high}',
    'matrices': f'{", ".join(c.lora.targets)} of every layer',
    'data': f'`{c.data.name}`, clients `{c.data.partition}`',
    'a client in a round': f'{f.local_steps} steps at most, of {f.step_examples} '
    f'examples, {o.name} at {o.learning_rate:g}',
    'sent in': sent.wire_dtype + ', with error feedback' * sent.error_feedback,
    'seed': f'{c.seed}',
  } | folded


def _evaluation(rows: Sequence[Row], of_whom: str) -> str:
  """Tells perplexity before and after, as far as it was measured."""
  found = [row for row in rows if 'eval/seen/perplexity' in row]
  if not found:
    return 'It has not been evaluated.'
  first, last = found[0], found[-1]
  lines = [
    f'| held-out perplexity | after round {first["round"]} '
    f'| after round {last["round"]} |',
    '|---|---:|---:|',
  ]
  for who, meaning in (
    ('seen', 'people trained on, in examples kept from training'),
    ('unseen', 'people never trained on'),
  ):
    name = f'eval/{who}/perplexity'
    lines.append(f'| {meaning} | {first[name]:.2f} | {last[name]:.2f} |')
  lines.append(
    '\nPerplexity is exp of the mean loss per token of the answers: lower is better. '
    'Round 0 is before training.'
  )
  if of_whom:
    lines.append('It was measured with the global adapter, whole, not with this part.')
  return '\n'.join(lines)
