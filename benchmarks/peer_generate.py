"""The peer: transformers' generate with its cache.

A child process of benchmarks/generation.py, in a virtual environment of its own:

  python benchmarks/peer_generate.py WORKLOAD.json

Reads one JSON object a line, {"new_tokens"}, completes all prompts greedily, and
answers with seconds, tokens and memory; {"new_tokens": 0} reads the texts
instead and answers with the loss of their targets.
"""

import json
import pathlib
import resource
import sys
import time

import peer_torch
import torch
import transformers


def generate(model, prompts, new_tokens):
  """Completes prompts by exactly so many tokens; returns them."""
  longest = max(map(len, prompts))
  ids = torch.tensor([[0] * (longest - len(p)) + p for p in prompts])
  mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
  out = model.generate(
    ids, attention_mask=mask, max_new_tokens=new_tokens, do_sample=False,
    use_cache=True, pad_token_id=0,
  )  # fmt: skip
  return out[:, longest:].tolist()


def loss(model, texts):
  """Sums the losses of the targets, a text after the other."""
  total = 0.0
  for text in texts:
    ids, targets = torch.tensor([text['tokens']]), text['num_target']
    log_prob = model(ids).logits[0, -targets - 1 : -1].log_softmax(-1)
    total -= log_prob.gather(1, ids[0, -targets:, None]).sum().item()
  return total


def main():
  work = json.loads(pathlib.Path(sys.argv[1]).read_text())
  torch.set_num_threads(work['threads'])
  model = peer_torch.load(work['model'], 'float32').eval()
  model.generation_config.eos_token_id = None  # nothing stops it
  prompts = [t['tokens'][: -t['num_target']] for t in work['texts']]
  for line in sys.stdin:
    new_tokens, answer = json.loads(line)['new_tokens'], {}
    start = time.perf_counter()
    with torch.inference_mode():
      if new_tokens:
        answer['tokens'] = generate(model, prompts, new_tokens)
      else:
        answer['loss'] = loss(model, work['texts'])
    seconds = time.perf_counter() - start
    answer = {'seconds': seconds} | answer | {
      'peak_mb': resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6,
      'versions': {m.__name__: m.__version__ for m in (torch, transformers)},
    }  # fmt: skip
    print(json.dumps(answer), flush=True)


if __name__ == '__main__':
  main()
