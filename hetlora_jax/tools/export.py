"""Takes a run's adapters out: a PEFT folder, or a whole model of transformers.

What a method folded into the base is part of either: a merged model has it, and
a PEFT adapter holds the sum of both, factored anew.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import os
import pathlib
import shutil
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes  # noqa: F401  # numpy learns bfloat16 from it
import numpy as np

from hetlora_jax import base_model, client, files
from hetlora_jax.config import Config, ConfigError
from hetlora_jax.experiment import Experiment
from hetlora_jax.formats import hf_folder, peft
from hetlora_jax.methods import distribution
from hetlora_jax.points import Points
from hetlora_jax.run import Run
from hetlora_jax.types import (
  Deltas,
  Hyperparameters,
  Lora,
  Memory,
  PyTree,
  Rules,
  Server,
  ServerState,
  View,
)

FORMATS = ('peft', 'merged', 'base')
DTYPES = ('float32', 'bfloat16')
# What transformers would load for a PEFT folder; the nearest on the Hub.
HUB = {
  'gemma3_270m': 'google/gemma-3-270m',
  'smollm2_135m': 'HuggingFaceTB/SmolLM2-135M-Instruct',
}


class Selection(NamedTuple):
  """What to write: the global adapters, unless a rank or a person is named."""

  format: str  # of FORMATS
  dtype: str = 'float32'  # of a whole model
  rank: int | None = None
  client: str | None = None
  round: str | int = 'newest'  # see `Run.state`


def write(run: Run, out: pathlib.Path, selection: Selection) -> dict[str, Any]:
  """Writes a checkpoint's adapters to `out`, or nothing.

  Returns what was written, for JSON.

  Raises:
    ConfigError: there is no checkpoint, `out` is taken, nothing is like `selection`, or
      the model is one of your own, whose layout nobody else knows.
  """
  _check(run, out, selection)
  x = run.prepare()
  # The type it ran in may differ, but for random models, which are drawn in it.
  drawn = base_model.is_random(x.config.model.source)
  done, state = run.state(x, selection.round, any_dtype=not drawn)
  server = _select(x, state, selection)
  with _whole(out) as folder:
    if selection.format == 'peft':
      about = _write_peft(folder, x.config, state.residual, server)
    else:
      about = _write_model(folder, x.experiment, state.residual, server, selection)
  return {'out': str(out), 'round': done} | about


def _check(run: Run, out: pathlib.Path, selection: Selection) -> None:
  """Raises ConfigError for what can be told before anything is loaded."""
  if run.model and not run.model.decoder:
    raise ConfigError(
      'a model of your own has no layout that PEFT or transformers know: take its '
      'adapters from `Run.newest`.'
    )
  free = not out.exists() or (out.is_dir() and not any(out.iterdir()))
  if not free:
    raise ConfigError(f'--out={out} exists: name another or an empty folder.')
  run.saved_round(selection.round)
  rank, r_max = selection.rank, run.config.federated.r_max
  if rank is not None and not 1 <= rank <= r_max:
    raise ConfigError(f'--rank={rank} must be in 1..federated.r_max={r_max}.')
  if rank is not None and selection.client is not None:
    raise ConfigError(
      f'--rank={rank} and --client={selection.client}: give one of them.'
    )


def _select(x: Points, state: ServerState, selection: Selection) -> Server:
  """Returns adapters and their LoRA scale, as a round would send them."""
  rules, hyper = x.experiment.rules, jax.tree.map(lambda leaf: leaf[0], x.hyper)
  rank, of_client = selection.rank, selection.client
  if rules.personal and of_client is None and selection.format != 'base':
    raise ConfigError(
      f'config.method={x.config.method!r} leaves {", ".join(rules.personal)} '
      'with the people, so there is no global adapter: name one by --client.'
    )
  if rank is None and of_client is None:
    return jax.device_get(client.global_adapters(rules, state, hyper))
  if rules.trains_base:
    raise ConfigError(
      f'config.method={x.config.method!r} has no adapters: export it without '
      '--rank and --client.'
    )
  if of_client is not None:
    who = _number(x.experiment, of_client)
    view, _ = client.sent_to(rules, state, hyper, who)
  else:
    view = _sent_to_rank(rules, state, hyper, rank)
  return jax.device_get(Server(view.adapters, view.scale))


def _sent_to_rank(
  rules: Rules, state: ServerState, hyper: Hyperparameters, rank: int | None
) -> View:
  """Truncates the global adapters, whatever the method's clients are sent."""
  groups = state.memory.rank.shape[1]
  memory = Memory(
    rank=jnp.full(groups, rank),
    tail_norm=jnp.zeros(groups),
    personal={t: {} for t in state.adapters},
  )
  rules = dataclasses.replace(rules, distribute=distribution.prefix, personal=())
  view, _ = client.sent_to(rules, state, hyper, 0, memory)
  return view


def _number(x: Experiment, client_id: str | None) -> int:
  """Returns a person's number; raises ConfigError if nobody is called so."""
  ids = x.population.client_ids
  if client_id in ids:
    return ids.index(client_id)
  near = difflib.get_close_matches(str(client_id), ids, 3, 0)
  raise ConfigError(
    f'--client={files.short(client_id)} is none of the {len(ids)} people of '
    f'{x.config.data.name!r}: one of {", ".join(near)}, ...'
  )


# --- PEFT ------------------------------------------------------------------


def _write_peft(
  folder: pathlib.Path, config: Config, residual: Deltas, server: Server
) -> dict[str, Any]:
  if not server.adapters:
    raise ConfigError(
      f'--format=peft: config.method={config.method!r} changes the whole base, which '
      'no adapter can hold: give --format=merged.'
    )
  about, scale = {}, float(server.scale)
  layers = {t: _live(adapter) for t, adapter in server.adapters.items()}
  if any(change.any() for change in residual.values()):
    layers, about['truncation_error'] = _factored(residual, server)
    scale = 1.0
  source = config.model.source
  base = HUB.get(source) or (
    source if base_model.is_random(source) else str(pathlib.Path(source).resolve())
  )
  peft.write(folder, layers, scale, base)
  rank = [x.a.shape[-1] for factors in layers.values() for x in factors]
  return about | {
    'format': 'peft', 'matrices': len(rank), 'rank_min': min(rank),
    'rank_max': max(rank), 'scale': scale,
  }  # fmt: skip


def _live(adapter: Lora) -> list[Lora]:
  """Drops the slots behind the last with a product; at least one is kept."""
  live_LR = adapter.a.any(-2) & adapter.b.any(-1)
  ranks = [max(1, 1 + max(np.flatnonzero(x), default=0)) for x in live_LR]
  return [Lora(a[:, :r], b[:r]) for a, b, r in zip(*adapter, ranks, strict=True)]


def _factored(residual: Deltas, server: Server) -> tuple[dict[str, list[Lora]], float]:
  """Factors `residual + scale A B` of each matrix by its SVD.

  Directions are kept up to the numerical rank in float32 (the threshold of
  numpy.linalg.matrix_rank). Also returns the largest share of a matrix's norm
  that is lost.
  """
  layers, lost = {}, [0.0]
  for t, (a, b) in server.adapters.items():
    layers[t] = []
    for change, a_DR, b_RD in zip(np.asarray(residual[t]), a, b, strict=True):
      whole = change + float(server.scale) * (a_DR.astype(np.float64) @ b_RD)
      x = _svd(whole)
      layers[t].append(x)
      norm = np.linalg.norm(whole)
      error = np.linalg.norm(whole - x.a.astype(np.float64) @ x.b)
      lost.append(float(error / norm) if norm else 0.0)
  return layers, max(lost)


def _svd(matrix: np.ndarray) -> Lora:
  u, sigma, v = np.linalg.svd(matrix, full_matrices=False)
  noise = sigma[0] * max(matrix.shape) * np.finfo(np.float32).eps
  rank = max(1, int((sigma > noise).sum()))
  root = np.sqrt(sigma[:rank])
  a, b = u[:, :rank] * root, v[:rank] * root[:, None]
  return Lora(a.astype(np.float32), b.astype(np.float32))


# --- A whole model ---------------------------------------------------------


def _write_model(
  folder: pathlib.Path,
  x: Experiment,
  residual: Deltas,
  server: Server,
  selection: Selection,
) -> dict[str, Any]:
  model = x.model
  if selection.format == 'base':
    residual, server = {}, server._replace(adapters={})
  params = _merged(model.params, residual, server, np.dtype(selection.dtype))
  source = pathlib.Path(x.config.model.source)
  hf_folder.write(
    folder, model.decoder, params, model.tokenizer,
    source if source.is_dir() else None,
  )  # fmt: skip
  size = sum(leaf.size for leaf in jax.tree.leaves(params))
  return {'format': selection.format, 'parameters': size, 'dtype': selection.dtype}


def _merged(base: PyTree, residual: Deltas, server: Server, dtype: np.dtype) -> PyTree:
  """Returns `base + residual + scale A B`, added in float32, in numpy."""

  def add(path, leaf):
    name, out = path[-1].key, np.asarray(leaf).astype(np.float32)
    if name in residual:
      out = out + np.asarray(residual[name])
    if name in server.adapters:
      a, b = server.adapters[name]
      out = out + np.float32(server.scale) * (a @ b)
    return out.astype(dtype)

  return jax.tree.map_with_path(add, base)


@contextlib.contextmanager
def _whole(out: pathlib.Path) -> Iterator[pathlib.Path]:
  """Gives a folder beside `out` that takes its place in the end, or is gone."""
  out = out.resolve()
  temporary = out.with_name(f'.{out.name}.{os.getpid()}')
  temporary.mkdir(parents=True)
  try:
    yield temporary
    os.rename(temporary, out)  # an empty folder there is replaced
  finally:
    shutil.rmtree(temporary, ignore_errors=True)
