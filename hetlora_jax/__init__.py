"""HetLoRA and its family: federated LoRA with a rank for every client, in JAX.

Start reading at `hetlora_jax.rounds`.
"""
