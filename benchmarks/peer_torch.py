"""The peer: torch + transformers + peft, clients one after another.

A child process of benchmarks/peers.py and benchmarks/accelerator.py, in their
virtual environment:

  python benchmarks/peer_torch.py WORKLOAD.json

Reads one JSON object a line, {"case", "dtype", "padding"} and perhaps "clients"
(if not all), "attention" (its kernels) and "compiled"; trains the clients of that
case for one round, on a GPU if there is one, and answers with seconds, tokens, loss
and memory, or with why it "failed".
"""

import copy
import json
import pathlib
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


def factors(model, rank):
  """Returns the adapter's parameters by name."""
  return {
    name: p for name, p in model.named_parameters() if f'.r{rank}.' in name
  }


def slots(name, x, rank):
  """Returns the first slots of a factor."""
  return x[:rank] if 'lora_A' in name else x[:, :rank]


def train_client(model, client, sent, work, padding, adapter=None, call=None):
  """Trains one client from the global adapters; returns them, losses, tokens.

  Args:
    model: with adapters.
    client: its rank and steps.
    sent: the global adapters.
    work: the workload.
    padding: 'longest', or a length.
    adapter: rank of the one to use, whose slots past the client's are zero, as
      are their gradients then; its own if it is left out.
    call: the model compiled, if it is.
  """
  adapter = adapter or client['rank']
  model.set_adapter(f'r{adapter}')
  own = factors(model, adapter)
  for name, p in own.items():
    p.data.zero_()
    received = slots(
      name, sent[name.replace(f'.r{adapter}.', '.')], client['rank']
    )
    slots(name, p.data, client['rank']).copy_(received)
  optimizer = torch.optim.Adam(
    own.values(), lr=work['learning_rate'], fused=DEVICE == 'cuda'
  )
  losses, tokens = [], 0
  for step in client['steps']:
    count = sum(example['num_target'] for example in step)
    if not count:
      continue
    forward = model if call is None else call
    loss = forward(**pad(step, padding, 0)).loss
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    losses.append(loss.detach().clone())  # read at the end: nothing waits
    tokens += count
  return own, [loss.item() for loss in losses], tokens


def one_round(model, clients, sent, work, padding, adapter=None, call=None):
  """Trains all clients and averages their zero-padded adapters."""
  total = {name: torch.zeros_like(p) for name, p in sent.items()}
  first, tokens = None, 0
  for client in clients:
    own, losses, count = train_client(
      model, client, sent, work, padding, adapter, call
    )
    first, tokens = first or losses[0], tokens + count
    for name, p in own.items():
      whole = total[name.replace(f'.r{adapter or client["rank"]}.', '.')]
      part = slots(name, whole, client['rank'])
      part += slots(name, p.detach(), client['rank']) / len(clients)
  return total, first, tokens


def initial(model, work):
  """Draws the global adapters: A normal, B zero."""
  rank = largest_rank(work)
  sent = {}
  for name, p in factors(model, rank).items():
    draw = torch.randn_like(p) / p.shape[-1] ** 0.5 if 'lora_A' in name else torch.zeros_like(p)  # fmt: skip
    sent[name.replace(f'.r{rank}.', '.')] = draw
  return sent


def largest_rank(work):
  clients = next(iter(work['cases'].values()))
  return max(client['rank'] for client in clients)


def answer(model, call, work, ask):
  """Trains a round and returns what it took."""
  clients = work['cases'][ask['case']][: ask.get('clients')]
  sent = initial(model, work)
  adapter = None if call is None else largest_rank(work)
  start = time.perf_counter()
  _, loss, tokens = one_round(
    model, clients, copy.copy(sent), work, ask['padding'], adapter, call
  )
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
  models = {}
  for line in sys.stdin:
    ask = json.loads(line)
    key = ask['dtype'], ask.get('attention'), ask.get('compiled', False)
    if key not in models:
      models.clear()  # one model in memory at a time
      model = load(work['model'], *key[:2])
      ranks = sorted(
        {c['rank'] for case in work['cases'].values() for c in case}
      )
      model = with_adapters(model, work, ranks)
      call = torch.compile(model, mode='reduce-overhead') if key[2] else None
      models[key] = model, call
    try:
      found = answer(*models[key], work, ask)
    except Exception as error:  # of a compiler; then other variants are tried
      if not ask.get('compiled'):
        raise
      found = {'seconds': 0, 'failed': str(error)[:300]}
    print(json.dumps(found), flush=True)


if __name__ == '__main__':
  main()
