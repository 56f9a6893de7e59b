"""Takes a run's adapters out: for PEFT, llama.cpp, or as a whole model of transformers.

What a method folded into the base is part of each: a merged model has it, and
an adapter holds the sum of both, factored anew.
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

from hetlora_jax import base_model, client, files, hub
from hetlora_jax.config import ConfigError
from hetlora_jax.experiment import Experiment
from hetlora_jax.formats import hf_folder, peft, sources
from hetlora_jax.methods import distribution
from hetlora_jax.points import Points
from hetlora_jax.run import Run
from hetlora_jax.tools import card
from hetlora_jax.tools.card import Base
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

FORMATS = ('peft', 'gguf', 'merged', 'base')
DTYPES = ('float32', 'bfloat16', 'float16')
# What transformers would load for a PEFT folder; the nearest on the Hub.
HUB = {
  'gemma3_270m': 'google/gemma-3-270m',
  'smollm2_135m': 'HuggingFaceTB/SmolLM2-135M-Instruct',
}


class Selection(NamedTuple):
  """What to write: the global adapters, unless a rank or a person is named."""

  format: str  # of FORMATS
  dtype: str = 'float32'  # of a whole model, or for llama.cpp
  rank: int | None = None
  client: str | None = None
  round: str | int = 'newest'  # see `Run.state`

  @property
  def part(self) -> str:
    """Says which part of the global adapters is meant; '' for all."""
    if self.client is not None:
      return f'what client {self.client!r} would be sent'
    return '' if self.rank is None else f'the global one truncated to rank {self.rank}'


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
    if selection.format in ('peft', 'gguf'):
      about = _write_adapter(folder, x.experiment, state.residual, server, selection)
    else:
      about = _write_model(folder, x.experiment, state.residual, server, selection)
    about = {'out': str(out), 'round': done} | about
    if selection.format == 'peft':
      card.write(
        folder / card.NAME,
        x.config,
        _base_of(x.experiment),
        x.identity['sha256'],
        about,
        [row for row in run.history if row['round'] <= done],
        selection.part,
      )
  return about


def _check(run: Run, out: pathlib.Path, selection: Selection) -> None:
  """Raises ConfigError for what can be told before anything is loaded."""
  if run.model and not run.model.decoder:
    raise ConfigError(
      'a model of your own has no layout that PEFT, llama.cpp or transformers know: take its '
      'adapters from `Run.newest`.'
    )
  free = not out.exists() or (out.is_dir() and not any(out.iterdir()))
  if not free:
    raise ConfigError(f'--out={out} exists: name another or an empty folder.')
  run.saved_round(selection.round)
  if selection.dtype == 'float16' and selection.format != 'gguf':
    raise ConfigError(
      f'--dtype=float16 is for --format=gguf, not {selection.format}: take bfloat16.'
    )
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
    view = client.sent_to(rules, state, hyper, who)
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
  view, _ = client.share_of(rules, state, hyper, 0, memory)
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


# --- An adapter ------------------------------------------------------------


def _write_adapter(
  folder: pathlib.Path,
  x: Experiment,
  residual: Deltas,
  server: Server,
  selection: Selection,
) -> dict[str, Any]:
  if not server.adapters:
    raise ConfigError(
      f'--format={selection.format}: config.method={x.config.method!r} changes the '
      'whole base, which no adapter can hold: give --format=merged.'
    )
  about, scale = {}, float(server.scale)
  layers = {t: _live(adapter) for t, adapter in server.adapters.items()}
  if any(change.any() for change in residual.values()):
    layers, about['truncation_error'] = _factored(residual, server)
    scale = 1.0
  if selection.format == 'gguf':
    from hetlora_jax.formats import gguf_adapter

    path = folder / gguf_adapter.NAME
    try:
      gguf_adapter.write(path, layers, scale, x.model.decoder, selection.dtype)
    except ValueError as error:
      raise ConfigError(
        f'--dtype={selection.dtype}: {error}: take bfloat16.'
      ) from error
    about['dtype'] = selection.dtype
  else:
    name, revision = _base_of(x)
    peft.write(folder, layers, scale, name, x.model.decoder, revision)
  rank = [x.a.shape[-1] for factors in layers.values() for x in factors]
  return about | {
    'format': selection.format, 'matrices': len(rank), 'rank_min': min(rank),
    'rank_max': max(rank), 'scale': scale,
  }  # fmt: skip


def _base_of(x: Experiment) -> Base:
  """Returns what transformers would load as the base model."""
  source = x.config.model.source
  on_hub = hub.model(source)
  if on_hub and x.model.revision:
    return Base(on_hub.repo, x.model.revision)
  if base_model.is_random(source):
    return Base(source)
  return Base(HUB.get(source) or str(pathlib.Path(source).resolve()))


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
  if model.revision:
    pinned = f'{hub.unpinned(str(source))}@{model.revision}'
    source = sources.resolve(pinned).path
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
