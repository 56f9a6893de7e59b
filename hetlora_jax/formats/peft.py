"""Adapters as PEFT keeps them: adapter_config.json, adapter_model.safetensors.

PEFT adds `alpha / r B A` to a matrix, of lora_A [r, d_in] and lora_B [d_out, r];
`rank_pattern` and `alpha_pattern` name the matrices that differ from the others.
"""

from __future__ import annotations

import collections
import math
import pathlib
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from hetlora_jax import files
from hetlora_jax.formats import hf_folder, layout
from hetlora_jax.formats.hf_folder import FUSED, MATRICES
from hetlora_jax.models.decoder import DecoderConfig, matrix_dims
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


def module(target: str, layer: int, fused: Mapping[str, str]) -> str:
  """Returns the name of a matrix in transformers; `fused` has those of some."""
  return f'model.layers.{layer}.{fused.get(target, MATRICES[target])}'


def write(
  folder: pathlib.Path,
  layers: Layers,
  scale: float,
  base: str,
  c: DecoderConfig,
  revision: str | None = None,
) -> None:
  """Writes an adapter of any ranks whose product counts `scale` times.

  The factors are written as they are: alpha is scale * r of each matrix, which
  is exact in float64 for a scale of float32. Those of matrices that are one in
  transformers become one, of the ranks' sum: A beside A, B in blocks.
  """
  fused, tensors, rank = FUSED.get(c.family, {}), {}, {}
  for name, x in joined(layers, c, lambda t, i: module(t, i, fused)).items():
    rank[name] = x.a.shape[-1]
    tensors[f'{PREFIX}{name}.lora_A.weight'] = np.ascontiguousarray(x.a.T)
    tensors[f'{PREFIX}{name}.lora_B.weight'] = np.ascontiguousarray(x.b.T)
  about = _config(rank, scale, base)
  files.write_json(folder / CONFIG, about | {'revision': revision})
  hf_folder.write_tensors(folder / WEIGHTS, tensors)


def joined(
  layers: Layers, c: DecoderConfig, name: Callable[[str, int], str]
) -> dict[str, Lora]:
  """Returns an adapter for each name that (target, layer) have in a format.

  Targets of one name are parts of one matrix, whose columns are theirs in order.
  """
  parts, dims = collections.defaultdict(dict), matrix_dims(c)
  for target, factors in layers.items():
    for i, x in enumerate(factors):
      parts[i, name(target, i)][target] = x
  found = {}
  for (i, whole), own in parts.items():
    together = [t for t in dims if name(t, i) == whole]
    ends = np.cumsum([dims[t][1] for t in together])
    blocks = [
      np.pad(own[t].b, ((0, 0), (end - dims[t][1], ends[-1] - end)))
      for t, end in zip(together, ends, strict=True)
      if t in own  # one without an adapter stays as it is
    ]
    a = np.concatenate([own[t].a for t in together if t in own], 1)
    found[whole] = Lora(a, np.concatenate(blocks))
  return found


def _config(rank: Mapping[str, int], scale: float, base: str) -> dict[str, Any]:
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
    'target_modules': [*dict.fromkeys(name.split('.')[-1] for name in rank)],
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
  ratio. That of several matrices that are one in transformers is cut into theirs;
  a slot that only another of them needs is left out.

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
  found = _found(folder)
  modules = {name.split('.lora_')[0].rpartition('.')[2] for name in found}
  fused = {
    t: end
    for of_family in FUSED.values()
    for t, end in of_family.items()
    if end.rpartition('.')[2] in modules
  }
  parts = {}
  for t in like:
    parts[t] = [x for x in fused if fused[x] == fused.get(t)] or [t]
    if absent := [x for x in parts[t] if x not in like]:
      raise files.Damaged(
        f'{folder / WEIGHTS} adapts {", ".join(parts[t])} as one matrix, but '
        f'config.lora.targets={tuple(like)}: add {", ".join(absent)}.'
      )
  names = _names(folder, like, fused, found)
  return {t: _padded(folder, config, names[t], like, parts[t], t, scale) for t in like}


def _check_kind(folder: pathlib.Path, config: Mapping[str, Any]) -> None:
  """Raises Damaged unless the adapter is plain LoRA."""
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


def _found(folder: pathlib.Path) -> set[str]:
  """Returns the names of an adapter's tensors."""
  path = folder / WEIGHTS
  if not path.exists() and (folder / 'adapter_model.bin').exists():
    what = 'has its weights as a pickle'
    remedy = 'save the adapter again with safe_serialization=True'
    raise files.unsupported(folder, what, remedy)
  with hf_folder.open_file(path) as file:
    found = set(file.offset_keys())
  for name in sorted(name for name in found if 'layers.' not in name):
    remedy = 'train matrices of layers alone, or merge it and give that as model.source'
    raise files.unsupported(path, f'has the tensor {files.short(name)}', remedy)
  return found


def _names(
  folder: pathlib.Path, like: Adapters, fused: Mapping[str, str], found: set[str]
) -> dict[str, list[tuple[str, str]]]:
  """Returns target -> the names of its lora_A and lora_B in every layer."""
  path = folder / WEIGHTS
  # Gemma 3 with vision nests its layers one deeper.
  prefix = min(found, default='').partition('layers.')[0]
  names: dict[str, list[tuple[str, str]]] = {t: [] for t in like}
  for t, factors in like.items():
    for layer in range(factors.a.shape[0]):
      stem = f'{prefix}{module(t, layer, fused).removeprefix("model.")}'
      names[t].append((f'{stem}.lora_A.weight', f'{stem}.lora_B.weight'))
  want = {name for pairs in names.values() for pair in pairs for name in pair}
  for side, odd in (('lacks', want - found), ('has', found - want)):
    if odd:
      raise files.Damaged(
        f'{path} {side} the tensor {files.short(min(odd))}, unlike '
        f'config.lora.targets={tuple(like)} in all {len(want) // 2} matrices: '
        'give the targets that it was trained on, or another adapter.'
      )
  return names


def _padded(
  folder: pathlib.Path,
  config: Mapping[str, Any],
  names: Sequence[tuple[str, str]],
  like: Adapters,
  parts: Sequence[str],
  target: str,
  scale: float,
) -> Padded:
  """Stacks the layers of a target, which is one of `parts` of a matrix."""
  path = folder / WEIGHTS
  a, b = (np.zeros(x.shape, np.float32) for x in like[target])
  live = np.zeros((a.shape[0], a.shape[-1]), bool)
  widths = np.cumsum([0] + [like[t].b.shape[-1] for t in parts])
  at = parts.index(target)
  for i, pair in enumerate(names):
    down, up = _factors(path, pair, a[i].shape[0], int(widths[-1]))
    ratio = np.float32(_scale(folder / CONFIG, config, pair[0], len(down)) / scale)
    used, up = up.any(0), up[widths[at] : widths[at + 1]]
    needed = up.any(0) | ~used
    down, up = down[needed], up[:, needed]
    r = len(down)
    if r > a.shape[-1]:
      raise files.Damaged(
        f'{path}: {pair[0]} has rank {r}, above config.federated.r_max='
        f'{a.shape[-1]}: raise r_max.'
      )
    a[i, :, :r], b[i, :r], live[i, :r] = down.T, up.T * ratio, True
    if not np.isfinite(b[i]).all():
      raise files.damaged(path, f'{pair[1]} times alpha / r overflows', AGAIN)
  return Padded(Lora(a, b), live)


def _factors(
  path: pathlib.Path, names: tuple[str, str], d_in: int, d_out: int
) -> tuple[np.ndarray, np.ndarray]:
  """Reads lora_A [r, d_in] and lora_B [d_out, r] of a matrix, in float32."""
  down, up = (hf_folder.read_tensor(path, n).astype(np.float32) for n in names)
  for name, tensor in zip(names, (down, up), strict=True):
    if not layout.is_finite(tensor):
      raise files.damaged(path, f'{name} is empty or not finite', AGAIN)
  r = down.shape[0] if down.ndim else 0
  want = ((r, d_in), (d_out, r))
  if (down.shape, up.shape) != want:
    raise files.Damaged(
      f'{path}: {names[0]} and its lora_B have shapes {down.shape} and {up.shape}, '
      f'want {want}: give an adapter of this base model.'
    )
  return down, up


def _scale(path: pathlib.Path, config: Mapping[str, Any], name: str, r: int) -> float:
  """Returns what PEFT multiplies B A with; `name` is of the tensor A."""
  name = name.removeprefix(PREFIX).removesuffix('.lora_A.weight')
  said = _of_module(path, config, 'rank_pattern', name, config.get('r'))
  alpha = _of_module(path, config, 'alpha_pattern', name, config.get('lora_alpha'))
  rooted = config.get('use_rslora', False)
  if said != r:
    why = f'its rank of {name} is {said}, that of the weights {r}'
    raise files.damaged(path, why, AGAIN)
  number = type(alpha) in (int, float) and abs(alpha) < layout.LARGEST
  if not number or type(rooted) is not bool:
    why = f'lora_alpha of {name} is {alpha!r} and use_rslora {rooted!r}'
    raise files.damaged(path, why, AGAIN)
  return alpha / (math.sqrt(r) if rooted else r)


def _of_module(
  path: pathlib.Path, config: Mapping[str, Any], field: str, name: str, default: Any
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
      what = f'has the {field} {files.short(pattern)!r}'
      raise files.unsupported(path, what, 'name each module instead')
    whole = plain.startswith('^') and name == plain[1:]
    if whole or f'.{name}'.endswith(f'.{plain}'):
      return value
  return default
