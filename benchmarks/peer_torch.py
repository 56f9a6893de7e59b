"""The peer: torch + transformers + peft, clients one after another.

A child process of benchmarks/peers.py and benchmarks/accelerator.py, in their
virtual environment:

  python benchmarks/peer_torch.py WORKLOAD.json

Reads one JSON object a line, {"case", "dtype", "padding"} and perhaps "clients"
(if not all), "attention" (its kernels), "one_adapter" and "compiled" (see Trainer);
trains the clients of that case for one round, on a GPU if there is one, and answers
with seconds, tokens, loss and memory, or with why it "failed".
"""

import json
import pathlib
import re
import resource
import sys
import time

import peft
import torch
import transformers

DTYPES = {'float32': torch.float32, 'bfloat16': torch.bfloat16}
DEVICE = 'cuda' if torch.cuda.is_available() else 'cpu'


def load(path, dtype, attention=None):
  """Loads the base from a GGUF file or a Hugging Face folder, frozen."""
  path = pathlib.Path(path)
  where = [path, None] if path.is_dir() else [path.parent, path.name]
  model = transformers.AutoModelForCausalLM.from_pretrained(
    where[0], gguf_file=where[1], dtype=torch.float32,
    attn_implementation=attention,
  )  # fmt: skip
  # Asked for bfloat16 at once, it may keep the weights packed.
  return model.to(DEVICE, DTYPES[dtype]).requires_grad_(False)


def with_adapters(model, work, ranks):
  """Adds an adapter of each rank, so that none is made in a round."""
  for i, rank in enumerate(ranks):
    lora = peft.LoraConfig(
      r=rank,
      lora_alpha=work['scale'] * rank,
      target_modules=[f'{t}_proj' for t in work['targets']],
    )
    if i == 0:
      model = peft.get_peft_model(model, lora, adapter_name=f'r{rank}')
    else:
      model.add_adapter(f'r{rank}', lora)
  return model.train()


def pad(step, padding, pad_id):
  """Returns token ids, attention mask and labels of one step's examples."""
  longest = max(len(example['tokens']) for example in step)
  length = longest if padding == 'longest' else max(longest, int(padding))
  ids = torch.full((len(step), length), pad_id)
  mask, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
  for row, example in enumerate(step):
    tokens = torch.tensor(example['tokens'])
    count, targets = len(tokens), example['num_target']
    ids[row, :count], mask[row, :count] = tokens, 1
    labels[row, count - targets : count] = tokens[-targets:]
  batch = {'input_ids': ids, 'attention_mask': mask, 'labels': labels}
  return {name: x.to(DEVICE, non_blocking=True) for name, x in batch.items()}


def slots(name, x, rank):
  """Returns the first slots of a factor."""
  return x[:rank] if 'lora_A' in name else x[:, :rank]


class Trainer:
  """A model with adapters: of every rank, or one of the largest.

  In that one the slots past a client's rank are zero in both factors, and so are
  their gradients: it trains as its own adapter would, and none is ever switched.
  """

  def __init__(self, model, work, one_adapter=False, compiled=False):
    ranks = sorted({c['rank'] for case in work['cases'].values() for c in case})
    self.largest, self.work, self.one = ranks[-1], work, one_adapter
    self.model = with_adapters(model, work, ranks[-1:] if one_adapter else ranks)
    self.model.set_adapter(f'r{self.largest}')
    self.forward = self.model
    if compiled:
      self.forward = torch.compile(self.model, mode='reduce-overhead')
    self._factors = {}
    for name, p in self.model.named_parameters():
      found = re.search(r'\.r(\d+)\.', name)
      if found:
        own = self._factors.setdefault(int(found[1]), {})
        own[name.replace(found[0], '.')] = p

  def initial(self):
    """Draws the global adapters: A normal, B zero."""
    draw = {
      'lora_A': lambda p: torch.randn_like(p) / p.shape[-1] ** 0.5,
      'lora_B': torch.zeros_like,
    }
    return {
      name: draw['lora_A' if 'lora_A' in name else 'lora_B'](p)
      for name, p in self._factors[self.largest].items()
    }

  def train_client(self, client, sent, padding):
    """Trains one client from the global adapters; returns them, losses, tokens."""
    rank = client['rank']
    own = self._factors[self.largest if self.one else rank]
    if not self.one:
      self.model.set_adapter(f'r{rank}')
    for name, p in own.items():
      p.data.zero_()
      slots(name, p.data, rank).copy_(slots(name, sent[name], rank))
    optimizer = torch.optim.Adam(
      own.values(), lr=self.work['learning_rate'], fused=DEVICE == 'cuda'
    )
    losses, tokens = [], 0
    for step in client['steps']:
      count = sum(example['num_target'] for example in step)
      if not count:
        continue
      loss = self.forward(**pad(step, padding, 0)).loss
      optimizer.zero_grad()
      loss.backward()
      optimizer.step()
      losses.append(loss.detach().clone())  # read at the end: nothing waits
      tokens += count
    return own, losses, tokens

  def one_round(self, clients, sent, padding):
    """Trains all clients and averages their zero-padded adapters."""
    total = {name: torch.zeros_like(p) for name, p in sent.items()}
    first, tokens = None, 0
    for client in clients:
      own, losses, count = self.train_client(client, sent, padding)
      first, tokens = losses[0] if first is None else first, tokens + count
      for name, p in own.items():
        part = slots(name, total[name], client['rank'])
        part += slots(name, p.detach(), client['rank']) / len(clients)
    return total, first.item(), tokens


def answer(trainer, ask):
  """Trains a round and returns what it took."""
  clients = trainer.work['cases'][ask['case']][: ask.get('clients')]
  sent = trainer.initial()
  start = time.perf_counter()
  _, loss, tokens = trainer.one_round(clients, sent, ask['padding'])
  if DEVICE == 'cuda':
    torch.cuda.synchronize()
  return {
    'seconds': time.perf_counter() - start,
    'tokens': tokens,
    'first_loss': loss,
    'peak_mb': resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6,
    'device_mb': torch.cuda.max_memory_allocated() / 1e6 if DEVICE == 'cuda' else 0,
    'versions': {m.__name__: m.__version__ for m in (torch, transformers, peft)},
  }  # fmt: skip


def main():
  work = json.loads(pathlib.Path(sys.argv[1]).read_text())
  torch.set_num_threads(work['threads'])
  trainers = {}
  for line in sys.stdin:
    ask = json.loads(line)
    names = ('dtype', 'attention', 'one_adapter', 'compiled')
    key = tuple(ask.get(name) for name in names)
    if key not in trainers:
      trainers.clear()  # one model in memory at a time
      model = load(work['model'], *key[:2])
      trainers[key] = Trainer(model, work, *key[2:])
    try:
      found = answer(trainers[key], ask)
    except Exception as error:  # of a compiler; then other variants are tried
      if not ask.get('compiled'):
        raise
      found = {'seconds': 0, 'failed': str(error)[:300]}
    print(json.dumps(found), flush=True)


if __name__ == '__main__':
  main()
