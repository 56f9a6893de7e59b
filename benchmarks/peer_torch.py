"""The peer: torch + transformers + peft, clients one after another.

A child process of benchmarks/peers.py, in a virtual environment of its own:

  python benchmarks/peer_torch.py WORKLOAD.json

Reads one JSON object a line ({"case", "dtype", "padding"} and, if not all,
"clients"), trains the clients of that case for one round, and answers with
seconds, tokens, loss and memory.
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


def load(path, dtype):
  """Loads the base from its GGUF, frozen."""
  path = pathlib.Path(path)
  model = transformers.AutoModelForCausalLM.from_pretrained(
    path.parent, gguf_file=path.name, dtype=torch.float32
  )
  # Asked for bfloat16 at once, it may keep the weights packed.
  return model.to(DTYPES[dtype]).requires_grad_(False)


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
  return {'input_ids': ids, 'attention_mask': mask, 'labels': labels}


def factors(model, rank):
  """Returns the adapter's parameters by name."""
  return {
    name: p for name, p in model.named_parameters() if f'.r{rank}.' in name
  }


def train_client(model, client, sent, work, padding):
  """Trains one client from the global adapters; returns them, loss, tokens."""
  rank = client['rank']
  model.set_adapter(f'r{rank}')
  own = factors(model, rank)
  for name, p in own.items():
    slots = sent[name.replace(f'.r{rank}.', '.')]
    p.data.copy_(slots[:rank] if 'lora_A' in name else slots[:, :rank])
  optimizer = torch.optim.Adam(own.values(), lr=work['learning_rate'])
  losses, tokens = [], 0
  for step in client['steps']:
    count = sum(example['num_target'] for example in step)
    if not count:
      continue
    loss = model(**pad(step, padding, 0)).loss
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    losses.append(loss.item())
    tokens += count
  return own, losses, tokens


def one_round(model, clients, sent, work, padding):
  """Trains all clients and averages their zero-padded adapters."""
  total = {name: torch.zeros_like(p) for name, p in sent.items()}
  first, tokens = None, 0
  for client in clients:
    own, losses, count = train_client(model, client, sent, work, padding)
    first, tokens = first or losses[0], tokens + count
    for name, p in own.items():
      slots = total[name.replace(f'.r{client["rank"]}.', '.')]
      part = slots[: client['rank']] if 'lora_A' in name else slots[:, : client['rank']]  # fmt: skip
      part += p.detach() / len(clients)
  return total, first, tokens


def initial(model, work):
  """Draws the global adapters: A normal, B zero."""
  rank = max(client['rank'] for client in work['cases']['chat'])
  sent = {}
  for name, p in factors(model, rank).items():
    draw = torch.randn_like(p) / p.shape[-1] ** 0.5 if 'lora_A' in name else torch.zeros_like(p)  # fmt: skip
    sent[name.replace(f'.r{rank}.', '.')] = draw
  return sent


def main():
  work = json.loads(pathlib.Path(sys.argv[1]).read_text())
  torch.set_num_threads(work['threads'])
  models = {}
  for line in sys.stdin:
    ask = json.loads(line)
    if ask['dtype'] not in models:
      models.clear()  # one model in memory at a time
      model = load(work['gguf'], ask['dtype'])
      ranks = sorted({client['rank'] for client in work['cases']['chat']})
      models[ask['dtype']] = with_adapters(model, work, ranks)
    model = models[ask['dtype']]
    clients = work['cases'][ask['case']][: ask.get('clients')]
    sent = initial(model, work)
    start = time.perf_counter()
    _, loss, tokens = one_round(
      model, clients, copy.copy(sent), work, ask['padding']
    )
    answer = {
      'seconds': time.perf_counter() - start,
      'tokens': tokens,
      'first_loss': loss,
      'peak_mb': resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6,
      'versions': {m.__name__: m.__version__ for m in (torch, transformers, peft)},
    }  # fmt: skip
    print(json.dumps(answer), flush=True)


if __name__ == '__main__':
  main()
