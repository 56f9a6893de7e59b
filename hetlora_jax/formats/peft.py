"""Adapters as PEFT keeps them: adapter_config.json, adapter_model.safetensors.

PEFT adds `alpha / r B A` to a matrix, of lora_A [r, d_in] and lora_B [d_out, r];
`rank_pattern` and `alpha_pattern` name the matrices that differ from the others.
"""

from __future__ import annotations

import math
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from hetlora_jax import files
from hetlora_jax.formats import hf_folder, layout
from hetlora_jax.types import Adapters, Lora

CONFIG, WEIGHTS = 'adapter_config.json', 'adapter_model.safetensors'
PREFIX = 'base_model.model.'  # that PEFT puts before the names of modules
# Each is more than `alpha / r B A`, if it is set.
REFUSED = (
  'use_dora', 'use_qalora', 'use_bdlora', 'lora_bias', 'fan_in_fan_out',
  'modules_to_save', 'trainable_token_indices', 'target_parameters',
  'layer_replication', 'megatron_config', 'alora_invocation_tokens',
  'arrow_config', 'kasa_config', 'monteclora_config', 'velora_config',
)  # fmt: skip
# The initialisations that leave the base as it is.
PLAIN_INITS = (True, False, None, 'gaussian', 'eva', 'orthogonal')
AGAIN = 'save the adapter again with PEFT'

Layers = Mapping[str, Sequence[Lora]]  # target -> a [d_in, r], b [r, d_out]


class Padded(NamedTuple):
  """An adapter in R slots, and which of them are its own."""

  adapter: Lora  # numpy, zero in the other slots
  live: np.ndarray  # [L, R] bool


def module(target: str, layer: int) -> str:
  """Returns the name of a matrix in transformers."""
  return f'model.layers.{layer}.{hf_folder.MATRICES[target]}'


def write(folder: pathlib.Path, layers: Layers, scale: float, base: str) -> None:
  """Writes an adapter of any ranks whose product counts `scale` times.

  The factors are written as they are: alpha is scale * r of each matrix, which
  is exact in float64 for a scale of float32.
  """
  tensors, rank = {}, {}
  for target, factors in layers.items():
    for i, x in enumerate(factors):
      name = module(target, i)
      rank[name] = x.a.shape[-1]
      tensors[f'{PREFIX}{name}.lora_A.weight'] = np.ascontiguousarray(x.a.T)
      tensors[f'{PREFIX}{name}.lora_B.weight'] = np.ascontiguousarray(x.b.T)
  files.write_json(folder / CONFIG, _config(rank, list(layers), scale, base))
  hf_folder.write_tensors(folder / WEIGHTS, tensors)


def _config(
  rank: Mapping[str, int], targets: Sequence[str], scale: float, base: str
) -> dict[str, Any]:
  most = max(rank.values())
  others = {name: r for name, r in rank.items() if r != most}
  return {
    'peft_type': 'LORA',
    'task_type': 'CAUSAL_LM',
    'base_model_name_or_path': base,
    'r': most,
    'lora_alpha': _alpha(scale, most),
    'rank_pattern': others,
    'alpha_pattern': {name: _alpha(scale, r) for name, r in others.items()},
    'target_modules': [hf_folder.MATRICES[t].split('.')[-1] for t in targets],
    'use_rslora': False,
    'use_dora': False,
    'lora_dropout': 0.0,
    'bias': 'none',
    'fan_in_fan_out': False,
    'init_lora_weights': True,
    'inference_mode': True,
  }


def _alpha(scale: float, r: int) -> float:
  """Returns what is `scale` over r, as an int where it is one, as PEFT has it."""
  alpha = scale * r
  return int(alpha) if alpha.is_integer() else alpha


def read(folder: pathlib.Path, like: Adapters, scale: float) -> dict[str, Padded]:
  """Reads an adapter in the slots of `like`, so that `scale A B` is PEFT's.

  The factors are kept if PEFT's alpha / r is `scale`; otherwise B takes up the
  ratio.

  Args:
    folder: of PEFT.
    like: its targets and shapes are those wanted; values are not read.
    scale: the LoRA scale, above 0.

  Raises:
    FileNotFoundError, OSError: a file is missing or cannot be read.
    ValueError: the adapter is damaged, of a kind that is not supported, or does
      not fit.
  """
  config = files.read_json(folder / CONFIG, AGAIN)
  _check_kind(folder, config)
  names = _names(folder, like)
  return {t: _padded(folder, config, names, t, x, scale) for t, x in like.items()}


def _check_kind(folder: pathlib.Path, config: Mapping[str, Any]) -> None:
  """Raises ValueError unless the adapter is plain LoRA."""
  odd = [name for name in REFUSED if config.get(name)]
  if config.get('peft_type') != 'LORA':
    odd.append('peft_type')
  if config.get('bias', 'none') != 'none':
    odd.append('bias')
  if config.get('init_lora_weights', True) not in PLAIN_INITS:
    odd.append('init_lora_weights')  # these change the base
  if odd:
    what = f'sets {odd[0]}={files.short(repr(config.get(odd[0])), 60)}'
    remedy = (
      "give a plain LoRA adapter, or merge it and make that config.model's source"
    )
    raise files.unsupported(folder / CONFIG, what, remedy)


def _names(folder: pathlib.Path, like: Adapters) -> dict[tuple, str]:
  """Returns (target, layer, 'A' or 'B') -> the name of its tensor."""
  path = folder / WEIGHTS
  if not path.exists() and (folder / 'adapter_model.bin').exists():
    raise ValueError(
      f'{folder} has its weights as a pickle, which is not read: save the '
      'adapter again with safe_serialization=True.'
    )
  with hf_folder.open_file(path) as file:
    found = set(file.offset_keys())
  # Gemma 3 with vision nests its layers one deeper.
  prefix = min(found, default='').partition('layers.')[0]
  want = {
    (t, i, x): f'{prefix}{module(t, i).removeprefix("model.")}.lora_{x}.weight'
    for t in like
    for i in range(like[t].a.shape[0])
    for x in 'AB'
  }
  for side, names in (
    ('lacks', set(want.values()) - found),
    ('has', found - set(want.values())),
  ):
    if names:
      raise ValueError(
        f'{path} {side} the tensor {files.short(min(names))}, unlike '
        f'config.lora.targets={tuple(like)} in all {len(want) // 2} matrices: '
        'give the targets that it was trained on, or another adapter.'
      )
  return want


def _padded(
  folder: pathlib.Path,
  config: Mapping[str, Any],
  names: Mapping[tuple, str],
  target: str,
  like: Lora,
  scale: float,
) -> Padded:
  """Stacks the layers of a target."""
  path = folder / WEIGHTS
  a, b = (np.zeros(x.shape, np.float32) for x in like)
  live = np.zeros((a.shape[0], a.shape[-1]), bool)
  for i in range(a.shape[0]):
    down, up = (_tensor(path, names[target, i, x]) for x in 'AB')
    r = _check_shapes(path, names[target, i, 'A'], down, up, a[i], b[i])
    ratio = _scale(folder, config, names[target, i, 'A'], r) / scale
    a[i, :, :r], b[i, :r], live[i, :r] = down.T, up.T * np.float32(ratio), True
  if not np.isfinite(b).all():
    raise files.damaged(path, f'{target} times alpha / r overflows', AGAIN)
  return Padded(Lora(a, b), live)


def _tensor(path: pathlib.Path, name: str) -> np.ndarray:
  tensor = hf_folder.read_tensor(path, name).astype(np.float32)
  most = layout.LARGEST
  if not (tensor.size and -most < tensor.min() and tensor.max() < most):
    raise files.damaged(path, f'{name} is empty or not finite', AGAIN)
  return tensor


def _check_shapes(
  path: pathlib.Path,
  name: str,
  down: np.ndarray,
  up: np.ndarray,
  a: np.ndarray,
  b: np.ndarray,
) -> int:
  """Returns the rank of a matrix; raises ValueError if it does not fit."""
  r = down.shape[0] if down.ndim else 0
  want = ((r, a.shape[0]), (b.shape[1], r))
  if (down.shape, up.shape) != want:
    raise ValueError(
      f'{path}: {name} and its lora_B have shapes {down.shape} and {up.shape}, '
      f'want {want}: give an adapter of this base model.'
    )
  if r > a.shape[1]:
    raise ValueError(
      f'{path}: {name} has rank {r}, above config.federated.r_max='
      f'{a.shape[1]}: raise r_max.'
    )
  return r


def _scale(folder: pathlib.Path, config: Mapping[str, Any], name: str, r: int) -> float:
  """Returns what PEFT multiplies B A with; `name` is of the tensor A."""
  path = folder / CONFIG
  name = name.removeprefix(PREFIX).removesuffix('.lora_A.weight')
  said = _of_module(path, config, 'rank_pattern', name, config.get('r'))
  alpha = _of_module(path, config, 'alpha_pattern', name, config.get('lora_alpha'))
  rooted = config.get('use_rslora', False)
  if said != r:
    why = f'its rank of {name} is {said}, that of the weights {r}'
    raise files.damaged(path, why, AGAIN)
  if not _is_number(alpha) or type(rooted) is not bool:
    why = f'lora_alpha of {name} is {alpha!r} and use_rslora {rooted!r}'
    raise files.damaged(path, why, AGAIN)
  return alpha / (math.sqrt(r) if rooted else r)


def _is_number(value: Any) -> bool:
  return type(value) in (int, float) and abs(value) < layout.LARGEST


def _of_module(
  path: pathlib.Path,
  config: Mapping[str, Any],
  field: str,
  name: str,
  default: Any,
) -> Any:
  """Returns the value of the first pattern that names a module.

  PEFT's patterns are regular expressions, matched at the end of a name; names
  alone are understood here.
  """
  patterns = config.get(field) or {}
  if not isinstance(patterns, dict):
    raise files.damaged(path, f'{field} is {patterns!r}', AGAIN)
  for pattern, value in patterns.items():
    plain = pattern.replace('\\.', '.')
    if not re.fullmatch(r'\^?[\w.]+', plain):
      raise ValueError(
        f'{path} has the {field} {files.short(pattern)!r}, which is not '
        'supported: name each module instead.'
      )
    whole = plain.startswith('^') and name == plain[1:]
    if whole or f'.{name}'.endswith(f'.{plain}'):
      return value
  return default
