"""What PEFT and transformers make of exported folders.

Runs in the environment of the peers, which has torch (`make .venv-bench/done`):

  .venv-bench/bin/python tests/peft_parity.py MODEL ADAPTER IDS.npz OUT.npz
  .venv-bench/bin/python tests/peft_parity.py golden

MODEL is a folder or a .gguf file, ADAPTER a PEFT folder or '' for none. The
first form writes what `make_reference_logprobs.reference` makes of the texts
IDS.npz[ids_0], ...; the second adapters that PEFT saved, on the tiny models,
and their references, into golden/.
"""

import pathlib
import sys

import numpy as np
import peft
import torch
import transformers
from make_reference_logprobs import GOLDEN, reference, save

# What PEFT can tell matrices apart by: ranks and alphas, by name or suffix, and
# the root of rsLoRA.
ADAPTERS = {
  'llama': dict(
    target_modules=['q_proj', 'v_proj', 'down_proj'], r=3, lora_alpha=5,
    use_rslora=True, rank_pattern={'layers.1.self_attn.q_proj': 2},
    alpha_pattern={'down_proj': 7, 'model.layers.2.self_attn.v_proj': 1.5},
  ),
  'gemma3': dict(
    target_modules=['q_proj', 'o_proj', 'gate_proj'], r=4, lora_alpha=8,
    rank_pattern={'gate_proj': 2}, alpha_pattern={'gate_proj': 4},
  ),
}  # fmt: skip


def load(path, adapter=''):
  """Loads a model, and an adapter on it, in float32."""
  path = pathlib.Path(path)
  source = dict(pretrained_model_name_or_path=path)
  if path.suffix == '.gguf':
    source = dict(pretrained_model_name_or_path=path.parent, gguf_file=path.name)
  model = transformers.AutoModelForCausalLM.from_pretrained(
    **source, dtype=torch.float32, attn_implementation='eager'
  )
  if adapter:
    model = peft.PeftModel.from_pretrained(model, adapter)
  return model.eval()


def texts_of(path):
  ids = np.load(path)
  return [ids[f'ids_{i}'].tolist() for i in range(sum('ids_' in k for k in ids))]


def make_golden(family):
  torch.manual_seed(0)
  config = peft.LoraConfig(task_type='CAUSAL_LM', **ADAPTERS[family])
  model = peft.get_peft_model(load(GOLDEN / f'tiny_{family}'), config).eval()
  for name, x in model.named_parameters():
    if 'lora_B' in name:
      x.data = 0.3 * torch.randn_like(x)
  model.peft_config['default'].base_model_name_or_path = f'tiny_{family}'
  folder = GOLDEN / f'peft_tiny_{family}'
  model.save_pretrained(folder)
  (folder / 'README.md').unlink(missing_ok=True)
  texts = texts_of(GOLDEN / f'reference_tiny_{family}.npz')
  save(f'peft_tiny_{family}', reference(model, texts, 7))


def main(*args):
  if args == ('golden',):
    for family in ADAPTERS:
      make_golden(family)
    return
  model, adapter, ids, out = args
  np.savez(out, **reference(load(model, adapter), texts_of(ids), 8192))


if __name__ == '__main__':
  main(*sys.argv[1:])
