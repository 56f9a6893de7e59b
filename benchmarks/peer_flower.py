"""The peer: Flower's simulation engine driving the torch peer.

A child process of benchmarks/peers.py, in a virtual environment of its own:

  python benchmarks/peer_flower.py WORKLOAD.json

As Flower's LLM example does, every call of a client loads the base and wraps it
in peft; the server is its FedAvg. Clients train one after another, with all
threads. Speaks the protocol of peer_torch.py.
"""

import json
import os
import pathlib
import resource
import sys
import tempfile
import time

import flwr
import numpy as np
import peer_torch
import torch
import transformers
from flwr import simulation
from flwr.app import (
  ArrayRecord,
  ConfigRecord,
  Message,
  MetricRecord,
  RecordDict,
)
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp
from flwr.serverapp.strategy import FedAvg


def padded(own, rank, sent):
  """Fills the slots past `rank` with zeros."""
  out = {name: torch.zeros_like(x) for name, x in sent.items()}
  for name, p in own.items():
    peer_torch.slots(name, out[name], rank).copy_(p.detach())
  return out


def make_client(path, base):
  """Returns the client app of a workload, its base in a folder."""
  app = ClientApp()

  @app.train()
  def train(message, context):
    work = json.loads(pathlib.Path(path).read_text())
    ask = dict(message.content['config'])
    torch.set_num_threads(work['threads'])
    model = transformers.AutoModelForCausalLM.from_pretrained(
      base, dtype=peer_torch.DTYPES[ask['dtype']]
    ).requires_grad_(False)
    client = work['cases'][ask['case']][context.node_config['partition-id']]
    # Only its own adapter is made.
    alone = work | {'cases': {ask['case']: [client]}}
    trainer = peer_torch.Trainer(model, alone)
    sent = message.content['arrays'].to_torch_state_dict()
    own, losses, tokens = trainer.train_client(client, sent, ask['padding'])
    metrics = {
      'num-examples': 1,
      'tokens': tokens,
      'loss': losses[0].item(),
      'peak_mb': resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6,
    }
    content = RecordDict(
      {
        'arrays': ArrayRecord(padded(own, client['rank'], sent)),
        'metrics': MetricRecord(metrics),
      }
    )
    return Message(content=content, reply_to=message)

  return app


def added(replies, _):
  """Adds tokens up; of losses the first, of memory the most."""
  metrics = [next(iter(r.metric_records.values())) for r in replies]
  return MetricRecord(
    {
      'tokens': sum(m['tokens'] for m in metrics),
      'loss': float(np.mean([m['loss'] for m in metrics])),
      'peak_mb': max(m['peak_mb'] for m in metrics),
    }
  )


def make_server(work, shapes):
  """Returns the server app: a round for every line on stdin."""
  app = ServerApp()

  @app.main()
  def main(grid, context):
    for line in sys.stdin:
      ask = json.loads(line)
      count = len(work['cases'][ask['case']])
      strategy = FedAvg(
        fraction_evaluate=0.0,
        min_train_nodes=count,
        min_available_nodes=count,
        train_metrics_aggr_fn=added,
      )
      keep = {k: ask[k] for k in ('case', 'dtype', 'padding')}
      start = time.perf_counter()
      result = strategy.start(
        grid=grid, initial_arrays=ArrayRecord(dict(shapes)), num_rounds=1,
        train_config=ConfigRecord(keep),
      )  # fmt: skip
      metrics = result.train_metrics_clientapp[1]
      answer = {
        'seconds': time.perf_counter() - start,
        'tokens': int(metrics['tokens']),
        'first_loss': metrics['loss'],
        'peak_mb': metrics['peak_mb']
        + resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6,
        'versions': {'flwr': flwr.__version__},
      }
      print(json.dumps(answer), flush=True)

  return app


def main():
  # Ray's workers import peer_torch too.
  os.environ['PYTHONPATH'] = str(pathlib.Path(__file__).resolve().parent)
  work = json.loads(pathlib.Path(sys.argv[1]).read_text())
  with tempfile.TemporaryDirectory() as base:
    model = peer_torch.load(work['model'], 'float32')
    # As read from GGUF it refuses to be saved: a fresh one of its shape is.
    fresh = transformers.AutoModelForCausalLM.from_config(
      transformers.AutoConfig.for_model(**without_quantizer(model.config))
    )
    fresh.load_state_dict(model.state_dict())
    fresh.save_pretrained(base)
    del fresh
    sent = peer_torch.Trainer(model, work, one_adapter=True).initial()
    del model
    simulation.run_simulation(
      server_app=make_server(work, sent),
      client_app=make_client(sys.argv[1], base),
      num_supernodes=len(work['cases']['chat']),
      backend_config={
        'client_resources': {'num_cpus': work['threads'], 'num_gpus': 0.0}
      },
    )


def without_quantizer(config):
  fields = config.to_dict()
  return {k: v for k, v in fields.items() if k != 'quantization_config'}


if __name__ == '__main__':
  main()
