"""HetLoRA and its family: federated LoRA with a rank for every client, in JAX.

  import hetlora_jax as hl
  run = hl.train('configs/tiny.py', 'runs/tiny')
  run.history.plot()

Start reading at `hetlora_jax.rounds`. Importing this changes nothing global.
"""

from hetlora_jax.base_model import own as own_model
from hetlora_jax.config import Config, ConfigError, default_config, resolve
from hetlora_jax.methods.registry import METHODS, ROLES, Method, declare, rule
from hetlora_jax.rounds import federated_round
from hetlora_jax.run import Run
from hetlora_jax.stopping import STOP
from hetlora_jax.training import train

__all__ = [
  'METHODS',
  'ROLES',
  'STOP',
  'Config',
  'ConfigError',
  'Method',
  'Run',
  'declare',
  'default_config',
  'federated_round',
  'own_model',
  'resolve',
  'rule',
  'train',
]
