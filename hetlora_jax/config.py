"""Every field of an experiment, declared once.

A ConfigDict or a file of one comes in, frozen sections go out, or a ConfigError that
names the field at once.
"""

from __future__ import annotations

import dataclasses
import operator
import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from ml_collections import ConfigDict

from hetlora_jax import fields, files, hub, lora, optimizers, ranks, wire
from hetlora_jax.data import partition
from hetlora_jax.fields import ConfigError, field, flat, section
from hetlora_jax.methods import registry, tail
from hetlora_jax.methods.registry import METHODS, ROLES, Rule
from hetlora_jax.models import decoder, shapes

SCALE_RULES = {'constant': 0.0, 'alpha_over_r': 1.0, 'alpha_over_sqrt_r': 0.5}
MAX_CONTEXT_TURNS = 4  # that data sets keep
# Which value is better of the columns of an evaluation, by their last word.
_LOWER, _HIGHER = ('loss', 'perplexity'), ('accuracy', 'macro_f1')
BETTER = dict.fromkeys(_LOWER, 'lower') | dict.fromkeys(_HIGHER, 'higher')


# A field is a line, and what it means the next ones.
# fmt: off


@section
class Federated:
  """A round: who takes part, and what each does."""

  num_rounds: int = field(20, at_least=1, changeable=True,
    help='Rounds of federated training.')
  clients_per_round: int = field(10, at_least=1,
    help='Clients sampled for a round, without replacement.')
  sampling: str = field('uniform', choices=('uniform', 'by_size'),
    help="How clients are sampled: 'uniform', or 'by_size' of their data.")
  local_steps: int = field(5, at_least=1,
    help='Optimizer steps that a client takes in a round. It sees each example once at '
         'most, so one of few examples takes fewer, the last on what is left.')
  local_epochs: float | None = field(None, above=0,
    help='Passes of a client over its examples in a round, each in another order, in '
         'local_steps at most. None: local_steps alone decide, and no example is seen '
         'twice.')
  local_batch: int = field(8, at_least=1,
    help='Examples of a batch, which is a step unless accumulate says otherwise.')
  accumulate: int = field(1, at_least=1,
    help='Batches whose gradients a step adds up, as if they were one: so many times the '
         'examples in the memory of one batch.')
  min_local_steps: int | None = field(None, at_least=1,
    help='Fewest steps: each client takes a random number from here to local_steps. '
         'None: all take local_steps.')
  dropout: float = field(0.0, at_least=0, below=1, traced='dropout',
    help='Chance that a client trains and never reports.')
  r_min: int = field(5, at_least=1, traced='r_min',
    help='Smallest rank; no client prunes below it.')
  r_max: int = field(50, at_least=1, at_most=16_384,
    help='Largest rank, and the number of rank slots of every adapter.')
  gamma: float = field(0.99, above=0, at_most=1, traced='gamma',
    help='Decay factor in (0, 1]: the tail is slots [gamma r, r). 1 never prunes.')
  tail_penalty: float = field(0.1, at_least=0, traced='tail_penalty',
    help="Lambda, the weight of ||B_tail|| ||A_tail|| in a client's loss.")
  proximal: float = field(0.01, at_least=0, traced='proximal',
    help="Mu, the weight of ||theta - theta_received||^2 / 2 ('proximal').")
  norm_bound: float | None = field(None, above=0,
    help='Longest change that a client may send, in L2 over all it trained. None: any.')
  clients_at_once: int | None = field(None, at_least=1, changeable=True,
    help='Clients that a device trains at once, the memory dial. None: all of its own.')
  rounds_per_call: int = field(1, at_least=1, changeable=True,
    help='Rounds in one call of the compiled program; evaluations, checkpoints and '
         'Ctrl-C wait for its end.')

  @property
  def step_examples(self) -> int:
    """Examples of an optimizer step."""
    return self.local_batch * self.accumulate

  def num_steps(self, pooled: bool) -> int:
    """Steps of a client at most; of one on the pooled data, those of all together."""
    return self.local_steps * (self.clients_per_round if pooled else 1)


@section
class Ranks:
  """Which client has which rank."""

  distribution: str = field('power_law', choices=ranks.DISTRIBUTIONS, varies=True,
    help="Who gets which rank: 'uniform', 'power_law', 'normal', 'explicit', 'tiers'.")
  exponent: float = field(1.0, at_least=0, varies=True,
    help='Exponent of the power law p(r) ~ r**-exponent on [r_min, r_max].')
  explicit: tuple[int, ...] = field((5, 50), at_least=1, varies=True,
    help="Ranks of client 0, 1, ..., repeated ('explicit').")
  tiers: tuple[int, ...] = field((5, 20, 50), at_least=1, varies=True,
    help="Ranks of the device tiers ('tiers').")
  tier_fractions: tuple[float, ...] = field((0.6, 0.3, 0.1),
    at_least=0, at_most=1, varies=True,
    help='Share of the clients in each tier; sums to 1.')
  data_correlation: float = field(0.0, at_least=-1, at_most=1, varies=True,
    help='Correlation of rank with the number of examples, in [-1, 1].')


def _role(role: str, help: str) -> Any:
  return field(None, f"{help} None: the method's.", choices=ROLES[role])


@section
class Methods:
  """The method's rules, one by one, and their choices."""

  distribution: str | None = _role('distribution', 'What a client is sent.')
  objective: str | None = _role('objective', 'What a client minimises.')
  trainable: str | None = _role('trainable',
    'Which factors a client trains, or the base instead.')
  personal: str | None = _role('personal',
    'Which factors stay with the client.')
  pruning: str | None = _role('pruning', 'Which rank a client keeps after training.')
  weighting: str | None = _role('weighting', 'How much each client counts.')
  aggregation: str | None = _role('aggregation',
    "How the clients' adapters become one.")
  redistribution: str | None = _role('redistribution',
    "From the aggregate to the server's adapters.")
  cohort: str | None = _role('cohort',
    'Whether clients train apart, or one on the data of all.')
  energy: float | None = field(None, above=0, at_most=1, traced='energy',
    help='Share of squared singular values (or slots) that rules of that name keep. '
         "None: the method's.")
  count_examples: str = field('dataset', choices=('dataset', 'round'),
    help="Examples that weigh a client: of its 'dataset', or trained on in a 'round'.")
  prune_scope: str = field('client', choices=('client', 'matrix'),
    help="One rank for a 'client', or one for each 'matrix'.")
  prune_against: str = field('received', choices=('received', 'last_trained'),
    help="A tail must become smaller than the one 'received' or 'last_trained'.")
  keep_pruned_rank: bool = field(True, 'Whether a pruned rank holds in later rounds.')
  weight_scope: str = field('model', choices=('model', 'layer', 'matrix'),
    help="Norm weights over the whole 'model', a 'layer', or a 'matrix'.")
  trim: float = field(0.1, at_least=0, below=0.5,
    help="Share of a slot's owners that 'trimmed_mean' cuts off at each end.")


@section
class Faults:
  """Clients that do not do as they should."""

  malicious: float = field(0.0, at_least=0, at_most=1,
    help='Share of the clients that multiply the change they send.')
  malicious_scale: float = field(100.0, finite=False,
    help='By what; inf makes it not finite, and they are left out.')


@section
class LoraConfig:
  """The adapters."""

  targets: tuple[str, ...] = field(('q', 'v'),
    'Adapted matrices: any of q, k, v, o, gate, up, down.')
  scale: float = field(2.0, at_least=0, traced='lora_scale',
    help='LoRA scale (or alpha, under the other rules): delta W = scale A B.')
  scale_rule: str = field('constant', choices=SCALE_RULES,
    help="'constant', 'alpha_over_r' or 'alpha_over_sqrt_r'.")
  fold_scale: bool = field(False,
    "Whether averaged factors take up sqrt(scale) of each client's scale.")
  init: str = field('gaussian', choices=lora.INITS,
    help="How A is drawn: 'gaussian' or 'kaiming_uniform'; B starts at zero.")
  from_peft: str | None = field(None,
    'PEFT folder with the adapters to start from, of any rank up to r_max.')


@section
class ClientOptimizer:
  """What a client steps with."""

  name: str = field('adam', choices=optimizers.CLIENT,
    help="'adam', 'adamw' or 'sgd'; moments start afresh every round.")
  learning_rate: float = field(1e-3, at_least=0, traced='client_learning_rate',
    help='Learning rate of the clients.')
  full_learning_rate: float = field(1e-5, at_least=0, traced='full_learning_rate',
    help='Learning rate of clients that train the base (full fine-tuning).')
  schedule: str = field('constant', choices=optimizers.SCHEDULES,
    help="How the rate falls over rounds, to 0 at decay_rounds: 'constant' (not at all), "
         "'linear' or 'cosine'.")
  decay_rounds: int | None = field(None, at_least=1,
    help='Rounds over which it falls. None: federated.num_rounds, with which the run '
         'must then be continued too.')
  warmup_rounds: int = field(0, at_least=0,
    help='Rounds over which the rate rises first, from 1 / (warmup_rounds + 1) of it.')
  local_schedule: str = field('constant', choices=optimizers.SCHEDULES,
    help='The same over the local_steps of a round, anew in each.')
  b_rate_ratio: float = field(1.0, above=0,
    help='By how much B steps further than A (LoRA+ has 16; arXiv 2402.12354).')
  clip_norm: float | None = field(None, above=0,
    help="Longest gradient of a client's step, in L2 over all it trains. None: any.")
  weight_decay: float = field(0.0, "Decoupled weight decay ('adamw' only).", at_least=0)


@section
class ServerOptimizer:
  """What the server steps with."""

  name: str = field('sgd', choices=optimizers.SERVER,
    help="'sgd', 'momentum', 'adam' or 'yogi' on the pseudo-gradient.")
  learning_rate: float = field(1.0, at_least=0, traced='server_learning_rate',
    help='Learning rate of the server; sgd at 1.0 takes the aggregate as it is.')


@section
class RandomModel:
  """Shape of a model that is just 'random', of the Gemma 3 family."""

  seed: int = field(0, 'Seed of its parameters.', at_least=0)
  width: int = field(64, 'Width of the residual stream.', at_least=1, at_most=65_536)
  num_layers: int = field(2, 'Number of layers.', at_least=1, at_most=1_024)
  num_heads: int = field(4, at_least=1, at_most=1_024,
    help='Query heads; half as many key-value heads.')
  head_dim: int = field(16, 'Width of a head.', at_least=1, at_most=4_096)
  mlp_width: int = field(128, 'Hidden width of the MLP.', at_least=1, at_most=1_048_576)
  vocab_size: int = field(384, at_least=1, at_most=1_048_576,
    help='Vocabulary of the tokenizer that is trained on the data.')


@section
class Model:
  """The base model."""

  source: str = field('gemma3_270m',
    "'gemma3_270m', 'smollm2_135m', a .gguf, a Hugging Face folder, 'random', "
    "'random:gemma3_1b': random weights in a published shape (models/shapes.py), or "
    "'ORG/NAME' of the Hugging Face Hub, which a folder of that path precedes; "
    "'ORG/NAME@REVISION', 'ORG/NAME:FILE.gguf'.")
  dtype: str = field('auto', choices=('auto', 'float32', 'bfloat16'), changeable=True,
    help="'float32', 'bfloat16', or 'auto': what this machine multiplies fastest, by a "
         'measurement at the first start, kept in the cache folder.')
  remat: bool = field(False,
    'Recompute all of a layer in the backward pass, products too: least memory.')
  random: RandomModel = RandomModel()


@section
class Data:
  """Whose examples, and how many tokens of them."""

  name: str = field('chitchat',
    "Data set: 'chitchat', 'chitchat_conversations', 'mail_subject', "
    "'multi_session_chat', 'reddit_tldr', 'synthetic', 'text_folder': your own data "
    "(docs/data.md), or 'hf:ORG/NAME', 'hf:ORG/NAME:CONFIG@REVISION' of the Hugging Face "
    "Hub.")
  path: str | None = field(None, changeable=True,  # the content may not change
    help='File or folder of your data, or of a data set that you downloaded.')
  client: str | None = field(None,
    help='Column (or key of JSON) of your data, or of the Hub, that says who wrote the '
         "target. None: 'client'. Clients made by a partition need none.")
  prompt: str | None = field(None,
    help="Column of what the target answers: a text, or several. None: 'context'.")
  target: str | None = field(None,
    help="Column of what the client wrote. None: 'target'.")
  label: str | None = field(None,
    help="Column of what it is about. None: 'label' if there is one, else the client.")
  split: str | None = field(None,
    help="Split of a data set of the Hub, as 'train[:1000]'. None: 'train'.")
  partition: str = field(partition.NATURAL,
    choices=(partition.NATURAL, *partition.PARTITIONERS),
    help="Who the clients are: 'natural' (who wrote it), or made by a rule from all "
         "examples: 'iid', 'dirichlet', 'by_size', 'pathological'.")
  partition_clients: int = field(100, 'Clients that such a rule makes.', at_least=1)
  partition_alpha: float = field(1.0, above=0,
    help="Its number: of 'dirichlet' the concentration, of 'by_size' the exponent of "
         "the power law, of 'pathological' the shards of one label that a client "
         'gets.')
  partition_seed: int = field(0, at_least=0,
    help='Its seed, so that clients are the same for every `seed`.')
  format: str | None = field(None, choices=('plain', 'chat', 'alpaca', 'template'),
    help="How examples are written: 'plain' (turns on lines of their own), 'chat' (with "
         "names), 'alpaca' (instruction and input), or by the 'template' that comes with "
         "the model. None: chats with names, what is summed up by the data set's cue.")
  min_examples: int | None = field(None, at_least=2,
    help="Clients with fewer examples are left out. None: the data set's own, 20 of "
         'most; of your own data, 2: one example to train on and one to hold out.')
  num_people: int | None = field(None, at_least=1,
    help='Clients that may be trained, the same for every seed. None: all.')
  copies: int = field(1, at_least=1, at_most=1_000_000,
    help='Clients that each of them stands for, with the same examples, but ranks and '
         'draws of their own: a population larger than the data set.')
  unseen_fraction: float = field(0.2, above=0, below=1,
    help='Share of the people that is never trained on.')
  heldout_fraction: float = field(0.2, above=0, below=1,
    help="Share of a client's examples, the latest, kept for evaluation.")
  context_turns: int = field(4, at_least=1, at_most=MAX_CONTEXT_TURNS,
    help='Turns of context before the target; of a whole conversation all.')
  row_tokens: int | None = field(None, at_least=1,
    help="Tokens of a packed row. None: the data set's own, 256 of most; of your own "
         'data as many as an example may have, 256 at least.')
  tokens_per_example: int | None = field(None, at_least=1,
    help='Room for tokens, times local_batch; longer contexts lose their start, texts '
         "that are summed up their end. None: the data set's own, 96 of most; of your "
         'own data what 99 of 100 examples need, 1,024 at most.')
  targets_per_example: int | None = field(None, at_least=1,
    help='Room for target tokens, times local_batch; longer targets lose their end. '
         "None: the data set's own, 32 of most; of your own data what 99 of 100 "
         'examples need.')


@section
class Eval:
  """When and on whom a run is evaluated."""

  every: int | None = field(10, at_least=1, changeable=True,
    help='Rounds between evaluations. None: at the start and the end only.')
  num_people: int = field(32, at_least=1, changeable=True,
    help='People evaluated, of those seen and of those unseen each.')
  examples_per_person: int = field(4, 'Examples of each.', at_least=1, changeable=True)
  labels: tuple[str, ...] = field((), changeable=True,
    help='Of a task whose targets are labels, all of them, as the data write them and '
         'without commas: evaluations then tell accuracy and macro F1, the guess being '
         'the label of highest probability, for so many times the work. (): no such '
         'task.')
  own_rank: bool = field(False, changeable=True,
    help='Also give seen people the adapter truncated to their own rank.')
  aggregation_error: bool | None = field(None, changeable=True,
    help='Whether rounds measure what averaging factors loses of the mean product, '
         "which is most of a pod's traffic. None: every round on one device, on "
         'several the rounds that end with an evaluation.')
  metric: str = field('eval/seen/loss', changeable=True,
    help='Column of metrics.jsonl by which evaluations are compared; the best '
         'one is in summary.json.')
  better: str | None = field(None, choices=('lower', 'higher'), changeable=True,
    help='Which of two values of it is better. None: the lower loss or perplexity, the '
         'higher accuracy or F1.')
  patience: int | None = field(None, at_least=1, changeable=True,
    help='Evaluations in a row that are no better, after which a run ends early. None: '
         'it does all its rounds.')
  min_delta: float = field(0.0, at_least=0, changeable=True,
    help='By how much an evaluation must be better for patience to begin anew.')

  @property
  def better_side(self) -> str | None:
    """Which value of the metric is better; None if nobody has said so."""
    return self.better or BETTER.get(self.metric.rpartition('/')[2])


@section
class Checkpoint:
  """When a run is saved, and what is kept."""

  every: int = field(10, at_least=1, changeable=True,
    help='Rounds between checkpoints; the last round is always saved.')
  keep: int = field(2, 'Newest checkpoints kept.', at_least=1, changeable=True)
  keep_every: int | None = field(None, at_least=1, changeable=True,
    help='Checkpoints of rounds that it divides are kept for ever. None: none are.')
  keep_best: bool = field(False, changeable=True,
    help='Save and keep the round with the best evaluation (eval.metric) too, round 0, '
         'before training, included.')


@section
class Communication:
  """What is sent."""

  wire_dtype: str = field('float32', choices=wire.TYPES,
    help="Type that what is sent is rounded to, and its bytes counted in: 'float32', "
         "'bfloat16', 'float16' or 'int8' (times a float32 scale for every rank slot). "
         'The server sends parameters, clients the change that they made.')
  error_feedback: bool = field(False,
    help='Whether clients add what rounding took of their changes to the next one that '
         'they send, which each must remember.')


@section
class Mesh:
  """The devices."""

  points_at_once: int | None = field(1, at_least=1, changeable=True,
    help='Points of a sweep that a device trains at once, the others wait. 1 needs '
         'the memory of one run and gives each point its very numbers. None: all of '
         'its own.')
  sweep: int = field(1, at_least=1, changeable=True,
    help='Devices along which the points of a sweep are spread.')
  clients: int = field(1, at_least=1, changeable=True,
    help='Devices along which clients are spread.')
  model: int = field(1, at_least=1, changeable=True,
    help='Devices along which the base model is split.')

  @property
  def devices(self) -> int:
    """How many devices there are in all."""
    return self.sweep * self.clients * self.model


# fmt: on


@section
class Config:
  """A whole experiment; `to_dict` of it is config.json."""

  seed: int = field(
    0,
    at_least=0,
    traced='seed',
    help='Seed of everything random: clients, batches, ranks, initialisation.',
  )
  method: str = field(
    'hetlora',
    choices=METHODS,
    help='Method, a row of hetlora_jax/methods/registry.py (--list_methods).',
  )
  federated: Federated = Federated()
  ranks: Ranks = Ranks()
  methods: Methods = Methods()
  faults: Faults = Faults()
  lora: LoraConfig = LoraConfig()
  client_optimizer: ClientOptimizer = ClientOptimizer()
  server_optimizer: ServerOptimizer = ServerOptimizer()
  model: Model = Model()
  data: Data = Data()
  eval: Eval = Eval()
  checkpoint: Checkpoint = Checkpoint()
  communication: Communication = Communication()
  mesh: Mesh = Mesh()

  def chosen(self, name: str) -> Any:
    """Returns `methods.<name>`, or what the method says where that is None."""
    value = getattr(self.methods, name)
    return getattr(METHODS[self.method], name) if value is None else value

  @property
  def decay_rounds(self) -> int:
    """Rounds over which the clients' rate falls."""
    return self.client_optimizer.decay_rounds or self.federated.num_rounds

  @property
  def rules(self) -> dict[str, Rule]:
    """The rule of every role."""
    return {role: table[self.chosen(role)] for role, table in ROLES.items()}

  @property
  def traits(self) -> frozenset[str]:
    """What the rules together are known for; see `registry.TRAITS`."""
    return registry.traits_of(self.rules)

  def replace(self, **values: Any) -> Config:
    """Returns a checked copy with other values, by path: {'federated.gamma': 0.9}.

    Raises:
      ConfigError: a field does not exist, or a value cannot work.
    """
    for path in values:
      if path not in FIELDS:
        raise ConfigError(f'config.{path} does not exist{fields.remedy(path, FIELDS)}')
    return resolve(fields.nested(flat(to_dict(self)) | values))


FIELDS = fields.declared(Config)
# Points of one compiled program may differ in these.
VARIES = tuple(
  path for path, f in FIELDS.items() if f.declaration.traced or f.declaration.varies
)


def default_config() -> ConfigDict:
  """Returns every field at its default."""
  return fields.config_dict_of(Config)


def explain(config: Config) -> str:
  """Returns every field with its meaning and value, as flags."""
  return '\n'.join(
    f'# {told(f)}\n--config.{path}={fields.lookup(config, path)!r}'
    for path, f in FIELDS.items()
  )


def told(f: fields.Field) -> str:
  """Returns what a field means, and what it may be."""
  says = f.declaration
  may_be = ', '.join(map(repr, says.choices or ())) or says.range()
  return f'{says.help} ({may_be})' if may_be else says.help


def to_dict(config: Config) -> dict[str, Any]:
  """Returns plain nested dicts, as written to config.json."""
  return dataclasses.asdict(config)


def resolve(raw: Config | ConfigDict | Mapping) -> Config:
  """Makes a checked Config of a ConfigDict or nested dicts; raises ConfigError."""
  config = built(raw)
  check(config)
  return _placed(config)


def _placed(config: Config) -> Config:
  """Makes paths absolute, so that a run can be opened from any folder."""
  model, data, adapters = config.model, config.data, config.lora
  named = model.source.partition(':')[0] in ('random', *shapes.SHAPES)
  if not named and os.path.exists(os.path.expanduser(model.source)):
    model = dataclasses.replace(model, source=_absolute(model.source))
  if data.path:
    data = dataclasses.replace(data, path=_absolute(data.path))
  if adapters.from_peft:
    adapters = dataclasses.replace(adapters, from_peft=_absolute(adapters.from_peft))
  return dataclasses.replace(config, model=model, data=data, lora=adapters)


def _absolute(path: str) -> str:
  return os.path.abspath(os.path.expanduser(path))


def built(raw: Config | ConfigDict | Mapping) -> Config:
  """Makes a Config of the right types, its values unchecked; raises ConfigError."""
  if isinstance(raw, Config):
    return raw
  if hasattr(raw, 'to_dict'):  # that of a file that is absent raises here
    raw = raw.to_dict()
  if not isinstance(raw, Mapping):
    raise ConfigError(
      f'--config gives a {type(raw).__name__}: its get_config() must return a '
      'ConfigDict; start from configs/default.py.'
    )
  return fields.build(Config, raw)


def fields_of_folder(values: Mapping[str, Any]) -> dict[str, Any]:
  """Returns the fields of a run's config.json by path, unchecked.

  What the run did not have yet is the default. Earlier releases wrote 0 or '' where
  None means the default now, and had a `methods.tail_rounding` that is gone: it is
  left out where it was what is always done now.
  """
  old = flat(values)
  if old.get('methods.tail_rounding') == 'floor':
    del old['methods.tail_rounding']
  for path, value in old.items():
    f = FIELDS.get(path)
    if f and f.optional and f.type is not bool and value in (0, ''):
      old[path] = None
  return flat(to_dict(Config())) | old


def check(config: Config) -> None:
  """Raises ConfigError at the first value, or combination, that cannot work."""
  fields.check(config)
  for path, ok, remedy in _conditions(config):
    if not ok:
      value = fields.lookup(config, path)
      raise ConfigError(
        f'config.{path}={files.short(repr(value))} is impossible: {remedy}.'
      )
  for rule, why in registry.conflicts(config.rules):
    raise ConfigError(
      f'config.methods.{rule.role}={rule.name!r} does not fit the other rules of '
      f'{config.method!r}: {why}.'
    )
  if 'tail' in config.traits:
    f = config.federated
    try:
      tail.check(range(f.r_min, f.r_max + 1), f.gamma)
    except ValueError as error:
      raise ConfigError(f'config.{error}') from error


_Condition = tuple[str, bool, str]  # field, whether it holds, what would


def _conditions(c: Config) -> Iterator[_Condition]:
  yield from _of_rounds(c)
  yield from _of_communication(c)
  yield from _of_ranks(c)
  yield from _of_model(c)
  yield from _of_data(c)
  yield from _of_evaluations(c)


def _of_rounds(c: Config) -> Iterator[_Condition]:
  f = c.federated
  yield (
    'federated.r_min',
    f.r_min <= f.r_max,
    f'it exceeds federated.r_max={f.r_max}; lower it or raise r_max',
  )
  for path in ('federated.num_rounds', 'eval.every', 'checkpoint.every'):
    yield (
      path,
      (fields.lookup(c, path) or 0) % f.rounds_per_call == 0,
      f'it is no multiple of federated.rounds_per_call={f.rounds_per_call}',
    )
  yield (
    'federated.min_local_steps',
    (f.min_local_steps or 0) <= f.local_steps,
    f'it exceeds federated.local_steps={f.local_steps}',
  )
  o = c.client_optimizer
  yield (
    'client_optimizer.warmup_rounds',
    o.warmup_rounds < c.decay_rounds or o.schedule == 'constant',
    f'the rate falls in {c.decay_rounds} rounds: give fewer, or more of '
    'client_optimizer.decay_rounds',
  )
  yield (
    'client_optimizer.weight_decay',
    not o.weight_decay or o.name == 'adamw',
    f'client_optimizer.name={o.name!r} has none: take adamw',
  )
  yield (
    'client_optimizer.b_rate_ratio',
    o.b_rate_ratio == 1 or 'trains base' not in c.traits,
    'full fine-tuning has no B: leave it out',
  )


def _of_communication(c: Config) -> Iterator[_Condition]:
  fed_back, wire_dtype = c.communication.error_feedback, c.communication.wire_dtype
  yield (
    'communication.error_feedback',
    not fed_back or wire.TYPES[wire_dtype].round is not None,
    f'communication.wire_dtype={wire_dtype!r} takes nothing: take int8',
  )
  drifts = {'trains base', 'fresh factors', 'empties', 'pools data'} & c.traits
  turns = registry.power_of_a(c.rules) is not None
  alone = len(c.rules['personal'].own_factors) == 2
  yield (
    'communication.error_feedback',
    not (fed_back and (drifts or turns or alone)),
    f'with config.method={c.method!r} clients share no factors that stay from round to '
    'round, to which what was lost could be added: leave it out',
  )


def _of_ranks(c: Config) -> Iterator[_Condition]:
  f, r = c.federated, c.ranks
  for name in ('explicit', 'tiers'):
    values = getattr(r, name)
    yield (
      f'ranks.{name}',
      r.distribution != name or 0 < max(values, default=0) <= f.r_max,
      f'every rank must be in 1..federated.r_max={f.r_max}',
    )
  fits = len(r.tier_fractions) == len(r.tiers)
  yield (
    'ranks.tier_fractions',
    r.distribution != 'tiers' or (fits and abs(sum(r.tier_fractions) - 1) < 1e-6),
    'give one for each of ranks.tiers, summing to 1',
  )


def _of_model(c: Config) -> Iterator[_Condition]:
  yield (
    'lora.targets',
    bool(c.lora.targets) and set(c.lora.targets) <= set(decoder.TARGETS),
    f'name one or more of {", ".join(decoder.TARGETS)}',
  )
  yield (
    'lora.targets',
    len(set(c.lora.targets)) == len(c.lora.targets),
    'one of them is there twice',
  )
  yield 'model.source', bool(c.model.source), "name a model, or 'random'"
  yield (
    'lora.from_peft',
    not c.lora.from_peft or 'trains base' not in c.traits,
    'full fine-tuning has no adapters; merge it and give that as model.source',
  )
  yield (
    'lora.scale',
    not c.lora.from_peft or c.lora.scale > 0,
    'at scale 0 no adapter can be that of lora.from_peft',
  )
  kind, colon, shape = c.model.source.partition(':')
  drawn = kind == 'random' and bool(colon)
  yield (
    'model.source',
    not drawn or shape in shapes.SHAPES,
    f'published shapes are {", ".join(shapes.SHAPES)}; or give just "random"',
  )
  if drawn:
    most = shapes.SHAPES[shape].vocab_size
    yield (
      'model.random.vocab_size',
      c.model.random.vocab_size <= most,
      f'{shape} has a vocabulary of {most}, and the tokenizer cannot have more',
    )


def _of_evaluations(c: Config) -> Iterator[_Condition]:
  e = c.eval
  yield (
    'eval.metric',
    e.metric.startswith('eval/'),
    "name a column of an evaluation, e.g. 'eval/unseen/loss'",
  )
  yield (
    'eval.metric',
    e.better_side is not None,
    f'eval.better must say which value is better; known are {", ".join(BETTER)}',
  )
  yield (
    'eval.patience',
    e.patience is None or e.every is not None,
    'it counts evaluations, and eval.every=None has none on the way: give eval.every',
  )
  several = len(e.labels) != 1 and len(set(e.labels)) == len(e.labels)
  yield (
    'eval.labels',
    several and all(map(str.strip, e.labels)),
    'give two labels or more, each once and none of them empty, or () for no such task',
  )


def _both(a: int | None, b: int | None, holds: Callable[[int, int], bool]) -> bool:
  """Tells whether two numbers fit, as far as both are given."""
  return a is None or b is None or holds(a, b)


def _of_data(c: Config) -> Iterator[_Condition]:
  d = c.data
  on_hub = bool(hub.dataset(d.name))
  yield 'data.path', not (d.path and on_hub), f'data.name={d.name!r} has no files here'
  for name in ('client', 'prompt', 'target', 'label'):
    yield (
      f'data.{name}',
      getattr(d, name) is None or on_hub or d.name == 'text_folder',
      f"data.name={d.name!r} has columns of its own; yours are 'text_folder'",
    )
  yield 'data.split', d.split is None or on_hub, f'data.name={d.name!r} has no splits'
  yield (
    'data.partition_alpha',
    d.partition != 'pathological' or d.partition_alpha.is_integer(),
    "of 'pathological' it is a whole number of shards",
  )
  yield (
    'data.targets_per_example',
    _both(d.targets_per_example, d.tokens_per_example, operator.lt),
    f'it must be below data.tokens_per_example={d.tokens_per_example}',
  )
  yield (
    'data.row_tokens',
    _both(d.row_tokens, d.tokens_per_example, operator.ge),
    f'a row must hold data.tokens_per_example={d.tokens_per_example}',
  )
  yield (
    'data.format',
    d.format != 'template' or c.model.source.partition(':')[0] != 'random',
    f'model.source={c.model.source} has no chat template: name a model made for chats, '
    "such as smollm2_135m, or take 'chat'",
  )
