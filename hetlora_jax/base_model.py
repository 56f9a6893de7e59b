"""The base model of a run: a pretrained one, a random one, or yours."""

import contextlib
import dataclasses
import functools
import hashlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from hetlora_jax import arithmetic, files, prng, sharding
from hetlora_jax.config import Config, ConfigError, Data, Model, RandomModel
from hetlora_jax.data import builders, people
from hetlora_jax.models import Pretrained, decoder, readout, shapes
from hetlora_jax.models.decoder import DecoderConfig
from hetlora_jax.models.tokenizer import Tokenizer
from hetlora_jax.types import Array, Loss, PyTree


@dataclasses.dataclass(frozen=True, kw_only=True)
class BaseModel:
  """All that a run needs of a model; `own` makes one of yours."""

  params: PyTree  # frozen; nested dicts
  dims: dict[str, tuple[int, int, int]]  # target -> (layers, d_in, d_out)
  loss: Loss
  nats: Callable  # (base, adapters, scale, batch) -> what `loss` sums, unweighted: [M]
  tokenizer: people.Tokenizer
  identity: dict[str, Any]  # what a checkpoint belongs to, for JSON
  # What generating and writing a whole model need; a model of yours has none.
  decoder: DecoderConfig | None = None
  revision: str | None = None  # of a repository of the Hub, the commit


def of_config(config: Config, mesh: Mesh) -> BaseModel:
  """Returns the model that a configuration names, on its devices."""
  template = _chat_template(config)
  model, dtype = load(config, mesh), compute_dtype(config)
  written = (
    {'chat_template': hashlib.sha256(template.encode()).hexdigest()} if template else {}
  )
  return BaseModel(
    params=model.params,
    dims=decoder.adapter_dims(model.config, config.lora.targets),
    loss=readout.make_loss(model.config, dtype, config.model.remat),
    nats=readout.make_nats(model.config, dtype),
    tokenizer=dataclasses.replace(model.tokenizer, chat_template=template),
    identity={
      'sha256': model.fingerprint,
      'dtype': dtype.name,
      'shape': model.config.described(),
      **written,
    },
    decoder=model.config,
    revision=model.revision,
  )


def tokenizer_of(config: Config) -> Tokenizer:
  """Returns the tokenizer of the model that a configuration names, without weights."""
  c, data = config.model, config.data
  if is_random(c.source):
    return _tokenizer(data, c.random.vocab_size)
  from hetlora_jax import formats

  return formats.load_tokenizer(c.source)


def _chat_template(config: Config) -> str:
  """Returns the model's chat template, if examples are written by it."""
  if config.data.format != 'template':
    return ''
  from hetlora_jax import formats
  from hetlora_jax.data import rendering

  template = formats.chat_template(config.model.source)
  rendering.check_template(template)
  return template


def own(
  params: PyTree,
  apply: Callable[..., Array],
  targets: Sequence[str],
  tokenizer: people.Tokenizer,
) -> BaseModel:
  """Makes any model the base of a run; see `experiment.prepare`.

  Args:
    params: nested dicts of arrays, no name twice. They stay frozen.
    apply: a pure function (params, adapters, scale, batch) -> logits [P, T, V].
      `scale * a @ b` of `adapters[t]` [layers, ...] is to be added to the matrix
      named t. The rows of `batch` (see `types.Batch`) hold several examples;
      what belongs together has the same `batch.segment`.
    targets: names of the adapted matrices, [layers, d_in, d_out] each.
    tokenizer: has `encode` and `bos_id`; if that is None, `eos_id`.

  Raises:
    ConfigError: a target is no such matrix, or a name is there twice.
  """
  named: dict[str, np.ndarray] = {}
  for path, leaf in jax.tree.leaves_with_path(params):
    name = str(path[-1].key)
    if name in named:
      raise ConfigError(
        f'the model has two parameters {name!r}, and adapters are added by name: '
        'give each a name of its own.'
      )
    named[name] = np.asarray(leaf)
  for target in targets:
    if target not in named or named[target].ndim != 3:
      known = [name for name, leaf in named.items() if leaf.ndim == 3]
      raise ConfigError(
        f'{target=} is no matrix [layers, d_in, d_out] of the model; these '
        f'are: {", ".join(known)}.'
      )
  shapes = {name: list(leaf.shape) for name, leaf in sorted(named.items())}
  digest = hashlib.sha256()
  for _, leaf in sorted(named.items()):
    digest.update(leaf.tobytes())
  return BaseModel(
    params=params,
    dims={target: named[target].shape for target in targets},
    loss=loss_of(apply),
    nats=nats_of(apply),
    tokenizer=tokenizer,
    identity={
      'sha256': digest.hexdigest(),
      'dtype': named[targets[0]].dtype.name,
      'shape': shapes,
    },
  )


def nats_of(apply: Callable[..., Array]) -> Callable[..., Array]:
  """Makes the losses at targets of a function that returns logits; see `own`."""

  def nats(base, adapters, scale, batch):
    logit = apply(base, adapters, scale, batch)
    logit_MV = logit.reshape(-1, logit.shape[-1])[batch.target_index]
    return optax.softmax_cross_entropy_with_integer_labels(
      logit_MV.astype(jnp.float32), batch.target
    )

  return nats


def loss_of(apply: Callable[..., Array]) -> Loss:
  """Makes the task of a function that returns logits; see `own`."""
  nats = nats_of(apply)

  def loss(base, adapters, scale, batch):
    nats_M = nats(base, adapters, scale, batch)
    return (nats_M * batch.weight).sum(), batch.weight.sum()

  return loss


def place(model: BaseModel, mesh: Mesh) -> BaseModel:
  """Puts the parameters where those of their names live on a mesh."""
  return dataclasses.replace(model, params=_placed(model.params, mesh))


def compute_dtype(config: Config) -> jnp.dtype:
  """Returns the type to compute in; 'auto' is what multiplies fastest here."""
  if config.model.dtype != 'auto':
    return jnp.dtype(config.model.dtype)
  on_cpu = jax.default_backend() == 'cpu'
  return jnp.dtype(arithmetic.rates().fastest if on_cpu else 'bfloat16')


def why_dtype(config: Config) -> str:
  """Says by what 'auto' chose the type, if it had to measure."""
  measured = config.model.dtype == 'auto' and jax.default_backend() == 'cpu'
  return f' ({arithmetic.rates()})' if measured else ''


def load(config: Config, mesh: Mesh) -> Pretrained:
  """Loads or draws the base model, in the type to compute in, on its devices.

  The last one is kept, and only there: the points of a sweep share it.
  """
  c, dtype = config.model, compute_dtype(config)
  if is_random(c.source):
    model = _draw(c, config.data, dtype, mesh)
  else:
    model = _load(c.source, dtype, mesh)
  check_split(config, model.config)
  return model


def check_split(config: Config, shape: decoder.DecoderConfig) -> None:
  """Raises ConfigError if devices would have to share a head."""
  if shape.num_heads % config.mesh.model:
    raise ConfigError(
      f'config.mesh.model={config.mesh.model} does not divide the '
      f'{shape.num_heads} heads of {config.model.source}: take a divisor.'
    )


def check_positions(model: BaseModel, field: str, tokens: int) -> None:
  """Raises ConfigError if rows are longer than one rotation of positions is for.

  Args:
    model: the base.
    field: what makes rows so long, as it is typed.
    tokens: of a row.
  """
  most = decoder.most_positions(model.decoder) if model.decoder else None
  if most and tokens > most:
    raise ConfigError(
      f'{field} exceeds the {most} tokens after which the RoPE scaling of '
      'config.model.source has other frequencies: lower it.'
    )


@functools.lru_cache(1)
def _load(source: str, dtype: jnp.dtype, mesh: Mesh) -> Pretrained:
  from hetlora_jax import formats  # only what is read needs its readers

  return _place(formats.load(source, dtype=dtype), mesh)


@functools.lru_cache(1)
def _draw(c: Model, data: Data, dtype: jnp.dtype, mesh: Mesh) -> Pretrained:
  """Draws parameters, each where it lives; trains a tokenizer on the data."""
  tokenizer = _tokenizer(data, c.random.vocab_size)
  shape = shape_of_random(c, tokenizer.vocab_size)
  draw = functools.partial(decoder.init_params, shape, dtype=dtype)
  key = prng.stream(c.random.seed, 'base')
  where = sharding.by_name(mesh, jax.eval_shape(draw, key))
  params = jax.jit(draw, out_shardings=where)(key)
  name = f'{c.source}-{c.random.seed}'
  return Pretrained(shape, params, name, tokenizer)


def _tokenizer(data: Data, vocab_size: int) -> Tokenizer:
  """Trains a tokenizer on the data and keeps it in their folder, where it can."""
  dataset = builders.of(data)
  kept = dataset.folder / f'tokenizer_{vocab_size}.model'
  if not kept.exists():
    try:
      trained = Tokenizer.train(people.corpus(dataset), vocab_size)
    except ValueError as error:
      field = f'config.model.random.vocab_size={vocab_size}'
      raise ConfigError(f'{field} is impossible: {error}') from error
    with contextlib.suppress(OSError):  # others' data may be read-only
      files.write_whole(kept, lambda path: path.write_bytes(trained.serialize()[1]))
    return trained
  remedy = 'delete it, it is made anew'
  content = files.read_bytes(kept, remedy)
  with files.parsing(kept, remedy):
    return Tokenizer.from_model_proto(content)


def _place(model: Pretrained, mesh: Mesh) -> Pretrained:
  return dataclasses.replace(model, params=_placed(model.params, mesh))


def _placed(params: PyTree, mesh: Mesh) -> PyTree:
  where = sharding.by_name(mesh, params)
  return jax.block_until_ready(sharding.place(params, where))


def is_random(source: str) -> bool:
  """Tells whether a `model.source` is drawn, not read."""
  return source.partition(':')[0] == 'random'


def shape_of_random(c: Model, vocab_size: int) -> decoder.DecoderConfig:
  """Returns the shape of 'random', or the published one of 'random:NAME'.

  Args:
    c: the model's configuration, checked.
    vocab_size: words of a shape that is not published.
  """
  name = c.source.partition(':')[2]
  return shapes.SHAPES[name] if name else random_shape(c.random, vocab_size)


def random_shape(c: RandomModel, vocab_size: int) -> decoder.DecoderConfig:
  return decoder.DecoderConfig(
    family='gemma3',
    vocab_size=vocab_size,
    num_layers=c.num_layers,
    width=c.width,
    num_heads=c.num_heads,
    num_kv_heads=max(1, c.num_heads // 2),
    head_dim=c.head_dim,
    mlp_width=c.mlp_width,
    norm_eps=1e-6,
    rope_base=1e4,
    rope_base_local=1e4,
    rope_scaling=(),
    sliding_window=0,
    global_every=1,
    qk_norm=True,
    post_norms=True,
    embed_scale=True,
    activation='gelu',
    query_scale=c.head_dim**-0.5,
    tied_embeddings=False,
  )
