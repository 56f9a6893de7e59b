"""One cohort's work, told so that a peer can do the same."""

import contextlib
import os
import pathlib
import tempfile
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

from hetlora_jax import base_model, points
from hetlora_jax.formats import hf_folder, sources
from hetlora_jax.models import decoder
from hetlora_jax.types import Batch, Cohort


def examples_of(batch: Batch) -> list[dict]:
  """Returns the examples packed into one step."""
  out, columns = [], batch.tokens.shape[1]
  live = batch.weight > 0
  row, column = np.divmod(batch.target_index[live], columns)
  owner = batch.segment[row, column]
  for segment in range(1, int(batch.segment.max()) + 1):
    tokens = batch.tokens[batch.segment == segment].tolist()
    targets = batch.target[live][owner == segment]
    out.append({'tokens': [*tokens, int(targets[-1])], 'num_target': len(targets)})
  return out


def of_clients(cohort: Cohort, rank_N) -> list[dict]:
  """Returns every client's rank and steps."""
  cohort, clients = jax.device_get(cohort), []
  for c, who in enumerate(cohort.client_id):
    if cohort.num_examples[c] == 0:
      continue
    batches = jax.tree.map(lambda x, c=c: x[c], cohort.batches)
    steps = [
      examples_of(jax.tree.map(lambda x, s=s: x[s], batches))
      for s in range(batches.tokens.shape[0])
    ]
    clients.append({'rank': int(rank_N[who]), 'steps': steps})
  return clients


def for_peers(x: points.Points, model: pathlib.Path, cases: dict[str, Cohort]) -> dict:
  """Returns all that a peer is told, for JSON.

  Args:
    x: whose job it is.
    model: a GGUF file or a Hugging Face folder.
    cases: cohorts by name.
  """
  c = x.config
  return {
    'model': str(model.resolve()),
    'targets': c.lora.targets,
    'scale': c.lora.scale,
    'learning_rate': c.client_optimizer.learning_rate,
    'threads': os.cpu_count(),
    'cases': {
      name: of_clients(cohort, x.initial_rank[0]) for name, cohort in cases.items()
    },
  }


def first_cohort(x: points.Points) -> Cohort:
  """Returns the cohort of round 0, in numpy."""
  cohorts = points.make_cohorts(x, 0)
  return jax.tree.map(lambda leaf: np.asarray(leaf[0, 0]), cohorts)


def first_loss(x: points.Points, cohort: Cohort) -> float:
  """Returns the loss a token of the first client's first step.

  Adapters start at nothing, so it is the base's loss.
  """
  batch = jax.tree.map(lambda leaf: leaf[0, 0], cohort.batches)
  adapters = jax.tree.map(lambda leaf: leaf[0], x.initial_state.adapters)
  total, tokens = jax.jit(x.experiment.rules.loss)(
    x.base, adapters, jnp.float32(1), batch
  )
  return float(total / tokens)


@contextlib.contextmanager
def model_files(x: points.Points) -> Iterator[pathlib.Path]:
  """Gives the files of the base that a peer can read, written if it is random."""
  source = x.config.model.source
  if not base_model.is_random(source):
    yield sources.resolve(source).path
    return
  model = base_model.load(x.config, x.experiment.mesh)
  with tempfile.TemporaryDirectory() as name:
    folder = pathlib.Path(name)
    params = jax.tree.map(np.asarray, model.params)
    hf_folder.write(folder, model.config, params, model.tokenizer)
    yield folder


def plain_loss(x: points.Points, client: dict) -> float:
  """Returns what `first_loss` does, of what a peer is told.

  Computed another way: example by example, with the logits of the whole vocabulary.
  """
  model, dtype = (
    base_model.load(x.config, x.experiment.mesh),
    base_model.compute_dtype(x.config),
  )
  hidden = jax.jit(decoder.make_hidden(model.config, dtype, remat=False))
  head = decoder.head(model.config, x.base).astype(dtype)
  total, targets = 0.0, 0
  for example in client['steps'][0]:
    tokens = np.array([example['tokens']])
    position = np.arange(tokens.shape[1])[None]
    h = hidden(x.base, {}, jnp.float32(1), tokens, np.ones_like(tokens), position)
    logit = jnp.matmul(h[0], head.T, preferred_element_type=jnp.float32)
    n = example['num_target']
    log_prob = jax.nn.log_softmax(logit)
    total -= log_prob[np.arange(-n - 1, -1), tokens[0, -n:]].sum()
    targets += n
  return float(total / targets)


def check_same(ours: float, theirs: float) -> None:
  """Raises ValueError if first losses are apart."""
  if not abs(ours - theirs) <= 0.01 * ours:
    raise ValueError(f'not the same work: first loss {theirs}, ours {ours}.')
